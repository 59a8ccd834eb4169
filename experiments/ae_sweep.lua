--- Discrete image autoencoding (Section 4.1): trains the same autoencoder with each quantizer and compares them, as the
-- paper's Table 1.
--
--   luajit experiments/ae_sweep.lua                       the methods of Table 1, on images made on the fly
--   luajit experiments/ae_sweep.lua --data DIR --preset small --methods softmax-knn-ce,ste-euclid
-- --help lists all flags, methods and presets. The model and its sizes are in autoencoder.lua beside this file.

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")

local vx = require "vertex"
local autoencoder = require "autoencoder"
local core, runs = require "vertex.core", vx.runs

-- -- What this experiment is ------------------------------------------------------------------------------------------

local function new_quantizer(method, preset, config)
  return vx.quantizer(method, runs.quantizer_options(config, autoencoder.quantizer_options(preset, config.seed)))
end

--- A row of originals, and one of reconstructions for each method.
local function draw_reconstructions(of, path)
  local rows, labels = {}, {}
  local function add(images, label)
    local row = {}
    for i = 1, images:size(1) do row[i] = images[i] end
    rows[#rows + 1], labels[#labels + 1] = row, label
  end
  vx.step(function()
    for _, method in ipairs(of.config.methods) do
      local kept = of:kept(method)
      if kept then
        if #rows == 0 then add(kept.originals, "original") end
        add(kept.reconstructions, ("%s  rMSE %.3f"):format(method, of.results[method].rmse))
      end
    end
    if #rows == 0 then return end
    vx.plot.image_grid(rows, { row_labels = labels, cell = 72, gap = 3 }):save(path)
  end)
end

local network -- an Inception V3, where --inception names its weights

local INCEPTION = { name = "inception", argname = "FILE", decides = true,
  meaning = "Weights of an Inception V3 in safetensors, torchvision's or the FID network's, for FID and IS of the "
    .. "reconstructions; README says where they come from.",
  check = function(path)
    local ok, found = pcall(vx.models.inception_v3, { file = path })
    if not ok then return "--inception " .. runs.reason(found) end
    network = found
  end }

local function percent(v) return ("%.1f%%"):format(100 * v) end

local HARD = "validation split, hard codes"

local run = runs.start({
  name = "ae_sweep", summary = "Discrete image autoencoding with many quantizers (Morita 2025, Section 4.1).",
  presets = autoencoder.presets, preset = "tiny",
  words = { data = "Folder of images, with train/ and val/ or flat; default: made on the fly.",
    batch = "Images per step.", epochs = "Passes over the images instead of steps." },
  flags = { runs.flags.graph, runs.flags.autocast, INCEPTION,
    { name = "strict", meaning = "A broken file in --data ends the run instead of being skipped." } },
  columns = {
    { name = "code_use", title = "Code use", format = percent, better = "high", from = HARD, unit = "used codes / M" },
    { name = "perplexity", title = "Perplexity", format = "%.1f", better = "high", from = HARD, unit = "codes" },
    { name = "rmse", title = "rMSE", format = "%.3f", better = "low", from = HARD, unit = "standardized" },
    { name = "psnr", title = "PSNR", format = "%.2f", better = "high", from = HARD, unit = "dB of [0,1] pixels" },
    { name = "fid_tv", title = "FID", format = "%.2f", better = "low", from = HARD .. ", --inception torchvision's" },
    { name = "is_tv", title = "IS", format = "%.2f", better = "high", from = HARD .. ", --inception torchvision's" },
    "steps", "seconds",
    { name = "code_use_256", title = "per 256 images", format = percent, better = "high", from = HARD,
      unit = "used codes / M, mean over groups of 256 images" },
    { name = "rmse_soft", title = "rMSE soft", format = "%.3f", from = "validation split, quantizers of training",
      unit = "standardized" },
    { name = "perplexity_share", title = "Perplexity / M", format = percent, better = "high", from = HARD,
      unit = "perplexity over that of even use" },
    { name = "rank_latents", title = "Rank of latents", format = "%.1f", from = HARD .. ", a run on one rank",
      unit = "effective rank, 1 to the latents' width" },
    { name = "rank_codebook", title = "Rank of codes", format = "%.1f", from = "the codebook, mean over groups",
      unit = "effective rank, 1 to the codes' width" },
    "peak_mb", "step_ms",
    "tightness", "tightness_q05", "tightness_q50", "tightness_q95", "gap", "unselected", "contested",
    { name = "fid_tf", title = "FID (TF)", format = "%.2f", better = "low", optional = true,
      from = HARD .. ", --inception the FID network's" },
    { name = "is_tf", title = "IS (TF)", format = "%.2f", better = "high", optional = true,
      from = HARD .. ", --inception the FID network's" },
    { name = "inception", title = "Inception", format = "%s", optional = true,
      from = "--inception: SHA-256 of the file, its first 16 digits" },
  },
  table = {
    title = function(c) return ("%s, %s"):format(c.preset, c.data or "procedural images") end,
    columns = { "code_use", "code_use_256", "perplexity", "rmse", "rmse_soft", "psnr", "fid_tv", "is_tv", "fid_tf",
      "is_tf", "inception", "seconds" },
    line = { "code_use", "rmse" },
    footnotes = {
      "Code use: used codes / M over the whole split (beside it the mean over groups of 256 images)."
        .. " rMSE in standardized units after hard",
      "quantization; rMSE soft: the same with the training-time quantizers. PSNR in [0,1] pixels."
        .. " FID and IS need --inception.",
    },
  },
  pictures = {
    runs.curves { { field = "mse", label = "reconstruction loss (MSE)", log = true },
      { field = "code_use", label = "code use", limits = { 0, 1.02 } } },
    runs.curves({ { field = "tau", label = "temperature τ", log = true },
      { field = "max_p", label = "largest probability, mean over rows", limits = { 0, 1.02 }, where = "tau" } },
      "softness.png"),
    { file = "reconstructions.png", draw = draw_reconstructions },
    runs.code_maps,
    runs.code_counts,
  },
  check = function(c, methods, preset)
    local files = {}
    for _, split in ipairs(c.data and { "train", "val" } or {}) do
      for _, path in ipairs((vx.data.find(c.data, split))) do files[#files + 1] = path end
    end
    vx.step(function()
      for _, method in ipairs(methods) do new_quantizer(method, preset, c) end
    end)
    return c.data and runs.fingerprint(files)
  end,
}, arg)
local config, preset = run.config, run.preset

-- -- Training one method ----------------------------------------------------------------------------------------------

local function open_images(split, options)
  options.path, options.split, options.size, options.resize = config.data, split, preset.size, preset.resize
  options.batch, options.seed, options.strict = run.batch, config.seed, run.flags.strict
  options.shard, options.shards = run.shard, run.shards -- of several ranks (vx.dist)
  return vx.data.images(options)
end

local function count_codes(quantizer) return vx.metrics.code_use(quantizer.options.codes, quantizer.columns) end

--- Trains a method from where it stands; returns its model and { steps, peak_mb, step_ms }, or nil where Ctrl-C came.
local function train(method)
  vx.seed(config.seed)
  local quantizer = new_quantizer(method, preset, config)
  local model = autoencoder.new(preset.channels, quantizer)
  local hints = quantizer.facts.optimizer -- Appendix B.1: the Euclidean methods' rate and decay differ
  local rate = preset.rate * (hints.rate or 1)
  local optimizer = vx.optim.AdamW(model:parameters(), { betas = { 0.9, 0.99 },
    weight_decay = hints.weight_decay or 1e-4 })
  quantizer.with_stats = false -- only the logged steps ask for them

  local used, meter = count_codes(quantizer), runs.meter() -- since the last log line
  local now = run:begin(method, { model = model, optimizer = optimizer, sums = { used = used, meter = meter } })
  vx.reset_peak()
  local gradients = vx.dist.gradients(model:parameters())
  local images = open_images("train", { crop = "random", flip = true, shuffle = true, epochs = 0,
    position = now.position })
  local steps = config.steps or math.ceil(config.epochs * images:size() / config.batch)
  local schedule = vx.optim.warmup_cosine { peak = rate, final = rate / 2, warmup = math.min(preset.warmup, steps / 4),
    total = steps }
  local log_every = math.max(1, math.floor(steps / 100))
  local shown = ""
  local progress = run:progress(steps, now.step)

  local function train_step(x, learning_rate)
    local y, q = model(x)
    local mse = vx.mse(y, x)
    local loss = mse + q.reg
    optimizer:zero_grad()
    gradients:backward(loss)
    optimizer:step(learning_rate)
    if not q.warming then used:add(q.codes) end
    meter:add { loss = loss, mse = mse, reg = q.reg }
    return q.stats
  end

  local take_step, release = run:recorded(train_step, quantizer.graphs)
  for step = now.step + 1, steps do
    local log = step % log_every == 0 or step == steps
    quantizer.with_stats = log
    local stats = vx.step(function()
      local x = images:next()
      if not x then return nil end -- interrupted
      return take_step(x, schedule(step), log)
    end)
    if stats and log then
      local m, share = meter:take(), used:share()
      used:clear()
      run:log { step = step, loss = m.loss, mse = m.mse, reg = m.reg, code_use = share, perplexity = stats.perplexity,
        max_p = stats.max_p, tau = stats.tau, lr = schedule(step) }
      shown = ("loss %.4f  codes %3.0f%%%s%s"):format(m.loss, 100 * share,
        stats.perplexity and ("  ppl %.0f"):format(stats.perplexity) or "",
        stats.tau and ("  tau %.3g"):format(stats.tau) or "")
    end
    local stopped = not stats or core.interrupted()
    run:save({ step = stats and step or step - 1, position = images:position() }, not stopped and step < steps)
    if stopped then
      progress:finish()
      return nil
    end
    local speed = (step - now.step) * config.batch / (core.time() - run.began)
    progress:update(step, ("%s  %.0f images/s"):format(shown, speed))
  end
  local done = steps - now.step
  local cost = { steps = steps, peak_mb = vx.memory().peak / 1e6,
    step_ms = done > 0 and 1e3 * (core.time() - run.began) / done or nil }
  run:skipped(images:broken())
  images:close()
  release()
  progress:finish()
  return model, cost
end

-- -- Evaluation: the whole validation split ---------------------------------------------------------------------------

local GROUP = 256 -- images, over which code use is measured beside that over the split

--- Rows of all ranks, as one rank would have them: image i of a round is row i / ranks of rank i % ranks.
local function in_order(rows, counts)
  if #counts == 1 then return rows end
  local order, before, most = {}, {}, 0
  for r, n in ipairs(counts) do
    before[r] = r == 1 and 0 or before[r - 1] + counts[r - 1][1]
    most = math.max(most, n[1])
  end
  for i = 0, most - 1 do
    for r, n in ipairs(counts) do
      if i < n[1] then order[#order + 1] = before[r] + i end
    end
  end
  return vx.gather(vx.dist.gather_rows(rows), vx.tensor(order, { dtype = "i32", device = rows:device() }))
end

--- The latents of a round of all ranks as rows (N,width), from those of this rank's images (B,h,w,width); nil where it
-- has none. The second result is how many images the round has, and without any the only one.
local function latents_of_round(z, width)
  local B, h, w = 0, 0, 0
  if z then B, h, w = unpack(z:shape()) end
  local counts, n = vx.dist.gather { B, h, w }, 0
  for _, count in ipairs(counts) do n, h, w = n + count[1], math.max(h, count[2]), math.max(w, count[3]) end
  if n == 0 then return nil, 0 end
  z = z and z:reshape { B, h * w * width } or vx.empty { 0, h * w * width }
  return in_order(z, counts):reshape { n * h * w, width }, n
end

--- {rmse, psnr, code_use, code_use_256, perplexity, perplexity_share, rank_latents} over the split, those of
-- vx.metrics.smoothing of its first batch; that batch, its reconstruction and its codes (B,h,w); and how often each
-- code was taken; nil when interrupted. Several ranks take a part of each batch, and sum.
local function evaluate(model)
  local images = open_images("val", { crop = "center", shuffle = false, epochs = 1 })
  local whole, part = count_codes(model.quantizer), count_codes(model.quantizer)
  local scale = vx.tensor(vx.data.std) -- turns standardized errors into those of pixels
  local width = model.quantizer.options.dim
  local latents = vx.metrics.moments(width) -- false from the first NaN on
  local squared, pixels, count, first, smoothing = 0, 0, 0, nil, nil
  local groups, sum, in_part, n = 0, 0, 0 -- n: images of a round
  repeat
    local kept
    n, kept = vx.step(function()
      return vx.no_grad(function()
        local x = images:next()
        local y, q, z
        if x then y, q, z = model(x) end
        local rows, of_round = latents_of_round(z, width)
        if not rows then return 0 end
        smoothing = smoothing or vx.metrics.smoothing(model.quantizer, rows)
        latents = latents and vx.nonfinite(rows) == 0 and latents:add(rows)
        if not x then return of_round end
        local d = y - x
        squared = squared + d:square():sum():item()
        pixels = pixels + (d * scale):square():sum():item()
        count = count + x:numel()
        whole:add(q.codes)
        part:add(q.codes)
        if first then return of_round end
        local B, h, w = unpack(z:shape())
        return of_round, { x, y, q.codes:narrow(2, 1, 1):reshape { B, h, w } } -- of the first codebook
      end)
    end)
    first = first or kept
    in_part = in_part + n
    if in_part >= GROUP or (n == 0 and groups == 0) then
      groups, sum, in_part = groups + 1, sum + part:share(), 0
      part:clear()
    end
  until n == 0 or core.interrupted()
  images:close()
  squared, pixels, count = unpack(vx.dist.sum { squared, pixels, count })
  if core.interrupted() then return nil end
  if count == 0 then core.fail("the validation split of %s has no image", config.data) end
  local perplexity = whole:perplexity()
  local result = { rmse = math.sqrt(squared / count), psnr = -10 * math.log10(pixels / count), code_use = whole:share(),
    code_use_256 = sum / groups, perplexity = perplexity, perplexity_share = perplexity / model.quantizer.options.codes,
    rank_latents = latents and latents:effective_rank() or nil }
  for name, value in pairs(smoothing) do result[name] = value end
  return result, first, whole:total()
end

--- The effective rank of a codebook (G,M,D), mean over its groups; nil where there is none, or it is not finite.
local function codebook_rank(codebook)
  if not codebook or codebook:dim() ~= 3 or codebook:size(2) < 2 then return nil end
  local sum, groups = 0, codebook:size(1)
  for g = 1, groups do
    if vx.nonfinite(codebook[g]) > 0 then return nil end
    sum = sum + vx.metrics.effective_rank(codebook[g])
  end
  return sum / groups
end

--- What the network makes of standardized images, which are rounded to bytes as if they had been saved; in float32, so
-- that figures compare.
local function inception_features(x)
  x = vx.data.to_u8(vx.data.denormalize(x)):to(vx.device())
  return vx.autocast("f32", network.features, network, x)
end

--- Calls add(features, logits) with those of of(x) for each batch x of the validation split, on every rank with those
-- of all ranks, of which each computes its part; false when interrupted.
local function over_validation(of, add)
  local images = open_images("val", { crop = "center", shuffle = false, epochs = 1 })
  local n
  repeat
    vx.step(function()
      vx.no_grad(function()
        local x = images:next()
        local features, logits
        if x then features, logits = inception_features(of(x)) end
        local counts = vx.dist.gather { x and x:size(1) or 0 }
        n = 0
        for _, count in ipairs(counts) do n = n + count[1] end
        if n == 0 then return end
        add(in_order(features or vx.empty { 0, 2048 }, counts),
          in_order(logits or vx.empty { 0, network.fc.weight:size(1) }, counts))
      end)
    end)
  until n == 0 or core.interrupted()
  images:close()
  return not core.interrupted()
end

local originals -- moments of the originals' features, the same for every method

--- FID and IS of the model's reconstructions, as columns; nil when interrupted.
local function inception_result(model)
  if not originals then
    local moments = vx.metrics.moments(2048)
    local whole = over_validation(function(x) return x end, function(features) moments:add(features) end)
    if not whole then return nil end
    originals = moments
    if moments:count() <= 2048 then
      run:say("FID over %d images is biased upwards: it wants more than its 2048 features", moments:count())
    end
  end
  local count, made = originals:count(), vx.metrics.moments(2048)
  local scores = vx.metrics.inception_scores(count, { splits = math.min(10, count) })
  local whole = over_validation(function(x) return (model(x)) end, function(features, logits)
    made:add(features)
    scores:add(logits)
  end)
  if not whole then return nil end
  local suffix = network.is_fid and "_tf" or "_tv"
  return { ["fid" .. suffix] = originals:frechet(made), ["is" .. suffix] = (scores:score()),
    inception = network.hash:sub(1, 16) }
end

--- The results of a trained model and the images for reconstructions.png; nil when interrupted.
local function judge(model, cost)
  local result, first, counts = evaluate(model:eval())
  if result and network then
    for name, value in pairs(inception_result(model) or {}) do result[name] = value end
  end
  local soft = model.quantizer.facts.kind == "smooth"
  if result and soft then -- the gap between training's soft quantizers and inference's hard ones
    model.quantizer:train()
    result.rmse_soft = (evaluate(model) or {}).rmse
  end
  if core.interrupted() then return nil end
  for name, value in pairs(cost) do result[name] = value end
  result.rank_codebook = codebook_rank(model.quantizer.codebook)
  if not first then return result end -- a rank without an image
  local n = math.min(10, first[1]:size(1))
  local function pictures(x) return vx.data.to_u8(vx.data.denormalize(x:narrow(1, 1, n))) end
  return result, { originals = pictures(first[1]), reconstructions = pictures(first[2]),
    code_maps = first[3]:narrow(1, 1, n):contiguous(), code_counts = counts }
end

-- -- The sweep --------------------------------------------------------------------------------------------------------

if config.autocast then vx.autocast(config.autocast) end

os.exit(run:each(function(method)
  local model, cost = train(method)
  if model then return judge(model, cost) end
end), true)
