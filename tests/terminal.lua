-- A pseudo-terminal with a session on it, into which specs type.

local H = require "tests.helper"
local ffi = require "ffi"
local bit = require "bit"
local core = require "vertex.core"

ffi.cdef [[
int posix_openpt(int flags); int grantpt(int fd); int unlockpt(int fd); char *ptsname(int fd);
int ioctl(int fd, unsigned long request, ...);
int poll(void *fds, unsigned long count, int milliseconds); long read(int fd, void *bytes, size_t count);
long write(int fd, const void *bytes, size_t count); int close(int fd);
]]
local C = ffi.C
local O_RDWR, O_NOCTTY, TIOCSWINSZ, POLLIN = 2, 256, 0x5414, 1

local Terminal = {}
Terminal.__index = Terminal
local open_terminals = {}

--- A session on a terminal of its own. environment "A=1 B=2"; the history is a file of this test run.
-- columns: of the terminal, 100 where nothing is said.
local function terminal(environment, columns)
  local self = setmetatable({ fd = C.posix_openpt(bit.bor(O_RDWR, O_NOCTTY)), seen = "", all = "",
    status_file = os.tmpname() }, Terminal)
  assert(self.fd >= 0 and C.grantpt(self.fd) == 0 and C.unlockpt(self.fd) == 0, "no pseudo-terminal")
  C.ioctl(self.fd, TIOCSWINSZ, ffi.new("unsigned short[4]", 40, columns or 100))
  local name = ffi.string(C.ptsname(self.fd))
  os.remove(self.status_file)
  local program = ("trap : INT; luajit lua/repl.lua; echo $? > %s"):format(self.status_file)
  local command = "env TERM=xterm LC_ALL=C.UTF-8 VERTEX_HISTORY='%s' %s timeout 60 setsid -c sh -c '%s' <>%s >&0 2>&0 &"
  os.execute(command:format(H.scratch "history", environment or "", program, name))
  open_terminals[#open_terminals + 1] = self
  return self
end

function Terminal:type(keys) C.write(self.fd, keys, #keys) end

--- Waits until the terminal's output (since the last wait) holds `text`, then returns what came up to it.
function Terminal:wait(text, seconds)
  local buffer, fds = ffi.new "uint8_t[4096]", ffi.new "struct { int fd; short events, revents; }"
  local until_then = core.time() + (seconds or 20)
  while true do
    local first, last = self.seen:find(text, 1, true)
    if first then
      local before = self.seen:sub(1, last)
      self.seen = self.seen:sub(last + 1)
      return before
    end
    fds.fd, fds.events = self.fd, POLLIN
    local left = until_then - core.time()
    local n = left > 0 and C.poll(fds, 1, math.ceil(left * 1000)) > 0 and C.read(self.fd, buffer, 4096) or 0
    if n <= 0 then error(("%q did not come after %q; in all %q"):format(text, self.seen, self.all), 2) end
    local bytes = ffi.string(buffer, n)
    self.all = self.all .. bytes
    self.seen = (self.seen .. bytes):gsub("\27%[%??[%d;]*%a", "") -- moves of the cursor
  end
end

--- Types a line and waits for what comes after it.
function Terminal:enter(line, text)
  self:type(line .. "\r")
  return self:wait(text)
end

--- Ctrl-D at the next prompt; the exit status.
function Terminal:leave()
  self:wait "> "
  self:type "\4"
  for _ = 1, 200 do
    local status = H.read(self.status_file)
    if status and status ~= "" then return tonumber(status) end
    os.execute "sleep 0.05"
  end
end

--- Closes the terminals that are open, for after_each.
local function close_all()
  for i, t in ipairs(open_terminals) do
    C.close(t.fd) -- which hangs up
    os.remove(t.status_file)
    open_terminals[i] = nil
  end
end

return { open = terminal, close_all = close_all }
