--- Finished runs side by side: what differs between their configurations, a table with mean ± standard deviation over
-- the seeds, and their curves with bands.
--
--   luajit experiments/compare.lua out/seed1 out/seed2 out/seed3
--   luajit experiments/compare.lua out/k4 out/k8 --methods softmax-knn-ce --columns code_use,rmse --out out/compared
-- Runs that differ in their seed alone are one row a method. --out keeps table.md, compare.csv and curves.png.

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")

local vx = require "vertex"
local check, core, json, runs = require "vertex.check", require "vertex.core", require "vertex.json", vx.runs
local refuse = runs.refuse

local parser = require "argparse"("compare", "Finished runs side by side, mean and deviation over seeds.")
parser:argument("runs", "Folders that an experiment's --out named."):args "+"
parser:option("--methods", "Only these."):argname "A,B"
parser:option("--columns", "Only these of results.csv."):argname "A,B"
parser:option("--fields", "Of metrics.jsonl, a plot each; default: those of mse, loss, code_use that were logged.")
  :argname "A,B"
parser:option("--out", "Folder for table.md, compare.csv and curves.png."):argname "DIR"
local flags = parser:parse()

local function list_of(text)
  local list = {}
  for word in (text or ""):gmatch "[^,%s]+" do list[#list + 1] = word end
  return list
end

-- -- Reading ----------------------------------------------------------------------------------------------------------

local function read(path)
  local f = io.open(path, "r")
  if not f then return nil end
  local text = f:read "*a"
  f:close()
  return text
end

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
  local config = json.decode(read(folder .. "/config.json") or "")
  if type(config) ~= "table" or not config.experiment then refuse("%s holds no run (config.json)", folder) end
  local text = read(folder .. "/results.csv")
  if not text then refuse("%s has no results.csv: no method is finished", folder) end
  local rows, columns = read_results(text)
  local log = {}
  for line in (read(folder .. "/metrics.jsonl") or ""):gmatch "[^\n]+" do
    local entry = json.decode(line)
    if type(entry) == "table" then
      log[entry.method] = log[entry.method] or {}
      table.insert(log[entry.method], entry)
    end
  end
  return { folder = folder, config = flatten(config), rows = rows, columns = columns, log = log }
end

local all = {}
for i, folder in ipairs(flags.runs) do
  all[i] = read_run((folder:gsub("(.)/+$", "%1")))
  if all[i].config.experiment ~= all[1].config.experiment then
    refuse("%s is a run of %s, %s of %s", all[1].folder, all[1].config.experiment, all[i].folder,
      all[i].config.experiment)
  end
end

-- -- What differs -----------------------------------------------------------------------------------------------------

--- Names of the configuration whose values are not the same in all runs, but the seed.
local function differing()
  local names = {}
  for _, run in ipairs(all) do
    for name in pairs(run.config) do
      for _, other in ipairs(all) do names[name] = names[name] or other.config[name] ~= run.config[name] or nil end
    end
  end
  names.seed = nil
  return check.names(names)
end

local differences = differing()

--- Runs of one configuration, each of another seed: array of {label, runs}.
local function group()
  local groups, by_label = {}, {}
  for _, run in ipairs(all) do
    local parts = {}
    for _, name in ipairs(differences) do
      parts[#parts + 1] = ("%s=%s"):format(name, (run.config[name] or "not set"):gsub('"', ""))
    end
    local label = table.concat(parts, " ")
    if not by_label[label] then
      by_label[label] = { label = label, runs = {}, seeds = {} }
      groups[#groups + 1] = by_label[label]
    end
    local g = by_label[label]
    if g.seeds[run.config.seed] then
      refuse("%s and %s are the same experiment with the same seed", g.seeds[run.config.seed], run.folder)
    end
    g.seeds[run.config.seed] = run.folder
    g.runs[#g.runs + 1] = run
  end
  return groups
end

local groups = group()

--- Names that are known, in their order; those asked for where there are any.
local function choose(what, asked, known)
  if #asked == 0 then return known end
  local set = {}
  for _, name in ipairs(known) do set[name] = true end
  for _, name in ipairs(asked) do
    if not set[name] then refuse("no run has the %s '%s'; there are %s", what, name, table.concat(known, ", ")) end
  end
  return asked
end

--- Union of names over all runs, in the order met.
local function union(names_of)
  local list, seen = {}, {}
  for _, run in ipairs(all) do
    for _, name in ipairs(names_of(run)) do
      if not seen[name] then list[#list + 1] = name end
      seen[name] = true
    end
  end
  return list
end

local methods = choose("method", list_of(flags.methods), union(function(run)
  local names = {}
  for i, row in ipairs(run.rows) do names[i] = row.method end
  return names
end))
local columns = choose("column", list_of(flags.columns), union(function(run)
  local names = {}
  for _, name in ipairs(run.columns) do
    local filled = false
    for _, row in ipairs(run.rows) do filled = filled or tonumber(row[name]) ~= nil end
    if filled and name ~= "method" and name ~= "seed" then names[#names + 1] = name end
  end
  return names
end))

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
local function collect()
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

local rows = collect()

local function cells()
  local lines = { { "Method" } }
  if #groups > 1 then table.insert(lines[1], 1, "Run") end
  table.insert(lines[1], "Seeds")
  for _, column in ipairs(columns) do table.insert(lines[1], column) end
  for _, row in ipairs(rows) do
    local line = { row.method, tostring(row.seeds) }
    if #groups > 1 then table.insert(line, 1, row.group.label) end
    for _, column in ipairs(columns) do
      local v = row.values[column] or {}
      table.insert(line, show(v[1], v[2]))
    end
    lines[#lines + 1] = line
  end
  return lines
end

--- The table in Markdown, which is what the screen gets too.
local function markdown()
  local utf8 = require "vertex.utf8"
  local lines, widths = cells(), {}
  for _, line in ipairs(lines) do
    for i, text in ipairs(line) do widths[i] = math.max(widths[i] or 3, utf8.length(text)) end
  end
  local out = {}
  for r, line in ipairs(lines) do
    for i, text in ipairs(line) do line[i] = text .. (" "):rep(widths[i] - utf8.length(text)) end
    out[#out + 1] = "| " .. table.concat(line, " | ") .. " |"
    if r == 1 then
      for i, w in ipairs(widths) do line[i] = ("-"):rep(w - 1) .. (i == 1 and "-" or ":") end
      out[#out + 1] = "| " .. table.concat(line, " | ") .. " |"
    end
  end
  return table.concat(out, "\n") .. "\n"
end

local function csv()
  local head, lines = { "run", "method", "seeds" }, {}
  for _, column in ipairs(columns) do
    head[#head + 1], head[#head + 2] = column .. "_mean", column .. "_sd"
  end
  lines[1] = table.concat(head, ",")
  for _, row in ipairs(rows) do
    local line = { (row.group.label:gsub(",", ";")), row.method, row.seeds }
    for _, column in ipairs(columns) do
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

--- Whether any run has logged numbers under this name.
local function logged(field)
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
local function choose_fields()
  local fields = list_of(flags.fields)
  if #fields == 0 then
    for _, field in ipairs { "mse", "loss", "code_use" } do fields[#fields + 1] = logged(field) and field or nil end
  end
  for _, field in ipairs(fields) do
    if not logged(field) then refuse("no run has logged '%s'", field) end
  end
  return fields
end

local function draw(path, fields)
  if #fields == 0 then return end
  local fig = vx.plot.figure { width = 575 * #fields, height = 440, cols = #fields }
  for i, field in ipairs(fields) do
    local ax = fig:axes(i)
    for _, g in ipairs(groups) do
      for _, method in ipairs(methods) do
        local steps, lists = history(g, method, field)
        if steps then ax:runs(steps, lists, { label = #groups > 1 and method .. " " .. g.label or method }) end
      end
    end
    ax:set { title = field, xlabel = "step", legend = i == #fields and "right" or "none" }
  end
  fig:save(path)
end

-- -- All of it --------------------------------------------------------------------------------------------------------

if #differences > 0 then io.write("differ in ", table.concat(differences, ", "), "\n\n") end
io.write(markdown())
if flags.out then
  local fields = choose_fields()
  runs.make_folders(flags.out)
  draw(flags.out .. "/curves.png", fields)
  core.write_file(flags.out .. "/table.md", markdown())
  core.write_file(flags.out .. "/compare.csv", csv())
end
