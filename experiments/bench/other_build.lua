--- Another build of Vertex, of this source or of an older one: what quantizer.lua --against times itself against.
--
--   VERTEX_LIB=LIB luajit other_build.lua ROOT SAMPLER REGULARIZER N D M K THREADS INPUTS CLOCK
--   VERTEX_LIB=LIB luajit other_build.lua ROOT nearest METRIC N D M K THREADS INPUTS CLOCK
--
-- ROOT is the checkout that LIB was built from, since library and Lua files belong together. A worker like
-- quantizer.py: it prints "ready VERSION", and answers each line "run" with "FORWARD BACKWARD" in milliseconds.

local root, sampler, regularizer = arg[1], arg[2], arg[3]

local function main()
  package.path = ("%s/lua/?.lua;%s/lua/?/init.lua;"):format(root, root) .. package.path
  local vx = require "vertex"
  local core = require "vertex.core"
  local N, D, M, K, threads, path = tonumber(arg[4]), tonumber(arg[5]), tonumber(arg[6]), tonumber(arg[7]),
    tonumber(arg[8]), arg[9]
  local clock = arg[10] == "processor" and os.clock or core.time -- seconds
  vx.device "cpu"
  vx.threads(threads)

  local offset = 0
  local function read(...)
    local x = vx.empty { ... }
    if core.read_tensor then core.read_tensor(x, path, offset, "F32") -- its name until readers came
    else core.reading(path, function(file) file:tensor(x, offset, "F32") end) end
    offset = offset + 4 * x:numel()
    return x
  end
  local z, codebook, dy, log_tau = read(N, 1, D), read(1, M, D), read(N, 1, D), read(1)
  local dreg = vx.tensor { 1 }

  local function run()
    local start = clock()
    if sampler == "nearest" then
      vx.ops.assign(z, codebook, regularizer)
      return clock() - start, 0
    end
    local ctx, smooth = { needs = { true, true, true } }, vx.ops.registry.quantize_smooth
    smooth.forward(ctx, z, codebook, log_tau, { sampler = sampler, regularizer = regularizer, k = K, gumbel_tau = 1,
      shards = 1, seed = 1, stream = 1, stats = false })
    local middle = clock()
    smooth.backward(ctx, dy, dreg)
    return middle - start, clock() - middle
  end

  print("ready " .. vx.version)
  io.stdout:flush()
  for line in io.lines() do
    if line == "run" then
      local forward, backward
      vx.step(function() forward, backward = run() end)
      print(("%.4f %.4f"):format(forward * 1e3, backward * 1e3))
      io.stdout:flush()
    end
  end
end

local ok, why = pcall(main)
if not ok then
  io.stderr:write((tostring(why):gsub("%s+", " ")), "\n") -- one line: quantizer.lua shows the last
  os.exit(1)
end
