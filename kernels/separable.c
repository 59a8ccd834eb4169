/* separable.c: a depthwise-separable convolution [1] with what stands around it in our networks, as one op:
 *
 *   n = act(group_norm(x))       where gamma is given, else x
 *   u = n enlarged twofold       where up is 2
 *   d = depthwise3x3(u, w)       stride 1 or 2
 *   y = d vT + bias + residual   the pointwise convolution
 *
 * Each of these alone is bound by memory: at 64 x 64 pixels and 64 channels a batch of 16 is 17 MB, and an op that reads and writes
 * it moves twice that. But nothing couples two images before the sums over the batch, and one image (1 MB) stays in a core's L2. So
 * a thread takes an image through all steps, and only x, y and their gradients travel: 3 passes over memory instead of 8 forward,
 * 4 instead of 17 backward. n, u and d are not stored; the backward pass makes them again (a sixth of its multiply-adds).
 *
 * The steps are the other kernels, called on one image; inside a parallel region they find themselves alone and run on one thread.
 * With fewer images than threads the images run one after another and the steps share the threads. Gradients of weights are summed
 * per image, and the images' sums added in order, so the bits depend on neither.
 *
 * [1] Chollet 2017, Xception.
 */
#include <omp.h>
#include <string.h>

#include "cpu.h"

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

typedef struct separable {
    int64_t B, H, W, C, P, Q, O, G, U; /* U: pixels that the depthwise convolution sees */
    int act, stride, up;
    float eps;
    float *x, *gamma, *beta, *w, *v, *bias, *residual, *y, *mean, *rstd;
} separable;

static int describe(separable *s, const char *op, const vx_tensor *x, const vx_tensor *y, const vx_tensor *gamma, const vx_tensor *beta,
                    const vx_tensor *mean, const vx_tensor *rstd)
{
    const int given = (gamma != 0) + (beta != 0) + (mean != 0) + (rstd != 0);
    if (given != 0 && given != 4) return vx_fail(VX_EINVAL, "%s: gamma, beta, mean and rstd must all be there or none", op);
    s->B = x->shape[0], s->H = x->shape[1], s->W = x->shape[2], s->C = x->shape[3];
    s->P = y->shape[1], s->Q = y->shape[2], s->O = y->shape[3], s->G = mean ? mean->shape[1] : 1;
    s->U = s->H * s->W * s->up * s->up;
    s->x = vx_f32(x), s->gamma = vx_f32(gamma), s->beta = vx_f32(beta), s->mean = vx_f32(mean), s->rstd = vx_f32(rstd);
    return VX_OK;
}

/* d of image b, and what the depthwise convolution saw (n, u or x itself). n and u have room for H W C and U C floats, mean_b and
 * rstd_b (G) for the statistics. */
static int up_to_depthwise(const separable *s, int64_t b, float *mean_b, float *rstd_b, float *n, float *u, float *d, float **seen)
{
    const int64_t H = s->H, W = s->W, C = s->C;
    vx_tensor x = OVER(s->x + b * H * W * C, 1, H, W, C), w = OVER(s->w, 3, 3, C), out = OVER(d, 1, s->P, s->Q, C);
    int status = VX_OK;
    if (s->gamma) {
        vx_tensor flat = OVER(s->x + b * H * W * C, 1, H * W, C), to = OVER(n, 1, H * W, C), gamma = OVER(s->gamma, C),
                  beta = OVER(s->beta, C), mean = OVER(mean_b, 1, s->G), rstd = OVER(rstd_b, 1, s->G);
        status = VX_CPU(group_norm)(&to, &mean, &rstd, &flat, &gamma, &beta, s->act, s->eps);
        x = OVER(n, 1, H, W, C);
    }
    if (!status && s->up == 2) {
        vx_tensor large = OVER(u, 1, 2 * H, 2 * W, C);
        status = VX_CPU(upsample2x)(&large, &x);
        x = large;
    }
    *seen = (float *)x.data;
    return status ? status : VX_CPU(depthwise3x3)(&out, &x, &w, 0, s->stride);
}

static int forward_image(const separable *s, int64_t b, float *n, float *u, float *d)
{
    const int64_t S = s->P * s->Q, C = s->C, O = s->O;
    float *seen, *to = s->y + b * S * O;
    int status = up_to_depthwise(s, b, s->mean + b * s->G, s->rstd + b * s->G, n, u, d, &seen);
    if (status) return status;
    if (s->residual) memcpy(to, s->residual + b * S * O, sizeof(float) * (size_t)(S * O));
    vx_tensor y = OVER(to, 1, S, O), left = OVER(d, 1, S, C), right = transposed(OVER(s->v, 1, O, C)), bias = OVER(s->bias, O);
    return VX_CPU(gemm)(&y, &left, &right, s->bias ? &bias : 0, 1, s->residual ? 1 : 0);
}

/* Scratch of `count` threads, `floats` each; slots lie a cache line apart. */
static float *slots(const char *op, int count, int64_t *floats)
{
    *floats = vx_ceil_div(*floats, 16) * 16;
    return vx_scratch(op, sizeof(float) * (size_t)(count * *floats));
}

int VX_CPU(separable)(vx_tensor *y, vx_tensor *mean, vx_tensor *rstd, vx_tensor *x, vx_tensor *gamma, vx_tensor *beta, vx_tensor *w,
                      vx_tensor *v, vx_tensor *bias, vx_tensor *residual, int act, float eps, int stride, int up)
{
    separable s = {.act = act, .eps = eps, .stride = stride, .up = up, .w = vx_f32(w), .v = vx_f32(v), .bias = vx_f32(bias),
                   .residual = vx_f32(residual), .y = vx_f32(y)};
    if (describe(&s, "separable", x, y, gamma, beta, mean, rstd)) return VX_EINVAL;
    const int threads = s.B >= omp_get_max_threads() ? omp_get_max_threads() : 1;
    const int64_t n = s.gamma ? s.H * s.W * s.C : 0, u = up == 2 ? s.U * s.C : 0;
    int64_t floats = n + u + s.P * s.Q * s.C;
    float *scratch = slots("separable", threads, &floats);
    if (!scratch) return VX_ENOMEM;
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(|| : failed)
    for (int64_t b = 0; b < s.B; b++) {
        float *mine = scratch + omp_get_thread_num() * floats;
        failed = forward_image(&s, b, mine, mine + n, mine + n + u) || failed;
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

/* dx and the sums of image b. n (H W C), u (U C), d and dd (P Q C), du (U C), again (2 G) are scratch; n's turns into dn. */
static int backward_image(const separable *s, int64_t b, const float *dy, float *dx, gradients g, float *n, float *u, float *d,
                          float *dd, float *du, float *again)
{
    const int64_t H = s->H, W = s->W, C = s->C, P = s->P, Q = s->Q, S = P * Q, O = s->O;
    float *seen, *dx_b = dx + b * H * W * C, *dn = s->gamma ? n : dx_b;
    int status = up_to_depthwise(s, b, again, again + s->G, n, u, d, &seen);
    vx_tensor dy_b = OVER((float *)dy + b * S * O, 1, S, O), dy_rows = OVER((float *)dy + b * S * O, S, O), v = OVER(s->v, 1, O, C);
    vx_tensor w = OVER(s->w, 3, 3, C), depth = OVER(d, 1, S, C), flat = OVER(dd, 1, S, C), grid = OVER(dd, 1, P, Q, C);
    vx_tensor input = OVER(seen, 1, H * s->up, W * s->up, C), dv = OVER(g.dv, 1, O, C), dbias = OVER(g.dbias, 1, O), dw = OVER(g.dw, 3, 3, C);
    vx_tensor across = transposed(dy_b);
    if (!status) status = VX_CPU(gemm)(&dv, &across, &depth, 0, 1, 0);
    if (!status) status = VX_CPU(reduce)(&dbias, &dy_rows, VX_REDUCE_SUM);
    if (!status) status = VX_CPU(gemm)(&flat, &dy_b, &v, 0, 1, 0);
    if (!status) status = VX_CPU(depthwise3x3_backward_weight)(&dw, 0, &input, &grid, s->stride);
    vx_tensor dinput = OVER(s->up == 2 ? du : dn, 1, H * s->up, W * s->up, C);
    if (!status) status = VX_CPU(depthwise3x3_backward_input)(&dinput, &grid, &w, s->stride);
    if (!status && s->up == 2) {
        vx_tensor small = OVER(dn, 1, H, W, C);
        status = VX_CPU(upsample2x_backward)(&small, &dinput);
    }
    if (!status && s->gamma) {
        vx_tensor to = OVER(dx_b, 1, H * W, C), from = OVER(dn, 1, H * W, C), x = OVER(s->x + b * H * W * C, 1, H * W, C);
        vx_tensor gamma = OVER(s->gamma, C), beta = OVER(s->beta, C), dgamma = OVER(g.dgamma, C), dbeta = OVER(g.dbeta, C);
        vx_tensor mean = OVER(s->mean + b * s->G, 1, s->G), rstd = OVER(s->rstd + b * s->G, 1, s->G);
        status = VX_CPU(group_norm_backward)(&to, &dgamma, &dbeta, &from, &x, &gamma, &beta, &mean, &rstd, s->act);
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
    const int threads = s.B >= omp_get_max_threads() ? omp_get_max_threads() : 1;
    const int64_t n = s.gamma ? s.H * s.W * s.C : 0, u = up == 2 ? s.U * s.C : 0, d = s.P * s.Q * s.C, sums = gradient_floats(&s);
    int64_t floats = n + 2 * u + 2 * d + 2 * s.G;
    float *scratch = slots("separable_backward", threads, &floats);
    float *partial = scratch ? vx_scratch("separable_backward", sizeof(float) * (size_t)(vx_max64(s.B, 1) * sums)) : 0;
    if (!partial) {
        vx_scratch_free(scratch);
        return VX_ENOMEM;
    }
    int failed = 0;
    if (s.B == 0) memset(partial, 0, sizeof(float) * (size_t)sums);
#pragma omp parallel for schedule(static) num_threads(threads) reduction(|| : failed)
    for (int64_t b = 0; b < s.B; b++) {
        float *mine = scratch + omp_get_thread_num() * floats;
        failed = backward_image(&s, b, vx_f32(dy), vx_f32(dx), gradients_at(&s, partial + b * sums), mine, mine + n, mine + n + u,
                                mine + n + u + d, mine + n + u + 2 * d, mine + n + 2 * u + 2 * d) ||
                 failed;
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
