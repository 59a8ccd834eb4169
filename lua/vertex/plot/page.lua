--- Draws a figure of axes: grid lines, data, frame, ticks, texts, colour bar and legend, each where the layout puts it.

local layout = require "vertex.plot.layout"
local legend = require "vertex.plot.legend"
local scales = require "vertex.plot.scales"
local colors = require "vertex.plot.colors"
local marks = require "vertex.plot.marks"

local page = {}

local function draw_grid(canvas, view, xticks, yticks)
  canvas:color(colors.grid)
  canvas:pen(0.7)
  for _, tick in ipairs(xticks) do canvas:segment(view.x(tick.value), view.top, view.x(tick.value), view.top + view.height) end
  for _, tick in ipairs(yticks) do canvas:segment(view.left, view.y(tick.value), view.left + view.width, view.y(tick.value)) end
  canvas:stroke()
end

-- The lines left and below, and the marks on them.
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

-- The numbers or labels at the ticks, the names of the axes and the title.
local function draw_texts(canvas, cell, view, xticks, yticks, turned)
  local o, font, size = cell.ax.options, cell.ax.figure.font, cell.ax.figure.font * 0.9
  local bottom, middle = view.top + view.height, view.left + view.width / 2
  local x_style = {align = turned and 1 or 0.5, angle = turned and layout.LABEL_ANGLE}
  for _, tick in ipairs(xticks) do canvas:text(tick.label, view.x(tick.value), bottom + 6 + size * 0.45, size, x_style) end
  for _, tick in ipairs(yticks) do canvas:text(tick.label, view.left - 6, view.y(tick.value), size, {align = 1}) end
  if o.xlabel then canvas:text(o.xlabel, middle, bottom + cell.margins.xlabel_at, font, {align = 0.5, fit = view.width}) end
  if o.ylabel then
    canvas:text(o.ylabel, cell.x + font * 0.8, view.top + view.height / 2, font, {align = 0.5, angle = -math.pi / 2, fit = view.height})
  end
  if o.title then
    canvas:text(o.title, middle, cell.y + font * 0.95, font * 1.1, {align = 0.5, bold = true, fit = cell.w - cell.margins.left})
  end
end

local function draw_color_bar(canvas, ax, view, size)
  local scale, x, n = ax.color_scale, view.left + view.width + 10, 128
  canvas:save()
  canvas:sharp_edges()
  for i = 0, n - 1 do
    canvas:color {colors.map(scale.palette, i / (n - 1))}
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
end

local function draw_legend(canvas, cell, view, size)
  local ax, m = cell.ax, cell.margins
  local box = legend.measure(ax, canvas, size, cell.h * 0.8)
  if not box then return end
  if m.legend_at then return legend.draw(canvas, box, cell.x + cell.w - m.right + m.legend_at, view.top) end
  legend.draw(canvas, box, legend.inside_point(ax, box, view))
end

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
  if ax.color_scale then draw_color_bar(canvas, ax, view, size) end
  draw_legend(canvas, cell, view, size)
end

local function draw_picture(canvas, cell)
  local o, size, middle = cell.ax.options, cell.ax.figure.font, cell.x + cell.w / 2
  local top, bottom = o.title and size * 2.1 or 4, o.xlabel and size * 2 or 4
  canvas:image(cell.ax.picture, cell.x + 4, cell.y + top, cell.w - 8, cell.h - top - bottom)
  if o.title then canvas:text(o.title, middle, cell.y + size * 0.95, size * 1.1, {align = 0.5, bold = true, fit = cell.w - 8}) end
  if o.xlabel then canvas:text(o.xlabel, middle, cell.y + cell.h - size, size, {align = 0.5, fit = cell.w - 8}) end
end

--- Draw a figure of axes on the canvas.
function page.draw(fig, canvas)
  if fig.title then
    local style = {align = 0.5, bold = true, fit = fig.width - 2 * layout.PAD}
    canvas:text(fig.title, fig.width / 2, layout.PAD + fig.font * 0.9, fig.font * 1.35, style)
  end
  for _, cell in ipairs(layout.cells(fig, canvas)) do
    if cell.ax.picture then draw_picture(canvas, cell) else draw_axes(canvas, cell) end
  end
end

return page
