-- safetensors: what is written is what the reference writes, and no broken file is taken for a whole one.

local H = require "tests.helper"
local vx = H.vx
local lfs = require "lfs"
local safetensors = require "vertex.safetensors"

local function u64(n)
  local t = {}
  for i = 1, 8 do
    t[i] = string.char(n % 256)
    n = math.floor(n / 256)
  end
  return table.concat(t)
end

--- A file of a header text (padded to 8 bytes with spaces) and data.
local function file(header, data, pad)
  if pad ~= false then header = header .. (" "):rep(-#header % 8) end
  return u64(#header) .. header .. (data or "")
end

local path = H.scratch "case.safetensors"
local function load(bytes) return vx.load(H.write(path, bytes)) end
local function refused(bytes, ...)
  H.write(path, bytes)
  return H.raises(function() vx.load(path) end, path, ...)
end

local ONE, TWO = "\0\0\128\63", "\0\0\0\64" -- 1 and 2 as float32

describe("a file", function()
  it("as the reference writes it comes back byte for byte", function()
    -- by dtype in falling size, then by name; metadata first
    local bytes = file('{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
      .. '"b":{"dtype":"F32","shape":[1,2],"data_offsets":[8,16]},'
      .. '"index":{"dtype":"I32","shape":[2],"data_offsets":[16,24]},'
      .. '"half":{"dtype":"BF16","shape":[3],"data_offsets":[24,30]},'
      .. '"mask":{"dtype":"U8","shape":[2],"data_offsets":[30,32]}}',
      ONE .. TWO .. TWO .. ONE .. "\1\0\0\0\255\255\255\255" .. "\128\63\0\64\64\64" .. "\0\255")
    local t, meta = load(bytes)
    assert.same({ format = "pt" }, meta)
    assert.same({ { 1, 2 }, { { 2, 1 } }, { 1, -1 }, { 1, 2, 3 }, { 0, 255 } },
      { t.a:totable(), t.b:totable(), t.index:totable(), t.half:totable(), t.mask:totable() })
    assert.same({ "f32", "i32", "bf16", "u8" }, { t.a:dtype(), t.index:dtype(), t.half:dtype(), t.mask:dtype() })
    local again = H.scratch "again.safetensors"
    vx.save(again, t, meta)
    assert.equal(bytes, H.read(again))
  end)

  it("of golden numbers comes back number for number", function()
    local t, meta = vx.load "tests/golden/small.softmax-ppl.safetensors"
    vx.save(path, t, meta)
    local u, meta2 = vx.load(path)
    assert.same(meta, meta2)
    local n = 0
    for name, x in pairs(t) do
      n = n + 1
      assert.equal(x:bytes(), u[name]:bytes())
      assert.same(x:shape(), u[name]:shape())
    end
    for _ in pairs(u) do n = n - 1 end
    assert.equal(0, n)
  end)

  it("holds every dtype, scalars, empty tensors and views", function()
    local t = {
      scalar = vx.tensor(2.5), empty = vx.zeros { 0, 3 }, none = vx.zeros { 0 },
        eight = vx.ones { 1, 1, 1, 1, 1, 1, 1, 2 },
      i = vx.tensor({ -2147483648, 2147483647 }, { dtype = "i32" }), u = vx.tensor({ 0, 255 }, { dtype = "u8" }),
      h = vx.tensor({ 1.5, -2 }, { dtype = "bf16" }), view = vx.arange(6):reshape({ 2, 3 }):t(),
        special = vx.tensor { 0 / 0, 1 / 0, -1 / 0, -0.0, 1e-45 },
    }
    vx.save(path, t)
    local u, meta = vx.load(path)
    assert.same({}, meta)
    for name, x in pairs(t) do
      assert.equal(x:dtype(), u[name]:dtype(), name)
      assert.same(x:shape(), u[name]:shape(), name)
      assert.equal(x:bytes(), u[name]:bytes(), name)
    end
    assert.same({ { 0, 3 }, { 1, 4 }, { 2, 5 } }, u.view:totable())
  end)

  it("of the dtypes only others write is read too", function()
    local t = load(file('{"d":{"dtype":"F64","shape":[2],"data_offsets":[0,16]},'
      .. '"l":{"dtype":"I64","shape":[2],"data_offsets":[16,32]},'
      .. '"h":{"dtype":"F16","shape":[6],"data_offsets":[32,44]},'
      .. '"b":{"dtype":"BOOL","shape":[2],"data_offsets":[44,46]}}',
      "\0\0\0\0\0\0\248\63" .. "\0\0\0\0\0\0\0\192" .. "\5\0\0\0\0\0\0\0" .. "\254\255\255\255\255\255\255\255"
      .. "\0\60\0\192\1\0\255\123\0\124\0\128" .. "\0\1"))
    assert.same({ 1.5, -2 }, t.d:totable())
    assert.same({ "i32", { 5, -2 } }, { t.l:dtype(), t.l:totable() })
    assert.same({ 1, -2, 2 ^ -24, 65504, 1 / 0, 0 }, t.h:totable())
    assert.same({ "u8", { 0, 1 } }, { t.b:dtype(), t.b:totable() })
  end)

  it("names the tensor that holds what its dtype here does not", function()
    refused(file('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
      .. '"big":{"dtype":"I64","shape":[1],"data_offsets":[4,12]}}', ONE .. "\0\0\0\0\0\1\0\0"),
      "element 0 is 1099511627776 (I64)", ", in 'big'")
  end)

  it("is not written where u16 names a tensor that is none of it", function()
    local x, missing = vx.tensor({ 1 }, { dtype = "i32" }), H.scratch "missing.safetensors"
    H.raises(function() vx.save(missing, { a = x }, nil, { u16 = { b = true } }) end, "u16 names 'b'", missing)
    assert.is_nil(lfs.attributes(missing))
    vx.save(path, { a = x }, nil, { u16 = { a = true } })
    assert.equal(1, vx.load(path).a:item())
  end)

  it("one tensor of a dtype that is not read does not hide the others, and is told where it is asked for", function()
    local whole = file('{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
      .. '"q":{"dtype":"F8_E4M3","shape":[2,2],"data_offsets":[4,8]},'
      .. '"z":{"dtype":"U64","shape":[1],"data_offsets":[8,16]}}', "\0\0\128\63" .. ("\1"):rep(12))
    local t, metadata = load(whole)
    assert.same({ 1, {} }, { t.a:item(), metadata })
    local names = {}
    for name in pairs(t) do names[#names + 1] = name end
    assert.same({ "a" }, names)
    assert.is_nil(t.other)
    H.raises(function() return t.q end, "'q' has dtype F8_E4M3", "read are")
    H.write(path, file('{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]},'
      .. '"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},"q":{"dtype":"Q7","shape":[3],"data_offsets":[8,11]}}',
      "\0\0\0\0\0\0\128\63\0\0\0"))
    assert.same({ 1 }, vx.load(path).b:totable())
    assert.same({ 1 }, vx.load(path, { names = { "b" } }).b:totable())
    H.raises(function() vx.load(path, { names = { "b", "a" } }) end, "'a' has 9 dimensions; a tensor has at most 8")
    H.raises(function() return vx.load(path).q end, "'q' has dtype Q7; read are")
    H.raises(function() vx.load(path, { names = { a = true } }) end, "names has true under 'a', expected an array")
    H.write(path, whole)
    H.write(path, whole)
    assert.equal(1, vx.load(path, { names = { "a" } }).a:item())
    H.raises(function() vx.load(path, { names = { "a", "z" } }) end, "'z' has dtype U64")
    H.raises(function() vx.load(path, { names = { "b" } }) end, "there is no 'b' in it", "a, q, z")
    H.write(path, file('{"q":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[0,4]}}', ONE))
    H.raises(function() vx.load(path) end, "needs 3 bytes")
    H.write(path, file('{"q":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}', ONE))
    H.raises(function() vx.load(path) end, "'q' has dtype F8_E4M3")
  end)

  it("keeps unicode names and metadata, and whatever else a text can hold", function()
    local t, meta = {}, {}
    for _, name in ipairs { "größe", "τ", "日本語", "🙂", 'quote"', "back\\slash", "line\nbreak", "tab\t", "a/b.c", " ",
      "\1\127" } do
      t[name] = vx.full({ 1 }, #name)
      meta[name] = name .. name
    end
    vx.save(path, t, meta)
    local u, meta2 = vx.load(path)
    assert.same(meta, meta2)
    for name, x in pairs(t) do assert.equal(x:item(), u[name]:item()) end
    -- escapes of others' writers
    local v = load(file('{"\\u03c4\\/\\ud83d\\ude42":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', ONE))
    assert.equal(1, v["τ/🙂"]:item())
  end)

  it("without tensors is a file", function()
    vx.save(path, {}, { only = "text" })
    local t, meta = vx.load(path)
    assert.is_nil(next(t))
    assert.same({ only = "text" }, meta)
    vx.save(path, {})
    assert.same({}, (vx.load(path)))
    assert.same({}, (load(file "{}")))
  end)

  it("is read onto a device, and its metadata alone", function()
    vx.save(path, { x = vx.ones { 3 } }, { key = "text" })
    assert.equal("cpu", vx.load(path, { device = "cpu" }).x:device())
    assert.same({ key = "text" }, safetensors.metadata(path))
  end)

  it("may have its entries in any order, and no padding", function()
    local t = load(file('{"b":{"data_offsets":[4,8],"shape":[1],"dtype":"F32"},'
      .. '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', ONE .. TWO, false))
    assert.same({ 1, 2 }, { t.a:item(), t.b:item() })
  end)
end)

describe("a broken file is refused by name:", function()
  local good = file('{"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    .. '"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}', ONE .. TWO .. ONE)

  it("cut off anywhere", function()
    assert.is_truthy(load(good).a)
    for n = 0, #good - 1 do refused(good:sub(1, n)) end
  end)

  it("with anything after it", function()
    refused(good .. "\0", "1 bytes follow")
    refused(good .. ("x"):rep(1000))
  end)

  it("with any header byte changed, unless it still says the same or another consistent thing", function()
    -- what may pass: another name, another text of metadata, a space; never other shapes or offsets over the same bytes
    local length = #good - 12
    local accepted = 0
    for at = 1, length do
      for _, change in ipairs { 0, 32, 34, 44, 48, 57, 91, 123, 125, 255 } do
        if good:byte(at) ~= change then
          H.write(path, good:sub(1, at - 1) .. string.char(change) .. good:sub(at + 1))
          local ok, t = pcall(vx.load, path)
          if ok then
            accepted = accepted + 1
            local total = 0
            for _, x in pairs(t) do
              assert.equal("f32", x:dtype())
              total = total + x:numel()
            end
            assert.is_true(total == 3 or total > 0 and getmetatable(t) ~= nil) -- a dtype of no known name is left out
          else
            assert.is_truthy(t:find(path, 1, true), t)
          end
        end
      end
    end
    assert.is_true(accepted < length) -- of ten changes of each byte
  end)

  it("with random bytes changed", function()
    local random = H.random(1)
    for _ = 1, 2000 do
      local bytes = { good:byte(1, #good - 12) }
      for _ = 1, random:integer(1, 4) do bytes[random:integer(1, #bytes)] = random:integer(0, 255) end
      local text = {}
      for i, b in ipairs(bytes) do text[i] = string.char(b) end
      H.write(path, table.concat(text) .. good:sub(-12))
      local ok, t = pcall(vx.load, path)
      if ok then
        for _, x in pairs(t) do assert.is_true(x:numel() <= 3) end
      else
        assert.is_truthy(t:find(path, 1, true), t)
      end
    end
  end)

  it("with a lying header length", function()
    local header = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for _, n in ipairs { 0, 1, #header - 1, #header + 1, #header + 5, 1e6, 2 ^ 31, 2 ^ 40, 2 ^ 53 } do
      refused(u64(n) .. header .. ONE)
    end
    refused(("\255"):rep(8) .. header .. ONE, "not a safetensors file")
    refused(("\0"):rep(7) .. "\128" .. header .. ONE, "not a safetensors file")
    refused("", "not a safetensors file")
    refused("PK\3\4 something else entirely, long enough")
  end)

  local function entry(name, dtype, shape, from, to)
    return ('"%s":{"dtype":"%s","shape":%s,"data_offsets":[%s,%s]}'):format(name, dtype, shape, from, to)
  end

  it("with lying offsets, holes, overlaps", function()
    refused(file("{" .. entry("a", "F32", "[1]", 0, 8) .. "}", ONE .. TWO), "'a'", "needs 4 bytes", "8")
    refused(file("{" .. entry("a", "F32", "[2]", 0, 4) .. "}", ONE), "'a'", "8", "4")
    refused(file("{" .. entry("a", "F32", "[2]", 0, 8) .. "}", ONE), "'a'", "outside")
    refused(file("{" .. entry("a", "F32", "[1]", 4, 8) .. "}", ONE .. TWO), "'a'", "hole")
    refused(file("{" .. entry("a", "F32", "[1]", 0, 4) .. "," .. entry("b", "F32", "[1]", 8, 12) .. "}",
      ONE .. TWO .. ONE), "'b'", "hole")
    refused(file("{" .. entry("a", "F32", "[1]", 0, 4) .. "," .. entry("b", "F32", "[1]", 0, 4) .. "}", ONE), "overlap")
    refused(file("{" .. entry("a", "F32", "[2]", 0, 8) .. "," .. entry("b", "F32", "[1]", 4, 8) .. "}", ONE .. TWO),
      "overlap")
    refused(file("{" .. entry("a", "F32", "[1]", 4, 0) .. "}", ONE), "'a'")
    refused(file("{" .. entry("a", "F32", "[0]", 4, 4) .. "}", ONE), "hole")
    refused(file('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}', ONE), "'a'")
    refused(file('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}', ONE), "'a'")
    refused(file('{"a":{"dtype":"F32","shape":[1]}}', ONE), "'a'")
  end)

  it("with sizes that are no sizes", function()
    for _, bad in ipairs { "-1", "1.5", "NaN", "nan", "1e400", "-0.5", '"1"', "null", "true", "[[1]]", "01", "0x1",
      "+1", "1.0",
      "1e18", "9007199254740993", "Infinity" } do
      refused(file("{" .. entry("a", "F32", "[" .. bad .. "]", 0, 4) .. "}", ONE))
      refused(file("{" .. entry("a", "F32", "[1," .. bad .. "]", 0, 4) .. "}", ONE))
      refused(file("{" .. entry("a", "F32", "[1]", bad, 4) .. "}", ONE))
      refused(file("{" .. entry("a", "F32", "[1]", 0, bad) .. "}", ONE))
      refused(file("{" .. entry("a", "F32", bad, 0, 4) .. "}", ONE))
    end
    refused(file("{" .. entry("a", "F32", "{}", 0, 4) .. "}", ONE .. TWO))
    refused(file("{" .. entry("a", "F32", "[1,1,1,1,1,1,1,1,1]", 0, 4) .. "}", ONE), "at most 8")
    refused(file("{" .. entry("a", "F32", '{"0":1}', 0, 4) .. "}", ONE))
    -- a product that overflows 64 bits to something small
    refused(file("{" .. entry("a", "F32", "[4294967296,4294967296,4294967296]", 0, 4) .. "}", ONE))
    refused(file("{" .. entry("a", "F32", "[0,1e300]", 0, 0) .. "}", ""))
  end)

  it("with unknown dtypes", function()
    for _, bad in ipairs { "F8_E4", "f32", "", "C65", "u64", ">F32", "constructor" } do
      refused(file("{" .. entry("a", bad, "[1]", 0, 4) .. "}", ONE), "'a'", "F32")
    end
    refused(file('{"a":{"dtype":5,"shape":[1],"data_offsets":[0,4]}}', ONE), "'a'")
    refused(file('{"a":{"shape":[1],"data_offsets":[0,4]}}', ONE), "'a'")
    refused(file('{"a":{"dtype":null,"shape":[1],"data_offsets":[0,4]}}', ONE), "'a'")
  end)

  it("with a name twice", function()
    refused(file("{" .. entry("a", "F32", "[1]", 0, 4) .. "," .. entry("a", "F32", "[1]", 4, 8) .. "}", ONE .. TWO))
    refused(file("{" .. entry("a", "F32", "[1]", 0, 4) .. "," .. entry("a", "F32", "[1]", 0, 4) .. "}", ONE), "'a'")
    refused(file("{" .. entry("a", "F32", "[1]", 0, 4) .. "," .. entry("\\u0061", "F32", "[1]", 0, 4) .. "}", ONE),
      "'a'")
    refused(file('{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', ONE))
    refused(file('{"__metadata__":{"k":"1"},"__metadata__":{"k":"2"},' .. entry("a", "F32", "[1]", 0, 4) .. "}", ONE))
  end)

  it("with a header that is no JSON object", function()
    for _, bad in ipairs { "[]", "null", "5", '"x"', "{", "{}}", "{}{}", '{"a"}', '{"a":5}', '{"a":[]}', '{"a":null}',
      "{'a':1}", '{"a":{}}', "{,}",
      ('{"a":'):rep(2000),
      ("["):rep(5000), '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},}', "\0\0", "{} x" } do
      refused(file(bad, ONE))
    end
    refused(file("  {}", ""))
    local fine = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for _, bad in ipairs { "\\ud800", "\\udc00", "\\ud800\\u0041", "\\u12g4", "\\x41", "\1", "\255", "\192\128",
      "\237\160\128",
      "\244\144\128\128", "\226\130" } do
      refused(file('{"' .. bad .. '":' .. fine, ONE))
    end
    assert.equal(1, load(file('{"\237\159\191\244\143\191\191\240\144\128\128":' .. fine,
      ONE))["\237\159\191\244\143\191\191\240\144\128\128"]:item())
  end)

  it("with metadata that is no text", function()
    for _, bad in ipairs { "5", "[]", '["a"]', '{"a":5}', '{"a":null}', '{"a":{}}', '"x"', "true" } do
      refused(file('{"__metadata__":' .. bad .. "," .. entry("a", "F32", "[1]", 0, 4) .. "}", ONE), "__metadata__")
    end
  end)

  it("that is not there, or a folder", function()
    H.raises(function() vx.load(H.scratch "missing") end, "missing", "no such file")
    H.raises(function() vx.load(H.scratch "") end, "load")
    H.raises(function() vx.load() end, "load", "nil")
  end)
end)

describe("saving", function()
  it("names what it cannot save", function()
    H.raises(function() vx.save(path, { x = 5 }) end, "'x'", "number", "tensor")
    H.raises(function() vx.save(path, { vx.ones { 1 } }) end, "number", "text")
    H.raises(function() vx.save(path, { x = vx.ones { 1 } }, { key = 5 }) end, "metadata")
    H.raises(function() vx.save(path, { x = vx.ones { 1 } }, { "text" }) end, "metadata")
    H.raises(function() vx.save("/nonexistent/folder/x", { x = vx.ones { 1 } }) end, "/nonexistent/folder/x")
    H.raises(function() vx.save(path, { ["\255"] = vx.ones { 1 } }) end, "UTF-8")
    H.raises(function() vx.save(path, {}, { key = "\255" }) end, "UTF-8")
    H.raises(function() vx.save(path, { __metadata__ = vx.ones { 1 } }) end, "__metadata__")
  end)

  it("leaves the old file, and no other, where it fails", function()
    local folder = H.scratch "folder"
    lfs.mkdir(folder)
    local name = folder .. "/x"
    vx.save(name, { x = vx.ones { 2 } })
    local before, dead = H.read(name), vx.ones { 2 }
    dead:release()
    H.raises(function() vx.save(name, { x = vx.ones { 3 }, y = dead }) end, "released")
    H.raises(function() vx.save(folder .. "/new", { y = dead }) end, "released")
    assert.equal(before, H.read(name))
    local files = {}
    for f in lfs.dir(folder) do
      if f ~= "." and f ~= ".." then files[#files + 1] = f end
    end
    assert.same({ "x" }, files)
  end)

  it("onto a full disk fails and leaves nothing", function()
    local full = io.open("/dev/full", "wb")
    assert.is_truthy(full)
    full:close()
    -- a file size limit stands in for the disk, in a process of its own
    local target = H.scratch "big.safetensors"
    local out = H.child(([[
      local vx = require "vertex"
      local ok, message = pcall(vx.save, "%s", { x = vx.zeros { 4000000 } })
      print(ok, message) ]]):format(target), "trap '' XFSZ; ulimit -f 2000;")
    assert.is_truthy(out:find("false", 1, true), out)
    assert.is_truthy(out:find("big.safetensors", 1, true), out)
    assert.is_nil(H.read(target))
    for f in lfs.dir(H.scratch "") do assert.is_nil(f:find("big.safetensors", 1, true), f) end
  end)

  it("writes the same bytes for the same tensors, whatever order they were given in", function()
    local a, b = {}, {}
    for i = 1, 50 do a["name" .. i] = vx.full({ 2 }, i) end
    for i = 50, 1, -1 do b["name" .. i] = vx.full({ 2 }, i) end
    vx.save(path, a)
    local first = H.read(path)
    vx.save(path, b)
    assert.equal(first, H.read(path))
    assert.equal(0, (#first - 400) % 8)
  end)
end)
