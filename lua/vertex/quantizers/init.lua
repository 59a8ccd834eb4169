--- quantizers: the registry, and what every quantizer has in common.
--
-- Each other file of this folder is one family and returns
--   { names = {{name=, summary=}, ...},            in the order of the paper's Table 1
--     paper = "where it comes from",
--     options = {{name=, default=, meaning=}, ...}, beyond the common ones below
--     class = a module class made by Quantizer:extend(), with
--       :setup(options)                             parameters beyond the codebook; may be left out
--       :quantize(z, given) → y, reg, codes, stats  training; z (N,G,D), y like z, reg {1}, codes i32 (N,G)
--       :nearest(z) → codes,  :lookup(codes) → y    inference
--   }
-- Adding a quantizer is adding such a file: help texts, sweeps, tests and the README's table read the registry. Files
-- of another folder join by registry.load_folder(dir).

local lfs = require "lfs"
local core = require "vertex.core"
local nn = require "vertex.nn"
local ops = require "vertex.ops"

local registry = { list = {}, by_name = {} }
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
}

-- -- What all quantizers share ----------------------------------------------------------------------------------------

local Quantizer = nn.module "Quantizer"
registry.Quantizer = Quantizer

--- Whether vx.graph can record a training step: false for a class whose quantize() waits for the device.
Quantizer.graphs = true

--- A class of quantizers.
function Quantizer.extend(name) return nn.module(name, Quantizer) end

local function integer(name, value, low)
  if type(value) ~= "number" or value ~= math.floor(value) or value < low or value > 2 ^ 31 then
    fail("quantizer: %s is %s, expected an integer of %d or more", name, tostring(value), low)
  end
end

local function number(name, value, low, open)
  if type(value) ~= "number" or value ~= value or value == math.huge or value < low or (open and value == low) then
    fail("quantizer: %s is %s, expected a number %s %g", name, tostring(value), open and "above" or "of at least", low)
  end
end
registry.check = { integer = integer, number = number }

function Quantizer.setup() end

function Quantizer:init(label, options)
  integer("dim", options.dim, 1)
  integer("codes", options.codes, 1)
  integer("groups", options.groups, 1)
  integer("seed", options.seed, 0)
  number("weight", options.weight, 0)
  number("scale", options.scale, 0, true)
  if options.dim % options.groups ~= 0 then
    fail("quantizer: dim %d does not divide into %d groups", options.dim, options.groups)
  end
  self.label, self.options = label, options
  self.generator = core.generator(options.seed)
  self.steps = 0        -- training forwards so far: drives the Gumbel temperature's schedule
  self.with_stats = true
  local width = options.dim / options.groups
  self.codebook = nn.parameter({ options.groups, options.codes, width }, { "normal", options.scale / math.sqrt(width) },
    { generator = self.generator })
  self:setup(options)
end

function Quantizer:summary()
  local o = self.options
  return ("%s, dim %d, %s%d codes"):format(self.label, o.dim, o.groups > 1 and o.groups .. " x " or "", o.codes)
end

--- z (..., dim) as (N, G, D).
local function as_groups(self, z, what)
  if not core.is_tensor(z) then fail("%s: %s is a %s, expected a tensor", self.label, what, type(z)) end
  local o, s = self.options, z:shape()
  if #s < 1 or s[#s] ~= o.dim then
    fail("%s: %s %s should have width %d (its last size)", self.label, what, core.shape_text(z), o.dim)
  end
  if z:numel() == 0 then fail("%s: %s %s has no rows", self.label, what, core.shape_text(z)) end
  if z:dtype() ~= "f32" then fail("%s: %s is %s, expected f32", self.label, what, z:dtype()) end
  return ops.reshape(z, { -1, o.groups, o.dim / o.groups })
end

--- exp(entropy) of each row of a (G,M) tensor of probabilities, averaged over G.
local function perplexity(p)
  local h = ops.sum(ops.mul(p, ops.log(ops.clamp(p, 1e-30, 1))), 2)
  return ops.mean(ops.exp(ops.affine(h, -1, 0))):item()
end

local function batch_stats(self, codes, mean_pi, max_p)
  local M = self.options.codes
  local count = ops.count_codes(codes, M)
  local histogram = ops.affine(count:to "f32", 1 / codes:size(1), 0)
  local used = ops.mean(ops.le(core.new({ 1 }, { device = codes:device() }):fill(1), count:to "f32")):item()
  local by_code = perplexity(histogram)
  return { usage = used, code_perplexity = by_code, perplexity = mean_pi and perplexity(mean_pi) or by_code,
    tau = self.log_tau and math.exp(self.log_tau:item()) or nil, max_p = max_p and max_p:item() or 1 }
end

--- Quantizes z (..., dim). Training: {quantized (like z), reg (scalar, times weight), codes i32 (N,G), stats};
-- gradients reach z and the parameters. After eval(): the nearest codes, no noise, reg 0. given {gumbel = noise
-- (N,G,M)} fixes the Gumbel noise. stats: perplexity exp(H(mean pi)), code_perplexity exp(H(code histogram)), usage
-- (share of codes used by this batch), tau, max_p.
function Quantizer:forward(z, given)
  local rows = as_groups(self, z, "z")
  local y, reg, codes, mean_pi, max_p
  if self.training then
    core.count(self, "steps")
    y, reg, codes, mean_pi, max_p = self:quantize(rows, given or {})
    reg = ops.reshape(self.options.weight == 1 and reg or ops.affine(reg, self.options.weight, 0), {})
  else
    codes = self:nearest(rows)
    y = self:lookup(codes)
    reg = core.new({}, { device = z:device() }):zero()
  end
  local stats = self.with_stats and require("vertex.tape").no_grad(batch_stats, self, codes, mean_pi, max_p) or {}
  return { quantized = ops.reshape(y, z:shape()), reg = reg, codes = codes, stats = stats }
end

--- Codes i32 (N,G) of z (..., dim), 0-based: what a trained quantizer stores.
function Quantizer:encode(z)
  return require("vertex.tape").no_grad(function() return self:nearest(as_groups(self, z, "z")) end)
end

--- The quantized rows (N, dim) of codes i32 (N,G).
function Quantizer:decode(codes)
  local o = self.options
  if not core.is_tensor(codes) or codes:dtype() ~= "i32" or codes:dim() ~= 2 or codes:size(2) ~= o.groups then
    fail("%s: decode: codes should be an i32 tensor (N,%d), got %s", self.label, o.groups,
      core.is_tensor(codes) and codes:dtype() .. " " .. core.shape_text(codes) or type(codes))
  end
  return ops.reshape(self:lookup(codes), { codes:size(1), o.dim })
end

--- y (N,G,D) = rows of `book` (G,M,D) at codes (N,G).
function Quantizer:take(book, codes)
  local G, M, D = self.options.groups, self.options.codes, book:size(3)
  local flat = ops.reshape(book, { G * M, D })
  if G > 1 then
    local base = {}
    for g = 1, G do base[g] = (g - 1) * M end
    local offset = core.tensor(base, { device = codes:device() })
    codes = ops.add(codes:to "f32", offset):to "i32"
  end
  return ops.gather(flat, codes)
end

-- -- Registry ---------------------------------------------------------------------------------------------------------

local added = 0 -- items so far

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
    local options = {}
    for _, o in ipairs(registry.common_options) do options[#options + 1] = o end
    for _, o in ipairs(family.options or {}) do options[#options + 1] = o end
    added = added + 1
    local item = { name = entry.name, summary = entry.summary, paper = entry.paper or family.paper, options = options,
      ablation = entry.ablation,
      order = (family.order or 1000) + added / 1000, class = family.class, source = source }
    registry.by_name[entry.name] = item
    registry.list[#registry.list + 1] = item
  end
  table.sort(registry.list, function(a, b) return a.order < b.order end)
end

local function is_text(x) return type(x) == "string" and x ~= "" end

--- Does a file return what the top of this file asks for?
local function check_family(family, path)
  local function check(fine, text, ...)
    if not fine then fail("quantizers: %s %s", path, text:format(...)) end
  end
  check(type(family) == "table", "returns a %s, expected {names =, paper =, options =, class =}", type(family))
  check(type(family.names) == "table" and #family.names > 0,
    "names no quantizer: names = {{name = ..., summary = ...}}")
  for i, entry in ipairs(family.names) do
    check(type(entry) == "table" and is_text(entry.name) and not entry.name:find "[%s,]",
      "names[%d] has no name (a text without spaces and commas)", i)
    check(is_text(entry.summary), "says nothing of '%s': its summary is missing", entry.name)
    check(is_text(entry.paper or family.paper), "does not say where '%s' comes from: paper is missing", entry.name)
  end
  for i, option in ipairs(family.options or {}) do
    check(type(option) == "table" and is_text(option.name) and is_text(option.meaning),
      "options[%d] should be {name =, default =, meaning =}", i)
  end
  local class = family.class
  check(type(class) == "table" and class.is_module, "has as class a %s, expected one made by Quantizer.extend",
    type(class))
  for _, method in ipairs { "quantize", "nearest", "lookup" } do
    check(type(class[method]) == "function", "does not define %s:%s", class.name, method)
  end
end

--- Adds every .lua file of a folder as a family; files read before are read again and replace what they defined.
-- @return array of their names
function registry.load_folder(dir, prefix)
  local files, names = {}, {}
  if lfs.attributes(dir, "mode") ~= "directory" then fail("quantizers: '%s' is no folder", dir) end
  for file in lfs.dir(dir) do
    if file:match "%.lua$" and file ~= "init.lua" then files[#files + 1] = file end
  end
  table.sort(files)
  for _, file in ipairs(files) do
    local family = prefix and require(prefix .. file:gsub("%.lua$", "")) or dofile(dir .. "/" .. file)
    check_family(family, dir .. "/" .. file)
    add_family(family, dir .. "/" .. file)
    for _, entry in ipairs(family.names) do names[#names + 1] = entry.name end
  end
  return names
end

--- Array of {name, summary, paper, options}, in the order of the paper's Table 1, the ablations last.
function registry.quantizers() return registry.list end

--- Names alone; `ablations` also lists those without a row in Table 1.
function registry.names(ablations)
  local names = {}
  for _, item in ipairs(registry.list) do
    if ablations or not item.ablation then names[#names + 1] = item.name end
  end
  return names
end

--- A quantizer by name; options as registry.by_name[name].options lists them. dim and codes have no default.
function registry.quantizer(name, options)
  local item = registry.by_name[name]
  if not item then
    fail("quantizer: unknown '%s'; known: %s", tostring(name), table.concat(registry.names(true), ", "))
  end
  if type(options) ~= "table" then fail("quantizer: '%s' needs options, at least {dim = ..., codes = ...}", name) end
  local full, known = {}, {}
  for _, o in ipairs(item.options) do
    known[o.name] = true
    full[o.name] = o.default
    if options[o.name] ~= nil then full[o.name] = options[o.name] end
  end
  for key in pairs(options) do
    if not known[key] then
      -- an option of another family is accepted and ignored, so that one table can serve a whole sweep
      local elsewhere = false
      for _, other in ipairs(registry.list) do
        for _, o in ipairs(other.options) do elsewhere = elsewhere or o.name == key end
      end
      if not elsewhere then
        local names = {}
        for _, o in ipairs(item.options) do names[#names + 1] = o.name end
        fail("quantizer %s: unknown option '%s'; known: %s", name, tostring(key), table.concat(names, ", "))
      end
    end
  end
  return item.class(name, full)
end

package.loaded["vertex.quantizers"] = registry -- families require this file
registry.load_folder(core.directory .. "/quantizers", "vertex.quantizers.")

return registry
