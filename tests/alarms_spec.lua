-- What a run says of a method that goes wrong, and what it logs for TensorBoard.

local H = require "tests.helper"
local lfs = require "lfs"
local alarms = require "vertex.runs.alarms"
local core = require "vertex.core"
local json = require "vertex.json"
local tensorboard = require "vertex.runs.tensorboard"
local vx = require "vertex"

local scratch = H.scratch "alarms"

--- Feeds entries, and gives "step event" of what was said.
local function said(a, entries)
  local list = {}
  for _, entry in ipairs(entries) do
    for _, alarm in ipairs(a:see(entry)) do list[#list + 1] = entry.step .. " " .. alarm.event end
  end
  return list
end

describe("alarms", function()
  it("name a collapse once, at its step, and none where use is low from the start but even", function()
    local a = alarms()
    assert.same({ "30 collapse" }, said(a, { { step = 10, code_use = 0.9 }, { step = 20, code_use = 0.3 },
      { step = 30, code_use = 0.09 }, { step = 40, code_use = 0.01 } }))
    assert.same({ "10 collapse" }, said(alarms(), { { step = 10, code_use = 0.015, perplexity = 1 } }))
    assert.same({}, said(alarms(), { { step = 10, code_use = 0.05, perplexity = 300 },
      { step = 20, code_use = 0.06, perplexity = 300 } }))
  end)

  it("name the first loss that is no number", function()
    assert.same({ "2 not finite" }, said(alarms(), { { step = 1, loss = 1 }, { step = 2, loss = 0 / 0 },
      { step = 3, loss = 0 / 0 } }))
    assert.same({ "1 not finite" }, said(alarms(), { { step = 1, loss = math.huge } }))
  end)

  it("name a parameter that has had no gradient for 100 steps", function()
    local used, unused = vx.ones({ 2 }, { requires_grad = true }), vx.ones({ 2 }, { requires_grad = true })
    local late = vx.ones({ 2 }, { requires_grad = true })
    local a = alarms { { "used", used }, { "unused", unused }, { "late", late } }
    local function loss(on) return (used * 3):sum() + (late * (on and 1 or 0)):sum() end
    loss(true):backward()
    assert.same({}, said(a, { { step = 50 }, { step = 99 } }))
    assert.same({ "100 no gradient: unused" }, said(a, { { step = 100 } }))
    for _, p in ipairs { used, unused, late } do p:zero_grad() end
    loss(false):backward()
    assert.same({ "200 no gradient: late" }, said(a, { { step = 199 }, { step = 200 }, { step = 300 } }))
  end)

  it("name a learning rate that stands still for 100 steps", function()
    assert.same({ "110 schedule" }, said(alarms(), { { step = 10, lr = 0.1 }, { step = 109, lr = 0.1 },
      { step = 110, lr = 0.1 }, { step = 120, lr = 0.1 } }))
    assert.same({}, said(alarms(), { { step = 10, lr = 0.1 }, { step = 100, lr = 0.2 }, { step = 190, lr = 0.2 } }))
  end)

  it("go on from a checkpoint as if there had been no stop", function()
    local entries = { { step = 10, code_use = 0.9, lr = 1 }, { step = 60, code_use = 0.5, lr = 1 },
      { step = 120, code_use = 0.01, lr = 1 }, { step = 130, code_use = 0.01, lr = 1 } }
    local whole = said(alarms(), entries)
    assert.same({ "120 collapse", "120 schedule" }, whole)
    for cut = 1, 3 do
      local a, b = alarms(), alarms()
      local first = said(a, { unpack(entries, 1, cut) })
      local _, plain = a:state()
      b:restore({}, json.decode(json.encode(plain)))
      for _, text in ipairs(said(b, { unpack(entries, cut + 1) })) do first[#first + 1] = text end
      assert.same(whole, first)
    end
  end)

  it("are lines of a run's log, and said", function()
    local library = os.getenv "VERTEX_LIB" or H.root .. "/build/libvertex.so"
    lfs.mkdir(scratch)
    local out, status = H.shell(("cd '%s' && VERTEX_LIB='%s' luajit '%s/experiments/ae_sweep.lua' --device cpu "
      .. "--steps 2 --set codes=1 --methods ste-euclid --set k=1 --out run 2>&1"):format(scratch, library, H.root))
    assert.equal(0, status, out)
    assert.truthy(out:find("ste-euclid      step 1: 100.0% of the codes are in use: the codebook has collapsed", 1,
      true), out)
    local events = {}
    for line in H.read(scratch .. "/run/metrics.jsonl"):gmatch "[^\n]+" do
      local entry = json.decode(line)
      if entry.event then events[#events + 1] = { entry.step, entry.event, entry.method } end
    end
    assert.same({ { 1, "collapse", "ste-euclid" } }, events)
  end)
end)

describe("tensorboard", function()
  -- by tensorboard 2.21's RecordWriter, of Events with wall_time 1.5
  local EXPECTED = "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c2700000000000000"
    .. "bbe1b14609000000000000f83f10f0a2042a180a0b0a046c6f7373150000003f0a090a026c72150000803e1eef9442"

  it("gets the records that its own writer makes, anew and appended", function()
    local time = os.time
    os.time = function() return 1.5 end -- luacheck: ignore
    finally(function() os.time = time end) -- luacheck: ignore
    local entry = { step = 70000, loss = 0.5, lr = 0.25, method = "a", seed = 1 }
    local path = scratch .. "/tb/events.out.tfevents.vertex"
    local function hex() return (H.read(path):gsub(".", function(c) return ("%02x"):format(c:byte()) end)) end
    tensorboard(scratch .. "/tb", { entry, { step = 5, event = "collapse", text = "no numbers" } })
    assert.equal(EXPECTED, hex())
    tensorboard(scratch .. "/tb", {}):add(entry)
    assert.equal(EXPECTED, hex())
    assert.is_true(core.file_size(path) > 0)
  end)
end)
