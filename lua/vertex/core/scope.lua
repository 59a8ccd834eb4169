--- core/scope.lua: the step scope. LuaJIT's collector does not see tensor memory; vx.step(f) frees what f made the
-- moment f is over, also when it fails, except what f returns or keeps.

local sealed = require("vertex.core.library").sealed
local tensors = require "vertex.core.tensor"

local is_tensor, extents = tensors.is_tensor, tensors.scopes

local scopes = {}
local OVER = require("vertex.core.op").OVER

--- Keeps a tensor made inside vx.step alive beyond it.
-- @param x anything: a tensor of any shape, whose gradient is kept too; any other value is given back as it is
-- @return x
function scopes.keep(x)
  if is_tensor(x) then
    x._scope = nil
    if is_tensor(x.grad) then x.grad._scope = nil end
  end
  return x
end

--- Hands the tensors of scope `mine` among the values that a step returns, and in their tables, on to the scope around
-- it (nil: to nobody).
local function hand_on(values, mine, around)
  local waiting, seen = { values }, {}
  while #waiting > 0 do
    local value = table.remove(waiting)
    if is_tensor(value) then
      if value._scope == mine then
        value._scope = around
        if around then around[#around + 1] = value end
      end
      value._node = nil -- what it was computed from is about to go
    else
      for _, v in next, value do
        if type(v) == "table" and not seen[v] then
          seen[v] = true
          waiting[#waiting + 1] = v
        end
      end
    end
  end
end

local function leave(mine, around, ok, ...)
  extents:leave()
  if ok then hand_on({ ... }, mine, around) end
  for i = 1, #mine do
    local t = mine[i]
    if t._scope == mine then
      t._scope = not tensors.is_released(t) and OVER or nil
      t:release()
    end
  end
  if not ok then error((...), 0) end
  return ...
end

--- Runs a function and then frees every tensor made during it, except those it returns (also inside tables) and those
-- passed to vx.keep; also when it fails. Steps nest. A coroutine that was made outside and is resumed inside keeps
-- what it makes; one that f makes does not.
-- @param f function
-- @param ... its arguments
-- @return what f returns; its tensors are cut from the tape that made them
-- @raise what f raises; where a coroutine yields inside of f
function scopes.step(f, ...)
  local mine = {}
  local around = extents:here()
  extents:enter(mine)
  return leave(mine, around, sealed("step", f, ...))
end

return scopes
