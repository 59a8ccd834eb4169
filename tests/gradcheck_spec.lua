-- vx.gradcheck: right gradients pass, wrong ones are named with input and element, misuse is explained.

local vx = require "vertex"
local H = require "tests.helper"
local gradcheck = require "vertex.gradcheck"
local tape = require "vertex.tape"

local function message(...)
  local ok, text = pcall(...)
  assert.is_false(ok)
  return tostring(text)
end

--- x^2, whose gradient is right but for element `wrong`.
local function square(wrong)
  return tape.recorded {
    name = "square_of_mine",
    forward = function(ctx, x)
      if ctx.needs then ctx.x = x end
      return (x:detach() * x:detach())
    end,
    backward = function(ctx, dy)
      local dx = (dy * ctx.x:detach() * 2):contiguous()
      if wrong then
        local list = dx:reshape({ -1 }):totable()
        list[wrong] = list[wrong] + 0.5
        dx = vx.tensor(list):reshape(dx:shape())
      end
      return dx
    end,
  }
end

describe("gradcheck", function()
  local T = H.generator(5)

  it("leaves the gradients that there are as they are: of inputs, and of leaves that f closes over", function()
    local w, p, c = T { 3 }, T { 3 }, vx.tensor { 1, 2, 3 }
    local function check_all(f, wrong)
      w:zero_grad()
      p:zero_grad()
      vx.mul(w, c):sum():backward()
      local g = w.grad
      assert.equal(not wrong, (pcall(gradcheck, f, { w })))
      assert.equal(g, w.grad)
      assert.same({ 1, 2, 3 }, w.grad:totable())
      assert.is_nil(p.grad)
    end
    check_all(function(x) return (x * x):sum() end)
    check_all(function(x) return (x * p):sum() end)
    check_all(function(x) return (square(1)(x) * p):sum() end, true)
    check_all(function() error("f fails", 0) end, true)
    -- what an input that f does not use has already counts for nothing
    assert.is_true(gradcheck(function(x) return x * 2 end, { p, w }))
    p:sum():backward()
    assert.same({ 1, 1, 1 }, p.grad:totable())
  end)

  it("refuses more inputs than can be passed", function()
    local inputs = {}
    for i = 1, 9000 do inputs[i] = inputs[1] or T { 1 } end
    assert.is_truthy(message(gradcheck, function(x) return x end, inputs):find("9000 tensors, expected at most"
      .. " 5000", 1, true))
    inputs = { T { 2 } }
    for i = 2, 5000 do inputs[i] = vx.ones { 1 } end
    assert.is_true(gradcheck(function(x, ...) return x * select(4999, ...) end, inputs))
  end)

  it("passes right gradients of one and of several inputs and outputs", function()
    local ok, worst = gradcheck(square(), { T { 3, 4 } })
    assert.is_true(ok)
    assert.is_true(worst < 1e-4, tostring(worst))
    assert.is_true(gradcheck(function(a, b) return vx.matmul(a, b), (a * a):sum(), "text" end,
      { T { 3, 4 }, T { 4, 2 } }))
    assert.is_true(gradcheck(function(a, b) return a * b end, { T { 5 }, T({ 5 }, { grad = false }) }))
  end)

  it("takes a quantizer with its codebook and temperature, and leaves all as it was", function()
    vx.seed(3)
    local q = vx.quantizer("softmax-knn-ce", { dim = 3, codes = 8, k = 2, tau = 0.5 })
    local z = T { 32, 3 }
    local before = { z:bytes(), q.codebook:bytes(), q.log_tau:bytes() }
    assert.is_true(gradcheck(function(x)
      local o = q(x)
      return o.quantized, o.reg
    end, { z, q.codebook, q.log_tau }, { elements = 6, eps = 5e-3, tolerance = 1e-2 }))
    assert.same(before, { z:bytes(), q.codebook:bytes(), q.log_tau:bytes() })
    assert.is_nil(z.grad)
  end)

  it("names input and element of a wrong gradient", function()
    local text = message(gradcheck, function(a, x) return a, square(5)(x) end, { T { 2 }, T { 2, 3 } })
    assert.truthy(text:find("input 2 (2,3) at [2][2]: backward gives", 1, true), text)
  end)

  it("says that a gradient is missing", function()
    local text = message(gradcheck, function(a, b) return a + b:detach() end, { T { 2 }, T { 2 } })
    assert.truthy(text:find("input 2 (2) at [1]: backward gives 0, finite differences", 1, true), text)
  end)

  it("refuses noise, and what is not varied", function()
    assert.truthy(message(gradcheck, function(x) return x * vx.randn { 3 } end, { T { 3 } }):find "fix its noise")
    assert.truthy(message(gradcheck, function() return 1 end, { T { 3 } }):find "returned no f32 tensor")
    assert.truthy(message(gradcheck, square(), T { 3 }):find "expected an array of tensors")
    assert.truthy(message(gradcheck, square(), { T({ 3 }, { grad = false }) }):find "no input has requires_grad")
    assert.truthy(message(gradcheck, square(), { T { 3 } * 2 }):find "expected a leaf")
    assert.truthy(message(gradcheck, square(), { T { 3 } }, { epsilon = 1 }):find "known: elements, eps, tolerance")
    assert.truthy(message(gradcheck, square(), { T { 3 } }, { eps = 0 }):find "eps is 0, expected a positive number")
    assert.truthy(message(gradcheck, 3, { T { 3 } }):find "f is a number, expected a function")
  end)
end)
