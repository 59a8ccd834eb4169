--- runs/checkpoint: all of a training run in one file, so that going on gives the bits of never having stopped: the
-- parameters and buffers of the model, the optimizer's moments, the random generators, the modules' plain_state (nn),
-- what is summed over steps, and what the caller adds.
--
-- The file is a safetensors one, written whole or not at all. Tensors are named model.NAME, optimizer.NAME,
-- sums.KEY.NAME and run.NAME; metadata: vertex = "checkpoint", version, optimizer_steps, and as JSON generators (of
-- modules, with their plain_state), sums (their plain values) and extra.
--
-- Several ranks save together, and rank 0 writes: all else is the same on all of them (which is checked), but the sums
-- are each rank's own, those of rank r > 0 under sums.KEY@r.NAME. As many ranks go on with their own; any other number
-- has their total on rank 0.

local check = require "vertex.check"
local core = require "vertex.core"
local dist = require "vertex.dist"
local json = require "vertex.json"
local safetensors = require "vertex.safetensors"

local checkpoint = {}
local fail = core.fail

--- The name in the file of the r-th rank's sum.
local function key_of(key, r) return r == 1 and key or key .. "@" .. r - 1 end

--- Collects what each rank sums: tensors by their names in the file, and the plain values by key.
local function collect_sums(sums, tensors)
  local plain = {}
  for _, key in ipairs(check.names(sums)) do
    local parts, own = sums[key]:state()
    local texts = dist.gather_text(json.encode(own))
    for _, name in ipairs(check.names(parts)) do
      local x = parts[name]
      if #texts == 1 then
        tensors[("sums.%s.%s"):format(key, name)] = x
      else
        local all = dist.all_gather(x)
        for r = 1, #texts do tensors[("sums.%s.%s"):format(key_of(key, r), name)] = all:select(1, r) end
      end
    end
    for r, text in ipairs(texts) do plain[key_of(key, r)] = json.decode(text) end
  end
  return plain
end

--- Gives each rank its sums back.
local function restore_sums(sums, parts, plain, ranks)
  for key, values in pairs(plain) do
    local name, r = key:match "^(.-)@(%d+)$"
    name, r = name or key, tonumber(r) or 0
    local mine
    if ranks == dist.size() then mine = r == dist.rank() else mine = dist.rank() == 0 end
    if mine and sums[name] then sums[name]:restore(parts[key] or {}, values) end
  end
end

--- Describes the random generators and the plain_state of a model's modules, and the default generator, as they are.
-- @param model module
-- @return text
-- @raise where a module's plain_state names what is not plain
function checkpoint.generators(model)
  local modules, default = {}, core.default_generator
  model:visit(function(m, name)
    local own = m.generator and { seed = m.generator.seed, drawn = m.generator.drawn } or {}
    for _, field in ipairs(m.plain_state) do own[field] = m[field] end
    if next(own) then modules[name] = own end
  end)
  return json.encode { modules = modules, default = { seed = default.seed, drawn = default.drawn } }
end

--- Writes a checkpoint.
-- @param path path of the file
-- @param state {model = module, optimizer = vx.optim's or nil, sums = {key = vx.runs.meter or vx.metrics.code_use} or
-- nil: what a log line tells of all steps since the last, tensors = {name = tensor} or nil, generators = what
-- checkpoint.generators gave at an earlier moment, or nil for as they are}
-- @param extra table of plain values: step, position, results
-- @raise where the file cannot be written, or the model is no longer the same on all ranks
function checkpoint.save(path, state, extra)
  local tensors = {}
  for name, x in pairs(state.model:state_dict()) do tensors["model." .. name] = x end
  local optimizer = state.optimizer
  for name, x in pairs(optimizer and optimizer:state_dict() or {}) do tensors["optimizer." .. name] = x end
  dist.expect_same(tensors, "model and optimizer")
  local sums = collect_sums(state.sums or {}, tensors)
  if dist.rank() > 0 then return end
  for name, x in pairs(state.tensors or {}) do tensors["run." .. name] = x end
  safetensors.save(path, tensors, {
    vertex = "checkpoint", version = core.version,
    optimizer_steps = tostring(optimizer and optimizer.steps or 0),
    generators = state.generators or checkpoint.generators(state.model),
    sums = json.encode(sums), ranks = tostring(dist.size()),
    extra = json.encode(extra),
  })
end

local function extra_of(path, metadata)
  if metadata.vertex ~= "checkpoint" then fail("%s is no checkpoint of this project", path) end
  local extra, reason = json.decode(metadata.extra or "")
  if type(extra) ~= "table" then fail("%s: damaged checkpoint (%s)", path, tostring(reason)) end
  return extra
end

--- Reads the `extra` of a checkpoint, without its tensors.
-- @param path path of the file
-- @return table; nil where the file does not exist
-- @raise where the file is no checkpoint, or damaged
function checkpoint.peek(path)
  if not core.file_size(path) then return nil end
  return extra_of(path, safetensors.metadata(path))
end

--- Brings a run back to where checkpoint.save left one of the same kind.
-- @param path path of the file
-- @param state {model =, optimizer =, sums =} as for checkpoint.save, made anew
-- @return extra, as it was saved
-- @raise where there is no such file, where it is damaged, or where its tensors are not those of this model and
-- optimizer
function checkpoint.load(path, state)
  if not core.file_size(path) then fail("load %s: no such checkpoint", path) end
  local tensors, metadata = safetensors.load(path, { device = "cpu" })
  local extra = extra_of(path, metadata)
  local model, parts, moments = {}, {}, state.optimizer and state.optimizer:state_dict() or {}
  for name, x in pairs(tensors) do
    local part, rest = name:match "^(%a+)%.(.+)$"
    if part == "model" then model[rest] = x end
    if part == "sums" then
      local key, own = rest:match "^(.-)%.(.+)$"
      parts[key] = parts[key] or {}
      parts[key][own] = x
    end
    if part == "optimizer" and not moments[rest] then fail("%s: '%s' has no place in the optimizer", path, rest) end
  end
  for name, x in pairs(moments) do
    local stored = tensors["optimizer." .. name]
    if not stored or core.shape_text(stored) ~= core.shape_text(x) then
      fail("%s: '%s' of the optimizer is missing or of another shape", path, name)
    end
  end
  state.model:load_state_dict(model)
  for name, x in pairs(moments) do x:copy(tensors["optimizer." .. name]) end
  if state.optimizer then state.optimizer.steps = tonumber(metadata.optimizer_steps) end
  local generators = json.decode(metadata.generators or "") or fail("%s: damaged checkpoint (generators)", path)
  state.model:visit(function(m, name)
    local own = generators.modules[name] or {}
    if m.generator and own.seed then m.generator.seed, m.generator.drawn = own.seed, own.drawn end
    for _, field in ipairs(m.plain_state) do
      if own[field] ~= nil then m[field] = own[field] end
    end
  end)
  restore_sums(state.sums or {}, parts, json.decode(metadata.sums or "") or {}, tonumber(metadata.ranks or 1))
  core.default_generator.seed, core.default_generator.drawn = generators.default.seed, generators.default.drawn
  for _, x in pairs(tensors) do x:release() end
  return extra
end

--- Reads the tensors that were saved beside model and optimizer.
-- @param path path of the file
-- @return table {name = tensor on the CPU}; nil where there are none
-- @raise where the file is missing or damaged
function checkpoint.tensors(path)
  local found
  for name, x in pairs(safetensors.load(path, { device = "cpu" })) do
    local rest = name:match "^run%.(.+)$"
    if rest then
      found = found or {}
      found[rest] = x
    else
      x:release()
    end
  end
  return found
end

return checkpoint
