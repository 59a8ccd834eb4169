--- Residual quantization [1]: stages of another method, each over what the stages before it left.
--
--   r_1 = x,  c_k = the quantized rows of stage k at r_k,  r_{k+1} = r_k - sg c_k,  quantized = sum of c_k
--   loss      one term a stage, stage_1 ..., each the sum of that stage's own
--   gradient  "each": every stage passes the output's gradient g on to x, as vector-quantize-pytorch 1.32 does: S
--             stages straight through make S g of it. "once": the first stage alone does. Either way the codes of all
--             stages get theirs, and each stage's loss reaches x
-- rvq-NAME is this over the method NAME, for every hard or smoothed one of a single stage. rvq-euclid is the published
-- form: stages of ema-euclid. The tensors are named stages.k.NAME, k from 1.
--
-- [1] Zeghidour et al. 2021, SoundStream: an end-to-end neural audio codec

local check = require "vertex.check"
local core = require "vertex.core"
local nn = require "vertex.nn"
local ops = require "vertex.ops"
local registry = require "vertex.quantizers"

local Residual = registry.Quantizer.extend "ResidualQuantizer"

--- Makes no codebook: the stages have theirs.
function Residual:make_codebook() end -- luacheck: no unused args

--- Checks the options and makes the stages, quantizers of the method `base`, each with a seed of its own.
-- @param options table of the method's options
-- @raise where one is not what it should be
function Residual:setup(options)
  check.choice("quantizer", "gradient", options.gradient, { "once", "each" })
  self.stages = nn.Sequential()
  for s = 1, self.stage_count do
    local own = {}
    for _, o in ipairs(registry.by_name[self.facts.base].options) do own[o.name] = options[o.name] end
    own.seed, own.weight, own.warmup, own.rate = (options.seed + s - 1) % 2 ^ 53, 1, 0, 1
    self.stages:add(registry.quantizer(self.facts.base, own))
  end
  local first = self.stages[1]
  self.row_inputs = first.row_inputs
  -- a second pass takes the first one's noise, which a graph would draw anew
  self.graphs = first.graphs and (first.how ~= nil or options.gradient == "each")
end

--- Brings what follows from a stage's codes in line with them.
-- @param stage integer from 1
function Residual:fitted(stage) self.stages[stage]:fitted(1) end

--- `given` for stage s: of what holds numbers for stages x groups of each row, the stage's; all else as it is.
local function given_to(self, s, given)
  local G, own = self.options.groups, {}
  for key, x in pairs(given) do
    local all = self.stage_count > 1 and core.is_tensor(x) and x:dim() == 3 and x:size(2) == self.columns
    own[key] = all and core.contiguous(ops.narrow(x, 2, (s - 1) * G + 1, G)) or x
  end
  return own
end

--- The sum of a stage's losses as a scalar; nil where it has none.
local function loss_of(output)
  if next(output.terms) == nil then return nil end
  if output.reg then return ops.reshape(output.reg, {}) end
  local names, sum = check.names(output.terms), nil
  for _, name in ipairs(names) do
    local x = ops.reshape(output.terms[name], {})
    sum = sum and ops.add(sum, x) or x
  end
  return sum
end

--- Quantizes in training; base.lua says what comes back.
-- @param z tensor f32 (N,G,D)
-- @param given table for the stages; gumbel f32 (N, stages x groups, codes), or (N, groups, codes) for all of them
-- @return table with a term stage_k for each stage that has a loss
function Residual:quantize(z, given)
  local S, each = self.stage_count, self.options.gradient == "each"
  local rest, sum, max_p, terms, codes, mean_pi, outputs = z, nil, nil, {}, {}, {}, {}
  for s = 1, S do
    local stage = self.stages[s]
    core.count(stage, "steps")
    stage.with_stats = self.with_stats
    local quantize = (s == 1 or each) and stage.quantize_with_entropy or stage.quantize_apart
    local o = quantize(stage, rest, given_to(self, s, given))
    outputs[s] = { rest = rest, output = o }
    codes[s], mean_pi[s], terms["stage_" .. s] = o.codes, o.mean_pi, loss_of(o)
    max_p = o.max_p and (max_p and ops.add(max_p, o.max_p) or o.max_p)
    sum = sum and ops.add(sum, o.quantized) or o.quantized
    if s < S then rest = ops.sub(rest, o.quantized:detach()) end
  end
  return { quantized = sum, codes = S == 1 and codes[1] or ops.cat(2, codes), terms = terms, stages = outputs,
    mean_pi = #mean_pi == S and (S == 1 and mean_pi[1] or ops.cat(1, mean_pi)) or nil,
    max_p = max_p and ops.affine(max_p, 1 / S, 0) }
end

--- Quantizes in training with all losses: the stages have theirs.
-- @param z tensor f32 (N,G,D)
-- @param given table, as of quantize
-- @return table as quantize gives it
function Residual:quantize_with_entropy(z, given) return self:quantize(z, given) end

--- Lets each stage learn from the rows that it was given.
-- @param _ tensor f32 (N,G,D), the first stage's rows
-- @param output table that quantize gave
function Residual:learn(_, output)
  for s, stage in ipairs(output.stages) do self.stages[s]:learn(stage.rest, stage.output) end
end

--- Gives a stage's codebook.
-- @param[opt=1] stage integer from 1
-- @return tensor f32 (groups, codes, dim / groups)
function Residual:stage_codebook(stage) return self.stages[stage or 1]:stage_codebook() end

--- Gives each row the codes that a stage's inference uses.
-- @param z tensor f32 (N,G,D)
-- @param[opt=1] stage integer from 1
-- @return codes i32 (N,G), 0-based
function Residual:nearest(z, stage) return self.stages[stage or 1]:nearest(z) end

--- Gives the rows that codes of a stage stand for.
-- @param codes i32 (N,G), 0-based
-- @param[opt=1] stage integer from 1
-- @return tensor f32 (N,G,D)
function Residual:lookup(codes, stage) return self.stages[stage or 1]:lookup(codes) end

--- Gives the entry of the residual form of a method.
-- @param item the method's entry of the registry
-- @return entry; nil where the method is scalar or has stages of its own
local function derive(item)
  if item.kind == "scalar" or item.stages ~= 1 then return nil end
  local entry = { name = "rvq-" .. item.name, base = item.name, options = item.options,
    summary = ("stages over what is left, each %s"):format(item.name), paper = "Zeghidour et al. 2021; " .. item.paper }
  for _, fact in ipairs { "kind", "metric", "codebook", "estimator", "sampler", "regularizer", "optimizer" } do
    entry[fact] = item[fact]
  end
  return entry
end

return {
  order = 60,
  names = { { name = "rvq-euclid", base = "ema-euclid" }, { name = "rvq-softmax-knn-ce", base = "softmax-knn-ce" } },
  derive = derive,
  stages = function(options) return options.stages end,
  options = {
    { name = "stages", default = 4, meaning = "how often a row is quantized, each time what is left of it" },
    { name = "gradient", default = "once",
      meaning = "stages that pass the output's gradient on to the rows: the first (\"once\"), or \"each\"" },
  },
  class = Residual,
}
