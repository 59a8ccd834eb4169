--- reference.lua: writes the page of all public names, in Markdown, from what help prints of each:
--
--   luajit lua/vertex/interactive/reference.lua build/reference.md

local here = arg[0]:match "^(.*)/interactive/" or ".."
dofile(here .. "/start.lua")

local vx = require "vertex"
local help = require "vertex.interactive.help"
local names = require "vertex.interactive.names"
local Session = require "vertex.interactive.session"

local WIDTH = 110
local session = Session.new { env = setmetatable({ vx = vx }, { __index = _G }) }
local out = { "# Reference\n",
  "Every public name of Vertex, as `?name` explains it in a session. Quantizers are at the end.\n" }
local module

for _, entry in ipairs(names.all(vx)) do
  if entry.module ~= module then
    module = entry.module
    out[#out + 1] = ("## %s\n"):format(module)
  end
  out[#out + 1] = ("### %s\n\n```text\n%s\n```\n"):format(entry.name, help.of_value(session, entry.value, entry.name,
    WIDTH))
end
out[#out + 1] = "## Quantizers\n"
for _, item in ipairs(vx.quantizers()) do
  out[#out + 1] = ("### %s\n\n```text\n%s\n```\n"):format(item.name, help.about(session, item.name, WIDTH))
end

local path = arg[1] or "build/reference.md"
local f = assert(io.open(path, "w"))
f:write(table.concat(out, "\n"))
f:close()
print(("%s: %d names"):format(path, #out))
