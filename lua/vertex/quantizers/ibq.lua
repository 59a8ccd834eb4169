--- Index backpropagation quantization [1]: the gradient of the chosen index passes to all codes through a softmax.
--
--   logits    x . e_m, without a distance or a temperature; p = softmax, i = the largest, ties to the lowest
--   quantized = (onehot(i) - sg p + p) E, which is e_i: with g its gradient, dlogits = p (g . e - sum_m p_m g . e_m),
--               dx = dlogits E, dE = dlogits' x + onehot' g
--   loss      mean((quantized - x)^2) + mean((sg e_i - x)^2) + beta mean((e_i - sg x)^2)
--             + entropy_weight (mean_n H(p_n) - H(mean_n p_n)) with p_n = softmax(logits / entropy_temperature) and
--             log(P + 1e-5) in the entropy of the mean
-- beta stands at the codes' own loss, as in the authors' code. Probabilities are computed chunk by chunk, in both
-- passes, and never held for all rows.
--
-- [1] Shi et al. 2025, Scalable image tokenization with index backpropagation quantization

local check = require "vertex.check"
local entropy = require "vertex.quantizers.entropy"
local ops = require "vertex.ops"
local registry = require "vertex.quantizers"
local tape = require "vertex.tape"

local Ibq = registry.Quantizer.extend "IbqQuantizer"

local OF_MEAN = entropy.logs.shifted(1e-5)

--- Checks the options.
-- @param options table of the method's options
-- @raise where one is not what it should be
function Ibq.setup(_, options)
  check.number("quantizer", "beta", options.beta, 0, math.huge)
  check.number("quantizer", "entropy_weight", options.entropy_weight, 0, math.huge)
  check.positive("quantizer", "entropy_temperature", options.entropy_temperature)
end

--- Codes i32 (N) of rows x (N,D): the largest product with a code of E (M,D).
local function largest(x, E)
  local parts = {}
  entropy.each_chunk(x, E, function(_, logits) parts[#parts + 1] = ops.argmax(logits) end)
  return #parts > 1 and ops.cat(1, parts) or parts[1]
end

--- Rows (N,D) of codes, whose gradient reaches x (N,D) and all codes E (M,D) through the softmax of their products.
local through_indices = tape.recorded { name = "through_indices",
  forward = function(ctx, x, E, codes)
    if ctx.needs then ctx.x, ctx.E, ctx.codes = x, E, codes end
    return ops.gather(E:detach(), codes)
  end,
  backward = function(ctx, g)
    return tape.no_grad(function()
      local x, E, parts = ctx.x, ctx.E, {}
      local dE = registry.Quantizer.row_sums(g, ctx.codes, E:size(1))
      local turned = ops.transpose(E, 1, 2)
      entropy.each_chunk(x, E, function(part, logits, first)
        local dp = ops.matmul(ops.narrow(g, 1, first, part:size(1)), turned)
        local dlogits = entropy.through_softmax(ops.softmax(logits), dp)
        parts[#parts + 1] = ops.matmul(dlogits, E)
        dE = ops.add(dE, ops.matmul(ops.transpose(dlogits, 1, 2), part))
      end)
      return #parts > 1 and ops.cat(1, parts) or parts[1], dE
    end)
  end,
}

--- Calls f(rows (N,D), codes (M,D), number) for each group, and gives what it returns, (N) or (N,D), as (N,G,...).
local function by_group(self, z, f)
  local parts = {}
  for g = 1, self.options.groups do
    local part = f(ops.contiguous(ops.select(z, 2, g)), ops.select(self.codebook, 1, g), g)
    parts[g] = ops.reshape(part, { z:size(1), 1, unpack(part:shape(), 2) })
  end
  return #parts > 1 and ops.cat(2, parts) or parts[1]
end

--- Gives each row the code with which its product is the largest, ties to the lowest.
-- @param z tensor f32 (N,G,D)
-- @return codes i32 (N,G), 0-based
-- @raise where a row holds a NaN or Inf
function Ibq:nearest(z)
  self:refuse_nonfinite(z)
  return tape.no_grad(by_group, self, z, largest)
end

--- Quantizes in training; base.lua says what comes back.
-- @param z tensor f32 (N,G,D)
-- @return table with the terms quantization, commitment, codebook and, where it has a weight, entropy
-- @raise where a row holds a NaN or Inf
function Ibq:quantize(z)
  local o, codes = self.options, self:nearest(z)
  local sum
  local y = by_group(self, z, function(x, E, g)
    if o.entropy_weight > 0 then
      local rows, mean = entropy.of(x, E, 1 / o.entropy_temperature, entropy.exact, OF_MEAN)
      local loss = ops.sub(rows, mean)
      sum = sum and ops.add(sum, loss) or loss
    end
    return through_indices(x, E, ops.contiguous(ops.select(codes, 2, g)))
  end)
  local e = self:lookup(codes)
  return { quantized = y, codes = codes, terms = { quantization = ops.mse(y, z), commitment = ops.mse(e:detach(), z),
    codebook = ops.affine(ops.mse(e, z:detach()), o.beta, 0),
    entropy = sum and ops.affine(sum, o.entropy_weight / o.groups, 0) } }
end

return {
  order = 47,
  kind = "hard",
  codebook = true,
  estimator = "index backpropagation",
  names = { { name = "ibq", summary = "the code of the largest product, with a gradient to all codes" } },
  paper = "Shi et al. 2025",
  options = {
    { name = "beta", default = 0.25, meaning = "weight of mean((e_i - sg x)^2), the codes' own loss" },
    { name = "entropy_weight", default = 0.05, meaning = "weight of the entropy loss" },
    { name = "entropy_temperature", default = 0.01, meaning = "temperature of the softmax in the entropies" },
  },
  class = Ibq,
}
