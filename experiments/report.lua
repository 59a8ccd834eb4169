--- Makes report.html of a run or a series again, from what its folder holds.
--
--   luajit experiments/report.lua out/mine

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")

local runs = require("vertex").runs

local parser = require "argparse"("report", "Makes report.html of a run or a series again.")
parser:argument("out", "Folder that --out of an experiment named.")
print(runs.report((parser:parse().out:gsub("(.)/+$", "%1"))))
