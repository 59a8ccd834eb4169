--- ops.lua: every differentiable op, forward beside backward, with the cases its tests run on. The numeric work is one
-- call into C each (core/ops.def); this file says which call, on which shapes, and what its gradient is.
--
-- An entry: define("name", { forward, backward, outputs, cases }), see tape.lua for the rules. `cases(T)` returns
-- argument lists for the tests, where T(shape, {low, high, grad = false, dtype}) makes a random tensor; each is checked
-- against a float64 loop (tests/ops_spec.lua), against finite differences, and twice for the same bits.

local core = require "vertex.core"
local dirichlet = require "vertex.ops.dirichlet_math"
local tape = require "vertex.tape"

local C, call, handle, new, new_like = core.C, core.call, core.handle, core.new, core.new_like
local gradient_like = tape.gradient_like
local Tensor, is_tensor, contiguous, fail = core.Tensor, core.is_tensor, core.contiguous, core.fail
local shape_text = core.shape_text

local ops = {}      -- name → function
local registry = {} -- array of the entries, for tests and documentation
ops.registry = registry

local function define(name, op)
  op.name = name
  registry[#registry + 1] = op
  registry[name] = op
  ops[name] = tape.recorded(op)
end

local function expect_tensor(x, op, name)
  if not is_tensor(x) then fail("%s: %s is a %s, expected a tensor", op, name, type(x)) end
  return x
end

local function product(list, first, last)
  local n = 1
  for i = first or 1, last or #list do n = n * list[i] end
  return n
end

--- An uninitialized tensor on x's device.
local function beside(x, shape, dtype) return new(shape, { dtype = dtype, device = C.vx_device(handle(x)) }) end

--- A contiguous view of a contiguous tensor under another shape, unrecorded.
local function shaped(x, shape)
  local stride, s = {}, 1
  for i = #shape, 1, -1 do
    stride[i] = s
    s = s * math.max(shape[i], 1)
  end
  return core.view(x, shape, stride, 0)
end

--- x as rows: (everything but the last dimension, last dimension).
local function rows(x)
  local s = x:shape()
  local c = s[#s] or 1
  return shaped(contiguous(x), { product(s, 1, #s - 1), c }), s
end

local function dimension(x, d, op)
  local n = x:dim()
  local i = d < 0 and n + d + 1 or d
  if i < 1 or i > n or i ~= math.floor(i) then
    fail("%s: dimension %s of a tensor %s", op, tostring(d), shape_text(x))
  end
  return i
end

-- -- Views: no copy, their gradient is the view undone ----------------------------------------------------------------

define("reshape", {
  bodies = true,
  forward = function(ctx, x, shape)
    expect_tensor(x, "reshape", "x")
    local target, unknown, known = {}, nil, 1
    for i = 1, #shape do
      target[i] = shape[i]
      if shape[i] == -1 and not unknown then unknown = i else known = known * shape[i] end
    end
    if unknown then target[unknown] = known > 0 and x:numel() / known or 0 end
    if product(target) ~= x:numel() or (unknown and target[unknown] ~= math.floor(target[unknown])) then
      fail("reshape: x %s has %d elements, the shape %s asks for another number", shape_text(x), x:numel(),
        shape_text(shape))
    end
    if ctx.needs then ctx.shape = x:shape() end
    return shaped(contiguous(x), target)
  end,
  backward = function(ctx, dy) return shaped(dy, ctx.shape) end,
  cases = function(T) return { { T { 2, 6 }, { 3, 4 } }, { T { 4, 3 }, { 2, -1 } }, { T { 1 }, {} } } end,
})

--- x with size-1 dimensions repeated to `shape` (new ones in front), by stride 0.
local function expanded(x, shape)
  local s, st = x:shape(), x:strides()
  local stride, extra = {}, #shape - #s
  for i = 1, #shape do
    local own = s[i - extra]
    if i <= extra or (own == 1 and shape[i] ~= 1) then
      stride[i] = 0
    elseif own == shape[i] then
      stride[i] = st[i - extra]
    else
      return nil
    end
  end
  return core.view(x, shape, stride, 0)
end

--- The sum of g over the dimensions along which a tensor of `shape` was repeated.
local function sum_to(g, shape)
  local gs = g:shape()
  local extra = #gs - #shape
  local kept, same = {}, extra == 0
  for i = 1, #gs do
    kept[i] = i <= extra and 1 or shape[i - extra]
    same = same and kept[i] == gs[i]
  end
  if same then return g end
  local y = beside(g, kept)
  call(C.vx_reduce, y._h, handle(g), C.VX_REDUCE_SUM)
  return extra > 0 and shaped(y, shape) or y
end

define("expand", {
  forward = function(ctx, x, shape)
    ctx.shape = ctx.needs and x:shape()
    local y = #shape >= x:dim() and expanded(expect_tensor(x, "expand", "x"), shape)
    return y or fail("expand: x %s cannot be repeated to %s", shape_text(x), shape_text(shape))
  end,
  backward = function(ctx, dy) return sum_to(dy, ctx.shape) end,
  cases = function(T) return { { T { 1, 3 }, { 4, 3 } }, { T { 3 }, { 2, 3 } } } end,
})

--- Strided view of x given by (shape, stride, offset); gradient: the same window of a zero tensor.
local function windowed(name, window, cases)
  define(name, {
    bodies = true,
    forward = function(ctx, x, ...)
      expect_tensor(x, name, "x")
      local shape, stride, offset = window(x, ...)
      if ctx.needs then
        ctx.whole = x:shape()
        ctx.args = { ... }
      end
      return core.view(x, shape, stride, offset)
    end,
    backward = function(ctx, dy)
      local dx = beside(dy, ctx.whole, dy:dtype()):zero()
      local shape, stride, offset = window(dx, unpack(ctx.args))
      call(C.vx_convert, core.view(dx, shape, stride, offset)._h, dy._h)
      return dx
    end,
    cases = cases,
  })
end

windowed("narrow", function(x, d, first, count)
  local shape, stride = x:shape(), x:strides()
  d = dimension(x, d, "narrow")
  if first < 1 or count < 0 or first + count - 1 > shape[d] then
    fail("narrow: %d elements from %d on of dimension %d of x %s", count, first, d, shape_text(x))
  end
  shape[d] = count
  return shape, stride, (first - 1) * stride[d]
end, function(T) return { { T { 4, 5 }, 2, 2, 3 }, { T { 4, 5 }, 1, 1, 1 }, { T { 2, 3, 4 }, -1, 2, 2 } } end)

windowed("select", function(x, d, index)
  local shape, stride = x:shape(), x:strides()
  d = dimension(x, d, "select")
  local i = index < 0 and shape[d] + index + 1 or index
  if i < 1 or i > shape[d] or i ~= math.floor(i) then
    fail("index %s of dimension %d of x %s", tostring(index), d, shape_text(x))
  end
  local offset = (i - 1) * stride[d]
  table.remove(shape, d)
  table.remove(stride, d)
  return shape, stride, offset
end, function(T) return { { T { 4, 5 }, 1, 2 }, { T { 4, 5 }, 2, -1 } } end)

windowed("transpose", function(x, a, b)
  local shape, stride = x:shape(), x:strides()
  a, b = dimension(x, a, "transpose"), dimension(x, b, "transpose")
  shape[a], shape[b] = shape[b], shape[a]
  stride[a], stride[b] = stride[b], stride[a]
  return shape, stride, 0
end, function(T) return { { T { 4, 5 }, 1, 2 }, { T { 2, 3, 4 }, 1, -1 } } end)

define("contiguous", {
  bodies = true,
  forward = function(_, x)
    if x:is_contiguous() then return x:detach() end
    return contiguous(x)
  end,
  backward = function(_, dy) return dy end,
  cases = function(T) return { { T { 2, 3 } } } end,
})

define("cast", { -- x in another dtype, "f32" or "bf16"
  bodies = true,
  forward = function(ctx, x, dtype)
    if expect_tensor(x, "cast", "x"):dtype() ~= "f32" and x:dtype() ~= "bf16" then
      fail("cast: x %s is %s, expected f32 or bf16", shape_text(x), x:dtype())
    end
    if dtype ~= "f32" and dtype ~= "bf16" then fail("cast: '%s', expected f32 or bf16", tostring(dtype)) end
    ctx.dtype = x:dtype()
    if ctx.dtype == dtype then return x:detach() end
    return x:to(dtype)
  end,
  backward = function(ctx, dy) return dy:to(ctx.dtype) end,
  cases = function(T) return { { T { 2, 3 }, "f32" } } end,
})
tape.cast = ops.cast

define("cat", {
  forward = function(ctx, d, ...)
    local parts = { ... }
    if #parts == 0 then fail "cat: no tensors" end
    local first = expect_tensor(parts[1], "cat", "tensor 1")
    local shape = first:shape()
    d = dimension(first, d, "cat")
    local total = 0
    for i, x in ipairs(parts) do
      expect_tensor(x, "cat", "tensor " .. i)
      local s = x:shape()
      total = total + (s[d] or 0)
      s[d] = shape[d]
      if shape_text(s) ~= shape_text(shape) then
        fail("cat: %s and %s disagree outside dimension %d", shape_text(first), shape_text(x), d)
      end
    end
    shape[d] = total
    local y, at = beside(first, shape, first:dtype()), 1
    ctx.d, ctx.counts = d, {}
    for i, x in ipairs(parts) do
      ctx.counts[i] = x:size(d)
      call(C.vx_convert, ops.narrow(y, d, at, ctx.counts[i])._h, handle(x))
      at = at + ctx.counts[i]
    end
    return y
  end,
  backward = function(ctx, dy)
    local g, at = {}, 1
    for i, n in ipairs(ctx.counts) do
      g[i] = ops.narrow(dy, ctx.d, at, n)
      at = at + n
    end
    return nil, unpack(g)
  end,
  cases = function(T) return { { 1, T { 2, 3 }, T { 1, 3 } }, { -1, T { 2, 3 }, T { 2, 2 } } } end,
})

-- -- Elementwise ------------------------------------------------------------------------------------------------------

local function broadcast_shape(a, b, op)
  local sa, sb = a:shape(), b:shape()
  local n, s = math.max(#sa, #sb), {}
  for i = 0, n - 1 do
    local p, q = sa[#sa - i] or 1, sb[#sb - i] or 1
    if p ~= q and p ~= 1 and q ~= 1 then
      fail("%s: a %s and b %s disagree on a size", op, shape_text(a), shape_text(b))
    end
    s[n - i] = p == 1 and q or p
  end
  return s
end

local function binary(name, kind, a, b)
  expect_tensor(a, name, "a")
  expect_tensor(b, name, "b")
  local s = broadcast_shape(a, b, name)
  local y = beside(a, s)
  call(C.vx_binary, y._h, handle(expanded(a, s)), handle(expanded(b, s)), kind)
  return y
end

local function define_binary(name, kind, gradient, low, high)
  define(name, {
    forward = function(ctx, a, b)
      local y = binary(name, kind, a, b)
      if ctx.needs then ctx.a, ctx.b, ctx.y = a, b, y end
      return y
    end,
    backward = function(ctx, dy)
      local needs, da, db = ctx.needs, gradient(dy, ctx.a, ctx.b, ctx.y, ctx.needs)
      return needs[1] and sum_to(da, ctx.a:shape()), needs[2] and sum_to(db, ctx.b:shape())
    end,
    cases = function(T)
      local range = { low = low, high = high }
      return { { T({ 3, 4 }, range), T({ 3, 4 }, range) }, { T({ 3, 4 }, range), T({ 4 }, range) },
        { T({ 3, 1 }, range), T({ 1, 4 }, range) },
        { T({ 2, 3, 4 }, range), T({ 1 }, range) } }
    end,
  })
end

local function unary_raw(kind, x, alpha, beta)
  local y = new_like(x)
  call(C.vx_unary, y._h, handle(x), kind, alpha or 1, beta or 0)
  return y
end
local function scaled(x, alpha) return unary_raw(C.VX_AFFINE, x, alpha, 0) end

define_binary("add", C.VX_ADD, function(dy) return dy, dy end)
define_binary("sub", C.VX_SUB, function(dy, _, _, _, needs) return dy, needs[2] and scaled(dy, -1) end)
define_binary("mul", C.VX_MUL, function(dy, a, b, _, needs)
  return needs[1] and binary("mul", C.VX_MUL, dy, b), needs[2] and binary("mul", C.VX_MUL, dy, a)
end)
define_binary("div", C.VX_DIV, function(dy, _, b, y, needs)
  local over = binary("div", C.VX_DIV, dy, b)
  return over, needs[2] and scaled(binary("mul", C.VX_MUL, over, y), -1)
end, 0.5, 2)

--- Gradient of max and min: to the chosen operand, to a on a tie.
local function chosen(dy, a, _, y)
  local from_a = binary("eq", C.VX_EQ, expanded(a, y:shape()), y)
  local da = binary("mul", C.VX_MUL, dy, from_a)
  return da, binary("sub", C.VX_SUB, dy, da)
end
define_binary("maximum", C.VX_MAX, chosen)
define_binary("minimum", C.VX_MIN, chosen)

--- 0 or 1; no gradient.
function ops.eq(a, b) return binary("eq", C.VX_EQ, a, b) end
function ops.lt(a, b) return binary("lt", C.VX_LT, a, b) end
function ops.le(a, b) return binary("le", C.VX_LE, a, b) end

local function define_unary(name, kind, low, high, parameters)
  define(name, {
    forward = function(ctx, x, alpha, beta)
      x = contiguous(expect_tensor(x, name, "x"))
      local y = new_like(x)
      call(C.vx_unary, y._h, x._h, kind, alpha or 1, beta or 0)
      if ctx.needs then ctx.x, ctx.y, ctx.alpha, ctx.beta = x, y, alpha or 1, beta or 0 end
      return y
    end,
    backward = function(ctx, dy)
      local dx = new_like(dy)
      call(C.vx_unary_backward, dx._h, dy._h, handle(ctx.x), handle(ctx.y), kind, ctx.alpha, ctx.beta)
      return dx
    end,
    cases = function(T)
      local range = { low = low, high = high }
      return { { T({ 3, 5 }, range), unpack(parameters or {}) }, { T({ 33 }, range), unpack(parameters or {}) } }
    end,
  })
end

define_unary("affine", C.VX_AFFINE, nil, nil, { 2.5, -1 }) -- alpha x + beta
define_unary("exp", C.VX_EXP)
define_unary("log", C.VX_LOG, 0.3, 3)
define_unary("sqrt", C.VX_SQRT, 0.3, 3)
define_unary("abs", C.VX_ABS, 0.2, 2)
define_unary("square", C.VX_SQUARE)
define_unary("relu", C.VX_RELU, 0.2, 2)
define_unary("silu", C.VX_SILU)
define_unary("gelu", C.VX_GELU)
define_unary("sigmoid", C.VX_SIGMOID)
define_unary("tanh", C.VX_TANH)
define_unary("clamp", C.VX_CLAMP, -0.4, 0.4, { -0.5, 0.5 }) -- to [alpha, beta]
define_unary("power", C.VX_POWER, 0.3, 3, { 1.5 })          -- x^alpha
define_unary("lgamma", C.VX_LGAMMA, 0.3, 4)                 -- ln gamma(x), x > 0, and its first and second derivative
define_unary("digamma", C.VX_DIGAMMA, 0.5, 4)
define_unary("trigamma", C.VX_TRIGAMMA, 0.7, 4)

-- -- Reductions -------------------------------------------------------------------------------------------------------

--- Shape of x reduced over `dims` (a number, a list, or nil for all), with and without the reduced dimensions.
local function reduced_shape(x, dims, op)
  local kept, short = x:shape(), {}
  if dims == nil then
    for i = 1, #kept do kept[i] = 1 end
    return kept, {}
  end
  local over = {}
  for _, d in ipairs(type(dims) == "table" and dims or { dims }) do over[dimension(x, d, op)] = true end
  for i = 1, #kept do
    if over[i] then kept[i] = 1 else short[#short + 1] = kept[i] end
  end
  return kept, short
end

local function define_reduction(name, kind, gradient)
  define(name, {
    forward = function(ctx, x, dims, keep)
      expect_tensor(x, name, "x")
      local kept, short = reduced_shape(x, dims, name)
      local y = beside(x, kept)
      call(C.vx_reduce, y._h, handle(x), kind)
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

define_reduction("sum", C.VX_REDUCE_SUM, function(_, dy) return dy end)
define_reduction("mean", C.VX_REDUCE_MEAN,
  function(ctx, dy) return scaled(contiguous(dy), product(ctx.kept) / ctx.x:numel()) end)

--- The gradient of max and min is shared among equal elements.
local function extreme(ctx, dy)
  local hit = binary("eq", C.VX_EQ, ctx.x, expanded(ctx.y, ctx.x:shape()))
  local count = beside(hit, ctx.kept)
  call(C.vx_reduce, count._h, hit._h, C.VX_REDUCE_SUM)
  return binary("mul", C.VX_MUL, dy, binary("div", C.VX_DIV, hit, count))
end
define_reduction("max", C.VX_REDUCE_MAX, extreme)
define_reduction("min", C.VX_REDUCE_MIN, extreme)

--- Index (0-based, i32) of the largest element along the last dimension; ties to the lowest.
function ops.argmax(x)
  local flat, s = rows(expect_tensor(x, "argmax", "x"))
  local index = beside(x, { flat:size(1) }, "i32")
  call(C.vx_argmax, index._h, flat._h)
  s[#s] = nil
  return shaped(index, s)
end

--- Number of rows (last dimension) with a NaN or Inf, and the first such row (0-based; nil where there is none).
function ops.nonfinite(x)
  local found = beside(x, { 2 }, "i32")
  call(C.vx_nonfinite, found._h, (rows(expect_tensor(x, "nonfinite", "x")))._h)
  local t = found:totable()
  return t[1], t[1] > 0 and t[2] or nil
end

-- -- Linear algebra ---------------------------------------------------------------------------------------------------

local function gemm(c, a, b, bias, beta)
  call(C.vx_gemm, handle(c), handle(a), handle(b), bias and handle(bias), 1, beta or 0)
end

--- A 2-D or 3-D operand as (B, rows, columns) whose rows or columns have stride 1; batch 1 is repeated to `batch`.
local function operand(x, batch)
  local s, st = x:shape(), x:strides()
  if #s == 2 then
    table.insert(s, 1, 1)
    table.insert(st, 1, 0)
  end
  if not (st[2] == 1 or st[3] == 1 or s[2] == 1 or s[3] == 1) then return operand(contiguous(x), batch) end
  if s[2] == 1 and st[3] ~= 1 and st[2] ~= 1 or s[3] == 1 and st[2] ~= 1 and st[3] ~= 1 then
    return operand(contiguous(x), batch)
  end
  if batch and s[1] == 1 then
    s[1], st[1] = batch, 0
  end
  return core.view(x, s, st, 0), s
end

local function flipped(x)
  local s, st = x:shape(), x:strides()
  local n = #s
  s[n], s[n - 1], st[n], st[n - 1] = s[n - 1], s[n], st[n - 1], st[n]
  return core.view(x, s, st, 0)
end

local function multiply(a, b)
  local batch = math.max(a:dim() == 3 and a:size(1) or 1, b:dim() == 3 and b:size(1) or 1)
  local va, sa = operand(a, batch)
  local vb, sb = operand(b, batch)
  if sa[3] ~= sb[2] then fail("matmul: a %s and b %s disagree on the inner size", shape_text(a), shape_text(b)) end
  if sa[1] ~= sb[1] then fail("matmul: a %s and b %s disagree on the batch", shape_text(a), shape_text(b)) end
  local y = beside(a, { sa[1], sa[2], sb[3] })
  gemm(y, va, vb)
  if a:dim() == 2 and b:dim() == 2 then return shaped(y, { sa[2], sb[3] }) end
  return y
end

define("matmul", { -- (m,k)(k,n), (B,m,k)(B,k,n), or either with a 2-D partner
  forward = function(ctx, a, b)
    for name, x in pairs { a = expect_tensor(a, "matmul", "a"), b = expect_tensor(b, "matmul", "b") } do
      if x:dim() ~= 2 and x:dim() ~= 3 then fail("matmul: %s %s should have 2 or 3 dimensions", name, shape_text(x)) end
    end
    if ctx.needs then ctx.a, ctx.b = a, b end
    return multiply(a, b)
  end,
  backward = function(ctx, dy)
    local a, b, needs = ctx.a, ctx.b, ctx.needs
    local da = needs[1] and multiply(dy, flipped(b))
    local db = needs[2] and multiply(flipped(a), dy)
    return da and sum_to(da, a:shape()), db and sum_to(db, b:shape())
  end,
  cases = function(T)
    return { { T { 3, 4 }, T { 4, 5 } }, { T { 2, 3, 4 }, T { 2, 4, 5 } }, { T { 2, 3, 4 }, T { 4, 2 } },
      { T { 3, 4 }, T { 2, 4, 5 } },
      { T { 1, 1 }, T { 1, 7 } } }
  end,
})

define("linear", { -- y = x wT + bias; x (..., in), w (out, in), bias (out) or nil
  forward = function(ctx, x, w, bias)
    expect_tensor(x, "linear", "x")
    expect_tensor(w, "linear", "w")
    local flat, s = rows(x)
    if w:dim() ~= 2 or w:size(2) ~= flat:size(2) then
      fail("linear: x %s and w %s disagree on the input width", shape_text(x), shape_text(w))
    end
    if bias and bias:numel() ~= w:size(1) then
      fail("linear: w %s and bias %s disagree on the output width", shape_text(w), shape_text(bias))
    end
    s[math.max(#s, 1)] = w:size(1)
    local y = beside(x, { 1, flat:size(1), w:size(1) })
    gemm(y, (operand(flat)), (operand(flipped(w))), bias)
    if ctx.needs then ctx.x, ctx.w, ctx.flat = x, w, flat end
    return shaped(y, s)
  end,
  backward = function(ctx, dy)
    local needs, w, flat = ctx.needs, ctx.w, ctx.flat
    local g = rows(dy)
    local dx, dw, db
    if needs[1] then dx = shaped(multiply(g, w), ctx.x:shape()) end
    if needs[2] then dw = multiply(flipped(g), flat) end
    if needs[3] then db = sum_to(g, { w:size(1) }) end
    return dx, dw, db
  end,
  cases = function(T) return { { T { 3, 4 }, T { 5, 4 }, T { 5 } }, { T { 2, 3, 4 }, T { 2, 4 } },
    { T { 40, 7 }, T { 17, 7 }, T { 17 } } } end,
})

-- -- Convolution, channels last ---------------------------------------------------------------------------------------

--- dtype of an image that an op makes beside x: bf16 where vx.autocast says so and x is on a GPU, unless `output` is
-- "f32".
local function body_dtype(x, output, op)
  if output ~= nil and output ~= "f32" then fail("%s: output '%s', expected \"f32\" or nil", op, tostring(output)) end
  return output or C.vx_autocast(-1) == C.VX_BF16 and C.vx_device(handle(x)) ~= 0 and "bf16" or "f32"
end

-- dense; x (B,H,W,C), w (3,3,C,O), bias (O) or nil; stride 1, zero padding; output "f32": also under vx.autocast
define("conv2d", {
  bodies = true,
  forward = function(ctx, x, w, bias, output)
    x = contiguous(expect_tensor(x, "conv2d", "x"))
    expect_tensor(w, "conv2d", "w")
    local s = x:shape()
    s[#s] = w:size(-1)
    local y = beside(x, s, body_dtype(x, output, "conv2d"))
    call(C.vx_conv2d, y._h, x._h, handle(w), bias and handle(bias))
    if ctx.needs then ctx.x, ctx.w, ctx.bias = x, w, bias end
    return y
  end,
  backward = function(ctx, dy)
    local needs, dx, dw, db = ctx.needs, nil, nil, nil
    if needs[1] then
      dx = new_like(ctx.x)
      call(C.vx_conv2d_backward_input, dx._h, dy._h, handle(ctx.w))
    end
    if needs[2] or needs[3] then
      dw, db = gradient_like(ctx.w), ctx.bias and gradient_like(ctx.bias)
      call(C.vx_conv2d_backward_weight, dw._h, db and db._h, handle(ctx.x), dy._h)
    end
    return dx, dw, db
  end,
  cases = function(T)
    return { { T { 2, 5, 4, 3 }, T { 3, 3, 3, 6 }, T { 6 } }, { T { 1, 1, 1, 2 }, T { 3, 3, 2, 1 } },
      { T { 1, 3, 7, 17 }, T { 3, 3, 17, 3 } } }
  end,
})

define("depthwise_conv2d", { -- x (B,H,W,C), w (3,3,C), bias (C) or nil, stride 1 or 2
  forward = function(ctx, x, w, bias, stride)
    x = contiguous(expect_tensor(x, "depthwise_conv2d", "x"))
    expect_tensor(w, "depthwise_conv2d", "w")
    stride = stride or 1
    local s = x:shape()
    if #s ~= 4 then fail("depthwise_conv2d: x %s should have the shape (B,H,W,C)", shape_text(x)) end
    if stride ~= 1 and stride ~= 2 then fail("depthwise_conv2d: stride %s, expected 1 or 2", tostring(stride)) end
    local y = beside(x, { s[1], math.ceil(s[2] / stride), math.ceil(s[3] / stride), s[4] })
    call(C.vx_depthwise_conv2d, y._h, x._h, handle(w), bias and handle(bias), stride)
    if ctx.needs then ctx.x, ctx.w, ctx.bias, ctx.stride = x, w, bias, stride end
    return y
  end,
  backward = function(ctx, dy)
    local needs, dx, dw, db = ctx.needs, nil, nil, nil
    if needs[1] then
      dx = new_like(ctx.x)
      call(C.vx_depthwise_conv2d_backward_input, dx._h, dy._h, handle(ctx.w), ctx.stride)
    end
    if needs[2] or needs[3] then
      dw, db = gradient_like(ctx.w), ctx.bias and gradient_like(ctx.bias)
      call(C.vx_depthwise_conv2d_backward_weight, dw._h, db and db._h, handle(ctx.x), dy._h, ctx.stride)
    end
    return dx, dw, db
  end,
  cases = function(T)
    return { { T { 2, 5, 4, 3 }, T { 3, 3, 3 }, T { 3 } }, { T { 1, 5, 6, 17 }, T { 3, 3, 17 }, nil, 2 },
      { T { 1, 1, 2, 4 }, T { 3, 3, 4 }, T { 4 }, 2 } }
  end,
})

define("upsample2x", { -- nearest neighbour; (B,H,W,C) → (B,2H,2W,C)
  forward = function(_, x)
    x = contiguous(expect_tensor(x, "upsample2x", "x"))
    local s = x:shape()
    if #s ~= 4 then fail("upsample2x: x %s should have the shape (B,H,W,C)", shape_text(x)) end
    local y = beside(x, { s[1], 2 * s[2], 2 * s[3], s[4] })
    call(C.vx_upsample2x, y._h, x._h)
    return y
  end,
  backward = function(_, dy)
    local s = dy:shape()
    local dx = beside(dy, { s[1], s[2] / 2, s[3] / 2, s[4] })
    call(C.vx_upsample2x_backward, dx._h, dy._h)
    return dx
  end,
  cases = function(T) return { { T { 2, 3, 2, 5 } }, { T { 1, 1, 1, 1 } } } end,
})

local ACTIVATIONS = { none = C.VX_ACT_NONE, silu = C.VX_ACT_SILU, gelu = C.VX_ACT_GELU }
local function activation_number(name, op)
  return ACTIVATIONS[name or "none"] or fail("%s: activation '%s', expected none, silu or gelu", op, tostring(name))
end

--- sepconv2d(x, w, v, bias, gamma, beta, residual, options): pointwise(depthwise_conv2d(act(group_norm(x)))) +
-- residual, image by image in cache. x (B,H,W,C), w (3,3,C), v (O,C), bias (O) or nil; gamma and beta (C), or nil for
-- neither norm nor activation; residual like the result, or nil; options {groups, activation} of the norm, {stride = 1
-- or 2}, {up = 1 or 2}: nearest-neighbour enlargement before the convolution, {output = "f32"}: of this dtype under
-- vx.autocast too.
define("sepconv2d", {
  bodies = true,
  adds = true,
  forward = function(ctx, x, w, v, bias, gamma, beta, residual, options)
    x = contiguous(expect_tensor(x, "sepconv2d", "x"))
    local o = options or {}
    local s, stride, up = x:shape(), o.stride or 1, o.up or 1
    if #s ~= 4 then fail("sepconv2d: x %s should have the shape (B,H,W,C)", shape_text(x)) end
    local act = activation_number(o.activation, "sepconv2d")
    local dtype = body_dtype(x, o.output, "sepconv2d")
    local y = beside(x, { s[1], math.ceil(s[2] * up / stride), math.ceil(s[3] * up / stride),
      expect_tensor(v, "sepconv2d", "v"):size(1) }, dtype)
    local mean, rstd = gamma and beside(x, { s[1], o.groups or 1 }), gamma and beside(x, { s[1], o.groups or 1 })
    ctx.residual_dtype = residual and residual:dtype()
    residual = residual and contiguous(residual):to(dtype)
    call(C.vx_sepconv2d, y._h, handle(mean or nil), handle(rstd or nil), x._h, handle(gamma), handle(beta), handle(w),
      handle(v), handle(bias),
      handle(residual), act, 1e-5, stride, up)
    if ctx.needs then
      ctx.x, ctx.w, ctx.v, ctx.bias, ctx.gamma, ctx.beta, ctx.mean, ctx.rstd = x, w, v, bias, gamma, beta, mean or nil,
        rstd or nil
      ctx.act, ctx.stride, ctx.up = act, stride, up
    end
    return y
  end,
  backward = function(ctx, dy, _, before)
    local dx, dw, dv, db = new_like(ctx.x), gradient_like(ctx.w), gradient_like(ctx.v),
      ctx.bias and gradient_like(ctx.bias)
    local dgamma, dbeta = ctx.gamma and gradient_like(ctx.gamma), ctx.gamma and gradient_like(ctx.beta)
    call(C.vx_sepconv2d_backward, dx._h, handle(dgamma), handle(dbeta), dw._h, dv._h, handle(db), dy._h, handle(ctx.x),
      handle(ctx.gamma),
      handle(ctx.beta), handle(ctx.mean), handle(ctx.rstd), handle(ctx.w), handle(ctx.v), handle(before), ctx.act, 1e-5,
      ctx.stride, ctx.up)
    return dx, dw, dv, db, dgamma, dbeta, ctx.residual_dtype and dy:to(ctx.residual_dtype)
  end,
  cases = function(T)
    return { { T { 2, 4, 5, 3 }, T { 3, 3, 3 }, T { 6, 3 }, T { 6 } },
      { T { 2, 3, 4, 8 }, T { 3, 3, 8 }, T { 8, 8 }, T { 8 }, T { 8 }, T { 8 }, T { 2, 3, 4, 8 },
        { groups = 2, activation = "silu" } },
      { T { 1, 5, 4, 17 }, T { 3, 3, 17 }, T { 4, 17 }, nil, nil, nil, nil, { stride = 2 } },
      { T { 3, 2, 3, 4 }, T { 3, 3, 4 }, T { 5, 4 }, T { 5 }, T { 4 }, T { 4 }, nil,
        { up = 2, groups = 1, activation = "gelu" } } }
  end,
})

-- -- Normalization, softmax -------------------------------------------------------------------------------------------

define("group_norm", { -- x (B,...,C), gamma and beta (C); y = act(gamma (x - mean) / sd + beta)
  forward = function(ctx, x, gamma, beta, groups, activation, eps)
    local act = activation_number(activation, "group_norm")
    x = contiguous(expect_tensor(x, "group_norm", "x"))
    local s = x:shape()
    if #s < 2 then fail("group_norm: x %s should have the shape (B,...,C)", shape_text(x)) end
    local flat = shaped(x, { s[1], product(s, 2, #s - 1), s[#s] })
    local y, mean, rstd = new_like(flat), beside(x, { s[1], groups }), beside(x, { s[1], groups })
    call(C.vx_group_norm, y._h, mean._h, rstd._h, flat._h, handle(gamma), handle(beta), act, eps or 1e-5)
    if ctx.needs then
      ctx.x, ctx.gamma, ctx.beta, ctx.mean, ctx.rstd, ctx.act, ctx.shape = flat, gamma, beta, mean, rstd, act, s
    end
    return shaped(y, s)
  end,
  backward = function(ctx, dy)
    local dx, dgamma, dbeta = new_like(ctx.x), gradient_like(ctx.gamma), gradient_like(ctx.beta)
    call(C.vx_group_norm_backward, dx._h, dgamma._h, dbeta._h, handle(shaped(dy, ctx.x:shape())), handle(ctx.x),
      handle(ctx.gamma),
      handle(ctx.beta), handle(ctx.mean), handle(ctx.rstd), ctx.act)
    return shaped(dx, ctx.shape), dgamma, dbeta
  end,
  cases = function(T)
    return { { T { 2, 3, 3, 6 }, T { 6 }, T { 6 }, 3 }, { T { 2, 5, 8 }, T { 8 }, T { 8 }, 2, "silu" },
      { T { 1, 7, 4 }, T { 4 }, T { 4 }, 1, "gelu" } }
  end,
})

define("layer_norm", { -- over the last dimension
  forward = function(ctx, x, gamma, beta, eps)
    local flat, s = rows(expect_tensor(x, "layer_norm", "x"))
    local n = flat:size(1)
    local y, mean, rstd = new_like(flat), beside(x, { n }), beside(x, { n })
    call(C.vx_layer_norm, y._h, mean._h, rstd._h, flat._h, handle(gamma), handle(beta), eps or 1e-5)
    if ctx.needs then ctx.x, ctx.gamma, ctx.beta, ctx.mean, ctx.rstd, ctx.shape = flat, gamma, beta, mean, rstd, s end
    return shaped(y, s)
  end,
  backward = function(ctx, dy)
    local dx, dgamma, dbeta = new_like(ctx.x), gradient_like(ctx.gamma), gradient_like(ctx.beta)
    call(C.vx_layer_norm_backward, dx._h, dgamma._h, dbeta._h, (rows(dy))._h, handle(ctx.x), handle(ctx.gamma),
      handle(ctx.mean), handle(ctx.rstd))
    return shaped(dx, ctx.shape), dgamma, dbeta
  end,
  cases = function(T) return { { T { 3, 6 }, T { 6 }, T { 6 } }, { T { 2, 2, 19 }, T { 19 }, T { 19 } } } end,
})

local function define_softmax(name, log)
  define(name, { -- over the last dimension
    forward = function(ctx, x)
      local flat, s = rows(expect_tensor(x, name, "x"))
      local y = new_like(flat)
      call(C.vx_softmax, y._h, flat._h, log)
      ctx.y = ctx.needs and y
      return shaped(y, s)
    end,
    backward = function(ctx, dy)
      local dx = new_like(ctx.y)
      call(C.vx_softmax_backward, dx._h, (rows(dy))._h, handle(ctx.y), log)
      return shaped(dx, dy:shape())
    end,
    cases = function(T) return { { T { 3, 5 } }, { T({ 2, 2, 33 }, { low = -3, high = 3 }) } } end,
  })
end
define_softmax("softmax", 0)
define_softmax("log_softmax", 1)

-- -- Rows by index ----------------------------------------------------------------------------------------------------

define("gather", { -- y[n] = table[index[n]]; table (M,D), index i32 (...), y (...,D)
  forward = function(ctx, tab, index)
    expect_tensor(tab, "gather", "table")
    expect_tensor(index, "gather", "index")
    local s = index:shape()
    local flat = shaped(contiguous(index), { product(s) })
    local y = beside(tab, { product(s), tab:size(-1) }, tab:dtype())
    call(C.vx_gather, y._h, handle(contiguous(tab)), flat._h)
    if ctx.needs then ctx.index, ctx.shape = flat, tab:shape() end
    s[#s + 1] = tab:size(-1)
    return shaped(y, s)
  end,
  backward = function(ctx, dy)
    local dtable = beside(dy, ctx.shape):zero()
    call(C.vx_scatter_add, dtable._h, (rows(dy))._h, handle(ctx.index))
    return dtable
  end,
  cases = function(T) return { { T { 4, 3 }, T({ 6 }, { dtype = "i32", high = 3 }) },
    { T { 5, 17 }, T({ 2, 4 }, { dtype = "i32", high = 4 }) } } end,
})

--- Counts of each code: codes i32 (N,G) → i32 (G,M); added to `count` where that is given.
function ops.count_codes(codes, M, count)
  count = count or beside(codes, { codes:size(2), M }, "i32"):zero()
  call(C.vx_count_codes, handle(count), handle(codes))
  return count
end

-- -- Losses -----------------------------------------------------------------------------------------------------------

define("mse", { -- mean of (a - b)^2 over all elements; shape {}
  forward = function(ctx, a, b)
    a, b = contiguous(expect_tensor(a, "mse", "a")), contiguous(expect_tensor(b, "mse", "b"))
    local loss = beside(a, { 1 })
    call(C.vx_mse, loss._h, a._h, b._h)
    if ctx.needs then ctx.a, ctx.b = a, b end
    return shaped(loss, {})
  end,
  backward = function(ctx, dy)
    local d, g = {}, shaped(dy, { 1 })
    for i = 1, 2 do
      if ctx.needs[i] then
        d[i] = new_like(ctx.a)
        local x, other = ctx.a, ctx.b
        if i == 2 then x, other = other, x end
        call(C.vx_mse_backward, d[i]._h, handle(x), handle(other), g._h)
      end
    end
    return d[1], d[2]
  end,
  cases = function(T) return { { T { 3, 4 }, T { 3, 4 } }, { T { 100 }, T({ 100 }, { grad = false }) } } end,
})

-- -- Vector quantization ----------------------------------------------------------------------------------------------

local METRICS = { euclid = C.VX_EUCLID, cosine = C.VX_COSINE }
local ESTIMATORS = { ste = C.VX_STE, rotation = C.VX_ROTATION }
local SAMPLERS = { softmax = C.VX_SOFTMAX, sgumbel = C.VX_SOFT_GUMBEL, hgumbel = C.VX_HARD_GUMBEL }
local REGULARIZERS = { none = C.VX_REG_NONE, ppl = C.VX_REG_PPL, ["knn-ce"] = C.VX_REG_KNN_CE,
  ["knn-l2"] = C.VX_REG_KNN_L2 }
local PRECISIONS = { f32 = C.VX_F32, bf16 = C.VX_BF16 }

--- Index (0-based i32, (N,G)) of the code nearest to each row; z (N,G,D), codebook (G,M,D), metric "euclid" or
-- "cosine".
function ops.assign(z, codebook, metric)
  expect_tensor(z, "assign", "z")
  expect_tensor(codebook, "assign", "codebook")
  if not METRICS[metric] then fail("assign: metric '%s', expected euclid or cosine", tostring(metric)) end
  if z:dim() ~= 3 or codebook:dim() ~= 3 or z:size(2) ~= codebook:size(1) or z:size(3) ~= codebook:size(3) then
    fail("assign: z %s and codebook %s disagree, expected (N,G,D) and (G,M,D)", shape_text(z), shape_text(codebook))
  end
  local codes = beside(z, { z:size(1), z:size(2) }, "i32")
  if z:dtype() == "bf16" then z = z:to "f32" end
  call(C.vx_assign, codes._h, handle(contiguous(z)), handle(codebook), METRICS[metric])
  return codes
end

--- Hard quantization (Eq. 1-4, 10). z (N,G,D), codebook (G,M,D); options {metric, estimator, beta, reduction,
-- codebook_grad}. Returns y (N,G,D), reg {1}, codes (N,G).
define("quantize_hard", {
  outputs = 2,
  forward = function(ctx, z, codebook, options)
    z = contiguous(z)
    local codes = ops.assign(z, codebook, options.metric)
    local y, reg = new_like(z), beside(z, { 1 })
    local mean = options.reduction == "mean" and 1 or 0
    call(C.vx_hard_forward, y._h, reg._h, z._h, handle(codebook), codes._h, METRICS[options.metric], options.beta, mean)
    if ctx.needs then ctx.z, ctx.codebook, ctx.codes, ctx.options, ctx.mean = z, codebook, codes, options, mean end
    return y, reg, codes
  end,
  backward = function(ctx, dy, dreg)
    local z, o = ctx.z, ctx.options
    local dz, dcodebook = new_like(z), gradient_like(ctx.codebook)
    dy = dy or new_like(z):zero()
    dreg = dreg or beside(z, { 1 }):zero()
    call(C.vx_hard_backward, dz._h, dcodebook._h, dy._h, dreg._h, handle(z), handle(ctx.codebook), handle(ctx.codes),
      ESTIMATORS[o.estimator], METRICS[o.metric], o.beta, ctx.mean, o.codebook_grad and 1 or 0)
    return dz, dcodebook
  end,
})

--- Smoothed quantization (Eq. 5-8, 11-13) with its regularizer, one op each way. z (N,G,D), codebook (G,M,D), log_tau
-- {1}; options {sampler, regularizer, k, gumbel_tau, shards, seed, stream, noise (N,G,M) or nil, vertices i32 (G,S) or
-- nil, stats: false where nobody looks at mean_pi, precision "f32" (also nil) or "bf16"}. Returns y (N,G,D), reg {1},
-- codes (N,G), mean_pi (G,M) or nil, max_p {1}.
define("quantize_smooth", {
  outputs = 2,
  forward = function(ctx, z, codebook, log_tau, o)
    z = contiguous(z)
    local N, G, M = z:size(1), z:size(2), codebook:size(2)
    local precision = PRECISIONS[o.precision or "f32"]
    if not precision then fail("quantize_smooth: precision '%s', expected f32 or bf16", tostring(o.precision)) end
    local knn = o.regularizer == "knn-ce" or o.regularizer == "knn-l2"
    local s = {
      y = new_like(z), codes = beside(z, { N, G }, "i32"), lse = beside(z, { N, G, 2 }), sumsq = beside(z, { N, G }),
      soft = o.sampler == "hgumbel" and new_like(z) or nil,
      near = knn and beside(z, { G, o.vertices and o.vertices:size(2) or M, o.k }, "i32") or nil,
      mean_pi = (o.stats ~= false or o.regularizer == "ppl") and beside(z, { G, M }) or nil,
    }
    local reg, max_p = beside(z, { 1 }), beside(z, { 1 })
    call(C.vx_smooth_forward, s.y._h, s.codes._h, s.lse._h, s.sumsq._h, s.soft and s.soft._h, s.near and s.near._h,
      s.mean_pi and s.mean_pi._h,
      reg._h, max_p._h, z._h, handle(codebook), handle(log_tau), handle(o.noise), handle(o.vertices),
        SAMPLERS[o.sampler],
      REGULARIZERS[o.regularizer], o.gumbel_tau, o.shards, precision, o.seed, o.stream)
    if ctx.needs then
      ctx.z, ctx.codebook, ctx.log_tau, ctx.o, ctx.s, ctx.precision = z, codebook, log_tau, o, s, precision
    end
    return s.y, reg, s.codes, s.mean_pi, max_p
  end,
  backward = function(ctx, dy, dreg)
    local z, s, o = ctx.z, ctx.s, ctx.o
    local dz, dcodebook, dlog_tau = new_like(z), gradient_like(ctx.codebook), gradient_like(ctx.log_tau)
    dy = dy or new_like(z):zero()
    dreg = dreg or beside(z, { 1 }):zero()
    call(C.vx_smooth_backward, dz._h, dcodebook._h, dlog_tau._h, dy._h, dreg._h, handle(s.y), handle(s.codes),
      handle(s.lse),
      handle(s.sumsq), handle(s.soft), handle(s.near), handle(s.mean_pi), handle(z), handle(ctx.codebook),
        handle(ctx.log_tau),
      handle(o.noise), handle(o.vertices), SAMPLERS[o.sampler], REGULARIZERS[o.regularizer], o.gumbel_tau, o.shards,
      ctx.precision, o.seed, o.stream)
    return dz, dcodebook, dlog_tau
  end,
})

-- -- Nearest neighbours -----------------------------------------------------------------------------------------------

local KNN_METRICS = { ce = C.VX_KNN_CE, l2 = C.VX_KNN_L2 }

--- The K rows of p (N,M) that deviate least from each vertex e_m (Eq. 13). metric "ce": -log p[n][m] (a p below 2^-126
-- counts as that), "l2": |e_m - p[n]|^2; log: p holds logarithms. Returns the deviations (M,K), nearest first and ties
-- to the lowest row, and near i32 (M,K), the rows (0-based). The gradient goes through the deviations, not through the
-- choice.
define("vertex_knn", {
  forward = function(ctx, p, k, metric, log)
    p = contiguous(expect_tensor(p, "vertex_knn", "p"))
    if not KNN_METRICS[metric] then fail("vertex_knn: metric '%s', expected ce or l2", tostring(metric)) end
    if p:dim() ~= 2 then fail("vertex_knn: p %s should have the shape (N,M)", shape_text(p)) end
    local near, deviation = beside(p, { p:size(2), k }, "i32"), beside(p, { p:size(2), k })
    call(C.vx_vertex_knn, near._h, deviation._h, p._h, KNN_METRICS[metric], log and 1 or 0)
    if ctx.needs then ctx.p, ctx.near, ctx.metric, ctx.log = p, near, KNN_METRICS[metric], log and 1 or 0 end
    return deviation, near
  end,
  backward = function(ctx, dy)
    local dp = new_like(ctx.p)
    call(C.vx_vertex_knn_backward, dp._h, dy._h, handle(ctx.near), handle(ctx.p), ctx.metric, ctx.log)
    return dp
  end,
  cases = function(T)
    local p, l = { low = 0.05, high = 1 }, { low = -3, high = 0 }
    return { { T({ 7, 3 }, p), 2, "ce" }, { T({ 7, 3 }, p), 2, "l2" }, { T({ 9, 5 }, l), 9, "ce", true },
      { T({ 20, 18 }, l), 3, "l2", true } }
  end,
})

--- The K rows of y (L,D) nearest to each row of x (N,D); exclude_self: x and y are the same rows, and none is its own
-- neighbour. Returns the squared Euclidean distances (N,K), nearest first and ties to the lowest row, and near i32
-- (N,K), the rows (0-based).
define("knn", {
  forward = function(ctx, x, y, k, exclude_self)
    x, y = contiguous(expect_tensor(x, "knn", "x")), contiguous(expect_tensor(y, "knn", "y"))
    if x:dim() ~= 2 then fail("knn: x %s should have the shape (N,D)", shape_text(x)) end
    local near, distance = beside(x, { x:size(1), k }, "i32"), beside(x, { x:size(1), k })
    call(C.vx_knn, near._h, distance._h, x._h, y._h, exclude_self and 1 or 0)
    if ctx.needs then ctx.x, ctx.y, ctx.near = x, y, near end
    return distance, near
  end,
  backward = function(ctx, ddistance)
    local dx, dy = new_like(ctx.x), new_like(ctx.y)
    call(C.vx_knn_backward, dx._h, dy._h, ddistance._h, handle(ctx.near), handle(ctx.x), handle(ctx.y))
    return dx, dy
  end,
  cases = function(T)
    return { { T { 5, 3 }, T { 7, 3 }, 2 }, { T { 3, 1 }, T { 3, 1 }, 3 }, { T { 6, 2 }, T { 6, 2 }, 2, true },
      { T({ 4, 19 }, { grad = false }), T { 30, 19 }, 17 } }
  end,
})

-- -- Dirichlet distributions: two ops of M numbers, computed in float64 on the host -----------------------------------

local function expect_f32(x, op, name)
  if expect_tensor(x, op, name):dtype() ~= "f32" then
    fail("%s: %s %s is %s, expected f32", op, name, shape_text(x), x:dtype())
  end
  return x
end

--- The concentrations (M) that make the points of logarithms log_p (N,M) most likely. At the maximum mean_log(alpha) is
-- g, the mean of log_p, so d alpha / d g is the inverse of the Fisher information; the second result is the number of
-- Newton steps.
define("dirichlet_mle", {
  forward = function(ctx, log_p)
    if expect_f32(log_p, "dirichlet_mle", "log_p"):dim() ~= 2 or log_p:size(1) < 2 or log_p:size(2) < 2 then
      fail("dirichlet_mle: log_p %s should have the shape (N,M), N and M at least 2", shape_text(log_p))
    end
    local g = {}
    core.step(function() -- twice: the second mean is of what float32 left over in the first
      local first = tape.no_grad(ops.mean, log_p, 1)
      local rest = tape.no_grad(function() return ops.mean(ops.sub(log_p, first), 1) end):totable()
      for i, v in ipairs(first:totable()) do g[i] = v + (rest[i] == rest[i] and rest[i] or 0) end
    end)
    local alpha, steps = dirichlet.mle(g, 2e-6) -- logarithms of 10 are rounded to half of that
    if not alpha then fail("dirichlet_mle: %s", steps) end
    if ctx.needs then ctx.alpha, ctx.shape = alpha, log_p:shape() end
    return beside(log_p, { #alpha }):fromtable(alpha), steps
  end,
  backward = function(ctx, dalpha)
    local dg = dirichlet.solve_information(ctx.alpha, dalpha:totable())
    for i = 1, #dg do dg[i] = dg[i] / ctx.shape[1] end
    return expanded(beside(dalpha, { #dg }):fromtable(dg), ctx.shape)
  end,
  cases = function(T) return { { T({ 5, 3 }, { low = -4, high = -0.9 }) },
    { T({ 3, 2 }, { low = -3, high = -0.8 }) } } end,
})

--- KL(Dirichlet(a) | Dirichlet(b)), in nats; a and b (M). Shape {}.
define("dirichlet_kl", {
  forward = function(ctx, a, b)
    expect_f32(a, "dirichlet_kl", "a")
    if a:dim() ~= 1 or shape_text(a) ~= shape_text(expect_f32(b, "dirichlet_kl", "b")) then
      fail("dirichlet_kl: a %s and b %s should have one shape (M)", shape_text(a), shape_text(b))
    end
    local x, y = a:totable(), b:totable()
    for name, list in pairs { a = x, b = y } do
      for i, v in ipairs(list) do
        if not (v > 0 and v < math.huge) then
          fail("dirichlet_kl: concentration %d of %s is %g, expected a positive finite number", i - 1, name, v)
        end
      end
    end
    if ctx.needs then ctx.a, ctx.b = x, y end
    return beside(a, {}):fill(dirichlet.kl(x, y))
  end,
  backward = function(ctx, dy)
    local a, b, g = ctx.a, ctx.b, dy:item()
    local mean_a, mean_b, db, difference = dirichlet.mean_log(a), dirichlet.mean_log(b), {}, {}
    for i = 1, #a do
      db[i] = g * (mean_b[i] - mean_a[i])
      difference[i] = g * (a[i] - b[i])
    end
    return beside(dy, { #a }):fromtable(dirichlet.information(a, difference)), beside(dy, { #a }):fromtable(db)
  end,
  cases = function(T)
    local range = { low = 0.3, high = 4 }
    return { { T({ 3 }, range), T({ 3 }, range) }, { T({ 17 }, range), T({ 17 }, range) } }
  end,
})

-- -- Random, in place -------------------------------------------------------------------------------------------------

--- x uniform in (low, high), from `generator` or the default one.
function ops.uniform(x, low, high, generator)
  local seed, stream = (generator or core.default_generator):stream()
  call(C.vx_uniform, handle(x), seed, stream, low or 0, high or 1)
  return x
end

--- x normal, from `generator` or the default one.
function ops.normal(x, mean, deviation, generator)
  local seed, stream = (generator or core.default_generator):stream()
  call(C.vx_normal, handle(x), seed, stream, mean or 0, deviation or 1)
  return x
end

--- p (N,M): rows drawn from the Dirichlet distributions of concentrations alpha, (M) or (N,M); `log`: their logarithms.
function ops.dirichlet(p, alpha, log, generator)
  expect_tensor(p, "dirichlet", "p")
  expect_tensor(alpha, "dirichlet", "alpha")
  local a = expanded(alpha, p:shape())
  if not a then fail("dirichlet: p %s and alpha %s disagree on a size", shape_text(p), shape_text(alpha)) end
  local seed, stream = (generator or core.default_generator):stream()
  call(C.vx_dirichlet, handle(p), handle(a), seed, stream, log and 1 or 0)
  return p
end

--- A random order of 0 .. n-1, i32 (n), from `generator` or the default one.
function ops.permutation(n, generator, options)
  local seed, stream = (generator or core.default_generator):stream()
  local x = new({ n }, { dtype = "i32", device = options and options.device })
  call(C.vx_permutation, x._h, seed, stream)
  return x
end

-- -- Methods and operators --------------------------------------------------------------------------------------------

for _, name in ipairs { "reshape", "expand", "narrow", "select", "transpose", "contiguous", "matmul", "exp", "log",
  "sqrt", "abs", "square", "relu",
  "silu", "gelu", "sigmoid", "tanh", "clamp", "sum", "mean", "max", "min", "argmax", "softmax", "log_softmax", "eq",
    "lt", "le", "maximum",
  "minimum" } do
  Tensor[name] = ops[name]
end

--- Transpose of the last two dimensions.
function Tensor:t() return ops.transpose(self, -1, -2) end

--- A copy that gradients flow through.
function Tensor:clone() return ops.affine(self, 1, 0) end

local function arithmetic(tensors, with_number, with_swapped)
  return function(a, b)
    if type(b) == "number" then return with_number(a, b) end
    if type(a) == "number" then return with_swapped(b, a) end
    return tensors(a, b)
  end
end

Tensor.__add = arithmetic(ops.add, function(x, n) return ops.affine(x, 1, n) end,
  function(x, n) return ops.affine(x, 1, n) end)
Tensor.__sub = arithmetic(ops.sub, function(x, n) return ops.affine(x, 1, -n) end,
  function(x, n) return ops.affine(x, -1, n) end)
Tensor.__mul = arithmetic(ops.mul, function(x, n) return ops.affine(x, n, 0) end,
  function(x, n) return ops.affine(x, n, 0) end)
Tensor.__div = arithmetic(ops.div, function(x, n) return ops.affine(x, 1 / n, 0) end,
  function(x, n) return ops.affine(ops.power(x, -1), n, 0) end)
Tensor.__unm = function(x) return ops.affine(x, -1, 0) end
Tensor.__pow = function(x, n)
  if type(n) ~= "number" then fail("x ^ n: the exponent is a %s, expected a number", type(n)) end
  return ops.power(x, n)
end

--- x[i]: the i-th slice along the first dimension (1-based, negative from the end).
Tensor.__index = function(x, key)
  local method = Tensor[key]
  if method ~= nil then return method end
  if type(key) == "number" then return ops.select(x, 1, key) end
  return nil
end

--- x[i] = number or tensor.
Tensor.__newindex = function(x, key, value)
  if type(key) ~= "number" then return rawset(x, key, value) end
  local slice = tape.no_grad(ops.select, x, 1, key)
  if type(value) == "number" then slice:fill(value) else slice:copy(value) end
end

return ops
