/* row_tile.h: products of a few rows with a few vectors, in registers: what the quantizers' kernels are made of. */
#ifndef VX_ROW_TILE_H
#define VX_ROW_TILE_H

#include "cpu.h"
#include "simd.h"

/* Adds a[i ai] b[v] to sum[i][v], i < rows, v < vectors; v counts vectors. */
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

/* Adds the sum over k < count of a[i ai + k ak] b[k ldb + v] to sum[i][v]. Steps are unrolled by four, so that the
 * loop's end is predicted. */
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

/* Computes c[i][v] = (start ? start[i] : c[i][v]) + sum over k < count of a[i ai + k ak] b[k ldb + v] in registers. */
VX_INLINE void tile_multiply(const int rows, const int vectors, float *c, int64_t ldc, const float *start,
                             const float *a, int64_t ai, int64_t ak, const float *b, int64_t ldb, int64_t count)
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

/* Adds the sum over k < count of a[i ai + k ak] b[k ldb + v] to c[i][v], where a and b are bf16x2 (vu_bf16x2): each
 * step is two products. */
VX_INLINE void tile_multiply_bf16x2(const int rows, const int vectors, float *c, int64_t ldc, const uint32_t *a,
                                    int64_t ai, int64_t ak, const uint32_t *b, int64_t ldb, int64_t count)
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
            for (int v = 0; v < vectors; v++) sum[i][v] = vf_dot_bf16x2(sum[i][v], x, column[v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) vf_store(c + i * ldc + v * VX_LANES, sum[i][v]);
}

#endif
