--- One training step of the autoencoder, Vertex against PyTorch on the same processor, interleaved: rounds of both in turn, the ratio of
-- each round, medians.
--
--   luajit experiments/bench/ae_step.lua [--preset tiny] [--batch 16] [--rounds 5] [--steps 20] [--threads 2] [--python python3] [--compile]

local root = (arg[0]:match "^(.*)/experiments/bench/[^/]*$") or "."
package.path = root .. "/lua/?.lua;" .. root .. "/lua/?/init.lua;" .. root .. "/experiments/?.lua;" .. package.path

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
local flags = parser:parse()

local preset = assert(autoencoder.presets[flags.preset], "unknown preset " .. flags.preset)
vx.threads(flags.threads)
vx.device "cpu"

local function median(t)
  table.sort(t)
  return t[math.ceil(#t / 2)]
end

--- A function that runs `steps` training steps and returns the median in milliseconds.
local function vertex_round(method)
  vx.seed(1)
  local quantizer = method ~= "none" and vx.quantizer(method, { dim = preset.channels[#preset.channels], codes = preset.codes, k = preset.k }) or nil
  if quantizer then quantizer.with_stats = false end
  local model = autoencoder.new(preset.channels, quantizer)
  local optimizer = vx.optim.AdamW(model:parameters(), { lr = 1e-4, betas = { 0.9, 0.99 }, weight_decay = 1e-4 })
  local x = vx.randn { flags.batch, preset.size, preset.size, 3 }
  return function(steps)
    local times = {}
    for i = 1, steps + 3 do
      local start = core.time()
      vx.step(function()
        local y, q = model(x)
        local loss = vx.mse(y, x)
        if q then loss = loss + q.reg end
        optimizer:zero_grad()
        loss:backward()
        optimizer:step()
        loss:item()
      end)
      if i > 3 then times[#times + 1] = (core.time() - start) * 1e3 end
    end
    return median(times)
  end
end

local function torch_round(method)
  local command = ("OMP_NUM_THREADS=%d %s %s/experiments/bench/ae_step.py %s %d %d %d %s %s 2>/dev/null"):format(flags.threads, flags.python, root,
    flags.preset, flags.batch, flags.steps, flags.threads, method, flags.compile and "compile" or "")
  local p = io.popen(command)
  local ms, version = p:read "*a":match "([%d.]+) (%S+)"
  p:close()
  if not ms then error("no answer from: " .. command) end
  return tonumber(ms), version
end

print(("%s, preset %s, batch %d, %d threads, medians of %d steps in each of %d rounds"):format(vx.devices()[1].description, flags.preset, flags.batch,
  flags.threads, flags.steps, flags.rounds))
for _, method in ipairs { "none", "softmax-knn-ce" } do
  local round = vertex_round(method)
  local ours, theirs, ratios, version = {}, {}, {}, nil
  for r = 1, flags.rounds do
    ours[r] = round(flags.steps)
    if flags.python ~= "none" then
      theirs[r], version = torch_round(method)
      ratios[r] = theirs[r] / ours[r]
    end
  end
  if version then
    print(("%-15s vertex %8.2f ms   torch %s%s %8.2f ms   ratio %.2f (%.2f .. %.2f)"):format(method, median(ours), version,
      flags.compile and " compiled" or "", median(theirs), median(ratios), ratios[1], ratios[#ratios]))
  else
    print(("%-15s vertex %8.2f ms"):format(method, median(ours)))
  end
end
