--- kmeans.lua: Lloyd's k-means [1], exact: every iteration assigns each row to its nearest code (ties to the lowest)
-- and moves each code to the mean of its rows. Rows may be a tensor or vectors in files (vx.data.vectors), which are
-- read in blocks and never held.
--
-- A code that no row is nearest to moves to the row farthest from its own code, as scikit-learn does, so that none
-- stays unused while rows differ.
--
-- [1] Lloyd 1982, Least squares quantization in PCM   [2] Arthur and Vassilvitskii 2007, k-means++

local check = require "vertex.check"
local core = require "vertex.core"
local ops = require "vertex.ops"
local tape = require "vertex.tape"

local fail = core.fail

local BLOCK_ROWS = 65536 -- of vectors in files that are looked at at once

-- -- Rows, wherever they are ------------------------------------------------------------------------------------------

--- Calls f(rows (n,D), first) for blocks of all rows, each in a step of its own.
local function each_block(x, f)
  if core.is_tensor(x) then
    core.step(f, x, 0)
    return
  end
  for first = 0, x:size() - 1, BLOCK_ROWS do
    core.step(function() f(x:read(first, math.min(BLOCK_ROWS, x:size() - first)), first) end)
  end
end

local function sizes(x)
  if core.is_tensor(x) then
    if x:dim() ~= 2 or x:dtype() ~= "f32" then
      fail("kmeans: x %s is %s, expected f32 rows (N,D)", core.shape_text(x), x:dtype())
    end
    return x:size(1), x:size(2)
  end
  if type(x) ~= "table" or type(x.read) ~= "function" or type(x.size) ~= "function" then
    fail("kmeans: x is a %s, expected a tensor (N,D) or vectors of vx.data.vectors", type(x))
  end
  return x:size(), x:width()
end

--- The rows with the numbers of `index` (a Lua array, 0-based), as a tensor (#index,D).
local function rows_of(x, index)
  local device = core.is_tensor(x) and x:device() or "cpu"
  local numbers = core.tensor(index, { dtype = "i32", device = device })
  return core.is_tensor(x) and ops.gather(x, numbers) or x:take(numbers)
end

-- -- Where to begin ---------------------------------------------------------------------------------------------------

--- A tensor of rows to choose from: all of a tensor; of vectors in files an even sample of at most `most`.
local function sample(x, most)
  local n = sizes(x)
  if core.is_tensor(x) then return x end
  if n <= most then return x:read(0, n) end
  local index = {}
  for i = 1, most do index[i] = math.floor((i - 1) * n / most) end
  return rows_of(x, index)
end

--- The codebook before the first iteration, (M,D). Fewer rows than codes: rows come again with noise of a thousandth of
-- their spread, so that no two codes are equal.
local function begin(x, codes, how, generator)
  local n = sizes(x)
  local from = sample(x, 64 * codes)
  local rows = math.min(n, from:size(1))
  local count = math.min(codes, rows)
  local index
  if how == "k-means++" then
    index = ops.kmeans_start(from, count, generator)
  else
    index = ops.narrow(ops.permutation(rows, generator, { device = from:device() }), 1, 1, count)
  end
  local first = ops.gather(from, index)
  if count == codes then return first end
  local again = {}
  for i = 1, codes - count do again[i] = (i - 1) % count end
  local copies = ops.gather(first, core.tensor(again, { dtype = "i32", device = from:device() }))
  local spread = ops.mean(ops.abs(ops.sub(first, ops.narrow(first, 1, 1, 1)))):item()
  local noise = ops.normal(core.new_like(copies), 0, math.max(1e-3 * (spread > 0 and spread or 1), 2 ^ -149), generator)
  return ops.cat(1, first, ops.add(copies, noise))
end

-- -- One iteration ----------------------------------------------------------------------------------------------------

--- Codes i32 (n) of rows (n,D).
local function nearest(rows, codebook)
  local n, D, M = rows:size(1), rows:size(2), codebook:size(1)
  return ops.reshape(ops.assign(ops.reshape(rows, { n, 1, D }), ops.reshape(codebook, { 1, M, D }), "euclid"), { n })
end

--- The sum, over dimension 2 or all, of squared differences times scale^2; an offset costs nothing, and by `scale`, a
-- power of two, squares stay within float32's range.
local function squares(difference, scale, dimension)
  if scale ~= 1 then difference = ops.affine(difference, scale, 0) end
  return ops.sum(ops.square(difference), dimension)
end

--- Squared distances (n) of rows from their codes, times scale^2.
local function distances(rows, codebook, codes, scale)
  return squares(ops.sub(rows, ops.gather(codebook, codes)), scale, 2)
end

--- The `count` rows farthest from their codes, as a Lua array of numbers from 0.
local function farthest(x, codebook, count, scale)
  local all = {}
  each_block(x, function(rows, first)
    for i, d in ipairs(distances(rows, codebook, nearest(rows, codebook), scale):totable()) do
      all[#all + 1] = { first + i - 1, d }
    end
  end)
  table.sort(all, function(a, b) return a[2] > b[2] or (a[2] == b[2] and a[1] < b[1]) end)
  local index = {}
  for i = 1, math.min(count, #all) do
    if all[i][2] > 0 then index[#index + 1] = all[i][1] end
  end
  return index
end

--- Moves the codes to the means of their rows, in place; returns how far they moved, the sum of squares times scale^2,
-- and how many had no row.
local function move(x, codebook, scale)
  local M = codebook:size(1)
  local sums = core.new_like(codebook):zero()
  local counts = core.new({ 1, M }, { dtype = "i32", device = codebook:device() }):zero()
  each_block(x, function(rows)
    local codes = nearest(rows, codebook)
    core.op.scatter_add(sums, ops.sub(rows, ops.gather(codebook, codes)), codes) -- small next to a common offset
    ops.count_codes(ops.reshape(codes, { -1, 1 }), M, counts)
  end)
  local count = ops.reshape(counts:to "f32", { M, 1 })
  local new = ops.add(codebook, ops.div(sums, ops.clamp(count, 1, math.huge)))
  local empty, numbers = {}, count:reshape({ M }):totable()
  for m = 1, M do
    if numbers[m] == 0 then empty[#empty + 1] = m - 1 end
  end
  if #empty > 0 then
    local rows = farthest(x, new, #empty, scale)
    if #rows > 0 then
      local stays, taken = {}, {}
      for m = 1, M do stays[m] = { 1 } end
      for i = 1, #rows do stays[empty[i] + 1][1], taken[i] = 0, empty[i] end
      new = ops.mul(new, core.tensor(stays, { device = codebook:device() }))
      local places = core.tensor(taken, { dtype = "i32", device = codebook:device() })
      core.op.scatter_add(new, rows_of(x, rows), places)
    end
  end
  local moved = squares(ops.sub(new, codebook), scale):item()
  codebook:copy(new)
  return moved, #empty
end

local OPTIONS = { start = { "any", "k-means++" }, iterations = { "whole", 100 }, tolerance = { "number", 1e-4 },
  seed = { "any", 1 }, progress = { "any", false } }

local function check_options(options)
  local o = check.options("kmeans", options, OPTIONS)
  if not core.is_tensor(o.start) and o.start ~= "k-means++" and o.start ~= "random" then
    fail("kmeans: start is %s, expected \"k-means++\", \"random\" or a tensor (M,D)", check.show(o.start))
  end
  check.number("kmeans", "tolerance", o.tolerance, 0, math.huge)
  return o
end

--- Finds a codebook by Lloyd's k-means.
-- @param x tensor f32 (N,D), or table that vx.data.vectors gives, of vectors in files
-- @param codes number of codes M; fewer rows than codes: rows come again, with a little noise
-- @param[opt] options {start = "k-means++", "random" (rows) or a tensor (M,D); iterations = 100, at most; tolerance =
-- 1e-4: it ends when the codes' squared movement, summed, is less than that times the mean variance of a coordinate;
-- seed = 1; progress: function(iteration, moved) called after each, which ends it by returning true}
-- @return {codebook f32 (M,D), codes i32 (N), objective (mean squared distance of a row from its code, summed over D),
-- iterations, empty (codes without a row in the last iteration), repeated (codes that began as copies)}
-- @raise where x holds a NaN or Inf, has no row, or an option is unknown
local function kmeans(x, codes, options)
  local o = check_options(options)
  local N, D = sizes(x)
  check.integer("kmeans", "codes", codes, 1)
  if N == 0 or D == 0 then fail("kmeans: x has %d rows of %d numbers", N, D) end
  local device = core.is_tensor(x) and x:device() or core.device()
  local codebook = core.new({ codes, D }, { device = device })
  local result = { codebook = codebook, iterations = 0, empty = 0, repeated = math.max(0, codes - N) }
  return tape.no_grad(function()
    core.step(function()
      if core.is_tensor(o.start) then
        codebook:copy(o.start)
      else
        codebook:copy(begin(x, codes, o.start, core.generator(o.seed)))
      end
    end)
    local scale, variance = 1, nil
    core.step(function()
      local rows = sample(x, BLOCK_ROWS)
      rows = ops.sub(rows, ops.narrow(rows, 1, 1, 1))
      local largest = ops.max(ops.abs(rows)):item()
      if largest > 1e15 or (largest > 0 and largest < 1e-12) then
        scale = 2 ^ -math.max(-126, math.min(126, select(2, math.frexp(largest))))
        rows = ops.affine(rows, scale, 0)
      end
      variance = ops.mean(ops.square(ops.sub(rows, ops.mean(rows, 1, true)))):item()
    end)
    for iteration = 1, o.iterations do
      local moved
      core.step(function() moved, result.empty = move(x, codebook, scale) end)
      result.iterations = iteration
      if moved <= o.tolerance * variance or core.interrupted() then break end
      if o.progress and o.progress(iteration, moved) then break end
    end
    local all, objective = core.new({ N }, { dtype = "i32", device = device }), 0
    each_block(x, function(rows, first)
      local found = nearest(rows, codebook)
      objective = objective + ops.sum(distances(rows, codebook, found, scale)):item()
      ops.narrow(all, 1, first + 1, found:size(1)):copy(found)
    end)
    result.codes, result.objective = all, objective / scale / scale / N
    return result
  end)
end

return kmeans
