/* conv2d.c: convolution of images, channels last, with any kernel, stride, zero padding and groups, and its gradients.
 *
 *   y[p][q][o]     = bias[o] + sum_{k,l,c} x[p s + k - padding][q s + l - padding][c] w[o][c][k][l]
 *   dx[h][w][c]    = sum over the windows that pixel (h, w) lies in of dy w
 *   dw[o][c][k][l] = sum_{p,q} dy[p][q][o] x[p s + k - padding][q s + l - padding][c]
 *
 * A block of pixels of the result is a product of the windows they see, a row each, with the weights. The windows are
 * gathered to scratch in L2, BLOCK_DEPTH numbers of each at a time: a copy of 4 bytes for O multiply-adds. A pointwise
 * convolution without stride reads x where it lies.
 *
 * dx is the same: the pixels whose row and column have the same remainder by the stride see the same taps of w, and the
 * dy under them lie side by side. So each of these phases is a convolution of dy, of stride 1, with taps of its own.
 *
 * Weights (O,C/G,K,L), as PyTorch has them, are packed once a call as the right factor, GEMM_COLUMNS of it at a time.
 * The sum over pixels in dw is cut into parts by size alone; parts are added in order.
 */
#include <omp.h>

#include "cpu/add_rows.h"
#include "cpu/gemm_tile.h"
#include "cpu/scratch.h"
#include "shared/conv2d.h"

enum {
    SERIAL_BELOW = 20000,   /* multiply-adds that are not worth waking a thread for */
    BLOCK_PIXELS = 96,      /* pixels of a task: 16 register tiles */
    BLOCK_DEPTH = 512,      /* numbers of a window gathered at a time */
    SUM_PIXELS = 64,        /* pixels added to dw at a time */
    PARTS = 64,             /* most parts of dw */
    PART_PIXELS = 512,      /* fewest pixels of a part */
    PARTS_FLOATS = 4 << 20, /* most scratch for them: 16 MiB, if one part fits */
};

/* Returns columns, rounded up to whole vectors. */
static int64_t padded(int64_t columns) { return vx_ceil_div(columns, VX_LANES) * VX_LANES; }

/* -- Windows ------------------------------------------------------------------------------------------------------- */

/* A number of a window's pixels: tap t is `row` rows and `column` columns from where the window begins. */
typedef struct tap {
    int32_t row, column;
    int32_t k, l; /* its place in w */
} tap;

/* Windows over images (B,H,W,C), of which D channels from `first` on are seen: window (u, v), of rows x columns in an
 * image, begins at pixel (u step_h, v step_w). Its numbers are D for each tap. */
typedef struct windows {
    const float *x;
    int64_t H, W, C, D, first;
    int64_t rows, columns, step_h, step_w;
    const tap *taps;
    int64_t count;
} windows;

/* Copies numbers from .. from + depth - 1 of windows i .. i + n - 1 to `to` (n,depth); 0 off the image. */
static void gather(float *to, const windows *s, int64_t i, int64_t n, int64_t from, int64_t depth)
{
    if (!depth) return;
    for (int64_t j = i; j < i + n; j++) {
        const int64_t v = j % s->columns * s->step_w, u = j / s->columns % s->rows * s->step_h;
        const float *image = s->x + j / (s->columns * s->rows) * s->H * s->W * s->C + s->first;
        int64_t t = from / s->D, c = from % s->D;
        for (int64_t left = depth, count; left > 0; left -= count, t++, c = 0) {
            const int64_t h = u + s->taps[t].row, w = v + s->taps[t].column;
            count = vx_min64(left, s->D - c);
            if (h >= 0 && h < s->H && w >= 0 && w < s->W)
                memcpy(to, image + (h * s->W + w) * s->C + c, sizeof(float) * (size_t)count);
            else memset(to, 0, sizeof(float) * (size_t)count);
            to += count;
        }
    }
}

/* Says whether each window is D numbers that lie at (its number) times C. */
static int lies_as_rows(const windows *s)
{
    return s->count == 1 && !s->taps[0].row && !s->taps[0].column && s->step_h == 1 && s->step_w == 1 &&
           s->rows == s->H && s->columns == s->W;
}

/* A right factor (depth,columns), packed: GEMM_COLUMNS of it at a time, the last ones padded to whole vectors. */
static float *packed_at(float *packed, int64_t depth, int64_t columns, int64_t p, int64_t n)
{
    const int64_t panel = n / GEMM_COLUMNS * GEMM_COLUMNS;
    return packed + depth * panel + p * vx_min64(GEMM_COLUMNS, padded(columns) - panel) + (n - panel);
}

/* Computes c (n,E) = windows i .. i + n - 1 times `packed`, + bias. buffer: (BLOCK_PIXELS,BLOCK_DEPTH). */
static void multiply(float *c, int64_t c_stride, const windows *s, int64_t i, int64_t n, float *packed, int64_t E,
                     const float *bias, float *buffer)
{
    const int64_t depth = s->count * s->D, direct = lies_as_rows(s);
    for (int64_t p = 0; p == 0 || p < depth; p += BLOCK_DEPTH) {
        const int64_t some = vx_min64(BLOCK_DEPTH, depth - p);
        if (!direct) gather(buffer, s, i, n, p, some);
        for (int64_t j = 0; j < E; j += GEMM_COLUMNS) {
            const int columns = (int)vx_min64(GEMM_COLUMNS, E - j);
            const gemm_product q = {.segments = 1,
                                    .k = some,
                                    .a = {direct ? s->x + s->first + i * s->C + p : buffer},
                                    .row_stride = direct ? s->C : some,
                                    .k_stride = 1,
                                    .b = {packed_at(packed, depth, E, p, j)},
                                    .b_stride = padded(columns),
                                    .c = c + j,
                                    .c_stride = c_stride,
                                    .alpha = 1,
                                    .beta = p ? 1 : 0,
                                    .bias = bias && !p ? bias + j : 0,
                                    .factors = gemm_factors()};
            VX_CPU(gemm_multiply)(&q, n, columns);
        }
    }
}

/* Returns how many pixels a task has: fewer than BLOCK_PIXELS where there would be few tasks. */
static int64_t block_of(int64_t pixels)
{
    enum { LEAST = 24, TASKS = 16 };
    return vx_min64(vx_max64(vx_ceil_div(pixels, TASKS), LEAST), BLOCK_PIXELS);
}

/* -- Forward ------------------------------------------------------------------------------------------------------- */

/* Lists the taps of a forward window, row by row; gives their number. */
static int64_t all_taps(tap *taps, const window_sizes *q)
{
    int64_t count = 0;
    for (int64_t k = 0; k < q->K; k++)
        for (int64_t l = 0; l < q->L; l++)
            taps[count++] = (tap){(int32_t)(k - q->padding_h), (int32_t)(l - q->padding_w), (int32_t)k, (int32_t)l};
    return count;
}

/* Computes y (B,P,Q,O) = x (B,H,W,C) * w (O,D,K,L) + bias (O). */
int VX_CPU(conv2d)(vx_tensor *y, vx_tensor *x, vx_tensor *w, vx_tensor *bias, int stride_h, int stride_w, int padding_h,
                   int padding_w, int groups)
{
    const window_sizes q = window_sizes_of(x, y, w->shape[2], w->shape[3], stride_h, stride_w, padding_h, padding_w);
    const int64_t O = y->shape[3], E = O / groups, D = q.C / groups, depth = q.K * q.L * D, each = depth * padded(E);
    const int64_t pixels = q.B * q.P * q.Q, block = block_of(pixels), blocks = vx_ceil_div(pixels, block);
    float *packed = 0, *buffers = 0;
    tap *taps = 0;
    scratch memory = {.op = "conv2d"};
    while (scratch_pass(&memory)) {
        packed = carve_f32(&memory, groups * each);
        buffers = carve_f32(&memory, (int64_t)omp_get_max_threads() * BLOCK_PIXELS * BLOCK_DEPTH);
        taps = carve(&memory, q.K * q.L, sizeof(tap));
    }
    if (!memory.base) return VX_ENOMEM;
    const int64_t count = all_taps(taps, &q), vectors = padded(E) / VX_LANES;
#pragma omp parallel if (pixels * O * depth > SERIAL_BELOW)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < groups * vectors; i++) {
            const int64_t g = i / vectors, o = i % vectors * VX_LANES;
            const float *from = vx_f32(w) + (g * E + o) * depth;
            for (int64_t c = 0; c < D; c++)
                for (int64_t t = 0; t < count; t++) {
                    float *to = packed_at(packed + g * each, depth, E, t * D + c, o);
                    for (int n = 0; n < VX_LANES; n++) to[n] = o + n < E ? from[n * depth + c * count + t] : 0;
                }
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < groups * blocks; task++) {
            const int64_t g = task % groups, i = task / groups * block;
            const windows s = {vx_f32(x), q.H, q.W, q.C, D, g * D, q.P, q.Q, q.stride_h, q.stride_w, taps, count};
            multiply(vx_f32(y) + i * O + g * E, O, &s, i, vx_min64(block, pixels - i), packed + g * each, E,
                     bias ? vx_f32(bias) + g * E : 0,
                     buffers + (int64_t)omp_get_thread_num() * BLOCK_PIXELS * BLOCK_DEPTH);
        }
    }
    scratch_free(&memory);
    return VX_OK;
}

/* -- Gradient of the input ----------------------------------------------------------------------------------------- */

/* Lists the taps under which pixels (r + i stride) of x have met dy: tap k where r + padding - k is a multiple of the
 * stride. */
static int64_t phase_taps(tap *taps, const window_sizes *q, int64_t r_h, int64_t r_w)
{
    int64_t count = 0;
    for (int64_t k = (r_h + q->padding_h) % q->stride_h; k < q->K; k += q->stride_h)
        for (int64_t l = (r_w + q->padding_w) % q->stride_w; l < q->L; l += q->stride_w)
            taps[count++] = (tap){(int32_t)((r_h + q->padding_h - k) / q->stride_h),
                                  (int32_t)((r_w + q->padding_w - l) / q->stride_w), (int32_t)k, (int32_t)l};
    return count;
}

/* Computes dx (B,H,W,C) from dy (B,P,Q,O) and w (O,D,K,L). */
int VX_CPU(conv2d_backward_input)(vx_tensor *dx, vx_tensor *dy, vx_tensor *w, int stride_h, int stride_w, int padding_h,
                                  int padding_w, int groups)
{
    const window_sizes q = window_sizes_of(dx, dy, w->shape[2], w->shape[3], stride_h, stride_w, padding_h, padding_w);
    const int64_t O = dy->shape[3], E = O / groups, D = q.C / groups, KL = q.K * q.L, each = KL * E * padded(D);
    const int64_t tile = BLOCK_PIXELS * (BLOCK_DEPTH + padded(D));
    float *packed = 0, *buffers = 0;
    tap *taps = 0;
    scratch memory = {.op = "conv2d_backward_input"};
    while (scratch_pass(&memory)) {
        packed = carve_f32(&memory, groups * each);
        buffers = carve_f32(&memory, omp_get_max_threads() * tile);
        taps = carve(&memory, KL, sizeof(tap));
    }
    if (!memory.base) return VX_ENOMEM;
    for (int64_t phase = 0; phase < q.stride_h * q.stride_w; phase++) {
        const int64_t r_h = phase / q.stride_w, r_w = phase % q.stride_w;
        if (r_h >= q.H || r_w >= q.W) continue;
        const int64_t rows = vx_ceil_div(q.H - r_h, q.stride_h), columns = vx_ceil_div(q.W - r_w, q.stride_w);
        const int64_t pixels = q.B * rows * columns, block = block_of(pixels), blocks = vx_ceil_div(pixels, block);
        const int64_t count = phase_taps(taps, &q, r_h, r_w), depth = count * E;
#pragma omp parallel if (pixels * q.C * vx_max64(depth, 1) > SERIAL_BELOW)
        {
            float *own = buffers + omp_get_thread_num() * tile, *sums = own + BLOCK_PIXELS * BLOCK_DEPTH;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < groups * E; i++) {
                const int64_t g = i / E, o = i % E;
                for (int64_t t = 0; t < count; t++)
                    for (int64_t c = 0; c < padded(D); c++)
                        *packed_at(packed + g * each, depth, D, t * E + o, c) =
                            c < D ? vx_f32(w)[((i * D + c) * q.K + taps[t].k) * q.L + taps[t].l] : 0;
            }
#pragma omp for schedule(static)
            for (int64_t task = 0; task < groups * blocks; task++) {
                const int64_t g = task % groups, i = task / groups * block, n = vx_min64(block, pixels - i);
                const windows s = {vx_f32(dy), q.P, q.Q, O, E, g * E, rows, columns, 1, 1, taps, count};
                multiply(sums, padded(D), &s, i, n, packed + g * each, D, 0, own);
                for (int64_t j = i; j < i + n; j++) {
                    const int64_t v = j % columns, u = j / columns % rows, b = j / (columns * rows);
                    float *to = vx_f32(dx) + ((b * q.H + r_h + u * q.stride_h) * q.W + r_w + v * q.stride_w) * q.C;
                    memcpy(to + g * D, sums + (j - i) * padded(D), sizeof(float) * (size_t)D);
                }
            }
        }
    }
    scratch_free(&memory);
    return VX_OK;
}

/* -- Gradient of the weights --------------------------------------------------------------------------------------- */

/* Adds windows i .. i + n - 1 (of SUM_PIXELS at most), numbers p .. of them, times dy to sum (depth,E). buffer:
 * (SUM_PIXELS,BLOCK_DEPTH) and (SUM_PIXELS,GEMM_COLUMNS). */
static void add_windows(float *sum, const windows *s, const float *dy, int64_t O, int64_t E, int64_t i, int64_t n,
                        int64_t p, int64_t some, int is_first, float *buffer)
{
    float *packed = buffer + SUM_PIXELS * BLOCK_DEPTH;
    gather(buffer, s, i, n, p, some);
    for (int64_t j = 0; j < E; j += GEMM_COLUMNS) {
        const int columns = (int)vx_min64(GEMM_COLUMNS, E - j);
        const float *b = dy + i * O + j;
        int64_t b_stride = O;
        if (columns % VX_LANES) b_stride = VX_CPU(gemm_pack)(packed, b, n, columns, O, 1), b = packed;
        const gemm_product q = {.segments = 1,
                                .k = n,
                                .a = {buffer},
                                .row_stride = 1,
                                .k_stride = some,
                                .b = {b},
                                .b_stride = b_stride,
                                .c = sum + p * E + j,
                                .c_stride = E,
                                .alpha = 1,
                                .beta = is_first ? 0 : 1,
                                .factors = gemm_factors(),
                                .in_l2 = 1};
        VX_CPU(gemm_multiply)(&q, some, columns);
    }
}

/* Computes dw (O,D,K,L) and dbias (O) from x (B,H,W,C) and dy (B,P,Q,O). */
int VX_CPU(conv2d_backward_weight)(vx_tensor *dw, vx_tensor *dbias, vx_tensor *x, vx_tensor *dy, int stride_h,
                                   int stride_w, int padding_h, int padding_w, int groups)
{
    const window_sizes q = window_sizes_of(x, dy, dw->shape[2], dw->shape[3], stride_h, stride_w, padding_h, padding_w);
    const int64_t O = dy->shape[3], E = O / groups, D = q.C / groups, KL = q.K * q.L, depth = KL * D, size = depth * E;
    const int64_t pixels = q.B * q.P * q.Q, pieces = vx_ceil_div(depth, BLOCK_DEPTH);
    const int64_t fit = vx_max64(PARTS_FLOATS / vx_max64(groups * size, 1), 1);
    const int64_t parts = vx_max64(vx_min64(vx_min64(pixels / PART_PIXELS, PARTS), fit), 1);
    const int64_t tile = SUM_PIXELS * (BLOCK_DEPTH + GEMM_COLUMNS);
    float *partial = 0, *buffers = 0, *bias_parts = 0;
    tap *taps = 0;
    scratch memory = {.op = "conv2d_backward_weight"};
    while (scratch_pass(&memory)) {
        partial = carve_f32(&memory, parts * groups * size);
        buffers = carve_f32(&memory, omp_get_max_threads() * tile);
        bias_parts = carve_f32(&memory, dbias ? SUM_ROWS_PARTS * O : 0);
        taps = carve(&memory, KL, sizeof(tap));
    }
    if (!memory.base) return VX_ENOMEM;
    const int64_t count = all_taps(taps, &q);
    if (!pixels) memset(partial, 0, sizeof(float) * (size_t)(groups * size));
#pragma omp parallel if (pixels * O * depth > SERIAL_BELOW)
    {
        float *own = buffers + omp_get_thread_num() * tile;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < parts * groups * pieces; task++) {
            const int64_t part = task / (groups * pieces), g = task / pieces % groups, p = task % pieces * BLOCK_DEPTH;
            const int64_t first = part * pixels / parts, end = (part + 1) * pixels / parts;
            const windows s = {vx_f32(x), q.H, q.W, q.C, D, g * D, q.P, q.Q, q.stride_h, q.stride_w, taps, count};
            for (int64_t i = first; i < end; i += SUM_PIXELS)
                add_windows(partial + (part * groups + g) * size, &s, vx_f32(dy) + g * E, O, E, i,
                            vx_min64(SUM_PIXELS, end - i), p, vx_min64(BLOCK_DEPTH, depth - p), i == first, own);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < groups * depth; i++) {
            float *sum = partial + i * E;
            for (int64_t part = 1; part < parts; part++)
                for (int64_t o = 0; o < E; o++) sum[o] += partial[part * groups * size + i * E + o];
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < O; i++) {
            const float *sum = partial + i / E * size + i % E;
            for (int64_t c = 0; c < D; c++)
                for (int64_t t = 0; t < KL; t++) vx_f32(dw)[(i * D + c) * KL + t] = sum[(t * D + c) * E];
        }
    }
    if (dbias) sum_rows(vx_f32(dbias), vx_f32(dy), bias_parts, pixels, O);
    scratch_free(&memory);
    return VX_OK;
}
