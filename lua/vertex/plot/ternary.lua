--- plot/ternary.lua: axes on the simplex. Points p of M codes, p[m] >= 0 and sum p = 1, are drawn in the plane: for
-- M = 3 in a ternary plot, the triangle itself with ticks on its three sides; for more in a regular M-gon whose corners
-- are the vertices e_m, each point at the mean of the corners weighted by p. The M-gon keeps the vertices apart, and
-- the edges between two neighbours, but not every point: at its centre lie the uniform p and also an even mixture of
-- two opposite vertices. The numbers of such points (scores, divergences) are lua/vertex/simplex.
--
-- Points are a tensor (N,M), on any device, or an array of N arrays of M numbers. A row that holds NaN is a gap. Rows
-- are not negative and sum to 1, both within 1e-3.

local arguments = require "vertex.arguments"
local core = require "vertex.core"
local ops = require "vertex.ops"
local tape = require "vertex.tape"
local axes = require "vertex.plot.axes"
local inputs = require "vertex.plot.inputs"
local check = require "vertex.check"
local density = require "vertex.plot.density"
local fail = core.fail
local sin, cos, pi, sqrt = math.sin, math.cos, math.pi, math.sqrt

local Axes = axes.class
local Ternary = {}
Ternary.__index = Ternary
Ternary.__tostring = Axes.__tostring

-- How far a row's sum may be from 1: a softmax in bfloat16 misses by less.
local SLACK = 1e-3

local SUBSCRIPTS = { [0] = "₀", "₁", "₂", "₃", "₄", "₅", "₆", "₇", "₈", "₉" }

-- Writes a number in subscripts.
local function subscript(n) return (tostring(n):gsub("%d", function(digit) return SUBSCRIPTS[tonumber(digit)] end)) end

-- Gives the corners in the plane, y upwards: arrays x, y. Their centre is 0, so that a direction whose coordinates are
-- all equal, which leaves the simplex, maps to 0. The triangle's first corner is lower left, the next lower right; a
-- polygon's first is on top, the others follow clockwise.
local function corners(codes)
  if codes == 3 then
    local h = sqrt(3) / 2
    return { -0.5, 0.5, 0 }, { -h / 3, -h / 3, 2 * h / 3 }
  end
  local x, y = {}, {}
  for m = 1, codes do x[m], y[m] = sin(2 * pi * (m - 1) / codes), cos(2 * pi * (m - 1) / codes) end
  return x, y
end

-- Makes axes of a figure; Figure:simplex documents the options.
local function new(figure, options)
  local who = "Figure:simplex"
  local o = check.options(who, options, { codes = inputs.integer(3, 100000), labels = "table",
    ticks = { inputs.integer(0, 1000), 5 } })
  local codes = o.codes or o.labels and #o.labels or 3
  if codes < 3 then fail("%s: codes is %d, expected at least 3", who, codes) end
  local labels = o.labels and inputs.labels(who, "labels", o.labels)
  if labels and #labels ~= codes then
    fail("%s: labels has %d values for %d codes; they must match", who, #labels, codes)
  end
  if not labels then
    labels = {}
    for m = 1, codes do labels[m] = "e" .. subscript(m) end
  end
  local x, y = corners(codes)
  return setmetatable({ figure = figure, layers = {}, options = {}, series = 0,
    simplex = { codes = codes, x = x, y = y, labels = labels, ticks = codes == 3 and o.ticks or 0 } }, Ternary)
end

-- Gives points or directions as a tensor f32 (N,M).
local function matrix(ax, p, name, who)
  local codes = ax.simplex.codes
  if not core.is_tensor(p) then
    if type(p) ~= "table" or type(p[1]) ~= "table" and type(p[1]) ~= "number" then
      fail("%s: %s is a tensor (N, %d) or an array of arrays of %d numbers, got %s", who, name, codes, codes,
        check.show(p))
    end
    p = core.tensor(p)
  end
  if p:dim() == 1 then p = p:reshape { 1, p:size(1) } end
  if p:dim() ~= 2 or p:size(2) ~= codes then
    fail("%s: %s %s, expected (N,%d)", who, name, core.shape_text(p), codes)
  end
  return p:dtype() == "f32" and p or p:to "f32"
end

-- Gives the columns of an array of rows.
local function columns(rows, count)
  local out = {}
  for c = 1, count do
    out[c] = {}
    for i, row in ipairs(rows) do out[c][i] = row[c] end
  end
  return out
end

-- Gives where points, or directions, lie in the plane: arrays x, y (N). Raises where a row is no point.
local function project(ax, p, name, who, directions)
  local s, out = ax.simplex, nil     -- out: x, y, the sum and the least value of each row
  core.step(tape.no_grad, function()
    local rows = matrix(ax, p, name, who)
    if rows:size(1) == 0 then
      out = { {}, {}, {}, {} }
      return
    end
    local map = {}
    for m = 1, s.codes do map[m] = { s.x[m], s.y[m], 1 } end
    out = columns(core.autocast("f32", ops.matmul, rows, core.tensor(map):to(rows:device())):totable(), 3)
    if not directions then out[4] = ops.min(rows, 2):totable() end
  end)
  for i, sum in ipairs(directions and {} or out[3]) do
    if math.abs(sum - 1) > SLACK or out[4][i] < -SLACK then
      fail("%s: row %d of %s is no point of the simplex: its sum is %g, its least value %g", who, i, name, sum,
        out[4][i])
    end
  end
  return out[1], out[2]
end

--- Draws points of the simplex.
-- @param p tensor (N,M) or array of N arrays of M numbers, the points
-- @param[opt] options table, as of axes:scatter: label, color, marker, size, alpha, values, palette, range, log,
-- density
-- @return the axes
-- @raise where p does not hold points of M codes, or an option is unknown or of another type
function Ternary:scatter(p, options)
  local x, y = project(self, p, "p", "SimplexAxes:scatter")
  return Axes.scatter(self, x, y, options)
end

--- Draws a curve through points of the simplex, for instance the way of one row through training.
-- @param p tensor (N,M) or array of N arrays of M numbers, the points
-- @param[opt] options table, as of axes:line: label, color, width, dash, marker
-- @return the axes
-- @raise where p does not hold points of M codes, or an option is unknown or of another type
function Ternary:line(p, options)
  local x, y = project(self, p, "p", "SimplexAxes:line")
  return Axes.line(self, x, y, options)
end

--- Draws arrows from points p along directions d. Of a direction only the part within the plane of the simplex shows.
-- @param p tensor (N,M) or array of N arrays of M numbers, the points
-- @param d tensor (N,M) or array of N arrays of M numbers, the directions
-- @param[opt] options table, as of axes:arrows: label, color, scale, width, head, alpha, values, palette, range, log
-- @return the axes
-- @raise where p does not hold points of M codes, d is of another shape, or an option is unknown or of another type
function Ternary:arrows(p, d, options)
  local x, y = project(self, p, "p", "SimplexAxes:arrows")
  local dx, dy = project(self, d, "d", "SimplexAxes:arrows", true)
  return Axes.arrows(self, x, y, dx, dy, options)
end

--- Writes a text beside a point of the simplex.
-- @param p tensor (M) or array of M numbers, the point
-- @param text string
-- @param[opt] options table, as of axes:text: color, size, at
-- @return the axes
-- @raise where p is not one point of M codes, text is no string, or an option is unknown or of another type
function Ternary:text(p, text, options)
  local x, y = project(self, p, "p", "SimplexAxes:text")
  if #x ~= 1 then fail("SimplexAxes:text: p is one point, got %d", #x) end
  return Axes.text(self, x[1], y[1], text, options)
end

-- Calls visit(x1, y1, x2, y2, x3, y3) for each of the n² triangles into which lines parallel to the sides divide the
-- triangle.
local function each_triangle(s, n, visit)
  local x0, y0 = s.x[1], s.y[1]
  local ax, ay, bx, by = (s.x[2] - x0) / n, (s.y[2] - y0) / n, (s.x[3] - x0) / n, (s.y[3] - y0) / n
  for j = 0, n - 1 do
    for i = 0, n - 1 - j do
      local x, y = x0 + i * ax + j * bx, y0 + i * ay + j * by
      visit(x, y, x + ax, y + ay, x + bx, y + by)
      if i < n - 1 - j then visit(x + ax, y + ay, x + ax + bx, y + ay + by, x + bx, y + by) end
    end
  end
end

-- Gives p at a place of the plane, for M = 3.
local function coordinates(s, x, y)
  local p3 = (y - s.y[1]) / (s.y[3] - s.y[1])
  local p2 = x - s.x[1] - p3 / 2
  return 1 - p2 - p3, p2, p3
end

-- Estimates the density of points at places of the plane, over (p₁, p₂), the measure of Dirichlet densities: there the
-- triangle has the area 1/2, in the plane √3/4.
local function estimate_density(ax, p, xs, ys, bandwidth)
  local s, out = ax.simplex, {}
  local px, py = project(ax, p, "source", "SimplexAxes:density")
  local function inside(x, y)
    local p1, p2, p3 = coordinates(s, x, y)
    return p1 >= 0 and p2 >= 0 and p3 >= 0
  end
  local at = density.estimate(px, py, { s.x[1], s.x[2], s.y[1], s.y[3] }, bandwidth, inside)
  for i = 1, #xs do out[i] = at(xs[i], ys[i]) * sqrt(3) / 2 end
  return out
end

-- Gives the values of a function of p at places of the plane.
local function ask(s, source, xs, ys)
  local out, rows = nil, {}
  for i = 1, #xs do rows[i] = { coordinates(s, xs[i], ys[i]) } end
  core.step(tape.no_grad, function()
    out = inputs.array("SimplexAxes:density", "what source returned", source(core.tensor(rows)))
  end)
  inputs.lengths("SimplexAxes:density", "what source was given", rows, "what it returned", out)
  return out
end

--- Fills the triangle with the colours of a density, with a colour bar; M = 3 only.
-- @param source function(p) -> (N) of points p (N,3) inside the triangle, or tensor (N,3), or array of N arrays of 3
-- numbers: for instance exp of vx.simplex.log_density; or points whose density is estimated, 2 where they are uniform
-- @param[opt] options table
-- @param[opt="viridis"] options.palette "viridis", "magma", "bluered" or "gray"
-- @param[opt] options.range { lo, hi }: the values at the ends of the palette; else the least and greatest
-- @param[opt=false] options.log true colours by the logarithm of the values
-- @param[opt=128] options.parts number of parts of a side
-- @param[opt=0.03] options.bandwidth standard deviation of the estimate's Gaussian, as a part of a side
-- @return the axes
-- @raise where M is not 3, source gives no N numbers, the colour bar has another scale already, or an option is unknown
-- or of another type
function Ternary:density(source, options)
  local who, s = "SimplexAxes:density", self.simplex
  local known = { parts = { inputs.integer(1, 2000), 128 }, bandwidth = { inputs.number(0.001, 10), 0.03 } }
  for name, kind in pairs(axes.color_options) do known[name] = kind end
  local o = check.options(who, options, known)
  if s.codes ~= 3 then
    fail("%s: only for 3 codes, these axes have %d; scatter with density = true colours points", who, s.codes)
  end
  local parts, bandwidth = o.parts, o.bandwidth
  local xs, ys = {}, {}     -- the middles of the parts
  each_triangle(s, parts, function(x1, y1, x2, y2, x3, y3)
    xs[#xs + 1], ys[#ys + 1] = (x1 + x2 + x3) / 3, (y1 + y2 + y3) / 3
  end)
  local values = type(source) == "function" and ask(s, source, xs, ys)
    or estimate_density(self, source, xs, ys, bandwidth)
  self.layers[#self.layers + 1] = { kind = "triangles", scale = axes.set_color_scale(self, who, o, { values }),
    values = values, marks = parts * parts, x = {}, y = {},
    each = function(visit) each_triangle(s, parts, visit) end }
  return self
end

--- Sets texts. It may be called again; what is not named stays.
-- @param options table
-- @param[opt] options.title string
-- @param[opt] options.xlabel string, below the simplex
-- @param[opt] options.color_label string, beside the colour bar
-- @param[opt] options.legend as of axes:set
-- @param[opt=true] options.grid boolean
-- @param[opt=true] options.color_bar boolean
-- @return the axes
-- @raise where an option is unknown or of another type
function Ternary:set(options)
  local o = check.options("SimplexAxes:set", options, { title = inputs.text, xlabel = inputs.text,
    color_label = inputs.text, legend = "text", grid = "boolean", color_bar = "boolean" })
  return Axes.set(self, o)
end

arguments.guard_class("simplex axes", Ternary)

return { new = new }
