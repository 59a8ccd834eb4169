/* cumsum.cu: sums so far along one dimension, on CUDA; what they are is said in cumsum.c.
 *
 * Many columns: a thread adds up one of them, neighbours side by side in memory; x is read once, y written once. Few
 * and long ones: a block shares a column, each thread a stretch of it. A thread adds its stretch up, learns the sum
 * before it, and goes through it once more: x is read twice. All sums are in double.
 */
#include "cuda/cuda.cuh"

enum { BLOCK = 256, MANY = 4096 /* columns that keep a device busy, a thread each */ };

/* A thread for each column of S elements that are C apart. */
VX_KERNEL column_kernel(float *y, const float *x, int64_t columns, int64_t S, int64_t C, int reverse)
{
    for (int64_t i = vx_first(); i < columns; i += vx_step()) {
        const int64_t step = reverse ? -C : C;
        int64_t at = i / C * S * C + i % C + (reverse ? (S - 1) * C : 0);
        double sum = 0;
        for (int64_t s = 0; s < S; s++, at += step) {
            sum += x[at];
            y[at] = (float)sum;
        }
    }
}

/* A block for each column. */
VX_KERNEL stretch_kernel(float *y, const float *x, int64_t columns, int64_t S, int64_t C, int reverse)
{
    __shared__ double before[BLOCK + 1];
    const int64_t stretch = (S + BLOCK - 1) / BLOCK, first = threadIdx.x * stretch;
    const int64_t count = first >= S ? 0 : first + stretch < S ? stretch : S - first;
    for (int64_t i = blockIdx.x; i < columns; i += gridDim.x) {
        const int64_t start = i / C * S * C + i % C, step = reverse ? -C : C;
        const int64_t begin = start + (reverse ? S - 1 - first : first) * C;
        double sum = 0;
        for (int64_t s = 0; s < count; s++) sum += x[begin + s * step];
        before[threadIdx.x + 1] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            before[0] = 0;
            for (int t = 1; t < BLOCK; t++) before[t] += before[t - 1];
        }
        __syncthreads();
        sum = before[threadIdx.x];
        for (int64_t s = 0; s < count; s++) {
            sum += x[begin + s * step];
            y[begin + s * step] = (float)sum;
        }
        __syncthreads();
    }
}

/* y (B,S,C) = sums of x over s' <= s, or over s' >= s where reverse is 1. */
int vx_cuda_cumsum(vx_tensor *y, vx_tensor *x, int reverse)
{
    const int64_t S = x->shape[1], C = x->shape[2], columns = x->shape[0] * C;
    if (!y->numel) return VX_OK;
    if (columns >= MANY || S < BLOCK)
        VX_LAUNCH(column_kernel, vx_grid(columns, BLOCK), BLOCK, 0, vx_f32(y), vx_f32(x), columns, S, C, reverse);
    else VX_LAUNCH(stretch_kernel, vx_grid(columns, 1), BLOCK, 0, vx_f32(y), vx_f32(x), columns, S, C, reverse);
    return vx_status();
}
