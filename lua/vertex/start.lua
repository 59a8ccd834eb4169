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

-- The library's files keep the names that Lua came with: what a session's user assigns to `table` or `print` is theirs.
local own = { _G = _G }
for name, value in pairs(_G) do own[name] = value end
setmetatable(own, { __index = _G })
local search, type, setfenv = package.loaders[2], type, setfenv -- the user may give these names other values
package.loaders[2] = function(name)
  local found = search(name)
  if type(found) == "function" and (name == "vertex" or name:sub(1, 7) == "vertex.") then setfenv(found, own) end
  return found
end
