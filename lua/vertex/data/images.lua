--- data/images.lua: batches of images from folders of photographs, or of the procedural set where there are none.
--
--     local data = require "vertex.data.images"               -- also vx.data
--     local set = data.images { path = "photos", size = 64, crop = "random", flip = true, batch = 16, seed = 1 }
--     local x, index = set:next()       -- (16,64,64,3) standardized, and (16) i32, 0-based: of set.files[i + 1]
--     local seen = set:broken()         -- { { path, reason }, ... }: met, named, left out
--
-- Decoding happens ahead, in threads of the C core (core/data/stream.c). The batches depend on the options and the
-- files, not on the number of workers.
--
-- Splits: a folder with train/ (and val/, or else test/) keeps its own division. Any other is divided by a hash of each
-- file's name. So a photograph stays on its side when files come, go, or move to another folder, and copies of the same
-- name go together. About 7.5 % are for validation, at least one where there are two files.

local lfs = require "lfs"
local arguments = require "vertex.arguments"
local check = require "vertex.check"
local core = require "vertex.core"
local folders = require "vertex.data.folders"
require "vertex.ops" -- gives tensors their arithmetic

local fail = core.fail
local data = {}

data.mean = { 0.485, 0.456, 0.406 } -- ImageNet's, per channel, of values in [0, 1]
data.std = { 0.229, 0.224, 0.225 }
data.list = folders.list

-- Kinds and defaults of the options. Words are C's to know: resize, filter, crop.
local OPTIONS = {
  path = "string", files = "table", split = { { "train", "val", "all" }, "train" },
  size = { "count", 32 }, resize = { "string", "short" }, filter = { "string", "bilinear" },
  crop = { "string", "center" }, flip = { "boolean", false },
  mean = { "table", data.mean }, std = { "table", data.std },
  batch = { "count", 16 }, seed = { "whole", 1 }, shuffle = { "boolean", true }, epochs = { "whole", 0 },
  position = { "whole", 0 }, shard = { "whole", 0 }, shards = { "count", 1 },
  workers = { "count", 2 }, queue = { "whole", 0 }, strict = { "boolean", false },
  cache_bytes = { "whole", 512 * 2 ^ 20 },
  count = "count", image_seed = "whole", device = "string",
}

-- -- Files ------------------------------------------------------------------------------------------------------------

local NAMED_AS_IMAGE = { jpg = true, jpeg = true, jpe = true, jfif = true, png = true }

--- Finds the image files of a split of a folder; the head of this file says what belongs to which.
-- @param folder path
-- @param split "train", "val" or "all"
-- @return array of paths
-- @return array of { path =, reason = }: folders that could not be looked into
-- @raise where there is no such folder, or no image in it
function data.find(folder, split)
  check.choice("images", "split", split, OPTIONS.split[1])
  if type(folder) ~= "string" then fail("images: the path is a %s, expected that of a folder", type(folder)) end
  local mode = lfs.attributes(core.expect_path(folder), "mode")
  if not mode then fail("images: no folder %s", folder) end
  if mode ~= "directory" then fail("images: %s is a %s, expected a folder of images", folder, mode) end
  local root, own = folder, false
  local base = folder:gsub("(.)/+$", "%1")
  if split ~= "all" and folders.is_folder(base .. "/train") then
    local other = folders.is_folder(base .. "/val") and "val" or folders.is_folder(base .. "/test") and "test"
    own = other and true or false
    root = base .. "/" .. (split == "val" and other or "train")
  end
  local files, unreadable = folders.list(root)
  local images = folders.pick(files, NAMED_AS_IMAGE, core.image_kind)
  if #images == 0 then
    local first = unreadable[1]
    fail("images: no image in %s (%d other files; JPEG and PNG are read, whatever their names)%s", root, #files,
      first and ("; cannot look into " .. first.path .. ": " .. first.reason) or "")
  end
  if not own and split ~= "all" then
    images = folders.divide(images, split, function(path) return path:match "[^/]*$" end)
  end
  return images, unreadable
end

-- -- The stream -------------------------------------------------------------------------------------------------------

local FIRST_VALIDATION = 2 ^ 32 -- procedural set: training and validation images come from far apart

local Images = {}
Images.__index = Images

--- Opens a set of images that gives batches.
-- @param[opt] options table
-- @param[opt] options.path folder of photographs; without it, and without files, the procedural set
-- @param[opt] options.files array of paths of photographs, instead of a folder and a split of it
-- @param[opt="train"] options.split "train", "val" or "all"
-- @param[opt=32] options.size images are size x size pixels
-- @param[opt="short"] options.resize "short": the short side becomes `size`; "none": crop only, smaller images are
-- enlarged first
-- @param[opt="bilinear"] options.filter "bilinear" or "bicubic", antialiased, as Pillow's
-- @param[opt="center"] options.crop "center" or "random"
-- @param[opt=false] options.flip true mirrors half of the images
-- @param[opt=16] options.batch images in a batch
-- @param[opt=1] options.seed of order, crops and flips
-- @param[opt=true] options.shuffle a new order each epoch; false: the files' own
-- @param[opt=0] options.epochs how often each image comes; 0: without end
-- @param[opt=0] options.position where to go on: what :position() said
-- @param[opt=2] options.workers decoding threads
-- @param[opt=0] options.queue images decoded ahead; 0: two batches
-- @param[opt=false] options.strict true makes a broken file an error
-- @param[opt=2^29] options.cache_bytes bytes for resized images, so that small sets are decoded once
-- @param[opt=0] options.shard this reader's number among `shards` that share the stream, 0-based
-- @param[opt=1] options.shards readers that share the stream
-- @param[opt] options.count images of the procedural set; 2048, for "val" 256
-- @param[opt] options.image_seed which procedural set; else `seed`
-- @param[opt] options.device where batches go; else the default device
-- @param[opt] options.mean array of 3 numbers, subtracted from each channel in 0..1; ImageNet's
-- @param[opt] options.std array of 3 numbers, the divisor after that; ImageNet's
-- @return images: .files (array of paths) and the methods next, position, broken, size, batches and close
-- @raise where an option is unknown or out of its range, or the folder holds no image of the split
function data.images(options)
  local o = check.options("images", options, OPTIONS)
  for _, name in ipairs { "mean", "std" } do
    if #o[name] ~= 3 then fail("images: %s has %d numbers, expected one for each of 3 channels", name, #o[name]) end
    for c = 1, 3 do check.number("images", ("%s[%d]"):format(name, c), o[name][c], -math.huge, math.huge) end
  end
  local files, unreadable = {}, {}
  if o.path and o.files then fail "images: path and files: give one of them" end
  for i, path in ipairs(o.files or {}) do
    if type(path) ~= "string" then fail("images: files[%d] is a %s, expected a path", i, type(path)) end
  end
  if o.path then files, unreadable = data.find(o.path, o.split) end
  files = o.files or files
  if o.strict and unreadable[1] then
    fail("images: cannot look into %s: %s", unreadable[1].path, unreadable[1].reason)
  end
  local validation = o.split == "val"
  local from_files = o.path or o.files
  local count = from_files and #files or o.count or (validation and 256 or 2048)
  local stream
  if from_files then
    stream = core.image_stream(files, o)
  else
    stream = core.procedural_stream(o.image_seed or o.seed, validation and FIRST_VALIDATION or 0, count, o)
  end
  return setmetatable({ stream = stream, files = files, count = count, options = o, unreadable = unreadable }, Images)
end

-- Gives the stream of a set that was not closed.
local function open_stream(self)
  if not self.stream then fail "images: this set was closed" end
  return self.stream
end

--- Gives the next batch. The last batch of the last epoch may be smaller.
-- @return tensor f32 (B,size,size,3), standardized; nil after the last epoch, and where Ctrl-C ended the wait
-- (core.interrupted())
-- @return tensor i32 (B) on the CPU: the images' numbers in the order of .files, 0-based
-- @raise where the set was closed, or `strict` is set and a file is broken
function Images:next()
  local batch, index = open_stream(self):next()
  if not batch then return nil end
  local x = batch.images
  local there = x:to(self.options.device or core.device())
  if there ~= x then x:release() end
  return there, index
end

--- Says where the stream stands. A set opened with this `position` goes on exactly here.
-- @return number
-- @raise where the set was closed
function Images:position() return open_stream(self):position() end

--- Lists the files met so far that are not usable; folders that could not be looked into come first.
-- @return array of { path, reason }, which also have these fields by name
-- @raise where the set was closed
function Images:broken()
  local list = open_stream(self):broken()
  for i = #self.unreadable, 1, -1 do table.insert(list, 1, self.unreadable[i]) end
  return list
end

--- Counts the files of the split, or the images of the procedural set. Broken files are among them until they are met.
-- @return integer
function Images:size() return self.count end

--- Counts the batches of one epoch without broken files.
-- @return integer
function Images:batches() return math.ceil(self.count / self.options.shards / self.options.batch) end

--- Ends the threads and frees the cache. Lua's collector does so too, later.
function Images:close()
  if self.stream then self.stream:close() end
  self.stream = nil
end

function Images:__tostring()
  local o = self.options
  return ("images(%s, %s: %d %s, %dx%d, batch %d)"):format(o.path or "procedural", o.split, self.count,
    o.path and "files" or "images", o.size, o.size, o.batch)
end

-- -- Single images ----------------------------------------------------------------------------------------------------

--- Reads a JPEG or PNG file.
-- @param path name of the file; its content decides, not its ending
-- @return tensor u8 (H,W,3) on the CPU
-- @raise where the file cannot be read, or is no sound image
function data.open(path)
  if type(path) ~= "string" then fail("open: the path is a %s", type(path)) end
  return core.image_open(path)
end
--- Decodes a JPEG or PNG file that is in memory.
-- @param bytes string, the bytes of the file
-- @return tensor u8 (H,W,3) on the CPU
-- @raise where they are no sound image
function data.decode(bytes)
  if type(bytes) ~= "string" then fail("decode: expected the bytes of a file, got a %s", type(bytes)) end
  return core.image_decode(bytes)
end

--- Resizes an image as Pillow does, antialiased.
-- @param x tensor u8 (H,W,3) on the CPU
-- @param height number of pixels, the new height
-- @param width number of pixels, the new width
-- @param[opt="bilinear"] filter "bilinear" or "bicubic"
-- @return tensor u8 (height,width,3)
-- @raise where x is no such image, or the filter is unknown
function data.resize(x, height, width, filter)
  check.integer("resize", "height", height, 1)
  check.integer("resize", "width", width, 1)
  return core.image_resize(x, height, width, filter or "bilinear")
end

--- Draws an image of the procedural set.
-- @param size number of pixels, or { height, width }
-- @param[opt=1] seed integer of 0 or more: which set
-- @param[opt=0] index number of the image, 0-based
-- @return tensor u8 (H,W,3) on the CPU
-- @raise where a size is no positive integer
function data.procedural(size, seed, index)
  local height, width = unpack(check.pair("procedural", "size", size, 1))
  return core.procedural_image(height, width, seed or 1, index or 0)
end

-- Gives one number for each channel as a tensor on x's device.
local function per_channel(x, values) return core.tensor(values, { device = x:device() }) end

--- Turns standardized values back into 0..1; a little beyond for what a model makes up. No gradient goes through.
-- @param x tensor f32 (...,3)
-- @param[opt] mean array of 3 numbers; ImageNet's
-- @param[opt] std array of 3 numbers; ImageNet's
-- @return tensor f32 (...,3)
function data.denormalize(x, mean, std)
  x = x:detach()
  return x * per_channel(x, std or data.std) + per_channel(x, mean or data.mean)
end

--- Standardizes images: (x - mean) / std in each channel.
-- @param x tensor u8 (...,3), or f32 (...,3) in 0..1
-- @param[opt] mean array of 3 numbers; ImageNet's
-- @param[opt] std array of 3 numbers; ImageNet's
-- @return tensor f32 (...,3)
function data.normalize(x, mean, std)
  if x:dtype() == "u8" then x = x:to "f32" * (1 / 255) end
  return (x - per_channel(x, mean or data.mean)) / per_channel(x, std or data.std)
end

--- Turns images in 0..1 into bytes, rounded and clamped.
-- @param x tensor f32 in 0..1 or u8, of any shape
-- @return tensor u8 on the CPU, of x's shape
function data.to_u8(x)
  if x:dtype() == "u8" then return x:to "cpu" end
  return (x:detach():to "cpu" * 255):to "u8"
end

--- Writes an image as PNG. The file appears whole or not at all.
-- @param path name of the file
-- @param x tensor (H,W), (H,W,1), (H,W,3) or (H,W,4): u8, or f32 in 0..1
-- @raise where x is no such image, or the file cannot be written
function data.save(path, x)
  core.image_save_png(path, data.to_u8(x))
end

--- Gives an image as the bytes of a PNG file, for notebooks and terminals.
-- @param x tensor (H,W), (H,W,1), (H,W,3) or (H,W,4): u8, or f32 in 0..1
-- @return string
-- @raise where x is no such image
function data.png(x) return core.image_png(data.to_u8(x)) end

arguments.guard_class("images", Images)

return data
