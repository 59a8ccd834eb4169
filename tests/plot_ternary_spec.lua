-- Axes on the simplex: where points and directions lie, densities, and what vx.simplex draws on them.

local H = require "tests.helper"
local pictures = require "tests.pictures"
local vx = require "vertex"
local plot = require "vertex.plot"
local map_color, pixels, spot = pictures.map_color, pictures.pixels, pictures.spot

describe("axes on the simplex", function()
  it("puts the points of a simplex where they belong", function()
    -- the middle of one red point, p, on axes of M codes
    local function place(p)
      local fig = plot.figure { width = 400, height = 400, scale = 1 }
      fig:simplex(1, { codes = #p }):scatter({ p }, { color = "#ff0000", alpha = 1, size = 9 })
      local s = spot(fig:png(), 255, 0, 0)
      assert.is_true(s.n > 30)
      return s.x, s.y
    end
    local x1, y1 = place { 1, 0, 0 }
    local x2, y2 = place { 0, 1, 0 }
    local x3, y3 = place { 0, 0, 1 }
    assert.near(y1, y2, 0.6)
    assert.near((x1 + x2) / 2, x3, 0.6)
    assert.near(math.sqrt(3) / 2 * (x2 - x1), y1 - y3, 1)
    assert.is_true(x2 - x1 > 250)
    local x, y = place { 0.5, 0.2, 0.3 }
    assert.near(0.5 * x1 + 0.2 * x2 + 0.3 * x3, x, 0.8)
    assert.near(0.5 * y1 + 0.2 * y2 + 0.3 * y3, y, 0.8)

    local top_x, top_y = place { 1, 0, 0, 0 }
    local right_x, right_y = place { 0, 1, 0, 0 }
    local bottom_x, bottom_y = place { 0, 0, 1, 0 }
    assert.near(top_x, bottom_x, 0.6)
    assert.near(right_x - top_x, right_y - top_y, 1)
    assert.near(right_x - top_x, bottom_y - right_y, 1)
    x, y = place { 0.25, 0.25, 0.25, 0.25 }
    assert.near(top_x, x, 0.6)
    assert.near(right_y, y, 0.6)
  end)

  it("takes tensors on a simplex, copies them, and leaves gaps for NaN", function()
    local p = vx.tensor { { 0.2, 0.3, 0.5 }, { 0 / 0, 0.5, 0.5 }, { 0.1, 0.1, 0.8 } }
    local fig = plot.figure()
    local ax = fig:simplex(1):scatter(p):line(p, { color = 1 }):scatter(vx.zeros { 0, 3 })
    local x = ax.layers[1].x[1]
    assert.equal(3, #x)
    assert.is_true(x[2] ~= x[2])
    p:fill(0)
    assert.near(0.3 - 0.2, x[1] * 2, 1e-6)
    assert.has_no.errors(function() fig:png() end)
    collectgarbage()
    collectgarbage()
    local before = vx.memory().live
    plot.figure():simplex(1):scatter(vx.zeros { 2, 3 } + 1 / 3)
    collectgarbage()
    collectgarbage()
    assert.equal(before, vx.memory().live)
  end)

  it("draws on a simplex only the part of a direction that lies within it", function()
    local function png(d)
      local fig = plot.figure { width = 200, height = 200 }
      fig:simplex(1):arrows({ { 0.4, 0.3, 0.3 } }, { d }, { color = "#ff0000" })
      return fig:png()
    end
    assert.equal(png { 0.25, -0.25, 0 }, png { 1.25, 0.75, 1 })
  end)

  it("fills the triangle with a density's colours", function()
    local fig = plot.figure { width = 300, height = 300 }
    fig:simplex(1):density(function(p) return p:narrow(2, 1, 1):reshape { p:size(1) } end,
      { palette = "gray", range = { 0, 1 }, parts = 60 })
      :set { color_bar = false }
    local fig2 = plot.figure { width = 300, height = 300 }
    fig2:simplex(1):density(function(p) return vx.zeros { p:size(1) } + 1 / 0 end,
      { palette = "magma", range = { 0, 1 }, parts = 60 }):set { color_bar = false }
    -- infinite: the colour of the top, all over the triangle
    local top = spot(fig2:png(), map_color("magma", 1))
    assert.near((top.right - top.left) * (top.bottom - top.top) / 2, top.n, top.n * 0.04)
    local at = pixels(fig:png())
    local function gray(x, y) return (at(math.floor(x), math.floor(y))) end
    assert.near(255, gray(top.left + 14, top.bottom - 5), 20)
    assert.near(85, gray(top.x, top.y), 6)
    assert.near(0, gray(top.right - 14, top.bottom - 5), 20)
  end)

  it("estimates densities without a bias at the edges, in the measure of Dirichlet densities", function()
    vx.seed(1)
    local ax = plot.figure():simplex(1)
    ax:density(vx.simplex.dirichlet(1, 20000), { parts = 20, bandwidth = 0.05 })
    local values, sum, worst = ax.layers[1].values, 0, 0
    for _, v in ipairs(values) do sum, worst = sum + v, math.max(worst, math.abs(v - 2)) end
    assert.near(2, sum / #values, 0.02)
    assert.is_true(worst < 0.5)             -- the corners' Gaussians see a sixth of their mass
    ax = plot.figure():simplex(1)
    ax:density(vx.simplex.dirichlet(4, 20000), { parts = 20 })
    local exact = plot.figure():simplex(1):density(function(p) return vx.simplex.log_density(p, 4):exp() end,
      { parts = 20 }).layers[1].values
    local error_sum, total = 0, 0
    for i, v in ipairs(ax.layers[1].values) do
      error_sum, total = error_sum + math.abs(v - exact[i]), total + exact[i]
    end
    assert.is_true(error_sum < 0.1 * total)
  end)

  it("shows points and what a watch recorded through vx.simplex", function()
    vx.seed(2)
    local p = vx.simplex.named("vertices", 50, { dim = 6 })
    local labels = { "a", "b", "c", "d", "e", "f" }
    local fig, logs = vx.simplex.plot(p, { title = "six", labels = labels }),
      vx.simplex.plot(p:log(), { log = true, title = "six", labels = labels })
    assert.equal(6, fig:simplex(1).simplex.codes)
    assert.equal(50, #fig:simplex(1).layers[1].x[1])
    for i, x in ipairs(fig:simplex(1).layers[1].x[1]) do assert.near(x, logs:simplex(1).layers[1].x[1][i], 1e-5) end
    assert.has_no.errors(function() fig:png() end)
    H.raises(function() vx.simplex.plot(vx.simplex.named("uniform", 4, { dim = 2 })) end, "p (4,2)", "M at least 3")
    H.raises(function() vx.simplex.plot(vx.zeros { 4, 3 }) end, "does not hold points")
    H.raises(function() vx.simplex.plot(p, { label = "x" }) end, "unknown option 'label'")

    local quantizer = vx.quantizer("softmax-knn-l2", { dim = 4, codes = 5, groups = 2, k = 2, seed = 1 })
    local watch = vx.simplex.watch(quantizer)
    H.raises(function() watch:plot() end, "nothing was recorded yet")
    for _ = 1, 3 do quantizer(vx.randn { 20, 4 }) end
    fig = watch:plot()
    for c = 1, 3 do
      assert.equal(2, #fig:axes(c).layers)
      assert.same({ 1, 2, 3 }, fig:axes(c).layers[1].x[1])
    end
    assert.near(watch:last().distances[2]:mean():item(), fig:axes(1).layers[2].y[1][3], 1e-6)
    assert.near(watch:last().neighbours[1]:max():item(), fig:axes(2).layers[1].y[3][3], 1e-6)
    local claimed = 0
    for _, n in ipairs(watch:last().claimed[1]:totable()) do claimed = claimed + (n > 0 and 1 or 0) / 5 end
    assert.near(claimed, fig:axes(3).layers[1].y[1][3], 1e-6)
    assert.has_no.errors(function() fig:png() end)
  end)

  it("say what was given and what was expected", function()
    local fig = plot.figure { cols = 3 }
    H.raises(function() fig:simplex(1, { codes = 2 }) end, "codes is 2, expected an integer from 3")
    H.raises(function() fig:simplex(1, { labels = { "a", "b" }, codes = 3 }) end, "labels has 2 values for 3 codes")
    H.raises(function() fig:simplex(1, { corners = 3 }) end, "unknown option 'corners'", "codes")
    local three, five = fig:simplex(1), fig:simplex(1, 2, { codes = 5 })
    assert.equal(three, fig:simplex(1))
    H.raises(function() fig:simplex(1, { codes = 4 }) end, "a simplex already")
    fig:axes(3)
    H.raises(function() fig:simplex(3) end, "axes already")
    H.raises(function() three:scatter { { 0.5, 0.5 } } end, "p (1,2), expected (N,3)")
    H.raises(function() three:scatter "p" end, "p is 'p', expected a tensor (N,M) or array of N arrays of M numbers")
    H.raises(function() three:scatter { { 0.2, 0.3, 0.5 }, { 0.5, 0.5, 0.5 } } end, "row 2 of p", "its sum is 1.5")
    H.raises(function() three:line { { 1.2, -0.2, 0 } } end, "row 1 of p", "least value -0.2")
    H.raises(function() three:arrows({ { 1, 0, 0 } }, { { 1, 0 } }) end, "d (1,2), expected (N,3)")
    H.raises(function() three:arrows({ { 1, 0, 0 } }, { { 1, 0, 0 }, { 0, 1, 0 } }) end, "dx has 2 values and x has 1")
    H.raises(function() three:text({ { 1, 0, 0 }, { 0, 1, 0 } }, "two") end, "one point, got 2")
    H.raises(function() five:density(function() return {} end) end, "only for 3 codes, these axes have 5")
    H.raises(function() three:density(function() return { 1, 2 } end) end,
      "what source was given has 16384 values and what it returned has 2")
    H.raises(function() three:set { xlog = true } end, "unknown option 'xlog'", "xlabel")
  end)
end)
