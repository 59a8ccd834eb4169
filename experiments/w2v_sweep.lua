--- Wav2Vec 2.0 pretraining (Section 4.2): trains the same model with each quantizer and compares how many codes are in
-- use, as the paper's Table 2.
--
--   luajit experiments/w2v_sweep.lua                      the methods of Table 2, on speech made on the fly
--   luajit experiments/w2v_sweep.lua --data LibriSpeech --preset 2x320 --methods softmax-knn-ce,ste-euclid
-- --help lists all flags, methods and presets. The model and its sizes are in wav2vec.lua beside this file.

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")

local vx = require "vertex"
local wav2vec = require "wav2vec"
local core, runs = require "vertex.core", vx.runs

-- -- What this experiment is ------------------------------------------------------------------------------------------

local function new_quantizer(method, preset, config)
  local steps = config.steps or 1 -- with epochs known once the data are; see train
  return vx.quantizer(method,
    runs.quantizer_options(config, wav2vec.quantizer_options(preset, method, steps, config.seed)))
end

local function percent(v) return ("%.1f%%"):format(100 * v) end

local USED = "used codes / M"
local ALL = "validation split, all frames, hard codes"
local HIDDEN = "validation split, hidden frames, hard codes"

local run = runs.start({
  name = "w2v_sweep", summary = "Wav2Vec 2.0 pretraining with many quantizers (Morita 2025, Section 4.2).",
  presets = wav2vec.presets, preset = "tiny",
  words = { data = "Folder of speech, as LibriSpeech's or any other; default: made on the fly.",
    batch = "Clips per step.", epochs = "Passes over the files instead of steps." },
  flags = { runs.flags.autocast,
    { name = "strict", meaning = "A broken file in --data ends the run instead of being skipped." } },
  columns = {
    { name = "code_use_1", title = "Codebook#1", format = percent, better = "high", from = ALL, unit = USED },
    { name = "code_use_2", title = "Codebook#2", format = percent, better = "high", from = ALL, unit = USED },
    { name = "code_use", title = "Code use", format = percent, better = "high", from = ALL,
      unit = USED .. ", mean over codebooks" },
    { name = "perplexity", title = "Perplexity", format = "%.1f", better = "high", from = ALL,
      unit = "codes, mean over codebooks" },
    { name = "accuracy", title = "Accuracy", format = percent, from = HIDDEN,
      unit = "frames whose target is nearest; none of those without a distractor left" },
    { name = "loss", title = "Loss", format = "%.3f", from = HIDDEN, unit = "nats" },
    { name = "equal", title = "Equal", format = percent, better = "low", from = HIDDEN,
      unit = "distractors equal to the target" },
    "steps", "seconds",
    { name = "perplexity_share", title = "Perplexity / M", format = percent, better = "high", from = ALL,
      unit = "perplexity over that of even use" },
    "peak_mb", "step_ms", "tightness", "tightness_q05", "tightness_q50", "tightness_q95", "gap", "unselected",
    "contested",
  },
  table = {
    title = function(c) return ("%s, %s"):format(c.preset, c.data or "synthetic speech") end,
    columns = { "code_use_1", "code_use_2", "perplexity", "accuracy", "loss", "equal", "seconds" },
    line = { "code_use", "accuracy", "loss" },
    footnotes = {
      "Code use: used codes / M of each codebook over all frames of the split. Accuracy, loss and Equal over hidden",
      "frames; Equal: distractors that equal the target, which the loss leaves out. Loss 0 with all of them equal is",
      "a collapsed codebook; ln 101 = 4.615 is a model that tells nothing apart.",
    },
  },
  pictures = {
    runs.curves { { field = "contrastive", label = "contrastive loss (nats)" },
      { field = "code_use", label = "code use", limits = { 0, 1.02 } },
      { field = "equal", label = "distractors equal to the target", limits = { 0, 1.02 } } },
    runs.curves({ { field = "tau", label = "temperature τ", log = true },
      { field = "max_p", label = "largest probability, mean over rows", limits = { 0, 1.02 }, where = "tau" } },
      "softness.png"),
    runs.code_counts,
  },
  check = function(c, methods, preset)
    local files = {}
    vx.step(function()
      for _, method in ipairs(methods) do new_quantizer(method, preset, c) end
      local small = { encoder_num_layers = 0 } -- frames do not depend on it
      for name, value in pairs(preset.model) do small[name] = small[name] or value end
      local model = vx.models.wav2vec2(small)
      if model:frames(preset.crop) <= preset.mask_span then
        core.fail("crop %d makes %d frames, expected more than the %d of a span", preset.crop,
          model:frames(preset.crop), preset.mask_span)
      end
    end)
    for _, split in ipairs(c.data and { "train", "val" } or {}) do
      local set = vx.data.speech { path = c.data, split = split }
      for _, file in ipairs(set.files) do files[#files + 1] = file.path end
      set:close()
    end
    return c.data and runs.fingerprint(files)
  end,
}, arg)
local config, preset = run.config, run.preset

-- -- Training one method ----------------------------------------------------------------------------------------------

local function open_speech(split, model, options)
  options.path, options.split, options.crop, options.batch = config.data, split, preset.crop, run.batch
  options.shard, options.shards = run.shard, run.shards -- of several ranks (vx.dist)
  options.seed, options.speech_seed, options.strict = config.seed, 1, run.flags.strict
  options.shortest = model:shortest()
  return vx.data.speech(options)
end

local function count_codes(quantizer) return vx.metrics.code_use(quantizer.options.codes, quantizer.columns) end

local NAMED = {
  collapsed = "every distractor equals its target: loss 0, the codebook has collapsed",
  stuck = "loss ln %d = %.3f at every hidden frame: targets cannot be told apart",
}

--- Which of the two degenerate values a step has; nil for a healthy one.
local function degenerate(out)
  local K = preset.distractors
  if out.equal:to("f32"):mean():item() == K then return "collapsed" end
  local distance = (out.each - math.log(1 + K)):abs():mean():item()
  return distance < 0.01 and "stuck" or nil
end

--- Trains a method from where it stands; returns its model and { steps, peak_mb, step_ms }, or nil where Ctrl-C came.
local function train(method)
  vx.seed(config.seed)
  local quantizer = new_quantizer(method, preset, config)
  local model = wav2vec.new(preset, quantizer)
  local optimizer = vx.optim.AdamW(model:parameters(), { betas = { 0.9, 0.99 }, weight_decay = 0 })
  quantizer.with_stats = false -- only the logged steps ask for them

  local used, meter = count_codes(quantizer), runs.meter() -- since the last log line
  local now = run:begin(method, { model = model, optimizer = optimizer, sums = { used = used, meter = meter } })
  vx.reset_peak()
  local gradients = vx.dist.gradients(model:parameters())
  local speech = open_speech("train", model, { position = now.position })
  local steps = config.steps or math.ceil(config.epochs * speech:size() / config.batch)
  if type(quantizer.options.gumbel_tau) == "table" then quantizer.options.gumbel_tau.steps = steps end
  local schedule = vx.optim.warmup_cosine { peak = preset.rate, final = preset.final,
    warmup = math.min(preset.warmup, steps / 4), total = steps }
  local log_every = math.max(1, math.floor(steps / 100))
  local named, shown = now.named or {}, "" -- named: at which step a degenerate value was said last
  local progress = run:progress(steps, now.step)

  local function train_step(waves, lengths, rate)
    local out = model(waves, lengths)
    local loss = out.loss + out.q.reg
    if preset.penalty > 0 then loss = loss + preset.penalty * out.penalty end
    optimizer:zero_grad()
    gradients:backward(loss)
    optimizer:step(rate)
    if not out.q.warming then used:add(out.q.codes) end
    meter:add { loss = loss, contrastive = out.loss, reg = out.q.reg, accuracy = out.hit:to("f32"):mean(),
      equal = out.equal:to("f32"):mean() / preset.distractors }
    return out.q.stats, degenerate(out)
  end

  for step = now.step + 1, steps do
    local log = step % log_every == 0 or step == steps
    quantizer.with_stats = log
    local stats, state = vx.step(function()
      local waves, lengths = speech:next()
      if not waves then return nil end -- interrupted
      return train_step(waves, lengths, schedule(step))
    end)
    if state then
      if step - (named[state] or -math.huge) > 10 * log_every then
        local text = NAMED[state]:format(1 + preset.distractors, math.log(1 + preset.distractors))
        run:log { step = step, event = state, text = text }
        progress:finish()
        run:say("%-15s step %d: %s", method, step, text)
      end
      named[state] = step
    end
    if stats and log then
      local m, share = meter:take(), used:share()
      used:clear()
      run:log { step = step, loss = m.loss, contrastive = m.contrastive, reg = m.reg, accuracy = m.accuracy,
        equal = m.equal, code_use = share, perplexity = stats.perplexity, max_p = stats.max_p, tau = stats.tau,
        lr = schedule(step) }
      shown = ("loss %.3f  accuracy %3.0f%%  codes %3.0f%%%s"):format(m.contrastive, 100 * m.accuracy, 100 * share,
        stats.tau and ("  tau %.3g"):format(stats.tau) or "")
    end
    local stopped = not stats or core.interrupted()
    run:save({ step = stats and step or step - 1, position = speech:position(), named = named },
      not stopped and step < steps)
    if stopped then
      progress:finish()
      return nil
    end
    local speed = (step - now.step) * config.batch / (core.time() - run.began)
    progress:update(step, ("%s  %.0f clips/s"):format(shown, speed))
  end
  local done = steps - now.step
  local cost = { steps = steps, peak_mb = vx.memory().peak / 1e6,
    step_ms = done > 0 and 1e3 * (core.time() - run.began) / done or nil }
  run:skipped(speech:broken())
  speech:close()
  progress:finish()
  return model, cost
end

-- -- Evaluation: the whole validation split, in crops one after the other ---------------------------------------------

--- The columns of a trained model, and how often it took each code; nil when interrupted. Several ranks take a part of
-- each batch, and sum.
local function judge(model, cost)
  model:eval()
  vx.seed(vx.dist.seed(config.seed)) -- of masks and distractors
  local speech = open_speech("val", model, { place = "all", shuffle = false, epochs = 1 })
  local used = count_codes(model.quantizer)
  local loss, hits, equals, frames, smoothing = 0, 0, 0, 0, nil
  repeat
    local mine = vx.step(function()
      return vx.no_grad(function()
        local waves, lengths = speech:next()
        local out = waves and model(waves, lengths)
        if not smoothing then
          local z = vx.dist.gather_rows(out and out.z or vx.empty { 0, model.quantizer.options.dim })
          smoothing = z:size(1) > 0 and vx.metrics.smoothing(model.quantizer, z) or {}
        end
        if not out then return 0 end
        loss, frames = loss + out.each:sum():item(), frames + out.each:numel()
        hits, equals = hits + out.hit:to("f32"):sum():item(), equals + out.equal:to("f32"):sum():item()
        used:add(model:codes(out.rows, out.frames))
        return waves:size(1)
      end)
    end)
  until vx.dist.sum({ mine })[1] == 0 or core.interrupted()
  speech:close()
  loss, hits, equals, frames = unpack(vx.dist.sum { loss, hits, equals, frames })
  if core.interrupted() then return nil end
  if frames == 0 then core.fail("the validation split of %s has no clip that can be used", config.data) end
  local shares, perplexity = used:shares(), used:perplexity()
  local result = { code_use_1 = shares[1], code_use_2 = shares[2], code_use = used:share(), perplexity = perplexity,
    perplexity_share = perplexity / model.quantizer.options.codes,
    accuracy = hits / frames, loss = loss / frames, equal = equals / frames / preset.distractors }
  for name, value in pairs(cost) do result[name] = value end
  for name, value in pairs(smoothing) do result[name] = value end
  return result, { code_counts = used:total() }
end

-- -- The sweep --------------------------------------------------------------------------------------------------------

if config.autocast then vx.autocast(config.autocast) end

os.exit(run:each(function(method)
  local model, cost = train(method)
  if model then return judge(model, cost) end
end), true)
