-- Quantizers: golden files, the ops behind them against their declared surrogates, encode and decode, noise,
-- statistics, options.

local H = require "tests.helper"
local R = require "tests.reference"
local check = require "tests.golden.check"
local vx = H.vx
local core = require "vertex.core"
local ops = vx.ops

local FOLDER = "tests/golden"
local names, facts = {}, {} -- facts by name; the baselines' values are in baselines_spec.lua
for _, item in ipairs(vx.quantizers()) do
  if item.table1 or item.ablation then names[#names + 1], facts[item.name] = item.name, item end
end

local KNN = { ["knn-l2"] = true, ["knn-ce"] = true } -- regularizers with neighbours

local function options(more)
  local o = { dim = 6, codes = 10, k = 3, seed = 4 }
  for key, value in pairs(more or {}) do o[key] = value end
  return o
end

local function data(seed, shape) return H.generator(seed)(shape, { grad = false }) end

-- -- Golden files -----------------------------------------------------------------------------------------------------

describe("golden file", function()
  local methods = {}
  for _, name in ipairs(check.files(FOLDER)) do
    methods[name:match "%.([%w%-]+)%.safetensors$"] = true
    it(name, function()
      local t, meta = vx.load(FOLDER .. "/" .. name)
      assert.equal(name:match "%.([%w%-]+)%.safetensors$", meta.method)
      local faults = check.differences(t, meta)
      assert.same({}, faults)
    end)
  end

  it("there is one for every quantizer", function()
    for _, name in ipairs(names) do assert.is_true(methods[name], "no golden file for " .. name) end
  end)

  it("a wrong number in one is noticed", function()
    local t, meta = vx.load(FOLDER .. "/small.softmax-knn-ce.safetensors")
    for _, key in ipairs { "quantized", "reg", "grad_z", "grad_codebook", "grad_log_tau" } do
      local kept = t[key]
      t[key] = kept * 1.01
      local faults = check.differences(t, meta)
      assert.equal(1, #faults)
      assert.is_truthy(faults[1]:find(key, 1, true))
      t[key] = kept
    end
    t.codes[48] = t.codes[48]:totable()[1] + 1
    assert.equal(1, #check.differences(t, meta))
  end)

  local in_use = core.devices()[1].description:match "(%S+) kernels"
  for _, variant in ipairs(core.cpu_variants()) do
    local simd = variant.name
    local title = "all of them in a process with VERTEX_SIMD=" .. H.tagged(simd)
    if variant.runs and simd ~= in_use then it(title, function()
      local out, ok = H.child([[
        package.loaded["tests.golden.check"] = nil
        arg = { [0] = "tests/golden/check.lua" }
        dofile "tests/golden/check.lua"]], "VERTEX_SIMD=" .. simd)
      assert.is_true(ok, out)
      assert.is_truthy(out:find("all agree", 1, true), out)
      assert.is_truthy(out:find(simd .. " kernels", 1, true), out)
      out, ok = H.shell(("VERTEX_SIMD=%s busted --filter wide.rows tests/quantizer_spec.lua 2>&1"):format(simd))
      assert.equal(0, ok, out)
      assert.is_truthy(out:find("2 successes", 1, true), out)
    end) end
  end
end)

-- -- The ops against their surrogates ---------------------------------------------------------------------------------

-- As in ops_spec: central differences of the float64 surrogate, h = 1e-5, whose own error is below 1e-9. The gradients
-- under test are float32 with logits up to 1 / tau = 7 and sums over rows and codes.
local STEP, VALUE, GRADIENT = 1e-5, 3e-6, 2e-5

-- gradients_agree(got, expected, i) holds argument i's gradient against the differences, in place of the tolerances.
local function against_surrogate(name, args, what, value, gradients_agree)
  local y, reg, codes = ops[name](unpack(args))
  local arrays = {}
  for i, x in ipairs(args) do arrays[i] = vx.is_tensor(x) and R.from(x) or x end
  local o = args[#args]
  local ro = {}
  for key, option in pairs(o) do ro[key] = option end
  if ro.noise then ro.noise = R.from(ro.noise) end
  if ro.vertices then ro.vertices = ro.vertices:totable() end
  arrays[#args] = ro
  local ry, rreg, rcodes, at = R.ops[name](unpack(arrays))
  H.close(H.flat(y), R.list(ry), VALUE, value or VALUE, what .. " y")
  H.close(H.flat(reg), R.list(rreg), 1e-5, 1e-5, what .. " reg")
  assert.same(R.list(rcodes), H.flat(codes), what)

  local cot = data(99, y:shape())
  local rcot, weight = R.from(cot), 0.7
  ops.add(ops.sum(ops.mul(y, cot)), ops.mul(ops.reshape(reg, {}), vx.tensor(weight))):backward()
  local rweight = R.from(vx.tensor(weight)).v[0]
  local function projected()
    local a, r = R.ops[name](arrays[1], arrays[2], arrays[3], arrays[4] or at, at)
    if #args == 3 then a, r = R.ops[name](arrays[1], arrays[2], arrays[3], at) end
    local sum = rweight * r.v[0]
    for i = 0, a.n - 1 do sum = sum + a.v[i] * rcot.v[i] end
    return sum
  end
  for i, x in ipairs(args) do
    if vx.is_tensor(x) then
      local a, numeric = arrays[i], {}
      for p = 0, a.n - 1 do
        local before = a.v[p]
        a.v[p] = before + STEP
        local high = projected()
        a.v[p] = before - STEP
        numeric[p + 1] = (high - projected()) / (2 * STEP)
        a.v[p] = before
      end
      if gradients_agree then gradients_agree(H.flat(x.grad), numeric, i)
      else H.close(H.flat(x.grad), numeric, GRADIENT, GRADIENT, what .. ": gradient of argument " .. i) end
      x.grad = nil
    end
  end
end

describe("quantize_hard", function()
  local number = 0
  for _, metric in ipairs { "euclid", "cosine" } do
    for _, estimator in ipairs { "ste", "rotation" } do
      for _, reduction in ipairs { "sum", "mean" } do
        for _, codebook_grad in ipairs { true, false } do
          number = number + 1
          local o = { metric = metric, estimator = estimator, beta = 0.3, reduction = reduction,
            codebook_grad = codebook_grad }
          local what = ("%s %s %s %s"):format(metric, estimator, reduction, codebook_grad and "" or "no codebook_grad")
          it("has the gradient it declares: " .. what, function()
            local T = H.generator(number)
            against_surrogate("quantize_hard", { T { 9, 2, 5 }, T { 2, 7, 5 }, o }, what)
            against_surrogate("quantize_hard", { T { 1, 1, 1 }, T({ 1, 3, 1 }, { low = 0.5 }), o }, what .. " D 1")
          end)
        end
      end
    end
  end

  it("stays finite for a row opposite to its code, and for zeros", function()
    for _, metric in ipairs { "euclid", "cosine" } do
      for _, estimator in ipairs { "ste", "rotation" } do
        local z = vx.tensor({ { { -1, 0, 0 } }, { { 0, 0, 0 } } }, { requires_grad = true })
        local book = vx.tensor({ { { 1, 0, 0 } } }, { requires_grad = true })
        local y, reg = ops.quantize_hard(z, book, { metric = metric, estimator = estimator, beta = 1, reduction = "sum",
          codebook_grad = true })
        ops.add(ops.sum(y), ops.sum(reg)):backward()
        for _, x in ipairs { y, reg, z.grad, book.grad } do assert.equal(0, (ops.nonfinite(x:reshape { 1, -1 }))) end
        -- the row of zeros has a large one: 1 / the guard of its norm
        assert.is_true(z.grad[1]:abs():max():item() < 100)
      end
    end
  end)
end)

-- What quantize_smooth leaves behind: y, soft (hgumbel) or y, and the tensors whose bits no precision changes.
local function smooth_outputs(z, book, log_tau, o, precision)
  local VX, N, G, M = core.VX, z:size(1), z:size(2), book:size(2)
  local new = function(shape, dtype) return vx.zeros(shape, { dtype = dtype }) end
  local knn = KNN[o.regularizer]
  local y, soft = new(z:shape()), o.sampler == "hgumbel" and new(z:shape()) or nil
  local t = { codes = new({ N, G }, "i32"), lse = new { N, G, 2 }, sumsq = new { N, G },
    near = knn and new({ G, M, o.k }, "i32") or nil,
    mean_pi = new { G, M }, reg = new { 1 }, max_p = new { 1 } }
  core.op.smooth_forward { y = y, codes = t.codes, lse = t.lse, sumsq = t.sumsq, soft = soft, near = t.near,
    mean_pi = t.mean_pi, reg = t.reg, max_p = t.max_p, z = z, codebook = book, log_tau = log_tau, noise = o.noise,
    sampler = ({ softmax = VX.SOFTMAX, sgumbel = VX.SOFT_GUMBEL, hgumbel = VX.HARD_GUMBEL })[o.sampler],
    regularizer = ({ none = VX.REG_NONE, ppl = VX.REG_PPL, ["knn-ce"] = VX.REG_KNN_CE,
      ["knn-l2"] = VX.REG_KNN_L2 })[o.regularizer],
    gumbel_tau = o.gumbel_tau, shards = o.shards, precision = precision == "bf16" and VX.BF16 or VX.F32, seed = o.seed,
    stream = o.stream }
  if o.sampler == "hgumbel" then t.y = y end -- a code, as stored
  return soft or y, t
end

local function squares(list)
  local sum = 0
  for i = 1, #list do sum = sum + list[i] ^ 2 end
  return sum
end

describe("quantize_smooth", function()
  local number = 0
  for _, sampler in ipairs { "softmax", "sgumbel", "hgumbel" } do
    for _, regularizer in ipairs { "none", "ppl", "knn-ce", "knn-l2" } do
      number = number + 1
      local seed = number
      it("has the gradient it declares: " .. sampler .. "-" .. regularizer, function()
        local T = H.generator(seed)
        local function o(N, G, M, more)
          local t = { sampler = sampler, regularizer = regularizer, k = 3, gumbel_tau = 0.8, shards = 1, seed = 3,
            stream = 4,
            noise = sampler ~= "softmax" and T({ N, G, M }, { low = -1, high = 3, grad = false }) or nil }
          for key, value in pairs(more or {}) do t[key] = value end
          return t
        end
        local log_tau = function() return vx.tensor({ math.log(0.15) }, { requires_grad = true }) end
        against_surrogate("quantize_smooth", { T { 13, 2, 4 }, T { 2, 6, 4 }, log_tau(), o(13, 2, 6) }, "groups")
        against_surrogate("quantize_smooth", { T { 14, 1, 3 }, T { 1, 5, 3 }, log_tau(), o(14, 1, 5, { shards = 3 }) },
          "shards")
        against_surrogate("quantize_smooth", { T { 5, 1, 17 }, T { 1, 67, 17 }, log_tau(), o(5, 1, 67) }, "two panels")
        local vertices = vx.tensor({ { 4, 0 }, { 1, 5 } }, { dtype = "i32" })
        against_surrogate("quantize_smooth",
          { T { 11, 2, 3 }, T { 2, 6, 3 }, log_tau(), o(11, 2, 6, { vertices = vertices }) }, "vertices")
      end)
    end
  end

  it("has the gradient it declares on wide rows", function()
    local T = H.generator(31)
    for _, D in ipairs { 32, 45, 70 } do -- where the variants with AMX tiles take them (kernels/cpu/amx.h)
      for _, sampler in ipairs { "softmax", "sgumbel", "hgumbel" } do
        for _, regularizer in ipairs { "ppl", "knn-ce", "knn-l2" } do
          against_surrogate("quantize_smooth", { T { 5, 1, D }, T { 1, 4, D },
            vx.tensor({ math.log(0.15) }, { requires_grad = true }),
            { sampler = sampler, regularizer = regularizer, k = 3, gumbel_tau = 0.8, shards = 1, seed = 3, stream = 4,
              noise = sampler ~= "softmax" and T({ 5, 1, 4 }, { low = -1, high = 3, grad = false }) or nil } },
            ("%s-%s D %d"):format(sampler, regularizer, D))
        end
      end
    end
  end)

  it("gives wide rows the mixture of float64, and assign their codes, in whole blocks and panels and more", function()
    for _, s in ipairs { { 101, 70, 33, 0.1 }, { 40, 130, 64, 0.003 }, { 97, 65, 150, 0.03 } } do
      local N, M, D, tau = unpack(s)
      local T = H.generator(N)
      local z, book = T { N, 1, D }, T { 1, M, D }
      local o = { sampler = "softmax", regularizer = "knn-ce", k = 3, gumbel_tau = 1, shards = 1, seed = 3, stream = 4 }
      local y, reg, codes = ops.quantize_smooth(z, book, vx.tensor { math.log(tau) }, o)
      local ry, rreg, rcodes = R.ops.quantize_smooth(R.from(z), R.from(book), R.from(vx.tensor { math.log(tau) }), o)
      H.close(H.flat(y), R.list(ry), 1e-6 / tau, 1e-6 / tau)
      H.close(H.flat(reg), R.list(rreg), 1e-5, 1e-5)
      assert.same(R.list(rcodes), H.flat(codes))
      assert.same(R.list(rcodes), H.flat(ops.assign(z, book, "cosine")))
      local _, _, nearest = R.ops.quantize_hard(R.from(z), R.from(book), { metric = "euclid", estimator = "ste",
        beta = 1, reduction = "sum", codebook_grad = true })
      assert.same(R.list(nearest), H.flat(ops.assign(z, book, "euclid")))
    end
  end)

  -- bfloat16 has 8 significant bits: a factor is off by at most 2^-8 of itself, a product by 2^-7 and a little. So y is
  -- off by at most 2^-7 sum_m p_m |q_m|, and |q| < 1 here. A gradient is a sum of products whose factor x is itself
  -- made of such a sum: up to 2^-6 in the norm; the worst of these cases is off by 1.0 %. That of log tau, a sum over
  -- all <dz^, z^>, is measured with the size of those.
  for _, sampler in ipairs { "softmax", "sgumbel", "hgumbel" } do
    for _, regularizer in ipairs { "none", "ppl", "knn-ce", "knn-l2" } do
      number = number + 1
      local seed = number
      it("keeps to bfloat16's rounding under precision bf16, and codes and neighbours to float32: " .. sampler .. "-"
        .. regularizer, function()
        for _, s in ipairs { { 5, 1, 67, 17 }, { 27, 2, 6, 10 } } do
          local T = H.generator(seed)
          local N, G, M, D = unpack(s)
          local z, book, log_tau = T { N, G, D }, T { G, M, D }, vx.tensor({ math.log(0.15) }, { requires_grad = true })
          local o = { sampler = sampler, regularizer = regularizer, k = 3, gumbel_tau = 0.8, shards = 1, seed = 3,
            stream = 4, precision = "bf16",
            noise = sampler ~= "softmax" and T({ N, G, M }, { low = -1, high = 3, grad = false }) or nil }
          local mixed, exact = smooth_outputs(z, book, log_tau, o, "f32")
          local rounded, same = smooth_outputs(z, book, log_tau, o, "bf16")
          for key, x in pairs(exact) do assert.same(H.flat(x), H.flat(same[key]), key) end
          H.close(H.flat(rounded), H.flat(mixed), 0, 2 ^ -7)
          assert.are_not.same(H.flat(rounded), H.flat(mixed)) -- or the option has no effect
          local length
          against_surrogate("quantize_smooth", { z, book, log_tau, o }, "bf16", 2 ^ -7, function(got, expected, i)
            if i == 1 then length = math.sqrt(squares(expected) * squares(H.flat(z))) end
            local e = i < 3 and H.relative_error(got, expected) or math.abs(got[1] - expected[1]) / length
            assert.is_true(e < 2 ^ -6, ("argument %d of %s: %.2e"):format(i, table.concat(s, " "), e))
          end)
        end
      end)
    end
  end

  it("is float32 under precision bf16 where rows are not wider than 8", function()
    local T = H.generator(3)
    local z, book, log_tau = T { 30, 1, 8 }, T { 1, 70, 8 }, vx.tensor { math.log(0.15) }
    for _, gumbel_tau in ipairs { 1, 0.5 } do
      local o = { sampler = "sgumbel", regularizer = "knn-ce", k = 3, gumbel_tau = gumbel_tau, shards = 1, seed = 3,
        stream = 4 }
      assert.same(H.flat((smooth_outputs(z, book, log_tau, o, "f32"))),
        H.flat((smooth_outputs(z, book, log_tau, o, "bf16"))))
    end
  end)

  it("has the same bits for 1 and 2 threads under precision bf16", function()
    local function run()
      local results = {}
      for _, s in ipairs { { 300, 1, 130, 17 }, { 150, 2, 70, 40 }, { 90, 1, 65, 150 } } do
        local T = H.generator(6)
        local z, book, log_tau = T { s[1], s[2], s[4] }, T { s[2], s[3], s[4] },
          vx.tensor({ math.log(0.1) }, { requires_grad = true })
        local y, reg = ops.quantize_smooth(z, book, log_tau,
          { sampler = "sgumbel", regularizer = "knn-l2", k = 3, gumbel_tau = 1, shards = 1, seed = 3, stream = 4,
            precision = "bf16" })
        ops.add(ops.sum(ops.mul(y, data(3, y:shape()))), ops.sum(reg)):backward()
        for _, x in ipairs { y, z.grad, book.grad, log_tau.grad } do results[#results + 1] = H.flat(x) end
      end
      return results
    end
    assert.same(H.with_threads(1, run), H.with_threads(2, run))
  end)

  it("reports the mean of pi and the mean of the largest p", function()
    local T = H.generator(8)
    local z, book, log_tau = T { 40, 2, 5 }, T { 2, 12, 5 }, vx.tensor { math.log(0.2) }
    for _, sampler in ipairs { "softmax", "sgumbel", "hgumbel" } do
      local noise = T({ 40, 2, 12 }, { grad = false })
      local o = { sampler = sampler, regularizer = "ppl", gumbel_tau = 1, shards = 1, seed = 1, stream = 1 }
      o.noise = sampler ~= "softmax" and noise or nil
      local _, _, _, mean_pi, max_p = ops.quantize_smooth(z, book, log_tau, o)
      local ro = { sampler = sampler, regularizer = "ppl", gumbel_tau = 1, noise = R.from(noise) }
      local _, _, _, _, mean, biggest = R.ops.quantize_smooth(R.from(z), R.from(book), R.from(log_tau), ro)
      H.close(H.flat(mean_pi), R.list(mean), 1e-5, 1e-7)
      H.close({ max_p:item() }, { biggest }, 1e-5, 0)
    end
  end)

  it("draws the Gumbel noise that rng.h lays out, in both passes", function()
    local N, G, M, D = 23, 2, 70, 5
    for _, sampler in ipairs { "sgumbel", "hgumbel" } do
      local results = {}
      for pass = 1, 2 do
        local T = H.generator(10)
        local z, book, log_tau = T { N, G, D }, T { G, M, D }, vx.tensor({ math.log(0.3) }, { requires_grad = true })
        local noise
        if pass == 2 then
          local g = R.gumbel(2 ^ 33 + 17, 2 ^ 32 + 5, N, G, M)
          noise = vx.empty({ N, G, M }):fromtable(R.list(g))
        end
        local y, reg, codes = ops.quantize_smooth(z, book, log_tau, { sampler = sampler, regularizer = "knn-ce", k = 3,
          gumbel_tau = 1.5, shards = 1,
          seed = 2 ^ 33 + 17, stream = 2 ^ 32 + 5, noise = noise })
        ops.add(ops.sum(ops.mul(y, data(3, y:shape()))), ops.sum(reg)):backward()
        results[pass] = { y = y, reg = reg, dz = z.grad, dbook = book.grad, dtau = log_tau.grad, codes = codes }
      end
      for key, value in pairs(results[1]) do
        local e = H.relative_error(H.flat(value), H.flat(results[2][key]))
        assert.is_true(e < 3e-6, ("%s %s: %.2e"):format(sampler, key, e))
      end
    end
  end)

  for _, name in ipairs { "sgumbel-none", "sgumbel-ppl", "sgumbel-knn-ce", "sgumbel-knn-l2" } do
    it("regenerates its own noise in backward: " .. name, function()
      local q = vx.quantizer(name, options { codes = 70, tau = 0.5 })
      local z = H.generator(5) { 30, 6 }
      local cot = data(6, { 30, 6 })
      local function loss()
        q.generator = core.generator(12) -- the same noise at every call
        local o = q:forward(z)
        return ops.sum(ops.mul(o.quantized, cot)), o.reg
      end
      local function value()
        return vx.no_grad(function()
          local a, b = loss()
          return a:item() + b:item()
        end)
      end
      local a, b = loss()
      ops.add(a, b):backward()
      -- central differences of the float32 loss along a direction: values near 5 are off by 3e-7, over 2 h = 0.02 that
      -- is 3e-5 of slope; truncation h^2 f''' is about 1e-4 of it
      local random = H.random(2)
      for _, x in ipairs { z, q.codebook, q.log_tau } do
        local g, direction, slope = H.flat(x.grad), {}, 0
        for i = 1, #g do
          direction[i] = g[i] + 0.2 * random:uniform(-1, 1) * math.abs(g[i])
          slope = slope + direction[i] ^ 2
        end
        local h, before = 0.01 / math.sqrt(slope), H.flat(x)
        slope = 0
        for i = 1, #g do slope = slope + g[i] * direction[i] * h / 0.01 end
        local function moved(s)
          local t = {}
          for i = 1, #g do t[i] = before[i] + s * h * direction[i] end
          x:detach():fromtable(t)
          return value()
        end
        local numeric = (moved(1) - moved(-1)) / 0.02
        x:detach():fromtable(before)
        H.close({ slope }, { numeric }, 2e-3, 1e-3, name)
      end
    end)
  end

  it("keeps to true float32 at sharp temperatures", function()
    -- tau 2e-4: exponents reach 5000; everything stays finite, rows sum to one, the code is the nearest
    local T = H.generator(11)
    local z, book = T { 50, 1, 3 }, T { 1, 300, 3 }
    local log_tau = vx.tensor({ math.log(2e-4) }, { requires_grad = true })
    local o = { sampler = "softmax", regularizer = "knn-ce", k = 2, gumbel_tau = 1, shards = 1, seed = 1, stream = 1 }
    local y, reg, codes = ops.quantize_smooth(z, book, log_tau, o)
    ops.add(ops.sum(y), ops.sum(reg)):backward()
    for _, x in ipairs { y, reg, z.grad, book.grad, log_tau.grad } do
      assert.equal(0, (ops.nonfinite(x:reshape { 1, -1 })))
    end
    assert.same(R.list(R.assign(R.from(z), R.from(book), "cosine")), H.flat(codes))
  end)
end)

-- -- Quantizers -------------------------------------------------------------------------------------------------------

describe("the registry", function()
  it("lists the paper's thirteen in the order of Table 1, then the ablations", function()
    assert.same({ "ste-euclid", "ste-cosine", "re-euclid", "re-cosine", "hgumbel-ppl", "hgumbel-knn-l2",
      "hgumbel-knn-ce", "sgumbel-ppl", "sgumbel-knn-l2",
      "sgumbel-knn-ce", "softmax-ppl", "softmax-knn-l2", "softmax-knn-ce", "hgumbel-none", "sgumbel-none",
        "softmax-none", "softmax-dirichlet",
      "softmax-pkl" }, names)
    for _, item in ipairs(vx.quantizers()) do
      assert.is_string(item.paper)
      assert.is_string(item.summary)
      for _, o in ipairs(item.options) do assert.is_true(#o.name > 0 and #o.meaning > 0) end
    end
  end)

  it("lists what each method declares", function()
    local function declared(name)
      local f = facts[name]
      return { f.kind, f.metric or "-", f.codebook, f.estimator or "-", f.sampler or "-", f.regularizer or "-",
        f.stages }
    end
    assert.same({ "hard", "euclid", true, "ste", "-", "-", 1 }, declared "ste-euclid")
    assert.same({ "hard", "cosine", true, "rotation", "-", "-", 1 }, declared "re-cosine")
    assert.same({ "smooth", "cosine", true, "-", "hgumbel", "knn-l2", 1 }, declared "hgumbel-knn-l2")
    assert.same({ "smooth", "cosine", true, "-", "softmax", "pkl", 1 }, declared "softmax-pkl")
    -- Appendix B.1: half the rate and no decay for the two Euclidean methods, and for them alone
    for _, name in ipairs(names) do
      local hint = facts[name].metric == "euclid" and { rate = 0.5, weight_decay = 0 } or {}
      assert.same(hint, facts[name].optimizer, name)
    end
  end)

  it("says what it knows when asked for something else", function()
    H.raises(function() vx.quantizer("softmax", { dim = 4, codes = 4 }) end, "'softmax'", "softmax-knn-ce",
      "ste-euclid")
    H.raises(function() vx.quantizer("softmax-ppl", { dim = 4, codes = 4, temperature = 1 }) end, "'temperature'",
      "tau", "gumbel_tau", "weight")
    H.raises(function() vx.quantizer "softmax-ppl" end, "dim", "codes")
    H.raises(function() vx.quantizer("softmax-ppl", { dim = 4 }) end, "codes")
    H.raises(function() vx.quantizer("softmax-ppl", { codes = 4 }) end, "dim")
    H.raises(function() vx.quantizer("ste-euclid", { dim = 4, codes = 0 }) end, "codes is 0")
    H.raises(function() vx.quantizer("ste-euclid", { dim = 5, codes = 4, groups = 2 }) end, "5", "2 groups")
    H.raises(function() vx.quantizer("ste-euclid", { dim = 4, codes = 4, beta = -1 }) end, "beta")
    H.raises(function() vx.quantizer("ste-euclid", { dim = 4, codes = 4, reduction = "max" }) end, "'max'", "sum",
      "mean")
    H.raises(function() vx.quantizer("softmax-ppl", { dim = 4, codes = 4, tau = 0 }) end, "tau")
    H.raises(function() vx.quantizer("softmax-ppl", { dim = 4, codes = 4, weight = 0 / 0 }) end, "weight")
    H.raises(function() vx.quantizer("softmax-knn-ce", { dim = 4, codes = 4, k = 3, shards = 2 }) end, "k 3",
      "2 shards")
    H.raises(function() vx.quantizer("softmax-knn-ce", { dim = 4, codes = 4, k = 0 }) end, "k is 0")
    H.raises(function() vx.quantizer("softmax-knn-ce", { dim = 4, codes = 4, vertices = 5 }) end, "5 of 4")
    H.raises(function() vx.quantizer("softmax-ppl", { dim = 4, codes = 4, precision = "f16" }) end, "precision",
      "'f16'", "f32 or bf16")
    H.raises(function() vx.quantizer("sgumbel-ppl",
      { dim = 4, codes = 4, gumbel_tau = { from = 2, to = 0, steps = 5 } }) end, "gumbel_tau.to")
    -- an option of another family is accepted: one table can serve a whole sweep
    assert.is_truthy(vx.quantizer("ste-euclid", { dim = 4, codes = 4, tau = 0.1, k = 8 }))
  end)

  it("takes a family from another folder", function()
    local registry = require "vertex.quantizers"
    local folder = H.scratch "families"
    assert(require("lfs").mkdir(folder))
    H.write(folder .. "/first.lua", [[
      local registry = require "vertex.quantizers"
      local ops = require "vertex.ops"
      local First = registry.Quantizer.extend "First"
      function First:quantize(z)
        local codes = self:nearest(z)
        return { quantized = self:lookup(codes), codes = codes, terms = { mse = ops.mse(z, self:lookup(codes)) } }
      end
      return { names = { { name = "first", summary = "a test" } }, paper = "none", kind = "hard",
        codebook = true, metric = "euclid", class = First } ]])
    local before = #vx.quantizers()
    assert.same({ "first" }, registry.load_folder(folder))
    assert.equal(before + 1, #vx.quantizers())
    local o = vx.quantizer("first", { dim = 3, codes = 4 }):forward(data(1, { 5, 3 }))
    assert.same({ 5, 3 }, o.quantized:shape())
    -- a file that was changed is read again, in place of what it was; another file cannot take its names
    H.write(folder .. "/first.lua", (H.read(folder .. "/first.lua"):gsub("a test", "another test")))
    registry.load_folder(folder)
    assert.same({ before + 1, "another test" }, { #vx.quantizers(), registry.by_name.first.summary })
    H.write(folder .. "/second.lua", H.read(folder .. "/first.lua"))
    H.raises(function() registry.load_folder(folder) end, "'first'", "second.lua", "exists", "first.lua")
    registry.unload_folder(folder)
    assert.same({ before, nil }, { #vx.quantizers(), registry.by_name.first })
  end)

  it("finds the methods that a family of another folder makes of others", function()
    local registry = require "vertex.quantizers"
    local folder = H.scratch "derived"
    assert(require("lfs").mkdir(folder))
    local text = [[
      local smooth = require "vertex.quantizers.smooth"
      return { names = { { name = "listed", base = "%s" } }, class = smooth.class, derive = function(item)
        if item.kind ~= "smooth" then return nil end
        return { name = "like-" .. item.name, base = item.name, summary = "as " .. item.name, paper = item.paper,
          kind = item.kind, codebook = true, metric = item.metric, sampler = item.sampler,
          regularizer = item.regularizer, options = item.options }
      end } ]]
    H.write(folder .. "/like.lua", text:format "nothing")
    H.raises(function() registry.load_folder(folder) end, "like.lua", "'listed'", "unknown method 'nothing'")
    H.write(folder .. "/like.lua", text:format "softmax-ppl")
    local before = #vx.quantizers()
    assert.same({ "listed" }, registry.load_folder(folder))
    assert.equal(before + 1, #vx.quantizers())
    assert.same({ "softmax-ppl", "as softmax-ppl" }, { registry.by_name.listed.base, registry.by_name.listed.summary })
    assert.is_nil(registry.by_name["like-ste-euclid"])
    assert.is_nil(registry.by_name["like-listed"])
    local z, o = data(1, { 12, 6 }), options { k = 2 }
    assert.equal(vx.quantizer("sgumbel-knn-ce", o):forward(z).quantized:bytes(),
      vx.quantizer("like-sgumbel-knn-ce", o):forward(z).quantized:bytes())
    -- without the method that it is listed with, the family would be unfinished: it is not taken
    H.write(folder .. "/like.lua", (text:format("softmax-ppl"):gsub("derive = function", "derive = 3 or function")))
    H.raises(function() registry.load_folder(folder) end, "like.lua", "derive", "number")
    registry.unload_folder(folder)
    assert.equal(before, #vx.quantizers())
    assert.is_nil(registry.by_name.listed or registry.by_name["like-softmax-ppl"])
  end)
end)

for _, name in ipairs(names) do
  describe(name, function()
    it("quantizes, encodes and decodes", function()
      for _, groups in ipairs { 1, 2, 3 } do
        local q = vx.quantizer(name, options { groups = groups })
        local z = data(1, { 40, 6 })
        local o = q:forward(z)
        assert.same({ 40, 6 }, o.quantized:shape())
        assert.same({}, o.reg:shape())
        assert.same({ 40, groups }, o.codes:shape())
        assert.equal("i32", o.codes:dtype())
        assert.same({ groups, 10, 6 / groups }, q.codebook:shape())
        -- evaluation: the nearest code, as the reference finds it; its quantized row is what decode gives
        q:eval()
        local metric = facts[name].metric
        local e = q:forward(z)
        assert.same(R.list(R.assign(R.from(z:reshape { 40, groups, -1 }), R.from(q.codebook), metric)), H.flat(e.codes))
        assert.same(H.flat(e.codes), H.flat(q:encode(z)))
        assert.equal(e.quantized:bytes(), q:decode(e.codes):bytes())
        assert.equal(0, e.reg:item())
        -- a quantized row is its own nearest code
        assert.same(H.flat(e.codes), H.flat(q:encode(e.quantized)))
      end
    end)

    it("gives the same bits for the same seed, on one thread and on two", function()
      local function run()
        local q = vx.quantizer(name, options { codes = 70, dim = 8, groups = 2 })
        local out = { q.codebook:bytes() }
        for step = 1, 2 do
          local z = H.generator(step) { 300, 8 }
          local o = q:forward(z)
          ops.add(ops.mse(o.quantized, vx.zeros { 300, 8 }), o.reg):backward()
          out[#out + 1] = o.quantized:bytes()
          out[#out + 1] = o.codes:bytes()
          out[#out + 1] = o.reg:bytes()
          for _, x in ipairs { z, unpack(q:parameters()) } do out[#out + 1] = x.grad:bytes() end
          q:zero_grad()
        end
        return out
      end
      H.same_bits(run)
      H.same_bits(function() return H.with_threads(1, run) end, function() return H.with_threads(2, run) end)
    end)

    it("takes any leading dimensions, refuses other widths and NaN", function()
      local q = vx.quantizer(name, options())
      q:eval()
      local z = data(2, { 4, 5, 3, 6 })
      local o = q:forward(z)
      assert.same({ 4, 5, 3, 6 }, o.quantized:shape())
      assert.same({ 60, 1 }, o.codes:shape())
      assert.equal(q:forward(z:reshape { 60, 6 }).quantized:bytes(), o.quantized:bytes())
      assert.same({ 6 }, q:forward(vx.ones { 6 }).quantized:shape())
      H.raises(function() q:forward(vx.zeros { 4, 5 }) end, name, "(4,5)", "width 6")
      H.raises(function() q:forward(vx.zeros { 0, 6 }) end, name, "(0,6)", "no rows")
      H.raises(function() q:forward(vx.zeros({ 4, 6 }, { dtype = "i32" })) end, name, "i32")
      H.raises(function() q:forward "z" end, "z is 'z', expected a tensor f32 (..., dim)")
      H.raises(function() q:decode(vx.zeros { 4, 1 }) end, name, "i32")
      H.raises(function() q:decode(vx.zeros({ 4, 2 }, { dtype = "i32" })) end, name, "(4,2)")
      H.raises(function() q:decode(vx.tensor({ { 3 }, { 10 } }, { dtype = "i32" })) end, "10", "0 .. 9")
      local bad = data(3, { 20, 6 })
      bad[14][2] = 0 / 0
      H.raises(function() q:forward(bad) end, "row 13")
      H.raises(function() q:encode(bad) end, "row 13")
      q:train()
      H.raises(function() q:forward(bad) end, "row 13")
      bad[14][2] = 1 / 0
      H.raises(function() q:forward(bad) end, "row 13")
      q:forward(data(3, { 20, 6 })) -- and goes on
    end)

    it("trains: the loss falls over 60 steps", function()
      vx.seed(1)
      local q = vx.quantizer(name, options { codes = 8 })
      local opt = vx.optim.AdamW(q:parameters(), { lr = 0.03, weight_decay = 0 })
      local x, total = data(4, { 64, 6 }), {}
      for step = 1, 60 do
        total[step] = vx.step(function()
          local o = q:forward(x)
          local l = ops.mse(o.quantized, x) + o.reg
          l:backward()
          opt:step()
          opt:zero_grad()
          return l:item()
        end)
      end
      local function mean(a, b)
        local s = 0
        for i = a, b do s = s + total[i] end
        return s / (b - a + 1)
      end
      assert.is_true(mean(51, 60) < mean(1, 10), ("%g, then %g"):format(mean(1, 10), mean(51, 60)))
    end)
  end)
end

describe("every quantizer", function()
  it("has sane statistics", function()
    for _, name in ipairs(names) do
      local q = vx.quantizer(name, options { groups = 2 })
      local s = q:forward(data(5, { 500, 6 })).stats
      assert.is_true(s.usage > 0 and s.usage <= 1)
      assert.is_true(s.code_perplexity >= 1 and s.code_perplexity <= 10.0001)
      assert.is_true(s.perplexity >= 1 and s.perplexity <= 10.0001)
      assert.is_true(s.max_p > 0.1 and s.max_p <= 1.00001)
      if facts[name].kind == "smooth" then H.close({ s.tau }, { 0.1 }, 1e-6, 0) else assert.is_nil(s.tau) end
    end
  end)

  it("has perplexity M where codes are used equally, and 1 where one is", function()
    local q = vx.quantizer("ste-euclid", { dim = 2, codes = 4 })
    q.codebook:copy(vx.tensor { { { 1, 0 }, { 0, 1 }, { -1, 0 }, { 0, -1 } } })
    local s = q:forward(vx.tensor { { 2, 0 }, { 0, 2 }, { -2, 0 }, { 0, -2 } }).stats
    H.close({ s.perplexity, s.code_perplexity, s.usage }, { 4, 4, 1 }, 1e-6, 0)
    s = q:forward(vx.tensor { { 2, 0 }, { 3, 0 } }).stats
    H.close({ s.perplexity, s.code_perplexity, s.usage }, { 1, 1, 0.25 }, 1e-6, 0)
    local smooth = vx.quantizer("softmax-ppl", { dim = 2, codes = 4, tau = 0.001 })
    smooth.codebook:copy(q.codebook)
    local o = smooth:forward(vx.tensor { { 2, 0 }, { 0, 2 }, { -2, 0 }, { 0, -2 } })
    H.close({ o.stats.perplexity, o.stats.max_p, o.stats.usage }, { 4, 1, 1 }, 1e-5, 0)
    H.close({ o.reg:item() }, { 0 }, 0, 1e-6)
  end)

  it("breaks ties to the lowest index", function()
    for _, name in ipairs(names) do
      local q = vx.quantizer(name, { dim = 2, codes = 5, k = 1 })
      q.codebook:copy(vx.tensor { { { -1, 0 }, { 1, 1 }, { 1, 1 }, { 1, 1 }, { 0, -1 } } })
      assert.same({ 1, 0, 4 }, H.flat(q:encode(vx.tensor { { 2, 2 }, { -3, 0 }, { 0, -2 } })), name)
    end
  end)

  it("refuses K > N and names both numbers", function()
    for _, name in ipairs(names) do
      if KNN[facts[name].regularizer] then
        local q = vx.quantizer(name, options { k = 8 })
        H.raises(function() q:forward(vx.randn { 7, 6 }) end, "8", "7")
        assert.is_truthy(q:forward(vx.randn { 8, 6 }).quantized)
        local parts = vx.quantizer(name, options { k = 8, shards = 4 })
        H.raises(function() parts:forward(vx.randn { 7, 6 }) end, "K = 2", "1 rows", "4 shards")
      else
        assert.is_truthy(vx.quantizer(name, options { k = 8 }):forward(vx.randn { 2, 6 }).quantized)
      end
    end
  end)

  it("weighs its regularizer", function()
    for _, name in ipairs(names) do
      local z = data(6, { 30, 6 })
      local function reg(weight) return vx.quantizer(name, options { weight = weight }):forward(z).reg:item() end
      local one = reg(1)
      H.close({ reg(2.5), reg(0) }, { 2.5 * one, 0 }, 1e-6, 1e-9, name)
      assert.equal(facts[name].regularizer == "none", one == 0)
    end
  end)

  it("works on its own slice of each row, group by group", function()
    for _, name in ipairs(names) do
      local q = vx.quantizer(name, options { dim = 8, groups = 2, k = 2 })
      local z = data(7, { 50, 8 })
      local noise = data(8, { 50, 2, 10 })
      local o = q:forward(z, { gumbel = noise })
      local reg = 0
      for g = 1, 2 do
        local one = vx.quantizer(name, options { dim = 4, k = 2 })
        one.codebook:copy(q.codebook:narrow(1, g, 1))
        local r = one:forward(z:narrow(2, 4 * g - 3, 4):contiguous(), { gumbel = noise:narrow(2, g, 1):contiguous() })
        H.close(H.flat(o.quantized:narrow(2, 4 * g - 3, 4)), H.flat(r.quantized), 1e-6, 1e-6, name)
        assert.same(H.flat(r.codes), H.flat(o.codes:narrow(2, g, 1)))
        reg = reg + r.reg:item() / 2
      end
      H.close({ o.reg:item() }, { reg }, 1e-5, 1e-6, name)
    end
  end)

  it("shows itself when printed", function()
    local q = vx.quantizer("softmax-knn-ce", options { groups = 2 })
    assert.is_truthy(tostring(q):find("softmax-knn-ce, dim 6, 2 x 10 codes", 1, true))
    assert.is_truthy(tostring(q):find("61 parameters", 1, true))
  end)
end)

describe("Gumbel quantizers", function()
  it("draw new noise at every step and none in evaluation", function()
    local q = vx.quantizer("sgumbel-ppl", options())
    local z = data(9, { 30, 6 })
    local a, b = q:forward(z).quantized:bytes(), q:forward(z).quantized:bytes()
    assert.not_equal(a, b)
    q:eval()
    assert.equal(q:forward(z).quantized:bytes(), q:forward(z).quantized:bytes())
  end)

  it("use the noise they are given, of its shape only", function()
    local q = vx.quantizer("hgumbel-ppl", options())
    local z = data(9, { 3, 6 })
    local noise = vx.zeros { 3, 1, 10 }
    for i = 1, 3 do noise[i][1][2 * i] = 1000 end
    assert.same({ 1, 3, 5 }, H.flat(q:forward(z, { gumbel = noise }).codes))
    H.raises(function() q:forward(z, { gumbel = vx.zeros { 3, 1, 9 } }) end, "gumbel", "(3,1,9)", "(3,1,10)")
    H.raises(function() q:forward(z, { gumbel = 5 }) end, "gumbel", "number")
  end)

  it("follow the schedule of the Gumbel temperature", function()
    local q = vx.quantizer("sgumbel-none", options { gumbel_tau = { from = 2, to = 0.5, steps = 4 } })
    local seen = {}
    for step = 1, 6 do
      q:forward(data(step, { 10, 6 }))
      seen[step] = q:gumbel_tau()
    end
    H.close(seen, { 2, 2 ^ 0.5, 1, 0.5 ^ 0.5, 0.5, 0.5 }, 1e-9, 0)
    q:eval()
    q:forward(data(1, { 10, 6 }))
    assert.equal(6, q.steps)
  end)

  it("become sharper at lower Gumbel temperature", function()
    local z, noise = data(9, { 100, 6 }), data(10, { 100, 1, 10 })
    local function sharpness(t)
      return vx.quantizer("sgumbel-none", options { gumbel_tau = t }):forward(z, { gumbel = noise }).stats.max_p
    end
    assert.is_true(sharpness(0.1) > sharpness(1) and sharpness(1) > sharpness(5))
  end)
end)

describe("a subset of vertices", function()
  it("is drawn anew each step, without repetition, and all of them is all", function()
    local z = data(11, { 40, 6 })
    local q = vx.quantizer("softmax-knn-ce", options { vertices = 3, groups = 2 })
    local a, b = q:forward(z).reg:item(), q:forward(z).reg:item()
    assert.not_equal(a, b)
    local whole = vx.quantizer("softmax-knn-ce", options { groups = 2 }):forward(z).reg:item()
    local all = vx.quantizer("softmax-knn-ce", options { groups = 2, vertices = 10 }):forward(z).reg:item()
    H.close({ all }, { whole }, 1e-6, 0)
    -- as a share of the codes
    local codes = options().codes
    for share, count in pairs { [0.3] = math.floor(0.3 * codes + 0.5), [1e-6] = 1 } do
      local by_share = vx.quantizer("softmax-knn-ce", options { vertices = share }):forward(z).reg:item()
      if count > 1 then
        assert.equal(vx.quantizer("softmax-knn-ce", options { vertices = count }):forward(z).reg:item(), by_share)
      end
    end
    assert.equal(whole, vx.quantizer("softmax-knn-ce", options { groups = 2, vertices = 1 }):forward(z).reg:item())
    H.raises(function() vx.quantizer("softmax-knn-ce", options { vertices = 2.5 }) end, "vertices is 2.5",
      "expected an integer")
    -- the mean over subsets is the whole
    local sum, many = 0, vx.quantizer("softmax-knn-ce", options { vertices = 5 })
    for _ = 1, 400 do sum = sum + vx.step(function() return many:forward(z).reg:item() end) end
    local full = vx.quantizer("softmax-knn-ce", options()):forward(z).reg:item()
    H.close({ sum / 400 }, { full }, 0.05, 0)
  end)
end)

describe("Section 5.2's alternatives", function()
  it("are 0 where the fit is the prior, and rise on either side of it", function()
    -- codes whose probabilities are the prior's own draws: cosines are what they are, so the points come through log_pi
    local M, reg = 5, {}
    local q = vx.quantizer("softmax-dirichlet", { dim = 4, codes = M, alpha = 0.5 })
    for i, alpha in ipairs { 0.2, 0.5, 1.25 } do
      q.log_pi = function()
        return vx.simplex.dirichlet(alpha, 4000, { dim = M, log = true, generator = vx.generator(i) })
      end
      reg[i] = q:forward(data(1, { 4000, 4 })).reg:item()
    end
    assert.is_true(reg[2] < 1e-3 and reg[1] > 0.1 and reg[3] > 0.1, table.concat(reg, " "))
    local expected = vx.simplex.kl(0.5, { 1.25, 1.25, 1.25, 1.25, 1.25 }):item() / M
    H.close({ reg[3] }, { expected }, 0.05, 0)
  end)

  it("estimate the divergence per dimension", function()
    local M, prior = 3, vx.simplex.dirichlet(2, 3000, { dim = 3, generator = vx.generator(1) })
    local q = vx.quantizer("softmax-pkl", { dim = 4, codes = M, alpha = 2, neighbour = 3 })
    q.log_pi = function() return vx.simplex.dirichlet(1, 3000, { dim = M, log = true, generator = vx.generator(2) }) end
    local expected = vx.simplex.kl(2, { 1, 1, 1 }):item() / 2
    H.close({ q:forward(data(1, { 3000, 4 })).reg:item(),
      q:forward(data(1, { 3000, 4 }), { prior = prior }).reg:item() }, { expected, expected }, 0, 0.03)
  end)

  it("draw a new prior's sample each step, the same for the same seed", function()
    local z = data(2, { 40, 6 })
    local a, b = vx.quantizer("softmax-pkl", options()), vx.quantizer("softmax-pkl", options())
    local first, second = a:forward(z).reg:item(), a:forward(z).reg:item()
    assert.not_equal(first, second)
    assert.same({ first, second }, { b:forward(z).reg:item(), b:forward(z).reg:item() })
  end)

  it("stay finite in full collapse, with gradients", function()
    for _, name in ipairs { "softmax-dirichlet", "softmax-pkl" } do
      local q = vx.quantizer(name, options())
      local z = vx.ones { 30, 6 } -- all rows one point
      z.requires_grad = true
      local o = q:forward(z)
      o.reg:backward()
      assert.is_true(o.reg:item() < math.huge and o.reg:item() == o.reg:item(), name)
      for _, x in ipairs { z, q.codebook, q.log_tau } do
        assert.equal(0, (ops.nonfinite(x.grad:reshape { 1, -1 })), name)
        assert.is_true(x.grad:abs():max():item() > 0, name)
      end
    end
  end)

  it("refuse what they cannot work with", function()
    for _, name in ipairs { "softmax-dirichlet", "softmax-pkl" } do
      H.raises(function() vx.quantizer(name, options { codes = 1 }) end, "codes is 1", "2 or more")
      H.raises(function() vx.quantizer(name, options { alpha = 0 }) end, "alpha is 0")
      H.raises(function() vx.quantizer(name, options { tau = -1 }) end, "tau is -1")
    end
    H.raises(function() vx.quantizer("softmax-pkl", options { neighbour = 0 }) end, "neighbour is 0")
    H.raises(function() vx.quantizer("softmax-pkl", options { neighbour = 4 }):forward(data(3, { 4, 6 })) end, "4 rows",
      "neighbour = 4")
    H.raises(function() vx.quantizer("softmax-pkl", options()):forward(data(3, { 4, 6 }),
      { prior = vx.full({ 8, 4 }, 0.25) }) end, "(8,4)", "(4,10)")
  end)
end)

describe("state", function()
  it("moves to another quantizer of the same shape", function()
    for _, name in ipairs(names) do
      local a, b = vx.quantizer(name, options { seed = 1 }), vx.quantizer(name, options { seed = 2 })
      assert.not_equal(a.codebook:bytes(), b.codebook:bytes())
      local path = H.scratch(name .. ".safetensors")
      vx.save(path, a:state_dict())
      b:load_state_dict((vx.load(path)))
      assert.equal(a.codebook:bytes(), b.codebook:bytes())
      local z = data(12, { 20, 6 })
      assert.equal(a:encode(z):bytes(), b:encode(z):bytes())
      assert.equal(facts[name].kind == "smooth" and 61 or 60, a:parameter_count())
    end
  end)

  it("exempts the temperature from weight decay, not the codebook", function()
    local q = vx.quantizer("softmax-ppl", options())
    assert.is_true(q.log_tau.no_decay)
    assert.is_falsy(q.codebook.no_decay)
    H.close({ q.log_tau:item() }, { math.log(0.1) }, 1e-6, 0)
  end)
end)

describe("entropy_weight of the smoothed methods", function()
  it("adds mean H(pi) - H(mean pi), with the gradients of the whole matrix of pi", function()
    for _, name in ipairs { "softmax-knn-ce", "sgumbel-ppl", "softmax-none" } do
      local z = data(31, { 40, 6 })
      --- reg and the gradients of it, by the option or from log pi itself.
      local function pass(weight, more)
        local q = vx.quantizer(name, { dim = 6, codes = 9, groups = 2, k = 3, tau = 0.3, entropy_weight = weight })
        local x = z:clone()
        x.requires_grad = true
        local o = q:forward(x)
        local loss = o.reg:reshape { 1 }
        for g = 1, more and 2 or 0 do
          local log_pi = q:log_pi(x:reshape { 40, 2, 3 }, g)
          local pi = log_pi:exp()
          local mean = pi:mean(1)
          local rows, of_mean = (pi * log_pi):sum() * (-1 / 40), (mean * mean:log()):sum() * -1
          loss = loss + ((rows - of_mean) * (more / 2)):reshape { 1 }
        end
        if loss.requires_grad then loss:backward() end
        local values = { loss = loss:item(), z = x.grad and H.flat(x.grad) or nil }
        for _, p in ipairs(q:named_parameters()) do values[p[1]] = p[2].grad and H.flat(p[2].grad) or nil end
        return values, o
      end
      local got, o = pass(0.7)
      local expected = pass(nil, 0.7)
      H.close({ got.loss }, { expected.loss }, 1e-5, 1e-6, name)
      for _, key in ipairs { "z", "codebook", "log_tau" } do H.close(got[key], expected[key], 1e-4, 1e-6, key) end
      assert.is_true(o.terms.entropy:item() < 0) -- Jensen: the mean's entropy is the larger one
      local _, plain = pass(0)
      assert.is_nil(plain.terms.entropy)
    end
    H.raises(function() vx.quantizer("softmax-none", { dim = 4, codes = 8, entropy_weight = -1 }) end,
      "entropy_weight is -1")
  end)
end)
