--- core/dtype.lua: the dtypes of tensors, each said once: its number in C, the bytes of an element, the C type that
-- holds one.

local ffi = require "ffi"
local C = require("vertex.core.library").C

local dtypes = {
  f32 = { number = C.VX_F32, bytes = 4, array = ffi.typeof "float[?]" },
  bf16 = { number = C.VX_BF16, bytes = 2, array = ffi.typeof "uint16_t[?]" },
  i32 = { number = C.VX_I32, bytes = 4, array = ffi.typeof "int32_t[?]" },
  u8 = { number = C.VX_U8, bytes = 1, array = ffi.typeof "uint8_t[?]" },
}

local by_number = {} -- number in C → name
for name, dtype in pairs(dtypes) do by_number[dtype.number] = name end

return { dtypes = dtypes, dtype_names = by_number }
