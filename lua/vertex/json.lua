--- json: the only place that writes and reads JSON: configurations, logs and checkpoints of runs, notebooks, Jupyter's
-- messages. (safetensors.lua reads its headers itself: it must refuse what general readers accept.)
--
-- The same value always gives the same text: keys are sorted and numbers keep all their digits, so that texts can stand
-- for the values when two are compared.

local cjson = require "cjson.safe"
local core = require "vertex.core"

local json = {}

local OBJECT, ARRAY = {}, {} -- metatables that say what an empty table is

--- Marks a table as a JSON object, also where it is empty.
-- @param[opt] t table; none: a new one
-- @return t
function json.object(t) return setmetatable(t or {}, OBJECT) end

--- Marks a table as a JSON array, also where it is empty.
-- @param[opt] t table; none: a new one
-- @return t
function json.array(t) return setmetatable(t or {}, ARRAY) end

--- The fewest digits that bring back the float64, 17 at most; JSON has no NaN and no infinities.
local function number_text(v)
  if v ~= v or v == math.huge or v == -math.huge then return "null" end
  if v == math.floor(v) and math.abs(v) < 2 ^ 53 then return ("%.0f"):format(v) end
  for digits = 15, 16 do
    local text = ("%." .. digits .. "g"):format(v)
    if tonumber(text) == v then return text end
  end
  return ("%.17g"):format(v)
end

local function quote(text) return (cjson.encode(text):gsub("\\/", "/")) end

local DEEPEST = 1000 -- as cjson reads; a table within itself is deeper

local function encode(value, depth)
  local kind = core.is_tensor(value) and "tensor" or type(value)
  if kind == "number" then return number_text(value) end
  if kind == "string" then return quote(value) end
  if kind == "nil" or kind == "boolean" then return value == nil and "null" or tostring(value) end
  if kind ~= "table" then error(("a %s cannot be written as JSON"):format(kind), 0) end
  if depth > DEEPEST then error(("tables are nested deeper than %d; is one within itself?"):format(DEEPEST), 0) end
  local parts, mark = {}, getmetatable(value)
  if mark == ARRAY or value[1] ~= nil and mark ~= OBJECT then
    for i, v in ipairs(value) do parts[i] = encode(v, depth + 1) end
    return "[" .. table.concat(parts, ",") .. "]"
  end
  local keys, texts = {}, {}
  for key in pairs(value) do
    local text = tostring(key)
    keys[text] = key
    texts[#texts + 1] = text
  end
  table.sort(texts)
  for i, text in ipairs(texts) do parts[i] = quote(text) .. ":" .. encode(value[keys[text]], depth + 1) end
  return "{" .. table.concat(parts, ",") .. "}"
end

--- Writes a value as JSON on one line.
-- @param value nil, boolean, number, text, or nested tables of them. A table with [1] is an array up to its first nil,
-- any other an object (an empty one is {} unless json.array marked it); keys become texts. NaN and infinities become
-- null
-- @return string
-- @raise where there is a function, a tensor or another value that JSON cannot hold
function json.encode(value)
  local ok, text = pcall(encode, value, 1)
  if not ok then core.fail("json: %s", text) end
  return text
end

local function without_null(value)
  if value == cjson.null then return nil end
  if type(value) == "table" then
    for key, inner in pairs(value) do value[key] = without_null(inner) end
  end
  return value
end

--- Reads JSON.
-- @param text string
-- @return value: tables for objects and arrays (1-based), nil for null; or nil and the reason where the text is no JSON
function json.decode(text)
  local value, reason = cjson.decode(text)
  if value == nil then return nil, reason end
  return without_null(value)
end

--- Reads a file that holds a JSON object or array.
-- @param path of the file
-- @return table; nil where there is no such file, or it holds something else
function json.read(path)
  local value = json.decode(core.read_file(path) or "")
  return type(value) == "table" and value or nil
end

return json
