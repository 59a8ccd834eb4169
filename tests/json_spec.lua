-- JSON and UTF-8: what runs, notebooks and Jupyter's messages are written and read with.

local H = require "tests.helper"
local json = require "vertex.json"
local utf8 = require "vertex.utf8"

describe("json", function()
  it("writes the same text for the same value: keys sorted, all digits", function()
    assert.equal([[{"a":[1,-2.5,"x"],"b":{"c":true,"d":false},"e":0.1,"n":9007199254740991}]],
      json.encode { n = 2 ^ 53 - 1, e = 0.1, b = { d = false, c = true }, a = { 1, -2.5, "x" } })
    assert.equal([["/ \" \\ \n é"]], json.encode "/ \" \\ \n é")
    assert.equal("[null,null,null]", json.encode { 0 / 0, 1 / 0, -1 / 0 })
    assert.equal("null", json.encode(nil))
  end)

  it("reads what it wrote", function()
    local random = H.random(3)
    for _ = 1, 50 do
      local value = { list = random:list(5, -1e9, 1e9), text = ("\0\1\"\\/é"):rep(random:integer(1, 3)), [tostring(
        random:integer(1, 9))] = { yes = true, tiny = random:uniform() * 2 ^ -1000 } }
      assert.same(value, json.decode(json.encode(value)))
    end
  end)

  it("tells empty objects from empty arrays where they are marked", function()
    assert.equal([=[{"array":[],"marked":{"1":"x"},"object":{},"plain":{}}]=],
      json.encode { plain = {}, array = json.array(), object = json.object(), marked = json.object { "x" } })
  end)

  it("makes nil of null, and gives a reason where there is no JSON", function()
    local value = json.decode [=[{"a": null, "b": [1, null, 3], "c": "\u00e9"}]=]
    assert.same({ b = { 1, [3] = 3 }, c = "é" }, value)
    for _, text in ipairs { "", "{", "[1,]", "nope", '{"a" 1}' } do
      local none, reason = json.decode(text)
      assert.is_nil(none)
      assert.is_string(reason, text)
    end
  end)

  it("refuses what JSON cannot hold", function()
    local circle = {}
    circle[1] = circle
    H.raises(function() json.encode { f = print } end, "a function cannot be written")
    H.raises(function() json.encode { H.vx.zeros { 1 } } end, "a tensor cannot be written")
    H.raises(function() json.encode(circle) end, "is one within itself?")
  end)
end)

describe("utf8", function()
  local GOOD = { "", "plain", "é", "\224\160\128", "\237\159\191", "\239\191\191", "\240\144\128\128",
    "\244\143\191\191" }
  -- a byte that begins nothing, overlong forms, a surrogate, beyond the last code point, an unfinished one inside
  local BAD = { "\128", "\255", "\192\128", "\224\159\191", "\240\143\191\191", "\237\160\128", "\244\144\128\128",
    "\226\130x" }

  it("knows what is well formed", function()
    for _, text in ipairs(GOOD) do assert.is_true(utf8.valid("a" .. text .. "b" .. text), text) end
    for _, text in ipairs(BAD) do
      assert.is_false(utf8.valid(text))
      assert.is_false(utf8.valid("aé" .. text))
    end
  end)

  it("encodes every length of character", function()
    assert.same({ "A", "\194\128", "\223\191", "\224\160\128", "\239\191\191", "\240\144\128\128", "\244\143\191\191" },
      { utf8.char(65), utf8.char(0x80), utf8.char(0x7FF), utf8.char(0x800), utf8.char(0xFFFF), utf8.char(0x10000),
        utf8.char(0x10FFFF) })
  end)

  it("replaces what is none, byte by byte, and keeps an unfinished character for later", function()
    for _, text in ipairs(GOOD) do assert.same({ text, "" }, { utf8.clean(text) }) end
    for _, text in ipairs(BAD) do
      local clean, rest = utf8.clean(text .. "|")
      assert.is_true(utf8.valid(clean) and clean:find("\239\191\189", 1, true) ~= nil)
      assert.equal("", rest)
    end
    assert.same({ "a\239\191\189\239\191\189b", "" }, { utf8.clean "a\192\128b" })
    assert.same({ "é", "\226\130" }, { utf8.clean "é\226\130" })
    assert.same({ "€", "" }, { utf8.clean("\226\130" .. "\172") })
    assert.equal(3, utf8.length "a€é")
  end)
end)
