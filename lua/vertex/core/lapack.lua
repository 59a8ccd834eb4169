--- core/lapack.lua: matrices of float64 in the hands of BLAS and LAPACK, opened at first use; nothing else of Vertex
-- needs them. Any liblapack.so.3 will do; OpenBLAS's is the fast one.
--
-- A matrix is { rows, columns, data }, row-major. LAPACK reads the same memory as its transpose, so what is here the
-- part on and above the diagonal is its "L"; of symmetric matrices only that part is kept up.

local ffi = require "ffi"
local devices = require "vertex.core.device"
local library = require "vertex.core.library"
local tensors = require "vertex.core.tensor"

local C, call, fail = library.C, library.call, library.fail

local lapack = {} -- core.float64

ffi.cdef [[
void dsyev_(const char *jobz, const char *uplo, const int *n, double *a, const int *lda, double *w, double *work,
            const int *lwork, int *info, size_t jobz_length, size_t uplo_length);
void dsygv_(const int *itype, const char *jobz, const char *uplo, const int *n, double *a, const int *lda, double *b,
            const int *ldb, double *w, double *work, const int *lwork, int *info, size_t, size_t);
void dpstrf_(const char *uplo, const int *n, double *a, const int *lda, int *piv, int *rank, const double *tol,
             double *work, int *info, size_t);
void dgesdd_(const char *jobz, const int *m, const int *n, double *a, const int *lda, double *s, double *u,
             const int *ldu, double *vt, const int *ldvt, double *work, const int *lwork, int *iwork, int *info,
             size_t);
void dgemm_(const char *, const char *, const int *m, const int *n, const int *k, const double *alpha, const double *a,
            const int *lda, const double *b, const int *ldb, const double *beta, double *c, const int *ldc, size_t,
            size_t);
void dsymm_(const char *side, const char *uplo, const int *m, const int *n, const double *alpha, const double *a,
            const int *lda, const double *b, const int *ldb, const double *beta, double *c, const int *ldc, size_t,
            size_t);
void dsyrk_(const char *uplo, const char *trans, const int *n, const int *k, const double *alpha, const double *a,
            const int *lda, const double *beta, double *c, const int *ldc, size_t, size_t);
void dsyr_(const char *uplo, const int *n, const double *alpha, const double *x, const int *incx, double *a,
           const int *lda, size_t);
void dgemv_(const char *trans, const int *m, const int *n, const double *alpha, const double *a, const int *lda,
            const double *x, const int *incx, const double *beta, double *y, const int *incy, size_t);
void dger_(const int *m, const int *n, const double *alpha, const double *x, const int *incx, const double *y,
           const int *incy, double *a, const int *lda);
void openblas_set_num_threads(int n);
void *malloc(size_t size);
void free(void *p);
char *getenv(const char *name);
int setenv(const char *name, const char *value, int overwrite);
int unsetenv(const char *name);
]]

local NAME = "liblapack.so.3"
local CORE = "OPENBLAS_CORETYPE"
local opened, set_threads

--- Names the kernels that OpenBLAS should take where it does not know the processor, which it would then serve with
-- those for SSE3.
local function best_kernels()
  local best
  for _, variant in ipairs(devices.cpu_variants()) do
    local flags = variant.runs and variant.flags or ""
    best = flags:find "x86%-64%-v4" and "SkylakeX" or flags:find "x86%-64%-v3" and "Haswell" or best
  end
  return best
end

local function open()
  if not opened then
    local kernels = ffi.C.getenv(CORE) == nil and best_kernels()
    if kernels then ffi.C.setenv(CORE, kernels, 1) end
    local ok, found = pcall(ffi.load, NAME)
    if kernels then ffi.C.unsetenv(CORE) end
    if not ok then
      fail("linear algebra in float64 needs %s, Debian package liblapack3 or, faster, libopenblas0-openmp (%s)", NAME,
        tostring(found))
    end
    opened = found
    local is_openblas, f = pcall(function() return found.openblas_set_num_threads end)
    set_threads = is_openblas and f or function() end
  end
  set_threads(devices.threads())
  return opened
end

-- -- Arguments of Fortran ---------------------------------------------------------------------------------------------

local function int(n) return ffi.new("int[1]", n) end
local function real(x) return ffi.new("double[1]", x) end
local ONE = int(1)

--- Makes an array of n uninitialized float64 numbers, outside of Lua's own memory.
local function array(n)
  local p = ffi.C.malloc(8 * math.max(n, 1))
  if p == nil then fail("out of memory: %d numbers of float64, %.0f MB", n, 8e-6 * n) end
  return ffi.gc(ffi.cast("double *", p), ffi.C.free)
end

--- Calls f(work, size, info), a routine of LAPACK, with the workspace that it asks for; gives its info.
local function with_workspace(f)
  local size, info, wanted = int(-1), int(0), real(0)
  f(wanted, size, info)
  size[0] = wanted[0]
  f(array(size[0]), size, info)
  return info[0]
end

-- -- Matrices ---------------------------------------------------------------------------------------------------------

--- Makes a matrix of zeros.
-- @param rows number of them
-- @param columns number of them
-- @return matrix { rows, columns, data }
function lapack.matrix(rows, columns)
  local data = array(rows * columns)
  ffi.fill(data, 8 * rows * columns)
  return { rows = rows, columns = columns, data = data }
end

--- Copies the first rows of a matrix.
-- @param m matrix
-- @param[opt] rows number of them; nil: all
-- @return matrix
function lapack.copy(m, rows)
  rows = rows or m.rows
  local data = array(rows * m.columns)
  ffi.copy(data, m.data, 8 * rows * m.columns)
  return { rows = rows, columns = m.columns, data = data }
end

--- Reads rows of a tensor into rows of a matrix.
-- @param m matrix
-- @param row the first one to overwrite, from 0
-- @param x tensor f32 (N, m's columns)
function lapack.read_rows(m, row, x)
  x = tensors.contiguous(x)
  local count = x:numel()
  local from, to = ffi.new("float[?]", math.max(count, 1)), m.data + row * m.columns
  call(C.vx_read, x._h, 0, count, from)
  for i = 0, count - 1 do to[i] = from[i] end
end

--- Gives a matrix as Lua's tables.
-- @param m matrix
-- @param[opt] is_symmetric true: what is below the diagonal is taken from above it
-- @return array of the rows, arrays of numbers
function lapack.to_tables(m, is_symmetric)
  local out = {}
  for i = 1, m.rows do
    local row = {}
    for j = 1, m.columns do
      row[j] = is_symmetric and j < i and out[j][i] or m.data[(i - 1) * m.columns + j - 1]
    end
    out[i] = row
  end
  return out
end

--- Sums the diagonal.
-- @param m square matrix
-- @return number
function lapack.trace(m)
  local sum = 0
  for i = 0, m.rows - 1 do sum = sum + m.data[i * (m.columns + 1)] end
  return sum
end

--- Sums the squares of a symmetric matrix's elements.
-- @param s symmetric matrix
-- @return number
function lapack.sum_of_squares(s)
  local sum, n = 0, s.columns
  for i = 0, n - 1 do
    sum = sum + s.data[i * (n + 1)] ^ 2
    for j = i + 1, n - 1 do sum = sum + 2 * s.data[i * n + j] ^ 2 end
  end
  return sum
end

--- Averages the rows of a matrix.
-- @param m matrix
-- @return matrix of one row
function lapack.mean_row(m)
  local lib, mean, ones = open(), lapack.matrix(1, m.columns), array(m.rows)
  for i = 0, m.rows - 1 do ones[i] = 1 end
  lib.dgemv_("N", int(m.columns), int(m.rows), real(1 / m.rows), m.data, int(m.columns), ones, ONE, real(0), mean.data,
    ONE, 1)
  return mean
end

--- Adds a multiple of one row to all rows.
-- @param m matrix, changed in place
-- @param factor number
-- @param row matrix of one row
function lapack.add_to_rows(m, factor, row)
  local lib, ones = open(), array(m.rows)
  for i = 0, m.rows - 1 do ones[i] = 1 end
  lib.dger_(int(m.columns), int(m.rows), real(factor), row.data, ONE, ones, ONE, m.data, int(m.columns))
end

--- Adds factor x' x to a symmetric matrix.
-- @param s symmetric matrix, changed in place
-- @param factor number
-- @param x matrix with as many columns
function lapack.add_gram(s, factor, x)
  local n = int(s.columns)
  if x.rows == 1 then open().dsyr_("L", n, real(factor), x.data, ONE, s.data, n, 1)
  else open().dsyrk_("L", "N", n, int(x.rows), real(factor), x.data, n, real(1), s.data, n, 1, 1) end
end

--- Multiplies all elements.
-- @param m matrix, changed in place
-- @param factor number
function lapack.scale(m, factor)
  for i = 0, m.rows * m.columns - 1 do m.data[i] = factor * m.data[i] end
end

--- Multiplies a by b transposed.
-- @param a matrix
-- @param b matrix with as many columns
-- @return matrix (a's rows, b's rows)
function lapack.product_transposed(a, b)
  local c = lapack.matrix(a.rows, b.rows)
  open().dgemm_("T", "N", int(b.rows), int(a.rows), int(a.columns), real(1), b.data, int(b.columns), a.data,
    int(a.columns), real(0), c.data, int(c.columns), 1, 1)
  return c
end

--- Multiplies a by a symmetric matrix.
-- @param a matrix
-- @param s symmetric matrix with as many columns
-- @return matrix of a's shape
function lapack.product_symmetric(a, s)
  local c, n = lapack.matrix(a.rows, s.columns), int(s.columns)
  open().dsymm_("L", "L", n, int(a.rows), real(1), s.data, n, a.data, n, real(0), c.data, n, 1, 1)
  return c
end

-- -- Decompositions ---------------------------------------------------------------------------------------------------

--- Finds the eigenvalues of a symmetric matrix.
-- @param s symmetric matrix, destroyed
-- @return array of numbers, from the lowest
-- @raise where LAPACK finds none
function lapack.symmetric_eigenvalues(s)
  local lib, n, w = open(), int(s.rows), array(s.rows)
  local info = with_workspace(function(work, size, out)
    lib.dsyev_("N", "L", n, s.data, n, w, work, size, out, 1, 1)
  end)
  if info ~= 0 then fail("eigenvalues of a %d x %d matrix: dsyev returned %d", s.rows, s.rows, info) end
  return lapack.to_tables({ rows = 1, columns = s.rows, data = w })[1]
end

--- Finds the eigenvalues of the product of two symmetric matrices, b positive definite.
-- @param a symmetric matrix, destroyed
-- @param b symmetric matrix, destroyed
-- @return array of numbers, from the lowest; nil where b is not positive definite
function lapack.product_eigenvalues(a, b)
  local lib, n, w = open(), int(a.rows), array(a.rows)
  local info = with_workspace(function(work, size, out)
    lib.dsygv_(int(2), "N", "L", n, a.data, n, b.data, n, w, work, size, out, 1, 1)
  end)
  if info > a.rows then return nil end
  if info ~= 0 then fail("eigenvalues of a product of %d x %d matrices: dsygv returned %d", a.rows, a.rows, info) end
  return lapack.to_tables({ rows = 1, columns = a.rows, data = w })[1]
end

--- Finds a matrix f of few rows with f' f = s, by Cholesky's decomposition with pivots.
-- @param s symmetric matrix without negative eigenvalues, destroyed
-- @return matrix (rank, s's columns)
function lapack.factor(s)
  local lib, n = open(), s.rows
  local pivots, rank, info = ffi.new("int[?]", n), int(0), int(0)
  lib.dpstrf_("L", int(n), s.data, int(n), pivots, rank, real(-1), array(2 * n), info, 1)
  local f = lapack.matrix(rank[0], n)
  for j = 0, rank[0] - 1 do
    for i = j, n - 1 do f.data[j * n + pivots[i] - 1] = s.data[j * n + i] end
  end
  return f
end

--- Finds the singular values of a matrix.
-- @param m matrix, destroyed
-- @return array of numbers, from the largest
-- @raise where LAPACK finds none
function lapack.singular_values(m)
  local lib, least = open(), math.min(m.rows, m.columns)
  local values, whole = array(least), ffi.new("int[?]", 8 * least)
  local info = with_workspace(function(work, size, out)
    lib.dgesdd_("N", int(m.columns), int(m.rows), m.data, int(m.columns), values, nil, ONE, nil, ONE, work, size, whole,
      out, 1)
  end)
  if info ~= 0 then fail("singular values of a %d x %d matrix: dgesdd returned %d", m.rows, m.columns, info) end
  return lapack.to_tables({ rows = 1, columns = least, data = values })[1]
end

--- Finds the eigenvalues and eigenvectors of a symmetric matrix. Which of two opposite eigenvectors comes is LAPACK's
-- choice.
-- @param matrix array of n arrays of n numbers; the part on and below the diagonal is read
-- @return array of the n eigenvalues, from the lowest; array of n arrays: the eigenvector of each, of length 1
-- @raise where liblapack.so.3 is not installed, or the matrix holds a NaN or Inf
function lapack.symmetric_eigen(matrix)
  local lib, n = open(), #matrix
  local a, w = array(n * n), array(n)
  for i = 1, n do
    for j = 1, i do
      local x = matrix[i][j]
      if x ~= x or math.abs(x) == math.huge then fail("eigenvectors of a matrix with a NaN or Inf") end
      a[(j - 1) * n + i - 1] = x -- column j, row i
    end
  end
  local size = int(n)
  local info = with_workspace(function(work, length, out)
    lib.dsyev_("V", "L", size, a, size, w, work, length, out, 1, 1)
  end)
  if info ~= 0 then fail("eigenvectors of a %d x %d matrix: dsyev returned %d", n, n, info) end
  return lapack.to_tables({ rows = 1, columns = n, data = w })[1],
    lapack.to_tables { rows = n, columns = n, data = a }
end

return { float64 = lapack, symmetric_eigen = lapack.symmetric_eigen }
