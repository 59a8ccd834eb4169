--- An iteration of k-means, Vertex against faiss-cpu and scikit-learn on the same vectors from the same first codes,
-- interleaved: rounds of all three in turn, the ratio of each round, medians; and whether they end at the same
-- objective.
--
--   luajit experiments/bench/kmeans.lua [--rows 200000] [--width 64] [--codes 1024] [--iterations 10] [--rounds 5]
--     [--threads 2] [--python python3]
-- The vectors are a mixture of as many clusters as codes, wider than they are apart. An iteration's time is that of the
-- whole fit, its last assignment included, over their number, on every side.

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")

local vx = require "vertex"
local core = require "vertex.core"
local tools = require "tools"

local parser = require "argparse"("kmeans", "Time of a k-means iteration, Vertex against faiss and scikit-learn.")
for name, default in pairs { rows = 200000, width = 64, codes = 1024, iterations = 10, rounds = 5, threads = 2 } do
  parser:option("--" .. name):default(tostring(default)):convert(tonumber)
end
parser:option("--python", "Interpreter with faiss and scikit-learn; 'none' times Vertex alone."):default "python3"
local flags = parser:parse()
vx.threads(flags.threads)

local function median(t)
  local sorted = { unpack(t) }
  table.sort(sorted)
  return sorted[math.ceil(#sorted / 2)]
end

--- The vectors, and the rows among them that the codes begin at.
local function make()
  local generator = vx.generator(7)
  local centers = vx.randn({ flags.codes, flags.width }, { generator = generator })
  local which = (vx.rand({ flags.rows }, { generator = generator }) * flags.codes - 0.5):clamp(0, flags.codes - 1)
  local x = vx.gather(centers, which:to "i32") + vx.randn({ flags.rows, flags.width }, { generator = generator })
  return x, vx.gather(x, vx.ops.permutation(flags.rows, generator):narrow(1, 1, flags.codes))
end
local x, start = make()

--- Seconds of an iteration and the mean squared distance at the end.
local function vertex_round()
  local began = core.time()
  local found = vx.kmeans(x, flags.codes, { start = start, iterations = flags.iterations, tolerance = 0 })
  return (core.time() - began) / flags.iterations, found.objective
end

local python_files = tools.scratch "x.npy"
if flags.python ~= "none" then
  vx.save(python_files, x)
  vx.save(tools.scratch "start.npy", start)
end

--- The same of a Python package; nil where it is not installed.
local function python_round(package)
  local command = ("OMP_NUM_THREADS=%d %s %s/experiments/bench/kmeans.py %s %s %s %d %d 2>/dev/null"):format(
    flags.threads, flags.python, core.root, package, python_files, tools.scratch "start.npy", flags.iterations,
    flags.threads)
  local p = io.popen(command)
  local seconds, objective, version = p:read "*a":match "(%S+) (%S+) (%S+)"
  p:close()
  return tonumber(seconds), tonumber(objective), version
end

print(("%s, %d threads: %d vectors of width %d, %d codes, %d iterations, medians of %d rounds"):format(
  core.devices()[1].description, flags.threads, flags.rows, flags.width, flags.codes, flags.iterations, flags.rounds))
vertex_round()
local sides = { "faiss", "sklearn" }
local ours, objective, theirs = {}, nil, { faiss = {}, sklearn = {} }
local ratios, about = { faiss = {}, sklearn = {} }, {}
for r = 1, flags.rounds do
  ours[r], objective = vertex_round()
  for _, side in ipairs(flags.python == "none" and {} or sides) do
    local seconds, reached, version = python_round(side)
    if seconds then
      table.insert(theirs[side], seconds)
      table.insert(ratios[side], seconds / ours[r])
      about[side] = { version = version, difference = reached / objective - 1 }
    end
  end
end
print(("vertex   %8.1f ms an iteration, objective %.6f"):format(1e3 * median(ours), objective))
for _, side in ipairs(sides) do
  if about[side] then
    local sorted = { unpack(ratios[side]) }
    table.sort(sorted)
    print(("%-8s %8.1f ms an iteration, %.2f times ours (%.2f .. %.2f), objective %+.1e of ours, %s"):format(side,
      1e3 * median(theirs[side]), median(ratios[side]), sorted[1], sorted[#sorted], about[side].difference,
      about[side].version))
  elseif flags.python ~= "none" then
    print(("%-8s is not there for %s"):format(side, flags.python))
  end
end
