--- Smoothed quantization: a code is a point of the simplex, pulled toward its vertices.
--
--   logits   cosine similarity of z and each code over a learnable temperature tau (appendix A.1); pi = softmax(logits)
--   softmax  p = pi
--   sgumbel  p = softmax((log pi + g) / gumbel_tau), g Gumbel noise [1] (Eq. 6, 7)
--   hgumbel  one-hot argmax of that, with sgumbel's gradient (Eq. 8)
--   y = sum_m p_m q_m with the codebook as stored
-- Regularizers, all of pi: ppl 1 - exp(H(mean pi)) / M (Eq. 11, 12; the printed sign would be minimized by collapse);
-- knn-ce and knn-l2 the mean deviation of each vertex's K nearest rows (Eq. 13) as -log pi_m or squared distance; none.
-- To each of them the option entropy_weight adds that times mean_n H(pi_n) - H(mean_n pi_n), which is small where rows
-- lie near codes and all codes are used.
-- precision "bf16" rounds the factors of the products of p, dp and the gradients to bfloat16 and adds in float32
-- (kernels/quantize/smooth.c says which): each such sum is off by up to 2^-7 of its terms' magnitudes added up; codes,
-- neighbours and the regularizer keep their bits. It is faster on processors with AVX512_BF16 alone (not measured yet),
-- slower on other CPUs; CUDA computes in float32 either way.
--
-- [1] Jang et al. 2017, Categorical reparameterization with Gumbel-softmax

local check = require "vertex.check"
local core = require "vertex.core"
local dist = require "vertex.dist"
local entropy = require "vertex.quantizers.entropy"
local nn = require "vertex.nn"
local ops = require "vertex.ops"
local registry = require "vertex.quantizers"
local tape = require "vertex.tape"
local world = require "vertex.quantizers.world"

local Smooth = registry.Quantizer.extend "SmoothQuantizer"

local KNN = { ["knn-l2"] = true, ["knn-ce"] = true } -- regularizers that look at the vertices one by one
local TERMS = { ppl = "ppl", ["knn-l2"] = "knn", ["knn-ce"] = "knn" } -- a regularizer's name among the losses

Smooth.row_inputs = { "gumbel" }

--- How many vertices the regularizer looks at each step: the option's number, or its share of the codes; nil for all.
local function vertices_of(options)
  local v, M = options.vertices, options.codes
  if v == nil then return nil end
  check.positive("quantizer", "vertices", v)
  if v <= 1 then v = math.max(1, math.floor(v * M + 0.5)) end
  check.integer("quantizer", "vertices", v, 1)
  if v > M then core.fail("quantizer: vertices %d of %d codes", v, M) end
  return v < M and v or nil
end

--- Checks the options and makes log_tau {1}, the logarithm of the temperature.
-- @param options table of the method's options
-- @raise where one is not what it should be
function Smooth:setup(options)
  check.integer("quantizer", "k", options.k, 1)
  check.integer("quantizer", "shards", options.shards, 1)
  check.positive("quantizer", "tau", options.tau)
  check.number("quantizer", "entropy_weight", options.entropy_weight, 0, math.huge)
  self.vertices = vertices_of(options)
  check.choice("quantizer", "precision", options.precision, { "f32", "bf16" })
  check.choice("quantizer", "scope", options.scope, { "rank", "world" })
  local ranks = dist.size()
  if options.scope == "rank" and math.max(options.shards, ranks) % ranks ~= 0 then
    core.fail("quantizer: %d shards do not divide among %d ranks", options.shards, ranks)
  end
  if options.scope == "rank" and options.k % options.shards ~= 0 then
    core.fail("quantizer: k %d does not divide into %d shards", options.k, options.shards)
  end
  if options.scope == "rank" and KNN[self.facts.regularizer] and options.k % ranks ~= 0 then
    core.fail("quantizer: k %d does not divide among %d ranks; expected a multiple, or scope = \"world\"", options.k,
      ranks)
  end
  local g = options.gumbel_tau
  if type(g) == "table" then
    check.positive("quantizer", "gumbel_tau.from", g.from)
    check.positive("quantizer", "gumbel_tau.to", g.to)
    check.integer("quantizer", "gumbel_tau.steps", g.steps, 1)
  else
    check.positive("quantizer", "gumbel_tau", g)
  end
  self.sampler, self.regularizer = self.facts.sampler, self.facts.regularizer
  self.log_tau = nn.parameter({ 1 }, math.log(options.tau), { no_decay = true })
end

--- Gives the Gumbel temperature of the current training step: constant, or geometric from `from` to `to` over `steps`.
-- @return number
-- @raise where it follows a schedule while a graph is recorded
function Smooth:gumbel_tau()
  local g = self.options.gumbel_tau
  if type(g) == "number" then return g end
  if core.is_recording() then
    core.fail("%s: a graph cannot follow the schedule of gumbel_tau; give it a number", self.label)
  end
  local t = math.min(1, (self.steps - 1) / g.steps)
  return g.from * (g.to / g.from) ^ t
end

--- Says how a KNN regularizer looks at this rank's rows. All ranks together have `shards` parts, at least one each,
-- with K / parts neighbours; under scope = "world" there is one part of all ranks.
-- @param rows how many there are
-- @return neighbours of a vertex among this rank's rows, and the parts that these are split into
function Smooth:neighbours(rows)
  local o, ranks = self.options, dist.size()
  if o.scope == "world" then return ranks == 1 and o.k or math.min(o.k, rows), 1 end
  local parts = math.max(1, o.shards / ranks)
  return o.k / math.max(o.shards, ranks) * parts, parts
end

--- S of the M vertices of each codebook, drawn without replacement (Section 5.3).
local function draw_vertices(self)
  local o = self.options
  local parts = {}
  for g = 1, o.groups do
    parts[g] = ops.reshape(ops.narrow(ops.permutation(o.codes, self.generator, { device = self.codebook:device() }), 1,
      1, self.vertices), { 1, self.vertices })
  end
  return o.groups == 1 and parts[1] or ops.cat(1, parts)
end

--- The entropy loss {1}, the mean over the codebooks: mean entropy of the rows' pi less the entropy of their mean.
local function entropy_loss(self, z)
  local sharpness, G, sum = ops.exp(ops.affine(self.log_tau, -1, 0)), self.options.groups, nil
  for g = 1, G do
    local rows, codes = self.unit(ops.select(z, 2, g)), self.unit(ops.select(self.codebook, 1, g))
    local of_rows, of_mean = entropy.of(ops.mul(rows, sharpness), codes, 1, entropy.exact, entropy.exact)
    local one = ops.reshape(ops.sub(of_rows, of_mean), { 1 })
    sum = sum and ops.add(sum, one) or one
  end
  return ops.affine(sum, self.options.entropy_weight / G, 0)
end

--- Quantizes in training; base.lua says what comes back.
-- @param z tensor f32 (N,G,D)
-- @param given table; gumbel f32 (N,G,M) in place of drawn noise
-- @return table with the term ppl or knn, none for the regularizer none; entropy where the option entropy_weight is not
-- 0
-- @raise where the noise has another shape
function Smooth:quantize(z, given)
  local o = self.options
  local seed, stream = self.generator:stream()
  local noise = given.gumbel
  if noise ~= nil and (not core.is_tensor(noise) or noise:numel() ~= z:size(1) * o.groups * o.codes) then
    core.fail("%s: gumbel %s, expected (%d,%d,%d)", self.label, core.is_tensor(noise) and core.shape_text(noise)
      or type(noise), z:size(1), o.groups, o.codes)
  end
  local k, parts = self:neighbours(z:size(1))
  local y, reg, codes, mean_pi, max_p = ops.quantize_smooth(z, self.codebook, self.log_tau, {
    sampler = self.sampler, regularizer = self.regularizer, k = k, gumbel_tau = self:gumbel_tau(), shards = parts,
    seed = dist.seed(seed), stream = stream,
    noise = noise and self.sampler ~= "softmax" and ops.reshape(noise, { z:size(1), o.groups, o.codes }) or nil,
    vertices = self.vertices and KNN[self.regularizer] and draw_vertices(self) or nil,
    precision = o.precision, stats = self.with_stats,
    -- without gradients nobody needs the regularizer, and ranks may have different numbers of batches
    join = o.scope == "world" and dist.size() > 1 and tape.is_enabled() and world.join(self.regularizer, o.k) or nil,
  })
  local term = TERMS[self.regularizer]
  local terms = term and { [term] = reg } or {}
  if o.entropy_weight > 0 then
    terms.entropy = entropy_loss(self, z)
    reg = ops.add(ops.reshape(reg, { 1 }), terms.entropy)
  end
  return { quantized = y, codes = codes, reg = reg, terms = terms, mean_pi = mean_pi, max_p = max_p }
end

--- Gives the logarithms of the probabilities of all codes, without noise: N x M of them, as quantize never holds.
-- @param z tensor f32 (N,G,D)
-- @param g integer, the codebook, from 1
-- @return tensor f32 (N,M)
function Smooth:log_pi(z, g)
  local rows, codes = self.unit(ops.select(z, 2, g)), self.unit(ops.select(self.codebook, 1, g))
  local cosine = core.autocast("f32", ops.matmul, rows, ops.transpose(codes, 1, 2))
  return ops.log_softmax(ops.mul(cosine, ops.exp(ops.affine(self.log_tau, -1, 0))))
end

--- Quantizes as softmax-none, with a regularizer of all N x M probabilities: the mean over the codebooks of
-- regularizer(log pi).
-- @param z tensor f32 (N,G,D)
-- @param term name of the regularizer among the losses
-- @param regularizer function of log pi, f32 (N,M), that gives one number as a tensor
-- @return table as quantize gives it
function Smooth:quantize_with(z, term, regularizer)
  local y, _, codes, mean_pi, max_p = ops.quantize_smooth(z, self.codebook, self.log_tau, {
    sampler = "softmax", regularizer = "none", k = 1, gumbel_tau = 1, shards = 1, seed = 0, stream = 0,
    precision = self.options.precision, stats = self.with_stats })
  local G, sum = self.options.groups, nil
  for g = 1, G do
    local one = ops.reshape(regularizer(self:log_pi(z, g)), { 1 })
    sum = sum and ops.add(sum, one) or one
  end
  return { quantized = y, codes = codes, terms = { [term] = G > 1 and ops.affine(sum, 1 / G, 0) or sum },
    mean_pi = mean_pi, max_p = max_p }
end

local names = {}
local SAMPLERS = {
  { "hgumbel", "hard Gumbel-softmax", "Jang et al. 2017" },
  { "sgumbel", "soft Gumbel-softmax", "Jang et al. 2017" },
  { "softmax", "softmax", "Morita 2025" },
}
local REGULARIZERS = {
  { "ppl", "perplexity of the mean", "Dieleman et al. 2018; Baevski et al. 2020" },
  { "knn-l2", "squared distance of each vertex's K nearest rows", "Morita 2025" },
  { "knn-ce", "cross-entropy of each vertex's K nearest rows", "Morita 2025" },
  { "none", "no regularizer", nil },
}
for pass = 1, 2 do
  for _, s in ipairs(SAMPLERS) do
    for _, r in ipairs(REGULARIZERS) do
      if (r[1] == "none") == (pass == 2) then
        names[#names + 1] = { name = s[1] .. "-" .. r[1], summary = s[2] .. ", " .. r[2], table1 = r[1] ~= "none",
          ablation = r[1] == "none", sampler = s[1], regularizer = r[1],
          paper = r[3] == s[3] and r[3] or r[3] and s[3] .. "; " .. r[3] or s[3] }
      end
    end
  end
end

return {
  order = 20,
  kind = "smooth",
  metric = "cosine",
  codebook = true,
  names = names,
  options = {
    { name = "tau", default = 0.1, meaning = "temperature at the start; learned as log_tau" },
    { name = "k", default = 8, meaning = "K, neighbours pulled toward each vertex (knn-*)" },
    { name = "gumbel_tau", default = 1, meaning = "Gumbel temperature, or a schedule {from = 2, to = 0.5, steps = n}" },
    { name = "entropy_weight", default = 0,
      meaning = "weight of the rows' mean entropy less the entropy of their mean" },
    { name = "vertices",
      meaning = "look only at this many random vertices each step, or at this share of them where it is 1 (all) or less"
        .. " (knn-*, Section 5.3)" },
    { name = "shards", default = 1,
      meaning = "split the batch (of all ranks) in this many parts with K / shards neighbours each, as the paper's"
        .. " GPUs do" },
    { name = "scope", default = "rank",
      meaning = "of several ranks: \"rank\", K / ranks neighbours among each rank's own rows, as the paper's GPUs; or"
        .. " \"world\", K among the rows of all ranks" },
    { name = "precision", default = "f32",
      meaning = "\"bf16\": averages and gradients of rows wider than 8 from factors rounded to bf16; logits float32" },
  },
  class = Smooth,
}
