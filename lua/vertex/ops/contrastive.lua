--- ops/contrastive.lua: Wav2Vec 2.0's pretraining task: which frames are hidden, which other frames a hidden one is to
-- be told from, and the loss of telling them apart [Baevski et al. 2020].

local check = require "vertex.check"
local common = require "vertex.ops.common"
local core = require "vertex.core"
local record = require "vertex.ops.record"
local tape = require "vertex.tape"

local op, VX, contiguous, fail, shape_text = core.op, core.VX, core.contiguous, core.fail, core.shape_text
local empty_on, expect_tensor, shaped = common.empty_on, common.expect_tensor, common.shaped
local define = record.define

local GENERATOR = { "generator", "vx.generator to draw from; nil is the one that vx.seed seeds", optional = true }

local function draw_spans(seed, stream, mask, frames, count, o)
  op.span_mask(mask, frames, count, o.lengths and contiguous(o.lengths), o.probability, o.span, o.least, seed, stream)
end

define("span_mask", {
  text = "Chooses the frames that are hidden in a batch of sequences: in each row floor(probability length / span + u) "
    .. "spans, u uniform in [0, 1), that begin at different frames of 0 .. length - span - 1 and may overlap; then "
    .. "every row loses masked frames at random, down to the fewest of any row. A row too short for a span is left "
    .. "whole, and the others are not thinned to it.",
  args = { { "B", "number of rows" }, { "T", "number of frames of a row" },
    { "options", "{ lengths = i32 (B), frames of each row that count, default all; probability = 0.65; span = 10; "
      .. "least = 2, spans at least, as fairseq has it; device = that of lengths, or the default one }",
      optional = true },
    GENERATOR },
  returns = "mask u8 (B,T), 1 where masked; frames i32 (N), the masked places (b - 1) T + t - 1 in ascending order, "
    .. "with b and t from 1; count i32 (B), how many each row has. Waits for the device. No gradient",
  raises = "where a length is outside 0 .. T, or an option is not in its range",
  calls = { "span_mask" },
  source = "Baevski et al. 2020, section 3.1; fairseq's compute_mask_indices",
  forward = function(_, B, T, options, generator)
    local o = check.options("span_mask", options, { lengths = "any", probability = { "number", 0.65 },
      span = { "count", 10 }, least = { "whole", 2 }, device = "string" })
    check.integer("span_mask", "B", B, 1)
    check.integer("span_mask", "T", T, 1)
    check.number("span_mask", "probability", o.probability, 0, 1)
    local on = { device = o.device }
    if o.lengths then on.device = core.device_of(expect_tensor(o.lengths, "span_mask", "lengths")) end
    local function new(shape, dtype) return core.new(shape, { dtype = dtype, device = on.device }) end
    local mask, frames, count = new({ B, T }, "u8"), new({ B, T }, "i32"), new({ B }, "i32")
    core.drawing(generator, draw_spans, mask, frames, count, o)
    local n = 0
    for _, masked in ipairs(count:totable()) do n = n + masked end
    return mask, core.view(frames, { n }, { 1 }, 0), count
  end,
})

local function draw_distractors(seed, stream, frames, T, count)
  local y = empty_on(frames, { frames:numel(), count }, "i32")
  op.distractors(y, contiguous(frames), T, seed, stream)
  return y
end

define("distractors", {
  text = "Draws for each masked frame `count` others of the same row's masked frames, uniformly and with replacement.",
  args = { { "frames", "tensor i32 (N), of span_mask" }, { "T", "number of frames of a row" },
    { "count", "how many for each", default = 100 }, GENERATOR },
  returns = "tensor i32 (N,count), 0-based places in `frames`; no gradient",
  raises = "where a row has a single masked frame, or frames do not ascend",
  calls = { "distractors" },
  source = "Baevski et al. 2020, section 3.2",
  forward = function(_, frames, T, count, generator)
    expect_tensor(frames, "distractors", "frames")
    check.integer("distractors", "T", T, 1)
    count = check.integer("distractors", "count", count or 100, 1)
    return core.drawing(generator, draw_distractors, frames, T, count)
  end,
})

define("contrastive_loss", {
  text = "Computes how well vectors y tell their own targets q from distractors: the mean over n of ln sum_e exp(l_e) "
    .. "- l_0, where l_0 = cos(y_n, q_n) / temperature, and l_e likewise with the targets of n's distractors. A "
    .. "distractor whose vector equals the positive's, number by number, is left out (-inf): a collapsed codebook has "
    .. "the loss 0. A model that tells nothing apart has ln(1 + K): 4.615 for 100 distractors.",
  args = { { "y", "tensor f32 (N,D), context vectors" }, { "q", "tensor f32 (N,D), their targets" },
    { "distractors", "tensor i32 (N,K), 0-based rows of q" },
    { "options", "{ temperature = 0.1; keep_equal = true: equal distractors count as any other, default false }",
      optional = true } },
  returns = "tensor f32 {} in nats; then, without a gradient, of each frame the loss f32 (N), the logits f32 "
    .. "(N,1+K), how many distractors equal the positive i32 (N), and i32 (N) 1 where the positive's logit is above "
    .. "all others' (0 where there is no other)",
  raises = "where the shapes disagree, N is 0, a row holds a NaN or Inf, or a distractor is outside 0 .. N-1",
  calls = { "contrastive", "contrastive_backward" },
  source = "Eq. 15",
  forward = function(ctx, y, q, distractors, options)
    local o = check.options("contrastive_loss", options, { temperature = { "positive", 0.1 },
      keep_equal = { "boolean", false } })
    y, q = contiguous(expect_tensor(y, "contrastive_loss", "y")), contiguous(expect_tensor(q, "contrastive_loss", "q"))
    distractors = contiguous(expect_tensor(distractors, "contrastive_loss", "distractors"))
    local N = y:size(1)
    if distractors:dim() ~= 2 or distractors:size(1) ~= N then
      fail("contrastive_loss: y %s and distractors %s should have the shapes (N,D) and (N,K)", shape_text(y),
        shape_text(distractors))
    end
    if N == 0 then fail("contrastive_loss: y %s has no rows", shape_text(y)) end
    local each, logits = empty_on(y, { N }), empty_on(y, { N, distractors:size(2) + 1 })
    local equal, hit = empty_on(y, { N }, "i32"), empty_on(y, { N }, "i32")
    op.contrastive(each, logits, equal, hit, y, q, distractors, o.temperature, o.keep_equal and 1 or 0)
    local loss = empty_on(y, { 1 })
    op.reduce(loss, each, VX.REDUCE_MEAN)
    if ctx.needs then
      ctx.y, ctx.q, ctx.distractors, ctx.logits, ctx.temperature = y, q, distractors, logits, o.temperature
    end
    return shaped(loss, {}), each, logits, equal, hit
  end,
  backward = function(ctx, dy)
    local gy, gq = tape.gradient_like(ctx.y), tape.gradient_like(ctx.q)
    op.contrastive_backward(gy, gq, shaped(dy, { 1 }), ctx.y, ctx.q, ctx.distractors, ctx.logits, ctx.temperature)
    return gy, gq
  end,
  cases = function(T)
    local function index(n, k) return T({ n, k }, { dtype = "i32", high = n - 1 }) end
    return { { T { 5, 6 }, T { 5, 6 }, index(5, 3) }, { T { 4, 17 }, T { 4, 17 }, index(4, 1), { temperature = 0.5 } },
      { T { 3, 2 }, T { 3, 2 }, index(3, 40), { keep_equal = true } } }
  end,
})
