--- ops/norm.lua: normalization and softmax.

local common = require "vertex.ops.common"
local core = require "vertex.core"
local record = require "vertex.ops.record"
local tape = require "vertex.tape"

local op, contiguous, fail, new_like, shape_text = core.op, core.contiguous, core.fail, core.new_like, core.shape_text
local activation_number, empty_on, expect_tensor = common.activation_number, common.empty_on, common.expect_tensor
local last_unless, product, rows = common.last_unless, common.product, common.rows
local shaped, turned = common.shaped, common.turned
local gradient_like = tape.gradient_like
local define = record.define

define("group_norm", {
  text = "Normalizes each image and group of channels: act(gamma (x - mean) / deviation + beta), with mean and "
    .. "variance over all positions and the channels of the group.",
  args = { { "x", "tensor f32 (B,...,C)" }, { "gamma", "tensor f32 (C)" }, { "beta", "tensor f32 (C)" },
    { "groups", "number of groups, which divides C" },
    { "activation", '"none", "silu" or "gelu", in the same pass', default = "none" },
    { "eps", "number that is added to the variance", default = 1e-5 },
    { "lengths", "tensor i32 (B): of image b the first lengths[b] positions count, and the result is 0 from there on; "
      .. "nil: all count", optional = true } },
  returns = "tensor f32 of x's shape",
  raises = "where C does not divide into the groups, the shapes disagree, or a length is not one of 0 .. positions",
  calls = { "group_norm", "group_norm_backward" },
  source = "Wu and He 2018",
  also = { "instance_norm" },
  forward = function(ctx, x, gamma, beta, groups, activation, eps, lengths)
    local act = activation_number(activation, "group_norm")
    x = contiguous(expect_tensor(x, "group_norm", "x"))
    local s = x:shape()
    if #s < 2 then fail("group_norm: x %s should have the shape (B,...,C)", shape_text(x)) end
    local flat = shaped(x, { s[1], product(s, 2, #s - 1), s[#s] })
    local y, mean, rstd = new_like(flat), empty_on(x, { s[1], groups }), empty_on(x, { s[1], groups })
    op.group_norm(y, mean, rstd, flat, gamma, beta, lengths, act, eps or 1e-5)
    if ctx.needs then
      ctx.x, ctx.gamma, ctx.beta, ctx.mean, ctx.rstd, ctx.act, ctx.shape = flat, gamma, beta, mean, rstd, act, s
      ctx.lengths = lengths
    end
    return shaped(y, s)
  end,
  backward = function(ctx, dy)
    local dx, dgamma, dbeta = new_like(ctx.x), gradient_like(ctx.gamma), gradient_like(ctx.beta)
    op.group_norm_backward(dx, dgamma, dbeta, shaped(dy, ctx.x:shape()), ctx.x, ctx.gamma, ctx.beta, ctx.mean,
      ctx.rstd, ctx.lengths, ctx.act)
    return shaped(dx, ctx.shape), dgamma, dbeta
  end,
  cases = function(T)
    return { { T { 2, 3, 3, 6 }, T { 6 }, T { 6 }, 3 }, { T { 2, 5, 8 }, T { 8 }, T { 8 }, 2, "silu" },
      { T { 1, 7, 4 }, T { 4 }, T { 4 }, 1, "gelu" },
      { T { 3, 6, 5 }, T { 5 }, T { 5 }, 5, "gelu", nil, core.tensor({ 4, 0, 6 }, { dtype = "i32" }) } }
  end,
})

define("layer_norm", {
  text = "Normalizes over the last dimension: gamma (x - mean) / deviation + beta.",
  args = { { "x", "tensor f32 (...,C)" }, { "gamma", "tensor f32 (C)" }, { "beta", "tensor f32 (C)" },
    { "eps", "number that is added to the variance", default = 1e-5 } },
  returns = "tensor f32 of x's shape",
  raises = "where the shapes disagree",
  calls = { "layer_norm", "layer_norm_backward" },
  source = "Ba et al. 2016",
  forward = function(ctx, x, gamma, beta, eps)
    local flat, s = rows(expect_tensor(x, "layer_norm", "x"))
    local n = flat:size(1)
    local y, mean, rstd = new_like(flat), empty_on(x, { n }), empty_on(x, { n })
    op.layer_norm(y, mean, rstd, flat, gamma, beta, eps or 1e-5)
    if ctx.needs then ctx.x, ctx.gamma, ctx.beta, ctx.mean, ctx.rstd, ctx.shape = flat, gamma, beta, mean, rstd, s end
    return shaped(y, s)
  end,
  backward = function(ctx, dy)
    local dx, dgamma, dbeta = new_like(ctx.x), gradient_like(ctx.gamma), gradient_like(ctx.beta)
    op.layer_norm_backward(dx, dgamma, dbeta, (rows(dy)), ctx.x, ctx.gamma, ctx.mean, ctx.rstd)
    return shaped(dx, ctx.shape), dgamma, dbeta
  end,
  cases = function(T) return { { T { 3, 6 }, T { 6 }, T { 6 } }, { T { 2, 2, 19 }, T { 19 }, T { 19 } } } end,
})

local function define_softmax(name, log, text)
  define(name, {
    text = text,
    args = { { "x", "tensor f32 of any shape" },
      { "dim", "dimension, 1-based; negative counts from the end; nil is the last", optional = true } },
    returns = "tensor f32 of x's shape",
    raises = "where x has no such dimension, or its size is 0",
    calls = { "softmax", "softmax_backward" },
    method = true,
    forward = function(ctx, x, dim)
      local d = last_unless(expect_tensor(x, name, "x"), dim, name)
      local flat, s = rows(turned(x, d))
      local y = new_like(flat)
      op.softmax(y, flat, log)
      if ctx.needs then ctx.y, ctx.d = y, d end
      return turned(shaped(y, s), d)
    end,
    backward = function(ctx, dy)
      local flat, s = rows(turned(dy, ctx.d))
      local dx = new_like(ctx.y)
      op.softmax_backward(dx, flat, ctx.y, log)
      return turned(shaped(dx, s), ctx.d)
    end,
    cases = function(T)
      return { { T { 3, 5 } }, { T({ 2, 2, 33 }, { low = -3, high = 3 }) }, { T { 4, 3, 2 }, 2 }, { T { 4, 3 }, 1 },
        { T { 3, 2 }, -1 } }
    end,
  })
end
define_softmax("softmax", 0, "Computes e^x over its sum along a dimension, the last unless another is named.")
define_softmax("log_softmax", 1,
  "Computes the logarithm of softmax, x - log sum e^x, along a dimension, the last unless another is named.")
