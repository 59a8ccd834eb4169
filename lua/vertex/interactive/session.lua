--- session.lua: what the REPL, Jupyter and the notebook runner have in common: inputs that share an environment, their
-- values, errors, interrupts, and completion.
--
-- An input is Lua with two differences. A `local` at its top level makes a variable of the session, since a Lua local
-- would be gone at the end of the input. And an input that is an expression, or ends in one, has that expression's
-- values; they are shown unless a `;` follows, and `_` is the first of them.
--
-- Inputs, and files the session loads, are interpreted, not compiled: LuaJIT looks for Ctrl-C in interpreted code only.
-- The library's functions stay compiled. Ctrl-C raises session.INTERRUPT in the input's code, never inside the library,
-- whose state stays whole, and again after every pcall until the input is over.

local lfs = require "lfs"
local core = require "vertex.core"
local registry = require "vertex.quantizers"
local show = require "vertex.interactive.show"
require "vertex.json" -- in C: later its user may have set package.cpath

local Session = {}
Session.__index = Session

Session.INTERRUPT = setmetatable({}, { __tostring = function() return "interrupted" end })

-- -- Tokens -----------------------------------------------------------------------------------------------------------

--- Calls f(kind, first, last) for every token of a Lua text, until f returns false. kind: "name" (keywords too),
-- "string", "comment", "number" or "sign"; first and last: bytes of the text, 1-based. A string or a long comment that
-- does not end has last = nil.
local function tokens(text, f)
  local at = 1
  while true do
    at = text:find("%S", at)
    if not at then return end
    local kind, last
    local comment = text:match("^%-%-()", at)
    local level = text:match("^%[(=*)%[", comment or at)
    if level then
      kind = comment and "comment" or "string"
      last = select(2, text:find("]" .. level .. "]", comment or at, true))
    elseif comment then
      kind, last = "comment", (text:find("\n", at, true) or #text + 1) - 1
    elseif text:find("^[\"']", at) then
      kind = "string"
      local quote, i = text:sub(at, at), at + 1
      while i <= #text and text:sub(i, i) ~= quote and text:sub(i, i) ~= "\n" do
        i = i + (text:sub(i, i) == "\\" and 2 or 1)
      end
      last = text:sub(i, i) == quote and i or nil
    elseif text:find("^[%a_]", at) then
      kind, last = "name", select(2, text:find("^[%w_]+", at))
    elseif text:find("^%.?%d", at) then
      kind, last = "number", select(2, text:find("^[%w.]+", at))
    else
      kind, last = "sign", at
    end
    if f(kind, at, last) == false or not last then return end
    at = last + 1
  end
end

local DEEPER = { ["function"] = 1, ["do"] = 1, ["if"] = 1, ["repeat"] = 1, ["end"] = -1, ["until"] = -1 }

--- Counts the blocks that are open at the end of a text.
local function depth(text)
  local n = 0
  tokens(text, function(kind, first, last) n = n + (kind == "name" and DEEPER[text:sub(first, last)] or 0) end)
  return n
end

--- Takes each `local` of the top level out of a text: locals become variables of the session.
local function without_locals(text)
  local out, copied, level, state = {}, 1, 0, nil
  local function insert(s, at) -- copies the text up to `at`, then s
    out[#out + 1] = text:sub(copied, at - 1) .. s
    copied = at
  end
  local last_name
  tokens(text, function(kind, first, last)
    if kind == "comment" then return end
    local word = last and text:sub(first, last)
    if state == "names" then -- local a, b without a value
      if kind == "name" and not last_name or word == "," then
        last_name = kind == "name" and last or nil
        return
      end
      if word ~= "=" then insert(" = nil", (last_name or first - 1) + 1) end
      state = nil
    elseif state == "local" then
      state, last_name = word ~= "function" and "names" or nil, last
      if state then return end
    end
    if kind == "name" then
      if word == "local" and level == 0 then
        insert("", first)
        copied, state = last + 1, "local"
      end
      level = level + (DEEPER[word] or 0)
    end
  end)
  if state == "names" then insert(" = nil", (last_name or #text) + 1) end
  out[#out + 1] = text:sub(copied)
  return table.concat(out)
end

--- Writes an input of several lines on one; nil where it has a comment, or a text of several lines, which that would
-- change.
-- @param text string
-- @return string without line ends, or nil
function Session.on_one_line(text)
  local fits = true
  tokens(text, function(kind, first, last)
    fits = last ~= nil and kind ~= "comment" and not (kind == "string" and text:sub(first, last):find("\n", 1, true))
    return fits
  end)
  return fits and (text:gsub("%s*\n%s*", " ")) or nil
end

-- -- Compiling --------------------------------------------------------------------------------------------------------

--- Makes a session.
-- @param[opt] options { env = table of its global variables (default _G), name = function(n) → what its n-th input is
-- called in messages (default "[n]"), warn = function(text): says something about an input (default: on stderr) }
-- @return Session
function Session.new(options)
  options = options or {}
  return setmetatable({ env = options.env or _G, name = options.name or function(n) return "[" .. n .. "]" end,
    warn = options.warn or function(text) io.stderr:write(text, "\n") end, count = 0, inputs = {} }, Session)
end

-- "return nil, f()" rather than "return f()": a tail call would leave no frame that errors could point at.
local VALUES = "return nil, "

--- Compiles a text that ends in an expression after statements; nil where it does not. The expression begins with a
-- line or after a semicolon. statements: the text compiled as statements alone, or nil where it is no such.
local function ending_in_expression(text, name, statements)
  local starts, before, ended = {}, nil, nil -- end and text of the token before
  tokens(text, function(kind, first, last)
    if kind == "comment" then return end
    local line = before and text:sub(before, first - 1):find("\n", 1, true)
    if line or ended == ";" then starts[#starts + 1] = { at = first, line = line and ended ~= ";" } end
    before, ended = last, last and text:sub(first, last)
  end)
  for k = #starts, math.max(1, #starts - 100), -1 do
    local start = starts[k]
    local rest = text:sub(start.at)
    -- text that is all statements can end in a call; it is not cut where a line only goes on, as before "- b" or "(x)"
    if (not statements or not start.line or rest:find "^[%a_]") and loadstring(VALUES .. rest) then
      local head = text:sub(1, start.at - 1)
      local chunk = loadstring(head) and loadstring(head .. VALUES .. rest, name)
      if chunk then return chunk end
    end
  end
end

--- Compiles an input, called `name` in messages. Returns the chunk, and whether it returns its values after a nil; or
-- nil, nil, the message, and whether more lines could complete the input.
local function compile(text, name)
  local equals = text:match "^%s*=()"
  if equals then text = text:sub(equals) end
  local chunk, no_expression = loadstring(VALUES .. text, name)
  if chunk then return chunk, true end
  local bare = without_locals(text)
  local statements, no_statement = loadstring(bare, name)
  if not statements then
    local plain = loadstring(text, name)
    if plain then bare, statements = text, plain end
  end
  chunk = ending_in_expression(bare, name, statements)
  if chunk then return chunk, true end
  if statements then return statements, false end
  local function unfinished(message)
    return message:find "near '<eof>'$" and not message:find("unfinished string", 1, true)
  end
  -- what starts like a statement is explained as one
  local message = text:find "^%s*[%a_]" and not unfinished(no_expression) and no_statement or no_expression
  return nil, nil, message, unfinished(no_expression) or unfinished(no_statement)
end

--- Tells what the Return key should do with a text.
-- @param text string
-- @return "complete", "incomplete" or "invalid"
-- @return for "incomplete", the spaces that the next line begins with
function Session.state(text)
  if not text:find "%S" or text:find "^%s*%?" then return "complete" end
  local chunk, _, _, more = compile(text, "=input")
  if chunk then return "complete" end
  if more then return "incomplete", ("  "):rep(math.max(0, depth(text))) end
  return "invalid"
end

-- -- Errors -----------------------------------------------------------------------------------------------------------

local own = core.directory .. "/"
--- Says whether a source, as debug.getinfo names it, is a file of the library.
local function is_own(source) return source:sub(2, #own + 1) == own end

--- Gives the text of an input or of a Lua file.
-- @param source string, as debug.getinfo names it: "=[1]", "@file.lua"
-- @return string; nil where there is none
function Session:text(source)
  local text = self.inputs[source:sub(2)]
  local file = not text and source:sub(1, 1) == "@" and io.open(source:sub(2), "r")
  if not file then return text end
  text = file:read "*a"
  file:close()
  return text
end

--- Gives a line of an input or a file, without the space around it.
-- @param source string, as debug.getinfo names it
-- @param number of the line, 1-based
-- @return string; nil where there is none
function Session:line(source, number)
  local text = self:text(source)
  if not text then return nil end
  local n = 0
  for line in (text .. "\n"):gmatch "(.-)\n" do
    n = n + 1
    if n == number then return (line:gsub("^%s+", ""):gsub("%s+$", "")) end
  end
end

local FIRST, LAST = 6, 3 -- of a long stack, the first and the last frames are shown

--- Lists the frames that led to an error, innermost first, as debug.getinfo tells them: those of the input's code, and
-- the library's too where the message names one of its files. It runs in the error handler, on what stack is left
-- there.
local function frames_of(self, message)
  local frames, inside = {}, message:find("lua/vertex/", 1, true) ~= nil
  for level = 3, 250 do
    local info = debug.getinfo(level, "Slnf")
    if not info or info.func == self.guarded then break end
    if info.currentline > 0 and (inside or not is_own(info.source)) then frames[#frames + 1] = info end
  end
  return frames
end

--- Writes the frames for people: array of { where, what, line }; "..." stands for those left out of a long stack.
local function explained(self, frames)
  local shown = {}
  for i, info in ipairs(frames) do
    if #frames <= FIRST + LAST + 1 or i <= FIRST or i > #frames - LAST then
      local what = info.what == "main" and "" or info.namewhat ~= "" and info.name
        or ("function at line %d"):format(info.linedefined)
      shown[#shown + 1] = { where = info.short_src .. ":" .. info.currentline, what = what,
        line = self:line(info.source, info.currentline) or "" }
    elseif i == FIRST + 1 then
      shown[#shown + 1] = { where = "...", what = ("%d more"):format(#frames - FIRST - LAST), line = "" }
    end
  end
  return shown
end

--- Writes what went wrong, for people: the message, then the lines of code that led there, innermost first.
-- @param problem table, of Session:run
-- @return string of several lines
function Session.error_text(problem)
  local lines = { problem.message }
  local width = 0
  for _, frame in ipairs(problem.trace) do width = math.max(width, #frame.where + #frame.what + 1) end
  for _, frame in ipairs(problem.trace) do
    lines[#lines + 1] = ("    %-" .. width .. "s  %s"):format(frame.where .. " " .. frame.what, frame.line):gsub("%s+$",
      "")
  end
  return table.concat(lines, "\n")
end

-- -- What Lua takes without a word ------------------------------------------------------------------------------------

--- The names that a text binds itself: locals, parameters, variables of loops, what it assigns to.
local function bound_names(text)
  local bound, before, state = {}, nil, nil
  tokens(text, function(kind, first, last)
    if kind == "comment" or not last then return end
    local word = text:sub(first, last)
    if kind == "name" and (state == "list" or state == "parameters") then bound[word] = true end
    if word == "local" or word == "for" then state = "list"
    elseif word == "function" then state = "function"
    elseif state == "function" and word == "(" then state = "parameters"
    elseif word == "=" or word == "in" or word == ")" or kind == "name" and state == "list" and before ~= ","
      and before ~= "local" and before ~= "for" then state = nil end
    if word == "=" and before and text:sub(last + 1, last + 1) ~= "=" and before:find "^[%a_]" then
      bound[before] = true
    end
    before = word
  end)
  return bound
end

--- Finds where a text asks a tensor for what only tables have: Lua 5.1 counts the fields of the object then, 0, and
-- iterates over none. Names that the text binds itself are left alone.
-- @param text string
-- @return array of warnings
function Session:warnings(text)
  local list, bound = {}, nil
  local function check(chain, asked, says)
    local root = chain:match "^[%a_][%w_]*"
    bound = bound or bound_names(text)
    if bound[root] then return end
    local x = self:lookup(chain)
    if core.is_tensor(x) then
      list[#list + 1] = ("%s: %s is a tensor and no table: %s"):format(asked, chain, says:gsub("@", chain))
    end
  end
  tokens(text, function(kind, first, last)
    if kind == "sign" and text:sub(first, last) == "#" then
      local chain, after = text:match("^#%s*([%a_][%w_.]*)%s*()", first)
      if chain and not text:find("^[%[(:{\"']", after) then
        check(chain, "#" .. chain, "# gives 0; its sizes are @:size(1) and @:shape()")
      end
    elseif kind == "name" and text:sub(first, last):find "^i?pairs$" then
      local chain = text:match("^%s*%(%s*([%a_][%w_.]*)%s*%)", last + 1)
      if chain then
        check(chain, ("%s(%s)"):format(text:sub(first, last), chain),
          "it has no elements for that; write for i = 1, @:size(1) do ... @[i]")
      end
    end
  end)
  return list
end

-- -- Running ----------------------------------------------------------------------------------------------------------

--- Packs what a chunk returned. valued: a nil stands in front of its values.
local function pack(valued, ...)
  if valued then return { n = select("#", ...) - 1, select(2, ...) } end
  return { n = select("#", ...), ... }
end

--- Writes an error object.
local function describe(problem) return type(problem) == "string" and problem or show.value(problem) end

--- Runs an input. It raises nothing: what goes wrong is returned.
-- @param text string
-- @return table { n = number of values, ... }; nil where the input failed
-- @return whether the values are to be shown; or, where it failed, table { message = string, trace = array of { where,
-- what, line }, interrupted = true after Ctrl-C, syntax = true where it is no Lua }
function Session:run(text)
  self.count = self.count + 1
  local name = self.name(self.count)
  self.inputs[name] = text
  local chunk, valued, message = compile(text, "=" .. name)
  if not chunk then
    local source, n = message:match "^(.-):(%d+):"
    local line = source == name and self:line("=" .. name, tonumber(n))
    return nil, { message = message,
      trace = line and line ~= "" and { { where = source .. ":" .. n, what = "", line = line } } or {}, syntax = true }
  end
  jit.off(chunk, true)
  setfenv(chunk, self.env)
  for _, warning in ipairs(self:warnings(text)) do self.warn(warning) end

  local function hook()
    local info = core.interrupted() and debug.getinfo(2, "S")
    if info and not is_own(info.source) then error(Session.INTERRUPT, 0) end
    if self.tick then self.tick() end
  end
  local function handler(problem)
    -- otherwise a system call that the signal ended could say so in its own words
    if core.interrupted() then problem = Session.INTERRUPT end
    local printable, said = pcall(describe, problem)
    if not printable then said = "an error object whose __tostring fails" end
    return { message = said, frames = frames_of(self, said), interrupted = problem == Session.INTERRUPT }
  end
  self.guarded = function() return pack(valued, chunk()) end

  local in_session = core.session_interrupts() -- false where a script runs an input, which leaves no handler behind
  local ok, values = core.with_hook(hook, self.tick and 1000 or 2 ^ 30, xpcall, self.guarded, handler)
  core.session_interrupts(in_session)
  if not ok then
    -- a text alone where the handler failed too
    local problem = type(values) == "table" and values or { message = tostring(values), frames = {} }
    problem.trace = explained(self, problem.frames)
    local overflow = problem.message:match "^.-:0: (stack overflow)$" -- where, LuaJIT does not say
    if overflow and problem.trace[1] then problem.message = problem.trace[1].where .. ": " .. overflow end
    return nil, problem
  end
  if values.n > 0 then rawset(self.env, "_", values[1]) end
  local last
  tokens(text, function(kind, first, final) if kind ~= "comment" then last = final and text:sub(first, final) end end)
  return values, last ~= ";"
end

--- Makes code that require, dofile, loadfile, load and loadstring load from now on interpreted, as inputs are, so that
-- Ctrl-C stops its loops too. The library's own stays compiled.
function Session.interpret_files()
  local function interpreted(f, ...)
    if type(f) == "function" and not is_own(debug.getinfo(f, "S").source) then jit.off(f, true) end
    return f, ...
  end
  for _, name in ipairs { "load", "loadfile", "loadstring" } do
    local load = _G[name]
    _G[name] = function(...) return interpreted(load(...)) end
  end
  local loadfile = _G.loadfile
  function _G.dofile(path)
    local f, message = loadfile(path)
    if not f then error(message, 2) end
    return f()
  end
  local search = package.loaders[2]
  package.loaders[2] = function(name) return interpreted(search(name)) end
end

local watches_programs = false

--- Makes Ctrl-C stop what comes after os.execute too: Lua's own leaves it to the program that runs.
function Session.watch_programs()
  if watches_programs then return end
  watches_programs = true
  local execute = os.execute
  core.redefine("os", "execute", function(command)
    if type(command) ~= "string" then return execute(command) end
    return (core.execute(command))
  end)
end

-- -- Completion -------------------------------------------------------------------------------------------------------

local KEYWORDS = { "and", "break", "do", "else", "elseif", "end", "false", "for", "function", "goto", "if", "in",
  "local", "nil", "not", "or", "repeat",
  "return", "then", "true", "until", "while" }

--- Gives object[key]; nil also where that raises an error or is false.
local function field(object, key)
  local ok, value = pcall(function() return object[key] end)
  return ok and value or nil
end

--- Collects the names that may follow `object.`, or `object:` where methods is true, as the keys of a table: the
-- object's own keys, those of the tables that its metatable leads to (not where that says __hidden), and those of the
-- metatable's table __names, which come into being when they are asked for.
local function names_of(object, methods)
  local found, seen = {}, {}
  local function add(t, hidden)
    if type(t) ~= "table" or seen[t] then return end
    seen[t] = true
    for key, value in pairs(t) do
      if type(key) == "string" and key:find "^[%a_][%w_]*$" and not (hidden and key:find "^_")
        and (not methods or type(value) == "function") then
        found[key] = true
      end
    end
    local meta = getmetatable(t)
    if type(meta) ~= "table" or rawget(meta, "__hidden") then return end
    for key in pairs(methods and {} or rawget(meta, "__names") or {}) do found[key] = true end
    local index = rawget(meta, "__index")
    if type(index) == "function" then add(meta, true) else add(index, true) end
  end
  if type(object) == "string" then add(string) end
  add(object, getmetatable(object) ~= nil)
  if type(object) == "userdata" then add((getmetatable(object) or {}).__index) end
  return found
end

--- Finds the object that a chain such as `vx.nn` or `model.encoder[1]` names. Nothing is called.
-- @param chain string
-- @return the object; nil where there is none
function Session:lookup(chain)
  local first, after = chain:match "^%s*([%a_][%w_]*)()"
  if not first then return nil end
  local object, rest = field(self.env, first), chain:sub(after)
  while rest ~= "" and object ~= nil do
    local name, next_name = rest:match "^%s*[.:]%s*([%a_][%w_]*)()"
    local index, next_index = rest:match "^%s*%[%s*(%-?%d+)%s*%]()"
    local _, quoted, next_quoted = rest:match "^%s*%[%s*([\"'])([^\"'\\]*)%1%s*%]()"
    if not (name or index or quoted) then return nil end
    object = field(object, name or quoted or tonumber(index))
    rest = rest:sub(next_name or next_index or next_quoted)
  end
  return object
end

--- Finds the object that the longest chain at the end of a text names: that of `model.encoder` in "f(model.encoder".
-- @param text string
-- @return the object; nil where there is none
-- @return the chain; nil for a string that is written there
function Session:object_before(text)
  for at in text:gmatch "()[%a_][%w_]*" do
    if not text:sub(1, at - 1):find "[%w_.:]$" then
      local object = self:lookup(text:sub(at))
      if object ~= nil then return object, text:sub(at) end
    end
  end
  return text:find "[\"']%)?$" and string or nil
end

--- Lists the files whose paths begin with `part`; folders end in a slash.
local function files_like(part)
  local folder, start = part:match "^(.*/)([^/]*)$"
  folder, start = folder or "", start or part
  local list = {}
  pcall(function()
    for name in lfs.dir(folder == "" and "." or folder) do
      if name:sub(1, #start) == start and (start ~= "" or name:sub(1, 1) ~= ".") and name ~= "." and name ~= ".." then
        list[#list + 1] = folder .. name .. (lfs.attributes(folder .. name, "mode") == "directory" and "/" or "")
      end
    end
  end)
  return list
end

--- Lists the options of the function whose table of options is open at the end of a text, where a new key begins.
-- @return table name → true; nil where there is none
local function options_at(self, text)
  local open = {} -- places of the brackets that are open
  tokens(text, function(kind, first, last)
    local sign = kind == "sign" and text:sub(first, last)
    if sign == "(" or sign == "{" or sign == "[" then open[#open + 1] = first end
    if sign == ")" or sign == "}" or sign == "]" then open[#open] = nil end
  end)
  local brace = open[#open]
  if not brace or text:sub(brace, brace) ~= "{" or not text:find "[{,;]%s*[%a_]?[%w_]*$" then return nil end
  local before = text:sub(1, brace - 1)
  local call = open[#open - 1]
  local direct = before:find "[%w_]%s*$" -- f{ ... }
  if not direct and call and text:sub(call, call) == "(" then before = text:sub(1, call - 1) end
  local docs = require "vertex.interactive.docs"
  local object, chain = self:object_before((before:gsub("%s+$", "")))
  local method = chain and before:match "quantizer%s*$" and text:sub(#before + 1):match "[\"']([%w-]+)[\"']"
  local item = method and registry.by_name[method]
  local found = {}
  if item then
    for _, option in ipairs(item.options) do found[option.name] = true end
    return found
  end
  local doc = object ~= nil and docs.of_value(self, object)
  if not doc then return nil end
  for _, name in ipairs(docs.options(doc)) do found[name] = true end
  return next(found) and found
end

--- Lists what may stand where the cursor is: variables, fields and methods; options in a table of them; in quotes the
-- names of quantizers, where the text begins like one, otherwise files.
-- @param text string
-- @param[opt] cursor number of bytes before the cursor; nil means all
-- @return byte with which the word to replace begins, 1-based
-- @return array of words, sorted
-- @return what stands before the word, so that it and a word make a chain for :lookup, such as "vx."; nil in quotes
function Session:complete(text, cursor)
  text = text:sub(1, cursor or #text)
  local open -- an unfinished string
  tokens(text, function(kind, first, last)
    if not last then open = { first = first, comment = kind == "comment" } end
    if kind == "comment" and last == #text then open = { comment = true } end
  end)
  if open and open.comment then return #text + 1, {} end
  local candidates, first, part = {}
  local chain
  if open then
    first = open.first + 1
    part = text:sub(first)
    for _, name in ipairs(registry.names(true)) do candidates[name] = true end
    local known = false
    for name in pairs(candidates) do known = known or name:sub(1, #part) == part end
    if not known or part == "" and not text:find "quantizer%s*%(?%s*[\"']$" then
      candidates = {}
      for _, name in ipairs(files_like(part)) do candidates[name] = true end
    end
  else
    local before, separator, word = text:match "^(.-)([.:])%s*([%w_]*)$"
    if separator and before:sub(-1) ~= "." then -- "a..b" is no access
      part = word
      local object, path = self:object_before(before)
      if object ~= nil then candidates = names_of(object, separator == ":") end
      chain = path and path .. separator
    else
      part = text:match(text:find "^%s*%?" and "[%a_][%w_%-]*$" or "[%a_][%w_]*$") or ""
      local options = options_at(self, text)
      candidates, chain = options or names_of(self.env), ""
      if options then
        first = #text - #part + 1
        local list = {}
        for name in pairs(options) do
          if name:sub(1, #part) == part then list[#list + 1] = name .. " = " end
        end
        table.sort(list)
        if #list > 0 then return first, list end
        candidates = names_of(self.env)
      end
      if self.env ~= _G then for name in pairs(names_of(_G)) do candidates[name] = true end end
      for _, word_of_lua in ipairs(KEYWORDS) do candidates[word_of_lua] = true end
      if text:find "^%s*%?" then for _, name in ipairs(registry.names(true)) do candidates[name] = true end end
    end
    first = #text - #part + 1
  end
  local list = {}
  for name in pairs(candidates) do
    if name:sub(1, #part) == part then list[#list + 1] = name end
  end
  table.sort(list)
  return first, list, chain
end

return Session
