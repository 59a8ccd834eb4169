--- names.lua: every public name, with what docs.lua knows of it: what a search by `?word` goes through, and what the
-- page of reference is made of (luajit lua/vertex/interactive/reference.lua).

local arguments = require "vertex.arguments"
local docs = require "vertex.interactive.docs"
local show = require "vertex.interactive.show"

local names = {}

--- Says whether a plain table has functions in it.
local function holds_functions(t)
  if getmetatable(t) then return false end
  for _, value in pairs(t) do
    if type(value) == "function" then return true end
  end
  return false
end

--- Lists the functions, classes and methods that are reached from `vx`, and the methods of the objects that functions
-- give.
-- @param vx table, of require "vertex"
-- @return array of { name, value, module = the name of the module or class that it is listed under }, modules first met
-- first
function names.all(vx)
  local list, seen = {}, {}
  local function add(name, value, module)
    if seen[arguments.plain(value)] then return end
    seen[arguments.plain(value)] = true
    list[#list + 1] = { name = name, value = value, module = module }
  end
  local function add_methods(name, class)
    for _, key in ipairs(show.names(class)) do
      local value = rawget(class, key)
      if type(value) == "function" and key ~= "init" then add(name .. ":" .. key, value, name) end
    end
  end
  local function add_table(name, t)
    if seen[t] then return end
    seen[t] = true
    local inner = {}
    for _, key in ipairs(show.names(t)) do
      local full, value = name .. "." .. key, t[key]
      if type(value) == "function" then
        add(full, value, name)
      elseif docs.is_class(value) then
        add(full, value, name)
        add_methods(full, value)
      elseif type(value) == "table" and value ~= vx.Tensor and rawget(value, "__index") == value then
        add_methods(full, value)
      elseif type(value) == "table" and (value == vx.Tensor or show.module_name(value) or holds_functions(value)) then
        inner[#inner + 1] = { full, value }
      end
    end
    for _, one in ipairs(inner) do
      if one[2] == vx.Tensor then add_methods("x", one[2]) else add_table(one[1], one[2]) end
    end
  end
  add_table("vx", vx)
  local classes = {}
  for name in pairs(arguments.classes) do classes[#classes + 1] = name end
  table.sort(classes)
  for _, name in ipairs(classes) do add_methods(name, arguments.classes[name]) end
  return list
end

--- Lists the last parts of all names: "Linear" of vx.nn.Linear.
function names.last_parts(vx)
  local parts = {}
  for i, entry in ipairs(names.all(vx)) do parts[i] = entry.name:match "[%w_]+$" end
  return parts
end

--- Finds the names that hold a word, and those whose texts do.
-- @param session Session
-- @param vx table, of require "vertex"
-- @param word text
-- @return array of { name, value, doc }: those whose last part is the word, to the letter, then without regard to
-- capitals, then those that hold it, then those whose texts do
-- @return how many are of the first sort
function names.find(session, vx, word)
  local lower = word:lower()
  local found = { {}, {}, {}, {} }
  for _, entry in ipairs(names.all(vx)) do
    local last = entry.name:match "[%w_]+$"
    local rank = last == word and 1 or last:lower() == lower and 2 or entry.name:lower():find(lower, 1, true) and 3
    entry.doc = docs.of_value(session, entry.value)
    local text = entry.doc and entry.doc.text
    if not rank and text and text:lower():find(lower, 1, true) then rank = 4 end
    if rank then found[rank][#found[rank] + 1] = entry end
  end
  local list = {}
  for _, part in ipairs(found) do
    for _, entry in ipairs(part) do list[#list + 1] = entry end
  end
  return list, #found[1]
end

return names
