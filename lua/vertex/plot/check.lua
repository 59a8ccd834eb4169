--- plot/check.lua: checks what the functions of vertex.plot are given. Each check takes `who`, the name that begins its
-- message, returns the value in the form that is kept, and raises at the line outside lua/vertex that made the call.

local core = require "vertex.core"
local fail = core.fail

local check = {}

--- Gives a value as a message shows it.
function check.show(v)
  if type(v) == "string" then return ("%q"):format(v) end
  return type(v) == "number" and tostring(v) or "a " .. type(v)
end
local show = check.show

--- Gives `name`, which must be a key of `known`; `what` says in a word what the keys are.
function check.key(name, known, what, who)
  if known[name] ~= nil then return name end
  local keys = {}
  for k in pairs(known) do keys[#keys + 1] = tostring(k) end
  table.sort(keys)
  fail("%s: no %s %s; there are %s", who, what, show(name), table.concat(keys, ", "))
end

--- Gives a copy of an options table, {} for nil. known: option → its type, "any" for one that is checked elsewhere.
-- Where a string is expected a number becomes one.
function check.options(options, known, who)
  if options == nil then return {} end
  if type(options) ~= "table" then fail("%s: options are a table, got %s", who, show(options)) end
  local out = {}
  for key, value in pairs(options) do
    local want = known[check.key(key, known, "option", who)]
    if want == "string" and type(value) == "number" then value = tostring(value) end
    if want ~= "any" and type(value) ~= want then fail("%s: %s is a %s, got %s", who, key, want, show(value)) end
    out[key] = value
  end
  return out
end

--- Gives `value`, which must be a positive finite number.
function check.positive(value, name, who)
  if type(value) == "number" and value > 0 and value < math.huge then return value end
  fail("%s: %s is a positive number, got %s", who, name, show(value))
end

--- Gives `value`, which must be an integer of 1 or more.
function check.whole(value, name, who)
  if type(value) == "number" and value >= 1 and value < math.huge and value == math.floor(value) then return value end
  fail("%s: %s is a whole number from 1, got %s", who, name, show(value))
end

--- Gives the table of an object with totable; anything else as it is.
function check.plain(v)
  if type(v) == "table" and rawget(v, 1) ~= nil then return v end
  local ok, method = pcall(function() return v.totable end)
  if ok and method then return v:totable() end
  return v
end

--- Copies an array of numbers.
function check.array(v, name, who)
  local source, out = check.plain(v), {}
  if type(source) ~= "table" then fail("%s: %s is an array of numbers, got %s", who, name, show(v)) end
  for i = 1, #source do
    local e = source[i]
    if type(e) ~= "number" then e = type(e) == "cdata" and tonumber(e) end
    if not e then fail("%s: %s[%d] is %s, expected a number (0/0 leaves a gap)", who, name, i, show(source[i])) end
    out[i] = e
  end
  return out
end

--- Raises where two arrays differ in length.
function check.lengths(a, a_name, b, b_name, who)
  if #a ~= #b then fail("%s: %s has %d values and %s has %d; they must match", who, a_name, #a, b_name, #b) end
end

--- Copies an array of numbers, which must be as long as `other`.
function check.array_like(v, name, other, other_name, who)
  local out = check.array(v, name, who)
  check.lengths(out, name, other, other_name, who)
  return out
end

--- Copies an array of arrays of numbers, all of one length.
function check.matrix(rows, name, who)
  local source, out = check.plain(rows), {}
  if type(source) ~= "table" or #source == 0 then
    fail("%s: %s is an array of arrays, got %s", who, name, show(rows))
  end
  for r, row in ipairs(source) do
    local row_name = ("%s[%d]"):format(name, r)
    out[r] = check.array(row, row_name, who)
    check.lengths(out[1], name .. "[1]", out[r], row_name, who)
  end
  return out
end

--- Copies an array of strings; numbers become strings.
function check.labels(labels, name, who)
  if type(labels) ~= "table" then fail("%s: %s is an array of strings, got %s", who, name, show(labels)) end
  local out = {}
  for i, label in ipairs(labels) do
    if type(label) ~= "string" and type(label) ~= "number" then
      fail("%s: %s[%d] is a string, got %s", who, name, i, show(label))
    end
    out[i] = tostring(label)
  end
  return out
end

--- Copies a picture of any accepted form as { width =, height =, dtype =, bytes = }: a tensor may be freed before the
-- figure is drawn.
function check.image(img, who)
  if type(img) == "table" and rawget(img, "rgb") then
    local w, h, rgb = check.whole(img.width, "image.width", who), check.whole(img.height, "image.height", who), img.rgb
    if type(rgb) ~= "string" or #rgb ~= 3 * w * h then
      fail("%s: a %dx%d image has an rgb string of %d bytes, got %s", who, w, h, 3 * w * h,
        type(rgb) == "string" and #rgb or show(rgb))
    end
    return { width = w, height = h, dtype = "u8", bytes = rgb }
  end
  local ok, shape, dtype = pcall(function() return img:shape(), img:dtype() end)
  if not ok or type(shape) ~= "table" then
    fail("%s: an image is {width=, height=, rgb=} or an object with shape, dtype and bytes, got %s", who, show(img))
  end
  local text = ("(%s) of %s"):format(table.concat(shape, ", "), tostring(dtype))
  if #shape ~= 3 or shape[3] ~= 3 or shape[1] < 1 or shape[2] < 1 or not (dtype == "u8" or dtype == "f32") then
    fail("%s: an image object is (H, W, 3) of u8 or f32, got %s", who, text)
  end
  local bytes = img:bytes()
  if #bytes ~= shape[1] * shape[2] * 3 * (dtype == "u8" and 1 or 4) then
    fail("%s: %s does not fill %d bytes", who, text, #bytes)
  end
  return { width = shape[2], height = shape[1], dtype = dtype, bytes = bytes }
end

return check
