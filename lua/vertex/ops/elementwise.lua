--- ops/elementwise.lua: one number of each operand in, one out. Two operands are broadcast: dimensions of size 1, and
-- missing ones in front, are repeated.

local common = require "vertex.ops.common"
local core = require "vertex.core"
local record = require "vertex.ops.record"

local op, VX, contiguous, fail, new_like = core.op, core.VX, core.contiguous, core.fail, core.new_like
local shape_text = core.shape_text
local binary, empty_on, expanded, expect_tensor = common.binary, common.empty_on, common.expanded, common.expect_tensor
local operand, scaled, sum_to = common.operand, common.scaled, common.sum_to
local define = record.define

-- -- Of two tensors ---------------------------------------------------------------------------------------------------

local OPERANDS = { { "a", "tensor f32 of any shape, or a number" },
  { "b", "tensor f32 of a shape that broadcasts with a's, or a number" } }

--- Defines y = a (kind) b, or b (kind) a where o.swapped is set. o.gradient(dy, a, b, y, needs) gives da and db, of y's
-- shape, from what o.keeps(needs) says it reads of a, b and y (nil: nothing); o.low, o.high: what the cases are drawn
-- from.
local function define_binary(name, kind, o)
  local gradient, range = o.gradient, { low = o.low, high = o.high }
  define(name, {
    text = o.text,
    args = OPERANDS,
    returns = o.returns or "tensor f32 of the shape that both are broadcast to",
    raises = "where a and b disagree on a size that is 1 in neither, or f32 does not hold the number",
    calls = { "binary" },
    also = o.also,
    method = o.method,
    forward = function(ctx, a, b)
      a, b = operand(a, b, name, "a"), operand(b, a, name, "b")
      if o.swapped then
        common.broadcast_shape(expect_tensor(a, name, "a"), expect_tensor(b, name, "b"), name)
        a, b = b, a
      end
      local y = binary(name, kind, a, b)
      if ctx.needs and gradient then
        local of_a, of_b, of_y = false, false, false
        if o.keeps then of_a, of_b, of_y = o.keeps(ctx.needs) end
        ctx.a, ctx.b, ctx.y = of_a and a or nil, of_b and b or nil, of_y and y or nil
        ctx.a_shape, ctx.b_shape = a:shape(), b:shape()
      end
      return y
    end,
    backward = gradient and function(ctx, dy)
      local needs, da, db = ctx.needs, gradient(dy, ctx.a, ctx.b, ctx.y, ctx.needs)
      return needs[1] and sum_to(da, ctx.a_shape), needs[2] and sum_to(db, ctx.b_shape)
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
  keeps = function(needs) return needs[2], needs[1] end,
  gradient = function(dy, a, b, _, needs)
    return needs[1] and binary("mul", VX.MUL, dy, b), needs[2] and binary("mul", VX.MUL, dy, a)
  end,
})
define_binary("div", VX.DIV, {
  text = "Divides elementwise: a / b, which is how it is written.",
  also = { "divide", "true_divide" },
  keeps = function(needs) return false, true, needs[2] end,
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
  keeps = function() return true, false, true end,
  gradient = chosen,
})
define_binary("minimum", VX.MIN, {
  text = "Gives the smaller of two elements; the gradient goes to it, to a on a tie.",
  also = { "fmin" },
  method = true,
  keeps = function() return true, false, true end,
  gradient = chosen,
})

local TRUTH = "tensor f32 of the shape that both are broadcast to: 1 where it holds, else 0; no gradient"
define_binary("eq", VX.EQ, { text = "Says where a == b. A NaN equals nothing.", returns = TRUTH, method = true })
define_binary("lt", VX.LT, { text = "Says where a < b.", returns = TRUTH, also = { "less" }, method = true })
define_binary("le", VX.LE, { text = "Says where a <= b.", returns = TRUTH, also = { "less_equal" }, method = true })
define_binary("gt", VX.LT, { text = "Says where a > b.", returns = TRUTH, also = { "greater" }, method = true,
  swapped = true })
define_binary("ge", VX.LE, { text = "Says where a >= b.", returns = TRUTH, also = { "greater_equal" }, method = true,
  swapped = true })

define("ne", {
  text = "Says where a differs from b. A NaN differs from everything.",
  args = OPERANDS,
  returns = TRUTH,
  raises = "where a and b disagree on a size that is 1 in neither",
  calls = { "binary" },
  also = { "not_equal" },
  method = true,
  forward = function(_, a, b)
    local y = binary("ne", VX.EQ, operand(a, b, "ne", "a"), operand(b, a, "ne", "b"))
    op.unary(y, y, VX.AFFINE, -1, 1)
    return y
  end,
  cases = function(T)
    local coarse = { dtype = "i32", high = 2 }
    return { { T({ 3, 4 }, coarse):to "f32", T({ 4 }, coarse):to "f32" }, { T { 5 }, T { 5 } } }
  end,
})

-- -- One of two -------------------------------------------------------------------------------------------------------

--- Gives the shape that three tensors are repeated to.
local function common_shape(condition, a, b)
  local s, c, out = common.broadcast_shape(a, b, "where"), condition:shape(), {}
  local n = math.max(#c, #s)
  for i = 0, n - 1 do
    local p, q = c[#c - i] or 1, s[#s - i] or 1
    if p ~= q and p ~= 1 and q ~= 1 then
      fail("where: condition %s, a %s and b %s disagree on a size", shape_text(condition), shape_text(a), shape_text(b))
    end
    out[n - i] = p == 1 and q or p
  end
  return out
end

--- Computes condition ? a : b of tensors that can be repeated to `shape`.
local function choose(shape, condition, a, b)
  local y = empty_on(a, shape)
  op.where(y, expanded(condition, shape), expanded(a, shape), expanded(b, shape))
  return y
end

define("where", {
  text = "Gives a where a condition holds and b elsewhere. Nothing of the other one passes, neither its value nor a "
    .. "gradient to it, even where that is a NaN.",
  args = { { "condition", "tensor of any shape and dtype; it holds where it is not 0" },
    { "a", "tensor f32 of any shape, or a number" },
    { "b", "tensor f32 of any shape, or a number; the shapes of the three broadcast" } },
  returns = "tensor f32 of the shape that all are broadcast to",
  raises = "where they disagree on a size that is 1 in none of them, or a and b are both numbers",
  calls = { "where" },
  forward = function(ctx, condition, a, b)
    a, b = operand(a, b, "where", "a"), operand(b, a, "where", "b")
    condition = expect_tensor(condition, "where", "condition"):to "f32"
    expect_tensor(a, "where", "a")
    expect_tensor(b, "where", "b")
    if ctx.needs then ctx.condition, ctx.a, ctx.b = condition, a:shape(), b:shape() end
    return choose(common_shape(condition, a, b), condition, a, b)
  end,
  backward = function(ctx, dy)
    local needs, shape, zero = ctx.needs, dy:shape(), empty_on(dy, { 1 }):zero()
    local da = needs[2] and sum_to(choose(shape, ctx.condition, dy, zero), ctx.a)
    local db = needs[3] and sum_to(choose(shape, ctx.condition, zero, dy), ctx.b)
    return nil, da, db
  end,
  cases = function(T)
    local function truth(shape) return T(shape, { dtype = "i32", high = 1 }) end
    return { { truth { 3, 4 }:to "f32", T { 3, 4 }, T { 3, 4 } }, { truth { 3, 1 }, T { 4 }, T { 2, 1, 1 } },
      { truth { 4 }:to "u8", 1.5, T { 3, 4 } }, { truth { 2, 3, 4 }, T { 1 }, T({ 4 }, { grad = false }) } }
  end,
})

define("masked_fill", {
  text = "Gives x with a number in place of the elements that a mask names.",
  args = { { "x", "tensor f32 of any shape" },
    { "mask", "tensor of any dtype and a shape that broadcasts with x's; it names where it is not 0" },
    { "value", "number" } },
  returns = "tensor f32 of the shape that both are broadcast to",
  raises = "where the shapes disagree, or value is no number that f32 holds",
  calls = { "where" },
  method = true,
  composite = true,
  forward = function(_, x, mask, value)
    if type(value) ~= "number" then fail("masked_fill: value is a %s, expected a number", type(value)) end
    common.expect_f32(value, "masked_fill", "value")
    expect_tensor(mask, "masked_fill", "mask")
    return record.ops.where(mask, value, expect_tensor(x, "masked_fill", "x"))
  end,
  cases = function(T)
    return { { T { 3, 4 }, T({ 4 }, { dtype = "i32", high = 1 }), 2 },
      { T { 5 }, T({ 5 }, { dtype = "i32", high = 1 }), -0.5 } }
  end,
})

-- -- Of one tensor ----------------------------------------------------------------------------------------------------

--- Raises where a parameter is no number that f32 holds; nil is one where it has a default.
local function expect_numbers(name, args, ...)
  for i = 2, #args do
    local value = select(i - 1, ...)
    if type(value) == "number" then
      common.expect_f32(value, name, args[i][1])
    elseif value ~= nil or args[i].default == nil then
      fail("%s: %s is %s, expected a number", name, args[i][1], tostring(value))
    end
  end
end

--- Defines y = f(x) by its kind. o.keeps: what its gradient reads, "x" (where nothing is said), "y", "both" or
-- "neither"; o.parameters: { name, meaning } of alpha and beta; o.values: theirs in the cases;
-- o.low, o.high: what x is drawn from in the cases.
local function define_unary(name, kind, o)
  local keeps_x = o.keeps == nil or o.keeps == "x" or o.keeps == "both"
  local keeps_y = o.keeps == "y" or o.keeps == "both"
  local range, values, args = { low = o.low, high = o.high }, o.values or {}, { { "x", "tensor f32 of any shape" } }
  for _, parameter in ipairs(o.parameters or {}) do args[#args + 1] = parameter end
  define(name, {
    text = o.text,
    args = args,
    returns = "tensor f32 of x's shape",
    raises = "where x is no f32 tensor" .. (#args > 1 and ", or a parameter no number that f32 holds" or ""),
    calls = { "unary", "unary_backward" },
    also = o.also,
    source = o.source,
    method = o.method ~= false,
    forward = function(ctx, x, alpha, beta)
      x = contiguous(expect_tensor(x, name, "x"))
      if #args > 1 then expect_numbers(name, args, alpha, beta) end
      local y = new_like(x)
      op.unary(y, x, kind, alpha or 1, beta or 0)
      if ctx.needs then
        ctx.x, ctx.y, ctx.alpha, ctx.beta = keeps_x and x or nil, keeps_y and y or nil, alpha or 1, beta or 0
      end
      return y
    end,
    backward = function(ctx, dy)
      local dx = new_like(dy)
      local x, y = ctx.x or ctx.y or dy, ctx.y or ctx.x or dy -- the op wants both, and looks at what it needs
      op.unary_backward(dx, dy, x, y, kind, ctx.alpha, ctx.beta)
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
  keeps = "neither",
})
define_unary("exp", VX.EXP, { text = "Computes e^x.", keeps = "y" })
define_unary("log", VX.LOG, { text = "Computes the natural logarithm; -inf at 0, NaN below.", low = 0.3, high = 3 })
define_unary("sqrt", VX.SQRT, { text = "Computes the square root; NaN below 0.", low = 0.3, high = 3,
  keeps = "y" })
define_unary("abs", VX.ABS, { text = "Computes |x|; its gradient at 0 is 0.", low = 0.2, high = 2 })
define_unary("square", VX.SQUARE, { text = "Computes x^2." })
define_unary("relu", VX.RELU, { text = "Computes max(x, 0); its gradient at 0 is 0.", low = 0.2, high = 2 })
define_unary("silu", VX.SILU, { text = "Computes x sigmoid(x), which is also called swish.", also = { "swish" },
  keeps = "both" })
define_unary("gelu", VX.GELU, {
  text = "Computes x Phi(x), Phi the normal distribution function, by erf: PyTorch's gelu without approximation.",
  source = "Hendrycks and Gimpel 2016",
})
define_unary("sigmoid", VX.SIGMOID, { text = "Computes 1 / (1 + e^-x).", also = { "expit" }, keeps = "y" })
define_unary("tanh", VX.TANH, { text = "Computes the hyperbolic tangent.", keeps = "y" })
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
define_unary("round", VX.ROUND, {
  text = "Rounds to the nearest integer, halves to the even one; the gradient is 0.",
  low = -0.45, high = 0.45,
  keeps = "neither",
})
define_unary("floor", VX.FLOOR, { text = "Rounds down to an integer; the gradient is 0.", low = 1.05, high = 1.95,
  keeps = "neither" })
define_unary("sign", VX.SIGN, {
  text = "Gives -1, 0 or 1 by the sign of x, and NaN of NaN; the gradient is 0.",
  also = { "sgn" },
  keeps = "neither",
  low = 0.2, high = 2,
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
