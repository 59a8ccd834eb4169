--- softmax-pkl: smoothed quantization by softmax, pulled toward the vertices by Perez-Cruz's estimate [1] of the
-- divergence KL(P | Q) (Eq. 14) of the rows' distribution Q from a Dirichlet prior P with concentrations below 1:
-- Section 5.2's second alternative, of which the paper's own regularizer is the case that P draws vertices only.
--
-- What is left open there is decided so:
--   prior     all concentrations alpha = 1/M, so that their sum is 1 and a point's largest coordinate is well above the
--             others for every M; as many points as the batch has rows, drawn anew each step and the same for all
--             codebooks
--   estimate  of the neighbour-th nearest row's distance in the plane of the simplex (simplex.perez_cruz_kl); the
--             gradient pulls that row to the prior's point, with 1 / distance
--   scale     nats divided by the dimension M-1, so that the weight means the same for every M
-- Holds all N x M probabilities in memory and takes O(N^2 M) time: an ablation.
--
-- [1] Perez-Cruz 2008, Kullback-Leibler divergence estimation of continuous distributions

local check = require "vertex.check"
local core = require "vertex.core"
local dist = require "vertex.dist"
local nn = require "vertex.nn"
local ops = require "vertex.ops"
local simplex = require "vertex.simplex"

local Smooth = require("vertex.quantizers.smooth").class
local PerezCruzQuantizer = nn.module("PerezCruzQuantizer", Smooth)

--- Checks the options and makes log_tau {1}, the logarithm of the temperature.
-- @param options table of the method's options
-- @raise where one is not what it should be
function PerezCruzQuantizer:setup(options)
  check.integer("quantizer", "codes", options.codes, 2)
  check.positive("quantizer", "tau", options.tau)
  check.integer("quantizer", "neighbour", options.neighbour, 1)
  options.alpha = options.alpha or 1 / options.codes
  check.positive("quantizer", "alpha", options.alpha)
  self.log_tau = nn.parameter({ 1 }, math.log(options.tau), { no_decay = true })
end

--- Quantizes in training; base.lua says what comes back.
-- @param z tensor f32 (N,G,D)
-- @param given table; prior f32 (n,M) in place of drawn points of the prior
-- @return table with the term pkl
-- @raise where z has not more rows than the option neighbour
function PerezCruzQuantizer:quantize(z, given)
  local o, prior = self.options, given.prior
  if z:size(1) <= o.neighbour then
    core.fail("%s: z has %d rows, expected more than neighbour = %d", self.label, z:size(1), o.neighbour)
  end
  if not prior then
    prior = simplex.dirichlet(o.alpha, z:size(1), { dim = o.codes, generator = dist.generator(self.generator),
      device = z:device() })
  end
  return self:quantize_with(z, "pkl", function(log_pi)
    return ops.affine(simplex.perez_cruz_kl(prior, ops.exp(log_pi), { k = o.neighbour }), 1 / (o.codes - 1), 0)
  end)
end

return {
  order = 31,
  kind = "smooth",
  metric = "cosine",
  codebook = true,
  sampler = "softmax",
  regularizer = "pkl",
  names = { { name = "softmax-pkl",
    summary = "softmax, nearest-neighbour estimate of the divergence from a Dirichlet prior", ablation = true } },
  paper = "Morita 2025, Section 5.2; Perez-Cruz 2008",
  options = {
    { name = "tau", default = 0.1, meaning = "temperature at the start; learned as log_tau" },
    { name = "alpha",
      meaning = "concentration of the Dirichlet prior in every coordinate; 1/codes where not given (softmax-pkl)" },
    { name = "neighbour", default = 1, meaning = "which nearest neighbour the distances are taken to (softmax-pkl)" },
  },
  class = PerezCruzQuantizer,
}
