--- runs/report: report.html of a run or of a series, one page that needs no other file: the table with the best in
-- bold, the pictures, configuration, machine, versions. It is made of what the folder holds, so that it can be made
-- again.

local lfs = require "lfs"
local check = require "vertex.check"
local core = require "vertex.core"
local flags_of = require "vertex.runs.flags"
local json = require "vertex.json"

local refuse = flags_of.refuse

-- -- What a folder holds ----------------------------------------------------------------------------------------------

--- Names of a folder's PNGs, curves first.
local function pictures_of(out)
  local names = {}
  for entry in lfs.dir(out) do
    if entry:find "%.png$" then names[#names + 1] = entry end
  end
  table.sort(names, function(a, b)
    local first, second = a == "curves.png", b == "curves.png"
    if first ~= second then return first end
    return a < b
  end)
  return names
end

--- The runs of a series: names of its folders that hold one.
local function members_of(out)
  local names = {}
  for entry in lfs.dir(out) do
    if entry:find("=", 1, true) and lfs.attributes(out .. "/" .. entry .. "/config.json") then
      names[#names + 1] = entry
    end
  end
  table.sort(names)
  return names
end

-- -- HTML -------------------------------------------------------------------------------------------------------------

local ENTITIES = { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;" }
local function escape(text) return (text:gsub('[&<>"]', ENTITIES)) end

local ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

local function base64(bytes)
  local out = {}
  for i = 1, #bytes, 3 do
    local a, b, c = bytes:byte(i, i + 2)
    local n = a * 65536 + (b or 0) * 256 + (c or 0)
    for k = 3, 0, -1 do
      local digit = math.floor(n / 64 ^ k) % 64
      out[#out + 1] = (k == 1 and not b or k == 0 and not c) and "=" or ALPHABET:sub(digit + 1, digit + 1)
    end
  end
  return table.concat(out)
end

--- table.md as HTML: its heading, its table, and the lines below that as a paragraph. **x** is bold.
local function table_html(markdown)
  local html, heading, notes, rows = {}, nil, {}, 0
  for line in markdown:gmatch "[^\n]+" do
    local cells = {}
    if line:sub(1, 1) == "|" then
      for cell in line:sub(2):gmatch "%s*(.-)%s*|" do cells[#cells + 1] = cell end
      if not line:find "^|[%s:|-]+$" then
        rows = rows + 1
        local tag = rows == 1 and "th" or "td"
        for i, cell in ipairs(cells) do
          cells[i] = ("<%s>%s</%s>"):format(tag, escape(cell):gsub("%*%*(.-)%*%*", "<b>%1</b>"), tag)
        end
        html[#html + 1] = "<tr>" .. table.concat(cells) .. "</tr>"
      end
    elseif line:sub(1, 2) == "# " then
      heading = line:sub(3)
    else
      notes[#notes + 1] = escape(line)
    end
  end
  return heading, ('<div class="wide"><table>%s</table></div>\n<p class="note">%s</p>'):format(table.concat(html, "\n"),
    table.concat(notes, " "))
end

--- {name = plain value} as a table of two columns.
local function facts_html(facts)
  local rows = {}
  for _, name in ipairs(check.names(facts)) do
    local value = facts[name]
    rows[#rows + 1] = ("<tr><th>%s</th><td>%s</td></tr>"):format(escape(name),
      escape(type(value) == "string" and value or json.encode(value)))
  end
  return '<div class="wide"><table class="facts">' .. table.concat(rows, "\n") .. "</table></div>"
end

local function picture_html(path, name)
  return ('<figure><img alt="%s" src="data:image/png;base64,%s"><figcaption>%s</figcaption></figure>'):format(
    escape(name), base64(core.read_file(path)), escape(name))
end

local STYLE = [[
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 72rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } thead th, tr:first-child th { border-bottom-color: #888; }
.facts th, .facts td { text-align: left; border-color: #ddd; } .facts td { white-space: normal;
  overflow-wrap: anywhere; }
figure { margin: 1rem 0; overflow-x: auto; } img { max-width: 100%; min-width: 40rem; height: auto; }
figcaption, .note { color: #555; font-size: .875rem; }
@media print { body { max-width: none; font-size: 10pt; } .wide { overflow: visible; }
  th, td { padding: .15rem .3rem; } figure { break-inside: avoid; overflow: visible; } img { min-width: 0; }
  table { font-size: 8pt; } }
]]

--- Writes report.html into the folder of a run or a series. Ends the program where the folder holds neither.
-- @param out path of the folder, with table.md
-- @return the file's path
-- @raise where the file cannot be written
return function(out)
  local config, series = json.read(out .. "/config.json"), json.read(out .. "/series.json")
  if not config and not series then refuse("%s holds no run (config.json) and no series (series.json)", out) end
  local markdown = core.read_file(out .. "/table.md")
  if not markdown then refuse("%s has no table.md: no method is finished", out) end
  local members = series and members_of(out) or {}
  local first = members[1] and out .. "/" .. members[1] or out
  local heading, results = table_html(markdown)
  local title = ("%s: %s"):format((config or series).experiment, heading or ("%d runs"):format(#members))
  local parts = { ("<h1>%s</h1>"):format(escape(title)), "<h2>Results</h2>", results, "<h2>Pictures</h2>" }
  for _, name in ipairs(pictures_of(out)) do parts[#parts + 1] = picture_html(out .. "/" .. name, name) end
  if members[1] then
    for _, name in ipairs(pictures_of(first)) do
      if name ~= "curves.png" then
        parts[#parts + 1] = picture_html(first .. "/" .. name, members[1] .. "/" .. name)
      end
    end
  end
  parts[#parts + 1] = "<h2>Configuration</h2>" .. facts_html(config or series)
  parts[#parts + 1] = "<h2>Machine and versions</h2>" .. facts_html(json.read(first .. "/about.json") or {})
  local path = out .. "/report.html"
  core.write_file(path, ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
    .. '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>%s</title>\n<style>\n%s</style>'
    .. "</head><body>\n%s\n</body></html>\n"):format(escape(title), STYLE, table.concat(parts, "\n")))
  return path
end
