--- Finite scalar quantization [1]: each number of a row is bounded and rounded to one of a few levels; no codebook, no
-- loss, and evaluation does what training does.
--
--   L levels: half = (L - 1) 1.001 / 2, offset = 0.5 for even L, else 0, shift = atanh(offset / half),
--             b = tanh(x + shift) half - offset, k = b rounded half to even, quantized k / floor(L / 2);
--             gradient (1 - tanh^2) half / floor(L / 2)
--   symmetric k = floor((L - 1) (tanh x + 1) / 2 + 0.5), quantized 2 k / (L - 1) - 1; gradient 1 - tanh^2
--   code      sum of (k + floor(L / 2)) times the product of the levels before: the first number varies fastest
-- Even levels give values from -1 to 1 - 2 / L unless `symmetric`. Rows of another width than the number of levels are
-- projected there and back by linear layers with bias. Agrees with vector-quantize-pytorch 1.32.
--
-- [1] Mentzer et al. 2024, Finite scalar quantization: VQ-VAE made simple

local check = require "vertex.check"
local core = require "vertex.core"
local nn = require "vertex.nn"
local ops = require "vertex.ops"
local registry = require "vertex.quantizers"

local Fsq = registry.Quantizer.extend "FsqQuantizer"

local DEFAULT = { 8, 5, 5, 5 }
local MOST = 8 -- levels of a number, where they are chosen here

--- Levels from MOST down whose product is `codes`; nil where there are none.
local function levels_of(codes)
  local levels, rest = {}, codes
  for L = MOST, 2, -1 do
    while rest % L == 0 and (rest == L or rest / L >= 2) do
      levels[#levels + 1], rest = L, rest / L
    end
  end
  return rest == 1 and levels or nil
end

--- Chooses the levels where they are not given, or the number of codes where that is not.
-- @param o table of the options, changed in place
-- @raise where the levels do not multiply to `codes`, or no levels of 2 to 8 do
function Fsq:complete(o)
  if o.levels == nil and o.codes == nil then o.levels = DEFAULT end
  if o.levels == nil then
    check.integer("quantizer", "codes", o.codes, 2)
    o.levels = levels_of(o.codes)
    if not o.levels then
      core.fail("%s: codes %d are no product of levels from 2 to %d; give levels", self.label, o.codes, MOST)
    end
  end
  if type(o.levels) ~= "table" or #o.levels == 0 then
    core.fail("%s: levels are %s, expected an array of integers", self.label, check.show(o.levels))
  end
  local product = 1
  for i, L in ipairs(o.levels) do
    product = product * check.integer("quantizer", ("levels[%d]"):format(i), L, 2)
  end
  if o.codes ~= nil and o.codes ~= product then
    core.fail("%s: levels %s make %d codes, the option codes is %s", self.label, table.concat(o.levels, " x "), product,
      tostring(o.codes))
  end
  o.codes = product
end

--- Makes the projections, where rows have another width than the number of levels.
-- @param o table of the method's options
function Fsq:setup(o)
  local D, n = o.dim / o.groups, #o.levels
  if D ~= n then self.project_in, self.project_out = nn.Linear(D, n), nn.Linear(n, D) end
end

--- Gives a number for each of a row's numbers.
-- @param name name of the constant
-- @param device "cpu", "cuda:0", ...: where it is needed
-- @param f function of L and of the product of the levels before, that gives the number
-- @return tensor f32 (n)
function Fsq:per_level(name, device, f)
  return self:constant(name, device, function()
    local list, before = {}, 1
    for i, L in ipairs(self.options.levels) do
      list[i] = f(L, before)
      before = before * L
    end
    return list
  end)
end

local function round(x) return x:detach():to("i32"):to "f32" end -- half to even

local function floor(x)
  local r = round(x)
  return ops.sub(r, ops.lt(x:detach(), r))
end

--- Rows (N,G,n) of bounded numbers b and their levels k from 0, both before they are scaled to -1 .. 1.
local function levels_at(self, z)
  self:refuse_nonfinite(z)
  local x, device = self.project_in and self.project_in(z) or z, z:device()
  if self.options.symmetric then
    local most = self:per_level("L - 1", device, function(L) return L - 1 end)
    local b = ops.mul(ops.affine(ops.tanh(x), 0.5, 0.5), most)
    return b, floor(ops.affine(b, 1, 0.5))
  end
  local function half(L) return (L - 1) * 1.001 / 2 end
  local function offset(L) return L % 2 == 0 and 0.5 or 0 end
  local shift = self:per_level("shift", device, function(L)
    local t = offset(L) / half(L)
    return 0.5 * math.log((1 + t) / (1 - t))
  end)
  local b = ops.sub(ops.mul(ops.tanh(ops.add(x, shift)), self:per_level("half", device, half)),
    self:per_level("offset", device, offset))
  local middle = self:per_level("middle", device, function(L) return math.floor(L / 2) end)
  return ops.add(b, middle), ops.add(round(b), middle)
end

--- Rows (N,G,D) of levels k (N,G,n), from 0.
local function rows_at(self, k)
  local device, symmetric = k:device(), self.options.symmetric
  local scale = self:per_level("scale", device, function(L)
    return symmetric and 2 / (L - 1) or 1 / math.floor(L / 2)
  end)
  local y = ops.affine(ops.mul(k, scale), 1, -1)
  return self.project_out and self.project_out(y) or y
end

--- Quantizes rows, in evaluation as in training.
-- @param z tensor f32 (N,G,D)
-- @return tensor f32 (N,G,D), with a gradient; codes i32 (N,G)
-- @raise where a row holds a NaN or Inf
function Fsq:infer(z)
  local b, k = levels_at(self, z)
  local basis = self:per_level("basis", z:device(), function(_, before) return before end)
  return rows_at(self, ops.add(b, ops.sub(k, b):detach())), ops.sum(ops.mul(k, basis), 3):to "i32"
end

--- Quantizes in training; base.lua says what comes back.
-- @param z tensor f32 (N,G,D)
-- @return table without terms
-- @raise where a row holds a NaN or Inf
function Fsq:quantize(z)
  local y, codes = self:infer(z)
  return { quantized = y, codes = codes, terms = {} }
end

--- Gives each row its code.
-- @param z tensor f32 (N,G,D)
-- @return codes i32 (N,G), 0-based
-- @raise where a row holds a NaN or Inf
function Fsq:nearest(z) return (select(2, self:infer(z))) end

--- Gives the rows that codes stand for.
-- @param codes i32 (N,G), 0-based
-- @return tensor f32 (N,G,D)
function Fsq:lookup(codes)
  local device = codes:device()
  local c = ops.reshape(codes:to "f32", { codes:size(1), codes:size(2), 1 })
  -- floor(c / basis) of whole numbers, then modulo L
  local basis = self:per_level("basis", device, function(_, before) return before end)
  local L = self:per_level("L", device, function(L) return L end)
  local function divided(x, by) return round(ops.div(ops.sub(x, ops.affine(by, 0.5, -0.5)), by)) end
  local whole = divided(c, basis)
  return rows_at(self, ops.sub(whole, ops.mul(divided(whole, L), L)))
end

return {
  order = 44,
  kind = "scalar",
  codebook = false,
  estimator = "ste",
  names = { { name = "fsq", summary = "each number bounded and rounded to one of a few levels" } },
  paper = "Mentzer et al. 2024",
  options = {
    { name = "levels",
      meaning = "array of the levels of each number, such as {8, 5, 5, 5}; chosen for `codes` where not given" },
    { name = "symmetric", default = false, meaning = "values from -1 to 1 for even levels too" },
  },
  class = Fsq,
}
