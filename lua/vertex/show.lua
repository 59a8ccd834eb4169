--- show.lua: what print(tensor) says: dtype, shape, device, statistics, and the corner values of large tensors.

local core = require "vertex.core"
local tape = require "vertex.tape"

local EDGE, FEW = 3, 8 -- of a longer dimension than FEW, the first and last EDGE are shown

local function number_format(dtype)
  if dtype == "i32" or dtype == "u8" then return function(v) return ("%d"):format(v) end end
  return function(v)
    if v ~= v then return "nan" end
    if v == math.floor(v) and math.abs(v) < 1e5 then return ("%d."):format(v) end
    local a = math.abs(v)
    if a ~= 0 and (a < 1e-3 or a >= 1e5) then return ("%.3e"):format(v) end
    return ("%.4f"):format(v)
  end
end

--- Indices of a dimension to show; 0 stands for "...".
local function shown(n)
  local list = {}
  if n <= FEW then
    for i = 1, n do list[i] = i end
  else
    for i = 1, EDGE do list[i] = i end
    list[EDGE + 1] = 0
    for i = n - EDGE + 1, n do list[#list + 1] = i end
  end
  return list
end

--- The shown corners of x as text; reads only those rows.
local function values(x)
  local format, shape = number_format(x:dtype()), x:shape()
  local width = 0
  local function collect(view, d)
    if d == #shape then
      local row, out = d == 0 and { view:item() } or view:totable(), {}
      for _, i in ipairs(d == 0 and { 1 } or shown(shape[d])) do
        local text = i == 0 and "..." or format(row[i])
        out[#out + 1] = text
        width = math.max(width, #text)
      end
      return out
    end
    local out = {}
    for _, i in ipairs(shown(shape[d])) do out[#out + 1] = i == 0 and "..." or collect(view[i], d + 1) end
    return out
  end
  local cells = collect(x, #shape == 0 and 0 or 1)
  if #shape == 0 then return cells[1] end
  local function render(level, d)
    if type(level) == "string" then return level end
    local parts = {}
    for i, c in ipairs(level) do parts[i] = d == #shape and (" "):rep(width - #c) .. c or render(c, d + 1) end
    local between = d == #shape and ", " or "," .. ("\n"):rep(#shape - d) .. (" "):rep(d)
    return "[" .. table.concat(parts, between) .. "]"
  end
  return render(cells, 1)
end

local function statistics(x)
  if x:numel() < 2 then return "" end
  local f = x:dtype() == "f32" and x or x:to "f32"
  local bad = require("vertex.ops").nonfinite(f:reshape { -1, 1 })
  local mean = f:mean():item()
  local deviation = math.sqrt(math.max(0, (f - mean):square():mean():item()))
  local text = ("  mean %.4g  sd %.4g  min %.4g  max %.4g"):format(mean, deviation, f:min():item(), f:max():item())
  return bad > 0 and text .. ("  %d not finite"):format(bad) or text
end

local function describe(x)
  if x._h == nil then return "tensor (released)" end
  local head = ("%s %s on %s"):format(x:dtype(), core.shape_text(x), x:device())
  if x.requires_grad then head = head .. (x._node and "  from " .. x._node.op.name or "  requires_grad") end
  if x:numel() == 0 then return head .. "  (no elements)" end
  local text
  core.step(function()
    text = tape.no_grad(function() return head .. statistics(x) .. "\n" .. values(x) end)
  end)
  return text
end

core.Tensor.__tostring = function(x)
  local ok, text = pcall(describe, x)
  return ok and text or "tensor (" .. tostring(text) .. ")"
end

return describe
