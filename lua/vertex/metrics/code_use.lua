--- metrics/code_use: how many codes of a quantizer are in use, and how evenly, over any number of batches.
--
-- A quantizer with S stages and G groups gives S x G codes per row, each of a codebook of its own: both figures are
-- means over these codebooks. Several ranks count their own batches; the figures are of all, so that all ranks have to
-- ask for them.

local arguments = require "vertex.arguments"
local check = require "vertex.check"
local core = require "vertex.core"
local dist = require "vertex.dist"
local ops = require "vertex.ops"

local CodeUse = {}
CodeUse.__index = CodeUse

--- Counts a batch. Runs on the codes' device and waits for nothing, so it may be part of a recorded step (vx.graph).
-- @param codes tensor i32 (N, S x G), 0-based
-- @param[opt] given {masked = true} where there may be codes of -1, which count nowhere
function CodeUse:add(codes, given)
  if not (given and given.masked) then
    ops.count_codes(codes, self.codes, self.counts)
    return
  end
  core.step(function() -- one bin more in front takes the -1
    local shifted = ops.count_codes(ops.affine(codes:to "f32", 1, 1):to "i32", self.codes + 1)
    local counted = ops.narrow(shifted, 2, 2, self.codes)
    self.counts:copy((self.counts:to "f32" + counted:to "f32"):to "i32")
  end)
end

--- Says how often each code was taken; several ranks add up.
-- @return tensor i32 (columns,codes)
-- @raise where a rank does not come
function CodeUse:total()
  return dist.size() == 1 and self.counts or dist.all_reduce(core.new_like(self.counts):copy(self.counts))
end

--- Says which share of the codes was used at least once.
-- @return number, 0 to 1
-- @raise where a rank does not come
function CodeUse:share()
  return core.step(function()
    local zero = core.new({ 1 }, { device = self.counts:device() }):zero()
    return ops.mean(ops.lt(zero, self:total():to "f32")):item()
  end)
end

--- Says for each codebook which share of its codes was used at least once.
-- @return array of numbers, 0 to 1, one per column of codes
-- @raise where a rank does not come
function CodeUse:shares()
  local shares = {}
  for i, row in ipairs(self:total():totable()) do
    local used = 0
    for _, c in ipairs(row) do used = used + (c > 0 and 1 or 0) end
    shares[i] = used / #row
  end
  return shares
end

--- Says how many codes would be in use if those that are were used evenly: exp of the entropy of the counts, in nats.
-- @return number, 1 to codes; NaN where nothing was counted
-- @raise where a rank does not come
function CodeUse:perplexity()
  local sum, rows = 0, self:total():totable()
  for _, row in ipairs(rows) do
    local entropy, n = 0, 0
    for _, c in ipairs(row) do n = n + c end
    for _, c in ipairs(row) do
      if c > 0 then entropy = entropy - c / n * math.log(c / n) end
    end
    sum = sum + (n > 0 and math.exp(entropy) or 0 / 0)
  end
  return sum / #rows
end

--- Forgets what was counted.
function CodeUse:clear() self.counts:zero() end

--- Gives the counts of here, for a checkpoint.
-- @return {counts = tensor}; and a table of plain values, which is empty
function CodeUse:state() return { counts = self.counts }, {} end

--- Goes on from what :state gave; of several counters, one after the other, from their sum.
-- @param tensors {counts = tensor i32 (columns,codes) on any device}, which is copied
-- @raise where there is no such tensor
function CodeUse:restore(tensors, _)
  local flat, more, counts = {}, {}, tensors.counts
  if not core.is_tensor(counts) or core.shape_text(counts) ~= core.shape_text(self.counts) then
    core.fail("counter: counts are %s, expected a tensor %s", core.is_tensor(counts) and core.shape_text(counts)
      or check.show(counts), core.shape_text(self.counts))
  end
  for _, row in ipairs(self.counts:totable()) do
    for _, c in ipairs(row) do flat[#flat + 1] = c end
  end
  for _, row in ipairs(counts:totable()) do
    for _, c in ipairs(row) do more[#more + 1] = c end
  end
  for i = 1, #flat do flat[i] = flat[i] + more[i] end
  self.counts:fromtable(flat)
end

arguments.guard_class("counter", CodeUse)

--- Makes a counter of codes on the default device.
-- @param codes number of codes M
-- @param[opt=1] columns number of codes per row, stages x groups: a quantizer's `columns`
-- @return counter with :add(codes), :share(), :shares(), :perplexity(), :clear(); :state(), :restore() for checkpoints
-- @raise where a number is no integer of 1 or more
return function(codes, columns)
  columns = columns or 1
  check.integer("code_use", "codes", codes, 1)
  check.integer("code_use", "columns", columns, 1)
  local counts = core.new({ columns, codes }, { dtype = "i32", keep = true }):zero()
  return setmetatable({ codes = codes, counts = counts }, CodeUse)
end
