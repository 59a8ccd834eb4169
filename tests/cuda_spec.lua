-- The CUDA kernels, on the host as device emu:0 (tests/cuda_emulator) and on cuda:0 where there is one (`busted -t
-- cuda`): every op and golden file against the CPU, the same bits twice, transfers, memory, errors.

local H = require "tests.helper"
local check = require "tests.golden.check"
local device_cases = require "tests.device_cases"
local larger = require "tests.larger_cases"
local vx = H.vx
local core = require "vertex.core"
local ops = vx.ops
local run, compare, bytes, upload = device_cases.run, device_cases.compare, device_cases.bytes, device_cases.upload
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

    it("rounds the factors of products to bf16 under vx.autocast" .. tag, function()
      finally(function()
        vx.autocast "f32"
        vx.device "cpu"
      end)
      vx.device "cpu"
      H.raises(function() vx.autocast "bf16" end, "autocast: the default device is cpu")
      H.raises(function() vx.autocast "f16" end, "autocast: 'f16', expected \"bf16\" or \"f32\"")
      local function random(seed, ...) return H.generator(seed)({ ... }, { grad = false }) end
      local function rounded(x) return x:to("bf16"):to "f32" end

      --- y = f(a, b) and the gradients of a and b for dy, on the CPU.
      local function results(f, a, b, dy)
        a.requires_grad, b.requires_grad = true, true
        local y = f(a, b)
        y:backward(dy)
        return { y:to "cpu", a.grad:to "cpu", b.grad:to "cpu" }
      end
      local function check_product(what, f, a, b)
        vx.device "cpu"
        local dy = random(3, unpack(f(a, b):shape()))
        local expected = results(f, rounded(a), rounded(b), rounded(dy))
        vx.device(device)
        assert.equal("bf16", vx.autocast "bf16")
        compare(results(f, upload(a, device), upload(b, device), upload(dy, device)), expected, what, 1e-6)
        vx.autocast "f32"
        assert.is_true(results(f, upload(a, device), upload(b, device),
          upload(dy, device))[1]:bytes() ~= expected[1]:bytes())
        vx.device "cpu"
      end
      for _, s in ipairs { { 33, 70, 20 }, { 1, 8, 3 }, { 64, 64, 64 }, { 130, 5, 1 } } do
        check_product("matmul", ops.matmul, random(1, s[1], s[2]), random(2, s[2], s[3]))
        check_product("transposed", function(a, b) return ops.matmul(a:t(), b:t()) end, random(1, s[2], s[1]),
          random(2, s[3], s[2]))
        check_product("linear", function(x, w) return ops.linear(x, w) end, random(1, s[1], s[2]),
          random(2, s[3], s[2]))
      end
      check_product("batches", ops.matmul, random(1, 3, 5, 9), random(2, 3, 9, 12))
      check_product("one for all", ops.matmul, random(1, 3, 5, 9), random(2, 9, 12))

      local function overlapping(x, w) -- rows that overlap go to a kernel of our own
        local y = vx.empty({ 1, 18, 7 }, { device = x:device() })
        core.op.gemm(y, core.view(x, { 1, 18, 6 }, { 0, 2, 1 }, 0),
          core.view(w, { 1, 6, 7 }, { 0, 7, 1 }, 0), nil, 1, 0)
        return y:to "cpu"
      end
      local x, w = random(1, 40), random(2, 6, 7)
      local expected = overlapping(rounded(x), rounded(w))
      vx.device(device)
      vx.autocast "bf16"
      compare({ overlapping(upload(x, device), upload(w, device)) }, { expected }, "overlapping", 1e-6)

      local T = H.generator(8)
      -- d is made in float32; where the two devices differ in its last bit they may round apart
      local cases = ops.registry.sepconv2d.cases(T)
      for i, args in ipairs(larger.sepconv2d(T)) do cases[#cases + 1] = i <= 4 and args or nil end
      for i, args in ipairs(cases) do
        vx.autocast "bf16"
        local got = run("sepconv2d", args, device, 20 + i)
        vx.autocast "f32"
        compare(got, run("sepconv2d", args, "cpu", 20 + i), "sepconv2d case " .. i, 1e-2)
        assert.is_true(got[1]:bytes() ~= run("sepconv2d", args, device, 20 + i)[1]:bytes())
      end
      for i, args in ipairs(larger.attention(T)) do -- whose factors keep the 10 bits of TF32
        vx.autocast "bf16"
        local got = run("attention", args, device, 30 + i)
        vx.autocast "f32"
        compare(got, run("attention", args, "cpu", 30 + i), "attention case " .. i, 1e-2)
        assert.is_true(got[1]:bytes() ~= run("attention", args, device, 30 + i)[1]:bytes())
      end
      vx.autocast "bf16"

      local function others() -- what is no product of matrices is as it was
        local list = device_cases.quantized(device, 8, 60, 1, 30, 8, ops.quantize_smooth,
          upload(vx.tensor { -2 }, device),
          { sampler = "softmax", regularizer = "knn-ce", k = 4, gumbel_tau = 1, shards = 1, seed = 5, stream = 3 })
        list[#list + 1] = ops.depthwise_conv2d(random(4, 2, 6, 5, 8), random(5, 3, 3, 8))
        list[#list + 1] = ops.assign(random(6, 9, 1, 4), random(7, 1, 7, 4), "cosine")
        return bytes(list)
      end
      local under = others()
      vx.autocast "f32"
      assert.same(others(), under)
    end)

    it("keeps images in bf16 under vx.autocast, parameters and sums in float32" .. tag, function()
      finally(function()
        vx.autocast "f32"
        vx.device "cpu"
      end)
      vx.device(device)
      local function random(seed, ...) return upload(H.generator(seed)({ ... }, { grad = false }), device) end
      local function rounded(x) return x:to("bf16"):to "f32" end
      local function trained(list)
        for _, x in ipairs(list) do x.requires_grad = true end
        return unpack(list)
      end
      local function equal(expected, got, what)
        assert.equal(expected:dtype(), got:dtype(), what)
        assert.is_true(expected:bytes() == got:bytes(), what)
      end

      -- A dense convolution: factors rounded to bf16, sums and bias float32, whatever the types. Few channels and more
      -- than a panel on either side, in eights and not, images below a tile and above, parts of the gradient's pixels.
      local function within(expected, got, what)
        local a, b, largest = H.flat(got:to("cpu"):to "f32"), H.flat(expected:to "cpu"), 0
        for _, v in ipairs(b) do largest = math.max(largest, math.abs(v)) end
        H.close(a, b, got:dtype() == "bf16" and 2 ^ -8 or 0, 1e-6 * largest, what)
      end
      for _, s in ipairs { { 2, 6, 5, 5, 6 }, { 2, 6, 5, 5, 3 }, { 2, 6, 5, 5, 70 }, { 1, 1, 1, 2, 1 },
        { 1, 17, 19, 40, 3 }, { 1, 17, 19, 3, 128 },
        { 2, 5, 4, 16, 130 }, { 2, 5, 3, 130, 24 }, { 2, 35, 33, 3, 8 }, { 2, 33, 35, 8, 2 } } do
        local x, w, b, dy = random(1, s[1], s[2], s[3], s[4]), random(2, 3, 3, s[4], s[5]), random(3, s[5]),
          random(4, s[1], s[2], s[3], s[5])
        local function results(input, weight, setting, output, gradient)
          vx.autocast(setting)
          local a, v, c = trained { input:detach(), weight:detach(), b:detach() }
          local y = ops.conv3x3(a, v, c, output)
          y:backward(gradient)
          return { y, a.grad, v.grad, c.grad }
        end
        local plain = results(x, w, "f32", nil, dy)
        local expected = results(rounded(x), rounded(w), "f32", nil, rounded(dy))
        for _, kind in ipairs { { "f32", "bf16" }, { "bf16", "bf16" }, { "f32", "bf16", "f32" },
          { "bf16", "bf16", "f32" }, { "bf16", "f32" } } do
          local input, setting, output = x:to(kind[1]), kind[2], kind[3]
          local what = ("conv3x3 %s of %s, autocast %s, to %s"):format(table.concat(s, " "), kind[1], setting,
            output or "what it says")
          local got = results(input, w, setting, output, dy)
          assert.same({ output or setting, kind[1], "f32", "f32" }, { got[1]:dtype(), got[2]:dtype(), got[3]:dtype(),
            got[4]:dtype() }, what)
          for i, result in ipairs { "y", "dx", "dw" } do
            within(expected[i], got[i], what .. ": " .. result)
            assert.is_true(got[i]:dtype() == "bf16" or got[i]:bytes() ~= plain[i]:bytes(), what)
          end
          equal((got[1]:dtype() == "bf16" and expected or plain)[4], got[4], what .. ": dbias")
          assert.same(bytes(got), bytes(results(input, w, setting, output, dy)), what .. ": the same bits twice")
        end
        assert.same(bytes(plain), bytes(results(x, w, "f32", nil, dy)), "float32 after it")
      end
      vx.autocast "f32"
      -- not to be read in eights
      local odd, weight = core.view(random(1, 400):to "bf16", { 1, 5, 6, 8 }, { 240, 48, 8, 1 }, 1),
        random(2, 3, 3, 8, 3)
      within(ops.conv3x3(odd:to "f32", rounded(weight)), ops.conv3x3(odd, weight),
        "conv3x3 of an image at an odd place")

      -- sepconv2d: every pair of types, and a residual of another than the result's; against float32 on the CPU
      for i, o in ipairs { {}, { groups = 2, activation = "silu" }, { stride = 2 },
        { up = 2, groups = 1, activation = "gelu" } } do
        for _, outputs in ipairs { 8, 5, 66 } do
          local size = o.up and 8 or o.stride and 2 or 4
          local given = { random(1, 2, 4, 4, 12), random(2, 3, 3, 12), random(3, outputs, 12), random(4, outputs) }
          if o.groups then given[5], given[6] = random(5, 12), random(6, 12) end
          given[7] = i % 2 == 0 and random(7, 2, size, size, outputs) or nil
          local dy = random(8, 2, size, size, outputs)
          local function results(where, half, residual_half, output)
            local list, all = {}, {}
            for j = 1, 7 do
              local x = given[j] and rounded(given[j])
              if x and ((j == 1 and half) or (j == 7 and residual_half)) then x = x:to "bf16" end
              list[j] = x and x:detach():to(where)
              if x then list[j].requires_grad = true end
            end
            o.output = output
            local y = ops.sepconv2d(list[1], list[2], list[3], list[4], list[5], list[6], list[7], o)
            y:backward(rounded(dy):to(where))
            all[1] = y
            for j = 1, 7 do
              if list[j] then
                assert.equal(list[j]:dtype(), list[j].grad:dtype())
                all[#all + 1] = list[j].grad
              end
            end
            return all
          end
          vx.autocast "f32"
          vx.device "cpu"
          local expected = results("cpu", false, false, nil)
          vx.device(device)
          vx.autocast "bf16"
          for kind = 0, 7 do
            local half, residual_half, output = kind % 2 == 1, kind % 4 >= 2, kind >= 4 and "f32" or nil
            local got = results(device, half, residual_half, output)
            assert.equal(output or "bf16", got[1]:dtype())
            for j, x in ipairs(got) do got[j] = x:to("cpu"):to "f32" end
            compare(got, expected, ("sepconv2d %d to %d, kind %d"):format(i, outputs, kind), 2e-2)
            if not given[7] and not output then
              equal(results(device, half, false, "f32")[1]:to("bf16"):to "cpu", results(device, half)[1]:to "cpu", "y")
            end
          end
          o.output = nil
        end
      end

      -- what takes no bf16 gets float32, views pass it on, gradients find their way back, in the type of what they
      -- belong to
      local x, w = random(11, 2, 4, 4, 6), random(12, 3, 3, 6, 6)
      local function chain(where)
        local a, v = trained { rounded(x):detach():to(where), w:detach():to(where) }
        local y = ops.conv3x3(a, v)
        local part = ops.narrow(y, 4, 2, 3)
        local loss = ops.sum(ops.silu(y)) + ops.sum(ops.square(ops.reshape(part, { 2, -1 }))) + ops.sum(y * 2)
          + ops.sum(ops.transpose(y, 2, 3)[1])
        loss:backward()
        return { loss:detach(), a.grad, v.grad }, y, part
      end
      vx.autocast "f32"
      vx.device "cpu"
      local expected = chain "cpu"
      vx.device(device)
      vx.autocast "bf16"
      local got, y, part = chain(device)
      assert.same({ "bf16", "bf16", "f32" }, { y:dtype(), part:dtype(), got[1]:dtype() })
      for i, g in ipairs(got) do got[i] = g:to "cpu" end
      compare(got, expected, "chain", 2e-2)
      assert.same(bytes { ops.assign(x:reshape { 32, 1, 6 }:to "bf16", random(13, 1, 7, 6), "euclid") },
        bytes { ops.assign(rounded(x):reshape { 32, 1, 6 }, random(13, 1, 7, 6), "euclid") })
      local leaf = ops.cast(x, "bf16")
      leaf.requires_grad = true
      ops.sum(ops.cast(leaf, "f32")):backward()
      assert.equal("bf16", leaf.grad:dtype())

      H.raises(function() ops.conv3x3(x, w, nil, "bf16") end, "conv3x3: output 'bf16'")
      H.raises(function() ops.cast(x, "i32") end, "cast: 'i32', expected f32 or bf16")
      H.raises(function() ops.cast(x:to "u8", "f32") end, "cast: x (2,4,4,6) is u8")
      local other, w9, v = x:to "bf16", random(14, 3, 3, 6), random(15, 6, 6)
      H.raises(function() core.op.sepconv2d { y = other, x = x, w = w9, v = v, residual = x, act = 0, eps = 1e-5,
        stride = 1, up = 1 } end,
        "sepconv2d: residual is f32 and y bf16, expected one dtype")
      vx.autocast "f32"
      vx.device "cpu"
      local here = x:to("cpu"):to "bf16"
      H.raises(function() ops.conv3x3(here, w:to "cpu") end, "conv3x3: x (2,4,4,6) is bf16, expected f32")
      H.raises(function() return here + here end, "binary: a (2,4,4,6) is bf16, expected f32")
    end)

    it("trains an autoencoder in bf16 close to float32" .. tag, function()
      finally(function()
        vx.autocast "f32"
        vx.device "cpu"
      end)
      local autoencoder = dofile(core.root .. "/experiments/autoencoder.lua")
      local function losses(setting)
        vx.device(device)
        vx.autocast(setting)
        vx.seed(3)
        -- no nearest neighbours: where rounding exchanges two, gradients jump
        local model = autoencoder.new({ 16, 8, 4 },
          vx.quantizer("softmax-ppl", { dim = 4, codes = 16, seed = 2 })):to(device)
        local optimizer = vx.optim.AdamW(model:parameters(), { lr = 3e-3 })
        local x = upload(H.generator(5)({ 2, 8, 8, 3 }, { grad = false }), device)
        local list = {}
        for step = 1, 6 do
          list[step] = vx.step(function()
            local y, q = model(x)
            assert.equal("f32", y:dtype())
            assert.equal("f32", q.quantized:dtype())
            assert.equal(setting, model.encoder[1](x):dtype())
            local loss = vx.mse(y, x)
            local total = loss + q.reg
            optimizer:zero_grad()
            total:backward()
            for _, p in ipairs(model:parameters()) do
              assert.same({ "f32", "f32" }, { p:dtype(), p.grad and p.grad:dtype() or "f32" })
            end
            optimizer:step()
            return loss:item()
          end)
        end
        return list
      end
      local exact, body = losses "f32", losses "bf16"
      assert.is_true(exact[6] < exact[1])
      for step = 1, 6 do
        assert.is_true(math.abs(body[step] - exact[step]) < 0.02 * exact[1],
          ("step %d: %g, %g"):format(step, exact[step], body[step]))
      end
      assert.is_true(body[6] ~= exact[6])
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
