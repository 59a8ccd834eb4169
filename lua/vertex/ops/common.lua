--- ops/common.lua: what the files of ops share: questions about shapes, views that no gradient flows through, and sums
-- and products that backward passes are made of.

local core = require "vertex.core"

local common = {}

local op, VX = core.op, core.VX
local is_tensor, contiguous, fail, new, new_like = core.is_tensor, core.contiguous, core.fail, core.new, core.new_like
local shape_text = core.shape_text

-- -- Shapes -----------------------------------------------------------------------------------------------------------

--- Gives x, which has to be a tensor: `name` of `what`, an op.
function common.expect_tensor(x, what, name)
  if not is_tensor(x) then fail("%s: %s is a %s, expected a tensor", what, name, type(x)) end
  return x
end

--- Gives a number that an op computes with in f32, which has to hold it: `name` of `what`, an op.
function common.expect_f32(value, what, name)
  if core.fits_f32(value) then return value end
  fail("%s: %s is %.10g, which f32 does not hold: its numbers lie below %.4g, and the least above 0 is %.3g", what,
    name, value, 2 ^ 128, 2 ^ -149)
end

--- Multiplies the numbers of a list from `first` to `last` (all of them): 1 where there are none.
local function product(list, first, last)
  local n = 1
  for i = first or 1, last or #list do n = n * list[i] end
  return n
end
common.product = product

--- Gives the place of dimension d of x, from 1 on; d may count from the end.
function common.dimension(x, d, what)
  local n = x:dim()
  local i = type(d) == "number" and (d < 0 and n + d + 1 or d)
  if not i or i < 1 or i > n or i ~= math.floor(i) then
    fail("%s: dimension %s of a tensor %s", what, tostring(d), shape_text(x))
  end
  return i
end

--- Gives the shape that a and b are both repeated to.
function common.broadcast_shape(a, b, what)
  local sa, sb = a:shape(), b:shape()
  local n, s = math.max(#sa, #sb), {}
  for i = 0, n - 1 do
    local p, q = sa[#sa - i] or 1, sb[#sb - i] or 1
    if p ~= q and p ~= 1 and q ~= 1 then
      fail("%s: a %s and b %s disagree on a size", what, shape_text(a), shape_text(b))
    end
    s[n - i] = p == 1 and q or p
  end
  return s
end

local ACTIVATIONS = { none = VX.ACT_NONE, silu = VX.ACT_SILU, gelu = VX.ACT_GELU }

--- Gives the constant of an activation by its name; nil is "none".
function common.activation_number(name, what)
  return ACTIVATIONS[name or "none"] or fail("%s: activation '%s', expected none, silu or gelu", what, tostring(name))
end

-- -- Views and new tensors, unrecorded --------------------------------------------------------------------------------

--- Makes an uninitialized tensor on x's device; f32 unless told otherwise.
local function empty_on(x, shape, dtype) return new(shape, { dtype = dtype, device = core.device_of(x) }) end
common.empty_on = empty_on

--- Gives x as an op may read it that writes to y: a copy where they share memory.
function common.apart(x, y)
  if not core.same_storage(x, y) then return x end
  return core.overwrite(new_like(x), x)
end

--- Gives a contiguous view of a contiguous tensor under another shape.
local function shaped(x, shape)
  local stride, s = {}, 1
  for i = #shape, 1, -1 do
    stride[i] = s
    s = s * math.max(shape[i], 1)
  end
  return core.view(x, shape, stride, 0)
end
common.shaped = shaped

--- Gives x as rows, (everything but the last dimension, last dimension), and x's shape.
function common.rows(x)
  local s = x:shape()
  local c = s[#s] or 1
  return shaped(contiguous(x), { product(s, 1, #s - 1), c }), s
end

--- Gives a contiguous x as (what is before dimension d, d, what is after it).
function common.around(x, d)
  local s = x:shape()
  return shaped(x, { product(s, 1, d - 1), s[d], product(s, d + 1) })
end

--- Gives a view of x with dimensions a and b exchanged.
function common.transposed(x, a, b)
  local s, st = x:shape(), x:strides()
  s[a], s[b], st[a], st[b] = s[b], s[a], st[b], st[a]
  return core.view(x, s, st, 0)
end

--- Gives a contiguous tensor with dimension d of x in the last place and the last one in its; x itself where d is last.
function common.turned(x, d)
  local last = x:dim()
  if d == last then return contiguous(x) end
  return contiguous(common.transposed(x, d, last))
end

--- Gives the place of an optional dimension: the last one where d is nil, 0 for a scalar without one.
function common.last_unless(x, d, what)
  if d == nil then return x:dim() end
  return common.dimension(x, d, what)
end

--- Gives x with dimensions of size 1 repeated to `shape` (new ones in front), by stride 0; nil where that cannot be.
function common.expanded(x, shape)
  local s, st = x:shape(), x:strides()
  local stride, extra = {}, #shape - #s
  for i = 1, #shape do
    local own = s[i - extra]
    if i <= extra or (own == 1 and shape[i] ~= 1) then
      stride[i] = 0
    elseif own == shape[i] then
      stride[i] = st[i - extra]
    else
      return nil
    end
  end
  return core.view(x, shape, stride, 0)
end

--- Sums g over the dimensions along which a tensor of `shape` was repeated.
function common.sum_to(g, shape)
  local gs = g:shape()
  local extra = #gs - #shape
  local kept, same = {}, extra == 0
  for i = 1, #gs do
    kept[i] = i <= extra and 1 or shape[i - extra]
    same = same and kept[i] == gs[i]
  end
  if same then return g end
  local y = empty_on(g, kept)
  op.reduce(y, g, VX.REDUCE_SUM)
  return extra > 0 and shaped(y, shape) or y
end

-- -- Elementwise, unrecorded ------------------------------------------------------------------------------------------

--- Gives an operand that may be a number as a tensor (1) beside `other`, anything else as it is: `name` of `what`.
function common.operand(x, other, what, name)
  if type(x) == "number" and is_tensor(other) then
    return empty_on(other, { 1 }):fill(common.expect_f32(x, what, name))
  end
  return x
end

--- Computes a (kind) b, broadcast, for the op called `what`.
function common.binary(what, kind, a, b)
  common.expect_tensor(a, what, "a")
  common.expect_tensor(b, what, "b")
  local s = common.broadcast_shape(a, b, what)
  local y = empty_on(a, s)
  op.binary(y, common.expanded(a, s), common.expanded(b, s), kind)
  return y
end

--- Computes alpha x of a contiguous x.
function common.scaled(x, alpha)
  local y = new_like(x)
  op.unary(y, x, VX.AFFINE, alpha, 0)
  return y
end

return common
