--- runs/experiment: what an experiment declares of itself. The rest of runs/ reads it here and knows nothing of images,
-- speech or whatever else is trained on.
--
--     { name = "ae_sweep",                          the program's, and that of its output folders
--       summary = "...",                            a sentence for --help
--       presets = { tiny = { batch = 16, steps = 800, ... }, ... },   batch, steps or epochs as far as there are such
--                                                   flags, and whatever else the experiment reads
--       preset = "tiny",                            the one taken where no flag says otherwise
--       data_preset = "vectors",                    the one taken then where --data is given
--       methods = { kmeans = { summary =, paper = } },   beside the registered quantizers; `all` includes them
--       words = { data = "Folder of images.", batch = "Images per step.", epochs = "Passes over the data." },
--                                                   what these three flags mean here; one without words is not taken
--       flags = { { name =, meaning =, ... }, ... } flags of its own:
--         argname = "N"     what --help calls the argument; a flag without argname and values is a switch
--         values = { ... }  the arguments that are allowed
--         convert           function(text) → value, or nil and what is wrong
--         default           the value that counts as none
--         decides           true: results depend on it, so it is kept in config.json and must not change on --resume
--         check             function(value) → what is wrong with it on this machine, or nil
--       columns = { ... },  of results.csv, behind method and seed. Each is the name of one of the runs' own ("steps",
--                           "seconds", which come last where not named; "peak_mb", "step_ms"; those of
--                           metrics.smoothing) or
--         { name =, title =, unit =, format =, better =, optional =, from = }:
--         name              under which the training function returns it; what is not returned is left empty
--         title             in the table
--         format            of the table: text for string.format, or function(value) → text
--         better            "high" or "low": the best is marked; nil: nothing is
--         optional          true: the table has it only where a method has a value
--         unit, from        texts for --help: what it is measured in, and what it is computed from
--       table = { title = function(config) → text, columns = { name, ... }, footnotes = { line, ... },
--         line = { name, ... } }                    the columns shown when a method is done
--       pictures = { { file = "curves.png", draw = function(run, path) }, ... },   drawn when all is done
--       check = function(config, methods, preset) } raises where training could not work; nothing has been written yet;
--                                                   preset: the chosen one, with what --set changes. It may return a
--                                                   text that tells data apart (runs.fingerprint): ranks compare it

local core = require "vertex.core"

local OWN = {
  method = { name = "method", title = "Method", format = "%s", from = "--methods" },
  seed = { name = "seed", title = "Seed", format = "%d", from = "--seed" },
  steps = { name = "steps", title = "Steps", format = "%d", from = "training" },
  seconds = { name = "seconds", title = "Time", unit = "s", format = "%.0f s",
    from = "training and evaluation, all sittings together" },
  peak_mb = { name = "peak_mb", title = "Peak", format = "%.0f MB", better = "low",
    from = "training, the last sitting", unit = "MB that tensors held at most" },
  step_ms = { name = "step_ms", title = "Step", format = "%.1f ms", better = "low",
    from = "training, the last sitting", unit = "ms, data and log included" },
}

-- What metrics.smoothing gives.
local FIRST = "smoothed methods, without noise, rows of the evaluation's first batch; a run on one rank"
for name, of in pairs { tightness = { "Tightness", "largest probability, mean" },
  tightness_q05 = { "Tightness 5%", "largest probability, 5 % of the rows below" },
  tightness_q50 = { "Tightness 50%", "largest probability, median" },
  tightness_q95 = { "Tightness 95%", "largest probability, 5 % of the rows above" },
  gap = { "Soft-hard gap", "squared distance from a row to its vertex, mean" },
  unselected = { "Unselected", "rows that are no vertex's K nearest" },
  contested = { "Contested", "vertices of whose K nearest rows another has one" } } do
  local share = name == "unselected" or name == "contested"
  OWN[name] = { name = name, title = of[1], unit = of[2], from = FIRST, optional = true,
    format = share and function(v) return ("%.1f%%"):format(100 * v) end or "%.3f" }
end

local function is_text(x) return type(x) == "string" and x ~= "" end

--- Returns a function that raises "experiment NAME: ..." unless its first argument holds.
local function checker(name)
  return function(fine, text, ...)
    if not fine then core.fail("experiment %s: %s", name, text:format(...)) end
  end
end

local function check_column(check, column)
  local name = column.name
  check(is_text(name) and name:find "^[%w_]+$", "a column's name is %s, expected letters, digits and _", tostring(name))
  for _, field in ipairs { "title", "from" } do
    check(is_text(column[field]), "column '%s' has no %s", name, field)
  end
  check(column.unit == nil or is_text(column.unit), "column '%s': unit is no text", name)
  check(is_text(column.format) or type(column.format) == "function",
    "column '%s': format is a %s, expected a text for string.format or a function", name, type(column.format))
  check(column.better == nil or column.better == "high" or column.better == "low",
    "column '%s': better is '%s', expected 'high', 'low' or nothing", name, tostring(column.better))
end

--- Columns in the order of results.csv, and by name.
local function columns_of(spec, check)
  local list, by_name = {}, {}
  local function add(column)
    if type(column) == "string" then
      check(OWN[column], "column '%s' is none of the runs' own; expected a table", column)
      column = OWN[column]
    end
    check(type(column) == "table", "a column is a %s, expected a table", type(column))
    check_column(check, column)
    check(not by_name[column.name], "column '%s' is declared twice", column.name)
    list[#list + 1], by_name[column.name] = column, column
  end
  add "method"
  add "seed"
  for _, column in ipairs(spec.columns or {}) do add(column) end
  for _, name in ipairs { "steps", "seconds" } do
    if not by_name[name] then add(name) end
  end
  return list, by_name
end

--- Checks an experiment's declaration and fills in what may be left out.
-- @param spec table, as the head of this file says
-- @return table like spec, in which columns are tables and `column` finds them by name
-- @raise where something is missing or of the wrong kind
local function experiment(spec)
  if type(spec) ~= "table" then core.fail("experiment: expected its declaration, got a %s", type(spec)) end
  local check = checker(tostring(spec.name))
  check(is_text(spec.name) and spec.name:find "^[%w_%-]+$", "its name should be letters, digits, _ and -")
  check(is_text(spec.summary), "it has no summary")
  check(type(spec.presets) == "table" and type(spec.presets[spec.preset]) == "table",
    "presets has no '%s', which preset names", tostring(spec.preset))
  local full = { words = {}, methods = {}, flags = {}, pictures = {}, table = {}, check = function() end }
  for key, value in pairs(spec) do full[key] = value end
  check(spec.data_preset == nil or type(spec.presets[spec.data_preset]) == "table",
    "presets has no '%s', which data_preset names", tostring(spec.data_preset))
  for name, method in pairs(full.methods) do
    check(is_text(name) and type(method) == "table" and is_text(method.summary) and is_text(method.paper),
      "method '%s' should be { summary =, paper = }", tostring(name))
  end
  full.columns, full.column = columns_of(spec, check)
  for i, flag in ipairs(full.flags) do
    check(type(flag) == "table" and is_text(flag.name) and is_text(flag.meaning),
      "flags[%d] should be { name =, meaning = }", i)
  end
  for i, picture in ipairs(full.pictures) do
    check(type(picture) == "table" and is_text(picture.file) and type(picture.draw) == "function",
      "pictures[%d] should be { file =, draw = function(run, path) }", i)
  end
  local t = { title = full.table.title or function(config) return config.preset end,
    columns = full.table.columns, footnotes = full.table.footnotes or {}, line = full.table.line or {} }
  if not t.columns then
    t.columns = {}
    for _, column in ipairs(full.columns) do
      if column ~= OWN.method and column ~= OWN.seed and column ~= OWN.steps then
        t.columns[#t.columns + 1] = column.name
      end
    end
  end
  for _, list in ipairs { t.columns, t.line } do
    for _, name in ipairs(list) do check(full.column[name], "its table names no column '%s'", tostring(name)) end
  end
  full.table = t
  return full
end

return experiment
