-- What ops_spec.lua holds ops without a gradient to: a function for each, by the op's name in core/ops.def or in
-- lua/vertex/ops.

local assert = require "luassert"
local H = require "tests.helper"
local R = require "tests.reference"
local vx = H.vx
local core = require "vertex.core"
local ops = vx.ops

local direct = {}

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
  local x = T { 3, 4, 5 }
  local values = x:totable()
  for d = 1, 3 do
    local found, size = ops.argmax(x, d):totable(), x:shape()
    size[d] = 1
    for i = 1, size[1] do
      for j = 1, size[2] do
        for k = 1, size[3] do
          local best, at = -math.huge, nil
          for n = 1, x:size(d) do
            local v = values[d == 1 and n or i][d == 2 and n or j][d == 3 and n or k]
            if v > best then best, at = v, n - 1 end
          end
          local a, b = d == 1 and j or i, d == 3 and j or k
          assert.equal(at, found[a][b])
        end
      end
    end
  end
  H.raises(function() ops.argmax(x, 4) end, "argmax: dimension 4 of a tensor (3,4,5)")
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
  for _, scale in ipairs { 3e38, 1e-25 } do -- squares would leave float32's range
    index = ops.kmeans_start(vx.tensor { { scale }, { -scale }, { scale }, { -scale } }, 2, vx.generator(1)):totable()
    assert.equal(1, (index[1] + index[2]) % 2)
  end
  H.raises(function() ops.kmeans_start(vx.zeros { 2, 2 }, 0) end, "kmeans_start: count is 0")
end

function direct.span_mask()
  for number, case in ipairs { { 1, 99 }, { 5, 99 }, { 3, 300, { 300, 37, 120 } }, { 4, 30, { 30, 10, 0, 12 } },
    { 2, 13, nil, 0.65, 4, 0 }, { 3, 40, nil, 1, 1, 2 }, { 2, 40, nil, 0, 5, 1 } } do
    local B, T, lengths, probability, span, least = unpack(case, 1, 6)
    local options = { probability = probability, span = span, least = least,
      lengths = lengths and vx.tensor(lengths, { dtype = "i32" }) }
    local mask, frames, count = ops.span_mask(B, T, options, vx.generator(number))
    local expected = R.span_mask(B, T, lengths, probability or 0.65, span or 10, least or 2, number, 1)
    assert.same(expected, mask:totable(), "case " .. number)
    local places, counts = {}, {}
    for b, row in ipairs(expected) do
      counts[b] = 0
      for t, masked in ipairs(row) do
        if masked == 1 then places[#places + 1], counts[b] = (b - 1) * T + t - 1, counts[b] + 1 end
      end
    end
    assert.same({ places, counts }, { frames:totable(), count:totable() }, "case " .. number)
  end
  H.raises(function() ops.span_mask(2, 9, { lengths = vx.tensor({ 9, 10 }, { dtype = "i32" }) }) end,
    "span_mask: length 10 of row 1 is outside 0 .. 9")
  H.raises(function() ops.span_mask(2, 9, { lengths = vx.tensor({ 9 }, { dtype = "i32" }) }) end, "span_mask", "(1)")
  H.raises(function() ops.span_mask(2, 9, { probability = 1.5 }) end, "span_mask: probability is 1.5")
  H.raises(function() ops.span_mask(2, 9, { spans = 3 }) end, "span_mask: unknown option 'spans'", "'span'")
end

function direct.distractors()
  local mask, frames = ops.span_mask(3, 60, {}, vx.generator(3))
  assert.is_true(mask:to("f32"):sum():item() == frames:numel())
  local drawn = ops.distractors(frames, 60, 33, vx.generator(4))
  assert.same(R.distractors(frames:totable(), 60, 33, 4, 1), drawn:totable())
  -- each of the others alike: three frames of a row, 30,000 draws, deviation 61 of 10,000 and so on
  local counts = { [0] = 0, 0, 0 }
  for _, j in ipairs(ops.distractors(vx.tensor({ 7, 8, 11 }, { dtype = "i32" }), 12, 20000,
    vx.generator(5)):totable()[2]) do counts[j] = counts[j] + 1 end
  assert.equal(0, counts[1])
  assert.is_true(math.abs(counts[0] - 10000) < 400)
  local function list(t) return vx.tensor(t, { dtype = "i32" }) end
  H.raises(function() ops.distractors(list { 1, 2, 15 }, 10, 3) end, "distractors: row 1 has one masked frame")
  H.raises(function() ops.distractors(list { 2, 1 }, 10, 3) end, "distractors: frame 1 at place 1", "ascending")
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

return direct
