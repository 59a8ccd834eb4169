--- check.lua: the one place that checks options and numbers. A check takes first who asks and what the value is called,
-- since its message says so: "knn: k is 0, expected an integer of 1 or more". It gives the value back, and raises at
-- the user's line.

local fail = require("vertex.core.library").fail
local floor, huge = math.floor, math.huge

local check = {}

-- The largest integer up to which a number holds every one.
local EXACT = 2 ^ 53

--- Gives a value as a message shows it.
-- @param v anything
-- @return string: 'text', 1.5, true, nil, or "a table"
function check.show(v)
  if type(v) == "string" then return "'" .. v .. "'" end
  if type(v) == "number" or type(v) == "boolean" or v == nil then return tostring(v) end
  return "a " .. type(v)
end
local show = check.show

-- -- Names ------------------------------------------------------------------------------------------------------------

-- Counts the letters to insert, delete or replace, and the neighbours to exchange, that turn one text into another.
local function distance(a, b)
  local before, row = nil, {}
  for j = 0, #b do row[j] = j end
  for i = 1, #a do
    local new = { [0] = i }
    for j = 1, #b do
      local cost = a:byte(i) == b:byte(j) and 0 or 1
      new[j] = math.min(row[j] + 1, new[j - 1] + 1, row[j - 1] + cost)
      if before and j > 1 and a:byte(i) == b:byte(j - 1) and a:byte(i - 1) == b:byte(j) then
        new[j] = math.min(new[j], before[j - 2] + 1)
      end
    end
    before, row = row, new
  end
  return row[#b]
end

--- Finds the name that a user may have meant.
-- @param name string
-- @param names array of strings
-- @param[opt] most letters that may differ; a third of the name's
-- @return the nearest of the names; nil where none is near enough
function check.nearest(name, names, most)
  local best, least = nil, most or floor(#name / 3)
  for _, other in ipairs(names) do
    local d = distance(name:lower(), other:lower())
    if d < least or d == least and not best then best, least = other, d end
  end
  return best
end

--- Lists the keys of a table.
-- @param t table
-- @return array of strings, sorted
function check.names(t)
  local names = {}
  for name in pairs(t) do names[#names + 1] = tostring(name) end
  table.sort(names)
  return names
end

--- Checks that a name is known. The message lists the known ones, and says which of them is nearest.
-- @param who name of the asking function
-- @param what word for what the name names: "option", "palette"
-- @param name anything
-- @param known table whose keys are the known names
-- @return name
-- @raise where it is not a key of known
function check.name(who, what, name, known)
  if name ~= nil and known[name] ~= nil then return name end
  local names = check.names(known)
  local meant = type(name) == "string" and check.nearest(name, names)
  fail("%s: unknown %s %s%s; known: %s", who, what, show(name), meant and (", did you mean '%s'?"):format(meant) or "",
    table.concat(names, ", "))
end

-- -- Values -----------------------------------------------------------------------------------------------------------

--- Checks an integer.
-- @param who name of the asking function
-- @param name what the message calls the value
-- @param value anything
-- @param low the least that it may be
-- @param[opt=2^53] high the greatest that it may be
-- @return value
-- @raise where it is no integer from low to high
function check.integer(who, name, value, low, high)
  local whole = type(value) == "number" and value == floor(value)
  if whole and value >= low and value <= (high or EXACT) then return value end
  if high then fail("%s: %s is %s, expected an integer from %d to %.0f", who, name, show(value), low, high) end
  fail("%s: %s is %s, expected an integer of %d or more", who, name, show(value), low)
end

--- Checks a size along both sides of an image.
-- @param who name of the asking function
-- @param name what the message calls the value
-- @param value anything
-- @param low the least that it may be
-- @return array { rows, columns }
-- @raise where it is neither an integer from low on, which means both, nor an array of two
function check.pair(who, name, value, low)
  if type(value) ~= "table" then value = { value, value } end
  if #value ~= 2 then
    fail("%s: %s has %d numbers, expected an integer or { rows, columns }", who, name, #value)
  end
  return { check.integer(who, name, value[1], low), check.integer(who, name, value[2], low) }
end

--- Checks a finite number.
-- @param who name of the asking function
-- @param name what the message calls the value
-- @param value anything
-- @param low the least that it may be
-- @param high the greatest that it may be
-- @return value
-- @raise where it is no number from low to high, or infinite
function check.number(who, name, value, low, high)
  if type(value) == "number" and value >= low and value <= high and value < huge and value > -huge then return value end
  if low == -huge and high == huge then fail("%s: %s is %s, expected a finite number", who, name, show(value)) end
  if high == huge then fail("%s: %s is %s, expected a number of at least %g", who, name, show(value), low) end
  fail("%s: %s is %s, expected a number from %g to %g", who, name, show(value), low, high)
end

--- Checks a positive number.
-- @param who name of the asking function
-- @param name what the message calls the value
-- @param value anything
-- @return value
-- @raise where it is no number above 0, or infinite
function check.positive(who, name, value)
  if type(value) == "number" and value > 0 and value < huge then return value end
  fail("%s: %s is %s, expected a positive number", who, name, show(value))
end

--- Checks that a value is one of a few.
-- @param who name of the asking function
-- @param name what the message calls the value
-- @param value anything
-- @param choices array of strings
-- @return value
-- @raise where it is none of them
function check.choice(who, name, value, choices)
  for _, choice in ipairs(choices) do
    if value == choice then return value end
  end
  fail("%s: %s is %s, expected %s", who, name, show(value), table.concat(choices, " or "))
end

-- -- Options ----------------------------------------------------------------------------------------------------------

-- The checks of an option's value by its kind.
local KINDS = {
  any = function(_, _, value) return value end,
  count = function(who, name, value) return check.integer(who, name, value, 1) end,
  whole = function(who, name, value) return check.integer(who, name, value, 0) end,
  positive = check.positive,
  text = function(who, name, value)
    if type(value) == "string" or type(value) == "number" then return tostring(value) end
    fail("%s: %s is %s, expected a string", who, name, show(value))
  end,
}

-- Checks the value of an option.
local function check_value(who, name, value, kind)
  if type(kind) == "function" then return kind(who, name, value) end
  if type(kind) == "table" then return check.choice(who, name, value, kind) end
  if KINDS[kind] then return KINDS[kind](who, name, value) end
  if type(value) ~= kind then fail("%s: %s is %s, expected a %s", who, name, show(value), kind) end
  return value
end

--- Checks a table of options and fills in defaults.
--
--     local o = check.options("knn", options, { k = { "count", 8 }, metric = { { "ce", "l2" }, "ce" }, path = "text" })
--
-- @param who name of the asking function
-- @param options table, or nil for none
-- @param known table: name of an option → its kind, or { kind, default }. A kind is a type of Lua; "count" (an integer
-- of 1 or more), "whole" (of 0 or more), "positive" (a number), "text" (a string; a number becomes one), "any"; an
-- array of the strings that the option may be; or a function of who, name and value, that gives the value, as a check
-- @return new table with the options that were given and the defaults of the others
-- @raise where options are no table, an option is unknown (the message names the nearest), or its value not of its kind
function check.options(who, options, known)
  if options ~= nil and type(options) ~= "table" then
    fail("%s: options are %s, expected a table", who, show(options))
  end
  local o = {}
  for name, kind in pairs(known) do
    if type(kind) == "table" then o[name] = kind[2] end
  end
  for name, value in pairs(options or {}) do
    local kind = known[check.name(who, "option", name, known)]
    o[name] = check_value(who, name, value, type(kind) == "table" and kind[1] or kind)
  end
  return o
end

return check
