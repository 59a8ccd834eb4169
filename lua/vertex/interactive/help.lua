--- help.lua: what `?name` says in a session: the comment above a definition, a file's banner for a module, an op's
-- contract, a quantizer's options. The texts are read from the sources when asked for, so they cannot drift from them.

local core = require "vertex.core"
local nn = require "vertex.nn"
local registry = require "vertex.quantizers"
local show = require "vertex.interactive.show"
local tape = require "vertex.tape"

local help = {}

local WIDTH = 120 -- columns, where nobody says how many there are
local MANY = 40 -- a list of more names is given without what each is

-- -- Comments ---------------------------------------------------------------------------------------------------------

local function lines_of(text)
  local lines = {}
  for line in ((text or "") .. "\n"):gmatch "(.-)\n" do lines[#lines + 1] = line end
  return lines
end

--- Tags as documentation generators read them, as a reader does.
local function plain(line)
  line = line:gsub("^@t?param%[opt%]%s*(%S+)", "%1 (optional):"):gsub("^@t?param%s+(%S+)", "%1:"):gsub("^@t?return%s*",
    "returns ")
  return not line:find "^@" and line or nil
end

--- The comment in lines first .. last, where one begins with "---"; else all of it.
local function comment_text(lines, first, last)
  for i = last, first, -1 do
    if lines[i]:find "^%s*%-%-%-[^%-]" then
      first = i
      break
    end
  end
  local out = {}
  for i = first, last do
    if not lines[i]:find "^%s*%-%- ?%-%- " then out[#out + 1] = plain(lines[i]:gsub("^%s*%-%-%-?%s?", "", 1)) end
  end
  local text = table.concat(out, "\n"):gsub("^%s+", ""):gsub("%s+$", "")
  return text ~= "" and text or nil
end

--- What is said of the definition at line n: above it, above the functions it follows without a line between, or behind
-- it.
local function comment_at(lines, n)
  local at = n
  while lines[at] do
    local first = at
    while first > 1 and lines[first - 1]:find "^%s*%-%-" do first = first - 1 end
    local text = first < at and comment_text(lines, first, at - 1)
    if text then return text end
    local above = lines[n]:find "^function" and lines[at - 1] or ""
    if above:find "^function .* end$" then
      at = at - 1
    elseif above == "end" then
      repeat at = at - 1 until at < 1 or lines[at]:find "^function"
    else
      break
    end
  end
  return lines[n] and lines[n]:match "[%w%)%}\"{(] *%-%- (.+)$"
end

--- A file's banner: the comment it begins with.
local function banner(lines)
  local first = lines[1] and lines[1]:find "^#!" and 2 or 1
  local last = first - 1
  while lines[last + 1] and lines[last + 1]:find "^%-%-" do last = last + 1 end
  if last < first then return nil end
  local out = {}
  for i = first, last do out[#out + 1] = plain(lines[i]:gsub("^%-%-%-?%s?", "", 1)) end
  return table.concat(out, "\n")
end

local ABBREVIATIONS = { ["e.g"] = true, ["i.e"] = true, Eq = true, Fig = true, Sec = true, al = true, cf = true,
  vs = true }

--- The first sentence, on one line.
local function first_sentence(text)
  local line = text:match "^(.-)\n%s*\n" or text
  line = line:gsub("%s*\n%s*", " ")
  for word, after in line:gmatch "([%w%.]+)%.()%s" do
    if not ABBREVIATIONS[word] then return line:sub(1, after - 1) end
  end
  return line
end

--- Text in lines of `width` columns: a longer line is broken at spaces. What is left of it begins the next line of the
-- same paragraph; of an indented line, such as code, it stands alone, `hang` columns further in.
local function filled(text, width, hang)
  local out, rest = {}, nil
  for _, line in ipairs(lines_of(text)) do
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

-- -- Where things are defined -----------------------------------------------------------------------------------------

local ops_source = "@" .. core.directory .. "/ops/init.lua"

--- The line that says define("name", ...) in one way or another.
local function line_of_op(lines, name)
  for n, line in ipairs(lines) do
    if line:find('^[%w_]+%("' .. name .. '"[,%)]') then return n end
  end
end

--- Names of the C ops (ops.def) a function calls, itself or through helpers beside it.
local function c_ops(session, f, found, seen)
  local info = debug.getinfo(f, "Su")
  if info.source ~= ops_source or seen[f] then return end
  seen[f] = true
  local lines = lines_of(session:text(info.source))
  for n = info.linedefined, info.lastlinedefined do
    for name in (lines[n] or ""):gmatch "C%.vx_([%w_]+)" do found[name] = true end
  end
  for i = 1, info.nups do
    local _, helper = debug.getupvalue(f, i)
    if type(helper) == "function" then c_ops(session, helper, found, seen) end
  end
end

local function c_op_text(op, width)
  return filled(("in C: %s   %s\n"):format(op.name, op.contract), width, 4) .. filled("    " .. op.text, width)
end

--- Contracts of the C ops behind a function of ops.lua; "" for other functions. Copies and conversions are no op's
-- purpose.
local function contracts(session, f, width)
  local found, out = {}, {}
  c_ops(session, f, found, {})
  for _, op in ipairs(core.op_list()) do
    if found[op.name] and not (op.name == "fill" or op.name == "convert") then out[#out + 1] = c_op_text(op, width) end
  end
  return table.concat(out, "\n")
end

-- -- Functions --------------------------------------------------------------------------------------------------------

--- A function's parameters and what is said of it. method: its first parameter is the object before the colon.
local function function_doc(session, f, method)
  local op = tape.op_of[f]
  local lines, n
  if op then
    lines = lines_of(session:text(ops_source))
    n = line_of_op(lines, op.name)
  else
    local info = debug.getinfo(f, "S")
    if info.what == "C" then return nil end
    lines, n = lines_of(session:text(info.source)), info.linedefined
  end
  local parameters = show.parameters(f)
  if method then parameters = parameters:gsub("^[%w_]+,? ?", "") else parameters = parameters:gsub("^self,? ?", "") end
  return { parameters = parameters, text = n and comment_at(lines, n), op = op,
    place = op and n and "lua/vertex/ops/init.lua:" .. n or show.place(f) }
end

local Example = { __tostring = function(x) return "x" .. core.shape_text(x) end }

--- The first of the calls an op is tested with; nil where its cases need more than shapes.
local function example(op, name)
  local ok, cases = pcall(op.cases or error, function(shape) return setmetatable({ unpack(shape) }, Example) end)
  if not ok then return nil end
  local texts = {}
  for i = 1, #cases[1] do texts[i] = show.value(cases[1][i]) end
  return ("e.g. %s(%s), where x(...) is a tensor of that shape"):format(name, table.concat(texts, ", "))
end

local function about_function(session, f, name, width)
  local doc = function_doc(session, f, name:find ":" ~= nil)
  if not doc then return name .. ", a function of Lua itself (or of a library in C): see the Lua 5.1 manual" end
  local out = { ("%s(%s)   %s"):format(name, doc.parameters, doc.place) }
  out[#out + 1] = doc.text and filled(doc.text, width)
  if doc.op then
    out[#out + 1] = doc.op.backward and "Differentiable." or nil
    out[#out + 1] = example(doc.op, "vx." .. doc.op.name)
  end
  local contract = contracts(session, doc.op and doc.op.forward or f, width)
  if contract ~= "" then out[#out + 1] = contract end
  if not doc.text and not doc.op then out[#out + 1] = "No comment stands above it." end
  return table.concat(out, "\n")
end

-- -- Tables: modules, classes, objects --------------------------------------------------------------------------------


local about_class

--- A table's names: what each is, or in columns where there are many.
local function contents(session, t, separator, width)
  local names = show.names(t)
  if #names == 0 then return nil end
  if #names > MANY then return show.columns(names, width) end
  local heads, longest = {}, 0
  for i, name in ipairs(names) do
    local value = t[name]
    local doc = type(value) == "function" and function_doc(session, value, separator == ":")
      or about_class(session, value)
    local head = separator .. name .. (doc and "(" .. doc.parameters .. ")" or "")
    local text = doc and doc.text and first_sentence(doc.text)
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

--- A module class (nn.module): its constructor's parameters and its comment; nil for other values.
function about_class(session, class)
  if type(class) ~= "table" or rawget(class, "is_module") ~= true then return nil end
  local method = rawget(class, "init") or rawget(class, "setup") or rawget(class, "forward")
  local info = debug.getinfo(method or class.init, "S")
  local lines = lines_of(session:text(info.source))
  local text
  for n, line in ipairs(lines) do
    local name = line:match "= *[%w_.]*module *%(? *\"([%w_]+)\"" or line:match "%.extend *%(? *\"([%w_]+)\""
    if name == class.name then
      text = comment_at(lines, n) or (method and n == info.linedefined - 1 and comment_at(lines, n))
    end
  end
  local parameters = rawget(class, "init") and show.parameters(class.init):gsub("^self,? ?", "") or ""
  return { text = text, parameters = parameters, place = show.place(method or class.init) }
end

--- A quantizer of the registry: what it does, where it is from, its options.
local function about_quantizer(name, width)
  local item = registry.by_name[name]
  local out = { ("vx.quantizer(%q, options)"):format(name), ("%s   (%s)"):format(item.summary, item.paper), "options:" }
  for _, o in ipairs(item.options) do
    local default = o.default ~= nil and show.value(o.default) or "-"
    local line = ("  %-14s %-8s %s"):format(o.name, default, o.meaning)
    out[#out + 1] = filled(line, width, 24)
  end
  return table.concat(out, "\n")
end

local function about_table(session, t, name, width)
  local module = show.module_name(t)
  if module then
    local path = package.searchpath(module, package.path)
    local text = path and banner(lines_of(session:text("@" .. path)))
    local names = contents(session, t, ".", width)
    return ("module %s%s%s"):format(module, text and "\n" .. filled(text, width) or "", names and "\n\n" .. names or "")
  end
  local class = about_class(session, t)
  if class then
    return ("%s(%s), a class of modules   %s%s"):format(name, class.parameters, class.place,
      class.text and "\n" .. filled(class.text, width) or "")
  end
  local meta = getmetatable(t)
  if not meta and rawget(t, "__index") then
    return ("%s, a class with the methods\n%s"):format(name, contents(session, t, ":", width) or "")
  end
  local out = { show.value(t) }
  local kind = type(meta) == "table" and (rawget(meta, "__index") or meta)
  if nn.is_module(t) then
    if registry.by_name[t.label] then
      out[#out + 1] = "\n" .. about_quantizer(t.label, width)
    else
      class = about_class(session, meta)
      out[#out + 1] = class and class.text and filled(class.text, width)
    end
  elseif type(kind) == "table" then
    local names = contents(session, kind, ":", width)
    out[#out + 1] = names and "\n" .. names
  end
  return table.concat(out, "\n")
end

-- -- Asking -----------------------------------------------------------------------------------------------------------

--- A name where the session knows none: of the library, of a tensor's methods.
local function elsewhere(session, name)
  local vx = require "vertex"
  local method = name:match "^[%a_][%w_]*:([%a_][%w_]*)$"
  if method and core.Tensor[method] then return core.Tensor[method], name end
  if not name:find "^[%a_][%w_]*$" then return session:lookup("vx." .. name), "vx." .. name end
  if vx[name] ~= nil then return vx[name], "vx." .. name end
  return core.Tensor[name], "x:" .. name
end

local function about(session, name, width)
  if registry.by_name[name] then return about_quantizer(name, width) end
  local object = session:lookup(name)
  if object == nil then
    local other, full = elsewhere(session, name)
    if other ~= nil then object, name = other, full end
  end
  if object == nil then
    for _, op in ipairs(core.op_list()) do
      if op.name == name then return c_op_text(op, width) end
    end
    return nil, ("nothing is known of '%s'"):format(name)
  end
  if type(object) == "function" then return about_function(session, object, name, width) end
  if type(object) == "table" and not core.is_tensor(object) then return about_table(session, object, name, width) end
  return show.value(object)
end

--- What is known of a name: of a variable, `vx.nn.Linear`, `x:sum`, a quantizer, an op in Lua or C, or a name of the
-- library without its "vx."; in lines of `width` columns.
-- @return text; or nil and why not
function help.about(session, name, width)
  width = width or WIDTH
  name = name:gsub("^[%s%?]+", ""):gsub("%s*[%(%?].*$", ""):gsub("%s+$", "")
  if name == "" then return nil, "no name" end
  local text, reason = about(session, name, width)
  return text, reason
end

return help
