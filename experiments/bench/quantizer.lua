--- The quantizer's ops against PyTorch, against float64 and against what the machine can do at best.
--
--   luajit experiments/bench/quantizer.lua [--sections op,assign] [--shapes S,B] [--python python3] [--out DIR]
--
-- Runs of the two sides alternate (A B A B ...), and the ratio is the median of the ratios pair by pair, so that a
-- machine that others use too slows both sides alike; the ratio of the least times stands beside it. Beside every time
-- stand
--   floor   the least time that the arithmetic takes at the ceilings that kernels/lab/roofline.c measures in this run,
--           with the same vectors and threads. With G = 2 N M D / fma, E = N M / exp2, F = N M / compare:
--             forward 2 G + E (+ F with neighbours), backward 5 G + E (4 G under hard Gumbel)
--             knn-l2  one multiply-add per element more each way
--             ppl     one more forward, and backward G + E and two more, since its row sums need a pass of their own
--             assign  G
--           The noise of the Gumbel samplers is not in it, so they have no floor here. In the .csv the ceilings are
--           those of the row's own run; in the .txt the best of all its runs, since others only ever lower them: the
--           least time's percentage there says what the code can do, the median's what it did among others.
--   extra   peak memory beyond inputs and outputs (z, codebook, dy; quantized and the three gradients): ours as the
--           library counts it, to the byte, and (rss) as the system sees it; PyTorch's from ru_maxrss, less what the
--           interpreter holds with the inputs loaded and its libraries warm, less its outputs
--   errors  |x - exact| / |exact| of quantized, regularizer and gradients, and how many of the codes and neighbours are
--           not those of float64 (float64_check.c); gradients are compared for the neighbours chosen, and `gap` is how
--           far the worst of those lies from the right one's key
-- With --device cuda:0 both sides run on the GPU, where times include the wait for its last kernel; the ceilings are
-- roofline.cu's, and the floor is the time of the exponentials alone: one for each pair of a row and a code forward and
-- two backward, 3 N M / exp2. Side "vertex graph" is the same work recorded once and launched as a whole (vx.graph),
-- its time not divided into forward and backward. Results merge into OUT/quantizer-PROCESSOR.csv, so that sections and
-- shapes can be repeated one by one; the .txt beside it shows them as tables, the .png is the plot of the sweep.

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")

local core = require "vertex.core"
local here = core.root .. "/experiments/bench"
local vx = require "vertex"
local tools = require "tools"
local exit_with = tools.exit_with

-- -- Flags ------------------------------------------------------------------------------------------------------------

local SHAPES = { -- N rows, D wide, M codes, K neighbours
  S = { 4096, 32, 1024, 2 }, M = { 16384, 32, 8196, 8 }, B = { 65536, 3, 8196, 8 }, C = { 65536, 32, 8196, 8 },
    W = { 25000, 256, 1024, 2 },
}
local SMOOTH_BASELINES = { "naive", "trans", "chunk", "filter", "compile" }
local NEAREST_BASELINES = { "cdist", "mm", "chunk", "vqp" }
local KMEANS_BASELINES = { "faiss", "sklearn" } -- nearest.py's
local SECTIONS = { "op", "regularizer", "gumbel", "assign", "sweep", "large", "late" }

local parser = require "argparse"("quantizer",
  "The quantizer's ops against PyTorch, float64 and the machine's ceilings."):epilog [[
sections:
  op           the smoothed methods of --methods at --shapes, forward and backward
  regularizer  what each regularizer costs: softmax-* over softmax-none
  gumbel       what noise costs: hgumbel-* and sgumbel-* over softmax-*
  assign       nearest code, euclid and cosine, against cdist and vector-quantize-pytorch
  sweep        step time and memory against M from 1,024 to 65,536 at N = 8 M, K = 8, for D = 3 and 32
  large        N = 524,288, M = 65,536, K = 8, D = 3
  late         late in training: --methods and both nearest codes with rows near codes (normal numbers off a code by
               0.02 of normal numbers), the methods at each of --taus; or with the rows of --latents
shapes: S 4096x32x1024x2, M 16384x32x8196x8, B 65536x3x8196x8, C 65536x32x8196x8, W 25000x256x1024x2, or any NxDxMxK
baselines: naive, trans, chunk, filter, compile for the smoothed methods; cdist, mm, chunk, vqp for the nearest code
(quantizer.py describes them), and faiss, sklearn (nearest.py)]]
parser:usage_max_width(100):help_max_width(120):help_description_margin(28)
parser:option("--sections", "Comma-separated."):argname "A,B":default "op,regularizer,gumbel,assign"
parser:option("--shapes",
  "Comma-separated names, or NxDxMxK; default: all five, B and C for regularizer and gumbel, "
  .. "none but its own for large.")
  :argname "A,B"
parser:option("--methods",
  "Smoothed methods of section op, regularizers of gumbel."):argname "A,B":default "softmax-knn-ce,softmax-knn-l2"
parser:option("--codes", "Codebook sizes M of the sweep."):argname "M,.."
parser:option("--dims", "Row widths D of the sweep."):argname "D,..":default "3,32"
parser:option("--baselines",
  "Comma-separated; default: naive,trans,chunk,filter,compile (sweep: naive,filter) and cdist,mm,chunk,vqp.")
  :argname "A,B"
parser:option("--python", "Interpreter with torch; 'none' leaves PyTorch out."):argname "P":default "python3"
parser:option("--environment",
  "PyTorch's: tuned (large arrays in huge pages, kept from step to step) or stock."):default "tuned"
parser:option("--against",
  "The library of another build of Vertex in its checkout, CHECKOUT/build/libvertex.so: one more side of op, assign "
  .. "and late."):argname "LIB"
parser:option("--taus", "Temperatures of section late."):argname "T,..":default "0.1,0.03,0.01,0.003,0.001"
parser:option("--latents",
  "Section late: rows from a run, .safetensors with z (N,1,D), codebook (1,M,D) and log_tau (1); their own tau, K of "
  .. "--neighbours."):argname "FILE"
parser:option("--neighbours", "K of --latents."):argname "K":default "8":convert(tonumber)
parser:option("--rounds", "Pairs of runs, at most."):argname "N":default "9":convert(tonumber)
parser:option("--seconds",
  "For the pairs of one comparison; there is always one pair."):argname "T":default "30":convert(tonumber)
parser:option("--limit",
  "Sweep: no PyTorch step that is expected to take longer, in seconds."):argname "T":default "120":convert(tonumber)
parser:option("--memory", "GB that PyTorch may take; default: what is free less 2."):argname "GB":convert(tonumber)
parser:option("--threads"):argname "N":default "2":convert(tonumber)
parser:option("--clock",
  "wall, or processor: the time that the processor gave to the process, for a machine that is never quiet. With one "
  .. "thread, since idle threads take time too; PyTorch is left out."):argname "C":default "wall"
parser:option("--device", "Of both sides: cpu, cuda:0, ..."):argname "D":default "cpu"
parser:option("--tau", "Temperature."):default "0.1":convert(tonumber)
parser:option("--errors", "yes; no; or auto: where N x M is at most 2^30."):default "auto"
parser:option("--out", "Folder of the results."):argname "DIR":default "out/bench"
local flags = parser:parse()

local function words(text, known, what)
  local list, names = {}, {}
  for name in text:gmatch "[^,%s]+" do list[#list + 1] = name end
  for _, name in ipairs(known or {}) do names[name] = true end
  for _, name in ipairs(list) do
    if known and not names[name] then exit_with("unknown %s '%s'; known: %s", what, name, table.concat(known, ", ")) end
  end
  return list
end

for _, name in ipairs { "neighbours", "rounds", "seconds", "limit", "threads", "tau", "memory" } do
  local value = flags[name]
  if value ~= nil and not (type(value) == "number" and value > 0) or value == nil and name ~= "memory" then
    exit_with("--%s: expected a number above 0", name)
  end
end
for name, values in pairs { environment = { "tuned", "stock" }, errors = { "yes", "no", "auto" },
  clock = { "wall", "processor" } } do
  words(flags[name], values, "--" .. name)
end

local function shape_of(name)
  local s = SHAPES[name]
  if not s then
    local n, d, m, k = name:match "^(%d+)x(%d+)x(%d+)x(%d+)$"
    if not n then exit_with("unknown shape '%s'; known: S, M, B, C, W, or NxDxMxK", name) end
    s = { tonumber(n), tonumber(d), tonumber(m), tonumber(k) }
  end
  local shape = { name = name, N = s[1], D = s[2], M = s[3], K = s[4] }
  if shape.N < 1 or shape.D < 1 or shape.M < 1 or shape.K < 1 or shape.K > shape.N then
    exit_with("shape %s: sizes are 1 or more, and K at most N", name)
  end
  return shape
end

local function shapes(default)
  local list = {}
  for i, name in ipairs(words(flags.shapes or default)) do list[i] = shape_of(name) end
  return list
end

-- vertex.h's numbers
local SAMPLERS, REGULARIZERS = { softmax = 0, sgumbel = 1, hgumbel = 2 },
  { none = 0, ppl = 1, ["knn-ce"] = 2, ["knn-l2"] = 3 }
local METRICS = { euclid = 0, cosine = 1 }
local known_methods, method_of = {}, {} -- method_of[sampler][regularizer]
for _, facts in ipairs(vx.quantizers()) do
  if not facts.base and SAMPLERS[facts.sampler] and REGULARIZERS[facts.regularizer] then
    known_methods[#known_methods + 1] = facts.name
    method_of[facts.sampler] = method_of[facts.sampler] or {}
    method_of[facts.sampler][facts.regularizer] = facts.name
  end
end

local sections = words(flags.sections, SECTIONS, "section")
local methods = words(flags.methods, known_methods, "method")
local baselines = flags.baselines and words(flags.baselines, { "naive", "trans", "chunk", "filter", "compile", "cdist",
  "mm", "vqp", "faiss", "sklearn" }, "baseline")
local opened, why = pcall(vx.device, flags.device)
if not opened then exit_with("--device: %s", (tostring(why):gsub("^[^:]*:%d+: ", ""))) end
local on_gpu = not core.can(vx.device(), "host")
local memory_limit = flags.memory and flags.memory * 1e9 or (on_gpu and vx.memory().limit or tools.free_memory()) - 2e9

if flags.clock == "processor" and (on_gpu or flags.threads ~= 1) then
  exit_with("--clock processor: expected --threads 1 and the CPU")
end
local clock = flags.clock == "processor" and os.clock or core.time -- seconds

--- Those of `known` that were asked for; `default` where none were named.
local function chosen(known, default)
  if flags.python == "none" or flags.clock == "processor" and known ~= KMEANS_BASELINES then return {} end
  local list = {}
  for _, name in ipairs(baselines or default or known) do
    for _, k in ipairs(known) do list[#list + 1] = k == name and name or nil end
  end
  return list
end

--- The shape of --latents.
local function shape_of_latents()
  local file = vx.load(flags.latents)
  for _, name in ipairs { "z", "codebook", "log_tau" } do
    if not core.is_tensor(file[name]) then exit_with("--latents %s: has no %s", flags.latents, name) end
  end
  local N, D, M = file.z:size(1), file.z:size(3), file.codebook:size(2)
  return { name = ("latents %dx%dx%d"):format(N, D, M), N = N, D = D, M = M, K = flags.neighbours, latents = file,
    tau = math.exp(file.log_tau:totable()[1]) }
end

-- before anything is measured
local latents = flags.latents and shape_of_latents()
shapes ""

vx.threads(flags.threads)
local processor = on_gpu and tools.gpu(flags.device) or tools.processor()
local limits = { rounds = flags.rounds, seconds = flags.seconds }

-- -- Results ----------------------------------------------------------------------------------------------------------

local made, made_reason = core.make_folders(flags.out)
if not made then exit_with("--out %s: %s", flags.out, made_reason) end
local path = ("%s/quantizer-%s"):format(flags.out, processor.slug)
local results = tools.results(path .. ".csv", { "section", "shape", "N", "D", "M", "K", "tau", "threads", "method",
  "side", "rounds", "forward_ms",
  "backward_ms", "ms", "ms_min", "ms_max", "against", "against_ms", "against_ms_min", "ratio", "ratio_min", "ratio_max",
    "extra_bytes", "rss_bytes",
  "floor_ms", "floor_percent", "quantized", "reg", "dz", "dcodebook", "dlog_tau", "codes_differ", "near_differ",
    "near_gap", "fma", "exp2",
  "compare", "read", "copy", "processor", "simd", "version", "note" },
    { "section", "shape", "method", "side", "against", "threads", "tau" })

local ceilings = on_gpu and tools.gpu_ceilings(flags.device)
  or tools.ceilings(core.root .. "/kernels/lab", processor.simd, flags.threads)
local function say(...) print((...):format(select(2, ...))) end
say("%s, %s kernels, %d threads", processor.name, processor.simd, flags.threads)
local measured = {}
for _, c in ipairs { { "fma", "GFLOP/s" }, { "tensor", "GFLOP/s" }, { "exp2", "G/s" }, { "compare", "G/s" },
  { "read", "GB/s" }, { "copy", "GB/s" } } do
  if ceilings[c[1]] then measured[#measured + 1] = ("%s %.1f %s"):format(c[1], ceilings[c[1]], c[2]) end
end
say("ceilings of this run: %s", #measured > 0 and table.concat(measured, ", ") or "none measured")

--- Adds a result to the file and shows it as a line; returns it.
local function add(section, shape, method, side, row)
  row.section, row.shape, row.method, row.side = section, shape.name, method, side
  if flags.clock == "processor" then row.note = row.note or "processor time" end
  row.N, row.D, row.M, row.K, row.tau, row.threads, row.processor, row.simd = shape.N, shape.D, shape.M, shape.K,
    shape.tau or flags.tau, flags.threads,
    processor.name, processor.simd
  for name, value in pairs(ceilings) do row[name] = value end
  results:add(row)
  local parts = { ("%-11s %-8s %-15s %-14s"):format(section, shape.name, method, side) }
  if row.ms then parts[#parts + 1] = ("%9.3f ms"):format(row.ms) end
  if row.forward_ms then parts[#parts + 1] = ("(%.3f + %.3f)"):format(row.forward_ms, row.backward_ms) end
  if row.floor_percent then parts[#parts + 1] = ("%.0f %% of the floor"):format(row.floor_percent) end
  if row.ratio then
    parts[#parts + 1] = ("%.2f times %s (%.2f .. %.2f)"):format(row.ratio, row.against, row.ratio_min, row.ratio_max)
  end
  if row.extra_bytes then parts[#parts + 1] = ("extra %.1f MB"):format(row.extra_bytes / 1e6) end
  if row.dz then
    parts[#parts + 1] = ("errors %.0e %.0e %.0e %.0e"):format(row.quantized, row.dz, row.dcodebook, row.dlog_tau)
  end
  if row.codes_differ then
    parts[#parts + 1] = ("%d codes, %d neighbours differ"):format(row.codes_differ, row.near_differ or 0)
  end
  if row.note then parts[#parts + 1] = row.note end
  print(table.concat(parts, "  "))
  io.stdout:flush()
  return row
end

local function times(s, row)
  row = row or {}
  row.rounds, row.forward_ms, row.backward_ms, row.ms, row.ms_min, row.ms_max = s.rounds, s.forward, s.backward,
    s.total, s.least, s.most
  return row
end

--- Puts into b's row how its times compare with a's.
local function compare_times(row, a, b)
  row.against_ms, row.against_ms_min, row.ratio, row.ratio_min, row.ratio_max = a.total, a.least, b.ratio,
    b.ratio_least, b.ratio_most
end

-- -- Our side ---------------------------------------------------------------------------------------------------------

local inputs_of = {}

--- z and codebook of a shape, normal numbers; shape.near: rows near codes; shape.latents: those of a file.
local function vectors(shape)
  if shape.latents then return shape.latents.z, shape.latents.codebook end
  local z, codebook = vx.randn { shape.N, 1, shape.D }, vx.randn { 1, shape.M, shape.D }
  if not shape.near then return z, codebook end
  local index = vx.ops.floor(vx.ops.affine(vx.rand { shape.N }, shape.M, 0)):to "i32"
  local codes = vx.ops.gather(codebook:reshape { shape.M, shape.D }, index):reshape(z:shape())
  return vx.ops.add(codes, vx.ops.affine(z, 0.02, 0)), codebook
end

--- z, codebook, dy, log_tau and dreg of a shape: dy over N as a mean's gradient is.
local function inputs(shape)
  local tau = shape.tau or flags.tau
  local id = ("%dx%dx%d %g %s"):format(shape.N, shape.D, shape.M, tau, tostring(shape.near or shape.latents))
  if inputs_of.id ~= id then
    inputs_of = {}
    collectgarbage()
    vx.seed(1)
    local z, codebook = vectors(shape)
    inputs_of = { id = id, z = z, codebook = codebook,
      dy = vx.ops.affine(vx.randn { shape.N, 1, shape.D }, 1 / shape.N, 0), log_tau = vx.tensor { math.log(tau) },
      dreg = vx.tensor { 1 } }
    inputs_of.file = tools.scratch "inputs"
    local w = core.writer(inputs_of.file)
    for _, name in ipairs { "z", "codebook", "dy", "log_tau" } do w:tensor(inputs_of[name]) end
    w:commit()
  end
  return inputs_of
end

local SEED, STREAM = 1, 1 -- of the Gumbel noise
local smooth = vx.ops.registry.quantize_smooth

--- Waits for what is queued, unless it is only being recorded.
local function finish_device()
  if not core.is_recording() then vx.sync() end
end

--- One forward and backward pass: y, reg, codes, near, gradients and the seconds of both.
local function pass(shape, method)
  local i, facts = inputs(shape), tools.facts(method)
  local ctx = { needs = { true, true, true } }
  local start = clock()
  local y, reg, codes = smooth.forward(ctx, i.z, i.codebook, i.log_tau,
    { sampler = facts.sampler, regularizer = facts.regularizer, k = shape.K, gumbel_tau = 1, shards = 1, seed = SEED,
      stream = STREAM, stats = false })
  finish_device()
  local middle = clock()
  local dz, dcodebook, dlog_tau = smooth.backward(ctx, i.dy, i.dreg)
  finish_device()
  local finish = clock()
  return { y = y, reg = reg, codes = codes, near = ctx.call.near, dz = dz, dcodebook = dcodebook, dlog_tau = dlog_tau },
    middle - start, finish - middle
end

--- A side of tools.pair.
local function ours(shape, method)
  inputs(shape) -- made here, not within a step
  return function()
    local forward, backward
    vx.step(function() forward, backward = select(2, pass(shape, method)) end)
    return forward * 1e3, backward * 1e3
  end
end

--- The same recorded and launched as a whole, a side of tools.pair.
local function ours_in_graph(shape, method)
  inputs(shape)
  local graph = vx.graph(function() return pass(shape, method) end)
  vx.step(graph.replay, graph)
  vx.step(graph.replay, graph) -- recorded
  vx.sync()
  return function()
    local start = core.time()
    graph:replay()
    vx.sync()
    return (core.time() - start) * 1e3, 0
  end, graph
end

--- Bytes beyond inputs and outputs: as the library counts them, and as the system does.
local function our_memory(run)
  collectgarbage()
  collectgarbage()
  vx.memory_flush()
  local before = vx.memory().live
  local resets, resident = tools.reset_resident(), tools.resident()
  vx.reset_peak()
  local kept = vx.step(run)
  local peak, outputs = vx.memory().peak, vx.memory().live - before
  local _, high = tools.resident()
  for _, x in pairs(kept) do x:release() end
  return peak - before - outputs, resets and math.max(0, high - resident - outputs) or nil
end

local function wants_errors(shape)
  return flags.errors == "yes" or flags.errors == "auto" and shape.N * shape.M <= 2 ^ 30
end

--- Puts the errors of a result's file into a row.
local function compare_exactly(row, shape, method, file)
  local facts = tools.facts(method)
  local knn = tools.KNN[facts.regularizer]
  local text = tools.execute(tools.compile(here .. "/float64_check.c"), shape.N, shape.D, shape.M, knn and shape.K or 0,
    SAMPLERS[facts.sampler] or METRICS[facts.metric], REGULARIZERS[facts.regularizer] or -1, SEED, STREAM,
    inputs(shape).file, file)
  for name, value in text:gmatch "(%w[%w_]*) (%S+)" do
    local column = name == "gap" and "near_gap" or (name == "codes" or name == "near") and name .. "_differ" or name
    if column ~= "near_differ" or knn then row[column] = tonumber(value) end
  end
end

local function our_errors(row, shape, method)
  if not wants_errors(shape) then return end
  local file = tools.scratch "ours"
  vx.step(function()
    local r = pass(shape, method)
    local w = core.writer(file)
    for _, x in ipairs { r.y, r.dz, r.dcodebook, r.dlog_tau, r.reg } do w:tensor(x) end
    if r.near then w:tensor(r.near) end
    w:tensor(r.codes)
    w:commit()
  end)
  compare_exactly(row, shape, method, file)
end

-- -- PyTorch's side ---------------------------------------------------------------------------------------------------

--- The environment of a worker: the same threads; tuned: large arrays in huge pages that are kept for the next step
-- (torch_allocator.c), since fresh ones cost a fault each, and glibc keeps the rest.
local function environment()
  local threads = ("OMP_NUM_THREADS=%d MKL_NUM_THREADS=%d"):format(flags.threads, flags.threads)
  if flags.environment == "stock" or on_gpu then return threads end
  return threads .. " GLIBC_TUNABLES=glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=1073741824"
    .. " LD_PRELOAD=" .. tools.compile(here .. "/torch_allocator.c", nil, true)
end

--- Pairs of our runs with a worker's: adds the worker's row and returns it. `own` is our side of the pair.
local function against_torch(section, shape, method, baseline, own)
  local row, side, facts = { against = "vertex" }, "torch " .. baseline, tools.facts(method)
  local whole = shape.N * shape.M * 4 -- one array of every row with every code
  local blocks = baseline == "chunk" or baseline == "filter"
  if not blocks and whole > memory_limit then
    row.note = ("not run: one N x M array is %.1f GB of the %.1f allowed"):format(whole / 1e9, memory_limit / 1e9)
    return add(section, shape, method, side, row)
  end
  local result = tools.scratch "torch"
  local worker, reason = tools.worker(flags.python, here .. "/quantizer.py",
    { baseline, facts.sampler or "nearest", facts.regularizer or facts.metric, shape.N, shape.D, shape.M, shape.K,
      flags.threads, inputs(shape).file, result, flags.device },
    { environment = environment(), memory = not on_gpu and memory_limit or nil })
  if not worker then
    row.note = "did not start: " .. reason
    return add(section, shape, method, side, row)
  end
  row.version = "torch " .. worker.version .. (on_gpu and "" or " " .. flags.environment)
  worker:ask "run" -- pages, and compilation: several times what a step takes; `pair` warms up once more
  local a, b = tools.pair(limits, own, function()
    local forward, backward = (worker:ask "run" or ""):match "(%S+) (%S+)"
    return tonumber(forward), tonumber(backward)
  end)
  if b then
    times(b, row)
    compare_times(row, a, b)
    local outputs = not facts.sampler and 8 * shape.N or 4 * (2 * shape.N + shape.M) * shape.D
    row.extra_bytes = math.max(0, tonumber(worker:ask "memory") - outputs)
    if (not facts.sampler or facts.sampler == "softmax") and wants_errors(shape) then -- torch's noise is another
      worker:ask "save"
      compare_exactly(row, shape, method, result)
      if blocks and facts.sampler then row.codes_differ = nil end -- they do not compute them
    end
  else
    row.note = ("ends: out of memory (%.1f GB allowed; one N x M array is %.1f GB)"):format(memory_limit / 1e9,
      whole / 1e9)
  end
  worker:close()
  return add(section, shape, method, side, row)
end

--- Pairs of our runs with those of another build (--against): adds its row.
local function against_build(section, shape, method, own)
  if not flags.against or on_gpu then return end
  local root, facts = flags.against:match "^(.*)/build/[^/]+$", tools.facts(method)
  if not root then exit_with("--against %s: expected CHECKOUT/build/libvertex.so", flags.against) end
  local row = { against = "vertex" }
  local worker, reason = tools.worker("luajit", here .. "/other_build.lua",
    { root, facts.sampler or "nearest", facts.regularizer or facts.metric, shape.N, shape.D, shape.M, shape.K,
      flags.threads, inputs(shape).file, flags.clock }, { environment = "VERTEX_LIB=" .. flags.against })
  if not worker then exit_with("--against %s: %s", flags.against, reason) end
  local a, b = tools.pair(limits, own, function()
    local forward, backward = (worker:ask "run" or ""):match "(%S+) (%S+)"
    return tonumber(forward), tonumber(backward)
  end)
  worker:close()
  if not b then exit_with("--against %s: it ended in the middle of a run", flags.against) end
  times(b, row)
  compare_times(row, a, b)
  row.version = worker.version
  add(section, shape, method, "build " .. tools.revision(root), row)
end

--- Pairs of our runs with nearest.py's: adds its row.
local function against_kmeans(section, shape, method, baseline, own)
  local row, result = { against = "vertex" }, tools.scratch "nearest"
  local worker, reason = tools.worker(flags.python, here .. "/nearest.py",
    { baseline, method, shape.N, shape.D, shape.M, flags.threads, inputs(shape).file, result, flags.clock }, {})
  if not worker then
    row.note = "did not start: " .. reason
    return add(section, shape, method, baseline, row)
  end
  local a, b = tools.pair(limits, own, function()
    local forward, backward = (worker:ask "run" or ""):match "(%S+) (%S+)"
    return tonumber(forward), tonumber(backward)
  end)
  row.version = baseline .. " " .. worker.version
  if b then
    times(b, row)
    compare_times(row, a, b)
    row.extra_bytes = math.max(0, tonumber(worker:ask "memory") - 4 * shape.N)
    if wants_errors(shape) and worker:ask "save" then compare_exactly(row, shape, method, result) end
  else
    row.note = "ended in the middle of a run"
  end
  worker:close()
  add(section, shape, method, baseline, row)
end

-- -- Sections ---------------------------------------------------------------------------------------------------------

--- Our own row of a smoothed method, with floor, memory and errors; s: its summary.
local function add_ours(section, shape, method, s)
  local row = times(s)
  row.floor_ms = section ~= "late" and tools.floor_ms(shape, tools.facts(method), ceilings) or nil -- of all pairs
  row.floor_percent = row.floor_ms and 100 * row.floor_ms / row.ms
  row.extra_bytes, row.rss_bytes = our_memory(function()
    local r = pass(shape, method)
    return { r.y, r.dz, r.dcodebook, r.dlog_tau }
  end)
  our_errors(row, shape, method)
  add(section, shape, method, "vertex", row)
end

local run = {}

function run.op()
  for _, shape in ipairs(shapes "S,M,B,C,W") do
    for _, method in ipairs(methods) do
      add_ours("op", shape, method, (tools.pair(limits, ours(shape, method))))
      if on_gpu and core.can(vx.device(), "graphs") then
        local side, graph = ours_in_graph(shape, method)
        local row = times((tools.pair(limits, side)))
        row.forward_ms, row.backward_ms, row.floor_ms = nil, nil, tools.floor_ms(shape, tools.facts(method), ceilings)
        row.floor_percent = row.floor_ms and 100 * row.floor_ms / row.ms
        add("op", shape, method, "vertex graph", row)
        graph:release()
      end
      against_build("op", shape, method, ours(shape, method))
      for _, baseline in ipairs(chosen(SMOOTH_BASELINES)) do
        local facts = tools.facts(method)
        local fits = baseline == "naive" or baseline == "compile" or facts.sampler == "softmax" and
          (tools.KNN[facts.regularizer] or baseline == "filter" and facts.regularizer == "none")
        if fits then against_torch("op", shape, method, baseline, ours(shape, method)) end
      end
    end
  end
end

--- Pairs of two of our methods: adds a row for `method` with its ratio to `other`.
local function against_method(section, shape, other, method)
  local a, b = tools.pair(limits, ours(shape, other), ours(shape, method))
  local row = times(b, { against = other })
  compare_times(row, a, b)
  row.floor_ms = tools.floor_ms(shape, tools.facts(method), ceilings)
  row.floor_percent = row.floor_ms and 100 * row.floor_ms / row.ms
  add(section, shape, method, "vertex", row)
end

function run.regularizer()
  for _, shape in ipairs(shapes "B,C") do
    for _, regularizer in ipairs { "knn-ce", "knn-l2", "ppl" } do
      against_method("regularizer", shape, method_of.softmax.none, method_of.softmax[regularizer])
    end
  end
end

function run.gumbel()
  local seen = {}
  for _, shape in ipairs(shapes "B,C") do
    for _, method in ipairs(methods) do
      local regularizer = tools.facts(method).regularizer
      local id = shape.name .. regularizer
      for _, sampler in ipairs(seen[id] and {} or { "sgumbel", "hgumbel" }) do
        against_method("gumbel", shape, method_of.softmax[regularizer], method_of[sampler][regularizer])
      end
      seen[id] = true
    end
  end
end

--- The nearest codes of a shape's rows, by both metrics, and all sides that were asked for.
local function assign(section, shape)
  for _, metric in ipairs { "euclid", "cosine" } do
    local i = inputs(shape)
    local function own()
      local start = clock()
      vx.step(function()
        vx.ops.assign(i.z, i.codebook, metric)
        finish_device()
      end)
      return (clock() - start) * 1e3, 0
    end
    local row = times((tools.pair(limits, own)))
    row.floor_ms = section ~= "late" and tools.floor_ms(shape, tools.facts(metric), ceilings) or nil
    row.floor_percent = row.floor_ms and 100 * row.floor_ms / row.ms
    row.extra_bytes, row.rss_bytes = our_memory(function() return { vx.ops.assign(i.z, i.codebook, metric) } end)
    if wants_errors(shape) then
      local file = tools.scratch "ours"
      vx.step(function()
        local w = core.writer(file)
        w:tensor(vx.ops.assign(i.z, i.codebook, metric))
        w:commit()
      end)
      compare_exactly(row, shape, metric, file)
    end
    add(section, shape, metric, "vertex", row)
    against_build(section, shape, metric, own)
    for _, baseline in ipairs(chosen(NEAREST_BASELINES)) do against_torch(section, shape, metric, baseline, own) end
    for _, baseline in ipairs(chosen(KMEANS_BASELINES, {})) do against_kmeans(section, shape, metric, baseline, own) end
  end
end

function run.assign()
  for _, shape in ipairs(shapes "S,M,B,C,W") do assign("assign", shape) end
end

function run.late()
  local list = latents and { latents } or shapes "65536x3x8192x8"
  for _, shape in ipairs(list) do
    shape.near = not shape.latents
    for _, tau in ipairs(shape.latents and { shape.tau } or words(flags.taus)) do
      shape.tau = tonumber(tau) or exit_with("--taus: '%s' is no number", tau)
      for _, method in ipairs(methods) do
        add_ours("late", shape, method, (tools.pair(limits, ours(shape, method))))
        against_build("late", shape, method, ours(shape, method))
      end
    end
    assign("late", shape)
  end
end

--- The sweep's row of a side at the next smaller codebook, of this run or of one before.
local function row_before(side, shape)
  local found
  for _, r in ipairs(results.rows) do
    local same = r.section == "sweep" and r.side == side and r.D == shape.D and r.threads == flags.threads
      and r.tau == flags.tau
    if same and r.M < shape.M and (not found or r.M > found.M) then found = r end
  end
  return found
end

function run.sweep()
  local method = "softmax-knn-ce"
  for _, D in ipairs(words(flags.dims)) do
    for _, text in ipairs(words(flags.codes or "1024,2048,4096,8192,16384,32768,65536")) do
      local M = tonumber(text) or exit_with("--codes: '%s' is no number", text)
      local shape = shape_of(("%dx%dx%dx8"):format(8 * M, D, M))
      add_ours("sweep", shape, method, (tools.pair(limits, ours(shape, method))))
      for _, baseline in ipairs(chosen(SMOOTH_BASELINES, { "naive", "filter" })) do
        local before = row_before("torch " .. baseline, shape)
        local growth = before and before.ms and (M / before.M) ^ 2 -- N grows with M
        local seconds, bytes = growth and before.ms * 1e-3 * growth, growth and before.extra_bytes * growth
        local whole = baseline ~= "chunk" and baseline ~= "filter"
        if whole and bytes and bytes > memory_limit then
          add("sweep", shape, method, "torch " .. baseline, { against = "vertex",
            note = ("not run: would take about %.0f GB of memory, of %.1f allowed"):format(bytes / 1e9,
              memory_limit / 1e9) })
        elseif seconds and seconds > flags.limit then
          add("sweep", shape, method, "torch " .. baseline, { against = "vertex",
            note = ("not run: would take about %.0f s, of %g allowed"):format(seconds, flags.limit) })
        elseif not before or before.ms then
          against_torch("sweep", shape, method, baseline, ours(shape, method))
        end
      end
    end
  end
end

function run.large()
  local shape = shape_of "524288x3x65536x8"
  add_ours("large", shape, "softmax-knn-ce", (tools.pair(limits, ours(shape, "softmax-knn-ce"))))
end

for _, section in ipairs(sections) do run[section]() end
require "quantizer_tables"(results, path, processor)
say("%s.csv, .txt and .png", path)
