-- What a wrong call is told: the op, both shapes, and the line of the caller. A failed op changes nothing.

local H = require "tests.helper"
local vx = H.vx
local arguments = require "vertex.arguments"
local core = require "vertex.core"
local ops = vx.ops
local raises = H.raises

local f = function(...) return vx.zeros { ... } end
local i32 = function(...) return vx.zeros({ ... }, { dtype = "i32" }) end

describe("a shape mismatch names the op and both shapes:", function()
  local two_shapes = { "add", "sub", "mul", "div", "maximum", "minimum", "eq", "lt", "le", "ne", "gt", "ge" }
  for _, name in ipairs(two_shapes) do
    it(name, function()
      raises(function() ops[name](f(2, 3), f(2, 4)) end, name .. ": ", "(2,3)", "(2,4)")
      raises(function() ops[name](f(2, 3), "5") end, name .. ": b is '5', expected a tensor f32")
      raises(function() ops[name](5, 5) end, name .. ": a is a number")
    end)
  end

  it("mse", function() raises(function() ops.mse(f(2, 3), f(3, 2)) end, "mse: ", "(2,3)", "(3,2)") end)
  it("contrastive_loss", function()
    raises(function() ops.contrastive_loss(f(3, 4), f(3, 5), i32(3, 2)) end, "contrastive: ", "(3,4)", "(3,5)")
    raises(function() ops.contrastive_loss(f(3, 4), f(3, 4), i32(2, 2)) end, "contrastive_loss: ", "(3,4)", "(2,2)")
    raises(function() ops.contrastive_loss(f(3, 4), f(3, 4), i32(6)) end, "y (3,4) and distractors (6)", "(N,K)")
    raises(function() ops.contrastive_loss(f(0, 4), f(0, 4), i32(0, 2)) end, "contrastive_loss: y (0,4) has no rows")
    raises(function() ops.contrastive_loss(f(3, 4), f(3, 4) + 0 / 0, i32(3, 2)) end, "row 0 of q holds a NaN or Inf")
  end)
  it("matmul", function()
    raises(function() ops.matmul(f(256, 64), f(32, 16)) end, "matmul: ", "a (256,64)", "b (32,16)", "inner")
    raises(function() ops.matmul(f(2, 3, 4), f(3, 4, 5)) end, "matmul: ", "(2,3,4)", "(3,4,5)", "batch")
    raises(function() ops.matmul(f(3), f(3, 4)) end, "matmul: ", "(3)", "2 or 3 dimensions")
  end)
  it("linear", function()
    raises(function() ops.linear(f(5, 4), f(3, 6)) end, "linear: ", "x (5,4)", "w (3,6)")
    raises(function() ops.linear(f(5, 4), f(3, 4), f(2)) end, "linear: ", "w (3,4)", "bias (2)")
  end)
  it("conv3x3", function()
    raises(function() ops.conv3x3(f(1, 4, 4, 3), f(3, 3, 5, 2)) end, "conv3x3: ", "(1,4,4,3)", "(3,3,5,2)")
    raises(function() ops.conv3x3(f(1, 4, 4, 3), f(3, 3, 3, 2), f(4)) end, "conv3x3: ", "(4)")
    raises(function() ops.conv3x3(f(1, 4, 4, 3), f(5, 5, 3, 2)) end, "conv3x3: ", "(5,5,3,2)", "(3,3,")
    raises(function() ops.conv3x3(f(4, 4, 3), f(3, 3, 3, 2)) end, "conv3x3: ", "(4,4,")
  end)
  it("conv2d", function()
    raises(function() ops.conv2d(f(4, 4, 3), f(2, 3, 3, 3)) end, "conv2d: ", "x (4,4,3)", "(B,H,W,C)")
    raises(function() ops.conv2d(f(1, 4, 4, 3), f(2, 3, 3)) end, "conv2d: ", "weight (2,3,3)", "(O,C/groups,kh,kw)")
    raises(function() ops.conv2d(f(1, 4, 4, 3), f(2, 5, 3, 3)) end, "conv2d: ", "x (1,4,4,3)", "weight (2,5,3,3)",
      "(O,3,kh,kw)")
    raises(function() ops.conv2d(f(1, 4, 4, 6), f(3, 3, 3, 3), nil, { groups = 2 }) end, "conv2d: ", "multiple of 2")
    raises(function() ops.conv2d(f(1, 4, 4, 3), f(2, 3, 3, 2), f(3)) end, "conv2d: ", "bias (3)")
    raises(function() ops.conv2d(f(1, 4, 4, 3), f(2, 3, 3, 3), f(3), { padding = 1 }) end, "conv3x3: ", "bias (3)")
    raises(function() ops.conv2d(f(1, 4, 4, 3), f(2, 3, 5, 7), nil, { padding = { 1, 1 } }) end, "conv2d: ",
      "images of 6 x 6 pixels", "kernel's 5 x 7")
    raises(function() ops.conv2d(f(1, 4, 4, 3), f(2, 3, 3, 3), nil, { stride = 0 }) end, "conv2d: stride is 0")
    raises(function() ops.conv2d(f(1, 4, 4, 3), f(2, 3, 3, 3), nil, { stride = { 1 } }) end, "conv2d: stride has 1")
    raises(function() ops.conv2d(f(1, 4, 4, 3), f(2, 3, 3, 3), nil, { dilation = 2 }) end, "conv2d: unknown option",
      "dilation")
  end)
  it("max_pool2d and avg_pool2d", function()
    for name, pool in pairs { max_pool2d = ops.max_pool2d, avg_pool2d = ops.avg_pool2d } do
      raises(function() pool(f(4, 4, 3), 2) end, name .. ": ", "x (4,4,3)", "(B,H,W,C)")
      raises(function() pool(f(1, 4, 4, 3), 5) end, name .. ": ", "images of 4 x 4 pixels", "kernel's 5 x 5")
      raises(function() pool(f(1, 4, 4, 3), 2, { padding = 2 }) end, name .. ": padding 2, 2", "half", "2 x 2")
      raises(function() pool(f(1, 4, 4, 3), 0) end, name .. ": kernel is 0")
      raises(function() pool(f(1, 4, 4, 3), 2, { ceil_mode = true }) end, name .. ": unknown option 'ceil_mode'")
    end
  end)
  it("conv1d", function()
    raises(function() ops.conv1d(f(4, 3), f(2, 3, 3)) end, "conv1d: ", "x (4,3)", "(B,L,C)")
    raises(function() ops.conv1d(f(1, 4, 3), f(2, 3)) end, "conv1d: ", "weight (2,3)", "(O,C/groups,k)")
    raises(function() ops.conv1d(f(1, 4, 3), f(2, 5, 3)) end, "conv1d: ", "x (1,4,3)", "weight (2,5,3)", "(O,3,k)")
    raises(function() ops.conv1d(f(1, 4, 6), f(3, 3, 3), nil, { groups = 2 }) end, "conv1d: ", "(1,4,6)", "(3,3,3)",
      "multiple of 2")
    raises(function() ops.conv1d(f(1, 4, 3), f(2, 3, 3), f(3)) end, "conv1d: ", "bias (3)")
    raises(function() ops.conv1d(f(1, 4, 3), f(2, 3, 5)) end, "conv1d: ", "x (1,4,3)", "4 frames", "kernel's 5")
    raises(function() ops.conv1d(f(1, 2, 3), f(2, 3, 5), nil, { padding = 1 }) end, "conv1d: ", "padding 1", "4 frames")
    raises(function() ops.conv1d(f(1, 4, 3), f(2, 3, 3), nil, { stride = 0 }) end, "conv1d: stride is 0")
    raises(function() ops.conv1d(f(1, 4, 3), f(2, 3, 3), nil, { dilation = 2 }) end, "conv1d: unknown option",
      "dilation")
  end)
  it("dropout", function()
    raises(function() ops.dropout(f(3), 1.5) end, "dropout: p is 1.5", "from 0 to 1")
    raises(function() ops.dropout(f(3), 0 / 0) end, "dropout: p is ", "nan", "from 0 to 1")
    raises(function() ops.dropout(3, 0.5) end, "dropout: x is 3, expected a tensor")
  end)
  it("depthwise_conv2d", function()
    raises(function() ops.depthwise_conv2d(f(1, 4, 4, 3), f(3, 3, 5)) end, "depthwise_conv2d: ", "(1,4,4,3)", "(3,3,5)")
    raises(function() ops.depthwise_conv2d(f(1, 4, 4, 3), f(3, 3, 3), nil, 3) end, "depthwise_conv2d: ", "stride 3")
    raises(function() ops.depthwise_conv2d(f(4, 4, 3), f(3, 3, 3)) end, "depthwise_conv2d: ", "(4,4,3)")
  end)
  it("sepconv2d", function()
    raises(function() ops.sepconv2d(f(1, 4, 4, 3), f(3, 3, 5), f(2, 3)) end, "sepconv2d: ", "(1,4,4,3)", "(3,3,5)")
    raises(function() ops.sepconv2d(f(1, 4, 4, 3), f(3, 3, 3), f(2, 4)) end, "sepconv2d: ", "(1,4,4,3)", "(2,4)")
    raises(function() ops.sepconv2d(f(1, 4, 4, 3), f(3, 3, 3), f(2, 3), nil, f(3)) end, "sepconv2d: ",
      "all be there or none")
    raises(function() ops.sepconv2d(f(1, 4, 4, 3), f(3, 3, 3), f(2, 3), nil, nil, nil, f(1, 4, 4, 3)) end,
      "sepconv2d: ", "(1,4,4,3)", "(1,4,4,2)")
    raises(function() ops.sepconv2d(f(1, 4, 4, 3), f(3, 3, 3), f(2, 3), nil, nil, nil, nil, { stride = 3 }) end,
      "sepconv2d: ", "stride = 3")
  end)
  it("attention", function()
    local q = f(2, 5, 3, 4)
    raises(function() ops.attention(q, f(2, 6, 3, 4), q) end, "attention: ", "(2,5,3,4)", "(2,6,3,4)")
    raises(function() ops.attention(q, q, f(2, 5, 3, 7)) end, "attention: ", "(2,5,3,4)", "(2,5,3,7)")
    raises(function() ops.attention(f(5, 3, 4), f(5, 3, 4), f(5, 3, 4)) end, "attention: ", "(5,3,4)", "(B,T,H,D)")
    raises(function() ops.attention(q, q) end, "attention: v is nil, expected a tensor f32 (B,T,H,D)")
    raises(function() ops.attention(q, q, q, { lengths = f(2) }) end, "attention: lengths f32 (2)", "i32 (B)")
    raises(function() ops.attention(q, q, q, { lengths = i32(3) }) end, "attention: lengths i32 (3)", "(2,5,3,4)")
    for _, length in ipairs { 6, -1 } do
      raises(function() ops.attention(q, q, q, { lengths = vx.tensor({ 5, length }, { dtype = "i32" }) }) end,
        "attention: length " .. length .. " of row 1 is outside 0 .. 5")
    end
    raises(function() ops.attention(q, q, q, { dropout = 1.5 }) end, "attention: dropout is 1.5", "from 0 to 1")
    raises(function() ops.attention(q, q, q, { length = i32(2) }) end, "attention: ", "'length'", "lengths")
  end)
  it("upsample2x", function() raises(function() ops.upsample2x(f(4, 4, 3)) end, "upsample2x: ", "(4,4,3)",
    "(B,H,W,C)") end)
  it("group_norm", function()
    raises(function() ops.group_norm(f(2, 5, 8), f(6), f(8), 2) end, "group_norm: ", "(2,5,8)", "(6)")
    raises(function() ops.group_norm(f(2, 5, 8), f(8), f(8), 3) end, "group_norm: ", "C % G == 0", "C = 8", "G = 3")
    raises(function() ops.group_norm(f(2, 5, 8), f(8), f(8), 2, "swish") end, "group_norm: ", "'swish'", "silu")
    raises(function() ops.group_norm(f(8), f(8), f(8), 2) end, "group_norm: ", "(8)")
    raises(function() ops.group_norm(f(2, 5, 8), f(8), f(8), 2, nil, nil, i32(3)) end, "group_norm: ", "(2,5,8)", "(3)")
    raises(function() ops.group_norm(f(2, 5, 8), f(8), f(8), 2, nil, nil, f(2)) end, "group_norm: ", "i32")
    raises(function() ops.group_norm(f(2, 5, 8), f(8), f(8), 2, nil, nil, i32(2):fill(6)) end,
      "group_norm: length 6 of row 0 is outside 0 .. 5")
  end)
  it("layer_norm", function() raises(function() ops.layer_norm(f(5, 8), f(8), f(6)) end, "layer_norm: ", "(5,8)",
    "(6)") end)
  it("gather", function()
    raises(function() ops.gather(f(5, 2, 3), i32(4)) end, "gather: ", "(5,2,3)")
    local index = vx.tensor({ 0, 4, 5, 1 }, { dtype = "i32" })
    raises(function() ops.gather(f(5, 2), index) end, "gather: ", "index 5", "row 2", "0 .. 4")
    raises(function() ops.gather(f(5, 2), vx.tensor({ -1 }, { dtype = "i32" })) end, "gather: ", "index -1")
  end)
  it("cat", function()
    raises(function() ops.cat(1, f(2, 3), f(2, 4)) end, "cat: ", "(2,3)", "(2,4)", "dimension 1")
    raises(function() ops.cat(1, f(2, 3), f(2, 3, 4)) end, "cat: ", "(2,3)", "(2,3,4)")
    raises(function() ops.cat(3, f(2, 3)) end, "cat: ", "dimension 3", "(2,3)")
    raises(function() ops.cat(1) end, "cat: ")
  end)
  it("reshape", function()
    raises(function() f(2, 3):reshape { 4, 2 } end, "reshape: ", "(2,3)", "(4,2)")
    raises(function() f(2, 3):reshape { 4, -1 } end, "reshape: ", "(2,3)", "(4,-1)")
  end)
  it("expand", function()
    raises(function() f(2, 3):expand { 4, 3 } end, "expand: ", "(2,3)", "(4,3)")
    raises(function() f(2, 3):expand { 3 } end, "expand: ", "(2,3)", "(3)")
  end)
  it("narrow, select, transpose", function()
    raises(function() f(2, 3):narrow(2, 3, 2) end, "narrow: ", "(2,3)", "dimension 2")
    raises(function() f(2, 3):narrow(3, 1, 1) end, "narrow: ", "(2,3)", "dimension 3")
    raises(function() f(2, 3):select(1, 3) end, "index 3", "(2,3)")
    raises(function() return f(2, 3)[3], nil end, "index 3", "(2,3)")
    raises(function() f(2, 3):transpose(1, 3) end, "transpose: ", "dimension 3", "(2,3)")
  end)
  for _, name in ipairs { "sum", "mean", "max", "min" } do
    it(name, function() raises(function() ops[name](f(2, 3), 3) end, name .. ": ", "dimension 3", "(2,3)") end)
  end
  it("max and min of nothing", function()
    raises(function() f(0, 3):max(1) end, "max of no elements")
    raises(function() f(0, 3):min() end, "min of no elements")
  end)
  it("softmax and log_softmax of nothing", function()
    raises(function() ops.softmax(f(2, 0)) end, "softmax: ", "C > 0")
    raises(function() ops.log_softmax(f(2, 0)) end, "softmax: ", "C > 0")
  end)
  it("assign and the quantizers' ops", function()
    raises(function() ops.assign(f(5, 2, 3), f(2, 7, 4), "euclid") end, "assign: ", "(5,2,3)", "(2,7,4)")
    raises(function() ops.assign(f(5, 3), f(2, 7, 3), "euclid") end, "assign: ", "(5,3)", "(2,7,3)")
    raises(function() ops.assign(f(5, 2, 3), f(2, 7, 3), "l1") end, "assign: ", "'l1'", "euclid", "cosine")
    raises(function() ops.quantize_hard(f(5, 2, 3), f(1, 7, 3), { metric = "euclid", estimator = "ste", beta = 1 }) end,
      "assign: ", "(5,2,3)", "(1,7,3)")
    raises(function()
      ops.quantize_smooth(f(5, 2, 3), f(2, 7, 4), f(1), { sampler = "softmax", regularizer = "none", gumbel_tau = 1,
        shards = 1, seed = 1, stream = 1 })
    end, "smooth_forward: ", "(5,2,3)", "(2,7,4)")
  end)
  it("vertex_knn and knn", function()
    raises(function() ops.vertex_knn(f(3), 1, "ce") end, "vertex_knn: ", "(3)", "(N,M)")
    raises(function() ops.vertex_knn(f(3, 2), 1, "l1") end, "vertex_knn: ", "'l1'", "ce", "l2")
    raises(function() ops.vertex_knn(f(3, 2), 4, "ce") end, "vertex_knn: ", "K <= N", "K = 4", "N = 3")
    raises(function() ops.knn(f(3, 2), f(4, 5), 1) end, "knn: ", "(3,2)", "(4,5)")
    raises(function() ops.knn(f(3, 2), f(3, 2), 3, true) end, "knn: ", "K + exclude_self <= L", "K = 3")
    local bad = f(4, 2)
    bad[3][1] = 0 / 0
    raises(function() ops.knn(f(3, 2), bad, 1) end, "knn: ", "row 2 of y")
    raises(function() ops.vertex_knn(bad, 1, "ce") end, "vertex_knn: ", "row 2 of p")
  end)
  it("dirichlet_mle and dirichlet_kl", function()
    raises(function() ops.dirichlet_mle(f(5)) end, "dirichlet_mle: ", "(5)", "(N,M)")
    raises(function() ops.dirichlet_mle(f(1, 3)) end, "dirichlet_mle: ", "(1,3)", "at least 2")
    raises(function() ops.dirichlet_mle(f(3, 2):fill(math.log(0.5))) end, "dirichlet_mle: ", "all equal")
    raises(function() ops.dirichlet_mle(f(3, 2):fill(-1 / 0)) end, "dirichlet_mle: ", "finite")
    raises(function() ops.dirichlet_mle(f(3, 2):fill(0 / 0)) end, "dirichlet_mle: ", "finite")
    raises(function() ops.dirichlet_kl(f(3), f(4)) end, "dirichlet_kl: ", "(3)", "(4)")
    raises(function() ops.dirichlet_kl(f(3):fill(1), vx.tensor { 1, 1, 0 }) end, "dirichlet_kl: ",
      "concentration 2 of b is 0")
  end)
  it("adamw, at any place of its lists, where nothing is written then", function()
    local function tuple(...) return { f(...), f(...), f(...), f(...):fill(1), 0 } end
    local function refused(change, ...)
      local tuples = { tuple(2, 3), tuple(5), tuple(4) }
      local numbers = change(tuples) or {}
      local before = {}
      for i, t in ipairs(tuples) do before[i] = { t[1] and t[1]:bytes(), t[2]:bytes(), t[3]:bytes() } end
      local function call()
        H.adamw(tuples, numbers.lr or 0.1, numbers.beta1 or 0.9, numbers.beta2 or 0.99, numbers.eps or 1e-8,
          numbers.step or 1)
      end
      raises(call, ...)
      for i, t in ipairs(tuples) do assert.same(before[i], { t[1] and t[1]:bytes(), t[2]:bytes(), t[3]:bytes() }) end
    end
    refused(function(t) t[2][4] = f(6) end, "adamw[1]: p (5) and g (6) disagree on their shape")
    refused(function(t) t[3][2] = f(2, 2) end, "adamw[2]: p (4) and m (2,2) disagree on their shape")
    refused(function(t) t[1][3] = i32(2, 3) end, "adamw[0]: v (2,3) is i32, expected f32")
    refused(function(t) t[3][1] = f(4, 2):select(2, 1) end, "adamw[2]: p (4) is a strided view")
    refused(function(t) t[3][1] = false end, "adamw[2]: p is a released tensor")
    refused(function(t) t[2][4] = false end, "adamw[1]: g is a released tensor")
    refused(function(t) t[3][1] = t[1][1]:reshape { 6 }:narrow(1, 2, 4) end,
      "adamw: p[0] (2,3) and p[2] (4) share memory")
    refused(function(t) t[2][3] = t[2][2] end, "adamw: m[1] (5) and v[1] (5) share memory")
    refused(function(t) t[3] = t[2] end, "adamw: p[1] (5) and p[2] (5) share memory")
    for _, bad in ipairs { -1, 0 / 0, 1 / 0 } do
      refused(function(t) t[2][5] = bad end, "adamw[1]: needs decay ", "got decay = ")
      refused(function() return { lr = bad } end, "adamw[0]: needs lr ", "got lr = ")
      refused(function() return { beta1 = bad } end, "adamw[0]: needs beta1 ", "got beta1 = ")
      refused(function() return { beta2 = bad } end, "adamw[0]: needs beta2 ", "got beta2 = ")
      refused(function() return { eps = bad } end, "adamw[0]: needs eps ", "got eps = ")
    end
    refused(function() return { lr = 1 / 0 } end, "adamw[0]: needs lr < inf, got lr = inf")
    refused(function() return { beta1 = 1 } end, "needs beta1 < 1, got beta1 = 1")
    refused(function() return { step = 0 } end, "needs step >= 1, got step = 0")
  end)
  it("count_codes and copy", function()
    raises(function() ops.count_codes(i32(5, 2), 3, i32(1, 3)) end, "count_codes: ", "(5,2)", "(1,3)")
    raises(function() f(2, 3):copy(f(3, 2)) end, "copy: ", "(2,3)", "(3,2)")
  end)
end)

describe("a dtype mismatch names the op and the dtypes:", function()
  -- of any dtype
  local any = { reshape = true, expand = true, narrow = true, select = true, transpose = true, contiguous = true,
    cat = true, stack = true,
    where = true, masked_fill = true } -- the condition
  for _, op in ipairs(ops.registry) do
    if op.cases and not any[op.name] then
      it(op.name, function()
        local args = op.cases(H.generator(H.number_of(op.name)))[1]
        local n = 0
        for i in pairs(args) do n = math.max(n, i) end
        for i = 1, n do
          if vx.is_tensor(args[i]) and args[i]:dtype() == "f32" then
            local bad = { unpack(args, 1, n) }
            bad[i] = args[i]:to "i32"
            local message = raises(function() local _ = op.name and ops[op.name](unpack(bad, 1, n)) end, "is i32",
              "expected f32")
            -- the C op that refused: its own name, or the one this op is made of
            local says = message:match ":%d+: ([%w_]+): "
            local expected = { [op.name] = true }
            for _, name in ipairs(op.calls) do expected[name] = true end
            assert.is_true(expected[says], message)
          end
        end
      end)
    end
  end

  it("gather and count_codes want i32 indices", function()
    raises(function() ops.gather(f(3, 4), f(2)) end, "gather: ", "is f32", "expected i32")
    raises(function() ops.count_codes(f(3, 1), 4) end, "count_codes: ", "is f32", "expected i32")
  end)
  it("argmax, nonfinite, assign, uniform, normal", function()
    raises(function() ops.argmax(i32(2, 3)) end, "argmax: ", "i32", "f32")
    raises(function() ops.nonfinite(i32(2, 3)) end, "nonfinite: ", "i32", "f32")
    raises(function() ops.assign(i32(2, 1, 3), f(1, 4, 3), "euclid") end, "assign: ", "i32", "f32")
    raises(function() ops.uniform(i32(2)) end, "uniform: ", "i32", "f32")
    raises(function() ops.normal(i32(2)) end, "normal: ", "i32", "f32")
    raises(function() vx.randn({ 2 }, { dtype = "u8" }) end, "normal: ", "u8", "f32")
  end)
  it("an unknown dtype lists the known", function()
    raises(function() vx.zeros({ 2 }, { dtype = "f64" }) end, "'f64'", "f32", "bf16", "i32", "u8")
  end)
end)

describe("values out of range:", function()
  it("shapes", function()
    raises(function() vx.zeros { 2, -1 } end, "size 2", "-1")
    raises(function() vx.zeros { 2.5 } end, "2.5")
    raises(function() vx.zeros { "3" } end, "size 1")
    raises(function() vx.zeros { 0 / 0 } end, "nan")
    raises(function() vx.zeros { 1, 1, 1, 1, 1, 1, 1, 1, 1 } end, "8 dimensions", "9")
    raises(function() vx.zeros { 2 ^ 31, 2 ^ 31 } end, "2^60")
  end)
  it("tensor()", function()
    raises(function() vx.tensor { { 1, 2 }, { 3 } } end, "ragged")
    raises(function() vx.tensor { { 1, 2 }, 3 } end, "number where a row")
    raises(function() vx.tensor { 1, { 2 } } end, "row where a number")
    raises(function() vx.tensor { 1, "x" } end, "string")
    raises(function() vx.tensor "x" end, "data is 'x', expected a number")
    raises(function() vx.tensor(vx.zeros { 2 }) end, "data is a tensor f32 (2), expected a number")
    local round = {}
    round[1] = round
    raises(function() vx.tensor(round) end, "more than 8 deep")
    raises(function() vx.tensor { { { { { { { { { 1 } } } } } } } } } end, "more than 8 deep")
  end)
  it("item, fromtable, frombytes", function()
    raises(function() f(2, 3):item() end, "item", "(2,3)")
    raises(function() f(2, 3):fromtable { 1, 2 } end, "fromtable", "2 numbers", "(2,3)")
    raises(function() f(2, 3):frombytes "abc" end, "frombytes", "3 bytes", "(2,3)")
    raises(function() f(2, 3):size(3) end, "size(3)", "2 dimensions")
  end)
  it("views outside their storage", function()
    local x = f(2, 3)
    raises(function() core.view(x, { 7 }, { 1 }, 0) end, "view: ", "(7)", "(2,3)")
    raises(function() core.view(x, { 2 }, { 1 }, 5) end, "view: ", "offset 5")
    raises(function() core.view(x, { 2 }, { 1 }, -1) end, "view: ", "offset -1")
    raises(function() core.view(x, { 2 }, { -1 }, 0) end, "view: ")
    assert.same({ 2 }, core.view(x, { 2 }, { -1 }, 1):shape())
  end)
  it("seeds, threads, devices", function()
    for _, bad in ipairs { -1, 1.5, 2 ^ 54, "x" } do raises(function() vx.seed(bad) end, "seed") end
    for _, bad in ipairs { 0, -1, 1.5, "x" } do raises(function() vx.threads(bad) end, "threads") end
    raises(function() vx.threads(100000) end, "threads", "100000")
    raises(function() vx.device "tpu" end, "tpu", "cpu")
    raises(function() vx.zeros({ 1 }, { device = "cuda:99" }) end, "cuda")
    assert.equal("cpu", vx.device())
  end)
  it("arange", function()
    assert.same({ 10000000 }, vx.arange(0, 1e6, 0.1):shape())
    assert.same({ 1 }, vx.arange(0, 1e-10):shape())
    assert.same({ 1 }, vx.arange(2, 2 + 1e-12):shape())
    assert.same({ 3 }, vx.arange(1e7, 1e7 + 0.3, 0.1):shape()) -- 1e7 + 3 * 0.1 is not below the end
    assert.same({ 3 }, vx.arange(-1e7, -1e7 - 0.3, -0.1):shape())
    assert.same({ 1, 0.5, 0 }, vx.arange(1, -0.5, -0.5):totable())
    assert.same({ 0 }, vx.arange(2, 1):shape())
    raises(function() vx.arange(0, 5, 0) end, "arange")
    raises(function() vx.arange "x" end, "arange")
  end)
end)

describe("what a newcomer types", function()
  it("tells where the sizes go, and what is one too many", function()
    raises(function() vx.zeros(3, 4) end, "zeros: shape is 3, expected an array of sizes, as in { 3, 4 }")
    raises(function() f(2, 3):reshape(3, 2) end, "reshape: shape is 3, expected an array of sizes")
    raises(function() vx.softmax(f(2, 3), 3) end, "softmax: dimension 3 of a tensor (2,3)")
    raises(function() vx.log(f(2), 10) end, "log: one argument too many, 10; it takes (x)")
    raises(function() vx.layer_norm(f(2, 3)) end, "layer_norm: gamma is nil, expected a tensor f32 (C)")
    raises(function() f(2, 3):narrow(1, 1, 1.5) end, "narrow: count is 1.5, expected an integer of 0 or more")
    raises(function() vx.nn.Linear(3, 3).forward(f(2, 3)) end, "Linear: called on a tensor f32 (2,3)", "x:forward(...)")
    raises(function() vx.optim.constant "1e-3" end, "constant: rate is '1e-3', expected a number")
  end)

  it("refuses options that are none, with the nearest", function()
    for text, call in pairs {
      ["zeros: unknown option 'dytpe', did you mean 'dtype'?"] = function() vx.zeros({ 2 }, { dytpe = "i32" }) end,
      ["randn: unknown option 'dytpe', did you mean 'dtype'?"] = function() vx.randn({ 2 }, { dytpe = "i32" }) end,
      ["tensor: unknown option 'requires_gard', did"] = function() vx.tensor({ 2 }, { requires_gard = true }) end,
      ["arange: unknown option 'type'"] = function() vx.arange(3, { type = "i32" }) end,
      ["load: unknown option 'devcie', did"] = function() vx.load("x.npy", { devcie = "cpu" }) end,
      ["Linear: unknown option 'bais', did you mean 'bias'?"] = function() vx.nn.Linear(3, 3, { bais = false }) end,
      ["Conv2d: unknown option 'strid', did you mean 'stride'?"] = function() vx.nn.Conv2d(3, 4, 3, { strid = 2 }) end,
      ["GroupNorm: unknown option 'eps'"] = function() vx.nn.GroupNorm(4, 2, { eps = 1e-5 }) end,
      ["SeparableConv2d: unknown option 'strides'"] = function() vx.nn.SeparableConv2d(3, 3, { strides = 2 }) end,
      ["warmup_cosine: unknown option 'paek'"] = function() vx.optim.warmup_cosine { paek = 1, total = 3 } end,
      ["progress: unknown option 'totl'"] = function() vx.runs.progress("", { totl = 3 }) end,
      ["graph: unknown option 'devise'"] = function() vx.graph(function() end, { devise = "cpu" }) end,
    } do raises(call, text) end
  end)

  it("says what a name of PyTorch's is here, and which name was nearly named", function()
    local x, model = f(2), vx.nn.Linear(2, 2)
    for text, call in pairs {
      ["vx.softmx: no such name, did you mean 'softmax'?"] = function() return vx.softmx end,
      ["vx.nn.Liner: no such name, did you mean 'Linear'?"] = function() return vx.nn.Liner end,
      ["vx.optim.AdmaW: no such name, did you mean 'AdamW'?"] = function() return vx.optim.AdmaW end,
      ["x.sahpe: a tensor has no such field, did you mean 'shape'?"] = function() return x.sahpe end,
      ["x.require_grad: a tensor has no such field, did"] = function() x.require_grad = true end,
      ["module.paramters: no such field, did you mean 'parameters'?"] = function() return model.paramters end,
      ['module:cuda: no such method; PyTorch\'s cuda is here model:to "cuda:0"'] = function() model:cuda() end,
      ["vx.manual_seed: no such name; PyTorch's manual_seed is here vx.seed(n)"] = function() vx.manual_seed(1) end,
      ["x:cuda: no such method; PyTorch's cuda is here x:to"] = function() x:cuda() end,
    } do raises(call, text) end
    assert.is_nil(x.grad)
    x.label = "mine"
    assert.equal("mine", x.label)
    assert.is_nil(vx.nothing_of_the_kind)
    assert.is_nil(vx.nn.Linear(2, 2, { bias = false }).bias)
  end)

  it("explains indices that are tables or tensors", function()
    raises(function() return f(2, 3)[{ 1, 2 }], nil end, "x[{ ... }]: write x[i][j]")
    raises(function() return f(2, 3)[i32(2)], nil end, "x[tensor]: write vx.gather")
    raises(function() f(2, 3)[{ 1, 2 }] = 0 end, "x[{ ... }]: write x[i][j]")
  end)

  it("says how to convert files of others", function()
    for head, words in pairs { ["PK\3\4"] = "zip file", ["\128\2"] = "a pickle", ["\137HDF\r\n"] = "HDF5" } do
      local path = H.scratch "model.pt"
      H.write(path, head .. ("x"):rep(100))
      raises(function() vx.load(path) end, words, "Convert it in Python", "safetensors.torch.save_file")
    end
  end)
end)

describe("a method says in words what it was given:", function()
  it("those of every quantizer", function()
    for _, item in ipairs(vx.quantizers()) do
      local q, z = vx.quantizer(item.name, { dim = 4, codes = 8, k = 2 }), f(8, 4)
      raises(function() q(z, 5) end, "quantizer: given is 5, expected a table")
      local class = getmetatable(q)
      while rawget(class, "is_module") do -- the family's own methods and those that it has of others
        for key, method in pairs(class) do
          if type(method) == "function" and debug.getlocal(arguments.plain(method), 1) == "self"
            and not key:find "^_" then
            raises(function() method(z) end, "called on a tensor f32 (8,4); a method takes its object before a colon")
          end
        end
        class = getmetatable(class).__index
      end
      raises(function() q:take(1, z) end, "quantizer:take: book is 1, expected a tensor")
      raises(function() q:encode() end, "quantizer:encode: z is nil, expected a tensor")
      raises(function() q.row_sums(z, z, "x") end, "quantizer:row_sums: count is 'x', expected how many sums")
      raises(function() q:learn(z, 1) end, "output is 1, expected a table")
      raises(function() q:quantize_apart(z) end, "given is nil, expected a table")
    end
  end)

  it("those of metrics, models and runs", function()
    raises(function() vx.metrics.moments(3).mean(5) end, "moments:mean: called on 5")
    raises(function() vx.metrics.inception_scores(20):add(5) end, "inception_score:add: logits is 5, expected a tensor")
    raises(function() vx.metrics.code_use(3):restore {} end, "counter: counts are nil, expected a tensor (1,3)")
    local w2v = vx.models.wav2vec2 { encoder_num_layers = 1, encoder_embed_dim = 16, encoder_num_heads = 2 }
    raises(function() w2v.frames(400) end, "wav2vec2:frames: called on 400")
    raises(function() w2v:extract("x") end, "wav2vec2:extract: waves is 'x', expected a tensor")
    raises(function() require("vertex.models.inception_v3")(5) end, "inception_v3: options are 5")
    raises(function() vx.runs.Run.peek(5, "x") end, "Run:peek: called on 5")
  end)

  it("functions whose argument holds others", function()
    raises(function() vx.display.terminal {} end, "display.terminal: the form text/plain is nil, expected a string")
    raises(function() vx.data.images { size = 8, batch = 1, files = { 5 } } end,
      "images: files[1] is a number, expected a path")
    local own = {}
    own[1] = own
    raises(function() vx.runs.fingerprint(own) end, "fingerprint: element 1 is a table, expected a text")
    raises(function() vx.data.procedural {} end, "procedural: size has 0 numbers")
    raises(function() vx.data.resize(vx.data.procedural(4), 2, -1) end, "resize: width is -1")
    raises(function() vx.kmeans(f(4, 2), 2 ^ 60) end, "kmeans: codes is 1.1529215046068e+18")
  end)

  it("operators that tensors do not have", function()
    local x = f(2)
    raises(function() return x % 2 end, "vx.floor")
    raises(function() return "a" .. x end, "tostring(x)")
    raises(function() return x < x end, "vx.lt(a, b)")
    raises(function() return x >= x end, "vx.ge(a, b)")
  end)

  it("a module that contains itself", function()
    local a = vx.nn.Linear(1, 1)
    a.part = vx.nn.Sequential()
    a.part:add(a)
    for _, method in ipairs { "parameters", "train", "state_dict", "describe", "zero_grad" } do
      raises(function() a[method](a) end, "module Linear: 'part.1' is a module that it lies in")
    end
    raises(function() a:to "cpu" end, "'part.1'")
    raises(function() a.part:add(a.part) end, "Sequential: it cannot contain itself")
    local shared = vx.nn.Linear(1, 1)
    assert.equal(2, #vx.nn.Sequential(shared, shared):parameters()) -- twice beside each other is none of that
  end)
end)

describe("work without an end", function()
  it("is refused in words", function()
    for _, bad in ipairs { 1 / 0, 0 / 0, -1 / 0 } do
      raises(function() vx.arange(bad) end, "arange: stop is " .. tostring(bad), "expected a finite number")
      raises(function() vx.arange(0, 5, bad) end, "arange: step is " .. tostring(bad), "expected a finite number")
      raises(function() vx.nn.GroupNorm(bad) end, "GroupNorm: channels is " .. tostring(bad), "integer")
      raises(function() vx.nn.Linear(3, bad) end, "Linear: outputs is " .. tostring(bad), "integer")
      raises(function() vx.randperm(bad) end, "randperm: n is " .. tostring(bad), "integer")
    end
  end)

  it("does not come from long lists", function()
    local parts = {}
    for i = 1, 9000 do parts[i] = vx.tensor { i } end
    local all = vx.cat(1, parts)
    assert.same({ 9000 }, all:shape())
    assert.equal(9000 * 9001 / 2, all:to("f32"):sum():item())
    assert.same({ 9000, 1 }, vx.stack(1, parts):shape())
    parts[1].requires_grad = true
    vx.cat(parts):sum():backward()
    assert.same({ 1 }, parts[1].grad:totable())
    parts[8999] = 5
    raises(function() vx.cat(1, parts) end, "cat: tensor 8999 is a number")
    local layers = {}
    for i = 1, 9000 do layers[i] = vx.nn.Apply("same", function(x) return x end) end
    assert.equal(9000, #vx.nn.Sequential(layers)._order)
  end)
end)

describe("after an error", function()
  it("nothing was written and the same tensors go on", function()
    local x, live = vx.ones { 4, 3 }, vx.memory().tensors
    for _ = 1, 100 do pcall(ops.add, x, vx.zeros { 4, 2 }) end
    pcall(function() x:copy(vx.zeros { 3, 4 }) end)
    assert.equal(12, x:sum():item())
    collectgarbage()
    collectgarbage()
    assert.is_true(vx.memory().tensors <= live + 2)
  end)

  it("the message of an error inside vx.step still points at its line", function()
    local line
    raises(function()
      vx.step(function()
        line = debug.getinfo(1, "l").currentline + 1
        ops.add(f(2), f(3))
      end)
    end, "add: a (2) and b (3)")
    assert.is_number(line)
  end)

  it("through a module and a quantizer the user's line is named, not the library's", function()
    local layer = vx.nn.Linear(4, 3)
    raises(function() layer(f(2, 5)) end, "linear: ", "(2,5)", "(3,4)")
    local net = vx.nn.Sequential(layer, vx.nn.Apply("silu", ops.silu), vx.nn.Linear(2, 2))
    raises(function() net(f(2, 4)) end, "linear: ", "(2,3)", "(2,2)")
    local q = vx.quantizer("ste-euclid", { dim = 4, codes = 5 })
    raises(function() q:forward(f(2, 5)) end, "ste-euclid: ", "(2,5)", "width 4")
  end)
end)

describe("released tensors", function()
  it("say so in every use", function()
    local x = f(2, 3)
    x:release()
    x:release() -- twice is harmless
    for _, use in ipairs {
      function() x:shape() end, function() x:totable() end, function() x:fill(1) end, function() ops.exp(x) end,
      function() x:reshape { 6 } end, function() x:to "i32" end, function() x:bytes() end,
        function() x:copy(f(2, 3)) end,
      function() f(2, 3):copy(x) end, function() ops.matmul(f(2, 2), x) end,
        function() vx.save(H.scratch "released", { x = x }) end,
      function() x:detach() end, function() x:dim() end, function() x:item() end,
    } do raises(use, "released") end
    assert.equal("tensor (released)", tostring(x))
  end)

  it("a parameter released before backward is an error, not a crash", function()
    local w = vx.ones({ 3 }, { requires_grad = true })
    local y = ops.sum(ops.mul(w, w))
    w:release()
    raises(function() y:backward() end, "released")
  end)
end)

describe("memory", function()
  it("of 10 TB is refused clearly and the process goes on", function()
    local message = raises(function() vx.empty { 2500, 1000000, 1000 } end, "out of memory", "asked 10000000.0 MB",
      "live", "limit")
    assert.is_truthy(message)
    assert.equal(6, vx.ones({ 2, 3 }):sum():item())
  end)

  it("stays below a limit, which a collection makes room for", function()
    finally(function() vx.memory_limit(0) end)
    collectgarbage()
    collectgarbage()
    vx.memory_flush()
    local live = vx.memory().live
    vx.memory_limit(live + 50e6)
    assert.equal(live + 50e6, vx.memory().limit)
    for i = 1, 1000 do
      local x = vx.empty { 1000000 } -- 4 MB, dropped
      x[1] = i
    end
    assert.is_true(vx.memory().live + vx.memory().cached <= live + 50e6)
    raises(function() vx.empty { 20000000 } end, "out of memory", "asked 80.0 MB")
    local held = {}
    raises(function()
      for i = 1, 20 do held[i] = vx.empty { 1000000 } end
    end, "out of memory")
    assert.is_true(#held >= 10 and #held <= 12)
    for _, x in ipairs(held) do x:release() end
    assert.equal(1000, vx.ones({ 1000 }):sum():item())
    raises(function() vx.memory_limit(-1) end, "memory_limit: bytes is -1, expected an integer of 0 or more")
  end)

  it("a text of C that is nil", function()
    local list = { ["core.writer"] = "no path", ["core.reader"] = "expected a path", ["core.lock"] = "no path",
      ["vx.save"] = "path is nil", ["vx.load"] = "path is nil" }
    for name, words in pairs(list) do
      local out, ok = H.child(([[
        local vx, core = require "vertex", require "vertex.core"
        print(core ~= nil, pcall(%s, nil, { x = vx.zeros { 1 } }))]]):format(name))
      assert.is_true(ok, name .. ": " .. out)
      assert.is_truthy(out:find(words, 1, true), name .. ": " .. out)
    end
    -- and each function of C that takes one, called with NULL
    local out, ok = H.child [[
      local ffi = require "ffi"
      require "vertex"
      local C = require("vertex.core.library").C
      local number, long, text = ffi.new "int[1]", ffi.new "int64_t[2]", ffi.new "const char *[1]"
      local tensor, yes, info = ffi.new "vx_tensor *[1]", ffi.new "bool[1]", ffi.new "vx_audio_info[1]"
      local paths, stream = ffi.new "const char *[2]", ffi.new "vx_data_stream *[1]"
      local options, images = ffi.new "vx_data_stream_options", ffi.new "vx_image_options"
      local sounds, writer, reader = ffi.new "vx_audio_options", ffi.new "vx_writer *[1]", ffi.new "vx_reader *[1]"
      local x = require("vertex").zeros { 4 }
      local function call(...) return { n = select("#", ...), ... } end
      local calls = {
        call(C.vx_backend_has, "cpu", nil, number), call(C.vx_backend_has, nil, "fill", number),
        call(C.vx_device_open, nil, number), call(C.vx_device_can, 0, nil, number),
        call(C.vx_device_count, nil, number),
        call(C.vx_writer_open, writer, nil), call(C.vx_reader_open, reader, nil), call(C.vx_lock, nil, number),
        call(C.vx_audio_kind, nil, text, yes), call(C.vx_audio_stamp, nil, long, long + 1),
        call(C.vx_audio_open, tensor, nil, 0, "medium", info), call(C.vx_audio_open, tensor, "x", 0, nil, info),
        call(C.vx_audio_scan, paths, 2, info), call(C.vx_audio_resample, tensor, x._h, 8000, 16000, nil),
        call(C.vx_audio_stream, stream, paths, info, 1, options, sounds), call(C.vx_image_kind, nil, text),
        call(C.vx_image_open, tensor, nil), call(C.vx_image_resize, x._h, x._h, nil),
        call(C.vx_image_save_png, nil, x._h),
        call(C.vx_image_stream, stream, paths, 1, options, images), call(C.vx_image_decode, tensor, nil, 5),
      }
      for i, c in ipairs(calls) do
        assert(c[1](unpack(c, 2, c.n)) ~= 0, i)
        assert(#ffi.string(C.vx_error()) > 5)
      end
      assert(C.vx_file_size(nil) == -1)
      print "all refused"]]
    assert.is_true(ok, out)
    assert.equal("all refused\n", out)
  end)

  it("a number that does not fit its dtype, by its place", function()
    for _, case in ipairs { { 300, "u8" }, { -1, "u8" }, { 1.5, "u8" }, { 0 / 0, "u8" }, { 2 ^ 31, "i32" },
      { 0.5, "i32" }, { 1 / 0, "i32" }, { 1e39, "f32" }, { -1e39, "bf16" } } do
      local value, dtype = unpack(case)
      raises(function() vx.tensor({ 1, value }, { dtype = dtype }) end, "element 2 is", dtype .. " does not hold")
      raises(function() vx.full({ 2 }, value, { dtype = dtype }) end, dtype .. " does not hold")
      local x = vx.tensor({ 1, 2 }, { dtype = dtype })
      raises(function() x:fill(value) end, "fill: ", dtype .. " does not hold")
      raises(function() x[1] = value end, dtype .. " does not hold")
      raises(function() x:fromtable { value, 1 } end, "element 1 is", dtype .. " does not hold")
      assert.same({ 1, 2 }, x:totable())
    end
    assert.same({ 255, 0, 2, 0 }, vx.tensor({ 300, -5, 1.5, 0 / 0 }):to("u8"):totable()) -- asked for
    local x = vx.zeros({ 3 }, { dtype = "i32" }):copy(vx.tensor { 0 / 0, 1 / 0, -3e9 })
    assert.same({ 0, 2 ^ 31 - 1, -2 ^ 31 }, x:totable())
    x[1] = vx.tensor(1.5)
    assert.equal(2, x[1]:item())
    local ends = vx.tensor({ 3.4028234e38, -1 / 0, 1e-50 }):totable()
    assert.is_true(ends[1] > 3.4e38 and ends[2] == -1 / 0 and ends[3] == 0)
  end)

  it("a number that f32 does not hold, by the op that was called", function()
    local x, huge = vx.full({ 1 }, 3e38), math.huge
    for _, n in ipairs { 1e39, -1e39, 1e-46 } do
      local held = (" is %.10g, which f32 does not hold"):format(n)
      raises(function() return x * n end, "x * n: n" .. held)
      raises(function() return n * x end, "n * x: n" .. held)
      raises(function() return x + n end, "x + n: n" .. held)
      raises(function() return n - x end, "n - x: n" .. held)
      raises(function() return x / n end, "x / n: n" .. held)
      raises(function() return n / x end, "n / x: n" .. held)
      raises(function() return x ^ n end, "x ^ n: n" .. held)
      raises(function() ops.affine(x, n) end, "affine: alpha" .. held)
      raises(function() ops.clamp(x, 0, n) end, "clamp: high" .. held)
      raises(function() ops.gt(x, n) end, "gt: b" .. held)
      raises(function() ops.ne(n, x) end, "ne: a" .. held)
      raises(function() ops.where(x, n, x) end, "where: a" .. held)
      raises(function() ops.masked_fill(x, x, n) end, "masked_fill: value" .. held)
    end
    assert.same({ huge, -huge, 0, huge, huge, -huge }, { (x + huge):item(), (x * -huge):item(), (x / huge):item(),
      (x / 0):item(), ops.where(x, huge, x):item(), ops.masked_fill(x, x, -huge):item() })
    assert.is_true((x * (0 / 0)):item() ~= (x * (0 / 0)):item())
    local least = vx.full({ 1 }, 2 ^ -149) -- exact quotients, also where f32 does not hold 1 / n
    assert.same({ 2 ^ -9, 1, 2 ^ -127 }, { (least / 2 ^ -140):item(), (least / 2 ^ -149):item(),
      (vx.ones { 1 } / 2 ^ 127):item() })
  end)

  it("a parameter of a distribution that is no finite number of f32", function()
    local x = vx.zeros { 4 }
    for _, n in ipairs { 1e39, 1 / 0, -1 / 0, 0 / 0 } do
      raises(function() vx.normal(x, n, 1) end, "normal: mean is", "expected a number from")
      raises(function() vx.normal(x, 0, n) end, "normal: deviation is", "expected a number from")
      raises(function() vx.uniform(x, n, 1) end, "uniform: low is", "expected a number from")
      raises(function() vx.uniform(x, 0, n) end, "uniform: high is", "expected a number from")
    end
    raises(function() vx.uniform(x, -3e38, 3e38) end, "uniform: high - low is 6e+38, expected a number from")
    raises(function() vx.normal(x, 0, -1) end, "normal: deviation is -1, expected a number from 0")
    raises(function() vx.normal(x, 0, 1e-46) end, "normal: deviation is 1e-46, which f32 does not hold")
    assert.same({ 0, 0, 0, 0 }, x:totable())
    assert.same({ 3, 3, 3, 3 }, vx.normal(x, 3, 0):totable())
  end)

  it("runs out inside an op without harm", function()
    finally(function() vx.memory_limit(0) end)
    raises(function() vx.memory_limit(1e30) end, "memory_limit: bytes is 1e+30, expected an integer from 0 to")
    local a, b = vx.ones { 700, 700 }, vx.ones { 700, 700 }
    collectgarbage()
    collectgarbage()
    vx.memory_limit(vx.memory().live + 1000)
    raises(function() ops.matmul(a, b) end, "out of memory")
    raises(function() local _ = a + b end, "out of memory")
    vx.memory_limit(0)
    assert.equal(700, ops.matmul(a, b)[3]:totable()[5])
  end)
end)
