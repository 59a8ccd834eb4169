--- metrics/moments: mean and covariance of any number of rows in float64, and from two such the Fréchet distance [1],
-- which of Inception features is the FID.
--
--   d = |m_1 - m_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^1/2,   S with the divisor n - 1
--
-- Rows are centred block by block, and blocks are joined by Chan's formula, so that nothing cancels; blocks are cut by
-- the rows' count alone, so that neither batches nor questions in between change a bit. The trace of the root is the
-- sum of the roots of the eigenvalues of S_1 S_2, and no root of a matrix is taken. Where both sets have no more rows
-- than features these roots are the singular values of F_1 F_2' for the centred rows F, which squares nothing; where
-- one has, they are those of the eigenvalues of F_1 S_2 F_1'.
--
-- [1] Dowson and Landau 1982, The Fréchet distance between multivariate normal distributions; Heusel et al. 2017

local arguments = require "vertex.arguments"
local check = require "vertex.check"
local core = require "vertex.core"
local ops = require "vertex.ops"

local fail, float64, shape_text = core.fail, core.float64, core.shape_text

local LEAST_BLOCK = 256 -- rows of a block, where there are fewer features: products of fewer are slow

local Moments = {}
Moments.__index = Moments

--- Joins centred rows with what there is of blocks: { count, mean (1,D), sum (D,D) of products }.
-- @return the mean of the rows
local function join(whole, rows)
  local mean = float64.mean_row(rows)
  float64.add_to_rows(rows, -1, mean)
  float64.add_gram(whole.sum, 1, rows)
  local n, m = whole.count, rows.rows
  local step = float64.copy(mean)
  float64.add_to_rows(step, -1, whole.mean)
  if n > 0 then float64.add_gram(whole.sum, n * m / (n + m), step) end
  float64.add_to_rows(whole.mean, m / (n + m), step)
  whole.count = n + m
end

--- Takes in rows.
-- @param x tensor f32 (N,D), on any device
-- @return the moments themselves
-- @raise where x has another shape or dtype, or holds a NaN or Inf; nothing of it is counted then
function Moments:add(x)
  if x:dim() ~= 2 or x:size(2) ~= self.features then
    fail("moments: x %s should have the shape (N,%d)", shape_text(x), self.features)
  end
  if x:dtype() ~= "f32" then fail("moments: x %s is %s, expected f32", shape_text(x), x:dtype()) end
  x = x:detach()
  local bad, row = ops.nonfinite(x)
  if bad > 0 then
    fail("moments: %d of %d rows hold a NaN or Inf, the first of them row %d (0-based)", bad, x:size(1), row)
  end
  local taken, N, block = 0, x:size(1), self.block
  while taken < N do
    if self.waiting == block.rows then -- not before, so that as many rows as features are there as they came
      join(self.whole, block)
      self.waiting = 0
    end
    local count = math.min(N - taken, block.rows - self.waiting)
    core.step(function() float64.read_rows(block, self.waiting, ops.narrow(x, 1, taken + 1, count)) end)
    self.waiting, taken = self.waiting + count, taken + count
  end
  if N > 0 then self.joined, self.scaled = nil, nil end
  return self
end

--- Says how many rows came.
-- @return integer
function Moments:count() return self.whole.count + self.waiting end

--- All that came: { count, mean, sum }; the block goes on waiting.
local function joined(self)
  if self:count() < 1 then fail("moments: of no rows") end
  if not self.joined then
    local whole = { count = self.whole.count, mean = float64.copy(self.whole.mean), sum = float64.copy(self.whole.sum) }
    if self.waiting > 0 then join(whole, float64.copy(self.block, self.waiting)) end
    self.joined = whole
  end
  return self.joined
end

--- The covariance, a matrix of core.
local function scaled_sum(self)
  local whole = joined(self)
  if whole.count < 2 then fail("moments: a covariance of 1 row, expected 2 or more") end
  local s = float64.copy(whole.sum)
  float64.scale(s, 1 / (whole.count - 1))
  return s
end

--- The centred rows over sqrt(n - 1), where there are no more than features; else nil.
local function few_rows(self)
  if self.whole.count > 0 or self.waiting > self.features then return nil end
  local rows = float64.copy(self.block, self.waiting)
  float64.add_to_rows(rows, -1, joined(self).mean)
  float64.scale(rows, 1 / math.sqrt(self.waiting - 1))
  return rows
end

--- Gives the mean of the rows.
-- @return array of D numbers (float64)
-- @raise where no rows came
function Moments:mean() return float64.to_tables(joined(self).mean)[1] end

--- Gives the covariance of the rows, with the divisor n - 1.
-- @return array of D arrays of D numbers (float64)
-- @raise where fewer than two rows came
function Moments:covariance() return float64.to_tables(scaled_sum(self), true) end

--- Says over how many directions the rows spread: the participation ratio of the covariance's eigenvalues,
-- (sum l)^2 / sum l^2.
-- @return number from 1 to D; 0 where all rows are the same
-- @raise where fewer than two rows came
function Moments:effective_rank()
  local s = scaled_sum(self)
  local trace, squares = float64.trace(s), float64.sum_of_squares(s)
  return squares > 0 and trace * trace / squares or 0
end

--- The sum of the roots of the eigenvalues of S_1 S_2.
local function trace_of_root(a, b)
  local rows_a, rows_b = few_rows(a), few_rows(b)
  local sum, values = 0, nil
  if rows_a and rows_b then
    for _, v in ipairs(float64.singular_values(float64.product_transposed(rows_a, rows_b))) do sum = sum + v end
    return sum
  end
  if not rows_a and not rows_b then
    values = float64.product_eigenvalues(scaled_sum(a), scaled_sum(b))
      or float64.product_eigenvalues(scaled_sum(b), scaled_sum(a))
  end
  if not values then
    local rows = rows_a or rows_b or float64.factor(scaled_sum(a))
    local product = float64.product_symmetric(rows, scaled_sum(rows_b and a or b))
    values = float64.symmetric_eigenvalues(float64.product_transposed(product, rows))
  end
  for _, v in ipairs(values) do sum = sum + math.sqrt(math.max(v, 0)) end
  return sum
end

--- Computes the Fréchet distance between Gaussians with these moments. With fewer rows than features it is biased
-- upwards, strongly so with few.
-- @param other object, moments of as many features
-- @return number of 0 or more; what rounding puts below 0 is 0
-- @raise where the features differ in number, or one side has fewer than two rows
function Moments:frechet(other)
  if getmetatable(other) ~= Moments then fail("frechet: a %s, expected moments", type(other)) end
  if other.features ~= self.features then
    fail("frechet: moments of %d features and of %d", self.features, other.features)
  end
  for _, m in ipairs { self, other } do
    if m:count() < 2 then fail("frechet: moments of %d rows, expected 2 or more", m:count()) end
  end
  local d, from, to = 0, self:mean(), other:mean()
  for i = 1, self.features do d = d + (from[i] - to[i]) ^ 2 end
  for _, m in ipairs { self, other } do
    d = d + float64.trace(joined(m).sum) / (m:count() - 1)
  end
  return math.max(0, d - 2 * trace_of_root(self, other))
end

arguments.guard_class("moments", Moments)

local metrics = {}

--- Makes an accumulator of mean and covariance in float64. It takes some 24 D^2 bytes, however many rows come.
-- @param features integer D, the numbers of a row
-- @return moments with :add(x), :count(), :mean(), :covariance(), :frechet(other)
-- @raise where features is no integer from 1 to 32768
function metrics.new(features)
  check.integer("moments", "features", features, 1, 2 ^ 15)
  local block = float64.matrix(math.max(features, LEAST_BLOCK), features)
  local whole = { count = 0, mean = float64.matrix(1, features), sum = float64.matrix(features, features) }
  return setmetatable({ features = features, waiting = 0, block = block, whole = whole }, Moments)
end

--- Computes the Fréchet distance between the Gaussians that have the mean and covariance of two sets of features; of
-- Inception features it is the FID. With fewer rows than features it is biased upwards, strongly so with few.
-- @param a tensor f32 (N,D)
-- @param b tensor f32 (M,D)
-- @return number of 0 or more
-- @raise where the shapes do not fit, a set has fewer than two rows, or a row holds a NaN or Inf
function metrics.frechet(a, b)
  for _, x in ipairs { a, b } do
    if x:dim() ~= 2 or x:size(2) == 0 then fail("frechet: x %s, expected a tensor (N,D)", shape_text(x)) end
  end
  if a:size(2) ~= b:size(2) then
    fail("frechet: a %s and b %s disagree on the number of features", shape_text(a), shape_text(b))
  end
  return metrics.new(a:size(2)):add(a):frechet(metrics.new(b:size(2)):add(b))
end

return metrics
