/* separable.c: a depthwise-separable convolution [1] with what stands around it in our networks, as one op:
 *
 *   n = act(group_norm(x))       where gamma is given, else x
 *   u = n enlarged twofold       where up is 2
 *   d = depthwise3x3(u, w)       stride 1 or 2
 *   y = d vT + bias + residual   the pointwise convolution
 *
 * Each of these alone is bound by memory: at 64 x 64 pixels and 64 channels a batch of 16 is 17 MB, and an op that reads and writes
 * it moves twice that. But nothing couples two images before the sums over the batch, and one image is 1 MB. So
 * a thread takes an image through all steps, and within the image a strip of rows whose arrays fit the L2 together. Only x, y and
 * their gradients travel: 3 passes over memory instead of 8 forward, 7 instead of 17 backward. n, u and d are not stored; the
 * backward pass makes them again (a sixth of its multiply-adds).
 *
 * The steps are the other kernels, called on a strip with the rows around it that the 3x3 window needs; the outputs of those rows,
 * wrong at a strip's edge where the kernels pad with zeros, are not used. Inside a parallel region the kernels find themselves alone
 * and run on one thread. With fewer images than threads the images run one after another and the steps share the threads. Gradients
 * of weights are summed strip by strip within an image, and the images' sums added in order: the bits depend on the sizes alone.
 *
 * [1] Chollet 2017, Xception.
 */
#include <omp.h>
#include <string.h>

#include "norm.h"
#include "vec.h"

/* A contiguous tensor over memory of ours, for calling a kernel. */
static vx_tensor over(float *data, int ndim, const int64_t *shape)
{
    vx_tensor x = {.data = (char *)data, .dtype = VX_F32, .ndim = ndim, .contiguous = true, .numel = 1};
    for (int i = ndim - 1; i >= 0; i--) {
        x.shape[i] = shape[i];
        x.stride[i] = x.numel;
        x.numel *= shape[i];
    }
    return x;
}

#define OVER(data, ...) over(data, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]){__VA_ARGS__})

/* The last two dimensions exchanged. */
static vx_tensor transposed(vx_tensor x)
{
    const int a = x.ndim - 2, b = x.ndim - 1;
    const int64_t size = x.shape[a], stride = x.stride[a];
    x.shape[a] = x.shape[b], x.stride[a] = x.stride[b];
    x.shape[b] = size, x.stride[b] = stride;
    x.contiguous = false;
    return x;
}

enum { STRIP_FLOATS = 1 << 18 }; /* of all arrays of a strip together: 1 MiB, half of an L2 of today */

typedef struct separable {
    int64_t B, H, W, C, P, Q, O, G;
    int act, stride, up;
    float eps;
    float *x, *gamma, *beta, *w, *v, *bias, *residual, *y, *mean, *rstd;
    int64_t strip; /* rows of x in a strip; even, or all of them */
} separable;

static int describe(separable *s, const char *op, const vx_tensor *x, const vx_tensor *y, const vx_tensor *gamma, const vx_tensor *beta,
                    const vx_tensor *mean, const vx_tensor *rstd)
{
    const int given = (gamma != 0) + (beta != 0) + (mean != 0) + (rstd != 0);
    if (given != 0 && given != 4) return vx_fail(VX_EINVAL, "%s: gamma, beta, mean and rstd must all be there or none", op);
    s->B = x->shape[0], s->H = x->shape[1], s->W = x->shape[2], s->C = x->shape[3];
    s->P = y->shape[1], s->Q = y->shape[2], s->O = y->shape[3], s->G = mean ? mean->shape[1] : 1;
    s->x = vx_f32(x), s->gamma = vx_f32(gamma), s->beta = vx_f32(beta), s->mean = vx_f32(mean), s->rstd = vx_f32(rstd);
    /* a row of x is a row of n, up^2 of u and of du, up^2 / stride^2 of d and twice of dd */
    const int64_t row = s->W * s->C * (1 + 2 * s->up * s->up + 3 * s->up * s->up / (s->stride * s->stride));
    s->strip = vx_max64(STRIP_FLOATS / row / 2 * 2 - 2, 8);
    if (s->strip + 4 >= s->H) s->strip = s->H;
    return VX_OK;
}

/* The rows a strip touches: x rows first .. end - 1 give d rows p0 .. p1 - 1 of its own. From rows i0 .. i1 - 1 of x the depthwise
 * kernel makes `made` d rows from d0 on: the strip's own, right to the last bit, and the neighbours' that the gradient of its x rows
 * depends on. */
typedef struct strip {
    int64_t first, end, p0, p1, i0, i1, d0, made;
} strip;

static strip strip_at(const separable *s, int64_t first)
{
    const int64_t up = s->up, stride = s->stride, rows = s->H * up; /* of u */
    strip t = {.first = first, .end = vx_min64(first + s->strip, s->H)};
    t.p0 = t.first * up / stride;
    t.p1 = t.end == s->H ? s->P : t.end * up / stride;
    t.i0 = vx_max64(t.p0 * stride - stride, 0) / up;
    t.i1 = vx_min64(vx_ceil_div(vx_min64(t.p1 * stride + stride, rows), up), s->H);
    t.d0 = t.i0 * up / stride;
    t.made = vx_ceil_div((t.i1 - t.i0) * up, stride);
    return t;
}

/* A thread's working space for one strip. */
typedef struct space {
    float *n, *u, *d, *dd, *du, *channel, *dw;
} space;

static int64_t space_floats(const separable *s, space *at, float *p)
{
    const int64_t rows = vx_min64(s->strip + 4, s->H), C = s->C, u = rows * s->up * s->up * s->W * C;
    const int64_t d = (rows * s->up / s->stride + 3) * s->Q * C;
    float *start = p;
    at->n = p, p += s->gamma ? rows * s->W * C : 0;
    at->u = p, p += s->up == 2 ? u : 0;
    at->d = p, p += d;
    at->dd = p, p += d;
    at->du = p, p += s->up == 2 ? u : 2 * s->W * C;
    at->channel = p, p += 2 * C + 2 * s->G;
    at->dw = p, p += 9 * C;
    return vx_ceil_div(p - start, 16) * 16;
}

/* d rows t.d0 .. of image b, and what the depthwise convolution saw: (i1 - i0) up rows of n, u or x itself. */
static int up_to_depthwise(const separable *s, int64_t b, const strip *t, const float *mean, const float *rstd, const space *at, float **seen)
{
    const int64_t W = s->W, C = s->C, rows = t->i1 - t->i0;
    *seen = s->x + (b * s->H + t->i0) * W * C;
    if (s->gamma) {
        VX_CPU(group_apply)(at->n, *seen, s->gamma, s->beta, mean, rstd, at->channel, rows * W, C, s->G, s->act);
        *seen = at->n;
    }
    int status = VX_OK;
    if (s->up == 2) {
        vx_tensor small = OVER(*seen, 1, rows, W, C), large = OVER(at->u, 1, 2 * rows, 2 * W, C);
        status = VX_CPU(upsample2x)(&large, &small);
        *seen = at->u;
    }
    vx_tensor in = OVER(*seen, 1, rows * s->up, W * s->up, C), w = OVER(s->w, 3, 3, C), d = OVER(at->d, 1, t->made, s->Q, C);
    return status ? status : VX_CPU(depthwise3x3)(&d, &in, &w, 0, s->stride);
}

static int forward_image(const separable *s, int64_t b, const space *at)
{
    const int64_t Q = s->Q, C = s->C, O = s->O;
    float *mean = s->mean + b * s->G, *rstd = s->rstd + b * s->G, *seen;
    vx_tensor right = transposed(OVER(s->v, 1, O, C)), bias = OVER(s->bias, O);
    int status = s->gamma ? VX_CPU(group_statistics)(mean, rstd, s->x + b * s->H * s->W * C, s->H * s->W, C, s->G, s->eps) : VX_OK;
    for (int64_t first = 0; !status && first < s->H; first += s->strip) {
        const strip t = strip_at(s, first);
        const int64_t count = (t.p1 - t.p0) * Q, offset = (b * s->P + t.p0) * Q * O;
        status = up_to_depthwise(s, b, &t, mean, rstd, at, &seen);
        if (s->residual) memcpy(s->y + offset, s->residual + offset, sizeof(float) * (size_t)(count * O));
        vx_tensor y = OVER(s->y + offset, 1, count, O), left = OVER(at->d + (t.p0 - t.d0) * Q * C, 1, count, C);
        if (!status) status = VX_CPU(gemm)(&y, &left, &right, s->bias ? &bias : 0, 1, s->residual ? 1 : 0);
    }
    return status;
}

/* Threads that take an image each; 1 where the steps share the threads instead. */
static int image_threads(const separable *s) { return s->B >= omp_get_max_threads() ? omp_get_max_threads() : 1; }

int VX_CPU(separable)(vx_tensor *y, vx_tensor *mean, vx_tensor *rstd, vx_tensor *x, vx_tensor *gamma, vx_tensor *beta, vx_tensor *w,
                      vx_tensor *v, vx_tensor *bias, vx_tensor *residual, int act, float eps, int stride, int up)
{
    separable s = {.act = act, .eps = eps, .stride = stride, .up = up, .w = vx_f32(w), .v = vx_f32(v), .bias = vx_f32(bias),
                   .residual = vx_f32(residual), .y = vx_f32(y)};
    if (describe(&s, "separable", x, y, gamma, beta, mean, rstd)) return VX_EINVAL;
    space at;
    const int threads = image_threads(&s);
    const int64_t floats = space_floats(&s, &at, 0);
    float *scratch = vx_scratch("separable", sizeof(float) * (size_t)(threads * floats));
    if (!scratch) return VX_ENOMEM;
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(|| : failed)
    for (int64_t b = 0; b < s.B; b++) {
        space mine;
        space_floats(&s, &mine, scratch + omp_get_thread_num() * floats);
        failed = forward_image(&s, b, &mine) || failed;
    }
    vx_scratch_free(scratch);
    return failed ? vx_fail(VX_ENOMEM, "separable: out of memory") : VX_OK;
}

/* -- Backward -------------------------------------------------------------------------------------------------------------------- */

/* Sums of one image, in this order: dw (3,3,C), dv (O,C), dbias (O), dgamma (C), dbeta (C). */
typedef struct gradients {
    float *dw, *dv, *dbias, *dgamma, *dbeta;
} gradients;

static int64_t gradient_floats(const separable *s) { return 9 * s->C + s->O * s->C + s->O + 2 * s->C; }

static gradients gradients_at(const separable *s, float *p)
{
    gradients g = {.dw = p};
    g.dv = g.dw + 9 * s->C;
    g.dbias = g.dv + s->O * s->C;
    g.dgamma = g.dbias + s->O;
    g.dbeta = g.dgamma + s->C;
    return g;
}

/* sum (C) = or += the rows of x (count,C). A strip is short: float32 keeps seven digits. */
static void add_rows(float *sum, const float *x, int64_t count, int64_t C, int fresh)
{
    for (int64_t c = 0; c < C; c += 4 * VX_LANES) {
        vf total[4];
        for (int v = 0; v < 4; v++) total[v] = vf_zero();
        for (int64_t i = 0; i < count; i++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) {
                const int64_t left = C - c - v * VX_LANES;
                if (left >= VX_LANES) total[v] += vf_load(x + i * C + c + v * VX_LANES);
                else if (left > 0) total[v] += vf_load_n(x + i * C + c + v * VX_LANES, (int)left);
            }
        for (int v = 0; v < 4; v++) {
            float *to = sum + c + v * VX_LANES;
            const int n = (int)vx_max64(vx_min64(C - c - v * VX_LANES, VX_LANES), 0);
            if (n) vf_store_n(to, fresh ? total[v] : total[v] + vf_load_n(to, n), n);
        }
    }
}

/* One strip: the gradient of n (or of x, without norm) into dn (image b's rows of dx), the weights' sums into g. */
static int backward_strip(const separable *s, int64_t b, const strip *t, const float *dy, float *dn, gradients g, const float *mean,
                          const float *rstd, const space *at)
{
    const int64_t W = s->W, C = s->C, Q = s->Q, O = s->O, up = s->up, row = Q * C, count = (t->p1 - t->p0) * Q;
    float *seen, *own = (float *)dy + (b * s->P + t->p0) * Q * O;
    add_rows(g.dbias, own, count, O, t->first == 0);
    int status = up_to_depthwise(s, b, t, mean, rstd, at, &seen);

    vx_tensor across = transposed(OVER(own, 1, count, O)), d = OVER(at->d + (t->p0 - t->d0) * row, 1, count, C), dv = OVER(g.dv, 1, O, C);
    if (!status) status = VX_CPU(gemm)(&dv, &across, &d, 0, 1, t->first ? 1 : 0);

    vx_tensor dy_made = OVER((float *)dy + (b * s->P + t->d0) * Q * O, 1, t->made * Q, O), v = OVER(s->v, 1, O, C);
    vx_tensor dd_flat = OVER(at->dd, 1, t->made * Q, C), dd = OVER(at->dd, 1, t->made, Q, C), w = OVER(s->w, 3, 3, C);
    if (!status) status = VX_CPU(gemm)(&dd_flat, &dy_made, &v, 0, 1, 0);

    /* Rows i0 up .. i1 up - 1 of du. Without enlargement they are written where they belong: the rows before the strip's own, made by
     * the strip before, are put back, and those after it the next strip makes. */
    const int64_t made = (t->i1 - t->i0) * up, before = (t->first - t->i0) * W * C;
    vx_tensor du = OVER(up == 2 ? at->du : dn + t->i0 * W * C, 1, made, W * up, C);
    if (up == 1) memcpy(at->du, dn + t->i0 * W * C, sizeof(float) * (size_t)before);
    if (!status) status = VX_CPU(depthwise3x3_backward_input)(&du, &dd, &w, s->stride);
    if (up == 1) memcpy(dn + t->i0 * W * C, at->du, sizeof(float) * (size_t)before);
    if (!status && up == 2) {
        vx_tensor large = OVER(at->du + 4 * before, 1, (t->end - t->first) * 2, W * 2, C);
        vx_tensor small = OVER(dn + t->first * W * C, 1, t->end - t->first, W, C);
        status = VX_CPU(upsample2x_backward)(&small, &large);
    }

    /* dw from the strip's own d rows; the neighbours' count there */
    memset(at->dd, 0, sizeof(float) * (size_t)((t->p0 - t->d0) * row));
    memset(at->dd + (t->p1 - t->d0) * row, 0, sizeof(float) * (size_t)((t->made - (t->p1 - t->d0)) * row));
    vx_tensor in = OVER(seen, 1, made, W * up, C), dw = OVER(at->dw, 3, 3, C);
    if (!status) status = VX_CPU(depthwise3x3_backward_weight)(&dw, 0, &in, &dd, s->stride);
    for (int64_t i = 0; i < 9 * C; i++) g.dw[i] = t->first ? g.dw[i] + at->dw[i] : at->dw[i];
    return status;
}

static int backward_image(const separable *s, int64_t b, const float *dy, float *dx, gradients g, const space *at)
{
    const int64_t S = s->H * s->W, C = s->C;
    const float *mean = s->mean + b * s->G, *rstd = s->rstd + b * s->G;
    float *dx_b = dx + b * S * C;
    int status = VX_OK;
    for (int64_t first = 0; !status && first < s->H; first += s->strip) {
        const strip t = strip_at(s, first);
        status = backward_strip(s, b, &t, dy, dx_b, g, mean, rstd, at);
    }
    if (!status && s->gamma) { /* in place: dx_b holds dn */
        vx_tensor to = OVER(dx_b, 1, S, C), x = OVER(s->x + b * S * C, 1, S, C), gamma = OVER(s->gamma, C), beta = OVER(s->beta, C);
        vx_tensor dgamma = OVER(g.dgamma, C), dbeta = OVER(g.dbeta, C), m = OVER((float *)mean, 1, s->G), r = OVER((float *)rstd, 1, s->G);
        status = VX_CPU(group_norm_backward)(&to, &dgamma, &dbeta, &to, &x, &gamma, &beta, &m, &r, s->act);
    }
    return status;
}

int VX_CPU(separable_backward)(vx_tensor *dx, vx_tensor *dgamma, vx_tensor *dbeta, vx_tensor *dw, vx_tensor *dv, vx_tensor *dbias,
                               vx_tensor *dy, vx_tensor *x, vx_tensor *gamma, vx_tensor *beta, vx_tensor *mean, vx_tensor *rstd,
                               vx_tensor *w, vx_tensor *v, int act, float eps, int stride, int up)
{
    separable s = {.act = act, .eps = eps, .stride = stride, .up = up, .w = vx_f32(w), .v = vx_f32(v)};
    if (describe(&s, "separable_backward", x, dy, gamma, beta, mean, rstd)) return VX_EINVAL;
    if (s.gamma && (!dgamma || !dbeta)) return vx_fail(VX_EINVAL, "separable_backward: dgamma and dbeta must be there with gamma");
    space at;
    const int threads = image_threads(&s);
    const int64_t floats = space_floats(&s, &at, 0), sums = gradient_floats(&s);
    float *scratch = vx_scratch("separable_backward", sizeof(float) * (size_t)(threads * floats));
    float *partial = scratch ? vx_scratch("separable_backward", sizeof(float) * (size_t)(vx_max64(s.B, 1) * sums)) : 0;
    if (!partial) {
        vx_scratch_free(scratch);
        return VX_ENOMEM;
    }
    int failed = 0;
    if (s.B == 0) memset(partial, 0, sizeof(float) * (size_t)sums);
#pragma omp parallel for schedule(static) num_threads(threads) reduction(|| : failed)
    for (int64_t b = 0; b < s.B; b++) {
        space mine;
        space_floats(&s, &mine, scratch + omp_get_thread_num() * floats);
        failed = backward_image(&s, b, vx_f32(dy), vx_f32(dx), gradients_at(&s, partial + b * sums), &mine) || failed;
    }
    for (int64_t b = 1; b < s.B; b++)
        for (int64_t i = 0; i < sums; i++) partial[i] += partial[b * sums + i];
    const gradients total = gradients_at(&s, partial);
    memcpy(vx_f32(dw), total.dw, sizeof(float) * (size_t)(9 * s.C));
    memcpy(vx_f32(dv), total.dv, sizeof(float) * (size_t)(s.O * s.C));
    if (dbias) memcpy(vx_f32(dbias), total.dbias, sizeof(float) * (size_t)s.O);
    if (s.gamma) {
        memcpy(vx_f32(dgamma), total.dgamma, sizeof(float) * (size_t)s.C);
        memcpy(vx_f32(dbeta), total.dbeta, sizeof(float) * (size_t)s.C);
    }
    vx_scratch_free(partial);
    vx_scratch_free(scratch);
    return failed ? vx_fail(VX_ENOMEM, "separable_backward: out of memory") : VX_OK;
}
