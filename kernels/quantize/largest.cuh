/* largest.cuh: the largest |x| of whole tensors, which decides how frame.h scales them. */
#ifndef VX_LARGEST_CUH
#define VX_LARGEST_CUH

#include "cuda/cuda.cuh"

/* Makes *largest the bits of the larger of itself and all |x[i]|; a NaN counts nowhere. */
VX_KERNEL largest_kernel(uint32_t *largest, const float *x, int64_t count)
{
    float most = 0;
    for (int64_t i = vx_first(); i < count; i += vx_step()) most = fmaxf(most, fabsf(x[i]));
    most = vx_warp_max(most);
    if (threadIdx.x % 32 == 0) atomicMax(largest, __float_as_uint(most));
}

/* Finds the largest |x| of two tensors, or of one and NULL, as its bits. */
static inline void find_largest(uint32_t *largest, const vx_tensor *x, const vx_tensor *y)
{
    VX_CUDA(cudaMemsetAsync(largest, 0, sizeof *largest, vx_stream()));
    VX_LAUNCH(largest_kernel, vx_grid(x->numel, 256), 256, 0, largest, vx_f32(x), x->numel);
    if (y) VX_LAUNCH(largest_kernel, vx_grid(y->numel, 256), 256, 0, largest, vx_f32(y), y->numel);
}

#endif
