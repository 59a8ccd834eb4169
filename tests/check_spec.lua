-- The checks of options and numbers: what passes comes back, what does not is told in one form.

local H = require "tests.helper"
local check = require "vertex.check"

describe("check.options", function()
  local known = { k = { "count", 8 }, from = "whole", rate = "positive", metric = { { "ce", "l2" }, "ce" },
    log = { "boolean", false }, title = "text", palette = "string", other = "any" }
  local function options(o) return check.options("f", o, known) end

  it("gives what was given, and the defaults of the rest", function()
    assert.same({ k = 8, metric = "ce", log = false }, options())
    assert.same({ k = 3, metric = "l2", log = true, title = "7", from = 0, other = { 1 } },
      options { k = 3, metric = "l2", log = true, title = 7, from = 0, other = { 1 } })
  end)

  it("says which option is unknown and which one was meant", function()
    H.raises(function() options { pallete = 1 } end, "f: unknown option 'pallete', did you mean 'palette'?; ",
      "known: from, k, log, metric, other, palette, rate, title")
    H.raises(function() options { K = 1 } end, "unknown option 'K', did you mean 'k'?")
    H.raises(function() options { nothing = 1 } end, "unknown option 'nothing'; known: from")
    H.raises(function() options { 3 } end, "unknown option 1; known")
    H.raises(function() options(3) end, "f: options are 3, expected a table")
  end)

  it("says what an option's value should be", function()
    for text, o in pairs { ["k is 0, expected an integer of 1 or more"] = { k = 0 },
      ["k is 1.5, expected an integer"] = { k = 1.5 }, ["from is -1, expected an integer of 0 or more"] = { from = -1 },
      ["rate is nan, expected a positive number"] = { rate = 0 / 0 }, ["rate is inf"] = { rate = math.huge },
      ["metric is 'l1', expected ce or l2"] = { metric = "l1" }, ["log is 1, expected a boolean"] = { log = 1 },
      ["title is a table, expected a string"] = { title = {} },
      ["palette is 3, expected a string"] = { palette = 3 } } do
      H.raises(function() options(o) end, "f: " .. text)
    end
  end)
end)

describe("check", function()
  it("knows integers and numbers by their bounds", function()
    assert.equal(5, check.integer("f", "n", 5, 1, 5))
    assert.equal(0.5, check.number("f", "p", 0.5, 0, 1))
    H.raises(function() check.integer("f", "n", 6, 1, 5) end, "f: n is 6, expected an integer from 1 to 5")
    H.raises(function() check.integer("f", "n", 2 ^ 53 + 2, 1) end, "expected an integer of 1 or more")
    H.raises(function() check.number("f", "p", 2, 0, 1) end, "f: p is 2, expected a number from 0 to 1")
    H.raises(function() check.number("f", "p", "x", 0, math.huge) end, "f: p is 'x', expected a number of at least 0")
  end)

  it("finds the nearest name, or none", function()
    local names = { "softmax-knn-ce", "softmax-knn-l2", "ste-euclid", "k" }
    assert.equal("softmax-knn-ce", check.nearest("softmax-knnce", names))
    assert.equal("ste-euclid", check.nearest("STE-euclide", names))
    assert.is_nil(check.nearest("vq", names))
  end)
end)
