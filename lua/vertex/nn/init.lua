--- nn: layers as Lua tables. A module holds parameters (tensors with requires_grad), buffers and other modules in
-- its fields; parameters(), to(), state_dict() and print find them there, in the order they were assigned. Images and
-- sequences are channels last, so every layer acts on the last dimension.
--
-- A layer of your own (the comment above its constructor is what ?Scale says):
--   local Scale = nn.module "Scale"
--   function Scale:init(channels) self.gain = nn.parameter({channels}, 1) end
--   function Scale:forward(x) return ops.mul(x, self.gain) end
--   local layer = Scale(16)

local arguments = require "vertex.arguments"
local check = require "vertex.check"
local core = require "vertex.core"
local ops = require "vertex.ops"
local torch_names = require "vertex.torch_names"

local nn = {}
local is_tensor, fail = core.is_tensor, core.fail

-- -- Module -----------------------------------------------------------------------------------------------------------

-- plain_state: names of a class's own fields that hold a number or a boolean which training goes on from; checkpoints
-- keep them (runs/checkpoint.lua).
local Module = { training = true, plain_state = {} }
Module.__index = Module

local absent = {} -- fields that were looked for in vain, as an optional bias
setmetatable(Module, { __index = function(_, key)
  if not absent[key] then
    torch_names.refuse_of_module(key, check.names(Module))
    absent[key] = true
  end
end })

--- Says whether a value is a module, not a class of modules.
-- @param x any value
-- @return boolean
local function is_module(x)
  local class = type(x) == "table" and not is_tensor(x) and getmetatable(x)
  return type(class) == "table" and class.is_module == true
end
nn.is_module = is_module

--- New fields remember the order of their assignment; state names and printing follow it.
local function remember(self, key, value)
  local order = rawget(self, "_order")
  if order and (is_tensor(value) or is_module(value)) then order[#order + 1] = key end
  rawset(self, key, value)
end

--- Makes a class of modules. Calling the class makes a module and hands the arguments to its :init; calling the module
-- does what its :forward does.
-- @param name text, for print
-- @param[opt] parent class to inherit from; nil is the class of all modules
-- @return class, to be given :init and :forward
-- @raise where a module is asked for a method that is nearly one it has, or one of PyTorch's
function nn.module(name, parent)
  local class = setmetatable({}, {
    __index = parent or Module,
    __call = function(class, ...)
      local self = setmetatable({ _order = {} }, class)
      self:init(...)
      return self
    end,
    __tostring = function(class) return "class of modules " .. class.name end,
  })
  class.name = name
  class.is_module = true
  class.__index = class
  class.__newindex = remember
  class.__call = function(self, ...) return self:forward(...) end
  class.__tostring = function(self) return self:describe() end
  return class
end

function Module:init() end -- luacheck: no self

--- Iterates over the module's own fields that are tensors or modules, in the order of their assignment.
-- @return iterator of key, value
function Module:fields()
  local i = 0
  return function()
    while true do
      i = i + 1
      local key = self._order[i]
      if key == nil then return nil end
      local value = rawget(self, key)
      if value ~= nil then return key, value end
    end
  end
end

--- Calls f(module, path) on a module and on all inside it. way: module → true for those that it lies in.
local function visit(module, f, path, way)
  if way[module] then
    fail("module %s: '%s' is a module that it lies in; none can contain itself", module.name, path)
  end
  way[module] = true
  f(module, path)
  for key, value in module:fields() do
    if is_module(value) then visit(value, f, path == "" and tostring(key) or path .. "." .. key, way) end
  end
  way[module] = nil
end

--- Calls a function on this module and on all inside it.
-- @param f function(module, path); path is "" for this module, "encoder.1" for one inside
-- @param[opt=""] path text in front of the paths
-- @raise where a module contains itself
function Module:visit(f, path) visit(self, f, path or "", {}) end

--- Lists all tensors, parameters and buffers, of this module and those inside.
-- @return array of { name, tensor, module that holds it }
function Module:tensors()
  local list = {}
  self:visit(function(m, path)
    for key, value in m:fields() do
      if is_tensor(value) then list[#list + 1] = { (path == "" and "" or path .. ".") .. key, value, m } end
    end
  end)
  return list
end

--- Lists the tensors that require a gradient, with their names; one that has several places (tied weights) once, under
-- its first name.
-- @return array of { name, tensor }
function Module:named_parameters()
  local list, seen = {}, {}
  for _, entry in ipairs(self:tensors()) do
    local x = entry[2]
    if x.requires_grad and not seen[x] then list[#list + 1], seen[x] = { entry[1], x }, true end
  end
  return list
end

--- Lists the tensors that require a gradient, each once, as optimizers take them.
-- @return array of tensors
function Module:parameters()
  local list = {}
  for i, entry in ipairs(self:named_parameters()) do list[i] = entry[2] end
  return list
end

--- Counts the trained numbers.
-- @return integer
function Module:parameter_count()
  local n = 0
  for _, p in ipairs(self:parameters()) do n = n + p:numel() end
  return n
end

local function set_training(self, on)
  self:visit(function(m) rawset(m, "training", on) end)
  return self
end

--- Puts this module and all inside into training mode: field `training` is true.
-- @return the module itself
function Module:train() return set_training(self, true) end

--- Puts this module and all inside into inference mode: field `training` is false.
-- @return the module itself
function Module:eval() return set_training(self, false) end

--- Moves all tensors to a device, in place. What is one tensor in several places stays one.
-- @param device "cpu", "cuda:0", ...
-- @return the module itself
function Module:to(device)
  local moved = {} -- tensor → the one on the device
  self:visit(function(m)
    for key, x in m:fields() do
      if is_tensor(x) and x:device() ~= device then
        if not moved[x] then
          local y = core.keep(x:to(device))
          y.requires_grad, y.no_decay, y.rate = x.requires_grad, x.no_decay, x.rate
          moved[x] = y
        end
        rawset(m, key, moved[x])
      end
    end
  end)
  return self
end

--- Forgets the gradients of all parameters.
function Module:zero_grad()
  for _, p in ipairs(self:parameters()) do p:zero_grad() end
end

--- Gives all parameters and buffers under their names; the tensors themselves, not copies.
-- @return table { name = tensor }, which vx.save takes
function Module:state_dict()
  local state = {}
  for _, entry in ipairs(self:tensors()) do state[entry[1]] = entry[2] end
  return state
end

--- Gives the model's tensors of a whole checkpoint (runs/checkpoint.lua), under their own names; any other state as it
-- is.
local function model_of(state, own)
  local first = next(own)
  if not first or state[first] or not state["model." .. first] then return state end
  local model = {}
  for name, x in pairs(state) do
    local rest = type(name) == "string" and name:match "^model%.(.+)$"
    if rest then model[rest] = x end
  end
  return model
end

--- Fails unless `x`, what a state has under a name, can be copied to the module's tensor `own`.
local function expect_loadable(name, x, own)
  if x == nil then fail("load_state_dict: '%s' is missing", name) end
  if not core.is_tensor(x) or core.is_released(x) then
    fail("load_state_dict: '%s' is %s, expected a tensor %s", name, core.is_tensor(x) and "a released tensor"
      or check.show(x), core.shape_text(own))
  end
  if core.shape_text(x) ~= core.shape_text(own) then
    fail("load_state_dict: '%s' is %s in the file, %s in the module", name, core.shape_text(x), core.shape_text(own))
  end
  local kind = own:dtype()
  if kind == "f32" or kind == x:dtype() then return end -- f32 holds, but for rounding, what the other dtypes do
  for i, value in ipairs(ops.reshape(x:detach(), { -1 }):totable()) do
    if not core.fits(kind, value) then
      fail("load_state_dict: element %d of '%s' is %.10g, and the module's is %s", i, name, value, kind)
    end
  end
end

--- Copies tensors of the same names and shapes in.
-- @param state table { name = tensor }, as vx.load gives it, also of a whole checkpoint of a run
-- @return the module itself
-- @raise where a name is missing or unknown, there is no tensor under it, a shape differs, or a number does not fit an
-- integer tensor of the module; nothing was changed then
function Module:load_state_dict(state)
  local own = self:state_dict()
  state = model_of(state, own)
  for name, x in pairs(own) do expect_loadable(name, state[name], x) end
  for name in pairs(state) do
    if not own[name] then fail("load_state_dict: '%s' has no place in this module", tostring(name)) end
  end
  for name, x in pairs(own) do x:copy(state[name]) end
  self:visit(function(m) m:loaded() end)
  return self
end

--- Follows a load_state_dict of this module or one around it; a class overrides it.
function Module:loaded() end -- luacheck: no unused args

--- Writes what print(module) shows of one layer beyond its name. A class overrides it.
-- @return text
function Module:summary()
  local parts = {}
  for key, x in self:fields() do
    if is_tensor(x) then parts[#parts + 1] = key .. " " .. core.shape_text(x) end
  end
  return table.concat(parts, ", ")
end

local function thousands(n)
  local s = tostring(n)
  repeat
    local count
    s, count = s:gsub("^(%d+)(%d%d%d)", "%1,%2")
  until count == 0
  return s
end

--- Writes what print(module) shows: the tree of modules with the numbers of their parameters.
-- @param[opt=""] indent text, spaces before each line but the first
-- @return text of several lines
function Module:describe(indent)
  indent = indent or ""
  local line = self.name
  local summary = self:summary()
  if summary ~= "" then line = line .. "(" .. summary .. ")" end
  local n = self:parameter_count()
  if n > 0 then line = ("%s  %s parameter%s"):format(line, thousands(n), n == 1 and "" or "s") end
  local lines = { line }
  for key, value in self:fields() do
    if is_module(value) then lines[#lines + 1] = ("%s  %s: %s"):format(indent, key, value:describe(indent .. "  ")) end
  end
  return table.concat(lines, "\n")
end

-- -- Parameters -------------------------------------------------------------------------------------------------------

--- Makes a trained tensor, on the default device.
-- @param shape array of sizes, { 3, 4 }
-- @param init number in every element, or { "normal", standard deviation }, or { "uniform", bound }: from -bound to
-- bound
-- @param[opt] options { no_decay = true: weight decay skips it, as it should biases, norms and temperatures; generator
-- = the default one }
-- @return tensor f32 of that shape that requires a gradient
-- @raise where init or an option is none of these
function nn.parameter(shape, init, options)
  local o = check.options("parameter", options, { no_decay = "boolean", generator = "table" })
  local drawn = type(init) == "table"
  if drawn and init[1] ~= "normal" and init[1] ~= "uniform" then
    fail('parameter: init is { %s, ... }, expected { "normal", sd } or { "uniform", bound }', check.show(init[1]))
  end
  if drawn then check.number("parameter", "init[2]", init[2], 0, math.huge) end
  local p = core.keep(core.new(shape))
  if not drawn then p:fill(init)
  elseif init[1] == "normal" then ops.normal(p, 0, init[2], o.generator)
  else ops.uniform(p, -init[2], init[2], o.generator) end
  p.requires_grad = true
  p.no_decay = o.no_decay or nil
  return p
end

--- Makes a tensor that belongs to a module without being trained: it is in state_dict and moves with the module, and is
-- not among its parameters.
-- @param shape array of sizes
-- @param[opt=0] value number in every element
-- @return tensor f32
function nn.buffer(shape, value) return core.keep(core.new(shape)):fill(value or 0) end

--- Gives the bound of the uniform distribution that keeps the variance of a linear layer's inputs of this count (He et
-- al. 2015, gain 1).
local function fan_in_bound(n) return math.sqrt(3 / n) end

local ACTIVATIONS = { "none", "silu", "gelu" }

-- -- Layers -----------------------------------------------------------------------------------------------------------

--- Multiplies the last dimension by a matrix and adds a bias: y = x wT + b. On images it is a pointwise convolution.
-- @param inputs integer of 1 or more, size of the last dimension of x
-- @param outputs integer of 1 or more, size of the last dimension of the result
-- @param[opt] options { bias = true }
-- @return module with weight (outputs, inputs) and bias (outputs)
-- @raise where inputs or outputs is no integer of 1 or more
nn.Linear = nn.module "Linear"
function nn.Linear:init(inputs, outputs, options)
  check.integer("Linear", "inputs", inputs, 1)
  check.integer("Linear", "outputs", outputs, 1)
  local o = check.options("Linear", options, { bias = { "boolean", true } })
  self.weight = nn.parameter({ outputs, inputs }, { "uniform", fan_in_bound(inputs) })
  if o.bias then self.bias = nn.parameter({ outputs }, 0, { no_decay = true }) end
end

--- Applies the layer.
-- @param x tensor f32 (..., inputs)
-- @return tensor f32 (..., outputs)
function nn.Linear:forward(x) return ops.linear(x, self.weight, self.bias) end

--- Writes the sizes, for print.
-- @return text
function nn.Linear:summary()
  return ("%d -> %d%s"):format(self.weight:size(2), self.weight:size(1), self.bias and "" or ", no bias")
end

--- Writes a pair for print: "3" or "1 x 7".
local function pair_text(p) return p[1] == p[2] and tostring(p[1]) or p[1] .. " x " .. p[2] end

--- Convolves images, with zeros around.
-- @param inputs integer of 1 or more, channels of x
-- @param outputs integer of 1 or more, channels of the result
-- @param kernel integer of 1 or more, pixels of a filter's side, or array { rows, columns }
-- @param[opt] options { stride = 1, padding = 0: pixels of zeros around, each a number or { rows, columns }; groups =
-- 1: outputs see only the channels of their own group; bias = true; output = "f32": the result is float32 under
-- vx.autocast too }
-- @return module with weight (outputs, inputs / groups, rows, columns) and bias (outputs)
-- @raise where a number is no integer of 1 or more (padding: of 0 or more), or the groups do not divide inputs and
-- outputs
nn.Conv2d = nn.module "Conv2d"
function nn.Conv2d:init(inputs, outputs, kernel, options)
  check.integer("Conv2d", "inputs", inputs, 1)
  check.integer("Conv2d", "outputs", outputs, 1)
  kernel = check.pair("Conv2d", "kernel", kernel, 1)
  local o = check.options("Conv2d", options, { stride = { "any", 1 }, padding = { "any", 0 }, groups = { "count", 1 },
    bias = { "boolean", true }, output = { { "f32" } } })
  if inputs % o.groups ~= 0 or outputs % o.groups ~= 0 then
    fail("Conv2d: %d and %d channels do not divide into %d groups", inputs, outputs, o.groups)
  end
  self.how = { stride = check.pair("Conv2d", "stride", o.stride, 1),
    padding = check.pair("Conv2d", "padding", o.padding, 0), groups = o.groups, output = o.output }
  local seen = inputs / o.groups
  self.weight = nn.parameter({ outputs, seen, kernel[1], kernel[2] }, { "uniform",
    fan_in_bound(seen * kernel[1] * kernel[2]) })
  if o.bias then self.bias = nn.parameter({ outputs }, 0, { no_decay = true }) end
end

--- Applies the layer.
-- @param x tensor f32 (B, H, W, inputs)
-- @return tensor f32 (B, floor((H + 2 padding - rows) / stride) + 1, the same of W, outputs); bf16 under
-- vx.autocast where the kernel is 3 with padding 1, stride 1 and one group
-- @raise where the padded image is smaller than the kernel
function nn.Conv2d:forward(x) return ops.conv2d(x, self.weight, self.bias, self.how) end

--- Writes the sizes, for print.
-- @return text
function nn.Conv2d:summary()
  local how, w = self.how, self.weight
  local stride, padding = pair_text(how.stride), pair_text(how.padding)
  return ("%d -> %d, kernel %s%s%s%s%s"):format(w:size(2) * how.groups, w:size(1), pair_text { w:size(3), w:size(4) },
    stride ~= "1" and ", stride " .. stride or "", padding ~= "0" and ", padding " .. padding or "",
    how.groups ~= 1 and ", groups " .. how.groups or "", self.bias and "" or ", no bias")
end

--- Takes the largest number of each window of images, channel by channel.
-- @param kernel integer of 1 or more, pixels of a window's side, or array { rows, columns }
-- @param[opt] options { stride = kernel, padding = 0, each a number or { rows, columns } }
-- @return module without parameters
-- @raise where kernel is no integer of 1 or more
nn.MaxPool2d = nn.module "MaxPool2d"
function nn.MaxPool2d:init(kernel, options)
  self.kernel, self.how = check.pair("MaxPool2d", "kernel", kernel, 1), options
end

--- Applies the layer.
-- @param x tensor f32 (B, H, W, C)
-- @return tensor f32 (B, floor((H + 2 padding - rows) / stride) + 1, the same of W, C)
function nn.MaxPool2d:forward(x) return ops.max_pool2d(x, self.kernel, self.how) end

--- Writes the size, for print.
-- @return text
function nn.MaxPool2d:summary() return "kernel " .. pair_text(self.kernel) end

--- Averages each window of images, channel by channel.
-- @param kernel integer of 1 or more, pixels of a window's side, or array { rows, columns }
-- @param[opt] options { stride = kernel, padding = 0, each a number or { rows, columns }; count_include_pad = true: the
-- padding counts among the pixels that a sum is divided by }
-- @return module without parameters
-- @raise where kernel is no integer of 1 or more
nn.AvgPool2d = nn.module("AvgPool2d", nn.MaxPool2d)
function nn.AvgPool2d:init(kernel, options)
  self.kernel, self.how = check.pair("AvgPool2d", "kernel", kernel, 1), options
end

--- Applies the layer.
-- @param x tensor f32 (B, H, W, C)
-- @return tensor f32 (B, floor((H + 2 padding - rows) / stride) + 1, the same of W, C)
function nn.AvgPool2d:forward(x) return ops.avg_pool2d(x, self.kernel, self.how) end

--- Convolves sequences over time, with zeros beyond both ends.
-- @param inputs integer of 1 or more, channels of x
-- @param outputs integer of 1 or more, channels of the result
-- @param kernel integer of 1 or more, frames that a filter covers
-- @param[opt] options { stride = 1, padding = 0: frames of zeros at either end; groups = 1: outputs see only the
-- channels of their own group; bias = true }
-- @return module with weight (outputs, inputs / groups, kernel) and bias (outputs)
-- @raise where inputs, outputs or kernel is no integer of 1 or more, or the groups do not divide inputs and outputs
nn.Conv1d = nn.module "Conv1d"
function nn.Conv1d:init(inputs, outputs, kernel, options)
  check.integer("Conv1d", "inputs", inputs, 1)
  check.integer("Conv1d", "outputs", outputs, 1)
  check.integer("Conv1d", "kernel", kernel, 1)
  local o = check.options("Conv1d", options, { stride = { "count", 1 }, padding = { "whole", 0 },
    groups = { "count", 1 }, bias = { "boolean", true } })
  if inputs % o.groups ~= 0 or outputs % o.groups ~= 0 then
    fail("Conv1d: %d and %d channels do not divide into %d groups", inputs, outputs, o.groups)
  end
  self.how = { stride = o.stride, padding = o.padding, groups = o.groups }
  local seen = inputs / o.groups
  self.weight = nn.parameter({ outputs, seen, kernel }, { "uniform", fan_in_bound(seen * kernel) })
  if o.bias then self.bias = nn.parameter({ outputs }, 0, { no_decay = true }) end
end

--- Applies the layer.
-- @param x tensor f32 (B, L, inputs)
-- @return tensor f32 (B, floor((L + 2 padding - kernel) / stride) + 1, outputs)
-- @raise where L + 2 padding is below the kernel
function nn.Conv1d:forward(x) return ops.conv1d(x, self.weight, self.bias, self.how) end

--- Writes the sizes, for print.
-- @return text
function nn.Conv1d:summary()
  local how = self.how
  return ("%d -> %d, kernel %d%s%s%s%s"):format(self.weight:size(2) * how.groups, self.weight:size(1),
    self.weight:size(3), how.stride ~= 1 and ", stride " .. how.stride or "",
    how.padding ~= 0 and ", padding " .. how.padding or "", how.groups ~= 1 and ", groups " .. how.groups or "",
    self.bias and "" or ", no bias")
end

--- Convolves each channel of images with a 3x3 filter of its own, zero padding, without bias: a pointwise convolution
-- with one usually follows.
-- @param channels integer of 1 or more, channels of x and of the result
-- @param[opt=1] stride integer, 1 or 2
-- @return module with weight (3, 3, channels)
-- @raise where channels is no integer of 1 or more
nn.DepthwiseConv2d = nn.module "DepthwiseConv2d"
function nn.DepthwiseConv2d:init(channels, stride)
  check.integer("DepthwiseConv2d", "channels", channels, 1)
  self.stride = check.integer("DepthwiseConv2d", "stride", stride or 1, 1, 2)
  self.weight = nn.parameter({ 3, 3, channels }, { "uniform", fan_in_bound(9) })
end

--- Applies the layer.
-- @param x tensor f32 (B, H, W, channels)
-- @return tensor f32 (B, H / stride, W / stride, channels), sizes rounded up
function nn.DepthwiseConv2d:forward(x) return ops.depthwise_conv2d(x, self.weight, nil, self.stride) end

--- Writes the sizes, for print.
-- @return text
function nn.DepthwiseConv2d:summary() return ("%d, stride %d"):format(self.weight:size(3), self.stride) end

--- Normalizes groups of channels to mean 0 and variance 1, then scales and shifts each channel [Wu and He 2018], with
-- an activation in the same pass.
-- @param channels integer of 1 or more, size of the last dimension
-- @param[opt] groups number of groups, which divides channels; nil: up to 32 of at least 4 channels each
-- @param[opt] options { activation = "none" | "silu" | "gelu" }
-- @return module with weight (channels) and bias (channels)
-- @raise where channels is no integer of 1 or more, or groups does not divide it
nn.GroupNorm = nn.module "GroupNorm"
function nn.GroupNorm:init(channels, groups, options)
  check.integer("GroupNorm", "channels", channels, 1)
  local o = check.options("GroupNorm", options, { activation = { ACTIVATIONS, "none" } })
  if not groups then
    groups = math.max(1, math.min(32, math.floor(channels / 4)))
    while channels % groups ~= 0 do groups = groups - 1 end
  end
  check.integer("GroupNorm", "groups", groups, 1)
  if channels % groups ~= 0 then fail("GroupNorm: %d channels do not divide into %d groups", channels, groups) end
  self.groups, self.activation = groups, o.activation
  self.weight = nn.parameter({ channels }, 1, { no_decay = true })
  self.bias = nn.parameter({ channels }, 0, { no_decay = true })
end

--- Applies the layer.
-- @param x tensor f32 (B, ..., channels)
-- @param[opt] lengths tensor i32 (B): of x[b] the first lengths[b] positions count, and the result is 0 from there on
-- @return tensor f32 of x's shape
function nn.GroupNorm:forward(x, lengths)
  return ops.group_norm(x, self.weight, self.bias, self.groups, self.activation, nil, lengths)
end

--- Writes the sizes and the activation, for print.
-- @return text
function nn.GroupNorm:summary()
  return ("%d channels in %d groups%s"):format(self.weight:size(1), self.groups,
    self.activation ~= "none" and ", " .. self.activation or "")
end

--- Convolves images with depthwise-separable 3x3 filters [Chollet 2017]: depthwise, then pointwise, computed as one op,
-- zero padding.
-- @param inputs integer of 1 or more, channels of x
-- @param outputs integer of 1 or more, channels of the result
-- @param[opt] options table
-- @param[opt=1] options.stride 1 or 2
-- @param[opt=1] options.up 2: enlarges x twofold by nearest neighbours first
-- @param[opt] options.activation "silu" or "gelu": group norm and this activation first
-- @param[opt] options.groups of that norm; see vx.nn.GroupNorm
-- @param[opt] options.output "f32": the result is float32 under vx.autocast too
-- @return module with depthwise, pointwise and, with an activation, norm
-- @raise where inputs or outputs is no integer of 1 or more, or groups does not divide inputs
nn.SeparableConv2d = nn.module "SeparableConv2d"
function nn.SeparableConv2d:init(inputs, outputs, options)
  local o = check.options("SeparableConv2d", options, { stride = "count", up = "count", activation = { ACTIVATIONS },
    groups = "count", output = { { "f32" } } })
  check.integer("SeparableConv2d", "outputs", outputs, 1) -- before numbers are drawn
  if o.activation then self.norm = nn.GroupNorm(inputs, o.groups, { activation = o.activation }) end
  self.depthwise = nn.DepthwiseConv2d(inputs, o.stride)
  self.pointwise = nn.Linear(inputs, outputs)
  self.how = { stride = o.stride, up = o.up, groups = self.norm and self.norm.groups, activation = o.activation,
    output = o.output }
end

--- Applies the layer.
-- @param x tensor f32 (B, H, W, inputs)
-- @param[opt] residual tensor of the result's shape, which is added
-- @return tensor f32 (B, H up / stride, W up / stride, outputs), bf16 under vx.autocast
function nn.SeparableConv2d:forward(x, residual)
  local norm, pointwise = self.norm, self.pointwise
  return ops.sepconv2d(x, self.depthwise.weight, pointwise.weight, pointwise.bias, norm and norm.weight,
    norm and norm.bias, residual, self.how)
end

--- Writes what is unusual about it, for print.
-- @return text
function nn.SeparableConv2d:summary() return self.how.up == 2 and "enlarging x2" or "" end

--- Normalizes the last dimension to mean 0 and variance 1, then scales and shifts each element [Ba et al. 2016].
-- @param width integer of 1 or more, elements of the last dimension
-- @return module with weight (width) and bias (width)
-- @raise where width is no integer of 1 or more
nn.LayerNorm = nn.module "LayerNorm"
function nn.LayerNorm:init(width)
  check.integer("LayerNorm", "width", width, 1)
  self.weight = nn.parameter({ width }, 1, { no_decay = true })
  self.bias = nn.parameter({ width }, 0, { no_decay = true })
end

--- Applies the layer.
-- @param x tensor f32 (..., width)
-- @return tensor f32 of x's shape
function nn.LayerNorm:forward(x) return ops.layer_norm(x, self.weight, self.bias) end

--- Sets elements to 0 with probability p in training and divides the others by 1 - p; in inference it gives x itself.
-- @param p probability, from 0 to 1
-- @param[opt] options { generator = vx.generator to draw from; nil is the one that vx.seed seeds }
-- @return module
-- @raise where p is no number from 0 to 1
nn.Dropout = nn.module "Dropout"
function nn.Dropout:init(p, options)
  self.p = check.number("Dropout", "p", p, 0, 1)
  self.generator = check.options("Dropout", options, { generator = "any" }).generator
end

--- Applies the layer.
-- @param x tensor f32 of any shape
-- @return tensor f32 of x's shape
function nn.Dropout:forward(x)
  if not self.training or self.p == 0 then return x end
  return ops.dropout(x, self.p, self.generator)
end

--- Writes the probability, for print.
-- @return text
function nn.Dropout:summary() return tostring(self.p) end

--- Makes a layer of a function of one tensor: vx.nn.Apply("silu", vx.silu).
-- @param label text, for print
-- @param f function(tensor) → tensor
nn.Apply = nn.module "Apply"
function nn.Apply:init(label, f) self.label, self.f = label, f end

--- Applies the function.
-- @param x tensor of a shape that it takes
-- @return what the function gives
function nn.Apply:forward(x) return self.f(x) end

--- Writes the label, for print.
-- @return text
function nn.Apply:summary() return self.label end

--- Sets what is below 0 to 0.
-- @return module
nn.ReLU = nn.module "ReLU"
function nn.ReLU:init() end -- luacheck: no self

--- Applies the layer.
-- @param x tensor f32 of any shape
-- @return tensor f32 of x's shape
function nn.ReLU:forward(x) return ops.relu(x) end -- luacheck: no self

--- Multiplies each element with the probability that a standard normal number is below it [Hendrycks and Gimpel 2016].
-- @return module
nn.GELU = nn.module "GELU"
function nn.GELU:init() end -- luacheck: no self

--- Applies the layer.
-- @param x tensor f32 of any shape
-- @return tensor f32 of x's shape
function nn.GELU:forward(x) return ops.gelu(x) end -- luacheck: no self

--- Multiplies each element with its sigmoid [Elfwing et al. 2017].
-- @return module
nn.SiLU = nn.module "SiLU"
function nn.SiLU:init() end -- luacheck: no self

--- Applies the layer.
-- @param x tensor f32 of any shape
-- @return tensor f32 of x's shape
function nn.SiLU:forward(x) return ops.silu(x) end -- luacheck: no self

--- Gives for each index the row of a trained table; the rows begin standard normal.
-- @param count integer of 1 or more, the number of rows
-- @param width integer of 1 or more, elements of a row
-- @return module with weight (count, width)
-- @raise where count or width is no integer of 1 or more
nn.Embedding = nn.module "Embedding"
function nn.Embedding:init(count, width)
  check.integer("Embedding", "count", count, 1)
  check.integer("Embedding", "width", width, 1)
  self.weight = nn.parameter({ count, width }, { "normal", 1 }, { no_decay = true })
end

--- Applies the layer.
-- @param index tensor i32 of any shape (...), 0-based
-- @return tensor f32 (..., width)
-- @raise where an index is outside 0 .. count - 1
function nn.Embedding:forward(index) return ops.gather(self.weight, index) end

--- Writes the sizes, for print.
-- @return text
function nn.Embedding:summary() return ("%d rows of %d"):format(self.weight:size(1), self.weight:size(2)) end

--- Applies modules one after another: vx.nn.Sequential(a, b, ...), vx.nn.Sequential{ a, b, ... }, or :add(module).
-- @param ... modules, or one table of them
-- @return module whose fields 1, 2, ... are they
-- @raise where one is no module
nn.Sequential = nn.module "Sequential"
function nn.Sequential:init(...)
  local first = ...
  local listed = type(first) == "table" and getmetatable(first) == nil
  local list = listed and first or { ... }
  for i = 1, listed and #list or select("#", ...) do self:add(list[i]) end
end

--- Puts a module behind those that are there.
-- @param m module
-- @return the Sequential itself
-- @raise where it is no module, or the Sequential itself
function nn.Sequential:add(m)
  if not is_module(m) then fail("Sequential: a %s, expected a module", type(m)) end
  if m == self then fail "Sequential: it cannot contain itself" end
  self[#self._order + 1] = m
  return self
end

--- Applies the modules in their order.
-- @param x tensor of a shape that the first takes
-- @return what the last gives
function nn.Sequential:forward(x)
  for i = 1, #self._order do x = self[i](x) end
  return x
end

require "vertex.nn.attention"(nn)

arguments.guard_class("module", Module)

return nn
