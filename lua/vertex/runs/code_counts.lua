--- runs/code_counts: how evenly each method uses its codes, one of an experiment's pictures: the counts of the
-- evaluation, sorted, a plot a method.

--- Counts of one codebook as multiples of even use, the largest first; codes that are never used are left out.
local function sorted(counts)
  local sum, list = 0, {}
  for _, c in ipairs(counts) do sum = sum + c end
  for _, c in ipairs(counts) do
    if c > 0 then list[#list + 1] = c * #counts / sum end
  end
  table.sort(list, function(a, b) return a > b end)
  return list
end

--- Draws what finished methods kept as `code_counts`, i32 (codebooks, codes): a line a codebook over its codes, most
-- used first, in multiples of even use (grey). A line ends where the codes are that nothing uses. Where no method kept
-- counts nothing is drawn.
-- @param run table of runs.start
-- @param path path of the PNG
-- @raise where the file cannot be written
local function draw(run, path)
  local plot = require "vertex.plot"
  local shown = {}
  for _, method in ipairs(run.config.methods) do
    local kept = run:kept(method)
    if kept and kept.code_counts then shown[#shown + 1] = { method = method, counts = kept.code_counts:totable() } end
  end
  if #shown == 0 then return end
  local cols = math.min(4, #shown)
  local rows = math.ceil(#shown / cols)
  local fig = plot.figure { width = 290 * cols, height = 230 * rows, rows = rows, cols = cols }
  for i, one in ipairs(shown) do
    local ax = fig:axes(i)
    local M = #one.counts[1]
    for _, counts in ipairs(one.counts) do
      local list = sorted(counts)
      if #list == 1 then ax:scatter({ 1 }, list) else ax:line(nil, list) end
    end
    ax:line({ 1, M }, { 1, 1 }, { color = "#999999", width = 0.7 })
    ax:set { title = one.method, ylog = true, xlim = { 0, M + 1 }, legend = "none",
      xlabel = i > #shown - cols and "codes, most used first" or nil,
      ylabel = (i - 1) % cols == 0 and "use / even use" or nil }
  end
  fig:save(path)
end

return { file = "code_use.png", draw = draw }
