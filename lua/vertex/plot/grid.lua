--- plot/grid.lua: the figure of plot.image_grid, pictures in rows and columns with labels, as large as they need to be.

local layout = require "vertex.plot.layout"
local inputs = require "vertex.plot.inputs"
local check = require "vertex.check"
local core = require "vertex.core"
local max, cos, sin = math.max, math.cos, math.sin
local LABEL_ANGLE, PAD = layout.LABEL_ANGLE, layout.PAD

local grid = {}

-- Measures a grid: its size and where the cells begin.
local function measure(fig, canvas)
  local size, left, top, columns = fig.font, 0, 0, 0
  for _, label in ipairs(fig.row_labels) do left = max(left, canvas:text_width(label, size) + 10) end
  for _, row in ipairs(fig.images) do columns = max(columns, #row) end
  local turned, over = false, 0
  for _, label in ipairs(fig.col_labels) do
    turned = turned or canvas:text_width(label, size) > fig.cell_width + fig.gap - 4
  end
  for i, label in ipairs(fig.col_labels) do
    local w = canvas:text_width(label, size)
    top = max(top, turned and -sin(LABEL_ANGLE) * w + size * 1.6 or size * 1.7)
    if turned then over = max(over, cos(LABEL_ANGLE) * w - (columns - i + 0.5) * (fig.cell_width + fig.gap)) end
  end
  fig.turned, fig.left, fig.top = turned, PAD + left, PAD + top + (fig.title and size * 2.2 or 0)
  fig.width = fig.left + columns * (fig.cell_width + fig.gap) - fig.gap + PAD + over
  fig.height = fig.top + #fig.images * (fig.cell_height + fig.gap) - fig.gap + PAD
end

-- Draws title, labels and pictures.
local function draw(fig, canvas)
  local size, w, h = fig.font, fig.cell_width, fig.cell_height
  if fig.title then
    canvas:text(fig.title, fig.width / 2, PAD + size * 0.7, size * 1.25,
      { align = 0.5, bold = true, fit = fig.width - 2 * PAD })
  end
  for c, label in ipairs(fig.col_labels) do
    local style = fig.turned and { angle = LABEL_ANGLE } or { align = 0.5 }
    canvas:text(label, fig.left + (c - 1) * (w + fig.gap) + w / 2, fig.top - size * 0.8, size, style)
  end
  for r, row in ipairs(fig.images) do
    local y = fig.top + (r - 1) * (h + fig.gap)
    if fig.row_labels[r] then canvas:text(fig.row_labels[r], fig.left - 8, y + h / 2, size, { align = 1 }) end
    for c, img in ipairs(row) do
      if img then canvas:image(img, fig.left + (c - 1) * (w + fig.gap), y, w, h) end
    end
  end
end

-- Copies the pictures. Gives them, and the width and height that the largest of them takes in a cell.
local function check_images(who, rows, cell)
  if type(rows) ~= "table" or #rows == 0 then
    core.fail("%s: rows is an array of arrays of images, got %s", who, check.show(rows))
  end
  local images, wide, high = {}, 0, 0
  for r, row in ipairs(rows) do
    images[r] = {}
    if type(row) ~= "table" then
      core.fail("%s: rows[%d] is %s, expected an array of images", who, r, check.show(row))
    end
    for c = 1, #row do
      local img = row[c] and inputs.image(("%s: rows[%d][%d]"):format(who, r, c), row[c])
      images[r][c] = img
      if img then
        local scale = cell / max(img.width, img.height)
        wide, high = max(wide, img.width * scale), max(high, img.height * scale)
      end
    end
  end
  if wide == 0 then wide, high = cell, cell end
  return images, wide, high
end

--- Makes the fields of plot.image_grid's figure.
function grid.new(rows, options)
  local who = "plot.image_grid"
  local o = check.options(who, options, { row_labels = { "table", {} }, col_labels = { "table", {} },
    cell = { inputs.side, 96 }, gap = { inputs.number(0, 10000), 4 }, title = inputs.text,
    scale = { inputs.scale, 2 }, font = { inputs.letters, 11 } })
  local images, wide, high = check_images(who, rows, o.cell)
  return {
    images = images, cell_width = wide, cell_height = high, gap = o.gap, title = o.title,
    row_labels = inputs.labels(who, "row_labels", o.row_labels),
    col_labels = inputs.labels(who, "col_labels", o.col_labels),
    scale = o.scale, font = o.font,
    measure = measure, draw = draw,
  }
end

return grid
