--- larger_cases.lua: shapes beside the `cases` of ops' records that reach the branches of the kernels: channel counts
-- around and off the vector widths, odd sizes, several chunks, blocks and threads. By op: T → argument lists, as there.

local vx = require "vertex"

local function elementwise(low, high)
  return function(T)
    local range = { low = low, high = high }
    return { { T({ 129, 65 }, range), T({ 129, 65 }, range) }, { T({ 61, 17, 19 }, range), T({ 17, 1 }, range) },
      { T({ 20011 }, range), T({ 1 }, range) } }
  end
end
local function unary(low, high, ...)
  local more = { ... }
  return function(T) return { { T({ 20011 }, { low = low, high = high }), unpack(more) } } end
end
local function reductions(T)
  return { { T { 40003 } }, { T { 20000, 3 }, 1 }, { T { 3, 20000 }, 2 }, { T { 7, 130, 17 }, 2 },
    { T { 5, 64, 128 }, { 1, 2 } },
    { T { 5, 64, 128 }, { 1, 3 }, true },
    { T { 33, 3, 64 }, 3 }, { T { 2, 3, 4, 5, 6 }, { 2, 4 } } }
end

local function indices(T, shape, high) return T(shape, { dtype = "i32", high = high }) end

local larger = {
  where = function(T)
    local function truth(shape) return T(shape, { dtype = "i32", high = 1 }):to "f32" end
    return { { truth { 129, 65 }, T { 129, 65 }, T { 129, 65 } },
      { truth { 61, 1, 19 }, T { 17, 1 }, T { 61, 17, 19 } }, { truth { 20011 }, T { 1 }, T { 20011 } },
      { truth { 40, 64 }, T { 40, 1 }, T { 64 } } }
  end,
  round = unary(0.51, 1.49), floor = unary(3.01, 3.99), sign = unary(-3, -0.1),
  cumsum = function(T) return { { T { 3001 }, 1 }, { T { 5, 300, 3 }, 2 }, { T { 40, 130 }, 1 } } end,
  topk = function(T) return { { T { 130, 170 }, 9 }, { T { 3, 2000 }, 70 }, { T { 40, 7, 30 }, 5, 2 } } end,
  scatter_add = function(T)
    return { { T { 40, 33, 65 }, 2, indices(T, { 40, 50, 65 }, 32), T { 40, 50, 65 } },
      { T { 7 }, 1, indices(T, { 3000 }, 6), T { 3000 } } }
  end,
  stack = function(T) return { { 2, T { 40, 70 }, T { 40, 70 }, T { 40, 70 } } } end,
  add = elementwise(), sub = elementwise(), mul = elementwise(), div = elementwise(0.5, 2), maximum = elementwise(),
    minimum = elementwise(),
  affine = unary(nil, nil, -1.5, 0.25), exp = unary(-8, 8), log = unary(0.01, 9), sqrt = unary(0.01, 9),
    abs = unary(0.01, 2), square = unary(-3, 3),
  lgamma = unary(0.1, 30), digamma = unary(0.1, 30), trigamma = unary(0.2, 30),
  relu = unary(0.01, 2), silu = unary(-9, 9), gelu = unary(-5, 5), sigmoid = unary(-9, 9), tanh = unary(-5, 5),
    power = unary(0.3, 3, -0.5),
  sum = reductions, mean = reductions, max = reductions, min = reductions,
  matmul = function(T)
    return { { T { 257, 65 }, T { 65, 129 } }, { T { 300, 17 }, T { 17, 3 } },
      { T { 5, 2100 }, T { 2100, 7 } }, { T { 33, 4099 }, T { 4099, 18 } },
      { T { 2, 40, 33 }, T { 2, 33, 20 } }, { T { 31, 300 }, T { 300, 64 } }, { T { 3, 20, 64 }, T { 64, 17 } },
        { T { 1, 64 }, T { 64, 600 } } }
  end,
  linear = function(T)
    return { { T { 513, 64 }, T { 17, 64 }, T { 17 } }, { T { 2, 9, 11, 3 }, T { 128, 3 } },
      { T { 2500, 17 }, T { 64, 17 }, T { 64 } } }
  end,
  conv3x3 = function(T)
    return { { T { 1, 37, 6, 3 }, T { 3, 3, 3, 64 }, T { 64 } }, { T { 1, 10, 9, 64 }, T { 3, 3, 64, 17 } },
      { T { 1, 9, 8, 64 }, T { 3, 3, 64, 64 }, T { 64 } },
      { T { 2, 35, 5, 17 }, T { 3, 3, 17, 3 }, T { 3 } }, { T { 1, 5, 4, 17 }, T { 3, 3, 17, 128 } },
        { T { 3, 2, 70, 3 }, T { 3, 3, 3, 3 }, T { 3 } },
      { T { 2, 1, 1, 5 }, T { 3, 3, 5, 70 }, T { 70 } } }
  end,
  conv2d = function(T)
    return { { T { 2, 19, 17, 33 }, T { 48, 33, 3, 3 }, T { 48 }, { stride = 2 } },
      { T { 1, 17, 17, 65 }, T { 70, 65, 1, 7 }, nil, { padding = { 0, 3 } } },
      { T { 3, 9, 8, 40 }, T { 33, 40, 1, 1 }, T { 33 } }, { T { 1, 13, 11, 24 }, T { 16, 6, 5, 5 }, T { 16 },
        { padding = 2, groups = 4 } },
      { T { 1, 12, 10, 7 }, T { 9, 7, 2, 2 }, nil, { stride = { 3, 4 }, padding = { 1, 0 } } },
      { T { 2, 40, 30, 3 }, T { 32, 3, 3, 3 }, T { 32 }, { stride = 2 } },
      { T { 1, 8, 8, 130 }, T { 20, 130, 3, 1 }, T { 20 }, { padding = { 1, 0 } } } }
  end,
  max_pool2d = function(T) return { { T { 2, 35, 33, 17 }, 3, { stride = 2 } }, { T { 1, 40, 40, 3 }, 4 } } end,
  avg_pool2d = function(T)
    return { { T { 2, 35, 33, 17 }, 3, { stride = 1, padding = 1, count_include_pad = false } },
      { T { 1, 40, 40, 3 }, 4 } }
  end,
  conv1d = function(T)
    return { { T { 2, 611, 1 }, T { 70, 1, 10 }, T { 70 }, { stride = 5 } },
      { T { 2, 211, 33 }, T { 48, 33, 3 }, nil, { stride = 2 } }, { T { 1, 97, 64 }, T { 33, 64, 2 }, T { 33 },
        { stride = 2 } },
      { T { 2, 37, 24 }, T { 24, 6, 20 }, T { 24 }, { padding = 10, groups = 4 } }, { T { 1, 45, 96 }, T { 96, 48, 7 },
        T { 96 }, { padding = 3, groups = 2 } },
      { T { 3, 23, 5 }, T { 5, 1, 9 }, nil, { padding = 4, groups = 5, stride = 2 } },
      { T { 2, 31, 7 }, T { 66, 7, 2 }, T { 66 }, { stride = 5, padding = 3 } },
      { T { 1, 460, 4 }, T { 20, 4, 130 }, T { 20 }, { padding = 1 } },
      { T { 1, 140, 128 }, T { 256, 128, 2 }, T { 256 }, { stride = 2 } } }
  end,
  dropout = function(T)
    local function fixed(seed, stream) return { stream = function() return seed, stream end } end
    return { { T { 20011 }, 0.3, fixed(3, 2 ^ 40) }, { T { 67, 33 }, 0.9, fixed(2 ^ 50, 7) },
      { T { 3, 5 }, 0, fixed(1, 1) } }
  end,
  depthwise_conv2d = function(T)
    local list = {}
    for _, c in ipairs { 3, 17, 64, 128 } do
      for stride = 1, 2 do
        list[#list + 1] = { T { 2, 9, 8, c }, T { 3, 3, c }, T { c }, stride }
        list[#list + 1] = { T { 1, 12, 7, c }, T { 3, 3, c }, nil, stride }
      end
    end
    list[#list + 1] = { T { 1, 40, 33, 17 }, T { 3, 3, 17 }, T { 17 }, 2 }
    list[#list + 1] = { T { 3, 1, 1, 20 }, T { 3, 3, 20 }, T { 20 }, 1 }
    return list
  end,
  upsample2x = function(T) return { { T { 2, 13, 9, 17 } }, { T { 1, 8, 8, 64 } }, { T { 3, 5, 7, 3 } } } end,
  group_norm = function(T)
    return { { T { 2, 300, 64 }, T { 64 }, T { 64 }, 16, "silu" },
      { T { 1, 31, 33, 17 }, T { 17 }, T { 17 }, 17 }, { T { 5, 40, 128 }, T { 128 }, T { 128 }, 32, "gelu" },
      { T { 1, 3000, 3 }, T { 3 }, T { 3 }, 1, "silu" }, { T { 9, 4, 6 }, T { 6 }, T { 6 }, 2, "none", 1e-3 },
      { T { 4, 700, 36 }, T { 36 }, T { 36 }, 36, "gelu", nil, vx.tensor({ 699, 227, 1, 700 }, { dtype = "i32" }) },
      { T { 3, 130, 70 }, T { 70 }, T { 70 }, 70, "none", nil, vx.tensor({ 117, 0, 30 }, { dtype = "i32" }) } }
  end,
  sepconv2d = function(T)
    return { { T { 3, 9, 8, 64 }, T { 3, 3, 64 }, T { 64, 64 }, T { 64 }, T { 64 }, T { 64 }, T { 3, 9, 8, 64 },
      { groups = 16, activation = "silu" } },
      { T { 1, 31, 9, 17 }, T { 3, 3, 17 }, T { 3, 17 }, T { 3 }, T { 17 }, T { 17 }, nil,
        { stride = 2, groups = 17, activation = "gelu" } },
      { T { 5, 4, 3, 3 }, T { 3, 3, 3 }, T { 64, 3 }, nil, nil, nil, nil, { up = 2 } },
      { T { 2, 7, 5, 17 }, T { 3, 3, 17 }, T { 5, 17 }, T { 5 }, T { 17 }, T { 17 }, T { 2, 7, 5, 5 },
        { up = 2, stride = 2 } } }
  end,
  layer_norm = function(T)
    return { { T { 200, 128 }, T { 128 }, T { 128 } }, { T { 7, 13, 17 }, T { 17 }, T { 17 } },
      { T { 3, 1000 }, T { 1000 }, T { 1000 } },
      { T { 700, 3 }, T { 3 }, T { 3 } } }
  end,
  softmax = function(T)
    return { { T({ 300, 65 }, { low = -4, high = 4 }) }, { T({ 3, 3001 }, { low = -6, high = 6 }) }, { T { 5, 1 } },
      { T({ 40, 3 }, { low = -90, high = 90 }) } }
  end,
  attention = function(T)
    local same = { stream = function() return 2 ^ 33 + 7, 2 ^ 32 + 9 end } -- the same stream every time
    local function case(shape, lengths, dropout)
      local far = 16 / shape[4] -- scores up to some 30, whose own rounding is small yet
      local range = { low = -math.min(3, far), high = math.min(3, far) }
      return { T(shape, range), T(shape, range), T(shape), { dropout = dropout, generator = same,
        lengths = lengths and require("vertex").tensor(lengths, { dtype = "i32" }) } }
    end
    return { case({ 2, 67, 2, 24 }, { 65, 17 }), case({ 1, 75, 1, 17 }, nil, 0.1), case({ 1, 64, 3, 64 }, { 63 }, 0.5),
      case({ 2, 20, 1, 96 }), case({ 1, 140, 1, 3 }, { 130 }, 0.9), case({ 1, 300, 1, 2 }),
      case({ 1, 33, 2, 128 }, { 33 }) }
  end,
  gather = function(T) return { { T { 300, 64 }, T({ 900 }, { dtype = "i32", high = 299 }) },
    { T { 7, 17 }, T({ 40, 30 }, { dtype = "i32", high = 6 }) },
    { T { 40, 33, 65 }, 2, indices(T, { 40, 20, 65 }, 32) }, { T { 20000 }, 1, indices(T, { 7 }, 19999) } } end,
  contrastive_loss = function(T)
    return { { T { 60, 33 }, T { 60, 33 }, indices(T, { 60, 17 }, 59) },
      { T { 130, 256 }, T { 130, 256 }, indices(T, { 130, 5 }, 129) } }
  end,
  mse = function(T) return { { T { 40001 }, T { 40001 } }, { T { 3, 17, 5 }, T { 3, 17, 5 } } } end,
  vertex_knn = function(T)
    local p, l = { low = 0.05, high = 1 }, { low = -3, high = 0 }
    return { { T({ 700, 33 }, p), 5, "ce" }, { T({ 333, 17 }, p), 20, "l2" }, { T({ 100, 130 }, l), 8, "l2", true } }
  end,
  knn = function(T) return { { T { 100, 33 }, T { 90, 33 }, 3 }, { T { 257, 2 }, T { 257, 2 }, 1, true },
    { T { 3, 70 }, T { 500, 70 }, 20 } } end,
  transpose = function(T) return { { T { 129, 70 }, 1, 2 }, { T { 5, 33, 17 }, 1, 3 },
    { T { 5, 33, 17, 3 }, 2, -1 } } end,
  cat = function(T) return { { 2, T { 40, 33, 3 }, T { 40, 1, 3 }, T { 40, 64, 3 } } } end,
  narrow = function(T) return { { T { 60, 70, 5 }, 2, 11, 50 } } end,
  expand = function(T) return { { T { 17, 1, 5 }, { 3, 17, 40, 5 } } } end,
}
larger.log_softmax = larger.softmax

return larger
