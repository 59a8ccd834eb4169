--- Discrete image autoencoding (Section 4.1): trains the same autoencoder with each quantizer and compares them, as the
-- paper's Table 1.
--
--   luajit experiments/ae_sweep.lua                                       thirteen methods on images made on the fly
--   luajit experiments/ae_sweep.lua --data DIR --preset small --methods softmax-knn-ce,ste-euclid
-- --help lists all flags, methods and presets. The model and its sizes are in autoencoder.lua beside this file.

local root = (arg[0]:match "^(.*)/experiments/[^/]*$") or (arg[0]:match "^experiments/" and "." or "..")
package.path = root .. "/lua/?.lua;" .. root .. "/lua/?/init.lua;" .. root .. "/experiments/?.lua;" .. package.path

local vx = require "vertex"
local autoencoder = require "autoencoder"
local core, ops, sweep, train = require "vertex.core", vx.ops, vx.sweep, vx.train

local spec = {
  name = "ae_sweep", default_preset = "tiny", presets = autoencoder.presets,
  summary = "Discrete image autoencoding with thirteen quantizers (Morita 2025, Section 4.1).",
}
local flags = sweep.flags(spec, arg)

--- What decides the results, from the flags or, when resuming, from the stored experiment. Epochs become steps once the
-- data is known.
local function define(stored)
  stored = stored or {}
  local name = flags.preset or stored.preset or spec.default_preset
  local preset = autoencoder.presets[name]
  local steps, epochs = flags.steps or stored.steps, flags.epochs or stored.epochs
  if flags.steps then epochs = nil elseif flags.epochs then steps = nil end
  if not steps and not epochs then steps, epochs = preset.steps, preset.epochs end
  return { preset = name, data = flags.data or stored.data, seed = flags.seed or stored.seed or 1,
    batch = flags.batch or stored.batch or preset.batch,
    steps = steps, epochs = epochs, autocast = (flags.autocast or stored.autocast) == "bf16" and "bf16" or nil }
end

local run = sweep.open(spec, flags, define)
local config, preset = run.config, autoencoder.presets[run.config.preset]

local function open_images(split, options)
  options.path, options.split, options.size, options.resize = config.data, split, preset.size, preset.resize
  options.batch, options.seed, options.strict = config.batch, config.seed, flags.strict
  return vx.data.images(options)
end

-- -- Training one method ----------------------------------------------------------------------------------------------

--- A count of 0 for every code of every column of a quantizer's codes.
local function empty_counts(quantizer)
  return vx.zeros({ quantizer.columns, quantizer.options.codes }, { dtype = "i32" })
end

local function train_method(method)
  vx.seed(config.seed)
  local quantizer = vx.quantizer(method, { dim = preset.channels[#preset.channels], codes = preset.codes, k = preset.k,
    shards = preset.shards,
    seed = config.seed })
  local model = autoencoder.new(preset.channels, quantizer)
  local hints = quantizer.facts.optimizer -- appendix B.1: half the rate and no decay for the Euclidean methods
  local rate = preset.rate * (hints.rate or 1)
  local optimizer = vx.optim.AdamW(model:parameters(), { betas = { 0.9, 0.99 },
    weight_decay = hints.weight_decay or 1e-4 })
  quantizer.with_stats = false -- only the logged steps ask for them

  local state = { model = model, optimizer = optimizer }
  local now = run:begin(method, state)
  local images = open_images("train", { crop = "random", flip = true, shuffle = true, epochs = 0,
    position = now.position })
  local steps = config.steps or math.ceil(config.epochs * images:size() / config.batch)
  local schedule = vx.optim.warmup_cosine { peak = rate, final = rate / 2, warmup = math.min(preset.warmup, steps / 4),
    total = steps }
  local log_every = math.max(1, math.floor(steps / 100))
  local used = empty_counts(quantizer) -- codes seen since the last log line
  local meter, progress = train.meter(),
    train.progress(("%-15s"):format(method), { total = steps, done = now.step, quiet = flags.quiet })
  local shown = ""

  local function train_step(x, learning_rate)
    local y, q = model(x)
    local mse = vx.mse(y, x)
    local loss = mse + q.reg
    optimizer:zero_grad()
    loss:backward()
    optimizer:step(learning_rate)
    ops.count_codes(q.codes, quantizer.options.codes, used)
    meter:add { loss = loss, mse = mse, reg = q.reg }
    return q.stats
  end

  -- On a GPU the step is recorded once and launched as a whole. Batches then arrive in `place`, where the recording
  -- reads them, while the step before is still computed; the logged steps, whose statistics wait for the device, run op
  -- by op, with the same bits.
  local graphs = flags.graph ~= "off" and vx.device() ~= "cpu" and quantizer.graphs
  local place = graphs and core.new({ config.batch, preset.size, preset.size, 3 }, { keep = true })
  local recorded = vx.graph(function(learning_rate) return train_step(place, learning_rate) end)

  for step = now.step + 1, steps do
    local log = step % log_every == 0 or step == steps
    quantizer.with_stats = log
    local stats = vx.step(function()
      local x = images:next()
      if not x then return nil end -- interrupted
      if not graphs then return train_step(x, schedule(step)) end
      place:copy(x)
      if log then return train_step(place, schedule(step)) end
      return recorded:replay(schedule(step))
    end)
    if not stats then
      run:save { step = step - 1, position = images:position() }
      progress:finish()
      return nil
    end
    if log then
      local m = meter:take()
      local share = vx.step(function() return ops.mean(ops.lt(vx.zeros { 1 }, used:to "f32")):item() end)
      used:zero()
      run:log { step = step, loss = m.loss, mse = m.mse, reg = m.reg, code_use = share, perplexity = stats.perplexity,
        max_p = stats.max_p,
        tau = stats.tau, lr = schedule(step) }
      shown = ("loss %.4f  codes %3.0f%%  ppl %.0f%s"):format(m.loss, 100 * share, stats.perplexity,
        stats.tau and ("  tau %.3g"):format(stats.tau) or "")
    end
    local rate_now = (step - now.step) * config.batch / (core.time() - run.began)
    progress:update(step, ("%s  %.0f images/s"):format(shown, rate_now))
    local extra = { step = step, position = images:position() }
    if core.interrupted() then
      run:save(extra)
      progress:finish()
      return nil
    end
    run:save(extra, step < steps)
  end
  for _, broken in ipairs(images:broken()) do
    io.stderr:write(("skipped %s: %s\n"):format(broken.path, broken.reason))
  end
  images:close()
  recorded:release()
  progress:finish()
  return state, steps
end

-- -- Evaluation: the whole validation split, hard codes ---------------------------------------------------------------

local STD = { 0.229, 0.224, 0.225 } -- ImageNet's, to turn standardized errors into pixels

--- {rmse, psnr, code_use, code_use_256, perplexity} over the split, and the first batch with its reconstruction; nil
-- when interrupted.
local function evaluate(model)
  local images = open_images("val", { crop = "center", shuffle = false, epochs = 1 })
  local M, total, part = model.quantizer.options.codes, empty_counts(model.quantizer), empty_counts(model.quantizer)
  local groups, in_part = {}, 0
  local scale = vx.tensor(STD)
  local squared, pixels, count, first = 0, 0, 0, nil
  local function share(t) return vx.step(function() return ops.mean(ops.lt(vx.zeros { 1 }, t:to "f32")):item() end) end
  repeat
    local n, kept = vx.step(function()
      return vx.no_grad(function()
        local x = images:next()
        if not x then return 0 end
        local y, q = model(x)
        local d = y - x
        squared = squared + d:square():sum():item()
        pixels = pixels + (d * scale):square():sum():item()
        count = count + x:numel()
        ops.count_codes(q.codes, M, total)
        ops.count_codes(q.codes, M, part)
        return x:size(1), not first and { x, y } or nil
      end)
    end)
    first = first or kept
    in_part = in_part + n
    if in_part >= 256 or (n == 0 and #groups == 0) then
      groups[#groups + 1] = share(part)
      part:zero()
      in_part = 0
    end
  until n == 0
  images:close()
  if core.interrupted() then return nil end
  if count == 0 then core.fail("the validation split of %s has no image", config.data) end
  local sum = 0
  for _, g in ipairs(groups) do sum = sum + g end
  local perplexity, counts = 0, total:totable()
  for _, column in ipairs(counts) do
    local entropy, n = 0, 0
    for _, c in ipairs(column) do n = n + c end
    for _, c in ipairs(column) do
      if c > 0 then entropy = entropy - c / n * math.log(c / n) end
    end
    perplexity = perplexity + math.exp(entropy) / #counts
  end
  return { rmse = math.sqrt(squared / count), psnr = -10 * math.log10(pixels / count), code_use = share(total),
    code_use_256 = sum / #groups,
    perplexity = perplexity }, first
end

local function finish_method(state, steps)
  local model = state.model:eval()
  local result, first = evaluate(model)
  if result and model.quantizer.log_tau then -- the gap between training's soft quantizers and inference's hard ones
    model.quantizer:train()
    result.rmse_soft = (evaluate(model) or {}).rmse
  end
  if core.interrupted() then return false end
  local n = math.min(10, first[1]:size(1))
  local function pictures(x) return vx.data.to_u8(vx.data.denormalize(x:narrow(1, 1, n))) end
  state.tensors = { originals = pictures(first[1]), reconstructions = pictures(first[2]) }
  result.steps = steps
  run:finish_method({ step = steps }, result)
  return true
end

-- -- The sweep --------------------------------------------------------------------------------------------------------

local function say(...) if not flags.quiet then io.stderr:write(string.format(...), "\n") end end

local function main()
  if config.autocast then vx.autocast(config.autocast) end
  say("%s: %s, %s, %s → %s", spec.name, config.preset, config.data or "images made on the fly",
    vx.devices()[1].description, run.out)
  for _, method in ipairs(run.methods) do
    if run:finished(method) then
      say("%-15s  finished before", method)
    else
      local state, steps = train_method(method)
      if not state or not finish_method(state, steps) then
        say("stopped; go on with: luajit %s --out %s --resume", arg[0], run.out)
        return 130
      end
      local r = run.results[method]
      say("%-15s  code use %5.1f%%  rMSE %.3f  %.0f s", method, 100 * r.code_use, r.rmse, r.seconds)
    end
  end
  io.write(run:write_table(("%s, %s"):format(config.preset, config.data or "procedural images")), "\n")
  run:draw_curves({ field = "mse", label = "reconstruction loss (MSE)", log = true },
    { field = "code_use", label = "code use", limits = { 0, 1.02 } })
  run:draw_reconstructions()
  say("results.csv, table.md, curves.png, reconstructions.png in %s", run.out)
  return 0
end

local ok, status = pcall(core.catching_interrupts, main)
if not ok then io.stderr:write(tostring(status), "\n") end
os.exit(ok and status or 1, true)
