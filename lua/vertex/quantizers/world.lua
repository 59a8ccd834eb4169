--- world: the regularizers of the smoothed quantizer over the rows of all ranks (the option scope = "world").
--
-- The K nearest rows of a vertex lie among the K nearest of each rank. So the ranks gather the keys of theirs, each
-- chooses the K best of all, and sends the gradient to those of its own rows that are among them: R K keys a vertex
-- travel, and no row. A key is -(a row's divergence from the vertex), log pi (knn-ce) or 2 pi - |pi|^2 - 1 (knn-l2).
-- ppl needs the mean of the ranks' means. The regularizer is then the same number on all ranks: that of one rank with
-- all rows; ties of rows, within the rounding of float32, may fall to other rows than there.

local core = require "vertex.core"
local dist = require "vertex.dist"
local ops = require "vertex.ops"

local world = {}

local function unit(x)
  return ops.div(x, ops.sqrt(ops.clamp(ops.sum(ops.square(x), x:dim(), true), 1e-24, math.huge)))
end

--- Keys (S,K) of the pairs that a call of quantize_smooth found in group g.
local function keys_of(call, g, near, l2)
  local S, K, D = near:size(1), near:size(2), call.z:size(3)
  local flat = ops.reshape(near, { S * K })
  local codes = ops.select(call.codebook, 1, g)
  if call.vertices then codes = ops.gather(codes, ops.select(call.vertices, 1, g)) end
  -- what can be done once a row or a code is not done once a pair
  local rows = ops.reshape(ops.gather(unit(core.contiguous(ops.select(call.z, 2, g))), flat), { S, K, D })
  codes = ops.mul(unit(codes), ops.exp(ops.affine(call.log_tau, -1, 0)))
  local logit = ops.sum(ops.mul(rows, ops.reshape(codes, { S, 1, D })), 3)
  local function of_rows(x) return ops.reshape(ops.gather(core.contiguous(x), flat), { S, K }) end
  local lse = ops.narrow(ops.select(call.lse, 2, g), 2, 1, 1) -- (N,1)
  local log_pi = ops.sub(logit, of_rows(lse))
  if not l2 then return log_pi end
  local squares = of_rows(ops.narrow(call.sumsq, 2, g, 1))
  return ops.affine(ops.sub(ops.affine(ops.exp(log_pi), 2, 0), squares), 1, -1)
end

--- The lists (L,k), filled up to K with what no list keeps.
local function widened(x, K, value)
  local L, k = x:size(1), x:size(2)
  if k == K then return core.contiguous(x) end
  local wide = core.new({ L, K }, { dtype = x:dtype(), device = x:device() })
  wide:copy(core.new({ L, K }, { device = x:device() }):fill(value):to(x:dtype()))
  ops.narrow(wide, 2, 1, k):copy(x)
  return wide
end

--- Replaces near and reg of a call by those of all ranks; gives the factor of the regularizer's gradient.
local function join_neighbours(call, K, l2)
  local G, S, k = unpack(call.near:shape()) -- k: K, or as many rows as there are here
  local lists = {}
  for g = 1, G do lists[g] = keys_of(call, g, ops.select(call.near, 1, g), l2) end
  local keys = G == 1 and lists[1] or ops.cat(1, unpack(lists))
  local near = widened(ops.reshape(call.near, { G * S, k }), K, -1):to "cpu"
  local all = dist.all_gather(widened(keys, K, -math.huge)):to "cpu"
  local best = core.new({ G * S, K }, { device = "cpu" })
  core.rank_choose(near, best, all, dist.rank())
  local device = call.z:device()
  call.near = core.contiguous(ops.reshape(ops.narrow(near, 2, 1, k), { G, S, k })):to(device)
  call.reg = ops.reshape(ops.affine(ops.mean(best), -1, 0), { 1 }):to(device)
  -- gradients are averaged over the ranks, and each has its own pairs alone, as parts of S k and not of S K
  return dist.size() * k / K
end

--- Replaces mean_pi and reg of a call by those of all ranks; gives the factor of the regularizer's gradient.
local function join_mean(call)
  local N, M = call.z:size(1), call.codebook:size(2)
  local share = N / dist.sum({ N })[1]
  call.mean_pi = dist.all_reduce(ops.affine(call.mean_pi, share, 0))
  local entropy = ops.affine(ops.sum(ops.mul(call.mean_pi, ops.log(ops.clamp(call.mean_pi, 1e-30, 1))), 2), -1, 0)
  call.reg = ops.reshape(ops.affine(ops.mean(ops.exp(entropy)), -1 / M, 1), { 1 })
  return dist.size() * share
end

--- Gives quantize_smooth's option `join` for a regularizer: function(call) that makes near, mean_pi and reg those of
-- all ranks, and gives the factor of the regularizer's gradient. Collective.
-- @param regularizer of the method
-- @param K neighbours of a vertex among all rows
-- @return function; nil where there is nothing to join
function world.join(regularizer, K)
  if regularizer == "ppl" then return join_mean end
  if regularizer == "none" then return nil end
  return function(call) return join_neighbours(call, K, regularizer == "knn-l2") end
end

return world
