--- core/trace.lua: what each numeric op costs. With VERTEX_DEBUG=2 in the environment, or vx.debug(2), every op writes
-- a line to stderr: its name, the shapes of its tensors, milliseconds, GB/s and GFLOP/s, bytes; at the end come totals
-- by op. With 1 only the totals come. With 0, the default, ops are called as they are, and it costs nothing.
--
-- GB/s counts each tensor of the call once, read or written; GFLOP/s the operations of the formulas below, for ops
-- that arithmetic bounds. On a GPU every op is waited for, so that times are its own and the whole takes longer.

local check = require "vertex.check"
local device = require "vertex.core.device"
local dtype = require "vertex.core.dtype"
local graph = require "vertex.core.graph"
local library = require "vertex.core.library"
local ops = require "vertex.core.op"
local system = require "vertex.core.system"

local fail = library.fail

-- Floating point operations by the letters of the op's contract and its numbers (core/ops.def). A power counts as one.
local FLOPS = {
  gemm = "2*B*M*N*K",
  conv3x3 = "18*B*H*W*C*O", conv3x3_backward_input = "18*B*H*W*C*O", conv3x3_backward_weight = "18*B*H*W*C*O",
  conv2d = "2*B*P*Q*O*D*K*L", conv2d_backward_input = "2*B*P*Q*O*D*K*L",
  conv2d_backward_weight = "2*B*P*Q*O*D*K*L",
  conv1d = "2*B*T*O*D*K", conv1d_backward_input = "2*B*T*O*D*K", conv1d_backward_weight = "2*B*T*O*D*K",
  depthwise_conv2d = "18*B*P*Q*C", depthwise_conv2d_backward_input = "18*B*P*Q*C",
  depthwise_conv2d_backward_weight = "18*B*P*Q*C",
  sepconv2d = "B*P*Q*C*(18+2*O)", sepconv2d_backward = "B*P*Q*C*(54+4*O)",
  assign = "2*N*G*M*D", knn = "3*N*L*D",
  smooth_forward = "N*G*M*(4*D+2)", smooth_backward = "N*G*M*(10*D+2)",
}

-- -- One call ---------------------------------------------------------------------------------------------------------

--- Tensors of a call, in the order of ops.def, nil ones left out; and the values of all arguments by name.
local function arguments_of(entry, ...)
  local values, first = {}, ...
  if type(first) == "table" and getmetatable(first) == nil and first[entry.all[1]] ~= nil then
    values = first
  else
    for i, name in ipairs(entry.all) do values[name] = (select(i, ...)) end
  end
  local tensors = {}
  for _, name in ipairs(entry.tensors) do
    local x = values[name]
    for _, one in ipairs(entry.each and x or { x }) do tensors[#tensors + 1] = { name, one } end
  end
  return tensors, values
end

--- The sizes that the contract's letters stand for in this call, and the numbers by name.
local function letters_of(entry, tensors, values)
  local letters = {}
  for _, name in ipairs(entry.numbers) do letters[name] = values[name] end
  for _, pair in ipairs(tensors) do
    local contract, word = " " .. entry.contract, " " .. pair[1] .. "[~?]*"
    local sizes = contract:match(word .. "%((.-)%)") or contract:match(word .. ":%w+[~?]*%((.-)%)")
    local shape, at = pair[2]:shape(), 0
    for size in (sizes or ""):gmatch "[^,]+" do
      at = at + 1
      if size:find "^%a$" then letters[size] = shape[at] end
    end
  end
  return letters
end

local compiled = {}

--- Floating point operations of a call; nil where no formula is known.
local function flops_of(entry, tensors, values)
  if not FLOPS[entry.name] or entry.each then return nil end
  local f = compiled[entry.name] or assert(loadstring("return " .. FLOPS[entry.name]))
  compiled[entry.name] = f
  return setfenv(f, letters_of(entry, tensors, values))()
end

local function size_text(bytes)
  for _, unit in ipairs { { 1e9, "GB" }, { 1e6, "MB" }, { 1e3, "kB" } } do
    if bytes >= unit[1] then return ("%.1f %s"):format(bytes / unit[1], unit[2]) end
  end
  return ("%d B"):format(bytes)
end

--- "12.3 GB/s  45.6 GFLOP/s", always as wide; the second is left blank where flops is nil.
local function rates(seconds, bytes, flops)
  local second = flops and ("%8.1f GFLOP/s"):format(flops / seconds / 1e9) or (" "):rep(16)
  return ("%8.2f GB/s  %s"):format(bytes / seconds / 1e9, second)
end

-- -- Tracing ----------------------------------------------------------------------------------------------------------

local current, totals, plain = 0, {}, {}

local function add_total(name, seconds, bytes, flops)
  local t = totals[name] or { name = name, calls = 0, seconds = 0, bytes = 0 }
  totals[name] = t
  t.calls, t.seconds, t.bytes = t.calls + 1, t.seconds + seconds, t.bytes + bytes
  if flops then t.flops = (t.flops or 0) + flops end
end

--- The function that takes an op's place: calls it, waits for it, tells.
local function traced(entry, f)
  return function(...)
    if graph.is_recording() then return f(...) end -- nothing is computed now
    local tensors, values = arguments_of(entry, ...)
    local where = tensors[1][2]:device()
    device.sync(where)
    local began = system.time()
    f(...)
    device.sync(where)
    local seconds = math.max(system.time() - began, 1e-9)
    local bytes, shapes = 0, {}
    for i, pair in ipairs(tensors) do
      bytes = bytes + pair[2]:numel() * dtype.dtypes[pair[2]:dtype()].bytes
      if i <= 8 then shapes[i] = "(" .. table.concat(pair[2]:shape(), ",") .. ")" end
    end
    if #tensors > 8 then shapes[9] = ("and %d more"):format(#tensors - 8) end
    local flops = flops_of(entry, tensors, values)
    add_total(entry.name, seconds, bytes, flops)
    if current == 2 then
      io.stderr:write(("%-26s %9.3f ms  %s  %9s  %s\n"):format(entry.name, seconds * 1e3, rates(seconds, bytes, flops),
        size_text(bytes), table.concat(shapes, " ")))
    end
  end
end

--- Writes the totals by op, the longest first, and forgets them.
local function write_totals()
  local list, sum = {}, 0
  for _, t in pairs(totals) do list[#list + 1], sum = t, sum + t.seconds end
  if #list == 0 then return end
  totals = {}
  table.sort(list, function(a, b) return a.seconds > b.seconds or a.seconds == b.seconds and a.name < b.name end)
  io.stderr:write(("ops: %.3f ms in all\n"):format(sum * 1e3))
  for _, t in ipairs(list) do
    io.stderr:write(("%-26s %9.3f ms  %5.1f%%  %6d calls  %s  %9s\n"):format(t.name, t.seconds * 1e3,
      100 * t.seconds / sum, t.calls, rates(t.seconds, t.bytes, t.flops), size_text(t.bytes)))
  end
end

local function set_level(level)
  if level == current then return end
  for _, entry in ipairs(ops.op_list()) do
    if level > 0 and current == 0 then
      plain[entry.name] = ops.op[entry.name]
      ops.op[entry.name] = traced(entry, plain[entry.name])
    elseif level == 0 then
      ops.op[entry.name] = plain[entry.name]
    end
  end
  current = level
end

--- Tells on stderr what each op costs. At level 2 every op writes a line: name, milliseconds, GB/s, GFLOP/s (where
-- arithmetic bounds it), bytes of its tensors, and their shapes; at level 1 there are only the totals by op, the
-- longest first, which come when f returns, when the level is set to 0, or at the program's end. VERTEX_DEBUG in the
-- environment sets the level from the start. On a GPU every op is waited for.
-- @param level integer, 0 (off), 1 or 2
-- @param[opt] f function: the level holds while it runs, and the level before comes back
-- @return what f returns
-- @raise where the level is no 0, 1 or 2; what f raises
local function debug_ops(level, f)
  if level ~= 0 and level ~= 1 and level ~= 2 then
    fail("debug: level is %s, expected 0 (off), 1 (totals of the ops) or 2 (a line for each)", check.show(level))
  end
  if f == nil then
    set_level(level)
    if level == 0 then write_totals() end
    return
  end
  local before = current
  set_level(level)
  local results = { library.sealed("debug", f) }
  set_level(before)
  if before == 0 then write_totals() end
  if not results[1] then error(results[2], 0) end
  return unpack(results, 2, table.maxn(results))
end

system.at_exit(write_totals)

local asked = os.getenv "VERTEX_DEBUG"
if asked and asked ~= "" then
  if not asked:find "^[012]$" then
    error(("VERTEX_DEBUG is '%s', expected 0 (off), 1 (totals of the ops) or 2 (a line for each)"):format(asked), 0)
  end
  set_level(tonumber(asked))
end

return { debug = debug_ops, is_traced = function() return current > 0 end }
