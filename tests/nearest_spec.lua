-- What is nearest, far from the origin and at the ends of float32's range: assign, the hard quantizers, encode, kmeans,
-- knn and vertex_knn against float64 distances, on the CPU (in every SIMD variant) and on emu:0.

local H = require "tests.helper"
local core = require "vertex.core"
local vx = H.vx
local ops = vx.ops

local function squared(a, b)
  local sum = 0
  for j = 1, #a do sum = sum + (a[j] - b[j]) ^ 2 end
  return sum
end

--- Fails unless each code (0-based) of the rows is the nearest one, or no farther than rounding of `spread`.
local function check_codes(rows, codebook, codes, spread, what)
  for i, x in ipairs(rows) do
    local least = math.huge
    for _, q in ipairs(codebook) do least = math.min(least, squared(x, q)) end
    local chosen = squared(x, codebook[codes[i] + 1])
    if chosen > least + 2e-6 * #x * spread ^ 2 then
      error(("%s: row %d has code %d at %.9g, the nearest is at %.9g"):format(what, i, codes[i], chosen, least), 2)
    end
  end
end

--- offset + spread (numbers in -1 .. 1), as a tensor of float32 on a device.
local function cloud(seed, rows, width, offset, spread, device)
  local flat = H.random(seed):list(rows * width, -1, 1)
  for i = 1, #flat do flat[i] = offset + spread * flat[i] end
  local here = vx.empty({ rows, width }, { device = "cpu" }):fromtable(flat)
  return vx.empty({ rows, width }, { device = device }):copy(here)
end

local function assign(x, codebook)
  local n, D, M = x:size(1), x:size(2), codebook:size(1)
  return H.flat(ops.assign(x:reshape { n, 1, D }, codebook:reshape { 1, M, D }, "euclid"))
end

--- Where data may lie, { offset, spread }.
local PLACES = { { 0, 1 }, { 1000, 1 }, { -1e6, 100 }, { 4e6, 500 }, { 0, 1e20 }, { 3e21, 1e19 }, { 0, 1e-25 },
  { 1e-20, 1e-24 }, { 0, 1e38 }, { 0, 1e-37 } }

local function specs(device, tag)
  local function tensor(data) return vx.tensor(data, { device = device }) end

  describe(device, function()
    it("assign: points of a map, millions of metres from the origin" .. tag, function()
      local codes = { { 4208292, 2335623.5, 4171305 }, { 4208843.5, 2334869.5, 4171171.5 } }
      assert.same({ 1 }, assign(tensor { { 4208848, 2334863.5, 4171170.25 } }, tensor(codes)))
    end)

    it("assign is the nearest code at any offset and scale" .. tag, function()
      for _, place in ipairs(PLACES) do
        for _, size in ipairs { { 60, 3, 40 }, { 30, 17, 70 }, { 25, 64, 2 }, { 5, 4, 1 } } do
          local rows, D, M = unpack(size)
          local x = cloud(1, rows, D, place[1], place[2], device)
          local codebook = cloud(2, M, D, place[1], place[2], device)
          check_codes(x:totable(), codebook:totable(), assign(x, codebook), place[2],
            ("offset %g, spread %g, (%d,%d,%d)"):format(place[1], place[2], rows, D, M))
        end
      end
    end)

    it("assign is the nearest code where many rows meet many codes" .. tag, function()
      for _, place in ipairs { { 1000, 1 }, { 4e6, 500 }, { 0, 1e20 }, { 0, 1e-25 } } do
        local x = cloud(12, 2200, 3, place[1], place[2], device)
        local codebook = cloud(13, 600, 3, place[1], place[2], device)
        local rows, codes = x:narrow(1, 1, 50):totable(), assign(x, codebook)
        check_codes(rows, codebook:totable(), codes, place[2], "offset " .. place[1])
      end
    end)

    it("assign: rows very far from all codes, and codes all equal" .. tag, function()
      local codebook = cloud(3, 50, 3, 5, 1e-3, device)
      local rows = tensor { { 3e38, -3e38, 0 }, { -3e38, 1e38, 1 }, { 1e22, 0, -1e22 }, { 5, 5, 5 } }
      check_codes({ rows:totable()[4] }, codebook:totable(), { assign(rows, codebook)[4] }, 1e-3, "the near row")
      local codes, book = assign(rows, codebook), codebook:totable()
      for i, direction in ipairs { { 3, -3, 0 }, { -3, 1, 0 }, { 1, 0, -1 } } do -- the largest product is nearest
        local best, most = nil, -math.huge
        for m, q in ipairs(book) do
          local product = direction[1] * q[1] + direction[2] * q[2] + direction[3] * q[3]
          if product > most then best, most = m - 1, product end
        end
        assert.equal(best, codes[i], "row " .. i)
      end
      assert.same({ 0, 0, 0, 0 }, assign(rows, vx.full({ 9, 3 }, 1e6 / 3, { device = device })))
    end)

    --- Codes of a small cluster among wide ones, or beside one that is far off; rows in the cluster.
    local function clustered(D, far)
      local cluster, wide = cloud(21, 16, D, 500, 1e-3, "cpu"), cloud(22, 48, D, 0, 1000, "cpu")
      if far then cluster, wide = cloud(21, 16, D, 0, 1, "cpu"), vx.full({ 1, D }, far, { device = "cpu" }) end
      local codebook = vx.empty({ 16 + wide:size(1), D }, { device = device }):copy(vx.cat(1, wide, cluster))
      return cloud(23, 12, D, far and 0 or 500, far and 1 or 1e-3, device), codebook
    end

    it("assign and knn: codes in a cluster, and beside a far one" .. tag, function()
      for _, D in ipairs { 1, 2, 3, 8, 32 } do
        for _, far in ipairs { false, 1e3, 1e5, 1e10, 1e24, 1e37 } do
          local rows, codebook = clustered(D, far)
          local book, codes, _, near = codebook:totable(), assign(rows, codebook), ops.knn(rows, codebook, 2)
          for i, x in ipairs(rows:totable()) do
            local all = {}
            for m, q in ipairs(book) do all[m] = squared(x, q) end
            local sorted = { unpack(all) }
            table.sort(sorted)
            local what = ("D %d, far %s, row %d"):format(D, far, i)
            assert.equal(sorted[1], all[codes[i] + 1], what)
            for k = 1, 2 do assert.near(sorted[k], all[near:totable()[i][k] + 1], 1e-5 * sorted[k], what) end
          end
        end
      end
    end)

    it("assign under cosine: angles far below float32's rounding of a cosine" .. tag, function()
      local x, codebook = cloud(24, 12, 3, 1000, 1, "cpu"), cloud(25, 30, 3, 1000, 1, "cpu")
      local codes = H.flat(ops.assign(vx.empty({ 12, 1, 3 }, { device = device }):copy(x:reshape { 12, 1, 3 }),
        vx.empty({ 1, 30, 3 }, { device = device }):copy(codebook:reshape { 1, 30, 3 }), "cosine"))
      for i, a in ipairs(x:totable()) do
        local best, most = nil, -math.huge
        for m, q in ipairs(codebook:totable()) do
          local cosine = (a[1] * q[1] + a[2] * q[2] + a[3] * q[3]) / math.sqrt(q[1] ^ 2 + q[2] ^ 2 + q[3] ^ 2)
          if cosine > most then best, most = m - 1, cosine end
        end
        assert.equal(best, codes[i])
      end
    end)

    it("assign under cosine: rows and codes of any length" .. tag, function()
      local x, codebook = cloud(4, 40, 5, 0, 1, "cpu"), cloud(5, 30, 5, 0, 1, "cpu")
      local function codes(scale, of_codes)
        local z = vx.empty({ 40, 1, 5 }, { device = device }):copy((x * scale):reshape { 40, 1, 5 })
        local q = vx.empty({ 1, 30, 5 }, { device = device }):copy((codebook * of_codes):reshape { 1, 30, 5 })
        return H.flat(ops.assign(z, q, "cosine"))
      end
      local expected = codes(1, 1)
      assert.same(expected, codes(2 ^ 120, 1))
      assert.same(expected, codes(2 ^ 127, 2 ^ 126))
      assert.same(expected, codes(2 ^ -80, 2 ^ -30))
    end)

    it("knn is right at any offset and scale" .. tag, function()
      for _, place in ipairs(PLACES) do
        for _, k in ipairs { 1, 3, 20 } do
          local x, y = cloud(6, 30, 5, place[1], place[2], device), cloud(7, 33, 5, place[1], place[2], device)
          local distances, near = ops.knn(x, y, k)
          local what = ("offset %g, spread %g, k %d"):format(place[1], place[2], k)
          local found, d, b = near:totable(), distances:totable(), y:totable()
          for i, row in ipairs(x:totable()) do
            local all = {}
            for j = 1, #b do all[j] = squared(row, b[j]) end
            local sorted = { unpack(all) }
            table.sort(sorted)
            for j = 1, k do
              local here = all[found[i][j] + 1]
              assert.is_true(math.abs(here - sorted[j]) <= 1e-5 * sorted[j], what)
              local held = here > 3.4028e38 and d[i][j] == math.huge
                or math.abs(d[i][j] - here) <= 1e-5 * here + 1.2e-38
              assert.is_true(held, ("%s: %g, expected %g"):format(what, d[i][j], here))
            end
          end
        end
      end
    end)

    it("vertex_knn refuses a row whose squares overflow, by its number" .. tag, function()
      for _, k in ipairs { 2, 20 } do
        for _, case in ipairs { { 45, true }, { 1000, true }, { 1e20, false }, { -3e38, false } } do
          local ok, message = pcall(function()
            local p = vx.full({ 30, 3 }, 0.25)
            for i = 7, 30 do p[i] = case[1] end
            ops.vertex_knn(vx.empty({ 30, 3 }, { device = device }):copy(p), k, "l2", case[2])
            vx.sync(device)
          end)
          assert.is_false(ok)
          local text = "vertex_knn: row 6 of p is no distribution: its squares overflow float32"
          assert.is_truthy(message:find(text, 1, true), message)
        end
      end
      -- what does not overflow is ordered as float64 orders it, and so is cross-entropy at any size
      local p = tensor { { 1e18, 0 }, { 2e18, 0 }, { -1e18, 5 } }
      local _, near = ops.vertex_knn(p, 3, "l2")
      assert.equal(1, near:totable()[2][3])
      local deviations, rows = ops.vertex_knn(tensor { { 3e38, -3e38 }, { -3e38, 3e38 }, { 0, 0 } }, 3, "ce", true)
      assert.same({ { 0, 2, 1 }, { 1, 2, 0 } }, rows:totable())
      assert.is_true(deviations:totable()[1][3] > 2.9e38)
    end)

    it("hard quantizers and encode" .. tag, function()
      for _, method in ipairs { "ste-euclid", "re-euclid", "ema-euclid" } do
        for _, place in ipairs { { 1000, 1 }, { 4e6, 500 }, { 0, 1e20 }, { 0, 1e-25 } } do
          local q = vx.quantizer(method, { dim = 6, codes = 40, groups = 2, seed = 1 })
          q:to(device)
          local book, z = cloud(8, 80, 3, place[1], place[2], device), cloud(9, 50, 6, place[1], place[2], device)
          q.codebook:copy(book:reshape { 2, 40, 3 })
          q:eval()
          local codes, of_output = q:encode(z):totable(), q:forward(z).codes:totable()
          assert.same(codes, of_output)
          local book_rows, rows = q.codebook:totable(), z:totable()
          for g = 1, 2 do
            local points, mine = {}, {}
            for i = 1, 50 do
              points[i], mine[i] = { rows[i][3 * g - 2], rows[i][3 * g - 1], rows[i][3 * g] }, codes[i][g]
            end
            check_codes(points, book_rows[g], mine, place[2], method .. " at " .. place[1])
          end
        end
      end
    end)

    it("kmeans finds clusters at any offset and scale" .. tag, function()
      for _, place in ipairs(PLACES) do
        local points, noise = cloud(10, 6, 4, 0, 1, "cpu"):totable(), cloud(11, 90, 4, 0, 0.01, "cpu"):totable()
        local rows = {}
        for i = 1, 90 do
          rows[i] = {}
          for j = 1, 4 do rows[i][j] = place[1] + place[2] * (points[(i - 1) % 6 + 1][j] + noise[i][j]) end
        end
        local x = tensor(rows)
        rows = x:totable()
        local found = vx.kmeans(x, 6, { seed = 3 })
        local what, codes, seen = ("offset %g, spread %g"):format(place[1], place[2]), H.flat(found.codes), {}
        for i = 1, 90 do
          local first = codes[(i - 1) % 6 + 1]
          seen[first] = true
          assert.equal(first, codes[i], what)
        end
        local count, book = 0, found.codebook:totable()
        for _ in pairs(seen) do count = count + 1 end
        assert.equal(6, count, what)
        local objective = 0
        for i = 1, 90 do objective = objective + squared(rows[i], book[codes[i] + 1]) / 90 end
        assert.is_true(math.abs(found.objective - objective) <= 1e-3 * objective, what)
        for m = 0, 5 do -- each code is the mean of its rows
          for j = 1, 4 do
            local sum, n = 0, 0
            for i = 1, 90 do
              if codes[i] == m then sum, n = sum + rows[i][j], n + 1 end
            end
            local error_ = math.abs(book[m + 1][j] - sum / n)
            assert.is_true(error_ <= 1e-6 * place[2] + 1.2e-7 * math.abs(place[1]), what .. ": " .. error_)
          end
        end
      end
    end)
  end)
end

describe("nearest", function()
  it("assign is as exact as knn for codes in clusters far apart, on the CPU", function()
    for _, case in ipairs { { 100, 3 }, { 1000, 3 }, { 1e5, 3 }, { 1000, 40 }, { 1000, 1 } } do
      local far, D = unpack(case)
      local x, y = cloud(20, 500, D, 0, 1, "cpu"), cloud(21, 300, D, 0, 1, "cpu")
      x:narrow(1, 1, 250):copy(x:narrow(1, 1, 250) + far)
      y:narrow(1, 1, 150):copy(y:narrow(1, 1, 150) + far)
      local codes, rows, book = assign(x, y), x:totable(), y:totable()
      for i = 1, 500 do
        local least = math.huge
        for m = 1, 300 do least = math.min(least, squared(rows[i], book[m])) end
        local chosen = squared(rows[i], book[codes[i] + 1])
        assert.is_true(chosen <= least * (1 + 1e-5), ("%d dimensions, %g apart: row %d"):format(D, far, i))
      end
    end
  end)

  specs("cpu", "")
  specs("emu:0", "")
  if pcall(core.device_number, "cuda:0") then specs("cuda:0", " #cuda") end

  describe("in every SIMD variant", function()
    for _, variant in ipairs(core.cpu_variants()) do
      if variant.runs then
        it("assign, knn and vertex_knn with VERTEX_SIMD=" .. H.tagged(variant.name), function()
          local out, ok = H.child([[
            local vx = require "vertex"
            vx.device "cpu"
            local z = vx.tensor { { { 4208848, 2334863.5, 4171170.25 } } }
            local codes = vx.tensor { { { 4208292, 2335623.5, 4171305 }, { 4208843.5, 2334869.5, 4171171.5 } } }
            print(vx.assign(z, codes, "euclid"):item())
            for _, scale in ipairs { 1e20, 1e-25, 3e38 } do
              local x = vx.tensor { { 0.5, 1 }, { -0.5, 0.25 }, { 1, -1 } } * scale
              local codes = vx.assign(x:reshape { 3, 1, 2 }, x:reshape { 1, 3, 2 }, "euclid")
              print(table.concat(codes:reshape { 3 }:totable()),
                table.concat(select(2, vx.knn(x, x, 1, true)):reshape { 3 }:totable()))
            end
            print(pcall(vx.vertex_knn, vx.full({ 7, 3 }, 45), 2, "l2", true))]], "VERTEX_SIMD=" .. variant.name)
          assert.is_true(ok, out)
          local lines = {}
          for line in out:gmatch "[^\n]+" do lines[#lines + 1] = line end
          assert.same({ "1", "012\t101", "012\t101", "012\t101" }, { lines[1], lines[2], lines[3], lines[4] })
          assert.is_truthy(lines[5]:find("row 0 of p is no distribution", 1, true), out)
        end)
      end
    end
  end)
end)
