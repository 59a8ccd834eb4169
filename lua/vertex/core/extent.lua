--- core/extent.lua: what holds while a function runs: vx.step, vx.no_grad. It holds in the coroutine that called it and
-- in coroutines made inside of it; another that is merely resumed inside goes on as it was. Nothing yields out of such
-- a function (library.sealed), so that extents are left in the reverse order in which they were entered.

local library = require "vertex.core.library"

local running = coroutine.running

local MAIN = {} -- stands for the main thread, which coroutine.running does not name
local kinds = {}
local made_in = setmetatable({}, { __mode = "k" }) -- coroutine → { kind = the extent of it that it was made in }

local Extents = {}
Extents.__index = Extents

--- Begins an extent, a table of the caller's.
function Extents:enter(extent)
  extent.owner, extent.around = running() or MAIN, self.innermost
  self.innermost = extent
end

--- Ends the extent that was entered last.
function Extents:leave() self.innermost = self.innermost.around end

--- Gives the innermost extent that the running coroutine is in, or nil.
function Extents:here()
  local extent = self.innermost
  if not extent then return nil end
  local thread = running() or MAIN
  if extent.owner == thread then return extent end
  local home = made_in[thread] and made_in[thread][self]
  while extent and extent.owner ~= thread and extent ~= home do extent = extent.around end
  return extent
end

--- Makes a coroutine.create or coroutine.wrap that remembers the extents a coroutine is made in.
local function remembering(make)
  return function(f)
    local homes
    for _, kind in ipairs(kinds) do
      local extent = kind:here()
      if extent then
        homes = homes or {}
        homes[kind] = extent
      end
    end
    if not homes or type(f) ~= "function" then return make(f) end
    return make(function(...)
      made_in[running()] = homes
      return f(...)
    end)
  end
end

library.redefine("coroutine", "create", remembering(coroutine.create))
library.redefine("coroutine", "wrap", remembering(coroutine.wrap))

--- Makes a kind of extents.
local function new_extents()
  local kind = setmetatable({}, Extents)
  kinds[#kinds + 1] = kind
  return kind
end

return { new_extents = new_extents }
