--- core/data.lua: images, and loaders that read them ahead on threads of C.

local ffi = require "ffi"
local library = require "vertex.core.library"
local handle = require("vertex.core.op").handle
local tensors = require "vertex.core.tensor"

local C, call, check = library.C, library.call, library.check
local contiguous, made, new = tensors.contiguous, tensors.made, tensors.new

local data = {}

local int_out = ffi.new "int[1]"

local IMAGE_KINDS = { [0] = "none", "jpeg", "png", "other" }

--- What the file's first bytes say it is: "jpeg", "png", "other" (an image that is not read), "none"; nil and why where
-- unreadable.
function data.image_kind(path)
  if C.vx_image_kind(path, int_out) ~= 0 then return nil, ffi.string(C.vx_error()) end
  return IMAGE_KINDS[int_out[0]]
end

--- An image file, or its bytes, as u8 (H, W, 3).
function data.image_open(path)
  return made(C.vx_image_open, path)
end
function data.image_decode(bytes)
  return made(C.vx_image_decode, bytes, #bytes)
end

--- u8 (H, W, 3) → (height, width, 3); filter 0 bilinear, 1 bicubic.
function data.image_resize(x, height, width, filter)
  local y = new({ height, width, 3 }, { dtype = "u8", device = "cpu" })
  call(C.vx_image_resize, handle(y), handle(contiguous(x)), filter)
  return y
end

--- PNG of a u8 image: the file's bytes as a string, or a file.
function data.image_png(x)
  local t = made(C.vx_image_png, handle(contiguous(x)))
  local bytes = t:bytes()
  t:release()
  return bytes
end
function data.image_save_png(path, x) call(C.vx_image_save_png, path, handle(contiguous(x))) end

function data.procedural_image(height, width, seed, index)
  local x = new({ height, width, 3 }, { dtype = "u8", device = "cpu" })
  call(C.vx_procedural_image, handle(x), seed, index)
  return x
end

local Loader = {}
Loader.__index = Loader

--- A prefetching loader over paths (nil: procedural). options: the fields of vx_loader_options, see core/data/image.h.
function data.loader(paths, options)
  local o, out = ffi.new "vx_loader_options", ffi.new "vx_loader *[1]"
  for name, value in pairs(options) do
    if type(value) == "table" then
      for i = 1, 3 do o[name][i - 1] = value[i] end
    else
      o[name] = value
    end
  end
  local text
  if paths then
    o.count = #paths
    text = table.concat(paths, "\0") .. "\0" -- named: it must outlive the call
  end
  call(C.vx_loader_new, out, text, text and #text or 0, o)
  return setmetatable({ l = ffi.gc(out[0], C.vx_loader_free) }, Loader)
end

--- Fills images f32 (B, S, S, 3) and index i32 (B), both on the CPU: how many, or nil at the end and when Ctrl-C ended
-- the wait.
function Loader:next(images, index)
  local status = C.vx_loader_next(self.l, handle(images), handle(index), int_out)
  if status == C.VX_EEND or status == C.VX_EINTR then return nil end
  check(status)
  return int_out[0]
end

function Loader:position() return tonumber(C.vx_loader_position(self.l)) end

--- Array of {path, reason}, by name too, of the broken files met so far.
function Loader:broken()
  local list, path, reason = {}, ffi.new "char[4096]", ffi.new "char[512]"
  for i = 0, tonumber(C.vx_loader_broken_count(self.l)) - 1 do
    check(C.vx_loader_broken(self.l, i, path, 4096, reason, 512))
    local p, r = ffi.string(path), ffi.string(reason)
    list[i + 1] = { p, r, path = p, reason = r }
  end
  return list
end

function Loader:close()
  if self.l ~= nil then
    C.vx_loader_free(ffi.gc(self.l, nil))
    self.l = nil
  end
end

return data
