-- The tape: what backward() adds up, and what it refuses. Gradients of single ops are in ops_spec.lua.

local H = require "tests.helper"
local vx = H.vx
local ops = vx.ops

local function leaf(t) return vx.tensor(t, { requires_grad = true }) end
local function near(expected, x)
  H.close(H.flat(x), type(expected) == "table" and expected or { expected }, 1e-6, 1e-6)
end

describe("backward", function()
  it("reaches a leaf used twice, and shared subexpressions once each", function()
    local x = leaf { 2, 3 }
    local y = x * x -- 2x
    local z = y * y + y -- 2y y' + y'
    z:sum():backward()
    near({ 2 * 4 * 4 + 4, 2 * 9 * 6 + 6 }, x.grad)
  end)

  it("adds up in a leaf over several calls until zero_grad", function()
    local x = leaf { 1, 2 }
    for n = 1, 3 do
      ops.affine(x, 2):sum():backward()
      near({ 2 * n, 2 * n }, x.grad)
    end
    x:zero_grad()
    assert.is_nil(x.grad)
    x:square():sum():backward()
    near({ 2, 4 }, x.grad)
  end)

  it("keeps the gradient's memory across zero_grad", function()
    local x = leaf { 1, 2 }
    x:sum():backward()
    local g = x.grad
    x:zero_grad()
    x:sum():backward()
    assert.equal(g, x.grad)
    near({ 1, 1 }, x.grad)
  end)

  it("of the leaf itself gives one", function()
    local x = leaf { 5 }
    x:backward()
    near({ 1 }, x.grad)
  end)

  it("may read a leaf's gradient, which it adds to: as it was before", function()
    local function with_gradient()
      local w = leaf { 1, 2, 3 }
      ops.mul(w, vx.tensor { 1, 2, 3 }):sum():backward()
      return w, w.grad
    end
    local w, g = with_gradient()
    local v = leaf { 1, 1, 1 }
    local l = (v * w.grad):sum() + (w * 5):sum()
    l:backward()
    near({ 1, 2, 3 }, v.grad)
    near({ 6, 7, 8 }, w.grad)
    near({ 1, 2, 3 }, g)

    w, g = with_gradient()
    l = (w * g):sum() + (w * g:narrow(1, 1, 3) * 2):sum()
    l:backward()
    near({ 4, 8, 12 }, w.grad)

    for _, again in ipairs { false, true } do -- a buffer that the pass would fill anew; a gradient set by hand
      w, g = with_gradient()
      w:zero_grad()
      v:zero_grad()
      if again then w.grad = g end
      local y = v * g
      l = y:sum() + (w * 7):sum()
      l:backward()
      near({ 1, 2, 3 }, v.grad)
      near(again and { 8, 9, 10 } or { 7, 7, 7 }, w.grad)
    end
    -- made in the leaf's own memory, by an op that is lent it
    local x, kernel = vx.tensor { { 1, 2 } }, leaf { { 3, 4 } }
    ops.linear(x, kernel):sum():backward()
    local before = kernel.grad
    kernel:zero_grad()
    v = leaf { { 1, 1 } }
    l = (v * before):sum() + ops.linear(x * 10, kernel):sum()
    l:backward()
    near({ 1, 2 }, v.grad)
    near({ 10, 20 }, kernel.grad)
  end)

  it("takes a leaf's own gradient", function()
    for expected, result in pairs { [2] = function(w) return w end, [3] = function(w) return w + w end,
      [4] = function(w) return w * 3 end } do
      local w = leaf { 1, 2, 3 }
      ops.mul(w, vx.tensor { 1, 2, 3 }):sum():backward()
      result(w):backward(w.grad)
      near({ expected, 2 * expected, 3 * expected }, w.grad)
      near({ 1, 2, 3 }, w)
    end
    local w = leaf { 1, 2 }
    ops.affine(w, 2):backward(w * 3) -- one that was computed on the tape is taken as it is
    near({ 6, 12 }, w.grad)
    H.raises(function() ops.affine(w, 2):backward(3) end, "gradient is 3, expected a tensor")
  end)

  it("takes a gradient of the output's shape", function()
    local x = leaf { { 1, 2 }, { 3, 4 } }
    x:square():backward(vx.tensor { { 1, 0 }, { 10, -1 } })
    near({ 2, 0, 60, -8 }, x.grad)
    H.raises(function() x:square():backward(vx.ones { 2 }) end, "backward", "(2)", "(2,2)")
    H.raises(function() x:square():backward() end, "backward", "(2,2)")
    -- a strided one too, and it is left as it was
    x:zero_grad()
    local g = vx.tensor { { 1, 2 }, { 3, 4 } }
    x:square():backward(g:t())
    near({ 2, 12, 12, 32 }, x.grad)
    assert.same({ { 1, 2 }, { 3, 4 } }, g:totable())
  end)

  it("does not hand the same buffer to two leaves", function()
    local a, b = leaf { 1 }, leaf { 1 }
    local g = vx.ones { 1 }
    ops.add(a, b):backward(g)
    a.grad:fill(7)
    near({ 1 }, b.grad)
    near({ 1 }, g)
  end)

  it("does not add in place into a gradient that two nodes hold", function()
    local x, w = leaf { 1, 1 }, leaf { 1, 1 }
    local a, b = ops.affine(x, 1, 0), ops.affine(w, 1, 0)
    local c = ops.affine(a, 2, 0)
    -- the sum hands one gradient to a and to b; then c's arrives at a, before b has passed its own on
    local y = ops.add(a, b)
    ops.add(y, c):backward(vx.ones { 2 })
    near({ 3, 3 }, x.grad)
    near({ 1, 1 }, w.grad)
    -- the same where that gradient was itself added up
    x:zero_grad()
    w:zero_grad()
    local d, e = ops.affine(x, 1, 0), ops.affine(w, 1, 0)
    local f = ops.affine(d, 2, 0)
    local s = ops.add(d, e)
    ops.add(ops.add(ops.affine(s, 1, 0), ops.affine(s, 1, 0)), f):backward(vx.ones { 2 })
    near({ 4, 4 }, x.grad)
    near({ 2, 2 }, w.grad)
    -- and through views of one gradient
    x:zero_grad()
    w:zero_grad()
    local p, q = ops.affine(x, 1, 0), ops.affine(w, 1, 0)
    local r = ops.affine(p, 2, 0)
    ops.add(ops.add(ops.reshape(p, { 2, 1 }), ops.reshape(q, { 2, 1 })),
      ops.reshape(r, { 2, 1 })):backward(vx.ones { 2, 1 })
    near({ 3, 3 }, x.grad)
    near({ 1, 1 }, w.grad)
  end)

  it("of x + x and of x - x adds the two paths", function()
    local x = leaf { 3 }
    ops.add(x, x):backward()
    near({ 2 }, x.grad)
    x:zero_grad()
    ops.sub(x, x):backward()
    near({ 0 }, x.grad)
  end)

  it("goes through long chains and wide fans", function()
    local x = leaf { 1 }
    local y = x
    local factor = 1 + 2 ^ -10 -- exact in float32
    for _ = 1, 500 do y = y * factor end
    y:backward()
    near({ factor ^ 500 }, x.grad)
    x:zero_grad()
    local sum = x
    for i = 1, 200 do sum = sum + x * i end
    sum:backward()
    near({ 1 + 200 * 201 / 2 }, x.grad)
  end)

  it("uses a diamond's nodes after all their users", function()
    local x = leaf { 2 }
    local a = x * 3
    local b = a:exp()
    local c = b * a + b
    c:sum():backward()
    -- c = e^{3x} (3x + 1): c' = 3 e^{3x} (3x + 2)
    H.close({ x.grad:item() }, { 3 * math.exp(6) * 8 }, 1e-6, 0)
  end)

  it("leaves parts that lead nowhere without a gradient", function()
    local x, y, z = leaf { 1 }, leaf { 2 }, vx.tensor { 3 }
    local unused = y * 5
    ops.mul(x, z):backward()
    assert.is_nil(y.grad)
    assert.is_nil(z.grad)
    assert.is_true(unused.requires_grad)
    near({ 3 }, x.grad)
  end)

  it("of an op with two outputs works when only one of them is used", function()
    local z = vx.randn({ 6, 4 }, { requires_grad = true })
    local q = vx.quantizer("ste-euclid", { dim = 4, codes = 5 })
    q:forward(z).quantized:sum():backward()
    near(H.flat(vx.ones { 6, 4 }), z.grad)
    z:zero_grad()
    q.codebook:zero_grad()
    local o = q:forward(z)
    o.reg:backward()
    -- d/dz of mean over rows of |z - q|^2
    local expected = {}
    local zs, qs = H.flat(z), H.flat(o.quantized)
    for i = 1, #zs do expected[i] = 2 * (zs[i] - qs[i]) / 6 end
    near(expected, z.grad)
  end)

  it("a second time over a used tape is an error that says so", function()
    local x = leaf { 2 }
    local y = x:square()
    y:backward()
    H.raises(function() y:backward() end, "backward", "square", "again")
    local shared = x:exp()
    local a, b = shared * 2, shared * 3
    a:backward()
    H.raises(function() b:backward() end, "backward", "exp")
  end)

  it("of something without a gradient is an error", function()
    H.raises(function() vx.ones({ 1 }):backward() end, "backward", "requires_grad")
  end)

  it("twice from one loss gives the same bits", function()
    local function run()
      local T = H.generator(3)
      local x, w = T { 40, 17 }, T { 33, 17 }
      local y = ops.softmax(ops.linear(x, w))
      ops.mse(y, vx.zeros { 40, 33 }):backward()
      return { x.grad:bytes(), w.grad:bytes() }
    end
    H.same_bits(run)
  end)
end)

describe("no_grad and detach", function()
  it("record nothing", function()
    local x = leaf { 1, 2 }
    local y = vx.no_grad(function() return x * 2 end)
    assert.is_false(y.requires_grad)
    assert.is_true((x * 2).requires_grad)
    local d = (x * 2):detach()
    assert.is_false(d.requires_grad)
    ops.mul(d, x):sum():backward()
    near({ 2, 4 }, x.grad)
  end)

  it("no_grad ends also when its function fails, and passes arguments and results", function()
    pcall(vx.no_grad, function() error "x" end)
    assert.is_true((leaf { 1 } * 2).requires_grad)
    local a, b = vx.no_grad(function(p, q) return q, p end, 1, 2)
    assert.same({ 2, 1 }, { a, b })
    vx.no_grad(function() vx.no_grad(function() end) assert.is_false((leaf { 1 } * 2).requires_grad) end)
  end)
end)

describe("broadcasting", function()
  it("sums gradients back to the operand's shape", function()
    local a, b = leaf { { 1, 2, 3 }, { 4, 5, 6 } }, leaf { 10, 20, 30 }
    ops.mul(a, b):sum():backward()
    near({ 10, 20, 30, 10, 20, 30 }, a.grad)
    near({ 5, 7, 9 }, b.grad)
    assert.same({ 3 }, b.grad:shape())
    local s, c = leaf(2), leaf { { 1 }, { 3 } }
    ops.mul(ops.mul(vx.ones { 4, 2, 5 }, s), c):sum():backward()
    near({ 4 * 5 * 4 }, s.grad)
    near({ 40, 40 }, c.grad)
    assert.same({}, s.grad:shape())
    assert.same({ 2, 1 }, c.grad:shape())
  end)

  it("of a tensor with itself", function()
    local x = leaf { { 1 }, { 2 } }
    ops.mul(x, ops.transpose(x, 1, 2)):sum():backward() -- (sum x)^2
    near({ 6, 6 }, x.grad)
  end)
end)

describe("views", function()
  it("send gradients to the part they show", function()
    local x = leaf { { 1, 2, 3 }, { 4, 5, 6 } }
    ops.mul(x[2], x[1]):sum():backward()
    near({ 4, 5, 6, 1, 2, 3 }, x.grad)
    x:zero_grad()
    x:t():narrow(1, 2, 2):square():sum():backward()
    near({ 0, 4, 6, 0, 10, 12 }, x.grad)
    x:zero_grad()
    x:reshape({ 3, 2 })[2]:sum():backward()
    near({ 0, 0, 1, 1, 0, 0 }, x.grad)
    x:zero_grad()
    x:t():contiguous():reshape({ 6 }):narrow(1, 1, 2):sum():backward()
    near({ 1, 0, 0, 1, 0, 0 }, x.grad)
    x:zero_grad()
    x:expand({ 4, 2, 3 }):sum():backward()
    near({ 4, 4, 4, 4, 4, 4 }, x.grad)
  end)

  it("overlapping add up", function()
    local x = leaf { 1, 2, 3 }
    ops.add(x:narrow(1, 1, 2), x:narrow(1, 2, 2)):sum():backward()
    near({ 1, 2, 1 }, x.grad)
  end)

  it("clone passes gradients on, to() does not", function()
    local x = leaf { 1, 2 }
    ops.mul(x:clone(), x):sum():backward()
    near({ 2, 4 }, x.grad)
  end)
end)

describe("the tape and the step scope", function()
  it("gradients of outer leaves outlive the step", function()
    local x = leaf { 1, 2 }
    vx.step(function() x:square():sum():backward() end)
    near({ 2, 4 }, x.grad)
    vx.step(function() x:square():sum():backward() end)
    near({ 4, 8 }, x.grad)
  end)

  it("a tensor returned from a step is a leaf's value, without its past", function()
    local x = leaf { 1, 2 }
    local y = vx.step(function() return x:square() end)
    near({ 1, 4 }, y)
    assert.is_nil(rawget(y, "_node"))
  end)

  it("frees intermediate gradients while it goes", function()
    collectgarbage()
    collectgarbage()
    local x = vx.ones({ 250000 }, { requires_grad = true }) -- 1 MB
    x:sum():backward() -- the buffer of the gradient
    x:zero_grad()
    vx.reset_peak()
    local before = vx.memory().live
    vx.step(function()
      local y = x
      for _ = 1, 20 do y = y:exp():log() end -- 40 MB held for backward
      y:sum():backward()
    end)
    assert.is_true(vx.memory().peak - before < 48e6, ("%.1f MB"):format((vx.memory().peak - before) / 1e6))
    assert.equal(before, vx.memory().live)
  end)

  it("goes through a cast to bf16, in the type of each side", function()
    local x = leaf { 1, 1.0078125 + 2 ^ -10, -3.14159 }
    local y = ops.cast(x, "bf16")
    assert.equal("bf16", y:dtype())
    near({ 1, 1.0078125, -3.140625 }, y:to "f32")
    ops.mul(ops.cast(y, "f32"), vx.tensor { 2, 1 + 2 ^ -10, 5 }):sum():backward()
    near({ 2, 1, 5 }, x.grad) -- rounded on their way, as y is
    y = ops.cast(x, "bf16")
    y:backward(vx.tensor { 1, 1 + 2 ^ -10, 1 }) -- a gradient is given in any dtype
    near({ 3, 2, 6 }, x.grad)
    H.raises(function() ops.cast(x, "u8") end, "cast: 'u8', expected f32 or bf16")
    H.raises(function() ops.cast(vx.tensor({ 1 }, { dtype = "i32" }), "f32") end,
      "cast: x (1) is i32, expected f32 or bf16")
  end)

  it("an op whose backward fails leaves the tape usable", function()
    local tape = require "vertex.tape"
    local broken = tape.recorded { name = "broken", forward = function(_, x) return x:detach() end,
      backward = function() error("broken backward", 0) end }
    local x = leaf { 1 }
    local ok, message = pcall(function() broken(x):backward() end)
    assert.is_false(ok)
    assert.equal("broken backward", message)
    x:square():backward()
    near({ 2 }, x.grad)
  end)
end)

describe("a new op of one's own", function()
  it("is a forward and a backward", function()
    local tape = require "vertex.tape"
    local twice = tape.recorded {
      name = "twice",
      forward = function(ctx, x)
        ctx.factor = ctx.needs and 2
        return ops.affine(x:detach(), 2, 0)
      end,
      backward = function(ctx, dy) return dy * ctx.factor end,
    }
    local x = leaf { 1, 5 }
    local y = twice(x)
    near({ 2, 10 }, y)
    y:sum():backward()
    near({ 2, 2 }, x.grad)
  end)

  -- y = factors[1] a + factors[2] b; the order in which its backward asks for the two gradients is given
  local function weighted(first, factors)
    local tape = require "vertex.tape"
    return tape.recorded {
      name = "weighted",
      forward = function(ctx, a, b)
        ctx.a, ctx.b = a, b
        return ops.affine(a:detach(), factors[1]) + ops.affine(b:detach(), factors[2])
      end,
      backward = function(ctx, dy)
        local da, db
        if first == "a" then da, db = tape.gradient_like(ctx.a), tape.gradient_like(ctx.b)
        else db = tape.gradient_like(ctx.b); da = tape.gradient_like(ctx.a) end
        da:copy(ops.affine(dy, factors[1]))
        db:copy(ops.affine(dy, factors[2]))
        return da, db
      end,
    }
  end

  it("may make gradients in the leaves' own memory, of one leaf twice as well", function()
    for _, first in ipairs { "a", "b" } do
      local x, y = leaf { 1, 5 }, leaf { 2, 3 }
      weighted(first, { 2, 3 })(x, y):sum():backward()
      near({ 2, 2 }, x.grad)
      near({ 3, 3 }, y.grad)
      local g = x.grad
      x:zero_grad()
      y:zero_grad()
      weighted(first, { 2, 3 })(x, x):sum():backward()
      near({ 5, 5 }, x.grad)
      assert.equal(g, x.grad)
      weighted(first, { 2, 3 })(x, y):sum():backward() -- into a gradient that is there
      near({ 7, 7 }, x.grad)
      local z = ops.affine(x, 1)
      local both = weighted(first, { 10, 20 })(z, y) + weighted(first, { 1, 1 })(y, x)
      both:sum():backward()
      near({ 18, 18 }, x.grad)
      near({ 24, 24 }, y.grad)
    end
  end)

  it("that fails after it was lent a leaf's memory leaves nothing of it behind", function()
    local tape = require "vertex.tape"
    local broken = tape.recorded {
      name = "broken",
      forward = function(ctx, x)
        ctx.x = x
        return x:detach()
      end,
      backward = function(ctx)
        tape.gradient_like(ctx.x):fill(100)
        error("broken backward", 0)
      end,
    }
    local x = leaf { 1 }
    assert.is_false((pcall(function() broken(x):backward() end)))
    assert.is_nil(x.grad)
    x:square():backward()
    near({ 2 }, x.grad)
    x:zero_grad()
    assert.is_false((pcall(function() broken(x):backward() end)))
    x:backward()
    near({ 1 }, x.grad)
  end)

  it("may add to what its first input has got so far", function()
    local tape = require "vertex.tape"
    local given = {}
    local half = tape.recorded {
      name = "half",
      accumulates = true,
      forward = function(_, x) return ops.affine(x:detach(), 0.5) end,
      backward = function(_, dy, _, before)
        given[#given + 1] = before and H.flat(before) or "nothing"
        return before and dy * 0.5 + before or dy * 0.5
      end,
    }
    for _, others in ipairs { 0, 1, 2 } do
      given = {}
      local x = leaf { 1, 5 }
      local z = ops.affine(x, 3)
      local y = half(z)
      for k = 1, others do y = y + ops.affine(z, 10 ^ k) end -- made later, so their gradients come first
      (y + ops.affine(z, 100)):sum():backward()
      y = half(x) -- a leaf's gradient is added up by the tape
      y:sum():backward()
      local sum = 100 + (others > 0 and 10 or 0) + (others > 1 and 100 or 0)
      assert.same({ { sum, sum }, "nothing" }, given)
      near({ 3 * (sum + 0.5) + 0.5, 3 * (sum + 0.5) + 0.5 }, x.grad)
    end
    given = {} -- one that comes later
    local x = leaf { 1, 5 }
    local z = ops.affine(x, 3)
    local part = ops.affine(z, 7)
    local y = half(z) + part
    y:sum():backward()
    assert.same({ "nothing" }, given)
    near({ 3 * 7.5, 3 * 7.5 }, x.grad)
  end)

  it("an input that wanted no gradient when it was used gets none", function()
    local x, w = leaf { 1, 2 }, leaf { 3, 4 }
    local part = ops.affine(w, 7)
    w.requires_grad = false
    local y = weighted("a", { 2, 3 })(x, w)
    w.requires_grad = true
    y = y + part
    y:sum():backward()
    near({ 2, 2 }, x.grad)
    near({ 7, 7 }, w.grad)
  end)
end)
