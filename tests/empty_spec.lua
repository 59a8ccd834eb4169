-- Sizes of 0: every op of C, with each letter of its contract 0 and with each two, writes all of its outputs or refuses
-- the call. Outputs hold a mark before, which must be gone.

local H = require "tests.helper"
local core = require "vertex.core"
local vx = H.vx

local MARK = { f32 = 12345, i32 = 12345, u8 = 77 }

-- Ops that add to what their outputs hold.
local ADDS = { scatter_add = true, scatter_add_along = true, count_codes = true, adamw = true }

-- Numbers of ops where 1 is none or not the only one worth a try: lists of values.
local NUMBERS = { alpha = { 1 }, beta = { 0 }, p = { 0.5 }, dropout = { 0, 0.5 }, padding = { 0, 1 },
  padding_h = { 0, 1 }, padding_w = { 1 }, kernel_h = { 2 }, kernel_w = { 2 }, stride = { 1, 2 }, up = { 1, 2 },
  metric = { 0, 1 }, log = { 0, 1 }, kind = { 0, 1, 2, 3 }, act = { 0, 1 }, regularizer = { 0, 1, 2, 3 },
  sampler = { 0, 2 }, precision = { 0 }, exclude_self = { 0, 1 }, mean_reduction = { 0 }, estimator = { 0, 1 },
  codebook_grad = { 1 }, reverse = { 0 }, keep = { 0 }, include_pad = { 0 }, probability = { 0.5 }, largest = { 1 },
  step = { 1 }, low = { 0 }, high = { 1 }, mean = { 0 }, deviation = { 1 }, temperature = { 0.1 }, eps = { 1e-5 } }

--- Sizes that follow from others, as contracts say.
local function follow(name, size, n)
  if name == "contrastive" or name == "contrastive_backward" then size.J = size.K + 1 end
  if name:find "^conv1d" then size.T = math.floor((size.L + 2 * n.padding - size.K) / n.stride) + 1 end
  if name:find "^conv2d" then
    size.P = math.floor((size.H + 2 * n.padding_h - size.K) / n.stride_h) + 1
    size.Q = math.floor((size.W + 2 * n.padding_w - size.L) / n.stride_w) + 1
  elseif name:find "pool2d" then
    size.P = math.floor((size.H + 2 * n.padding_h - n.kernel_h) / n.stride_h) + 1
    size.Q = math.floor((size.W + 2 * n.padding_w - n.kernel_w) / n.stride_w) + 1
  elseif name:find "^upsample2x" then
    size.P, size.Q = 2 * size.H, 2 * size.W
  elseif size.P then
    local up = n.up or 1
    size.P, size.Q = math.ceil(size.H * up / n.stride), math.ceil(size.W * up / n.stride)
  end
end

--- The arguments of a contract: { name, dtype, sizes (text), output, optional }.
local function arguments(contract)
  local list = {}
  local outputs, inputs = contract:match "^(.-)<%-(.*)$"
  for k, part in ipairs { outputs, (inputs:gsub(" : .*", "")) } do
    for name, flags, sizes in part:gmatch "([%w_]+)([^%s%(]*)(%b())" do
      local dtype = flags:match ":(%w+)" or "f32"
      if dtype == "any" or dtype == "body" then dtype = "f32" end
      list[#list + 1] = { name = name, dtype = dtype, sizes = sizes:sub(2, -2), output = k == 1,
        optional = flags:find("?", 1, true) ~= nil }
    end
  end
  return list
end

--- Calls f(numbers) for every combination of the values of an op's numbers.
local function each_numbers(names, f, i, chosen)
  i, chosen = i or 1, chosen or {}
  if i > #names then return f(chosen) end
  for _, value in ipairs(NUMBERS[names[i]] or { 1 }) do
    chosen[names[i]] = value
    each_numbers(names, f, i + 1, chosen)
  end
end

local function shape_of(sizes, size, any)
  if sizes:find("...", 1, true) or sizes == "*" then return any end
  local shape = {}
  for s in sizes:gmatch "[^,]+" do shape[#shape + 1] = tonumber(s) or size[s] end
  return shape
end

--- Calls an op once; says whether it was accepted.
local function call(op, list, size, any, numbers, optional, device)
  local fields, outputs = {}, {}
  for name, value in pairs(numbers) do fields[name] = value end
  for k, a in ipairs(list) do
    local asked = a.name ~= "near" or numbers.regularizer ~= nil and numbers.regularizer >= 2
    if (optional or not a.optional) and (asked or not a.optional) then
      local shape = shape_of(a.sizes, size, any)
      if op.name == "reduce" and k == 1 then shape = { 1, any[2] } end
      for _, s in ipairs(shape) do
        if s < 0 then return false end
      end
      local x = vx.full(shape, a.output and MARK[a.dtype] or a.dtype == "f32" and 0.5 or 0,
        { dtype = a.dtype, device = device })
      fields[a.name] = x
      if a.output then outputs[#outputs + 1] = { a, x } end
    end
  end
  local f = core.op[op.name]
  local ok = pcall(f, fields)
  if ok and device ~= "cpu" then ok = pcall(vx.sync, device) end
  if not ok then return false end
  for _, output in ipairs(outputs) do
    local a, x = output[1], output[2]
    for i, value in ipairs(H.flat(x)) do
      if value == MARK[a.dtype] then
        local text = {}
        for letter, s in pairs(size) do text[#text + 1] = letter .. "=" .. s end
        table.sort(text)
        for name, number in pairs(numbers) do text[#text + 1] = name .. "=" .. number end
        error(("%s: element %d of %s %s is not written (%s)"):format(op.name, i, a.name, core.shape_text(x),
          table.concat(text, " ")), 0)
      end
    end
  end
  return true
end

for _, device in ipairs { "cpu", "emu:0" } do
  describe("with sizes of 0, on " .. device, function()
    local accepted = 0
    for _, op in ipairs(core.op_list()) do
      if not ADDS[op.name] then
        it(op.name .. " writes all of its outputs or refuses", function()
          local list, letters, known = arguments(op.contract), { "" }, {}
          for _, a in ipairs(list) do
            for letter in a.sizes:gmatch "%f[%u]%u%f[%U]" do
              if not known[letter] then letters[#letters + 1], known[letter] = letter, true end
            end
          end
          each_numbers(op.numbers, function(numbers)
            for i = 1, #letters do
              for j = i, #letters do
                for _, optional in ipairs { true, false } do
                  local size = {}
                  for letter in pairs(known) do size[letter] = 2 end
                  if known.K and op.name:find "^knn" then size.K, size.L = 1, 3 end
                  size[letters[i]], size[letters[j]] = 0, 0
                  size[""] = nil
                  follow(op.name, size, numbers)
                  vx.step(function()
                    if call(op, list, size, { 2, 3 }, numbers, optional, device) then accepted = accepted + 1 end
                  end)
                end
              end
            end
            for _, any in ipairs { { 0, 3 }, { 2, 0 }, { 0, 0 } } do
              if #letters == 1 then vx.step(function() call(op, list, {}, any, numbers, true, device) end) end
            end
          end)
        end)
      end
    end

    it("most calls are accepted", function() assert.is_true(accepted > 1500, tostring(accepted)) end)
  end)
end
