/* row_norms.h: what the quantizers' kernels ask of rows: norm, product with another, whether all is finite, the largest
 * coordinate. */
#ifndef VX_ROW_NORMS_H
#define VX_ROW_NORMS_H

#include "cpu.h"
#include "shared/constants.h"
#include "simd.h"

/* Returns <a, b> of D elements. */
static inline float dot(const float *a, const float *b, int64_t D)
{
    vf sum = vf_zero();
    int64_t d = 0;
    for (; d + VX_LANES <= D; d += VX_LANES) sum += vf_load(a + d) * vf_load(b + d);
    return vf_sum(sum + vf_load_n(a + d, (int)(D - d)) * vf_load_n(b + d, (int)(D - d)));
}

/* Returns |x| of D elements, in double where float32 squares could overflow or vanish; NaN where an element is NaN or
 * Inf. */
static inline double row_norm(const float *x, int64_t D)
{
    vf sum = vf_zero();
    int64_t d = 0;
    for (; d + VX_LANES <= D; d += VX_LANES) sum += vf_load(x + d) * vf_load(x + d);
    vf last = vf_load_n(x + d, (int)(D - d));
    float squares = vf_sum(sum + last * last);
    if (squares > 1e-25f && squares < 1e30f) return sqrt((double)squares);
    double exact = 0;
    for (d = 0; d < D; d++) exact += (double)x[d] * x[d];
    return exact <= 1e300 ? sqrt(exact) : NAN;
}

/* Returns the first of the rows x (count,D) that holds a NaN or Inf, or -1. Fills norms (count) with max(|x_i|, GUARD)
 * unless that is NULL. */
static inline int64_t first_nonfinite(const float *x, int64_t count, int64_t D, float *norms)
{
    int64_t first = INT64_MAX;
#pragma omp parallel for schedule(static) reduction(min : first)
    for (int64_t i = 0; i < count; i++) {
        double norm = row_norm(x + i * D, D);
        if (norm != norm) first = vx_min64(first, i);
        if (norms) norms[i] = (float)fmax(norm, GUARD);
    }
    return first == INT64_MAX ? -1 : first;
}

/* Returns the largest |x[i]| of count elements, none a NaN. Numbers without their sign are ordered as their bits, which
 * the compiler may compare in any order. */
static inline float largest_of(const float *x, int64_t count)
{
    int32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= INT32_MAX;
        most = bits > most ? bits : most;
    }
    float largest;
    memcpy(&largest, &most, sizeof largest);
    return largest;
}

#endif
