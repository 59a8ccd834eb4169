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
                                    .stream = stream && blocks == 1};
            VX_CPU(gemm_multiply)(&q, rows, columns);
            if (!b->depth) break;
        }
    }
}

/* -- Forward ------------------------------------------------------------------------------------------------------- */

/* Packs group g of w as the factor (K D,E) of the windows. */
static void pack_forward(const factor *f, const float *w, const conv1d_sizes *q, int64_t g)
{
    const float *from = w + g * q->E * q->D * q->K;
    for (int64_t o = 0; o < padded(q->E); o += VX_LANES)
        for (int64_t c = 0; c < q->D; c++)
            for (int64_t j = 0; j < q->K; j++) {
                float *to = factor_at(f, j * q->D + c, o);
                for (int i = 0; i < VX_LANES; i++) to[i] = o + i < q->E ? from[((o + i) * q->D + c) * q->K + j] : 0;
            }
}

/* Computes y (B,T,O) = x (B,L,C) * w (O,D,K) + bias (O). */
int VX_CPU(conv1d)(vx_tensor *y, vx_tensor *x, vx_tensor *w, vx_tensor *bias, int stride, int padding, int groups)
{
    const conv1d_sizes q = conv1d_sizes_of(x, y, w, stride, padding, groups);
    const int64_t depth = q.K * q.D, each = factor_floats(depth, q.E), blocks = vx_ceil_div(q.T, BLOCK_ROWS);
    float *packed = 0, *copy = 0;
    scratch memory = {.op = "conv1d"};
    while (scratch_pass(&memory)) {
        packed = carve_f32(&memory, q.groups * each);
        copy = carve_f32(&memory, spread_floats(q.B, q.L, q.C, q.groups, q.padding, q.padding));
    }
    if (!memory.base) return VX_ENOMEM;
    const frames in = frames_of(copy, vx_f32(x), q.B, q.L, q.C, q.groups, q.padding, q.padding);
    const int64_t work = q.B * q.T * q.O * depth;
    const int stream = vf_streams(vx_f32(y), q.B * q.T * q.O, q.O | q.E);
#pragma omp parallel if (work > SERIAL_BELOW)
    {
#pragma omp for schedule(static)
        for (int64_t g = 0; g < q.groups; g++) pack_forward(&(factor){packed + g * each, depth, q.E}, vx_f32(w), &q, g);
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

/* Packs group g of w as the factor (taps E,count D) of a run of phases; the latest tap meets the earliest dy. */
static void pack_run(const factor *f, const float *w, const conv1d_sizes *q, int64_t g, conv1d_run run)
{
    const float *from = w + g * q->E * q->D * q->K;
    for (int64_t u = 0; u < run.taps; u++)
        for (int64_t o = 0; o < q->E; o++)
            for (int64_t n = 0; n < padded(f->columns); n++) {
                const int64_t tap = run.first + n / q->D + (run.taps - 1 - u) * q->stride;
                *factor_at(f, u * q->E + o, n) = n < f->columns ? from[(o * q->D + n % q->D) * q->K + tap] : 0;
            }
}

/* Computes rows first .. end - 1 of dx of a run of phases: those that lie in x at once, the others beside it, in
 * `edge`. dy: frame -(taps - 1) of the sequence and group. */
static void run_rows(float *dx, const float *dy, const factor *f, float *edge, const conv1d_sizes *q, conv1d_run run,
                     int64_t first, int64_t end)
{
    const int64_t s = q->stride, shift = run.first - q->padding; /* row i begins at frame i s + shift */
    const float *a = dy + (q->taps - run.taps) * q->E;
    int64_t inside = shift < 0 ? vx_ceil_div(-shift, s) : 0;
    int64_t outside = q->L - run.count - shift < 0 ? 0 : (q->L - run.count - shift) / s + 1;
    inside = vx_min64(vx_max64(inside, first), end), outside = vx_min64(vx_max64(outside, inside), end);
    if (inside < outside)
        multiply(dx + (inside * s + shift) * q->C, s * q->C, a + inside * q->E, q->E, outside - inside, f, 0, 0);
    for (int64_t i = first; i < end; i++) {
        if (i == inside) i = outside;
        if (i >= end) break;
        const int64_t from = i * s + shift, low = vx_max64(from, 0), high = vx_min64(from + run.count, q->L);
        if (low >= high) continue;
        multiply(edge, f->columns, a + i * q->E, q->E, 1, f, 0, 0);
        memcpy(dx + low * q->C, edge + (low - from) * q->D, sizeof(float) * (size_t)((high - low) * q->D));
    }
}

/* Computes dx (B,L,C) from dy (B,T,O) and w (O,D,K). */
int VX_CPU(conv1d_backward_input)(vx_tensor *dx, vx_tensor *dy, vx_tensor *w, int stride, int padding, int groups)
{
    const conv1d_sizes q = conv1d_sizes_of(dx, dy, w, stride, padding, groups);
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
#pragma omp parallel if (q.B * q.T * q.O * q.K * q.D > SERIAL_BELOW)
    {
#pragma omp for schedule(static)
        for (int64_t g = 0; g < q.groups; g++) {
            float *at = packed + g * each;
            for (conv1d_run r = conv1d_run_from(&q, 0); r.first < q.stride;
                 r = conv1d_run_from(&q, r.first + r.count)) {
                const factor f = {at, r.taps * q.E, r.count * q.D};
                pack_run(&f, vx_f32(w), &q, g, r);
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
                         edges + omp_get_thread_num() * edge, &q, r, first, vx_min64(first + BLOCK_ROWS, q.rows));
                at += factor_floats(f.depth, f.columns);
            }
        }
    }
    scratch_free(&memory);
    return VX_OK;
}

/* -- Gradient of the weights --------------------------------------------------------------------------------------- */

/* The product a^T b over windows: a (windows,M) and b (windows,N), whose rows begin a_stride and b_stride apart. */
typedef struct outer {
    int64_t M, N, a_stride, b_stride;
} outer;

/* Adds `count` windows to columns j .. of c (M,N), or sets them where beta is 0. */
static void add_windows(float *c, const outer *z, const float *a, const float *b, int64_t count, int64_t j, float beta)
{
    _Alignas(64) float packed[BLOCK_WINDOWS * GEMM_COLUMNS];
    const int columns = (int)vx_min64(GEMM_COLUMNS, z->N - j);
    for (int64_t t = 0; t < count; t += BLOCK_WINDOWS) {
        const int64_t k = vx_min64(BLOCK_WINDOWS, count - t);
        const float *right = b + t * z->b_stride + j;
        int64_t stride = z->b_stride;
        if (columns % VX_LANES) stride = VX_CPU(gemm_pack)(packed, right, k, columns, z->b_stride, 1), right = packed;
        const gemm_product q = {.segments = 1,
                                .k = k,
                                .a = {a + t * z->a_stride},
                                .row_stride = 1,
                                .k_stride = z->a_stride,
                                .b = {right},
                                .b_stride = stride,
                                .c = c + j,
                                .c_stride = z->N,
                                .alpha = 1,
                                .beta = t ? 1 : beta};
        VX_CPU(gemm_multiply)(&q, z->M, columns);
    }
}

/* Sums the rows of dy (rows,O), in parts by their number. partial: (PARTS,O). */
static void sum_bias(float *dbias, const float *dy, float *partial, int64_t rows, int64_t O)
{
    const int64_t parts = vx_max64(vx_min64(rows / 64, PARTS), 1);
    memset(partial, 0, sizeof(float) * (size_t)(parts * O));
#pragma omp parallel for schedule(static) if (rows * O > SERIAL_BELOW)
    for (int64_t part = 0; part < parts; part++) {
        const int64_t first = part * rows / parts, end = (part + 1) * rows / parts;
        add_rows(partial + part * O, dy + first * O, end - first, O);
    }
    for (int64_t part = 1; part < parts; part++)
        for (int64_t o = 0; o < O; o++) partial[o] += partial[part * O + o];
    memcpy(dbias, partial, sizeof(float) * (size_t)O);
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
        bias_parts = carve_f32(&memory, dbias ? PARTS * q.O : 0);
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
                    vx_f32(dw)[(i * q.D + c) * q.K + j] = windows_right ? sum[o * depth + p] : sum[p * q.E + o];
                }
        }
    }
    if (dbias) sum_bias(vx_f32(dbias), vx_f32(dy), bias_parts, windows, q.O);
    scratch_free(&memory);
    return VX_OK;
}
