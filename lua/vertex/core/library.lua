--- core/library.lua: finds and opens libvertex, reads its declarations, and turns statuses into errors at the user's
-- line. Every other file of core calls C through what is here.

local ffi = require "ffi"

local library = {}

-- -- The library ------------------------------------------------------------------------------------------------------

library.directory = debug.getinfo(1, "S").source:match "^@(.*)/core/[^/]*$" or ".." -- .../lua/vertex
library.root = library.directory:match "^(.*)/lua/vertex$" or library.directory .. "/../.."

local function exists(path)
  local file = io.open(path)
  return file and file:close()
end

local function open_library()
  local tried, candidates = {}, {}
  if os.getenv "VERTEX_LIB" then
    candidates = { os.getenv "VERTEX_LIB" }
  elseif exists(library.root .. "/CMakeLists.txt") or exists(library.root .. "/build/libvertex.so") then
    candidates[1] = library.root .. "/build/libvertex.so" -- a checkout never takes an installed library
  else
    -- installed: PREFIX/lib/lua/5.1/vertex/libvertex.so
    local prefix = library.directory:match "^(.*)/share/lua/5.1/vertex$"
    candidates[#candidates + 1] = prefix and prefix .. "/lib/lua/5.1/vertex/libvertex.so"
    candidates[#candidates + 1] = package.searchpath("vertex.libvertex", package.cpath)
    candidates[#candidates + 1] = "vertex"
  end
  for _, name in ipairs(candidates) do
    local ok, lib = pcall(ffi.load, name)
    if ok then return lib, name end
    tried[#tried + 1] = "  " .. name .. ": " .. tostring(lib)
  end
  error("vertex: no library found. Build it with ./setup.sh, or name one in VERTEX_LIB. Tried:\n" .. table.concat(tried,
    "\n"), 0)
end

-- Variables of the environment that C reads → whether it can use a text, and what it expects. Those that Lua reads are
-- checked where they are.
local function is_switch(text) return text == "0" or text == "1" end
local SETTINGS = {
  { "VERTEX_POOL", is_switch, "0 (no block of memory is kept for the next tensor) or 1 (they are)" },
  { "VERTEX_SYNC", is_switch, "0 or 1 (on a GPU, wait for each op)" },
  { "VERTEX_NCCL", is_switch, "0 or 1 (NCCL moves a GPU's memory)" },
  { "VERTEX_RANK_TIMEOUT", function(text)
    local seconds = tonumber(text)
    return seconds and seconds > 0 and seconds < 1e9
  end, "seconds, a number above 0" },
  { "VERTEX_BACKENDS", function(text) return exists(text .. "/.") end, "a folder" },
}
for _, setting in ipairs(SETTINGS) do
  local name, fits, expected = unpack(setting)
  local text = os.getenv(name)
  if text and text ~= "" and not fits(text) then error(("%s is '%s', expected %s"):format(name, text, expected), 0) end
end

assert(ffi.abi "64bit", "vertex needs a 64-bit LuaJIT")
ffi.cdef "const char *vx_cdef(void); int setenv(const char *, const char *, int);"
if not os.getenv "OMP_WAIT_POLICY" then
  -- idle OpenMP threads spin this often before they sleep; the default of 300,000 costs up to tenfold where cores are
  -- shared
  ffi.C.setenv("GOMP_SPINCOUNT", "5000", 0)
end
local C, path = open_library()
library.C, library.library_path = C, path -- C is anchored for the life of the state: finalizers call into it

--- Raises that the library is of another version than these Lua files: it lacks what they use.
local function lacks(what)
  error(("vertex: the library %s lacks %s, which the Lua files in %s use: rebuild it with ./setup.sh"):format(path,
    what, library.directory), 0)
end
library.lacks = lacks

local declared, declarations = pcall(function() return C.vx_cdef() end)
if not declared then lacks "vx_cdef()" end
ffi.cdef(ffi.string(declarations))

--- Checks that the library has every function and constant that a file of Lua calls it for, by its text.
function library.check_uses(file)
  local f = assert(io.open(file))
  local text = f:read "*a"
  f:close()
  for name in text:gmatch "%f[%w]C%.([Vv][Xx]_[%w_]*%w)" do
    if not pcall(function() return C[name] end) then lacks(name) end
  end
end

library.check_uses(library.directory .. "/core/library.lua")
library.version = ffi.string(C.vx_version())

-- -- Errors -----------------------------------------------------------------------------------------------------------

--- Raises `message` at the line of the first caller outside lua/vertex.
local function fail(message, ...)
  if select("#", ...) > 0 then message = message:format(...) end
  local own = library.directory .. "/"
  for level = 2, 60 do
    local info = debug.getinfo(level, "Sl")
    if not info then break end
    local source = info.source:sub(2)
    if info.currentline > 0 and source:sub(1, #own) ~= own then
      error(("%s:%d: %s"):format(info.short_src, info.currentline, message), 0)
    end
  end
  error(message, 0)
end
library.fail = fail

local function check(status)
  if status ~= 0 then fail("%s", ffi.string(C.vx_error())) end
end

local ENOMEM = C.VX_ENOMEM

--- Calls a C function that returns a status; out of memory is tried once more after a collection, since dead tensors
-- may still wait for Lua's collector. A failed op has written nothing, so that is safe.
local function call(f, ...)
  local status = f(...)
  if status == ENOMEM then
    collectgarbage()
    collectgarbage()
    status = f(...)
  end
  if status ~= 0 then check(status) end
end
library.call, library.check = call, check

--- Gives a path that C or Lua's io is to open, as it is: both read it up to a NUL byte, the name of another file.
-- @param name string
-- @return name
-- @raise where it holds a NUL byte
function library.expect_path(name)
  if type(name) ~= "string" or not name:find "%z" then return name end
  fail("the path '%s' holds a NUL byte, which no file's name can", (name:gsub("%z", "\\0")))
end

local YIELD = "attempt to yield across C%-call boundary$"

--- Calls f(...) as pcall does, where no coroutine can yield out of f: what `who` sets while f runs (a step, recording)
-- is the whole program's, and would stay with whatever runs meanwhile. A yield is an error that says so, at its line.
-- @return as of pcall
function library.sealed(who, f, ...)
  local n, given, results = select("#", ...), { ... }, nil
  local function keep(...) results = { n = select("#", ...), ... } end
  -- LuaJIT lets nothing yield out of a function that a function in C has called
  string.gsub("x", "x", function() keep(pcall(f, unpack(given, 1, n))) end)
  local message = results[2]
  if not results[1] and type(message) == "string" and message:find(YIELD) then
    results[2] = message:gsub(YIELD, who .. ": a coroutine cannot yield inside of it; yield before it or behind it")
  end
  return unpack(results, 1, results.n)
end

-- -- Lua's own --------------------------------------------------------------------------------------------------------

--- Gives a function of one of Lua's libraries another meaning, to users and to this library, which may have tables of
-- its own (start.lua).
-- @param name of the table, "io"
-- @param field name of the function
-- @param f function
function library.redefine(name, field, f)
  rawset(_G[name], field, f)
  rawset(getfenv(1)[name], field, f)
end

return library
