/* row_tile.h: what the quantizers' kernels share: norms and checks of rows, sorting, and products of a few rows in
 * registers. */
#ifndef VX_ROWS_H
#define VX_ROWS_H

#include "cpu.h"
#include "shared/constants.h"
#include "simd.h"

static inline float dot(const float *a, const float *b, int64_t D)
{
    vf sum = vf_zero();
    int64_t d = 0;
    for (; d + VX_LANES <= D; d += VX_LANES) sum += vf_load(a + d) * vf_load(b + d);
    return vf_sum(sum + vf_load_n(a + d, (int)(D - d)) * vf_load_n(b + d, (int)(D - d)));
}

/* |x| of D elements, in double where float32 squares could overflow or vanish; NaN where an element is NaN or Inf. */
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

/* Index of the first of `count` rows with a NaN or Inf, or -1; norms[i] = max(|x_i|, GUARD) unless NULL. */
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

/* -- A few rows times a few vectors -------------------------------------------------------------------------------- */

/* sum[i][v] += a[i ai] b[v], i < rows, v < vectors */
VX_INLINE void tile_step(const int rows, const int vectors, vf sum[12][4], const float *a, int64_t ai, const float *b)
{
    vf column[4];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) column[v] = vf_load(b + v * VX_LANES);
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        vf x = vf_set1(a[i * ai]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[i][v] += x * column[v];
    }
}

/* sum += a b over k < count: a[i ai + k ak], b[k ldb + v]. Steps are unrolled by four, so that the loop's end is
 * predicted. */
VX_INLINE void tile_product(const int rows, const int vectors, vf sum[12][4], const float *a, int64_t ai, int64_t ak,
                            const float *b, int64_t ldb, int64_t count)
{
    int64_t k = 0;
#if VX_LANES == 16 /* with 16 registers there is none to spare for a step that begins before the last one ends */
    for (; k + 4 <= count; k += 4)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) tile_step(rows, vectors, sum, a + (k + j) * ak, ai, b + (k + j) * ldb);
#endif
    for (; k < count; k++) tile_step(rows, vectors, sum, a + k * ak, ai, b + k * ldb);
}

/* c[i][v] = (start ? start[i] : c[i][v]) + sum over k < count of a[i ai + k ak] b[k ldb + v], i < rows, v < vectors, in
 * registers; v counts vectors. */
VX_INLINE void tile(const int rows, const int vectors, float *c, int64_t ldc, const float *start, const float *a,
                    int64_t ai, int64_t ak, const float *b, int64_t ldb, int64_t count)
{
    vf sum[12][4];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[i][v] = start ? vf_set1(start[i]) : vf_load(c + i * ldc + v * VX_LANES);
    tile_product(rows, vectors, sum, a, ai, ak, b, ldb, count);
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) vf_store(c + i * ldc + v * VX_LANES, sum[i][v]);
}

/* c[i][v] += sum over k < count of <a[i ai + k ak], b[k ldb + v]>, both pairs of bfloat16 (vu_pair); rows i, vectors
 * v. */
VX_INLINE void tile_pairs(const int rows, const int vectors, float *c, int64_t ldc, const uint32_t *a, int64_t ai,
                          int64_t ak, const uint32_t *b, int64_t ldb, int64_t count)
{
    vf sum[8][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) sum[i][v] = vf_load(c + i * ldc + v * VX_LANES);
    for (int64_t k = 0; k < count; k++) {
        vu column[2];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) memcpy(&column[v], b + k * ldb + v * VX_LANES, sizeof column[v]);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            vu x = a[i * ai + k * ak] - (vu){0};
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sum[i][v] = vf_dot_pairs(sum[i][v], x, column[v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) vf_store(c + i * ldc + v * VX_LANES, sum[i][v]);
}

#endif
