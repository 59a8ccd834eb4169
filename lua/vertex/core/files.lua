--- core/files.lua: files that appear whole or not at all, raw tensors read from files, and folders.

local ffi = require "ffi"
local handle = require("vertex.core.tensor").handle
local library = require "vertex.core.library"

local C, call, check = library.C, library.call, library.check

local files = {}

local Writer = {}
Writer.__index = Writer
local writer_out = ffi.new "vx_writer *[1]"

--- A file that appears under `path` whole, at :commit(), or not at all.
function files.writer(path)
  call(C.vx_writer_open, writer_out, path)
  return setmetatable({ w = ffi.gc(writer_out[0], C.vx_writer_abort) }, Writer)
end

function Writer:bytes(s) call(C.vx_writer_bytes, self.w, ffi.cast("const void *", s), #s) end
function Writer:tensor(x) call(C.vx_writer_tensor, self.w, handle(x)) end
function Writer:commit()
  local w = ffi.gc(self.w, nil)
  self.w = nil
  check(C.vx_writer_commit(w))
end
function Writer:abort()
  C.vx_writer_abort(ffi.gc(self.w, nil))
  self.w = nil
end

--- Writes a whole string atomically.
function files.write_file(path, text)
  local w = files.writer(path)
  w:bytes(text)
  w:commit()
end

--- Makes a folder and those above it that are missing. True; or nil and why not.
function files.make_folders(path)
  local lfs = require "lfs"
  local at = path:sub(1, 1) == "/" and "" or nil
  for part in path:gmatch "[^/]+" do
    at = at and at .. "/" .. part or part
    if lfs.attributes(at, "mode") ~= "directory" then
      local ok, reason = lfs.mkdir(at)
      -- another process may have made it in between
      if not ok and lfs.attributes(at, "mode") ~= "directory" then
        return nil, ("cannot make the folder '%s': %s"):format(at, reason)
      end
    end
  end
  return true
end

--- Fills tensor x from raw data at byte `offset` of a file; format is a safetensors dtype.
function files.read_tensor(x, path, offset, format) call(C.vx_file_read, handle(x), path, offset, format) end

--- Bytes of a regular file, or nil.
function files.file_size(path)
  local n = tonumber(C.vx_file_size(path))
  return n >= 0 and n or nil
end

return files
