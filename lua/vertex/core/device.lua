--- core/device.lua: the devices by name and number, the settings of their kernels, and their memory, of which Lua's
-- collector takes its share here: it does not see what tensors hold.

local ffi = require "ffi"
local check = require "vertex.check"
local dtype = require "vertex.core.dtype"
local library = require "vertex.core.library"

local dtypes, dtype_names = dtype.dtypes, dtype.dtype_names
local C, call, fail = library.C, library.call, library.fail

local devices = {}

local int_out = ffi.new "int[1]"
local memory_out = ffi.new "vx_memory_info"

-- -- Names and numbers ------------------------------------------------------------------------------------------------

local names = {} -- by number
local default, default_chosen = 0, false

--- Gives the number of a device name, opening its backend; raises where it is not there.
local function device_number(name)
  if type(name) == "number" then return name end
  call(C.vx_device_open, tostring(name), int_out)
  return int_out[0]
end

--- Gives the name of a device by its number.
local function device_name(number)
  if not names[number] then
    local text = ffi.new "char[64]"
    call(C.vx_device_name, number, text, 64)
    names[number] = ffi.string(text)
  end
  return names[number]
end

devices.device_number, devices.device_name = device_number, device_name

-- Names of the backends, the preferred one last.
local backends = {}
for name in ffi.string(C.vx_backends()):gmatch "[^\n]+" do backends[#backends + 1] = name end

--- Gives the number of devices of a backend; 0 and the reason where there are none.
local function device_count(backend)
  if C.vx_device_count(backend, int_out) == 0 then return int_out[0] end
  return 0, ffi.string(C.vx_error())
end

--- Gives the number of the device that new tensors live on; chooses it where nobody has yet.
local function default_number()
  if not default_chosen then
    default_chosen = true
    for i = #backends, 1, -1 do
      if device_count(backends[i]) > 0 and C.vx_device_open(backends[i] .. ":0", int_out) == 0 then
        default = int_out[0]
        break
      end
    end
  end
  return default
end

--- Gives the number of the device of this name, of the default one where it is nil.
local function number_of(name) return name and device_number(name) or default_number() end
devices.number_of = number_of

--- Sets the device that new tensors live on, or only says its name. The default is cuda:0 where one works, else cpu.
-- @param[opt] name "cpu", "cuda:0", ...
-- @return the name of the device in force
-- @raise where there is no such device, with the reason
function devices.device(name)
  if name ~= nil then default, default_chosen = device_number(name), true end
  return device_name(default_number())
end

--- Says whether somebody has chosen the default device.
function devices.device_is_chosen() return default_chosen end

--- Counts the devices of a backend, "cuda"; 0, and the reason, where there are none.
devices.device_count = device_count

--- Lists the devices of this machine.
-- @return array of { name, description, memory in bytes }; where a kind of device is missing, the field `cuda` says why
function devices.devices()
  local list, text = {}, ffi.new "char[256]"
  for _, backend in ipairs(backends) do
    local n, reason = device_count(backend)
    if reason then list[backend] = reason end
    for i = 0, n - 1 do
      local number = device_number(backend .. ":" .. i)
      call(C.vx_device_describe, number, text, 256)
      call(C.vx_memory, number, memory_out)
      list[#list + 1] = { name = device_name(number), description = ffi.string(text),
        memory = tonumber(memory_out.limit) }
    end
  end
  return list
end

--- Lists the SIMD variants of the CPU kernels, the poorest first. The last that runs and may be chosen is used, unless
-- the environment's VERTEX_SIMD names another.
-- @return array of { name, flags, runs, chosen }: the compiler's flags, whether this processor can run it, and whether
-- it may be chosen by itself
function devices.cpu_variants()
  local list = {}
  for name, flags, runs, chosen in ffi.string(C.vx_cpu_variants()):gmatch "([^\t]*)\t([^\t]*)\t(%d)\t(%d)\n" do
    list[#list + 1] = { name = name, flags = flags, runs = runs == "1", chosen = chosen == "1" }
  end
  return list
end

local capabilities = {} -- by number, then by capability

--- Says whether a device has a capability, which nobody should guess from its name.
-- @param device "cpu", "cuda:0", ...; nil is the default device
-- @param capability "host" (its memory is the CPU's), "bf16" (network bodies may be bf16), "graphs" (steps can be
-- recorded), "peers" (copies to another device of its kind take the short way)
-- @return true or false
-- @raise where there is no such device or capability
function devices.can(device, capability)
  local number = number_of(device)
  local known = capabilities[number]
  if not known then
    known = {}
    capabilities[number] = known
  end
  if known[capability] == nil then
    call(C.vx_device_can, number, tostring(capability), int_out)
    known[capability] = int_out[0] ~= 0
  end
  return known[capability]
end

--- Waits until a device has done all it was given, and raises what went wrong there meanwhile.
-- @param[opt] device "cpu", "cuda:0", ...; nil is the default device
-- @raise where an op failed on the device since the last wait
function devices.sync(device) call(C.vx_sync, number_of(device)) end

-- -- Settings of the kernels ------------------------------------------------------------------------------------------

--- Sets the number of CPU threads that the kernels use, or only says it. Results do not depend on it.
-- @param[opt] n integer of 1 or more
-- @return the number in force
-- @raise where n is no such integer
function devices.threads(n)
  call(C.vx_threads, n and check.integer("threads", "n", n, 1, 2 ^ 31 - 1) or 0, int_out)
  return int_out[0]
end

--- Says whether GPU products of float32 matrices may round their factors to TF32 (10 bits of fraction), which tensor
-- cores multiply several times as fast; sets it where `on` is given. The quantizers' logits are float32 always.
-- @param[opt] on true or false; at the start it is false
-- @return the setting in force, true or false
-- @raise where `on` is neither true nor false
function devices.allow_tf32(on)
  if on ~= nil and type(on) ~= "boolean" then fail("allow_tf32: %s, expected true or false", tostring(on)) end
  return C.vx_allow_tf32(on == nil and -1 or on and 1 or 0) ~= 0
end

--- Sets the precision of network bodies, or only says it. With "bf16", convolutions (dense and depthwise-separable)
-- give their images as bf16, half the memory, and products (matmul, linear, dense and pointwise convolutions, and
-- their gradients) round their factors to bf16: a GPU multiplies them on tensor cores, a CPU by AVX512_BF16 or in AMX
-- tiles where its kernels do (VERTEX_SIMD), else in no less time than float32's. Sums are float32. Everything else is
-- float32: parameters and their gradients, statistics, norms, losses, the quantizers, the optimizer; an op that takes
-- no bf16 gets it converted. A convolution's option output = "f32" keeps its result float32. A gradient is computed
-- under the setting that its op ran under, a recorded graph under that of its recording.
-- @param[opt] precision "bf16" or "f32"; at the start it is "f32"
-- @param[opt] f function: runs it with that setting, which afterwards is as it was before
-- @param ... its arguments
-- @return the setting in force, "bf16" or "f32"; with f what f returns
-- @raise where precision is something else; what f raises, and where a coroutine yields inside of it
function devices.autocast(precision, f, ...)
  if precision ~= nil and precision ~= "bf16" and precision ~= "f32" then
    fail("autocast: '%s', expected \"bf16\" or \"f32\"", tostring(precision))
  end
  local before = C.vx_autocast(-1)
  local now = dtype_names[C.vx_autocast(precision and dtypes[precision].number or -1)]
  if f == nil then return now end
  local function done(ok, ...)
    C.vx_autocast(before)
    if not ok then error((...), 0) end
    return ...
  end
  return done(library.sealed("autocast", f, ...))
end

--- Says whether bf16 is what ops that take it should make now (vx.autocast).
function devices.is_autocast() return C.vx_autocast(-1) == C.VX_BF16 end

-- -- Memory -----------------------------------------------------------------------------------------------------------

--- Says what memory a device's tensors use.
-- @param[opt] device "cpu", "cuda:0", ...; nil is the default device
-- @return { live, peak, cached, limit, tensors }: bytes that tensors hold, their largest sum since reset_peak, bytes
-- kept for reuse, what live + cached may reach, and the number of tensors with memory of their own
function devices.memory(device)
  call(C.vx_memory, number_of(device), memory_out)
  return { live = tonumber(memory_out.live), peak = tonumber(memory_out.peak), cached = tonumber(memory_out.cached),
    limit = tonumber(memory_out.limit), tensors = tonumber(memory_out.tensors) }
end

--- Caps the bytes that live and cached tensors of a device may reach together.
-- @param bytes number of bytes; 0 goes back to the device's own size
-- @param[opt] device "cpu", "cuda:0", ...; nil is the default device
-- @raise where bytes is no integer from 0 to 2^53
function devices.memory_limit(bytes, device)
  call(C.vx_memory_limit, number_of(device), check.integer("memory_limit", "bytes", bytes, 0, 2 ^ 53))
end

--- Gives the blocks that a device keeps for reuse back to the system.
-- @param[opt] device "cpu", "cuda:0", ...; nil is the default device
function devices.memory_flush(device) call(C.vx_memory_flush, number_of(device)) end

--- Says whether freed blocks are kept for reuse. Without, every block has exactly its size and goes back at once, which
-- memory checkers want.
-- @param on true (as at the start) or false
-- @param[opt] device "cpu", "cuda:0", ...; nil is the default device
function devices.memory_pool(on, device) call(C.vx_memory_pool, number_of(device), on and 1 or 0) end

--- Sets the peak that vx.memory() tells back to the bytes live now.
-- @param[opt] device "cpu", "cuda:0", ...; nil is the default device
function devices.reset_peak(device) call(C.vx_memory_reset_peak, number_of(device)) end

local LOOK_AT, LEAST_MARK = 64e6, 512e6
local made_bytes, soft_marks = {}, {} -- by device number
for number = 0, 63 do made_bytes[number], soft_marks[number] = 0, LEAST_MARK end

--- Counts bytes made on a device, by its number, and collects garbage where more than a mark is live. Bytes made since
-- the last look are cheap to count; the true figure is asked for only every 64 MB.
function devices.account(number, bytes)
  local made = made_bytes[number] + bytes
  made_bytes[number] = made
  if made < LOOK_AT then return end
  made_bytes[number] = 0
  C.vx_memory(number, memory_out)
  if tonumber(memory_out.live) > soft_marks[number] then
    collectgarbage()
    collectgarbage()
    C.vx_memory(number, memory_out)
    soft_marks[number] = math.max(LEAST_MARK, 1.4 * tonumber(memory_out.live))
  end
end

return devices
