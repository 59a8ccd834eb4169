--- plot/legend.lua: the size of legends, where they go and how they look.

local marks = require "vertex.plot.marks"
local colors = require "vertex.plot.colors"
local check = require "vertex.check"
local floor, ceil, max = math.floor, math.ceil, math.max

-- More entries than this hide too much data: the legend goes outside.
local MAX_INSIDE_ENTRIES = 6

local legend = {}

-- Where in the plot, as parts of its width and height; on a tie of ink the first of the order.
local corners = { ["upper right"] = { 1, 0 }, ["upper left"] = { 0, 0 }, ["lower right"] = { 1, 1 },
  ["lower left"] = { 0, 1 } }
local corner_order = { "upper right", "upper left", "lower right", "lower left" }

local places = { auto = true, right = true, none = true }
for name in pairs(corners) do places[name] = true end

--- Gives the name of a legend's place, checked.
function legend.check_place(who, name) return check.name(who, "place of a legend", name, places) end

--- Gives a legend's entries and size, in as many columns as the height asks for; nil when there is none to draw.
function legend.measure(ax, canvas, size, height)
  local entries, widest = {}, 0
  for _, layer in ipairs(ax.layers) do
    if layer.label then
      entries[#entries + 1] = layer
      widest = max(widest, canvas:text_width(layer.label, size))
    end
  end
  if #entries == 0 or ax.options.legend == "none" then return nil end
  local line = size * 1.45
  local columns = ceil(#entries * line / max(height - 12, line))
  local column = marks.SWATCH + 6 + widest + 10
  local per_column = ceil(#entries / columns)
  return { entries = entries, size = size, line = line, column = column, per_column = per_column,
    width = columns * column + 4, height = per_column * line + 8 }
end

--- Says whether a measured legend stands right of a plot area of w by h points.
function legend.outside(ax, box, w, h)
  local where = ax.options.legend or "auto"
  if where ~= "auto" then return where == "right" end
  return #box.entries > MAX_INSIDE_ENTRIES or box.width > 0.6 * w or box.height > 0.5 * h
end

-- Gives the upper left point of the legend in a corner of the view.
local function corner_point(name, box, view)
  local f = corners[name]
  return view.left + 6 + f[1] * (view.width - box.width - 12), view.top + 4 + f[2] * (view.height - box.height - 8)
end

-- Names the corner with the least ink under the legend.
local function quietest_corner(ax, box, view)
  local spots, best = {}, nil
  for i, name in ipairs(corner_order) do
    local x, y = corner_point(name, box, view)
    spots[i] = { name = name, left = x - 4, right = x + box.width + 4, top = y - 4, bottom = y + box.height + 4,
      ink = 0 }
  end
  for _, layer in ipairs(ax.layers) do
    marks.ink(layer, view, function(x, y)
      for _, s in ipairs(spots) do
        if x > s.left and x < s.right and y > s.top and y < s.bottom then s.ink = s.ink + 1 end
      end
    end)
  end
  for _, s in ipairs(spots) do
    if not best or s.ink < best.ink then best = s end
  end
  return best.name
end

--- Gives the upper left point of a measured legend inside the view.
function legend.inside_point(ax, box, view)
  local where = ax.options.legend
  return corner_point(corners[where] and where or quietest_corner(ax, box, view), box, view)
end

--- Draws a measured legend; (x, y) is its upper left point.
function legend.draw(canvas, box, x, y)
  canvas:color(colors.white, 0.85)
  canvas:box(x, y, box.width, box.height)
  for i, layer in ipairs(box.entries) do
    local left = x + 4 + floor((i - 1) / box.per_column) * box.column
    local middle = y + 4 + box.line * ((i - 1) % box.per_column + 0.5)
    marks.swatch(canvas, layer, left, middle)
    canvas:text(layer.label, left + marks.SWATCH + 6, middle, box.size)
  end
end

return legend
