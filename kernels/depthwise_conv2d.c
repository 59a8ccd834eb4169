/* depthwise_conv2d.c: depthwise 3x3 convolution, stride 1 or 2, zero padding 1, and its two gradients.
 *
 *   y[p][q][c]  = bias[c] + sum_ij x[p s + i - 1][q s + j - 1][c] w[i][j][c]
 *   dx          = the same sum read backwards: with stride 1 the forward pass with w turned by 180 degrees,
 *                 with stride 2 four different sums for the four pixels under an output pixel
 *   dw[i][j][c] = sum_pq x[p s + i - 1][q s + j - 1][c] dy[p][q][c],  dbias[c] = sum_pq dy[p][q][c]
 *
 * 9 multiply-adds per element against 8 bytes of memory: bound by the bandwidth of wherever x and y lie. So each line
 * of x is fetched once: a thread owns a band of rows, which it walks along several output rows at a time
 * (cpu/depthwise_rows.h). The gradient of w is a reduction: the rows are cut into parts by size alone, each summed in
 * order.
 */
#include "cpu/depthwise_rows.h"
#include "cpu/scratch.h"

enum {
    SERIAL_BELOW = 20000, /* multiply-adds that are not worth waking a thread for */
    PARTS = 64,           /* most parts of the weight gradient */
};

/* -- Stride 1: forward, and the gradient of x ---------------------------------------------------------------------- */

/* Computes y (B,H,W,C) with stride 1; flip: with w turned by 180 degrees, the gradient of x. */
static int stride1(const char *op, float *y, const float *x, const float *w, const float *bias, int64_t B, int64_t H,
                   int64_t W, int64_t C, int flip)
{
    float *zeros = vx_scratch(op, sizeof(float) * (size_t)(W * C));
    if (!zeros) return VX_ENOMEM;
    memset(zeros, 0, sizeof(float) * (size_t)(W * C));
    const int64_t bands = vx_ceil_div(H, BAND);
    const int stream = vf_streams(y, B * H * W * C, C);
#pragma omp parallel for schedule(static) if (9 * B * H * W * C > SERIAL_BELOW)
    for (int64_t task = 0; task < B * bands; task++) {
        const int64_t image = task / bands, h = task % bands * BAND;
        const int rows = (int)vx_min64(BAND, H - h);
        const float *row[BAND + 2];
        for (int t = 0; t < rows + 2; t++) {
            const int64_t from = h + t - 1;
            row[t] = from < 0 || from >= H ? zeros : x + (image * H + from) * W * C;
        }
        depthwise_band(rows, y + (image * H + h) * W * C, row, w, bias, W, C, C, flip, stream);
        if (stream) vf_stream_end();
    }
    vx_scratch_free(zeros);
    return VX_OK;
}

/* -- Stride 2 ------------------------------------------------------------------------------------------------------ */

/* Computes y (B,P,Q,C) with stride 2. */
static int stride2(float *y, const float *x, const float *w, const float *bias, int64_t B, int64_t H, int64_t W,
                   int64_t C)
{
    const int64_t P = (H + 1) / 2, Q = (W + 1) / 2;
    float *zeros = vx_scratch("depthwise_conv2d", sizeof(float) * (size_t)(W * C));
    if (!zeros) return VX_ENOMEM;
    memset(zeros, 0, sizeof(float) * (size_t)(W * C));
    const int stream = vf_streams(y, B * P * Q * C, C);
#pragma omp parallel for schedule(static) if (9 * B * P * Q * C > SERIAL_BELOW)
    for (int64_t task = 0; task < B * P; task++) {
        const int64_t image = task / P, p = task % P;
        const float *row[3];
        for (int i = 0; i < 3; i++) {
            const int64_t from = 2 * p + i - 1;
            row[i] = from < 0 || from >= H ? zeros : x + (image * H + from) * W * C;
        }
        depthwise_row2(y + task * Q * C, row, w, bias, W, Q, C, C, stream);
        if (stream) vf_stream_end();
    }
    vx_scratch_free(zeros);
    return VX_OK;
}

/* Computes dx (B,H,W,C) with stride 2. */
static int stride2_input(float *dx, const float *dy, const float *w, int64_t B, int64_t H, int64_t W, int64_t C)
{
    const int64_t P = (H + 1) / 2, Q = (W + 1) / 2;
    float *zeros = vx_scratch("depthwise_conv2d_backward_input", sizeof(float) * (size_t)(Q * C));
    if (!zeros) return VX_ENOMEM;
    memset(zeros, 0, sizeof(float) * (size_t)(Q * C));
    const int stream = vf_streams(dx, B * H * W * C, C);
#pragma omp parallel for schedule(static) if (9 * B * P * Q * C > SERIAL_BELOW)
    for (int64_t task = 0; task < B * P; task++) {
        const int64_t image = task / P, p = task % P;
        const float *row = dy + task * Q * C, *below = p + 1 < P ? row + Q * C : zeros;
        float *even = dx + (image * H + 2 * p) * W * C, *odd = 2 * p + 1 < H ? even + W * C : 0;
        depthwise_input2(even, odd, row, below, w, W, Q, C, C, stream);
        if (stream) vf_stream_end();
    }
    vx_scratch_free(zeros);
    return VX_OK;
}

/* -- Gradient of the weights --------------------------------------------------------------------------------------- */

/* Computes dw (3,3,C) and dbias (C) from x (B,H,W,C) and dy (B,P,Q,C). */
int VX_CPU(depthwise_conv2d_backward_weight)(vx_tensor *dw, vx_tensor *dbias, vx_tensor *x, vx_tensor *dy, int stride)
{
    const int64_t B = x->shape[0], H = x->shape[1], W = x->shape[2], C = x->shape[3], P = dy->shape[1],
                  Q = dy->shape[2];
    const int64_t rows = B * P, parts = vx_max64(vx_min64(rows, PARTS), 1);
    const float *in = vx_f32(x), *grad = vx_f32(dy);
    float *zeros = 0, *partial = 0;
    scratch memory = {.op = "depthwise_conv2d_backward_weight"};
    while (scratch_pass(&memory)) {
        zeros = carve_f32(&memory, W * C);
        partial = carve_f32(&memory, parts * 10 * C);
    }
    if (!memory.base) return VX_ENOMEM;
    memset(zeros, 0, sizeof(float) * (size_t)(W * C));
    memset(partial, 0, sizeof(float) * (size_t)(parts * 10 * C));
#pragma omp parallel for schedule(static) if (9 * rows * Q * C > SERIAL_BELOW)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t r = part * rows / parts; r < (part + 1) * rows / parts && Q > 0; r++) {
            const int64_t image = r / P, p = r % P;
            const float *row[3];
            for (int i = 0; i < 3; i++) {
                const int64_t from = stride * p + i - 1;
                row[i] = from < 0 || from >= H ? zeros : in + (image * H + from) * W * C;
            }
            depthwise_weight_row(partial + part * 10 * C, row, grad + r * Q * C, W, Q, C, C, stride);
        }
    for (int64_t part = 1; part < parts; part++)
        for (int64_t i = 0; i < 10 * C; i++) partial[i] += partial[part * 10 * C + i];
    memcpy(vx_f32(dw), partial, sizeof(float) * (size_t)(9 * C));
    if (dbias) memcpy(vx_f32(dbias), partial + 9 * C, sizeof(float) * (size_t)C);
    scratch_free(&memory);
    return VX_OK;
}

/* -- The other two ops --------------------------------------------------------------------------------------------- */

/* Computes y (B,P,Q,C) from x (B,H,W,C), w (3,3,C), bias (C). */
int VX_CPU(depthwise_conv2d)(vx_tensor *y, vx_tensor *x, vx_tensor *w, vx_tensor *bias, int stride)
{
    const int64_t B = x->shape[0], H = x->shape[1], W = x->shape[2], C = x->shape[3];
    if (!y->numel) return VX_OK;
    if (stride == 2) return stride2(vx_f32(y), vx_f32(x), vx_f32(w), vx_f32(bias), B, H, W, C);
    return stride1("depthwise_conv2d", vx_f32(y), vx_f32(x), vx_f32(w), vx_f32(bias), B, H, W, C, 0);
}

/* Computes dx (B,H,W,C) from dy (B,P,Q,C) and w (3,3,C). */
int VX_CPU(depthwise_conv2d_backward_input)(vx_tensor *dx, vx_tensor *dy, vx_tensor *w, int stride)
{
    const int64_t B = dx->shape[0], H = dx->shape[1], W = dx->shape[2], C = dx->shape[3];
    if (!dx->numel) return VX_OK;
    if (stride == 2) return stride2_input(vx_f32(dx), vx_f32(dy), vx_f32(w), B, H, W, C);
    return stride1("depthwise_conv2d_backward_input", vx_f32(dx), vx_f32(dy), vx_f32(w), 0, B, H, W, C, 1);
}
