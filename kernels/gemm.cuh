/* gemm.cuh: products of row-major matrices: a whole one for ops that need one inside (separable.cu), and the tile in shared memory that
 * the kernels of the convolutions and of the quantizers are built around.
 *
 * A tile is 16 RT rows by panels of 64 columns, worked on by 256 threads: thread (tx, ty) has columns 4 tx .. 4 tx + 3 of a panel and rows
 * ty, ty + 16, ... A warp covers 8 values of tx and 4 of ty, so that reading a float4 of rows and one of columns is one wavefront each,
 * for 4 RT multiply-adds a lane.
 */
#ifndef VX_GEMM_CUH
#define VX_GEMM_CUH

#include "cuda.cuh"

/* Element (i, j) of index b is data[b batch_stride + i row_stride + j column_stride], of f32 or bf16. */
typedef struct matrix {
    void *data;
    int64_t batch_stride, row_stride, column_stride;
    bool bf16;
} matrix;

/* c (batch,m,n) = alpha a (batch,m,k) b (batch,k,n) + beta c + bias, added up in float32; c's columns lie side by side. By cuBLAS where it
 * can take the strides, else by a kernel of our own. c is not read where beta is 0; with a bias or a beta it is f32. */
void vx_gemm(int64_t batch, int64_t m, int64_t n, int64_t k, float alpha, matrix a, matrix b, float beta, matrix c, const float *bias);

/* -- A tile ------------------------------------------------------------------------------------------------------------------ */

constexpr int PANEL = 64, TILE_THREADS = 256;
constexpr int CHUNK = 32;             /* of depth, in shared memory at a time */
constexpr int ROW_PITCH = CHUNK + 4;  /* so that the rows a warp reads lie in different banks */

VX_DEVICE int tile_x(void) { return threadIdx.x % 8 + threadIdx.x / 32 % 2 * 8; }
VX_DEVICE int tile_y(void) { return threadIdx.x % 32 / 8 + threadIdx.x / 64 * 4; }

/* sum[i][4 j ..] += <row ty + 16 i, columns 64 j + 4 tx ..>: a has 16 RT rows, ROW_PITCH apart, b `depth` rows, a multiple of 4, of 64 OUT
 * columns. Both in shared memory; depth in ascending order. */
template <int RT, int OUT> VX_DEVICE void multiply_tile(float (&sum)[RT][4 * OUT], const float *a, const float *b, int depth)
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
                const float4 q = *(const float4 *)(b + (k + step) * (OUT * PANEL) + j * PANEL + 4 * tx);
#pragma unroll
                for (int i = 0; i < RT; i++) {
                    const float z = step == 0 ? x[i].x : step == 1 ? x[i].y : step == 2 ? x[i].z : x[i].w;
                    sum[i][4 * j] += z * q.x, sum[i][4 * j + 1] += z * q.y, sum[i][4 * j + 2] += z * q.z, sum[i][4 * j + 3] += z * q.w;
                }
            }
    }
}

#endif
