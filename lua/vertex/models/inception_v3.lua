--- models/inception_v3.lua: Inception V3 [Szegedy et al. 2016], whose features FID and whose classes the Inception
-- Score are made of. It has torchvision's layers, state-dict names and shapes, and is there to judge, not to be
-- trained: batch norm uses the statistics of the weights' file, and no gradient flows through.
--
-- Which network it is the weights say, by the rows of fc.weight:
--   1000   torchvision's. Average pools count the padding (5b-7c); published weights want transform_input
--   1008   that of TensorFlow's FID, ported to the same names. Average pools do not count the padding, the last block
--          (7c) pools by maximum, and the score's logits are without bias. Elsewhere its features are a third off
--
-- What an image goes through first:
--   torchvision      the shorter side to 342 pixels (bilinear, antialiased), the middle 299 x 299, standardized by
--                    ImageNet's mean and deviation; transform_input turns that into 2 x - 1
--   pytorch-fid      299 x 299 whatever the shape (bilinear, pixels' centres, no antialiasing), 2 x - 1
--   torch-fidelity   299 x 299 (bilinear as TensorFlow 1 has it: pixel i comes from i times the scale), (byte - 128) /
--                    128

local arguments = require "vertex.arguments"
local check = require "vertex.check"
local core = require "vertex.core"
local images = require "vertex.data.images"
local nn = require "vertex.nn"
local ops = require "vertex.ops"
local safetensors = require "vertex.safetensors"
local tape = require "vertex.tape"

local fail, shape_text = core.fail, core.shape_text

local SIZE, SHORT_SIDE, LEAST = 299, 342, 75 -- pixels: input, resized before the crop, smallest that has a result
local EPS = 0.001                            -- of batch norm
local FID_CLASSES = 1008
local CHUNK = 8                              -- images at a time, so that memory is bounded

-- -- Layers -----------------------------------------------------------------------------------------------------------

--- Batch norm with the statistics that it was given; folded into the convolution before it.
local BatchNorm = nn.module "BatchNorm2d"
function BatchNorm:init(channels)
  self.weight, self.bias = nn.buffer({ channels }, 1), nn.buffer { channels }
  self.running_mean, self.running_var = nn.buffer { channels }, nn.buffer({ channels }, 1)
end

--- Convolution without bias, batch norm, ReLU.
local BasicConv2d = nn.module "BasicConv2d"
function BasicConv2d:init(inputs, outputs, kernel, options)
  local o = { bias = false, stride = options and options.stride, padding = options and options.padding }
  self.conv = nn.Conv2d(inputs, outputs, kernel, o)
  self.conv.weight.requires_grad = false
  self.bn = BatchNorm(outputs)
end

--- Forgets the filters that were made of other weights.
function BasicConv2d:loaded() self.folded = nil end

function BasicConv2d:forward(x)
  if not self.folded then
    local w, bn = self.conv.weight, self.bn
    local scale = ops.div(bn.weight, ops.sqrt(ops.affine(bn.running_var, 1, EPS)))
    self.folded = { weight = core.keep(ops.mul(w, ops.reshape(scale, { -1, 1, 1, 1 }))),
      bias = core.keep(ops.sub(bn.bias, ops.mul(bn.running_mean, scale))) }
  end
  return ops.relu(ops.conv2d(x, self.folded.weight, self.folded.bias, self.conv.how))
end

--- Moves to another device, where the filters are made anew.
function BasicConv2d:to(device)
  self.folded = nil
  return nn.Conv2d.to(self, device)
end

-- Pools of a block: function(x, is_fid).
local function average(x, is_fid)
  return ops.avg_pool2d(x, 3, { stride = 1, padding = 1, count_include_pad = not is_fid })
end
local function average_or_max(x, is_fid)
  if is_fid then return ops.max_pool2d(x, 3, { stride = 1, padding = 1 }) end
  return average(x, false)
end
local function halving(x) return ops.max_pool2d(x, 3, { stride = 2 }) end

--- Several branches side by side, their channels joined. Each is { convolution, ... }, whose last entry may be an array
-- of two convolutions that both see what is before them; a pool may stand first.
local Block = nn.module "Inception"
function Block:init(is_fid, branches, layers)
  self.is_fid, self.branches = is_fid, branches
  for _, layer in ipairs(layers) do self[layer[1]] = BasicConv2d(layer[2], layer[3], layer[4], layer[5]) end
end

function Block:forward(x)
  local out = {}
  for _, branch in ipairs(self.branches) do
    local y = x
    for _, part in ipairs(branch) do
      if type(part) == "function" then y = part(y, self.is_fid)
      elseif type(part) == "string" then y = self[part](y)
      else y = ops.cat({ self[part[1]](y), self[part[2]](y) }, 4) end
    end
    out[#out + 1] = y
  end
  return ops.cat(out, 4)
end

local ACROSS, DOWN = { padding = { 0, 3 } }, { padding = { 3, 0 } } -- around 1 x 7 and 7 x 1

local function block_a(is_fid, inputs, pooled)
  return Block(is_fid, { { "branch1x1" }, { "branch5x5_1", "branch5x5_2" },
    { "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3" }, { average, "branch_pool" } },
    { { "branch1x1", inputs, 64, 1 }, { "branch5x5_1", inputs, 48, 1 }, { "branch5x5_2", 48, 64, 5, { padding = 2 } },
      { "branch3x3dbl_1", inputs, 64, 1 }, { "branch3x3dbl_2", 64, 96, 3, { padding = 1 } },
      { "branch3x3dbl_3", 96, 96, 3, { padding = 1 } }, { "branch_pool", inputs, pooled, 1 } })
end

local function block_b(is_fid)
  return Block(is_fid, { { "branch3x3" }, { "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3" }, { halving } },
    { { "branch3x3", 288, 384, 3, { stride = 2 } }, { "branch3x3dbl_1", 288, 64, 1 },
      { "branch3x3dbl_2", 64, 96, 3, { padding = 1 } }, { "branch3x3dbl_3", 96, 96, 3, { stride = 2 } } })
end

local function block_c(is_fid, c)
  return Block(is_fid, { { "branch1x1" }, { "branch7x7_1", "branch7x7_2", "branch7x7_3" },
    { "branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5" },
    { average, "branch_pool" } },
    { { "branch1x1", 768, 192, 1 }, { "branch7x7_1", 768, c, 1 }, { "branch7x7_2", c, c, { 1, 7 }, ACROSS },
      { "branch7x7_3", c, 192, { 7, 1 }, DOWN }, { "branch7x7dbl_1", 768, c, 1 },
      { "branch7x7dbl_2", c, c, { 7, 1 }, DOWN }, { "branch7x7dbl_3", c, c, { 1, 7 }, ACROSS },
      { "branch7x7dbl_4", c, c, { 7, 1 }, DOWN }, { "branch7x7dbl_5", c, 192, { 1, 7 }, ACROSS },
      { "branch_pool", 768, 192, 1 } })
end

local function block_d(is_fid)
  return Block(is_fid, { { "branch3x3_1", "branch3x3_2" },
    { "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4" }, { halving } },
    { { "branch3x3_1", 768, 192, 1 }, { "branch3x3_2", 192, 320, 3, { stride = 2 } }, { "branch7x7x3_1", 768, 192, 1 },
      { "branch7x7x3_2", 192, 192, { 1, 7 }, ACROSS }, { "branch7x7x3_3", 192, 192, { 7, 1 }, DOWN },
      { "branch7x7x3_4", 192, 192, 3, { stride = 2 } } })
end

local function block_e(is_fid, inputs, pool)
  local across, down = { padding = { 0, 1 } }, { padding = { 1, 0 } }
  return Block(is_fid, { { "branch1x1" }, { "branch3x3_1", { "branch3x3_2a", "branch3x3_2b" } },
    { "branch3x3dbl_1", "branch3x3dbl_2", { "branch3x3dbl_3a", "branch3x3dbl_3b" } }, { pool, "branch_pool" } },
    { { "branch1x1", inputs, 320, 1 }, { "branch3x3_1", inputs, 384, 1 },
      { "branch3x3_2a", 384, 384, { 1, 3 }, across }, { "branch3x3_2b", 384, 384, { 3, 1 }, down },
      { "branch3x3dbl_1", inputs, 448, 1 },
      { "branch3x3dbl_2", 448, 384, 3, { padding = 1 } }, { "branch3x3dbl_3a", 384, 384, { 1, 3 }, across },
      { "branch3x3dbl_3b", 384, 384, { 3, 1 }, down }, { "branch_pool", inputs, 192, 1 } })
end

-- -- Resizing ---------------------------------------------------------------------------------------------------------

--- Gives the matrix (to,from) that resizes a side of `from` pixels to `to`, bilinearly. kind: "centres", of which an
-- enlarged edge repeats the last pixel; "antialiased", the same with windows as wide as the scale; "corner", pixel i
-- from i times the scale.
local function resizing(from, to, kind)
  local rows, scale = {}, from / to
  for i = 1, to do
    local row = {}
    for j = 1, from do row[j] = 0 end
    if kind == "antialiased" and scale > 1 then
      local centre, sum = (i - 0.5) * scale, 0
      local first = math.max(1, math.floor(centre - scale + 0.5) + 1)
      local last = math.min(from, math.floor(centre + scale + 0.5))
      for j = first, last do
        row[j] = math.max(0, 1 - math.abs((j - 0.5 - centre) / scale))
        sum = sum + row[j]
      end
      for j = first, last do row[j] = row[j] / sum end
    else
      local at = math.max(0, kind == "corner" and (i - 1) * scale or (i - 0.5) * scale - 0.5)
      local low = math.min(math.floor(at), from - 1)
      local high, share = math.min(low + 1, from - 1), at - low
      row[low + 1] = row[low + 1] + 1 - share
      row[high + 1] = row[high + 1] + share
    end
    rows[i] = row
  end
  return rows
end

--- Resizes images x (B,H,W,3) to (B,P,Q,3).
local function resize(x, P, Q, kind)
  local B, H, W, C = unpack(x:shape())
  if P ~= H then
    local down = core.tensor(resizing(H, P, kind), { device = x:device() })
    x = ops.reshape(ops.matmul(down, ops.reshape(x, { B, H, W * C })), { B, P, W, C })
  end
  if Q ~= W then
    local across = core.tensor(resizing(W, Q, kind), { device = x:device() })
    local turned = ops.reshape(core.contiguous(ops.transpose(x, 2, 3)), { B, W, P * C })
    x = core.contiguous(ops.transpose(ops.reshape(ops.matmul(across, turned), { B, Q, P, C }), 2, 3))
  end
  return x
end

--- What images in 0..1 (B,H,W,3) go through before the network, by the name of the library that does so.
local PREPARE = {
  torchvision = function(x)
    local H, W = x:size(2), x:size(3)
    local long = math.floor(SHORT_SIDE * math.max(H, W) / math.min(H, W))
    local P, Q = H <= W and SHORT_SIDE or long, W <= H and SHORT_SIDE or long
    x = resize(x, P, Q, "antialiased")
    local function middle(size)
      local before = (size - SIZE) / 2 -- rounded as Python does, halves to even
      local whole = math.floor(before + 0.5)
      return whole - (before % 1 == 0.5 and whole % 2 == 1 and 1 or 0) + 1
    end
    x = ops.narrow(ops.narrow(x, 2, middle(P), SIZE), 3, middle(Q), SIZE)
    return images.normalize(core.contiguous(x))
  end,
  ["pytorch-fid"] = function(x) return ops.affine(resize(x, SIZE, SIZE, "centres"), 2, -1) end,
  ["torch-fidelity"] = function(x) return ops.affine(resize(x, SIZE, SIZE, "corner"), 255 / 128, -1) end,
}

-- -- The network ------------------------------------------------------------------------------------------------------

local Inception = nn.module "InceptionV3"

local STAGES = { "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3",
  "maxpool2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e",
  "Mixed_7a", "Mixed_7b", "Mixed_7c" }

function Inception:init(o, classes)
  local is_fid = classes == FID_CLASSES
  self.is_fid, self.transform_input, self.input = is_fid, o.transform_input, o.input
  self.hash = o.hash
  self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, { stride = 2 })
  self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
  self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, { padding = 1 })
  self.maxpool1 = nn.MaxPool2d(3, { stride = 2 })
  self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
  self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
  self.maxpool2 = nn.MaxPool2d(3, { stride = 2 })
  self.Mixed_5b, self.Mixed_5c = block_a(is_fid, 192, 32), block_a(is_fid, 256, 64)
  self.Mixed_5d = block_a(is_fid, 288, 64)
  self.Mixed_6a = block_b(is_fid)
  self.Mixed_6b, self.Mixed_6c = block_c(is_fid, 128), block_c(is_fid, 160)
  self.Mixed_6d, self.Mixed_6e = block_c(is_fid, 160), block_c(is_fid, 192)
  self.Mixed_7a = block_d(is_fid)
  self.Mixed_7b, self.Mixed_7c = block_e(is_fid, 1280, average), block_e(is_fid, 2048, average_or_max)
  self.fc = nn.Linear(2048, classes)
  self.fc.weight.requires_grad, self.fc.bias.requires_grad = false, false
end

--- Gives what the last average pool gives of prepared images; calls watch(stage, x) behind each stage.
local function pooled(self, x, watch)
  if self.transform_input then
    local scale, shift = {}, {}
    for c = 1, 3 do scale[c], shift[c] = images.std[c] / 0.5, (images.mean[c] - 0.5) / 0.5 end
    local on = { device = x:device() }
    x = ops.add(ops.mul(x, core.tensor(scale, on)), core.tensor(shift, on))
  end
  for _, name in ipairs(STAGES) do
    x = core.step(function() return self[name](x) end)
    if watch then watch(name, x) end
  end
  return ops.reshape(ops.mean(ops.reshape(x, { x:size(1), x:size(2) * x:size(3), 2048 }), 2), { -1, 2048 })
end

--- Applies the network to prepared images (m:prepare). No gradient flows through.
-- @param x tensor f32 (B,H,W,3), at least 75 x 75
-- @param[opt] watch function(stage's name, its output), called behind each stage
-- @return tensor f32 (B,classes), the logits
-- @return tensor f32 (B,2048), the features before the last layer
-- @raise where x has another shape
function Inception:forward(x, watch)
  if x:dim() ~= 4 or x:size(4) ~= 3 or x:size(2) < LEAST or x:size(3) < LEAST then
    fail("inception_v3: x %s should have the shape (B,H,W,3), H and W of %d or more", shape_text(x), LEAST)
  end
  return tape.no_grad(function()
    local features = pooled(self, x, watch)
    return ops.linear(features, self.fc.weight, self.fc.bias), features
  end)
end

--- Prepares images for the network, as the library named by m.input does.
-- @param x tensor u8 (B,H,W,3), or f32 (B,H,W,3) in 0..1
-- @return tensor f32 (B,299,299,3)
-- @raise where x has another shape
function Inception:prepare(x)
  if x:dim() ~= 4 or x:size(4) ~= 3 or x:size(2) * x:size(3) == 0 then
    fail("inception_v3: images %s should have the shape (B,H,W,3)", shape_text(x))
  end
  return tape.no_grad(function()
    if x:dtype() == "u8" then x = ops.affine(x:to "f32", 1 / 255, 0) end
    return PREPARE[self.input](core.contiguous(x))
  end)
end

--- Computes the features that FID compares, and the logits of the Inception Score, of images of any size, a few at a
-- time.
-- @param x tensor u8 (B,H,W,3), or f32 (B,H,W,3) in 0..1; of numbers between bytes round first, as a saved image would
-- @return tensor f32 (B,2048), the features
-- @return tensor f32 (B,classes), the logits; of the FID network without bias
-- @raise where x has another shape
function Inception:features(x)
  if x:size(1) == 0 then fail("inception_v3: no images, %s", shape_text(x)) end
  return core.step(function()
    return tape.no_grad(function()
      local features, logits = {}, {}
      for first = 1, x:size(1), CHUNK do
        local f, l = core.step(function()
          local part = ops.narrow(x, 1, first, math.min(CHUNK, x:size(1) - first + 1))
          local f = pooled(self, self:prepare(part))
          return f, ops.linear(f, self.fc.weight, not self.is_fid and self.fc.bias or nil)
        end)
        features[#features + 1], logits[#logits + 1] = f, l
      end
      return ops.cat(features, 1), ops.cat(logits, 1)
    end)
  end)
end

local load_as_named = Inception.load_state_dict -- that of all modules

--- Copies tensors in, those of torchvision's or the FID network's state dict. AuxLogits and num_batches_tracked, which
-- only training has, are left out.
-- @param state table { name = tensor }, as vx.load gives it
-- @return the module itself
-- @raise where a name is missing or unknown, or a shape differs; nothing was changed
function Inception:load_state_dict(state)
  local own = {}
  for name, x in pairs(state) do
    local named = type(name) == "string" -- what is not the module refuses
    if not (named and (name:find "^AuxLogits%." or name:find "%.num_batches_tracked$")) then own[name] = x end
  end
  load_as_named(self, own)
  return self
end

arguments.guard_class("inception_v3", Inception)

local OPTIONS = { file = "string", num_classes = "count", transform_input = "boolean",
  input = { { "torchvision", "pytorch-fid", "torch-fidelity" } } }

--- Makes an Inception V3, with random weights or with those of a file, which say whether it is torchvision's or the FID
-- network. README says where a file comes from.
-- @param[opt] options table
-- @param[opt] options.file path of a safetensors file with torchvision's names
-- @param[opt=1000] options.num_classes without a file: rows of the last layer; 1008 is the FID network
-- @param[opt] options.transform_input true: standardized images become 2 x - 1 first, as torchvision's published
-- weights want it, and as is the case where it is nil and the file is torchvision's
-- @param[opt] options.input "torchvision", "pytorch-fid" or "torch-fidelity": how m:prepare resizes; nil: as the
-- network wants it, pytorch-fid for the FID network
-- @return module with m:features(images), m:prepare(images), m:forward(x), m:load_state_dict(state); m.is_fid, and with
-- a file m.hash, its SHA-256
-- @raise where an option is unknown, or the file is missing or of other names or shapes
local function inception_v3(options)
  local o = check.options("inception_v3", options, OPTIONS)
  local classes, state = o.num_classes or 1000, nil
  if o.file then
    state = core.reading(o.file, function(file) return (safetensors.read(file, { device = "cpu" })) end)
    local fc = state["fc.weight"]
    if not fc or fc:dim() ~= 2 then
      fail("inception_v3: %s has no fc.weight (classes,2048): no Inception V3 in torchvision's names", o.file)
    end
    if o.num_classes and o.num_classes ~= fc:size(1) then
      fail("inception_v3: num_classes is %d, and fc.weight is %s in %s", o.num_classes, shape_text(fc), o.file)
    end
    classes, o.hash = fc:size(1), core.file_sha256(o.file)
  end
  local is_fid = classes == FID_CLASSES
  if o.transform_input == nil then o.transform_input = state ~= nil and not is_fid end
  if o.transform_input and is_fid then fail "inception_v3: transform_input is of torchvision's network alone" end
  o.input = o.input or (is_fid and "pytorch-fid" or "torchvision")
  if (o.input == "torchvision") == is_fid then
    fail("inception_v3: input '%s' is not for the network of %d classes", o.input, classes)
  end
  local m = Inception(o, classes)
  if state then
    local ok, reason = pcall(m.load_state_dict, m, state)
    if not ok then fail("inception_v3: %s: %s", o.file, tostring(reason):gsub("^.-load_state_dict: ", "")) end
  end
  return m:eval()
end

return inception_v3
