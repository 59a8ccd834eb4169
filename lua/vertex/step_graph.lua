--- step_graph.lua: a step that is recorded once and replayed as a whole, so that neither Lua nor a launch per op costs
-- time any more.
--
--     local x = vx.zeros { 16, 64, 64, 3 }                  -- inputs keep their place: new values are copied into it
--     local step = vx.graph(function(rate)
--       local loss = vx.mse(model(x), x)
--       optimizer:zero_grad()
--       loss:backward()
--       optimizer:step(rate)
--       return loss
--     end)
--     for i = 1, steps do
--       x:copy(batches:next())
--       local loss = step:replay(schedule(i))               -- loss:item() waits for the device
--     end
--
-- Every replay does one step, to the bit what the function would do. The first replay runs the function, the second
-- records it; from then on Lua is not run again. (With VERTEX_SYNC=1 every replay runs the function, and so it does
-- while vx.debug or vx.debug_nonfinite look at every op.)
-- What Lua decides stays as it was when recorded; random streams, the steps of AdamW and their rate, relative to the
-- one given, go on. Steps outside the graph may come in between.
--
-- Inside, nothing may wait for the device or come from the host: item, totable, printing, tensors from tables and
-- copies between devices are errors. Results are the same tensors every time, overwritten by the next replay.

local arguments = require "vertex.arguments"
local check = require "vertex.check"
local core = require "vertex.core"
local tape = require "vertex.tape"

local Recording = {}
Recording.__index = Recording

--- Makes a step that is recorded at its second replay and replayed as a whole from then on; the head of step_graph.lua
-- says what it may do.
-- @param f function(rate) that does one step
-- @param[opt] options { device = the default one: where it runs }
-- @return step with :replay(rate) and :release()
-- @raise where f is no function
local function graph(f, options)
  if type(f) ~= "function" then core.fail("graph: a %s, expected a function", type(f)) end
  return setmetatable({ f = f, device = check.options("graph", options, { device = "string" }).device
    or core.device(), warm = false }, Recording)
end

--- Says whether somebody looks at every op, which a launch would hide.
local function is_watched() return tape.inspector or core.is_traced() end

--- Keeps the tensors in a value alive beyond the step.
local function keep(value, seen)
  if type(value) ~= "table" or seen[value] then return end
  seen[value] = true
  if core.is_tensor(value) then
    core.keep(value)
  else
    for _, v in pairs(value) do keep(v, seen) end
  end
end

local function pack(...) return { n = select("#", ...), ... } end

--- Finds the counter that advances each pair of (seed, stream) on a replay: sources[i] is its number for the recorded
-- draws[i], or false for a pair that the step was given, which is replayed unchanged.
local function sources_of(draws, counts)
  local sources = {}
  for i, d in ipairs(draws) do
    sources[i] = false
    for j, c in ipairs(counts) do
      if c.kind == "stream" and c.object.seed == d.seed and c.value == d.stream then
        if sources[i] and counts[sources[i]].object ~= c.object then
          core.fail("graph: two generators of seed %d draw stream %d in this step; seed them differently", d.seed,
            d.stream)
        end
        sources[i] = j
      end
    end
  end
  return sources
end

--- Records one run of the function; false where the device has no graphs.
local function record(self, rate)
  local results = pack(core.record(self.device, rate or 1, core.step, self.f, rate))
  local recorded = results[1]
  if not recorded then return false end
  for i = 2, results.n do keep(results[i], {}) end
  local draws, counts = recorded:draws(), recorded.counts
  for _, c in ipairs(counts) do
    if c.kind == "step" then c.rate = c.object.lr end
  end
  self.recorded, self.rate, self.results, self.draws, self.counts = recorded, rate, results, draws, counts
  self.sources = sources_of(draws, counts)
  return true
end

--- Counts one step on. Gives the number of AdamW's steps since the recording, or nil where the optimizers do not agree
-- on one.
local function advance(self, rate)
  local steps
  for _, c in ipairs(self.counts) do
    c.now = c.object[c.field] + 1
    c.object[c.field] = c.now
    if c.kind == "step" then
      local since = c.now - c.value
      if since < 0 or since ~= (steps or since) then return nil end
      steps = since
      if rate then c.object.lr = c.rate / self.rate * rate end
    end
  end
  for i, d in ipairs(self.draws) do
    local c = self.counts[self.sources[i]]
    if c then d.seed, d.stream = c.object.seed, c.now end
  end
  return steps or 0
end

--- Does one step.
-- @param[opt] rate number from 0 up, handed to the function; on a replay AdamW's learning rates inside follow it.
-- nil: they stay as they were recorded
-- @return what the function returned; its tensors are overwritten by the next replay
-- @raise where the rate is no such number, or is given now and was not at the recording (or the other way round), or
-- the function waits for the device
function Recording:replay(rate)
  if rate ~= nil and not (type(rate) == "number" and rate >= 0 and rate < math.huge) then
    core.fail("replay: rate %s, expected a number of 0 or more", tostring(rate))
  end
  if self.recorded and (rate == nil) ~= (self.rate == nil) then
    core.fail("replay: recorded %s a rate, now %s one", self.rate and "with" or "without", rate and "with" or "without")
  end
  local watched, steps = is_watched(), nil
  if watched and self.recorded then
    self:release()
    self.warm = true
  end
  if self.recorded then
    local before = {}
    for i, c in ipairs(self.counts) do before[i] = c.object[c.field] end
    steps = advance(self, rate)
    if not steps then -- optimizers went separate ways, or back to a checkpoint: their steps have to be recorded anew
      for i, c in ipairs(self.counts) do c.object[c.field] = before[i] end
      self:release()
      self.warm = true
    end
  end
  if not self.recorded and (watched or not (self.warm and rate ~= 0 and record(self, rate))) then
    local results = pack(core.step(self.f, rate))
    self.warm = true
    return unpack(results, 1, results.n)
  end
  self.recorded:launch(rate or 1, steps or 0, self.draws)
  return unpack(self.results, 2, self.results.n)
end

--- Frees the recording and its memory; the next replay runs the function again.
function Recording:release()
  if self.recorded then self.recorded:release() end
  self.recorded, self.results, self.draws, self.counts, self.warm = nil, nil, nil, nil, false
end

arguments.guard_class("step", Recording)

return graph
