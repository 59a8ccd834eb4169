--- core: the only file that calls C. Finds and opens libvertex, turns statuses into errors at the user's line, and
-- gives tensors to Lua: creation, views, reading and writing, the step scope, the collector's share in memory, random
-- streams. Everything differentiable is built on this in ops.lua.

local ffi = require "ffi"

local core = {}

-- -- The library ------------------------------------------------------------------------------------------------------

local ABI = 5

core.directory = debug.getinfo(1, "S").source:match "^@(.*)/core/[^/]*$" or ".." -- .../lua/vertex
core.root = core.directory:match "^(.*)/lua/vertex$" or core.directory .. "/../.."

local function open_library()
  local tried, candidates = {}, {}
  if os.getenv "VERTEX_LIB" then
    candidates = { os.getenv "VERTEX_LIB" }
  else
    candidates[1] = core.root .. "/build/libvertex.so"
    -- installed: PREFIX/lib/lua/5.1/vertex/libvertex.so
    local prefix = core.directory:match "^(.*)/share/lua/5.1/vertex$"
    candidates[#candidates + 1] = prefix and prefix .. "/lib/lua/5.1/vertex/libvertex.so"
    candidates[#candidates + 1] = package.searchpath("vertex.libvertex", package.cpath)
    candidates[#candidates + 1] = "vertex"
  end
  for _, name in ipairs(candidates) do
    local ok, lib = pcall(ffi.load, name)
    if ok then return lib end
    tried[#tried + 1] = "  " .. name .. ": " .. tostring(lib)
  end
  error("vertex: no library found. Build it with ./setup.sh, or name one in VERTEX_LIB. Tried:\n" .. table.concat(tried,
    "\n"), 0)
end

assert(ffi.abi "64bit", "vertex needs a 64-bit LuaJIT")
ffi.cdef "int vx_abi(void); const char *vx_cdef(void); int setenv(const char *, const char *, int);"
if not os.getenv "OMP_WAIT_POLICY" then
  -- idle OpenMP threads spin this often before they sleep; the default of 300,000 costs up to tenfold where cores are
  -- shared
  ffi.C.setenv("GOMP_SPINCOUNT", "5000", 0)
end
local C = open_library()
core.C = C -- anchored for the life of the state: finalizers call into it
if C.vx_abi() ~= ABI then
  error(("vertex: the library speaks ABI %d, these Lua files ABI %d: rebuild with ./setup.sh"):format(C.vx_abi(), ABI),
    0)
end
ffi.cdef(ffi.string(C.vx_cdef()))
core.version = ffi.string(C.vx_version())

-- -- Errors -----------------------------------------------------------------------------------------------------------

--- Raises `message` at the line of the first caller outside lua/vertex.
local function fail(message, ...)
  if select("#", ...) > 0 then message = message:format(...) end
  local own = core.directory .. "/"
  for level = 2, 60 do
    local info = debug.getinfo(level, "Sl")
    if not info then break end
    local source = info.source:sub(2)
    if info.currentline > 0 and source:sub(1, #own) ~= own then
      error(("%s:%d: %s"):format(info.short_src, info.currentline, message), 0)
    end
  end
  error(message, 0)
end
core.fail = fail

local function check(status)
  if status ~= 0 then fail("%s", ffi.string(C.vx_error())) end
end

local ENOMEM, ENOSUP, EEND, EINTR = 2, 3, 7, 8 -- as numbers: VX_ENOMEM, VX_ENOSUP, VX_EEND, VX_EINTR of vertex.h

--- Calls a C function that returns a status; out of memory is tried once more after a collection, since dead tensors
-- may still wait for Lua's collector. A failed op has written nothing, so that is safe.
local function call(f, ...)
  local status = f(...)
  if status == ENOMEM then
    collectgarbage()
    collectgarbage()
    status = f(...)
  end
  if status ~= 0 then check(status) end
end
core.call = call

-- -- Tensors ----------------------------------------------------------------------------------------------------------

local Tensor = {}
core.Tensor = Tensor

local DTYPES = { f32 = 0, bf16 = 1, i32 = 2, u8 = 3 }
local DTYPE_NAMES = { [0] = "f32", "bf16", "i32", "u8" }
local DTYPE_BYTES = { f32 = 4, bf16 = 2, i32 = 4, u8 = 1 }
local C_ARRAY = { f32 = "float[?]", bf16 = "uint16_t[?]", i32 = "int32_t[?]", u8 = "uint8_t[?]" }

local handle_out = ffi.new "vx_tensor *[1]"
local shape_buffer, stride_buffer = ffi.new "int64_t[8]", ffi.new "int64_t[8]"
local int_out = ffi.new "int[1]"
local device_names = {}          -- number → name

local scope                      -- innermost step scope: an array of the tensors made in it
local memory_out = ffi.new "vx_memory_info"
local LOOK_AT, LEAST_MARK = 64e6, 512e6
local made_bytes, soft_marks = {}, {} -- by device number
for device = 0, 63 do made_bytes[device], soft_marks[device] = 0, LEAST_MARK end

--- Bytes made since the last look are cheap to count; the true figure is asked for only every 64 MB.
local function account(device, bytes)
  local made = made_bytes[device] + bytes
  made_bytes[device] = made
  if made < LOOK_AT then return end
  made_bytes[device] = 0
  C.vx_memory(device, memory_out)
  if tonumber(memory_out.live) > soft_marks[device] then
    collectgarbage()
    collectgarbage()
    C.vx_memory(device, memory_out)
    soft_marks[device] = math.max(LEAST_MARK, 1.4 * tonumber(memory_out.live))
  end
end

local function wrap(h, keep)
  local t = setmetatable({ _h = ffi.gc(h, C.vx_free), requires_grad = false }, Tensor)
  if scope and not keep then
    scope[#scope + 1] = t
    t._scope = scope
  end
  return t
end
core.wrap = wrap

--- The C handle of a tensor; nil stays nil (an optional argument).
local function handle(x)
  if x == nil then return nil end
  local h = x._h
  if h == nil then
    fail "this tensor was released: it was made inside vx.step and not returned from it (return it, or vx.keep(x))"
  end
  return h
end
core.handle = handle

--- An array for C of n elements of a C type: "vx_tensor *" for handles, "float". It keeps no tensor alive.
function core.array(ctype, n) return ffi.new(ctype .. "[?]", n) end

--- Is x a tensor?
function core.is_tensor(x) return getmetatable(x) == Tensor end

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

local function dtype_number(dtype)
  local d = DTYPES[dtype or "f32"]
  if not d then fail("dtype '%s': expected f32, bf16, i32 or u8", tostring(dtype)) end
  return d
end

-- -- Devices ----------------------------------------------------------------------------------------------------------

local default_device = 0
local default_chosen = false

--- Number of a device name, opening its backend; raises where it is not there.
local function device_number(name)
  if type(name) == "number" then return name end
  call(C.vx_device_open, tostring(name), int_out)
  return int_out[0]
end
core.device_number = device_number

local function device_name(number)
  if not device_names[number] then
    local text = ffi.new "char[64]"
    call(C.vx_device_name, number, text, 64)
    device_names[number] = ffi.string(text)
  end
  return device_names[number]
end

local function device_count(backend)
  if C.vx_device_count(backend, int_out) == 0 then return int_out[0] end
  return 0, ffi.string(C.vx_error())
end

local function choose_default()
  if default_chosen then return end
  default_chosen = true
  if device_count "cuda" > 0 and C.vx_device_open("cuda:0", int_out) == 0 then default_device = int_out[0] end
end

--- Sets the device that new tensors live on ("cpu", "cuda:0"), or returns its name. The default is cuda:0 where one
-- works.
function core.device(name)
  choose_default()
  if name ~= nil then default_device = device_number(name) end
  return device_name(default_device)
end

--- List of {name, description, memory (bytes)}; where a kind of device is missing, entries `cuda = reason`.
function core.devices()
  local list, text = {}, ffi.new "char[256]"
  for _, backend in ipairs { "cpu", "cuda" } do
    local n, reason = device_count(backend)
    if reason then list[backend] = reason end
    for i = 0, n - 1 do
      local name = backend == "cpu" and "cpu" or backend .. ":" .. i
      local number = device_number(name)
      call(C.vx_device_describe, number, text, 256)
      call(C.vx_memory, number, memory_out)
      list[#list + 1] = { name = name, description = ffi.string(text), memory = tonumber(memory_out.limit) }
    end
  end
  return list
end

--- Whether a backend ("cpu", "cuda") has a kernel for an op of ops.def; nil and the reason where its library cannot be
-- opened.
function core.backend_has(backend, op)
  if C.vx_backend_has(backend, op, int_out) == 0 then return int_out[0] ~= 0 end
  return nil, ffi.string(C.vx_error())
end

--- CPU threads of the kernels: sets them where n is given; returns the number in force. Results do not depend on it.
function core.threads(n)
  if n ~= nil and (type(n) ~= "number" or n < 1 or n ~= math.floor(n)) then
    fail("threads: %s, expected an integer of 1 or more", tostring(n))
  end
  call(C.vx_threads, n or 0, int_out)
  return int_out[0]
end

--- Whether GPU products of float32 matrices may round their factors to TF32 (10 bits of fraction), which tensor cores
-- multiply several times as fast: sets it where `on` is given (the default is false); returns the setting. The
-- quantizers' logits are float32 always.
function core.allow_tf32(on)
  if on ~= nil and type(on) ~= "boolean" then fail("allow_tf32: %s, expected true or false", tostring(on)) end
  return C.vx_allow_tf32(on == nil and -1 or on and 1 or 0) ~= 0
end

--- autocast "bf16", on a GPU: convolutions (dense and depthwise-separable) give their images as bf16, and products
-- (matmul, linear, dense and pointwise convolutions, and their gradients) round their factors to bf16 and run on tensor
-- cores; sums are float32. Everything else is float32: parameters and their gradients, statistics, norms, losses, the
-- quantizers, the optimizer; an op that takes no bf16 gets it converted. {output = "f32"} keeps the result of a
-- convolution float32. An error where the default device is the CPU, which computes in float32 always. "f32": back to
-- the default. Returns the setting. A recorded graph keeps the setting it was recorded with.
function core.autocast(dtype)
  if dtype ~= nil and dtype ~= "bf16" and dtype ~= "f32" then
    fail("autocast: '%s', expected \"bf16\" or \"f32\"", tostring(dtype))
  end
  if dtype == "bf16" and core.device() == "cpu" then
    fail "autocast: the default device is cpu, and products in bf16 need a GPU"
  end
  return DTYPE_NAMES[C.vx_autocast(dtype and DTYPES[dtype] or -1)]
end

--- {live, peak, cached, limit (bytes), tensors} of a device.
function core.memory(device)
  choose_default()
  call(C.vx_memory, device and device_number(device) or default_device, memory_out)
  return { live = tonumber(memory_out.live), peak = tonumber(memory_out.peak), cached = tonumber(memory_out.cached),
    limit = tonumber(memory_out.limit), tensors = tonumber(memory_out.tensors) }
end

--- Caps live + cached bytes of a device; 0 goes back to its own size.
function core.memory_limit(bytes, device)
  call(C.vx_memory_limit, device and device_number(device) or default_device, bytes)
end
function core.memory_flush(device) call(C.vx_memory_flush, device and device_number(device) or default_device) end
--- Keep freed blocks for reuse (the default), or let every block have exactly its size and go back at once, for memory
-- checkers.
function core.memory_pool(on, device)
  call(C.vx_memory_pool, device and device_number(device) or default_device, on and 1 or 0)
end
function core.reset_peak(device) call(C.vx_memory_reset_peak, device and device_number(device) or default_device) end
function core.sync(device) call(C.vx_sync, device and device_number(device) or default_device) end

-- -- Creation ---------------------------------------------------------------------------------------------------------

--- An uninitialized tensor. options: {dtype = "f32", device = default, keep = outside of any step scope}.
local function new(shape, options)
  choose_default()
  local n = fill_shape(shape)
  local dtype = options and options.dtype
  local device = options and options.device
  device = device and device_number(device) or default_device
  call(C.vx_new, handle_out, device, dtype_number(dtype), n, shape_buffer)
  local t = wrap(handle_out[0], options and options.keep)
  account(device, tonumber(C.vx_numel(t._h)) * DTYPE_BYTES[dtype or "f32"])
  return t
end
core.new = new

--- An uninitialized tensor of x's shape, dtype and device.
function core.new_like(x, keep)
  local h = handle(x)
  local n, device = C.vx_ndim(h), C.vx_device(h)
  for i = 0, n - 1 do shape_buffer[i] = C.vx_size(h, i) end
  call(C.vx_new, handle_out, device, C.vx_dtype(h), n, shape_buffer)
  local t = wrap(handle_out[0], keep)
  account(device, tonumber(C.vx_numel(t._h)) * DTYPE_BYTES[DTYPE_NAMES[C.vx_dtype(h)]])
  return t
end

--- A view of x's storage; strides and offset in elements from x's first one (0-based). Not recorded for gradients:
-- ops.lua is.
function core.view(x, shape, stride, offset)
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

--- A tensor from nested tables (or a number: shape {}). options as in new(); requires_grad too.
function core.tensor(data, options)
  if core.is_tensor(data) then fail "tensor: given a tensor; use x:clone() or x:to(device)" end
  local shape, probe = {}, data
  while type(probe) == "table" do
    shape[#shape + 1] = #probe
    probe = probe[1]
  end
  local flat = {}
  flatten(data, 1, shape, flat)
  local t = new(shape, options)
  t:fromtable(flat)
  if options and options.requires_grad then t.requires_grad = true end
  return t
end

-- -- Questions --------------------------------------------------------------------------------------------------------

--- Number of dimensions, name of the dtype, name of the device, number of elements; do the elements lie in memory in
-- their order?
function Tensor:dim() return C.vx_ndim(handle(self)) end
function Tensor:dtype() return DTYPE_NAMES[C.vx_dtype(handle(self))] end
function Tensor:device() return device_name(C.vx_device(handle(self))) end
function Tensor:numel() return tonumber(C.vx_numel(handle(self))) end
function Tensor:is_contiguous() return C.vx_is_contiguous(handle(self)) ~= 0 end

--- Size of dimension d (1-based; -1 is the last).
function Tensor:size(d)
  local n = self:dim()
  if d == nil then return self:shape() end
  local i = d < 0 and n + d or d - 1
  if i < 0 or i >= n then fail("size(%d) of a tensor with %d dimensions", d, n) end
  return tonumber(C.vx_size(self._h, i))
end

--- Lua array of all sizes.
function Tensor:shape()
  local h, s = handle(self), {}
  for i = 1, C.vx_ndim(h) do s[i] = tonumber(C.vx_size(h, i - 1)) end
  return s
end

--- Lua array of the strides, in elements.
function Tensor:strides()
  local h, s = handle(self), {}
  for i = 1, C.vx_ndim(h) do s[i] = tonumber(C.vx_stride(h, i - 1)) end
  return s
end

--- "(2,3)".
function core.shape_text(x)
  return "(" .. table.concat(core.is_tensor(x) and x:shape() or x, ",") .. ")"
end

-- -- Reading and writing ----------------------------------------------------------------------------------------------

local function contiguous(x)
  if x:is_contiguous() then return x end
  local y = core.new_like(x)
  call(C.vx_copy, y._h, handle(x))
  return y
end
core.contiguous = contiguous

--- Frees the tensor's memory now instead of when Lua's collector finds it; using it afterwards is an error.
function Tensor:release()
  if self._h ~= nil then
    C.vx_free(ffi.gc(self._h, nil))
    self._h = nil
    self._node = nil
  end
end

--- Host copy of all elements as a C array and their number; bf16 comes as f32.
local function to_array(x)
  if x:dtype() == "bf16" then x = x:to "f32" end
  x = contiguous(x)
  local n = x:numel()
  local array = ffi.new(C_ARRAY[x:dtype()], math.max(n, 1))
  call(C.vx_read, x._h, 0, n, array)
  return array, n
end

--- Nested tables of Lua numbers (a plain number for shape {}).
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

--- The value of a tensor of one element.
function Tensor:item()
  if self:numel() ~= 1 then fail("item: of a tensor %s, expected one element", core.shape_text(self)) end
  return tonumber((to_array(self))[0])
end

--- Raw little-endian elements, row-major, as a Lua string.
function Tensor:bytes()
  local x = contiguous(self)
  local n, item = x:numel(), DTYPE_BYTES[x:dtype()]
  local buffer = ffi.new("uint8_t[?]", math.max(n * item, 1))
  call(C.vx_read, x._h, 0, n, buffer)
  return ffi.string(buffer, n * item)
end

--- Overwrites all elements from a flat Lua array of numbers.
function Tensor:fromtable(flat)
  local n = self:numel()
  if #flat ~= n then fail("fromtable: %d numbers for a tensor %s", #flat, core.shape_text(self)) end
  local dtype = self:dtype()
  local staged = dtype == "bf16" and "f32" or dtype
  local array = ffi.new(C_ARRAY[staged], math.max(n, 1))
  for i = 1, n do array[i - 1] = flat[i] end
  local target = self
  if staged ~= dtype or not self:is_contiguous() or self:device() ~= "cpu" then
    target = new(self:shape(), { dtype = staged, device = "cpu" })
  end
  call(C.vx_write, target._h, 0, n, array)
  if target ~= self then
    call(C.vx_copy, handle(self), target._h)
    target:release()
  end
  return self
end

--- Overwrites all elements from raw little-endian bytes.
function Tensor:frombytes(bytes)
  local item = DTYPE_BYTES[self:dtype()]
  if #bytes ~= self:numel() * item then
    fail("frombytes: %d bytes for a %s tensor %s", #bytes, self:dtype(), core.shape_text(self))
  end
  call(C.vx_write, handle(self), 0, self:numel(), ffi.cast("const void *", bytes))
  return self
end

--- self = source, elementwise, across dtypes, devices and strides; same shape.
function Tensor:copy(source)
  if not core.is_tensor(source) then fail("copy: a %s, expected a tensor", type(source)) end
  call(C.vx_copy, handle(self), handle(source))
  return self
end

--- All elements = value.
function Tensor:fill(value)
  call(C.vx_fill, handle(self), value)
  return self
end

--- All elements = 0.
function Tensor:zero() return self:fill(0) end

--- A copy outside the tape, of the same shape, on a device ("cpu") or in a dtype ("f32", "i32", ...); x itself where
-- nothing changes.
function Tensor:to(where)
  local dtype, device = self:dtype(), self:device()
  local new_dtype, new_device = dtype, device
  if DTYPES[where] then new_dtype = where else new_device = device_name(device_number(where)) end
  if new_dtype == dtype and new_device == device then return self end
  local y = new(self:shape(), { dtype = new_dtype, device = new_device })
  return y:copy(self)
end

--- The same values under a new handle that no gradient flows through.
function Tensor:detach()
  return core.view(self, self:shape(), self:strides(), 0)
end

-- -- Step scope -------------------------------------------------------------------------------------------------------

--- Keeps a tensor made inside vx.step alive beyond it.
function core.keep(x)
  if core.is_tensor(x) then
    x._scope = nil
    if core.is_tensor(x.grad) then x.grad._scope = nil end
  end
  return x
end

local function survivors(value, parent, seen)
  if type(value) ~= "table" or seen[value] then return end
  seen[value] = true
  if core.is_tensor(value) then
    if value._scope == scope then
      value._scope = parent
      if parent then parent[#parent + 1] = value end
    end
    value._node = nil -- what it was computed from is about to go
    return
  end
  for _, v in pairs(value) do survivors(v, parent, seen) end
end

local function leave(parent, ok, ...)
  if ok then
    local seen = {}
    for i = 1, select("#", ...) do survivors((select(i, ...)), parent, seen) end
  end
  local mine = scope
  scope = parent
  for i = 1, #mine do
    local t = mine[i]
    if t._scope == mine then
      t:release()
      t._scope = nil
    end
  end
  if not ok then error((...), 0) end
  return ...
end

--- Runs f(...) and then frees every tensor made during it, except those it returns (also inside tables) and those
-- passed to vx.keep. Also when f fails. Scopes nest.
function core.step(f, ...)
  local parent = scope
  scope = {}
  return leave(parent, pcall(f, ...))
end

-- -- Recorded graphs: the C side of graph.lua -------------------------------------------------------------------------

-- The counts of the recording under way: an array of {object, field, kind, value}.
local counts

--- Adds one to object[field], now and at every replay of a graph that is being recorded; returns the sum. kind:
-- "stream" where the sum is a random stream of object.seed, "step" where it is AdamW's step, nil for what Lua alone
-- counts.
function core.count(object, field, kind)
  local value = object[field] + 1
  object[field] = value
  if counts then counts[#counts + 1] = { object = object, field = field, kind = kind, value = value } end
  return value
end

--- Whether a graph is being recorded.
function core.is_recording() return counts ~= nil end

local Graph = {}
Graph.__index = Graph

--- Runs f(...) while `device` records what it queues. Returns a graph and f's results, or nil where the device has no
-- graphs (and f was not run). An error inside f drops the recording. rate: what the learning rates of AdamW inside are
-- relative to.
function core.record(device, rate, f, ...)
  local number, out = device_number(device), ffi.new "vx_graph *[1]"
  local status = C.vx_graph_begin(number, rate)
  if status == ENOSUP then return nil end
  check(status)
  local mine = {}
  counts = mine
  local function done(ok, ...)
    counts = nil
    if not ok then
      C.vx_graph_end(number, nil)
      error((...), 0)
    end
    check(C.vx_graph_end(number, out))
    return setmetatable({ g = ffi.gc(out[0], C.vx_graph_free), counts = mine }, Graph), ...
  end
  return done(pcall(f, ...))
end

--- Array of {seed, stream} of the pairs that recorded random ops draw from, in the order in which :launch takes them
-- anew.
function Graph:draws()
  local list, draw = {}, ffi.new "vx_draw"
  while true do
    local status = C.vx_graph_draw(self.g, #list, draw)
    if status == EEND then return list end
    check(status)
    list[#list + 1] = { seed = tonumber(draw.seed), stream = tonumber(draw.stream) }
  end
end

--- Runs the recorded ops; steps: those of AdamW since the recording; draws: as :draws() gave them, with the values of
-- now.
function Graph:launch(rate, steps, draws)
  self.buffer = self.buffer or ffi.new("vx_draw[?]", math.max(1, #draws))
  for i, d in ipairs(draws) do self.buffer[i - 1].seed, self.buffer[i - 1].stream = d.seed, d.stream end
  call(C.vx_graph_launch, self.g, rate, steps, self.buffer)
end

function Graph:release()
  C.vx_graph_free(ffi.gc(self.g, nil))
  self.g = nil
end

-- -- Random streams ---------------------------------------------------------------------------------------------------

local Generator = {}
Generator.__index = Generator

--- A source of random streams: every call of :stream() gives the next (seed, stream) pair, and a pair determines all
-- numbers drawn with it (Philox, see core/rng.h), on any device. State is {seed, streams drawn}.
function core.generator(seed)
  if type(seed) ~= "number" or seed ~= math.floor(seed) or seed < 0 or seed > 2 ^ 53 then
    fail("seed: %s, expected an integer from 0 to 2^53", tostring(seed))
  end
  return setmetatable({ seed = seed, drawn = 0 }, Generator)
end

function Generator:stream() return self.seed, core.count(self, "drawn", "stream") end

core.default_generator = core.generator(0)

--- Seeds the default generator, from which everything random draws unless given another.
function core.seed(seed)
  local g = core.generator(seed)
  core.default_generator.seed, core.default_generator.drawn = g.seed, 0
end

-- -- Files ------------------------------------------------------------------------------------------------------------

local Writer = {}
Writer.__index = Writer
local writer_out = ffi.new "vx_writer *[1]"

--- A file that appears under `path` whole, at :commit(), or not at all.
function core.writer(path)
  call(C.vx_writer_open, writer_out, path)
  return setmetatable({ w = ffi.gc(writer_out[0], C.vx_writer_abort) }, Writer)
end

function Writer:bytes(s) call(C.vx_writer_bytes, self.w, ffi.cast("const void *", s), #s) end
function Writer:tensor(x) call(C.vx_writer_tensor, self.w, handle(x)) end
function Writer:commit()
  local w = ffi.gc(self.w, nil)
  self.w = nil
  check(C.vx_writer_commit(w))
end
function Writer:abort()
  C.vx_writer_abort(ffi.gc(self.w, nil))
  self.w = nil
end

--- Writes a whole string atomically.
function core.write_file(path, text)
  local w = core.writer(path)
  w:bytes(text)
  w:commit()
end

--- Makes a folder and those above it that are missing. True; or nil and why not.
function core.make_folders(path)
  local lfs = require "lfs"
  local at = path:sub(1, 1) == "/" and "" or nil
  for part in path:gmatch "[^/]+" do
    at = at and at .. "/" .. part or part
    if lfs.attributes(at, "mode") ~= "directory" then
      local ok, reason = lfs.mkdir(at)
      -- another process may have made it in between
      if not ok and lfs.attributes(at, "mode") ~= "directory" then
        return nil, ("cannot make the folder '%s': %s"):format(at, reason)
      end
    end
  end
  return true
end

--- Fills tensor x from raw data at byte `offset` of a file; format is a safetensors dtype.
function core.read_tensor(x, path, offset, format) call(C.vx_file_read, handle(x), path, offset, format) end

--- Bytes of a regular file, or nil.
function core.file_size(path)
  local n = tonumber(C.vx_file_size(path))
  return n >= 0 and n or nil
end

-- -- Interrupts, clock, terminal --------------------------------------------------------------------------------------

local in_session = false

--- Runs f with Ctrl-C and SIGTERM turned into a flag that core.interrupted() reads. Within a session its Ctrl-C stays
-- in force, which raises the same flag.
function core.catching_interrupts(f, ...)
  if in_session then return f(...) end
  C.vx_interrupt_catch(1)
  local function done(ok, ...)
    C.vx_interrupt_catch(0)
    if not ok then error((...), 0) end
    return ...
  end
  return done(pcall(f, ...))
end

--- ln gamma(x), its first and its second derivative, in float64 for x > 0; NaN below 0.
function core.lgamma(x) return C.vx_lgamma(x) end
function core.digamma(x) return C.vx_digamma(x) end
function core.trigamma(x) return C.vx_trigamma(x) end

--- A session begins: from now on Ctrl-C only raises the flag, however often; calling it again lowers the flag.
function core.session_interrupts()
  in_session = true
  C.vx_interrupt_catch(2)
end

ffi.cdef "void *lua_gethook(void *L); int lua_sethook(void *L, void *hook, int mask, int count);"
local LUA_MASKCOUNT = 8
-- LuaJIT's hooks are those of all its threads, so that any thread names them
local anchor = coroutine.create(function() end)

--- Runs f(...) in a session, with hook() called every `every` instructions of interpreted Lua, and after Ctrl-C at each
-- instruction until f is over. hook may raise an error. Compiled traces call no hook: jit.off what has to be
-- interruptible.
function core.with_hook(hook, every, f, ...)
  local L = ffi.cast("void *", tonumber(tostring(anchor):match "0x(%x+)", 16))
  debug.sethook(hook, "", every)
  C.vx_interrupt_calls(ffi.cast("int (*)(void *, void *, int, int)", ffi.C.lua_sethook), L, ffi.C.lua_gethook(L),
    LUA_MASKCOUNT, 1)
  local function done(...)
    C.vx_interrupt_calls(nil, nil, nil, 0, 0)
    debug.sethook()
    return ...
  end
  return done(f(...))
end

--- Runs f(a, b, c), a C function of three pointers, in a thread of its own that receives no signals.
function core.thread(f, a, b, c) call(C.vx_thread, ffi.cast("int (*)(void *, void *, void *)", f), a, b, c) end

ffi.cdef "int getppid(void);"
--- Number of the process that started this one; it changes when that process ends.
function core.parent() return ffi.C.getppid() end

function core.interrupted() return C.vx_interrupted() ~= 0 end
function core.time() return C.vx_time() end
function core.is_tty(fd) return C.vx_is_tty(fd) ~= 0 end
function core.terminal_columns() return C.vx_terminal_columns() end

--- The ops of ops.def: array of {name, contract, text}.
function core.op_list()
  local list = {}
  for line in ffi.string(C.vx_ops()):gmatch "[^\n]+" do
    local name, contract, text = line:match "^(.-)\t(.-)\t(.*)$"
    list[#list + 1] = { name = name, contract = contract, text = text }
  end
  return list
end

-- -- Images and loaders -----------------------------------------------------------------------------------------------

local IMAGE_KINDS = { [0] = "none", "jpeg", "png", "other" }

--- A new tensor that a C function made and put in handle_out.
local function made()
  local t = wrap(handle_out[0])
  account(0, t:numel() * DTYPE_BYTES[t:dtype()])
  return t
end

--- What the file's first bytes say it is: "jpeg", "png", "other" (an image that is not read), "none"; nil and why where
-- unreadable.
function core.image_kind(path)
  if C.vx_image_kind(path, int_out) ~= 0 then return nil, ffi.string(C.vx_error()) end
  return IMAGE_KINDS[int_out[0]]
end

--- An image file, or its bytes, as u8 (H, W, 3).
function core.image_open(path)
  call(C.vx_image_open, handle_out, path)
  return made()
end
function core.image_decode(bytes)
  call(C.vx_image_decode, handle_out, bytes, #bytes)
  return made()
end

--- u8 (H, W, 3) → (height, width, 3); filter 0 bilinear, 1 bicubic.
function core.image_resize(x, height, width, filter)
  local y = new({ height, width, 3 }, { dtype = "u8", device = "cpu" })
  call(C.vx_image_resize, handle(y), handle(contiguous(x)), filter)
  return y
end

--- PNG of a u8 image: the file's bytes as a string, or a file.
function core.image_png(x)
  call(C.vx_image_png, handle_out, handle(contiguous(x)))
  local t = made()
  local bytes = t:bytes()
  t:release()
  return bytes
end
function core.image_save_png(path, x) call(C.vx_image_save_png, path, handle(contiguous(x))) end

function core.procedural_image(height, width, seed, index)
  local x = new({ height, width, 3 }, { dtype = "u8", device = "cpu" })
  call(C.vx_procedural_image, handle(x), seed, index)
  return x
end

local Loader = {}
Loader.__index = Loader

--- A prefetching loader over paths (nil: procedural). options: the fields of vx_loader_options, see core/data/image.h.
function core.loader(paths, options)
  local o, out = ffi.new "vx_loader_options", ffi.new "vx_loader *[1]"
  for name, value in pairs(options) do
    if type(value) == "table" then
      for i = 1, 3 do o[name][i - 1] = value[i] end
    else
      o[name] = value
    end
  end
  local text
  if paths then
    o.count = #paths
    text = table.concat(paths, "\0") .. "\0" -- named: it must outlive the call
  end
  call(C.vx_loader_new, out, text, text and #text or 0, o)
  return setmetatable({ l = ffi.gc(out[0], C.vx_loader_free) }, Loader)
end

--- Fills images f32 (B, S, S, 3) and index i32 (B), both on the CPU: how many, or nil at the end and when Ctrl-C ended
-- the wait.
function Loader:next(images, index)
  local status = C.vx_loader_next(self.l, handle(images), handle(index), int_out)
  if status == EEND or status == EINTR then return nil end
  check(status)
  return int_out[0]
end

function Loader:position() return tonumber(C.vx_loader_position(self.l)) end

--- Array of {path, reason}, by name too, of the broken files met so far.
function Loader:broken()
  local list, path, reason = {}, ffi.new "char[4096]", ffi.new "char[512]"
  for i = 0, tonumber(C.vx_loader_broken_count(self.l)) - 1 do
    check(C.vx_loader_broken(self.l, i, path, 4096, reason, 512))
    local p, r = ffi.string(path), ffi.string(reason)
    list[i + 1] = { p, r, path = p, reason = r }
  end
  return list
end

function Loader:close()
  if self.l ~= nil then
    C.vx_loader_free(ffi.gc(self.l, nil))
    self.l = nil
  end
end

return core
