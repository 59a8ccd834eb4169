-- The CUDA kernels, on the host as device emu:0 (tests/cuda_emulator) and on cuda:0 where there is one (`busted -t
-- cuda`): every op and golden file against the CPU, the same bits twice, transfers, memory, errors.

local H = require "tests.helper"
local check = require "tests.golden.check"
local device_cases = require "tests.device_cases"
local larger = require "tests.larger_cases"
local vx = H.vx
local core = require "vertex.core"
local ops = vx.ops
local run, compare, bytes = device_cases.run, device_cases.compare, device_cases.bytes
local direct, tolerances, faults, DTYPES = device_cases.direct, device_cases.tolerances, device_cases.faults,
  device_cases.dtypes

-- -- On one device ----------------------------------------------------------------------------------------------------

local function specs(device, tag)
  local backend = device:match "^%a+"

  --- On `device`; with results compared against the CPU's.
  local function against_cpu(f, what, tolerance)
    finally(function() vx.device "cpu" end)
    local expected
    vx.device "cpu"
    vx.step(function() expected = f "cpu" for _, x in ipairs(expected) do core.keep(x) end end)
    vx.device(device)
    local twice = {}
    for i = 1, 2 do
      local here
      vx.step(function()
        here = f(device)
        for j, x in ipairs(here) do
          assert.equal(device, x:device())
          here[j] = core.keep(x:to "cpu")
        end
        vx.sync(device)
      end)
      twice[i] = here
    end
    vx.device "cpu"
    compare(twice[1], expected, what, tolerance)
    assert.same(bytes(twice[1]), bytes(twice[2]), what .. ": the same bits twice")
  end

  describe(device, function()
    it("has a kernel for every op" .. tag, function()
      for _, op in ipairs(core.op_list()) do
        local there, reason = core.backend_has(backend, op.name)
        assert.is_not_nil(there, reason)
        assert.is_true(there, op.name)
      end
    end)

    for _, op in ipairs(ops.registry) do
      local number = H.number_of(op.name)
      if op.cases then
        it(op.name .. " agrees with the CPU, forward and backward, the same bits twice" .. tag, function()
          for kind, list in ipairs { op.cases(H.generator(100 + number)),
            larger[op.name] and larger[op.name](H.generator(600 + number)) or {} } do
            for i, args in ipairs(list) do
              local what = ("%s case %d.%d"):format(op.name, kind, i)
              local got = run(op.name, args, device, 300 + number)
              compare(got, run(op.name, args, "cpu", 300 + number), what)
              assert.same(bytes(got), bytes(run(op.name, args, device, 300 + number)), what .. ": the same bits twice")
            end
          end
        end)
      end
    end

    for name, f in pairs(direct) do
      it(name .. " agrees with the CPU" .. tag, function() against_cpu(f, name, tolerances[name]) end)
    end

    it("adamw gives every tensor of a call the bits that it gets in a call of its own" .. tag,
      function() H.check_adamw_lists(device) end)

    it("sepconv2d adds what x's gradient is so far" .. tag, function() H.check_sepconv2d_addend(device) end)
    it("one number normalized by itself has a gradient of 0" .. tag, function() H.check_single_numbers(device) end)

    for name, fault in pairs(faults) do
      it(name .. " reports a value it cannot work with" .. tag, function()
        local ok, message = pcall(function()
          fault[3](device)
          vx.sync(device)
        end)
        assert.is_false(ok)
        assert.is_truthy(message:find(fault[1], 1, true), message)
        assert.is_truthy(message:find(fault[2], 1, true), message)
        vx.sync(device) -- reported once
        fault[3](device)
        -- freeing the op's tensors and scratch waits for the device too, but must not swallow what it finds
        collectgarbage()
        collectgarbage()
        assert.is_false(pcall(vx.sync, device))
        assert.equal(4, (vx.ones({ 2, 2 }, { device = device }) + 3):totable()[2][2])
      end)
    end

    for _, name in ipairs(check.files "tests/golden") do
      it("golden file " .. name .. tag, function()
        finally(function() vx.device "cpu" end)
        vx.device(device)
        local t, meta = vx.load("tests/golden/" .. name)
        assert.equal(device, t.z:device())
        assert.same({}, (check.differences(t, meta)))
      end)
    end

    for _, method in ipairs { "softmax-knn-ce", "sgumbel-ppl", "hgumbel-knn-l2", "ste-euclid", "re-cosine" } do
      it("a step of an autoencoder with " .. method .. " agrees with the CPU" .. tag, function()
        finally(function() vx.device "cpu" end)
        local autoencoder = dofile(core.root .. "/experiments/autoencoder.lua")
        --- Loss, codes, gradients and what AdamW makes of them.
        local function step(where)
          vx.device(where)
          vx.seed(6)
          local model = autoencoder.new({ 16, 8, 4 }, vx.quantizer(method, { dim = 4, codes = 21, k = 2, seed = 2 }))
          local optimizer = vx.optim.AdamW(model:parameters(), { weight_decay = 0.1 })
          local x = vx.empty({ 3, 12, 10, 3 }):copy(H.generator(46)({ 3, 12, 10, 3 }, { grad = false }))
          local y, q = model(x)
          local loss = vx.mse(y, x) + q.reg
          loss:backward()
          local state, gradients = { loss = loss:totable(), codes = H.flat(q.codes) }, {}
          for i, p in ipairs(model:parameters()) do gradients[i] = H.flat(p.grad) end
          optimizer:step(1e-3)
          for name, t in pairs(model:state_dict()) do state[name] = H.flat(t) end
          return state, gradients
        end
        local expected, expected_gradients = step "cpu"
        local state, gradients = step(device)
        assert.same(expected.codes, state.codes)
        H.close({ state.loss }, { expected.loss }, 1e-5, 0, "loss")
        for i, g in ipairs(expected_gradients) do
          H.close(gradients[i], g, 0, 2e-4 * device_cases.largest(g), "gradient " .. i)
        end
        for name, t in pairs(expected) do
          -- AdamW's first step is rate * sign(g): where g is rounding noise, by two rates apart
          if name ~= "codes" and name ~= "loss" then H.close(state[name], t, 0, 2.1e-3, name) end
        end
      end)
    end

    for _, item in ipairs(vx.quantizers()) do
      if not (item.table1 or item.ablation) then -- the golden files have those
        it("two steps of " .. item.name .. ", then its codes, agree with the CPU" .. tag, function()
          finally(function() vx.device "cpu" end)
          local function results(where)
            vx.device(where)
            vx.seed(6)
            local q = vx.quantizer(item.name, { dim = 6, codes = 16, groups = 2, k = 2, seed = 2 })
            local T, codes, values = H.generator(47), {}, {}
            for i = 1, 2 do
              local z = vx.empty({ 30, 6 }):copy(T({ 30, 6 }, { grad = false }))
              z.requires_grad = true
              local o = q:forward(z)
              vx.add(vx.sum(vx.square(o.quantized)), o.reg):backward()
              codes[i] = H.flat(o.codes)
              values["quantized " .. i], values["reg " .. i] = H.flat(o.quantized), H.flat(o.reg)
              values["dz " .. i] = H.flat(z.grad)
            end
            for _, p in ipairs(q:named_parameters()) do values["gradient of " .. p[1]] = H.flat(p[2].grad) end
            for name, t in pairs(q:state_dict()) do values[name] = H.flat(t) end
            q:eval()
            local z = vx.empty({ 30, 6 }):copy(T({ 30, 6 }, { grad = false }))
            codes[3], values.decoded = H.flat(q:encode(z)), H.flat(q:decode(q:encode(z)))
            return codes, values
          end
          local expected_codes, expected = results "cpu"
          local codes, values = results(device)
          assert.same(expected_codes, codes)
          for name, x in pairs(expected) do H.close(values[name], x, 0, 2e-4 * device_cases.largest(x), name) end
        end)
      end
    end

    it("moves tensors of every dtype and stride, both ways" .. tag, function()
      local T = H.generator(9)
      for _, dtype in ipairs(DTYPES) do
        local x = T({ 6, 10 }, { grad = false, low = 0, high = 99 }):to(dtype)
        local list = H.flat(x)
        assert.same(list, H.flat(x:to(device)))
        assert.same(list, H.flat(x:to(device):to "cpu"))
        assert.same(x:bytes(), x:to(device):bytes())
        assert.same(H.flat(x:t()), H.flat(x:t():to(device)))
        assert.same(H.flat(x:t()), H.flat(x:to(device):t():to "cpu"))
        assert.same(H.flat(x:narrow(2, 3, 4)), H.flat(x:to(device):narrow(2, 3, 4)))
        assert.same(x[3]:totable(), x:to(device)[3]:totable())
        for _, other in ipairs(DTYPES) do
          local expected = H.flat(x:to(other))
          assert.same(expected, H.flat(vx.empty({ 6, 10 }, { dtype = other, device = device }):copy(x)))
          assert.same(expected, H.flat(vx.empty({ 6, 10 }, { dtype = other }):copy(x:to(device))))
          local target = vx.zeros({ 10, 6 }, { dtype = other, device = device })
          target:t():copy(x)
          assert.same(expected, H.flat(target:t()))
        end
        local y = vx.empty({ 6, 10 }, { dtype = dtype, device = device })
        y:frombytes(x:bytes())
        assert.same(list, H.flat(y))
      end
      local y = vx.zeros({ 3 }, { device = device })
      y[2] = 5
      y[3] = vx.tensor(7)
      assert.same({ 0, 5, 7 }, y:totable())
      assert.equal(5, y[2]:item())
      assert.same({}, vx.zeros({ 0 }, { device = device }):totable())
      assert.same({ 0, 4 }, vx.zeros({ 0, 4 }, { device = device }):to("cpu"):shape())
    end)

    it("uploads more than its buffers hold, in order" .. tag, function()
      -- the ring holds 4 slots of 4 MB: large ones take the detour through a device buffer, small ones share a slot
      local x = vx.arange(0, 3000000):to(device) -- 12 MB
      assert.same({ 2999999, 1234567 }, { x[3000000]:item(), x[1234568]:item() })
      local parts = {}
      for i = 1, 40 do parts[i] = vx.full({ i % 3 == 0 and 300000 or 1000 + i }, i):to(device) end
      for i, part in ipairs(parts) do assert.same({ i, i }, { part[1]:item(), part[part:size(1)]:item() }) end
      local y = vx.empty({ 100000 }, { device = device })
      local host = vx.empty { 100000 }
      for i = 1, 60 do -- the host's tensor is free again at once
        host:fill(i)
        y:copy(host)
      end
      assert.equal(60, y[100000]:item())
    end)

    it("finds elements beyond 2^31" .. tag, function()
      local far = 2 ^ 31 + 70
      -- 2 GB, of which the emulator touches a few pages
      local x = vx.empty({ far + 30 }, { dtype = "u8", device = device })
      local function window(offset) return core.view(x, { 2, 3 }, { far, 4 }, offset) end
      window(1):fill(7)
      window(2):fill(9)
      assert.same({ { 7, 7, 7 }, { 7, 7, 7 } }, window(1):to("f32"):totable())
      local y = vx.empty({ 3, 2 }, { device = device }):copy(window(2):t())
      assert.same({ { 9, 9 }, { 9, 9 }, { 9, 9 } }, y:totable())
      window(3):copy(vx.tensor { { 1, 2, 3 }, { 4, 5, 6 } })
      window(1)[2]:copy(window(3)[2])
      assert.same({ { 7, 7, 7 }, { 4, 5, 6 } }, window(1):totable())
      assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, window(3):totable())
      x:release()
    end)

    it("saves and loads its tensors" .. tag, function()
      local T = H.generator(10)
      local x, half = T({ 300, 40 }, { grad = false }), T({ 7, 3 }, { grad = false }):to "bf16"
      local path = H.scratch "device.safetensors"
      vx.save(path, { x = x:to(device), strided = x:to(device):t(), half = half:to(device),
        codes = vx.arange(5, { dtype = "i32" }):to(device) })
      local back = vx.load(path, { device = device })
      assert.equal(device, back.x:device())
      assert.same(x:bytes(), back.x:bytes())
      assert.same(H.flat(x:t()), H.flat(back.strided))
      assert.same(half:bytes(), back.half:bytes())
      assert.same({ 0, 1, 2, 3, 4 }, back.codes:totable())
      assert.same(x:bytes(), vx.load(path, { device = "cpu" }).x:bytes())
    end)

    it("refuses tensors of another device, both by name" .. tag, function()
      local here, there = vx.ones({ 2, 3 }, { device = device }), vx.ones { 2, 3 }
      H.raises(function() ops.add(here, there) end, "binary: ", "y is on " .. device, "b on cpu")
      H.raises(function() ops.add(there, here) end, "binary: ", "y is on cpu", "b on " .. device)
      local function tuple(on)
        local function zeros() return vx.zeros({ 2 }, { device = on }) end
        return { zeros(), zeros(), zeros(), zeros(), 0 }
      end
      H.raises(function() H.adamw({ tuple "cpu", tuple(device) }, 0.1, 0.9, 0.99, 1e-8, 1) end,
        "adamw: p[0] is on cpu, p[1] on " .. device)
      H.raises(function() ops.mse(here, there) end, "mse: ", device, "cpu")
      H.raises(function() ops.gather(here, vx.zeros({ 2 }, { dtype = "i32" })) end, "gather: ", device, "cpu")
      H.raises(function() core.image_png(vx.zeros({ 2, 2, 3 }, { dtype = "u8", device = device })) end, "")
      H.raises(function() vx.device(backend .. ":63") end, backend .. ":63", backend .. " device")
      H.raises(function() vx.device(backend .. ":x") end, backend .. ":x", "expected")
    end)

    it("names itself" .. tag, function()
      assert.equal(device, vx.ones({ 1 }, { device = device }):device())
      assert.equal(device, vx.ones({ 1 }, { device = backend .. (device:match ":%d+") }):device())
      assert.is_true(vx.memory(device).limit > 1e8)
    end)

    it("counts its memory, keeps freed blocks, gives them back" .. tag, function()
      core.memory_pool(true, device)
      finally(function()
        core.memory_pool(backend ~= "emu", device)
        vx.memory_limit(0, device)
      end)
      collectgarbage()
      collectgarbage()
      vx.memory_flush(device)
      local before = vx.memory(device)
      assert.equal(0, before.cached)
      local x = vx.zeros({ 1024, 256 }, { device = device })
      local during = vx.memory(device)
      assert.same({ before.live + 1048576, before.tensors + 1 }, { during.live, during.tensors })
      x:release()
      local after = vx.memory(device)
      assert.same({ before.live, 1048576, before.tensors }, { after.live, after.cached, after.tensors })
      local y = vx.zeros({ 1024, 256 }, { device = device })
      assert.equal(0, vx.memory(device).cached)
      y:release()
      -- a limit: the cached block goes, what is too large is refused with all figures, and a smaller one still fits
      vx.memory_limit(before.live + 1500000, device)
      local z = vx.zeros({ 300000 }, { device = device })
      assert.equal(0, vx.memory(device).cached)
      H.raises(function() vx.zeros({ 300000 }, { device = device }) end, "out of memory on " .. device, "asked 1.2 MB",
        "free on the device", "live",
        "cached", "limit")
      assert.equal(0, z[299999]:item())
      z:release()
      assert.equal(1, vx.ones({ 300000 }, { device = device })[300000]:item())
    end)

    it("runs out of memory inside an op without harm" .. tag, function()
      finally(function() vx.memory_limit(0, device) end)
      local a, b = vx.ones({ 200000 }, { device = device }), vx.zeros({ 200000 }, { device = device })
      local loss = vx.empty({ 1 }, { device = device }):fill(9)
      collectgarbage()
      collectgarbage()
      vx.memory_flush(device)
      vx.memory_limit(vx.memory(device).live + 50, device)
      H.raises(function() core.op.mse(loss, a, b) end, "mse: out of memory on " .. device)
      assert.equal(9, loss:item()) -- nothing was written
      H.raises(function() return a + b end, "out of memory")
      vx.memory_limit(0, device)
      core.op.mse(loss, a, b)
      assert.equal(1, loss:item())
    end)

    it("runs out of memory within a training step, which fails as a whole; the next smaller one runs" .. tag, function()
      finally(function()
        vx.memory_limit(0, device)
        vx.device "cpu"
      end)
      vx.device(device)
      vx.seed(3)
      local autoencoder = dofile(core.root .. "/experiments/autoencoder.lua")
      local quantizer = vx.quantizer("softmax-knn-ce", { dim = 4, codes = 11, k = 2, seed = 2 })
      quantizer.with_stats = false
      local model = autoencoder.new({ 8, 8, 4 }, quantizer)
      local optimizer = vx.optim.AdamW(model:parameters())
      local function step(batch)
        local x = ops.uniform(vx.empty { batch, 8, 8, 3 }, -1, 1)
        local y, q = model(x)
        local loss = vx.mse(y, x) + q.reg
        optimizer:zero_grad()
        loss:backward()
        optimizer:step(0.01)
        return loss:item()
      end
      vx.step(step, 1)
      collectgarbage()
      collectgarbage()
      vx.memory_flush(device)
      local before, weights = vx.memory(device), {}
      for name, x in pairs(model:state_dict()) do weights[name] = x:bytes() end
      vx.reset_peak(device)
      vx.step(step, 2)
      local room = vx.memory(device).peak - before.live
      for name, x in pairs(model:state_dict()) do x:frombytes(weights[name]) end
      for part = 1, 3 do -- fails in forward, and later and later
        vx.memory_limit(before.live + room, device)
        vx.memory_flush(device)
        local ok, message = pcall(vx.step, step, part == 1 and 64 or part == 2 and 6 or 4)
        assert.is_false(ok)
        assert.is_truthy(tostring(message):find("out of memory on " .. device, 1, true), message)
        collectgarbage() -- what the first one finalizes the second one frees
        collectgarbage()
        assert.equal(before.live, vx.memory(device).live)
        for name, x in pairs(model:state_dict()) do assert.equal(weights[name], x:bytes(), name) end
      end
      assert.is_true(vx.step(step, 1) > 0)
    end)

    it("keeps live bytes constant over many steps" .. tag, function()
      finally(function() vx.device "cpu" end)
      vx.device(device)
      local w, m, v = vx.ones({ 64 }, { requires_grad = true }), vx.zeros { 64 }, vx.zeros { 64 }
      local live
      for step = 1, 300 do
        vx.step(function()
          ops.mse(ops.exp(w), vx.zeros { 64 }):backward()
          H.adamw({ { w, m, v, w.grad, 0 } }, 0.01, 0.9, 0.99, 1e-8, step)
          w:zero_grad()
        end)
        if step == 10 then live = vx.memory(device).live end
      end
      assert.equal(live, vx.memory(device).live)
      assert.is_true(w[1]:item() < 0.5)
    end)
  end)
end

specs("emu:0", "")

-- -- On a GPU ---------------------------------------------------------------------------------------------------------

local gpu, reason = device_cases.gpu()
if gpu then
  specs(gpu, " #cuda")
  describe("cuda:0", function()
    it("has the instructions of ptx.cuh as the emulator imitates them #cuda", function()
      local out, status = H.shell(("'%s/cuda_selftest'"):format(device_cases.build))
      assert.equal(0, status, out)
    end)

    it("counts more than 2^32 elements #cuda", function()
      local n = 2 ^ 32 + 4 * 1000 + 3
      if vx.memory("cuda:0").limit < 24e9 then
        pending "needs 24 GB"
        return
      end
      local x = vx.empty({ n }, { dtype = "u8", device = "cuda:0" }):fill(3)
      local y = vx.empty({ n }, { dtype = "bf16", device = "cuda:0" }):copy(x)
      core.view(x, { n - 1 }, { 1 }, 1):copy(core.view(y, { n - 1 }, { 1 }, 0)) -- odd places: one element a thread
      for _, i in ipairs { 1, 2, 2 ^ 31, 2 ^ 31 + 1, 2 ^ 32 - 1, 2 ^ 32, 2 ^ 32 + 1, n } do
        assert.same({ 3, 3 }, { x[i]:item(), y[i]:item() })
      end
    end)
  end)
else
  it("cuda:0 is left out (" .. reason .. ")", function() pending(reason) end)
  it("cuda:0 is left out (" .. reason .. ") #cuda", function() pending(reason) end)
end
