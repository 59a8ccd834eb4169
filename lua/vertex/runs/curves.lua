--- runs/curves: what was logged, drawn over the steps with a line per method.

--- Declares curves.png as one of an experiment's pictures.
-- @param panels array, from left to right, of {field = of the log entries, label = above the panel, log = true for a
-- logarithmic axis, limits = {low, high} of the axis}
-- @return {file =, draw =}, for `pictures` of an experiment
return function(panels)
  local function draw(run, path)
    local plot = require "vertex.plot"
    local fig = plot.figure { width = 575 * #panels, height = 440, cols = #panels }
    for i, panel in ipairs(panels) do
      local ax = fig:axes(i)
      for _, method in ipairs(run.config.methods) do
        local x, y = {}, {}
        for _, entry in ipairs(run:history(method)) do
          if entry[panel.field] then x[#x + 1], y[#y + 1] = entry.step, entry[panel.field] end
        end
        if #x > 0 then ax:line(x, y, { label = method }) end
      end
      ax:set { title = panel.label, xlabel = "step", ylog = panel.log, ylim = panel.limits,
        legend = i == #panels and "right" or "none" }
    end
    fig:save(path)
  end
  return { file = "curves.png", draw = draw }
end
