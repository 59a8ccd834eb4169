/* conv3x3.c: dense 3x3 convolution (stride 1, zero padding 1) with its gradients.
 *
 *   y[h][w][o]     = bias[o] + sum_{i,j,c} x[h + i - 1][w + j - 1][c] w[i][j][c][o]
 *   dx             = the same with w turned by 180 degrees and its channels swapped
 *   dw[i][j][c][o] = sum_{h,w} x[h + i - 1][w + j - 1][c] dy[h][w][o]
 *
 * No im2col: within a row of pixels, padded by one zero pixel at either end, the 3 C numbers that meet one row of taps
 * are contiguous, and the next output pixel's begin C further on. Three such overlapping matrices, of rows h - 1, h and
 * h + 1, are the segments of one product in gemm.c's tile; a thread keeps the three padded rows in its cache. 18 C O
 * flops per pixel against 4 (C + O) bytes: bound by arithmetic, with two exceptions.
 *
 * Where O is 3 or so, most of a vector would be padding. Then every pixel of x is multiplied once with all nine taps,
 * C x 9 O, and the results are added up in place of the inputs (narrow()).
 *
 * In the gradient of w the side with fewer channels supplies the window (rows of the tile), the other one the vectors.
 * Rows are cut into parts by size alone; each is summed in order, and the parts are added in order.
 *
 * Where products are of bf16 factors, rows are rounded, or converted from bf16, as they are copied; those of y and dx
 * are float32 until they are complete.
 */
#include <omp.h>

#include "cpu/add_rows.h"
#include "cpu/body.h"
#include "cpu/gemm_tile.h"
#include "cpu/scratch.h"

enum {
    SERIAL_BELOW = 20000,   /* multiply-adds that are not worth waking a thread for */
    STRIP = 8,              /* rows of a task; two more are copied */
    RUN = 3,                /* rows of one product in the gradient of w: the segments there are */
    SLOTS = RUN + 2,        /* for a run and the rows around it */
    STRIP_NARROW = 32,      /* rows of a task; two more are multiplied */
    PARTS = 64,             /* most parts of the weight gradient */
    PARTS_FLOATS = 4 << 20, /* most scratch for them: 16 MiB, if four parts fit */
};

/* Returns columns, rounded up to whole vectors. */
static int64_t padded(int64_t columns) { return vx_ceil_div(columns, VX_LANES) * VX_LANES; }

/* Returns what products of images a and b multiply (gemm_tile.h); what is to be rounded is rounded as it is copied. */
static int factors_of(const vx_tensor *a, const vx_tensor *b)
{
    return vx_bf16_products() || a->dtype == VX_BF16 || b->dtype == VX_BF16 ? GEMM_BF16 : GEMM_F32;
}

/* -- A few rows in flight ------------------------------------------------------------------------------------------ */

/* Rows h - 1 .. h + n, n <= RUN, of an image of H rows: row r is in slot r mod SLOTS, with C zeros before and after
 * it. */
typedef struct window {
    float *slot;
    int64_t H, W, C;
    body images;
    int64_t image; /* where the image begins in images */
    int factors;
} window;

static int64_t window_floats(int64_t W, int64_t C) { return SLOTS * (W + 2) * C; }
static float *window_at(const window *q, int64_t r) { return q->slot + (r + SLOTS) % SLOTS * (q->W + 2) * q->C; }
static int window_has(const window *q, int64_t r) { return r >= 0 && r < q->H; }

/* Makes a window in slot, its margins zero; it holds no rows yet. */
static window window_new(float *slot, body images, int64_t H, int64_t W, int64_t C, int factors)
{
    for (int i = 0; i < SLOTS; i++) {
        float *at = slot + i * (W + 2) * C;
        memset(at, 0, sizeof(float) * (size_t)C);
        memset(at + (W + 1) * C, 0, sizeof(float) * (size_t)C);
    }
    return (window){slot, H, W, C, images, 0, factors};
}

/* Copies row r, if there is one, to its slot. */
static void window_load(window *q, int64_t r)
{
    if (window_has(q, r))
        body_copy(window_at(q, r) + q->C, q->images, q->image + r * q->W * q->C, q->W * q->C, q->factors != GEMM_F32);
}

/* Loads what is missing of rows h - 1 .. h + n: all of them where first is 1, else those from h + 1 on. */
static void window_advance(window *q, int64_t image, int64_t h, int64_t n, int first)
{
    q->image = image;
    if (first) window_load(q, h - 1), window_load(q, h);
    for (int64_t i = 1; i <= n; i++) window_load(q, h + i);
}

/* -- Forward and gradient of the input ----------------------------------------------------------------------------- */

/* Packs w, GEMM_COLUMNS of it at a time, as (9 C, padded width). flip: as the gradient of the input reads it; w is
 * (3,3,O,C) then. */
static void pack(float *packed, const float *w, int64_t C, int64_t O, int flip)
{
    for (int64_t j = 0; j < O; j += GEMM_COLUMNS) {
        const int columns = (int)vx_min64(GEMM_COLUMNS, O - j);
        for (int tap = 0; tap < 9; tap++)
            packed += C * (flip ? VX_CPU(gemm_pack)(packed, w + (8 - tap) * C * O + j * C, C, columns, 1, C)
                                : VX_CPU(gemm_pack)(packed, w + tap * C * O + j, C, columns, O, 1));
    }
}

/* A convolution's images and its packed weights. */
typedef struct convolution {
    int64_t H, W, C, O;
    body x, y; /* (B,H,W,C), (B,H,W,O) */
    const float *packed, *bias;
    int factors, stream;
} convolution;

/* Computes rows h0 .. of a strip of image b of y; buffer: the window's, and a row of y. */
static void wide(const convolution *s, int64_t b, int64_t h0, float *buffer)
{
    const int64_t H = s->H, W = s->W, C = s->C, O = s->O;
    float *row = buffer + padded(window_floats(W, C));
    window in = window_new(buffer, s->x, H, W, C, s->factors);
    for (int64_t h = h0; h < vx_min64(h0 + STRIP, H); h++) {
        const int64_t first = (b * H + h) * W * O;
        float *y = body_place(s->y, first, row);
        window_advance(&in, b * H * W * C, h, 1, h == h0);
        const float *columns_of_w = s->packed;
        for (int64_t j = 0; j < O; j += GEMM_COLUMNS) {
            const int columns = (int)vx_min64(GEMM_COLUMNS, O - j);
            const int64_t width = padded(columns);
            gemm_product q = {.k = 3 * C,
                              .row_stride = C,
                              .k_stride = 1,
                              .b_stride = width,
                              .c = y + j,
                              .c_stride = O,
                              .alpha = 1,
                              .bias = s->bias ? s->bias + j : 0,
                              .factors = s->factors,
                              .stream = s->stream};
            for (int i = 0; i < 3; i++)
                if (window_has(&in, h + i - 1)) {
                    q.a[q.segments] = window_at(&in, h + i - 1);
                    q.b[q.segments++] = columns_of_w + i * 3 * C * width;
                }
            VX_CPU(gemm_multiply)(&q, W, columns);
            columns_of_w += 9 * C * width;
        }
        body_write(s->y, first, W * O, y);
    }
}

/* Packs w as one matrix (C, 9 O), GEMM_COLUMNS of it at a time; column = tap O + o. buffer: (C, 9 O). */
static void pack_narrow(float *packed, float *buffer, const float *w, int64_t C, int64_t O, int flip)
{
    for (int64_t c = 0; c < C; c++)
        for (int64_t tap = 0; tap < 9; tap++)
            for (int64_t o = 0; o < O; o++)
                buffer[c * 9 * O + tap * O + o] = flip ? w[((8 - tap) * O + o) * C + c] : w[(tap * C + c) * O + o];
    for (int64_t j = 0; j < 9 * O; j += GEMM_COLUMNS)
        packed += C * VX_CPU(gemm_pack)(packed, buffer + j, C, (int)vx_min64(GEMM_COLUMNS, 9 * O - j), 9 * O, 1);
}

/* Multiplies a row of x with all taps, into taps (W + 2, stride); the outer two pixels stay zero. */
static void narrow_row(float *taps, const float *x, const convolution *s, int64_t stride)
{
    const int64_t C = s->C, O = s->O;
    const float *packed = s->packed;
    for (int64_t j = 0; j < 9 * O; j += GEMM_COLUMNS) {
        const int columns = (int)vx_min64(GEMM_COLUMNS, 9 * O - j);
        const int64_t width = padded(columns);
        const gemm_product q = {.segments = 1,
                                .k = C,
                                .a = {x},
                                .row_stride = C,
                                .k_stride = 1,
                                .b = {packed},
                                .b_stride = width,
                                .c = taps + stride + j,
                                .c_stride = stride,
                                .alpha = 1,
                                .factors = s->factors};
        VX_CPU(gemm_multiply)(&q, s->W, columns);
        packed += C * width;
    }
}

/* Returns the floats of a narrow strip's buffer: three rows of products, a row of x and one of y. */
static int64_t narrow_floats(int64_t W, int64_t C, int64_t O) { return 3 * (W + 2) * padded(9 * O) + W * (C + O); }

/* Computes rows h0 .. of a strip of image b of y where O is small; taps: three rows of products, row r in slot r mod 3,
 * and the rest of the buffer. */
static void narrow(const convolution *s, int64_t b, int64_t h0, float *taps)
{
    const int64_t H = s->H, W = s->W, C = s->C, O = s->O, stride = padded(9 * O), row = (W + 2) * stride;
    float *x_row = taps + 3 * row, *y_row = x_row + W * C;
    memset(taps, 0, sizeof(float) * (size_t)(3 * row));
    for (int64_t h = h0 - 1; h <= vx_min64(h0 + STRIP_NARROW, H); h++) {
        const int64_t from_x = (b * H + h) * W * C, to_y = (b * H + h - 1) * W * O;
        if (h >= 0 && h < H) {
            if (s->factors != GEMM_F32) body_copy(x_row, s->x, from_x, W * C, 1);
            narrow_row(taps + (h + 3) % 3 * row, s->factors != GEMM_F32 ? x_row : (float *)body_at(s->x, from_x), s,
                       stride);
        }
        if (h <= h0) continue;
        float *y = body_place(s->y, to_y, y_row);
        for (int64_t w = 0; w < W; w++)
            for (int64_t o = 0; o < O; o++) {
                float sum = s->bias ? s->bias[o] : 0;
                for (int i = 0; i < 3; i++) {
                    const int64_t from = h - 2 + i;
                    if (from < 0 || from >= H) continue;
                    const float *t = taps + (from + 3) % 3 * row + w * stride + 3 * i * O + o;
                    sum += t[0] + t[stride + O] + t[2 * (stride + O)];
                }
                y[w * O + o] = sum;
            }
        body_write(s->y, to_y, W * O, y);
    }
}

/* Computes y (B,H,W,O) from x (B,H,W,C) and w (3,3,C,O). flip: w is (3,3,O,C), read as the gradient of the input
 * does. */
static int convolve(const char *op, const vx_tensor *y, const vx_tensor *x, const float *w, const float *bias, int flip)
{
    const int64_t B = x->shape[0], H = x->shape[1], W = x->shape[2], C = x->shape[3], O = y->shape[3];
    convolution s = {H, W, C, O, body_of(x), body_of(y), 0, bias, factors_of(x, y), 0};
    if (B * H * W * O == 0) return VX_OK;
    const int is_narrow = 10 * padded(9 * O) <= 6 * 9 * padded(O);
    const int64_t strip = is_narrow ? STRIP_NARROW : STRIP, strips = vx_ceil_div(H, strip);
    const int64_t buffer = padded(is_narrow ? narrow_floats(W, C, O) : padded(window_floats(W, C)) + W * O);
    float *packed = 0, *in_order = 0, *buffers = 0;
    scratch memory = {.op = op};
    while (scratch_pass(&memory)) {
        packed = carve_f32(&memory, is_narrow ? C * padded(9 * O) : 9 * C * padded(O));
        in_order = carve_f32(&memory, is_narrow ? C * 9 * O : 0);
        buffers = carve_f32(&memory, omp_get_max_threads() * buffer);
    }
    if (!memory.base) return VX_ENOMEM;
    if (is_narrow) pack_narrow(packed, in_order, w, C, O, flip);
    else pack(packed, w, C, O, flip);
    if (s.factors != GEMM_F32) round_to_bf16(packed, is_narrow ? C * padded(9 * O) : 9 * C * padded(O));
    s.packed = packed;
    s.stream = !is_narrow && !s.y.bf16 && vf_streams(vx_f32(y), B * H * W * O, O);
#pragma omp parallel for schedule(static) if (9 * B * H * W * C * O > SERIAL_BELOW)
    for (int64_t task = 0; task < B * strips; task++) {
        const int64_t image = task / strips, h0 = task % strips * strip;
        float *own = buffers + omp_get_thread_num() * buffer;
        if (is_narrow) narrow(&s, image, h0, own);
        else wide(&s, image, h0, own);
        if (s.stream) vf_stream_end();
    }
    scratch_free(&memory);
    return VX_OK;
}

/* Computes y (B,H,W,O) = x (B,H,W,C) * w (3,3,C,O) + bias (O). */
int VX_CPU(conv3x3)(vx_tensor *y, vx_tensor *x, vx_tensor *w, vx_tensor *bias)
{
    return convolve("conv3x3", y, x, vx_f32(w), vx_f32(bias), 0);
}

/* Computes dx (B,H,W,C) from dy (B,H,W,O). */
int VX_CPU(conv3x3_backward_input)(vx_tensor *dx, vx_tensor *dy, vx_tensor *w)
{
    return convolve("conv3x3_backward_input", dx, dy, vx_f32(w), 0, 1);
}

/* -- Gradient of the weights --------------------------------------------------------------------------------------- */

/* Adds rows h .. h + n - 1, n <= RUN, to partial (9 S, L): the window of `few` (S channels, padded rows) against `many`
 * (n, W, L). */
static void weight_rows(float *partial, const window *few, const float *many, float *packed, int64_t h, int64_t n,
                        int64_t L)
{
    const int64_t S = few->C, W = few->W, share = vx_ceil_div(n * W * GEMM_COLUMNS, 3);
    const float *next = many + n * W * L; /* comes into the cache meanwhile */
    for (int64_t j = 0; j < L; j += GEMM_COLUMNS) {
        const int columns = (int)vx_min64(GEMM_COLUMNS, L - j);
        const float *b = many + j;
        int64_t b_stride = L;
        if (columns % VX_LANES) b_stride = VX_CPU(gemm_pack)(packed, b, n * W, columns, L, 1), b = packed;
        for (int i = 0; i < 3; i++) {
            gemm_product q = {.k = W,
                              .row_stride = 1,
                              .k_stride = S,
                              .b_stride = b_stride,
                              .c = partial + 3 * i * S * L + j,
                              .c_stride = L,
                              .alpha = 1,
                              .beta = 1,
                              .factors = few->factors,
                              .in_l2 = 1};
            for (int64_t r = 0; r < n; r++)
                if (window_has(few, h + r + i - 1)) {
                    q.a[q.segments] = window_at(few, h + r + i - 1);
                    q.b[q.segments++] = b + r * W * b_stride;
                }
            for (const float *end = next + share; next < end; next += 64 / sizeof(float)) __builtin_prefetch(next);
            VX_CPU(gemm_multiply)(&q, 3 * S, columns);
        }
    }
}

/* Computes dw (3,3,C,O) and dbias (O) from x (B,H,W,C) and dy (B,H,W,O). */
int VX_CPU(conv3x3_backward_weight)(vx_tensor *dw, vx_tensor *dbias, vx_tensor *x, vx_tensor *dy)
{
    const int64_t B = x->shape[0], H = x->shape[1], W = x->shape[2], C = x->shape[3], O = dy->shape[3];
    const int swap = O < C, factors = factors_of(x, dy);
    const body few = body_of(swap ? dy : x), many = body_of(swap ? x : dy), grad = body_of(dy);
    const int64_t S = swap ? O : C, L = swap ? C : O, each = padded(9 * S * L + O);
    const int64_t image_rows = W ? B * H : 0, fit = vx_max64(PARTS_FLOATS / vx_max64(each, 1), 4);
    const int64_t parts = vx_max64(vx_min64(vx_min64(image_rows, PARTS), fit), 1);
    const int64_t rows = factors == GEMM_F32 ? 0 : padded(RUN * W * L), around_floats = padded(window_floats(W, S));
    const int64_t buffer = around_floats + RUN * W * GEMM_COLUMNS + rows + padded(body_floats(grad, RUN * W * O));
    float *partial = 0, *buffers = 0;
    scratch memory = {.op = "conv3x3_backward_weight"};
    while (scratch_pass(&memory)) {
        partial = carve_f32(&memory, parts * each);
        buffers = carve_f32(&memory, omp_get_max_threads() * buffer);
    }
    if (!memory.base) return VX_ENOMEM;
    const int serial = 9 * image_rows * W * C * O <= SERIAL_BELOW;
#pragma omp parallel if (!serial)
    {
        float *own = buffers + omp_get_thread_num() * buffer, *packed = own + around_floats;
        float *many_rows = packed + RUN * W * GEMM_COLUMNS, *grad_rows = many_rows + rows;
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; part++) {
            window around = window_new(own, few, H, W, S, factors);
            float *sum = partial + part * each;
            memset(sum, 0, sizeof(float) * (size_t)each);
            const int64_t first = part * image_rows / parts, end = (part + 1) * image_rows / parts;
            for (int64_t r = first, n; r < end; r += n) {
                const int64_t h = r % H;
                n = vx_min64(RUN, vx_min64(end - r, H - h));
                window_advance(&around, (r - h) * W * S, h, n, r == first || h == 0);
                if (rows) body_copy(many_rows, many, r * W * L, n * W * L, 1);
                weight_rows(sum, &around, rows ? many_rows : (float *)body_at(many, r * W * L), packed, h, n, L);
                add_rows(sum + 9 * S * L, body_read(grad, r * W * O, n * W * O, grad_rows), n * W, O);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < 9 * S; i++) {
            float *sum = partial + i * L;
            for (int64_t part = 1; part < parts; part++)
                for (int64_t j = 0; j < L; j++) sum[j] += partial[part * each + i * L + j];
            const int64_t tap = i / S, s = i % S;
            if (swap)
                for (int64_t j = 0; j < L; j++) vx_f32(dw)[((8 - tap) * C + j) * O + s] = sum[j];
            else memcpy(vx_f32(dw) + i * O, sum, sizeof(float) * (size_t)O);
        }
    }
    if (dbias) {
        float *sum = partial + 9 * S * L;
        for (int64_t part = 1; part < parts; part++)
            for (int64_t o = 0; o < O; o++) sum[o] += sum[part * each + o];
        memcpy(vx_f32(dbias), sum, sizeof(float) * (size_t)O);
    }
    scratch_free(&memory);
    return VX_OK;
}
