--- core/files.lua: files that appear whole or not at all, files that are read as they were when they were opened, locks
-- between processes, and folders.

local ffi = require "ffi"
local handle = require("vertex.core.op").handle
local library = require "vertex.core.library"

local C, call, check, expect_path = library.C, library.call, library.check, library.expect_path

local files = {}

local Writer = {}
Writer.__index = Writer
local writer_out = ffi.new "vx_writer *[1]"

--- Begins a file that appears under its name whole, at :commit(), or not at all.
-- @param path of the file; a temporary one is written in the same folder
-- @return writer with :bytes(string), :tensor(x), :commit() and :abort()
-- @raise where the folder cannot be written to
function files.writer(path)
  call(C.vx_writer_open, writer_out, expect_path(path))
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

--- Reads a whole file.
-- @param path of the file
-- @return its bytes; nil where there is none that can be read
function files.read_file(path)
  local f = io.open(expect_path(path), "rb")
  if not f then return nil end
  local text = f:read "*a"
  f:close()
  return text
end

ffi.cdef "int memfd_create(const char *name, unsigned flags); int close(int file);"

local MemoryFile = {}
MemoryFile.__index = MemoryFile

--- Makes a file in memory, for a library that writes files alone. However this process ends, nothing of it stays.
-- @return file with path, good in this process until :close()
-- @raise where there is no memory for it
function files.memory_file()
  local MFD_CLOEXEC = 1
  local number = ffi.C.memfd_create("vertex", MFD_CLOEXEC)
  if number < 0 then library.fail("a file in memory could not be made (error %d)", ffi.errno()) end
  return setmetatable({ number = number, path = "/proc/self/fd/" .. number }, MemoryFile)
end

--- Lets go of the file.
function MemoryFile:close() ffi.C.close(self.number) end

--- Makes a folder and those above it that are missing.
-- @param path of the folder
-- @return true; or nil and why not
function files.make_folders(path)
  local lfs = require "lfs"
  local at = expect_path(path):sub(1, 1) == "/" and "" or nil
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

-- -- Reading ----------------------------------------------------------------------------------------------------------

local Reader = {}
Reader.__index = Reader
local reader_out = ffi.new "vx_reader *[1]"

--- Opens a file to read all of it through this one object: another file that gets its name meanwhile changes nothing.
-- @param path of a regular file
-- @return reader with path, :size(), :bytes(offset, count), :tensor(x, offset, format) and :close()
-- @raise where there is no such file, or it is not readable
function files.reader(path)
  if type(path) ~= "string" then library.fail("load: a %s, expected a path", type(path)) end
  call(C.vx_reader_open, reader_out, expect_path(path))
  return setmetatable({ r = ffi.gc(reader_out[0], C.vx_reader_close), path = path }, Reader)
end

--- Opens a file while f runs.
-- @param path of a regular file
-- @param f function of the reader
-- @param ... further arguments for f
-- @return what f returns
-- @raise what f raises, or why the file cannot be opened
function files.reading(path, f, ...)
  local file = files.reader(path)
  local results = { pcall(f, file, ...) }
  file:close()
  if not results[1] then error(results[2], 0) end
  return unpack(results, 2, table.maxn(results))
end

--- Says how long the file is, in bytes.
function Reader:size() return tonumber(C.vx_reader_size(self.r)) end

--- Reads `count` bytes from byte `offset` on, fewer where the file ends. Returns a string.
function Reader:bytes(offset, count)
  count = math.max(0, math.min(count, self:size() - offset))
  local buffer = ffi.new("uint8_t[?]", count)
  call(C.vx_reader_bytes, self.r, buffer, offset, count)
  return ffi.string(buffer, count)
end

--- Fills a contiguous tensor from byte `offset` on; format: dtype of the data, by the name that safetensors gives it.
function Reader:tensor(x, offset, format) call(C.vx_reader_tensor, self.r, handle(x), offset, format) end

--- Lets go of the file.
function Reader:close()
  if self.r then C.vx_reader_close(ffi.gc(self.r, nil)) end
  self.r = nil
end

--- Gives the size of a file.
-- @param path of the file
-- @return bytes; nil where it is no regular file, or not readable
function files.file_size(path)
  local n = tonumber(C.vx_file_size(expect_path(path)))
  return n >= 0 and n or nil
end

local lock_out = ffi.new "int[1]"

--- Locks a file against other processes until this one ends, however it ends.
-- @param path of the file, which is created where it is missing
-- @return true; false where another process holds it
-- @raise where the file cannot be opened for writing
function files.lock(path)
  call(C.vx_lock, expect_path(path), lock_out)
  return lock_out[0] >= 0
end

-- -- Vectors in files -------------------------------------------------------------------------------------------------

local Rows = {}
Rows.__index = Rows

--- Maps matrices of one width that lie in files, one after the other.
-- @param parts array of { file (a reader, which :close() closes), format (a dtype of files), offset (bytes), rows,
-- column_major (boolean) }
-- @param width elements of a row
-- @return object with :read(x, index, first), :count() and :close()
-- @raise where a file is not there, or shorter than said
function files.rows(parts, width)
  local out, list = ffi.new "vx_rows *[1]", ffi.new("vx_rows_part[?]", #parts)
  for i, p in ipairs(parts) do
    local c = list[i - 1]
    c.file, c.format, c.offset, c.rows = p.file.r, p.format, p.offset, p.rows
    c.column_major = p.column_major and 1 or 0
  end
  call(C.vx_rows_open, out, list, #parts, width) -- `parts` holds the texts for as long
  return setmetatable({ r = ffi.gc(out[0], C.vx_rows_free), parts = parts }, Rows)
end

--- Fills x f32 (B,width), on the CPU, with the rows of index, i32 (B), 0-based; or with rows first, first + 1, ...
-- where index is nil.
function Rows:read(x, index, first) call(C.vx_rows_read, self.r, handle(x), handle(index), first or 0) end

--- Counts the rows of all files.
function Rows:count() return tonumber(C.vx_rows_count(self.r)) end

--- Lets go of the files.
function Rows:close()
  if self.r then C.vx_rows_free(ffi.gc(self.r, nil)) end
  for _, p in ipairs(self.parts) do p.file:close() end
  self.r, self.parts = nil, {}
end

return files
