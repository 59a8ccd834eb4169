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

return { dtypes = dtypes, dtype_names = by_number, known_dtypes = known }
