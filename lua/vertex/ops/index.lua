--- ops/index.lua: elements chosen by indices in tensors, which are 0-based i32.

local common = require "vertex.ops.common"
local core = require "vertex.core"
local record = require "vertex.ops.record"

local op, contiguous = core.op, core.contiguous
local empty_on, expect_tensor, product, rows, shaped = common.empty_on, common.expect_tensor, common.product,
  common.rows, common.shaped
local define = record.define

define("gather", {
  text = "Gives the rows of a table that an index names: y[n] = table[index[n]].",
  args = { { "table", "tensor f32 (M,D)" }, { "index", "tensor i32 (...) of rows of the table, 0-based" } },
  returns = "tensor f32 (...,D)",
  raises = "where an index is outside 0 .. M-1",
  calls = { "gather", "scatter_add" },
  also = { "index_select" },
  forward = function(ctx, tab, index)
    expect_tensor(tab, "gather", "table")
    expect_tensor(index, "gather", "index")
    local s = index:shape()
    local flat = shaped(contiguous(index), { product(s) })
    local y = empty_on(tab, { product(s), tab:size(-1) }, tab:dtype())
    op.gather(y, contiguous(tab), flat)
    if ctx.needs then ctx.index, ctx.shape = flat, tab:shape() end
    s[#s + 1] = tab:size(-1)
    return shaped(y, s)
  end,
  backward = function(ctx, dy)
    local dtable = empty_on(dy, ctx.shape):zero()
    op.scatter_add(dtable, (rows(dy)), ctx.index)
    return dtable
  end,
  cases = function(T) return { { T { 4, 3 }, T({ 6 }, { dtype = "i32", high = 3 }) },
    { T { 5, 17 }, T({ 2, 4 }, { dtype = "i32", high = 4 }) } } end,
})

define("scatter_add", {
  text = "Adds rows to the rows of a table that an index names, in place: table[index[n]] += x[n], in ascending order "
    .. "of n, so that the bits are the same every time.",
  args = { { "table", "tensor f32 (M,D), written to" }, { "x", "tensor f32 (N,D)" },
    { "index", "tensor i32 (N) of rows of the table, 0-based" } },
  returns = "table; no gradient",
  raises = "where an index is outside 0 .. M-1, or the shapes disagree",
  calls = { "scatter_add" },
  also = { "index_add", "scatter_reduce" },
  takes_bf16 = true, -- written to, so given as it is
  forward = function(_, tab, x, index)
    expect_tensor(tab, "scatter_add", "table")
    op.scatter_add(tab, contiguous(expect_tensor(x, "scatter_add", "x")),
      contiguous(expect_tensor(index, "scatter_add", "index")))
    return tab
  end,
})

define("count_codes", {
  text = "Counts how often each code occurs.",
  args = { { "codes", "tensor i32 (N,G), 0-based" }, { "M", "number of codes" },
    { "count", "tensor i32 (G,M) to add to, in place", optional = true } },
  returns = "tensor i32 (G,M); `count` where that is given; no gradient",
  raises = "where a code is outside 0 .. M-1",
  calls = { "count_codes" },
  also = { "bincount", "histc" },
  forward = function(_, codes, M, count)
    expect_tensor(codes, "count_codes", "codes")
    count = count or empty_on(codes, { codes:size(2), M }, "i32"):zero()
    op.count_codes(count, codes)
    return count
  end,
})
