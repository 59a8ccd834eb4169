--- Quantization as the addition of noise along the way to the code [1]: differentiable, without any loss of its own.
--
--   d = e - x for the nearest code e,  u = sg((d + sigma n) / |d + sigma n|) for normal n,  quantized = x + u |d|
--   so that dx = g - d^ (u.g), and the code gets d^ (u.g)
-- The noise is absolute. The authors' code passes 1e-3 as the deviation sigma; the package vector-quantize-pytorch
-- takes a variance of 5e-3, seventy times that deviation. The default is the authors'. Evaluation gives the code.
--
-- [1] Vali et al. 2025, DiVeQ: differentiable vector quantization using the reparameterization trick

local check = require "vertex.check"
local core = require "vertex.core"
local ops = require "vertex.ops"
local registry = require "vertex.quantizers"

local Diveq = registry.Quantizer.extend "DiveqQuantizer"

Diveq.row_inputs = { "noise" }

--- Checks the options.
-- @param options table of the method's options
-- @raise where the variance is not a number of 0 or more
function Diveq.setup(_, options) check.number("quantizer", "variance", options.variance, 0, math.huge) end

--- Lengths of rows (N,G,1); a row of zeros has length 1e-12 and no gradient.
local function length(x) return ops.sqrt(ops.clamp(ops.sum(ops.square(x), 3, true), 1e-24, math.huge)) end

--- Quantizes in training; base.lua says what comes back.
-- @param z tensor f32 (N,G,D)
-- @param given table; noise f32 (N, dim), normal numbers in place of drawn ones
-- @return table without terms
-- @raise where the noise has another shape
function Diveq:quantize(z, given)
  local codes, noise = self:nearest(z), given.noise
  if noise ~= nil and (not core.is_tensor(noise) or noise:numel() ~= z:numel()) then
    core.fail("%s: noise %s, expected (%d,%d)", self.label, core.is_tensor(noise) and core.shape_text(noise)
      or type(noise), z:size(1), self.options.dim)
  end
  local d = ops.sub(self:lookup(codes), z)
  noise = noise and ops.reshape(noise, z:shape()) or ops.normal(core.new_like(z), 0, 1, self.generator)
  local moved = ops.add(d:detach(), ops.affine(noise, math.sqrt(self.options.variance), 0))
  return { quantized = ops.add(z, ops.mul(ops.div(moved, length(moved)), length(d))), codes = codes, terms = {} }
end

return {
  order = 43,
  kind = "hard",
  metric = "euclid",
  estimator = "reparameterization",
  codebook = true,
  names = { { name = "diveq", summary = "a step of the code's distance along a noisy direction to it" } },
  paper = "Vali et al. 2025",
  options = {
    { name = "variance", default = 1e-6, meaning = "of the noise on the direction, in each dimension" },
  },
  class = Diveq,
}
