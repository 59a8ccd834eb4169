--- start: lets a script of this checkout find the modules beside it, wherever it is called from, also by a symbolic
-- link. A script in experiments/ (or any other folder of the checkout) begins with
--
--     local ffi = require "ffi"
--     ffi.cdef "char *realpath(const char *path, char *out);"
--     dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")
--
-- and may then require "vertex", and files of experiments/ and experiments/bench/ by their names.

local lua = debug.getinfo(1, "S").source:match "^@(.*)/vertex/[^/]*$"
local root = lua:match "^(.*)/lua$"
local places = { lua .. "/?.lua", lua .. "/?/init.lua" }
if root then -- not so where the modules are installed
  places[3], places[4] = root .. "/experiments/?.lua", root .. "/experiments/bench/?.lua"
end
package.path = table.concat(places, ";") .. ";" .. package.path

-- What a session's user assigns to `table`, `io.write`, `package.path` or the like is theirs: the library's files see
-- the names that Lua came with, and the tables of Lua's libraries as they are now.

local loaded = package.loaded -- what require has loaded, whatever that field is set to
local own = setmetatable({ _G = _G }, { __index = _G }) -- also arg, and what is put there later

local function copy(t)
  local copied = {}
  for key, value in own.pairs(t) do copied[key] = value end
  return own.setmetatable(copied, own.getmetatable(t))
end

for name, value in pairs(_G) do
  if type(value) == "function" then own[name] = value end
end
for name, value in pairs(_G) do
  if value ~= _G and loaded[name] == value then own[name] = copy(value) end
end
getmetatable("").__index = setmetatable(own.string, { __index = string }) -- ("x"):rep(3), and methods that are added

local search, find_module = package.loaders[2], require
setfenv(1, own) -- from here on in this file too

local modules = { bit = bit, ffi = copy(find_module "ffi") } -- what the library's files required

local function is_library(name) return name == "vertex" or name:sub(1, 7) == "vertex." end

--- Is the require of the library's files: what it gave once stays, and files are looked for where they were at the
-- start.
function own.require(name)
  if modules[name] ~= nil then return modules[name] end
  local path = package.searchpath(name, package.path)
  if not path then -- built in, or in C
    local module = find_module(name)
    modules[name] = type(module) == "table" and copy(module) or module
    return modules[name]
  end
  if loaded[name] == nil then
    local module = setfenv(assert(loadfile(path)), own)(name)
    if loaded[name] == nil then loaded[name] = module == nil or module end
  end
  modules[name] = loaded[name]
  return modules[name]
end

package.loaders[2] = function(name)
  if not (is_library(name) and package.searchpath(name, package.path)) then return search(name) end
  local module = own.require(name)
  return function() return module end
end
