--- Entropies of soft assignments, as several methods subtract them from each other: that of each row's probabilities,
-- which is small where rows lie near codes, and that of their mean, which is large where all codes are used.
--
--   p_n = softmax(scale x_n . c_m over the codes m),  P = mean_n p_n,  h(p) = sum_m -p_m l(p_m)
-- The probabilities of all rows at once are never held: a pass takes as many rows as give CHUNK of them, and backward
-- computes them anew. With v = h'(p_n) / N times one gradient, plus h'(P) / N times the other,
--   d logits_n = p_n (v - sum_m p_nm v_m),  dx = scale d logits . c,  dc = scale d logits' . x

local core = require "vertex.core"
local ops = require "vertex.ops"
local tape = require "vertex.tape"

local entropy = {}

local CHUNK = 2 ^ 22 -- probabilities at a time: 16 MB

-- h(p) element by element, and its derivative, by what is put in the place of log p.
entropy.logs = {}

--- Makes the logarithm log max(p, least): with the least normal number it is exact, since p log p is 0 before that.
-- @param least number above 0
-- @return { h, derivative }, functions of tensors
function entropy.logs.clamped(least)
  local function log(p) return ops.log(ops.clamp(p, least, math.huge)) end
  return {
    h = function(p) return ops.affine(ops.mul(p, log(p)), -1, 0) end,
    derivative = function(p)
      local floor = core.new({ 1 }, { device = p:device() }):fill(least)
      return ops.affine(ops.add(log(p), ops.lt(floor, p)), -1, 0)
    end,
  }
end

--- Makes the logarithm log(p + more).
-- @param more number above 0
-- @return { h, derivative }, functions of tensors
function entropy.logs.shifted(more)
  return {
    h = function(p) return ops.affine(ops.mul(p, ops.log(ops.affine(p, 1, more))), -1, 0) end,
    derivative = function(p)
      local sum = ops.affine(p, 1, more)
      return ops.affine(ops.add(ops.log(sum), ops.div(p, sum)), -1, 0)
    end,
  }
end

entropy.exact = entropy.logs.clamped(1.2e-38)

--- Goes through rows chunk by chunk, with their products with all codes.
-- @param x tensor f32 (N,D)
-- @param codes tensor f32 (M,D)
-- @param f function(rows of x (n,D), their products with the codes (n,M), number of the first row from 1)
function entropy.each_chunk(x, codes, f)
  local N, M = x:size(1), codes:size(1)
  local rows, turned = math.max(1, math.floor(CHUNK / M)), ops.transpose(codes, 1, 2)
  for first = 1, N, rows do
    local part = ops.narrow(x, 1, first, math.min(rows, N - first + 1))
    f(part, ops.matmul(part, turned), first)
  end
end

--- Gives the gradient of softmax's logits.
-- @param p tensor f32 (N,M), the probabilities
-- @param v tensor f32 (N,M) or (M), theirs
-- @return tensor f32 (N,M)
function entropy.through_softmax(p, v) return ops.mul(p, ops.sub(v, ops.sum(ops.mul(p, v), 2, true))) end

local recorded = tape.recorded { name = "code_entropies", outputs = 2,
  forward = function(ctx, x, codes, scale, of_rows, of_mean)
    return tape.no_grad(function()
      local N, sum, total = x:size(1), nil, nil
      entropy.each_chunk(x, codes, function(_, products)
        local p = ops.softmax(ops.affine(products, scale, 0))
        local of_part, h = ops.sum(p, 1), ops.sum(of_rows.h(p))
        sum, total = sum and ops.add(sum, of_part) or of_part, total and ops.add(total, h) or h
      end)
      local mean = ops.affine(sum, 1 / N, 0)
      if ctx.needs then
        ctx.x, ctx.codes, ctx.scale, ctx.of_rows, ctx.of_mean, ctx.mean = x, codes, scale, of_rows, of_mean, mean
      end
      return ops.affine(total, 1 / N, 0), ops.sum(of_mean.h(mean))
    end)
  end,
  backward = function(ctx, drows, dmean)
    return tape.no_grad(function()
      local N, dx, dcodes = ctx.x:size(1), {}, nil
      local from_mean = dmean and ops.affine(ops.mul(ctx.of_mean.derivative(ctx.mean), dmean), 1 / N, 0)
      entropy.each_chunk(ctx.x, ctx.codes, function(part, products)
        local p = ops.softmax(ops.affine(products, ctx.scale, 0))
        local v = drows and ops.affine(ops.mul(ctx.of_rows.derivative(p), drows), 1 / N, 0)
        if from_mean then v = v and ops.add(v, from_mean) or from_mean end
        local dlogits = ops.affine(entropy.through_softmax(p, v), ctx.scale, 0)
        dx[#dx + 1] = ctx.needs[1] and ops.matmul(dlogits, ctx.codes) or nil
        if ctx.needs[2] then
          local d = ops.matmul(ops.transpose(dlogits, 1, 2), part)
          dcodes = dcodes and ops.add(dcodes, d) or d
        end
      end)
      return #dx > 1 and ops.cat(1, dx) or dx[1], dcodes
    end)
  end,
}

--- Gives the mean entropy of the rows and the entropy of the mean.
-- @param x tensor f32 (N,D)
-- @param codes tensor f32 (M,D)
-- @param scale number, of the products x . c
-- @param of_rows what stands for log p in the rows' entropies: entropy.exact, or what entropy.logs makes
-- @param of_mean the same for the mean's
-- @return two scalars, differentiable in x and codes, in nats
function entropy.of(x, codes, scale, of_rows, of_mean)
  return recorded(ops.contiguous(x), ops.contiguous(codes), scale, of_rows, of_mean)
end

return entropy
