--- ops/linear.lua: matrix products. All are one gemm on views: a transposed operand is read in place.

local common = require "vertex.ops.common"
local core = require "vertex.core"
local record = require "vertex.ops.record"

local op, contiguous, fail, shape_text = core.op, core.contiguous, core.fail, core.shape_text
local empty_on, expect_tensor, rows, shaped, sum_to = common.empty_on, common.expect_tensor, common.rows, common.shaped,
  common.sum_to
local define = record.define

--- Gives a 2-D or 3-D operand as (B, rows, columns) whose rows or columns have stride 1; batch 1 is repeated to
-- `batch`.
local function operand(x, batch)
  local s, st = x:shape(), x:strides()
  if #s == 2 then
    table.insert(s, 1, 1)
    table.insert(st, 1, 0)
  end
  if st[2] ~= 1 and st[3] ~= 1 then -- contiguous() gives x itself where no stride counts: without elements
    x, st = contiguous(x), { s[2] * s[3], s[3], 1 }
  end
  if batch and s[1] == 1 then
    s[1], st[1] = batch, 0
  end
  return core.view(x, s, st, 0), s
end

--- Gives a view of x with its last two dimensions exchanged.
local function flipped(x) return common.transposed(x, x:dim() - 1, x:dim()) end

--- Computes a b of 2-D or 3-D operands, unrecorded.
local function multiply(a, b)
  local batch = math.max(a:dim() == 3 and a:size(1) or 1, b:dim() == 3 and b:size(1) or 1)
  local va, sa = operand(a, batch)
  local vb, sb = operand(b, batch)
  if sa[3] ~= sb[2] then fail("matmul: a %s and b %s disagree on the inner size", shape_text(a), shape_text(b)) end
  if sa[1] ~= sb[1] then fail("matmul: a %s and b %s disagree on the batch", shape_text(a), shape_text(b)) end
  local y = empty_on(a, { sa[1], sa[2], sb[3] })
  op.gemm(y, va, vb, nil, 1, 0)
  if a:dim() == 2 and b:dim() == 2 then return shaped(y, { sa[2], sb[3] }) end
  return y
end

define("matmul", {
  text = "Multiplies matrices, (m,k)(k,n) or a batch of them, (B,m,k)(B,k,n); either may be one for the whole batch.",
  args = { { "a", "tensor f32 (m,k) or (B,m,k)" }, { "b", "tensor f32 (k,n) or (B,k,n)" } },
  returns = "tensor f32 (m,n), or (B,m,n) where one of them has a batch",
  raises = "where they disagree on k or B, or have another number of dimensions",
  calls = { "gemm" },
  also = { "mm", "dot", "addmm" },
  method = true,
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

define("linear", {
  text = "Computes x wT + bias on the last dimension of x.",
  args = { { "x", "tensor f32 (...,C)" }, { "w", "tensor f32 (O,C)" }, { "bias", "tensor f32 (O)", optional = true } },
  returns = "tensor f32 (...,O)",
  raises = "where they disagree on C or O",
  calls = { "gemm" },
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
    local y = empty_on(x, { 1, flat:size(1), w:size(1) })
    op.gemm(y, (operand(flat)), (operand(flipped(w))), bias, 1, 0)
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
