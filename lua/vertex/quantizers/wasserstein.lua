--- Codes with the distribution of the rows [1]: ste-euclid, and the Wasserstein distance between the Gaussians of rows
-- and codes as a loss that moves the codes alone.
--
--   W^2  = |m_x - m_e|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2 for the means m and the covariances A of the rows and
--          B of the codes
--   loss = that of ste-euclid, with means, + distance_weight W
-- As published: divisor n - 1; 1e-6 is added to the diagonals of A and B, 1e-8 to the eigenvalues under both inner
-- roots, 1e-10 under the outer one. With S = A^1/2 and S B S = V diag(l) V', the gradient in closed form is
--   dW^2/dB = I - S V diag(l + 1e-8)^-1/2 V' S,   de_j = (dW^2/dB (e_j - m_e) / (M - 1) - (m_x - m_e) / M) / W
-- The rows are those of the batch and of a queue of past ones. Eigenvectors are found on the host, in float64, so that
-- no graph can be recorded. With groups the loss is the mean over them.
--
-- [1] Fang et al. 2025, Vector quantization by distribution matching

local check = require "vertex.check"
local core = require "vertex.core"
local dist = require "vertex.dist"
local hard = require "vertex.quantizers.hard"
local nn = require "vertex.nn"
local ops = require "vertex.ops"
local tape = require "vertex.tape"

local Wasserstein = nn.module("WassersteinQuantizer", hard.class)

Wasserstein.graphs = false
Wasserstein.plain_state = { "queued", unpack(hard.class.plain_state) }

local DIAGONAL, INNER, OUTER = 1e-6, 1e-8, 1e-10 -- added as published

--- Checks the options and makes the buffer queue (rows, dim).
-- @param options table of the method's options
-- @raise where one is not what it should be
function Wasserstein:setup(options)
  hard.class.setup(self, options)
  check.number("quantizer", "distance_weight", options.distance_weight, 0, math.huge)
  check.integer("quantizer", "queue", options.queue, 1, 2 ^ 24)
  self.queue = nn.buffer { options.queue, options.dim }
  self.queued = 0 -- rows that came so far; the next one's place is that modulo the queue's length
end

--- Takes the rows of a queue that was loaded: those up to the first one of zeros.
function Wasserstein:loaded()
  hard.class.loaded(self)
  local largest = ops.reshape(ops.max(ops.abs(self.queue), 2), { -1 }):totable()
  self.queued = 0
  while largest[self.queued + 1] and largest[self.queued + 1] > 0 do self.queued = self.queued + 1 end
end

-- -- The distance, in float64 -----------------------------------------------------------------------------------------

--- Product of two n x n matrices, nested tables.
local function product(a, b)
  local n, c = #a, {}
  for i = 1, n do
    local row = {}
    for j = 1, n do
      local sum = 0
      for k = 1, n do sum = sum + a[i][k] * b[k][j] end
      row[j] = sum
    end
    c[i] = row
  end
  return c
end

--- The matrix with the same eigenvectors whose eigenvalues are f of these.
local function with_eigenvalues(values, vectors, f)
  local n, y = #values, {}
  for i = 1, n do
    y[i] = {}
    for j = 1, n do y[i][j] = 0 end
  end
  for k = 1, n do
    local x, v = f(values[k]), vectors[k]
    for i = 1, n do
      for j = 1, n do y[i][j] = y[i][j] + x * v[i] * v[j] end
    end
  end
  return y
end

--- Rows (n,D): their mean (1,D), the rows less that, and the covariance as a nested table, with 1e-6 on its diagonal.
local function moments(rows)
  local mean = ops.mean(rows, 1, true)
  local centered = ops.sub(rows, mean)
  local covariance = ops.matmul(core.contiguous(ops.transpose(centered, 1, 2)), centered)
  covariance = ops.affine(covariance, 1 / math.max(1, rows:size(1) - 1), 0):totable()
  for i = 1, #covariance do covariance[i][i] = covariance[i][i] + DIAGONAL end
  return mean, centered, covariance
end

--- The distance W of rows (n,D) and codes (M,D), a number, and its gradient to the codes (M,D).
local function distance(rows, codes)
  local M, D = codes:size(1), codes:size(2)
  local row_mean, _, A = moments(rows)
  local code_mean, centered, B = moments(codes)
  local between = ops.sub(row_mean, code_mean)
  local values, vectors = core.symmetric_eigen(A)
  local root = with_eigenvalues(values, vectors, function(x) return math.sqrt(math.max(0, x) + INNER) end)
  values, vectors = core.symmetric_eigen(product(product(root, B), root))
  local squared = 0
  for _, d in ipairs(ops.reshape(between, { -1 }):totable()) do squared = squared + d * d end
  for i = 1, D do squared = squared + A[i][i] + B[i][i] - 2 * math.sqrt(math.max(0, values[i]) + INNER) end
  local W = math.sqrt(math.max(0, squared) + OUTER)
  local inverse = with_eigenvalues(values, vectors, function(x) return 1 / math.sqrt(math.max(0, x) + INNER) end)
  local slope = product(product(root, inverse), root)
  for i = 1, D do
    for j = 1, D do slope[i][j] = ((i == j and 1 or 0) - slope[i][j]) / (math.max(1, M - 1) * W) end
  end
  local spread = ops.matmul(centered, core.tensor(slope, { device = codes:device() }))
  return W, ops.sub(spread, ops.affine(between, 1 / (M * W), 0))
end

--- The mean distance over the groups of rows (n,G,D) and a codebook (G,M,D), a scalar; its gradient reaches the
-- codebook.
local mean_distance = tape.recorded { name = "wasserstein", outputs = 1,
  forward = function(ctx, codebook, rows)
    local G, M, D = unpack(codebook:shape())
    local sum, gradients = 0, {}
    for g = 1, G do
      local W, gradient = distance(core.contiguous(ops.select(rows, 2, g)),
        core.contiguous(ops.select(codebook, 1, g)))
      sum, gradients[g] = sum + W, ops.reshape(ops.affine(gradient, 1 / G, 0), { 1, M, D })
    end
    ctx.gradient = G == 1 and gradients[1] or ops.cat(1, gradients)
    return core.new({ 1 }, { device = codebook:device() }):fill(sum / G)
  end,
  backward = function(ctx, upstream) return ops.mul(ctx.gradient, ops.reshape(upstream, { 1, 1, 1 })) end,
}

-- -- Quantizing -------------------------------------------------------------------------------------------------------

--- Quantizes in training; base.lua says what comes back.
-- @param z tensor f32 (N,G,D)
-- @return table with the terms commitment, codebook and distance
-- @raise where liblapack.so.3 is not installed
function Wasserstein:quantize(z)
  local output, rows = hard.class.quantize(self, z), dist.gather_rows(z:detach())
  local past = math.min(self.queued, self.options.queue)
  if past > 0 then
    local queue = ops.narrow(self.queue, 1, 1, past)
    rows = ops.cat(1, ops.reshape(queue, { past, z:size(2), z:size(3) }), rows)
  end
  local term = ops.affine(mean_distance(self.codebook, rows), self.options.distance_weight, 0)
  output.terms.distance = term
  output.reg = ops.add(ops.reshape(output.reg, { 1 }), term)
  return output
end

--- Puts the rows into the queue, in place of the oldest.
-- @param z tensor f32 (N,G,D)
function Wasserstein:learn(z)
  z = dist.gather_rows(z:detach())
  local Q, N = self.options.queue, z:size(1)
  local rows = ops.reshape(z, { N, self.options.dim })
  local at = math.max(0, N - Q) -- of more rows than the queue takes the last ones
  while at < N do
    local place = self.queued % Q
    local count = math.min(N - at, Q - place)
    ops.narrow(self.queue, 1, place + 1, count):copy(ops.narrow(rows, 1, at + 1, count))
    at, self.queued = at + count, self.queued + count
  end
end

local options = {
  { name = "distance_weight", default = 0.5, meaning = "weight of the Wasserstein distance" },
  { name = "queue", default = 32768, meaning = "past rows that count for the rows' mean and covariance" },
}
for _, o in ipairs(hard.options) do
  local own = { name = o.name, default = o.default, meaning = o.meaning }
  if o.name == "reduction" then own.default = "mean" end
  options[#options + 1] = own
end

return {
  order = 42,
  kind = "hard",
  metric = "euclid",
  estimator = "ste",
  codebook = true,
  names = { { name = "wasserstein", summary = "straight-through, codes drawn to the rows' mean and covariance" } },
  paper = "Fang et al. 2025",
  options = options,
  class = Wasserstein,
}
