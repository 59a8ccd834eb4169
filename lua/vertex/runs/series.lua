--- runs/series: one experiment over seeds and a grid of settings (--seeds, --grid): a folder of ordinary runs, each a
-- process of its own, so that what ends one of them ends no other.
--
-- OUT/series.json         what it is made of
--    /k=4,seed=2/         a run (runs/sweep.lua)
--    /table.md, compare.csv, curves.png   over the runs that are finished (runs/compare.lua)
--    /report.html         all of it on a page

local lfs = require "lfs"
local check = require "vertex.check"
local compare = require "vertex.runs.compare"
local core = require "vertex.core"
local flags_of = require "vertex.runs.flags"
local json = require "vertex.json"
local registry = require "vertex.quantizers"
local report = require "vertex.runs.report"

local refuse = flags_of.refuse

local series = {}

local FILE = "series.json"

-- -- What is asked for ------------------------------------------------------------------------------------------------

--- Reads what a folder's series is made of; nil where the folder holds none. Ends the program where it is damaged.
local function read(out)
  local text = core.read_file(out .. "/" .. FILE)
  if not text then return nil end
  local stored = json.decode(text)
  if type(stored) ~= "table" or type(stored.seeds) ~= "table" or type(stored.grid) ~= "table"
    or type(stored.arguments) ~= "table" then
    refuse("%s/%s is damaged; nothing was changed", out, FILE)
  end
  return stored
end

--- Says whether a command line is that of a series, or goes on with one.
-- @param flags of flags.parse
-- @param out its folder
-- @return boolean
function series.asked(flags, out)
  return flags.seeds ~= nil or flags.grid ~= nil or flags.resume and read(out) ~= nil
end

local OWN = { ["--out"] = 1, ["--seeds"] = 1, ["--resume"] = 0, ["--grid"] = "*" }

--- The arguments that every run of the series is given too.
local function shared_arguments(argv)
  local kept, i = {}, 1
  while i <= #argv do
    local name = argv[i]:match "^(%-%-[^=]+)"
    local own = name and OWN[name]
    if not own then
      kept[#kept + 1], i = argv[i], i + 1
    else
      local attached = argv[i]:find "=" ~= nil
      i = i + 1
      if own == 1 and not attached then
        i = i + 1
      elseif own == "*" then
        while argv[i] and argv[i]:sub(1, 2) ~= "--" do i = i + 1 end
      end
    end
  end
  return kept
end

local FLAGS = { batch = true, steps = true, epochs = true }

--- Ends the program where a name of --grid is an option of quantizers, but of none of the methods: all its runs would
-- be alike.
local function expect_taken(name, methods)
  local option, is_option = name:match "^quantizer%.(.+)$" or name, false
  local function has(item)
    for _, o in ipairs(item and item.options or {}) do
      if o.name == option then return true end
    end
  end
  for _, item in ipairs(registry.list) do is_option = is_option or has(item) end
  for _, method in ipairs(methods) do
    if not is_option or has(registry.by_name[method]) then return end
  end
  refuse("--grid %s: none of %s has that option", name, table.concat(methods, ", "))
end

--- What a name of --grid sets: the arguments of a run that give it a value.
local function arguments_of(spec, preset, name, value)
  local text = type(value) == "table" and json.encode(value) or tostring(value)
  if FLAGS[name] and (name == "steps" or spec.words[name]) then return { "--" .. name, text } end
  if preset[name] ~= nil or name:find("quantizer.", 1, true) then return { "--set", name .. "=" .. text } end
  local known = { "batch", "steps", "epochs" }
  for _, item in ipairs(registry.list) do
    for _, option in ipairs(item.options) do
      if option.name == name then return { "--set", ("quantizer.%s=%s"):format(name, text) } end
      known[#known + 1] = option.name
    end
  end
  for field in pairs(preset) do known[#known + 1] = field end
  local near = check.nearest(name, known)
  refuse("--grid %s: neither the preset nor a quantizer has it%s", name,
    near and (", did you mean '%s'?"):format(near) or "")
end

--- The runs: array of {name = of its folder, arguments = beside the shared ones}, seeds innermost. arguments(name,
-- value) gives those of a name of the grid.
local function members_of(seeds, grid, arguments_for)
  local list = { { parts = {}, arguments = {} } }
  local function multiply(values, name, arguments)
    local longer = {}
    for _, member in ipairs(list) do
      for _, value in ipairs(values) do
        local one = { parts = { unpack(member.parts) }, arguments = { unpack(member.arguments) } }
        one.parts[#one.parts + 1] = ("%s=%s"):format(name, type(value) == "table" and json.encode(value)
          or tostring(value)):gsub("/", "_")
        for _, a in ipairs(arguments(value)) do one.arguments[#one.arguments + 1] = a end
        longer[#longer + 1] = one
      end
    end
    list = longer
  end
  for _, axis in ipairs(grid) do
    multiply(axis.values, axis.name, function(value) return arguments_for(axis.name, value) end)
  end
  if #seeds > 0 then multiply(seeds, "seed", function(seed) return { "--seed", ("%d"):format(seed) } end) end
  for _, member in ipairs(list) do member.name = table.concat(member.parts, ",") end
  return list
end

-- -- One process a run ------------------------------------------------------------------------------------------------

local PARENT = "VERTEX_SERIES" -- in a run's environment: the process that makes the series

--- For a run's process: ends it with the one that makes the series, however that ends.
function series.follow_parent() core.follow_parent(PARENT) end

-- -- All of it --------------------------------------------------------------------------------------------------------

--- Writes and prints the comparison of the members that have results.
local function summarize(out, members, spec)
  local folders = {}
  for _, member in ipairs(members) do
    local folder = out .. "/" .. member.name
    local size = lfs.attributes(folder .. "/results.csv", "size")
    if size and size > 0 then folders[#folders + 1] = folder end
  end
  if #folders == 0 then return end
  local comparison = compare(folders, { spec = spec })
  comparison:save(out)
  report(out)
  io.write(comparison:markdown())
end

--- Makes the comparison again, of what is finished by now.
-- @param spec a checked declaration (runs/experiment.lua)
-- @param out the folder
-- @return false where it holds no series
function series.draw_again(spec, out)
  local stored = read(out)
  if not stored then return false end
  if stored.experiment ~= spec.name then refuse("--report: %s holds a series of %s", out, stored.experiment) end
  summarize(out, members_of(stored.seeds, stored.grid, function() return {} end), spec)
  return true
end

local function run_members(members, options)
  local failed = {}
  for i, member in ipairs(members) do
    if not options.quiet then io.stderr:write(("run %d of %d: %s\n"):format(i, #members, member.name)) end
    local arguments = { arg and arg[-1] or "luajit", options.program, unpack(options.arguments) }
    for _, a in ipairs(member.arguments) do arguments[#arguments + 1] = a end
    for _, a in ipairs { "--out", options.out .. "/" .. member.name, "--resume" } do arguments[#arguments + 1] = a end
    local status = core.run_program(arguments, PARENT)
    if status == 130 or core.interrupted() then return failed, true end
    if status ~= 0 then
      failed[#failed + 1] = ("%s: %s"):format(member.name,
        status > 128 and "ended by signal " .. status - 128 or "exit status " .. status)
    end
  end
  return failed, false
end

--- Runs a series, or goes on with one.
-- @param spec a checked declaration (runs/experiment.lua)
-- @param flags of flags.parse
-- @param argv the command line
-- @param out the folder
-- @param checked function(argv of a run) → its preset and methods; ends the program where such a run could not be had
-- @return status for os.exit: 0, 130 where interrupted, 1 where a run failed
function series.run(spec, flags, argv, out, checked)
  if flags.seed and flags.seeds then refuse "--seed and --seeds: give one of them" end
  local stored = lfs.attributes(out, "mode") and read(out)
  if stored and not flags.resume then
    refuse("--out %s holds a series already; --resume goes on with it, another --out starts anew", out)
  end
  local arguments = shared_arguments(argv)
  if stored then
    if stored.experiment ~= spec.name then refuse("--out %s holds a series of %s", out, stored.experiment) end
    if #arguments == 0 then arguments = stored.arguments end
    flags.seeds, flags.grid = flags.seeds or stored.seeds, flags.grid or stored.grid
  end
  local preset, methods = checked(arguments)
  for _, axis in ipairs(flags.grid or {}) do expect_taken(axis.name, methods) end
  local seeds, grid = flags.seeds or {}, flags.grid or {}
  local members = members_of(seeds, grid, function(name, value) return arguments_of(spec, preset, name, value) end)
  for _, member in ipairs(members) do
    local all = { unpack(arguments) }
    for _, a in ipairs(member.arguments) do all[#all + 1] = a end
    checked(all)
  end

  flags_of.make_folders(out)
  local ok, free = pcall(core.lock, out .. "/.lock")
  if not ok then refuse("--out %s is not writable: %s", out, flags_of.reason(free)) end
  if not free then refuse("--out %s is in use by another process; nothing was changed", out) end
  flags_of.write_json(out, FILE, { experiment = spec.name, seeds = seeds, grid = grid, arguments = arguments })
  local failed, interrupted
  core.catching_interrupts(function()
    failed, interrupted = run_members(members, { program = arg[0], arguments = arguments, out = out,
      quiet = flags.quiet })
  end)
  summarize(out, members, spec)
  if interrupted then
    io.stderr:write(("stopped; go on with: luajit %s --out %s --resume\n"):format(arg[0], out))
    return 130
  end
  for _, text in ipairs(failed) do io.stderr:write("failed: ", text, "\n") end
  if not flags.quiet then io.stderr:write(("table.md, compare.csv, curves.png, report.html in %s\n"):format(out)) end
  return #failed > 0 and 1 or 0
end

return series
