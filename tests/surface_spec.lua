-- The Lua surface that scripts, notebooks and outside checks rely on: every name of it, doing what its line promises.

local H = require "tests.helper"
local vx = require "vertex"

describe("the surface:", function()
  it("require gives one module", function() assert.equal(vx, require "vertex") end)

  it("seed, device, devices", function()
    vx.seed(1)
    local a = vx.randn({ 3 }):bytes()
    vx.seed(1)
    assert.equal(a, vx.randn({ 3 }):bytes())
    vx.device "cpu"
    assert.equal("cpu", vx.device())
    assert.equal("cpu", vx.devices()[1].name)
    assert.is_number(vx.devices()[1].memory)
  end)

  it("tensor, zeros, randn, rand, arange, options second", function()
    local x = vx.tensor { { 1, 2 }, { 3, 4 } }
    assert.equal("f32", x:dtype())
    assert.same({ { 1, 2 }, { 3, 4 } }, x:totable())
    assert.same({ { 0, 0, 0 }, { 0, 0, 0 } }, vx.zeros({ 2, 3 }):totable())
    assert.same({ 2, 3 }, vx.randn({ 2, 3 }):shape())
    local r = vx.rand { 1000 }
    assert.is_true(r:min():item() > 0 and r:max():item() < 1)
    assert.same({ 0, 1, 2 }, vx.arange(3):totable())
    for _, y in ipairs { vx.tensor({ 1 }, { dtype = "i32", device = "cpu" }), vx.zeros({ 1 }, { dtype = "i32" }),
      vx.arange(1, { dtype = "i32" }) } do
      assert.same({ "i32", "cpu" }, { y:dtype(), y:device() })
    end
  end)

  it("tensor methods", function()
    local x, y = vx.tensor { { 1, 2 }, { 3, 4 } }, vx.tensor { { 5, 6 }, { 7, 8 } }
    assert.same({ 2, 2 }, x:shape())
    assert.equal(2, x:size(1))
    assert.equal(2, x:dim())
    assert.equal("cpu", x:device())
    assert.equal(4, x[2][2]:item())
    assert.same({ { 1, 2 }, { 3, 4 } }, x:to("cpu"):totable())
    local c = x:clone()
    x:copy(y)
    assert.same({ { 5, 6 }, { 7, 8 } }, x:totable())
    assert.same({ { 1, 2 }, { 3, 4 } }, c:totable())
    assert.same({ 5, 6, 7, 8 }, x:reshape({ 4 }):totable())
    assert.same({ 5, 6 }, x[1]:totable())
    assert.is_truthy(tostring(x):find("f32 (2,2)", 1, true))
  end)

  it("gradients", function()
    local x = vx.tensor { 1, 2, 3 }
    x.requires_grad = true
    local loss = (x * x + 2 * x - x):sum()
    loss:backward()
    assert.same({ 3, 5, 7 }, x.grad:totable())
  end)

  it("graph: a step that is replayed", function()
    local p = vx.ones({ 3 }, { requires_grad = true })
    local optimizer = vx.optim.AdamW({ p }, { weight_decay = 0 })
    local step = vx.graph(function(rate)
      local loss = (p * p):sum()
      optimizer:zero_grad()
      loss:backward()
      optimizer:step(rate)
      return loss
    end)
    local last = math.huge
    for i = 1, 5 do
      local loss = step:replay(0.1):item()
      assert.is_true(loss < last)
      assert.equal(i, optimizer.steps)
      last = loss
    end
    step:release()
  end)

  it("the usual names, as methods and as functions", function()
    local x = vx.tensor { { 0.5, 1 }, { 2, 4 } }
    for _, name in ipairs { "matmul", "sum", "mean", "max", "min", "exp", "log", "sqrt", "abs", "square", "softmax",
      "log_softmax", "relu", "silu", "gelu",
      "sigmoid", "tanh", "reshape", "transpose", "narrow", "select", "expand", "argmax", "clamp",
      "cumsum", "topk", "gather", "scatter_add", "round", "floor", "sign", "maximum", "minimum", "masked_fill", "eq",
      "ne", "lt", "le", "gt", "ge", "detach" } do
      assert.is_function(vx[name], name)
      assert.is_function(x[name], name)
    end
    for _, name in ipairs { "where", "cat", "stack", "one_hot", "layer_norm", "group_norm", "linear", "conv2d",
      "conv1d", "dropout", "attention", "mse" } do
      assert.is_function(vx[name], name)
    end
    assert.same({ { 2.25, 4.5 }, { 9, 18 } }, x:matmul(x):totable())
    assert.same(vx.matmul(x, x):totable(), x:matmul(x):totable())
    assert.equal(7.5, x:sum():item())
    assert.equal(1.875, x:mean():item())
    H.close({ x:exp():sum():item(), x:log():sum():item() }, { math.exp(0.5) + math.exp(1) + math.exp(2) + math.exp(4),
      math.log(4) }, 1e-6, 0)
    H.close(x:softmax():sum(2):totable(), { 1, 1 }, 1e-6, 0)
    H.close(x:log_softmax():exp():sum(2):totable(), { 1, 1 }, 1e-6, 0)
    assert.same({ { 0, 0 } }, vx.relu(vx.tensor { { -1, 0 } }):totable())
    for name, f in pairs(vx.ops) do
      if type(f) == "function" then assert.is_truthy(vx[name], name) end
    end
  end)

  it("load and save", function()
    local path, x = H.scratch "surface.safetensors", vx.tensor { 1, 2 }
    vx.save(path, { name = x }, { key = "text" })
    local t, meta = vx.load(path)
    assert.same({ 1, 2 }, t.name:totable())
    assert.same({ key = "text" }, meta)
    path = H.scratch "surface.npy"
    vx.save(path, x)
    assert.same({ 1, 2 }, vx.load(path):totable())
    H.raises(function() vx.load(H.scratch "nowhere") end, "nowhere")
    H.raises(function() vx.load(1) end, "load: path is 1, expected a path")
  end)

  it("quantizers", function()
    local q = vx.quantizer("softmax-knn-ce", { dim = 32, codes = 64, groups = 1, k = 8, tau = 0.1, seed = 1,
      weight = 1 })
    assert.same({ 1, 64, 32 }, q.codebook:shape())
    assert.is_true(q.codebook.requires_grad)
    assert.same({ 1 }, q.log_tau:shape())
    assert.equal(2, #q:parameters())
    assert.is_true(q:train().training)
    assert.is_false(q:eval().training)
    assert.equal(q, q:to "cpu")
    q:train()
    for _, item in ipairs(vx.quantizers()) do assert.is_true(item.name and item.paper and item.options and true) end

    local z = vx.randn { 20, 32 }
    local o = q:forward(z)
    assert.same({ 20, 32 }, o.quantized:shape())
    assert.equal(1, o.reg:numel())
    assert.same({ 20, 1 }, o.codes:shape())
    assert.equal("i32", o.codes:dtype())
    for _, name in ipairs { "perplexity", "usage", "tau", "max_p" } do assert.is_number(o.stats[name]) end
    assert.same({ 2, 5, 32 }, q:forward(vx.randn { 2, 5, 32 }).quantized:shape())
    assert.is_truthy(q:forward(z, { gumbel = vx.zeros { 20, 1, 64 } }))
    local codes = q:encode(z)
    assert.same({ 20, 32 }, q:decode(codes):shape())
    assert.is_nil(vx.quantizer("ste-euclid", { dim = 4, codes = 4 }).log_tau)
  end)

  it("a training loop in the open", function()
    vx.seed(2)
    local q = vx.quantizer("softmax-knn-ce", { dim = 4, codes = 8, k = 2 })
    local layer = vx.nn.Linear(4, 4)
    local opt = vx.optim.AdamW({ layer.weight, layer.bias, unpack(q:parameters()) }, { lr = 1e-2 })
    local x, first, last = vx.randn { 32, 4 }, nil, nil
    for _ = 1, 50 do
      last = vx.step(function()
        local o = q:forward(layer(x))
        local loss = vx.mse(o.quantized, x) + o.reg
        loss:backward()
        opt:step()
        opt:zero_grad()
        return loss:item()
      end)
      first = first or last
    end
    assert.is_true(last < first)
  end)

  it("modules, those with needs of their own at first use", function()
    for _, name in ipairs { "nn", "optim", "ops" } do assert.is_table(vx[name], name) end
    local file_of = { data = "data", plot = "plot", runs = "runs",
      simplex = "simplex", metrics = "metrics", dist = "dist" }
    for name, file in pairs(file_of) do
      local there = H.read("lua/vertex/" .. file .. ".lua") or H.read("lua/vertex/" .. file .. "/init.lua")
      local ok, module = pcall(function() return vx[name] end)
      if there then
        assert.is_true(ok, tostring(module))
        assert.is_table(module, name)
      else -- a part this checkout does not have says so by name
        assert.is_false(ok)
        assert.is_truthy(tostring(module):find("module 'vertex." .. name .. "' not found", 1, true), tostring(module))
      end
    end
    assert.is_nil(vx.no_such_module)
  end)
end)
