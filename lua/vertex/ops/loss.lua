--- ops/loss.lua: what a model is trained on.

local common = require "vertex.ops.common"
local core = require "vertex.core"
local record = require "vertex.ops.record"

local op, contiguous, new_like = core.op, core.contiguous, core.new_like
local empty_on, expect_tensor, shaped = common.empty_on, common.expect_tensor, common.shaped
local define = record.define

define("mse", {
  text = "Computes the mean of (a - b)^2 over all elements.",
  args = { { "a", "tensor f32 of any shape" }, { "b", "tensor f32 of a's shape" } },
  returns = "tensor f32 of shape {}",
  raises = "where the shapes disagree",
  calls = { "mse", "mse_backward" },
  also = { "mse_loss" },
  forward = function(ctx, a, b)
    a, b = contiguous(expect_tensor(a, "mse", "a")), contiguous(expect_tensor(b, "mse", "b"))
    local loss = empty_on(a, { 1 })
    op.mse(loss, a, b)
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
        op.mse_backward(d[i], x, other, g)
      end
    end
    return d[1], d[2]
  end,
  cases = function(T) return { { T { 3, 4 }, T { 3, 4 } }, { T { 100 }, T({ 100 }, { grad = false }) } } end,
})
