-- vx.simplex: distributions, scores, divergences and the watch. Numbers named scipy are float64 results of scipy 1.17
-- (stats.dirichlet, special, optimize.root, spatial.cKDTree) for the points below.

local H = require "tests.helper"
local vx = H.vx
local core = require "vertex.core"
local simplex, ops = vx.simplex, vx.ops

local P = { { 0.7, 0.2, 0.1 }, { 0.1, 0.8, 0.1 }, { 0.25, 0.25, 0.5 }, { 0.05, 0.15, 0.8 }, { 0.6, 0.3, 0.1 },
  { 0.33, 0.33, 0.34 }, { 0.02, 0.08, 0.9 },
  { 0.45, 0.5, 0.05 } }
local Q = { { 0.5, 0.4, 0.1 }, { 0.2, 0.2, 0.6 }, { 0.9, 0.05, 0.05 }, { 0.3, 0.65, 0.05 }, { 0.15, 0.1, 0.75 },
  { 0.4, 0.25, 0.35 } }

local function logs(rows) return vx.tensor(rows):log() end
local function leaf(rows)
  local x = vx.tensor(rows)
  x.requires_grad = true
  return x
end

describe("simplex.dirichlet", function()
  it("draws points of the simplex, the same for the same seed", function()
    local function draw(seed) return simplex.dirichlet({ 0.5, 1, 2, 4 }, 1000, { generator = vx.generator(seed) }) end
    local p = draw(3)
    assert.same({ 1000, 4 }, p:shape())
    H.close(H.flat(p:sum(2)), H.flat(vx.ones { 1000 }), 1e-6, 0)
    H.close(H.flat(p:mean(1)), { 0.5 / 7.5, 1 / 7.5, 2 / 7.5, 4 / 7.5 }, 0, 0.02)
    assert.equal(p:bytes(), draw(3):bytes())
    assert.not_equal(p:bytes(), draw(4):bytes())
    vx.seed(5)
    local a, b = simplex.dirichlet(1, 5), simplex.dirichlet(1, 5)
    assert.not_equal(a:bytes(), b:bytes())
    vx.seed(5)
    assert.equal(a:bytes(), simplex.dirichlet(1, 5):bytes())
  end)

  it("takes concentrations as a number, an array, a tensor, or a row for each point", function()
    local function draw(alpha, o)
      o = o or {}
      o.generator = vx.generator(1)
      return simplex.dirichlet(alpha, 4, o)
    end
    assert.same({ 4, 3 }, draw(0.1):shape())
    assert.same({ 4, 7 }, draw(0.1, { dim = 7 }):shape())
    local two = draw { 2, 2 }
    assert.equal(two:bytes(), draw(2, { dim = 2 }):bytes())
    assert.equal(two:bytes(), draw(vx.tensor { 2, 2 }):bytes())
    assert.equal(two:bytes(), draw(vx.full({ 4, 2 }, 2)):bytes())
    H.close(H.flat(draw({ 2, 2 }, { log = true }):exp()), H.flat(two), 1e-6, 0)
  end)

  it("keeps points apart in logarithms that are one in float32", function()
    local o = { dim = 3, log = true, generator = vx.generator(2) }
    local l = simplex.dirichlet(1e-3, 200, o)
    assert.equal(0, (ops.nonfinite(l)))
    assert.is_true(l:min(2):max():item() < -30)
    assert.is_true(ops.knn(l, l, 1, true):min():item() > 0)
  end)

  it("says what it cannot draw", function()
    H.raises(function() simplex.dirichlet(1, 0) end, "dirichlet: n is 0")
    H.raises(function() simplex.dirichlet(0, 4) end, "dirichlet: concentration 0 of alpha is 0")
    H.raises(function() simplex.dirichlet({ 1, 0 / 0 }, 4) end, "concentration 1 of alpha is nan")
    H.raises(function() simplex.dirichlet({ 1, 2 }, 4, { dim = 3 }) end, "2 concentrations, expected 3")
    H.raises(function() simplex.dirichlet({ 1 }, 4) end, "1 concentrations", "at least 2")
    H.raises(function() simplex.dirichlet(vx.ones { 3, 2 }, 4) end, "(3,2)", "4 points")
    H.raises(function() simplex.dirichlet(vx.zeros { 4, 2 }, 4) end, "concentration 0 of row 0 is 0")
    H.raises(function() simplex.dirichlet("x", 4) end, "alpha is 'x', expected a number or array")
    H.raises(function() simplex.dirichlet(1, 4, { size = 3 }) end, "'size'", "dim", "generator", "log")
    H.raises(function() simplex.dirichlet(1, 4, 3) end, "options is 3, expected a table")
  end)
end)

describe("simplex.log_density", function()
  it("agrees with scipy", function()
    local cases = {
      { { 0.5, 0.5, 0.5 }, { 0.29647190827409386, 0.5762798022418052, -0.10500911500948185 } },
      { { 1, 1, 1 }, { 0.6931471805599453, 0.6931471805599453, 0.6931471805599453 } },
      { { 2, 3, 4 }, { -2.3636097948318184, -1.5369312216473503, 1.8813716279177441 } },
      { { 0.01, 0.02, 30 }, { -73.24334635069202, -72.67546377702476, -25.7690043473817 } },
      { { 1000, 1, 0.001 }, { -354.01050183759827, -2297.974740743856, -1384.208128076097 } },
    }
    local p, l = vx.tensor { P[1], P[2], P[3] }, logs { P[1], P[2], P[3] }
    for _, c in ipairs(cases) do
      for _, alpha in ipairs { c[1], vx.tensor(c[1]) } do
        H.close(H.flat(simplex.log_density(p, alpha)), c[2], 1e-6, 1e-6)
        H.close(H.flat(simplex.log_density(l, alpha, { log = true })), c[2], 1e-6, 1e-6)
      end
    end
    H.close(H.flat(simplex.log_density(p, 0.5)), cases[1][2], 1e-6, 0)
  end)

  it("integrates to 1 over the simplex", function()
    local rows, n = {}, 60 -- midpoints of the small triangles that stand upright, and of those upside down
    for i = 0, n - 1 do
      for j = 0, n - 1 - i do
        rows[#rows + 1] = { (i + 1 / 3) / n, (j + 1 / 3) / n, 1 - (i + j + 2 / 3) / n }
        if i + j < n - 1 then rows[#rows + 1] = { (i + 2 / 3) / n, (j + 2 / 3) / n, 1 - (i + j + 4 / 3) / n } end
      end
    end
    for _, alpha in ipairs { { 2, 3, 4 }, { 1, 1, 1 }, { 2, 2, 5 } } do
      H.close({ simplex.log_density(vx.tensor(rows), alpha):exp():sum():item() / (2 * n * n) }, { 1 }, 2e-3, 0)
    end
  end)

  it("is finite on the edges and has gradients in points and concentrations", function()
    local edge = vx.tensor { { 1, 0, 0 }, { 0.5, 0.5, 0 } }
    assert.same({ 0.6931471824645996, 0.6931471824645996 }, H.flat(simplex.log_density(edge, 1)))
    assert.equal(0, (ops.nonfinite(simplex.log_density(edge, { 0.5, 2, 3 }))))
    local p, alpha = leaf { P[1], P[3] }, leaf { 0.5, 2, 3 }
    local sum = simplex.log_density(p, alpha):sum()
    H.close({ sum:item() }, { simplex.log_density(vx.tensor { P[1], P[3] }, { 0.5, 2, 3 }):sum():item() }, 1e-5, 0)
    sum:backward()
    H.close(H.flat(p.grad), { -0.5 / 0.7, 1 / 0.2, 2 / 0.1, -0.5 / 0.25, 1 / 0.25, 2 / 0.5 }, 1e-6, 0)
    local expected, a = {}, { 0.5, 2, 3 }
    for m = 1, 3 do
      expected[m] = math.log(P[1][m]) + math.log(P[3][m]) - 2 * (core.digamma(a[m]) - core.digamma(5.5))
    end
    H.close(H.flat(alpha.grad), expected, 1e-5, 1e-6)
  end)
end)

describe("Figure 1's distributions", function()
  local n = 600
  local function all(M)
    local p = {}
    for i, name in ipairs(simplex.names) do
      p[name] = simplex.named(name, n, { dim = M, generator = vx.generator(i) })
    end
    return p
  end

  it("sit where their names say, for any M", function()
    assert.same({ "vertices", "uniform", "centered", "collapsed" }, simplex.names)
    for _, M in ipairs { 2, 3, 10 } do
      local p = all(M)
      for name, x in pairs(p) do assert.same({ n, M }, x:shape(), name) end
      H.close({ simplex.max_p(p.vertices):mean():item(), simplex.max_p(p.collapsed):mean():item() },
        { 30 / 32, 30 / 32 }, 0.01, 0)
      local used, count = math.floor(2 * M / 3), ops.count_codes(p.collapsed:argmax():reshape { n, 1 }, M):totable()[1]
      for m = 1, M do assert.equal(m <= used and math.floor(n / used) or 0, count[m]) end
      -- each coordinate of these two is a Beta variable
      H.close({ p.uniform:square():mean():item() }, { 2 / (M * (M + 1)) }, 0.05, 0)
      H.close({ ((p.centered - 1 / M):square():mean()):item() }, { (M - 1) / (M * M * (20 * M + 1)) }, 0.1, 0)
    end
  end)

  it("are told apart as in Figure 1: by ppl only collapse, by KNN the wanted one", function()
    local p, ppl = all(3), {}
    for name, x in pairs(p) do ppl[name] = simplex.ppl(x):item() end
    for _, name in ipairs { "vertices", "uniform", "centered" } do assert.is_true(ppl[name] < 0.01, name) end
    assert.is_true(ppl.collapsed > 0.2)
    for _, metric in ipairs { "ce", "l2" } do
      local knn = {}
      for name, x in pairs(p) do knn[name] = simplex.knn(x, { k = 8, metric = metric }):item() end
      assert.is_true(knn.vertices < knn.uniform / 3 and knn.uniform < knn.centered / 3 and knn.uniform < knn.collapsed
        / 3, metric)
    end
  end)

  it("are refused by another name", function()
    H.raises(function() simplex.named("middle", 5) end, "'middle'", "centered, collapsed, uniform, vertices")
    H.raises(function() simplex.named("uniform", 5, { dim = 1 }) end, "dim is 1")
    H.raises(function() simplex.named("uniform", 2.5) end, "n is 2.5")
  end)
end)

describe("scores of points", function()
  it("ppl and perplexity in the limits, and as scipy's entropy of the mean", function()
    local function both(rows) return simplex.ppl(vx.tensor(rows)):item(), simplex.perplexity(vx.tensor(rows)):item() end
    local function check(rows, perplexity)
      local ppl, found = both(rows)
      H.close({ ppl, found }, { 1 - perplexity / #rows[1], perplexity }, 1e-6, 1e-6)
    end
    check({ { 1, 0, 0, 0 }, { 1, 0, 0, 0 } }, 1)
    check({ { 1, 0, 0, 0 }, { 0, 1, 0, 0 } }, 2)
    check({ { 1, 0, 0 }, { 0, 1, 0 }, { 0, 0, 1 } }, 3)
    check({ { 1 / 3, 1 / 3, 1 / 3 } }, 3)
    check(P, 2.9943697245479526)
    H.close({ simplex.ppl(logs(P), { log = true }):item() }, { simplex.ppl(vx.tensor(P)):item() }, 1e-5, 1e-7)
  end)

  it("are what the quantizers add to the loss", function()
    local z = H.generator(1)({ 200, 6 }, { grad = false })
    for name, score in pairs {
      ["softmax-ppl"] = function(p) return simplex.ppl(p) end,
      ["softmax-knn-ce"] = function(p) return (simplex.knn(p, { k = 5 })) end,
      ["softmax-knn-l2"] = function(p) return (simplex.knn(p, { k = 5, metric = "l2" })) end,
    } do
      local q = vx.quantizer(name, { dim = 6, codes = 10, k = 5 })
      local p = q:log_pi(z:reshape { 200, 1, 6 }, 1):exp()
      H.close({ score(p):item() }, { q:forward(z).reg:item() }, 1e-4, 0, name)
    end
  end)

  it("knn also tells deviations and rows", function()
    local value, deviation, near = simplex.knn(vx.tensor(P), { k = 2, metric = "ce" })
    assert.same({ { 0, 4 }, { 1, 7 }, { 6, 3 } }, near:totable())
    local expected = { -math.log(0.7), -math.log(0.6), -math.log(0.8), -math.log(0.5), -math.log(0.9), -math.log(0.8) }
    H.close(H.flat(deviation), expected, 1e-6, 0)
    local sum = 0
    for _, v in ipairs(expected) do sum = sum + v / 6 end
    H.close({ value:item() }, { sum }, 1e-6, 0)
    H.close({ (simplex.knn(logs(P), { k = 2, log = true })):item() }, { sum }, 1e-6, 0)
  end)

  it("entropy, largest coordinate, distances from the vertices", function()
    local p = vx.tensor(P)
    local entropy = { 0.8018185525433373, 0.639031859650177, 1.0397207708399179, 0.6128694524619496, 0.8979457248567798,
      1.0985126170507196, 0.375123215745267,
      0.8556886672556694 }
    H.close(H.flat(simplex.entropy(p)), entropy, 1e-6, 0)
    H.close(H.flat(simplex.entropy(logs(P), { log = true })), entropy, 1e-6, 0)
    H.close(H.flat(simplex.max_p(p)), { 0.7, 0.8, 0.5, 0.8, 0.6, 0.34, 0.9, 0.5 }, 1e-6, 0)
    local distances = {}
    for _, row in ipairs(P) do
      for m = 1, 3 do
        local d = 0
        for i = 1, 3 do d = d + (row[i] - (i == m and 1 or 0)) ^ 2 end
        distances[#distances + 1] = math.sqrt(d)
      end
    end
    H.close(H.flat(simplex.vertex_distances(p)), distances, 1e-6, 0)
    H.close(H.flat(simplex.vertex_distances(logs(P), { log = true })), distances, 1e-6, 0)
    assert.same({ 0, 0 }, H.flat(simplex.entropy(vx.tensor { { 1, 0 }, { 0, 1 } })))
    -- next to a vertex: 1 - p is exact, |p|^2 - p^2 in float32 would not be
    local e = 2 ^ -20
    H.close(H.flat(simplex.vertex_distances(vx.tensor { { 1 - e, e, 0 } })),
      { e * math.sqrt(2), math.sqrt(2) * (1 - e), math.sqrt(2 - 2 * e + 2 * e * e) }, 1e-6, 0)
  end)

  it("have gradients", function()
    local p = leaf(P)
    simplex.ppl(p):backward()
    local mean, expected = { 0.3125, 0.32625, 0.36125 }, {}
    for n = 1, 8 do
      for m = 1, 3 do expected[3 * n - 3 + m] = 2.9943697245479526 / 3 * (math.log(mean[m]) + 1) / 8 end
    end
    H.close(H.flat(p.grad), expected, 1e-5, 1e-7)
    p:zero_grad()
    simplex.entropy(p):sum():backward()
    for n = 1, 8 do
      for m = 1, 3 do expected[3 * n - 3 + m] = -math.log(P[n][m]) - 1 end
    end
    H.close(H.flat(p.grad), expected, 1e-5, 1e-6)
    p:zero_grad();
    (simplex.knn(p, { k = 1, metric = "l2" })):backward()
    expected = {}
    for i = 1, 24 do expected[i] = 0 end
    for m, n in ipairs { 1, 2, 7 } do
      for i = 1, 3 do expected[3 * n - 3 + i] = expected[3 * n - 3 + i] + 2 / 3 * (P[n][i] - (i == m and 1 or 0)) end
    end
    H.close(H.flat(p.grad), expected, 1e-5, 1e-7)
  end)

  it("refuse what is no point of the simplex, by name", function()
    for _, name in ipairs { "ppl", "perplexity", "knn", "entropy", "max_p", "vertex_distances", "dirichlet_mle" } do
      local f = simplex[name]
      H.raises(function() f(vx.tensor { { 3, -1 }, { 0.5, 0.5 } }) end, name .. ": p (2,2) does not hold points",
        "its least entry is -1")
      H.raises(function() f(vx.tensor { { 0.2, 0.2 }, { 0.5, 0.5 } }) end, "its rows sum to 0.4 ... 1")
      H.raises(function() f(vx.tensor { { 0.5, 0.5 }, { 0 / 0, 0.5 } }) end, name .. ": 1 rows of p", "row 1")
      H.raises(function() f(vx.tensor { { 0.5, 0.5 }, { 0.5, 0.5 } }, { log = true }) end, "by their logarithms")
      H.raises(function() f(vx.tensor { 0.5, 0.5 }) end, name .. ": p is f32 (2)", "(N,M)")
      H.raises(function() f(vx.zeros({ 2, 2 }, { dtype = "i32" })) end, name .. ": p is i32")
      H.raises(function() f { { 0.5, 0.5 } } end, name .. ": p is a table")
      H.raises(function() f(vx.tensor { { 0.5, 0.5 } }, { K = 3 }) end, name .. ": unknown option 'K'", "log")
    end
    H.raises(function() simplex.knn(vx.tensor(P), { k = 9 }) end, "k 9", "(8,3)")
    H.raises(function() simplex.knn(vx.tensor(P), { k = 0 }) end, "k is 0")
    H.raises(function() simplex.knn(vx.tensor(P), { metric = "l1" }) end, "'l1'", "ce or l2")
  end)
end)

describe("maximum-likelihood Dirichlet", function()
  it("agrees with scipy's root of the likelihood equations", function()
    H.close(H.flat((simplex.dirichlet_mle(vx.tensor(P)))),
      { 0.9137588270482007, 1.1251394337299887, 1.0118722088567742 }, 1e-6, 0)
    H.close(H.flat((simplex.dirichlet_mle(vx.tensor(Q)))),
      { 1.5485923608392256, 1.0785033393655674, 1.0239172610443057 }, 1e-6, 0)
    local far = {}
    for i, row in ipairs { { 1e-30, 1e-9, 1 }, { 1, 1e-200, 1e-12 }, { 1e-100, 1, 1e-3 }, { 1e-2, 1e-5, 0.98999 } } do
      far[i] = { math.log(row[1]), math.log(row[2]), math.log(row[3]) }
    end
    H.close(H.flat((simplex.dirichlet_mle(vx.tensor(far), { log = true }))),
      { 0.010629563516781515, 0.007078419866220937, 0.037352999925037655 }, 1e-6, 0)
  end)

  it("finds concentrations from 1e-3 to 1e3 again in a few steps", function()
    local n = 4000
    for i, alpha in ipairs { { 1e-3, 1e-3, 1e-3 }, { 1e-2, 0.1, 1 }, { 0.3, 0.3, 0.3, 0.3, 0.3 }, { 1, 2, 5 },
      { 1e-3, 1, 30 }, { 100, 1, 10 },
      { 1e3, 1e3, 1e3 } } do
      local fit, steps = simplex.dirichlet_mle(simplex.dirichlet(alpha, n, { log = true, generator = vx.generator(i) }),
        { log = true })
      assert.is_true(steps <= 12, ("%d steps"):format(steps))
      -- the estimate's covariance is the inverse Fisher information over n
      local unit, s = {}, 0
      for m = 1, #alpha do s = s + alpha[m] end
      for m = 1, #alpha do
        for j = 1, #alpha do unit[j] = j == m and 1 or 0 end
        local deviation = math.sqrt(require("vertex.ops.dirichlet_math").solve_information(alpha, unit)[m] / n)
        H.close({ fit[m]:item() }, { alpha[m] }, 0, 4.5 * deviation, ("alpha %g of sum %g"):format(alpha[m], s))
      end
    end
  end)

  it("has a gradient that raises the likelihood where points move with it", function()
    local p = leaf(P)
    local target = vx.tensor { 0.3, 0.3, 0.3 }
    simplex.kl(target, (simplex.dirichlet_mle(p))):backward()
    local before = simplex.kl(target, (simplex.dirichlet_mle(vx.tensor(P)))):item()
    local step = (p.grad - p.grad:mean(2):reshape { 8, 1 }) * 1e-5 -- within the simplex
    local after = simplex.kl(target, (simplex.dirichlet_mle(vx.tensor(P) - step))):item()
    H.close({ before - after }, { step:square():sum():item() / 1e-5 }, 0.02, 0)
  end)

  it("says why there is none", function()
    H.raises(function() simplex.dirichlet_mle(vx.tensor { { 1, 0 }, { 0.5, 0.5 } }) end, "dirichlet_mle: ",
      "no p may be 0")
    H.raises(function() simplex.dirichlet_mle(vx.tensor { { 0.4, 0.6 }, { 0.4, 0.6 } }) end, "dirichlet_mle: ",
      "all equal")
    H.raises(function() simplex.dirichlet_mle(vx.tensor { { 0.4, 0.6 } }) end, "dirichlet_mle: ", "(1,2)", "at least 2")
  end)
end)

describe("divergences", function()
  it("between Dirichlet distributions agree with scipy", function()
    local cases = { { { 0.5, 1, 2 }, { 2, 2, 2 }, 2.121489222187104 },
      { { 1e-3, 1e-3, 1e-3 }, { 0.01, 0.01, 0.01 }, 13.39443923681095 },
      { { 1000, 900, 1.5 }, { 800, 1000, 3 }, 25.022187070709883 }, { { 0.1, 0.2 }, { 7, 0.3 }, 45.78132172755372 },
      { { 1e-3, 1, 1000 }, { 1, 1, 1 }, 1004.7906832673983 } }
    for _, c in ipairs(cases) do
      -- 1e-3 and the like are not float32: what an array and a tensor hold differs by 6e-8 of it
      H.close({ simplex.kl(c[1], c[2]):item(), simplex.kl(vx.tensor(c[1]), c[2]):item() }, { c[3], c[3] }, 1e-6, 0)
      H.close({ simplex.kl(c[1], c[1]):item() }, { 0 }, 0, 1e-9)
    end
    H.close({ simplex.kl({ 0.5, 1, 2 }, 2):item() }, { 2.121489222187104 }, 1e-6, 0)
    H.raises(function() simplex.kl(1, 2) end, "kl: neither")
    H.raises(function() simplex.kl({ 1, 2 }, { 1, 2, 3 }) end, "kl: b has 3 concentrations, expected 2")
    H.raises(function() simplex.kl({ 1, -2 }, { 1, 2 }) end, "kl: concentration 1 of a is -2")
    H.raises(function() simplex.kl("a", { 1, 2 }) end, "kl: a is 'a', expected a number")
  end)

  it("of Perez-Cruz agree with the estimate by scipy's neighbours", function()
    local p, q = vx.tensor(P), vx.tensor(Q)
    local function estimate(a, b, k, space, log)
      return simplex.perez_cruz_kl(a, b, { k = k, space = space, log = log }):item()
    end
    H.close({ estimate(p, q, 1), estimate(p, q, 2), estimate(p, q, 3) },
      { -0.49996154983247676, -0.6618271857988538, -0.3237099279145368 }, 1e-5, 0)
    H.close({ estimate(q, p, 1), estimate(q, p, 2), estimate(q, p, 3) },
      { -0.8610106571264386, -0.7109181728256029, -0.6841450958543391 }, 1e-5, 0)
    local expected = { -0.2186478490266476, -0.6633181977383935, -0.31181739661826025 }
    for k = 1, 3 do
      H.close({ estimate(p, q, k, "log-ratio"), estimate(logs(P), logs(Q), k, "log-ratio", true) },
        { expected[k], expected[k] }, 1e-5, 0)
      H.close({ estimate(logs(P), logs(Q), k, nil, true) }, { estimate(p, q, k) }, 1e-4, 0)
    end
  end)

  it("of Perez-Cruz come close to the closed form", function()
    -- where the estimates below are within 0.05; next to an edge where P's density is far above Q's it takes many more
    local n = 3000
    for i, c in ipairs { { { 4, 5, 6 }, { 5, 4, 6 } }, { { 5, 5 }, { 2, 3 } }, { { 1, 1, 1 }, { 1, 1, 1 } },
      { { 3, 3, 3, 3 }, { 2, 4, 3, 3 } } } do
      local g = vx.generator(i)
      local p, q = simplex.dirichlet(c[1], n, { generator = g }), simplex.dirichlet(c[2], n, { generator = g })
      local expected = simplex.kl(c[1], c[2]):item()
      for _, space in ipairs { "simplex", "log-ratio" } do
        for _, k in ipairs { 1, 4 } do
          H.close({ simplex.perez_cruz_kl(p, q, { k = k, space = space }):item() }, { expected }, 0, 0.07, space)
        end
      end
    end
    -- next to the vertices, where the plain distance sees little, logarithms still do
    local o = { log = true, generator = vx.generator(9) }
    local p, q = simplex.dirichlet(0.1, n, o), simplex.dirichlet(0.02, n, o)
    H.close({ simplex.perez_cruz_kl(p, q, { space = "log-ratio", log = true, k = 4 }):item() },
      { simplex.kl({ 0.1, 0.1, 0.1 }, 0.02):item() }, 0.1, 0)
  end)

  it("of Perez-Cruz have gradients in both sets of points", function()
    local p, q = leaf(P), leaf(Q)
    simplex.perez_cruz_kl(p, q):backward()
    local dp, dq = {}, {}
    for i = 1, 24 do dp[i] = 0 end
    for i = 1, 18 do dq[i] = 0 end
    local function nearest(x, rows, except)
      local best, least
      for j, y in ipairs(rows) do
        local d = (x[1] - y[1]) ^ 2 + (x[2] - y[2]) ^ 2 + (x[3] - y[3]) ^ 2
        if j ~= except and (not least or d < least) then best, least = j, d end
      end
      return best, least
    end
    for i, x in ipairs(P) do -- 2 / 8 of the gradient of ln |x - y|, less that to the nearest of P itself
      local j, d = nearest(x, Q)
      local l, e = nearest(x, P, i)
      for m = 1, 3 do
        local to_q, to_p = 0.25 * (x[m] - Q[j][m]) / d, 0.25 * (x[m] - P[l][m]) / e
        dp[3 * i - 3 + m] = dp[3 * i - 3 + m] + to_q - to_p
        dp[3 * l - 3 + m] = dp[3 * l - 3 + m] + to_p
        dq[3 * j - 3 + m] = dq[3 * j - 3 + m] - to_q
      end
    end
    H.close(H.flat(p.grad), dp, 1e-4, 1e-5)
    H.close(H.flat(q.grad), dq, 1e-4, 1e-5)
  end)

  it("of Perez-Cruz stay finite where points are equal, and refuse what cannot be", function()
    local e = leaf { { 1, 0, 0 }, { 1, 0, 0 }, { 0, 1, 0 } }
    local value = simplex.perez_cruz_kl(e, e)
    value:backward()
    assert.is_true(math.abs(value:item()) < 200)
    assert.equal(0, (ops.nonfinite(e.grad)))
    local p, q = vx.tensor(P), vx.tensor(Q)
    H.raises(function() simplex.perez_cruz_kl(p, q, { k = 7 }) end, "k 7", "8 rows of p", "6 of q")
    H.raises(function() simplex.perez_cruz_kl(q, p, { k = 6 }) end, "k 6", "6 rows of p")
    H.raises(function() simplex.perez_cruz_kl(p, vx.tensor { { 0.5, 0.5 } }) end, "(8,3)", "(1,2)", "M")
    H.raises(function() simplex.perez_cruz_kl(p, q, { space = "log" }) end, "'log'", "log-ratio")
    H.raises(function() simplex.perez_cruz_kl(p, vx.randn { 4, 3 }) end, "perez_cruz_kl: q (4,3) does not hold points")
  end)
end)

describe("simplex.watch", function()
  local function training(q, steps, each)
    vx.seed(3)
    local z, opt = H.generator(2)({ 60, 6 }, { grad = false }), vx.optim.AdamW(q:parameters(), { lr = 0.02 })
    for _ = 1, steps do
      vx.step(function()
        local o = q:forward(z)
        ops.add(ops.mse(o.quantized, z), o.reg):backward()
        opt:step()
        opt:zero_grad()
        if each then each(z) end
      end)
    end
    return q
  end
  local function fresh(name, more)
    local o = { dim = 6, codes = 5, k = 4 }
    for key, value in pairs(more or {}) do o[key] = value end
    return vx.quantizer(name, o)
  end

  it("records where rows sit and changes nothing of the training", function()
    for _, name in ipairs { "softmax-knn-ce", "sgumbel-ppl", "hgumbel-knn-l2", "softmax-pkl" } do
      local plain, q = fresh(name, { groups = 2 }), fresh(name, { groups = 2 })
      local watch = simplex.watch(q, { k = 3, points = 2 })
      assert.equal("watch: no record yet", tostring(watch))
      training(plain, 6)
      training(q, 6)
      assert.equal(plain.codebook:bytes(), q.codebook:bytes(), name)
      assert.same({ 1, 2, 3, 4, 5, 6 }, watch:steps())
      assert.same({ 6, 2, 60 }, watch:stack("distances"):shape())
      assert.same({ 6, 2, 5 }, watch:stack("neighbours"):shape())
      assert.same({ 6, 2, 2, 5 }, watch:stack("points"):shape())
      H.close(H.flat(watch:stack("claimed"):sum(3)), H.flat(vx.full({ 12 }, 60)), 0, 0)
      assert.is_truthy(tostring(watch):find("6 records, the last of step 6", 1, true))
      watch:stop()
      training(q, 1)
      assert.equal(6, #watch.records)
    end
  end)

  it("tells the numbers it promises", function()
    local q = fresh "softmax-knn-ce"
    local z = H.generator(4)({ 60, 6 }, { grad = false })
    local p = q:log_pi(z:reshape { 60, 1, 6 }, 1):exp()
    for _, metric in ipairs { "l2", "ce" } do
      local watch = simplex.watch(q, { k = 3, metric = metric, points = 60 })
      q:forward(z)
      local last = watch:stop():last()
      assert.equal(q.steps, last.step)
      H.close(H.flat(last.points), H.flat(p), 1e-6, 0)
      H.close(H.flat(last.distances), H.flat(simplex.vertex_distances(p):min(2)), 1e-6, 0)
      local _, deviation = simplex.knn(p, { k = 3, metric = metric })
      H.close(H.flat(last.neighbours), H.flat((metric == "l2" and deviation:sqrt() or deviation):mean(2)), 1e-4, 1e-6)
      assert.same(ops.count_codes(p:argmax():reshape { 60, 1 }, 5):totable(), last.claimed:totable())
    end
  end)

  it("looks at each so many-th step and at so many rows, spread over the batch", function()
    local q = fresh "softmax-ppl"
    local watch = simplex.watch(q, { every = 3, rows = 7, k = 100, points = 7 })
    training(q, 7)
    assert.same({ 1, 4, 7 }, watch:steps())
    assert.same({ 3, 1, 7 }, watch:stack("distances"):shape())
    watch:stop()
    local z = H.generator(6)({ 60, 6 }, { grad = false })
    local all = q:log_pi(z:reshape { 60, 1, 6 }, 1):exp():totable()
    watch = simplex.watch(q, { rows = 3, points = 3 })
    q:forward(z)
    H.close(H.flat(watch:last().points), H.flat(vx.tensor { all[1], all[21], all[41] }), 1e-6, 0)
    q:forward(z:narrow(1, 1, 2):contiguous())
    H.raises(function() watch:stack "distances" end, "(1,3)", "(1,2)", "differ in size")
  end)

  it("sees the regularizer pull rows to the vertices", function()
    local q = fresh("softmax-knn-l2", { tau = 0.5, weight = 5, k = 12 })
    local watch = simplex.watch(q)
    training(q, 60)
    local distance, near = watch:stack("distances"):mean({ 2, 3 }):totable(),
      watch:stack("neighbours"):mean({ 2, 3 }):totable()
    assert.is_true(distance[60] < distance[1] / 2 and near[60] < near[1] / 2)
  end)

  it("outlives steps and collections, and goes into a file", function()
    local q = fresh "softmax-knn-ce"
    local watch = simplex.watch(q, { points = 1 })
    training(q, 3, function() collectgarbage() end)
    local path = H.scratch "watch.safetensors"
    watch:save(path)
    local t, meta = vx.load(path)
    assert.same({ 1, 2, 3 }, t.step:totable())
    for _, name in ipairs { "distances", "neighbours", "claimed", "points" } do
      assert.same(watch:stack(name):totable(), t[name]:totable())
    end
    assert.equal("l2", meta.metric)
  end)

  it("says what it cannot watch", function()
    H.raises(function() simplex.watch(vx.quantizer("ste-euclid", { dim = 2, codes = 3 })) end, "ste-euclid", "log_pi")
    H.raises(function() simplex.watch {} end, "quantizer is a table, expected a smoothed quantizer")
    H.raises(function() simplex.watch(fresh("softmax-ppl", { codes = 1 })) end, "1 code", "at least 2")
    local q = fresh "softmax-ppl"
    H.raises(function() simplex.watch(q, { every = 0 }) end, "every is 0")
    H.raises(function() simplex.watch(q, { metric = "l1" }) end, "'l1'")
    H.raises(function() simplex.watch(q, { row = 3 }) end, "'row'", "rows")
    local watch = simplex.watch(q)
    H.raises(function() simplex.watch(q) end, "watched already")
    H.raises(function() watch:stack "distances" end, "nothing was recorded")
    H.raises(function() watch:save(H.scratch "none.safetensors") end, "nothing was recorded")
    training(q, 1)
    H.raises(function() watch:stack "nothing" end, "'nothing'")
    H.raises(function() watch:stack "points" end, "'points'")
    watch:stop()
    watch:stop()
  end)
end)

describe("on another device", function()
  it("scores, divergences, quantizers and the watch give what they give on the CPU", function()
    local there = pcall(core.device_number, "emu:0") -- the CUDA kernels on the host, tests/cuda_emulator
    if not there then
      pending "the emulator was not built"
      return
    end
    finally(function() vx.device "cpu" end)
    local function results(device)
      vx.device(device)
      local g = vx.generator(1)
      local p, q = simplex.named("vertices", 70, { generator = g }),
        simplex.dirichlet({ 0.5, 1, 2 }, 60, { generator = g })
      p.requires_grad = true
      local _, deviation = simplex.knn(p, { k = 3 })
      local list = { p, q, simplex.ppl(p), deviation, simplex.entropy(q), simplex.vertex_distances(p),
        simplex.log_density(p, { 0.5, 1, 2 }),
        (simplex.dirichlet_mle(p)), simplex.perez_cruz_kl(p, q, { k = 2 }),
          simplex.perez_cruz_kl(p, q, { space = "log-ratio" }) }
      ops.add(list[9], simplex.kl((simplex.dirichlet_mle(p)), 0.5)):backward()
      list[#list + 1] = p.grad
      for _, name in ipairs { "softmax-dirichlet", "softmax-pkl" } do
        local quantizer = vx.quantizer(name, { dim = 6, codes = 5, groups = 2 })
        local watch = simplex.watch(quantizer)
        quantizer:forward(vx.empty({ 40, 6 }):copy(H.generator(3)({ 40, 6 }, { grad = false }))).reg:backward()
        for _, field in ipairs { "distances", "neighbours", "claimed" } do list[#list + 1] = watch:stack(field) end
        for _, parameter in ipairs(quantizer:parameters()) do list[#list + 1] = parameter.grad end
      end
      for i, x in ipairs(list) do
        if i <= 11 then assert.equal(device, x:device()) end
        list[i] = H.flat(x)
      end
      return list
    end
    local here = results "cpu"
    for i, x in ipairs(results "emu:0") do
      assert.is_true(H.relative_error(x, here[i]) < 1e-4, ("result %d: %g"):format(i, H.relative_error(x, here[i])))
    end
  end)
end)
