--- simplex.lua: points of the probability simplex, where smoothed quantizers live: distributions to draw them from,
-- scores of how they sit, divergences between the distributions they come from, and a record of how a quantizer moves
-- them while it trains.
--
--     local p = vx.simplex.named("collapsed", 300)                      -- one of the four distributions of Figure 1
--     print(vx.simplex.ppl(p), (vx.simplex.knn(p, {k = 8, metric = "ce"})))
--
-- Points are tensors p (N,M) in f32: N rows of M probabilities. Where an option `log` is true they hold natural
-- logarithms, which keep what 32 bits of p lose next to a vertex. Everything that is a number of the points is
-- differentiable, so that a score can serve as a regularizer: ppl, knn, dirichlet_mle, kl, perez_cruz_kl, entropy,
-- log_density; smaller is what Figure 1 wants of ppl and knn.
--
-- [1] Morita 2025, Pushing Toward the Simplex Vertices (equation and figure numbers are its own)
-- [2] Perez-Cruz 2008, Kullback-Leibler divergence estimation of continuous distributions
-- [3] Ronning 1989; Minka 2000; Sklar 2014: maximum likelihood of the Dirichlet distribution, see dirichlet.lua

local core = require "vertex.core"
local dirichlet = require "vertex.ops.dirichlet_math"
local ops = require "vertex.ops"
local tape = require "vertex.tape"

local simplex = {}
local fail, shape_text = core.fail, core.shape_text

local LEAST = 2 ^ -126      -- the smallest normal float; what a probability below it counts as under a logarithm

-- -- Checks -----------------------------------------------------------------------------------------------------------

--- options with the defaults filled in; an option that `defaults` does not name is an error. NONE stands for "no
-- default".
local NONE = {}
local function chosen(name, options, defaults)
  if options ~= nil and type(options) ~= "table" then
    fail("%s: options are a %s, expected a table", name, type(options))
  end
  local o = {}
  for key, value in pairs(defaults) do
    if value ~= NONE then o[key] = value end
  end
  for key, value in pairs(options or {}) do
    if defaults[key] == nil then
      local known = {}
      for k in pairs(defaults) do known[#known + 1] = k end
      table.sort(known)
      fail("%s: unknown option '%s'; known: %s", name, tostring(key), table.concat(known, ", "))
    end
    o[key] = value
  end
  return o
end

local function whole(name, what, value, low)
  if type(value) ~= "number" or value ~= math.floor(value) or value < low or value > 2 ^ 31 then
    fail("%s: %s is %s, expected an integer of %d or more", name, what, tostring(value), low)
  end
  return value
end

-- Rows may miss the sum 1 by this: what finite differences and sums of thousands of float32 do, and far from what
-- logits do.
local SLACK = 1e-2

--- p, checked to be points (N,M) of the simplex, N >= 1 and M >= 2; while vx.graph records only the shape, since
-- looking at numbers waits for the device.
local function points(name, p, log, what)
  what = what or "p"
  if not core.is_tensor(p) then fail("%s: %s is a %s, expected a tensor (N,M)", name, what, type(p)) end
  if p:dtype() ~= "f32" or p:dim() ~= 2 or p:size(1) < 1 or p:size(2) < 2 then
    fail("%s: %s is %s %s, expected f32 (N,M), N at least 1 and M at least 2", name, what, p:dtype(), shape_text(p))
  end
  if core.is_recording() then return p end
  core.step(function()
    tape.no_grad(function()
      local x = log and ops.exp(p) or p
      local bad, first = ops.nonfinite(x)
      if bad > 0 then fail("%s: %d rows of %s hold a NaN or Inf, the first is row %d", name, bad, what, first) end
      local sums = ops.sum(x, 2)
      local low, high, least = ops.min(sums):item(), ops.max(sums):item(), ops.min(x):item()
      if least < -SLACK or low < 1 - SLACK or high > 1 + SLACK then
        fail("%s: %s %s does not hold points of the simplex%s: its rows sum to %.4g ... %.4g, its least entry is %.4g",
          name, what, shape_text(p),
          log and " by their logarithms" or "", low, high, least)
      end
    end)
  end)
  return p
end

--- Points as probabilities, or as logarithms, from whichever of the two they are.
local function probabilities(p, log) return log and ops.exp(p) or p end
local function logarithms(p, log) return log and p or ops.log(ops.clamp(p, LEAST, 1)) end

--- Concentrations, given as one number for all of `dim`, an array or a tensor (M), as an array of numbers.
local function concentrations(name, what, alpha, dim)
  local list
  if type(alpha) == "number" then
    list = {}
    for i = 1, dim or 0 do list[i] = alpha end
  elseif core.is_tensor(alpha) then
    if alpha:dim() ~= 1 then fail("%s: %s %s, expected a tensor (M)", name, what, shape_text(alpha)) end
    list = alpha:totable()
  elseif type(alpha) == "table" then
    list = alpha
  else
    fail("%s: %s is a %s, expected a number, an array of M numbers or a tensor (M)", name, what, type(alpha))
  end
  if #list < 2 then fail("%s: %s has %d concentrations, expected at least 2", name, what, #list) end
  if dim and #list ~= dim then fail("%s: %s has %d concentrations, expected %d", name, what, #list, dim) end
  for i, v in ipairs(list) do
    if type(v) ~= "number" or not (v > 0 and v < math.huge) then
      fail("%s: concentration %d of %s is %s, expected a positive finite number", name, i - 1, what, tostring(v))
    end
  end
  return list
end

-- -- Distributions ----------------------------------------------------------------------------------------------------

--- n points drawn from a Dirichlet distribution: gamma variables (Marsaglia and Tsang 2000) over their sum, held as
-- logarithms on the way, so that concentrations of 1e-3 and below still give points.
-- @param alpha one concentration for all coordinates, an array or tensor (M), or a tensor (n,M) with a row for each
-- point
-- @param n number of points
-- @param[opt] options {dim = 3: M where alpha is one number, log = false: give logarithms, generator = the default one,
-- device}
-- @return tensor (n,M)
function simplex.dirichlet(alpha, n, options)
  local o = chosen("dirichlet", options, { dim = NONE, log = false, generator = NONE, device = NONE })
  whole("dirichlet", "n", n, 1)
  if core.is_tensor(alpha) and alpha:dim() == 2 then
    if alpha:size(1) ~= n then
      fail("dirichlet: alpha %s, expected a row for each of %d points", shape_text(alpha), n)
    end
  else
    local dim = o.dim or (type(alpha) == "number" and 3) or nil
    if dim then whole("dirichlet", "dim", dim, 2) end
    local list = concentrations("dirichlet", "alpha", alpha, dim)
    alpha = type(alpha) == "number" and core.new({ dim }, { device = o.device }):fill(alpha)
      or core.tensor(list, { device = o.device })
  end
  return ops.dirichlet(core.new({ n, alpha:size(-1) }, { device = o.device }), alpha, o.log, o.generator)
end

--- ln of the Dirichlet density at each point, with respect to the volume of any M-1 of the coordinates (the usual
-- density). A coordinate of 0 counts as 2^-126, so that the result is finite on the edges too. Float32 throughout where
-- alpha requires a gradient; otherwise the constant is computed in float64.
-- @param p points (N,M)
-- @param alpha one number, an array or a tensor (M)
-- @param[opt] options {log = false: p holds logarithms}
-- @return tensor (N), nats
function simplex.log_density(p, alpha, options)
  local o = chosen("log_density", options, { log = false })
  points("log_density", p, o.log)
  local list = concentrations("log_density", "alpha", alpha, p:size(2))
  local a, log_beta
  if core.is_tensor(alpha) and alpha.requires_grad then
    a, log_beta = alpha, ops.sub(ops.sum(ops.lgamma(alpha)), ops.lgamma(ops.sum(alpha)))
  else
    a, log_beta = core.tensor(list, { device = p:device() }), dirichlet.log_beta(list)
  end
  return ops.sum(ops.mul(logarithms(p, o.log), ops.affine(a, 1, -1)), 2) - log_beta
end

-- The clouds of "vertices" and "collapsed": the vertex's own concentration, and what the M-1 others share. The mean of
-- a point's own coordinate is 30/32 for every M.
local OWN, OTHERS = 30, 2
-- "centered": every concentration. The deviation of a coordinate is about 1 / (M sqrt(20)).
local CENTERED = 20

--- How many of M vertices are in use when "collapsed": all but a third, at least one.
local function used_vertices(M) return math.max(1, math.floor(2 * M / 3)) end

--- Points (n,M), row i around vertex i mod `used`.
local function clouds(n, M, used, o)
  local own, all = {}, {}
  for i = 1, n do own[i] = { (i - 1) % used } end
  for m = 1, M do all[m] = m - 1 end
  local is_own = tape.no_grad(ops.eq, core.tensor(own, { device = o.device }), core.tensor(all, { device = o.device }))
  local alpha = tape.no_grad(ops.affine, is_own, OWN - OTHERS / (M - 1), OTHERS / (M - 1))
  return simplex.dirichlet(alpha, n, { log = o.log, generator = o.generator, device = o.device })
end

local NAMED = {
  vertices = function(n, M, o) return clouds(n, M, M, o) end,
  uniform = function(n, _, o) return simplex.dirichlet(1, n, o) end,
  centered = function(n, _, o) return simplex.dirichlet(CENTERED, n, o) end,
  collapsed = function(n, M, o) return clouds(n, M, used_vertices(M), o) end,
}

--- The names of Figure 1's distributions, in its order.
simplex.names = { "vertices", "uniform", "centered", "collapsed" }

--- One of the four distributions of Figure 1 [1].
--   vertices    around the vertices, in turn: Dirichlet with 30 at the own vertex and 2 shared by the others
--   uniform     all over the simplex: Dirichlet with 1
--   centered    around the center: Dirichlet with 20
--   collapsed   as vertices, but around the first two thirds of them only (2 of 3)
-- @param name one of simplex.names
-- @param n number of points
-- @param[opt] options {dim = 3: M, log = false: give logarithms, generator = the default one, device}
-- @return tensor (n,M)
function simplex.named(name, n, options)
  local o = chosen("named", options, { dim = 3, log = false, generator = NONE, device = NONE })
  if not NAMED[name] then
    fail("named: no distribution '%s'; known: %s", tostring(name), table.concat(simplex.names, ", "))
  end
  whole("named", "n", n, 1)
  return NAMED[name](n, whole("named", "dim", o.dim, 2), o)
end

-- -- Scores -----------------------------------------------------------------------------------------------------------

local function spread(p, log)
  local mean = ops.mean(probabilities(p, log), 1)
  return ops.exp(ops.affine(ops.sum(ops.mul(mean, ops.log(ops.clamp(mean, LEAST, 1)))), -1, 0))
end

--- exp(H(mean p)): how many vertices the mean of the points is spread over, from 1 to M (Eq. 11 times M).
-- @param p points (N,M)
-- @param[opt] options {log = false: p holds logarithms}
-- @return scalar tensor
function simplex.perplexity(p, options)
  local o = chosen("perplexity", options, { log = false })
  return spread(points("perplexity", p, o.log), o.log)
end

--- The perplexity regularizer 1 - exp(H(mean p)) / M, between 0 (the mean is the center) and 1 - 1/M (collapse to one
-- vertex): what the
-- *-ppl quantizers add to the loss (Eq. 11 and 12; the sign as printed would be minimized by collapse).
-- @param p points (N,M)
-- @param[opt] options {log = false: p holds logarithms}
-- @return scalar tensor
function simplex.ppl(p, options)
  local o = chosen("ppl", options, { log = false })
  return ops.affine(spread(points("ppl", p, o.log), o.log), -1 / p:size(2), 1)
end

--- The KNN regularizer (Eq. 13): the mean deviation of each vertex's K nearest points from it, what the *-knn-*
-- quantizers add to the loss. Gradients go through the deviations, not through the choice of neighbours; ties go to the
-- lowest row.
-- @param p points (N,M), N >= K
-- @param[opt] options {k = 8, metric = "ce": -ln p_m, or "l2": |e_m - p|^2, log = false: p holds logarithms}
-- @return scalar tensor
-- @return deviations (M,K), nearest first: nats or squared distance
-- @return i32 (M,K), the rows they belong to (0-based)
function simplex.knn(p, options)
  local o = chosen("knn", options, { k = 8, metric = "ce", log = false })
  points("knn", p, o.log)
  whole("knn", "k", o.k, 1)
  if o.metric ~= "ce" and o.metric ~= "l2" then fail("knn: metric '%s', expected ce or l2", tostring(o.metric)) end
  if o.k > p:size(1) then fail("knn: k %d of p %s, which has %d rows", o.k, shape_text(p), p:size(1)) end
  local deviation, near = ops.vertex_knn(p, o.k, o.metric, o.log)
  return ops.mean(deviation), deviation, near
end

--- Entropy of each point, -sum p ln p: 0 at a vertex, ln M at the center.
-- @param p points (N,M)
-- @param[opt] options {log = false: p holds logarithms}
-- @return tensor (N), nats
function simplex.entropy(p, options)
  local o = chosen("entropy", options, { log = false })
  points("entropy", p, o.log)
  return ops.affine(ops.sum(ops.mul(probabilities(p, o.log), logarithms(p, o.log)), 2), -1, 0)
end

--- The largest coordinate of each point: 1 at a vertex, 1/M at the center.
-- @param p points (N,M)
-- @param[opt] options {log = false: p holds logarithms}
-- @return tensor (N)
function simplex.max_p(p, options)
  local o = chosen("max_p", options, { log = false })
  return ops.max(probabilities(points("max_p", p, o.log), o.log), 2)
end

--- Distance of each point from each vertex, sqrt of |e_m - p|^2; at most sqrt 2.
-- Where p_m > 1/2 the squares of the other coordinates are summed without it: |p|^2 - p_m^2 would lose a distance below
-- 3e-4.
-- @param p points (N,M)
-- @param[opt] options {log = false: p holds logarithms}
-- @return tensor (N,M)
function simplex.vertex_distances(p, options)
  local o = chosen("vertex_distances", options, { log = false })
  p = probabilities(points("vertex_distances", p, o.log), o.log)
  local square, small = ops.square(p), ops.le(p, core.new({ 1 }, { device = p:device() }):fill(0.5))
  -- without a coordinate above 1/2, of which there is at most one
  local others = ops.sum(ops.mul(square, small), 2, true)
  local rest = ops.sub(others, ops.mul(square, small))
  local own = ops.square(ops.affine(p, -1, 1))
  -- the coordinate above 1/2, for the others
  local above = ops.mul(ops.sum(ops.mul(square, ops.affine(small, -1, 1)), 2, true), small)
  return ops.sqrt(ops.clamp(ops.add(own, ops.add(rest, above)), 1e-30, 4))
end

-- -- Divergences between distributions (Section 5.2) ------------------------------------------------------------------

--- The Dirichlet distribution under which the points are most likely, by Newton's method [3] in float64; the gradient
-- is that of the maximum.
-- @param p points (N,M), N at least 2, none with a coordinate 0: next to a vertex give logarithms
-- @param[opt] options {log = false: p holds logarithms}
-- @return concentrations (M)
-- @return number of Newton steps
function simplex.dirichlet_mle(p, options)
  local o = chosen("dirichlet_mle", options, { log = false })
  points("dirichlet_mle", p, o.log)
  return ops.dirichlet_mle(o.log and p or ops.log(p))
end

--- Kullback-Leibler divergence of Dirichlet(b) from Dirichlet(a), E_a ln (a's density / b's), in closed form.
-- @param a, b concentrations: tensors (M), arrays, or one number, for as many coordinates as the other has; gradients
-- reach tensors
-- @return scalar tensor, nats
function simplex.kl(a, b)
  local function size(x)
    return core.is_tensor(x) and x:dim() == 1 and x:size(1) or type(x) == "table" and not core.is_tensor(x) and #x
      or nil
  end
  local M = size(a) or size(b)
  if not M then
    fail "kl: neither a nor b says how many coordinates there are: give an array or a tensor (M) for one of them"
  end
  local function tensor(x, what)
    local list = concentrations("kl", what, x, M)
    return core.is_tensor(x) and x
      or core.tensor(list, { device = core.is_tensor(a) and a:device() or core.is_tensor(b) and b:device() or nil })
  end
  return ops.dirichlet_kl(tensor(a, "a"), tensor(b, "b"))
end

-- What a distance between points counts as at least, squared: equal points, as rounding makes them next to a vertex,
-- would otherwise have a logarithm of minus infinity. Below it there is no gradient.
local CLOSEST = 1e-30

--- Perez-Cruz's estimate of KL(P | Q) from points of each [2]: with rho the distance of a point of P to its k-th
-- nearest among the other points of P, and nu to its k-th nearest among those of Q, d mean ln (nu / rho) + ln (N_Q /
-- (N_P - 1)), d = M - 1 the dimension of the simplex. It can be below 0, and its bias goes with 1 / N^(1/d). Gradients
-- go through the distances to the neighbours. The divergence is the same in any coordinates, the estimate is not: space
-- "log-ratio" measures distances between logarithms less their mean over the row (Aitchison's geometry), which tells
-- points apart that next to a vertex are all one.
-- @param p points of P (N_P,M), N_P > k
-- @param q points of Q (N_Q,M), N_Q >= k
-- @param[opt] options {k = 1, space = "simplex" or "log-ratio", log = false: p and q hold logarithms}
-- @return scalar tensor, nats
function simplex.perez_cruz_kl(p, q, options)
  local o = chosen("perez_cruz_kl", options, { k = 1, space = "simplex", log = false })
  points("perez_cruz_kl", p, o.log, "p")
  points("perez_cruz_kl", q, o.log, "q")
  whole("perez_cruz_kl", "k", o.k, 1)
  if o.space ~= "simplex" and o.space ~= "log-ratio" then
    fail("perez_cruz_kl: space '%s', expected simplex or log-ratio", tostring(o.space))
  end
  local N, L, M = p:size(1), q:size(1), p:size(2)
  if q:size(2) ~= M then fail("perez_cruz_kl: p %s and q %s disagree on M", shape_text(p), shape_text(q)) end
  if o.k >= N or o.k > L then
    fail("perez_cruz_kl: k %d, expected less than the %d rows of p and at most the %d of q", o.k, N, L)
  end
  local function coordinates(x)
    if o.space == "simplex" then return probabilities(x, o.log) end
    local l = logarithms(x, o.log)
    return ops.sub(l, ops.mean(l, 2, true))
  end
  local x, y = coordinates(p), coordinates(q)
  local function mean_log(distance)
    return ops.mean(ops.log(ops.clamp(ops.narrow(distance, 2, o.k, 1), CLOSEST, math.huge)))
  end
  local nu, rho = mean_log((ops.knn(x, y, o.k))), mean_log((ops.knn(x, x, o.k, true)))
  return ops.affine(ops.sub(nu, rho), (M - 1) / 2, math.log(L / (N - 1)))
end

-- -- Training trajectories --------------------------------------------------------------------------------------------

local Watch = {}
Watch.__index = Watch

--- Where the rows z (N,G,D) sit: {step, distances (G,R), neighbours (G,M), claimed (G,M) i32, points (G,P,M) or nil},
-- on the CPU.
local function look(self, z)
  local o, q = self.options, self.quantizer
  local N, M = z:size(1), q.options.codes
  if o.rows < N then -- evenly spaced
    local index = {}
    for i = 1, o.rows do index[i] = math.floor((i - 1) * N / o.rows) end
    index = core.tensor(index, { dtype = "i32", device = z:device() })
    z = ops.reshape(ops.gather(ops.reshape(z, { N, -1 }), index), { o.rows, z:size(2), z:size(3) })
  end
  local R, found = z:size(1), { distances = {}, neighbours = {}, claimed = {}, points = o.points > 0 and {} or nil }
  for g = 1, q.options.groups do
    local log_pi = q:log_pi(z, g)
    local p = ops.exp(log_pi)
    local deviation = ops.vertex_knn(log_pi, math.min(o.k, R), o.metric, true)
    if o.metric == "l2" then deviation = ops.sqrt(ops.clamp(deviation, 0, 2)) end
    local claimed = ops.count_codes(ops.reshape(ops.argmax(p), { R, 1 }), M)
    found.distances[g] = ops.reshape(ops.min(simplex.vertex_distances(p), 2), { 1, R })
    found.neighbours[g] = ops.reshape(ops.mean(deviation, 2), { 1, M })
    found.claimed[g] = ops.reshape(claimed:to "f32", { 1, M })
    if found.points then found.points[g] = ops.reshape(ops.narrow(p, 1, 1, math.min(o.points, R)), { 1, -1, M }) end
  end
  local record = {}
  for name, parts in pairs(found) do
    local x = #parts > 1 and ops.cat(1, unpack(parts)) or parts[1]
    record[name] = (name == "claimed" and x:to "i32" or x):to "cpu"
  end
  return record
end

--- Records, from now on, where the rows of training batches sit on the simplex: every training forward of `quantizer`
-- adds an entry to watch.records, {step = number of the training forward, and, on the CPU,
--     distances (G,R)     distance of each row from the vertex nearest to it, as vertex_distances
--     neighbours (G,M)    mean deviation of each vertex's K nearest rows (of these R): distance under "l2", nats under
--     "ce"
--     claimed (G,M) i32   rows whose largest coordinate is this vertex's: 0 is a code nobody wants
--     points (G,P,M)      the first P of these rows themselves, where asked for}
-- Looks at pi, without Gumbel noise, and changes nothing of the training. Does not see steps that vx.graph records and
-- replays. Smoothed quantizers only: those with a method log_pi(z (N,G,D), g) that gives (N,M). Holds R x M numbers
-- while it looks.
-- @param quantizer what vx.quantizer returned
-- @param[opt] options {every = 1: look at each so many-th training forward, rows = 1024: R, evenly spaced, or all where
-- a batch has fewer,
--   k = 8: K, or R where that is less, metric = "l2" or "ce", points = 0: P}
-- @return a watch: .records; :stack(name) all records of a name as one tensor (T,...); :steps() array of their T steps;
-- :last();
--   :save(path) as safetensors; :plot() as a figure over the steps; :stop() ends the recording
function simplex.watch(quantizer, options)
  local o = chosen("watch", options, { every = 1, rows = 1024, k = 8, metric = "l2", points = 0 })
  for name, low in pairs { every = 1, rows = 1, k = 1, points = 0 } do whole("watch", name, o[name], low) end
  if o.metric ~= "ce" and o.metric ~= "l2" then fail("watch: metric '%s', expected ce or l2", tostring(o.metric)) end
  if type(quantizer) ~= "table" or type(quantizer.quantize) ~= "function" then
    fail("watch: a %s, expected a quantizer", type(quantizer))
  end
  if type(quantizer.log_pi) ~= "function" then
    fail("watch: %s has no points on a simplex to look at: it is no smoothed quantizer (no method log_pi)",
      quantizer.label)
  end
  if quantizer.options.codes < 2 then
    fail("watch: %s has %d code, expected at least 2", quantizer.label, quantizer.options.codes)
  end
  if rawget(quantizer, "quantize") then
    fail("watch: %s is being watched already; stop that watch first", quantizer.label)
  end
  local self = setmetatable({ quantizer = quantizer, options = o, records = {} }, Watch)
  local quantize = quantizer.quantize
  rawset(quantizer, "quantize", function(q, z, given)
    if (q.steps - 1) % o.every == 0 and not core.is_recording() then
      local record = core.step(tape.no_grad, look, self, z)
      for _, x in pairs(record) do core.keep(x) end
      record.step = q.steps
      self.records[#self.records + 1] = record
    end
    return quantize(q, z, given)
  end)
  return self
end

--- Ends the recording; what was recorded stays.
function Watch:stop()
  if self.quantizer then rawset(self.quantizer, "quantize", nil) end
  self.quantizer = nil
  return self
end

--- Array of the steps recorded.
function Watch:steps()
  local steps = {}
  for i, record in ipairs(self.records) do steps[i] = record.step end
  return steps
end

--- The latest record, or nil.
function Watch:last() return self.records[#self.records] end

--- The records' tensors of one name, "distances", "neighbours", "claimed" or "points", one after the other: f32
-- (T,...).
function Watch:stack(name)
  local first, parts = self.records[1], {}
  if not first then fail "watch: nothing was recorded yet: no training forward has run" end
  if not core.is_tensor(first[name]) then fail("watch: no tensors '%s' in the records", tostring(name)) end
  for i, record in ipairs(self.records) do
    if shape_text(record[name]) ~= shape_text(first[name]) then
      fail("watch: %s is %s at step %d and %s at step %d: batches differ in size, so take watch.records one by one, "
        .. "or fewer rows", name, shape_text(first[name]), first.step, shape_text(record[name]), record.step)
    end
    local x = record[name]:to "f32"
    parts[i] = ops.reshape(x, { 1, unpack(x:shape()) })
  end
  return tape.no_grad(ops.cat, 1, unpack(parts))
end

--- Writes all that was recorded, stacked, with the tensor "step" (T), as a safetensors file.
function Watch:save(path)
  local tensors = { step = core.tensor(self:steps(), { dtype = "i32", device = "cpu" }) }
  for _, name in ipairs { "distances", "neighbours", "claimed", "points" } do
    if self.records[1] and self.records[1][name] then tensors[name] = self:stack(name) end
  end
  if not tensors.distances then fail "watch: nothing was recorded yet: no training forward has run" end
  local meta = {}
  for key, value in pairs(self.options) do meta[key] = tostring(value) end
  require("vertex.safetensors").save(path, tensors, meta)
end

function Watch:__tostring()
  local last = self:last()
  if not last then return "watch: no record yet" end
  local used = tape.no_grad(function() return ops.mean(ops.lt(core.new({ 1 }, { device = "cpu" }):zero(),
    last.claimed:to "f32")):item() end)
  local text = "watch: %d records, the last of step %d: mean distance from the nearest vertex %.3g, "
    .. "vertices claimed %.0f%%"
  return text:format(#self.records, last.step, ops.mean(last.distances):item(), 100 * used)
end

-- -- Plots ------------------------------------------------------------------------------------------------------------

--- Points as a figure: on the triangle for M = 3, for more in a regular polygon with a vertex at each corner
-- (plot/simplex.lua says what that shows); coloured by how densely they lie.
-- @param p points (N,M), M at least 3
-- @param[opt] options {title, labels = of the vertices (array of M strings), log = false: p holds logarithms}
-- @return figure, to show, save or add to: fig:simplex(1) are its axes
function simplex.plot(p, options)
  local o = chosen("plot", options, { title = NONE, labels = NONE, log = false })
  points("plot", p, o.log)
  local M = p:size(2)
  if M < 3 then fail("plot: p %s, expected (N,M) with M at least 3", shape_text(p)) end
  local fig = require("vertex.plot").figure { width = 480, height = 440 }
  core.step(function()
    tape.no_grad(function()
      fig:simplex(1, { codes = M, labels = o.labels }):scatter(probabilities(p, o.log),
        { density = true, size = 4.5 }):set { title = o.title }
    end)
  end)
  return fig
end

--- What was recorded, over the steps, as a figure of three axes with a line for each codebook: the rows' distance from
-- the vertex nearest to them (mean, in a band of one standard deviation, cut at 0), the deviation of each vertex's K
-- nearest rows (mean over the vertices, in a band from the least to the greatest), and the share of vertices that any
-- row claimed.
-- @return figure
function Watch:plot()
  local steps, G = self:steps(), self.records[1] and self.records[1].claimed:size(1)
  local distances, neighbours, claimed
  core.step(tape.no_grad, function()
    local d, n = self:stack "distances", self:stack "neighbours"
    local mean = ops.mean(d, 3)
    local sd = ops.sqrt(ops.mean(ops.square(ops.sub(d, ops.mean(d, 3, true))), 3))
    distances = { mean:totable(), ops.clamp(ops.sub(mean, sd), 0, 2):totable(), ops.add(mean, sd):totable() }
    neighbours = { ops.mean(n, 3):totable(), ops.min(n, 3):totable(), ops.max(n, 3):totable() }
    claimed = ops.mean(ops.lt(core.new({ 1 }, { device = "cpu" }):zero(), self:stack "claimed"), 3):totable()
  end)
  local fig = require("vertex.plot").figure { width = 1050, height = 320, cols = 3 }
  local function of(rows, g)
    local out = {}
    for t, row in ipairs(rows) do out[t] = row[g] end
    return out
  end
  for g = 1, G do
    local label = G > 1 and "codebook " .. g or nil
    fig:axes(1):line(steps, of(distances[1], g), { band = { of(distances[2], g), of(distances[3], g) }, label = label })
    fig:axes(2):line(steps, of(neighbours[1], g), { band = { of(neighbours[2], g), of(neighbours[3], g) },
      label = label })
    fig:axes(3):line(steps, of(claimed, g), { label = label })
  end
  local unit = self.options.metric == "ce" and " (nats)" or ""
  fig:axes(1):set { title = "Rows: distance from a vertex", xlabel = "step", ylabel = "distance" }
  fig:axes(2):set { title = "Vertices: their nearest rows", xlabel = "step", ylabel = "mean deviation" .. unit }
  fig:axes(3):set { title = "Vertices claimed", xlabel = "step", ylabel = "share", ylim = { 0, 1.05 } }
  return fig
end

return simplex
