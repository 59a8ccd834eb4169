/* depthwise_rows.h: a depthwise 3x3 convolution and its gradients, one row of the image at a time. depthwise_conv2d.c
 * makes the ops of them, for whole tensors; sepconv2d.c calls them on rows it has in cache.
 *
 * A vector of channels keeps its nine weights in registers and walks along the row, each pixel loaded once for all
 * outputs it touches: the partial sums of three columns travel along. row[i] is the input row under the i-th row of
 * taps; a row off the image is a row of zeros. C is the distance of two pixels and of two taps, `channels` of which are
 * used. stream: outputs bypass the caches (vf_streams).
 */
#ifndef VX_DEPTHWISE_H
#define VX_DEPTHWISE_H

#include "cpu.h"
#include "simd.h"

enum {
    AHEAD = 8 /* pixels to prefetch: a step of C floats soon leaves the page, where the hardware's prefetch ends */
};

/* -- Stride 1: forward, and the gradient of x ---------------------------------------------------------------------- */

#if VX_LANES == 16
#define BAND 4 /* output rows at once: 9 weights, 8 partial sums, 6 pixels in 32 registers */
#else
#define BAND 2
#endif

/* Computes T output rows of width W, n channels; row[0 .. T + 1] are the input rows around them (zeros off the image).
 * The pixel at column j ends output j - 1, continues output j and begins output j + 1. */
VX_INLINE void depthwise_walk(const int T, int n, float *y, const float *const *row, const float *w, const float *bias,
                              int64_t W, int64_t C, int flip, int stream)
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

/* Computes y (rows,W,C), rows <= BAND, from the rows + 2 rows around them. flip turns w by 180 degrees: the gradient of
 * x. */
static inline void depthwise_band(int rows, float *y, const float *const *row, const float *w, const float *bias,
                                  int64_t W, int64_t channels, int64_t C, int flip, int stream)
{
    for (int64_t c = 0; c < channels; c += VX_LANES) {
        const int n = (int)vx_min64(VX_LANES, channels - c);
        const float *at[BAND + 2], *b = bias ? bias + c : 0;
        for (int t = 0; t < rows + 2; t++) at[t] = row[t] + c;
        if (rows == BAND && stream) depthwise_walk(BAND, VX_LANES, y + c, at, w + c, b, W, C, flip, 1);
        else if (rows == BAND && n == VX_LANES) depthwise_walk(BAND, VX_LANES, y + c, at, w + c, b, W, C, flip, 0);
        else
            for (int t = 0; t < rows; t++) {
                if (n == VX_LANES) depthwise_walk(1, VX_LANES, y + t * W * C + c, at + t, w + c, b, W, C, flip, 0);
                else depthwise_walk(1, n, y + t * W * C + c, at + t, w + c, b, W, C, flip, 0);
            }
    }
}

/* -- Stride 2 ------------------------------------------------------------------------------------------------------ */

/* Computes one output row of Q pixels, n channels. Columns 2q - 1, 2q, 2q + 1 meet the three taps; the last serves the
 * next pixel as its first. */
VX_INLINE void depthwise_walk2(int n, float *y, const float *const *row, const float *w, const float *bias, int64_t W,
                               int64_t Q, int64_t C, int stream)
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

/* Computes one output row of Q pixels. */
static inline void depthwise_row2(float *y, const float *const *row, const float *w, const float *bias, int64_t W,
                                  int64_t Q, int64_t channels, int64_t C, int stream)
{
    for (int64_t c = 0; c < channels; c += VX_LANES) {
        const float *at[3] = {row[0] + c, row[1] + c, row[2] + c}, *b = bias ? bias + c : 0;
        if (stream) depthwise_walk2(VX_LANES, y + c, at, w + c, b, W, Q, C, 1);
        else if (c + VX_LANES <= channels) depthwise_walk2(VX_LANES, y + c, at, w + c, b, W, Q, C, 0);
        else depthwise_walk2((int)(channels - c), y + c, at, w + c, b, W, Q, C, 0);
    }
}

/* Computes rows 2p and 2p + 1 of dx, n channels, from rows p and p + 1 of dy (the second a row of zeros below the
 * image; dx's second row may be off the image, NULL then). An even row or column meets the middle tap only, an odd one
 * the outer two. */
VX_INLINE void depthwise_walk2_input(int n, float *even, float *odd, const float *dy, const float *below,
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

/* Computes rows 2p and 2p + 1 of dx. */
static inline void depthwise_input2(float *even, float *odd, const float *dy, const float *below, const float *w,
                                    int64_t W, int64_t Q, int64_t channels, int64_t C, int stream)
{
    for (int64_t c = 0; c < channels; c += VX_LANES) {
        float *second = odd ? odd + c : 0;
        if (stream) depthwise_walk2_input(VX_LANES, even + c, second, dy + c, below + c, w + c, W, Q, C, 1);
        else if (c + VX_LANES <= channels)
            depthwise_walk2_input(VX_LANES, even + c, second, dy + c, below + c, w + c, W, Q, C, 0);
        else depthwise_walk2_input((int)(channels - c), even + c, second, dy + c, below + c, w + c, W, Q, C, 0);
    }
}

/* -- Gradient of the weights --------------------------------------------------------------------------------------- */

/* Adds one row of dy against its three rows of x, n channels, to sum[0 .. 8] (taps) and sum[9] (bias), C apart. */
VX_INLINE void depthwise_walk_weight(int n, float *sum, const float *const *row, const float *dy, int64_t W, int64_t Q,
                                     int64_t C)
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

VX_INLINE void depthwise_walk2_weight(int n, float *sum, const float *const *row, const float *dy, int64_t W, int64_t Q,
                                      int64_t C)
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
            if (right)
                left[i] = vf_load_upto(row[i] + (2 * q + 1) * C, n), k[3 * i + 2] = vf_fma(left[i], g, k[3 * i + 2]);
        }
        k[9] += g;
    }
#pragma GCC unroll 10
    for (int i = 0; i < 10; i++) vf_store_upto(sum + i * C, vf_load_upto(sum + i * C, n) + k[i], n);
}

/* Adds one row of dy against its three rows of x to sum (10,C), stride 1 or 2. */
static inline void depthwise_weight_row(float *sum, const float *const *row, const float *dy, int64_t W, int64_t Q,
                                        int64_t channels, int64_t C, int stride)
{
    for (int64_t c = 0; c < channels; c += VX_LANES) {
        const float *at[3] = {row[0] + c, row[1] + c, row[2] + c};
        const int n = (int)vx_min64(VX_LANES, channels - c);
        if (n == VX_LANES && stride == 1) depthwise_walk_weight(VX_LANES, sum + c, at, dy + c, W, Q, C);
        else if (n == VX_LANES) depthwise_walk2_weight(VX_LANES, sum + c, at, dy + c, W, Q, C);
        else if (stride == 1) depthwise_walk_weight(n, sum + c, at, dy + c, W, Q, C);
        else depthwise_walk2_weight(n, sum + c, at, dy + c, W, Q, C);
    }
}

#endif
