--- gradcheck.lua: gradients against finite differences, for ops, modules and quantizers of one's own.
--
-- f is a function of tensors. Its results y are contracted with fixed random numbers u to one number L = sum(u y), in
-- float64. The gradients that backward gives for L are compared, element by element, with the five-point difference
--     (8 (L(x + h) - L(x - h)) - (L(x + 2h) - L(x - 2h))) / 12 h,
-- whose own error is h^4 of the fifth derivative and 1e-7 / h of float32's rounding.

local check = require "vertex.check"
local core = require "vertex.core"
local ops = require "vertex.ops"
local tape = require "vertex.tape"

local fail = core.fail

local MOST = 5000 -- inputs: LuaJIT passes no more than 8000 arguments

--- All elements of a tensor of any shape, in their order.
local function flat(x)
  local list
  core.step(function() list = tape.no_grad(ops.reshape, x:to "cpu", { -1 }):totable() end)
  return list
end

--- The results of f that are f32 tensors; an error where there is none.
local function tensors(...)
  local list = {}
  for i = 1, select("#", ...) do
    local y = (select(i, ...))
    if core.is_tensor(y) and y:dtype() == "f32" then list[#list + 1] = y end
  end
  if #list == 0 then fail "gradcheck: f returned no f32 tensor" end
  return list
end

--- Multiplies the results with fixed numbers in (-1, 1), the same for the same sizes, and adds up in float64.
local function weights_of(outputs)
  local weights, state = {}, 20111
  for i, y in ipairs(outputs) do
    local u = {}
    for j = 1, y:numel() do
      state = state * 16807 % 2147483647
      u[j] = 2 * state / 2147483647 - 1
    end
    weights[i] = u
  end
  return weights
end

local function contract(outputs, weights)
  local sum = 0
  for i, y in ipairs(outputs) do
    local values, u = flat(y), weights[i]
    for j = 1, #values do sum = sum + u[j] * values[j] end
  end
  return sum
end

--- The analytic gradients of L, as arrays; an input that no gradient reached has zeros.
local function analytic(f, inputs, weights)
  local gradients = {}
  core.step(function()
    local outputs = tensors(f(unpack(inputs)))
    local loss
    for i, y in ipairs(outputs) do
      if y.requires_grad then
        local u = core.new(y:shape(), { device = y:device() }):fromtable(weights[i])
        local part = ops.sum(ops.mul(y, u))
        loss = loss and ops.add(loss, part) or part
      end
    end
    if not loss then fail "gradcheck: no result of f depends on an input that requires a gradient" end
    tape.backward_apart(loss, inputs, function()
      for i, x in ipairs(inputs) do
        gradients[i] = x.grad and flat(x.grad) or {}
        for j = #gradients[i] + 1, x:numel() do gradients[i][j] = 0 end
      end
    end)
  end)
  return gradients
end

local function same(a, b)
  for i = 1, #a do
    for j = 1, #a[i] do
      local x, y = a[i][j], b[i][j]
      if x ~= y and (x == x or y == y) then return false, i, j end
    end
  end
  return true
end

--- Which elements of n to look at: all, or `most` of them spread evenly.
local function chosen(n, most)
  local list, count = {}, math.min(n, most)
  for i = 1, count do list[i] = math.floor((i - 1) * n / count) + 1 end
  return list
end

--- Where element j (1-based) of a tensor lies, as text: "[2][3]", 1-based as in Lua.
local function place(x, j)
  local shape, rest, text = x:shape(), j - 1, ""
  for d = #shape, 1, -1 do
    text = ("[%d]%s"):format(rest % shape[d] + 1, text)
    rest = math.floor(rest / shape[d])
  end
  return text
end

local function check_inputs(inputs)
  if type(inputs) ~= "table" or core.is_tensor(inputs) or #inputs == 0 then
    fail("gradcheck: inputs are a %s, expected an array of tensors", core.is_tensor(inputs) and "tensor"
      or type(inputs))
  end
  if #inputs > MOST then fail("gradcheck: inputs are %d tensors, expected at most %d", #inputs, MOST) end
  local any = false
  for i, x in ipairs(inputs) do
    if not core.is_tensor(x) then fail("gradcheck: input %d is a %s, expected a tensor", i, type(x)) end
    if x.requires_grad then
      if x._node then fail("gradcheck: input %d %s is the result of an op, expected a leaf", i, core.shape_text(x)) end
      if x:dtype() ~= "f32" then fail("gradcheck: input %d is %s, expected f32", i, x:dtype()) end
      any = true
    end
  end
  if not any then fail "gradcheck: no input has requires_grad = true" end
end

--- Compares the gradients of f with finite differences; raises an error that names input, element and both numbers
-- where they differ. f is called as f(inputs[1], inputs[2], ...) and must give the same values each time: fix the noise
-- of what is random. Inputs that f closes over, a quantizer's codebook say, may be among `inputs` too. Kinks and jumps
-- (relu at 0, a nearest code that changes within 2 eps) have no derivative to compare with: keep inputs away from them.
-- @param f function of tensors that returns tensors; f32 ones count
-- @param inputs array of tensors, at most 5000; those with requires_grad = true are varied, in place, and restored.
-- Gradients that they or others have already stay as they are
-- @param[opt] options {eps = 0.02, the step h; tolerance = 0.002, of the difference, relative to the largest gradient
-- of the input; elements = 200, how many elements of an input are varied at most, spread evenly}
-- @return true, and the largest relative difference met
-- @raise where a gradient differs, an input that matters got none, f is not deterministic or backward is not, f
-- returns no tensor, or an input is no f32 leaf
local function gradcheck(f, inputs, options)
  if type(f) ~= "function" and type(f) ~= "table" then fail("gradcheck: f is a %s, expected a function", type(f)) end
  check_inputs(inputs)
  local o = check.options("gradcheck", options, { eps = { "positive", 2e-2 },
    tolerance = { "positive", 2e-3 }, elements = { "positive", 200 } })
  local function outputs() return tensors(f(unpack(inputs))) end
  local weights
  core.step(function() weights = weights_of(tape.no_grad(outputs)) end)
  local function value()
    local L
    core.step(function() L = contract(tape.no_grad(outputs), weights) end)
    return L
  end
  if value() ~= value() then fail "gradcheck: f gives other values when called again; fix its noise" end
  local gradients = analytic(f, inputs, weights)
  local equal, at_input, at_element = same(gradients, analytic(f, inputs, weights))
  if not equal then
    fail("gradcheck: backward gives another gradient when run again: input %d at %s", at_input,
      place(inputs[at_input], at_element))
  end

  local worst = 0
  for i, x in ipairs(inputs) do
    if x.requires_grad then
      local values, gradient, numeric = flat(x), gradients[i], {}
      local largest = 0
      local function at(j, offset)
        local before = values[j]
        values[j] = before + offset
        x:fromtable(values)
        local ok, L = pcall(value)
        values[j] = before
        x:fromtable(values)
        if not ok then error(L, 0) end
        return L
      end
      local elements = chosen(#values, o.elements)
      for _, j in ipairs(elements) do
        local h = o.eps
        numeric[j] = (8 * (at(j, h) - at(j, -h)) - (at(j, 2 * h) - at(j, -2 * h))) / (12 * h)
        largest = math.max(largest, math.abs(numeric[j]), math.abs(gradient[j]))
      end
      for _, j in ipairs(elements) do
        local relative = math.abs(numeric[j] - gradient[j]) / math.max(largest, 1e-6)
        if relative ~= relative or relative > o.tolerance then
          fail("gradcheck: input %d %s at %s: backward gives %.6g, finite differences %.6g (they differ by %.2g of the "
            .. "largest, tolerance %g)", i, core.shape_text(x), place(x, j), gradient[j], numeric[j], relative,
            o.tolerance)
        end
        worst = math.max(worst, relative)
      end
    end
  end
  return true, worst
end

return gradcheck
