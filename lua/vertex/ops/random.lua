--- ops/random.lua: random numbers, drawn into tensors. Each call takes the next stream of a generator, so that the same
-- seed gives the same numbers on any device and any number of threads.

local check = require "vertex.check"
local common = require "vertex.ops.common"
local core = require "vertex.core"
local record = require "vertex.ops.record"
local tape = require "vertex.tape"

local op, fail, shape_text, drawing = core.op, core.fail, core.shape_text, core.drawing
local expanded, expect_tensor = common.expanded, common.expect_tensor
local define = record.define

-- Gives a parameter of a distribution, a finite number that f32 holds, `least` or more; `default` where it is nil.
local function parameter(value, what, name, default, least)
  if value == nil then return default end
  return common.expect_f32(check.number(what, name, value, least or -core.f32_most, core.f32_most), what, name)
end

local GENERATOR = { "generator", "vx.generator to draw from; nil is the one that vx.seed seeds", optional = true }

-- Functions of core.drawing, which takes the next stream of a generator where they succeed.
local function draw_uniform(seed, stream, x, low, high) op.uniform(x, seed, stream, low, high) end
local function draw_normal(seed, stream, x, mean, deviation) op.normal(x, seed, stream, mean, deviation) end
local function draw_dirichlet(seed, stream, p, alpha, log) op.dirichlet(p, alpha, seed, stream, log) end
local function draw_permutation(seed, stream, n, device)
  local x = core.new({ n }, { dtype = "i32", device = device })
  op.permutation(x, seed, stream)
  return x
end
local function draw_dropout(seed, stream, x, p)
  local y = core.new_like(x)
  op.dropout(y, x, seed, stream, p)
  return y, seed, stream
end

-- They write to x itself, which is therefore given as it is: takes_bf16.

define("uniform", {
  text = "Fills x with numbers that are uniform in an open interval.",
  args = { { "x", "tensor f32 of any shape, overwritten" }, { "low", "number", default = 0 },
    { "high", "number", default = 1 }, GENERATOR },
  returns = "x; no gradient",
  raises = "where x is no contiguous f32 tensor, or a parameter no finite number that f32 holds",
  calls = { "uniform" },
  also = { "rand_like", "uniform_" },
  takes_bf16 = true,
  forward = function(_, x, low, high, generator)
    core.expect_writable(x, "uniform")
    low, high = parameter(low, "uniform", "low", 0), parameter(high, "uniform", "high", 1)
    parameter(high - low, "uniform", "high - low")
    drawing(generator, draw_uniform, x, low, high)
    return x
  end,
})

define("normal", {
  text = "Fills x with normal numbers.",
  args = { { "x", "tensor f32 of any shape, overwritten" }, { "mean", "number", default = 0 },
    { "deviation", "number of 0 or more, the standard deviation", default = 1 }, GENERATOR },
  returns = "x; no gradient",
  raises = "where x is no contiguous f32 tensor, or a parameter no finite number that f32 holds",
  calls = { "normal" },
  also = { "randn_like", "normal_" },
  takes_bf16 = true,
  forward = function(_, x, mean, deviation, generator)
    core.expect_writable(x, "normal")
    mean, deviation = parameter(mean, "normal", "mean", 0), parameter(deviation, "normal", "deviation", 1, 0)
    drawing(generator, draw_normal, x, mean, deviation)
    return x
  end,
})

define("dirichlet", {
  text = "Fills the rows of p with draws from Dirichlet distributions.",
  args = { { "p", "tensor f32 (N,M), overwritten" },
    { "alpha", "tensor f32 of concentrations, (M) for all rows or (N,M)" },
    { "log", "true: p receives the logarithms", default = false }, GENERATOR },
  returns = "p; no gradient",
  raises = "where a concentration is not positive and finite, the shapes disagree, or alpha requires a gradient, which "
    .. "would be lost",
  calls = { "dirichlet" },
  takes_bf16 = true,
  forward = function(_, p, alpha, log, generator)
    core.expect_writable(p, "dirichlet")
    expect_tensor(p, "dirichlet", "p")
    tape.expect_no_gradient(expect_tensor(alpha, "dirichlet", "alpha"), "dirichlet")
    local a = expanded(common.apart(alpha, p), p:shape())
    if not a then fail("dirichlet: p %s and alpha %s disagree on a size", shape_text(p), shape_text(alpha)) end
    drawing(generator, draw_dirichlet, p, a, log and 1 or 0)
    return p
  end,
})

define("permutation", {
  text = "Makes a random order of 0 .. n-1.",
  args = { { "n", "how many" }, GENERATOR,
    { "options", '{ device = "cpu", "cuda:0", ... }; nil is the default device', optional = true } },
  returns = "tensor i32 (n); no gradient",
  raises = "where n is no integer of 0 or more",
  calls = { "permutation" },
  forward = function(_, n, generator, options)
    local where = check.options("permutation", options, { device = "string" }).device
    return drawing(generator, draw_permutation, n, where)
  end,
})

define("dropout", {
  text = "Sets elements to 0 with probability p and divides the others by 1 - p, so that the mean stays. The gradient "
    .. "draws the same elements again; no mask is stored.",
  args = { { "x", "tensor f32 of any shape" }, { "p", "probability, from 0 to 1" }, GENERATOR },
  returns = "tensor f32 of x's shape",
  raises = "where p is no number from 0 to 1",
  calls = { "dropout" },
  source = "Srivastava et al. 2014",
  forward = function(ctx, x, p, generator)
    x = core.contiguous(expect_tensor(x, "dropout", "x"))
    check.number("dropout", "p", p, 0, 1)
    local y, seed, stream = drawing(generator, draw_dropout, x, p)
    if ctx.needs then ctx.seed, ctx.stream, ctx.p = seed, stream, p end
    return y
  end,
  backward = function(ctx, dy)
    local dx = core.new_like(dy)
    op.dropout(dx, dy, ctx.seed, ctx.stream, ctx.p)
    return dx
  end,
  cases = function(T)
    local fixed = { stream = function() return 7, 3 end } -- the same numbers at every call
    return { { T { 5, 4 }, 0.25, fixed }, { T { 130 }, 0.5, fixed } }
  end,
})
