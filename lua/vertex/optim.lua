--- optim.lua: AdamW and learning-rate schedules. The schedule is a plain function of the step; the optimizer takes the
-- rate anew at every step.

local core = require "vertex.core"

local optim = {}
local C, call, fail = core.C, core.call, core.fail

-- -- AdamW [Loshchilov and Hutter 2019] -------------------------------------------------------------------------------

local AdamW = {}
AdamW.__index = AdamW

local DEFAULTS = { lr = 1e-3, betas = { 0.9, 0.99 }, eps = 1e-8, weight_decay = 1e-4 }

local function check_number(name, value, low, high)
  if type(value) ~= "number" or not (value >= low and value <= high) then
    fail("AdamW: %s is %s, expected a number from %g to %g", name, tostring(value), low, high)
  end
end

--- AdamW over a list of parameters. config {lr = 1e-3, betas = {0.9, 0.99}, eps = 1e-8, weight_decay = 1e-4}.
-- Parameters marked no_decay (biases, norms, temperatures) are not decayed. They lie on one device, each is there once,
-- and no two share memory.
function optim.AdamW(parameters, config)
  local self = setmetatable({ parameters = parameters, steps = 0, first = {}, second = {} }, AdamW)
  for key in pairs(config or {}) do
    if DEFAULTS[key] == nil then
      fail("AdamW: unknown option '%s'; known: lr, betas, eps, weight_decay", tostring(key))
    end
  end
  for key, value in pairs(DEFAULTS) do self[key] = config and config[key] or value end
  check_number("lr", self.lr, 0, math.huge)
  for i = 1, 2 do
    check_number(("betas[%d]"):format(i), self.betas[i], 0, 1)
    if self.betas[i] == 1 then fail("AdamW: betas[%d] is 1, expected less", i) end
  end
  check_number("eps", self.eps, 1e-30, 1)
  check_number("weight_decay", self.weight_decay, 0, 1e3)
  if #parameters == 0 then fail "AdamW: no parameters" end
  for i, p in ipairs(parameters) do
    self.first[i] = core.new_like(p, true):zero()
    self.second[i] = core.new_like(p, true):zero()
  end
  self.lists = { decay = core.array("float", #parameters) }
  for _, name in ipairs { "p", "m", "v", "g" } do self.lists[name] = core.array("vx_tensor *", #parameters) end
  return self
end

--- One step with learning rate lr (default: the last one), all parameters in one call of C. Parameters without a
-- gradient stay as they are.
function AdamW:step(lr)
  self.lr = lr or self.lr
  core.count(self, "steps", "step")
  local lists, count = self.lists, 0
  for i = 1, #self.first do
    local p = self.parameters[i]
    if p.grad then
      lists.p[count], lists.g[count] = core.handle(p), core.handle(p.grad)
      lists.m[count], lists.v[count] = core.handle(self.first[i]), core.handle(self.second[i])
      lists.decay[count] = p.no_decay and 0 or self.weight_decay
      count = count + 1
    end
  end
  call(C.vx_adamw, lists.p, lists.m, lists.v, lists.g, count, lists.decay, self.lr, self.betas[1], self.betas[2],
    self.eps, self.steps)
end

function AdamW:zero_grad()
  for _, p in ipairs(self.parameters) do p:zero_grad() end
end

--- {name = tensor} of the moments, for checkpoints; the step count is self.steps.
function AdamW:state_dict()
  local state = {}
  for i = 1, #self.parameters do
    state["first." .. i], state["second." .. i] = self.first[i], self.second[i]
  end
  return state
end

-- -- Schedules: functions of the step (1, 2, ...) ---------------------------------------------------------------------

--- Linear warm-up from 0 over `warmup` steps to `peak`, then half a cosine down to `final` at step `total`.
function optim.warmup_cosine(options)
  local peak, final, warmup, total = options.peak, options.final or 0, options.warmup or 0, options.total
  if not (peak and total) then fail "warmup_cosine: needs peak and total" end
  return function(step)
    if step < warmup then return peak * step / warmup end
    local t = math.min(1, (step - warmup) / math.max(1, total - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * t))
  end
end

--- The same rate at every step.
function optim.constant(rate) return function() return rate end end

return optim
