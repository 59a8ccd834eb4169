/* upsample2x.cu: enlargement of images by 2, nearest neighbour, and its gradient on CUDA. Each operand is read once,
 * the result written once.
 */
#include "cuda/cuda.cuh"

enum { BLOCK = 256 };

/* Enlarges x (B,H,W,C) to y (B,2H,2W,C); rows = B H. */
VX_KERNEL upsample_kernel(float *y, const float *x, int64_t rows, int64_t W, int64_t C)
{
    for (int64_t i = vx_first(); i < rows * W * C * 4; i += vx_step()) {
        const int64_t c = i % C, q = i / C % (2 * W), r = i / C / (2 * W); /* r: row of y, counted over the batch */
        y[i] = x[(r / 2 * W + q / 2) * C + c];
    }
}

/* Adds up dy (B,2H,2W,C): each pixel of dx (B,H,W,C) gets the sum of its four; rows = B H. */
VX_KERNEL upsample_backward_kernel(float *dx, const float *dy, int64_t rows, int64_t W, int64_t C)
{
    for (int64_t i = vx_first(); i < rows * W * C; i += vx_step()) {
        const int64_t c = i % C, w = i / C % W, r = i / C / W;
        const float *a = dy + (4 * r * W + 2 * w) * C + c, *b = a + 2 * W * C;
        dx[i] = (a[0] + a[C]) + (b[0] + b[C]);
    }
}

int vx_cuda_upsample2x(vx_tensor *y, vx_tensor *x)
{
    if (!y->numel) return VX_OK;
    VX_LAUNCH(upsample_kernel, vx_grid(y->numel, BLOCK), BLOCK, 0, vx_f32(y), vx_f32(x), x->shape[0] * x->shape[1],
              x->shape[2], x->shape[3]);
    return vx_status();
}

int vx_cuda_upsample2x_backward(vx_tensor *dx, vx_tensor *dy)
{
    if (!dx->numel) return VX_OK;
    VX_LAUNCH(upsample_backward_kernel, vx_grid(dx->numel, BLOCK), BLOCK, 0, vx_f32(dx), vx_f32(dy),
              dx->shape[0] * dx->shape[1], dx->shape[2], dx->shape[3]);
    return vx_status();
}
