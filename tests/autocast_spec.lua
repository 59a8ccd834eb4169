-- vx.autocast "bf16": images in bf16 and products of factors rounded to bf16, on the CPU, on the emulator and on cuda:0
-- (`busted -t cuda`): what is rounded and what is not, values and gradients, training.

local H = require "tests.helper"
local device_cases = require "tests.device_cases"
local larger = require "tests.larger_cases"
local plot = require "vertex.plot"
local reference = require "tests.reference"
local vx = H.vx
local core = require "vertex.core"
local ops = vx.ops
local run, compare, bytes, upload = device_cases.run, device_cases.compare, device_cases.bytes, device_cases.upload

local function specs(device, tag)
  describe(device, function()
    it("rounds the factors of products to bf16 under vx.autocast" .. tag, function()
      finally(function()
        vx.autocast "f32"
        vx.device "cpu"
      end)
      vx.device "cpu"
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
      for i, args in ipairs(larger.attention(T)) do -- whose factors keep the 10 bits of TF32 on a GPU, all on a CPU
        vx.autocast "bf16"
        local got = run("attention", args, device, 30 + i)
        vx.autocast "f32"
        compare(got, run("attention", args, "cpu", 30 + i), "attention case " .. i, 1e-2)
        assert.equal(device == "cpu", got[1]:bytes() == run("attention", args, device, 30 + i)[1]:bytes())
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

    it("computes products of rounded factors as float64 does" .. tag, function()
      finally(function()
        vx.autocast "f32"
        vx.device "cpu"
      end)
      vx.device(device)
      local T = H.generator(41)
      for _, name in ipairs { "matmul", "linear", "conv1d", "conv2d", "conv3x3" } do
        for i, args in ipairs(larger[name](T)) do
          local given, exact = {}, {}
          for k, x in pairs(args) do
            given[k], exact[k] = x, x
            if vx.is_tensor(x) then
              given[k] = upload(x, device)
              exact[k] = reference.from(k < 3 and x:detach():to "bf16" or x) -- the bias is not rounded
            end
          end
          if name == "conv3x3" then given[4] = "f32" end
          vx.autocast "bf16"
          local y = ops[name](unpack(given, 1, 4))
          vx.autocast "f32"
          local expected = reference.list(reference.ops[name](unpack(exact, 1, 4)))
          H.close(H.flat(y:to "cpu"), expected, 0, 2e-6 * device_cases.largest(expected), name .. " case " .. i)
        end
      end
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
      for number, s in ipairs { { 2, 6, 5, 5, 6 }, { 2, 6, 5, 5, 3 }, { 2, 6, 5, 5, 70 }, { 1, 1, 1, 2, 1 },
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
        for k, kind in ipairs { { "f32", "bf16" }, { "bf16", "bf16" }, { "f32", "bf16", "f32" },
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
          if number % 5 == k - 1 then -- each at two of the shapes
            assert.same(bytes(got), bytes(results(input, w, setting, output, dy)), what .. ": the same bits twice")
          end
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
      H.raises(function() ops.silu(other) end, "unary: y (2,4,4,6) is bf16, expected f32")
      H.raises(function() ops.softmax(other) end, "softmax: ", "(32,6) is bf16, expected f32")
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
  end)
end

describe("autocast on the CPU", function()
  it("has the same bits for 1 and 2 threads, in bands and parts too", function()
    finally(function() vx.autocast "f32" end)
    local function results()
      vx.autocast "bf16"
      local T, list = H.generator(9), {}
      local function add(name, ...)
        local args, n = { ... }, select("#", ...)
        if args[1]:dim() == 4 then args[1] = args[1]:detach():to "bf16" end
        args[1].requires_grad = true
        local y = ops[name](unpack(args, 1, n))
        y:backward(T(y:shape(), { grad = false }):to(y:dtype()))
        list[#list + 1] = y:bytes()
        for i = 1, n do
          if vx.is_tensor(args[i]) and args[i].grad then list[#list + 1] = args[i].grad:bytes() end
        end
      end
      add("matmul", T { 33, 4099 }, T { 4099, 18 })
      add("linear", T { 900, 65 }, T { 70, 65 }, T { 70 })
      add("conv1d", T { 2, 211, 33 }, T { 48, 33, 3 }, nil, { stride = 2 })
      add("conv3x3", T { 2, 35, 9, 17 }, T { 3, 3, 17, 3 }, T { 3 })
      add("conv3x3", T { 1, 41, 8, 6 }, T { 3, 3, 6, 70 }, T { 70 })
      add("sepconv2d", T { 1, 260, 66, 64 }, T { 3, 3, 64 }, T { 8, 64 }, T { 8 }, T { 64 }, T { 64 }, nil,
        { groups = 4, activation = "silu" })
      add("add", T { 2, 40, 40, 9 }, T { 2, 40, 40, 9 }:detach():to "bf16")
      return list
    end
    H.same_bits(function() return H.with_threads(1, results) end, function() return H.with_threads(2, results) end)
  end)

  -- kernels/cpu/amx.h has the arithmetic: of each 32 products the first 16 and the others are summed apart
  for _, variant in ipairs(core.cpu_variants()) do
    if variant.runs and variant.name:find "^amx" then
      it("multiplies with the bits of AMX's tiles under VERTEX_SIMD=" .. H.tagged(variant.name), function()
        local out, ok = H.child([[
          local ffi = require "ffi"
          local H = require "tests.helper"
          local vx, T = H.vx, H.generator(3)
          local cell = ffi.new "float[1]"
          local function float(x) cell[0] = x return cell[0] end
          local count = 0
          for _, s in ipairs { { 20, 70, 21 }, { 33, 16, 40 }, { 1, 600, 5 } } do
            local a, b = T({ s[1], s[2] }, { grad = false }), T({ s[2], s[3] }, { grad = false })
            vx.autocast "bf16"
            local got, turned = vx.ops.matmul(a, b):totable(), vx.ops.matmul(b:t(), a:t()):totable()
            vx.autocast "f32"
            a, b = a:to("bf16"):totable(), b:to("bf16"):totable()
            for i = 1, s[1] do
              for j = 1, s[3] do
                local c, n, block = 0, 0, 0
                local blocks = math.ceil(s[2] / 256) -- of gemm.c, which adds them up in memory
                local length = math.ceil(s[2] / blocks)
                for first = 1, s[2], length do
                  local sum, last = 0, math.min(first + length - 1, s[2])
                  for k = first, last, 32 do
                    local even, odd = 0, 0
                    for p = k, k + 15 do
                      if p <= last then even = float(even + a[i][p] * b[p][j]) end
                      if p + 16 <= last then odd = float(odd + a[i][p + 16] * b[p + 16][j]) end
                    end
                    sum = float(sum + float(even + odd))
                  end
                  c = float(c + sum)
                end
                assert(got[i][j] == c, ("(%d,%d): %.9g, expected %.9g"):format(i, j, got[i][j], c))
                if s[2] <= 64 then assert(turned[j][i] == c, "transposed") end
                count = count + 1
              end
            end
          end
          print(count, vx.devices()[1].description)]], "VERTEX_SIMD=" .. variant.name)
        assert.is_true(ok, out)
        assert.is_truthy(out:find(("%d\t"):format(20 * 21 + 33 * 40 + 5), 1, true), out)
        assert.is_truthy(out:find(variant.name .. " kernels", 1, true), out)
      end)
    end
  end

  it("takes a function, and a gradient is computed as its op was", function()
    finally(function() vx.autocast "f32" end)
    local T = H.generator(13)
    local a, b, dy = T { 9, 40 }, T { 40, 7 }, T({ 9, 7 }, { grad = false })
    local function gradients(y)
      a.grad, b.grad = nil, nil
      y:backward(dy)
      return { y:bytes(), a.grad:bytes(), b.grad:bytes() }
    end
    local exact = gradients(ops.matmul(a, b))
    vx.autocast "bf16"
    local rounded = gradients(ops.matmul(a, b))
    for i = 1, 3 do assert.not_equal(exact[i], rounded[i]) end
    local y, word = vx.autocast("f32", function(...) return ops.matmul(...), vx.autocast() end, a, b)
    assert.same({ "f32", "bf16" }, { word, vx.autocast() })
    assert.same(exact, gradients(y))
    vx.autocast "f32"
    assert.same(rounded, gradients((vx.autocast("bf16", ops.matmul, a, b))))
    H.raises(function() vx.autocast("bf16", ops.matmul, a, a) end, "matmul: ")
    assert.same({ false, "as it is" }, { pcall(vx.autocast, "bf16", error, "as it is", 0) })
    assert.equal("f32", vx.autocast())
    coroutine.wrap(function()
      H.raises(function() vx.autocast("bf16", function() coroutine.yield() end) end,
        "autocast: a coroutine cannot yield inside of it")
    end)()
  end)

  it("leaves figures of merit and where points are drawn alone", function()
    finally(function() vx.autocast "f32" end)
    local T = H.generator(14)
    local logits, points = T({ 30, 50 }, { grad = false, low = -5, high = 5 }), T({ 40, 3 }, { grad = false })
    local function figures(setting)
      return vx.autocast(setting, function()
        local axes = plot.figure():simplex(1):scatter(vx.softmax(points))
        return { axes.layers[1].x[1], axes.layers[1].x[2], vx.metrics.inception_scores(30, { splits = 3 }):add(logits)
          :score() }
      end)
    end
    assert.same(figures "f32", figures "bf16")
  end)

  it("is the setting that a graph was recorded with", function()
    finally(function() vx.autocast "f32" end)
    local T = H.generator(10)
    local a, b = T({ 20, 30 }, { grad = false }), T({ 30, 7 }, { grad = false })
    local step = vx.graph(function() return ops.matmul(a, b) end)
    vx.autocast "bf16"
    local expected = ops.matmul(a, b):bytes()
    step:replay()
    assert.equal(expected, step:replay():bytes())
    vx.autocast "f32"
    assert.equal(expected, step:replay():bytes())
    assert.equal("f32", vx.autocast())
    assert.not_equal(expected, ops.matmul(a, b):bytes())
  end)

  it("adds what an image's gradient is so far in bf16, rounded once", function()
    finally(function() vx.autocast "f32" end)
    vx.autocast "bf16"
    local T, op = H.generator(22), ops.registry.sepconv2d
    for i, args in ipairs(larger.sepconv2d(T)) do
      args[1] = args[1]:detach():to "bf16"
      args[1].requires_grad = true
      if args[7] then args[7] = args[7]:detach():to "bf16" end
      local y = ops.sepconv2d(unpack(args, 1, 8))
      local dy = T(y:shape(), { grad = false }):to "bf16"
      local before = T(args[1]:shape(), { grad = false }):to "bf16"
      local dx, sum = op.backward(y._node.ctx, dy), op.backward(y._node.ctx, dy, nil, before)
      assert.same({ "bf16", "bf16" }, { dx:dtype(), sum:dtype() })
      local expected, largest = H.flat((before + dx):to "f32"), 0
      for _, v in ipairs(expected) do largest = math.max(largest, math.abs(v)) end
      H.close(H.flat(sum:to "f32"), expected, 2 ^ -7, 2 ^ -8 * largest, "case " .. i) -- dx was rounded once more
    end
  end)
end)

specs("cpu", "")
specs("emu:0", "")
if device_cases.gpu() then specs("cuda:0", " #cuda") end
