--- The results of quantizer.lua as tables and as the plot of its sweep.

local core = require "vertex.core"
local tools = require "tools"
local plot = require "vertex.plot"

local function number(format, value, none) return value and format:format(value) or none or "" end

--- Three digits, or whole numbers where there are more.
local function short(value)
  if not value then return "" end
  return value >= 100 and ("%.0f"):format(value) or value >= 10 and ("%.1f"):format(value) or ("%.2f"):format(value)
end

local function megabytes(bytes) return bytes and short(bytes / 1e6) or "" end

local TITLES = {
  op = "Smoothed quantizer, forward + backward, milliseconds",
  regularizer = "What a regularizer costs: time over softmax-none's, pair by pair",
  gumbel = "What Gumbel noise costs: time over softmax's, pair by pair",
  assign = "Nearest code, milliseconds",
  sweep = "Step time and memory against the codebook's size, N = 8 M, K = 8",
  large = "N = 524,288, M = 65,536, K = 8, D = 3",
  late = "Late in training: rows near codes, or of a run",
}

local function percent(floor, ms) return floor and ("%.0f %%"):format(100 * floor / ms) or "" end

--- The table of a section; best: the best ceilings of all rows.
local function lines_of(rows, best)
  local lines = { { "shape", "method", "side", "forward", "backward", "total", "least", "most", "floor", "of floor",
    "least's",
    "ratio", "least", "most", "of leasts", "extra MB", "rss MB", "quantized", "reg", "dz", "dcodebook", "dlog_tau",
      "codes", "near", "note" } }
  for _, r in ipairs(rows) do
    local floor = r.floor_ms and tools.floor_ms(r, tools.facts(r.method), best)
    local shape = r.section == "late" and ("%s, tau %.3g"):format(r.shape, r.tau) or r.shape
    lines[#lines + 1] = { shape, r.method, r.against and r.side == "vertex" and "over " .. r.against or r.side,
      short(r.forward_ms), short(r.backward_ms),
      short(r.ms), short(r.ms_min), short(r.ms_max), short(floor), percent(floor, r.ms),
      percent(floor, r.ms_min), short(r.ratio), short(r.ratio_min), short(r.ratio_max),
      r.ratio and short(r.ms_min / r.against_ms_min) or "", megabytes(r.extra_bytes), megabytes(r.rss_bytes),
      number("%.0e", r.quantized), number("%.0e", r.reg), number("%.0e", r.dz), number("%.0e", r.dcodebook),
        number("%.0e", r.dlog_tau),
      number("%d", r.codes_differ), number("%d", r.near_differ), r.note or "" }
  end
  local used = {} -- columns that are empty everywhere are left out
  for c = 1, #lines[1] do
    for l = 2, #lines do used[c] = used[c] or lines[l][c] ~= "" end
  end
  local out = {}
  for l, line in ipairs(lines) do
    out[l] = {}
    for c, text in ipairs(line) do out[l][#out[l] + 1] = used[c] and text or nil end
  end
  return tools.table(out, 3)
end

local ORDER = {} -- of what the columns shape, method and side hold; others go behind, shapes by their codes
for i, name in ipairs { "S", "M", "B", "C", "W", "softmax-knn-ce", "softmax-knn-l2", "softmax-ppl", "softmax-none",
  "euclid", "cosine", "vertex",
  "vertex graph", "torch naive", "torch trans", "torch chunk", "torch filter", "torch compile", "torch cdist",
    "torch mm" } do ORDER[name] = i end

local function before(a, b)
  if not (ORDER[a.shape] and ORDER[b.shape]) and (a.D ~= b.D or a.M ~= b.M) then
    if a.D ~= b.D then return a.D < b.D end
    return a.M < b.M
  end
  if a.shape == b.shape and a.tau ~= b.tau then return a.tau > b.tau end
  for _, column in ipairs { "shape", "method", "side" } do
    if a[column] ~= b[column] then
      local i, j = ORDER[a[column]] or math.huge, ORDER[b[column]] or math.huge
      if i ~= j then return i < j end
      return a[column] < b[column]
    end
  end
  return false
end

local function write_tables(results, path, processor)
  local text = { "luajit experiments/bench/quantizer.lua: " .. processor.name .. ", " .. processor.simd .. " kernels" }
  local ranges, versions = {}, {}
  for _, r in ipairs(results.rows) do
    for _, name in ipairs { "fma", "exp2", "compare", "read", "copy", "threads", "tau" } do
      local range = ranges[name] or { r[name], r[name] }
      ranges[name] = r[name] and { math.min(range[1], r[name]), math.max(range[2], r[name]) } or ranges[name]
    end
    if r.version and not versions[r.version] then
      versions[r.version] = true
      versions[#versions + 1] = r.version
    end
  end
  local function range(name)
    local a, b = short(ranges[name][1]), short(ranges[name][2])
    return a == b and a or a .. " .. " .. b
  end
  local ceilings = {}
  for _, c in ipairs { { "fma", "GFLOP/s" }, { "exp2", "G/s" }, { "compare", "G/s" }, { "read", "GB/s" },
    { "copy", "GB/s" } } do
    if ranges[c[1]] then ceilings[#ceilings + 1] = ("%s %s %s"):format(c[1], range(c[1]), c[2]) end
  end
  text[2] = ("%d threads, tau %g; %s; ceilings of the runs%s"):format(ranges.threads[2], ranges.tau[2],
    #versions > 0 and table.concat(versions, ", ") or "without PyTorch",
    #ceilings > 0 and ": " .. table.concat(ceilings, ", ") .. ", of which the floors take the best" or " not measured")
  text[3] = "The columns are explained at the head of quantizer.lua, its rows are in the .csv beside this file."
  local best = {}
  for name, r in pairs(ranges) do best[name] = r[2] end
  for _, section in ipairs { "op", "regularizer", "gumbel", "assign", "sweep", "large", "late" } do
    local rows = {}
    for _, r in ipairs(results.rows) do rows[#rows + 1] = r.section == section and r or nil end
    table.sort(rows, before)
    if #rows > 0 then text[#text + 1] = "\n" .. TITLES[section] .. "\n\n" .. lines_of(rows, best) end
  end
  core.write_file(path .. ".txt", table.concat(text, "\n") .. "\n")
end

-- -- The plot ---------------------------------------------------------------------------------------------------------

local NAMES = { vertex = "Vertex", ["torch naive"] = "PyTorch", ["torch trans"] = "PyTorch, transposed top-k",
  ["torch chunk"] = "PyTorch in blocks",
  ["torch filter"] = "PyTorch, by hand in blocks of rows", ["torch compile"] = "PyTorch, compiled" }
local SIDES = { "vertex", "torch filter", "torch naive", "torch chunk", "torch trans", "torch compile" }

--- One curve a side; where memory ended it, a cross and words.
local function draw_curves(ax, rows, quantity, scale)
  for s, side in ipairs(SIDES) do
    local xs, ys, ended = {}, {}, nil
    for _, r in ipairs(rows) do
      if r.side == side then
        if r[quantity] then
          xs[#xs + 1], ys[#ys + 1] = r.M, r[quantity] * scale
        else
          ended = ended or r.note
        end
      end
    end
    if #xs > 0 then
      ax:line(xs, ys, { color = s, marker = "circle", width = 2, label = NAMES[side] })
      if ended and (ended:find "memory" or ended:find "array") then
        ax:scatter({ xs[#xs] }, { ys[#ys] }, { color = s, marker = "cross", size = 14, alpha = 1 })
        if quantity == "extra_bytes" then
          ax:text(xs[#xs], ys[#ys], "  memory ends here", { color = s, at = "right" })
        end
      end
    end
  end
end

--- The rows of section large are points of the sweep's line.
local function in_plot(r) return r.section == "sweep" or r.section == "large" and r.N == 8 * r.M end

local function write_plot(results, path, processor)
  local by_width, widths = {}, {}
  for _, r in ipairs(results.rows) do
    if in_plot(r) then
      if not by_width[r.D] then
        by_width[r.D] = {}
        widths[#widths + 1] = r.D
      end
      table.insert(by_width[r.D], r)
    end
  end
  if #widths == 0 then return end
  local codes = { math.huge, 0 }
  for _, r in ipairs(results.rows) do
    if in_plot(r) then codes = { math.min(codes[1], r.M * 0.8), math.max(codes[2], r.M * 1.25) } end
  end
  table.sort(widths)
  local fig = plot.figure { width = 460 * #widths + 40, height = 720, rows = 2, cols = #widths,
    title = ("Smoothed quantizer with KNN regularizer, forward + backward: %s, %s"):format(processor.name,
      processor.simd) }
  for c, D in ipairs(widths) do
    table.sort(by_width[D], function(a, b) return a.M < b.M end)
    local time, memory = fig:axes(1, c), fig:axes(2, c)
    draw_curves(time, by_width[D], "ms", 1e-3)
    draw_curves(memory, by_width[D], "extra_bytes", 1e-6)
    time:set { title = ("rows of D = %d"):format(D), xlog = true, ylog = true, xlim = codes, ylabel = "seconds a step",
      legend = "lower right" }
    memory:set { xlog = true, ylog = true, xlim = codes, xlabel = "codes M, with N = 8 M rows and K = 8",
      ylabel = "MB beyond inputs and outputs", legend = "none" }
  end
  fig:save(path .. ".png")
end

--- Writes path.txt and, where there is a sweep, path.png.
return function(results, path, processor)
  if #results.rows == 0 then return end
  write_tables(results, path, processor)
  write_plot(results, path, processor)
end
