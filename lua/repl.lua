--- repl.lua: the program around lua/vertex/interactive/repl.lua: luajit lua/repl.lua [--help]

local here = arg[0]:match "^(.*)/[^/]*$" or "."
if here:sub(1, 1) ~= "/" then here = require("lfs").currentdir() .. "/" .. here end -- a session may change its folder
local installed = here:match "^(.*)/share/vertex$" -- else in the folder lua/ of a checkout
local lua = installed and installed .. "/share/lua/5.1" or here
package.path = ("%s/?.lua;%s/?/init.lua;%s"):format(lua, lua, package.path)
os.exit(require("vertex.interactive.repl").main(arg), true)
