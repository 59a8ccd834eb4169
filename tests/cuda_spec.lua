-- The CUDA kernels, on the host as device emu:0 (tests/cuda_emulator) and on cuda:0 where there is one (`busted -t cuda`): every op against the
-- CPU, the same bits twice, transfers, memory, errors; and what the emulator must find.

local H = require "tests.helper"
local check = require "tests.golden.check"
local larger = require "tests.larger_cases"
local vx = H.vx
local core = require "vertex.core"
local ops, C = vx.ops, core.C
local build = (os.getenv "VERTEX_LIB" or core.root .. "/build/libvertex.so"):match "^(.*)/" -- where the self-tests lie, too

-- -- Machinery ---------------------------------------------------------------------------------------------------------------------

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
    results[1] = core.keep(y:to "cpu")
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

-- Both sides round to float32 (6e-8) at every step of a short chain, in another order, and their exp, log, erf and pow differ by up to 4 units in
-- the last place; ops_spec.lua holds the CPU to 1e-6 of the largest value around, so the two may differ by a few times that.
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

-- -- Ops that no recorded op calls, and those whose cases are not in ops.lua: device → results on that device ----------------------------------

local DTYPES = { "f32", "bf16", "i32", "u8" }
local direct, tolerances = {}, {}

local function upload(x, device) return vx.empty(x:shape(), { dtype = x:dtype(), device = device }):copy(x) end

function direct.fill(device)
  local results = {}
  for _, dtype in ipairs(DTYPES) do
    for _, value in ipairs { 0, 1.5, 2.5, -3.7, 300, 1e10, -1e10, 0 / 0, 1 / 0, 3.14159265 } do
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
  local odd = vx.tensor { 0.5, 1.5, 2.5, -0.5, -1.5, 254.5, 255.5, 256, -1, 1e9, 3e9, -3e9, 2147483520, 0 / 0, 1 / 0, -1 / 0, 1e-40, 1.00390625, 1.01171875 }
  local whole = vx.tensor({ 0, 1, -1, 255, 256, 257, 65535, 16777217, -16777219, 2147483647, -2147483648, 33554433, 33686017 }, { dtype = "i32" })
  local square = T({ 70, 40, 3 }, { grad = false, low = -300, high = 300 })
  for _, from in ipairs(DTYPES) do
    for _, to in ipairs(DTYPES) do
      for _, source in ipairs { odd, whole } do
        results[#results + 1] = upload(source, device):to(from):to(to)
      end
      local x = upload(square, device):to(from)
      local s = x:strides()
      for _, view in ipairs { { { 40, 70, 3 }, { s[2], s[1], s[3] } }, { { 3, 40, 70 }, { s[3], s[2], s[1] } }, { { 70, 40 }, { s[1], s[2] } },
        { { 70, 3, 40 }, { s[1], s[3], s[2] } }, { { 35, 20, 3 }, { 2 * s[1], 2 * s[2], s[3] } }, { { 2, 70, 40 }, { 0, s[1], s[2] } }, { { 8400 }, { 1 } } } do
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
      core.call(C.vx_binary, y._h, core.view(a, s[1], s[2], 0)._h, core.view(b, s[1], s[3], 0)._h, kind)
      results[#results + 1] = y
    end
  end
  local x, w = upload(T({ 33, 20 }, { grad = false }), device), upload(T({ 20, 33 }, { grad = false }), device)
  for _, pair in ipairs { { x, w:t() }, { x:narrow(2, 3, 8), x:narrow(2, 5, 8) }, { x:narrow(2, 5, 8), x:narrow(2, 9, 8) }, { x:t(), w } } do
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
      core.call(C.vx_unary, y._h, x._h, kind, 0.5, 2)
      core.call(C.vx_unary_backward, dx._h, x._h, x._h, y._h, kind, 0.5, 2)
      results[#results + 1], results[#results + 2] = y, dx
    end
  end
  return results
end

function direct.adamw(device)
  local results = {}
  for _, n in ipairs { 1, 3, 4, 17, 20011 } do
    for offset = 0, 1 do -- views that lie on 4 bytes, not 16
      local T = H.generator(n)
      local state = {}
      for i = 1, 3 do
        local x = T({ n + offset }, { grad = false, low = i == 1 and -1 or 0 })
        state[i] = upload(x, device):narrow(1, 1 + offset, n)
      end
      for step = 1, 3 do
        local g = upload(T({ n + offset }, { grad = false }), device):narrow(1, 1 + offset, n)
        core.call(C.vx_adamw, state[1]._h, state[2]._h, state[3]._h, g._h, 0.01, 0.9, 0.99, 1e-8, 0.1, step)
      end
      for i = 1, 3 do results[#results + 1] = state[i] end
    end
  end
  return results
end

function direct.reduce(device)
  local T, results = H.generator(13), {}
  local x = upload(T({ 60, 48, 5 }, { grad = false }), device)
  local long = upload(T({ 3, 40004 }, { grad = false }), device)
  local function reduced(v, shape)
    for kind = 0, 3 do
      local y = vx.empty(shape, { device = device })
      core.call(C.vx_reduce, y._h, v._h, kind)
      results[#results + 1] = y
    end
  end
  local s = x:strides()
  -- views: transposed, every second element, repeated by a stride of 0, off 16 bytes; every choice of dimensions
  for _, view in ipairs { { { 60, 48, 5 }, s, 0 }, { { 5, 48, 60 }, { s[3], s[2], s[1] }, 0 }, { { 48, 60, 5 }, { s[2], s[1], s[3] }, 0 },
    { { 30, 24, 5 }, { 2 * s[1], 2 * s[2], s[3] }, 0 }, { { 60, 24, 2 }, { s[1], 2 * s[2], 2 }, 1 }, { { 4, 48, 5 }, { 0, s[2], s[3] }, 1 },
    { { 48, 5, 4 }, { s[2], s[3], 0 }, 3 } } do
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
  local special = upload(vx.tensor { { 1, 0 / 0, 1 / 0 }, { 2, 3, -1 / 0 }, { 1 / 0, -1 / 0, 4 }, { 0, -0.0, -0.0 } }, device)
  reduced(special, { 4, 1 })
  reduced(special, { 1, 3 })
  results[#results + 1] = ops.sum(vx.empty({ 0, 3 }, { device = device }), 1)
  return results
end

function direct.softmax(device)
  local T, results = H.generator(14), {}
  local special = vx.tensor { { 1, 0 / 0, 2 }, { 1 / 0, 0, 1 }, { -1 / 0, -1 / 0, -1 / 0 }, { -1 / 0, 3, 4 }, { 3e38, -3e38, 3e38 }, { -90, 100, 0 } }
  for logarithm = 0, 1 do
    -- rows of a lane or several, of a warp, of a block, and longer than what a block keeps
    for _, x in ipairs { special, T({ 700, 3 }, { grad = false }), T({ 65, 30 }, { grad = false, high = 50 }), T({ 9, 500 }, { grad = false }),
      T({ 3, 513 }, { grad = false }), T({ 2, 8300 }, { grad = false }), T({ 2, 20000 }, { grad = false }) } do
      local here, g = upload(x, device), upload(T(x:shape(), { grad = false }), device)
      local y, dx = core.new_like(here), core.new_like(here)
      core.call(C.vx_softmax, y._h, here._h, logarithm)
      core.call(C.vx_softmax_backward, dx._h, g._h, y._h, logarithm)
      results[#results + 1], results[#results + 2] = y, dx
    end
  end
  return results
end

function direct.nonfinite(device)
  local x, results = vx.zeros { 300, 70 }, {}
  for _, place in ipairs { { 271, 70, 1 / 0 }, { 18, 1, 0 / 0 }, { 18, 2, -1 / 0 }, { 1, 1, 0 / 0 } } do
    x[place[1]][place[2]] = place[3]
    results[#results + 1] = vx.empty({ 2 }, { dtype = "i32", device = device })
    core.call(C.vx_nonfinite, results[#results]._h, upload(x, device)._h)
  end
  local long = vx.zeros { 2, 40000 }
  for _ = 1, 2 do
    results[#results + 1] = vx.empty({ 2 }, { dtype = "i32", device = device })
    core.call(C.vx_nonfinite, results[#results]._h, upload(long, device)._h)
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

function direct.scatter_add(device)
  local T, results = H.generator(4), {}
  -- (rows, rows of the table, width): many short runs, a few long ones, one over many pieces of the sorted list
  for _, s in ipairs { { 900, 300, 64 }, { 1200, 7, 17 }, { 40, 1, 3 }, { 3, 500, 1 }, { 5000, 2, 40 }, { 64, 1, 2 }, { 0, 4, 2 } } do
    local tab, x = T({ s[2], s[3] }, { grad = false }), T({ s[1], s[3] }, { grad = false })
    local index = T({ s[1] }, { dtype = "i32", high = s[2] - 1 })
    results[#results + 1] = upload(tab, device)
    core.call(C.vx_scatter_add, results[#results]._h, upload(x, device)._h, upload(index, device)._h)
  end
  return results
end

function direct.count_codes(device)
  local T = H.generator(5)
  local codes = upload(T({ 3000, 2 }, { dtype = "i32", high = 70 }), device)
  local counts = ops.count_codes(codes, 71)
  return { ops.count_codes(codes, 71), ops.count_codes(codes, 71, counts), ops.count_codes(upload(T({ 5, 1 }, { dtype = "i32", high = 0 }), device), 1) }
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
  for _, n in ipairs { 0, 1, 3, 4, 65, 20011 } do results[#results + 1] = ops.normal(vx.empty({ n }, { device = device }), 1, 2, generator) end
  return results
end

function direct.dirichlet(device)
  local results, generator = {}, vx.generator(9)
  local rows = upload(vx.tensor { { 1e-3, 1e6 }, { 0.5, 2 }, { 1, 1 } }, device)
  for _, logarithms in ipairs { false, true } do
    results[#results + 1] = ops.dirichlet(vx.empty({ 300, 3 }, { device = device }), upload(vx.tensor { 0.1, 1, 50 }, device), logarithms, generator)
    results[#results + 1] = ops.dirichlet(vx.empty({ 5, 70 }, { device = device }), vx.full({ 70 }, 0.3, { device = device }), logarithms, generator)
    results[#results + 1] = ops.dirichlet(vx.empty({ 3, 2 }, { device = device }), rows, logarithms, generator)
    results[#results + 1] = ops.dirichlet(vx.empty({ 2, 3 }, { device = device }), rows:t(), logarithms, generator)
  end
  results[#results + 1] = ops.dirichlet(vx.empty({ 0, 2 }, { device = device }), vx.ones({ 2 }, { device = device }), false, generator)
  return results
end

--- Neighbours among rows of small whole numbers, where many are equally near, and gradients that meet in a few rows.
function direct.neighbours(device)
  local T, results = H.generator(11), {}
  for _, s in ipairs { { 150, 90, 2, 7 }, { 40, 300, 3, 40 }, { 5, 6, 1, 5 } } do
    local x, y = vx.empty { s[1], s[3] }:copy(T({ s[1], s[3] }, { dtype = "i32", low = 0, high = 2 })), vx.empty { s[2], s[3] }
    y:copy(T({ s[2], s[3] }, { dtype = "i32", low = 0, high = 2 }))
    x, y = upload(x, device), upload(y, device)
    x.requires_grad, y.requires_grad = true, true
    local distance, near = ops.knn(x, y, s[4])
    ops.sum(ops.mul(distance, upload(T(distance:shape(), { grad = false }), device))):backward()
    for _, r in ipairs { distance, near, x.grad, y.grad } do results[#results + 1] = r end
    results[#results + 1], results[#results + 2] = ops.knn(y, y, s[4], true)
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

function direct.permutation(device)
  local results = {}
  for _, n in ipairs { 0, 1, 2, 3, 64, 1000, 30011 } do results[#results + 1] = ops.permutation(n, vx.generator(n), { device = device }) end
  return results
end

function direct.assign(device)
  local T, results = H.generator(6), {}
  for _, metric in ipairs { "euclid", "cosine" } do
    for _, s in ipairs { { 40, 1, 6, 11 }, { 130, 2, 3, 70 }, { 33, 1, 32, 1 }, { 1, 3, 17, 65 }, { 300, 1, 64, 130 } } do
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
local function quantized(device, seed, N, G, M, D, op, ...)
  local T = H.generator(seed)
  local z, book = upload(T({ N, G, D }, { grad = false }), device), upload(T({ G, M, D }, { grad = false }), device)
  z.requires_grad, book.requires_grad = true, true
  local outputs = { op(z, book, ...) }
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
        for _, x in ipairs(quantized(device, 7, s[1], s[2], s[3], s[4], ops.quantize_hard, options)) do results[#results + 1] = x end
      end
    end
  end
  return results
end

function direct.smooth(device)
  local results = {}
  for _, sampler in ipairs { "softmax", "sgumbel", "hgumbel" } do
    for _, regularizer in ipairs { "none", "ppl", "knn-ce", "knn-l2" } do
      for _, s in ipairs { { 300, 1, 130, 3 }, { 200, 1, 70, 32 }, { 70, 2, 11, 6 } } do
        local log_tau = upload(vx.tensor { math.log(0.1) }, device)
        log_tau.requires_grad = true
        local options = { sampler = sampler, regularizer = regularizer, k = 4, gumbel_tau = 1, shards = 1, seed = 5, stream = 3 }
        for _, x in ipairs(quantized(device, 8, s[1], s[2], s[3], s[4], ops.quantize_smooth, log_tau, options)) do results[#results + 1] = x end
        results[#results + 1] = log_tau.grad
      end
    end
  end
  return results
end
tolerances.hard, tolerances.smooth = 2e-5, 1e-4 -- regularizers and the gradient of log tau are sums that cancel (tests/golden/check.lua)

-- Values that no kernel may meet: device → nothing; the error comes at the latest when the device is waited for, and names the op and the row.
local faults = {
  gather = { "gather: ", "row 3 is outside 0 .. 9", function(device)
    ops.gather(vx.zeros({ 10, 4 }, { device = device }), upload(vx.tensor({ 0, 9, 5, 10, 3, -1 }, { dtype = "i32" }), device))
  end },
  scatter_add = { "scatter_add: ", "row 1 is outside 0 .. 2", function(device)
    local index = upload(vx.tensor({ 0, -1, 5 }, { dtype = "i32" }), device)
    core.call(C.vx_scatter_add, vx.zeros({ 3, 4 }, { device = device })._h, vx.zeros({ 3, 4 }, { device = device })._h, index._h)
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
    core.call(C.vx_hard_forward, core.new_like(z)._h, vx.empty({ 1 }, { device = device })._h, z._h, book._h, codes._h, 1, 1, 0)
  end },
  hard_backward = { "hard_backward: ", "row 1 has a code outside 0 .. 3 (group 1)", function(device)
    local z, book, one = vx.ones({ 3, 2, 5 }, { device = device }), vx.ones({ 2, 4, 5 }, { device = device }), vx.ones({ 1 }, { device = device })
    local codes = upload(vx.tensor({ { 0, 3 }, { 1, 4 }, { -1, 0 } }, { dtype = "i32" }), device)
    core.call(C.vx_hard_backward, core.new_like(z)._h, core.new_like(book)._h, z._h, one._h, z._h, book._h, codes._h, 1, 1, 1, 0, 0)
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
      core.call(C.vx_vertex_knn_backward, core.new_like(p)._h, g._h, upload(vx.tensor({ { 0, 1 }, { 3, -1 } }, { dtype = "i32" }), device)._h, p._h, metric, 0)
    end
  end },
  knn_backward = { "knn_backward: ", "near (1,1) is no row of y, which has rows 0 .. 2", function(device)
    local x, g = vx.ones({ 3, 2 }, { device = device }), vx.ones({ 3, 2 }, { device = device })
    local near = upload(vx.tensor({ { 0, 1 }, { 2, -1 }, { 9, 0 } }, { dtype = "i32" }), device)
    core.call(C.vx_knn_backward, core.new_like(x)._h, core.new_like(x)._h, g._h, near._h, x._h, x._h)
  end },
  assign = { "assign: ", "row 2 of z holds a NaN or Inf", function(device)
    local z = vx.ones { 5, 1, 3 }
    z[3][1][2], z[5][1][1] = 0 / 0, 1 / 0
    ops.assign(upload(z, device), vx.ones({ 1, 4, 3 }, { device = device }), "euclid")
  end },
}

-- -- On one device ---------------------------------------------------------------------------------------------------------------------

local function specs(device, tag)
  local backend = device:match "^%a+"

  --- On `device`; with results compared against the CPU's.
  local function against_cpu(f, what, tolerance)
    finally(function() vx.device "cpu" end)
    local expected
    vx.device "cpu"
    vx.step(function() expected = f "cpu" for _, x in ipairs(expected) do core.keep(x) end end)
    vx.device(device)
    local twice = {}
    for i = 1, 2 do
      local here
      vx.step(function()
        here = f(device)
        for j, x in ipairs(here) do
          assert.equal(device, x:device())
          here[j] = core.keep(x:to "cpu")
        end
        vx.sync(device)
      end)
      twice[i] = here
    end
    vx.device "cpu"
    compare(twice[1], expected, what, tolerance)
    assert.same(bytes(twice[1]), bytes(twice[2]), what .. ": the same bits twice")
  end

  describe(device, function()
    it("has a kernel for every op" .. tag, function()
      for _, op in ipairs(core.op_list()) do
        local there, reason = core.backend_has(backend, op.name)
        assert.is_not_nil(there, reason)
        assert.is_true(there, op.name)
      end
    end)

    for number, op in ipairs(ops.registry) do
      if op.cases then
        it(op.name .. " agrees with the CPU, forward and backward, the same bits twice" .. tag, function()
          for kind, list in ipairs { op.cases(H.generator(100 + number)), larger[op.name] and larger[op.name](H.generator(600 + number)) or {} } do
            for i, args in ipairs(list) do
              local what = ("%s case %d.%d"):format(op.name, kind, i)
              local got = run(op.name, args, device, 300 + number)
              compare(got, run(op.name, args, "cpu", 300 + number), what)
              assert.same(bytes(got), bytes(run(op.name, args, device, 300 + number)), what .. ": the same bits twice")
            end
          end
        end)
      end
    end

    for name, f in pairs(direct) do
      it(name .. " agrees with the CPU" .. tag, function() against_cpu(f, name, tolerances[name]) end)
    end

    for name, fault in pairs(faults) do
      it(name .. " reports a value it cannot work with" .. tag, function()
        local ok, message = pcall(function()
          fault[3](device)
          vx.sync(device)
        end)
        assert.is_false(ok)
        assert.is_truthy(message:find(fault[1], 1, true), message)
        assert.is_truthy(message:find(fault[2], 1, true), message)
        vx.sync(device) -- reported once
        fault[3](device)
        collectgarbage() -- freeing the op's tensors and scratch waits for the device too, but must not swallow what it finds
        collectgarbage()
        assert.is_false(pcall(vx.sync, device))
        assert.equal(4, (vx.ones({ 2, 2 }, { device = device }) + 3):totable()[2][2])
      end)
    end

    for _, name in ipairs(check.files "tests/golden") do
      it("golden file " .. name .. tag, function()
        finally(function() vx.device "cpu" end)
        vx.device(device)
        local t, meta = vx.load("tests/golden/" .. name)
        assert.equal(device, t.z:device())
        assert.same({}, (check.differences(t, meta)))
      end)
    end

    for _, method in ipairs { "softmax-knn-ce", "sgumbel-ppl", "hgumbel-knn-l2", "ste-euclid", "re-cosine" } do
      it("a step of an autoencoder with " .. method .. " agrees with the CPU" .. tag, function()
        finally(function() vx.device "cpu" end)
        local autoencoder = dofile(core.root .. "/experiments/autoencoder.lua")
        --- Loss, codes, gradients and what AdamW makes of them.
        local function step(where)
          vx.device(where)
          vx.seed(6)
          local model = autoencoder.new({ 16, 8, 4 }, vx.quantizer(method, { dim = 4, codes = 21, k = 2, seed = 2 }))
          local optimizer = vx.optim.AdamW(model:parameters(), { weight_decay = 0.1 })
          local x = vx.empty({ 3, 12, 10, 3 }):copy(H.generator(46)({ 3, 12, 10, 3 }, { grad = false }))
          local y, q = model(x)
          local loss = vx.mse(y, x) + q.reg
          loss:backward()
          local state, gradients = { loss = loss:totable(), codes = H.flat(q.codes) }, {}
          for i, p in ipairs(model:parameters()) do gradients[i] = H.flat(p.grad) end
          optimizer:step(1e-3)
          for name, t in pairs(model:state_dict()) do state[name] = H.flat(t) end
          return state, gradients
        end
        local expected, expected_gradients = step "cpu"
        local state, gradients = step(device)
        assert.same(expected.codes, state.codes)
        H.close({ state.loss }, { expected.loss }, 1e-5, 0, "loss")
        for i, g in ipairs(expected_gradients) do H.close(gradients[i], g, 0, 2e-4 * largest(g), "gradient " .. i) end
        for name, t in pairs(expected) do
          -- AdamW's first step is rate * sign(g): where g is rounding noise, by two rates apart
          if name ~= "codes" and name ~= "loss" then H.close(state[name], t, 0, 2.1e-3, name) end
        end
      end)
    end

    it("moves tensors of every dtype and stride, both ways" .. tag, function()
      local T = H.generator(9)
      for _, dtype in ipairs(DTYPES) do
        local x = T({ 6, 10 }, { grad = false, low = 0, high = 99 }):to(dtype)
        local list = H.flat(x)
        assert.same(list, H.flat(x:to(device)))
        assert.same(list, H.flat(x:to(device):to "cpu"))
        assert.same(x:bytes(), x:to(device):bytes())
        assert.same(H.flat(x:t()), H.flat(x:t():to(device)))
        assert.same(H.flat(x:t()), H.flat(x:to(device):t():to "cpu"))
        assert.same(H.flat(x:narrow(2, 3, 4)), H.flat(x:to(device):narrow(2, 3, 4)))
        assert.same(x[3]:totable(), x:to(device)[3]:totable())
        for _, other in ipairs(DTYPES) do
          local expected = H.flat(x:to(other))
          assert.same(expected, H.flat(vx.empty({ 6, 10 }, { dtype = other, device = device }):copy(x)))
          assert.same(expected, H.flat(vx.empty({ 6, 10 }, { dtype = other }):copy(x:to(device))))
          local target = vx.zeros({ 10, 6 }, { dtype = other, device = device })
          target:t():copy(x)
          assert.same(expected, H.flat(target:t()))
        end
        local y = vx.empty({ 6, 10 }, { dtype = dtype, device = device })
        y:frombytes(x:bytes())
        assert.same(list, H.flat(y))
      end
      local y = vx.zeros({ 3 }, { device = device })
      y[2] = 5
      y[3] = vx.tensor(7)
      assert.same({ 0, 5, 7 }, y:totable())
      assert.equal(5, y[2]:item())
      assert.same({}, vx.zeros({ 0 }, { device = device }):totable())
      assert.same({ 0, 4 }, vx.zeros({ 0, 4 }, { device = device }):to("cpu"):shape())
    end)

    it("uploads more than its buffers hold, in order" .. tag, function()
      -- the ring holds 4 slots of 4 MB: large ones take the detour through a device buffer, small ones share a slot
      local x = vx.arange(0, 3000000):to(device) -- 12 MB
      assert.same({ 2999999, 1234567 }, { x[3000000]:item(), x[1234568]:item() })
      local parts = {}
      for i = 1, 40 do parts[i] = vx.full({ i % 3 == 0 and 300000 or 1000 + i }, i):to(device) end
      for i, part in ipairs(parts) do assert.same({ i, i }, { part[1]:item(), part[part:size(1)]:item() }) end
      local y = vx.empty({ 100000 }, { device = device })
      local host = vx.empty { 100000 }
      for i = 1, 60 do -- the host's tensor is free again at once
        host:fill(i)
        y:copy(host)
      end
      assert.equal(60, y[100000]:item())
    end)

    it("finds elements beyond 2^31" .. tag, function()
      local far = 2 ^ 31 + 70
      local x = vx.empty({ far + 30 }, { dtype = "u8", device = device }) -- 2 GB, of which the emulator touches a few pages
      local function window(offset) return core.view(x, { 2, 3 }, { far, 4 }, offset) end
      window(1):fill(7)
      window(2):fill(9)
      assert.same({ { 7, 7, 7 }, { 7, 7, 7 } }, window(1):to("f32"):totable())
      local y = vx.empty({ 3, 2 }, { device = device }):copy(window(2):t())
      assert.same({ { 9, 9 }, { 9, 9 }, { 9, 9 } }, y:totable())
      window(3):copy(vx.tensor { { 1, 2, 3 }, { 4, 5, 6 } })
      window(1)[2]:copy(window(3)[2])
      assert.same({ { 7, 7, 7 }, { 4, 5, 6 } }, window(1):totable())
      assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, window(3):totable())
      x:release()
    end)

    it("saves and loads its tensors" .. tag, function()
      local T = H.generator(10)
      local x, half = T({ 300, 40 }, { grad = false }), T({ 7, 3 }, { grad = false }):to "bf16"
      local path = H.scratch "device.safetensors"
      vx.save(path, { x = x:to(device), strided = x:to(device):t(), half = half:to(device), codes = vx.arange(5, { dtype = "i32" }):to(device) })
      local back = vx.load(path, { device = device })
      assert.equal(device, back.x:device())
      assert.same(x:bytes(), back.x:bytes())
      assert.same(H.flat(x:t()), H.flat(back.strided))
      assert.same(half:bytes(), back.half:bytes())
      assert.same({ 0, 1, 2, 3, 4 }, back.codes:totable())
      assert.same(x:bytes(), vx.load(path, { device = "cpu" }).x:bytes())
    end)

    it("refuses tensors of another device, both by name" .. tag, function()
      local here, there = vx.ones({ 2, 3 }, { device = device }), vx.ones { 2, 3 }
      H.raises(function() ops.add(here, there) end, "binary: ", "y is on " .. device, "b on cpu")
      H.raises(function() ops.add(there, here) end, "binary: ", "y is on cpu", "b on " .. device)
      H.raises(function() ops.mse(here, there) end, "mse: ", device, "cpu")
      H.raises(function() ops.gather(here, vx.zeros({ 2 }, { dtype = "i32" })) end, "gather: ", device, "cpu")
      H.raises(function() core.image_png(vx.zeros({ 2, 2, 3 }, { dtype = "u8", device = device })) end, "")
      H.raises(function() vx.device(backend .. ":63") end, backend .. ":63", backend .. " device")
      H.raises(function() vx.device(backend .. ":x") end, backend .. ":x", "expected")
    end)

    it("names itself" .. tag, function()
      assert.equal(device, vx.ones({ 1 }, { device = device }):device())
      assert.equal(device, vx.ones({ 1 }, { device = backend .. (device:match ":%d+") }):device())
      assert.is_true(vx.memory(device).limit > 1e8)
    end)

    it("counts its memory, keeps freed blocks, gives them back" .. tag, function()
      core.memory_pool(true, device)
      finally(function()
        core.memory_pool(backend ~= "emu", device)
        vx.memory_limit(0, device)
      end)
      collectgarbage()
      collectgarbage()
      vx.memory_flush(device)
      local before = vx.memory(device)
      assert.equal(0, before.cached)
      local x = vx.zeros({ 1024, 256 }, { device = device })
      local during = vx.memory(device)
      assert.same({ before.live + 1048576, before.tensors + 1 }, { during.live, during.tensors })
      x:release()
      local after = vx.memory(device)
      assert.same({ before.live, 1048576, before.tensors }, { after.live, after.cached, after.tensors })
      local y = vx.zeros({ 1024, 256 }, { device = device })
      assert.equal(0, vx.memory(device).cached)
      y:release()
      -- a limit: the cached block goes, what is too large is refused with all figures, and a smaller one still fits
      vx.memory_limit(before.live + 1500000, device)
      local z = vx.zeros({ 300000 }, { device = device })
      assert.equal(0, vx.memory(device).cached)
      H.raises(function() vx.zeros({ 300000 }, { device = device }) end, "out of memory on " .. device, "asked 1.2 MB", "free on the device", "live",
        "cached", "limit")
      assert.equal(0, z[299999]:item())
      z:release()
      assert.equal(1, vx.ones({ 300000 }, { device = device })[300000]:item())
    end)

    it("rounds the factors of products to bf16 under vx.autocast, and nothing else" .. tag, function()
      finally(function()
        vx.autocast "f32"
        vx.device "cpu"
      end)
      vx.device "cpu"
      H.raises(function() vx.autocast "bf16" end, "autocast: the default device is cpu")
      H.raises(function() vx.autocast "f16" end, "autocast: 'f16', expected \"bf16\" or \"f32\"")
      local function random(seed, ...) return H.generator(seed)({ ... }, { grad = false }) end
      local function rounded(x) return x:to("bf16"):to "f32" end

      --- y = f(a, b) and the gradients of a and b for dy, on the CPU.
      local function results(f, a, b, dy)
        a.requires_grad, b.requires_grad = true, true
        local y = f(a, b)
        y:backward(dy)
        return { y:to "cpu", a.grad:to "cpu", b.grad:to "cpu" }
      end
      local function check_product(what, f, a, b)
        vx.device "cpu"
        local dy = random(3, unpack(f(a, b):shape()))
        local expected = results(f, rounded(a), rounded(b), rounded(dy))
        vx.device(device)
        assert.equal("bf16", vx.autocast "bf16")
        compare(results(f, upload(a, device), upload(b, device), upload(dy, device)), expected, what, 1e-6)
        vx.autocast "f32"
        assert.is_true(results(f, upload(a, device), upload(b, device), upload(dy, device))[1]:bytes() ~= expected[1]:bytes())
        vx.device "cpu"
      end
      for _, s in ipairs { { 33, 70, 20 }, { 1, 8, 3 }, { 64, 64, 64 }, { 130, 5, 1 } } do
        check_product("matmul", ops.matmul, random(1, s[1], s[2]), random(2, s[2], s[3]))
        check_product("transposed", function(a, b) return ops.matmul(a:t(), b:t()) end, random(1, s[2], s[1]), random(2, s[3], s[2]))
        check_product("linear", function(x, w) return ops.linear(x, w) end, random(1, s[1], s[2]), random(2, s[3], s[2]))
      end
      check_product("batches", ops.matmul, random(1, 3, 5, 9), random(2, 3, 9, 12))
      check_product("one for all", ops.matmul, random(1, 3, 5, 9), random(2, 9, 12))

      local function overlapping(x, w) -- rows that overlap go to a kernel of our own
        local y = vx.empty({ 1, 18, 7 }, { device = x:device() })
        core.call(C.vx_gemm, y._h, core.view(x, { 1, 18, 6 }, { 0, 2, 1 }, 0)._h, core.view(w, { 1, 6, 7 }, { 0, 7, 1 }, 0)._h, nil, 1, 0)
        return y:to "cpu"
      end
      local x, w = random(1, 40), random(2, 6, 7)
      local expected = overlapping(rounded(x), rounded(w))
      vx.device(device)
      vx.autocast "bf16"
      compare({ overlapping(upload(x, device), upload(w, device)) }, { expected }, "overlapping", 1e-6)

      local T = H.generator(8)
      local cases = ops.registry.separable.cases(T) -- d is made in float32; where the two devices differ in its last bit they may round apart
      for i, args in ipairs(larger.separable(T)) do cases[#cases + 1] = i <= 4 and args or nil end
      for i, args in ipairs(cases) do
        vx.autocast "bf16"
        local got = run("separable", args, device, 20 + i)
        vx.autocast "f32"
        compare(got, run("separable", args, "cpu", 20 + i), "separable case " .. i, 1e-2)
        assert.is_true(got[1]:bytes() ~= run("separable", args, device, 20 + i)[1]:bytes())
      end
      vx.autocast "bf16"

      local function others() -- what is no product of matrices is as it was
        local list = quantized(device, 8, 60, 1, 30, 8, ops.quantize_smooth, upload(vx.tensor { -2 }, device),
          { sampler = "softmax", regularizer = "knn-ce", k = 4, gumbel_tau = 1, shards = 1, seed = 5, stream = 3 })
        list[#list + 1] = ops.conv3x3(random(4, 2, 6, 5, 8), random(5, 3, 3, 8, 8))
        list[#list + 1] = ops.assign(random(6, 9, 1, 4), random(7, 1, 7, 4), "cosine")
        return bytes(list)
      end
      local under = others()
      vx.autocast "f32"
      assert.same(others(), under)
    end)

    it("runs out of memory inside an op without harm" .. tag, function()
      finally(function() vx.memory_limit(0, device) end)
      local a, b = vx.ones({ 200000 }, { device = device }), vx.zeros({ 200000 }, { device = device })
      local loss = vx.empty({ 1 }, { device = device }):fill(9)
      collectgarbage()
      collectgarbage()
      vx.memory_flush(device)
      vx.memory_limit(vx.memory(device).live + 50, device)
      H.raises(function() core.call(C.vx_mse, loss._h, a._h, b._h) end, "mse: out of memory on " .. device)
      assert.equal(9, loss:item()) -- nothing was written
      H.raises(function() return a + b end, "out of memory")
      vx.memory_limit(0, device)
      core.call(C.vx_mse, loss._h, a._h, b._h)
      assert.equal(1, loss:item())
    end)

    it("runs out of memory within a training step, which fails as a whole; the next smaller one runs" .. tag, function()
      finally(function()
        vx.memory_limit(0, device)
        vx.device "cpu"
      end)
      vx.device(device)
      vx.seed(3)
      local autoencoder = dofile(core.root .. "/experiments/autoencoder.lua")
      local quantizer = vx.quantizer("softmax-knn-ce", { dim = 4, codes = 11, k = 2, seed = 2 })
      quantizer.with_stats = false
      local model = autoencoder.new({ 8, 8, 4 }, quantizer)
      local optimizer = vx.optim.AdamW(model:parameters())
      local function step(batch)
        local x = ops.uniform(vx.empty { batch, 8, 8, 3 }, -1, 1)
        local y, q = model(x)
        local loss = vx.mse(y, x) + q.reg
        optimizer:zero_grad()
        loss:backward()
        optimizer:step(0.01)
        return loss:item()
      end
      vx.step(step, 1)
      collectgarbage()
      collectgarbage()
      vx.memory_flush(device)
      local before, weights = vx.memory(device), {}
      for name, x in pairs(model:state_dict()) do weights[name] = x:bytes() end
      vx.reset_peak(device)
      vx.step(step, 2)
      local room = vx.memory(device).peak - before.live
      for name, x in pairs(model:state_dict()) do x:frombytes(weights[name]) end
      for part = 1, 3 do -- fails in forward, and later and later
        vx.memory_limit(before.live + room, device)
        vx.memory_flush(device)
        local ok, message = pcall(vx.step, step, part == 1 and 64 or part == 2 and 6 or 4)
        assert.is_false(ok)
        assert.is_truthy(tostring(message):find("out of memory on " .. device, 1, true), message)
        collectgarbage()
        assert.equal(before.live, vx.memory(device).live)
        for name, x in pairs(model:state_dict()) do assert.equal(weights[name], x:bytes(), name) end
      end
      assert.is_true(vx.step(step, 1) > 0)
    end)

    it("keeps live bytes constant over many steps" .. tag, function()
      finally(function() vx.device "cpu" end)
      vx.device(device)
      local w, m, v = vx.ones({ 64 }, { requires_grad = true }), vx.zeros { 64 }, vx.zeros { 64 }
      local live
      for step = 1, 300 do
        vx.step(function()
          ops.mse(ops.exp(w), vx.zeros { 64 }):backward()
          core.call(C.vx_adamw, w._h, m._h, v._h, w.grad._h, 0.01, 0.9, 0.99, 1e-8, 0, step)
          w:zero_grad()
        end)
        if step == 10 then live = vx.memory(device).live end
      end
      assert.equal(live, vx.memory(device).live)
      assert.is_true(w[1]:item() < 0.5)
    end)
  end)
end

-- -- Recorded graphs, on one device -----------------------------------------------------------------------------------------------------------

--- y = (a * x + b)^2 for x, to be fitted to zero; two parameters, one of them at half the rate, and noise where the device has it.
local function small_step(device, noise)
  local s = { device = device, x = vx.full({ 40, 3 }, 0.5, { device = device }), seen = vx.zeros({ 1, 5 }, { device = device, dtype = "i32" }) }
  s.a, s.b = vx.ones({ 40, 3 }, { device = device }), vx.full({ 40, 3 }, 0.25, { device = device })
  s.a.requires_grad, s.b.requires_grad = true, true
  s.generator = vx.generator(3)
  s.fast, s.slow = vx.optim.AdamW({ s.a }, { weight_decay = 0.1 }), vx.optim.AdamW { s.b }
  s.book = upload(H.generator(12)({ 1, 8, 3 }, { grad = false }), device)
  s.codes = upload(vx.tensor({ { 0 }, { 3 }, { 3 } }, { dtype = "i32" }), device)
  function s.run(rate)
    local x = s.x
    if noise then x = x + noise(s, vx.empty({ 40, 3 }, { device = device })) end
    local loss = vx.mse((s.a * x + s.b):square(), vx.zeros({ 40, 3 }, { device = device }))
    s.a:zero_grad()
    s.b:zero_grad()
    loss:backward()
    s.fast:step(rate)
    s.slow:step(rate and rate / 2)
    ops.count_codes(s.codes, 5, s.seen)
    return { loss = loss }, "said"
  end
  function s.state()
    local list = { s.a:bytes(), s.b:bytes(), s.seen:bytes(), ("%d %d %d"):format(s.fast.steps, s.slow.steps, s.generator.drawn) }
    for _, o in ipairs { s.fast, s.slow } do
      for _, name in ipairs { "first.1", "second.1" } do list[#list + 1] = o:state_dict()[name]:bytes() end
    end
    return list
  end
  return s
end

local function graph_specs(device, tag)
  local function rate_of(i) return 0.05 / i end

  --- Losses of five steps and the state after them; `how(s, step number)` does one step and returns its loss tensor.
  local function trained(noise, how)
    local s, losses = small_step(device, noise), {}
    for i = 1, 5 do
      vx.step(function()
        s.x:fill(i / 3)
        losses[i] = how(s, i):bytes()
      end)
    end
    return losses, s.state()
  end
  local function eager(s, i) return (s.run(rate_of(i))).loss end
  local function replayed(s, i)
    s.graph = s.graph or vx.graph(s.run, { device = device })
    local results, word = s.graph:replay(rate_of(i))
    assert.equal("said", word)
    assert.equal(i > 1, s.graph.recorded ~= nil)
    return results.loss
  end
  local function normal(s, x) return ops.normal(x, 0, 1, s.generator) end
  local noises = { { "without noise" }, { "with noise", normal }, { "with noise drawn elsewhere, too", function(s, x)
    return normal(s, x) + ops.uniform(vx.empty({ 40, 3 }, { device = device }), 0, 1)
  end }, { "with a random order", function(s) return ops.reshape(ops.permutation(120, s.generator, { device = device }):to "f32", { 40, 3 }) / 100 end },
    { "with a smoothed quantizer's noise", function(s)
      local seed, stream = s.generator:stream()
      local y = ops.quantize_smooth(ops.reshape(s.x, { 40, 1, 3 }), s.book, vx.zeros({ 1 }, { device = device }),
        { sampler = "hgumbel", regularizer = "knn-ce", k = 2, gumbel_tau = 1, shards = 1, seed = seed, stream = stream })
      return ops.reshape(y, { 40, 3 })
    end } }

  describe("graphs on " .. device, function()
    for _, noise in ipairs(noises) do
      it("train to the same bits as single ops " .. noise[1] .. tag, function()
        vx.seed(3) -- the default generator and the step's own have the same seed
        vx.generator(3)
        ops.uniform(vx.empty { 1 })
        local losses, state = trained(noise[2], eager)
        vx.seed(3)
        ops.uniform(vx.empty { 1 })
        local graph_losses, graph_state = trained(noise[2], replayed)
        assert.same(losses, graph_losses)
        assert.same(state, graph_state)
        assert.not_equal(losses[1], losses[2])
      end)
    end

    for _, method in ipairs { "softmax-knn-ce", "sgumbel-knn-l2", "hgumbel-ppl", "ste-euclid", "re-cosine", "softmax-pkl" } do
      it("train an autoencoder with " .. method .. " to the same bits as single ops" .. tag, function()
        finally(function() vx.device "cpu" end)
        vx.device(device)
        local autoencoder = dofile(core.root .. "/experiments/autoencoder.lua")
        local function run_five(recorded)
          vx.seed(5)
          local quantizer = vx.quantizer(method, { dim = 4, codes = 11, k = 2, seed = 2 })
          quantizer.with_stats = false
          local model = autoencoder.new({ 8, 8, 4 }, quantizer)
          local optimizer, meter = vx.optim.AdamW(model:parameters(), { weight_decay = 0.1 }), vx.train.meter()
          local x, used = vx.zeros { 2, 8, 8, 3 }, vx.zeros({ 1, 11 }, { dtype = "i32" })
          local step = vx.graph(function(rate)
            local y, q = model(x)
            local mse = vx.mse(y, x)
            local loss = mse + q.reg
            optimizer:zero_grad()
            loss:backward()
            optimizer:step(rate)
            ops.count_codes(q.codes, 11, used)
            meter:add { loss = loss, mse = mse }
          end)
          for i = 1, 5 do
            vx.step(function()
              x:copy(H.generator(40 + i)({ 2, 8, 8, 3 }, { grad = false }))
              if recorded then step:replay(rate_of(i)) else step.f(rate_of(i)) end
            end)
          end
          assert.equal(recorded, step.recorded ~= nil)
          local state, means = { used:bytes() }, meter:take()
          for name, t in pairs(model:state_dict()) do state[name] = t:bytes() end
          for name, t in pairs(optimizer:state_dict()) do state[name] = t:bytes() end
          return state, means
        end
        local state, means = run_five(false)
        local graph_state, graph_means = run_five(true)
        assert.same(state, graph_state)
        assert.same(means, graph_means)
        assert.is_true(means.loss > means.mse and means.mse > 0)
      end)
    end

    it("go on where steps in between have left things" .. tag, function()
      local losses, state = trained(nil, eager)
      local mixed, mixed_state = trained(nil, function(s, i) return i % 2 == 0 and eager(s, i) or replayed(s, i > 2 and i or 1) end)
      assert.same({ losses, state }, { mixed, mixed_state })
    end)

    for _, pool in ipairs { true, false } do it("keep what they use, " .. (pool and "with" or "without") .. " a pool" .. tag, function()
      finally(function() core.memory_pool(device ~= "emu:0", device) end)
      core.memory_pool(pool, device)
      collectgarbage()
      collectgarbage()
      local before = vx.memory(device)
      local s = small_step(device)
      local recorded = vx.graph(s.run, { device = device })
      for i = 1, 3 do vx.step(recorded.replay, recorded, rate_of(i)) end
      collectgarbage()
      collectgarbage()
      local live = vx.memory(device).live
      local others = {} -- whoever takes memory now must not be met by the graph
      for i = 1, 60 do others[i] = vx.full({ i % 20 == 0 and 100000 or 40, 3 }, i, { device = device }) end
      local loss
      vx.step(function()
        loss = recorded:replay(0.1).loss
        loss = recorded:replay(0.1).loss
      end)
      assert.is_true(loss:item() < 1)
      for i, x in ipairs(others) do assert.same({ i, i }, { x[1][1]:item(), x[40][3]:item() }) end
      others = nil -- luacheck: ignore
      collectgarbage()
      collectgarbage()
      assert.equal(live, vx.memory(device).live)
      -- what is freed outside stays, too
      s.x:release()
      s.codes:release()
      s.seen:release()
      vx.full({ 40, 3 }, 7, { device = device }):release()
      recorded:replay(0.1)
      assert.is_true(loss:item() < 1)
      recorded:release()
      local value = loss:item() -- a result outlives its graph
      local again = vx.full({ 1 }, 5, { device = device })
      assert.same({ value, 5 }, { loss:item(), again:item() })
      again:release()
      loss:release()
      s, recorded, loss = nil, nil, nil -- luacheck: ignore
      collectgarbage()
      collectgarbage()
      assert.same({ before.live, before.tensors }, { vx.memory(device).live, vx.memory(device).tensors })
    end) end

    it("record again where an optimizer went back" .. tag, function()
      local s = small_step(device)
      local recorded = vx.graph(s.run, { device = device })
      for i = 1, 4 do recorded:replay(rate_of(i)) end
      local first = recorded.recorded
      s.fast.steps = 1
      recorded:replay(0.01)
      assert.not_equal(first, recorded.recorded)
      assert.same({ 2, 5 }, { s.fast.steps, s.slow.steps })
      recorded:replay(0.03)
      assert.same({ 3, 6, 0.03, 0.015 }, { s.fast.steps, s.slow.steps, s.fast.lr, s.slow.lr })
    end)

    it("refuse what has to wait for the device or comes from the host, and drop the recording" .. tag, function()
      local x, y, host = vx.ones({ 4 }, { device = device }), vx.empty({ 4 }, { device = device }), vx.ones({ 4 }, { device = "cpu" })
      collectgarbage()
      collectgarbage()
      local live = vx.memory(device).live
      local recording = "while a graph is being recorded"
      for _, case in ipairs {
        { function() return x[1]:item() end, device .. ": results cannot be read (item, totable, a copy to the host) nor waited for", recording },
        { function() x:totable() end, device .. ": results cannot be read", recording },
        { function() vx.sync(device) end, device .. ": results cannot be read", recording },
        { function() y:copy(host) end, device .. ": numbers of the host cannot be uploaded", recording },
        { function() return vx.tensor({ 1, 2 }, { device = device }) end, device .. ": numbers of the host", recording },
        { function() return vx.ones { 4 } + 1 end, "fill: on cpu, while a graph of " .. device .. " is being recorded" },
        { function() vx.graph(function() return x + 1 end, { device = device }):replay() core.record(device, 1, function() end) end,
          "graph: one is being recorded on " .. device },
        { function() error "of its own" end, "of its own" },
      } do
        local recorded = vx.graph(function(rate)
          y:copy(x * 2)
          if rate == 2 then case[1]() end
        end, { device = device })
        recorded:replay(1)
        local ok, message = pcall(recorded.replay, recorded, 2)
        assert.is_false(ok)
        for i = 2, #case do assert.is_truthy(tostring(message):find(case[i], 1, true), message) end
        vx.sync(device) -- the device is as it was
        assert.equal(2, y[4]:item())
        y:zero()
        recorded:replay(1) -- and this time it can be recorded
        assert.is_not_nil(recorded.recorded)
        recorded:replay(1)
        assert.same({ 2, 2, 2, 2 }, y:totable())
        recorded:release()
      end
      collectgarbage()
      collectgarbage()
      assert.equal(live, vx.memory(device).live)
      H.raises(function() vx.graph(3) end, "graph: a number, expected a function")
      H.raises(function() vx.graph(function() end, { device = device }):replay(-1) end, "replay: rate -1, expected a number of 0 or more")
    end)

    it("report at the next wait what an op of theirs finds in its data, as often as it happens" .. tag, function()
      local index, out = upload(vx.tensor({ 0, 1, 2 }, { dtype = "i32" }), device), nil
      local tab = vx.ones({ 3, 4 }, { device = device })
      local recorded = vx.graph(function() out = ops.gather(tab, index) return out end, { device = device })
      for _ = 1, 3 do recorded:replay() end
      index:fill(7)
      local codes = vx.zeros({ 1, 1 }, { dtype = "i32", device = device })
      for i = 1, 4200 do vx.step(ops.count_codes, codes, i) end -- each has a text of its own, and there is room for 4096
      for _ = 1, 2 do
        recorded:replay()
        H.raises(function() vx.sync(device) end, "gather: ", "row 0 is outside 0 .. 2")
      end
      index:fill(1)
      assert.equal(1, recorded:replay()[3][4]:item())
    end)

    it("run out of memory without harm" .. tag, function()
      finally(function() vx.memory_limit(0, device) end)
      local x, y = vx.ones({ 100000 }, { device = device }), vx.zeros({ 100000 }, { device = device })
      local recorded = vx.graph(function() y:copy((x + 1) * 2 + (x + 3)) end, { device = device })
      recorded:replay()
      vx.memory_flush(device)
      vx.memory_limit(vx.memory(device).live + 500000, device)
      assert.is_truthy(tostring(select(2, pcall(recorded.replay, recorded))):find("out of memory on " .. device, 1, true))
      vx.memory_limit(0, device)
      for _ = 1, 2 do recorded:replay() end
      assert.equal(8, y[7]:item())
    end)
  end)
end

core.memory_pool(false, "emu:0") -- blocks of exact size: every overrun meets a guard
specs("emu:0", "")
graph_specs("emu:0", "")

-- -- What only the emulator can show --------------------------------------------------------------------------------------------------------

describe("the CUDA emulator", function()
  it("passes its self-test, for several orders of execution", function()
    for seed = 1, 5 do
      local pipe = io.popen(("LD_PRELOAD= VERTEX_EMU_SEED=%d '%s/emulator_selftest' 2>&1; echo rc=$?"):format(seed, build))
      local out = pipe:read "*a"
      pipe:close()
      assert.is_truthy(out:find("rc=0\n", 1, true), out)
      for _, name in ipairs { "bf16 products", "tf32 products", "missing barriers", "divergence", "addresses", "asynchrony", "graphs" } do
        assert.is_truthy(out:find("ok " .. name, 1, true), out)
      end
    end
  end)

  it("has several devices, whose tensors do not mix, and copies between them", function()
    local a, b = vx.ones({ 3, 4 }, { device = "emu:0" }), vx.ones({ 3, 4 }, { device = "emu:1" })
    H.raises(function() return a + b end, "binary: y is on emu:0, b on emu:1")
    b:fill(2)
    assert.same(H.flat(b), H.flat(a:copy(b)))
    a:fill(3)
    b:copy(a)
    a:fill(4) -- queued behind the copy
    assert.equal(3, b[2][3]:item())
    local t = vx.empty({ 4, 3 }, { device = "emu:1", dtype = "i32" })
    t:t():copy(a * 2)
    assert.equal(8, t[1][2]:item())
    assert.equal("emu:1", a:to("emu:1"):device())
    assert.is_true(vx.memory("emu:1").live > 0)
  end)

  it("runs out of memory as a device does", function()
    finally(function() setenv("VERTEX_EMU_MEMORY", "") end)
    collectgarbage()
    collectgarbage()
    vx.memory_flush "emu:0"
    setenv("VERTEX_EMU_MEMORY", tostring(vx.memory("emu:0").live + 180000000)) -- the pool holds cuBLAS's workspace and the upload buffers
    local x = vx.zeros({ 20, 1000000 }, { device = "emu:0" }) -- 80 MB
    local message = H.raises(function() vx.zeros({ 40, 1000000 }, { device = "emu:0" }) end, "out of memory on emu:0: asked 160.0 MB")
    local free = tonumber(message:match "free on the device ([%d.]+) MB")
    assert.is_true(free > 80 and free < 101, message)
    local y = vx.ones({ 5, 1000000 }, { device = "emu:0" }) -- the next smaller one runs
    assert.same({ 0, 1 }, { x[20][1000000]:item(), y[5][1000000]:item() })
    x:release()
    y:release()
  end)

  it("lets every error of the runtime end as a status, with the op's name", function()
    local x, y = vx.ones({ 100 }, { device = "emu:0" }), vx.zeros({ 100 }, { device = "emu:0" })
    vx.sync "emu:0"
    local loss = vx.empty({ 1 }, { device = "emu:0" })
    local function mse() core.call(C.vx_mse, loss._h, x._h, y._h) end
    for _, case in ipairs {
      { "cudaLaunchKernelEx:9", mse, "mse: squared_distance_kernel, grid (1,1,1), block (256,1,1)", "emu:0", "invalid configuration" },
      { "cudaLaunchKernelEx:719", mse, "mse on emu:0: " },
      { "cudaMalloc:2", mse, "mse: out of memory on emu:0" },
      { "cudaMalloc:999", mse, "emu:0" },
      { "cudaStreamSynchronize:719", function() vx.sync "emu:0" end, "emu:0: " },
      { "cudaMemcpyAsync:1", function() x:to "cpu" end, "emu:0: invalid argument" },
      { "cudaMemcpyAsync:1", function() x:copy(vx.zeros { 100 }) end, "emu:0: invalid argument" },
      { "cudaSetDevice:101", mse, "mse on emu:0: invalid device ordinal" },
      { "cudaMemsetAsync:1", function() vx.empty({ 8 }, { device = "emu:0" }):fill(1) vx.sync "emu:0" end, nil },
    } do
      with("VERTEX_EMU_ERROR", case[1], function()
        if case[3] then H.raises(case[2], unpack(case, 3)) else case[2]() end
      end)
      mse() -- and all goes on
      assert.equal(1, loss:item())
    end
  end)

  it("uploads through memory that queued ops still use only when they are done", function()
    for seed = 1, 4 do
      local out = H.child([[
        local vx = require "vertex"
        vx.device "emu:0"
        local n, b, y = 2 ^ 20, {}, {} -- 4 MB: what a slot of the ring takes from the pool
        local host = vx.full({ n }, 5, { device = "cpu" })
        for i = 1, 3 do b[i] = vx.full({ n }, 3) end
        for i = 1, 3 do y[i] = b[i] * 2 end
        for i = 1, 3 do b[i]:release() end
        local x = host:to "emu:0"
        for i = 1, 3 do assert(y[i]:sum():item() == 6 * n) end
        assert(x:sum():item() == 5 * n)
        print "right"
      ]], "VERTEX_EMU_SEED=" .. seed)
      assert.equal("right\n", out)
    end
  end)

  it("names the ops that were queued when a kernel went wrong, and with VERTEX_SYNC=1 the one", function()
    local text = [[
      local vx = require "vertex"
      local core = require "vertex.core"
      local x, y, loss = vx.ones({ 100 }, { device = "emu:0" }), vx.zeros({ 100 }, { device = "emu:0" }), vx.zeros({ 1 }, { device = "emu:0" })
      vx.sync "emu:0"
      local function run()
        local z = x + 1
        core.call(core.C.vx_mse, loss._h, x._h, y._h)
        os.setenv("VERTEX_EMU_ERROR", "cudaStreamSynchronize:719")
        local w = z:exp()
        vx.sync "emu:0"
      end
      require("ffi").cdef "int setenv(const char *, const char *, int);"
      function os.setenv(n, v) require("ffi").C.setenv(n, v, 1) end
      print(pcall(run))
    ]]
    local out = H.child(text)
    assert.is_truthy(out:find("in one of the last 3 ops, from unary to unary (VERTEX_SYNC=1 finds out which)", 1, true), out)
    out = H.child(text, "VERTEX_SYNC=1")
    assert.is_truthy(out:find("unary on emu:0: ", 1, true), out)
  end)

  it("opens no device where there is none, where the driver is too old, or the library holds no code for the card", function()
    local function contains(text, environment, device)
      local out = H.child(([[local vx = require "vertex"; print(select(2, pcall(vx.device, "%s")))]]):format(device or "emu:0"), environment)
      assert.is_truthy(out:find(text, 1, true), out)
    end
    contains("device 'emu:0': no CUDA device: no CUDA-capable device is detected", "VERTEX_EMU_DEVICES=0")
    contains("the driver is for CUDA 12.2, this library needs 13.0", "VERTEX_EMU_ERROR=cudaGetDeviceCount:35 VERTEX_EMU_DRIVER=12020")
    contains("there is no NVIDIA driver", "VERTEX_EMU_ERROR=cudaGetDeviceCount:35 VERTEX_EMU_DRIVER=0")
    contains("has compute capability 8.0; this library holds code for the emulator: build it with -DCMAKE_CUDA_ARCHITECTURES=80-real",
      "VERTEX_EMU_ERROR=cudaFuncGetAttributes:209")
    contains("emu:0: initialization error", "VERTEX_EMU_ERROR=cudaStreamCreateWithFlags:3")
    contains("device 'emu:1': there is 1 emu device, counted from 0", "VERTEX_EMU_DEVICES=1", "emu:1")
  end)
end)

-- -- Backend libraries ---------------------------------------------------------------------------------------------------------------------------

describe("a backend library", function()
  it("is looked for by name, and its absence told with the places", function()
    local message = H.raises(function() vx.device "abc:0" end, "device 'abc:0'", "libvertex_abc.so", core.root, "backends there: ")
    assert.is_truthy(message:find("emu", 1, true), message)
    for _, bad in ipairs { "", ":0", "emu:", "emu:-1", "emu:1x", "../emu", "EMU", "emu:12345", ("x"):rep(40) } do
      H.raises(function() vx.device(bad) end, "expected \"cpu\" or \"cuda:0\"")
    end
  end)

  it("that is none, or of another ABI, is refused", function()
    local folder = H.scratch "backends"
    require("lfs").mkdir(folder)
    H.write(folder .. "/libvertex_text.so", "no library")
    H.write(folder .. "/other.c", "int other;")
    H.write(folder .. "/old.c", "static int table[100] = {-7}; void *vx_backend_entry(int abi, void *host) { (void)abi, (void)host; return table; }")
    H.write(folder .. "/stale.c", [[static struct { int abi; const char *name, *ops; void *rest[200]; } table = {1, "stale", "fill(x)", {0}};
      void *vx_backend_entry(int abi, void *host) { table.abi = abi; (void)host; return &table; }]])
    for _, name in ipairs { "other", "old", "stale" } do
      assert.equal(0, os.execute(("gcc -shared -fPIC -o '%s/libvertex_%s.so' '%s/%s.c'"):format(folder, name, folder, name)))
    end
    finally(function() setenv("VERTEX_BACKENDS", "") end)
    setenv("VERTEX_BACKENDS", folder)
    H.raises(function() vx.device "text" end, "cannot open a backend", "libvertex_text.so")
    H.raises(function() vx.device "other" end, "has no vx_backend_entry")
    H.raises(function() vx.device "old" end, "speaks ABI -7, this library ABI 3", "./setup.sh")
    H.raises(function() vx.device "stale" end, "was built for another list of ops", "./setup.sh")
    H.raises(function() vx.device "nowhere" end, "libvertex_nowhere.so", folder)
    assert.equal("emu:0", vx.zeros({ 1 }, { device = "emu:0" }):device())
  end)

  it("libvertex_cuda.so, where it was built, lists its ops and says what is wrong with the device", function()
    local there, reason = core.backend_has("cuda", "fill")
    if there == nil then
      assert.is_truthy(reason:find("there is no libvertex_cuda.so", 1, true), reason)
      return
    end
    for _, op in ipairs(core.op_list()) do assert.equal(core.backend_has("emu", op.name), core.backend_has("cuda", op.name), op.name) end
    local devices = vx.devices()
    assert.is_true(#devices > 1 or devices.cuda:match "^no CUDA device: " ~= nil)
  end)

  it("libvertex_cuda.so, where it was built, holds code for sm_80, sm_90 and newer cards, and hot kernels do not spill", function()
    if core.backend_has("cuda", "fill") == nil then return end
    local pipe = io.popen(("luajit '%s/kernels/lab/check_cuda_build.lua' '%s' 2>&1; echo rc=$?"):format(core.root, build))
    local out = pipe:read "*a"
    pipe:close()
    assert.is_truthy(out:find("rc=0\n", 1, true), out)
  end)
end)

-- -- On a GPU -----------------------------------------------------------------------------------------------------------------------------------

local works, reason = pcall(core.device_number, "cuda:0")
if works then
  specs("cuda:0", " #cuda")
  graph_specs("cuda:0", " #cuda")
  describe("cuda:0", function()
    it("has the instructions of hardware.cuh as the emulator imitates them #cuda", function()
      local pipe = io.popen(("'%s/cuda_selftest' 2>&1; echo rc=$?"):format(build))
      local out = pipe:read "*a"
      pipe:close()
      assert.is_truthy(out:find("rc=0\n", 1, true), out)
    end)

    it("counts more than 2^32 elements #cuda", function()
      local n = 2 ^ 32 + 4 * 1000 + 3
      if vx.memory("cuda:0").limit < 24e9 then
        pending "needs 24 GB"
        return
      end
      local x = vx.empty({ n }, { dtype = "u8", device = "cuda:0" }):fill(3)
      local y = vx.empty({ n }, { dtype = "bf16", device = "cuda:0" }):copy(x)
      core.view(x, { n - 1 }, { 1 }, 1):copy(core.view(y, { n - 1 }, { 1 }, 0)) -- odd places: one element a thread
      for _, i in ipairs { 1, 2, 2 ^ 31, 2 ^ 31 + 1, 2 ^ 32 - 1, 2 ^ 32, 2 ^ 32 + 1, n } do assert.same({ 3, 3 }, { x[i]:item(), y[i]:item() }) end
    end)
  end)
else
  reason = tostring(reason):gsub("^[^:]*:%d+: ", "")
  it("cuda:0 is left out (" .. reason .. ")", function() pending(reason) end)
  it("cuda:0 is left out (" .. reason .. ") #cuda", function() pending(reason) end)
end
