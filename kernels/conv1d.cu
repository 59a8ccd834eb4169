/* conv1d.cu: 1-D convolution on CUDA: what conv1d.c computes, by the same products of overlapping rows.
 *
 * cuBLAS takes no overlapping rows. Where a stride's worth of channels makes a product worth its while, the kernel is
 * cut into pieces of `stride` taps, whose rows do not overlap: ceil(K / stride) products, added up. Else (the first
 * layer, with one channel; the positional convolution, with stride 1 and many taps) gemm.cu's own kernel takes all taps
 * at once. Under vx_autocast both round their factors to bf16.
 *
 * The gradient of the weights adds a product per sequence, in their order.
 */
#include "cuda/gemm_tile.cuh"
#include "cuda/reduce_parts.cuh"
#include "shared/conv1d.h"

enum { BLOCK = 256, PIECE = 64 /* fewest numbers of a piece */ };

/* -- Copies -------------------------------------------------------------------------------------------------------- */

/* Copies from (B,N,C) to (B,G,before + N + after,C/G), zeros around. */
VX_KERNEL spread_kernel(float *to, const float *from, int64_t B, int64_t N, int64_t C, int64_t G, int64_t before,
                        int64_t frames)
{
    const int64_t D = C / G;
    for (int64_t i = vx_first(); i < B * frames * C; i += vx_step()) {
        const int64_t c = i % D, n = i / D % frames - before, g = i / (D * frames) % G, b = i / (D * frames * G);
        to[i] = n >= 0 && n < N ? from[(b * N + n) * C + g * D + c] : 0;
    }
}

/* Frames of sequences, group by group: frame i of group g of sequence b is at data + (b groups + g) pitch + i D. */
typedef struct frames {
    float *data;
    int64_t pitch;
    bool copied;
} frames;

/* Takes a place for the frames of x (B,N,C), where they cannot be read as they lie. */
static frames frames_of(const float *x, int64_t B, int64_t N, int64_t C, int64_t G, int64_t before, int64_t after)
{
    if (G == 1 && !before && !after) return {(float *)x, N * C, false};
    const int64_t count = before + N + after;
    return {VX_SCRATCH(float, B *count *C), count * (C / G), true};
}

static void fill_frames(const frames &f, const float *x, int64_t B, int64_t N, int64_t C, int64_t G, int64_t before)
{
    if (f.copied && C)
        VX_LAUNCH(spread_kernel, vx_grid(B * G * f.pitch, BLOCK), BLOCK, 0, f.data, x, B, N, C, G, before,
                  f.pitch / (C / G));
}

/* Orders w (O,D,K) as (G,K,D,E). */
VX_KERNEL forward_weight_kernel(float *to, const float *w, conv1d_sizes q)
{
    for (int64_t i = vx_first(); i < q.O * q.D * q.K; i += vx_step()) {
        const int64_t o = i % q.E, c = i / q.E % q.D, j = i / (q.E * q.D) % q.K, g = i / (q.E * q.D * q.K);
        to[i] = w[((g * q.E + o) * q.D + c) * q.K + j];
    }
}

/* Orders a run's taps of w (O,D,K) as (G,taps,E,count,D), the latest tap first. */
VX_KERNEL run_weight_kernel(float *to, const float *w, conv1d_sizes q, conv1d_run run)
{
    const int64_t columns = run.count * q.D;
    for (int64_t i = vx_first(); i < q.groups * run.taps * q.E * columns; i += vx_step()) {
        const int64_t c = i % q.D, r = i % columns / q.D, o = i / columns % q.E;
        const int64_t u = i / (columns * q.E) % run.taps, g = i / (columns * q.E * run.taps);
        to[i] = w[((g * q.E + o) * q.D + c) * q.K + run.first + r + (run.taps - 1 - u) * q.stride];
    }
}

/* Orders a sum (G,K,D,E) as dw (O,D,K). */
VX_KERNEL weight_gradient_kernel(float *dw, const float *sum, conv1d_sizes q)
{
    for (int64_t i = vx_first(); i < q.O * q.D * q.K; i += vx_step()) {
        const int64_t j = i % q.K, c = i / q.K % q.D, o = i / (q.K * q.D);
        dw[i] = sum[((o / q.E * q.K + j) * q.D + c) * q.E + o % q.E];
    }
}

/* Copies frames `padding` .. padding + L - 1 of (B,frames,C) to dx (B,L,C). */
VX_KERNEL crop_kernel(float *dx, const float *from, conv1d_sizes q)
{
    for (int64_t i = vx_first(); i < q.B * q.L * q.C; i += vx_step()) {
        const int64_t c = i % q.C, l = i / q.C % q.L, b = i / (q.C * q.L);
        dx[i] = from[(b * q.rows * q.stride + l + q.padding) * q.C + c];
    }
}

/* -- Products ------------------------------------------------------------------------------------------------------ */

/* Returns how many of `taps` taps of `channels` numbers a product takes whose rows begin step taps apart. */
static int64_t piece_of(int64_t taps, int64_t step, int64_t channels)
{
    return step * channels >= PIECE || step >= taps ? step : taps;
}

/* Computes c (batch,m,n) = a b + bias in pieces of the taps of `channels` numbers that a's rows hold; those begin step
 * taps apart. b: (batch,taps channels,n). */
static void multiply(matrix c, matrix a, matrix b, int64_t batch, int64_t m, int64_t n, int64_t taps, int64_t step,
                     int64_t channels, const float *bias)
{
    const int64_t piece = piece_of(taps, step, channels);
    for (int64_t first = 0; first == 0 || first < taps; first += piece) {
        matrix left = a, right = b;
        left.data = (float *)a.data + first * channels;
        right.data = (float *)b.data + first * channels * n;
        vx_gemm(batch, m, n, vx_min64(piece, taps - first) * channels, 1, left, right, first ? 1 : 0, c,
                first ? nullptr : bias);
        if (!taps) break;
    }
}

/* Computes y (B,T,O) = x (B,L,C) * w (O,D,K) + bias (O). */
int vx_cuda_conv1d(vx_tensor *y, vx_tensor *x, vx_tensor *w, vx_tensor *bias, int stride, int padding, int groups)
{
    const conv1d_sizes q = conv1d_sizes_of(x, y, w, stride, padding, groups);
    const frames in = frames_of(vx_f32(x), q.B, q.L, q.C, groups, padding, padding);
    float *ordered = VX_SCRATCH(float, w->numel);
    fill_frames(in, vx_f32(x), q.B, q.L, q.C, groups, padding);
    VX_LAUNCH(forward_weight_kernel, vx_grid(w->numel, BLOCK), BLOCK, 0, ordered, vx_f32(w), q);
    for (int64_t g = 0; g < groups; g++) {
        const matrix a = {in.data + g * in.pitch, groups * in.pitch, stride * q.D, 1, false};
        const matrix b = {ordered + g * q.K * q.D * q.E, 0, q.E, 1, false};
        const matrix c = {vx_f32(y) + g * q.E, q.T * q.O, q.O, 1, false};
        multiply(c, a, b, q.B, q.T, q.E, q.K, stride, q.D, bias ? vx_f32(bias) + g * q.E : nullptr);
    }
    return vx_status();
}

/* Computes dx (B,L,C) from dy (B,T,O) and w (O,D,K). */
int vx_cuda_conv1d_backward_input(vx_tensor *dx, vx_tensor *dy, vx_tensor *w, int stride, int padding, int groups)
{
    const conv1d_sizes q = conv1d_sizes_of(dx, dy, w, stride, padding, groups);
    const int64_t before = q.taps - 1, after = q.rows - q.T;
    const bool whole = q.rows * q.stride == q.L; /* so there is no padding */
    const frames out = frames_of(vx_f32(dy), q.B, q.T, q.O, groups, before, after);
    float *ordered = VX_SCRATCH(float, w->numel), *full = vx_f32(dx);
    if (!whole) full = VX_SCRATCH(float, q.B *q.rows *q.stride *q.C);
    fill_frames(out, vx_f32(dy), q.B, q.T, q.O, groups, before);
    for (conv1d_run r = conv1d_run_from(&q, 0); r.first < stride; r = conv1d_run_from(&q, r.first + r.count)) {
        const int64_t columns = r.count * q.D, each = r.taps * q.E * columns;
        VX_LAUNCH(run_weight_kernel, vx_grid(groups * each, BLOCK), BLOCK, 0, ordered, vx_f32(w), q, r);
        for (int64_t g = 0; g < groups; g++) {
            const matrix a = {out.data + g * out.pitch + (q.taps - r.taps) * q.E, groups * out.pitch, q.E, 1, false};
            const matrix b = {ordered + g * each, 0, columns, 1, false};
            const matrix c = {full + r.first * q.C + g * q.D, q.rows * stride * q.C, stride * q.C, 1, false};
            multiply(c, a, b, q.B, q.rows, columns, r.taps, 1, q.E, nullptr);
        }
    }
    if (!whole) VX_LAUNCH(crop_kernel, vx_grid(dx->numel, BLOCK), BLOCK, 0, vx_f32(dx), full, q);
    return vx_status();
}

/* Computes dw (O,D,K) and dbias (O) from x (B,L,C) and dy (B,T,O). */
int vx_cuda_conv1d_backward_weight(vx_tensor *dw, vx_tensor *dbias, vx_tensor *x, vx_tensor *dy, int stride,
                                   int padding, int groups)
{
    const conv1d_sizes q = conv1d_sizes_of(x, dy, dw, stride, padding, groups);
    const frames in = frames_of(vx_f32(x), q.B, q.L, q.C, groups, padding, padding);
    float *sum = VX_SCRATCH(float, dw->numel);
    fill_frames(in, vx_f32(x), q.B, q.L, q.C, groups, padding);
    const int64_t piece = piece_of(q.K, stride, q.D);
    for (int64_t first = 0; first < q.K; first += piece)
        for (int64_t b = 0; b < q.B; b++) {
            const matrix windows = {in.data + b * groups * in.pitch + first * q.D, in.pitch, 1, stride * q.D, false};
            const matrix up = {vx_f32(dy) + b * q.T * q.O, q.E, q.O, 1, false};
            const matrix c = {sum + first * q.D * q.E, q.K * q.D * q.E, q.E, 1, false};
            vx_gemm(groups, vx_min64(piece, q.K - first) * q.D, q.E, q.T, 1, windows, up, b ? 1 : 0, c, nullptr);
        }
    if (!q.B) VX_CUDA(cudaMemsetAsync(sum, 0, sizeof(float) * (size_t)dw->numel, vx_stream()));
    VX_LAUNCH(weight_gradient_kernel, vx_grid(dw->numel, BLOCK), BLOCK, 0, vx_f32(dw), sum, q);
    if (dbias) vx_add_rows(vx_f32(dbias), dy, q.B * q.T, q.O);
    return vx_status();
}
