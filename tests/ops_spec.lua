-- Every op: values against a float64 loop (tests/reference.lua), gradients against central differences of that loop,
-- the same bits twice and for any number of threads. What is wrong with a call is in errors_spec.lua; the quantizers'
-- ops are in quantizer_spec.lua.

local H = require "tests.helper"
local R = require "tests.reference"
local larger = require "tests.larger_cases"
local vx = H.vx
local core = require "vertex.core"
local ops = vx.ops
local direct = require "tests.ops_without_gradients" -- name of an op → its spec

-- -- Machinery --------------------------------------------------------------------------------------------------------

local function count(args) -- arguments up to the last one given, since some in between are nil
  local n = 0
  for i in pairs(args) do n = math.max(n, i) end
  return n
end

local function call(f, args) return f(unpack(args, 1, count(args))) end

--- The arguments with tensors as float64 arrays.
local function as_arrays(args)
  local t = {}
  for i, x in pairs(args) do t[i] = vx.is_tensor(x) and R.from(x) or x end
  return t
end

local function largest(list)
  local m = 0
  for i = 1, #list do m = math.max(m, math.abs(list[i])) end
  return m
end

--- A fixed cotangent for an array, and the tensor of the same numbers (rounded to float32 once, for both).
local function cotangent(shape, seed)
  local t = H.generator(seed)(shape, { grad = false })
  return t, R.from(t)
end

local function clear(args)
  for _, x in pairs(args) do
    if vx.is_tensor(x) then x.grad = nil end
  end
end

--- Forward and backward; every result as bytes.
local function run(name, args, seed)
  clear(args)
  local results = {}
  vx.step(function()
    local y = call(ops[name], args)
    results[1] = y:bytes()
    if y.requires_grad then
      y:backward((cotangent(y:shape(), seed)))
      for i = 1, count(args) do
        if vx.is_tensor(args[i]) and args[i].grad then results[#results + 1] = args[i].grad:bytes() end
      end
    end
  end)
  return results
end

-- Float32 rounds to 6e-8 relative; a chain of a few operations, or a sum in the kernels' order, stays within 16 of
-- those of the largest value around.
local VALUE = 1e-6

local function check_values(name, args, what, tolerance)
  tolerance = tolerance or VALUE
  local y, expected
  vx.step(function()
    local t = call(ops[name], args)
    expected = call(R.ops[name], as_arrays(args))
    assert.same(expected.shape, t:shape(), what)
    y = H.flat(t)
  end)
  local list = R.list(expected)
  H.close(y, list, tolerance, tolerance * math.max(1, largest(list)), what)
end

-- Central differences in float64: with h = 1e-5 the truncation h^2 f'''/6 is about 1e-11 and the rounding 1e-16 / h
-- also, so what remains is the float32 of the gradient under test, whose sums cancel somewhat more than those of the
-- values.
local GRADIENT = 5e-6
local step_of = setmetatable({ topk = 1e-7, max = 1e-7, min = 1e-7, maximum = 1e-7, minimum = 1e-7, vertex_knn = 1e-7,
  knn = 1e-7 },
  { __index = function() return 1e-5 end }) -- smooth but for kinks, which a smaller step meets less often

--- `sampled`: check all elements (nil), or that many single ones and two random directions through all of them.
local function check_gradients(name, args, what, seed, sampled, tolerance)
  tolerance = tolerance or GRADIENT
  local STEP = step_of[name]
  clear(args)
  local cot
  vx.step(function()
    local y = call(ops[name], args)
    local t
    t, cot = cotangent(y:shape(), seed)
    y:backward(t)
  end)
  local arrays, random = as_arrays(args), H.random(seed)
  local function projected()
    local y, sum = call(R.ops[name], arrays), 0
    for i = 0, y.n - 1 do sum = sum + y.v[i] * cot.v[i] end
    return sum
  end
  local function moved(a, direction) -- slope along direction, a list {position, step, position, step, ...}
    local before = {}
    for i = 1, #direction, 2 do before[i] = a.v[direction[i]] end
    for i = 1, #direction, 2 do a.v[direction[i]] = before[i] + STEP * direction[i + 1] end
    local high = projected()
    for i = 1, #direction, 2 do a.v[direction[i]] = before[i] - STEP * direction[i + 1] end
    local low = projected()
    for i = 1, #direction, 2 do a.v[direction[i]] = before[i] end
    return (high - low) / (2 * STEP)
  end
  for i = 1, count(args) do
    local x = args[i]
    if vx.is_tensor(x) and x.requires_grad then
      assert.is_truthy(x.grad, what .. ": no gradient for argument " .. i)
      assert.same(x:shape(), x.grad:shape(), what)
      local g, numeric, mine, list = H.flat(x.grad), {}, {}, {}
      if not sampled then
        for p = 0, #g - 1 do list[#list + 1] = p end
      else
        list = { 0, #g - 1 }
        for _ = 1, sampled do list[#list + 1] = random:integer(0, #g - 1) end
      end
      for _, p in ipairs(list) do
        mine[#mine + 1] = g[p + 1]
        numeric[#numeric + 1] = moved(arrays[i], { p, 1 })
      end
      local size = math.max(1, largest(g))
      H.close(mine, numeric, tolerance, tolerance * size, what .. ": gradient of argument " .. i)
      for _ = 1, sampled and 2 or 0 do
        -- signs +-1: the error of n rounded elements adds up like sqrt(n)
        local direction, slope = {}, 0
        for p = 0, #g - 1 do
          local sign = random:uniform() < 0.5 and -1 or 1
          direction[2 * p + 1], direction[2 * p + 2] = p, sign
          slope = slope + sign * g[p + 1]
        end
        local expected = moved(arrays[i], direction)
        H.close({ slope }, { expected }, tolerance, tolerance * size * math.sqrt(#g),
          what .. ": slope of argument " .. i)
      end
    end
  end
end

local function check_bits(name, args, seed)
  H.same_bits(function() return run(name, args, seed) end)
  H.same_bits(function() return H.with_threads(1, run, name, args, seed) end,
    function() return H.with_threads(2, run, name, args, seed) end)
end

-- -- The specs --------------------------------------------------------------------------------------------------------

describe("ops", function()
  it("have a float64 reference each, and cases", function()
    for _, op in ipairs(ops.registry) do
      if op.backward or op.composite or op.cases then
        assert.is_function(R.ops[op.name], "no reference for " .. op.name)
        if not op.name:match "^quantize" then assert.is_function(op.cases, "no cases for " .. op.name) end
      else
        assert.is_function(direct[op.name], "no spec of " .. op.name)
      end
    end
  end)

  it("call in C what their records say, and what sums and gradients are made of", function()
    local anywhere = { fill = true, convert = true, binary = true, unary = true, reduce = true }
    local called
    local before = {}
    finally(function()
      for name, f in pairs(before) do core.op[name] = f end
    end)
    for _, entry in ipairs(core.op_list()) do
      local name, f = entry.name, core.op[entry.name]
      before[name] = f
      core.op[name] = function(...)
        called[name] = true
        return f(...)
      end
    end
    for _, op in ipairs(ops.registry) do
      local number = H.number_of(op.name)
      if op.cases then
        called = {}
        for _, args in ipairs(op.cases(H.generator(number))) do run(op.name, args, number) end
        local declared = {}
        for _, name in ipairs(op.calls) do
          declared[name] = true
          assert.is_true(called[name] or op.name == "scatter_add", op.name .. " does not call " .. name) -- rows: above
        end
        for name in pairs(called) do
          assert.is_true(declared[name] or anywhere[name], op.name .. " calls " .. name .. " unsaid")
        end
      end
    end
  end)

  it("are refused where their records leave something unsaid", function()
    local define = require("vertex.ops.record").define
    local whole = { text = "Does.", args = { { "x", "tensor f32" } }, returns = "x", raises = "never", calls = {},
      forward = function(_, x) return x end }
    for field in pairs(whole) do
      local record = {}
      for key, value in pairs(whole) do record[key] = key ~= field and value or nil end
      local _, message = pcall(define, "half_said", record)
      assert.truthy(tostring(message):find("op half_said: its record needs the field '" .. field .. "'", 1, true))
    end
    local record = {}
    for key, value in pairs(whole) do record[key] = value end
    record.args = { { "x" } }
    local _, message = pcall(define, "half_said", record)
    assert.truthy(tostring(message):find("op half_said: argument 1 needs a name and what it is", 1, true))
    record.args, record.calls = {}, { "nonsense" }
    _, message = pcall(define, "half_said", record)
    assert.truthy(tostring(message):find("lacks the op 'nonsense'", 1, true))
    assert.is_nil(ops.half_said)
    assert.is_nil(ops.registry.half_said)
  end)

  for _, op in ipairs(ops.registry) do
    local name = op.name
    local number = H.number_of(name)
    if op.cases then
      it(name .. ": values are those of a float64 loop", function()
        for i, args in ipairs(op.cases(H.generator(100 + number))) do
          check_values(name, args, name .. " case " .. i)
        end
      end)
      if op.backward or op.composite then it(name .. ": gradients are central differences", function()
        for i, args in ipairs(op.cases(H.generator(200 + number))) do
          check_gradients(name, args, name .. " case " .. i, 300 + number)
        end
      end) end
      it(name .. ": the same bits twice, on one thread and on two", function()
        for _, args in ipairs(op.cases(H.generator(400 + number))) do check_bits(name, args, 500 + number) end
      end)
    end
    if larger[name] then
      it(name .. ": values, gradients and bits at larger sizes", function()
        for i, args in ipairs(larger[name](H.generator(600 + number))) do
          local what = name .. " larger case " .. i
          check_values(name, args, what)
          if op.backward or op.composite then check_gradients(name, args, what, 700 + number, 4) end
          check_bits(name, args, 800 + number)
        end
      end)
    end
  end

  it("take strided views as they are", function()
    local T = H.generator(1)
    local a, b = T { 33, 20 }, T { 33, 20 }
    local at, bt = a:t(), b:narrow(1, 5, 20)
    local function list(x) return R.list(x) end
    local ra, rb = R.ops.transpose(R.from(a), 1, 2), R.ops.narrow(R.from(b), 1, 5, 20)
    H.close(H.flat(at:exp()), list(R.ops.exp(ra)), VALUE, 0)
    H.close(H.flat(ops.add(at, ops.transpose(b, 1, 2))), list(R.ops.add(ra, R.ops.transpose(R.from(b), 1, 2))), VALUE,
      VALUE)
    H.close(H.flat(at:sum(1)), list(R.ops.sum(ra, 1)), VALUE, VALUE * 5)
    H.close(H.flat(ops.softmax(at)), list(R.ops.softmax(ra)), VALUE, VALUE)
    H.close(H.flat(ops.matmul(at, a)), list(R.ops.matmul(ra, R.from(a))), VALUE, VALUE * 10)
    H.close(H.flat(ops.matmul(a, at)), list(R.ops.matmul(R.from(a), ra)), VALUE, VALUE * 10)
    H.close(H.flat(ops.matmul(bt, ops.transpose(bt, 1, 2))), list(R.ops.matmul(rb, R.ops.transpose(rb, 1, 2))), VALUE,
      VALUE * 10)
    H.close(H.flat(ops.matmul(a:narrow(2, 3, 7), b:narrow(2, 4, 7):t())),
      list(R.ops.matmul(R.ops.narrow(R.from(a), 2, 3, 7), R.ops.transpose(R.ops.narrow(R.from(b), 2, 4, 7), 1, 2))),
        VALUE, VALUE * 10)
    assert.same(list(R.ops.reshape(ra, { 660 })), H.flat(at:reshape { -1 }))
  end)

  it("multiply operands with gaps in both strides, and batches of one", function()
    local T = H.generator(2)
    local x, y = T { 6, 5, 4 }, T { 1, 4, 3 }
    local every_other = core.view(x, { 3, 5, 2 }, { 40, 4, 2 }, 0)
    local r = R.from(every_other)
    local w = T { 2, 3 }
    H.close(H.flat(ops.matmul(every_other, w)), R.list(R.ops.matmul(r, R.from(w))), VALUE, VALUE)
    H.close(H.flat(ops.matmul(x, y)), R.list(R.ops.matmul(R.from(x), R.from(y))), VALUE, VALUE)
    check_gradients("matmul", { x, y }, "batch of one", 3)
    check_gradients("matmul", { T { 1, 3, 4 }, T { 5, 4, 2 } }, "batch of one on the left", 3)
  end)

  it("act on empty tensors", function()
    assert.same({ 0, 4 }, vx.zeros({ 0, 4 }):exp():shape())
    assert.same({ 0, 4 }, (vx.zeros { 0, 4 } + vx.zeros { 4 }):shape())
    assert.same({ 0, 5 }, ops.matmul(vx.zeros { 0, 4 }, vx.zeros { 4, 5 }):shape())
    assert.same({ { 0, 0 }, { 0, 0 } }, ops.matmul(vx.zeros { 2, 0 }, vx.zeros { 0, 2 }):totable())
    assert.same({ 0, 0, 0 }, vx.zeros({ 0, 3 }):sum(1):totable())
    assert.same({ 0, 3 }, ops.gather(vx.zeros { 5, 3 }, vx.zeros({ 0 }, { dtype = "i32" })):shape())
    assert.same({ 0, 4, 4, 2 }, ops.conv3x3(vx.zeros { 0, 4, 4, 3 }, vx.zeros { 3, 3, 3, 2 }):shape())
    assert.same({ 0, 2, 1, 5 }, ops.conv2d(vx.zeros { 0, 4, 2, 3 }, vx.zeros { 5, 3, 3, 2 }):shape())
    local kernels = vx.ones({ 5, 3, 2, 2 }, { requires_grad = true })
    ops.sum(ops.conv2d(vx.zeros({ 0, 4, 4, 3 }, { requires_grad = true }), kernels)):backward()
    assert.equal(0, kernels.grad:abs():sum():item())
    assert.same({ 0, 2, 2, 3 }, ops.max_pool2d(vx.zeros { 0, 4, 4, 3 }, 2):shape())
    assert.same({ 0, 2, 2, 3 }, ops.avg_pool2d(vx.zeros { 0, 4, 4, 3 }, 2):shape())
    assert.same({ 0, 2, 5 }, ops.conv1d(vx.zeros { 0, 4, 3 }, vx.zeros { 5, 3, 3 }):shape())
    local filters = vx.ones({ 5, 3, 3 }, { requires_grad = true })
    ops.sum(ops.conv1d(vx.zeros({ 0, 4, 3 }, { requires_grad = true }), filters)):backward()
    assert.equal(0, filters.grad:abs():sum():item())
    assert.same({ 0, 3 }, ops.layer_norm(vx.zeros { 0, 3 }, vx.ones { 3 }, vx.zeros { 3 }):shape())
    assert.same({ 0, 3 }, ops.softmax(vx.zeros { 0, 3 }):shape())
  end)

  it("max_pool2d takes a NaN for the largest, and sends the gradient to the first of equals", function()
    for _, device in ipairs { "cpu", "emu:0" } do
      local x = vx.tensor({ { { { 1 }, { 0 / 0 } }, { { 3 }, { 2 } } }, { { { 5 }, { 7 } }, { { 7 }, { 7 } } } },
        { device = device, requires_grad = true })
      local y = ops.max_pool2d(x, 2)
      local best = H.flat(y)
      assert.is_true(best[1] ~= best[1])
      assert.equal(7, best[2])
      y:backward(vx.ones({ 2, 1, 1, 1 }, { device = device }))
      assert.same({ 0, 1, 0, 0, 0, 1, 0, 0 }, H.flat(x.grad))
      x = vx.full({ 1, 2, 2, 1 }, -1 / 0, { device = device })
      assert.equal(-1 / 0, ops.max_pool2d(x, 2):item())
    end
  end)

  it("compare with 0 and 1, broadcast", function()
    local a, b = vx.tensor { { 1, 2, 3 }, { 3, 2, 1 } }, vx.tensor { 2, 2, 3 }
    for _, name in ipairs { "eq", "lt", "le" } do
      local y = ops[name](a, b)
      assert.same(R.list(R.ops[name](R.from(a), R.from(b))), H.flat(y))
      assert.is_false(y.requires_grad)
    end
    local nan = vx.tensor { 0 / 0 }
    assert.same({ { 0 }, { 0 }, { 0 } }, { ops.eq(nan, nan):totable(), ops.lt(nan, nan):totable(),
      ops.le(nan, nan):totable() })
  end)

  it("choose with where, and let nothing of the other operand through", function()
    local nan = vx.tensor { 1, 0 / 0, 3, 0 / 0 }
    nan.requires_grad = true
    local good = vx.tensor({ 5, 6, 7, 8 }, { requires_grad = true })
    local is_nan = ops.ne(nan, nan)
    assert.same({ 0, 1, 0, 1 }, is_nan:totable())
    local y = ops.where(is_nan, good, nan)
    assert.same({ 1, 6, 3, 8 }, y:totable())
    ops.sum(y * y):backward()
    assert.same({ { 2, 0, 6, 0 }, { 0, 12, 0, 16 } }, { nan.grad:totable(), good.grad:totable() })
    assert.same({ 1, 0, 3, 0 }, ops.masked_fill(nan, is_nan, 0):totable())
    assert.same({ { 1, 2 }, { 1, 9 } }, ops.where(vx.tensor({ { 0, 1 }, { 0, 0 } }, { dtype = "u8" }),
      vx.tensor { { 7, 2 }, { 7, 7 } }, vx.tensor { 1, 9 }):totable())
    assert.same({ 4, -1 }, ops.where(vx.tensor({ 3, 0 }, { dtype = "i32" }), 4, vx.tensor { -1 }):totable())
    local x = vx.tensor({ 1, -2, 3 }, { requires_grad = true })
    ops.sum(ops.where(ops.gt(x, 0), x, 0)):backward() -- ReLU
    assert.same({ 1, 0, 1 }, x.grad:totable())
    H.raises(function() ops.where(x, 1, 2) end, "where: a is a number")
    H.raises(function() ops.where(vx.zeros { 2 }, x, 0) end, "where: ", "(2)", "(3)")
    H.raises(function() ops.masked_fill(x, vx.zeros { 3 }, "0") end, "masked_fill: value is '0', expected a number")
  end)

  it("round halves to even, and keep NaN", function()
    local x = vx.tensor { 0.5, 1.5, 2.5, -0.5, -1.5, 2.4999, 1e9 + 0.5, 8388609, 0 / 0, 1 / 0 }
    local function shown(y)
      local t = {}
      for i, v in ipairs(y:totable()) do t[i] = v == v and ("%.9g"):format(v) or "nan" end
      return table.concat(t, " ")
    end
    assert.equal("0 2 2 -0 -2 2 1e+09 8388609 nan inf", shown(ops.round(x)))
    assert.equal("0 1 2 -1 -2 2 1e+09 8388609 nan inf", shown(ops.floor(x)))
    assert.equal("1 1 1 -1 -1 1 1 1 nan 1", shown(ops.sign(x)))
    assert.equal("0", shown(ops.sign(vx.tensor { 0 })))
    local z = vx.tensor({ 0.3, -1.2 }, { requires_grad = true })
    ops.sum(ops.round(z) * ops.floor(z) * ops.sign(z)):backward()
    assert.same({ 0, 0 }, z.grad:totable())
  end)

  it("join tensors in every way of writing it", function()
    local a, b = vx.tensor({ { 1, 2 } }, { requires_grad = true }), vx.tensor { { 3, 4 } }
    for _, y in ipairs { ops.cat(1, a, b), ops.cat(1, { a, b }), ops.cat({ a, b }), ops.cat({ a, b }, 1),
      ops.cat({ a, b }, -2) } do
      assert.same({ { 1, 2 }, { 3, 4 } }, y:totable())
    end
    for _, y in ipairs { ops.stack(1, a, b), ops.stack({ a, b }), ops.stack(-3, { a, b }) } do
      assert.same({ { { 1, 2 } }, { { 3, 4 } } }, y:totable())
    end
    assert.same({ { { 1, 3 }, { 2, 4 } } }, ops.stack({ a, b }, 3):totable())
    ops.sum(ops.stack({ a, b, a }, 2)):backward()
    assert.same({ { 2, 2 } }, a.grad:totable())
    H.raises(function() ops.cat(1) end, "cat: no tensors")
    H.raises(function() ops.cat({}) end, "cat: no tensors")
    H.raises(function() ops.cat(a, b) end, "cat: dim is a tensor f32 (1,2), expected a dimension")
    H.raises(function() ops.stack({ a, vx.zeros { 2 } }) end, "stack: tensor 2 is (2) and the first (1,2)")
    H.raises(function() ops.stack({ a, b }, 4) end, "stack: dimension 4 of a result with 3")
  end)

  it("find the largest: ties to the lowest index, zeros of both signs alike", function()
    local x = vx.tensor { { 1, 5, 5, 2 }, { -0.0, 0, 0, -1 }, { -1 / 0, 3, 1 / 0, 3 } }
    local values, index = ops.topk(x, 3)
    assert.same({ { 5, 5, 2 }, { 0, 0, 0 }, { 1 / 0, 3, 3 } }, values:totable())
    assert.same({ { 1, 2, 3 }, { 0, 1, 2 }, { 2, 1, 3 } }, index:totable())
    values, index = x:topk(2, -1, { largest = false })
    assert.same({ { 1, 2 }, { -1, 0 }, { -1 / 0, 3 } }, values:totable())
    assert.same({ { 0, 3 }, { 3, 0 }, { 0, 1 } }, index:totable())
    local T = H.generator(31)
    for _, s in ipairs { { 3, 500, 7 }, { 40, 300, 65 }, { 2, 300, 300 }, { 5, 1, 1 } } do
      local coarse = vx.empty { s[1], s[2] }:copy(T({ s[1], s[2] }, { dtype = "i32", low = -9, high = 9 }))
      for _, options in ipairs { { largest = true }, { largest = false } } do
        local v, i = ops.topk(coarse, s[3], 2, options)
        local rv, ri = R.ops.topk(R.from(coarse), s[3], 2, options)
        assert.same({ R.list(rv), R.list(ri) }, { H.flat(v), H.flat(i) })
      end
    end
    local bad = vx.zeros { 5, 3 }
    bad[4][2] = 0 / 0
    H.raises(function() ops.topk(bad, 1) end, "topk: row 3 holds a NaN")
    H.raises(function() ops.topk(x, 5) end, "topk: k is 5, expected an integer from 1 to 4")
    H.raises(function() ops.topk(x, 1, 2, { bigest = true }) end, "topk: unknown option 'bigest'")
  end)

  it("choose and add along a dimension", function()
    local x, index = vx.zeros { 2, 3 }, vx.tensor({ { 0, 2 }, { 1, 1 } }, { dtype = "i32" })
    local src = vx.ones { 2, 2 }
    assert.same({ { 1, 0, 1 }, { 0, 2, 0 } }, x:scatter_add(2, index, src):totable())
    assert.same({ { 0, 0, 0 }, { 0, 0, 0 } }, x:totable())
    H.raises(function() ops.gather(x, 2, vx.tensor({ { 0 }, { 3 } }, { dtype = "i32" })) end,
      "gather_along: index 3 at row 1 is outside 0 .. 2")
    H.raises(function() ops.gather(x, 1, index) end, "gather: x (2,3) and index (2,2) disagree outside dimension 1")
    H.raises(function() ops.scatter_add(x, 2, index, vx.ones { 2, 1 }) end, "scatter_add: src (2,1) and index (2,2)")
    H.raises(function() ops.scatter_add(x, 3, index, src) end, "scatter_add: dimension 3 of a tensor (2,3)")
    H.raises(function() ops.one_hot(index, 2) end, "scatter_add_along: index 2 at row 1 is outside 0 .. 1")
  end)

  it("sum on and on in double", function()
    local x = vx.full({ 1000000 }, 0.1)
    local exact = vx.full({ 1 }, 0.1):item()
    local y = ops.cumsum(x, 1)
    for _, i in ipairs { 1, 1000, 999999, 1000000 } do H.close({ y[i]:item() }, { exact * i }, 6e-8, 0) end
    x:release()
  end)

  it("compare and compute with numbers", function()
    local x = vx.tensor({ 1, 2, 3 }, { requires_grad = true })
    assert.same({ 0, 1, 0 }, x:eq(2):totable())
    assert.same({ 1, 0, 1 }, x:ne(2):totable())
    assert.same({ 0, 0, 1 }, ops.gt(x, 2):totable())
    assert.same({ 1, 1, 0 }, ops.ge(2, x):totable())
    assert.same({ 2, 2, 3 }, x:maximum(2):totable())
    ops.sum(ops.mul(3, ops.maximum(x, 1.5))):backward()
    assert.same({ 0, 3, 3 }, x.grad:totable())
  end)

  it("do arithmetic with numbers on either side", function()
    local x = vx.tensor { 1, 2, 4 }
    for _, pair in ipairs {
      { x + 1, { 2, 3, 5 } }, { 1 + x, { 2, 3, 5 } }, { x - 1, { 0, 1, 3 } }, { 1 - x, { 0, -1, -3 } },
        { x * 3, { 3, 6, 12 } },
      { 3 * x, { 3, 6, 12 } }, { x / 2, { 0.5, 1, 2 } }, { 2 / x, { 2, 1, 0.5 } }, { -x, { -1, -2, -4 } },
        { x ^ 2, { 1, 4, 16 } }, { x + x, { 2, 4, 8 } },
      { x - x, { 0, 0, 0 } }, { x * x, { 1, 4, 16 } }, { x / x, { 1, 1, 1 } } } do
      H.close(pair[1]:totable(), pair[2], 1e-6, 0)
    end
  end)

  it("keep NaN and Inf visible", function()
    local x = vx.tensor { 1, 0 / 0, 1 / 0, -1 / 0 }
    local function shown(y)
      local t = {}
      for i, v in ipairs(H.flat(y)) do t[i] = tostring(v):gsub("%-nan", "nan") end
      return table.concat(t, " ")
    end
    assert.equal("2 nan inf -inf", shown(x + 1))
    assert.equal("1 nan inf 0", shown(ops.relu(x)))
    assert.equal("nan", shown(x:sum()))
    assert.equal("inf", shown(vx.tensor({ 1, 1 / 0 }):sum()))
    assert.equal("nan", shown(x:max()))
    assert.equal("nan", shown(x:min()))
    assert.equal("nan nan", shown(ops.softmax(vx.tensor { 0 / 0, 1 })))
    assert.equal("0 1", shown(ops.softmax(vx.tensor { -1 / 0, 1 })))
    assert.equal("inf 0", shown(ops.exp(vx.tensor { 100, -200 })))
    assert.equal("-inf nan", shown(ops.log(vx.tensor { 0, -1 })))
    local y = ops.matmul(vx.tensor { { 0 / 0, 1 }, { 1, 1 } }, vx.tensor { { 1, 1 }, { 1, 1 } })
    assert.equal("nan nan 2 2", shown(y))
  end)

  it("normalize rows far from zero", function()
    -- the mean 100 is kept as a float32, off by up to 4e-6, which is 1.3e-5 of the deviation 0.29
    local T = H.generator(4)
    local function far(shape) return T(shape, { low = 100, high = 101 }) end
    for name, args in pairs { group_norm = { far { 2, 100, 12 }, T { 12 }, T { 12 }, 3 },
      layer_norm = { far { 50, 40 }, T { 40 }, T { 40 } } } do
      check_values(name, args, name, 2e-5)
      check_gradients(name, args, name, 5, 8, 5e-5)
    end
  end)

  it("find neighbours: the rows themselves, ties to the lowest", function()
    local T = H.generator(11)
    local function rows(y) return H.flat(y) end
    local x, y = vx.empty { 200, 3 }, vx.empty { 150, 3 } -- small integers: every distance exact, many of them equal
    x:copy(T({ 200, 3 }, { dtype = "i32", low = -2, high = 2 }))
    y:copy(T({ 150, 3 }, { dtype = "i32", low = -2, high = 2 }))
    for _, k in ipairs { 1, 7, 40, 150 } do
      local distance, near = ops.knn(x, y, k)
      local d, n = R.ops.knn(R.from(x), R.from(y), k)
      assert.same(R.list(d), rows(distance))
      assert.same(R.list(n), rows(near))
    end
    local _, near = ops.knn(x, x, 5, true)
    assert.same(R.list((select(2, R.ops.knn(R.from(x), R.from(x), 5, true)))), rows(near))
    local p = x:abs() * 0.25 + 0.25
    for _, metric in ipairs { "ce", "l2" } do
      for _, k in ipairs { 1, 5, 33, 200 } do
        assert.same(R.list((select(2, R.ops.vertex_knn(R.from(p), k, metric)))),
          rows((select(2, ops.vertex_knn(p, k, metric)))))
      end
    end
    -- close to a vertex the distance keeps its relative precision: 1 - 2 p + |p|^2 in float32 would be 0
    local close = vx.tensor { { 1 - 2 ^ -20, 2 ^ -20 }, { 1 - 2 ^ -21, 2 ^ -21 } }
    H.close(H.flat((ops.vertex_knn(close, 1, "l2"))), { 2 ^ -41, 2 * (1 - 2 ^ -20) ^ 2 }, 1e-6, 0)
    H.close({ (ops.vertex_knn(vx.tensor { { 1, 0 } }, 1, "ce"))[2]:item() }, { 126 * math.log(2) }, 1e-6, 0)
  end)

  it("sum long rows to float32 rounding", function()
    -- a million copies of 0.1: adding them one by one in float32 would be off in the third digit
    local x = vx.full({ 1000000 }, 0.1)
    local exact = vx.full({ 1 }, 0.1):item() * 1e6
    H.close({ x:sum():item(), x:mean():item() }, { exact, exact / 1e6 }, 1.2e-7, 0)
    local columns = vx.full({ 300000, 3 }, 0.1):sum(1):totable()
    H.close(columns, { exact * 0.3, exact * 0.3, exact * 0.3 }, 1.2e-7, 0)
    x:release()
  end)
end)

-- -- Ops without gradients, and coverage ------------------------------------------------------------------------------

describe("ops without gradients", function()
  for name, check in pairs(direct) do it(name .. " does what ops.def says", check) end

  it("draw the numbers that the paper of Philox gives", function()
    -- known answers of Random123: philox4x32-10
    assert.same({ 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 }, R.philox({ 0, 0, 0, 0 }, { 0, 0 }))
    local f = 0xffffffff
    assert.same({ 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd }, R.philox({ f, f, f, f }, { f, f }))
    assert.same({ 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1 },
      R.philox({ 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344 }, { 0xa4093822, 0x299f31d0 }))
    -- the same from the library: seed and stream 0, element 0 of a tensor
    local x = vx.empty { 4 }
    core.op.uniform(x, 0, 0, 0, 1)
    local function unit(word) return (math.floor(word / 512) + 0.5) / 2 ^ 23 end
    H.close(x:totable(), { unit(0x6627e8d5), unit(0xe169c58d), unit(0xbc57ac4c), unit(0x9b00dbd8) }, 0, 6e-8)
  end)

  it("give the same bits on one thread and on two", function()
    local function all()
      local out = {}
      for _, n in ipairs { 3, 1000, 50001 } do
        local x = vx.empty { n }
        out[#out + 1] = ops.uniform(x, 0, 1, vx.generator(3)):bytes()
        out[#out + 1] = ops.normal(x, 0, 1, vx.generator(3)):bytes()
        out[#out + 1] = ops.permutation(n, vx.generator(3)):bytes()
        out[#out + 1] = ops.argmax(ops.reshape(x, { 1, n })):bytes()
        out[#out + 1] = ops.dirichlet(vx.empty { n, 3 }, vx.tensor { 0.1, 1, 5 }, false, vx.generator(3)):bytes()
      end
      local tuples = H.adamw_tuples "cpu"
      H.adamw(tuples, 0.1, 0.9, 0.99, 1e-8, 3)
      for _, t in ipairs(tuples) do
        for k = 1, 3 do out[#out + 1] = t[k]:bytes() end
      end
      local T = H.generator(6)
      out[#out + 1] = ops.assign(T { 999, 2, 8 }, T { 2, 100, 8 }, "cosine"):bytes()
      out[#out + 1] = ops.count_codes(T({ 30000, 2 }, { dtype = "i32", high = 70 }), 71):bytes()
      return out
    end
    H.same_bits(all)
    H.same_bits(function() return H.with_threads(1, all) end, function() return H.with_threads(2, all) end)
  end)

  it("adamw gives every tensor of a call the bits that it gets in a call of its own",
    function() H.check_adamw_lists "cpu" end)

  it("sepconv2d adds what x's gradient is so far", function() H.check_sepconv2d_addend "cpu" end)
  it("matmul takes and refuses matrices without rows, whose strides say nothing", function()
    local flipped = vx.no_grad(vx.transpose, vx.zeros { 1, 0, 3 }, 1, -1)
    for _, a in ipairs { vx.zeros { 3, 0, 1 }, flipped } do
      H.raises(function() vx.matmul(a, vx.zeros { 4, 5 }) end, "(3,0,1)", "(4,5)", "inner size")
      assert.same({ 3, 0, 2 }, vx.matmul(a, vx.zeros { 1, 2 }):shape())
    end
  end)
  it("one number normalized by itself has a gradient of 0", function() H.check_single_numbers "cpu" end)

  it("and those with: together they are all of ops.def", function()
    local callers = {}
    for _, op in ipairs(ops.registry) do
      for _, name in ipairs(op.calls) do callers[name] = op.name end
    end
    for _, op in ipairs(core.op_list()) do
      assert.is_true(direct[op.name] ~= nil or callers[op.name] ~= nil, "no spec runs " .. op.name)
      assert.is_true(#op.contract > 0)
    end
  end)
end)
