--- optim.lua: AdamW and learning-rate schedules. The schedule is a plain function of the step; the optimizer takes the
-- rate anew at every step.

local arguments = require "vertex.arguments"
local check = require "vertex.check"
local core = require "vertex.core"

local optim = {}
local op, fail = core.op, core.fail

-- -- AdamW [Loshchilov and Hutter 2019] -------------------------------------------------------------------------------

local AdamW = {}
AdamW.__index = AdamW

local OPTIONS = { lr = { "number", 1e-3 }, betas = { "table", { 0.9, 0.99 } }, eps = { "number", 1e-8 },
  weight_decay = { "number", 1e-4 } }

--- Makes AdamW over a list of parameters. Parameters marked no_decay (biases, norms, temperatures) are not decayed;
-- a parameter's field rate is a factor of its learning rate.
-- @param parameters array of tensors f32 of any shape, on one device; each is there once, and no two share memory
-- @param[opt] options table
-- @param[opt=1e-3] options.lr learning rate, until a step is given another
-- @param[opt={ 0.9, 0.99 }] options.betas decay of the first and the second moment, each in [0, 1)
-- @param[opt=1e-8] options.eps added to the root of the second moment
-- @param[opt=1e-4] options.weight_decay decoupled weight decay, a factor of the learning rate
-- @return optimizer with :step(lr), :zero_grad() and :state_dict()
-- @raise where an option is unknown or out of its range, or there are no parameters
function optim.AdamW(parameters, options)
  local self = setmetatable(check.options("AdamW", options, OPTIONS), AdamW)
  self.parameters, self.steps, self.first, self.second = parameters, 0, {}, {}
  check.number("AdamW", "lr", self.lr, 0, math.huge)
  for i = 1, 2 do
    check.number("AdamW", ("betas[%d]"):format(i), self.betas[i], 0, 1)
    if self.betas[i] == 1 then fail("AdamW: betas[%d] is 1, expected less", i) end
  end
  check.number("AdamW", "eps", self.eps, 1e-30, 1)
  check.number("AdamW", "weight_decay", self.weight_decay, 0, 1e3)
  if #parameters == 0 then fail "AdamW: no parameters" end
  for i, p in ipairs(parameters) do
    self.first[i] = core.new_like(p, true):zero()
    self.second[i] = core.new_like(p, true):zero()
  end
  self.lists = { p = {}, m = {}, v = {}, g = {}, decay = {} } -- the arguments of a step, kept for the next
  return self
end

--- The factors of the learning rate that parameters with a gradient ask for, each once, in their order.
local function rates_of(parameters)
  local rates, seen = {}, {}
  for _, p in ipairs(parameters) do
    local rate = p.rate or 1
    if p.grad and not seen[rate] then rates[#rates + 1], seen[rate] = rate, true end
  end
  return #rates > 0 and rates or { 1 }
end

--- Takes one step, all parameters of a rate in one call. Parameters without a gradient stay as they are; those
-- with a field `rate` take that times the learning rate.
-- @param[opt] lr number, the learning rate; else the last one
-- @raise where parameters lie on several devices or share memory
function AdamW:step(lr)
  self.lr = lr or self.lr
  core.count(self, "steps", "step")
  local lists = self.lists
  for _, rate in ipairs(rates_of(self.parameters)) do
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

-- -- Schedules: functions of the step (1, 2, ...) ---------------------------------------------------------------------

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
    if step < warmup then return peak * step / warmup end
    local t = math.min(1, (step - warmup) / math.max(1, total - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * t))
  end
end

--- Makes a schedule of the same rate at every step.
-- @param rate number
-- @return function(step) -> rate
function optim.constant(rate) return function() return rate end end

arguments.guard_class("AdamW", AdamW)

return optim
