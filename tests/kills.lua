--- Kills a small sweep with SIGKILL at random moments and goes on with --resume, until the end; then anew in another
-- folder, until all kills are spent. What every finished folder holds must be what the run that nobody killed left:
-- the same files, metrics.jsonl and the checkpoints' tensors to the bit, results.csv but for the clock's columns.
--
--   luajit tests/kills.lua [KILLS] [SEED]
--
-- Images (ae_sweep) and vectors (fixtures/experiments) take turns. It ends with how many kills there were, and in how
-- many runs; with a status of 1, and the folders kept, where one differs.

package.path = "./?.lua;lua/?.lua;lua/?/init.lua;" .. package.path
local core = require "vertex.core"
local lfs = require "lfs"
local vx = require "vertex"

local kills, seed = tonumber(arg[1]) or 6, tonumber(arg[2]) or 1
math.randomseed(seed)
local root = lfs.currentdir()
local scratch = os.tmpname()
os.remove(scratch)
assert(lfs.mkdir(scratch))
local library = os.getenv "VERTEX_LIB" or root .. "/build/libvertex.so"

local RUNS = {
  { "experiments/ae_sweep.lua", "--steps 12 --batch 2 --set codes=32 --methods sgumbel-knn-ce,ema-euclid" },
  { "tests/fixtures/experiments/vectors.lua", "--steps 300 --methods re-cosine,softmax-knn-ce" } }
local CLOCK = { seconds = true, step_ms = true, peak_mb = true } -- columns of results.csv

local read = core.read_file

--- Runs a command; kills it after `delay` seconds where that is given. Gives its status (137: killed) and seconds.
local function run(spec, out, delay)
  local began = core.time()
  local command = ("cd '%s' && VERTEX_LIB='%s' luajit '%s/%s' %s --checkpoint 0 --quiet --resume --out %s "
    .. ">said 2>&1"):format(scratch, library, root, spec[1], spec[2], out)
  if delay then
    command = command:gsub("luajit", "exec luajit", 1)
    command = ("(%s) & pid=$!; sleep %.3f; kill -9 $pid 2>/dev/null; wait $pid"):format(command, delay)
  end
  local status = os.execute(command .. " 2>/dev/null")
  return math.floor(status / 256), core.time() - began
end

--- Adds to `held` what a folder holds, by the names of its files: what must be the same.
local function contents(folder, held, below)
  for name in lfs.dir(folder) do
    local path, key = folder .. "/" .. name, below .. name
    if name ~= "." and name ~= ".." then
      if lfs.attributes(path, "mode") == "directory" then
        contents(path, held, key .. "/")
      elseif name:find "%.safetensors$" then
        local names, parts = {}, {}
        local tensors = vx.load(path)
        for n in pairs(tensors) do names[#names + 1] = n end
        table.sort(names)
        for i, n in ipairs(names) do parts[i] = n .. tensors[n]:bytes() end
        held[key] = table.concat(parts)
      elseif name == "results.csv" then
        local lines, kept = {}, {}
        for line in read(path):gmatch "[^\n]+" do
          local i, row = 0, {}
          for cell in (line .. ","):gmatch "([^,]*)," do
            i = i + 1
            if #lines == 0 then kept[i] = not CLOCK[cell] end
            if kept[i] then row[#row + 1] = cell end
          end
          lines[#lines + 1] = table.concat(row, ",")
        end
        held[key] = table.concat(lines, "\n")
      else
        held[key] = name == "metrics.jsonl" and read(path) or "there"
      end
    end
  end
  return held
end

--- Lists the files in which two folders differ.
local function differences(a, b)
  local list = {}
  for key, value in pairs(a) do
    if b[key] ~= value then list[#list + 1] = key .. (b[key] and " differs" or " is missing") end
  end
  for key in pairs(b) do
    if not a[key] then list[#list + 1] = key .. " is left over" end
  end
  table.sort(list)
  return list
end

for i, spec in ipairs(RUNS) do
  local status, seconds = run(spec, "whole" .. i)
  assert(status == 0, read(scratch .. "/said"))
  spec.whole, spec.seconds = contents(scratch .. "/whole" .. i, {}, ""), seconds
end

local done, finished, faults = 0, 0, 0
while done < kills do
  local spec = RUNS[finished % #RUNS + 1]
  local out = "killed" .. finished
  local status
  repeat
    local last = done >= kills
    status = run(spec, out, not last and math.random() * 1.1 * spec.seconds or nil)
    if status == 137 then done = done + 1 end
  until status ~= 137
  finished = finished + 1
  local list = status == 0 and differences(spec.whole, contents(scratch .. "/" .. out, {}, ""))
    or { ("status %d: %s"):format(status, read(scratch .. "/said")) }
  if #list > 0 then
    faults = faults + 1
    io.stderr:write(("%s in %s/%s:\n  %s\n"):format(spec[1], scratch, out, table.concat(list, "\n  ")))
  else
    os.execute(("rm -rf '%s/%s'"):format(scratch, out))
  end
end
print(("%d kills in %d runs, %d of which differ from the run that nobody killed"):format(done, finished, faults))
if faults == 0 then os.execute(("rm -rf '%s'"):format(scratch)) end
os.exit(faults == 0 and 0 or 1, true)
