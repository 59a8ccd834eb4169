--- Wav2Vec 2.0 pretraining (Section 4.2, Table 4): the model around vx.models.wav2vec2, and its presets. Everything
-- here is meant to be changed.
--
-- Hidden spans of the projected features become one learned vector; the transformer's output y at a hidden frame is to
-- tell that frame's quantized feature q from those of 100 other hidden frames of the same utterance. The quantizer is
-- given a projection of the layer-normed features of hidden frames, and only of these.

local vx = require "vertex"
local nn = vx.nn

local Pretraining = nn.module "Pretraining"

--- preset: of the table below, perhaps with --set's changes; quantizer: of width preset.dim.
function Pretraining:init(preset, quantizer)
  local model = vx.models.wav2vec2(preset.model)
  local layers = model.config.extractor_conv_layer_config
  local channels, width = layers[#layers][1], model.config.encoder_embed_dim
  self.wav2vec2 = model
  self.mask_embedding = nn.parameter({ width }, { "uniform", 1 }, { no_decay = true })
  self.project_q = nn.Linear(channels, preset.dim)
  self.project_y = nn.Linear(width, preset.dim)
  self.quantizer = quantizer
  self.distractors, self.temperature = preset.distractors, preset.temperature
  self.probability, self.span = preset.mask_probability, preset.mask_span
  self.feature_gradient = preset.feature_gradient
end

--- Rows of features (N,C), as the quantizer takes them: (N,dim).
function Pretraining:targets(rows)
  return self.project_q(self.wav2vec2.encoder.feature_projection.layer_norm(rows))
end

--- The features of waves (B,L), lengths i32 (B), as rows (B T, C); their lengths in frames; B and T.
function Pretraining:features(waves, lengths)
  local x, frames = self.wav2vec2:extract(waves, lengths)
  local B, T, C = x:size(1), x:size(2), x:size(3)
  if self.feature_gradient ~= 1 then -- the value as it is, its gradient times this
    local value = x:detach()
    x = value + self.feature_gradient * (x - value)
  end
  return x, x:reshape { B * T, C }, frames
end

--- waves (B,L), lengths i32 (B) → { loss = mean over the hidden frames in nats, each = of each frame (N), equal = how
-- many distractors of each equal its target (N), hit = whether its target came first (N), z = the quantizer's rows
-- (N,dim), q = its output, penalty = mean square of the features, rows = features (B T,C), frames = those of each clip,
-- i32 (B) }. A clip is to have self:shortest() samples at least.
function Pretraining:forward(waves, lengths)
  local x, rows, frames = self:features(waves, lengths)
  local B, T = x:size(1), x:size(2)
  local mask, places = vx.span_mask(B, T, { lengths = frames, probability = self.probability, span = self.span })
  local z = self:targets(vx.gather(rows, places))
  local q = self.quantizer(z)
  local context = self.wav2vec2:encode(x, frames, { mask = mask, embedding = self.mask_embedding })
  local y = self.project_y(vx.gather(context:reshape { B * T, context:size(3) }, places))
  local distractors = vx.distractors(places, T, self.distractors)
  local loss, each, _, equal, hit = vx.contrastive_loss(y, q.quantized, distractors, { temperature = self.temperature })
  return { loss = loss, each = each, equal = equal, hit = hit, z = z, q = q, penalty = rows:square():mean(),
    rows = rows, frames = frames }
end

--- Codes i32 (N, codebooks), 0-based, of all frames that count, row after row; rows (B T,C) and frames i32 (B) or nil
-- as self:features gives them.
function Pretraining:codes(rows, frames)
  local list = {}
  for b, n in ipairs(frames and frames:totable() or {}) do
    local T = rows:size(1) / frames:size(1)
    for t = 1, n do list[#list + 1] = (b - 1) * T + t - 1 end
  end
  local counted = #list == 0 and rows or vx.gather(rows, vx.tensor(list, { dtype = "i32", device = rows:device() }))
  return self.quantizer:encode(self:targets(counted))
end

--- Codes i32 (N, codebooks) of all frames of waves (B,L), padding left out.
function Pretraining:encode(waves, lengths)
  local _, rows, frames = self:features(waves, lengths)
  return self:codes(rows, frames)
end

--- The fewest samples of a clip that two spans of hidden frames fit in.
function Pretraining:shortest()
  local model, samples = self.wav2vec2, self.wav2vec2:receptive_field()
  while model:frames(samples) < self.span + 2 do samples = samples + 1 end
  return samples
end

-- -- Presets ----------------------------------------------------------------------------------------------------------

--- What all share. model: keywords of vx.models.wav2vec2; crop: samples; dim: width of targets; codes: of a codebook,
-- groups of them; k: neighbours per vertex (the paper's count per GPU times four, with `shards` = 4 to split a batch as
-- four GPUs do); rate, final, warmup: of the schedule; penalty: weight of the features' mean square; ppl_weight: of the
-- ppl regularizer; gumbel_from, gumbel_to: of the Gumbel temperature, over the whole training.
local SHARED = { distractors = 100, temperature = 0.1, mask_probability = 0.65, mask_span = 10, feature_gradient = 1,
  penalty = 0, ppl_weight = 1, gumbel_from = 1, gumbel_to = 1, crop = 250000, dim = 256, rate = 5e-4, final = 5e-6 }

-- What fairseq's recipe has and the paper does not name.
local FAIRSEQ = { feature_gradient = 0.1, penalty = 10, ppl_weight = 0.1, gumbel_from = 2, gumbel_to = 0.5 }

local PAPER = { encoder_num_heads = 8, encoder_ff_interm_features = 4096 } -- the rest is the base model

local function preset(...)
  local p = {}
  for _, part in ipairs { SHARED, ... } do
    for name, value in pairs(part) do p[name] = value end
  end
  return p
end

local single = { model = PAPER, codes = 1024, groups = 1, k = 8, shards = 4, batch = 128, epochs = 128, warmup = 32000 }
local dual = { model = PAPER, codes = 320, groups = 2, k = 8, shards = 4, batch = 64, epochs = 20, warmup = 10000 }

--- A small model: `channels` of the convolutions, width and layers of the transformer.
local function small(channels, width, layers, heads)
  return { extractor_conv_layer_config = { { channels, 10, 5 }, { channels, 3, 2 }, { channels, 3, 2 },
    { channels, 3, 2 }, { channels, 3, 2 }, { channels, 2, 2 }, { channels, 2, 2 } },
    extractor_mask_norm = true, encoder_embed_dim = width, encoder_num_layers = layers, encoder_num_heads = heads,
    encoder_ff_interm_features = 4 * width, encoder_pos_conv_kernel = 32, encoder_pos_conv_groups = 16 }
end

local presets = {
  tiny = preset { model = small(64, 96, 2, 4), dim = 64, codes = 64, groups = 2, k = 4, shards = 1, batch = 8,
    steps = 300, warmup = 30, crop = 32000, rate = 1e-3, final = 1e-5 },
  small = preset { model = small(128, 384, 4, 6), dim = 128, codes = 160, groups = 2, k = 4, shards = 1, batch = 8,
    steps = 2000, warmup = 200, crop = 64000 },
  ["1x1024"] = preset(single), ["2x320"] = preset(dual),
  ["1x1024-fairseq"] = preset(single, FAIRSEQ), ["2x320-fairseq"] = preset(dual, FAIRSEQ),
}

--- The facts that a method's file declares; nil for one that is made of another (rvq-NAME).
local function facts_of(method)
  for _, facts in ipairs(vx.quantizers()) do
    if facts.name == method then return facts end
  end
end

--- The options of a preset's quantizer. steps: of the whole training, for the Gumbel temperature.
local function quantizer_options(p, method, steps, seed)
  local is_ppl = (facts_of(method) or {}).regularizer == "ppl"
  local moves = p.gumbel_from ~= p.gumbel_to
  return { dim = p.dim, codes = p.codes, groups = p.groups, k = p.k, shards = p.shards, seed = seed,
    weight = is_ppl and p.ppl_weight or 1,
    gumbel_tau = moves and { from = p.gumbel_from, to = p.gumbel_to, steps = steps } or p.gumbel_from }
end

--- The model of a finished run, untrained (vx.restore).
local function of_run(config, method, p)
  local options = vx.runs.quantizer_options(config, quantizer_options(p, method, 1, config.seed))
  return Pretraining(p, vx.quantizer(method, options))
end

return { new = Pretraining, presets = presets, quantizer_options = quantizer_options, of_run = of_run }
