/* pool2d.cu: pooling over windows of images on CUDA: what pool2d.c computes, a thread for each number of the result.
 */
#include "cuda/cuda.cuh"
#include "shared/conv2d.h"

enum { BLOCK = 256 };

/* Returns the first pixel that window p sees along one side, and the one after the last. */
VX_DEVICE int64_t first_pixel(int64_t p, int64_t stride, int64_t padding)
{
    const int64_t at = p * stride - padding;
    return at < 0 ? 0 : at;
}
VX_DEVICE int64_t end_pixel(int64_t p, int64_t stride, int64_t padding, int64_t kernel, int64_t size)
{
    const int64_t end = p * stride - padding + kernel;
    return end < size ? end : size;
}

/* Returns the first window that sees pixel h along one side, and the one after the last of `count`. */
VX_DEVICE int64_t first_window(int64_t h, int64_t stride, int64_t padding, int64_t kernel)
{
    const int64_t before = h + padding - kernel;
    return before < 0 ? 0 : before / stride + 1;
}
VX_DEVICE int64_t end_window(int64_t h, int64_t stride, int64_t padding, int64_t count)
{
    const int64_t end = (h + padding) / stride + 1;
    return end < count ? end : count;
}

/* Returns the number that window (p, q) divides its sum by. */
VX_DEVICE float divisor(const window_sizes &s, int64_t p, int64_t q, int include_pad)
{
    if (include_pad) return (float)(s.K * s.L);
    const int64_t rows = end_pixel(p, s.stride_h, s.padding_h, s.K, s.H) - first_pixel(p, s.stride_h, s.padding_h);
    return (float)(rows * (end_pixel(q, s.stride_w, s.padding_w, s.L, s.W) - first_pixel(q, s.stride_w, s.padding_w)));
}

VX_KERNEL max_kernel(float *y, int32_t *index, const float *x, window_sizes s)
{
    for (int64_t i = vx_first(); i < s.B * s.P * s.Q * s.C; i += vx_step()) {
        const int64_t c = i % s.C, q = i / s.C % s.Q, p = i / (s.C * s.Q) % s.P, b = i / (s.C * s.Q * s.P);
        const int64_t h_end = end_pixel(p, s.stride_h, s.padding_h, s.K, s.H);
        const int64_t w_end = end_pixel(q, s.stride_w, s.padding_w, s.L, s.W);
        float best = 0;
        int64_t at = -1;
        for (int64_t h = first_pixel(p, s.stride_h, s.padding_h); h < h_end; h++)
            for (int64_t w = first_pixel(q, s.stride_w, s.padding_w); w < w_end; w++) {
                const float v = x[((b * s.H + h) * s.W + w) * s.C + c];
                if (at < 0 || !(v <= best || best != best)) best = v, at = h * s.W + w;
            }
        y[i] = best;
        if (index) index[i] = (int32_t)at;
    }
}

VX_KERNEL max_backward_kernel(float *dx, const float *dy, const int32_t *index, window_sizes s)
{
    for (int64_t i = vx_first(); i < s.B * s.H * s.W * s.C; i += vx_step()) {
        const int64_t c = i % s.C, w = i / s.C % s.W, h = i / (s.C * s.W) % s.H, b = i / (s.C * s.W * s.H);
        const int64_t p_end = end_window(h, s.stride_h, s.padding_h, s.P);
        const int64_t q_end = end_window(w, s.stride_w, s.padding_w, s.Q);
        float sum = 0;
        for (int64_t p = first_window(h, s.stride_h, s.padding_h, s.K); p < p_end; p++)
            for (int64_t q = first_window(w, s.stride_w, s.padding_w, s.L); q < q_end; q++) {
                const int64_t window = ((b * s.P + p) * s.Q + q) * s.C + c;
                sum += index[window] == h * s.W + w ? dy[window] : 0;
            }
        dx[i] = sum;
    }
}

VX_KERNEL avg_kernel(float *y, const float *x, window_sizes s, int include_pad)
{
    for (int64_t i = vx_first(); i < s.B * s.P * s.Q * s.C; i += vx_step()) {
        const int64_t c = i % s.C, q = i / s.C % s.Q, p = i / (s.C * s.Q) % s.P, b = i / (s.C * s.Q * s.P);
        const int64_t h_end = end_pixel(p, s.stride_h, s.padding_h, s.K, s.H);
        const int64_t w_end = end_pixel(q, s.stride_w, s.padding_w, s.L, s.W);
        float sum = 0;
        for (int64_t h = first_pixel(p, s.stride_h, s.padding_h); h < h_end; h++)
            for (int64_t w = first_pixel(q, s.stride_w, s.padding_w); w < w_end; w++)
                sum += x[((b * s.H + h) * s.W + w) * s.C + c];
        y[i] = sum / divisor(s, p, q, include_pad);
    }
}

VX_KERNEL avg_backward_kernel(float *dx, const float *dy, window_sizes s, int include_pad)
{
    for (int64_t i = vx_first(); i < s.B * s.H * s.W * s.C; i += vx_step()) {
        const int64_t c = i % s.C, w = i / s.C % s.W, h = i / (s.C * s.W) % s.H, b = i / (s.C * s.W * s.H);
        const int64_t p_end = end_window(h, s.stride_h, s.padding_h, s.P);
        const int64_t q_end = end_window(w, s.stride_w, s.padding_w, s.Q);
        float sum = 0;
        for (int64_t p = first_window(h, s.stride_h, s.padding_h, s.K); p < p_end; p++)
            for (int64_t q = first_window(w, s.stride_w, s.padding_w, s.L); q < q_end; q++)
                sum += dy[((b * s.P + p) * s.Q + q) * s.C + c] / divisor(s, p, q, include_pad);
        dx[i] = sum;
    }
}

int vx_cuda_max_pool2d(vx_tensor *y, vx_tensor *index, vx_tensor *x, int kernel_h, int kernel_w, int stride_h,
                       int stride_w, int padding_h, int padding_w)
{
    if (check_pixels("max_pool2d", x, y)) return VX_EINVAL;
    if (!y->numel) return VX_OK;
    const window_sizes s = window_sizes_of(x, y, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w);
    VX_LAUNCH(max_kernel, vx_grid(y->numel, BLOCK), BLOCK, 0, vx_f32(y), index ? vx_i32(index) : nullptr, vx_f32(x), s);
    return vx_status();
}

int vx_cuda_max_pool2d_backward(vx_tensor *dx, vx_tensor *dy, vx_tensor *index, int kernel_h, int kernel_w,
                                int stride_h, int stride_w, int padding_h, int padding_w)
{
    if (!dx->numel) return VX_OK;
    const window_sizes s = window_sizes_of(dx, dy, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w);
    VX_LAUNCH(max_backward_kernel, vx_grid(dx->numel, BLOCK), BLOCK, 0, vx_f32(dx), vx_f32(dy), vx_i32(index), s);
    return vx_status();
}

int vx_cuda_avg_pool2d(vx_tensor *y, vx_tensor *x, int kernel_h, int kernel_w, int stride_h, int stride_w,
                       int padding_h, int padding_w, int include_pad)
{
    if (!y->numel) return VX_OK;
    const window_sizes s = window_sizes_of(x, y, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w);
    VX_LAUNCH(avg_kernel, vx_grid(y->numel, BLOCK), BLOCK, 0, vx_f32(y), vx_f32(x), s, include_pad);
    return vx_status();
}

int vx_cuda_avg_pool2d_backward(vx_tensor *dx, vx_tensor *dy, int kernel_h, int kernel_w, int stride_h, int stride_w,
                                int padding_h, int padding_w, int include_pad)
{
    if (!dx->numel) return VX_OK;
    const window_sizes s = window_sizes_of(dx, dy, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w);
    VX_LAUNCH(avg_backward_kernel, vx_grid(dx->numel, BLOCK), BLOCK, 0, vx_f32(dx), vx_f32(dy), s, include_pad);
    return vx_status();
}
