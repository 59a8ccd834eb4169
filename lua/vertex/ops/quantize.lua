--- ops/quantize.lua: the paper's ops. z (N,G,D) are N vectors in G groups of D numbers, a codebook (G,M,D) holds M
-- codes for each group.

local check = require "vertex.check"
local common = require "vertex.ops.common"
local core = require "vertex.core"
local record = require "vertex.ops.record"
local tape = require "vertex.tape"

local op, VX, contiguous, fail, new_like, shape_text = core.op, core.VX, core.contiguous, core.fail, core.new_like,
  core.shape_text
local empty_on, expect_tensor = common.empty_on, common.expect_tensor
local gradient_like = tape.gradient_like
local define, ops = record.define, record.ops

local METRICS = { euclid = VX.EUCLID, cosine = VX.COSINE }
local ESTIMATORS = { ste = VX.STE, rotation = VX.ROTATION }
local SAMPLERS = { softmax = VX.SOFTMAX, sgumbel = VX.SOFT_GUMBEL, hgumbel = VX.HARD_GUMBEL }
local REGULARIZERS = { none = VX.REG_NONE, ppl = VX.REG_PPL, ["knn-ce"] = VX.REG_KNN_CE, ["knn-l2"] = VX.REG_KNN_L2 }
local PRECISIONS = { f32 = VX.F32, bf16 = VX.BF16 }

local Z, CODEBOOK = { "z", "tensor f32 (N,G,D)" }, { "codebook", "tensor f32 (G,M,D)" }

define("assign", {
  text = "Finds the code nearest to each vector; ties go to the lowest index.",
  args = { Z, CODEBOOK, { "metric", '"euclid" or "cosine"' } },
  returns = "tensor i32 (N,G) of codes, 0-based; no gradient",
  raises = "where a vector holds a NaN or Inf, or the shapes disagree",
  calls = { "assign" },
  source = "Eq. 1 and 3",
  forward = function(_, z, codebook, metric)
    expect_tensor(z, "assign", "z")
    expect_tensor(codebook, "assign", "codebook")
    if not METRICS[metric] then fail("assign: metric '%s', expected euclid or cosine", tostring(metric)) end
    if z:dim() ~= 3 or codebook:dim() ~= 3 or z:size(2) ~= codebook:size(1) or z:size(3) ~= codebook:size(3) then
      fail("assign: z %s and codebook %s disagree, expected (N,G,D) and (G,M,D)", shape_text(z), shape_text(codebook))
    end
    local codes = empty_on(z, { z:size(1), z:size(2) }, "i32")
    if z:dtype() == "bf16" then z = z:to "f32" end
    op.assign(codes, contiguous(z), codebook, METRICS[metric])
    return codes
  end,
})

local function draw_start(seed, stream, x, count)
  local index = empty_on(x, { count }, "i32")
  op.kmeans_start(index, x, seed, stream)
  return index
end

define("kmeans_start", {
  text = "Chooses the rows that k-means begins with, by k-means++: the first at random, each further one with a "
    .. "probability in proportion to its squared distance from the nearest row chosen before.",
  args = { { "x", "tensor f32 (N,D)" }, { "count", "how many rows M, 1 or more" },
    { "generator", "vx.generator to draw from; nil is the one that vx.seed seeds", optional = true } },
  returns = "tensor i32 (M) of rows, 0-based, all different while rows of x differ; no gradient",
  raises = "where a row holds a NaN or Inf, or x has no row",
  calls = { "kmeans_start" },
  source = "Arthur and Vassilvitskii 2007",
  forward = function(_, x, count, generator)
    x = contiguous(expect_tensor(x, "kmeans_start", "x"))
    check.integer("kmeans_start", "count", count, 1)
    return core.drawing(generator, draw_start, x, count)
  end,
})

define("quantize_hard", {
  text = "Quantizes each vector to its nearest code, with a surrogate gradient, and computes the commitment loss.",
  args = { Z, CODEBOOK,
    { "options", '{ metric = "euclid" or "cosine"; estimator = "ste" or "rotation"; beta = weight of the commitment; '
      .. 'reduction = "sum" or "mean" over D; codebook_grad = true: dy goes to the codes too, as Eq. 2 is printed }' },
  },
  returns = "y f32 (N,G,D); regularizer f32 (1); codes i32 (N,G), 0-based, without a gradient",
  raises = "where a vector holds a NaN or Inf, or the shapes disagree",
  calls = { "assign", "hard_forward", "hard_backward" },
  source = "Eq. 1-4 and 10",
  outputs = 2,
  forward = function(ctx, z, codebook, options)
    z = contiguous(expect_tensor(z, "quantize_hard", "z"))
    local codes = ops.assign(z, codebook, options.metric)
    local y, reg = new_like(z), empty_on(z, { 1 })
    local mean = options.reduction == "mean" and 1 or 0
    op.hard_forward(y, reg, z, codebook, codes, METRICS[options.metric], options.beta, mean)
    if ctx.needs then ctx.z, ctx.codebook, ctx.codes, ctx.options, ctx.mean = z, codebook, codes, options, mean end
    return y, reg, codes
  end,
  backward = function(ctx, dy, dreg)
    local z, o = ctx.z, ctx.options
    local dz, dcodebook = new_like(z), gradient_like(ctx.codebook)
    op.hard_backward { dz = dz, dcodebook = dcodebook, dy = dy or new_like(z):zero(),
      dreg = dreg or empty_on(z, { 1 }):zero(), z = z, codebook = ctx.codebook, codes = ctx.codes,
      estimator = ESTIMATORS[o.estimator], metric = METRICS[o.metric], beta = o.beta, mean_reduction = ctx.mean,
      codebook_grad = o.codebook_grad and 1 or 0 }
    return dz, dcodebook
  end,
})


define("quantize_smooth", {
  text = "Quantizes each vector to a mixture of codes, by softmax or Gumbel noise, and computes its regularizer; one "
    .. "op each way, and never an array of N x M numbers.",
  args = { Z, CODEBOOK, { "log_tau", "tensor f32 (1), the logarithm of the temperature" },
    { "options", '{ sampler = "softmax", "sgumbel" or "hgumbel"; regularizer = "none", "ppl", "knn-ce" or "knn-l2"; '
      .. "k = neighbours of each vertex (knn), on CUDA at most 64 of a shard; gumbel_tau = temperature of the Gumbel "
      .. "softmax; shards = parts of the batch that choose neighbours apart; seed and stream of the noise; noise = f32 "
      .. "(N,G,M) to fix it; vertices = i32 (G,S) of codes, 0-based, that knn pulls at (nil: all); stats = false: "
      .. "mean_pi is not asked for; join = function of several ranks (quantizers/world.lua); "
      .. 'precision = "f32" or "bf16" }' } },
  returns = "y f32 (N,G,D); regularizer f32 (1); codes i32 (N,G), 0-based; mean_pi f32 (G,M), the mean probabilities, "
    .. "or nil; max_p f32 (1), the mean of the largest probability. The last three have no gradient",
  raises = "where a vector holds a NaN or Inf, an option is none of these, or the shapes disagree",
  calls = { "smooth_forward", "smooth_backward" },
  source = "Eq. 5-8 and 11-13",
  outputs = 2,
  forward = function(ctx, z, codebook, log_tau, o)
    z = contiguous(expect_tensor(z, "quantize_smooth", "z"))
    local N, G, M = z:size(1), z:size(2), codebook:size(2)
    local precision = PRECISIONS[o.precision or "f32"]
    if not precision then fail("quantize_smooth: precision '%s', expected f32 or bf16", tostring(o.precision)) end
    local knn = o.regularizer == "knn-ce" or o.regularizer == "knn-l2"
    local call = {
      y = new_like(z), codes = empty_on(z, { N, G }, "i32"), lse = empty_on(z, { N, G, 2 }),
      sumsq = empty_on(z, { N, G }),
      soft = o.sampler == "hgumbel" and new_like(z) or nil,
      near = knn and empty_on(z, { G, o.vertices and o.vertices:size(2) or M, o.k }, "i32") or nil,
      mean_pi = (o.stats ~= false or o.regularizer == "ppl") and empty_on(z, { G, M }) or nil,
      reg = empty_on(z, { 1 }), max_p = empty_on(z, { 1 }),
      z = z, codebook = codebook, log_tau = log_tau, noise = o.noise, vertices = o.vertices,
      sampler = SAMPLERS[o.sampler], regularizer = REGULARIZERS[o.regularizer], gumbel_tau = o.gumbel_tau,
      shards = o.shards, precision = precision, seed = o.seed, stream = o.stream,
    }
    op.smooth_forward(call)
    ctx.factor = o.join and tape.no_grad(o.join, call) or 1
    local y, reg, codes, mean_pi, max_p = call.y, call.reg, call.codes, call.mean_pi, call.max_p
    if ctx.needs then
      call.reg, call.max_p = nil, nil
      ctx.call = call -- all of it is handed on to the backward pass
    end
    return y, reg, codes, mean_pi, max_p
  end,
  backward = function(ctx, dy, dreg)
    local call = ctx.call
    local z = call.z
    local dz, dcodebook, dlog_tau = new_like(z), gradient_like(call.codebook), gradient_like(call.log_tau)
    call.dz, call.dcodebook, call.dlog_tau = dz, dcodebook, dlog_tau
    call.dy, call.dreg = dy or new_like(z):zero(), dreg or empty_on(z, { 1 }):zero()
    if ctx.factor ~= 1 then call.dreg = ops.affine(call.dreg, ctx.factor, 0) end
    op.smooth_backward(call)
    return dz, dcodebook, dlog_tau
  end,
})
