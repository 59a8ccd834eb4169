--- The discrete autoencoder of Section 4.1 and Table 3, and its presets. Everything here is meant to be changed.
--
-- Encoder: dense 3x3 convolution to channels[1] at full size; for each further column but the last a stage:
-- depthwise-separable convolution with stride 2, residual block; at last a depthwise-separable convolution to the
-- latent width. The decoder is the mirror image, with nearest-neighbour enlargement before each stage's convolution,
-- and a dense 3x3 convolution to RGB. What the quantizer and the loss are given is float32 under vx.autocast too.

local vx = require "vertex"
local nn = vx.nn

--- x + sepconv(silu(gn(sepconv(silu(gn(x)))))): Table 3's "residual block", pre-activation.
local Residual = nn.module "Residual"
function Residual:init(channels)
  self.conv1 = nn.SeparableConv2d(channels, channels, { activation = "silu" })
  self.conv2 = nn.SeparableConv2d(channels, channels, { activation = "silu" })
end
function Residual:forward(x) return self.conv2(self.conv1(x), x) end

local Autoencoder = nn.module "Autoencoder"

--- channels: Table 3's row, e.g. {128, 64, 32, 3}; quantizer: of the last one's width, or nil for none.
function Autoencoder:init(channels, quantizer)
  local n = #channels
  self.encoder = nn.Sequential(nn.Conv2d(3, channels[1], 3, { padding = 1 }))
  for i = 2, n - 1 do
    self.encoder:add(nn.SeparableConv2d(channels[i - 1], channels[i], { stride = 2 }))
    self.encoder:add(Residual(channels[i]))
  end
  self.encoder:add(nn.SeparableConv2d(channels[n - 1], channels[n], { output = "f32" }))
  self.quantizer = quantizer
  self.decoder = nn.Sequential(nn.SeparableConv2d(channels[n], channels[n - 1]))
  for i = n - 1, 2, -1 do
    self.decoder:add(nn.SeparableConv2d(channels[i], channels[i - 1], { up = 2 }))
    self.decoder:add(Residual(channels[i - 1]))
  end
  self.decoder:add(nn.Conv2d(channels[1], 3, 3, { padding = 1, output = "f32" }))
end

--- images (B,H,W,3), standardized → reconstruction of the same shape, the quantizer's output (nil without one), and
-- the latents that it was given.
function Autoencoder:forward(images)
  local z = self.encoder(images)
  if not self.quantizer then return self.decoder(z), nil, z end
  local q = self.quantizer(z)
  return self.decoder(q.quantized), q, z
end

--- size: of the image; channels: of each stage; codes: M; k: neighbours per vertex (the paper's count per GPU times
-- four, with `shards` = 4 to split a batch as four GPUs do); rate: peak learning rate; warmup, steps or epochs: of the
-- schedule.
local presets = {
  tiny = { size = 32, resize = "short", channels = { 64, 64, 32, 32 }, codes = 256, k = 4, shards = 1, batch = 16,
    steps = 800, warmup = 100, rate = 1e-3 },
  small = { size = 64, resize = "short", channels = { 64, 64, 32, 32 }, codes = 1024, k = 4, shards = 1, batch = 16,
    steps = 3000, warmup = 200, rate = 1e-3 },
  ["16x16x32-1024"] = { size = 256, resize = "none", channels = { 128, 128, 64, 64, 32, 32 }, codes = 1024, k = 8,
    shards = 4, batch = 64, epochs = 25,
    warmup = 16000, rate = 1e-4 },
  ["64x64x3-8192"] = { size = 256, resize = "none", channels = { 128, 64, 32, 3 }, codes = 8192, k = 32, shards = 4,
    batch = 64, epochs = 20,
    warmup = 16000, rate = 1e-4 },
  ["64x64x32-8192"] = { size = 256, resize = "none", channels = { 128, 64, 32, 32 }, codes = 8192, k = 32, shards = 4,
    batch = 64, epochs = 20,
    warmup = 16000, rate = 1e-4 },
}

--- The options of a preset's quantizer.
local function quantizer_options(preset, seed)
  return { dim = preset.channels[#preset.channels], codes = preset.codes, k = preset.k, shards = preset.shards,
    seed = seed }
end

--- The model of a finished run, untrained (vx.restore).
local function of_run(config, method, preset)
  local options = vx.runs.quantizer_options(config, quantizer_options(preset, config.seed))
  return Autoencoder(preset.channels, vx.quantizer(method, options))
end

return { new = Autoencoder, presets = presets, quantizer_options = quantizer_options, of_run = of_run }
