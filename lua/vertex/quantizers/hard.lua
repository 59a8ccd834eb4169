--- Hard quantization: the nearest code in the forward pass, an estimated gradient in the backward pass.
--
--   ste   straight-through [1]: y = q + z - detach(z) (Eq. 1, 2); the gradient of y reaches z unchanged
--   re    rotation trick [2]: y = detach(lambda R) z (Eq. 3, 4); the gradient is turned and scaled with z onto q
--   euclid, cosine: what nearest means; under cosine z and the codes are normalized first, and everything lives on the
--   sphere
-- Regularizer: commitment and codebook loss (Eq. 10).
--
-- [1] van den Oord et al. 2017, Neural discrete representation learning   [2] Fifty et al. 2025, Restructuring vector
-- quantization with the rotation trick

local check = require "vertex.check"
local ops = require "vertex.ops"
local registry = require "vertex.quantizers"
local tape = require "vertex.tape"

local Hard = registry.Quantizer.extend "HardQuantizer"

--- Checks beta and reduction.
-- @param options table of the method's options
-- @raise where one is not what it should be
function Hard:setup(options)
  check.number("quantizer", "beta", options.beta, 0, math.huge)
  check.choice("quantizer", "reduction", options.reduction, { "sum", "mean" })
  self.how = { metric = self.facts.metric, estimator = self.facts.estimator, beta = options.beta,
    reduction = options.reduction, codebook_grad = options.codebook_grad }
end

--- Splits reg of quantize_hard into its two losses, of which it is the sum: the commitment's gradient reaches the rows,
-- the codebook loss's the codes. options as of quantize_hard. Both have the same squares, so that nothing is summed
-- again.
local hard_terms = tape.recorded { name = "hard_terms", outputs = 2,
  forward = function(ctx, z, codebook, codes, reg, options)
    if ctx.needs then ctx.z, ctx.codebook, ctx.codes, ctx.options = z, codebook, codes, options end
    local commitment = ops.affine(reg, options.beta / (1 + options.beta), 0)
    return commitment, ops.sub(reg, commitment)
  end,
  backward = function(ctx, dcommitment, dcodebook)
    local function gradients(dreg, beta)
      local o = { metric = ctx.options.metric, estimator = "ste", beta = beta, codebook_grad = false }
      local op = { z = ctx.z, codebook = ctx.codebook:detach(), codes = ctx.codes, options = o,
        mean = ctx.options.reduction == "mean" and 1 or 0 }
      return ops.registry.quantize_hard.backward(op, nil, dreg)
    end
    return dcommitment and (gradients(dcommitment, ctx.options.beta)),
      dcodebook and select(2, gradients(dcodebook, 0)) or nil
  end,
}

--- Quantizes in training; base.lua says what comes back.
-- @param z tensor f32 (N,G,D)
-- @return table with terms commitment and codebook
function Hard:quantize(z)
  local y, reg, codes = ops.quantize_hard(z, self.codebook, self.how)
  local commitment, codebook = hard_terms(z, self.codebook, codes, reg:detach(), self.how)
  return { quantized = y, codes = codes, reg = reg, terms = { commitment = commitment, codebook = codebook } }
end

--- Gives the codes' rows, on the sphere under the metric cosine.
-- @param codes i32 (N,G), 0-based
-- @return tensor f32 (N,G,D)
function Hard:lookup(codes)
  return self:take(self.facts.metric == "cosine" and self.unit(self.codebook) or self.codebook, codes)
end

-- Appendix B.1 trains the Euclidean methods with half the learning rate and no weight decay.
local EUCLID = { rate = 0.5, weight_decay = 0 }

return {
  order = 10,
  kind = "hard",
  codebook = true,
  table1 = true,
  names = {
    { name = "ste-euclid", summary = "straight-through, Euclidean nearest code", paper = "van den Oord et al. 2017",
      metric = "euclid", estimator = "ste", optimizer = EUCLID },
    { name = "ste-cosine", summary = "straight-through on the sphere",
      paper = "van den Oord et al. 2017; Yu et al. 2022", metric = "cosine", estimator = "ste" },
    { name = "re-euclid", summary = "rotation trick, Euclidean nearest code", paper = "Fifty et al. 2025",
      metric = "euclid", estimator = "rotation", optimizer = EUCLID },
    { name = "re-cosine", summary = "rotation trick on the sphere", paper = "Fifty et al. 2025",
      metric = "cosine", estimator = "rotation" },
  },
  options = {
    { name = "beta", default = 1, meaning = "weight of the commitment loss (Eq. 10)" },
    { name = "reduction", default = "sum",
      meaning = "of the squared distances over a row: \"sum\" as printed, or \"mean\" as most code does" },
    { name = "codebook_grad", default = true,
      meaning = "ste only: the gradient of y also reaches the code, as Eq. 2 is printed; false: z + sg(q - z)" },
  },
  class = Hard,
}
