--- runs/sweep: one experiment over a list of methods: its output folder, what is resumed, and its results.
--
-- OUT/config.json        what decides the results; a folder with another one is refused
--    /checkpoints/M.safetensors   per method: everything to go on, also when it is finished, and then its results
--    /metrics.jsonl      one line per log point
--    /results.csv        one line per finished method
--    /table.md           the same for people; and the pictures that the experiment declares
--    /about.json         machine, versions and command line of the last sitting
--    /tensorboard/M/     metrics.jsonl for TensorBoard, with --tensorboard
--    /report.html        table, pictures and what they were made with, on one page
--    /.lock              held by the process that works here
--
-- Nothing is written before everything that can be checked is: a refused command leaves no trace.
--
-- Several ranks (vx.dist) read and check the same, and compare what they found; rank 0 alone writes, prints and holds
-- the lock. The folder has to be one that all of them see.

local lfs = require "lfs"
local alarms = require "vertex.runs.alarms"
local check = require "vertex.check"
local checkpoint = require "vertex.runs.checkpoint"
local core = require "vertex.core"
local dist = require "vertex.dist"
local experiment = require "vertex.runs.experiment"
local flags_of = require "vertex.runs.flags"
local json = require "vertex.json"
local progress = require "vertex.runs.progress"
local registry = require "vertex.quantizers"
local report = require "vertex.runs.report"
local results = require "vertex.runs.table"
local series = require "vertex.runs.series"
local step_graph = require "vertex.step_graph"
local tensorboard = require "vertex.runs.tensorboard"

local refuse = flags_of.refuse

local Run = {}
Run.__index = Run

local LOCK = ".lock" -- of an output folder: held by the process that works in it

local function describe_device()
  local name = core.device()
  for _, device in ipairs(core.devices()) do
    if device.name == name then return device.description end
  end
  return name
end

--- The commit of these sources, with a + where they were changed since; nil where git cannot tell.
local function commit()
  local root = core.root
  local pipe = root and io.popen(("git -C '%s' describe --always --dirty=+ --abbrev=12 2>/dev/null"):format(
    root:gsub("'", "'\\''")))
  if not pipe then return nil end
  local text = pipe:read "*l"
  pipe:close()
  return text
end

--- What results were made with, for people: about.json.
local function about(argv)
  return { device = describe_device(), threads = core.threads(), ranks = dist.size(), process = core.process(),
    library = core.version, commit = commit(),
    luajit = jit.version, system = jit.os .. " " .. jit.arch, date = os.date "!%Y-%m-%d %H:%M UTC",
    command = ("luajit %s %s"):format(arg and arg[0] or "?", table.concat(argv or {}, " ")) }
end

-- -- What is asked for, and what is there -----------------------------------------------------------------------------

--- out/NAME-PRESET-N: the newest there is (where that is to be resumed), or the next.
local function default_folder(name, preset, resume)
  local prefix, newest = ("%s-%s-"):format(name, preset), 0
  if lfs.attributes("out", "mode") == "directory" then
    for entry in lfs.dir "out" do
      local n = entry:sub(1, #prefix) == prefix and tonumber(entry:sub(#prefix + 1))
      if n and n > newest then newest = n end
    end
  end
  return ("out/%s%d"):format(prefix, resume and newest > 0 and newest or newest + 1)
end

--- The configuration in a folder; nil where it holds none. Ends the program where it is damaged.
local function read_config(out)
  local text = core.read_file(out .. "/config.json")
  if not text then return nil end
  local config = json.decode(text)
  if type(config) ~= "table" or not config.experiment or type(config.methods) ~= "table" then
    refuse("%s/config.json is damaged; nothing was changed", out)
  end
  return config
end

--- Ends the program where a folder without a configuration holds anything else: it is not ours. (A start that was
-- killed leaves it empty, or with the half-written configuration.)
local function expect_empty(out)
  for entry in lfs.dir(out) do
    if entry ~= "." and entry ~= ".." and entry ~= LOCK and not entry:find "^config%.json%.%d+%.tmp$" then
      refuse("--out %s is not empty and holds no experiment of ours ('%s')", out, entry)
    end
  end
end

--- Keeps other processes out of a folder until this one ends. Ends the program where one is in it already, and says
-- which.
local function lock(out)
  local ok, free = pcall(core.lock, out .. "/" .. LOCK)
  if not ok then refuse("--out %s is not writable: %s", out, flags_of.reason(free)) end
  if free then return end
  local owner = json.read(out .. "/about.json")
  refuse("--out %s is in use by %s; nothing was changed", out, owner and owner.process
    and ("process %s, since %s: %s"):format(owner.process, owner.date, owner.command) or "another process")
end

--- Removes what killed runs left half written in a locked folder.
local function remove_temporary(folder)
  for entry in lfs.dir(folder) do
    if entry:find "%.%d+%.tmp$" then os.remove(folder .. "/" .. entry) end
  end
end

--- What decides the results: from the flags, else from the stored configuration, else from the preset.
local function config_of(spec, flags, stored)
  stored = stored or {}
  local function given(name)
    if flags[name] ~= nil then return flags[name] end
    return stored[name]
  end
  local data = given "data"
  local config = { experiment = spec.name, preset = given "preset" or data and spec.data_preset or spec.preset,
    data = data, seed = given "seed" or 1, set = given "set" }
  local preset = spec.presets[config.preset]
  if not preset then
    refuse("the stored preset '%s' is none of this experiment; known: %s", config.preset,
      table.concat(check.names(spec.presets), ", "))
  end
  config.batch = given "batch" or preset.batch
  config.steps, config.epochs = given "steps", given "epochs"
  if flags.steps then config.epochs = nil elseif flags.epochs then config.steps = nil end
  config.lengthened_from = stored.lengthened_from
  if not config.steps and not config.epochs then config.steps, config.epochs = preset.steps, preset.epochs end
  for _, flag in ipairs(spec.flags) do
    local value = given(flag.name)
    if flag.decides and value ~= flag.default then config[flag.name] = value end
  end
  return config
end

-- Kept in config.json, and no part of what decides a method's results: their list may grow, and of the data a text.
local BESIDE = { methods = true, data_files = true }

--- What decides the results, as a text: checkpoints carry it.
local function identity_of(config)
  local own = {}
  for key, value in pairs(config) do own[key] = not BESIDE[key] and value or nil end
  return json.encode(own)
end

--- Lets --steps or --epochs of a stored run grow: every method goes on from where it stands, with the schedule of the
-- new length from there on. config.lengthened_from keeps the lengths before.
local function lengthen(out, config, stored, flags)
  for _, key in ipairs { "steps", "epochs" } do
    local before, now = stored[key], config[key]
    if before and now and now > before then
      local asked = {}
      for _, method in ipairs(flags.methods or stored.methods) do asked[method] = true end
      for _, method in ipairs(stored.methods) do
        if not asked[method] then
          refuse("--%s %d: all methods of --out %s go on from %d together, and --methods leaves out %s", key, now, out,
            before, method)
        end
      end
      config.lengthened_from = { unpack(stored.lengthened_from or {}) }
      table.insert(config.lengthened_from, before)
    end
  end
end

--- What checkpoints of a configuration may carry: {identity = "now"}, and "before" for those of its shorter lengths.
local function identities_of(config)
  local known, key = { [identity_of(config)] = "now" }, config.steps and "steps" or "epochs"
  local own, lengths = {}, config.lengthened_from or {}
  for name, value in pairs(config) do own[name] = value end
  for i = 1, #lengths do
    own[key], own.lengthened_from = lengths[i], i > 1 and { unpack(lengths, 1, i - 1) } or nil
    known[identity_of(own)] = "before"
  end
  return known
end

--- Ends the program where the stored configuration is that of other results.
local function expect_same(out, config, stored)
  local keys = {}
  for key in pairs(config) do keys[key] = true end
  for key in pairs(stored) do keys[key] = not BESIDE[key] or nil end
  if config.lengthened_from ~= stored.lengthened_from then
    keys.steps, keys.epochs, keys.lengthened_from = nil, nil, nil -- they grow
  end
  local function text(value) return value == nil and "not set" or json.encode(value) end
  for _, key in ipairs(check.names(keys)) do
    if text(config[key]) ~= text(stored[key]) then
      local length = (key == "steps" or key == "epochs") and stored[key] and config[key]
      refuse("--out %s holds another experiment: its %s is %s, asked for is %s%s", out, key, text(stored[key]),
        text(config[key]), length and " (it may grow)" or "")
    end
  end
end

--- Methods to run now, and those of the folder: the stored ones and behind them the new.
local function methods_of(spec, flags, stored)
  local methods = flags.methods or stored and stored.methods or flags_of.methods "paper"
  local all, known = {}, {}
  for _, list in ipairs { stored and stored.methods or {}, methods } do
    for _, method in ipairs(list) do
      if not known[method] then all[#all + 1] = method end
      known[method] = true
    end
  end
  for _, method in ipairs(methods) do
    if not registry.by_name[method] and not spec.methods[method] then
      refuse("the stored method '%s' is unknown; --quantizers names the folder with its file", method)
    end
  end
  return methods, all
end

--- Gives the preset with what --set changes of it. Ends the program where it has no such field or the value is of
-- another type, and where an option is that of no quantizer among the methods.
local function preset_of(spec, config, methods)
  local preset, own = {}, { batch = true, steps = true, epochs = true } -- flags of their own
  for name, value in pairs(spec.presets[config.preset]) do preset[name] = value end
  for _, name in ipairs(check.names(config.set or {})) do
    local value, option = config.set[name], name:match "^quantizer%.(.+)$"
    if own[name] then refuse("--set %s: --%s sets it", name, name) end
    if option then
      local known = {}
      for _, method in ipairs(methods) do
        for _, o in ipairs((registry.by_name[method] or { options = {} }).options) do known[o.name] = true end
      end
      local near = check.nearest(option, check.names(known))
      if not known[option] then
        refuse("--set %s: none of %s has that option%s", name, table.concat(methods, ", "),
          near and (", did you mean 'quantizer.%s'?"):format(near) or "")
      end
    elseif preset[name] == nil then
      local known = check.names(preset)
      local near = check.nearest(name, known)
      refuse("--set %s: the preset '%s' has no such field%s; it has %s, and quantizer.OPTION", name, config.preset,
        near and (", did you mean '%s'?"):format(near) or "", table.concat(known, ", "))
    elseif type(value) ~= type(preset[name]) then
      refuse("--set %s=%s: expected a %s, as %s", name, json.encode(value), type(preset[name]),
        json.encode(preset[name]))
    else
      preset[name] = value
    end
  end
  return preset
end

--- Gives the options of the quantizers: an experiment's own, and over them those of --set quantizer.OPTION=VALUE.
-- @param config table, the run's configuration
-- @param own table of options
-- @return new table
local function quantizer_options(config, own)
  local options = {}
  for name, value in pairs(own) do options[name] = value end
  for name, value in pairs(config.set or {}) do
    local option = name:match "^quantizer%.(.+)$"
    if option then options[option] = value end
  end
  return options
end

--- Ends the program where a step's batch cannot be divided among the ranks.
local function expect_divisible(config)
  local ranks = dist.size()
  if config.batch and config.batch % ranks ~= 0 then
    refuse("--batch %d does not divide among %d ranks; expected a multiple of %d", config.batch, ranks, ranks)
  end
end

--- What a run is made of: its configuration, its methods, all methods of its folder, and its preset, all checked. Ends
-- the program where something cannot be had; nothing is written.
local function plan(spec, flags, stored, out)
  local config = config_of(spec, flags, stored)
  if stored then
    lengthen(out, config, stored, flags)
    expect_same(out, config, stored)
  end
  local methods, all = methods_of(spec, flags, stored)
  for _, flag in ipairs(spec.flags) do
    local value = flag.decides and config[flag.name] or flags[flag.name]
    local wrong = flag.check and value ~= nil and flag.check(value)
    if wrong then refuse("%s", wrong) end
  end
  expect_divisible(config)
  return config, methods, all, preset_of(spec, config, methods)
end

--- Ends the program where training could not work with these. Gives what the experiment says of its data, if anything.
local function expect_trainable(spec, config, methods, preset)
  local ok, message = pcall(spec.check, config, methods, preset)
  if not ok then refuse("%s", flags_of.reason(message)) end
  return message
end

--- Ends the program where the data are no longer those that a stored run was begun with.
local function expect_same_data(out, config, stored, data)
  if stored and stored.data_files and data and data ~= stored.data_files then
    refuse("--out %s was begun with other data: %s held %s then, now %s", out, config.data or "the data set",
      stored.data_files, data)
  end
end

--- Ends the program where ranks were given, or found, different things: texts by their names.
local function expect_agreement(facts)
  if dist.size() == 1 then return end
  local texts = dist.gather_text(json.encode(facts))
  local first = json.decode(texts[1])
  for r = 2, #texts do
    local other, keys = json.decode(texts[r]), {}
    for _, t in ipairs { first, other } do
      for key in pairs(t) do keys[key] = true end
    end
    for _, key in ipairs(check.names(keys)) do
      if first[key] ~= other[key] then
        refuse("the ranks disagree on %s: rank 0 has %s, rank %d has %s", key, first[key] or "none", r - 1,
          other[key] or "none")
      end
    end
  end
end

--- What all ranks have to have alike.
local function facts_of(self)
  local facts = { methods = table.concat(self.methods, ","), ["the data"] = self.config.data_files,
    ["--out"] = self.out, ["--checkpoint"] = tostring(self.flags.checkpoint) }
  for key, value in pairs(self.config) do
    if not BESIDE[key] then facts["--" .. key] = json.encode(value) end
  end
  for _, method in ipairs(self.methods) do
    local extra = self:peek(method)
    facts["the checkpoint of " .. method] = extra and ("one of step %d"):format(extra.step) or nil
  end
  return facts
end

--- Makes the output folder, and writes the configuration.
local function open_folder(out, config, is_new, argv)
  flags_of.make_folders(out)
  if is_new then
    lock(out)
    if read_config(out) then refuse("--out %s: another process has begun an experiment there", out) end
  end
  flags_of.write_json(out, "config.json", config)
  flags_of.write_json(out, "about.json", about(argv))
  flags_of.make_folders(out .. "/checkpoints")
  remove_temporary(out)
  remove_temporary(out .. "/checkpoints")
end

--- Makes a run of a checked configuration, with the results of its finished methods.
local function new_run(spec, flags, out, config, methods, all, preset)
  local rank, ranks = dist.rank(), dist.size()
  local self = setmetatable({ out = out, methods = methods, config = config, preset = preset,
    flags = flags, spec = spec, results = {}, failed = {}, identity = identity_of(config),
    identities = identities_of(config), shard = rank, shards = ranks,
    batch = config.batch and config.batch / ranks }, Run)
  for _, method in ipairs(all) do
    local extra = self:peek(method)
    if extra and extra.result then self.results[method] = extra.result end
  end
  config.methods = all
  return self
end

--- Draws again what a folder holds, also while another process works in it.
local function draw_again(spec, flags, out)
  if series.draw_again(spec, out) then return end
  local stored = read_config(out)
  if not stored then refuse("--report: %s holds no run", out) end
  if stored.experiment ~= spec.name then refuse("--report: %s holds a run of %s", out, stored.experiment) end
  local methods = stored.methods
  local self = new_run(spec, flags, out, stored, methods, methods, spec.presets[stored.preset] or {})
  self:conclude()
end

--- Reads an experiment's command line, checks all of it, and opens the output folder: a new one, or with --resume what
-- is there. Ends the program with a message where help was asked for or something cannot be had; nothing has been
-- written then. With --seeds or --grid it makes all those runs, one after the other, and with --report it draws again
-- what the folder holds; both end the program.
-- @param spec table, the experiment's declaration (the head of runs/experiment.lua)
-- @param argv array of texts: `arg`
-- @return run: flags; config {preset, data, seed, batch, steps or epochs, set, and flags that decide}; preset, that of
-- spec.presets with what --set changes; methods, array of names; out, the folder; results {method = {column = value}}
-- of finished methods; failed {method = reason} of this sitting; and what is this rank's: shard (0-based) and shards,
-- for readers of data, and batch
-- @raise where the declaration lacks something
local function start(spec, argv)
  spec = experiment(spec)
  local flags = flags_of.parse(spec, argv)
  local rank, ranks = dist.rank(), dist.size()
  flags.quiet = flags.quiet or rank > 0 or nil
  local out = flags.out or default_folder(spec.name,
    flags.preset or flags.data and spec.data_preset or spec.preset, flags.resume)
  out = out:gsub("(.)/+$", "%1")
  local mode = lfs.attributes(out, "mode")
  if mode and mode ~= "directory" then refuse("--out %s is a %s, expected a folder", out, mode) end
  series.follow_parent()
  if series.asked(flags, out) then
    if ranks > 1 then refuse "--seeds and --grid start a process for each run: under mpirun give one --seed a job" end
    flags_of.program(series.run, spec, flags, argv, out, function(arguments)
      local one = flags_of.parse(spec, arguments)
      local config, methods, _, preset = plan(spec, one)
      expect_trainable(spec, config, methods, preset)
      return preset, methods
    end)
  end
  if flags.report then flags_of.program(draw_again, spec, flags, out) end
  local stored = mode and read_config(out)
  if stored and not flags.resume then
    refuse("--out %s holds an experiment already; --resume goes on with it, another --out starts anew", out)
  end
  if stored then
    if rank == 0 then lock(out) end
    stored = read_config(out) -- another process may have added methods before it ended
  elseif mode then
    expect_empty(out)
  end
  local config, methods, all, preset = plan(spec, flags, stored, out)
  local self = new_run(spec, flags, out, config, methods, all, preset)
  config.data_files = expect_trainable(spec, config, methods, preset)
  expect_same_data(out, config, stored, config.data_files)
  expect_agreement(facts_of(self))
  if rank == 0 then open_folder(out, config, not stored, argv) end
  if ranks > 1 then dist.barrier() end
  return self
end

-- -- Checkpoints ------------------------------------------------------------------------------------------------------

--- Gives the path of a method's checkpoint.
-- @param method name
-- @return path
function Run:checkpoint_path(method) return ("%s/checkpoints/%s.safetensors"):format(self.out, method) end

--- Reads the plain part of a method's checkpoint. Ends the program where the file is damaged or of another experiment;
-- the file stays as it is.
-- @param method name
-- @return table {step, seconds, result where finished, ...}; nil where there is no checkpoint
-- @raise nothing: what is refused ends the program with its message
function Run:peek(method)
  local path = self:checkpoint_path(method)
  local ok, extra = pcall(checkpoint.peek, path)
  if not ok then refuse("%s\nMove %s away to train %s anew.", flags_of.reason(extra), path, method) end
  if not extra then return nil end
  local known = self.identities[extra.identity]
  if not known or extra.method ~= method then
    refuse("%s belongs to another experiment; nothing was changed", path)
  end
  if known == "before" and extra.result then
    if not extra.goes_on then
      refuse("%s was finished by a version whose checkpoints cannot go on; --steps cannot grow here", path)
    end
    extra.result = nil -- that of fewer steps
  end
  return extra
end

--- Where this rank's reader of the data stood: a number, or one for each rank where broken items set them apart.
-- Another number of ranks goes on behind all of them.
local function own_position(position)
  if type(position) ~= "table" then return position end
  return #position == dist.size() and position[dist.rank() + 1] or math.max(unpack(position))
end

--- Where the readers of all ranks stand.
local function all_positions(position)
  local all, alike = {}, true
  for r, p in ipairs(dist.gather { position }) do
    all[r] = p[1]
    alike = alike and p[1] == all[1]
  end
  return alike and position or all
end

--- Begins a method, or brings it back to where its checkpoint was written. From here on all ranks are alike, but for
-- the default generator.
-- @param method name
-- @param state table that is saved and restored: {model =, optimizer =, sums =} (runs/checkpoint.lua); the run's alarms
-- are added to its sums
-- @return table: step, the last one done (0 anew), and what else was given to run:save
-- @raise nothing: a checkpoint that cannot be used ends the program with a message
function Run:begin(method, state)
  self.method, self.state, self.last = method, state, nil
  self.alarms = alarms(state.model:named_parameters())
  state.sums = state.sums or {}
  state.sums.alarms = self.alarms
  local extra = self:peek(method)
  if extra then
    local ok, loaded = pcall(checkpoint.load, self:checkpoint_path(method), state)
    if not ok then refuse("%s", flags_of.reason(loaded)) end
    extra = loaded
  end
  extra = extra or { step = 0, seconds = 0 }
  extra.position = own_position(extra.position)
  dist.broadcast_all(state.model:state_dict())
  dist.broadcast_all(state.optimizer and state.optimizer:state_dict() or {})
  core.default_generator.seed = dist.seed(core.default_generator.seed) -- of what is drawn for this rank's rows
  dist.sum {} -- sets the clock
  if dist.rank() == 0 then
    self:trim_metrics(method, extra.step)
    self.board = self.flags.tensorboard
      and tensorboard(("%s/tensorboard/%s"):format(self.out, method), self:history(method)) or nil
  end
  self.began, self.before, self.saved = core.time(), extra.seconds, dist.time()
  return extra
end

--- Says how long the method that was begun has taken, all sittings together.
-- @return seconds
function Run:seconds() return self.before + core.time() - self.began end

--- Writes the checkpoint of the method that was begun, which says whose it is.
local function write_checkpoint(self, extra)
  extra.identity, extra.method, extra.seconds = self.identity, self.method, self:seconds()
  checkpoint.save(self:checkpoint_path(self.method), self.state, extra)
  self.saved = dist.time()
end

--- Writes the checkpoint of the method that was begun.
-- @param extra table of plain values, at least step
-- @param[opt=false] now_and_then true: only where --checkpoint seconds have passed since the last
-- @raise where the file cannot be written
function Run:save(extra, now_and_then)
  if now_and_then and dist.time() - self.saved < (self.flags.checkpoint or 10) then return end
  if extra.position then extra.position = all_positions(extra.position) end
  self.state.generators = checkpoint.generators(self.state.model) -- for run:finish too, when evaluation has drawn more
  self.last = extra
  write_checkpoint(self, extra)
end

--- Gives back the tensors that a finished method kept (run:finish).
-- @param method name
-- @return table {name = tensor on the CPU}; nil where it kept none or is not finished
-- @raise where the method's checkpoint cannot be read
function Run:kept(method)
  return self.results[method] and checkpoint.tensors(self:checkpoint_path(method)) or nil
end

-- -- Metrics ----------------------------------------------------------------------------------------------------------

--- Entries of metrics.jsonl and their lines; what is no JSON (half a line, after a power cut) is left out.
local function read_metrics(path)
  local entries, lines, f = {}, {}, io.open(path, "r")
  if not f then return entries, lines, true end
  local whole = true
  for line in f:lines() do
    local entry = json.decode(line)
    if type(entry) == "table" then entries[#entries + 1], lines[#lines + 1] = entry, line else whole = false end
  end
  f:close()
  return entries, lines, whole
end

--- Forgets the log lines of a method after a step: they will be made again.
-- @param method name
-- @param step integer, the last one that is kept
function Run:trim_metrics(method, step)
  local path, kept = self.out .. "/metrics.jsonl", {}
  local entries, lines, whole = read_metrics(path)
  for i, entry in ipairs(entries) do
    if entry.method ~= method or entry.step <= step then kept[#kept + 1] = lines[i] end
  end
  if #kept < #lines or not whole then
    core.write_file(path, #kept > 0 and table.concat(kept, "\n") .. "\n" or "")
  end
end

--- Appends an entry to metrics.jsonl.
local function append(self, entry)
  entry.method, entry.seed = self.method, self.config.seed
  local f, reason = io.open(self.out .. "/metrics.jsonl", "a")
  if not f then core.fail("%s/metrics.jsonl: %s", self.out, reason) end
  f:write(json.encode(entry), "\n")
  f:close()
end

--- Appends a line to metrics.jsonl; and where something has gone wrong with the method, a line that says so, which is
-- said on stderr too. Of several ranks rank 0 does.
-- @param entry table of plain values, at least step; method and seed are added
-- @raise where the file cannot be written
function Run:log(entry)
  if dist.rank() > 0 then return end
  append(self, entry)
  if self.board then self.board:add(entry) end
  for _, alarm in ipairs(self.alarms:see(entry)) do
    append(self, { step = entry.step, event = alarm.event, text = alarm.text })
    self:say("\n%-15s step %d: %s", self.method, entry.step, alarm.text)
  end
end

--- Gives what was logged of a method.
-- @param method name
-- @return array of entries
function Run:history(method)
  local list = {}
  for _, entry in ipairs((read_metrics(self.out .. "/metrics.jsonl"))) do
    if entry.method == method then list[#list + 1] = entry end
  end
  return list
end

-- -- Results ----------------------------------------------------------------------------------------------------------

--- Tells whether a method is done, in this sitting or an earlier one.
-- @param method name
-- @return boolean
function Run:finished(method) return self.results[method] ~= nil end

--- Ends the method that was begun: its results go into its checkpoint, beside what its last run:save said, so that
-- --steps may grow later, and into results.csv.
-- @param result table {column = number}, at least steps
-- @param[opt] tensors {name = tensor} to keep in the checkpoint, for pictures (run:kept)
-- @raise where a file cannot be written, or a rank does not come
function Run:finish(result, tensors)
  result.method, result.seed, result.seconds = self.method, self.config.seed, self:seconds()
  self.state.tensors = tensors
  local extra = { step = result.steps }
  for name, value in pairs(self.last or {}) do extra[name] = value end -- where training stood, not its evaluation
  extra.result, extra.goes_on = result, true
  write_checkpoint(self, extra)
  self.results[self.method] = result
  if dist.rank() == 0 then core.write_file(self.out .. "/results.csv", results.csv(self)) end
end

--- Says something about the run on stderr, unless --quiet was given; of several ranks rank 0 does.
-- @param text text, as for string.format, with its arguments
function Run:say(text, ...)
  if not self.flags.quiet then io.stderr:write(text:format(...), "\n") end
end

--- Names the broken items that all ranks met, on stderr. Collective.
-- @param list array of {path =, reason =}
-- @raise where a rank does not come
function Run.skipped(_, list)
  local lines = {}
  for i, broken in ipairs(list) do lines[i] = ("skipped %s: %s\n"):format(broken.path, broken.reason) end
  local texts = dist.gather_text(table.concat(lines))
  if dist.rank() == 0 then io.stderr:write(unpack(texts)) end
end

--- Calls f(method). Where it raises, that is said, the method has failed, and nothing comes back; of several ranks the
-- others would wait for this one, so that there it ends the job.
local function train(self, f, method)
  if dist.size() > 1 then return false, f(method) end
  local ok, result, tensors = pcall(f, method)
  if ok then return false, result, tensors end
  io.stderr:write(("\n%s failed: %s\n"):format(method, tostring(result)))
  self.failed[method] = flags_of.reason(result):match "^[^\n]*"
  return true
end

--- Runs f(method) for each method that is not finished. Gives false where it was interrupted.
local function run_methods(self, f)
  local spec, ranks = self.spec, dist.about()
  self:say("%s: %s, %s → %s", spec.name, spec.table.title(self.config), describe_device(), self.out)
  if ranks then self:say("%s", ranks) end
  local from = self.config.lengthened_from
  if from then
    self:say("trained for %s %s at first; on to %d with the schedule of %d from there", table.concat(from, ", "),
      self.config.steps and "steps" or "epochs", self.config.steps or self.config.epochs,
      self.config.steps or self.config.epochs)
  end
  for _, method in ipairs(self.methods) do
    if self:finished(method) then
      self:say("%-15s  finished before", method)
    else
      local failed, result, tensors = train(self, f, method)
      if not failed then
        if not result then return false end
        self:finish(result, tensors)
        self:say("%-15s  %s", method, results.line(self, method))
      end
    end
  end
  return true
end

--- Writes and prints the table of the finished methods and of those that failed, and draws the pictures of what there
-- is. (Rank 0.)
-- @raise where a file cannot be written
function Run:conclude()
  local spec, files = self.spec, {}
  local any = next(self.results) ~= nil or next(self.failed) ~= nil
  if any then
    core.write_file(self.out .. "/results.csv", results.csv(self)) -- a kill may have come between it and a checkpoint
    core.write_file(self.out .. "/table.md", results.markdown(self))
    io.write(results.text(self), "\n")
    files = { "results.csv", "table.md" }
  end
  for _, picture in ipairs(spec.pictures) do
    picture.draw(self, self.out .. "/" .. picture.file)
    if core.file_size(self.out .. "/" .. picture.file) then files[#files + 1] = picture.file end
  end
  if any then
    report(self.out)
    files[#files + 1] = "report.html"
  else
    self:say("no method is finished")
  end
  if #files > 0 then self:say("%s in %s", table.concat(files, ", "), self.out) end
end

--- All of it; gives the status for os.exit.
local function run_all(self, f)
  if not run_methods(self, f) then
    if dist.rank() == 0 then self:conclude() end
    self:say("stopped; go on with: luajit %s --out %s --resume; draw again with --report in its place",
      arg and arg[0] or self.spec.name, self.out)
    dist.barrier() -- rank 0 has written; a rank that ends earlier ends the job
    return 130
  end
  dist.close() -- what is left takes rank 0 alone
  if dist.rank() == 0 then self:conclude() end
  return next(self.failed) and 1 or 0
end

--- Makes the function that does a training step of this run: recorded once and launched as a whole (vx.graph), unless
-- --graph off, several ranks, the device or the step itself forbid it. Batches then are copied to where the recording
-- reads them. A step whose results are read on the host, or whose batch has another shape, runs op by op, with the same
-- bits.
-- @param f function(batch, rate) that does a step
-- @param able boolean: it can be recorded, as a quantizer's `graphs` says
-- @return function(batch, rate, is_read) → what f returns; of a launch tensors that the next one overwrites
-- @return function() that frees the recording
function Run:recorded(f, able)
  if self.flags.graph == "off" or self.shards > 1 or not able or not core.can(core.device(), "graphs") then
    return f, function() end
  end
  local place, shape
  local graph = step_graph(function(rate) return f(place, rate) end)
  return function(x, rate, is_read)
    if not place then
      shape = core.shape_text(x)
      place = core.new(x:shape(), { keep = true, dtype = x:dtype() })
    end
    if core.shape_text(x) ~= shape then return f(x, rate) end
    place:copy(x)
    if is_read then return f(place, rate) end
    return graph:replay(rate)
  end, function()
    graph:release()
    if place then place:release() end
  end
end

--- Makes the progress bar of the method that was begun; behind what is left of it stands what is left of all methods.
-- @param total integer, steps of the method in all
-- @param[opt=0] done integer, those done before
-- @return bar (vx.runs.progress)
function Run:progress(total, done)
  local place, todo = 0, 0
  for i, method in ipairs(self.methods) do
    if method == self.method then place = i end
    if place > 0 and i > place and not self:finished(method) then todo = todo + 1 end
  end
  local count = #self.methods
  return progress(("%-15s"):format(self.method), { total = total, done = done, quiet = self.flags.quiet,
    place = count > 1 and ("method %d of %d"):format(place, count) or nil,
    overall = count > 1 and function(left)
      local sum, n = 0, 0
      for _, result in pairs(self.results) do sum, n = sum + result.seconds, n + 1 end
      return left + todo * (n > 0 and sum / n or self:seconds() + left)
    end or nil })
end

--- Runs the experiment: f for each method that is not finished yet, then table.md, which is printed too, and the
-- pictures. Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP only raise vx's flag meanwhile (core.interrupted). An error is printed
-- and ends its method, of which the table has the reason (--resume tries it again); of several ranks it ends all.
-- @param f function(method) → result {column = number}, at least steps, and tensors to keep; nil where interrupted. It
-- calls run:begin, run:log and run:save
-- @return status for os.exit: 0, 130 where interrupted, 1 where a method failed or after another error
-- @raise nothing: errors are printed
function Run:each(f)
  local ok, status = pcall(core.catching_interrupts, run_all, self, f)
  if not ok then
    local name = dist.size() > 1 and ("rank %d: "):format(dist.rank()) or ""
    io.stderr:write(name .. tostring(status) .. "\n") -- in one piece: ranks write at the same time
    dist.abort(1)
  end
  return ok and status or 1
end

--- Describes a list of texts, as the files of a data set, in a few characters that tell lists apart.
-- @param list array of texts
-- @return text
-- @raise where an element is no text
local function fingerprint(list)
  local hash = 5381
  for item, text in ipairs(list) do
    if type(text) ~= "string" then core.fail("fingerprint: element %d is a %s, expected a text", item, type(text)) end
    for i = 1, #text do hash = (hash * 33 + text:byte(i)) % 2 ^ 32 end
    hash = (hash * 33 + 10) % 2 ^ 32
  end
  return ("%d items (%08x)"):format(#list, hash)
end

return { start = start, Run = Run, quantizer_options = quantizer_options, fingerprint = fingerprint }
