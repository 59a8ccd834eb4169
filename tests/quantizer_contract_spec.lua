-- The contract that every quantizer keeps, those of tests/fixtures/quantizers too: codes there and back, masks, what
-- evaluation and freeze() leave alone, terms, checkpoints. Values and gradients are in quantizer_spec.lua.

local H = require "tests.helper"
local vx = H.vx
local ops = vx.ops
local registry = require "vertex.quantizers"
local checkpoint = vx.runs.checkpoint

local FIXTURES = "tests/fixtures/quantizers"

registry.load_folder(FIXTURES)
local facts, names = {}, {}
for i, item in ipairs(registry.list) do facts[item.name], names[i] = item, item.name end
registry.unload_folder(FIXTURES) -- so that other specs do not meet them

-- A few dozen rows: two threads would wait for each other most of the time. That bits do not depend on them is in
-- ops_spec.lua and quantizer_spec.lua.
setup(function() vx.threads(1) end)
teardown(function() vx.threads(2) end)

local BITS = { lfq = true, bsq = true } -- methods whose codes are a power of 2

--- A quantizer of either.
local function quantizer(name, more)
  local o = { dim = 6, codes = BITS[name] and 8 or 10, k = 3, seed = 4, groups = 2 }
  for key, value in pairs(more or {}) do o[key] = value end
  registry.by_name[name] = facts[name]
  vx.seed(1)
  local ok, q = pcall(vx.quantizer, name, o)
  if facts[name].source:find(FIXTURES, 1, true) then registry.by_name[name] = nil end
  return ok and q or error(q, 0)
end

local function data(seed, shape) return H.generator(seed)(shape, { grad = false }) end

--- The bytes of all tensors of a module by name.
local function state(module)
  local bytes = {}
  for name, x in pairs(module:state_dict()) do bytes[name] = x:bytes() end
  return bytes
end

--- One training forward and backward: the output, and the gradients by name ("z" for the rows').
local function pass(q, z, given)
  z = z:clone()
  z.requires_grad = true
  local cotangent = data(77, { 400, 6 })
  q:zero_grad()
  local o = q:forward(z, given)
  local rows = ops.reshape(o.quantized, { -1, 6 })
  local n = rows:size(1)
  local weights = given and given.cotangent or ops.reshape(cotangent:narrow(1, 1, n), rows:shape())
  ops.add(ops.sum(ops.mul(rows, weights)), o.reg):backward()
  local gradients = { z = z.grad }
  for _, p in ipairs(q:named_parameters()) do gradients[p[1]] = p[2].grad end
  return o, gradients
end

describe("a refused step", function()
  it("draws no noise and is no step of a schedule", function()
    for _, name in ipairs { "hgumbel-knn-ce", "sgumbel-ppl", "softmax-dirichlet", "diveq", "rvq-hgumbel-knn-ce" } do
      local q = vx.quantizer(name, { dim = 6, codes = 10, k = 3 })
      local function counts()
        local list = {}
        q:visit(function(m)
          if rawget(m, "generator") then list[#list + 1] = { m.generator.drawn, m.steps } end
        end)
        return list
      end
      q(data(1, { 20, 6 }))
      local before, bad = counts(), data(2, { 20, 6 })
      bad[14][2] = 0 / 0
      H.raises(function() q(bad) end, "row 13")
      assert.same(before, counts(), name)
      q(data(1, { 20, 6 }))
      assert.are_not.same(before, counts(), name)
    end
  end)
end)

describe("under vx.autocast", function()
  for _, name in ipairs(names) do
    it(name .. " computes in float32, to the bit", function()
      finally(function() vx.autocast "f32" end)
      local function results(setting)
        vx.autocast(setting)
        local q, z = quantizer(name), data(5, { 60, 6 })
        local o, gradients = pass(q, z)
        local bytes = { y = o.quantized:bytes(), reg = o.reg:bytes(), codes = o.codes:bytes() }
        for key, g in pairs(gradients) do bytes["gradient of " .. key] = g:bytes() end
        for key, b in pairs(state(q)) do bytes[key] = b end
        q:eval()
        bytes.evaluated, bytes.decoded = q(z).quantized:bytes(), q:decode(q:encode(z)):bytes()
        if q.log_pi then bytes.log_pi = q:log_pi(ops.reshape(z, { 60, 2, 3 }), 1):bytes() end
        return bytes
      end
      local exact, under = results "f32", results "bf16"
      assert.equal("bf16", vx.autocast())
      for key, b in pairs(exact) do assert.is_true(b == under[key], key) end
      assert.equal("f32", quantizer(name)(data(5, { 60, 6 }):to "bf16").quantized:dtype())
    end)
  end
end)

describe("the fixtures", function()
  it("train in the sweep, and go on bit for bit after a kill", function()
    local folder = H.scratch "sweep-of-fixtures"
    local command = ("luajit experiments/ae_sweep.lua --device cpu --threads 1 --quiet --steps 8 --batch 4"
      .. " --checkpoint 0 --quantizers %s --methods levels,averages,residual-3 --out %s/"):format(FIXTURES, folder)
    local output, status = H.shell(("mkdir -p %s; %swhole"):format(folder, command))
    assert.equal(0, status, output)
    H.shell(("%skilled & pid=$!; until [ -e %s/killed/checkpoints/averages.safetensors ]; do kill -0 $pid || exit; "
      .. "sleep 0.01; done; kill -9 $pid; wait $pid"):format(command, folder))
    assert.is_nil(H.read(folder .. "/killed/table.md"))
    output, status = H.shell(command .. "killed --resume")
    assert.equal(0, status, output)
    for _, method in ipairs { "levels", "averages", "residual-3" } do
      local file = ("/checkpoints/%s.safetensors"):format(method)
      local whole, killed = vx.load(folder .. "/whole" .. file), vx.load(folder .. "/killed" .. file)
      for key, x in pairs(whole) do assert.equal(x:bytes(), killed[key]:bytes(), method .. ": " .. key) end
      assert.is_nil(method == "levels" and whole["model.quantizer.codebook"] or nil)
      assert.is_truthy(H.read(folder .. "/whole/results.csv"):find("\n" .. method .. ",", 1, true))
    end
  end)

  it("are files of 40 lines at most that use public names alone", function()
    for file in require("lfs").dir(FIXTURES) do
      if file:match "%.lua$" then
        local text = H.read(FIXTURES .. "/" .. file)
        local _, lines = text:gsub("\n", "")
        assert.is_true(lines <= 40, file .. " has " .. lines .. " lines")
        for module in text:gmatch 'require%s*%(?%s*["\']([^"\']+)' do assert.equal("vertex", module, file) end
        assert.is_nil(text:find("._h", 1, true))
      end
    end
  end)

  it("declare a scalar method without codebook, moving averages and three stages", function()
    assert.same({ "scalar", false }, { facts.levels.kind, facts.levels.codebook })
    assert.equal(3, facts["residual-3"].stages)
    assert.same({ rate = 0.5 }, facts["residual-3"].optimizer)
    local q = quantizer "averages"
    assert.same({}, q:parameters())
    assert.is_truthy(q:state_dict().codebook and q:state_dict().size and q:state_dict().sum)
  end)
end)

for _, name in ipairs(names) do
  describe(name, function()
    local fact = facts[name]

    it("gives codes of stages x groups columns, and decodes what it encodes", function()
      for _, groups in ipairs { 1, 2, 3 } do
        local q = quantizer(name, { groups = groups })
        local z = data(1, { 40, 6 })
        local columns = q.stage_count * groups
        assert.equal(columns, q.columns)
        local o = q:forward(z)
        assert.same({ 40, columns }, o.codes:shape())
        q:eval()
        local e, codes = q:forward(z), q:encode(z)
        assert.same({ 40, columns }, codes:shape())
        assert.equal("i32", codes:dtype())
        assert.equal(codes:bytes(), e.codes:bytes())
        assert.equal(e.quantized:bytes(), q:decode(codes):bytes())
        local numbers = codes:to "f32"
        assert.is_true(numbers:min():item() >= 0 and numbers:max():item() < q.options.codes)
        H.raises(function() q:decode(vx.zeros({ 4, columns + 1 }, { dtype = "i32" })) end, name,
          ("(N,%d)"):format(columns), ("(4,%d)"):format(columns + 1))
        for _, out in ipairs { -1, q.options.codes } do -- in the first group, whose neighbour has a row for it
          local wrong = { out }
          for i = 2, columns do wrong[i] = 0 end
          H.raises(function() q:decode(vx.tensor({ wrong }, { dtype = "i32" })) end, name,
            ("code %d is not in 0 .. %d"):format(out, q.options.codes - 1))
        end
      end
    end)

    it("has a codebook where it declares one, and nothing dead among its parameters", function()
      local q = quantizer(name)
      if fact.codebook then
        for stage = 1, q.stage_count do assert.same({ 2, q.options.codes, 3 }, q:stage_codebook(stage):shape()) end
      else
        assert.is_nil(q.codebook)
      end
      local _, gradients = pass(q, data(2, { 30, 6 }))
      for _, p in ipairs(q:named_parameters()) do
        assert.is_truthy(gradients[p[1]], p[1] .. " gets no gradient")
        assert.is_true(gradients[p[1]]:abs():max():item() > 0, p[1])
      end
    end)

    it("gives masked rows back, and the others the bits that they get alone", function()
      local shape, real = { 5, 9, 6 }, {}
      local z, mask = data(3, shape), vx.zeros({ 5, 9 }, { dtype = "u8" })
      local flags = {}
      for i = 1, 45 do
        flags[i] = (i * 7 % 10 < 6) and 1 or 0
        if flags[i] == 1 then real[#real + 1] = i - 1 end
      end
      mask:fromtable(flags)
      local index = vx.tensor(real, { dtype = "i32" })
      local function only(x) return ops.gather(ops.reshape(x, { 45, -1 }), index) end
      local noise = data(4, { 45, 2, 10 })
      local cotangent = data(5, { 45, 6 })
      local a, b = quantizer(name), quantizer(name)
      for step = 1, 2 do
        local fixed = step == 1 -- then with noise of their own
        local whole, dwhole = pass(a, z, { mask = mask, gumbel = fixed and noise or nil, cotangent = cotangent })
        local alone, dalone = pass(b, only(z), { cotangent = only(cotangent),
          gumbel = fixed and ops.reshape(only(noise), { #real, 2, 10 }) or nil })
        assert.same(shape, whole.quantized:shape())
        assert.equal(alone.quantized:bytes(), only(whole.quantized):bytes())
        assert.equal(alone.reg:bytes(), whole.reg:bytes())
        for term, x in pairs(alone.terms) do assert.equal(x:bytes(), whole.terms[term]:bytes(), term) end
        assert.same(alone.stats, whole.stats)
        assert.same(H.flat(alone.codes), H.flat(only(whole.codes:to "f32")))
        assert.same(H.flat(dalone.z), H.flat(only(dwhole.z)))
        for key, g in pairs(dalone) do
          if key ~= "z" then assert.equal(g:bytes(), dwhole[key]:bytes(), key) end
        end
        local codes, quantized, rows = whole.codes:totable(), whole.quantized:reshape({ 45, 6 }):totable(),
          z:reshape({ 45, 6 }):totable()
        local dz, cot = dwhole.z:reshape({ 45, 6 }):totable(), cotangent:totable()
        for i = 1, 45 do
          if flags[i] == 0 then
            for _, c in ipairs(codes[i]) do assert.equal(-1, c) end
            assert.same(rows[i], quantized[i])
            assert.same(cot[i], dz[i])
          end
        end
        assert.same(state(b), state(a))
      end
      a:eval()
      local e = a:forward(z, { mask = mask })
      assert.equal(b:eval():forward(only(z)).quantized:bytes(), only(e.quantized):bytes())
      -- a mask of ones is none
      assert.equal(a:forward(z).quantized:bytes(),
        a:forward(z, { mask = vx.ones({ 5, 9 }, { dtype = "u8" }) }).quantized:bytes())
    end)

    it("refuses masks that leave no row or do not fit", function()
      local q, z = quantizer(name), data(3, { 5, 9, 6 })
      H.raises(function() q:forward(z, { mask = vx.zeros({ 5, 9 }, { dtype = "u8" }) }) end, name, "leaves no row")
      H.raises(function() q:forward(z, { mask = vx.ones({ 45 }, { dtype = "u8" }) }) end, name, "(45)", "(5,9)")
      H.raises(function() q:forward(z, { mask = vx.ones { 5, 9 } }) end, name, "f32", "u8")
      H.raises(function() q:forward(z, { mask = true }) end, name, "boolean", "u8")
    end)

    it("leaves every tensor as it is in evaluation and when encoding", function()
      local q, z = quantizer(name), data(6, { 50, 6 })
      q:forward(z)
      local before, steps, drawn = state(q), q.steps, q.generator.drawn
      q:encode(z)
      q:eval()
      q:forward(z)
      q:decode(q:encode(z))
      assert.same(before, state(q))
      assert.same({ steps, drawn }, { q.steps, q.generator.drawn })
    end)

    it("does not change once frozen, and still gives rows their gradient", function()
      local free, q = quantizer(name), quantizer(name)
      local optimizer = #q:parameters() > 0 and vx.optim.AdamW(q:parameters(), { lr = 0.1, weight_decay = 0.1 })
      assert.equal(q, q:freeze())
      assert.same({}, q:parameters())
      local before, z = state(q), data(7, { 50, 6 })
      local o, g = pass(q, z)
      local expected, dz = pass(free, z)
      assert.equal(expected.quantized:bytes(), o.quantized:bytes())
      assert.equal(expected.reg:bytes(), o.reg:bytes())
      assert.equal(dz.z:bytes(), g.z:bytes())
      if optimizer then optimizer:step() end
      assert.same(before, state(q))
    end)

    it("names its losses: they sum to reg, with their weight and their gradients", function()
      local z = data(8, { 50, 6 })
      local function terms_of(weight)
        local q = quantizer(name, { weight = weight })
        local o, list = q:forward(z), {}
        for term, x in pairs(o.terms) do
          assert.same({}, x:shape())
          list[term] = x:item()
        end
        return list, o.reg:item()
      end
      local one, reg = terms_of(1)
      local sum = 0
      for _, x in pairs(one) do sum = sum + x end
      H.close({ sum }, { reg }, 1e-6, 1e-7)
      local three = terms_of(3)
      for term, x in pairs(one) do H.close({ three[term] }, { 3 * x }, 1e-6, 0) end

      local function gradients(total)
        local q = quantizer(name)
        local x = z:clone()
        x.requires_grad = true
        local loss = total(q:forward(x))
        if not (loss and loss.requires_grad) then return {} end
        loss:backward()
        local list = { z = x.grad and H.flat(x.grad) or nil }
        for _, p in ipairs(q:named_parameters()) do list[p[1]] = p[2].grad and H.flat(p[2].grad) or nil end
        return list
      end
      local whole = gradients(function(o) return o.reg end)
      local parts = gradients(function(o)
        local total
        for _, x in pairs(o.terms) do total = total and ops.add(total, x) or x end
        return total
      end)
      for key, g in pairs(whole) do
        local zero = true
        for _, x in ipairs(g) do zero = zero and x == 0 end
        if parts[key] or not zero then H.close(parts[key], g, 1e-5, 1e-7, key) end
      end
    end)

    it("goes on bit for bit from a checkpoint, with every option", function()
      local OTHER = { -- a value that is not the default
        dim = 8, codes = BITS[name] and 16 or 12, groups = 4, weight = 0.7, seed = 9, scale = 2, beta = 0.3,
        reduction = "mean", codebook_grad = false, tau = 0.2, k = 4, gumbel_tau = { from = 2, to = 0.5, steps = 3 },
        vertices = 5, shards = 2, scope = "world", precision = "bf16", variance = 0.01, alpha = 0.7, symmetric = true,
        stages = 3, gradient = "each", bits = 3, inv_temperature = 2, entropy_weight = 0.3, diversity = 0.5,
        form = "group", group_size = 1, entropy_temperature = 0.2, neighbour = 2,
        levels = name == "fsq" and { 5, 2 } or 3,
        start = fact.codebook and fact.class.starts and "kmeans" or "normal", warmup = 3, rate = 0.5,
        distance_weight = 0.8, queue = 50,
        decay = 0.7, eps = 1e-3, commitment = 0.3,
        estimator = "rotation", replace = "batch", threshold = 1.5,
      }
      local changed = { {} }
      for _, option in ipairs(fact.options) do
        assert.is_true(OTHER[option.name] ~= nil, "no other value of " .. option.name)
        changed[#changed + 1] = { [option.name] = OTHER[option.name], k = 4 }
      end
      local path = H.scratch(name .. ".checkpoint")
      for _, more in ipairs(changed) do
        if more.dim then more.groups = 2 elseif more.groups then more.dim = 8 else more.dim = 6 end
        local function new()
          local q = quantizer(name, more)
          local model = vx.nn.Sequential(vx.nn.Linear(5, more.dim), q)
          return { model = model, optimizer = vx.optim.AdamW(model:parameters(), { lr = 0.01 }) }
        end
        local function step(run, i)
          local o = run.model:forward(data(i, { 40, 5 }))
          ops.add(ops.sum(ops.square(o.quantized)), o.reg):backward()
          run.optimizer:step()
          run.optimizer:zero_grad()
          return o.quantized:bytes()
        end
        local run = new()
        for i = 1, 2 do step(run, i) end
        checkpoint.save(path, run, { step = 2 })
        local expected = { step(run, 3), step(run, 4) }
        local again = new()
        checkpoint.load(path, again)
        assert.same(expected, { step(again, 3), step(again, 4) })
        assert.same(state(run.model), state(again.model))
      end
    end)
  end)
end

describe("the nearest code", function()
  it("is found stage by stage, stage-major", function()
    local q = quantizer("residual-3", { groups = 2, codes = 7 })
    local z = data(9, { 30, 6 })
    local codes, rest = q:encode(z), z:reshape { 30, 2, 3 }
    local sum
    for s = 1, 3 do
      local book = q.codebook:narrow(1, 2 * s - 1, 2)
      local nearest = ops.assign(rest, book, "euclid")
      assert.same(H.flat(nearest), H.flat(codes:narrow(2, 2 * s - 1, 2)))
      local rows = q:take(book, nearest)
      rest, sum = rest - rows, sum and sum + rows or rows
    end
    H.close(H.flat(q:decode(codes)), H.flat(sum), 1e-6, 1e-7)
  end)
end)

describe("the losses of Eq. 10", function()
  it("reach the rows and the codes each on its own", function()
    for _, name in ipairs { "ste-euclid", "ste-cosine", "re-euclid", "re-cosine" } do
      local function gradients(pick)
        local q = quantizer(name, { beta = 0.3 })
        local z = data(10, { 30, 6 })
        z.requires_grad = true
        pick(q:forward(z)):backward()
        return z.grad and H.flat(z.grad), q.codebook.grad and H.flat(q.codebook.grad)
      end
      local dz, dcodebook = gradients(function(o) return o.reg end)
      local dz_only, nothing = gradients(function(o) return o.terms.commitment end)
      H.close(dz_only, dz, 1e-6, 1e-8, name)
      for _, g in ipairs(nothing or {}) do assert.equal(0, g) end
      local none, dcodebook_only = gradients(function(o) return o.terms.codebook end)
      H.close(dcodebook_only, dcodebook, 1e-6, 1e-8, name)
      for _, g in ipairs(none or {}) do assert.equal(0, g) end
      local q = quantizer(name, { beta = 0.3 })
      local o = q:forward(data(10, { 30, 6 }))
      H.close({ o.terms.commitment:item() / o.terms.codebook:item() }, { 0.3 }, 1e-6, 0)
    end
  end)
end)
