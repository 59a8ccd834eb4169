--- simplex_figures.lua: pictures of the simplex. Figures 1 and 2 of Morita 2025, and in pictures what the paper says of
-- its regularizers in words.
--
--     luajit experiments/simplex_figures.lua --out DIR
--
--   figure1      four distributions on the simplex, and how ppl and KNN score them
--   figure2      Dirichlet densities with concentrations 0.5, 1 and 2
--   gradients    where each regularizer alone pushes spread and collapsed points
--   motion-*     300 points that each regularizer alone moves, step by step, from a uniform and from a collapsed start
--
-- Each figure is written as PNG, SVG and PDF. The scores behind Figure 1 are also printed and written to scores.csv.

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")

local argparse = require "argparse"
local vx = require "vertex"
local core, plot, simplex = require "vertex.core", vx.plot, vx.simplex

local parser = argparse("simplex_figures",
  "Figures 1 and 2 of Morita 2025 and how its regularizers move points on the simplex.")
parser:option("--out", "folder for the pictures, made if it is not there", "out/simplex")
parser:option("--seed", "seed of everything drawn", "1"):convert(tonumber)
parser:flag("--quick", "small and few: to see that it runs")
local flags = vx.runs.flags.read(parser)

local BLUE, ORANGE, GREEN, DARK, LIGHT = plot.colors[1], plot.colors[5], plot.colors[3], "#555555", "#BBBBBB"
local K = 8                                   -- the paper's, in Figure 1

-- Saves a figure in three formats and says so.
local function save(fig, name)
  for _, ending in ipairs { "png", "svg", "pdf" } do fig:save(("%s/%s.%s"):format(flags.out, name, ending)) end
  io.write(("%s/%s.png .svg .pdf\n"):format(flags.out, name))
end

-- -- Figure 1 ---------------------------------------------------------------------------------------------------------

-- The paper's markers: orange circles, light and dark grey, blue crosses.
local STYLES = {
  vertices = { color = ORANGE, marker = "circle" }, uniform = { color = LIGHT, marker = "square" },
  centered = { color = DARK, marker = "triangle" }, collapsed = { color = BLUE, marker = "cross" },
}

local SCORES = {
  { name = "perplexity", of = simplex.perplexity },
  { name = "ppl", of = simplex.ppl },
  { name = "knn-l2", of = function(p) return (simplex.knn(p, { k = K, metric = "l2" })) end },
  { name = "knn-ce", of = function(p) return (simplex.knn(p, { k = K, metric = "ce" })) end },
  { name = "entropy", of = function(p) return simplex.entropy(p):mean() end },
  { name = "max_p", of = function(p) return simplex.max_p(p):mean() end },
}

-- Scores `draws` samples of n points of every distribution. Gives score → distribution → { mean, standard deviation }.
local function score_distributions(n, draws)
  local out = {}
  for _, score in ipairs(SCORES) do out[score.name] = {} end
  for _, name in ipairs(simplex.names) do
    local sums = {}
    for _ = 1, draws do
      vx.step(function()
        local p = simplex.named(name, n)
        for i, score in ipairs(SCORES) do
          local v, s = score.of(p):item(), sums[i] or { 0, 0 }
          sums[i] = { s[1] + v, s[2] + v * v }
        end
      end)
    end
    for i, score in ipairs(SCORES) do
      local mean = sums[i][1] / draws
      out[score.name][name] = { mean, math.sqrt(math.max(0, sums[i][2] / draws - mean * mean) * draws / (draws - 1)) }
    end
  end
  return out
end

-- Prints the scores as a table, and writes them to scores.csv.
local function write_scores(scores, n, draws)
  local csv, lines = { "distribution,score,mean,sd,points,draws" }, { ("%-10s"):format "" }
  for _, score in ipairs(SCORES) do lines[1] = lines[1] .. ("%18s"):format(score.name) end
  for _, name in ipairs(simplex.names) do
    local line = ("%-10s"):format(name)
    for _, score in ipairs(SCORES) do
      local s = scores[score.name][name]
      line = line .. ("%18s"):format(("%.3f (%.3f)"):format(s[1], s[2]))
      csv[#csv + 1] = ("%s,%s,%.6g,%.6g,%d,%d"):format(name, score.name, s[1], s[2], n, draws)
    end
    lines[#lines + 1] = line
  end
  core.write_file(flags.out .. "/scores.csv", table.concat(csv, "\n") .. "\n")
  io.write(("Mean (standard deviation) of %d draws of %d points, K = %d:\n%s\n"):format(draws, n, K,
    table.concat(lines, "\n")))
end

-- Draws a score as one bar a distribution, with its standard deviation.
local function draw_scores(ax, scores, title, ylabel)
  local means, sds, colors = {}, {}, {}
  for i, name in ipairs(simplex.names) do
    means[i], sds[i], colors[i] = scores[name][1], scores[name][2], STYLES[name].color
  end
  return ax:bar(simplex.names, means, { errors = sds, colors = colors }):set { title = title, ylabel = ylabel }
end

local function figure1()
  local n, draws = 100, flags.quick and 3 or 50
  local scores = score_distributions(n, draws)
  write_scores(scores, n, draws)
  local fig = plot.figure { width = 1150, height = 400, cols = 3 }
  local ax = fig:simplex(1)
  for _, name in ipairs { "uniform", "centered", "vertices", "collapsed" } do
    local style = STYLES[name]
    ax:scatter(simplex.named(name, n), { label = name, color = style.color, marker = style.marker, size = 5.5 })
  end
  ax:set { title = "A  Distributions on the simplex", legend = "upper right" }
  draw_scores(fig:axes(2), scores.perplexity, "B  Perplexity of the mean", "exp H, maximized"):set { ylim = { 0, 3.2 } }
  draw_scores(fig:axes(3), scores["knn-ce"], ("C  KNN distance, K = %d"):format(K), "cross-entropy (nats), minimized")
  save(fig, "figure1")
end

-- -- Figure 2 ---------------------------------------------------------------------------------------------------------

local function figure2()
  local fig = plot.figure { width = 1050, height = 330, cols = 3 }
  for i, alpha in ipairs { 0.5, 1, 2 } do
    fig:simplex(i):density(function(p) return simplex.log_density(p, alpha):exp() end,
      { range = { 0, 6 }, parts = flags.quick and 24 or 200 })
      :set { title = "α = " .. alpha, color_bar = i == 3, color_label = "density" }
  end
  save(fig, "figure2")
end

-- -- The regularizers alone -------------------------------------------------------------------------------------------

-- K M = N, as in the paper's settings: as many neighbours as there are points.
local REGULARIZERS = {
  { name = "ppl", of = function(p) return simplex.ppl(p) end },
  { name = "KNN-L2", of = function(p) return (simplex.knn(p, { k = p:size(1) / 3, metric = "l2" })) end },
  { name = "KNN-CE", of = function(p) return (simplex.knn(p, { k = p:size(1) / 3, metric = "ce" })) end },
}

-- Gives the points of the simplex nearest to the rows of x (N,M), which sum to 1. Newton's method finds what to take
-- off every coordinate; it ends after M steps.
local function project(x)
  for _ = 1, x:size(2) do
    local y = vx.clamp(x, 0, math.huge)
    x = x - (vx.sum(y, 2, true) - 1) / vx.sum(vx.lt(vx.zeros { 1 }, x), 2, true)
  end
  return vx.clamp(x, 0, 1)
end

-- Gives the steps (N,M) of projected gradient descent on the points p, each of the length `step` before it is
-- projected, and the lengths (N) of the gradients within the plane of the simplex.
local function pushes(p, regularizer, step)
  local x = p:clone()
  x.requires_grad = true
  regularizer.of(x):backward()
  return vx.no_grad(function()
    local g = x.grad - vx.mean(x.grad, 2, true)
    local length = vx.sum(g:square(), 2, true):sqrt()
    return project(p - g * step / vx.clamp(length, 1e-12, math.huge)) - p, length:reshape { p:size(1) }
  end)
end

local function gradients()
  local n = flags.quick and 60 or 150
  local fig = plot.figure { width = 1050, height = 690, rows = 2, cols = 3 }
  for row, name in ipairs { "uniform", "collapsed" } do
    local p = simplex.named(name, n)
    for col, regularizer in ipairs(REGULARIZERS) do
      vx.step(function()
        local step, length = pushes(p, regularizer, 0.12)
        fig:simplex(row, col, { ticks = 0 })
          :arrows(p, step, { width = 1.2, values = length, range = { 1e-4, 1 }, log = true })
          :scatter(p, { size = 2.5, color = DARK, alpha = 1 })
          :set { title = ("%s, %s points"):format(regularizer.name, row == 1 and "spread" or "collapsed"),
            color_bar = col == 3, color_label = "length of the gradient in p" }
      end)
    end
  end
  save(fig, "gradients")
end

-- Moves points by the regularizer alone: Adam on their logits. Gives the points (N,M) after each of the numbers of
-- steps in `stops`.
local function descend(start, regularizer, stops)
  local frames, step = {}, 0
  local logits = vx.keep(vx.log(vx.clamp(start, 1e-6, 1)))
  logits.requires_grad = true
  local optimizer = vx.optim.AdamW({ logits }, { betas = { 0.9, 0.99 }, weight_decay = 0 })
  for i, stop in ipairs(stops) do
    while step < stop do
      vx.step(function()
        optimizer:zero_grad()
        regularizer.of(vx.softmax(logits, 2)):backward()
        optimizer:step(0.02)
      end)
      step = step + 1
    end
    frames[i] = vx.no_grad(vx.softmax, logits, 2)
  end
  return frames
end

-- Draws a sheet of frames: a row for each regularizer, a column for each number of steps. A point has in all of them
-- the colour of the vertex that it is nearest to at the end.
local function motion(name)
  local n, stops = flags.quick and 30 or 300, flags.quick and { 0, 5, 10 } or { 0, 25, 50, 100, 200, 400 }
  local fig = plot.figure { width = 190 * #stops + 20, height = 610, rows = #REGULARIZERS, cols = #stops, scale = 1.5 }
  local start = simplex.named(name, n)
  for row, regularizer in ipairs(REGULARIZERS) do
    local frames = descend(start, regularizer, stops)
    local codes = vx.argmax(frames[#frames]):totable()
    for col, frame in ipairs(frames) do
      local rows, ax = frame:totable(), fig:simplex(row, col, { ticks = 0 })
      for m, color in ipairs { BLUE, ORANGE, GREEN } do
        local own = {}
        for i, p in ipairs(rows) do
          if codes[i] == m - 1 then own[#own + 1] = p end
        end
        if #own > 0 then
          ax:scatter(own, { color = color, marker = ({ "circle", "triangle", "square" })[m], size = 3.5, alpha = 0.7 })
        end
      end
      ax:set { title = ("%s, step %d"):format(regularizer.name, stops[col]) }
    end
  end
  save(fig, "motion-" .. name)
end

-- -- All of them ------------------------------------------------------------------------------------------------------

vx.runs.program(function()
  vx.seed(flags.seed)
  vx.runs.make_folders(flags.out)
  figure1()
  figure2()
  gradients()
  for _, name in ipairs { "uniform", "collapsed" } do motion(name) end
end)
