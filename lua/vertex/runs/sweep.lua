--- sweep.lua: one training loop over a list of methods: the flags every experiment takes, the output folder with its
-- resumable bookkeeping, and the results as table and pictures.
--
-- OUT/config.json        what defines the experiment; a folder with another one is refused
--    /checkpoints/M.safetensors   per method: everything to go on, and once finished its results
--    /metrics.jsonl      one line per log point          /results.csv  one line per finished method
--    /table.md           like the paper's Table 1        /curves.png, reconstructions.png

local argparse = require "argparse"
local lfs = require "lfs"
local core = require "vertex.core"
local registry = require "vertex.quantizers"
local train = require "vertex.runs.train"

local sweep = {}
local fail = core.fail

-- -- Flags ------------------------------------------------------------------------------------------------------------

local function integer(low, high)
  return function(text)
    local v = tonumber(text)
    if not v or v ~= math.floor(v) or v < low or v > high then
      return nil, ("'%s': expected an integer from %d to %.0f"):format(text, low, high)
    end
    return v
  end
end

local function sorted_keys(t)
  local keys = {}
  for key in pairs(t) do keys[#keys + 1] = key end
  table.sort(keys)
  return keys
end

local function exit_with(message)
  io.stderr:write(message .. "\n")
  os.exit(2, true)
end

--- "a,b" into a list of known method names.
local function parse_methods(text)
  if text == "all" then return registry.names() end
  local methods, seen = {}, {}
  for name in text:gmatch "[^,%s]+" do
    if not registry.by_name[name] then
      exit_with(("unknown method '%s'; known: %s"):format(name, table.concat(registry.names(true), ", ")))
    end
    if not seen[name] then methods[#methods + 1] = name end
    seen[name] = true
  end
  if #methods == 0 then exit_with("--methods names none; known: " .. table.concat(registry.names(true), ", ")) end
  return methods
end

local function methods_help()
  local lines = { "methods:" }
  for _, item in ipairs(registry.list) do
    lines[#lines + 1] = ("  %-16s %s (%s)"):format(item.name, item.summary, item.paper)
  end
  return table.concat(lines, "\n")
end

--- The flags every experiment takes. spec {name, summary, presets = {name = table}, default_preset}. Returns a table of
-- the flags given (nil where not given), --device and --threads already in force; prints help or an error and ends the
-- process where that is what was asked for or deserved.
function sweep.flags(spec, argv)
  local folder -- families of --quantizers must be known before --methods and the help are read
  for i, a in ipairs(argv) do
    folder = a:match "^%-%-quantizers=(.+)$" or a == "--quantizers" and argv[i + 1] or folder
  end
  if folder then
    local ok, message = pcall(registry.load_folder, folder)
    if not ok then exit_with("--quantizers: " .. tostring(message):gsub("^[^:]*:%d+: quantizers: ", "")) end
  end
  local presets = sorted_keys(spec.presets)
  local parser = argparse(spec.name, spec.summary):epilog(methods_help())
  parser:usage_max_width(100):help_max_width(120):help_description_margin(28)
  parser:option("--data", "Folder of images, with train/ and val/ or flat; default: made on the fly."):argname "DIR"
  parser:option("--out", "Folder for results; default: a fresh out/" .. spec.name .. "-PRESET-N."):argname "DIR"
  parser:option("--device", "cpu, cuda:0, ...; default: the GPU where one works."):argname "D"
  parser:option("--seed", "Of everything random; default 1."):argname "N":convert(integer(0, 2 ^ 31))
  parser:option("--methods", "Comma-separated, or all; default: the thirteen of Table 1."):argname "A,B"
  parser:option("--preset", ("One of %s; default %s."):format(table.concat(presets, ", "),
    spec.default_preset)):argname "NAME"
  parser:option("--steps", "Training steps per method."):argname "N":convert(integer(1, 1e9))
  parser:option("--epochs", "Passes over the data instead of steps."):argname "N":convert(integer(1, 1e6))
  parser:option("--batch", "Images per step."):argname "N":convert(integer(1, 65536))
  parser:option("--threads", "CPU threads; results do not depend on it."):argname "N":convert(integer(1, 4096))
  parser:option("--graph",
    "on or off: record a GPU's training step once and launch it as a whole; default on, where there is a GPU.")
    :argname "on|off":choices { "on", "off" }
  parser:option("--autocast",
    "bf16: a GPU's convolutions and products in bf16 (vx.autocast); default f32."):argname "DTYPE":choices { "f32",
    "bf16" }
  parser:option("--checkpoint",
    "Seconds between checkpoints; 0: after every step; default 10."):argname "N":convert(integer(0, 1e6))
  parser:option("--quantizers", "Folder with more quantizers, one file each."):argname "DIR"
  parser:flag("--strict", "A broken file in --data ends the run instead of being skipped.")
  parser:flag("--resume", "Go on with an interrupted run (of --out, or the newest of this preset).")
  parser:flag("--quiet", "Only the final table.")
  for _, add in ipairs(spec.more or {}) do add(parser) end
  local joined = {} -- "--steps -3" as "--steps=-3", so that the number is what is complained about
  for _, a in ipairs(argv) do
    local before = joined[#joined]
    if a:match "^%-[%d.]" and before and before:match "^%-%-[^=]+$" then joined[#joined] = before .. "="
      .. a else joined[#joined + 1] = a end
  end
  local ok, args = parser:pparse(joined)
  if not ok then exit_with(("%s\n\n%s"):format(args, parser:get_usage())) end
  if args.preset and not spec.presets[args.preset] then
    exit_with(("unknown preset '%s'; known: %s"):format(args.preset, table.concat(presets, ", ")))
  end
  if args.steps and args.epochs then exit_with "--steps and --epochs: give one of them" end
  args.methods = args.methods and parse_methods(args.methods)
  if args.threads then core.threads(args.threads) end
  if args.device then
    local found, reason = pcall(core.device, args.device)
    if not found then exit_with("--device: " .. tostring(reason):gsub("^[^:]*:%d+: ", "")) end
  end
  if args.autocast == "bf16" and core.device() == "cpu" then
    exit_with "--autocast bf16: products in bf16 need a GPU, the device is cpu"
  end
  if args.graph == "on" and core.device() == "cpu" then exit_with "--graph on: the CPU records no graphs" end
  return args
end

-- -- The output folder ------------------------------------------------------------------------------------------------

--- Makes an experiment's output folder and those above it; ends the program with a message where that cannot be done.
function sweep.make_folders(path)
  local ok, reason = core.make_folders(path)
  if not ok then exit_with(("--out %s: %s"):format(path, reason)) end
end

local function read_config(out)
  local f = io.open(out .. "/config.json", "r")
  if not f then return nil end
  local text = f:read "*a"
  f:close()
  local config = train.parse_json(text)
  if type(config) ~= "table" or not config.experiment then
    exit_with(("%s/config.json is damaged; nothing was changed"):format(out))
  end
  return config
end

--- out/NAME-PRESET-N: the newest (resume) or the next free one.
local function default_out(name, preset, resume)
  local prefix, newest = ("%s-%s-"):format(name, preset), 0
  if lfs.attributes("out", "mode") == "directory" then
    for entry in lfs.dir "out" do
      local n = entry:sub(1, #prefix) == prefix and tonumber(entry:sub(#prefix + 1))
      if n and n > newest then newest = n end
    end
  end
  if resume then
    if newest == 0 then exit_with(("--resume: no out/%s* to go on with"):format(prefix)) end
    return "out/" .. prefix .. newest
  end
  return "out/" .. prefix .. newest + 1
end

local Run = {}
Run.__index = Run

--- Opens the output folder of a sweep. flags from sweep.flags; `define(stored)` returns the config table of the
-- experiment from the flags, falling back to the stored one's values (nil on a new run). The config must hold what
-- decides the results, no more; its `methods` may grow.
function sweep.open(spec, flags, define)
  local out = (flags.out or default_out(spec.name, flags.preset or spec.default_preset, flags.resume)):gsub("(.)/+$",
    "%1")
  local mode = lfs.attributes(out, "mode")
  if mode and mode ~= "directory" then exit_with(("--out %s is a %s, expected a folder"):format(out, mode)) end
  local stored = mode and read_config(out)
  if stored and not flags.resume then
    exit_with(("--out %s holds an experiment already; --resume goes on with it, another --out starts anew"):format(out))
  end
  if flags.resume and not stored then exit_with(("--resume: %s holds no experiment"):format(out)) end
  if mode and not stored then
    for entry in lfs.dir(out) do
      if entry ~= "." and entry ~= ".." then
        exit_with(("--out %s is not empty and holds no experiment of ours ('%s')"):format(out, entry))
      end
    end
  end
  local config = define(stored)
  config.experiment = spec.name
  local methods = flags.methods or stored and stored.methods or registry.names()
  if stored then
    for _, key in ipairs(sorted_keys(config)) do
      if train.json(config[key]) ~= train.json(stored[key]) then
        exit_with(("--out %s holds another experiment: its %s is %s, asked for is %s"):format(out, key,
          train.json(stored[key]), train.json(config[key])))
      end
    end
    local known = {}
    for _, m in ipairs(stored.methods) do known[m] = true end
    for _, m in ipairs(methods) do
      if not known[m] then stored.methods[#stored.methods + 1] = m end
    end
  end
  sweep.make_folders(out .. "/checkpoints")
  local self = setmetatable({ out = out, methods = methods, config = config, flags = flags, spec = spec, results = {} },
    Run)
  self.identity = train.json(config)
  config.methods = stored and stored.methods or methods
  local ok, message = pcall(core.write_file, out .. "/config.json", train.json(config) .. "\n")
  if not ok then exit_with(("--out %s is not writable: %s"):format(out, tostring(message))) end
  for _, method in ipairs(config.methods) do
    local extra = self:peek(method)
    if extra and extra.result then self.results[method] = extra.result end
  end
  return self
end

function Run:checkpoint_path(method) return ("%s/checkpoints/%s.safetensors"):format(self.out, method) end

--- The method's last checkpoint's plain part; ends the process where the file is damaged or foreign, and touches
-- nothing.
function Run:peek(method)
  local path = self:checkpoint_path(method)
  local ok, extra = pcall(train.peek_checkpoint, path)
  if not ok then exit_with(("%s\nMove %s away to train %s anew."):format(tostring(extra), path, method)) end
  if extra and (extra.identity ~= self.identity or extra.method ~= method) then
    exit_with(("%s belongs to another experiment; nothing was changed"):format(path))
  end
  return extra
end

--- Is this method done, in this run or an earlier one?
function Run:finished(method) return self.results[method] ~= nil end

--- Starts or restores a method: `state` is what train.save_checkpoint takes. Returns the plain part of the checkpoint
-- ({step = 0} anew).
function Run:begin(method, state)
  self.method, self.state = method, state
  local extra = self:peek(method)
  if extra then
    local ok, message = pcall(train.load_checkpoint, self:checkpoint_path(method), state)
    if not ok then exit_with(tostring(message)) end
  end
  extra = extra or { step = 0, seconds = 0 }
  self:trim_metrics(method, extra.step)
  self.began, self.before, self.saved = core.time(), extra.seconds, core.time()
  return extra
end

function Run:seconds() return self.before + core.time() - self.began end

--- Writes the method's checkpoint with `extra` (at least {step}); with `now_and_then` only every --checkpoint seconds.
function Run:save(extra, now_and_then)
  if now_and_then and core.time() - self.saved < (self.flags.checkpoint or 10) then return end
  extra.identity, extra.method, extra.seconds = self.identity, self.method, self:seconds()
  train.save_checkpoint(self:checkpoint_path(self.method), self.state, extra)
  self.saved = core.time()
end

--- Forgets log lines of `method` after `step`: they will be made again.
function Run:trim_metrics(method, step)
  local kept, path = {}, self.out .. "/metrics.jsonl"
  local f = io.open(path, "r")
  if not f then return end
  local dropped = false
  for line in f:lines() do
    local entry = train.parse_json(line)
    if entry and (entry.method ~= method or entry.step <= step) then kept[#kept + 1] = line else dropped = true end
  end
  f:close()
  if dropped then core.write_file(path, #kept > 0 and table.concat(kept, "\n") .. "\n" or "") end
end

--- Appends one line to metrics.jsonl.
function Run:log(entry)
  entry.method, entry.seed = self.method, self.config.seed
  local f, reason = io.open(self.out .. "/metrics.jsonl", "a")
  if not f then fail("%s/metrics.jsonl: %s", self.out, reason) end
  f:write(train.json(entry), "\n")
  f:close()
end

--- Array of the log entries of a method.
function Run:history(method)
  local list, f = {}, io.open(self.out .. "/metrics.jsonl", "r")
  if not f then return list end
  for line in f:lines() do
    local entry = train.parse_json(line)
    if entry and entry.method == method then list[#list + 1] = entry end
  end
  f:close()
  return list
end

--- Records the method's results (a table of numbers under the columns' names) in its checkpoint and in results.csv.
function Run:finish_method(extra, result)
  result.method, result.seed, result.seconds = self.method, self.config.seed, self:seconds()
  extra.result = result
  self:save(extra)
  self.results[self.method] = result
  self:write_results()
end

-- -- Results ----------------------------------------------------------------------------------------------------------

local COLUMNS = { "method", "seed", "code_use", "perplexity", "rmse", "psnr", "fid_tv", "is_tv", "steps", "seconds",
  "code_use_256", "rmse_soft" }

local function cell(v)
  if v == nil then return "" end
  return type(v) == "number" and ("%.9g"):format(v) or tostring(v)
end

function Run:write_results()
  local lines = { table.concat(COLUMNS, ",") }
  for _, method in ipairs(self.config.methods) do
    local r = self.results[method]
    if r then
      local row = {}
      for i, c in ipairs(COLUMNS) do row[i] = cell(r[c]) end
      lines[#lines + 1] = table.concat(row, ",")
    end
  end
  core.write_file(self.out .. "/results.csv", table.concat(lines, "\n") .. "\n")
end

local TABLE = {
  { "Code use", "code_use", function(v) return ("%.1f%%"):format(100 * v) end, "max" },
  { "of 256", "code_use_256", function(v) return ("%.1f%%"):format(100 * v) end, "max" },
  { "Perplexity", "perplexity", function(v) return ("%.1f"):format(v) end, "max" },
  { "rMSE", "rmse", function(v) return ("%.3f"):format(v) end, "min" },
  { "rMSE soft", "rmse_soft", function(v) return ("%.3f"):format(v) end },
  { "PSNR", "psnr", function(v) return ("%.2f"):format(v) end, "max" },
  { "FID", "fid_tv", function(v) return ("%.2f"):format(v) end, "min" },
  { "IS", "is_tv", function(v) return ("%.2f"):format(v) end, "max" },
}

--- The table of finished methods as rows of texts; the best of each column marked by `mark`. A value that is missing is
-- a dash.
local function table_rows(run, mark)
  local rows, best = {}, {}
  for c, column in ipairs(TABLE) do
    for _, r in pairs(run.results) do
      local v = r[column[2]]
      if v and column[4] then
        local text = column[3](v)
        if not best[c] or (column[4] == "max" and v > best[c].v) or (column[4] == "min" and v < best[c].v) then
          best[c] = { v = v, text = text }
        end
      end
    end
  end
  for _, method in ipairs(run.config.methods) do
    local r = run.results[method]
    if r then
      local row = { method }
      for c, column in ipairs(TABLE) do
        local v = r[column[2]]
        local text = v and column[3](v) or "–"
        row[c + 1] = v and best[c] and text == best[c].text and mark(text) or text
      end
      row[#row + 1] = ("%.0f s"):format(r.seconds)
      rows[#rows + 1] = row
    end
  end
  return rows
end

local function width(s) return #s:gsub("[\128-\191]", ""):gsub("\27%[%d*m", "") end

--- table.md, and the same as text for the screen.
function Run:write_table(title)
  local head = { "Method" }
  for c, column in ipairs(TABLE) do head[c + 1] = column[1] end
  head[#head + 1] = "Time"
  local lines = { "# " .. title, "", "| " .. table.concat(head, " | ") .. " |", "|:--|" .. ("--:|"):rep(#head - 1) }
  for _, row in ipairs(table_rows(self, function(s) return "**" .. s .. "**" end)) do
    lines[#lines + 1] = "| " .. table.concat(row, " | ") .. " |"
  end
  lines[#lines + 1] = ""
  lines[#lines + 1] = "Code use: used codes / M over the whole split (beside it the mean over groups of 256 images). "
    .. "rMSE in standardized units after hard"
  lines[#lines + 1] = "quantization; rMSE soft: the same with the training-time quantizers. "
    .. "PSNR in [0,1] pixels. FID and IS need Inception weights."
  core.write_file(self.out .. "/table.md", table.concat(lines, "\n") .. "\n")

  local bold = core.is_tty(1) and function(s) return "\27[1m" .. s .. "\27[0m" end or function(s) return s end
  local rows, widths, text = table_rows(self, bold), {}, {}
  table.insert(rows, 1, head)
  for _, row in ipairs(rows) do
    for i, s in ipairs(row) do widths[i] = math.max(widths[i] or 0, width(s)) end
  end
  for _, row in ipairs(rows) do
    local cells = {}
    for i, s in ipairs(row) do
      local pad = (" "):rep(widths[i] - width(s))
      cells[i] = i == 1 and s .. pad or pad .. s
    end
    text[#text + 1] = table.concat(cells, "  ")
  end
  return table.concat(text, "\n")
end

-- -- Pictures ---------------------------------------------------------------------------------------------------------

--- curves.png: `left` and `right` name a log entry's field each, drawn over the steps, a line per method. {field,
-- label, log}.
function Run:draw_curves(left, right)
  local plot = require "vertex.plot"
  local fig = plot.figure { width = 1150, height = 440, cols = 2 }
  for i, what in ipairs { left, right } do
    local ax = fig:axes(i)
    for _, method in ipairs(self.config.methods) do
      local x, y = {}, {}
      for _, entry in ipairs(self:history(method)) do
        if entry[what.field] then x[#x + 1], y[#y + 1] = entry.step, entry[what.field] end
      end
      if #x > 0 then ax:line(x, y, { label = method }) end
    end
    ax:set { title = what.label, xlabel = "step", ylog = what.log, ylim = what.limits, legend = i == 2 and "right"
      or "none" }
  end
  fig:save(self.out .. "/curves.png")
end

--- reconstructions.png from the images each method left in its checkpoint: tensors run.originals and
-- run.reconstructions, u8 (n,H,W,3).
function Run:draw_reconstructions()
  local plot, safetensors = require "vertex.plot", require "vertex.safetensors"
  local rows, labels = {}, {}
  local function add(images, label)
    local row = {}
    for i = 1, images:size(1) do row[i] = images[i] end
    rows[#rows + 1], labels[#labels + 1] = row, label
  end
  core.step(function()
    for _, method in ipairs(self.config.methods) do
      if self.results[method] then
        local tensors = safetensors.load(self:checkpoint_path(method), { device = "cpu" })
        if tensors["run.originals"] then
          if #rows == 0 then add(tensors["run.originals"], "original") end
          add(tensors["run.reconstructions"], method)
        end
      end
    end
    if #rows > 0 then
      plot.image_grid(rows, { row_labels = labels, cell = 72, gap = 3 }):save(self.out .. "/reconstructions.png")
    end
  end)
end

return sweep
