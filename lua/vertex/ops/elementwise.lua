--- ops/elementwise.lua: one number of each operand in, one out. Two operands are broadcast: dimensions of size 1, and
-- missing ones in front, are repeated.

local common = require "vertex.ops.common"
local core = require "vertex.core"
local record = require "vertex.ops.record"

local op, VX, contiguous, fail, new_like = core.op, core.VX, core.contiguous, core.fail, core.new_like
local binary, expanded, expect_tensor, scaled, sum_to = common.binary, common.expanded, common.expect_tensor,
  common.scaled, common.sum_to
local define = record.define

-- -- Of two tensors ---------------------------------------------------------------------------------------------------

--- Defines y = a (kind) b. o.gradient(dy, a, b, y, needs) gives da and db, of y's shape; o.low, o.high: what the cases
-- are drawn from.
local function define_binary(name, kind, o)
  local gradient, range = o.gradient, { low = o.low, high = o.high }
  define(name, {
    text = o.text,
    args = { { "a", "tensor f32 of any shape" }, { "b", "tensor f32 of a shape that broadcasts with a's" } },
    returns = o.returns or "tensor f32 of the shape that both are broadcast to",
    raises = "where a and b disagree on a size that is 1 in neither",
    calls = { "binary" },
    also = o.also,
    method = o.method,
    forward = function(ctx, a, b)
      local y = binary(name, kind, a, b)
      if ctx.needs then ctx.a, ctx.b, ctx.y = a, b, y end
      return y
    end,
    backward = gradient and function(ctx, dy)
      local needs, da, db = ctx.needs, gradient(dy, ctx.a, ctx.b, ctx.y, ctx.needs)
      return needs[1] and sum_to(da, ctx.a:shape()), needs[2] and sum_to(db, ctx.b:shape())
    end,
    cases = function(T)
      return { { T({ 3, 4 }, range), T({ 3, 4 }, range) }, { T({ 3, 4 }, range), T({ 4 }, range) },
        { T({ 3, 1 }, range), T({ 1, 4 }, range) },
        { T({ 2, 3, 4 }, range), T({ 1 }, range) } }
    end,
  })
end

define_binary("add", VX.ADD, {
  text = "Adds elementwise: a + b, which is how it is written.",
  gradient = function(dy) return dy, dy end,
})
define_binary("sub", VX.SUB, {
  text = "Subtracts elementwise: a - b, which is how it is written.",
  also = { "subtract" },
  gradient = function(dy, _, _, _, needs) return dy, needs[2] and scaled(dy, -1) end,
})
define_binary("mul", VX.MUL, {
  text = "Multiplies elementwise: a * b, which is how it is written.",
  also = { "multiply" },
  gradient = function(dy, a, b, _, needs)
    return needs[1] and binary("mul", VX.MUL, dy, b), needs[2] and binary("mul", VX.MUL, dy, a)
  end,
})
define_binary("div", VX.DIV, {
  text = "Divides elementwise: a / b, which is how it is written.",
  also = { "divide", "true_divide" },
  gradient = function(dy, _, b, y, needs)
    local over = binary("div", VX.DIV, dy, b)
    return over, needs[2] and scaled(binary("mul", VX.MUL, over, y), -1)
  end,
  low = 0.5, high = 2,
})

--- Gives the gradient of max and min to the chosen operand, to a on a tie.
local function chosen(dy, a, _, y)
  local from_a = binary("eq", VX.EQ, expanded(a, y:shape()), y)
  local da = binary("mul", VX.MUL, dy, from_a)
  return da, binary("sub", VX.SUB, dy, da)
end

define_binary("maximum", VX.MAX, {
  text = "Gives the larger of two elements; the gradient goes to it, to a on a tie.",
  also = { "fmax" },
  method = true,
  gradient = chosen,
})
define_binary("minimum", VX.MIN, {
  text = "Gives the smaller of two elements; the gradient goes to it, to a on a tie.",
  also = { "fmin" },
  method = true,
  gradient = chosen,
})

local TRUTH = "tensor f32 of the shape that both are broadcast to: 1 where it holds, else 0; no gradient"
define_binary("eq", VX.EQ, { text = "Says where a == b. A NaN equals nothing.", returns = TRUTH, method = true })
define_binary("lt", VX.LT, { text = "Says where a < b.", returns = TRUTH, also = { "less" }, method = true })
define_binary("le", VX.LE, { text = "Says where a <= b.", returns = TRUTH, also = { "less_equal" }, method = true })

-- -- Of one tensor ----------------------------------------------------------------------------------------------------

--- Raises where a parameter without a default is no number.
local function expect_numbers(name, args, ...)
  for i = 2, #args do
    local value = select(i - 1, ...)
    if type(value) ~= "number" and (value ~= nil or args[i].default == nil) then
      fail("%s: %s is %s, expected a number", name, args[i][1], tostring(value))
    end
  end
end

--- Defines y = f(x) by its kind. o.parameters: { name, meaning } of alpha and beta; o.values: theirs in the cases;
-- o.low, o.high: what x is drawn from in the cases.
local function define_unary(name, kind, o)
  local range, values, args = { low = o.low, high = o.high }, o.values or {}, { { "x", "tensor f32 of any shape" } }
  for _, parameter in ipairs(o.parameters or {}) do args[#args + 1] = parameter end
  define(name, {
    text = o.text,
    args = args,
    returns = "tensor f32 of x's shape",
    raises = #args > 1 and "where x is no f32 tensor, or a parameter no number" or "where x is no f32 tensor",
    calls = { "unary", "unary_backward" },
    also = o.also,
    source = o.source,
    method = o.method ~= false,
    forward = function(ctx, x, alpha, beta)
      x = contiguous(expect_tensor(x, name, "x"))
      if #args > 1 then expect_numbers(name, args, alpha, beta) end
      local y = new_like(x)
      op.unary(y, x, kind, alpha or 1, beta or 0)
      if ctx.needs then ctx.x, ctx.y, ctx.alpha, ctx.beta = x, y, alpha or 1, beta or 0 end
      return y
    end,
    backward = function(ctx, dy)
      local dx = new_like(dy)
      op.unary_backward(dx, dy, ctx.x, ctx.y, kind, ctx.alpha, ctx.beta)
      return dx
    end,
    cases = function(T) return { { T({ 3, 5 }, range), unpack(values) }, { T({ 33 }, range), unpack(values) } } end,
  })
end

define_unary("affine", VX.AFFINE, {
  text = "Computes alpha x + beta, in one pass.",
  parameters = { { "alpha", "number", default = 1 }, { "beta", "number", default = 0 } },
  values = { 2.5, -1 },
  method = false,
})
define_unary("exp", VX.EXP, { text = "Computes e^x." })
define_unary("log", VX.LOG, { text = "Computes the natural logarithm; -inf at 0, NaN below.", low = 0.3, high = 3 })
define_unary("sqrt", VX.SQRT, { text = "Computes the square root; NaN below 0.", low = 0.3, high = 3 })
define_unary("abs", VX.ABS, { text = "Computes |x|; its gradient at 0 is 0.", low = 0.2, high = 2 })
define_unary("square", VX.SQUARE, { text = "Computes x^2." })
define_unary("relu", VX.RELU, { text = "Computes max(x, 0); its gradient at 0 is 0.", low = 0.2, high = 2 })
define_unary("silu", VX.SILU, { text = "Computes x sigmoid(x), which is also called swish.", also = { "swish" } })
define_unary("gelu", VX.GELU, {
  text = "Computes x Phi(x), Phi the normal distribution function, by erf: PyTorch's gelu without approximation.",
  source = "Hendrycks and Gimpel 2016",
})
define_unary("sigmoid", VX.SIGMOID, { text = "Computes 1 / (1 + e^-x).", also = { "expit" } })
define_unary("tanh", VX.TANH, { text = "Computes the hyperbolic tangent." })
define_unary("clamp", VX.CLAMP, {
  text = "Limits x to the interval [low, high]; its gradient is 0 outside.",
  parameters = { { "low", "number" }, { "high", "number" } },
  values = { -0.5, 0.5 },
  also = { "clip" },
  low = -0.4, high = 0.4,
})
define_unary("power", VX.POWER, {
  text = "Computes x^n; x ^ n is how it is written.",
  parameters = { { "n", "number" } },
  values = { 1.5 },
  also = { "pow" },
  low = 0.3, high = 3,
  method = false,
})
define_unary("lgamma", VX.LGAMMA, {
  text = "Computes ln gamma(x); NaN below 0.",
  low = 0.3, high = 4,
  method = false,
})
define_unary("digamma", VX.DIGAMMA, {
  text = "Computes the derivative of ln gamma(x); NaN below 0.",
  low = 0.5, high = 4,
  method = false,
})
define_unary("trigamma", VX.TRIGAMMA, {
  text = "Computes the second derivative of ln gamma(x); NaN below 0.",
  also = { "polygamma" },
  low = 0.7, high = 4,
  method = false,
})
