/* reduce_parts.cu: sums that are cut into parts, see reduce_parts.cuh. */
#include "reduce_parts.cuh"

enum { BLOCK = 256 };

VX_KERNEL add_parts_kernel(float *sum, const float *partial, int64_t count, int64_t parts, int64_t pitch)
{
    for (int64_t i = vx_first(); i < count; i += vx_step()) {
        double total = 0;
#pragma unroll 16 /* many loads under way: there are few threads */
        for (int64_t p = 0; p < parts; p++) total += partial[p * pitch + i];
        sum[i] = (float)total;
    }
}

void vx_add_parts(float *sum, const float *partial, int64_t count, int64_t parts, int64_t pitch)
{
    VX_LAUNCH(add_parts_kernel, vx_grid(count, BLOCK), BLOCK, 0, sum, partial, count, parts, pitch);
}

VX_KERNEL add_blocks_kernel(float *y, const double *partial, int64_t parts, double factor, double divisor)
{
    __shared__ double shared[32];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < parts; i += BLOCK) sum += partial[i];
    sum = vx_block_sum(sum, shared);
    if (threadIdx.x == 0) *y = (float)(factor * sum / divisor);
}

void vx_add_blocks(float *y, const double *partial, int64_t parts, double factor, double divisor)
{
    VX_LAUNCH(add_blocks_kernel, 1, BLOCK, 0, y, partial, parts, factor, divisor);
}

/* Adds up each part's rows of x (rows,C): partial (parts,C). A block has 32 columns; each of its 8 warps takes every
 * eighth row. */
template <class X> VX_KERNEL rows_sum_kernel(float *partial, const X *x, int64_t rows, int64_t C, int64_t parts)
{
    __shared__ float shared[8][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t c = (int64_t)blockIdx.y * 32 + lane, part = blockIdx.x;
    float sum = 0;
    for (int64_t r = part * rows / parts + warp; r < (part + 1) * rows / parts && c < C; r += 8)
        sum += vx_get(x + r * C + c);
    shared[warp][lane] = sum;
    __syncthreads();
    if (warp || c >= C) return;
    for (int t = 1; t < 8; t++) sum += shared[t][lane];
    partial[part * C + c] = sum;
}

void vx_add_rows(float *sum, const vx_tensor *x, int64_t rows, int64_t C)
{
    const int64_t parts = vx_max64(vx_min64(rows / 64, 512), 1);
    if (!C) return;
    float *partial = VX_SCRATCH(float, parts *C);
    VX_TYPED(vx_is_bf16(x), X,
             VX_LAUNCH((rows_sum_kernel<X>), dim3((unsigned)parts, (unsigned)vx_ceil_div(C, 32)), BLOCK, 0, partial,
                       (const X *)x->data, rows, C, parts));
    vx_add_parts(sum, partial, C, parts, C);
}
