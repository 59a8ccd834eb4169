--- Draws table, pictures and report.html of a run or a series again, from what its folder holds by now: also while it
-- is being trained.
--
--   luajit experiments/report.lua out/mine
-- The program that made the run does it (its --report), where it is one of this folder. Of other programs' runs
-- report.html alone is made again.

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
local here = ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/"
dofile(here .. "lua/vertex/start.lua")

local runs = require("vertex").runs

local parser = require "argparse"("report", "Draws table, pictures and report.html of a run or a series again.")
parser:argument("out", "Folder that --out of an experiment named.")
local out = runs.flags.read(parser).out:gsub("(.)/+$", "%1")

--- The program of this folder that made a run or a series; nil where none did.
local function program_of(folder)
  for _, name in ipairs { "config", "series" } do
    local stored = require("vertex.json").read(("%s/%s.json"):format(folder, name))
    local path = stored and ("%sexperiments/%s.lua"):format(here, tostring(stored.experiment))
    local program = path and io.open(path)
    if program then
      program:close()
      return path
    end
  end
end

local program = program_of(out)
if program then
  rawset(_G, "arg", { [-1] = arg[-1], [0] = program, "--out", out, "--report" })
  dofile(program)
end
runs.program(function() print(runs.report(out)) end)
