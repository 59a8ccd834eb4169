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

--- Says which share of the rows no vertex has among its K nearest (Eq. 13): those a KNN regularizer does not move.
-- @param p tensor f32 (N,M), rows of probabilities
-- @param options { k = K, metric = "ce" or "l2" }
-- @return number from 0 to 1
-- @raise where p has another shape, a row holds a NaN or Inf, or k is not in 1 .. N
function metrics.unselected(p, options)
  expect_rows("unselected", p)
  local o = check.options("unselected", options, { k = { "count", 8 }, metric = { { "ce", "l2" }, "ce" } })
  check.integer("unselected", "k", o.k, 1, p:size(1))
  return core.step(function()
    local _, near = ops.vertex_knn(p:detach(), o.k, o.metric)
    local counts = ops.count_codes(ops.reshape(near, { -1, 1 }), p:size(1))
    return 1 - ops.mean(ops.gt(counts:to "f32", core.new({ 1 }, { device = p:device() }):zero())):item()
  end)
end

return metrics
