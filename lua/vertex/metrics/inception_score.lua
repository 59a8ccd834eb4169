--- metrics/inception_score: the Inception Score [1] of class logits, of which it keeps sums alone.
--
--   IS = exp mean_n KL(p(y|x_n) || p(y)) = exp(H(mean p) - mean H(p))
--
-- for each split of the images; the score is the mean over the splits, with their standard deviation (population).
-- Image j belongs to split i where floor(i N / splits) <= order[j] < floor((i + 1) N / splits), order a random
-- permutation.
--
-- [1] Salimans et al. 2016, Improved techniques for training GANs

local arguments = require "vertex.arguments"
local check = require "vertex.check"
local core = require "vertex.core"
local ops = require "vertex.ops"

local fail, shape_text = core.fail, core.shape_text

local OPTIONS = { splits = { "count", 10 }, seed = { "any", 1 } }

local Score = {}
Score.__index = Score

--- Takes in the logits of the next images.
-- @param logits tensor f32 (N,C)
-- @return the score itself
-- @raise where the shape does not fit, more images come than were announced, or a logit is NaN
function Score:add(logits)
  if not core.is_tensor(logits) or logits:dim() ~= 2 or logits:size(2) == 0 then
    fail("inception_score: %s, expected a tensor (N,C)",
      core.is_tensor(logits) and "logits " .. shape_text(logits) or "a " .. type(logits))
  end
  local N, C, splits = logits:size(1), logits:size(2), #self.splits
  if C ~= (self.classes or C) then
    fail("inception_score: logits %s after logits of %d classes", shape_text(logits), self.classes)
  end
  if self.came + N > self.images then
    fail("inception_score: %d images, of which %d were announced", self.came + N, self.images)
  end
  local bad, row = ops.nonfinite(logits)
  if bad > 0 then fail("inception_score: logits with a NaN or Inf, first in row %d (0-based)", row) end
  if N == 0 then return self end
  self.classes = C
  core.step(function()
    local weights = {} -- (splits,N): 1 where the image belongs to the split
    for i = 1, splits do weights[i] = {} end
    for n = 1, N do
      local own = self.split_of[self.came + n]
      for i = 1, splits do weights[i][n] = i == own and 1 or 0 end
      self.splits[own].count = self.splits[own].count + 1
    end
    local log_p = ops.log_softmax(logits:detach())
    local p = ops.exp(log_p)
    local of_splits = core.tensor(weights, { device = logits:device() })
    local function sum(x) return core.autocast("f32", ops.matmul, of_splits, x):totable() end
    local sums, entropies = sum(p), sum(ops.sum(ops.mul(p, log_p), 2, true))
    for i, split in ipairs(self.splits) do
      split.negative_entropy = split.negative_entropy + entropies[i][1]
      for c = 1, C do split.p[c] = (split.p[c] or 0) + sums[i][c] end
    end
  end)
  self.came = self.came + N
  return self
end

--- Computes the score of the images that came.
-- @return mean over the splits, their standard deviation (population)
-- @raise where fewer images came than were announced
function Score:score()
  if self.came < self.images then
    fail("inception_score: %d images came, of which %d were announced", self.came, self.images)
  end
  local sum, squares, count = 0, 0, #self.splits
  local scores = {}
  for i, split in ipairs(self.splits) do
    local entropy = 0
    for c = 1, self.classes do
      local p = split.p[c] / split.count
      if p > 0 then entropy = entropy - p * math.log(p) end
    end
    scores[i] = math.exp(split.negative_entropy / split.count + entropy)
    sum = sum + scores[i]
  end
  for _, s in ipairs(scores) do squares = squares + (s - sum / count) ^ 2 end
  return sum / count, math.sqrt(squares / count)
end

arguments.guard_class("inception_score", Score)

local metrics = {}

--- Makes an accumulator of the Inception Score [1], which keeps sums for each split and no image's logits.
-- @param images N, how many are going to come: the splits are cut by it
-- @param[opt] options { splits = 10; seed = 1 of the order in which images are dealt to splits, false: as they come }
-- @return score with :add(logits), :score()
-- @raise where there are fewer images than splits
function metrics.new(images, options)
  check.integer("inception_score", "images", images, 1)
  local o = check.options("inception_score", options, OPTIONS)
  if o.splits > images then fail("inception_score: %d images for %d splits", images, o.splits) end
  local splits, split_of, order = {}, {}, nil
  for i = 1, o.splits do splits[i] = { count = 0, negative_entropy = 0, p = {} } end
  if o.seed ~= false then
    order = core.step(function()
      return ops.permutation(images, core.generator(o.seed), { device = "cpu" }):totable()
    end)
  end
  for j = 1, images do
    local at = order and order[j] or j - 1
    -- the split i with floor(i N / splits) <= at
    split_of[j] = math.floor(((at + 1) * o.splits - 1) / images) + 1
  end
  return setmetatable({ images = images, came = 0, splits = splits, split_of = split_of }, Score)
end

--- Computes the Inception Score of class logits.
-- @param logits tensor f32 (N,C)
-- @param[opt] options { splits = 10; seed = 1 of the order in which images are dealt to splits, false: as they come }
-- @return mean over the splits, their standard deviation (population)
-- @raise where logits has another shape, holds a NaN or Inf, or has fewer rows than splits
function metrics.inception_score(logits, options)
  if not core.is_tensor(logits) or logits:dim() ~= 2 then
    fail("inception_score: %s, expected a tensor (N,C)",
      core.is_tensor(logits) and "logits " .. shape_text(logits) or "a " .. type(logits))
  end
  return metrics.new(logits:size(1), options):add(logits):score()
end

return metrics
