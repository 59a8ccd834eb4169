/* thin.h: the smoothed quantizer's inner loops for narrow rows (D <= 8), where a product of tiles would waste most of a
 * vector.
 *
 * Here vectors run over codes everywhere and a row's D numbers are broadcast. D is a constant of each copy (3, 4 or 8;
 * narrower rows are filled up with zeros), so that what belongs to a row (forward) or to a vector of codes (backward) stays
 * in registers. At D = 3 a logit costs 3 multiply-adds, a power 9 operations, its use 5 (forward) or 11 (backward): bound by
 * the two vector units, not by memory.
 */
#ifndef VX_THIN_H
#define VX_THIN_H

#include "smooth.h"

enum { THIN_MAX = 8, PAIR = 2, THIN_BLOCK = 8 };

/* -- Forward: two rows meet a strip of panels ------------------------------------------------------------------------- */

/* What one row accumulates, lane by lane. */
typedef struct thin_row {
    vf sum, squares, noisy_sum; /* of powers, their squares, the noisy weights */
    vf best;                    /* largest logit (noisy: weight) */
    vi best_panel;              /* and the first panel that has it */
    vf o[THIN_MAX];             /* weight times code */
} thin_row;

/* Logits of one vector of codes: start + sum over d of a[d] q[d] */
VX_INLINE vf thin_logits(const int D, float start, const float *a, const float *q)
{
    vf s = vf_set1(start);
#pragma GCC unroll 8
    for (int d = 0; d < D; d++) s += vf_load(q + d * PANEL) * a[d];
    return s;
}

/* Lanes whose code is not below M take the padding's logit. */
VX_INLINE vf thin_pad(vf s, int64_t first_code, int64_t M)
{
    vi lane;
    for (int l = 0; l < VX_LANES; l++) lane[l] = l;
    return vf_select(lane + (int32_t)first_code < (vi){0} + (int32_t)M, s, vf_set1(PADDING));
}

/* powers = 2^powers of count vectors, a multiple of 4 */
VX_INLINE void thin_powers(float *powers, int count)
{
    for (int v = 0; v < count; v += 4) {
        vf x[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) x[j] = vf_load(powers + (v + j) * VX_LANES);
        vf_exp2_many(4, x);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) vf_store(powers + (v + j) * VX_LANES, x[j]);
    }
}

/* Panels first .. end - 1 for the rows a (2,D). s, e: where the rows' logits and powers are kept, where keep_s, keep_e.
 * noise: (end - first, 2, 64) rates where noisy. M: number of codes, looked at where tail is 1.
 *
 * A panel passes through three short loops (logits, powers, use) with a buffer in between, since one long loop would hold
 * more than a processor's scheduler sees, and its chains of dependent operations would stand still. */
VX_INLINE void thin_forward(const int D, const int noisy, const int keep_s, const int keep_e, const int square,
                            const int tail, thin_row *row, const float *a, const float *start, const float *hat,
                            const float *raw, int64_t first, int64_t end, float *s, float *e, int64_t ld, const float *noise,
                            int64_t M)
{
    _Alignas(64) float power[PAIR * PANEL];
    vf sum[PAIR], squares[PAIR], noisy_sum[PAIR], o[PAIR][THIN_MAX];
#pragma GCC unroll 2
    for (int r = 0; r < PAIR; r++) {
        sum[r] = row[r].sum, squares[r] = row[r].squares, noisy_sum[r] = row[r].noisy_sum;
#pragma GCC unroll 8
        for (int d = 0; d < D; d++) o[r][d] = row[r].o[d];
    }
    for (int64_t panel = first; panel < end; panel++) {
        const float *q = hat + panel * PANEL * D, *values = raw + panel * PANEL * D;
        vf top[PAIR] = {vf_set1(-INFINITY), vf_set1(-INFINITY)};
#pragma GCC unroll 4
        for (int v = 0; v < PANEL; v += VX_LANES) {
            vf x[PAIR] = {vf_set1(start[0]), vf_set1(start[1])};
#pragma GCC unroll 8
            for (int d = 0; d < D; d++)
#pragma GCC unroll 2
                for (int r = 0; r < PAIR; r++) x[r] += vf_load(q + d * PANEL + v) * a[r * D + d];
#pragma GCC unroll 2
            for (int r = 0; r < PAIR; r++) {
                if (tail) x[r] = thin_pad(x[r], panel * PANEL + v, M);
                if (keep_s) vf_store(s + r * ld + panel * PANEL + v, x[r]);
                if (!noisy) top[r] = vf_max(top[r], x[r]);
                vf_store(power + r * PANEL + v, x[r]);
            }
        }
        thin_powers(power, PAIR * VECTORS);
#pragma GCC unroll 4
        for (int v = 0; v < PANEL; v += VX_LANES)
#pragma GCC unroll 2
            for (int r = 0; r < PAIR; r++) {
                vf x = vf_load(power + r * PANEL + v);
                if (keep_e) vf_store(e + r * ld + panel * PANEL + v, x);
                sum[r] += x;
                if (square) squares[r] += x * x;
                if (noisy) {
                    x *= vf_load(noise + ((panel - first) * PAIR + r) * PANEL + v);
                    noisy_sum[r] += x;
                    top[r] = vf_max(top[r], x);
                }
#pragma GCC unroll 8
                for (int d = 0; d < D; d++) o[r][d] += x * vf_load(values + d * PANEL + v);
            }
#pragma GCC unroll 2
        for (int r = 0; r < PAIR; r++) {
            row[r].best_panel = vi_where_greater(top[r], row[r].best, (vi){0} + (int32_t)panel, row[r].best_panel);
            row[r].best = vf_max(top[r], row[r].best);
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < PAIR; r++) {
        row[r].sum = sum[r], row[r].squares = squares[r], row[r].noisy_sum = noisy_sum[r];
#pragma GCC unroll 8
        for (int d = 0; d < D; d++) row[r].o[d] = o[r][d];
    }
}

/* largest[i] = the largest logit of each of THIN_BLOCK rows a (THIN_BLOCK,D). */
VX_INLINE void thin_maxima(const int D, const float *a, const float *hat, int64_t M, float *largest)
{
    vf top[THIN_BLOCK];
#pragma GCC unroll 8
    for (int i = 0; i < THIN_BLOCK; i++) top[i] = vf_set1(-INFINITY);
    for (int64_t code = 0; code < M; code += VX_LANES) {
        const float *q = hat + code / PANEL * PANEL * D + code % PANEL;
        vf s[THIN_BLOCK] = {{0}};
#pragma GCC unroll 8
        for (int d = 0; d < D; d++)
#pragma GCC unroll 8
            for (int i = 0; i < THIN_BLOCK; i++) s[i] += vf_load(q + d * PANEL) * a[i * D + d];
#pragma GCC unroll 8
        for (int i = 0; i < THIN_BLOCK; i++) top[i] = vf_max(top[i], code + VX_LANES > M ? thin_pad(s[i], code, M) : s[i]);
    }
    for (int i = 0; i < THIN_BLOCK; i++) largest[i] = vf_maximum(top[i]);
}

/* -- Backward: one vector of codes meets a run of rows ---------------------------------------------------------------- */

enum { RUN = 48, QUAD = 4 }; /* most rows of a run; rows side by side */

/* What a run of rows brings; see smooth_backward.c's worker for the meaning. */
typedef struct thin_run {
    const float *z, *dy;                                             /* (rows, D) */
    const float *start, *mix_offset, *pi_factor, *pi_offset, *noisy; /* (rows) */
    const float *noise;                                              /* (rows, 64) rates of the panel, where noisy */
    vf *dhat;                                                        /* (rows, D + 1) sum of x q^, and of x, lane by lane */
    int64_t rows;                                                    /* a multiple of QUAD, at most RUN */
} thin_run;

/* Codes v .. v + VX_LANES - 1 of a panel (hat, raw (D,64) and ppl (64) point there); their dhat and dmix (D,64) grow.
 * square: pi_factor is used. mix: dmix is wanted. filled: codes that exist, from v on, looked at where tail is 1. Four rows
 * are four chains of operations side by side. */
VX_INLINE void thin_backward(const int D, const int noisy, const int square, const int with_ppl, const int mix,
                             const int tail, const thin_run *run, int v, const float *hat, const float *raw,
                             const float *ppl, float *dhat, float *dmix, int64_t filled)
{
    vf q[THIN_MAX], values[THIN_MAX], dq[THIN_MAX], dv[THIN_MAX];
#pragma GCC unroll 8
    for (int d = 0; d < D; d++) {
        q[d] = vf_load(hat + d * PANEL);
        values[d] = vf_load(raw + d * PANEL);
        dq[d] = vf_load(dhat + d * PANEL);
        dv[d] = mix ? vf_load(dmix + d * PANEL) : vf_zero();
    }
    for (int64_t i = 0; i < run->rows; i += QUAD) {
        const float *z = run->z + i * D, *dy = run->dy + i * D;
        vf *sum = run->dhat + i * (D + 1), pi[QUAD], x[QUAD], weight[QUAD];
#pragma GCC unroll 4
        for (int r = 0; r < QUAD; r++) pi[r] = vf_set1(run->start[i + r]);
#pragma GCC unroll 8
        for (int d = 0; d < D; d++)
#pragma GCC unroll 4
            for (int r = 0; r < QUAD; r++) pi[r] += q[d] * z[r * D + d];
#pragma GCC unroll 4
        for (int r = 0; r < QUAD; r++)
            if (tail) pi[r] = thin_pad(pi[r], 0, filled);
        vf_exp2_many(QUAD, pi);
#pragma GCC unroll 4
        for (int r = 0; r < QUAD; r++) x[r] = vf_set1(run->mix_offset[i + r]);
#pragma GCC unroll 8
        for (int d = 0; d < D; d++)
#pragma GCC unroll 4
            for (int r = 0; r < QUAD; r++) x[r] += values[d] * dy[r * D + d];
#pragma GCC unroll 4
        for (int r = 0; r < QUAD; r++) {
            if (noisy) {
                weight[r] = pi[r] * vf_load(run->noise + (i + r) * PANEL + v) * run->noisy[i + r];
                vf regular = vf_set1(run->pi_offset[i + r]);
                if (square) regular += pi[r] * run->pi_factor[i + r];
                if (with_ppl) regular += vf_load(ppl);
                x[r] = weight[r] * x[r] + pi[r] * regular;
            } else {
                weight[r] = pi[r];
                if (square) x[r] += pi[r] * run->pi_factor[i + r];
                if (with_ppl) x[r] += vf_load(ppl);
                x[r] *= pi[r];
            }
        }
#pragma GCC unroll 8
        for (int d = 0; d < D; d++)
#pragma GCC unroll 4
            for (int r = 0; r < QUAD; r++) {
                dq[d] += x[r] * z[r * D + d];
                if (mix) dv[d] += weight[r] * dy[r * D + d];
                sum[r * (D + 1) + d] += x[r] * q[d];
            }
#pragma GCC unroll 4
        for (int r = 0; r < QUAD; r++) sum[r * (D + 1) + D] += x[r];
    }
#pragma GCC unroll 8
    for (int d = 0; d < D; d++) {
        vf_store(dhat + d * PANEL, dq[d]);
        if (mix) vf_store(dmix + d * PANEL, dv[d]);
    }
}

#endif
