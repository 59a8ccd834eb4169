--- runs/tensorboard: what a run logs, as TensorBoard reads it: OUT/tensorboard/METHOD/events.out.tfevents.*, scalars
-- under the names of metrics.jsonl.
--
-- A file is a sequence of records: length (u64), its masked CRC-32C, an Event in protocol buffers, its masked CRC-32C;
-- all little-endian. Event { double wall_time = 1; int64 step = 2; string file_version = 3; Summary summary = 5 },
-- Summary { repeated Value value = 1 }, Value { string tag = 1; float simple_value = 2 }.

local bit = require "bit"
local check = require "vertex.check"
local core = require "vertex.core"

local band, bnot, bor, bxor, lshift, rshift = bit.band, bit.bnot, bit.bor, bit.bxor, bit.lshift, bit.rshift

local TABLE = {} -- of CRC-32C, for a byte at a time
for n = 0, 255 do
  local c = n
  for _ = 1, 8 do c = band(c, 1) == 1 and bxor(rshift(c, 1), 0x82f63b78) or rshift(c, 1) end
  TABLE[n] = c
end

local function u32(n)
  return string.char(band(n, 255), band(rshift(n, 8), 255), band(rshift(n, 16), 255), rshift(n, 24))
end

local function masked_crc(text)
  local c = -1
  for i = 1, #text do c = bxor(rshift(c, 8), TABLE[band(bxor(c, text:byte(i)), 255)]) end
  c = bnot(c)
  return u32(bit.tobit(bor(rshift(c, 15), lshift(c, 17)) + 0xa282ead8))
end

local function varint(n)
  local bytes = {}
  repeat
    bytes[#bytes + 1] = string.char(n % 128 + (n >= 128 and 128 or 0))
    n = math.floor(n / 128)
  until n == 0
  return table.concat(bytes)
end

local number = core.number_bytes

-- Field numbers with their wire types: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes.
local function bytes_field(field, bytes) return string.char(field * 8 + 2) .. varint(#bytes) .. bytes end

local function record(event)
  local length = number("uint64_t", #event)
  return length .. masked_crc(length) .. event .. masked_crc(event)
end

local function event(time, step, rest)
  local at = step == 0 and "" or string.char(2 * 8) .. varint(step) -- a 0 goes without saying
  return record(string.char(1 * 8 + 1) .. number("double", time) .. at .. rest)
end

--- An entry of metrics.jsonl as a record; its numbers but the step are scalars. Nothing for an entry without numbers.
local function entry_record(entry, time)
  local values = {}
  for _, name in ipairs(check.names(entry)) do
    if type(entry[name]) == "number" and name ~= "step" and name ~= "seed" then
      values[#values + 1] = bytes_field(1, bytes_field(1, name) .. string.char(2 * 8 + 5)
        .. number("float", entry[name]))
    end
  end
  return #values > 0 and event(time, entry.step, bytes_field(5, table.concat(values))) or ""
end

local Writer = {}
Writer.__index = Writer

--- Appends what was logged at a step.
-- @param entry of metrics.jsonl
-- @raise where the file cannot be written
function Writer:add(entry)
  local f, reason = io.open(self.path, "ab")
  if not f then core.fail("%s", reason) end
  f:write(entry_record(entry, os.time()))
  f:close()
end

--- Begins a method's file anew.
-- @param folder where it is to be
-- @param history array of the entries that are logged already
-- @return writer with :add(entry)
-- @raise where the file cannot be written
return function(folder, history)
  local made, reason = core.make_folders(folder)
  if not made then core.fail("%s: %s", folder, reason) end
  local self = setmetatable({ path = folder .. "/events.out.tfevents.vertex" }, Writer)
  local now = os.time()
  local records = { event(now, 0, bytes_field(3, "brain.Event:2")) }
  for _, entry in ipairs(history) do records[#records + 1] = entry_record(entry, now) end
  core.write_file(self.path, table.concat(records))
  return self
end
