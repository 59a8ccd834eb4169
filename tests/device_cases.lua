-- What the specs of devices share: ops run on a device and on the CPU, cases of the ops whose records have none,
-- and data that ops refuse.

local assert = require "luassert"
local H = require "tests.helper"
local vx = H.vx
local core = require "vertex.core"
local ops, op = vx.ops, core.op

-- -- Machinery --------------------------------------------------------------------------------------------------------

local function largest(list)
  local m = 0
  for i = 1, #list do m = math.max(m, math.abs(list[i])) end
  return m
end

local function setenv(name, value) require("ffi").C.setenv(name, value, 1) end

--- Runs f with an environment variable set.
local function with(name, value, f)
  setenv(name, value)
  local ok, message = pcall(f)
  setenv(name, "")
  if not ok then error(message, 0) end
end

local function count(args)
  local n = 0
  for i in pairs(args) do n = math.max(n, i) end
  return n
end

--- Arguments like args, their tensors fresh copies on a device.
local function moved(args, device)
  local copies = {}
  for i, x in pairs(args) do
    copies[i] = x
    if vx.is_tensor(x) then
      copies[i] = vx.empty(x:shape(), { dtype = x:dtype(), device = device }):copy(x)
      copies[i].requires_grad = x.requires_grad
    end
  end
  return copies
end

--- Forward and backward of a recorded op on a device: all results, on the CPU.
local function run(name, args, device, seed)
  local results = {}
  vx.step(function()
    local here = moved(args, device)
    local y = ops[name](unpack(here, 1, count(here)))
    assert.equal(device, y:device())
    results[1] = core.keep(y:to("cpu"):to "f32")
    if y.requires_grad then
      y:backward(vx.empty(y:shape(), { device = device }):copy(H.generator(seed)(y:shape(), { grad = false })))
      for i = 1, count(here) do
        if vx.is_tensor(here[i]) and here[i].grad then results[#results + 1] = core.keep(here[i].grad:to "cpu") end
      end
    end
    vx.sync(device)
  end)
  return results
end

-- Both sides round to float32 (6e-8) at every step of a short chain, in another order, and their exp, log, erf and pow
-- differ by up to 4 units in the last place; ops_spec.lua holds the CPU to 1e-6 of the largest value around, so the two
-- may differ by a few times that.
local TOLERANCE = 4e-6

local function compare(got, expected, what, tolerance)
  tolerance = tolerance or TOLERANCE
  assert.equal(#expected, #got, what)
  for i = 1, #expected do
    assert.same(expected[i]:shape(), got[i]:shape(), what)
    assert.equal(expected[i]:dtype(), got[i]:dtype(), what)
    local a, b = H.flat(got[i]), H.flat(expected[i])
    if expected[i]:dtype() == "f32" then
      local finite = {}
      for _, v in ipairs(b) do
        if v == v and math.abs(v) < math.huge then finite[#finite + 1] = v end
      end
      H.close(a, b, tolerance, tolerance * math.max(1, largest(finite)), what .. ": result " .. i)
    else
      H.close(a, b, 0, 0, what .. ": result " .. i)
    end
  end
end

local function bytes(tensors)
  local list = {}
  for i, x in ipairs(tensors) do list[i] = x:bytes() end
  return list
end

-- -- Ops that no record calls, and those whose record has no cases: device → results on that device -------------------

local DTYPES = { "f32", "bf16", "i32", "u8" }
local direct, tolerances = {}, {}

local function upload(x, device) return vx.empty(x:shape(), { dtype = x:dtype(), device = device }):copy(x) end

local REALS = { 0, 1.5, -3.7, 300, 1e10, 0 / 0, 1 / 0, 3.14159265 }
local FILLED = { f32 = REALS, bf16 = REALS, i32 = { 0, -3, 2 ^ 31 - 1 }, u8 = { 0 } } -- and their negatives

function direct.fill(device)
  local results = {}
  for _, dtype in ipairs(DTYPES) do
    for _, value in ipairs(FILLED[dtype]) do
      local x = vx.empty({ 6, 7 }, { dtype = dtype, device = device }):fill(value)
      core.view(x, { 3, 3 }, { 14, 2 }, 1):fill(-value)
      results[#results + 1] = x
    end
    results[#results + 1] = vx.empty({ 5000 }, { dtype = dtype, device = device }):fill(7)
    results[#results + 1] = vx.empty({ 8, 12 }, { dtype = dtype, device = device }):fill(0):narrow(2, 5, 8):fill(9)
  end
  return results
end

function direct.convert(device)
  local results, T = {}, H.generator(1)
  local odd = vx.tensor { 0.5, 1.5, 2.5, -0.5, -1.5, 254.5, 255.5, 256, -1, 1e9, 3e9, -3e9, 2147483520, 0 / 0, 1 / 0,
    -1 / 0, 1e-40, 1.00390625, 1.01171875 }
  local whole = vx.tensor({ 0, 1, -1, 255, 256, 257, 65535, 16777217, -16777219, 2147483647, -2147483648, 33554433,
    33686017 }, { dtype = "i32" })
  local square = T({ 70, 40, 3 }, { grad = false, low = -300, high = 300 })
  for _, from in ipairs(DTYPES) do
    for _, to in ipairs(DTYPES) do
      for _, source in ipairs { odd, whole } do
        results[#results + 1] = upload(source, device):to(from):to(to)
      end
      local x = upload(square, device):to(from)
      local s = x:strides()
      for _, view in ipairs { { { 40, 70, 3 }, { s[2], s[1], s[3] } }, { { 3, 40, 70 }, { s[3], s[2], s[1] } },
        { { 70, 40 }, { s[1], s[2] } },
        { { 70, 3, 40 }, { s[1], s[3], s[2] } }, { { 35, 20, 3 }, { 2 * s[1], 2 * s[2], s[3] } },
          { { 2, 70, 40 }, { 0, s[1], s[2] } }, { { 8400 }, { 1 } } } do
        local v = core.view(x, view[1], view[2], 0)
        results[#results + 1] = vx.empty(view[1], { dtype = to, device = device }):copy(v)
        local target = vx.zeros({ 8400 * 2 }, { dtype = to, device = device }) -- a strided target
        local stride, n = {}, 2
        for i = #view[1], 1, -1 do
          stride[i] = n
          n = n * view[1][i]
        end
        core.view(target, view[1], stride, 1):copy(v)
        results[#results + 1] = target
      end
    end
  end
  return results
end

function direct.binary(device)
  local T, results = H.generator(2), {}
  local special = vx.tensor { 0 / 0, 1 / 0, -1 / 0, 0, 1, -2, 3, 1e-40 }
  local a, b = upload(special, device), upload(special, device)
  local shapes = { { { 8, 8 }, { 1, 0 }, { 0, 1 } }, { { 8 }, { 1 }, { 1 } } }
  for _, s in ipairs(shapes) do
    for kind = 0, 9 do
      local y = vx.empty(s[1], { device = device })
      op.binary(y, core.view(a, s[1], s[2], 0), core.view(b, s[1], s[3], 0), kind)
      results[#results + 1] = y
    end
  end
  local x, w = upload(T({ 33, 20 }, { grad = false }), device), upload(T({ 20, 33 }, { grad = false }), device)
  for _, pair in ipairs { { x, w:t() }, { x:narrow(2, 3, 8), x:narrow(2, 5, 8) },
    { x:narrow(2, 5, 8), x:narrow(2, 9, 8) }, { x:t(), w } } do
    results[#results + 1] = ops.sub(pair[1], pair[2])
  end
  return results
end

function direct.unary(device)
  local results = {}
  local special = upload(vx.tensor { 0 / 0, 1 / 0, -1 / 0, 0, 1, -2, 3, 1e-40, 100, -100, 0.25 }, device)
  for kind = 0, 15 do
    for _, x in ipairs { special, core.contiguous(special:narrow(1, 4, 4)), special:narrow(1, 2, 9) } do
      local y, dx = core.new_like(x), core.new_like(x)
      op.unary(y, x, kind, 0.5, 2)
      op.unary_backward(dx, x, x, y, kind, 0.5, 2)
      results[#results + 1], results[#results + 2] = y, dx
    end
  end
  return results
end

function direct.adamw(device)
  local tuples, results = H.adamw_tuples(device), {}
  for step = 1, 2 do H.adamw(tuples, 0.01, 0.9, 0.99, 1e-8, step) end
  for _, t in ipairs(tuples) do
    for k = 1, 4 do results[#results + 1] = t[k] end
  end
  return results
end

function direct.reduce(device)
  local T, results = H.generator(13), {}
  local x = upload(T({ 40, 36, 5 }, { grad = false }), device)
  local long = upload(T({ 3, 40004 }, { grad = false }), device)
  local function reduced(v, shape)
    for kind = 0, 3 do
      local y = vx.empty(shape, { device = device })
      op.reduce(y, v, kind)
      results[#results + 1] = y
    end
  end
  local s = x:strides()
  -- views: transposed, every second element, repeated by a stride of 0, off 16 bytes; every choice of dimensions
  for _, view in ipairs { { { 40, 36, 5 }, s, 0 }, { { 5, 36, 40 }, { s[3], s[2], s[1] }, 0 },
    { { 36, 40, 5 }, { s[2], s[1], s[3] }, 0 },
    { { 20, 18, 5 }, { 2 * s[1], 2 * s[2], s[3] }, 0 }, { { 40, 18, 2 }, { s[1], 2 * s[2], 2 }, 1 },
      { { 4, 36, 5 }, { 0, s[2], s[3] }, 1 },
    { { 36, 5, 4 }, { s[2], s[3], 0 }, 3 } } do
    local v = core.view(x, view[1], view[2], view[3])
    for choice = 0, 7 do
      local shape = {}
      for d = 1, 3 do shape[d] = math.floor(choice / 2 ^ (d - 1)) % 2 == 0 and 1 or view[1][d] end
      reduced(v, shape)
    end
  end
  reduced(long, { 3, 1 })
  reduced(long, { 1, 40004 })
  reduced(long, { 1, 1 })
  reduced(core.view(long, { 40004, 3 }, { 1, 40004 }, 0), { 1, 3 })
  reduced(core.view(long, { 3, 40000 }, { 40004, 1 }, 1), { 3, 1 })
  reduced(core.view(long, { 3, 2, 10000 }, { 40004, 20000, 2 }, 0), { 1, 2, 1 })
  reduced(vx.full({}, 3, { device = device }), {})
  local special = upload(vx.tensor { { 1, 0 / 0, 1 / 0 }, { 2, 3, -1 / 0 }, { 1 / 0, -1 / 0, 4 }, { 0, -0.0, -0.0 } },
    device)
  reduced(special, { 4, 1 })
  reduced(special, { 1, 3 })
  results[#results + 1] = ops.sum(vx.empty({ 0, 3 }, { device = device }), 1)
  return results
end

function direct.softmax(device)
  local T, results = H.generator(14), {}
  local special = vx.tensor { { 1, 0 / 0, 2 }, { 1 / 0, 0, 1 }, { -1 / 0, -1 / 0, -1 / 0 }, { -1 / 0, 3, 4 },
    { 3e38, -3e38, 3e38 }, { -90, 100, 0 } }
  for logarithm = 0, 1 do
    -- rows of a lane or several, of a warp, of a block, and longer than what a block keeps
    for _, x in ipairs { special, T({ 700, 3 }, { grad = false }), T({ 65, 30 }, { grad = false, high = 50 }),
      T({ 9, 500 }, { grad = false }),
      T({ 3, 513 }, { grad = false }), T({ 2, 8300 }, { grad = false }), T({ 2, 20000 }, { grad = false }) } do
      local here, g = upload(x, device), upload(T(x:shape(), { grad = false }), device)
      local y, dx = core.new_like(here), core.new_like(here)
      op.softmax(y, here, logarithm)
      op.softmax_backward(dx, g, y, logarithm)
      results[#results + 1], results[#results + 2] = y, dx
    end
  end
  return results
end

function direct.attention(device)
  local T, results = H.generator(19), {}
  local function run_on(shape, options, change)
    local x = {}
    for i = 1, 3 do -- off 16 bytes by the view, as elements of another tensor may be
      local n = shape[1] * shape[2] * shape[3] * shape[4]
      x[i] = T({ n + 1 }, { grad = false })
      if change then change(x[i], i) end
      local strides = { shape[2] * shape[3] * shape[4], shape[3] * shape[4], shape[4], 1 }
      x[i] = core.view(upload(x[i], device), shape, strides, i == 2 and 1 or 0)
      x[i].requires_grad = true
    end
    local y = ops.attention(x[1], x[2], x[3], options)
    y:backward(upload(T(shape, { grad = false }), device))
    for _, r in ipairs { y, x[1].grad, x[2].grad, x[3].grad } do results[#results + 1] = r end
  end
  local function noise(p) return { dropout = p, generator = { stream = function() return 3, 4 end } } end
  run_on({ 2, 131, 2, 8 }, noise(0.25))
  run_on({ 1, 70, 1, 100 }, noise(1))
  run_on({ 2, 66, 1, 36 }, { lengths = vx.tensor({ 0, 65 }, { dtype = "i32" }) })
  run_on({ 1, 9, 1, 4 }, nil, function(x, i) if i == 1 then x[6] = 0 / 0 end end)
  return results
end

function direct.nonfinite(device)
  local x, results = vx.zeros { 300, 70 }, {}
  for _, place in ipairs { { 271, 70, 1 / 0 }, { 18, 1, 0 / 0 }, { 18, 2, -1 / 0 }, { 1, 1, 0 / 0 } } do
    x[place[1]][place[2]] = place[3]
    results[#results + 1] = vx.empty({ 2 }, { dtype = "i32", device = device })
    op.nonfinite(results[#results], upload(x, device))
  end
  local long = vx.zeros { 2, 40000 }
  for _ = 1, 2 do
    results[#results + 1] = vx.empty({ 2 }, { dtype = "i32", device = device })
    op.nonfinite(results[#results], upload(long, device))
    long[2]:fill(0 / 0)
  end
  return results
end

function direct.argmax(device)
  local T, results = H.generator(3), {}
  for _, s in ipairs { { 1, 1 }, { 5, 3 }, { 300, 70 }, { 3, 5000 } } do
    local x = T(s, { grad = false })
    results[#results + 1] = ops.argmax(upload(x, device))
    local ties = vx.empty(s):copy(T(s, { dtype = "i32", high = 3 }))
    results[#results + 1] = ops.argmax(upload(ties, device))
  end
  results[#results + 1] = ops.argmax(vx.full({ 3, 40 }, -1 / 0, { device = device }))
  results[#results + 1] = ops.argmax(upload(vx.tensor { { -1, -0.0, 0 }, { 0, -0.0, -1 } }, device)) -- equal zeros
  return results
end

function direct.topk(device)
  local T, results = H.generator(31), {}
  local special = vx.tensor { { 1, 5, 5, 2 }, { -0.0, 0, 0, -1 }, { -1 / 0, 3, 1 / 0, 3 } }
  for _, case in ipairs { { special, 3 }, { T({ 40, 300 }, { dtype = "i32", low = -9, high = 9 }):to "f32", 65 },
    { T({ 3, 2000 }, { grad = false }), 7 }, { T({ 5, 1 }, { grad = false }), 1 } } do
    for _, from_above in ipairs { true, false } do
      local x = upload(case[1], device)
      results[#results + 1], results[#results + 2] = ops.topk(x, case[2], -1, { largest = from_above })
    end
  end
  return results
end

--- Columns that a thread has alone, and long ones that a block shares.
function direct.cumsum(device)
  local T, results = H.generator(32), {}
  for _, s in ipairs { { 1, 20001, 1 }, { 3, 300, 5 }, { 2, 40, 70 }, { 1, 255, 1 }, { 5000, 3, 1 }, { 1, 300, 4100 },
    { 2, 0, 3 } } do
    local x = upload(T(s, { grad = false }), device)
    for reverse = 0, 1 do
      local y = core.new_like(x)
      op.cumsum(y, x, reverse)
      results[#results + 1] = y
    end
  end
  return results
end

function direct.scatter_add(device)
  local T, results = H.generator(4), {}
  -- (rows, rows of the table, width): many short runs, a few long ones, one over many pieces of the sorted list
  for _, s in ipairs { { 900, 300, 64 }, { 1200, 7, 17 }, { 40, 1, 3 }, { 3, 500, 1 }, { 5000, 2, 40 }, { 64, 1, 2 },
    { 0, 4, 2 } } do
    local tab, x = T({ s[2], s[3] }, { grad = false }), T({ s[1], s[3] }, { grad = false })
    local index = T({ s[1] }, { dtype = "i32", high = s[2] - 1 })
    results[#results + 1] = upload(tab, device)
    op.scatter_add(results[#results], upload(x, device), upload(index, device))
  end
  return results
end

function direct.count_codes(device)
  local T = H.generator(5)
  local codes = upload(T({ 3000, 2 }, { dtype = "i32", high = 70 }), device)
  local counts = ops.count_codes(codes, 71)
  local masked = upload(T({ 3000, 2 }, { dtype = "i32", low = -1, high = 2 }), device)
  return { ops.count_codes(codes, 71), ops.count_codes(codes, 71, counts), ops.count_codes(masked, 3),
    ops.count_codes(upload(T({ 5, 1 }, { dtype = "i32", high = 0 }), device), 1) }
end

function direct.uniform(device)
  local results, generator = {}, vx.generator(2 ^ 40 + 5)
  for _, n in ipairs { 0, 1, 3, 4, 65, 20011 } do
    results[#results + 1] = ops.uniform(vx.empty({ n }, { device = device }), -2, 3, generator)
    results[#results + 1] = ops.uniform(vx.empty({ n }, { device = device }), 0, 1, generator)
  end
  return results
end

function direct.normal(device)
  local results, generator = {}, vx.generator(7)
  for _, n in ipairs { 0, 1, 3, 4, 65, 20011 } do
    results[#results + 1] = ops.normal(vx.empty({ n }, { device = device }), 1, 2, generator)
  end
  return results
end

function direct.dirichlet(device)
  local results, generator = {}, vx.generator(9)
  local rows = upload(vx.tensor { { 1e-3, 1e6 }, { 0.5, 2 }, { 1, 1 } }, device)
  for _, logarithms in ipairs { false, true } do
    results[#results + 1] = ops.dirichlet(vx.empty({ 300, 3 }, { device = device }),
      upload(vx.tensor { 0.1, 1, 50 }, device), logarithms, generator)
    results[#results + 1] = ops.dirichlet(vx.empty({ 5, 70 }, { device = device }),
      vx.full({ 70 }, 0.3, { device = device }), logarithms, generator)
    results[#results + 1] = ops.dirichlet(vx.empty({ 3, 2 }, { device = device }), rows, logarithms, generator)
    results[#results + 1] = ops.dirichlet(vx.empty({ 2, 3 }, { device = device }), rows:t(), logarithms, generator)
  end
  results[#results + 1] = ops.dirichlet(vx.empty({ 0, 2 }, { device = device }), vx.ones({ 2 }, { device = device }),
    false, generator)
  return results
end

--- Neighbours among rows of small whole numbers, where many are equally near, and gradients that meet in a few rows.
function direct.neighbours(device)
  local T, results = H.generator(11), {}
  for _, s in ipairs { { 150, 90, 2, 7 }, { 40, 300, 3, 40 }, { 5, 6, 1, 5 } } do
    local x, y = vx.empty { s[1], s[3] }:copy(T({ s[1], s[3] }, { dtype = "i32", low = 0, high = 2 })),
      vx.empty { s[2], s[3] }
    y:copy(T({ s[2], s[3] }, { dtype = "i32", low = 0, high = 2 }))
    x, y = upload(x, device), upload(y, device)
    x.requires_grad, y.requires_grad = true, true
    local distance, near = ops.knn(x, y, s[4])
    ops.sum(ops.mul(distance, upload(T(distance:shape(), { grad = false }), device))):backward()
    for _, r in ipairs { distance, near, x.grad, y.grad } do results[#results + 1] = r end
    local some = y:narrow(1, 1, math.min(100, s[2]))
    results[#results + 1], results[#results + 2] = ops.knn(some, some, s[4], true)
  end
  for _, metric in ipairs { "ce", "l2" } do
    for _, logarithms in ipairs { false, true } do
      for _, s in ipairs { { 300, 40, 5 }, { 700, 3, 64 }, { 9, 70, 9 }, { 20, 1, 1 } } do
        local p = vx.empty { s[1], s[2] }:copy(T({ s[1], s[2] }, { dtype = "i32", low = 0, high = 4 }))
        p = upload(logarithms and ops.affine(p, 0.5, -3) or ops.affine(p, 0.25), device)
        p.requires_grad = true
        local deviation, near = ops.vertex_knn(p, s[3], metric, logarithms)
        ops.sum(ops.mul(deviation, upload(T(deviation:shape(), { grad = false }), device))):backward()
        for _, r in ipairs { deviation, near, p.grad } do results[#results + 1] = r end
      end
    end
  end
  return results
end

function direct.span_mask(device)
  local results = {}
  for i, case in ipairs { { 1, 99 }, { 5, 300 }, { 3, 70, { 70, 9, 31 } }, { 2, 5 } } do
    local options = { device = device, lengths = case[3] and upload(vx.tensor(case[3], { dtype = "i32" }), device) }
    for _, x in ipairs { ops.span_mask(case[1], case[2], options, vx.generator(i)) } do results[#results + 1] = x end
    if i < 4 then
      results[#results + 1] = ops.distractors(results[#results - 1], case[2], 40, vx.generator(i))
    end
  end
  return results
end

--- Few targets, so that most distractors equal the positive, and rows of one lane and of several.
function direct.contrastive(device)
  local T, results = H.generator(33), {}
  for _, s in ipairs { { 60, 7, 30, 3 }, { 40, 100, 11, 40 }, { 5, 1, 9, 1 } } do
    local N, D, K, M = unpack(s)
    local book, y = T({ M, D }, { grad = false }), upload(T({ N, D }, { grad = false }), device)
    local q = upload(ops.gather(book, T({ N }, { dtype = "i32", high = M - 1 })), device)
    local distractors = upload(T({ N, K }, { dtype = "i32", high = N - 1 }), device)
    y.requires_grad, q.requires_grad = true, true
    local loss, each, logits, equal, hit = ops.contrastive_loss(y, q, distractors)
    loss:backward()
    for _, x in ipairs { loss, each, logits, equal, hit, y.grad, q.grad } do results[#results + 1] = x end
  end
  return results
end

function direct.permutation(device)
  local results = {}
  for _, n in ipairs { 0, 1, 2, 3, 64, 1000, 30011 } do
    results[#results + 1] = ops.permutation(n, vx.generator(n), { device = device })
  end
  return results
end

function direct.kmeans_start(device)
  local T, results = H.generator(8), {}
  for i, s in ipairs { { 5, 3, 5 }, { 300, 40, 20 }, { 1000, 2, 9 }, { 30, 1, 40 } } do -- integers: distances are exact
    local x = T({ s[1], s[2] }, { dtype = "i32", low = -9, high = 9 }):to "f32"
    results[i] = ops.kmeans_start(x:to(device), s[3], vx.generator(i))
  end
  return results
end

function direct.assign(device)
  local T, results = H.generator(6), {}
  for _, metric in ipairs { "euclid", "cosine" } do
    for _, s in ipairs { { 40, 1, 6, 11 }, { 130, 2, 3, 70 }, { 33, 1, 32, 1 }, { 1, 3, 17, 65 },
      { 300, 1, 64, 130 } } do
      local z, book = T({ s[1], s[2], s[3] }, { grad = false }), T({ s[2], s[4], s[3] }, { grad = false })
      results[#results + 1] = ops.assign(upload(z, device), upload(book, device), metric)
    end
    -- small integers: ties are ties, and go to the lowest index
    local z, book = vx.empty { 300, 1, 4 }, vx.empty { 1, 90, 4 }
    z:copy(T({ 300, 1, 4 }, { dtype = "i32", low = 1, high = 3 }))
    book:copy(T({ 1, 90, 4 }, { dtype = "i32", low = 1, high = 3 }))
    results[#results + 1] = ops.assign(upload(z, device), upload(book, device), metric)
  end
  return results
end

--- Forward and backward of a quantizer's op: outputs and gradients.
local function quantized(device, seed, N, G, M, D, quantize, ...)
  local T = H.generator(seed)
  local z, book = upload(T({ N, G, D }, { grad = false }), device), upload(T({ G, M, D }, { grad = false }), device)
  z.requires_grad, book.requires_grad = true, true
  local outputs = { quantize(z, book, ...) }
  local cotangent = upload(T({ N, G, D }, { grad = false }), device)
  ops.add(ops.sum(ops.mul(outputs[1], cotangent)), ops.sum(outputs[2])):backward()
  outputs[#outputs + 1], outputs[#outputs + 2] = z.grad, book.grad
  return outputs
end

function direct.hard(device)
  local results = {}
  for _, metric in ipairs { "euclid", "cosine" } do
    for _, estimator in ipairs { "ste", "rotation" } do
      for _, s in ipairs { { 70, 2, 11, 6 }, { 300, 1, 130, 32 }, { 400, 3, 2, 2 }, { 20, 1, 5, 150 } } do
        local options = { metric = metric, estimator = estimator, beta = 0.25, reduction = "sum", codebook_grad = true }
        for _, x in ipairs(quantized(device, 7, s[1], s[2], s[3], s[4], ops.quantize_hard, options)) do
          results[#results + 1] = x
        end
      end
    end
  end
  return results
end

function direct.smooth(device)
  local results = {}
  for _, sampler in ipairs { "softmax", "sgumbel", "hgumbel" } do
    for _, regularizer in ipairs { "none", "ppl", "knn-ce", "knn-l2" } do
      for _, s in ipairs { { 300, 1, 130, 3 }, { 140, 1, 70, 32 }, { 70, 2, 11, 6 } } do
        local log_tau = upload(vx.tensor { math.log(0.1) }, device)
        log_tau.requires_grad = true
        local options = { sampler = sampler, regularizer = regularizer, k = 4, gumbel_tau = 1, shards = 1, seed = 5,
          stream = 3 }
        for _, x in ipairs(quantized(device, 8, s[1], s[2], s[3], s[4], ops.quantize_smooth, log_tau, options)) do
          results[#results + 1] = x
        end
        results[#results + 1] = log_tau.grad
      end
    end
  end
  return results
end
-- regularizers and the gradient of log tau are sums that cancel (tests/golden/check.lua)
tolerances.hard, tolerances.smooth = 2e-5, 1e-4

-- Values that no kernel may meet: device → nothing; the error comes at the latest when the device is waited for, and
-- names the op and the row.
local faults = {
  span_mask = { "span_mask: ", "the length of row 1 is outside 0 .. 9", function(device)
    local function empty(shape, dtype) return vx.empty(shape, { dtype = dtype, device = device }) end
    op.span_mask(empty({ 2, 9 }, "u8"), empty({ 2, 9 }, "i32"), empty({ 2 }, "i32"),
      upload(vx.tensor({ 9, 10 }, { dtype = "i32" }), device), 0.65, 3, 2, 1, 1)
  end },
  distractors = { "distractors: ", "row 1 has one masked frame", function(device)
    ops.distractors(upload(vx.tensor({ 1, 2, 15 }, { dtype = "i32" }), device), 10, 3)
  end },
  contrastive = { "contrastive: ", "row 1, column 0 is outside 0 .. 2", function(device)
    ops.contrastive_loss(vx.ones({ 3, 2 }, { device = device }), vx.ones({ 3, 2 }, { device = device }),
      upload(vx.tensor({ { 0, 1 }, { 3, 0 }, { 1, -1 } }, { dtype = "i32" }), device))
  end },
  contrastive_backward = { "contrastive_backward: ", "row 2 of y holds a NaN or Inf", function(device)
    local y, q = vx.ones({ 3, 2 }, { device = device }), vx.ones({ 3, 2 }, { device = device })
    y:narrow(1, 3, 1):fill(0 / 0)
    op.contrastive_backward(core.new_like(y), core.new_like(q), vx.ones({ 1 }, { device = device }), y, q,
      vx.zeros({ 3, 1 }, { dtype = "i32", device = device }), vx.zeros({ 3, 2 }, { device = device }), 0.1)
  end },
  gather = { "gather: ", "row 3 is outside 0 .. 9", function(device)
    ops.gather(vx.zeros({ 10, 4 }, { device = device }), upload(vx.tensor({ 0, 9, 5, 10, 3, -1 }, { dtype = "i32" }),
      device))
  end },
  scatter_add = { "scatter_add: ", "row 1 is outside 0 .. 2", function(device)
    local index = upload(vx.tensor({ 0, -1, 5 }, { dtype = "i32" }), device)
    op.scatter_add(vx.zeros({ 3, 4 }, { device = device }), vx.zeros({ 3, 4 }, { device = device }),
      index)
  end },
  gather_along = { "gather_along: ", "row 1, column 0 is outside 0 .. 4", function(device)
    local index = upload(vx.tensor({ { 0, 1 }, { 5, 2 }, { -1, 0 } }, { dtype = "i32" }), device)
    ops.gather(vx.zeros({ 5, 2 }, { device = device }), 1, index)
  end },
  scatter_add_along = { "scatter_add_along: ", "row 2 is outside 0 .. 2", function(device)
    local index = upload(vx.tensor({ 0, 1, 3, -1 }, { dtype = "i32" }), device)
    ops.scatter_add(vx.zeros({ 3 }, { device = device }), 1, index, vx.ones({ 4 }, { device = device }))
  end },
  group_norm = { "group_norm: length of row 1 is outside 0 .. 4", "", function(device)
    ops.group_norm(vx.ones({ 3, 4, 2 }, { device = device }), vx.ones({ 2 }, { device = device }),
      vx.zeros({ 2 }, { device = device }), 2, nil, nil, upload(vx.tensor({ 4, 5, -1 }, { dtype = "i32" }), device))
  end },
  group_norm_backward = { "group_norm_backward: length of row 0 is outside 0 .. 4", "", function(device)
    local x, one, g = vx.ones({ 1, 4, 2 }, { device = device }), vx.ones({ 2 }, { device = device }),
      vx.ones({ 1, 2 }, { device = device })
    op.group_norm_backward(core.new_like(x), core.new_like(one), core.new_like(one), x, x, one, one, g, g,
      upload(vx.tensor({ -1 }, { dtype = "i32" }), device), 0)
  end },
  attention = { "attention: length of row 1 is outside 0 .. 5", "", function(device)
    local q = vx.ones({ 3, 5, 2, 4 }, { device = device })
    ops.attention(q, q, q, { lengths = upload(vx.tensor({ 5, 6, -1 }, { dtype = "i32" }), device) })
  end },
  topk = { "topk: ", "row 1 holds a NaN", function(device)
    ops.topk(upload(vx.tensor { { 1, 2 }, { 0 / 0, 3 }, { 0 / 0, 0 / 0 } }, device), 2)
  end },
  count_codes = { "count_codes: ", "row 1, column 0 is outside 0 .. 4", function(device)
    ops.count_codes(upload(vx.tensor({ { 0, 4 }, { 5, 7 }, { 9, 9 } }, { dtype = "i32" }), device), 5)
  end },
  argmax = { "argmax: ", "row 3 holds a NaN", function(device)
    local x = vx.zeros { 5, 3 }
    x[4][2], x[5][1] = 0 / 0, 0 / 0
    ops.argmax(upload(x, device))
  end },
  hard_forward = { "hard_forward: ", "row 1 has a code outside 0 .. 3 (group 1)", function(device)
    local z, book = vx.ones({ 3, 2, 5 }, { device = device }), vx.ones({ 2, 4, 5 }, { device = device })
    local codes = upload(vx.tensor({ { 0, 3 }, { 1, 4 }, { -1, 0 } }, { dtype = "i32" }), device)
    op.hard_forward(core.new_like(z), vx.empty({ 1 }, { device = device }), z, book, codes,
      1, 1, 0)
  end },
  hard_backward = { "hard_backward: ", "row 1 has a code outside 0 .. 3 (group 1)", function(device)
    local z, book, one = vx.ones({ 3, 2, 5 }, { device = device }), vx.ones({ 2, 4, 5 }, { device = device }),
      vx.ones({ 1 }, { device = device })
    local codes = upload(vx.tensor({ { 0, 3 }, { 1, 4 }, { -1, 0 } }, { dtype = "i32" }), device)
    op.hard_backward(core.new_like(z), core.new_like(book), z, one, z, book, codes, 1,
      1, 1, 0, 0)
  end },
  dirichlet = { "dirichlet: ", "row 1, concentration 2", function(device)
    ops.dirichlet(vx.empty({ 2, 3 }, { device = device }), upload(vx.tensor { { 1, 2, 3 }, { 1, 2, 0 } }, device))
  end },
  vertex_knn = { "vertex_knn: ", "row 1 of p holds a NaN or Inf", function(device)
    ops.vertex_knn(upload(vx.tensor { { 0.5, 0.5 }, { 0.5, 1 / 0 }, { 0 / 0, 1 } }, device), 2, "l2")
  end },
  knn = { "knn: ", "row 2 of y holds a NaN or Inf", function(device)
    ops.knn(vx.ones({ 3, 2 }, { device = device }), upload(vx.tensor { { 1, 2 }, { 3, 4 }, { 0 / 0, 1 } }, device), 2)
  end },
  vertex_knn_backward = { "vertex_knn_backward: ", "near (1,0) is no row of p, which has rows 0 .. 2", function(device)
    local p, g = vx.ones({ 3, 2 }, { device = device }), vx.ones({ 2, 2 }, { device = device })
    for metric = 0, 1 do
      op.vertex_knn_backward(core.new_like(p), g,
        upload(vx.tensor({ { 0, 1 }, { 3, -1 } }, { dtype = "i32" }), device), p, metric, 0)
    end
  end },
  knn_backward = { "knn_backward: ", "near (1,1) is no row of y, which has rows 0 .. 2", function(device)
    local x, g = vx.ones({ 3, 2 }, { device = device }), vx.ones({ 3, 2 }, { device = device })
    local near = upload(vx.tensor({ { 0, 1 }, { 2, -1 }, { 9, 0 } }, { dtype = "i32" }), device)
    op.knn_backward(core.new_like(x), core.new_like(x), g, near, x, x)
  end },
  assign = { "assign: ", "row 2 of z holds a NaN or Inf", function(device)
    local z = vx.ones { 5, 1, 3 }
    z[3][1][2], z[5][1][1] = 0 / 0, 1 / 0
    ops.assign(upload(z, device), vx.ones({ 1, 4, 3 }, { device = device }), "euclid")
  end },
}

-- -- The devices ------------------------------------------------------------------------------------------------------

core.memory_pool(false, "emu:0") -- blocks of exact size: every overrun meets a guard

--- The GPU that works, or nil and why there is none.
local function gpu()
  local works, reason = pcall(core.device_number, "cuda:0")
  if works then return "cuda:0" end
  return nil, tostring(reason):gsub("^[^:]*:%d+: ", "")
end

return {
  -- where the self-tests lie, too
  build = (os.getenv "VERTEX_LIB" or core.root .. "/build/libvertex.so"):match "^(.*)/",
  setenv = setenv, with = with, run = run, compare = compare, bytes = bytes, upload = upload, largest = largest,
  quantized = quantized, gpu = gpu,
  dtypes = DTYPES, direct = direct, tolerances = tolerances, faults = faults,
}
