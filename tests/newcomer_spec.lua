-- What a user of PyTorch types on the first evening, and what must be said to it: a table of inputs, each run as a
-- session runs it.

local H = require "tests.helper"
local help = require "vertex.interactive.help"
local Session = require "vertex.interactive.session"
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

-- word → how its help begins
local HELP = { Linear = "vx.nn.Linear(inputs", AdamW = "vx.optim.AdamW(parameters", encode = "vx.Quantizer:encode(z)",
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
