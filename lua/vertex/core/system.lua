--- core/system.lua: interrupts and the hooks that carry them into running Lua, threads, the clock, the terminal.

local ffi = require "ffi"
local library = require "vertex.core.library"

local C, call = library.C, library.call

local system = {}

local in_session = false

--- Runs f with Ctrl-C and SIGTERM turned into a flag that core.interrupted() reads. Within a session its Ctrl-C stays
-- in force, which raises the same flag.
function system.catching_interrupts(f, ...)
  if in_session then return f(...) end
  C.vx_interrupt_catch(1)
  local function done(ok, ...)
    C.vx_interrupt_catch(0)
    if not ok then error((...), 0) end
    return ...
  end
  return done(pcall(f, ...))
end

--- A session begins: from now on Ctrl-C only raises the flag, however often; calling it again lowers the flag.
function system.session_interrupts()
  in_session = true
  C.vx_interrupt_catch(2)
end

ffi.cdef "void *lua_gethook(void *L); int lua_sethook(void *L, void *hook, int mask, int count);"
local LUA_MASKCOUNT = 8
-- LuaJIT's hooks are those of all its threads, so that any thread names them
local anchor = coroutine.create(function() end)

--- Runs f(...) in a session, with hook() called every `every` instructions of interpreted Lua, and after Ctrl-C at each
-- instruction until f is over. hook may raise an error. Compiled traces call no hook: jit.off what has to be
-- interruptible.
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
function system.thread(f, a, b, c) call(C.vx_thread, ffi.cast("int (*)(void *, void *, void *)", f), a, b, c) end

ffi.cdef "int getppid(void);"
--- Number of the process that started this one; it changes when that process ends.
function system.parent() return ffi.C.getppid() end

function system.interrupted() return C.vx_interrupted() ~= 0 end
function system.time() return C.vx_time() end
function system.is_tty(fd) return C.vx_is_tty(fd) ~= 0 end
function system.terminal_columns() return C.vx_terminal_columns() end

return system
