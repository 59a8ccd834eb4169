-- Every public name explains itself. This file walks all that is reached from `vx`: its functions, its modules and
-- those in them, tensors, layers, quantizers, and the objects that functions give; and fails on a name of which
-- docs.lua does not know
--
--   a sentence       that begins with a capital and ends with a full stop
--   its arguments    every parameter of the function, by its name, with a text that begins with its kind (which
--                    vertex/arguments.lua checks). The text of a tensor says a shape, that of an index or a dimension
--                    "0-based" or "1-based", that of a width or a time its unit. Values of another kind are refused,
--                    at the caller's line and by the name of the argument
--   its result       where the function's code returns a value
--   its errors       where it can refuse: where its code calls core.fail, error or assert, or calls a helper that does
--                    and that is neither public itself nor one of the core, whose errors any call can meet (a released
--                    tensor, no memory)
--
-- Code is read as LuaJIT holds it (jit.util), so that no text of a source is guessed at.

local H = require "tests.helper"
local arguments = require "vertex.arguments"
local bit = require "bit"
local core = require "vertex.core"
local docs = require "vertex.interactive.docs"
local help = require "vertex.interactive.help"
local registry = require "vertex.quantizers"
local Session = require "vertex.interactive.session"
local show = require "vertex.interactive.show"
local tape = require "vertex.tape"
local torch_names = require "vertex.torch_names"
local util = require "jit.util"
local vmdef = require "jit.vmdef"
local vx = H.vx

local session = Session.new { env = setmetatable({ vx = vx }, { __index = _G }) }

-- -- What is public ---------------------------------------------------------------------------------------------------

local public = {}   -- array of { name, value, method }: functions and classes
local is_public = {} -- function, with checks of its arguments and without → true
local modules = {}  -- array of { name, module }

--- Adds a function or class, once. method: its name has a colon.
local function add(name, value, method)
  if is_public[value] then return end
  is_public[value], is_public[arguments.plain(value)] = true, true
  public[#public + 1] = { name = name, value = value, method = method }
end

--- Adds the methods of an object's class and of the classes that it extends.
local function add_methods(name, class)
  while type(class) == "table" do
    for _, key in ipairs(show.names(class)) do
      -- :init is called by the class, which has its doc
      if type(class[key]) == "function" and key ~= "init" then add(name .. ":" .. key, class[key], true) end
    end
    local meta = getmetatable(class)
    class = meta and not meta.__hidden and rawget(meta, "__index")
  end
end

--- Adds an object, as far as it has methods.
local function add_object(name, object)
  local meta = assert(getmetatable(object), name)
  add_methods(name, type(rawget(meta, "__index")) == "table" and meta.__index or meta)
end

--- Says whether a plain table has functions in it.
local function holds_functions(t)
  if getmetatable(t) then return false end
  for _, value in pairs(t) do
    if type(value) == "function" then return true end
  end
  return false
end

--- Adds the functions, the classes and the modules of a table.
local function add_table(name, t)
  if is_public[t] then return end
  is_public[t] = true
  local module = show.module_name(t)
  if module then modules[#modules + 1] = { name = name, module = module } end
  for _, key in ipairs(show.names(t)) do
    local full, value = name .. "." .. key, t[key]
    if type(value) == "function" then
      add(full, value, false)
    elseif docs.is_class(value) then
      add(full, value, false)
      add_methods(full, value)
    elseif value == vx.Tensor then
      add_methods("x", value)
    elseif type(value) == "table" and rawget(value, "__index") == value then
      add_methods(full, value)
    elseif type(value) == "table" and (show.module_name(value) or module and holds_functions(value)) then
      add_table(full, value)
    end
  end
end

--- Adds all that functions of the library give and that has methods.
local function add_objects()
  add_object("generator", vx.generator(1))
  add_object("step", vx.graph(function() end))
  add_object("optimizer", vx.optim.AdamW { vx.ones({ 1 }, { requires_grad = true }) })
  local options = { dim = 4, codes = 8, k = 2 }
  for _, item in ipairs(vx.quantizers()) do add_object(item.name, vx.quantizer(item.name, options)) end
  local figure = vx.plot.figure { cols = 2 }
  add_object("figure", figure)
  add_object("axes", figure:axes(1))
  add_object("simplex axes", figure:simplex(2))
  add_object("picture grid", vx.plot.image_grid { { vx.zeros { 2, 2, 3 } } })
  add_object("watch", vx.simplex.watch(vx.quantizer("softmax-ppl", options)))
  add_object("images", vx.data.images { size = 8, batch = 2 })
  add_object("speech", vx.data.speech { batch = 2 })
  vx.save(H.scratch "vectors.npy", vx.zeros { 4, 2 })
  add_object("vectors", vx.data.vectors { path = H.scratch "vectors.npy", batch = 2 })
  add_object("meter", vx.runs.meter())
  add_object("progress", vx.runs.progress("", { total = 1 }))
  add_object("counter", vx.metrics.code_use(4))
  add_object("moments", vx.metrics.moments(4))
  add_object("score", vx.metrics.inception_scores(20))
end

-- -- What the code does -----------------------------------------------------------------------------------------------

--- Says whether a function's own code returns a value.
local function returns_value(f)
  for pc = 1, math.huge do
    local instruction = util.funcbc(f, pc)
    if not instruction then return false end
    local opcode = bit.band(instruction, 0xff)
    local name = vmdef.bcnames:sub(opcode * 6 + 1, opcode * 6 + 6):gsub(" ", "")
    if name == "RET1" or name == "RET" or name == "RETM" or name == "CALLT" or name == "CALLMT" then return true end
  end
end

--- Adds the texts among a function's constants, and those of the functions written in it, to a set.
local function texts_of(f, found)
  for i = -1, -math.huge, -1 do
    local ok, constant = pcall(util.funck, f, i)
    if not ok or constant == nil then return found end
    if type(constant) == "string" then found[constant] = true end
    if type(constant) == "proto" then texts_of(constant, found) end
  end
end

local function is_core(f) return debug.getinfo(f, "S").source:find("/lua/vertex/core/", 1, true) ~= nil end

--- Says whether a function can refuse; see the head of this file. seen: the functions looked at, nil at first.
local function can_refuse(f, seen)
  if f == core.fail or f == error or f == assert then return true end
  if debug.getinfo(f, "S").what == "C" or tape.op_of[f] or seen and (seen[f] or is_core(f)) then return false end
  seen = seen or {}
  seen[f] = true
  local texts = texts_of(f, {})
  local function follow(g) return type(g) == "function" and not is_public[g] and can_refuse(g, seen) end
  if texts.error or texts.assert then return true end
  for i = 1, debug.getinfo(f, "u").nups do
    local _, value = debug.getupvalue(f, i)
    if follow(value) then return true end
    if type(value) == "table" then
      for text in pairs(texts) do
        if follow(rawget(value, text)) then return true end
      end
    end
  end
  return false
end

-- -- What is missing --------------------------------------------------------------------------------------------------

local COUNTED = { dim = true, dims = true, index = true, row = true, col = true }
local UNITS = { width = true, height = true, gap = true, size = true, seconds = true }
local UNIT = { "points", "pixels", "columns", "characters", "seconds", "bytes", "elements", "rows" }

local function has_unit(text)
  for _, unit in ipairs(UNIT) do
    if text:find(unit, 1, true) then return true end
  end
  return false
end

--- Adds what is wrong with the text of one argument.
local function judge_argument(arg, complain)
  local text = arg.text
  if not text then return complain("argument '%s' has no text", arg.name) end
  if not arg.name:find "[._]" and next((arguments.kinds(text))) == nil then
    complain("argument '%s' does not say what kind of value it is: %s", arg.name, text)
  end
  if text:find "^tensor%f[%A]" and not text:find "%(" and not text:find "shape" then
    complain("argument '%s' is a tensor of no said shape", arg.name)
  end
  if COUNTED[arg.name] and not text:find "[01]%-based" then
    complain("argument '%s' is neither 0-based nor 1-based", arg.name)
  end
  if UNITS[arg.name] and not has_unit(text) then complain("argument '%s' has no unit", arg.name) end
end

--- Lists what a doc lacks.
local function problems(entry)
  local list, value = {}, entry.value
  local function complain(text, ...) list[#list + 1] = text:format(...) end
  local class = type(value) == "table"
  local doc = class and docs.of_class(session, value) or docs.of_function(session, value)
  if not doc then return {}, nil end
  local sentence = doc.text and docs.first_sentence(doc.text)
  if not sentence then
    complain "no sentence"
  elseif not sentence:find "^[%u`%[\"(]" or not sentence:find "[.:)]$" then
    complain("no sentence with a capital and a full stop: %s", sentence)
  end
  local named = {}
  for _, arg in ipairs(doc.args) do
    named[arg.name] = true
    judge_argument(arg, complain)
  end
  for name in docs.signature(doc, entry.method and not doc.op):gmatch "[^, ]+" do
    if name ~= "..." and name ~= "self" and name:sub(1, 1) ~= "_" and not named[name] then
      complain("argument '%s' is not named", name)
    end
    if name == "..." and #doc.args == 0 then complain "its arguments are not named" end
  end
  if not class and not doc.returns and (doc.op or returns_value(arguments.plain(value))) then complain "no result" end
  local code = arguments.plain(class and value.init or value)
  if not doc.raises and not doc.op and can_refuse(code) then complain "no errors" end
  return list, doc.place
end

-- -- Arguments of another kind ----------------------------------------------------------------------------------------

-- kind → a value of that kind
local VALUES = { tensor = vx.zeros { 2, 3 }, number = 0.5, integer = 1, count = 1, string = "x", text = "x",
  boolean = true, callable = function() end, table = {}, object = setmetatable({}, {}), any = 1 }
-- kinds that a value of a kind is, too
local ALSO = { integer = { "number", "count", "text" }, count = { "number", "integer", "text" }, number = { "text" },
  string = { "text" }, text = { "string" }, object = { "table" } }

--- Says whether a value of `kind` is of one of `kinds`.
local function fits(kind, kinds)
  if kinds[kind] or kinds.any then return true end
  for _, other in ipairs(ALSO[kind] or {}) do
    if kinds[other] then return true end
  end
  return false
end

--- Gives what is declared of the arguments of an entry of public, in the order of its parameters.
local function declared(entry)
  local class = type(entry.value) == "table"
  local doc = class and docs.of_class(session, entry.value) or docs.of_function(session, entry.value)
  local by_name, list = {}, {}
  for _, arg in ipairs(doc and doc.args or {}) do by_name[arg.name] = arg end
  for name in (doc and doc.parameters or ""):gmatch "[^, ]+" do
    if name ~= "self" then list[#list + 1] = by_name[name] or { name = name } end
  end
  return list
end

--- Says whether a function of a class is called on an object: Quantizer.unit, for one, is not.
local function takes_object(f)
  local first = debug.getlocal(arguments.plain(f), 1)
  return first == "self" or first == "_"
end

--- Calls the function of an entry with `given` arguments in place of an object's, and returns the message.
local function refused(entry, given, n)
  if entry.method and not tape.op_of[entry.value] and takes_object(entry.value) then
    local object = entry.name:find "^x:" and VALUES.tensor or VALUES.object
    return H.raises(function()
      entry.value(object, unpack(given, 1, n))
    end)
  end
  return H.raises(function()
    entry.value(unpack(given, 1, n))
  end)
end

-- What is not checked here: a tensor's questions, which ops ask all the time and which take no arguments.
local function is_guarded(entry)
  local f = type(entry.value) == "table" and rawget(entry.value, "init") or entry.value
  return arguments.plain(f) ~= f
end

-- -- The specs --------------------------------------------------------------------------------------------------------

describe("every public name", function()
  add_table("vx", vx)
  add_objects()

  it("says what it does, what it takes, what comes back and what it refuses", function()
    local lines = {}
    for _, entry in ipairs(public) do
      local list, place = problems(entry)
      for _, problem in ipairs(list) do lines[#lines + 1] = ("%s: %s: %s"):format(place, entry.name, problem) end
    end
    table.sort(lines)
    assert(#lines == 0, ("%d things are missing:\n%s"):format(#lines, table.concat(lines, "\n")))
    assert.truthy(#public > 250, #public) -- else the walk has lost its way
  end)

  it("refuses arguments of another kind by name, at the caller's line", function()
    local looked_at = 0
    for _, entry in ipairs(public) do
      local args, given = declared(entry), {}
      for i, arg in ipairs(args) do
        if not is_guarded(entry) or not arg.text or arg.name == "..." then break end
        local kinds = arguments.kinds(arg.text)
        if not kinds.any then
          for kind, wrong in pairs(VALUES) do
            if kind ~= "any" and not fits(kind, kinds) then
              given[i] = wrong
              local message = refused(entry, given, i)
              assert(message:find(arg.name .. " is ", 1, true) and message:find("expected", 1, true),
                entry.name .. " given a " .. kind .. ": " .. message)
              looked_at = looked_at + 1
            end
          end
          if not arg.optional then
            given[i] = nil
            assert.truthy(refused(entry, given, i):find(arg.name .. " is nil, expected", 1, true), entry.name)
          end
        end
        given[i] = nil
        for kind in pairs(kinds) do given[i] = VALUES[kind] end
      end
    end
    assert.truthy(looked_at > 2000, looked_at)
  end)

  it("is in a module whose file says what it is about", function()
    for _, entry in ipairs(modules) do
      local text = docs.of_module(session, entry.module).text
      assert.truthy(text and #text > 40, entry.name)
    end
  end)
end)

describe("a quantizer", function()
  it("says what it does, its options, its result and its source", function()
    for _, item in ipairs(vx.quantizers()) do
      local doc = docs.of_quantizer(session, item)
      assert.truthy(#doc.args >= #registry.common_options and doc.returns and doc.raises and doc.source, item.name)
      for _, arg in ipairs(doc.args) do assert.truthy(arg.text and #arg.text > 5, item.name .. " " .. arg.name) end
    end
  end)
end)

describe("a doc", function()
  local function doc_of(comment)
    local s = Session.new { env = setmetatable({}, { __index = _G }) }
    assert(s:run(comment .. "\nfunction documented(x, ...) return x, ... end"))
    return docs.of_function(s, s.env.documented)
  end

  it("has the tags of the comment directly above", function()
    local doc = doc_of [[
--- Does a thing. And
-- another.
-- @param x tensor f32
-- (N,D)
-- @param[opt=3] n how often
-- @param[opt] o.what a field
-- @return the one
-- @return the other
-- @raise where x is none]]
    assert.equal("Does a thing. And\nanother.", doc.text)
    assert.same({ { name = "x", text = "tensor f32 (N,D)", optional = false },
      { name = "n", text = "how often", optional = true, default = "3" },
      { name = "o.what", text = "a field", optional = true } }, doc.args)
    assert.same({ "the one\nthe other", "where x is none", "x, ..." }, { doc.returns, doc.raises, doc.parameters })
  end)

  it("takes nothing from further up, and nothing from another function", function()
    assert.is_nil(doc_of("--- Far away.\n").text)
    assert.is_nil(doc_of("--- Of another.\nfunction another() end").text)
    assert.is_nil(doc_of("-- -- A ruler ------").text)
    assert.equal("The second.", doc_of("--- The first.\n--- The second.").text)
  end)

  it("of a class stands above its constructor or above the line that makes it", function()
    local comment, made = "--- A layer.\n-- @param n width\n", 'Layer = vx.nn.module "Layer"\n'
    local constructor = "function Layer:init(n) self.n = n end"
    for _, text in ipairs { comment .. made .. constructor, made .. "\n" .. comment .. constructor } do
      assert(session:run(text))
      local doc = docs.of_class(session, session.env.Layer)
      assert.same({ "A layer.", "n", "width" }, { doc.text, doc.args[1].name, doc.args[1].text })
    end
  end)
end)

describe("a name of PyTorch's", function()
  it("is explained by what does its work here", function()
    for name, here in pairs(torch_names.all()) do
      local text = assert(help.about(session, name), name)
      assert.truthy(text:find("^PyTorch's " .. name:gsub("%p", "%%%0") .. " is here "), text)
      assert.truthy(help.about(session, here), ("%s: there is no '%s'"):format(name, here))
      assert.is_nil(rawget(vx, name), name .. " is a name of the library now")
    end
    for _, op in ipairs(vx.ops.registry) do
      for _, also in ipairs(op.also or {}) do
        assert.is_nil(torch_names.all()[also], also .. " is explained in torch_names.lua and named in a record")
        assert.truthy(assert(help.about(session, also)):find(op.name, 1, true), also)
      end
    end
    assert.truthy(help.about(session, "torch.softmax"):find("vx.softmax(", 1, true))
    assert.truthy(help.about(session, "F.cross_entropy"):find("log_softmax", 1, true))
  end)

  it("is an error as a field of vx, which names the one to use", function()
    H.raises(function() return vx.view end, "vx.view: no such name; PyTorch's view is here x:reshape{ 2, -1 }")
    H.raises(function() return vx.manual_seed(1) end, "vx.manual_seed: no such name; ", "vx.seed(n)")
    H.raises(function() return vx.nn.Tanh() end, "vx.nn.Tanh: no such name; ", "vx.nn.Apply")
    H.raises(function() return vx.optim.Adam end, "vx.optim.Adam: no such name; ", "vx.optim.AdamW")
    H.raises(function() vx.zeros({ 2, 3 }):view { 3, 2 } end, "x:view: no such method; PyTorch's view is here ",
      "x:reshape{ 2, -1 }")
    H.raises(function() vx.zeros({ 2 }):cuda() end, 'x:to "cuda:0"')
    local _, names = session:complete "vx.Tensor.vie"
    assert.same({}, names)
    assert.is_nil(vx.zeros({ 2 }).no_such_name)
    assert.is_nil(vx.no_such_name)
    assert.is_nil(vx.nn.NoSuchLayer)
  end)
end)

describe("a word", function()
  local function about(name) return (help.about(session, name)) end

  it("finds what lies deeper, what Lua has too, and texts that hold it", function()
    for word, head in pairs { Linear = "vx.nn.Linear(inputs, outputs, options)", AdamW = "vx.optim.AdamW(parameters",
      codes_of = "vx.Quantizer:codes_of(z)", load = "vx.load(path, options)",
      clip_grad_norm = "vx.optim.clip_grad_norm(",
      warmup_cosine = "vx.optim.warmup_cosine(options)" } do
      local text = assert(about(word), word)
      assert.equal(head, text:sub(1, #head))
    end
    local text = assert(help.about(session, "state_dict"))
    for _, name in ipairs { "AdamW:state_dict", "module:state_dict", "module:load_state_dict" } do
      assert.truthy(text:find(name, 1, true), text)
    end
    assert.truthy(about("straight"):find("ste-euclid", 1, true), about "straight")
    assert.same({ nil, "nothing is known of 'softmx', did you mean 'softmax'?" }, { help.about(session, "softmx") })
    assert.is_nil(help.about(session, "Linear", nil, true))
  end)

  it("is completed to an option inside the table of options", function()
    for text, expected in pairs { ["vx.nn.Conv1d(3, 4, 3, { st"] = "stride = ", ["vx.data.images { si"] = "size = ",
      ["vx.quantizer(\"softmax-knn-ce\", { codes = 3, di"] = "dim = ", ["vx.zeros({ 2 }, { dt"] = "dtype = ",
      ["vx.optim.AdamW(p, { betas = { 1, 2 }, w"] = "weight_decay = " } do
      local _, list = session:complete(text)
      assert.same({ expected }, list)
    end
    local _, list = session:complete "vx.nn.Linear(3, 4, { bias = tru"
    assert.same({ "true" }, list)
  end)
end)

describe("the reference", function()
  it("holds every public name", function()
    local path = H.scratch "reference.md"
    local out, status = H.shell("luajit lua/vertex/interactive/reference.lua " .. path)
    assert.truthy(status == 0 or status == true, out)
    local page = H.read(path)
    for _, entry in ipairs(public) do
      local name = tape.op_of[entry.value] and "vx." .. entry.name:match "[%w_]+$" or entry.name
      local own = name:find "^vx%." and not name:find "^vx%.Quantizer:" and not name:find "^vx%.ops%."
      assert.truthy(not own or page:find("### vx[%w_.:]*%f[%w_]" .. name:match "[%w_]+$" .. "\n"), name)
    end
    assert.truthy(page:find("### vx.nn.Linear\n\n```text\nvx.nn.Linear(inputs, outputs, options)", 1, true))
  end)
end)
