--- ops/attention.lua: attention, one op each way, without an array of time by time.

local check = require "vertex.check"
local common = require "vertex.ops.common"
local core = require "vertex.core"
local record = require "vertex.ops.record"

local op, contiguous, fail, new_like, shape_text = core.op, core.contiguous, core.fail, core.new_like, core.shape_text
local empty_on, expect_tensor = common.empty_on, common.expect_tensor
local define = record.define

local OPTIONS = { lengths = "any", dropout = { "any", 0 }, generator = "any" }

--- Gives the lengths as C wants them, on q's device; nil where there are none.
local function lengths_beside(q, lengths)
  if lengths == nil then return nil end
  expect_tensor(lengths, "attention", "lengths")
  if lengths:dtype() ~= "i32" or shape_text(lengths) ~= shape_text { q:size(1) } then
    fail("attention: lengths %s %s and q %s disagree, expected i32 (B)", lengths:dtype(), shape_text(lengths),
      shape_text(q))
  end
  return contiguous(lengths:device() == q:device() and lengths or lengths:to(q:device()))
end

local function attend(seed, stream, y, lse, q, k, v, lengths, dropout)
  op.attention(y, lse, q, k, v, lengths, dropout, seed, stream)
  return seed, stream
end

define("attention", {
  text = "Computes attention, softmax(q k^T / sqrt(D)) v for each of H heads: every query takes a mean of the values, "
    .. "weighted by how well their keys match it. Memory grows with T, not with its square: the weights are made in "
    .. "tiles, and once more in the backward pass.",
  args = { { "q", "tensor f32 (B,T,H,D), the queries" }, { "k", "tensor f32 (B,T,H,D), the keys" },
    { "v", "tensor f32 (B,T,H,D), the values" },
    { "options", "{ lengths = tensor i32 (B), 0 .. T: keys at or beyond a row's length count nowhere (nil: all count); "
      .. "dropout = share of the weights that become 0, from 0 to 1, rounded to a multiple of 2^-16, while the "
      .. "others grow by 1 / (1 - dropout); generator = vx.generator to draw from (nil: the one that vx.seed "
      .. "seeds) }", optional = true } },
  returns = "tensor f32 (B,T,H,D); queries beyond a row's length get a result too, and all are 0 in a row of length 0",
  raises = "where the shapes disagree, a length is outside 0 .. T, dropout is outside its range, or on a GPU D > 128",
  calls = { "attention", "attention_backward" },
  source = "Vaswani et al. 2017; in tiles: Dao et al. 2022",
  also = { "scaled_dot_product_attention" },
  forward = function(ctx, q, k, v, options)
    q, k, v = contiguous(expect_tensor(q, "attention", "q")), contiguous(expect_tensor(k, "attention", "k")),
      contiguous(expect_tensor(v, "attention", "v"))
    if q:dim() ~= 4 then fail("attention: q %s should have the shape (B,T,H,D)", shape_text(q)) end
    local o = check.options("attention", options, OPTIONS)
    local dropout = check.number("attention", "dropout", o.dropout, 0, 1)
    local lengths, s = lengths_beside(q, o.lengths), q:shape()
    local y, lse, seed, stream = new_like(q), empty_on(q, { s[1], s[2], s[3], 2 }), 0, 0
    if dropout > 0 then
      seed, stream = core.drawing(o.generator, attend, y, lse, q, k, v, lengths, dropout)
    else
      attend(seed, stream, y, lse, q, k, v, lengths, dropout)
    end
    if ctx.needs then
      ctx.y, ctx.lse, ctx.q, ctx.k, ctx.v, ctx.lengths = y, lse, q, k, v, lengths
      ctx.dropout, ctx.seed, ctx.stream = dropout, seed, stream
    end
    return y
  end,
  backward = function(ctx, dy)
    local dq, dk, dv = new_like(ctx.q), new_like(ctx.k), new_like(ctx.v)
    op.attention_backward(dq, dk, dv, contiguous(dy), ctx.y, ctx.lse, ctx.q, ctx.k, ctx.v, ctx.lengths, ctx.dropout,
      ctx.seed, ctx.stream)
    return dq, dk, dv
  end,
  cases = function(T)
    local same = { stream = function() return 11, 5 end } -- the same stream every time
    local function three(shape) return T(shape), T(shape), T(shape) end
    local function case(shape, options)
      local q, k, v = three(shape)
      return { q, k, v, options }
    end
    return { case({ 2, 5, 2, 3 }), case({ 1, 9, 1, 4 }, { dropout = 0.3, generator = same }),
      case({ 3, 7, 2, 5 }, { lengths = core.tensor({ 7, 3, 0 }, { dtype = "i32" }), dropout = 0.5, generator = same }),
      case({ 1, 1, 1, 1 }) }
  end,
})
