--- core/tensor.lua: a tensor as Lua holds it, a handle of C under Tensor's methods: creation, views, questions, reading
-- and writing. What is differentiable is built on this in lua/vertex/ops.

local ffi = require "ffi"
local check = require "vertex.check"
local device = require "vertex.core.device"
local dtype = require "vertex.core.dtype"
local library = require "vertex.core.library"
local ops = require "vertex.core.op"

local handle, op = ops.handle, ops.op
local C, call, fail = library.C, library.call, library.fail
local dtypes, dtype_names, fits = dtype.dtypes, dtype.dtype_names, dtype.fits
local account, device_name, device_number, number_of = device.account, device.device_name, device.device_number,
  device.number_of

local tensors = {}
local Tensor = {}
tensors.Tensor = Tensor

local handle_out = ffi.new "vx_tensor *[1]"
local shape_buffer, stride_buffer = ffi.new "int64_t[8]", ffi.new "int64_t[8]"

-- -- Handles ----------------------------------------------------------------------------------------------------------

-- The step scopes, arrays of the tensors made in them. For scope.lua.
local scopes = require("vertex.core.extent").new_extents()
tensors.scopes = scopes

--- Makes the tensor of a C handle; from now on it is freed with the tensor. keep: outside of the step scope.
local function wrap(h, keep)
  local t = setmetatable({ _h = ffi.gc(h, C.vx_free), requires_grad = false }, Tensor)
  local scope = scopes.innermost and not keep and scopes:here()
  if scope then
    scope[#scope + 1] = t
    t._scope = scope
  end
  return t
end

--- Runs make(out, ...), a C function that puts a new tensor in out[0], and gives that tensor.
function tensors.made(make, ...)
  call(make, handle_out, ...)
  local t = wrap(handle_out[0])
  account(C.vx_device(t._h), t:numel() * dtypes[t:dtype()].bytes)
  return t
end

--- Says whether a tensor's memory was given back.
function tensors.is_released(x) return x._h == nil end

--- Says whether x is a tensor.
-- @param x anything
-- @return true or false
function tensors.is_tensor(x) return getmetatable(x) == Tensor end

local function fill_shape(shape)
  local n = #shape
  if n > 8 then fail("a tensor has at most 8 dimensions, got %d", n) end
  for i = 1, n do
    local s = shape[i]
    if type(s) ~= "number" or s ~= math.floor(s) or s < 0 or s > 2 ^ 53 then
      fail("size %d of a shape is %s, expected an integer of 0 or more", i, tostring(s))
    end
    shape_buffer[i - 1] = s
  end
  return n
end

-- -- Creation ---------------------------------------------------------------------------------------------------------

--- Makes an uninitialized tensor. options: { dtype = "f32", device = default, keep = outside of any step scope }.
local function new(shape, options)
  local n = fill_shape(shape)
  local kind = dtypes[options and options.dtype or "f32"]
  if not kind then fail("dtype '%s': expected %s", tostring(options.dtype), dtype.known_dtypes()) end
  local number = number_of(options and options.device)
  call(C.vx_new, handle_out, number, kind.number, n, shape_buffer)
  local t = wrap(handle_out[0], options and options.keep)
  account(number, tonumber(C.vx_numel(t._h)) * kind.bytes)
  return t
end
tensors.new = new

--- Makes an uninitialized tensor of x's shape, dtype and device.
function tensors.new_like(x, keep)
  local h = handle(x)
  local n, number, kind = C.vx_ndim(h), C.vx_device(h), C.vx_dtype(h)
  for i = 0, n - 1 do shape_buffer[i] = C.vx_size(h, i) end
  call(C.vx_new, handle_out, number, kind, n, shape_buffer)
  local t = wrap(handle_out[0], keep)
  account(number, tonumber(C.vx_numel(t._h)) * dtypes[dtype_names[kind]].bytes)
  return t
end

--- Makes a view of x's storage; strides and offset in elements from x's first one (0-based). No gradient flows through
-- it: that is for lua/vertex/ops/view.lua.
function tensors.view(x, shape, stride, offset)
  local n = fill_shape(shape)
  for i = 1, n do stride_buffer[i - 1] = stride[i] end
  call(C.vx_view, handle_out, handle(x), n, shape_buffer, stride_buffer, offset or 0)
  return wrap(handle_out[0])
end

local function flatten(value, depth, shape, out)
  if type(value) ~= "table" then
    if depth <= #shape then
      fail("tensor: a number where a row of %d was expected (element %d)", shape[depth], #out + 1)
    end
    if type(value) ~= "number" then fail("tensor: element %d is a %s, expected a number", #out + 1, type(value)) end
    out[#out + 1] = value
    return
  end
  if depth > #shape then fail("tensor: a row where a number was expected (element %d)", #out + 1) end
  if #value ~= shape[depth] then
    fail("tensor: ragged rows: %d elements where %d were expected", #value, shape[depth])
  end
  for i = 1, #value do flatten(value[i], depth + 1, shape, out) end
end

-- The options of what makes tensors.
tensors.CREATION = { dtype = "string", device = "string", requires_grad = { "boolean", false } }

--- Makes a tensor from nested tables of numbers.
-- @param data number (shape {}), or array of numbers (N), or array of arrays (N,M), ... (x:clone() copies a tensor);
-- rows of one length
-- @param[opt] options { dtype = "f32" | "bf16" | "i32" | "u8", device = default, requires_grad = false }
-- @return tensor
-- @raise where rows differ in length, tables are nested more than 8 deep, or an element is no number
function tensors.tensor(data, options)
  local o = check.options("tensor", options, tensors.CREATION)
  local shape, probe = {}, data
  while type(probe) == "table" do
    if #shape == 8 then fail "tensor: tables nested more than 8 deep (does one contain itself?)" end
    shape[#shape + 1] = #probe
    probe = probe[1]
  end
  local flat = {}
  flatten(data, 1, shape, flat)
  local t = new(shape, o)
  t:fromtable(flat)
  if o.requires_grad then t.requires_grad = true end
  return t
end

-- -- Questions --------------------------------------------------------------------------------------------------------

--- Gives the handle of the tensor that a method is called on. Ops ask these all the time: they have no other check.
local function own(self, name)
  if getmetatable(self) == Tensor then return self._h or handle(self) end
  fail("%s: called on %s; a method takes its tensor before a colon, as in x:%s()", name, check.show(self), name)
end

--- Gives the number of dimensions.
-- @return integer of 0 or more
function Tensor:dim() return C.vx_ndim(own(self, "dim")) end

--- Names the dtype.
-- @return "f32", "bf16", "i32" or "u8"
function Tensor:dtype() return dtype_names[C.vx_dtype(own(self, "dtype"))] end

--- Names the device that the elements lie on.
-- @return "cpu", "cuda:0", ...
function Tensor:device() return device_name(C.vx_device(own(self, "device"))) end

--- Gives the number of that device, as C counts them.
function tensors.device_of(x) return C.vx_device(handle(x)) end

--- Counts the writes to x's memory so far, through whatever tensor shares it.
function tensors.writes(x) return tonumber(C.vx_writes(handle(x))) end

--- Names what wrote to x's memory last: an op, "copy", "write".
function tensors.last_writer(x) return ffi.string(C.vx_last_writer(handle(x))) end

--- Says whether two tensors share their memory.
function tensors.same_storage(a, b) return C.vx_same_storage(handle(a), handle(b)) ~= 0 end

--- Says whether the memory of two tensors overlaps, from the first element of each to its last.
function tensors.overlap(a, b) return C.vx_same_storage(handle(a), handle(b)) == 2 end

--- Gives the number of elements.
-- @return integer of 0 or more
function Tensor:numel() return tonumber(C.vx_numel(own(self, "numel"))) end

--- Says whether the elements lie in memory row by row, without holes.
-- @return true or false
function Tensor:is_contiguous() return C.vx_is_contiguous(own(self, "is_contiguous")) ~= 0 end

--- Gives the size of one dimension, or all sizes.
-- @param[opt] d dimension, 1-based; negative counts from the end
-- @return number of elements along d; without d an array of all sizes
-- @raise where x has no dimension d
function Tensor:size(d)
  local n = C.vx_ndim(own(self, "size"))
  if d == nil then return self:shape() end
  if type(d) ~= "number" or d % 1 ~= 0 then fail("size: d is %s, expected a dimension, 1-based", check.show(d)) end
  local i = d < 0 and n + d or d - 1
  if i < 0 or i >= n then fail("size(%d) of a tensor with %d dimensions", d, n) end
  return tonumber(C.vx_size(self._h, i))
end

--- Gives all sizes.
-- @return array of the sizes, first dimension first; {} for a scalar
function Tensor:shape()
  local h, s = own(self, "shape"), {}
  for i = 1, C.vx_ndim(h) do s[i] = tonumber(C.vx_size(h, i - 1)) end
  return s
end

--- Gives the strides: how many elements lie between neighbours along each dimension.
-- @return array of the strides, in elements, first dimension first
function Tensor:strides()
  local h, s = own(self, "strides"), {}
  for i = 1, C.vx_ndim(h) do s[i] = tonumber(C.vx_stride(h, i - 1)) end
  return s
end

--- Gives the text of a shape, "(2,3)"; x is a tensor or an array of sizes.
function tensors.shape_text(x)
  return "(" .. table.concat(tensors.is_tensor(x) and x:shape() or x, ",") .. ")"
end

-- -- Reading and writing ----------------------------------------------------------------------------------------------

--- Gives x itself where it is contiguous, else a contiguous copy that no gradient flows through.
local function contiguous(x)
  if x:is_contiguous() then return x end
  local y = tensors.new_like(x)
  call(C.vx_copy, y._h, handle(x))
  return y
end
tensors.contiguous = contiguous

--- Frees the tensor's memory now instead of when Lua's collector finds it; using it afterwards is an error.
function Tensor:release()
  if self._h ~= nil then
    C.vx_free(ffi.gc(self._h, nil))
    self._h = nil
    self._node = nil
  end
end

--- Copies all elements to the host: a C array and their number; bf16 comes as f32.
local function to_array(x)
  if x:dtype() == "bf16" then x = x:to "f32" end
  x = contiguous(x)
  local n = x:numel()
  local array = dtypes[x:dtype()].array(math.max(n, 1))
  call(C.vx_read, x._h, 0, n, array)
  return array, n
end

--- Copies all elements to Lua.
-- @return nested tables of numbers, as vx.tensor takes them; a plain number for shape {}
function Tensor:totable()
  local array = to_array(self)
  local shape, position = self:shape(), 0
  local function level(d)
    if d > #shape then
      position = position + 1
      return tonumber(array[position - 1])
    end
    local t = {}
    for i = 1, shape[d] do t[i] = level(d + 1) end
    return t
  end
  return level(1)
end

--- Copies the only element to Lua.
-- @return number
-- @raise where the tensor has more or fewer than one element
function Tensor:item()
  if self:numel() ~= 1 then fail("item: of a tensor %s, expected one element", tensors.shape_text(self)) end
  return tonumber((to_array(self))[0])
end

--- Copies the raw elements to Lua.
-- @return string of the little-endian elements, row-major
function Tensor:bytes()
  local x = contiguous(self)
  local n, item = x:numel(), dtypes[x:dtype()].bytes
  local buffer = ffi.new("uint8_t[?]", math.max(n * item, 1))
  call(C.vx_read, x._h, 0, n, buffer)
  return ffi.string(buffer, n * item)
end

--- Gives the input of the op that made x whose memory x shares: that of which x is a view; nil where there is none.
local function viewed(x)
  local inputs = x._node.inputs
  for i = 1, inputs.n do
    if tensors.is_tensor(inputs[i]) and C.vx_same_storage(inputs[i]._h, handle(x)) ~= 0 then return inputs[i] end
  end
end

--- Says whether x was computed on the tape: leaves, views of them, and results whose record was used up were not.
function tensors.is_computed(x)
  while type(x) == "table" and rawget(x, "_node") and x._node.inputs do
    x = viewed(x)
    if not x then return true end
  end
  return false
end

--- Raises where x was computed on the tape: a write to it would be one that gradients do not see.
local function expect_writable(x, what)
  if tensors.is_computed(x) then
    fail("%s: of a result that gradients flow through, which would not see the write: use vx.where, vx.cat or "
      .. "masked_fill, or write to x:detach()", what)
  end
end
tensors.expect_writable = expect_writable

--- Raises where x's dtype does not hold a number: the i-th of those that `what` was given, or the only one.
local function expect_fits(what, kind, value, i)
  if dtype.fits(kind, value) then return end
  fail("%s: %s%.10g, which %s does not hold, but %s", what, i and ("element %d is "):format(i) or "", value, kind,
    dtype.range_text(kind))
end

--- Overwrites all elements.
-- @param flat array of as many numbers as x has elements, row-major
-- @return the tensor itself
-- @raise where the counts differ, or a number does not fit the dtype: a fraction or one out of range in integers, one
-- beyond f32
function Tensor:fromtable(flat)
  local n = self:numel()
  expect_writable(self, "fromtable")
  if #flat ~= n then fail("fromtable: %d numbers for a tensor %s", #flat, tensors.shape_text(self)) end
  local kind = self:dtype()
  local staged = kind == "bf16" and "f32" or kind
  local array = dtypes[staged].array(math.max(n, 1))
  for i = 1, n do
    local value = flat[i]
    if type(value) ~= "number" then fail("fromtable: element %d is a %s, expected a number", i, type(value)) end
    if not fits(kind, value) then expect_fits("fromtable", kind, value, i) end
    array[i - 1] = value
  end
  local target = self
  if staged ~= kind or not self:is_contiguous() then
    target = new(self:shape(), { dtype = staged, device = "cpu" })
  end
  call(C.vx_write, target._h, 0, n, array)
  if target ~= self then
    call(C.vx_copy, handle(self), target._h)
    target:release()
  end
  return self
end

--- Overwrites all elements from raw bytes.
-- @param bytes string of little-endian elements, row-major
-- @return the tensor itself
-- @raise where the string is of another length, or x is not contiguous
function Tensor:frombytes(bytes)
  local item = dtypes[self:dtype()].bytes
  expect_writable(self, "frombytes")
  if #bytes ~= self:numel() * item then
    fail("frombytes: %d bytes for a %s tensor %s", #bytes, self:dtype(), tensors.shape_text(self))
  end
  call(C.vx_write, handle(self), 0, self:numel(), ffi.cast("const void *", bytes))
  return self
end

--- Overwrites all elements of x with those of another tensor; tape.lua makes Tensor:copy of it. Gives x.
function tensors.overwrite(x, source)
  if not tensors.is_tensor(source) then fail("copy: a %s, expected a tensor", type(source)) end
  expect_writable(x, "copy")
  call(C.vx_copy, handle(x), handle(source))
  return x
end

--- Sets all elements to one number.
-- @param value number
-- @return the tensor itself
-- @raise where the number does not fit the dtype, as in fromtable
function Tensor:fill(value)
  expect_writable(self, "fill")
  if type(value) == "number" then expect_fits("fill", self:dtype(), value) end
  op.fill(self, value)
  return self
end

--- Sets all elements to 0.
-- @return the tensor itself
function Tensor:zero()
  expect_writable(self, "zero")
  return self:fill(0)
end

--- Copies the tensor to a device, or into a dtype: integers get the nearest they have (a half rounds to even, a NaN
-- becomes 0). No gradient flows through.
-- @param where "cpu", "cuda:0", ... or "f32", "bf16", "i32", "u8"
-- @return tensor of x's shape; x itself where nothing changes
-- @raise where there is no such device
function Tensor:to(where)
  local own_dtype, own_device = self:dtype(), self:device()
  local new_dtype, new_device = own_dtype, own_device
  if dtypes[where] then new_dtype = where else new_device = device_name(device_number(where)) end
  if new_dtype == own_dtype and new_device == own_device then return self end
  local y = new(self:shape(), { dtype = new_dtype, device = new_device })
  return tensors.overwrite(y, self)
end

--- Gives the same elements, in the same memory, under a new handle that no gradient flows through.
-- @return tensor of x's shape
function Tensor:detach()
  return tensors.view(self, self:shape(), self:strides(), 0)
end

return tensors
