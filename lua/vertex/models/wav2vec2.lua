--- models/wav2vec2.lua: Wav2Vec 2.0 [Baevski et al. 2020], as torchaudio builds it: its keyword names, its state-dict
-- names and shapes, its numbers. Sequences are (B,T,C), channels last.
--
--   waves (B,L) → 7 convolutions → features (B,T,C)        m:extract; 16,000 samples → 49 frames
--   features → layer norm → linear → x; padded frames are 0
--   x + GELU(positional convolution of x), then transformer blocks         m:encode → (B,T,width)
--
--   post-norm (encoder_layer_norm_first = false)    pre-norm (true)
--     x = norm(x)                                     x = x + attention(norm1(x))
--     x = norm1(x + attention(x))                     x = x + ff(norm2(x))
--     x = norm2(x + ff(x))                            at the end: x = norm(x)
--
-- Statistics of a group-norm extractor include a row's padding, as torchaudio's do: padding a clip of 2 s by 1 s moves
-- its features by a third. With extractor_mask_norm = true they do not. Waves are taken as they are; torchaudio's
-- base model is not normalized, its large ones are (vx.data.speech has `normalize`).
-- Initial values are those of fairseq's recipe where they differ from vx.nn's: convolutions as He et al. 2015 have it,
-- positions normal with deviation sqrt(4 / (kernel width)).

local arguments = require "vertex.arguments"
local check = require "vertex.check"
local core = require "vertex.core"
local nn = require "vertex.nn"
local ops = require "vertex.ops"

local fail, shape_text = core.fail, core.shape_text

-- -- Configuration ----------------------------------------------------------------------------------------------------

local BASE_LAYERS = { { 512, 10, 5 }, { 512, 3, 2 }, { 512, 3, 2 }, { 512, 3, 2 }, { 512, 3, 2 }, { 512, 2, 2 },
  { 512, 2, 2 } }

-- torchaudio.models.wav2vec2_model's keywords, with the values of its base model; and one of our own.
local OPTIONS = {
  extractor_mode = { { "group_norm", "layer_norm" }, "group_norm" },
  extractor_conv_layer_config = { "table", BASE_LAYERS }, extractor_conv_bias = { "boolean", false },
  extractor_mask_norm = { "boolean", false },
  encoder_embed_dim = { "count", 768 }, encoder_projection_dropout = { "number", 0.1 },
  encoder_pos_conv_kernel = { "count", 128 }, encoder_pos_conv_groups = { "count", 16 },
  encoder_num_layers = { "whole", 12 }, encoder_num_heads = { "count", 12 },
  encoder_attention_dropout = { "number", 0.1 }, encoder_ff_interm_features = { "count", 3072 },
  encoder_ff_interm_dropout = { "number", 0.1 }, encoder_dropout = { "number", 0.1 },
  encoder_layer_norm_first = { "boolean", false }, encoder_layer_drop = { "number", 0.05 },
  aux_num_out = "count",
}

--- Checks a configuration and fills in the base model's values.
local function complete(config)
  local o = check.options("wav2vec2", config, OPTIONS)
  for _, name in ipairs { "projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout", "layer_drop" } do
    check.number("wav2vec2", "encoder_" .. name, o["encoder_" .. name], 0, 1)
  end
  local layers = o.extractor_conv_layer_config
  if #layers == 0 then fail "wav2vec2: extractor_conv_layer_config has no layer" end
  for i, layer in ipairs(layers) do
    if type(layer) ~= "table" then
      fail("wav2vec2: extractor_conv_layer_config[%d] is %s, expected { channels, kernel, stride }", i,
        check.show(layer))
    end
    for k = 1, 3 do
      check.integer("wav2vec2", ("extractor_conv_layer_config[%d][%d]"):format(i, k), layer[k], 1)
    end
  end
  local width = o.encoder_embed_dim
  for name, of in pairs { encoder_pos_conv_groups = "groups", encoder_num_heads = "heads" } do
    if width % o[name] ~= 0 then
      fail("wav2vec2: encoder_embed_dim %d does not divide into %d %s (%s)", width, o[name], of, name)
    end
  end
  return o
end

-- -- Parts, under torchaudio's names ----------------------------------------------------------------------------------

--- Modules in a list, numbered from 0 as PyTorch's are.
local List = nn.module "List"
function List:init(modules)
  self.count = #modules
  for i, m in ipairs(modules) do self[tostring(i - 1)] = m end
end

--- Iterates over the modules in order.
function List:each()
  local i = -1
  return function()
    i = i + 1
    return rawget(self, tostring(i))
  end
end

--- A convolution of the extractor: norm, none for most in group-norm mode, and GELU behind it.
local Block = nn.module "ConvBlock"
function Block:init(inputs, layer, bias, norm, mask_norm)
  local outputs, kernel, stride = unpack(layer)
  self.mask_norm = mask_norm
  if norm == "group_norm" then self.layer_norm = nn.GroupNorm(outputs, outputs, { activation = "gelu" }) end
  if norm == "layer_norm" then self.layer_norm = nn.LayerNorm(outputs) end
  self.norm = norm
  self.conv = nn.Conv1d(inputs, outputs, kernel, { stride = stride, bias = bias })
  ops.normal(self.conv.weight, 0, math.sqrt(2 / (inputs * kernel))) -- GELU halves the variance
end

function Block:forward(x, lengths)
  x = self.conv(x)
  if self.norm == "group_norm" then return self.layer_norm(x, self.mask_norm and lengths or nil) end
  return ops.gelu(self.norm and self.layer_norm(x) or x)
end

--- A convolution over time with a filter v g / |v| [Salimans and Kingma 2016], norms over all but the kernel's places.
local WeightNormConv = nn.module "WeightNormConv"
function WeightNormConv:init(width, kernel, groups)
  self.bias = nn.parameter({ width }, 0, { no_decay = true })
  self["parametrizations.weight.original0"] = nn.parameter({ 1, 1, kernel }, 1)
  self["parametrizations.weight.original1"] = nn.parameter({ width, width / groups, kernel },
    { "normal", math.sqrt(4 / (kernel * width)) })
  self.how = { padding = math.floor(kernel / 2), groups = groups }
  core.step(function() self["parametrizations.weight.original0"]:copy(self:norms():detach()) end)
end

function WeightNormConv:norms()
  local v = self["parametrizations.weight.original1"]
  return ops.sqrt(ops.sum(ops.square(v), { 1, 2 }, true))
end

function WeightNormConv:forward(x)
  local g, v = self["parametrizations.weight.original0"], self["parametrizations.weight.original1"]
  return ops.conv1d(x, ops.mul(v, ops.div(g, self:norms())), self.bias, self.how)
end

function WeightNormConv:summary()
  local s = self["parametrizations.weight.original1"]:shape()
  return ("%d -> %d, kernel %d, groups %d, weight norm"):format(s[1], s[1], s[3], self.how.groups)
end

local Positions = nn.module "PositionalConvolution"
function Positions:init(o)
  self.conv = WeightNormConv(o.encoder_embed_dim, o.encoder_pos_conv_kernel, o.encoder_pos_conv_groups)
end

function Positions:forward(x)
  return ops.gelu(ops.narrow(self.conv(x), 2, 1, x:size(2))) -- an even kernel makes a frame too many
end

local FeedForward = nn.module "FeedForward"
function FeedForward:init(o)
  self.intermediate_dense = nn.Linear(o.encoder_embed_dim, o.encoder_ff_interm_features)
  self.intermediate_dropout = nn.Dropout(o.encoder_ff_interm_dropout)
  self.output_dense = nn.Linear(o.encoder_ff_interm_features, o.encoder_embed_dim)
  self.output_dropout = nn.Dropout(o.encoder_dropout)
end

function FeedForward:forward(x)
  x = self.intermediate_dropout(ops.gelu(self.intermediate_dense(x)))
  return self.output_dropout(self.output_dense(x))
end

local Layer = nn.module "TransformerLayer"
function Layer:init(o)
  local width = o.encoder_embed_dim
  self.norm_first = o.encoder_layer_norm_first
  self.attention = nn.MultiHeadAttention(width, o.encoder_num_heads, { dropout = o.encoder_attention_dropout })
  self.dropout = nn.Dropout(o.encoder_dropout)
  self.layer_norm = nn.LayerNorm(width)
  self.feed_forward = FeedForward(o)
  self.final_layer_norm = nn.LayerNorm(width)
end

function Layer:forward(x, lengths)
  if self.norm_first then
    x = ops.add(x, self.dropout(self.attention(self.layer_norm(x), lengths)))
    return ops.add(x, self.feed_forward(self.final_layer_norm(x)))
  end
  x = self.layer_norm(ops.add(x, self.dropout(self.attention(x, lengths))))
  return self.final_layer_norm(ops.add(x, self.feed_forward(x)))
end

local Transformer = nn.module "Transformer"
function Transformer:init(o)
  self.norm_first, self.layer_drop = o.encoder_layer_norm_first, o.encoder_layer_drop
  self.pos_conv_embed = Positions(o)
  self.layer_norm = nn.LayerNorm(o.encoder_embed_dim)
  self.dropout = nn.Dropout(o.encoder_dropout)
  local layers = {}
  for i = 1, o.encoder_num_layers do layers[i] = Layer(o) end
  self.layers = List(layers)
end

--- What the blocks are given.
function Transformer:start(x)
  x = ops.add(x, self.pos_conv_embed(x))
  return self.dropout(self.norm_first and x or self.layer_norm(x))
end

--- Which layers this pass leaves out: each with the probability encoder_layer_drop, in training.
function Transformer:dropped()
  local count, list = self.layers.count, {}
  if not self.training or self.layer_drop == 0 or count == 0 then return list end
  for i, u in ipairs(ops.uniform(core.new({ count }, { device = "cpu" })):totable()) do
    list[i] = u <= self.layer_drop
  end
  return list
end

function Transformer:forward(x, lengths)
  x = self:start(x)
  local i, dropped = 0, self:dropped()
  for layer in self.layers:each() do
    i = i + 1
    if not dropped[i] then x = layer(x, lengths) end
  end
  return self.norm_first and self.layer_norm(x) or x
end

local Projection = nn.module "FeatureProjection"
function Projection:init(o)
  local layers = o.extractor_conv_layer_config
  local channels = layers[#layers][1]
  self.layer_norm = nn.LayerNorm(channels)
  self.projection = nn.Linear(channels, o.encoder_embed_dim)
  self.dropout = nn.Dropout(o.encoder_projection_dropout)
end

function Projection:forward(x) return self.dropout(self.projection(self.layer_norm(x))) end

local Extractor = nn.module "FeatureExtractor"
function Extractor:init(o)
  local blocks, inputs = {}, 1
  for i, layer in ipairs(o.extractor_conv_layer_config) do
    local norm = (o.extractor_mode == "layer_norm" or i == 1) and o.extractor_mode or nil
    blocks[i] = Block(inputs, layer, o.extractor_conv_bias, norm, o.extractor_mask_norm)
    inputs = layer[1]
  end
  self.conv_layers = List(blocks)
end

local Encoder = nn.module "Encoder"
function Encoder:init(o)
  self.feature_projection = Projection(o)
  self.transformer = Transformer(o)
end

-- -- The model --------------------------------------------------------------------------------------------------------

local Model = nn.module "Wav2vec2"

function Model:init(config)
  local o = complete(config)
  self.config = o
  self.feature_extractor = Extractor(o)
  self.encoder = Encoder(o)
  if o.aux_num_out then self.aux = nn.Linear(o.encoder_embed_dim, o.aux_num_out) end
end

--- Says how many frames a number of samples gives.
-- @param samples number of samples of a wave
-- @return frames, 0 where the samples are fewer than a frame takes
function Model:frames(samples)
  for _, layer in ipairs(self.config.extractor_conv_layer_config) do
    samples = math.max(0, math.floor((samples - layer[2]) / layer[3]) + 1)
  end
  return samples
end

--- Says how many samples a frame takes: the receptive field of the extractor.
-- @return samples; 400 for the base model
function Model:receptive_field()
  local field, hop = 1, 1
  for _, layer in ipairs(self.config.extractor_conv_layer_config) do
    field, hop = field + (layer[2] - 1) * hop, hop * layer[3]
  end
  return field
end

--- Fails unless lengths are nil or i32 (B), each 0 .. most.
local function check_lengths(what, lengths, B, most, of)
  if lengths == nil then return end
  if not core.is_tensor(lengths) or lengths:dtype() ~= "i32" or lengths:dim() ~= 1 or lengths:size(1) ~= B then
    fail("%s: lengths are %s, expected i32 (%d), one for each row of %s", what,
      core.is_tensor(lengths) and lengths:dtype() .. " " .. shape_text(lengths) or "a " .. type(lengths), B, of)
  end
  for b, n in ipairs(lengths:totable()) do
    if n < 0 or n > most then
      fail("%s: length %d of row %d is outside 0 .. %d", what, n, b, most)
    end
  end
end

--- Computes the features of waves: the convolutions alone.
-- @param waves tensor f32 (B,L), samples at 16,000 a second
-- @param[opt] lengths tensor i32 (B), samples of each row that count; nil: all
-- @return features f32 (B,T,C); features of padding are there, too
-- @return lengths i32 (B) in frames; nil where none were given. A clip shorter than a frame has 0
-- @raise where waves are not f32 (B,L), L is shorter than a frame, a wave holds a NaN or Inf, or lengths disagree with
-- the batch
function Model:extract(waves, lengths)
  if not core.is_tensor(waves) or waves:dtype() ~= "f32" or waves:dim() ~= 2 then
    fail("extract: waves are %s, expected f32 (B,L)",
      core.is_tensor(waves) and waves:dtype() .. " " .. shape_text(waves) or "a " .. type(waves))
  end
  local B, L = waves:size(1), waves:size(2)
  if B == 0 then fail("extract: waves %s have no row", shape_text(waves)) end
  if self:frames(L) == 0 then
    fail("extract: waves %s have fewer samples than the %d of a frame", shape_text(waves), self:receptive_field())
  end
  check_lengths("extract", lengths, B, L, "the waves " .. shape_text(waves))
  if not core.is_recording() then
    local bad, row = ops.nonfinite(waves:detach())
    if bad > 0 then fail("extract: row %d of the waves holds a NaN or Inf", row + 1) end
  end
  local counts, samples = lengths, lengths and lengths:totable()
  local function on_device(list)
    return core.tensor(list, { dtype = "i32", device = waves:device() })
  end
  local x = ops.reshape(waves, { B, L, 1 })
  for block in self.feature_extractor.conv_layers:each() do
    if lengths then
      local kernel, stride = block.conv.weight:size(3), block.conv.how.stride
      for b = 1, B do samples[b] = math.max(0, math.floor((samples[b] - kernel) / stride) + 1) end
      if block.mask_norm then counts = on_device(samples) end
    end
    x = block(x, counts)
  end
  return x, lengths and on_device(samples) or nil
end

--- Says which frames count, f32 (B,T,1), 1 or 0.
local function frames_that_count(x, lengths)
  local B, T = x:size(1), x:size(2)
  local places = {}
  for t = 1, T do places[t] = t - 1 end
  local place = ops.reshape(core.tensor(places, { device = x:device() }), { 1, T, 1 })
  return ops.lt(place, ops.reshape(lengths:to "f32", { B, 1, 1 }))
end

--- What the transformer is given: the projected features, padded frames 0.
local function prepared(self, features, lengths, options)
  local config = self.config
  local layers = config.extractor_conv_layer_config
  local channels = layers[#layers][1]
  if not core.is_tensor(features) or features:dim() ~= 3 or features:size(3) ~= channels then
    fail("encode: features are %s, expected f32 (B,T,%d)",
      core.is_tensor(features) and features:dtype() .. " " .. shape_text(features) or "a " .. type(features), channels)
  end
  local B, T = features:size(1), features:size(2)
  check_lengths("encode", lengths, B, T, "the features " .. shape_text(features))
  local o = check.options("encode", options, { mask = "any", embedding = "any" })
  local x = self.encoder.feature_projection(features)
  if o.mask then
    local mask, embedding, width = o.mask, o.embedding, config.encoder_embed_dim
    if not core.is_tensor(mask) or mask:dtype() ~= "u8" or shape_text(mask) ~= ("(%d,%d)"):format(B, T) then
      fail("encode: mask is %s, expected u8 (%d,%d)",
        core.is_tensor(mask) and mask:dtype() .. " " .. shape_text(mask) or "a " .. type(mask), B, T)
    end
    if not core.is_tensor(embedding) or embedding:numel() ~= width then
      fail("encode: a mask needs an embedding f32 (%d), what masked frames become", width)
    end
    x = ops.where(ops.reshape(mask:to "f32", { B, T, 1 }), ops.reshape(embedding, { 1, 1, width }), x)
  end
  if lengths then x = ops.where(frames_that_count(x, lengths), x, 0) end
  return x
end

--- Encodes features: projection, positions, transformer.
-- @param features tensor f32 (B,T,C), of m:extract
-- @param[opt] lengths tensor i32 (B), frames of each row that count; nil: all
-- @param[opt] options { mask = u8 (B,T), 1 where a projected frame is replaced by embedding = f32 (width) }
-- @return tensor f32 (B,T,width); frames beyond a row's length have finite values
-- @raise where a shape disagrees
function Model:encode(features, lengths, options)
  return self.encoder.transformer(prepared(self, features, lengths, options), lengths)
end

--- Encodes features and gives what each block of the transformer gives, none left out: torchaudio's extract_features.
-- A pre-norm model's last one lacks the final layer norm that m:encode applies.
-- @param features tensor f32 (B,T,C), of m:extract
-- @param[opt] lengths tensor i32 (B), frames of each row that count; nil: all
-- @return array of tensors f32 (B,T,width), the first block's first
-- @raise where a shape disagrees
function Model:layers(features, lengths)
  local transformer, list = self.encoder.transformer, {}
  local x = transformer:start(prepared(self, features, lengths))
  for layer in transformer.layers:each() do
    x = layer(x, lengths)
    list[#list + 1] = x
  end
  return list
end

--- Applies the whole model: m:extract, m:encode, and the projection to aux_num_out where the model has it.
-- @param waves tensor f32 (B,L)
-- @param[opt] lengths tensor i32 (B), samples of each row that count
-- @return tensor f32 (B,T,width or aux_num_out); lengths i32 (B) in frames, nil where none were given
-- @raise as m:extract
function Model:forward(waves, lengths)
  local features, frames = self:extract(waves, lengths)
  local x = self:encode(features, frames)
  return self.aux and self.aux(x) or x, frames
end

--- Writes the sizes, for print.
-- @return text
function Model:summary()
  local o = self.config
  return ("%s extractor, %d %s blocks of width %d"):format(o.extractor_mode, o.encoder_num_layers,
    o.encoder_layer_norm_first and "pre-norm" or "post-norm", o.encoder_embed_dim)
end

-- -- Other libraries' names -------------------------------------------------------------------------------------------

-- What stands for what, tried from top to bottom; %d is any number. The first column that matches is replaced.
local NAMES = {
  -- a prefix of fine-tuned models
  { "^wav2vec2%.", "" }, -- transformers
  { "^w2v_encoder%.w2v_model%.", "" }, -- fairseq
  { "^w2v_encoder%.proj%.", "aux." },
  { "^lm_head%.", "aux." },
  -- fairseq's extractor: a Sequential of convolution, dropout, norm, activation
  { "^feature_extractor%.conv_layers%.(%d+)%.0%.(%a+)$", "feature_extractor.conv_layers.%1.conv.%2" },
  { "^feature_extractor%.conv_layers%.(%d+)%.2%.(%a+)$", "feature_extractor.conv_layers.%1.layer_norm.%2" },
  { "^feature_extractor%.conv_layers%.(%d+)%.2%.1%.(%a+)$", "feature_extractor.conv_layers.%1.layer_norm.%2" },
  -- the projection
  { "^feature_projection%.", "encoder.feature_projection." }, -- transformers
  { "^layer_norm%.", "encoder.feature_projection.layer_norm." }, -- fairseq
  { "^post_extract_proj%.", "encoder.feature_projection.projection." },
  -- the transformer
  { "^encoder%.pos_conv_embed%.", "encoder.transformer.pos_conv_embed." }, -- transformers
  { "^encoder%.pos_conv%.0%.", "encoder.transformer.pos_conv_embed.conv." }, -- fairseq
  { "^encoder%.layer_norm%.", "encoder.transformer.layer_norm." },
  { "^encoder%.layers%.(%d+)%.self_attn%.", "encoder.transformer.layers.%1.attention." }, -- fairseq
  { "^encoder%.layers%.(%d+)%.self_attn_layer_norm%.", "encoder.transformer.layers.%1.layer_norm." },
  { "^encoder%.layers%.(%d+)%.fc1%.", "encoder.transformer.layers.%1.feed_forward.intermediate_dense." },
  { "^encoder%.layers%.(%d+)%.fc2%.", "encoder.transformer.layers.%1.feed_forward.output_dense." },
  { "^encoder%.layers%.", "encoder.transformer.layers." }, -- transformers, and the rest of fairseq's
  -- weight norm, as PyTorch named it before 2.0
  { "%.weight_g$", ".parametrizations.weight.original0" },
  { "%.weight_v$", ".parametrizations.weight.original1" },
}

-- Parts of a pretraining model that this one does not have.
local LEFT_OUT = { "^masked_spec_embed$", "^mask_emb$", "^quantizer%.", "^project_q%.", "^project_hid%.",
  "^final_proj%.", "^target_glu%." }

--- Gives the name that a tensor has here; nil for a part that only pretraining has.
local function own_name(name)
  if type(name) ~= "string" then return name end -- which the module then refuses
  for _, rule in ipairs(NAMES) do name = name:gsub(rule[1], rule[2]) end
  for _, pattern in ipairs(LEFT_OUT) do
    if name:find(pattern) then return nil end
  end
  return name
end

local load_as_named = Model.load_state_dict -- that of all modules

--- Copies tensors in: a torchaudio state with either spelling of weight norm, or one of transformers or fairseq, whose
-- names are translated by the table in this file. What only pretraining has (quantizer, projections to and from it, the
-- mask's embedding) is left out.
-- @param state table { name = tensor }, as vx.load gives it
-- @return the module itself
-- @raise where two names mean the same tensor, a name is missing or unknown, or a shape differs; nothing was changed
function Model:load_state_dict(state)
  local own, from = {}, {}
  for name, x in pairs(state) do
    local mine = own_name(name)
    if mine and own[mine] then
      fail("load_state_dict: '%s' and '%s' are both '%s'", from[mine], name, mine)
    elseif mine then
      own[mine], from[mine] = x, name
    end
  end
  return load_as_named(self, own)
end

arguments.guard_class("wav2vec2", Model)

--- Makes a Wav2Vec 2.0 model with the keyword names of torchaudio.models.wav2vec2_model. What is left out is the base
-- model's, 94,370,944 parameters; with encoder_num_heads = 8 and encoder_ff_interm_features = 4096 it is the paper's,
-- 113,257,600.
-- @param[opt] config table
-- @param[opt="group_norm"] config.extractor_mode "group_norm": after the first convolution only; "layer_norm": after
-- each
-- @param[opt] config.extractor_conv_layer_config array of { channels, kernel, stride }
-- @param[opt=false] config.extractor_conv_bias true: the convolutions have biases
-- @param[opt=false] config.extractor_mask_norm true: group-norm statistics without padding; torchaudio has no such
-- @param[opt=768] config.encoder_embed_dim width of the transformer
-- @param[opt=0.1] config.encoder_projection_dropout on the projected features; each dropout is a share from 0 to 1
-- @param[opt=128] config.encoder_pos_conv_kernel frames
-- @param[opt=16] config.encoder_pos_conv_groups of the positional convolution's channels
-- @param[opt=12] config.encoder_num_layers blocks of the transformer
-- @param[opt=12] config.encoder_num_heads of each attention
-- @param[opt=0.1] config.encoder_attention_dropout on the attention weights
-- @param[opt=3072] config.encoder_ff_interm_features width of the feed-forward layer
-- @param[opt=0.1] config.encoder_ff_interm_dropout within the feed-forward layer
-- @param[opt=0.1] config.encoder_dropout behind attention, behind the feed-forward layer, and before the first block
-- @param[opt=false] config.encoder_layer_norm_first true: pre-norm blocks
-- @param[opt=0.05] config.encoder_layer_drop probability of leaving a block out, in training
-- @param[opt] config.aux_num_out width of a linear layer behind it all, m.aux
-- @return module with m:extract, m:encode, m:layers, m:forward and m:load_state_dict
-- @raise where a keyword is unknown or a value is not in its range
local function wav2vec2(config) return Model(config) end

return wav2vec2
