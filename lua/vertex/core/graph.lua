--- core/graph.lua: recorded graphs as C holds them, and the counts of Lua that a replay carries on. What users call is
-- lua/vertex/step_graph.lua.

local ffi = require "ffi"
local device_number = require("vertex.core.device").device_number
local library = require "vertex.core.library"

local C, call, check = library.C, library.call, library.check

local graphs = {}

-- The counts of the recording under way: an array of {object, field, kind, value}.
local counts

--- Adds one to object[field], now and at every replay of the graph that is being recorded.
-- @param object table
-- @param field name of a number in it
-- @param[opt] kind "stream" where the sum is a random stream of object.seed, "step" where it is AdamW's step; nil for
-- what Lua alone counts
-- @return the sum
function graphs.count(object, field, kind)
  local value = object[field] + 1
  object[field] = value
  if counts then counts[#counts + 1] = { object = object, field = field, kind = kind, value = value } end
  return value
end

--- Puts object[field] back to an earlier value, also in the graph that is being recorded.
-- @param object table
-- @param field name of a number in it
-- @param value number, which it was when what has failed since began
function graphs.take_back(object, field, value)
  object[field] = value
  for i = counts and #counts or 0, 1, -1 do
    local one = counts[i]
    if one.object == object and one.field == field and one.value > value then table.remove(counts, i) end
  end
end

--- Says whether a graph is being recorded.
function graphs.is_recording() return counts ~= nil end

local Graph = {}
Graph.__index = Graph

--- Runs a function while a device records what it queues. An error inside drops the recording.
-- @param device "cpu", "cuda:0", ...
-- @param rate what the learning rates of AdamW inside are relative to
-- @param f function
-- @param ... its arguments
-- @return graph, and what f returns; nil where the device has no graphs, and f was not run then
function graphs.record(device, rate, f, ...)
  local number, out = device_number(device), ffi.new "vx_graph *[1]"
  local status = C.vx_graph_begin(number, rate)
  if status == C.VX_ENOSUP then return nil end
  check(status)
  local mine = {}
  counts = mine
  local function done(ok, ...)
    counts = nil
    if not ok then
      C.vx_graph_end(number, nil)
      error((...), 0)
    end
    check(C.vx_graph_end(number, out))
    return setmetatable({ g = ffi.gc(out[0], C.vx_graph_free), counts = mine }, Graph), ...
  end
  return done(library.sealed("graph", f, ...))
end

--- Lists the pairs that recorded random ops draw from, in the order in which :launch takes them anew.
-- @return array of { seed, stream }
function Graph:draws()
  local list, draw = {}, ffi.new "vx_draw"
  while true do
    local status = C.vx_graph_draw(self.g, #list, draw)
    if status == C.VX_EEND then return list end
    check(status)
    list[#list + 1] = { seed = tonumber(draw.seed), stream = tonumber(draw.stream) }
  end
end

--- Runs the recorded ops.
-- @param rate learning rate, as that of core.record
-- @param steps those of AdamW since the recording
-- @param draws array as :draws() gave it, with the values of now
function Graph:launch(rate, steps, draws)
  self.buffer = self.buffer or ffi.new("vx_draw[?]", math.max(1, #draws))
  for i, d in ipairs(draws) do self.buffer[i - 1].seed, self.buffer[i - 1].stream = d.seed, d.stream end
  call(C.vx_graph_launch, self.g, rate, steps, self.buffer)
end

--- Frees the recording and the memory it keeps.
function Graph:release()
  C.vx_graph_free(ffi.gc(self.g, nil))
  self.g = nil
end

return graphs
