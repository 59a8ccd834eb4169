--- Image data: folders of photographs, or the procedural set where there are none.
--
--     local data = require "vertex.data.images"               -- also vx.data
--     local set = data.images{path = "photos", size = 64, crop = "random", flip = true, batch = 16, seed = 1}
--     local x, index = set:next()                              -- (16, 64, 64, 3) standardized, (16) numbers of
--     set.files
--     local seen = set:broken()                                -- {{path, reason}, ...}: met, named, left out
--
-- Decoding happens ahead, in threads of the C core (core/data/stream.c); the batches depend on the options and the
-- files, not on the number of workers.
--
-- What belongs to which split. A folder with train/ (and val/, or else test/) keeps its own division. Any other is
-- divided by a hash of each file's name, so a photograph stays on its side when files come, go, or move to another
-- folder, and its copies of the same name go together. About 7.5 % are for validation, at least one where there are two
-- files.

local lfs = require "lfs"
local bit = require "bit"
local core = require "vertex.core"
require "vertex.ops" -- gives tensors their arithmetic

local fail = core.fail
local data = {}

data.mean = { 0.485, 0.456, 0.406 } -- ImageNet's, per channel, of values in [0, 1]
data.std = { 0.229, 0.224, 0.225 }

local VALIDATION_PER_MILLE = 75

-- -- Files ------------------------------------------------------------------------------------------------------------

local NAMED_AS_IMAGE = { jpg = true, jpeg = true, jpe = true, jfif = true, png = true }

--- All files below `folder`, as paths, in the order of their names at each level; names that begin with a dot are left
-- out. A folder reached twice through symbolic links counts once. The second result lists what could not be looked
-- into: {path, reason}.
function data.list(folder)
  if type(folder) ~= "string" then fail("list: the folder is a %s, expected a path", type(folder)) end
  local mode, why = lfs.attributes(folder, "mode")
  if not mode then fail("list: no folder %s (%s)", folder, tostring(why):match "([^:]*)$":gsub("^ ", "")) end
  if mode ~= "directory" then fail("list: %s is a %s, expected a folder", folder, mode) end
  local files, unreadable, seen = {}, {}, {}
  local function enter(path)
    local about = lfs.attributes(path)
    local identity = about.dev .. ":" .. about.ino
    if seen[identity] then return end
    seen[identity] = true
    local names = {}
    local ok, reason = pcall(function()
      for name in lfs.dir(path) do
        if name:sub(1, 1) ~= "." then names[#names + 1] = name end
      end
    end)
    if not ok then
      reason = tostring(reason):match ": ([^:]*)$" or tostring(reason)
      unreadable[#unreadable + 1] = { path, reason, path = path, reason = reason }
    end
    table.sort(names)
    local prefix = path:sub(-1) == "/" and path or path .. "/"
    for _, name in ipairs(names) do
      local child = prefix .. name
      local kind = lfs.attributes(child, "mode")
      if kind == "directory" then
        enter(child)
      elseif kind == "file" or kind == nil then -- nil: a link to nowhere; who opens it says so
        files[#files + 1] = child
      end
    end
  end
  enter(folder)
  return files, unreadable
end

--- Which of the files are images. A usual name is believed until the file is decoded, which judges by content; any
-- other file
-- (no extension, a wrong one) is asked for its first bytes now. So a text file is passed over unless it calls itself an
-- image.
local function only_images(files)
  local images = {}
  for _, path in ipairs(files) do
    local extension = path:match "%.([^./]*)$"
    if extension and NAMED_AS_IMAGE[extension:lower()] then
      images[#images + 1] = path
    else
      local kind = core.image_kind(path)
      if kind and kind ~= "none" then images[#images + 1] = path end
    end
  end
  return images
end

local function multiply32(a, b)
  local low, high = bit.band(a, 0xffff), bit.rshift(a, 16)
  b = b % 2 ^ 32
  return bit.tobit((high * b) % 65536 * 65536 + low * b % 2 ^ 32)
end

--- 32-bit hash of a string: FNV-1a with murmur3's finish.
local function hash(text)
  local h = bit.tobit(2166136261)
  for i = 1, #text do h = multiply32(bit.bxor(h, text:byte(i)), 16777619) end
  h = multiply32(bit.bxor(h, bit.rshift(h, 16)), 0x85EBCA6B)
  h = multiply32(bit.bxor(h, bit.rshift(h, 13)), 0xC2B2AE35)
  return bit.bxor(h, bit.rshift(h, 16)) % 2 ^ 32
end

--- The files of one side of the hashed division, in the order given.
local function divide(files, split)
  local order, side, validation = {}, {}, 0
  for i, path in ipairs(files) do
    local h = hash(path:match "[^/]*$")
    order[i] = { hash = h, place = i }
    side[i] = h % 1000 < VALIDATION_PER_MILLE and "val" or "train"
    if side[i] == "val" then validation = validation + 1 end
  end
  -- a handful of files may all fall on one side: the one with the extreme hash changes over
  if #files == 1 then return files end
  table.sort(order, function(a, b)
    if a.hash ~= b.hash then return a.hash < b.hash end
    return a.place < b.place
  end)
  if validation == 0 then side[order[1].place] = "val" end
  if validation == #files then side[order[#files].place] = "train" end
  local chosen = {}
  for i, path in ipairs(files) do
    if side[i] == split then chosen[#chosen + 1] = path end
  end
  return chosen
end

local function is_folder(path) return lfs.attributes(path, "mode") == "directory" end

--- The image files of a split ("train", "val", "all") of a folder, and what could not be looked into.
function data.find(folder, split)
  if type(folder) ~= "string" then fail("images: the path is a %s, expected that of a folder", type(folder)) end
  local mode = lfs.attributes(folder, "mode")
  if not mode then fail("images: no folder %s", folder) end
  if mode ~= "directory" then fail("images: %s is a %s, expected a folder of images", folder, mode) end
  local root, own = folder, false
  local base = folder:gsub("(.)/+$", "%1")
  if split ~= "all" and is_folder(base .. "/train") then
    local other = is_folder(base .. "/val") and "val" or is_folder(base .. "/test") and "test"
    own = other and true or false
    root = base .. "/" .. (split == "val" and other or "train")
  end
  local files, unreadable = data.list(root)
  local images = only_images(files)
  if #images == 0 then
    local first = unreadable[1]
    fail("images: no image in %s (%d other files; JPEG and PNG are read, whatever their names)%s", root, #files,
      first and ("; cannot look into " .. first.path .. ": " .. first.reason) or "")
  end
  if not own and split ~= "all" then images = divide(images, split) end
  return images, unreadable
end

-- -- Loader -----------------------------------------------------------------------------------------------------------

local CHOICES = {
  split = { train = "train", val = "val", all = "all" },
  resize = { short = 0, none = 1 },
  filter = { bilinear = 0, bicubic = 1 },
  crop = { center = 0, random = 1 },
}

-- Options of data.images: default, and meaning.
data.options = {
  { "path", nil, "folder; none: the procedural set" },
  { "split", "train", "train, val, or all" },
  { "size", 32, "images are size x size" },
  { "resize", "short", "short: the short side becomes `size`; none: crop only, smaller images are enlarged first" },
  { "filter", "bilinear", "bilinear or bicubic, antialiased, as Pillow's" },
  { "crop", "center", "center or random" },
  { "flip", false, "mirror half of the images" },
  { "batch", 16, "images in a batch" },
  { "seed", 1, "of order, crops and flips" },
  { "shuffle", true, "a new order each epoch; false: the files' own" },
  { "epochs", 0, "0: without end" },
  { "position", 0, "where to resume: what :position() said" },
  { "workers", 2, "decoding threads" },
  { "queue", 0, "images decoded ahead; 0: two batches" },
  { "strict", false, "a broken file is an error" },
  { "cache_bytes", 512 * 2 ^ 20, "memory for resized images, so that small sets are decoded once" },
  { "shard", 0, "this reader's number among `shards` that share the stream" },
  { "shards", 1, "readers that share the stream" },
  { "count", nil, "procedural set: how many images (2048; val 256)" },
  { "image_seed", nil, "procedural set: which set (default: seed)" },
  { "device", nil, "where batches go (default: the default device)" },
  { "mean", data.mean, "subtracted from each channel of [0, 1]" },
  { "std", data.std, "and the divisor after that" },
}

local known = {}
for _, o in ipairs(data.options) do known[o[1]] = { default = o[2] } end

local FIRST_VALIDATION = 2 ^ 32 -- procedural set: training and validation images come from far apart

local function check_options(given)
  if type(given) ~= "table" then fail("images: expected a table of options, got a %s", type(given)) end
  local o = {}
  for name, option in pairs(known) do o[name] = option.default end
  for name, value in pairs(given) do
    if not known[name] then
      local names = {}
      for _, option in ipairs(data.options) do names[#names + 1] = option[1] end
      fail("images: unknown option '%s'; known are %s", tostring(name), table.concat(names, ", "))
    end
    local default = known[name].default
    if CHOICES[name] then
      if not CHOICES[name][value] then
        local names = {}
        for choice in pairs(CHOICES[name]) do names[#names + 1] = choice end
        table.sort(names)
        fail("images: %s is '%s', expected %s", name, tostring(value), table.concat(names, " or "))
      end
    elseif type(default) == "boolean" then
      if type(value) ~= "boolean" then fail("images: %s is %s, expected true or false", name, tostring(value)) end
    elseif type(default) == "number" or name == "count" or name == "image_seed" then
      if type(value) ~= "number" or value ~= math.floor(value) or math.abs(value) > 2 ^ 53 then
        fail("images: %s is %s, expected an integer", name, tostring(value))
      end
      -- fields of 32 bits in C; their exact ranges are checked there
      if value > 2 ^ 31 - 1 and (name == "size" or name == "batch" or name == "workers" or name == "queue") then
        fail("images: %s is %d, too large", name, value)
      end
    elseif name == "mean" or name == "std" then
      if type(value) ~= "table" or #value ~= 3 then fail("images: %s has to be three numbers", name) end
    end
    o[name] = value
  end
  return o
end

local Images = {}
Images.__index = Images

--- A set of images that gives batches. options: see data.options.
function data.images(options)
  local o = check_options(options or {})
  local files, unreadable = nil, {}
  if o.path then files, unreadable = data.find(o.path, o.split) end
  if o.strict and unreadable[1] then
    fail("images: cannot look into %s: %s", unreadable[1].path, unreadable[1].reason)
  end
  local count = files and #files or o.count or (o.split == "val" and 256 or 2048)
  local loader = core.loader(files, {
    count = count,
    first = o.split == "val" and FIRST_VALIDATION or 0,
    image_seed = o.image_seed or o.seed,
    seed = o.seed, epochs = o.epochs, position = o.position, shard = o.shard, shards = o.shards,
      cache_bytes = o.cache_bytes,
    size = o.size, batch = o.batch, workers = o.workers, queue = o.queue,
    resize = CHOICES.resize[o.resize], filter = CHOICES.filter[o.filter], crop = CHOICES.crop[o.crop],
    flip = o.flip and 1 or 0, shuffle = o.shuffle and 1 or 0, strict = o.strict and 1 or 0,
    mean = o.mean, std = o.std,
  })
  return setmetatable({ loader = loader, files = files or {}, count = count, options = o, unreadable = unreadable },
    Images)
end

local function open_loader(self)
  if not self.loader then fail "images: this set was closed" end
  return self.loader
end

--- The next batch, f32 (B, size, size, 3) standardized, and the images' numbers, i32 (B), 0-based in the order of
-- self.files. nil after the last epoch, whose last batch may be smaller, and where Ctrl-C ended the wait
-- (core.interrupted()).
function Images:next()
  local o, loader = self.options, open_loader(self)
  local x = core.new({ o.batch, o.size, o.size, 3 }, { dtype = "f32", device = "cpu" })
  local index = core.new({ o.batch }, { dtype = "i32", device = "cpu" })
  local count = loader:next(x, index)
  if not count then
    x:release()
    index:release()
    return nil
  end
  if count < o.batch then
    x = core.view(x, { count, o.size, o.size, 3 }, x:strides(), 0)
    index = core.view(index, { count }, index:strides(), 0)
  end
  local device = o.device or core.device()
  local there = x:to(device)
  if there ~= x then x:release() end
  return there, index
end

--- Where the stream stands: a set opened with this `position` goes on exactly here.
function Images:position() return open_loader(self):position() end

--- Files met so far that are not usable, {path, reason} by number and by name; what could not be looked into comes
-- first.
function Images:broken()
  local list = open_loader(self):broken()
  for i = #self.unreadable, 1, -1 do table.insert(list, 1, self.unreadable[i]) end
  return list
end

--- Files of the split, broken ones among them (they show when they are met), or images of the procedural set.
function Images:size() return self.count end

--- Batches of one epoch without broken files.
function Images:batches() return math.ceil(self.count / self.options.shards / self.options.batch) end

--- Ends the threads and frees the cache. Lua's collector does it as well, later.
function Images:close()
  if self.loader then self.loader:close() end
  self.loader = nil
end

function Images:__tostring()
  local o = self.options
  return ("images(%s, %s: %d %s, %dx%d, batch %d)"):format(o.path or "procedural", o.split, self.count,
    o.path and "files" or "images",
    o.size, o.size, o.batch)
end

-- -- Single images ----------------------------------------------------------------------------------------------------

--- u8 (H, W, 3) of a JPEG or PNG file, or of such a file's bytes.
function data.open(path)
  if type(path) ~= "string" then fail("open: the path is a %s", type(path)) end
  return core.image_open(path)
end
function data.decode(bytes)
  if type(bytes) ~= "string" then fail("decode: expected the bytes of a file, got a %s", type(bytes)) end
  return core.image_decode(bytes)
end

--- u8 (H, W, 3) resized as Pillow does; filter "bilinear" (default) or "bicubic".
function data.resize(x, height, width, filter)
  local number = CHOICES.filter[filter or "bilinear"]
  if not number then fail("resize: filter '%s', expected bilinear or bicubic", tostring(filter)) end
  return core.image_resize(x, height, width, number)
end

--- Image `index` of the procedural set `seed`, u8 (H, W, 3); size: a number or {height, width}.
function data.procedural(size, seed, index)
  local height, width = size, size
  if type(size) == "table" then height, width = size[1], size[2] end
  return core.procedural_image(height, width, seed or 1, index or 0)
end

local function per_channel(x, values) return core.tensor(values, { device = x:device() }) end

--- From standardized values back to [0, 1] (a little beyond for what a model makes up).
function data.denormalize(x, mean, std)
  x = x:detach()
  return x * per_channel(x, std or data.std) + per_channel(x, mean or data.mean)
end

--- u8 or [0, 1] images to standardized f32.
function data.normalize(x, mean, std)
  if x:dtype() == "u8" then x = x:to "f32" * (1 / 255) end
  return (x - per_channel(x, mean or data.mean)) / per_channel(x, std or data.std)
end

--- [0, 1] to u8 on the CPU, rounded, clamped.
function data.to_u8(x)
  if x:dtype() == "u8" then return x:to "cpu" end
  return (x:detach():to "cpu" * 255):to "u8"
end

--- Writes an image (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), u8 or f32 in [0, 1], as PNG; whole or not at all.
function data.save(path, x)
  core.image_save_png(path, data.to_u8(x))
end

--- The same as a string of the file's bytes, for notebooks and terminals.
function data.png(x) return core.image_png(data.to_u8(x)) end

return data
