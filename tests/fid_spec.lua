-- Moments, Fréchet distance and Inception Score against NumPy and SciPy (golden/make_frechet.py says how).

local H = require "tests.helper"
local vx = H.vx

local json = require "vertex.json"

local set, meta = vx.load(H.root .. "/tests/golden/fid/frechet.safetensors")

--- Gives the numbers of nested tables as one list.
local function flat(t)
  return H.flat { totable = function() return t end }
end

--- Feeds x to moments in batches of some rows.
local function moments_of(x, rows)
  local m = vx.metrics.moments(x:size(2))
  for first = 1, x:size(1), rows do m:add(x:narrow(1, first, math.min(rows, x:size(1) - first + 1))) end
  return m
end

describe("moments", function()
  it("are NumPy's", function()
    local m = moments_of(set["well.a"], 7)
    assert.equal(200, m:count())
    H.close(m:mean(), json.decode(meta["well.mean"]), 0, 1e-15)
    H.close(flat(m:covariance()), flat(json.decode(meta["well.covariance"])), 0, 1e-14)
  end)

  it("cancel nothing where the mean is far larger than the deviation", function()
    local x = vx.tensor { { 16777216, 1 }, { 16777218, 2 }, { 16777220, 4 } }
    local m = vx.metrics.moments(2):add(x)
    H.close(m:mean(), { 16777218, 7 / 3 }, 1e-15, 0)
    H.close(flat(m:covariance()), { 4, 3, 3, 7 / 3 }, 1e-15, 0)
  end)

  it("do not depend on batches, on questions in between, or on threads", function()
    vx.seed(3)
    local x = vx.randn { 1100, 5 }
    local function values(m) return { m:mean(), m:covariance() } end
    local whole = values(moments_of(x, 1100))
    for _, rows in ipairs { 1, 100, 256, 257, 1024 } do assert.same(whole, values(moments_of(x, rows)), rows) end
    local asked = vx.metrics.moments(5)
    for first = 1, 1100, 100 do
      asked:add(x:narrow(1, first, 100))
      asked:covariance()
      asked:frechet(asked)
    end
    assert.same(whole, values(asked))
    H.with_threads(1, function() assert.same(whole, values(moments_of(x, 300))) end)
  end)

  it("come from any device", function()
    local x = set["few.a"]
    assert.same(vx.metrics.moments(24):add(x):covariance(), vx.metrics.moments(24):add(x:to "emu:0"):covariance())
  end)

  it("refuse what is no rows of numbers, and count nothing of it", function()
    local m = vx.metrics.moments(3):add(vx.ones { 2, 3 })
    H.raises(function() m:add(vx.ones { 2, 4 }) end, "moments: x (2,4) should have the shape (N,3)")
    H.raises(function() m:add(vx.ones { 3 }) end, "moments: x (3) should have the shape (N,3)")
    H.raises(function() m:add(vx.ones({ 2, 3 }, { dtype = "i32" })) end, "moments: x (2,3) is i32, expected f32")
    H.raises(function() m:add { 1, 2, 3 } end, "moments:add: x is a table, expected a tensor f32 (N,D)")
    H.raises(function() m:add(vx.tensor { { 1, 2, 3 }, { 1, 0 / 0, 3 }, { 1 / 0, 1, 1 } }) end,
      "2 of 3 rows hold a NaN or Inf, the first of them row 1")
    assert.equal(2, m:count())
    H.raises(function() vx.metrics.moments(0) end, "moments: features is 0")
    H.raises(function() vx.metrics.moments(2):mean() end, "moments: of no rows")
    H.raises(function() vx.metrics.moments(1):add(vx.ones { 1, 1 }):covariance() end, "a covariance of 1 row")
  end)
end)

describe("the effective rank", function()
  it("is the participation ratio of the covariance's eigenvalues", function()
    local covariance = vx.metrics.moments(24):add(set["ill.a"]):covariance()
    local values = require("vertex.core").symmetric_eigen(covariance)
    local sum, squares = 0, 0
    for _, v in ipairs(values) do sum, squares = sum + v, squares + v * v end
    H.close({ vx.metrics.effective_rank(set["ill.a"]) }, { sum * sum / squares }, 1e-12, 0)
    local even = vx.tensor { { 1, 0, 0 }, { -1, 0, 0 }, { 0, 1, 0 }, { 0, -1, 0 }, { 0, 0, 1 }, { 0, 0, -1 } }
    H.close({ vx.metrics.effective_rank(even) }, { 3 }, 1e-12, 0)
    H.close({ vx.metrics.effective_rank(vx.tensor { { 1, 2 }, { 2, 4 }, { 5, 10 } }) }, { 1 }, 1e-12, 0)
    assert.equal(0, vx.metrics.effective_rank(vx.ones { 4, 3 }))
    H.raises(function() vx.metrics.effective_rank(vx.ones { 4 }) end, "effective_rank: x (4) should have the shape")
    H.raises(function() vx.metrics.effective_rank(vx.ones { 1, 4 }) end, "a covariance of 1 row")
  end)
end)

describe("tightness", function()
  it("is of the largest probabilities, and of the way to the vertices", function()
    local p = vx.tensor { { 1, 0, 0 }, { 0.2, 0.8, 0 }, { 0.5, 0.25, 0.25 }, { 0.1, 0.1, 0.8 } }
    local t = vx.metrics.tightness(p)
    H.close({ t.mean, t.min, t.q05, t.q25, t.median, t.q75, t.q95 }, { 0.775, 0.5, 0.5, 0.5, 0.8, 0.8, 1 }, 1e-6, 0)
    H.close({ t.gap }, { (0 + 0.08 + 0.375 + 0.06) / 4 }, 1e-6, 0)
    H.raises(function() vx.metrics.tightness(vx.zeros { 0, 3 }) end, "tightness: p (0,3) should have the shape (N,M)")
    H.raises(function() vx.metrics.tightness(vx.full({ 2, 3 }, 0 / 0)) end, "2 rows hold a NaN or Inf")
  end)

  it("says which share of the rows no vertex selects", function()
    local p = vx.tensor { { 0.9, 0.1 }, { 0.8, 0.2 }, { 0.3, 0.7 }, { 0.6, 0.4 }, { 0.05, 0.95 } }
    H.close({ vx.metrics.unselected(p, { k = 1 }), vx.metrics.unselected(p, { k = 2, metric = "l2" }),
      vx.metrics.unselected(p, { k = 5 }) }, { 0.6, 0.2, 0 }, 1e-6, 1e-7)
    H.raises(function() vx.metrics.unselected(p, { k = 6 }) end, "unselected: k is 6, expected an integer from 1 to 5")
  end)

  it("says which share of the vertices is contested", function()
    local p = vx.tensor { { 0.9, 0.1, 0 }, { 0.45, 0.35, 0.2 }, { 0.4, 0.3, 0.3 }, { 0.1, 0.1, 0.8 } }
    -- K = 1: rows 0, 1, 3; K = 2: 0 and 1, 1 and 2, 3 and 2; K = 4: all of them are everybody's
    H.close({ vx.metrics.contested(p, { k = 1 }), vx.metrics.contested(p, { k = 2 }),
      vx.metrics.contested(p, { k = 4 }) }, { 0, 1, 1 }, 1e-6, 1e-7)
    local q = vx.tensor { { 0.9, 0.1, 0 }, { 0.8, 0.2, 0 }, { 0, 0.1, 0.9 } } -- K = 1: 0, 1, 2
    H.close({ vx.metrics.contested(q, { k = 1 }) }, { 0 }, 1e-6, 1e-7)
    local r = vx.tensor { { 0.9, 0.8, 0 }, { 0, 0.2, 0 }, { 0, 0.1, 0.9 } } -- K = 1: rows 0, 0, 2
    H.close({ vx.metrics.contested(r, { k = 1 }) }, { 2 / 3 }, 1e-6, 1e-7)
    H.raises(function() vx.metrics.contested(p, { k = 5 }) end, "contested: k is 5, expected an integer from 1 to 4")
  end)

  it("of a quantizer is that of its own probabilities, codebook by codebook and shard by shard", function()
    local options = { dim = 6, codes = 5, groups = 2, k = 4, shards = 2, seed = 3 }
    vx.seed(4)
    local z = vx.randn { 30, 6 }
    local q = vx.quantizer("softmax-knn-l2", options)
    local found, expected = vx.metrics.smoothing(q, z), { tightness = 0, gap = 0, unselected = 0, contested = 0 }
    for g = 1, 2 do
      local p = vx.exp(q:log_pi(z:reshape { 30, 2, 3 }, g))
      local t = vx.metrics.tightness(p)
      expected.tightness, expected.gap = expected.tightness + t.mean / 2, expected.gap + t.gap / 2
      for h = 0, 1 do
        local part, how = p:narrow(1, 15 * h + 1, 15), { k = 2, metric = "l2" }
        expected.unselected = expected.unselected + vx.metrics.unselected(part, how) / 4
        expected.contested = expected.contested + vx.metrics.contested(part, how) / 4
      end
    end
    for name, value in pairs(expected) do H.close({ found[name] }, { value }, 1e-5, 1e-6) end
    assert.is_true(found.tightness_q05 <= found.tightness_q50 and found.tightness_q50 <= found.tightness_q95)
    assert.is_nil(vx.metrics.smoothing(vx.quantizer("softmax-knn-ce", { dim = 6, codes = 5, k = 31 }), z).unselected)
    assert.same({}, vx.metrics.smoothing(vx.quantizer("ste-euclid", { dim = 6, codes = 5 }), z))
    H.raises(function() vx.metrics.smoothing(q, vx.zeros { 3, 4 }) end, "smoothing: z (3,4)", "width 6")
  end)
end)

describe("the Fréchet distance", function()
  for name in pairs(meta) do
    local case = name:match "^(.*)%.frechet$"
    if case then
      it("is SciPy's: " .. case, function()
        local a, b, expected = set[case .. ".a"], set[case .. ".b"], tonumber(meta[name])
        H.close({ tonumber(meta[case .. ".sqrtm"]) }, { expected }, 1e-6, 0, "sqrtm")
        H.close({ vx.metrics.frechet(a, b) }, { expected }, 1e-6, 0)
        H.close({ vx.metrics.frechet(b, a) }, { expected }, 1e-6, 0, "the other way round")
        H.close({ moments_of(a, 11):frechet(moments_of(b, 64)) }, { expected }, 1e-6, 0, "streamed")
      end)
    end
  end

  it("of few rows uses the rows themselves, which squares nothing", function()
    H.close({ vx.metrics.frechet(set["few.a"], set["few.b"]) }, { tonumber(meta["few.frechet"]) }, 1e-13, 0)
  end)

  it("of a set and itself is 0, never below", function()
    for _, case in ipairs { "well", "ill", "few", "subspace" } do
      local d = vx.metrics.frechet(set[case .. ".a"], set[case .. ".a"])
      assert.is_true(d >= 0 and d < 2e-5, case .. ": " .. d)
    end
  end)

  it("refuses sets that do not fit", function()
    local x = vx.randn { 5, 3 }
    H.raises(function() vx.metrics.frechet(x, vx.randn { 5, 4 }) end, "frechet: a (5,3) and b (5,4) disagree")
    H.raises(function() vx.metrics.frechet(x, vx.randn { 3 }) end, "frechet: x (3), expected a tensor (N,D)")
    H.raises(function() vx.metrics.frechet(x, vx.randn { 1, 3 }) end, "frechet: moments of 1 rows, expected 2")
    H.raises(function() vx.metrics.frechet(x, 1) end, "frechet: b is 1, expected a tensor")
    H.raises(function() vx.metrics.moments(3):frechet(vx.metrics.moments(4)) end, "of 3 features and of 4")
    H.raises(function() vx.metrics.moments(3):frechet(x) end, "frechet: other is a tensor f32 (5,3), expected")
    H.raises(function() vx.metrics.moments(3):frechet(vx.generator(1)) end, "frechet: a table, expected moments")
  end)
end)

describe("the Inception Score", function()
  local logits = set["scores.logits"]

  it("is NumPy's", function()
    local mean, deviation = vx.metrics.inception_score(logits, { seed = false })
    H.close({ mean, deviation }, { tonumber(meta["scores.mean"]), tonumber(meta["scores.deviation"]) }, 1e-5, 0)
  end)

  it("is 1 of even logits, the number of classes of certain ones", function()
    H.close({ vx.metrics.inception_score(vx.zeros { 40, 8 }) }, { 1, 0 }, 1e-7, 1e-7)
    local one_hot = vx.one_hot(vx.arange(40, { dtype = "i32" }), 40)
    H.close({ (vx.metrics.inception_score(one_hot * 200, { splits = 1 })) }, { 40 }, 1e-5, 0)
  end)

  it("deals images to splits by the seed", function()
    local first = { vx.metrics.inception_score(logits) }
    assert.same(first, { vx.metrics.inception_score(logits, { splits = 10, seed = 1 }) })
    assert.are_not.same(first, { vx.metrics.inception_score(logits, { seed = 2 }) })
    H.close({ (vx.metrics.inception_score(logits, { splits = 1, seed = 1 })) },
      { (vx.metrics.inception_score(logits, { splits = 1, seed = 2 })) }, 1e-6, 0)
  end)

  it("streams", function()
    local score = vx.metrics.inception_scores(97)
    for first = 1, 97, 10 do score:add(logits:narrow(1, first, math.min(10, 98 - first))) end
    H.close({ score:score() }, { vx.metrics.inception_score(logits) }, 1e-6, 0)
    H.raises(function() score:add(logits:narrow(1, 1, 1)) end, "98 images, of which 97 were announced")
    H.raises(function() vx.metrics.inception_scores(12):score() end, "0 images came, of which 12 were announced")
  end)

  it("refuses what is no logits", function()
    H.raises(function() vx.metrics.inception_score(vx.zeros { 9, 3 }) end, "inception_score: 9 images for 10 splits")
    H.raises(function() vx.metrics.inception_score(vx.zeros { 9 }) end, "logits (9), expected a tensor (N,C)")
    H.raises(function() vx.metrics.inception_score(vx.full({ 10, 3 }, 0 / 0)) end, "NaN or Inf, first in row 0")
    H.raises(function() vx.metrics.inception_score(logits, { split = 2 }) end, "unknown option 'split'")
  end)
end)
