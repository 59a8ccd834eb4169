/* smooth_narrow.h: the smoothed quantizer's inner loops for narrow rows (D <= 8), where a product of tiles would waste
 * most of a vector.
 *
 * Here vectors run over codes everywhere and a row's D numbers are broadcast. D is a constant of each copy (3, 4 or 8;
 * narrower rows are filled up with zeros), so that what belongs to a row (forward) or to a vector of codes (backward)
 * stays in registers. At D = 3 a logit costs 3 multiply-adds, a power 9 operations, its use 5 (forward) or 11
 * (backward): bound by the two vector units, not by memory.
 */
#ifndef VX_SMOOTH_NARROW_H
#define VX_SMOOTH_NARROW_H

#include "smooth.h"

enum {
    NARROW_MAX = 8,   /* largest D */
    NARROW_ROWS = 2,  /* rows side by side in the forward pass */
    NARROW_BLOCK = 8, /* rows of a block there */
};

/* -- Forward: two rows meet a strip of panels ---------------------------------------------------------------------- */

/* What one row accumulates, lane by lane. */
typedef struct narrow_row {
    vf sum, squares, noisy_sum; /* of powers, their squares, the noisy weights */
    vf best;                    /* largest logit (noisy: weight) */
    vi best_panel;              /* and the first panel that has it */
    vf o[NARROW_MAX];           /* weight times code */
} narrow_row;

/* Returns logits of one vector of codes: start + sum over d of a[d] q[d]. */
VX_INLINE vf narrow_logits(const int D, float start, const float *a, const float *q)
{
    vf s = vf_set1(start);
#pragma GCC unroll 8
    for (int d = 0; d < D; d++) s += vf_load(q + d * PANEL) * a[d];
    return s;
}

/* Replaces the logits of lanes whose code is not below M by PADDING. */
VX_INLINE vf narrow_pad(vf s, int64_t first_code, int64_t M)
{
    vi lane;
    for (int l = 0; l < VX_LANES; l++) lane[l] = l;
    return vf_select(lane + (int32_t)first_code < (vi){0} + (int32_t)M, s, vf_set1(PADDING));
}

/* Computes to (64) = 2^from. */
VX_INLINE void narrow_powers(float *to, const float *from)
{
    for (int v = 0; v < PANEL; v += 4 * VX_LANES) {
        vf x[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) x[j] = vf_load(from + v + j * VX_LANES);
        vf_exp2_many(4, x);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) vf_store(to + v + j * VX_LANES, x[j]);
    }
}

/* What two rows a (2,D) meet: panels first .. end - 1 of a codebook. */
typedef struct narrow_strip {
    const float *a, *start, *hat, *raw;
    int64_t first, end, M;
    float *s, *e; /* logits and powers of the rows, `ld` apart, where they are kept */
    int64_t ld;
    const float *noise; /* (end - first, 2, 64) rates, where noisy */
} narrow_strip;

enum { KEEP_S = 1, KEEP_E = 2, ADD_SQUARES = 4 }; /* what the second sweep needs */

/* Lets two rows meet a strip of panels, and adds up what row[0] and row[1] accumulate. keep: of KEEP_S, KEEP_E,
 * ADD_SQUARES. tail: codes from M on do not count.
 *
 * A panel passes through three short loops (logits, powers, use) with a buffer in between, since one long loop would
 * hold more than a processor's scheduler sees, and its chains of dependent operations would stand still. */
VX_INLINE void narrow_forward(const int D, const int noisy, const int keep, const int tail, narrow_row *row,
                              const narrow_strip *strip)
{
    const float *a = strip->a, *start = strip->start, *noise = strip->noise;
    const int64_t first = strip->first, ld = strip->ld;
    float *s = strip->s, *e = strip->e;
    _Alignas(64) float power[NARROW_ROWS * PANEL];
    vf sum[NARROW_ROWS], squares[NARROW_ROWS], noisy_sum[NARROW_ROWS], o[NARROW_ROWS][NARROW_MAX];
#pragma GCC unroll 2
    for (int r = 0; r < NARROW_ROWS; r++) {
        sum[r] = row[r].sum, squares[r] = row[r].squares, noisy_sum[r] = row[r].noisy_sum;
#pragma GCC unroll 8
        for (int d = 0; d < D; d++) o[r][d] = row[r].o[d];
    }
    for (int64_t panel = first; panel < strip->end; panel++) {
        const float *q = strip->hat + panel * PANEL * D, *values = strip->raw + panel * PANEL * D;
        vf top[NARROW_ROWS] = {vf_set1(-INFINITY), vf_set1(-INFINITY)};
#pragma GCC unroll 4
        for (int v = 0; v < PANEL; v += VX_LANES) {
            vf x[NARROW_ROWS] = {vf_set1(start[0]), vf_set1(start[1])};
#pragma GCC unroll 8
            for (int d = 0; d < D; d++)
#pragma GCC unroll 2
                for (int r = 0; r < NARROW_ROWS; r++) x[r] += vf_load(q + d * PANEL + v) * a[r * D + d];
#pragma GCC unroll 2
            for (int r = 0; r < NARROW_ROWS; r++) {
                if (tail) x[r] = narrow_pad(x[r], panel * PANEL + v, strip->M);
                if (!noisy) top[r] = vf_max(top[r], x[r]);
                vf_store(keep & KEEP_S ? s + r * ld + panel * PANEL + v : power + r * PANEL + v, x[r]);
            }
        }
#pragma GCC unroll 2
        for (int r = 0; r < NARROW_ROWS; r++)
            narrow_powers(power + r * PANEL, keep & KEEP_S ? s + r * ld + panel * PANEL : power + r * PANEL);
#pragma GCC unroll 4
        for (int v = 0; v < PANEL; v += VX_LANES)
#pragma GCC unroll 2
            for (int r = 0; r < NARROW_ROWS; r++) {
                vf x = vf_load(power + r * PANEL + v);
                if (keep & KEEP_E) vf_store(e + r * ld + panel * PANEL + v, x);
                sum[r] += x;
                if (keep & ADD_SQUARES) squares[r] += x * x;
                if (noisy) {
                    x *= vf_load(noise + ((panel - first) * NARROW_ROWS + r) * PANEL + v);
                    noisy_sum[r] += x;
                    top[r] = vf_max(top[r], x);
                }
#pragma GCC unroll 8
                for (int d = 0; d < D; d++) o[r][d] += x * vf_load(values + d * PANEL + v);
            }
#pragma GCC unroll 2
        for (int r = 0; r < NARROW_ROWS; r++) {
            row[r].best_panel = vi_where_greater(top[r], row[r].best, (vi){0} + (int32_t)panel, row[r].best_panel);
            row[r].best = vf_max(top[r], row[r].best);
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < NARROW_ROWS; r++) {
        row[r].sum = sum[r], row[r].squares = squares[r], row[r].noisy_sum = noisy_sum[r];
#pragma GCC unroll 8
        for (int d = 0; d < D; d++) row[r].o[d] = o[r][d];
    }
}

/* Finds the largest logit of each of the rows a (NARROW_BLOCK,D). */
VX_INLINE void narrow_maxima(const int D, const float *a, const float *hat, int64_t M, float *largest)
{
    vf top[NARROW_BLOCK];
#pragma GCC unroll 8
    for (int i = 0; i < NARROW_BLOCK; i++) top[i] = vf_set1(-INFINITY);
    for (int64_t code = 0; code < M; code += VX_LANES) {
        const float *q = hat + code / PANEL * PANEL * D + code % PANEL;
        vf s[NARROW_BLOCK] = {{0}};
#pragma GCC unroll 8
        for (int d = 0; d < D; d++)
#pragma GCC unroll 8
            for (int i = 0; i < NARROW_BLOCK; i++) s[i] += vf_load(q + d * PANEL) * a[i * D + d];
#pragma GCC unroll 8
        for (int i = 0; i < NARROW_BLOCK; i++)
            top[i] = vf_max(top[i], code + VX_LANES > M ? narrow_pad(s[i], code, M) : s[i]);
    }
    for (int i = 0; i < NARROW_BLOCK; i++) largest[i] = vf_maximum(top[i]);
}

/* -- Backward: two vectors of codes meet a run of rows ------------------------------------------------------------- */

enum { RUN = 48 }; /* most rows of a run */

/* Returns how many vectors of codes go side by side, so that a row's numbers are broadcast once for all: as many as the
 * registers hold. */
VX_INLINE int narrow_side(const int D) { return D <= 4 ? 2 : 1; }

/* What a run of rows brings; the worker in smooth_chunk.h says what the numbers mean. */
typedef struct narrow_run {
    const float *z, *dy;                                             /* (rows, D) */
    const float *start, *mix_offset, *pi_factor, *pi_offset, *noisy; /* (rows) */
    const float *noise;                                              /* (rows, 64) rates of the panel, where noisy */
    vf *dhat;     /* (rows, D + 1) sum of x q^, and of x, lane by lane */
    int64_t rows; /* even, at most RUN */
} narrow_run;

/* The codes from number v of a panel on; the pointers point to it. */
typedef struct narrow_codes {
    int v;
    const float *hat, *raw, *ppl; /* (D,64), (D,64), (64) */
    float *dhat, *dmix;           /* (D,64) */
    int64_t filled;               /* codes that exist */
} narrow_codes;

enum { NOISY = 1, SQUARE = 2, WITH_PPL = 4, MIX = 8 };

/* Lets a run of rows meet narrow_side(D) vectors of codes, and adds to dhat and dmix of both. kind: of NOISY, SQUARE
 * (pi_factor is used), WITH_PPL, MIX (dmix is wanted). tail: codes from `filled` on do not count.
 *
 * As in the forward pass short loops with buffers in between: powers, then x, then what becomes of x, then of the
 * powers. In one long loop neither the registers nor the two loads a cycle would suffice. */
VX_INLINE void narrow_backward(const int D, const int kind, const int tail, const narrow_run *run,
                               const narrow_codes *codes)
{
    const int side = narrow_side(D), mix = (kind & MIX) != 0;
    const float *noise = run->noise + codes->v;
    vf q[2][NARROW_MAX], values[2][NARROW_MAX], dq[2][NARROW_MAX], dv[2][NARROW_MAX], weight[RUN][2], product[RUN][2];
#pragma GCC unroll 2
    for (int j = 0; j < side; j++)
#pragma GCC unroll 8
        for (int d = 0; d < D; d++) {
            const int at = d * PANEL + j * VX_LANES;
            q[j][d] = vf_load(codes->hat + at);
            values[j][d] = vf_load(codes->raw + at);
            dq[j][d] = vf_load(codes->dhat + at);
            dv[j][d] = mix ? vf_load(codes->dmix + at) : vf_zero();
        }
    for (int64_t i = 0; i < run->rows; i += NARROW_ROWS) {
        vf pi[2 * NARROW_ROWS];
#pragma GCC unroll 4
        for (int n = 0; n < NARROW_ROWS * side; n++) pi[n] = vf_set1(run->start[i + n / side]);
#pragma GCC unroll 8
        for (int d = 0; d < D; d++)
#pragma GCC unroll 4
            for (int n = 0; n < NARROW_ROWS * side; n++) pi[n] += q[n % side][d] * run->z[(i + n / side) * D + d];
#pragma GCC unroll 4
        for (int n = 0; n < NARROW_ROWS * side; n++)
            if (tail) pi[n] = narrow_pad(pi[n], n % side * VX_LANES, codes->filled);
        vf_exp2_many(NARROW_ROWS * side, pi);
#pragma GCC unroll 4
        for (int n = 0; n < NARROW_ROWS * side; n++) weight[i + n / side][n % side] = pi[n];
    }
    for (int64_t i = 0; i < run->rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < side; j++) {
            vf pi = weight[i][j], x = vf_set1(run->mix_offset[i]);
#pragma GCC unroll 8
            for (int d = 0; d < D; d++) x += values[j][d] * run->dy[i * D + d];
            if (kind & NOISY) {
                vf regular = vf_set1(run->pi_offset[i]);
                if (kind & SQUARE) regular += pi * run->pi_factor[i];
                if (kind & WITH_PPL) regular += vf_load(codes->ppl + j * VX_LANES);
                weight[i][j] = pi * vf_load(noise + i * PANEL + j * VX_LANES) * run->noisy[i];
                product[i][j] = weight[i][j] * x + pi * regular;
            } else {
                if (kind & SQUARE) x += pi * run->pi_factor[i];
                if (kind & WITH_PPL) x += vf_load(codes->ppl + j * VX_LANES);
                product[i][j] = x * pi;
            }
        }
    for (int64_t i = 0; i < run->rows; i++) {
        vf *sum = run->dhat + i * (D + 1), total = sum[D];
#pragma GCC unroll 8
        for (int d = 0; d < D; d++) {
            vf z = vf_set1(run->z[i * D + d]), along = sum[d];
#pragma GCC unroll 2
            for (int j = 0; j < side; j++) dq[j][d] += product[i][j] * z, along += product[i][j] * q[j][d];
            sum[d] = along;
        }
#pragma GCC unroll 2
        for (int j = 0; j < side; j++) total += product[i][j];
        sum[D] = total;
    }
    for (int64_t i = 0; mix && i < run->rows; i++)
#pragma GCC unroll 8
        for (int d = 0; d < D; d++)
#pragma GCC unroll 2
            for (int j = 0; j < side; j++) dv[j][d] += weight[i][j] * run->dy[i * D + d];
#pragma GCC unroll 2
    for (int j = 0; j < side; j++)
#pragma GCC unroll 8
        for (int d = 0; d < D; d++) {
            const int at = d * PANEL + j * VX_LANES;
            vf_store(codes->dhat + at, dq[j][d]);
            if (mix) vf_store(codes->dmix + at, dv[j][d]);
        }
}

#endif
