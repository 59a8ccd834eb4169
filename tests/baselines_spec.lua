-- The remedies of others against float64 results of their published code: tests/golden/baselines/, of which each file's
-- metadata says the formula, the options and the release. Tolerances are those of the golden files.

local H = require "tests.helper"
local vx = H.vx
local ops = vx.ops

local FOLDER = "tests/golden/baselines"
local QUANTIZED, LOSS, GRADIENT, STATE = 1e-5, 5e-5, 1e-4, 1e-5

local used = {} -- files that a test has read

local function load(name)
  used[name] = true
  return vx.load(("%s/%s.safetensors"):format(FOLDER, name))
end

local function near(got, expected, tolerance, what)
  local e = H.relative_error(H.flat(got), H.flat(expected))
  assert.is_true(e <= tolerance, ("%s: relative error %.2e, allowed %.0e"):format(what, e, tolerance))
end

local function leaf(x)
  x = x:clone()
  x.requires_grad = true
  return x
end

--- Runs a quantizer in training on rows x: the output, and the rows' gradients of sum(upstream quantized) and of reg;
-- `parameters` get theirs as {name = {out =, loss =}}.
local function run(q, x, upstream, given)
  local gradients = {}
  local function backward(pick, kind)
    local z = leaf(x)
    q:zero_grad()
    local o = q:forward(z, given)
    local total = pick(o)
    if total.requires_grad then total:backward() end
    gradients[kind] = { x = z.grad or vx.zeros(x:shape()) }
    for _, p in ipairs(q:named_parameters()) do
      gradients[kind][p[1]] = (p[2].grad or vx.zeros(p[2]:shape())):clone()
    end
    return o
  end
  local learn = q.learn
  rawset(q, "learn", function() end) -- the first pass leaves averages alone
  backward(function(o) return o.reg end, "loss")
  rawset(q, "learn", learn)
  local o = backward(function(o) return ops.sum(ops.mul(o.quantized, upstream)) end, "out")
  return o, gradients
end

local function same_codes(o, indices, what) assert.same(H.flat(indices), H.flat(o.codes), what) end

describe("moving averages", function()
  for _, case in ipairs { { "ema", "ema-euclid", "ste" }, { "ema-rotation", "ema-euclid", "rotation" },
    { "ema-cosine", "ema-cosine", "ste" }, { "ema-cosine-rotation", "ema-cosine", "rotation" } } do
    for _, part in ipairs { "a", "b" } do
      local file, method, estimator = case[1] .. "-" .. part, case[2], case[3]
      it("agree over three steps and in evaluation: " .. file, function()
        local t = load(file)
        local M, D = t.embed_before:size(1), t.embed_before:size(2)
        local q = vx.quantizer(method, { dim = D, codes = M, estimator = estimator })
        q.codebook:copy(t.embed_before:reshape { 1, M, D })
        q.cluster_size:copy(t.cluster_size_before:reshape { 1, M })
        q.embed_avg:copy(t.embed_avg_before:reshape { 1, M, D })
        for step = 0, 2 do
          local upstream = t.upstream
          local o, g = run(q, t.x[step + 1], upstream)
          same_codes(o, t["indices_" .. step], file)
          near(o.quantized, t["quantized_" .. step], QUANTIZED, "quantized")
          near(o.reg, t["loss_" .. step], LOSS, "loss")
          near(g.out.x, t["grad_x_out_" .. step], GRADIENT, "gradient of the output")
          near(g.loss.x, t["grad_x_loss_" .. step], GRADIENT, "gradient of the loss")
        end
        -- the states named after_0 and after_1 are the last ones too in these files
        near(q.cluster_size, t.cluster_size_after_2, STATE, "cluster_size")
        near(q.embed_avg, t.embed_avg_after_2, STATE, "embed_avg")
        near(q.codebook, t.embed_after_2, STATE, "codebook")
        q:eval()
        local o = q:forward(t.x[1])
        same_codes(o, t.eval_indices, "eval")
        near(o.quantized, t.eval_quantized, QUANTIZED, "eval quantized")
      end)
    end
  end

  it("put rows of the batch in the place of dead codes", function()
    for _, part in ipairs { "a", "b" } do
      local t = load("ema-replace-" .. part)
      local M, D = t.embed_before:size(1), t.embed_before:size(2)
      local q = vx.quantizer("ema-euclid", { dim = D, codes = M, replace = "batch", threshold = 1 })
      q.codebook:copy(t.embed_before:reshape { 1, M, D })
      q.cluster_size:copy(t.cluster_size_before:reshape { 1, M })
      q.embed_avg:copy(t.embed_avg_before:reshape { 1, M, D })
      q.steps = 5 -- past the wait
      q.draw = function(_, n, count) -- the files take the first rows in order
        local first = {}
        for i = 1, math.min(n, count) do first[i] = i - 1 end
        return first
      end
      for step = 0, 2 do
        local o, g = run(q, t.x[step + 1], t.upstream)
        same_codes(o, t["indices_" .. step], part)
        near(o.quantized, t["quantized_" .. step], QUANTIZED, "quantized")
        near(g.loss.x, t["grad_x_loss_" .. step], GRADIENT, "gradient of the loss")
      end
      near(q.cluster_size, t.cluster_size_after_2, STATE, "cluster_size")
      near(q.embed_avg, t.embed_avg_after_2, STATE, "embed_avg")
      near(q.codebook, t.embed_after_2, STATE, "codebook")
    end
  end)

  it("say that a step has too few rows for the threshold, once", function()
    local said = H.child [[
      local vx = require "vertex"
      local q = vx.quantizer("ema-euclid", { dim = 4, codes = 16, replace = "batch", decay = 0.5 })
      local enough = vx.quantizer("ema-euclid", { dim = 4, codes = 16, replace = "batch", decay = 0.5 })
      for i = 1, 5 do q:forward(vx.randn { 24, 4 }) enough:forward(vx.randn { 32, 4 }) end]]
    assert.equal("ema-euclid: 24 rows a step for 16 codes, 1.5 for each: below the threshold of 2, so that codes in "
      .. "use are replaced again and again\n", said)
  end)

  it("replace no more codes than there are rows or codes in use, and not at once", function()
    for _, replace in ipairs { "batch", "used" } do
      local q = vx.quantizer("ema-cosine", { dim = 4, codes = 30, replace = replace, threshold = 1, decay = 0.5 })
      local z = vx.randn({ 5, 4 }, { generator = vx.generator(3) })
      local function changed(before)
        local now, n = q.codebook:reshape({ 30, 4 }):totable(), 0
        for i, row in ipairs(before) do n = n + (math.abs(row[1] - now[i][1]) > 1e-4 and 1 or 0) end
        return n
      end
      local before = q.codebook:reshape({ 30, 4 }):totable()
      q:forward(z)
      assert.is_true(changed(before) <= 5) -- the rows' own codes: the first step is too early to replace
      assert.is_true(q.cluster_size:min():item() < 1)
      before = q.codebook:reshape({ 30, 4 }):totable()
      q:forward(z)
      assert.is_true(changed(before) > 5 and changed(before) <= 10 + 5)
      H.close(H.flat(q.codebook:square():sum(3)), H.flat(vx.ones { 30 }), 1e-5, 0)
    end
  end)
end)

describe("simvq", function()
  for _, part in ipairs { "a", "b" } do
    for file, estimator in pairs { simvq = "ste", ["simvq-rotation"] = "rotation" } do
      it(("agrees: %s-%s"):format(file, part), function()
        local t = load(("%s-%s"):format(file, part))
        local M, D = t.frozen:size(1), t.frozen:size(2)
        local q = vx.quantizer("simvq", { dim = D, codes = M, estimator = estimator })
        q.frozen:copy(t.frozen:reshape { 1, M, D })
        q.weight:copy(t.weight)
        local o, g = run(q, t.x, t.upstream)
        same_codes(o, t.indices)
        near(q:stage_codebook(), t.codebook:reshape { 1, M, D }, QUANTIZED, "codebook")
        near(o.quantized, t.quantized, QUANTIZED, "quantized")
        near(o.reg, t.loss, LOSS, "loss")
        near(g.out.x, t.grad_x_out, GRADIENT, "gradient of the output")
        near(g.loss.x, t.grad_x_loss, GRADIENT, "gradient of the loss")
        near(g.loss.weight, t.grad_weight_loss, GRADIENT, "weight's gradient of the loss")
        near(g.out.weight, t.grad_weight_out, GRADIENT, "weight's gradient of the output")
        assert.same({ "weight" }, { q:named_parameters()[1][1] })
        assert.is_truthy(q:state_dict().frozen)
      end)
    end
  end
end)

describe("diveq", function()
  for _, file in ipairs { "diveq-a", "diveq-b", "diveq-zero-a", "diveq-zero-b" } do
    it("agrees: " .. file, function()
      local t, meta = load(file)
      local M, D = t.embed:size(1), t.embed:size(2)
      local variance = tonumber(meta.options:match '"variance": ([%d.e-]+)')
      local q = vx.quantizer("diveq", { dim = D, codes = M, variance = variance })
      q.codebook:copy(t.embed:reshape { 1, M, D })
      local o, g = run(q, t.x, t.upstream, { noise = t.noise })
      same_codes(o, t.indices)
      near(o.quantized, t.quantized, QUANTIZED, "quantized")
      near(o.reg, t.loss, LOSS, "loss")
      near(g.out.x, t.grad_x_out, GRADIENT, "gradient of the output")
      near(g.out.codebook, t.grad_embed_out:reshape { 1, M, D }, GRADIENT, "the codes' gradient")
      H.raises(function() q:forward(t.x, { noise = vx.zeros { 3, D } }) end, "noise", "(3,8)")
    end)
  end
end)

describe("entropy_weight of hard methods", function()
  --- weight (mean_n H(p_n) - H(mean_n p_n)) of rows and codes (nested tables) in float64 loops, the mean over groups.
  local function entropies(rows, books, weight, temperature, unit)
    local function normed(v)
      local s = 0
      for _, x in ipairs(v) do s = s + x * x end
      local out = {}
      for i, x in ipairs(v) do out[i] = unit and x / math.sqrt(s) or x end
      return out
    end
    local total = 0
    for g, book in ipairs(books) do
      local mean, of_rows, N = {}, 0, #rows
      for _, row in ipairs(rows) do
        local D, z, p, sum = #book[1], {}, {}, 0
        for d = 1, D do z[d] = row[(g - 1) * D + d] end
        z = normed(z)
        for m, code in ipairs(book) do
          local distance, e = 0, normed(code)
          for d = 1, D do distance = distance + (z[d] - e[d]) ^ 2 end
          p[m] = math.exp(-distance / temperature)
          sum = sum + p[m]
        end
        for m = 1, #book do
          p[m] = p[m] / sum
          of_rows = of_rows - p[m] * math.log(p[m]) / N
          mean[m] = (mean[m] or 0) + p[m] / N
        end
      end
      total = total + of_rows
      for _, p in ipairs(mean) do total = total + p * math.log(p) end
    end
    return weight * total / #books
  end

  for _, item in ipairs(vx.quantizers()) do
    if item.entropy and not item.base then
      it("is that of a float64 loop, with its gradients, and nothing where it is 0: " .. item.name, function()
        local options = { dim = 6, codes = 7, groups = 2, entropy_weight = 0.6, entropy_temperature = 0.8 }
        local z = vx.randn({ 20, 6 }, { generator = vx.generator(5) })
        local function book_of(q)
          local book = q:stage_codebook()
          return book:totable()
        end
        local q = vx.quantizer(item.name, options)
        local expected = entropies(z:totable(), book_of(q), 0.6, 0.8, item.metric == "cosine")
        local o = q:forward(z)
        near(o.terms.entropy, vx.tensor { expected }, 1e-5, "entropy")
        local sum = 0
        for _, term in pairs(o.terms) do sum = sum + term:item() end
        near(o.reg, vx.tensor { sum }, 1e-5, "reg")
        vx.gradcheck(function(x) return vx.quantizer(item.name, options):forward(x).terms.entropy end, { leaf(z) })
        options.entropy_weight = 0
        assert.is_nil(vx.quantizer(item.name, options):forward(z).terms.entropy)
        H.raises(function() vx.quantizer(item.name, { dim = 4, codes = 8, entropy_weight = -1 }) end,
          "entropy_weight is -1")
        H.raises(function() vx.quantizer(item.name, { dim = 4, codes = 8, entropy_temperature = 0 }) end,
          "entropy_temperature is 0")
      end)
    end
  end

  it("belongs to each stage of a residual method", function()
    local z = vx.randn({ 20, 4 }, { generator = vx.generator(6) })
    local options = { dim = 4, codes = 5, stages = 2 }
    local plain = vx.quantizer("rvq-ste-euclid", options):forward(z)
    options.entropy_weight = 1
    local q = vx.quantizer("rvq-ste-euclid", options)
    local o = q:forward(z)
    local first = entropies(z:totable(), q.stages[1]:stage_codebook():totable(), 1, 1, false)
    near(o.terms.stage_1 - plain.terms.stage_1, vx.tensor { first }, 1e-4, "stage 1")
  end)

  it("reaches the learned codes", function()
    for _, name in ipairs { "ste-euclid", "re-cosine", "diveq", "simvq" } do
      local q = vx.quantizer(name, { dim = 4, codes = 6, entropy_weight = 1 })
      q:forward(vx.randn({ 20, 4 }, { generator = vx.generator(7) })).terms.entropy:backward()
      local p = q:named_parameters()[1][2]
      assert.is_true(p.grad:abs():sum():item() > 0, name)
    end
  end)
end)

describe("sf-diveq", function()
  for _, file in ipairs { "sf-diveq-a", "sf-diveq-b" } do
    it("agrees: " .. file, function()
      local t, meta = load(file)
      local M, D = t.embed:size(1), t.embed:size(2)
      local variance = tonumber(meta.options:match '"variance": ([%d.e-]+)')
      local q = vx.quantizer("sf-diveq", { dim = D, codes = M, variance = variance })
      q.codebook:copy(t.embed:reshape { 1, M, D })
      local given = { noise = t.noise, noise_second = t.noise_second, share = t.share }
      local o, g = run(q, t.x, t.upstream, given)
      local share, ends = H.flat(t.share), {}
      for n, line in ipairs(H.flat(t.lines)) do ends[n] = line + (share[line + 1] > 0.5 and 1 or 0) end
      assert.same(ends, H.flat(o.codes)) -- the nearer end of the line
      near(o.quantized, t.quantized, QUANTIZED, "quantized")
      assert.equal(0, o.reg:item())
      near(g.out.x, t.grad_x_out, GRADIENT, "gradient of the output")
      near(g.out.codebook, t.grad_embed_out:reshape { 1, M, D }, GRADIENT, "the codes' gradient")
      H.raises(function() q:forward(t.x, { share = vx.zeros { M } }) end, "share", ("(%d)"):format(M),
        ("(1,%d)"):format(M - 1))
    end)
  end

  it("needs a second code, and gives the last one a share of the rows", function()
    H.raises(function() vx.quantizer("sf-diveq", { dim = 4, codes = 1 }) end, "codes is 1")
    local q = vx.quantizer("sf-diveq", { dim = 4, codes = 6, groups = 2 })
    local last = q.codebook:narrow(2, 6, 1):reshape { 1, 4 }
    local o = q:forward(last:detach(), { share = vx.full({ 2, 5 }, 0.875) })
    assert.same({ 5, 5 }, H.flat(o.codes))
  end)
end)

describe("fsq", function()
  local function files()
    local names = {}
    for file in require("lfs").dir(FOLDER) do
      names[#names + 1] = file:match "^(fsq%-.*)%.safetensors$"
    end
    table.sort(names)
    return names
  end
  for _, file in ipairs(files()) do
    it("agrees, in evaluation too: " .. file, function()
      local t, meta = load(file)
      local levels = {}
      for L in meta.options:match('"levels": %[(.-)%]'):gmatch "%d+" do levels[#levels + 1] = tonumber(L) end
      local q = vx.quantizer("fsq", { dim = #levels, levels = levels,
        symmetric = meta.options:find('"preserve_symmetry": true', 1, true) ~= nil })
      assert.same({}, q:state_dict())
      local o, g = run(q, t.x, t.upstream)
      same_codes(o, t.indices)
      near(o.quantized, t.quantized, QUANTIZED, "quantized")
      near(g.out.x, t.grad_x_out, GRADIENT, "gradient")
      assert.equal(0, o.reg:item())
      local M = t.codebook:size(1)
      near(q:decode(vx.arange(M):to("i32"):reshape { M, 1 }), t.codebook, QUANTIZED, "codebook")
      q:eval()
      o, g = run(q, t.x, t.upstream)
      same_codes(o, t.indices)
      near(g.out.x, t.grad_x_out, GRADIENT, "gradient in evaluation")
    end)
  end

  it("chooses levels for codes, projects rows of another width, refuses what does not multiply", function()
    local q = vx.quantizer("fsq", { dim = 32, codes = 256 })
    assert.same({ 8, 8, 4 }, q.options.levels)
    assert.same({ 32, 3 }, { q.project_in.weight:size(2), q.project_in.weight:size(1) })
    assert.equal(1000, vx.quantizer("fsq", { dim = 4 }).options.codes)
    local bad = vx.zeros { 5, 4 }
    bad[3][2] = 0 / 0
    H.raises(function() vx.quantizer("fsq", { dim = 4 }):forward(bad) end, "fsq", "row 2")
    H.raises(function() vx.quantizer("fsq", { dim = 4 }):encode(bad) end, "fsq", "row 2")
    H.raises(function() vx.quantizer("fsq", { dim = 4, codes = 1001, levels = { 8, 5, 5, 5 } }) end,
      "8 x 5 x 5 x 5", "1000", "1001")
    H.raises(function() vx.quantizer("fsq", { dim = 4, codes = 8196 }) end, "8196", "levels")
    H.raises(function() vx.quantizer("fsq", { dim = 4, levels = { 8, 1 } }) end, "levels[2] is 1")
    H.raises(function() vx.quantizer("fsq", { dim = 4, levels = 5 }) end, "levels are 5", "array")
  end)
end)

--- The number that a file's options give to a name.
local function option(meta, name) return tonumber(meta.options:match(('"%s": ([%%d.e-]+)'):format(name))) end

describe("lfq", function()
  for _, file in ipairs { "lfq-a", "lfq-b" } do
    it("agrees, in evaluation too: " .. file, function()
      local t, meta = load(file)
      local bits = option(meta, "bits")
      local function new(more)
        local o = { dim = bits, bits = bits, inv_temperature = option(meta, "inv_temperature"),
          entropy_weight = option(meta, "entropy_loss_weight"), diversity = option(meta, "diversity_gamma"),
          commitment = option(meta, "commitment_loss_weight") }
        for key, value in pairs(more or {}) do o[key] = value end
        return vx.quantizer("lfq", o)
      end
      local q = new()
      assert.same({}, q:state_dict())
      local o, g = run(q, t.x, t.upstream)
      same_codes(o, t.indices)
      near(o.quantized, t.quantized, 0, "quantized")
      near(o.reg, t.loss, LOSS, "loss")
      near(o.terms.commitment, t.commitment * q.options.commitment, LOSS, "commitment")
      near(g.out.x, t.grad_x_out, GRADIENT, "gradient of the output")
      near(g.loss.x, t.grad_x_loss, GRADIENT, "gradient of the loss")
      o, g = run(new { entropy_weight = 1, diversity = 0, commitment = 0 }, t.x, t.upstream)
      near(o.reg, t.per_sample_entropy, LOSS, "entropy of the rows")
      near(g.loss.x, t.grad_x_per_sample_entropy, GRADIENT, "gradient of the rows' entropy")
      q:eval()
      o, g = run(q, t.x, t.upstream)
      same_codes(o, t.indices)
      near(g.out.x, t.grad_x_out, GRADIENT, "gradient in evaluation")
      near(q:decode(t.indices:to("i32"):reshape { t.x:size(1), 1 }), t.quantized, 0, "decoded")
    end)
  end
end)

describe("bsq", function()
  for _, file in ipairs { "bsq-package-a", "bsq-package-b", "bsq-group-a", "bsq-group-b", "bsq-analytical-a",
    "bsq-analytical-b" } do
    it("agrees, in evaluation too: " .. file, function()
      local t, meta = load(file)
      local form = file:match "^bsq%-(%a+)"
      local o
      if form == "package" then
        o = { entropy_weight = option(meta, "entropy_loss_weight"), diversity = option(meta, "diversity_gamma"),
          commitment = option(meta, "commitment_loss_weight") }
      else
        o = { entropy_weight = option(meta, "zeta"), diversity = option(meta, "gamma"),
          commitment = option(meta, "beta"), group_size = option(meta, "group_size") }
      end
      o.dim, o.bits, o.form = t.x:size(2), option(meta, "bits"), form
      o.inv_temperature = option(meta, "inv_temperature")
      local q = vx.quantizer("bsq", o)
      assert.same({}, q:state_dict())
      local out, g = run(q, t.x, t.upstream)
      same_codes(out, t.indices)
      near(out.quantized, t.quantized, QUANTIZED, "quantized")
      near(out.reg, t.loss, LOSS, "loss")
      near(g.out.x, t.grad_x_out, GRADIENT, "gradient of the output")
      near(g.loss.x, t.grad_x_loss, GRADIENT, "gradient of the loss")
      q:eval()
      out, g = run(q, t.x, t.upstream)
      same_codes(out, t.indices)
      near(g.out.x, t.grad_x_out, GRADIENT, "gradient in evaluation")
      near(q:decode(t.indices:to("i32"):reshape { t.x:size(1), 1 }), t.quantized, QUANTIZED, "decoded")
    end)
  end
end)

describe("ibq", function()
  for _, file in ipairs { "ibq-a", "ibq-b" } do
    it("agrees: " .. file, function()
      local t, meta = load(file)
      local M, D = t.embed:size(1), t.embed:size(2)
      local function new(more)
        local o = { dim = D, codes = M, beta = option(meta, "beta"),
          entropy_temperature = option(meta, "entropy_temperature") }
        for key, value in pairs(more) do o[key] = value end
        local q = vx.quantizer("ibq", o)
        q.codebook:copy(t.embed:reshape { 1, M, D })
        return q
      end
      local q = new { entropy_weight = 0 }
      local o, g = run(q, t.x, t.upstream)
      same_codes(o, t.indices)
      near(o.quantized, t.quantized, QUANTIZED, "quantized")
      near(o.reg, t.quant_loss, LOSS, "quantization loss")
      near(g.out.x, t.grad_x_out, GRADIENT, "gradient of the output")
      near(g.out.codebook, t.grad_embed_out, GRADIENT, "the codes' gradient of the output")
      near(g.loss.x, t.grad_x_quant_loss, GRADIENT, "gradient of the loss")
      near(g.loss.codebook, t.grad_embed_quant_loss, GRADIENT, "the codes' gradient of the loss")
      o, g = run(new { entropy_weight = 0.3 }, t.x, t.upstream)
      near(o.terms.entropy, t.entropy_loss * 0.3, LOSS, "entropy loss")
      near(o.reg, t.quant_loss + t.entropy_loss * 0.3, LOSS, "loss")
      near(g.loss.x, t.grad_x_quant_loss + t.grad_x_entropy_loss * 0.3, GRADIENT, "gradient of both losses")
      near(g.loss.codebook, t.grad_embed_quant_loss + t.grad_embed_entropy_loss * 0.3, GRADIENT,
        "the codes' gradient of both losses")
    end)
  end
end)

describe("signs and products", function()
  local function slices(x, g) return x:narrow(2, 4 * g - 3, 4):contiguous() end

  it("take the mean over the groups", function()
    local x, upstream = vx.randn({ 30, 8 }, { generator = vx.generator(5) }),
      vx.randn({ 30, 8 }, { generator = vx.generator(6) })
    local few = { inv_temperature = 1, commitment = 0.3, entropy_temperature = 0.5 }
    for method, own in pairs { lfq = {}, bsq = {}, ["bsq group"] = { form = "group", group_size = 2 },
      ["bsq analytical"] = { form = "analytical", group_size = 2 }, ibq = {} } do
      local name = method:match "%a+"
      local function new(groups)
        local o = { dim = 4 * groups, codes = 16, groups = groups }
        for _, list in ipairs { few, own } do
          for key, value in pairs(list) do o[key] = value end
        end
        return vx.quantizer(name, o)
      end
      local both = new(2)
      local o, g = run(both, x, upstream)
      local reg, dloss, dout = 0, {}, {}
      for i = 1, 2 do
        local one = new(1)
        if one.codebook then one.codebook:copy(both.codebook:narrow(1, i, 1)) end
        local oi, gi = run(one, slices(x, i), slices(upstream, i))
        reg, dloss[i], dout[i] = reg + oi.reg:item() / 2, gi.loss.x * 0.5, gi.out.x
        assert.same(H.flat(oi.codes), H.flat(o.codes:narrow(2, i, 1)), method)
        near(slices(o.quantized, i), oi.quantized, QUANTIZED, method)
        if one.codebook then
          near(g.loss.codebook:narrow(1, i, 1), gi.loss.codebook * 0.5, GRADIENT, method)
          near(g.out.codebook:narrow(1, i, 1), gi.out.codebook, GRADIENT, method)
        end
      end
      near(o.reg, vx.tensor(reg), LOSS, method)
      near(g.loss.x, vx.cat(2, unpack(dloss)), GRADIENT, method .. ": gradient of the loss")
      near(g.out.x, vx.cat(2, unpack(dout)), GRADIENT, method .. ": gradient of the output")
    end
  end)

  it("know all codes' entropies at 2^17 codes, chunk by chunk and exactly", function()
    -- independent bits: the entropy of a row is the sum of its bits', and that of one row's mean is that row's
    local x = vx.randn({ 40, 17 }, { generator = vx.generator(7) })
    local z, w = leaf(x), leaf(x)
    local q = vx.quantizer("lfq", { dim = 17, inv_temperature = 0.2, diversity = 0, entropy_weight = 1 })
    assert.equal(2 ^ 17, q.options.codes)
    local o = q:forward(z)
    o.reg:backward()
    local p, rest = vx.sigmoid(w * 0.8), vx.sigmoid(w * -0.8)
    local expected = (p * p:log() + rest * rest:log()):sum() * (-1 / 40)
    expected:backward()
    near(o.reg, expected, LOSS, "entropy of the rows")
    near(z.grad, w.grad, GRADIENT, "its gradient")
    assert.is_true(expected:item() > math.log(1e5) - 2) -- near the package's ceiling
    local all = vx.zeros { 40, 17 }
    q = vx.quantizer("lfq", { dim = 17, diversity = 1, entropy_weight = 1 })
    assert.is_true(math.abs(q:forward(all).reg:item()) < 1e-4)
    q = vx.quantizer("lfq", { dim = 17, diversity = 2, entropy_weight = 1 })
    near(q:forward(all).reg, vx.tensor(-17 * math.log(2)), LOSS, "17 bits")
  end)

  it("project rows of another width", function()
    for _, name in ipairs { "lfq", "bsq" } do
      local q = vx.quantizer(name, { dim = 32, codes = 256 })
      assert.same({ 8, 8, 32 }, { q.options.bits, q.project_in.weight:size(1), q.project_in.weight:size(2) })
      assert.same({ 5, 32 }, q:forward(vx.randn { 5, 32 }).quantized:shape())
      assert.is_nil(vx.quantizer(name, { dim = 8, codes = 256 }).project_in)
      assert.same({ 4, 16 }, { vx.quantizer(name, { dim = 8, groups = 2 }).options.bits,
        vx.quantizer(name, { dim = 8, groups = 2 }).options.codes })
    end
    assert.equal(6, vx.quantizer("bsq", { dim = 12, form = "group" }).options.group_size)
    assert.equal(9, vx.quantizer("bsq", { dim = 18, form = "group" }).options.group_size)
  end)

  it("refuse what they cannot do", function()
    local bad = vx.zeros { 5, 4 }
    bad[3][2] = 0 / 0
    for _, name in ipairs { "lfq", "bsq", "ibq" } do
      local function new(more)
        local o = { dim = 4, codes = 16 }
        for key, value in pairs(more or {}) do o[key] = value end
        return vx.quantizer(name, o)
      end
      H.raises(function() new():forward(bad) end, name, "row 2")
      H.raises(function() new():encode(bad) end, name, "row 2")
      H.raises(function() new():decode(vx.full({ 5, 1 }, 16):to "i32") end, "16")
      H.raises(function() new { entropy_weight = -1 } end, "entropy_weight is -1")
      if name == "ibq" then
        H.raises(function() new { entropy_temperature = 0 } end, "entropy_temperature is 0")
        H.raises(function() new { beta = -1 } end, "beta is -1")
      else
        H.raises(function() new { codes = 1000 } end, name, "1000", "power of 2")
        H.raises(function() new { bits = 5 } end, name, "bits 5", "32", "16")
        H.raises(function() new { bits = 2.5 } end, "bits is 2.5")
        H.raises(function() new { inv_temperature = 0 } end, "inv_temperature is 0")
        H.raises(function() new { commitment = -1 } end, "commitment is -1")
        H.raises(function() new { diversity = -1 } end, "diversity is -1")
      end
    end
    H.raises(function() vx.quantizer("bsq", { dim = 8, form = "sphere" }) end, "'sphere'", "package or group")
    H.raises(function() vx.quantizer("bsq", { dim = 8, form = "group", group_size = 3 }) end, "bits 8", "3")
  end)
end)

describe("residual", function()
  for _, file in ipairs { "rvq-a", "rvq-b", "rvq-rotation-a", "rvq-rotation-b" } do
    it("agrees: " .. file, function()
      local t = load(file)
      local S, M, D = unpack(t.embed:shape())
      local function new(gradient)
        local q = vx.quantizer("rvq-euclid", { dim = D, codes = M, stages = S, gradient = gradient,
          estimator = file:find "rotation" and "rotation" or "ste" })
        for s = 1, S do
          q.stages[s].codebook:copy(t.embed[s]:reshape { 1, M, D })
          q.stages[s].embed_avg:copy(q.stages[s].codebook)
        end
        return q
      end
      local q = new "each"
      local o, g = run(q, t.x, t.upstream)
      same_codes(o, t.indices)
      near(o.quantized, t.quantized, QUANTIZED, "quantized")
      local losses = t.losses:totable()
      for s = 1, S do near(o.terms["stage_" .. s], vx.tensor(losses[s]), LOSS, "loss of stage " .. s) end
      near(o.reg, t.losses:sum(), LOSS, "loss")
      near(g.out.x, t.grad_x_out, GRADIENT, "gradient of the output")
      near(g.loss.x, t.grad_x_loss, GRADIENT, "gradient of the loss")
      for s = 1, S do
        near(q.stages[s].cluster_size, t.cluster_size_after[s], STATE, "cluster_size")
        near(q.stages[s].codebook, t.embed_after[s], STATE, "codebook")
      end
      assert.is_truthy(q:state_dict()["stages.1.embed_avg"])

      o, g = run(new "once", t.x, t.upstream)
      near(o.quantized, t.quantized, QUANTIZED, "quantized")
      near(g.loss.x, t.grad_x_loss, GRADIENT, "gradient of the loss")
      local first = vx.quantizer("ema-euclid", { dim = D, codes = M, estimator = q.options.estimator })
      first.codebook:copy(t.embed[1]:reshape { 1, M, D })
      local _, once = run(first, t.x, t.upstream)
      near(g.out.x, once.out.x, 1e-6, "gradient of the output, once")
      if first.options.estimator == "ste" then near(g.out.x, t.upstream, 1e-6, "straight through, once") end
    end)
  end

  -- by hand: stages of plain quantizers, each given what the ones before it left
  for _, name in ipairs { "softmax-knn-ce", "hgumbel-knn-l2", "sgumbel-ppl", "softmax-none", "ste-euclid", "re-cosine",
    "simvq", "diveq" } do
    it("is stages of " .. name, function()
      local S, N, G, D, M = 3, 40, 2, 3, 7
      local generator = vx.generator(11)
      local x, upstream = vx.randn({ N, G * D }, { generator = generator }),
        vx.randn({ N, G * D }, { generator = generator })
      local gumbel = vx.rand({ N, S * G, M }, { generator = generator })
      local noise = { gumbel = gumbel, noise = upstream }
      for _, gradient in ipairs { "each", "once" } do
        local q = vx.quantizer("rvq-" .. name, { dim = G * D, codes = M, groups = G, stages = S, gradient = gradient,
          k = 3, weight = 0.5 })
        local z = leaf(x)
        local o, g = run(q, x, upstream, noise)
        local rest, out, reg, codes = z, nil, nil, {}
        local parts, quantized = {}, nil
        for s = 1, S do
          local stage = q.stages[s]
          stage:zero_grad()
          local given = { gumbel = gumbel:narrow(2, (s - 1) * G + 1, G):contiguous(), noise = upstream }
          local y = stage:forward(rest, given)
          codes[s] = y.codes
          near(o.terms["stage_" .. s] or vx.zeros {}, y.reg * 0.5, LOSS, "loss")
          reg = reg and reg + y.reg or y.reg
          local apart = gradient == "once" and s > 1 and stage:forward(rest:detach(), given).quantized or y.quantized
          out = out and out + apart or apart
          quantized = quantized and quantized + y.quantized:detach() or y.quantized:detach()
          parts[s] = stage
          rest = rest - y.quantized:detach()
        end
        near(o.quantized, quantized, QUANTIZED, "quantized")
        assert.same(H.flat(vx.cat(2, unpack(codes))), H.flat(o.codes))
        vx.sum(out * upstream):backward()
        near(g.out.x, z.grad, 1e-6, "gradient of the output, " .. gradient)
        for _, p in ipairs(q:named_parameters()) do
          if p[2].grad then near(g.out[p[1]], p[2].grad, 1e-6, p[1]) end
        end
        if reg.requires_grad then
          q:zero_grad()
          local w = leaf(x)
          near(run(q, x, upstream, noise).reg, reg * 0.5, LOSS, "reg")
          local left, total = w, nil
          for s = 1, S do
            local y = parts[s]:forward(left, { gumbel = gumbel:narrow(2, (s - 1) * G + 1, G):contiguous() })
            total = total and total + y.reg or y.reg
            left = left - y.quantized:detach()
          end
          q:zero_grad()
          vx.sum(total * 0.5):backward()
          near(g.loss.x, w.grad, 1e-6, "gradient of the loss, " .. gradient)
        end
      end
    end)
  end

  it("draws the same noise for its output and its losses", function()
    local q = vx.quantizer("rvq-sgumbel-knn-ce", { dim = 4, codes = 6, k = 2, stages = 2 })
    local twin = vx.quantizer("rvq-sgumbel-knn-ce", { dim = 4, codes = 6, k = 2, stages = 2, gradient = "each" })
    local z = leaf(vx.randn({ 20, 4 }, { generator = vx.generator(3) }))
    for _ = 1, 2 do
      local a, b = q:forward(z), twin:forward(z)
      assert.equal(b.quantized:bytes(), a.quantized:bytes())
      assert.equal(b.reg:bytes(), a.reg:bytes())
    end
  end)

  it("goes over every hard or smoothed method of one stage, and over nothing else", function()
    local registry = require "vertex.quantizers"
    for _, item in ipairs(vx.quantizers()) do
      local over = registry.by_name["rvq-" .. item.name]
      if item.kind == "scalar" or item.base then
        assert.is_nil(over, item.name)
      else
        assert.same({ item.name, item.kind, item.metric or false }, { over.base, over.kind, over.metric or false })
        local o = vx.quantizer("rvq-" .. item.name, { dim = 4, codes = 6, k = 2, stages = 2 })
          :forward(vx.randn { 12, 4 })
        assert.same({ 12, 2 }, o.codes:shape())
      end
    end
    local listed = {}
    for _, name in ipairs(registry.names(true)) do listed[name] = true end
    assert.is_true(listed["rvq-euclid"] and listed["rvq-softmax-knn-ce"])
    assert.is_nil(listed["rvq-ste-euclid"])
    H.raises(function() vx.quantizer("rvq-euklid", { dim = 2, codes = 2 }) end, "did you mean 'rvq-euclid'")
  end)

  it("refuses what it cannot do", function()
    local function new(more)
      local o = { dim = 4, codes = 6 }
      for key, value in pairs(more) do o[key] = value end
      return vx.quantizer("rvq-euclid", o)
    end
    H.raises(function() new { stages = 0 } end, "stages is 0")
    H.raises(function() new { stages = 1.5 } end, "stages is 1.5")
    H.raises(function() new { gradient = "all" } end, "gradient is 'all'", "once or each")
    H.raises(function() new { decay = 1 } end, "decay is 1")
    local q = new { groups = 2, stages = 3 }
    H.raises(function() q:decode(vx.zeros({ 5, 4 }, { dtype = "i32" })) end, "(N,6)", "(5,4)")
    H.raises(function() q:decode(vx.full({ 5, 6 }, 6):to "i32") end, "6")
  end)
end)

describe("wasserstein", function()
  for _, part in ipairs { "a", "b" } do
    it("agrees with the published distance and its gradient: " .. part, function()
      local t = load("wasserstein-" .. part)
      local M, D = t.embed:size(1), t.embed:size(2)
      local function gradients(weight)
        local q = vx.quantizer("wasserstein", { dim = D, codes = M, distance_weight = weight })
        q.codebook:copy(t.embed:reshape { 1, M, D })
        local z = leaf(t.x)
        local o = q:forward(z)
        if weight > 0 then o.terms.distance:backward() end
        return q, o, z.grad, q.codebook.grad
      end
      local q, o, dz, dcodebook = gradients(1)
      near(o.terms.distance, t.published_loss, LOSS, "distance")
      near(dcodebook, t.grad_embed_published, GRADIENT, "gradient of the codebook")
      assert.is_nil(dz) -- the distance moves the codes alone
      assert.equal(t.x:size(1), q.queued)
      assert.equal(t.x:to("f32"):bytes(), q.queue:narrow(1, 1, t.x:size(1)):contiguous():bytes())
      local _, plain = gradients(0)
      local _, half = gradients(0.5)
      H.close({ half.reg:item() }, { plain.reg:item() + 0.5 * o.terms.distance:item() }, LOSS, 0)
    end)
  end

  local function rows(seed, n, width) return H.generator(seed)({ n, width }, { grad = false }) end

  it("takes past rows from the queue, the last ones alone, and after a load_state_dict too", function()
    local q = vx.quantizer("wasserstein", { dim = 4, codes = 12, queue = 50 })
    local x = { rows(1, 20, 4), rows(2, 20, 4), rows(3, 20, 4) }
    for i = 1, 2 do q:forward(x[i]) end
    local other = vx.quantizer("wasserstein", { dim = 4, codes = 12, queue = 50 })
    other:load_state_dict(q:state_dict())
    assert.equal(40, other.queued)
    local all = vx.quantizer("wasserstein", { dim = 4, codes = 12 }):forward(vx.cat(1, x[1], x[2], x[3]))
    local o = q:forward(x[3])
    assert.equal(all.terms.distance:item(), o.terms.distance:item())
    assert.equal(o.terms.distance:item(), other:forward(x[3]).terms.distance:item())
    assert.equal(60, q.queued)
    assert.equal(x[3]:narrow(1, 11, 10):contiguous():bytes(), q.queue:narrow(1, 1, 10):contiguous():bytes())
    local long = rows(4, 70, 4)
    q:forward(long) -- from place 10 on; the last 50 rows are what stays
    local seen, kept = {}, q.queue:totable()
    for _, row in ipairs(kept) do seen[table.concat(row, " ")] = true end
    for i, row in ipairs(long:totable()) do assert.equal(i > 20 or nil, seen[table.concat(row, " ")]) end
    local before = q.queue:bytes()
    q:eval():forward(x[1])
    q:train():freeze():forward(x[1])
    assert.equal(before, q.queue:bytes())
  end)

  it("is the mean over groups, and draws the codes to the rows", function()
    local x = rows(5, 60, 6)
    local q = vx.quantizer("wasserstein", { dim = 6, codes = 12, groups = 2, distance_weight = 1 })
    local sum = 0
    for g = 1, 2 do
      local one = vx.quantizer("wasserstein", { dim = 3, codes = 12, distance_weight = 1 })
      one.codebook:copy(q.codebook:narrow(1, g, 1))
      sum = sum + one:forward(x:narrow(2, 3 * g - 2, 3):contiguous()).terms.distance:item()
    end
    H.close({ q:forward(x).terms.distance:item() }, { sum / 2 }, 1e-5, 0)
    local optimizer, first, last = vx.optim.AdamW(q:parameters(), { weight_decay = 0 }), nil, nil
    for _ = 1, 100 do
      q:zero_grad()
      local term = q:forward(x).terms.distance
      term:backward()
      optimizer:step(0.02)
      first, last = first or term:item(), term:item()
    end
    assert.is_true(last < 0.1 * first, ("%g, at first %g"):format(last, first))
  end)

  it("names the package where LAPACK is not installed", function()
    local output, fine = H.child [[
      local ffi = require "ffi"
      local load = ffi.load
      ffi.load = function(name, ...)
        if name:find "lapack" then error "no such file" end
        return load(name, ...)
      end
      local vx = require "vertex"
      local q = vx.quantizer("wasserstein", { dim = 4, codes = 8 })
      q:forward(vx.randn { 10, 4 })]]
    assert.is_false(fine)
    assert.is_truthy(output:find("liblapack.so.3, Debian package liblapack3", 1, true), output)
  end)
end)

it("every file of baselines is held against a method", function()
  for file in require("lfs").dir(FOLDER) do
    local name = file:match "^(.*)%.safetensors$"
    if name then assert.is_true(used[name], name .. " is read by no test") end
  end
end)
