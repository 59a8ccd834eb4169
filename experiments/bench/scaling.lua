--- What a second rank brings on the CPU: images (or clips) per second of one rank and of two, interleaved in one job,
-- and what scope = "world" costs. Medians over rounds; the machine should do nothing else.
--
--   mpirun -np 2 --bind-to none luajit experiments/bench/scaling.lua [--rounds 7] [--steps 10] [--parts ae,w2v,scope]
--     [--preset small] [--method softmax-knn-ce] [--batch 16] [--images 4]
--   luajit experiments/bench/scaling.lua --model      what 4 to 64 GPUs are calculated to do (no measurement)
--
--   strong   1 rank x 2 threads with all of the batch, against 2 ranks x 1 thread with half of it each
--   weak     1 rank x 1 thread with half of the batch, against 2 ranks x 1 thread with that half each
--   scope    a step of 64x64x3-8192 under scope = "world" against one under "rank", both on 2 ranks
-- While one rank is timed alone the other sleeps. As root mpirun also wants --allow-run-as-root.

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")

local vx = require "vertex"
local autoencoder = require "autoencoder"
local tools = require "tools"
local wav2vec = require "wav2vec"
local core, dist = require "vertex.core", vx.dist

local parser = require "argparse"("scaling", "One rank and two, and what scope = \"world\" costs.")
parser:option("--rounds"):default "7":convert(tonumber)
parser:option("--steps", "Steps per round."):default "10":convert(tonumber)
parser:option("--preset", "Of the autoencoder."):default "small"
parser:option("--method"):default "softmax-knn-ce"
parser:option("--batch", "Images, or clips, of all ranks."):default "16":convert(tonumber)
parser:option("--images", "Of a rank, where scopes are compared."):default "4":convert(tonumber)
parser:option("--parts"):argname "A,B":default "ae,w2v,scope"
parser:flag("--model", "Calculate 4 to 64 GPUs.")
local flags = parser:parse()

local function median(t)
  local sorted = { unpack(t) }
  table.sort(sorted)
  return sorted[math.ceil(#sorted / 2)]
end

-- -- What is timed ----------------------------------------------------------------------------------------------------

--- A function that takes a training step on `batch` images; with ranks it averages gradients over them.
local function ae_step(preset_name, batch, ranks, more)
  local preset = assert(autoencoder.presets[preset_name], "unknown preset")
  vx.seed(1)
  local options = autoencoder.quantizer_options(preset, 1)
  options.k = math.max(options.k, dist.size())
  for name, value in pairs(more or {}) do options[name] = value end
  local quantizer = vx.quantizer(flags.method, options)
  quantizer.with_stats = false
  local model = autoencoder.new(preset.channels, quantizer)
  local parameters = model:parameters()
  local optimizer = vx.optim.AdamW(parameters, { lr = 1e-4, betas = { 0.9, 0.99 }, weight_decay = 1e-4 })
  local gradients = ranks and dist.gradients(parameters)
  local x = vx.randn { batch, preset.size, preset.size, 3 }
  local count = 0
  for _, p in ipairs(parameters) do count = count + p:numel() end
  return function()
    local y, q = model(x)
    local loss = vx.mse(y, x) + q.reg
    optimizer:zero_grad()
    if gradients then gradients:backward(loss) else loss:backward() end
    optimizer:step()
    return loss
  end, count
end

--- The same of Wav2Vec 2.0 at `tiny`.
local function w2v_step(batch, ranks)
  local preset = wav2vec.presets.tiny
  vx.seed(1)
  local quantizer = vx.quantizer(flags.method, wav2vec.quantizer_options(preset, flags.method, 1, 1))
  quantizer.with_stats = false
  local model = wav2vec.new(preset, quantizer)
  local parameters = model:parameters()
  local optimizer = vx.optim.AdamW(parameters, { lr = 1e-4, betas = { 0.9, 0.99 }, weight_decay = 0 })
  local gradients = ranks and dist.gradients(parameters)
  local waves = vx.randn { batch, preset.crop }
  local lengths = vx.full({ batch }, preset.crop):to "i32"
  local count = 0
  for _, p in ipairs(parameters) do count = count + p:numel() end
  return function()
    local out = model(waves, lengths)
    local loss = out.loss + out.q.reg
    optimizer:zero_grad()
    if gradients then gradients:backward(loss) else loss:backward() end
    optimizer:step()
    return loss
  end, count
end

--- Runs steps; gives seconds per step.
local function timed(step, threads)
  core.threads(threads)
  local began = core.time()
  for _ = 1, flags.steps do vx.step(function() step():item() end) end
  return (core.time() - began) / flags.steps
end

local function say(text, ...)
  if dist.rank() == 0 then io.write(text:format(...), "\n") end
end

--- Times rank 0 alone, while the others sleep about as long.
local function alone(f, expected)
  dist.barrier()
  local seconds
  if dist.rank() == 0 then seconds = f() else core.sleep(0.95 * expected) end
  dist.barrier()
  return dist.sum { seconds or 0 }[1]
end

local function together(f)
  dist.barrier()
  local seconds = f()
  dist.barrier()
  return dist.sum({ seconds })[1] / dist.size()
end

local function scaling(name, make)
  local own = flags.batch / 2
  local real = dist.size -- a step of one rank must not look for the others
  local function single(f)
    return function(...)
      dist.size = function() return 1 end
      local result = { f(...) }
      dist.size = real
      return unpack(result)
    end
  end
  local whole, half = single(make)(flags.batch), single(make)(own)
  local shared, count = make(own, true)
  local runs = { single(function() return timed(whole, 2) end), single(function() return timed(half, 1) end),
    function() return timed(shared, 1) end }
  local times, expected = { {}, {}, {} }, { 0, 0 }
  for round = 0, flags.rounds do -- the first one warms up
    for i = 1, 2 do
      local t = alone(runs[i], expected[i] * flags.steps)
      expected[i] = t
      if round > 0 then table.insert(times[i], t) end
    end
    local t = together(runs[3])
    if round > 0 then table.insert(times[3], t) end
  end
  local strong, weak = {}, {}
  for i = 1, flags.rounds do
    strong[i], weak[i] = times[1][i] / times[3][i], times[2][i] / times[3][i]
  end
  say("%s, batch %d, %.2f M parameters (%.1f MB of gradients)", name, flags.batch, count / 1e6, count * 4e-6)
  say("  1 rank x 2 threads, batch %-3d %8.1f ms  %8.1f per second", flags.batch, 1e3 * median(times[1]),
    flags.batch / median(times[1]))
  say("  1 rank x 1 thread,  batch %-3d %8.1f ms  %8.1f per second", own, 1e3 * median(times[2]),
    own / median(times[2]))
  say("  2 ranks x 1 thread, batch %-3d %8.1f ms  %8.1f per second", own, 1e3 * median(times[3]),
    2 * own / median(times[3]))
  say("  strong: %.3f of 1 x 2 (%.3f .. %.3f)   weak: %.3f of 1 x 1, twice (%.3f .. %.3f)", median(strong),
    math.min(unpack(strong)), math.max(unpack(strong)), median(weak), math.min(unpack(weak)), math.max(unpack(weak)))
end

local function scope_cost()
  local name = "64x64x3-8192"
  local steps = {}
  for i, scope in ipairs { "rank", "world" } do
    steps[i] = ae_step(name, flags.images, true, { scope = scope, shards = 1 })
  end
  local ratios, times = {}, { {}, {} }
  local before = flags.steps
  flags.steps = 1
  for round = 0, flags.rounds do
    local t = {}
    for i = 1, 2 do t[i] = together(function() return timed(steps[i], 1) end) end
    if round > 0 then
      ratios[round] = t[2] / t[1]
      table.insert(times[1], t[1])
      table.insert(times[2], t[2])
    end
  end
  flags.steps = before
  local p = autoencoder.presets[name]
  say("scope, %s, %s, %d images (%d rows) on each of 2 ranks x 1 thread, K = %d", name, flags.method, flags.images,
    4096 * flags.images, p.k)
  say("  rank %.3f s, world %.3f s a step: %+.1f %% (%+.1f .. %+.1f); gathered: %.2f MB from each rank",
    median(times[1]), median(times[2]), 100 * (median(ratios) - 1), 100 * (math.min(unpack(ratios)) - 1),
    100 * (math.max(unpack(ratios)) - 1), p.codes * p.k * 4e-6)
end

-- -- What is calculated -----------------------------------------------------------------------------------------------

-- Bandwidths in bytes a second, as rings reach them, of a GPU: inside a machine of 8 GPUs, and between machines.
local LINKS = {
  { name = "NVLink in machines of 8 GPUs (300 GB/s), 400 Gb/s InfiniBand for each GPU (40 GB/s)", inside = 300e9,
    between = 40e9 },
  { name = "NVLink in machines of 8 GPUs (300 GB/s), 100 Gb/s Ethernet for each machine (1.25 GB/s a GPU)",
    inside = 300e9, between = 10e9 / 8 },
}
local LATENCY, HIDDEN = 20e-6, 0.6 -- seconds of a collective's start; share of a step in which backward runs

local function row_of(R, count, keys, link)
  local speed = R <= 8 and link.inside or link.between
  local reduce = 2 * (R - 1) / R * count * 4 / speed + math.ceil(count / 2 ^ 18) * LATENCY
  local gather, cells = keys > 0 and (R - 1) * keys / speed + LATENCY or 0, {}
  for _, step in ipairs { 0.1, 0.3 } do
    local late = math.max(0, reduce - HIDDEN * step)
    cells[#cells + 1] = step / (step + late)
    cells[#cells + 1] = step / (step + late + gather)
  end
  io.write(("  %5d  %8.2f ms %7.2f ms   %8.3f %8.3f   %8.3f %8.3f\n"):format(R, 1e3 * reduce, 1e3 * gather,
    unpack(cells)))
end

local function model()
  io.write(([[
Calculated, not measured: no step has run on a GPU here. Assumptions:
  - NCCL moves the gradients, float32, in rings: 2 (R - 1) / R of the bytes pass each GPU; %g us for a collective to
    start, one for each bucket of 1 MB.
  - A GPU does its part of a step in 0.1 s or 0.3 s, whatever R (weak scaling); backward is %.0f %% of that, and hides
    as much of the gradients' way. Nothing hides the keys of scope = "world", which each GPU gets of all others.
  - Data are there in time, and no rank waits for a slower one: both cost more than the links do, where they fail.
  - core/comm waits for the device before it hands a bucket to NCCL; what that costs the queue is not counted.
  Efficiency: the step of one GPU over that of R, with scope = "rank", and with "world".
]]):format(LATENCY * 1e6, 100 * HIDDEN))
  local cases = {}
  for _, name in ipairs { "16x16x32-1024", "64x64x3-8192" } do
    local preset = autoencoder.presets[name]
    local quantizer = vx.quantizer("softmax-knn-ce", autoencoder.quantizer_options(preset, 1))
    cases[#cases + 1] = { name, autoencoder.new(preset.channels, quantizer), preset.codes * preset.k * 4 }
  end
  local preset = wav2vec.presets["1x1024"]
  local options = wav2vec.quantizer_options(preset, "softmax-knn-ce", 1, 1)
  cases[3] = { "wav2vec 1x1024", wav2vec.new(preset, vx.quantizer("softmax-knn-ce", options)),
    options.codes * options.k * 4 }
  for _, case in ipairs(cases) do
    local name, net, keys = unpack(case)
    local count = 0
    for _, p in ipairs(net:parameters()) do count = count + p:numel() end
    io.write(("\n%s: %.2f M parameters, %.1f MB of gradients; scope = \"world\" gathers %.2f MB from each GPU\n")
      :format(name, count / 1e6, count * 4e-6, keys * 1e-6))
    for _, link in ipairs(LINKS) do
      io.write("  ", link.name, "\n")
      io.write "   GPUs    gradients        keys     0.1 s    world      0.3 s    world\n"
      for _, R in ipairs { 4, 8, 16, 32, 64 } do row_of(R, count, keys, link) end
    end
  end
end

-- -- All --------------------------------------------------------------------------------------------------------------

if flags.model then
  model()
  os.exit(0, true)
end
if dist.size() ~= 2 then tools.exit_with("scaling: %d ranks; start it by mpirun -np 2 --bind-to none", dist.size()) end
vx.device "cpu"
local machine = tools.processor()
say("%s, %s kernels, %s; medians of %d rounds of %d steps, interleaved", machine.name, machine.simd, dist.name(),
  flags.rounds, flags.steps)
for part in flags.parts:gmatch "[^,]+" do
  if part == "ae" then
    scaling(("autoencoder %s, %s"):format(flags.preset, flags.method),
      function(batch, ranks) return ae_step(flags.preset, batch, ranks) end)
  elseif part == "w2v" then
    scaling("wav2vec tiny, " .. flags.method, w2v_step)
  elseif part == "scope" then
    scope_cost()
  else
    tools.exit_with("--parts: '%s' is none of ae, w2v, scope", part)
  end
end
dist.close()
