--- The paper in one command, at a dial: both tables, and the questions that they leave open, each with a figure, three
-- sentences that are computed from the numbers, and what we had beside.
--
--   luajit experiments/reproduce.lua                              five minutes on two cores, on images made on the fly
--   luajit experiments/reproduce.lua --minutes 600 --data DIR     as much of it as fits
--   luajit experiments/reproduce.lua --study k,cost --minutes 2
--
-- A first step measures how fast this machine is. Every group of runs then gets its share of the minutes that are left,
-- and of it preset, steps, seeds and methods follow. OUT holds
--
--   results.md          all of it on a page, with NAME.png of each study
--   results.json        the rows, of which the page can be made again; experiments/bench/results/reproduce.json is ours
--   plan.json           what was decided, so that --resume goes on with the same
--   runs/               the sweeps, each with its report.html
--
-- The studies themselves are records in studies.lua beside this file.

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")

local vx = require "vertex"
local lfs = require "lfs"
local core, json, runs = require "vertex.core", require "vertex.json", vx.runs
local declared = require "studies"

local MARGIN = 0.9 -- of a share that is planned with: methods differ in their cost
local SEEDS_FROM = 30 -- minutes, from which on everything is made with three seeds

-- Presets of each program, the largest first: how much more a step costs than one of the last, about; how many steps it
-- takes at least to see anything, or else methods are left out; and how many steps tell what one costs.
local LADDER = {
  ae_sweep = { { "64x64x3-8192", 512, 20000, 2 }, { "16x16x32-1024", 512, 20000, 2 }, { "small", 4.5, 1500, 8 },
    { "tiny", 1, 100, 40 } },
  w2v_sweep = { { "1x1024", 2000, 20000, 2 }, { "small", 10, 1000, 4 }, { "tiny", 1, 100, 16 } },
}

-- -- What is asked for ------------------------------------------------------------------------------------------------

local function names_of(list)
  local names = {}
  for i, study in ipairs(list) do names[i] = study.name end
  return names
end

local function read_flags()
  local parser = require "argparse"("reproduce", "The paper's tables and studies, as much as fits into --minutes.")
  parser:option("--minutes", "How long it may take; default 5."):argname "N":convert(tonumber)
  parser:option("--study", "Only these: " .. table.concat(names_of(declared.studies), ", ") .. "."):argname "A,B"
  parser:option("--out", "Folder for results.", "out/reproduce"):argname "DIR"
  parser:option("--data", "Folder of images; default: made on the fly."):argname "DIR"
  parser:option("--speech", "Folder of speech; default: made on the fly."):argname "DIR"
  parser:option("--device", "cpu, cuda:0, ...; default: the GPU where one works."):argname "D"
  parser:option("--threads", "CPU threads."):argname "N":convert(runs.flags.integer(1, 4096))
  parser:flag("--resume", "Go on with what --out holds.")
  local flags = runs.flags.read(parser)
  if flags.minutes and not (flags.minutes > 0 and flags.minutes < math.huge) then
    runs.refuse("--minutes %g: expected a positive number", flags.minutes)
  end
  local chosen = {}
  for name in (flags.study or ""):gmatch "[^,%s]+" do chosen[name] = true end
  flags.studies = {}
  for _, study in ipairs(declared.studies) do
    if chosen[study.name] or not flags.study then flags.studies[#flags.studies + 1] = study end
    chosen[study.name] = nil
  end
  local unknown = next(chosen)
  local known = table.concat(names_of(declared.studies), ", ")
  if unknown then runs.refuse("unknown study '%s'; known: %s", unknown, known) end
  if #flags.studies == 0 then runs.refuse("--study '%s' names none; known: %s", flags.study, known) end
  if flags.device then
    local found, reason = pcall(vx.device, flags.device)
    if not found then runs.refuse("--device: %s", runs.reason(reason)) end
  end
  if flags.threads then vx.threads(flags.threads) end
  return flags
end

local function write_json(path, value) core.write_file(path, json.encode(value) .. "\n") end

local flags = read_flags()
local out = flags.out:gsub("(.)/+$", "%1")

--- What was decided so far: { minutes, data, speech, costs = { program = { preset = ... } }, groups = { name = ... } }.
local function open_plan()
  local stored = json.read(out .. "/plan.json")
  if stored and not flags.resume then
    runs.refuse("--out %s holds a reproduction already; --resume goes on with it, another --out starts anew", out)
  end
  if not stored and lfs.attributes(out, "mode") == "directory" then
    for entry in lfs.dir(out) do
      if entry ~= "." and entry ~= ".." then runs.refuse("--out %s is not empty ('%s')", out, entry) end
    end
  end
  for _, name in ipairs(stored and { "minutes", "data", "speech" } or {}) do
    if flags[name] ~= nil and flags[name] ~= stored[name] then
      runs.refuse("--out %s was begun with --%s %s, asked for is %s", out, name, stored[name] or "not set", flags[name])
    end
  end
  runs.make_folders(out .. "/runs")
  return stored or { minutes = flags.minutes or 5, data = flags.data, speech = flags.speech, costs = {}, groups = {} }
end

local plan = open_plan()
local results = json.read(out .. "/results.json") or { studies = {} }
local began = core.time()

local function left() return began + 60 * plan.minutes - core.time() end
local function say(text, ...) io.stderr:write(("[%3.0f s] "):format(core.time() - began), text:format(...), "\n") end

-- -- Sweeps, a process each -------------------------------------------------------------------------------------------

local Interrupted = {}

--- Runs a program of experiments/; gives its exit status.
local function run_sweep(program, arguments)
  local words = { arg[-1] or "luajit", core.root .. "/experiments/" .. program .. ".lua", "--quiet", "--resume" }
  local data = program == "w2v_sweep" and plan.speech or program == "ae_sweep" and plan.data
  for _, pair in ipairs { { "--data", data }, { "--device", flags.device }, { "--threads", flags.threads } } do
    if pair[2] then words[#words + 1], words[#words + 2] = pair[1], tostring(pair[2]) end
  end
  for _, a in ipairs(arguments) do words[#words + 1] = tostring(a) end
  local status = core.run_program(words, "VERTEX_SERIES")
  if status == 130 or core.interrupted() then error(Interrupted, 0) end
  return status
end

--- {column = number} of a run of one method.
local function only_row(folder)
  local row = {}
  for column, v in pairs(runs.compare({ folder }).rows[1].values) do row[column] = v[1] end
  return row
end

--- What a rung of the ladder costs here, in seconds: { start = of a process, fixed = of a method beside its steps,
-- step }.
local function cost_of(program, rung)
  local preset = rung[1]
  local key = program .. " " .. preset
  if not plan.costs[key] then
    local folder, before = ("%s/runs/first-step-%s-%s"):format(out, program, preset), core.time()
    local status = run_sweep(program, { "--preset", preset, "--methods", "softmax-knn-ce", "--steps",
      plan.minutes >= 1 and rung[4] or 2, "--out", folder })
    if status ~= 0 then core.fail("the first steps of %s ended with status %d", program, status) end
    local row = only_row(folder)
    local step = row.step_ms / 1000
    plan.costs[key] = { start = math.max(0.1, core.time() - before - row.seconds), step = step,
      fixed = math.max(0, row.seconds - row.steps * step) }
    say("%s, %s: %.0f ms a step, %.1f s beside them", program, preset, row.step_ms, plan.costs[key].fixed)
  end
  return plan.costs[key]
end

--- How many steps and methods fit into seconds at a rung; fewer methods where the steps would be less than its least.
local function fit(group, rung, seconds, members)
  local cost, least, methods = cost_of(group.program, rung), rung[3], #group.methods
  local function steps_of(count)
    return math.floor(((seconds - cost.start * (members + 1)) / members / count - cost.fixed) / cost.step)
  end
  while methods > (group.keep or 1) and steps_of(methods) < least do methods = methods - 1 end
  return steps_of(methods), methods
end

--- The values of a group's grid that are worth trying in these minutes; nil where it has none.
local function values_of(grid)
  if not grid then return nil end
  local values = {}
  for _, v in ipairs(grid[2]) do
    if plan.minutes >= (grid.minutes and grid.minutes[v] or 0) then values[#values + 1] = v end
  end
  return values
end

--- Decides preset, steps, methods, seeds and the grid's values of a group of runs.
local function decide(group, seconds)
  local seeds, values = plan.minutes >= SEEDS_FROM and 3 or 1, values_of(group.grid)
  local members = (values and #values or 1) * seeds
  local ladder = LADDER[group.program]
  local smallest = cost_of(group.program, ladder[#ladder])
  for i, rung in ipairs(ladder) do
    local factor, least = rung[2], rung[3]
    if i == #ladder or factor * least * smallest.step * members * #group.methods <= seconds then
      local steps, methods = fit(group, rung, seconds, members)
      if i == #ladder or steps >= least then
        steps = math.max(2, steps > 50 and steps - steps % 10 or steps)
        return { preset = rung[1], steps = steps, seeds = seeds, values = values,
          methods = { unpack(group.methods, 1, methods) } }
      end
    end
  end
end

--- The rows of a folder of runs: a row for each value of the grid and method.
local function read_rows(folder, x)
  local folders = {}
  for entry in lfs.dir(folder) do
    local path = folder .. "/" .. entry
    local size = entry:find "=" and lfs.attributes(path .. "/results.csv", "size")
    if size and size > 0 then folders[#folders + 1] = path end
  end
  if #folders == 0 then core.fail("%s has no results", folder) end
  table.sort(folders)
  local rows = {}
  for _, row in ipairs(runs.compare(folders).rows) do
    local config = row.group.runs[1].config
    local one = { method = row.method, values = {}, sd = {},
      x = x and tonumber(config[x] or config["quantizer." .. x]) or nil }
    one.label = x and ("%s = %g"):format(x, one.x) or row.method
    for column, v in pairs(row.values) do one.values[column], one.sd[column] = v[1], v[2] end
    rows[#rows + 1] = one
  end
  local place = {}
  for i, known in ipairs(vx.quantizers()) do place[known.name] = i end
  table.sort(rows, function(a, b)
    if a.method ~= b.method then return place[a.method] < place[b.method] end
    return (a.x or 0) < (b.x or 0)
  end)
  return rows
end

local ran = {} -- groups of runs of this sitting: what was wrong with them, or false

--- Makes a group of runs, once; gives its folder, and what was wrong.
local function run_group(name, seconds)
  local group, folder = declared.runs[name], ("%s/runs/%s"):format(out, name)
  if ran[name] == nil then
    plan.groups[name] = plan.groups[name] or decide(group, MARGIN * seconds)
    write_json(out .. "/plan.json", plan)
    local own = plan.groups[name]
    say("%s: %s, %d steps, %d methods, %d runs each, for %.0f s", name, own.preset, own.steps, #own.methods,
      (own.values and #own.values or 1) * own.seeds, seconds)
    local arguments = { "--preset", own.preset, "--steps", own.steps, "--methods", table.concat(own.methods, ","),
      "--seeds", own.seeds > 1 and "1-" .. own.seeds or "1", "--out", folder }
    if group.grid then
      arguments[#arguments + 1] = "--grid"
      arguments[#arguments + 1] = group.grid[1] .. "=" .. table.concat(own.values, ",")
    end
    local status = run_sweep(group.program, arguments)
    ran[name] = status ~= 0 and ("%s ended with status %d"):format(group.program, status)
  end
  return folder, ran[name]
end

-- -- A study: rows, figure, page --------------------------------------------------------------------------------------

--- Seconds for a part, of those that are left, by the weights of all that is still to be done.
local function share_of(todo, weight)
  local sum, seen = 0, {}
  for _, study in ipairs(todo) do
    local key = study.of or study.name
    if not seen[key] and ran[key] == nil then
      sum = sum + (study.weight or declared.runs[study.of].weight)
    end
    seen[key] = true
  end
  return math.max(0, left()) * weight / math.max(sum, weight)
end

--- The rows of a plot by method, in their order: array of { method =, x =, y =, sd = }.
local function lines_of(rows, column)
  local list, by_method = {}, {}
  for _, row in ipairs(rows) do
    if row.values[column] then
      local line = by_method[row.method]
      if not line then
        line = { method = row.method, x = {}, y = {}, sd = {} }
        list[#list + 1], by_method[row.method] = line, line
      end
      local n = #line.y + 1
      line.x[n], line.y[n], line.sd[n] = row.x, row.values[column], row.sd[column] or 0
    end
  end
  return list
end

--- The figure of a study: lines over the grid's values, or a bar for each method, KNN-regularized ones in a colour of
-- their own.
local function draw(study, rows, path)
  local count = #study.plots
  local fig = vx.plot.figure(study.x and { width = 380 * count, height = 340, cols = count }
    or { width = 1250, height = 260 * count, rows = count })
  for i, one in ipairs(study.plots) do
    local ax, list = fig:axes(i), lines_of(rows, one[1])
    if study.x then
      for _, line in ipairs(list) do
        ax:line(line.x, line.y, { label = line.method, sd = not one.ylog and line.sd or nil,
          marker = #line.x <= 20 and "circle" or nil })
      end
    else
      local names, values, errors, colors = {}, {}, {}, {}
      for k, line in ipairs(list) do
        names[k], values[k], errors[k] = line.method, line.y[1], line.sd[1]
        colors[k] = line.method:find "knn" and 1 or 2
      end
      ax:bar(names, values, { errors = errors, colors = colors })
    end
    ax:set { title = one[2], xlabel = study.x, xlog = study.xlog, ylog = one.ylog,
      legend = study.x and #list > 1 and "auto" or "none" }
  end
  fig:save(path)
end

local function show(v, sd)
  if not v then return "–" end
  return ("%.3g"):format(v) .. (sd and sd > 0 and (" ± %.2g"):format(sd) or "")
end

local ours = json.read(core.root .. "/experiments/bench/results/reproduce.json") or { studies = {} }

--- The table of a study: each value, and ours beside it where there is one.
local function table_of(study, rows)
  local known = {}
  for _, row in ipairs((ours.studies[study.name] or {}).rows or {}) do known[row.label .. "\n" .. row.method] = row end
  local head, rule, lines = { study.x and "" or "Method" }, { ":--" }, {}
  if study.x then head[2], rule[2] = "", ":--" end
  for _, column in ipairs(study.columns) do
    head[#head + 1], rule[#rule + 1] = column[2], "--:"
    head[#head + 1], rule[#rule + 1] = "ours", "--:"
  end
  for _, row in ipairs(rows) do
    if not row.hidden then
      local cells = study.x and { row.label, row.method } or { row.method }
      local other = known[row.label .. "\n" .. row.method]
      for _, column in ipairs(study.columns) do
        cells[#cells + 1] = show(row.values[column[1]], row.sd[column[1]])
        cells[#cells + 1] = show(other and other.values[column[1]], other and other.sd[column[1]])
      end
      lines[#lines + 1] = "| " .. table.concat(cells, " | ") .. " |"
    end
  end
  return ("| %s |\n|%s|\n%s\n"):format(table.concat(head, " | "), table.concat(rule, "|"), table.concat(lines, "\n"))
end

--- How a study was made, in a line.
local function setting_of(found, study)
  local own = found.setting
  if not own then return study.measure and "Measured in place, nothing is trained." or "" end
  return ("%s, %d steps, %s."):format(own.preset, own.steps, own.seeds > 1 and own.seeds .. " seeds, mean ± standard "
    .. "deviation" or "one seed")
end

local function write_page(failed)
  local lines = { "# The paper at " .. ("%g minutes"):format(plan.minutes), "",
    ("%s; %s; images: %s; speech: %s. Columns `ours` are those of %s (%s minutes, %s)."):format(
      results.machine or vx.device(), core.version, plan.data or "made on the fly",
      plan.speech or "made on the fly", "experiments/bench/results/reproduce.json", ours.minutes or "no",
      ours.machine or "not there"), "" }
  for _, study in ipairs(declared.studies) do
    local found = results.studies[study.name]
    if found then
      for _, text in ipairs { "## " .. study.title, "", study.question .. " " .. setting_of(found, study), "",
        ("![%s](%s.png)"):format(study.title, study.name), "" } do
        lines[#lines + 1] = text
      end
      lines[#lines + 1] = table.concat(found.sentences, " ")
      lines[#lines + 1] = ""
      lines[#lines + 1] = table_of(study, found.rows)
    end
  end
  for _, text in ipairs(failed) do lines[#lines + 1] = "failed: " .. text .. "\n" end
  core.write_file(out .. "/results.md", table.concat(lines, "\n"))
end

--- Does a study: nothing of it is left where it fails but the runs.
local function run_study(study, todo)
  local rows, wrong, setting
  if study.of then
    local folder
    folder, wrong = run_group(study.of, share_of(todo, declared.runs[study.of].weight))
    rows, setting = read_rows(folder, study.x), plan.groups[study.of]
  else
    rows = study.measure(share_of(todo, study.weight))
    ran[study.name] = false
  end
  draw(study, rows, ("%s/%s.png"):format(out, study.name))
  local found = { rows = rows, sentences = study.sentences(rows), setting = setting }
  results.studies[study.name] = found
  write_json(out .. "/results.json", results)
  io.write("\n", study.title, "\n", table.concat(found.sentences, "\n"), "\n")
  io.flush()
  if wrong then core.fail("%s", wrong) end
end

local function run_all()
  local failed = {}
  results.minutes = plan.minutes
  for _, device in ipairs(vx.devices()) do
    if device.name == vx.device() then results.machine = device.description end
  end
  for i, study in ipairs(flags.studies) do
    local todo = { unpack(flags.studies, i) }
    if not results.studies[study.name] then
      local ok, reason = pcall(run_study, study, todo)
      if reason == Interrupted then return 130 end
      if not ok then
        failed[#failed + 1] = study.name .. ": " .. runs.reason(reason)
        say("failed: %s", failed[#failed])
      end
    end
    write_page(failed)
  end
  say("results.md in %s", out)
  return #failed > 0 and 1 or 0
end

runs.program(function()
  local status = core.catching_interrupts(run_all)
  if status == 130 then
    io.stderr:write(("stopped; go on with: luajit %s --out %s --resume\n"):format(arg[0], out))
  end
  return status
end)
