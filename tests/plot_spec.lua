-- Figures: what is drawn where, what the axes say, and what bad input is told.
-- Pixels are read back by cairo's own PNG reader, so the bytes of the file are what is checked.

local ffi = require "ffi"
local vx = require "vertex"
local core = require "vertex.core"
local display = require "vertex.interactive.display"
local plot = require "vertex.plot"

ffi.cdef [[
void *cairo_image_surface_create_from_png(const char *path);
int cairo_image_surface_get_width(void *surface);
]]
local cairo = ffi.load "libcairo.so.2"

local function big_endian(bytes, at)
  local a, b, c, d = bytes:byte(at, at + 3)
  return ((a * 256 + b) * 256 + c) * 256 + d
end

local function png_size(png) return big_endian(png, 17), big_endian(png, 21) end

local function read(path)
  local file = io.open(path, "rb")
  if not file then return nil end
  local bytes = file:read "*a"
  file:close()
  return bytes
end

-- A function (x, y) -> r, g, b over the pixels of a PNG, from 0.
local function pixels(png)
  local path = os.tmpname()
  local file = assert(io.open(path, "wb"))
  file:write(png)
  file:close()
  local surface = cairo.cairo_image_surface_create_from_png(path)
  os.remove(path)
  assert.equal(0, cairo.cairo_surface_status(surface))
  local data, stride = cairo.cairo_image_surface_get_data(surface), cairo.cairo_image_surface_get_stride(surface)
  return function(x, y)
    local p = data + y * stride + x * 4
    return p[2], p[1], p[0]
  end
end

-- The pixels of exactly this colour: {n=, x=, y= their middle, left=, right=, top=, bottom=}.
local function spot(png, r, g, b)
  local at, w, h = pixels(png), png_size(png), select(2, png_size(png))
  local s, sum_x, sum_y = { n = 0, left = w, right = -1, top = h, bottom = -1 }, 0, 0
  for y = 0, h - 1 do
    for x = 0, w - 1 do
      local pr, pg, pb = at(x, y)
      if pr == r and pg == g and pb == b then
        s.n, sum_x, sum_y = s.n + 1, sum_x + x, sum_y + y
        s.left, s.right, s.top, s.bottom = math.min(s.left, x), math.max(s.right, x), math.min(s.top, y),
          math.max(s.bottom, y)
      end
    end
  end
  s.x, s.y = sum_x / s.n, sum_y / s.n
  return s
end

local function count(png, r, g, b) return spot(png, r, g, b).n end

-- A colour of a map as pixels have it.
local function map_color(name, t)
  local r, g, b = plot.colormap(name, t)
  return math.floor(r * 255 + 0.5), math.floor(g * 255 + 0.5), math.floor(b * 255 + 0.5)
end

local function solid(w, h, r, g, b) return { width = w, height = h, rgb = string.char(r, g, b):rep(w * h) } end

-- f must fail, with every one of the words in its message, blaming this file.
local function refused(f, ...)
  local ok, message = pcall(f)
  assert.is_false(ok)
  assert.matches("plot_spec.lua:%d+:", message)
  for _, words in ipairs { ... } do
    assert.is_truthy(message:find(words, 1, true), ("%q is not in %q"):format(words, message))
  end
end

local scratch

local function fresh(name) return scratch .. "/" .. name end

local function files()
  local list = io.popen(("ls -A '%s'"):format(scratch))
  local text = list:read "*a"
  list:close()
  return text
end

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
  end)
end)

describe("plot colours", function()
  it("come from maps that end where they should", function()
    local r, g, b = plot.colormap("viridis", 0)
    assert.same({ 0x44, 0x01, 0x54 }, { r * 255, g * 255, b * 255 })
    assert.same({ plot.colormap("viridis", 1) }, { plot.colormap("viridis", 7) })
    refused(function() plot.colormap("jet", 0) end, "'jet'", "viridis")
  end)
end)

describe("plot input", function()
  local ax

  before_each(function() ax = plot.figure():axes(1) end)

  it("names both lengths where arrays disagree", function()
    refused(function() ax:line({ 1, 2, 3 }, { 1, 2 }) end, "x has 3 values and y has 2")
    refused(function() ax:scatter({ 1 }, {}) end, "x has 1 values and y has 0")
    refused(function() ax:line(nil, { 1, 2 }, { sd = { 1 } }) end, "sd has 1 values and y has 2")
    refused(function() ax:line(nil, { 1, 2 }, { band = { { 1, 1 }, { 2 } } }) end, "band[2] has 1 values and y has 2")
    refused(function() ax:bar({ "a", "b" }, { 1 }) end, "labels has 2 values and values has 1")
    refused(function() ax:heatmap{ { 1, 2 }, { 3 } } end, "rows[1] has 2 values and rows[2] has 1")
  end)

  it("says what was given and what was expected", function()
    refused(function() ax:line(nil, "loss") end, "y is an array of numbers", "'loss'")
    refused(function() ax:line(nil, { 1, "2" }) end, "y[2] is '2', expected a number")
    refused(function() ax:line(nil, { 1 }, { colour = "#ffffff" }) end,
      "unknown option 'colour', did you mean 'color'?", "label")
    refused(function() ax:line(nil, { 1 }, { color = "red" }) end, "#rrggbb", "'red'")
    refused(function() ax:line(nil, { 1 }, { marker = "star" }) end, "'star'", "diamond")
    refused(function() ax:line(nil, { 1 }, { width = -1 }) end, "width is -1, expected a positive number")
    refused(function() ax:hist({ 1 }, { bins = 0 }) end, "bins is 0, expected an integer of 1 or more")
    refused(function() ax:hist({ 1 }, { range = { 2, 1 } }) end, "lo below hi", "2, 1")
    refused(function() ax:set{ title = {} } end, "title is a table, expected a string")
    refused(function() ax:set{ legend = "north" } end, "'north'", "upper left")
    refused(function() ax:set{ ylog = true, ylim = { 0, 1 } } end, "ylim[1] is a positive number, got 0")
    refused(function() ax:set{ xlim = { 2, 2 } } end, "xlim has no width")
    refused(function() plot.figure{ width = 0 } end, "width is 0, expected a positive number")
    refused(function() plot.figure{ cols = 2 }:axes(3) end, "no axes at 3 in 1 row(s) of 2")
    refused(function() plot.figure{ cols = 2 }:axes(1, 3) end, "no axes at 1, 3")
    refused(function() plot.image_grid{} end, "rows is an array of arrays")
    refused(function() plot.image_grid{ { solid(2, 2, 0, 0, 0), 5 } } end, "rows[1][2]", "got 5")
    refused(function() plot.image_grid{ { solid(2, 2, 0, 0, 0) } }:axes(1) end, "no axes")
    refused(function() ax:image{ width = 2, height = 2, rgb = "abc" } end, "12 bytes, got 3")
    refused(function() ax:line(nil, { 1 }); ax:image(solid(1, 1, 0, 0, 0)) end, "hold data")
  end)

  it("is checked by what draws on planes and simplices", function()
    refused(function() ax:runs(nil, { { 1, 2 }, { 1 } }) end, "runs[1] has 2 values and runs[2] has 1")
    refused(function() ax:runs(nil, {}) end, "runs is an array of arrays")
    refused(function() ax:arrows({ 1 }, { 1 }, { 1, 2 }, { 1 }) end, "dx has 2 values and x has 1")
    refused(function() ax:arrows({ 1 }, { 1 }, { 1 }, { 1 }, { scale = 0 }) end,
      "scale is 0, expected a positive number")
    refused(function() ax:scatter({ 1 }, { 1 }, { values = { 1, 2 } }) end, "values has 2 values and the points has 1")
    refused(function() ax:scatter({ 1 }, { 1 }, { values = { 1 }, density = true }) end, "either values or density")
    refused(function() ax:scatter({ 1 }, { 1 }, { values = { 1 }, log = true, range = { 0, 1 } }) end,
      "positive number for a logarithmic scale, got 0")
    refused(function() ax:bar({ "a", "b" }, { 1, 2 }, { colors = { 1 } }) end, "colors has 1 values and values has 2")
    ax:scatter({ 1 }, { 1 }, { values = { 1 }, range = { 0, 2 } })
    refused(function() ax:scatter({ 1 }, { 1 }, { values = { 1 }, range = { 0, 3 } }) end, "0 to 2 in viridis",
      "same range")

    local fig = plot.figure{ cols = 3 }
    refused(function() fig:simplex(1, { codes = 2 }) end, "codes is 2, expected at least 3")
    refused(function() fig:simplex(1, { labels = { "a", "b" }, codes = 3 }) end, "labels has 2 values for 3 codes")
    refused(function() fig:simplex(1, { corners = 3 }) end, "unknown option 'corners'", "codes")
    local three, five = fig:simplex(1), fig:simplex(1, 2, { codes = 5 })
    assert.equal(three, fig:simplex(1))
    refused(function() fig:simplex(1, { codes = 4 }) end, "a simplex already")
    fig:axes(3)
    refused(function() fig:simplex(3) end, "axes already")
    refused(function() three:scatter{ { 0.5, 0.5 } } end, "p (1,2), expected (N,3)")
    refused(function() three:scatter "p" end, "a tensor (N, 3) or an array of arrays of 3 numbers", "'p'")
    refused(function() three:scatter{ { 0.2, 0.3, 0.5 }, { 0.5, 0.5, 0.5 } } end, "row 2 of p", "its sum is 1.5")
    refused(function() three:line{ { 1.2, -0.2, 0 } } end, "row 1 of p", "least value -0.2")
    refused(function() three:arrows({ { 1, 0, 0 } }, { { 1, 0 } }) end, "d (1,2), expected (N,3)")
    refused(function() three:arrows({ { 1, 0, 0 } }, { { 1, 0, 0 }, { 0, 1, 0 } }) end, "dx has 2 values and x has 1")
    refused(function() three:text({ { 1, 0, 0 }, { 0, 1, 0 } }, "two") end, "one point, got 2")
    refused(function() five:density(function() return {} end) end, "only for 3 codes, these axes have 5")
    refused(function() three:density(function() return { 1, 2 } end) end,
      "what source was given has 16384 values and what it returned has 2")
    refused(function() three:set{ xlog = true } end, "unknown option 'xlog'", "xlabel")
    refused(function() plot.figure():text{ columns = 5 } end, "columns is 5, expected at least 20")
  end)

  it("leaves the axes as they were when it is refused", function()
    pcall(ax.set, ax, { ylog = true, ylim = { 0, 1 } })
    assert.has_no.errors(function() ax:set{ ylim = { 0, 1 } } end)
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
  setup(function()
    scratch = os.tmpname()
    os.remove(scratch)
    assert(os.execute(("mkdir '%s'"):format(scratch)) == 0)
  end)

  teardown(function() os.execute(("rm -r '%s'"):format(scratch)) end)

  it("makes a PNG of scale pixels to the point", function()
    local png = plot.figure{ width = 200, height = 100, scale = 3 }:png()
    assert.equal("\137PNG\r\n\26\n", png:sub(1, 8))
    assert.same({ 600, 300 }, { png_size(png) })
    assert.same({ 400, 200 }, { png_size(plot.figure{ width = 200, height = 100 }:png()) })
  end)

  it("draws the same bytes twice", function()
    local fig = plot.figure{ cols = 2, title = "α ≤ ½" }
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
    refused(function() plot.image_grid{ { object("f32", "short") } } end, "(1, 2, 3) of f32 does not fill 5 bytes")
    refused(function() plot.image_grid{ { object("i32", floats) } } end, "u8 or f32", "i32")
  end)

  it("gives long row labels the room they need", function()
    local img = solid(4, 4, 9, 9, 9)
    local narrow = png_size(plot.image_grid({ { img } }, { row_labels = { "a" } }):png())
    local wide = png_size(plot.image_grid({ { img } }, { row_labels = { ("long label "):rep(10) } }):png())
    assert.is_true(wide > narrow + 500)
  end)

  it("breaks a line at NaN and infinity, and never fails on them", function()
    local function ink(y)
      local fig = plot.figure{ width = 300, height = 200 }
      fig:axes(1):line(nil, y, { color = "#ff0000", width = 4 }):set{ xlim = { 0, 6 }, ylim = { 0, 2 } }
      return count(fig:png(), 255, 0, 0)
    end
    local whole, broken = ink{ 1, 1, 1, 1, 1 }, ink{ 1, 1, 0 / 0, 1, 1 }
    assert.near(whole / 2, broken, whole * 0.05)
    assert.equal(broken, ink{ 1, 1, 1 / 0, 1, 1 })
    assert.equal(0, ink{ 0 / 0, 1 / 0, -1 / 0 })
    assert.is_true(ink{ 0 / 0, 1, 0 / 0 } > 0)
    local fig = plot.figure{ cols = 4 }
    fig:axes(1):scatter({ 0 / 0, 1 }, { 1, 1 / 0 }):set{ xlog = true, ylog = true }
    fig:axes(2):hist{ 0 / 0, 1 / 0, 1 }
    fig:axes(3):bar({ "a", "b" }, { 0 / 0, 1 }, { errors = { 1, 0 / 0 } })
    fig:axes(4):heatmap{ { 0 / 0, 1 }, { 1 / 0, 2 } }
    assert.has_no.errors(function() fig:png() end)
  end)

  it("draws a line of very many points like one of its turning points", function()
    local function png(n)
      local x, y = {}, {}
      for i = 1, n do x[i], y[i] = 1 + (i - 1) / (n - 1) * 4, i % 2 end
      local fig = plot.figure{ width = 200, height = 150 }
      fig:axes(1):line(x, y, { color = "#ff0000", width = 2 }):set{ xlim = { 0, 6 } }
      return count(fig:png(), 255, 0, 0)
    end
    assert.near(png(1000), png(100000), png(1000) * 0.02)
  end)

  it("places points by the logarithm on a log axis", function()
    -- with limits 1..100, a point at 10 is in the middle, on linear limits 0..20 too
    local function centre(log, limits)
      local fig = plot.figure{ width = 300, height = 200, scale = 1 }
      fig:axes(1):scatter({ 10 }, { 0 }, { color = "#ff0000", alpha = 1, size = 9 }):set{ xlog = log, xlim = limits,
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
    fig:axes(1):line(nil, { 0, -1, 1, 10 }):bar({ "a" }, { 0 }):set{ ylog = true }
    assert.has_no.errors(function() fig:png() end)
    local empty = plot.figure()
    empty:axes(1):line(nil, { 0, -1 }):set{ ylog = true }
    assert.has_no.errors(function() empty:png() end)
  end)

  it("draws bars up to their values", function()
    local fig = plot.figure{ width = 400, height = 300, scale = 1 }
    fig:axes(1):bar({ "one", "two" }, { 1, 2 }, { color = "#ff0000" }):set{ ylim = { 0, 4 } }
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
      fig:axes(1):line(nil, { 1, 2 }, { label = label }):set{ legend = legend }
      return fig:png()
    end
    assert.equal(png("none", "a"), png("auto", nil))
    assert.not_equal(png("none", "a"), png("auto", "a"))
    assert.not_equal(png("auto", "a"), png("right", "a"))
  end)

  it("puts the legend where the data is not", function()
    local function png(y, legend)
      local fig = plot.figure()
      fig:axes(1):line(nil, y, { label = "a" }):set{ legend = legend }
      return fig:png()
    end
    assert.equal(png({ 1, 2, 4, 8 }, "upper left"), png({ 1, 2, 4, 8 }, "auto"))
    assert.equal(png({ 8, 4, 2, 1 }, "upper right"), png({ 8, 4, 2, 1 }, "auto"))
  end)

  it("draws runs as their mean in a band of their standard deviation", function()
    local function png(draw)
      local fig = plot.figure{ width = 200, height = 150 }
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
      local fig = plot.figure{ width = 300, height = 200 }
      options.alpha, options.size = 1, 12
      fig:axes(1):scatter({ 1, 2, 3, 4 }, { 1, 1, 1, 1 }, options):set{ color_bar = false }
      return fig:png()
    end
    local linear = png{ values = { 0, 3, 9, 0 / 0 } }
    for _, t in ipairs { 0, 1 / 3, 1 } do assert.is_true(count(linear, map_color("viridis", t)) > 200) end
    local log = png{ values = { 1, 10, 1000, -1 }, log = true, palette = "magma" }
    for _, t in ipairs { 0, 1 / 3, 1 } do assert.is_true(count(log, map_color("magma", t)) > 200) end
    local fig = plot.figure{ width = 300, height = 200 }
    fig:axes(1):heatmap({ { 1, 10, 1000 } }, { log = true }):set{ color_bar = false }
    assert.is_true(count(fig:png(), map_color("viridis", 1 / 3)) > 5000)
  end)

  it("colours points by how many lie around them", function()
    local x, y = {}, {}
    for i = 1, 200 do x[i], y[i] = 1 + (i % 5) / 100, 1 end
    x[201], y[201] = 9, 1
    local fig = plot.figure{ width = 300, height = 200 }
    fig:axes(1):scatter(x, y, { density = true, size = 10, alpha = 1 }):set{ xlim = { 0, 10 } }
    local many, one = spot(fig:png(), map_color("viridis", 1)), nil
    assert.is_true(many.n > 100 and many.x < 200)
    fig = plot.figure{ width = 300, height = 200 }
    fig:axes(1):scatter(x, y, { density = true, size = 10, alpha = 1, palette = "gray" }):set{ xlim = { 0, 10 } }
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
      local fig = plot.figure{ width = 300, height = 300, scale = 1 }
      options = options or {}
      options.color = "#ff0000"
      fig:axes(1):arrows({ 2, 5 }, { 2, 0 / 0 }, { dx, 1 }, { dy, 1 }, options):set{ xlim = { 0, 10 },
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
    local fig = plot.figure{ width = 300, height = 200 }
    fig:axes(1):bar({ "a", "b" }, { 1, 2 }, { colors = { "#ff0000", "#0000ff" } })
    local red, blue = spot(fig:png(), 255, 0, 0), spot(fig:png(), 0, 0, 255)
    assert.is_true(red.right < blue.left)
    assert.near(2, blue.n / red.n, 0.05)
  end)

  it("makes all plot areas of a figure equally large, whatever stands beside them", function()
    local fig = plot.figure{ width = 600, height = 200, cols = 2 }
    fig:axes(1):heatmap({ { 0 } }, { palette = "magma", range = { 0, 1 } }):set{ color_bar = false, ylabel = "y" }
    fig:axes(2):heatmap({ { 1 } }, { palette = "bluered", range = { 0, 2 } }):set{ color_label = "beside" }
    local left, right = spot(fig:png(), map_color("magma", 0)), spot(fig:png(), map_color("bluered", 0.5))
    assert.is_true(left.right - left.left > 350)
    assert.near(left.n, right.n, left.n * 0.01)         -- the colour bar has a few pixels of it
  end)

  it("puts the points of a simplex where they belong", function()
    -- the middle of one red point, p, on axes of M codes
    local function place(p)
      local fig = plot.figure{ width = 400, height = 400, scale = 1 }
      fig:simplex(1, { codes = #p }):scatter({ p }, { color = "#ff0000", alpha = 1, size = 9 })
      local s = spot(fig:png(), 255, 0, 0)
      assert.is_true(s.n > 30)
      return s.x, s.y
    end
    local x1, y1 = place{ 1, 0, 0 }
    local x2, y2 = place{ 0, 1, 0 }
    local x3, y3 = place{ 0, 0, 1 }
    assert.near(y1, y2, 0.6)
    assert.near((x1 + x2) / 2, x3, 0.6)
    assert.near(math.sqrt(3) / 2 * (x2 - x1), y1 - y3, 1)
    assert.is_true(x2 - x1 > 250)
    local x, y = place{ 0.5, 0.2, 0.3 }
    assert.near(0.5 * x1 + 0.2 * x2 + 0.3 * x3, x, 0.8)
    assert.near(0.5 * y1 + 0.2 * y2 + 0.3 * y3, y, 0.8)

    local top_x, top_y = place{ 1, 0, 0, 0 }
    local right_x, right_y = place{ 0, 1, 0, 0 }
    local bottom_x, bottom_y = place{ 0, 0, 1, 0 }
    assert.near(top_x, bottom_x, 0.6)
    assert.near(right_x - top_x, right_y - top_y, 1)
    assert.near(right_x - top_x, bottom_y - right_y, 1)
    x, y = place{ 0.25, 0.25, 0.25, 0.25 }
    assert.near(top_x, x, 0.6)
    assert.near(right_y, y, 0.6)
  end)

  it("takes tensors on a simplex, copies them, and leaves gaps for NaN", function()
    local p = vx.tensor{ { 0.2, 0.3, 0.5 }, { 0 / 0, 0.5, 0.5 }, { 0.1, 0.1, 0.8 } }
    local fig = plot.figure()
    local ax = fig:simplex(1):scatter(p):line(p, { color = 1 }):scatter(vx.zeros{ 0, 3 })
    local x = ax.layers[1].x[1]
    assert.equal(3, #x)
    assert.is_true(x[2] ~= x[2])
    p:fill(0)
    assert.near(0.3 - 0.2, x[1] * 2, 1e-6)
    assert.has_no.errors(function() fig:png() end)
    collectgarbage()
    collectgarbage()
    local before = vx.memory().live
    plot.figure():simplex(1):scatter(vx.zeros{ 2, 3 } + 1 / 3)
    collectgarbage()
    collectgarbage()
    assert.equal(before, vx.memory().live)
  end)

  it("draws on a simplex only the part of a direction that lies within it", function()
    local function png(d)
      local fig = plot.figure{ width = 200, height = 200 }
      fig:simplex(1):arrows({ { 0.4, 0.3, 0.3 } }, { d }, { color = "#ff0000" })
      return fig:png()
    end
    assert.equal(png{ 0.25, -0.25, 0 }, png{ 1.25, 0.75, 1 })
  end)

  it("fills the triangle with a density's colours", function()
    local fig = plot.figure{ width = 300, height = 300 }
    fig:simplex(1):density(function(p) return p:narrow(2, 1, 1):reshape{ p:size(1) } end,
      { palette = "gray", range = { 0, 1 }, parts = 60 })
      :set{ color_bar = false }
    local fig2 = plot.figure{ width = 300, height = 300 }
    fig2:simplex(1):density(function(p) return vx.zeros{ p:size(1) } + 1 / 0 end,
      { palette = "magma", range = { 0, 1 }, parts = 60 }):set{ color_bar = false }
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
    assert.is_true(worst < 0.5)             -- the corners' kernels see a sixth of their mass
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
    refused(function() vx.simplex.plot(vx.simplex.named("uniform", 4, { dim = 2 })) end, "p (4,2)", "M at least 3")
    refused(function() vx.simplex.plot(vx.zeros{ 4, 3 }) end, "does not hold points")
    refused(function() vx.simplex.plot(p, { label = "x" }) end, "unknown option 'label'")

    local quantizer = vx.quantizer("softmax-knn-l2", { dim = 4, codes = 5, groups = 2, k = 2, seed = 1 })
    local watch = vx.simplex.watch(quantizer)
    refused(function() watch:plot() end, "nothing was recorded yet")
    for _ = 1, 3 do quantizer(vx.randn{ 20, 4 }) end
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

  it("keeps the legend off a band too", function()
    local function png(legend)
      local fig = plot.figure()
      fig:axes(1):line(nil, { 2, 2, 2, 2 },
        { band = { { 1, 1, 1, 1 }, { 2, 3, 4, 8 } }, label = "a" }):set{ legend = legend }
      return fig:png()
    end
    assert.equal(png "upper left", png "auto")
  end)

  it("saves by the ending, svg and pdf too", function()
    local fig = plot.figure()
    fig:axes(1):line(nil, { 1, 2 }, { label = "é" })
    fig:save(fresh "a.png"):save(fresh "a.svg"):save(fresh "a.PDF")
    assert.equal(fig:png(), read(fresh "a.png"))
    assert.matches("<svg", read(fresh "a.svg"))
    assert.equal("%PDF", read(fresh "a.PDF"):sub(1, 4))
    assert.equal("a.PDF\na.png\na.svg\n", files())
    os.execute(("rm '%s'/*"):format(scratch))
    refused(function() fig:save(fresh "a.jpg") end, ".png, .svg or .pdf", "a.jpg")
    refused(function() fig:save() end, ".png, .svg or .pdf")
  end)

  it("turns layers of many marks into a picture in an svg", function()
    local function bytes(n)
      local x = {}
      for i = 1, n do x[i] = i % 97 end
      local fig = plot.figure()
      fig:axes(1):scatter(nil, x)
      fig:save(fresh "s.svg")
      local text = read(fresh "s.svg")
      os.remove(fresh "s.svg")
      return text
    end
    assert.is_nil(bytes(1000):find("data:image/png", 1, true))
    local many = bytes(20000)
    assert.is_truthy(many:find("data:image/png", 1, true))
    assert.is_true(#many < 1e6)
    local fig, rows = plot.figure(), {}
    for i = 1, 2100 do rows[i] = { 0.5, i / 4200, 0.5 - i / 4200 } end
    fig:simplex(1):scatter(rows)
    fig:save(fresh "s.svg")
    assert.is_truthy(read(fresh "s.svg"):find("data:image/png", 1, true))
    os.remove(fresh "s.svg")
  end)

  it("is text with braille dots in a terminal", function()
    local fig = plot.figure{ width = 480, height = 240 }
    fig:axes(1):line(nil, { 1, 2, 3 }, { label = "rising" }):set{ title = "A title", xlabel = "steps", ylabel = "loss",
      legend = "upper left" }
    local text = fig:text{ columns = 80 }
    for _, words in ipairs { "A title", "steps", "rising" } do assert.is_truthy(text:find(words, 1, true)) end
    local rows, highest, lowest = {}, nil, nil
    for row in (text .. "\n"):gmatch "(.-)\n" do rows[#rows + 1] = row end
    assert.equal(20, #rows)                             -- 240 points of 12 to the row
    local function width(row) return #row:gsub("[\128-\191]", "") end
    for _, row in ipairs(rows) do assert.is_true(width(row) <= 80) end
    assert.is_nil(text:find("\27", 1, true))
    assert.equal(text, fig:text{ columns = 80 })
    -- the line rises: where it is near its right end is above where it begins
    local plain = plot.figure{ width = 480, height = 240 }
    plain:axes(1):line(nil, { 1, 2, 3 }, { color = "#000000", width = 4 }):set{ grid = false }
    local row_number = 0
    for row in (plain:text() .. "\n"):gmatch "(.-)\n" do
      row_number = row_number + 1
      local column = 0
      for letter in row:gmatch "[%z\1-\127\194-\244][\128-\191]*" do
        column = column + 1
        if letter:byte() == 0xE2 and column > 60 and not highest then highest = row_number end
        if letter:byte() == 0xE2 and column > 12 and column < 20 and row_number < 18 then lowest = row_number end
      end
    end
    assert.is_true(highest < 4 and lowest > 14)
    assert.matches("\27%[38;2;%d+;1%d%d;1%d%dm", fig:text{ columns = 80, color = true })
    local narrow = plot.figure{ width = 2000, height = 300, cols = 2 }
    narrow:axes(1):line(nil, { 1, 2 })
    narrow:simplex(2):scatter{ { 1, 0, 0 } }
    for row in narrow:text{ columns = 60 }:gmatch "[^\n]+" do assert.is_true(width(row) <= 60) end
  end)

  it("shows pictures as text by their lightness", function()
    local function dots(level)
      local text, n = plot.image_grid({ { solid(8, 8, level, level, level) } }, { cell = 96 }):text(), 0
      for a, b in text:gmatch "\226([\160-\163])([\128-\191])" do
        local bits = (a:byte() - 160) * 64 + b:byte() - 128
        while bits > 0 do n, bits = n + bits % 2, math.floor(bits / 2) end
      end
      return n
    end
    assert.equal(0, dots(255))
    assert.near(1024, dots(0), 70)                      -- 96 points are 32 dots
    assert.is_true(dots(180) > 100 and dots(180) < 900)
  end)

  it("shows itself in a notebook as a PNG and as text", function()
    local mode, backend, shown, options = display.mode, display.backend, nil, nil
    display.mode, display.backend = "notebook", function(bundle, o) shown, options = bundle, o end
    local fig = plot.figure{ width = 100, height = 80 }
    local ok, result = pcall(function() return select("#", fig:show { id = "loss" }) end)
    display.mode, display.backend = mode, backend
    assert.is_true(ok)
    assert.equal(0, result)
    assert.equal(fig:png(), shown["image/png"])
    assert.is_nil(shown["text/plain"]:find("\27", 1, true))
    assert.same({ id = "loss", metadata = { ["image/png"] = { width = 100, height = 80 } } }, options)
    assert.matches("figure 100 x 80 pt", tostring(fig))
    assert.matches("pictures", tostring(plot.image_grid{ { solid(1, 1, 0, 0, 0) } }))
    local two = plot.figure{ cols = 2 }
    assert.equal("axes with 1 layer(s)", tostring(two:axes(1):line(nil, { 1, 2 })))
    assert.equal("axes on the simplex of 3 codes with 1 layer(s)", tostring(two:simplex(2):scatter{ { 1, 0, 0 } }))
  end)

  it("is written to a file by show in a script without a terminal", function()
    local here = io.popen "pwd":read "*l"
    local function absolute(path) return path:sub(1, 1) == "/" and path or here .. "/" .. path end
    local library = os.getenv "VERTEX_LIB" or absolute(core.root) .. "/build/libvertex.so"
    local file = assert(io.open(fresh "try.lua", "w"))
    file:write(([[package.path = "%s/lua/?.lua;%s/lua/?/init.lua;" .. package.path
      local plot = require "vertex.plot"
      plot.figure{width = 50, height = 40}:show()
      plot.figure{width = 60, height = 40}:show()]]):format(absolute(core.root), absolute(core.root)))
    file:close()
    local run = io.popen(("cd '%s' && VERTEX_LIB='%s' luajit try.lua 2>&1"):format(scratch, absolute(library)))
    local output = run:read "*a"
    run:close()
    assert.equal("figure written to try-1.png\nfigure written to try-2.png\n", output)
    assert.same({ 120, 80 }, { png_size(read(fresh "try-2.png")) })
    os.execute(("rm '%s'/*"):format(scratch))
  end)

  it("leaves nothing behind when saving fails", function()
    local fig = plot.figure()
    refused(function() fig:save(fresh "no/such/folder.png") end, fresh "no/such/folder.png",
      "No such file or directory")
    os.execute(("mkdir '%s'"):format(fresh "folder.png"))
    refused(function() fig:save(fresh "folder.png") end, "folder.png", "directory")
    os.execute(("rmdir '%s'"):format(fresh "folder.png"))
    fig:axes(1):set{ title = "\255 is not UTF-8" }
    for _, name in ipairs { "bad.png", "bad.svg", "bad.pdf" } do
      refused(function() fig:save(fresh(name)) end, name, "UTF-8")
    end
    refused(function() fig:png() end, "UTF-8")
    refused(function() plot.figure{ width = 1e5 }:save(fresh "huge.png") end, "huge.png", "too big")
    assert.equal("", files())
  end)

  it("keeps the file that was there when saving fails, and replaces it when not", function()
    local path = fresh "kept.png"
    local fig = plot.figure():save(path)
    local before = read(path)
    fig:axes(1):set{ title = "\255 is not UTF-8" }
    refused(function() fig:save(path) end, "kept.png", "UTF-8")
    assert.equal(before, read(path))
    fig:axes(1):set{ title = "UTF-8" }
    fig:save(path)
    assert.equal(fig:png(), read(path))
    assert.equal("kept.png\n", files())
    os.remove(path)
  end)

  it("says which package is missing when there is no cairo", function()
    local load, loaded = ffi.load, {}
    for _, name in ipairs { "vertex.plot", "vertex.plot.canvas" } do
      loaded[name], package.loaded[name] = package.loaded[name], nil
    end
    local without = require "vertex.plot"
    for name, module in pairs(loaded) do package.loaded[name] = module end
    ffi.load = function(name) error(name .. ": cannot open shared object file") end
    local ok, message = pcall(function() without.figure():png() end)
    ffi.load = load
    assert.is_false(ok)
    assert.matches("libcairo2", message)
  end)
end)
