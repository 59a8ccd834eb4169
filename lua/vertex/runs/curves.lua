--- runs/curves: what was logged, drawn over the steps with a line per method.

local line_styles = require "vertex.runs.line_styles"

--- What was logged of one field: a line for each method that has any, in their order.
local function lines_of(run, one)
  local lines = {}
  for i, method in ipairs(run.config.methods) do
    local x, y = {}, {}
    for _, entry in ipairs(run:history(method)) do
      if entry[one.field] and (not one.where or entry[one.where]) then
        x[#x + 1], y[#y + 1] = entry.step, entry[one.field]
      end
    end
    if #x > 0 then lines[#lines + 1] = { method = method, x = x, y = y, place = i, last = y[#y] } end
  end
  return lines
end

--- Sorts lines by where they end, the highest first, as the eye meets them beside the legend; ends that look alike stay
-- in the methods' order.
local function from_the_top(lines)
  local low, high = math.huge, -math.huge
  for _, line in ipairs(lines) do
    if line.last == line.last then low, high = math.min(low, line.last), math.max(high, line.last) end
  end
  for _, line in ipairs(lines) do -- what is no number comes last
    local part = (line.last - low) / math.max(high - low, 1e-30)
    line.level = line.last == line.last and math.floor(50 * part + 0.5) or -1
  end
  table.sort(lines, function(a, b)
    if a.level ~= b.level then return a.level > b.level end
    return a.place < b.place
  end)
end

--- Declares a picture of what was logged as one of an experiment's.
-- @param plots array, from left to right, of {field = of the log entries, label = above it, log = true for a
-- logarithmic axis, limits = {low, high} of the axis, where = another field, without which an entry is left out}
-- @param[opt="curves.png"] file its name
-- @return {file =, draw =}, for `pictures` of an experiment; nothing is drawn where no method logged such fields
return function(plots, file)
  local function draw(run, path)
    local plot = require "vertex.plot"
    local any, styles = false, line_styles(run.config.methods)
    local fig = plot.figure { width = 575 * #plots, height = 440, cols = #plots }
    for i, one in ipairs(plots) do
      local ax = fig:axes(i)
      local lines = lines_of(run, one)
      if i == #plots then from_the_top(lines) end
      for _, line in ipairs(lines) do
        local style = styles[line.method]
        ax:line(line.x, line.y, { label = line.method, color = style.color, dash = style.dash })
        any = true
      end
      ax:set { title = one.label, xlabel = "step", ylog = one.log, ylim = one.limits,
        legend = i == #plots and "right" or "none" }
    end
    if any then fig:save(path) end
  end
  return { file = file or "curves.png", draw = draw }
end
