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
  gradcheck = "vertex.gradcheck", kmeans = "vertex.kmeans" }

-- -- Making tensors ---------------------------------------------------------------------------------------------------

--- Does what the options ask for beyond core.new.
local function finish(x, options)
  if options and options.requires_grad then x.requires_grad = true end
  return x
end

--- Makes a tensor whose elements are not set.
-- @param shape array of sizes, at most 8; {} is a scalar
-- @param[opt] options { dtype = "f32" | "bf16" | "i32" | "u8", device = the default one, requires_grad = false }
-- @return tensor of that shape
-- @raise where a size is no integer of 0 or more, or the dtype or the device is unknown
function vx.empty(shape, options) return finish(core.new(shape, options), options) end

--- Makes a tensor of zeros.
-- @param shape array of sizes, at most 8; {} is a scalar
-- @param[opt] options { dtype = "f32", device = the default one, requires_grad = false }
-- @return tensor of that shape
-- @raise where a size is no integer of 0 or more, or the dtype or the device is unknown
function vx.zeros(shape, options) return finish(core.new(shape, options):fill(0), options) end

--- Makes a tensor of ones.
-- @param shape array of sizes, at most 8; {} is a scalar
-- @param[opt] options { dtype = "f32", device = the default one, requires_grad = false }
-- @return tensor of that shape
-- @raise where a size is no integer of 0 or more, or the dtype or the device is unknown
function vx.ones(shape, options) return finish(core.new(shape, options):fill(1), options) end

--- Makes a tensor with one value everywhere.
-- @param shape array of sizes, at most 8; {} is a scalar
-- @param value number
-- @param[opt] options { dtype = "f32", device = the default one, requires_grad = false }
-- @return tensor of that shape
-- @raise where a size is no integer of 0 or more, or the dtype or the device is unknown
function vx.full(shape, value, options) return finish(core.new(shape, options):fill(value), options) end

--- Draws numbers from the standard normal distribution.
-- @param shape array of sizes, at most 8; {} is a scalar
-- @param[opt] options { generator = the one that vx.seed seeds, device = the default one, requires_grad = false }
-- @return tensor f32 of that shape
-- @raise where a size is no integer of 0 or more, or the device is unknown
function vx.randn(shape, options)
  return finish(ops.normal(core.new(shape, options), 0, 1, options and options.generator), options)
end

--- Draws numbers that are uniform in the open interval (0, 1).
-- @param shape array of sizes, at most 8; {} is a scalar
-- @param[opt] options { generator = the one that vx.seed seeds, device = the default one, requires_grad = false }
-- @return tensor f32 of that shape
-- @raise where a size is no integer of 0 or more, or the device is unknown
function vx.rand(shape, options)
  return finish(ops.uniform(core.new(shape, options), 0, 1, options and options.generator), options)
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
  local options = type(a[#a]) == "table" and table.remove(a) or nil
  local first, stop, step = a[1], a[2], a[3] or 1
  if stop == nil then first, stop = 0, first end
  if type(first) ~= "number" or type(stop) ~= "number" or type(step) ~= "number" or step == 0 then
    core.fail "arange: expected numbers and a step other than 0"
  end
  local values = {}
  for v = first, stop - step * 1e-9, step do values[#values + 1] = v end
  return finish(core.new({ #values }, options):fromtable(values), options)
end

--- Draws a random order of the numbers 0, 1, ..., n - 1.
-- @param n number of them
-- @param[opt] options { generator = the one that vx.seed seeds, device = the default one }
-- @return tensor i32 (n)
-- @raise where n is no integer of 0 or more, or the device is unknown
function vx.randperm(n, options) return ops.permutation(n, options and options.generator, options) end

-- -- The default generator --------------------------------------------------------------------------------------------

--- Tells the state of the default generator, the one that vx.seed seeds.
-- @return table { seed = integer, drawn = number of streams drawn from it }, for vx.set_random_state
function vx.random_state() return { seed = core.default_generator.seed, drawn = core.default_generator.drawn } end

--- Puts the default generator into an earlier state: it draws the same numbers from then on.
-- @param state table, of vx.random_state
function vx.set_random_state(state)
  core.default_generator.seed, core.default_generator.drawn = state.seed, state.drawn
end

-- -- Files ------------------------------------------------------------------------------------------------------------

--- Loads tensors: all of a .safetensors file, or the array of a .npy file. Floats become f32 and integers i32 where the
-- file has others than the dtypes of tensors.
-- @param path of the file
-- @param[opt] options { device = the default one }
-- @return table { name = tensor }; of a .npy file the tensor
-- @return table { key = text } of a .safetensors file's metadata
-- @raise where the file is not there, is damaged or is of neither kind
function vx.load(path, options)
  return core.reading(path, function(file) return (npy.is(file) and npy or safetensors).read(file, options) end)
end

--- Saves tensors: several under their names as a .safetensors file, or one as a .npy file where the path ends so. The
-- file appears whole or not at all.
-- @param path of the file
-- @param tensors table { name = tensor }; for .npy a tensor, of any shape
-- @param[opt] metadata table { key = text }; for .npy { dtype = "u16" }, which halves a file of codes
-- @param[opt] options { u16 = { name = true } }: the i32 tensors of these names as uint16
-- @raise where a name, a tensor or a text is none, a number does not fit into uint16, or the file cannot be written
function vx.save(path, tensors, metadata, options)
  if type(path) == "string" and path:find "%.npy$" then
    npy.save(path, tensors, metadata)
  else
    safetensors.save(path, tensors, metadata, options)
  end
end

-- -- Ops, and what is loaded later ------------------------------------------------------------------------------------

for name, f in pairs(ops) do
  if type(f) == "function" and vx[name] == nil then vx[name] = f end
end

local names = {} -- of what is there to be loaded, for completion
for name, module in pairs(LATER) do names[name] = package.searchpath(module, package.path) and true end

--- Loads what is asked for, raises what a name of PyTorch's is here, or gives nil for any other name.
local function missing(t, name)
  if not LATER[name] then return torch_names.refuse("vx." .. tostring(name)) end
  local module = require(LATER[name])
  rawset(t, name, module)
  return module
end

for name, t in pairs { nn = vx.nn, optim = vx.optim } do
  setmetatable(t, { __index = function(_, key)
    return torch_names.refuse(("vx.%s.%s"):format(name, tostring(key)))
  end })
end

-- x:view{} and its like say what to write instead; __hidden: they are not offered as completions
setmetatable(core.Tensor, { __index = torch_names.methods(), __hidden = true })

return setmetatable(vx, { __names = names, __index = missing })
