--- npy.lua: one array in a file, as NumPy writes it: the magic "\147NUMPY", a version (1.0, 2.0 or 3.0), the length of
-- a header, the header, a Python dictionary {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }, then the
-- elements.
-- [1] NumPy Enhancement Proposal 1, "A Simple File Format for NumPy Arrays"; https://numpy.org/neps/nep-0001-npy-format

local core = require "vertex.core"

local npy = {}
local fail = core.fail

local MAGIC = "\147NUMPY"
local MAX_HEADER = 1e6 -- bytes; NumPy itself refuses more than 10,000 unless told to trust the file

--- NumPy's kind and bytes → the dtype's name in vx_stored_dtypes().
local STORED = { f2 = "F16", f4 = "F32", f8 = "F64", i1 = "I8", i2 = "I16", i4 = "I32", i8 = "I64", u1 = "U8",
  u2 = "U16",
  u4 = "U32", b1 = "BOOL" }
--- The same by the long names that NumPy's writers never use and its readers take.
local LONG = { float16 = "f2", float32 = "f4", float64 = "f8", int8 = "i1", int16 = "i2", int32 = "i4", int64 = "i8",
  uint8 = "u1", uint16 = "u2", uint32 = "u4", bool = "b1" }
local WRITTEN = { f32 = "<f4", bf16 = "<f4", i32 = "<i4", u8 = "|u1" }

-- -- The header: a dictionary of Python literals ----------------------------------------------------------------------

--- Reads one literal of `text` from `at` on: a quoted text, True, False, a whole number, a tuple of numbers, or a list
-- (of a structured dtype), which is kept as text.
-- @return value and the place behind it; nil where there is none
local function literal(text, at)
  local quote = text:match("^['\"]", at)
  if quote then
    local body, stop = text:match("^([^" .. quote .. "\\\n]*)" .. quote .. "()", at + 1)
    return body, stop
  end
  local word, stop = text:match("^(%a+)()", at)
  if word == "True" then return true, stop end
  if word == "False" then return false, stop end
  local digits, after = text:match("^(%d+)[lL]?()", at)
  if digits then return tonumber(digits), after end
  local list = text:match("^%b[]", at)
  if list then return { text = list }, at + #list end
  local tuple = text:match("^%b()", at)
  if not tuple then return nil end
  local sizes = {}
  local inside = tuple:sub(2, -2):gsub("%s+", "")
  if inside ~= "" and not (inside:find "^%d+[lL]?," or inside:find "^%d+[lL]?$") then return nil end
  for part in (inside:gsub(",$", "") .. (inside == "" and "" or ",")):gmatch "(.-)," do
    local size = part:match "^(%d+)[lL]?$"
    if not size then return nil end
    sizes[#sizes + 1] = tonumber(size)
  end
  if #sizes == 1 and not inside:find "," then return sizes[1], at + #tuple end -- (3) is a number in Python
  return sizes, at + #tuple
end

--- The dictionary's entries; nil and what is wrong where the text is none.
local function dictionary(text)
  local at, entries = text:match "^%s*{%s*()", {}
  if not at then return nil, "it does not begin with {" end
  while not text:match("^}", at) do
    local key, value
    key, at = literal(text, at)
    if type(key) ~= "string" then return nil, "a key is no text" end
    at = text:match("^%s*:%s*()", at)
    if not at then return nil, ("no value follows '%s'"):format(key) end
    value, at = literal(text, at)
    if value == nil then return nil, ("the value of '%s' is none that NumPy writes"):format(key) end
    if entries[key] ~= nil then return nil, ("'%s' is there twice"):format(key) end
    entries[key] = value
    local comma = text:match("^%s*,%s*()", at)
    at = comma or text:match("^%s*()", at)
    if not comma and not text:match("^}", at) then return nil, "a comma is missing" end
  end
  if not text:match("^}%s*$", at) then return nil, "something follows its }" end
  return entries
end

--- The stored dtype of a NumPy type text, ">F4" style for big-endian ones; an error that says what it is instead.
local function stored_dtype(path, descr)
  if type(descr) == "table" then
    fail("load %s: the array is structured %s; save its columns one by one", path, descr.text)
  end
  local order, kind = descr:match "^([<>=|]?)(%a%d+)$"
  kind = LONG[descr] or kind
  if kind and STORED[kind] then return (order == ">" and tonumber(kind:sub(2)) > 1 and ">" or "") .. STORED[kind] end
  local what = descr:find "^[<>=|]?[US]" and "holds texts" or descr:find "^[<>=|]?O" and "holds Python objects"
    or descr:find "^[<>=|]?V2$" and "holds raw 2-byte values (bfloat16?): save it as float32"
    or descr:find "^[<>=|]?c" and "holds complex numbers" or descr:find "^[<>=|]?[mM]" and "holds dates or times"
    or ("has the dtype '%s'"):format(descr)
  fail("load %s: the array %s; read are float16 float32 float64, int8 to int64, uint8 to uint32 and bool", path, what)
end

--- Reads and checks the header of an open file.
-- @param file a core.reader of a .npy file
-- @return {shape, dtype (of vx_stored_dtypes(), '>' in front where big-endian), fortran (column-major), offset (bytes
-- before the first element)}
-- @raise where the file is no .npy file, holds no numbers, or is shorter than its header says
function npy.header(file)
  local path, size = file.path, file:size()
  local function bad(text, ...) fail("load %s: not a .npy file (%s)", path, text:format(...)) end
  local start = file:bytes(0, 8)
  if #start < 8 or start:sub(1, 6) ~= MAGIC then bad("it does not begin as one") end
  local major, minor = start:byte(7, 8)
  if major < 1 or major > 3 or minor ~= 0 then bad("its version is %d.%d, known are 1.0, 2.0 and 3.0", major, minor) end
  local width = major == 1 and 2 or 4
  local digits, length = file:bytes(8, width), 0
  for i = #digits, 1, -1 do length = length * 256 + digits:byte(i) end
  local offset = 8 + width + length
  if #digits < width or offset > size then bad("it ends within its header") end
  if length > MAX_HEADER then bad("its header claims %.0f bytes", length) end
  local entries, problem = dictionary(file:bytes(8 + width, length))
  if not entries then bad("in its header, %s", problem) end
  local descr, fortran, shape = entries.descr, entries.fortran_order, entries.shape
  if type(descr) ~= "string" and type(descr) ~= "table" then bad "its header names no descr" end
  if type(fortran) ~= "boolean" then bad "its header does not say fortran_order" end
  if type(shape) ~= "table" or shape.text then bad "its header has no shape" end
  if #shape > 8 then fail("load %s: the array has %d dimensions, a tensor at most 8", path, #shape) end
  local format, count = stored_dtype(path, descr), 1
  for i = 1, #shape do count = count * shape[i] end
  local bytes = count * core.stored_dtype(format).bytes
  if offset + bytes > size then
    fail("load %s: the array %s of %s needs %.0f bytes, the file has %.0f after its header", path,
      core.shape_text(shape), descr, bytes, size - offset)
  end
  return { shape = shape, dtype = format, fortran = fortran, offset = offset }
end

--- Loads the array of an open file: floats as f32, integers as i32, uint8 and bool as u8. Column-major ("Fortran")
-- arrays come in the order of their indices too.
-- @param file a core.reader of a .npy file
-- @param[opt] options {device = the default one}
-- @return tensor of the array's shape
-- @raise as npy.header says
function npy.read(file, options)
  local h = npy.header(file)
  local shape, n = {}, #h.shape
  for i = 1, n do shape[i] = h.shape[h.fortran and n + 1 - i or i] end
  local dtype = core.stored_dtype(h.dtype).dtype
  local x = core.new(shape, { dtype = dtype, device = options and options.device })
  file:tensor(x, h.offset, h.dtype)
  if not h.fortran or n < 2 then return x end
  local stride, own = {}, x:strides()
  for i = 1, n do stride[i] = own[n + 1 - i] end
  local y = core.new(h.shape, { dtype = dtype, device = options and options.device })
  y:copy(core.view(x, h.shape, stride, 0))
  x:release()
  return y
end

--- The same of a path.
function npy.load(path, options) return core.reading(path, npy.read, options) end

--- Writes one tensor as a .npy file, version 1.0, row-major, little-endian; bf16 becomes float32. The file appears
-- whole or not at all.
-- @param path of the file
-- @param x tensor of any shape
-- @param[opt] options {dtype = "u16": integers as uint16 where they all fit, which halves a file of codes}
-- @raise where x is no tensor, an integer does not fit into uint16, or the file cannot be written
function npy.save(path, x, options)
  if not core.is_tensor(x) then fail("save %s: a %s, expected a tensor", tostring(path), type(x)) end
  local narrow = options and options.dtype
  if narrow ~= nil and narrow ~= "u16" then
    fail("save %s: dtype '%s', expected \"u16\" or none", path, tostring(narrow))
  end
  local descr = narrow and "<u2" or WRITTEN[x:dtype()]
  if x:dtype() == "bf16" then x = x:to "f32" end
  local shape = x:shape()
  local header = ("{'descr': '%s', 'fortran_order': False, 'shape': (%s), }"):format(descr,
    table.concat(shape, ", ") .. (#shape == 1 and "," or ""))
  header = header .. (" "):rep(-(10 + #header + 1) % 64) .. "\n"
  core.write_whole(path, function(w)
    w:bytes(MAGIC .. "\1\0" .. string.char(#header % 256, math.floor(#header / 256)) .. header)
    w:tensor(x, narrow)
  end)
end

--- Is an open file a .npy file, by its first bytes?
-- @param file a core.reader
-- @return true or false
function npy.is(file) return file:bytes(0, 6) == MAGIC end

return npy
