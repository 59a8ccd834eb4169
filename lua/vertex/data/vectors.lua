--- vectors.lua: batches of vectors of your own, from .npy and safetensors files that may be larger than memory.
--
--     local set = vx.data.vectors { path = "features.npy", batch = 4096 }
--     local x, index = set:next()            -- f32 (4096, width), i32 (4096): row numbers, 0-based
--
-- Files are mapped, not loaded: a batch copies its rows, converted to f32. The order of epoch e is a permutation that
-- (seed, e) determines; position says how many rows were delivered, and `position =` goes on from there with the same
-- batches.

local arguments = require "vertex.arguments"
local check = require "vertex.check"
local core = require "vertex.core"
local npy = require "vertex.npy"
local ops = require "vertex.ops"
local safetensors = require "vertex.safetensors"

local lfs = require "lfs"
local fail = core.fail

-- -- Which rows of which files ----------------------------------------------------------------------------------------

--- A matrix in a file as core.rows wants it, and its width.
local function part(file, shape, dtype, offset, column_major, name)
  if #shape ~= 2 then
    fail("vectors: %s%s has the shape %s, expected rows of numbers (N,D)", file.path,
      name and " '" .. name .. "'" or "", core.shape_text(shape))
  end
  return { file = file, format = dtype, offset = offset, rows = shape[1], column_major = column_major }, shape[2]
end

local function npy_part(file)
  local h = npy.header(file)
  return part(file, h.shape, h.dtype, h.offset, h.fortran)
end

local function safetensors_part(file, name)
  local header, names = safetensors.header(file), {}
  for n, entry in pairs(header) do
    if #entry.shape == 2 and not entry.unread then names[#names + 1] = n end
  end
  table.sort(names)
  if name == nil and #names == 1 then name = names[1] end
  local entry = name and header[name]
  if not entry then
    fail("vectors: %s %s; it holds the matrices %s", file.path,
      name and ("has no tensor '%s'"):format(name) or "holds several tensors: say which by `tensor`",
      #names > 0 and table.concat(names, ", ") or "(none)")
  end
  if entry.unread then
    fail("vectors: %s: '%s' has dtype %s; read are %s", file.path, name, entry.dtype,
      table.concat(core.stored_dtypes(), " "))
  end
  return part(file, entry.shape, entry.dtype, entry.offset, false, name)
end

--- The .npy files of a folder, in the order of their names.
local function npy_files(folder)
  local files = {}
  for file in lfs.dir(folder) do
    if file:match "%.npy$" then files[#files + 1] = folder .. "/" .. file end
  end
  table.sort(files)
  if #files == 0 then fail("vectors: there is no .npy file in %s", folder) end
  return files
end

--- Parts and width of a path. open(path) gives a reader.
local function find_parts(path, tensor, open)
  if type(path) ~= "string" then
    fail("vectors: path is a %s, expected a file or a folder of .npy files", type(path))
  end
  local mode = lfs.attributes(core.expect_path(path), "mode")
  if not mode then fail("vectors: %s: no such file or folder", path) end
  if mode ~= "directory" then
    local file = open(path)
    if npy.is(file) then
      local one, width = npy_part(file)
      return { one }, width
    end
    local one, width = safetensors_part(file, tensor)
    return { one }, width
  end
  local parts, width = {}, nil
  for i, name in ipairs(npy_files(path)) do
    local w
    parts[i], w = npy_part(open(name))
    if width and w ~= width then
      fail("vectors: %s has rows of %d numbers, %s rows of %d", parts[1].file.path, width, name, w)
    end
    width = w
  end
  return parts, width
end

--- Opens each file of a path once. Gives the rows in them and their width.
local function open_parts(path, tensor)
  local opened = {}
  local function open(name)
    opened[#opened + 1] = core.reader(name)
    return opened[#opened]
  end
  local ok, rows, width = pcall(function()
    local parts, width = find_parts(path, tensor, open)
    if width == 0 then fail("vectors: %s holds rows of no numbers", path) end
    return core.rows(parts, width), width
  end)
  if ok then return rows, width end
  for _, file in ipairs(opened) do file:close() end
  error(rows, 0)
end

-- -- Batches ----------------------------------------------------------------------------------------------------------

local Vectors = {}
Vectors.__index = Vectors

local OPTIONS = { path = "any", tensor = "any", device = "any", batch = { "count", 4096 },
  shuffle = { "boolean", true }, seed = { "whole", 1 }, epochs = { "whole", 0 }, position = { "whole", 0 },
  shard = { "whole", 0 }, shards = { "count", 1 } }

--- Opens vectors in files.
-- @param options {path: a .npy file, a safetensors file, or a folder of .npy files of one width; tensor: the name of a
-- matrix in a safetensors file that holds several; batch = 4096 rows; shuffle = true; seed = 1, of the order; epochs =
-- 0, endless, or how often each row comes; position = 0, rows delivered before, to all readers; shard = 0 and shards =
-- 1, this reader's number (0-based) among those that share the order, of which it takes every shards-th row; device,
-- the default one}
-- @return object with :next(), :read(first, count), :take(index), :size(), :width(), :position(), :close()
-- @raise where there is no such file, it holds no matrix of numbers, widths differ, or an option is unknown
local function vectors(options)
  local o = check.options("vectors", options, OPTIONS)
  local rows, width = open_parts(o.path, o.tensor)
  local n = rows:count()
  if n == 0 then fail("vectors: %s holds no row", o.path) end
  return setmetatable({ rows = rows, n = n, d = width, o = o, at = o.position, device = o.device or core.device() },
    Vectors)
end

--- The order of an epoch, i32 (n) on the CPU; kept until another is asked for.
local function order_of(self, epoch)
  if self.order_epoch ~= epoch then
    local generator = core.generator(self.o.seed)
    generator.drawn = epoch
    if self.kept_order then self.kept_order:release() end
    self.kept_order = core.keep(ops.permutation(self.n, generator, { device = "cpu" }))
    self.order_epoch = epoch
  end
  return self.kept_order
end

local function open_rows(self) return self.rows or fail "vectors: closed" end

--- Reads the next batch.
-- @return x f32 (B,D), and index i32 (B), the rows' numbers, 0-based; B is `batch`, or less at the end of the last
-- epoch; nil when the epochs are over or the run was interrupted
-- @raise where a row holds a NaN or Inf (file and row are named), a file became shorter, or the set is closed
function Vectors:next()
  local rows, o = open_rows(self), self.o
  if core.interrupted() then return nil end
  local left = o.epochs > 0 and o.epochs * self.n - self.at or math.huge
  local count = math.min(o.batch * o.shards, left) -- of all readers
  local own = math.ceil((count - o.shard) / o.shards)
  if own <= 0 then return nil end
  local index, filled = core.new({ count }, { dtype = "i32", device = "cpu" }), 0
  while filled < count do
    local epoch, place = math.floor((self.at + filled) / self.n), (self.at + filled) % self.n
    local take = math.min(count - filled, self.n - place)
    local slice = ops.narrow(index, 1, filled + 1, take)
    if o.shuffle then
      slice:copy(ops.narrow(order_of(self, epoch), 1, place + 1, take))
    else
      local numbers = {}
      for i = 1, take do numbers[i] = place + i - 1 end
      slice:fromtable(numbers)
    end
    filled = filled + take
  end
  if o.shards > 1 then index = core.contiguous(core.view(index, { own }, { o.shards }, o.shard)) end
  local x = core.new({ own, self.d }, { device = "cpu" })
  rows:read(x, index)
  self.at = self.at + count
  return x:to(self.device), index:to(self.device)
end

--- Reads rows in the order of the files.
-- @param first number of the first row, 0-based
-- @param count number of rows
-- @return f32 (count,D)
-- @raise where there are not so many, or as next() does
function Vectors:read(first, count)
  check.integer("vectors", "first", first, 0)
  check.integer("vectors", "count", count, 0)
  local x = core.new({ count, self.d }, { device = "cpu" })
  open_rows(self):read(x, nil, first)
  return x:to(self.device)
end

--- Reads rows by their numbers.
-- @param index tensor i32 (B) on the CPU, 0-based
-- @return f32 (B,D)
-- @raise where a number is none of a row, or as next() does
function Vectors:take(index)
  local x = core.new({ index:size(1), self.d }, { device = "cpu" })
  open_rows(self):read(x, index)
  return x:to(self.device)
end

--- Counts the rows of all files.
-- @return integer
function Vectors:size() return self.n end

--- Says how wide a row is.
-- @return integer D
function Vectors:width() return self.d end

--- Says how many rows were delivered, over all epochs: `position` of a set that goes on from here.
-- @return integer
function Vectors:position() return self.at end

--- Lets go of the files; the set gives no more batches.
function Vectors:close()
  if self.rows then self.rows:close() end
  if self.kept_order then self.kept_order:release() end
  self.rows, self.kept_order, self.order_epoch = nil, nil, nil
end

arguments.guard_class("vectors", Vectors)

return vectors
