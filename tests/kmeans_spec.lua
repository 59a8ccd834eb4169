-- vx.kmeans against plain float64 loops of Lloyd's algorithm, in memory and in files; rows that are few, equal or NaN.

local H = require "tests.helper"
local core = require "vertex.core"
local vx = H.vx

local function data(seed, shape) return H.generator(seed)(shape, { grad = false }) end

--- `count` rows around `centers` points, a tenth as wide as these are apart.
local function clusters(seed, count, centers, width)
  local points, noise, rows = data(seed, { centers, width }):totable(), data(seed + 1, { count, width }):totable(), {}
  for i = 1, count do
    rows[i] = {}
    for j = 1, width do rows[i][j] = 3 * points[(i - 1) % centers + 1][j] + 0.3 * noise[i][j] end
  end
  return vx.tensor(rows)
end

local function squared(a, b)
  local sum = 0
  for j = 1, #a do sum = sum + (a[j] - b[j]) ^ 2 end
  return sum
end

--- Lloyd's algorithm over rows and codes as nested tables: `iterations` times, an empty code staying where it is.
-- Returns the objective, the codes of the rows (0-based) and how many codes have no row.
local function lloyd(rows, codebook, iterations)
  local M, D, nearest = #codebook, #rows[1], {}
  local function assign()
    local objective = 0
    for i, x in ipairs(rows) do
      local best = math.huge
      for m = 1, M do
        local d = squared(x, codebook[m])
        if d < best then best, nearest[i] = d, m end
      end
      objective = objective + best
    end
    return objective / #rows
  end
  local empty = 0
  for _ = 1, iterations do
    assign()
    local sums, counts = {}, {}
    for m = 1, M do
      sums[m], counts[m] = {}, 0
      for j = 1, D do sums[m][j] = 0 end
    end
    for i, x in ipairs(rows) do
      local m = nearest[i]
      counts[m] = counts[m] + 1
      for j = 1, D do sums[m][j] = sums[m][j] + x[j] end
    end
    empty = 0
    for m = 1, M do
      if counts[m] == 0 then empty = empty + 1 end
      for j = 1, D do codebook[m][j] = counts[m] > 0 and sums[m][j] / counts[m] or codebook[m][j] end
    end
  end
  local objective = assign()
  for i = 1, #rows do nearest[i] = nearest[i] - 1 end
  return objective, nearest, empty
end

describe("vx.kmeans", function()
  it("has the objective and the codes of plain float64 loops from the same start", function()
    for _, case in ipairs { { 500, 8, 5, 12 }, { 301, 7, 3, 25 }, { 1000, 16, 20, 6 } } do
      local N, M, D, iterations = unpack(case)
      local x = clusters(N, N, M, D)
      local start = x:narrow(1, 1, M):contiguous()
      local found = vx.kmeans(x, M, { start = start, iterations = iterations, tolerance = 0 })
      local objective, codes, empty = lloyd(x:totable(), start:totable(), found.iterations)
      assert.equal(0, empty) -- else the two would differ by intent
      assert.is_true(math.abs(found.objective - objective) <= 1e-4 * objective,
        ("%.8g, float64 %.8g"):format(found.objective, objective))
      assert.same(codes, H.flat(found.codes))
      assert.same({ M, D }, found.codebook:shape())
      assert.equal("i32", found.codes:dtype())
    end
  end)

  it("only assigns after 0 iterations, and never gets worse with more", function()
    local x, before = clusters(5, 400, 9, 4), math.huge
    local start = x:narrow(1, 1, 12):contiguous()
    for _, iterations in ipairs { 0, 1, 2, 4, 8 } do
      local found = vx.kmeans(x, 12, { start = start, iterations = iterations, tolerance = 0 })
      if iterations == 0 then assert.equal(start:bytes(), found.codebook:bytes()) end
      assert.is_true(found.objective <= before * (1 + 1e-6))
      before = found.objective
    end
  end)

  it("ends where the codes rest, or where progress says so", function()
    local x = clusters(6, 300, 4, 3)
    local found = vx.kmeans(x, 4)
    assert.is_true(found.iterations < 100)
    local again = vx.kmeans(x, 4, { start = found.codebook, iterations = 1 })
    assert.is_true(math.abs(again.objective - found.objective) <= 1e-4 * found.objective)
    local seen = {}
    vx.kmeans(x, 4, { tolerance = 0, progress = function(i)
      seen[#seen + 1] = i
      return i == 3
    end })
    assert.same({ 1, 2, 3 }, seen)
  end)

  it("moves codes without rows to the rows farthest from theirs", function()
    local x = clusters(7, 200, 6, 4)
    local far = vx.full({ 6, 4 }, 1000)
    far:narrow(1, 1, 1):copy(x:narrow(1, 1, 1))
    for m = 2, 6 do far:narrow(1, m, 1):fill(1000 * m) end -- no row is nearest to these
    local once = vx.kmeans(x, 6, { start = far, iterations = 1 })
    assert.equal(5, once.empty)
    -- the one used code is at the mean of all rows; the others are the five rows farthest from it
    local rows, mean = x:totable(), x:mean(1):totable()
    table.sort(rows, function(a, b) return squared(a, mean) > squared(b, mean) end)
    for m = 2, 6 do
      assert.same(rows[m - 1], once.codebook[m]:totable())
    end
    local found = vx.kmeans(x, 6, { start = far })
    assert.equal(0, found.empty)
    for _, n in ipairs(H.flat(vx.ops.count_codes(found.codes:reshape { 200, 1 }, 6))) do assert.is_true(n > 0) end
  end)

  it("repeats fewer rows than codes with a little noise", function()
    for _, start in ipairs { "k-means++", "random" } do
      local x = data(8, { 5, 3 })
      local found = vx.kmeans(x, 12, { start = start })
      assert.equal(7, found.repeated)
      local seen, rows, codebook = {}, x:totable(), found.codebook:totable()
      for m = 1, 12 do
        local key = table.concat(codebook[m], " ")
        assert.is_nil(seen[key], "two codes are equal")
        seen[key] = true
        local best = math.huge
        for _, row in ipairs(rows) do best = math.min(best, squared(row, codebook[m])) end
        assert.is_true(best < 1e-3, "a code is far from all rows")
      end
      assert.is_true(found.objective < 1e-6)
    end
    assert.equal(0, vx.kmeans(data(8, { 12, 3 }), 12).repeated)
  end)

  it("takes rows that repeat: as many codes as there are different rows have one each", function()
    local different, rows = data(9, { 4, 3 }):totable(), {}
    for i = 1, 80 do rows[i] = different[(i - 1) % 4 + 1] end
    for _, start in ipairs { "k-means++", "random" } do
      local found = vx.kmeans(vx.tensor(rows), 6, { start = start })
      assert.is_true(found.objective < 1e-10, start)
      local of = {}
      for i, c in ipairs(H.flat(found.codes)) do
        local group = (i - 1) % 4
        of[group] = of[group] or c
        assert.equal(of[group], c)
      end
    end
  end)

  it("takes rows that are all equal", function()
    local found = vx.kmeans(vx.full({ 30, 3 }, 2.5), 4)
    assert.equal(0, found.objective)
    for _, value in ipairs(H.flat(found.codebook)) do assert.equal(2.5, value) end
    for _, c in ipairs(H.flat(found.codes)) do assert.equal(0, c) end -- ties go to the lowest
  end)

  it("refuses NaN, Inf, no rows, other shapes and unknown options by name", function()
    for _, bad in ipairs { 0 / 0, math.huge } do
      for _, start in ipairs { "k-means++", "random" } do
        local x = data(10, { 50, 3 })
        x:narrow(1, 17, 1):fill(bad)
        local ok, message = pcall(vx.kmeans, x, 4, { start = start })
        assert.is_false(ok)
        assert.is_truthy(message:find("NaN", 1, true), message)
      end
    end
    local x = data(10, { 50, 3 })
    H.raises(function() vx.kmeans(vx.zeros { 0, 3 }, 4) end, "kmeans", "0 rows")
    H.raises(function() vx.kmeans(vx.zeros { 2, 3, 4 }, 4) end, "kmeans", "(2,3,4)")
    H.raises(function() vx.kmeans(vx.zeros({ 4, 3 }, { dtype = "i32" }), 2) end, "kmeans", "i32")
    H.raises(function() vx.kmeans({ 1, 2 }, 4) end, "kmeans", "vx.data.vectors")
    H.raises(function() vx.kmeans(x, 0) end, "codes", "0")
    H.raises(function() vx.kmeans(x, 2.5) end, "codes", "2.5")
    H.raises(function() vx.kmeans(x, 4, { start = "kmeans" }) end, "start", "'kmeans'")
    H.raises(function() vx.kmeans(x, 4, { iteration = 3 }) end, "iteration", "iterations")
    H.raises(function() vx.kmeans(x, 4, { tolerance = -1 }) end, "tolerance", "-1")
    H.raises(function() vx.kmeans(x, 4, { start = vx.zeros { 3, 3 } }) end, "(3,3)", "(4,3)")
  end)

  it("leaves the chosen rows as they were where x is refused", function()
    local index = vx.full({ 3 }, 7):to "i32"
    local x = vx.tensor { { 3e38, 0 }, { -3e38, 0 }, { 0, 0 / 0 } }
    H.raises(function() core.op.kmeans_start(index, x, 1, 0) end, "kmeans_start", "row 2 of x holds a NaN")
    assert.same({ 7, 7, 7 }, index:totable())
  end)

  it("gives for vectors in files what the tensor gives", function()
    local x = clusters(11, 500, 7, 6)
    local path = H.scratch "kmeans.npy"
    vx.save(path, x)
    local set = vx.data.vectors { path = path, shuffle = false }
    local start = x:narrow(1, 3, 9):contiguous()
    for _, options in ipairs { { start = start }, { start = "random", seed = 5 }, { seed = 6 } } do
      local inside, outside = vx.kmeans(x, 9, options), vx.kmeans(set, 9, options)
      assert.equal(inside.codebook:bytes(), outside.codebook:bytes())
      assert.equal(inside.codes:bytes(), outside.codes:bytes())
      assert.equal(inside.objective, outside.objective)
      assert.equal(inside.iterations, outside.iterations)
    end
    set:close()
  end)

  it("has the same bits for any number of threads, and for the same seed", function()
    local x = clusters(12, 3000, 20, 8)
    local first
    for _, threads in ipairs { 1, 2, 3, 7 } do
      H.with_threads(threads, function()
        local found = vx.kmeans(x, 32, { seed = 3 })
        local bytes = { found.codebook:bytes(), found.codes:bytes(), found.objective, found.iterations }
        first = first or bytes
        assert.same(first, bytes)
      end)
    end
    assert.are_not.equal(first[1], vx.kmeans(x, 32, { seed = 4 }).codebook:bytes())
  end)
end)
