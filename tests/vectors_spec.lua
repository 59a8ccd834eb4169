-- Vectors in files: batches are the rows of the files, in the order of the seed, and go on where a position says.

local vectors = require "vertex.data.vectors"
local npy = require "vertex.npy"
local vx = require "vertex"
local H = require "tests.helper"
local core = require "vertex.core"
local lfs = require "lfs"

local function message(...)
  local ok, text = pcall(...)
  assert.is_false(ok)
  return tostring(text)
end

--- Ten rows {n, 10 n, 100 n} in a file.
local function rows_file(path, first, count)
  local list = {}
  for i = 1, count or 10 do
    local n = (first or 0) + i - 1
    list[i] = { n, 10 * n, 100 * n }
  end
  npy.save(path, vx.tensor(list))
  return path
end

local function check(x, index)
  for i, n in ipairs(index:totable()) do assert.same({ n, 10 * n, 100 * n }, x[i]:totable()) end
end

describe("vectors", function()
  local path = rows_file(H.scratch "rows.npy")

  it("give every row once an epoch, in another order each, the same for a seed", function()
    local set, seen, orders = vectors { path = path, batch = 4, epochs = 2 }, {}, {}
    assert.same({ 10, 3 }, { set:size(), set:width() })
    while true do
      local x, index = set:next()
      if not x then break end
      check(x, index)
      for _, n in ipairs(index:totable()) do orders[#orders + 1], seen[n] = n, (seen[n] or 0) + 1 end
    end
    for n = 0, 9 do assert.equal(2, seen[n]) end
    assert.not_same({ unpack(orders, 1, 10) }, { unpack(orders, 11, 20) })
    assert.equal(20, set:position())
    local again = vectors { path = path, batch = 20 }
    assert.same(orders, (select(2, again:next())):totable())
    assert.not_same(orders, (select(2, vectors({ path = path, batch = 20, seed = 2 }):next())):totable())
  end)

  it("go on from a position with the batches that would have come", function()
    local whole = vectors { path = path, batch = 3 }
    for _ = 1, 5 do whole:next() end
    local rest = vectors { path = path, batch = 3, position = 15 }
    for _ = 1, 4 do
      local a, b = select(2, whole:next()):totable(), select(2, rest:next()):totable()
      assert.same(a, b)
    end
  end)

  it("come in the order of the files without shuffling, from a folder of files, column-major and as integers",
    function()
    local folder = H.scratch "vectors-folder"
    lfs.mkdir(folder)
    rows_file(folder .. "/b.npy", 4, 6)
    rows_file(folder .. "/a.npy", 0, 4)
    local set = vectors { path = folder, batch = 10, shuffle = false, epochs = 1 }
    local x, index = set:next()
    check(x, index)
    assert.same({ 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 }, index:totable())
    assert.is_nil((set:next()))
    assert.same({ { 3, 30, 300 }, { 4, 40, 400 } }, set:read(3, 2):totable())
    assert.same({ { 9, 90, 900 }, { 0, 0, 0 } }, set:take(vx.tensor({ 9, 0 }, { dtype = "i32" })):totable())
    local header = "{'descr': '>i2', 'fortran_order': True, 'shape': (2, 3), }\n"
    H.write(H.scratch "f.npy", "\147NUMPY\1\0" .. string.char(#header, 0) .. header .. "\0\1\0\2\0\3\0\4\0\5\0\6")
    assert.same({ { 1, 3, 5 }, { 2, 4, 6 } }, vectors({ path = H.scratch "f.npy" }):read(0, 2):totable())
  end)

  it("come from a matrix of a safetensors file", function()
    local file = H.scratch "v.safetensors"
    vx.save(file, { a = vx.tensor { { 1, 2 }, { 3, 4 } }, b = vx.tensor { { 5, 6 } }, c = vx.tensor { 7 } })
    assert.same({ { 1, 2 }, { 3, 4 } }, vectors({ path = file, tensor = "a" }):read(0, 2):totable())
    local text = message(vectors, { path = file })
    assert.truthy(text:find("say which by `tensor`; it holds the matrices a, b", 1, true), text)
    assert.truthy(message(vectors, { path = file, tensor = "d" }):find("has no tensor 'd'", 1, true))
    assert.truthy(message(vectors, { path = file, tensor = "c" }):find("'c' has the shape (1)", 1, true))
  end)

  it("refuse what they cannot give, by name", function()
    assert.truthy(message(vectors, { path = H.scratch "none" }):find "no such file or folder")
    assert.truthy(message(vectors, { path = path, bach = 3 }):find "unknown option 'bach'")
    assert.truthy(message(vectors, { path = path, batch = 0 }):find "batch is 0, expected an integer of 1 or more")
    assert.truthy(message(vectors, {}):find "path is a nil")
    local folder = H.scratch "vectors-empty"
    lfs.mkdir(folder)
    assert.truthy(message(vectors, { path = folder }):find "there is no .npy file")
    npy.save(H.scratch "cube.npy", vx.zeros { 2, 3, 4 })
    assert.truthy(message(vectors, { path = H.scratch "cube.npy" }):find("has the shape (2,3,4), expected", 1, true))
    rows_file(folder .. "/a.npy")
    npy.save(folder .. "/b.npy", vx.zeros { 2, 4 })
    assert.truthy(message(vectors, { path = folder }):find "rows of 3 numbers, .*b.npy rows of 4")
    npy.save(H.scratch "nan.npy", vx.tensor { { 1, 2 }, { 3, 0 / 0 } })
    local set = vectors { path = H.scratch "nan.npy", shuffle = false }
    assert.truthy(message(set.next, set):find "nan.npy: row 1 %(0%-based%) holds a NaN or Inf")
    assert.truthy(message(set.read, set, 1, 2):find "row 2, of 0 .. 1")
    set:close()
    assert.truthy(message(set.next, set):find "closed")
  end)

  it("say that a file became shorter instead of ending the process", function()
    local short = rows_file(H.scratch "short.npy", 0, 4000)
    local set = vectors { path = short, batch = 4000 }
    local f = io.open(short, "wb")
    f:write "x"
    f:close()
    assert.truthy(message(set.next, set):find "short.npy: the file has become shorter")
  end)

  it("hold no tensor", function()
    local set = vectors { path = path, batch = 7 }
    vx.step(function() set:next() end)
    collectgarbage()
    collectgarbage()
    local before = core.memory("cpu").live
    for _ = 1, 50 do vx.step(function() set:next() end) end
    assert.equal(before, core.memory("cpu").live)
  end)
end)
