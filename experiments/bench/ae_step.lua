--- One training step of the autoencoder, Vertex against PyTorch on the same processor or GPU, interleaved: rounds of
-- both in turn, the ratio of each round, medians; beside them the least times, which on a machine that others use too
-- say what the code can do. A step's time includes the wait for its loss.
--
--   luajit experiments/bench/ae_step.lua [--preset tiny] [--batch 16] [--rounds 5] [--steps 20] [--threads 2]
--     [--python python3] [--compile] [--methods A,B] [--device cuda:0] [--autocast bf16] [--graph off] [--csv FILE]
-- On a GPU our step is recorded once and launched as a whole (--graph off: op by op). --autocast bf16 is vx.autocast on
-- our side, and torch.autocast with the quantizer in float32 on the other. FILE gets a line per method.

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")

local vx = require "vertex"
local autoencoder = require "autoencoder"
local core = require "vertex.core"

local parser = require "argparse"("ae_step", "Training step time, Vertex against PyTorch.")
parser:option("--preset"):default "tiny"
parser:option("--batch"):default "16":convert(tonumber)
parser:option("--rounds"):default "5":convert(tonumber)
parser:option("--steps", "Steps per round."):default "20":convert(tonumber)
parser:option("--threads"):default "2":convert(tonumber)
parser:option("--python", "Interpreter with torch; 'none' times Vertex alone."):default "python3"
parser:flag("--compile", "torch.compile instead of eager.")
parser:option("--device", "Of both sides."):default "cpu"
parser:option("--autocast"):choices { "f32", "bf16" }:default "f32"
parser:option("--graph", "Record the step on a GPU."):choices { "on", "off" }:default "on"
parser:option("--methods",
  "none, or quantizers; ae_step.py says which of them PyTorch has."):argname "A,B":default "none,softmax-knn-ce"
parser:option("--csv", "A CSV file to add the results to."):argname "FILE"
local flags = parser:parse()

-- vector-quantize-pytorch has the later ones
local IN_PYTORCH = { none = true, ["softmax-knn-ce"] = true, ["ema-euclid"] = true, simvq = true, fsq = true,
  ["rvq-euclid"] = true }

local preset = assert(autoencoder.presets[flags.preset], "unknown preset " .. flags.preset)
vx.threads(flags.threads)
vx.device(flags.device)
vx.autocast(flags.autocast)
local graphs = flags.graph == "on" and core.can(vx.device(), "graphs")

local function median(t)
  table.sort(t)
  return t[math.ceil(#t / 2)]
end

--- A function that runs `steps` training steps and returns the median and the least in milliseconds.
local function vertex_round(method)
  vx.seed(1)
  local quantizer = method ~= "none" and vx.quantizer(method,
    { dim = preset.channels[#preset.channels], codes = preset.codes, k = preset.k }) or nil
  if quantizer then quantizer.with_stats = false end
  local model = autoencoder.new(preset.channels, quantizer)
  local optimizer = vx.optim.AdamW(model:parameters(), { lr = 1e-4, betas = { 0.9, 0.99 }, weight_decay = 1e-4 })
  local x = vx.randn { flags.batch, preset.size, preset.size, 3 }
  local function step()
    local y, q = model(x)
    local loss = vx.mse(y, x)
    if q then loss = loss + q.reg end
    optimizer:zero_grad()
    loss:backward()
    optimizer:step()
    return loss
  end
  local recorded = vx.graph(step)
  return function(steps)
    local times = {}
    for i = 1, steps + 3 do
      local start = core.time()
      vx.step(function() (graphs and recorded:replay() or step()):item() end)
      if i > 3 then times[#times + 1] = (core.time() - start) * 1e3 end
    end
    local m = median(times)
    return m, times[1]
  end
end

local function torch_round(method)
  local command = ("OMP_NUM_THREADS=%d %s %s/experiments/bench/ae_step.py %s %d %d %d %s %s %s %s 2>/dev/null"):format(
    flags.threads, flags.python, core.root, flags.preset, flags.batch, flags.steps, flags.threads, method,
    flags.compile and "compile" or "", flags.autocast, flags.device)
  local p = io.popen(command)
  local ms, least, version = p:read "*a":match "([%d.]+) ([%d.]+) (%S+)"
  p:close()
  if not ms then return nil, "no answer from: " .. command end
  return tonumber(ms), version, tonumber(least)
end

--- Adds a line to the CSV file.
local function record(...)
  if not flags.csv then return end
  local fresh = not core.file_size(flags.csv)
  local f = assert(io.open(flags.csv, "a"))
  if fresh then
    f:write("device,preset,batch,method,dtype,graph,vertex_ms,torch,torch_mode,torch_ms,ratio,",
      "vertex_least_ms,torch_least_ms\n")
  end
  f:write(table.concat({ ... }, ","), "\n")
  f:close()
end

local where = flags.device
for _, d in ipairs(vx.devices()) do where = d.name == flags.device and d.description or where end
print(("%s, preset %s, batch %d, %d threads, %s%s, medians of %d steps in each of %d rounds"):format(where,
  flags.preset, flags.batch, flags.threads,
  flags.autocast, graphs and " in a graph" or "", flags.steps, flags.rounds))
for method in flags.methods:gmatch "[^,%s]+" do
  local round = vertex_round(method)
  local ours, theirs, ratios, version, reason = {}, {}, {}, nil, nil
  local our_least, their_least = math.huge, math.huge
  local compared = flags.python ~= "none" and IN_PYTORCH[method]
  for r = 1, flags.rounds do
    local least
    ours[r], least = round(flags.steps)
    our_least = math.min(our_least, least)
    if compared and not reason then
      theirs[r], version, least = torch_round(method)
      if theirs[r] then
        ratios[r] = theirs[r] / ours[r]
        their_least = math.min(their_least, least)
      else
        reason = version
      end
    end
  end
  local mode = flags.compile and "compiled" or "eager"
  if reason then print(reason) end
  if #ratios > 0 then
    local line = "%-15s vertex %8.3f ms (least %.3f)   torch %s %s %8.3f ms (%.3f)   "
      .. "ratio %.2f (%.2f .. %.2f), of the least %.2f"
    print(line:format(method, median(ours), our_least, version, mode, median(theirs), their_least,
      median(ratios), ratios[1], ratios[#ratios], their_least / our_least))
  else
    print(("%-15s vertex %8.3f ms (least %.3f)"):format(method, median(ours), our_least))
  end
  local function compared_or_none(format, value) return #ratios > 0 and format:format(value) or "" end
  record(flags.device, flags.preset, flags.batch, method, flags.autocast, graphs and "on" or "off",
    ("%.4f"):format(median(ours)),
    compared_or_none("%s", version), compared_or_none("%s", mode), compared_or_none("%.4f", median(theirs)),
      compared_or_none("%.3f", median(ratios)),
    ("%.4f"):format(our_least), compared_or_none("%.4f", their_least))
end
