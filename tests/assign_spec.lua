-- ops.assign by cells: rows that are many meet only the codes near them; the same rows a few at a time meet all codes,
-- as kernels/quantize/assign.c decides by their number. The codes must be the same, ties and rounding included.

local H = require "tests.helper"
local vx = H.vx
local ops = vx.ops

local FEW, MANY = 2000, 8500 -- rows on both sides of the decision

--- Codes of the rows in slices that are too small for cells.
local function by_all_codes(z, book, metric)
  local parts = {}
  for first = 1, z:size(1), FEW do
    parts[#parts + 1] = ops.assign(z:narrow(1, first, math.min(FEW, z:size(1) - first + 1)), book, metric):bytes()
  end
  return table.concat(parts)
end

local function check(z, book, what)
  for _, metric in ipairs { "euclid", "cosine" } do
    assert.is_true(ops.assign(z, book, metric):bytes() == by_all_codes(z, book, metric), what .. ", " .. metric)
  end
end

--- N rows, each `noise` around a random one of M codes, and the codes: (N,G,D) and (G,M,D).
local function near_codes(N, G, D, M, noise)
  local book, z = vx.randn { G, M, D }, {}
  for g = 1, G do
    local index = ops.floor(ops.affine(vx.rand { N }, M, 0)):to "i32"
    z[g] = ops.add(ops.gather(book:select(1, g), index), ops.affine(vx.randn { N, D }, noise, 0)):reshape { N, 1, D }
  end
  return ops.cat(2, unpack(z)), book
end

describe("assign by cells", function()
  before_each(function() vx.seed(1) end)

  it("gives the codes that all codes give, at every width and size", function()
    for _, s in ipairs { { 3, 1024 }, { 1, 520 }, { 2, 700 }, { 4, 1025 }, { 5, 2111 }, { 8, 600 }, { 17, 512 },
      { 33, 1100 } } do
      local D, M = s[1], s[2]
      check(vx.randn { MANY, 1, D }, vx.randn { 1, M, D }, "rows elsewhere, D " .. D)
      local z, book = near_codes(MANY, 1, D, M, 0.02)
      check(z, book, ("near codes, D %d, M %d"):format(D, M))
    end
    local z, book = near_codes(MANY, 2, 3, 1000, 0.1)
    check(z, book, "two groups")
    z, book = near_codes(20000, 1, 3, 20000, 0.01)
    check(z:narrow(1, 1, 4000), book, "313 cells")
  end)

  it("gives ties to the lowest code", function()
    local z, some = near_codes(MANY, 1, 3, 100, 0.02)
    local twice = ops.cat(2, some, some, some, some, some, some, some)
    check(z, twice, "every code seven times")
    assert.is_true(ops.assign(z, twice, "euclid"):bytes() == ops.assign(z, some, "euclid"):bytes())
    local T = H.generator(3)
    for _, D in ipairs { 2, 3, 4 } do -- a lattice with points twice; rows on it and halfway are exact ties
      local book = T({ 1, 900, D }, { dtype = "i32", low = -5, high = 5 }):to "f32"
      z = ops.affine(T({ MANY, 1, D }, { dtype = "i32", low = -13, high = 13 }):to "f32", 0.5, 0)
      check(z, book, "lattice of " .. D)
    end
    check(z, vx.ones { 1, 600, 4 }, "one point")
    check(z, vx.zeros { 1, 600, 4 }, "zero")
  end)

  it("is not misled by rounding: scales, offsets, rows far away, codes of very different length", function()
    local z, book = near_codes(MANY, 1, 3, 1024, 0.02)
    for _, scale in ipairs { 1e-30, 1e-19, 1e-12, 1e-4, 1e4, 1e12, 1e14, 1e16, 1e18 } do
      check(ops.affine(z, scale, 0), ops.affine(book, scale, 0), "scale " .. scale)
    end
    for _, offset in ipairs { 10, 1e3, 1e5, 4e6, 1e9 } do
      check(ops.affine(z, 1, offset), ops.affine(book, 1, offset), "offset " .. offset)
      check(ops.affine(z, 1, offset), book, "rows off by " .. offset)
      check(ops.affine(z, 100, offset), ops.affine(book, 100, offset), "wide, offset " .. offset)
    end
    local lengths = ops.exp(ops.affine(vx.randn { 1, 1024, 1 }, 8, 0))
    check(z, ops.mul(book, lengths), "lengths from 1e-10 to 1e10")
    check(ops.mul(z, ops.exp(ops.affine(vx.randn { MANY, 1, 1 }, 8, 0))), book, "rows of all lengths")
    local line = book:clone()
    line:narrow(3, 1, 2):zero()
    check(z, line, "codes on a line")
    line:narrow(2, 1, 300):zero()
    check(ops.mul(z, ops.cat(1, vx.zeros { 500, 1, 3 }, vx.ones { MANY - 500, 1, 3 })), line, "zero rows and codes")
  end)

  it("agrees with float64", function()
    local z, book = near_codes(3000, 1, 3, 640, 0.3)
    local rows, codes = z:totable(), book:totable()[1]
    local index = H.flat(ops.assign(z, book, "euclid"))
    for i = 1, #rows, 7 do
      local best, at = math.huge, nil
      for m, q in ipairs(codes) do
        local r = rows[i][1]
        local d = (r[1] - q[1]) ^ 2 + (r[2] - q[2]) ^ 2 + (r[3] - q[3]) ^ 2
        if d < best - 1e-6 then best, at = d, m - 1 end
      end
      local q, r = codes[index[i] + 1], rows[i][1]
      assert.is_true((r[1] - q[1]) ^ 2 + (r[2] - q[2]) ^ 2 + (r[3] - q[3]) ^ 2 <= best + 2e-6, ("%d, %d"):format(i, at))
    end
  end)

  it("does not depend on the number of threads, nor on the order of rows and codes", function()
    local z, book = near_codes(MANY, 1, 3, 1024, 0.02)
    local one = H.with_threads(1, function() return ops.assign(z, book, "euclid"):bytes() end)
    for n = 2, 4 do
      assert.is_true(one == H.with_threads(n, function() return ops.assign(z, book, "euclid"):bytes() end))
    end
    local order = {}
    for i = 1, MANY do order[i] = (i * 3677) % MANY end -- 3677 has no factor in common with 8500
    order = vx.tensor(order, { dtype = "i32" })
    local turned = ops.assign(ops.gather(z:reshape { MANY, 3 }, order):reshape { MANY, 1, 3 }, book, "euclid")
    assert.is_true(ops.gather(ops.assign(z, book, "euclid"):to "f32", order):bytes() == turned:to "f32":bytes())
  end)

  it("names a row that is not finite, and writes nothing", function()
    local z, book = near_codes(MANY, 1, 3, 1024, 0.02)
    z:narrow(1, 8001, 1):fill(0 / 0)
    H.raises(function() ops.assign(z, book, "euclid") end, "row 8000 of z holds a NaN or Inf")
  end)
end)
