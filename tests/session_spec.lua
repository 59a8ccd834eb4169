-- Sessions without a terminal: what an input is, when it is complete, its values and errors, completion; and values as
-- text.

local H = require "tests.helper"
local vx = H.vx
local Session = require "vertex.interactive.session"
local show = require "vertex.interactive.show"

local function session() return Session.new { env = setmetatable({ vx = vx }, { __index = _G }) } end

--- The values of the last of some inputs.
local function values(...)
  local s, last = session()
  for _, input in ipairs { ... } do
    local problem
    last, problem = s:run(input)
    if not last then error(problem.message, 2) end
  end
  return unpack(last, 1, last.n)
end

describe("an input", function()
  it("has the values of the expression it is or ends in", function()
    assert.equal(3, values "1 + 2")
    assert.same({ 1, "b", nil, 4 }, { values "1, 'b', nil, 4" })
    assert.equal(5, values "x = 2; x + 3")
    assert.equal(6, values "x = 2\ny = 3\nx * y")
    assert.equal(7, values "-- a comment\n7 -- another")
    assert.equal(8, values "= 8")
    assert.equal(0, select("#", values "x = 1"))
  end)

  it("makes its locals variables of the session", function()
    assert.equal(3, values("local a, b = 1, 2", "a + b"))
    assert.equal(nil, (values("local a = 1", "local a", "a")))
    assert.equal(4, values("local function double(n) return 2 * n end", "double(2)"))
    assert.equal(1, values("a = 1; do local a = 2 end", "a")) -- only those of the top level
    assert.equal("local", values "s = 'local'; s") -- and only where it is a word of the language
    assert.equal(2, values("local t = { f = function() local inner = 2 return inner end }", "t.f()"))
  end)

  it("leaves its first value in _, which one without values leaves alone", function()
    assert.equal(12, values("5 + 6", "_ + 1"))
    assert.equal(11, values("5 + 6", "x = 1", "_"))
    assert.equal(nil, (values("5 + 6", "nil", "_")))
  end)

  it("is shown unless a semicolon follows", function()
    local s = session()
    for input, expected in pairs { ["1"] = true, ["1;"] = false, ["1; -- so"] = false, ["';'"] = true } do
      assert.equal(expected, (select(2, s:run(input))), input)
    end
  end)

  it("is complete, goes on, or is wrong", function()
    for input, expected in pairs { ["x = 1"] = "complete", [""] = "complete", ["f("] = "incomplete",
      ["for i = 1, 2 do"] = "incomplete",
      ["if a then\nb()\nelse"] = "incomplete", ["s = [[open"] = "incomplete", ["x = = 1"] = "invalid",
        ["end"] = "invalid", ["'open"] = "invalid",
      ["?vx.nn"] = "complete", ["function f()\nreturn 1\nend"] = "complete", ["{ 1,"] = "incomplete",
        ["--[[ open"] = "incomplete" } do
      assert.equal(expected, (Session.state(input)), input)
    end
    assert.equal("    ", (select(2, Session.state "for i = 1, 2 do\n  if i then")))
  end)
end)

describe("an error", function()
  it("comes with the lines that led to it, of inputs alone", function()
    local s = session()
    s:run "function f(t)\n  return t.a.b\nend"
    local none, problem = s:run "f {}"
    assert.equal(nil, none)
    assert.equal("[1]:2: attempt to index field 'a' (a nil value)", problem.message)
    assert.same({ { where = "[1]:2", what = "f", line = "return t.a.b" },
      { where = "[2]:1", what = "", line = "f {}" } }, problem.trace)
  end)

  it("of a call into the library names the input's line and shows no frame of the library", function()
    local _, problem = session():run "x = 1\ny = vx.matmul(vx.zeros{2,3}, vx.zeros{4,5})"
    assert.truthy(problem.message:find("^%[1%]:2: matmul: a %(2,3%)"), problem.message)
    assert.same({ { where = "[1]:2", what = "", line = "y = vx.matmul(vx.zeros{2,3}, vx.zeros{4,5})" } }, problem.trace)
  end)

  it("may be any value, a stack that overflows, or a wrong word", function()
    assert.equal("{ code = 4 }", (select(2, session():run "error { code = 4 }")).message)
    assert.truthy((select(2, session():run "function f() return 1 + f() end f()")).message:find "stack overflow")
    local _, problem = session():run "x = 1\ny = = 2"
    assert.truthy(problem.syntax)
    assert.same({ { where = "[1]:2", what = "", line = "y = = 2" } }, problem.trace)
  end)
end)

describe("completion", function()
  local s = session()
  s:run [[
    model = vx.nn.Sequential(vx.nn.Linear(2, 3))
    word = 'text'
    t = { ['a key'] = { inner = 1 }, list = { { deep = 1 } } }]]
  local function complete(text)
    local first, names = s:complete(text)
    return text:sub(first), table.concat(names, " ")
  end

  it("goes through tables, metatables, strings and the library's late modules", function()
    assert.same({ "zer", "zeros" }, { complete "x = vx.zer" })
    assert.same({ "pa", "parameter_count parameters" }, { complete "model:pa" })
    assert.same({ "we", "weight" }, { complete "model[1].we" })
    assert.same({ "up", "upper" }, { complete "word:up" })
    assert.same({ "pl", "plot" }, { complete "f(vx.pl" })
    assert.same({ "", "inner" }, { complete "t['a key']." })
    assert.same({ "", "deep" }, { complete "t.list[1]." })
    assert.same({ "mod", "model module" }, { complete "1 + mod" })
    assert.same({ "whi", "while" }, { complete "whi" })
  end)

  it("offers quantizers and files in quotes, nothing in comments or after two dots", function()
    assert.same({ "ste-e", "ste-euclid" }, { complete 'vx.quantizer("ste-e' })
    assert.truthy(select(2, complete 'vx.quantizer("'):find "hgumbel%-knn%-ce")
    assert.same({ "tests/session_", "tests/session_spec.lua" }, { complete 'dofile "tests/session_' })
    assert.equal("", (select(2, complete "-- vx.")))
    assert.same({ "ste-e", "ste-euclid" }, { complete "?ste-e" })
  end)
end)

describe("a value as text", function()
  it("is what it was written as, keys in order, large tables cut", function()
    assert.equal('"a\\"b\\n\\0"', show.value 'a"b\n\0')
    assert.equal('{ 1, 2, [0] = 0, a = { b = true }, ["c d"] = "e" }',
      show.value { 1, 2, [0] = 0, a = { b = true }, ["c d"] = "e" })
    local itself = {}
    itself.me = itself
    assert.equal("{ me = { itself } }", show.value(itself))
    local long = {}
    for i = 1, 1000 do long[i] = i end
    local text = show.value(long)
    assert.truthy(text:find("... 940 more", 1, true), text)
    for line in text:gmatch "[^\n]+" do assert.truthy(#line <= 104, line) end
    assert.equal("{}", show.value {})
  end)

  it("tells functions by their parameters and place, ops by those they were written with", function()
    assert.truthy(show.value(function(a, b, ...) return a, b,
      ... end):find "^function%(a, b, %.%.%.%) at tests/session_spec%.lua:%d+$")
    assert.truthy(show.value(vx.linear):find "^function%(x, w, bias%) at lua/vertex/ops/linear%.lua:%d+$")
    assert.equal("function (built in)", show.value(math.sin))
    assert.equal("class of modules Linear", show.value(vx.nn.Linear))
    assert.truthy(show.value(vx.optim):find "^module vertex.optim\nAdamW ")
    assert.equal("{ f32 (2) on cpu, module vertex.optim }", show.value { vx.zeros { 2 }, vx.optim })
  end)
end)
