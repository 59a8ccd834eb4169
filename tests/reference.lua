--- reference.lua: every op once more as plain loops over float64, written from its description and not from the
-- kernels. Arrays are {shape, n, v} with v a 0-based double array, row-major. reference.ops[name](args...) takes arrays
-- where the op takes tensors.

local ffi = require "ffi"

local R = { ops = {} }
local ops = R.ops

-- -- Arrays -----------------------------------------------------------------------------------------------------------

local function product(shape)
  local n = 1
  for i = 1, #shape do n = n * shape[i] end
  return n
end

local function array(shape)
  local n, copy = product(shape), {}
  for i = 1, #shape do copy[i] = shape[i] end
  return { shape = copy, n = n, v = ffi.new("double[?]", math.max(n, 1)), is_array = true }
end
R.array = array

--- An array of a tensor's values.
function R.from(x)
  local a, position = array(x:shape()), 0
  local function walk(t)
    if type(t) ~= "table" then
      a.v[position] = t
      position = position + 1
    else
      for i = 1, #t do walk(t[i]) end
    end
  end
  walk(x:totable())
  return a
end

function R.list(a)
  local t = {}
  for i = 1, a.n do t[i] = a.v[i - 1] end
  return t
end

local function strides(shape)
  local st, s = {}, 1
  for i = #shape, 1, -1 do
    st[i] = s
    s = s * shape[i]
  end
  return st
end

--- Calls f(flat position, index array) for every element of a shape, in order.
local function each(shape, f)
  local n, index = product(shape), {}
  for i = 1, #shape do index[i] = 0 end
  for position = 0, n - 1 do
    f(position, index)
    for d = #shape, 1, -1 do
      index[d] = index[d] + 1
      if index[d] < shape[d] then break end
      index[d] = 0
    end
  end
end

-- -- Views ------------------------------------------------------------------------------------------------------------

function ops.reshape(x, shape)
  local target, known = {}, 1
  for i = 1, #shape do
    if shape[i] ~= -1 then known = known * shape[i] end
  end
  for i = 1, #shape do target[i] = shape[i] == -1 and x.n / known or shape[i] end
  local y = array(target)
  for i = 0, x.n - 1 do y.v[i] = x.v[i] end
  return y
end

function ops.expand(x, shape)
  local y, st, extra = array(shape), strides(x.shape), #shape - #x.shape
  each(shape, function(p, index)
    local at = 0
    for d = 1, #x.shape do at = at + (x.shape[d] == 1 and 0 or index[d + extra]) * st[d] end
    y.v[p] = x.v[at]
  end)
  return y
end

local function copied(shape)
  local s = {}
  for i = 1, #shape do s[i] = shape[i] end
  return s
end
local function dimension(x, d) return d < 0 and #x.shape + d + 1 or d end

function ops.narrow(x, d, first, count)
  d = dimension(x, d)
  local shape, st = copied(x.shape), strides(x.shape)
  shape[d] = count
  local y = array(shape)
  each(shape, function(p, index)
    local at = (first - 1) * st[d]
    for i = 1, #shape do at = at + index[i] * st[i] end
    y.v[p] = x.v[at]
  end)
  return y
end

function ops.select(x, d, i)
  d = dimension(x, d)
  local y = ops.narrow(x, d, i < 0 and x.shape[d] + i + 1 or i, 1)
  table.remove(y.shape, d)
  return y
end

function ops.transpose(x, a, b)
  a, b = dimension(x, a), dimension(x, b)
  local shape, st = copied(x.shape), strides(x.shape)
  shape[a], shape[b] = shape[b], shape[a]
  st[a], st[b] = st[b], st[a]
  local y = array(shape)
  each(shape, function(p, index)
    local at = 0
    for i = 1, #shape do at = at + index[i] * st[i] end
    y.v[p] = x.v[at]
  end)
  return y
end

function ops.contiguous(x) return ops.reshape(x, x.shape) end
function ops.cast(x) return ops.reshape(x, x.shape) end -- to float32; tests/autograd_spec.lua rounds to bf16

function ops.stack(d, ...)
  local parts = { ... }
  for i, x in ipairs(parts) do
    local shape = copied(x.shape)
    table.insert(shape, d < 0 and #shape + d + 2 or d, 1)
    parts[i] = ops.reshape(x, shape)
  end
  return ops.cat(d, unpack(parts))
end

function ops.cat(d, ...)
  local parts = { ... }
  d = dimension(parts[1], d)
  local shape = copied(parts[1].shape)
  shape[d] = 0
  for _, x in ipairs(parts) do shape[d] = shape[d] + x.shape[d] end
  local y, st, before = array(shape), strides(shape), 0
  for _, x in ipairs(parts) do
    each(x.shape, function(p, index)
      local at = before * st[d]
      for i = 1, #shape do at = at + index[i] * st[i] end
      y.v[at] = x.v[p]
    end)
    before = before + x.shape[d]
  end
  return y
end

-- -- Elementwise ------------------------------------------------------------------------------------------------------

local function binary(f)
  return function(a, b)
    local n, shape = math.max(#a.shape, #b.shape), {}
    for i = 0, n - 1 do
      local p, q = a.shape[#a.shape - i] or 1, b.shape[#b.shape - i] or 1
      shape[n - i] = p == 1 and q or p
    end
    local x, z, y = ops.expand(a, shape), ops.expand(b, shape), array(shape)
    for i = 0, y.n - 1 do y.v[i] = f(x.v[i], z.v[i]) end
    return y
  end
end
ops.add = binary(function(a, b) return a + b end)
ops.sub = binary(function(a, b) return a - b end)
ops.mul = binary(function(a, b) return a * b end)
ops.div = binary(function(a, b) return a / b end)
ops.maximum = binary(math.max)
ops.minimum = binary(math.min)
ops.eq = binary(function(a, b) return a == b and 1 or 0 end)
ops.lt = binary(function(a, b) return a < b and 1 or 0 end)
ops.le = binary(function(a, b) return a <= b and 1 or 0 end)
ops.gt = binary(function(a, b) return a > b and 1 or 0 end)
ops.ge = binary(function(a, b) return a >= b and 1 or 0 end)
ops.ne = binary(function(a, b) return a ~= b and 1 or 0 end)

--- Gives a number as an array (1); an array as it is.
local function as_array(x)
  if type(x) ~= "number" then return x end
  local a = array { 1 }
  a.v[0] = x
  return a
end

function ops.where(condition, a, b)
  a, b = as_array(a), as_array(b)
  local shape = binary(function() return 0 end)(binary(function() return 0 end)(condition, a), b).shape
  local c, p, q, y = ops.expand(condition, shape), ops.expand(a, shape), ops.expand(b, shape), array(shape)
  for i = 0, y.n - 1 do y.v[i] = c.v[i] ~= 0 and p.v[i] or q.v[i] end
  return y
end

function ops.masked_fill(x, mask, value) return ops.where(mask, value, x) end

local function erf(x) -- series for small arguments, continued fraction (Lentz) for large ones
  local a = math.abs(x)
  if a < 3 then
    local term, sum, n = a, a, 0
    while math.abs(term) > 1e-18 * math.abs(sum) do
      n = n + 1
      term = -term * a * a / n
      sum = sum + term / (2 * n + 1)
      if n > 200 then break end
    end
    sum = sum * 2 / math.sqrt(math.pi)
    return x < 0 and -sum or sum
  end
  local f = 0
  for k = 60, 1, -1 do f = k / 2 / (a + f) end
  local tail = math.exp(-a * a) / math.sqrt(math.pi) / (a + f)
  return x < 0 and tail - 1 or 1 - tail
end
local function sigmoid(x) return 1 / (1 + math.exp(-x)) end

-- ln gamma and its derivatives as sums over the first terms of their series in 1 / (x + k), the rest by the
-- Euler-Maclaurin formula
local TERMS = 200
local function lgamma(x) -- the product x (x + 1) ... against that of n!, whose logarithms nearly cancel term by term
  local sum, n = 0, TERMS
  for k = 0, n - 1 do sum = sum + math.log((k + 1) / (x + k)) end
  local function stirling(z) return (z - 0.5) * math.log(z) - z + 1 / (12 * z) - 1 / (360 * z ^ 3) end
  return sum + stirling(x + n) - stirling(n + 1)
end
local function digamma(x)
  local sum, z = 0, x + TERMS
  for k = 0, TERMS - 1 do sum = sum - 1 / (x + k) end
  return sum + math.log(z) - 1 / (2 * z) - 1 / (12 * z ^ 2) + 1 / (120 * z ^ 4)
end
local function trigamma(x)
  local sum, z = 0, x + TERMS
  for k = 0, TERMS - 1 do sum = sum + 1 / (x + k) ^ 2 end
  return sum + 1 / z + 1 / (2 * z ^ 2) + 1 / (6 * z ^ 3) - 1 / (30 * z ^ 5)
end

local scalar = {
  affine = function(x, a, b) return a * x + b end,
  exp = math.exp, sqrt = math.sqrt,
  log = function(x) return math.log(x) end,
  abs = math.abs, tanh = math.tanh, sigmoid = sigmoid,
  square = function(x) return x * x end,
  relu = function(x) return x > 0 and x or 0 end,
  silu = function(x) return x * sigmoid(x) end,
  gelu = function(x) return 0.5 * x * (1 + erf(x / math.sqrt(2))) end,
  clamp = function(x, a, b) return math.min(math.max(x, a), b) end,
  power = function(x, a) return x ^ a end,
  round = function(x) -- halves to even
    local low = math.floor(x)
    local rest = x - low
    if rest ~= 0.5 then return rest < 0.5 and low or low + 1 end
    return low % 2 == 0 and low or low + 1
  end,
  floor = math.floor,
  sign = function(x) return x > 0 and 1 or x < 0 and -1 or 0 end,
  lgamma = lgamma, digamma = digamma, trigamma = trigamma,
}
R.scalar = scalar
for name, f in pairs(scalar) do
  ops[name] = function(x, a, b)
    local y = array(x.shape)
    for i = 0, x.n - 1 do y.v[i] = f(x.v[i], a, b) end
    return y
  end
end

-- -- Reductions -------------------------------------------------------------------------------------------------------

local function reduction(start, join, finish)
  return function(x, dims, keep)
    local over, kept, short = {}, {}, {}
    if dims == nil then
      for i = 1, #x.shape do over[i] = true end
    else
      for _, d in ipairs(type(dims) == "table" and dims or { dims }) do over[dimension(x, d)] = true end
    end
    for i = 1, #x.shape do
      kept[i] = over[i] and 1 or x.shape[i]
      if not over[i] then short[#short + 1] = x.shape[i] end
    end
    local y, st = array(kept), strides(kept)
    for i = 0, y.n - 1 do y.v[i] = start end
    each(x.shape, function(p, index)
      local at = 0
      for i = 1, #kept do at = at + (over[i] and 0 or index[i]) * st[i] end
      y.v[at] = join(y.v[at], x.v[p])
    end)
    if finish then
      for i = 0, y.n - 1 do y.v[i] = finish(y.v[i], x.n / y.n) end
    end
    if not keep then y.shape = short end
    return y
  end
end
local function plus(a, b) return a + b end
ops.sum = reduction(0, plus)
ops.mean = reduction(0, plus, function(s, n) return s / n end)
ops.max = reduction(-math.huge, math.max)
ops.min = reduction(math.huge, math.min)

function ops.cumsum(x, d)
  d = dimension(x, d)
  local y, st = array(x.shape), strides(x.shape)
  each(x.shape, function(p, index) y.v[p] = x.v[p] + (index[d] > 0 and y.v[p - st[d]] or 0) end)
  return y
end

-- -- Linear algebra and convolution -----------------------------------------------------------------------------------

--- c (B,m,n) = a (B or 1,m,k) b (B or 1,k,n)
local function multiply(a, b, B, m, k, n, a_batched, b_batched)
  local c = array { B, m, n }
  for i = 0, B - 1 do
    local ao, bo, co = a_batched and i * m * k or 0, b_batched and i * k * n or 0, i * m * n
    for r = 0, m - 1 do
      for p = 0, k - 1 do
        local x = a.v[ao + r * k + p]
        for q = 0, n - 1 do c.v[co + r * n + q] = c.v[co + r * n + q] + x * b.v[bo + p * n + q] end
      end
    end
  end
  return c
end

function ops.matmul(a, b)
  local ab, bb = #a.shape == 3, #b.shape == 3
  local m, k, n = a.shape[#a.shape - 1], a.shape[#a.shape], b.shape[#b.shape]
  local B = math.max(ab and a.shape[1] or 1, bb and b.shape[1] or 1)
  local c = multiply(a, b, B, m, k, n, ab and a.shape[1] > 1, bb and b.shape[1] > 1)
  if not ab and not bb then c.shape = { m, n } end
  return c
end

function ops.linear(x, w, bias)
  local k, n = w.shape[2], w.shape[1]
  local shape = copied(x.shape)
  shape[#shape] = n
  local y = multiply(x, ops.transpose(w, 1, 2), 1, x.n / k, k, n)
  y.shape = shape
  if bias then
    for i = 0, y.n - 1 do y.v[i] = y.v[i] + bias.v[i % n] end
  end
  return y
end

function ops.conv3x3(x, w, bias)
  local B, H, W, C, O = x.shape[1], x.shape[2], x.shape[3], x.shape[4], w.shape[4]
  local y = array { B, H, W, O }
  local xv, wv, yv = x.v, w.v, y.v
  for b = 0, B - 1 do
    for h = 0, H - 1 do
      for q = 0, W - 1 do
        local yo = ((b * H + h) * W + q) * O
        for o = 0, O - 1 do yv[yo + o] = bias and bias.v[o] or 0 end
        for i = 0, 2 do
          for j = 0, 2 do
            local hh, ww = h + i - 1, q + j - 1
            if hh >= 0 and hh < H and ww >= 0 and ww < W then
              local xo = ((b * H + hh) * W + ww) * C
              for c = 0, C - 1 do
                local s, wo = xv[xo + c], ((i * 3 + j) * C + c) * O
                for o = 0, O - 1 do yv[yo + o] = yv[yo + o] + s * wv[wo + o] end
              end
            end
          end
        end
      end
    end
  end
  return y
end

local function both(value) return type(value) == "table" and value or { value, value } end

--- Calls f(y's place, x's place, i, j) for each window's pixel inside its image, channel by channel of x; gives y's
-- shape. kernel, stride, padding: { rows, columns }.
local function each_window_pixel(x, kernel, stride, padding, f)
  local B, H, W = x.shape[1], x.shape[2], x.shape[3]
  local P = math.floor((H + 2 * padding[1] - kernel[1]) / stride[1]) + 1
  local Q = math.floor((W + 2 * padding[2] - kernel[2]) / stride[2]) + 1
  for b = 0, B - 1 do
    for p = 0, P - 1 do
      for q = 0, Q - 1 do
        for i = 0, kernel[1] - 1 do
          for j = 0, kernel[2] - 1 do
            local h, w = p * stride[1] + i - padding[1], q * stride[2] + j - padding[2]
            if h >= 0 and h < H and w >= 0 and w < W then f((b * P + p) * Q + q, (b * H + h) * W + w, i, j) end
          end
        end
      end
    end
  end
  return P, Q
end

function ops.conv2d(x, w, bias, options)
  local o = options or {}
  local groups, C, O, KH, KW = o.groups or 1, x.shape[4], w.shape[1], w.shape[3], w.shape[4]
  local D, E = C / groups, O / groups
  local xv, wv, sums = x.v, w.v, {}
  local P, Q = each_window_pixel(x, { KH, KW }, both(o.stride or 1), both(o.padding or 0), function(to, from, i, j)
    local window = sums[to] -- {x's place, w's place, ...} of the pixels that y's place `to` is a sum over
    if not window then
      window = {}
      sums[to] = window
    end
    window[#window + 1], window[#window + 2] = from * C, i * KW + j
  end)
  local y = array { x.shape[1], P, Q, O }
  for to = 0, y.n / O - 1 do
    local window = sums[to] or {}
    for n = 0, O - 1 do
      local s, first = bias and bias.v[n] or 0, math.floor(n / E) * D
      for at = 1, #window, 2 do
        local xo, wo = window[at] + first, n * D * KH * KW + window[at + 1]
        for c = 0, D - 1 do s = s + xv[xo + c] * wv[wo + c * KH * KW] end
      end
      y.v[to * O + n] = s
    end
  end
  return y
end

function ops.max_pool2d(x, kernel, options)
  local o, C, best = options or {}, x.shape[4], {}
  local P, Q = each_window_pixel(x, both(kernel), both(o.stride or kernel), both(o.padding or 0), function(to, from)
    for c = 0, C - 1 do best[to * C + c] = math.max(best[to * C + c] or -math.huge, x.v[from * C + c]) end
  end)
  local y = array { x.shape[1], P, Q, C }
  for i = 0, y.n - 1 do y.v[i] = best[i] end
  return y
end

function ops.avg_pool2d(x, kernel, options)
  local o, C, sums, seen = options or {}, x.shape[4], {}, {}
  local size = both(kernel)
  local P, Q = each_window_pixel(x, size, both(o.stride or kernel), both(o.padding or 0), function(to, from)
    seen[to] = (seen[to] or 0) + 1
    for c = 0, C - 1 do sums[to * C + c] = (sums[to * C + c] or 0) + x.v[from * C + c] end
  end)
  local y = array { x.shape[1], P, Q, C }
  for i = 0, y.n - 1 do
    y.v[i] = sums[i] / (o.count_include_pad == false and seen[math.floor(i / C)] or size[1] * size[2])
  end
  return y
end

function ops.conv1d(x, w, bias, options)
  local o = options or {}
  local stride, padding, groups = o.stride or 1, o.padding or 0, o.groups or 1
  local B, L, C, O, K = x.shape[1], x.shape[2], x.shape[3], w.shape[1], w.shape[3]
  local T, D, E = math.floor((L + 2 * padding - K) / stride) + 1, C / groups, O / groups
  local y = array { B, T, O }
  local xv, wv, yv = x.v, w.v, y.v
  for b = 0, B - 1 do
    for t = 0, T - 1 do
      for n = 0, O - 1 do
        local s, first = bias and bias.v[n] or 0, math.floor(n / E) * D
        local from, to = math.max(0, padding - t * stride), math.min(K, L + padding - t * stride) - 1
        local xo, wo = (b * L + t * stride - padding) * C + first, n * D * K
        if D > K then
          for j = from, to do
            for c = 0, D - 1 do s = s + xv[xo + j * C + c] * wv[wo + c * K + j] end
          end
        else -- the longer loop within
          for c = 0, D - 1 do
            for j = from, to do s = s + xv[xo + j * C + c] * wv[wo + c * K + j] end
          end
        end
        yv[(b * T + t) * O + n] = s
      end
    end
  end
  return y
end

function ops.depthwise_conv2d(x, w, bias, stride)
  stride = stride or 1
  local B, H, W, C = x.shape[1], x.shape[2], x.shape[3], x.shape[4]
  local P, Q = math.ceil(H / stride), math.ceil(W / stride)
  local y = array { B, P, Q, C }
  for b = 0, B - 1 do
    for p = 0, P - 1 do
      for q = 0, Q - 1 do
        for c = 0, C - 1 do
          local s = bias and bias.v[c] or 0
          for i = 0, 2 do
            for j = 0, 2 do
              local h, ww = p * stride + i - 1, q * stride + j - 1
              if h >= 0 and h < H and ww >= 0 and ww < W then
                s = s + x.v[((b * H + h) * W + ww) * C + c] * w.v[(i * 3 + j) * C + c]
              end
            end
          end
          y.v[((b * P + p) * Q + q) * C + c] = s
        end
      end
    end
  end
  return y
end

function ops.upsample2x(x)
  local B, H, W, C = x.shape[1], x.shape[2], x.shape[3], x.shape[4]
  local y = array { B, 2 * H, 2 * W, C }
  each(y.shape, function(p, i)
    y.v[p] = x.v[((i[1] * H + math.floor(i[2] / 2)) * W + math.floor(i[3] / 2)) * C + i[4]]
  end)
  return y
end

-- -- Normalization, softmax, rows by index, losses --------------------------------------------------------------------

function ops.group_norm(x, gamma, beta, groups, activation, eps, lengths)
  local B, C = x.shape[1], x.shape[#x.shape]
  local S, width, y = x.n / B / C, C / groups, array(x.shape)
  local act = activation and activation ~= "none" and scalar[activation]
  for b = 0, B - 1 do
    for g = 0, groups - 1 do
      local n = lengths and lengths.v[b] or S
      local sum, square, count = 0, 0, math.max(n, 1) * width
      for s = 0, n - 1 do
        for c = g * width, (g + 1) * width - 1 do sum = sum + x.v[(b * S + s) * C + c] end
      end
      local mean = sum / count
      for s = 0, n - 1 do
        for c = g * width, (g + 1) * width - 1 do square = square + (x.v[(b * S + s) * C + c] - mean) ^ 2 end
      end
      local rstd = 1 / math.sqrt(square / count + (eps or 1e-5))
      for s = 0, n - 1 do
        for c = g * width, (g + 1) * width - 1 do
          local p = (b * S + s) * C + c
          local value = gamma.v[c] * (x.v[p] - mean) * rstd + beta.v[c]
          y.v[p] = act and act(value) or value
        end
      end
    end
  end
  return y
end

function ops.sepconv2d(x, w, v, bias, gamma, beta, residual, options)
  local o = options or {}
  if gamma then x = ops.group_norm(x, gamma, beta, o.groups or 1, o.activation) end
  if o.up == 2 then x = ops.upsample2x(x) end
  local y = ops.linear(ops.depthwise_conv2d(x, w, nil, o.stride), v, bias)
  return residual and ops.add(y, residual) or y
end

function ops.layer_norm(x, gamma, beta, eps)
  local C = x.shape[#x.shape]
  local flat = ops.reshape(x, { x.n / C, 1, C })
  local y = ops.group_norm(flat, gamma, beta, 1, nil, eps)
  y.shape = copied(x.shape)
  return y
end

local function softmax(x, log)
  local C, y = x.shape[#x.shape], array(x.shape)
  for r = 0, x.n / C - 1 do
    local top, sum = -math.huge, 0
    for c = 0, C - 1 do top = math.max(top, x.v[r * C + c]) end
    for c = 0, C - 1 do sum = sum + math.exp(x.v[r * C + c] - top) end
    for c = 0, C - 1 do
      local v = x.v[r * C + c] - top
      y.v[r * C + c] = log and v - math.log(sum) or math.exp(v) / sum
    end
  end
  return y
end
local function softmax_along(x, d, log)
  local last = #x.shape
  d = d and dimension(x, d) or last
  if d == last then return softmax(x, log) end
  return ops.transpose(softmax(ops.transpose(x, d, last), log), d, last)
end
function ops.softmax(x, d) return softmax_along(x, d, false) end
function ops.log_softmax(x, d) return softmax_along(x, d, true) end

--- Gives the place in an array of strides st of what `index` chooses along dimension d at the place `at`.
local function place_along(st, at, d, index)
  local place = index * st[d]
  for i = 1, #st do place = place + (i == d and 0 or at[i] * st[i]) end
  return place
end

local function gather_along(x, d, index)
  local y, st = array(index.shape), strides(x.shape)
  each(index.shape, function(p, at) y.v[p] = x.v[place_along(st, at, d, index.v[p])] end)
  return y
end

function ops.gather(tab, index, along)
  if type(index) == "number" then return gather_along(tab, dimension(tab, index), along) end
  local D, shape = tab.shape[2], copied(index.shape)
  shape[#shape + 1] = D
  local y = array(shape)
  for n = 0, index.n - 1 do
    for d = 0, D - 1 do y.v[n * D + d] = tab.v[index.v[n] * D + d] end
  end
  return y
end

function ops.scatter_add(x, d, index, src)
  d = dimension(x, d)
  local y, st = ops.reshape(x, x.shape), strides(x.shape)
  each(index.shape, function(p, at)
    local place = place_along(st, at, d, index.v[p])
    y.v[place] = y.v[place] + src.v[p]
  end)
  return y
end

function ops.topk(x, k, d, options)
  d = dimension(x, d or -1)
  local shape, st, size = copied(x.shape), strides(x.shape), x.shape[d]
  local sign = options and options.largest == false and -1 or 1
  shape[d] = k
  local y, indices, to = array(shape), array(shape), strides(shape)
  shape[d] = 1
  each(shape, function(_, at)
    local list = {}
    for j = 0, size - 1 do list[j + 1] = { x.v[place_along(st, at, d, j)] * sign, j } end
    table.sort(list, function(a, b) return a[1] > b[1] or (a[1] == b[1] and a[2] < b[2]) end)
    for j = 0, k - 1 do
      local place = place_along(to, at, d, j)
      y.v[place], indices.v[place] = list[j + 1][1] * sign, list[j + 1][2]
    end
  end)
  return y, indices
end

function ops.one_hot(index, classes)
  local shape = copied(index.shape)
  shape[#shape + 1] = classes
  local y = array(shape)
  for i = 0, index.n - 1 do y.v[i * classes + index.v[i]] = 1 end
  return y
end

--- Eq. 15 as a loop over frames; distractors may be given as an array of whole numbers.
function ops.contrastive_loss(y, q, distractors, options)
  local N, D, K = y.shape[1], y.shape[2], distractors.shape[2]
  local temperature, keep = options and options.temperature or 0.1, options and options.keep_equal
  local losses, equal, hit = array { N }, array { N }, array { N }
  local logits, loss = array { N, K + 1 }, array {}
  local function cosine(n, j)
    local dot, a, b = 0, 0, 0
    for d = 0, D - 1 do
      local u, v = y.v[n * D + d], q.v[j * D + d]
      dot, a, b = dot + u * v, a + u * u, b + v * v
    end
    return dot / math.sqrt(a) / math.sqrt(b)
  end
  local function same(i, j)
    for d = 0, D - 1 do
      if q.v[i * D + d] ~= q.v[j * D + d] then return false end
    end
    return true
  end
  for n = 0, N - 1 do
    local sum, positive, best, rivals = 0, cosine(n, n) / temperature, -math.huge, 0
    logits.v[n * (K + 1)] = positive
    for k = 0, K - 1 do
      local j = distractors.v[n * K + k]
      local logit = cosine(n, j) / temperature
      if same(n, j) then equal.v[n] = equal.v[n] + 1 end
      if same(n, j) and not keep then logit = -math.huge else rivals, best = rivals + 1, math.max(best, logit) end
      logits.v[n * (K + 1) + 1 + k] = logit
      sum = sum + math.exp(logit - positive)
    end
    losses.v[n] = math.log(1 + sum)
    hit.v[n] = rivals > 0 and positive > best and 1 or 0
    loss.v[0] = loss.v[0] + losses.v[n] / N
  end
  return loss, losses, logits, equal, hit
end

function ops.mse(a, b)
  local y, sum = array {}, 0
  for i = 0, a.n - 1 do sum = sum + (a.v[i] - b.v[i]) ^ 2 end
  y.v[0] = sum / a.n
  return y
end

-- -- Quantizers: the surrogate whose gradient the backward pass declares ----------------------------------------------
--
-- `at` is nil at the point of interest; it comes back as a record of everything the method holds constant (assignments,
-- neighbours, rotations, straight-through offsets). Called again with that record and moved inputs, the function is the
-- smooth surrogate, and its finite differences are the declared gradient.

local function normalized(x, width)
  local y = array(x.shape)
  for r = 0, x.n / width - 1 do
    local s = 0
    for d = 0, width - 1 do s = s + x.v[r * width + d] ^ 2 end
    s = math.max(math.sqrt(s), 1e-12)
    for d = 0, width - 1 do y.v[r * width + d] = x.v[r * width + d] / s end
  end
  return y
end

--- codes (N,G) of z (N,G,D) by a codebook (G,M,D).
function R.assign(z, book, metric)
  local N, G, D, M = z.shape[1], z.shape[2], z.shape[3], book.shape[2]
  if metric == "cosine" then z, book = normalized(z, D), normalized(book, D) end
  local codes = array { N, G }
  for n = 0, N - 1 do
    for g = 0, G - 1 do
      local best, least = 0, math.huge
      for m = 0, M - 1 do
        local s = 0
        for d = 0, D - 1 do s = s + (z.v[(n * G + g) * D + d] - book.v[(g * M + m) * D + d]) ^ 2 end
        if s < least then best, least = m, s end
      end
      codes.v[n * G + g] = best
    end
  end
  return codes
end

--- The k smallest of n candidates by (value, index): arrays of values and of indices.
local function smallest(n, k, value)
  local list = {}
  for i = 0, n - 1 do list[#list + 1] = { value(i), i } end
  table.sort(list, function(a, b) return a[1] < b[1] or (a[1] == b[1] and a[2] < b[2]) end)
  local values, indices = {}, {}
  for i = 1, k do values[i], indices[i] = list[i][1], list[i][2] end
  return values, indices
end

--- Deviations (M,K), and the rows (M,K).
function ops.vertex_knn(p, k, metric, log)
  local N, M = p.shape[1], p.shape[2]
  local y, near = array { M, k }, array { M, k }
  local function at(n, m) return log and math.exp(p.v[n * M + m]) or p.v[n * M + m] end
  for m = 0, M - 1 do
    local values, rows = smallest(N, k, function(n)
      if metric == "ce" then return log and -p.v[n * M + m] or -math.log(p.v[n * M + m]) end
      local s = 0
      for j = 0, M - 1 do s = s + (at(n, j) - (j == m and 1 or 0)) ^ 2 end
      return s
    end)
    for i = 1, k do y.v[m * k + i - 1], near.v[m * k + i - 1] = values[i], rows[i] end
  end
  return y, near
end

--- Squared distances (N,K), and the rows (N,K).
function ops.knn(x, y, k, exclude_self)
  local N, L, D = x.shape[1], y.shape[1], x.shape[2]
  local out, near = array { N, k }, array { N, k }
  for n = 0, N - 1 do
    local values, rows = smallest(L, k, function(l)
      if exclude_self and l == n then return math.huge end
      local s = 0
      for d = 0, D - 1 do s = s + (x.v[n * D + d] - y.v[l * D + d]) ^ 2 end
      return s
    end)
    for i = 1, k do out.v[n * k + i - 1], near.v[n * k + i - 1] = values[i], rows[i] end
  end
  return out, near
end

local function total(a)
  local s = 0
  for i = 0, a.n - 1 do s = s + a.v[i] end
  return s
end

--- The root of an increasing function of x > 0, by bisection of ln x.
local function root(f)
  local low, high = -20, 20
  for _ = 1, 70 do
    local middle = (low + high) / 2
    if f(math.exp(middle)) < 0 then low = middle else high = middle end
  end
  return math.exp((low + high) / 2)
end

--- At the maximum digamma(alpha[m]) = digamma(s) + mean ln p[m], and s is the sum of alpha.
function ops.dirichlet_mle(log_p)
  local N, M = log_p.shape[1], log_p.shape[2]
  local g, alpha = {}, array { M }
  for m = 0, M - 1 do
    g[m] = 0
    for n = 0, N - 1 do g[m] = g[m] + log_p.v[n * M + m] / N end
  end
  root(function(s)
    local whole = digamma(s)
    for m = 0, M - 1 do alpha.v[m] = root(function(a) return digamma(a) - whole - g[m] end) end
    return s - total(alpha)
  end)
  return alpha
end

--- ln of the densities' ratio at its mean under a: ln p[m] has the mean digamma(a[m]) - digamma(sum a).
function ops.dirichlet_kl(a, b)
  local y = array {}
  local sa, sb = total(a), total(b)
  y.v[0] = lgamma(sa) - lgamma(sb)
  for m = 0, a.n - 1 do
    y.v[0] = y.v[0] + lgamma(b.v[m]) - lgamma(a.v[m]) + (a.v[m] - b.v[m]) * (digamma(a.v[m]) - digamma(sa))
  end
  return y
end

function ops.quantize_hard(z, book, o, at)
  local N, G, D, M = z.shape[1], z.shape[2], z.shape[3], book.shape[2]
  local codes = at and at.codes or R.assign(z, book, o.metric)
  local zn, qn = z, book
  if o.metric == "cosine" then zn, qn = normalized(z, D), normalized(book, D) end
  local now = at or { codes = codes, z = ops.contiguous(zn), q = ops.contiguous(qn) }
  local y, reg = array(z.shape), array { 1 }
  for n = 0, N - 1 do
    for g = 0, G - 1 do
      local zo = (n * G + g) * D
      local qo = (g * M + codes.v[n * G + g]) * D
      local zz, qq, zq, rr = 0, 0, 0, 0
      for d = 0, D - 1 do
        zz = zz + now.z.v[zo + d] ^ 2
        qq = qq + now.q.v[qo + d] ^ 2
        reg.v[0] = reg.v[0] + o.beta * (zn.v[zo + d] - now.q.v[qo + d]) ^ 2 + (now.z.v[zo + d] - qn.v[qo + d]) ^ 2
      end
      zz, qq = math.max(math.sqrt(zz), 1e-6), math.max(math.sqrt(qq), 1e-6)
      -- R x = x - 2 r (r.x) + 2 q (z.x), with r the unit vector along z + q
      local rx = 0
      for d = 0, D - 1 do
        local r = now.z.v[zo + d] / zz + now.q.v[qo + d] / qq
        rr = rr + r * r
        rx = rx + r * zn.v[zo + d]
        zq = zq + now.z.v[zo + d] / zz * zn.v[zo + d]
      end
      for d = 0, D - 1 do
        if o.estimator == "ste" then
          local q = o.codebook_grad and qn.v[qo + d] or now.q.v[qo + d]
          y.v[zo + d] = q + zn.v[zo + d] - now.z.v[zo + d]
        else
          local r = now.z.v[zo + d] / zz + now.q.v[qo + d] / qq
          y.v[zo + d] = qq / zz * (zn.v[zo + d] - 2 * r * rx / rr + 2 * now.q.v[qo + d] / qq * zq)
        end
      end
    end
  end
  reg.v[0] = reg.v[0] / N / G / (o.reduction == "mean" and D or 1)
  return y, reg, codes, now
end

--- The K rows of column m, of rows first .. last, in order of falling score, ties to the lowest row.
local function nearest_rows(score, first, last, K)
  local rows = {}
  for n = first, last do rows[#rows + 1] = n end
  table.sort(rows, function(a, b)
    if score[a] ~= score[b] then return score[a] > score[b] end
    return a < b
  end)
  local out = {}
  for k = 1, K do out[k] = rows[k] end
  return out
end

--- options as of ops.quantize_smooth; noise is an array (N,G,M), vertices a list per group or nil (all).
function ops.quantize_smooth(z, book, log_tau, o, at)
  local N, G, D, M = z.shape[1], z.shape[2], z.shape[3], book.shape[2]
  local zn, qn, tau = normalized(z, D), normalized(book, D), math.exp(log_tau.v[0])
  local now = at or { p = {}, hot = {}, book = ops.contiguous(book), near = {} }
  local y, reg, codes, mean_pi = array(z.shape), array { 1 }, array { N, G }, array { G, M }
  local biggest = 0
  for g = 0, G - 1 do
    local pi = array { N, M }
    for n = 0, N - 1 do
      local logits, top, sum = {}, -math.huge, 0
      for m = 0, M - 1 do
        local s = 0
        for d = 0, D - 1 do s = s + zn.v[(n * G + g) * D + d] * qn.v[(g * M + m) * D + d] end
        logits[m] = s / tau
        top = math.max(top, logits[m])
      end
      for m = 0, M - 1 do sum = sum + math.exp(logits[m] - top) end
      local p, shift = {}, -math.huge
      for m = 0, M - 1 do
        pi.v[n * M + m] = math.exp(logits[m] - top) / sum
        mean_pi.v[g * M + m] = mean_pi.v[g * M + m] + pi.v[n * M + m] / N
        p[m] = logits[m] - top - math.log(sum)
        if o.sampler ~= "softmax" then p[m] = (p[m] + o.noise.v[(n * G + g) * M + m]) / o.gumbel_tau end
        shift = math.max(shift, p[m])
      end
      sum = 0
      for m = 0, M - 1 do
        p[m] = math.exp(p[m] - shift)
        sum = sum + p[m]
      end
      local best = 0
      for m = 0, M - 1 do
        p[m] = p[m] / sum
        if p[m] > p[best] then best = m end
      end
      biggest = biggest + p[best] / (N * G)
      local row = n * G + g
      if not at then now.p[row], now.hot[row] = p, best end
      codes.v[row] = now.hot[row]
      for d = 0, D - 1 do
        local s = 0
        if o.sampler == "hgumbel" then
          s = book.v[(g * M + now.hot[row]) * D + d]
          for m = 0, M - 1 do s = s + (p[m] - now.p[row][m]) * now.book.v[(g * M + m) * D + d] end
        else
          for m = 0, M - 1 do s = s + p[m] * book.v[(g * M + m) * D + d] end
        end
        y.v[row * D + d] = s
      end
    end
    local r = 0
    if o.regularizer == "ppl" then
      local h = 0
      for m = 0, M - 1 do
        local p = mean_pi.v[g * M + m]
        if p > 0 then h = h - p * math.log(p) end
      end
      r = 1 - math.exp(h) / M
    elseif o.regularizer ~= "none" then
      local vertices = o.vertices and o.vertices[g + 1] or nil
      if not vertices then
        vertices = {}
        for m = 0, M - 1 do vertices[m + 1] = m end
      end
      local shards = o.shards or 1
      local norm = {}
      for n = 0, N - 1 do
        norm[n] = 0
        for m = 0, M - 1 do norm[n] = norm[n] + pi.v[n * M + m] ^ 2 end
      end
      for i, m in ipairs(vertices) do
        local function distance(n)
          if o.regularizer == "knn-ce" then return -math.log(pi.v[n * M + m]) end
          return 1 - 2 * pi.v[n * M + m] + norm[n]
        end
        if not at then
          local score, chosen = {}, {}
          for n = 0, N - 1 do score[n] = -distance(n) end
          for s = 0, shards - 1 do
            local first, last = math.floor(s * N / shards), math.floor((s + 1) * N / shards) - 1
            for _, n in ipairs(nearest_rows(score, first, last, o.k / shards)) do chosen[#chosen + 1] = n end
          end
          now.near[g * 1e6 + i] = chosen
        end
        for _, n in ipairs(now.near[g * 1e6 + i]) do r = r + distance(n) / (#vertices * o.k) end
      end
    end
    reg.v[0] = reg.v[0] + r / G
  end
  return y, reg, codes, now, mean_pi, biggest
end

-- -- Random numbers: Philox 4x32-10 from its paper --------------------------------------------------------------------

local bit = require "bit"

local function unsigned(x) return x < 0 and x + 2 ^ 32 or x end
--- The two halves of a 32-bit product.
local function multiply_wide(a, b)
  local p = ffi.cast("uint64_t", a) * ffi.cast("uint64_t", b)
  return tonumber(p / 4294967296ULL), tonumber(p % 4294967296ULL)
end
local function xor(a, b, c) return unsigned(bit.bxor(bit.bxor(a, b), c)) end

--- Four 32-bit words of a counter {c0, c1, c2, c3} and a key {k0, k1}.
function R.philox(c, k)
  local c0, c1, c2, c3, k0, k1 = c[1], c[2], c[3], c[4], k[1], k[2]
  for _ = 1, 10 do
    local h0, l0 = multiply_wide(0xD2511F53, c0)
    local h1, l1 = multiply_wide(0xCD9E8D57, c2)
    c0, c1, c2, c3 = xor(h1, c1, k0), l1, xor(h0, c3, k1), l0
    k0, k1 = (k0 + 0x9E3779B9) % 2 ^ 32, (k1 + 0xBB67AE85) % 2 ^ 32
  end
  return { c0, c1, c2, c3 }
end

local function split(x) return x % 2 ^ 32, math.floor(x / 2 ^ 32) end
local function unit(word) return (math.floor(word / 512) + 0.5) / 8388608 end

--- u of element e of a tensor drawn with (seed, stream).
function R.unit(seed, stream, e)
  local b0, b1 = split(math.floor(e / 4))
  local s0, s1 = split(stream)
  local k0, k1 = split(seed)
  return unit(R.philox({ b0, b1, s0, s1 }, { k0, k1 })[e % 4 + 1])
end

--- Number i of (seed, stream) with 53 bits, uniform in (0, 1): words 0 and 1 of block i.
function R.unit53(seed, stream, i)
  local b0, b1 = split(i)
  local s0, s1 = split(stream)
  local k0, k1 = split(seed)
  local w = R.philox({ b0, b1, s0, s1 }, { k0, k1 })
  return (math.floor(w[1] / 32) * 67108864 + math.floor(w[2] / 64) + 0.5) / 9007199254740992
end

function ops.dropout(x, p, generator)
  local seed, stream = generator:stream()
  local y, s0, s1 = array(x.shape), split(stream)
  local k0, k1 = split(seed)
  for e = 0, x.n - 1 do
    local b0, b1 = split(math.floor(e / 64) * 16 + e % 16)
    local word = R.philox({ b0, b1, s0, s1 }, { k0, k1 })[math.floor(e % 64 / 16) + 1]
    y.v[e] = word >= math.floor(p * 2 ^ 32) and x.v[e] / (1 - p) or 0
  end
  return y
end

--- Says whether attention's dropout keeps the weight of query t and key s of head n (= b H + h), by the layout that
-- core/rng.h states.
function R.attention_kept(seed, stream, dropout, n, t, s, T)
  local b0, b1 = split((n * math.ceil(T / 8) + math.floor(t / 8)) * T + s)
  local s0, s1 = split(stream)
  local k0, k1 = split(seed)
  local word = R.philox({ b0, b1, s0, s1 }, { k0, k1 })[math.floor(t % 8 / 2) + 1]
  local half = t % 2 == 0 and word % 65536 or math.floor(word / 65536)
  return half < math.floor((1 - dropout) * 65536 + 0.5)
end

function ops.attention(q, k, v, options)
  options = options or {}
  local B, T, H, D = unpack(q.shape)
  local dropout, y = options.dropout or 0, array(q.shape)
  local qv, kv, vv, yv = q.v, k.v, v.v, y.v
  local lengths = options.lengths and R.from(options.lengths)
  local seed, stream
  if dropout > 0 then seed, stream = options.generator:stream() end
  local growth = 65536 / math.floor((1 - dropout) * 65536 + 0.5)
  local function at(b, t, h) return ((b * T + t) * H + h) * D end
  for b = 0, B - 1 do
    local keys = lengths and lengths.v[b] or T
    for h = 0, H - 1 do
      for t = 0, T - 1 do
        local score, top, sum, here = {}, -math.huge, 0, at(b, t, h)
        for s = 0, keys - 1 do
          local dot, there = 0, at(b, s, h)
          for d = 0, D - 1 do dot = dot + qv[here + d] * kv[there + d] end
          score[s] = dot / math.sqrt(D)
          top = math.max(top, score[s])
        end
        for s = 0, keys - 1 do
          score[s] = math.exp(score[s] - top)
          sum = sum + score[s]
        end
        for s = 0, keys - 1 do
          local kept = dropout == 0 or R.attention_kept(seed, stream, dropout, b * H + h, t, s, T)
          local weight = kept and score[s] / sum * growth or 0
          local there = at(b, s, h)
          for d = 0, D - 1 do yv[here + d] = yv[here + d] + weight * vv[there + d] end
        end
      end
    end
  end
  return y
end

--- k-means++ on the rows of x (N,D): array of M rows, 0-based.
function R.kmeans_start(x, M, seed, stream)
  local N, D, nearest, chosen = x.shape[1], x.shape[2], {}, {}
  for m = 0, M - 1 do
    local u, sum, pick = R.unit53(seed, stream, m), 0, nil
    for n = 0, N - 1 do sum = sum + (nearest[n] or 0) end
    if sum > 0 then
      local target = u * sum
      for n = 0, N - 1 do
        if nearest[n] > 0 then
          pick = n
          if target < nearest[n] then break end
        end
        target = target - nearest[n]
      end
    else
      pick = math.floor(u * N)
    end
    chosen[m + 1] = pick
    for n = 0, N - 1 do
      local d = 0
      for c = 0, D - 1 do d = d + (x.v[n * D + c] - x.v[pick * D + c]) ^ 2 end
      nearest[n] = math.min(nearest[n] or math.huge, d)
    end
  end
  return chosen
end

--- The Gumbel noise (N,G,M) of (seed, stream), by the layout that core/rng.h states.
function R.gumbel(seed, stream, N, G, M)
  local noise, panels = array { N, G, M }, math.ceil(M / 64)
  local s0, s1 = split(stream)
  local k0, k1 = split(seed)
  for row = 0, N * G - 1 do
    for m = 0, M - 1 do
      local b0, b1 = split((row * panels + math.floor(m / 64)) * 16 + m % 16)
      local u = unit(R.philox({ b0, b1, s0, s1 }, { k0, k1 })[math.floor(m % 64 / 16) + 1])
      noise.v[row * M + m] = -math.log(-math.log(u))
    end
  end
  return noise
end

--- Word w, 0 to 3, of block b of (seed, stream).
local function word_of(seed, stream, b, w)
  local b0, b1 = split(b)
  local s0, s1 = split(stream)
  local k0, k1 = split(seed)
  return R.philox({ b0, b1, s0, s1 }, { k0, k1 })[w + 1]
end

--- The mask of span_mask: array of T flags per row, by the layout that kernels/shared/span_mask.h states.
function R.span_mask(B, T, lengths, probability, span, least, seed, stream)
  local quads, rows, counts, fewest = math.ceil(T / 4), {}, {}, math.huge
  local function sorted(candidates, base)
    local word = {}
    for _, t in ipairs(candidates) do word[t] = word_of(seed, stream, base + math.floor(t / 4), t % 4) end
    table.sort(candidates, function(a, b) return word[a] < word[b] or word[a] == word[b] and a < b end)
    return candidates
  end
  for b = 0, B - 1 do
    local base, length, masked, starts = b * (1 + 2 * quads), lengths and lengths[b + 1] or T, {}, {}
    for t = 0, T - 1 do masked[t] = 0 end
    for t = 0, length - span - 1 do starts[#starts + 1] = t end
    local u = word_of(seed, stream, base, 0) / 2 ^ 32
    local n = math.min(#starts, math.max(least, math.floor(probability * length / span + u)))
    sorted(starts, base + 1)
    for i = 1, n do
      for t = starts[i], starts[i] + span - 1 do masked[t] = 1 end
    end
    counts[b] = 0
    for t = 0, T - 1 do counts[b] = counts[b] + masked[t] end
    if counts[b] > 0 then fewest = math.min(fewest, counts[b]) end
    rows[b] = masked
  end
  local mask = {}
  for b = 0, B - 1 do
    local frames, row = {}, {}
    for t = 0, T - 1 do
      if rows[b][t] == 1 then frames[#frames + 1] = t end
      row[t + 1] = 0
    end
    sorted(frames, b * (1 + 2 * quads) + 1 + quads)
    for i = 1, math.min(#frames, fewest) do row[frames[i] + 1] = 1 end
    mask[b + 1] = row
  end
  return mask
end

--- The distractors of `frames`, array of 0-based places, T a row.
function R.distractors(frames, T, K, seed, stream)
  local all = {}
  for n = 1, #frames do
    local others = {}
    for m = 1, #frames do
      if m ~= n and math.floor(frames[m] / T) == math.floor(frames[n] / T) then others[#others + 1] = m - 1 end
    end
    all[n] = {}
    for k = 1, K do
      local e = (n - 1) * K + k - 1
      all[n][k] = others[math.floor(word_of(seed, stream, math.floor(e / 4), e % 4) * #others / 2 ^ 32) + 1]
    end
  end
  return all
end

return R
