/* pool2d.c: pooling over windows of images, channels last: the largest number of a window, or its average.
 *
 * Padding is never looked at: a maximum is that of the pixels there are, and an average divides their sum by the
 * window's size (include_pad) or by their number. The gradients go through the pixels: each adds up what the windows
 * that it lies in have for it, in their order. Memory traffic: input and output once, windows overlap in L1.
 */
#include <string.h>

#include "cpu/cpu.h"
#include "shared/conv2d.h"

enum { SERIAL_BELOW = 20000 /* numbers looked at that are not worth waking a thread for */ };

/* A run of rows or columns: first .. end - 1. */
typedef struct range {
    int64_t first, end;
} range;

/* Returns the pixels, of `size`, that window p sees along one side. */
static range pixels_of(int64_t p, int64_t stride, int64_t padding, int64_t kernel, int64_t size)
{
    const int64_t at = p * stride - padding;
    return (range){vx_max64(at, 0), vx_min64(at + kernel, size)};
}

/* Returns the windows, of `count`, that see pixel h along one side. */
static range windows_of(int64_t h, int64_t stride, int64_t padding, int64_t kernel, int64_t count)
{
    const int64_t last = (h + padding) / stride, before = h + padding - kernel;
    return (range){before < 0 ? 0 : before / stride + 1, vx_min64(last + 1, count)};
}

/* Computes y (B,P,Q,C), the maxima of windows of x (B,H,W,C), and index, h W + w of each. A NaN is larger than any
 * number; of equals the first counts. */
int VX_CPU(max_pool2d)(vx_tensor *y, vx_tensor *index, vx_tensor *x, int kernel_h, int kernel_w, int stride_h,
                       int stride_w, int padding_h, int padding_w)
{
    if (check_pixels("max_pool2d", x, y)) return VX_EINVAL;
    const window_sizes s = window_sizes_of(x, y, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w);
#pragma omp parallel for schedule(static) if (y->numel * s.K * s.L > SERIAL_BELOW)
    for (int64_t i = 0; i < s.B * s.P * s.Q; i++) {
        const range rows = pixels_of(i / s.Q % s.P, s.stride_h, s.padding_h, s.K, s.H);
        const range columns = pixels_of(i % s.Q, s.stride_w, s.padding_w, s.L, s.W);
        const float *image = vx_f32(x) + i / (s.Q * s.P) * s.H * s.W * s.C;
        float *to = vx_f32(y) + i * s.C;
        int32_t *at = index ? vx_i32(index) + i * s.C : 0;
        for (int64_t h = rows.first; h < rows.end; h++)
            for (int64_t w = columns.first; w < columns.end; w++) {
                const float *from = image + (h * s.W + w) * s.C;
                const int is_first = h == rows.first && w == columns.first;
                if (is_first) memcpy(to, from, sizeof(float) * (size_t)s.C);
                if (at) {
                    const int32_t place = (int32_t)(h * s.W + w);
                    for (int64_t c = 0; c < s.C; c++)
                        if (is_first || !(from[c] <= to[c] || to[c] != to[c])) at[c] = place, to[c] = from[c];
                } else if (!is_first) {
                    for (int64_t c = 0; c < s.C; c++) to[c] = from[c] <= to[c] || to[c] != to[c] ? to[c] : from[c];
                }
            }
    }
    return VX_OK;
}

/* Computes dx (B,H,W,C): each pixel gets the dy of the windows of which it is the maximum. */
int VX_CPU(max_pool2d_backward)(vx_tensor *dx, vx_tensor *dy, vx_tensor *index, int kernel_h, int kernel_w,
                                int stride_h, int stride_w, int padding_h, int padding_w)
{
    const window_sizes s = window_sizes_of(dx, dy, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w);
#pragma omp parallel for schedule(static) if (dy->numel * s.K * s.L > SERIAL_BELOW)
    for (int64_t i = 0; i < s.B * s.H * s.W; i++) {
        const range rows = windows_of(i / s.W % s.H, s.stride_h, s.padding_h, s.K, s.P);
        const range columns = windows_of(i % s.W, s.stride_w, s.padding_w, s.L, s.Q);
        const int64_t image = i / (s.H * s.W);
        const int32_t own = (int32_t)(i % (s.H * s.W));
        float *to = vx_f32(dx) + i * s.C;
        memset(to, 0, sizeof(float) * (size_t)s.C);
        for (int64_t p = rows.first; p < rows.end; p++)
            for (int64_t q = columns.first; q < columns.end; q++) {
                const int64_t window = ((image * s.P + p) * s.Q + q) * s.C;
                for (int64_t c = 0; c < s.C; c++)
                    to[c] += vx_i32(index)[window + c] == own ? vx_f32(dy)[window + c] : 0;
            }
    }
    return VX_OK;
}

/* Computes y (B,P,Q,C), the averages of windows of x (B,H,W,C). */
int VX_CPU(avg_pool2d)(vx_tensor *y, vx_tensor *x, int kernel_h, int kernel_w, int stride_h, int stride_w,
                       int padding_h, int padding_w, int include_pad)
{
    const window_sizes s = window_sizes_of(x, y, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w);
#pragma omp parallel for schedule(static) if (y->numel * s.K * s.L > SERIAL_BELOW)
    for (int64_t i = 0; i < s.B * s.P * s.Q; i++) {
        const range rows = pixels_of(i / s.Q % s.P, s.stride_h, s.padding_h, s.K, s.H);
        const range columns = pixels_of(i % s.Q, s.stride_w, s.padding_w, s.L, s.W);
        const float *image = vx_f32(x) + i / (s.Q * s.P) * s.H * s.W * s.C;
        const int64_t seen = (rows.end - rows.first) * (columns.end - columns.first);
        const float count = (float)(include_pad ? s.K * s.L : seen);
        float *to = vx_f32(y) + i * s.C;
        memset(to, 0, sizeof(float) * (size_t)s.C);
        for (int64_t h = rows.first; h < rows.end; h++)
            for (int64_t w = columns.first; w < columns.end; w++) {
                const float *from = image + (h * s.W + w) * s.C;
                for (int64_t c = 0; c < s.C; c++) to[c] += from[c];
            }
        for (int64_t c = 0; c < s.C; c++) to[c] /= count;
    }
    return VX_OK;
}

/* Computes dx (B,H,W,C): each pixel gets its share of the dy of the windows that it lies in. */
int VX_CPU(avg_pool2d_backward)(vx_tensor *dx, vx_tensor *dy, int kernel_h, int kernel_w, int stride_h, int stride_w,
                                int padding_h, int padding_w, int include_pad)
{
    const window_sizes s = window_sizes_of(dx, dy, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w);
#pragma omp parallel for schedule(static) if (dy->numel * s.K * s.L > SERIAL_BELOW)
    for (int64_t i = 0; i < s.B * s.H * s.W; i++) {
        const range rows = windows_of(i / s.W % s.H, s.stride_h, s.padding_h, s.K, s.P);
        const range columns = windows_of(i % s.W, s.stride_w, s.padding_w, s.L, s.Q);
        float *to = vx_f32(dx) + i * s.C;
        memset(to, 0, sizeof(float) * (size_t)s.C);
        for (int64_t p = rows.first; p < rows.end; p++)
            for (int64_t q = columns.first; q < columns.end; q++) {
                const range h = pixels_of(p, s.stride_h, s.padding_h, s.K, s.H);
                const range w = pixels_of(q, s.stride_w, s.padding_w, s.L, s.W);
                const float count = (float)(include_pad ? s.K * s.L : (h.end - h.first) * (w.end - w.first));
                const float *from = vx_f32(dy) + ((i / (s.H * s.W) * s.P + p) * s.Q + q) * s.C;
                for (int64_t c = 0; c < s.C; c++) to[c] += from[c] / count;
            }
    }
    return VX_OK;
}
