--- runs/line_styles: how the lines of many methods are told apart in one plot: relatives share a colour, and the dash
-- says which of them it is. Smoothed methods have the colour of their sampler and the dash of their regularizer; the
-- others the colour of the name up to its first dash, and the dash of their metric.

local registry = require "vertex.quantizers"

local DASHES = { {}, { 5, 2 }, { 1.5, 1.5 }, { 7, 2, 1.5, 2 } }
local DASH_OF = { ["knn-ce"] = 1, ["knn-l2"] = 2, ppl = 3, none = 4, cosine = 1, euclid = 2 }

--- Gives each method its colour and dash.
-- @param methods array of names
-- @return {name = {color = index of plot.colors, dash = array of lengths}}, no two alike while there are enough
-- @raise nothing
return function(methods)
  local colors = require("vertex.plot").colors
  local styles, families, taken, count = {}, {}, {}, 0
  for _, method in ipairs(methods) do
    local facts = registry.by_name[method] or {}
    local family = facts.sampler or method:match "^[^-]+"
    if not families[family] then
      count = count + 1
      families[family] = (count - 1) % #colors + 1
    end
    local color, dash = families[family], DASH_OF[facts.regularizer or facts.metric] or 1
    for _ = 1, #DASHES do
      if not taken[color .. " " .. dash] then break end
      dash = dash % #DASHES + 1
    end
    taken[color .. " " .. dash] = true
    styles[method] = { color = color, dash = DASHES[dash] }
  end
  return styles
end
