-- Figures: what is drawn where, what the axes say, and what bad input is told. The simplex is in plot_ternary_spec.lua,
-- files, terminals and notebooks in plot_output_spec.lua.

local H = require "tests.helper"
local pictures = require "tests.pictures"
local ffi = require "ffi"
local plot = require "vertex.plot"
local count, map_color, pixels, solid = pictures.count, pictures.map_color, pictures.pixels, pictures.solid
local spot = pictures.spot

describe("plot ticks", function()
  local function near(expected, got)
    assert.equal(#expected, #got)
    for i, v in ipairs(expected) do assert.near(v, got[i], 1e-12 * math.abs(v)) end
  end

  it("step by 1, 2 or 5", function()
    assert.same({ 0, 20, 40, 60, 80, 100 }, (plot.ticks(0, 100, 6)))
    assert.same({ 0, 0.1, 0.2, 0.3 }, (plot.ticks(0, 0.34, 5)))
    near({ -0.5, 0, 0.5, 1 }, (plot.ticks(-0.6, 1.2, 5)))
    near({ 5e-5, 1e-4 }, (plot.ticks(2e-5, 1.1e-4, 4)))
  end)

  it("are never more than asked for, and always inside", function()
    for _, range in ipairs { { 0, 1 }, { -3.7, 11.2 }, { 1e-9, 3e-9 }, { 99999, 100001 }, { -1e30, 1e30 },
      { 1, 1 + 1e-15 } } do
      for n = 2, 12 do
        local ticks = plot.ticks(range[1], range[2], n)
        assert.is_true(#ticks <= n)
        assert.is_true(#ticks >= 1 or n < 4)
        for _, v in ipairs(ticks) do
          local slack = (range[2] - range[1]) * 1e-6 + 1e-12 * math.abs(v)
          assert.is_true(v >= range[1] - slack and v <= range[2] + slack)
        end
      end
    end
  end)

  it("are decades on a log axis, thinned or filled by the room", function()
    assert.same({ 1e-4, 1e-3, 0.01, 0.1, 1 }, plot.log_ticks(1e-4, 1, 8))
    assert.same({ 1, 2, 5, 10, 20, 50 }, plot.log_ticks(1, 60, 8))
    assert.same({ 1, 100, 1e4, 1e6 }, plot.log_ticks(1, 1e6, 4))
    assert.same({ 3.0, 3.1, 3.2, 3.3, 3.4 }, plot.log_ticks(3, 3.4, 6))
  end)

  it("are written short", function()
    local f = plot.format_number
    assert.same({ "0", "0.05", "1200", "16k", "16.38k", "2.5M", "1e-4", "2.5e-5", "-0.5", "3e12" },
      { f(0), f(0.05), f(1200), f(16000), f(16384), f(2.5e6), f(1e-4), f(2.5e-5), f(-0.5), f(3e12) })
    assert.equal("0.10", f(0.1, 0.05))
    assert.equal("5k", f(5000, 5000, 15000))
    assert.equal("1.0M", f(1e6, 5e5, 2e6))
    assert.equal("12345", f(12345, 1, 12349))
    assert.same({ "1." .. ("0"):rep(99), "1e300", "4.941e-324" }, { f(1, 1e-120), f(1e300, 1), f(5e-324) })
  end)
end)

describe("plot colours", function()
  it("come from maps that end where they should", function()
    local r, g, b = plot.colormap("viridis", 0)
    assert.same({ 0x44, 0x01, 0x54 }, { r * 255, g * 255, b * 255 })
    assert.same({ plot.colormap("viridis", 1) }, { plot.colormap("viridis", 7) })
    H.raises(function() plot.colormap("jet", 0) end, "'jet'", "viridis")
  end)
end)

describe("plot input", function()
  local ax

  before_each(function() ax = plot.figure():axes(1) end)

  it("names both lengths where arrays disagree", function()
    H.raises(function() ax:line({ 1, 2, 3 }, { 1, 2 }) end, "x has 3 values and y has 2")
    H.raises(function() ax:scatter({ 1 }, {}) end, "x has 1 values and y has 0")
    H.raises(function() ax:line(nil, { 1, 2 }, { sd = { 1 } }) end, "sd has 1 values and y has 2")
    H.raises(function() ax:line(nil, { 1, 2 }, { band = { { 1, 1 }, { 2 } } }) end, "band[2] has 1 values and y has 2")
    H.raises(function() ax:bar({ "a", "b" }, { 1 }) end, "labels has 2 values and values has 1")
    H.raises(function() ax:heatmap { { 1, 2 }, { 3 } } end, "rows[1] has 2 values and rows[2] has 1")
  end)

  it("is drawn or refused in words at the ends of the number range", function()
    local ends = { { 5e-324, 1e-323 }, { 2.2e-308, 1e-307 }, { -1.7e308, 1.7e308 }, { 1e308, 1.7e308 },
      { 1, 1 + 2 ^ -52 }, { 1e300, 1e301 }, { -5e-324, 5e-324 }, { 1e-310, 1e300 }, { 0, 5e-324 }, { 0, 1.7e308 },
      { 5e-324, 5e-324 }, { 1e15, 1e15 + 0.125 }, { 1e-20, 1 }, { 1 / 0, 1 }, { 0 / 0, 0 / 0 } }
    local ways = {
      function(to, d) to:line(d, d) end,
      function(to, d) to:set { xlog = true, ylog = true }:line(d, d) end,
      function(to, d) to:scatter({ 1, 2 }, { 1, 2 }, { values = d }) end,
      function(to, d) to:scatter({ 1, 2 }, { 1, 2 }, { values = d, log = true }) end,
      function(to, d) to:hist(d) end, function(to, d) to:hist({ 1, 2 }, { range = d }) end,
      function(to, d) to:bar({ "a", "b" }, d) end, function(to, d) to:arrows(d, d, d, d) end,
      function(to, d) to:heatmap { d, d } end, function(to, d) to:heatmap({ d, d }, { log = true }) end,
      function(to, d) to:heatmap({ { 1 } }, { extent = { d[1], d[2], 0, 1 } }) end,
      function(to, d) to:line(nil, { 1, 2 }, { sd = d }) end,
      function(to, d) to:set { xlim = d }:line(nil, { 1, 2 }) end,
    }
    for _, way in ipairs(ways) do
      for _, d in ipairs(ends) do
        local fig = plot.figure { width = 200, height = 120 }
        local ok, message = pcall(way, fig:axes(1), d)
        if ok then fig:text() else assert.falsy(message:find("attempt to", 1, true), message) end
      end
    end
    H.raises(function() plot.ticks(0, 1 / 0, 5) end, "ticks: hi is inf, expected a number")
    H.raises(function() plot.ticks(0, 1, 1e9) end, "ticks: count is 1000000000, expected an integer from 1 to 10000")
    H.raises(function() plot.log_ticks(0, 1, 5) end, "log_ticks: lo is 0")
    H.raises(function() plot.format_number(3, -1) end, "format_number: step is -1, expected a positive number")
    assert.truthy(#plot.log_ticks(1e-300, 1e300, 4) <= 4)
  end)

  it("says what was given and what was expected", function()
    H.raises(function() ax:line(nil, "loss") end, "axes:line: y is 'loss', expected an array (N)")
    H.raises(function() ax:line(nil, { 1, "2" }) end, "y[2] is '2', expected a number")
    H.raises(function() ax:line(nil, { 1 }, { colour = "#ffffff" }) end,
      "unknown option 'colour', did you mean 'color'?", "label")
    H.raises(function() ax:line(nil, { 1 }, { color = "red" }) end, "#rrggbb", "'red'")
    H.raises(function() ax:line(nil, { 1 }, { marker = "star" }) end, "'star'", "diamond")
    H.raises(function() ax:line(nil, { 1 }, { width = -1 }) end, "width is -1, expected a number from 0.01")
    H.raises(function() ax:hist({ 1 }, { bins = 0 }) end, "bins is 0, expected an integer from 1 to 100000")
    H.raises(function() ax:hist({ 1 }, { range = { 2, 1 } }) end, "lo below hi", "2, 1")
    H.raises(function() ax:set { title = {} } end, "title is a table, expected a string")
    H.raises(function() ax:set { legend = "north" } end, "'north'", "upper left")
    H.raises(function() ax:set { ylog = true, ylim = { 0, 1 } } end, "ylim[1] is 0, expected a positive number")
    H.raises(function() ax:set { xlim = { 2, 2 } } end, "xlim has no width")
    H.raises(function() plot.figure { width = 0 } end, "width is 0, expected a number from 1 to 32767")
    H.raises(function() plot.figure { cols = 2 }:axes(3) end, "no axes at 3 in 1 row(s) of 2")
    H.raises(function() plot.figure { cols = 2 }:axes(1, 3) end, "no axes at 1, 3")
    H.raises(function() plot.image_grid {} end, "rows is an array of arrays")
    H.raises(function() plot.image_grid { { solid(2, 2, 0, 0, 0), 5 } } end, "rows[1][2]", "got 5")
    H.raises(function() plot.image_grid { { solid(2, 2, 0, 0, 0) } }:axes(1) end, "no axes")
    H.raises(function() ax:image { width = 2, height = 2, rgb = "abc" } end, "12 bytes, got 3")
    H.raises(function() ax:line(nil, { 1 }); ax:image(solid(1, 1, 0, 0, 0)) end, "hold data")
  end)

  it("has sizes that can be drawn, at the call that takes them", function()
    local picture = { { solid(1, 1, 0, 0, 0) } }
    local calls = {
      { "size is 1e+20, expected a number from 0.01", function() ax:scatter({ 1 }, { 1 }, { size = 1e20 }) end },
      { "width is 1e+20", function() ax:line(nil, { 1 }, { width = 1e20 }) end },
      { "width is nan", function() ax:runs(nil, { { 1 } }, { width = 0 / 0 }) end },
      { "head is 1e+20", function() ax:arrows({ 1 }, { 1 }, { 1 }, { 1 }, { head = 1e20 }) end },
      { "size is 1e+300, expected a number from 0.1 to 500", function() ax:text(1, 1, "a", { size = 1e300 }) end },
      { "alpha is nan, expected a number from 0 to 1", function() ax:hist({ 1 }, { alpha = 0 / 0 }) end },
      { "bins is 1e+15", function() ax:hist({ 1 }, { bins = 1e15 }) end },
      { "dash is 0 line widths long in all", function() ax:line(nil, { 1 }, { dash = { 0 } }) end },
      { "dash[2] is -1, expected a number from 0", function() ax:line(nil, { 1 }, { dash = { 1, -1 } }) end },
      { "dash[1] is nan", function() ax:line(nil, { 1 }, { dash = { 0 / 0 } }) end },
      { "y + sd[1] is 2e+300, beyond", function() ax:line(nil, { 1e300 }, { sd = { 1e300 } }) end },
      { "plot.figure: scale is 1e-300, expected a number from 0.001", function() plot.figure { scale = 1e-300 } end },
      { "plot.figure: width is 1e+300, expected a number from 1", function() plot.figure { width = 1e300 } end },
      { "plot.figure: font is 1e+300", function() plot.figure { font = 1e300 } end },
      { "plot.figure: rows is 1000000000", function() plot.figure { rows = 1e9 } end },
      { "plot.figure: 20000 x 400 points are 40000 x 800 pixels", function() plot.figure { width = 20000 } end },
      { "plot.image_grid: cell is 1e-300", function() plot.image_grid(picture, { cell = 1e-300 }) end },
      { "plot.image_grid: gap is nan", function() plot.image_grid(picture, { gap = 0 / 0 }) end },
      { "plot.image_grid: gap is inf", function() plot.image_grid(picture, { gap = 1 / 0 }) end },
    }
    for _, call in ipairs(calls) do H.raises(call[2], call[1]) end
    for _, marker in ipairs { "circle", "square", "cross" } do
      local fig = plot.figure { width = 60, height = 60, scale = 1, font = 500 }
      fig:axes(1):scatter({ 1, 2 }, { 1, 2 }, { size = 10000, marker = marker })
        :line(nil, { 1, 2 }, { width = 0.01, dash = { 0.1 } }):text(1, 1, "a", { size = 0.1 })
      assert.equal(60, (pictures.size(fig:png())))
    end
    assert.equal(2, (pictures.size(plot.figure { width = 1, height = 1, title = "a" }:png())))
    assert.equal(5000, (pictures.size(plot.image_grid(picture, { cell = 5000 - 16, scale = 1 }):png())))
  end)

  it("has limits that a logarithm tells apart", function()
    local colored = { values = { 1 }, log = true, range = { 5e-324, 1 } }
    for _, limits in ipairs { { 1e15, 1e15 + 1 }, { 1e6, 1e6 + 1e-9 } } do
      H.raises(function() ax:set { ylog = true, ylim = limits } end, "ylim has no width on a logarithmic scale")
      colored.range = limits
      H.raises(function() ax:scatter({ 1 }, { 1 }, colored) end, "range has no width on a logarithmic scale")
    end
    colored.range = { 5e-324, 1 }
    H.raises(function() ax:scatter({ 1 }, { 1 }, colored) end, "range[1] is 4.94", "expected a positive number from")
    H.raises(function() ax:set { ylog = true, ylim = { 5e-324, 1 } } end, "ylim[1] is 4.94", "a positive number from")
    H.raises(function() ax:set { ylim = { 0 / 0, 1 } } end, "ylim[1] is nan, expected a number from")
    for _, y in ipairs { { 1e-300, 2e-300 }, { 1.1e-300, 1e300 }, { 1e15, 1e15 + 1 }, { 1e6, 1e6 + 1e-9 }, { 7 } } do
      local x = { unpack(y) }
      for _, options in ipairs { { ylog = true }, { xlog = true, ylog = true }, { ylog = true, ylim = { 7 } } } do
        local fig = plot.figure { width = 60, height = 60 }
        fig:axes(1):line(x, y):scatter(x, y, { values = y, log = true }):set(options)
        assert.equal(120, (pictures.size(fig:png())))
      end
    end
  end)

  it("may be text that is not UTF-8, whose bytes become U+FFFD", function()
    local replaced = "\239\191\189"
    local fig = plot.figure { width = 300, height = 200, title = "a\255b\237\160\128" }
    assert.equal("a" .. replaced .. "b" .. replaced:rep(3), fig.title)
    fig:axes(1):line(nil, { 1, 2 }, { label = "\226\130" }):bar({ "\255" }, { 1 }):text(1, 1, "\254")
      :set { title = "c\0d", xlabel = "\255", ylabel = "é" }
    local o = fig.cells[1].options
    assert.same({ "c" .. replaced .. "d", replaced, "é" }, { o.title, o.xlabel, o.ylabel })
    assert.equal(600, (pictures.size(fig:png())))
    assert.truthy(fig:text():find("a" .. replaced .. "b", 1, true))
  end)

  it("is checked by runs, arrows, scatter and bar too", function()
    H.raises(function() ax:runs(nil, { { 1, 2 }, { 1 } }) end, "runs[1] has 2 values and runs[2] has 1")
    H.raises(function() ax:runs(nil, {}) end, "runs is an array of arrays")
    H.raises(function() ax:arrows({ 1 }, { 1 }, { 1, 2 }, { 1 }) end, "dx has 2 values and x has 1")
    H.raises(function() ax:arrows({ 1 }, { 1 }, { 1 }, { 1 }, { scale = 0 }) end,
      "scale is 0, expected a positive number")
    H.raises(function() ax:scatter({ 1 }, { 1 }, { values = { 1, 2 } }) end, "values has 2 values and the points has 1")
    H.raises(function() ax:scatter({ 1 }, { 1 }, { values = { 1 }, density = true }) end, "either values or density")
    H.raises(function() ax:scatter({ 1 }, { 1 }, { values = { 1 }, log = true, range = { 0, 1 } }) end,
      "range[1] is 0, expected a positive number")
    H.raises(function() ax:bar({ "a", "b" }, { 1, 2 }, { colors = { 1 } }) end, "colors has 1 values and values has 2")
    ax:scatter({ 1 }, { 1 }, { values = { 1 }, range = { 0, 2 } })
    H.raises(function() ax:scatter({ 1 }, { 1 }, { values = { 1 }, range = { 0, 3 } }) end, "0 to 2 in viridis",
      "same range")
    H.raises(function() plot.figure():text { columns = 5 } end, "columns is 5, expected an integer from 20")
  end)

  it("leaves the axes as they were when it is refused", function()
    pcall(ax.set, ax, { ylog = true, ylim = { 0, 1 } })
    assert.has_no.errors(function() ax:set { ylim = { 0, 1 } } end)
  end)

  it("may be an object with totable, and is copied", function()
    local y = { 1, 2, 3 }
    ax:line(nil, { totable = function() return y end })
    local before = ax.figure
    y[1] = 100
    assert.equal(1, ax.layers[1].y[1][1])
    assert.equal(before, ax.figure)
  end)
end)

describe("plot drawing", function()
  it("makes a PNG of scale pixels to the point", function()
    local png = plot.figure { width = 200, height = 100, scale = 3 }:png()
    assert.equal("\137PNG\r\n\26\n", png:sub(1, 8))
    assert.same({ 600, 300 }, { pictures.size(png) })
    assert.same({ 400, 200 }, { pictures.size(plot.figure { width = 200, height = 100 }:png()) })
  end)

  it("draws the same bytes twice", function()
    local fig = plot.figure { cols = 2, title = "α ≤ ½" }
    fig:axes(1):line(nil, { 1, 3, 2 }, { label = "a" })
    fig:axes(2):scatter({ 1, 2 }, { 3, 4 }, { label = "b" })
    assert.equal(fig:png(), fig:png())
  end)

  it("puts a picture's pixels where they belong", function()
    -- 2 x 2 pixels in a cell of 20 points, one pixel to the point, 8 points of margin
    local img = { width = 2, height = 2, rgb = "\255\0\0" .. "\0\255\0" .. "\0\0\255" .. "\10\20\30" }
    local at = pixels(plot.image_grid({ { img, false, img } }, { cell = 20, gap = 4, scale = 1 }):png())
    for _, left in ipairs { 8, 56 } do
      assert.same({ 255, 0, 0 }, { at(left, 8) })
      assert.same({ 255, 0, 0 }, { at(left + 9, 17) })
      assert.same({ 0, 255, 0 }, { at(left + 10, 8) })
      assert.same({ 0, 0, 255 }, { at(left, 18) })
      assert.same({ 10, 20, 30 }, { at(left + 19, 27) })
      assert.same({ 255, 255, 255 }, { at(left + 20, 27) })
    end
    assert.same({ 255, 255, 255 }, { at(40, 18) })
  end)

  it("takes u8 and f32 image objects", function()
    local function object(dtype, bytes)
      return { shape = function() return { 1, 2, 3 } end, dtype = function() return dtype end,
        bytes = function() return bytes end }
    end
    local floats = ffi.string(ffi.new("float[6]", { 0, 0.5, 1, -1, 2, 0 / 0 }), 24)
    local function row(img) return pixels(plot.image_grid({ { img } }, { cell = 20, scale = 1 }):png()) end
    local at = row(object("f32", floats))
    assert.same({ 0, 128, 255 }, { at(8, 8) })
    assert.same({ 0, 255, 0 }, { at(27, 8) })
    at = row(object("u8", "\1\2\3\4\5\6"))
    assert.same({ 4, 5, 6 }, { at(27, 8) })
    H.raises(function() plot.image_grid { { object("f32", "short") } } end, "(1, 2, 3) of f32 does not fill 5 bytes")
    H.raises(function() plot.image_grid { { object("i32", floats) } } end, "u8 or f32", "i32")
  end)

  it("gives long row labels the room they need", function()
    local img = solid(4, 4, 9, 9, 9)
    local narrow = pictures.size(plot.image_grid({ { img } }, { row_labels = { "a" } }):png())
    local wide = pictures.size(plot.image_grid({ { img } }, { row_labels = { ("long label "):rep(10) } }):png())
    assert.is_true(wide > narrow + 500)
  end)

  it("breaks a line at NaN and infinity, and never fails on them", function()
    local function ink(y)
      local fig = plot.figure { width = 300, height = 200 }
      fig:axes(1):line(nil, y, { color = "#ff0000", width = 4 }):set { xlim = { 0, 6 }, ylim = { 0, 2 } }
      return count(fig:png(), 255, 0, 0)
    end
    local whole, broken = ink { 1, 1, 1, 1, 1 }, ink { 1, 1, 0 / 0, 1, 1 }
    assert.near(whole / 2, broken, whole * 0.05)
    assert.equal(broken, ink { 1, 1, 1 / 0, 1, 1 })
    assert.equal(0, ink { 0 / 0, 1 / 0, -1 / 0 })
    assert.is_true(ink { 0 / 0, 1, 0 / 0 } > 0)
    local fig = plot.figure { cols = 4 }
    fig:axes(1):scatter({ 0 / 0, 1 }, { 1, 1 / 0 }):set { xlog = true, ylog = true }
    fig:axes(2):hist { 0 / 0, 1 / 0, 1 }
    fig:axes(3):bar({ "a", "b" }, { 0 / 0, 1 }, { errors = { 1, 0 / 0 } })
    fig:axes(4):heatmap { { 0 / 0, 1 }, { 1 / 0, 2 } }
    assert.has_no.errors(function() fig:png() end)
  end)

  it("draws a line of very many points like one of its turning points", function()
    local function png(n)
      local x, y = {}, {}
      for i = 1, n do x[i], y[i] = 1 + (i - 1) / (n - 1) * 4, i % 2 end
      local fig = plot.figure { width = 200, height = 150 }
      fig:axes(1):line(x, y, { color = "#ff0000", width = 2 }):set { xlim = { 0, 6 } }
      return count(fig:png(), 255, 0, 0)
    end
    assert.near(png(1000), png(100000), png(1000) * 0.02)
  end)

  it("places points by the logarithm on a log axis", function()
    -- with limits 1..100, a point at 10 is in the middle, on linear limits 0..20 too
    local function centre(log, limits)
      local fig = plot.figure { width = 300, height = 200, scale = 1 }
      fig:axes(1):scatter({ 10 }, { 0 }, { color = "#ff0000", alpha = 1, size = 9 }):set { xlog = log, xlim = limits,
        ylim = { -1, 1 } }
      local at, sum, n = pixels(fig:png()), 0, 0
      for x = 0, 299 do
        for y = 0, 199 do
          local r, g = at(x, y)
          if r == 255 and g == 0 then sum, n = sum + x, n + 1 end
        end
      end
      return sum / n
    end
    assert.near(centre(false, { 0, 20 }), centre(true, { 1, 100 }), 3)
    assert.is_true(centre(false, { 1, 100 }) < centre(true, { 1, 100 }) - 50)
  end)

  it("leaves out what a log axis has no place for", function()
    local fig = plot.figure()
    fig:axes(1):line(nil, { 0, -1, 1, 10 }):bar({ "a" }, { 0 }):set { ylog = true }
    assert.has_no.errors(function() fig:png() end)
    local empty = plot.figure()
    empty:axes(1):line(nil, { 0, -1 }):set { ylog = true }
    assert.has_no.errors(function() empty:png() end)
  end)

  it("draws bars up to their values", function()
    local fig = plot.figure { width = 400, height = 300, scale = 1 }
    fig:axes(1):bar({ "one", "two" }, { 1, 2 }, { color = "#ff0000" }):set { ylim = { 0, 4 } }
    local png = fig:png()
    local at, heights = pixels(png), {}
    for x = 0, 399 do
      local h = 0
      for y = 0, 299 do
        local r, g = at(x, y)
        if r == 255 and g == 0 then h = h + 1 end
      end
      if h > 0 then heights[h] = (heights[h] or 0) + 1 end
    end
    local found = {}
    for h, columns in pairs(heights) do
      if columns > 20 then found[#found + 1] = h end
    end
    table.sort(found)
    assert.equal(2, #found)
    assert.near(2, found[2] / found[1], 0.05)
  end)

  it("shows a legend only where there is something to name", function()
    local function png(legend, label)
      local fig = plot.figure()
      fig:axes(1):line(nil, { 1, 2 }, { label = label }):set { legend = legend }
      return fig:png()
    end
    assert.equal(png("none", "a"), png("auto", nil))
    assert.not_equal(png("none", "a"), png("auto", "a"))
    assert.not_equal(png("auto", "a"), png("right", "a"))
  end)

  it("puts the legend where the data is not", function()
    local function png(y, legend)
      local fig = plot.figure()
      fig:axes(1):line(nil, y, { label = "a" }):set { legend = legend }
      return fig:png()
    end
    assert.equal(png({ 1, 2, 4, 8 }, "upper left"), png({ 1, 2, 4, 8 }, "auto"))
    assert.equal(png({ 8, 4, 2, 1 }, "upper right"), png({ 8, 4, 2, 1 }, "auto"))
  end)

  it("draws runs as their mean in a band of their standard deviation", function()
    local function png(draw)
      local fig = plot.figure { width = 200, height = 150 }
      draw(fig:axes(1))
      return fig:png()
    end
    local expected = png(function(ax) ax:line(nil, { 2, 3, 5 }, { sd = { math.sqrt(2), 1, 0 } }) end)
    assert.equal(expected, png(function(ax) ax:runs(nil, { { 1, 2, 5 }, { 3, 3, 0 / 0 }, { 0 / 0, 4, 1 / 0 } }) end))
    assert.equal(png(function(ax) ax:line({ 1, 4 }, { 2, 3 }) end),
      png(function(ax) ax:runs({ 1, 4 }, { { 2, 3 } }) end))
  end)

  it("colours points by their values, also by their logarithm", function()
    local function png(options)
      local fig = plot.figure { width = 300, height = 200 }
      options.alpha, options.size = 1, 12
      fig:axes(1):scatter({ 1, 2, 3, 4 }, { 1, 1, 1, 1 }, options):set { color_bar = false }
      return fig:png()
    end
    local linear = png { values = { 0, 3, 9, 0 / 0 } }
    for _, t in ipairs { 0, 1 / 3, 1 } do assert.is_true(count(linear, map_color("viridis", t)) > 200) end
    local log = png { values = { 1, 10, 1000, -1 }, log = true, palette = "magma" }
    for _, t in ipairs { 0, 1 / 3, 1 } do assert.is_true(count(log, map_color("magma", t)) > 200) end
    local fig = plot.figure { width = 300, height = 200 }
    fig:axes(1):heatmap({ { 1, 10, 1000 } }, { log = true }):set { color_bar = false }
    assert.is_true(count(fig:png(), map_color("viridis", 1 / 3)) > 5000)
  end)

  it("colours points by how many lie around them", function()
    local x, y = {}, {}
    for i = 1, 200 do x[i], y[i] = 1 + (i % 5) / 100, 1 end
    x[201], y[201] = 9, 1
    local fig = plot.figure { width = 300, height = 200 }
    fig:axes(1):scatter(x, y, { density = true, size = 10, alpha = 1 }):set { xlim = { 0, 10 } }
    local many, one = spot(fig:png(), map_color("viridis", 1)), nil
    assert.is_true(many.n > 100 and many.x < 200)
    fig = plot.figure { width = 300, height = 200 }
    fig:axes(1):scatter(x, y, { density = true, size = 10, alpha = 1, palette = "gray" }):set { xlim = { 0, 10 } }
    local at, png = pixels(fig:png()), fig:png()
    local row = spot(png, 255, 255, 255)
    assert.is_true(row.n > 0)
    for column = 400, 599 do                      -- the lone point is nearly black: a two-hundredth of the most
      local r, g, b = at(column, many.y - many.y % 1)
      if r < 16 and g < 16 and b < 16 then one = column end
    end
    assert.is_truthy(one)
  end)

  it("draws arrows from their points to their ends", function()
    local function arrow(dx, dy, options)
      local fig = plot.figure { width = 300, height = 300, scale = 1 }
      options = options or {}
      options.color = "#ff0000"
      fig:axes(1):arrows({ 2, 5 }, { 2, 0 / 0 }, { dx, 1 }, { dy, 1 }, options):set { xlim = { 0, 10 },
        ylim = { 0, 10 } }
      return spot(fig:png(), 255, 0, 0), fig:png()
    end
    local right, up = arrow(6, 0, { width = 3 }), arrow(0, 6, { width = 3 })
    assert.is_true(right.right - right.left > 4 * (right.bottom - right.top))
    assert.is_true(up.bottom - up.top > 4 * (up.right - up.left))
    assert.near(right.right - right.left, up.bottom - up.top, 20)
    assert.near(right.left, up.x, 3)
    assert.near(up.bottom, right.y, 3)
    assert.equal(select(2, arrow(6, 3)), select(2, arrow(2, 1, { scale = 3 })))
  end)

  it("gives each bar its colour where asked", function()
    local fig = plot.figure { width = 300, height = 200 }
    fig:axes(1):bar({ "a", "b" }, { 1, 2 }, { colors = { "#ff0000", "#0000ff" } })
    local red, blue = spot(fig:png(), 255, 0, 0), spot(fig:png(), 0, 0, 255)
    assert.is_true(red.right < blue.left)
    assert.near(2, blue.n / red.n, 0.05)
  end)

  it("makes all plot areas of a figure equally large, whatever stands beside them", function()
    local fig = plot.figure { width = 600, height = 200, cols = 2 }
    fig:axes(1):heatmap({ { 0 } }, { palette = "magma", range = { 0, 1 } }):set { color_bar = false, ylabel = "y" }
    fig:axes(2):heatmap({ { 1 } }, { palette = "bluered", range = { 0, 2 } }):set { color_label = "beside" }
    local left, right = spot(fig:png(), map_color("magma", 0)), spot(fig:png(), map_color("bluered", 0.5))
    assert.is_true(left.right - left.left > 350)
    assert.near(left.n, right.n, left.n * 0.01)         -- the colour bar has a few pixels of it
  end)

  it("keeps the legend off a band too", function()
    local function png(legend)
      local fig = plot.figure()
      fig:axes(1):line(nil, { 2, 2, 2, 2 },
        { band = { { 1, 1, 1, 1 }, { 2, 3, 4, 8 } }, label = "a" }):set { legend = legend }
      return fig:png()
    end
    assert.equal(png "upper left", png "auto")
  end)
end)
