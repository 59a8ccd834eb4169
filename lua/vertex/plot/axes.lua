--- plot/axes.lua: axes, one plot of a figure. Their methods check what they are given and record it as layers, which
-- plot/marks.lua draws. Each method returns the axes, so that calls chain.
--
-- Fields of axes:
--   figure           the figure that they belong to
--   layers           what to draw, in this order
--   options          the texts and scales of set
--   series           number of layers that took a colour
--   bar_layers       the layers of bar
--   xlabels, ylabels texts at the whole numbers
--   color_scale      the scale of the colour bar
--   reversed         true where y points down
--   picture          the picture of image

local arguments = require "vertex.arguments"
local scales = require "vertex.plot.scales"
local marks = require "vertex.plot.marks"
local legend = require "vertex.plot.legend"
local colors = require "vertex.plot.colors"
local inputs = require "vertex.plot.inputs"
local check = require "vertex.check"
local core = require "vertex.core"
local abs, floor, ceil, min, max, nan = math.abs, math.floor, math.ceil, math.min, math.max, 0 / 0
local fail = core.fail

local Axes = {}
Axes.__index = Axes

local axes = { class = Axes }

--- Makes empty axes of a figure.
function axes.new(figure)
  return setmetatable({ figure = figure, layers = {}, bar_layers = {}, options = {}, series = 0 }, Axes)
end

-- Says "axes with 2 layer(s)" in a session.
function Axes.__tostring(ax)
  if ax.picture then return "axes with a picture" end
  return ("%s with %d layer(s)"):format(ax.simplex and ("axes on the simplex of %d codes"):format(ax.simplex.codes)
    or "axes", #ax.layers)
end

-- Dashes of the rounds through the series colours, in line widths.
local dashes = { {}, { 5, 2 }, { 1.5, 1.5 }, { 7, 2, 1.5, 2 } }

-- Makes a layer in the colour, dash and marker of the next series.
local function new_series(ax, who, o)
  local n, k = ax.series, #colors.series
  local round = floor(n / k)
  local layer = {
    color = colors.check(who, o.color or n % k + 1),
    label = o.label,
    dash = o.dash or dashes[round % #dashes + 1],
    marker = o.marker and marks.check_marker(who, o.marker),
    round = round,
  }
  ax.series = n + 1
  return layer
end

local function add_layer(ax, kind, layer)
  layer.kind = kind
  ax.layers[#ax.layers + 1] = layer
  return ax
end

-- Checks the options of a drawing method, and that the axes hold no picture.
local function begin(ax, who, options, known)
  if ax.picture then fail("%s: these axes hold a picture", who) end
  return check.options(who, options, known)
end

-- Gives copies of x and y; x is 1..n where it is nil.
local function check_points(who, x, y)
  y = inputs.array(who, "y", y)
  if x ~= nil then return inputs.array_like(who, "x", x, "y", y), y end
  x = {}
  for i = 1, #y do x[i] = i end
  return x, y
end

-- Checks the ends of a scale, given as the option `name`; either may be nil.
local function check_ends(who, name, ends, log)
  for i = 1, 2 do
    local v = ends[i]
    local low = log and scales.LEAST or -scales.LARGEST
    if v ~= nil and not (type(v) == "number" and v >= low and v <= scales.LARGEST) then
      fail("%s: %s[%d] is %s, expected a %snumber from %g to %g", who, name, i, check.show(v),
        log and "positive " or "", low, scales.LARGEST)
    end
  end
  if ends[1] and ends[2] and not scales.apart(ends[1], ends[2], log) then
    fail("%s: %s has no width%s, its ends are %.17g and %.17g", who, name, log and " on a logarithmic scale" or "",
      ends[1], ends[2])
  end
end

-- Gives lo and hi: the option range, or else the range of the data; of the positive data where `log` is set.
local function check_range(who, range, arrays, log)
  if not range then return scales.range(arrays, log) end
  local lo, hi = range[1], range[2]
  if type(lo) == "number" and type(hi) == "number" and lo < hi then
    check_ends(who, "range", range, log)
    return lo, hi
  end
  fail("%s: range is {lo, hi} with lo below hi, got {%s, %s}", who, check.show(lo), check.show(hi))
end

--- The options that choose the colours of values, with their types.
axes.color_options = { palette = { "text", "viridis" }, range = "table", log = "boolean" }

-- Adds the options of colours to the known ones.
local function with_colors(known)
  for name, kind in pairs(axes.color_options) do known[name] = kind end
  return known
end

-- Gives the colour scale { lo, hi, log, palette } that the options palette, range and log choose; viridis over all
-- values without them. Axes have one colour bar, so every layer with values must agree on its scale.
function axes.set_color_scale(ax, who, o, arrays)
  local palette = colors.check_palette(who, o.palette)
  local lo, hi = check_range(who, o.range, arrays, o.log)
  local has = ax.color_scale
  if has and not (has.lo == lo and has.hi == hi and has.log == o.log and has.palette == palette) then
    fail("%s: the axes' colour bar shows %g to %g in %s; give this layer and that one the same range, palette and log",
      who, has.lo, has.hi, has.palette)
  end
  ax.color_scale = { lo = lo, hi = hi, log = o.log, palette = palette }
  return ax.color_scale
end

-- Gives values + sign by, which are called `name`.
local function offset(who, name, values, by, sign)
  local out = {}
  for i, v in ipairs(values) do out[i] = inputs.drawable(who, ("%s[%d]"):format(name, i), v + sign * by[i]) end
  return out
end

--- Draws a curve.
-- @param[opt] x array (N); 1..N where it is nil
-- @param y array (N)
-- @param[opt] options table
-- @param[opt] options.label string, for the legend
-- @param[opt] options.color "#rrggbb", { r, g, b } or a number; else the next series colour
-- @param[opt=1.6] options.width of the line, in points
-- @param[opt] options.dash array of lengths in line widths, {} for a solid line
-- @param[opt] options.marker "circle", "square", "triangle", "diamond", "cross" or "plus"
-- @param[opt] options.band { lo, hi }: two arrays (N), the edges of a shaded band
-- @param[opt] options.sd array (N): instead of band, a band y - sd .. y + sd
-- @return the axes
-- @raise where lengths differ, or an option is unknown or of another type
function Axes:line(x, y, options)
  local who = "Axes:line"
  local o = begin(self, who, options, { label = inputs.text, color = "any", width = { inputs.points, 1.6 },
    dash = inputs.dash, band = "table", sd = "any", marker = "text" })
  x, y = check_points(who, x, y)
  local band
  if o.sd then
    local sd = inputs.array_like(who, "sd", o.sd, "y", y)
    band = { offset(who, "y - sd", y, sd, -1), offset(who, "y + sd", y, sd, 1) }
  elseif o.band then
    band = {}
    for i = 1, 2 do band[i] = inputs.array_like(who, ("band[%d]"):format(i), o.band[i], "y", y) end
  end
  local layer = new_series(self, who, o)
  layer.x, layer.y, layer.band, layer.width = { x }, { y, band and band[1], band and band[2] }, band, o.width
  return add_layer(self, "line", layer)
end

--- Draws the mean of several runs, say of seeds, in a band of their standard deviation (n - 1) on both sides.
-- @param[opt] x array (N); 1..N where it is nil
-- @param runs array of arrays (N) or tensor (R,N); a value that is not finite leaves its run out at that place
-- @param[opt] options table
-- @param[opt] options.label string, for the legend
-- @param[opt] options.color "#rrggbb", { r, g, b } or a number; else the next series colour
-- @param[opt=1.6] options.width of the line, in points
-- @param[opt] options.dash array of lengths in line widths, {} for a solid line
-- @param[opt] options.marker "circle", "square", "triangle", "diamond", "cross" or "plus"
-- @return the axes
-- @raise where lengths differ, or an option is unknown or of another type
function Axes:runs(x, runs, options)
  local who = "Axes:runs"
  runs = inputs.matrix(who, "runs", runs)
  local mean, sd = {}, {}
  for i = 1, #runs[1] do
    local n, sum, squares = 0, 0, 0
    for _, run in ipairs(runs) do
      if scales.finite(run[i]) then n, sum = n + 1, sum + run[i] end
    end
    mean[i] = n > 0 and sum / n or nan
    for _, run in ipairs(runs) do
      if scales.finite(run[i]) then squares = squares + (run[i] - mean[i]) ^ 2 end
    end
    sd[i] = n > 1 and math.sqrt(squares / (n - 1)) or 0
  end
  local o = begin(self, who, options, { label = inputs.text, color = "any", width = inputs.points, dash = inputs.dash,
    marker = "text" })
  o.sd = #runs > 1 and sd or nil
  return self:line(x, mean, o)
end

-- Adds the values of a layer's marks and their colour scale, where the options give values.
local function check_values(ax, who, layer, o, like)
  if not o.values then return end
  layer.values = inputs.array_like(who, "values", o.values, "the points", like)
  layer.scale = axes.set_color_scale(ax, who, o, { layer.values })
end

--- Draws points.
-- @param[opt] x array (N); 1..N where it is nil
-- @param y array (N)
-- @param[opt] options table
-- @param[opt] options.label string, for the legend
-- @param[opt] options.color "#rrggbb", { r, g, b } or a number; else the next series colour
-- @param[opt] options.marker "circle", "square", "triangle", "diamond", "cross" or "plus"
-- @param[opt=5] options.size diameter in points
-- @param[opt=0.8] options.alpha opacity, 0..1
-- @param[opt] options.values array (N), shown as colours with a colour bar
-- @param[opt="viridis"] options.palette "viridis", "magma", "bluered" or "gray"
-- @param[opt] options.range { lo, hi }: the values at the ends of the palette; else the least and greatest
-- @param[opt=false] options.log true colours by the logarithm of the values
-- @param[opt=false] options.density true: instead of values, the more points lie around a point on the page, the
-- lighter it is
-- @return the axes
-- @raise where lengths differ, both values and density are given, the colour bar has another scale already, or an
-- option is unknown or of another type
function Axes:scatter(x, y, options)
  local who = "Axes:scatter"
  local o = begin(self, who, options, with_colors { label = inputs.text, color = "any", marker = "text",
    size = { inputs.points, 5 }, alpha = { inputs.opacity, 0.8 }, values = "any", density = "boolean" })
  x, y = check_points(who, x, y)
  if o.values and o.density then fail("%s: either values or density colour the points", who) end
  local layer = new_series(self, who, o)
  layer.density = o.density and colors.check_palette(who, o.palette)
  check_values(self, who, layer, o, x)
  layer.x, layer.y, layer.marks, layer.size, layer.alpha = { x }, { y }, #x, o.size, o.alpha
  layer.marker = layer.marker or marks.names[layer.round % #marks.names + 1]
  return add_layer(self, "scatter", layer)
end

--- Draws arrows from the points (x, y) along (dx, dy), in the units of the axes. An arrow that is not finite is left
-- out.
-- @param x array (N)
-- @param y array (N)
-- @param dx array (N)
-- @param dy array (N)
-- @param[opt] options table
-- @param[opt] options.label string, for the legend
-- @param[opt] options.color "#rrggbb", { r, g, b } or a number; else the next series colour
-- @param[opt=1] options.scale factor of dx and dy
-- @param[opt=1] options.width of the shaft, in points
-- @param[opt=5] options.head length of the head in points, less for short arrows
-- @param[opt=1] options.alpha opacity, 0..1
-- @param[opt] options.values array (N), shown as colours with a colour bar
-- @param[opt="viridis"] options.palette "viridis", "magma", "bluered" or "gray"
-- @param[opt] options.range { lo, hi }: the values at the ends of the palette; else the least and greatest
-- @param[opt=false] options.log true colours by the logarithm of the values
-- @return the axes
-- @raise where lengths differ, the colour bar has another scale already, or an option is unknown or of another type
function Axes:arrows(x, y, dx, dy, options)
  local who = "Axes:arrows"
  local o = begin(self, who, options, with_colors { label = inputs.text, color = "any", scale = { "positive", 1 },
    width = { inputs.points, 1 }, head = { inputs.points, 5 }, alpha = inputs.opacity, values = "any" })
  x, y = check_points(who, x, y)
  dx, dy = inputs.array_like(who, "dx", dx, "x", x), inputs.array_like(who, "dy", dy, "y", y)
  local layer = new_series(self, who, o)
  check_values(self, who, layer, o, x)
  layer.x = { x, offset(who, "x + scale dx", x, dx, o.scale) }
  layer.y = { y, offset(who, "y + scale dy", y, dy, o.scale) }
  layer.marks = #x
  layer.width, layer.head, layer.alpha = o.width, o.head, o.alpha
  return add_layer(self, "arrows", layer)
end

--- Writes a text beside a point, for instance a curve's name at its end.
-- @param x number
-- @param y number
-- @param text string
-- @param[opt] options table
-- @param[opt] options.color "#rrggbb", { r, g, b } or a number; else that of the labels
-- @param[opt] options.size in points; else 0.9 times the figure's font
-- @param[opt="right"] options.at side of the point: "right", "left", "above", "below", "above left", "above right",
-- "below left", "below right"
-- @return the axes
-- @raise where x or y is no number, text is no string, or an option is unknown or of another type
function Axes:text(x, y, text, options)
  local who = "Axes:text"
  local o = begin(self, who, options, { color = "any", size = { inputs.letters, self.figure.font * 0.9 },
    at = { "text", "right" } })
  text = inputs.text(who, "text", text)
  x, y = inputs.array(who, "x", { x }), inputs.array(who, "y", { y })
  if #x ~= 1 or #y ~= 1 then fail("%s: x and y are numbers", who) end
  return add_layer(self, "text", { x = { x }, y = { y }, text = text, color = o.color and colors.check(who, o.color),
    size = o.size, at = marks.check_text_place(who, o.at) })
end

--- Draws a histogram.
-- @param values array; NaN and infinite ones are left out
-- @param[opt] options table
-- @param[opt] options.label string, for the legend
-- @param[opt] options.color "#rrggbb", { r, g, b } or a number; else the next series colour
-- @param[opt=0.75] options.alpha opacity, 0..1
-- @param[opt] options.bins number of bins; else sqrt N within 10 to 60
-- @param[opt] options.range { lo, hi }: the outer edges; else the least and greatest value
-- @return the axes
-- @raise where values are no numbers, or an option is unknown or of another type
function Axes:hist(values, options)
  local who = "Axes:hist"
  local o = begin(self, who, options, { label = inputs.text, color = "any", alpha = { inputs.opacity, 0.75 },
    bins = inputs.integer(1, 100000), range = "table" })
  values = inputs.array(who, "values", values)
  local bins = o.bins or min(max(ceil(math.sqrt(#values)), 10), 60)
  local lo, hi = check_range(who, o.range, { values })
  local left, right, counts = {}, {}, {}
  for i = 1, bins do
    left[i], right[i], counts[i] = lo + (hi - lo) * (i - 1) / bins, lo + (hi - lo) * i / bins, 0
  end
  for _, v in ipairs(values) do
    if v >= lo and v <= hi then
      local i = min(floor((v - lo) / (hi - lo) * bins) + 1, bins)
      counts[i] = counts[i] + 1
    end
  end
  local layer = new_series(self, who, o)
  layer.x, layer.y, layer.alpha = { left, right }, { counts }, o.alpha
  return add_layer(self, "bars", layer)
end

-- Places the bars of several calls side by side in their group, which is 0.8 wide.
local function place_bars(ax)
  for k, layer in ipairs(ax.bar_layers) do
    local width = 0.8 / #ax.bar_layers
    layer.x = { {}, {} }
    for i = 1, #layer.y[1] do
      layer.x[1][i] = i - 0.4 + (k - 1) * width
      layer.x[2][i] = i - 0.4 + k * width
    end
  end
end

--- Draws bars, one for each label. A second call with as many labels puts its bars beside the first ones.
-- @param labels array of N strings
-- @param values array (N)
-- @param[opt] options table
-- @param[opt] options.label string, for the legend
-- @param[opt] options.color "#rrggbb", { r, g, b } or a number; else the next series colour
-- @param[opt] options.colors array of N colours
-- @param[opt=1] options.alpha opacity, 0..1
-- @param[opt] options.errors array (N): half lengths of error bars
-- @return the axes
-- @raise where lengths differ, or an option is unknown or of another type
function Axes:bar(labels, values, options)
  local who = "Axes:bar"
  local o = begin(self, who, options, { label = inputs.text, color = "any", colors = "table", alpha = inputs.opacity,
    errors = "any" })
  labels = inputs.labels(who, "labels", labels)
  values = inputs.array(who, "values", values)
  inputs.lengths(who, "labels", labels, "values", values)
  if self.xlabels then inputs.lengths(who, "the first bar's labels", self.xlabels, "values", values) end
  local errors = o.errors and inputs.array_like(who, "errors", o.errors, "values", values)
  local shades = o.colors and {}
  for i, color in ipairs(o.colors or {}) do shades[i] = colors.check(who, color) end
  if shades then inputs.lengths(who, "colors", shades, "values", values) end
  local layer = new_series(self, who, o)
  layer.colors = shades
  layer.y = { values, errors and offset(who, "values - errors", values, errors, -1),
    errors and offset(who, "values + errors", values, errors, 1) }
  layer.alpha = o.alpha
  self.xlabels = self.xlabels or labels
  self.bar_layers[#self.bar_layers + 1] = layer
  place_bars(self)
  return add_layer(self, "bars", layer)
end

--- Draws a matrix as colours, with a colour bar. Row 1 is at the top. NaN cells stay white.
-- @param rows array of arrays of one length, or tensor (R,C)
-- @param[opt] options table
-- @param[opt="viridis"] options.palette "viridis", "magma", "bluered" or "gray"
-- @param[opt] options.range { lo, hi }: the values at the ends of the palette; else the least and greatest
-- @param[opt=false] options.log true colours by the logarithm of the values
-- @param[opt] options.row_labels array of R strings
-- @param[opt] options.col_labels array of C strings
-- @param[opt] options.extent { x0, x1, y0, y1 }: where the matrix lies on the axes, row 1 at y0 and y upwards
-- @return the axes
-- @raise where lengths differ, the colour bar has another scale already, or an option is unknown or of another type
function Axes:heatmap(rows, options)
  local who = "Axes:heatmap"
  local o = begin(self, who, options, with_colors { row_labels = "table", col_labels = "table", extent = "table" })
  rows = inputs.matrix(who, "rows", rows)
  local row_labels = o.row_labels and inputs.labels(who, "row_labels", o.row_labels)
  local col_labels = o.col_labels and inputs.labels(who, "col_labels", o.col_labels)
  if row_labels then inputs.lengths(who, "row_labels", row_labels, "rows", rows) end
  if col_labels then inputs.lengths(who, "col_labels", col_labels, "rows[1]", rows[1]) end
  local e = inputs.array(who, "extent", o.extent or { 0.5, #rows[1] + 0.5, 0.5, #rows + 0.5 })
  if #e ~= 4 then fail("%s: extent is {x0, x1, y0, y1}, got %d values", who, #e) end
  if abs(e[2] - e[1]) <= scales.LEAST or abs(e[4] - e[3]) <= scales.LEAST then
    fail("%s: extent {%g, %g, %g, %g} has no area", who, unpack(e))
  end
  local scale = axes.set_color_scale(self, who, o, rows)
  self.reversed, self.xlabels, self.ylabels = not o.extent, col_labels, row_labels
  return add_layer(self, "heatmap", { rows = rows, scale = scale, extent = e, tight = true,
    x = { { e[1], e[2] } }, y = { { e[3], e[4] } }, marks = #rows * #rows[1] })
end

--- Shows one picture instead of data: as large as fits, with its aspect, without a frame. title and xlabel still show.
-- @param img { width =, height =, rgb = string }, or tensor (H,W,3): u8, or f32 in 0..1
-- @return the axes
-- @raise where img is no such picture, or the axes hold data already
function Axes:image(img)
  if #self.layers > 0 then fail "Axes:image: these axes hold data already" end
  self.picture = inputs.image("Axes:image", img)
  return self
end

--- Sets texts and scales. It may be called again; what is not named stays.
-- @param options table
-- @param[opt] options.title string
-- @param[opt] options.xlabel string
-- @param[opt] options.ylabel string
-- @param[opt] options.color_label string, beside the colour bar
-- @param[opt=false] options.xlog true for a logarithmic axis
-- @param[opt=false] options.ylog true for a logarithmic axis
-- @param[opt] options.xlim { lo, hi }; either may be nil, hi < lo turns the axis round
-- @param[opt] options.ylim { lo, hi }; either may be nil, hi < lo turns the axis round
-- @param[opt="auto"] options.legend "auto": the emptiest corner, or right of the plot where it is large or has over
-- six entries; or "right", "none", "upper right", "upper left", "lower right", "lower left"
-- @param[opt] options.grid boolean: lines at the ticks; true without a colour bar
-- @param[opt=true] options.color_bar boolean, where values have colours
-- @return the axes
-- @raise where an option is unknown or of another type, limits are equal, or not positive on a logarithmic axis
function Axes:set(options)
  local who = "Axes:set"
  local o = check.options(who, options, { title = inputs.text, xlabel = inputs.text, ylabel = inputs.text,
    color_label = inputs.text, xlog = "boolean", ylog = "boolean", xlim = "table", ylim = "table", legend = "text",
    grid = "boolean", color_bar = "boolean" })
  if o.legend then legend.check_place(who, o.legend) end
  setmetatable(o, { __index = self.options })     -- limits and log must agree, whichever of them was set before
  for _, name in ipairs { "x", "y" } do
    check_ends(who, name .. "lim", o[name .. "lim"] or {}, o[name .. "log"])
  end
  for key, value in pairs(o) do self.options[key] = value end
  return self
end

arguments.guard_class("axes", Axes)

return axes
