--- runs/table: the results of a run, as results.csv, as table.md, and as text for the screen. Columns are what the
-- experiment declares (runs/experiment.lua).

local core = require "vertex.core"
local utf8 = require "vertex.utf8"

local results = {}

local MISSING = "–"

--- Numbers of a file: nine digits, which bring back a float32.
local function csv_cell(v)
  if v == nil then return "" end
  return type(v) == "number" and ("%.9g"):format(v) or tostring(v)
end

--- Writes results.csv.
-- @param run table of runs.start
-- @return text: a line of column names, then one per finished method
function results.csv(run)
  local names, lines = {}, {}
  for i, column in ipairs(run.spec.columns) do names[i] = column.name end
  lines[1] = table.concat(names, ",")
  for _, method in ipairs(run.config.methods) do
    local r = run.results[method]
    if r then
      local cells = {}
      for i, name in ipairs(names) do cells[i] = csv_cell(r[name]) end
      lines[#lines + 1] = table.concat(cells, ",")
    end
  end
  return table.concat(lines, "\n") .. "\n"
end

local function show(column, v)
  if v == nil then return MISSING end
  return type(column.format) == "function" and column.format(v) or column.format:format(v)
end

--- The best value's text in a column, by all finished methods; nil where there is none.
local function best_text(run, column)
  local best
  for _, r in pairs(run.results) do
    local v = r[column.name]
    if v and column.better
      and (not best or column.better == "high" and v > best or column.better == "low" and v < best) then
      best = v
    end
  end
  return best and show(column, best)
end

--- The columns that the table shows: all, but optional ones without any value.
local function shown_columns(run)
  local shown = {}
  for _, name in ipairs(run.spec.table.columns) do
    local column, has_value = run.spec.column[name], false
    for _, r in pairs(run.results) do has_value = has_value or r[name] ~= nil end
    if has_value or not column.optional then shown[#shown + 1] = column end
  end
  return shown
end

--- The head of the table and a row of texts per method that is finished or failed; of the latter `failed` is set and
-- the last text is the reason. mark(text) is the best of its column (all that look the same are).
local function table_rows(run, mark)
  local rows, columns = { { "Method" } }, shown_columns(run)
  for c, column in ipairs(columns) do rows[1][c + 1] = column.title end
  for _, method in ipairs(run.config.methods) do
    local reason = run.failed[method]
    if run.results[method] then
      rows[#rows + 1] = { method }
    elseif reason then
      rows[#rows + 1] = { method, "failed: " .. reason, failed = true }
    end
  end
  for c, column in ipairs(columns) do
    local best = best_text(run, column)
    for i = 2, #rows do
      if not rows[i].failed then
        local text = show(column, run.results[rows[i][1]][column.name])
        rows[i][c + 1] = text == best and mark(text) or text
      end
    end
  end
  return rows
end

--- Writes table.md: the title, the table with the best of each column in bold, the footnotes.
-- @param run table of runs.start
-- @return text
function results.markdown(run)
  local rows = table_rows(run, function(text) return "**" .. text .. "**" end)
  local lines = { "# " .. run.spec.table.title(run.config), "" }
  for i, row in ipairs(rows) do
    local cells = { unpack(row) }
    if row.failed then
      cells[2] = cells[2]:gsub("|", "¦") -- as | would end the cell
      for c = 3, #rows[1] do cells[c] = "" end
    end
    lines[#lines + 1] = "| " .. table.concat(cells, " | ") .. " |"
    if i == 1 then lines[#lines + 1] = "|:--|" .. ("--:|"):rep(#row - 1) end
  end
  local config = run.config
  local from, unit = config.lengthened_from, config.steps and "steps" or "epochs"
  if #run.spec.table.footnotes > 0 or from then lines[#lines + 1] = "" end
  if from then
    lines[#lines + 1] = ("Trained for %s %s at first, and on to %d with the schedule of %d."):format(
      table.concat(from, ", "), unit, config[unit], config[unit])
  end
  for _, line in ipairs(run.spec.table.footnotes) do lines[#lines + 1] = line end
  return table.concat(lines, "\n") .. "\n"
end

local BOLD, PLAIN = "\27[1m", "\27[0m"

--- Characters that a text takes on the screen.
local function width(text) return utf8.length((text:gsub("\27%[%d*m", ""))) end

--- Writes the table for the screen; on a terminal the best of each column is bold.
-- @param run table of runs.start
-- @return text without a line end at the end
function results.text(run)
  local rows = table_rows(run, core.is_tty(1) and function(text) return BOLD .. text .. PLAIN end
    or function(text) return text end)
  local widths, lines = {}, {}
  for _, row in ipairs(rows) do
    for i, text in ipairs(row) do
      if i == 1 or not row.failed then widths[i] = math.max(widths[i] or 0, width(text)) end
    end
  end
  for r, row in ipairs(rows) do
    local cells = {}
    for i, text in ipairs(row) do
      local padding = (" "):rep(math.max(0, (widths[i] or 0) - width(text)))
      cells[i] = i == 1 and text .. padding or padding .. text
    end
    lines[r] = table.concat(cells, "  ")
  end
  return table.concat(lines, "\n")
end

--- Writes a method's results in short: the columns that the experiment's table declares as `line`, and the time.
-- @param run table of runs.start
-- @param method name of a finished one
-- @return text
function results.line(run, method)
  local r, parts = run.results[method], {}
  for _, name in ipairs(run.spec.table.line) do
    local column = run.spec.column[name]
    parts[#parts + 1] = column.title .. " " .. show(column, r[name])
  end
  parts[#parts + 1] = show(run.spec.column.seconds, r.seconds)
  return table.concat(parts, "  ")
end

return results
