--- softmax-dirichlet: smoothed quantization by softmax, pulled toward the vertices as Section 5.2 considers first: the
-- closed-form divergence KL(P | Q) (Eq. 14) of the Dirichlet distribution Q that fits the rows best, from a Dirichlet
-- prior P with concentrations below 1.
--
-- What is left open there is decided so:
--   prior     all concentrations alpha = 0.5, Figure 2's first. A prior as tight as the vertices want it, alpha = 1/M
--             with E ln p = -M, gives a divergence that outweighs everything else: in 300 steps of ae_sweep's `tiny`
--             (M = 256) 6% of the codes stay in use with it, 96% with 0.5, whose points are not tight for large M
--   fit       maximum likelihood [1, 2] by Newton's method (ops.dirichlet_mle), on the N rows and one more that has the
--             prior's E ln p: there is a maximum even when all rows are one point, which is where collapse ends
--   scale     nats divided by M, so that the weight means the same for every M
-- The gradient goes through the fit by the implicit function theorem, d alpha / d mean ln p = the inverse Fisher
-- information, in which trigamma stands in the denominator: about alpha squared for small alpha, so that it does not
-- explode there as the paper fears. Holds all N x M probabilities, and their gradients, in memory: an ablation, not for
-- M in the thousands.
--
-- [1] Ronning 1989, Maximum likelihood estimation of Dirichlet distributions
-- [2] Sklar 2014, Fast MLE computation for the Dirichlet multinomial

local check = require "vertex.check"
local core = require "vertex.core"
local dirichlet = require "vertex.ops.dirichlet_math"
local nn = require "vertex.nn"
local ops = require "vertex.ops"

local Smooth = require("vertex.quantizers.smooth").class
local DirichletQuantizer = nn.module("DirichletQuantizer", Smooth)

DirichletQuantizer.graphs = false -- the fit is found on the host

--- Checks the options and makes log_tau {1}, the logarithm of the temperature.
-- @param options table of the method's options
-- @raise where one is not what it should be
function DirichletQuantizer:setup(options)
  check.integer("quantizer", "codes", options.codes, 2)
  check.positive("quantizer", "tau", options.tau)
  check.positive("quantizer", "alpha", options.alpha)
  self.prior = {}
  for m = 1, options.codes do self.prior[m] = options.alpha end
  self.log_tau = nn.parameter({ 1 }, math.log(options.tau), { no_decay = true })
end

--- Quantizes in training; base.lua says what comes back.
-- @param z tensor f32 (N,G,D)
-- @return table with the term dirichlet
function DirichletQuantizer:quantize(z)
  local on = { device = z:device() }
  local prior, expected = core.tensor(self.prior, on), core.tensor({ dirichlet.mean_log(self.prior) }, on)
  return self:quantize_with(z, "dirichlet", function(log_pi)
    local fit = ops.dirichlet_mle(ops.cat(1, log_pi, expected))
    return ops.affine(ops.dirichlet_kl(prior, fit), 1 / #self.prior, 0)
  end)
end

return {
  order = 30,
  kind = "smooth",
  metric = "cosine",
  codebook = true,
  sampler = "softmax",
  regularizer = "dirichlet",
  names = { { name = "softmax-dirichlet",
    summary = "softmax, divergence of the fitted Dirichlet distribution from a prior", ablation = true } },
  paper = "Morita 2025, Section 5.2; Ronning 1989; Sklar 2014",
  options = {
    { name = "tau", default = 0.1, meaning = "temperature at the start; learned as log_tau" },
    { name = "alpha", default = 0.5,
      meaning = "concentration of the Dirichlet prior in every coordinate (softmax-dirichlet)" },
  },
  class = DirichletQuantizer,
}
