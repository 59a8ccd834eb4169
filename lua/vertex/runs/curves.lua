--- runs/curves: what was logged, drawn over the steps with a line per method.

local line_styles = require "vertex.runs.line_styles"

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
      for _, method in ipairs(run.config.methods) do
        local x, y = {}, {}
        for _, entry in ipairs(run:history(method)) do
          if entry[one.field] and (not one.where or entry[one.where]) then
            x[#x + 1], y[#y + 1] = entry.step, entry[one.field]
          end
        end
        if #x > 0 then
          ax:line(x, y, { label = method, color = styles[method].color, dash = styles[method].dash })
          any = true
        end
      end
      ax:set { title = one.label, xlabel = "step", ylog = one.log, ylim = one.limits,
        legend = i == #plots and "right" or "none" }
    end
    if any then fig:save(path) end
  end
  return { file = file or "curves.png", draw = draw }
end
