--- jupyter_wire.lua: Jupyter's messages on ZeroMQ sockets. The only file that calls libzmq and libcrypto (Debian
-- packages libzmq5 and libssl3).
--
-- A message is a list of frames: those that say where a ROUTER sends it, DELIMITER, the signature, then header, parent
-- header, metadata and content as JSON. The signature is the HMAC-SHA256, in hex, of the four JSON frames as they are
-- sent [1].
--
-- [1] https://jupyter-client.readthedocs.io/en/stable/messaging.html, version 5.3 of the protocol

local ffi = require "ffi"
local core = require "vertex.core"
local json = require "vertex.json"

local wire = { VERSION = "5.3" }
local fail = core.fail

-- Handles are void *, structs arrays or without a name: no types are defined, so loading twice is harmless.
ffi.cdef [[
void *dlopen(const char *name, int flags);
void *zmq_ctx_new(void); int zmq_ctx_shutdown(void *context); int zmq_ctx_term(void *context); int zmq_errno(void);
const char *zmq_strerror(int code); void *zmq_socket(void *context, int type); int zmq_close(void *socket);
int zmq_setsockopt(void *socket, int option, const void *value, size_t size);
int zmq_bind(void *socket, const char *endpoint); int zmq_connect(void *socket, const char *endpoint);
int zmq_send(void *socket, const void *bytes, size_t size, int flags);
int zmq_msg_init(void *message); int zmq_msg_close(void *message);
int zmq_msg_recv(void *message, void *socket, int flags); int zmq_msg_more(const void *message);
void *zmq_msg_data(void *message); size_t zmq_msg_size(const void *message);
int zmq_poll(void *items, int count, long timeout); int zmq_proxy(void *front, void *back, void *capture);
const void *EVP_sha256(void); int RAND_bytes(unsigned char *bytes, int count);
unsigned char *HMAC(const void *hash, const void *key, int key_size, const unsigned char *bytes, size_t size,
  unsigned char *out, unsigned int *out_size);
]]

local RTLD_NOW_NODELETE = 0x1002

--- Opens a library for as long as the process lives.
local function load_library(name, package)
  local ok, library = pcall(ffi.load, name)
  -- closing the Lua state must not unmap code that the library's threads still run
  if ok then ffi.C.dlopen(name, RTLD_NOW_NODELETE) end
  if not ok then error(("notebooks need %s, Debian package %s (%s)"):format(name, package, library), 0) end
  return library
end
local zmq, crypto = load_library("libzmq.so.5", "libzmq5"), load_library("libcrypto.so.3", "libssl3")

local EINTR, EAGAIN = 4, 11
local POLLIN, DONTWAIT, SNDMORE = 1, 1, 2
local TYPES = { PUB = 1, SUB = 2, REQ = 3, REP = 4, DEALER = 5, ROUTER = 6 }
local OPTIONS = { routing_id = 5, subscribe = 6, linger = 17, sndhwm = 23, router_handover = 56 }

-- -- Sockets ----------------------------------------------------------------------------------------------------------

local Socket = {}
Socket.__index = Socket

--- Raises ZeroMQ's text where a status is negative. what: a format of what was done.
local function check(status, what, ...)
  if status < 0 then fail(what .. ": %s", ..., ffi.string(zmq.zmq_strerror(zmq.zmq_errno()))) end
end

--- Makes a context, which sockets belong to.
-- @return context
function wire.context() return zmq.zmq_ctx_new() end

--- Ends the waits of all sockets of a context, also those of other threads.
-- @param context of wire.context
function wire.shut_down(context) zmq.zmq_ctx_shutdown(context) end

--- Waits until what was sent has left, but no longer than the closed sockets linger.
-- @param context of wire.context
function wire.terminate(context) zmq.zmq_ctx_term(context) end

--- Opens a socket.
-- @param context of wire.context
-- @param kind "PUB", "SUB", "REQ", "REP", "DEALER" or "ROUTER"
-- @param how "bind" or "connect"
-- @param endpoint "tcp://127.0.0.1:PORT" or "ipc://PATH"
-- @param[opt] name by which ROUTERs know it: Jupyter asks for input on the stdin socket that has the name of the shell
-- socket which a request came from
-- @return Socket
-- @raise where it cannot be bound or connected
function wire.socket(context, kind, how, endpoint, name)
  local self = setmetatable({ s = zmq.zmq_socket(context, TYPES[kind]), endpoint = endpoint }, Socket)
  if self.s == nil then fail("a %s socket: %s", kind, ffi.string(zmq.zmq_strerror(zmq.zmq_errno()))) end
  self:set("linger", 1000)
  if kind == "PUB" then self:set("sndhwm", 0) end -- no output is dropped, however slow the reader
  if kind == "ROUTER" then self:set("router_handover", 1) end -- a client may come back under its name
  if kind == "SUB" then self:set("subscribe", "") end
  if name then self:set("routing_id", name) end
  check((how == "bind" and zmq.zmq_bind or zmq.zmq_connect)(self.s, endpoint), how .. " %s", endpoint)
  return self
end

--- Sets an option.
-- @param option a name of OPTIONS
-- @param value integer or string, as the option wants it
-- @raise where ZeroMQ refuses the value
function Socket:set(option, value)
  local bytes = type(value) == "string" and value or ffi.new("int[1]", value)
  check(zmq.zmq_setsockopt(self.s, OPTIONS[option], bytes, type(value) == "string" and #value or 4), "option %s",
    option)
end

--- Closes the socket.
function Socket:close()
  zmq.zmq_close(self.s)
  self.s = nil
end

--- Sends one message.
-- @param frames array of strings
-- @raise where ZeroMQ cannot send
function Socket:send(frames)
  for i, frame in ipairs(frames) do
    repeat
      local status = zmq.zmq_send(self.s, frame, #frame, i < #frames and SNDMORE or 0)
      local again = status < 0 and zmq.zmq_errno() == EINTR -- an interrupt must not cut a message in two
    until not again or check(status, "send on %s", self.endpoint)
  end
end

--- Takes the next message, without waiting.
-- @return array of its frames; nil where none is there
-- @raise where ZeroMQ cannot receive
function Socket:receive()
  local frames, message = {}, ffi.new "uint64_t[8]" -- zmq_msg_t
  repeat
    zmq.zmq_msg_init(message)
    if zmq.zmq_msg_recv(message, self.s, DONTWAIT) < 0 then
      local problem = zmq.zmq_errno()
      zmq.zmq_msg_close(message)
      if problem == EAGAIN and #frames == 0 then return nil end
      if problem ~= EINTR then fail("receive on %s: %s", self.endpoint, ffi.string(zmq.zmq_strerror(problem))) end
    else
      frames[#frames + 1] = ffi.string(zmq.zmq_msg_data(message), zmq.zmq_msg_size(message))
      local more = zmq.zmq_msg_more(message) ~= 0
      zmq.zmq_msg_close(message)
      if not more then return frames end
    end
  until false
end

local poll_items = ffi.typeof "struct { void *socket; int fd; short events, revents; }[?]"

--- Waits until a socket has a message, a signal comes, or the time is over.
-- @param sockets array of Sockets
-- @param timeout milliseconds; -1 waits for ever
-- @return set of the sockets with messages, as keys; may be empty
-- @raise where ZeroMQ cannot wait
function wire.poll(sockets, timeout)
  local items, ready = poll_items(#sockets), {}
  for i, socket in ipairs(sockets) do items[i - 1].socket, items[i - 1].events = socket.s, POLLIN end
  if zmq.zmq_poll(items, #sockets, timeout) < 0 then
    if zmq.zmq_errno() ~= EINTR then fail("poll: %s", ffi.string(zmq.zmq_strerror(zmq.zmq_errno()))) end
    return ready
  end
  for i, socket in ipairs(sockets) do
    if items[i - 1].revents ~= 0 then ready[socket] = true end
  end
  return ready
end

--- Sends back what comes, in a thread of its own, until the socket's context shuts down.
-- @param socket Socket of kind "REP"
function wire.echo(socket) core.thread(zmq.zmq_proxy, socket.s, socket.s, nil) end

-- -- Messages ---------------------------------------------------------------------------------------------------------

local DELIMITER = "<IDS|MSG>"

--- Writes n bytes in hex.
local function hex(bytes, n)
  return (ffi.string(bytes, n):gsub(".", function(c) return ("%02x"):format(c:byte()) end))
end

--- Draws a random identifier.
-- @return string of 32 hex digits with dashes
function wire.identifier()
  local bytes = ffi.new "unsigned char[16]"
  crypto.RAND_bytes(bytes, 16)
  return (hex(bytes, 16):gsub("^(........)(....)(....)(....)", "%1-%2-%3-%4-"))
end

--- Signs a text; "" where the key is "".
local function signature(key, text)
  if key == "" then return "" end
  local out, size = ffi.new "unsigned char[32]", ffi.new "unsigned int[1]"
  crypto.HMAC(crypto.EVP_sha256(), key, #key, text, #text, out, size)
  return hex(out, size[0])
end

local Talk = {}
Talk.__index = Talk

--- Begins one side of a conversation.
-- @param key string that signs messages, sent and received; "" signs none
-- @param username text in the headers of what is sent
-- @return Talk
function wire.talk(key, username)
  return setmetatable({ key = key, session = wire.identifier(), username = username, seen = {}, before = {},
    count = 0 }, Talk)
end

--- Sends a message.
-- @param socket Socket
-- @param idents array of the frames before the delimiter
-- @param kind msg_type
-- @param content table
-- @param[opt="{}"] parent header, as JSON, of the message that is the reason for this one
-- @param[opt] metadata table
-- @return its msg_id
function Talk:send(socket, idents, kind, content, parent, metadata)
  local id = wire.identifier()
  local header = json.encode { msg_id = id, session = self.session, username = self.username,
    date = os.date "!%Y-%m-%dT%H:%M:%SZ", msg_type = kind, version = wire.VERSION }
  local body = { header, parent or "{}", json.encode(json.object(metadata)), json.encode(json.object(content)) }
  local frames = {}
  for _, frame in ipairs(idents) do frames[#frames + 1] = frame end
  frames[#frames + 1] = DELIMITER
  frames[#frames + 1] = signature(self.key, table.concat(body))
  for _, frame in ipairs(body) do frames[#frames + 1] = frame end
  socket:send(frames)
  return id
end

local REMEMBERED = 2 ^ 15 -- signatures, and as many of those before

--- Says whether a signature came before, and remembers it.
local function came_before(self, text)
  if self.seen[text] or self.before[text] then return true end
  if self.count == REMEMBERED then self.seen, self.before, self.count = {}, self.seen, 0 end
  self.seen[text], self.count = true, self.count + 1
  return false
end

--- Takes the next message of a socket, without waiting.
-- @param socket Socket
-- @return table { idents, header, parent, metadata, content, json = the header as it came, kind = its msg_type }; nil
-- where none is there, or it is none of ours
-- @return for one that is none of ours, why
function Talk:receive(socket)
  local frames = socket:receive()
  if not frames then return nil end
  local at
  for i, frame in ipairs(frames) do at = at or frame == DELIMITER and i or nil end
  if not at or #frames < at + 5 then return nil, "a message without the frames of Jupyter's protocol" end
  local body = { unpack(frames, at + 2, at + 5) }
  if frames[at + 1] ~= signature(self.key, table.concat(body)) then return nil, "a message with a wrong signature" end
  if self.key ~= "" and came_before(self, frames[at + 1]) then return nil, "a message that came before" end
  local message = { idents = { unpack(frames, 1, at - 1) }, json = body[1] }
  for i, part in ipairs { "header", "parent", "metadata", "content" } do
    local value = json.decode(body[i])
    if type(value) ~= "table" then return nil, "a message whose " .. part .. " is no JSON object" end
    message[part] = value
  end
  message.kind = message.header.msg_type
  if type(message.kind) ~= "string" then return nil, "a message without a msg_type" end
  return message
end

return wire
