/* gemm.cu: gemm on CUDA: batched C = alpha A B + beta C + bias in float32.
 *
 * cuBLAS multiplies column-major matrices, and a row-major matrix is a transposed column-major one: C' = B' A'. It
 * wants strides of at least a row's length and sizes below 2^31; what it does not take (rows that overlap, a view with
 * a stride of 0) goes to a kernel of our own, 64 x 64 tiles of float32 multiply-adds with any strides.
 *
 * Accuracy: float32 throughout unless vx_allow_tf32 says otherwise. Under vx_autocast, or where one factor is bf16
 * already, both are rounded to bf16, for cuBLAS as copies; a product of two bf16 is exact in float32, and sums are
 * float32. Sums run in cuBLAS's order, the same for the same sizes on the same device.
 */
#include "cuda/blas.cuh"
#include "shared/checks.h"
#include "cuda/gemm_tile.cuh"
#include "cuda/vec4.cuh"

constexpr int GEMM_RT = 4, GEMM_ROWS = 16 * GEMM_RT;

VX_KERNEL bias_kernel(float *c, const float *bias, float beta, int64_t m, int64_t n, int64_t batch,
                      int64_t batch_stride, int64_t row_stride)
{
    for (int64_t i = vx_first(); i < batch * m * n; i += vx_step()) {
        float *to = c + i / (m * n) * batch_stride + i / n % m * row_stride + i % n;
        *to = (beta != 0 ? beta * *to : 0) + (bias ? bias[i % n] : 0);
    }
}

VX_DEVICE float element(const matrix &x, int64_t i)
{
    return x.bf16 ? vx_get((const vx_bf16 *)x.data + i) : vx_get((const float *)x.data + i);
}

VX_KERNEL __launch_bounds__(TILE_THREADS) product_kernel(matrix a, matrix b, matrix c, int64_t m, int64_t n, int64_t k,
                                                         float alpha, float beta, const float *bias, bool bf16)
{
    alignas(16) __shared__ float left[GEMM_ROWS * ROW_PITCH], right[CHUNK * TILE_COLUMNS];
    const int64_t row = (int64_t)blockIdx.x * GEMM_ROWS, column = (int64_t)blockIdx.y * TILE_COLUMNS,
                  index = blockIdx.z;
    const int64_t x = index * a.batch_stride, y = index * b.batch_stride;
    const int tx = tile_x(), ty = tile_y();
    float sum[GEMM_RT][4] = {};
    for (int64_t from = 0; from < k; from += CHUNK) {
        __syncthreads();
        for (int i = threadIdx.x; i < GEMM_ROWS * CHUNK; i += TILE_THREADS) {
            const int r = i / CHUNK, p = i % CHUNK;
            const bool there = row + r < m && from + p < k;
            const float value = there ? element(a, x + (row + r) * a.row_stride + (from + p) * a.column_stride) : 0;
            left[r * ROW_PITCH + p] = bf16 ? vx_from_bf16(vx_to_bf16(value)) : value;
        }
        for (int i = threadIdx.x; i < CHUNK * TILE_COLUMNS; i += TILE_THREADS) {
            const int p = i / TILE_COLUMNS, j = i % TILE_COLUMNS;
            const bool there = from + p < k && column + j < n;
            const float value = there ? element(b, y + (from + p) * b.row_stride + (column + j) * b.column_stride) : 0;
            right[p * TILE_COLUMNS + j] = bf16 ? vx_from_bf16(vx_to_bf16(value)) : value;
        }
        __syncthreads();
        multiply_tile<GEMM_RT, 1>(sum, left, right, CHUNK);
    }
#pragma unroll
    for (int i = 0; i < GEMM_RT; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t r = row + ty + 16 * i, at = column + 4 * tx + j;
            if (r >= m || at >= n) continue;
            const int64_t to = index * c.batch_stride + r * c.row_stride + at;
            const float value = alpha * sum[i][j] + (beta != 0 ? beta * element(c, to) : 0) + (bias ? bias[at] : 0);
            if (c.bf16) vx_put((vx_bf16 *)c.data + to, value);
            else vx_put((float *)c.data + to, value);
        }
}

/* Says how cuBLAS would read a matrix of this many rows and columns: 'n' as it stands, 't' transposed, 0 not at all. */
static char orientation(matrix x, int64_t rows, int64_t columns, int64_t *leading)
{
    const int64_t limit = INT32_MAX;
    if ((x.column_stride == 1 || columns == 1) && (x.row_stride >= columns || rows == 1)) {
        *leading = rows == 1 ? columns : x.row_stride;
        return *leading <= limit ? 'n' : 0;
    }
    if ((x.row_stride == 1 || rows == 1) && (x.column_stride >= rows || columns == 1)) {
        *leading = columns == 1 ? rows : x.column_stride;
        return *leading <= limit ? 't' : 0;
    }
    return 0;
}

/* Rounds from (batch,rows,columns), whose columns lie side by side, to bf16: to (batch,rows,pitch). Four at a time. */
VX_KERNEL round_kernel(vx_bf16 *to, const float *from, int64_t batch, int64_t rows, int64_t columns, int64_t pitch,
                       int64_t batch_stride, int64_t row_stride, bool fours)
{
    const int64_t across = pitch / 4;
    for (int64_t i = vx_first(); i < batch * rows * across; i += vx_step()) {
        const int64_t c = i % across * 4, r = i / across % rows, index = i / across / rows;
        const float *x = from + index * batch_stride + r * row_stride + c;
        float4 v = make_float4(0, 0, 0, 0);
        if (fours && c + 4 <= columns) v = *(const float4 *)x;
        else {
            if (c < columns) v.x = x[0];
            if (c + 1 < columns) v.y = x[1];
            if (c + 2 < columns) v.z = x[2];
            if (c + 3 < columns) v.w = x[3];
        }
        store<4>(to + 4 * i, {{v.x, v.y, v.z, v.w}});
    }
}

/* A factor as cuBLAS gets it. */
typedef struct factor {
    const void *data;
    cudaDataType type;
    int64_t leading, batch_stride;
    int64_t batch, rows, columns; /* of the copy to be made, if data lies in it */
} factor;

/* Returns x as it stands, or takes a place for its rounded copy, whose rows begin on 16 bytes. */
static factor factor_of(matrix x, int64_t batch, int64_t rows, int64_t columns, char how, int64_t leading, bool bf16)
{
    factor f = {x.data, x.bf16 ? CUDA_R_16BF : CUDA_R_32F, leading, x.batch_stride, 0, 0, 0};
    if (x.bf16 == bf16) return f;
    f.batch = x.batch_stride ? batch : 1, f.rows = how == 'n' ? rows : columns, f.columns = how == 'n' ? columns : rows;
    f.type = CUDA_R_16BF, f.leading = vx_ceil_div(f.columns, 8) * 8;
    f.batch_stride = x.batch_stride ? f.rows * f.leading : 0;
    f.data = VX_SCRATCH(vx_bf16, f.batch * f.rows * f.leading);
    return f;
}

static void fill_factor(const factor *f, matrix x, int64_t leading)
{
    if (!f->batch) return;
    const bool fours = (uintptr_t)x.data % 16 == 0 && leading % 4 == 0 && x.batch_stride % 4 == 0;
    VX_LAUNCH(round_kernel, vx_grid(f->batch * f->rows * f->leading / 4, 256), 256, 0, (vx_bf16 *)f->data,
              (const float *)x.data, f->batch, f->rows, f->columns, f->leading, x.batch_stride, leading, fours);
}

static matrix from_index(matrix x, int64_t first)
{
    x.data = (char *)x.data + first * x.batch_stride * (int64_t)(x.bf16 ? sizeof(vx_bf16) : sizeof(float));
    return x;
}

void vx_gemm(int64_t batch, int64_t m, int64_t n, int64_t k, float alpha, matrix a, matrix b, float beta, matrix c,
             const float *bias)
{
    if (!batch || !m || !n) return;
    const bool bf16 = vx_bf16_products() || a.bf16 || b.bf16;
    int64_t lda = 0, ldb = 0;
    const char how_a = orientation(a, m, k, &lda), how_b = orientation(b, k, n, &ldb);
    const bool fits = k > 0 && m <= INT32_MAX && n <= INT32_MAX && k <= INT32_MAX && batch <= INT32_MAX &&
                      c.row_stride <= INT32_MAX && (c.row_stride >= n || m == 1);
    if (!how_a || !how_b || !fits) {
        for (int64_t first = 0; first < batch; first += 65535) { /* a grid's third size is limited */
            const int64_t count = vx_min64(batch - first, 65535);
            const matrix x = from_index(a, first), y = from_index(b, first), z = from_index(c, first);
            VX_LAUNCH(
                product_kernel,
                dim3((unsigned)vx_ceil_div(m, GEMM_ROWS), (unsigned)vx_ceil_div(n, TILE_COLUMNS), (unsigned)count),
                TILE_THREADS, 0, x, y, z, m, n, k, alpha, beta, bias, bf16);
        }
        return;
    }
    const vx_blas *blas = vx_blas_open();
    if (!blas) return;
    const factor x = factor_of(a, batch, m, k, how_a, lda, bf16), y = factor_of(b, batch, k, n, how_b, ldb, bf16);
    fill_factor(&x, a, lda);
    fill_factor(&y, b, ldb);
    if (bias) {
        VX_LAUNCH(bias_kernel, vx_grid(batch * m * n, 256), 256, 0, (float *)c.data, bias, beta, m, n, batch,
                  c.batch_stride, c.row_stride);
        beta = 1;
    }
    VX_BLAS(blas->gemm(blas->handle, how_b == 'n' ? CUBLAS_OP_N : CUBLAS_OP_T, how_a == 'n' ? CUBLAS_OP_N : CUBLAS_OP_T,
                       (int)n, (int)m, (int)k, &alpha, y.data, y.type, (int)y.leading, y.batch_stride, x.data, x.type,
                       (int)x.leading, x.batch_stride, &beta, c.data, c.bf16 ? CUDA_R_16BF : CUDA_R_32F,
                       (int)(m == 1 ? vx_max64(n, 1) : c.row_stride), c.batch_stride, (int)batch,
                       vx_tf32() && !bf16 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

static matrix matrix_of(const vx_tensor *x)
{
    const matrix of = {x->data, x->stride[0], x->stride[1], x->stride[2], false};
    return of;
}

int vx_cuda_gemm(vx_tensor *c, vx_tensor *a, vx_tensor *b, vx_tensor *bias, float alpha, float beta)
{
    const int64_t m = c->shape[1], n = c->shape[2], k = a->shape[2];
    if (check_gemm(c, a, b)) return VX_EINVAL;
    vx_gemm(c->shape[0], m, n, k, alpha, matrix_of(a), matrix_of(b), beta, matrix_of(c), vx_f32(bias));
    return vx_status();
}
