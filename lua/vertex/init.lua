--- vertex: a workbench for vector quantization in neural networks. local vx = require "vertex"
--
--   vx.tensor vx.zeros vx.randn ...        tensors; their methods are x:sum() and so on: ?vx.Tensor
--   vx.matmul vx.softmax vx.conv2d ...     ops, each with its gradient: ?vx.ops
--   x.requires_grad, loss:backward(), x.grad, vx.no_grad, vx.gradcheck     gradients
--   vx.nn vx.optim                         layers, AdamW and learning-rate schedules
--   vx.step vx.graph                       a training step that frees what it made; one that is recorded and replayed
--   vx.quantizer vx.quantizers vx.kmeans   quantizers by name: ?softmax-knn-ce; a codebook of one's own vectors
--   vx.data vx.metrics vx.runs             batches, figures of merit, what stands around a training loop
--   vx.models                              whole networks under the names of the libraries they come from
--   vx.simplex vx.plot vx.display          distributions on the simplex, figures, how an object shows itself
--   vx.device vx.threads vx.memory vx.seed where things are computed, from which random numbers
--   vx.load vx.save                        .safetensors and .npy files
--
-- Tensors live in C; Lua holds handles, records ops on a tape, and says what to compute. Dimensions are 1-based in
-- arguments, as in Torch7; indices stored in tensors (codes, neighbours) are 0-based, as in file formats and peers.
-- Tensors are row-major; images (B,H,W,C) and sequences (B,T,C) have their channels last.

local arguments = require "vertex.arguments"
local check = require "vertex.check"
local core = require "vertex.core"
local tape = require "vertex.tape"
local ops = require "vertex.ops"
local registry = require "vertex.quantizers"
local npy = require "vertex.npy"
local safetensors = require "vertex.safetensors"
local torch_names = require "vertex.torch_names"
require "vertex.interactive.show" -- print(x)

local vx = {
  version = core.version,
  -- devices, threads, memory: core/device.lua
  device = core.device, devices = core.devices, threads = core.threads, sync = core.sync,
  allow_tf32 = core.allow_tf32, autocast = core.autocast,
  memory = core.memory, memory_limit = core.memory_limit, memory_flush = core.memory_flush,
  reset_peak = core.reset_peak, debug = core.debug,
  -- tensors: core/tensor.lua, and below
  Tensor = core.Tensor, is_tensor = core.is_tensor, tensor = core.tensor,
  -- a step's memory, gradients, recorded steps: core/scope.lua, tape.lua, step_graph.lua
  step = core.step, keep = core.keep, no_grad = tape.no_grad, graph = require "vertex.step_graph",
  debug_nonfinite = require("vertex.nonfinite").debug_nonfinite,
  -- random numbers: core/random.lua, and below
  seed = core.seed, generator = core.generator,
  -- ops, layers, optimizers
  ops = ops, nn = require "vertex.nn", optim = require "vertex.optim",
  -- quantizers
  quantizer = registry.quantizer, quantizers = registry.quantizers, Quantizer = registry.Quantizer,
}

-- What is loaded when it is first asked for: an experiment with a quantizer needs neither cairo nor an image library.
local LATER = { data = "vertex.data", plot = "vertex.plot", runs = "vertex.runs", simplex = "vertex.simplex",
  metrics = "vertex.metrics", models = "vertex.models", dist = "vertex.dist", display = "vertex.interactive.display",
  gradcheck = "vertex.gradcheck", kmeans = "vertex.kmeans", restore = "vertex.runs.restore" }

-- -- Making tensors ---------------------------------------------------------------------------------------------------

-- Options of what draws numbers, beside those of every tensor.
local DRAWN = { generator = "table" }
for name, kind in pairs(core.CREATION) do DRAWN[name] = kind end

--- Makes a tensor as the options of the function `what` ask; fill(x, o) gives it its elements.
local function made(what, shape, options, fill, known)
  local o = check.options(what, options, known or core.CREATION)
  local x = core.new(shape, o)
  fill(x, o)
  if o.requires_grad then x.requires_grad = true end
  return x
end

--- Makes a tensor whose elements are not set.
-- @param shape array of sizes, as in { 3, 4 }; at most 8, and {} is a scalar
-- @param[opt] options { dtype = "f32" | "bf16" | "i32" | "u8", device = the default one, requires_grad = false }
-- @return tensor of that shape
-- @raise where a size is no integer of 0 or more, or the dtype or the device is unknown
function vx.empty(shape, options) return made("empty", shape, options, function() end) end

--- Makes a tensor of zeros.
-- @param shape array of sizes, as in { 3, 4 }; at most 8, and {} is a scalar
-- @param[opt] options { dtype = "f32", device = the default one, requires_grad = false }
-- @return tensor of that shape
-- @raise where a size is no integer of 0 or more, or the dtype or the device is unknown
function vx.zeros(shape, options) return made("zeros", shape, options, function(x) x:fill(0) end) end

--- Makes a tensor of ones.
-- @param shape array of sizes, as in { 3, 4 }; at most 8, and {} is a scalar
-- @param[opt] options { dtype = "f32", device = the default one, requires_grad = false }
-- @return tensor of that shape
-- @raise where a size is no integer of 0 or more, or the dtype or the device is unknown
function vx.ones(shape, options) return made("ones", shape, options, function(x) x:fill(1) end) end

--- Makes a tensor with one value everywhere.
-- @param shape array of sizes, as in { 3, 4 }; at most 8, and {} is a scalar
-- @param value number
-- @param[opt] options { dtype = "f32", device = the default one, requires_grad = false }
-- @return tensor of that shape
-- @raise where a size is no integer of 0 or more, or the dtype or the device is unknown
function vx.full(shape, value, options)
  return made("full", shape, options, function(x) x:fill(value) end)
end

--- Draws numbers from the standard normal distribution.
-- @param shape array of sizes, as in { 3, 4 }; at most 8, and {} is a scalar
-- @param[opt] options { generator = the one that vx.seed seeds, device = the default one, requires_grad = false }
-- @return tensor f32 of that shape
-- @raise where a size is no integer of 0 or more, or the device is unknown
function vx.randn(shape, options)
  return made("randn", shape, options, function(x, o) ops.normal(x, 0, 1, o.generator) end, DRAWN)
end

--- Draws numbers that are uniform in the open interval (0, 1).
-- @param shape array of sizes, as in { 3, 4 }; at most 8, and {} is a scalar
-- @param[opt] options { generator = the one that vx.seed seeds, device = the default one, requires_grad = false }
-- @return tensor f32 of that shape
-- @raise where a size is no integer of 0 or more, or the device is unknown
function vx.rand(shape, options)
  return made("rand", shape, options, function(x, o) ops.uniform(x, 0, 1, o.generator) end, DRAWN)
end

--- Counts: vx.arange(n) is 0, 1, ..., n - 1; vx.arange(first, stop, step) is first, first + step, ... up to but without
-- stop.
-- @param[opt=0] first number; left out together with step
-- @param stop number, which does not belong to them
-- @param[opt=1] step number, of either sign
-- @param[opt] options { dtype = "f32", device = the default one, requires_grad = false }, the last argument
-- @return tensor (n)
-- @raise where one of the three is no number, or step is 0
function vx.arange(...)
  local a = { ... }
  local n = select("#", ...)
  local options = type(a[n]) == "table" and a[n] or nil
  if options then n = n - 1 end
  if n < 1 or n > 3 then core.fail("arange: %d numbers, expected (stop), (first, stop) or (first, stop, step)", n) end
  local first, stop, step = a[1], a[2], a[3] or 1
  if n == 1 then first, stop = 0, first end
  check.number("arange", "first", first, -math.huge, math.huge)
  check.number("arange", "stop", stop, -math.huge, math.huge)
  check.number("arange", "step", step, -math.huge, math.huge)
  if step == 0 then core.fail "arange: step is 0, expected a number of either sign" end
  local count = math.max(0, math.ceil((stop - first) / step))
  -- the quotient is rounded: what counts is whether the last element lies before stop, and the next one does not
  local function before_stop(i) return (first + i * step - stop) * step < 0 end
  if count > 0 and not before_stop(count - 1) then
    count = count - 1
  elseif before_stop(count) then
    count = count + 1
  end
  return made("arange", { count }, options, function(x)
    for at = 0, count - 1, 2 ^ 20 do -- a table of Lua holds so many numbers well
      local values = {}
      for i = at, math.min(at + 2 ^ 20, count) - 1 do values[i - at + 1] = first + i * step end
      ops.narrow(x, 1, at + 1, #values):fromtable(values)
    end
  end)
end

--- Draws a random order of the numbers 0, 1, ..., n - 1.
-- @param n number of them
-- @param[opt] options { generator = the one that vx.seed seeds, device = the default one }
-- @return tensor i32 (n)
-- @raise where n is no integer of 0 or more, or the device is unknown
function vx.randperm(n, options)
  local o = check.options("randperm", options, { generator = "table", device = "string" })
  return ops.permutation(n, o.generator, { device = o.device })
end

-- -- Ops of one's own -------------------------------------------------------------------------------------------------

--- Makes an op of a function that brings its own gradient.
--
--     local clipped = vx.custom { name = "clipped",
--       forward = function(ctx, x) ctx.inside = vx.lt(x:abs(), 1); return x:clamp(-1, 1) end,
--       backward = function(ctx, dy) return dy * ctx.inside + 0.01 * dy end }
--
-- Inside forward and backward nothing is recorded. ctx goes from one to the other; ctx.needs[i] says whether input i
-- wants a gradient, and is nil where none does.
-- @param op table { name = text, forward = function(ctx, ...) that returns one tensor, or as many as outputs says;
-- backward = function(ctx, dy, ...) that returns a gradient, or nil, for each argument of forward; outputs = 1 }
-- @return function(...) that computes forward, with that gradient
-- @raise where forward or backward is missing, a result is no tensor, or a gradient is not of its input's shape
function vx.custom(op)
  local o = check.options("custom", op, { name = "string", forward = "function", backward = "function",
    outputs = { "count", 1 } })
  local who = o.name or "custom"
  if not (o.forward and o.backward) then core.fail("%s: needs forward and backward", who) end
  local function gradients(shapes, ...)
    local n, copies = select("#", ...), {}
    for i = 1, n do
      local g, shape = (select(i, ...)), shapes[i]
      if g and not (core.is_tensor(g) and core.shape_text(g) == (shape or core.shape_text(g))) then
        core.fail("%s: backward gives for argument %d %s, expected a tensor %s or nil", who, i, core.is_tensor(g)
          and core.shape_text(g) or check.show(g), shape or "")
      end
      -- the tape frees what it is given, and this may be an input, or a tensor that somebody has
      copies[i] = g and core.overwrite(core.new_like(g), g)
    end
    return unpack(copies, 1, n)
  end
  return tape.recorded { name = who, outputs = o.outputs,
    forward = function(ctx, ...)
      -- own: what is given; a result that is one of them needs a handle of its own. It may be used by way of an upvalue
      local shapes, own, watched = {}, {}, {}
      for i = 1, select("#", ...) do
        local x = (select(i, ...))
        if core.is_tensor(x) then
          shapes[i], own[x], watched["argument " .. i] = core.shape_text(x), true, x
        end
      end
      ctx.input_shapes = shapes
      if ctx.needs then ctx.watched = watched end
      local results = { tape.no_grad(o.forward, ctx, ...) }
      for i = 1, o.outputs do
        local y = results[i]
        if not core.is_tensor(y) then
          core.fail("%s: forward gives %s as result %d, expected a tensor", who, check.show(y), i)
        end
        if own[y] or y._node then results[i] = y:detach() end
      end
      return unpack(results)
    end,
    backward = function(ctx, ...) return gradients(ctx.input_shapes, tape.no_grad(o.backward, ctx, ...)) end }
end

-- -- The default generator --------------------------------------------------------------------------------------------

--- Tells the state of the default generator, the one that vx.seed seeds.
-- @return table { seed = integer, drawn = number of streams drawn from it }, for vx.set_random_state
function vx.random_state() return { seed = core.default_generator.seed, drawn = core.default_generator.drawn } end

--- Puts the default generator into an earlier state: it draws the same numbers from then on.
-- @param state table, of vx.random_state
-- @raise where the state is none
function vx.set_random_state(state)
  local o = check.options("set_random_state", state, { seed = "whole", drawn = "whole" })
  if not (o.seed and o.drawn) then
    core.fail "set_random_state: expected what vx.random_state() gave, { seed = ..., drawn = ... }"
  end
  core.default_generator.seed, core.default_generator.drawn = o.seed, o.drawn
end

-- -- Files ------------------------------------------------------------------------------------------------------------

-- First bytes of files that others write → what they are, and the line of Python that converts them.
local FOREIGN = {
  { "PK\3\4", "a zip file, as torch.save and numpy.savez write them", "torch.load(%q) or numpy.load(%q)" },
  { "\128[\2-\5]", "a pickle, as torch.save wrote them before 1.6", "torch.load(%q)" },
  { "\137HDF", "an HDF5 file", "h5py.File(%q)" },
}

--- Raises how to convert a file that another library wrote, where it is one.
local function refuse_foreign(file)
  local head = file:bytes(0, 8) -- of a safetensors file a length, below 2^32
  for _, kind in ipairs(FOREIGN) do
    if head:find("^" .. kind[1]) and head:sub(5) ~= "\0\0\0\0" then
      core.fail("load %s: this is %s. Convert it in Python: tensors = %s; safetensors.torch.save_file(tensors, "
        .. "'x.safetensors') for a dict of tensors, numpy.save('x.npy', array) for one array", file.path, kind[2],
        (kind[3]:gsub("%%q", function() return ("'%s'"):format(file.path) end)))
    end
  end
end

--- Loads tensors: all of a .safetensors file, or the array of a .npy file. Floats become f32 and integers i32 where the
-- file has others than the dtypes of tensors.
-- @param path path of the file
-- @param[opt] options { device = the default one, names = array of names: those tensors of a .safetensors file alone }
-- @return table { name = tensor }; of a .npy file the tensor. A tensor of a dtype that is not read, or of more than
-- 8 dimensions, is left out, and raises what it is where it is asked for
-- @return table { key = text } of a .safetensors file's metadata
-- @raise where the file is not there, is damaged or is of neither kind: a .pt file says how to convert it; where a
-- number does not fit into f32 or i32, or there is no tensor of a name
function vx.load(path, options)
  local o = check.options("load", options, { device = "string", names = "table" })
  return core.reading(path, function(file)
    if npy.is(file) then
      if o.names then core.fail("load %s: names are of a .safetensors file, and this is a .npy file", path) end
      return npy.read(file, o)
    end
    refuse_foreign(file)
    return safetensors.read(file, o)
  end)
end

--- Saves tensors: several under their names as a .safetensors file, or one as a .npy file where the path ends so. The
-- file appears whole or not at all.
-- @param path path of the file
-- @param tensors table { name = tensor } or, for .npy, tensor of any shape
-- @param[opt] metadata table { key = text }; for .npy { dtype = "u16" }, which halves a file of codes
-- @param[opt] options { u16 = { name = true } }: the i32 tensors of these names as uint16
-- @raise where a name, a tensor or a text is none, a number does not fit into uint16, or the file cannot be written
function vx.save(path, tensors, metadata, options)
  if type(path) == "string" and path:find "%.npy$" then
    if not core.is_tensor(tensors) then core.fail("save: %s takes one tensor, not a table of them", path) end
    npy.save(path, tensors, check.options("save", metadata, { dtype = { { "u16" } } }))
  else
    if core.is_tensor(tensors) then
      core.fail("save: %s takes a table { name = tensor }; a tensor alone goes into a .npy file", path)
    end
    safetensors.save(path, tensors, metadata, check.options("save", options, { u16 = "table" }))
  end
end

-- -- Ops, and what is loaded later ------------------------------------------------------------------------------------

for name, f in pairs(ops) do
  if type(f) == "function" and vx[name] == nil then vx[name] = f end
end

-- what is called with other arguments than its comment declares is refused
for name, f in pairs(vx) do
  if type(f) == "function" then vx[name] = arguments.checked(name, f) end
end
arguments.guard(vx.nn)
arguments.guard(vx.optim)
arguments.guard_tensor(core.Tensor)

local names = {} -- of what is there to be loaded, for completion
for name, module in pairs(LATER) do names[name] = package.searchpath(module, package.path) and true end

--- Loads what is asked for, raises what a name of PyTorch's is here, or gives nil for any other name.
local function missing(t, name)
  if not LATER[name] then return torch_names.refuse("vx.", name, check.names(t)) end
  local module = require(LATER[name])
  module = type(module) == "function" and arguments.checked(name, module) or arguments.guard(module)
  rawset(t, name, module)
  return module
end

for name, t in pairs { nn = vx.nn, optim = vx.optim } do
  setmetatable(t, { __index = function(_, key)
    return torch_names.refuse("vx." .. name .. ".", key, check.names(t))
  end })
end

-- x:view{} and its like say what to write instead; __hidden: they are not offered as completions
setmetatable(core.Tensor, { __index = torch_names.methods(), __hidden = true })

return setmetatable(vx, { __names = names, __index = missing })
