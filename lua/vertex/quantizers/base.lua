--- base: the class that every quantizer extends. It brings rows, masks and codes into shape, keeps training apart from
-- evaluation, sums the losses and counts the codes; a family computes. init.lua says what a family's file returns.
--
-- A family's class is made by vx.Quantizer.extend "Name". Rows z are (N,G,D): N rows of G groups, D = dim / groups
-- wide. With S stages, codes are i32 (N, S x G), stage-major: column (s - 1) G + g, from 1, is group g's code of stage
-- s.
--   :quantize(z, given)   training: { quantized = like z, codes = i32 (N, S x G), terms = { name = scalar, ... } } and,
--                         where the family has them, reg (the sum of the terms, where an op gives it in its own bits),
--                         mean_pi (G,M) the mean probability of each code, max_p {1} the mean of the largest one
-- and, where the defaults do not do:
--   :complete(options)    options that follow from others, before they are checked
--   :make_codebook()      self.codebook (S x G, M, D), a parameter; not called where codebook = false is declared
--   :setup(options)       checks of the family's options, and what it keeps beside the codebook
--   :nearest(z, stage)    codes i32 (N,G) of one stage, for inference: the nearest by the declared metric
--   :lookup(codes, stage) rows (N,G,D) of codes i32 (N,G) of one stage: the codebook's, as stored
--   :learn(z, output)     after quantize in training, without gradients: changes of buffers (moving averages); not
--                         called once the quantizer is frozen. backward comes later: an op that needs a buffer's old
--                         values there is given a copy of it
--   :fitted(stage)        after the option start has fitted a stage's codes: what follows from them
--   .starts               false where the codes cannot be put where rows are, which the option start asks for
--   :infer(z)             rows and codes after eval(), where rows have a gradient then too
--   :quantize_apart(z, given)   quantize with the output's gradient kept from z (below)
--   .how                  options of ops.quantize_hard, where quantize is made of that
--   .row_inputs           names of what `given` may hold with a row for each row of z, to be masked as z is
--   .graphs               false where quantize waits for the device, so that vx.graph cannot record it
-- Buffers (nn.buffer) are in state_dict and in checkpoints, and not among the parameters.

local arguments = require "vertex.arguments"
local check = require "vertex.check"
local core = require "vertex.core"
local dist = require "vertex.dist"
local entropy = require "vertex.quantizers.entropy"
local nn = require "vertex.nn"
local ops = require "vertex.ops"

local fail = core.fail

local Quantizer = nn.module "Quantizer"

Quantizer.graphs = true
Quantizer.starts = true
Quantizer.plain_state = { "steps", "warmup_left", "started" }
Quantizer.row_inputs = {}

-- Codes go through float32 on their way to rows and through masks, which holds integers up to here.
local MOST_CODES = 2 ^ 24

--- Makes a class of quantizers.
-- @param name name of the class, for print
-- @return class with this one's methods, to which the family adds its own
function Quantizer.extend(name) return nn.module(name, Quantizer) end

-- -- Making one -------------------------------------------------------------------------------------------------------

--- Fills in options that follow from others; a class overrides it. Called before the common options are checked.
-- @param options table of the options with their defaults, to be changed in place
function Quantizer:complete(options) end -- luacheck: no unused args

--- Makes self.codebook, a parameter (stages x groups, codes, dim / groups) of normal numbers; a class that keeps its
-- codes elsewhere overrides it.
function Quantizer:make_codebook()
  local o, width = self.options, self.options.dim / self.options.groups
  self.codebook = nn.parameter({ self.columns, o.codes, width }, { "normal", o.scale / math.sqrt(width) },
    { generator = self.generator })
end

--- Makes what a family keeps beside the codebook, and checks its options; a class overrides it. self.options,
-- self.facts (the method's entry of the registry) and the codebook are there already.
-- @param options table of the options with their defaults
function Quantizer:setup(options) end -- luacheck: no unused args

--- Fails where the options start, warmup and rate are not what they should be, or do not suit the method.
local function check_start(self)
  local o = self.options
  check.choice("quantizer", "start", o.start, { "normal", "data", "kmeans" })
  check.integer("quantizer", "warmup", o.warmup, 0)
  check.positive("quantizer", "rate", o.rate)
  if o.start ~= "normal" and not (self.facts.codebook and self.starts) then
    fail("%s: start is '%s', but %s", self.label, o.start,
      self.facts.codebook and "its codes cannot be put where rows are" or "it has no codebook to fit")
  end
end

--- Makes a quantizer; vx.quantizer calls it.
-- @param facts table, the method's entry of the registry
-- @param options table of all its options
-- @raise where an option's value is not what it should be
function Quantizer:init(facts, options)
  self.label, self.facts, self.options = facts.name, facts, options
  self:complete(options)
  check.integer("quantizer", "dim", options.dim, 1)
  check.integer("quantizer", "codes", options.codes, 1, MOST_CODES)
  check.integer("quantizer", "groups", options.groups, 1)
  check.integer("quantizer", "seed", options.seed, 0)
  check.number("quantizer", "weight", options.weight, 0, math.huge)
  check.positive("quantizer", "scale", options.scale)
  if options.dim % options.groups ~= 0 then
    fail("quantizer: dim %d does not divide into %d groups", options.dim, options.groups)
  end
  local stages = facts.stages
  if type(stages) == "function" then stages = stages(options) end
  check.integer("quantizer", "stages", stages, 1)
  self.stage_count, self.columns = stages, stages * options.groups -- columns: codes of a row
  if facts.codebook then
    check.integer("quantizer", "stages x groups x codes", self.columns * options.codes, 1, MOST_CODES)
  end
  check_start(self)
  if facts.entropy then
    check.number("quantizer", "entropy_weight", options.entropy_weight, 0, math.huge)
    check.positive("quantizer", "entropy_temperature", options.entropy_temperature)
  end
  self.generator = core.generator(options.seed)
  self.steps = 0 -- training forwards that quantized so far: drives schedules
  self.warmup_left, self.started = options.warmup, options.start == "normal"
  self.with_stats, self.constants = true, {}
  if facts.codebook then self:make_codebook() end
  self:setup(options)
  if options.rate ~= 1 then
    self:visit(function(m)
      for _, x in m:fields() do
        if core.is_tensor(x) then x.rate = options.rate end
      end
    end)
  end
  if self.warmup_left > 0 or not self.started then self.graphs = false end -- steps differ
end

--- Says in a line what print shows: the method, the width of rows and the number of codes.
-- @return text
function Quantizer:summary()
  local o = self.options
  return ("%s, dim %d, %s%d codes"):format(self.label, o.dim, self.columns > 1 and self.columns .. " x " or "", o.codes)
end

--- Stops the training of this quantizer for good: its parameters ask for no gradient any more, and its buffers stay as
-- they are. Rows are quantized as before, in training with the sampler's noise, and their gradient stays. A checkpoint
-- does not tell of it: freeze anew after loading one.
-- @return the quantizer
function Quantizer:freeze()
  self:visit(function(m)
    rawset(m, "is_frozen", true)
    for _, x in m:fields() do
      if core.is_tensor(x) then x.requires_grad, x.grad = false, nil end
    end
  end)
  return self
end

-- -- Start ------------------------------------------------------------------------------------------------------------

--- Takes what was loaded as it is: no warm-up and no start any more. load_state_dict calls it; a checkpoint of a run
-- brings back how far both had come.
function Quantizer:loaded() self.warmup_left, self.started = 0, true end

--- Brings what follows from a stage's codes in line with them, once `start` has fitted them; a class overrides it.
-- @param stage integer from 1
function Quantizer:fitted(stage) end -- luacheck: no unused args

--- Puts the codes of all stages where rows are, as the option start says: at random rows, or by k-means. Hard methods
-- under cosine compare directions, so their rows count by these. Several ranks take the rows of all.
-- @param z tensor f32 (N,G,D), N of at least 1; fewer rows than codes: rows come again, with a little noise
-- @raise where z holds a NaN or Inf
function Quantizer:start_from(z)
  local o, facts = self.options, self.facts
  local on_sphere = facts.metric == "cosine" and facts.kind == "hard"
  local how = o.start == "data" and { start = "random", iterations = 0 } or {}
  z = dist.gather_rows(z)
  local rest = z:detach()
  for s = 1, self.stage_count do
    local rows, books = on_sphere and self.unit(rest) or rest, {}
    for g = 1, o.groups do
      how.seed = o.seed + (s - 1) * o.groups + g - 1
      local found = require "vertex.kmeans"(core.contiguous(ops.select(rows, 2, g)), o.codes, how)
      books[g] = ops.reshape(found.codebook, { 1, o.codes, rows:size(3) })
    end
    local book = o.groups == 1 and books[1] or ops.cat(1, books)
    self:stage_codebook(s):copy(on_sphere and self.unit(book) or book)
    self:fitted(s)
    if s < self.stage_count then rest = ops.sub(rest, self:lookup(self:nearest(rest, s), s)) end
  end
  if z:size(1) < o.codes and dist.rank() == 0 then
    io.stderr:write(("%s: %d rows to start %d codes from; the others start as noisy copies\n"):format(self.label,
      z:size(1), o.codes))
  end
end

-- -- Rows and masks ---------------------------------------------------------------------------------------------------

--- z (..., dim) as rows (N, dim).
local function as_rows(self, z, what)
  local o, s = self.options, z:shape()
  if #s < 1 or s[#s] ~= o.dim then
    fail("%s: %s %s should have width %d (its last size)", self.label, what, core.shape_text(z), o.dim)
  end
  if z:numel() == 0 then fail("%s: %s %s has no rows", self.label, what, core.shape_text(z)) end
  if z:dtype() ~= "f32" then fail("%s: %s is %s, expected f32", self.label, what, z:dtype()) end
  return ops.reshape(z, { -1, o.dim })
end

--- Refuses rows with a NaN or Inf, where no op of the family does. While a graph is recorded nothing is looked at,
-- since nothing may wait for the device.
-- @param z tensor f32 (N,G,D)
-- @raise where there is one; the message names the first such row
function Quantizer:refuse_nonfinite(z)
  if core.is_recording() then return end
  local bad, row = ops.nonfinite(z)
  if bad > 0 then fail("%s: row %d of z holds a NaN or Inf", self.label, math.floor(row / self.options.groups)) end
end

local function as_groups(self, rows)
  local o = self.options
  return ops.reshape(rows, { -1, o.groups, o.dim / o.groups })
end

--- Which rows count by mask, u8 of z's leading sizes: nil where all do, else {rows = i32 (n), their numbers, 0-based,
-- place = i32 (N), of each row's result among the n results followed by all N rows as they are, N = their number}.
local function select_rows(self, mask, z)
  local leading = z:shape()
  leading[#leading] = nil
  if not core.is_tensor(mask) or mask:dtype() ~= "u8" or core.shape_text(mask) ~= core.shape_text(leading) then
    fail("%s: mask %s, expected u8 %s, a number for each row of z", self.label,
      core.is_tensor(mask) and mask:dtype() .. " " .. core.shape_text(mask) or type(mask), core.shape_text(leading))
  end
  if core.is_recording() then fail("%s: a graph cannot follow a mask", self.label) end
  local N, real, place = mask:numel(), {}, {}
  local flags = ops.reshape(mask, { N }):totable()
  for i = 1, N do
    if flags[i] ~= 0 then real[#real + 1] = i - 1 end
  end
  if #real == 0 then fail("%s: mask %s leaves no row to quantize", self.label, core.shape_text(mask)) end
  if #real == N then return nil end
  local n = 0
  for i = 1, N do
    local counts = flags[i] ~= 0
    if counts then n = n + 1 end
    place[i] = counts and n - 1 or #real + i - 1
  end
  local on = { dtype = "i32", device = z:device() }
  return { rows = core.tensor(real, on), place = core.tensor(place, on), N = N }
end

--- x (N, ...) without the rows that do not count.
local function masked(x, selection)
  local s = x:shape()
  local y = ops.gather(ops.reshape(x, { s[1], -1 }), selection.rows)
  s[1] = selection.rows:numel()
  return ops.reshape(y, s)
end

--- `given` with its row inputs masked.
local function masked_inputs(self, given, selection)
  local own = {}
  for key, value in pairs(given) do own[key] = value end
  for _, key in ipairs(self.row_inputs) do
    local x = given[key]
    if core.is_tensor(x) and x:dim() > 1 and x:size(1) == selection.N then own[key] = masked(x, selection) end
  end
  return own
end

--- Codes of all rows: -1 where a row does not count.
local function codes_of_all(codes, selection)
  local none = core.new({ selection.N, codes:size(2) }, { device = codes:device() }):fill(-1)
  return ops.gather(ops.cat(1, codes:to "f32", none), selection.place):to "i32"
end

-- -- Statistics -------------------------------------------------------------------------------------------------------

--- exp(entropy) of each row of a (G,M) tensor of probabilities, averaged over G.
local function perplexity(p)
  local h = ops.sum(ops.mul(p, ops.log(ops.clamp(p, 1e-30, 1))), 2)
  return ops.mean(ops.exp(ops.affine(h, -1, 0))):item()
end

local function batch_stats(self, output)
  local codes, M = output.codes, self.options.codes
  local count = ops.count_codes(codes, M)
  local histogram = ops.affine(count:to "f32", 1 / codes:size(1), 0)
  local used = ops.mean(ops.le(core.new({ 1 }, { device = codes:device() }):fill(1), count:to "f32")):item()
  local by_code = perplexity(histogram)
  return { usage = used, code_perplexity = by_code,
    perplexity = output.mean_pi and perplexity(output.mean_pi) or by_code,
    tau = self.log_tau and math.exp(self.log_tau:item()) or nil,
    max_p = output.max_p and output.max_p:item() or 1 }
end

-- -- Forward ----------------------------------------------------------------------------------------------------------

--- The terms and their sum as scalars, times the option `weight`.
local function weighted(self, terms, reg, device)
  local weight, names, scaled = self.options.weight, {}, {}
  local function scale(x) return ops.reshape(weight == 1 and x or ops.affine(x, weight, 0), {}) end
  for name, x in pairs(terms) do
    names[#names + 1], scaled[name] = name, scale(x)
  end
  if reg then return scaled, scale(reg) end
  table.sort(names)
  for _, name in ipairs(names) do reg = reg and ops.add(reg, scaled[name]) or scaled[name] end
  return scaled, reg or core.new({}, { device = device }):zero()
end

--- A step of the warm-up: rows as they are.
local function warm_up(self, rows)
  self.warmup_left = self.warmup_left - 1
  local none = core.new({ rows:size(1), self.columns }, { device = rows:device() }):fill(-1):to "i32"
  return { quantized = rows, codes = none, terms = {}, reg = core.new({}, { device = rows:device() }):zero(),
    warming = true }
end

--- The entropy loss of hard codes, the mean over the groups: that of each row's soft assignment, of which the codes'
-- distances decide, less that of the assignments' mean. One column more makes distances of products:
-- |x - e|^2 = |x|^2 - 2 (x . e - |e|^2 / 2), and |x|^2 does not change a softmax.
local function entropy_loss(self, z)
  local o, book, sum = self.options, self:stage_codebook(), nil
  for g = 1, o.groups do
    local x, codes = ops.select(z, 2, g), ops.select(book, 1, g)
    if self.facts.metric == "cosine" then
      x, codes = self.unit(x), self.unit(codes)
    else
      x = ops.cat(2, x, core.new({ x:size(1), 1 }, { device = z:device() }):fill(1))
      codes = ops.cat(2, codes, ops.affine(ops.sum(ops.square(codes), 2, true), -0.5, 0))
    end
    local of_rows, of_mean = entropy.of(x, codes, 2 / o.entropy_temperature, entropy.exact, entropy.exact)
    local loss = ops.sub(of_rows, of_mean)
    sum = sum and ops.add(sum, loss) or loss
  end
  return ops.affine(sum, o.entropy_weight / o.groups, 0)
end

--- Quantizes in training, as the head of this file says; every family has its own.
-- @param z tensor f32 (N,G,D)
-- @param given table, as of forward
-- @return table with quantized, codes and terms
-- @raise here always
function Quantizer:quantize(z, given) -- luacheck: no unused args
  fail("%s: its class has no quantize", self.label)
end

--- Quantizes in training with all losses: quantize, and the entropy loss that hard methods share; a class overrides it
-- where its parts have theirs.
-- @param z tensor f32 (N,G,D)
-- @param given table, as of quantize
-- @return table as quantize gives it
function Quantizer:quantize_with_entropy(z, given)
  local output = self:quantize(z, given)
  if not self.facts.entropy or self.options.entropy_weight == 0 then return output end
  output.terms = output.terms or {}
  output.terms.entropy = entropy_loss(self, z)
  if output.reg then output.reg = ops.add(ops.reshape(output.reg, {}), output.terms.entropy) end
  return output
end

local function quantize_counted(self, rows, given)
  core.count(self, "steps")
  return self:quantize_with_entropy(rows, given)
end

--- Quantizes as the next step; where that is refused, no noise was drawn and no step was made.
local function step_or_nothing(self, rows, given)
  local before = {} -- { quantizer, its streams drawn, its steps }, of the stages too
  self:visit(function(m)
    if rawget(m, "generator") then before[#before + 1] = { m, m.generator.drawn, m.steps } end
  end)
  local ok, output = pcall(quantize_counted, self, rows, given)
  if ok then return output end
  for _, one in ipairs(before) do
    core.take_back(one[1].generator, "drawn", one[2])
    core.take_back(one[1], "steps", one[3])
  end
  error(output, 0)
end

local function train(self, rows, given)
  if not self.is_frozen and (self.warmup_left > 0 or not self.started) then
    if core.is_recording() then fail("%s: a graph cannot follow the options start and warmup", self.label) end
    if self.warmup_left > 0 then return warm_up(self, rows) end
    require("vertex.tape").no_grad(self.start_from, self, rows)
    self.started = true
  end
  local output = step_or_nothing(self, rows, given)
  output.terms, output.reg = weighted(self, output.terms or {}, output.reg, rows:device())
  if not self.is_frozen then require("vertex.tape").no_grad(self.learn, self, rows, output) end
  return output
end

--- Quantizes as quantize does, but the output's gradient reaches the parameters alone; the losses' reaches z too. That
-- takes one pass where quantize is ops.quantize_hard, of which the gradient to z is known; else a second one where
-- there are losses.
-- @param z tensor f32 (N,G,D)
-- @param given table, as of quantize
-- @return table as quantize gives it
function Quantizer:quantize_apart(z, given)
  local how, drawn = self.how, self.generator.drawn
  if how then
    local output = self:quantize_with_entropy(z, given)
    local y = output.quantized
    output.quantized = how.estimator == "ste" and how.codebook_grad and ops.sub(y, ops.sub(z, z:detach()))
      or y:detach()
    return output
  end
  local output = self:quantize_with_entropy(z:detach(), given)
  if next(output.terms) == nil then return output end
  self.generator.drawn = drawn -- the same noise
  local losses = self:quantize_with_entropy(z, given)
  losses.quantized = output.quantized
  return losses
end

--- Quantizes rows as inference does; a class overrides it where rows keep a gradient then.
-- @param z tensor f32 (N,G,D)
-- @return tensor f32 (N,G,D), each row's nearest code's row; codes i32 (N, stages x groups)
function Quantizer:infer(z)
  local codes = self:codes_of(z)
  return self:rows_of(codes), codes
end

local function evaluate(self, rows)
  local quantized, codes = self:infer(rows)
  return { quantized = quantized, codes = codes, terms = {}, reg = core.new({}, { device = rows:device() }):zero() }
end

--- Changes buffers after a training forward; a class overrides it.
-- @param z tensor f32 (N,G,D), the rows that count
-- @param output table that quantize gave, with terms and reg weighted
function Quantizer:learn(z, output) end -- luacheck: no unused args

--- Calls f(self, x, ...) in float32, under vx.autocast too: a family's own products are not to be rounded.
local function in_float32(f, self, x, ...)
  if not core.is_autocast() then return f(self, x, ...) end
  if core.is_tensor(x) and x:dtype() == "bf16" then x = ops.cast(x, "f32") end
  return core.autocast("f32", f, self, x, ...)
end

local function forward(self, z, given)
  local rows = as_rows(self, z, "z")
  local selection = given.mask and select_rows(self, given.mask, z)
  local counted = selection and masked(rows, selection) or rows
  if selection then given = masked_inputs(self, given, selection) end
  local output
  if self.training then
    output = train(self, as_groups(self, counted), given)
  else
    output = evaluate(self, as_groups(self, counted))
  end
  local measured = self.with_stats and not output.warming
  output.stats = measured and require("vertex.tape").no_grad(batch_stats, self, output) or {}
  local quantized, codes = output.quantized, output.codes
  if selection then
    quantized = ops.gather(ops.cat(1, ops.reshape(quantized, counted:shape()), rows), selection.place)
    codes = codes_of_all(codes, selection)
  end
  return { quantized = ops.reshape(quantized, z:shape()), reg = output.reg, terms = output.terms, codes = codes,
    stats = output.stats, warming = output.warming }
end

--- Quantizes rows. In training gradients reach z and the parameters; after eval() a row's result is its nearest code's
-- row, without noise, and reg is 0.
-- @param z tensor f32 (..., dim)
-- @param[opt] given table: mask u8 (...), rows with 0 pass through unchanged, with code -1, and count nowhere (the
-- others get the bits that they would get alone); gumbel f32 (N, groups, codes) fixes the Gumbel samplers' noise
-- @return table: quantized (like z); codes i32 (N, stages x groups), 0-based, -1 where masked, stage-major (column
-- (s - 1) groups + g is group g's code of stage s); terms {name = scalar}, each loss by name, times the option
-- `weight`; reg, a scalar, their sum; stats {perplexity = exp(H(mean pi)), code_perplexity = exp(H(code histogram)),
-- usage = share of the codes that the batch uses, tau, max_p}, numbers, empty where not self.with_stats; warming
-- = true in the steps of the option warmup: rows pass as they are, all codes are -1, and stats are empty
-- @raise where z has another width or dtype, no rows, or one with a NaN; where the mask is not u8 (...) or leaves no
-- row
function Quantizer:forward(z, given) return in_float32(forward, self, z, given or {}) end

-- -- Codes ------------------------------------------------------------------------------------------------------------

--- Gives a stage's codebook.
-- @param[opt=1] stage integer from 1
-- @return tensor f32 (groups, codes, dim / groups), a view of self.codebook
function Quantizer:stage_codebook(stage)
  if self.stage_count == 1 then return self.codebook end
  local G = self.options.groups
  return ops.narrow(self.codebook, 1, ((stage or 1) - 1) * G + 1, G)
end

--- Gives each row the codes that inference uses; a class overrides it where it declares no metric or has another rule.
-- @param z tensor f32 (N,G,D)
-- @param[opt=1] stage integer from 1
-- @return codes i32 (N,G), 0-based: the nearest of the stage's codebook by the declared metric, ties to the lowest
function Quantizer:nearest(z, stage) return ops.assign(z, self:stage_codebook(stage), self.facts.metric) end

--- Gives the rows that codes stand for; a class overrides it where they are not the codebook's as stored.
-- @param codes i32 (N,G), 0-based
-- @param[opt=1] stage integer from 1
-- @return tensor f32 (N,G,D)
function Quantizer:lookup(codes, stage) return self:take(self:stage_codebook(stage), codes) end

--- Gives a tensor of fixed numbers, made once a device, so that a graph can be recorded from the second step on. It is
-- neither a parameter nor a buffer.
-- @param name name of the constant, for the next call
-- @param device "cpu", "cuda:0", ...: where it is needed
-- @param make function that gives its numbers as nested tables, called where the tensor is not there yet
-- @return tensor f32
function Quantizer:constant(name, device, make)
  local key = name .. " " .. device
  self.constants[key] = self.constants[key] or core.keep(core.tensor(make(), { device = device }))
  return self.constants[key]
end

--- Numbers the codes of all groups in one row: group g's code c is (g - 1) M + c.
-- @param codes i32 (N,G), 0-based
-- @return i32 (N,G), 0-based
function Quantizer:flat_codes(codes)
  local G, M = self.options.groups, self.options.codes
  if G == 1 then return codes end
  local offset = self:constant("first codes", codes:device(), function()
    local first = {}
    for g = 1, G do first[g] = (g - 1) * M end
    return first
  end)
  return ops.add(codes:to "f32", offset):to "i32"
end

--- Gives rows of a codebook by group and code.
-- @param book tensor f32 (G,M,D)
-- @param codes i32 (N,G), 0-based
-- @return tensor f32 (N,G,D)
-- @raise where a code is not in 0 .. M-1
function Quantizer:take(book, codes)
  local G, M = self.options.groups, self.options.codes
  return ops.gather(ops.reshape(book, { G * M, book:size(3) }), self:flat_codes(codes))
end

--- Adds rows up by number.
-- @param rows tensor f32 (..., D)
-- @param index i32 (...), 0-based, of the sum that each row belongs to
-- @param count how many sums
-- @return tensor f32 (count, D), without a gradient
function Quantizer.row_sums(rows, index, count)
  local D = rows:size(-1)
  local sums = core.new({ count, D }, { device = rows:device() }):zero()
  core.op.scatter_add(sums, core.contiguous(ops.reshape(rows, { -1, D })), ops.reshape(index, { -1 }))
  return sums
end

--- Scales rows to unit length.
-- @param x tensor f32 (..., D)
-- @return tensor like x; a row shorter than 1e-12 is divided by that
function Quantizer.unit(x)
  return ops.div(x, ops.sqrt(ops.clamp(ops.sum(ops.square(x), x:dim(), true), 1e-24, math.huge)))
end

--- Gives the codes of rows in groups: each stage's nearest, of what the stages before it left.
-- @param z tensor f32 (N,G,D)
-- @return codes i32 (N, stages x groups), 0-based, stage-major
function Quantizer:codes_of(z)
  local S, parts, rest = self.stage_count, {}, z
  for s = 1, S do
    parts[s] = self:nearest(rest, s)
    if s < S then rest = ops.sub(rest, self:lookup(parts[s], s)) end
  end
  return S == 1 and parts[1] or ops.cat(2, parts)
end

--- Gives the rows in groups that codes stand for: the sum over the stages.
-- @param codes i32 (N, stages x groups), 0-based, stage-major
-- @return tensor f32 (N,G,D)
function Quantizer:rows_of(codes)
  local S, G, sum = self.stage_count, self.options.groups, nil
  for s = 1, S do
    local of_stage = S == 1 and codes or core.contiguous(ops.narrow(codes, 2, (s - 1) * G + 1, G))
    local y = self:lookup(of_stage, s)
    sum = sum and ops.add(sum, y) or y
  end
  return sum
end

--- Encodes rows as a trained quantizer stores them.
-- @param z tensor f32 (..., dim)
-- @return codes i32 (N, stages x groups), 0-based, stage-major, without a gradient
-- @raise as forward
function Quantizer:encode(z)
  return require("vertex.tape").no_grad(in_float32, function(_, x)
    return self:codes_of(as_groups(self, as_rows(self, x, "z")))
  end, self, z)
end

--- Decodes what encode gives.
-- @param codes i32 (N, stages x groups), 0-based, stage-major
-- @return tensor f32 (N, dim), the quantized rows
-- @raise where the codes are not i32 of that width, or one is not in 0 .. codes - 1
function Quantizer:decode(codes)
  local o = self.options
  if not core.is_tensor(codes) or codes:dtype() ~= "i32" or codes:dim() ~= 2 or codes:size(2) ~= self.columns then
    fail("%s: decode: codes should be an i32 tensor (N,%d), got %s", self.label, self.columns,
      core.is_tensor(codes) and codes:dtype() .. " " .. core.shape_text(codes) or type(codes))
  end
  if codes:numel() > 0 then -- here, for all: the next group's first code is no error to the tables below
    local least, most = ops.min(codes:to "f32"):item(), ops.max(codes:to "f32"):item()
    if least < 0 or most >= o.codes then
      fail("%s: decode: code %d is not in 0 .. %d", self.label, least < 0 and least or most, o.codes - 1)
    end
  end
  return ops.reshape(in_float32(self.rows_of, self, codes), { codes:size(1), o.dim })
end

arguments.guard_class("quantizer", Quantizer)

return Quantizer
