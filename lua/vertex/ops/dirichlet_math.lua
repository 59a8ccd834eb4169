--- ops/dirichlet_math.lua: the Dirichlet distribution in numbers, as far as they need its M concentrations and not the
-- points. Lua arrays of float64 in and out, O(M) each. ops/dirichlet.lua makes ops of this; vx.simplex is what to call
-- with points.
--
-- Letters: alpha (M) concentrations, all above 0, s their sum; psi digamma, psi' trigamma.
--
-- [1] Ronning 1989, Maximum likelihood estimation of Dirichlet distributions  [2] Minka 2000, Estimating a Dirichlet
--     distribution
-- [3] Sklar 2014, Fast MLE computation for the Dirichlet multinomial

local core = require "vertex.core"
local lgamma, digamma, trigamma = core.lgamma, core.digamma, core.trigamma

local dirichlet = {}

local function sum(x)
  local s = 0
  for i = 1, #x do s = s + x[i] end
  return s
end

--- ln of the multivariate beta function, sum ln gamma(alpha) - ln gamma(s): the density is exp(sum (alpha - 1) ln p -
-- this).
function dirichlet.log_beta(alpha)
  local y = -lgamma(sum(alpha))
  for i = 1, #alpha do y = y + lgamma(alpha[i]) end
  return y
end

--- E ln p, per coordinate: psi(alpha) - psi(s).
function dirichlet.mean_log(alpha)
  local whole, y = digamma(sum(alpha)), {}
  for i = 1, #alpha do y[i] = digamma(alpha[i]) - whole end
  return y
end

--- The Kullback-Leibler divergence of Dirichlet(b) from Dirichlet(a), E_a ln (a's density / b's), in nats.
function dirichlet.kl(a, b)
  local mean, y = dirichlet.mean_log(a), dirichlet.log_beta(b) - dirichlet.log_beta(a)
  for i = 1, #a do y = y + (a[i] - b[i]) * mean[i] end
  return y
end

--- I v, I the Fisher information diag(psi'(alpha)) - psi'(s) 1 1', which is d mean_log / d alpha.
function dirichlet.information(alpha, v)
  local y, shift = {}, trigamma(sum(alpha)) * sum(v)
  for i = 1, #alpha do y[i] = trigamma(alpha[i]) * v[i] - shift end
  return y
end

--- x of I x = v: of a diagonal and a matrix of rank one, so O(M) [1, 3].
function dirichlet.solve_information(alpha, v)
  local x, inverse, along = {}, 0, 0
  for i = 1, #alpha do
    local q = trigamma(alpha[i])
    x[i] = 1 / q
    inverse, along = inverse + x[i], along + v[i] * x[i]
  end
  local shift = along / (1 / trigamma(sum(alpha)) - inverse)
  for i = 1, #alpha do x[i] = x[i] * (v[i] + shift) end
  return x
end

-- -- Maximum likelihood -----------------------------------------------------------------------------------------------

--- About the x with digamma(x) = y: within a fifth everywhere, exact in both limits [2].
local function inverse_digamma(y) return y > -2.22 and math.exp(y) + 0.5 or 1 / (digamma(1) - y) end

--- Where Newton's method begins. At the maximum psi(alpha[i]) = psi(s) + g[i], so alpha is a function of s; the s that
-- is its sum is bracketed, by its logarithm, between where every alpha[i] is close to s and where alpha is close to s
-- exp(g).
local function start(g)
  local low, high, alpha = -30, 60, {}
  for _ = 1, 60 do
    local middle, total = (low + high) / 2, 0
    local whole = digamma(math.exp(middle))
    for i = 1, #g do
      alpha[i] = inverse_digamma(whole + g[i])
      total = total + alpha[i]
    end
    if total > math.exp(middle) then low = middle else high = middle end
  end
  return alpha
end

-- The search ends with a relative change of ENOUGH, or, where rounding ends the progress earlier (large
-- concentrations), with one of GOOD that is not half of the one before.
local ENOUGH, GOOD, STEPS = 1e-11, 1e-5, 100

--- The concentrations under which points with these means of ln p are most likely. Newton's method in O(M) a step; the
-- log-likelihood is concave, a step's length is cut to 1 / (1 + lambda) while the Newton decrement lambda is large, and
-- never leaves alpha > 0.
-- @param g array of M means of ln p over the points
-- @param[opt] rounding 1 - sum exp(g) up to which the points count as equal (1e-13); it is about 1 / (2 alpha) for
-- large alpha
-- @return array alpha; nil and the reason where there is no maximum
-- @return number of steps
function dirichlet.mle(g, rounding)
  local below = 0
  for i = 1, #g do
    if not (g[i] > -math.huge and g[i] <= 0) then
      return nil, ("the mean of ln p[%d] is %g: it must be finite, so no p may be 0"):format(i - 1, g[i])
    end
    below = below + math.exp(g[i])
  end
  -- Jensen: below <= 1, and = 1 exactly where all points are equal, which infinite concentrations suit best
  if 1 - below <= (rounding or 1e-13) then
    return nil, "the points are all equal, so the likelihood grows with the concentrations without end"
  end
  local alpha, change = start(g), math.huge
  for step = 1, STEPS do
    local mean, slope = dirichlet.mean_log(alpha), {}
    for i = 1, #g do slope[i] = g[i] - mean[i] end
    local move, decrement, length = dirichlet.solve_information(alpha, slope), 0, 1
    for i = 1, #g do decrement = decrement + slope[i] * move[i] end
    if decrement > 1 / 16 then length = 1 / (1 + math.sqrt(decrement)) end
    for i = 1, #g do
      if move[i] < 0 then length = math.min(length, -0.9 * alpha[i] / move[i]) end
    end
    local before = change
    change = 0
    for i = 1, #g do
      change = math.max(change, math.abs(length * move[i]) / alpha[i])
      alpha[i] = alpha[i] + length * move[i]
    end
    if change < ENOUGH or (change < GOOD and change > before / 2) then return alpha, step end
  end
  return nil, ("no convergence within %d steps; the last one changed a concentration by %.2g of itself"):format(STEPS,
    change)
end

return dirichlet
