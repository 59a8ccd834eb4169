--- Quantization as the addition of noise along the way to the code [1]: differentiable, without any loss of its own.
--
--   diveq     d = e - x for the nearest code e,  u = sg((d + sigma n) / |d + sigma n|) for normal n,
--             quantized = x + u |d|, so that dx = g - d^ (u.g), and the code gets d^ (u.g)
--   sf-diveq  the same to a point of the curve of lines from each code to the next (space-filling): every line i offers
--             (1 - l_i) e_i + l_i e_i+1 with l_i drawn evenly; that of the nearest is taken, and
--             quantized = x + (1 - l) u_i |d_i| + l u_i+1 |d_i+1|, so that both ends learn and none is left out.
--             Its code in training is the end that l is nearer to. Evaluation gives the nearest code, as encode and
--             decode do; the authors' inference gives the nearest point of the curve, which no code stands for.
-- The noise is absolute. The authors' code passes 1e-3 as the deviation sigma; the package vector-quantize-pytorch
-- takes a variance of 5e-3, seventy times that deviation. The default is the authors'. Evaluation gives the code.
--
-- [1] Vali et al. 2025, DiVeQ: differentiable vector quantization using the reparameterization trick

local check = require "vertex.check"
local core = require "vertex.core"
local dist = require "vertex.dist"
local ops = require "vertex.ops"
local registry = require "vertex.quantizers"

local Diveq = registry.Quantizer.extend "DiveqQuantizer"

Diveq.row_inputs = { "noise", "noise_second" }

--- Checks the options.
-- @param options table of the method's options
-- @raise where the variance is not a number of 0 or more, or a curve has no second code
function Diveq:setup(options)
  check.number("quantizer", "variance", options.variance, 0, math.huge)
  if self.facts.estimator == "space-filling" then check.integer("quantizer", "codes", options.codes, 2) end
end

--- Lengths of rows (N,G,1); a row of zeros has length 1e-12 and no gradient.
local function length(x) return ops.sqrt(ops.clamp(ops.sum(ops.square(x), 3, true), 1e-24, math.huge)) end

--- Gives the numbers of `given`, or drawn ones where it has none.
local function given_or(self, given, name, shape, draw)
  local x = given[name]
  if x == nil then return draw() end
  local count = 1
  for _, size in ipairs(shape) do count = count * size end
  if not core.is_tensor(x) or x:numel() ~= count then
    core.fail("%s: %s %s, expected (%d,%d)", self.label, name, core.is_tensor(x) and core.shape_text(x) or type(x),
      shape[1], count / shape[1])
  end
  return ops.reshape(x, shape)
end

--- The way (N,G,D) from rows to their codes: of the length between them, with noise on its direction.
local function way(self, z, codes, given, name)
  local d = ops.sub(self:lookup(codes), z)
  local noise = given_or(self, given, name, z:shape(), function()
    return ops.normal(core.new_like(z), 0, 1, dist.generator(self.generator))
  end)
  local moved = ops.add(d:detach(), ops.affine(noise, math.sqrt(self.options.variance), 0))
  return ops.mul(ops.div(moved, length(moved)), length(d))
end

--- Quantizes rows in training to a point of the lines between codes.
local function space_filling(self, z, given)
  local G, M, device = self.options.groups, self.options.codes, z:device()
  local share = given_or(self, given, "share", { G, M - 1, 1 }, function()
    return ops.uniform(core.new({ G, M - 1, 1 }, { device = device }), 0, 1, self.generator)
  end)
  local book = self:stage_codebook():detach()
  local from, to = ops.narrow(book, 2, 1, M - 1), ops.narrow(book, 2, 2, M - 1)
  local first = ops.assign(z, core.contiguous(ops.add(from, ops.mul(ops.sub(to, from), share))), "euclid")
  local second = ops.affine(first:to "f32", 1, 1):to "i32"
  local no_line = core.new({ G, 1, 1 }, { device = device }):zero() -- from the last code
  local l = self:take(ops.cat(2, share, no_line), first)
  local quantized = ops.add(z, ops.add(ops.mul(ops.affine(l, -1, 1), way(self, z, first, given, "noise")),
    ops.mul(l, way(self, z, second, given, "noise_second"))))
  local half = self:constant("half", device, function() return { 0.5 } end)
  local later = ops.reshape(ops.lt(half, l), first:shape())
  return { quantized = quantized, codes = ops.add(first:to "f32", later):to "i32", terms = {} }
end

--- Quantizes in training; base.lua says what comes back.
-- @param z tensor f32 (N,G,D)
-- @param given table; noise f32 (N, dim), normal numbers in place of drawn ones. sf-diveq: noise_second f32 (N, dim)
-- for the line's second end, and share f32 (groups, codes - 1), each line's l in place of a drawn one
-- @return table without terms
-- @raise where one of them has another shape
function Diveq:quantize(z, given)
  if self.facts.estimator == "space-filling" then return space_filling(self, z, given) end
  local codes = self:nearest(z)
  return { quantized = ops.add(z, way(self, z, codes, given, "noise")), codes = codes, terms = {} }
end

return {
  order = 43,
  kind = "hard",
  metric = "euclid",
  codebook = true,
  names = {
    { name = "diveq", summary = "a step of the code's distance along a noisy direction to it",
      estimator = "reparameterization" },
    { name = "sf-diveq", summary = "the same to a drawn point of the lines from each code to the next",
      estimator = "space-filling" },
  },
  paper = "Vali et al. 2025",
  options = {
    { name = "variance", default = 1e-6, meaning = "of the noise on the direction, in each dimension" },
  },
  class = Diveq,
}
