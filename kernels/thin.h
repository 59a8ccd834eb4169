/* thin.h: the smoothed quantizer's inner loops for narrow rows (D <= 8), where a product of tiles would waste most of a vector.
 *
 * Here vectors run over codes everywhere and a row's D numbers are broadcast. D is a constant of each copy (3, 4 or 8; narrower
 * rows are filled up with zeros), so that what belongs to a row (forward) or to a vector of codes (backward) stays in registers.
 * At D = 3 a logit costs 3 multiply-adds, a power 9 operations, its use 5 (forward) or 11 (backward): bound by the two vector
 * units, not by memory.
 */
#ifndef VX_THIN_H
#define VX_THIN_H

#include "smooth.h"

enum { THIN_MAX = 8, PAIR = 2 };

/* -- Forward: two rows meet a strip of panels ------------------------------------------------------------------------------- */

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

/* Panels first .. end - 1 for the rows a (2,D). s, e: where the rows' logits and powers are kept, or NULL. noise: (2, strip
 * length in codes) rates where noisy. M: number of codes, looked at where tail is 1. */
VX_INLINE void thin_forward(const int D, const int noisy, const int tail, thin_row *row, const float *a, const float *start,
                            const float *hat, const float *raw, int64_t first, int64_t end, float *s, float *e, int64_t ld,
                            const float *noise, int64_t ld_noise, int64_t M)
{
    thin_row t[PAIR] = {row[0], row[1]};
    for (int64_t panel = first; panel < end; panel++) {
        vf top[PAIR] = {vf_set1(-INFINITY), vf_set1(-INFINITY)};
        for (int v = 0; v < PANEL; v += VX_LANES) {
            const int64_t code = panel * PANEL + v;
            const float *q = hat + panel * PANEL * D + v, *values = raw + panel * PANEL * D + v;
#pragma GCC unroll 2
            for (int r = 0; r < PAIR; r++) {
                vf x = thin_logits(D, start[r], a + r * D, q);
                if (tail) x = thin_pad(x, code, M);
                if (s) vf_store(s + r * ld + code, x);
                vf power = vf_exp2(x), weight = power;
                if (e) vf_store(e + r * ld + code, power);
                t[r].sum += power;
                t[r].squares += power * power;
                if (noisy) {
                    weight = power * vf_load(noise + r * ld_noise + (code - first * PANEL));
                    t[r].noisy_sum += weight;
                }
                top[r] = vf_max(top[r], noisy ? weight : x);
#pragma GCC unroll 8
                for (int d = 0; d < D; d++) t[r].o[d] += weight * vf_load(values + d * PANEL);
            }
        }
        for (int r = 0; r < PAIR; r++) {
            t[r].best_panel = vi_where_greater(top[r], t[r].best, (vi){0} + (int32_t)panel, t[r].best_panel);
            t[r].best = vf_max(top[r], t[r].best);
        }
    }
    row[0] = t[0], row[1] = t[1];
}

/* Largest logit of a row. */
VX_INLINE float thin_maximum(const int D, const float *a, const float *hat, int64_t M)
{
    vf top = vf_set1(-INFINITY);
    for (int64_t code = 0; code < M; code += VX_LANES) {
        vf s = thin_logits(D, 0, a, hat + code / PANEL * PANEL * D + code % PANEL);
        top = vf_max(top, code + VX_LANES > M ? thin_pad(s, code, M) : s);
    }
    return vf_maximum(top);
}

/* -- Backward: two vectors of codes meet a run of rows ------------------------------------------------------------------------- */

/* What a run of rows brings; see smooth_backward.c's worker for the meaning. */
typedef struct thin_run {
    const float *z, *dy;                    /* (rows, D) */
    const float *start, *mix_offset, *pi_factor, *pi_offset, *noisy; /* (rows) */
    const float *noise;                     /* (rows, 64) rates of the panel, where noisy */
    vf *dhat;                               /* (rows, D + 1) sum of x q^, and of x, lane by lane */
    int64_t rows;
} thin_run;

/* Codes v .. v + 2 vectors - 1 of a panel (hat, raw (D,64) and ppl (64) point there); their dhat and dmix (D,64) grow.
 * square: pi_factor is used. mix: dmix is wanted. filled: codes that exist, from v on, looked at where tail is 1. */
VX_INLINE void thin_backward(const int D, const int noisy, const int square, const int with_ppl, const int mix, const int tail,
                             const thin_run *run, int v, const float *hat, const float *raw, const float *ppl, float *dhat, float *dmix,
                             int64_t filled)
{
    vf q[THIN_MAX][PAIR], values[THIN_MAX][PAIR], dq[THIN_MAX][PAIR], dv[THIN_MAX][PAIR];
#pragma GCC unroll 8
    for (int d = 0; d < D; d++)
#pragma GCC unroll 2
        for (int j = 0; j < PAIR; j++) {
            q[d][j] = vf_load(hat + d * PANEL + j * VX_LANES);
            values[d][j] = vf_load(raw + d * PANEL + j * VX_LANES);
            dq[d][j] = vf_load(dhat + d * PANEL + j * VX_LANES);
            dv[d][j] = mix ? vf_load(dmix + d * PANEL + j * VX_LANES) : vf_zero();
        }
    for (int64_t i = 0; i < run->rows; i++) {
        const float *z = run->z + i * D, *dy = run->dy + i * D;
        vf *sum = run->dhat + i * (D + 1), x[PAIR];
#pragma GCC unroll 2
        for (int j = 0; j < PAIR; j++) {
            vf log_pi = vf_set1(run->start[i]), inner = vf_set1(noisy ? -run->mix_offset[i] : run->pi_offset[i] - run->mix_offset[i]);
#pragma GCC unroll 8
            for (int d = 0; d < D; d++) log_pi += q[d][j] * z[d];
            if (tail) log_pi = thin_pad(log_pi, j * VX_LANES, filled);
            vf pi = vf_exp2(log_pi), weight = pi;
#pragma GCC unroll 8
            for (int d = 0; d < D; d++) inner += values[d][j] * dy[d];
            if (noisy) {
                weight = pi * vf_load(run->noise + i * PANEL + v + j * VX_LANES) * run->noisy[i];
                vf regular = pi * run->pi_factor[i] + run->pi_offset[i];
                if (with_ppl) regular += vf_load(ppl + j * VX_LANES);
                x[j] = weight * inner + pi * regular;
            } else {
                if (square) inner += pi * run->pi_factor[i];
                if (with_ppl) inner += vf_load(ppl + j * VX_LANES);
                x[j] = pi * inner;
            }
#pragma GCC unroll 8
            for (int d = 0; d < D; d++) {
                dq[d][j] += x[j] * z[d];
                if (mix) dv[d][j] += weight * dy[d];
            }
        }
#pragma GCC unroll 8
        for (int d = 0; d < D; d++) sum[d] += x[0] * q[d][0] + x[1] * q[d][1];
        sum[D] += x[0] + x[1];
    }
#pragma GCC unroll 8
    for (int d = 0; d < D; d++)
#pragma GCC unroll 2
        for (int j = 0; j < PAIR; j++) {
            vf_store(dhat + d * PANEL + j * VX_LANES, dq[d][j]);
            if (mix) vf_store(dmix + d * PANEL + j * VX_LANES, dv[d][j]);
        }
}

#endif
