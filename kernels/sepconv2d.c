/* sepconv2d.c: a depthwise-separable convolution [1] with what stands around it in our networks, as one op:
 *
 *   n = act(group_norm(x))       where gamma is given, else x
 *   u = n enlarged twofold       where up is 2
 *   d = depthwise_conv2d(u, w)       stride 1 or 2
 *   y = d vT + bias + residual   the pointwise convolution
 *
 * Each of these alone is bound by memory. Here an image passes through all of them a block of rows at a time: a block
 * is about BLOCK_PIXELS pixels, enough for the product d vT to run at full speed, few enough for its arrays to stay in
 * the L1 and L2 caches. Rows of n lie in a ring that moves down the image, so each is made once. Only x, y and their
 * gradients travel: 3 passes over memory instead of 8 forward, 5 instead of 17 backward.
 *
 * The backward pass moves down the image in the same way. n and d are made again (a sixth of its multiply-adds), and
 * with n the slope of the activation, which comes of the same exponential. A block of dd = dy v gives the gradient of w
 * and, one or two rows behind, the rows of du that no later dd reaches; these become dz = dn slope, which is written
 * into dx and summed per channel. The sums of the whole image known, a last pass turns dz into dx.
 *
 * Threads take an image each, or a band of rows of a large one; a band's first and last rows are made with the rows
 * around them, which its neighbours make too. Sums are kept for each band, in order of the rows, and the bands added in
 * order: the bits depend on the sizes alone. Arrays within the op have Cp channels, C filled up with zeros to whole
 * vectors; from pixel to pixel it is `pitch`, an odd number of vectors: the rows of an image, a power of two apart,
 * would fall on few sets of the L1 cache.
 *
 * Under vx_autocast, or where x or y is bf16, the factors of the products are rounded to bf16: d and dd where they lie,
 * v and dy as they are copied. Rows of bf16 become float32 as they enter the loops, and are rounded as they leave; of
 * dz too, which lies in dx.
 *
 * [1] Chollet 2017, Xception.
 */
#include <omp.h>
#include <string.h>

#include "shared/checks.h"
#include "cpu/add_rows.h"
#include "cpu/body.h"
#include "cpu/depthwise_rows.h"
#include "cpu/norm.h"
#include "cpu/gemm_tile.h"
#include "cpu/scratch.h"

enum {
    BLOCK_PIXELS = 96,     /* d rows of a block hold at least as many */
    BAND_FLOATS = 1 << 19, /* of x or y: a band of rows is cut off there, and the image with it */
    BEHIND = 3,            /* rows of dd that rows of du yet to come may need */
};

typedef struct sepconv2d {
    int64_t B, H, W, C, P, Q, O, G, Cp, pitch;
    int act, stride, up, norm;
    int factors; /* of the products: GEMM_F32 or GEMM_BF16 */
    float eps;
    body x, y, residual, addend, dy, dx;
    const float *gamma, *beta, *bias;
    float *mean, *rstd;
    int64_t block, band, bands; /* d rows of a block and of a band, bands of an image */
    int64_t ring, dd_ring;      /* rows of n and of dd that are kept */
    float *w;                   /* (3,3,pitch) */
    float *v;                   /* forward vT, GEMM_COLUMNS of it at a time (C, columns); backward (O,Cp) */
} sepconv2d;

/* Fills in s from what both directions are given; y stands for dy as well. Checks it. */
static int describe(sepconv2d *s, const char *op, const vx_tensor *x, const vx_tensor *y, const vx_tensor *gamma,
                    const vx_tensor *beta, const vx_tensor *mean, const vx_tensor *rstd)
{
    if (check_sepconv2d(op, gamma, beta, mean, rstd)) return VX_EINVAL;
    s->B = x->shape[0], s->H = x->shape[1], s->W = x->shape[2], s->C = x->shape[3];
    s->P = y->shape[1], s->Q = y->shape[2], s->O = y->shape[3], s->G = mean ? mean->shape[1] : 1;
    s->Cp = vx_ceil_div(s->C, VX_LANES) * VX_LANES;
    s->pitch = s->Cp / VX_LANES % 2 ? s->Cp : s->Cp + VX_LANES;
    s->x = body_of(x), s->gamma = vx_f32(gamma), s->beta = vx_f32(beta), s->mean = vx_f32(mean), s->rstd = vx_f32(rstd);
    s->norm = gamma != 0;
    s->factors = vx_bf16_products() || x->dtype == VX_BF16 || y->dtype == VX_BF16 ? GEMM_BF16 : GEMM_F32;
    s->block = vx_min64(vx_ceil_div(BLOCK_PIXELS, s->Q), s->P);
    const int64_t row = vx_max64(vx_max64(s->W * s->C * s->stride / s->up, s->Q * s->O), 1);
    s->bands = vx_max64(s->P * row / BAND_FLOATS, 1);
    s->band = vx_ceil_div(vx_ceil_div(s->P, s->bands), 2 * s->block) * 2 *
              s->block; /* even: under up 2, two d rows share a row of n */
    s->bands = vx_ceil_div(s->P, s->band);
    s->ring = s->block * s->stride / s->up + 4;
    s->dd_ring = s->block * (1 + vx_ceil_div(BEHIND, s->block));
    return VX_OK;
}

/* Copies from (rows,C) to (rows,Cp), filled up with zeros. */
static void pad_rows(float *to, const float *from, int64_t rows, int64_t C, int64_t Cp)
{
    for (int64_t r = 0; r < rows; r++) {
        memcpy(to + r * Cp, from + r * C, sizeof(float) * (size_t)C);
        memset(to + r * Cp + C, 0, sizeof(float) * (size_t)(Cp - C));
    }
}

/* A thread's working space. Slots of the rings are rows modulo their number. */
typedef struct space {
    float *n;               /* (ring, W up, pitch) rows of n, each pixel doubled where up is 2 */
    float *slope;           /* (ring, W, pitch) act' at the same rows; backward, under norm */
    float *d;               /* (block, Q, pitch) */
    float *dd;              /* (dd_ring, Q, pitch) */
    float *du;              /* (block stride + 2, W up, pitch) */
    float *zeros;           /* (a row) */
    float *channel;         /* (4,Cp) mean, rstd, scale = rstd gamma, beta of the image at hand */
    float *x, *addend, *dx; /* (W,C) rows of what is bf16 */
    float *y;               /* (block,Q,O) of y, if it is bf16; of dy, if the products' factors are */
} space;

/* Hands out a thread's arrays. */
static void carve_space(scratch *memory, const sepconv2d *s, space *at, int backward)
{
    const int64_t u = s->W * s->up * s->pitch, d = s->Q * s->pitch;
    at->n = carve_f32(memory, s->ring * u);
    at->slope = carve_f32(memory, backward && s->norm ? s->ring * s->W * s->pitch : 0);
    at->d = carve_f32(memory, s->block * d);
    at->dd = carve_f32(memory, backward ? s->dd_ring * d : 0);
    at->du = carve_f32(memory, backward ? (s->block * s->stride + 2) * u : 0);
    at->zeros = carve_f32(memory, vx_max64(u, d));
    at->channel = carve_f32(memory, 4 * s->Cp);
    at->x = carve_f32(memory, body_floats(s->x, s->W * s->C));
    at->addend = carve_f32(memory, body_floats(s->addend, s->W * s->C));
    at->dx = carve_f32(memory, body_floats(s->dx, s->W * s->C));
    at->y = carve_f32(memory, s->y.bf16 || (backward && s->factors != GEMM_F32) ? s->block * s->Q * s->O : 0);
}

/* Rounds what a product is to multiply. */
static void round_factor(const sepconv2d *s, float *x, int64_t count)
{
    if (s->factors != GEMM_F32) round_to_bf16(x, count);
}

/* Computes the statistics of image b; VX_ENOMEM. */
static int image_statistics(const sepconv2d *s, int64_t b)
{
    const int64_t pixels = s->H * s->W;
    return VX_CPU(group_statistics)(s->mean + b * s->G, s->rstd + b * s->G, s->x, b * pixels * s->C, pixels, s->C, s->G,
                                    s->eps);
}

/* Fills in `channel` for image b. */
static void load_channels(const sepconv2d *s, int64_t b, const space *at)
{
    float *mean = at->channel, *rstd = mean + s->Cp, *scale = rstd + s->Cp, *beta = scale + s->Cp;
    memset(mean, 0, sizeof(float) * (size_t)(4 * s->Cp));
    for (int64_t c = 0; s->norm && c < s->C; c++) {
        const int64_t g = b * s->G + c / (s->C / s->G);
        mean[c] = s->mean[g], rstd[c] = s->rstd[g], scale[c] = rstd[c] * s->gamma[c], beta[c] = s->beta[c];
    }
}

/* Makes `count` vectors of a pixel's channels of n, and of slope where that is wanted; the last has `lanes`
 * channels. */
VX_INLINE void make_vectors(const sepconv2d *s, const int count, int lanes, float *n, float *slopes, const float *x,
                            const float *mean, const int norm, const int act, const int with_slope)
{
    const float *scale = mean + 2 * s->Cp, *beta = mean + 3 * s->Cp;
    vf z[4], slope[4];
#pragma GCC unroll 4
    for (int v = 0; v < count; v++) {
        const int64_t c = v * VX_LANES;
        z[v] = vf_load_upto(x + c, lanes);
        if (norm) z[v] = (z[v] - vf_load(mean + c)) * vf_load(scale + c) + vf_load(beta + c);
    }
    if (norm) activate_many(count, act, z, slope);
#pragma GCC unroll 4
    for (int v = 0; v < count; v++) {
        vf_store(n + v * VX_LANES, z[v]);
        if (s->up == 2) vf_store(n + s->pitch + v * VX_LANES, z[v]);
        if (with_slope) vf_store(slopes + v * VX_LANES, slope[v]);
    }
}

/* Makes row i of n, and of slope where that is wanted, from image b. */
VX_INLINE void make_row_as(const sepconv2d *s, int64_t b, int64_t i, const space *at, const int norm, const int act,
                           const int with_slope)
{
    const int64_t C = s->C, pitch = s->pitch, slot = i % s->ring;
    const float *x = body_read(s->x, (b * s->H + i) * s->W * C, s->W * C, at->x), *mean = at->channel;
    float *n = at->n + slot * s->W * s->up * pitch, *slopes = at->slope + slot * s->W * pitch;
    for (int64_t j = 0; j < s->W; j++, x += C, n += s->up * pitch, slopes += pitch) {
        int64_t c = 0;
        for (; c + 4 * VX_LANES <= C; c += 4 * VX_LANES)
            make_vectors(s, 4, VX_LANES, n + c, slopes + c, x + c, mean + c, norm, act, with_slope);
        for (; c + VX_LANES <= C; c += VX_LANES)
            make_vectors(s, 1, VX_LANES, n + c, slopes + c, x + c, mean + c, norm, act, with_slope);
        if (c < C) make_vectors(s, 1, (int)(C - c), n + c, slopes + c, x + c, mean + c, norm, act, with_slope);
    }
}

/* Makes row i of n by the copy for this call's norm and activation. */
static void make_row(const sepconv2d *s, int64_t b, int64_t i, const space *at, int with_slope)
{
    if (!s->norm) make_row_as(s, b, i, at, 0, VX_ACT_NONE, 0);
    else if (s->act == VX_ACT_SILU && with_slope) make_row_as(s, b, i, at, 1, VX_ACT_SILU, 1);
    else if (s->act == VX_ACT_SILU) make_row_as(s, b, i, at, 1, VX_ACT_SILU, 0);
    else if (s->act == VX_ACT_GELU) make_row_as(s, b, i, at, 1, VX_ACT_GELU, with_slope);
    else make_row_as(s, b, i, at, 1, VX_ACT_NONE, with_slope);
}

/* Returns row r of u; off the image a row of zeros. */
static const float *u_row(const sepconv2d *s, const space *at, int64_t r)
{
    return r < 0 || r >= s->H * s->up ? at->zeros : at->n + r / s->up % s->ring * s->W * s->up * s->pitch;
}

/* Makes d rows first .. end - 1 in at->d. Rows of n before `made` are there already. Returns how many are there
 * then. */
static int64_t make_block(const sepconv2d *s, int64_t b, int64_t first, int64_t end, int64_t made, const space *at,
                          int with_slope)
{
    const int64_t Cp = s->Cp, pitch = s->pitch, row = s->Q * pitch;
    for (; made < vx_min64(s->H, ((end - 1) * s->stride + 1) / s->up + 1); made++) make_row(s, b, made, at, with_slope);
    const int step = s->stride == 1 ? BAND : 1;
    for (int64_t p = first; p < end; p += step) {
        const int rows = (int)vx_min64(step, end - p);
        const float *around[BAND + 2];
        for (int t = 0; t < rows + 2; t++) around[t] = u_row(s, at, p * s->stride + t - 1);
        float *d = at->d + (p - first) * row;
        if (s->stride == 1) depthwise_band(rows, d, around, s->w, 0, s->W * s->up, Cp, pitch, 0, 0);
        else depthwise_row2(d, around, s->w, 0, s->W * s->up, s->Q, Cp, pitch, 0);
    }
    round_factor(s, at->d, (end - first) * row);
    return made;
}

/* Returns the first row of n under d row p. */
static int64_t first_n(const sepconv2d *s, int64_t p) { return vx_max64(p * s->stride - 1, 0) / s->up; }

/* Makes d rows first .. end - 1 of image b, and y of them. */
static void forward_band(const sepconv2d *s, int64_t b, int64_t first, int64_t end, const space *at)
{
    int64_t made = first_n(s, first);
    load_channels(s, b, at);
    for (int64_t p = first; p < end; p += s->block) {
        const int64_t stop = vx_min64(p + s->block, end), offset = (b * s->P + p) * s->Q * s->O;
        const int64_t count = (stop - p) * s->Q * s->O;
        float *y = body_place(s->y, offset, at->y);
        const float *residual = s->residual.data ? body_read(s->residual, offset, count, y) : 0;
        made = make_block(s, b, p, stop, made, at, 0);
        for (int64_t j = 0; j < s->O; j += GEMM_COLUMNS) {
            const int columns = (int)vx_min64(GEMM_COLUMNS, s->O - j);
            const gemm_product q = {.segments = 1,
                                    .k = s->C,
                                    .a = {at->d},
                                    .row_stride = s->pitch,
                                    .k_stride = 1,
                                    .b = {s->v + j * s->C},
                                    .b_stride = gemm_vectors(columns) * VX_LANES,
                                    .c = y + j,
                                    .c_stride = s->O,
                                    .alpha = 1,
                                    .beta = residual != 0,
                                    .addend = residual ? residual + j : 0,
                                    .bias = s->bias ? s->bias + j : 0,
                                    .factors = s->factors};
            VX_CPU(gemm_multiply)(&q, (stop - p) * s->Q, columns);
        }
        body_write(s->y, offset, count, y);
    }
}

int VX_CPU(sepconv2d)(vx_tensor *y, vx_tensor *mean, vx_tensor *rstd, vx_tensor *x, vx_tensor *gamma, vx_tensor *beta,
                      vx_tensor *w, vx_tensor *v, vx_tensor *bias, vx_tensor *residual, int act, float eps, int stride,
                      int up)
{
    sepconv2d s = {.act = act,
                   .eps = eps,
                   .stride = stride,
                   .up = up,
                   .bias = vx_f32(bias),
                   .residual = body_of(residual),
                   .y = body_of(y)};
    if (describe(&s, "sepconv2d", x, y, gamma, beta, mean, rstd)) return VX_EINVAL;
    if (residual && check_one_dtype("sepconv2d", "residual", residual, "y", y)) return VX_EINVAL;
    if (!y->numel) { /* the statistics are there for the gradient all the same */
        for (int64_t b = 0; s.norm && b < s.B; b++)
            if (image_statistics(&s, b)) return VX_ENOMEM;
        return VX_OK;
    }
    const int threads = omp_get_max_threads();
    space spaces[threads];
    scratch memory = {.op = "sepconv2d"};
    while (scratch_pass(&memory)) {
        s.w = carve_f32(&memory, 9 * s.pitch);
        s.v = carve_f32(&memory, vx_ceil_div(s.O, GEMM_COLUMNS) * GEMM_COLUMNS * s.C);
        for (int i = 0; i < threads; i++) carve_space(&memory, &s, &spaces[i], 0);
    }
    if (!memory.base) return VX_ENOMEM;
    pad_rows(s.w, vx_f32(w), 9, s.C, s.pitch);
    for (int64_t j = 0; j < s.O; j += GEMM_COLUMNS)
        VX_CPU(gemm_pack)(s.v + j * s.C, vx_f32(v) + j * s.C, s.C, (int)vx_min64(GEMM_COLUMNS, s.O - j), 1, s.C);
    round_factor(&s, s.v, vx_ceil_div(s.O, VX_LANES) * VX_LANES * s.C);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(|| : failed)
    {
        const space mine = spaces[omp_get_thread_num()];
        memset(mine.zeros, 0, sizeof(float) * (size_t)(vx_max64(s.W * s.up, s.Q) * s.pitch));
        if (s.norm && s.bands > 1)
#pragma omp for schedule(static)
            for (int64_t b = 0; b < s.B; b++) failed = image_statistics(&s, b) || failed;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s.B * s.bands; task++) {
            const int64_t b = task / s.bands, first = task % s.bands * s.band;
            if (s.norm && s.bands == 1) failed = image_statistics(&s, b) || failed;
            forward_band(&s, b, first, vx_min64(first + s.band, s.P), &mine);
        }
    }
    scratch_free(&memory);
    return failed ? vx_fail(VX_ENOMEM, "sepconv2d: out of memory") : VX_OK;
}

/* -- Backward ------------------------------------------------------------------------------------------------------ */

/* The sums of one band. dw, dv and dbias lie one behind the other. */
typedef struct sums {
    float *dw;    /* (10,pitch): (3,3,pitch) and a row that is not used */
    float *dv;    /* (O,Cp) */
    float *dbias; /* (O) */
    double *dz;   /* (2,Cp) sums of dz and of dz (x - mean) */
} sums;

/* The sums of all bands, an array for each kind. */
typedef struct bands {
    float *floats; /* (tasks,each) */
    double *dz;    /* (tasks,2,Cp) */
    int64_t tasks, each;
} bands;

/* Hands out the sums of all bands. */
static void carve_bands(scratch *memory, const sepconv2d *s, bands *all)
{
    all->tasks = s->B * s->bands;
    all->each = vx_ceil_div(10 * s->pitch + s->O * s->Cp + s->O, 16) * 16;
    all->floats = carve_f32(memory, all->tasks * all->each);
    all->dz = carve_f64(memory, all->tasks * 2 * s->Cp);
}

/* Returns the sums of one band. */
static sums band_sums(const sepconv2d *s, const bands *all, int64_t task)
{
    float *dw = all->floats + task * all->each, *dv = dw + 10 * s->pitch;
    return (sums){dw, dv, dv + s->O * s->Cp, all->dz + task * 2 * s->Cp};
}

/* Returns row p of dd, which the ring counts from d row `start`; off the image a row of zeros. */
static const float *dd_row(const sepconv2d *s, const space *at, int64_t p, int64_t start)
{
    return p < 0 || p >= s->P ? at->zeros : at->dd + (p - start) % s->dd_ring * s->Q * s->pitch;
}

/* Makes rows first .. end - 1 of du in at->du; under stride 2 first is even. start: the d row that the ring of dd
 * counts from. */
static void make_du(const sepconv2d *s, int64_t first, int64_t end, int64_t start, const space *at)
{
    const int64_t Cp = s->Cp, pitch = s->pitch, W = s->W * s->up, row = W * pitch;
    if (s->stride == 1)
        for (int64_t r = first; r < end; r += BAND) {
            const int rows = (int)vx_min64(BAND, end - r);
            const float *around[BAND + 2];
            for (int t = 0; t < rows + 2; t++) around[t] = dd_row(s, at, r + t - 1, start);
            depthwise_band(rows, at->du + (r - first) * row, around, s->w, 0, W, Cp, pitch, 1, 0);
        }
    else
        for (int64_t r = first; r < end; r += 2) {
            float *even = at->du + (r - first) * row;
            depthwise_input2(even, r + 1 < end ? even + row : 0, dd_row(s, at, r / 2, start),
                             dd_row(s, at, r / 2 + 1, start), s->w, W, s->Q, Cp, pitch, 0);
        }
}

/* A row of an image: what is added to dx, and dx. */
typedef struct image_row {
    const float *x, *addend;
    float *dx;
} image_row;

/* Writes `count` vectors of row i of dx, from channel c on, n channels of the last, from the row (or two rows) of du
 * over it: dz = dn slope where there is a norm, whose sums are added to `total`, else dn + addend. */
VX_INLINE void finish_vectors(const sepconv2d *s, int64_t i, const image_row *row, const float *du, const space *at,
                              double *total, int64_t c, const int count, const int n, const int norm, const int up)
{
    const int64_t C = s->C, Cp = s->Cp, pitch = s->pitch, W = s->W;
    const float *x = row->x + c, *addend = row->addend ? row->addend + c : 0,
                *slope = at->slope + i % s->ring * W * pitch + c;
    const float *above = du + c, *below = above + up * W * pitch;
    float *dx = row->dx + c;
    vf mean[4], plain[4], along[4];
#pragma GCC unroll 4
    for (int v = 0; v < count; v++) mean[v] = vf_load(at->channel + c + v * VX_LANES), plain[v] = along[v] = vf_zero();
    for (int64_t j = 0; j < W; j++)
#pragma GCC unroll 4
        for (int v = 0; v < count; v++) {
            const int64_t k = up * j * pitch + v * VX_LANES, l = j * C + v * VX_LANES;
            vf g = vf_load(above + k);
            if (up == 2) g = (g + vf_load(above + k + pitch)) + (vf_load(below + k) + vf_load(below + k + pitch));
            if (norm) {
                g *= vf_load(slope + j * pitch + v * VX_LANES);
                plain[v] += g;
                along[v] += g * (vf_load_upto(x + l, n) - mean[v]);
            } else if (addend) g += vf_load_upto(addend + l, n);
            vf_store_upto(dx + l, g, n);
        }
    for (int v = 0; norm && v < count; v++)
        for (int l = 0; l < n; l++)
            total[c + v * VX_LANES + l] += plain[v][l], total[Cp + c + v * VX_LANES + l] += along[v][l];
}

VX_INLINE void finish_row_as(const sepconv2d *s, int64_t b, int64_t i, const float *du, const space *at, double *total,
                             const int norm, const int up)
{
    const int64_t first = (b * s->H + i) * s->W * s->C, count = s->W * s->C;
    const image_row row = {norm ? body_read(s->x, first, count, at->x) : 0,
                           !norm && s->addend.data ? body_read(s->addend, first, count, at->addend) : 0,
                           body_place(s->dx, first, at->dx)};
    int64_t c = 0;
    for (; c + 4 * VX_LANES <= s->C; c += 4 * VX_LANES)
        finish_vectors(s, i, &row, du, at, total, c, 4, VX_LANES, norm, up);
    for (; c + VX_LANES <= s->C; c += VX_LANES) finish_vectors(s, i, &row, du, at, total, c, 1, VX_LANES, norm, up);
    if (c < s->C) finish_vectors(s, i, &row, du, at, total, c, 1, (int)(s->C - c), norm, up);
    body_write(s->dx, first, count, row.dx);
}

/* Writes row i of dx by the copy for this call. */
static void finish_row(const sepconv2d *s, int64_t b, int64_t i, const float *du, const space *at, double *total)
{
    if (s->norm && s->up == 1) finish_row_as(s, b, i, du, at, total, 1, 1);
    else if (s->norm) finish_row_as(s, b, i, du, at, total, 1, 2);
    else if (s->up == 1) finish_row_as(s, b, i, du, at, total, 0, 1);
    else finish_row_as(s, b, i, du, at, total, 0, 2);
}

/* Adds to the gradients of w, v and bias what d rows first .. end - 1, whose dd is there, bring. dy: those rows as the
 * products multiply them. */
static void weight_gradients(const sepconv2d *s, int64_t b, int64_t first, int64_t end, int64_t start, const float *dy,
                             const space *at, const sums *g)
{
    const int64_t count = (end - first) * s->Q;
    add_rows(g->dbias, s->dy.bf16 ? dy : (float *)body_at(s->dy, (b * s->P + first) * s->Q * s->O), count, s->O);
    for (int64_t j = 0; j < s->Cp; j += GEMM_COLUMNS) {
        const gemm_product q = {.segments = 1,
                                .k = count,
                                .a = {dy},
                                .row_stride = 1,
                                .k_stride = s->O,
                                .b = {at->d + j},
                                .b_stride = s->pitch,
                                .c = g->dv + j,
                                .c_stride = s->Cp,
                                .alpha = 1,
                                .beta = 1,
                                .factors = s->factors,
                                .in_l2 = 1};
        VX_CPU(gemm_multiply)(&q, s->O, (int)vx_min64(GEMM_COLUMNS, s->Cp - j));
    }
    for (int64_t p = first; p < end; p++) {
        const float *around[3];
        for (int t = 0; t < 3; t++) around[t] = u_row(s, at, p * s->stride + t - 1);
        depthwise_weight_row(g->dw, around, dd_row(s, at, p, start), s->W * s->up, s->Q, s->Cp, s->pitch, s->stride);
    }
}

/* Moves down d rows first .. end - 1 of image b: dx (or dz) of its rows, and the band's sums g. */
static void backward_band(const sepconv2d *s, int64_t b, int64_t first, int64_t end, const space *at, const sums *g)
{
    const int64_t W = s->W * s->up, unit = s->stride == 2 || s->up == 2 ? 2 : 1; /* rows of du that are made together */
    const int64_t start = s->stride == 1 ? vx_max64(first - 1, 0) : first, stop = vx_min64(end + 1, s->P);
    const int64_t last = vx_min64(end * s->stride, s->H * s->up); /* of the band's rows of du */
    int64_t made = first_n(s, first), done = first * s->stride;
    load_channels(s, b, at);
    for (int64_t p = start; p < stop; p += s->block) {
        const int64_t next = vx_min64(p + s->block, stop), own = vx_max64(p, first), own_end = vx_min64(next, end);
        const int64_t offset = (b * s->P + p) * s->Q * s->O, dd_rows = (p - start) % s->dd_ring * s->Q * s->pitch;
        const float *dy = s->factors == GEMM_F32 ? (float *)body_at(s->dy, offset) : at->y;
        if (dy == at->y) body_copy(at->y, s->dy, offset, (next - p) * s->Q * s->O, 1);
        /* The first product of a block prefetches dy; the next two prefetch the rows of x and dx that the block comes
         * to. */
        const float *fetch[3] = {0, (float *)body_at(s->x, (b * s->H + made) * s->W * s->C),
                                 (float *)body_at(s->dx, (b * s->H + done / s->up) * s->W * s->C)};
        for (int64_t j = 0; j < s->Cp; j += GEMM_COLUMNS) {
            const gemm_product q = {.segments = 1,
                                    .k = s->O,
                                    .a = {dy},
                                    .row_stride = s->O,
                                    .k_stride = 1,
                                    .b = {s->v + j},
                                    .b_stride = s->Cp,
                                    .c = at->dd + dd_rows + j,
                                    .c_stride = s->pitch,
                                    .alpha = 1,
                                    .beta = 0,
                                    .factors = s->factors,
                                    .fetch = fetch[vx_min64(j / GEMM_COLUMNS, 3) % 3]};
            VX_CPU(gemm_multiply)(&q, (next - p) * s->Q, (int)vx_min64(GEMM_COLUMNS, s->Cp - j));
        }
        round_factor(s, at->dd + dd_rows, (next - p) * s->Q * s->pitch);
        if (own < own_end) {
            made = make_block(s, b, own, own_end, made, at, s->norm);
            weight_gradients(s, b, own, own_end, start, dy + (own - p) * s->Q * s->O, at, g);
        }
        /* The rows of du that the rows of dd before `next` complete. */
        int64_t complete = next == s->P ? last : vx_min64(last, s->stride == 1 ? next - 1 : 2 * next - 2) / unit * unit;
        if (done >= complete) continue;
        make_du(s, done, complete, start, at);
        for (int64_t r = done; r < complete; r += s->up)
            finish_row(s, b, r / s->up, at->du + (r - done) * W * s->pitch, at, g->dz);
        done = complete;
    }
}

/* Makes the second half of group norm's gradient: from total (2,Cp), sums of dz and dz (x - mean) over image b, the
 * factors (2,Cp) of dx = scale dz - (x - mean) factor[0] - factor[1]. */
static void settle(const sepconv2d *s, int64_t b, const double *total, float *factor)
{
    const int64_t D = s->C / s->G;
    for (int64_t g = 0; g < s->G; g++) {
        const double rstd = s->rstd[b * s->G + g], share = rstd / ((double)(s->H * s->W) * (double)D);
        double plain = 0, along = 0;
        for (int64_t c = g * D; c < (g + 1) * D; c++)
            plain += s->gamma[c] * total[c], along += s->gamma[c] * total[s->Cp + c];
        for (int64_t c = g * D; c < (g + 1) * D; c++)
            factor[c] = (float)(along * share * rstd * rstd), factor[s->Cp + c] = (float)(plain * share);
    }
}

/* Turns dz into dx = scale dz - (x - mean) factor[0] - factor[1] + addend, in place, in rows first .. end - 1 of image
 * b; the last rows, which are in the cache, first. */
VX_INLINE void finish_norm_as(const sepconv2d *s, int64_t b, int64_t first, int64_t end, const float *factor,
                              const space *at, const int add)
{
    const int64_t C = s->C, Cp = s->Cp, count = s->W * C;
    const float *mean = at->channel, *scale = mean + 2 * Cp;
    for (int64_t i = b * s->H + end; i-- > b * s->H + first;) {
        const float *x = body_read(s->x, i * count, count, at->x);
        const float *addend = add ? body_read(s->addend, i * count, count, at->addend) : 0;
        const float *dz = body_read(s->dx, i * count, count, at->dx);
        float *dx = body_place(s->dx, i * count, at->dx);
        for (int64_t j = count - C; j >= 0; j -= C)
            for (int64_t c = 0; c < C; c += VX_LANES) {
                const int n = (int)vx_min64(VX_LANES, C - c);
                const vf of_x =
                    (vf_load_upto(x + j + c, n) - vf_load(mean + c)) * vf_load(factor + c) + vf_load(factor + Cp + c);
                vf g = vf_load(scale + c) * vf_load_upto(dz + j + c, n) - of_x;
                if (add) g += vf_load_upto(addend + j + c, n);
                vf_store_upto(dx + j + c, g, n);
            }
        body_write(s->dx, i * count, count, dx);
    }
}

/* Turns dz into dx by the copy for this call. */
static void finish_norm(const sepconv2d *s, int64_t b, int64_t first, int64_t end, const float *factor, const space *at)
{
    if (s->addend.data) finish_norm_as(s, b, first, end, factor, at, 1);
    else finish_norm_as(s, b, first, end, factor, at, 0);
}

/* Turns dz of band k of image b into dx; the sums of all its bands are complete. */
static void finish_band(const sepconv2d *s, int64_t b, int64_t k, const bands *all, const space *at)
{
    if (s->Cp == 0) return;
    double total[2 * s->Cp];
    float factor[2 * s->Cp];
    memset(total, 0, sizeof total);
    memset(factor, 0, sizeof factor);
    for (int64_t other = 0; other < s->bands; other++) {
        const double *dz = band_sums(s, all, b * s->bands + other).dz;
        for (int64_t c = 0; c < 2 * s->Cp; c++) total[c] += dz[c];
    }
    settle(s, b, total, factor);
    load_channels(s, b, at);
    const int64_t rows = s->band * s->stride / s->up;
    finish_norm(s, b, k * rows, vx_min64((k + 1) * rows, s->H), factor, at);
}

/* Adds the sums of all bands up into the outputs; the first band's are overwritten. */
static void add_bands(const sepconv2d *s, const bands *all, float *dw, float *dv, float *dbias, float *dgamma,
                      float *dbeta)
{
    const int64_t C = s->C, Cp = s->Cp, floats = 10 * s->pitch + s->O * Cp + s->O;
    const sums g = band_sums(s, all, 0);
    for (int64_t task = 1; task < all->tasks; task++) {
        const float *other = all->floats + task * all->each;
        for (int64_t i = 0; i < floats; i++) g.dw[i] += other[i];
    }
    for (int64_t i = 0; i < 9; i++) memcpy(dw + i * C, g.dw + i * s->pitch, sizeof(float) * (size_t)C);
    for (int64_t o = 0; o < s->O; o++) memcpy(dv + o * C, g.dv + o * Cp, sizeof(float) * (size_t)C);
    if (dbias) memcpy(dbias, g.dbias, sizeof(float) * (size_t)s->O);
    for (int64_t c = 0; s->norm && c < C; c++) {
        double plain = 0, along = 0;
        for (int64_t task = 0; task < all->tasks; task++) {
            const double *dz = all->dz + task * 2 * Cp;
            plain += dz[c];
            along += dz[Cp + c] * s->rstd[task / s->bands * s->G + c / (C / s->G)];
        }
        dbeta[c] = (float)plain, dgamma[c] = (float)along;
    }
}

int VX_CPU(sepconv2d_backward)(vx_tensor *dx, vx_tensor *dgamma, vx_tensor *dbeta, vx_tensor *dw, vx_tensor *dv,
                               vx_tensor *dbias, vx_tensor *dy, vx_tensor *x, vx_tensor *gamma, vx_tensor *beta,
                               vx_tensor *mean, vx_tensor *rstd, vx_tensor *w, vx_tensor *v, vx_tensor *addend, int act,
                               float eps, int stride, int up)
{
    sepconv2d s = {.act = act,
                   .eps = eps,
                   .stride = stride,
                   .up = up,
                   .dy = body_of(dy),
                   .dx = body_of(dx),
                   .addend = body_of(addend)};
    if (describe(&s, "sepconv2d_backward", x, dy, gamma, beta, mean, rstd)) return VX_EINVAL;
    if (s.norm && (!dgamma || !dbeta))
        return vx_fail(VX_EINVAL, "sepconv2d_backward: dgamma and dbeta must be there with gamma");
    if (check_one_dtype("sepconv2d_backward", "dx", dx, "x", x)) return VX_EINVAL;
    if (addend && check_one_dtype("sepconv2d_backward", "addend", addend, "x", x)) return VX_EINVAL;
    const int threads = omp_get_max_threads();
    space spaces[threads];
    bands all = {0};
    scratch memory = {.op = "sepconv2d_backward"};
    while (scratch_pass(&memory)) {
        carve_bands(&memory, &s, &all);
        s.w = carve_f32(&memory, 9 * s.pitch);
        s.v = carve_f32(&memory, s.O * s.Cp);
        for (int i = 0; i < threads; i++) carve_space(&memory, &s, &spaces[i], 1);
    }
    if (!memory.base) return VX_ENOMEM;
    memset(all.floats, 0, sizeof(float) * (size_t)(all.tasks * all.each));
    memset(all.dz, 0, sizeof(double) * (size_t)(all.tasks * 2 * s.Cp));
    pad_rows(s.w, vx_f32(w), 9, s.C, s.pitch);
    pad_rows(s.v, vx_f32(v), s.O, s.C, s.Cp);
    round_factor(&s, s.v, s.O * s.Cp);
#pragma omp parallel num_threads(threads)
    {
        const space mine = spaces[omp_get_thread_num()];
        memset(mine.zeros, 0, sizeof(float) * (size_t)(vx_max64(s.W * s.up, s.Q) * s.pitch));
#pragma omp for schedule(static)
        for (int64_t task = 0; task < all.tasks; task++) {
            const int64_t b = task / s.bands, k = task % s.bands;
            const sums own = band_sums(&s, &all, task);
            backward_band(&s, b, k * s.band, vx_min64((k + 1) * s.band, s.P), &mine, &own);
            if (s.norm && s.bands == 1) finish_band(&s, b, 0, &all, &mine);
        }
        if (s.norm && s.bands > 1)
#pragma omp for schedule(static)
            for (int64_t task = 0; task < all.tasks; task++)
                finish_band(&s, task / s.bands, task % s.bands, &all, &mine);
    }
    add_bands(&s, &all, vx_f32(dw), vx_f32(dv), vx_f32(dbias), vx_f32(dgamma), vx_f32(dbeta));
    scratch_free(&memory);
    return VX_OK;
}
