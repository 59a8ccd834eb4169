/* kmeans_start.cu: the rows that k-means begins with on CUDA; see kmeans_start.c.
 *
 * Two kernels a chosen row: one lowers each row's distance and leaves the sums of blocks of rows, one finds the next
 * row among them. Distances are added up by warps, so that they may differ from the CPU's in the last bit; a number
 * drawn next to the border of two rows' shares may then name the other one.
 */
#include "frame.h"
#include "largest.cuh"
#include "cuda/cuda.cuh"

enum { BLOCK = 256, BLOCK_ROWS = 256, WARPS = BLOCK / 32 };

/* Draw i: uniform in (0, 1), with 53 bits, as on the CPU. */
VX_DEVICE double draw(const vx_draw &d, int64_t i)
{
    const vx_philox4 r = vx_philox(d.seed, d.stream, (uint64_t)i);
    return ((double)(r.word[0] >> 5) * 67108864.0 + (double)(r.word[1] >> 6) + 0.5) / 9007199254740992.0;
}

/* nearest (N) = the least of itself (none before the first chosen row) and the distance from row chosen[0]; sums: of
 * each block of rows. A warp takes a row at a time. */
VX_KERNEL VX_HOT lower_kernel(float *nearest, double *sums, const float *x, const int32_t *chosen,
                              const uint32_t *largest, int64_t N, int64_t D, int first, vx_data_check nan)
{
    __shared__ double shared[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float *center = x + (int64_t)*chosen * D, scale = frame_scale(__uint_as_float(*largest));
    double sum = 0;
    for (int64_t n = (int64_t)blockIdx.x * BLOCK_ROWS + warp; n < min(N, (int64_t)(blockIdx.x + 1) * BLOCK_ROWS);
         n += WARPS) {
        float distance = 0;
        for (int64_t d = lane; d < D; d += 32) {
            const float difference = x[n * D + d] * scale - center[d] * scale;
            distance += difference * difference;
        }
        distance = vx_warp_sum(distance);
        if (lane == 0) {
            if (!(distance < INFINITY)) vx_report(nan, n), distance = 0;
            if (!first) distance = fminf(distance, nearest[n]);
            nearest[n] = distance;
            sum += distance;
        }
    }
    sum = vx_block_sum(sum, shared);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

/* index[m] = the row in whose share of the sum of `nearest` draw m falls; m 0, or a sum of 0: any row. One thread: it
 * adds N / 256 numbers in the CPU's order. */
VX_KERNEL find_kernel(int32_t *index, const float *nearest, const double *sums, int64_t N, int64_t blocks, int64_t m,
                      vx_random random)
{
    const double u = draw(vx_draw_now(random), m);
    double total = 0;
    for (int64_t b = 0; m > 0 && b < blocks; b++) total += sums[b];
    if (!(total > 0)) {
        index[m] = (int32_t)(u * (double)N);
        return;
    }
    double target = u * total;
    int64_t block = 0;
    while (block + 1 < blocks && target >= sums[block]) target -= sums[block++];
    int64_t last = -1;
    for (; last < 0; block--)
        for (int64_t n = block * BLOCK_ROWS; n < min(N, (block + 1) * (int64_t)BLOCK_ROWS); n++) {
            if (nearest[n] > 0) {
                last = n;
                if (target < nearest[n]) break;
            }
            target -= nearest[n];
        }
    index[m] = (int32_t)last;
}

/* index (M) = rows of x (N,D), 0-based. A NaN or Inf is reported late. */
int vx_cuda_kmeans_start(vx_tensor *index, vx_tensor *x, uint64_t seed, uint64_t stream)
{
    const int64_t N = x->shape[0], D = x->shape[1], M = index->shape[0], blocks = vx_ceil_div(N, BLOCK_ROWS);
    if (!M) return VX_OK;
    const vx_data_check nan = vx_data_check_of(VX_ENONFINITE, 1, "row %%lld of x holds a NaN or Inf");
    const vx_random random = vx_draws(seed, stream);
    float *nearest = VX_SCRATCH(float, N);
    double *sums = VX_SCRATCH(double, blocks);
    uint32_t *largest = VX_SCRATCH(uint32_t, 1);
    find_largest(largest, x, NULL);
    for (int64_t m = 0; m < M; m++) {
        VX_LAUNCH(find_kernel, 1, 1, 0, vx_i32(index), nearest, sums, N, blocks, m, random);
        VX_LAUNCH(lower_kernel, (unsigned)blocks, BLOCK, 0, nearest, sums, vx_f32(x), vx_i32(index) + m, largest, N, D,
                  (int)(m == 0), nan);
    }
    return vx_status();
}
