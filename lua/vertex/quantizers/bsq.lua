--- Binary spherical quantization [1]: lookup-free quantization on the sphere, so that its error is bounded.
--
--   y = x / |x|,  quantized = sign(y) / sqrt(bits), of which 0 counts as -1; bits as in lfq.lua
--   form "package"     as lfq with y and these codes, as vector-quantize-pytorch 1.32 does; the output's gradient is
--                      passed to y
--   form "group"       the authors' code: the bits fall into groups of group_size with 2^group_size codes each, and the
--                      entropies are sums over these; logarithms log(p + 1e-8)
--   form "analytical"  "group" with the rows' entropies bit by bit, of sigmoid(4 inv_temperature y / sqrt(bits))
-- In the authors' forms the entropy loss is divided by inv_temperature, the commitment is a sum over the bits, and the
-- output's gradient reaches y times 1 / sqrt(bits), since it is that of y / sqrt(bits).
--
-- [1] Zhao et al. 2024, Image and video tokenization with binary spherical quantization

local check = require "vertex.check"
local core = require "vertex.core"
local entropy = require "vertex.quantizers.entropy"
local nn = require "vertex.nn"
local ops = require "vertex.ops"

local lfq = require "vertex.quantizers.lfq"
local Lfq = lfq.class
local Bsq = nn.module("BsqQuantizer", Lfq)

local GROUP = 9 -- bits of a group, at most, where they are chosen here
local LOGS = entropy.logs.shifted(1e-8)

--- Checks the options and makes what lfq does.
-- @param o table of the method's options
-- @raise where one is not what it should be, or group_size does not divide bits
function Bsq:setup(o)
  check.choice("quantizer", "form", o.form, { "package", "group", "analytical" })
  Lfq.setup(self, o)
  self.magnitude = 1 / math.sqrt(o.bits)
  if o.form == "package" then return end
  self.gradient_scale = self.magnitude
  if o.group_size == nil then
    o.group_size = math.min(GROUP, o.bits)
    while o.bits % o.group_size ~= 0 do o.group_size = o.group_size - 1 end
  end
  check.integer("quantizer", "group_size", o.group_size, 1)
  if o.bits % o.group_size ~= 0 then
    core.fail("%s: bits %d do not divide into groups of group_size %d", self.label, o.bits, o.group_size)
  end
end

--- Gives the points whose signs are taken.
-- @param x tensor f32 (N,G,bits)
-- @return tensor f32 (N,G,bits), rows of unit length
function Bsq:points(x) return self.unit(x) end

--- Sum over the bits of the mean entropies of p = sigmoid(u) and 1 - p; u (N,bits).
local function entropy_of_bits(u)
  local p, rest = ops.sigmoid(u), ops.sigmoid(ops.affine(u, -1, 0))
  return ops.affine(ops.sum(ops.add(LOGS.h(p), LOGS.h(rest))), 1 / u:size(1), 0)
end

--- Gives the entropies of one group's points, in the authors' forms divided by inv_temperature.
-- @param y tensor f32 (N,bits)
-- @return mean entropy of the rows, entropy of the mean: scalars
function Bsq:entropies(y)
  local o = self.options
  if o.form == "package" then return Lfq.entropies(self, y) end
  local codes, rows, mean = self:all_codes(y:device(), o.group_size), nil, nil
  for first = 1, o.bits, o.group_size do
    local h, H = entropy.of(ops.narrow(y, 2, first, o.group_size), codes, 2 * o.inv_temperature, LOGS, LOGS)
    rows, mean = rows and ops.add(rows, h) or h, mean and ops.add(mean, H) or H
  end
  if o.form == "analytical" then rows = entropy_of_bits(ops.affine(y, 4 * o.inv_temperature * self.magnitude, 0)) end
  return ops.affine(rows, 1 / o.inv_temperature, 0), ops.affine(mean, 1 / o.inv_temperature, 0)
end

--- Gives the commitment before its weight.
-- @param y tensor f32 (N,G,bits)
-- @param q tensor of the codes' numbers, of y's shape
-- @return scalar: the mean over all numbers, in the authors' forms over rows alone
function Bsq:commitment(y, q)
  return self.options.form == "package" and ops.mse(y, q) or ops.affine(ops.mse(y, q), self.options.bits, 0)
end

local options = {}
for i, option in ipairs(lfq.options) do options[i] = option end
options[#options + 1] = { name = "form", default = "package",
  meaning = "of the loss and the gradient: \"package\", or the authors' \"group\" or \"analytical\"" }
options[#options + 1] = { name = "group_size",
  meaning = "bits whose entropies are taken together (group, analytical); chosen up to 9 where not given" }

return {
  order = 46,
  kind = "scalar",
  codebook = false,
  estimator = "ste",
  names = { { name = "bsq", summary = "the sign of each number on the sphere, with an entropy loss" } },
  paper = "Zhao et al. 2024",
  options = options,
  class = Bsq,
}
