--- safetensors.lua: tensors in files, in the format of huggingface/safetensors: 8 bytes N (little-endian), N bytes of JSON header, then
-- the raw elements, little-endian and row-major. Written atomically, in the order of the reference writer (dtype by size, then name),
-- header padded to 8 bytes. Reading trusts nothing: offsets must cover the data without holes or overlap.

local cjson = require "cjson.safe"
local core = require "vertex.core"

local safetensors = {}
local fail = core.fail

local WRITTEN = { f32 = "F32", bf16 = "BF16", i32 = "I32", u8 = "U8" }
--- Stored dtype → {bytes of an element, dtype it is read as}.
local READ = { F32 = { 4, "f32" }, F64 = { 8, "f32" }, F16 = { 2, "f32" }, BF16 = { 2, "bf16" }, I64 = { 8, "i32" }, I32 = { 4, "i32" }, U8 = { 1, "u8" }, BOOL = { 1, "u8" } }
local RANK = { F32 = 1, I32 = 2, BF16 = 3, U8 = 4 }
local MAX_HEADER = 100e6

local function quote(s) return (cjson.encode(s):gsub("\\/", "/")) end

--- Saves {name = tensor} and optional {key = text} metadata. Strided views are written as their values.
function safetensors.save(path, tensors, metadata)
  local names = {}
  for name, x in pairs(tensors) do
    if type(name) ~= "string" then fail("save %s: a tensor is named by a %s, expected a text", path, type(name)) end
    if not core.is_tensor(x) then fail("save %s: '%s' is a %s, expected a tensor", path, name, type(x)) end
    core.handle(x)
    names[#names + 1] = name
  end
  table.sort(names, function(a, b)
    local ra, rb = RANK[WRITTEN[tensors[a]:dtype()]], RANK[WRITTEN[tensors[b]:dtype()]]
    if ra ~= rb then return ra < rb end
    return a < b
  end)
  local parts, offset = {}, 0
  if metadata and next(metadata) ~= nil then
    local keys, entries = {}, {}
    for key, text in pairs(metadata) do
      if type(key) ~= "string" or type(text) ~= "string" then fail("save %s: metadata must be texts under texts", path) end
      keys[#keys + 1] = key
    end
    table.sort(keys)
    for i, key in ipairs(keys) do entries[i] = quote(key) .. ":" .. quote(metadata[key]) end
    parts[1] = '"__metadata__":{' .. table.concat(entries, ",") .. "}"
  end
  for _, name in ipairs(names) do
    local stored = WRITTEN[tensors[name]:dtype()]
    local bytes = tensors[name]:numel() * READ[stored][1]
    parts[#parts + 1] = ('%s:{"dtype":"%s","shape":[%s],"data_offsets":[%.0f,%.0f]}'):format(quote(name), stored,
      table.concat(tensors[name]:shape(), ","), offset, offset + bytes)
    offset = offset + bytes
  end
  local header = "{" .. table.concat(parts, ",") .. "}"
  header = header .. (" "):rep(-#header % 8)
  local length = {}
  for i = 0, 7 do length[i + 1] = string.char(math.floor(#header / 256 ^ i) % 256) end
  local w = core.writer(path)
  local ok, message = pcall(function()
    w:bytes(table.concat(length) .. header)
    for _, name in ipairs(names) do w:tensor(tensors[name]) end
    w:commit()
  end)
  if not ok then
    if w.w then w:abort() end
    fail("%s", message)
  end
end

local function is_index(v) return type(v) == "number" and v >= 0 and v == math.floor(v) and v <= 2 ^ 53 end

--- Reads and checks a header: entries {name = {dtype, shape, begin, stop}}, metadata, and the byte where data starts.
local function read_header(path)
  local size = core.file_size(path)
  if not size then fail("load %s: no such file, or not readable", path) end
  local f, reason = io.open(path, "rb")
  if not f then fail("load %s: %s", path, reason) end
  local raw = f:read(8)
  local n = 0
  if raw and #raw == 8 then
    for i = 8, 1, -1 do n = n * 256 + raw:byte(i) end
  end
  if n < 2 or n > MAX_HEADER or n + 8 > size then
    f:close()
    fail("load %s: not a safetensors file (%d bytes, header length %.0f)", path, size, n)
  end
  local text = f:read(n)
  f:close()
  local header = text and #text == n and text:sub(1, 1) == "{" and cjson.decode(text)
  if type(header) ~= "table" then fail("load %s: not a safetensors file (its header is no JSON object)", path) end
  local metadata = header.__metadata__
  header.__metadata__ = nil
  if metadata ~= nil then
    if type(metadata) ~= "table" then fail("load %s: __metadata__ is not an object", path) end
    for key, value in pairs(metadata) do
      if type(key) ~= "string" or type(value) ~= "string" then fail("load %s: __metadata__ holds something that is no text", path) end
    end
  end
  local spans, bytes = {}, size - 8 - n
  for name, entry in pairs(header) do
    if type(name) ~= "string" or type(entry) ~= "table" then fail("load %s: entry '%s' is not an object", path, tostring(name)) end
    local format = READ[entry.dtype]
    if not format then fail("load %s: '%s' has dtype %s; read are F32 F64 F16 BF16 I64 I32 U8 BOOL", path, name, tostring(entry.dtype)) end
    local shape, offsets, count = entry.shape, entry.data_offsets, 1
    if type(shape) ~= "table" or #shape > 8 then fail("load %s: '%s' has no shape of at most 8 sizes", path, name) end
    for i = 1, #shape do
      if not is_index(shape[i]) then fail("load %s: '%s' has the size %s in its shape", path, name, tostring(shape[i])) end
      count = count * shape[i]
    end
    if type(offsets) ~= "table" or not is_index(offsets[1]) or not is_index(offsets[2]) or offsets[3] ~= nil or offsets[1] > offsets[2] or offsets[2] > bytes then
      fail("load %s: '%s' has offsets outside the file's %d bytes of data", path, name, bytes)
    end
    if count * format[1] ~= offsets[2] - offsets[1] then
      fail("load %s: '%s' %s %s needs %.0f bytes, its offsets span %.0f", path, name, entry.dtype, core.shape_text(shape), count * format[1],
        offsets[2] - offsets[1])
    end
    spans[#spans + 1] = { offsets[1], offsets[2], name }
  end
  table.sort(spans, function(a, b)
    if a[1] ~= b[1] then return a[1] < b[1] end
    if a[2] ~= b[2] then return a[2] < b[2] end
    return a[3] < b[3]
  end)
  local at = 0
  for _, s in ipairs(spans) do
    if s[1] ~= at then fail("load %s: '%s' %s", path, s[3], s[1] < at and "overlaps another tensor" or "is preceded by a hole") end
    at = s[2]
  end
  if at ~= bytes then fail("load %s: %d bytes follow the last tensor", path, bytes - at) end
  return header, metadata or {}, 8 + n
end

--- Loads a file: {name = tensor}, {key = text}. F64 and F16 become f32, I64 becomes i32. options {device}.
function safetensors.load(path, options)
  if type(path) ~= "string" then fail("load: a %s, expected a path", type(path)) end
  local header, metadata, start = read_header(path)
  local tensors = {}
  for name, entry in pairs(header) do
    local x = core.new(entry.shape, { dtype = READ[entry.dtype][2], device = options and options.device })
    core.read_tensor(x, path, start + entry.data_offsets[1], entry.dtype)
    tensors[name] = x
  end
  return tensors, metadata
end

--- Metadata alone, without reading tensors.
function safetensors.metadata(path)
  local _, metadata = read_header(path)
  return metadata
end

return safetensors
