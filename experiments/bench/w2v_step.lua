--- One step of Wav2Vec 2.0 pretraining, Vertex against torchaudio and PyTorch on the same processor or GPU, in turn:
-- the ratio of each round, medians. Random waves; hidden frames and distractors are drawn anew each step, whose time
-- includes the wait for its loss.
--
--   luajit experiments/bench/w2v_step.lua [--presets tiny,small] [--batch 8] [--rounds 20] [--seconds 40] [--threads 2]
--     [--python python3] [--methods none,softmax-knn-ce] [--device cuda:0] [--autocast bf16] [--csv FILE]
--   luajit experiments/bench/w2v_step.lua --frames 200,400,800 --presets 1x1024
-- --frames: the most memory that our step holds for clips of so many frames, instead; one clip unless --batch is given.
-- tiny is the sweep's default; small has 4 layers of width 384.

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")

local vx = require "vertex"
local core, json, tools = require "vertex.core", require "vertex.json", require "tools"
local wav2vec = require "wav2vec"

local parser = require "argparse"("w2v_step", "Pretraining step time, Vertex against torchaudio.")
parser:option("--presets", "Of experiments/wav2vec.lua."):argname "A,B":default "tiny,small"
parser:option("--batch", "Clips per step; default: the preset's."):convert(tonumber)
parser:option("--rounds", "At most."):default "20":convert(tonumber)
parser:option("--seconds", "For the rounds of a preset and method."):default "40":convert(tonumber)
parser:option("--threads"):default "2":convert(tonumber)
parser:option("--python", "Interpreter with torch and torchaudio; 'none' times Vertex alone."):default "python3"
parser:option("--methods", "none, or quantizers; the other side has none and softmax-knn-ce."):argname "A,B"
  :default "softmax-knn-ce"
parser:option("--device", "Of both sides."):default "cpu"
parser:option("--autocast"):choices { "f32", "bf16" }:default "f32"
parser:option("--frames", "Measure memory for clips of so many frames."):argname "T,T"
parser:option("--csv", "A CSV file to put the results into."):argname "FILE"
local flags = parser:parse()

vx.threads(flags.threads)
vx.device(flags.device)
vx.autocast(flags.autocast)

--- Targets as they are: the step without a quantizer.
local None = vx.nn.module "None"
function None:forward(z) -- luacheck: no unused args
  return { quantized = z, reg = vx.zeros {} }
end

--- A function that takes a training step with clips of `samples` samples, and the model.
local function vertex_step(preset, method, batch, samples)
  vx.seed(1)
  local quantizer = method == "none" and None()
    or vx.quantizer(method, wav2vec.quantizer_options(preset, method, 1, 1))
  quantizer.with_stats = false
  local model = wav2vec.new(preset, quantizer)
  local optimizer = vx.optim.AdamW(model:parameters(), { lr = 1e-4, betas = { 0.9, 0.99 }, weight_decay = 0 })
  local waves = vx.randn { batch, samples }
  return function()
    local start = core.time()
    vx.step(function()
      local out = model(waves)
      local loss = out.loss + out.q.reg
      optimizer:zero_grad()
      loss:backward()
      optimizer:step()
      loss:item()
    end)
    return (core.time() - start) * 1e3, 0
  end, model
end

--- The same of torchaudio, as a worker; nil and why where it cannot.
local function torch_step(preset, method, batch, model)
  local config = {}
  for name, value in pairs(model.wav2vec2.config) do
    if name ~= "extractor_mask_norm" then config[name] = value end
  end
  local settings = json.encode { model = config, quantizer = method, dim = preset.dim, codes = preset.codes,
    groups = preset.groups, k = preset.k, batch = batch, crop = preset.crop, distractors = preset.distractors,
    mask_probability = preset.mask_probability, mask_span = preset.mask_span, threads = flags.threads,
    device = flags.device, autocast = flags.autocast }
  local worker, reason = tools.worker(flags.python, core.root .. "/experiments/bench/w2v_step.py", { settings },
    { environment = "OMP_NUM_THREADS=" .. flags.threads })
  if not worker then return nil, reason end
  return function()
    local ms = worker:ask "step"
    if ms then return tonumber(ms), 0 end
  end, worker
end

--- The fewest samples that make T frames.
local function samples_of(model, T)
  local samples = model:receptive_field()
  while model:frames(samples) < T do samples = samples + 1 end
  return samples
end

local function measure_memory(preset, method)
  for T in flags.frames:gmatch "%d+" do
    local samples = samples_of(vx.models.wav2vec2(preset.model), tonumber(T))
    local step = vertex_step(preset, method, flags.batch or 1, samples)
    step() -- makes gradients, which stay
    collectgarbage() -- the other models
    collectgarbage()
    local before = vx.memory().live
    vx.reset_peak()
    step()
    local peak = vx.memory().peak
    print(("%-15s %5s frames: %8.1f MB at the peak, %8.1f MB of them for the step"):format(method, T, peak / 2 ^ 20,
      (peak - before) / 2 ^ 20))
  end
end

local results = flags.csv and tools.results(flags.csv, { "device", "preset", "batch", "method", "dtype", "threads",
  "vertex_ms", "torch", "torch_ms", "ratio", "ratio_least", "ratio_most" }, { "device", "preset", "batch", "method",
  "dtype", "threads" })

local where = flags.device
for _, d in ipairs(vx.devices()) do where = d.name == flags.device and d.description or where end
print(("%s, %d threads, %s"):format(where, flags.threads, flags.autocast))
for name in flags.presets:gmatch "[^,%s]+" do
  local preset = wav2vec.presets[name] or core.fail("unknown preset %s", name)
  for method in flags.methods:gmatch "[^,%s]+" do
    if flags.frames then
      measure_memory(preset, method)
    else
      local batch = flags.batch or preset.batch
      local ours, model = vertex_step(preset, method, batch, preset.crop)
      local theirs, worker
      if flags.python ~= "none" and (method == "none" or method == "softmax-knn-ce") then
        theirs, worker = torch_step(preset, method, batch, model)
        if not theirs then print("torchaudio cannot: " .. worker) end
      end
      local a, b = tools.pair({ rounds = flags.rounds, seconds = flags.seconds }, ours, theirs)
      local line = ("%-8s batch %d  %-15s vertex %8.2f ms (least %.2f)"):format(name, batch, method, a.total, a.least)
      if b then
        line = line .. ("   torch %s %8.2f ms (least %.2f)   ratio %.2f (%.2f .. %.2f)"):format(worker.version, b.total,
          b.least, b.ratio, b.ratio_least, b.ratio_most)
        worker:close()
      end
      print(line)
      if results then
        results:add { device = flags.device, preset = name, batch = batch, method = method, dtype = flags.autocast,
          threads = flags.threads, vertex_ms = a.total, torch = b and worker.version, torch_ms = b and b.total,
          ratio = b and b.ratio, ratio_least = b and b.ratio_least, ratio_most = b and b.ratio_most }
      end
    end
  end
end
