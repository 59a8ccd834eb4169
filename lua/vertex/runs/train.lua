--- train.lua: the pieces around a training loop, which itself stays in the experiment: checkpoints, meters, a log,
-- progress on the terminal.

local cjson = require "cjson.safe"
local core = require "vertex.core"
local display = require "vertex.interactive.display"
local safetensors = require "vertex.safetensors"

local train = {}
local fail = core.fail

-- -- JSON, with numbers that survive ----------------------------------------------------------------------------------

local function number_text(v)
  if v ~= v or v == math.huge or v == -math.huge then return "null" end
  if v == math.floor(v) and math.abs(v) < 2 ^ 53 then return ("%.0f"):format(v) end
  return ("%.17g"):format(v)
end

--- JSON of nested tables with sorted keys; arrays are tables with [1] (an empty table is {}); numbers keep all digits,
-- NaN and infinities become null.
function train.json(value)
  local kind = type(value)
  if kind == "number" then return number_text(value) end
  if kind ~= "table" then return (cjson.encode(value):gsub("\\/", "/")) end
  local parts = {}
  if value[1] ~= nil then
    for i, v in ipairs(value) do parts[i] = train.json(v) end
    return "[" .. table.concat(parts, ",") .. "]"
  end
  local keys = {}
  for key in pairs(value) do keys[#keys + 1] = tostring(key) end
  table.sort(keys)
  for i, key in ipairs(keys) do parts[i] = cjson.encode(key) .. ":" .. train.json(value[key]) end
  return "{" .. table.concat(parts, ",") .. "}"
end

--- Lua value of a JSON text (null: nil); nil and a reason where it is none.
function train.parse_json(text)
  local value, reason = cjson.decode(text)
  if value == nil then return nil, reason end
  local function clean(v)
    if v == cjson.null then return nil end
    if type(v) == "table" then
      for key, inner in pairs(v) do v[key] = clean(inner) end
    end
    return v
  end
  return clean(value)
end

-- -- Checkpoints ------------------------------------------------------------------------------------------------------

--- What a run consists of: {model = module, optimizer = AdamW or nil, tensors = {name = tensor} or nil}. All of it, the
-- quantizers' and the default random generators, and `extra` (a plain table: step, sampler position, results) go into
-- one file, atomically.
function train.save_checkpoint(path, run, extra)
  local tensors, generators = {}, {}
  for name, x in pairs(run.model:state_dict()) do tensors["model." .. name] = x end
  run.model:visit(function(m, name)
    if m.generator then generators[name] = { seed = m.generator.seed, drawn = m.generator.drawn, steps = m.steps } end
  end)
  if run.optimizer then
    for name, x in pairs(run.optimizer:state_dict()) do tensors["optimizer." .. name] = x end
  end
  for name, x in pairs(run.tensors or {}) do tensors["run." .. name] = x end
  local default = core.default_generator
  safetensors.save(path, tensors, {
    vertex = "checkpoint", version = core.version,
      optimizer_steps = tostring(run.optimizer and run.optimizer.steps or 0),
    generators = train.json { modules = generators, default = { seed = default.seed, drawn = default.drawn } },
      extra = train.json(extra),
  })
end

--- The `extra` of a checkpoint without its tensors; nil where the file does not exist. Anything else that is no
-- checkpoint is an error.
function train.peek_checkpoint(path)
  if not core.file_size(path) then return nil end
  local metadata = safetensors.metadata(path)
  if metadata.vertex ~= "checkpoint" then fail("%s is no checkpoint of this project", path) end
  local extra, reason = train.parse_json(metadata.extra or "")
  if type(extra) ~= "table" then fail("%s: damaged checkpoint (%s)", path, tostring(reason)) end
  return extra
end

--- Restores everything train.save_checkpoint saved into the same kind of run; returns `extra`.
function train.load_checkpoint(path, run)
  local extra = train.peek_checkpoint(path)
  if not extra then fail("load %s: no such checkpoint", path) end
  local tensors, metadata = safetensors.load(path, { device = "cpu" })
  local model, moments = {}, run.optimizer and run.optimizer:state_dict() or {}
  for name, x in pairs(tensors) do
    local part, rest = name:match "^(%a+)%.(.+)$"
    if part == "model" then model[rest] = x end
    if part == "optimizer" and not moments[rest] then fail("%s: '%s' has no place in the optimizer", path, rest) end
  end
  for name, x in pairs(moments) do
    local stored = tensors["optimizer." .. name]
    if not stored or core.shape_text(stored) ~= core.shape_text(x) then
      fail("%s: '%s' of the optimizer is missing or of another shape", path, name)
    end
  end
  run.model:load_state_dict(model)
  for name, x in pairs(moments) do x:copy(tensors["optimizer." .. name]) end
  if run.optimizer then run.optimizer.steps = tonumber(metadata.optimizer_steps) end
  local generators = train.parse_json(metadata.generators or "") or fail("%s: damaged checkpoint (generators)", path)
  run.model:visit(function(m, name)
    local g = m.generator and generators.modules[name]
    if g then m.generator.seed, m.generator.drawn, m.steps = g.seed, g.drawn, g.steps end
  end)
  core.default_generator.seed, core.default_generator.drawn = generators.default.seed, generators.default.drawn
  for _, x in pairs(tensors) do x:release() end
  return extra
end

-- -- Meters -----------------------------------------------------------------------------------------------------------

local Meter = {}
Meter.__index = Meter

--- Means of named values between two :take()s.
function train.meter() return setmetatable({ sums = {}, counts = {} }, Meter) end

--- values: {name = number or tensor of one element}. Tensors are summed on their device, so that nothing waits for it
-- before :take(), and within a recorded graph (vx.graph), whose replays add as well.
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

--- Means so far, as numbers; forgets them.
function Meter:take()
  local means = {}
  for name, sum in pairs(self.sums) do
    if self.counts[name] > 0 then means[name] = (core.is_tensor(sum) and sum:item() or sum) / self.counts[name] end
    self.counts[name] = 0
    if core.is_tensor(sum) then sum:zero() else self.sums[name] = 0 end
  end
  return means
end

-- -- Progress ---------------------------------------------------------------------------------------------------------

--- Seconds as a short text for people.
local function duration(seconds)
  if seconds ~= seconds or seconds == math.huge then return "--:--" end
  seconds = math.floor(seconds + 0.5)
  if seconds >= 3600 then return ("%d:%02d:%02d"):format(seconds / 3600, seconds / 60 % 60, seconds % 60) end
  return ("%d:%02d"):format(seconds / 60, seconds % 60)
end
train.duration = duration

local Progress = {}
Progress.__index = Progress

local bars = 0 -- so far

--- A bar that updates in place on a terminal and in a notebook; elsewhere a plain line every `every` seconds (and the
-- last). options {total, done = 0, quiet, every = 10}.
function train.progress(label, options)
  bars = bars + 1
  local notebook = display.mode == "notebook"
  return setmetatable({ label = label, total = options.total, first = options.done or 0, quiet = options.quiet,
    notebook = notebook,
    tty = not notebook and core.is_tty(2), every = options.every or 10, started = core.time(), shown = -math.huge,
      id = "progress " .. bars }, Progress)
end

--- The bar as a line of at most `columns`.
function Progress:line(done, text, left, columns)
  local tail = (" %3.0f%%  %s  left %s"):format(100 * done / self.total, text, left)
  local room = math.max(0, math.min(30, columns - #self.label - #tail - 4))
  local full = math.floor(room * done / self.total)
  return ("%s %s%s%s"):format(self.label, ("━"):rep(full), ("╌"):rep(room - full), tail)
end

--- Shows `done` of the total and a text; rate-limited, so call it as often as you like.
function Progress:update(done, text)
  if self.quiet then return end
  local now, last = core.time(), done >= self.total
  if not last and now - self.shown < ((self.tty or self.notebook) and 0.1 or self.every) then return end
  self.shown = now
  local elapsed = now - self.started
  local left = duration(elapsed / math.max(1e-9, done - self.first) * (self.total - done))
  if self.notebook then
    display.show(self:line(done, text, left, 120), { id = self.id })
  elseif self.tty then
    io.stderr:write("\r\27[K" .. self:line(done, text, left, core.terminal_columns()))
    io.stderr:flush()
    self.drawn = true
  else
    io.stderr:write(("%s %d/%d  %s  left %s\n"):format(self.label, done, self.total, text, left))
  end
end

--- Leaves the line; `text` replaces the bar where given. A notebook keeps the bar where no text does.
function Progress:finish(text)
  if self.quiet then return end
  if self.notebook then
    if text then display.show(text, { id = self.id }) end
    return
  end
  if self.drawn then io.stderr:write("\r\27[K") end
  if text then io.stderr:write(text .. "\n") end
end

return train
