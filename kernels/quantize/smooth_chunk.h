/* smooth_chunk.h: a chunk of rows meets the codes in smooth_backward.c's pass: from the logits, made again, and dy come
 * the rows' gradient and what they add to the codes'. smooth_backward.c has the mathematics and the requirements.
 */
#ifndef VX_SMOOTH_CHUNK_H
#define VX_SMOOTH_CHUNK_H

#include <stdatomic.h>

#include "smooth_cells.h"

/* Strips that a chunk has left; alone in its cache line. */
typedef struct turn {
    _Alignas(64) atomic_int strips;
} turn;

/* The (vertex, row) pairs of a KNN regularizer, sorted by row: row i has order[start[i]] .. order[start[i+1] - 1]. */
typedef struct pairs {
    const int32_t *near; /* (S,K) row of each pair */
    float *weight;       /* (S,K) coefficient of the pair's term in x */
    int32_t *order, *start;
    float *probability; /* (N) P_i */
} pairs;

typedef void narrow_function(const narrow_run *run, const narrow_codes *codes);

/* A backward pass: what its threads share. */
typedef struct backward {
    smooth_call c;
    smooth_cpu cpu;
    smooth_codebook codebook;
    /* The call's copies of narrow_backward(): for vectors of codes that all exist, and for others. */
    narrow_function *whole, *tail;
    int64_t g;
    int block;                    /* rows of a tile */
    int64_t chunk, chunks, strip; /* rows of a chunk, their number, panels of a strip */
    turn *turns;
    double *dlog_tau; /* (chunks) */
    pairs pair;
    float knn;  /* c of the banner */
    float *ppl; /* (Mp) b of the banner, or NULL */
    /* (Mp, Dp), narrow (panels, narrow, 64): the sum over rows i of x_im times scaled row i, which is the dense part of
     * log2(e) dL/dq^; and laid out likewise the sum of p_im dy_i, NULL under hard Gumbel. */
    float *dhat, *dmix;                    /* likewise (panels, Dp, 64) where by_panels */
    int by_panels;                         /* the sums over rows are made in AMX tiles */
    int32_t *code_order, *code_start;      /* hard Gumbel: rows sorted by code */
    const float *norms;                    /* (N,G) |z| */
    const float *dy, *mixed, *lse, *sumsq; /* mixed = sum_m p_im q_m: y or soft */
    const int32_t *codes;
    float *dz, *dcodebook;
    int near; /* this group's rows meet near cells only (smooth_near_backward.h); then: */
    near_codes cells;
    float *points;  /* (M, narrow) codes on the sphere, one after the other */
    int32_t *place; /* (M) where a code is in hat, raw, dhat and dmix */
} backward;

/* A thread's working memory, for one chunk at a time. Rows are filled up with zeros to Dp, chunks to whole
 * tiles. */
typedef struct worker {
    float *z, *dy, *dhat;         /* (chunk, Dp): scaled row, dy, sum over m of x_im q^_m */
    uint32_t *z_terms, *dy_terms; /* (chunk) rows of z and dy for AMX tiles; where amx_steps */
    /* For each tile of rows, over which its sum runs, (Dp) rows of z' and dy' for AMX tiles; where by_panels */
    uint32_t *z_across, *dy_across;
    float *start;                 /* (chunk) -log2 sum 2^l, so that a tile's logits start as log2 pi */
    float *mix_offset;            /* (chunk) what is added to <dy, q_m> */
    float *pi_factor, *pi_offset; /* (chunk) x += pi (pi_factor pi + pi_offset) */
    vf *x_sum;                    /* (chunk) sum over m of x_im, lane by lane */
    float *noisy;                 /* (chunk) turns pi / E, or (log2 pi + g)/t, into p */
    float *p, *x, *noise;         /* (block,64); noise narrow (RUN,64) */
    uint32_t *z_bf16, *dy_bf16;   /* (chunk/2, Dp) bf16x2 of rows 2i and 2i + 1; bf16 only, as the next two */
    uint32_t *dy_bf16_along;      /* (chunk, ceil(D / 2)) bf16x2 of elements 2d and 2d + 1 */
    uint32_t *tile_bf16;          /* (block,32) a tile's p or x as bf16x2, along the codes or the rows */
    vf *narrow_dhat;              /* narrow (chunk, narrow + 1): dhat and x_sum, lane by lane */
} worker;

/* -- Rows of any width --------------------------------------------------------------------------------------------- */

/* Splits x (32, Dp) into `out` as an operand's rows: x', whose product is a sum over x's rows. */
static void split_across(uint32_t *out, const float *x, int64_t Dp)
{
    float across[AMX_SIDE * AMX_DEPTH];
    for (int64_t d = 0; d < Dp; d += AMX_SIDE) {
        for (int64_t i = 0; i < AMX_DEPTH; i++)
            for (int64_t j = 0; j < AMX_SIDE; j++) across[j * AMX_DEPTH + i] = x[i * Dp + d + j];
        amx_split_rows(out + amx_words(d, 1), across, AMX_DEPTH, AMX_SIDE, AMX_DEPTH);
    }
}

/* Loads rows first .. first + rows - 1, and begins their dz^ with its sparse terms. */
static void load_chunk(const backward *b, worker *t, int64_t first, int64_t rows)
{
    const smooth_call *c = &b->c;
    const int64_t D = c->D, Dp = b->cpu.Dp, filled = vx_ceil_div(rows, b->block) * b->block;
    memset(t->z, 0, sizeof(float) * (size_t)(filled * Dp));
    memset(t->dy, 0, sizeof(float) * (size_t)(filled * Dp));
    memset(t->dhat, 0, sizeof(float) * (size_t)(filled * Dp));
    for (int64_t i = 0; i < rows; i++) {
        int64_t row = (first + i) * c->G + b->g;
        for (int64_t d = 0; d < D; d++) t->z[i * Dp + d] = c->z[row * D + d] / b->norms[row] * b->cpu.scale;
        memcpy(t->dy + i * Dp, b->dy + row * D, sizeof(float) * (size_t)D);
        for (int32_t j = c->K ? b->pair.start[first + i] : 0, end = c->K ? b->pair.start[first + i + 1] : 0; j < end;
             j++) {
            int32_t pair = b->pair.order[j];
            const float *hat = b->codebook.rows + vertex_code(c, b->g, pair / c->K) * Dp;
            for (int64_t d = 0; d < D; d++) t->dhat[i * Dp + d] += b->pair.weight[pair] * hat[d];
        }
    }
    for (int64_t i = 0; b->by_panels && i < filled; i += AMX_DEPTH) {
        split_across(t->z_across + i / AMX_DEPTH * amx_words(Dp, 1), t->z + i * Dp, Dp);
        split_across(t->dy_across + i / AMX_DEPTH * amx_words(Dp, 1), t->dy + i * Dp, Dp);
    }
    if (!b->cpu.amx_steps) return;
    amx_split_rows(t->z_terms, t->z, Dp, filled, D);
    amx_split_rows(t->dy_terms, t->dy, Dp, filled, D);
}

/* Rounds the chunk's factors to bfloat16. */
static void round_chunk(const backward *b, worker *t, int64_t rows)
{
    const int64_t D = b->c.D, Dp = b->cpu.Dp, half = vx_ceil_div(D, 2), filled = vx_ceil_div(rows, b->block) * b->block;
    bf16x2_rows(t->z_bf16, t->z, filled, Dp);
    bf16x2_rows(t->dy_bf16, t->dy, filled, Dp);
    for (int64_t i = 0; i < filled; i++)
        for (int64_t d = 0; d < half; d++) {
            const float *dy = t->dy + i * Dp + 2 * d; /* a last, odd element is followed by padding */
            t->dy_bf16_along[i * half + d] = vu_bf16x2(vf_set1(dy[0]), vf_set1(dy[1]))[0];
        }
}

/* Fills in the numbers that each row contributes to x. */
static void load_row_numbers(const backward *b, worker *t, int64_t first, int64_t rows)
{
    const smooth_call *c = &b->c;
    const int64_t filled = vx_ceil_div(rows, b->block) * b->block;
    for (int64_t i = 0; i < filled; i++) {
        t->mix_offset[i] = t->pi_factor[i] = t->pi_offset[i] = t->noisy[i] = 0;
        t->start[i] = PADDING;
        t->x_sum[i] = vf_zero();
        if (i >= rows) continue;
        int64_t row = (first + i) * c->G + b->g;
        double lse = b->lse[row * 2] * LOG2E, noisy = b->lse[row * 2 + 1] * LOG2E;
        t->start[i] = (float)-lse;
        t->mix_offset[i] = -dot(b->dy + row * c->D, b->mixed + row * c->D, c->D);
        t->noisy[i] = (float)(c->noise_kind == NOISE_RATES ? exp2(lse - noisy) : lse / c->gumbel_tau - noisy);
        if (c->K) {
            float count = (float)(b->pair.start[first + i + 1] - b->pair.start[first + i]);
            for (int32_t j = b->pair.start[first + i]; j < b->pair.start[first + i + 1]; j++)
                t->x_sum[i][0] += b->pair.weight[b->pair.order[j]];
            if (c->regularizer == VX_REG_KNN_CE) t->pi_offset[i] = b->knn * count;
            else {
                t->pi_factor[i] = 2 * b->knn * count;
                t->pi_offset[i] = 2 * b->knn * (b->pair.probability[first + i] - count * b->sumsq[row]);
            }
        }
    }
}

/* Computes log2 pi of one tile into t->p: rows i and on of the chunk. */
static inline void log_pi_tile(const backward *b, worker *t, int64_t i, int64_t panel)
{
    const smooth_call *c = &b->c;
    panel_product(c, &b->cpu, &b->codebook, panel, t->p, PANEL, b->block, t->start + i, t->z + i * b->cpu.Dp, b->cpu.Dp,
                  t->z_terms + amx_words(i, b->cpu.amx_steps));
    if (c->M < (panel + 1) * PANEL) pad_tile(t->p, PANEL, b->block, c->M - panel * PANEL);
}

/* Takes ppl's row sums, sum_m b_m pi_im, off what pi is multiplied with. */
static void add_ppl_sums(const backward *b, worker *t, int64_t rows)
{
    for (int64_t i = 0; i < rows; i += b->block) {
        vf sum[PANEL_ROWS] = {{0}};
        for (int64_t panel = 0; panel < b->c.panels; panel++) {
            log_pi_tile(b, t, i, panel);
            for (int r = 0; r < b->block; r++)
                for (int v = 0; v < VECTORS; v++)
                    sum[r] += vf_exp2(vf_load(t->p + r * PANEL + v * VX_LANES)) *
                              vf_load(b->ppl + panel * PANEL + v * VX_LANES);
        }
        for (int r = 0; r < b->block; r++) t->pi_offset[i + r] -= vf_sum(sum[r]);
    }
}

/* Turns one row of a panel under softmax from log2 pi (in p) and <dy, q^> (in x) into p = pi and x. */
VX_INLINE void softmax_row(worker *t, int64_t i, float *p, float *x, const float *norm, const float *ppl)
{
    vf offset = vf_set1(t->pi_offset[i] + t->mix_offset[i]), factor = vf_set1(t->pi_factor[i]), sum = t->x_sum[i];
    for (int v = 0; v < PANEL; v += 4 * VX_LANES) {
        vf pi[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) pi[j] = vf_load(p + v + j * VX_LANES);
        vf_exp2_many(4, pi);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const int at = v + j * VX_LANES;
            vf inner = vf_load(x + at) * vf_load(norm + at) + offset;
            inner += factor * pi[j];
            if (ppl) inner += vf_load(ppl + at);
            inner *= pi[j];
            sum += inner;
            vf_store(p + at, pi[j]);
            vf_store(x + at, inner);
        }
    }
    t->x_sum[i] = sum;
}

/* Turns one row of a panel under a Gumbel sampler from log2 pi (in p) and <dy, q^> (in x) into p and x; noises (64): of
 * the row's panel. */
VX_INLINE void gumbel_row(const backward *b, worker *t, int64_t i, const float *noises, float *p, float *x,
                          const float *norm, const float *ppl)
{
    const float cooling = 1 / b->c.gumbel_tau;
    const int rates = b->c.noise_kind == NOISE_RATES;
    for (int v = 0; v < PANEL; v += VX_LANES) {
        vf log_pi = vf_load(p + v), noise = vf_load(noises + v), pi = vf_exp2(log_pi), w;
        if (rates) w = pi * noise * t->noisy[i];
        else w = vf_select(log_pi > PADDING / 2, vf_exp2((log_pi + noise) * cooling + t->noisy[i]), vf_zero());
        vf mix = (vf_load(x + v) * vf_load(norm + v) + t->mix_offset[i]) * cooling;
        vf inner = t->pi_factor[i] * pi + t->pi_offset[i];
        if (ppl) inner += vf_load(ppl + v);
        vf_store(p + v, w);
        inner = w * mix + pi * inner;
        t->x_sum[i] += inner;
        vf_store(x + v, inner);
    }
}

/* Computes <dy, q^> of one tile into t->x. */
static void inner_tile(const backward *b, worker *t, int64_t i, int64_t panel)
{
    const smooth_call *c = &b->c;
    const int64_t half = vx_ceil_div(c->D, 2);
    if (b->cpu.bf16) {
        memset(t->x, 0, sizeof(float) * (size_t)(b->block * PANEL));
        tile_product_bf16x2(t->x, PANEL, b->block, t->dy_bf16_along + i * half, half, 1,
                            b->codebook.hat_bf16 + panel * half * PANEL, PANEL, half);
    } else
        panel_product(c, &b->cpu, &b->codebook, panel, t->x, PANEL, b->block, 0, t->dy + i * b->cpu.Dp, b->cpu.Dp,
                      t->dy_terms + amx_words(i, b->cpu.amx_steps));
}

/* Adds what the tile's p and x bring to the gradients. */
static void add_tile(const backward *b, worker *t, int64_t i, int64_t panel)
{
    float *dhat = b->dhat + panel * PANEL * b->cpu.Dp, *dmix = b->dmix ? b->dmix + panel * PANEL * b->cpu.Dp : 0;
    if (!b->cpu.bf16) {
        panel_mix(&b->cpu, &b->codebook, panel, t->dhat + i * b->cpu.Dp, t->x);
        if (VX_AMX && b->by_panels) {
            uint32_t terms[AMX_TERMS * PANEL_ROWS * PANEL / 2] __attribute__((aligned(64)));
            amx_split_columns(terms, t->x, PANEL, PANEL, PANEL_ROWS);
            amx_product(1, dhat, PANEL, b->cpu.Dp, PANEL, t->z_across + i / AMX_DEPTH * amx_words(b->cpu.Dp, 1), terms,
                        1);
            if (!dmix) return;
            amx_split_columns(terms, t->p, PANEL, PANEL, PANEL_ROWS);
            amx_product(1, dmix, PANEL, b->cpu.Dp, PANEL, t->dy_across + i / AMX_DEPTH * amx_words(b->cpu.Dp, 1), terms,
                        1);
            return;
        }
        tile_collect(dhat, t->x, b->block, t->z + i * b->cpu.Dp, b->cpu.Dp);
        if (dmix) tile_collect(dmix, t->p, b->block, t->dy + i * b->cpu.Dp, b->cpu.Dp);
        return;
    }
    const int64_t steps = b->block / 2;
    bf16x2_codes(t->tile_bf16, t->x, b->block);
    tile_product_bf16x2(t->dhat + i * b->cpu.Dp, b->cpu.Dp, b->block, t->tile_bf16, PANEL / 2, 1,
                        b->codebook.rows_bf16 + panel * PANEL / 2 * b->cpu.Dp, b->cpu.Dp, PANEL / 2);
    bf16x2_rows(t->tile_bf16, t->x, b->block, PANEL);
    tile_product_bf16x2(dhat, b->cpu.Dp, PANEL, t->tile_bf16, 1, PANEL, t->z_bf16 + i / 2 * b->cpu.Dp, b->cpu.Dp,
                        steps);
    if (!dmix) return;
    bf16x2_rows(t->tile_bf16, t->p, b->block, PANEL);
    tile_product_bf16x2(dmix, b->cpu.Dp, PANEL, t->tile_bf16, 1, PANEL, t->dy_bf16 + i / 2 * b->cpu.Dp, b->cpu.Dp,
                        steps);
}

/* Lets a chunk of rows meet a panel of codes: each gets its part of the other's gradient. */
static void chunk_panel(const backward *b, worker *t, int64_t first, int64_t rows, int64_t panel)
{
    const smooth_call *c = &b->c;
    const float *norm = b->codebook.norm + panel * PANEL, *ppl = b->ppl ? b->ppl + panel * PANEL : 0;
    for (int64_t i = 0; i < rows; i += b->block) {
        log_pi_tile(b, t, i, panel);
        inner_tile(b, t, i, panel);
        if (c->noise_kind != NOISE_NONE) noise_rows(c, first + i, b->block, b->g, panel, t->noise);
        for (int r = 0; r < b->block; r++)
            if (c->noise_kind == NOISE_NONE) softmax_row(t, i + r, t->p + r * PANEL, t->x + r * PANEL, norm, ppl);
            else gumbel_row(b, t, i + r, t->noise + r * PANEL, t->p + r * PANEL, t->x + r * PANEL, norm, ppl);
        add_tile(b, t, i, panel);
    }
}

/* Computes dz of the chunk's rows from their dz^. Returns their part of dlog_tau. */
static double finish_chunk(const backward *b, const worker *t, int64_t first, int64_t rows)
{
    const smooth_call *c = &b->c;
    double dlog_tau = 0;
    for (int64_t i = 0; i < rows; i++) {
        int64_t row = (first + i) * c->G + b->g;
        const float *z = t->z + i * b->cpu.Dp, *dhat = t->dhat + i * b->cpu.Dp;
        float along = dot(dhat, z, c->D) / b->cpu.scale; /* <sum_m x_im q^_m, z^> */
        float projection =
            b->norms[row] > (float)GUARD ? along / b->cpu.scale : 0; /* under the guard, |z| is a constant */
        float factor = 1 / (b->norms[row] * b->cpu.tau);
        for (int64_t d = 0; d < c->D; d++) b->dz[row * c->D + d] = (dhat[d] - projection * z[d]) * factor;
        dlog_tau -= (double)along / b->cpu.tau - (double)b->lse[row * 2] * vf_sum(t->x_sum[i]);
    }
    return dlog_tau;
}

/* -- Narrow rows --------------------------------------------------------------------------------------------------- */

/* narrow_backward() for every combination of its constants, each a function of its own (smooth_sweep.h says why). */
enum {
    MIX_SQUARE = MIX + SQUARE,
    MIX_PPL = MIX + WITH_PPL,
    NOISY_SQUARE = NOISY + SQUARE,
    NOISY_PPL = NOISY + WITH_PPL,
    NOISY_MIX_SQUARE = NOISY + MIX_SQUARE,
    NOISY_MIX_PPL = NOISY + MIX_PPL,
};
#define FOR_KINDS(f, D)                                                                                                \
    f(D, MIX) f(D, MIX_SQUARE) f(D, MIX_PPL) f(D, NOISY_SQUARE) f(D, NOISY_PPL) f(D, NOISY_MIX_SQUARE)                 \
        f(D, NOISY_MIX_PPL)
#define FOR_ALL(f) FOR_KINDS(f, 3) FOR_KINDS(f, 4) FOR_KINDS(f, 8)
#define DEFINE(D, kind)                                                                                                \
    static void narrow_##D##kind(const narrow_run *run, const narrow_codes *codes)                                     \
    {                                                                                                                  \
        narrow_backward(D, kind, 0, run, codes);                                                                       \
    }                                                                                                                  \
    static void tail_##D##kind(const narrow_run *run, const narrow_codes *codes)                                       \
    {                                                                                                                  \
        narrow_backward(D, kind, 1, run, codes);                                                                       \
    }
FOR_ALL(DEFINE)

/* Returns the copy for these constants; tail: the one for vectors with codes that are not there. */
static narrow_function *narrow_copy(int D, int kind, int tail)
{
#define CHOOSE(D_, kind_)                                                                                              \
    if (D == D_ && kind == kind_) return tail ? tail_##D_##kind_ : narrow_##D_##kind_;
    FOR_ALL(CHOOSE)
    return 0;
}

/* Chooses the call's copies of narrow_backward(); NULL where D is too large for them. */
static void choose_copies(backward *b)
{
    const smooth_call *c = &b->c;
    const int noisy = c->noise_kind != NOISE_NONE, square = c->regularizer == VX_REG_KNN_L2 || (noisy && !b->ppl);
    const int kind = noisy * NOISY + square * SQUARE + (b->ppl != 0) * WITH_PPL + (b->dmix != 0) * MIX;
    b->whole = narrow_copy(b->cpu.narrow, kind, 0);
    b->tail = narrow_copy(b->cpu.narrow, kind, 1);
}

/* Lets a run of rows meet a panel. */
static inline void meet_run(const backward *b, const narrow_run *run, int64_t panel)
{
    const smooth_call *c = &b->c;
    const int D = b->cpu.narrow, step = narrow_side(D) * VX_LANES;
    for (int v = 0; v < PANEL && panel * PANEL + v < c->M; v += step) {
        const int64_t at = panel * PANEL * D + v, filled = c->M - panel * PANEL - v;
        const narrow_codes codes = {
            .v = v,
            .hat = b->codebook.hat + at,
            .raw = b->codebook.raw + at,
            .ppl = b->ppl ? b->ppl + panel * PANEL + v : 0,
            .dhat = b->dhat + at,
            .dmix = b->dmix ? b->dmix + at : 0,
            .filled = filled,
        };
        (filled < step ? b->tail : b->whole)(run, &codes);
    }
}

/* Does for narrow rows what chunk_panel() does: runs of RUN rows meet one or two vectors of codes at a time. */
static void narrow_panel(const backward *b, worker *t, int64_t first, int64_t rows, int64_t panel)
{
    const smooth_call *c = &b->c;
    const int D = b->cpu.narrow, noisy = c->noise_kind != NOISE_NONE;
    for (int64_t i = 0; i < rows; i += RUN) {
        const narrow_run run = {
            .z = t->z + i * D,
            .dy = t->dy + i * D,
            .start = t->start + i,
            .mix_offset = t->mix_offset + i,
            .pi_factor = t->pi_factor + i,
            .pi_offset = t->pi_offset + i,
            .noisy = t->noisy + i,
            .noise = t->noise,
            .dhat = t->narrow_dhat + i * (D + 1),
            .rows = vx_min64(RUN, vx_ceil_div(rows - i, NARROW_ROWS) * NARROW_ROWS),
        };
        if (noisy) noise_rows(c, first + i, run.rows, b->g, panel, t->noise);
        meet_run(b, &run, panel);
    }
}

/* Lets a chunk of rows of any width meet a panel. */
static void meet_panel(const backward *b, worker *t, int64_t first, int64_t rows, int64_t panel)
{
    if (b->cpu.narrow) narrow_panel(b, t, first, rows, panel);
    else chunk_panel(b, t, first, rows, panel);
}

/* Adds up what narrow_panel() left lane by lane. */
static void gather_narrow(const backward *b, worker *t, int64_t rows)
{
    for (int64_t i = 0; b->cpu.narrow && i < rows; i++) {
        for (int d = 0; d < b->cpu.narrow; d++)
            t->dhat[i * b->cpu.Dp + d] += vf_sum(t->narrow_dhat[i * (b->cpu.narrow + 1) + d]);
        t->x_sum[i] += t->narrow_dhat[i * (b->cpu.narrow + 1) + b->cpu.narrow];
    }
}

#endif
