--- ops/dirichlet.lua: Dirichlet distributions: two ops of M numbers, computed in float64 on the host.

local common = require "vertex.ops.common"
local core = require "vertex.core"
local math_of = require "vertex.ops.dirichlet_math"
local record = require "vertex.ops.record"
local tape = require "vertex.tape"

local fail, shape_text = core.fail, core.shape_text
local empty_on, expanded, expect_tensor = common.empty_on, common.expanded, common.expect_tensor
local define, ops = record.define, record.ops

local function expect_f32(x, what, name)
  if expect_tensor(x, what, name):dtype() ~= "f32" then
    fail("%s: %s %s is %s, expected f32", what, name, shape_text(x), x:dtype())
  end
  return x
end

define("dirichlet_mle", {
  text = "Finds the concentrations that make given points most likely, by Newton's method. At the maximum "
    .. "mean_log(alpha) is g, the mean of log_p, so that d alpha / d g is the inverse of the Fisher information. "
    .. "Waits for the device.",
  args = { { "log_p", "tensor f32 (N,M), logarithms of the points; N and M at least 2" } },
  returns = "concentrations f32 (M); number of Newton steps",
  raises = "where the points are all equal or otherwise have no such maximum",
  calls = {},
  source = "Minka 2000",
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
    local alpha, steps = math_of.mle(g, 2e-6) -- logarithms of 10 are rounded to half of that
    if not alpha then fail("dirichlet_mle: %s", steps) end
    if ctx.needs then ctx.alpha, ctx.shape = alpha, log_p:shape() end
    return empty_on(log_p, { #alpha }):fromtable(alpha), steps
  end,
  backward = function(ctx, dalpha)
    local dg = math_of.solve_information(ctx.alpha, dalpha:totable())
    for i = 1, #dg do dg[i] = dg[i] / ctx.shape[1] end
    return expanded(empty_on(dalpha, { #dg }):fromtable(dg), ctx.shape)
  end,
  cases = function(T) return { { T({ 5, 3 }, { low = -4, high = -0.9 }) },
    { T({ 3, 2 }, { low = -3, high = -0.8 }) } } end,
})

define("dirichlet_kl", {
  text = "Computes KL(Dirichlet(a) | Dirichlet(b)). Waits for the device.",
  args = { { "a", "tensor f32 (M) of concentrations" }, { "b", "tensor f32 (M) of concentrations" } },
  returns = "tensor f32 of shape {}, in nats",
  raises = "where a concentration is not positive and finite",
  calls = {},
  also = { "kl_div", "kl_divergence" },
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
    return empty_on(a, {}):fill(math_of.kl(x, y))
  end,
  backward = function(ctx, dy)
    local a, b, g = ctx.a, ctx.b, dy:item()
    local mean_a, mean_b, db, difference = math_of.mean_log(a), math_of.mean_log(b), {}, {}
    for i = 1, #a do
      db[i] = g * (mean_b[i] - mean_a[i])
      difference[i] = g * (a[i] - b[i])
    end
    return empty_on(dy, { #a }):fromtable(math_of.information(a, difference)), empty_on(dy, { #a }):fromtable(db)
  end,
  cases = function(T)
    local range = { low = 0.3, high = 4 }
    return { { T({ 3 }, range), T({ 3 }, range) }, { T({ 17 }, range), T({ 17 }, range) } }
  end,
})
