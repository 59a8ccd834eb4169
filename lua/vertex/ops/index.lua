--- ops/index.lua: elements chosen by indices in tensors, which are 0-based i32.

local check = require "vertex.check"
local common = require "vertex.ops.common"
local core = require "vertex.core"
local record = require "vertex.ops.record"
local tape = require "vertex.tape"

local op, contiguous, fail, shape_text = core.op, core.contiguous, core.fail, core.shape_text
local apart, around, dimension, empty_on, expect_tensor = common.apart, common.around, common.dimension,
  common.empty_on, common.expect_tensor
local product, rows, shaped, transposed = common.product, common.rows, common.shaped, common.transposed
local define = record.define

local DIM = "dimension, 1-based; negative counts from the end"

-- -- Rows of a table, or elements along a dimension -------------------------------------------------------------------

--- Checks that index has the shape of x but for dimension d, and gives both as op.gather_along takes them.
local function along(what, x, d, index)
  local s, t = x:shape(), expect_tensor(index, what, "index"):shape()
  local dims = #t
  if d <= dims then t[d] = s[d] end
  if d > #s or #s ~= dims or shape_text(s) ~= shape_text(t) then
    fail("%s: x %s and index %s disagree outside dimension %d", what, shape_text(x), shape_text(index), d)
  end
  return around(contiguous(x), d), around(contiguous(index), d)
end

--- Gives table[index[n]] for every n.
local function gather_rows(ctx, tab, index)
  local s = expect_tensor(index, "gather", "index"):shape()
  local flat = shaped(contiguous(index), { product(s) })
  local y = empty_on(tab, { product(s), tab:size(-1) }, tab:dtype())
  op.gather(y, contiguous(tab), flat)
  if ctx.needs then ctx.index, ctx.shape = flat, tab:shape() end
  s[#s + 1] = tab:size(-1)
  return shaped(y, s)
end

define("gather", {
  text = "Gives the rows of a table that an index names, gather(table, index); or, as PyTorch does, elements along one "
    .. "dimension, each by an index of its own, gather(x, dim, index).",
  args = { { "x", "tensor f32: a table (M,D), or of any shape" },
    { "dim", "dimension (1-based, negative counts from the end) or tensor i32 (...), the rows of a table" },
    { "index", "tensor i32, 0-based: of x's shape but for dim; left out for the rows of a table", optional = true } },
  returns = "tensor f32: (...,D); or of index's shape",
  raises = "where an index is outside 0 .. M-1, or 0 .. size of dim - 1, or the shapes disagree",
  calls = { "gather", "gather_along", "scatter_add", "scatter_add_along" },
  also = { "index_select", "take_along_dim" },
  method = true,
  forward = function(ctx, x, d, index)
    expect_tensor(x, "gather", "x")
    if type(d) ~= "number" then return gather_rows(ctx, x, d) end
    d = dimension(x, d, "gather")
    local from, at = along("gather", x, d, index)
    local y = empty_on(x, at:shape())
    op.gather_along(y, from, at)
    if ctx.needs then ctx.d, ctx.at, ctx.shape = d, at, x:shape() end
    return shaped(y, index:shape())
  end,
  backward = function(ctx, dy)
    local dx = empty_on(dy, ctx.shape):zero()
    if ctx.d then op.scatter_add_along(around(dx, ctx.d), around(dy, ctx.d), ctx.at)
    else op.scatter_add(dx, (rows(dy)), ctx.index) end
    return dx
  end,
  cases = function(T)
    local function index(shape, high) return T(shape, { dtype = "i32", high = high }) end
    return { { T { 4, 3 }, index({ 6 }, 3) }, { T { 5, 17 }, index({ 2, 4 }, 4) },
      { T { 4, 3 }, 1, index({ 6, 3 }, 3) }, { T { 4, 3 }, 2, index({ 4, 2 }, 2) },
      { T { 2, 5, 3 }, -2, index({ 2, 1, 3 }, 4) } }
  end,
})

--- Gives a copy of x with x[..., index, ...] += src; called by scatter_add, which sorts out its arguments.
local scatter_add_along = tape.recorded {
  name = "scatter_add",
  forward = function(ctx, x, d, index, src)
    d = dimension(expect_tensor(x, "scatter_add", "x"), d, "scatter_add")
    local from, at = along("scatter_add", expect_tensor(src, "scatter_add", "src"), d, index)
    if shape_text(src) ~= shape_text(index) then
      fail("scatter_add: src %s and index %s should have one shape", shape_text(src), shape_text(index))
    end
    along("scatter_add", x, d, index)
    local y = empty_on(x, x:shape(), x:dtype())
    op.convert(y, x)
    op.scatter_add_along(around(y, d), from, at)
    if ctx.needs then ctx.d, ctx.at, ctx.shape = d, at, src:shape() end
    return y
  end,
  backward = function(ctx, dy)
    local dsrc
    if ctx.needs[4] then
      dsrc = empty_on(dy, ctx.shape)
      op.gather_along(around(dsrc, ctx.d), around(dy, ctx.d), ctx.at)
    end
    return ctx.needs[1] and dy, nil, nil, dsrc
  end,
}

define("scatter_add", {
  text = "Adds rows to those of a table that an index names, in place: scatter_add(table, x, index) does "
    .. "table[index[n]] += x[n]. Or, as PyTorch does, gives a copy of x with elements added along one dimension, each "
    .. "by an index of its own: scatter_add(x, dim, index, src). Both add in ascending order, so that the bits are "
    .. "the same every time.",
  args = { { "x", "tensor f32: a table (M,D), which is written to; or of any shape" },
    { "dim", "dimension (1-based, negative counts from the end) or tensor f32 (N,D), the rows to add to a table" },
    { "index", "tensor i32, 0-based: (N); or of src's shape" },
    { "src", "tensor f32 of x's shape but for dim", optional = true } },
  returns = "the table, without a gradient; or tensor f32 of x's shape, differentiable in x and src",
  raises = "where an index is outside 0 .. M-1, or 0 .. size of dim - 1, or the shapes disagree; where rows that a "
    .. "gradient flows through are to be added in place, or the table is a result that one flows through",
  calls = { "scatter_add", "scatter_add_along", "gather_along" },
  also = { "index_add", "scatter_reduce" },
  method = true,
  composite = true,
  takes_bf16 = true, -- a table is written to, so given as it is
  forward = function(_, x, d, index, src)
    if type(d) == "number" then return scatter_add_along(x, d, index, src) end
    expect_tensor(x, "scatter_add", "table")
    core.expect_writable(x, "scatter_add")
    tape.expect_no_gradient(expect_tensor(d, "scatter_add", "x"), "scatter_add")
    op.scatter_add(x, apart(contiguous(d), x), apart(contiguous(expect_tensor(index, "scatter_add", "index")), x))
    return x
  end,
  cases = function(T)
    local function index(shape, high) return T(shape, { dtype = "i32", high = high }) end
    return { { T { 4, 3 }, 1, index({ 6, 3 }, 3), T { 6, 3 } },
      { T { 2, 5, 3 }, -1, index({ 2, 5, 2 }, 2), T { 2, 5, 2 } },
      { T({ 3, 2 }, { grad = false }), 2, index({ 3, 4 }, 1), T { 3, 4 } } }
  end,
})

-- -- The largest of a row ---------------------------------------------------------------------------------------------

define("topk", {
  text = "Finds the k largest elements along one dimension, in order; of equal ones the lowest index comes first. The "
    .. "gradient goes through the values, not through the choice.",
  args = { { "x", "tensor f32 of any shape" }, { "k", "how many, at most the dimension's size" },
    { "dim", DIM, default = -1 }, { "options", "{ largest = true }; false: the smallest, in order", optional = true } },
  returns = "values f32 and indices i32 along dim, 0-based, of x's shape but of size k along dim; the indices have no "
    .. "gradient",
  raises = "where x holds a NaN, or k is not in 1 .. the dimension's size",
  calls = { "topk", "scatter_add_along" },
  also = { "sort", "argsort", "kthvalue" },
  method = true,
  forward = function(ctx, x, k, d, options)
    local largest = check.options("topk", options, { largest = { "boolean", true } }).largest
    d = dimension(expect_tensor(x, "topk", "x"), d or -1, "topk")
    local last = x:dim()
    check.integer("topk", "k", k, 1, x:size(d))
    local flat, s = rows(d == last and x or transposed(x, d, last))
    local values, index = empty_on(x, { flat:size(1), k }), empty_on(x, { flat:size(1), k }, "i32")
    op.topk(values, index, flat, largest and 1 or 0)
    if ctx.needs then ctx.d, ctx.index, ctx.rows, ctx.shape = d, index, flat:shape(), s end
    local shape = {}
    for i, size in ipairs(s) do shape[i] = i == last and k or size end
    local function in_place(y)
      y = shaped(y, shape)
      return d == last and y or contiguous(transposed(y, d, last))
    end
    return in_place(values), in_place(index)
  end,
  backward = function(ctx, dy)
    local last, d = #ctx.shape, ctx.d
    local g = rows(d == last and dy or transposed(dy, d, last))
    local dx = empty_on(dy, ctx.rows):zero()
    local function column(t) return shaped(t, { t:size(1), t:size(2), 1 }) end
    op.scatter_add_along(column(dx), column(g), column(ctx.index))
    dx = shaped(dx, ctx.shape)
    return d == last and dx or transposed(dx, d, last)
  end,
  cases = function(T)
    return { { T { 3, 5 }, 2 }, { T { 3, 5 }, 5, 2, { largest = false } }, { T { 4, 3, 2 }, 3, 1 }, { T { 6 }, 1 } }
  end,
})

-- -- Codes ------------------------------------------------------------------------------------------------------------

define("one_hot", {
  text = "Gives a row for each index, with 1 at its place and 0 elsewhere.",
  args = { { "index", "tensor i32 (...), 0-based" }, { "classes", "integer of 1 or more, size of a row" } },
  returns = "tensor f32 (...,classes); no gradient",
  raises = "where an index is outside 0 .. classes - 1",
  calls = { "scatter_add_along" },
  forward = function(_, index, classes)
    check.integer("one_hot", "classes", classes, 1)
    local s = expect_tensor(index, "one_hot", "index"):shape()
    local n = product(s)
    local y, ones = empty_on(index, { n, classes, 1 }):zero(), empty_on(index, { n, 1, 1 }):fill(1)
    op.scatter_add_along(y, ones, shaped(contiguous(index), { n, 1, 1 }))
    s[#s + 1] = classes
    return shaped(y, s)
  end,
  cases = function(T)
    return { { T({ 5 }, { dtype = "i32", high = 3 }), 4 }, { T({ 2, 3 }, { dtype = "i32", high = 1 }), 2 } }
  end,
})

define("count_codes", {
  text = "Counts how often each code occurs. A code of -1, which a masked row has, counts nowhere.",
  args = { { "codes", "tensor i32 (N,G), 0-based" }, { "M", "number of codes" },
    { "count", "tensor i32 (G,M) to add to, in place", optional = true } },
  returns = "tensor i32 (G,M); `count` where that is given; no gradient",
  raises = "where a code is outside 0 .. M-1 and not -1",
  calls = { "count_codes" },
  also = { "bincount", "histc" },
  forward = function(_, codes, M, count)
    expect_tensor(codes, "count_codes", "codes")
    count = count or empty_on(codes, { codes:size(2), M }, "i32"):zero()
    op.count_codes(count, apart(codes, expect_tensor(count, "count_codes", "count")))
    return count
  end,
})
