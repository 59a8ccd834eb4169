/* depthwise.c: depthwise 3x3 convolution, stride 1 or 2, zero padding 1, and its two gradients.
 *
 *   y[p][q][c]  = bias[c] + sum_ij x[p s + i - 1][q s + j - 1][c] w[i][j][c]
 *   dx          = the same sum read backwards: with stride 1 the forward pass with w turned by 180 degrees, with stride 2
 *                 four different sums for the four pixels under an output pixel
 *   dw[i][j][c] = sum_pq x[p s + i - 1][q s + j - 1][c] dy[p][q][c],  dbias[c] = sum_pq dy[p][q][c]
 *
 * 9 multiply-adds per element against 8 bytes of memory: bound by the bandwidth of wherever x and y lie. So each line of x
 * is fetched once: a thread owns a band of rows, a vector of channels keeps its nine weights in registers and walks along
 * the row, several output rows at a time, each pixel loaded once for all outputs it touches (partial sums of three columns
 * travel along). The gradient of w is a reduction: the rows are cut into parts by size alone, each summed in order.
 */
#include "cpu.h"
#include "vec.h"

enum {
    SERIAL_BELOW = 20000, /* multiply-adds that are not worth waking a thread for */
    PARTS = 64,           /* most parts of the weight gradient */
    AHEAD = 8,            /* pixels to prefetch: a step of C floats soon leaves the page, where the hardware's prefetch ends */
};

/* -- Stride 1: forward, and the gradient of x ---------------------------------------------------------------------------- */

#if VX_LANES == 16
#define BAND 4 /* output rows at once: 9 weights, 8 partial sums, 6 pixels in 32 registers */
#else
#define BAND 2
#endif

/* T output rows of width W, n channels; row[0 .. T + 1] are the input rows around them (a row of zeros off the image). The
 * pixel at column j ends output j - 1, continues output j and begins output j + 1. */
static inline __attribute__((always_inline)) void walk(const int T, int n, float *y, const float *const *row, const float *w,
                                                       const float *bias, int64_t W, int64_t C, int flip, int stream)
{
    vf k[9], first[BAND], second[BAND], start = bias ? vf_load_upto(bias, n) : vf_zero();
#pragma GCC unroll 9
    for (int i = 0; i < 9; i++) k[i] = vf_load_upto(w + (flip ? 8 - i : i) * C, n);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) first[t] = vf_zero(), second[t] = start;
    for (int64_t j = 0; j < W; j++) {
        vf x[BAND + 2];
#pragma GCC unroll 6
        for (int t = 0; t < T + 2; t++) x[t] = vf_load_upto(row[t] + j * C, n);
#pragma GCC unroll 4
        for (int t = 2; t < T + 2; t++) __builtin_prefetch(row[t] + (j + AHEAD) * C);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            vf done = vf_fma(x[t + 2], k[8], vf_fma(x[t + 1], k[5], vf_fma(x[t], k[2], first[t])));
            first[t] = vf_fma(x[t + 2], k[7], vf_fma(x[t + 1], k[4], vf_fma(x[t], k[1], second[t])));
            second[t] = vf_fma(x[t + 2], k[6], vf_fma(x[t + 1], k[3], vf_fma(x[t], k[0], start)));
            if (j) vf_put(y + (t * W + j - 1) * C, done, n, stream);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) vf_put(y + (t * W + W - 1) * C, first[t], n, stream);
}

static void band(int rows, float *y, const float *const *row, const float *w, const float *bias, int64_t W, int64_t C, int flip,
                 int stream)
{
    for (int64_t c = 0; c < C; c += VX_LANES) {
        const int n = (int)vx_min64(VX_LANES, C - c);
        const float *at[BAND + 2], *b = bias ? bias + c : 0;
        for (int t = 0; t < rows + 2; t++) at[t] = row[t] + c;
        if (rows == BAND && stream) walk(BAND, VX_LANES, y + c, at, w + c, b, W, C, flip, 1);
        else if (rows == BAND && n == VX_LANES) walk(BAND, VX_LANES, y + c, at, w + c, b, W, C, flip, 0);
        else
            for (int t = 0; t < rows; t++) {
                if (n == VX_LANES) walk(1, VX_LANES, y + t * W * C + c, at + t, w + c, b, W, C, flip, 0);
                else walk(1, n, y + t * W * C + c, at + t, w + c, b, W, C, flip, 0);
            }
    }
}

static int stride1(const char *op, float *y, const float *x, const float *w, const float *bias, int64_t B, int64_t H, int64_t W,
                   int64_t C, int flip)
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
        band(rows, y + (image * H + h) * W * C, row, w, bias, W, C, flip, stream);
        if (stream) vf_stream_end();
    }
    vx_scratch_free(zeros);
    return VX_OK;
}

/* -- Stride 2 -------------------------------------------------------------------------------------------------------------- */

/* One output row of Q pixels. Columns 2q - 1, 2q, 2q + 1 meet the three taps; the last serves the next pixel as its first. */
static inline __attribute__((always_inline)) void walk2(int n, float *y, const float *const *row, const float *w, const float *bias,
                                                        int64_t W, int64_t Q, int64_t C, int stream)
{
    vf k[9], left[3], start = bias ? vf_load_upto(bias, n) : vf_zero();
#pragma GCC unroll 9
    for (int i = 0; i < 9; i++) k[i] = vf_load_upto(w + i * C, n);
    for (int i = 0; i < 3; i++) left[i] = vf_zero();
    for (int64_t q = 0; q < Q; q++) {
        vf even = start, odd = vf_zero();
#pragma GCC unroll 3
        for (int i = 0; i < 3; i++) {
            even = vf_fma(left[i], k[3 * i], even);
            odd = vf_fma(vf_load_upto(row[i] + 2 * q * C, n), k[3 * i + 1], odd);
        }
        if (2 * q + 1 < W)
#pragma GCC unroll 3
            for (int i = 0; i < 3; i++) {
                left[i] = vf_load_upto(row[i] + (2 * q + 1) * C, n);
                odd = vf_fma(left[i], k[3 * i + 2], odd);
            }
        vf_put(y + q * C, even + odd, n, stream);
    }
}

static int stride2(float *y, const float *x, const float *w, const float *bias, int64_t B, int64_t H, int64_t W, int64_t C)
{
    const int64_t P = (H + 1) / 2, Q = (W + 1) / 2;
    float *zeros = vx_scratch("depthwise3x3", sizeof(float) * (size_t)(W * C));
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
        for (int64_t c = 0; c < C; c += VX_LANES) {
            const float *at[3] = {row[0] + c, row[1] + c, row[2] + c}, *b = bias ? bias + c : 0;
            float *out = y + task * Q * C + c;
            if (stream) walk2(VX_LANES, out, at, w + c, b, W, Q, C, 1);
            else if (c + VX_LANES <= C) walk2(VX_LANES, out, at, w + c, b, W, Q, C, 0);
            else walk2((int)(C - c), out, at, w + c, b, W, Q, C, 0);
        }
        if (stream) vf_stream_end();
    }
    vx_scratch_free(zeros);
    return VX_OK;
}

/* Rows 2p and 2p + 1 of dx from rows p and p + 1 of dy (the second a row of zeros below the image; dx's second row may be off
 * the image, NULL then). An even row or column meets the middle tap only, an odd one the outer two. */
static inline __attribute__((always_inline)) void walk2_input(int n, float *even, float *odd, const float *dy, const float *below,
                                                              const float *w, int64_t W, int64_t Q, int64_t C, int stream)
{
    vf k[9];
#pragma GCC unroll 9
    for (int i = 0; i < 9; i++) k[i] = vf_load_upto(w + i * C, n);
    vf a = vf_load_upto(dy, n), b = vf_load_upto(below, n);
    for (int64_t q = 0; q < Q; q++) {
        vf a1 = vf_zero(), b1 = vf_zero();
        if (q + 1 < Q) a1 = vf_load_upto(dy + (q + 1) * C, n), b1 = vf_load_upto(below + (q + 1) * C, n);
        vf_put(even + 2 * q * C, a * k[4], n, stream);
        if (odd) vf_put(odd + 2 * q * C, vf_fma(a, k[7], b * k[1]), n, stream);
        if (2 * q + 1 < W) {
            vf_put(even + (2 * q + 1) * C, vf_fma(a, k[5], a1 * k[3]), n, stream);
            if (odd) vf_put(odd + (2 * q + 1) * C, vf_fma(a, k[8], a1 * k[6]) + vf_fma(b, k[2], b1 * k[0]), n, stream);
        }
        a = a1, b = b1;
    }
}

static int stride2_input(float *dx, const float *dy, const float *w, int64_t B, int64_t H, int64_t W, int64_t C)
{
    const int64_t P = (H + 1) / 2, Q = (W + 1) / 2;
    float *zeros = vx_scratch("depthwise3x3_backward_input", sizeof(float) * (size_t)(Q * C));
    if (!zeros) return VX_ENOMEM;
    memset(zeros, 0, sizeof(float) * (size_t)(Q * C));
    const int stream = vf_streams(dx, B * H * W * C, C);
#pragma omp parallel for schedule(static) if (9 * B * P * Q * C > SERIAL_BELOW)
    for (int64_t task = 0; task < B * P; task++) {
        const int64_t image = task / P, p = task % P;
        const float *row = dy + task * Q * C, *below = p + 1 < P ? row + Q * C : zeros;
        float *even = dx + (image * H + 2 * p) * W * C, *odd = 2 * p + 1 < H ? even + W * C : 0;
        for (int64_t c = 0; c < C; c += VX_LANES) {
            float *second = odd ? odd + c : 0;
            if (stream) walk2_input(VX_LANES, even + c, second, row + c, below + c, w + c, W, Q, C, 1);
            else if (c + VX_LANES <= C) walk2_input(VX_LANES, even + c, second, row + c, below + c, w + c, W, Q, C, 0);
            else walk2_input((int)(C - c), even + c, second, row + c, below + c, w + c, W, Q, C, 0);
        }
        if (stream) vf_stream_end();
    }
    vx_scratch_free(zeros);
    return VX_OK;
}

/* -- Gradient of the weights ----------------------------------------------------------------------------------------------- */

/* Adds one row of dy against its three rows of x to sum[0 .. 8] (taps) and sum[9] (bias), C apart. */
static inline __attribute__((always_inline)) void walk_weight(int n, float *sum, const float *const *row, const float *dy, int64_t W,
                                                              int64_t Q, int64_t C)
{
    vf k[10];
#pragma GCC unroll 10
    for (int i = 0; i < 10; i++) k[i] = vf_zero();
    vf before = vf_zero(), now = vf_load_upto(dy, n);
    for (int64_t j = 0; j < W; j++) {
        /* x's column j is the right neighbour of output j - 1, the centre of j, the left neighbour of j + 1 */
        vf next = j + 1 < Q ? vf_load_upto(dy + (j + 1) * C, n) : vf_zero();
#pragma GCC unroll 3
        for (int i = 0; i < 3; i++) {
            vf x = vf_load_upto(row[i] + j * C, n);
            if (i == 2) __builtin_prefetch(row[2] + (j + AHEAD) * C), __builtin_prefetch(dy + (j + AHEAD) * C);
            k[3 * i] = vf_fma(x, next, k[3 * i]);
            k[3 * i + 1] = vf_fma(x, now, k[3 * i + 1]);
            k[3 * i + 2] = vf_fma(x, before, k[3 * i + 2]);
        }
        k[9] += now;
        before = now, now = next;
    }
#pragma GCC unroll 10
    for (int i = 0; i < 10; i++) vf_store_upto(sum + i * C, vf_load_upto(sum + i * C, n) + k[i], n);
}

static inline __attribute__((always_inline)) void walk2_weight(int n, float *sum, const float *const *row, const float *dy, int64_t W,
                                                               int64_t Q, int64_t C)
{
    vf k[10], left[3];
#pragma GCC unroll 10
    for (int i = 0; i < 10; i++) k[i] = vf_zero();
    for (int i = 0; i < 3; i++) left[i] = vf_zero();
    for (int64_t q = 0; q < Q; q++) {
        const vf g = vf_load_upto(dy + q * C, n);
        const int right = 2 * q + 1 < W;
#pragma GCC unroll 3
        for (int i = 0; i < 3; i++) {
            k[3 * i] = vf_fma(left[i], g, k[3 * i]);
            k[3 * i + 1] = vf_fma(vf_load_upto(row[i] + 2 * q * C, n), g, k[3 * i + 1]);
            if (right) left[i] = vf_load_upto(row[i] + (2 * q + 1) * C, n), k[3 * i + 2] = vf_fma(left[i], g, k[3 * i + 2]);
        }
        k[9] += g;
    }
#pragma GCC unroll 10
    for (int i = 0; i < 10; i++) vf_store_upto(sum + i * C, vf_load_upto(sum + i * C, n) + k[i], n);
}

static inline __attribute__((always_inline)) void walk_weight_any(int stride, int n, float *sum, const float *const *row,
                                                                  const float *dy, int64_t W, int64_t Q, int64_t C)
{
    if (stride == 1) walk_weight(n, sum, row, dy, W, Q, C);
    else walk2_weight(n, sum, row, dy, W, Q, C);
}

int VX_CPU(depthwise3x3_backward_weight)(vx_tensor *dw, vx_tensor *dbias, vx_tensor *x, vx_tensor *dy, int stride)
{
    const int64_t B = x->shape[0], H = x->shape[1], W = x->shape[2], C = x->shape[3], P = dy->shape[1], Q = dy->shape[2];
    const int64_t rows = B * P, parts = vx_max64(vx_min64(rows, PARTS), 1);
    const float *in = vx_f32(x), *grad = vx_f32(dy);
    float *zeros = vx_scratch("depthwise3x3_backward_weight", sizeof(float) * (size_t)((W + parts * 10) * C)), *partial;
    if (!zeros) return VX_ENOMEM;
    partial = zeros + W * C;
    memset(zeros, 0, sizeof(float) * (size_t)((W + parts * 10) * C));
#pragma omp parallel for schedule(static) if (9 * rows * Q * C > SERIAL_BELOW)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t r = part * rows / parts; r < (part + 1) * rows / parts && Q > 0; r++) {
            const int64_t image = r / P, p = r % P;
            const float *row[3];
            for (int i = 0; i < 3; i++) {
                const int64_t from = stride * p + i - 1;
                row[i] = from < 0 || from >= H ? zeros : in + (image * H + from) * W * C;
            }
            for (int64_t c = 0; c < C; c += VX_LANES) {
                const float *at[3] = {row[0] + c, row[1] + c, row[2] + c}, *g = grad + r * Q * C + c;
                float *sum = partial + part * 10 * C + c;
                if (c + VX_LANES <= C) walk_weight_any(stride, VX_LANES, sum, at, g, W, Q, C);
                else walk_weight_any(stride, (int)(C - c), sum, at, g, W, Q, C);
            }
        }
    for (int64_t part = 1; part < parts; part++)
        for (int64_t i = 0; i < 10 * C; i++) partial[i] += partial[part * 10 * C + i];
    memcpy(vx_f32(dw), partial, sizeof(float) * (size_t)(9 * C));
    if (dbias) memcpy(vx_f32(dbias), partial + 9 * C, sizeof(float) * (size_t)C);
    vx_scratch_free(zeros);
    return VX_OK;
}

/* -- The other two ops ----------------------------------------------------------------------------------------------------- */

int VX_CPU(depthwise3x3)(vx_tensor *y, vx_tensor *x, vx_tensor *w, vx_tensor *bias, int stride)
{
    const int64_t B = x->shape[0], H = x->shape[1], W = x->shape[2], C = x->shape[3];
    if (!y->numel) return VX_OK;
    if (stride == 2) return stride2(vx_f32(y), vx_f32(x), vx_f32(w), vx_f32(bias), B, H, W, C);
    return stride1("depthwise3x3", vx_f32(y), vx_f32(x), vx_f32(w), vx_f32(bias), B, H, W, C, 0);
}

int VX_CPU(depthwise3x3_backward_input)(vx_tensor *dx, vx_tensor *dy, vx_tensor *w, int stride)
{
    const int64_t B = dx->shape[0], H = dx->shape[1], W = dx->shape[2], C = dx->shape[3];
    if (!dx->numel) return VX_OK;
    if (stride == 2) return stride2_input(vx_f32(dx), vx_f32(dy), vx_f32(w), B, H, W, C);
    return stride1("depthwise3x3_backward_input", vx_f32(dx), vx_f32(dy), vx_f32(w), 0, B, H, W, C, 1);
}
