/* loss.cu: losses between two tensors on CUDA: mse, the mean squared difference, and its gradient.
 *
 * Memory traffic: each operand is read once, the gradient written once. The elements are cut into parts of 16384, each
 * added up in float64 by a block; a second kernel adds the parts. The order depends on the size alone.
 */
#include "cuda/reduce_parts.cuh"

enum { BLOCK = 256, PART = 16384 };

/* Sums (a - b)^2 over the elements of part p into partial[p]. A block for each part. */
VX_KERNEL squared_distance_kernel(double *partial, const float *a, const float *b, int64_t n, int64_t parts)
{
    __shared__ double shared[32];
    for (int64_t part = blockIdx.x; part < parts; part += gridDim.x) {
        const int64_t end = min((long long)n, (long long)(part + 1) * PART);
        double sum = 0;
        for (int64_t i = part * PART + threadIdx.x; i < end; i += BLOCK) {
            const double d = a[i] - b[i];
            sum += d * d;
        }
        sum = vx_block_sum(sum, shared);
        if (threadIdx.x == 0) partial[part] = sum;
        __syncthreads();
    }
}

/* Computes loss (1) = mean (a - b)^2; an error where there are no elements. Working space: 8 bytes per 16384
 * elements. */
int vx_cuda_mse(vx_tensor *loss, vx_tensor *a, vx_tensor *b)
{
    const int64_t n = a->numel, parts = vx_ceil_div(n, PART);
    if (!n) return vx_fail(VX_EINVAL, "mse: mean of no elements");
    double *partial = VX_SCRATCH(double, parts);
    VX_LAUNCH(squared_distance_kernel, vx_grid(parts, 1), BLOCK, 0, partial, vx_f32(a), vx_f32(b), n, parts);
    vx_add_blocks(vx_f32(loss), partial, parts, 1, (double)n);
    return vx_status();
}

VX_KERNEL mse_backward_kernel(float *da, const float *a, const float *b, const float *dloss, int64_t n, int64_t fours)
{
    const float scale = (float)(2.0 * *dloss / (double)n);
    for (int64_t i = vx_first(); i < fours; i += vx_step()) {
        const float4 x = ((const float4 *)a)[i], y = ((const float4 *)b)[i];
        ((float4 *)da)[i] =
            make_float4(scale * (x.x - y.x), scale * (x.y - y.y), scale * (x.z - y.z), scale * (x.w - y.w));
    }
    for (int64_t i = 4 * fours + vx_first(); i < n; i += vx_step()) da[i] = scale * (a[i] - b[i]);
}

/* Computes da = 2 dloss (a - b) / count. */
int vx_cuda_mse_backward(vx_tensor *da, vx_tensor *a, vx_tensor *b, vx_tensor *dloss)
{
    if (!a->numel) return VX_OK;
    const int64_t n = a->numel, fours = vx_aligned(da, 16) && vx_aligned(a, 16) && vx_aligned(b, 16) ? n / 4 : 0;
    VX_LAUNCH(mse_backward_kernel, vx_grid(fours ? fours : n, BLOCK), BLOCK, 0, vx_f32(da), vx_f32(a), vx_f32(b),
              vx_f32(dloss), n, fours);
    return vx_status();
}
