--- ops/reduce.lua: sums, means and extremes over dimensions, and questions about rows.

local common = require "vertex.ops.common"
local core = require "vertex.core"
local record = require "vertex.ops.record"

local op, VX, contiguous, new_like = core.op, core.VX, core.contiguous, core.new_like
local binary, dimension, empty_on, expanded, expect_tensor = common.binary, common.dimension, common.empty_on,
  common.expanded, common.expect_tensor
local around, product, rows, scaled, shaped = common.around, common.product, common.rows, common.scaled, common.shaped
local define = record.define

--- Gives the shape of x reduced over `dims` (a number, a list, or nil for all), with and without the reduced
-- dimensions.
local function reduced_shape(x, dims, what)
  local kept, short = x:shape(), {}
  if dims == nil then
    for i = 1, #kept do kept[i] = 1 end
    return kept, {}
  end
  local over = {}
  for _, d in ipairs(type(dims) == "table" and dims or { dims }) do over[dimension(x, d, what)] = true end
  for i = 1, #kept do
    if over[i] then kept[i] = 1 else short[#short + 1] = kept[i] end
  end
  return kept, short
end

--- Defines a reduction by its kind. gradient(ctx, dy): dx, from dy as repeated to x's shape.
local function define_reduction(name, kind, text, also, gradient)
  define(name, {
    text = text,
    args = { { "x", "tensor f32 of any shape" },
      { "dims", "dimension, or array of dimensions, 1-based; negative ones count from the end; nil is all",
        optional = true },
      { "keep", "true: the reduced dimensions stay, of size 1", default = false } },
    returns = "tensor f32 of x's shape without `dims`; of shape {} where those are all",
    raises = "where x has no such dimension",
    calls = { "reduce" },
    also = also,
    method = true,
    forward = function(ctx, x, dims, keep)
      expect_tensor(x, name, "x")
      local kept, short = reduced_shape(x, dims, name)
      local y = empty_on(x, kept)
      op.reduce(y, x, kind)
      if ctx.needs then ctx.x, ctx.kept, ctx.y = x, kept, y end
      return keep and y:detach() or shaped(y, short)
    end,
    backward = function(ctx, dy) return gradient(ctx, expanded(shaped(dy, ctx.kept), ctx.x:shape())) end,
    cases = function(T)
      return { { T { 3, 4 } }, { T { 3, 4 }, 1 }, { T { 3, 4 }, 2 }, { T { 2, 3, 4 }, { 1, 3 }, true },
        { T { 2, 3, 4 }, { 2 } } }
    end,
  })
end

define_reduction("sum", VX.REDUCE_SUM, "Sums, exactly to float32 rounding of a fixed pairwise order.", nil,
  function(_, dy) return dy end)
define_reduction("mean", VX.REDUCE_MEAN, "Averages: the sum over the number of elements.", { "average" },
  function(ctx, dy) return scaled(contiguous(dy), product(ctx.kept) / ctx.x:numel()) end)

--- Shares the gradient of max and min among equal elements.
local function extreme(ctx, dy)
  local hit = binary("eq", VX.EQ, ctx.x, expanded(ctx.y, ctx.x:shape()))
  local count = empty_on(hit, ctx.kept)
  op.reduce(count, hit, VX.REDUCE_SUM)
  return binary("mul", VX.MUL, dy, binary("div", VX.DIV, hit, count))
end

define_reduction("max", VX.REDUCE_MAX,
  "Gives the largest element (a NaN where there is one); elements that share the maximum share its gradient.",
  { "amax" }, extreme)
define_reduction("min", VX.REDUCE_MIN,
  "Gives the smallest element (a NaN where there is one); elements that share the minimum share its gradient.",
  { "amin" }, extreme)

define("cumsum", {
  text = "Sums along one dimension up to each element, that one included; kept in double and rounded once each.",
  args = { { "x", "tensor f32 of any shape" }, { "dim", "dimension, 1-based; negative counts from the end" } },
  returns = "tensor f32 of x's shape",
  raises = "where x has no such dimension",
  calls = { "cumsum" },
  method = true,
  forward = function(ctx, x, d)
    x = contiguous(expect_tensor(x, "cumsum", "x"))
    d = dimension(x, d, "cumsum")
    local flat = around(x, d)
    local y = new_like(flat)
    op.cumsum(y, flat, 0)
    ctx.d, ctx.shape = d, x:shape()
    return shaped(y, ctx.shape)
  end,
  backward = function(ctx, dy)
    local flat = around(dy, ctx.d)
    local dx = new_like(flat)
    op.cumsum(dx, flat, 1)
    return shaped(dx, ctx.shape)
  end,
  cases = function(T)
    return { { T { 7 }, 1 }, { T { 3, 4 }, 1 }, { T { 3, 4 }, -1 }, { T { 2, 5, 3 }, 2 } }
  end,
})

define("argmax", {
  text = "Finds the largest element along a dimension, the last unless another is named; ties go to the lowest index.",
  args = { { "x", "tensor f32 of any shape" },
    { "dim", "dimension, 1-based; negative counts from the end; nil is the last", optional = true } },
  returns = "tensor i32 of indices, 0-based, of x's shape without that dimension; no gradient",
  raises = "where x has no such dimension, its size is 0, or a NaN is among the elements",
  calls = { "argmax" },
  method = true,
  forward = function(_, x, dim)
    local d = common.last_unless(expect_tensor(x, "argmax", "x"), dim, "argmax")
    local flat, s = rows(common.turned(x, d))
    local index = empty_on(x, { flat:size(1) }, "i32")
    op.argmax(index, flat)
    s[#s] = nil
    local y = shaped(index, s)
    for i = d, #s - 1 do y = common.transposed(y, i, i + 1) end -- what was last and stands in the place of d goes back
    return contiguous(y)
  end,
})

define("nonfinite", {
  text = "Counts the rows (last dimension) that hold a NaN or Inf. Waits for the device.",
  args = { { "x", "tensor f32 (...,C)" } },
  returns = "number of such rows; and the first of them, 0-based, nil where there is none",
  raises = "where x is no f32 tensor",
  calls = { "nonfinite" },
  also = { "isnan", "isfinite", "isinf" },
  forward = function(_, x)
    local found = empty_on(expect_tensor(x, "nonfinite", "x"), { 2 }, "i32")
    op.nonfinite(found, (rows(x)))
    local t = found:totable()
    return t[1], t[1] > 0 and t[2] or nil
  end,
})
