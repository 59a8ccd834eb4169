--- metrics/tightness: how near rows of probabilities are to the vertices of the simplex, and which of them no vertex
-- has among its nearest. Both take all N x M probabilities.

local check = require "vertex.check"
local core = require "vertex.core"
local ops = require "vertex.ops"
local tape = require "vertex.tape"

local fail, shape_text = core.fail, core.shape_text

local metrics = {}

local function expect_rows(who, p)
  if p:dim() ~= 2 or p:size(1) == 0 or p:size(2) == 0 then
    fail("%s: p %s should have the shape (N,M), N and M of 1 or more", who, shape_text(p))
  end
end

--- Says how near rows are to vertices.
-- @param p tensor f32 (N,M), rows of probabilities
-- @return table { mean, min, q05, q25, median, q75, q95 } of the rows' largest probabilities, quantiles as the row of
-- that rank; and gap, the mean squared distance |e - p|^2 from each row to its vertex
-- @raise where p has another shape, or holds a NaN or Inf
function metrics.tightness(p)
  expect_rows("tightness", p)
  local bad, row = ops.nonfinite(p)
  if bad > 0 then fail("tightness: %d rows hold a NaN or Inf, the first of them row %d (0-based)", bad, row) end
  return core.step(function()
    return tape.no_grad(function()
      local largest = ops.max(p, 2)
      -- |e - p|^2 = sum p^2 - 2 max p + 1
      local gap = ops.mean(ops.sub(ops.sum(ops.square(p), 2), ops.affine(largest, 2, -1))):item()
      local sorted, sum = ops.reshape(largest, { -1 }):totable(), 0
      table.sort(sorted)
      for _, v in ipairs(sorted) do sum = sum + v end
      local function quantile(share) return sorted[math.max(1, math.ceil(share * #sorted))] end
      return { mean = sum / #sorted, min = sorted[1], q05 = quantile(0.05), q25 = quantile(0.25),
        median = quantile(0.5), q75 = quantile(0.75), q95 = quantile(0.95), gap = math.max(0, gap) }
    end)
  end)
end

--- How often each row is among the K nearest of a vertex, i32 (N), and these rows, i32 (M,K).
local function selection(who, p, options)
  expect_rows(who, p)
  local o = check.options(who, options, { k = { "count", 8 }, metric = { { "ce", "l2" }, "ce" } })
  check.integer(who, "k", o.k, 1, p:size(1))
  local _, near = ops.vertex_knn(p:detach(), o.k, o.metric)
  return ops.reshape(ops.count_codes(ops.reshape(near, { -1, 1 }), p:size(1)), { -1 }), near
end

--- Says which share of the rows no vertex has among its K nearest (Eq. 13): those a KNN regularizer does not move.
-- @param p tensor f32 (N,M), rows of probabilities
-- @param options { k = K, metric = "ce" or "l2" }
-- @return number from 0 to 1
-- @raise where p has another shape, a row holds a NaN or Inf, or k is not in 1 .. N
function metrics.unselected(p, options)
  return core.step(function()
    return ops.mean(ops.lt(selection("unselected", p, options):to "f32", 1)):item()
  end)
end

--- Says which share of the vertices is contested: another vertex has one of its K nearest rows among its own.
-- @param p tensor f32 (N,M), rows of probabilities
-- @param options { k = K, metric = "ce" or "l2" }
-- @return number from 0 to 1; 0 where every vertex has rows of its own
-- @raise where p has another shape, a row holds a NaN or Inf, or k is not in 1 .. N
function metrics.contested(p, options)
  return core.step(function()
    local counts, near = selection("contested", p, options)
    local most = ops.max(ops.gather(ops.reshape(counts:to "f32", { -1, 1 }), ops.reshape(near, { -1 })):reshape(
      near:shape()), 2)
    return ops.mean(ops.gt(most, 1)):item()
  end)
end

local MOST = 2 ^ 27 -- probabilities that are held at once: 0.5 GB a copy

--- Says how a smoothed quantizer smooths rows: how near they are to vertices, and which of them its KNN regularizer
-- would select on one rank, in its shards and with its K; for another regularizer as knn-ce. Means over the codebooks.
-- @param quantizer a quantizer
-- @param z tensor f32 (..., dim), rows that it is given; of more than fit (2^27 probabilities) the first are taken
-- @return table { tightness = mean of the rows' largest probabilities; tightness_q05, tightness_q50, tightness_q95, its
-- quantiles; gap = mean squared distance from each row to its vertex, unselected and contested = shares, as
-- metrics.unselected and metrics.contested, absent where the rows do not fit, are fewer than K, or the quantizer has no
-- K }; empty where the quantizer is not smoothed, has stages, or meets a NaN or Inf
-- @raise where z has another width
function metrics.smoothing(quantizer, z)
  local o, sums = quantizer.options, {}
  if not quantizer.log_pi then return sums end
  if z:size(-1) ~= o.dim then
    fail("smoothing: z %s, expected rows of the quantizer's width %d", shape_text(z), o.dim)
  end
  local metric = quantizer.regularizer == "knn-l2" and "l2" or "ce"
  return core.step(function()
    return tape.no_grad(function()
      local rows = ops.reshape(z:detach(), { -1, o.groups, o.dim / o.groups })
      local N = rows:size(1)
      local fit = math.min(N, math.max(1, math.floor(MOST / o.codes)))
      if fit < N then rows = ops.narrow(rows, 1, 1, fit) end
      local k, parts = o.k, o.scope ~= "world" and o.shards or 1 -- of all ranks together; no k: there is no such option
      local function add(name, value) sums[name] = (sums[name] or 0) + value / o.groups end
      for g = 1, o.groups do
        local p = ops.exp(quantizer:log_pi(rows, g))
        if ops.nonfinite(p) > 0 then return {} end
        local t = metrics.tightness(p)
        add("tightness", t.mean)
        for _, q in ipairs { "q05", "q95" } do add("tightness_" .. q, t[q]) end
        add("tightness_q50", t.median)
        add("gap", t.gap)
        if k and fit == N and k / parts <= math.floor(N / parts) then
          for h = 0, parts - 1 do -- as the kernels cut a batch
            local first, last = math.floor(h * N / parts), math.floor((h + 1) * N / parts)
            local part, how = ops.narrow(p, 1, first + 1, last - first), { k = k / parts, metric = metric }
            add("unselected", metrics.unselected(part, how) * (last - first) / N)
            add("contested", metrics.contested(part, how) / parts)
          end
        end
      end
      return sums
    end)
  end)
end

return metrics
