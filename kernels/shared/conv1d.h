/* conv1d.h: the sizes of a 1-D convolution, and how its input's gradient falls apart into products; for C and CUDA
 * alike.
 *
 * The input's gradient, in frames l of the padded input, with stride s and kernel K:
 *
 *     dx[q s + r] = sum_i dy[q - i] w[r + i s]        r < s: the phase of a frame; i < taps(r) = ceil((K - r) / s)
 *
 * So each phase is a convolution of dy, of stride 1, with every s-th tap. Phases r < K mod s have one tap more than the
 * others; a run of phases with the same number of taps lies side by side in dx, and is one product.
 */
#ifndef VX_CONV1D_H
#define VX_CONV1D_H

#include "core/backend.h"
#include "shared/common.h"

typedef struct conv1d_sizes {
    int64_t B, L, C; /* x (B,L,C) */
    int64_t T, O;    /* y (B,T,O) */
    int64_t K, stride, padding, groups;
    int64_t D, E;  /* channels of x and of y in a group */
    int64_t width; /* L and the padding: frames that windows lie in */
    int64_t rows;  /* frames of padded x over the stride, rounded up: the rows of dx */
    int64_t taps;  /* most taps of a phase */
} conv1d_sizes;

/* Returns the sizes of a call: x (B,L,C), y (B,T,O), w (O,D,K). */
static inline conv1d_sizes conv1d_sizes_of(const vx_tensor *x, const vx_tensor *y, const vx_tensor *w, int stride,
                                           int padding, int groups)
{
    conv1d_sizes q;
    q.B = x->shape[0], q.L = x->shape[1], q.C = x->shape[2], q.T = y->shape[1], q.O = y->shape[2];
    q.K = w->shape[2], q.stride = stride, q.padding = padding, q.groups = groups;
    q.D = q.C / groups, q.E = q.O / groups;
    q.width = q.L + 2 * q.padding;
    q.rows = vx_ceil_div(q.width, q.stride);
    q.taps = vx_ceil_div(q.K, q.stride);
    return q;
}

/* Phases first .. first + count - 1, which have `taps` taps each. */
typedef struct conv1d_run {
    int64_t first, count, taps;
} conv1d_run;

/* Returns the run that begins with phase `first`: for (r = run(0); r.first < stride; r = run(r.first + r.count)). With
 * groups the channels of two frames do not lie side by side, and every phase is alone. */
static inline conv1d_run conv1d_run_from(const conv1d_sizes *q, int64_t first)
{
    const int64_t longer = q->K % q->stride, end = first < longer ? longer : q->stride;
    const conv1d_run run = {first, q->groups == 1 ? end - first : 1, q->K / q->stride + (first < longer)};
    return run;
}

#endif
