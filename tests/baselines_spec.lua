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

it("every file of baselines is held against a method", function()
  for file in require("lfs").dir(FOLDER) do
    local name = file:match "^(.*)%.safetensors$"
    if name then assert.is_true(used[name], name .. " is read by no test") end
  end
end)
