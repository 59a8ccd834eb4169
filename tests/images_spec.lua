-- Images: every pixel against what Pillow gave (tests/fixtures/make.py), broken files refused by reason, folders and
-- their splits.

local lfs = require "lfs"
local data = require "vertex.data.images"
local core = require "vertex.core"
local vx = require "vertex"

local fixtures = "tests/fixtures"
local cases = dofile(fixtures .. "/images.lua")

local function read(path)
  local file = assert(io.open(path, "rb"))
  local bytes = file:read "*a"
  file:close()
  return bytes
end

local function write(path, bytes)
  local file = assert(io.open(path, "wb"))
  file:write(bytes)
  file:close()
end

local folders = {}
local function temporary_folder()
  local path = os.tmpname()
  os.remove(path)
  assert(lfs.mkdir(path))
  folders[#folders + 1] = path
  return path
end

local function names(paths)
  local list = {}
  for i, path in ipairs(paths) do list[i] = path:match "[^/]*$" end
  return list
end

local function set(list)
  local t = {}
  for _, v in ipairs(list) do t[v] = true end
  return t
end

local function raised(f, ...)
  local ok, message = pcall(f, ...)
  assert.is_false(ok)
  return message
end

describe("images", function()
  teardown(function()
    for _, path in ipairs(folders) do os.execute("rm -rf '" .. path .. "'") end
  end)

  describe("decoding", function()
    for _, name in ipairs(cases.sound) do
      it("gives Pillow's pixels of " .. name, function()
        local x = data.open(fixtures .. "/images/" .. name)
        assert.same({ cases.height, cases.width, 3 }, x:shape())
        assert.equal("u8", x:dtype())
        assert.is_true(x:bytes() == read(fixtures .. "/expected/" .. name .. ".rgb"))
      end)
    end

    it("reads from memory what it reads from a file", function()
      local path = fixtures .. "/images/baseline.jpg"
      assert.is_true(data.decode(read(path)):bytes() == data.open(path):bytes())
    end)

    local reasons = {
      ["empty.jpg"] = "an empty file", ["text.jpg"] = "neither JPEG nor PNG",
        ["truncated.jpg"] = "truncated or damaged JPEG",
      ["truncated.png"] = "truncated or damaged PNG", ["giant.png"] = "100000 x 100000 pixels, more than the limit",
      ["other.gif"] = "GIF; only JPEG and PNG are read",
    }
    for _, name in ipairs(cases.broken) do
      it("refuses " .. name .. " with its name and the reason", function()
        local message = raised(data.open, fixtures .. "/images/" .. name)
        assert.truthy(message:find(name .. ": ", 1, true), message)
        assert.truthy(message:find(reasons[name], 1, true), message)
      end)
    end

    it("survives a file cut anywhere", function()
      for _, name in ipairs { "baseline.jpg", "progressive.jpg", "cmyk.jpg", "palette.png", "alpha.png" } do
        local whole = read(fixtures .. "/images/" .. name)
        for length = 0, #whole - 1, 7 do
          local ok, x = pcall(data.decode, whole:sub(1, length))
          -- behind the last pixel a PNG holds only sums and the end
          if ok then
            assert.truthy(name:find "png$" and length > #whole - 22, name .. " " .. length)
            assert.equal(read(fixtures .. "/expected/" .. name .. ".rgb"), x:bytes())
          end
        end
      end
    end)

    -- each gives in Pillow the pixels of the clean file, or an error
    it("passes over damage that costs no pixel, and over no other", function()
      local function same(bytes, name, what)
        local ok, x = pcall(data.decode, bytes)
        assert.is_true(ok, what .. " of " .. name .. ": " .. tostring(x))
        assert.is_true(x:bytes() == read(fixtures .. "/expected/" .. name .. ".rgb"), what .. " of " .. name)
      end
      for _, name in ipairs { "baseline.jpg", "progressive.jpg", "cmyk.jpg" } do
        local whole, at, marker = read(fixtures .. "/images/" .. name), 3, nil
        while marker ~= 0xda do -- stray bytes before each segment but the first, which tells the format
          if at > 3 then same(whole:sub(1, at - 1) .. "\1\2\3" .. whole:sub(at), name, "3 bytes at " .. at) end
          local high, low
          marker, high, low = whole:byte(at + 1, at + 3)
          at = at + 2 + high * 256 + low
        end
        same(whole:sub(1, -3) .. "\0\1\2" .. whole:sub(-2), name, "bytes before the end")
        same(whole .. "more", name, "bytes behind the end")
        assert.is_false(pcall(data.decode, whole:sub(1, -3)))
      end
      local function flipped(bytes, at)
        return bytes:sub(1, at - 1) .. string.char(255 - bytes:byte(at)) .. bytes:sub(at + 1)
      end
      local name = "rgb.png"
      local whole = read(fixtures .. "/images/" .. name)
      for cut = 1, 17 do same(whole:sub(1, -1 - cut), name, "a cut by " .. cut) end
      same(flipped(whole, #whole), name, "a wrong sum of the end")
      same(flipped(whole, #whole - 12), name, "a wrong sum of the pixels' chunk")
      assert.is_false(pcall(data.decode, flipped(whole, #whole - 16))) -- the sum within the compressed pixels
      assert.is_false(pcall(data.decode, flipped(whole, 30)))          -- the header's sum
      assert.is_false(pcall(data.decode, whole:sub(1, -13) .. "\0\0\1\0tEXta\0b")) -- a text cut short
    end)

    it("gives Pillow's pixels of JPEGs of any sampling", function()
      local count = 0
      for file in lfs.dir(fixtures .. "/sampling") do
        if file:find "jpg$" then
          count = count + 1
          local path = fixtures .. "/sampling/" .. file
          assert.is_true(data.open(path):bytes() == read(path .. ".rgb"), file)
        end
      end
      assert.equal(9, count)
    end)

    it("believes no header that claims more than the file can hold", function()
      local jpeg, claim = read(fixtures .. "/images/progressive.jpg"), "\50\200\50\200" -- 13000 x 13000
      local at = jpeg:find("\255\194", 1, true)
      -- one row of 178,956,970 pixels of 16-bit RGBA; the header's sum is right
      local png = "\137PNG\r\n\26\n\0\0\0\13IHDR\10\170\170\170\0\0\0\1\16\6\0\0\0" .. "\165\113\49\127"
      png = png .. "\0\0\0\12IDATx\156c```\0\0\0\4\0\1" .. "\0\0\0\0"
      for _, bytes in ipairs { png, jpeg:sub(1, at + 4) .. claim .. jpeg:sub(at + 9) } do
        local message = raised(data.decode, bytes)
        assert.truthy(message:find("bytes cannot hold", 1, true), message)
      end
    end)

    it("passes over chunks that claim to be long, and takes no memory for them", function()
      local output = require("tests.helper").child([[
        local vx = require "vertex"
        local f = io.open "tests/fixtures/images/rgb.png"
        local png = f:read "*a"
        for _, name in ipairs { "tEXt", "iTXt", "zTXt", "sPLT", "iCCP", "vpAg" } do
          pcall(vx.data.decode, png:sub(1, 33) .. "\127\255\255\255" .. name .. ("a"):rep(200))
        end
        print(io.open "/proc/self/status":read "*a":match "VmHWM:%s*(%d+) kB")
      ]])
      assert.is_true(tonumber(output) < 200e3, output)
    end)

    it("survives flipped bytes", function()
      local random = require("tests.helper").random(5)
      for _, name in ipairs { "baseline.jpg", "progressive.jpg", "palette.png", "rgb.png" } do
        local whole = read(fixtures .. "/images/" .. name)
        for _ = 1, 100 do
          local at = random:integer(1, #whole)
          local damaged = whole:sub(1, at - 1) .. string.char(random:integer(0, 255)) .. whole:sub(at + 1)
          local ok, x = pcall(data.decode, damaged)
          assert.is_true(ok == false or core.is_tensor(x))
        end
      end
    end)

    it("says that a file is missing, or a folder, at the caller's line", function()
      assert.truthy(raised(data.open, "no/such/file.png"):find "No such file")
      assert.truthy(raised(data.open, "tests"):find "a folder, not a file")
      assert.truthy(raised(function() data.open "no/such/file.png" end):find "images_spec.lua:%d+: no/such")
    end)

    it("leaves no tensor behind where it fails", function()
      collectgarbage()
      local before = core.memory("cpu").tensors
      for _ = 1, 20 do pcall(data.open, fixtures .. "/images/truncated.png") end
      collectgarbage()
      assert.is_true(core.memory("cpu").tensors <= before)
    end)
  end)

  describe("resize", function()
    local source
    setup(function() source = core.keep(data.open(fixtures .. "/images/rgb.png")) end)

    for _, case in ipairs(cases.resize) do
      local filter, height, width = case[1], case[2], case[3]
      it(("gives Pillow's bytes, %s to %dx%d"):format(filter, height, width), function()
        local y = data.resize(source, height, width, filter)
        local expected = read(("%s/expected/resize_%s_%dx%d.rgb"):format(fixtures, filter, height, width))
        assert.is_true(y:bytes() == expected)
      end)
    end

    it("copies where the size stays", function()
      assert.is_true(data.resize(source, cases.height, cases.width):bytes() == source:bytes())
    end)

    it("keeps a flat picture flat", function()
      local flat = vx.full({ 13, 17, 3 }, 201, { dtype = "u8" })
      for _, filter in ipairs { "bilinear", "bicubic" } do
        local y = data.resize(flat, 40, 5, filter)
        assert.equal(string.char(201):rep(40 * 5 * 3), y:bytes())
      end
    end)

    it("refuses other shapes and filters", function()
      local function refused(text, ...)
        assert.truthy(raised(data.resize, ...):find("image_resize: " .. text, 1, true))
      end
      refused("src (4,4,3) is f32, expected u8", vx.zeros { 4, 4, 3 }, 2, 2)
      refused("src (4,4) should have the shape (H,W,3)", vx.zeros({ 4, 4 }, { dtype = "u8" }), 2, 2)
      refused("src (4,4,4) should have the shape (H,W,3)", vx.zeros({ 4, 4, 4 }, { dtype = "u8" }), 2, 2)
      assert.truthy(raised(data.resize, source, 0, 2):find("resize: height is 0, expected an integer of 1", 1, true))
      assert.truthy(raised(data.resize, source, 2, 2, "lanczos"):find "bilinear or bicubic")
    end)
  end)

  describe("PNG output", function()
    it("comes back as it was", function()
      local path = temporary_folder() .. "/x.png"
      for _, channels in ipairs { 3, 1 } do
        local x = data.procedural({ 9, 14 }, 3, 4)
        if channels == 1 then x = core.contiguous(core.view(x, { 9, 14 }, { 42, 3 }, 0)) end
        data.save(path, x)
        local y = data.open(path)
        if channels == 1 then y = core.contiguous(core.view(y, { 9, 14 }, { 42, 3 }, 1)) end
        assert.is_true(x:bytes() == y:bytes())
      end
    end)

    it("takes [0, 1] floats, rounded and clamped", function()
      local y = data.decode(data.png(vx.tensor { { { -0.5, 0.5, 1.5 } }, { { 0.2, 0.999, 0 } } }))
      assert.same({ { { 0, 128, 255 } }, { { 51, 255, 0 } } }, y:totable())
    end)

    it("is made of u8 on the CPU, with 1, 3 or 4 channels", function()
      local function refused(text, shape, options)
        local message = raised(core.image_png, vx.zeros(shape, options))
        assert.truthy(message:find("image_png: " .. text, 1, true), message)
      end
      refused("x (4,4,3) is f32, expected u8", { 4, 4, 3 })
      refused("x (4) should have the shape (H,W,C)", { 4 }, { dtype = "u8" })
      refused("needs C == 1 || C == 3 || C == 4, got C = 2", { 4, 4, 2 }, { dtype = "u8" })
      refused("needs H * W > 0", { 4, 0 }, { dtype = "u8" })
      refused("x is on emu:0, expected the CPU", { 4, 4, 3 }, { dtype = "u8", device = "emu:0" })
    end)

    it("leaves nothing where it cannot write", function()
      local folder = temporary_folder()
      assert.is_false(pcall(data.save, folder .. "/none/x.png", data.procedural(8)))
      assert.is_false(pcall(data.save, folder .. "/x.png", vx.zeros({ 4, 4, 2 }, { dtype = "u8" })))
      assert.same({}, (data.list(folder)))
    end)
  end)

  describe("standardization", function()
    it("is undone by denormalize", function()
      local x = data.procedural(16, 1, 1)
      local back = data.to_u8(data.denormalize(data.normalize(x)))
      assert.is_true(back:bytes() == x:bytes())
    end)
  end)

  describe("the procedural set", function()
    it("is a function of seed and index", function()
      local a = data.procedural(32, 5, 7)
      assert.same({ 32, 32, 3 }, a:shape())
      assert.is_true(a:bytes() == data.procedural(32, 5, 7):bytes())
      assert.is_false(a:bytes() == data.procedural(32, 5, 8):bytes())
      assert.is_false(a:bytes() == data.procedural(32, 6, 7):bytes())
    end)

    it("shows the same scene at another size", function()
      local error, spread, n = 0, 0, 0
      for index = 0, 15 do
        local large = data.resize(data.procedural(128, 2, index), 32, 32):to "f32"
        local small = data.procedural(32, 2, index):to "f32"
        error = error + (large - small):square():mean():item()
        spread = spread + (small - small:mean()):square():mean():item()
        n = n + 1
      end
      assert.is_true(error < 0.1 * spread, ("difference %g of a variance of %g"):format(error / n, spread / n))
    end)

    it("has edges, flat parts and colour", function()
      local deviation, steep, gentle, n, colour = 0, 0, 0, 0, 0
      for index = 0, 31 do
        local x = data.procedural(32, 9, index):to "f32"
        deviation = deviation + math.sqrt((x - x:mean()):square():mean():item())
        local rows = x:totable()
        for y = 1, 32 do
          for column = 2, 32 do
            local step = math.abs(rows[y][column][2] - rows[y][column - 1][2])
            n = n + 1
            if step > 40 then steep = steep + 1 end
            if step < 6 then gentle = gentle + 1 end
          end
          colour = colour + math.abs(rows[y][16][1] - rows[y][16][3])
        end
      end
      assert.is_true(deviation / 32 > 25)
      assert.is_true(steep / n > 0.02 and steep / n < 0.3)
      assert.is_true(gentle / n > 0.4)
      assert.is_true(colour / (32 * 32) > 10)
    end)

    it("fills any size", function()
      for _, size in ipairs { { 1, 1 }, { 3, 50 }, { 50, 3 }, { 17, 31 } } do
        assert.same({ size[1], size[2], 3 }, data.procedural(size, 1, 1):shape())
      end
    end)
  end)

  describe("folders", function()
    local jpeg, png
    setup(function()
      jpeg, png = read(fixtures .. "/images/baseline.jpg"), read(fixtures .. "/images/rgb.png")
    end)

    it("judges by content: every image counts, text that does not claim to be one is passed over", function()
      local found = set(names((data.find(fixtures .. "/images", "all"))))
      for _, list in ipairs { cases.sound, cases.broken } do
        for _, name in ipairs(list) do assert.is_true(found[name], name) end
      end
      for _, name in ipairs { "notes.txt", "index.csv", "empty", ".hidden.jpg" } do assert.is_nil(found[name]) end
    end)

    it("lists nested folders in order and is not caught in a loop of links", function()
      local root = temporary_folder()
      lfs.mkdir(root .. "/b")
      lfs.mkdir(root .. "/b/c")
      write(root .. "/b/c/2.png", png)
      write(root .. "/b/1.jpg", jpeg)
      write(root .. "/a.jpg", jpeg)
      lfs.link("..", root .. "/b/up", true)
      lfs.link("nowhere", root .. "/z.jpg", true)
      local files = data.list(root)
      assert.same({ root .. "/a.jpg", root .. "/b/1.jpg", root .. "/b/c/2.png", root .. "/z.jpg" }, files)
      assert.same(files, (data.find(root .. "/", "all")))
    end)

    it("uses train/ and val/, else test/", function()
      local root = temporary_folder()
      for _, name in ipairs { "train", "test" } do
        lfs.mkdir(root .. "/" .. name)
        for i = 1, 3 do write(("%s/%s/%d.png"):format(root, name, i), png) end
      end
      assert.equal(3, #data.find(root, "train"))
      assert.same({ root .. "/test/1.png", root .. "/test/2.png", root .. "/test/3.png" }, (data.find(root, "val")))
      lfs.mkdir(root .. "/val")
      write(root .. "/val/only.png", png)
      assert.same({ root .. "/val/only.png" }, (data.find(root, "val")))
      assert.equal(7, #data.find(root, "all"))
    end)

    it("divides any other folder by the hash of the names, wherever it lies", function()
      local a, b = temporary_folder(), temporary_folder()
      lfs.mkdir(b .. "/nested")
      for i = 1, 400 do
        write(("%s/img_%03d.png"):format(a, i), "")
        write(("%s%s/img_%03d.png"):format(b, i % 2 == 0 and "/nested" or "", 401 - i), "")
      end
      local train, val = names((data.find(a, "train"))), names((data.find(a, "val")))
      assert.equal(400, #train + #val)
      assert.is_true(#val >= 0.04 * 400 and #val <= 0.12 * 400, #val .. " of 400")
      local other = names((data.find(b, "val")))
      table.sort(other)
      assert.same(val, other)
      local both = set(train)
      for _, name in ipairs(val) do assert.is_nil(both[name]) end
      -- fixed for good: a checkpoint's validation images must stay what they were
      assert.same({ "img_003.png", "img_030.png", "img_040.png" }, { val[1], val[2], val[3] })
    end)

    it("keeps a file on its side when others come", function()
      local root = temporary_folder()
      for i = 1, 100 do write(("%s/%d.png"):format(root, i), png) end
      local before = set(names((data.find(root, "val"))))
      for i = 101, 200 do write(("%s/%d.png"):format(root, i), png) end
      local after = set(names((data.find(root, "val"))))
      for i = 1, 100 do assert.equal(before[i .. ".png"], after[i .. ".png"]) end
    end)

    it("has both sides from two files on", function()
      local root = temporary_folder()
      write(root .. "/1.png", png)
      assert.equal(1, #data.find(root, "train"))
      assert.equal(1, #data.find(root, "val"))
      for n = 2, 12 do
        write(("%s/%d.png"):format(root, n), png)
        local train, val = data.find(root, "train"), data.find(root, "val")
        assert.equal(n, #train + #val)
        assert.is_true(#train > 0 and #val > 0)
      end
    end)

    it("names what is wrong at the caller's line", function()
      local function message(options) return raised(function() data.images(options) end) end
      assert.truthy(message({ path = "no/such" }):find "images_spec.lua:%d+: images: no folder no/such")
      assert.truthy(message({ path = fixtures .. "/make.py" }):find "is a file, expected a folder of images")
      assert.truthy(message({ path = temporary_folder() }):find "no image in")
      assert.truthy(message({ path = fixtures .. "/expected" }):find "no image in .* %(%d+ other files")
      assert.truthy(message({ path = 3 }):find "path is 3, expected a string")
    end)
  end)
end)
