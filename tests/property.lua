--- Calls public functions with random arguments: shapes with 0 and 1, views, dtypes, wrong kinds, NaN, huge numbers.
-- A call gives an answer or an error in words at the caller's line: no text of LuaJIT's own, and the memory afterwards
-- is what it was.
--
--   luajit tests/property.lua [CALLS] [SEED]
--
-- It ends with the number of calls and of answers; with a status of 1 where one was told something from inside, or
-- tensors were left.

package.path = "./?.lua;lua/?.lua;lua/?/init.lua;" .. package.path
local arguments = require "vertex.arguments"
local docs = require "vertex.interactive.docs"
local Session = require "vertex.interactive.session"
local tape = require "vertex.tape"
local vx = require "vertex"

local calls, seed = tonumber(arg and arg[1]) or 20000, tonumber(arg and arg[2]) or 1
math.randomseed(seed)
vx.memory_limit(300e6) -- huge shapes are asked for, too
local random = math.random

-- -- What is called ---------------------------------------------------------------------------------------------------

-- What ends or changes the process, waits, reads a terminal, or writes at a place that an argument names.
local LEFT_OUT = { ["vx.dist"] = true, ["vx.runs"] = true, ["vx.display"] = true, ["vx.debug"] = true,
  ["vx.memory_limit"] = true, ["vx.threads"] = true, ["vx.data.save"] = true, ["vx.Quantizer"] = true,
  ["vx.save"] = true,
  ["vx.Tensor.release"] = true, ["vx.ops"] = true, ["vx.data.speech"] = true, ["vx.data.images"] = true,
  ["vx.models"] = true, ["vx.keep"] = true, ["vx.device"] = true, ["vx.nn.Module"] = true }

-- Layers that are called, and what they are made with.
local LAYERS = { Linear = { 3, 4 }, Conv2d = { 3, 4, 3 }, Conv1d = { 3, 4, 3 }, DepthwiseConv2d = { 3 },
  MaxPool2d = { 2 }, AvgPool2d = { 2 }, GroupNorm = { 4 }, LayerNorm = { 4 }, SeparableConv2d = { 3, 4 },
  MultiHeadAttention = { 4, 2 }, Dropout = { 0.5 }, Sequential = {} }

local targets = {} -- array of { name, f }

local function collect(name, t, seen)
  seen[t] = true
  for key, value in pairs(t) do
    local full = name .. "." .. tostring(key)
    if type(key) == "string" and not key:find "^_" and not LEFT_OUT[full] then
      if type(value) == "function" then
        targets[#targets + 1] = { full, value }
      elseif type(value) == "table" and rawget(value, "is_module") == true then
        targets[#targets + 1] = { full, value }
        local layer = LAYERS[key] and value(unpack(LAYERS[key]))
        if layer then targets[#targets + 1] = { full .. ":forward", function(...) return layer:forward(...) end } end
      elseif type(value) == "table" and not seen[value] and (value == vx.Tensor or not getmetatable(value)
        or value == vx.nn or value == vx.optim) then
        collect(full, value, seen)
      end
    end
  end
end
for _, name in ipairs { "data", "plot", "simplex", "metrics", "gradcheck", "kmeans" } do local _ = vx[name] end

local function live()
  collectgarbage()
  collectgarbage()
  return vx.memory().live
end

local before = live()
collect("vx", vx, {})
table.sort(targets, function(a, b) return a[1] < b[1] end)

-- -- Random arguments -------------------------------------------------------------------------------------------------

local function pick(list) return list[random(#list)] end

local SIZES = { 0, 1, 1, 2, 3, 3, 4, 5, 7, 16, 17 }
local NUMBERS = { 0, 1, 2, 3, 4, -1, 0.5, 1.5, 1e-30, 1e30, 2 ^ 31, 2 ^ 53, -2 ^ 63, 1 / 0, -1 / 0, 0 / 0 }
local TEXTS = { "", "x", "f32", "i32", "cpu", "ce", "euclid", "silu", "sum", "softmax-ppl", "tpu", "viridis" }

local function shape()
  local s = {}
  for i = 1, random(0, 4) do s[i] = pick(SIZES) end
  return s
end

local function tensor()
  local dtype = pick { "f32", "f32", "f32", "f32", "i32", "u8", "bf16" }
  local x = vx.zeros(shape(), { dtype = dtype })
  if dtype == "f32" then vx.normal(x) else x:fill(random(0, 3)) end
  if x:numel() > 0 and dtype == "f32" and random(6) == 1 then x:fill(pick(NUMBERS)) end
  if x:dim() > 1 and random(4) == 1 then x = vx.no_grad(vx.transpose, x, 1, -1) end
  if dtype == "f32" and random(4) == 1 and not x._node then x.requires_grad = true end
  return x
end

local value -- value(depth): of any kind

local function list(depth)
  local t = {}
  for i = 1, random(0, 4) do t[i] = value(depth + 1) end
  if random(3) == 1 then
    t[pick { "dtype", "k", "dim", "codes", "bias", "largest", "generator", "lr" }] = value(depth + 1)
  end
  return t
end

function value(depth)
  local kind = random(12)
  if kind <= 5 then return tensor() end
  if kind <= 7 then return pick(NUMBERS) end
  if kind == 8 then return pick(TEXTS) end
  if kind == 9 then return random(2) == 1 end
  if kind == 10 and depth < 3 then return list(depth) end
  if kind == 11 then return shape() end
  if kind == 12 and random(3) == 1 then return function(...) return ... end end
  return nil
end

-- kind of value (vertex/arguments.lua) → makes one
local OF_KIND = { tensor = tensor, number = function() return pick(NUMBERS) end,
  integer = function() return random(-2, 5) end, count = function() return random(0, 5) end,
  string = function() return pick(TEXTS) end, text = function() return pick(TEXTS) end,
  boolean = function() return random(2) == 1 end, callable = function() return function(x) return x end end,
  table = function() return random(2) == 1 and shape() or list(2) end, object = function() return nil end,
  any = function() return value(0) end }

local session = Session.new()

--- Gives the kinds of the arguments of a function, as they are declared: array of arrays; empty where nothing is.
local function kinds_of(f)
  local doc = type(f) == "function" and docs.of_function(session, f) or docs.is_class(f) and docs.of_class(session, f)
  local list_of = {}
  for i, arg in ipairs(doc and doc.args or {}) do
    if arg.name:find(".", 1, true) then break end
    local kinds = {}
    for kind in pairs((arguments.kinds(arg.text or ""))) do kinds[#kinds + 1] = kind end
    table.sort(kinds)
    list_of[i] = kinds
  end
  return list_of
end

--- Gives arguments for a call, and their number: as an op is tested with, but for one; as declared, mostly; or any.
local function arguments_for(f)
  local op, way = tape.op_of[f], random(10)
  local given = {}
  if op and op.cases and way <= 4 then
    local case = pick(op.cases(function(size, o)
      local x = vx.zeros(size, { dtype = o and o.dtype })
      return (not o or not o.dtype) and vx.uniform(x, o and o.low or -1, o and o.high or 1) or x
    end))
    local n = table.maxn(case)
    for i = 1, n do given[i] = case[i] end
    if way <= 3 and n > 0 then given[random(n)] = value(0) end
    return given, n
  end
  local kinds = way <= 8 and kinds_of(f) or {}
  local n = math.max(#kinds, random(0, 4))
  for i = 1, n do
    if kinds[i] and kinds[i][1] and random(8) > 1 then given[i] = OF_KIND[pick(kinds[i])]() else given[i] = value(0) end
  end
  return given, n
end

-- what may be wrong with a message: it is LuaJIT's, of a line of ours
local INSIDE = { "attempt to", "bad argument", "cannot convert", "stack overflow", "lua/vertex/", "number expected",
  "invalid value", "wrong number of", "not enough memory", "too many results" }

local function from_inside(message)
  if type(message) ~= "string" then return "no text" end
  for _, words in ipairs(INSIDE) do
    if message:find(words, 1, true) then return words end
  end
end

-- -- The calls --------------------------------------------------------------------------------------------------------

local found, answers = {}, 0
local verbose = os.getenv "PROPERTY_TRACE"

for i = 1, calls do
  local target = pick(targets)
  local given, n = arguments_for(target[2])
  if verbose then io.stderr:write(i, " ", target[1], "\n") end
  local drawn, answered = vx.random_state().drawn, false
  local ok, message = pcall(vx.step, function()
    local result = target[2](unpack(given, 1, n))
    answers, answered = answers + 1, true
    if vx.is_tensor(result) and result.requires_grad and result._node and random(4) == 1 then
      vx.sum(result):backward()
    end
  end)
  local words = not ok and from_inside(message)
  if words then
    local key = target[1] .. ": " .. tostring(message)
    if not found[key] then
      found[key] = true
      io.stderr:write(key, "\n")
    end
  end
  if not answered and vx.random_state().drawn ~= drawn then
    local key = ("%s: refused after a draw: %s"):format(target[1], tostring(message))
    if not found[key] then
      found[key] = true
      io.stderr:write(key, "\n")
    end
  end
  for k = 1, n do
    if vx.is_tensor(given[k]) then given[k]:release() end
  end
  if vx.autocast() ~= "f32" then vx.autocast "f32" end
  if i % 1000 == 0 then collectgarbage() end
end

local inside = 0
for _ in pairs(found) do inside = inside + 1 end
print(("%d calls of %d functions: %d answers, the rest errors; %d told from inside"):format(calls, #targets, answers,
  inside))
targets = nil -- and with them the layers, whose parameters keep memory for their gradients
local left = live() - before
if left ~= 0 then print(("%d bytes of tensors are left of them"):format(left)) end
os.exit(inside == 0 and left == 0 and 0 or 1, true)
