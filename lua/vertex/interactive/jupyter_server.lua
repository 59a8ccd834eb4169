--- jupyter_server.lua: one notebook's process: the sockets that Jupyter asks on, the session that runs the cells, and
-- the loop that answers one request after another [1]. Jupyter calls it a kernel.
--
-- What a cell prints, shows and returns goes to the notebook (jupyter_output.lua); jupyter_requests.lua says what each
-- request is answered. A running cell is stopped by SIGINT, which is Jupyter's interrupt. Only the heartbeat has a
-- thread of its own.
--
-- [1] https://jupyter-client.readthedocs.io/en/stable/messaging.html, version 5.3 of the protocol

local core = require "vertex.core"
local display = require "vertex.interactive.display"
local json = require "vertex.json"
local output = require "vertex.interactive.jupyter_output"
local requests = require "vertex.interactive.jupyter_requests"
local Session = require "vertex.interactive.session"
local wire = require "vertex.interactive.jupyter_wire"

local Server = {}
Server.__index = Server

-- -- Messages ---------------------------------------------------------------------------------------------------------

--- Publishes a message that belongs to the request which is being answered.
-- @param kind msg_type
-- @param content table
-- @param[opt] metadata table
function Server:publish(kind, content, metadata)
  self.talk:send(self.iopub, { kind }, kind, content, self.parent, metadata)
end

--- Answers a request.
-- @param message table, the request as of Talk:receive, with its socket
-- @param kind msg_type
-- @param content table; its status is "ok" where it has none
function Server:reply(message, kind, content)
  content.status = content.status or "ok"
  self.talk:send(message.socket, message.idents, kind, content, message.json)
end

--- Asks the person at the notebook for a line.
-- @return string; nil after an interrupt
-- @raise where the notebook's front end takes no input
function Server:ask()
  if not self.input_from then core.fail "io.read: this notebook's front end takes no input" end
  self.out:flush(true)
  local request = self.input_from
  while self.talk:receive(self.stdin) do end -- late answers to older questions
  self.talk:send(self.stdin, request.idents, "input_request", { prompt = "", password = false }, request.json)
  while not core.interrupted() do
    local answer = wire.poll({ self.stdin }, -1)[self.stdin] and self.talk:receive(self.stdin)
    if answer and answer.kind == "input_reply" then return tostring(answer.content.value or "") end
  end
end

--- Writes what went wrong here, not in a cell, where Jupyter shows its own messages.
-- @param text string
function Server:complain(text) self.log(("vertex in jupyter: %s\n"):format(text)) end

--- Says whether Jupyter has ended without telling.
-- @return boolean
function Server:orphaned() return self.parent_process ~= nil and core.parent() ~= self.parent_process end

-- -- The loop ---------------------------------------------------------------------------------------------------------

--- Answers one request: a failure of its own is reported and answered as an error.
local function answer(self, message)
  self.parent = message.json
  self:publish("status", { execution_state = "busy" })
  local handler = message.aborted and requests.aborted or requests[message.kind]
  if handler then
    local ok, problem = xpcall(handler, debug.traceback, self, message)
    if not ok then
      self:complain(problem)
      self:reply(message, message.kind:gsub("_request$", "_reply"), { status = "error", ename = "InternalError",
        evalue = tostring(problem), traceback = json.array() })
    end
  else
    self:complain(("%s is no request that is known here"):format(message.kind))
  end
  self:publish("status", { execution_state = "idle" })
end

--- Answers one request; says what went wrong where even its failure could not be answered.
local function answered(self, message)
  local ok, problem = xpcall(answer, debug.traceback, self, message)
  if not ok then self:complain(("%s could not be answered: %s"):format(message.kind, tostring(problem))) end
end

--- Takes the next message of a socket; nil where none is there, or none of ours.
local function next_message(self, socket)
  local ok, message, problem = pcall(self.talk.receive, self.talk, socket)
  if not ok then message, problem = nil, "a message that cannot be read: " .. tostring(message) end
  if problem then self:complain(problem) end
  if message then message.socket = socket end
  return message
end

--- Sets aside what was asked before a cell failed, to be answered after it: no further cell is run, since it may need
-- what failed.
function Server:set_waiting_aside()
  while wire.poll({ self.shell }, 0)[self.shell] do
    local message = next_message(self, self.shell)
    if message then
      message.aborted = message.kind == "execute_request"
      self.waiting[#self.waiting + 1] = message
    end
  end
end

--- Answers requests until one says that it is over, or Jupyter is gone.
local function serve(self)
  while not self.over do
    local ready = self.waiting[1] and {} or wire.poll({ self.control, self.shell }, 1000)
    self.over = self:orphaned()
    core.session_interrupts() -- an interrupt while nothing runs is over here
    for _, socket in ipairs { self.control, self.shell } do
      local message = ready[socket] and not self.over and next_message(self, socket)
      if message then answered(self, message) end
    end
    local message = table.remove(self.waiting, 1)
    if message then answered(self, message) end
  end
end

--- Serves a notebook until it is told to shut down.
-- @param connection table of Jupyter's connection file: transport, ip, five ports, key
-- @raise where messages are signed in another way than by HMAC-SHA256, or a port cannot be opened
function Server.run(connection)
  local function endpoint(port)
    return ("%s://%s%s%d"):format(connection.transport, connection.ip, connection.transport == "tcp" and ":" or "-",
      connection[port .. "_port"])
  end
  if connection.signature_scheme and connection.signature_scheme ~= "hmac-sha256" then
    core.fail("jupyter: signature scheme %s, expected hmac-sha256", connection.signature_scheme)
  end
  local context, beat = wire.context(), wire.context()
  local self = setmetatable({ talk = wire.talk(connection.key or "", "kernel"), parent = "{}", history = {},
    displayed = {}, waiting = {}, parent_process = os.getenv "JPY_PARENT_PID" and core.parent() or nil }, Server)
  local stderr, write = io.stderr, io.stderr.write
  function self.log(text) write(stderr, text) end
  self.shell = wire.socket(context, "ROUTER", "bind", endpoint "shell")
  self.control = wire.socket(context, "ROUTER", "bind", endpoint "control")
  self.stdin = wire.socket(context, "ROUTER", "bind", endpoint "stdin")
  self.iopub = wire.socket(context, "PUB", "bind", endpoint "iopub")
  wire.echo(wire.socket(beat, "REP", "bind", endpoint "hb"))

  core.session_interrupts()
  self.out = output.new(self)
  self.session = Session.new { name = function(n) return ("In[%d]"):format(n) end }
  self.session.tick = function() self.out:tick() end
  Session.interpret_files()
  Session.watch_programs()
  rawset(_G, "vx", require "vertex")
  display.mode, display.backend = "notebook", function(bundle, options) self.out:display(bundle, options) end
  self.out:redirect()
  self:publish("status", { execution_state = "starting" })
  local served, problem = xpcall(serve, debug.traceback, self)
  if not served then self:complain("ended: " .. tostring(problem)) end
  for _, socket in ipairs { self.shell, self.control, self.stdin, self.iopub } do socket:close() end
  wire.terminate(context)
  wire.shut_down(beat)
end

return Server
