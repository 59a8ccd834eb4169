--- base: the class that every quantizer extends: shapes of rows and codes, statistics, training against evaluation.
--
-- A family's class is made by vx.Quantizer.extend "Name" and has
--   :setup(options)                             parameters beyond the codebook; may be left out
--   :quantize(z, given) -> y, reg, codes        in training; z (N,G,D), y like z, reg {1}, codes i32 (N,G)
--   :nearest(z) -> codes, :lookup(codes) -> y   for inference

local core = require "vertex.core"
local nn = require "vertex.nn"
local ops = require "vertex.ops"

local fail = core.fail

local Quantizer = nn.module "Quantizer"

--- Whether vx.graph can record a training step: false for a class whose quantize() waits for the device.
Quantizer.graphs = true

--- Makes a class of quantizers.
-- @param name of the class, for print
-- @return class with this one's methods, to which the family adds its own
function Quantizer.extend(name) return nn.module(name, Quantizer) end

local function integer(name, value, low)
  if type(value) ~= "number" or value ~= math.floor(value) or value < low or value > 2 ^ 31 then
    fail("quantizer: %s is %s, expected an integer of %d or more", name, tostring(value), low)
  end
end

local function number(name, value, low, open)
  if type(value) ~= "number" or value ~= value or value == math.huge or value < low or (open and value == low) then
    fail("quantizer: %s is %s, expected a number %s %g", name, tostring(value), open and "above" or "of at least", low)
  end
end
Quantizer.check = { integer = integer, number = number }

--- Makes what a family keeps beyond the codebook, and checks its options; a class overrides it. self.options and
-- self.facts (the method's entry of the registry) are there already.
-- @param options table of the family's options with their defaults
function Quantizer:setup(options) end -- luacheck: no unused args

--- facts: the method's item of the registry.
function Quantizer:init(facts, options)
  integer("dim", options.dim, 1)
  integer("codes", options.codes, 1)
  integer("groups", options.groups, 1)
  integer("seed", options.seed, 0)
  number("weight", options.weight, 0)
  number("scale", options.scale, 0, true)
  if options.dim % options.groups ~= 0 then
    fail("quantizer: dim %d does not divide into %d groups", options.dim, options.groups)
  end
  self.label, self.facts, self.options = facts.name, facts, options
  self.generator = core.generator(options.seed)
  self.steps = 0        -- training forwards so far: drives the Gumbel temperature's schedule
  self.with_stats = true
  local width = options.dim / options.groups
  self.codebook = nn.parameter({ options.groups, options.codes, width }, { "normal", options.scale / math.sqrt(width) },
    { generator = self.generator })
  self:setup(options)
end

--- Says in a line what print shows: the method, the width of rows and the number of codes.
-- @return text
function Quantizer:summary()
  local o = self.options
  return ("%s, dim %d, %s%d codes"):format(self.label, o.dim, o.groups > 1 and o.groups .. " x " or "", o.codes)
end

--- z (..., dim) as (N, G, D).
local function as_groups(self, z, what)
  if not core.is_tensor(z) then fail("%s: %s is a %s, expected a tensor", self.label, what, type(z)) end
  local o, s = self.options, z:shape()
  if #s < 1 or s[#s] ~= o.dim then
    fail("%s: %s %s should have width %d (its last size)", self.label, what, core.shape_text(z), o.dim)
  end
  if z:numel() == 0 then fail("%s: %s %s has no rows", self.label, what, core.shape_text(z)) end
  if z:dtype() ~= "f32" then fail("%s: %s is %s, expected f32", self.label, what, z:dtype()) end
  return ops.reshape(z, { -1, o.groups, o.dim / o.groups })
end

--- exp(entropy) of each row of a (G,M) tensor of probabilities, averaged over G.
local function perplexity(p)
  local h = ops.sum(ops.mul(p, ops.log(ops.clamp(p, 1e-30, 1))), 2)
  return ops.mean(ops.exp(ops.affine(h, -1, 0))):item()
end

local function batch_stats(self, codes, mean_pi, max_p)
  local M = self.options.codes
  local count = ops.count_codes(codes, M)
  local histogram = ops.affine(count:to "f32", 1 / codes:size(1), 0)
  local used = ops.mean(ops.le(core.new({ 1 }, { device = codes:device() }):fill(1), count:to "f32")):item()
  local by_code = perplexity(histogram)
  return { usage = used, code_perplexity = by_code, perplexity = mean_pi and perplexity(mean_pi) or by_code,
    tau = self.log_tau and math.exp(self.log_tau:item()) or nil, max_p = max_p and max_p:item() or 1 }
end

--- Quantizes z (..., dim). Training: {quantized (like z), reg (scalar, times weight), codes i32 (N,G), stats};
-- gradients reach z and the parameters. After eval(): the nearest codes, no noise, reg 0. given {gumbel = noise
-- (N,G,M)} fixes the Gumbel noise. stats: perplexity exp(H(mean pi)), code_perplexity exp(H(code histogram)), usage
-- (share of codes used by this batch), tau, max_p.
function Quantizer:forward(z, given)
  local rows = as_groups(self, z, "z")
  local y, reg, codes, mean_pi, max_p
  if self.training then
    core.count(self, "steps")
    y, reg, codes, mean_pi, max_p = self:quantize(rows, given or {})
    reg = ops.reshape(self.options.weight == 1 and reg or ops.affine(reg, self.options.weight, 0), {})
  else
    codes = self:nearest(rows)
    y = self:lookup(codes)
    reg = core.new({}, { device = z:device() }):zero()
  end
  local stats = self.with_stats and require("vertex.tape").no_grad(batch_stats, self, codes, mean_pi, max_p) or {}
  return { quantized = ops.reshape(y, z:shape()), reg = reg, codes = codes, stats = stats }
end

--- Codes i32 (N,G) of z (..., dim), 0-based: what a trained quantizer stores.
function Quantizer:encode(z)
  return require("vertex.tape").no_grad(function() return self:nearest(as_groups(self, z, "z")) end)
end

--- The quantized rows (N, dim) of codes i32 (N,G).
function Quantizer:decode(codes)
  local o = self.options
  if not core.is_tensor(codes) or codes:dtype() ~= "i32" or codes:dim() ~= 2 or codes:size(2) ~= o.groups then
    fail("%s: decode: codes should be an i32 tensor (N,%d), got %s", self.label, o.groups,
      core.is_tensor(codes) and codes:dtype() .. " " .. core.shape_text(codes) or type(codes))
  end
  return ops.reshape(self:lookup(codes), { codes:size(1), o.dim })
end

--- y (N,G,D) = rows of `book` (G,M,D) at codes (N,G).
function Quantizer:take(book, codes)
  local G, M, D = self.options.groups, self.options.codes, book:size(3)
  local flat = ops.reshape(book, { G * M, D })
  if G > 1 then
    local base = {}
    for g = 1, G do base[g] = (g - 1) * M end
    local offset = core.tensor(base, { device = codes:device() })
    codes = ops.add(codes:to "f32", offset):to "i32"
  end
  return ops.gather(flat, codes)
end

return Quantizer
