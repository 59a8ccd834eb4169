--- runs/alarms: says, once and at the step that has it, that a method goes wrong: a codebook that collapses, a value
-- that is no number, a parameter without a gradient, a learning rate that stands still. What it says is a line of
-- metrics.jsonl with `event` and `text`.

local core = require "vertex.core"

local Alarms = {}
Alarms.__index = Alarms

local COLLAPSED = 0.1 -- of the codes in use since the last log line
local FALL = 0.25     -- of the largest share seen before
local SILENT = 100    -- steps

--- Makes what watches a method's training. Its state belongs into the checkpoint (`sums` of run:begin), so that a
-- stopped run says no more and no less than one that was not.
-- @param[opt] parameters array of {name, tensor}, as module:named_parameters() gives them
-- @return alarms with :see(entry), :state(), :restore(tensors, plain)
local function alarms(parameters)
  return setmetatable({ parameters = parameters or {}, said = {}, alive = {}, rates = {}, best = 0 }, Alarms)
end

local function is_finite(x) return x == x and x ~= math.huge and x ~= -math.huge end

--- Whether a parameter's gradient has a number other than 0.
local function has_gradient(p)
  local g = p.grad
  if not g then return false end
  return core.step(function() return g:abs():max():item() ~= 0 end)
end

--- Looks at a log entry, and at the gradients as they are.
-- @param entry of metrics.jsonl: step, and what is there of loss, code_use, perplexity, lr
-- @return array of {event =, text =}: what is to be said now
-- @raise nothing
function Alarms:see(entry)
  local found, step = {}, entry.step
  local function say(event, text, ...)
    if self.said[event] then return end
    self.said[event] = step
    found[#found + 1] = { event = event, text = text:format(...) }
  end
  if entry.loss and not is_finite(entry.loss) then
    say("not finite", "the loss is %s; vx.debug_nonfinite names the op that made it", entry.loss)
  end
  local use = entry.code_use
  if use and (use < COLLAPSED and use < FALL * self.best or entry.perplexity and entry.perplexity < 1.5) then
    say("collapse", "%.1f%% of the codes are in use%s: the codebook has collapsed", 100 * use,
      self.best > use and (", %.1f%% were before"):format(100 * self.best) or "")
  end
  if use then self.best = math.max(self.best, use) end
  for _, named in ipairs(self.parameters) do
    local name, p = named[1], named[2]
    self.alive[name] = self.alive[name] or 0
    if not self.said["no gradient: " .. name] then
      if has_gradient(p) then
        self.alive[name] = step
      elseif step - self.alive[name] >= SILENT then
        say("no gradient: " .. name, "parameter %s has had no gradient since step %d", name, self.alive[name])
      end
    end
  end
  if entry.lr then
    if entry.lr ~= self.rates.value then self.rates = { value = entry.lr, step = step } end
    if step - self.rates.step >= SILENT and self.rates.value > 0 then
      say("schedule", "the learning rate has been %g since step %d: its schedule does not move", entry.lr,
        self.rates.step)
    end
  end
  return found
end

--- Gives what it remembers, for a checkpoint.
-- @return empty table; and a table of plain values
function Alarms:state() return {}, { said = self.said, alive = self.alive, best = self.best, rates = self.rates } end

--- Goes on from what :state gave; of several ranks', one after the other, from what all of them know.
-- @param _ of tensors there are none
-- @param plain table
function Alarms:restore(_, plain)
  for event, step in pairs(plain.said) do self.said[event] = step end
  for name, step in pairs(plain.alive) do self.alive[name] = math.max(step, self.alive[name] or 0) end
  self.best = math.max(self.best, plain.best)
  if plain.rates.value then self.rates = plain.rates end
end

return alarms
