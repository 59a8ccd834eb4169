--- Codes as moving averages of the rows that chose them [1, appendix A.1], instead of a codebook loss.
--
--   quantized = the nearest code before this step's update; the gradient reaches the rows alone, straight through or by
--   the rotation trick [2]
--   loss      commitment mean((x - sg q)^2), the mean over rows and columns; under cosine x and q are of unit length
--   update    of each code from the rows that chose it, their count n and sum s, with a = 1 - decay:
--             cluster_size += a (n - cluster_size),  embed_avg += a (s - embed_avg),
--             codebook = embed_avg / ((cluster_size + eps) / (S + M eps) S),  S = sum of cluster_size;
--             under cosine scaled to unit length
--   replace   codes of which cluster_size is below `threshold`, dead ones, become rows of the batch or copies of codes
--             in use. They wait for 1 / (1 - decay) steps, since the averages begin at 1. With fewer than `threshold`
--             rows per code in a step most codes are dead by that measure, those in use among them, for ever: said once
-- Counts, sums and the rows that dead codes become are those of all ranks.
-- Agrees with the package vector-quantize-pytorch 1.32, whose default estimator is the rotation trick.
--
-- [1] van den Oord et al. 2017, Neural discrete representation learning   [2] Fifty et al. 2025

local check = require "vertex.check"
local core = require "vertex.core"
local dist = require "vertex.dist"
local nn = require "vertex.nn"
local ops = require "vertex.ops"
local registry = require "vertex.quantizers"

local Ema = registry.Quantizer.extend "EmaQuantizer"

--- Checks the options and makes the buffers cluster_size (G,M) and embed_avg (G,M,D); the codebook is one too.
-- @param options table of the method's options
-- @raise where one is not what it should be
function Ema:setup(options)
  check.number("quantizer", "decay", options.decay, 0, math.huge)
  if options.decay >= 1 then core.fail("quantizer: decay is %g, expected less than 1", options.decay) end
  check.number("quantizer", "eps", options.eps, 0, math.huge)
  check.number("quantizer", "commitment", options.commitment, 0, math.huge)
  check.number("quantizer", "threshold", options.threshold, 0, math.huge)
  check.choice("quantizer", "estimator", options.estimator, { "ste", "rotation" })
  if options.replace then check.choice("quantizer", "replace", options.replace, { "batch", "used" }) end
  self.graphs = not options.replace -- which codes are dead is decided on the host
  if self.facts.metric == "cosine" then self.codebook = core.keep(self.unit(self.codebook):detach()) end
  self.codebook.requires_grad = false
  self.cluster_size = nn.buffer({ options.groups, options.codes }, 1)
  self.embed_avg = nn.buffer(self.codebook:shape()):copy(self.codebook)
  self.how = { metric = self.facts.metric, estimator = options.estimator, beta = 0, reduction = "mean",
    codebook_grad = false }
end

--- Lets the averages begin at the codes that the option start has fitted.
function Ema:fitted() self.embed_avg:copy(self.codebook) end

--- Quantizes in training; base.lua says what comes back.
-- @param z tensor f32 (N,G,D)
-- @return table with the term commitment
function Ema:quantize(z)
  -- a copy: learn moves the codes before backward looks at them
  local y, _, codes = ops.quantize_hard(z, self.codebook:clone(), self.how)
  local x = self.facts.metric == "cosine" and self.unit(z) or z
  local loss = ops.mse(x, self:lookup(codes):detach())
  return { quantized = y, codes = codes, terms = { commitment = ops.affine(loss, self.options.commitment, 0) } }
end

local function approach(average, value, decay)
  average:copy(ops.add(average, ops.affine(ops.sub(value, average), 1 - decay, 0)))
end

--- Moves the averages, and the codes to them.
-- @param z tensor f32 (N,G,D)
-- @param output table that quantize gave
function Ema:learn(z, output)
  local o, x = self.options, z:detach()
  local G, M, D = o.groups, o.codes, z:size(3)
  if self.facts.metric == "cosine" then x = self.unit(x) end
  local sum = self.row_sums(x, self:flat_codes(output.codes), G * M)
  local counts = ops.count_codes(output.codes, M)
  if dist.size() > 1 then
    dist.all_reduce(sum)
    dist.all_reduce(counts)
  end
  approach(self.cluster_size, counts:to "f32", o.decay)
  approach(self.embed_avg, ops.reshape(sum, { G, M, D }), o.decay)
  local total = ops.sum(self.cluster_size, 2, true)
  local smoothed = ops.mul(ops.div(ops.affine(self.cluster_size, 1, o.eps), ops.affine(total, 1, M * o.eps)), total)
  local codebook = ops.div(self.embed_avg, ops.reshape(smoothed, { G, M, 1 }))
  self.codebook:copy(self.facts.metric == "cosine" and self.unit(codebook) or codebook)
  if o.replace and self.steps >= 1 / (1 - o.decay) then self:replace_dead(dist.gather_rows(x)) end
end

--- Draws from 0 .. n-1 without repetition.
-- @param n whole number
-- @param count how many, at most n
-- @return array of whole numbers
function Ema:draw(n, count)
  local order, drawn = ops.permutation(n, self.generator, { device = "cpu" }):totable(), {}
  for i = 1, count do drawn[i] = order[i] end
  return drawn
end

--- Puts rows of the batch, or copies of codes in use, in the place of dead codes: no more of them than there are rows,
-- or codes in use, so that no two dead codes become the same.
-- @param x tensor f32 (N,G,D), the rows that count, of unit length under cosine
function Ema:replace_dead(x)
  local o, sizes = self.options, self.cluster_size:totable()
  local G, M, D, N = o.groups, o.codes, x:size(3), x:size(1)
  if N < o.threshold * M and not self.told and dist.rank() == 0 then
    self.told = true
    io.stderr:write(("%s: %d rows a step for %d codes, %.3g for each: below the threshold of %g, so that codes in use "
      .. "are replaced again and again\n"):format(self.label, N, M, N / M, o.threshold))
  end
  local source, fresh, replaced = {}, {}, false -- source[i]: row of the codebooks, then of x, that code i becomes
  for g = 1, G do
    local dead, used = {}, {}
    for m = 1, M do
      local flat = (g - 1) * M + m - 1
      source[flat + 1], fresh[flat + 1] = flat, 0
      if sizes[g][m] < o.threshold then dead[#dead + 1] = m else used[#used + 1] = flat end
    end
    local pool = o.replace == "batch" and N or #used
    for i, drawn in ipairs(#dead > 0 and self:draw(pool, math.min(#dead, pool)) or {}) do
      local flat = (g - 1) * M + dead[i]
      source[flat] = o.replace == "batch" and G * M + drawn * G + g - 1 or used[drawn + 1]
      sizes[g][dead[i]], fresh[flat], replaced = o.threshold, 1, true
    end
  end
  if not replaced then return end
  local on = { device = x:device() }
  local candidates = ops.cat(1, ops.reshape(self.codebook, { G * M, D }), ops.reshape(x, { N * G, D }))
  local rows = ops.gather(candidates, core.tensor(source, { dtype = "i32", device = x:device() }))
  self.codebook:copy(ops.reshape(rows, { G, M, D }))
  self.cluster_size:copy(core.tensor(sizes, on))
  local new = ops.reshape(core.tensor(fresh, on), { G, M, 1 })
  self.embed_avg:copy(ops.add(ops.mul(ops.affine(new, -1, 1), self.embed_avg),
    ops.mul(new, ops.affine(self.codebook, o.threshold, 0))))
end

return {
  order = 40,
  kind = "hard",
  codebook = true,
  names = {
    { name = "ema-euclid", summary = "straight-through, codes as moving averages of their rows", metric = "euclid",
      estimator = "ste" },
    { name = "ema-cosine", summary = "straight-through on the sphere, codes as moving averages of their rows",
      metric = "cosine", estimator = "ste" },
  },
  paper = "van den Oord et al. 2017",
  options = {
    { name = "decay", default = 0.8, meaning = "share of the old average that stays in a step" },
    { name = "eps", default = 1e-5, meaning = "Laplace smoothing of the codes' sizes" },
    { name = "commitment", default = 1, meaning = "weight of mean((x - sg q)^2)" },
    { name = "estimator", default = "ste", meaning = "of the rows' gradient: \"ste\" or \"rotation\"" },
    { name = "replace", default = false,
      meaning = "what dead codes become: \"batch\" (random rows), \"used\" (copies of codes in use); false: none" },
    { name = "threshold", default = 2, meaning = "a code is dead where fewer rows a step choose it on average; a step "
      .. "needs several times as many rows per code" },
  },
  class = Ema,
}
