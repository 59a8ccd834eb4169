-- The options start, warmup and rate of quantizers: where codes begin, steps without quantization, a learning rate of
-- their own; and that nothing begins again once a checkpoint or a state was loaded.

local H = require "tests.helper"
local vx = H.vx
local ops = vx.ops
local checkpoint = vx.runs.checkpoint

local function data(seed, shape) return H.generator(seed)(shape, { grad = false }) end

local function quantizer(name, more)
  local o = { dim = 6, codes = 10, k = 3, seed = 4 }
  for key, value in pairs(more or {}) do o[key] = value end
  return vx.quantizer(name, o)
end

--- The bytes of each row of a tensor (N,D).
local function rows_of(x)
  local rows = {}
  for i = 1, x:size(1) do rows[i] = x[i]:contiguous():bytes() end
  return rows
end

local function distinct(rows)
  local seen, count = {}, 0
  for _, row in ipairs(rows) do
    if not seen[row] then seen[row], count = true, count + 1 end
  end
  return count
end

local METHODS = { "ste-euclid", "ste-cosine", "re-euclid", "softmax-knn-ce", "hgumbel-ppl", "softmax-pkl", "ema-euclid",
  "ema-cosine", "diveq", "rvq-euclid" }

describe("start", function()
  it("data takes rows of the first training batch, each once", function()
    for _, name in ipairs { "softmax-knn-ce", "diveq", "ste-euclid" } do
      local q, z, known = quantizer(name, { start = "data", groups = 2 }), data(1, { 40, 6 }), {}
      q:start_from(z:reshape { 40, 2, 3 })
      for g = 1, 2 do
        for _, row in ipairs(rows_of(z:reshape({ 40, 2, 3 }):select(2, g):contiguous())) do known[row] = g end
        local codes = rows_of(q.codebook[g])
        assert.equal(10, distinct(codes))
        for _, code in ipairs(codes) do assert.equal(g, known[code], name) end
      end
    end
  end)

  it("kmeans gives vx.kmeans of the first training batch, before anything is learned from it", function()
    local z = data(2, { 60, 6 })
    for _, name in ipairs { "ste-euclid", "softmax-knn-ce" } do
      local q = quantizer(name, { start = "kmeans" })
      local o = q:forward(z)
      assert.equal(vx.kmeans(z, 10, { seed = 4 }).codebook:bytes(), q.codebook:bytes(), name)
      local same = quantizer(name)
      same.codebook:copy(q.codebook)
      same.generator.drawn = 0
      assert.equal(same:encode(z):bytes(), o.codes:bytes())
    end
  end)

  it("changes nothing where it is normal, and happens once, in training", function()
    for _, name in ipairs(METHODS) do
      local q, plain = quantizer(name, { start = "kmeans" }), quantizer(name)
      for key, x in pairs(plain:state_dict()) do assert.equal(x:bytes(), q:state_dict()[key]:bytes(), name .. key) end
      q:eval():forward(data(3, { 30, 6 }))
      for key, x in pairs(plain:state_dict()) do assert.equal(x:bytes(), q:state_dict()[key]:bytes(), name .. key) end
      assert.is_false(q.started)
      rawset(q, "learn", function() end)
      q:train():forward(data(3, { 30, 6 }))
      local first = q:stage_codebook():bytes()
      assert.are_not.equal(plain:stage_codebook():bytes(), first, name)
      q:forward(data(4, { 30, 6 }))
      assert.equal(first, q:stage_codebook():bytes(), name)
    end
  end)

  it("puts the codes of hard methods under cosine on the sphere, moving averages along with them", function()
    for _, name in ipairs { "ste-cosine", "re-cosine", "ema-cosine" } do
      for _, how in ipairs { "data", "kmeans" } do
        local q = quantizer(name, { start = how })
        q:start_from(ops.reshape(data(5, { 30, 6 }), { 30, 1, 6 }))
        for _, length in ipairs(H.flat(ops.sqrt(ops.sum(ops.square(q.codebook), 3)))) do
          assert.is_true(math.abs(length - 1) < 1e-5, name)
        end
        if q.embed_avg then assert.equal(q.codebook:bytes(), q.embed_avg:bytes()) end
      end
    end
  end)

  it("fits each stage to what the stages before it left", function()
    local z = data(6, { 80, 6 })
    local q = quantizer("rvq-euclid", { start = "kmeans", stages = 3 })
    q:start_from(z:reshape { 80, 1, 6 })
    local rest, before = z, math.huge
    for s = 1, 3 do
      local found = vx.kmeans(rest, 10, { seed = 4 + s - 1 })
      assert.equal(found.codebook:bytes(), q:stage_codebook(s):bytes(), "stage " .. s)
      assert.equal(q.stages[s].codebook:bytes(), q.stages[s].embed_avg:bytes())
      local rows = rest:reshape { 80, 1, 6 }
      rest = (rows - q:lookup(q:nearest(rows, s), s)):reshape { 80, 6 }
      local error = rest:square():sum():item()
      assert.is_true(error < before)
      before = error
    end
  end)

  it("makes distinct codes of fewer rows than codes, none at 0, and says so once", function()
    for _, how in ipairs { "data", "kmeans" } do
      local program = ([[
        local vx = require "vertex"
        local q = vx.quantizer("ste-euclid", { dim = 4, codes = 16, start = "%s", groups = 2 })
        for step = 1, 3 do q:forward(vx.randn { 5, 4 }) end
        local seen = {}
        for g = 1, 2 do
          for m = 1, 16 do
            local code = q.codebook[g][m]
            assert(code:abs():max():item() > 0, "a code at 0")
            assert(not seen[code:contiguous():bytes()], "two codes are equal")
            seen[code:contiguous():bytes()] = true
          end
        end
        print "fine"]]):format(how)
      local output = H.child(program)
      local _, said = output:gsub("ste%-euclid: 5 rows to start 16 codes from", "")
      assert.equal(1, said, output)
      assert.is_truthy(output:find("fine", 1, true), output)
    end
  end)

  it("counts masked rows nowhere", function()
    local z, mask = data(7, { 40, 6 }), vx.zeros({ 40 }, { dtype = "u8" })
    local flags = {}
    for i = 1, 40 do flags[i] = i <= 25 and 1 or 0 end
    mask:fromtable(flags)
    local q, alone = quantizer("ste-euclid", { start = "kmeans" }), quantizer("ste-euclid", { start = "kmeans" })
    q:forward(z, { mask = mask })
    alone:forward(z:narrow(1, 1, 25))
    assert.equal(alone.codebook:bytes(), q.codebook:bytes())
  end)

  it("is refused by name where there is nothing to fit, where it is unknown, and for NaN", function()
    H.raises(function() quantizer("fsq", { codes = 64, start = "data" }) end, "fsq", "start", "'data'", "no codebook")
    H.raises(function() quantizer("simvq", { start = "kmeans" }) end, "simvq", "start", "'kmeans'")
    H.raises(function() quantizer("ste-euclid", { start = "means" }) end, "start", "'means'", "kmeans")
    H.raises(function() quantizer("ste-euclid", { warmup = -1 }) end, "warmup", "-1")
    H.raises(function() quantizer("ste-euclid", { warmup = 0.5 }) end, "warmup", "0.5")
    H.raises(function() quantizer("ste-euclid", { rate = 0 }) end, "rate", "0")
    local q, z = quantizer("ste-euclid", { start = "kmeans" }), data(8, { 20, 6 })
    z:narrow(1, 3, 1):fill(0 / 0)
    local ok, message = pcall(q.forward, q, z)
    assert.is_false(ok)
    assert.is_truthy(message:find("NaN", 1, true), message)
    assert.is_false(q.started)
  end)
end)

describe("warmup", function()
  it("passes rows and their gradient, without a loss, and then starts from the batch after", function()
    for _, name in ipairs(METHODS) do
      local q = quantizer(name, { warmup = 2, start = "data" })
      local before = q:stage_codebook():bytes()
      for step = 1, 2 do
        local z = data(step, { 5, 4, 6 })
        z.requires_grad = true
        local o = q:forward(z)
        assert.is_true(o.warming)
        assert.equal(z:bytes(), o.quantized:bytes())
        assert.same({ 5, 4, 6 }, o.quantized:shape())
        assert.equal(0, o.reg:item())
        assert.same({}, o.terms)
        assert.same({}, o.stats)
        assert.same({ 20, q.columns }, o.codes:shape())
        assert.equal(-1, o.codes:to("f32"):max():item())
        local cotangent = data(9, { 5, 4, 6 })
        ops.add(ops.sum(ops.mul(o.quantized, cotangent)), o.reg):backward()
        assert.equal(cotangent:bytes(), z.grad:bytes())
        assert.equal(before, q:stage_codebook():bytes())
        assert.equal(0, q.steps)
      end
      local z = data(3, { 20, 6 })
      rawset(q, "learn", function() end)
      local o = q:forward(z)
      assert.is_nil(o.warming)
      assert.equal(1, q.steps)
      local other = quantizer(name, { start = "data" })
      rawset(other, "learn", function() end)
      assert.equal(other:forward(z).codes:bytes(), o.codes:bytes(), name)
      assert.equal(other:stage_codebook():bytes(), q:stage_codebook():bytes(), name)
    end
  end)

  it("does without a codebook too, and goes together with a mask", function()
    local q, z = quantizer("fsq", { codes = 64, warmup = 1 }), data(1, { 8, 6 })
    local mask = vx.full({ 8 }, 1, { dtype = "u8" })
    mask:narrow(1, 2, 3):zero()
    local o = q:forward(z, { mask = mask })
    assert.equal(z:bytes(), o.quantized:bytes())
    assert.equal(-1, o.codes:to("f32"):max():item())
    assert.is_nil(q:forward(z).warming)
  end)

  it("ends with freeze(), and cannot be recorded", function()
    local q = quantizer("ste-euclid", { warmup = 5, start = "data" })
    assert.is_false(q.graphs)
    assert.is_true(quantizer("ste-euclid").graphs)
    local before = q.codebook:bytes()
    q:freeze()
    assert.is_nil(q:forward(data(1, { 20, 6 })).warming)
    assert.equal(before, q.codebook:bytes())
  end)
end)

describe("a checkpoint", function()
  --- Trains steps first .. last of a linear layer and a quantizer; returns the state's bytes.
  local function train(model, optimizer, first, last)
    for step = first, last do
      vx.step(function()
        local x = data(100 + step, { 30, 6 })
        local o = model.quantizer(model.layer(x))
        optimizer:zero_grad()
        local loss = ops.add(ops.mse(o.quantized, x), o.reg)
        loss:backward()
        optimizer:step(1e-2)
      end)
    end
    local bytes = {}
    for name, x in pairs(model:state_dict()) do bytes[name] = x:bytes() end
    return bytes
  end

  local Model = vx.nn.module "StartModel"
  function Model:init(name, options)
    self.layer, self.quantizer = vx.nn.Linear(6, 6), quantizer(name, options)
  end

  local function make(name, options)
    vx.seed(3)
    local model = Model(name, options)
    return model, vx.optim.AdamW(model:parameters())
  end

  it("goes on bit for bit from the middle of the warm-up, and after the start", function()
    for _, name in ipairs(METHODS) do
      for _, options in ipairs { { warmup = 4, start = "kmeans" }, { start = "data", rate = 0.5 }, { warmup = 3 } } do
        local model, optimizer = make(name, options)
        local whole = train(model, optimizer, 1, 8)
        for _, at in ipairs { 2, 4, 6 } do
          local path = H.scratch("start") .. ".safetensors"
          model, optimizer = make(name, options)
          train(model, optimizer, 1, at)
          checkpoint.save(path, { model = model, optimizer = optimizer }, {})
          model, optimizer = make(name, options)
          checkpoint.load(path, { model = model, optimizer = optimizer })
          assert.same(whole, train(model, optimizer, at + 1, 8), ("%s from step %d"):format(name, at))
        end
      end
    end
  end)

  it("or a state that was loaded begins nothing again", function()
    local q, z = quantizer("ste-euclid", { start = "kmeans" }), data(1, { 30, 6 })
    q:forward(z)
    local other = quantizer("ste-euclid", { start = "kmeans", warmup = 3 })
    other:load_state_dict(q:state_dict())
    local o = other:forward(data(2, { 30, 6 }))
    assert.is_nil(o.warming)
    assert.equal(q.codebook:bytes(), other.codebook:bytes())
  end)
end)

describe("rate", function()
  it("is a factor of the learning rate of the quantizer's parameters alone", function()
    local function moved(rate, lr)
      vx.seed(1)
      local layer, q = vx.nn.Linear(6, 6), quantizer("softmax-knn-ce", { rate = rate })
      local parameters = layer:parameters()
      for _, p in ipairs(q:parameters()) do parameters[#parameters + 1] = p end
      local optimizer, x = vx.optim.AdamW(parameters), data(1, { 30, 6 })
      local o = q(layer(x))
      ops.add(ops.mse(o.quantized, x), o.reg):backward()
      optimizer:step(lr)
      return layer.weight:bytes(), q.codebook:bytes(), q.log_tau:bytes()
    end
    local layer, codebook, tau = moved(nil, 1e-2)
    assert.same({ layer, codebook, tau }, { moved(1, 1e-2) })
    local half_layer, half_codebook, half_tau = moved(nil, 5e-3)
    assert.same({ layer, half_codebook, half_tau }, { moved(0.5, 1e-2) })
    assert.are_not.equal(layer, half_layer)
    assert.are_not.equal(codebook, half_codebook)
  end)

  it("reaches the stages, and stays through :to()", function()
    local q = quantizer("rvq-softmax-knn-ce", { rate = 0.25 })
    assert.is_true(#q:parameters() > 0)
    for _, p in ipairs(q:parameters()) do assert.equal(0.25, p.rate) end
    for _, p in ipairs(q:to("emu:0"):parameters()) do assert.equal(0.25, p.rate) end
  end)
end)
