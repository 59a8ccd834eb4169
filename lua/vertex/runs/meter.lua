--- runs/meter: means of what a training loop measures, without making it wait for the device.

local arguments = require "vertex.arguments"
local core = require "vertex.core"

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

--- Gives the means of what was added since the last call, and forgets it. Waits for the device.
-- @return table {name = number}
function Meter:take()
  local means = {}
  for name, sum in pairs(self.sums) do
    if self.counts[name] > 0 then means[name] = (core.is_tensor(sum) and sum:item() or sum) / self.counts[name] end
    self.counts[name] = 0
    if core.is_tensor(sum) then sum:zero() else self.sums[name] = 0 end
  end
  return means
end

--- Gives what was summed, for a checkpoint.
-- @return {name = tensor}; and table of plain values: counts {name = number}, sums {name = number as text, also nan}
function Meter:state()
  local tensors, plain = {}, { counts = {}, sums = {} }
  for name, sum in pairs(self.sums) do
    plain.counts[name] = self.counts[name]
    if core.is_tensor(sum) then tensors[name] = sum else plain.sums[name] = ("%.17g"):format(sum) end
  end
  return tensors, plain
end

--- Goes on from what :state gave.
-- @param tensors {name = tensor on any device}, which are copied
-- @param plain table
function Meter:restore(tensors, plain)
  self.sums, self.counts = {}, {}
  for name, count in pairs(plain.counts) do self.counts[name] = count end
  for name, text in pairs(plain.sums) do self.sums[name] = tonumber(text) end
  for name, x in pairs(tensors) do
    self.sums[name] = core.new(x:shape(), { dtype = x:dtype(), keep = true }):copy(x)
  end
end

arguments.guard_class("meter", Meter)

--- Makes a meter: the means of named values between two calls of :take().
-- @return meter with :add{name = value} and :take(); :state() and :restore() for checkpoints
return function() return setmetatable({ sums = {}, counts = {} }, Meter) end
