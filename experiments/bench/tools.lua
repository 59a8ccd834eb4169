--- What the benchmarks share: C programs compiled when needed, PyTorch workers, paired rounds, results that merge into
-- a CSV file.

local lfs = require "lfs"
local core = require "vertex.core"
local quantizers = require "vertex.quantizers"

local tools = {}

--- Ends the process with a message, as the other experiments do.
function tools.exit_with(message, ...)
  io.stderr:write(message:format(...) .. "\n")
  os.exit(2, true)
end

local function quote(text) return "'" .. tostring(text):gsub("'", "'\\''") .. "'" end

--- Output of a shell command and whether it ended well.
local function capture(command)
  local pipe = assert(io.popen(command .. "; echo \"status $?\""))
  local text = pipe:read "*a"
  pipe:close()
  local output, status = text:match "^(.*)status (%d+)%s*$"
  return output, status == "0"
end

-- -- Scratch ----------------------------------------------------------------------------------------------------------

local scratch, cleaner

--- A path in a folder of this run's own, which is removed at its end.
function tools.scratch(name)
  if not scratch then
    scratch = os.tmpname()
    os.remove(scratch)
    if not lfs.mkdir(scratch) then tools.exit_with("cannot make a folder for temporary files, %s", scratch) end
    cleaner = newproxy(true)
    getmetatable(cleaner).__gc = function() os.execute("rm -rf " .. quote(scratch)) end
  end
  return scratch .. "/" .. name
end

-- -- The machine ------------------------------------------------------------------------------------------------------

--- {name, simd, slug} of the processor and of the kernels that this run uses.
function tools.processor()
  local text = core.devices()[1].description
  local name, simd = text:match "^(.*), (%S+) kernels"
  if not name then name, simd = "unknown", text:match "(%S+) kernels" end
  local slug = (name .. " " .. simd):lower():gsub("%b()", ""):gsub("@.*", simd):gsub("[^%w]+", "-"):gsub("%-$", "")
  return { name = name:gsub(",", " "), simd = simd, slug = slug }
end

--- The same of a GPU.
function tools.gpu(device)
  local name
  for _, d in ipairs(core.devices()) do name = d.name == device and d.description:match "^[^,]*" or name end
  name = name or device -- the emulator is not listed
  return { name = name, simd = device, slug = (name:lower():gsub("[^%w]+", "-"):gsub("%-$", "")) }
end

--- Compiles a C file with the processor's own instructions, or those of a SIMD variant; returns the program's path, or
-- where `shared` is true that of a library to preload.
function tools.compile(source, simd, shared)
  local flags = "-march=native"
  for _, variant in ipairs(core.cpu_variants()) do
    if variant.name == simd then flags = variant.flags end
  end
  local program = tools.scratch(source:match "([%w_]+)%.c$" .. (simd or "") .. (shared and ".so" or ""))
  if lfs.attributes(program) then return program end
  local cc = os.getenv "CC" or "cc"
  local command = "%s -O3 %s -ffp-contract=fast -fno-math-errno -fopenmp -I%s %s %s -o %s -lm 2>&1"
  local output, ok = capture(command:format(cc, flags, quote(core.root), shared and "-shared -fPIC" or "",
    quote(source), quote(program)))
  if not ok then tools.exit_with("cannot compile %s with %s:\n%s", source, cc, output) end
  return program
end

--- Runs a program of tools.compile; its output.
function tools.execute(program, ...)
  local parts = { quote(program) }
  for i = 1, select("#", ...) do parts[i + 1] = quote((select(i, ...))) end
  local output, ok = capture(table.concat(parts, " "))
  if not ok then tools.exit_with("%s failed: %s", program, output) end
  return output
end

--- The commit that a checkout is at, as seven digits; the folder's name where git knows nothing of it.
function tools.revision(root)
  local output, ok = capture(("git -C %s rev-parse --short=7 HEAD 2> /dev/null"):format(quote(root)))
  return ok and output:match "%x+" or root:match "[^/]+$"
end

--- What the machine can do at best, as roofline.c measures it: {fma, exp2, compare, read, copy} in units of 1e9 a
-- second.
function tools.ceilings(folder, simd, threads)
  local c = {}
  for name, value in tools.execute(tools.compile(folder .. "/roofline.c", simd), threads):gmatch "(%w+) ([%d.]+) %S+" do
    c[name] = tonumber(value)
  end
  return c
end

--- What a GPU can do at best, as build/cuda_roofline (roofline.cu) measures it: {fma, tensor, exp2, read, copy}; empty
-- where that was not built.
function tools.gpu_ceilings(device)
  local program, ordinal, c = core.root .. "/build/cuda_roofline", device:match "^cuda:(%d+)$", {}
  if not ordinal or not lfs.attributes(program) then return c end
  for name, value in tools.execute(program, ordinal):gmatch "(%w+) ([%d.]+) %S+" do c[name] = tonumber(value) end
  return c
end

--- What is declared of a row's method: a quantizer's facts; {metric =} of the nearest code alone, whose rows have the
-- metric in the method's place.
function tools.facts(method) return quantizers.by_name[method] or { metric = method } end

--- Regularizers with neighbours.
tools.KNN = { ["knn-ce"] = true, ["knn-l2"] = true }

--- Least milliseconds of a smoothed method or of the nearest code, as the head of quantizer.lua counts them. facts: the
-- method's (tools.facts). nil for methods with noise, and where the ceilings were not measured. A GPU's are
-- those without `compare`.
function tools.floor_ms(shape, facts, ceilings)
  local sampler, regularizer = facts.sampler, facts.regularizer
  if not ceilings.fma then return nil end
  local NM = shape.N * shape.M
  local G, E, madd = 2 * NM * shape.D / ceilings.fma, NM / ceilings.exp2, 2 * NM / ceilings.fma
  if not sampler then return G * 1e-6 end
  if sampler ~= "softmax" then return nil end
  if not ceilings.compare then return 3 * E * 1e-6 end
  local F = NM / ceilings.compare
  local t = 2 * G + E + 5 * G + E
  if tools.KNN[regularizer] then t = t + F end
  if regularizer == "knn-l2" then t = t + 2 * madd end
  if regularizer == "ppl" then t = t + madd + G + E + 2 * madd end
  return t * 1e-6
end

--- Bytes that this machine has free.
function tools.free_memory()
  for line in io.lines "/proc/meminfo" do
    local kb = line:match "^MemAvailable:%s+(%d+)"
    if kb then return tonumber(kb) * 1024 end
  end
  return 8e9
end

--- Resident bytes of this process, now and at its peak since the last reset_resident.
function tools.resident()
  local now, peak
  for line in io.lines "/proc/self/status" do
    now = now or line:match "^VmRSS:%s+(%d+)"
    peak = peak or line:match "^VmHWM:%s+(%d+)"
  end
  return tonumber(now) * 1024, tonumber(peak) * 1024
end

--- Forgets the peak of the resident bytes; whether that worked.
function tools.reset_resident()
  local f = io.open("/proc/self/clear_refs", "w")
  if not f then return false end
  local ok = f:write "5"
  return f:close() and ok and true
end

-- -- PyTorch workers --------------------------------------------------------------------------------------------------

local Worker = {}
Worker.__index = Worker

--- Starts `python script arguments...`, which answers lines with lines (see quantizer.py). options {environment = "A=1
-- B=2", memory = bytes that it may take}. Returns it, or nil and the end of what it said on stderr.
function tools.worker(python, script, arguments, options)
  local commands, errors = tools.scratch "commands", tools.scratch "errors"
  os.remove(commands)
  os.execute("mkfifo " .. quote(commands))
  local parts = {}
  for i, a in ipairs(arguments) do parts[i] = quote(a) end
  local limit = options.memory and ("ulimit -d %d; "):format(options.memory / 1024) or ""
  local self = setmetatable({}, Worker)
  local environment = "-u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE " .. (options.environment or "")
  self.replies = assert(io.popen(("%sexec env %s %s %s %s < %s 2> %s"):format(limit, environment,
    quote(python), quote(script), table.concat(parts, " "), quote(commands), quote(errors))))
  self.commands = assert(io.open(commands, "w"))
  self.commands:setvbuf "no"
  self.version = (self.replies:read "*l" or ""):match "^ready (%S+)"
  if self.version then return self end
  self:close()
  local f = io.open(errors)
  local text = f and f:read "*a" or ""
  if f then f:close() end
  return nil, text:match "([^\n]+)%s*$" or "no reason given"
end

--- The answer to a command; nil where the worker ran out of memory or died of it.
function Worker:ask(command)
  if self.dead then return nil end
  self.commands:write(command, "\n")
  local reply = self.replies:read "*l"
  if reply == nil or reply == "oom" then
    self.dead = true
    return nil
  end
  return reply
end

function Worker:close()
  self.commands:close()
  self.replies:close()
end

-- -- Paired rounds ----------------------------------------------------------------------------------------------------

function tools.median(values)
  local sorted = {}
  for i, v in ipairs(values) do sorted[i] = v end
  table.sort(sorted)
  local n = #sorted
  return n % 2 == 1 and sorted[(n + 1) / 2] or (sorted[n / 2] + sorted[n / 2 + 1]) / 2
end

local function summary(runs)
  local forward, backward, total = {}, {}, {}
  for i, r in ipairs(runs) do forward[i], backward[i], total[i] = r[1], r[2], r[3] end
  return { rounds = #runs, forward = tools.median(forward), backward = tools.median(backward),
    total = tools.median(total),
    least = math.min(unpack(total)), most = math.max(unpack(total)), totals = total }
end

--- Times a and, where given, b in turn: A B A B ... Each is a function that returns milliseconds forward and backward
-- (nil: it cannot), and is called so often in its turn that 0.2 s pass (20 times at most), the median being its time of
-- the round. limits {rounds = at most, seconds = for all of them}. A first round warms up; it is the only one where it
-- takes more than half of the seconds, so that a side which is slow at first is better warmed up before. Returns the
-- summary of a and of b (with b.ratio, ratio_least, ratio_most: b's time over a's, round by round); nil where one
-- cannot.
function tools.pair(limits, a, b)
  local sides, runs, repeats = { a, b }, { {}, {} }, { 1, 1 }
  local function turn(side)
    local forward, backward, total = {}, {}, {}
    for i = 1, repeats[side] do
      local f, g = sides[side]()
      if not f then return false end
      forward[i], backward[i], total[i] = f, g, f + g
    end
    local run = { tools.median(forward), tools.median(backward), tools.median(total) }
    table.insert(runs[side], run)
    return run
  end
  local function round()
    for side = 1, #sides do
      if not turn(side) then return false end
    end
    return true
  end
  local start = core.time()
  if not round() then return nil end
  local took = core.time() - start
  if took < limits.seconds / 2 then
    took = 0
    for side = 1, #sides do
      local once = turn(side)[3] * 1e-3 -- warm now
      repeats[side] = math.max(1, math.min(20, math.floor(0.2 / once)))
      took = took + repeats[side] * once
    end
    runs = { {}, {} }
    for _ = 1, math.max(1, math.min(limits.rounds, math.floor(limits.seconds / took))) do
      if not round() then return nil end
    end
  end
  local of_a = summary(runs[1])
  if not b then return of_a end
  local of_b, ratios = summary(runs[2]), {}
  for i, t in ipairs(of_b.totals) do ratios[i] = t / of_a.totals[i] end
  of_b.ratio, of_b.ratio_least, of_b.ratio_most = tools.median(ratios), math.min(unpack(ratios)),
    math.max(unpack(ratios))
  return of_a, of_b
end

-- -- Results ----------------------------------------------------------------------------------------------------------

local Results = {}
Results.__index = Results

--- Rows of a CSV file, which may be there already. A row is a table by column name; a new row takes the place of one
-- that agrees with it in all `keys`.
function tools.results(path, columns, keys)
  local self = setmetatable({ path = path, columns = columns, keys = keys, rows = {} }, Results)
  local f = io.open(path)
  if not f then return self end
  local header = f:read "*l"
  if header ~= table.concat(columns, ",") then
    f:close()
    tools.exit_with("%s is not a file of this benchmark, or of another version of it: its columns differ. Move it away",
      path)
  end
  for line in f:lines() do
    local row, i = {}, 0
    for cell in (line .. ","):gmatch "([^,]*)," do
      i = i + 1
      row[columns[i]] = cell ~= "" and (tonumber(cell) or cell) or nil
    end
    self.rows[#self.rows + 1] = row
  end
  f:close()
  return self
end

local function cell_text(value)
  if value == nil then return "" end
  if type(value) ~= "number" then return (tostring(value):gsub("[,\n]", ";")) end
  return value == math.floor(value) and math.abs(value) < 1e15 and ("%d"):format(value) or ("%.6g"):format(value)
end

--- Adds a row and writes the file, so that an interrupted run keeps what it has.
function Results:add(row)
  local at = #self.rows + 1
  for i, old in ipairs(self.rows) do
    local same = true
    for _, key in ipairs(self.keys) do same = same and cell_text(old[key]) == cell_text(row[key]) end
    if same then at = i end
  end
  self.rows[at] = row
  local lines = { table.concat(self.columns, ",") }
  for _, r in ipairs(self.rows) do
    local cells = {}
    for i, name in ipairs(self.columns) do cells[i] = cell_text(r[name]) end
    lines[#lines + 1] = table.concat(cells, ",")
  end
  core.write_file(self.path, table.concat(lines, "\n") .. "\n")
  return row
end

--- Lines of text with the columns aligned: the first `left` of them to the left, the others to the right. rows: arrays
-- of texts.
function tools.table(rows, left)
  local widths, lines = {}, {}
  local function width(text) return #text:gsub("[\128-\191]", "") end
  for _, row in ipairs(rows) do
    for i, text in ipairs(row) do widths[i] = math.max(widths[i] or 0, width(text)) end
  end
  for r, row in ipairs(rows) do
    local cells = {}
    for i, text in ipairs(row) do
      local fill = (" "):rep(widths[i] - width(text))
      cells[i] = i <= left and text .. fill or fill .. text
    end
    lines[r] = table.concat(cells, "  "):gsub("%s+$", "")
  end
  return table.concat(lines, "\n")
end

return tools
