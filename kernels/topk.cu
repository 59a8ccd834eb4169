/* topk.cu: the K largest or smallest elements of each row on CUDA; what they are, ties included, is said in topk.c.
 * Exact, and simple rather than fast: a block takes a row and goes through it K times, each time for the largest key
 * below the one before. A NaN is reported late.
 */
#include "shared/neighbours.h"
#include "cuda/cuda.cuh"

enum { BLOCK = 256 };

VX_KERNEL topk_kernel(float *values, int32_t *index, const float *x, int64_t N, int64_t C, int64_t K, int largest,
                      vx_data_check nan)
{
    __shared__ unsigned long long shared[32];
    for (int64_t n = blockIdx.x; n < N; n += gridDim.x) {
        const float *row = x + n * C;
        unsigned long long last = 0; /* complemented keys, so that vx_block_min finds the largest */
        for (int64_t k = 0; k < K; k++) {
            unsigned long long mine = ~0ull;
            for (int64_t c = threadIdx.x; c < C; c += BLOCK) {
                const float v = row[c];
                if (k == 0 && v != v) vx_report(nan, n);
                /* -0 becomes 0: they are equal */
                const unsigned long long key = ~neighbour_pack((largest ? v : -v) + 0.0f, c);
                if ((k == 0 || key > last) && key < mine) mine = key;
            }
            last = vx_block_min(mine, shared);
            __syncthreads();
            if (threadIdx.x == 0) {
                const int32_t c = neighbour_row(~last);
                index[n * K + k] = c;
                values[n * K + k] = row[c];
            }
        }
    }
}

/* values, index (N,K) of x (N,C). */
int vx_cuda_topk(vx_tensor *values, vx_tensor *index, vx_tensor *x, int largest)
{
    const int64_t N = x->shape[0], C = x->shape[1], K = values->shape[1];
    if (!N) return VX_OK;
    const vx_data_check nan = vx_data_check_of(VX_ENONFINITE, 1, "row %%lld holds a NaN");
    VX_LAUNCH(topk_kernel, vx_grid(N, 1), BLOCK, 0, vx_f32(values), vx_i32(index), vx_f32(x), N, C, K, largest, nan);
    return vx_status();
}
