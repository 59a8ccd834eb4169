--- repl.lua: the program around lua/vertex/interactive/repl.lua: luajit lua/repl.lua [--help]

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
local here = ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*)/"
local installed = here:match "^(.*)/share/vertex$" -- else in the folder lua/ of a checkout
dofile((installed and installed .. "/share/lua/5.1" or here) .. "/vertex/start.lua")
os.exit(require("vertex.interactive.repl").main(arg), true)
