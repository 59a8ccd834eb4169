--- arguments.lua: holds calls to what is declared of a function. The text of an argument, in an op's record or in the
-- comment above a function, begins with what kind of value it is ("tensor f32 (N,D)", "array of sizes", "integer of 1
-- or more", `"ce" or "l2"`); a call with another kind of value, with too few or with too many is refused at the user's
-- line, by the name of the argument and in the words that help prints:
--
--     matmul: b is 'x', expected a tensor f32 (k,n) or (B,k,n)
--
-- Several kinds may stand there with "or" between them, up to the first ";", ":" or full stop: "dimension, or array of
-- dimensions; nil is all". What a text says beyond kinds (shapes, ranges) the function checks itself.
--
-- The check of a function is made when it is first called, from the record or the source file, and costs a few
-- comparisons from then on. Where the source is not there, nothing is checked.

local check = require "vertex.check"
local comments = require "vertex.comments"
local core = require "vertex.core"

-- classes: name in messages → class whose methods are checked; help finds its methods there
local arguments = { classes = {} }

local Tensor, fail = core.Tensor, core.fail

-- -- Kinds of values --------------------------------------------------------------------------------------------------

-- word in a text → kind of value
local KIND_OF = {
  tensor = "tensor", f32 = "tensor", bf16 = "tensor", i32 = "tensor", u8 = "tensor",
  number = "number", probability = "number", integer = "integer", size = "integer", dimension = "integer",
  count = "count", -- stands for "number of ..." and "how many"
  string = "string", name = "string", path = "string", text = "text", boolean = "boolean", ["true"] = "boolean",
  ["function"] = "callable", table = "table", array = "table", ["vx.generator"] = "table",
  module = "object", class = "object", object = "object", quantizer = "object", anything = "any",
}
-- kind of value → the expression that tests a value @
local TEST_OF = {
  tensor = "getmetatable(@) == Tensor",
  number = 'type(@) == "number"',
  integer = 'type(@) == "number" and @ % 1 == 0',
  count = 'type(@) == "number" and @ % 1 == 0 and @ >= 0',
  string = 'type(@) == "string"',
  text = 'type(@) == "string" or type(@) == "number"',
  boolean = 'type(@) == "boolean"',
  callable = 'type(@) == "function" or callable(@)',
  table = 'type(@) == "table" and getmetatable(@) ~= Tensor',
  object = 'type(@) == "table" and getmetatable(@) ~= Tensor and getmetatable(@) ~= nil',
}
local WORDS_OF = { integer = "an integer: ", count = "an integer of 0 or more: " }

--- Says whether a value other than a function can be called.
local function callable(value)
  local meta = getmetatable(value)
  return type(meta) == "table" and rawget(meta, "__call") ~= nil
end

--- Gives a text up to its first ";", ":" or full stop outside of brackets.
local function clause_of(text)
  local masked = text:gsub("%b{}", function(s) return ("x"):rep(#s) end):gsub("%b()", function(s)
    return ("x"):rep(#s)
  end):gsub('"[^"]*"', function(s) return ("x"):rep(#s) end)
  return text:sub(1, (masked:find "[;:%.]%f[%s%z]" or #text + 1) - 1)
end

--- Finds the kinds of values that an argument may be.
-- @param text of the argument
-- @return table kind → true; empty where the text names none
-- @return the part of the text that names them
function arguments.kinds(text)
  local clause, kinds = clause_of(text:gsub("%s+", " ")), {}
  local bare = clause:gsub("%b{}", " table "):gsub("%b()", " "):gsub('"[^"]*"', " string ")
  bare = bare:gsub("%f[%w]number of (%a)", " count %1"):gsub("%f[%w]how many%f[%W]", " count ")
    :gsub("%f[%w]any value%f[%W]", " anything ")
  for alternative in (bare .. " or "):gmatch "(.-)%f[%w]or%f[%W]" do
    for word in alternative:gmatch "[%w_.]+" do
      if KIND_OF[word] then
        kinds[KIND_OF[word]] = true
        break
      end
    end
  end
  return kinds, clause
end

-- -- What a call is told ----------------------------------------------------------------------------------------------

--- Writes a value as messages show it.
local function shown(value)
  if core.is_tensor(value) then
    return core.is_released(value) and "a released tensor"
      or ("a tensor %s %s"):format(value:dtype(), core.shape_text(value))
  end
  local class = type(value) == "table" and getmetatable(value)
  if type(class) == "table" and rawget(class, "is_module") then return "a module " .. tostring(class.name) end
  local text = check.show(value)
  return #text > 60 and text:sub(1, 56) .. "...'" or text
end

local ARTICLE = { tensor = "a ", number = "a ", string = "a ", ["function"] = "a ", table = "a ", module = "a ",
  text = "a ", name = "a ", path = "a ", class = "a ", boolean = "a ", dimension = "a ", probability = "a ",
  smoothed = "a ", array = "an ", integer = "an ", object = "an ", one = "" }

--- Raises that an argument is of none of its kinds.
local function refuse(who, arg, value)
  local exact = type(value) == "number" and (arg.kinds.integer and WORDS_OF.integer or arg.kinds.count
    and WORDS_OF.count)
  local words = exact and not arg.clause:find "^integer" and exact
    or ARTICLE[arg.clause:match "^%a+" or ""] or ""
  fail("%s: %s is %s, expected %s%s", who, arg.name, shown(value), words, arg.clause)
end

--- Raises that a method was called without its object.
local function no_object(who, value)
  fail("%s: called on %s; a method takes its object before a colon, as in x:%s(...)", who, shown(value),
    who:match ":?([%w_]+)$" == who and "forward" or who:match "[%w_]+$")
end

--- Raises that a call has more arguments than the function takes.
local function too_many(who, args, value)
  local names = {}
  for _, arg in ipairs(args) do
    if not arg.object then names[#names + 1] = arg.name end
  end
  fail("%s: one argument too many, %s; it takes %s", who, shown(value),
    #names > 0 and "(" .. table.concat(names, ", ") .. ")" or "none")
end

-- -- The checks -------------------------------------------------------------------------------------------------------

--- Writes a list "a1, a2, ..." of n names.
local function parameters(n)
  local names = {}
  for i = 1, n do names[i] = "a" .. i end
  return table.concat(names, ", ")
end

--- Makes a chunk of this file's name, so that errors point at who called.
local function compiled(code)
  return setfenv(assert(loadstring(code, debug.getinfo(1, "S").source)), getfenv(1))
end

--- Makes the function that checks the arguments of a call.
-- @param who what messages call the function
-- @param args array of { name =, text =, optional = }, one for each parameter; without a text it is not checked
-- @param variadic true: more may follow
local function checker(who, args, variadic)
  local lines, methods = {}, {}
  for i, arg in ipairs(args) do
    local value, tests = "a" .. i, {}
    if arg.object then
      methods[1] = ("if not (%s) then no_object(who, %s) end"):format(TEST_OF[arg.object]:gsub("@", value), value)
    elseif arg.text then
      arg.kinds, arg.clause = arguments.kinds(arg.text)
      for kind in pairs(arg.kinds) do
        if TEST_OF[kind] then tests[#tests + 1] = TEST_OF[kind]:gsub("@", value) end
      end
      if #tests > 0 and not arg.kinds.any then
        table.sort(tests)
        lines[#lines + 1] = ("if %snot (%s) then refuse(who, args[%d], %s) end"):format(arg.optional
          and value .. " ~= nil and " or "", table.concat(tests, " or "), i, value)
      end
    end
  end
  local n = parameters(#args)
  local code = ([[
local who, args, Tensor, callable, refuse, too_many, no_object = ...
local getmetatable, type = getmetatable, type
return function(%s)
  %s
  %s
  %s
end]]):format(n .. (#args > 0 and ", " or "") .. (variadic and "..." or "more"), methods[1] or "",
    table.concat(lines, "\n  "), variadic and "" or "if more ~= nil then too_many(who, args, more) end")
  return compiled(code)(who, args, Tensor, callable, refuse, too_many, no_object)
end

local makers = {} -- by number of parameters: makes a function that checks, then calls

--- Gives the function that takes the place of another: the first call replaces `check` by what `make` gives.
local function maker(n, variadic)
  local key = variadic and -n - 1 or n
  if not makers[key] then
    local names = variadic and "..." or parameters(n)
    makers[key] = compiled(([[
local f, make = ...
local check
function check(...)
  check = make()
  return check(...)
end
return function(%s)
  check(%s)
  return f(%s)
end]]):format(variadic and "..." or n > 0 and names .. ", more" or "more",
      variadic and "..." or n > 0 and names .. ", more" or "more", names))
  end
  return makers[key]
end

-- -- Functions with checks --------------------------------------------------------------------------------------------

local plain = setmetatable({}, { __mode = "k" }) -- function with checks → the one without

--- Gives the function that a function with checks calls; any other value as it is.
function arguments.plain(f) return f ~= nil and plain[f] or f end

--- Gives a function that checks the arguments of an op, as its record declares them, and calls it.
-- @param op table, the record
-- @param f function
function arguments.of_record(op, f)
  local args, variadic = {}, false
  for i, arg in ipairs(op.args) do
    if arg[1] == "..." then
      variadic = true
    else
      args[i] = { name = arg[1], text = arg[2], optional = arg.optional or arg.default ~= nil }
    end
  end
  local checked = maker(#args, variadic)(f, function() return checker(op.name, args, variadic) end)
  plain[checked] = f
  return checked
end

local sources = setmetatable({}, { __mode = "v" }) -- lines of a file, as long as somebody has them

local function lines_of(path)
  if not sources[path] then
    local file = io.open(path)
    sources[path] = comments.lines_of(file and file:read "*a")
    if file then file:close() end
  end
  return sources[path]
end

--- Gives the parameters of a function with what the comment above it declares of them; behind them, as optional ones,
-- what else the method takes that it overrides.
local function declared(f, above, object, overridden)
  local info, args = debug.getinfo(f, "Su"), {}
  local by_name = {}
  local doc = comments.parsed(above(lines_of(info.source:sub(2)), info.linedefined))
  for _, arg in ipairs(doc.args) do by_name[arg.name] = arg end
  for i = 1, info.nparams do
    local name = debug.getlocal(f, i)
    local arg = by_name[name]
    args[i] = { name = name, text = arg and arg.text, optional = arg and arg.optional,
      object = name == "self" and object }
  end
  local taken = overridden and declared(overridden, comments.above) or {}
  for i = info.nparams + 1, #taken do
    args[i] = taken[i]
    args[i].optional = true
  end
  return args
end

--- Gives a function that checks the arguments of a call, as the comment above f declares them, and calls f.
-- @param who what messages call the function
-- @param f function of a file of this library
-- @param[opt] above function(lines, line) that finds the comment; comments.above
-- @param[opt] object "tensor" or "object": what kind of value `self` is
-- @param[opt] overridden method that f overrides: f may be called with as many arguments
function arguments.checked(who, f, above, object, overridden)
  local info = debug.getinfo(f, "Su")
  if plain[f] or info.what ~= "Lua" or info.source:sub(1, 1) ~= "@" then return f end
  local n = math.max(info.nparams, overridden and debug.getinfo(overridden, "u").nparams or 0)
  local checked = maker(n, info.isvararg)(f, function()
    return checker(who, declared(f, above or comments.above, object or "object", overridden), info.isvararg)
  end)
  plain[checked] = f
  return checked
end

--- Gives the method of this name that takes the most, of the classes that a class extends; nil where none has one.
local function inherited(class, key)
  local parent, found, most = (getmetatable(class) or {}).__index, nil, -1
  while type(parent) == "table" do
    local f = arguments.plain(rawget(parent, key))
    local n = type(f) == "function" and debug.getinfo(f, "u").nparams or -1
    if n > most then found, most = f, n end
    parent = (getmetatable(parent) or {}).__index
  end
  return found
end

--- Puts functions that check their arguments in the place of a class's methods.
-- @param name what messages call the class
-- @param class table
function arguments.guard_class(name, class)
  arguments.classes[name] = class

  for key, f in pairs(class) do
    if type(f) == "function" and type(key) == "string" and not key:find "^_" then
      local own = key == "init" or key == "forward"
      class[key] = arguments.checked(own and name or name .. ":" .. key, f,
        key == "init" and comments.above_constructor or nil, nil, inherited(class, key))
    end
  end
end

-- Methods of tensors that ops ask all the time: they check for themselves what they are called on.
local ASKED = { device = true, dim = true, dtype = true, is_contiguous = true, numel = true, shape = true, size = true,
  strides = true }

--- Puts functions that check their arguments in the place of the methods of tensors.
function arguments.guard_tensor(class)
  for key, f in pairs(class) do
    if type(f) == "function" and not key:find "^_" and not ASKED[key] then
      class[key] = arguments.checked(key, f, nil, "tensor")
    end
  end
end

--- Puts functions that check their arguments in the place of a module's functions, and of those of its classes and of
-- the modules in it.
-- @param t table, as require gave it
-- @return t
function arguments.guard(t)
  local module = {}
  for _, loaded in pairs(package.loaded) do module[loaded] = true end
  for key, value in pairs(t) do
    if type(value) == "function" and type(key) == "string" then
      t[key] = arguments.checked(key, value)
    elseif type(value) == "table" and rawget(value, "is_module") == true then
      arguments.guard_class(value.name, value)

    elseif type(value) == "table" and rawget(value, "__index") == value then
      arguments.guard_class(key, value)

    elseif module[value] and value ~= t then
      arguments.guard(value)
    end
  end
  return t
end

return arguments
