--- core/op.lua: the numeric ops of C as functions of Lua, made from what the library says of itself (vx_ops(), the text
-- of core/ops.def). Handles, statuses and the second try after a collection are dealt with here and nowhere else.
--
--   op.unary(y, x, VX.EXP, 1, 0)                     tensors and numbers in the order of ops.def
--   op.unary { y = y, x = x, kind = VX.EXP, alpha = 1, beta = 0 }             or by name, as pays where they are many
--
-- A tensor that the contract marks `?` may be nil. A number that is missing is an error, and so is a name that the op
-- does not have, an argument too many, and an op or a constant that the library lacks: the Lua files and the library
-- are not of one version then.

local ffi = require "ffi"
local library = require "vertex.core.library"

local C, fail, check = library.C, library.fail, library.check

-- -- What the library has ---------------------------------------------------------------------------------------------

local list, by_name = {}, {} -- of entries, see op_list

--- Splits "((int, kind), (float, alpha))" into the names and the types of its pairs.
local function pairs_of(text)
  local names, types = {}, {}
  for type, name in text:gmatch "%(([%w_]+), ([%w_]+)%)" do names[#names + 1], types[#types + 1] = name, type end
  return names, types
end

for line in ffi.string(C.vx_ops()):gmatch "[^\n]+" do
  local name, contract, text, tensors, numbers, each = line:match "^(.-)\t(.-)\t(.-)\t(.-)\t(.-)\t(.-)$"
  if not name then library.lacks "the arguments of its ops" end
  local entry = { name = name, contract = contract, text = text, tensors = {} }
  for tensor in tensors:gmatch "[%w_]+" do entry.tensors[#entry.tensors + 1] = tensor end
  entry.numbers = pairs_of(numbers)
  if each ~= "" then entry.each, entry.each_types = pairs_of(each) end
  entry.all = {}
  for _, names in ipairs { entry.tensors, entry.each or {}, entry.numbers } do
    for _, argument in ipairs(names) do entry.all[#entry.all + 1] = argument end
  end
  list[#list + 1], by_name[name] = entry, entry
end

--- Lists the ops of ops.def: array of { name, contract, text, tensors, numbers, all }, the last three arrays of names;
-- `each`, too, for an op on lists: the numbers that each place of the lists has of its own.
local function op_list() return list end

--- Raises where the library has no op of this name.
local function expect_op(name)
  if not by_name[name] then library.lacks("the op '" .. name .. "'") end
end

local int_out = ffi.new "int[1]"

--- Says whether a backend ("cpu", "cuda") has a kernel for an op of ops.def; nil and why where its library cannot be
-- opened.
local function backend_has(backend, name)
  if C.vx_backend_has(backend, name, int_out) == 0 then return int_out[0] ~= 0 end
  return nil, ffi.string(C.vx_error())
end

--- Constants of vertex.h by their name without "VX_": VX.EXP, VX.REDUCE_SUM.
local VX = setmetatable({}, { __index = function(t, name)
  local ok, value = pcall(function() return C["VX_" .. name] end)
  if not ok then library.lacks("the constant VX_" .. name) end
  rawset(t, name, value)
  return value
end })

-- -- Arguments --------------------------------------------------------------------------------------------------------

-- The scope of a tensor that went with its step.
local OVER = {}

--- Gives the C handle of a tensor; nil stays nil (an optional argument).
local function handle(x)
  if x == nil then return nil end
  local h = type(x) == "table" and x._h
  if not h then
    if type(x) ~= "table" or x.requires_grad == nil then fail("a %s where a tensor was expected", type(x)) end
    if x._scope ~= OVER then fail "this tensor was released: its memory was given back, by x:release() say" end
    fail "this tensor was released: it was made inside vx.step and not returned from it (return it, or vx.keep(x))"
  end
  return h
end

--- Deals with a status other than 0: out of memory is tried once more after a collection, since dead tensors may still
-- wait for Lua's collector (a failed op has written nothing, so that is safe); the rest raises C's text.
local function recover(status, f, ...)
  if status == C.VX_ENOMEM then
    collectgarbage()
    collectgarbage()
    status = f(...)
  end
  check(status)
end

--- Raises what is wrong with the numbers of a call: one is missing, or there is an argument `more` than the op has.
local function refuse(entry, more, ...)
  if more ~= nil then
    fail("%s: more arguments than it has: %s", entry.name, table.concat(entry.all, ", "))
  end
  for i, name in ipairs(entry.numbers) do
    if select(i, ...) == nil then fail("%s: the number '%s' is missing", entry.name, name) end
  end
end

--- Raises where a table of arguments has a name that the op does not, with those it has.
local function refuse_name(entry, fields)
  local known = {}
  for _, name in ipairs(entry.all) do known[name] = true end
  for name in pairs(fields) do
    if not known[name] then
      fail("%s: there is no argument '%s'; it has %s", entry.name, tostring(name), table.concat(entry.all, ", "))
    end
  end
end

-- -- The functions ----------------------------------------------------------------------------------------------------

-- Written out as text for each op, so that a call costs what the same line by hand would: no loop, no table.
local CALL = [[
local C, handle, recover, refuse, refuse_name, entry = ...
local getmetatable, next, type = getmetatable, next, type
local named
local function call($arguments, more)
  if getmetatable($first) == nil and type($first) == "table" then return named($first) end
  if more ~= nil or $missing then refuse(entry, more, $numbers) end
  local $handles = $handled
  local status = C.vx_$name($passed)
  if status ~= 0 then recover(status, C.vx_$name, $passed) end
end
function named(fields)
  local $arguments = $fields
  local extra = -($given)
  for _ in next, fields do extra = extra + 1 end
  if extra > 0 then refuse_name(entry, fields) end
  if $first == nil then refuse(entry, nil, $numbers) end
  return call($arguments)
end
return call]]

--- Joins format(name) of all names.
local function joined(names, format, separator)
  local parts = {}
  for i, name in ipairs(names) do parts[i] = (format:gsub("@", name)) end
  return table.concat(parts, separator or ", ")
end

--- Makes the function of an op.
local function function_of(entry)
  local none = #entry.numbers == 0
  local handles, numbers = joined(entry.tensors, "h_@"), joined(entry.numbers, "@")
  local words = { name = entry.name, first = entry.tensors[1], arguments = table.concat(entry.all, ", "),
    handles = handles, handled = joined(entry.tensors, "handle(@)"), numbers = none and "nil" or numbers,
    passed = handles .. (none and "" or ", " .. numbers), fields = joined(entry.all, "fields.@"),
    missing = none and "false" or joined(entry.numbers, "@ == nil", " or "),
    given = joined(entry.all, "(@ ~= nil and 1 or 0)", " + ") }
  local code = CALL:gsub("%$(%w+)", words)
  -- under this file's name, so that errors point at who called
  local chunk = assert(loadstring(code, debug.getinfo(1, "S").source))
  return setfenv(chunk, getfenv(1))(C, handle, recover, refuse, refuse_name, entry)
end

--- Makes the function of an op on lists: tensors and the numbers of each are arrays of Lua, of one length.
local function list_function_of(entry)
  local tensors, each, order = entry.tensors, entry.each, entry.all
  local arrays, room, f = {}, 0, C["vx_" .. entry.name]
  local function make_room(n)
    room = 2 * n
    for i = 1, #tensors do arrays[i] = ffi.new("vx_tensor *[?]", room) end
    for i, type in ipairs(entry.each_types) do arrays[#tensors + i] = ffi.new(type .. "[?]", room) end
  end
  make_room(8)
  return function(first, ...)
    local given = { first, ... }
    if type(first) == "table" and first[order[1]] then
      given = {}
      refuse_name(entry, first)
      for i, name in ipairs(order) do given[i] = first[name] end
    end
    local count = #given[1]
    if count > room then make_room(count) end
    for k = 1, #tensors + #each do
      local array, values, is_tensor = arrays[k], given[k], k <= #tensors
      if #values ~= count then
        fail("%s: %d of '%s', but %d of '%s'", entry.name, #values, order[k], count, order[1])
      end
      for i = 1, count do
        local value = values[i]
        if is_tensor then
          value = type(value) == "table" and value._h
          if not value then fail("%s[%d]: %s is a released tensor, or none", entry.name, i - 1, order[k]) end
        end
        array[i - 1] = value
      end
    end
    refuse(entry, given[#order + 1], unpack(given, #tensors + #each + 1, #order))
    local passed = {}
    for i = 1, #tensors do passed[i] = arrays[i] end
    passed[#passed + 1] = count
    for k = #tensors + 1, #order do passed[#passed + 1] = k <= #tensors + #each and arrays[k] or given[k] end
    local status = f(unpack(passed))
    if status ~= 0 then recover(status, f, unpack(passed)) end
  end
end

--- The ops as functions: op.NAME(...), made when they are first asked for.
local op = setmetatable({}, { __index = function(t, name)
  local entry = by_name[name] or library.lacks("the op '" .. tostring(name) .. "'")
  local f = (entry.each and list_function_of or function_of)(entry)
  rawset(t, name, f)
  return f
end })

-- -- Functions of one number, in float64 ------------------------------------------------------------------------------

--- Computes ln gamma(x); NaN below 0.
local function lgamma(x) return C.vx_lgamma(x) end

--- Computes the first derivative of ln gamma at x; NaN below 0.
local function digamma(x) return C.vx_digamma(x) end

--- Computes the second derivative of ln gamma at x; NaN below 0.
local function trigamma(x) return C.vx_trigamma(x) end

return { op = op, op_list = op_list, expect_op = expect_op, backend_has = backend_has, VX = VX, handle = handle,
  OVER = OVER, lgamma = lgamma, digamma = digamma, trigamma = trigamma }
