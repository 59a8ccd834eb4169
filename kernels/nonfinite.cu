/* nonfinite.cu: how many rows hold a NaN or Inf, and the first of them, on CUDA. x is read once. Counts and the least
 * row are integers, whose atomics give the same result in every order.
 */
#include "cuda/cuda.cuh"

enum { BLOCK = 256 };

/* Counts each row of x (rows, n) that holds a NaN or Inf once: flag (rows) is 1 where it has been. found[1] is compared
 * as an unsigned number, of which -1 is the largest. */
VX_KERNEL nonfinite_kernel(uint32_t *found, int32_t *flag, const float *x, int64_t count, int64_t n)
{
    for (int64_t i = vx_first(); i < count; i += vx_step()) {
        if ((__float_as_uint(x[i]) & 0x7f800000u) != 0x7f800000u) continue;
        const int64_t row = i / n;
        if (flag[row] || atomicExch(&flag[row], 1)) continue;
        atomicAdd(&found[0], 1u);
        atomicMin(&found[1], (uint32_t)row);
    }
}

VX_KERNEL none_found_kernel(int32_t *found)
{
    found[0] = 0;
    found[1] = -1;
}

/* Writes found = (rows that hold a NaN or Inf, the first such row or -1). Working space: 4 bytes a row. */
int vx_cuda_nonfinite(vx_tensor *found, vx_tensor *x)
{
    const int64_t rows = x->shape[0];
    int32_t *flag = VX_SCRATCH(int32_t, vx_max64(rows, 1));
    VX_LAUNCH(none_found_kernel, 1, 1, 0, vx_i32(found));
    if (!x->numel) return vx_status();
    VX_CUDA(cudaMemsetAsync(flag, 0, sizeof(int32_t) * (size_t)rows, vx_stream()));
    VX_LAUNCH(nonfinite_kernel, vx_grid(x->numel, 4 * BLOCK), BLOCK, 0, (uint32_t *)found->data, flag, vx_f32(x),
              x->numel, x->shape[1]);
    return vx_status();
}
