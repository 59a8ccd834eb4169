--- simplex/points.lua: checks what the functions of vx.simplex are given, points and concentrations, and turns points
-- into probabilities or logarithms, whichever a formula needs.

local core = require "vertex.core"
local ops = require "vertex.ops"
local tape = require "vertex.tape"
local fail, shape_text = core.fail, core.shape_text

local points = {}

-- The smallest normal float: a probability below it counts as this much under a logarithm.
points.LEAST = 2 ^ -126

-- How far a row's sum may be from 1, and its entries below 0: finite differences and sums of thousands of float32 miss
-- by less, logits given by mistake by far more.
local SLACK = 1e-2

-- Raises where a row of p holds a NaN, has a negative entry or does not sum to 1.
local function check_rows(who, p, log, name)
  local x = log and ops.exp(p) or p
  local bad, first = ops.nonfinite(x)
  if bad > 0 then fail("%s: %d rows of %s hold a NaN or Inf, the first is row %d", who, bad, name, first) end
  local sums = ops.sum(x, 2)
  local low, high, least = ops.min(sums):item(), ops.max(sums):item(), ops.min(x):item()
  if least >= -SLACK and low >= 1 - SLACK and high <= 1 + SLACK then return end
  fail("%s: %s %s does not hold points of the simplex%s: its rows sum to %.4g ... %.4g, its least entry is %.4g", who,
    name, shape_text(p), log and " by their logarithms" or "", low, high, least)
end

--- Checks that p holds points of the simplex. While vx.graph records, only the shape is checked: looking at numbers
-- would wait for the device.
-- @param who name of the asking function, for the message
-- @param p tensor f32 (N,M), N >= 1, M >= 2
-- @param log true where p holds natural logarithms
-- @param[opt="p"] name what the message calls p
-- @return p
-- @raise where p is no such tensor, or a row is no point of the simplex
function points.check(who, p, log, name)
  name = name or "p"
  if not core.is_tensor(p) then fail("%s: %s is a %s, expected a tensor (N,M)", who, name, type(p)) end
  if p:dtype() ~= "f32" or p:dim() ~= 2 or p:size(1) < 1 or p:size(2) < 2 then
    fail("%s: %s is %s %s, expected f32 (N,M), N at least 1 and M at least 2", who, name, p:dtype(), shape_text(p))
  end
  if not core.is_recording() then core.step(tape.no_grad, check_rows, who, p, log, name) end
  return p
end

--- Gives points as probabilities.
-- @param p tensor (N,M), of probabilities or of their logarithms
-- @param log true where p holds logarithms
-- @return tensor (N,M)
function points.probabilities(p, log) return log and ops.exp(p) or p end

--- Gives points as natural logarithms; a probability below 2^-126 counts as that.
-- @param p tensor (N,M), of probabilities or of their logarithms
-- @param log true where p holds logarithms
-- @return tensor (N,M)
function points.logarithms(p, log) return log and p or ops.log(ops.clamp(p, points.LEAST, 1)) end

--- Gives concentrations as an array of numbers.
-- @param who name of the asking function, for the message
-- @param name what the message calls alpha
-- @param alpha one number for all coordinates, array of M numbers or tensor (M)
-- @param[opt] dim M; needed where alpha is one number
-- @return array of M numbers
-- @raise where there are fewer than 2, not `dim` of them, or one is not positive and finite
function points.concentrations(who, name, alpha, dim)
  local list
  if type(alpha) == "number" then
    list = {}
    for i = 1, dim or 0 do list[i] = alpha end
  elseif core.is_tensor(alpha) then
    if alpha:dim() ~= 1 then fail("%s: %s %s, expected a tensor (M)", who, name, shape_text(alpha)) end
    list = alpha:totable()
  elseif type(alpha) == "table" then
    list = alpha
  else
    fail("%s: %s is a %s, expected a number, an array of M numbers or a tensor (M)", who, name, type(alpha))
  end
  if #list < 2 then fail("%s: %s has %d concentrations, expected at least 2", who, name, #list) end
  if dim and #list ~= dim then fail("%s: %s has %d concentrations, expected %d", who, name, #list, dim) end
  for i, v in ipairs(list) do
    if type(v) ~= "number" or not (v > 0 and v < math.huge) then
      fail("%s: concentration %d of %s is %s, expected a positive finite number", who, i - 1, name, tostring(v))
    end
  end
  return list
end

return points
