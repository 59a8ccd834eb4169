--- jupyter.lua: the program that makes Vertex a language of Jupyter's notebooks.
--
--   luajit lua/vertex/interactive/jupyter.lua install [--user | --prefix P | --sys-prefix]
--       tells Jupyter that there is a kernel "vertex"
--   luajit lua/vertex/interactive/jupyter.lua CONNECTION_FILE
--       is what Jupyter then runs for each notebook
--
-- jupyter_server.lua answers Jupyter's requests, jupyter_wire.lua carries them.

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)interactive/" .. "start.lua")

local core = require "vertex.core"
local json = require "vertex.json"
local Server = require "vertex.interactive.jupyter_server"

local USAGE = [[
usage: luajit lua/vertex/interactive/jupyter.lua install [--user | --prefix P | --sys-prefix]
       luajit lua/vertex/interactive/jupyter.lua CONNECTION_FILE
]]

-- -- Installing -------------------------------------------------------------------------------------------------------

--- Finds the folder in which Jupyter looks for data: that of the user, of an installation prefix, or of the Python that
-- `python3` is.
local function jupyter_folder(option, prefix)
  if option == "--prefix" then return prefix .. "/share/jupyter" end
  if option == "--sys-prefix" then
    local pipe = assert(io.popen("python3 -c 'import sys; print(sys.prefix)'", "r"))
    local found = pipe:read "*l"
    pipe:close()
    if not found or found == "" then core.fail "--sys-prefix: python3 does not tell its prefix" end
    return found .. "/share/jupyter"
  end
  local home = os.getenv "HOME"
  local data = os.getenv "XDG_DATA_HOME" or home and home .. "/.local/share"
  local folder = os.getenv "JUPYTER_DATA_DIR" or data and data .. "/jupyter"
  if not folder then core.fail "install --user: neither HOME nor XDG_DATA_HOME says where" end
  return folder
end

--- Writes kernel.json where Jupyter finds it; returns the folder.
local function install(option, prefix)
  local folder = jupyter_folder(option, prefix) .. "/kernels/vertex"
  local made, reason = core.make_folders(folder)
  if not made then core.fail("%s", reason) end
  local program = core.directory .. "/interactive/jupyter.lua"
  core.write_file(folder .. "/kernel.json", json.encode { argv = json.array { arg[-1] or "luajit", program,
    "{connection_file}" }, display_name = "Lua (Vertex)", language = "lua", interrupt_mode = "signal" } .. "\n")
  return folder
end

-- -- Running ----------------------------------------------------------------------------------------------------------

--- Reads Jupyter's connection file: a table with transport, ip, five ports and key.
local function read_connection(path)
  local f, reason = io.open(path, "r")
  if not f then core.fail("%s", reason) end
  local text = f:read "*a"
  f:close()
  local connection, problem = json.decode(text)
  if type(connection) ~= "table" then core.fail("%s is no connection file: %s", path, tostring(problem)) end
  for _, key in ipairs { "shell_port", "control_port", "stdin_port", "iopub_port", "hb_port" } do
    if type(connection[key]) ~= "number" then
      core.fail("%s is no connection file: its %s is %s", path, key, tostring(connection[key]))
    end
  end
  connection.transport, connection.ip = connection.transport or "tcp", connection.ip or "127.0.0.1"
  return connection
end

--- Does what the command line says; returns the exit status.
local function main(first, option, prefix, more)
  if first == "--help" or first == "-h" then
    io.write(USAGE)
    return 0
  elseif first == "install" and not more and (option == "--prefix") == (prefix ~= nil)
    and (option == nil or option == "--user" or option == "--prefix" or option == "--sys-prefix") then
    local folder = install(option, prefix)
    io.write(("installed in %s; `jupyter notebook` now offers \"Lua (Vertex)\"\n"):format(folder))
    return 0
  elseif not first or first:find "^%-" or first == "install" or option then
    io.stderr:write(USAGE)
    return 2
  end
  Server.run(read_connection(first))
  return 0
end

local ok, status = pcall(main, ...)
if not ok then io.stderr:write(tostring(status), "\n") end
os.exit(ok and status or 1)
