--- runs/restore: the model of a sweep's checkpoint, from the file alone: it holds its run's configuration, and the
-- file of experiments/ that made the model makes it again.

local checkpoint = require "vertex.runs.checkpoint"
local core = require "vertex.core"
local json = require "vertex.json"
local safetensors = require "vertex.safetensors"

-- Experiment → file of experiments/ whose function of_run(config, method, preset) makes its model.
local MODELS = { ae_sweep = "autoencoder", w2v_sweep = "wav2vec" }

--- Loads a file of experiments/, wherever the program is called from.
local function model_file(name)
  local before = package.path
  package.path = before .. ";" .. core.root .. "/experiments/?.lua"
  local ok, module = pcall(require, name)
  package.path = before
  if not ok then core.fail("restore: %s", module) end
  return module
end

--- The preset of a run with what its --set changed.
local function preset_of(presets, config, path)
  local preset = {}
  for name, value in pairs(presets[config.preset] or core.fail("%s: no preset '%s' any more", path, config.preset)) do
    preset[name] = value
  end
  for name, value in pairs(config.set or {}) do
    if preset[name] ~= nil then preset[name] = value end
  end
  return preset
end

--- Makes the trained model of a checkpoint that ae_sweep or w2v_sweep wrote, with its quantizer (model.quantizer), from
-- the file alone, ready for inference.
--
--     local model, run = vx.restore "out/mine/checkpoints/softmax-knn-ce.safetensors"
--     local codes = model.quantizer:encode(model.encoder(images))
--
-- @param path path of the checkpoint, OUT/checkpoints/METHOD.safetensors
-- @return module, in inference mode, on the default device
-- @return table { config = the run's configuration, preset, method, step }
-- @raise where there is no such file, it is of another program, or its model is of another version of the files
return function(path)
  local extra = checkpoint.peek(path) or core.fail("restore: %s: no such file", path)
  local config = json.decode(extra.identity or "")
  local name = type(config) == "table" and MODELS[config.experiment]
  if not name then core.fail("%s is a checkpoint of neither w2v_sweep nor ae_sweep", path) end
  local file = model_file(name)
  local preset = preset_of(file.presets, config, path)
  local model = file.of_run(config, extra.method, preset)
  local fits, reason = pcall(model.load_state_dict, model, (safetensors.load(path)))
  if not fits then
    core.fail("%s is of another model than the preset '%s': %s", path, config.preset,
      require("vertex.runs.flags").reason(reason))
  end
  return model:eval(), { config = config, preset = preset, method = extra.method, step = extra.step }
end
