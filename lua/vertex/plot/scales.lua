--- plot/scales.lua: the range of an axis, its map from data to the page, its ticks and how their numbers are written;
-- linear and logarithmic. A scale is { lo =, hi =, log =, labels = }; hi may lie below lo. Nothing here draws.

local floor, ceil, abs, min, max, huge = math.floor, math.ceil, math.abs, math.min, math.max, math.huge
local log10 = math.log10
local nan = 0 / 0

local check = require "vertex.check"
local fail = require("vertex.core").fail

local scales = {}

--- Says whether a number is neither NaN nor infinite.
function scales.finite(v) return v - v == 0 end
local finite = scales.finite

--- The largest number that a figure shows, and the least that is not 0 to it: beyond, differences and quotients of two
-- are no numbers any more.
scales.LARGEST, scales.LEAST = 1e300, 1e-300

-- The largest number on an axis: with air beside the data.
local MOST = 1e4 * scales.LARGEST

-- -- Ranges -----------------------------------------------------------------------------------------------------------

--- Says whether two ends are far enough apart for a scale between them; on a logarithmic one their logarithms.
function scales.apart(a, b, log)
  if log then return abs(log10(a) - log10(b)) > 1e-10 end
  return abs(a - b) > scales.LEAST
end

-- Widens lo..hi by the finite values; only positive ones count where `positive` is set.
local function widen(lo, hi, values, positive)
  for _, v in ipairs(values) do
    if finite(v) and (v > scales.LEAST or not positive) then lo, hi = min(lo, v), max(hi, v) end
  end
  return lo, hi
end

-- Gives a range whose ends differ: an empty one becomes 0..1 (1..10 where log is set), a single value gets room on both
-- sides.
local function open_range(lo, hi, log)
  if lo > hi then return log and 1 or 0, log and 10 or 1 end
  if log then
    if scales.apart(lo, hi, true) then return lo, hi end
    return max(lo * 0.9, scales.LEAST), hi * 1.1
  end
  if hi - lo > max(1e-12 * max(abs(lo), abs(hi)), scales.LEAST) then return lo, hi end
  local room = abs(lo) <= 1e3 * scales.LEAST and 1 or abs(lo) * 0.1
  return lo - room, hi + room
end

--- Gives the least and greatest of the finite values of some arrays, never the same; of the positive ones where `log`
-- is set.
function scales.range(arrays, log)
  local lo, hi = huge, -huge
  for _, values in ipairs(arrays) do lo, hi = widen(lo, hi, values, log) end
  return open_range(lo, hi, log)
end

--- Gives the "x" or "y" scale of axes, from the limits that were set or from the data with a little air. Reversed ends
-- are kept.
function scales.of_axes(ax, name)
  local o, lo, hi, air, zero = ax.options, huge, -huge, false, false
  local log, limits = o[name .. "log"], o[name .. "lim"] or {}
  for _, layer in ipairs(ax.layers) do
    for _, values in ipairs(layer[name]) do lo, hi = widen(lo, hi, values, log) end
    air = air or not layer.tight
    zero = zero or name == "y" and layer.kind == "bars"
  end
  if zero and not log then lo, hi = min(lo, 0), max(hi, 0) end
  lo, hi = open_range(lo, hi, log)
  if air then
    local pad = (log and log10(hi / lo) or hi - lo) * 0.035
    local from, to = lo, hi
    lo, hi = log and max(lo / 10 ^ pad, scales.LEAST) or lo - pad, log and min(hi * 10 ^ pad, MOST) or hi + pad
    if zero and from == 0 then lo = 0 end
    if zero and to == 0 then hi = 0 end
  end
  if ax.reversed and name == "y" then lo, hi = hi, lo end
  lo, hi = limits[1] or lo, limits[2] or hi
  if not scales.apart(lo, hi, log) then          -- the one that was set lies on the end of the data
    local low, high = open_range(lo, hi, log)
    lo, hi = limits[1] or low, limits[2] or high
  end
  return { lo = lo, hi = hi, log = log, labels = ax[name .. "labels"] }
end

--- Gives the function from data to the page, where the scale lies on from..to; NaN for what has no place. Places far
-- outside are cut to what cairo's fixed point holds.
function scales.mapper(scale, from, to)
  local lo, hi = scale.lo, scale.hi
  if scale.log then lo, hi = log10(lo), log10(hi) end
  return function(v)
    if scale.log then v = v > 0 and log10(v) or nan end
    local p = from + (v - lo) / (hi - lo) * (to - from)
    return finite(p) and min(max(p, -1e5), 1e5) or nan
  end
end

-- -- Numbers ----------------------------------------------------------------------------------------------------------

-- Computes 10^e exactly, which the operator need not.
local function power10(e) return tonumber("1e" .. e) end
-- Gives the decimal exponent of a number.
local function exponent(v) return floor(log10(abs(v)) + 1e-9) end

-- Writes a number with so many decimals: at most 99, as string.format does.
local function fixed(v, digits) return ("%%.%df"):format(min(max(0, digits), 99)):format(v) end

-- Drops the zeros that end a decimal fraction.
local function trim(text)
  if not text:find ".%..*" then return text end
  return (text:gsub("0+$", ""):gsub("%.$", ""))
end

--- Writes a number as an axis does: 0, 0.05, 1200, 16k, 2.5M, 1e-4.
-- @param v number
-- @param[opt] step number, the distance to the next tick, which fixes the decimals; without it four digits are kept,
-- zeros dropped
-- @param[opt=|v|] magnitude number, the largest |tick| of the axis, so that all its ticks share one unit
-- @return string
-- @raise where step or magnitude is no positive number
function scales.format_number(v, step, magnitude)
  if step then check.positive("format_number", "step", step) end
  if magnitude then check.positive("format_number", "magnitude", magnitude) end
  if v == 0 then return "0" end
  if not finite(v) then return tostring(v) end
  magnitude = magnitude or abs(v)
  if magnitude < 1e-3 * (1 - 1e-9) or magnitude >= 1e12 then
    local e = exponent(v)
    local mantissa = e < -300 and v * 1e300 / power10(e + 300) or v / power10(e)
    return trim(fixed(mantissa, step and e - exponent(step) or 3)) .. "e" .. e
  end
  local unit, suffix = 1, ""
  for _, u in ipairs { { 1e9, "G" }, { 1e6, "M" }, { 1e3, "k" } } do
    if magnitude >= max(u[1], 1e4) and (step or u[1]) >= u[1] / 100 then unit, suffix = u[1], u[2] break end
  end
  if step then return fixed(v / unit, -exponent(step / unit)) .. suffix end
  return trim(fixed(v / unit, 3 - exponent(v / unit))) .. suffix
end

-- -- Ticks ------------------------------------------------------------------------------------------------------------

-- Checks the ends of an axis and the number of ticks wanted.
local function expect_ends(who, lo, hi, count, log)
  for name, v in pairs { lo = lo, hi = hi } do
    check.number(who, name, v, -MOST, MOST)
  end
  if log and lo < scales.LEAST then
    fail("%s: lo is %g, expected a number above 0 that a figure shows", who, lo)
  end
  if lo >= hi or not scales.apart(lo, hi, log) then fail("%s: from %g to %g, expected hi above lo", who, lo, hi) end
  check.integer(who, "count", count, 1, 10000)
end

-- Gives the ticks of a linear axis, and their step, as scales.ticks says.
local function linear_ticks(lo, hi, count)
  local raw = (hi - lo) / max(count - 1, 1)
  local e, mantissa = exponent(raw), 10
  for _, m in ipairs { 5, 2, 1 } do
    if m * power10(e) >= raw * (1 - 1e-9) then mantissa = m end
  end
  local step, out = mantissa * power10(e), {}
  local first = ceil(lo / step - 1e-9)
  for i = 0, min(floor(hi / step + 1e-9) - first, count) do
    local k = first + i
    -- dividing gives 0.3, multiplying 0.30000000000000004
    out[i + 1] = e < 0 and e > -300 and k * mantissa / power10(-e) or k * step
  end
  return out, step
end

--- Gives round values for a linear axis: steps of 1, 2 or 5 times a power of ten.
-- @param lo number, the lower end
-- @param hi number, the upper end, above lo
-- @param count integer of 1 or more, the most ticks wanted
-- @return array of values within lo..hi, ascending
-- @return the step
-- @raise where the ends are no numbers that a figure shows, hi is not above lo, or count is none
function scales.ticks(lo, hi, count)
  expect_ends("ticks", lo, hi, count)
  return linear_ticks(lo, hi, count)
end

-- Gives the values m * 10^e within lo..hi, for the mantissas m and every exponent e that is a multiple of `stride`;
-- ascending.
local function decades(lo, hi, mantissas, stride)
  local out = {}
  for e = floor(log10(lo)), ceil(log10(hi)) do
    for _, m in ipairs(e % stride == 0 and mantissas or {}) do
      local v = m * power10(e)
      if v >= lo * (1 - 1e-9) and v <= hi * (1 + 1e-9) then out[#out + 1] = v end
    end
  end
  return out
end

--- Gives round values for a logarithmic axis: 1, 2, 5 of each decade where they fit, else decades, else every n-th
-- decade; linear ticks where the range holds fewer than two of those.
-- @param lo number, the lower end, above 0
-- @param hi number, the upper end, above lo
-- @param count integer of 1 or more, the most ticks wanted
-- @return array of values within lo..hi, ascending
-- @return the step where the ticks are linear, else nil
-- @raise as ticks, and where lo is not above 0
function scales.log_ticks(lo, hi, count)
  expect_ends("log_ticks", lo, hi, count, true)
  local out = decades(lo, hi, { 1, 2, 5 }, 1)
  if #out >= 2 and #out <= count then return out end
  if #out >= 2 then out = decades(lo, hi, { 1 }, 1) end
  if #out < 2 then return linear_ticks(lo, hi, count) end
  local stride = max(1, floor(#out / max(count, 2)))
  while #out > max(count, 2) do
    out = decades(lo, hi, { 1 }, stride)
    stride = stride + 1
  end
  return out
end

--- Gives the ticks of a scale as { value =, label = }, at most `count` of them.
function scales.number_ticks(scale, count)
  local out, lo, hi = {}, min(scale.lo, scale.hi), max(scale.lo, scale.hi)
  local values, step = (scale.log and scales.log_ticks or scales.ticks)(lo, hi, count)
  local magnitude = step and max(abs(lo), abs(hi))
  for i, v in ipairs(values) do
    out[i] = { value = v, label = (scales.format_number(v, step, magnitude):gsub("-", "−")) }
  end
  return out
end

--- Gives every n-th of a scale's own labels, which stand at the whole numbers, as { value =, label = }.
function scales.label_ticks(scale, n)
  local out = {}
  for i = 1, #scale.labels, n do out[#out + 1] = { value = i, label = scale.labels[i] } end
  return out
end

--- Gives the places of small marks: 2..9 of each decade, on a log scale of few enough decades to keep them apart.
function scales.minor_ticks(scale)
  local lo, hi = min(scale.lo, scale.hi), max(scale.lo, scale.hi)
  if not scale.log or ceil(log10(hi)) - floor(log10(lo)) > 8 then return {} end
  return decades(lo, hi, { 2, 3, 4, 5, 6, 7, 8, 9 }, 1)
end

return scales
