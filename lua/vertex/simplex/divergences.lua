--- simplex/divergences.lua: Kullback-Leibler divergences between distributions on the simplex, by a fitted Dirichlet
-- distribution or by the distances between points (Section 5.2 of [1]).
--
-- [1] Morita 2025, Pushing Toward the Simplex Vertices
-- [2] Perez-Cruz 2008, Kullback-Leibler divergence estimation of continuous distributions
-- [3] Ronning 1989; Minka 2000; Sklar 2014: maximum likelihood of the Dirichlet distribution

local check = require "vertex.check"
local core = require "vertex.core"
local ops = require "vertex.ops"
local points = require "vertex.simplex.points"
local fail, shape_text = core.fail, core.shape_text

local divergences = {}

--- Fits the Dirichlet distribution under which the points are most likely, by Newton's method [3] in float64. The
-- gradient is that of the maximum.
-- @param p points, tensor f32 (N,M), N at least 2; none with a coordinate 0: next to a vertex give logarithms
-- @param[opt] options table
-- @param[opt=false] options.log true where p holds natural logarithms
-- @return tensor f32 (M): the concentrations
-- @return number of Newton steps
-- @raise where p does not hold points, has one row, a coordinate 0, or rows that are all equal
function divergences.dirichlet_mle(p, options)
  local o = check.options("dirichlet_mle", options, { log = { "boolean", false } })
  points.check("dirichlet_mle", p, o.log)
  return ops.dirichlet_mle(o.log and p or ops.log(p))
end

-- Gives the number of concentrations in an array or tensor (M); nil for one number.
local function count(x)
  if core.is_tensor(x) then return x:dim() == 1 and x:size(1) or nil end
  return type(x) == "table" and #x or nil
end

--- Computes KL(Dirichlet(a) | Dirichlet(b)) = E_a ln (density of a / density of b) in closed form. Gradients reach
-- tensors.
-- @param a number or array or tensor of concentrations: tensor (M), array of M numbers, or one number for as many
-- coordinates as b has
-- @param b number or array or tensor of concentrations: likewise
-- @return scalar tensor, nats
-- @raise where both are one number, their numbers differ, or a concentration is not positive
function divergences.kl(a, b)
  local M = count(a) or count(b)
  if not M then
    fail "kl: neither a nor b says how many coordinates there are: give an array or a tensor (M) for one of them"
  end
  local device = core.is_tensor(a) and a:device() or core.is_tensor(b) and b:device() or nil
  local function tensor(x, name)
    local list = points.concentrations("kl", name, x, M)
    return core.is_tensor(x) and x or core.tensor(list, { device = device })
  end
  return ops.dirichlet_kl(tensor(a, "a"), tensor(b, "b"))
end

-- The least that a squared distance between points counts as. Equal points, as rounding makes them next to a vertex,
-- would otherwise have a logarithm of minus infinity. Below it there is no gradient.
local CLOSEST = 1e-30

--- Estimates KL(P | Q) from points of each, after Perez-Cruz [2]: d mean ln (nu / rho) + ln (N_Q / (N_P - 1)). Here rho
-- is the distance of a point of P to its k-th nearest among the other points of P, nu to its k-th nearest among those
-- of Q, and d = M - 1 the dimension of the simplex. The estimate can be below 0; its bias goes with 1 / N^(1/d).
-- Gradients go through the distances to the neighbours. The divergence is the same in any coordinates, the estimate is
-- not: space "log-ratio" measures distances between logarithms less their mean over the row (Aitchison's geometry),
-- which tells points apart that are all one next to a vertex.
-- @param p points of P, tensor f32 (N_P,M), N_P > k
-- @param q points of Q, tensor f32 (N_Q,M), N_Q >= k
-- @param[opt] options table
-- @param[opt=1] options.k k
-- @param[opt="simplex"] options.space "simplex" or "log-ratio"
-- @param[opt=false] options.log true where p and q hold natural logarithms
-- @return scalar tensor, nats
-- @raise where p or q does not hold points, they disagree on M, have too few rows for k, or the space is unknown
function divergences.perez_cruz_kl(p, q, options)
  local o = check.options("perez_cruz_kl", options, { k = { "count", 1 },
    space = { { "simplex", "log-ratio" }, "simplex" }, log = { "boolean", false } })
  points.check("perez_cruz_kl", p, o.log, "p")
  points.check("perez_cruz_kl", q, o.log, "q")
  local N, L, M = p:size(1), q:size(1), p:size(2)
  if q:size(2) ~= M then fail("perez_cruz_kl: p %s and q %s disagree on M", shape_text(p), shape_text(q)) end
  if o.k >= N or o.k > L then
    fail("perez_cruz_kl: k %d, expected less than the %d rows of p and at most the %d of q", o.k, N, L)
  end
  local function coordinates(x)
    if o.space == "simplex" then return points.probabilities(x, o.log) end
    local l = points.logarithms(x, o.log)
    return ops.sub(l, ops.mean(l, 2, true))
  end
  local x, y = coordinates(p), coordinates(q)
  local function mean_log(distance)
    return ops.mean(ops.log(ops.clamp(ops.narrow(distance, 2, o.k, 1), CLOSEST, math.huge)))
  end
  local nu, rho = mean_log((ops.knn(x, y, o.k))), mean_log((ops.knn(x, x, o.k, true)))
  return ops.affine(ops.sub(nu, rho), (M - 1) / 2, math.log(L / (N - 1)))
end

return divergences
