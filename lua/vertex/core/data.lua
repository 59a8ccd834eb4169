--- core/data.lua: images, audio, and streams of samples that threads of C make ahead.

local ffi = require "ffi"
local dtype_names = require("vertex.core.dtype").dtype_names
local library = require "vertex.core.library"
local handle = require("vertex.core.op").handle
local tensors = require "vertex.core.tensor"

local C, call, check, expect_path = library.C, library.call, library.check, library.expect_path
local contiguous, made, new = tensors.contiguous, tensors.made, tensors.new
local view = tensors.view

local data = {}

local int_out = ffi.new "int[1]"

--- Gives the C array of an array of paths, good as long as that lives.
local function c_paths(paths)
  for _, path in ipairs(paths) do expect_path(path) end
  return ffi.new("const char *[?]", #paths, paths)
end

-- -- Images: u8 (H,W,3) on the CPU ------------------------------------------------------------------------------------

local text_out = ffi.new "const char *[1]"

--- Says what a file's first bytes say it is: "jpeg", "png", "other" (an image that is not read) or "none"; nil and why
-- where it cannot be read.
function data.image_kind(path)
  if C.vx_image_kind(expect_path(path), text_out) ~= 0 then return nil, ffi.string(C.vx_error()) end
  return ffi.string(text_out[0])
end

--- Decodes an image file.
function data.image_open(path) return made(C.vx_image_open, expect_path(path)) end

--- Decodes the bytes of an image file, a string.
function data.image_decode(bytes) return made(C.vx_image_decode, bytes, #bytes) end

--- Resizes x to u8 (height, width, 3) through a filter, "bilinear" or "bicubic".
function data.image_resize(x, height, width, filter)
  local y = new({ height, width, 3 }, { dtype = "u8", device = "cpu" })
  call(C.vx_image_resize, handle(y), handle(contiguous(x)), filter)
  return y
end

--- Encodes x, u8 (H,W) or (H,W,C), as PNG: a string of the file's bytes.
function data.image_png(x)
  local t = made(C.vx_image_png, handle(contiguous(x)))
  local bytes = t:bytes()
  t:release()
  return bytes
end

--- Writes x as a PNG file.
function data.image_save_png(path, x) call(C.vx_image_save_png, expect_path(path), handle(contiguous(x))) end

--- Draws image `index` of the procedural set `seed`.
function data.procedural_image(height, width, seed, index)
  local x = new({ height, width, 3 }, { dtype = "u8", device = "cpu" })
  call(C.vx_procedural_image, handle(x), seed, index)
  return x
end

-- -- Audio: f32 (L) on the CPU ----------------------------------------------------------------------------------------

local bool_out = ffi.new "bool[1]"
local int64_out = ffi.new "int64_t[2]"

--- Turns a vx_audio_info into a table of its fields; reason is nil where there is none.
local function about_audio(info)
  local reason = ffi.string(info.reason)
  return { bytes = tonumber(info.bytes), modified = tonumber(info.modified), frames = tonumber(info.frames),
    rate = tonumber(info.rate), channels = tonumber(info.channels), exact_seek = info.exact_seek,
    reason = reason ~= "" and reason or nil }
end

--- Says what audio a file's first bytes say it is: "FLAC", "WAV", ..., "none"; and whether that is read. nil and why
-- where it cannot be read.
function data.audio_kind(path)
  if C.vx_audio_kind(expect_path(path), text_out, bool_out) ~= 0 then return nil, ffi.string(C.vx_error()) end
  return ffi.string(text_out[0]), bool_out[0]
end

--- Gives a file's size in bytes, and when it was written in microseconds since 1970; nil and why where it is not there.
function data.audio_stamp(path)
  if C.vx_audio_stamp(expect_path(path), int64_out, int64_out + 1) ~= 0 then return nil, ffi.string(C.vx_error()) end
  return tonumber(int64_out[0]), tonumber(int64_out[1])
end

--- Decodes an audio file to a wave at `rate`, its own where that is 0. The second result says what the file is: the
-- fields of vx_audio_info (core/data/audio.h).
function data.audio_open(path, rate, quality)
  local info = ffi.new "vx_audio_info"
  return made(C.vx_audio_open, expect_path(path), rate, quality, info), about_audio(info)
end

--- Decodes files from end to end: an array with the fields of vx_audio_info of each, `reason` where one cannot be used.
-- false stands for one that was not looked at because Ctrl-C came.
function data.audio_scan(paths)
  local n = #paths
  local infos = ffi.new("vx_audio_info[?]", n)
  local status = C.vx_audio_scan(c_paths(paths), n, infos)
  if status ~= C.VX_EINTR then check(status) end
  local list = {}
  for i = 1, n do
    local about = about_audio(infos[i - 1])
    list[i] = (about.reason or about.channels > 0) and about or false
  end
  return list
end

--- Resamples a wave from one rate to another.
function data.audio_resample(x, rate, new_rate, quality)
  return made(C.vx_audio_resample, handle(contiguous(x)), rate, new_rate, quality)
end

--- Makes utterance `index` of the synthetic set `seed`.
function data.synthetic_speech(seed, index) return made(C.vx_synthetic_speech, seed, index) end

-- -- Streams ----------------------------------------------------------------------------------------------------------

local Stream = {}
Stream.__index = Stream

--- Makes a stream of what start(out, ..., options of the stream, options of its source) starts. options: a table with
-- the fields of both structs.
local function stream(source_options, options, start, ...)
  local out, count = ffi.new "vx_data_stream *[1]", select("#", ...)
  local arguments = { ... }
  arguments[count + 1] = ffi.new("vx_data_stream_options", options)
  arguments[count + 2] = ffi.new(source_options, options)
  call(start, out, unpack(arguments, 1, count + 2))
  local self = setmetatable({ s = ffi.gc(out[0], C.vx_data_stream_free), batch = options.batch, outputs = {} }, Stream)
  local outputs = C.vx_data_stream_outputs(self.s, int_out)
  for i = 1, int_out[0] do
    local output, shape = outputs[i - 1], { self.batch }
    for d = 1, output.ndim do shape[d + 1] = tonumber(output.shape[d - 1]) end
    self.outputs[i] = { name = ffi.string(output.name), shape = shape,
      options = { dtype = dtype_names[output.dtype], device = "cpu" } }
  end
  self.handles = ffi.new("vx_tensor *[?]", #self.outputs)
  return self
end

--- Starts a stream of image files, an array of paths; its output is `images`. options: the fields of
-- vx_data_stream_options (core/data/stream.h) and vx_image_options (core/data/image.h).
function data.image_stream(paths, options)
  return stream("vx_image_options", options, C.vx_image_stream, c_paths(paths), #paths)
end

--- Starts a stream of images first .. first + count - 1 of the procedural set image_seed; options as for files.
function data.procedural_stream(image_seed, first, count, options)
  return stream("vx_image_options", options, C.vx_procedural_stream, image_seed, first, count)
end

--- Starts a stream of audio files, an array of { path = and the fields of vx_audio_info }; its outputs are `waves` and
-- `lengths`. options: the fields of vx_data_stream_options and vx_audio_options (core/data/audio.h).
function data.audio_stream(files, options)
  local n = #files
  local paths, infos = {}, ffi.new("vx_audio_info[?]", n)
  for i, file in ipairs(files) do
    paths[i] = file.path
    infos[i - 1] = { frames = file.frames, rate = file.rate, channels = file.channels, exact_seek = file.exact_seek }
  end
  return stream("vx_audio_options", options, C.vx_audio_stream, c_paths(paths), infos, n)
end

--- Starts a stream of utterances first .. first + count - 1 of the synthetic set speech_seed; options as for files.
function data.speech_stream(speech_seed, first, count, options)
  return stream("vx_audio_options", options, C.vx_speech_stream, speech_seed, first, count)
end

--- Gives the first `count` rows of x.
local function rows(x, count)
  local shape = x:shape()
  if shape[1] == count then return x end
  shape[1] = count
  return view(x, shape, x:strides(), 0)
end

--- Gives the next batch: a table of tensors by the names of the outputs, and the items' numbers, i32 (B), 0-based; all
-- on the CPU. B is the option `batch`, or less at the end of the last epoch. nil when the epochs are over, and where
-- Ctrl-C ended the wait.
function Stream:next()
  local made_now, batch = {}, {}
  for i, output in ipairs(self.outputs) do
    made_now[i] = new(output.shape, output.options)
    self.handles[i - 1] = handle(made_now[i])
  end
  local index = new({ self.batch }, { dtype = "i32", device = "cpu" })
  local status = C.vx_data_stream_next(self.s, self.handles, #self.outputs, handle(index), int_out)
  if status == C.VX_EEND or status == C.VX_EINTR then
    for _, x in ipairs(made_now) do x:release() end
    index:release()
    return nil
  end
  check(status)
  for i, output in ipairs(self.outputs) do batch[output.name] = rows(made_now[i], int_out[0]) end
  return batch, rows(index, int_out[0])
end

--- Says where the stream stands: one started with this `position` goes on exactly here.
function Stream:position() return tonumber(C.vx_data_stream_position(self.s)) end

--- Counts the items of an epoch.
function Stream:items() return tonumber(C.vx_data_stream_items(self.s)) end

--- Lists the broken items met so far: array of { path, reason }, by name too.
function Stream:broken()
  local list, path, reason = {}, ffi.new "char[4096]", ffi.new "char[512]"
  for i = 0, tonumber(C.vx_data_stream_broken_count(self.s)) - 1 do
    check(C.vx_data_stream_broken(self.s, i, path, 4096, reason, 512))
    local p, r = ffi.string(path), ffi.string(reason)
    list[i + 1] = { p, r, path = p, reason = r }
  end
  return list
end

--- Ends the threads, and frees what was made ahead.
function Stream:close()
  if self.s ~= nil then
    C.vx_data_stream_free(ffi.gc(self.s, nil))
    self.s = nil
  end
end

return data
