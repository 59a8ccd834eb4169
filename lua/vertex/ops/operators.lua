--- ops/operators.lua: what tensors do under Lua's operators and brackets, and the methods that are made of ops.

local check = require "vertex.check"
local common = require "vertex.ops.common"
local core = require "vertex.core"
local ops = require("vertex.ops.record").ops
local tape = require "vertex.tape"

local Tensor, fail = core.Tensor, core.fail
local expect_f32 = common.expect_f32

--- Gives a view of x with its last two dimensions exchanged.
-- @return tensor
-- @raise where x has fewer than two dimensions
function Tensor:t() return ops.transpose(self, -1, -2) end

--- Copies the tensor; gradients flow through.
-- @return tensor f32 of x's shape, contiguous
function Tensor:clone() return ops.affine(self, 1, 0) end

local function arithmetic(sign, tensors, with_number, with_swapped)
  local right, left = "x " .. sign .. " n", "n " .. sign .. " x"
  return function(a, b)
    if type(b) == "number" then return with_number(a, expect_f32(b, right, "n")) end
    if type(a) == "number" then return with_swapped(b, expect_f32(a, left, "n")) end
    return tensors(a, b)
  end
end

Tensor.__add = arithmetic("+", ops.add, function(x, n) return ops.affine(x, 1, n) end,
  function(x, n) return ops.affine(x, 1, n) end)
Tensor.__sub = arithmetic("-", ops.sub, function(x, n) return ops.affine(x, 1, -n) end,
  function(x, n) return ops.affine(x, -1, n) end)
Tensor.__mul = arithmetic("*", ops.mul, function(x, n) return ops.affine(x, n, 0) end,
  function(x, n) return ops.affine(x, n, 0) end)
Tensor.__div = arithmetic("/", ops.div, function(x, n)
  -- a power of two: the same bits, sooner
  if math.abs(math.frexp(n)) == 0.5 and core.fits_f32(1 / n) then return ops.affine(x, 1 / n, 0) end
  return ops.div(x, n)
end, function(x, n) return ops.div(n, x) end)
Tensor.__unm = function(x) return ops.affine(x, -1, 0) end
Tensor.__pow = function(x, n)
  if type(n) ~= "number" then fail("x ^ n: the exponent is a %s, expected a number", type(n)) end
  return ops.power(x, expect_f32(n, "x ^ n", "n"))
end

-- Operators that are none of tensors: what Lua would say of them names a table.
local INSTEAD = {
  __mod = "x % y: write x - vx.floor(x / y) * y",
  __concat = "x .. y: write tostring(x) .. y for a text, vx.cat(dim, a, b) to join tensors",
  __lt = "x < y, x > y: a comparison of Lua gives one boolean: write vx.lt(a, b) or vx.gt(a, b)",
  __le = "x <= y, x >= y: a comparison of Lua gives one boolean: write vx.le(a, b) or vx.ge(a, b)",
}
for event, words in pairs(INSTEAD) do
  Tensor[event] = function() fail("%s", words) end
end

-- Fields that a tensor may have or not; what else was looked for in vain joins them.
local absent = { grad = true, rate = true, no_decay = true, name = true, _node = true, _slot = true, _scope = true,
  _gradient_buffer = true, _renew_buffer = true, _h = true }

--- Raises where a key is no field and no index: nearly the name of a field, or a table or tensor of indices.
local function refuse_key(key)
  if type(key) == "string" then
    if not key:find "^_" then
      local names = check.names(Tensor)
      for _, name in ipairs { "grad", "requires_grad", "no_decay", "rate" } do names[#names + 1] = name end
      local nearest = check.nearest(key, names)
      if nearest then fail("x.%s: a tensor has no such field, did you mean '%s'?", key, nearest) end
    end
    absent[key] = true
  elseif core.is_tensor(key) then
    fail "x[tensor]: write vx.gather(x, index) for rows by an i32 index, vx.where or vx.masked_fill for a mask"
  elseif type(key) == "table" then
    fail "x[{ ... }]: write x[i][j], or x:narrow(dim, first, count) and x:select(dim, index), all 1-based"
  end
end

--- x[i]: the i-th slice along the first dimension (1-based, negative from the end).
Tensor.__index = function(x, key)
  local method = Tensor[key]
  if method ~= nil then return method end
  if type(key) == "number" then return ops.select(x, 1, key) end
  if not absent[key] then refuse_key(key) end
  return nil
end

--- x[i] = number or tensor.
Tensor.__newindex = function(x, key, value)
  if type(key) ~= "number" then
    if not absent[key] then refuse_key(key) end
    return rawset(x, key, value)
  end
  core.expect_writable(x, "x[i] = ...")
  tape.expect_no_gradient(value, "x[i] = ...")
  local slice = tape.no_grad(ops.select, x, 1, key)
  if type(value) == "number" then slice:fill(value) else slice:copy(value) end
end
