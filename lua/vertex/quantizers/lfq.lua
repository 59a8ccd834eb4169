--- Lookup-free quantization [1]: each number of a row becomes its sign; no codebook, and evaluation does what training
-- does.
--
--   quantized = sign x, of which 0 counts as -1; straight through
--   code      the signs as bits, the first number the highest
--   loss      entropy_weight (mean_n H(p_n) - diversity H(mean_n p_n)) + commitment mean((x - sg q)^2),
--             p_n = softmax(2 inv_temperature x_n . c) over all 2^bits codes c, the mean over the groups
-- The logarithms are those of vector-quantize-pytorch 1.32, log max(p, 1e-5), as long as 1 / codes is above 1e-5. From
-- 2^17 codes on that bound would cut every mean p of an even use, and its entropy would be wrong: there the logarithms
-- are exact. Rows of another width than `bits` are projected there and back by linear layers with bias.
--
-- [1] Yu et al. 2024, Language model beats diffusion: tokenizer is key to visual generation

local check = require "vertex.check"
local core = require "vertex.core"
local entropy = require "vertex.quantizers.entropy"
local nn = require "vertex.nn"
local ops = require "vertex.ops"
local registry = require "vertex.quantizers"

local Lfq = registry.Quantizer.extend "LfqQuantizer"

local MOST_BITS = 24
local LEAST = 1e-5 -- the package's bound under the logarithms

--- Gives `bits` or `codes` where one of them is missing: bits is the width of a group where both are.
-- @param o table of the options, changed in place
-- @raise where codes is no power of 2, or not 2^bits
function Lfq:complete(o)
  if o.bits == nil and o.codes ~= nil then
    check.integer("quantizer", "codes", o.codes, 2)
    local _, exponent = math.frexp(o.codes)
    o.bits = exponent - 1
    if o.codes ~= 2 ^ o.bits then core.fail("%s: codes %d are no power of 2", self.label, o.codes) end
  end
  if o.bits == nil and type(o.dim) == "number" and type(o.groups) == "number" then o.bits = o.dim / o.groups end
  check.integer("quantizer", "bits", o.bits, 1, MOST_BITS)
  if o.codes ~= nil and o.codes ~= 2 ^ o.bits then
    core.fail("%s: bits %d make %d codes, the option codes is %s", self.label, o.bits, 2 ^ o.bits, check.show(o.codes))
  end
  o.codes = 2 ^ o.bits
end

--- Checks the options and makes the projections, where rows have another width than `bits`.
-- @param o table of the method's options
-- @raise where one is not what it should be
function Lfq:setup(o)
  check.positive("quantizer", "inv_temperature", o.inv_temperature)
  check.number("quantizer", "entropy_weight", o.entropy_weight, 0, math.huge)
  check.number("quantizer", "diversity", o.diversity, 0, math.huge)
  check.number("quantizer", "commitment", o.commitment, 0, math.huge)
  self.magnitude = 1 -- of a code's numbers
  self.gradient_scale = 1 -- the output's gradient times this is y's
  self.logs = 1 / o.codes > LEAST and entropy.logs.clamped(LEAST) or entropy.exact
  local D = o.dim / o.groups
  if D ~= o.bits then self.project_in, self.project_out = nn.Linear(D, o.bits), nn.Linear(o.bits, D) end
end

--- Gives the points whose signs are taken; a class overrides it.
-- @param x tensor f32 (N,G,bits)
-- @return tensor f32 (N,G,bits)
function Lfq:points(x) return x end -- luacheck: no unused args

--- Gives the value of each bit: 2^(bits - 1) ... 1, f32 (bits).
local function places(self, device)
  local n = self.options.bits
  return self:constant("places", device, function()
    local list = {}
    for i = 1, n do list[i] = 2 ^ (n - i) end
    return list
  end)
end

--- Rows (N,G,D) of codes' numbers (N,G,bits).
local function rows_at(self, q) return self.project_out and self.project_out(q) or q end

--- Quantizes rows: y (N,G,bits) the points; q like y, the codes' numbers, without a gradient; codes i32 (N,G).
local function signs(self, z)
  self:refuse_nonfinite(z)
  local y = self:points(self.project_in and self.project_in(z) or z)
  local zero = self:constant("zero", z:device(), function() return { 0 } end)
  local bits = ops.lt(zero, y:detach())
  local codes = ops.sum(ops.mul(bits, places(self, z:device())), 3):to "i32"
  return y, ops.affine(bits, 2 * self.magnitude, -self.magnitude), codes
end

--- The output of points: their codes' numbers, through which the gradient passes to them.
local function output(self, y, q)
  return rows_at(self, ops.add(ops.affine(ops.sub(y, y:detach()), self.gradient_scale, 0), q))
end

--- Quantizes rows, in evaluation as in training.
-- @param z tensor f32 (N,G,D)
-- @return tensor f32 (N,G,D), with a gradient; codes i32 (N,G)
-- @raise where a row holds a NaN or Inf
function Lfq:infer(z)
  local y, q, codes = signs(self, z)
  return output(self, y, q), codes
end

--- Gives all codes' numbers.
-- @param device "cpu", "cuda:0", ...: where they are needed
-- @param n number of bits of a code
-- @return tensor f32 (2^n, n)
function Lfq:all_codes(device, n)
  local key = ("codes of %d bits %s"):format(n, device)
  if not self.constants[key] then
    local on = { device = device }
    local codes = core.tensor({ { -self.magnitude }, { self.magnitude } }, on)
    for i = 1, n - 1 do -- one bit more in front: 0, then 1
      local function behind(number) return ops.cat(2, core.new({ 2 ^ i, 1 }, on):fill(number), codes) end
      codes = ops.cat(1, behind(-self.magnitude), behind(self.magnitude))
    end
    self.constants[key] = core.keep(codes)
  end
  return self.constants[key]
end

--- Gives the entropies of one group's points; a class overrides it.
-- @param y tensor f32 (N,bits)
-- @return mean entropy of the rows, entropy of the mean: scalars
function Lfq:entropies(y)
  local codes = self:all_codes(y:device(), self.options.bits)
  return entropy.of(y, codes, 2 * self.options.inv_temperature, self.logs, self.logs)
end

--- Gives the commitment before its weight; a class overrides it.
-- @param y tensor f32 (N,G,bits)
-- @param q tensor of the codes' numbers, of y's shape
-- @return scalar
function Lfq:commitment(y, q) return ops.mse(y, q) end -- luacheck: no unused args

--- Quantizes in training; base.lua says what comes back.
-- @param z tensor f32 (N,G,D)
-- @return table with the terms entropy and, where they have a weight, commitment
-- @raise where a row holds a NaN or Inf
function Lfq:quantize(z)
  local o, y, q, codes = self.options, signs(self, z)
  local terms = {}
  if o.entropy_weight > 0 then
    local sum
    for g = 1, o.groups do
      local rows, mean = self:entropies(ops.select(y, 2, g))
      local loss = ops.sub(rows, ops.affine(mean, o.diversity, 0))
      sum = sum and ops.add(sum, loss) or loss
    end
    terms.entropy = ops.affine(sum, o.entropy_weight / o.groups, 0)
  end
  if o.commitment > 0 then terms.commitment = ops.affine(self:commitment(y, q), o.commitment, 0) end
  return { quantized = output(self, y, q), codes = codes, terms = terms }
end

--- Gives each row its code.
-- @param z tensor f32 (N,G,D)
-- @return codes i32 (N,G), 0-based
-- @raise where a row holds a NaN or Inf
function Lfq:nearest(z) return (select(3, signs(self, z))) end

--- Gives the rows that codes stand for.
-- @param codes i32 (N,G), 0-based
-- @return tensor f32 (N,G,D)
-- @raise where a code is not in 0 .. codes - 1
function Lfq:lookup(codes)
  return rows_at(self, ops.gather(self:all_codes(codes:device(), self.options.bits), codes))
end

return {
  order = 45,
  kind = "scalar",
  codebook = false,
  estimator = "ste",
  names = { { name = "lfq", summary = "the sign of each number, with an entropy loss over all codes" } },
  paper = "Yu et al. 2024",
  options = {
    { name = "bits", meaning = "signs of a row, log2 of codes; where neither is given, the width of a group" },
    { name = "inv_temperature", default = 100, meaning = "1 / temperature of the entropies' softmax" },
    { name = "entropy_weight", default = 0.1, meaning = "weight of the entropy loss" },
    { name = "diversity", default = 1, meaning = "gamma: share of the entropy of the mean in that loss" },
    { name = "commitment", default = 0, meaning = "weight of mean((x - sg q)^2)" },
  },
  class = Lfq,
}
