--- Finished runs side by side: what differs between their configurations, a table with mean ± standard deviation over
-- the seeds, and their curves with bands.
--
--   luajit experiments/compare.lua out/seed1 out/seed2 out/seed3
--   luajit experiments/compare.lua out/k4 out/k8 --methods softmax-knn-ce --columns code_use,rmse --out out/compared
-- Runs that differ in their seed alone are one row a method. --out keeps table.md, compare.csv and curves.png. What
-- --seeds and --grid of an experiment made is a folder of such runs: out/mine/*/.

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")

local vx = require "vertex"

local parser = require "argparse"("compare", "Finished runs side by side, mean and deviation over seeds.")
parser:argument("runs", "Folders that an experiment's --out named."):args "+"
parser:option("--methods", "Only these."):argname "A,B"
parser:option("--columns", "Only these of results.csv."):argname "A,B"
parser:option("--fields", "Of metrics.jsonl, a plot each; default: those of mse, loss, code_use that were logged.")
  :argname "A,B"
parser:option("--out", "Folder for table.md, compare.csv and curves.png."):argname "DIR"
local flags = vx.runs.flags.read(parser)

local function list_of(text)
  local list = {}
  for word in (text or ""):gmatch "[^,%s]+" do list[#list + 1] = word end
  return list
end

vx.runs.program(function()
  local comparison = vx.runs.compare(flags.runs, { methods = list_of(flags.methods), columns = list_of(flags.columns),
    fields = list_of(flags.fields) })
  if #comparison.differences > 0 then io.write("differ in ", table.concat(comparison.differences, ", "), "\n\n") end
  io.write(comparison:markdown())
  if flags.out then comparison:save(flags.out) end
end)
