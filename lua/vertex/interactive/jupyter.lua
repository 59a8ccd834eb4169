--- kernel.lua: Vertex in Jupyter notebooks. A program and a module.
--
--   luajit lua/vertex/interactive/jupyter.lua install [--user | --prefix P | --sys-prefix]    tells Jupyter of the
--   kernel "vertex"
--   luajit lua/vertex/interactive/jupyter.lua CONNECTION_FILE                                 is what Jupyter runs then
--
-- A cell is an input of session.lua, `?name` (help.lua) or `!command` for the shell. What it prints, shows
-- (display.lua) and returns goes to the notebook; io.read asks there. A cell that runs is stopped by SIGINT, Jupyter's
-- interrupt. Requests are answered one after another, only the heartbeat has a thread of its own. What a cell prints is
-- gathered for FLUSH_EVERY seconds, so that a loop does not flood the notebook.

if ... ~= "vertex.interactive.jupyter" then -- run as a program
  local ffi = require "ffi"
  ffi.cdef "char *realpath(const char *path, char *out);"
  dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)interactive/" .. "start.lua")
end

local core = require "vertex.core"
local display = require "vertex.interactive.display"
local help = require "vertex.interactive.help"
local Session = require "vertex.interactive.session"
local show = require "vertex.interactive.show"
local json = require "vertex.json"
local utf8 = require "vertex.utf8"
local wire = require "vertex.interactive.jupyter_wire"

local FLUSH_EVERY = 0.05

local Kernel = {}
Kernel.__index = Kernel

-- -- Text -------------------------------------------------------------------------------------------------------------

--- Jupyter counts a cursor's place in characters, Lua in bytes.
local function bytes_of(text, characters)
  local n = 0
  for at in text:gmatch "()[%z\1-\127\194-\255]" do
    if n == characters then return at - 1 end
    n = n + 1
  end
  return #text
end
local function characters_of(text, bytes) return utf8.length(text:sub(1, bytes)) end

-- -- What goes to the notebook ----------------------------------------------------------------------------------------

function Kernel:publish(kind, content, metadata)
  self.talk:send(self.iopub, { kind }, kind, content, self.parent, metadata)
end

function Kernel:reply(message, kind, content)
  content.status = content.status or "ok"
  self.talk:send(message.socket, message.idents, kind, content, message.json)
end

--- Sends the output gathered so far. last: nothing follows that could complete a character.
function Kernel:flush(last)
  local written = self.written -- runs of output to the same file: arrays of texts with a name
  self.written, self.flushed = {}, core.time()
  for _, run in ipairs(written) do
    local text, rest = utf8.clean(self.rest[run.name] .. table.concat(run))
    self.rest[run.name] = rest
    if text ~= "" then self:publish("stream", { name = run.name, text = text }) end
  end
  if not last then return end
  for name, rest in pairs(self.rest) do
    if rest ~= "" then self:publish("stream", { name = name, text = "\239\191\189" }) end
    self.rest[name] = ""
  end
end

--- Output of the cell. name: "stdout" or "stderr".
function Kernel:write(name, text)
  local run = self.written[#self.written]
  if not run or run.name ~= name then
    run = { name = name }
    self.written[#self.written + 1] = run
  end
  run[#run + 1] = text
  self:tick()
end

--- Called often while a cell runs.
function Kernel:tick()
  if core.time() - self.flushed < FLUSH_EVERY then return end
  self:flush()
  if self:orphaned() then os.exit(1) end
end

--- Has Jupyter ended without telling?
function Kernel:orphaned() return self.parent_process and core.parent() ~= self.parent_process end

--- A bundle of forms as JSON can hold it: texts as valid UTF-8, other bytes in base64.
local function jupyter_bundle(bundle)
  local data = {}
  for form, value in pairs(bundle) do
    if type(value) ~= "string" then
      data[form] = value -- application/json
    elseif form:find "^text/" or form == "image/svg+xml" or form == "application/javascript" then
      local text, rest = utf8.clean(value)
      data[form] = rest == "" and text or text .. "\239\191\189"
    else
      data[form] = display.base64(value)
    end
  end
  return json.object(data)
end

--- The forms of a value: those its __mime tells, else its text as a session shows it.
local function forms_of(value)
  local meta = getmetatable(value)
  if type(meta) == "table" and rawget(meta, "__mime") then
    local bundle, metadata = display.mime(value)
    return jupyter_bundle(bundle), json.object(metadata)
  end
  return jupyter_bundle { ["text/plain"] = show.value(value) }, json.object()
end

--- What display.show calls. An id that this cell has shown before is replaced where it stands.
function Kernel:display(bundle, options)
  self:flush()
  local kind, transient = "display_data", json.object()
  if options.id ~= nil then
    local id = tostring(options.id)
    kind = self.displayed[id] and "update_display_data" or kind
    self.displayed[id], transient.display_id = true, id
  end
  self:publish(kind, { data = jupyter_bundle(bundle), metadata = json.object(options.metadata), transient = transient })
end

-- -- Standard files ---------------------------------------------------------------------------------------------------

--- One line from the person at the notebook; nil when interrupted.
function Kernel:ask()
  if not self.input_from then core.fail "io.read: this notebook's front end takes no input" end
  self:flush(true)
  local request = self.input_from
  while self.talk:receive(self.stdin) do end -- late answers to older questions
  self.talk:send(self.stdin, request.idents, "input_request", { prompt = "", password = false }, request.json)
  while not core.interrupted() do
    local answer = wire.poll({ self.stdin }, -1)[self.stdin] and self.talk:receive(self.stdin)
    if answer and answer.kind == "input_reply" then return tostring(answer.content.value or "") end
  end
end

function Kernel:read(...)
  local formats, out = { ... }, {}
  for i = 1, math.max(1, #formats) do
    local format, line = formats[i] or "*l", self:ask()
    if not line then return nil end
    local letter = type(format) == "string" and format:match "^%*?(%a)"
    if type(format) == "number" then
      out[i] = line:sub(1, format)
    elseif letter == "n" then
      out[i] = tonumber(line)
    elseif letter == "a" or letter == "L" then
      out[i] = line .. "\n"
    elseif letter == "l" then
      out[i] = line
    else
      core.fail("io.read: format '%s', expected a number, *l, *n or *a", tostring(format))
    end
  end
  return unpack(out, 1, math.max(1, #formats))
end

--- print, io.write, io.read and the methods of io.stdout, io.stderr and io.stdin go to the notebook from now on.
function Kernel:redirect()
  local names = { [io.stdout] = "stdout", [io.stderr] = "stderr" }
  local file, write, read = getmetatable(io.stdout).__index, io.stdout.write, io.stdout.read
  local function text_of(...)
    local parts = { ... }
    for i = 1, select("#", ...) do
      local kind = type(parts[i])
      if kind ~= "string" and kind ~= "number" then
        core.fail("write: argument %d is a %s, expected a string or a number", i, kind)
      end
    end
    return table.concat(parts)
  end
  function file.write(f, ...)
    if not names[f] then return write(f, ...) end
    self:write(names[f], text_of(...))
    return true
  end
  function file.read(f, ...)
    if f ~= io.stdin then return read(f, ...) end
    return self:read(...)
  end
  rawset(io, "write", function(...) return io.output():write(...) end)
  rawset(io, "read", function(...) return io.input():read(...) end)
  function _G.print(...)
    local parts = { ... }
    for i = 1, select("#", ...) do parts[i] = tostring(parts[i]) end
    self:write("stdout", table.concat(parts, "\t") .. "\n")
  end
end

-- -- Requests ---------------------------------------------------------------------------------------------------------

local requests = {}

local function language()
  return { name = "lua", version = "5.1", mimetype = "text/x-lua", file_extension = ".lua", pygments_lexer = "lua",
    codemirror_mode = "lua" }
end

function requests.kernel_info_request(kernel, message)
  kernel:reply(message, "kernel_info_reply", { protocol_version = wire.VERSION, implementation = "vertex",
    implementation_version = core.version,
    language_info = language(), banner = ("Vertex %s, %s"):format(core.version, jit.version), debugger = false,
      help_links = json.array() })
end

local RED, PLAIN = "\27[31m", "\27[0m"

local function error_content(problem)
  local lines = {}
  for line in (Session.error_text(problem) .. "\n"):gmatch "(.-)\n" do lines[#lines + 1] = utf8.clean(line) end
  lines[1] = RED .. lines[1] .. PLAIN
  return { ename = problem.interrupted and "Interrupted" or problem.syntax and "SyntaxError" or "Error",
    evalue = (utf8.clean(problem.message)),
    traceback = json.array(lines) }
end

--- Several values become several results; the last is the one a notebook numbers.
function Kernel:show_values(values, silent)
  for i = 1, silent and 0 or values.n do
    local data, metadata = forms_of(values[i])
    local content = { data = data, metadata = metadata }
    if i == values.n then content.execution_count = self.session.count end
    self:publish(i == values.n and "execute_result" or "display_data", content)
  end
end

--- The input that runs a shell command and prints what it writes.
local function shell(command)
  return ("for line in io.popen(%q, 'r'):lines() do print(line) end"):format("{ " .. command .. "\n} 2>&1")
end

local function expressions(kernel, asked)
  local out = json.object()
  for name, text in pairs(type(asked) == "table" and asked or {}) do
    local values, problem = kernel.session:run("return " .. tostring(text))
    kernel.session.count = kernel.session.count - 1
    if values then
      local data, metadata = forms_of(values[1])
      out[name] = { status = "ok", data = data, metadata = metadata }
    else
      out[name] = error_content(problem)
      out[name].status = "error"
    end
  end
  return out
end

function requests.execute_request(kernel, message)
  local content, session = message.content, kernel.session
  local code, silent = tostring(content.code or ""), content.silent == true
  local keep = not silent and content.store_history ~= false and code:find "%S" ~= nil
  kernel.displayed, kernel.input_from = {}, content.allow_stdin and message or nil
  if not silent then kernel:publish("execute_input", { code = code, execution_count = session.count + 1 }) end
  local values, problem, shown = { n = 0 }, nil, nil
  local payload = json.array()
  local about, command = code:match "^%s*%?%s*(.-)%s*$", code:match "^%s*!(.*)$"
  if about then
    session.count = session.count + 1
    local text, reason = help.about(session, about)
    if text then
      payload[1] = { source = "page", data = jupyter_bundle { ["text/plain"] = text }, start = 0 }
    else
      problem = { message = reason, trace = {} }
    end
  elseif code:find "%S" then
    kernel.flushed = core.time() - FLUSH_EVERY -- what is printed first appears at once
    values, shown = session:run(command and shell(command) or code)
    if not values then problem, shown = shown, nil end
  else
    session.count = session.count + 1
  end
  kernel:flush(true)
  if shown then
    local ok, reason = pcall(kernel.show_values, kernel, values, silent)
    if not ok then problem = { message = tostring(reason), trace = {} } end
  end
  if keep then kernel.history[#kernel.history + 1] = { session.count, code } else session.count = session.count - 1 end
  local reply = { execution_count = session.count, payload = payload }
  if problem then
    for key, value in pairs(error_content(problem)) do reply[key] = value end
    kernel:publish("error", error_content(problem))
    reply.status = "error"
  else
    reply.user_expressions = expressions(kernel, content.user_expressions)
  end
  kernel.input_from = nil
  kernel:flush(true)
  if problem and content.stop_on_error ~= false then kernel:set_waiting_aside() end
  kernel:reply(message, "execute_reply", reply)
end

function requests.complete_request(kernel, message)
  local code = tostring(message.content.code or "")
  local cursor = bytes_of(code, tonumber(message.content.cursor_pos) or #code)
  local first, names = kernel.session:complete(code, cursor)
  kernel:reply(message, "complete_reply", { matches = json.array(names), cursor_start = characters_of(code, first - 1),
    cursor_end = characters_of(code, cursor), metadata = json.object() })
end

function requests.inspect_request(kernel, message)
  local code = tostring(message.content.code or "")
  local cursor = bytes_of(code, tonumber(message.content.cursor_pos) or #code)
  local before, after = code:sub(1, cursor):match "[%w_.:%-]*$", code:sub(cursor + 1):match "^[%w_]*"
  local text = help.about(kernel.session, (before .. after):gsub("^[.:%-]+", "") .. "")
  kernel:reply(message, "inspect_reply", { found = text ~= nil, data = text and jupyter_bundle { ["text/plain"] = text }
    or json.object(),
    metadata = json.object() })
end

function requests.is_complete_request(kernel, message)
  local status, indent = Session.state(tostring(message.content.code or ""))
  kernel:reply(message, "is_complete_reply", { status = status, indent = indent })
end

--- The inputs since the kernel began, each as Jupyter wants it: {0, line, input}.
function requests.history_request(kernel, message)
  local ask, found = message.content, {}
  local pattern = ask.hist_access_type == "search"
    and "^" .. tostring(ask.pattern or "*"):gsub("[%^%$%(%)%%%.%[%]%+%-]", "%%%0")
    :gsub("[*?]", { ["*"] = ".*", ["?"] = "." }) .. "$"
  local seen = {}
  for _, entry in ipairs(kernel.history) do
    local inside = ask.hist_access_type ~= "range" or entry[1] >= (tonumber(ask.start) or 0)
      and entry[1] < (tonumber(ask.stop) or math.huge)
    if inside and (not pattern or entry[2]:find(pattern)) and not (ask.unique and seen[entry[2]]) then
      seen[entry[2]] = true
      found[#found + 1] = json.array { 0, entry[1], ask.output and json.array { entry[2], "" } or entry[2] }
    end
  end
  local n = ask.hist_access_type ~= "range" and tonumber(ask.n)
  while n and #found > n do table.remove(found, 1) end
  kernel:reply(message, "history_reply", { history = json.array(found) })
end

function requests.comm_info_request(kernel, message)
  kernel:reply(message, "comm_info_reply", { comms = json.object() })
end

--- Widgets are not known here: what is opened is closed.
function requests.comm_open(kernel, message)
  kernel:publish("comm_close", { comm_id = message.content.comm_id, data = json.object() })
end
function requests.comm_msg() end
function requests.comm_close() end

function requests.shutdown_request(kernel, message)
  kernel.over = true
  kernel:reply(message, "shutdown_reply", { restart = message.content.restart == true })
end

--- Only idle kernels get here; what runs is interrupted by SIGINT.
function requests.interrupt_request(kernel, message) kernel:reply(message, "interrupt_reply", {}) end

-- -- The loop ---------------------------------------------------------------------------------------------------------

--- Reports what went wrong in the kernel itself, where Jupyter shows its own messages.
function Kernel:complain(text) self.log(("vertex kernel: %s\n"):format(text)) end

function Kernel:answer(message)
  self.parent = message.json
  self:publish("status", { execution_state = "busy" })
  local handler = message.aborted and requests.aborted or requests[message.kind]
  if handler then
    local ok, problem = xpcall(handler, debug.traceback, self, message)
    if not ok then
      self:complain(problem)
      self:reply(message, message.kind:gsub("_request$", "_reply"),
        { status = "error", ename = "KernelError", evalue = tostring(problem),
        traceback = json.array() })
    end
  else
    self:complain(("%s is no request this kernel knows"):format(message.kind))
  end
  self:publish("status", { execution_state = "idle" })
end

--- The next message of a socket; nil where none is there, or none of ours.
function Kernel:next_message(socket)
  local message, problem = self.talk:receive(socket)
  if problem then self:complain(problem) end
  if message then message.socket = socket end
  return message
end

--- What was asked before a cell failed is answered after it: no further cell is run, since it may need what failed.
function Kernel:set_waiting_aside()
  while wire.poll({ self.shell }, 0)[self.shell] do
    local message = self:next_message(self.shell)
    if message then
      message.aborted = message.kind == "execute_request"
      self.waiting[#self.waiting + 1] = message
    end
  end
end

function requests.aborted(kernel, message)
  kernel:reply(message, "execute_reply", { status = "aborted", execution_count = kernel.session.count })
end

function Kernel:serve()
  while not self.over do
    local ready = self.waiting[1] and {} or wire.poll({ self.control, self.shell }, 1000)
    self.over = self:orphaned()
    core.session_interrupts() -- an interrupt of an idle kernel is over here
    for _, socket in ipairs { self.control, self.shell } do
      local message = ready[socket] and not self.over and self:next_message(socket)
      if message then self:answer(message) end
    end
    local message = table.remove(self.waiting, 1)
    if message then self:answer(message) end
  end
end

--- Runs a kernel until it is told to shut down.
-- @param connection what Jupyter's connection file holds: transport, ip, five ports, key
function Kernel.run(connection)
  local function endpoint(port)
    return ("%s://%s%s%d"):format(connection.transport, connection.ip, connection.transport == "tcp" and ":" or "-",
      connection[port .. "_port"])
  end
  if connection.signature_scheme and connection.signature_scheme ~= "hmac-sha256" then
    core.fail("kernel: signature scheme %s, expected hmac-sha256", connection.signature_scheme)
  end
  local context, beat = wire.context(), wire.context()
  local self = setmetatable({ talk = wire.talk(connection.key or "", "kernel"), parent = "{}", history = {},
    displayed = {}, waiting = {}, written = {},
    rest = { stdout = "", stderr = "" }, flushed = 0, parent_process = os.getenv "JPY_PARENT_PID" and core.parent() },
      Kernel)
  local stderr, write = io.stderr, io.stderr.write
  function self.log(text) write(stderr, text) end
  self.shell = wire.socket(context, "ROUTER", "bind", endpoint "shell")
  self.control = wire.socket(context, "ROUTER", "bind", endpoint "control")
  self.stdin = wire.socket(context, "ROUTER", "bind", endpoint "stdin")
  self.iopub = wire.socket(context, "PUB", "bind", endpoint "iopub")
  wire.echo(wire.socket(beat, "REP", "bind", endpoint "hb"))

  core.session_interrupts()
  self.session = Session.new { name = function(n) return ("In[%d]"):format(n) end }
  self.session.tick = function() self:tick() end
  Session.interpret_files()
  rawset(_G, "vx", require "vertex")
  display.mode, display.backend = "notebook", function(bundle, options) self:display(bundle, options) end
  self:redirect()
  self:publish("status", { execution_state = "starting" })
  self:serve()
  for _, socket in ipairs { self.shell, self.control, self.stdin, self.iopub } do socket:close() end
  wire.terminate(context)
  wire.shut_down(beat)
end

-- -- The program ------------------------------------------------------------------------------------------------------

local function read_file(path)
  local f, reason = io.open(path, "r")
  if not f then core.fail("%s", reason) end
  local text = f:read "*a"
  f:close()
  return text
end

--- The folder in which Jupyter looks for data: of the user, of an installation prefix, or of the Python that `python3`
-- is.
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
  core.write_file(folder .. "/kernel.json",
    json.encode({ argv = json.array { arg[-1] or "luajit", core.directory .. "/interactive/jupyter.lua",
    "{connection_file}" },
    display_name = "Lua (Vertex)", language = "lua", interrupt_mode = "signal" }, { indent = true }) .. "\n")
  return folder
end

local USAGE = [[
usage: luajit lua/vertex/interactive/jupyter.lua install [--user | --prefix P | --sys-prefix]
       luajit lua/vertex/interactive/jupyter.lua CONNECTION_FILE
]]

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
  local connection, problem = json.decode(read_file(first))
  if type(connection) ~= "table" then core.fail("%s is no connection file: %s", first, tostring(problem)) end
  for _, key in ipairs { "shell_port", "control_port", "stdin_port", "iopub_port", "hb_port" } do
    if type(connection[key]) ~= "number" then
      core.fail("%s is no connection file: its %s is %s", first, key, tostring(connection[key]))
    end
  end
  connection.transport, connection.ip = connection.transport or "tcp", connection.ip or "127.0.0.1"
  Kernel.run(connection)
  return 0
end

if ... ~= "vertex.interactive.jupyter" then
  local ok, status = pcall(main, ...)
  if not ok then io.stderr:write(tostring(status), "\n") end
  os.exit(ok and status or 1)
end

return Kernel
