-- What only the emulator of tests/cuda_emulator can show of the CUDA backend: several devices, memory that runs out,
-- errors of every runtime call, old drivers; and backend libraries that are none, stale or not built right.

local H = require "tests.helper"
local cases = require "tests.device_cases"
local vx = H.vx
local core = require "vertex.core"
local build, setenv, with = cases.build, cases.setenv, cases.with

describe("the CUDA emulator", function()
  it("passes its self-test, for several orders of execution", function()
    for seed = 1, 5 do
      local out, status = H.shell(("LD_PRELOAD= VERTEX_EMU_SEED=%d '%s/emulator_selftest'"):format(seed, build))
      assert.equal(0, status, out)
      for _, name in ipairs { "bf16 products", "tf32 products", "missing barriers", "divergence", "addresses",
        "asynchrony", "graphs" } do
        assert.is_truthy(out:find("ok " .. name, 1, true), out)
      end
    end
  end)

  it("has several devices, whose tensors do not mix, and copies between them", function()
    local a, b = vx.ones({ 3, 4 }, { device = "emu:0" }), vx.ones({ 3, 4 }, { device = "emu:1" })
    H.raises(function() return a + b end, "binary: y is on emu:0, b on emu:1")
    b:fill(2)
    assert.same(H.flat(b), H.flat(a:copy(b)))
    a:fill(3)
    b:copy(a)
    a:fill(4) -- queued behind the copy
    assert.equal(3, b[2][3]:item())
    local t = vx.empty({ 4, 3 }, { device = "emu:1", dtype = "i32" })
    t:t():copy(a * 2)
    assert.equal(8, t[1][2]:item())
    assert.equal("emu:1", a:to("emu:1"):device())
    assert.is_true(vx.memory("emu:1").live > 0)
  end)

  it("runs out of memory as a device does", function()
    finally(function() setenv("VERTEX_EMU_MEMORY", "") end)
    collectgarbage()
    collectgarbage()
    vx.memory_flush "emu:0"
    -- the pool holds cuBLAS's workspace and the upload buffers
    setenv("VERTEX_EMU_MEMORY", tostring(vx.memory("emu:0").live + 180000000))
    local x = vx.zeros({ 20, 1000000 }, { device = "emu:0" }) -- 80 MB
    local message = H.raises(function() vx.zeros({ 40, 1000000 }, { device = "emu:0" }) end,
      "out of memory on emu:0: asked 160.0 MB")
    local free = tonumber(message:match "free on the device ([%d.]+) MB")
    assert.is_true(free > 80 and free < 101, message)
    local y = vx.ones({ 5, 1000000 }, { device = "emu:0" }) -- the next smaller one runs
    assert.same({ 0, 1 }, { x[20][1000000]:item(), y[5][1000000]:item() })
    x:release()
    y:release()
  end)

  it("lets every error of the runtime end as a status, with the op's name", function()
    local x, y = vx.ones({ 100 }, { device = "emu:0" }), vx.zeros({ 100 }, { device = "emu:0" })
    vx.sync "emu:0"
    local loss = vx.empty({ 1 }, { device = "emu:0" })
    local function mse() core.op.mse(loss, x, y) end
    for _, case in ipairs {
      { "cudaLaunchKernelEx:9", mse, "mse: squared_distance_kernel, grid (1,1,1), block (256,1,1)", "emu:0",
        "invalid configuration" },
      { "cudaLaunchKernelEx:719", mse, "mse on emu:0: " },
      { "cudaMalloc:2", mse, "mse: out of memory on emu:0" },
      { "cudaMalloc:999", mse, "emu:0" },
      { "cudaStreamSynchronize:719", function() vx.sync "emu:0" end, "emu:0: " },
      { "cudaMemcpyAsync:1", function() x:to "cpu" end, "emu:0: invalid argument" },
      { "cudaMemcpyAsync:1", function() x:copy(vx.zeros { 100 }) end, "emu:0: invalid argument" },
      { "cudaSetDevice:101", mse, "mse on emu:0: invalid device ordinal" },
      { "cudaMemsetAsync:1", function() vx.empty({ 8 }, { device = "emu:0" }):fill(1) vx.sync "emu:0" end, nil },
    } do
      with("VERTEX_EMU_ERROR", case[1], function()
        if case[3] then H.raises(case[2], unpack(case, 3)) else case[2]() end
      end)
      mse() -- and all goes on
      assert.equal(1, loss:item())
    end
  end)

  it("uploads through memory that queued ops still use only when they are done", function()
    for seed = 1, 4 do
      local out = H.child([[
        local vx = require "vertex"
        vx.device "emu:0"
        local n, b, y = 2 ^ 20, {}, {} -- 4 MB: what a slot of the ring takes from the pool
        local host = vx.full({ n }, 5, { device = "cpu" })
        for i = 1, 3 do b[i] = vx.full({ n }, 3) end
        for i = 1, 3 do y[i] = b[i] * 2 end
        for i = 1, 3 do b[i]:release() end
        local x = host:to "emu:0"
        for i = 1, 3 do assert(y[i]:sum():item() == 6 * n) end
        assert(x:sum():item() == 5 * n)
        print "right"
      ]], "VERTEX_EMU_SEED=" .. seed)
      assert.equal("right\n", out)
    end
  end)

  it("names the ops that were queued when a kernel went wrong, and with VERTEX_SYNC=1 the one", function()
    local text = [[
      local vx = require "vertex"
      local core = require "vertex.core"
      local on_emu = { device = "emu:0" }
      local x, y, loss = vx.ones({ 100 }, on_emu), vx.zeros({ 100 }, on_emu), vx.zeros({ 1 }, on_emu)
      vx.sync "emu:0"
      local function run()
        local z = x + 1
        core.op.mse(loss, x, y)
        os.setenv("VERTEX_EMU_ERROR", "cudaStreamSynchronize:719")
        local w = z:exp()
        vx.sync "emu:0"
      end
      require("ffi").cdef "int setenv(const char *, const char *, int);"
      function os.setenv(n, v) require("ffi").C.setenv(n, v, 1) end
      print(pcall(run))
    ]]
    local out = H.child(text)
    assert.is_truthy(out:find("in one of the last 3 ops, from unary to unary (VERTEX_SYNC=1 finds out which)", 1, true),
      out)
    out = H.child(text, "VERTEX_SYNC=1")
    assert.is_truthy(out:find("unary on emu:0: ", 1, true), out)
  end)

  it("opens no device where there is none, where the driver is too old, or the library holds no code for the card",
    function()
    local function contains(text, environment, device)
      local out = H.child(([[local vx = require "vertex"; print(select(2, pcall(vx.device, "%s")))]]):format(device
        or "emu:0"), environment)
      assert.is_truthy(out:find(text, 1, true), out)
    end
    contains("device 'emu:0': no CUDA device: no CUDA-capable device is detected", "VERTEX_EMU_DEVICES=0")
    contains("the driver is for CUDA 12.2, this library needs 13.0",
      "VERTEX_EMU_ERROR=cudaGetDeviceCount:35 VERTEX_EMU_DRIVER=12020")
    contains("there is no NVIDIA driver", "VERTEX_EMU_ERROR=cudaGetDeviceCount:35 VERTEX_EMU_DRIVER=0")
    contains("has compute capability 8.0; this library holds code for the emulator: "
      .. "build it with -DCMAKE_CUDA_ARCHITECTURES=80-real", "VERTEX_EMU_ERROR=cudaFuncGetAttributes:209")
    contains("emu:0: initialization error", "VERTEX_EMU_ERROR=cudaStreamCreateWithFlags:3")
    contains("device 'emu:1': there is 1 emu device, counted from 0", "VERTEX_EMU_DEVICES=1", "emu:1")
  end)
end)

-- -- Backend libraries ------------------------------------------------------------------------------------------------

describe("a backend library", function()
  it("is looked for by name, and its absence told with the places", function()
    local message = H.raises(function() vx.device "abc:0" end, "device 'abc:0'", "libvertex_abc.so", core.root,
      "backends there: ")
    assert.is_truthy(message:find("emu", 1, true), message)
    with("VERTEX_BACKENDS", "", function() -- names no folder
      H.raises(function() vx.device "abc:0" end, "no libvertex_abc.so in " .. message:match "%.so in ([^, ]+) ")
    end)
    for _, bad in ipairs { "", ":0", "emu:", "emu:-1", "emu:1x", "../emu", "EMU", "emu:12345", ("x"):rep(40) } do
      H.raises(function() vx.device(bad) end, "expected \"cpu\" or \"cuda:0\"")
    end
  end)

  it("that is none, or was built from other declarations, is refused", function()
    local folder = H.scratch "backends"
    require("lfs").mkdir(folder)
    local own = H.read(build .. "/vx_backend_signature.c") -- what every library of this build says of itself
    local changed, count = own:gsub("(int %(%*fill%)%(vx_tensor %*x *, )double", "%1float")
    assert.equal(1, count)
    local entry = "void *vx_backend_entry(void *host) { return host; }" -- which would crash whoever believed it
    H.write(folder .. "/libvertex_text.so", "no library")
    for name, code in pairs {
      other = "int other;",
      old = entry,
      stale = changed:gsub('#include "[^"]*"', "") .. entry,
      empty = "const char *vx_backend_signature(void) { return \"\"; }" .. entry,
    } do
      H.write(("%s/%s.c"):format(folder, name), code)
      assert.equal(0, os.execute(("gcc -shared -fPIC -o '%s/libvertex_%s.so' '%s/%s.c'"):format(folder, name, folder,
        name)))
    end
    finally(function() setenv("VERTEX_BACKENDS", "") end)
    setenv("VERTEX_BACKENDS", folder)
    H.raises(function() vx.device "text" end, "cannot open a backend", "libvertex_text.so")
    H.raises(function() vx.device "other" end, "libvertex_other.so is no backend", "has no vx_backend_entry")
    H.raises(function() vx.device "old" end, "libvertex_old.so is no backend", "no vx_backend_signature", "./setup.sh")
    H.raises(function() vx.device "stale" end, "libvertex_stale.so was built from other declarations",
      "first 'int (*fill)(vx_tensor *x", "./setup.sh")
    H.raises(function() vx.device "empty" end, "libvertex_empty.so was built from other declarations")
    H.raises(function() vx.device "nowhere" end, "libvertex_nowhere.so", folder)
    assert.equal("emu:0", vx.zeros({ 1 }, { device = "emu:0" }):device())
  end)

  it("libvertex_cuda.so, where it was built, lists its ops and says what is wrong with the device", function()
    local there, reason = core.backend_has("cuda", "fill")
    if there == nil then
      assert.is_truthy(reason:find("there is no libvertex_cuda.so", 1, true), reason)
      return
    end
    for _, op in ipairs(core.op_list()) do
      assert.equal(core.backend_has("emu", op.name), core.backend_has("cuda", op.name), op.name)
    end
    local devices = vx.devices()
    assert.is_true(#devices > 1 or devices.cuda:match "^no CUDA device: " ~= nil)
  end)

  it("libvertex_cuda.so, where it was built, holds code for sm_80, sm_90 and newer cards, and hot kernels do not spill",
    function()
    if core.backend_has("cuda", "fill") == nil then return end
    local out, status = H.shell(("luajit '%s/kernels/lab/check_cuda_build.lua' '%s'"):format(core.root, build))
    assert.equal(0, status, out)
  end)
end)
