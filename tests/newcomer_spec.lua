-- What a user of PyTorch types on the first evening, and what must be said to it: a table of inputs, each run as a
-- session runs it, and once more each typed into a terminal.

local H = require "tests.helper"
local help = require "vertex.interactive.help"
local Session = require "vertex.interactive.session"
local terminals = require "tests.terminal"
local show = require "vertex.interactive.show"
local vx = H.vx

H.write(H.scratch "model.pt", "PK\3\4" .. ("x"):rep(40))
local SETUP = [[
x = vx.zeros { 2, 3 }
m = vx.nn.Linear(3, 3)
q = vx.quantizer("ste-euclid", { dim = 4, codes = 8 })
pt = "]] .. H.scratch "model.pt" .. [["
]]

-- input → a text that its error holds
local ERRORS = {
  -- silently accepted
  ["vx.softmax(x, 3)"] = "softmax: dimension 3 of a tensor (2,3)",
  ["vx.log(x, 10)"] = "log: one argument too many, 10; it takes (x)",
  ["vx.nn.Conv2d(3, 4, { stride = 2 })"] = "Conv2d: kernel has 0 numbers, expected an integer",
  ["vx.nn.Conv2d(3, 4, 3, { strid = 2 })"] = "Conv2d: unknown option 'strid', did you mean 'stride'?",
  ["vx.nn.Linear(3, 3, { bais = false })"] = "Linear: unknown option 'bais', did you mean 'bias'?",
  ["vx.nn.Linear(3, 3, false)"] = "Linear: options is false, expected",
  ['vx.randn({ 2, 3 }, { dytpe = "i32" })'] = "randn: unknown option 'dytpe', did you mean 'dtype'?",
  ["vx.zeros({ 2 }, { requires_gard = true })"] = "zeros: unknown option 'requires_gard', did you mean",
  ["vx.optim.warmup_cosine { peek = 1, total = 9 }"] = "warmup_cosine: unknown option 'peek', did you mean 'peak'?",
  ["vx.optim.AdamW(m:parameters(), { learning_rate = 1 })"] = "AdamW: unknown option 'learning_rate'; known: betas",
  ["vx.runs.progress('', { totl = 3 })"] = "progress: unknown option 'totl', did you mean 'total'?",
  ["vx.set_random_state {}"] = "set_random_state: expected what vx.random_state() gave",
  ["vx.metrics.code_use(8, 1.5)"] = "code_use: columns is 1.5, expected an integer",
  ["x.require_grad = true"] = "x.require_grad: a tensor has no such field, did you mean 'requires_grad'?",
  -- errors in the user's words
  ["vx.zeros(3, 4)"] = "zeros: shape is 3, expected an array of sizes, as in { 3, 4 }",
  ["x:reshape(3, 2)"] = "reshape: shape is 3, expected an array of sizes",
  ["vx.matmul(x)"] = "matmul: b is nil, expected a tensor",
  ["vx.matmul(x, 'w')"] = "matmul: b is 'w', expected a tensor",
  ["vx.layer_norm(x)"] = "layer_norm: gamma is nil, expected a tensor f32 (C)",
  ["x + {}"] = "add: b is a table, expected a tensor",
  ["x[{ 1, 2 }]"] = "x[{ ... }]: write x[i][j]",
  ["x[vx.zeros({ 1 }, { dtype = 'i32' })]"] = "x[tensor]: write vx.gather",
  ["x.sum()"] = "sum: x is nil, expected a tensor",
  ["x.fill(x)"] = "fill: value is nil, expected a number",
  ["x:narrow(1, 1, 1.5)"] = "narrow: count is 1.5, expected an integer of 0 or more",
  ["m(5)"] = "Linear: x is 5, expected a tensor f32 (..., inputs)",
  ["vx.nn.Linear()"] = "Linear: inputs is nil, expected an integer of 1 or more",
  ["vx.optim.AdamW(m)"] = "AdamW: no parameters",
  ["vx.step()"] = "step: f is nil, expected a function",
  ["vx.seed 'one'"] = "seed: seed is 'one', expected an integer",
  ["vx.load(5)"] = "load: path is 5, expected a path",
  ["vx.save('x.safetensors', x)"] = "save: x.safetensors takes a table { name = tensor }",
  ["vx.load(pt)"] = "a zip file, as torch.save",
  ["vx.arange(math.huge)"] = "arange: stop is inf, expected a finite number",
  ["vx.nn.GroupNorm(math.huge)"] = "GroupNorm: channels is inf, expected an integer",
  -- names of PyTorch's, and near misses
  ["vx.view"] = "PyTorch's view is here x:reshape{ 2, -1 }",
  ["x:cuda()"] = 'PyTorch\'s cuda is here x:to "cuda:0"',
  ["vx.manual_seed(1)"] = "PyTorch's manual_seed is here vx.seed(n)",
  ["m:cuda()"] = 'PyTorch\'s cuda is here model:to "cuda:0"',
  ["m:named_modules()"] = "PyTorch's named_modules is here model:visit(f)",
  ["vx.nn.Module"] = "PyTorch's nn.Module is here vx.nn.module",
  ["vx.optim.Adam"] = "PyTorch's optim.Adam is here vx.optim.AdamW",
  ["vx.softmx(x)"] = "vx.softmx: no such name, did you mean 'softmax'?",
  ["vx.nn.Liner"] = "vx.nn.Liner: no such name, did you mean 'Linear'?",
  ["x.sahpe"] = "x.sahpe: a tensor has no such field, did you mean 'shape'?",
  ["m:paramters()"] = "module.paramters: no such field, did you mean 'parameters'?",
  ["vx.quantizer('softmax-knnce', { dim = 4, codes = 8 })"] = "did you mean 'softmax-knn-ce'?",
  ["vx.restore 'nowhere'"] = "restore: nowhere: no such file",
}

-- input → how it is warned of what Lua takes without a word
local WARNINGS = {
  ["#x"] = "#x: x is a tensor and no table: # gives 0; its sizes are x:size(1) and x:shape()",
  ["n = #m.weight"] = "#m.weight: m.weight is a tensor and no table: # gives 0",
  ["for i, row in ipairs(x) do print(row) end"] = "ipairs(x): x is a tensor and no table: it has no elements for that; "
    .. "write for i = 1, x:size(1) do ... x[i]",
  ["for k in pairs(x) do k = 1 end"] = "pairs(x): x is a tensor and no table",
}

-- inputs without a warning: what is counted is no tensor
local UNWARNED = { "#'x'", "#pt", "#x:shape()", "function f(x) return #x end", "local x = { 1 }; n = #x",
  "for _, x in ipairs { {} } do n = #x end", "-- #x", "n = '#x'", "#{ x }",
  "for i, p in ipairs(m:parameters()) do end",
  "#vx.devices()", "#x[1]:shape()" }

-- word → how its help begins
local HELP = { Linear = "vx.nn.Linear(inputs", AdamW = "vx.optim.AdamW(parameters",
  encode = "found for 'encode':\n  vx.Quantizer:encode ", -- of several, which all are listed
  len = "PyTorch's len is here x:size(1); Lua's #x is 0",
  load = "vx.load(path", state_dict = "found for 'state_dict':", view = "PyTorch's view is here", relu = "vx.relu(x)" }

-- text → what TAB makes of its last word
local TAB = { ["vx.nn.Conv1d(3, 4, 3, { st"] = "stride = ", ["vx.data.images { si"] = "size = ",
  ["vx.zeros({ 2 }, { dty"] = "dtype = ", ["vx.softm"] = "softmax" }

describe("a newcomer", function()
  local session = Session.new { env = setmetatable({ vx = vx }, { __index = _G }) }
  assert(session:run(SETUP))

  for _, input in ipairs(show.names(setmetatable({}, { __names = ERRORS }))) do
    it("is told about " .. input, function()
      local values, problem = session:run(input)
      assert.is_nil(values)
      assert.truthy(problem.message:find(ERRORS[input], 1, true), problem.message)
      assert.truthy(problem.message:find("^%[%d+%]:1: "), problem.message) -- the line that was typed
    end)
  end

  it("is told the same on a terminal", function()
    local t = terminals.open("", 400)
    finally(terminals.close_all)
    t:wait "> "
    for line in SETUP:gmatch "[^\n]+" do t:enter(line, "\n> ") end
    for _, input in ipairs(show.names(setmetatable({}, { __names = ERRORS }))) do
      t:enter(input, "\r\n[")
      local said = t:wait "\n> "
      assert.truthy(said:find(ERRORS[input], 1, true), input .. ": " .. said)
    end
    for input, warning in pairs(WARNINGS) do
      t:enter(input, "\r\n" .. warning)
      t:wait "\n> "
    end
  end)

  it("is warned of lengths and loops of tensors that are no tables", function()
    local warnings = {}
    local own = Session.new { env = setmetatable({ vx = vx }, { __index = _G }),
      warn = function(text) warnings[#warnings + 1] = text end }
    assert(own:run(SETUP))
    for input, warning in pairs(WARNINGS) do
      warnings = {}
      assert.truthy(own:run(input), input)
      assert.equal(1, #warnings, input)
      assert.equal(warning, warnings[1]:sub(1, #warning))
    end
    warnings = {}
    for _, input in ipairs(UNWARNED) do assert.same({}, own:warnings(input), input) end
    assert.same({}, warnings)
  end)

  it("sees a batch of pictures as pictures", function()
    local function text(input) return tostring(session:run(input)[1]) end
    local standardized = "vx.data.images({ size = 16, batch = 3 }):next()"
    for input, line in pairs {
      [standardized] = "3 pictures of 16 x 16 in 3 channels, standardized",
      ["vx.data.denormalize((" .. standardized .. "))"] = "3 pictures of 16 x 16 in 3 channels, 0 to 1",
      ["vx.rand { 1, 8, 9, 1 }"] = "1 picture of 8 x 9 in 1 channel, 0 to 1",
      ["vx.zeros({ 65, 8, 8, 3 }, { dtype = 'u8' })"] =
        "65 pictures of 8 x 8 in 3 channels, bytes; the first 64 are shown",
      ["vx.data.procedural(16, 1, 1)"] = "1 picture of 16 x 16 in 3 channels, bytes" } do
      assert.equal(line, text(input):match "\n(.*)$", input)
    end
    for _, input in ipairs { "vx.randn { 4, 16, 16, 3 }", "vx.rand { 4, 16, 16, 2 }", "vx.rand { 2, 4, 4, 3 }",
      "vx.zeros { 2, 8, 8, 3 }", "vx.rand { 8, 8, 3 }", "vx.rand { 2, 8, 8, 3 } / 0" } do
      assert.truthy(text(input):find "\n%[%[", input)
    end
    local bundle, metadata = require("vertex.interactive.display").mime(session:run(standardized)[1])
    assert.equal("\137PNG", bundle["image/png"]:sub(1, 4))
    local width = 0
    for i = 17, 20 do width = width * 256 + bundle["image/png"]:byte(i) end
    assert.equal(2 * metadata["image/png"].width, width) -- sharp on a screen of two pixels to the point
    assert.is_nil(require("vertex.interactive.display").mime(vx.zeros { 3 })["image/png"])
  end)

  it("finds help by the word", function()
    for word, head in pairs(HELP) do assert.equal(head, (help.about(session, word) or ""):sub(1, #head)) end
  end)

  it("has names and options completed", function()
    for text, word in pairs(TAB) do
      local _, list = session:complete(text)
      assert.equal(word, list[1])
    end
  end)
end)
