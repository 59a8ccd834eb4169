--- simplex/distributions.lua: Dirichlet samples and densities, and the four distributions of Figure 1 [1].
--
-- [1] Morita 2025, Pushing Toward the Simplex Vertices

local check = require "vertex.check"
local core = require "vertex.core"
local dirichlet = require "vertex.ops.dirichlet_math"
local ops = require "vertex.ops"
local points = require "vertex.simplex.points"
local tape = require "vertex.tape"
local fail, shape_text = core.fail, core.shape_text

local distributions = {}

--- Draws points from a Dirichlet distribution: gamma variables (Marsaglia and Tsang 2000) over their sum. They are held
-- as logarithms on the way, so that concentrations of 1e-3 and below still give points.
-- @param alpha number or array or tensor of concentrations: one number for all coordinates, array or tensor (M), or
-- tensor (n,M) with a row for each point
-- @param n number of points
-- @param[opt] options table
-- @param[opt=3] options.dim M, where alpha is one number
-- @param[opt=false] options.log true gives natural logarithms
-- @param[opt] options.generator source of the random stream; the default one of vx.seed
-- @param[opt] options.device the default device
-- @return tensor f32 (n,M)
-- @raise where n or dim is no positive integer, a concentration is not positive, or their number is not M
function distributions.dirichlet(alpha, n, options)
  local o = check.options("dirichlet", options, { dim = "any", log = { "boolean", false }, generator = "any",
    device = "any" })
  check.integer("dirichlet", "n", n, 1)
  if core.is_tensor(alpha) and alpha:dim() == 2 then
    if alpha:size(1) ~= n then
      fail("dirichlet: alpha %s, expected a row for each of %d points", shape_text(alpha), n)
    end
  else
    local dim = o.dim or (type(alpha) == "number" and 3) or nil
    if dim then check.integer("dirichlet", "dim", dim, 2) end
    local list = points.concentrations("dirichlet", "alpha", alpha, dim)
    alpha = type(alpha) == "number" and core.new({ dim }, { device = o.device }):fill(alpha)
      or core.tensor(list, { device = o.device })
  end
  return ops.dirichlet(core.new({ n, alpha:size(-1) }, { device = o.device }), alpha, o.log, o.generator)
end

--- Computes ln of the Dirichlet density at each point, with respect to the volume of any M-1 of the coordinates (the
-- usual density). A coordinate of 0 counts as 2^-126, so that the result is finite on the edges too. Gradients reach p,
-- and alpha where it is a tensor. The constant is computed in float64, but in float32 where alpha requires a gradient.
-- @param p points, tensor f32 (N,M)
-- @param alpha number or array or tensor of concentrations: one number for all coordinates, array or tensor (M)
-- @param[opt] options table
-- @param[opt=false] options.log true where p holds natural logarithms
-- @return tensor f32 (N), nats
-- @raise where p does not hold points, or alpha is not M positive numbers
function distributions.log_density(p, alpha, options)
  local o = check.options("log_density", options, { log = { "boolean", false } })
  points.check("log_density", p, o.log)
  local list = points.concentrations("log_density", "alpha", alpha, p:size(2))
  local a, log_beta
  if core.is_tensor(alpha) and alpha.requires_grad then
    a, log_beta = alpha, ops.sub(ops.sum(ops.lgamma(alpha)), ops.lgamma(ops.sum(alpha)))
  else
    a, log_beta = core.tensor(list, { device = p:device() }), dirichlet.log_beta(list)
  end
  return ops.sum(ops.mul(points.logarithms(p, o.log), ops.affine(a, 1, -1)), 2) - log_beta
end

-- -- The distributions of Figure 1 ------------------------------------------------------------------------------------

-- "vertices" and "collapsed": the concentration of a point's own vertex, and the sum of the M-1 others'. The mean of
-- the point's own coordinate is 30/32 for every M.
local OWN, OTHERS = 30, 2
-- "centered": every concentration. The deviation of a coordinate is about 1 / (M sqrt(20)).
local CENTERED = 20

-- Gives the number of vertices in use where the distribution is "collapsed": all but a third of M, at least one.
local function used_vertices(M) return math.max(1, math.floor(2 * M / 3)) end

-- Draws points (n,M) around `used` of the vertices, row i (0-based) around vertex i mod `used`.
local function around_vertices(n, M, used, o)
  local own, all = {}, {}
  for i = 1, n do own[i] = { (i - 1) % used } end
  for m = 1, M do all[m] = m - 1 end
  local is_own = tape.no_grad(ops.eq, core.tensor(own, { device = o.device }), core.tensor(all, { device = o.device }))
  local alpha = tape.no_grad(ops.affine, is_own, OWN - OTHERS / (M - 1), OTHERS / (M - 1))
  return distributions.dirichlet(alpha, n, { log = o.log, generator = o.generator, device = o.device })
end

local NAMED = {
  vertices = function(n, M, o) return around_vertices(n, M, M, o) end,
  uniform = function(n, _, o) return distributions.dirichlet(1, n, o) end,
  centered = function(n, _, o) return distributions.dirichlet(CENTERED, n, o) end,
  collapsed = function(n, M, o) return around_vertices(n, M, used_vertices(M), o) end,
}

--- The names of Figure 1's distributions, in its order.
distributions.names = { "vertices", "uniform", "centered", "collapsed" }

--- Draws points from one of the four distributions of Figure 1 [1].
--   vertices    around the vertices, in turn: Dirichlet with 30 at the own vertex and 2 shared by the others
--   uniform     all over the simplex: Dirichlet with 1
--   centered    around the center: Dirichlet with 20
--   collapsed   as vertices, but around the first two thirds of them only (2 of 3)
-- @param name name: one of simplex.names
-- @param n number of points
-- @param[opt] options table
-- @param[opt=3] options.dim M
-- @param[opt=false] options.log true gives natural logarithms
-- @param[opt] options.generator source of the random stream; the default one of vx.seed
-- @param[opt] options.device the default device
-- @return tensor f32 (n,M)
-- @raise where the name is unknown, or n or dim is no positive integer
function distributions.named(name, n, options)
  local o = check.options("named", options, { dim = { "any", 3 }, log = { "boolean", false }, generator = "any",
    device = "any" })
  check.name("named", "distribution", name, NAMED)
  check.integer("named", "n", n, 1)
  return NAMED[name](n, check.integer("named", "dim", o.dim, 2), o)
end

return distributions
