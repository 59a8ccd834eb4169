--- Vector quantization of your own vectors: fits a codebook with each method and compares them.
--
--   luajit experiments/vq_sweep.lua                                     a mixture with a known answer
--   luajit experiments/vq_sweep.lua --data features.npy --codes 1024 --methods kmeans,softmax-knn-ce,ema-euclid
--   luajit experiments/vq_sweep.lua --encode out/mine/softmax-knn-ce.safetensors --data more.npy --out codes.npy
--
-- The vectors are fixed, and read from files that may be larger than memory. Codebook and codes of each method are
-- written as .npy and safetensors. Vectors are shifted by their mean and divided by one number, their root mean square,
-- before a method sees them; errors are those of the vectors as they are, relative to their variance.

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")

local vx = require "vertex"
local core, nn, runs = require "vertex.core", vx.nn, vx.runs
local json, safetensors = require "vertex.json", require "vertex.safetensors"

local BLOCK_ROWS = 65536 -- that are encoded at once
local KMEANS = { kmeans = "k-means++", ["kmeans-random"] = "random" } -- methods of this file: where they begin

-- codes: M; k: neighbours per vertex; rate: peak learning rate. The mixture has `codes` clusters in `width` dimensions,
-- a tenth as wide as they are apart.
local presets = {
  mixture = { codes = 64, k = 8, batch = 1024, steps = 600, rate = 2e-2, rows = 16384, width = 16, spread = 0.1 },
  vectors = { codes = 256, k = 8, batch = 4096, epochs = 20, rate = 1e-2 },
}

-- -- The model: an encoder and a decoder, or none, around the quantizer -----------------------------------------------

local Mlp = nn.module "Mlp"
function Mlp:init(width) self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width) end
function Mlp:forward(x) return self.second(vx.silu(self.first(x))) end

local Model = nn.module "Model"

--- encoder: "none", "affine" (a linear layer each way) or "mlp" (two, with SiLU between).
function Model:init(width, encoder, quantizer)
  self.mean, self.scale = nn.buffer { width }, nn.buffer({ 1 }, 1)
  if encoder == "affine" then self.encoder, self.decoder = nn.Linear(width, width), nn.Linear(width, width) end
  if encoder == "mlp" then self.encoder, self.decoder = Mlp(width), Mlp(width) end
  self.quantizer = quantizer
end

function Model:normalize(x) return (x - self.mean) / self.scale end

--- Normalized vectors (B,D) → what the quantizer is given.
function Model:encode(z) return self.encoder and self.encoder(z) or z end

--- Vectors (B,D) → normalized vectors, their reconstruction, and the quantizer's output.
function Model:forward(x)
  local z = self:normalize(x)
  local q = self.quantizer(self:encode(z))
  return z, self.decoder and self.decoder(q.quantized) or q.quantized, q
end

-- -- The vectors ------------------------------------------------------------------------------------------------------

--- Rows of a Gaussian mixture in a tensor, with the methods of vx.data.vectors.
local Mixture = {}
Mixture.__index = Mixture

local function mixture(p, seed)
  local generator = vx.generator(seed + 1000)
  local options = { generator = generator }
  local centers = vx.randn({ p.codes, p.width }, options)
  local which = (vx.rand({ p.rows }, options) * p.codes - 0.5):clamp(0, p.codes - 1):to "i32"
  local noise = vx.randn({ p.rows, p.width }, options) * p.spread
  return setmetatable({ x = vx.keep(vx.gather(centers, which) + noise), n = p.rows, d = p.width }, Mixture)
end

function Mixture:size() return self.n end
function Mixture:width() return self.d end
function Mixture:read(first, count) return self.x:narrow(1, first + 1, count) end
function Mixture:take(index) return vx.gather(self.x, index:to(self.x:device())) end
--- Batches of `batch` rows, of which each of `shards` readers takes a part.
function Mixture:batches(batch, seed, position, shard, shards)
  local at, batches = position or 0, {}
  function batches.next()
    if core.interrupted() then return nil end
    local generator = vx.generator(seed)
    generator.drawn = math.floor(at / self.n)
    local order = vx.ops.permutation(self.n, generator)
    local first = at % self.n
    local take = math.min(batch, self.n - first)
    at = at + take
    take = math.floor(take / shards) -- rows that do not divide are left out
    if take == 0 then return batches.next() end
    return vx.gather(self.x, core.contiguous(core.view(order, { take }, { shards }, first + shard)))
  end
  function batches.position() return at end
  return batches
end

local function open_vectors(config, preset)
  if not config.data then return mixture(preset, config.seed) end
  return vx.data.vectors { path = config.data, tensor = config.tensor, shuffle = false }
end

--- Shuffled batches of the same vectors; several ranks (vx.dist) share each.
local function open_batches(set, run, position)
  local c = run.config
  if set.batches then return set:batches(c.batch, c.seed, position, run.shard, run.shards) end
  return vx.data.vectors { path = c.data, tensor = c.tensor, batch = run.batch, seed = c.seed, position = position,
    shard = run.shard, shards = run.shards }
end

local function each_block(set, f)
  for first = 0, set:size() - 1, BLOCK_ROWS do
    vx.step(function() f(set:read(first, math.min(BLOCK_ROWS, set:size() - first)), first) end)
  end
end

--- Mean (D) of all rows and the root mean square of what is left, which `model` keeps; sums are float64.
local function measure(set, model)
  local n, d = set:size(), set:width()
  local sum, squares = {}, 0
  for i = 1, d do sum[i] = 0 end
  each_block(set, function(x)
    for i, v in ipairs(x:mean(1):totable()) do sum[i] = sum[i] + v * x:size(1) / n end
  end)
  model.mean:fromtable(sum)
  each_block(set, function(x) squares = squares + (x - model.mean):square():sum():item() end)
  local scale = math.sqrt(squares / (n * d))
  if scale <= 0 then core.fail("the %d vectors are all equal; there is nothing to quantize", n) end
  model.scale:fill(scale)
end

-- -- Fitted codebooks -------------------------------------------------------------------------------------------------

--- Codes i32 (N, stages x groups) of all vectors, and {error, code_use, perplexity}.
local function judge(set, model, codes_of)
  local q = model.quantizer
  local used = vx.metrics.code_use(q and q.options.codes or model.codes, q and q.columns or 1)
  local all, squared, spread = nil, 0, 0
  each_block(set, function(x, first)
    vx.no_grad(function()
      local z, y, codes = codes_of(x)
      squared = squared + (y - z):square():sum():item()
      spread = spread + z:square():sum():item()
      used:add(codes)
      all = all or vx.keep(vx.empty({ set:size(), codes:size(2) }, { dtype = "i32", device = "cpu" }))
      all:narrow(1, first + 1, codes:size(1)):copy(codes)
    end)
  end)
  return all, { error = squared / spread, code_use = used:share(), perplexity = used:perplexity() }
end

--- Writes OUT/METHOD.codes.npy, METHOD.codebook.npy where there is a codebook, and METHOD.safetensors with both, the
-- model and what makes it again. The codebook is that of the vectors as they are where there is no encoder.
local function write(run, method, model, codes, codebook, about)
  local path = ("%s/%s"):format(run.out, method)
  local most = model.quantizer and model.quantizer.options.codes or model.codes
  local narrow = most <= 65536
  local tensors, meta = { codes = codes }, {}
  for name, value in pairs(about) do meta[name] = tostring(value) end
  for name, x in pairs(model:state_dict()) do tensors["model." .. name] = x end
  vx.save(path .. ".codes.npy", codes, narrow and { dtype = "u16" } or nil)
  if codebook then
    tensors.codebook = codebook
    vx.save(path .. ".codebook.npy", codebook)
  end
  safetensors.save(path .. ".safetensors", tensors, meta, { u16 = { codes = narrow or nil } })
end

local function quantizer_options(config, preset, width)
  return runs.quantizer_options(config, { dim = width, codes = config.codes or preset.codes,
    groups = config.groups or 1, k = config.k or preset.k, seed = config.seed })
end

-- -- Using a saved one: --encode FILE --data FILE --out codes.npy -----------------------------------------------------

--- Rebuilds the model of METHOD.safetensors. A k-means codebook is looked up by its nearest code.
local function restore(path)
  local tensors, meta = vx.load(path)
  if not meta.method or not meta.options then core.fail("%s was not written by vq_sweep", path) end
  local options = json.decode(meta.options)
  local width = options.dim
  local quantizer = vx.quantizer(KMEANS[meta.method] and "ste-euclid" or meta.method, options)
  local model = Model(width, meta.encoder, quantizer)
  local state = {}
  for name, x in pairs(tensors) do
    local own = name:match "^model%.(.+)$"
    if own then state[own] = x end
  end
  model:load_state_dict(state)
  return model:eval(), width
end

local function encode_program()
  local parser = require "argparse"("vq_sweep", "Codes of vectors by a codebook that vq_sweep fitted.")
  parser:option("--encode", "METHOD.safetensors of a finished run."):argname "FILE"
  parser:option("--data", "Vectors: .npy, safetensors, or a folder of .npy."):argname "FILE":count(1)
  parser:option("--tensor", "Name of a matrix in a safetensors file that holds several."):argname "NAME"
  parser:option("--out", "File for the codes, .npy."):argname "FILE":count(1)
  parser:option("--device", "cpu, cuda:0, ...; default: the GPU where one works."):argname "D"
  local args = runs.flags.read(parser)
  if args.device then vx.device(args.device) end
  if not args.out:find "%.npy$" then core.fail("--out %s: expected a name that ends in .npy", args.out) end
  local model, width = restore(args.encode)
  local set = vx.data.vectors { path = args.data, tensor = args.tensor, shuffle = false }
  if set:width() ~= width then
    core.fail("%s holds vectors of width %d, the codebook of %s is for width %d", args.data, set:width(), args.encode,
      width)
  end
  local codes, result = judge(set, model, function(x)
    local z, y, q = model(x)
    return z, y, q.codes
  end)
  vx.save(args.out, codes, model.quantizer.options.codes <= 65536 and { dtype = "u16" } or nil)
  io.stderr:write(("%d vectors, error %.4f of their variance, %.1f%% of the codes in use → %s\n"):format(set:size(),
    result.error, 100 * result.code_use, args.out))
end

for _, a in ipairs(arg) do
  if a == "--encode" or a:find "^%-%-encode=" then runs.program(encode_program) end
end

-- -- What this experiment is ------------------------------------------------------------------------------------------

local function percent(v) return ("%.1f%%"):format(100 * v) end
local integer = runs.flags.integer

local run = runs.start({
  name = "vq_sweep", summary = "Codebooks for vectors of your own, by many methods.",
  presets = presets, preset = "mixture", data_preset = "vectors",
  words = { data = "Vectors: a .npy file, a safetensors file, or a folder of .npy files; default: a mixture.",
    batch = "Vectors per step.", epochs = "Passes over the vectors instead of steps." },
  methods = { kmeans = { summary = "Lloyd's k-means, exact, from k-means++", paper = "Lloyd 1982" },
    ["kmeans-random"] = { summary = "Lloyd's k-means, exact, from random vectors", paper = "Lloyd 1982" } },
  flags = { runs.flags.graph,
    { name = "codes", argname = "M", meaning = "Codes of a codebook.", decides = true, convert = integer(1, 2 ^ 24) },
    { name = "groups", argname = "G", meaning = "Codebooks, each on its own width / G numbers; default 1.",
      decides = true, convert = integer(1, 65536) },
    { name = "k", argname = "K", meaning = "Neighbours of a vertex (KNN methods).", decides = true,
      convert = integer(1, 1e6) },
    { name = "tensor", argname = "NAME", meaning = "Matrix in a safetensors file that holds several.", decides = true },
    { name = "encoder", argname = "KIND", values = { "none", "affine", "mlp" }, default = "none", decides = true,
      meaning = "Trained around the quantizer: none, a linear layer each way, or two with SiLU between." },
    { name = "encode", argname = "FILE", meaning = "Only encode --data with METHOD.safetensors, into --out FILE.npy." },
  },
  columns = {
    { name = "error", title = "Error", format = "%.4f", better = "low", from = "all vectors, hard codes",
      unit = "of the variance" },
    { name = "code_use", title = "Code use", format = percent, better = "high", from = "all vectors",
      unit = "used codes / M" },
    { name = "perplexity", title = "Perplexity", format = "%.1f", better = "high", from = "all vectors",
      unit = "codes" },
    "tightness", "tightness_q05", "tightness_q50", "tightness_q95", "gap", "unselected", "contested",
    "steps", "seconds",
    { name = "memory", title = "Memory", format = "%.0f MB", better = "low", from = "tensors at their peak",
      unit = "MB" },
  },
  table = {
    title = function(c) return ("%s, %s"):format(c.preset, c.data or "a mixture of Gaussians") end,
    columns = { "error", "code_use", "perplexity", "tightness", "unselected", "seconds", "memory" },
    line = { "error", "code_use" },
    footnotes = { "Error: sum of |x - q(x)|^2 over that of |x - mean|^2. Memory: tensors; files are mapped.",
      "The mixture's own centers have an error of spread^2 / (1 + spread^2): about 0.0099.",
      "Methods on the sphere (cosine) code directions: without --encoder their error is that of unit vectors." },
  },
  pictures = { runs.curves { { field = "mse", label = "error of a batch", log = true },
    { field = "code_use", label = "code use", limits = { 0, 1.02 } } } },
  check = function(config, methods, preset)
    return vx.step(function()
      local set = config.data and vx.data.vectors { path = config.data, tensor = config.tensor }
      local width = set and set:width() or preset.width
      if not width then core.fail("--preset %s needs --data", config.preset) end
      local options = quantizer_options(config, preset, width)
      if options.dim % options.groups ~= 0 then
        core.fail("--groups %d does not divide the width %d of the vectors", options.groups, options.dim)
      end
      for _, method in ipairs(methods) do
        if not KMEANS[method] then vx.quantizer(method, options) end
      end
      local found = set and ("%d vectors of width %d"):format(set:size(), width)
      if set then set:close() end
      return found
    end)
  end,
}, arg)
local config, preset = run.config, run.preset
local encoder = config.encoder or "none"
local set = open_vectors(config, preset)
local width = set:width()

-- -- K-means ----------------------------------------------------------------------------------------------------------

--- The columns first+1 .. first+d of the normalized vectors, as vx.kmeans reads them.
local function slice(model, first, d)
  local function part(x) return model:normalize(x):narrow(2, first + 1, d):contiguous() end
  return {
    size = function() return set:size() end,
    width = function() return d end,
    read = function(_, at, count) return part(set:read(at, count)) end,
    take = function(_, index) return part(set:take(index)) end,
  }
end

local function fit_kmeans(method)
  local options = quantizer_options(config, preset, width)
  local G, M, d = options.groups, options.codes, width / options.groups
  local model = Model(width, "none", vx.quantizer("ste-euclid", options))
  measure(set, model)
  run:begin(method, { model = model })
  local iterations, codebooks = 0, {}
  for g = 1, G do
    local progress = run:progress(100)
    local found = vx.kmeans(slice(model, (g - 1) * d, d), M, { seed = config.seed, start = KMEANS[method],
      progress = function(iteration, moved)
        vx.dist.sum {} -- ranks do the same; here they agree on whether Ctrl-C came
        progress:update(iteration, ("moved %.3g"):format(moved))
      end })
    progress:finish()
    if core.interrupted() then return nil end
    iterations, codebooks[g] = math.max(iterations, found.iterations), found.codebook:reshape { 1, M, d }
  end
  vx.step(function() model.quantizer.codebook:copy(vx.cat(1, unpack(codebooks))) end)
  return model, iterations
end

-- -- Training one method ----------------------------------------------------------------------------------------------

local function fit(method)
  vx.seed(config.seed)
  local quantizer = vx.quantizer(method, quantizer_options(config, preset, width))
  local model = Model(width, encoder, quantizer)
  measure(set, model)
  local hints = quantizer.facts.optimizer
  local rate = preset.rate * (hints.rate or 1)
  local parameters = model:parameters()
  local optimizer = #parameters > 0 and vx.optim.AdamW(parameters, { betas = { 0.9, 0.99 }, weight_decay = 0 })
  quantizer.with_stats = false

  local used, meter = vx.metrics.code_use(quantizer.options.codes, quantizer.columns), runs.meter()
  local now = run:begin(method, { model = model, optimizer = optimizer or nil, sums = { used = used, meter = meter } })
  local batches, gradients = open_batches(set, run, now.position), vx.dist.gradients(parameters)
  local steps = config.steps or math.ceil(config.epochs * set:size() / config.batch)
  local schedule = vx.optim.warmup_cosine { peak = rate, final = rate / 100, warmup = math.min(20, steps / 10),
    total = steps }
  local log_every = math.max(1, math.floor(steps / 100))
  local progress = run:progress(steps, now.step)
  local shown = ""

  local take_step, release = run:recorded(function(x, learning_rate)
    local z, y, q = model(x)
    local mse = vx.mse(y, z)
    local loss = mse + q.reg
    if optimizer then optimizer:zero_grad() end
    gradients:backward(loss)
    if optimizer then optimizer:step(learning_rate) end
    if not q.warming then used:add(q.codes) end
    meter:add { loss = loss, mse = mse }
  end, quantizer.graphs)

  for step = now.step + 1, steps do
    local fine = vx.step(function()
      local x = batches:next()
      if not x then return false end -- interrupted
      take_step(x, schedule(step))
      return true
    end)
    if fine and (step % log_every == 0 or step == steps) then
      local m, share = meter:take(), used:share()
      used:clear()
      run:log { step = step, loss = m.loss, mse = m.mse, code_use = share, lr = schedule(step) }
      shown = ("error %.4f  codes %3.0f%%"):format(m.mse, 100 * share)
    end
    local stopped = not fine or core.interrupted()
    run:save({ step = fine and step or step - 1, position = batches:position() }, not stopped and step < steps)
    if stopped then
      progress:finish()
      return nil
    end
    progress:update(step, shown)
  end
  progress:finish()
  release()
  return model, steps
end

os.exit(run:each(function(method)
  vx.reset_peak()
  local model, steps
  if KMEANS[method] then model, steps = fit_kmeans(method) else model, steps = fit(method) end
  if not model then return nil end
  local q = model:eval().quantizer
  local codes, result = judge(set, model, function(x)
    local z, y, o = model(x)
    return z, y, o.codes
  end)
  if core.interrupted() then return nil end
  local codebook
  vx.step(function()
    if q.codebook and not model.encoder and q.stage_count == 1 then
      local shape = q.codebook:shape()
      local mean = model.mean:reshape { shape[1], 1, shape[3] }
      codebook = vx.keep(vx.no_grad(function() return q.codebook * model.scale + mean end))
    end
  end)
  local options = {}
  for name, value in pairs(q.options) do options[name] = value end
  if run.shard == 0 then
    write(run, method, model, codes, codebook, { method = method, options = json.encode(options), encoder = encoder })
  end
  result.steps, result.memory = steps, core.memory().peak / 1e6
  vx.step(function() -- of as many rows as a step of training has
    local x = set:read(0, math.min(config.batch, set:size()))
    local z = vx.no_grad(function() return model:encode(model:normalize(x)) end)
    for name, value in pairs(vx.metrics.smoothing(q, z)) do result[name] = value end
  end)
  return result
end), true)
