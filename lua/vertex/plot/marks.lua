--- plot/marks.lua: how lines, points, arrows, bars and heat maps look on a canvas. Each kind of layer has
--
--   draw(canvas, layer, view)     draws the data; view.x and view.y map data to the page, and give NaN where there is
--                                 no place (a gap, or a number that is not positive on a log axis)
--   swatch(canvas, layer, x, y)   draws its sample in a legend, where a legend can name it
--   ink(layer, view, add)         calls add(x, y) for places of the page that a legend should not hide
--
-- plot/axes.lua records layers; layer.x and layer.y are the arrays that the axes must cover.

local scales = require "vertex.plot.scales"
local colors = require "vertex.plot.colors"
local check = require "vertex.check"
local density = require "vertex.plot.density"
local floor, ceil, abs, min, max, nan = math.floor, math.ceil, math.abs, math.min, math.max, 0 / 0
local finite = scales.finite

-- In SVG and PDF a layer with more marks than this becomes a picture: 20,000 dots would be 5 MB of paths.
local MAX_VECTOR_MARKS = 2000

local marks = {}

--- Width of a swatch in points.
marks.SWATCH = 24
local SWATCH = marks.SWATCH

-- -- Markers ----------------------------------------------------------------------------------------------------------

--- The markers, in the order in which series take them.
marks.names = { "circle", "square", "triangle", "diamond", "cross", "plus" }

-- Makes the function that draws a filled shape; corners x, y, x, y, ... are those for a radius of 1.
local function polygon(corners)
  return function(canvas, x, y, r)
    for i = 1, #corners, 2 do canvas:line_to(x + r * corners[i], y + r * corners[i + 1]) end
    canvas:fill()
  end
end

local shapes = {
  circle = function(canvas, x, y, r) canvas:disc(x, y, r) end,
  square = function(canvas, x, y, r) canvas:box(x - 0.9 * r, y - 0.9 * r, 1.8 * r, 1.8 * r) end,
  triangle = polygon { 0, -1.15, 1.035, 0.805, -1.035, 0.805 },
  diamond = polygon { 0, -1.25, 1, 0, 0, 1.25, -1, 0 },
  cross = polygon { -1, -0.6, -0.6, -1, 0, -0.4, 0.6, -1, 1, -0.6, 0.4, 0, 1, 0.6, 0.6, 1, 0, 0.4, -0.6, 1, -1, 0.6,
    -0.4, 0 },
  plus = polygon { -0.3, -1, 0.3, -1, 0.3, -0.3, 1, -0.3, 1, 0.3, 0.3, 0.3, 0.3, 1, -0.3, 1, -0.3, 0.3, -1, 0.3, -1,
    -0.3, -0.3, -0.3 },
}

--- Gives the name of a marker, checked.
function marks.check_marker(who, name) return check.name(who, "marker", name, shapes) end

-- Draws a marker of `size` points.
local function draw_marker(canvas, name, x, y, size) shapes[name](canvas, x, y, size / 2) end

-- -- Lines ------------------------------------------------------------------------------------------------------------

-- Gives the stretches of a curve without a gap, on the page: array of { x = {}, y = {}, z = {} }; z belongs to `lower`,
-- where given.
local function runs(view, xs, ys, lower)
  local out, run = {}, nil
  for i = 1, #xs do
    local x, y, z = view.x(xs[i]), view.y(ys[i]), lower and view.y(lower[i]) or 0
    if finite(x + y + z) then
      if not run then
        run = { x = {}, y = {}, z = {} }
        out[#out + 1] = run
      end
      local n = #run.x + 1
      run.x[n], run.y[n], run.z[n] = x, y, z
    else
      run = nil
    end
  end
  return out
end

-- Gives a run with at most four points (first, lowest, highest, last) per half point of width. It looks the same, and
-- cairo would take 12 seconds for a stroke of 200,000 points.
local function thin(run)
  local xs, ys, out, i = run.x, run.y, { x = {}, y = {} }, 1
  while i <= #xs do
    local bucket, last, low, high = floor(xs[i] * 2), i, i, i
    while last < #xs and floor(xs[last + 1] * 2) == bucket do
      last = last + 1
      if ys[last] < ys[low] then low = last end
      if ys[last] > ys[high] then high = last end
    end
    local previous
    for _, k in ipairs { i, min(low, high), max(low, high), last } do
      if k ~= previous then out.x[#out.x + 1], out.y[#out.y + 1] = xs[k], ys[k] end
      previous = k
    end
    i = last + 1
  end
  return out
end

-- Fills the band of a line.
local function draw_band(canvas, layer, view)
  canvas:color(layer.color, 0.18)
  for _, run in ipairs(runs(view, layer.x[1], layer.band[2], layer.band[1])) do
    for i = 1, #run.x do canvas:line_to(run.x[i], run.y[i]) end
    for i = #run.x, 1, -1 do canvas:line_to(run.x[i], run.z[i]) end
    canvas:fill()
  end
end

local line = {}

function line.draw(canvas, layer, view)
  if layer.band then draw_band(canvas, layer, view) end
  canvas:color(layer.color)
  canvas:pen(layer.width, layer.dash)
  canvas:round_joins()
  for _, run in ipairs(runs(view, layer.x[1], layer.y[1])) do
    if not layer.marker then run = thin(run) end
    for i = 1, #run.x do canvas:line_to(run.x[i], run.y[i]) end
    canvas:stroke()
    local marker = layer.marker or #run.x == 1 and "circle"     -- a lone point has no line to show it
    for i = 1, marker and #run.x or 0 do
      draw_marker(canvas, marker, run.x[i], run.y[i], layer.width + (layer.marker and 4 or 1))
    end
  end
end

function line.swatch(canvas, layer, x, y)
  canvas:pen(layer.width, layer.dash)
  canvas:segment(x, y, x + SWATCH, y)
  canvas:stroke()
  if layer.marker then draw_marker(canvas, layer.marker, x + SWATCH / 2, y, layer.width + 4) end
end

-- Adds the curve and the edges of its band.
function line.ink(layer, view, add)
  for _, edge in ipairs(layer.band or {}) do
    for i, x in ipairs(layer.x[1]) do add(view.x(x), view.y(edge[i])) end
  end
  for _, run in ipairs(runs(view, layer.x[1], layer.y[1])) do
    for i = 1, #run.x do
      local dx, dy = run.x[i] - (run.x[i - 1] or run.x[i]), run.y[i] - (run.y[i - 1] or run.y[i])
      local steps = min(ceil(max(abs(dx), abs(dy)) / 5), 200)
      for k = 0, max(steps - 1, 0) do add(run.x[i] - dx * k / max(steps, 1), run.y[i] - dy * k / max(steps, 1)) end
    end
  end
end

-- -- Points -----------------------------------------------------------------------------------------------------------

local scatter = {}

-- The standard deviation of the density that colours points, in points of the page.
local DENSITY_SD = 8

-- Gives how densely the points lie around each of them, a number 0..1, and their order from thin to dense.
local function by_density(xs, ys, view)
  local at = density.estimate(xs, ys, { view.left, view.left + view.width, view.top, view.top + view.height },
    DENSITY_SD)
  local shades, order, most = {}, {}, 0
  for i = 1, #xs do
    shades[i] = finite(xs[i] + ys[i]) and at(xs[i], ys[i]) or 0
    order[i], most = i, max(most, shades[i])
  end
  for i = 1, #xs do shades[i] = shades[i] / max(most, 1e-300) end
  table.sort(order, function(a, b) return shades[a] < shades[b] or shades[a] == shades[b] and a < b end)
  return shades, order
end

-- Gives the function from a layer's values to colours; nil for a value that has none. Infinite values take the map's
-- ends.
local function value_colors(layer)
  local place = scales.mapper(layer.scale, 0, 1)
  return function(v)
    local at = (v == math.huge or v == -math.huge) and v or place(v)
    return at == at and { colors.map(layer.scale.palette, at) } or nil
  end
end

-- Gives the function that sets the colour of mark i on the canvas; false for a mark whose value has none.
local function mark_colors(canvas, layer)
  canvas:color(layer.color, layer.alpha)
  if not layer.values then return function() return true end end
  local color_of = value_colors(layer)
  return function(i)
    local color = color_of(layer.values[i])
    if color then canvas:color(color, layer.alpha) end
    return color ~= nil
  end
end

function scatter.draw(canvas, layer, view)
  local set_color, xs, ys, shades, order = mark_colors(canvas, layer), {}, {}, nil, nil
  for i = 1, #layer.x[1] do xs[i], ys[i] = view.x(layer.x[1][i]), view.y(layer.y[1][i]) end
  if layer.density then shades, order = by_density(xs, ys, view) end
  for k = 1, #xs do
    local i = order and order[k] or k
    if finite(xs[i] + ys[i]) and set_color(i) then
      if shades then canvas:color({ colors.map(layer.density, shades[i]) }, layer.alpha) end
      draw_marker(canvas, layer.marker, xs[i], ys[i], layer.size)
    end
  end
end

function scatter.swatch(canvas, layer, x, y)
  draw_marker(canvas, layer.marker, x + SWATCH / 2, y, max(layer.size, 5))
end

function scatter.ink(layer, view, add)
  for i = 1, #layer.x[1] do add(view.x(layer.x[1][i]), view.y(layer.y[1][i])) end
end

-- -- Arrows -----------------------------------------------------------------------------------------------------------

-- Half the width of a head, to its length; arrows shorter than this many points are dots.
local HEAD_SLOPE, SHORTEST = 0.4, 0.3

-- Draws an arrow on the page.
local function draw_arrow(canvas, layer, x0, y0, x1, y1)
  local length = math.sqrt((x1 - x0) ^ 2 + (y1 - y0) ^ 2)
  if length < SHORTEST then return canvas:disc(x0, y0, layer.width * 0.6) end
  local ux, uy, head = (x1 - x0) / length, (y1 - y0) / length, min(layer.head, length * 0.7)
  local bx, by, half = x1 - ux * head, y1 - uy * head, head * HEAD_SLOPE
  canvas:segment(x0, y0, bx + ux * 0.2 * head, by + uy * 0.2 * head)
  canvas:stroke()
  canvas:line_to(x1, y1)
  canvas:line_to(bx - uy * half, by + ux * half)
  canvas:line_to(bx + uy * half, by - ux * half)
  canvas:fill()
end

local arrows = {}

function arrows.draw(canvas, layer, view)
  local set_color = mark_colors(canvas, layer)
  canvas:pen(layer.width)
  for i = 1, #layer.x[1] do
    local x0, y0, x1, y1 = view.x(layer.x[1][i]), view.y(layer.y[1][i]), view.x(layer.x[2][i]), view.y(layer.y[2][i])
    if finite(x0 + y0 + x1 + y1) and set_color(i) then draw_arrow(canvas, layer, x0, y0, x1, y1) end
  end
end

function arrows.swatch(canvas, layer, x, y)
  canvas:pen(layer.width)
  draw_arrow(canvas, layer, x + 3, y, x + SWATCH - 3, y)
end

function arrows.ink(layer, view, add)
  for k = 1, 2 do
    for i = 1, #layer.x[1] do add(view.x(layer.x[k][i]), view.y(layer.y[k][i])) end
  end
end

-- -- Bars -------------------------------------------------------------------------------------------------------------

-- Gives the box of bar i on the page; NaN for a gap. On a log axis, which has no zero, bars stand on the frame.
local function bar_box(layer, view, i)
  local x0, x1, y, zero = view.x(layer.x[1][i]), view.x(layer.x[2][i]), view.y(layer.y[1][i]), view.y(0)
  if not finite(zero) then zero = view.top + view.height end
  return x0, min(y, zero), x1 - x0, max(y, zero) - min(y, zero)
end

-- Draws the error bar of bar i, whose box begins at x and is w wide.
local function draw_error(canvas, layer, view, i, x, w)
  local lo, hi = layer.y[2] and view.y(layer.y[2][i]) or nan, layer.y[3] and view.y(layer.y[3][i]) or nan
  if not finite(hi) then return end
  if not finite(lo) then lo = view.top + view.height end
  local middle, cap = x + w / 2, min(w * 0.2, 4)
  canvas:color(colors.ink)
  canvas:pen(1)
  canvas:segment(middle, lo, middle, hi)
  canvas:segment(middle - cap, hi, middle + cap, hi)
  canvas:segment(middle - cap, lo, middle + cap, lo)
  canvas:stroke()
end

local bars = {}

function bars.draw(canvas, layer, view)
  for i, value in ipairs(layer.y[1]) do
    local x, y, w, h = bar_box(layer, view, i)
    if finite(x + y + w + h) and finite(value) then
      canvas:color(layer.colors and layer.colors[i] or layer.color, layer.alpha)
      canvas:box(x, y, w, h)
      draw_error(canvas, layer, view, i, x, w)
    end
  end
end

function bars.swatch(canvas, _, x, y) canvas:box(x + 3, y - 4, SWATCH - 6, 8) end

function bars.ink(layer, view, add)
  for i = 1, #layer.y[1] do
    local x, y, w, h = bar_box(layer, view, i)
    for k = 0, finite(h) and ceil(h / 5) or -1 do add(x + w / 2, y + min(5 * k, h)) end
  end
end

-- -- Heat maps: no swatch, and no ink, for a legend hides part of them wherever it stands -----------------------------

local heatmap = {}

function heatmap.draw(canvas, layer, view)
  local e, color_of = layer.extent, value_colors(layer)
  canvas:sharp_edges()      -- else neighbours leave hairlines between them
  for r, row in ipairs(layer.rows) do
    local y0 = view.y(e[3] + (e[4] - e[3]) * (r - 1) / #layer.rows)
    local y1 = view.y(e[3] + (e[4] - e[3]) * r / #layer.rows)
    for c, v in ipairs(row) do
      local x0 = view.x(e[1] + (e[2] - e[1]) * (c - 1) / #row)
      local x1 = view.x(e[1] + (e[2] - e[1]) * c / #row)
      local color = finite(v) and color_of(v)
      if color and finite(x0 + x1 + y0 + y1) then
        canvas:color(color)
        canvas:box(x0, y0, x1 - x0, y1 - y0)
      end
    end
  end
end

-- The density over the simplex, a triangle in parts: layer.each visits them in the order of layer.values.
local triangles = {}

function triangles.draw(canvas, layer, view)
  canvas:sharp_edges()
  local k, color_of = 0, value_colors(layer)
  layer.each(function(x1, y1, x2, y2, x3, y3)
    k = k + 1
    local color = color_of(layer.values[k])
    if not color then return end
    canvas:color(color)
    canvas:line_to(view.x(x1), view.y(y1))
    canvas:line_to(view.x(x2), view.y(y2))
    canvas:line_to(view.x(x3), view.y(y3))
    canvas:fill()
  end)
end

-- -- Texts: no swatch -------------------------------------------------------------------------------------------------

-- Alignment, and how far from its point, for each side that a text can stand on.
local text_places = { right = { 0, 7, 0 }, left = { 1, -7, 0 }, above = { 0.5, 0, -11 }, below = { 0.5, 0, 11 },
  ["above left"] = { 1, -2, -11 }, ["below left"] = { 1, -2, 11 },
  ["above right"] = { 0, 2, -11 }, ["below right"] = { 0, 2, 11 } }

--- Gives the name of a text's side, checked.
function marks.check_text_place(who, name) return check.name(who, "place of a text", name, text_places) end

local text = {}

-- Gives the text's left end and its middle on the page; NaN where its point has no place.
local function text_start(layer, view, width)
  local place = text_places[layer.at]
  return view.x(layer.x[1][1]) + place[2] - width * place[1], view.y(layer.y[1][1]) + place[3]
end

function text.draw(canvas, layer, view)
  local x, y = text_start(layer, view, canvas:text_width(layer.text, layer.size))
  if finite(x + y) then canvas:text(layer.text, x, y, layer.size, { color = layer.color }) end
end

function text.ink(layer, view, add)
  -- there is no canvas to measure on; DejaVu Sans is about so wide
  local width = #layer.text * layer.size * 0.55
  local x, y = text_start(layer, view, width)
  for k = 0, ceil(width / 5) do add(x + 5 * k, y) end
end

-- -- Any kind ---------------------------------------------------------------------------------------------------------

local kinds = { line = line, scatter = scatter, arrows = arrows, bars = bars, heatmap = heatmap, triangles = triangles,
  text = text }

--- Draws a layer within the view.
function marks.draw(canvas, layer, view)
  local function draw(on) kinds[layer.kind].draw(on, layer, view) end
  local over = view.over or 1                             -- how far marks may reach beyond the view
  local left, top, width, height = view.left - over, view.top - over, view.width + 2 * over, view.height + 2 * over
  canvas:save()
  canvas:clip(left, top, width, height)
  if canvas.vector and (layer.marks or 0) > MAX_VECTOR_MARKS then
    canvas:raster(left, top, width, height, draw)
  else
    draw(canvas)
  end
  canvas:restore()
end

--- Draws a layer's sample in a legend; (x, y) is the middle of its left end.
function marks.swatch(canvas, layer, x, y)
  canvas:color(layer.density and { colors.map(layer.density, 0.5) } or layer.color, layer.alpha)
  kinds[layer.kind].swatch(canvas, layer, x, y)
end

--- Calls add(x, y) for places of the page that a legend should not hide.
function marks.ink(layer, view, add)
  local ink = kinds[layer.kind].ink
  if ink then ink(layer, view, add) end
end

return marks
