--- nonfinite.lua: finds the op that makes the first NaN or Inf. While vx.debug_nonfinite is on, the results of every op
-- and the gradients of every backward are looked at; where one is not finite though what the op was given is, an error
-- names the op, its inputs and the step. Every look waits for the device.

local core = require "vertex.core"
local ops = require "vertex.ops"
local tape = require "vertex.tape"

local is_tensor = core.is_tensor

local nonfinite = {}

local inspector = {}
local backwards = 0 -- since it was switched on

--- Runs a function with nothing inspected and nothing recorded.
local function quietly(f, ...)
  local before = tape.inspector
  tape.inspector = nil
  local function done(ok, ...)
    tape.inspector = before
    if not ok then error((...), 0) end
    return ...
  end
  return done(pcall(tape.no_grad, core.step, f, ...))
end

--- Counts the elements of a tensor that are NaN or Inf; gives the place of the first, 0-based, row by row.
local function count(x)
  if not is_tensor(x) or core.is_released(x) or x:numel() == 0 then return 0 end
  if x:dtype() == "bf16" then x = x:to "f32" end
  if x:dtype() ~= "f32" then return 0 end
  return ops.nonfinite(ops.reshape(x, { -1, 1 }))
end

--- Writes what a tensor holds: "x f32 (2,3) from -1 to 2".
local function described(name, x)
  local f = x:to "f32"
  return ("%s %s %s from %.4g to %.4g"):format(name, x:dtype(), core.shape_text(x), ops.min(f):item(),
    ops.max(f):item())
end

--- Writes the inputs of an op; nil where one of them is not finite already.
local function inputs_text(entry, inputs)
  local texts = {}
  for i = 1, inputs.n do
    local x, name = inputs[i], entry.args and entry.args[i] and entry.args[i][1] or "input " .. i
    if type(x) == "number" and x - x ~= 0 then return nil end
    if is_tensor(x) and not core.is_released(x) then
      if count(x) > 0 then return nil end
      if x:numel() > 0 then texts[#texts + 1] = described(name, x) end
    elseif type(x) == "number" then
      texts[#texts + 1] = ("%s %g"):format(name, x)
    end
  end
  return #texts > 0 and table.concat(texts, ", ") or "nothing"
end

local function tell(entry, what, x, bad, at, inputs)
  core.fail("%s: %s %s has %d elements that are not finite, the first at %d (0-based, row by row), from inputs that "
    .. "are: %s. After %d backward passes since vx.debug_nonfinite", entry.name, what, core.shape_text(x), bad, at,
    inputs, backwards)
end

--- Calls an op and looks at its results.
function inspector.op(entry, call, ...)
  local inputs = { n = select("#", ...), ... }
  local function look(...)
    for i = 1, select("#", ...) do
      local x = (select(i, ...))
      quietly(function()
        local bad, at = count(x)
        local text = bad > 0 and inputs_text(entry, inputs)
        if text then tell(entry, "its result", x, bad, at, text) end
      end)
    end
    return ...
  end
  return look(call(...))
end

--- Looks at the gradients that an op's backward gave.
function inspector.gradients(node, ...)
  for i = 1, node.inputs.n do
    local g = (select(i, ...))
    quietly(function()
      local bad, at = count(g)
      if bad == 0 then return end
      for _, dy in pairs(node.gradients) do
        if count(dy) > 0 then return end -- it came from above
      end
      local text = inputs_text(node.op, node.inputs)
      if text then
        local name = node.op.args and node.op.args[i] and node.op.args[i][1] or "input " .. i
        tell(node.op, "the gradient of " .. name, g, bad, at, text)
      end
    end)
  end
  return ...
end

--- Looks at every op's results and at every gradient for NaN and Inf, and raises an error that names the op, its inputs
-- and the number of backward passes where the first appears. It makes training several times slower: for the steps
-- before something goes wrong, which a checkpoint or a seed brings back.
-- @param[opt=true] on boolean; false: no more
-- @raise later, at the line that called the op or backward
function nonfinite.debug_nonfinite(on)
  backwards = 0
  tape.inspector = on ~= false and inspector or nil
end

--- Counts a backward pass.
function inspector.backward() backwards = backwards + 1 end

return nonfinite
