--- runs/meter: means of what a training loop measures, without making it wait for the device.

local arguments = require "vertex.arguments"
local check = require "vertex.check"
local core = require "vertex.core"
local dist = require "vertex.dist"

local Meter = {}
Meter.__index = Meter

--- Adds values.
-- @param values {name = number or tensor of one element}. Tensors are summed on their device, also within a recorded
-- graph (vx.graph), whose replays add as well
function Meter:add(values)
  for name, v in pairs(values) do
    self.counts[name] = self.counts[name] or 0
    core.count(self.counts, name)
    if core.is_tensor(v) then
      local sum = self.sums[name]
      if sum then sum:copy(sum + v:detach()) else self.sums[name] = core.keep(v:detach():clone()) end
    else
      self.sums[name] = (self.sums[name] or 0) + v
    end
  end
end

--- Gives the means of what was added since the last call, and forgets it. Waits for the device. Several ranks give what
-- all of them added, under the same names.
-- @return table {name = number}
-- @raise where a rank does not come
function Meter:take()
  local means, values, names = {}, {}, check.names(self.sums)
  for i, name in ipairs(names) do
    local sum = self.sums[name]
    values[2 * i - 1], values[2 * i] = core.is_tensor(sum) and sum:item() or sum, self.counts[name]
  end
  values = dist.sum(values)
  for i, name in ipairs(names) do
    local sum = self.sums[name]
    if values[2 * i] > 0 then means[name] = values[2 * i - 1] / values[2 * i] end
    self.counts[name] = 0
    if core.is_tensor(sum) then sum:zero() else self.sums[name] = 0 end
  end
  return means
end

--- Gives what was summed here, for a checkpoint.
-- @return {name = tensor}; and table of plain values: counts {name = number}, sums {name = number as text, also nan}
function Meter:state()
  local tensors, plain = {}, { counts = {}, sums = {} }
  for name, sum in pairs(self.sums) do
    plain.counts[name] = self.counts[name]
    if core.is_tensor(sum) then tensors[name] = sum else plain.sums[name] = ("%.17g"):format(sum) end
  end
  return tensors, plain
end

--- Goes on from what :state gave; of several meters, one after the other, from their sum.
-- @param tensors {name = tensor on any device}, which are copied
-- @param plain table
function Meter:restore(tensors, plain)
  for name, count in pairs(plain.counts) do self.counts[name] = (self.counts[name] or 0) + count end
  for name, text in pairs(plain.sums) do
    self.sums[name] = self.sums[name] and self.sums[name] + tonumber(text) or tonumber(text)
  end
  for name, x in pairs(tensors) do
    local sum = self.sums[name]
    if sum then
      core.step(function() sum:copy(sum + x:to(sum:device())) end)
    else
      self.sums[name] = core.new(x:shape(), { dtype = x:dtype(), keep = true }):copy(x)
    end
  end
end

arguments.guard_class("meter", Meter)

--- Makes a meter: the means of named values between two calls of :take().
-- @return meter with :add{name = value} and :take(); :state() and :restore() for checkpoints
return function() return setmetatable({ sums = {}, counts = {} }, Meter) end
