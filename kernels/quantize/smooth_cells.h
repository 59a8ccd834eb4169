/* smooth_cells.h: which cells of codes (cells.h) a narrow row of the smoothed quantizer has to meet, forward and
 * backward.
 *
 * What is left out. A row meets every cell whose box lets a code come within BITS = 28 + ceil(log2 M) of its largest
 * logit (to base 2; of a lower bound of it, the largest logit of its nearest cell). All others together have less than
 * 2^-28 of the row's sum, an eighth of the last bit of a float32, and none of them changes a float32 that it is added
 * to one by one. What is left out depends on the row and the codes alone.
 *
 * The bound. u is the row on the sphere, z_i / |z_i|, and q^ a code, as they are in float32, B the largest |q^|^2, s =
 * scale. A logit is s <u, q^> = s (|u|^2 + |q^|^2 - |u - q^|^2) / 2. However it is computed (from 0, or from minus the
 * reference, which is at most s + 1) it takes at most 2 D + 2 roundings of sums that are at most 2 s + 2, so it is
 * within E = 6 (D + 4) 2^-24 (s + 1). So a code farther from u than R, R^2 = |u|^2 + B - 2 (largest - BITS - 2 E) / s,
 * has a computed logit BITS below the computed `largest`. |u|^2 as computed is within E / s, and is given a third E. In
 * the backward pass the logarithm of the row's sum takes the place of the largest logit, which is not above it: what is
 * left out has p below 2^-BITS.
 */
#ifndef VX_SMOOTH_CELLS_H
#define VX_SMOOTH_CELLS_H

#include "cells.h"
#include "smooth_narrow.h"

enum { NEAR_TRIAL = 64 /* rows that say how many cells a row meets */ };

/* What all rows of a group need to know of its codes. */
typedef struct near_codes {
    code_cells cells;
    const float *hat; /* (cells, narrow, 64) codes on the sphere */
    int64_t M;
    float scale;
    double excess, within; /* B, and BITS + 3 E */
} near_codes;

/* Returns BITS of the banner. */
static inline int near_bits(int64_t M)
{
    int bits = 28;
    while (M > (int64_t)1 << (bits - 28)) bits++;
    return bits;
}

/* Says whether a cell could ever be left out: a row and a code that are opposite must be. */
static inline int near_may_pay(const smooth_call *c, const smooth_cpu *cpu)
{
    return cpu->narrow && c->noise_kind == NOISE_NONE && c->regularizer != VX_REG_PPL && c->M >= 8 * CELL &&
           c->N >= 1024 && 2 * cpu->scale > 1.5f * (float)near_bits(c->M);
}

/* Fills n for group g: cells of the codes, of which points (M, narrow) becomes a copy. */
static inline void near_codes_of(near_codes *n, const smooth_call *c, const smooth_cpu *cpu, int64_t g, float *points)
{
    const int64_t D = cpu->narrow;
    double excess = 0;
#pragma omp parallel for schedule(static) reduction(max : excess)
    for (int64_t m = 0; m < c->M; m++) {
        const float *q = c->codebook + (g * c->M + m) * c->D;
        const double norm = fmax(row_norm(q, c->D), GUARD);
        double square = 0;
        for (int64_t d = 0; d < D; d++) {
            const float x = d < c->D ? (float)(q[d] / norm) : 0;
            points[m * D + d] = x;
            square += (double)x * x;
        }
        excess = fmax(excess, square);
    }
    n->M = c->M, n->scale = cpu->scale;
    n->excess = excess;
    n->within = near_bits(c->M) + 3 * 6 * (double)(D + 4) * 0x1p-24 * (cpu->scale + 1);
    fill_cells(&n->cells, points);
}

/* Returns the limit of squared distances, R^2 of the banner, for a row with squared norm `square` on the sphere. */
VX_INLINE float near_limit(const near_codes *n, float square, double largest)
{
    return limit_of(square + n->excess - 2 * (largest - n->within) / n->scale, n->cells.D);
}

/* Lists the cells within limit of the row u (D) in list, ascending; far (padded groups): its distances from groups.
 * Returns their number. */
VX_INLINE int64_t list_cells(const int D, const near_codes *n, const float *u, const float *far, float limit,
                             int32_t *list)
{
    const code_cells *cells = &n->cells;
    int64_t count = 0;
    for (int64_t i = 0; i < cells->group.padded; i += VX_LANES)
        for (uint32_t groups = boxes_within(far + i, VX_LANES, limit); groups; groups &= groups - 1) {
            const int64_t first = (i + __builtin_ctz(groups)) * GROUP;
            float squares[GROUP];
            for (int l = 0; l < GROUP; l += VX_LANES)
                vf_store(squares + l, box_distances(D, &cells->cell, first + l, u));
            for (uint32_t within = boxes_within(squares, GROUP, limit); within; within &= within - 1)
                list[count++] = (int32_t)(first + __builtin_ctz(within));
        }
    return count;
}

#endif
