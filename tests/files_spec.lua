-- Files: what is read is one version of a file, what is saved appears whole under its name, with its mode and through
-- links, and what killed processes left goes.

local H = require "tests.helper"
local core = require "vertex.core"
local lfs = require "lfs"
local vx = require "vertex"

local folder = H.scratch "files"

--- Names in the folder, in order.
local function names()
  local list = {}
  for entry in lfs.dir(folder) do
    if entry ~= "." and entry ~= ".." then list[#list + 1] = entry end
  end
  table.sort(list)
  return list
end

local function clear()
  os.execute(("rm -rf '%s'"):format(folder))
  assert(lfs.mkdir(folder))
end

--- Runs f while core[name] saves another version of a file just before it does its work: somebody else's save, at the
-- worst moment.
local function while_saved(name, save, f)
  local own = core[name]
  core[name] = function(...)
    core[name] = own
    save()
    return own(...)
  end
  local ok, result = pcall(f)
  core[name] = own
  assert(ok, result)
  return result
end

describe("a file that is replaced while it is read", function()
  before_each(clear)

  it("is loaded as it was when it was opened", function()
    local path = folder .. "/x.safetensors"
    vx.save(path, { a = vx.tensor { 1, 2, 3 }, b = vx.tensor { 4 } })
    local t = while_saved("new", function() vx.save(path, { other = vx.full({ 9 }, 7) }) end,
      function() return vx.load(path) end)
    assert.same({ { 1, 2, 3 }, { 4 } }, { t.a:totable(), t.b:totable() })
    assert.same({ 9 }, vx.load(path).other:shape())
    path = folder .. "/x.npy"
    vx.save(path, vx.tensor { 1, 2, 3 })
    local x = while_saved("new", function() vx.save(path, vx.zeros { 40, 40, 40 }) end,
      function() return vx.load(path) end)
    assert.same({ 1, 2, 3 }, x:totable())
  end)

  it("gives the rows it had when it was opened", function()
    local path = folder .. "/x.npy"
    vx.save(path, vx.tensor { { 1, 2 }, { 3, 4 } })
    local set = while_saved("rows", function() vx.save(path, vx.full({ 70, 2 }, 9)) end,
      function() return vx.data.vectors { path = path } end)
    assert.same({ { 1, 2 }, { 3, 4 } }, set:read(0, 2):totable())
    set:close()
  end)

  it("restores a run with the step of the same checkpoint", function()
    local path, checkpoint = folder .. "/x", vx.runs.checkpoint
    local model = vx.nn.Linear(2, 2)
    checkpoint.save(path, { model = model }, { step = 1 })
    local earlier = model.weight:totable()
    local extra = while_saved("file_size", function()
      model.weight:fill(5)
      checkpoint.save(path, { model = model }, { step = 2 })
    end, function() return checkpoint.load(path, { model = model }) end)
    assert.same(extra.step == 1 and earlier or { { 5, 5 }, { 5, 5 } }, model.weight:totable())
    extra = while_saved("new", function() checkpoint.save(path, { model = model }, { step = 3 }) end,
      function() return checkpoint.load(path, { model = model }) end)
    assert.equal(2, extra.step)
  end)
end)

describe("saving", function()
  before_each(clear)
  local function save(name, value) vx.save(folder .. "/" .. name, { x = vx.tensor { value } }) end
  local function value(name) return vx.load(folder .. "/" .. name).x:item() end

  it("keeps the mode of the file", function()
    for _, mode in ipairs { "600", "640", "766", "2640" } do
      save("x", 1)
      assert(os.execute(("chmod %s '%s/x'"):format(mode, folder)) == 0)
      save("x", 2)
      assert.equal(mode .. "\n", (H.shell(("stat -c %%a '%s/x'"):format(folder))))
      assert.equal(2, value "x")
    end
  end)

  it("writes the file that a symbolic link leads to, also where it is not there yet", function()
    assert(lfs.mkdir(folder .. "/store"))
    lfs.link("store/there", folder .. "/first", true)
    lfs.link("first", folder .. "/second", true)
    for i = 1, 2 do
      save("second", i)
      assert.equal(i, value "store/there")
      assert.equal("link", lfs.symlinkattributes(folder .. "/first", "mode"))
      assert.equal("link", lfs.symlinkattributes(folder .. "/second", "mode"))
      assert.same({ "first", "second", "store" }, names())
    end
    lfs.link("round", folder .. "/round", true)
    H.raises(function() vx.save(folder .. "/round", {}) end, "round", "symbolic links")
  end)

  it("refuses what is no file, and leaves it", function()
    assert(lfs.mkdir(folder .. "/sub"))
    assert(os.execute(("mkfifo '%s/pipe'"):format(folder)) == 0)
    H.raises(function() vx.save(folder .. "/sub", {}) end, "it is a folder")
    H.raises(function() vx.save(folder .. "/pipe", {}) end, "it is a device or pipe")
    H.raises(function() vx.load(folder .. "/pipe") end, "a device or pipe")
    assert.same({ "pipe", "sub" }, names())
    assert.equal("named pipe", lfs.attributes(folder .. "/pipe", "mode"))
  end)

  it("is never another one than its path says: a NUL byte, where C reads its end, is refused", function()
    local kept = folder .. "/x.npy"
    vx.save(kept, vx.tensor { 7 })
    local path = kept .. "\0.png"
    local x, image = vx.tensor { 1 }, vx.zeros({ 2, 2, 3 }, { dtype = "u8" })
    local figure = vx.plot.figure { width = 60, height = 60 }
    for i, call in ipairs {
      function() vx.save(kept .. "\0.npy", x) end, function() vx.save(path, { x = x }) end,
      function() vx.load(path) end, function() vx.data.save(path, image) end, function() vx.data.open(path) end,
      function() vx.data.open_audio(path) end, function() vx.data.list(folder .. "\0x") end,
      function() vx.data.find(folder .. "\0x", "all") end, function() vx.data.images { path = folder .. "\0x" } end,
      function() vx.data.speech { path = folder .. "\0x" } end, function() vx.data.vectors { path = path } end,
      function() figure:save(path) end, function() require("vertex.quantizers").load_folder(folder .. "\0x") end,
      function() core.write_file(path, "") end, function() core.read_file(path) end,
      function() core.file_size(path) end, function() core.lock(path) end, function() core.file_sha256(path) end,
      function() core.make_folders(folder .. "/new\0x") end, function() core.image_kind(path) end,
      function() core.audio_kind(path) end, function() core.audio_stamp(path) end,
      function() core.audio_scan { kept, path } end,
    } do
      local ok, message = pcall(call)
      assert(not ok and message:find("holds a NUL byte", 1, true), i .. ": " .. tostring(message))
    end
    assert.same({ "x.npy" }, names())
    assert.same({ 7 }, vx.load(kept):totable())
  end)

  it("removes what a killed process left", function()
    local path = folder .. "/x"
    save("x", 1)
    for _ = 1, 2 do
      H.child(([[
        local core = require "vertex.core"
        local first, second = core.writer "%s", core.writer "%s"
        first:bytes "half"
        second:bytes "half"
        require("ffi").cdef "int kill(int, int); int getpid(void);"
        require("ffi").C.kill(require("ffi").C.getpid(), 9)
      ]]):format(path, path))
    end
    assert.equal(3, #names())
    assert.equal(1, value "x")
    save("x", 2)
    assert.equal(2, value "x")
    local a, b = core.writer(path), core.writer(path) -- a second writer of the same name disturbs none
    a:bytes "a"
    b:bytes "b"
    b:commit()
    a:commit()
    assert.equal("a", H.read(path))
    assert.same({ "x" }, names())
  end)
end)
