--- simplex/watch.lua: records how a quantizer moves the rows of its batches over the simplex while it trains.
--
-- A watch takes the place of the quantizer's method quantize: it looks at pi, without Gumbel noise, and then calls the
-- method. Nothing of the training changes. Steps that vx.graph replays run no Lua, so a watch does not see them.

local arguments = require "vertex.arguments"
local check = require "vertex.check"
local core = require "vertex.core"
local ops = require "vertex.ops"
local plots = require "vertex.simplex.plots"
local scores = require "vertex.simplex.scores"
local tape = require "vertex.tape"
local fail, shape_text = core.fail, core.shape_text

local Watch = {}
Watch.__index = Watch

-- The tensors of a record.
local NAMES = { "distances", "neighbours", "claimed", "points" }

-- -- Looking ----------------------------------------------------------------------------------------------------------

-- Gives R of the rows of z (N,G,D), evenly spaced; all where there are no more.
local function spaced_rows(z, R)
  local N = z:size(1)
  if R >= N then return z end
  local index = {}
  for i = 1, R do index[i] = math.floor((i - 1) * N / R) end
  index = core.tensor(index, { dtype = "i32", device = z:device() })
  return ops.reshape(ops.gather(ops.reshape(z, { N, -1 }), index), { R, z:size(2), z:size(3) })
end

-- Gives where the rows z (N,G,D) sit, on the CPU: { distances (G,R), neighbours (G,M), claimed (G,M) i32, points
-- (G,P,M) or nil }.
local function look(self, z)
  local o, q = self.options, self.quantizer
  local M = q.options.codes
  z = spaced_rows(z, o.rows)
  local R, found = z:size(1), { distances = {}, neighbours = {}, claimed = {}, points = o.points > 0 and {} or nil }
  for g = 1, q.options.groups do
    local log_pi = q:log_pi(z, g)
    local p = ops.exp(log_pi)
    local deviation = ops.vertex_knn(log_pi, math.min(o.k, R), o.metric, true)
    if o.metric == "l2" then deviation = ops.sqrt(ops.clamp(deviation, 0, 2)) end
    local claimed = ops.count_codes(ops.reshape(ops.argmax(p), { R, 1 }), M)
    found.distances[g] = ops.reshape(ops.min(scores.vertex_distances(p), 2), { 1, R })
    found.neighbours[g] = ops.reshape(ops.mean(deviation, 2), { 1, M })
    found.claimed[g] = ops.reshape(claimed:to "f32", { 1, M })
    if found.points then found.points[g] = ops.reshape(ops.narrow(p, 1, 1, math.min(o.points, R)), { 1, -1, M }) end
  end
  local record = {}
  for name, parts in pairs(found) do
    local x = #parts > 1 and ops.cat(1, parts) or parts[1]
    record[name] = (name == "claimed" and x:to "i32" or x):to "cpu"
  end
  return record
end

-- Raises where the quantizer cannot be watched.
local function check_quantizer(quantizer)
  if type(quantizer) ~= "table" or type(quantizer.quantize) ~= "function" then
    fail("watch: a %s, expected a quantizer", type(quantizer))
  end
  if type(quantizer.log_pi) ~= "function" then
    fail("watch: %s has no points on a simplex to look at: it is no smoothed quantizer (no method log_pi)",
      quantizer.label)
  end
  if quantizer.options.codes < 2 then
    fail("watch: %s has %d code, expected at least 2", quantizer.label, quantizer.options.codes)
  end
  if rawget(quantizer, "quantize") then
    fail("watch: %s is being watched already; stop that watch first", quantizer.label)
  end
end

--- Records, from now on, where the rows of training batches sit on the simplex. Every training forward of the quantizer
-- adds an entry to watch.records: { step = number of the training forward, 1-based, and on the CPU
--     distances f32 (G,R)    distance of each row from the vertex that it is nearest to, as vertex_distances
--     neighbours f32 (G,M)   mean deviation of each vertex's K nearest rows, of these R: distance ("l2") or nats ("ce")
--     claimed i32 (G,M)      rows whose largest coordinate is this vertex's: 0 is a code that nobody wants
--     points f32 (G,P,M)     the first P of these rows themselves, where asked for }
-- The training itself does not change. Looking holds R x M numbers. Steps that vx.graph replays are not seen.
-- @param quantizer smoothed quantizer of vx.quantizer: one with a method log_pi(z (N,G,D), g) that gives
-- (N,M)
-- @param[opt] options table
-- @param[opt=1] options.every looks at every so many-th training forward
-- @param[opt=1024] options.rows R, evenly spaced; all rows of a smaller batch
-- @param[opt=8] options.k K, or R where that is less
-- @param[opt="l2"] options.metric "l2" or "ce"
-- @param[opt=0] options.points P
-- @return watch: .records, and the methods stack, steps, last, save, plot and stop
-- @raise where the quantizer is not smoothed, has one code or is watched already, or an option is unknown or no count
local function watch(quantizer, options)
  local o = check.options("watch", options, { every = { "count", 1 }, rows = { "count", 1024 }, k = { "count", 8 },
    metric = { { "ce", "l2" }, "l2" }, points = { "whole", 0 } })
  check_quantizer(quantizer)
  local self = setmetatable({ quantizer = quantizer, options = o, records = {} }, Watch)
  local quantize = quantizer.quantize
  rawset(quantizer, "quantize", function(q, z, given)
    if (q.steps - 1) % o.every == 0 and not core.is_recording() then
      local record = core.step(tape.no_grad, look, self, z)
      for _, x in pairs(record) do core.keep(x) end
      record.step = q.steps
      self.records[#self.records + 1] = record
    end
    return quantize(q, z, given)
  end)
  return self
end

--- Ends the recording; what was recorded stays.
-- @return the watch
function Watch:stop()
  if self.quantizer then rawset(self.quantizer, "quantize", nil) end
  self.quantizer = nil
  return self
end

-- -- What was recorded ------------------------------------------------------------------------------------------------

--- Gives the training forwards that were recorded.
-- @return array of T numbers, 1-based
function Watch:steps()
  local steps = {}
  for i, record in ipairs(self.records) do steps[i] = record.step end
  return steps
end

--- Gives the latest record.
-- @return the record, or nil where there is none yet
function Watch:last() return self.records[#self.records] end

--- Joins the records' tensors of one name, in the order of the steps.
-- @param name "distances", "neighbours", "claimed" or "points"
-- @return tensor f32 (T,...) on the CPU
-- @raise where nothing was recorded, the records have no such tensor, or batches differed in size
function Watch:stack(name)
  local first, parts = self.records[1], {}
  if not first then fail "watch: nothing was recorded yet: no training forward has run" end
  if not core.is_tensor(first[name]) then fail("watch: no tensors '%s' in the records", tostring(name)) end
  for i, record in ipairs(self.records) do
    if shape_text(record[name]) ~= shape_text(first[name]) then
      fail("watch: %s is %s at step %d and %s at step %d: batches differ in size, so take watch.records one by one, "
        .. "or fewer rows", name, shape_text(first[name]), first.step, shape_text(record[name]), record.step)
    end
    local x = record[name]:to "f32"
    parts[i] = ops.reshape(x, { 1, unpack(x:shape()) })
  end
  return tape.no_grad(ops.cat, 1, parts)
end

--- Writes everything recorded as a safetensors file: each name stacked, "step" i32 (T), and the watch's options as
-- metadata.
-- @param path name of the file
-- @raise where nothing was recorded, batches differed in size, or the file cannot be written
function Watch:save(path)
  local tensors = { step = core.tensor(self:steps(), { dtype = "i32", device = "cpu" }) }
  for _, name in ipairs(NAMES) do
    if self.records[1] and self.records[1][name] then tensors[name] = self:stack(name) end
  end
  if not tensors.distances then fail "watch: nothing was recorded yet: no training forward has run" end
  local meta = {}
  for key, value in pairs(self.options) do meta[key] = tostring(value) end
  require("vertex.safetensors").save(path, tensors, meta)
end

--- Draws what was recorded over the steps: three axes with a line for each group. The first shows the rows' distance
-- from the vertex nearest to them: the mean, in a band of one standard deviation, cut at 0. The second shows the
-- deviation of each vertex's K nearest rows: the mean over the vertices, in a band from the least to the greatest. The
-- third shows the share of vertices that any row claimed.
-- @return figure, to show, save or add to
-- @raise where nothing was recorded, or batches differed in size
function Watch:plot() return plots.watch(self) end

function Watch:__tostring()
  local last = self:last()
  if not last then return "watch: no record yet" end
  local used = tape.no_grad(function()
    return ops.mean(ops.lt(core.new({ 1 }, { device = "cpu" }):zero(), last.claimed:to "f32")):item()
  end)
  local text = "watch: %d records, the last of step %d: mean distance from the nearest vertex %.3g, "
    .. "vertices claimed %.0f%%"
  return text:format(#self.records, last.step, ops.mean(last.distances):item(), 100 * used)
end

arguments.guard_class("watch", Watch)

return watch
