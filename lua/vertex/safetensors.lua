--- safetensors.lua: tensors in files, in the format of huggingface/safetensors: 8 bytes N (little-endian), N bytes of
-- JSON header, then the raw elements, little-endian and row-major. Written atomically, in the order of the reference
-- writer (dtype by size, then name), header padded to 8 bytes. Reading trusts nothing: offsets must cover the data
-- without holes or overlap, and the header must be JSON to the letter (UTF-8, no key twice, no NaN), which general JSON
-- readers do not insist on.

local check = require "vertex.check"
local core = require "vertex.core"
local utf8 = require "vertex.utf8"

local safetensors = {}
local fail = core.fail

local RANK = { F32 = 1, I32 = 2, BF16 = 3, U16 = 4, U8 = 5 } -- wide first, as the reference writer has it
local MAX_HEADER = 100e6
-- Dtypes of the format that no tensor is made of, and the bits of an element.
local UNREAD = { U64 = 64, C64 = 64, F8_E4M3 = 8, F8_E4M3FNUZ = 8, F8_E5M2 = 8, F8_E5M2FNUZ = 8, F8_E8M0 = 8,
  F6_E2M3 = 6, F6_E3M2 = 6, F4 = 4 }

-- -- JSON, as far as a header needs it --------------------------------------------------------------------------------

local ESCAPES = { ['"'] = '"', ["\\"] = "\\", ["/"] = "/", b = "\b", f = "\f", n = "\n", r = "\r", t = "\t" }
local ESCAPED = { ['"'] = '\\"', ["\\"] = "\\\\", ["\b"] = "\\b", ["\f"] = "\\f", ["\n"] = "\\n", ["\r"] = "\\r",
  ["\t"] = "\\t" }

local function quote(s)
  return '"' .. s:gsub('[%c"\\]',
    function(c) return ESCAPED[c] or (c:byte() < 32 and ("\\u%04x"):format(c:byte())) or c end) .. '"'
end

local Object, Array = {}, {}                                                -- metatables that tell {} from []
-- true, false, null, and numbers that are no size
local Other = { __tostring = function(x) return x.text end }

local value -- value(text, position) → value, position after it; raises a text where there is none

local function spaces(text, at) return text:find("[^ \t\n\r]", at) or #text + 1 end

local function unexpected(text, at)
  error(at > #text and "it ends too early" or ("'%s' at byte %d"):format(text:sub(at, at), at - 1), 0)
end

local function unicode(text, at) -- at the four hexadecimal digits after \u
  local digits = text:match("^%x%x%x%x", at) or unexpected(text, at)
  local code = tonumber(digits, 16)
  if code < 0xd800 or code > 0xdfff then return utf8.char(code), at + 4 end
  local low = code < 0xdc00 and text:match("^\\u([dD][c-fC-F]%x%x)", at + 4) or unexpected(text, at)
  return utf8.char(0x10000 + (code - 0xd800) * 1024 + tonumber(low, 16) - 0xdc00), at + 10
end

local function text_value(text, at)
  local parts = {}
  at = at + 1
  while true do
    local stop = text:find('[%z\1-\31"\\]', at) or unexpected(text, #text + 1)
    parts[#parts + 1] = text:sub(at, stop - 1)
    local c = text:sub(stop, stop)
    if c == '"' then return table.concat(parts), stop + 1 end
    if c ~= "\\" then unexpected(text, stop) end
    local escape = text:sub(stop + 1, stop + 1)
    if escape == "u" then
      parts[#parts + 1], at = unicode(text, stop + 2)
    else
      parts[#parts + 1], at = ESCAPES[escape] or unexpected(text, stop + 1), stop + 2
    end
  end
end

--- Members of an object or array up to `close`; each(text, position) reads one and returns the position after it.
local function members(text, at, close, each)
  at = spaces(text, at + 1)
  if text:sub(at, at) == close then return at + 1 end
  while true do
    at = spaces(text, each(text, at))
    local c = text:sub(at, at)
    if c == close then return at + 1 end
    if c ~= "," then unexpected(text, at) end
    at = spaces(text, at + 1)
  end
end

function value(text, at, depth)
  local c = text:sub(at, at)
  if c == '"' then return text_value(text, at) end
  if (c == "{" or c == "[") and (depth or 0) > 8 then error("it is nested too deep", 0) end
  local inside = (depth or 0) + 1
  if c == "{" then
    local object = setmetatable({}, Object)
    return object, members(text, at, "}", function(_, from)
      if text:sub(from, from) ~= '"' then unexpected(text, from) end
      local key, after = text_value(text, from)
      after = spaces(text, after)
      if text:sub(after, after) ~= ":" then unexpected(text, after) end
      if rawget(object, key) ~= nil then error(("it names '%s' twice"):format(key), 0) end
      object[key], after = value(text, spaces(text, after + 1), inside)
      return after
    end)
  elseif c == "[" then
    local array = setmetatable({}, Array)
    return array, members(text, at, "]", function(_, from)
      array[#array + 1], from = value(text, from, inside)
      return from
    end)
  end
  local word = text:match("^[%w%+%-%.]+", at) or unexpected(text, at)
  if word:match "^%d+$" and (word == "0" or c ~= "0") then return tonumber(word), at + #word end
  local number = word:match "^%-?%d+%.%d+$" or word:match "^%-?%d+$" or word:match "^%-?%d+[eE][%+%-]?%d+$"
    or word:match "^%-?%d+%.%d+[eE][%+%-]?%d+$"
  if number or word == "true" or word == "false" or word == "null" then
    return setmetatable({ text = word }, Other), at + #word
  end
  unexpected(text, at)
end

local function decode(text)
  if not utf8.valid(text) then error("it is not UTF-8", 0) end
  local object, after = value(text, 1)
  after = spaces(text, after)
  if after <= #text then unexpected(text, after) end
  return object
end

-- -- Writing ----------------------------------------------------------------------------------------------------------

--- Saves tensors under their names. Strided views are written as their values.
-- @param path of the file, which appears whole or not at all
-- @param tensors {name = tensor}
-- @param[opt] metadata {key = text}
-- @param[opt] options {u16 = {name = true}: the i32 tensors of these names as uint16, which halves a file of codes}
-- @raise where a name, a tensor or a text is none, a number does not fit into uint16, or the file cannot be written
function safetensors.save(path, tensors, metadata, options)
  local narrow = options and options.u16 or {}
  for name in pairs(narrow) do
    if tensors[name] == nil then
      fail("save %s: u16 names '%s', and there is no tensor of that name", path, tostring(name))
    end
  end
  local function stored_as(name) return narrow[name] and "U16" or core.dtypes[tensors[name]:dtype()].stored end
  local names = {}
  for name, x in pairs(tensors) do
    if type(name) ~= "string" then fail("save %s: a tensor is named by a %s, expected a text", path, type(name)) end
    if not core.is_tensor(x) then fail("save %s: '%s' is a %s, expected a tensor", path, name, type(x)) end
    if name == "__metadata__" or not utf8.valid(name) then
      fail("save %s: '%s' cannot be a tensor's name (kept for metadata, or not UTF-8)", path, name)
    end
    names[#names + 1] = name
  end
  table.sort(names, function(a, b)
    local ra, rb = RANK[stored_as(a)], RANK[stored_as(b)]
    if ra ~= rb then return ra < rb end
    return a < b
  end)
  local parts, offset = {}, 0
  if metadata and next(metadata) ~= nil then
    local keys, entries = {}, {}
    for key, text in pairs(metadata) do
      if type(key) ~= "string" or type(text) ~= "string" then
        fail("save %s: metadata must be texts under texts", path)
      end
      if not utf8.valid(key) or not utf8.valid(text) then fail("save %s: metadata '%s' is not UTF-8", path, key) end
      keys[#keys + 1] = key
    end
    table.sort(keys)
    for i, key in ipairs(keys) do entries[i] = quote(key) .. ":" .. quote(metadata[key]) end
    parts[1] = '"__metadata__":{' .. table.concat(entries, ",") .. "}"
  end
  for _, name in ipairs(names) do
    local stored = stored_as(name)
    local bytes = tensors[name]:numel() * core.stored_dtype(stored).bytes
    parts[#parts + 1] = ('%s:{"dtype":"%s","shape":[%s],"data_offsets":[%.0f,%.0f]}'):format(quote(name), stored,
      table.concat(tensors[name]:shape(), ","), offset, offset + bytes)
    offset = offset + bytes
  end
  local header = "{" .. table.concat(parts, ",") .. "}"
  header = header .. (" "):rep(-#header % 8)
  local length = {}
  for i = 0, 7 do length[i + 1] = string.char(math.floor(#header / 256 ^ i) % 256) end
  core.write_whole(path, function(w)
    w:bytes(table.concat(length) .. header)
    for _, name in ipairs(names) do w:tensor(tensors[name], narrow[name]) end
  end)
end

-- -- Reading ----------------------------------------------------------------------------------------------------------

-- the reader lets only whole numbers of 0 or more be numbers
local function is_index(v) return type(v) == "number" and v < 2 ^ 53 end
local function is_array(x) return getmetatable(x) == Array end

--- Raises why a tensor is not read.
local function refuse_unread(path, name, entry) fail("load %s: '%s' %s", path, name, entry.unread) end

--- Says why no tensor is made of an entry: its dtype or its dimensions; nil where one is.
local function reason_unread(entry)
  local format = core.stored_dtype(entry.dtype)
  if not format or format.name ~= entry.dtype then
    return ("has dtype %s; read are %s"):format(entry.dtype, table.concat(core.stored_dtypes(), " "))
  end
  if #entry.shape > 8 then return ("has %d dimensions; a tensor has at most 8"):format(#entry.shape) end
end

--- Reads and checks the header of an open file: entries {name = {dtype, shape, data_offsets}}, metadata, and the byte
-- where data starts.
local function read_header(file)
  local path, size = file.path, file:size()
  local raw, n = file:bytes(0, 8), 0
  if #raw == 8 then
    for i = 8, 1, -1 do n = n * 256 + raw:byte(i) end
  end
  if n < 2 or n > MAX_HEADER or n + 8 > size then
    fail("load %s: not a safetensors file (%d bytes, header length %.0f)", path, size, n)
  end
  local text = file:bytes(8, n)
  if text:sub(1, 1) ~= "{" then
    fail("load %s: not a safetensors file (its header is no JSON object)", path)
  end
  local ok, header = pcall(decode, text)
  if not ok then fail("load %s: not a safetensors file (in its JSON header: %s)", path, header) end
  local metadata = header.__metadata__
  header.__metadata__ = nil
  if getmetatable(metadata) == Other and metadata.text == "null" then metadata = nil end
  if metadata ~= nil then
    if getmetatable(metadata) ~= Object then fail("load %s: __metadata__ is not an object", path) end
    for _, v in pairs(metadata) do
      if type(v) ~= "string" then fail("load %s: __metadata__ holds something that is no text", path) end
    end
    setmetatable(metadata, nil)
  end
  local spans, bytes = {}, size - 8 - n
  for name, entry in pairs(header) do
    if getmetatable(entry) ~= Object then fail("load %s: entry '%s' is not an object", path, name) end
    local shape, offsets, count = entry.shape, entry.data_offsets, 1
    if type(entry.dtype) ~= "string" then fail("load %s: '%s' has no dtype", path, name) end
    if not is_array(shape) then fail("load %s: '%s' has no shape", path, name) end
    entry.unread = reason_unread(entry)
    local bits, format = UNREAD[entry.dtype], core.stored_dtype(entry.dtype)
    local element = bits and bits / 8 or format and format.name == entry.dtype and format.bytes -- nil: not known here
    for i = 1, #shape do
      if not is_index(shape[i]) then
        fail("load %s: '%s' has the size %s in its shape", path, name, tostring(shape[i]))
      end
      count = count * shape[i]
    end
    if not is_array(offsets) or #offsets ~= 2 or not is_index(offsets[1]) or not is_index(offsets[2])
      or offsets[1] > offsets[2] or offsets[2] > bytes then
      fail("load %s: '%s' has offsets outside the file's %d bytes of data", path, name, bytes)
    end
    if element and count * element ~= offsets[2] - offsets[1] then
      fail("load %s: '%s' %s %s needs %.0f bytes, its offsets span %.0f", path, name, entry.dtype,
        core.shape_text(shape), count * element,
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
    if s[1] ~= at then
      fail("load %s: '%s' %s", path, s[3], s[1] < at and "overlaps another tensor" or "is preceded by a hole")
    end
    at = s[2]
  end
  if at ~= bytes then fail("load %s: %d bytes follow the last tensor", path, bytes - at) end
  return header, metadata or {}, 8 + n
end

--- Reads and checks a file's header alone.
-- @param file a core.reader
-- @return {name = {dtype (as stored), shape, offset (bytes before its first element), unread (why no tensor is
-- made of it; nil where one is)}}
-- @raise where the file is no safetensors file
function safetensors.header(file)
  local header, _, start = read_header(file)
  local entries = {}
  for name, entry in pairs(header) do
    entries[name] = { dtype = entry.dtype, shape = entry.shape, offset = start + entry.data_offsets[1],
      unread = entry.unread }
  end
  return entries
end

--- Gives the entries of a header under the given names, all where names is nil.
local function chosen(path, header, names)
  if not names then return header end
  for key, name in pairs(names) do
    if type(key) ~= "number" or type(name) ~= "string" then
      fail("load %s: names has %s under %s, expected an array of names", path, check.show(name), check.show(key))
    end
  end
  local entries = {}
  for _, name in ipairs(names) do
    local entry = header[name]
    if not entry then
      local known = {}
      for other in pairs(header) do known[#known + 1] = other end
      table.sort(known)
      if #known > 20 then known = { unpack(known, 1, 20) } known[21] = "..." end
      fail("load %s: there is no '%s' in it; it holds %s", path, tostring(name), table.concat(known, ", "))
    end
    if entry.unread then refuse_unread(path, name, entry) end
    entries[name] = entry
  end
  return entries
end

--- Loads the tensors of an open file: {name = tensor}, {key = text}. F64 and F16 become f32, I64 becomes i32; a number
-- that does not fit is an error. A tensor of a dtype that is not read, or of more than 8 dimensions, is left out;
-- asking the table for it raises what it is. options {device, names}.
function safetensors.read(file, options)
  local header, metadata, start = read_header(file)
  local tensors, unread = {}, nil
  for name, entry in pairs(chosen(file.path, header, options and options.names)) do
    if entry.unread then
      unread = unread or {}
      unread[name] = entry
    else
      local x = core.new(entry.shape,
        { dtype = core.stored_dtype(entry.dtype).dtype, device = options and options.device })
      local ok, why = pcall(file.tensor, file, x, start + entry.data_offsets[1], entry.dtype)
      if not ok then error(("%s, in '%s'"):format(why, name), 0) end
      tensors[name] = x
    end
  end
  if unread and next(tensors) == nil then refuse_unread(file.path, next(unread)) end
  if unread then
    setmetatable(tensors, { __index = function(_, name)
      if unread[name] then refuse_unread(file.path, name, unread[name]) end
    end })
  end
  return tensors, metadata
end

--- The same of a path.
function safetensors.load(path, options) return core.reading(path, safetensors.read, options) end

--- Metadata alone, without reading tensors.
function safetensors.metadata(path)
  return core.reading(path, function(file) return (select(2, read_header(file))) end)
end

return safetensors
