/* amx.h: products in AMX tiles, and their twin in plain C, which gives the same bits on any processor that has FMA.
 *
 * TDPBF16PS multiplies a tile of 16 rows by 32 elements with one of 32 by 16 columns, both bfloat16, and adds to a tile
 * of 16 x 16 float32. Float32 factors become three bfloat16 terms each, x = x0 + x1 + x2, every one of them the rest so
 * far, rounded to nearest even; together they keep all 24 bits. Of the nine products six are taken, the small ones
 * first, into one sum: x0 y2 + x1 y1 + x2 y0 + x1 y0 + x0 y1 + x0 y0. The others are below 2^-24 |x| |y|.
 *
 * Error against float64 of products of directions, the most and the root of the mean square in units of 2^-24
 * (kernels/lab/amx.c measures it). So six products are better than float32's FMA, three are not float32:
 *       D         FMA   3 products   6 products   9 products
 *      32  2.93 0.304  76.2 13.1     1.14 0.119   1.14 0.118
 *      64  2.84 0.303  52.1  9.3     1.39 0.126   1.39 0.126
 *     256  2.98 0.301  21.4  4.7     1.17 0.130   1.17 0.130
 *    1024  3.08 0.301  11.1  2.3     1.27 0.131   1.27 0.131
 * So all products take six: logits, mixtures, and in the backward pass <dy, q^> and the sums over codes and rows.
 *
 * The instruction's arithmetic, which the twin follows: even and odd elements are summed apart, each from 0 by one FMA
 * an element in order, and c becomes c + (even + odd); every operand and result below 2^-126 is 0, rounding is to
 * nearest even, and MXCSR is not asked.
 *
 * An operand is stored tile by tile, 1 KiB each: (row tiles, steps of 32 elements, 3 terms, 16 rows, 16 pairs), or for
 * the columns (column tiles, steps, 3 terms, 16 pairs, 16 columns). Pair j of a step is its elements j and j + 16, so
 * that both are whole vectors. Steps are filled up with zeros.
 */
#ifndef VX_AMX_H
#define VX_AMX_H

#include "cpu.h"
#include "simd.h"

#if defined(__AMX_BF16__) || defined(VX_AMX_TWIN)
#define VX_AMX 1
#else
#define VX_AMX 0
#endif

enum {
    AMX_SIDE = 16,  /* rows, columns and pairs of a tile */
    AMX_DEPTH = 32, /* elements of a step */
    AMX_TERMS = 3,
    AMX_TILE = AMX_SIDE * AMX_SIDE,  /* words of a tile */
    AMX_STEP = AMX_TERMS * AMX_TILE, /* words of a tile's step */
};

/* Returns the steps that D elements take in this variant; 0 where FMA is to multiply them: half-empty tiles are slower
 * than that. */
static inline int64_t amx_steps(int64_t D) { return VX_AMX && D >= AMX_DEPTH ? vx_ceil_div(D, AMX_DEPTH) : 0; }

/* Returns the words that `count` rows or columns, whole tiles, take. */
static inline int64_t amx_words(int64_t count, int64_t steps) { return count / AMX_SIDE * steps * AMX_STEP; }

/* Prepares this thread's tiles for products, and gives them back: a thread that holds tiles makes every switch to
 * another one longer. */
static inline void amx_begin(void)
{
#if defined(__AMX_BF16__)
    static const struct {
        uint8_t palette, start_row, zero[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
#endif
}

static inline void amx_end(void)
{
#if defined(__AMX_BF16__)
    __asm__ volatile("tilerelease");
#endif
}

/* Splits VX_LANES pairs into terms, AMX_TILE words apart. */
VX_INLINE void amx_split(uint32_t *terms, vf low, vf high)
{
#pragma GCC unroll 3
    for (int t = 0; t < AMX_TERMS; t++) {
#if !defined(__AVX512BF16__) /* where it is, rounding takes subnormal numbers as 0 */
        low = vf_select(vf_abs(low) < 0x1p-126f, vf_zero(), low);
        high = vf_select(vf_abs(high) < 0x1p-126f, vf_zero(), high);
#endif
        const vu both = vu_bf16x2(low, high);
        memcpy(terms + t * AMX_TILE, &both, sizeof both);
        low -= (vf)(both << 16);
        high -= (vf)(both & 0xffff0000);
    }
}

/* Splits a (rows, D; lda) into `out` as an operand's rows; rows: whole tiles. */
static inline void amx_split_rows(uint32_t *out, const float *a, int64_t lda, int64_t rows, int64_t D)
{
    const int64_t steps = amx_steps(D);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < steps * AMX_DEPTH; d += AMX_DEPTH)
            for (int j = 0; j < AMX_SIDE; j += VX_LANES) {
                const float *x = a + i * lda + d + j;
                const int64_t left = D - d - j;
                amx_split(out + (i / AMX_SIDE * steps + d / AMX_DEPTH) * AMX_STEP + i % AMX_SIDE * AMX_SIDE + j,
                          vf_load_n(x, (int)vx_min64(vx_max64(left, 0), VX_LANES)),
                          vf_load_n(x + AMX_SIDE, (int)vx_min64(vx_max64(left - AMX_SIDE, 0), VX_LANES)));
            }
}

/* Splits b (D, columns; ldb) into `out` as an operand's columns; columns: whole tiles. */
static inline void amx_split_columns(uint32_t *out, const float *b, int64_t ldb, int64_t columns, int64_t D)
{
    const int64_t steps = amx_steps(D);
    for (int64_t v = 0; v < columns; v += VX_LANES)
        for (int64_t step = 0; step < steps; step++)
            for (int64_t j = 0; j < AMX_SIDE; j++) {
                const int64_t d = step * AMX_DEPTH + j;
                amx_split(out + (v / AMX_SIDE * steps + step) * AMX_STEP + j * AMX_SIDE + v % AMX_SIDE,
                          d < D ? vf_load(b + d * ldb + v) : vf_zero(),
                          d + AMX_SIDE < D ? vf_load(b + (d + AMX_SIDE) * ldb + v) : vf_zero());
            }
}

/* Adds the product of two tiles to c (16,16) as TDPBF16PS does; denormals must be off. */
static inline void amx_dot(float *c, const uint32_t *a, const uint32_t *b)
{
    for (int i = 0; i < AMX_SIDE; i++)
        for (int v = 0; v < AMX_SIDE; v += VX_LANES) {
            vf even = vf_zero(), odd = vf_zero();
            for (int k = 0; k < AMX_SIDE; k++) {
                const vu row = a[i * AMX_SIDE + k] - (vu){0};
                vu column;
                memcpy(&column, b + k * AMX_SIDE + v, sizeof column);
                even = vf_fma((vf)(row << 16), (vf)(column << 16), even);
                odd = vf_fma((vf)(row & 0xffff0000), (vf)(column & 0xffff0000), odd);
            }
            vf_store(c + i * AMX_SIDE + v, vf_load(c + i * AMX_SIDE + v) + (even + odd));
        }
}

/* Computes s (16 R, 32; ld) = a b, or adds that to it: R tiles of rows (1 or 2) by two of columns. */
VX_INLINE void amx_block(const int R, const int add, float *s, int64_t ld, const uint32_t *a, const uint32_t *b,
                         int64_t steps)
{
    const int64_t next = steps * AMX_STEP; /* tile */
#if defined(__AMX_BF16__)
#define AMX_LOAD(tile, from, bytes)                                                                                    \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"((int64_t)(bytes)) : "memory")
#define AMX_ROWS(term)                                                                                                 \
    AMX_LOAD(4, a + term * AMX_TILE, 64);                                                                              \
    if (R == 2) AMX_LOAD(5, a + next + term * AMX_TILE, 64)
#define AMX_COLUMNS(term)                                                                                              \
    AMX_LOAD(6, b + term * AMX_TILE, 64);                                                                              \
    AMX_LOAD(7, b + next + term * AMX_TILE, 64)
#define AMX_DOTS                                                                                                       \
    _tile_dpbf16ps(0, 4, 6);                                                                                           \
    _tile_dpbf16ps(1, 4, 7);                                                                                           \
    if (R == 2) {                                                                                                      \
        _tile_dpbf16ps(2, 5, 6);                                                                                       \
        _tile_dpbf16ps(3, 5, 7);                                                                                       \
    }
    if (add) {
        AMX_LOAD(0, s, ld * 4);
        AMX_LOAD(1, s + AMX_SIDE, ld * 4);
        if (R == 2) {
            AMX_LOAD(2, s + AMX_SIDE * ld, ld * 4);
            AMX_LOAD(3, s + AMX_SIDE * ld + AMX_SIDE, ld * 4);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (R == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    for (int64_t k = 0; k < steps; k++, a += AMX_STEP, b += AMX_STEP) {
        AMX_ROWS(0);
        AMX_COLUMNS(2);
        AMX_DOTS
        AMX_ROWS(1);
        AMX_COLUMNS(1);
        AMX_DOTS
        AMX_ROWS(2);
        AMX_COLUMNS(0);
        AMX_DOTS
        AMX_ROWS(1);
        AMX_DOTS
        AMX_ROWS(0);
        AMX_COLUMNS(1);
        AMX_DOTS
        AMX_COLUMNS(0);
        AMX_DOTS
    }
    _tile_stored(0, s, ld * 4);
    _tile_stored(1, s + AMX_SIDE, ld * 4);
    if (R == 2) {
        _tile_stored(2, s + AMX_SIDE * ld, ld * 4);
        _tile_stored(3, s + AMX_SIDE * ld + AMX_SIDE, ld * 4);
    }
#else
    static const int product[6][2] = {{0, 2}, {1, 1}, {2, 0}, {1, 0}, {0, 1}, {0, 0}};
    const unsigned denormals = vx_denormals_off();
    for (int i = 0; i < R; i++)
        for (int j = 0; j < 2; j++) {
            float *to = s + i * AMX_SIDE * ld + j * AMX_SIDE, c[AMX_TILE] = {0};
            for (int r = 0; add && r < AMX_SIDE; r++) memcpy(c + r * AMX_SIDE, to + r * ld, sizeof(float) * AMX_SIDE);
            for (int64_t k = 0; k < steps; k++)
                for (int p = 0; p < 6; p++)
                    amx_dot(c, a + i * next + k * AMX_STEP + product[p][0] * AMX_TILE,
                            b + j * next + k * AMX_STEP + product[p][1] * AMX_TILE);
            for (int r = 0; r < AMX_SIDE; r++) memcpy(to + r * ld, c + r * AMX_SIDE, sizeof(float) * AMX_SIDE);
        }
    vx_denormals_restore(denormals);
#endif
}

/* Computes s (rows, columns; ld) = a b from operands in terms, or adds that to it; rows: a multiple of 16, columns: of
 * 32. add: known at compile time. */
VX_INLINE void amx_product(const int add, float *s, int64_t ld, int64_t rows, int64_t columns, const uint32_t *a,
                           const uint32_t *b, int64_t steps)
{
    const int64_t tile = steps * AMX_STEP;
    for (int64_t j = 0; j < columns; j += 2 * AMX_SIDE, b += 2 * tile) {
        int64_t i = 0;
        for (; i + 2 * AMX_SIDE <= rows; i += 2 * AMX_SIDE)
            amx_block(2, add, s + i * ld + j, ld, a + i / AMX_SIDE * tile, b, steps);
        if (i < rows) amx_block(1, add, s + i * ld + j, ld, a + i / AMX_SIDE * tile, b, steps);
    }
}

#endif
