--- optim.lua: AdamW, SGD, clipping of gradients, and learning-rate schedules. A schedule is a plain function of the
-- step; the optimizer takes the rate anew at every step.

local arguments = require "vertex.arguments"
local check = require "vertex.check"
local common = require "vertex.ops.common"
local core = require "vertex.core"

local optim = {}
local op, VX, fail = core.op, core.VX, core.fail

--- Raises where `parameters` is no array of leaves, is empty, or has one twice.
local function check_parameters(who, parameters)
  if #parameters == 0 then fail("%s: no parameters", who) end
  local at = {}
  for i, p in ipairs(parameters) do
    common.expect_tensor(p, who, ("parameters[%d]"):format(i))
    if p._node then
      fail("%s: parameters[%d] %s is the result of an op, expected a leaf; write x:detach()", who, i,
        core.shape_text(p))
    end
    if at[p] then fail("%s: parameters[%d] is parameters[%d] once more", who, i, at[p]) end
    at[p] = i
  end
end

--- Raises where two of the parameters overlap in memory, which would take two steps, or one is strided, which has none.
local function expect_apart(who, parameters)
  for i, p in ipairs(parameters) do
    if not p:is_contiguous() then
      fail("%s: parameters[%d] %s is a strided view, expected a contiguous tensor", who, i, core.shape_text(p))
    end
    for j = 1, i - 1 do
      if core.overlap(p, parameters[j]) then
        fail("%s: parameters[%d] %s and parameters[%d] %s share memory", who, j, core.shape_text(parameters[j]), i,
          core.shape_text(p))
      end
    end
  end
end

--- The gradient of the i-th parameter; nil where it has none.
local function gradient_of(who, i, p)
  local g = p.grad
  if g == nil or core.is_tensor(g) and core.shape_text(g) == core.shape_text(p) then return g end
  fail("%s: the gradient of parameters[%d] is %s, expected a tensor %s", who, i, core.is_tensor(g)
    and core.shape_text(g) or check.show(g), core.shape_text(p))
end

--- The factor of the learning rate lr that the i-th parameter asks for.
local function rate_of(who, i, p, lr)
  if p.rate == nil then return 1 end
  check.number(who, ("the field rate of parameters[%d]"):format(i), p.rate, -math.huge, math.huge)
  check.number(who, ("the learning rate of parameters[%d]"):format(i), lr * p.rate, -core.f32_most, core.f32_most)
  return p.rate
end

-- -- AdamW [Loshchilov and Hutter 2019] -------------------------------------------------------------------------------

local AdamW = {}
AdamW.__index = AdamW

local OPTIONS = { lr = { "number", 1e-3 }, betas = { "table", { 0.9, 0.99 } }, eps = { "number", 1e-8 },
  weight_decay = { "number", 1e-4 } }

--- Makes AdamW over a list of parameters. Parameters marked no_decay (biases, norms, temperatures) are not decayed;
-- a parameter's field rate is a factor of its learning rate.
-- @param parameters array of contiguous tensors f32 of any shape, on one device; each is there once, and no two overlap
-- in memory
-- @param[opt] options table
-- @param[opt=1e-3] options.lr learning rate, until a step is given another
-- @param[opt={ 0.9, 0.99 }] options.betas decay of the first and the second moment, each in [0, 1)
-- @param[opt=1e-8] options.eps added to the root of the second moment
-- @param[opt=1e-4] options.weight_decay decoupled weight decay, a factor of the learning rate
-- @return optimizer with :step(lr), :zero_grad() and :state_dict()
-- @raise where an option is unknown or out of its range, there are no parameters, two overlap in memory, or one is
-- strided or the result of an op
function optim.AdamW(parameters, options)
  check_parameters("AdamW", parameters)
  expect_apart("AdamW", parameters)
  local self = setmetatable(check.options("AdamW", options, OPTIONS), AdamW)
  self.parameters, self.steps, self.first, self.second = parameters, 0, {}, {}
  check.number("AdamW", "lr", self.lr, 0, core.f32_most)
  for i = 1, 2 do
    check.number("AdamW", ("betas[%d]"):format(i), self.betas[i], 0, 1)
    if self.betas[i] == 1 then fail("AdamW: betas[%d] is 1, expected less", i) end
  end
  check.number("AdamW", "eps", self.eps, 1e-30, 1)
  check.number("AdamW", "weight_decay", self.weight_decay, 0, 1e3)
  for i, p in ipairs(parameters) do
    self.first[i] = core.new_like(p, true):zero()
    self.second[i] = core.new_like(p, true):zero()
  end
  self.lists = { p = {}, m = {}, v = {}, g = {}, decay = {} } -- the arguments of a step, kept for the next
  return self
end

--- The factors of the learning rate that parameters with a gradient ask for, each once, in their order.
local function rates_of(parameters, lr)
  local rates, seen = {}, {}
  for i, p in ipairs(parameters) do
    local rate = gradient_of("AdamW", i, p) and rate_of("AdamW", i, p, lr)
    if rate and not seen[rate] then rates[#rates + 1], seen[rate] = rate, true end
  end
  return #rates > 0 and rates or { 1 }
end

--- Takes one step, all parameters of a rate in one call. Parameters without a gradient stay as they are; those
-- with a field `rate` take that times the learning rate.
-- @param[opt] lr number, the learning rate; else the last one
-- @raise where parameters lie on several devices, a gradient is no tensor of its parameter's shape, or a rate is no
-- number; then nothing has changed
function AdamW:step(lr)
  self.lr = check.number("AdamW", "lr", lr or self.lr, 0, core.f32_most)
  local lists, rates = self.lists, rates_of(self.parameters, self.lr)
  core.count(self, "steps", "step")
  for _, rate in ipairs(rates) do
    local count = 0
    for i = 1, #self.first do
      local p = self.parameters[i]
      if p.grad and (p.rate or 1) == rate then
        count = count + 1
        lists.p[count], lists.m[count], lists.v[count], lists.g[count] = p, self.first[i], self.second[i], p.grad
        lists.decay[count] = p.no_decay and 0 or self.weight_decay
      end
    end
    for _, list in pairs(lists) do
      for i = #list, count + 1, -1 do list[i] = nil end
    end
    op.adamw(lists.p, lists.m, lists.v, lists.g, lists.decay, self.lr * rate, self.betas[1], self.betas[2], self.eps,
      self.steps)
  end
end

--- Forgets the gradients of all parameters and keeps their memory for the next ones.
function AdamW:zero_grad()
  for _, p in ipairs(self.parameters) do p:zero_grad() end
end

--- Gives the moments for a checkpoint. The number of steps taken is in the field steps.
-- @return table { name = tensor of a parameter's shape }: the tensors themselves, not copies
function AdamW:state_dict()
  local state = {}
  for i = 1, #self.parameters do
    state["first." .. i], state["second." .. i] = self.first[i], self.second[i]
  end
  return state
end

-- -- SGD [Robbins and Monro 1951; Sutskever et al. 2013] --------------------------------------------------------------

local SGD = {}
SGD.__index = SGD

--- Makes stochastic gradient descent, with momentum where it is not 0: v = momentum v + g, parameter -= lr v, as
-- PyTorch has it. Parameters marked no_decay are not decayed; a parameter's field rate is a factor of its learning
-- rate.
-- @param parameters array of contiguous tensors f32 of any shape, on one device; each is there once, and no two overlap
-- in memory
-- @param[opt] options table
-- @param[opt=1e-2] options.lr learning rate, until a step is given another
-- @param[opt=0] options.momentum share of the last step that goes on, in [0, 1)
-- @param[opt=false] options.nesterov true: the step is g + momentum v
-- @param[opt=0] options.weight_decay times the parameter is added to its gradient
-- @return optimizer with :step(lr), :zero_grad() and :state_dict()
-- @raise where an option is unknown or out of its range, there are no parameters, two overlap in memory, or one is
-- strided or the result of an op
function optim.SGD(parameters, options)
  check_parameters("SGD", parameters)
  expect_apart("SGD", parameters)
  local self = setmetatable(check.options("SGD", options, { lr = { "number", 1e-2 }, momentum = { "number", 0 },
    nesterov = { "boolean", false }, weight_decay = { "number", 0 } }), SGD)
  check.number("SGD", "lr", self.lr, 0, core.f32_most)
  check.number("SGD", "momentum", self.momentum, 0, 1 - 1e-9)
  check.number("SGD", "weight_decay", self.weight_decay, 0, 1e3)
  if self.nesterov and self.momentum == 0 then fail "SGD: nesterov needs a momentum" end
  self.parameters, self.steps, self.velocity = parameters, 0, {}
  for i, p in ipairs(parameters) do
    self.velocity[i] = self.momentum > 0 and core.new_like(p, true):zero() or nil
  end
  return self
end

--- Adds alpha times x to y, in place.
local function add_scaled(y, x, alpha) op.binary(y, y, common.scaled(core.contiguous(x), alpha), VX.ADD) end

--- Takes one step. Parameters without a gradient stay as they are.
-- @param[opt] lr number, the learning rate; else the last one
-- @raise where a graph is being recorded: its replays would keep the rate; where a gradient is no tensor of its
-- parameter's shape, or a rate is no number; then nothing has changed
function SGD:step(lr)
  if core.is_recording() then fail "SGD: a replay of vx.graph would keep the rate; use vx.optim.AdamW in it" end
  self.lr = check.number("SGD", "lr", lr or self.lr, 0, core.f32_most)
  local rates = {}
  for i, p in ipairs(self.parameters) do
    rates[i] = gradient_of("SGD", i, p) and self.lr * rate_of("SGD", i, p, self.lr) or 0
  end
  core.count(self, "steps", "step")
  core.step(function()
    for i, p in ipairs(self.parameters) do
      if p.grad then
        local g, v, rate = p.grad, self.velocity[i], rates[i]
        if self.weight_decay > 0 and not p.no_decay then
          g = common.scaled(core.contiguous(g), 1)
          add_scaled(g, p, self.weight_decay)
        end
        if v then
          op.unary(v, v, VX.AFFINE, self.momentum, 0)
          op.binary(v, v, g, VX.ADD)
        end
        if v and self.nesterov then
          add_scaled(p, g, -rate)
          add_scaled(p, v, -rate * self.momentum)
        else
          add_scaled(p, v or g, -rate)
        end
      end
    end
  end)
end

--- Forgets the gradients of all parameters and keeps their memory for the next ones.
function SGD:zero_grad()
  for _, p in ipairs(self.parameters) do p:zero_grad() end
end

--- Gives the velocities for a checkpoint. The number of steps taken is in the field steps.
-- @return table { name = tensor of a parameter's shape }: the tensors themselves, not copies; empty without momentum
function SGD:state_dict()
  local state = {}
  for i, v in pairs(self.velocity) do state["velocity." .. i] = v end
  return state
end

-- -- Gradients --------------------------------------------------------------------------------------------------------

--- Scales all gradients by one factor where their norm, as that of one long vector, is above `most`; between backward
-- and the optimizer's step. Nothing waits for the device, so that it may be part of a recorded step (vx.graph).
-- @param parameters array of tensors f32 of any shape; those without a gradient do not count
-- @param most number above 0, the largest norm that is left as it is
-- @return tensor f32 (1), the norm before
-- @raise where there are no parameters, one is there twice or the result of an op, none has a gradient, or most is no
-- positive number
function optim.clip_grad_norm(parameters, most)
  check_parameters("clip_grad_norm", parameters)
  check.positive("clip_grad_norm", "most", most)
  return core.step(function()
    local total
    for i, p in ipairs(parameters) do
      local g = gradient_of("clip_grad_norm", i, p)
      if g then
        local squares, sum = core.new_like(g), common.empty_on(g, { 1 })
        op.binary(squares, g, g, VX.MUL)
        op.reduce(sum, common.shaped(squares, { squares:numel() }), VX.REDUCE_SUM)
        total = total and common.binary("clip_grad_norm", VX.ADD, total, sum) or sum
      end
    end
    if not total then fail "clip_grad_norm: no parameter has a gradient" end
    local norm = core.new_like(total)
    op.unary(norm, total, VX.SQRT, 1, 0)
    -- most / max(norm, most): 1 where nothing is to be done
    local limit = common.empty_on(norm, { 1 }):fill(most)
    local factor = common.binary("clip_grad_norm", VX.DIV, limit, common.binary("clip_grad_norm", VX.MAX, norm, limit))
    for _, p in ipairs(parameters) do
      local g = p.grad
      if g then op.binary(g, g, common.expanded(factor, g:shape()), VX.MUL) end
    end
    return norm
  end)
end

-- -- Schedules: functions of the step (1, 2, ...) ---------------------------------------------------------------------

--- Checks what a schedule is called with.
local function expect_step(who, step) return check.number(who, "the step", step, -math.huge, math.huge) end

--- Makes a schedule: linear warm-up from 0 to the peak, then half a cosine down to the final rate.
-- @param options table
-- @param options.peak rate at the end of the warm-up
-- @param options.total step, 1-based, at which the final rate is reached
-- @param[opt=0] options.warmup steps of the warm-up
-- @param[opt=0] options.final last rate, which stays
-- @return function(step) -> rate
-- @raise where there is no peak or no total
function optim.warmup_cosine(options)
  local o = check.options("warmup_cosine", options, { peak = "number", final = { "number", 0 },
    warmup = { "number", 0 }, total = "number" })
  local peak, final, warmup, total = o.peak, o.final, o.warmup, o.total
  if not (peak and total) then fail "warmup_cosine: needs peak and total" end
  for name, value in pairs(o) do check.number("warmup_cosine", name, value, 0, math.huge) end
  return function(step)
    expect_step("warmup_cosine", step)
    if step < warmup then return peak * step / warmup end
    local t = math.min(1, (step - warmup) / math.max(1, total - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * t))
  end
end

--- Makes a schedule that falls by the same factor over the same number of steps: rate times factor^(step / every).
-- @param options table
-- @param options.rate at step 0
-- @param options.factor what the rate is multiplied with over `every` steps, above 0
-- @param[opt=1] options.every steps
-- @return function(step) -> rate
-- @raise where rate or factor is missing, or one is not positive
function optim.exponential(options)
  local o = check.options("exponential", options, { rate = "positive", factor = "positive", every = { "positive", 1 } })
  if not (o.rate and o.factor) then fail "exponential: needs rate and factor" end
  return function(step) return o.rate * o.factor ^ (expect_step("exponential", step) / o.every) end
end

--- Makes a schedule that falls at once at some steps, each time by the same factor.
-- @param options table
-- @param options.rate before the first of them
-- @param options.at array of steps, ascending, from each of which on the rate is lower; or a number: every so many
-- @param[opt=0.1] options.factor what the rate is multiplied with there, above 0
-- @return function(step) -> rate
-- @raise where rate or at is missing, or a number is not positive
function optim.steps(options)
  local o = check.options("steps", options, { rate = "positive", at = "any", factor = { "positive", 0.1 } })
  if not (o.rate and o.at) then fail "steps: needs rate and at" end
  if type(o.at) ~= "table" then
    check.positive("steps", "at", o.at)
    return function(step) return o.rate * o.factor ^ math.floor(expect_step("steps", step) / o.at) end
  end
  for i, at in ipairs(o.at) do check.number("steps", ("at[%d]"):format(i), at, o.at[i - 1] or 0, math.huge) end
  return function(step)
    expect_step("steps", step)
    local rate = o.rate
    for _, at in ipairs(o.at) do
      if step >= at then rate = rate * o.factor end
    end
    return rate
  end
end

--- Makes a schedule of the same rate at every step.
-- @param rate number
-- @return function(step) -> rate
function optim.constant(rate) return function() return rate end end

arguments.guard_class("AdamW", AdamW)
arguments.guard_class("SGD", SGD)

return optim
