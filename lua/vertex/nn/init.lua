--- nn.lua: layers as Lua tables. A module holds parameters (tensors with requires_grad), buffers and other modules in
-- its fields; parameters(), to(), state_dict() and print find them there, in the order they were assigned. Images and
-- sequences are channels last, so every layer acts on the last dimension.
--
-- A layer of your own:
--   local Scale = nn.module "Scale"
--   function Scale:init(channels) self.gain = nn.parameter({channels}, 1) end
--   function Scale:forward(x) return ops.mul(x, self.gain) end
--   local layer = Scale(16)

local check = require "vertex.check"
local core = require "vertex.core"
local ops = require "vertex.ops"

local nn = {}
local is_tensor, fail = core.is_tensor, core.fail

-- -- Module -----------------------------------------------------------------------------------------------------------

local Module = { training = true }
Module.__index = Module

--- Is x a module (not a class of modules)?
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

--- A new class of modules: constructor call → init(...); called → forward(...). `parent` to inherit from.
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

function Module.init() end

--- Iterates over own fields that are tensors or modules, in order of assignment.
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

--- Calls f(module, path) on this module and all inside it.
function Module:visit(f, path)
  path = path or ""
  f(self, path)
  for key, value in self:fields() do
    if is_module(value) then value:visit(f, path == "" and tostring(key) or path .. "." .. key) end
  end
end

--- Array of {name, tensor, module} of all tensors: parameters and buffers.
function Module:tensors()
  local list = {}
  self:visit(function(m, path)
    for key, value in m:fields() do
      if is_tensor(value) then list[#list + 1] = { (path == "" and "" or path .. ".") .. key, value, m } end
    end
  end)
  return list
end

--- Array of {name, tensor} of the tensors that require a gradient.
function Module:named_parameters()
  local list = {}
  for _, entry in ipairs(self:tensors()) do
    if entry[2].requires_grad then list[#list + 1] = { entry[1], entry[2] } end
  end
  return list
end

--- Array of the tensors that require a gradient.
function Module:parameters()
  local list = {}
  for i, entry in ipairs(self:named_parameters()) do list[i] = entry[2] end
  return list
end

--- Number of trained numbers.
function Module:parameter_count()
  local n = 0
  for _, p in ipairs(self:parameters()) do n = n + p:numel() end
  return n
end

local function set_training(self, on)
  self:visit(function(m) rawset(m, "training", on) end)
  return self
end
function Module:train() return set_training(self, true) end
function Module:eval() return set_training(self, false) end

--- Moves all tensors to a device, in place.
function Module:to(device)
  self:visit(function(m)
    for key, x in m:fields() do
      if is_tensor(x) and x:device() ~= device then
        local y = core.keep(x:to(device))
        y.requires_grad, y.no_decay = x.requires_grad, x.no_decay
        rawset(m, key, y)
      end
    end
  end)
  return self
end

function Module:zero_grad()
  for _, p in ipairs(self:parameters()) do p:zero_grad() end
end

--- {name = tensor} of all parameters and buffers; the tensors themselves, not copies.
function Module:state_dict()
  local state = {}
  for _, entry in ipairs(self:tensors()) do state[entry[1]] = entry[2] end
  return state
end

--- Copies tensors of the same names and shapes in; a missing, unknown or differently shaped one is an error, and then
-- nothing was changed.
function Module:load_state_dict(state)
  local own = self:state_dict()
  for name, x in pairs(own) do
    if not state[name] then fail("load_state_dict: '%s' is missing", name) end
    if core.shape_text(state[name]) ~= core.shape_text(x) then
      fail("load_state_dict: '%s' is %s in the file, %s in the module", name, core.shape_text(state[name]),
        core.shape_text(x))
    end
  end
  for name in pairs(state) do
    if not own[name] then fail("load_state_dict: '%s' has no place in this module", name) end
  end
  for name, x in pairs(own) do x:copy(state[name]) end
  return self
end

--- What print(module) shows of one layer beyond its name; a class overrides it.
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

--- The tree of modules with parameter counts.
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

--- A trained tensor. init: a number (constant), or {"normal", deviation} or {"uniform", bound}; options {no_decay}:
-- weight decay skips it (biases, norms, temperatures).
function nn.parameter(shape, init, options)
  local p = core.keep(core.new(shape))
  if type(init) == "number" then p:fill(init)
  elseif init[1] == "normal" then ops.normal(p, 0, init[2], options and options.generator)
  else ops.uniform(p, -init[2], init[2], options and options.generator) end
  p.requires_grad = true
  p.no_decay = options and options.no_decay or nil
  return p
end

--- Makes a tensor that belongs to a module without being trained: it is in state_dict and moves with the module, and is
-- not among its parameters.
-- @param shape array of sizes
-- @param[opt=0] value number in every element
-- @return tensor f32
function nn.buffer(shape, value) return core.keep(core.new(shape)):fill(value or 0) end

--- Bound of the uniform distribution that keeps the variance of a linear layer's inputs of this count (He et al. 2015,
-- gain 1).
local function fan_in_bound(n) return math.sqrt(3 / n) end

-- -- Layers -----------------------------------------------------------------------------------------------------------

--- y = x wT + b on the last dimension; a pointwise convolution on images. options {bias = true}.
nn.Linear = nn.module "Linear"
function nn.Linear:init(inputs, outputs, options)
  check.integer("Linear", "inputs", inputs, 1)
  check.integer("Linear", "outputs", outputs, 1)
  self.weight = nn.parameter({ outputs, inputs }, { "uniform", fan_in_bound(inputs) })
  if not (options and options.bias == false) then self.bias = nn.parameter({ outputs }, 0, { no_decay = true }) end
end
function nn.Linear:forward(x) return ops.linear(x, self.weight, self.bias) end
function nn.Linear:summary()
  return ("%d -> %d%s"):format(self.weight:size(2), self.weight:size(1), self.bias and "" or ", no bias")
end

--- Dense 3x3 convolution of (B,H,W,inputs), stride 1, zero padding. options {output = "f32"}: the result is float32
-- under vx.autocast too.
nn.Conv2d = nn.module "Conv2d"
function nn.Conv2d:init(inputs, outputs, options)
  check.integer("Conv2d", "inputs", inputs, 1)
  check.integer("Conv2d", "outputs", outputs, 1)
  self.output = options and options.output
  self.weight = nn.parameter({ 3, 3, inputs, outputs }, { "uniform", fan_in_bound(9 * inputs) })
  self.bias = nn.parameter({ outputs }, 0, { no_decay = true })
end
function nn.Conv2d:forward(x) return ops.conv2d(x, self.weight, self.bias, self.output) end
function nn.Conv2d:summary() return ("%d -> %d"):format(self.weight:size(3), self.weight:size(4)) end

--- Depthwise 3x3 convolution without bias (a pointwise one with bias follows it), stride 1 or 2, zero padding.
nn.DepthwiseConv2d = nn.module "DepthwiseConv2d"
function nn.DepthwiseConv2d:init(channels, stride)
  check.integer("DepthwiseConv2d", "channels", channels, 1)
  self.stride = stride or 1
  self.weight = nn.parameter({ 3, 3, channels }, { "uniform", fan_in_bound(9) })
end
function nn.DepthwiseConv2d:forward(x) return ops.depthwise_conv2d(x, self.weight, nil, self.stride) end
function nn.DepthwiseConv2d:summary() return ("%d, stride %d"):format(self.weight:size(3), self.stride) end

--- Group norm over (B,...,channels) with an optional activation ("silu", "gelu") in the same pass. groups defaults to
-- up to 32 of at least 4 channels each.
nn.GroupNorm = nn.module "GroupNorm"
function nn.GroupNorm:init(channels, groups, options)
  check.integer("GroupNorm", "channels", channels, 1)
  if not groups then
    groups = math.max(1, math.min(32, math.floor(channels / 4)))
    while channels % groups ~= 0 do groups = groups - 1 end
  end
  if channels % groups ~= 0 then fail("GroupNorm: %d channels do not divide into %d groups", channels, groups) end
  self.groups, self.activation = groups, options and options.activation or "none"
  self.weight = nn.parameter({ channels }, 1, { no_decay = true })
  self.bias = nn.parameter({ channels }, 0, { no_decay = true })
end
function nn.GroupNorm:forward(x) return ops.group_norm(x, self.weight, self.bias, self.groups, self.activation) end
function nn.GroupNorm:summary()
  return ("%d channels in %d groups%s"):format(self.weight:size(1), self.groups,
    self.activation ~= "none" and ", " .. self.activation or "")
end

--- Depthwise-separable 3x3 convolution [Chollet 2017]: depthwise, then pointwise, computed as one op. options {stride =
-- 1 or 2; up = 2: nearest-neighbour enlargement first; activation = "silu", ...: group norm and this activation first;
-- output = "f32": the result is float32 under vx.autocast too}. forward(x, residual) adds residual.
nn.SeparableConv2d = nn.module "SeparableConv2d"
function nn.SeparableConv2d:init(inputs, outputs, options)
  options = options or {}
  if options.activation then self.norm = nn.GroupNorm(inputs, options.groups, { activation = options.activation }) end
  self.depthwise = nn.DepthwiseConv2d(inputs, options.stride)
  self.pointwise = nn.Linear(inputs, outputs)
  self.how = { stride = options.stride, up = options.up, groups = self.norm and self.norm.groups,
    activation = options.activation, output = options.output }
end
function nn.SeparableConv2d:forward(x, residual)
  local norm, pointwise = self.norm, self.pointwise
  return ops.sepconv2d(x, self.depthwise.weight, pointwise.weight, pointwise.bias, norm and norm.weight,
    norm and norm.bias, residual, self.how)
end
function nn.SeparableConv2d:summary() return self.how.up == 2 and "enlarging x2" or "" end

nn.LayerNorm = nn.module "LayerNorm"
function nn.LayerNorm:init(width)
  check.integer("LayerNorm", "width", width, 1)
  self.weight = nn.parameter({ width }, 1, { no_decay = true })
  self.bias = nn.parameter({ width }, 0, { no_decay = true })
end
function nn.LayerNorm:forward(x) return ops.layer_norm(x, self.weight, self.bias) end

--- A function of one tensor as a layer, e.g. nn.Apply("silu", ops.silu).
nn.Apply = nn.module "Apply"
function nn.Apply:init(label, f) self.label, self.f = label, f end
function nn.Apply:forward(x) return self.f(x) end
function nn.Apply:summary() return self.label end

--- Modules one after another: nn.Sequential(a, b, ...) or :add(module).
nn.Sequential = nn.module "Sequential"
function nn.Sequential:init(...)
  for _, m in ipairs { ... } do self:add(m) end
end
function nn.Sequential:add(m)
  if not is_module(m) then fail("Sequential: a %s, expected a module", type(m)) end
  self[#self._order + 1] = m
  return self
end
function nn.Sequential:forward(x)
  for i = 1, #self._order do x = self[i](x) end
  return x
end

return nn
