/* bf16_tile.h: products of bf16 numbers, two to a 32-bit word: in AMX tiles or by their twin (amx.h), one term and one
 * product where float32 takes three and six; by AVX512_BF16's dot products of pairs, as many a cycle as FMA has
 * products of one; and so in the portable variant, slowly, where it can be tested anywhere. Other variants multiply in
 * float32. A factor that bf16 does not have is rounded, to nearest even; one below 2^-126 is 0.
 *
 * On paper a row's 32 elements times 64 columns are 128 FMAs of 16 lanes, 64 cycles. Tiles take a 32nd of 8 dots of 16
 * cycles, that is 4, rounding and storing the row 3, the columns at 96 rows 2, and at D = 64 what becomes of the sums 2
 * to 3: 5 to 6 times as fast. Dot products take 32 in place of the 4. None of it has been measured.
 *
 * An operand is stored tile by tile as in amx.h, without the terms: (row tiles, steps of 32 elements, 16 rows, 16
 * pairs), or (column tiles, steps, 16 pairs, 16 columns).
 */
#ifndef VX_BF16_TILE_H
#define VX_BF16_TILE_H

#include "amx.h"

#if VX_AMX || defined(__AVX512BF16__) || VX_LANES == 4
#define BF16_TILES 1
#else
#define BF16_TILES 0
#endif

/* Returns VX_LANES pairs. */
VX_INLINE vu bf16_pairs(vf low, vf high)
{
#if !defined(__AVX512BF16__) /* where it is, rounding takes subnormal numbers as 0 */
    low = vf_select(vf_abs(low) < 0x1p-126f, vf_zero(), low);
    high = vf_select(vf_abs(high) < 0x1p-126f, vf_zero(), high);
#endif
    return vu_bf16x2(low, high);
}

/* Stores a (rows, D; lda) in `out` as an operand's rows; the last tile is filled up with zeros. */
static inline void bf16_rows(uint32_t *out, const float *a, int64_t lda, int64_t rows, int64_t D)
{
    const int64_t steps = vx_ceil_div(D, AMX_DEPTH), whole = vx_ceil_div(rows, AMX_SIDE) * AMX_SIDE;
    for (int64_t i = 0; i < whole; i++)
        for (int64_t d = 0; d < D; d += AMX_DEPTH)
            for (int j = 0; j < AMX_SIDE; j += VX_LANES) {
                const float *x = a + i * lda + d + j;
                const int64_t left = i < rows ? D - d - j : 0;
                const vu both =
                    bf16_pairs(vf_load_n(x, (int)vx_min64(vx_max64(left, 0), VX_LANES)),
                               vf_load_n(x + AMX_SIDE, (int)vx_min64(vx_max64(left - AMX_SIDE, 0), VX_LANES)));
                memcpy(out + (i / AMX_SIDE * steps + d / AMX_DEPTH) * AMX_TILE + i % AMX_SIDE * AMX_SIDE + j, &both,
                       sizeof both);
            }
}

/* Stores b (D, columns; ldb) in `out` as an operand's columns; the last tile is filled up with zeros. b is read in
 * whole vectors. */
static inline void bf16_columns(uint32_t *out, const float *b, int64_t ldb, int64_t columns, int64_t D)
{
    const int64_t steps = vx_ceil_div(D, AMX_DEPTH), whole = vx_ceil_div(columns, AMX_SIDE) * AMX_SIDE;
    for (int64_t v = 0; v < whole; v += VX_LANES)
        for (int64_t step = 0; step < steps; step++)
            for (int64_t j = 0; j < AMX_SIDE; j++) {
                const int64_t d = step * AMX_DEPTH + j;
                const vu both =
                    bf16_pairs(v < columns && d < D ? vf_load(b + d * ldb + v) : vf_zero(),
                               v < columns && d + AMX_SIDE < D ? vf_load(b + (d + AMX_SIDE) * ldb + v) : vf_zero());
                memcpy(out + (v / AMX_SIDE * steps + step) * AMX_TILE + j * AMX_SIDE + v % AMX_SIDE, &both,
                       sizeof both);
            }
}

#if VX_AMX
/* Computes s (16 R, 16 N; ld) = a b: R tiles of rows and N of columns, 1 or 2 each. */
VX_INLINE void bf16_block(const int R, const int N, float *s, int64_t ld, const uint32_t *a, const uint32_t *b,
                          int64_t steps)
{
    const int64_t next = steps * AMX_TILE; /* tile */
#if defined(__AMX_BF16__)
    _tile_zero(0);
    if (N == 2) _tile_zero(1);
    if (R == 2) _tile_zero(2);
    if (R == 2 && N == 2) _tile_zero(3);
    for (int64_t k = 0; k < steps; k++, a += AMX_TILE, b += AMX_TILE) {
        AMX_LOAD(4, a, 64);
        AMX_LOAD(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (N == 2) {
            AMX_LOAD(7, b + next, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (R == 2) {
            AMX_LOAD(5, a + next, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (N == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, s, ld * 4);
    if (N == 2) _tile_stored(1, s + AMX_SIDE, ld * 4);
    if (R == 2) _tile_stored(2, s + AMX_SIDE * ld, ld * 4);
    if (R == 2 && N == 2) _tile_stored(3, s + AMX_SIDE * ld + AMX_SIDE, ld * 4);
#else
    const unsigned denormals = vx_denormals_off();
    for (int i = 0; i < R; i++)
        for (int j = 0; j < N; j++) {
            float c[AMX_TILE] = {0};
            for (int64_t k = 0; k < steps; k++) amx_dot(c, a + i * next + k * AMX_TILE, b + j * next + k * AMX_TILE);
            for (int r = 0; r < AMX_SIDE; r++)
                memcpy(s + (i * AMX_SIDE + r) * ld + j * AMX_SIDE, c + r * AMX_SIDE, sizeof(float) * AMX_SIDE);
        }
    vx_denormals_restore(denormals);
#endif
}
#endif

#if !VX_AMX
/* Computes s (R,V vectors; ld) = a b: rows of one tile, all columns, in registers. */
VX_INLINE void bf16_dots(const int R, const int V, float *s, int64_t ld, const uint32_t *a, const uint32_t *b,
                         int64_t steps)
{
    vf sum[8][4];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] = vf_zero();
    for (int64_t k = 0; k < steps; k++, a += AMX_TILE, b += AMX_TILE)
#pragma GCC unroll 1
        for (int j = 0; j < AMX_SIDE; j++) {
            vu column[4];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++)
                memcpy(&column[v],
                       b + v * VX_LANES / AMX_SIDE * steps * AMX_TILE + j * AMX_SIDE + v * VX_LANES % AMX_SIDE,
                       sizeof column[v]);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const vu x = a[r * AMX_SIDE + j] - (vu){0};
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) sum[r][v] = vf_dot_bf16x2(sum[r][v], x, column[v]);
            }
        }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) vf_store(s + r * ld + v * VX_LANES, sum[r][v]);
}
#endif

/* Computes s (rows,columns; ld) = a b; rows and columns beyond the last of s are written, too, up to whole tiles or
 * vectors. Between amx_begin() and amx_end(). */
static inline void bf16_product(float *s, int64_t ld, int64_t rows, int columns, const uint32_t *a, const uint32_t *b,
                                int64_t steps)
{
    const int64_t next = steps * AMX_TILE;
#if VX_AMX
    for (int j = 0; j < columns; j += 2 * AMX_SIDE, b += 2 * next)
        for (int64_t i = 0; i < rows; i += 2 * AMX_SIDE) {
            const int two_rows = rows - i > AMX_SIDE, two_columns = columns - j > AMX_SIDE;
            const uint32_t *from = a + i / AMX_SIDE * next;
            float *to = s + i * ld + j;
            if (two_rows && two_columns) bf16_block(2, 2, to, ld, from, b, steps);
            else if (two_rows) bf16_block(2, 1, to, ld, from, b, steps);
            else if (two_columns) bf16_block(1, 2, to, ld, from, b, steps);
            else bf16_block(1, 1, to, ld, from, b, steps);
        }
#else
    const int vectors = (columns + VX_LANES - 1) / VX_LANES;
    for (int64_t i = 0; i<rows; i += vectors> 2 ? 4 : 8) {
        const uint32_t *from = a + i / AMX_SIDE * next + i % AMX_SIDE * AMX_SIDE;
        float *to = s + i * ld;
        if (vectors == 1) bf16_dots(8, 1, to, ld, from, b, steps);
        else if (vectors == 2) bf16_dots(8, 2, to, ld, from, b, steps);
        else if (vectors == 3) bf16_dots(4, 3, to, ld, from, b, steps);
        else bf16_dots(4, 4, to, ld, from, b, steps);
    }
#endif
}

#endif
