/* smooth.h: what both directions of the smoothed quantizer share on the CPU: the checks of numbers, the codebook laid
 * out in panels, the products of small tiles, the Gumbel noise. The mathematics is in smooth.c and smooth_backward.c.
 *
 * Layout. A panel holds 64 codes (smooth_call.h), the last one filled up with zero codes: 4, 8 or 16 vectors. Rows meet
 * a panel as a tile of PANEL_ROWS. Dp is D rounded up to whole vectors, or to the width of smooth_narrow.h.
 *
 * Logarithms are to base 2 inside: log2(e) / tau is folded into the rows of z, so that a power is one vf_exp2.
 */
#ifndef VX_SMOOTH_H
#define VX_SMOOTH_H

#include "smooth_call.h"
#include "gumbel.h"
#include "cpu/amx.h"
#include "cpu/row_norms.h"
#include "cpu/row_tile.h"
#include "cpu/scratch.h"

enum {
    PANEL_ROWS = VX_AMX ? 32 : 24, /* rows that meet a panel at once; a step of AMX tiles */
    VECTORS = PANEL / VX_LANES,    /* vectors of a panel */
    AMX_PANEL = PANEL / AMX_DEPTH, /* steps of a panel's codes */
};

/* What the CPU derives from a call. It knows tau before the work begins. */
typedef struct smooth_cpu {
    int64_t Dp;        /* D, filled up with zeros to whole vectors, or to `narrow` */
    int narrow;        /* D as smooth_narrow.h pads it (3, 4 or 8), where its loops are used; else 0 */
    int bf16;          /* the products that smooth.c names take factors in bfloat16 */
    int64_t amx_steps; /* of D, where products are made in AMX tiles (amx.h); else 0 */
    float tau;
    float scale; /* log2(e) / tau */
} smooth_cpu;

/* The codes of one group, laid out for the products that read them. */
typedef struct smooth_codebook {
    const int32_t *order; /* (Mp) the code at each place of a panel, where that is not its own number; else NULL */
    float *hat;           /* (panels, D or narrow, 64): normalized, a panel's codes side by side */
    float *raw;           /* (panels, narrow, 64): as stored; narrow only */
    float *rows;          /* (Mp, Dp): one code after the other; as stored (forward) or normalized (backward) */
    float *norm;          /* (Mp): max(|q|, GUARD) */
    uint32_t *rows_bf16;  /* (panels, 32, Dp) bf16x2: codes m and m + 32 of a panel's `rows`; bf16 only */
    uint32_t *hat_bf16;   /* (panels, ceil(D / 2), 64) bf16x2: elements 2d and 2d + 1 of `hat`; bf16 only, backward */
    /* Operands of AMX tiles, where amx_steps: (Mp) columns of `hat`, and for each panel, over whose codes its sum runs,
     * (Dp) columns of `rows`, the latter where not bf16. */
    uint32_t *hat_terms, *rows_terms;
} smooth_codebook;

/* -- Checks -------------------------------------------------------------------------------------------------------- */

/* Returns the code that is vertex s of group g. */
static inline int64_t vertex_code(const smooth_call *c, int64_t g, int64_t s)
{
    return c->vertices ? c->vertices[g * c->S + s] : s;
}

/* Checks that the vertices of each group are codes, each of them once. */
static inline int check_vertices(const smooth_call *c)
{
    uint8_t *seen = vx_scratch(c->op, (size_t)c->M);
    if (!seen) return VX_ENOMEM;
    int status = VX_OK;
    for (int64_t g = 0; g < c->G && !status; g++) {
        memset(seen, 0, (size_t)c->M);
        for (int64_t s = 0; s < c->S && !status; s++) {
            int64_t m = c->vertices[g * c->S + s];
            if (m < 0 || m >= c->M)
                status = vx_fail(VX_EINVAL, "%s: vertex %lld of group %lld is code %lld, of 0 .. %lld", c->op,
                                 (long long)s, (long long)g, (long long)m, (long long)c->M - 1);
            else if (seen[m]++)
                status = vx_fail(VX_EINVAL, "%s: code %lld is twice among the vertices of group %lld", c->op,
                                 (long long)m, (long long)g);
        }
    }
    vx_scratch_free(seen);
    return status;
}

/* Fills `cpu` for the checked call c. */
static inline int smooth_cpu_of(smooth_cpu *cpu, const smooth_call *c, const vx_tensor *log_tau, int precision)
{
    const double tau = exp((double)vx_f32(log_tau)[0]);
    cpu->tau = (float)tau;
    cpu->scale = (float)(LOG2E / tau);
    cpu->bf16 = precision == VX_BF16 && c->D > 8;
    cpu->narrow = c->D > 8 || c->noise_kind == NOISE_LOGS ? 0 : c->D <= 3 ? 3 : c->D <= 4 ? 4 : 8;
    cpu->amx_steps = amx_steps(c->D);
    const int64_t whole = cpu->amx_steps ? AMX_DEPTH : VX_LANES;
    cpu->Dp = cpu->narrow ? cpu->narrow : vx_ceil_div(c->D, whole) * whole;
    if (!smooth_tau_fits(tau))
        return vx_fail(VX_ENONFINITE, "%s: tau = exp(log_tau) is %g, of 1e-7 .. 1e7", c->op, tau);
    return VX_OK;
}

/* Checks what vertices, codebook, z and noise hold, and fills norms (N,G) with max(|z|, GUARD). */
static inline int check_numbers(const smooth_call *c, float *norms)
{
    const int status = c->vertices ? check_vertices(c) : VX_OK;
    if (status) return status;
    int64_t bad = first_nonfinite(c->codebook, c->G * c->M, c->D, 0);
    if (bad >= 0)
        return vx_fail(VX_ENONFINITE, "%s: code %lld of group %lld of the codebook holds a NaN or Inf", c->op,
                       (long long)(bad % c->M), (long long)(bad / c->M));
    bad = first_nonfinite(c->z, c->N * c->G, c->D, norms);
    if (bad >= 0)
        return vx_fail(VX_ENONFINITE, "%s: row %lld of z holds a NaN or Inf (group %lld)", c->op,
                       (long long)(bad / c->G), (long long)(bad % c->G));
    if (c->noise && (bad = first_nonfinite(c->noise, c->N * c->G, c->M, 0)) >= 0)
        return vx_fail(VX_ENONFINITE, "%s: row %lld of the noise holds a NaN or Inf (group %lld)", c->op,
                       (long long)(bad / c->G), (long long)(bad % c->G));
    return VX_OK;
}

/* -- The codebook in panels ---------------------------------------------------------------------------------------- */

/* Hands out a codebook's arrays. */
static inline void carve_codebook(scratch *a, const smooth_call *c, const smooth_cpu *cpu, smooth_codebook *b,
                                  int backward)
{
    b->hat = carve_f32(a, c->Mp * (cpu->narrow ? cpu->narrow : c->D));
    b->raw = carve_f32(a, c->Mp * cpu->narrow);
    b->rows = carve_f32(a, c->Mp * cpu->Dp);
    b->norm = carve_f32(a, c->Mp);
    b->rows_bf16 = cpu->bf16 ? carve_u32(a, c->Mp / 2 * cpu->Dp) : 0;
    b->hat_bf16 = cpu->bf16 && backward ? carve_u32(a, vx_ceil_div(c->D, 2) * c->Mp) : 0;
    b->hat_terms = cpu->amx_steps ? carve_u32(a, amx_words(c->Mp, cpu->amx_steps)) : 0;
    b->rows_terms = cpu->amx_steps && !cpu->bf16 ? carve_u32(a, c->panels * amx_words(cpu->Dp, AMX_PANEL)) : 0;
}

/* Rounds x (count, columns) to out (ceil(count / 2), columns) bf16x2: rows 2i and 2i + 1 in one; a last, odd row goes
 * with zeros. columns is a multiple of VX_LANES. */
static inline void bf16x2_rows(uint32_t *out, const float *x, int64_t count, int64_t columns)
{
    for (int64_t i = 0; i < count; i += 2)
        for (int64_t j = 0; j < columns; j += VX_LANES) {
            const float *row = x + i * columns + j;
            vu both = vu_bf16x2(vf_load(row), i + 1 < count ? vf_load(row + columns) : vf_zero());
            memcpy(out + i / 2 * columns + j, &both, sizeof both);
        }
}

/* Lays out group g's codes; `rows` are normalized in the backward pass. All threads of a parallel region call it
 * together. */
static inline void fill_codebook(const smooth_call *c, const smooth_cpu *cpu, const smooth_codebook *b, int64_t g,
                                 int backward)
{
    const int64_t D = c->D;
#pragma omp for schedule(static)
    for (int64_t place = 0; place < c->Mp; place++) {
        const int64_t m = b->order && place < c->M ? b->order[place] : place;
        const float *q = c->codebook + (g * c->M + m) * D;
        const int64_t depth = cpu->narrow ? cpu->narrow : D, at = place / PANEL * PANEL * depth + place % PANEL;
        float *row = b->rows + m * cpu->Dp;
        double norm = m < c->M ? fmax(row_norm(q, D), GUARD) : 1;
        b->norm[m] = (float)norm;
        for (int64_t d = 0; d < vx_max64(depth, cpu->Dp); d++) {
            float x = m < c->M && d < D ? q[d] : 0,
                  hat = (float)(x / norm); /* divided, so that q and 2q are equal on the sphere */
            if (d < depth) b->hat[at + d * PANEL] = hat;
            if (d < cpu->narrow) b->raw[at + d * PANEL] = x;
            if (d < cpu->Dp) row[d] = backward ? hat : x;
        }
    }
    if (cpu->amx_steps)
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < c->panels; panel++) {
            amx_split_columns(b->hat_terms + panel * amx_words(PANEL, cpu->amx_steps), b->hat + panel * PANEL * D,
                              PANEL, PANEL, D);
            if (b->rows_terms)
                amx_split_columns(b->rows_terms + panel * amx_words(cpu->Dp, AMX_PANEL),
                                  b->rows + panel * PANEL * cpu->Dp, cpu->Dp, cpu->Dp, PANEL);
        }
    if (!cpu->bf16) return;
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < c->panels; panel++) {
        bf16x2_rows(b->rows_bf16 + panel * PANEL / 2 * cpu->Dp, b->rows + panel * PANEL * cpu->Dp, 2,
                    PANEL / 2 * cpu->Dp);
        if (backward)
            bf16x2_rows(b->hat_bf16 + panel * vx_ceil_div(D, 2) * PANEL, b->hat + panel * D * PANEL, D, PANEL);
    }
}

/* -- Products of small tiles --------------------------------------------------------------------------------------- */

#if VX_AMX
enum { LOGIT_ROWS = 4, LOGIT_VECTORS = PANEL / VX_LANES == 4 ? 4 : 2, MIX_ROWS = 4, COLLECT_ROWS = 4, BF16_ROWS = 4 };
#elif VX_LANES == 16
enum { LOGIT_ROWS = 6, LOGIT_VECTORS = 4, MIX_ROWS = 12, COLLECT_ROWS = 8, BF16_ROWS = 8 };
#else
enum { LOGIT_ROWS = 6, LOGIT_VECTORS = 2, MIX_ROWS = 6, COLLECT_ROWS = 4, BF16_ROWS = 4 };
#endif

enum { SLICE = 64 }; /* of D: 16 KB of a panel, in the L1 cache while a tile's rows pass */

/* Computes s (rows,64; ld) = start[row] + a (rows,D; lda) hat (D,64); rows a multiple of LOGIT_ROWS. */
static inline void tile_logits(float *s, int64_t ld, int rows, const float *start, const float *a, int64_t lda,
                               const float *hat, int64_t D)
{
    for (int64_t d = 0; d < D; d += SLICE)
        for (int v = 0; v < PANEL; v += LOGIT_VECTORS * VX_LANES)
            for (int i = 0; i < rows; i += LOGIT_ROWS)
                tile_multiply(LOGIT_ROWS, LOGIT_VECTORS, s + i * ld + v, ld, d ? 0 : start + i, a + i * lda + d, lda, 1,
                              hat + d * PANEL + v, PANEL, vx_min64(SLICE, D - d));
}

/* Computes s (rows,64; ld) = start[row] + a hat for a panel, from a (rows,D; lda), or from its terms where products are
 * made in AMX tiles: there `start` comes last, so that the sum's parts are rounded at their own size. start NULL: 0. */
static inline void panel_product(const smooth_call *c, const smooth_cpu *cpu, const smooth_codebook *b, int64_t panel,
                                 float *s, int64_t ld, int rows, const float *start, const float *a, int64_t lda,
                                 const uint32_t *a_terms)
{
    static const float zero[PANEL_ROWS];
    const int64_t depth = cpu->narrow ? cpu->narrow : c->D;
    if (!VX_AMX || !cpu->amx_steps) {
        tile_logits(s, ld, rows, start ? start : zero, a, lda, b->hat + panel * PANEL * depth, depth);
        return;
    }
    amx_product(0, s, ld, rows, PANEL, a_terms, b->hat_terms + panel * amx_words(PANEL, cpu->amx_steps),
                cpu->amx_steps);
    for (int i = 0; start && i < rows; i++)
        for (int v = 0; v < PANEL; v += VX_LANES) vf_store(s + i * ld + v, vf_load(s + i * ld + v) + start[i]);
}

/* Adds p (rows,64) q (64,Dp) to o (rows,Dp); rows a multiple of MIX_ROWS. */
static inline void tile_mix(float *o, int rows, const float *p, const float *q, int64_t Dp)
{
    int64_t d = 0;
    for (; d + 2 * VX_LANES <= Dp; d += 2 * VX_LANES)
        for (int i = 0; i < rows; i += MIX_ROWS)
            tile_multiply(MIX_ROWS, 2, o + i * Dp + d, Dp, 0, p + i * PANEL, PANEL, 1, q + d, Dp, PANEL);
    if (d < Dp)
        for (int i = 0; i < rows; i += MIX_ROWS)
            tile_multiply(MIX_ROWS, 1, o + i * Dp + d, Dp, 0, p + i * PANEL, PANEL, 1, q + d, Dp, PANEL);
}

/* Adds p (PANEL_ROWS,64) times a panel of `rows` to o (PANEL_ROWS,Dp). */
static inline void panel_mix(const smooth_cpu *cpu, const smooth_codebook *b, int64_t panel, float *o, const float *p)
{
    if (!VX_AMX || !cpu->amx_steps) {
        tile_mix(o, PANEL_ROWS, p, b->rows + panel * PANEL * cpu->Dp, cpu->Dp);
        return;
    }
    uint32_t terms[AMX_TERMS * PANEL_ROWS * PANEL / 2] __attribute__((aligned(64)));
    amx_split_rows(terms, p, PANEL, PANEL_ROWS, PANEL);
    amx_product(1, o, cpu->Dp, PANEL_ROWS, cpu->Dp, terms, b->rows_terms + panel * amx_words(cpu->Dp, AMX_PANEL),
                AMX_PANEL);
}

/* Adds x' a to w (64,Dp), from x (rows,64) and a (rows,Dp). */
static inline void tile_collect(float *w, const float *x, int rows, const float *a, int64_t Dp)
{
    int64_t d = 0;
    for (; d + 2 * VX_LANES <= Dp; d += 2 * VX_LANES)
        for (int m = 0; m < PANEL; m += COLLECT_ROWS)
            tile_multiply(COLLECT_ROWS, 2, w + m * Dp + d, Dp, 0, x + m, 1, PANEL, a + d, Dp, rows);
    if (d < Dp)
        for (int m = 0; m < PANEL; m += COLLECT_ROWS)
            tile_multiply(COLLECT_ROWS, 1, w + m * Dp + d, Dp, 0, x + m, 1, PANEL, a + d, Dp, rows);
}

/* Adds a b to c (rows,columns; ldc), where a[i ai + k ak] and b (count,columns) are bf16x2. rows: a multiple of
 * BF16_ROWS. */
static inline void tile_product_bf16x2(float *c, int64_t ldc, int rows, const uint32_t *a, int64_t ai, int64_t ak,
                                       const uint32_t *b, int64_t columns, int64_t count)
{
    for (int64_t k = 0; k < count; k += SLICE) {
        const int64_t steps = vx_min64(SLICE, count - k);
        int64_t d = 0;
        for (; d + 2 * VX_LANES <= columns; d += 2 * VX_LANES)
            for (int i = 0; i < rows; i += BF16_ROWS)
                tile_multiply_bf16x2(BF16_ROWS, 2, c + i * ldc + d, ldc, a + i * ai + k * ak, ai, ak,
                                     b + k * columns + d, columns, steps);
        if (d < columns)
            for (int i = 0; i < rows; i += BF16_ROWS)
                tile_multiply_bf16x2(BF16_ROWS, 1, c + i * ldc + d, ldc, a + i * ai + k * ak, ai, ak,
                                     b + k * columns + d, columns, steps);
    }
}

/* Rounds p (rows,64) to out (rows,32) bf16x2: elements m and m + 32 in one. */
static inline void bf16x2_codes(uint32_t *out, const float *p, int rows)
{
    for (int i = 0; i < rows; i++) bf16x2_rows(out + i * PANEL / 2, p + i * PANEL, 2, PANEL / 2);
}

/* Overwrites s (rows,64; ld) from column `filled` on, where the last panel has no codes. */
static inline void pad_tile(float *s, int64_t ld, int rows, int64_t filled)
{
    for (int i = 0; i < rows; i++)
        for (int64_t m = filled; m < PANEL; m++) s[i * ld + m] = PADDING;
}

/* -- Gumbel noise -------------------------------------------------------------------------------------------------- */

/* Draws, or copies, the noise of one panel for GUMBEL_ROWS rows into out (GUMBEL_ROWS,64), as noise_kind says. row: n G
 * + g; two may be the same. */
static inline void noise_panel(const smooth_call *c, const int64_t row[GUMBEL_ROWS], int64_t panel, float *out)
{
    if (c->noise) {
        int64_t filled = vx_min64(PANEL, c->M - panel * PANEL);
        for (int r = 0; r < GUMBEL_ROWS; r++)
            for (int64_t m = 0; m < PANEL; m++)
                out[r * PANEL + m] = m < filled ? c->noise[row[r] * c->M + panel * PANEL + m] * (float)LOG2E : 0;
        return;
    }
    uint64_t block[GUMBEL_ROWS];
    float *rates[GUMBEL_ROWS];
    for (int r = 0; r < GUMBEL_ROWS; r++) {
        block[r] = vx_gumbel_block((uint64_t)row[r], (uint64_t)panel * PANEL, (uint64_t)c->M);
        rates[r] = out + r * PANEL;
    }
    gumbel_rates(c->seed, c->stream, block, rates);
    for (int m = 0; c->noise_kind == NOISE_LOGS && m < GUMBEL_ROWS * PANEL; m += VX_LANES)
        vf_store(out + m, vf_log(vf_load(out + m)) * (float)LOG2E);
}

/* Draws the noise of one panel for rows first .. first + count - 1 of group g into out (count,64). count is even; rows
 * past the last are taken as the last. */
static inline void noise_rows(const smooth_call *c, int64_t first, int64_t count, int64_t g, int64_t panel, float *out)
{
    for (int64_t i = 0; i < count; i += GUMBEL_ROWS) {
        const int64_t row[GUMBEL_ROWS] = {vx_min64(first + i, c->N - 1) * c->G + g,
                                          vx_min64(first + i + 1, c->N - 1) * c->G + g};
        noise_panel(c, row, panel, out + i * PANEL);
    }
}

#endif
