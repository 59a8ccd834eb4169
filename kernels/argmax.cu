/* argmax.cu: the column of each row's largest element on CUDA. x is read once.
 *
 * Element and column are packed into one integer key whose least value is the answer, ties to the lowest column
 * included; so the order in which threads meet the elements does not matter.
 */
#include "cuda/cuda.cuh"
#include "shared/float_order.h"

enum { BLOCK = 256 };

/* `width` threads share each row of n elements. The least key, (complement of the element's order) << 32 | column, is
 * that of the largest element, and among equals of the lowest column. A row of nothing but NaN gets 0. */
VX_KERNEL argmax_kernel(int32_t *index, const float *x, int64_t rows, int64_t n, int width, vx_data_check nan)
{
    __shared__ unsigned long long shared[32];
    const int at = threadIdx.x % width, groups = BLOCK / width;
    for (int64_t first = (int64_t)blockIdx.x * groups; first < rows; first += (int64_t)gridDim.x * groups) {
        const int64_t r = first + threadIdx.x / width;
        unsigned long long least = ~0ull;
        for (int64_t i = at; r < rows && i < n; i += width) {
            const float v = x[r * n + i];
            if (v != v) vx_report(nan, r);
            const unsigned long long key =
                (unsigned long long)~float_order(v + 0.0f) << 32 | (uint32_t)i; /* -0 becomes 0: they are equal */
            if (v == v && key < least) least = key;
        }
        if (width <= 32) {
            for (int i = width / 2; i > 0; i >>= 1) least = min(least, __shfl_xor_sync(VX_ALL_LANES, least, i));
        } else {
            least = vx_block_min(least, shared);
            __syncthreads();
        }
        if (r < rows && at == 0) index[r] = least == ~0ull ? 0 : (int32_t)(uint32_t)least;
    }
}

/* Writes index (N), the 0-based column of the largest element of each row of x (N,C). A row with a NaN is reported
 * late. */
int vx_cuda_argmax(vx_tensor *index, vx_tensor *x)
{
    const int64_t rows = x->shape[0], n = x->shape[1];
    if (!rows) return VX_OK;
    const vx_data_check nan = vx_data_check_of(VX_ENONFINITE, 1, "row %%lld holds a NaN");
    const int width = vx_threads_for(n, BLOCK);
    VX_LAUNCH(argmax_kernel, vx_grid(rows, BLOCK / width), BLOCK, 0, vx_i32(index), vx_f32(x), rows, n, width, nan);
    return vx_status();
}
