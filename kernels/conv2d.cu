/* conv2d.cu: convolution of images with any kernel, stride, padding and groups on CUDA: what conv2d.c computes.
 *
 * The windows of a few images at a time are gathered to scratch, a row each, and multiplied by gemm.cu (under
 * vx_autocast factors are rounded to bf16). The gradient of x multiplies dy with the weights, and each pixel adds up
 * what its windows have for it, in their order. The gradient of the weights adds a product per batch of images.
 */
#include "cuda/gemm_tile.cuh"
#include "cuda/reduce_parts.cuh"
#include "shared/conv2d.h"

enum { BLOCK = 256 };
constexpr int64_t GATHERED = 16 << 20; /* floats of windows at a time, where one image has fewer */

/* -- Copies -------------------------------------------------------------------------------------------------------- */

/* Gathers the windows of `images` images from b on, channels first .. first + D - 1: to (images P Q,K L D). */
VX_KERNEL gather_kernel(float *to, const float *x, window_sizes s, int64_t b, int64_t images, int64_t first, int64_t D)
{
    const int64_t depth = s.K * s.L * D;
    for (int64_t i = vx_first(); i < images * s.P * s.Q * depth; i += vx_step()) {
        const int64_t c = i % D, l = i / D % s.L, k = i / (D * s.L) % s.K, j = i / depth;
        const int64_t q = j % s.Q, p = j / s.Q % s.P, image = b + j / (s.Q * s.P);
        const int64_t h = p * s.stride_h + k - s.padding_h, w = q * s.stride_w + l - s.padding_w;
        to[i] = h >= 0 && h < s.H && w >= 0 && w < s.W ? x[((image * s.H + h) * s.W + w) * s.C + first + c] : 0;
    }
}

/* Adds up what the windows (images P Q,K L D) hold for each pixel of `images` images from b on. */
VX_KERNEL scatter_kernel(float *dx, const float *from, window_sizes s, int64_t b, int64_t images, int64_t first,
                         int64_t D)
{
    for (int64_t i = vx_first(); i < images * s.H * s.W * D; i += vx_step()) {
        const int64_t c = i % D, w = i / D % s.W, h = i / (D * s.W) % s.H, image = i / (D * s.W * s.H);
        float sum = 0;
        for (int64_t k = (h + s.padding_h) % s.stride_h; k < s.K; k += s.stride_h) {
            const int64_t p = (h + s.padding_h - k) / s.stride_h;
            if (h + s.padding_h < k || p >= s.P) continue;
            for (int64_t l = (w + s.padding_w) % s.stride_w; l < s.L; l += s.stride_w) {
                const int64_t q = (w + s.padding_w - l) / s.stride_w;
                if (w + s.padding_w < l || q >= s.Q) continue;
                sum += from[((((image * s.P + p) * s.Q + q) * s.K + k) * s.L + l) * D + c];
            }
        }
        dx[(((b + image) * s.H + h) * s.W + w) * s.C + first + c] = sum;
    }
}

/* Orders w (O,D,K,L) as (G,K,L,D,E), or a sum of that order as dw. */
VX_KERNEL order_kernel(float *to, const float *from, int64_t O, int64_t D, int64_t KL, int64_t E, bool back)
{
    for (int64_t i = vx_first(); i < O * D * KL; i += vx_step()) {
        const int64_t t = i % KL, c = i / KL % D, o = i / (KL * D);
        const int64_t ordered = ((o / E * KL + t) * D + c) * E + o % E;
        if (back) to[i] = from[ordered];
        else to[ordered] = from[i];
    }
}

/* -- Products ------------------------------------------------------------------------------------------------------ */

/* A call: its sizes, its weights in order, scratch for the windows of some images. */
typedef struct call {
    window_sizes s;
    int64_t O, D, E, depth, images;
    float *windows, *ordered;
} call;

static call call_of(const vx_tensor *x, const vx_tensor *y, const vx_tensor *w, int stride_h, int stride_w,
                    int padding_h, int padding_w, int groups)
{
    call q;
    q.s = window_sizes_of(x, y, w->shape[2], w->shape[3], stride_h, stride_w, padding_h, padding_w);
    q.O = y->shape[3], q.D = q.s.C / groups, q.E = q.O / groups, q.depth = q.s.K * q.s.L * q.D;
    const int64_t each = vx_max64(q.s.P * q.s.Q * q.depth, 1);
    q.images = vx_max64(vx_min64(GATHERED / each, q.s.B), 1);
    q.windows = VX_SCRATCH(float, q.images *each);
    q.ordered = VX_SCRATCH(float, vx_max64(w->numel, 1));
    return q;
}

static void order(float *to, const float *from, const call &q, int64_t numel, bool back)
{
    if (numel) VX_LAUNCH(order_kernel, vx_grid(numel, BLOCK), BLOCK, 0, to, from, q.O, q.D, q.s.K * q.s.L, q.E, back);
}

static void gather(const call &q, const float *x, int64_t b, int64_t images, int64_t g)
{
    const int64_t count = images * q.s.P * q.s.Q * q.depth;
    if (count) VX_LAUNCH(gather_kernel, vx_grid(count, BLOCK), BLOCK, 0, q.windows, x, q.s, b, images, g * q.D, q.D);
}

/* Computes y (B,P,Q,O) = x (B,H,W,C) * w (O,D,K,L) + bias (O). */
int vx_cuda_conv2d(vx_tensor *y, vx_tensor *x, vx_tensor *w, vx_tensor *bias, int stride_h, int stride_w, int padding_h,
                   int padding_w, int groups)
{
    const call q = call_of(x, y, w, stride_h, stride_w, padding_h, padding_w, groups);
    order(q.ordered, vx_f32(w), q, w->numel, false);
    for (int64_t b = 0; b < q.s.B; b += q.images)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t images = vx_min64(q.images, q.s.B - b), pixels = q.s.P * q.s.Q;
            gather(q, vx_f32(x), b, images, g);
            const matrix left = {q.windows, 0, q.depth, 1, false},
                         right = {q.ordered + g * q.depth * q.E, 0, q.E, 1, false};
            const matrix c = {vx_f32(y) + b * pixels * q.O + g * q.E, 0, q.O, 1, false};
            vx_gemm(1, images * pixels, q.E, q.depth, 1, left, right, 0, c, bias ? vx_f32(bias) + g * q.E : nullptr);
        }
    return vx_status();
}

/* Computes dx (B,H,W,C) from dy (B,P,Q,O) and w (O,D,K,L). */
int vx_cuda_conv2d_backward_input(vx_tensor *dx, vx_tensor *dy, vx_tensor *w, int stride_h, int stride_w, int padding_h,
                                  int padding_w, int groups)
{
    const call q = call_of(dx, dy, w, stride_h, stride_w, padding_h, padding_w, groups);
    order(q.ordered, vx_f32(w), q, w->numel, false);
    for (int64_t b = 0; b < q.s.B; b += q.images)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t images = vx_min64(q.images, q.s.B - b), pixels = q.s.P * q.s.Q;
            const matrix left = {vx_f32(dy) + b * pixels * q.O + g * q.E, 0, q.O, 1, false};
            const matrix right = {q.ordered + g * q.depth * q.E, 0, 1, q.E, false};
            const matrix c = {q.windows, 0, q.depth, 1, false};
            vx_gemm(1, images * pixels, q.depth, q.E, 1, left, right, 0, c, nullptr);
            const int64_t count = images * q.s.H * q.s.W * q.D;
            if (count)
                VX_LAUNCH(scatter_kernel, vx_grid(count, BLOCK), BLOCK, 0, vx_f32(dx), q.windows, q.s, b, images,
                          g * q.D, q.D);
        }
    return vx_status();
}

/* Computes dw (O,D,K,L) and dbias (O) from x (B,H,W,C) and dy (B,P,Q,O). */
int vx_cuda_conv2d_backward_weight(vx_tensor *dw, vx_tensor *dbias, vx_tensor *x, vx_tensor *dy, int stride_h,
                                   int stride_w, int padding_h, int padding_w, int groups)
{
    const call q = call_of(x, dy, dw, stride_h, stride_w, padding_h, padding_w, groups);
    const int64_t pixels = q.s.P * q.s.Q;
    for (int64_t b = 0; b < q.s.B; b += q.images)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t images = vx_min64(q.images, q.s.B - b);
            gather(q, vx_f32(x), b, images, g);
            const matrix left = {q.windows, 0, 1, q.depth, false};
            const matrix right = {vx_f32(dy) + b * pixels * q.O + g * q.E, 0, q.O, 1, false};
            const matrix c = {q.ordered + g * q.depth * q.E, 0, q.E, 1, false};
            vx_gemm(1, q.depth, q.E, images * pixels, 1, left, right, b ? 1 : 0, c, nullptr);
        }
    if (!q.s.B) VX_CUDA(cudaMemsetAsync(q.ordered, 0, sizeof(float) * (size_t)dw->numel, vx_stream()));
    order(vx_f32(dw), q.ordered, q, dw->numel, true);
    if (dbias) vx_add_rows(vx_f32(dbias), dy, q.s.B * pixels, q.O);
    return vx_status();
}
