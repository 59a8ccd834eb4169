--- ops/view.lua: other shapes of the same elements. Most copy nothing; their gradient is the view undone.

local check = require "vertex.check"
local common = require "vertex.ops.common"
local core = require "vertex.core"
local record = require "vertex.ops.record"
local tape = require "vertex.tape"

local op, contiguous, fail, shape_text = core.op, core.contiguous, core.fail, core.shape_text
local dimension, empty_on, expanded, expect_tensor = common.dimension, common.empty_on, common.expanded,
  common.expect_tensor
local product, shaped, sum_to = common.product, common.shaped, common.sum_to
local define, ops = record.define, record.ops

local DIM = "dimension, 1-based; negative counts from the end"

define("reshape", {
  text = "Gives the same elements, in their row-major order, under another shape; copies only where x is not "
    .. "contiguous.",
  args = { { "x", "tensor of any shape and dtype" },
    { "shape", "array of sizes; one of them may be -1, which is what remains" } },
  returns = "tensor of the given shape",
  raises = "where the shape has another number of elements than x",
  calls = {},
  method = true,
  takes_bf16 = true,
  forward = function(ctx, x, shape)
    expect_tensor(x, "reshape", "x")
    local target, unknown, known = {}, nil, 1
    for i = 1, #shape do
      target[i] = check.integer("reshape", ("shape[%d]"):format(i), shape[i], -1)
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

define("expand", {
  text = "Gives a view of x with its dimensions of size 1 repeated, and new ones in front; nothing is copied.",
  args = { { "x", "tensor of any shape" }, { "shape", "array of sizes, as many as x has dimensions or more" } },
  returns = "tensor of the given shape; do not write to it, since elements share memory",
  raises = "where a size differs from x's and x's is not 1",
  calls = {},
  also = { "broadcast_to", "expand_as", "repeat" },
  method = true,
  forward = function(ctx, x, shape)
    ctx.shape = ctx.needs and x:shape()
    for i = 1, #shape do check.integer("expand", ("shape[%d]"):format(i), shape[i], 0) end
    local y = #shape >= x:dim() and expanded(expect_tensor(x, "expand", "x"), shape)
    return y or fail("expand: x %s cannot be repeated to %s", shape_text(x), shape_text(shape))
  end,
  backward = function(ctx, dy) return sum_to(dy, ctx.shape) end,
  cases = function(T) return { { T { 1, 3 }, { 4, 3 } }, { T { 3 }, { 2, 3 } } } end,
})

--- Defines a strided view of x. o.window(x, ...) gives its shape, stride and offset; the gradient is the same window of
-- a zero tensor.
local function define_window(name, o)
  local window = o.window
  o.window, o.calls, o.method, o.takes_bf16 = nil, {}, true, true
  function o.forward(ctx, x, ...)
    expect_tensor(x, name, "x")
    local shape, stride, offset = window(x, ...)
    if ctx.needs then
      ctx.whole = x:shape()
      ctx.args = { ... }
    end
    return core.view(x, shape, stride, offset)
  end
  function o.backward(ctx, dy)
    local dx = empty_on(dy, ctx.whole, dy:dtype()):zero()
    local shape, stride, offset = window(dx, unpack(ctx.args))
    op.convert(core.view(dx, shape, stride, offset), dy)
    return dx
  end
  define(name, o)
end

define_window("narrow", {
  text = "Gives a view of `count` elements of one dimension; nothing is copied.",
  args = { { "x", "tensor of any shape and dtype" }, { "dim", DIM },
    { "first", "integer, the place of the first of them, 1-based" },
    { "count", "how many" } },
  returns = "tensor of x's shape, but of size `count` along dim",
  raises = "where first .. first + count - 1 leaves the dimension",
  also = { "slice" },
  window = function(x, d, first, count)
    local shape, stride = x:shape(), x:strides()
    d = dimension(x, d, "narrow")
    if first < 1 or count < 0 or first + count - 1 > shape[d] then
      fail("narrow: %d elements from %d on of dimension %d of x %s", count, first, d, shape_text(x))
    end
    shape[d] = count
    return shape, stride, (first - 1) * stride[d]
  end,
  cases = function(T) return { { T { 4, 5 }, 2, 2, 3 }, { T { 4, 5 }, 1, 1, 1 }, { T { 2, 3, 4 }, -1, 2, 2 } } end,
})

define_window("select", {
  text = "Gives a view of one slice of x, without its dimension; nothing is copied. x[i] is x:select(1, i).",
  args = { { "x", "tensor of any shape and dtype" }, { "dim", DIM },
    { "index", "integer, the place along it, 1-based; negative counts from the end" } },
  returns = "tensor of x's shape without dim",
  raises = "where index leaves the dimension",
  window = function(x, d, index)
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
  end,
  cases = function(T) return { { T { 4, 5 }, 1, 2 }, { T { 4, 5 }, 2, -1 } } end,
})

define_window("transpose", {
  text = "Gives a view of x with two dimensions exchanged; nothing is copied.",
  args = { { "x", "tensor of any shape and dtype" }, { "dim1", DIM }, { "dim2", DIM } },
  returns = "tensor of x's shape with the sizes of dim1 and dim2 exchanged",
  raises = "where x has no such dimension",
  also = { "swapaxes", "movedim" },
  window = function(x, a, b)
    local shape, stride = x:shape(), x:strides()
    a, b = dimension(x, a, "transpose"), dimension(x, b, "transpose")
    shape[a], shape[b] = shape[b], shape[a]
    stride[a], stride[b] = stride[b], stride[a]
    return shape, stride, 0
  end,
  cases = function(T) return { { T { 4, 5 }, 1, 2 }, { T { 2, 3, 4 }, 1, -1 } } end,
})

define("contiguous", {
  text = "Gives x with its elements in row-major order in memory; copies only where they are not.",
  args = { { "x", "tensor of any shape and dtype" } },
  returns = "tensor of x's shape",
  raises = "where x is no tensor",
  calls = {},
  method = true,
  takes_bf16 = true,
  forward = function(_, x)
    if expect_tensor(x, "contiguous", "x"):is_contiguous() then return x:detach() end
    return contiguous(x)
  end,
  backward = function(_, dy) return dy end,
  cases = function(T) return { { T { 2, 3 } } } end,
})

define("cast", {
  text = "Gives x in the other dtype of gradients; x:to(dtype) converts to any dtype, without a gradient.",
  args = { { "x", "tensor f32 or bf16 of any shape" }, { "dtype", '"f32" or "bf16", which keeps 8 bits of fraction' } },
  returns = "tensor of x's shape and of that dtype",
  raises = "where x or dtype is neither f32 nor bf16",
  calls = {},
  also = { "float", "bfloat16", "half", "type_as" },
  takes_bf16 = true,
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

-- -- Several tensors into one -----------------------------------------------------------------------------------------

--- Joins tensors along dimension d of the first; called by cat, which sorts out its arguments.
local join = tape.recorded {
  name = "cat",
  forward = function(ctx, d, ...)
    local parts = { ... }
    local first = parts[1]
    local shape = first:shape()
    d = dimension(first, d, "cat")
    local total = 0
    for _, x in ipairs(parts) do
      local s = x:shape()
      total = total + (s[d] or 0)
      if s[d] then s[d] = shape[d] end
      if shape_text(s) ~= shape_text(shape) then
        fail("cat: %s and %s disagree outside dimension %d", shape_text(first), shape_text(x), d)
      end
    end
    shape[d] = total
    local y, at = empty_on(first, shape, first:dtype()), 1
    ctx.d, ctx.counts = d, {}
    for i, x in ipairs(parts) do
      ctx.counts[i] = x:size(d)
      op.convert(ops.narrow(y, d, at, ctx.counts[i]), x)
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
}

-- A call of Lua takes some 8,000 arguments, and what records them looks at each in turn.
local AT_ONCE = 256

--- Joins a list of any length along dimension d: so many at once, then what came out.
local function join_all(d, list)
  if #list <= AT_ONCE then return join(d, unpack(list)) end
  local parts = {}
  for i = 1, #list, AT_ONCE do parts[#parts + 1] = join(d, unpack(list, i, math.min(i + AT_ONCE - 1, #list))) end
  return join_all(d, parts)
end

--- Gives the dimension and the array of tensors of (dim, a, b, ...), of (dim, { a, b }) and of ({ a, b }, dim = 1).
local function parts_of(what, ...)
  local dim, list = ...
  local n
  if type(dim) == "table" then
    dim, list = list or 1, dim
  elseif type(list) ~= "table" or core.is_tensor(list) then
    list, n = { select(2, ...) }, select("#", ...) - 1
  end
  n = n or #list
  if type(dim) ~= "number" then fail("%s: dim is %s, expected a number after the table", what, check.show(dim)) end
  if n == 0 then fail("%s: no tensors", what) end
  for i = 1, n do expect_tensor(list[i], what, "tensor " .. i) end
  return dim, list
end

local DIM_FIRST = { "dim", "dimension (1-based, negative counts from the end) or array of the tensors, which dim may "
  .. "follow: ({ a, b }, dim = 1)" }

define("cat", {
  text = "Joins tensors along one dimension.",
  args = { DIM_FIRST, { "...", "tensors of one dtype, and of one shape but for dim; or one table of them" } },
  returns = "tensor; its size along dim is the sum of theirs",
  raises = "where there are no tensors, or their shapes disagree outside dim",
  calls = {},
  also = { "concat", "concatenate", "hstack", "vstack" },
  composite = true,
  forward = function(_, ...)
    local dim, list = parts_of("cat", ...)
    return join_all(dim, list)
  end,
  cases = function(T) return { { 1, T { 2, 3 }, T { 1, 3 } }, { -1, T { 2, 3 }, T { 2, 2 } } } end,
})

define("stack", {
  text = "Joins tensors of one shape along a new dimension.",
  args = { DIM_FIRST, { "...", "tensors of one dtype and shape; or one table of them" } },
  returns = "tensor with one dimension more than they have, of as many elements as there are tensors",
  raises = "where there are no tensors, their shapes differ, or dim is none of the result's",
  calls = {},
  composite = true,
  forward = function(_, ...)
    local dim, list = parts_of("stack", ...)
    local first = list[1]
    local n, views = first:dim() + 1, {}
    local d = dim < 0 and n + dim + 1 or dim
    if d < 1 or d > n or d ~= math.floor(d) then fail("stack: dimension %s of a result with %d", tostring(dim), n) end
    for i, x in ipairs(list) do
      local shape = x:shape()
      if shape_text(x) ~= shape_text(first) then
        fail("stack: tensor %d is %s and the first %s", i, shape_text(x), shape_text(first))
      end
      table.insert(shape, d, 1)
      views[i] = ops.reshape(x, shape)
    end
    return join_all(d, views)
  end,
  cases = function(T) return { { 1, T { 2, 3 }, T { 2, 3 } }, { 2, T { 2, 3 }, T { 2, 3 }, T { 2, 3 } },
    { -1, T { 4 }, T { 4 } } } end,
})

define("detach", {
  text = "Gives the same elements, in the same memory, under a new handle that no gradient flows through.",
  args = { { "x", "tensor of any shape and dtype" } },
  returns = "tensor of x's shape and dtype",
  raises = "where x is no tensor",
  calls = {},
  takes_bf16 = true,
  forward = function(_, x) return expect_tensor(x, "detach", "x"):detach() end,
})
