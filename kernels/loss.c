/* loss.c: mse, mse_backward.
 *
 * Memory traffic: a and b once; the gradient is written once.
 *
 * Order of the sum, a function of the size alone: four float32 accumulators over 32 vectors, whose sum goes into a
 * vector of doubles; a part of 16384 elements ends in one double, and the parts are added in ascending order.
 */
#include "cpu/cpu.h"
#include "cpu/simd.h"

#define SERIAL 32768              /* below this many elements a second thread costs more than it brings */
#define FLOAT_RUN (32 * VX_LANES) /* elements summed in float32 before they go into doubles */
#define PART 16384                /* elements of a part */

/* Returns the sum of (a - b)^2 over n elements. */
static double squared_distance(const float *a, const float *b, int64_t n)
{
    vd acc = {0};
    for (int64_t first = 0; first < n; first += FLOAT_RUN) {
        int64_t end = vx_min64(first + FLOAT_RUN, n), i = first;
        vf s[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
        for (; i + 4 * VX_LANES <= end; i += 4 * VX_LANES)
            for (int k = 0; k < 4; k++) {
                vf d = vf_load(a + i + k * VX_LANES) - vf_load(b + i + k * VX_LANES);
                s[k] += d * d;
            }
        for (; i < end; i += VX_LANES) {
            int m = (int)vx_min64(VX_LANES, end - i);
            vf d = vf_load_n(a + i, m) - vf_load_n(b + i, m);
            s[0] += d * d;
        }
        acc += vd_of((s[0] + s[1]) + (s[2] + s[3]));
    }
    return vd_sum(acc);
}

/* Computes loss = mean (a - b)^2. Working space: 8 bytes per 16384 elements. */
int VX_CPU(mse)(vx_tensor *loss, vx_tensor *a, vx_tensor *b)
{
    int64_t n = a->numel, parts = vx_ceil_div(n, PART);
    if (!n) return vx_fail(VX_EINVAL, "mse: mean of no elements");
    const float *pa = vx_f32(a), *pb = vx_f32(b);
    double *partial = vx_scratch("mse", sizeof(double) * (size_t)parts), sum = 0;
    if (!partial) return VX_ENOMEM;
#pragma omp parallel for schedule(static) if (n >= SERIAL)
    for (int64_t i = 0; i < parts; i++)
        partial[i] = squared_distance(pa + i * PART, pb + i * PART, vx_min64(PART, n - i * PART));
    for (int64_t i = 0; i < parts; i++) sum += partial[i];
    vx_scratch_free(partial);
    vx_f32(loss)[0] = (float)(sum / (double)n);
    return VX_OK;
}

/* Computes da = 2 dloss (a - b) / count. */
int VX_CPU(mse_backward)(vx_tensor *da, vx_tensor *a, vx_tensor *b, vx_tensor *dloss)
{
    int64_t n = a->numel;
    const float *pa = vx_f32(a), *pb = vx_f32(b), scale = n ? (float)(2.0 * vx_f32(dloss)[0] / (double)n) : 0.0f;
    float *out = vx_f32(da);
#pragma omp parallel for simd schedule(static) if (n >= SERIAL)
    for (int64_t i = 0; i < n; i++) out[i] = scale * (pa[i] - pb[i]);
    return VX_OK;
}
