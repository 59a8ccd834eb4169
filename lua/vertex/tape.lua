--- tape.lua: reverse-mode gradients. An op records a node on its outputs: what it was, what it was given, what it kept.
-- backward() visits the nodes in the reverse order of their making, which is a topological order, and adds gradients up
-- in leaves.
--
-- Rules for ops (lua/vertex/ops/record.lua has the form of their records):
--   1. forward(ctx, ...) returns the outputs; it may keep things in ctx only where ctx.needs is set.
--   2. backward(ctx, dy1, dy2, ...) returns one gradient per input or nil; dy of an output nobody used is nil. A
--      gradient it returns is a fresh tensor, or a dy itself, or a view of one; never an input and never something kept
--      in ctx. An op without backward is not recorded.
--   3. ctx.needs[i] says whether input i wants a gradient.
--   4. The gradient of a parameter is best made in tape.gradient_like(it): the leaf's own buffer, which nothing need be
--      copied into.
--   5. An op that says `accumulates = true` is given, after two dy, the gradient that its first input has got so far
--      (or nil); the gradient it returns for that input includes it.
--   6. What lies in ctx, or in a table in it, must be unchanged when backward runs: a write to a tensor that is kept
--      there is an error then, which names op and tensor. So an op keeps no tensor that its backward does not read.
--   7. Under vx.autocast an op that does not say `takes_bf16 = true` is given float32 in place of bf16. A gradient has
--      its tensor's dtype, and is computed under the setting that its op ran under.

local core = require "vertex.core"

-- op_of: function → the op it records; cast: ops.cast; watcher: see tape.watched; inspector: of nonfinite.lua,
-- told of every op and every gradient while it is there
local tape = { op_of = {}, cast = nil, watcher = nil, inspector = nil }

local op, VX, is_tensor = core.op, core.VX, core.is_tensor
local made = 0
local unrecorded = core.new_extents() -- of no_grad

--- Says whether ops are recorded here.
function tape.is_enabled() return not (unrecorded.innermost and unrecorded:here()) end

--- The arguments, bf16 tensors as float32.
local function widened(...)
  local n, wide = select("#", ...), nil
  for i = 1, n do
    local x = (select(i, ...))
    if is_tensor(x) and x:dtype() == "bf16" then
      wide = wide or { ... }
      wide[i] = tape.cast(x, "f32")
    end
  end
  if wide then return unpack(wide, 1, n) end
  return ...
end

--- Raises where a write would lose the gradient that flows through the value written.
function tape.expect_no_gradient(value, what)
  if tape.is_enabled() and is_tensor(value) and value.requires_grad then
    core.fail("%s: a value that gradients flow through, which would be lost: use vx.cat, vx.stack or vx.where, or "
      .. "write value:detach()", what)
  end
end

--- Overwrites all elements with those of another tensor, across dtypes, devices and strides. Integers get the nearest
-- that they have, as by x:to(dtype): of 300.5 u8 gets 255, of a NaN 0. x[i] = tensor does so too. No gradient flows
-- through.
-- @param source tensor of x's shape
-- @return the tensor itself
-- @raise where the shapes differ, or the source is a result that gradients flow through, which would be lost; a leaf
-- and a view of one, of a parameter say, may be copied
function core.Tensor:copy(source)
  if core.is_computed(source) then tape.expect_no_gradient(source, "copy") end
  return core.overwrite(self, source)
end

-- -- Memory that an op's gradient reads must not change in between ----------------------------------------------------

--- Gives the tensors of ctx and of all tables in it, with their writes so far and their names.
local function saved_in(ctx)
  local saved, waiting, seen = {}, nil, nil -- tables to look into: few ops keep any
  local values = ctx
  while values do
    for name, x in pairs(values) do
      if is_tensor(x) then
        local n = #saved
        saved[n + 1], saved[n + 2], saved[n + 3] = x, core.writes(x), name
      elseif type(x) == "table" and x ~= ctx.needs then
        waiting, seen = waiting or {}, seen or { [ctx] = true }
        if not seen[x] then
          seen[x] = true
          waiting[#waiting + 1] = x
        end
      end
    end
    values = waiting and table.remove(waiting)
  end
  return saved
end

--- Names tensor x, which a node kept under the name `key`: as its op's records name its inputs.
local function name_of(node, x, key)
  local args = node.op.args
  for i = 1, node.inputs.n do
    local input = node.inputs[i]
    if is_tensor(input) and not core.is_released(input) and core.same_storage(input, x) then
      return args and args[i] and args[i][1] or tostring(key)
    end
  end
  return args and "its result" or "ctx's " .. tostring(key)
end

--- Raises where memory that a node's gradient needs was written to since its op ran.
local function expect_unchanged(node)
  local saved = node.saved
  for i = 1, #saved, 3 do
    local x = saved[i]
    if not core.is_released(x) and core.writes(x) ~= saved[i + 1] then
      core.fail("backward: %s needs %s %s as it was, and %s has written to its memory since; compute the loss again "
        .. "after the write, or write to a copy (x:clone())", node.op.name, name_of(node, x, saved[i + 2]),
        core.shape_text(x), core.last_writer(x))
    end
  end
end

--- Wraps an op {name, outputs (differentiable ones, default 1), forward, backward} into a function that records it.
function tape.recorded(entry)
  local outputs = entry.outputs or 1
  local function finish(ctx, inputs, ...)
    made = made + 1
    local node = { op = entry, ctx = ctx, inputs = inputs, id = made, saved = saved_in(ctx),
      autocast = core.is_autocast() }
    for slot = 1, outputs do
      local y = (select(slot, ...))
      if y then
        y._node, y._slot, y.requires_grad = node, slot, true
      end
    end
    return ...
  end
  local function record(...)
    local ctx = {}
    if entry.backward and tape.is_enabled() then
      local n, needs = select("#", ...), nil
      for i = 1, n do
        local x = (select(i, ...))
        if is_tensor(x) and x.requires_grad then
          needs = needs or {}
          needs[i] = true
        end
      end
      if needs then
        ctx.needs = needs
        return finish(ctx, { n = n, ... }, entry.forward(ctx, ...))
      end
    end
    return entry.forward(ctx, ...)
  end
  local function widened_where_needed(...)
    if entry.takes_bf16 or not core.is_autocast() then return record(...) end
    return record(widened(...))
  end
  local function recorded(...)
    if tape.inspector then return tape.inspector.op(entry, widened_where_needed, ...) end
    return widened_where_needed(...)
  end
  tape.op_of[recorded] = entry
  return recorded
end

--- Runs a function without recording its ops, so that no gradient flows through them. A coroutine that was made
-- outside and is resumed inside goes on recording; one that the function makes does not.
-- @param f function
-- @param ... its arguments
-- @return what it returns
-- @raise what it raises; where a coroutine yields inside of it
function tape.no_grad(f, ...)
  unrecorded:enter {}
  local function done(ok, ...)
    unrecorded:leave()
    if not ok then error((...), 0) end
    return ...
  end
  return done(core.sealed("no_grad", f, ...))
end

--- All nodes that lead to `root`, latest first.
local function nodes_before(root)
  local list, seen, stack = {}, { [root] = true }, { root }
  while #stack > 0 do
    local node = table.remove(stack)
    list[#list + 1] = node
    if not node.inputs then
      core.fail("backward: the tape behind '%s' was already used by an earlier backward; compute the loss again",
        node.op.name)
    end
    expect_unchanged(node)
    for i = 1, node.inputs.n do
      local x = node.inputs[i]
      local before = is_tensor(x) and x._node
      if before and not seen[before] then
        seen[before] = true
        stack[#stack + 1] = before
      end
    end
  end
  table.sort(list, function(a, b) return a.id > b.id end)
  return list
end

--- The memory of a leaf's gradient. It belongs to the leaf and lives as long as the leaf, outside any step the leaf is
-- outside of.
local function buffer_of(leaf)
  local buffer = leaf._gradient_buffer
  if not buffer or core.is_released(buffer) then
    buffer = core.new_like(leaf, leaf._scope == nil)
    leaf._gradient_buffer = buffer
  end
  return buffer
end

--- All leaves that a pass over these nodes may give a gradient, as { leaf = true }.
local function leaves_of(nodes)
  local leaves = {}
  for _, node in ipairs(nodes) do
    for i in pairs(node.ctx.needs) do
      local x = node.inputs[i]
      if not x._node then leaves[x] = true end
    end
  end
  return leaves
end

--- Gives a leaf other memory for what the pass writes to, in place of the tensor g, which an op reads.
local function spare(leaf, g)
  local renew = leaf._renew_buffer
  if leaf._gradient_buffer == g then
    if renew then renew() else leaf._gradient_buffer = nil end
  end
  if leaf.grad ~= g then return end
  leaf.grad = core.new_like(leaf, leaf._scope == nil)
  op.convert(leaf.grad, core.contiguous(g))
  if not renew then leaf._gradient_buffer = leaf.grad end
end

--- Gives a leaf another gradient's memory where an op of these nodes reads the one that it has: the pass would write to
-- it before that op's turn comes.
local function spare_what_is_read(nodes)
  local by_writes = {} -- tensors of one memory have one count of writes, which tells most others apart
  for leaf in pairs(leaves_of(nodes)) do
    for _, g in pairs { leaf.grad or leaf._gradient_buffer, leaf._gradient_buffer } do
      if not core.is_released(g) then
        local writes = core.writes(g)
        by_writes[writes] = by_writes[writes] or {}
        by_writes[writes][g] = leaf
      end
    end
  end
  for _, node in ipairs(nodes) do
    local saved = node.saved
    for i = 1, #saved, 3 do
      local x = saved[i]
      for g, leaf in pairs(by_writes[saved[i + 1]] or {}) do
        if not core.is_released(x) and core.same_storage(x, g) then
          spare(leaf, g)
          by_writes[saved[i + 1]][g] = nil
        end
      end
    end
  end
end

-- leaf → its buffer, which the op whose backward runs was given and fills
local lent = {}

--- For an op's backward: an uninitialized tensor for the gradient of x, one of its inputs, to fill and return.
function tape.gradient_like(x)
  if x._node or x.grad or lent[x] or not x.requires_grad then return core.new_like(x) end
  lent[x] = buffer_of(x)
  return lent[x]
end

--- leaf.grad += g
local function add_to_leaf(leaf, g)
  if lent[leaf] then leaf.grad, lent[leaf] = lent[leaf], nil end
  if g == leaf.grad then return end
  if leaf.grad then
    op.binary(leaf.grad, leaf.grad, g, VX.ADD)
    return
  end
  local buffer = buffer_of(leaf)
  op.convert(buffer, g)
  leaf.grad = buffer
end

--- Runs x:backward() and then f(), with gradients of their own for the tensors of a list and all leaves behind x; what
-- these had before is theirs again afterwards, also when it fails.
function tape.backward_apart(x, list, f)
  local leaves, before = leaves_of(nodes_before(x._node)), {}
  for _, leaf in ipairs(list) do leaves[leaf] = true end
  for leaf in pairs(leaves) do
    before[leaf] = { grad = leaf.grad, buffer = leaf._gradient_buffer }
    leaf.grad, leaf._gradient_buffer = nil, nil
  end
  local ok, message = pcall(function()
    x:backward()
    f()
  end)
  for leaf, own in pairs(before) do
    if leaf._gradient_buffer then leaf._gradient_buffer:release() end
    leaf.grad, leaf._gradient_buffer = own.grad, own.buffer
  end
  if not ok then error(message, 0) end
end

--- Runs a function whose backward passes tell of their progress: final(leaf) is called as soon as nothing more is added
-- to a leaf's gradient in the pass, and between() after every op.
function tape.watched(final, between, f, ...)
  tape.watcher = { final = final, between = between }
  local function done(ok, ...)
    tape.watcher = nil
    if not ok then error((...), 0) end
    return ...
  end
  return done(core.sealed("tape.watched", f, ...))
end

--- Counts the uses of each leaf by nodes.
local function uses_of_leaves(nodes)
  local uses = {}
  for _, node in ipairs(nodes) do
    for i = 1, node.inputs.n do
      local x = node.inputs[i]
      if node.ctx.needs[i] and not x._node then uses[x] = (uses[x] or 0) + 1 end
    end
  end
  return uses
end

--- Counts off the uses of a node that is done.
local function tell_watcher(watcher, uses, inputs)
  for i = 1, inputs.n do
    local x = inputs[i]
    local left = x ~= nil and uses[x]
    if left then
      uses[x] = left > 1 and left - 1 or nil
      if left == 1 then watcher.final(x) end
    end
  end
  watcher.between()
end

--- Gives a leaf the memory in which its gradients are made from now on: a contiguous tensor of its shape that lives as
-- long. renew(): gives it other memory, where a pass has to leave this as it is.
function tape.set_buffer(leaf, buffer, renew) leaf._gradient_buffer, leaf._renew_buffer = buffer, renew end

--- Forgets the gradient and keeps its memory for the next one, which is written to the tensor that .grad was.
function core.Tensor:zero_grad() self.grad = nil end

--- Adds d(self)/d(leaf) to the .grad of every leaf that requires a gradient. What was recorded is used up. A leaf has
-- one tensor for its gradient: after zero_grad the next backward fills the same one, so keep w.grad:clone().
-- @param[opt=1] gradient tensor of self's shape, d(loss)/d(self); needed where self has more than one element
-- @raise where self depends on no leaf that requires a gradient, its record was used up already, a gradient of its
-- shape is needed, or a tensor that an op's gradient reads was written to since; then no gradient has changed
function core.Tensor:backward(gradient)
  local root = self._node
  if not self.requires_grad then core.fail "backward: of a tensor that does not depend on any that requires_grad" end
  if gradient == nil then
    if self:numel() ~= 1 then
      core.fail("backward: of a tensor %s, expected one element, or give a gradient of its shape",
        core.shape_text(self))
    end
    gradient = core.new_like(self):fill(1)
  else
    if not is_tensor(gradient) then core.fail("backward: gradient is a %s, expected a tensor", type(gradient)) end
    if core.shape_text(gradient) ~= core.shape_text(self) then
      core.fail("backward: gradient %s for a tensor %s", core.shape_text(gradient), core.shape_text(self))
    end
    -- a copy: it may be the gradient of a leaf, which the pass writes to
    gradient = core.overwrite(core.new_like(self), gradient)
  end
  if tape.inspector then tape.inspector.backward() end
  lent = {} -- what an op that failed was lent is forgotten
  if not root then
    add_to_leaf(self, gradient)
    return
  end

  -- holders[g]: how many slots hold gradient g; at 0 its memory is free again. sums[g]: g was made here as a sum and
  -- waits in one slot, so it may be added to in place; what an op returned may share its memory with another gradient
  -- (a view, or dy itself)
  local nodes, holders, sums = nodes_before(root), { [gradient] = 1 }, {}
  spare_what_is_read(nodes)
  root.gradients = { [self._slot] = gradient }

  local function drop(g)
    local n = holders[g] - 1
    holders[g] = n
    if n == 0 then g:release() end
  end

  --- What the first input of an op that adds to it has got so far.
  local function so_far(node)
    local x = node.inputs[1]
    local gradients = node.op.accumulates and node.ctx.needs[1] and x._node and x._node.gradients
    local g = gradients and gradients[x._slot]
    return g and g:is_contiguous() and g or nil
  end

  --- included: a gradient that g includes already.
  local function deposit(x, g, included)
    local node = x._node
    if not node then return add_to_leaf(x, core.contiguous(g)) end
    node.gradients = node.gradients or {}
    local before = node.gradients[x._slot]
    if not before or before == included then
      holders[g] = (holders[g] or 0) + 1
      node.gradients[x._slot] = g
      if before then drop(before) end
    elseif sums[before] then
      op.binary(before, before, g, VX.ADD)
    else
      local sum = core.new_like(x)
      holders[sum], sums[sum] = 1, true
      node.gradients[x._slot] = sum
      op.binary(sum, before, g, VX.ADD)
      drop(before)
    end
  end

  local function spread(node, included, ...)
    for i = 1, node.inputs.n do
      local g = (select(i, ...))
      if g and node.ctx.needs[i] and g ~= lent[node.inputs[i]] then
        holders[g] = (holders[g] or 0) + 1 -- held by this loop
      end
    end
    for i = 1, node.inputs.n do
      local g = (select(i, ...))
      if g and node.ctx.needs[i] then
        deposit(node.inputs[i], g, i == 1 and included or nil)
        if holders[g] then drop(g) end
      end
    end
    for x in pairs(lent) do lent[x] = nil end -- of inputs that wanted no gradient after all
  end

  local function gradients_of(node, ...)
    if node.autocast == core.is_autocast() then return node.op.backward(node.ctx, ...) end
    return core.autocast(node.autocast and "bf16" or "f32", node.op.backward, node.ctx, ...)
  end

  local watcher = tape.watcher
  local uses = watcher and uses_of_leaves(nodes)
  for _, node in ipairs(nodes) do
    local g = node.gradients
    if g then
      local outputs = node.op.outputs or 1
      for slot = 1, outputs do
        if g[slot] then sums[g[slot]] = nil end -- it may now be handed on
        if g[slot] and not g[slot]:is_contiguous() then
          local whole = core.contiguous(g[slot])
          holders[whole] = 1
          drop(g[slot])
          g[slot] = whole
        end
      end
      local included = so_far(node)
      if tape.inspector then
        spread(node, included, tape.inspector.gradients(node, gradients_of(node, g[1], g[2], included)))
      else
        spread(node, included, gradients_of(node, g[1], g[2], included))
      end
      for slot = 1, outputs do
        if g[slot] then drop(g[slot]) end
      end
    end
    local inputs = node.inputs
    node.inputs, node.ctx, node.gradients, node.saved = nil, nil, nil, nil
    if watcher then tell_watcher(watcher, uses, inputs) end
  end
end

return tape
