--- plot/density.lua: estimates how densely points lie in the plane. Each point counts in a cell of a grid, and the grid
-- is blurred with a Gaussian: O(points + cells). (Statistics calls this a kernel density estimate.)

local floor, ceil, min, max, exp = math.floor, math.ceil, math.min, math.max, math.exp
local finite = require("vertex.plot.scales").finite

local density = {}

-- Convolves every row or every column of a grid with a Gaussian of `sd` cells, cut at 3 sd. The grid has `lines` of `n`
-- cells; line_step leads from a line to the next, step from a cell to the next along its line.
local function blur_along(grid, lines, line_step, n, step, sd)
  local reach, weight, total, out = ceil(3 * sd), {}, 0, {}
  for k = -reach, reach do
    weight[k] = exp(-k * k / (2 * sd * sd))
    total = total + weight[k]
  end
  for line = 0, lines - 1 do
    local from = 1 + line * line_step
    for i = 0, n - 1 do
      local sum = 0
      for k = max(-reach, -i), min(reach, n - 1 - i) do sum = sum + weight[k] * grid[from + (i + k) * step] end
      out[from + i * step] = sum / total
    end
  end
  return out
end

-- Convolves a grid of nx by ny cells with a Gaussian of `sd` cells.
local function blur(grid, nx, ny, sd) return blur_along(blur_along(grid, ny, nx, nx, 1, sd), nx, 1, ny, nx, sd) end

--- Estimates the density of points.
-- @param xs array (N)
-- @param ys array (N); points that are not finite or outside the box do not count
-- @param box { x0, x1, y0, y1 }
-- @param sd standard deviation of the Gaussian, in the units of x and y
-- @param[opt] inside function(x, y) -> true where points can lie; the part of a Gaussian outside of that region is put
-- back, so that the density does not fall toward the region's edge
-- @return function(x, y) -> density; its integral over the box is 1
function density.estimate(xs, ys, box, sd, inside)
  local cell, x0, y0 = sd / 2.5, box[1], box[3]
  local nx, ny = max(1, ceil((box[2] - x0) / cell)), max(1, ceil((box[4] - y0) / cell))
  local grid, n = {}, 0
  for i = 1, nx * ny do grid[i] = 0 end
  for i = 1, #xs do
    local x, y = (xs[i] - x0) / cell, (ys[i] - y0) / cell
    if finite(x + y) and x >= 0 and y >= 0 and x <= nx and y <= ny then
      local k = 1 + min(floor(x), nx - 1) + min(floor(y), ny - 1) * nx
      grid[k], n = grid[k] + 1, n + 1
    end
  end
  grid = blur(grid, nx, ny, sd / cell)
  if inside then
    local region = {}
    for j = 0, ny - 1 do
      for i = 0, nx - 1 do region[1 + i + j * nx] = inside(x0 + (i + 0.5) * cell, y0 + (j + 0.5) * cell) and 1 or 0 end
    end
    region = blur(region, nx, ny, sd / cell)
    for k = 1, nx * ny do grid[k] = region[k] > 0.01 and grid[k] / region[k] or 0 end
  end
  local scale = 1 / (max(n, 1) * cell * cell)
  return function(x, y)              -- between the cells' middles, linear
    x, y = min(max((x - x0) / cell - 0.5, 0), nx - 1), min(max((y - y0) / cell - 0.5, 0), ny - 1)
    local i, j = min(floor(x), max(nx - 2, 0)), min(floor(y), max(ny - 2, 0))
    local f, g, right, up = x - i, y - j, nx > 1 and 1 or 0, ny > 1 and nx or 0
    local k = 1 + i + j * nx
    return scale * ((1 - g) * ((1 - f) * grid[k] + f * grid[k + right]) + g
      * ((1 - f) * grid[k + up] + f * grid[k + up + right]))
  end
end

return density
