--- repl.lua: the program around lua/vertex/interactive/repl.lua: luajit lua/repl.lua [--help]

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
local here = ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*)/"
dofile((here:match "^.*/vertex$" or here .. "/vertex") .. "/start.lua") -- installed beside it; else of a checkout
os.exit(require("vertex.interactive.repl").main(arg), true)
