-- Recorded graphs (vx.graph), on the CPU, on the host as device emu:0 and on cuda:0 where there is one: a step that is
-- replayed does to the bit what its ops do.

local H = require "tests.helper"
local cases = require "tests.device_cases"
local vx = H.vx
local core = require "vertex.core"
local ops, upload = vx.ops, cases.upload

--- y = (a * x + b)^2 for x, to be fitted to zero; two parameters, one of them at half the rate, and noise where the
-- device has it.
local function small_step(device, noise)
  local s = { device = device, x = vx.full({ 40, 3 }, 0.5, { device = device }),
    seen = vx.zeros({ 1, 5 }, { device = device, dtype = "i32" }) }
  s.a, s.b = vx.ones({ 40, 3 }, { device = device }), vx.full({ 40, 3 }, 0.25, { device = device })
  s.a.requires_grad, s.b.requires_grad = true, true
  s.generator = vx.generator(3)
  s.fast, s.slow = vx.optim.AdamW({ s.a }, { weight_decay = 0.1 }), vx.optim.AdamW { s.b }
  s.book = upload(H.generator(12)({ 1, 8, 3 }, { grad = false }), device)
  s.codes = upload(vx.tensor({ { 0 }, { 3 }, { 3 } }, { dtype = "i32" }), device)
  function s.run(rate)
    local x = s.x
    if noise then x = x + noise(s, vx.empty({ 40, 3 }, { device = device })) end
    local loss = vx.mse((s.a * x + s.b):square(), vx.zeros({ 40, 3 }, { device = device }))
    s.a:zero_grad()
    s.b:zero_grad()
    loss:backward()
    s.fast:step(rate)
    s.slow:step(rate and rate / 2)
    ops.count_codes(s.codes, 5, s.seen)
    return { loss = loss }, "said"
  end
  function s.state()
    local list = { s.a:bytes(), s.b:bytes(), s.seen:bytes(),
      ("%d %d %d"):format(s.fast.steps, s.slow.steps, s.generator.drawn) }
    for _, o in ipairs { s.fast, s.slow } do
      for _, name in ipairs { "first.1", "second.1" } do list[#list + 1] = o:state_dict()[name]:bytes() end
    end
    return list
  end
  return s
end

local function graph_specs(device, tag)
  local function rate_of(i) return 0.05 / i end

  --- Losses of five steps and the state after them; `how(s, step number)` does one step and returns its loss tensor.
  local function trained(noise, how)
    local s, losses = small_step(device, noise), {}
    for i = 1, 5 do
      vx.step(function()
        s.x:fill(i / 3)
        losses[i] = how(s, i):bytes()
      end)
    end
    return losses, s.state()
  end
  local function eager(s, i) return (s.run(rate_of(i))).loss end
  local function replayed(s, i)
    s.graph = s.graph or vx.graph(s.run, { device = device })
    local results, word = s.graph:replay(rate_of(i))
    assert.equal("said", word)
    assert.equal(i > 1, s.graph.recorded ~= nil)
    return results.loss
  end
  local function normal(s, x) return ops.normal(x, 0, 1, s.generator) end
  local noises = { { "without noise" }, { "with noise", normal }, { "with noise drawn elsewhere, too", function(s, x)
    return normal(s, x) + ops.uniform(vx.empty({ 40, 3 }, { device = device }), 0, 1)
  end }, { "with a random order",
    function(s) return ops.reshape(ops.permutation(120, s.generator, { device = device }):to "f32", { 40, 3 })
    / 100 end },
    { "with dropout", function(s, x) return normal(s, x) + ops.dropout(s.x, 0.5, s.generator) end },
    { "with the dropout of attention", function(s)
      local q = ops.reshape(s.x, { 2, 20, 1, 3 })
      return ops.reshape(ops.attention(q, q, q, { dropout = 0.5, generator = s.generator }), { 40, 3 })
    end },
    { "with a smoothed quantizer's noise", function(s)
      local seed, stream = s.generator:stream()
      local y = ops.quantize_smooth(ops.reshape(s.x, { 40, 1, 3 }), s.book, vx.zeros({ 1 }, { device = device }),
        { sampler = "hgumbel", regularizer = "knn-ce", k = 2, gumbel_tau = 1, shards = 1, seed = seed,
          stream = stream })
      return ops.reshape(y, { 40, 3 })
    end } }

  describe("graphs on " .. device, function()
    for _, noise in ipairs(noises) do
      it("train to the same bits as single ops " .. noise[1] .. tag, function()
        vx.seed(3) -- the default generator and the step's own have the same seed
        vx.generator(3)
        ops.uniform(vx.empty { 1 })
        local losses, state = trained(noise[2], eager)
        vx.seed(3)
        ops.uniform(vx.empty { 1 })
        local graph_losses, graph_state = trained(noise[2], replayed)
        assert.same(losses, graph_losses)
        assert.same(state, graph_state)
        assert.not_equal(losses[1], losses[2])
      end)
    end

    for _, case in ipairs { "softmax-knn-ce", "sgumbel-knn-l2", "hgumbel-ppl", "ste-euclid", "re-cosine", "softmax-pkl",
      "softmax-knn-l2 in bf16" } do
      it("train an autoencoder with " .. case .. " to the same bits as single ops" .. tag, function()
        finally(function()
          vx.autocast "f32"
          vx.device "cpu"
        end)
        vx.device(device)
        vx.autocast(case:match " in (%S+)$" or "f32")
        local method = case:match "^%S+"
        local autoencoder = dofile(core.root .. "/experiments/autoencoder.lua")
        local function run_five(recorded)
          vx.seed(5)
          local quantizer = vx.quantizer(method, { dim = 4, codes = 11, k = 2, seed = 2 })
          quantizer.with_stats = false
          local model = autoencoder.new({ 8, 8, 4 }, quantizer)
          local optimizer, meter = vx.optim.AdamW(model:parameters(), { weight_decay = 0.1 }), vx.runs.meter()
          local x, used = vx.zeros { 2, 8, 8, 3 }, vx.zeros({ 1, 11 }, { dtype = "i32" })
          local step = vx.graph(function(rate)
            local y, q = model(x)
            local mse = vx.mse(y, x)
            local loss = mse + q.reg
            optimizer:zero_grad()
            loss:backward()
            optimizer:step(rate)
            ops.count_codes(q.codes, 11, used)
            meter:add { loss = loss, mse = mse }
          end)
          for i = 1, 5 do
            vx.step(function()
              x:copy(H.generator(40 + i)({ 2, 8, 8, 3 }, { grad = false }))
              if recorded then step:replay(rate_of(i)) else step.f(rate_of(i)) end
            end)
          end
          assert.equal(recorded, step.recorded ~= nil)
          local state, means = { used:bytes() }, meter:take()
          for name, t in pairs(model:state_dict()) do state[name] = t:bytes() end
          for name, t in pairs(optimizer:state_dict()) do state[name] = t:bytes() end
          return state, means
        end
        local state, means = run_five(false)
        local graph_state, graph_means = run_five(true)
        assert.same(state, graph_state)
        assert.same(means, graph_means)
        assert.is_true(means.loss > means.mse and means.mse > 0)
      end)
    end

    it("go on where steps in between have left things" .. tag, function()
      local losses, state = trained(nil, eager)
      local mixed, mixed_state = trained(nil,
        function(s, i) return i % 2 == 0 and eager(s, i) or replayed(s, i > 2 and i or 1) end)
      assert.same({ losses, state }, { mixed, mixed_state })
    end)

    for _, pool in ipairs { true,
      false } do it("keep what they use, " .. (pool and "with" or "without") .. " a pool" .. tag, function()
      finally(function() core.memory_pool(device ~= "emu:0", device) end)
      core.memory_pool(pool, device)
      collectgarbage()
      collectgarbage()
      local before = vx.memory(device)
      local s = small_step(device)
      local recorded = vx.graph(s.run, { device = device })
      for i = 1, 3 do vx.step(recorded.replay, recorded, rate_of(i)) end
      collectgarbage()
      collectgarbage()
      local live = vx.memory(device).live
      local others = {} -- whoever takes memory now must not be met by the graph
      for i = 1, 60 do others[i] = vx.full({ i % 20 == 0 and 100000 or 40, 3 }, i, { device = device }) end
      local loss
      vx.step(function()
        loss = recorded:replay(0.1).loss
        loss = recorded:replay(0.1).loss
      end)
      assert.is_true(loss:item() < 1)
      for i, x in ipairs(others) do assert.same({ i, i }, { x[1][1]:item(), x[40][3]:item() }) end
      others = nil -- luacheck: ignore
      collectgarbage()
      collectgarbage()
      assert.equal(live, vx.memory(device).live)
      -- what is freed outside stays, too
      s.x:release()
      s.codes:release()
      s.seen:release()
      vx.full({ 40, 3 }, 7, { device = device }):release()
      recorded:replay(0.1)
      assert.is_true(loss:item() < 1)
      recorded:release()
      local value = loss:item() -- a result outlives its graph
      local again = vx.full({ 1 }, 5, { device = device })
      assert.same({ value, 5 }, { loss:item(), again:item() })
      again:release()
      loss:release()
      s, recorded, loss = nil, nil, nil -- luacheck: ignore
      collectgarbage()
      collectgarbage()
      assert.same({ before.live, before.tensors }, { vx.memory(device).live, vx.memory(device).tensors })
    end) end

    it("record again where an optimizer went back" .. tag, function()
      local s = small_step(device)
      local recorded = vx.graph(s.run, { device = device })
      for i = 1, 4 do recorded:replay(rate_of(i)) end
      local first = recorded.recorded
      s.fast.steps = 1
      recorded:replay(0.01)
      assert.not_equal(first, recorded.recorded)
      assert.same({ 2, 5 }, { s.fast.steps, s.slow.steps })
      recorded:replay(0.03)
      assert.same({ 3, 6, 0.03, 0.015 }, { s.fast.steps, s.slow.steps, s.fast.lr, s.slow.lr })
    end)

    it("step more parameters than a launch takes, each with its decay" .. tag, function()
      local function stepped(recorded)
        local parameters = {}
        for i = 1, 170 do
          local p = upload(H.generator(i)({ i % 7 }, { grad = false }), device)
          p.requires_grad, p.no_decay, p.grad = true, i % 3 == 0, vx.full({ i % 7 }, i, { device = device })
          parameters[i] = p
        end
        local optimizer = vx.optim.AdamW(parameters, { weight_decay = 0.2 })
        local step = vx.graph(function(rate) optimizer:step(rate) end, { device = device })
        for i = 1, 4 do
          if recorded then step:replay(rate_of(i)) else step.f(rate_of(i)) end
        end
        assert.equal(recorded, step.recorded ~= nil)
        local state = {}
        for i, p in ipairs(parameters) do state[i] = p:bytes() end
        for name, x in pairs(optimizer:state_dict()) do state[name] = x:bytes() end
        return state
      end
      assert.same(stepped(false), stepped(true))
    end)

    it("refuse what has to wait for the device or comes from the host, and drop the recording" .. tag, function()
      local elsewhere = device == "cpu" and "emu:0" or "cpu"
      local x, y, there = vx.ones({ 4 }, { device = device }), vx.empty({ 4 }, { device = device }),
        vx.ones({ 4 }, { device = elsewhere })
      local picture = vx.zeros({ 4, 4, 3 }, { dtype = "u8" })
      collectgarbage()
      collectgarbage()
      local live = vx.memory(device).live
      local recording, fixture = "while a graph is being recorded", core.root .. "/tests/fixtures/images/alpha.png"
      local refused = {
        { function() return x[1]:item() end,
          device .. ": results cannot be read (item, totable, a copy to the host) nor waited for", recording },
        { function() x:totable() end, device .. ": results cannot be read", recording },
        { function() vx.sync(device) end, device .. ": results cannot be read", recording },
        { function() return vx.tensor({ 1, 2 }, { device = device }) end, device .. ": numbers of the host",
          recording },
        { function() return vx.ones({ 4 }, { device = elsewhere }) end,
          "fill: on " .. elsewhere .. ", while a graph of " .. device .. " is being recorded" },
        { function() vx.graph(function() return x + 1 end, { device = device }):replay() core.record(device, 1,
          function() end) end,
          "graph: one is being recorded on " .. device },
        { function() error "of its own" end, "of its own" },
      }
      local own_memory = { -- where the host's memory is the device's
        { function() there:copy(x) end, "cpu: results cannot be read", recording },
        { function() x:copy(there) end, "cpu: results cannot be read", recording },
        { function() return vx.data.resize(picture, 2, 2) end, "cpu: results cannot be read", recording },
        { function() return vx.data.open(fixture) end, "cpu: numbers of the host cannot be uploaded", recording },
        { function() return vx.data.procedural(8, 1, 1) end, "cpu: results cannot be read", recording },
      }
      local own_device = {
        { function() y:copy(there) end, device .. ": numbers of the host cannot be uploaded", recording },
      }
      for _, case in ipairs(device == "cpu" and own_memory or own_device) do refused[#refused + 1] = case end
      for _, case in ipairs(refused) do
        local recorded = vx.graph(function(rate)
          y:copy(x * 2)
          if rate == 2 then case[1]() end
        end, { device = device })
        recorded:replay(1)
        local ok, message = pcall(recorded.replay, recorded, 2)
        assert.is_false(ok)
        for i = 2, #case do assert.is_truthy(tostring(message):find(case[i], 1, true), message) end
        vx.sync(device) -- the device is as it was
        assert.equal(2, y[4]:item())
        y:zero()
        recorded:replay(1) -- and this time it can be recorded
        assert.is_not_nil(recorded.recorded)
        recorded:replay(1)
        assert.same({ 2, 2, 2, 2 }, y:totable())
        recorded:release()
      end
      collectgarbage()
      collectgarbage()
      assert.equal(live, vx.memory(device).live)
      H.raises(function() vx.graph(3) end, "graph: f is 3, expected a function")
      H.raises(function() vx.graph(function() end, { device = device }):replay(-1) end,
        "replay: rate -1, expected a number of 0 or more")
    end)

    it("report at the next wait what an op of theirs finds in its data, as often as it happens" .. tag, function()
      local index, out = upload(vx.tensor({ 0, 1, 2 }, { dtype = "i32" }), device), nil
      local tab = vx.ones({ 3, 4 }, { device = device })
      local recorded = vx.graph(function() out = ops.gather(tab, index) return out end, { device = device })
      for _ = 1, 3 do recorded:replay() end
      index:fill(7)
      local codes = vx.zeros({ 1, 1 }, { dtype = "i32", device = device })
      -- each has a text of its own, and there is room for 4096
      for i = 1, 4200 do vx.step(ops.count_codes, codes, i) end
      for _ = 1, 2 do
        if device ~= "cpu" then recorded:replay() end -- the CPU computes at once
        H.raises(function()
          if device == "cpu" then recorded:replay() else vx.sync(device) end
        end, "gather: ", "row 0 is outside 0 .. 2")
      end
      index:fill(1)
      assert.equal(1, recorded:replay()[3][4]:item())
    end)

    it("run op by op while somebody looks at every op" .. tag, function()
      local x, runs = vx.ones({ 4 }, { device = device }), 0
      local recorded = vx.graph(function()
        runs = runs + 1
        return x / x
      end, { device = device })
      for _ = 1, 3 do recorded:replay() end
      assert.equal(2, runs)
      x:zero()
      finally(function() vx.debug_nonfinite(false) end)
      vx.debug_nonfinite(true)
      assert.truthy(select(2, pcall(recorded.replay, recorded)):find("div: its result (4) has 4 elements that are not",
        1, true))
      vx.debug_nonfinite(false)
      recorded:replay()
      recorded:replay()
      assert.equal(4, runs) -- once looked at, once recorded anew
    end)

    it("count a step that is looked at once" .. tag, function()
      local s = small_step(device, normal)
      local recorded = vx.graph(s.run, { device = device })
      for i = 1, 3 do recorded:replay(rate_of(i)) end
      finally(function() vx.debug_nonfinite(false) end)
      vx.debug_nonfinite(true)
      recorded:replay(rate_of(4))
      vx.debug_nonfinite(false)
      recorded:replay(rate_of(5))
      assert.same({ 5, 5, 5 }, { s.fast.steps, s.slow.steps, s.generator.drawn })
      local plain = small_step(device, normal)
      for i = 1, 5 do plain.run(rate_of(i)) end
      assert.same(plain.state(), s.state())
    end)

    it("run out of memory without harm" .. tag, function()
      finally(function() vx.memory_limit(0, device) end)
      local x, y = vx.ones({ 100000 }, { device = device }), vx.zeros({ 100000 }, { device = device })
      local recorded = vx.graph(function() y:copy((x + 1) * 2 + (x + 3)) end, { device = device })
      recorded:replay()
      vx.memory_flush(device)
      vx.memory_limit(vx.memory(device).live + 500000, device)
      assert.is_truthy(tostring(select(2, pcall(recorded.replay, recorded))):find("out of memory on " .. device, 1,
        true))
      vx.memory_limit(0, device)
      for _ = 1, 2 do recorded:replay() end
      assert.equal(8, y[7]:item())
    end)
  end)
end

graph_specs("cpu", "")
graph_specs("emu:0", "")

local gpu, reason = cases.gpu()
if gpu then
  graph_specs(gpu, " #cuda")
else
  it("graphs on cuda:0 are left out (" .. reason .. ")", function() pending(reason) end)
  it("graphs on cuda:0 are left out (" .. reason .. ") #cuda", function() pending(reason) end)
end
