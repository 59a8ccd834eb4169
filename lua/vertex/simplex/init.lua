--- simplex: points of the probability simplex, where smoothed quantizers live. How to draw them, how they sit, how far
-- apart the distributions are that they come from, and how a quantizer moves them while it trains.
--
--     local p = vx.simplex.named("collapsed", 300)                      -- one of the four distributions of Figure 1
--     print(vx.simplex.ppl(p), (vx.simplex.knn(p, { k = 8, metric = "ce" })))
--
-- Points are tensors p (N,M) in f32: N rows of M probabilities. Where an option `log` is true they hold natural
-- logarithms, which keep what 32 bits of p lose next to a vertex. Every number computed from the points is
-- differentiable, so that a score can serve as a regularizer: ppl, knn, dirichlet_mle, kl, perez_cruz_kl, entropy,
-- log_density. Smaller is what Figure 1 wants of ppl and knn.
--
--   distributions   samples and densities: dirichlet, named, log_density
--   scores          how points sit: perplexity, ppl, knn, entropy, max_p, vertex_distances
--   divergences     between distributions: dirichlet_mle, kl, perez_cruz_kl
--   watch           where training rows sit, step by step
--   plots           figures of points and of a watch; the axes that they draw on are plot/ternary.lua
--   points          the checks of what these functions are given
--
-- Equation and figure numbers are those of Morita 2025, Pushing Toward the Simplex Vertices.

local distributions = require "vertex.simplex.distributions"
local divergences = require "vertex.simplex.divergences"
local plots = require "vertex.simplex.plots"
local scores = require "vertex.simplex.scores"

return {
  names = distributions.names, named = distributions.named, dirichlet = distributions.dirichlet,
  log_density = distributions.log_density,
  perplexity = scores.perplexity, ppl = scores.ppl, knn = scores.knn, entropy = scores.entropy, max_p = scores.max_p,
  vertex_distances = scores.vertex_distances,
  dirichlet_mle = divergences.dirichlet_mle, kl = divergences.kl, perez_cruz_kl = divergences.perez_cruz_kl,
  watch = require "vertex.simplex.watch", plot = plots.points,
}
