/* smooth_sweep.h: the first sweep of smooth.c's forward pass. A block of rows meets all codes of its group: that gives
 * the rows' outputs and sums, and leaves the logits or powers that the second sweep looks at. smooth.c has the
 * mathematics and the requirements.
 */
#ifndef VX_SMOOTH_SWEEP_H
#define VX_SMOOTH_SWEEP_H

#include "smooth_cells.h"

enum {
    MOST_ROWS = 96,
    NARROW_STRIP = 16, /* panels that two rows meet before the next two do, from the L1 cache */
};

/* A range of rows whose sums are kept apart. */
typedef struct part {
    int64_t first, end, shard;
} part;

typedef void narrow_function(narrow_row *row, const narrow_strip *strip);

typedef struct forward forward;

typedef void near_function(const forward *f, float start, const float *a, const int32_t *list, int64_t count, float *e,
                           vf *top, narrow_row *row);

/* A forward pass: what its threads share. */
struct forward {
    smooth_call c;
    smooth_cpu cpu;
    smooth_codebook codebook;
    narrow_function *whole, *tail; /* the call's copies of narrow_forward: for panels without padding, and with */
    int64_t g;
    int block;          /* rows of a block */
    int keep_logits;    /* the second sweep needs the logits */
    int keep_powers;    /* the second sweep needs 2^logit */
    const float *norms; /* (N,G) |z| */
    int32_t *slot;      /* (Mp) the vertex that a code, or place where near, is, or -1 */
    int near;           /* this group's rows meet near cells only; then: */
    near_function *near_whole, *near_tail;
    near_codes cells;
    float *points;      /* (M, narrow) codes on the sphere, one after the other */
    int32_t *place;     /* (M) where a code is */
    float *refs, *sums; /* (N) reference and sum of powers of a row */
    float *lonely_hat;  /* (Mp, narrow) panels of the codes that all rows meet after all, */
    int32_t *lonely;    /* (Mp) their vertices, -1 where there is none */
    int64_t lonely_count;
    part *parts;
    int64_t part_count;
    float *mean;   /* (part_count, Mp) sums of pi over the rows of a part, or NULL */
    double *max_p; /* (part_count) */
    /* outputs */
    float *y, *lse, *sumsq, *soft;
    int32_t *codes;
};

/* A thread's working memory, for one block of rows at a time. */
typedef struct worker {
    float *a;          /* (block, D or narrow) rows of z, normalized, times scale */
    uint32_t *a_terms; /* (block) rows of a for AMX tiles; where amx_steps */
    float *s;          /* (block, Mp) logits relative to ref */
    float *e;          /* (block, Mp) 2^s, where keep_powers; takes the place of s where nobody needs s later */
    float *w;          /* (PANEL_ROWS, 64) weights of one panel */
    uint32_t *w_bf16;  /* (PANEL_ROWS, 32) w as bf16x2 */
    float *noise;      /* (PANEL_ROWS, 64); narrow (NARROW_STRIP, 2, 64) */
    float *o;          /* (block, Dp) sum of weight times code */
    uint64_t *lists;   /* (shards, S, K/shards) */
    float *threshold;  /* (shards, Mp) */
    float ref[MOST_ROWS], negative_ref[MOST_ROWS];
    float noisy_ref[MOST_ROWS]; /* the noisy logits' own reference, where noise_kind is NOISE_LOGS */
    vf sum[MOST_ROWS], squares[MOST_ROWS], noisy_sum[MOST_ROWS]; /* of the powers, lane by lane */
    vf best[MOST_ROWS];      /* largest logit (or noisy weight) so far, lane by lane */
    vi best_code[MOST_ROWS]; /* its code; narrow: its panel */
    /* near cells only */
    float *far;        /* (padded groups) a row's squared distances from the groups */
    int32_t *list;     /* (panels) the cells that it meets, */
    vf *top;           /* (panels) the largest of its logits with each, lane by lane */
    float *least;      /* (shards, panels) least threshold of a panel */
    uint64_t *leaders; /* knn-l2 (shards, 2 K / shards) rows of least |pi|^2, by -|pi|^2 */
    float near_best[NARROW_BLOCK];
    int64_t near_code[NARROW_BLOCK];
} worker;

/* -- Rows of any width --------------------------------------------------------------------------------------------- */

/* Prepares for a first panel. */
static void clear_sums(const forward *f, worker *t)
{
    for (int i = 0; i < f->block; i++) {
        t->noisy_ref[i] = 0;
        t->sum[i] = t->squares[i] = t->noisy_sum[i] = vf_zero();
        t->best[i] = vf_set1(-INFINITY);
        t->best_code[i] = (vi){0};
    }
    memset(t->o, 0, sizeof(float) * (size_t)(f->block * f->cpu.Dp));
}

/* Loads rows first .. first + rows - 1 of the group, on the sphere, times scale; the rest of the block is zeros. */
static void load_rows(const forward *f, worker *t, int64_t first, int rows)
{
    const smooth_call *c = &f->c;
    for (int i = 0; i < f->block; i++) {
        int64_t row = (first + i) * c->G + f->g;
        float norm = i < rows ? f->norms[row] : 1;
        float *a = t->a + i * (f->cpu.narrow ? f->cpu.narrow : c->D);
        for (int64_t d = 0; d < c->D; d++) a[d] = i < rows ? c->z[row * c->D + d] / norm * f->cpu.scale : 0;
        for (int64_t d = c->D; d < f->cpu.narrow; d++) a[d] = 0;
        t->ref[i] = t->negative_ref[i] = 0;
    }
    if (f->cpu.amx_steps) amx_split_rows(t->a_terms, t->a, c->D, f->block, c->D);
    clear_sums(f, t);
}

/* Returns the largest of a panel's 64 numbers. */
static inline float row_maximum(const float *s)
{
    vf top = vf_load(s);
    for (int v = 1; v < VECTORS; v++) top = vf_max(top, vf_load(s + v * VX_LANES));
    return vf_maximum(top);
}

/* Computes relative logits s (PANEL_ROWS,64; ld) of the block's rows `from` and on with a panel. */
static void compute_logits(const forward *f, const worker *t, int from, int64_t panel, float *s, int64_t ld)
{
    panel_product(&f->c, &f->cpu, &f->codebook, panel, s, ld, PANEL_ROWS, t->negative_ref + from, t->a + from * f->c.D,
                  f->c.D, t->a_terms + amx_words(from, f->cpu.amx_steps));
}

/* Finds the largest of each row's relative logits in the panels before `end`. */
static void find_maxima(const forward *f, worker *t, int64_t end, float *largest)
{
    const smooth_call *c = &f->c;
    for (int i = 0; i < f->block; i++) largest[i] = -INFINITY;
    for (int64_t panel = 0; panel < end; panel++)
        for (int from = 0; from < f->block; from += PANEL_ROWS) {
            compute_logits(f, t, from, panel, t->w, PANEL);
            if (c->M < (panel + 1) * PANEL) pad_tile(t->w, PANEL, PANEL_ROWS, c->M - panel * PANEL);
            for (int i = 0; i < PANEL_ROWS; i++)
                largest[from + i] = fmaxf(largest[from + i], row_maximum(t->w + i * PANEL));
        }
}

/* Chooses the rows' references (requirement R2). |logit| <= scale, so that 0 serves every row unless tau is small. Then
 * it is the largest logit of the first panel, or, where that turned out to be more than LIMIT too low (exactly), the
 * largest of all. */
static void choose_references(const forward *f, worker *t, int exactly)
{
    const smooth_call *c = &f->c;
    float largest[MOST_ROWS];
    if (f->cpu.scale <= LIMIT) return;
    find_maxima(f, t, exactly ? c->panels : 1, largest);
    for (int i = 0; i < f->block; i++) {
        if (!exactly || largest[i] > LIMIT) t->ref[i] += ceilf(largest[i]);
        t->negative_ref[i] = -t->ref[i];
    }
}

/* Says whether a logit of the tile, rows `from` and on, is too far above its row's reference. */
static int exceeds_limit(const forward *f, const worker *t, int from, int64_t panel)
{
    const smooth_call *c = &f->c;
    if (f->cpu.scale <= LIMIT) return 0;
    vf top = vf_set1(-INFINITY);
    for (int i = from; i < from + PANEL_ROWS; i++)
        for (int v = 0; v < PANEL; v += VX_LANES) top = vf_max(top, vf_load(t->s + i * c->Mp + panel * PANEL + v));
    return vf_greater_bits(top, vf_set1(LIMIT)) != 0;
}

/* Keeps the larger of two candidates per lane, the earlier of equals. */
VX_INLINE void keep_best(vf *best, vi *best_code, vf x, vi code)
{
    *best_code = vi_where_greater(x, *best, code, *best_code);
    *best = vf_max(x, *best);
}

/* Returns the codes of a panel's first vector. */
VX_INLINE vi first_codes(int64_t panel)
{
    vi lane;
    for (int l = 0; l < VX_LANES; l++) lane[l] = l;
    return lane + (int32_t)(panel * PANEL);
}

/* Weighs one row's panel: w = 2^s, or 2^s / E under noise (1/E is the panel's noise). Adds the sums up, and keeps the
 * largest logit, or weight. 2^s goes to e too unless that is NULL. */
VX_INLINE void weigh_row(const int noisy, worker *t, int i, const float *s, const float *noise, float *w, float *e,
                         int64_t panel)
{
    vf sum = t->sum[i], squares = t->squares[i], noisy_sum = t->noisy_sum[i], best = t->best[i];
    vi best_code = t->best_code[i], code = first_codes(panel);
    for (int v = 0; v < PANEL; v += 4 * VX_LANES) {
        vf x[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            x[j] = vf_load(s + v + j * VX_LANES);
            if (!noisy) keep_best(&best, &best_code, x[j], code + v + j * VX_LANES);
        }
        vf_exp2_many(4, x);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            if (e) vf_store(e + v + j * VX_LANES, x[j]);
            sum += x[j];
            squares += x[j] * x[j];
            if (noisy) {
                x[j] *= vf_load(noise + v + j * VX_LANES);
                noisy_sum += x[j];
                keep_best(&best, &best_code, x[j], code + v + j * VX_LANES);
            }
            vf_store(w + v + j * VX_LANES, x[j]);
        }
    }
    t->sum[i] = sum, t->squares[i] = squares, t->noisy_sum[i] = noisy_sum, t->best[i] = best,
    t->best_code[i] = best_code;
}

/* Weighs one row's panel under NOISE_LOGS: w = 2^(u - noisy_ref) with u = (s + g) / t. Noise may be far larger than a
 * logit, so u has a reference of its own, which moves up by integers. */
static void weigh_by_logs(const forward *f, worker *t, int i, const float *s, const float *noise, float *w, float *e,
                          int64_t panel)
{
    const smooth_call *c = &f->c;
    vi code = first_codes(panel);
    for (int v = 0; v < PANEL; v += VX_LANES) {
        vf x = vf_load(s + v), power = vf_exp2(x);
        if (e) vf_store(e + v, power);
        t->sum[i] += power;
        t->squares[i] += power * power;
        vf_store(w + v, (x + vf_load(noise + v)) / c->gumbel_tau);
    }
    if (c->M < (panel + 1) * PANEL) pad_tile(w, PANEL, 1, c->M - panel * PANEL);
    float largest = row_maximum(w) - t->noisy_ref[i];
    if (panel == 0 || largest > LIMIT) {
        float change = ceilf(largest), factor = panel ? exp2f(-change) : 0;
        t->noisy_ref[i] += change;
        t->noisy_sum[i] *= factor;
        for (int64_t d = 0; d < f->cpu.Dp; d++) t->o[i * f->cpu.Dp + d] *= factor;
    }
    for (int v = 0; v < PANEL; v += VX_LANES) {
        vf u = vf_load(w + v), weight = vf_exp2(u - t->noisy_ref[i]);
        keep_best(&t->best[i], &t->best_code[i], u, code + v);
        vf_store(w + v, weight);
        t->noisy_sum[i] += weight;
    }
}

/* Computes logits, powers, weights and the mixture of one panel, for PANEL_ROWS of the block's rows: `from` and on.
 * Returns 0 where a reference is too low; nothing has been added up then. */
static int sweep_tile(const forward *f, worker *t, int64_t first, int from, int64_t panel)
{
    const smooth_call *c = &f->c;
    float *s = t->s + panel * PANEL;
    compute_logits(f, t, from, panel, s + from * c->Mp, c->Mp);
    if (c->M < (panel + 1) * PANEL) pad_tile(s + from * c->Mp, c->Mp, PANEL_ROWS, c->M - panel * PANEL);
    if (exceeds_limit(f, t, from, panel)) return 0;
    if (c->noise_kind != NOISE_NONE) noise_rows(c, first + from, PANEL_ROWS, f->g, panel, t->noise);
    for (int r = 0, i = from; r < PANEL_ROWS; r++, i++) {
        float *w = t->w + r * PANEL, *e = f->keep_powers ? t->e + i * c->Mp + panel * PANEL : 0;
        const float *noise = t->noise + r * PANEL;
        if (c->noise_kind == NOISE_NONE) weigh_row(0, t, i, s + i * c->Mp, 0, w, e, panel);
        else if (c->noise_kind == NOISE_RATES) weigh_row(1, t, i, s + i * c->Mp, noise, w, e, panel);
        else weigh_by_logs(f, t, i, s + i * c->Mp, noise, w, e, panel);
    }
    if (f->cpu.bf16) {
        bf16x2_codes(t->w_bf16, t->w, PANEL_ROWS);
        tile_product_bf16x2(t->o + from * f->cpu.Dp, f->cpu.Dp, PANEL_ROWS, t->w_bf16, PANEL / 2, 1,
                            f->codebook.rows_bf16 + panel * PANEL / 2 * f->cpu.Dp, f->cpu.Dp, PANEL / 2);
    } else panel_mix(&f->cpu, &f->codebook, panel, t->o + from * f->cpu.Dp, t->w);
    return 1;
}

/* Sweeps a block over all codes; once more from the start where a reference proves too low. */
static void sweep_block(const forward *f, worker *t, int rows, int64_t first)
{
    choose_references(f, t, 0);
    for (int64_t panel = 0; panel < f->c.panels; panel++)
        for (int from = 0; from < rows; from += PANEL_ROWS)
            if (!sweep_tile(f, t, first, from, panel)) {
                choose_references(f, t, 1);
                clear_sums(f, t);
                panel = -1;
                break;
            }
}

/* Returns the lowest code among the lanes that hold row i's largest value. */
static inline int64_t best_code(const worker *t, int i, float *value)
{
    float x[VX_LANES];
    int32_t code[VX_LANES];
    memcpy(x, &t->best[i], sizeof x);
    memcpy(code, &t->best_code[i], sizeof code);
    int at = 0;
    for (int l = 1; l < VX_LANES; l++)
        if (x[l] > x[at] || (x[l] == x[at] && code[l] < code[at])) at = l;
    *value = x[at];
    return code[at];
}

/* -- Narrow rows --------------------------------------------------------------------------------------------------- */

/* Returns a bit for each lane of x that is `largest`, than which none is larger. */
static inline uint32_t equal_bits(vf x, float largest)
{
    return ((1u << VX_LANES) - 1) & ~vf_greater_bits(vf_set1(largest), x);
}

/* narrow_forward() for every combination of its constants, each a function of its own: in one function that holds them
 * all GCC allots registers so badly that a third of the time is lost. */
enum { KEEP_SE = KEEP_S + KEEP_E, KEEP_E_SQUARES = KEEP_E + ADD_SQUARES };
#define FOR_KEEPS(f, D, noisy)                                                                                         \
    f(D, noisy, 0) f(D, noisy, KEEP_S) f(D, noisy, KEEP_E) f(D, noisy, KEEP_SE) f(D, noisy, KEEP_E_SQUARES)
#define FOR_ALL(f)                                                                                                     \
    FOR_KEEPS(f, 3, 0) FOR_KEEPS(f, 3, 1) FOR_KEEPS(f, 4, 0) FOR_KEEPS(f, 4, 1) FOR_KEEPS(f, 8, 0) FOR_KEEPS(f, 8, 1)
#define DEFINE(D, noisy, keep)                                                                                         \
    static void narrow_##D##noisy##keep(narrow_row *row, const narrow_strip *strip)                                    \
    {                                                                                                                  \
        narrow_forward(D, noisy, keep, 0, row, strip);                                                                 \
    }                                                                                                                  \
    static void tail_##D##noisy##keep(narrow_row *row, const narrow_strip *strip)                                      \
    {                                                                                                                  \
        narrow_forward(D, noisy, keep, 1, row, strip);                                                                 \
    }
FOR_ALL(DEFINE)

/* Returns the copy for these constants; tail: the one for panels with padding. */
static narrow_function *narrow_copy(int D, int noisy, int keep, int tail)
{
#define CHOOSE(D_, noisy_, keep_)                                                                                      \
    if (D == D_ && noisy == noisy_ && keep == keep_)                                                                   \
        return tail ? tail_##D_##noisy_##keep_ : narrow_##D_##noisy_##keep_;
    FOR_ALL(CHOOSE)
    return 0;
}

/* Chooses the call's copies of narrow_forward(); NULL where D is too large for them. */
static void choose_copies(forward *f)
{
    const smooth_call *c = &f->c;
    const int noisy = c->noise_kind != NOISE_NONE;
    const int keep =
        c->regularizer == VX_REG_KNN_L2 ? KEEP_E_SQUARES : f->keep_logits * KEEP_S + f->keep_powers * KEEP_E;
    f->whole = narrow_copy(f->cpu.narrow, noisy, keep, 0);
    f->tail = narrow_copy(f->cpu.narrow, noisy, keep, 1);
}

/* Fills ref with the largest logits of a narrow block's rows. */
static void narrow_block_maxima(const forward *f, worker *t)
{
    switch (f->cpu.narrow) {
    case 3: narrow_maxima(3, t->a, f->codebook.hat, f->c.M, t->ref); break;
    case 4: narrow_maxima(4, t->a, f->codebook.hat, f->c.M, t->ref); break;
    case 8: narrow_maxima(8, t->a, f->codebook.hat, f->c.M, t->ref); break;
    }
}

/* Sweeps a narrow block over all codes: every two rows take turns at strips of panels. */
static void sweep_narrow(const forward *f, worker *t, int64_t first, int rows)
{
    const smooth_call *c = &f->c;
    const int D = f->cpu.narrow, noisy = c->noise_kind != NOISE_NONE;
    const int64_t full = c->M / PANEL; /* panels without padding */
    narrow_row state[NARROW_BLOCK];
    if (f->cpu.scale > LIMIT) narrow_block_maxima(f, t);
    for (int i = 0; i < NARROW_BLOCK; i++) {
        state[i] = (narrow_row){.best = vf_set1(-INFINITY)};
        t->ref[i] = ceilf(t->ref[i]);
        t->negative_ref[i] = -t->ref[i];
    }
    for (int64_t from = 0; from < c->panels; from += NARROW_STRIP)
        for (int i = 0; i < rows; i += NARROW_ROWS) {
            const int64_t end = vx_min64(from + NARROW_STRIP, c->panels);
            narrow_strip strip = {
                .a = t->a + i * D,
                .start = t->negative_ref + i,
                .hat = f->codebook.hat,
                .raw = f->codebook.raw,
                .first = from,
                .end = vx_min64(end, full),
                .M = c->M,
                .s = f->keep_logits ? t->s + i * c->Mp : 0,
                .e = f->keep_powers ? t->e + i * c->Mp : 0,
                .ld = c->Mp,
                .noise = t->noise,
            };
            for (int64_t panel = from; noisy && panel < end; panel++)
                noise_rows(c, first + i, NARROW_ROWS, f->g, panel, t->noise + (panel - from) * NARROW_ROWS * PANEL);
            f->whole(state + i, &strip);
            if (strip.end == end) continue;
            strip.noise += (strip.end - from) * NARROW_ROWS * PANEL;
            strip.first = strip.end, strip.end = end;
            f->tail(state + i, &strip);
        }
    for (int i = 0; i < NARROW_BLOCK; i++) {
        t->sum[i] = state[i].sum, t->squares[i] = state[i].squares, t->noisy_sum[i] = state[i].noisy_sum;
        t->best[i] = state[i].best, t->best_code[i] = state[i].best_panel;
        for (int d = 0; d < D; d++) t->o[i * D + d] = vf_sum(state[i].o[d]);
    }
}

/* Returns the lowest code of row i whose logit (or weight) is the largest. narrow_forward() only noted in which panel
 * each lane met it, so that panel is computed once more. */
VX_INLINE int64_t find_narrow(const int D, const forward *f, worker *t, int64_t first, int i, float *value)
{
    const smooth_call *c = &f->c;
    vf x[VECTORS], top = vf_set1(-INFINITY);
    int64_t panel = INT32_MAX;
    int32_t panels[VX_LANES];
    memcpy(panels, &t->best_code[i], sizeof panels);
    uint32_t lanes = equal_bits(t->best[i], vf_maximum(t->best[i]));
    for (; lanes; lanes &= lanes - 1) panel = vx_min64(panel, panels[__builtin_ctz(lanes)]);
    if (c->noise_kind != NOISE_NONE) noise_rows(c, first + i, NARROW_ROWS, f->g, panel, t->noise);
    for (int v = 0; v < VECTORS; v++) {
        const int64_t code = panel * PANEL + v * VX_LANES;
        x[v] = narrow_logits(D, t->negative_ref[i], t->a + i * D, f->codebook.hat + panel * PANEL * D + v * VX_LANES);
        if (code + VX_LANES > c->M) x[v] = narrow_pad(x[v], code, c->M);
        if (c->noise_kind != NOISE_NONE) x[v] = vf_exp2(x[v]) * vf_load(t->noise + v * VX_LANES);
        top = vf_max(top, x[v]);
    }
    *value = vf_maximum(top);
    int v = 0;
    while (!(lanes = equal_bits(x[v], *value))) v++;
    return panel * PANEL + v * VX_LANES + __builtin_ctz(lanes);
}

/* -- The end of a block -------------------------------------------------------------------------------------------- */

/* Returns row i's code, and its logit (or weight) in *value. */
static int64_t find_code(const forward *f, worker *t, int64_t first, int i, float *value)
{
    if (f->near) {
        *value = t->near_best[i];
        return t->near_code[i];
    }
    switch (f->cpu.narrow) {
    case 3: return find_narrow(3, f, t, first, i, value);
    case 4: return find_narrow(4, f, t, first, i, value);
    case 8: return find_narrow(8, f, t, first, i, value);
    default: return best_code(t, i, value);
    }
}

/* Writes a block's outputs. Returns the sum of its rows' largest p. */
static double finish_rows(const forward *f, worker *t, int64_t first, int rows)
{
    const smooth_call *c = &f->c;
    double max_p = 0;
    for (int i = 0; i < rows; i++) {
        int64_t row = (first + i) * c->G + f->g;
        float best, sum = vf_sum(t->sum[i]), weights = c->noise_kind == NOISE_NONE ? sum : vf_sum(t->noisy_sum[i]);
        int64_t code = find_code(f, t, first, i, &best);
        double lse = LN2 * (t->ref[i] + log2((double)sum)), noisy = lse;
        if (c->noise_kind == NOISE_RATES) noisy = LN2 * (t->ref[i] + log2((double)weights));
        if (c->noise_kind == NOISE_LOGS)
            noisy = LN2 * (t->ref[i] / c->gumbel_tau + t->noisy_ref[i] + log2((double)weights));
        f->lse[row * 2] = (float)lse;
        f->lse[row * 2 + 1] = (float)noisy;
        f->sumsq[row] = c->regularizer == VX_REG_KNN_L2 ? vf_sum(t->squares[i]) / sum / sum : 0;
        f->codes[row] = (int32_t)code;
        max_p += (c->noise_kind == NOISE_RATES ? best : exp2f(best - t->noisy_ref[i])) / weights;
        const float *o = t->o + i * f->cpu.Dp, *q = c->codebook + (f->g * c->M + code) * c->D;
        float *y = f->y + row * c->D, *soft = f->soft ? f->soft + row * c->D : 0;
        for (int64_t d = 0; d < c->D; d++) {
            float mixed = o[d] / weights;
            y[d] = c->sampler == VX_HARD_GUMBEL ? q[d] : mixed;
            if (soft) soft[d] = mixed;
        }
    }
    return max_p;
}

#endif
