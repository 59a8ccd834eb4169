--- runs/compare: finished runs side by side: what differs between their configurations, a table with mean ± standard
-- deviation over the seeds, and their curves with bands. Runs that differ in their seed alone are one row a method.

local check = require "vertex.check"
local core = require "vertex.core"
local flags_of = require "vertex.runs.flags"
local json = require "vertex.json"
local line_styles = require "vertex.runs.line_styles"
local utf8 = require "vertex.utf8"

local refuse = flags_of.refuse

-- -- Reading ----------------------------------------------------------------------------------------------------------

--- The rows of results.csv as {column = text}, and the columns in their order.
local function read_results(text)
  local names, rows = nil, {}
  for line in text:gmatch "[^\n]+" do
    local cells = {}
    for cell in (line .. ","):gmatch "([^,]*)," do cells[#cells + 1] = cell end
    if not names then
      names = cells
    else
      local row = {}
      for i, name in ipairs(names) do row[name] = cells[i] end
      rows[#rows + 1] = row
    end
  end
  return rows, names or {}
end

--- A configuration as {name = text} without methods; the settings of --set stand beside the rest.
local function flatten(config)
  local flat = {}
  for name, value in pairs(config) do
    if name == "set" then
      for setting, v in pairs(value) do flat[setting] = json.encode(v) end
    elseif name ~= "methods" then
      flat[name] = json.encode(value)
    end
  end
  return flat
end

local function read_run(folder)
  local config = json.read(folder .. "/config.json")
  if not config or not config.experiment then refuse("%s holds no run (config.json)", folder) end
  local text = core.read_file(folder .. "/results.csv")
  if not text then refuse("%s has no results.csv: no method is finished", folder) end
  local rows, columns = read_results(text)
  local log = {}
  for line in (core.read_file(folder .. "/metrics.jsonl") or ""):gmatch "[^\n]+" do
    local entry = json.decode(line)
    if type(entry) == "table" then
      log[entry.method] = log[entry.method] or {}
      table.insert(log[entry.method], entry)
    end
  end
  return { folder = folder, config = flatten(config), rows = rows, columns = columns, log = log }
end

-- -- What differs -----------------------------------------------------------------------------------------------------

--- Names of the configuration whose values are not the same in all runs, but the seed.
local function differing(all)
  local names = {}
  for _, run in ipairs(all) do
    for name in pairs(run.config) do
      for _, other in ipairs(all) do names[name] = names[name] or other.config[name] ~= run.config[name] or nil end
    end
  end
  for _, run in ipairs(all) do
    if not run.config.data_files then names.data_files = nil end -- of a version that did not keep it
  end
  names.seed = nil
  return check.names(names)
end

--- A value of a configuration for people: 0.05, not the seventeen digits that bring it back.
local function value_text(text)
  local number = tonumber(text)
  return number and ("%.9g"):format(number) or ((text or "not set"):gsub('"', ""))
end

--- Runs of one configuration, each of another seed: array of {label, runs}.
local function group(all, differences)
  local groups, by_label = {}, {}
  for _, run in ipairs(all) do
    local parts = {}
    for _, name in ipairs(differences) do
      parts[#parts + 1] = name:gsub("^quantizer%.", "") .. "=" .. value_text(run.config[name])
    end
    local label = table.concat(parts, " ")
    if not by_label[label] then
      by_label[label] = { label = label, runs = {}, taken = {} }
      groups[#groups + 1] = by_label[label]
    end
    local g = by_label[label]
    for _, row in ipairs(run.rows) do -- other methods of the same experiment may lie in another folder
      local one = ("%s, seed %s"):format(row.method, run.config.seed)
      if g.taken[one] then refuse("%s and %s are the same experiment: %s", g.taken[one], run.folder, one) end
      g.taken[one] = run.folder
    end
    g.runs[#g.runs + 1] = run
  end
  return groups
end

--- Names that are known, in their order; those asked for where there are any.
local function choose(what, asked, known)
  if not asked or #asked == 0 then return known end
  local set = {}
  for _, name in ipairs(known) do set[name] = true end
  for _, name in ipairs(asked) do
    if not set[name] then refuse("no run has the %s '%s'; there are %s", what, name, table.concat(known, ", ")) end
  end
  return asked
end

--- Union of names over all runs, in the order met.
local function union(all, names_of)
  local list, seen = {}, {}
  for _, run in ipairs(all) do
    for _, name in ipairs(names_of(run)) do
      if not seen[name] then list[#list + 1] = name end
      seen[name] = true
    end
  end
  return list
end

local function methods_of(run)
  local names = {}
  for i, row in ipairs(run.rows) do names[i] = row.method end
  return names
end

--- Columns of results.csv with a number in any row.
local function columns_of(run)
  local names = {}
  for _, name in ipairs(run.columns) do
    local filled = false
    for _, row in ipairs(run.rows) do filled = filled or tonumber(row[name]) ~= nil end
    if filled and name ~= "method" and name ~= "seed" then names[#names + 1] = name end
  end
  return names
end

--- Whether any run has logged numbers under this name.
local function logged(all, field)
  for _, run in ipairs(all) do
    for _, entries in pairs(run.log) do
      for _, entry in ipairs(entries) do
        if type(entry[field]) == "number" then return true end
      end
    end
  end
  return false
end

--- The fields to draw; ends the program where one was never logged.
local function choose_fields(all, asked)
  local fields = asked or {}
  if #fields == 0 then
    fields = {}
    for _, field in ipairs { "mse", "loss", "code_use" } do
      if logged(all, field) then fields[#fields + 1] = field end
    end
  end
  for _, field in ipairs(fields) do
    if not logged(all, field) then refuse("no run has logged '%s'", field) end
  end
  return fields
end

-- -- The table --------------------------------------------------------------------------------------------------------

--- Mean, standard deviation (n - 1) and number of values; sd nil where there is one value.
local function moments(values)
  local sum, squares = 0, 0
  for _, v in ipairs(values) do sum = sum + v end
  local mean = sum / #values
  for _, v in ipairs(values) do squares = squares + (v - mean) ^ 2 end
  return mean, #values > 1 and math.sqrt(squares / (#values - 1)) or nil, #values
end

--- "0.5617 ± 0.0012": the deviation with two digits, the mean as far as that reaches, at most to six places.
local function show(mean, sd)
  if not mean then return "–" end
  if not sd then return ("%.4g"):format(mean) end
  if sd == 0 then return ("%.4g ± 0"):format(mean) end
  local places = math.max(0, math.min(6, 1 - math.floor(math.log10(sd))))
  return ("%%.%df ± %%.%df"):format(places, places):format(mean, sd)
end

--- {group, method, values = {column = {mean, sd}}, seeds} of each group and method that has results.
local function collect(groups, methods, columns)
  local rows = {}
  for _, g in ipairs(groups) do
    for _, method in ipairs(methods) do
      local row, found = { group = g, method = method, values = {} }, 0
      for _, column in ipairs(columns) do
        local values = {}
        for _, run in ipairs(g.runs) do
          for _, r in ipairs(run.rows) do
            if r.method == method and tonumber(r[column]) then values[#values + 1] = tonumber(r[column]) end
          end
        end
        if #values > 0 then
          local mean, sd, n = moments(values)
          row.values[column], found = { mean, sd }, math.max(found, n)
        end
      end
      row.seeds = found
      if found > 0 then rows[#rows + 1] = row end
    end
  end
  return rows
end

local Comparison = {}
Comparison.__index = Comparison

--- The best mean of a column whose declaration says which is better; nil where none does.
local function best_of(self, column)
  local better, best = (self.declared[column] or {}).better, nil
  for _, row in ipairs(better and self.rows or {}) do
    local v = row.values[column] and row.values[column][1]
    if v and (not best or better == "high" and v > best or better == "low" and v < best) then best = v end
  end
  return best
end

local function cells(self)
  local lines = { { "Method" } }
  if #self.groups > 1 then table.insert(lines[1], 1, "Run") end
  table.insert(lines[1], "Seeds")
  for _, row in ipairs(self.rows) do
    lines[#lines + 1] = { row.method, tostring(row.seeds) }
    if #self.groups > 1 then table.insert(lines[#lines], 1, row.group.label) end
  end
  for _, column in ipairs(self.columns) do
    table.insert(lines[1], (self.declared[column] or {}).title or column)
    local best = best_of(self, column)
    for i, row in ipairs(self.rows) do
      local v = row.values[column] or {}
      local text = show(v[1], v[2])
      table.insert(lines[i + 1], best and v[1] == best and "**" .. text .. "**" or text)
    end
  end
  return lines
end

--- Gives the table in Markdown, mean ± standard deviation over the seeds; the best mean of a column is bold where the
-- experiment's declaration is known.
-- @return text
function Comparison:markdown()
  local lines, widths, names = cells(self), {}, #self.groups > 1 and 2 or 1
  for _, line in ipairs(lines) do
    for i, text in ipairs(line) do widths[i] = math.max(widths[i] or 3, utf8.length(text)) end
  end
  local out = {}
  for r, line in ipairs(lines) do
    for i, text in ipairs(line) do line[i] = text .. (" "):rep(widths[i] - utf8.length(text)) end
    out[#out + 1] = "| " .. table.concat(line, " | ") .. " |"
    if r == 1 then
      for i, w in ipairs(widths) do line[i] = ("-"):rep(w - 1) .. (i <= names and "-" or ":") end
      out[#out + 1] = "| " .. table.concat(line, " | ") .. " |"
    end
  end
  return table.concat(out, "\n") .. "\n"
end

--- Gives the table as CSV: run, method, seeds, and of each column mean and standard deviation.
-- @return text
function Comparison:csv()
  local head, lines = { "run", "method", "seeds" }, {}
  for _, column in ipairs(self.columns) do
    head[#head + 1], head[#head + 2] = column .. "_mean", column .. "_sd"
  end
  lines[1] = table.concat(head, ",")
  for _, row in ipairs(self.rows) do
    local line = { (row.group.label:gsub(",", ";")), row.method, row.seeds }
    for _, column in ipairs(self.columns) do
      local v = row.values[column] or {}
      line[#line + 1] = v[1] and ("%.9g"):format(v[1]) or ""
      line[#line + 1] = v[2] and ("%.9g"):format(v[2]) or ""
    end
    lines[#lines + 1] = table.concat(line, ",")
  end
  return table.concat(lines, "\n") .. "\n"
end

-- -- The curves -------------------------------------------------------------------------------------------------------

--- A method's values of a field over the steps of the group's first run that has it: steps, an array a run.
local function history(g, method, field)
  local steps, lists = nil, {}
  for _, run in ipairs(g.runs) do
    local at, own = {}, {}
    for _, entry in ipairs(run.log[method] or {}) do
      if type(entry[field]) == "number" then at[entry.step], own[#own + 1] = entry[field], entry.step end
    end
    if #own > 0 then
      steps = steps or own
      local values = {}
      for i, step in ipairs(steps) do values[i] = at[step] or 0 / 0 end
      lists[#lists + 1] = values
    end
  end
  return steps, lists
end

--- Draws what was logged over the steps, a plot a field: a line per method and configuration, a band over its seeds.
-- Nothing is drawn where nothing was logged.
-- @param path path of the PNG
function Comparison:draw(path)
  local plot, fields = require "vertex.plot", self.fields
  if #fields == 0 then return end
  local styles = #self.groups == 1 and line_styles(self.methods) or {}
  local fig = plot.figure { width = 575 * #fields, height = 440, cols = #fields }
  for i, field in ipairs(fields) do
    local ax = fig:axes(i)
    for _, g in ipairs(self.groups) do
      for _, method in ipairs(self.methods) do
        local steps, lists = history(g, method, field)
        local style = styles[method] or {}
        if steps then
          ax:runs(steps, lists, { label = #self.groups > 1 and method .. " " .. g.label or method, color = style.color,
            dash = style.dash })
        end
      end
    end
    ax:set { title = field, xlabel = "step", legend = i == #fields and "right" or "none" }
  end
  fig:save(path)
end

--- Writes table.md, compare.csv and curves.png.
-- @param out a folder; it is made
function Comparison:save(out)
  flags_of.make_folders(out)
  self:draw(out .. "/curves.png")
  core.write_file(out .. "/table.md", self:markdown())
  core.write_file(out .. "/compare.csv", self:csv())
end

--- Reads runs and puts them side by side. Ends the program with a message where one is no run, or of another kind.
-- @param folders array of paths, that --out of an experiment named
-- @param[opt] options {methods =, columns = those of results.csv, fields = those of metrics.jsonl that are drawn:
-- arrays of names, spec = the experiment's checked declaration, whose table's columns and titles are taken}; default:
-- all columns and methods, and of fields mse, loss and code_use as far as they were logged
-- @return comparison: differences, array of what differs in the configurations; markdown, csv, draw, save
-- @raise nothing: what is refused ends the program with its message
return function(folders, options)
  options = options or {}
  local all = {}
  for i, folder in ipairs(folders) do
    all[i] = read_run((folder:gsub("(.)/+$", "%1")))
    if all[i].config.experiment ~= all[1].config.experiment then
      refuse("%s is a run of %s, %s of %s", all[1].folder, all[1].config.experiment, all[i].folder,
        all[i].config.experiment)
    end
  end
  local spec = options.spec
  local self = setmetatable({ differences = differing(all), declared = spec and spec.column or {} }, Comparison)
  self.groups = group(all, self.differences)
  self.methods = choose("method", options.methods, union(all, methods_of))
  self.columns = choose("column", options.columns, union(all, columns_of))
  if spec then -- those of its table that have numbers
    local filled, shown = {}, {}
    for _, name in ipairs(self.columns) do filled[name] = true end
    for _, name in ipairs(spec.table.columns) do shown[#shown + 1] = filled[name] and name or nil end
    self.columns = shown
  end
  self.fields = choose_fields(all, options.fields)
  self.rows = collect(self.groups, self.methods, self.columns)
  return self
end
