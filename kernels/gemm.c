/* gemm.c: batched C = alpha A B + beta C + bias, and the register tile below it.
 *
 * The matrices of our networks are skinny: m is the number of pixels or rows, n and k are channels (3 .. 1024). There
 * GEMM_COLUMNS of B (k of them) live in the L1 or L2 cache while rows of A stream past it, each broadcast from where it
 * lies: neither A nor, where it is row-major, B needs the packing of a general BLAS [1], and bias and beta cost nothing
 * extra. Traffic: A once per GEMM_COLUMNS (from L2 after the first), B once per 256 rows, C once per 256 of k.
 *
 * Weight gradients are the other kind: m and n small, k = 10^4 .. 10^6. There k is cut into parts, each with its own C,
 * and the parts are added in order. The number of parts follows from the sizes alone, and so does every sum's order.
 *
 * Products of bf16 factors (gemm_tile.h) take two of k at a time where the variant can (bf16_tile.h). Elsewhere they
 * run like any other: a product of two bf16 numbers is exact in float32. The AMX variants multiply float32 factors in
 * tiles too, as three bf16 terms each.
 *
 * [1] Goto and van de Geijn 2008, Anatomy of high-performance matrix multiplication.
 */
#include "shared/checks.h"
#include "cpu/bf16_tile.h"
#include "cpu/body.h"
#include "cpu/gemm_tile.h"

/* A block is what is worked on while it stays in a cache. */
enum {
    BLOCK_ROWS = 256,
    BLOCK_DEPTH = 256, /* of packed columns, 64 KiB with AVX-512: half of the smallest L2, shared with 256 rows of A */
    BLOCK_DEPTH_DIRECT = 64, /* where a is transposed: 64 rows of A and of B as they lie stay in L1 */
};

/* -- The tile ------------------------------------------------------------------------------------------------------ */

/* Computes R rows by V vectors. R, V, which of a's strides is 1 and whether to prefetch are known at compile time: the
 * accumulators stay in registers, the row addresses need one base each, or one in all. */
VX_INLINE void tile(const int R, const int V, const int a_transposed, const int in_l2, const gemm_product *q,
                    int64_t row, int tail)
{
    vf sum[12]
          [GEMM_VECTORS]; /* R and V as sizes would make it a variable-length array, which never reaches registers */
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] = vf_zero();
    const int64_t row_stride = a_transposed ? 1 : q->row_stride, k_stride = a_transposed ? q->k_stride : 1, k = q->k;
    const int64_t b_stride = q->b_stride;
    for (int s = 0; s < q->segments; s++) {
        const float *a = q->a[s] + row * row_stride, *b = q->b[s];
        /* fetch ahead, a line every few steps: what the caller names, or the rows two tiles on; where a is transposed,
         * the next steps of a and b, of which the tiles below one another take different lines, no nearer than L2 */
        const float *ahead = a_transposed ? a + BLOCK_DEPTH_DIRECT * k_stride
                             : q->fetch   ? q->fetch + row * k
                                          : a + 2 * R * row_stride;
        const float *ahead_b = b + BLOCK_DEPTH_DIRECT * b_stride + row / 2 % GEMM_VECTORS * VX_LANES;
#pragma GCC unroll 1
        for (int64_t p = 0; p < k; p++, b += b_stride) {
            if (!a_transposed) __builtin_prefetch(ahead + p * R);
            else if (!in_l2) {
                __builtin_prefetch(ahead + p * k_stride, 0, 2);
                __builtin_prefetch(ahead_b + p * b_stride, 0, 2);
            }
            vf column[GEMM_VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) column[v] = vf_load(b + v * VX_LANES);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                vf x = vf_set1(a[r * row_stride + p * k_stride]);
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) sum[r][v] = vf_fma(x, column[v], sum[r][v]);
            }
        }
    }
    /* What is asked of all elements is asked once: with k = 64 a branch for each would cost a tenth of the product. */
    float *c = q->c + row * q->c_stride;
    const int64_t c_stride = q->c_stride;
    if (q->alpha != 1)
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[r][v] *= q->alpha;
    if (q->beta != 0) {
        const float *addend = (q->addend ? q->addend : q->c) + row * c_stride;
        const vf beta = vf_set1(q->beta);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++)
                sum[r][v] += beta * (v + 1 == V && tail ? vf_load_n(addend + r * c_stride + v * VX_LANES, tail)
                                                        : vf_load(addend + r * c_stride + v * VX_LANES));
    }
    if (q->bias) {
        vf bias[GEMM_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            bias[v] = v + 1 == V && tail ? vf_load_n(q->bias + v * VX_LANES, tail) : vf_load(q->bias + v * VX_LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[r][v] += bias[v];
    }
    if (tail) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
            for (int v = 0; v + 1 < V; v++) vf_store(c + r * c_stride + v * VX_LANES, sum[r][v]);
            vf_store_n(c + r * c_stride + (V - 1) * VX_LANES, sum[r][V - 1], tail);
        }
    } else if (q->stream) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) vf_stream(c + r * c_stride + v * VX_LANES, sum[r][v]);
    } else {
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) vf_store(c + r * c_stride + v * VX_LANES, sum[r][v]);
    }
}

typedef void tile_function(const gemm_product *q, int64_t row, int tail);

#define TILE(R, V)                                                                                                     \
    static void tile_##R##_##V(const gemm_product *q, int64_t row, int tail) { tile(R, V, 0, 0, q, row, tail); }       \
    static void tile_t_##R##_##V(const gemm_product *q, int64_t row, int tail) { tile(R, V, 1, 0, q, row, tail); }     \
    static void tile_n_##R##_##V(const gemm_product *q, int64_t row, int tail) { tile(R, V, 1, 1, q, row, tail); }
#define TILES(V) TILE(1, V) TILE(2, V) TILE(3, V) TILE(4, V) TILE(5, V) TILE(6, V)

TILES(1)
TILES(2)
TILE(9, 1)
TILE(12, 1)
#if GEMM_VECTORS == 4
TILES(3)
TILES(4)
TILE(9, 2)
TILE(12, 2)
#endif

/* Tile heights, tallest first. A width has no function for heights that it has no registers for. */
#define HEIGHTS 8
static const int height[HEIGHTS] = {12, 9, 6, 5, 4, 3, 2, 1};
#define ROW(prefix, V) prefix##6_##V, prefix##5_##V, prefix##4_##V, prefix##3_##V, prefix##2_##V, prefix##1_##V
#if GEMM_VECTORS == 4
#define WIDTHS(prefix)                                                                                                 \
    {                                                                                                                  \
        {prefix##12_1, prefix##9_1, ROW(prefix, 1)}, {prefix##12_2, prefix##9_2, ROW(prefix, 2)},                      \
            {0, 0, ROW(prefix, 3)},                                                                                    \
        {                                                                                                              \
            0, 0, ROW(prefix, 4)                                                                                       \
        }                                                                                                              \
    }
#else
#define WIDTHS(prefix)                                                                                                 \
    {                                                                                                                  \
        {prefix##12_1, prefix##9_1, ROW(prefix, 1)}, { 0, 0, ROW(prefix, 2) }                                          \
    }
#endif
static tile_function *const tiles[3][GEMM_VECTORS][HEIGHTS] = {WIDTHS(tile_), WIDTHS(tile_t_), WIDTHS(tile_n_)};

typedef float four __attribute__((vector_size(16)));
typedef float four_unaligned __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t four_lanes __attribute__((vector_size(16)));

/* Turns a square: to[i to_stride + j] = from[j from_stride + i] for i, j < 4. */
static inline void transpose4(float *to, int64_t to_stride, const float *from, int64_t from_stride)
{
    const four a = *(const four_unaligned *)from, b = *(const four_unaligned *)(from + from_stride);
    const four c = *(const four_unaligned *)(from + 2 * from_stride),
               d = *(const four_unaligned *)(from + 3 * from_stride);
    const four ab = __builtin_shuffle(a, b, (four_lanes){0, 4, 1, 5}),
               cd = __builtin_shuffle(c, d, (four_lanes){0, 4, 1, 5});
    const four AB = __builtin_shuffle(a, b, (four_lanes){2, 6, 3, 7}),
               CD = __builtin_shuffle(c, d, (four_lanes){2, 6, 3, 7});
    *(four_unaligned *)to = __builtin_shuffle(ab, cd, (four_lanes){0, 1, 4, 5});
    *(four_unaligned *)(to + to_stride) = __builtin_shuffle(ab, cd, (four_lanes){2, 3, 6, 7});
    *(four_unaligned *)(to + 2 * to_stride) = __builtin_shuffle(AB, CD, (four_lanes){0, 1, 4, 5});
    *(four_unaligned *)(to + 3 * to_stride) = __builtin_shuffle(AB, CD, (four_lanes){2, 3, 6, 7});
}

/* Multiplies factors rounded to bf16, ROUNDED_ROWS of a and ROUNDED_DEPTH of k at a time. */
static void multiply_rounded(const gemm_product *q, int64_t rows, int columns)
{
    enum { ROUNDED_ROWS = 24, ROUNDED_DEPTH = 256 };
    _Alignas(64) float a[ROUNDED_ROWS * ROUNDED_DEPTH], b[ROUNDED_DEPTH * GEMM_COLUMNS];
    const int64_t width = gemm_vectors(columns) * VX_LANES;
    const int transposed = q->k_stride != 1 && q->k > 1;
    gemm_product part = {.segments = 1,
                         .a = {a},
                         .b = {b},
                         .b_stride = width,
                         .c_stride = q->c_stride,
                         .alpha = q->alpha,
                         .beta = q->beta,
                         .bias = q->bias,
                         .stream = q->stream && q->segments == 1 && q->k <= ROUNDED_DEPTH,
                         .factors = GEMM_BF16,
                         .in_l2 = 1};
    for (int s = 0; s < q->segments; s++)
        for (int64_t p = 0; p == 0 || p < q->k; p += ROUNDED_DEPTH) {
            part.k = vx_min64(ROUNDED_DEPTH, q->k - p);
            part.row_stride = transposed ? 1 : part.k, part.k_stride = transposed ? ROUNDED_ROWS : 1;
            for (int64_t i = 0; i < part.k; i++) copy_rounded(b + i * width, q->b[s] + (p + i) * q->b_stride, width);
            for (int64_t row = 0; row < rows; row += ROUNDED_ROWS) {
                const int64_t some = vx_min64(ROUNDED_ROWS, rows - row);
                const float *from = q->a[s] + row * q->row_stride + p * q->k_stride;
                for (int64_t i = 0; transposed && i < part.k; i++)
                    copy_rounded(a + i * ROUNDED_ROWS, from + i * q->k_stride, some);
                for (int64_t r = 0; !transposed && r < some; r++)
                    copy_rounded(a + r * part.k, from + r * q->row_stride, part.k);
                part.c = q->c + row * q->c_stride;
                part.addend = q->addend && !s && !p ? q->addend + row * q->c_stride : 0;
                VX_CPU(gemm_multiply)(&part, some, columns);
            }
            part.beta = 1, part.bias = 0;
        }
}

#if BF16_TILES
/* Fewest k that fill enough of a tile. */
enum { TILES_FROM = AMX_DEPTH / 2 };

/* Turns `rows` rows of a, which lie along k, `step` apart: t (rows,k; ld). */
static void turn_rows(float *t, int64_t ld, const float *a, int64_t step, int64_t rows, int64_t k)
{
    int64_t p = 0;
    for (; p + 4 <= k; p += 4) {
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) transpose4(t + r * ld + p, ld, a + p * step + r, step);
        for (; r < rows; r++)
            for (int i = 0; i < 4; i++) t[r * ld + p + i] = a[(p + i) * step + r];
    }
    for (; p < k; p++)
        for (int64_t r = 0; r < rows; r++) t[r * ld + p] = a[p * step + r];
}

/* Writes a block of C from s (rows,ld), the product of its part of k; the first part brings in beta, addend and
 * bias. */
static void settle_block(const gemm_product *q, const float *s, int64_t ld, int64_t row, int64_t rows, int columns,
                         int first)
{
    const float beta = first ? q->beta : 1, *addend = first && q->addend ? q->addend : q->c;
    for (int64_t r = row; r < row + rows; r++, s += ld)
        for (int j = 0; j < columns; j += VX_LANES) {
            const int n = columns - j < VX_LANES ? columns - j : VX_LANES;
            vf x = vf_load(s + j) * q->alpha;
            if (beta != 0) x += beta * vf_load_upto(addend + r * q->c_stride + j, n);
            if (first && q->bias) x += vf_load_upto(q->bias + j, n);
            vf_store_upto(q->c + r * q->c_stride + j, x, n);
        }
}

/* Multiplies bf16 factors in tiles, TILES_DEPTH of k at a time. */
static void multiply_tiles(const gemm_product *q, int64_t rows, int columns)
{
    enum {
        TILES_ROWS = 2 * AMX_SIDE,
        TILES_DEPTH = 512,
        STEPS = TILES_DEPTH / AMX_DEPTH,
        COLUMN_TILES = (GEMM_COLUMNS + AMX_SIDE - 1) / AMX_SIDE
    };
    _Alignas(64) uint32_t a[TILES_ROWS / AMX_SIDE * STEPS * AMX_TILE];
    _Alignas(64) uint32_t b[COLUMN_TILES * STEPS * AMX_TILE];
    _Alignas(64) float s[TILES_ROWS * GEMM_COLUMNS], turned[TILES_ROWS * TILES_DEPTH];
    const int transposed = q->k_stride != 1;
    amx_begin();
    for (int segment = 0; segment < q->segments; segment++)
        for (int64_t p = 0; p < q->k; p += TILES_DEPTH) {
            const int64_t depth = vx_min64(TILES_DEPTH, q->k - p), steps = vx_ceil_div(depth, AMX_DEPTH);
            bf16_columns(b, q->b[segment] + p * q->b_stride, q->b_stride, columns, depth);
            for (int64_t row = 0; row < rows; row += TILES_ROWS) {
                const int64_t some = vx_min64(TILES_ROWS, rows - row);
                const float *from = q->a[segment] + row * q->row_stride + p * q->k_stride;
                if (transposed) turn_rows(turned, depth, from, q->k_stride, some, depth);
                bf16_rows(a, transposed ? turned : from, transposed ? depth : q->row_stride, some, depth);
                bf16_product(s, GEMM_COLUMNS, some, columns, a, b, steps);
                settle_block(q, s, GEMM_COLUMNS, row, some, columns, segment == 0 && p == 0);
            }
        }
    amx_end();
}
#endif

#if VX_AMX
/* Says whether all of x (rows,count; stride) have terms: Inf, NaN and what bf16 rounds to Inf have none. */
static int have_terms(const float *x, int64_t rows, int64_t count, int64_t stride)
{
    vi without = (vi)vf_zero();
    for (int64_t r = 0; r < rows; r++, x += stride)
        for (int64_t i = 0; i < count; i += VX_LANES)
            without |= ~(vf_abs(vf_load_upto(x + i, (int)vx_min64(VX_LANES, count - i))) < 0x1p127f);
    return !vi_any(without);
}

/* Multiplies float32 factors in tiles, each as three terms (amx.h), SPLIT_DEPTH of k at a time. Returns 0 with nothing
 * done where a factor has no terms.
 *
 * On paper, with 64 columns and AVX-512, an element of A takes 0.8 cycles to split and 0.8 in the tiles, where FMA
 * takes 2; B's and the sums' way to C come on top. So it is a gain of at most a third where k and the rows are many,
 * and none at k = 64. Unmeasured. */
static int multiply_split(const gemm_product *q, int64_t rows, int columns)
{
    enum { SPLIT_ROWS = 2 * AMX_SIDE, SPLIT_DEPTH = 128, STEPS = SPLIT_DEPTH / AMX_DEPTH, COLUMNS = 64 };
    _Alignas(64) uint32_t a[SPLIT_ROWS / AMX_SIDE * STEPS * AMX_STEP], b[COLUMNS / AMX_SIDE * STEPS * AMX_STEP];
    _Alignas(64) float s[SPLIT_ROWS * COLUMNS], block[SPLIT_ROWS * SPLIT_DEPTH], panel[SPLIT_DEPTH * COLUMNS];
    const int transposed = q->k_stride != 1 && q->k > 1;
    const int64_t width = vx_ceil_div(columns, 2 * AMX_SIDE) * 2 * AMX_SIDE;
    for (int i = 0; i < q->segments; i++)
        if (!have_terms(q->b[i], q->k, columns, q->b_stride) ||
            !(transposed ? have_terms(q->a[i], q->k, rows, q->k_stride)
                         : have_terms(q->a[i], rows, q->k, q->row_stride)))
            return 0;
    amx_begin();
    for (int segment = 0; segment < q->segments; segment++)
        for (int64_t p = 0; p < q->k; p += SPLIT_DEPTH) {
            const int64_t depth = vx_min64(SPLIT_DEPTH, q->k - p), steps = vx_ceil_div(depth, AMX_DEPTH);
            const int64_t ld = steps * AMX_DEPTH; /* depth, filled up with zeros */
            memset(panel, 0, sizeof(float) * (size_t)(ld * width));
            for (int64_t d = 0; d < depth; d++)
                memcpy(panel + d * width, q->b[segment] + (p + d) * q->b_stride, sizeof(float) * (size_t)columns);
            amx_split_columns(b, panel, width, width, ld);
            for (int64_t row = 0; row < rows; row += SPLIT_ROWS) {
                const int64_t some = vx_min64(SPLIT_ROWS, rows - row), whole = vx_ceil_div(some, AMX_SIDE) * AMX_SIDE;
                const float *from = q->a[segment] + row * q->row_stride + p * q->k_stride;
                memset(block, 0, sizeof(float) * (size_t)(whole * ld));
                if (transposed) turn_rows(block, ld, from, q->k_stride, some, depth);
                for (int64_t r = 0; !transposed && r < some; r++)
                    memcpy(block + r * ld, from + r * q->row_stride, sizeof(float) * (size_t)depth);
                amx_split_rows(a, block, ld, whole, ld);
                amx_product(0, s, width, whole, width, a, b, steps);
                settle_block(q, s, width, row, some, columns, segment == 0 && p == 0);
            }
        }
    amx_end();
    return 1;
}
#endif

void VX_CPU(gemm_multiply)(const gemm_product *q, int64_t rows, int columns)
{
#if VX_AMX
    const int wide = columns >= vx_min64(GEMM_COLUMNS, 2 * AMX_SIDE);
    if (q->factors == GEMM_F32 && q->k >= AMX_DEPTH && wide && multiply_split(q, rows, columns)) return;
#endif
#if BF16_TILES
    if (q->factors != GEMM_F32 && q->k >= TILES_FROM) {
        multiply_tiles(q, rows, columns);
        return;
    }
#endif
    if (q->factors == GEMM_TO_BF16) {
        multiply_rounded(q, rows, columns);
        return;
    }
    const int tail = columns % VX_LANES;
    const int transposed = q->k_stride != 1 && q->k > 1;
    const int vectors = gemm_vectors(columns);
    tile_function *const *shapes = tiles[transposed ? 1 + q->in_l2 : 0][vectors - 1];
    /* The tallest tile that fits and leaves nothing, or enough for a tile of eight accumulators, below which the FMA
     * units wait for their own results. */
    const int64_t least = vx_ceil_div(8, vectors);
    int tallest = 0;
    while (!shapes[tallest]) tallest++;
    int64_t row = 0;
    for (; row + 2 * height[tallest] <= rows; row += height[tallest]) shapes[tallest](q, row, tail);
    while (row < rows) {
        int best = HEIGHTS - 1;
        for (int h = HEIGHTS - 1; h >= 0; h--) {
            const int64_t left = rows - row - height[h];
            if (shapes[h] && left >= 0 && (left == 0 || left >= least || height[h] < least)) best = h;
        }
        shapes[best](q, row, tail);
        row += height[best];
    }
}

int64_t VX_CPU(gemm_pack)(float *packed, const float *b, int64_t k, int columns, int64_t k_stride,
                          int64_t column_stride)
{
    const int width = gemm_vectors(columns) * VX_LANES;
    if (column_stride == 1) {
        for (int64_t p = 0; p < k; p++) {
            float *to = packed + p * width;
            const float *from = b + p * k_stride;
            int j = 0;
            for (; j + VX_LANES <= columns; j += VX_LANES) vf_store(to + j, vf_load(from + j));
            if (j < columns) vf_store(to + j, vf_load_n(from + j, columns - j));
        }
        return width;
    }
    /* Transposed: squares of 4 x 4, turned in registers. */
    int64_t p = 0;
    if (k_stride == 1)
        for (; p + 4 <= k; p += 4) {
            int j = 0;
            for (; j + 4 <= columns; j += 4)
                transpose4(packed + p * width + j, width, b + p + j * column_stride, column_stride);
            for (; j < width; j++)
                for (int i = 0; i < 4; i++)
                    packed[(p + i) * width + j] = j < columns ? b[p + i + j * column_stride] : 0;
        }
    for (; p < k; p++)
        for (int j = 0; j < width; j++) packed[p * width + j] = j < columns ? b[p * k_stride + j * column_stride] : 0;
    return width;
}

/* -- One thread's product ------------------------------------------------------------------------------------------ */

typedef struct matrix {
    const float *data;
    int64_t row_stride, column_stride;
} matrix;

/* Computes C (m,n) = alpha A (m,k) B (k,n) + beta C + bias in blocks of rows and of k. k is cut evenly, so that no
 * short rest pays for another pass over C. Where factors are to be rounded and no tile does it as it is filled, a block
 * of A is rounded once for all columns. */
static void product(int64_t m, int64_t n, int64_t k, float alpha, matrix a, matrix b, float beta, float *c,
                    int64_t c_stride, const float *bias, int stream)
{
    if (m <= 0 || n <= 0) return;
    _Alignas(64) float packed[BLOCK_DEPTH * GEMM_COLUMNS], rounded[BF16_TILES ? 1 : BLOCK_ROWS * BLOCK_DEPTH];
    const int transposed = a.column_stride != 1 && k > 1, rounds = !BF16_TILES && gemm_factors() == GEMM_TO_BF16;
    const int64_t most = transposed ? BLOCK_DEPTH_DIRECT : BLOCK_DEPTH;
    const int64_t blocks = vx_max64(vx_ceil_div(k, most), 1), k_block = vx_ceil_div(k, blocks);
    for (int64_t i = 0; i < m; i += BLOCK_ROWS) {
        const int64_t rows = vx_min64(BLOCK_ROWS, m - i);
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t p = block * k_block, depth = vx_max64(vx_min64(k_block, k - p), 0);
            matrix left = {a.data + i * a.row_stride + p * a.column_stride, a.row_stride, a.column_stride};
            if (rounds) {
                for (int64_t s = 0; transposed && s < depth; s++)
                    copy_rounded(rounded + s * rows, left.data + s * a.column_stride, rows);
                for (int64_t r = 0; !transposed && r < rows; r++)
                    copy_rounded(rounded + r * depth, left.data + r * a.row_stride, depth);
                left = transposed ? (matrix){rounded, 1, rows} : (matrix){rounded, depth, 1};
            }
            for (int64_t j = 0; j < n; j += GEMM_COLUMNS) {
                const int columns = (int)vx_min64(GEMM_COLUMNS, n - j);
                const float *columns_of_b = b.data + p * b.row_stride + j * b.column_stride;
                int64_t b_stride = b.row_stride;
                const int direct = b.column_stride == 1 && columns % VX_LANES == 0 && (transposed || rows < 32);
                if (!direct || rounds) {
                    b_stride = VX_CPU(gemm_pack)(packed, columns_of_b, depth, columns, b.row_stride, b.column_stride);
                    columns_of_b = packed;
                }
                if (rounds) round_to_bf16(packed, depth * b_stride);
                const gemm_product q = {.segments = 1,
                                        .k = depth,
                                        .a = {left.data},
                                        .row_stride = left.row_stride,
                                        .k_stride = left.column_stride,
                                        .b = {columns_of_b},
                                        .b_stride = b_stride,
                                        .c = c + i * c_stride + j,
                                        .c_stride = c_stride,
                                        .alpha = alpha,
                                        .beta = block ? 1 : beta,
                                        .bias = bias && block == 0 ? bias + j : 0,
                                        .stream = stream && blocks == 1,
                                        .factors = rounds ? GEMM_BF16 : gemm_factors()};
                VX_CPU(gemm_multiply)(&q, rows, columns);
            }
        }
    }
}

/* -- The op -------------------------------------------------------------------------------------------------------- */

enum {
    SERIAL_BELOW = 20000,   /* multiply-adds that are not worth waking a thread for */
    BLOCK_COLUMNS = 512,    /* of a task; a multiple of GEMM_COLUMNS */
    CUT_K_FROM = 2048,      /* shortest k that is cut */
    PARTS = 64,             /* most parts of k */
    PARTS_FLOATS = 4 << 20, /* most scratch for them: 16 MiB */
};

/* Returns matrix `index` of the batch x. A stride along a dimension of size 0 or 1 is never used: 1 then. */
static matrix matrix_of(const vx_tensor *x, int64_t index)
{
    return (matrix){vx_f32(x) + index * x->stride[0],
                    x->shape[1] > 1     ? x->stride[1]
                    : x->stride[2] == 1 ? x->shape[2]
                                        : 1,
                    x->shape[2] > 1 ? x->stride[2] : 1};
}

/* Computes the op in parts of k, each summed by one thread into scratch. */
static int cut_k(vx_tensor *c, const vx_tensor *a, const vx_tensor *b, const float *bias, float alpha, float beta,
                 int64_t parts)
{
    const int64_t m = c->shape[1], n = c->shape[2], k = a->shape[2], length = vx_ceil_div(k, parts);
    float *partial = vx_scratch("gemm", sizeof(float) * (size_t)(parts * m * n));
    if (!partial) return VX_ENOMEM;
    for (int64_t index = 0; index < c->shape[0]; index++) {
        const matrix left = matrix_of(a, index), right = matrix_of(b, index);
        float *out = vx_f32(c) + index * c->stride[0];
#pragma omp parallel
        {
#pragma omp for schedule(dynamic)
            for (int64_t part = 0; part < parts; part++) {
                const int64_t p = part * length, depth = vx_max64(vx_min64(length, k - p), 0);
                product(m, n, depth, 1,
                        (matrix){left.data + p * left.column_stride, left.row_stride, left.column_stride},
                        (matrix){right.data + p * right.row_stride, right.row_stride, right.column_stride}, 0,
                        partial + part * m * n, n, 0, 0);
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < m; i++) {
                float *row = out + i * matrix_of(c, index).row_stride;
                float *sum = partial + i * n;
                for (int64_t part = 1; part < parts; part++)
                    for (int64_t j = 0; j < n; j++) sum[j] += partial[(part * m + i) * n + j];
                for (int64_t j = 0; j < n; j++)
                    row[j] = alpha * sum[j] + (beta != 0 ? beta * row[j] : 0) + (bias ? bias[j] : 0);
            }
        }
    }
    vx_scratch_free(partial);
    return VX_OK;
}

int VX_CPU(gemm)(vx_tensor *c, vx_tensor *a, vx_tensor *b, vx_tensor *bias, float alpha, float beta)
{
    const int64_t batch = c->shape[0], m = c->shape[1], n = c->shape[2], k = a->shape[2];
    if (check_gemm(c, a, b)) return VX_EINVAL;
    if (!batch || !m || !n) return VX_OK;

    /* parts long enough that adding them up is a twentieth of the work */
    const int64_t parts = vx_min64(vx_min64(PARTS, k / 1024), PARTS_FLOATS / (m * n));
    const int64_t row_blocks = vx_ceil_div(m, BLOCK_ROWS), column_blocks = vx_ceil_div(n, BLOCK_COLUMNS);
    if (k >= CUT_K_FROM && parts > batch * row_blocks * column_blocks)
        return cut_k(c, a, b, vx_f32(bias), alpha, beta, parts);

    const int64_t tasks = batch * row_blocks * column_blocks;
    const int stream = beta == 0 && vf_streams(vx_f32(c), batch * m * n, c->stride[0] | c->stride[1] | n);
#pragma omp parallel for schedule(static) if (batch * m * n * k > SERIAL_BELOW && tasks > 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t index = task / (row_blocks * column_blocks), rest = task % (row_blocks * column_blocks);
        const int64_t i = rest / column_blocks * BLOCK_ROWS, j = rest % column_blocks * BLOCK_COLUMNS;
        matrix left = matrix_of(a, index), right = matrix_of(b, index), out = matrix_of(c, index);
        left.data += i * left.row_stride;
        right.data += j * right.column_stride;
        product(vx_min64(BLOCK_ROWS, m - i), vx_min64(BLOCK_COLUMNS, n - j), k, alpha, left, right, beta,
                vx_f32(c) + index * c->stride[0] + i * out.row_stride + j, out.row_stride, bias ? vx_f32(bias) + j : 0,
                stream);
        if (stream) vf_stream_end();
    }
    return VX_OK;
}
