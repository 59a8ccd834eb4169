--- plot/colors.lua: the colours of series, of axes and texts, and colour maps. A checked colour is { r, g, b } in 0..1.

local check = require "vertex.check"
local core = require "vertex.core"
local floor, min, max = math.floor, math.min, math.max

local colors = {}

--- The series colours, "#rrggbb": Okabe and Ito's set, which colour-blind readers can tell apart, with its grey in
-- place of its yellow, which vanishes on white paper.
colors.series = { "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999" }

colors.ink, colors.gray, colors.grid, colors.white = { 0.13, 0.13, 0.13 }, { 0.45, 0.45, 0.45 }, { 0.9, 0.9, 0.9 },
  { 1, 1, 1 }

local palettes = {
  viridis = { "#440154", "#482878", "#3E4A89", "#31688E", "#26828E", "#1F9E89", "#35B779", "#6DCD59", "#B4DE2C",
    "#FDE725" },
  magma = { "#000004", "#180F3E", "#451077", "#721F81", "#9F2F7F", "#CD4071", "#F1605D", "#FD9567", "#FEC98D",
    "#FCFDBF" },
  bluered = { "#2166AC", "#67A9CF", "#D1E5F0", "#F7F7F7", "#FDDBC7", "#EF8A62", "#B2182B" },
  gray = { "#000000", "#FFFFFF" },
}

-- Gives the colour of "#rrggbb"; nil for other texts.
local function hex(text)
  local r, g, b = text:match "^#(%x%x)(%x%x)(%x%x)$"
  return r and { tonumber(r, 16) / 255, tonumber(g, 16) / 255, tonumber(b, 16) / 255 }
end

for _, stops in pairs(palettes) do
  for i, text in ipairs(stops) do stops[i] = hex(text) end
end

--- Gives the colour { r, g, b } of any form: "#rrggbb", { r, g, b } in 0..1, or a place in the series colours, 1-based.
function colors.check(who, value)
  local color
  if type(value) == "number" then color = colors.series[value] and hex(colors.series[value]) end
  if type(value) == "string" then color = hex(value) end
  if type(value) == "table" then color = { value[1], value[2], value[3] } end
  for i = 1, 3 do
    local c = color and color[i]
    if not (type(c) == "number" and c >= 0 and c <= 1) then
      core.fail("%s: a color is \"#rrggbb\", {r, g, b} in 0..1 or a number 1..%d, got %s", who, #colors.series,
        check.show(value))
    end
  end
  return color
end

--- Gives the name of a colour map, checked.
function colors.check_palette(who, name) return check.name(who, "palette", name, palettes) end

--- Gives the colour at a place on a colour map.
-- @param name "viridis", "magma", "bluered" or "gray"
-- @param t number in 0..1; below 0 counts as 0, above 1 as 1
-- @return red, green, blue, each in 0..1
-- @raise where the name is unknown
function colors.map(name, t)
  local stops = palettes[colors.check_palette("plot.colormap", name)]
  local at = min(max(t, 0), 1) * (#stops - 1)
  local i = min(floor(at), #stops - 2)
  local a, b, f = stops[i + 1], stops[i + 2], at - i
  return a[1] + f * (b[1] - a[1]), a[2] + f * (b[2] - a[2]), a[3] + f * (b[3] - a[3])
end

return colors
