--- core/system.lua: interrupts and the hooks that carry them into running Lua, threads, the clock, the terminal.

local ffi = require "ffi"
local library = require "vertex.core.library"

local C, call = library.C, library.call

local system = {}

local in_session = false

--- Runs a function with Ctrl-C and SIGTERM turned into a flag that core.interrupted() reads. Within a session its
-- Ctrl-C stays in force, which raises the same flag.
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

ffi.cdef "int getppid(void);"
--- Gives the number of the process that started this one; it changes when that process ends.
function system.parent() return ffi.C.getppid() end

--- Says whether Ctrl-C or SIGTERM came, while either is caught.
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

--- Ends the process with status 1 where what was printed has not arrived: the disk under it is full, say.
local function check_output()
  local open, flushed, why = pcall(stdout.flush, stdout)
  if not open or (flushed and libc.ferror(stdout) == 0) then return end
  stderr:write("standard output: ", tostring(why or "not all of it could be written"), "\n")
  libc._exit(1)
end

local at_exit = newproxy(true)
getmetatable(at_exit).__gc = check_output
system.at_exit = at_exit -- lives as long as the state

return system
