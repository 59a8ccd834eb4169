-- Streams of images: the same batches whatever the workers, queue and cache; crops, epochs, resuming, broken files,
-- interrupts.

local lfs = require "lfs"
local data = require "vertex.data.images"
local core = require "vertex.core"
local vx = require "vertex"

local folder = "tests/fixtures/images"
local cases = dofile "tests/fixtures/images.lua"

local function options(extra)
  local o = { path = folder, split = "all", size = 20, batch = 4, seed = 3, crop = "random", flip = true }
  for name, value in pairs(extra or {}) do o[name] = value end
  return o
end

-- Up to n batches as strings of bytes, with their positions; and the broken files, as "name: reason".
local function run(extra, n)
  local set, batches, positions = data.images(options(extra)), {}, {}
  for i = 1, n do
    local x, index = set:next()
    if not x then break end
    batches[i], positions[i] = x:bytes() .. index:bytes(), set:position()
    x:release()
  end
  local broken = {}
  for i, b in ipairs(set:broken()) do broken[i] = b.path:match "[^/]*$" .. ": " .. b.reason end
  set:close()
  return batches, positions, broken
end

local function raised(f, ...)
  local ok, message = pcall(f, ...)
  assert.is_false(ok)
  return message
end

local folders = {}
local function folder_of(contents)
  local path = os.tmpname()
  os.remove(path)
  assert(lfs.mkdir(path))
  folders[#folders + 1] = path
  for name, bytes in pairs(contents) do
    local file = assert(io.open(path .. "/" .. name, "wb"))
    file:write(bytes)
    file:close()
  end
  return path
end

describe("a stream", function()
  teardown(function()
    for _, path in ipairs(folders) do os.execute("rm -rf '" .. path .. "'") end
  end)

  for _, case in ipairs {
    { "random crops", {} },
    { "centre crops", { crop = "center", flip = false } },
    { "crops without resize", { resize = "none", size = 24 } },
    { "files in order", { shuffle = false, filter = "bicubic" } },
  } do
    it("gives the same batches whatever the workers, queue and cache: " .. case[1], function()
      local function with(extra)
        for name, value in pairs(case[2]) do extra[name] = value end
        return run(extra, 25)
      end
      local batches, positions, broken = with { workers = 1, queue = 1, cache_bytes = 0 }
      assert.equal(25, #batches)
      for _, other in ipairs { { workers = 2 }, { workers = 7, queue = 3 }, { workers = 5, cache_bytes = 4000 },
        { workers = 16, queue = 100 } } do
        local b, p, s = with(other)
        assert.is_true(#b == #batches)
        for i = 1, #b do assert.is_true(b[i] == batches[i], "batch " .. i) end
        assert.same(positions, p)
        assert.same(broken, s)
      end
    end)
  end

  it("goes on from a position exactly", function()
    local batches, positions = run({}, 20)
    for _, done in ipairs { 1, 6, 13 } do
      local rest = run({ position = positions[done], workers = 3 }, 20 - done)
      for i = 1, #rest do assert.is_true(rest[i] == batches[done + i]) end
    end
  end)

  it("depends on the seed", function()
    assert.is_false(run({ seed = 3 }, 1)[1] == run({ seed = 4 }, 1)[1])
  end)

  it("shows every usable file once an epoch, in a new order each", function()
    local set = data.images(options { epochs = 3, batch = 5 })
    local order, sizes = {}, {}
    while true do
      local x, index = set:next()
      if not x then break end
      assert.equal(x:size(1), index:size(1))
      sizes[#sizes + 1] = x:size(1)
      for _, i in ipairs(index:totable()) do order[#order + 1] = i end
    end
    assert.is_nil((set:next()))
    local usable = #cases.sound
    assert.equal(3 * usable, #order)
    assert.equal((3 * usable - 1) % 5 + 1, sizes[#sizes]) -- only the last batch is smaller
    local epochs = {}
    for e = 1, 3 do
      local seen = {}
      for i = 1, usable do
        local file = order[(e - 1) * usable + i]
        assert.is_nil(seen[file])
        seen[file] = true
      end
      epochs[e] = table.concat(order, " ", (e - 1) * usable + 1, e * usable)
    end
    assert.are_not.equal(epochs[1], epochs[2])
    assert.are_not.equal(epochs[2], epochs[3])
    assert.equal(3 * set:size(), set:position())
    set:close()
  end)

  it("resizes, crops the centre and standardizes as written", function()
    local set = data.images(options { crop = "center", flip = false, shuffle = false, epochs = 1, batch = 1 })
    while true do
      local x, index = set:next()
      if not x then break end
      local path = set.files[index:totable()[1] + 1]
      local whole = data.resize(data.open(path), 20, math.floor(20 * cases.width / cases.height)):totable()
      local left = (#whole[1] - 20) / 2
      left = left % 1 == 0.5 and 2 * math.floor((left + 0.5) / 2) or left -- half to even
      local got = x:totable()[1]
      for y = 1, 20 do
        for column = 1, 20 do
          for c = 1, 3 do
            local expected = (whole[y][left + column][c] / 255 - data.mean[c]) / data.std[c]
            assert.is_true(math.abs(expected - got[y][column][c]) < 1e-6, path)
          end
        end
      end
    end
    set:close()
  end)

  it("crops windows of the image, half of them mirrored", function()
    local size, source = 8, data.open(folder .. "/rgb.png"):totable()
    local place = folder_of { ["a.png"] = assert(io.open(folder .. "/rgb.png", "rb")):read "*a" }
    local set = data.images { path = place, split = "all", size = size, resize = "none", crop = "random", flip = true,
      batch = 200,
      mean = { 0, 0, 0 }, std = { 1, 1, 1 } }
    local batch = set:next():totable()
    local mirrored, tops, lefts = 0, {}, {}
    for _, image in ipairs(batch) do
      local found
      for flip = 0, 1 do
        for top = 0, cases.height - size do
          for left = 0, cases.width - size do
            local same = true
            for y = 1, size do
              for column = 1, size do
                local there, here = source[top + y][left + (flip == 1 and size + 1 - column or column)],
                  image[y][column]
                if math.floor(here[1] * 255 + 0.5) ~= there[1] or math.floor(here[2] * 255 + 0.5) ~= there[2] then
                  same = false
                  break
                end
              end
              if not same then break end
            end
            if same then found = { flip, top, left } end
          end
        end
      end
      assert.is_not_nil(found)
      mirrored = mirrored + found[1]
      tops[found[2]], lefts[found[3]] = true, true
    end
    assert.is_true(mirrored > 70 and mirrored < 130)
    local function count(t)
      local n = 0
      for _ in pairs(t) do n = n + 1 end
      return n
    end
    assert.is_true(count(tops) > 8 and count(lefts) > 8)
    assert.is_true(tops[0] and tops[cases.height - size], "both ends are reached")
    set:close()
  end)

  it("enlarges what is smaller than the crop", function()
    local x = data.images(options { size = 50, resize = "none", epochs = 1 }):next()
    assert.same({ 4, 50, 50, 3 }, x:shape())
  end)

  describe("broken files", function()
    it("are named, counted once and left out", function()
      local _, _, broken = run({ epochs = 3 }, 100)
      table.sort(broken)
      assert.equal(#cases.broken, #broken)
      for i, name in ipairs(cases.broken) do
        assert.equal(name, broken[i]:match "^(.-): ")
        assert.is_true(#broken[i] > #name + 5)
      end
    end)

    it("are fatal with strict, and stay so", function()
      local set = data.images(options { strict = true })
      local function all() while set:next() do end end
      local message = raised(all)
      assert.truthy(message:find "stream_spec.lua:%d+: tests/fixtures/images/%w+%.%w+: ", message)
      assert.equal(message:match ": (.*)", raised(all):match ": (.*)")
      assert.equal(1, #set:broken())
      set:close()
    end)

    it("are an error where there is nothing else, with and without epochs", function()
      local place = folder_of { ["a.jpg"] = "", ["b.png"] = "\137PNG\r\n\26\n", ["c.txt"] = "text" }
      for _, epochs in ipairs { 0, 1 } do
        local set = data.images { path = place, split = "all", epochs = epochs, batch = 3 }
        local message = raised(set.next, set)
        assert.truthy(message:find("none of 2 images can be read; the first: " .. place, 1, true), message)
        set:close()
      end
    end)

    it("may be files that vanish", function()
      local place = folder_of { ["a.png"] = assert(io.open(folder .. "/rgb.png", "rb")):read "*a" }
      lfs.link("nowhere", place .. "/b.png", true)
      local set = data.images { path = place, split = "all", epochs = 1 }
      assert.same({ 1, 32, 32, 3 }, set:next():shape())
      assert.equal("No such file or directory", set:broken()[1].reason)
      set:close()
    end)
  end)

  describe("the procedural set", function()
    it("comes through the same queue", function()
      local o = { count = 20, size = 32, batch = 6, shuffle = false, image_seed = 5, mean = { 0, 0, 0 },
        std = { 1, 1, 1 } }
      local set = data.images(o)
      local x = data.to_u8(set:next())
      for i = 1, 6 do assert.is_true(core.contiguous(x[i]):bytes() == data.procedural(32, 5, i - 1):bytes()) end
      assert.equal(20, set:size())
      assert.equal(4, set:batches())
      set:close()
    end)

    it("has other images for validation", function()
      local function first(split)
        return data.images({ split = split, count = 1, batch = 1, size = 16 }):next():bytes()
      end
      assert.is_false(first "train" == first "val")
    end)

    it("is the same for any number of workers", function()
      local a = data.images { count = 30, workers = 1, size = 16, flip = true }
      local b = data.images { count = 30, workers = 6, size = 16, flip = true }
      for _ = 1, 8 do assert.is_true(a:next():bytes() == b:next():bytes()) end
    end)
  end)

  it("divides the stream among shards", function()
    local seen = {}
    for shard = 0, 2 do
      local set = data.images(options { shard = shard, shards = 3, epochs = 2 })
      while true do
        local x, index = set:next()
        if not x then break end
        for _, i in ipairs(index:totable()) do seen[i] = (seen[i] or 0) + 1 end
      end
      set:close()
    end
    local n = 0
    for _, times in pairs(seen) do
      assert.equal(2, times)
      n = n + 1
    end
    assert.equal(#cases.sound, n)
  end)

  it("refuses what makes no sense, at the caller's line", function()
    local function message(extra) return raised(function() data.images(options(extra)) end) end
    assert.truthy(message({ sizes = 3 }):find
      "stream_spec.lua:%d+: images: unknown option 'sizes', did you mean 'size'?")
    assert.truthy(message({ crop = "left" }):find "crop is 'left', expected center or random")
    assert.truthy(message({ split = "test" }):find "images: split is 'test', expected train or val or all")
    assert.truthy(message({ batch = 0 }):find "batch is 0, expected an integer of 1 or more")
    assert.truthy(message({ batch = 2 ^ 21 }):find("needs batch >= 1 && batch <= 1048576, got batch = 2.09715e+06", 1,
      true))
    assert.truthy(message({ workers = 300 }):find("needs workers >= 1 && workers <= 256, got workers = 300", 1, true))
    assert.truthy(message({ size = 2.5 }):find "size is 2.5, expected an integer")
    assert.truthy(message({ size = 2 ^ 33 }):find("needs size >= 1 && size <= 8192", 1, true))
    assert.truthy(message({ flip = 1 }):find "flip is 1, expected a boolean")
    assert.truthy(message({ std = { 1, 0, 1 } }):find("std > 0 && std < inf, got std = 0", 1, true))
    assert.truthy(message({ mean = { 1, 1 / 0, 1 } }):find "mean%[2%] is inf, expected a finite number")
    assert.truthy(message({ mean = { 1, 2 } }):find "mean has 2 numbers, expected one for each of 3 channels")
    assert.truthy(message({ shard = 1 }):find("shard < shards, got shard = 1, shards = 1", 1, true))
    assert.truthy(raised(data.images, { count = 2 ^ 31 }):find("procedural images: needs count >= 1", 1, true))
  end)

  it("writes to tensors of the declared outputs alone", function()
    local set = data.images(options {})
    local ffi, C = require "ffi", require("vertex.core.library").C
    local stream, count = set.stream, ffi.new "int[1]"
    assert.same({ { name = "images", shape = { 4, 20, 20, 3 }, options = { dtype = "f32", device = "cpu" } } },
      stream.outputs)
    local function fails(x, index, text)
      stream.handles[0] = x._h
      assert.are_not.equal(0, C.vx_data_stream_next(stream.s, stream.handles, 1, index._h, count))
      assert.equal(text, ffi.string(C.vx_error()))
    end
    local x, index = vx.zeros { 4, 20, 20, 3 }, vx.zeros({ 4 }, { dtype = "i32" })
    fails(vx.zeros { 3, 20, 20, 3 }, index, "images: images (3,20,20,3) should have the shape (4,20,20,3)")
    fails(x, vx.zeros { 4 }, "images: index (4) is f32, expected i32")
    fails(vx.zeros({ 4, 20, 20, 3 }, { device = "emu:0" }), vx.zeros({ 4 }, { dtype = "i32", device = "emu:0" }),
      "images: images is on emu:0, expected the CPU")
    assert.equal(0, set:position())
    set:close()
  end)

  it("is closed at once, even at work, and then says so", function()
    local set = data.images { count = 100000, size = 256, workers = 4, cache_bytes = 0 }
    set:close()
    set:close()
    assert.truthy(raised(set.next, set):find "closed")
    assert.is_true(pcall(tostring, set))
  end)

  it("keeps no tensor: batches belong to the step", function()
    local set = data.images(options {})
    vx.step(function() set:next() end)
    collectgarbage()
    local before = core.memory("cpu").live
    for _ = 1, 50 do vx.step(function() set:next() end) end
    assert.equal(before, core.memory("cpu").live)
    set:close()
  end)

  it("ends its wait when interrupted, and then goes on", function()
    local o = { count = 4000, size = 128, workers = 1, batch = 500, queue = 1, cache_bytes = 0, shuffle = false }
    local set = data.images(o)
    core.catching_interrupts(function()
      os.execute "kill -TERM $PPID" -- os.execute itself shields from SIGINT
      assert.is_nil((set:next()))
      assert.is_true(core.interrupted())
    end)
    assert.equal(0, set:position())
    local x = set:next()
    assert.equal(500, set:position())
    o.workers = 3
    assert.is_true(x:bytes() == data.images(o):next():bytes())
    set:close()
  end)
end)
