--- core/system.lua: interrupts and the hooks that carry them into running Lua, threads, other processes, the clock, the
-- terminal.

local ffi = require "ffi"
local library = require "vertex.core.library"

local C, call = library.C, library.call

local system = {}

local in_session = false

--- Runs a function with Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP (a terminal that closes; unless nohup has it ignored)
-- turned into a flag that core.interrupted() reads. Within a session its Ctrl-C stays in force, which raises the same
-- flag.
-- @param f function
-- @param ... its arguments
-- @return what f returns
function system.catching_interrupts(f, ...)
  if in_session then return f(...) end
  C.vx_interrupt_catch(1)
  local function done(ok, ...)
    C.vx_interrupt_catch(0)
    if not ok then error((...), 0) end
    return ...
  end
  return done(library.sealed("catching_interrupts", f, ...))
end

--- Begins a session: from now on Ctrl-C only raises the flag, however often. Calling it again lowers the flag.
-- @param[opt=true] on false: the session is over, and the handlers are those found before it
-- @return whether a session was in force before
function system.session_interrupts(on)
  local before = in_session
  in_session = on ~= false
  C.vx_interrupt_catch(in_session and 2 or 0)
  return before
end

ffi.cdef "void *lua_gethook(void *L); int lua_sethook(void *L, void *hook, int mask, int count);"
local LUA_MASKCOUNT = 8
-- LuaJIT's hooks are those of all its threads, so that any thread names them
local anchor = coroutine.create(function() end)

--- Runs a function of a session under a hook. After Ctrl-C the hook is called at every instruction until f is over.
-- Compiled traces call no hook: jit.off what has to be interruptible.
-- @param hook function without arguments, which may raise an error
-- @param every calls of the hook are so many instructions of interpreted Lua apart
-- @param f function
-- @param ... its arguments
-- @return what f returns
function system.with_hook(hook, every, f, ...)
  local L = ffi.cast("void *", tonumber(tostring(anchor):match "0x(%x+)", 16))
  debug.sethook(hook, "", every)
  C.vx_interrupt_calls(ffi.cast("int (*)(void *, void *, int, int)", ffi.C.lua_sethook), L, ffi.C.lua_gethook(L),
    LUA_MASKCOUNT, 1)
  local function done(...)
    C.vx_interrupt_calls(nil, nil, nil, 0, 0)
    debug.sethook()
    return ...
  end
  return done(f(...))
end

--- Runs f(a, b, c), a C function of three pointers, in a thread of its own that receives no signals.
-- @param f cdata, a pointer to the function; never a callback into Lua
function system.thread(f, a, b, c) call(C.vx_thread, ffi.cast("int (*)(void *, void *, void *)", f), a, b, c) end

ffi.cdef "int getppid(void); int getpid(void);"
--- Gives the number of the process that started this one; it changes when that process ends.
function system.parent() return ffi.C.getppid() end

--- Names this process for people: its number and its machine.
-- @return text, as "4711 on node3"
function system.process()
  local f = io.open "/proc/sys/kernel/hostname"
  local host = f and f:read "*l"
  if f then f:close() end
  return ("%d on %s"):format(ffi.C.getpid(), host or "this machine")
end

--- Says whether Ctrl-C or another of these signals came, while they are caught.
function system.interrupted() return C.vx_interrupted() ~= 0 end

ffi.cdef "int usleep(unsigned);"
--- Waits.
function system.sleep(seconds) ffi.C.usleep(seconds * 1e6) end

--- Reads a monotonic clock.
-- @return seconds since a moment that stays the same
function system.time() return C.vx_time() end

--- Says whether a file descriptor is a terminal: 0 standard input, 1 output, 2 errors. mpirun gives ranks a terminal as
-- their output, also where it goes into a file; that one has no width.
function system.is_tty(fd)
  return C.vx_is_tty(fd) ~= 0 and (C.vx_comm_size() == 1 or C.vx_terminal_columns() > 0)
end

--- Gives the terminal's width.
-- @return number of columns; 0 where neither output nor errors go to a terminal
function system.terminal_columns() return C.vx_terminal_columns() end

-- -- The end of the process -------------------------------------------------------------------------------------------

ffi.cdef "int ferror(void *stream); void _exit(int status);"
local stdout, stderr, libc = io.stdout, io.stderr, ffi.C

local at_exit = {} -- live as long as the state

--- Calls a function when the state closes. It is never compiled: in a finalizer LuaJIT 2.1.0-beta3 may enter a compiled
-- loop over pairs and leave it again for ever.
-- @param f function(); what it calls must hold no loop over pairs either
function system.at_exit(f)
  jit.off(f, true)
  local object = newproxy(true)
  getmetatable(object).__gc = f
  at_exit[#at_exit + 1] = object
end

-- Ends the process with status 1 where what was printed has not arrived: the disk under it is full, say.
system.at_exit(function()
  local open, flushed, why = pcall(stdout.flush, stdout)
  if not open or (flushed and libc.ferror(stdout) == 0) then return end
  stderr:write("standard output: ", tostring(why or "not all of it could be written"), "\n")
  libc._exit(1)
end)

-- -- Other processes --------------------------------------------------------------------------------------------------

ffi.cdef [[
  int posix_spawnp(int *pid, const char *file, const void *actions, const void *attributes, const char **argv,
    char **environment);
  int waitpid(int pid, int *status, int options);
  int kill(int pid, int signal);
  int poll(void *fds, unsigned long n, int milliseconds);
  int prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d);
  int posix_spawnattr_init(void *attributes);
  int posix_spawnattr_setflags(void *attributes, short flags);
  int posix_spawnattr_setpgroup(void *attributes, int group);
  int setenv(const char *name, const char *value, int overwrite);
  int unsetenv(const char *name);
  extern char **environ;
]]
local SIGINT, SIGTERM, WNOHANG, PR_SET_PDEATHSIG, SPAWN_SETPGROUP = 2, 15, 1, 1, 2

--- For a process that system.run_program started: ends it with the one that did, however that ends.
-- @param variable of the environment, as system.run_program was given
function system.follow_parent(variable)
  local parent = tonumber(os.getenv(variable) or "")
  if not parent then return end
  ffi.C.unsetenv(variable) -- this one's, not that of what it may start
  ffi.C.prctl(PR_SET_PDEATHSIG, SIGTERM, 0, 0, 0)
  if system.parent() ~= parent then os.exit(1, true) end
end

-- Seconds: a program that began less than the first ago may miss Ctrl-C (a shell about to start another program loses
-- it). It is told again for the second: 0.25, 0.5, 1, 2 ... after it began.
local EARLY, TOLD_AGAIN = 0.25, 4

--- Attributes for posix_spawn: a process group of its own.
local function own_group()
  local attributes = ffi.new "uint64_t[64]" -- a posix_spawnattr_t takes 336 bytes
  ffi.C.posix_spawnattr_init(attributes)
  ffi.C.posix_spawnattr_setflags(attributes, SPAWN_SETPGROUP)
  ffi.C.posix_spawnattr_setpgroup(attributes, 0)
  return attributes
end

--- Runs a command of the shell in a session, as os.execute does. Ctrl-C is the command's: a terminal sends it to both,
-- elsewhere each is passed on. Where the command ends of it, the flag is up afterwards, otherwise it is not.
-- @param command text
-- @return status, as of os.execute: the signal that ended it, or 256 times its exit status
-- @return whether Ctrl-C ended it
-- @raise where no process can be started
function system.execute(command)
  local words, pid, status = { "sh", "-c", command }, ffi.new "int[1]", ffi.new "int[1]"
  local argv = ffi.new("const char *[4]", words)
  local alone = not system.is_tty(0)
  if ffi.C.posix_spawnp(pid, "sh", nil, alone and own_group() or nil, argv, ffi.C.environ) ~= 0 then
    library.fail("os.execute: no process could be started for %s", command)
  end
  local began, pause, passed, again = system.time(), 1, 0, math.huge
  while ffi.C.waitpid(pid[0], status, WNOHANG) == 0 do
    local came, now = C.vx_interrupted(), system.time()
    if came > passed or now > again then
      local missed = now - began < EARLY or now > again
      if alone or missed then ffi.C.kill(alone and -pid[0] or pid[0], SIGINT) end
      again = missed and now - began < TOLD_AGAIN and now + math.max(EARLY, now - began) or math.huge
      passed = came
    end
    ffi.C.poll(nil, 0, pause)
    pause = math.min(20, pause + 1)
  end
  local stopped = status[0] % 128 == SIGINT or status[0] == 256 * (128 + SIGINT)
  if not stopped and system.interrupted() then system.session_interrupts() end -- the command has dealt with it
  if stopped and not system.interrupted() then ffi.C.kill(ffi.C.getpid(), SIGINT) end
  return status[0], stopped
end

--- Runs a program until it ends, its standard output left out. It is in a group of its own: Ctrl-C at the terminal
-- comes here, and is passed on once.
-- @param arguments array of texts, the program first
-- @param variable of its environment, which tells it what process this is (system.follow_parent)
-- @return its exit status, or 128 + the signal that ended it
-- @raise where no process can be started
function system.run_program(arguments, variable)
  local words = { "sh", "-c", 'exec "$0" "$@" >/dev/null', unpack(arguments) }
  local argv = ffi.new("const char *[?]", #words + 1)
  for i, word in ipairs(words) do argv[i - 1] = word end
  ffi.C.setenv(variable, tostring(ffi.C.getpid()), 1)
  local pid, status = ffi.new "int[1]", ffi.new "int[1]"
  local failed = ffi.C.posix_spawnp(pid, "sh", nil, own_group(), argv, ffi.C.environ)
  ffi.C.unsetenv(variable)
  if failed ~= 0 then library.fail("run_program: no process could be started (error %d)", failed) end
  local told = false
  while ffi.C.waitpid(pid[0], status, WNOHANG) == 0 do
    if system.interrupted() and not told then
      ffi.C.kill(-pid[0], SIGTERM)
      told = true
    end
    ffi.C.poll(nil, 0, 20)
  end
  local signal = status[0] % 128
  return signal == 0 and math.floor(status[0] / 256) % 256 or 128 + signal
end

--- Gives the bytes of a number as C holds it.
-- @param ctype "float", "double", "uint64_t"
-- @param x number
-- @return string
function system.number_bytes(ctype, x) return ffi.string(ffi.new(ctype .. "[1]", x), ffi.sizeof(ctype)) end

return system
