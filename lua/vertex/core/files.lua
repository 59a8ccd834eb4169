--- core/files.lua: files that appear whole or not at all, raw tensors read from files, and folders.

local ffi = require "ffi"
local handle = require("vertex.core.op").handle
local library = require "vertex.core.library"

local C, call, check = library.C, library.call, library.check

local files = {}

local Writer = {}
Writer.__index = Writer
local writer_out = ffi.new "vx_writer *[1]"

--- Begins a file that appears under its name whole, at :commit(), or not at all.
-- @param path of the file; a temporary one is written in the same folder
-- @return writer with :bytes(string), :tensor(x), :commit() and :abort()
-- @raise where the folder cannot be written to
function files.writer(path)
  call(C.vx_writer_open, writer_out, path)
  return setmetatable({ w = ffi.gc(writer_out[0], C.vx_writer_abort) }, Writer)
end

--- Appends a string.
function Writer:bytes(s) call(C.vx_writer_bytes, self.w, ffi.cast("const void *", s), #s) end

--- Appends the raw little-endian elements of a tensor, row-major; narrow: those of an i32 tensor as uint16.
function Writer:tensor(x, narrow) call(C.vx_writer_tensor, self.w, handle(x), narrow and 1 or 0) end

--- Flushes the file to the disk and gives it its name.
function Writer:commit()
  local w = ffi.gc(self.w, nil)
  self.w = nil
  check(C.vx_writer_commit(w))
end

--- Removes the temporary file.
function Writer:abort()
  C.vx_writer_abort(ffi.gc(self.w, nil))
  self.w = nil
end

--- Writes a file that appears whole, or not at all where f fails.
-- @param path of the file
-- @param f function of the writer, whose :bytes and :tensor it calls
-- @raise what f raises, or why the file cannot be written
function files.write_whole(path, f)
  local w = files.writer(path)
  local ok, message = pcall(function()
    f(w)
    w:commit()
  end)
  if ok then return end
  if w.w then w:abort() end
  error(message, 0)
end

--- Writes a whole string atomically.
-- @param path of the file
-- @param text bytes
-- @raise why the file cannot be written
function files.write_file(path, text)
  files.write_whole(path, function(w) w:bytes(text) end)
end

--- Makes a folder and those above it that are missing.
-- @param path of the folder
-- @return true; or nil and why not
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

local stored = {} -- name of a dtype in files → { name, bytes, dtype }
for line in ffi.string(C.vx_stored_dtypes()):gmatch "[^\n]+" do
  local name, bytes, dtype = line:match "^(.-)\t(%d+)\t(.*)$"
  stored[name] = { name = name, bytes = tonumber(bytes), dtype = dtype }
end

--- Says what is known of a dtype of files, by the name that safetensors gives it.
-- @param name "F32", "I64", ..., with '>' in front where its bytes are in big-endian order
-- @return { name, bytes (of an element), dtype (of the tensor it is read into) }; nil where it is not read
function files.stored_dtype(name) return stored[tostring(name):gsub("^>", "")] end

--- Lists the names of the dtypes of files that are read, in alphabetical order.
-- @return array of names
function files.stored_dtypes()
  local names = {}
  for name in pairs(stored) do names[#names + 1] = name end
  table.sort(names)
  return names
end

-- -- Vectors in files -------------------------------------------------------------------------------------------------

local Rows = {}
Rows.__index = Rows

--- Maps matrices of one width that lie in files, one after the other.
-- @param parts array of { path, format (a dtype of files), offset (bytes), rows, column_major (boolean) }
-- @param width elements of a row
-- @return object with :read(x, index, first), :count() and :close()
-- @raise where a file is not there, or shorter than said
function files.rows(parts, width)
  local out, list = ffi.new "vx_rows *[1]", ffi.new("vx_rows_part[?]", #parts)
  for i, p in ipairs(parts) do
    local c = list[i - 1]
    c.path, c.format, c.offset, c.rows, c.column_major = p.path, p.format, p.offset, p.rows, p.column_major and 1 or 0
  end
  call(C.vx_rows_open, out, list, #parts, width) -- `parts` holds the texts for as long
  return setmetatable({ r = ffi.gc(out[0], C.vx_rows_free) }, Rows)
end

--- Fills x f32 (B,width), on the CPU, with the rows of index, i32 (B), 0-based; or with rows first, first + 1, ...
-- where index is nil.
function Rows:read(x, index, first) call(C.vx_rows_read, self.r, handle(x), handle(index), first or 0) end

--- Counts the rows of all files.
function Rows:count() return tonumber(C.vx_rows_count(self.r)) end

--- Lets go of the files.
function Rows:close()
  if self.r then C.vx_rows_free(ffi.gc(self.r, nil)) end
  self.r = nil
end

--- Fills a tensor from raw data in a file.
-- @param x contiguous tensor
-- @param path of the file
-- @param offset first byte of the data
-- @param format dtype of the data, by the name that safetensors gives it
function files.read_tensor(x, path, offset, format) call(C.vx_file_read, handle(x), path, offset, format) end

--- Gives the size of a file.
-- @param path of the file
-- @return bytes; nil where it is no regular file, or not readable
function files.file_size(path)
  local n = tonumber(C.vx_file_size(path))
  return n >= 0 and n or nil
end

return files
