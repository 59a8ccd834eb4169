/* reduce_parts.cuh: what the convolutions' files share on CUDA. */
#ifndef VX_DEPTHWISE_CUH
#define VX_DEPTHWISE_CUH

#include "cuda.cuh"

/* sum[i] = sum over p < parts, in order and in float64, of partial[p pitch + i]; i < count. */
void vx_add_parts(float *sum, const float *partial, int64_t count, int64_t parts, int64_t pitch);

/* sum (C) = the rows of x, f32 or bf16, as (rows,C) (conv.cu). */
void vx_add_rows(float *sum, const vx_tensor *x, int64_t rows, int64_t C);

/* Whether a convolution's products take bf16, for the images it reads and writes. */
static inline bool vx_in_bf16(const vx_tensor *x, const vx_tensor *y)
{
    return vx_bf16_products() || vx_is_bf16(x) || vx_is_bf16(y);
}

#endif
