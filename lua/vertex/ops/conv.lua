--- ops/conv.lua: convolutions, channels last: of images (B,H,W,C) and of sequences (B,L,C); pooling over windows of
-- images. What stands before the general conv2d is tuned: 3x3 with zero padding 1, for networks that are trained.

local check = require "vertex.check"
local common = require "vertex.ops.common"
local core = require "vertex.core"
local record = require "vertex.ops.record"
local tape = require "vertex.tape"

local op, contiguous, fail, new_like, shape_text = core.op, core.contiguous, core.fail, core.new_like, core.shape_text
local activation_number, empty_on, expect_tensor = common.activation_number, common.empty_on, common.expect_tensor
local gradient_like = tape.gradient_like
local define = record.define

local SEPARABLE = { groups = { "count", 1 }, activation = { { "none", "silu", "gelu" } }, stride = { "count", 1 },
  up = { "count", 1 }, output = "any" }

local OUTPUT = { "output", '"f32": the result is f32 under vx.autocast too', optional = true }

--- Gives the dtype of an image that an op makes: bf16 where vx.autocast says so, unless `output` is "f32".
local function body_dtype(output, what)
  if output ~= nil and output ~= "f32" then fail("%s: output '%s', expected \"f32\" or nil", what, tostring(output)) end
  return output or core.is_autocast() and "bf16" or "f32"
end

--- Gives x's shape, which has to be (B,H,W,C).
local function image_shape(x, what)
  local s = x:shape()
  if #s ~= 4 then fail("%s: x %s should have the shape (B,H,W,C)", what, shape_text(x)) end
  return s
end

define("conv3x3", {
  text = "Convolves images with dense 3x3 filters, stride 1, zero padding 1.",
  args = { { "x", "tensor f32 or bf16 (B,H,W,C)" }, { "w", "tensor f32 (3,3,C,O)" },
    { "bias", "tensor f32 (O)", optional = true }, OUTPUT },
  returns = "tensor f32 (B,H,W,O); bf16 under vx.autocast",
  raises = "where the shapes disagree",
  calls = { "conv3x3", "conv3x3_backward_input", "conv3x3_backward_weight" },
  takes_bf16 = true,
  forward = function(ctx, x, w, bias, output)
    x = contiguous(expect_tensor(x, "conv3x3", "x"))
    expect_tensor(w, "conv3x3", "w")
    local s = x:shape()
    s[#s] = w:size(-1)
    local y = empty_on(x, s, body_dtype(output, "conv3x3"))
    op.conv3x3(y, x, w, bias)
    if ctx.needs then ctx.x, ctx.w, ctx.bias = x, w, bias end
    return y
  end,
  backward = function(ctx, dy)
    local needs, dx, dw, db = ctx.needs, nil, nil, nil
    if needs[1] then
      dx = new_like(ctx.x)
      op.conv3x3_backward_input(dx, dy, ctx.w)
    end
    if needs[2] or needs[3] then
      dw, db = gradient_like(ctx.w), ctx.bias and gradient_like(ctx.bias)
      op.conv3x3_backward_weight(dw, db, ctx.x, dy)
    end
    return dx, dw, db
  end,
  cases = function(T)
    return { { T { 2, 5, 4, 3 }, T { 3, 3, 3, 6 }, T { 6 } }, { T { 1, 1, 1, 2 }, T { 3, 3, 2, 1 } },
      { T { 1, 3, 7, 17 }, T { 3, 3, 17, 3 } } }
  end,
})

define("depthwise_conv2d", {
  text = "Convolves each channel of images with a 3x3 filter of its own, zero padding 1; output pixel (p, q) is "
    .. "centred on pixel (p stride, q stride).",
  args = { { "x", "tensor f32 (B,H,W,C)" }, { "w", "tensor f32 (3,3,C)" },
    { "bias", "tensor f32 (C)", optional = true }, { "stride", "integer, 1 or 2", default = 1 } },
  returns = "tensor f32 (B, ceil(H / stride), ceil(W / stride), C)",
  raises = "where the shapes disagree, or stride is neither 1 nor 2",
  calls = { "depthwise_conv2d", "depthwise_conv2d_backward_input", "depthwise_conv2d_backward_weight" },
  forward = function(ctx, x, w, bias, stride)
    x = contiguous(expect_tensor(x, "depthwise_conv2d", "x"))
    expect_tensor(w, "depthwise_conv2d", "w")
    stride = stride or 1
    local s = image_shape(x, "depthwise_conv2d")
    if stride ~= 1 and stride ~= 2 then fail("depthwise_conv2d: stride %s, expected 1 or 2", tostring(stride)) end
    local y = empty_on(x, { s[1], math.ceil(s[2] / stride), math.ceil(s[3] / stride), s[4] })
    op.depthwise_conv2d(y, x, w, bias, stride)
    if ctx.needs then ctx.x, ctx.w, ctx.bias, ctx.stride = x, w, bias, stride end
    return y
  end,
  backward = function(ctx, dy)
    local needs, dx, dw, db = ctx.needs, nil, nil, nil
    if needs[1] then
      dx = new_like(ctx.x)
      op.depthwise_conv2d_backward_input(dx, dy, ctx.w, ctx.stride)
    end
    if needs[2] or needs[3] then
      dw, db = gradient_like(ctx.w), ctx.bias and gradient_like(ctx.bias)
      op.depthwise_conv2d_backward_weight(dw, db, ctx.x, dy, ctx.stride)
    end
    return dx, dw, db
  end,
  cases = function(T)
    return { { T { 2, 5, 4, 3 }, T { 3, 3, 3 }, T { 3 } }, { T { 1, 5, 6, 17 }, T { 3, 3, 17 }, nil, 2 },
      { T { 1, 1, 2, 4 }, T { 3, 3, 4 }, T { 4 }, 2 } }
  end,
})

define("upsample2x", {
  text = "Enlarges images by 2, each pixel into four equal ones (nearest neighbour).",
  args = { { "x", "tensor f32 (B,H,W,C)" } },
  returns = "tensor f32 (B,2H,2W,C)",
  raises = "where x has another number of dimensions",
  calls = { "upsample2x", "upsample2x_backward" },
  also = { "interpolate", "upsample" },
  forward = function(_, x)
    x = contiguous(expect_tensor(x, "upsample2x", "x"))
    local s = image_shape(x, "upsample2x")
    local y = empty_on(x, { s[1], 2 * s[2], 2 * s[3], s[4] })
    op.upsample2x(y, x)
    return y
  end,
  backward = function(_, dy)
    local s = dy:shape()
    local dx = empty_on(dy, { s[1], s[2] / 2, s[3] / 2, s[4] })
    op.upsample2x_backward(dx, dy)
    return dx
  end,
  cases = function(T) return { { T { 2, 3, 2, 5 } }, { T { 1, 1, 1, 1 } } } end,
})

define("sepconv2d", {
  text = "Convolves images depthwise and then pointwise [Chollet 2017], after an optional group norm with activation "
    .. "and an optional enlargement: pointwise(depthwise_conv2d(act(group_norm(x)))) + residual, image by image in "
    .. "cache. The values are those of the ops it is made of.",
  args = { { "x", "tensor f32 or bf16 (B,H,W,C)" }, { "w", "tensor f32 (3,3,C), the depthwise filters" },
    { "v", "tensor f32 (O,C), the pointwise weight" }, { "bias", "tensor f32 (O)", optional = true },
    { "gamma", "tensor f32 (C), the norm's gain; nil: neither norm nor activation", optional = true },
    { "beta", "tensor f32 (C), the norm's offset", optional = true },
    { "residual", "tensor of the result's shape, which is added", optional = true },
    { "options", '{ groups = 1 and activation = "none", "silu" or "gelu" of the norm; stride = 1 or 2; up = 1 or 2: '
      .. 'nearest-neighbour enlargement first; output = "f32": the result is f32 under vx.autocast too }',
      optional = true } },
  returns = "tensor f32 (B, ceil(H up / stride), ceil(W up / stride), O); bf16 under vx.autocast",
  raises = "where the shapes disagree, C does not divide into groups, or an option is none of these",
  calls = { "sepconv2d", "sepconv2d_backward" },
  takes_bf16 = true,
  accumulates = true,
  forward = function(ctx, x, w, v, bias, gamma, beta, residual, options)
    x = contiguous(expect_tensor(x, "sepconv2d", "x"))
    local o = check.options("sepconv2d", options, SEPARABLE)
    local s, stride, up = image_shape(x, "sepconv2d"), o.stride, o.up
    local act = activation_number(o.activation, "sepconv2d")
    local dtype = body_dtype(o.output, "sepconv2d")
    local y = empty_on(x, { s[1], math.ceil(s[2] * up / stride), math.ceil(s[3] * up / stride),
      expect_tensor(v, "sepconv2d", "v"):size(1) }, dtype)
    local mean, rstd
    if gamma then mean, rstd = empty_on(x, { s[1], o.groups }), empty_on(x, { s[1], o.groups }) end
    ctx.residual_dtype = residual and residual:dtype()
    residual = residual and contiguous(residual):to(dtype)
    op.sepconv2d { y = y, mean = mean, rstd = rstd, x = x, gamma = gamma, beta = beta, w = w, v = v, bias = bias,
      residual = residual, act = act, eps = 1e-5, stride = stride, up = up }
    if ctx.needs then
      ctx.x, ctx.w, ctx.v, ctx.bias, ctx.gamma, ctx.beta, ctx.mean, ctx.rstd = x, w, v, bias, gamma, beta, mean, rstd
      ctx.act, ctx.stride, ctx.up = act, stride, up
    end
    return y
  end,
  backward = function(ctx, dy, _, before)
    local dx, dw, dv, db = new_like(ctx.x), gradient_like(ctx.w), gradient_like(ctx.v),
      ctx.bias and gradient_like(ctx.bias)
    local dgamma, dbeta = ctx.gamma and gradient_like(ctx.gamma), ctx.gamma and gradient_like(ctx.beta)
    op.sepconv2d_backward { dx = dx, dgamma = dgamma, dbeta = dbeta, dw = dw, dv = dv, dbias = db, dy = dy, x = ctx.x,
      gamma = ctx.gamma, beta = ctx.beta, mean = ctx.mean, rstd = ctx.rstd, w = ctx.w, v = ctx.v, addend = before,
      act = ctx.act, eps = 1e-5, stride = ctx.stride, up = ctx.up }
    return dx, dw, dv, db, dgamma, dbeta, ctx.residual_dtype and dy:to(ctx.residual_dtype)
  end,
  cases = function(T)
    return { { T { 2, 4, 5, 3 }, T { 3, 3, 3 }, T { 6, 3 }, T { 6 } },
      { T { 2, 3, 4, 8 }, T { 3, 3, 8 }, T { 8, 8 }, T { 8 }, T { 8 }, T { 8 }, T { 2, 3, 4, 8 },
        { groups = 2, activation = "silu" } },
      { T { 1, 5, 4, 17 }, T { 3, 3, 17 }, T { 4, 17 }, nil, nil, nil, nil, { stride = 2 } },
      { T { 3, 2, 3, 4 }, T { 3, 3, 4 }, T { 5, 4 }, T { 5 }, T { 4 }, T { 4 }, nil,
        { up = 2, groups = 1, activation = "gelu" } } }
  end,
})

-- -- Windows of any kind ----------------------------------------------------------------------------------------------

--- Reads an option that is a number for rows and columns, or { rows, columns }.
-- @return rows, columns
local function pair(...) return unpack(check.pair(...)) end

--- Gives how many windows there are along both sides of images x, or raises.
local function window_counts(who, x, k, l, how)
  local height, width = x:size(2) + 2 * how.padding_h, x:size(3) + 2 * how.padding_w
  if height < k or width < l then
    fail("%s: x %s with padding %d, %d has images of %d x %d pixels, smaller than the kernel's %d x %d", who,
      shape_text(x), how.padding_h, how.padding_w, height, width, k, l)
  end
  return math.floor((height - k) / how.stride_h) + 1, math.floor((width - l) / how.stride_w) + 1
end

local CONV2D = { stride = { "any", 1 }, padding = { "any", 0 }, groups = { "count", 1 }, output = { { "f32" } } }

--- Reads the options of conv2d: { stride_h, stride_w, padding_h, padding_w, groups, output }.
local function conv2d_options(options)
  local o = check.options("conv2d", options, CONV2D)
  local how = { groups = o.groups, output = o.output }
  how.stride_h, how.stride_w = pair("conv2d", "stride", o.stride, 1)
  how.padding_h, how.padding_w = pair("conv2d", "padding", o.padding, 0)
  return how
end

local NUMBERS = { "stride_h", "stride_w", "padding_h", "padding_w", "groups" }

--- Calls an op of conv2d with the numbers of `how`.
local function call_conv2d(f, how, arguments)
  for _, name in ipairs(NUMBERS) do arguments[name] = how[name] end
  f(arguments)
end

local general_conv2d = tape.recorded { name = "conv2d", outputs = 1,
  forward = function(ctx, x, weight, bias, how)
    local p, q = window_counts("conv2d", x, weight:size(3), weight:size(4), how)
    x, weight = contiguous(x), contiguous(weight)
    local y = empty_on(x, { x:size(1), p, q, weight:size(1) })
    call_conv2d(op.conv2d, how, { y = y, x = x, w = weight, bias = bias })
    if ctx.needs then ctx.x, ctx.weight, ctx.bias, ctx.how = x, weight, bias, how end
    return y
  end,
  backward = function(ctx, dy)
    local needs, dx, dw, db = ctx.needs, nil, nil, nil
    if needs[1] then
      dx = new_like(ctx.x)
      call_conv2d(op.conv2d_backward_input, ctx.how, { dx = dx, dy = dy, w = ctx.weight })
    end
    if needs[2] or needs[3] then
      dw, db = gradient_like(ctx.weight), ctx.bias and gradient_like(ctx.bias)
      call_conv2d(op.conv2d_backward_weight, ctx.how, { dw = dw, dbias = db, x = ctx.x, dy = dy })
    end
    return dx, dw, db
  end }

--- Says whether a convolution is the one that conv3x3 is tuned for.
local function is_3x3(weight, how)
  return weight:size(3) == 3 and weight:size(4) == 3 and how.stride_h == 1 and how.stride_w == 1 and how.padding_h == 1
    and how.padding_w == 1 and how.groups == 1
end

define("conv2d", {
  text = "Convolves images: y[p][q][o] = bias[o] + sum over k, l and c of x[p stride + k - padding][q stride + l - "
    .. "padding][c] weight[o][c][k][l], zeros around. 3x3 with stride 1, padding 1 and one group is conv3x3.",
  args = { { "x", "tensor f32 (B,H,W,C); or bf16 where it is conv3x3" },
    { "weight", "tensor f32 (O,C/groups,kh,kw)" }, { "bias", "tensor f32 (O)", optional = true },
    { "options", "{ stride = 1, padding = 0: pixels of zeros around; each a number or { rows, columns }; groups = 1: "
      .. 'outputs see only the channels of their own group; output = "f32": the result is f32 under vx.autocast too }',
      optional = true } },
  returns = "tensor f32 (B, floor((H + 2 padding - kh) / stride) + 1, floor((W + 2 padding - kw) / stride) + 1, O); "
    .. "bf16 under vx.autocast where it is conv3x3",
  raises = "where the shapes disagree, the groups do not divide them, or the padded image is smaller than the kernel",
  calls = { "conv2d", "conv2d_backward_input", "conv2d_backward_weight", "conv3x3", "conv3x3_backward_input",
    "conv3x3_backward_weight" },
  composite = true,
  forward = function(_, x, weight, bias, options)
    expect_tensor(x, "conv2d", "x")
    expect_tensor(weight, "conv2d", "weight")
    local how = conv2d_options(options)
    if x:dim() ~= 4 then fail("conv2d: x %s should have the shape (B,H,W,C)", shape_text(x)) end
    if weight:dim() ~= 4 then fail("conv2d: weight %s should have the shape (O,C/groups,kh,kw)", shape_text(weight)) end
    local C, O = x:size(4), weight:size(1)
    if weight:size(2) * how.groups ~= C or O % how.groups ~= 0 or weight:size(3) * weight:size(4) == 0 then
      fail("conv2d: x %s and weight %s do not fit in %d group%s, expected a weight (O,%s,kh,kw) with O a multiple of "
        .. "%d", shape_text(x), shape_text(weight), how.groups, how.groups == 1 and "" or "s", C / how.groups,
        how.groups)
    end
    if is_3x3(weight, how) then
      local t, w = record.ops.transpose, weight -- (O,C,3,3)
      w = t(t(t(w, 1, 4), 1, 3), 2, 3) -- (3,3,C,O)
      return record.ops.conv3x3(x, record.ops.contiguous(w), bias, how.output)
    end
    return general_conv2d(x, weight, bias, how)
  end,
  cases = function(T)
    return { { T { 2, 5, 6, 3 }, T { 4, 3, 3, 3 }, T { 4 }, { stride = 2 } },
      { T { 1, 6, 7, 4 }, T { 6, 2, 1, 3 }, nil, { padding = { 0, 1 }, groups = 2 } },
      { T { 1, 4, 5, 2 }, T { 3, 2, 4, 2 }, T { 3 }, { stride = { 1, 3 }, padding = { 2, 1 } } },
      { T { 2, 3, 4, 5 }, T { 4, 5, 1, 1 }, T { 4 } },
      { T { 1, 4, 3, 2 }, T { 3, 2, 3, 3 }, T { 3 }, { padding = 1 } } }
  end,
})

local POOL = { stride = "any", padding = { "any", 0 } }
local AVG_POOL = { stride = "any", padding = { "any", 0 }, count_include_pad = { "boolean", true } }

--- Checks the arguments of a pooling; gives the numbers of its op by name, and the windows along both sides.
local function pool_sizes(who, x, kernel, options, known)
  expect_tensor(x, who, "x")
  if x:dim() ~= 4 then fail("%s: x %s should have the shape (B,H,W,C)", who, shape_text(x)) end
  local o = check.options(who, options, known)
  local how = {}
  how.kernel_h, how.kernel_w = pair(who, "kernel", kernel, 1)
  how.stride_h, how.stride_w = pair(who, "stride", o.stride or kernel, 1)
  how.padding_h, how.padding_w = pair(who, "padding", o.padding, 0)
  if 2 * how.padding_h > how.kernel_h or 2 * how.padding_w > how.kernel_w then
    fail("%s: padding %d, %d is more than half of the kernel's %d x %d", who, how.padding_h, how.padding_w,
      how.kernel_h, how.kernel_w)
  end
  if known == AVG_POOL then how.include_pad = o.count_include_pad and 1 or 0 end
  local p, q = window_counts(who, x, how.kernel_h, how.kernel_w, how)
  return how, { x:size(1), p, q, x:size(4) }
end

--- Joins the numbers of an op with its tensors.
local function with_numbers(how, tensors)
  for name, x in pairs(how) do tensors[name] = x end
  return tensors
end

local KERNEL = { "kernel", "integer of 1 or more, pixels of a window's side, or array { rows, columns }" }
local POOL_OPTIONS = "{ stride = that of the kernel; padding = 0, at most half of the kernel, "

define("max_pool2d", {
  text = "Takes the largest number of each window of images, channel by channel. A NaN is larger than any number; the "
    .. "gradient goes to the first of equals.",
  args = { { "x", "tensor f32 (B,H,W,C)" }, KERNEL, { "options", POOL_OPTIONS
    .. "which is never the largest; each a number or { rows, columns } }", optional = true } },
  returns = "tensor f32 (B, floor((H + 2 padding - kernel) / stride) + 1, the same of W, C)",
  raises = "where x has another number of dimensions, or the padded image is smaller than the kernel",
  calls = { "max_pool2d", "max_pool2d_backward" },
  forward = function(ctx, x, kernel, options)
    local how, shape = pool_sizes("max_pool2d", x, kernel, options, POOL)
    x = contiguous(x)
    local y, index = empty_on(x, shape), ctx.needs and empty_on(x, shape, "i32") or nil
    op.max_pool2d(with_numbers(how, { y = y, index = index, x = x }))
    if ctx.needs then ctx.index, ctx.how, ctx.shape = index, how, x:shape() end
    return y
  end,
  backward = function(ctx, dy)
    local dx = empty_on(dy, ctx.shape)
    op.max_pool2d_backward(with_numbers(ctx.how, { dx = dx, dy = dy, index = ctx.index }))
    return dx
  end,
  cases = function(T)
    return { { T { 2, 6, 5, 3 }, 2 }, { T { 1, 7, 8, 5 }, 3, { stride = 2 } },
      { T { 1, 5, 4, 2 }, { 2, 3 }, { stride = { 2, 1 }, padding = { 1, 0 } } } }
  end,
})

define("avg_pool2d", {
  text = "Averages each window of images, channel by channel.",
  args = { { "x", "tensor f32 (B,H,W,C)" }, KERNEL, { "options", POOL_OPTIONS .. "each a number or { rows, columns }; "
    .. "count_include_pad = true: sums are divided by the window's size, and by the number of its pixels in the image "
    .. "where false }", optional = true } },
  returns = "tensor f32 (B, floor((H + 2 padding - kernel) / stride) + 1, the same of W, C)",
  raises = "where x has another number of dimensions, or the padded image is smaller than the kernel",
  calls = { "avg_pool2d", "avg_pool2d_backward" },
  forward = function(ctx, x, kernel, options)
    local how, shape = pool_sizes("avg_pool2d", x, kernel, options, AVG_POOL)
    x = contiguous(x)
    local y = empty_on(x, shape)
    op.avg_pool2d(with_numbers(how, { y = y, x = x }))
    if ctx.needs then ctx.how, ctx.shape = how, x:shape() end
    return y
  end,
  backward = function(ctx, dy)
    local dx = empty_on(dy, ctx.shape)
    op.avg_pool2d_backward(with_numbers(ctx.how, { dx = dx, dy = dy }))
    return dx
  end,
  cases = function(T)
    return { { T { 2, 6, 5, 3 }, 2 }, { T { 1, 7, 8, 5 }, 3, { stride = 2, padding = 1 } },
      { T { 1, 5, 4, 2 }, { 2, 3 }, { stride = { 2, 1 }, padding = { 1, 1 }, count_include_pad = false } } }
  end,
})

-- -- Sequences --------------------------------------------------------------------------------------------------------

local CONV1D = { stride = { "count", 1 }, padding = { "whole", 0 }, groups = { "count", 1 } }

--- Checks the arguments of conv1d where a word can be clearer than the contract's; gives stride, padding, groups and
-- the frames of the result.
local function conv1d_sizes(x, weight, options)
  expect_tensor(x, "conv1d", "x")
  expect_tensor(weight, "conv1d", "weight")
  local o = check.options("conv1d", options, CONV1D)
  if x:dim() ~= 3 then fail("conv1d: x %s should have the shape (B,L,C)", shape_text(x)) end
  if weight:dim() ~= 3 then fail("conv1d: weight %s should have the shape (O,C/groups,k)", shape_text(weight)) end
  local C, O, k = x:size(3), weight:size(1), weight:size(3)
  if weight:size(2) * o.groups ~= C or O % o.groups ~= 0 or k == 0 then
    fail("conv1d: x %s and weight %s do not fit in %d group%s, expected a weight (O,%s,k) with O a multiple of %d",
      shape_text(x), shape_text(weight), o.groups, o.groups == 1 and "" or "s", C / o.groups, o.groups)
  end
  local width = x:size(2) + 2 * o.padding
  if width < k then
    fail("conv1d: x %s with padding %d has %d frame%s, fewer than the kernel's %d", shape_text(x), o.padding, width,
      width == 1 and "" or "s", k)
  end
  return o.stride, o.padding, o.groups, math.floor((width - k) / o.stride) + 1
end

define("conv1d", {
  text = "Convolves sequences over time: y[t][o] = bias[o] + sum over j and c of x[t stride + j - padding][c] "
    .. "weight[o][c][j], zeros beyond both ends.",
  args = { { "x", "tensor f32 (B,L,C)" }, { "weight", "tensor f32 (O,C/groups,k)" },
    { "bias", "tensor f32 (O)", optional = true },
    { "options", "{ stride = 1, padding = 0: frames of zeros at either end; groups = 1: outputs see only the channels "
      .. "of their own group }", optional = true } },
  returns = "tensor f32 (B, floor((L + 2 padding - k) / stride) + 1, O)",
  raises = "where the shapes disagree, the groups do not divide them, or L + 2 padding is below k",
  calls = { "conv1d", "conv1d_backward_input", "conv1d_backward_weight" },
  forward = function(ctx, x, weight, bias, options)
    local stride, padding, groups, T = conv1d_sizes(x, weight, options)
    x, weight = contiguous(x), contiguous(weight)
    local y = empty_on(x, { x:size(1), T, weight:size(1) })
    op.conv1d(y, x, weight, bias, stride, padding, groups)
    if ctx.needs then
      ctx.x, ctx.weight, ctx.bias, ctx.stride, ctx.padding, ctx.groups = x, weight, bias, stride, padding, groups
    end
    return y
  end,
  backward = function(ctx, dy)
    local needs, dx, dw, db = ctx.needs, nil, nil, nil
    if needs[1] then
      dx = new_like(ctx.x)
      op.conv1d_backward_input(dx, dy, ctx.weight, ctx.stride, ctx.padding, ctx.groups)
    end
    if needs[2] or needs[3] then
      dw, db = gradient_like(ctx.weight), ctx.bias and gradient_like(ctx.bias)
      op.conv1d_backward_weight(dw, db, ctx.x, dy, ctx.stride, ctx.padding, ctx.groups)
    end
    return dx, dw, db
  end,
  cases = function(T)
    return { { T { 2, 7, 3 }, T { 4, 3, 3 }, T { 4 }, { stride = 2 } }, { T { 1, 11, 1 }, T { 2, 1, 4 }, nil,
      { stride = 3, padding = 2 } }, { T { 2, 5, 6 }, T { 4, 3, 4 }, T { 4 }, { padding = 2, groups = 2 } },
      { T { 1, 4, 2 }, T { 3, 2, 2 } } }
  end,
})
