/* softmax.c: softmax or log softmax along rows, and their gradients from the output; recorded for
 * gradients in lua/vertex/ops/norm.lua.
 *
 * Memory traffic: x and y once, where a row stays in the cache between its passes (maximum; exponentials and their sum;
 * scale).
 *
 *   y = e^(x - max) / sum              dx = y (dy - sum(dy y))
 *   y = x - max - ln(sum)              dx = dy - e^y sum(dy)
 * Subtracting the maximum keeps every exponential in (0, 1]. A row with a NaN or +Inf becomes all NaN, and so does a
 * row of nothing but -Inf; single -Inf get probability 0.
 */
#include "cpu/cpu.h"
#include "cpu/simd.h"

#define FLOAT_RUN (32 * VX_LANES) /* elements summed in four float32 vectors before their sum goes into a double */
#define SERIAL 8192               /* below this many elements a second thread costs more than it brings */

/* Returns the largest of n elements; NaN does not count. */
static float row_maximum(const float *x, int64_t n)
{
    vf top = vf_set1(-INFINITY);
    int64_t i = 0;
    for (; i + VX_LANES <= n; i += VX_LANES) top = vf_max(top, vf_load(x + i));
    float m = vf_maximum(top);
    for (; i < n; i++) m = m > x[i] ? m : x[i];
    return m;
}

/* Returns a mask of the first n lanes. */
static inline vi first_lanes(int n)
{
    vi lane;
    for (int i = 0; i < VX_LANES; i++) lane[i] = i;
    return lane < n;
}

/* Returns the sum of e^(x - top). The terms go to y unless it is NULL. */
VX_INLINE double exponentials(float *y, const float *x, float top, int64_t n)
{
    double total = 0;
    for (int64_t first = 0; first < n; first += FLOAT_RUN) {
        int64_t end = vx_min64(first + FLOAT_RUN, n), i = first;
        vf sum[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
        for (; i + 4 * VX_LANES <= end; i += 4 * VX_LANES)
            for (int k = 0; k < 4; k++) {
                vf e = vf_exp(vf_load(x + i + k * VX_LANES) - top);
                if (y) vf_store(y + i + k * VX_LANES, e);
                sum[k] += e;
            }
        for (; i < end; i += VX_LANES) {
            int rest = (int)vx_min64(VX_LANES, end - i);
            vf e = vf_exp(vf_load_n(x + i, rest) - top);
            if (y) vf_store_n(y + i, e, rest);
            sum[0] += vf_select(first_lanes(rest), e, vf_zero());
        }
        total += vf_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    return total;
}

/* Computes y = softmax(x) per row of (N,C), its logarithm where log is 1. y may not be x. */
int VX_CPU(softmax)(vx_tensor *y, vx_tensor *x, int log)
{
    int64_t rows = x->shape[0], n = x->shape[1];
    const float *in = vx_f32(x);
    float *out = vx_f32(y);
#pragma omp parallel for schedule(static) if (rows * n >= SERIAL)
    for (int64_t r = 0; r < rows; r++) {
        const float *a = in + r * n;
        float *b = out + r * n, top = row_maximum(a, n);
        int64_t i = 0;
        if (log) {
            /* max and ln(sum) apart: their sum would lose digits where |max| is large */
            float offset = logf((float)exponentials(0, a, top, n));
            for (; i + VX_LANES <= n; i += VX_LANES) vf_store(b + i, (vf_load(a + i) - top) - offset);
            for (; i < n; i++) b[i] = (a[i] - top) - offset;
        } else {
            float scale = (float)(1.0 / exponentials(b, a, top, n));
            for (; i + VX_LANES <= n; i += VX_LANES) vf_store(b + i, vf_load(b + i) * scale);
            for (; i < n; i++) b[i] *= scale;
        }
    }
    return VX_OK;
}

/* Returns the sum of a b, or of a where b is NULL. */
VX_INLINE double dot(const float *a, const float *b, int64_t n)
{
    double total = 0;
    for (int64_t first = 0; first < n; first += FLOAT_RUN) {
        int64_t end = vx_min64(first + FLOAT_RUN, n), i = first;
        vf sum[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
        for (; i + 4 * VX_LANES <= end; i += 4 * VX_LANES)
            for (int k = 0; k < 4; k++) {
                vf v = vf_load(a + i + k * VX_LANES);
                sum[k] += b ? v * vf_load(b + i + k * VX_LANES) : v;
            }
        for (; i < end; i += VX_LANES) {
            int rest = (int)vx_min64(VX_LANES, end - i);
            vf v = vf_load_n(a + i, rest);
            sum[0] += b ? v * vf_load_n(b + i, rest) : v;
        }
        total += vf_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    return total;
}

/* Computes dx from dy and the output y of softmax, or of its logarithm where log is 1. */
int VX_CPU(softmax_backward)(vx_tensor *dx, vx_tensor *dy, vx_tensor *y, int log)
{
    int64_t rows = y->shape[0], n = y->shape[1];
    const float *value = vx_f32(y), *grad = vx_f32(dy);
    float *out = vx_f32(dx);
#pragma omp parallel for schedule(static) if (rows * n >= SERIAL)
    for (int64_t r = 0; r < rows; r++) {
        const float *a = value + r * n, *g = grad + r * n;
        float *d = out + r * n;
        const vf sum = vf_set1((float)(log ? dot(g, 0, n) : dot(g, a, n)));
        for (int64_t i = 0; i < n; i += VX_LANES) {
            int rest = (int)vx_min64(VX_LANES, n - i);
            vf p = rest == VX_LANES ? vf_load(a + i) : vf_load_n(a + i, rest);
            vf q = rest == VX_LANES ? vf_load(g + i) : vf_load_n(g + i, rest);
            vf e = log ? q - vf_exp(p) * sum : p * (q - sum);
            if (rest == VX_LANES) vf_store(d + i, e);
            else vf_store_n(d + i, e, rest);
        }
    }
    return VX_OK;
}
