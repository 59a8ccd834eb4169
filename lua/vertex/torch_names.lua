--- torch_names.lua: what a user of PyTorch types, and what does that here. `?view` reads it, and the errors of vx.view
-- and x:view{}.
--
-- An op's record names the words for itself in `also`; here stands what has no record, or needs a sentence.
-- Two differences hold everywhere: dimensions are counted from 1, and images and sequences have their channels last.

local check = require "vertex.check"
local core = require "vertex.core"
local registry = require("vertex.ops").registry

local torch_names = {}

-- name → { the name here that help explains, the sentence }
local ELSEWHERE = {
  -- shapes
  view = { "reshape", "x:reshape{ 2, -1 }, with the sizes in one table" },
  flatten = { "reshape", "x:reshape{ -1 }" },
  unflatten = { "reshape", "x:reshape{ ... }, with all sizes" },
  ravel = { "reshape", "x:reshape{ -1 }" },
  squeeze = { "reshape", "x:reshape{ ... } without the sizes of 1" },
  unsqueeze = { "reshape", "x:reshape{ ... } with a size of 1 where the new dimension stands" },
  permute = { "transpose", "x:transpose(a, b), which exchanges two dimensions (1-based); a longer permutation is "
    .. "several of them" },
  chunk = { "narrow", "x:narrow(dim, first, count), once for each part" },
  split = { "narrow", "x:narrow(dim, first, count), once for each part" },
  T = { "x:t", "x:t()" },
  mT = { "x:t", "x:t()" },
  len = { "x:size", "x:size(1); Lua's #x is 0, and ipairs(x) visits nothing: for i = 1, x:size(1) do ... x[i]" },
  iter = { "x:size", "for i = 1, x:size(1) do ... x[i] end; Lua's ipairs(x) visits nothing" },
  ndim = { "x:dim", "x:dim()" },
  tolist = { "x:totable", "x:totable()" },
  numpy = { "save", "x:totable(), or vx.save(\"x.npy\", x) and numpy.load" },
  from_numpy = { "load", "numpy.save, and vx.load \"x.npy\"" },
  as_tensor = { "tensor", "vx.tensor(data, options)" },
  zeros_like = { "zeros", "vx.zeros(x:shape())" },
  ones_like = { "ones", "vx.ones(x:shape())" },
  full_like = { "full", "vx.full(x:shape(), value)" },
  empty_like = { "empty", "vx.empty(x:shape())" },
  linspace = { "arange", "vx.arange(first, stop, step)" },
  -- mathematics
  bmm = { "matmul", "vx.matmul(a, b), which takes batches (B,m,k)(B,k,n)" },
  einsum = { "matmul", "vx.matmul of transposed operands: \"bik,bjk->bij\" is vx.matmul(a, b:t())" },
  std = { "mean", "x:sub(x:mean(d, true)):square():mean(d):sqrt(), which divides by n" },
  var = { "mean", "x:sub(x:mean(d, true)):square():mean(d), which divides by n" },
  norm = { "sum", "x:square():sum(dims):sqrt()" },
  neg = { "mul", "-x" },
  cross_entropy = { "log_softmax", "vx.log_softmax(logits) at the targets, summed and negated; the losses of the paper "
    .. "have ops of their own, ?quantize_smooth" },
  nll_loss = { "log_softmax", "the negated mean of vx.log_softmax(logits) at the targets" },
  embedding = { "gather", "vx.gather(table, index), with 0-based rows" },
  embedding_bag = { "gather", "vx.gather(table, index), then sum over the bag's dimension" },
  -- random numbers, devices, memory
  manual_seed = { "seed", "vx.seed(n)" },
  Generator = { "generator", "vx.generator(seed)" },
  get_rng_state = { "random_state", "vx.random_state()" },
  set_rng_state = { "set_random_state", "vx.set_random_state(state)" },
  multinomial = { "uniform", "comparisons with vx.rand; the quantizers draw their codes by Gumbel noise inside" },
  cuda = { "x:to", "x:to \"cuda:0\", model:to \"cuda:0\", or vx.device \"cuda:0\" before anything is made" },
  cpu = { "x:to", "x:to \"cpu\"" },
  ["cuda.is_available"] = { "devices", "#vx.devices() > 1; vx.devices().cuda says why there is none" },
  ["cuda.synchronize"] = { "sync", "vx.sync()" },
  ["cuda.empty_cache"] = { "memory_flush", "vx.memory_flush()" },
  ["cuda.memory_allocated"] = { "memory", "vx.memory().live" },
  ["cuda.max_memory_allocated"] = { "memory", "vx.memory().peak" },
  ["cuda.CUDAGraph"] = { "graph", "vx.graph(step)" },
  set_default_device = { "device", "vx.device(name)" },
  set_num_threads = { "threads", "vx.threads(n)" },
  compile = { "graph", "vx.graph(step), which replays a recorded step" },
  -- gradients
  requires_grad_ = { "tensor", "x.requires_grad = true" },
  Parameter = { "nn.parameter", "vx.nn.parameter(shape, init)" },
  -- modules
  ["nn.Module"] = { "nn.module", "vx.nn.module \"Name\", a class with :init and :forward" },
  ["nn.Parameter"] = { "nn.parameter", "vx.nn.parameter(shape, init)" },
  ["nn.ModuleList"] = { "nn.Sequential", "fields of the module, which finds modules there; or vx.nn.Sequential" },
  ["nn.Sigmoid"] = { "nn.Apply", "vx.nn.Apply(\"sigmoid\", vx.sigmoid)" },
  ["nn.Tanh"] = { "nn.Apply", "vx.nn.Apply(\"tanh\", vx.tanh)" },
  ["nn.Softmax"] = { "nn.Apply", "vx.nn.Apply(\"softmax\", vx.softmax)" },
  ["nn.Flatten"] = { "nn.Apply", "vx.nn.Apply(\"flatten\", function(x) return x:reshape{ x:size(1), -1 } end)" },
  ["nn.Upsample"] = { "nn.Apply", "vx.nn.Apply(\"upsample\", vx.upsample2x)" },
  ["nn.MultiheadAttention"] = { "nn.MultiHeadAttention", "vx.nn.MultiHeadAttention(width, heads), of x (B,T,width)" },
  ["nn.MSELoss"] = { "mse", "the function vx.mse" },
  ["nn.CrossEntropyLoss"] = { "log_softmax", "vx.log_softmax at the targets, summed and negated" },
  ["nn.functional"] = { "ops", "the functions of vx itself: vx.softmax, vx.linear, vx.conv2d" },
  -- optimizers
  ["optim.Adam"] = { "optim.AdamW", "vx.optim.AdamW(parameters, { weight_decay = 0 })" },
  clip_grad_norm_ = { "optim.clip_grad_norm", "vx.optim.clip_grad_norm(parameters, most)" },
  ["nn.utils.clip_grad_norm_"] = { "optim.clip_grad_norm", "vx.optim.clip_grad_norm(parameters, most)" },
  ["optim.lr_scheduler.ExponentialLR"] = { "optim.exponential", "vx.optim.exponential { rate = 1e-3, factor = 0.9 }" },
  ["optim.lr_scheduler.StepLR"] = { "optim.steps", "vx.optim.steps { rate = 1e-3, at = 30, factor = 0.1 }" },
  ["optim.lr_scheduler.MultiStepLR"] = { "optim.steps", "vx.optim.steps { rate = 1e-3, at = { 30, 80 } }" },
  ["autograd.Function"] = { "custom", "vx.custom { forward = function(ctx, ...), backward = function(ctx, dy) }" },
  ["autograd.set_detect_anomaly"] = { "debug_nonfinite", "vx.debug_nonfinite(true)" },
  ["optim.lr_scheduler"] = { "optim.warmup_cosine", "a function of the step whose value optimizer:step(rate) takes" },
  -- data and files
  DataLoader = { "data", "vx.data, whose sets give batches themselves" },
  ["utils.data.DataLoader"] = { "data", "vx.data, whose sets give batches themselves" },
}

-- What differs where the name is the same: name of the op → sentence.
local DIFFERENT = {
  reshape = "the sizes stand in one table",
  sum = "dimensions are counted from 1, and keepdim is the third argument",
  mean = "dimensions are counted from 1, and keepdim is the third argument",
  max = "the indices are not given: see vx.argmax",
  min = "the indices are not given",
  softmax = "the dimension is counted from 1, and the last where none is named",
  log_softmax = "the dimension is counted from 1, and the last where none is named",
  argmax = "the dimension is counted from 1, and the last where none is named, not all; see also max",
  gather = "the same where a dimension is given, which is counted from 1; without, whole rows, as index_select gives "
    .. "them; indices are i32",
  scatter_add = "the same where a dimension is given, which is counted from 1; indices are i32",
  topk = "the dimension is counted from 1, and largest is an option: vx.topk(x, k, dim, { largest = false })",
  cumsum = "the dimension is counted from 1",
  one_hot = "the number of classes is needed, and the result is f32",
  where = "the condition is a tensor of any dtype; there is no form without a and b",
  cat = "the dimension is counted from 1; vx.cat(1, a, b) is another way to write it",
  stack = "the dimension is counted from 1; vx.stack(1, a, b) is another way to write it",
  layer_norm = "x, gamma, beta: over the last dimension",
  group_norm = "gamma and beta come before the number of groups, and channels are last",
  conv2d = "x (B,H,W,C), channels last; the weight is PyTorch's, and stride, padding and groups stand in a table",
  max_pool2d = "x (B,H,W,C), channels last; stride and padding stand in a table, and the indices are not given",
  avg_pool2d = "x (B,H,W,C), channels last; stride, padding and count_include_pad stand in a table",
  conv1d = "x (B,L,C), channels last; the weight is PyTorch's, and stride, padding and groups stand in a table",
  dropout = "always as in training: vx.nn.Dropout asks whether it is",
  linear = "the same",
  transpose = "dimensions are counted from 1",
  narrow = "the dimension and the first element are counted from 1",
  select = "the dimension and the index are counted from 1",
}

local PREFIXES = { "vx.", "torch.", "F.", "nn.functional.", "Tensor.", "x.", "x:" }

--- Takes off what a user may write before a name of PyTorch's.
local function bare(name)
  local again
  repeat
    again = false
    for _, prefix in ipairs(PREFIXES) do
      if name:sub(1, #prefix) == prefix then name, again = name:sub(#prefix + 1), true end
    end
  until not again
  return name
end

--- Finds the op whose record has a name among its `also`.
local function op_also(name)
  for _, op in ipairs(registry) do
    for _, also in ipairs(op.also or {}) do
      if also == name then return op end
    end
  end
end

-- Methods of PyTorch's modules → what does that here.
local OF_MODULES = {
  cuda = 'model:to "cuda:0"', cpu = 'model:to "cpu"', apply = "model:visit(f)", modules = "model:visit(f)",
  named_modules = "model:visit(f)", children = "model:fields()", named_children = "model:fields()",
  buffers = "model:tensors()", named_buffers = "model:tensors()", add_module = "a field: model.name = module",
  requires_grad_ = "p.requires_grad = false for each p of model:parameters()",
  register_buffer = "a field: model.name = vx.nn.buffer(shape)",
  register_parameter = "a field: model.name = vx.nn.parameter(shape, init)",
  half = 'vx.autocast "bf16"', bfloat16 = 'vx.autocast "bf16"',
}

--- Raises what a method of PyTorch's modules is here, or which method was nearly named.
-- @param name anything, the missing field
-- @param known array of the methods that are there
function torch_names.refuse_of_module(name, known)
  if type(name) ~= "string" or name:find "^_" then return end
  if OF_MODULES[name] then
    core.fail("module:%s: no such method; PyTorch's %s is here %s", name, name, OF_MODULES[name])
  end
  local nearest = #name > 3 and check.nearest(name, known, 1)
  if nearest then core.fail("module.%s: no such field, did you mean '%s'?", name, nearest) end
end

--- Says what does the work of a name of PyTorch's here.
-- @param name text such as "view", "torch.view", "x:view", "nn.ReLU"
-- @return table { text = a sentence, here = the name to ask help for, or nil }; nil where the name is not known
function torch_names.hint(name)
  name = bare(name)
  local entry = ELSEWHERE[name] or ELSEWHERE[name:match "[%w_]+$" or ""]
  if entry then return { here = entry[1], text = ("PyTorch's %s is here %s."):format(name, entry[2]) } end
  local op = op_also(name) or registry[name]
  if not op then return nil end
  local names = {}
  for i, arg in ipairs(op.args or {}) do names[i] = arg[1] end
  return { here = op.name, text = ("PyTorch's %s is here vx.%s(%s)."):format(name, op.name, table.concat(names, ", ")) }
end

--- Says how an op differs from PyTorch's of the same name, and which names of PyTorch's mean it.
-- @param op table, the record of an op
-- @return text of a line; nil where there is nothing to say
function torch_names.note(op)
  local names, parts = { unpack(op.also or {}) }, { DIFFERENT[op.name] }
  for name, entry in pairs(ELSEWHERE) do
    if entry[1] == op.name then names[#names + 1] = name end
  end
  table.sort(names)
  if #names > 0 then parts[#parts + 1] = "does the work of " .. table.concat(names, ", ") end
  return parts[1] and "PyTorch: " .. table.concat(parts, "; ")
end

--- Raises an error where a missing name is one of PyTorch's that means something here, or nearly one that is there.
-- @param where text before the name: "vx."
-- @param name anything, as it was asked for
-- @param known array of the names that are there
-- @param[opt] most letters that a name nearly there may differ in
-- @raise with what the name is here, or with the nearest one
function torch_names.refuse(where, name, known, most)
  if type(name) ~= "string" or name:find "^_" then return end
  local hint = torch_names.hint(where .. name)
  if hint then core.fail("%s%s: no such name; %s", where, name, hint.text) end
  local nearest = check.nearest(name, known, most)
  if nearest then core.fail("%s%s: no such name, did you mean '%s'?", where, name, nearest) end
end

--- Makes a function that raises what a method of PyTorch's is here.
local function refusing(name)
  return function() core.fail("x:%s: no such method; %s", name, torch_names.hint(name).text) end
end

--- Gives the methods that tensors have in PyTorch and not here, as functions that raise what to write instead.
-- @return table name → function
function torch_names.methods()
  local methods = {}
  for name in pairs(ELSEWHERE) do
    if name:find "^%l[%w_]*$" and not core.Tensor[name] then methods[name] = refusing(name) end
  end
  for _, op in ipairs(registry) do
    for _, name in ipairs(op.also or {}) do
      if not core.Tensor[name] then methods[name] = refusing(name) end
    end
    if not core.Tensor[op.name] then methods[op.name] = refusing(op.name) end
  end
  return methods
end

--- Gives every name of PyTorch's that is explained here with a sentence of its own, for the spec.
-- @return table name → name here
function torch_names.all()
  local all = {}
  for name, entry in pairs(ELSEWHERE) do all[name] = entry[1] end
  return all
end

return torch_names
