/* cells.h: codes in cells of 64 that lie near each other, so that whole cells which cannot matter to a row need not be
 * looked at.
 *
 * A cell has a box: the least and the largest number of its codes in each dimension. Cells come from halving the codes
 * along the dimension in which they spread most, until 64 or fewer are left; only the last may have fewer. 16 cells in
 * a row are a group, which has a box too, so that a row meets the boxes of the groups first, and only in those that are
 * near the boxes of the cells. (Balls around the cells' means, also of halves along principal axes, let two to ten
 * times as many cells through, on spheres, in space, and on manifolds of 32 dimensions alike.)
 *
 * The bound. Let d be the distance of a row a from a box. No code q in it is nearer, so that
 *     <a, q> = (|a|^2 + |q|^2 - |a - q|^2) / 2 <= (|a|^2 + |q|^2 - d^2) / 2
 * A kernel that wants no code with |a - q|^2 > R^2 leaves a box out where d^2 > R^2. It makes R so large that the
 * rounding of its own products is in it.
 *
 * Rounding of the bound. u = 2^-24. A dimension's distance from the box is one difference of two float32, off by u of
 * itself, so that the computed d^2 is at most d^2 (1 + u)^(D + 2) + D 2^-149. limit_of() gives R^2 (1 + 2 (D + 8) u) +
 * 2^-100, rounded to float32. A computed d^2 above that is a d^2 above R^2, also where squares vanish; where d^2
 * overflows it is truly above a finite limit.
 */
#ifndef VX_CELLS_H
#define VX_CELLS_H

#include <float.h>

#include "cpu/row_norms.h"
#include "cpu/scratch.h"
#include "shared/float_order.h"

enum {
    CELL = 64,
    CELL_VECTORS = CELL / VX_LANES,
    GROUP = 16,       /* cells */
    CELL_SAMPLE = 64, /* codes that say in which dimension a set spreads most */
};

/* Boxes, side by side; padding is infinitely far from everything. */
typedef struct boxes {
    int64_t count, padded; /* padded: up to whole groups, or vectors */
    float *low, *high;     /* (D, padded) */
} boxes;

typedef struct code_cells {
    int64_t M, D;
    boxes cell, group;
    int32_t *code;  /* (cell.count, 64) the code at each place; INT32_MAX beyond the last */
    uint64_t *keys; /* (M) working space of fill_cells() */
} code_cells;

/* Hands out the arrays for M codes of D numbers. */
static inline void carve_cells(scratch *memory, code_cells *c, int64_t M, int64_t D)
{
    c->M = M, c->D = D;
    c->cell.count = vx_ceil_div(M, CELL), c->group.count = vx_ceil_div(c->cell.count, GROUP);
    c->cell.padded = c->group.count * GROUP, c->group.padded = vx_ceil_div(c->group.count, VX_LANES) * VX_LANES;
    c->code = carve_i32(memory, c->cell.count * CELL);
    c->keys = carve_u64(memory, M);
    c->cell.low = carve_f32(memory, D * c->cell.padded), c->cell.high = carve_f32(memory, D * c->cell.padded);
    c->group.low = carve_f32(memory, D * c->group.padded), c->group.high = carve_f32(memory, D * c->group.padded);
}

/* -- Making cells -------------------------------------------------------------------------------------------------- */

/* Brings the `count` smallest of the n distinct keys to the front. */
static inline void bring_smallest(uint64_t *key, int64_t n, int64_t count)
{
    int64_t low = 0, high = n - 1;
    while (low < high) {
        const uint64_t a = key[low], b = key[low + (high - low) / 2], c = key[high];
        const uint64_t least = a < b ? a : b, most = a < b ? b : a, pivot = c < least ? least : c > most ? most : c;
        int64_t i = low, j = high;
        while (i <= j) {
            while (key[i] < pivot) i++;
            while (key[j] > pivot) j--;
            if (i > j) break;
            const uint64_t x = key[i];
            key[i++] = key[j], key[j--] = x;
        }
        if (count - 1 <= j) high = j;
        else if (count - 1 >= i) low = i;
        else return;
    }
}

/* Returns the dimension in which codes[0 .. n - 1] vary most, going by a sample. */
static inline int64_t widest_dimension(const code_cells *c, const float *points, const int32_t *codes, int64_t n)
{
    const int64_t D = c->D, sample = vx_min64(n, CELL_SAMPLE);
    float mean[D], spread[D];
    memset(mean, 0, sizeof mean), memset(spread, 0, sizeof spread);
    for (int64_t i = 0; i < sample; i++)
        for (int64_t d = 0; d < D; d++) mean[d] += points[codes[i * n / sample] * D + d] / (float)sample;
    for (int64_t i = 0; i < sample; i++)
        for (int64_t d = 0; d < D; d++) {
            const float x = points[codes[i * n / sample] * D + d] - mean[d];
            spread[d] += x * x;
        }
    int64_t widest = 0;
    for (int64_t d = 1; d < D; d++)
        if (spread[d] > spread[widest]) widest = d;
    return widest;
}

/* Orders places first .. end - 1 along their widest dimension so far that they can be halved; returns where. Groups
 * stay whole. */
static inline int64_t halve(const code_cells *c, const float *points, int64_t first, int64_t end)
{
    const int64_t n = end - first, unit = n > GROUP * CELL ? GROUP * CELL : CELL;
    const int64_t half = vx_ceil_div(n, unit) / 2 * unit;
    int32_t *codes = c->code + first;
    uint64_t *keys = c->keys + first;
    const int64_t d = widest_dimension(c, points, codes, n);
    for (int64_t i = 0; i < n; i++)
        keys[i] = (uint64_t)float_order(points[codes[i] * c->D + d]) << 32 | (uint32_t)codes[i];
    bring_smallest(keys, n, half);
    for (int64_t i = 0; i < n; i++) codes[i] = (int32_t)(uint32_t)keys[i];
    return first + half;
}

/* Halves places first .. end - 1 down to cells; large halves are tasks. */
static void split_cells(const code_cells *c, const float *points, int64_t first, int64_t end)
{
    while (end - first > CELL) {
        const int64_t middle = halve(c, points, first, end);
#pragma omp task if (middle - first > 16 * CELL)
        split_cells(c, points, first, middle);
        first = middle;
    }
}

/* Empties box i. */
static inline void clear_box(const boxes *b, int64_t D, int64_t i)
{
    for (int64_t d = 0; d < D; d++) b->low[d * b->padded + i] = FLT_MAX, b->high[d * b->padded + i] = -FLT_MAX;
}

/* Makes box i hold the point x (D) too. */
static inline void extend_box(const boxes *b, int64_t i, int64_t D, const float *x)
{
    for (int64_t d = 0; d < D; d++) {
        float *low = b->low + d * b->padded + i, *high = b->high + d * b->padded + i;
        *low = x[d] < *low ? x[d] : *low;
        *high = x[d] > *high ? x[d] : *high;
    }
}

/* Numbers the places, and empties the boxes. */
static inline void clear_cells(const code_cells *c)
{
    for (int64_t i = 0; i < c->cell.count * CELL; i++) c->code[i] = i < c->M ? (int32_t)i : INT32_MAX;
    for (int64_t i = 0; i < c->cell.padded; i++) clear_box(&c->cell, c->D, i);
    for (int64_t i = 0; i < c->group.padded; i++) clear_box(&c->group, c->D, i);
}

/* Fills the cells from points (M,D), the codes one after the other, each of them finite. */
static inline void fill_cells(const code_cells *c, const float *points)
{
    clear_cells(c);
#pragma omp parallel
    {
#pragma omp single
        split_cells(c, points, 0, c->M);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < c->group.count; g++)
            for (int64_t i = g * GROUP * CELL; i < vx_min64((g + 1) * GROUP * CELL, c->M); i++) {
                extend_box(&c->cell, i / CELL, c->D, points + c->code[i] * c->D);
                extend_box(&c->group, g, c->D, points + c->code[i] * c->D);
            }
    }
}

/* Makes one cell only, as box 0: at the cost of two codes a code, to see whether cells of these points are small. */
static inline void fill_one_cell(const code_cells *c, const float *points)
{
    int64_t first = 0, end = c->M;
    clear_cells(c);
    for (int side = 0; end - first > CELL; side = !side) {
        const int64_t middle = halve(c, points, first, end);
        if (side) first = middle;
        else end = middle;
    }
    for (int64_t i = first; i < end; i++) extend_box(&c->cell, 0, c->D, points + c->code[i] * c->D);
}

/* -- Rows and cells ------------------------------------------------------------------------------------------------ */

/* Returns the squared distances of row a (D) from the boxes of the vector that begins at box i. */
VX_INLINE vf box_distances(const int64_t D, const boxes *b, int64_t i, const float *a)
{
    vf sum = vf_zero();
#pragma GCC unroll 8
    for (int64_t d = 0; d < D; d++) {
        const vf x = vf_set1(a[d]), below = vf_load(b->low + d * b->padded + i) - x,
                 above = x - vf_load(b->high + d * b->padded + i), out = vf_max(vf_max(below, above), vf_zero());
        sum += out * out;
    }
    return sum;
}

/* Fills squares (count) with the distances from boxes first .. first + count - 1, whole vectors. Returns the nearest;
 * of several the lowest but for lanes. */
VX_INLINE int64_t nearest_box(const int64_t D, const boxes *b, int64_t first, int64_t count, const float *a,
                              float *squares)
{
    vf least = vf_set1(INFINITY);
    vi at = {0}, here;
    for (int l = 0; l < VX_LANES; l++) here[l] = l;
    for (int64_t i = 0; i < count; i += VX_LANES) {
        const vf square = box_distances(D, b, first + i, a);
        vf_store(squares + i, square);
        at = vi_where_greater(least, square, here, at);
        least = vf_min(square, least);
        here += VX_LANES;
    }
    const float smallest = -vf_maximum(-least);
    return first + at[__builtin_ctz(~vf_greater_bits(least, vf_set1(smallest)))];
}

/* Returns a bit for each of count boxes (whole vectors, at most 32 boxes) at whose distance there may be something. */
VX_INLINE uint32_t boxes_within(const float *squares, int count, float limit)
{
    uint32_t beyond = 0;
    for (int i = 0; i < count; i += VX_LANES) beyond |= vf_greater_bits(vf_load(squares + i), vf_set1(limit)) << i;
    return ~beyond & (uint32_t)((1ull << count) - 1);
}

/* Returns what a computed squared distance from a box exceeds only where the true one exceeds `square`. */
VX_INLINE float limit_of(double square, int64_t D)
{
    return (float)(fmax(square, 0) * (1 + (double)(D + 8) * 0x1p-23) + 0x1p-100);
}

#endif
