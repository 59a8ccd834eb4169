--- repl.lua: the program around lua/vertex/repl.lua: luajit lua/repl.lua [--help]

local here = arg[0]:match "^(.*)/[^/]*$" or "."
local found = io.open(here .. "/vertex/init.lua")
local lua = found and here or here .. "/../lua/5.1" -- in a checkout, or installed in share/vertex
package.path = ("%s/?.lua;%s/?/init.lua;%s"):format(lua, lua, package.path)
os.exit(require("vertex.repl").main(arg), true)
