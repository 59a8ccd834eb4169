--- run.lua: runs notebooks without Jupyter: the code cells of each in order, in the notebook's folder, and writes what
-- they show as text. It ends with status 1 at the first error.
--
--   luajit notebooks/run.lua notebooks/02-collapse-and-cure.ipynb
--   luajit notebooks/run.lua --set steps=20 notebooks/*.ipynb     turns the first `steps = ...` of each into steps = 20
--   luajit notebooks/run.lua --pictures out notebooks/*.ipynb     keeps the pictures as out/NOTEBOOK-1.png, ...

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)notebooks/" .. "lua/vertex/start.lua")

local lfs = require "lfs"
local core = require "vertex.core"
local vx = require "vertex"
local display = require "vertex.interactive.display"
local json = require "vertex.json"
local Session = require "vertex.interactive.session"
local show = require "vertex.interactive.show"

--- Ends the program with a message and status 2.
local function usage(message)
  io.stderr:write(message, "\nusage: luajit notebooks/run.lua [--set NAME=VALUE] [--pictures DIR] FILE.ipynb ...\n")
  os.exit(2)
end

--- Reads the sources of a notebook's code cells.
local function code_cells(file)
  local f, reason = io.open(file, "r")
  if not f then usage(reason) end
  local notebook = json.decode(f:read "*a")
  f:close()
  if type(notebook) ~= "table" or type(notebook.cells) ~= "table" then usage(file .. " is no notebook") end
  local sources = {}
  for _, cell in ipairs(notebook.cells) do
    local source = type(cell.source) == "table" and table.concat(cell.source) or cell.source
    if cell.cell_type == "code" then sources[#sources + 1] = source end
  end
  return sources
end

local ENDINGS = { ["image/png"] = "png", ["image/svg+xml"] = "svg", ["image/jpeg"] = "jpg" }

local keep -- of --pictures: { folder, name of the notebook, number of pictures so far }

--- Writes what a notebook would show as text, and of a picture its size, or where it is kept.
local function write_bundle(bundle)
  local pictures = 0
  for form, bytes in pairs(bundle) do
    if form:find "^image/" then
      local path
      if keep and ENDINGS[form] then
        keep.count = keep.count + 1
        path = ("%s/%s-%d.%s"):format(keep.folder, keep.name, keep.count, ENDINGS[form])
        core.write_file(path, bytes)
      end
      io.write(("[%s, %d bytes%s]\n"):format(form, #bytes, path and ": " .. path or ""))
      pictures = pictures + 1
    end
  end
  if pictures == 0 then io.write(bundle["text/plain"], "\n") end
end

-- What a cell shows under an id: in the order of the ids, the last of each. It is written when the cell is over.
local ids, last

--- Takes what display.show is given.
local function backend(bundle, options)
  if options.id == nil then return write_bundle(bundle) end
  if not last[options.id] then ids[#ids + 1] = options.id end
  last[options.id] = bundle
end

--- Puts the values of --set into a cell's source. used: the names that found a place so far.
local function with_settings(source, settings, used)
  for name, value in pairs(settings) do
    for _, before in ipairs { "\n", "\nlocal " } do
      local text, n = ("\n" .. source):gsub("(" .. before .. name .. " = )[^\n]*",
        function(head) return head .. value end, 1)
      if n > 0 and not used[name] then source, used[name] = text:sub(2), true end
    end
  end
  return source
end

--- Runs a notebook's cells.
local function run(file, settings, pictures)
  local session = Session.new { env = setmetatable({ vx = vx }, { __index = _G }),
    name = function(n) return ("%s[%d]"):format(file, n) end }
  local sources, here = code_cells(file), lfs.currentdir()
  local used = {}
  if pictures then
    local made, reason = core.make_folders(pictures)
    if not made then usage(("--pictures %s: %s"):format(pictures, reason)) end
    local folder = pictures:sub(1, 1) == "/" and pictures or here .. "/" .. pictures
    keep = { folder = folder, name = file:match "([^/]+)$":gsub("%.ipynb$", ""), count = 0 }
  end
  lfs.chdir(file:match "^(.*)/[^/]*$" or ".")
  for _, source in ipairs(sources) do
    source = with_settings(source, settings, used)
    io.write("> ", (source:gsub("\n", "\n  ")), "\n")
    ids, last = {}, {}
    local values, shown = session:run(source)
    for _, id in ipairs(ids) do write_bundle(last[id]) end
    if not values then
      io.stderr:write(Session.error_text(shown), "\n")
      os.exit(shown.interrupted and 130 or 1)
    end
    for i = 1, shown and values.n or 0 do
      local meta = getmetatable(values[i])
      local rich = type(meta) == "table" and rawget(meta, "__mime")
      write_bundle(rich and display.mime(values[i]) or { ["text/plain"] = show.value(values[i]) })
    end
    io.flush()
  end
  for name in pairs(settings) do
    if not used[name] then usage(("--set %s: %s sets no such variable"):format(name, file)) end
  end
  lfs.chdir(here)
end

local settings, files, pictures, i = {}, {}, nil, 1
while arg[i] do
  if arg[i] == "--set" then
    local name, value = (arg[i + 1] or ""):match "^([%a_][%w_]*)=(.+)$"
    if not name then usage "--set: expected NAME=VALUE" end
    settings[name], i = value, i + 1
  elseif arg[i] == "--pictures" then
    pictures, i = arg[i + 1] or usage "--pictures: expected a folder", i + 1
  elseif arg[i]:find "^%-" then
    usage("unknown option " .. arg[i])
  else
    files[#files + 1] = arg[i]
  end
  i = i + 1
end
if #files == 0 then usage "which notebook?" end
display.mode, display.backend = "notebook", backend
Session.interpret_files()
Session.watch_programs()
for _, file in ipairs(files) do run(file, settings, pictures) end
