-- .npy files: what NumPy 2.4 wrote, byte for byte (the texts below are its own), comes in and goes out; what is none is
-- refused by name.

local npy = require "vertex.npy"
local vx = require "vertex"
local H = require "tests.helper"

local MAGIC = "\147NUMPY"

--- A file of version 1.0 (or another) with a header text and raw bytes.
local function file(header, data, version)
  local path = H.scratch "x.npy"
  local length = #header
  local digits = string.char(length % 256, math.floor(length / 256))
  H.write(path, MAGIC .. (version or "\1\0") .. digits .. (version and version ~= "\1\0" and "\0\0" or "") .. header
    .. data)
  return path
end

local function header(descr, fortran, shape)
  return ("{'descr': '%s', 'fortran_order': %s, 'shape': %s, }\n"):format(descr, fortran, shape)
end

local function message(...)
  local ok, text = pcall(...)
  assert.is_false(ok)
  return tostring(text)
end

describe("npy", function()
  it("reads each dtype, little- and big-endian", function()
    local cases = {
      { "<f4", "\0\0\128\63\0\0\0\192", { 1, -2 }, "f32" }, { ">f4", "\63\128\0\0\192\0\0\0", { 1, -2 }, "f32" },
      { "<f8", "\0\0\0\0\0\0\240\63\0\0\0\0\0\0\0\192", { 1, -2 }, "f32" }, { "<f2", "\0\60\0\192", { 1, -2 }, "f32" },
      { ">f2", "\60\0\192\0", { 1, -2 }, "f32" }, { "<i4", "\5\0\0\0\254\255\255\255", { 5, -2 }, "i32" },
      { "<i8", "\5\0\0\0\0\0\0\0\254\255\255\255\255\255\255\255", { 5, -2 }, "i32" },
      { ">i8", "\0\0\0\0\0\0\0\5\255\255\255\255\255\255\255\254", { 5, -2 }, "i32" },
      { "<i2", "\5\0\254\255", { 5, -2 }, "i32" }, { "|i1", "\5\254", { 5, -2 }, "i32" },
      { "<u2", "\5\0\255\255", { 5, 65535 }, "i32" }, { "|u1", "\5\255", { 5, 255 }, "u8" },
        { "|b1", "\1\0", { 1, 0 }, "u8" },
      { "=f4", "\0\0\128\63\0\0\0\192", { 1, -2 }, "f32" }, { "float32", "\0\0\128\63\0\0\0\192", { 1, -2 }, "f32" },
    }
    for _, c in ipairs(cases) do
      local x = npy.load(file(header(c[1], "False", "(2,)"), c[2]))
      assert.same({ 2 }, x:shape(), c[1])
      assert.equal(c[4], x:dtype(), c[1])
      assert.same(c[3], x:totable(), c[1])
    end
  end)

  it("reads rank 0, column-major arrays, long versions, other spellings of the header and bytes behind the array",
    function()
    assert.same({}, npy.load(file(header("<i4", "False", "()"), "\7\0\0\0")):shape())
    assert.equal(7, npy.load(file(header("<i4", "False", "()"), "\7\0\0\0")):item())
    local six = "\1\0\2\0\3\0\4\0\5\0\6\0"
    assert.same({ { 1, 3, 5 }, { 2, 4, 6 } }, npy.load(file(header("<i2", "True", "(2, 3)"), six)):totable())
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, npy.load(file(header("<i2", "False", "(2, 3)"), six .. "tail")):totable())
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, npy.load(file(header("<i2", "False", "(2, 3)"), six, "\2\0")):totable())
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, npy.load(file(header("<i2", "False", "(2, 3)"), six, "\3\0")):totable())
    local odd = '{"shape":(2L,3L),"fortran_order":False,"descr":"<i2"}'
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, npy.load(file(odd, six)):totable())
    assert.same({ 0, 3 }, npy.load(file(header("<f4", "False", "(0, 3)"), "")):shape())
  end)

  it("writes the bytes that numpy.save writes", function()
    local path = H.scratch "out.npy"
    npy.save(path, vx.tensor { { 1, 2, 3 }, { 4, 5, 6 } })
    local text = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"
    local expected = MAGIC .. "\1\0v\0" .. text .. (" "):rep(118 - #text - 1) .. "\n"
    assert.equal(128, #expected)
    assert.equal(expected .. vx.tensor({ { 1, 2, 3 }, { 4, 5, 6 } }):bytes(), H.read(path))
    npy.save(path, vx.tensor({ 7, 65535 }, { dtype = "i32" }), { dtype = "u16" })
    assert.truthy(H.read(path):find("'descr': '<u2', 'fortran_order': False, 'shape': (2,), }", 1, true))
    assert.equal("\7\0\255\255", H.read(path):sub(129))
    assert.same({ 7, 65535 }, npy.load(path):totable())
  end)

  it("writes views as their values, bf16 as f32, and every shape comes back", function()
    local path, T = H.scratch "out.npy", H.generator(3)
    for _, shape in ipairs { {}, { 0 }, { 5 }, { 2, 3 }, { 2, 1, 3, 1 } } do
      local x = T(shape, { grad = false })
      npy.save(path, x)
      assert.equal(x:bytes(), npy.load(path):bytes())
      assert.same(shape, npy.load(path):shape())
    end
    local x = T({ 3, 4 }, { grad = false })
    npy.save(path, x:t())
    assert.same(x:t():contiguous():totable(), npy.load(path):totable())
    npy.save(path, x:to "bf16")
    assert.same(x:to("bf16"):to("f32"):totable(), npy.load(path):totable())
  end)

  it("refuses what holds no numbers, by name", function()
    local function says(descr, text)
      local m = message(npy.load, file(header(descr, "False", "(1,)"), ("\0"):rep(64)))
      assert.truthy(m:find(text, 1, true), m)
    end
    says("|O", "holds Python objects")
    says("<U5", "holds texts")
    says("|S3", "holds texts")
    says("<c8", "holds complex numbers")
    says("<V2", "save it as float32")
    says("<V1", "has the dtype '<V1'")
    says("<f1", "has the dtype '<f1'")
    says("<M8[ns]", "dates or times")
    local structured = "{'descr': [('a', '<f4'), ('b', '<i4')], 'fortran_order': False, 'shape': (1,), }\n"
    assert.truthy(message(npy.load, file(structured, ("\0"):rep(8))):find("structured [('a', '<f4')", 1, true))
  end)

  it("refuses numbers that the tensor's dtype does not hold", function()
    local text = message(npy.load, file(header("<u4", "False", "(2,)"), "\1\0\0\0\255\255\255\255"))
    assert.truthy(text:find("element 1 is 4294967295 (U32), which i32 does not hold", 1, true), text)
    text = message(npy.load, file(header("<f8", "False", "(1,)"), "\255\255\255\255\255\255\239\127"))
    assert.truthy(text:find("element 0 is 1.7976931348623157e+308 (F64), which f32 does not hold", 1, true), text)
    assert.equal(1 / 0, npy.load(file(header("<f8", "False", "(1,)"), "\0\0\0\0\0\0\240\127")):totable()[1])
  end)

  it("refuses damaged headers and short files by name, and leaves no half-written file", function()
    local function says(path, text)
      local m = message(npy.load, path)
      assert.truthy(m:find(text, 1, true), m)
    end
    says(file(header("<f4", "False", "(3,)"), "\0\0\0\0"), "needs 12 bytes, the file has 4 after its header")
    says(file("{'descr': '<f4'", ""), "a comma is missing")
    says(file("{'descr': '<f4', 'shape': (1,), }\n", "\0\0\0\0"), "does not say fortran_order")
    says(file("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), } x", "\0\0\0\0"), "something follows")
    says(file("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", "\0\0\0\0"), "the value of 'shape'")
    says(file("{'descr': '<f4', 'fortran_order': False, 'shape': (1), }", "\0\0\0\0"), "has no shape")
    says(file("{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", "\0\0\0\0"),
      "is there twice")
    says(file(header("<f4", "False", "(1,)"), "\0\0\0\0", "\4\0"), "its version is 4.0")
    local path = H.scratch "bad.npy"
    H.write(path, "PK\3\4")
    says(path, "it does not begin as one")
    H.write(path, MAGIC .. "\1\0\255\255{")
    says(path, "it ends within its header")
    says(H.scratch "none.npy", "no such file")
    path = H.scratch "codes.npy"
    os.remove(path)
    assert.truthy(message(npy.save, path, vx.tensor({ 1, 70000 }, { dtype = "i32" }), { dtype = "u16" })
      :find("element 1 is 70000, of 0 .. 65535", 1, true))
    assert.truthy(message(npy.save, path, vx.tensor { 1 }, { dtype = "u16" }):find("expected i32", 1, true))
    assert.is_nil(H.read(path))
  end)
end)
