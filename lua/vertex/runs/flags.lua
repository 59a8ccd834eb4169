--- runs/flags: the command line of experiments: the flags that all of them take, those an experiment declares, and what
-- is said where one is wrong. Nothing is written here.

local argparse = require "argparse"
local check = require "vertex.check"
local core = require "vertex.core"
local dist = require "vertex.dist"
local json = require "vertex.json"
local registry = require "vertex.quantizers"

local flags = {}

-- -- Refusing ---------------------------------------------------------------------------------------------------------

local RANK_0_FIRST = 1.5 -- seconds: a job is over that long after its first rank ended

--- Ends the program: a message for the user on stderr, status 2. For what the command line asks and cannot be had.
-- Where several ranks refuse the same, rank 0 alone says so.
-- @param message text, as for string.format where arguments follow
function flags.refuse(message, ...)
  if select("#", ...) > 0 then message = message:format(...) end
  local rank = core.rank_numbers()
  if rank > 0 then
    core.sleep(RANK_0_FIRST)
    message = ("rank %d: %s"):format(rank, message)
  end
  io.stderr:write(message, "\n")
  os.exit(2, true)
end
local refuse = flags.refuse

--- Ends the program since a name is unknown; says which of the known ones is nearest.
-- @param what the name names: "method", "preset"
-- @param name text
-- @param known array of texts
function flags.refuse_name(what, name, known)
  local near = check.nearest(name, known)
  refuse("unknown %s '%s'%s; known: %s", what, name, near and (", did you mean '%s'?"):format(near) or "",
    table.concat(known, ", "))
end

--- Gives an error's text without the place in the sources where it was raised, which says nothing to a user.
-- @param message anything: what pcall returned
-- @return text
function flags.reason(message) return (tostring(message):gsub("^.-%.lua:%d+: ", "")) end

--- Reads a program's command line. Ends the program where help was asked for or something is wrong; the status is then
-- another than 0 where the help could not be written.
-- @param parser table, of argparse
-- @param[opt] argv array of texts; `arg`
-- @return table of what was given, by name
function flags.read(parser, argv)
  argv = argv or arg
  for _, a in ipairs(argv) do
    if a == "--help" or a == "-h" then
      if core.rank_numbers() == 0 then print(parser:get_help()) end
      os.exit(0, true) -- argparse's own help ends without a look at whether it could be written
    end
  end
  local ok, args = parser:pparse(argv)
  if not ok then refuse("%s\n\n%s", args, parser:get_usage()) end
  return args
end

--- Runs a program to its end. What it raises is told without the place in the sources, and the status is then 2, as
-- where a command is refused.
-- @param f function → status for os.exit; none: 0
-- @param ... its arguments
function flags.program(f, ...)
  local ok, status = pcall(f, ...)
  if not ok then refuse("%s", flags.reason(status)) end
  os.exit(status or 0, true)
end

--- Makes a folder and those above it; where that cannot be done it ends the program with the reason.
-- @param path path of the folder that --out named
function flags.make_folders(path)
  local ok, reason = core.make_folders(path)
  if not ok then refuse("--out %s: %s", path, reason) end
end

--- Writes a file of a run's folder; where that cannot be done it ends the program with the reason.
-- @param out path that --out named
-- @param name of the file in it
-- @param value for json.encode
function flags.write_json(out, name, value)
  local ok, message = pcall(core.write_file, out .. "/" .. name, json.encode(value) .. "\n")
  if not ok then refuse("--out %s is not writable: %s", out, flags.reason(message)) end
end

-- -- Values -----------------------------------------------------------------------------------------------------------

--- Makes a `convert` for a flag whose argument is an integer.
-- @param low integer, the least that is allowed
-- @param high integer, the greatest
-- @return function(text) → number, or nil and what is wrong
function flags.integer(low, high)
  return function(text)
    local v = tonumber(text)
    if not v or v ~= math.floor(v) or v < low or v > high then
      return nil, ("'%s': expected an integer from %d to %.0f"):format(text, low, high)
    end
    return v
  end
end
local integer = flags.integer

--- A value of --set or --grid: a number, true, false, an array in JSON, or else a text.
local function read_value(text)
  local known = json.decode(text)
  if type(known) == "number" or type(known) == "boolean" or text:find "^%[" and type(known) == "table" then
    return known
  end
  return text
end

--- Reads the arguments of --set.
-- @param list array of "NAME=VALUE"
-- @return table {NAME = VALUE}; nil where the list is empty
local function parse_settings(list)
  local settings
  for _, text in ipairs(list) do
    local name, value = text:match "^([%w_.]+)=(.+)$"
    if not name then refuse("--set %s: expected NAME=VALUE", text) end
    settings = settings or {}
    if settings[name] ~= nil then refuse("--set gives %s twice", name) end
    settings[name] = read_value(value)
  end
  return settings
end

--- Reads the arguments of --grid.
-- @param list array of "NAME=VALUE,VALUE,..."
-- @return array of {name =, values = array}; nil where the list is nil
local function parse_grid(list)
  if not list then return nil end
  local grid, seen = {}, {}
  for i, text in ipairs(list) do
    local name, rest = text:match "^([%w_.]+)=(.+)$"
    if not name then refuse("--grid %s: expected NAME=VALUE,VALUE,...", text) end
    if name == "seed" then refuse "--grid seed: --seeds sets it" end
    if seen[name] then refuse("--grid gives %s twice", name) end
    local values, texts = {}, {}
    for value in (rest .. ","):gmatch "(.-)," do
      if value == "" then refuse("--grid %s: a value is missing in '%s'", name, rest) end
      if texts[value] then refuse("--grid %s: %s is given twice", name, value) end
      values[#values + 1], texts[value] = read_value(value), true
    end
    grid[i], seen[name] = { name = name, values = values }, true
  end
  return grid
end

--- Reads the argument of --seeds: "1,2,5" or "1-5", or both.
-- @return array of integers, each once; nil and what is wrong
local function parse_seeds(text)
  local seeds, seen = {}, {}
  for part in (text .. ","):gmatch "(.-)," do
    local first, last = part:match "^(%d+)%-(%d+)$"
    first, last = tonumber(first or part:match "^%d+$"), tonumber(last or part:match "^%d+$")
    if not first or first > last or last > 2 ^ 31 or last - first > 9999 then
      return nil, ("'%s': expected integers from 0 to %.0f, as 1,2,5 or 1-5"):format(text, 2 ^ 31)
    end
    for seed = first, last do
      if seen[seed] then return nil, ("'%s': %d is given twice"):format(text, seed) end
      seeds[#seeds + 1], seen[seed] = seed, true
    end
  end
  return seeds
end

-- Sets of methods, by the facts that the quantizers' files declare.
local SETS = {
  paper = function(item) return item.table1 end,
  all = function(item) return not item.ablation end,
}

--- Lists the methods of a set.
-- @param set "paper": those of the paper's Table 1; "all": every registered one but the ablations
-- @return array of names, in the registry's order
function flags.methods(set)
  local names = {}
  for _, item in ipairs(registry.list) do
    if SETS[set](item) then names[#names + 1] = item.name end
  end
  return names
end

--- "a,paper,b" → list of method names, each once; ends the program where one is unknown. own: methods of the
-- experiment's own, {name = {summary =, paper =}}.
local function parse_methods(text, own)
  local methods, seen = {}, {}
  local function add(name)
    if not seen[name] then methods[#methods + 1] = name end
    seen[name] = true
  end
  local known = { "paper", "all" }
  for _, list in ipairs { check.names(own), registry.names(true) } do
    for _, name in ipairs(list) do known[#known + 1] = name end
  end
  for name in text:gmatch "[^,%s]+" do
    if SETS[name] then
      for _, member in ipairs(flags.methods(name)) do add(member) end
      for _, member in ipairs(name == "all" and check.names(own) or {}) do add(member) end
    elseif registry.by_name[name] or own[name] then
      add(name)
    else
      flags.refuse_name("method", name, known)
    end
  end
  if #methods == 0 then refuse("--methods names none; known: %s", table.concat(known, ", ")) end
  return methods
end

-- -- Flags that several experiments declare ---------------------------------------------------------------------------

--- For `flags` of an experiment that records its training step.
flags.graph = {
  name = "graph", values = { "on", "off" }, argname = "on|off",
  meaning = "Record the training step once and launch it as a whole; default on.",
  check = function(value)
    if value == "on" and dist.size() > 1 then return "--graph on: several ranks run their steps op by op" end
    if value == "on" and not core.can(core.device(), "graphs") then
      return ("--graph on: the device %s records no graphs"):format(core.device())
    end
  end,
}

--- For `flags` of an experiment whose network's body may be bf16.
flags.autocast = {
  name = "autocast", values = { "f32", "bf16" }, argname = "DTYPE", default = "f32", decides = true,
  meaning = "bf16: convolutions and products in bf16 (vx.autocast); default f32.",
}

-- -- The command line -------------------------------------------------------------------------------------------------

local function help_of_methods(spec)
  local lines = { "methods:" }
  for _, name in ipairs(check.names(spec.methods)) do
    lines[#lines + 1] = ("  %-16s %s (%s)"):format(name, spec.methods[name].summary, spec.methods[name].paper)
  end
  for _, item in ipairs(registry.list) do
    lines[#lines + 1] = ("  %-16s %s (%s)"):format(item.name, item.summary, item.paper)
  end
  return table.concat(lines, "\n")
end

local function help_of_columns(spec)
  local lines = { "columns of results.csv:" }
  for _, column in ipairs(spec.columns) do
    lines[#lines + 1] = ("  %-16s %s%s%s"):format(column.name, column.from, column.unit and ", " .. column.unit or "",
      column.better and "; best where " .. column.better or "")
  end
  return table.concat(lines, "\n")
end

local function make_parser(spec)
  local parser = argparse(spec.name, spec.summary):epilog(help_of_methods(spec) .. "\n\n" .. help_of_columns(spec))
  parser:usage_max_width(100):help_max_width(120):help_description_margin(28)
  local function option(name, meaning, argname, convert)
    if meaning then
      local o = parser:option("--" .. name, meaning):argname(argname)
      return convert and o:convert(convert) or o
    end
  end
  option("data", spec.words.data, "DIR")
  option("out", ("Folder for results; default: a fresh out/%s-PRESET-N."):format(spec.name), "DIR")
  option("device", "cpu, cuda:0, ...; default: the GPU where one works.", "D")
  option("seed", "Of everything random; default 1.", "N", integer(0, 2 ^ 31))
  option("seeds", "Several, as 1,2,5 or 1-5: a run each, and mean ± deviation over them.", "N,N", parse_seeds)
  parser:option("--grid", "A run for each value of a field of the preset, an option of the quantizers, batch or steps.")
    :argname("NAME=V,V"):args "+"
  option("methods", "Comma-separated; paper: those of the paper's Table 1 (the default), all: every one but ablations.",
    "A,B")
  local presets = table.concat(check.names(spec.presets), ", ")
  option("preset", ("One of %s; default %s."):format(presets, spec.preset), "NAME")
  option("steps", "Training steps per method; may grow on --resume.", "N", integer(1, 1e9))
  option("epochs", spec.words.epochs, "N", integer(1, 1e6))
  option("batch", spec.words.batch, "N", integer(1, 65536))
  option("threads", "CPU threads; results do not depend on it.", "N", integer(1, 4096))
  option("checkpoint", "Seconds between checkpoints; 0: after every step; default 10.", "N", integer(0, 1e6))
  parser:option("--set", "A number of the preset, or quantizer.OPTION of the quantizers; may be given several times.")
    :argname("NAME=VALUE"):count "*"
  option("quantizers", "Folder with more quantizers, one file each.", "DIR")
  for _, flag in ipairs(spec.flags) do
    if flag.argname or flag.values then
      local o = option(flag.name, flag.meaning, flag.argname or flag.name:upper(), flag.convert)
      if flag.values then o:choices(flag.values) end
    else
      parser:flag("--" .. flag.name, flag.meaning)
    end
  end
  parser:flag("--resume",
    "Go on with what --out (or the newest folder of this preset) holds; anew where it holds nothing.")
  parser:flag("--report", "Draw table, pictures and report of what --out holds again, and train nothing.")
  parser:flag("--tensorboard", "Write what is logged for TensorBoard too, into tensorboard/ of --out.")
  parser:flag("--quiet", "Only the final table.")
  return parser
end

--- "--steps -3" as "--steps=-3", so that the number is what is complained about.
local function join_numbers(argv)
  local joined = {}
  for _, a in ipairs(argv) do
    local before = joined[#joined]
    if a:match "^%-[%d.]" and before and before:match "^%-%-[^=]+$" then
      joined[#joined] = before .. "=" .. a
    else
      joined[#joined + 1] = a
    end
  end
  return joined
end

--- Adds the quantizers of the folder that --quantizers names: --methods and the help must know them.
local function load_quantizers(argv)
  local folder
  for i, a in ipairs(argv) do
    folder = a:match "^%-%-quantizers=(.+)$" or a == "--quantizers" and argv[i + 1] or folder
  end
  if not folder then return end
  local ok, message = pcall(registry.load_folder, folder)
  if not ok then refuse("--quantizers: %s", (tostring(message):gsub("^[^:]*:%d+: quantizers: ", ""))) end
end

--- Reads an experiment's command line. --device and --threads are in force afterwards. Ends the program where help was
-- asked for or something is wrong.
-- @param spec a checked declaration (runs/experiment.lua)
-- @param argv array of texts
-- @return table: the flags given by name, nil where not given; methods is an array of names
function flags.parse(spec, argv)
  load_quantizers(argv)
  local args = flags.read(make_parser(spec), join_numbers(argv))
  if args.preset and not spec.presets[args.preset] then
    flags.refuse_name("preset", args.preset, check.names(spec.presets))
  end
  if args.steps and args.epochs then refuse "--steps and --epochs: give one of them" end
  args.set = parse_settings(args.set)
  args.grid = parse_grid(args.grid)
  args.methods = args.methods and parse_methods(args.methods, spec.methods)
  if args.device then
    local found, reason = pcall(core.device, args.device)
    if not found then refuse("--device: %s", flags.reason(reason)) end
  end
  local joined, why = pcall(dist.size) -- takes a share of the cores
  if not joined then refuse("%s", flags.reason(why)) end
  if args.threads then core.threads(args.threads) end
  return args
end

return flags
