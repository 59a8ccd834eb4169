--- runs/curves: what was logged, drawn over the steps with a line per method.

--- Declares curves.png as one of an experiment's pictures.
-- @param plots array, from left to right, of {field = of the log entries, label = above it, log = true for a
-- logarithmic axis, limits = {low, high} of the axis}
-- @return {file =, draw =}, for `pictures` of an experiment
return function(plots)
  local function draw(run, path)
    local plot = require "vertex.plot"
    local fig = plot.figure { width = 575 * #plots, height = 440, cols = #plots }
    for i, one in ipairs(plots) do
      local ax = fig:axes(i)
      for _, method in ipairs(run.config.methods) do
        local x, y = {}, {}
        for _, entry in ipairs(run:history(method)) do
          if entry[one.field] then x[#x + 1], y[#y + 1] = entry.step, entry[one.field] end
        end
        if #x > 0 then ax:line(x, y, { label = method }) end
      end
      ax:set { title = one.label, xlabel = "step", ylog = one.log, ylim = one.limits,
        legend = i == #plots and "right" or "none" }
    end
    fig:save(path)
  end
  return { file = "curves.png", draw = draw }
end
