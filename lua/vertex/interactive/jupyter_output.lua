--- jupyter_output.lua: what a cell writes and shows on its way to the notebook, and what it reads there: the standard
-- files, bundles of forms, display.show.
--
-- What a cell prints is gathered for FLUSH_EVERY seconds, so that a loop does not flood the notebook.

local core = require "vertex.core"
local display = require "vertex.interactive.display"
local json = require "vertex.json"
local show = require "vertex.interactive.show"
local utf8 = require "vertex.utf8"

local output = {}

local FLUSH_EVERY = 0.05 -- seconds
local REPLACEMENT = "\239\191\189" -- U+FFFD, for bytes that are no character

local Output = {}
Output.__index = Output

--- Makes the output of a notebook's process.
-- @param server Server that publishes it
-- @return Output
function output.new(server)
  return setmetatable({ server = server, written = {}, rest = { stdout = "", stderr = "" }, flushed = 0 }, Output)
end

-- -- Streams ----------------------------------------------------------------------------------------------------------

--- Sends what was gathered.
-- @param[opt] last true: nothing follows that could complete a character
function Output:flush(last)
  local written = self.written -- runs of output to the same file: arrays of texts with a name
  self.written, self.flushed = {}, core.time()
  for _, run in ipairs(written) do
    local text, rest = utf8.clean(self.rest[run.name] .. table.concat(run))
    self.rest[run.name] = rest
    if text ~= "" then self.server:publish("stream", { name = run.name, text = text }) end
  end
  if not last then return end
  for name, rest in pairs(self.rest) do
    if rest ~= "" then self.server:publish("stream", { name = name, text = REPLACEMENT }) end
    self.rest[name] = ""
  end
end

--- Gathers output of the cell.
-- @param name "stdout" or "stderr"
-- @param text string, any bytes
function Output:write(name, text)
  local run = self.written[#self.written]
  if not run or run.name ~= name then
    run = { name = name }
    self.written[#self.written + 1] = run
  end
  run[#run + 1] = text
  self:tick()
end

--- Sends what is due, and ends the process where Jupyter is gone. Called often while a cell runs.
function Output:tick()
  if core.time() - self.flushed < FLUSH_EVERY then return end
  self:flush()
  if self.server:orphaned() then os.exit(1) end
end

--- Makes the next output appear at once.
function Output:hurry() self.flushed = core.time() - FLUSH_EVERY end

-- -- Forms ------------------------------------------------------------------------------------------------------------

--- Writes a bundle as JSON can hold it: texts as valid UTF-8, other bytes in base64.
-- @param bundle table form → bytes
-- @return table to be written as a JSON object
function output.bundle(bundle)
  local data = {}
  for form, value in pairs(bundle) do
    if type(value) ~= "string" then
      data[form] = value -- application/json
    elseif form:find "^text/" or form == "image/svg+xml" or form == "application/javascript" then
      local text, rest = utf8.clean(value)
      data[form] = rest == "" and text or text .. REPLACEMENT
    else
      data[form] = display.base64(value)
    end
  end
  return json.object(data)
end

--- Gives the forms of a value: those its __mime tells, otherwise its text as a session shows it.
-- @param value any value
-- @return table of output.bundle
-- @return table form → metadata, to be written as a JSON object
function output.forms(value)
  local meta = getmetatable(value)
  if type(meta) == "table" and rawget(meta, "__mime") then
    local bundle, metadata = display.mime(value)
    return output.bundle(bundle), json.object(metadata)
  end
  return output.bundle { ["text/plain"] = show.value(value) }, json.object()
end

--- Shows a bundle for display.show. An id that this cell has shown before is replaced where it stands.
-- @param bundle table form → bytes
-- @param options { id = any value or nil, metadata = table or nil }
function Output:display(bundle, options)
  self:flush()
  local server, kind, transient = self.server, "display_data", json.object()
  if options.id ~= nil then
    local id = tostring(options.id)
    kind = server.displayed[id] and "update_display_data" or kind
    server.displayed[id], transient.display_id = true, id
  end
  server:publish(kind, { data = output.bundle(bundle), metadata = json.object(options.metadata),
    transient = transient })
end

-- -- Standard files ---------------------------------------------------------------------------------------------------

--- Reads from the person at the notebook, a line for each format, as io.read does.
local function read(server, ...)
  local formats, out = { ... }, {}
  for i = 1, math.max(1, #formats) do
    local format, line = formats[i] or "*l", server:ask()
    if not line then return nil end
    local letter = type(format) == "string" and format:match "^%*?(%a)"
    if type(format) == "number" then
      out[i] = line:sub(1, format)
    elseif letter == "n" then
      out[i] = tonumber(line)
    elseif letter == "a" or letter == "L" then
      out[i] = line .. "\n"
    elseif letter == "l" then
      out[i] = line
    else
      core.fail("io.read: format '%s', expected a number, *l, *n or *a", tostring(format))
    end
  end
  return unpack(out, 1, math.max(1, #formats))
end

--- Joins the arguments of a write; what is neither a string nor a number is an error.
local function text_of(...)
  local parts = { ... }
  for i = 1, select("#", ...) do
    local kind = type(parts[i])
    if kind ~= "string" and kind ~= "number" then
      core.fail("write: argument %d is a %s, expected a string or a number", i, kind)
    end
  end
  return table.concat(parts)
end

--- Leads print, io.write, io.read and the methods of io.stdout, io.stderr and io.stdin to the notebook from now on.
function Output:redirect()
  local names = { [io.stdout] = "stdout", [io.stderr] = "stderr" }
  local file, plain_write, plain_read = getmetatable(io.stdout).__index, io.stdout.write, io.stdout.read
  function file.write(f, ...)
    if not names[f] then return plain_write(f, ...) end
    self:write(names[f], text_of(...))
    return true
  end
  function file.read(f, ...)
    if f ~= io.stdin then return plain_read(f, ...) end
    return read(self.server, ...)
  end
  core.redefine("io", "write", function(...) return io.output():write(...) end)
  core.redefine("io", "read", function(...) return io.input():read(...) end)
  function _G.print(...)
    local parts = { ... }
    for i = 1, select("#", ...) do parts[i] = tostring(parts[i]) end
    self:write("stdout", table.concat(parts, "\t") .. "\n")
  end
end

return output
