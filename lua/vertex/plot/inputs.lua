--- plot/inputs.lua: copies the arrays, labels and pictures that figures are given, in the form that is kept. Each
-- function takes first `who`, the name that begins its message, and raises at the user's line.

local check = require "vertex.check"
local core = require "vertex.core"
local scales = require "vertex.plot.scales"
local utf8 = require "vertex.utf8"
local fail, show = core.fail, check.show

local inputs = {}

-- -- Kinds of options, for check.options ------------------------------------------------------------------------------

--- Gives the kind of numbers from low to high.
function inputs.number(low, high)
  return function(who, name, value) return check.number(who, name, value, low, high) end
end

--- Gives the kind of integers from low to high.
function inputs.integer(low, high)
  return function(who, name, value) return check.integer(who, name, value, low, high) end
end

--- Sizes of marks, lines and letters in points: cairo's fixed point holds what is made of them.
inputs.points = inputs.number(0.01, 10000)
--- Sizes of letters in points: FreeType takes up to 65535 pixels, and loses the font at more.
inputs.letters = inputs.number(0.1, 500)
--- Sides of a figure in points.
inputs.side = inputs.number(1, 32767)
--- Pixels to the point: those of the farthest place that scales.mapper gives are in cairo's fixed point too.
inputs.scale = inputs.number(0.001, 50)
inputs.opacity = inputs.number(0, 1)

-- U+FFFD, which stands for what is no text.
local REPLACEMENT = "\239\191\189"

--- Texts: a number becomes one, and what is not UTF-8, or a NUL byte, U+FFFD.
function inputs.text(who, name, value)
  if type(value) ~= "string" and type(value) ~= "number" then
    fail("%s: %s is %s, expected a string", who, name, show(value))
  end
  local text, rest = utf8.clean(tostring(value))
  return (text:gsub("%z", REPLACEMENT)) .. REPLACEMENT:rep(#rest)
end

-- -- Values -----------------------------------------------------------------------------------------------------------

--- Gives the table of an object with totable; anything else as it is.
function inputs.plain(v)
  if type(v) == "table" and rawget(v, 1) ~= nil then return v end
  local ok, method = pcall(function() return v.totable end)
  if ok and method then return v:totable() end
  return v
end

--- Copies an array of numbers.
function inputs.array(who, name, v)
  local source, out = inputs.plain(v), {}
  if type(source) ~= "table" then fail("%s: %s is an array of numbers, got %s", who, name, show(v)) end
  for i = 1, #source do
    local e = source[i]
    if type(e) ~= "number" then e = type(e) == "cdata" and tonumber(e) end
    if not e then fail("%s: %s[%d] is %s, expected a number (0/0 leaves a gap)", who, name, i, show(source[i])) end
    out[i] = inputs.drawable(who, ("%s[%d]"):format(name, i), e)
  end
  return out
end

--- Gives a number that a figure can show; NaN and infinite ones, which leave gaps, too.
function inputs.drawable(who, name, v)
  if math.abs(v) > scales.LARGEST and v - v == 0 then
    fail("%s: %s is %g, beyond what a figure shows: up to %g; scale the data", who, name, v, scales.LARGEST)
  end
  return v
end

--- Raises where two arrays differ in length.
function inputs.lengths(who, a_name, a, b_name, b)
  if #a ~= #b then fail("%s: %s has %d values and %s has %d; they must match", who, a_name, #a, b_name, #b) end
end

--- Copies an array of numbers, which must be as long as `other`.
function inputs.array_like(who, name, v, other_name, other)
  local out = inputs.array(who, name, v)
  inputs.lengths(who, name, out, other_name, other)
  return out
end

--- Copies an array of arrays of numbers, all of one length.
function inputs.matrix(who, name, rows)
  local source, out = inputs.plain(rows), {}
  if type(source) ~= "table" or #source == 0 then
    fail("%s: %s is an array of arrays, got %s", who, name, show(rows))
  end
  for r, row in ipairs(source) do
    local row_name = ("%s[%d]"):format(name, r)
    out[r] = inputs.array(who, row_name, row)
    inputs.lengths(who, name .. "[1]", out[1], row_name, out[r])
  end
  return out
end

--- Copies an array of strings; numbers become strings.
function inputs.labels(who, name, labels)
  if type(labels) ~= "table" then fail("%s: %s is an array of strings, got %s", who, name, show(labels)) end
  local out = {}
  for i, label in ipairs(labels) do
    out[i] = inputs.text(who, ("%s[%d]"):format(name, i), label)
  end
  return out
end

--- Copies the dash of a line: lengths in line widths, not all of them 0.
function inputs.dash(who, name, v)
  local source, out, sum = inputs.plain(v), {}, 0
  if type(source) ~= "table" then fail("%s: %s is an array of lengths, got %s", who, name, show(v)) end
  for i, length in ipairs(source) do
    out[i] = check.number(who, ("%s[%d]"):format(name, i), length, 0, 10000)
    sum = sum + out[i]
  end
  if #out > 0 and sum < 0.1 then
    fail("%s: %s is %g line widths long in all, expected at least 0.1, or {} for a solid line", who, name, sum)
  end
  return out
end

-- Pixels along a side that cairo's pictures have at most.
local MOST_PIXELS = 32767

--- Copies a picture of any accepted form as { width =, height =, dtype =, bytes = }: a tensor may be freed before the
-- figure is drawn.
function inputs.image(who, img)
  if type(img) == "table" and rawget(img, "rgb") then
    local rgb = img.rgb
    local w = check.integer(who, "image.width", img.width, 1, MOST_PIXELS)
    local h = check.integer(who, "image.height", img.height, 1, MOST_PIXELS)
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
  if shape[1] > MOST_PIXELS or shape[2] > MOST_PIXELS then
    fail("%s: an image has at most %d pixels along a side, got %s", who, MOST_PIXELS, text)
  end
  local bytes = img:bytes()
  if #bytes ~= shape[1] * shape[2] * 3 * (dtype == "u8" and 1 or 4) then
    fail("%s: %s does not fill %d bytes", who, text, #bytes)
  end
  return { width = shape[2], height = shape[1], dtype = dtype, bytes = bytes }
end

return inputs
