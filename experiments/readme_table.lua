--- Writes the table of quantizers into README.md, from what their files declare. `--check` only tells whether it is up
-- to date (exit status).
--
--   luajit experiments/readme_table.lua [--check]

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")

local core, registry = require "vertex.core", require "vertex.quantizers"

local lines = { "| name | kind | nearest by | what it does | source |", "|:--|:--|:--|:--|:--|" }
for _, item in ipairs(registry.list) do
  if not item.ablation then
    lines[#lines + 1] = ("| `%s` | %s | %s | %s | %s |"):format(item.name, item.kind, item.metric or "–", item.summary,
      item.paper)
  end
end
local generated = table.concat(lines, "\n")

local f = assert(io.open(core.root .. "/README.md"))
local readme = f:read "*a"
f:close()
local first, last = "<!-- quantizers: written by experiments/readme_table.lua -->\n", "\n<!-- end of quantizers -->"
local a, b = readme:find(first, 1, true)
local c = readme:find(last, 1, true)
assert(a and c, "README.md lacks the marks around the table")
local updated = readme:sub(1, b) .. generated .. readme:sub(c)
if arg[1] == "--check" then
  io.write(updated == readme and "up to date\n"
    or "README.md's table of quantizers is out of date: luajit experiments/readme_table.lua\n")
  os.exit(updated == readme and 0 or 1)
end
core.write_file(core.root .. "/README.md", updated)
