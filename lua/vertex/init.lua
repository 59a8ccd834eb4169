--- vertex: a workbench for vector quantization in neural networks. local vx = require "vertex"
--
-- Tensors live in C; Lua holds handles, records ops on a tape, and says what to compute. Dimensions are 1-based in
-- arguments, as in Torch7; indices stored in tensors (codes, neighbours) are 0-based, as in file formats and peers.

local core = require "vertex.core"
local tape = require "vertex.tape"
local ops = require "vertex.ops"
local registry = require "vertex.quantizers"
local safetensors = require "vertex.safetensors"
require "vertex.interactive.show"

local vx = {
  version = core.version,
  Tensor = core.Tensor,
  is_tensor = core.is_tensor,
  -- devices, memory, threads
  device = core.device, devices = core.devices, threads = core.threads, sync = core.sync, allow_tf32 = core.allow_tf32,
  autocast = core.autocast,
  memory = core.memory, memory_limit = core.memory_limit, memory_flush = core.memory_flush,
    reset_peak = core.reset_peak,
  -- scope, gradients, random numbers
  step = core.step, keep = core.keep, graph = require "vertex.step_graph", no_grad = tape.no_grad, seed = core.seed,
    generator = core.generator,
  -- files
  load = safetensors.load, save = safetensors.save,
  -- quantizers
  quantizer = registry.quantizer, quantizers = registry.quantizers, Quantizer = registry.Quantizer,
  ops = ops, nn = require "vertex.nn", optim = require "vertex.optim",
}

-- -- Making tensors; options {dtype = "f32", device = default, requires_grad = false} ---------------------------------

local function finish(x, options)
  if options and options.requires_grad then x.requires_grad = true end
  return x
end

--- From nested tables or a number.
vx.tensor = core.tensor
--- Of the given shape: uninitialized, or filled with 0, 1 or value.
function vx.empty(shape, options) return finish(core.new(shape, options), options) end
function vx.zeros(shape, options) return finish(core.new(shape, options):fill(0), options) end
function vx.ones(shape, options) return finish(core.new(shape, options):fill(1), options) end
function vx.full(shape, value, options) return finish(core.new(shape, options):fill(value), options) end
--- Standard normal; uniform in (0, 1). options.generator draws from another than the default generator.
function vx.randn(shape, options)
  return finish(ops.normal(core.new(shape, options), 0, 1, options and options.generator), options)
end
function vx.rand(shape, options)
  return finish(ops.uniform(core.new(shape, options), 0, 1, options and options.generator), options)
end
--- 0 .. n-1, or first, first + step, ... up to but without `stop`: vx.arange(n), vx.arange(first, stop, step), options
-- last.
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
--- A random order of 0 .. n-1, i32.
function vx.randperm(n, options) return ops.permutation(n, options and options.generator, options) end

--- State of the default generator, {seed, drawn}, and going back to it.
function vx.random_state() return { seed = core.default_generator.seed, drawn = core.default_generator.drawn } end
function vx.set_random_state(state)
  core.default_generator.seed, core.default_generator.drawn = state.seed, state.drawn
end

-- every op is also a function of the module: vx.matmul(a, b), vx.mse(a, b)
for name, f in pairs(ops) do
  if type(f) == "function" and vx[name] == nil then vx[name] = f end
end

-- modules loaded at first use: a quantizer experiment should not need cairo or an image library
local lazy = { data = "vertex.data", plot = "vertex.plot", runs = "vertex.runs", simplex = "vertex.simplex",
  metrics = "vertex.metrics", dist = "vertex.dist", display = "vertex.interactive.display" }
local names = {} -- of those that are there, for completion
for name, module in pairs(lazy) do names[name] = package.searchpath(module, package.path) and true end

return setmetatable(vx, {
  __names = names,
  __index = function(t, name)
    if not lazy[name] then return nil end
    local module = require(lazy[name])
    rawset(t, name, module)
    return module
  end,
})
