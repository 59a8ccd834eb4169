--- check.lua: runs one golden file through the library and compares. As a program it does so for all of them and prints
-- what differs:
--     LUA_PATH="./lua/?.lua;./lua/?/init.lua;;" VERTEX_SIMD=portable luajit tests/golden/check.lua

local vx = require "vertex"

local check = {}

-- Relative errors (a NaN counts as infinite) ||x - ref|| / ||ref|| that float32 may have. 1 - ppl and the gradient of
-- log tau are sums that cancel.
local TOLERANCE = { quantized = 1e-5, reg = 5e-5, grad_z = 1e-4, grad_codebook = 1e-4, grad_log_tau = 1e-3 }

local function flat(x) return x:reshape({ -1 }):totable() end

local function relative_error(x, y)
  local a, b = flat(x), flat(y)
  if #a ~= #b then return math.huge end
  local difference, size = 0, 0
  for i = 1, #b do
    difference = difference + (a[i] - b[i]) ^ 2
    size = size + b[i] ^ 2
  end
  if difference ~= difference then return math.huge end
  return math.sqrt(size > 0 and difference / size or difference)
end

local function number(text, default) return tonumber(text) or default end

--- Results of a training forward and backward on the file's inputs.
function check.run(t, meta)
  local q = vx.quantizer(meta.method, {
    dim = number(meta.dim), codes = number(meta.codes), groups = number(meta.groups), k = number(meta.k),
      beta = number(meta.beta),
    weight = number(meta.weight, 1), gumbel_tau = number(meta.gumbel_tau, 1), shards = number(meta.shards, 1),
    alpha = number(meta.alpha, 0) > 0 and number(meta.alpha) or nil, -- 0: 1 / codes
    neighbour = number(meta.neighbour, 1),
    reduction = meta.reduction or "sum", codebook_grad = meta.codebook_grad ~= "False",
  })
  q.codebook:copy(t.codebook)
  local z = t.z:clone()
  z.requires_grad = true
  local o
  if q.log_tau then q.log_tau:copy(t.log_tau) end
  if t.vertices then -- the quantizer draws its own subset: give the op the file's
    local n, groups = z:size(1), q.options.groups
    local y, reg, codes = vx.ops.quantize_smooth(z:reshape { n, groups, -1 }, q.codebook, q.log_tau, {
      sampler = q.sampler, regularizer = q.regularizer, k = q.options.k, gumbel_tau = q.options.gumbel_tau, shards = 1,
        seed = 0, stream = 0,
      noise = q.sampler ~= "softmax" and t.gumbel or nil, vertices = t.vertices,
    })
    o = { quantized = y:reshape(z:shape()), reg = reg:reshape {}, codes = codes }
  else
    o = q:forward(z, { gumbel = q.facts.sampler and t.gumbel or nil, prior = t.prior })
  end
  local total = vx.sum(vx.mul(o.quantized, t.cotangent)) / z:size(1) + o.reg
  total:backward()
  return { quantized = o.quantized, reg = o.reg, codes = o.codes, grad_z = z.grad, grad_codebook = q.codebook.grad,
    grad_log_tau = q.log_tau and q.log_tau.grad or vx.zeros { 1 } }
end

--- What differs by more than its tolerance, as a list of texts; and the relative errors by name.
function check.differences(t, meta)
  local faults, errors = {}, {}
  vx.step(function()
    local got = check.run(t, meta)
    for name, tolerance in pairs(TOLERANCE) do
      local e = relative_error(got[name] or vx.full(t[name]:shape(), 1 / 0), t[name])
      errors[name] = e
      if e > tolerance then
        faults[#faults + 1] = ("%s: relative error %.2e, allowed %.0e"):format(name, e, tolerance)
      end
    end
    local a, b = flat(got.codes), flat(t.codes)
    for i = 1, #b do
      if a[i] ~= b[i] then
        faults[#faults + 1] = ("codes: number %d is %s, expected %d"):format(i - 1, tostring(a[i]), b[i])
        break
      end
    end
  end)
  table.sort(faults)
  return faults, errors
end

--- Names of the golden files of a folder, in order.
function check.files(folder)
  local names = {}
  for name in require("lfs").dir(folder) do
    if name:match "%.[%w%-]+%.safetensors$" then names[#names + 1] = name end
  end
  table.sort(names)
  return names
end

if not ... then
  vx.device "cpu"
  print(vx.devices()[1].description)
  local folder, bad = (arg and arg[0] or ""):match "^(.*)/" or ".", 0
  for _, name in ipairs(check.files(folder)) do
    local faults = check.differences(vx.load(folder .. "/" .. name))
    for _, fault in ipairs(faults) do
      bad = bad + 1
      print(name .. ": " .. fault)
    end
  end
  print(bad == 0 and "all agree" or bad .. " differ")
  os.exit(bad == 0 and 0 or 1)
end

return check
