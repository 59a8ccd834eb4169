--- ops/neighbours.lua: the K nearest, of the simplex's vertices among rows and of rows among rows.

local common = require "vertex.ops.common"
local core = require "vertex.core"
local record = require "vertex.ops.record"

local op, VX, contiguous, fail, new_like, shape_text = core.op, core.VX, core.contiguous, core.fail, core.new_like,
  core.shape_text
local empty_on, expect_tensor = common.empty_on, common.expect_tensor
local define = record.define

local KNN_METRICS = { ce = VX.KNN_CE, l2 = VX.KNN_L2 }

define("vertex_knn", {
  text = "Finds the K rows of p that deviate least from each vertex e_m of the simplex, nearest first, ties to the "
    .. "lowest row. The gradient goes through the deviations, not through the choice.",
  args = { { "p", "tensor f32 (N,M), rows of probabilities" }, { "k", "number of neighbours, at most N" },
    { "metric", '"ce": -log p[n][m] (a p below 2^-126 counts as that), "l2": |e_m - p[n]|^2' },
    { "log", "true: p holds logarithms", default = false } },
  returns = "deviations f32 (M,K); rows i32 (M,K), 0-based, without a gradient",
  raises = "where a row holds a NaN or Inf, or k is not in 1 .. N",
  calls = { "vertex_knn", "vertex_knn_backward" },
  source = "Eq. 13",
  forward = function(ctx, p, k, metric, log)
    p = contiguous(expect_tensor(p, "vertex_knn", "p"))
    if not KNN_METRICS[metric] then fail("vertex_knn: metric '%s', expected ce or l2", tostring(metric)) end
    if p:dim() ~= 2 then fail("vertex_knn: p %s should have the shape (N,M)", shape_text(p)) end
    local near, deviation = empty_on(p, { p:size(2), k }, "i32"), empty_on(p, { p:size(2), k })
    op.vertex_knn(near, deviation, p, KNN_METRICS[metric], log and 1 or 0)
    if ctx.needs then ctx.p, ctx.near, ctx.metric, ctx.log = p, near, KNN_METRICS[metric], log and 1 or 0 end
    return deviation, near
  end,
  backward = function(ctx, dy)
    local dp = new_like(ctx.p)
    op.vertex_knn_backward(dp, dy, ctx.near, ctx.p, ctx.metric, ctx.log)
    return dp
  end,
  cases = function(T)
    local p, l = { low = 0.05, high = 1 }, { low = -3, high = 0 }
    return { { T({ 7, 3 }, p), 2, "ce" }, { T({ 7, 3 }, p), 2, "l2" }, { T({ 9, 5 }, l), 9, "ce", true },
      { T({ 20, 18 }, l), 3, "l2", true } }
  end,
})

define("knn", {
  text = "Finds the K rows of y nearest to each row of x, nearest first, ties to the lowest row. The gradient goes "
    .. "through the distances, not through the choice.",
  args = { { "x", "tensor f32 (N,D)" }, { "y", "tensor f32 (L,D)" }, { "k", "number of neighbours, at most L" },
    { "exclude_self", "true: x and y are the same rows, and none is its own neighbour", default = false } },
  returns = "squared Euclidean distances f32 (N,K); rows of y i32 (N,K), 0-based, without a gradient",
  raises = "where a row holds a NaN or Inf, k is not in 1 .. L, or the shapes disagree",
  calls = { "knn", "knn_backward" },
  also = { "cdist" },
  forward = function(ctx, x, y, k, exclude_self)
    x, y = contiguous(expect_tensor(x, "knn", "x")), contiguous(expect_tensor(y, "knn", "y"))
    if x:dim() ~= 2 then fail("knn: x %s should have the shape (N,D)", shape_text(x)) end
    local near, distance = empty_on(x, { x:size(1), k }, "i32"), empty_on(x, { x:size(1), k })
    op.knn(near, distance, x, y, exclude_self and 1 or 0)
    if ctx.needs then ctx.x, ctx.y, ctx.near = x, y, near end
    return distance, near
  end,
  backward = function(ctx, ddistance)
    local dx, dy = new_like(ctx.x), new_like(ctx.y)
    op.knn_backward(dx, dy, ddistance, ctx.near, ctx.x, ctx.y)
    return dx, dy
  end,
  cases = function(T)
    return { { T { 5, 3 }, T { 7, 3 }, 2 }, { T { 3, 1 }, T { 3, 1 }, 3 }, { T { 6, 2 }, T { 6, 2 }, 2, true },
      { T({ 4, 19 }, { grad = false }), T { 30, 19 }, 17 } }
  end,
})
