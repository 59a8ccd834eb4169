-- Attention beyond its values, which ops_spec has: what padding, lengths of 0, large scores and NaN do, what dropout
-- leaves, that memory grows with the length and not its square, and the layer.

local H = require "tests.helper"
local vx = H.vx
local ops = vx.ops

local function data(seed, shape, range) return H.generator(seed)(shape, range or { grad = false }) end
local function lengths(list) return vx.tensor(list, { dtype = "i32" }) end

--- Output and gradients of a call.
local function run(q, k, v, options, seed)
  for _, x in ipairs { q, k, v } do x.requires_grad, x.grad = true, nil end
  local y = ops.attention(q, k, v, options)
  y:backward(data(seed or 9, y:shape()))
  return { y:to "cpu", q.grad:to "cpu", k.grad:to "cpu", v.grad:to "cpu" }
end

describe("attention", function()
  it("takes nothing from keys and values beyond a row's length, not even NaN", function()
    local shape = { 2, 70, 2, 5 }
    local options = { lengths = lengths { 66, 3 }, dropout = 0.2, generator = { stream = function() return 1, 2 end } }
    local q, k, v = data(1, shape), data(2, shape), data(3, shape)
    local expected = run(q, k, v, options)
    for b, length in ipairs { 66, 3 } do
      for _, x in ipairs { k, v } do x:narrow(1, b, 1):narrow(2, length + 1, 70 - length):fill(0 / 0) end
    end
    for i, x in ipairs(run(q, k, v, options)) do assert.equal(expected[i]:bytes(), x:bytes(), "result " .. i) end
    for i = 3, 4 do
      assert.equal(0, expected[i]:narrow(1, 2, 1):narrow(2, 4, 67):abs():max():item())
      assert.is_true(expected[i]:narrow(1, 2, 1):narrow(2, 3, 1):abs():min():item() > 0)
    end
  end)

  it("gives 0 and gradients of 0 for a row of length 0, as for every weight dropped", function()
    local shape = { 2, 9, 1, 4 }
    for _, options in ipairs { { lengths = lengths { 0, 0 } }, { dropout = 1 } } do
      for _, x in ipairs(run(data(1, shape), data(2, shape), data(3, shape), options)) do
        assert.equal(0, x:abs():max():item())
      end
    end
    assert.same({ 0, 3, 1, 4 }, ops.attention(vx.zeros { 0, 3, 1, 4 }, vx.zeros { 0, 3, 1, 4 },
      vx.zeros { 0, 3, 1, 4 }):shape())
  end)

  it("keeps large scores finite, whichever tile has the largest", function()
    local function steps(sign)
      local q, k, v = vx.full({ 1, 150, 1, 1 }, 100), vx.empty { 1, 150, 1, 1 }, vx.empty { 1, 150, 1, 1 }
      k:copy(vx.arange(0, 150):reshape { 1, 150, 1, 1 } * sign)
      v:copy(vx.arange(0, 150):reshape { 1, 150, 1, 1 })
      return run(q, k, v)
    end
    assert.equal(149, steps(1)[1][1][7]:item())
    assert.equal(0, steps(-1)[1][1][7]:item())
    for _, x in ipairs(steps(1)) do assert.is_true(x:abs():max():item() < math.huge) end
  end)

  it("shows a NaN of a query in its own result alone", function()
    local shape = { 1, 70, 1, 4 }
    local q, k, v = data(1, shape), data(2, shape), data(3, shape)
    local expected = ops.attention(q, k, v)
    q[1][68][1][2] = 0 / 0
    local y = ops.attention(q, k, v)
    for t = 1, 70 do
      if t == 68 then
        for _, x in ipairs(y[1][t][1]:totable()) do assert.is_true(x ~= x) end
      else
        assert.equal(expected[1][t]:bytes(), y[1][t]:bytes(), "query " .. t)
      end
    end
  end)

  it("drops the share that is asked for, and keeps the mean", function()
    local T = 200
    local q, v = vx.zeros { 1, T, 2, 1 }, vx.ones { 1, T, 2, 1 } -- every weight is 1 / T: y T is the factor times kept
    for _, p in ipairs { 0.1, 0.5, 0.9 } do
      local y = ops.attention(q, q, v, { dropout = p, generator = vx.generator(4) })
      -- 80,000 draws: the mean of y is off by sqrt(p / (1 - p) / 80000), some 1e-2 at p = 0.9; five of those
      H.close({ y:mean():item() }, { 1 }, 0, 5 * math.sqrt(p / (1 - p) / 80000))
      local kept = y[1][1][1]:item() * T * (1 - p)
      H.close({ kept }, { math.floor(kept + 0.5) }, 1e-3, 0)
    end
    local a = ops.attention(q, q, v, { dropout = 0.5, generator = vx.generator(4) })
    assert.equal(a:bytes(), ops.attention(q, q, v, { dropout = 0.5, generator = vx.generator(4) }):bytes())
    assert.not_equal(a:bytes(), ops.attention(q, q, v, { dropout = 0.5, generator = vx.generator(5) }):bytes())
  end)

  it("needs memory in proportion to the length", function()
    local function peak(T)
      local shape, before = { 1, T, 1, 4 }, nil
      local q, k, v = data(1, shape), data(2, shape), data(3, shape)
      vx.step(function()
        collectgarbage()
        collectgarbage()
        vx.memory_flush()
        vx.reset_peak()
        before = vx.memory().live
        run(q, k, v)
      end)
      return vx.memory().peak - before
    end
    local one, two, four = peak(1000), peak(2000), peak(4000)
    assert.is_true(two - one > 0)
    H.close({ four - two }, { 2 * (two - one) }, 0.1, 0) -- blocks of memory come in steps; T x T would make it 4
  end)
end)

describe("multi-head attention", function()
  it("is attention between projections, with torchaudio's names", function()
    local layer = vx.nn.MultiHeadAttention(6, 2, { dropout = 0.5, generator = vx.generator(3) })
    local names = {}
    for name in pairs(layer:state_dict()) do names[#names + 1] = name end
    table.sort(names)
    assert.same({ "k_proj.bias", "k_proj.weight", "out_proj.bias", "out_proj.weight", "q_proj.bias", "q_proj.weight",
      "v_proj.bias", "v_proj.weight" }, names)
    local x, n = data(1, { 2, 5, 6 }), lengths { 5, 2 }
    local function heads(name) return layer[name](x):reshape { 2, 5, 2, 3 } end
    local function expected(options)
      options.lengths = n
      local y = ops.attention(heads "q_proj", heads "k_proj", heads "v_proj", options)
      return layer.out_proj(y:reshape { 2, 5, 6 }):bytes()
    end
    assert.equal(expected { dropout = 0.5, generator = vx.generator(3) }, layer(x, n):bytes())
    layer:eval()
    assert.equal(expected {}, layer(x, n):bytes())
    assert.not_equal(layer(x):bytes(), layer(x, n):bytes())
    assert.is_truthy(tostring(layer):find("6 in 2 heads, dropout 0.5", 1, true))
  end)
end)
