--- help.lua: what `?name` says in a session: finds what a name means and prints what docs.lua knows of it, with the
-- contract of the C ops behind an op and, for a name of PyTorch's, what does its work here.

local check = require "vertex.check"
local core = require "vertex.core"
local docs = require "vertex.interactive.docs"
local nn = require "vertex.nn"
local public_names = require "vertex.interactive.names"
local registry = require "vertex.quantizers"
local show = require "vertex.interactive.show"
local torch_names = require "vertex.torch_names"

local help = {}

local WIDTH = 120 -- columns, where nobody says how many there are
local MANY = 40 -- a list of more names is given without what each is

-- -- Text in columns --------------------------------------------------------------------------------------------------

--- Breaks lines longer than `width` columns at spaces. What is left of a line begins the next one of its paragraph;
-- that of an indented line, such as code, stands alone, `hang` columns further in.
local function filled(text, width, hang)
  local out, rest = {}, nil
  for line in (text .. "\n"):gmatch "(.-)\n" do
    local indent = line:match "^%s*"
    if rest and (line == "" or line:find "^[%s%[%-%.]") then
      out[#out + 1] = rest
    elseif rest then
      line = rest .. " " .. line
    end
    rest = nil
    while #line > width do
      local at = line:sub(1, width + 1):match "^.*%S()%s+%S*$"
      if not at or at <= #indent + 1 then break end
      out[#out + 1] = line:sub(1, at - 1)
      line = line:sub(at):gsub("^%s+", indent .. (" "):rep(hang or 0))
      rest = indent == "" and not hang and line or nil
      if rest and #rest <= width then break end
    end
    if not rest then out[#out + 1] = line end
  end
  out[#out + 1] = rest
  return table.concat(out, "\n")
end

--- Writes rows of a name and a text, the texts in one column, their further lines below their first.
local function columns(rows, width)
  local longest, out = 0, {}
  for _, row in ipairs(rows) do longest = math.max(longest, math.min(#row[1], 20)) end
  for i, row in ipairs(rows) do
    local text = row[2]:gsub("\n%s*", "\n" .. (" "):rep(longest + 4))
    out[i] = filled(("  %-" .. longest .. "s  %s"):format(row[1], text), width, longest + 2)
  end
  return table.concat(out, "\n")
end

--- Writes arguments, result, errors and source.
local function details(doc, width)
  local rows = {}
  for _, arg in ipairs(doc.args or {}) do
    local note = arg.default and (" (default %s)"):format(arg.default) or arg.optional and " (optional)" or ""
    rows[#rows + 1] = { arg.name, (arg.text or "") .. note }
  end
  for _, part in ipairs { { "returns", doc.returns }, { "error", doc.raises }, { "source", doc.source } } do
    if part[2] then rows[#rows + 1] = part end
  end
  return rows[1] and columns(rows, width)
end

-- -- Functions --------------------------------------------------------------------------------------------------------

--- Writes the contract and the sentence of an op of core/ops.def.
local function c_op_text(op, width)
  return filled(("in C: %s   %s\n"):format(op.name, op.contract), width, 4) .. filled("    " .. op.text, width)
end

--- Writes those of the ops of ops.def that an op's record names.
local function contracts(record, width)
  local called, out = {}, {}
  for _, name in ipairs(record.calls or {}) do called[name] = true end
  for _, op in ipairs(core.op_list()) do
    if called[op.name] then out[#out + 1] = c_op_text(op, width) end
  end
  return out[1] and table.concat(out, "\n")
end

local Example = { __tostring = function(x) return "x" .. core.shape_text(x) end }

--- Writes the first of the calls that an op is tested with; nil where its cases need more than shapes.
local function example(op, name)
  local ok, cases = pcall(op.cases or error, function(shape) return setmetatable({ unpack(shape) }, Example) end)
  if not ok then return nil end
  local texts = {}
  for i = 1, #cases[1] do texts[i] = show.value(cases[1][i]) end
  return ("e.g. %s(%s), where x(...) is a tensor of that shape"):format(name, table.concat(texts, ", "))
end

--- Writes all about a function.
local function about_function(session, f, name, width)
  local doc = docs.of_function(session, f)
  if not doc then return name .. ", a function of Lua itself (or of a library in C): see the Lua 5.1 manual" end
  local out = { ("%s(%s)   %s"):format(name, docs.signature(doc, name:find ":" ~= nil), doc.place) }
  local function add(text) out[#out + 1] = text end
  add(filled(doc.text or "No comment stands above it.", width))
  add(details(doc, width))
  local op = doc.op
  if op then
    add((op.backward or op.composite) and "Differentiable." or nil)
    add(example(op, "vx." .. op.name))
    local note = torch_names.note(op)
    add(note and filled(note, width, 2))
    add(contracts(op, width))
  end
  return table.concat(out, "\n")
end

-- -- Tables: modules, classes, objects --------------------------------------------------------------------------------

--- Lists a table's names: each with its first sentence, or in columns where there are many.
local function contents(session, t, separator, width)
  local names = show.names(t)
  if #names == 0 then return nil end
  if #names > MANY then return show.columns(names, width) end
  local heads, longest = {}, 0
  for i, name in ipairs(names) do
    local value = t[name]
    local doc = docs.of_value(session, value)
    local head = separator .. name .. (doc and "(" .. docs.signature(doc, separator == ":") .. ")" or "")
    local text = doc and doc.text and docs.first_sentence(doc.text)
      or type(value) ~= "function" and type(value) ~= "table" and show.value(value) or ""
    heads[i] = { #head > 46 and head:sub(1, 43) .. "..." or head, text }
    longest = math.max(longest, #heads[i][1])
  end
  local out = {}
  for i, entry in ipairs(heads) do
    local line = ("  %-" .. longest .. "s  %s"):format(entry[1], entry[2]):gsub("%s+$", "")
    out[i] = #line > width and line:sub(1, width - 4) .. " ..." or line
  end
  return table.concat(out, "\n")
end

--- Writes a module's banner and what is in it.
local function about_module(session, t, module, width)
  local doc, names = docs.of_module(session, module), contents(session, t, ".", width)
  return ("module %s%s%s"):format(module, doc.text and "\n" .. filled(doc.text, width) or "",
    names and "\n\n" .. names or "")
end

--- Writes all about a class of modules.
local function about_class(session, class, name, width)
  local doc = docs.of_class(session, class)
  return table.concat({ ("%s(%s), a class of modules   %s"):format(name, doc.parameters, doc.place),
    filled(doc.text or "No comment stands above its constructor.", width), details(doc, width) }, "\n")
end

--- Writes all about a quantizer of the registry.
local function about_quantizer(session, name, width)
  local doc = docs.of_quantizer(session, registry.by_name[name])
  return table.concat({ ("vx.quantizer(%q, options)   %s"):format(name, doc.place), filled(doc.text, width),
    details(doc, width) }, "\n")
end

--- Writes an object's value, then its class: a quantizer's options, a module's comment, or the methods.
local function about_object(session, t, width)
  local out, meta = { show.value(t) }, getmetatable(t)
  local methods = type(meta) == "table" and (rawget(meta, "__index") or meta)
  if nn.is_module(t) and registry.by_name[t.label] then
    out[2] = "\n" .. about_quantizer(session, t.label, width)
  elseif nn.is_module(t) then
    out[2] = filled(docs.of_class(session, meta).text or "", width)
  elseif type(methods) == "table" then
    local names = contents(session, methods, ":", width)
    out[2] = names and "\n" .. names
  end
  return table.concat(out, "\n")
end

--- Writes what a table is: a module, a class, or an object.
local function about_table(session, t, name, width)
  local module = show.module_name(t)
  if module then return about_module(session, t, module, width) end
  if docs.is_class(t) then return about_class(session, t, name, width) end
  if not getmetatable(t) and rawget(t, "__index") then
    return ("%s, a class with the methods\n%s"):format(name, contents(session, t, ":", width) or "")
  end
  return about_object(session, t, width)
end

-- -- Asking -----------------------------------------------------------------------------------------------------------

--- Finds a name that the session does not have: of a tensor's methods, of the library.
-- @return the value and its full name; nil where there is none
local function elsewhere(session, name)
  local method = name:match "^[%a_][%w_]*:([%a_][%w_]*)$"
  if method and rawget(core.Tensor, method) then return core.Tensor[method], name end
  local found = session:lookup("vx." .. name)
  if found ~= nil then return found, "vx." .. name end
  if name:find "^[%a_][%w_]*$" then return rawget(core.Tensor, name), "x:" .. name end
end

--- Writes what a name of PyTorch's is here, with the help of that; nil where it is none.
local function about_torch(session, name, width)
  local hint = torch_names.hint(name)
  if not hint then return nil end
  local text = filled(hint.text, width)
  local here = hint.here and help.about(session, hint.here, width)
  return here and text .. "\n\n" .. here or text
end

--- Writes all about a function, a class or a module under a name.
-- @param session Session
-- @param value function or table
-- @param name text that it is called
-- @param width columns that a line may have
-- @return text
function help.of_value(session, value, name, width)
  if type(value) == "function" then return about_function(session, value, name, width) end
  return about_table(session, value, name, width)
end

local FOUND = 20 -- names of a search that are listed

--- Writes what a search for a word finds: the help of the only name that ends in it, or a list; else nil.
local function searched(session, word, width)
  if not word:find "^[%a_][%w_]*$" or #word < 2 then return nil end
  local list, same = public_names.find(session, require "vertex", word)
  for _, item in ipairs(registry.list) do
    if (item.name .. " " .. item.summary):lower():find(word:lower(), 1, true) then
      list[#list + 1] = { name = item.name, doc = { text = item.summary .. "." }, quantizer = true }
    end
  end
  if #list == 0 then return nil end
  if #list == 1 and list[1].quantizer then return about_quantizer(session, list[1].name, width) end
  if same == 1 or #list == 1 then return help.of_value(session, list[1].value, list[1].name, width) end
  local rows = {}
  for i = 1, math.min(#list, FOUND) do
    local text = list[i].doc and list[i].doc.text
    rows[i] = { list[i].name, text and docs.first_sentence(text) or "" }
  end
  local longest = 0
  for _, row in ipairs(rows) do longest = math.max(longest, #row[1]) end
  for i, row in ipairs(rows) do
    local line = ("  %-" .. longest .. "s  %s"):format(row[1], row[2])
    rows[i] = #line > width and line:sub(1, width - 4) .. " ..." or line
  end
  if #list > FOUND then rows[#rows + 1] = ("  and %d more"):format(#list - FOUND) end
  return ("found for '%s':\n%s"):format(word, table.concat(rows, "\n"))
end

--- Says whether a value is a function or a table of Lua itself.
local function is_of_lua(value, name)
  return value ~= nil and value == rawget(_G, name) and not show.module_name(value)
end

--- Writes all about a name; nil and why not where nothing is known of it.
local function about(session, name, width, exact)
  if registry.by_name[name] then return about_quantizer(session, name, width) end
  local object = session:lookup(name)
  if is_of_lua(object, name) and session:lookup("vx." .. name) ~= nil then object = nil end -- ?load is vx.load
  if object == nil then
    local other, full = elsewhere(session, name)
    if other ~= nil then object, name = other, full end
  end
  if type(object) == "function" then return about_function(session, object, name, width) end
  if type(object) == "table" and not core.is_tensor(object) then return about_table(session, object, name, width) end
  if object ~= nil then return show.value(object) end
  for _, op in ipairs(core.op_list()) do
    if op.name == name then return c_op_text(op, width) end
  end
  local text = about_torch(session, name, width) or not exact and searched(session, name, width)
  if text then return text end
  local meant = check.nearest(name, public_names.last_parts(require "vertex"))
  return nil, ("nothing is known of '%s'%s"):format(name, meant and (", did you mean '%s'?"):format(meant) or "")
end

--- Explains a name: of a variable, `vx.nn.Linear`, `x:sum`, a quantizer, an op in Lua or in C, a name of the library
-- without its "vx.", or a name of PyTorch's.
-- @param session Session, whose variables the name may mean
-- @param name text; a "?" before it and a call's "(" behind it are ignored
-- @param[opt=120] width columns that a line may have
-- @param[opt=false] exact true: a name that there is not is not looked for in others and in their texts
-- @return text; or nil and why there is none
function help.about(session, name, width, exact)
  name = name:gsub("^[%s%?]+", ""):gsub("%s*[%(%?].*$", ""):gsub("%s+$", "")
  if name == "" then return nil, "no name" end
  return about(session, name, width or WIDTH, exact)
end

--- Explains a name in one line: its parameters and its first sentence.
-- @param session Session
-- @param name text, as of help.about
-- @return text; nil where nothing is declared under the name
function help.line(session, name)
  local value = session:lookup(name)
  local doc = docs.of_value(session, value)
  if not doc then return nil end
  local head = ("%s(%s)"):format(name, docs.signature(doc, name:find ":" ~= nil))
  return doc.text and head .. "  " .. docs.first_sentence(doc.text) or head
end

return help
