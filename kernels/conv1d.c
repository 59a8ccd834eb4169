/* conv1d.c: 1-D convolution of sequences, channels last, with stride, zero padding and groups, and its gradients.
 *
 *   y[t][o]     = bias[o] + sum_{j,c} x[t s + j - p][c] w[o][c][j]
 *   dx          : every s-th tap of w, turned round, over dy (shared/conv1d.h)
 *   dw[o][c][j] = sum_t dy[t][o] x[t s + j - p][c]
 *
 * No im2col: the K C numbers that meet the kernel at one place are contiguous, and the next window begins s C further
 * on. So a convolution is one matrix product whose left factor has overlapping rows, and gemm.c's tile reads it where
 * it lies. Where there is padding, or several groups, the input is copied once, margins of zeros around it and the
 * groups one after another: (B,G,p + L + p,C/G). 2 K C O / G flops a frame against 4 (s C + O) bytes: bound by
 * arithmetic but for the first layer of a stack, where C is 1.
 *
 * Weights (O,C/G,K), as PyTorch has them, are packed once a call as the right factor, GEMM_COLUMNS of it at a time.
 * The sum over B T windows in dw is cut into parts by size alone; parts are added in order.
 */
#include <omp.h>

#include "cpu/add_rows.h"
#include "cpu/gemm_tile.h"
#include "cpu/scratch.h"
#include "shared/conv1d.h"

enum {
    SERIAL_BELOW = 20000,   /* multiply-adds that are not worth waking a thread for */
    BLOCK_ROWS = 192,       /* windows of a task */
    BLOCK_DEPTH = 512,      /* numbers of a window multiplied at a time */
    BLOCK_WINDOWS = 64,     /* windows added to dw at a time: they and their dy stay in L1 */
    BLOCK_LEFT = 96,        /* numbers of them that are packed at a time */
    CROWDED = 256,          /* rows a multiple of so many floats apart share few sets of L1 */
    PARTS = 64,             /* most parts of dw */
    PART_WINDOWS = 256,     /* fewest windows of a part */
    PARTS_FLOATS = 4 << 20, /* most scratch for them: 16 MiB, if one part fits */
};

/* Returns columns, rounded up to whole vectors. */
static int64_t padded(int64_t columns) { return vx_ceil_div(columns, VX_LANES) * VX_LANES; }

/* -- Operands ------------------------------------------------------------------------------------------------------ */

/* Frames of a sequence, group by group: frame i of group g of sequence b is at data + (b groups + g) pitch + i D. */
typedef struct frames {
    const float *data;
    int64_t pitch;
} frames;

/* Copies from (B,N,C) to (B,G,before + N + after,C/G), zeros around. */
static void spread(float *to, const float *from, int64_t B, int64_t N, int64_t C, int64_t G, int64_t before,
                   int64_t after)
{
    const int64_t D = C / G, pitch = (before + N + after) * D;
#pragma omp parallel for schedule(static) if (B * N * C > SERIAL_BELOW)
    for (int64_t i = 0; i < B * G; i++) {
        const float *in = from + i / G * N * C + i % G * D;
        float *out = to + i * pitch;
        memset(out, 0, sizeof(float) * (size_t)(before * D));
        out += before * D;
        for (int64_t n = 0; n < N; n++) memcpy(out + n * D, in + n * C, sizeof(float) * (size_t)D);
        memset(out + N * D, 0, sizeof(float) * (size_t)(after * D));
    }
}

/* Returns the floats that spread() would write; 0 where x can be read where it lies. */
static int64_t spread_floats(int64_t B, int64_t N, int64_t C, int64_t G, int64_t before, int64_t after)
{
    return G == 1 && before == 0 && after == 0 ? 0 : B * (before + N + after) * C;
}

/* Returns the frames of x (B,N,C): where they lie, or spread to `copy`. */
static frames frames_of(float *copy, const float *x, int64_t B, int64_t N, int64_t C, int64_t G, int64_t before,
                        int64_t after)
{
    if (!spread_floats(B, N, C, G, before, after)) return (frames){x, N * C};
    spread(copy, x, B, N, C, G, before, after);
    return (frames){copy, (before + N + after) * (C / G)};
}

/* A right factor (depth,columns), packed: GEMM_COLUMNS of it at a time, the last ones padded to whole vectors. */
typedef struct factor {
    float *data;
    int64_t depth, columns;
} factor;

static int64_t factor_floats(int64_t depth, int64_t columns) { return depth * padded(columns); }

/* Returns the place of element (p, n). */
static float *factor_at(const factor *f, int64_t p, int64_t n)
{
    const int64_t panel = n / GEMM_COLUMNS * GEMM_COLUMNS;
    const int64_t width = vx_min64(GEMM_COLUMNS, padded(f->columns) - panel);
    return f->data + panel * f->depth + p * width + (n - panel);
}

/* Computes rows of C = A B + bias, where A's rows begin row_stride apart. */
static void multiply(float *c, int64_t c_stride, const float *a, int64_t row_stride, int64_t rows, const factor *b,
                     const float *bias, int stream)
{
    const int64_t blocks = vx_max64(vx_ceil_div(b->depth, BLOCK_DEPTH), 1), most = vx_ceil_div(b->depth, blocks);
    for (int64_t j = 0; j < b->columns; j += GEMM_COLUMNS) {
        const int columns = (int)vx_min64(GEMM_COLUMNS, b->columns - j);
        for (int64_t p = 0; p == 0 || p < b->depth; p += most) {
            const gemm_product q = {.segments = 1,
                                    .k = vx_min64(most, b->depth - p),
                                    .a = {a + p},
                                    .row_stride = row_stride,
                                    .k_stride = 1,
                                    .b = {factor_at(b, p, j)},
                                    .b_stride = padded(columns),
                                    .c = c + j,
                                    .c_stride = c_stride,
                                    .alpha = 1,
                                    .beta = p ? 1 : 0,
                                    .bias = bias && !p ? bias + j : 0,
                                    .stream = stream && blocks == 1,
                                    .factors = gemm_factors()};
            VX_CPU(gemm_multiply)(&q, rows, columns);
            if (!b->depth) break;
        }
    }
}

/* -- Across time --------------------------------------------------------------------------------------------------- */

/* With few channels in a group, vectors of channels would be padding for the most part. Where the stride is 1, frames
 * can be the vectors instead: over sequences turned round, (channels,frames), the window of a tap is the row one number
 * further on, and w as it lies is the left factor:
 *
 *     y[o][t ..] = sum_{c,j} w[o][c][j] x[c][t + j ..]
 *
 * dx is the same, of dy and of w turned by 180 degrees. */
typedef struct across {
    int64_t B, G, D, E, K;    /* of the groups' inputs and outputs, whichever way */
    int64_t N, before, width; /* frames of x as given; zeros before them; all that are read */
} across;

enum {
    ACROSS_TAPS = 8, /* fewest taps that are worth it */
    PACKING = 64,    /* packing w, which is not needed here, costs as much as so many frames */
};

/* Says whether vectors of T frames cost less than those of E channels, by the padding they hold. */
static int runs_across(const conv1d_sizes *q, int64_t T, int64_t E)
{
    return q->stride == 1 && q->padding < q->K && q->K >= ACROSS_TAPS &&
           q->B * padded(T) * E < q->B * T * padded(E) + PACKING * E;
}

static int64_t across_floats(const across *z) { return z->B * z->G * z->D * z->width + GEMM_COLUMNS; }

/* Turns x (B,N,G D) round: (B,G,D,width), zeros around. */
static void turn(float *to, const float *x, const across *z)
{
    const int64_t C = z->G * z->D;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < z->B * C; i++) {
        const float *from = x + i / C * z->N * C + i % C;
        float *row = to + i * z->width;
        for (int64_t n = 0; n < z->width; n++)
            row[n] = n >= z->before && n < z->before + z->N ? from[(n - z->before) * C] : 0;
    }
#pragma omp single
    memset(to + z->B * C * z->width, 0, sizeof(float) * GEMM_COLUMNS);
}

/* Computes y (B,width - K + 1,G E) from x turned round and w (G E,D,K). */
static void multiply_across(float *y, const float *x, const float *w, const float *bias, const across *z)
{
    const int64_t T = z->width - z->K + 1, blocks = vx_ceil_div(T, GEMM_COLUMNS), O = z->G * z->E;
    const int64_t most = padded(vx_ceil_div(T, blocks));
#pragma omp for schedule(static)
    for (int64_t task = 0; task < z->B * z->G * blocks; task++) {
        enum { ROWS = 48 };
        _Alignas(64) float sum[ROWS * GEMM_COLUMNS];
        const int64_t b = task / (z->G * blocks), g = task / blocks % z->G, t = task % blocks * most;
        const int64_t columns = vx_min64(most, T - t);
        for (int64_t first = 0; first < z->E && columns > 0; first += ROWS) {
            const int64_t rows = vx_min64(ROWS, z->E - first);
            const float *filters = w + (g * z->E + first) * z->D * z->K;
            const float *windows = x + (b * z->G + g) * z->D * z->width + t;
            for (int64_t c = 0; c < z->D; c += 3) {
                gemm_product q = {.k = z->K,
                                  .row_stride = z->D * z->K,
                                  .k_stride = 1,
                                  .b_stride = 1,
                                  .c = sum,
                                  .c_stride = GEMM_COLUMNS,
                                  .alpha = 1,
                                  .beta = c ? 1 : 0,
                                  .factors = gemm_factors()};
                for (; q.segments < 3 && c + q.segments < z->D; q.segments++) {
                    q.a[q.segments] = filters + (c + q.segments) * z->K;
                    q.b[q.segments] = windows + (c + q.segments) * z->width;
                }
                VX_CPU(gemm_multiply)(&q, rows, (int)columns);
            }
            for (int64_t i = 0; i < columns; i++) {
                float *to = y + (b * T + t + i) * O + g * z->E + first;
                for (int64_t o = 0; o < rows; o++)
                    to[o] = sum[o * GEMM_COLUMNS + i] + (bias ? bias[g * z->E + first + o] : 0);
            }
        }
    }
}

/* -- Forward ------------------------------------------------------------------------------------------------------- */

/* Packs outputs o .. o + VX_LANES - 1 of group g of w, columns of the factor (K D,E) of the windows. */
static void pack_forward(const factor *f, const float *w, const conv1d_sizes *q, int64_t g, int64_t o)
{
    const float *from = w + (g * q->E + o) * q->D * q->K;
    for (int64_t c = 0; c < q->D; c++)
        for (int64_t j = 0; j < q->K; j++) {
            float *to = factor_at(f, j * q->D + c, o);
            for (int i = 0; i < VX_LANES; i++) to[i] = o + i < q->E ? from[(i * q->D + c) * q->K + j] : 0;
        }
}

/* Computes y across time. */
static int forward_across(vx_tensor *y, vx_tensor *x, vx_tensor *w, vx_tensor *bias, const conv1d_sizes *q)
{
    const across z = {q->B, q->groups, q->D, q->E, q->K, q->L, q->padding, q->width};
    float *turned = vx_scratch("conv1d", sizeof(float) * (size_t)across_floats(&z));
    if (!turned) return VX_ENOMEM;
#pragma omp parallel if (q->B * q->T * q->O * q->D * q->K > SERIAL_BELOW)
    {
        turn(turned, vx_f32(x), &z);
        multiply_across(vx_f32(y), turned, vx_f32(w), vx_f32(bias), &z);
    }
    vx_scratch_free(turned);
    return VX_OK;
}

/* Computes y (B,T,O) = x (B,L,C) * w (O,D,K) + bias (O). */
int VX_CPU(conv1d)(vx_tensor *y, vx_tensor *x, vx_tensor *w, vx_tensor *bias, int stride, int padding, int groups)
{
    const conv1d_sizes q = conv1d_sizes_of(x, y, w, stride, padding, groups);
    if (runs_across(&q, q.T, q.E)) return forward_across(y, x, w, bias, &q);
    const int64_t depth = q.K * q.D, each = factor_floats(depth, q.E), blocks = vx_ceil_div(q.T, BLOCK_ROWS);
    float *packed = 0, *copy = 0;
    scratch memory = {.op = "conv1d"};
    while (scratch_pass(&memory)) {
        packed = carve_f32(&memory, q.groups * each);
        copy = carve_f32(&memory, spread_floats(q.B, q.L, q.C, q.groups, q.padding, q.padding));
    }
    if (!memory.base) return VX_ENOMEM;
    const frames in = frames_of(copy, vx_f32(x), q.B, q.L, q.C, q.groups, q.padding, q.padding);
    const int64_t work = q.B * q.T * q.O * depth, vectors = padded(q.E) / VX_LANES;
    const int stream = vf_streams(vx_f32(y), q.B * q.T * q.O, q.O | q.E);
#pragma omp parallel if (work > SERIAL_BELOW)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < q.groups * vectors; i++) {
            const factor f = {packed + i / vectors * each, depth, q.E};
            pack_forward(&f, vx_f32(w), &q, i / vectors, i % vectors * VX_LANES);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < q.B * q.groups * blocks; task++) {
            const int64_t b = task / (q.groups * blocks), g = task / blocks % q.groups;
            const int64_t t = task % blocks * BLOCK_ROWS;
            const factor f = {packed + g * each, depth, q.E};
            multiply(vx_f32(y) + (b * q.T + t) * q.O + g * q.E, q.O,
                     in.data + (b * q.groups + g) * in.pitch + t * q.stride * q.D, q.stride * q.D,
                     vx_min64(BLOCK_ROWS, q.T - t), &f, bias ? vx_f32(bias) + g * q.E : 0, stream);
            if (stream) vf_stream_end();
        }
    }
    scratch_free(&memory);
    return VX_OK;
}

/* -- Gradient of the input ----------------------------------------------------------------------------------------- */

/* Packs output o of group g of w, rows of the factor (taps E,count D) of a run of phases; the latest tap meets the
 * earliest dy. */
static void pack_run(const factor *f, const float *w, const conv1d_sizes *q, conv1d_run run, int64_t g, int64_t o)
{
    const float *from = w + (g * q->E + o) * q->D * q->K;
    for (int64_t u = 0; u < run.taps; u++) {
        float *to = 0;
        int64_t n = 0;
        for (int64_t r = 0; r < run.count; r++) {
            const int64_t tap = run.first + r + (run.taps - 1 - u) * q->stride;
            for (int64_t c = 0; c < q->D; c++, n++) {
                if (n % GEMM_COLUMNS == 0) to = factor_at(f, u * q->E + o, n);
                *to++ = from[c * q->K + tap];
            }
        }
        for (; n < padded(f->columns); n++) *to++ = 0;
    }
}

/* Computes rows first .. end - 1 of dx of a run of phases: those that lie in x at once, the others beside it, in
 * `edge`. dy: frame -(taps - 1) of the sequence and group. */
static void run_rows(float *dx, const float *dy, const factor *f, float *edge, const conv1d_sizes *q, conv1d_run run,
                     int64_t first, int64_t end, int stream)
{
    const int64_t s = q->stride, shift = run.first - q->padding; /* row i begins at frame i s + shift */
    const float *a = dy + (q->taps - run.taps) * q->E;
    int64_t inside = shift < 0 ? vx_ceil_div(-shift, s) : 0;
    int64_t outside = q->L - run.count - shift < 0 ? 0 : (q->L - run.count - shift) / s + 1;
    inside = vx_min64(vx_max64(inside, first), end), outside = vx_min64(vx_max64(outside, inside), end);
    if (inside < outside)
        multiply(dx + (inside * s + shift) * q->C, s * q->C, a + inside * q->E, q->E, outside - inside, f, 0, stream);
    for (int64_t i = first; i < end; i++) {
        if (i == inside) i = outside;
        if (i >= end) break;
        const int64_t from = i * s + shift, low = vx_max64(from, 0), high = vx_min64(from + run.count, q->L);
        if (low >= high) continue;
        multiply(edge, f->columns, a + i * q->E, q->E, 1, f, 0, 0);
        memcpy(dx + low * q->C, edge + (low - from) * q->D, sizeof(float) * (size_t)((high - low) * q->D));
    }
}

/* Computes dx across time. */
static int input_across(vx_tensor *dx, vx_tensor *dy, vx_tensor *w, const conv1d_sizes *q)
{
    const int64_t before = q->K - 1 - q->padding;
    const across z = {q->B, q->groups, q->E, q->D, q->K, q->T, before, q->L + q->K - 1};
    float *turned = 0, *filters = 0;
    scratch memory = {.op = "conv1d_backward_input"};
    while (scratch_pass(&memory)) {
        turned = carve_f32(&memory, across_floats(&z));
        filters = carve_f32(&memory, q->O * q->D * q->K);
    }
    if (!memory.base) return VX_ENOMEM;
#pragma omp parallel if (q->B * q->T * q->O * q->D * q->K > SERIAL_BELOW)
    {
        turn(turned, vx_f32(dy), &z);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < q->O * q->D; i++) { /* (G,D,E,K), the taps from the last to the first */
            const int64_t o = i % q->E, c = i / q->E % q->D, g = i / (q->E * q->D);
            const float *from = vx_f32(w) + ((g * q->E + o) * q->D + c) * q->K;
            for (int64_t j = 0; j < q->K; j++) filters[i * q->K + j] = from[q->K - 1 - j];
        }
        multiply_across(vx_f32(dx), turned, filters, 0, &z);
    }
    scratch_free(&memory);
    return VX_OK;
}

/* Computes dx (B,L,C) from dy (B,T,O) and w (O,D,K). */
int VX_CPU(conv1d_backward_input)(vx_tensor *dx, vx_tensor *dy, vx_tensor *w, int stride, int padding, int groups)
{
    const conv1d_sizes q = conv1d_sizes_of(dx, dy, w, stride, padding, groups);
    if (runs_across(&q, q.L, q.D)) return input_across(dx, dy, w, &q);
    const int64_t before = q.taps - 1, after = q.rows - q.T, blocks = vx_ceil_div(q.rows, BLOCK_ROWS);
    int64_t each = 0; /* floats of a group's factors */
    for (conv1d_run r = conv1d_run_from(&q, 0); r.first < q.stride; r = conv1d_run_from(&q, r.first + r.count))
        each += factor_floats(r.taps * q.E, r.count * q.D);
    const int64_t edge = padded(q.stride * q.D);
    float *packed = 0, *copy = 0, *edges = 0;
    scratch memory = {.op = "conv1d_backward_input"};
    while (scratch_pass(&memory)) {
        packed = carve_f32(&memory, q.groups * each);
        copy = carve_f32(&memory, spread_floats(q.B, q.T, q.O, q.groups, before, after));
        edges = carve_f32(&memory, omp_get_max_threads() * edge);
    }
    if (!memory.base) return VX_ENOMEM;
    const frames out = frames_of(copy, vx_f32(dy), q.B, q.T, q.O, q.groups, before, after);
    const int stream = vf_streams(vx_f32(dx), q.B * q.L * q.C, q.C | q.D);
#pragma omp parallel if (q.B * q.T * q.O * q.K * q.D > SERIAL_BELOW)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < q.O; i++) {
            float *at = packed + i / q.E * each;
            for (conv1d_run r = conv1d_run_from(&q, 0); r.first < q.stride;
                 r = conv1d_run_from(&q, r.first + r.count)) {
                const factor f = {at, r.taps * q.E, r.count * q.D};
                pack_run(&f, vx_f32(w), &q, r, i / q.E, i % q.E);
                at += factor_floats(f.depth, f.columns);
            }
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < q.B * q.groups * blocks; task++) {
            const int64_t b = task / (q.groups * blocks), g = task / blocks % q.groups;
            const int64_t first = task % blocks * BLOCK_ROWS;
            float *at = packed + g * each;
            for (conv1d_run r = conv1d_run_from(&q, 0); r.first < q.stride;
                 r = conv1d_run_from(&q, r.first + r.count)) {
                const factor f = {at, r.taps * q.E, r.count * q.D};
                run_rows(vx_f32(dx) + b * q.L * q.C + g * q.D, out.data + (b * q.groups + g) * out.pitch, &f,
                         edges + omp_get_thread_num() * edge, &q, r, first, vx_min64(first + BLOCK_ROWS, q.rows),
                         stream);
                at += factor_floats(f.depth, f.columns);
            }
            if (stream) vf_stream_end();
        }
    }
    scratch_free(&memory);
    return VX_OK;
}

/* -- Gradient of the weights --------------------------------------------------------------------------------------- */

/* The product c (M,N) = a^T b over windows: a (windows,M) and b (windows,N), whose rows begin a_stride and b_stride
 * apart. c is stored GEMM_COLUMNS at a time, so that these lie together in L2. */
typedef struct outer {
    int64_t M, N, a_stride, b_stride;
} outer;

/* Returns the place of element (m, n) of c. */
static int64_t outer_at(const outer *z, int64_t m, int64_t n)
{
    const int64_t panel = n / GEMM_COLUMNS * GEMM_COLUMNS;
    return panel * z->M + m * vx_min64(GEMM_COLUMNS, z->N - panel) + (n - panel);
}

/* Adds `count` windows to columns j .. of c, GEMM_COLUMNS at most, or sets them where beta is 0. Rows whose stride
 * would crowd them into a few sets of the L1 cache are packed. */
static void add_windows(float *c, const outer *z, const float *a, const float *b, int64_t count, int64_t j, float beta)
{
    _Alignas(64) float left[BLOCK_WINDOWS * BLOCK_LEFT], right[BLOCK_WINDOWS * GEMM_COLUMNS];
    const int columns = (int)vx_min64(GEMM_COLUMNS, z->N - j);
    const int pack_left = z->a_stride % CROWDED == 0;
    const int pack_right = columns % VX_LANES != 0 || z->b_stride % CROWDED == 0;
    for (int64_t t = 0; t < count; t += BLOCK_WINDOWS) {
        gemm_product q = {.segments = 1,
                          .k = vx_min64(BLOCK_WINDOWS, count - t),
                          .row_stride = 1,
                          .k_stride = pack_left ? BLOCK_LEFT : z->a_stride,
                          .b = {b + t * z->b_stride + j},
                          .b_stride = z->b_stride,
                          .c_stride = columns,
                          .alpha = 1,
                          .beta = t ? 1 : beta,
                          .factors = gemm_factors(),
                          .in_l2 = pack_left};
        if (pack_right) q.b_stride = VX_CPU(gemm_pack)(right, q.b[0], q.k, columns, z->b_stride, 1), q.b[0] = right;
        const int64_t most = pack_left ? BLOCK_LEFT : z->M;
        for (int64_t i = 0; i < z->M; i += most) {
            const int64_t rows = vx_min64(most, z->M - i);
            const float *windows = a + t * z->a_stride + i;
            for (int64_t p = 0; pack_left && p < q.k; p++)
                memcpy(left + p * BLOCK_LEFT, windows + p * z->a_stride, sizeof(float) * (size_t)rows);
            q.a[0] = pack_left ? left : windows;
            q.c = c + outer_at(z, i, j);
            VX_CPU(gemm_multiply)(&q, rows, columns);
        }
    }
}

/* Computes dw (O,D,K) and dbias (O) from x (B,L,C) and dy (B,T,O). The factor whose width wastes less of the tile
 * stands on the right. */
int VX_CPU(conv1d_backward_weight)(vx_tensor *dw, vx_tensor *dbias, vx_tensor *x, vx_tensor *dy, int stride,
                                   int padding, int groups)
{
    const conv1d_sizes q = conv1d_sizes_of(x, dy, dw, stride, padding, groups);
    const int64_t depth = q.K * q.D, windows = q.B * q.T, size = depth * q.E;
    const int windows_right = q.E * padded(depth) < depth * padded(q.E);
    const outer z = windows_right ? (outer){q.E, depth, q.O, q.stride * q.D} : (outer){depth, q.E, q.stride * q.D, q.O};
    const int64_t fit = vx_max64(PARTS_FLOATS / vx_max64(q.groups * size, 1), 1);
    const int64_t parts = vx_max64(vx_min64(vx_min64(windows / PART_WINDOWS, PARTS), fit), 1);
    const int64_t panels = vx_ceil_div(z.N, GEMM_COLUMNS);
    float *partial = 0, *copy = 0, *bias_parts = 0;
    scratch memory = {.op = "conv1d_backward_weight"};
    while (scratch_pass(&memory)) {
        partial = carve_f32(&memory, parts * q.groups * size);
        copy = carve_f32(&memory, spread_floats(q.B, q.L, q.C, q.groups, q.padding, q.padding));
        bias_parts = carve_f32(&memory, dbias ? SUM_ROWS_PARTS * q.O : 0);
    }
    if (!memory.base) return VX_ENOMEM;
    const frames in = frames_of(copy, vx_f32(x), q.B, q.L, q.C, q.groups, q.padding, q.padding);
    if (!windows) memset(partial, 0, sizeof(float) * (size_t)(q.groups * size));
#pragma omp parallel if (windows * q.O * depth > SERIAL_BELOW)
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < parts * q.groups * panels; task++) {
            const int64_t part = task / (q.groups * panels), g = task / panels % q.groups;
            const int64_t j = task % panels * GEMM_COLUMNS;
            const int64_t first = part * windows / parts, end = (part + 1) * windows / parts;
            for (int64_t i = first, count; i < end; i += count) {
                const int64_t b = i / q.T, t = i % q.T;
                count = vx_min64(end - i, q.T - t);
                const float *window = in.data + (b * q.groups + g) * in.pitch + t * q.stride * q.D;
                const float *up = vx_f32(dy) + i * q.O + g * q.E;
                add_windows(partial + (part * q.groups + g) * size, &z, windows_right ? up : window,
                            windows_right ? window : up, count, j, i == first ? 0 : 1);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < q.groups * z.M; i++) {
            float *sum = partial + i * z.N;
            for (int64_t part = 1; part < parts; part++)
                for (int64_t j = 0; j < z.N; j++) sum[j] += partial[part * q.groups * size + i * z.N + j];
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < q.O; i++) {
            const float *sum = partial + i / q.E * size;
            const int64_t o = i % q.E;
            for (int64_t c = 0; c < q.D; c++)
                for (int64_t j = 0; j < q.K; j++) {
                    const int64_t p = j * q.D + c;
                    vx_f32(dw)[(i * q.D + c) * q.K + j] = sum[windows_right ? outer_at(&z, o, p) : outer_at(&z, p, o)];
                }
        }
    }
    if (dbias) sum_rows(vx_f32(dbias), vx_f32(dy), bias_parts, windows, q.O);
    scratch_free(&memory);
    return VX_OK;
}
