--- quantizers: the registry of methods, and the contract that a family of them keeps.
--
-- Each other file of this folder but base, entropy and world.lua is one family. It returns what is known of its
-- methods, as data, and the class that computes them; whatever needs a fact (help, sweeps, tables, benchmarks, tests)
-- reads it here, never from a method's name:
--   { names = { { name =, summary =, ... }, ... },   its methods, in the order of the paper's Table 1
--     options = { { name =, default =, meaning = }, ... },   beyond the common ones below
--     class = a class that extends vx.Quantizer (base.lua says with what),
--     order = place among the families (default: after all others),
--     derive = for a family over other methods: function(entry of a method) that gives the entry of this family's
--              method over it, or nil where there is none }
-- registry.by_name, and with it vx.quantizer, help and --methods, finds every method that derive can make, in no list
-- though. Listed is an entry of `names` that says base = "name of a method": derive completes it.
-- Facts stand in a method's entry, or in the family where all its methods share them:
--   paper         text: where it comes from
--   kind          "hard" (a row becomes one code, with an estimated gradient), "smooth" (a mixture of codes in
--                 training) or "scalar" (each number of a row is rounded on its own)
--   codebook      true: it has learned codes; false: it has none
--   metric        "euclid" or "cosine": what nearest means; nil where nothing is compared
--   sampler, regularizer, estimator   texts; nil where they do not apply
--   base          name of the method that it is made of; nil where it is of its own
--   stages        how often a row is quantized, each time what is left of it: a number, or a function of the options
--                 that gives one (default 1)
--   optimizer     hints for whoever trains a model with it: { rate = factor of the learning rate, weight_decay = in
--                 place of the usual one } (default {})
--   table1        true: a row of the paper's Table 1 (what `--methods paper` runs)
--   ablation      true: another method with a part left out or replaced
-- Adding a quantizer is adding such a file. Files of another folder join by registry.load_folder(dir).

local lfs = require "lfs"
local arguments = require "vertex.arguments"
local check = require "vertex.check"
local core = require "vertex.core"
local Quantizer = require "vertex.quantizers.base"

local registry = { list = {}, by_name = {}, Quantizer = Quantizer }
local fail = core.fail

--- Options every quantizer takes.
registry.common_options = {
  { name = "dim", meaning = "width of a row of z; a multiple of groups" },
  { name = "codes", meaning = "codebook size M" },
  { name = "groups", default = 1,
    meaning = "codebooks G, each on its own dim / groups columns (product quantization)" },
  { name = "weight", default = 1, meaning = "factor of the regularizer" },
  { name = "seed", default = 1, meaning = "of the codebook's start and of the Gumbel noise" },
  { name = "scale", default = 1,
    meaning = "standard deviation of the codebook's entries at the start, times 1/sqrt(dim/groups)" },
  { name = "start", default = "normal",
    meaning = "where codes begin: at random numbers, at random rows of the first training batch (\"data\") or at its"
      .. " k-means (\"kmeans\")" },
  { name = "warmup", default = 0,
    meaning = "training steps at first that pass rows as they are, without a loss; `start` takes the next batch" },
  { name = "rate", default = 1, meaning = "factor of the learning rate of this quantizer's parameters (vx.optim)" },
}

--- Options of hard methods that declare a metric and learned codes, where they have no entropy loss of their own.
registry.entropy_options = {
  { name = "entropy_weight", default = 0,
    meaning = "weight of mean_n H(p_n) - H(mean_n p_n), p_n = softmax(-|z_n - codes|^2 / entropy_temperature)" },
  { name = "entropy_temperature", default = 1, meaning = "of that softmax; under cosine of unit vectors" },
}

-- -- Facts ------------------------------------------------------------------------------------------------------------

local function is_text(x) return type(x) == "string" and x ~= "" end

local function is_boolean(x) return type(x) == "boolean" end
local function is_kind(x) return x == "hard" or x == "smooth" or x == "scalar" end
local function is_metric(x) return x == "euclid" or x == "cosine" end

local function is_stages(x)
  return type(x) == "function" or type(x) == "number" and x >= 1 and x == math.floor(x)
end

local function is_optimizer(x)
  if type(x) ~= "table" then return false end
  for key, value in pairs(x) do
    local least = key == "rate" and 1e-12 or key == "weight_decay" and 0
    if not (least and type(value) == "number" and value >= least and value < math.huge) then return false end
  end
  return true
end

-- What a method declares, in its entry or in its family: name, test of a value, what that expects, and whether it must
-- be there.
local FACTS = {
  { "paper", is_text, "a text that says where it comes from", required = true },
  { "kind", is_kind, "'hard', 'smooth' or 'scalar'", required = true },
  { "codebook", is_boolean, "true (it has learned codes) or false", required = true },
  { "metric", is_metric, "'euclid' or 'cosine'" },
  { "sampler", is_text, "a text" },
  { "regularizer", is_text, "a text" },
  { "estimator", is_text, "a text" },
  { "base", is_text, "the name of a method" },
  { "stages", is_stages, "an integer of 1 or more, or a function of the options" },
  { "optimizer", is_optimizer, "{ rate = a number above 0, weight_decay = a number of 0 or more }" },
  { "table1", is_boolean, "true or false" },
  { "ablation", is_boolean, "true or false" },
}
local FAMILY_FIELDS = { names = true, options = true, class = true, order = true, derive = true }
local ENTRY_FIELDS = { name = true, summary = true, options = true }
for _, fact in ipairs(FACTS) do FAMILY_FIELDS[fact[1]], ENTRY_FIELDS[fact[1]] = true, true end

--- The first key of t, in alphabetical order, that is not in `fields`.
local function unknown_field(t, fields)
  local found
  for key in pairs(t) do
    if not fields[key] and (not found or tostring(key) < found) then found = tostring(key) end
  end
  return found
end

--- The fact `name` of a method: its own, else its family's.
local function fact_of(family, entry, name)
  if entry[name] ~= nil then return entry[name] end
  return family[name]
end

--- The entry of `family` over the method `item`, completed with what `own` says; nil where there is none.
local function derived_entry(family, item, own)
  local entry = not item.base and family.derive(item)
  if not entry then return nil end
  for key, value in pairs(own or {}) do entry[key] = value end
  return entry
end

--- Fails unless a file returned what the head of this file asks for. Gives the family with its entries completed.
local function check_family(family, path)
  local function expect(fine, text, ...)
    if not fine then fail("quantizers: %s %s", path, text:format(...)) end
  end
  expect(type(family) == "table", "returns a %s, expected {names =, paper =, kind =, class =}", type(family))
  expect(type(family.names) == "table" and #family.names > 0,
    "names no quantizer: names = {{name = ..., summary = ...}}")
  if family.derive then
    expect(type(family.derive) == "function", "has as derive a %s, expected a function", type(family.derive))
    local completed = {}
    for key, value in pairs(family) do completed[key] = value end
    completed.names = {}
    for i, own in ipairs(family.names) do
      local item = own.base and registry.by_name[own.base]
      expect(item or not own.base, "names as base of '%s' the unknown method '%s'", own.name, own.base)
      completed.names[i] = item and derived_entry(family, item, own) or own
    end
    family = completed
  end
  local unknown = unknown_field(family, FAMILY_FIELDS)
  expect(not unknown, "has an unknown field '%s'", unknown)
  for i, entry in ipairs(family.names) do
    expect(type(entry) == "table" and is_text(entry.name) and not entry.name:find "[%s,]",
      "names[%d] has no name (a text without spaces and commas)", i)
    unknown = unknown_field(entry, ENTRY_FIELDS)
    expect(not unknown, "has an unknown field '%s' in the entry of '%s'", unknown, entry.name)
    expect(is_text(entry.summary), "says nothing of '%s': its summary is missing", entry.name)
    for _, fact in ipairs(FACTS) do
      local name, accepts, expected = unpack(fact)
      local value = fact_of(family, entry, name)
      expect(value ~= nil or not fact.required, "does not declare %s of '%s', expected %s", name, entry.name, expected)
      expect(value == nil or accepts(value), "declares %s = %s of '%s', expected %s", name, tostring(value), entry.name,
        expected)
    end
  end
  for i, option in ipairs(family.options or {}) do
    expect(type(option) == "table" and is_text(option.name) and is_text(option.meaning),
      "options[%d] should be {name =, default =, meaning =}", i)
  end
  local class = family.class
  expect(type(class) == "table" and class.is_module, "has as class a %s, expected one made by Quantizer.extend",
    type(class))
  expect(type(class.quantize) == "function" and class.quantize ~= Quantizer.quantize, "does not define %s:quantize",
    class.name)
  for _, entry in ipairs(family.names) do
    expect(class.codes_of ~= Quantizer.codes_of or class.nearest ~= Quantizer.nearest
      or fact_of(family, entry, "metric") and fact_of(family, entry, "codebook"),
      "does not define %s:nearest, which '%s' needs: it declares no metric or no codebook", class.name, entry.name)
    expect(class.rows_of ~= Quantizer.rows_of or class.lookup ~= Quantizer.lookup or fact_of(family, entry, "codebook"),
      "does not define %s:lookup, which '%s' needs: it declares no codebook", class.name, entry.name)
  end
  return family
end

-- -- Registry ---------------------------------------------------------------------------------------------------------

local added = 0 -- items so far
local deriving = {} -- by source: the families that make methods of others

--- What registry.list and registry.by_name hold of a method.
local function make_item(family, entry, source)
  local options, known = {}, {}
  local compared = fact_of(family, entry, "kind") == "hard" and fact_of(family, entry, "codebook")
    and fact_of(family, entry, "metric")
  for _, list in ipairs { registry.common_options, family.options or {}, entry.options or {},
    compared and registry.entropy_options or {} } do
    for _, o in ipairs(list) do
      if not known[o.name] then options[#options + 1] = o end
      known[o.name] = true
    end
  end
  added = added + 1
  local item = { name = entry.name, summary = entry.summary, options = options, class = family.class,
    order = (family.order or 1000) + added / 1000, source = source }
  for _, fact in ipairs(FACTS) do item[fact[1]] = fact_of(family, entry, fact[1]) end
  item.stages, item.optimizer = item.stages or 1, item.optimizer or {}
  item.entropy = false -- whether the loss of entropy_options is its own
  for _, o in ipairs(options) do item.entropy = item.entropy or o == registry.entropy_options[1] end
  return item
end

--- The method of this name that a family makes of a listed one; nil where there is none.
local function derive(_, name)
  for source, family in pairs(deriving) do
    for _, item in ipairs(registry.list) do
      local entry = derived_entry(family, item)
      if entry and entry.name == name then return make_item(family, entry, source) end
    end
  end
end
setmetatable(registry.by_name, { __index = derive })

--- Adds a family; one that came from the same file before is replaced.
local function add_family(family, source)
  local here = {}
  for _, entry in ipairs(family.names) do
    local other = here[entry.name] or registry.by_name[entry.name]
    if other and (here[entry.name] or other.source ~= source) then
      fail("quantizers: '%s' of %s exists already, from %s", entry.name, source, other.source or source)
    end
    here[entry.name] = entry
  end
  for i = #registry.list, 1, -1 do
    if registry.list[i].source == source then registry.by_name[table.remove(registry.list, i).name] = nil end
  end
  for _, entry in ipairs(family.names) do
    local item = make_item(family, entry, source)
    registry.by_name[entry.name] = item
    registry.list[#registry.list + 1] = item
  end
  deriving[source] = family.derive and family or nil
  table.sort(registry.list, function(a, b) return a.order < b.order end)
end

-- files of this folder that are no families
local NO_FAMILY = { ["init.lua"] = true, ["base.lua"] = true, ["entropy.lua"] = true, ["world.lua"] = true }

--- Adds every .lua file of a folder as a family; files read before are read again and replace what they defined.
-- @param dir path of the folder
-- @param[opt] prefix of the files' module names, where they are to be loaded by require
-- @return array of the methods' names
-- @raise where there is no such folder, where a file does not return a family (it says what is missing), or where a
-- method of that name exists already
function registry.load_folder(dir, prefix)
  local files, names = {}, {}
  if lfs.attributes(core.expect_path(dir), "mode") ~= "directory" then fail("quantizers: '%s' is no folder", dir) end
  for file in lfs.dir(dir) do
    if file:match "%.lua$" and not (prefix and NO_FAMILY[file]) then files[#files + 1] = file end
  end
  table.sort(files)
  local over = {} -- families over methods of others, which are added first
  local function add(family, path)
    family = check_family(family, path)
    add_family(family, path)
    if prefix then arguments.guard_class(family.class.name, family.class) end
    for _, entry in ipairs(family.names) do names[#names + 1] = entry.name end
  end
  for _, file in ipairs(files) do
    local path = dir .. "/" .. file
    local family = prefix and require(prefix .. file:gsub("%.lua$", "")) or dofile(path)
    if type(family) == "table" and family.derive then over[#over + 1] = { family, path } else add(family, path) end
  end
  for _, late in ipairs(over) do add(unpack(late)) end
  return names
end

--- Forgets what load_folder added of a folder.
-- @param dir path of the folder, as load_folder was given it
function registry.unload_folder(dir)
  local function here(source) return source:sub(1, #dir + 1) == dir .. "/" end
  for i = #registry.list, 1, -1 do
    if here(registry.list[i].source) then registry.by_name[table.remove(registry.list, i).name] = nil end
  end
  for source in pairs(deriving) do
    if here(source) then deriving[source] = nil end
  end
end

--- Lists the quantizers.
-- @return array of {name, summary, paper, options, kind, codebook, metric, sampler, regularizer, estimator, base,
-- stages, optimizer, table1, ablation}, in the order of the paper's Table 1, the ablations last; nil where a fact does
-- not apply
function registry.quantizers() return registry.list end

--- Lists the quantizers' names.
-- @param[opt=false] ablations true: the ablations too
-- @return array of names
function registry.names(ablations)
  local names = {}
  for _, item in ipairs(registry.list) do
    if ablations or not item.ablation then names[#names + 1] = item.name end
  end
  return names
end

--- Makes a quantizer.
-- @param name name: one of vx.quantizers(), or what a family makes of one, as rvq-NAME
-- @param options table of dim, codes and what else registry.by_name[name].options lists; dim and codes have no
-- default. Options of other families are accepted and ignored, so that one table can serve a whole sweep
-- @return module with forward, encode, decode
-- @raise where the name or an option is unknown, or an option's value is not what it should be
function registry.quantizer(name, options)
  local item = registry.by_name[check.name("quantizer", "method", name, registry.by_name)]
  local full, own, known = {}, {}, {} -- own: options of this method; known: of any
  for _, o in ipairs(item.options) do
    own[o.name] = true
    full[o.name] = o.default
    if options[o.name] ~= nil then full[o.name] = options[o.name] end
  end
  for _, other in ipairs(registry.list) do
    for _, o in ipairs(other.options) do known[o.name] = true end
  end
  for key in pairs(options) do
    if not known[key] then check.name("quantizer " .. name, "option", key, own) end
  end
  return item.class(item, full)
end

package.loaded["vertex.quantizers"] = registry -- families require this file
registry.load_folder(core.directory .. "/quantizers", "vertex.quantizers.")

return registry
