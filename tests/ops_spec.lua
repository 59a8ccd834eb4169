-- Every op: values against a float64 loop (tests/reference.lua), gradients against central differences of that loop,
-- the same bits twice and for any number of threads. What is wrong with a call is in errors_spec.lua; the quantizers'
-- ops are in quantizer_spec.lua.

local H = require "tests.helper"
local R = require "tests.reference"
local larger = require "tests.larger_cases"
local vx = H.vx
local core = require "vertex.core"
local ops = vx.ops
local direct = {} -- name of an op → its spec, where it has no gradient

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

--- `sampled`: check all elements (nil), or that many single ones and four random directions through all of them.
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
      for _ = 1, sampled and 4 or 0 do
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

  for number, op in ipairs(ops.registry) do
    local name = op.name
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
          if op.backward or op.composite then check_gradients(name, args, what, 700 + number, 8) end
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
    assert.same({ 0, 4, 4, 2 }, ops.conv2d(vx.zeros { 0, 4, 4, 3 }, vx.zeros { 3, 3, 3, 2 }):shape())
    assert.same({ 0, 3 }, ops.layer_norm(vx.zeros { 0, 3 }, vx.ones { 3 }, vx.zeros { 3 }):shape())
    assert.same({ 0, 3 }, ops.softmax(vx.zeros { 0, 3 }):shape())
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
    H.raises(function() ops.masked_fill(x, vx.zeros { 3 }, "0") end, "masked_fill: value is a string")
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
    H.raises(function() ops.cat(a, b) end, "cat: dim is a table, expected a number, as in vx.cat(1, a, b)")
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

-- -- Ops without a tape, and coverage ---------------------------------------------------------------------------------

local DTYPES = { "f32", "bf16", "i32", "u8" }

function direct.fill()
  for _, dtype in ipairs(DTYPES) do
    local x = vx.zeros({ 5, 7 }, { dtype = dtype })
    x:fill(3)
    for _, v in ipairs(H.flat(x)) do assert.equal(3, v) end
    x:narrow(2, 2, 3):fill(7) -- a strided view, and nothing beside it
    for i, row in ipairs(x:totable()) do assert.same({ 3, 7, 7, 7, 3, 3, 3 }, row, dtype .. " row " .. i) end
  end
  local large = vx.empty({ 40000 }):fill(-0.5)
  assert.equal(-20000, large:sum():item())
end

function direct.convert()
  local values = { 0, 1, 2, 127, 200, 255 }
  for _, from in ipairs(DTYPES) do
    for _, to in ipairs(DTYPES) do
      local x = vx.tensor(values, { dtype = from })
      local y = vx.empty({ 6 }, { dtype = to }):copy(x)
      assert.same(values, y:totable(), from .. " to " .. to)
    end
  end
  -- bf16 keeps 8 bits and rounds to even: 1 + 2^-8 lies between 1 and 1 + 2^-7
  local b = vx.tensor({ 1 + 2 ^ -8, 1 + 3 * 2 ^ -8, 1 + 2 ^ -8 + 2 ^ -12, -3.14159 }):to "bf16"
  assert.same({ 1, 1 + 2 ^ -6, 1 + 2 ^ -7, -3.140625 }, b:totable())
  -- integers: nearest, ties to even, saturated, NaN as 0
  local odd = vx.tensor { 1.9, -1.9, 0.4, 2.5, 3.5, 1e20, -1e20, 0 / 0, 300.2 }
  assert.same({ 2, -2, 0, 2, 4, 2147483647, -2147483648, 0, 300 }, odd:to("i32"):totable())
  assert.same({ 2, 0, 0, 2, 4, 255, 0, 0, 255 }, odd:to("u8"):totable())
  -- across strides on both sides
  local T = H.generator(9)
  for _, shape in ipairs { { 70, 130 }, { 3, 5 }, { 129, 2 } } do
    local x = T(shape, { grad = false })
    local y = vx.empty { shape[2], shape[1] }
    y:t():copy(x)
    assert.same(H.flat(x:t()), H.flat(y))
    local z = vx.zeros { shape[1], 2 * shape[2] }
    core.view(z, shape, { 2 * shape[2], 2 }, 1):copy(x)
    assert.equal(0, core.view(z, shape, { 2 * shape[2], 2 }, 0):abs():sum():item())
    assert.same(H.flat(x), H.flat(core.view(z, shape, { 2 * shape[2], 2 }, 1)))
  end
end

function direct.detach()
  local x = vx.tensor({ 1, 2 }, { requires_grad = true })
  local y = vx.detach(x * 1)
  assert.is_false(y.requires_grad)
  y:fill(5) -- the same memory, also under the new handle
  local z = x:detach()
  z:fill(7)
  assert.same({ { 5, 5 }, { 7, 7 } }, { y:totable(), x:totable() })
end

function direct.argmax()
  assert.same({ 1, 0, 2 }, ops.argmax(vx.tensor { { 1, 5, 5 }, { 7, 7, 7 }, { -3, -2, -1 } }):totable())
  local T = H.generator(3)
  for _, shape in ipairs { { 40, 17 }, { 3, 1 }, { 2, 2500 }, { 1000, 64 } } do
    local x = T(shape, { grad = false })
    local expected = {}
    for i, row in ipairs(x:totable()) do
      local best = 1
      for j = 2, #row do
        if row[j] > row[best] then best = j end
      end
      expected[i] = best - 1
    end
    local y = ops.argmax(x)
    assert.equal("i32", y:dtype())
    assert.same(expected, y:totable())
    -- small integers: many ties, the lowest index wins
    local coarse = vx.empty(shape):copy((x * 3):to "i32")
    for i, row in ipairs(coarse:totable()) do
      local best = 1
      for j = 2, #row do
        if row[j] > row[best] then best = j end
      end
      expected[i] = best - 1
    end
    assert.same(expected, ops.argmax(coarse):totable())
  end
  assert.same({ 2, 3 }, ops.argmax(vx.zeros { 2, 3, 4 }):shape())
  local bad = vx.zeros { 5, 3 }
  bad[4][2] = 0 / 0
  H.raises(function() ops.argmax(bad) end, "argmax", "row 3")
end

function direct.nonfinite()
  local x = vx.zeros { 300, 70 }
  assert.same({ 0 }, { ops.nonfinite(x) })
  x[271][70] = 1 / 0
  assert.same({ 1, 270 }, { ops.nonfinite(x) })
  x[18][1] = 0 / 0
  x[18][2] = -1 / 0
  assert.same({ 2, 17 }, { ops.nonfinite(x) })
  assert.same({ 0 }, { ops.nonfinite(vx.tensor { 3e38, -3e38, 1e-45 }) })
end

function direct.count_codes()
  local T = H.generator(4)
  local codes = T({ 3000, 2 }, { dtype = "i32", high = 8 })
  local expected = { {}, {} }
  for g = 1, 2 do
    for m = 1, 10 do expected[g][m] = 0 end
  end
  for _, row in ipairs(codes:totable()) do
    for g = 1, 2 do expected[g][row[g] + 1] = expected[g][row[g] + 1] + 1 end
  end
  local counts = ops.count_codes(codes, 10)
  assert.same(expected, counts:totable())
  ops.count_codes(codes, 10, counts)
  assert.equal(2 * expected[1][3], counts[1]:totable()[3])
  local large = T({ 20000, 1 }, { dtype = "i32", high = 999 })
  assert.equal(20000, ops.count_codes(large, 1000):to("f32"):sum():item())
  H.raises(function() ops.count_codes(codes, 5) end, "count_codes", "0 .. 4")
  local masked = vx.tensor({ { -1, 2 }, { 1, -1 }, { -1, -1 } }, { dtype = "i32" })
  assert.same({ { 0, 1, 0 }, { 0, 0, 1 } }, ops.count_codes(masked, 3):totable())
  H.raises(function() ops.count_codes(vx.tensor({ { -1 }, { -2 } }, { dtype = "i32" }), 3) end,
    "count_codes: code -2 at row 1 is outside 0 .. 2")
end

function direct.scatter_add()
  local T = H.generator(12)
  for _, s in ipairs { { 40, 7, 3 }, { 3000, 5, 17 }, { 0, 4, 2 } } do
    local tab, x = T({ s[2], s[3] }, { grad = false }), T({ s[1], s[3] }, { grad = false })
    local index = T({ s[1] }, { dtype = "i32", high = s[2] - 1 })
    local expected, rows, places = tab:totable(), x:totable(), index:totable()
    for n, m in ipairs(places) do
      for d = 1, s[3] do expected[m + 1][d] = expected[m + 1][d] + rows[n][d] end
    end
    assert.equal(tab, ops.scatter_add(tab, x, index))
    for m = 1, s[2] do H.close(tab[m]:totable(), expected[m], 1e-6, 1e-6 * math.max(1, s[1] / s[2])) end
  end
  H.raises(function() ops.scatter_add(vx.zeros { 3, 2 }, vx.ones { 1, 2 }, vx.tensor({ 3 }, { dtype = "i32" })) end,
    "scatter_add: ", "0 .. 2")
end

function direct.uniform()
  local x = vx.empty { 100003 }
  ops.uniform(x, -2, 3, vx.generator(7))
  local sum, square, low, high = 0, 0, math.huge, -math.huge
  local list = H.flat(x)
  for _, v in ipairs(list) do
    sum, square, low, high = sum + v, square + v * v, math.min(low, v), math.max(high, v)
  end
  local n = #list
  -- mean 0.5 with deviation 1.44 / sqrt(n) = 0.0046; 5 of those
  H.close({ sum / n }, { 0.5 }, 0, 0.023)
  H.close({ square / n - (sum / n) ^ 2 }, { 25 / 12 }, 0.02, 0)
  assert.is_true(low > -2 and high < 3)
  assert.is_true(low < -1.999 and high > 2.999)
  for _, e in ipairs { 0, 1, 2, 3, 4, 63, 64, 65, 4095, 4096, 70001, 100002 } do
    H.close({ list[e + 1] }, { -2 + 5 * R.unit(7, 1, e) }, 1e-6, 1e-6, "element " .. e)
  end
end

function direct.normal()
  local x = vx.empty { 100003 }
  local generator = vx.generator(2 ^ 40 + 5)
  ops.normal(x, 0, 1, generator)
  ops.normal(x, 1, 2, generator) -- the second stream
  local list, m = H.flat(x), { 0, 0, 0, 0 }
  for _, v in ipairs(list) do
    local z = (v - 1) / 2
    for k = 1, 4 do m[k] = m[k] + z ^ k / #list end
  end
  -- deviations of the sample moments: 0.0032, 0.0045, 0.012, 0.031; 5 of those
  H.close(m, { 0, 1, 0, 3 }, 0, 0.16)
  H.close({ m[1], m[2] }, { 0, 1 }, 0, 0.023)
  for _, e in ipairs { 0, 2, 64, 4098, 100000 } do
    local u, v = R.unit(2 ^ 40 + 5, 2, e), R.unit(2 ^ 40 + 5, 2, e + 1)
    local radius, angle = math.sqrt(-2 * math.log(u)), 2 * math.pi * v
    H.close({ list[e + 1], list[e + 2] }, { 1 + 2 * radius * math.cos(angle), 1 + 2 * radius * math.sin(angle) }, 1e-6,
      2e-6, "element " .. e)
  end
end

function direct.dirichlet()
  -- every coordinate is a Beta(a, s - a) variable: its mean a / s, its variance a (s - a) / (s^2 (s + 1)); E ln p =
  -- digamma(a) - digamma(s)
  local n = 40000
  for _, alpha in ipairs { { 0.2, 1, 3 }, { 30, 50 }, { 0.02, 0.03, 0.05, 0.1 } } do
    local m, s, p, l = #alpha, 0, vx.empty { n, #alpha }, vx.empty { n, #alpha }
    for _, a in ipairs(alpha) do s = s + a end
    ops.dirichlet(p, vx.tensor(alpha), false, vx.generator(5))
    ops.dirichlet(l, vx.tensor(alpha), true, vx.generator(5))
    H.close(H.flat(p), H.flat(l:exp()), 1e-5, 1e-30)
    H.close(H.flat(p:sum(2)), H.flat(vx.ones { n }), 3e-7, 0)
    local mean, square, log = p:mean(1):totable(), (p * p):mean(1):totable(), l:mean(1):totable()
    for i = 1, m do
      local a, var = alpha[i], alpha[i] * (s - alpha[i]) / (s * s * (s + 1))
      H.close({ mean[i] }, { a / s }, 0, 5 * math.sqrt(var / n), "mean")
      H.close({ square[i] - mean[i] ^ 2 }, { var }, 0.1, 0, "variance")
      local log_var = core.trigamma(a) - core.trigamma(s)
      H.close({ log[i] }, { core.digamma(a) - core.digamma(s) }, 0, 5 * math.sqrt(log_var / n), "mean of the logarithm")
    end
  end
  -- far below 1 a gamma variable is 0 in floating point; a row is none the less a point, at a vertex, each vertex in
  -- turn
  local p = vx.empty { 3000, 3 }
  ops.dirichlet(p, vx.tensor { 1e-3, 1e-3, 1e-3 }, false, vx.generator(6))
  H.close(H.flat(p:sum(2)), H.flat(vx.ones { 3000 }), 3e-7, 0)
  assert.is_true(ops.mean(ops.max(p, 2)):item() > 0.99)
  for _, mean in ipairs(p:mean(1):totable()) do H.close({ mean }, { 1 / 3 }, 0, 0.045) end
  -- one row of concentrations each
  local own = vx.empty { 2, 2 }
  ops.dirichlet(own, vx.tensor { { 1e6, 1 }, { 1, 1e6 } }, false, vx.generator(7))
  assert.is_true(own[1][1]:item() > 0.999 and own[2][2]:item() > 0.999)
  for _, bad in ipairs { 0, -1, 0 / 0, 1 / 0 } do
    local before = p:bytes()
    H.raises(function() ops.dirichlet(p, vx.tensor { 1, bad, 1 }) end, "dirichlet: ", "concentration 1", "positive")
    assert.equal(before, p:bytes())
  end
  H.raises(function() ops.dirichlet(p, vx.tensor { 1, 1 }) end, "dirichlet: ", "(3000,3)", "(2)")
end

function direct.kmeans_start()
  local T = H.generator(31)
  for _, case in ipairs { { 1, 3, 1 }, { 5, 2, 5 }, { 700, 3, 40 }, { 300, 17, 9 }, { 40, 1, 60 } } do
    local x = T({ case[1], case[2] }, { dtype = "i32", low = -9, high = 9 }):to "f32" -- every distance exact
    local generator = vx.generator(case[1])
    local index = ops.kmeans_start(x, case[3], generator):totable()
    assert.same(R.kmeans_start(R.from(x), case[3], case[1], 1), index)
  end
  local x = vx.tensor { { 1e6, 0 }, { 1e6 + 1, 0 }, { 1e6 + 2, 0 } } -- far from the origin no difference is lost
  local index = ops.kmeans_start(x, 3, vx.generator(5)):totable()
  table.sort(index)
  assert.same({ 0, 1, 2 }, index)
  H.raises(function() ops.kmeans_start(vx.tensor { { 1 }, { 0 / 0 } }, 1) end, "kmeans_start: row 1 of x holds a NaN")
  H.raises(function() ops.kmeans_start(vx.tensor { { 1e30 }, { -1e30 } }, 2) end, "kmeans_start: ", "overflow")
  H.raises(function() ops.kmeans_start(vx.zeros { 2, 2 }, 0) end, "kmeans_start: count is 0")
end

function direct.permutation()
  for _, n in ipairs { 0, 1, 2, 3, 64, 1000, 30011 } do
    local p = ops.permutation(n, vx.generator(n)):totable()
    assert.equal(n, #p)
    local seen = {}
    for _, v in ipairs(p) do
      assert.is_true(v >= 0 and v < n and not seen[v])
      seen[v] = true
    end
  end
  -- each of the 6 orders of 3 comes up 1000 times of 6000, deviation 29
  local counts, generator = {}, vx.generator(11)
  for _ = 1, 6000 do
    vx.step(function()
      local key = table.concat(ops.permutation(3, generator):totable())
      counts[key] = (counts[key] or 0) + 1
    end)
  end
  for _, key in ipairs { "012", "021", "102", "120", "201", "210" } do
    assert.is_true(math.abs(counts[key] - 1000) < 150)
  end
end

function direct.adamw()
  local tuples, expected, T = H.adamw_tuples "cpu", {}, H.generator(22)
  for i, t in ipairs(tuples) do
    expected[i] = { H.flat(t[1]), H.flat(t[2]:zero()), H.flat(t[3]:zero()) }
  end
  local lr, b1, b2, eps = 0.01, 0.9, 0.99, 1e-8
  for step = 1, 5 do
    for i, t in ipairs(tuples) do
      t[4]:copy(T({ t[1]:numel() }, { grad = false }))
      local p, m, v = unpack(expected[i])
      for j, g in ipairs(H.flat(t[4])) do
        p[j] = p[j] - lr * t[5] * p[j]
        m[j] = b1 * m[j] + (1 - b1) * g
        v[j] = b2 * v[j] + (1 - b2) * g * g
        p[j] = p[j] - lr * (m[j] / (1 - b1 ^ step)) / (math.sqrt(v[j] / (1 - b2 ^ step)) + eps)
      end
    end
    H.adamw(tuples, lr, b1, b2, eps, step)
  end
  for i, t in ipairs(tuples) do
    -- the constants travel as float32: 1 - 0.99 has 4e-6 of relative error then
    H.close(H.flat(t[1]), expected[i][1], 2e-6, 2e-6, "p of tensor " .. i)
    H.close(H.flat(t[2]), expected[i][2], 2e-6, 2e-6, "m of tensor " .. i)
    H.close(H.flat(t[3]), expected[i][3], 1e-5, 1e-7, "v of tensor " .. i)
  end
  H.adamw({}, lr, b1, b2, eps, 1) -- no tensors, no work
end

function direct.assign()
  local T = H.generator(5)
  for _, metric in ipairs { "euclid", "cosine" } do
    for _, s in ipairs { { 40, 1, 6, 11 }, { 130, 2, 3, 70 }, { 33, 1, 32, 1 }, { 1, 3, 17, 65 },
      { 300, 1, 64, 130 } } do
      local z, book = T({ s[1], s[2], s[3] }, { grad = false }), T({ s[2], s[4], s[3] }, { grad = false })
      local codes = ops.assign(z, book, metric)
      assert.same(R.list(R.assign(R.from(z), R.from(book), metric)), H.flat(codes),
        metric .. " " .. table.concat(s, "x"))
    end
  end
  -- small integers are exact in float32, so that ties are ties: the lowest index wins
  local z, book = vx.empty { 500, 1, 4 }, vx.empty { 1, 90, 4 }
  z:copy(T({ 500, 1, 4 }, { dtype = "i32", low = -2, high = 2 }))
  book:copy(T({ 1, 90, 4 }, { dtype = "i32", low = -2, high = 2 }))
  assert.same(R.list(R.assign(R.from(z), R.from(book), "euclid")), H.flat(ops.assign(z, book, "euclid")))
  -- every code twice, and once more far behind
  local twice = ops.cat(2, book, book, book)
  assert.same(H.flat(ops.assign(z, book, "euclid")), H.flat(ops.assign(z, twice, "euclid")))
end

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
