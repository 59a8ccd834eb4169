-- Inception V3 against torchvision's and pytorch-fid's networks: weights made by a formula, features, logits and the
-- statistics of every stage (golden/fid/inception.safetensors; its metadata states the rule).

local H = require "tests.helper"
local bit, ffi = require "bit", require "ffi"
local tonumber = tonumber -- busted looks every global up by a function, and there are millions of numbers
local vx = H.vx

local golden = vx.load(H.root .. "/tests/golden/fid/inception.safetensors")

-- -- The weights that the formula gives -------------------------------------------------------------------------------

local function fnv(name)
  local h = 0xCBF29CE484222325ULL
  for i = 1, #name do h = bit.bxor(h, name:byte(i)) * 0x100000001B3ULL end
  return h
end

--- The tensor of a name, with the value that the formula gives it: numbers in [-1,1), the same ones for the same name,
-- times a scale and moved. There are millions, so they are never a table.
local function formula_tensor(name, x)
  local n, scale, shift = x:numel(), 0.5, 1
  if name == "fc.weight" then scale, shift = math.sqrt(3 / 2048), 0
  elseif name == "fc.bias" or name:find "running_mean$" then scale, shift = 0.1, 0
  elseif name:find "conv.weight$" then scale, shift = math.sqrt(6 / (n / x:size(1))), 0
  elseif name:find "bn.bias$" then scale, shift = 0.3, 0 end
  local z0, out = fnv(name), ffi.new("float[?]", n)
  for i = 1, n do
    local z = z0 + i * 0x9E3779B97F4A7C15ULL
    z = bit.bxor(z, bit.rshift(z, 30)) * 0xBF58476D1CE4E5B9ULL
    z = bit.bxor(z, bit.rshift(z, 27)) * 0x94D049BB133111EBULL
    z = bit.bxor(z, bit.rshift(z, 31))
    out[i - 1] = scale * (tonumber(bit.rshift(z, 40)) * 2 ^ -23 - 1) + shift
  end
  return vx.empty(x:shape()):frombytes(ffi.string(out, 4 * n))
end

local made = {} -- tensors, by name and number of elements

--- Gives every tensor of a network the value that its name stands for.
local function formula_weights(m)
  local state = {}
  for name, x in pairs(m:state_dict()) do
    local key = name .. x:numel()
    made[key] = made[key] or formula_tensor(name, x)
    state[name] = made[key]
  end
  return state
end

local states = {} -- by number of classes
local function network(classes, options)
  options = options or {}
  options.num_classes = classes
  local m = vx.models.inception_v3(options)
  states[classes] = states[classes] or formula_weights(m)
  return m:load_state_dict(states[classes]), states[classes]
end

-- (2,3,299,299) bytes, channels first
local images = vx.transpose(vx.transpose(golden.image, 2, 3), 3, 4):contiguous()

describe("inception_v3", function()
  it("has torchvision's names and shapes", function()
    local m, count = vx.models.inception_v3(), 0
    local state = m:state_dict()
    for _ in pairs(state) do count = count + 1 end
    assert.equal(94 * 5 + 2, count) -- 580 of torchvision's, without AuxLogits' 14 and 94 num_batches_tracked
    for name, shape in pairs { ["Conv2d_1a_3x3.conv.weight"] = { 32, 3, 3, 3 },
      ["Mixed_6a.branch3x3.bn.bias"] = { 384 },
      ["Mixed_6c.branch7x7_2.conv.weight"] = { 160, 160, 1, 7 },
      ["Mixed_7c.branch3x3dbl_3b.conv.weight"] = { 384, 384, 3, 1 }, ["fc.weight"] = { 1000, 2048 } } do
      assert.same(shape, state[name]:shape(), name)
    end
    assert.equal(0, #m:parameters())
  end)

  local CASES = { tv = { 1000 }, tv_transform_input = { 1000, { transform_input = true } }, fid = { 1008 } }
  for name, case in pairs(CASES) do
    it("gives the reference's features, logits and stages: " .. name, function()
      local m = network(case[1], case[2])
      local x = vx.data.normalize(images)
      if name == "fid" then x = images:to "f32" * (2 / 255) - 1 end
      local logits, features = m:forward(x, function(stage, y)
        local expected = golden[("%s.stage.%s"):format(name, stage)]:totable()
        local n = y:numel()
        local mean = y:mean():item()
        local deviation = math.sqrt((y - mean):square():mean():item() * n / (n - 1))
        H.close({ mean, deviation, y:abs():max():item() }, expected, 1e-4, 0, stage)
      end)
      assert.is_true(H.relative_error(H.flat(features), H.flat(golden[name .. ".pool"])) < 1e-5)
      assert.is_true(H.relative_error(H.flat(logits), H.flat(golden[name .. ".logits"])) < 1e-5)
      H.close(H.flat(features), H.flat(golden[name .. ".pool"]), 1e-4, 1e-4)
    end)
  end

  it("gives features of images, few at a time, and the FID network's logits without bias", function()
    local m = network(1008)
    local features, logits = m:features(images)
    assert.is_true(H.relative_error(H.flat(features), H.flat(golden["fid.pool"])) < 1e-5)
    local bias = states[1008]["fc.bias"]
    assert.is_true(H.relative_error(H.flat(logits + bias), H.flat(golden["fid.logits"])) < 1e-5)
    local nine = vx.cat({ images, images, images, images, images:narrow(1, 1, 1) }, 1):contiguous()
    local before = vx.memory().live
    local many = m:features(nine)
    assert.same({ 9, 2048 }, many:shape())
    assert.is_true(H.relative_error(H.flat(many:narrow(1, 9, 1)), H.flat(features:narrow(1, 1, 1))) < 1e-6)
    assert.is_true(vx.memory().live - before < 2e5, "what the network made in between is gone")
  end)

  it("prepares images as torchvision, pytorch-fid and torch-fidelity do", function()
    -- a ramp along x: bilinear interpolation of it is known
    local row = {}
    for w = 1, 100 do row[w] = { w / 100, w / 100, w / 100 } end
    local ramp = vx.tensor { row, row }
    ramp = vx.cat({ ramp, ramp }, 1):reshape { 1, 4, 100, 3 }
    local fid = network(1008):prepare(ramp)
    assert.same({ 1, 299, 299, 3 }, fid:shape())
    local function at(x, w) return x:narrow(3, w, 1):narrow(2, 7, 1):narrow(4, 1, 1):item() end
    for _, w in ipairs { 1, 2, 100, 200, 298, 299 } do
      local place = math.min(math.max((w - 0.5) * 100 / 299 - 0.5, 0), 99)
      H.close({ at(fid, w) }, { 2 * (place + 1) / 100 - 1 }, 0, 1e-6, "pytorch-fid")
    end
    local fidelity = network(1008, { input = "torch-fidelity" }):prepare(ramp)
    for _, w in ipairs { 1, 2, 100, 200, 298, 299 } do
      local place = math.min((w - 1) * 100 / 299, 99)
      H.close({ at(fidelity, w) }, { (place + 1) / 100 * 255 / 128 - 1 }, 0, 1e-6, "torch-fidelity")
    end
    -- torchvision: 4 x 100 becomes 342 x 8550, of which the middle 299 x 299 stays
    local tv = network(1000):prepare(ramp)
    for _, w in ipairs { 1, 150, 299 } do
      local place = (w + math.floor((8550 - 299) / 2 + 0.5) - 0.5) * 100 / 8550 - 0.5
      H.close({ at(tv, w) }, { ((place + 1) / 100 - 0.485) / 0.229 }, 0, 1e-5, "torchvision")
    end
    -- a shrunk image is averaged: no stripe of one pixel is lost
    local stripes = {}
    for w = 1, 1368 do stripes[w] = { w % 4 == 0 and 1 or 0, 0, 0 } end
    local wide = vx.tensor({ stripes }):reshape({ 1, 1, 1368, 3 }):expand({ 1, 1368, 1368, 3 }):contiguous()
    local red = network(1000):prepare(wide):narrow(4, 1, 1)
    H.close({ red:min():item(), red:max():item() }, { (0.25 - 0.485) / 0.229, (0.25 - 0.485) / 0.229 }, 0, 0.3)
  end)

  it("reads a file, says which network it is and its hash, and refuses other shapes by name", function()
    local _, state = network(1008)
    local path = H.scratch "inception.safetensors"
    local file = {}
    for name, x in pairs(state) do file[name] = x end
    file["AuxLogits.fc.bias"] = vx.zeros { 1008 }
    file["Conv2d_1a_3x3.bn.num_batches_tracked"] = vx.zeros({ 1 }, { dtype = "i32" })
    vx.save(path, file)
    local m = vx.models.inception_v3 { file = path }
    assert.is_true(m.is_fid)
    assert.equal("pytorch-fid", m.input)
    assert.equal(H.shell("sha256sum '" .. path .. "'"):match "%x+", m.hash)
    assert.equal(state["fc.weight"]:bytes(), m.fc.weight:bytes())
    H.raises(function() vx.models.inception_v3 { file = path, num_classes = 1000 } end, "num_classes is 1000",
      "(1008,2048)", path)
    H.raises(function() vx.models.inception_v3 { file = path, transform_input = true } end, "transform_input")
    H.raises(function() vx.models.inception_v3 { file = path, input = "torchvision" } end, "input 'torchvision'")
    file["Mixed_5b.branch5x5_2.conv.weight"] = vx.zeros { 64, 48, 3, 3 }
    vx.save(path, file)
    H.raises(function() vx.models.inception_v3 { file = path } end, path,
      "'Mixed_5b.branch5x5_2.conv.weight' is (64,48,3,3) in the file, (64,48,5,5) in the module")
    file["Mixed_5b.branch5x5_2.conv.weight"] = nil
    vx.save(path, file)
    H.raises(function() vx.models.inception_v3 { file = path } end, path,
      "'Mixed_5b.branch5x5_2.conv.weight' is missing")
    vx.save(path, { weight = vx.zeros { 2 } })
    H.raises(function() vx.models.inception_v3 { file = path } end, path, "no fc.weight")
    H.raises(function() vx.models.inception_v3 { file = H.scratch "nothing" } end, "nothing")
  end)

  it("refuses what is no image", function()
    local m = vx.models.inception_v3()
    H.raises(function() m:forward(vx.zeros { 1, 74, 299, 3 }) end, "x (1,74,299,3) should have the shape (B,H,W,3)")
    H.raises(function() m:prepare(vx.zeros { 3, 9, 9 }) end, "images (3,9,9) should have the shape (B,H,W,3)")
    H.raises(function() m:features(vx.zeros { 0, 9, 9, 3 }) end, "no images")
    H.raises(function() vx.models.inception_v3 { classes = 3 } end, "unknown option 'classes'")
  end)
end)
