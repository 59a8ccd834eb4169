--- docs.lua: what is known of a function, a class, a module or a quantizer, in one form whoever declares it:
--
--     { text = "Adds up the elements ...",                              nil where nothing is said
--       args = { { name = "dims", text = "dimension, 1-based", optional = true, default = "1" }, ... },
--       returns = "tensor f32 ...", raises = "where ...",               nil where nothing is said
--       source = "Eq. 13", place = "lua/vertex/ops/reduce.lua:41", parameters = "x, dims, keep" }
--
-- Each thing is declared where it is: an op by its record (lua/vertex/ops/record.lua), a function by the comment that
-- ends directly above it, a class by the comment above its constructor, a module by its file's banner, a quantizer by
-- its entry in the registry. Nothing is taken over from a neighbour. vertex/comments.lua says what form comments have.

local arguments = require "vertex.arguments"
local comments = require "vertex.comments"
local show = require "vertex.interactive.show"
local tape = require "vertex.tape"

local docs = {}

-- -- Functions --------------------------------------------------------------------------------------------------------

--- Gives an op's record in the form of this file.
local function of_record(op)
  local args = {}
  for i, arg in ipairs(op.args) do
    args[i] = { name = arg[1], text = arg[2], optional = arg.optional or arg.default ~= nil,
      default = arg.default ~= nil and show.value(arg.default) or nil }
  end
  return { text = op.text, args = args, returns = op.returns, raises = op.raises, source = op.source }
end

--- Reads what is declared of a function.
-- @param session Session, which holds the texts of its inputs and reads those of files
-- @param f function
-- @return table (see the head of this file), with `op`, the record, for an op; nil for a function in C
function docs.of_function(session, f)
  local op = tape.op_of[f]
  f = arguments.plain(f)
  local info = debug.getinfo(f, "S")
  if info.what == "C" then return nil end
  local doc = op and op.text and of_record(op)
    or comments.parsed(comments.above(comments.lines_of(session:text(info.source)), info.linedefined))
  doc.parameters, doc.place, doc.op = show.parameters(f), show.place(f), op
  return doc
end

--- Writes parameters without the object that a call by colon gives: the first of all.
-- @param doc table, of docs.of_function
-- @param method true where the name has a colon
-- @return text such as "x, dims"
function docs.signature(doc, method)
  return (doc.parameters:gsub(method and "^[%w_]+,? ?" or "^self,? ?", ""))
end

-- -- Classes, modules, quantizers -------------------------------------------------------------------------------------

--- Says whether a table is a class of modules (made by nn.module), not a module.
-- @param t any value
-- @return boolean
function docs.is_class(t) return type(t) == "table" and rawget(t, "is_module") == true end

--- Reads what is declared of a class of modules: the comment of its constructor (comments.above_constructor).
-- @param session Session
-- @param class table made by nn.module
-- @return table (see the head of this file); what the constructor returns is the module
function docs.of_class(session, class)
  local init = arguments.plain(class.init)
  local info = debug.getinfo(init, "S")
  local lines = comments.lines_of(session:text(info.source))
  local doc = comments.parsed(comments.above_constructor(lines, info.linedefined))
  doc.returns = doc.returns or ("module %s; called, it does what its :forward does"):format(class.name)
  doc.parameters, doc.place = show.parameters(init):gsub("^self,? ?", ""), show.place(init)
  return doc
end

--- Reads what is declared of a module: its file's banner.
-- @param session Session
-- @param name text, as required: "vertex.optim"
-- @return table with text and place
function docs.of_module(session, name)
  local path = package.searchpath(name, package.path)
  local text = path and comments.banner(comments.lines_of(session:text("@" .. path)))
  return { text = text, args = {}, place = path and show.path(path) }
end

-- Facts that a quantizer's entry may declare, in the order in which they are told.
local FACTS = { "kind", "base", "metric", "estimator", "sampler", "regularizer", "stages", "codebook", "optimizer" }

--- Writes a declared fact: text, number, boolean, or what depends on the options.
local function fact_text(value)
  if type(value) == "function" then return "by the options" end
  return type(value) == "string" and value or show.value(value)
end

--- Reads what is declared of a quantizer.
-- @param session Session
-- @param item table, an entry of vx.quantizers()
-- @return table (see the head of this file); its arguments are the options
function docs.of_quantizer(session, item)
  local args, facts = {}, {}
  for i, o in ipairs(item.options) do
    args[i] = { name = o.name, text = o.meaning, optional = o.default ~= nil,
      default = o.default ~= nil and show.value(o.default) or nil }
  end
  for _, name in ipairs(FACTS) do
    local value = item[name]
    if value ~= nil and not (type(value) == "table" and next(value) == nil) then
      facts[#facts + 1] = name .. " " .. fact_text(value)
    end
  end
  local making = docs.of_function(session, require("vertex.quantizers").quantizer)
  local text = item.summary:gsub("^%l", string.upper) .. "."
  return { text = #facts > 0 and ("%s\nDeclared: %s."):format(text, table.concat(facts, ", ")) or text, args = args,
    returns = making.returns, raises = making.raises, source = item.paper,
    place = item.source and show.path(item.source) }
end

--- Lists the options that a function or a class declares: of each argument that is a table of them, those named
-- `options.NAME` in its comment, or NAME in "{ NAME = ..., ... }".
-- @param doc table (see the head of this file)
-- @return array of names
function docs.options(doc)
  local list, seen = {}, {}
  local function add(name)
    if not seen[name] then list[#list + 1], seen[name] = name, true end
  end
  for _, arg in ipairs(doc.args or {}) do
    local option = arg.name:match "^[%w_]+%.([%w_]+)$"
    if option then add(option) end
    for braces in (not option and arg.text or ""):gmatch "%b{}" do
      for name in braces:gsub('"[^"]*"', ""):gmatch "[{,;]%s*([%a_][%w_]*)%s*[=:]" do add(name) end
    end
  end
  return list
end

--- Reads what is declared of a value of any kind.
-- @param session Session
-- @param value any value
-- @return table (see the head of this file) whose field kind is "function" or "class"; nil for other values
function docs.of_value(session, value)
  local doc = type(value) == "function" and docs.of_function(session, value)
    or docs.is_class(value) and docs.of_class(session, value) or nil
  if doc then doc.kind = type(value) == "function" and "function" or "class" end
  return doc
end

-- -- Sentences --------------------------------------------------------------------------------------------------------

local ABBREVIATIONS = { ["e.g"] = true, ["i.e"] = true, Eq = true, Fig = true, Sec = true, al = true, cf = true,
  vs = true }

--- Gives the first sentence of a text, on one line.
-- @param text text
-- @return text
function docs.first_sentence(text)
  local line = text:match "^(.-)\n%s*\n" or text
  line = line:gsub("%s*\n%s*", " ")
  for word, after in line:gmatch "([%w%.]+)%.()%s" do
    if not ABBREVIATIONS[word] then return line:sub(1, after - 1) end
  end
  return line
end

return docs
