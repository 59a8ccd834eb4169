--- plot/page.lua: draws a figure of axes. Grid lines, data, frame, ticks, texts, colour bar and legend, each where the
-- layout puts it.

local layout = require "vertex.plot.layout"
local legend = require "vertex.plot.legend"
local scales = require "vertex.plot.scales"
local colors = require "vertex.plot.colors"
local marks = require "vertex.plot.marks"

local page = {}

-- Draws the grid lines at the ticks.
local function draw_grid(canvas, view, xticks, yticks)
  canvas:color(colors.grid)
  canvas:pen(0.7)
  for _, tick in ipairs(xticks) do
    canvas:segment(view.x(tick.value), view.top, view.x(tick.value), view.top + view.height)
  end
  for _, tick in ipairs(yticks) do
    canvas:segment(view.left, view.y(tick.value), view.left + view.width, view.y(tick.value))
  end
  canvas:stroke()
end

-- Draws the lines left and below, and the marks on them.
local function draw_frame(canvas, view, xticks, yticks)
  local left, bottom = view.left, view.top + view.height
  canvas:color(colors.gray)
  canvas:pen(0.8)
  canvas:segment(left, view.top, left, bottom)
  canvas:segment(left, bottom, left + view.width, bottom)
  local function mark_x(v, length) canvas:segment(view.x(v), bottom, view.x(v), bottom + length) end
  local function mark_y(v, length) canvas:segment(left - length, view.y(v), left, view.y(v)) end
  for _, tick in ipairs(xticks) do mark_x(tick.value, 3.5) end
  for _, tick in ipairs(yticks) do mark_y(tick.value, 3.5) end
  for _, v in ipairs(scales.minor_ticks(view.xscale)) do mark_x(v, 2) end
  for _, v in ipairs(scales.minor_ticks(view.yscale)) do mark_y(v, 2) end
  canvas:stroke()
end

-- -- The simplex ------------------------------------------------------------------------------------------------------

-- A polygon has at most so many labels at its corners.
local MAX_CORNER_LABELS = 24

-- Calls visit(x, y, end_x, end_y, value) for the ticks of a triangle, on the page: the ends of the line of equal p[m],
-- the first on the side where its number stands, and p[m]. p[2] grows along the lower side, p[3] up the right one, p[1]
-- down the left one.
local function each_tick(s, view, visit)
  for k = 1, 3 do
    -- the side from e_k to e_k+1, and the corner that it faces
    local from, to, apex = k, k % 3 + 1, (k + 1) % 3 + 1
    for i = 1, s.ticks - 1 do
      local t = i / s.ticks
      local x, y = s.x[from] + t * (s.x[to] - s.x[from]), s.y[from] + t * (s.y[to] - s.y[from])
      local end_x, end_y = s.x[apex] + t * (s.x[to] - s.x[apex]), s.y[apex] + t * (s.y[to] - s.y[apex])
      visit(view.x(x), view.y(y), view.x(end_x), view.y(end_y), t)
    end
  end
end

-- Draws the grid lines of a triangle, or the lines from a polygon's centre to its corners.
local function draw_simplex_grid(canvas, s, view)
  canvas:color(colors.grid)
  canvas:pen(0.7)
  if s.codes == 3 then
    each_tick(s, view, function(x, y, ex, ey) canvas:segment(x, y, ex, ey) end)
  else
    for m = 1, s.codes, math.ceil(s.codes / MAX_CORNER_LABELS) do
      canvas:segment(view.x(0), view.y(0), view.x(s.x[m]), view.y(s.y[m]))
    end
  end
  canvas:stroke()
end

-- Draws the sides, a triangle's ticks with their numbers, and the corners' labels, each outward of its place.
local function draw_simplex_frame(canvas, s, view, font)
  local size = font * 0.8
  canvas:color(colors.gray)
  canvas:pen(0.8)
  for m = 1, s.codes do
    local n = m % s.codes + 1
    canvas:segment(view.x(s.x[m]), view.y(s.y[m]), view.x(s.x[n]), view.y(s.y[n]))
  end
  each_tick(s, view, function(x, y, ex, ey)
    local length = math.sqrt((ex - x) ^ 2 + (ey - y) ^ 2)
    canvas:segment(x, y, x - (ex - x) / length * 4, y - (ey - y) / length * 4)
  end)
  canvas:stroke()
  local apart = (view.x(s.x[2]) - view.x(s.x[1])) / s.ticks
  local numbered = apart > canvas:text_width("0.5", size) * 1.2
  each_tick(s, view, function(x, y, ex, ey, t)
    if not numbered then return end
    local length = math.sqrt((ex - x) ^ 2 + (ey - y) ^ 2)
    local ux, uy = (ex - x) / length, (ey - y) / length
    canvas:text(scales.format_number(t), x - ux * 7, y - uy * (7 + size * 0.4), size,
      { align = 0.5 + ux * 0.5, color = colors.gray })
  end)
  for m = 1, s.codes, math.ceil(s.codes / MAX_CORNER_LABELS) do
    local length = math.sqrt(s.x[m] ^ 2 + s.y[m] ^ 2)
    local ux, uy = s.x[m] / length, s.y[m] / length
    canvas:text(s.labels[m], view.x(s.x[m]) + ux * font * 0.6, view.y(s.y[m]) - uy * font * 1.1, font,
      { align = 0.5 - 0.5 * ux })
  end
end

-- -- Texts and the whole ----------------------------------------------------------------------------------------------

-- Writes the numbers or labels at the ticks, the names of the axes and the title.
local function draw_texts(canvas, cell, view, xticks, yticks, turned)
  local o, font, size = cell.ax.options, cell.ax.figure.font, cell.ax.figure.font * 0.9
  local bottom, middle = view.top + view.height, view.left + view.width / 2
  local x_style = { align = turned and 1 or 0.5, angle = turned and layout.LABEL_ANGLE }
  for _, tick in ipairs(xticks) do
    canvas:text(tick.label, view.x(tick.value), bottom + 6 + size * 0.45, size, x_style)
  end
  for _, tick in ipairs(yticks) do canvas:text(tick.label, view.left - 6, view.y(tick.value), size, { align = 1 }) end
  if o.xlabel then
    canvas:text(o.xlabel, middle, bottom + cell.margins.xlabel_at, font, { align = 0.5, fit = view.width })
  end
  if o.ylabel then
    canvas:text(o.ylabel, cell.x + font * 0.8, view.top + view.height / 2, font,
      { align = 0.5, angle = -math.pi / 2, fit = view.height })
  end
  if o.title then
    canvas:text(o.title, middle, cell.y + font * 0.95, font * 1.1,
      { align = 0.5, bold = true, fit = cell.w - cell.margins.left })
  end
end

-- Draws the colour bar with its ticks and its name.
local function draw_color_bar(canvas, cell, view, size)
  local ax, m = cell.ax, cell.margins
  local right = cell.x + cell.w - m.right               -- of the plot area
  local scale, x, n = ax.color_scale, right + m.bar_at, 128
  canvas:save()
  canvas:sharp_edges()
  for i = 0, n - 1 do
    canvas:color { colors.map(scale.palette, i / (n - 1)) }
    canvas:box(x, view.top + view.height * (1 - (i + 1) / n), 12, view.height / n)
  end
  canvas:restore()
  local map = scales.mapper(scale, view.top + view.height, view.top)
  for _, tick in ipairs((layout.fit_ticks(canvas, scale, view.height, "y", size))) do
    canvas:color(colors.gray)
    canvas:pen(0.8)
    canvas:segment(x + 12, map(tick.value), x + 15, map(tick.value))
    canvas:stroke()
    canvas:text(tick.label, x + 18, map(tick.value), size)
  end
  if ax.options.color_label then
    canvas:text(ax.options.color_label, right + m.color_label_at, view.top + view.height / 2, size / 0.9,
      { align = 0.5, angle = -math.pi / 2, fit = view.height })
  end
end

-- Draws the legend, where there is one.
local function draw_legend(canvas, cell, view, size)
  local ax, m = cell.ax, cell.margins
  local box = legend.measure(ax, canvas, size, cell.h * 0.8)
  if not box then return end
  if m.legend_at then return legend.draw(canvas, box, cell.x + cell.w - m.right + m.legend_at, view.top) end
  legend.draw(canvas, box, legend.inside_point(ax, box, view))
end

-- Draws what stands over the data of any axes: colour bar and legend.
local function draw_keys(canvas, cell, view, size)
  if cell.ax.color_scale and cell.ax.options.color_bar ~= false then draw_color_bar(canvas, cell, view, size) end
  draw_legend(canvas, cell, view, size)
end

-- Draws axes on the simplex.
local function draw_simplex(canvas, cell)
  local ax, view, font = cell.ax, layout.view(cell), cell.ax.figure.font
  if ax.options.grid ~= false then draw_simplex_grid(canvas, ax.simplex, view) end
  local function draw_frame_now() draw_simplex_frame(canvas, ax.simplex, view, font) end
  -- a density fills the triangle, so the frame comes after it; points stand on the frame
  local under = true
  for _, layer in ipairs(ax.layers) do
    if under and layer.kind ~= "triangles" then
      draw_frame_now()
      under = false
    end
    marks.draw(canvas, layer, view)
  end
  if under then draw_frame_now() end
  draw_texts(canvas, cell, view, {}, {}, false)
  draw_keys(canvas, cell, view, font * 0.9)
end

-- Draws plain axes.
local function draw_axes(canvas, cell)
  local ax, view, size = cell.ax, layout.view(cell), cell.ax.figure.font * 0.9
  local xticks, turned = layout.fit_ticks(canvas, view.xscale, view.width, "x", size)
  local yticks = layout.fit_ticks(canvas, view.yscale, view.height, "y", size)
  local grid = ax.options.grid
  if grid == nil then grid = not ax.color_scale end
  if grid then draw_grid(canvas, view, ax.xlabels and {} or xticks, yticks) end
  for _, layer in ipairs(ax.layers) do marks.draw(canvas, layer, view) end
  draw_frame(canvas, view, xticks, yticks)
  draw_texts(canvas, cell, view, xticks, yticks, turned)
  draw_keys(canvas, cell, view, size)
end

-- Draws axes that hold a picture.
local function draw_picture(canvas, cell)
  local o, size, middle = cell.ax.options, cell.ax.figure.font, cell.x + cell.w / 2
  local top, bottom = o.title and size * 2.1 or 4, o.xlabel and size * 2 or 4
  canvas:image(cell.ax.picture, cell.x + 4, cell.y + top, cell.w - 8, cell.h - top - bottom)
  if o.title then
    canvas:text(o.title, middle, cell.y + size * 0.95, size * 1.1, { align = 0.5, bold = true, fit = cell.w - 8 })
  end
  if o.xlabel then canvas:text(o.xlabel, middle, cell.y + cell.h - size, size, { align = 0.5, fit = cell.w - 8 }) end
end

--- Draws a figure of axes on the canvas.
function page.draw(fig, canvas)
  if fig.title then
    local style = { align = 0.5, bold = true, fit = fig.width - 2 * layout.PAD }
    canvas:text(fig.title, fig.width / 2, layout.PAD + fig.font * 0.9, fig.font * 1.35, style)
  end
  for _, cell in ipairs(layout.cells(fig, canvas)) do
    local draw = cell.ax.picture and draw_picture or cell.ax.simplex and draw_simplex or draw_axes
    draw(canvas, cell)
  end
end

return page
