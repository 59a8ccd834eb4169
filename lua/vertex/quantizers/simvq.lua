--- Codes that move together [1]: a frozen random codebook times one trained matrix, so that each step moves every code.
--
--   codebook  = frozen weight', frozen N(0, 1/D) for good; weight (D,D) a linear layer without bias, one for each group
--   quantized = the nearest code; its gradient reaches the rows alone, straight through or by the rotation trick
--   loss      mean((sg x - q)^2) + commitment mean((x - sg q)^2), means over rows and columns
-- Agrees with vector-quantize-pytorch 1.32.
--
-- [1] Zhu et al. 2024, Addressing representation collapse in vector quantized models with one linear layer

local check = require "vertex.check"
local core = require "vertex.core"
local nn = require "vertex.nn"
local ops = require "vertex.ops"
local registry = require "vertex.quantizers"

local SimVq = registry.Quantizer.extend "SimVqQuantizer"

SimVq.starts = false -- one matrix cannot put each code where a row is

--- Makes the buffer frozen (G,M,D) and the parameter weight (G x D, D), the groups' matrices one above the other.
function SimVq:make_codebook()
  local o, D = self.options, self.options.dim / self.options.groups
  self.frozen = nn.parameter({ o.groups, o.codes, D }, { "normal", o.scale / math.sqrt(D) },
    { generator = self.generator })
  self.frozen.requires_grad = false
  self.weight = nn.parameter({ o.groups * D, D }, { "uniform", 1 / math.sqrt(D) }, { generator = self.generator })
end

--- Checks the options.
-- @param options table of the method's options
-- @raise where one is not what it should be
function SimVq:setup(options)
  check.number("quantizer", "commitment", options.commitment, 0, math.huge)
  check.choice("quantizer", "estimator", options.estimator, { "ste", "rotation" })
  self.how = { metric = "euclid", estimator = options.estimator, beta = 0, reduction = "mean", codebook_grad = false }
end

--- Gives the codes as they stand.
-- @return tensor f32 (G,M,D), differentiable in weight
function SimVq:stage_codebook()
  local D = self.frozen:size(3)
  return core.autocast("f32", ops.matmul, self.frozen, ops.transpose(ops.reshape(self.weight, { -1, D, D }), 2, 3))
end

--- Quantizes in training; base.lua says what comes back.
-- @param z tensor f32 (N,G,D)
-- @return table with the terms codebook and commitment
function SimVq:quantize(z)
  local book = self:stage_codebook()
  local y, _, codes = ops.quantize_hard(z, book:detach(), self.how)
  local q = self:take(book, codes)
  return { quantized = y, codes = codes, terms = { codebook = ops.mse(z:detach(), q),
    commitment = ops.affine(ops.mse(z, q:detach()), self.options.commitment, 0) } }
end

return {
  order = 41,
  kind = "hard",
  metric = "euclid",
  estimator = "ste",
  codebook = true,
  names = { { name = "simvq", summary = "straight-through, codes that one trained matrix moves together" } },
  paper = "Zhu et al. 2024",
  options = {
    { name = "commitment", default = 0.25, meaning = "weight of mean((x - sg q)^2)" },
    { name = "estimator", default = "ste", meaning = "of the rows' gradient: \"ste\" or \"rotation\"" },
  },
  class = SimVq,
}
