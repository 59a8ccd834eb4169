--- core/lapack.lua: eigenvectors of symmetric matrices in float64, by LAPACK's dsyev. The library is opened at first
-- use; nothing else of Vertex needs it.

local ffi = require "ffi"
local fail = require("vertex.core.library").fail

local lapack = {}

ffi.cdef [[
void dsyev_(const char *jobz, const char *uplo, const int *n, double *a, const int *lda, double *w, double *work,
            const int *lwork, int *info, size_t jobz_length, size_t uplo_length);
]]

local NAME = "liblapack.so.3"
local library

local function open()
  if library then return library end
  local ok, found = pcall(ffi.load, NAME)
  if not ok then fail("eigenvectors need %s, Debian package liblapack3 (%s)", NAME, tostring(found)) end
  library = found
  return library
end

--- Finds the eigenvalues and eigenvectors of a symmetric matrix. Which of two opposite eigenvectors comes is LAPACK's
-- choice.
-- @param matrix array of n arrays of n numbers; the part on and below the diagonal is read
-- @return array of the n eigenvalues, from the lowest; array of n arrays: the eigenvector of each, of length 1
-- @raise where liblapack.so.3 is not installed, or the matrix holds a NaN or Inf
function lapack.symmetric_eigen(matrix)
  local lib, n = open(), #matrix
  local a, w = ffi.new("double[?]", n * n), ffi.new("double[?]", n)
  for i = 1, n do
    for j = 1, i do
      local x = matrix[i][j]
      if x ~= x or math.abs(x) == math.huge then fail("eigenvectors of a matrix with a NaN or Inf") end
      a[(j - 1) * n + i - 1] = x -- column j, row i
    end
  end
  local size, info, length = ffi.new("int[1]", n), ffi.new "int[1]", ffi.new("int[1]", 66 * n) -- 64 is the block size
  lib.dsyev_("V", "L", size, a, size, w, ffi.new("double[?]", length[0]), length, info, 1, 1)
  if info[0] ~= 0 then fail("eigenvectors of a %d x %d matrix: dsyev returned %d", n, n, info[0]) end
  local values, vectors = {}, {}
  for i = 1, n do
    values[i], vectors[i] = w[i - 1], {}
    for j = 1, n do vectors[i][j] = a[(i - 1) * n + j - 1] end
  end
  return values, vectors
end

return lapack
