--- simplex/scores.lua: numbers that say how points sit on the simplex. All are differentiable, so that each can serve
-- as a regularizer. Equation numbers are those of [1].
--
-- [1] Morita 2025, Pushing Toward the Simplex Vertices

local check = require "vertex.check"
local core = require "vertex.core"
local ops = require "vertex.ops"
local points = require "vertex.simplex.points"
local fail, shape_text = core.fail, core.shape_text

local scores = {}

-- Computes exp(H(mean p)).
local function mean_perplexity(p, log)
  local mean = ops.mean(points.probabilities(p, log), 1)
  return ops.exp(ops.affine(ops.sum(ops.mul(mean, ops.log(ops.clamp(mean, points.LEAST, 1)))), -1, 0))
end

--- Computes exp(H(mean p)): how many vertices the mean of the points is spread over, from 1 to M (Eq. 11 times M).
-- @param p points, tensor f32 (N,M)
-- @param[opt] options table
-- @param[opt=false] options.log true where p holds natural logarithms
-- @return scalar tensor
-- @raise where p does not hold points
function scores.perplexity(p, options)
  local o = check.options("perplexity", options, { log = { "boolean", false } })
  return mean_perplexity(points.check("perplexity", p, o.log), o.log)
end

--- Computes the perplexity regularizer 1 - exp(H(mean p)) / M of the *-ppl quantizers. It is 0 where the mean is the
-- center, and 1 - 1/M where all points collapsed to one vertex: smaller is better. (Eq. 11 and 12; the sign as printed
-- would be minimized by collapse.)
-- @param p points, tensor f32 (N,M)
-- @param[opt] options table
-- @param[opt=false] options.log true where p holds natural logarithms
-- @return scalar tensor
-- @raise where p does not hold points
function scores.ppl(p, options)
  local o = check.options("ppl", options, { log = { "boolean", false } })
  return ops.affine(mean_perplexity(points.check("ppl", p, o.log), o.log), -1 / p:size(2), 1)
end

--- Computes the KNN regularizer of the *-knn-* quantizers (Eq. 13): the mean deviation of each vertex's K nearest
-- points from it; smaller is better. Gradients go through the deviations, not through the choice of neighbours. Ties go
-- to the lowest row.
-- @param p points, tensor f32 (N,M), N >= K
-- @param[opt] options table
-- @param[opt=8] options.k K
-- @param[opt="ce"] options.metric deviation of a point p from vertex m: "ce" for -ln p_m, "l2" for |e_m - p|^2
-- @param[opt=false] options.log true where p holds natural logarithms
-- @return scalar tensor
-- @return tensor f32 (M,K): deviations, nearest first; nats or squared distance
-- @return tensor i32 (M,K): the rows they belong to, 0-based
-- @raise where p does not hold points, k is no integer from 1 to N, or the metric is unknown
function scores.knn(p, options)
  local o = check.options("knn", options, { k = { "count", 8 }, metric = { { "ce", "l2" }, "ce" },
    log = { "boolean", false } })
  points.check("knn", p, o.log)
  if o.k > p:size(1) then fail("knn: k %d of p %s, which has %d rows", o.k, shape_text(p), p:size(1)) end
  local deviation, rows = ops.vertex_knn(p, o.k, o.metric, o.log)
  return ops.mean(deviation), deviation, rows
end

--- Computes the entropy of each point, -sum p ln p: 0 at a vertex, ln M at the center.
-- @param p points, tensor f32 (N,M)
-- @param[opt] options table
-- @param[opt=false] options.log true where p holds natural logarithms
-- @return tensor f32 (N), nats
-- @raise where p does not hold points
function scores.entropy(p, options)
  local o = check.options("entropy", options, { log = { "boolean", false } })
  points.check("entropy", p, o.log)
  return ops.affine(ops.sum(ops.mul(points.probabilities(p, o.log), points.logarithms(p, o.log)), 2), -1, 0)
end

--- Gives the largest coordinate of each point: 1 at a vertex, 1/M at the center.
-- @param p points, tensor f32 (N,M)
-- @param[opt] options table
-- @param[opt=false] options.log true where p holds natural logarithms
-- @return tensor f32 (N)
-- @raise where p does not hold points
function scores.max_p(p, options)
  local o = check.options("max_p", options, { log = { "boolean", false } })
  return ops.max(points.probabilities(points.check("max_p", p, o.log), o.log), 2)
end

--- Computes the distance |e_m - p| of each point from each vertex, at most sqrt 2. Where p_m > 1/2 the squares of the
-- other coordinates are summed without it: |p|^2 - p_m^2 would lose a distance below 3e-4.
-- @param p points, tensor f32 (N,M)
-- @param[opt] options table
-- @param[opt=false] options.log true where p holds natural logarithms
-- @return tensor f32 (N,M)
-- @raise where p does not hold points
function scores.vertex_distances(p, options)
  local o = check.options("vertex_distances", options, { log = { "boolean", false } })
  p = points.probabilities(points.check("vertex_distances", p, o.log), o.log)
  local square, small = ops.square(p), ops.le(p, core.new({ 1 }, { device = p:device() }):fill(0.5))
  -- without a coordinate above 1/2, of which there is at most one
  local others = ops.sum(ops.mul(square, small), 2, true)
  local rest = ops.sub(others, ops.mul(square, small))
  local own = ops.square(ops.affine(p, -1, 1))
  -- the coordinate above 1/2, for the others
  local above = ops.mul(ops.sum(ops.mul(square, ops.affine(small, -1, 1)), 2, true), small)
  return ops.sqrt(ops.clamp(ops.add(own, ops.add(rest, above)), 1e-30, 4))
end

return scores
