--- simplex/plots.lua: figures of points and of what a watch recorded. vertex.plot is loaded by the first of them.

local check = require "vertex.check"
local core = require "vertex.core"
local ops = require "vertex.ops"
local points = require "vertex.simplex.points"
local tape = require "vertex.tape"

local plots = {}

--- Draws points: on the triangle for M = 3, for more in a regular polygon with a vertex at each corner
-- (plot/ternary.lua says what that shows). The colour of a point says how densely they lie around it.
-- @param p points, tensor f32 (N,M), M at least 3
-- @param[opt] options table
-- @param[opt] options.title string
-- @param[opt] options.labels array of M strings, of the vertices (e₁, e₂, ...)
-- @param[opt=false] options.log true where p holds natural logarithms
-- @return figure, to show, save or add to: fig:simplex(1) are its axes
-- @raise where p does not hold points, or M is 2
function plots.points(p, options)
  local o = check.options("plot", options, { title = "text", labels = "table", log = { "boolean", false } })
  points.check("plot", p, o.log)
  local M = p:size(2)
  if M < 3 then core.fail("plot: p %s, expected (N,M) with M at least 3", core.shape_text(p)) end
  local fig = require("vertex.plot").figure { width = 480, height = 440 }
  core.step(tape.no_grad, function()
    fig:simplex(1, { codes = M, labels = o.labels })
      :scatter(points.probabilities(p, o.log), { density = true, size = 4.5 }):set { title = o.title }
  end)
  return fig
end

-- Gives column g of an array of rows.
local function column(rows, g)
  local out = {}
  for t, row in ipairs(rows) do out[t] = row[g] end
  return out
end

--- Draws what a watch recorded; see watch:plot() in simplex/watch.lua.
-- @param watch what simplex.watch returned
-- @return figure of three axes
-- @raise where nothing was recorded, or batches differed in size
function plots.watch(watch)
  local steps, G = watch:steps(), watch.records[1] and watch.records[1].claimed:size(1)
  local distances, neighbours, claimed     -- arrays (T,G): of the mean, and of the lower and upper end of its band
  core.step(tape.no_grad, function()
    local d, n = watch:stack "distances", watch:stack "neighbours"
    local mean = ops.mean(d, 3)
    local sd = ops.sqrt(ops.mean(ops.square(ops.sub(d, ops.mean(d, 3, true))), 3))
    distances = { mean:totable(), ops.clamp(ops.sub(mean, sd), 0, 2):totable(), ops.add(mean, sd):totable() }
    neighbours = { ops.mean(n, 3):totable(), ops.min(n, 3):totable(), ops.max(n, 3):totable() }
    claimed = ops.mean(ops.lt(core.new({ 1 }, { device = "cpu" }):zero(), watch:stack "claimed"), 3):totable()
  end)
  local fig = require("vertex.plot").figure { width = 1050, height = 320, cols = 3 }
  local function draw(place, values, g, label)
    fig:axes(place):line(steps, column(values[1], g), { band = { column(values[2], g), column(values[3], g) },
      label = label })
  end
  for g = 1, G do
    local label = G > 1 and "codebook " .. g or nil
    draw(1, distances, g, label)
    draw(2, neighbours, g, label)
    fig:axes(3):line(steps, column(claimed, g), { label = label })
  end
  local unit = watch.options.metric == "ce" and " (nats)" or ""
  fig:axes(1):set { title = "Rows: distance from a vertex", xlabel = "step", ylabel = "distance" }
  fig:axes(2):set { title = "Vertices: their nearest rows", xlabel = "step", ylabel = "mean deviation" .. unit }
  fig:axes(3):set { title = "Vertices claimed", xlabel = "step", ylabel = "share", ylim = { 0, 1.05 } }
  return fig
end

return plots
