--- core/dtype.lua: the dtypes of tensors, as C lists them (core/dtypes.def): number in C, bytes of an element, the C
-- type that holds one, and the stored dtype that holds it as it is.

local ffi = require "ffi"
local C = require("vertex.core.library").C

local dtypes, by_number, names = {}, {}, {} -- name → { number, bytes, array, stored }; number in C → name

for line in ffi.string(C.vx_dtypes()):gmatch "[^\n]+" do
  local name, number, ctype, bytes, stored = line:match "^(.-)\t(%d+)\t(.-)\t(%d+)\t(.*)$"
  dtypes[name] = { number = tonumber(number), bytes = tonumber(bytes), array = ffi.typeof(ctype .. "[?]"),
    stored = stored }
  by_number[tonumber(number)] = name
  names[#names + 1] = name
end

--- Says in words which dtypes there are, for error texts.
-- @return "f32, bf16, i32 or u8"
local function known() return table.concat(names, ", ", 1, #names - 1) .. " or " .. names[#names] end

-- What a dtype holds: whole numbers of low .. high; or those that round to a finite float, below 2^128 by half of the
-- last place, and NaN and the infinities.
local RANGES = { i32 = { low = -2 ^ 31, high = 2 ^ 31 - 1 }, u8 = { low = 0, high = 255 },
  f32 = { below = 2 ^ 128 * (1 - 2 ^ -25) }, bf16 = { below = 2 ^ 128 * (1 - 2 ^ -9) } }

--- Says whether a dtype holds a number, but for rounding.
local function fits(name, value)
  local range = RANGES[name]
  if range.low then return value >= range.low and value <= range.high and value == math.floor(value) end
  return value ~= value or math.abs(value) < range.below or math.abs(value) == math.huge
end

-- The greatest number that a float rounds to 0: half of the least that it holds.
local ROUNDS_TO_ZERO = 2 ^ -150

--- Says whether f32 computes with a number as it is, but for rounding: a finite one neither overflows nor becomes 0.
local function fits_f32(value)
  return fits("f32", value) and (value == 0 or value ~= value or math.abs(value) > ROUNDS_TO_ZERO)
end

--- Says in words what a dtype holds, for error texts.
local function range_text(name)
  local range = RANGES[name]
  if range.low then
    return ("whole numbers of %.0f .. %.0f; x:to(%q) rounds, and takes the nearest"):format(range.low, range.high, name)
  end
  return ("numbers below %.4g"):format(range.below)
end

return { fits = fits, fits_f32 = fits_f32, range_text = range_text, dtypes = dtypes, dtype_names = by_number,
  f32_most = 2 ^ 128 - 2 ^ 104, -- the greatest finite number of f32
  known_dtypes = known }
