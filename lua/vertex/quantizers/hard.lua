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

local core = require "vertex.core"
local ops = require "vertex.ops"
local registry = require "vertex.quantizers"

local Hard = registry.Quantizer.extend "HardQuantizer"

function Hard:setup(options)
  registry.check.number("beta", options.beta, 0)
  if options.reduction ~= "sum" and options.reduction ~= "mean" then
    core.fail("quantizer: reduction is '%s', expected sum or mean", tostring(options.reduction))
  end
  self.how = { metric = self.facts.metric, estimator = self.facts.estimator, beta = options.beta,
    reduction = options.reduction, codebook_grad = options.codebook_grad }
end

function Hard:quantize(z) return ops.quantize_hard(z, self.codebook, self.how) end

function Hard:nearest(z) return ops.assign(z, self.codebook, self.how.metric) end

function Hard:lookup(codes)
  local book = self.codebook
  if self.how.metric == "cosine" then
    local norm = ops.sqrt(ops.clamp(ops.sum(ops.square(book), 3, true), 1e-24, math.huge))
    book = ops.div(book, norm)
  end
  return self:take(book, codes)
end

-- Appendix B.1 trains the Euclidean methods with half the learning rate and no weight decay.
local EUCLID = { rate = 0.5, weight_decay = 0 }

return {
  order = 10,
  kind = "hard",
  codebook = true,
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
