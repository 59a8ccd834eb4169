-- vx.models.wav2vec2: torchaudio's numbers, names and gradients (golden/wav2vec2), other libraries' names, masks, what
-- training draws at random, and what is refused.

local H = require "tests.helper"
local json = require "vertex.json"
local vx = require "vertex"

local folder = H.root .. "/tests/golden/wav2vec2/"

--- A golden file: config, weights by name, the rest by name.
local function golden(name)
  local tensors, meta = vx.load(folder .. name .. ".safetensors")
  local weights, io = {}, {}
  for key, x in pairs(tensors) do
    local of = key:match "^weight%.(.+)$"
    if of then weights[of] = x else io[key] = x end
  end
  return json.decode(meta.config), weights, io
end

local function norm(x) return math.sqrt(x:square():sum():item()) end
local function relative(x, y) return norm(x - y) / norm(y) end

--- 1 for the frames that count, (B,T,1).
local function counted(x, lengths)
  return vx.lt(vx.arange(x:size(2)):reshape { 1, x:size(2), 1 }, lengths:to("f32"):reshape { x:size(1), 1, 1 })
end

local function on(device, f)
  local before = vx.device()
  vx.device(device)
  local ok, message = pcall(f)
  vx.device(before)
  if not ok then error(message, 0) end
end

local cases = { "group-norm-post", "layer-norm-pre", "auxiliary" }

describe("wav2vec2", function()
  for _, device in ipairs { "cpu", "emu:0" } do
    for _, name in ipairs(cases) do
      it(("%s is torchaudio's on %s: features, blocks, output, gradients"):format(name, device), function()
        on(device, function()
          local config, weights, io = golden(name)
          local m = vx.models.wav2vec2(config):load_state_dict(weights)
          io.waveform.requires_grad = true
          local features, frames = m:extract(io.waveform, io.lengths)
          assert.same(io.feature_lengths:totable(), frames:totable())
          assert.is_true(relative(features, io.features) < 1e-5)
          local real = counted(features, frames)
          for i, x in ipairs(m:layers(features:detach(), frames)) do
            local expected = io[("layer.%d"):format(i - 1)]
            assert.is_true(relative(x * real, expected * real) < 1e-5, "block " .. i)
          end
          local y = m:encode(features, frames)
          if m.aux then y = m.aux(y) end
          assert.is_true(relative(y * real, io.output * real) < 1e-5)
          y:backward(io.cotangent)
          assert.is_true(relative(io.waveform.grad, io["grad.waveform"]) < 1e-4)
          local whole = 0 -- size of all gradients
          for _, p in ipairs(m:named_parameters()) do whole = whole + norm(io["grad." .. p[1]]) ^ 2 end
          for _, p in ipairs(m:named_parameters()) do
            local expected = io["grad." .. p[1]]
            assert.same(expected:shape(), p[2].grad:shape(), p[1])
            local off = norm(p[2].grad - expected)
            -- the gradient of a key's bias is 0: softmax takes no notice of what all keys share
            assert.is_true(off < 1e-4 * norm(expected) or off < 1e-6 * math.sqrt(whole),
              ("%s: off by %g of %g"):format(p[1], off, norm(expected)))
          end
        end)
      end)
    end
  end

  it("has the base model's and the paper's count of parameters", function()
    assert.equal(94370944, vx.models.wav2vec2():parameter_count())
    assert.equal(113257600,
      vx.models.wav2vec2({ encoder_num_heads = 8, encoder_ff_interm_features = 4096 }):parameter_count())
    collectgarbage()
  end)

  it("makes as many frames as the paper says", function()
    local m = vx.models.wav2vec2 { encoder_num_layers = 0, encoder_embed_dim = 16, encoder_num_heads = 1 }
    assert.same({ 49, 781, 1, 0 }, { m:frames(16000), m:frames(250000), m:frames(400), m:frames(399) })
    assert.equal(400, m:receptive_field())
  end)

  it("loads both spellings of weight norm, and transformers' and fairseq's names", function()
    for _, name in ipairs { "group-norm-post", "layer-norm-pre" } do
      local config, weights, io = golden(name)
      local expected = vx.models.wav2vec2(config):load_state_dict(weights)(io.waveform)
      local function loads(rename, more)
        local state = {}
        for key, x in pairs(weights) do state[rename(key)] = x end
        for key, x in pairs(more or {}) do state[key] = x end
        local m = vx.models.wav2vec2(config):load_state_dict(state)
        assert.equal(expected:bytes(), m(io.waveform):bytes())
      end
      local function old(key)
        return (key:gsub("parametrizations.weight.original0", "weight_g")
          :gsub("parametrizations.weight.original1", "weight_v"))
      end
      local function transformers(key)
        return "wav2vec2." .. key:gsub("^encoder%.feature_projection", "feature_projection")
          :gsub("^encoder%.transformer", "encoder")
      end
      local layer_norm = name == "layer-norm-pre"
      local function fairseq(key)
        key = old(key):gsub("(conv_layers%.%d+)%.conv%.", "%1.0.")
          :gsub("(conv_layers%.%d+)%.layer_norm%.", layer_norm and "%1.2.1." or "%1.2.")
          :gsub("^encoder%.feature_projection%.layer_norm", "layer_norm")
          :gsub("^encoder%.feature_projection%.projection", "post_extract_proj")
          :gsub("^encoder%.transformer%.pos_conv_embed%.conv", "encoder.pos_conv.0")
          :gsub("^encoder%.transformer%.layers%.(%d+)%.attention", "encoder.layers.%1.self_attn")
          :gsub("^encoder%.transformer%.layers%.(%d+)%.layer_norm", "encoder.layers.%1.self_attn_layer_norm")
          :gsub("^encoder%.transformer", "encoder"):gsub("feed_forward%.intermediate_dense", "fc1")
          :gsub("feed_forward%.output_dense", "fc2")
        return key
      end
      loads(old)
      loads(transformers, { ["wav2vec2.masked_spec_embed"] = vx.zeros { 5 },
        ["quantizer.codevectors"] = vx.zeros { 1, 4, 2 }, ["project_hid.weight"] = vx.zeros { 2, 2 } })
      loads(function(key) return old(transformers(key)) end)
      loads(fairseq, { mask_emb = vx.zeros { 5 }, ["quantizer.vars"] = vx.zeros { 1, 4, 2 },
        ["final_proj.bias"] = vx.zeros { 2 } })
      loads(function(key) return "w2v_encoder.w2v_model." .. fairseq(key) end)
    end
    local config, weights = golden "auxiliary"
    local state = {}
    for key, x in pairs(weights) do state[key:gsub("^aux", "lm_head")] = x end
    assert.same(weights["aux.weight"]:totable(),
      vx.models.wav2vec2(config):load_state_dict(state).aux.weight:totable())
  end)

  it("refuses a state of another configuration, and changes nothing", function()
    local config, weights = golden "group-norm-post"
    local m = vx.models.wav2vec2(config)
    local before = m.encoder.feature_projection.projection.weight:bytes()
    local function refused(change, ...)
      local state, words = {}, { ... }
      for key, x in pairs(weights) do state[key] = x end
      change(state)
      H.raises(function() m:load_state_dict(state) end, unpack(words))
      assert.equal(before, m.encoder.feature_projection.projection.weight:bytes())
    end
    local name = "encoder.transformer.layers.1.attention.q_proj.weight"
    refused(function(s) s[name] = nil end, name, "missing")
    refused(function(s) s[name] = vx.zeros { 3, 3 } end, name, "(3,3)", "(12,12)")
    refused(function(s) s["encoder.transformer.layers.2.layer_norm.bias"] = vx.zeros { 12 } end, "layers.2", "no place")
    refused(function(s) s["encoder.layers.1.attention.q_proj.weight"] = vx.zeros { 12, 12 } end, "are both")
    local _, other = golden "layer-norm-pre"
    H.raises(function() m:load_state_dict(other) end, "load_state_dict")
  end)

  it("replaces hidden frames by the embedding, and those alone", function()
    local config, weights, io = golden "group-norm-post"
    config.encoder_num_layers = 0
    for key in pairs(weights) do
      if key:find "layers%.%d" and key:find "transformer" then weights[key] = nil end
    end
    local m = vx.models.wav2vec2(config):load_state_dict(weights)
    local features = m:extract(io.waveform)
    local B, T = features:size(1), features:size(2)
    local mask, places = vx.span_mask(B, T, { span = 3 }, vx.generator(1))
    local embedding = vx.randn({ 12 }, { requires_grad = true })
    m:encode(features, nil, { mask = mask, embedding = embedding }):square():sum():backward()
    assert.is_true(norm(embedding.grad) > 0)
    -- what stood at hidden frames makes no difference, what stood elsewhere does
    local other = features:detach():clone()
    local rows = other:reshape { B * T, features:size(3) }
    for _, at in ipairs(places:totable()) do rows[at + 1]:fill(at) end
    local function encoded(x) return m:encode(x, nil, { mask = mask, embedding = embedding }):bytes() end
    assert.equal(encoded(features), encoded(other))
    for t = 1, T do
      if mask[1][t]:item() == 0 then rows[t]:fill(1) end
    end
    assert.not_equal(encoded(features), encoded(other))
  end)

  it("lets no padding through where extractor_mask_norm is set, and much of it where it is not", function()
    for _, masked in ipairs { true, false } do
      local config, weights, io = golden "group-norm-post"
      config.extractor_mask_norm = masked
      local m = vx.models.wav2vec2(config):load_state_dict(weights)
      local alone = m(io.waveform:narrow(1, 2, 1):narrow(2, 1, 431):contiguous())
      local y, frames = m(io.waveform, io.lengths)
      local difference = relative(y:narrow(1, 2, 1):narrow(2, 1, frames[2]:item()), alone)
      assert.equal(masked, difference < 1e-5)
      assert.is_true(masked or difference > 1e-2)
    end
  end)

  it("drops elements and blocks at random in training alone, the same ones for a seed", function()
    local config, weights, io = golden "group-norm-post"
    for _, name in ipairs { "projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout", "layer_drop" } do
      config["encoder_" .. name] = 0.5
      local m = vx.models.wav2vec2(config):load_state_dict(weights)
      local function output(seed)
        vx.seed(seed)
        return m(io.waveform, io.lengths):bytes()
      end
      local different = false
      for seed = 1, 8 do different = different or output(seed) ~= output(seed + 100) end
      assert.is_true(different, name)
      assert.equal(output(5), output(5), name)
      m:eval()
      assert.equal(output(5), output(6), name)
      config["encoder_" .. name] = 0
    end
    config.encoder_layer_drop = 1 -- no block is left: no gradient reaches one
    local m = vx.models.wav2vec2(config):load_state_dict(weights)
    m(io.waveform):square():sum():backward()
    assert.is_nil(m.encoder.transformer.layers["0"].attention.q_proj.weight.grad)
    assert.is_truthy(m.encoder.transformer.layer_norm.weight.grad)
  end)

  it("has the same bits twice and for any number of threads", function()
    local config, weights, io = golden "layer-norm-pre"
    local m = vx.models.wav2vec2(config):load_state_dict(weights)
    local function run()
      m:zero_grad()
      local y = m(io.waveform, io.lengths)
      y:backward(io.cotangent)
      local list = { y:bytes() }
      for _, p in ipairs(m:named_parameters()) do list[#list + 1] = p[2].grad:bytes() end
      return list
    end
    H.same_bits(run)
    H.same_bits(function() return H.with_threads(1, run) end, function() return H.with_threads(2, run) end)
  end)

  for _, device in ipairs { "cpu", "emu:0" } do
    it("trains under autocast on " .. device, function()
      on(device, function()
        local config, weights, io = golden "group-norm-post"
        local m = vx.models.wav2vec2(config):load_state_dict(weights)
        local exact = m(io.waveform, io.lengths)
        vx.autocast "bf16"
        local ok, message = pcall(function()
          local y = m(io.waveform, io.lengths)
          assert.is_true(relative(y, exact) < 0.05)
          y:backward(io.cotangent)
          for _, p in ipairs(m:named_parameters()) do assert.equal("f32", p[2].grad:dtype()) end
        end)
        vx.autocast "f32"
        assert.is_true(ok, message)
      end)
    end)
  end

  it("says what is wrong with a configuration", function()
    local function refused(config, ...)
      local words = { ... }
      H.raises(function() vx.models.wav2vec2(config) end, unpack(words))
    end
    refused({ encoder_embed = 5 }, "unknown option 'encoder_embed'", "encoder_embed_dim")
    refused({ extractor_mode = "batch_norm" }, "extractor_mode is 'batch_norm'", "group_norm")
    refused({ encoder_num_heads = 7 }, "768 does not divide into 7 heads")
    refused({ encoder_pos_conv_groups = 5 }, "768 does not divide into 5 groups")
    refused({ encoder_dropout = 1.5 }, "encoder_dropout is 1.5")
    refused({ extractor_conv_layer_config = {} }, "has no layer")
    refused({ extractor_conv_layer_config = { { 8, 10 } } }, "extractor_conv_layer_config[1][3] is nil")
    refused({ extractor_conv_layer_config = { 8 } }, "extractor_conv_layer_config[1] is 8",
      "expected { channels, kernel, stride }")
  end)

  it("says what is wrong with waves, features, lengths and masks", function()
    local config, weights = golden "group-norm-post"
    local m = vx.models.wav2vec2(config):load_state_dict(weights)
    local function i32(t) return vx.tensor(t, { dtype = "i32" }) end
    H.raises(function() m:extract { 1, 2 } end, "extract: waves is a table, expected a tensor f32 (B,L)")
    H.raises(function() m:extract(vx.zeros { 700 }) end, "extract: waves are f32 (700), expected f32 (B,L)")
    H.raises(function() m:extract(vx.zeros({ 1, 700 }, { dtype = "i32" })) end, "i32 (1,700)")
    H.raises(function() m:extract(vx.zeros { 0, 700 }) end, "waves (0,700) have no row")
    H.raises(function() m:extract(vx.zeros { 2, 3 }) end, "waves (2,3) have fewer samples than the 20 of a frame")
    H.raises(function() m:extract(vx.zeros { 2, 19 }) end, "fewer samples than the 20 of a frame")
    assert.same({ 2, 1, 6 }, m:extract(vx.zeros { 2, 20 }):shape())
    H.raises(function() m:extract(vx.zeros { 2, 700 }, i32 { 700 }) end, "lengths are i32 (1), expected i32 (2)",
      "(2,700)")
    H.raises(function() m:extract(vx.zeros { 2, 700 }, vx.tensor { 700, 1 }) end, "lengths are f32 (2)")
    H.raises(function() m:extract(vx.zeros { 2, 700 }, i32 { 700, 701 }) end, "length 701 of row 2 is outside 0 .. 700")
    local nan = vx.zeros { 2, 700 }
    nan[2][500] = 0 / 0
    H.raises(function() m:extract(nan) end, "row 2 of the waves holds a NaN or Inf")
    local f = vx.zeros { 2, 30, 6 }
    H.raises(function() m:encode(vx.zeros { 2, 30, 8 }) end, "features are f32 (2,30,8), expected f32 (B,T,6)")
    H.raises(function() m:encode(f, i32 { 30, 31 }) end, "encode: length 31 of row 2 is outside 0 .. 30")
    local mask = vx.zeros({ 2, 29 }, { dtype = "u8" })
    H.raises(function() m:encode(f, nil, { mask = mask, embedding = vx.zeros { 12 } }) end, "mask is u8 (2,29)",
      "(2,30)")
    H.raises(function() m:encode(f, nil, { mask = vx.zeros({ 2, 30 }, { dtype = "u8" }) }) end,
      "a mask needs an embedding f32 (12)")
    H.raises(function() m:encode(f, nil, { masks = mask }) end, "unknown option 'masks'")
  end)

  it("gives finite values beyond a row's length, and in a row of length 0", function()
    local config, weights, io = golden "layer-norm-pre"
    local m = vx.models.wav2vec2(config):load_state_dict(weights)
    local y, frames = m(io.waveform, vx.tensor({ 700, 3, 400 }, { dtype = "i32" }))
    assert.equal(0, frames[2]:item())
    assert.equal(0, (vx.ops.nonfinite(y:reshape { -1, y:size(3) })))
  end)
end)

describe("the contrastive loss", function()
  it("is that of the reference where most distractors equal the positive", function()
    local t = vx.load(folder .. "contrastive.safetensors")
    for _, device in ipairs { "cpu", "emu:0" } do
      on(device, function()
        local y, q = t.y:to(device), t.q:to(device)
        y.requires_grad, q.requires_grad = true, true
        local loss, each, logits, equal, hit = vx.contrastive_loss(y, q, t.distractors:to(device))
        local N = y:size(1)
        H.close({ loss:item() * N }, t.loss_sum:totable(), 1e-5, 0)
        H.close(H.flat(each), H.flat(t.loss_per_frame), 1e-5, 1e-5)
        H.close(H.flat(logits), H.flat(t.logits), 1e-5, 1e-5)
        assert.equal(153, equal:to("f32"):sum():item())
        assert.same({ 20, 0, 0 }, { equal[1]:item(), hit[1]:item(), each[1]:item() }) -- all of row 0: collapse
        loss = loss * N
        loss:backward()
        assert.is_true(relative(y.grad, t["grad.y"]:to(device)) < 1e-4)
        assert.is_true(relative(q.grad, t["grad.q"]:to(device)) < 1e-4)
      end)
    end
  end)

  it("has its two degenerate values: 0 where all targets are one, ln 101 where nothing is told apart", function()
    local y, q = vx.randn { 40, 8 }, vx.ones { 40, 8 }
    y.requires_grad, q.requires_grad = true, true
    local distractors = vx.distractors(vx.arange(40, { dtype = "i32" }), 40, 100, vx.generator(1))
    local loss, _, _, equal, hit = vx.contrastive_loss(y, q, distractors)
    assert.same({ 0, 4000, 0 }, { loss:item(), equal:to("f32"):sum():item(), hit:to("f32"):sum():item() })
    loss:backward()
    assert.same({ 0, 0 }, { norm(y.grad), norm(q.grad) })
    H.close({ vx.contrastive_loss(y, q, distractors, { keep_equal = true }):item() }, { math.log(101) }, 1e-6, 0)
    -- targets that differ in size alone are no equals
    local scaled = vx.ones { 40, 8 } * vx.arange(1, 41):reshape { 40, 1 }
    H.close({ vx.contrastive_loss(y, scaled, distractors):item() }, { math.log(101) }, 1e-6, 0)
  end)
end)
