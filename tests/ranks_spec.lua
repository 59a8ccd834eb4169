-- Several ranks (core/comm, vx.dist): sums to the bit, gradients in buckets, what is said where ranks or launchers do
-- not fit together. What is tagged starts its own mpirun; the rest runs in every busted.

local H = require "tests.helper"
local lfs = require "lfs"
local mpirun = require "tests.mpirun"
local vx = require "vertex"

local scratch

--- Runs a command as n ranks.
local function ranks(n, command, environment) return mpirun.run(scratch, n, command, environment) end

local count = 0
--- Writes Lua text to a file that finds the project's modules; gives the command that runs it.
local function script(text)
  count = count + 1
  local path = H.write(("%s/script%d.lua"):format(scratch, count), ([[
    package.path = "%s/lua/?.lua;%s/lua/?/init.lua;" .. package.path
    local vx = require "vertex"
    local device = os.getenv "VERTEX_TEST_DEVICE" or "cpu"
    if device ~= "any" then vx.device(device) end
    local dist, lines = vx.dist, {}
    local function say(text, ...) io.write("<", dist.rank(), "> ", text:format(...), "\n") io.flush() end
  ]]):format(H.root, H.root):gsub("\n%s*", " ") .. text)
  return "luajit '" .. path .. "'"
end

--- The lines that say() wrote, by rank (from 0) and text.
local function said(output)
  local lines = {}
  for rank, text in output:gmatch "<(%d+)> ([^\r\n]*)" do
    rank = tonumber(rank)
    lines[rank] = lines[rank] or {}
    table.insert(lines[rank], text)
  end
  return lines
end

--- Fails unless every one of n ranks said these lines, and the job ended well.
local function expect_all(n, expected, output, status)
  assert.equal(0, status, output)
  local lines = said(output)
  for r = 0, n - 1 do assert.same(expected, lines[r], output) end
end

setup(function()
  scratch = H.scratch "ranks"
  assert(lfs.mkdir(scratch))
end)

describe("one rank", function()
  it("has verbs that do what they do for one", function()
    local dist = vx.dist
    assert.equal(0, dist.rank())
    assert.equal(1, dist.size())
    assert.equal("self", dist.name())
    assert.equal(nil, dist.about())
    local x = vx.tensor { 1, 2 }
    assert.same({ 0.5, 1 }, dist.all_reduce(x, 0.5):totable())
    assert.same({ { 0.5, 1 } }, dist.all_gather(x):totable())
    assert.same({ 0.5, 1 }, dist.broadcast(x):totable())
    assert.same({ 3, 4 }, dist.sum { 3, 4 })
    assert.same({ { 3 } }, dist.gather { 3 })
    assert.same({ ("a text"):rep(1e5) }, dist.gather_text(("a text"):rep(1e5)))
    assert.equal(7, dist.seed(7))
    dist.barrier()
    dist.abort(3)
    local w = vx.ones({ 2 }, { requires_grad = true })
    dist.gradients({ w }):backward((w * 3):sum())
    assert.same({ 3, 3 }, w.grad:totable())
    dist.gradients({ w }):backward(nil)
  end)

  it("refuses what is no tensor of the right kind", function()
    H.raises(function() vx.dist.all_reduce(3) end, "all_reduce: x is 3, expected a tensor")
    H.raises(function() vx.dist.all_reduce(vx.zeros({ 2 }, { dtype = "u8" })) end, "x is u8, expected f32 or i32")
    H.raises(function() vx.dist.all_reduce(vx.zeros({ 2 }, { dtype = "i32" }), 0.5) end, "scale 0.5 of i32")
    H.raises(function() vx.dist.all_reduce(vx.zeros({ 2, 3 }):transpose(1, 2)) end, "strided view")
    H.raises(function() vx.dist.broadcast(vx.zeros { 2 }, 1) end, "root 1, of 0 .. 0")
    local z = vx.ones({ 2 }, { requires_grad = true }) * 2
    H.raises(function() vx.dist.all_reduce(z) end, "all_reduce: ", "gradients flow through", "x:detach()")
    H.raises(function() vx.dist.broadcast(z) end, "broadcast: ", "gradients flow through")
    H.raises(function() vx.dist.gradients { vx.zeros { 2 } } end, "parameter 1 is none")
  end)

  it("opens NCCL where it is asked to, and is told that there is no GPU", function()
    local folder = H.root .. "/build"
    local nccl, emulator = H.read(folder .. "/libvertex_nccl.so"), H.read(folder .. "/libvertex_emu.so")
    if not nccl or not emulator then return pending "no build/libvertex_nccl.so: NCCL was not found" end
    -- the emulator under the name of the real thing: its memory is no GPU's, which NCCL has to find out
    lfs.mkdir(scratch .. "/nccl")
    H.write(scratch .. "/nccl/libvertex_cuda.so", emulator)
    H.write(scratch .. "/nccl/libvertex_nccl.so", nccl)
    local command = "%s CUDA_VISIBLE_DEVICES= VERTEX_NCCL=1 VERTEX_BACKENDS='%s/nccl' VERTEX_TEST_DEVICE=cuda:0 %s"
    local output = H.shell(command:format(mpirun.clean, scratch, script [[
        local ok, message = pcall(dist.all_reduce, vx.ones { 4 })
        io.write(tostring(message))
      ]]))
    assert.truthy(output:find("nccl: CUDA says: ", 1, true), output)
  end)

  it("reduces and gathers over NCCL, of one rank #cuda", function()
    if not H.read(H.root .. "/build/libvertex_nccl.so") then return pending "no build/libvertex_nccl.so" end
    local output = H.shell(("%s VERTEX_NCCL=1 VERTEX_TEST_DEVICE=cuda:0 %s"):format(mpirun.clean, script [[
      local x = dist.all_reduce(vx.full({ 3000 }, 3), 0.5)
      say("%g %s", x:mean():item(), dist.name())
      say("%g %g", dist.all_gather(x):sum():item(), dist.broadcast(x):sum():item())
      dist.close()
    ]]))
    assert.truthy(output:find "<0> 1.5 self, nccl 2", output)
    assert.truthy(output:find("<0> 4500 4500", 1, true), output)
  end)

  it("is told what a launcher lacks", function()
    local alone = script "local ok, message = pcall(dist.size) io.write(tostring(message))"
    local function started(environment)
      return (H.shell(("%s VERTEX_LIB='%s/libvertex.so' %s %s"):format(mpirun.clean, scratch, environment, alone)))
    end
    H.write(scratch .. "/libvertex.so", H.read(os.getenv "VERTEX_LIB" or H.root .. "/build/libvertex.so"))
    local output = started "OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1"
    assert.truthy(output:find("mpirun of Open MPI started 2 ranks, which need libvertex_mpi.so (apt-get install", 1,
      true), output)
    assert.truthy(output:find("there is no " .. scratch .. "/libvertex_mpi.so", 1, true), output)
    output = started "SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=2"
    assert.truthy(output:find("srun started 4 tasks, but none of them knows of the others", 1, true), output)
    output = started "OMPI_COMM_WORLD_SIZE=1 OMPI_COMM_WORLD_RANK=0" -- mpirun -np 1 needs nothing
    assert.equal("1", output)
  end)
end)

describe("ranks #ranks", function()
  local ranked = mpirun.needed(it, pending)

  -- element i of rank r, and its sum over n ranks in their order, rounded once
  local FORMULA = [[
    local function part(r, i) return math.sin(i * 12.9898 + r * 78.233) * 10 ^ (i % 7 - 3) end
    local function sum(n, i)
      local total = 0
      for r = 0, n - 1 do total = total + vx.tensor({ part(r, i) })[1]:item() end
      return total
    end
  ]]

  ranked("sum in the order of the ranks, in double, whatever the length", function()
    local run = script(FORMULA .. [[
      local n = dist.size()
      for _, length in ipairs { 1, 7, 1024, 1025, 4099 } do
        local mine, sums = {}, {}
        for i = 1, length do mine[i], sums[i] = part(dist.rank(), i), sum(n, i) end
        local x = dist.all_reduce(vx.tensor(mine), 0.25)
        for i = 1, length do sums[i] = 0.25 * sums[i] end
        say("%d %s", length, x:bytes() == vx.tensor(sums):bytes())
      end
      local odd = vx.zeros { 2000 }
      if dist.rank() == 1 then odd[1500]:fill(0 / 0) end
      local total = dist.all_reduce(odd)
      say("%s %s", total[1500]:item() ~= total[1500]:item(), total[1499]:item())
      dist.close()
    ]])
    for n = 2, 4 do
      local expected = { "1 true", "7 true", "1024 true", "1025 true", "4099 true", "true 0" }
      expect_all(n, expected, ranks(n, run))
    end
  end)

  ranked("gather, broadcast and count exactly", function()
    expect_all(3, { "0:1:2:", "5", "6 3", "2147483645", "beyond int32", "rank 0, rank 1 and, rank 2 and and", "9 3" },
      ranks(3, script [[
      local r = dist.rank()
      local text = ""
      local all = dist.all_gather(vx.full({ 1200 }, r, { dtype = "u8" })):totable()
      for _, v in ipairs(all) do text = text .. v[7] .. ":" end
      say(text)
      say("%d", dist.broadcast(vx.full({ 3 }, r + 3), 2)[3]:item())
      say("%d %d", unpack(dist.sum { r + 1, 1 }))
      local big = vx.tensor({ r == 0 and 715827881 or 715827882, 3 }, { dtype = "i32" })
      say("%d", dist.all_reduce(big)[1]:item())
      local ok, message = pcall(dist.all_reduce, vx.tensor({ 2 ^ 30, 0 }, { dtype = "i32" }))
      say(not ok and message:match "beyond int32" or message)
      say(table.concat(dist.gather_text("rank " .. r .. (" and"):rep(r)), ", "))
      local long = dist.gather_text(("long"):rep(5000 * (r + 1))) -- more bytes than a Lua call takes arguments
      local n = dist.size()
      assert(long[1] == ("long"):rep(5000) and #long[n] == 20000 * n)
      local many = {}
      for i = 1, 20000 do many[i] = i * (r + 1) end
      assert(dist.sum(many)[20000] == 20000 * n * (n + 1) / 2 and #dist.sum(many) == 20000)
      say("%d %d", dist.sum { 3 }[1], #dist.gather { r })
      dist.close()
    ]]))
  end)

  ranked("average gradients in buckets, while backward runs", function()
    local run = script [[
      local r, n = dist.rank(), dist.size()
      local function parameter(size) return vx.randn({ size, 3 }, { requires_grad = true }) end
      vx.seed(5)
      local p = {}
      for i = 1, 6 do p[i] = parameter(100 * i) end
      local function loss(r)
        local sum = (p[1] * (r + 1)):sum() + (p[2] * p[2]):sum() * (r + 2) + p[3]:sum()
        sum = sum + (p[1] * p[3]:narrow(1, 1, 100)):sum()
        if r == 1 then sum = sum + (p[4] * 7):sum() end -- on one rank alone
        if r ~= 0 then sum = sum + (p[5] * r):sum() end
        return sum
      end
      local expected, missing = {}, {}
      for rank = 0, n - 1 do
        for i = 1, 6 do p[i]:zero_grad() end
        loss(rank):backward()
        for i = 1, 6 do
          if p[i].grad then
            local g = p[i].grad:to "f32" * 1
            expected[i] = expected[i] and expected[i] + g or g
          end
        end
      end
      for _, bucket in ipairs { 1, 1000, 2 ^ 18 } do
        local gradients = dist.gradients(p, { bucket = bucket })
        for pass = 1, 2 do
          for i = 1, 6 do p[i]:zero_grad() end
          gradients:backward(loss(r))
          local worst = 0
          for i = 1, 5 do worst = math.max(worst, (p[i].grad - expected[i] / n):abs():max():item()) end
          say("%d %s %s", #gradients.buckets, worst < 1e-5, p[6].grad)
        end
      end
      dist.expect_same({ p[1].grad, p[2].grad, p[3].grad, p[4].grad, p[5].grad }, "gradients")
      -- how many buckets are on their way when backward is over
      local core, begun, at_end = require "vertex.core", 0, nil
      local begin, gradients, mine = core.rank_begin, dist.gradients({ p[1], p[2], p[3] }, { bucket = 1 }), loss(r)
      core.rank_begin = function(...)
        begun = begun + 1
        return begin(...)
      end
      rawset(mine, "backward", function(self)
        vx.Tensor.backward(self)
        at_end = begun
      end)
      for i = 1, 6 do p[i]:zero_grad() end
      gradients:backward(mine)
      say("%d of %d", at_end, begun)
      dist.close()
    ]]
    for n = 2, 3 do
      expect_all(n, { "6 true nil", "6 true nil", "5 true nil", "5 true nil", "1 true nil", "1 true nil", "3 of 3" },
        ranks(n, run))
    end
  end)

  ranked("read gradients of the pass before as they were, where losses do", function()
    expect_all(2, { "6 12 6", "12 6 12", "6 12 6" }, ranks(2, script [[
      local w, v = vx.ones({ 3 }, { requires_grad = true }), vx.ones({ 2, 3 }, { requires_grad = true })
      local gradients = dist.gradients { w, v }
      gradients:backward((w * w * 3):sum())
      for pass = 1, 3 do
        local before = w.grad
        w:zero_grad()
        v:zero_grad()
        local read = (v * before):sum() -- backward comes to w before it comes to this
        gradients:backward(read + (w * (pass == 2 and 6 or 12)):sum())
        say("%g %g %g", v.grad[2][3]:item(), w.grad[1]:item(), before[1]:item())
      end
      dist.close()
    ]]))
  end)

  ranked("move the memory of a device by way of the host, also several on one device", function()
    local folder = H.root .. "/build"
    if not H.read(folder .. "/libvertex_emu.so") then return pending "no emulator in build/" end
    expect_all(2, { "emu:0", "3 3", "0 1", "1", "1.5 1.5 emu:0" }, ranks(2, script [[
      local r = dist.rank()
      say(vx.device())
      local x = dist.all_reduce(vx.full({ 1500 }, r + 1))
      say("%d %d", x[1]:item(), x[1500]:item())
      local all = dist.all_gather(vx.full({ 2 }, r))
      say("%d %d", all[1][2]:item(), all[2][1]:item())
      say("%d", dist.broadcast(vx.full({ 2 }, r), 1)[2]:item())
      local w = vx.ones({ 2000 }, { requires_grad = true })
      dist.gradients({ w }):backward((w * (r + 1)):sum())
      say("%g %g %s", w.grad[1]:item(), w.grad[2000]:item(), w.grad:device())
      dist.close()
    ]], "VERTEX_TEST_DEVICE=emu:0"))
  end)

  ranked("share a card by way of the host #cuda", function()
    expect_all(2, { "3 3 cuda:0" }, ranks(2, script [[
      local x = dist.all_reduce(vx.full({ 3000 }, dist.rank() + 1))
      say("%g %g %s", x[1]:item(), x[3000]:item(), x:device())
      dist.close()
    ]], "VERTEX_TEST_DEVICE=cuda:0"))
  end)

  ranked("take a GPU each, and say so where there are too few", function()
    local emulator = H.read(H.root .. "/build/libvertex_emu.so")
    if not emulator then return pending "no emulator in build/" end
    lfs.mkdir(scratch .. "/gpus")
    H.write(scratch .. "/gpus/libvertex_cuda.so", emulator)
    local environment = ("VERTEX_TEST_DEVICE=any VERTEX_BACKENDS='%s/gpus' VERTEX_EMU_DEVICES="):format(scratch)
    local run = script [[
      local ok, message = pcall(dist.rank)
      if not ok then
        io.write(message, "\n")
        os.exit(2, true)
      end
      say(vx.device())
      dist.close()
    ]]
    local output, status = ranks(2, run, environment .. "2")
    assert.equal(0, status, output)
    assert.same({ [0] = { "cuda:0" }, { "cuda:1" } }, said(output))
    output, status = ranks(2, run, environment .. "1")
    assert.equal(2, status, output)
    assert.truthy(output:find("2 ranks on a machine with 1 GPU, expected at most one for each", 1, true), output)
  end)

  ranked("say which rank does not come, or does something else", function()
    local began = os.time()
    local output, status = ranks(3, script [[
      if dist.rank() == 2 then dist.barrier() while true do end end
      dist.barrier()
      local ok, message = pcall(dist.all_reduce, vx.zeros { 3 })
      say(message)
      dist.abort(7)
    ]], "VERTEX_RANK_TIMEOUT=1")
    assert.equal(7, status, output)
    assert.truthy(output:find("all_reduce: rank [12] did not come within 1 s") or output:find "rank [012], 2 did not",
      output)
    assert.truthy(os.time() - began < 15)
    output, status = ranks(2, script [[
      local ok, message = pcall(dist.all_reduce, vx.zeros { dist.rank() == 0 and 3 or 2 })
      say(message)
      dist.abort(8)
    ]], "VERTEX_RANK_TIMEOUT=5")
    assert.equal(8, status, output)
    assert.truthy(output:find("rank 1 sent 8 bytes where rank 0 expects 12: the ranks do not do the same", 1, true)
      or output:find("rank 0 sent more bytes where rank 1 expects 8", 1, true), output)
    output, status = ranks(2, script "dist.rank() error 'broken'")
    assert.equal(1, status, output)
    assert.truthy(output:find("broken", 1, true), output)
  end)

  ranked("are told of a launcher of another MPI", function()
    local output = H.shell(("%s PMI_SIZE=2 PMI_RANK=0 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 %s")
      :format(mpirun.clean, script "local ok, message = pcall(dist.size) io.write(tostring(message))"))
    assert.truthy(output:find("started 2 ranks, but libvertex_mpi.so is built with mpi (Open MPI", 1, true), output)
    assert.truthy(output:find("which knows of 1", 1, true), output)
  end)

  ranked("choose neighbours among all ranks' rows, exactly", function()
    local run = script [[
      local N, G, D, M = 48, 2, 4, 20
      local r, R = dist.rank(), dist.size()
      local own = N / R
      local function numbers(shape, seed) return vx.randn(shape, { generator = vx.generator(seed) }) end
      local function part(x) return x:narrow(1, r * own + 1, own):contiguous() end
      local function leaf(x)
        local y = x:clone()
        y.requires_grad = true
        return y
      end
      local function near(a, b, relative)
        return (a - b):square():sum():item() ^ 0.5 <= relative * b:square():sum():item() ^ 0.5
      end
      local z, cotangent, gumbel = numbers({ N, G * D }, 1), numbers({ N, G * D }, 2), numbers({ N, G, M }, 3)
      for _, case in ipairs { { "softmax-knn-ce" }, { "softmax-knn-l2" }, { "softmax-knn-ce", k = 20 },
        { "sgumbel-knn-l2", vertices = 7, tau = 0.5 }, { "softmax-ppl" } } do
        local method, options = case[1], { dim = G * D, groups = G, codes = M, k = case.k or 5, seed = 3,
          vertices = case.vertices, tau = case.tau }
        -- every process for itself: one rank with all rows
        dist.size = function() return 1 end
        local q, x = vx.quantizer(method, options), leaf(z)
        local o = q(x, { gumbel = gumbel })
        local loss = (o.quantized * cotangent):sum() / N + o.reg
        loss:backward()
        dist.size = function() return R end
        options.scope = "world"
        local w, y = vx.quantizer(method, options), leaf(part(z))
        local gradients = dist.gradients(w:parameters())
        local p = w(y, { gumbel = part(gumbel) })
        gradients:backward((p.quantized * part(cotangent)):sum() / own + p.reg)
        say("%s %s %s %s %s %s", method, p.codes:bytes() == part(o.codes:to "f32"):to("i32"):bytes(),
          near(p.reg, o.reg, 1e-6), near(y.grad / R, part(x.grad), 1e-5),
          near(w.codebook.grad, q.codebook.grad, 1e-5), near(w.log_tau.grad, q.log_tau.grad, 1e-4))
      end
      dist.close()
    ]]
    local expected = {}
    for i, name in ipairs { "softmax-knn-ce", "softmax-knn-l2", "softmax-knn-ce", "sgumbel-knn-l2", "softmax-ppl" } do
      expected[i] = name .. " true true true true true"
    end
    for n = 2, 3 do expect_all(n, expected, ranks(n, run)) end
    if H.read(H.root .. "/build/libvertex_emu.so") then
      expect_all(2, expected, ranks(2, run, "VERTEX_TEST_DEVICE=emu:0"))
    end
  end)

  ranked("give each rank its share of K, as the paper's GPUs have", function()
    expect_all(2, { "true true", "k 5 does not divide among 2 ranks" }, ranks(2, script [[
      local r = dist.rank()
      local z = vx.randn({ 40, 6 }, { generator = vx.generator(1) })
      local options = { dim = 6, codes = 12, k = 4, seed = 3 }
      local function total(scope, shards, rows)
        options.scope, options.shards = scope, shards
        return vx.quantizer("softmax-knn-ce", options)(rows).reg:detach()
      end
      local mine = dist.all_reduce(total("rank", 1, z:narrow(1, r * 20 + 1, 20):contiguous()), 0.5)
      local size = dist.size
      dist.size = function() return 1 end
      local shards = total("rank", 2, z)
      dist.size = size
      say("%s %s", math.abs(mine:item() - shards:item()) < 1e-6, mine:item() > 0)
      options.k = 5
      local ok, message = pcall(total, "rank", 1, z)
      say(message:match "k 5 does not divide among 2 ranks" or message)
      dist.close()
    ]]))
  end)
end)
