--- plot/layout.lua: which ticks fit an axis, how much room labels, titles, legends and colour bars need, and where the
-- axes of a figure go. It measures on a canvas and draws nothing.

local scales = require "vertex.plot.scales"
local legend = require "vertex.plot.legend"
local floor, ceil, abs, min, max, cos, sin = math.floor, math.ceil, math.abs, math.min, math.max, math.cos, math.sin

local layout = {}

--- The slope of labels that do not fit side by side.
layout.LABEL_ANGLE = -40 * math.pi / 180
local LABEL_ANGLE = layout.LABEL_ANGLE

--- Space around what a figure holds, in points.
layout.PAD = 8
local PAD = layout.PAD

-- -- Ticks ------------------------------------------------------------------------------------------------------------

-- Adds to ticks the width that each label takes.
local function with_widths(canvas, ticks, size)
  for _, tick in ipairs(ticks) do tick.width = canvas:text_width(tick.label, size) end
  return ticks
end

-- Says whether the labels of ticks fit side by side.
local function fit_side_by_side(ticks, map, size)
  for i = 2, #ticks do
    local gap = abs(map(ticks[i].value) - map(ticks[i - 1].value))
    if gap < (ticks[i].width + ticks[i - 1].width) / 2 + size * 0.6 then return false end
  end
  return true
end

--- Gives the ticks { value =, label =, width = } that fit an axis `length` points long, and whether the labels of an x
-- axis must be turned.
function layout.fit_ticks(canvas, scale, length, name, size)
  local map = scales.mapper(scale, 0, length)
  if scale.labels then            -- every n-th only where they would touch even when turned
    local n = max(1, ceil(size * 1.15 / abs(map(2) - map(1))))
    local ticks = with_widths(canvas, scales.label_ticks(scale, n), size)
    return ticks, name == "x" and not fit_side_by_side(ticks, map, size)
  end
  local count = name == "x" and min(10, floor(length / 45)) or min(9, floor(length / (size * 2.6)))
  local ticks
  count = max(count, 4)                               -- fewer may find no round value in the range
  repeat
    ticks = with_widths(canvas, scales.number_ticks(scale, count), size)
    count = count - 1
  until count < 3 or name == "y" or fit_side_by_side(ticks, map, size)
  return ticks, false
end

-- Gives the greatest width of ticks' labels.
local function widest(ticks)
  local w = 0
  for _, tick in ipairs(ticks) do w = max(w, tick.width) end
  return w
end

-- -- Margins ----------------------------------------------------------------------------------------------------------

-- Adds to the margins the room that the colour bar and a legend outside take on the right.
local function add_right(ax, canvas, m, box, w, h)
  local size = ax.figure.font
  m.bar_at = m.right
  if ax.color_scale and ax.options.color_bar ~= false then
    m.right = m.right + 26 + widest(with_widths(canvas, scales.number_ticks(ax.color_scale, 6), size * 0.9))
    m.color_label_at = m.right + size * 0.6
    if ax.options.color_label then m.right = m.right + size * 1.6 end
  end
  if box and legend.outside(ax, box, w - m.left - m.right, h - m.top - m.bottom) then
    m.legend_at = m.right
    m.right = m.right + box.width + 4
  end
end

-- Gives the margins of a simplex: its corners' labels and a triangle's ticks stand around it.
local function simplex_margins(ax, canvas, w, h)
  local size, o, s, side = ax.figure.font, ax.options, ax.simplex, 0
  for _, label in ipairs(s.labels) do side = max(side, canvas:text_width(label, size)) end
  local m = { left = side + size, right = side + size * 1.4, top = (o.title and size * 2.1 or size * 0.5) + size * 1.4,
    bottom = size * 1.9 }
  m.xlabel_at = m.bottom + size * 0.4
  if o.xlabel then m.bottom = m.bottom + size * 1.5 end
  add_right(ax, canvas, m, legend.measure(ax, canvas, size * 0.9, h * 0.8), w, h)
  return m
end

-- Gives the room that labels, titles, legend and colour bar need on each side of a plot area, in a cell of w by h
-- points.
local function margins(ax, canvas, w, h)
  if ax.simplex then return simplex_margins(ax, canvas, w, h) end
  local size, o = ax.figure.font, ax.options
  local m = { left = 50, right = 20, top = 20, bottom = 40 }
  local xscale, yscale = scales.of_axes(ax, "x"), scales.of_axes(ax, "y")
  local box = legend.measure(ax, canvas, size * 0.9, h * 0.8)
  for _ = 1, 2 do                                     -- ticks depend on the space, the space on the ticks
    local width, height = max(w - m.left - m.right, 20), max(h - m.top - m.bottom, 20)
    local xticks, turned = layout.fit_ticks(canvas, xscale, width, "x", size * 0.9)
    local map, over_left, over_right = scales.mapper(xscale, 0, width), 0, 0
    for _, tick in ipairs(xticks) do
      local at = map(tick.value)
      over_left = max(over_left, (turned and cos(LABEL_ANGLE) or 0.5) * tick.width - at)
      over_right = max(over_right, turned and 0 or at + tick.width / 2 - width)
    end
    local drop = turned and widest(xticks) * -sin(LABEL_ANGLE) + size * 0.6 or size * 0.9
    m.xlabel_at = 8 + drop + size * 0.7
    m.bottom = 8 + drop + (o.xlabel and size * 1.5 or 0) + 4
    m.left = 8 + widest(layout.fit_ticks(canvas, yscale, height, "y", size * 0.9)) + (o.ylabel and size * 1.7 or 0) + 6
    m.left = max(m.left, over_left + (o.ylabel and size * 1.7 or 0) + 4)
    m.top = o.title and size * 2.1 or size * 0.8
    m.right = max(over_right, 4) + 8
    add_right(ax, canvas, m, box, w, h)
  end
  return m
end

-- Shares out `length` among `count` columns (or rows) beginning at `from`: margins are what each asks for, the plot
-- areas between them are equal. Returns where each begins and its size, both from column 0.
local function share(from, length, count, margin)
  local room, at, size = length, {}, {}
  for i = 0, count - 1 do room = room - margin(i) end
  for i = 0, count - 1 do
    at[i], size[i] = from, margin(i) + room / count
    from = from + size[i]
  end
  return at, size
end

--- Gives where each of the axes of a figure goes: array of { ax =, x =, y =, w =, h =, margins = }; a picture has no
-- margins. Cells of one column share left and right margins, cells of one row top and bottom ones, and all plot areas
-- have one size: they line up.
function layout.cells(fig, canvas)
  local head = fig.title and fig.font * 2.4 or 0
  local width, height = fig.width - 2 * PAD, fig.height - 2 * PAD - head
  local out, columns, rows = {}, {}, {}
  for c = 0, fig.cols - 1 do columns[c] = { left = 0, right = 0 } end
  for r = 0, fig.rows - 1 do rows[r] = { top = 0, bottom = 0 } end
  for i, ax in pairs(fig.cells) do
    local cell = { ax = ax, row = floor((i - 1) / fig.cols), column = (i - 1) % fig.cols }
    out[#out + 1] = cell
    if not ax.picture then
      local m, column, row = margins(ax, canvas, width / fig.cols, height / fig.rows), columns[cell.column],
        rows[cell.row]
      cell.margins = m
      column.left, column.right = max(column.left, m.left), max(column.right, m.right)
      row.top, row.bottom = max(row.top, m.top), max(row.bottom, m.bottom)
    end
  end
  local x, w = share(PAD, width, fig.cols, function(c) return columns[c].left + columns[c].right end)
  local y, h = share(PAD + head, height, fig.rows, function(r) return rows[r].top + rows[r].bottom end)
  for _, cell in ipairs(out) do
    local m, column, row = cell.margins, columns[cell.column], rows[cell.row]
    cell.x, cell.w, cell.y, cell.h = x[cell.column], w[cell.column], y[cell.row], h[cell.row]
    if m then m.left, m.right, m.top, m.bottom = column.left, column.right, row.top, row.bottom end
  end
  return out
end

-- Gives the view of a simplex: its plane, in the middle of the plot area, with one unit for both directions. Marks at
-- the corners reach over.
local function simplex_view(cell, view)
  local s = cell.ax.simplex
  local x0, x1, y0, y1 = s.x[1], s.x[1], s.y[1], s.y[1]
  for m = 2, s.codes do x0, x1, y0, y1 = min(x0, s.x[m]), max(x1, s.x[m]), min(y0, s.y[m]), max(y1, s.y[m]) end
  local unit = min(view.width / (x1 - x0), view.height / (y1 - y0))
  local left, bottom = view.left + (view.width - unit * (x1 - x0)) / 2, view.top + (view.height + unit * (y1 - y0)) / 2
  view.over = cell.ax.figure.font
  view.x = function(x) return left + (x - x0) * unit end
  view.y = function(y) return bottom - (y - y0) * unit end
  return view
end

--- Gives the view of a cell: its plot area (left, top, width, height, in points), its scales (xscale, yscale) and the
-- maps x and y from data to the page.
function layout.view(cell)
  local m, ax = cell.margins, cell.ax
  local view = { left = cell.x + m.left, top = cell.y + m.top, width = max(cell.w - m.left - m.right, 10),
    height = max(cell.h - m.top - m.bottom, 10) }
  if ax.simplex then return simplex_view(cell, view) end
  view.xscale, view.yscale = scales.of_axes(ax, "x"), scales.of_axes(ax, "y")
  view.x = scales.mapper(view.xscale, view.left, view.left + view.width)
  view.y = scales.mapper(view.yscale, view.top + view.height, view.top)
  return view
end

return layout
