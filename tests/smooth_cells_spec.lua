-- The smoothed quantizer by cells: narrow rows that are many meet only the codes near them when tau is small
-- (kernels/quantize/smooth_cells.h). Beside them the same numbers in nine dimensions, six or so of them 0, which the
-- kernels for any width take through all codes; and float64 for the neighbours.

local H = require "tests.helper"
local vx = H.vx
local ops = vx.ops
local smooth = ops.registry.quantize_smooth

local WIDE = 9

local function widened(x)
  local D = x:size(3)
  return ops.cat(3, x, vx.zeros { x:size(1), x:size(2), WIDE - D })
end

--- Forward and backward of one call: outputs, neighbours and gradients.
local function pass(z, book, tau, o)
  local call = { sampler = "softmax", regularizer = o.regularizer, k = o.k or 4, gumbel_tau = 1, shards = o.shards or 1,
    seed = 1, stream = 1, vertices = o.vertices, stats = o.stats }
  local ctx = { needs = { true, true, true } }
  local y, reg, codes, mean_pi, max_p = smooth.forward(ctx, z, book, vx.tensor { math.log(tau) }, call)
  local r = { y = y, reg = reg, codes = codes, mean_pi = mean_pi, max_p = max_p, near = ctx.call.near,
    lse = ctx.call.lse, sumsq = ctx.call.sumsq }
  r.dz, r.dcodebook, r.dlog_tau = smooth.backward(ctx, o.dy, vx.tensor { 3 })
  return r
end

--- Rows around random codes (N,G,D) and codes (G,M,D); only of the first `used` codes where that is given.
local function near_codes(N, G, D, M, noise, used)
  local book, z = vx.randn { G, M, D }, {}
  for g = 1, G do
    local index = ops.floor(ops.affine(vx.rand { N }, used or M, 0)):to "i32"
    z[g] = ops.add(ops.gather(book:select(1, g), index), ops.affine(vx.randn { N, D }, noise, 0)):reshape { N, 1, D }
  end
  return ops.cat(2, unpack(z)), book
end

--- How many of two lists of integers differ.
local function differing(a, b)
  local n = 0
  for i = 1, #a do n = n + (a[i] == b[i] and 0 or 1) end
  return n
end

--- The neighbours of all vertices as one list, those of each in ascending order.
local function sorted(near)
  local all = {}
  for _, group in ipairs(near:totable()) do
    for _, rows in ipairs(group) do
      table.sort(rows)
      for _, n in ipairs(rows) do all[#all + 1] = n end
    end
  end
  return all
end

local function compare(z, book, tau, o, what)
  local D = z:size(3)
  o.dy = ops.affine(vx.randn { z:size(1), z:size(2), D }, 1 / z:size(1), 0)
  local near = pass(z, book, tau, o)
  local wide = {}
  for k, v in pairs(o) do wide[k] = v end
  wide.dy = widened(o.dy)
  local all = pass(widened(z), widened(book), tau, wide)
  -- o.ties: rows and neighbours that lie within a rounding of others may change places
  local swapped = 0
  assert.is_true(differing(H.flat(near.codes), H.flat(all.codes)) <= o.ties, what .. ": codes")
  if near.near then
    swapped = differing(sorted(near.near), sorted(all.near))
    assert.is_true(swapped <= o.ties, ("%s: %d neighbours"):format(what, swapped))
  end
  for name, most in pairs { y = 2e-6, reg = 2e-6, lse = 1e-6, sumsq = 2e-6, max_p = 1e-6, mean_pi = 3e-6 } do
    local a, b = near[name], all[name]
    if a and not (name == "sumsq" and o.regularizer ~= "knn-l2") then
      if name == "y" then b = b:narrow(3, 1, D) end
      local e = H.relative_error(a, b)
      assert.is_true(e <= most, ("%s: %s is off by %g"):format(what, name, e))
    end
  end
  if swapped == 0 then -- the gradient of another neighbour is another gradient
    for name, most in pairs { dz = 2e-5, dcodebook = 2e-5, dlog_tau = 1e-3 } do
      local a, b = near[name], all[name]
      if name ~= "dlog_tau" then b = b:narrow(3, 1, D) end
      local e = H.relative_error(a, b)
      assert.is_true(e <= most, ("%s: %s is off by %g"):format(what, name, e))
    end
  end
  return near
end

describe("the smoothed quantizer by cells", function()
  before_each(function() vx.seed(2) end)

  it("gives what all codes give", function()
    for _, s in ipairs { { 3, 1024, 0.003 }, { 3, 700, 0.01 }, { 2, 600, 0.002 }, { 4, 1025, 0.004 }, { 8, 640, 0.001 },
      { 3, 1100, 0.02 }, { 3, 513, 1e-4 } } do
      for _, regularizer in ipairs { "none", "knn-ce", "knn-l2" } do
        local z, book = near_codes(2000, 1, s[1], s[2], 0.02)
        compare(z, book, s[3], { regularizer = regularizer,
          ties = s[3] < 1e-3 and 40 or regularizer == "knn-l2" and 4 or 0 },
          ("%s, D %d, M %d, tau %g"):format(regularizer, s[1], s[2], s[3]))
      end
    end
    local z, book = near_codes(2000, 2, 3, 700, 0.05)
    compare(z, book, 0.004, { regularizer = "knn-ce", ties = 0 }, "two groups")
    compare(z, book, 0.004, { regularizer = "knn-l2", ties = 0, stats = false }, "without mean_pi")
  end)

  it("finds neighbours of vertices that no row is near, in shards and for a subset of the vertices", function()
    for _, regularizer in ipairs { "knn-ce", "knn-l2" } do
      local z, book = near_codes(2100, 1, 3, 1000, 0.02, 60)
      compare(z, book, 0.003, { regularizer = regularizer, ties = 0 }, regularizer .. ", 940 codes without rows")
      compare(z, book, 0.003, { regularizer = regularizer, ties = 0, shards = 4, k = 8 }, regularizer .. ", shards")
      local some = {}
      for s = 1, 130 do some[s] = s * 7 end
      compare(z, book, 0.003, { regularizer = regularizer, ties = 0, shards = 2, k = 6,
        vertices = vx.tensor({ some }, { dtype = "i32" }) }, regularizer .. ", 130 vertices")
      z, book = near_codes(1100, 1, 3, 600, 0.02)
      compare(z, book, 0.003, { regularizer = regularizer, ties = 0, k = 1100 }, regularizer .. ", all rows")
    end
  end)

  it("gives ties to the lowest row and the lowest code", function()
    for _, regularizer in ipairs { "knn-ce", "knn-l2" } do
      local some = vx.randn { 1, 40, 3 }
      local rows, book, z = ops.affine(some:reshape { 40, 1, 3 }, 2, 0), {}, {}
      for i = 1, 16 do book[i] = some end
      for i = 1, 30 do z[i] = rows end
      local r = compare(ops.cat(1, unpack(z)), ops.cat(2, unpack(book)), 0.003, { regularizer = regularizer, ties = 0 },
        regularizer .. ", every code 16 times, every row 30 times")
      for i, code in ipairs(H.flat(r.codes)) do assert.is_true(code == (i - 1) % 40, "row " .. i .. ": " .. code) end
      if regularizer == "knn-ce" then
        for m, near in ipairs(r.near:totable()[1]) do
          for k, n in ipairs(near) do assert.is_true(n == (m - 1) % 40 + 40 * (k - 1), m .. ": " .. n) end
        end
      end
    end
  end)

  it("takes rows and codes of any length, clusters, a line, codes that are all equal or zero", function()
    local z, book = near_codes(1500, 1, 3, 700, 0.02)
    local o = { regularizer = "knn-ce", ties = 0 }
    for _, scale in ipairs { 1e-10, 1e8, 1e18 } do
      compare(ops.affine(z, scale, 0), book, 0.003, o, "rows times " .. scale)
    end
    compare(ops.affine(z, 1e-30, 0), book, 0.003, { regularizer = "none", ties = 1500 }, "rows below the guard")
    compare(ops.affine(z, 1, 50), ops.affine(book, 1, 50), 1e-5, { regularizer = "knn-ce", ties = 3000 }, "offset")
    local line = book:clone()
    line:narrow(3, 1, 2):zero()
    line:narrow(2, 1, 300):zero()
    compare(z, line, 0.003, { regularizer = "none", ties = 1500 }, "codes on a line, and zeros")
    compare(z, vx.ones { 1, 700, 3 }, 0.003, { regularizer = "none", ties = 0 }, "one point")
  end)

  it("keeps a crowd of codes of which each has hardly any part", function()
    -- one code where the rows are, 2047 at 0.317 rad from it: p = 2^-24 each, 2^-13 together
    local book, z = {}, {}
    local noise, around = vx.randn({ 2047, 2 }):totable(), vx.randn({ 1500, 2 }):totable()
    for m, e in ipairs(noise) do book[m] = { math.cos(0.317), math.sin(0.317) + 2e-3 * e[1], 2e-3 * e[2] } end
    for i, e in ipairs(around) do z[i] = { { 1, 1e-3 * e[1], 1e-3 * e[2] } } end
    table.insert(book, 700, { 1, 0, 0 })
    local r = compare(vx.tensor(z), vx.tensor { book }, 0.003, { regularizer = "none", ties = 0 }, "a crowd")
    assert.is_true(math.abs(r.max_p:item() - (1 - 2 ^ -13)) < 2 ^ -14)
  end)

  it("finds float64's neighbours", function()
    local N, M, K, tau = 1500, 640, 4, 0.004
    local z, book = near_codes(N, 1, 3, M, 0.03, 500)
    local near = pass(z, book, tau, { regularizer = "knn-ce", dy = z }).near:totable()[1]
    local function unit(list)
      local t = {}
      for i, x in ipairs(list) do
        local n = math.sqrt(x[1] ^ 2 + x[2] ^ 2 + x[3] ^ 2)
        t[i] = { x[1] / n, x[2] / n, x[3] / n }
      end
      return t
    end
    local rows, codes, flat = {}, unit(book:totable()[1]), z:totable()
    for i = 1, N do rows[i] = flat[i][1] end
    rows = unit(rows)
    local function logit(i, m)
      local u, q = rows[i], codes[m]
      return (u[1] * q[1] + u[2] * q[2] + u[3] * q[3]) / tau
    end
    local lse = {}
    for i = 1, N do
      local top, sum = -math.huge, 0
      for m = 1, M do top = math.max(top, logit(i, m)) end
      for m = 1, M do sum = sum + math.exp(logit(i, m) - top) end
      lse[i] = top + math.log(sum)
    end
    for m = 1, M do
      local keys = {}
      for i = 1, N do keys[i] = logit(i, m) - lse[i] end
      local best = { unpack(keys) }
      table.sort(best, function(a, b) return a > b end)
      for k = 1, K do
        local key = keys[near[m][k] + 1]
        assert.is_true(math.abs(key - best[k]) <= 1e-4, ("vertex %d, %d: %g, %g"):format(m, k, key, best[k]))
      end
    end
  end)

  it("has bits that depend on nothing else, not on the number of threads either", function()
    for _, regularizer in ipairs { "knn-ce", "knn-l2", "none" } do
      local z, book = near_codes(3000, 1, 3, 1000, 0.02, 600)
      local dy = vx.randn { 3000, 1, 3 }
      local function bits()
        local r, list = pass(z, book, 0.003, { regularizer = regularizer, dy = dy }), {}
        for _, name in ipairs { "y", "reg", "codes", "mean_pi", "max_p", "near", "lse", "sumsq", "dz", "dcodebook",
          "dlog_tau" } do
          list[#list + 1] = r[name] and r[name]:bytes()
        end
        return table.concat(list)
      end
      local one = H.with_threads(1, bits)
      for n = 2, 5 do assert.is_true(one == H.with_threads(n, bits), n .. " threads, " .. regularizer) end
    end
  end)

  it("gives a row the same output in any order of rows", function()
    local z, book = near_codes(2000, 1, 3, 700, 0.02)
    local order = {}
    for i = 1, 2000 do order[i] = (i * 7 * 11) % 2000 end
    order = vx.tensor(order, { dtype = "i32" })
    local dy = vx.randn { 2000, 1, 3 }
    local function turned(x) return ops.gather(x:reshape { 2000, -1 }, order):reshape(x:shape()) end
    local a = pass(z, book, 0.003, { regularizer = "none", dy = dy })
    local b = pass(turned(z), book, 0.003, { regularizer = "none", dy = turned(dy) })
    for _, name in ipairs { "y", "lse", "dz" } do
      assert.is_true(turned(a[name]):bytes() == b[name]:bytes(), name)
    end
  end)
end)
