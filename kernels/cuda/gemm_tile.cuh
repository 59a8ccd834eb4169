/* gemm_tile.cuh: products of row-major matrices: a whole one for ops that need one inside (sepconv2d.cu), and the tile
 * in shared memory that the kernels of the convolutions and of the quantizers are built around.
 *
 * A tile is 16 RT rows by 64 columns, or OUT times 64, and 256 threads work on it: thread (tx, ty) has columns 4 tx ..
 * 4 tx + 3 of each 64 and rows ty, ty + 16, ... A warp covers 8 values of tx and 4 of ty, so that reading a float4 of
 * rows and one of columns is one wavefront each, for 4 RT multiply-adds a lane.
 */
#ifndef VX_GEMM_TILE_CUH
#define VX_GEMM_TILE_CUH

#include "cuda.cuh"

/* A batch of matrices: element (i, j) of number b is data[b batch_stride + i row_stride + j column_stride], f32 or
 * bf16. */
typedef struct matrix {
    void *data;
    int64_t batch_stride, row_stride, column_stride;
    bool bf16;
} matrix;

/* Multiplies: c (batch,m,n) = alpha a (batch,m,k) b (batch,k,n) + beta c + bias, added up in float32; c's columns lie
 * side by side. cuBLAS does it where it can take the strides, else a kernel of our own. c is not read where beta is 0;
 * with a bias or a beta it is f32. */
void vx_gemm(int64_t batch, int64_t m, int64_t n, int64_t k, float alpha, matrix a, matrix b, float beta, matrix c,
             const float *bias);

/* Says whether a convolution multiplies in bf16: under vx_autocast, or where an image it reads or writes is bf16. */
static inline bool vx_in_bf16(const vx_tensor *x, const vx_tensor *y)
{
    return vx_bf16_products() || vx_is_bf16(x) || vx_is_bf16(y);
}

/* -- A tile -------------------------------------------------------------------------------------------------------- */

constexpr int TILE_COLUMNS = 64, TILE_THREADS = 256;
constexpr int CHUNK = 32;            /* numbers of depth in shared memory at a time */
constexpr int ROW_PITCH = CHUNK + 4; /* so that the rows a warp reads lie in different banks */

VX_DEVICE int tile_x(void) { return threadIdx.x % 8 + threadIdx.x / 32 % 2 * 8; }
VX_DEVICE int tile_y(void) { return threadIdx.x % 32 / 8 + threadIdx.x / 64 * 4; }

/* Adds an outer product of four numbers each: sum[i][j] += p[i] q[j]. */
VX_DEVICE void add_outer(float (&sum)[4][4], float4 p, float4 q)
{
    const float x[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        sum[i][0] += x[i] * q.x, sum[i][1] += x[i] * q.y, sum[i][2] += x[i] * q.z, sum[i][3] += x[i] * q.w;
}

/* Adds a tile's product: sum[i][4 j ..] += <row ty + 16 i, columns 64 j + 4 tx ..>. a has 16 RT rows, ROW_PITCH
 * apart; b has `depth` rows, a multiple of 4, of 64 OUT columns. Both are in shared memory. Depth is added in
 * ascending order. */
template <int RT, int OUT>
VX_DEVICE void multiply_tile(float (&sum)[RT][4 * OUT], const float *a, const float *b, int depth)
{
    const int tx = tile_x(), ty = tile_y();
    for (int k = 0; k < depth; k += 4) {
        float4 x[RT];
#pragma unroll
        for (int i = 0; i < RT; i++) x[i] = *(const float4 *)(a + (ty + 16 * i) * ROW_PITCH + k);
#pragma unroll
        for (int step = 0; step < 4; step++)
#pragma unroll
            for (int j = 0; j < OUT; j++) {
                const float4 q = *(const float4 *)(b + (k + step) * (OUT * TILE_COLUMNS) + j * TILE_COLUMNS + 4 * tx);
#pragma unroll
                for (int i = 0; i < RT; i++) {
                    const float z = step == 0 ? x[i].x : step == 1 ? x[i].y : step == 2 ? x[i].z : x[i].w;
                    sum[i][4 * j] += z * q.x, sum[i][4 * j + 1] += z * q.y, sum[i][4 * j + 2] += z * q.z,
                        sum[i][4 * j + 3] += z * q.w;
                }
            }
    }
}

/* -- A tile of bf16, on tensor cores ------------------------------------------------------------------------------- */

constexpr int BF16_PITCH = CHUNK + 8; /* lets eight rows be read at once */

/* Where a warp's 16 rows and its half of the 64 OUT columns begin. */
VX_DEVICE int bf16_tile_row(void) { return threadIdx.x / 32 % 4 * 16; }
template <int OUT> VX_DEVICE int bf16_tile_column(void) { return threadIdx.x / 128 * (OUT * TILE_COLUMNS / 2); }

/* Adds a tile's product: sum[j] += the warp's 16 rows by columns 8 j .. 8 j + 7 of its own, as d of vx_mma_bf16. a has
 * 64 rows of CHUNK numbers, b such a row for each of 64 OUT columns. Both are in shared memory, rows BF16_PITCH apart.
 * Depth is added in ascending order. */
template <int OUT> VX_DEVICE void multiply_bf16_tile(float (&sum)[4 * OUT][4], const vx_bf16 *a, const vx_bf16 *b)
{
    const int lane = threadIdx.x % 32, row = bf16_tile_row(), column = bf16_tile_column<OUT>();
#pragma unroll
    for (int k = 0; k < CHUNK; k += 16) {
        uint32_t left[4];
        vx_load_matrices(left, a + (row + lane % 16) * BF16_PITCH + k + lane / 16 * 8);
#pragma unroll
        for (int j = 0; j < 2 * OUT; j++) {
            uint32_t right[4]; /* columns 0 .. 7 along k, then 8 .. 15 */
            vx_load_matrices(right,
                             b + (column + 16 * j + lane / 16 * 8 + lane % 8) * BF16_PITCH + k + lane / 8 % 2 * 8);
            vx_mma_bf16(sum[2 * j], left, right);
            vx_mma_bf16(sum[2 * j + 1], left, right + 2);
        }
    }
}

/* Stores to[0] = first and, if `two`, to[1] = second. `paired` says that there are always two, on a multiple of their
 * size, and that one store does. */
template <class T> VX_DEVICE void put_two(T *to, bool two, bool paired, float first, float second)
{
    if (!paired) {
        vx_put(to, first);
        if (two) vx_put(to + 1, second);
    } else if constexpr (sizeof(T) == 2) *(uint32_t *)to = vx_pack_bf16(first, second);
    else *(float2 *)to = make_float2(first, second);
}

#endif
