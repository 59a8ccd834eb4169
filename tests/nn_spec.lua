-- Layers, modules and their state, AdamW, schedules.

local H = require "tests.helper"
local vx = H.vx
local core = require "vertex.core"
local nn, ops, optim = vx.nn, vx.ops, vx.optim

local function data(seed, shape) return H.generator(seed)(shape, { grad = false }) end

describe("tied parameters", function()
  it("are listed once, keep both names in the state, and stay one tensor on another device", function()
    local m = vx.nn.Sequential(vx.nn.Linear(3, 3), vx.nn.Linear(3, 3))
    m[2].weight = m[1].weight
    assert.equal(3, #m:parameters())
    assert.equal(3 * 3 + 3 + 3, m:parameter_count())
    local state = m:state_dict()
    assert.equal(state["0.weight"] or state["1.weight"], state["1.weight"])
    m:to "emu:0"
    assert.equal(m[1].weight, m[2].weight)
    assert.equal(3, #m:parameters())
  end)
end)

describe("a layer", function()
  it("has the parameters its formula needs", function()
    for _, case in ipairs {
      { nn.Linear(5, 7), 5 * 7 + 7, { 4, 5 }, { 4, 7 } },
      { nn.Linear(5, 7, { bias = false }), 5 * 7, { 2, 3, 5 }, { 2, 3, 7 } },
      { nn.Conv2d(3, 8, 3, { padding = 1 }), 9 * 3 * 8 + 8, { 2, 6, 5, 3 }, { 2, 6, 5, 8 } },
      { nn.Conv2d(4, 6, { 1, 7 }, { padding = { 0, 3 }, groups = 2, bias = false }), 6 * 2 * 7, { 2, 6, 5, 4 },
        { 2, 6, 5, 6 } },
      { nn.Conv2d(3, 8, 3, { stride = 2 }), 9 * 3 * 8 + 8, { 2, 7, 5, 3 }, { 2, 3, 2, 8 } },
      { nn.MaxPool2d(3, { stride = 2 }), 0, { 2, 7, 5, 3 }, { 2, 3, 2, 3 } },
      { nn.AvgPool2d(3, { stride = 1, padding = 1 }), 0, { 2, 7, 5, 3 }, { 2, 7, 5, 3 } },
      { nn.Conv1d(6, 8, 3), 6 * 8 * 3 + 8, { 2, 9, 6 }, { 2, 7, 8 } },
      { nn.Conv1d(6, 8, 4, { stride = 2, padding = 1, groups = 2, bias = false }), 3 * 8 * 4, { 2, 9, 6 },
        { 2, 4, 8 } },
      { nn.Dropout(0.1), 0, { 2, 3 }, { 2, 3 } },
      { nn.DepthwiseConv2d(4), 9 * 4, { 1, 5, 5, 4 }, { 1, 5, 5, 4 } },
      { nn.DepthwiseConv2d(4, 2), 9 * 4, { 1, 5, 6, 4 }, { 1, 3, 3, 4 } },
      { nn.SeparableConv2d(4, 9, { stride = 2 }), 9 * 4 + 4 * 9 + 9, { 1, 8, 8, 4 }, { 1, 4, 4, 9 } },
      { nn.GroupNorm(12, 3), 24, { 2, 4, 4, 12 }, { 2, 4, 4, 12 } },
      { nn.LayerNorm(6), 12, { 3, 6 }, { 3, 6 } },
      { nn.MultiHeadAttention(6, 2), 4 * (36 + 6), { 2, 5, 6 }, { 2, 5, 6 } },
      { nn.Apply("upsample2x", ops.upsample2x), 0, { 1, 2, 2, 3 }, { 1, 4, 4, 3 } },
    } do
      local layer = case[1]
      assert.equal(case[2], layer:parameter_count(), layer.name)
      assert.same(case[4], layer(data(1, case[3])):shape(), layer.name)
      for _, p in ipairs(layer:parameters()) do assert.is_true(p.requires_grad) end
    end
  end)

  it("computes what its op computes", function()
    local x = data(2, { 2, 4, 6, 12 })
    local linear = nn.Linear(12, 3)
    assert.equal(ops.linear(x, linear.weight, linear.bias):bytes(), linear(x):bytes())
    local norm = nn.GroupNorm(12, 4, { activation = "silu" })
    assert.equal(ops.group_norm(x, norm.weight, norm.bias, 4, "silu"):bytes(), norm(x):bytes())
    local block = nn.SeparableConv2d(12, 5, { stride = 2 })
    local expected = ops.linear(ops.depthwise_conv2d(x, block.depthwise.weight, nil, 2), block.pointwise.weight,
      block.pointwise.bias)
    assert.equal(expected:bytes(), block(x):bytes())
    block = nn.SeparableConv2d(12, 5, { activation = "silu", groups = 3, up = 2 })
    local n = ops.upsample2x(ops.group_norm(x, block.norm.weight, block.norm.bias, 3, "silu"))
    local residual = data(3, { 2, 8, 12, 5 })
    expected = ops.linear(ops.depthwise_conv2d(n, block.depthwise.weight), block.pointwise.weight, block.pointwise.bias)
    assert.equal(expected:bytes(), block(x):bytes())
    H.close(block(x, residual):reshape({ -1 }):totable(), ops.add(expected, residual):reshape({ -1 }):totable(), 1e-6,
      1e-6)
  end)

  it("drops in training alone, with the generator it was given", function()
    local layer, x = nn.Dropout(0.5, { generator = vx.generator(3) }), data(4, { 40, 50 })
    assert.equal(ops.dropout(x, 0.5, vx.generator(3)):bytes(), layer(x):bytes())
    assert.equal(x, layer:eval()(x))
    assert.equal("Dropout(0.5)", tostring(layer))
    local kept = ops.dropout(vx.ones { 100000 }, 0.1, vx.generator(1))
    assert.is_true(math.abs(kept:mean():item() - 1) < 5e-3) -- five standard deviations
    assert.equal(0, ops.dropout(x, 1):abs():sum():item())
    H.raises(function() nn.Dropout(2) end, "Dropout: p is 2")
    H.raises(function() nn.Conv1d(6, 9, 3, { groups = 2 }) end, "Conv1d: 6 and 9 channels", "2 groups")
    assert.equal("Conv1d(6 -> 8, kernel 4, stride 2, groups 2, no bias)  96 parameters",
      tostring(nn.Conv1d(6, 8, 4, { stride = 2, groups = 2, bias = false })))
  end)

  it("gives in strips what the ops of a separable convolution give one by one", function()
    for number, case in ipairs {
      { { 2, 41, 64, 64 }, 64, { activation = "silu" } }, { { 1, 41, 63, 64 }, 5, { stride = 2, activation = "silu" } },
      { { 3, 40, 64, 48 }, 33, { stride = 2 } }, { { 2, 37, 40, 32 }, 16, { up = 2, activation = "gelu" } },
        { { 1, 30, 64, 64 }, 8, { up = 2 } },
      { { 1, 35, 64, 40 }, 7, { up = 2, stride = 2 } },
    } do
      local shape, outputs, options = case[1], case[2], case[3]
      local block, x = nn.SeparableConv2d(shape[4], outputs, options), data(number, shape)
      local up, stride = options.up or 1, options.stride or 1
      local weights = block:parameters()
      local dy = data(number + 50, { shape[1], math.ceil(shape[2] * up / stride), math.ceil(shape[3] * up / stride),
        outputs })
      local function run(f)
        x.requires_grad = true
        x:zero_grad()
        block:zero_grad()
        local y = f()
        y:backward(dy)
        local all = { y:clone(), x.grad:clone() }
        for i, p in ipairs(weights) do all[i + 2] = p.grad:clone() end
        return all
      end
      local whole = run(function() return block(x) end)
      local parts = run(function()
        local n = block.norm and block.norm(x) or x
        if up == 2 then n = ops.upsample2x(n) end
        return block.pointwise(block.depthwise(n))
      end)
      for i, expected in ipairs(parts) do
        local off = ops.sum(ops.square(whole[i] - expected)):item() / ops.sum(ops.square(expected)):item()
        assert.is_true(off < 1e-12, ("case %d, tensor %d: relative error %g"):format(number, i, math.sqrt(off)))
      end
    end
  end)

  it("starts with the variance of its inputs, zero biases, unit norms", function()
    vx.seed(1)
    local layer = nn.Linear(300, 200)
    local bound = math.sqrt(3 / 300)
    assert.is_true(layer.weight:max():item() <= bound and layer.weight:max():item() > 0.99 * bound)
    H.close({ layer.weight:square():mean():item() }, { 1 / 300 }, 0.02, 0) -- 60,000 numbers: deviation 0.4 %
    assert.equal(0, layer.bias:abs():sum():item())
    local norm = nn.GroupNorm(8)
    assert.equal(8, norm.weight:sum():item())
    assert.equal(0, norm.bias:sum():item())
    assert.is_true(layer.bias.no_decay and norm.weight.no_decay and norm.bias.no_decay)
    assert.is_falsy(layer.weight.no_decay)
  end)

  it("group norm chooses up to 32 groups of at least 4 channels", function()
    for channels, groups in pairs { [3] = 1, [8] = 2, [12] = 3, [128] = 32, [256] = 32, [20] = 5, [7] = 1, [36] = 9,
      [1024] = 32 } do
      assert.equal(groups, nn.GroupNorm(channels).groups, channels .. " channels")
    end
  end)

  it("refuses sizes that are none", function()
    H.raises(function() nn.Linear(0, 3) end, "Linear", "inputs is 0")
    H.raises(function() nn.Linear(3) end, "Linear", "outputs is nil")
    H.raises(function() nn.Conv2d(3, 1.5, 3) end, "Conv2d", "1.5")
    H.raises(function() nn.Conv2d(3, 2, 3, { groups = 2 }) end, "Conv2d: 3 and 2 channels do not divide into 2 groups")
    H.raises(function() nn.Conv2d(3, 2) end, "Conv2d: kernel is nil")
    H.raises(function() nn.Conv2d(3, 2, { 3 }) end, "Conv2d: kernel has 1 numbers, expected an integer or { rows,")
    H.raises(function() nn.MaxPool2d(0) end, "MaxPool2d: kernel is 0")
    H.raises(function() nn.GroupNorm(10, 3) end, "GroupNorm", "10 channels", "3 groups")
    H.raises(function() nn.LayerNorm "x" end, "LayerNorm")
    H.raises(function() nn.MultiHeadAttention(10, 3) end, "MultiHeadAttention", "3 heads", "width of 10")
    H.raises(function() nn.MultiHeadAttention(10, 5, { dropout = -1 }) end, "MultiHeadAttention", "dropout is -1")
    H.raises(function() nn.MultiHeadAttention(10, 5)(vx.zeros { 2, 9 }) end, "MultiHeadAttention: x is (2,9)",
      "(B,T,10)")
    H.raises(function() nn.DepthwiseConv2d(-1) end, "DepthwiseConv2d")
    H.raises(function() nn.Sequential(5) end, "Sequential:add: m is 5, expected a module")
  end)
end)

describe("a module", function()
  local Net = nn.module "Net"
  function Net:init()
    self.first = nn.Linear(4, 6)
    self.body = nn.Sequential(nn.LayerNorm(6), nn.Apply("silu", ops.silu), nn.Linear(6, 2, { bias = false }))
    self.offset = nn.parameter({ 2 }, 0.5)
    self.counter = vx.zeros { 1 } -- a buffer: state without a gradient
    self.note = "no state"
  end
  function Net:forward(x) return self.body(self.first(x)) + self.offset end

  it("finds its own parameters and buffers, then those of its modules, in the order of assignment", function()
    local net = Net()
    local order = {}
    for _, entry in ipairs(net:tensors()) do order[#order + 1] = entry[1] end
    assert.same({ "offset", "counter", "first.weight", "first.bias", "body.1.weight", "body.1.bias", "body.3.weight" },
      order)
    assert.equal(6, #net:parameters())
    assert.equal(4 * 6 + 6 + 12 + 12 + 2, net:parameter_count())
    assert.same({ 5, 2 }, net(data(1, { 5, 4 })):shape())
    assert.is_true(nn.is_module(net))
    assert.is_false(nn.is_module {})
    assert.is_false(nn.is_module(vx.ones { 1 }))
  end)

  it("saves and loads its state", function()
    vx.seed(1)
    local a = Net()
    vx.seed(2)
    local b = Net()
    a.counter:fill(7)
    local x = data(1, { 5, 4 })
    assert.not_equal(a(x):bytes(), b(x):bytes())
    local path = H.scratch "net.safetensors"
    vx.save(path, a:state_dict())
    b:load_state_dict((vx.load(path)))
    assert.equal(a(x):bytes(), b(x):bytes())
    assert.equal(7, b.counter:item())
    assert.is_true(b.offset.requires_grad) -- values were copied into the same parameters
  end)

  it("names what does not fit, and then changes nothing", function()
    local net = Net()
    local before = net.first.weight:bytes()
    local function state()
      local s = {}
      for name, x in pairs(net:state_dict()) do s[name] = vx.zeros(x:shape()) end
      return s
    end
    local missing, extra, shape = state(), state(), state()
    missing["body.1.bias"] = nil
    extra["first.scale"] = vx.ones { 1 }
    shape["body.3.weight"] = vx.zeros { 6, 2 }
    H.raises(function() net:load_state_dict(missing) end, "'body.1.bias'", "missing")
    H.raises(function() net:load_state_dict(extra) end, "'first.scale'", "no place")
    H.raises(function() net:load_state_dict(shape) end, "'body.3.weight'", "(6,2)", "(2,6)")
    local m = nn.Linear(2, 2)
    m.counts = vx.zeros({ 2 }, { dtype = "i32" })
    m.bias:fill(7)
    local function refused(counts, weight, ...)
      local given = { weight = weight, bias = vx.ones { 2 }, counts = counts }
      H.raises(function() m:load_state_dict(given) end, ...)
      assert.same({ 7, 7 }, m.bias:totable()) -- nothing was changed
    end
    local fine, gone = vx.zeros({ 2 }, { dtype = "i32" }), vx.ones { 2, 2 }
    gone:release()
    refused(fine, { 2, 2 }, "'weight' is a table, expected a tensor (2,2)")
    refused(fine, 5, "'weight' is 5, expected a tensor (2,2)")
    refused(fine, gone, "'weight' is a released tensor, expected a tensor (2,2)")
    refused(vx.tensor { 1.5, 2 }, vx.ones { 2, 2 }, "element 1 of 'counts' is 1.5, and the module's is i32")
    refused(vx.tensor { 1, 1e20 }, vx.ones { 2, 2 }, "element 2 of 'counts' is 1.00000002e+20")
    H.raises(function() m:load_state_dict { weight = gone, [{}] = 1 } end, "load_state_dict: ")
    m:load_state_dict { weight = vx.ones { 2, 2 }, bias = vx.ones { 2 }, counts = vx.tensor { 3, 4 } }
    assert.same({ 3, 4 }, m.counts:totable())
    assert.equal(before, net.first.weight:bytes())
  end)

  it("prints a tree with counts", function()
    local text = tostring(Net())
    assert.equal([[
Net(offset (2), counter (1))  56 parameters
  first: Linear(4 -> 6)  30 parameters
  body: Sequential  24 parameters
    1: LayerNorm(weight (6), bias (6))  12 parameters
    2: Apply(silu)
    3: Linear(6 -> 2, no bias)  12 parameters]], text)
    assert.is_truthy(tostring(nn.Linear(1000, 1234)):find("1,235,234 parameters", 1, true))
    assert.is_truthy(tostring(nn.DepthwiseConv2d(3, 2)):find("3, stride 2", 1, true))
    assert.is_truthy(tostring(nn.GroupNorm(8, 2, { activation = "gelu" })):find("8 channels in 2 groups, gelu", 1,
      true))
  end)

  it("switches between training and evaluation, inside too", function()
    local net = Net()
    assert.is_true(net.training and net.body[1].training)
    assert.equal(net, net:eval())
    assert.is_false(net.training or net.first.training or net.body[3].training)
    net:train()
    assert.is_true(net.training and net.body[3].training)
  end)

  it("moves to a device, and forgets gradients", function()
    local net = Net()
    assert.equal(net, net:to "cpu")
    ops.sum(net(data(1, { 5, 4 }))):backward()
    for _, p in ipairs(net:parameters()) do assert.is_truthy(p.grad) end
    net:zero_grad()
    for _, p in ipairs(net:parameters()) do assert.is_nil(p.grad) end
  end)

  it("made inside a step keeps its parameters", function()
    local net
    vx.step(function() net = nn.Linear(3, 3) end)
    assert.equal(9, net.weight:numel())
    assert.same({ 2, 3 }, net(vx.ones { 2, 3 }):shape())
  end)

  it("may inherit, and hold layers made later", function()
    local Child = nn.module("Child", Net)
    function Child:init()
      Net.init(self)
      self.extra = nn.Linear(2, 2)
    end
    function Child:forward(x) return self.extra(Net.forward(self, x)) end
    local child = Child()
    assert.equal(56 + 6, child:parameter_count())
    assert.same({ 1, 2 }, child(vx.ones { 1, 4 }):shape())
    local s = nn.Sequential()
    assert.equal(s, s:add(nn.Linear(2, 3)))
    s:add(nn.Linear(3, 4))
    assert.same({ 1, 4 }, s(vx.ones { 1, 2 }):shape())
    assert.equal(9 + 16, s:parameter_count())
  end)

  it("assigned a field twice keeps one, the last", function()
    local net = Net()
    net.first = nn.Linear(4, 6)
    local names = {}
    for _, entry in ipairs(net:tensors()) do names[entry[1]] = (names[entry[1]] or 0) + 1 end
    for name, n in pairs(names) do assert.equal(1, n, name) end
    assert.equal(56, net:parameter_count())
    net.offset = nil
    assert.equal(54, net:parameter_count())
  end)
end)

describe("AdamW", function()
  it("does what its formula says, with decay where it belongs", function()
    local w, b = vx.tensor({ 1, -2, 3 }, { requires_grad = true }), vx.tensor({ 0.5 }, { requires_grad = true })
    b.no_decay = true
    local opt = optim.AdamW({ w, b }, { lr = 0.1, betas = { 0.8, 0.95 }, eps = 1e-6, weight_decay = 0.3 })
    local rw, rb = { 1, -2, 3 }, { 0.5 }
    local moments = {}
    local function reference(p, g, decay, step, lr, key)
      for i = 1, #p do
        local m = moments[key .. i] or { 0, 0 }
        moments[key .. i] = m
        p[i] = p[i] * (1 - lr * decay)
        m[1] = 0.8 * m[1] + 0.2 * g[i]
        m[2] = 0.95 * m[2] + 0.05 * g[i] ^ 2
        p[i] = p[i] - lr * (m[1] / (1 - 0.8 ^ step)) / (math.sqrt(m[2] / (1 - 0.95 ^ step)) + 1e-6)
      end
    end
    for step = 1, 6 do
      local lr = step < 4 and 0.1 or 0.02
      local gw, gb = {}, { 2 * rb[1] }
      for i = 1, 3 do gw[i] = 2 * rw[i] end
      ops.add(ops.sum(w:square()), ops.sum(b:square())):backward()
      opt:step(step >= 4 and 0.02 or nil)
      opt:zero_grad()
      reference(rw, gw, 0.3, step, lr, "w")
      reference(rb, gb, 0, step, lr, "b")
      H.close(w:totable(), rw, 2e-6, 2e-6, "w at step " .. step)
      H.close(b:totable(), rb, 2e-6, 2e-6, "b at step " .. step)
    end
    assert.equal(6, opt.steps)
    assert.equal(0.02, opt.lr)
  end)

  it("leaves parameters without a gradient alone", function()
    local w, v = vx.ones({ 2 }, { requires_grad = true }), vx.ones({ 2 }, { requires_grad = true })
    local opt = optim.AdamW({ w, v }, { lr = 0.1, weight_decay = 0.5 })
    ops.sum(w):backward()
    opt:step()
    assert.same({ 1, 1 }, v:totable())
    assert.not_same({ 1, 1 }, w:totable())
  end)

  it("goes on from saved moments as if it had not stopped", function()
    local function start() return vx.tensor({ 1, -2, 3 }, { requires_grad = true }) end
    local function steps(w, opt, n)
      for _ = 1, n do
        ops.sum(w:square()):backward()
        opt:step()
        opt:zero_grad()
      end
    end
    local a = start()
    local whole = optim.AdamW({ a }, { lr = 0.1 })
    steps(a, whole, 6)
    local b = start()
    local first = optim.AdamW({ b }, { lr = 0.1 })
    steps(b, first, 3)
    local path = H.scratch "moments.safetensors"
    vx.save(path, first:state_dict())
    local second = optim.AdamW({ b }, { lr = 0.1 })
    local state = vx.load(path)
    for name, x in pairs(second:state_dict()) do x:copy(state[name]) end
    second.steps = first.steps
    steps(b, second, 3)
    assert.equal(a:bytes(), b:bytes())
  end)

  it("follows what is set between steps: gradients, no_decay, weight_decay", function()
    local function train(together)
      local params, opts = {}, {}
      for i = 1, 3 do params[i] = vx.full({ i }, i, { requires_grad = true }) end
      for i = 1, together and 1 or 3 do
        opts[i] = optim.AdamW(together and params or { params[i] }, { lr = 0.1, weight_decay = 0.5 })
      end
      for step = 1, 4 do
        params[2].no_decay = step > 2
        for i, p in ipairs(params) do
          p.grad = not (i == 1 and step == 2) and vx.full({ i }, step - 2.5) or nil
          if not together or i == 1 then
            opts[i].weight_decay = step / 4
          end
        end
        if not together and step == 2 then opts[1].steps = opts[1].steps + 1 end
        for i, opt in ipairs(opts) do
          if together or params[i].grad then opt:step() end
        end
      end
      local state = {}
      for i, p in ipairs(params) do
        local moments = (together and opts[1] or opts[i]):state_dict()
        local k = together and i or 1
        state[i] = { p:bytes(), moments["first." .. k]:bytes(), moments["second." .. k]:bytes() }
      end
      return state
    end
    assert.same(train(false), train(true))
  end)

  it("refuses a parameter that is there twice, as SGD and clip_grad_norm do", function()
    local w, v = vx.tensor({ 3, 4 }, { requires_grad = true }), vx.ones { 3 }
    for name, make in pairs { AdamW = optim.AdamW, SGD = optim.SGD } do
      H.raises(function() make { w, v, w } end, name .. ": parameters[3] is parameters[1] once more")
      H.raises(function() make { w, v, v:narrow(1, 1, 2) } end, name .. ": parameters[2] (3) and parameters[3] (2) "
        .. "share memory")
    end
    local m = vx.ones { 4, 6 }
    for name, make in pairs { AdamW = optim.AdamW, SGD = optim.SGD } do
      H.raises(function() make { w, m:narrow(2, 1, 3) } end, name .. ": parameters[2] (4,3) is a strided view")
      local rows = {} -- views of one storage, none of which lies in another
      for i = 1, 4 do rows[i] = m[5 - i]:detach() end
      for _, row in ipairs(rows) do row.requires_grad = true end
      local optimizer = make(rows, { lr = 0.5 })
      vx.sum(rows[1] * 2):backward()
      optimizer:step()
      for i = 1, 4 do assert.equal(i == 4, m[i]:totable()[6] ~= 1, name) end
      m:fill(1)
    end
    w:square():sum():backward()
    H.raises(function() optim.clip_grad_norm({ w, w }, 1) end, "parameters[2] is parameters[1] once more")
    assert.equal(10, optim.clip_grad_norm({ w }, 100):item())
  end)

  it("refuses gradients and rates that are none, as SGD and clip_grad_norm do, and changes nothing", function()
    local w = vx.tensor({ 3, 4 }, { requires_grad = true })
    for name, make in pairs { AdamW = optim.AdamW, SGD = optim.SGD } do
      local optimizer = make { w }
      local function refused(...)
        H.raises(function() optimizer:step() end, name .. ": ", ...)
        assert.same({ { 3, 4 }, 0 }, { w:totable(), optimizer.steps })
      end
      w.grad = 5
      refused("the gradient of parameters[1] is 5, expected a tensor (2)")
      w.grad = vx.ones { 3 }
      refused("the gradient of parameters[1] is (3), expected a tensor (2)")
      w.grad = vx.ones { 2 }
      for _, rate in ipairs { "x", 0 / 0, math.huge } do
        w.rate = rate
        refused("the field rate of parameters[1] is ", "expected a finite number")
      end
      w.rate = 1e300
      refused("the learning rate of parameters[1] is ")
      w.rate = nil
      for _, lr in ipairs { 1e39, -1, 0 / 0 } do
        H.raises(function() optimizer:step(lr) end, "lr is ", "expected a number from 0 to")
        H.raises(function() make({ w }, { lr = lr }) end, "lr is ", "expected a number from 0 to")
      end
      assert.equal(0, optimizer.steps)
    end
    w.grad = 5
    H.raises(function() optim.clip_grad_norm({ w }, 1) end, "clip_grad_norm: the gradient of parameters[1] is 5")
  end)

  it("refuses the result of an op, as SGD and clip_grad_norm do", function()
    local z = vx.ones({ 2 }, { requires_grad = true }) * 2
    z.grad = vx.ones { 2 }
    for name, call in pairs { AdamW = optim.AdamW, SGD = optim.SGD, clip_grad_norm = optim.clip_grad_norm } do
      H.raises(function() call({ z }, name == "clip_grad_norm" and 1 or nil) end, name .. ": parameters[1] (2) is the "
        .. "result of an op", "x:detach()")
    end
  end)

  it("made inside a step keeps its moments", function()
    local w, opt = vx.ones({ 2 }, { requires_grad = true }), nil
    vx.step(function() opt = optim.AdamW({ w }) end)
    ops.sum(w):backward()
    opt:step()
    assert.is_true(w[1]:item() < 1)
  end)

  it("refuses what it cannot use", function()
    local w = { vx.ones({ 1 }, { requires_grad = true }) }
    H.raises(function() optim.AdamW({}) end, "AdamW", "no parameters")
    H.raises(function() optim.AdamW(w, { rate = 1 }) end, "'rate'", "lr", "weight_decay")
    H.raises(function() optim.AdamW(w, { lr = -1 }) end, "lr")
    H.raises(function() optim.AdamW(w, { lr = 0 / 0 }) end, "lr")
    H.raises(function() optim.AdamW(w, { betas = { 2, 0.9 } }) end, "betas[1]")
    H.raises(function() optim.AdamW(w, { betas = { 0.9 } }) end, "betas[2]")
    H.raises(function() optim.AdamW(w, { betas = { 0.9, 1 } }) end, "betas[2] is 1, expected less")
    H.raises(function() optim.AdamW(w, { eps = 0 }) end, "eps")
    H.raises(function() optim.AdamW(w, { weight_decay = "x" }) end, "weight_decay")
  end)

  it("brings a quadratic to its minimum", function()
    local target = vx.tensor { 3, -1, 0.5 }
    local w = vx.zeros({ 3 }, { requires_grad = true })
    local opt = optim.AdamW({ w }, { lr = 0.1, weight_decay = 0 })
    local rate = optim.warmup_cosine { peak = 0.1, final = 0, warmup = 20, total = 400 }
    for step = 1, 400 do
      vx.step(function()
        ops.mse(w, target):backward()
        opt:step(rate(step))
        opt:zero_grad()
      end)
    end
    H.close(w:totable(), target:totable(), 1e-3, 1e-3)
  end)
end)

describe("schedules", function()
  it("warm up linearly and fall along half a cosine", function()
    local rate = optim.warmup_cosine { peak = 2, final = 1, warmup = 10, total = 30 }
    H.close({ rate(0), rate(1), rate(5), rate(10), rate(15), rate(20), rate(25), rate(30), rate(31), rate(1000) },
      { 0, 0.2, 1, 2, 1 + 0.5 * (1 + math.cos(math.pi / 4)), 1.5, 1 + 0.5 * (1 + math.cos(3 * math.pi / 4)), 1, 1, 1 },
        1e-12, 1e-12)
  end)

  it("hold at their corners", function()
    local no_warmup = optim.warmup_cosine { peak = 1, total = 10 }
    H.close({ no_warmup(0), no_warmup(5), no_warmup(10), no_warmup(11) }, { 1, 0.5, 0, 0 }, 1e-12, 1e-12)
    local all_warmup = optim.warmup_cosine { peak = 1, final = 0.5, warmup = 10, total = 10 }
    H.close({ all_warmup(5), all_warmup(10), all_warmup(11) }, { 0.5, 1, 0.5 }, 1e-12, 0)
    local previous = math.huge
    local rate = optim.warmup_cosine { peak = 1e-4, final = 5e-5, warmup = 16000, total = 100000 }
    for step = 16000, 100000, 500 do
      assert.is_true(rate(step) <= previous)
      previous = rate(step)
    end
    assert.equal(3, optim.constant(3)(12345))
    H.raises(function() optim.warmup_cosine { peak = 1 } end, "peak and total")
    for _, schedule in ipairs { no_warmup, optim.exponential { rate = 1, factor = 0.5 },
      optim.steps { rate = 1, at = 10 }, optim.steps { rate = 1, at = { 10 } } } do
      for _, step in ipairs { "ten", 0 / 0, {} } do
        H.raises(function() schedule(step) end, "the step is ", "expected a finite number")
      end
      H.raises(function() schedule() end, "the step is nil")
    end
  end)
end)

describe("SGD", function()
  it("takes the steps of a float64 loop", function()
    for _, o in ipairs { {}, { momentum = 0.9 }, { momentum = 0.9, nesterov = true }, { weight_decay = 0.1 },
      { momentum = 0.5, weight_decay = 0.2 } } do
      local w = vx.tensor({ 1, -2, 3 }, { requires_grad = true })
      local expected, velocity = { 1, -2, 3 }, { 0, 0, 0 }
      local sgd = vx.optim.SGD({ w }, { lr = 0.1, momentum = o.momentum, nesterov = o.nesterov,
        weight_decay = o.weight_decay })
      for step = 1, 5 do
        sgd:zero_grad()
        vx.step(function() (w:square() * 0.5):sum():backward() end) -- gradient w
        sgd:step(0.1 / step)
        for i = 1, 3 do
          local g = expected[i] + (o.weight_decay or 0) * expected[i]
          local mu = o.momentum or 0
          velocity[i] = mu * velocity[i] + g
          expected[i] = expected[i] - 0.1 / step * (o.nesterov and g + mu * velocity[i] or velocity[i])
        end
      end
      H.close(w:totable(), expected, 1e-5, 1e-6, "SGD")
      assert.equal(5, sgd.steps)
    end
  end)

  it("says what it cannot do", function()
    local w = vx.ones({ 2 }, { requires_grad = true })
    H.raises(function() vx.optim.SGD({}) end, "SGD: no parameters")
    H.raises(function() vx.optim.SGD({ w, 5 }) end, "SGD: parameters[2] is a number")
    H.raises(function() vx.optim.SGD({ w }, { momentum = 1 }) end, "SGD: momentum is 1")
    H.raises(function() vx.optim.SGD({ w }, { nesterov = true }) end, "SGD: nesterov needs a momentum")
    H.raises(function() vx.optim.SGD({ w }, { momentun = 0.9 }) end, "did you mean 'momentum'?")
  end)
end)

describe("gradients", function()
  it("are clipped to a norm, all by one factor, and only above it", function()
    local a, b = vx.zeros({ 2 }, { requires_grad = true }), vx.zeros({ 1, 2 }, { requires_grad = true })
    local function gradients()
      a:zero_grad()
      b:zero_grad()
      vx.step(function() ((a * 3):sum() + (b * 4):sum()):backward() end) -- norm sqrt(9 9 16 16)
    end
    gradients()
    H.close({ vx.optim.clip_grad_norm({ a, b }, 1):item() }, { math.sqrt(50) }, 1e-6)
    H.close(a.grad:totable(), { 3 / math.sqrt(50), 3 / math.sqrt(50) }, 1e-6)
    H.close(b.grad[1]:totable(), { 4 / math.sqrt(50), 4 / math.sqrt(50) }, 1e-6)
    gradients()
    vx.optim.clip_grad_norm({ a, b }, 8)
    assert.same({ 3, 3 }, a.grad:totable())
    a:zero_grad()
    b:zero_grad()
    H.raises(function() vx.optim.clip_grad_norm({ a, b }, 1) end, "no parameter has a gradient")
    H.raises(function() vx.optim.clip_grad_norm({ a, b }, 0) end, "most is 0, expected a positive number")
  end)

  it("come from an op of one's own", function()
    local calls = 0
    local cube = vx.custom { name = "cube", forward = function(ctx, x)
      ctx.x = x
      return x * x * x
    end, backward = function(ctx, dy)
      calls = calls + 1
      return 3 * ctx.x:square() * dy
    end }
    local x = vx.tensor({ 1, -2 }, { requires_grad = true })
    assert.truthy(vx.gradcheck(cube, { x }))
    x:zero_grad()
    calls = 0
    local y = cube(x)
    assert.same({ 1, -8 }, y:totable())
    y:sum():backward()
    assert.same({ 3, 12 }, x.grad:totable())
    assert.equal(1, calls)
    assert.is_false(vx.no_grad(cube, x).requires_grad)
    local same = vx.custom { name = "same", forward = function(_, z) return z end,
      backward = function(_, dy) return 2 * dy end }
    x:zero_grad()
    same(x):sum():backward()
    assert.same({ 2, 2 }, x.grad:totable())
    local kept, cache = vx.tensor { 5, 7 }, nil
    for name, gradient in pairs { input = function(ctx) return ctx.x end, outside = function() return kept end,
      dy = function(_, dy) return dy end, gradient = function() return x.grad end,
      cached = function(_, dy)
        cache = dy * 2
        return cache
      end } do
      local own = vx.custom { name = name, forward = function(ctx, z)
        ctx.x = z
        return z * 1
      end, backward = gradient }
      x:zero_grad()
      x:sum():backward()
      own(x * 1):sum():backward()
      local expected = ({ input = { 2, -1 }, outside = { 6, 8 }, dy = { 2, 2 }, gradient = { 2, 2 },
        cached = { 3, 3 } })[name]
      assert.same(expected, x.grad:totable(), name)
      assert.same({ { 1, -2 }, { 5, 7 } }, { x:totable(), kept:totable() }) -- they are there still
    end
    assert.same({ 2, 2 }, cache:totable())
    local wrong = vx.custom { name = "wrong", forward = function(_, z) return z * 1 end,
      backward = function() return vx.zeros { 3 } end }
    H.raises(function() wrong(x):sum():backward() end, "wrong: backward gives for argument 1 (3), expected a "
      .. "tensor (2)")
    H.raises(function() vx.custom { name = "half", forward = function() end } end, "half: needs forward and backward")
    H.raises(function() vx.custom { forwards = function() end } end, "custom: unknown option 'forwards', did you mean")
  end)
end)

describe("vx.debug_nonfinite", function()
  it("names the op that makes the first NaN or Inf, forward and backward", function()
    finally(function() vx.debug_nonfinite(false) end)
    vx.debug_nonfinite(true)
    local x = vx.tensor({ 0, 4, 1 }, { requires_grad = true })
    H.raises(function() (x - 1):log():sum() end, "log: its result (3) has 2 elements that are not finite, the first "
      .. "at 0", "x f32 (3) from -1 to 3", "After 0 backward passes")
    x:sum():backward()
    H.raises(function() x:sqrt():sum():backward() end, "sqrt: the gradient of x (3) has 1 elements", "After 2 backward")
    vx.debug_nonfinite(false)
    assert.truthy((x - 1):log()[1]:item() ~= (x - 1):log()[1]:item())
  end)
end)

describe("schedules", function()
  it("fall exponentially and in steps", function()
    local e = vx.optim.exponential { rate = 0.1, factor = 0.5, every = 10 }
    H.close({ e(0), e(10), e(5) }, { 0.1, 0.05, 0.1 * math.sqrt(0.5) }, 1e-12)
    local s = vx.optim.steps { rate = 1, at = { 3, 5 }, factor = 0.1 }
    H.close({ s(2), s(3), s(4), s(5), s(100) }, { 1, 0.1, 0.1, 0.01, 0.01 }, 1e-12)
    local every = vx.optim.steps { rate = 1, at = 30 }
    H.close({ every(29), every(30), every(60) }, { 1, 0.1, 0.01 }, 1e-12)
    H.raises(function() vx.optim.exponential { rate = 1 } end, "exponential: needs rate and factor")
    H.raises(function() vx.optim.steps { rate = 1, at = { 5, 3 } } end, "steps: at[2] is 3, expected a number of at "
      .. "least 5")
  end)
end)

describe("small layers", function()
  it("of one's own need no constructor", function()
    local Twice = nn.module "Twice"
    function Twice:forward(x) return x * 2 end -- luacheck: no self
    assert.same({ 6 }, Twice()(vx.tensor { 3 }):totable())
    H.raises(function() Twice(5) end, "one argument too many, 5; it takes none")
  end)

  it("do what their ops do, and an embedding gives rows", function()
    local x = vx.tensor { -1, 0, 2 }
    for name, f in pairs { ReLU = vx.relu, GELU = vx.gelu, SiLU = vx.silu } do
      assert.same(f(x):totable(), nn[name]()(x):totable())
    end
    local e = nn.Embedding(4, 3)
    assert.same({ 2, 2, 3 }, e(vx.tensor({ { 0, 3 }, { 1, 1 } }, { dtype = "i32" })):shape())
    assert.same(e.weight[4]:totable(), e(vx.tensor({ 3 }, { dtype = "i32" }))[1]:totable())
    H.raises(function() e(vx.tensor({ 4 }, { dtype = "i32" })) end, "gather: ", "index 4")
    H.raises(function() nn.Embedding(0, 3) end, "Embedding: count is 0")
    assert.equal("Embedding(4 rows of 3)  12 parameters", tostring(e))
  end)
end)

describe("products of float32 in AMX tiles", function()
  local program = [[
    local vx = require "vertex"
    vx.seed(1)
    local m, k, n = 50, 141, 70
    local a, b = vx.randn { m, k }, vx.randn { k, n }
    local A, B, sum = a:totable(), b:totable(), 0
    local c = vx.matmul(a, b):totable()
    for i = 1, m do
      for j = 1, n do
        local exact, size = 0, 0
        for p = 1, k do exact, size = exact + A[i][p] * B[p][j], size + math.abs(A[i][p] * B[p][j]) end
        sum = sum + ((c[i][j] - exact) / size * 2 ^ 24) ^ 2
      end
    end
    a[3][5]:fill(math.huge)
    a[4][6]:fill(3.4e38) -- which bf16 rounds to infinity
    local d = vx.matmul(a, b)
    print(math.sqrt(sum / m / n), d[3][1]:item(), d[4][1]:item() / B[6][1])]]
  for _, variant in ipairs(core.cpu_variants()) do
    if variant.runs and variant.name:find "^amx" then
      it("err less than FMA's, and leave to FMA what has no bf16 terms, with VERTEX_SIMD=" .. H.tagged(variant.name),
        function()
          local function run(name)
            local out = H.child(program, "VERTEX_SIMD=" .. name)
            local error, infinite, huge = out:match "^(%S+)\t(%S+)\t(%S+)"
            return tonumber(error), infinite, tonumber(huge)
          end
          local error, infinite, huge = run(variant.name)
          local of_fma = run "avx2"
          assert.is_true(error < 0.6 * of_fma, error .. " against " .. of_fma) -- 0.21 and 0.47 were seen
          assert.equal("inf", (infinite:gsub("^-", "")))
          assert.is_true(math.abs(huge / 3.4e38 - 1) < 1e-6, huge)
        end)
    end
  end
end)
