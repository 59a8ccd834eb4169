--- The Fréchet distance of two sets of features, Vertex against NumPy and SciPy on the same numbers, interleaved: the
-- ratio of each round, and the median.
--
--   luajit experiments/bench/fid.lua [--rows 10000] [--width 2048] [--rounds 5] [--way geig|eigh|sqrtm]
--     [--python python3]
-- Moments of both sets are among what is timed, on both sides. fid.py beside this file says what the ways are.

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")

local vx = require "vertex"
local core = require "vertex.core"

local parser = require "argparse"("fid", "Time of a Fréchet distance, Vertex against NumPy and SciPy.")
for name, default in pairs { rows = 10000, width = 2048, rounds = 5 } do
  parser:option("--" .. name):default(tostring(default)):convert(tonumber)
end
parser:option("--way", "How SciPy finds the trace."):choices({ "geig", "eigh", "sqrtm" }):default "geig"
parser:option("--python", "Interpreter with numpy and scipy; 'none' times Vertex alone."):default "python3"
local flags = parser:parse()

--- Features as those of a network: correlated, none below 0.
local function features(generator, scale)
  local options = { generator = generator }
  local hidden = vx.randn({ flags.rows, math.ceil(flags.width / 4) }, options)
  local mix = vx.randn({ math.ceil(flags.width / 4), flags.width }, { generator = vx.generator(5) })
  return vx.relu(vx.matmul(hidden, mix) * (scale / 20) + vx.randn({ flags.rows, flags.width }, options) * 0.1 + 0.3)
end

local folder = os.tmpname()
os.remove(folder)
core.make_folders(folder)
local sets = { features(vx.generator(1), 1), features(vx.generator(2), 1.1) }
for i, x in ipairs(sets) do vx.save(("%s/%d.npy"):format(folder, i), x) end

local own = core.root .. "/experiments/bench/fid.py"
local ratios = {}
for round = 1, flags.rounds do
  local began = core.time()
  local distance = vx.metrics.frechet(sets[1], sets[2])
  local seconds = core.time() - began
  local line = ("round %d  vertex %.3f s, %.9g"):format(round, seconds, distance)
  if flags.python ~= "none" then
    local p = io.popen(("'%s' '%s' '%s/1.npy' '%s/2.npy' %s"):format(flags.python, own, folder, folder, flags.way))
    local theirs, their_seconds = p:read "*a":match "(%S+) (%S+)"
    p:close()
    if not theirs then error "fid.py gave no result" end
    ratios[round] = seconds / tonumber(their_seconds)
    line = line .. ("  scipy (%s) %.3f s, %.9g  ratio %.2f"):format(flags.way, tonumber(their_seconds),
      tonumber(theirs), ratios[round])
  end
  print(line)
end
for i = 1, 2 do os.remove(("%s/%d.npy"):format(folder, i)) end
os.remove(folder)
table.sort(ratios)
if #ratios > 0 then print(("median ratio %.2f"):format(ratios[math.ceil(#ratios / 2)])) end
