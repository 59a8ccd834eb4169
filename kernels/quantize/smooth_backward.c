/* smooth_backward.c: gradients of smooth.c's forward pass, from dy = dL/dy and dreg = dL/dreg.
 *
 * With x_im = dL/dl_im, z^ and q^ the normalized rows and codes, and w the weights of the mixture (p, or the one-hot
 * code under hard Gumbel, whose p only carries the gradient; Eq. 8):
 *     dL/dz^_i = 1/tau sum_m x_im q^_m            dL/dz_i = (dL/dz^_i - <dL/dz^_i, z^_i> z^_i) / |z_i|
 *     dL/dq^_m = 1/tau sum_i x_im z^_i            dL/dq_m = likewise, + sum_i w_im dy_i
 *     dL/dlog tau = - sum_im x_im l_im = - sum_i (<dL/dz^_i, z^_i> - lse_i sum_m x_im)
 * (the last sum is 0 but for rounding, which l, large where tau is small, must not multiply)
 * and x is a sum of
 *     the mixture   p_im (<dy_i, q_m> - <dy_i, sum_m p_im q_m>) / t                 t = gumbel_tau; 1 under softmax
 *     knn-ce        c (n_i pi_im - [m's pairs with i])                              c = dreg / (G S K), n_i = pairs of
 *     row i
 *     knn-l2        2c pi_im (n_i pi_im - n_i |pi_i|^2 + P_i) - 2c pi_im [pairs]    P_i = sum of pi over the pairs of
 *     row i
 *     ppl           pi_im (b_m - sum_m b_m pi_im)                                   b_m = dreg/G e^H/(N M) (1 + log
 *     mean_pi_m)
 * The dense terms of both KNN losses are one multiply-add per element; the terms in [brackets] are S K sparse pairs.
 *
 * Panel by panel. Rows are cut into chunks. A chunk meets the panels of codes in order; for each panel its blocks of 24
 * rows recompute the logits (p needs no second sweep: lse is known), and from p and <dy, q> make x, which feeds two
 * small products: into the chunk's dL/dz^ and into the panel's dL/dq^ and mixture gradient, which thus stay in cache
 * for the whole chunk.
 *
 * Cost: 10 N M D flops (8 under hard Gumbel; 2 more and one power more under ppl, whose row sum needs a pass of its
 * own), N M powers. Working space: 2 M Dp floats of gradient and M (D + Dp + 1) of codebook, shared; 3 Dp floats per
 * row of a chunk, per thread; N + S K indices of the pairs, sorted by row.
 *
 * Requirements:
 *   R1  Same bits for any number of threads. The gradient of a panel of codes is summed over the chunks in their order:
 *       chunk j may touch strip s of the panels only after chunk j - 1 has left it. So threads follow one another
 *       through
 *       the panels like workers along a line, with one copy of the gradient, not one per thread. A thread takes the
 *       chunks
 *       in ascending order, hence the lowest unfinished chunk never waits, hence all finish.
 *   R2  What is read from codes and near is checked to be in range, before anything is written.
 */
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>

#include "cpu/indices.h"
#include "smooth_narrow.h"

enum {
    STRIPS = 32,             /* hand-overs of a panel's gradient per chunk */
    THIN_CHUNK = 96,         /* rows whose lane-by-lane sums stay in the L1 cache */
    CHUNK_BYTES = 384 << 10, /* of a chunk's rows of z, dy and dz^, which pass through the L2 cache once a panel */
};

/* Strips that a chunk has left; alone in its cache line. */
typedef struct turn {
    _Alignas(CACHE_LINE) atomic_int strips;
} turn;

/* The (vertex, row) pairs of a KNN regularizer, sorted by row: pairs start[i] .. start[i+1] - 1 of `order` belong to
 * row i. */
typedef struct pairs {
    const int32_t *near; /* (S,K) row of each pair */
    float *weight;       /* (S,K) coefficient of the pair's term in x */
    int32_t *order, *start;
    float *probability; /* (N) P_i */
} pairs;

typedef void thin_function(const thin_run *run, const thin_codes *codes);

/* What the threads share. */
typedef struct backward {
    smooth_call c;
    smooth_cpu cpu;
    smooth_book book;
    thin_function *whole, *tail; /* the call's copies of thin_backward: for vectors of codes that all exist, and not */
    int64_t g;
    int block;
    int64_t chunk, chunks, strip; /* rows of a chunk, their number, panels of a strip */
    turn *turns;
    double *dlog_tau; /* (chunks) */
    pairs pair;
    float knn;   /* c of the banner */
    float *ppl;  /* (Mp) b of the banner, or NULL */
    float *dhat; /* (Mp, Dp), thin (panels, thin, 64): sum of x_im times the scaled row: log2(e) dL/dq^, dense terms */
    float *dmix; /* likewise, sum of p_im dy_i; not under hard Gumbel */
    int32_t *code_order, *code_start;      /* hard Gumbel: rows sorted by code */
    const float *norms;                    /* (N,G) |z| */
    const float *dy, *mixed, *lse, *sumsq; /* mixed = sum_m p_im q_m: y or soft */
    const int32_t *codes;
    float *dz, *dcodebook;
} backward;

/* What each thread has, for one chunk at a time. Rows are padded to Dp, the last block to whole blocks, with zeros. */
typedef struct worker {
    float *z, *dy, *dhat;         /* (chunk, Dp): scaled row, dy, sum over m of x_im q^_m */
    float *start;                 /* (chunk) -log2 sum 2^l, so that a tile's logits start as log2 pi */
    float *mix_offset;            /* (chunk) what is added to <dy, q_m> */
    float *pi_factor, *pi_offset; /* (chunk) x += pi (pi_factor pi + pi_offset) */
    vf *x_sum;                    /* (chunk) sum over m of x_im, lane by lane */
    float *noisy;                 /* (chunk) turns pi / E, or (log2 pi + g)/t, into p */
    float *p, *x, *noise;         /* (block,64); noise thin (RUN,64) */
    uint32_t *z_pairs, *dy_pairs; /* (chunk/2, Dp) rows 2i and 2i + 1; bf16 only, as the next two */
    uint32_t *dy_halves;          /* (chunk, ceil(D / 2)) elements 2d and 2d + 1 */
    uint32_t *pairs;              /* (block,32) a tile's pairs, along the codes or the rows */
    vf *thin_dhat;                /* thin (chunk, thin + 1): dhat and x_sum, lane by lane */
    float zero[BLOCK];
} worker;

/* -- Sparse terms -------------------------------------------------------------------------------------------------- */

/* Weights of the pairs and P_i. To be called by all threads of a parallel region, after fill_book. */
static void weigh_pairs(const backward *b)
{
    const smooth_call *c = &b->c;
    const pairs *q = &b->pair;
#pragma omp for schedule(static)
    for (int64_t j = 0; j < c->S * c->K; j++) {
        if (c->regularizer == VX_REG_KNN_CE) {
            q->weight[j] = -b->knn;
            continue;
        }
        int64_t row = q->near[j] * c->G + b->g;
        const float *hat = b->book.rows + vertex_code(c, b->g, j / c->K) * b->cpu.Dp;
        double logit = (double)dot(c->z + row * c->D, hat, c->D) / b->norms[row] / b->cpu.tau;
        q->weight[j] = -2 * b->knn * (float)exp(logit - b->lse[row * 2]);
    }
    if (c->regularizer == VX_REG_KNN_L2)
#pragma omp for schedule(static)
        for (int64_t i = 0; i < c->N; i++) {
            float sum = 0;
            for (int32_t j = q->start[i]; j < q->start[i + 1]; j++) sum += q->weight[q->order[j]];
            q->probability[i] = b->knn != 0 ? sum / (-2 * b->knn) : 0;
        }
}

/* b_m of the ppl regularizer; a code of no probability has none. */
static void fill_ppl(const backward *b, const float *mean_pi, float dreg)
{
    const smooth_call *c = &b->c;
    double entropy = 0;
    for (int64_t m = 0; m < c->M; m++) entropy -= mean_pi[m] > 0 ? mean_pi[m] * log((double)mean_pi[m]) : 0;
    double factor = dreg / (double)c->G * exp(entropy) / ((double)c->N * (double)c->M);
    for (int64_t m = 0; m < c->Mp; m++)
        b->ppl[m] = m < c->M && mean_pi[m] > 0 ? (float)(factor * (log((double)mean_pi[m]) + 1)) : 0;
}

/* -- One chunk ----------------------------------------------------------------------------------------------------- */

/* Rows, and the sparse terms of their dz^. */
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
            const float *hat = b->book.rows + vertex_code(c, b->g, pair / c->K) * Dp;
            for (int64_t d = 0; d < D; d++) t->dhat[i * Dp + d] += b->pair.weight[pair] * hat[d];
        }
    }
}

/* The chunk's factors in bfloat16. */
static void pair_chunk(const backward *b, worker *t, int64_t rows)
{
    const int64_t D = b->c.D, Dp = b->cpu.Dp, half = vx_ceil_div(D, 2), filled = vx_ceil_div(rows, b->block) * b->block;
    pair_rows(t->z_pairs, t->z, filled, Dp);
    pair_rows(t->dy_pairs, t->dy, filled, Dp);
    for (int64_t i = 0; i < filled; i++)
        for (int64_t d = 0; d < half; d++) {
            const float *dy = t->dy + i * Dp + 2 * d; /* a last, odd element is followed by padding */
            t->dy_halves[i * half + d] = vu_pair(vf_set1(dy[0]), vf_set1(dy[1]))[0];
        }
}

/* The numbers that each row contributes to x. */
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

/* log2 pi of one block and panel, into t->p */
static inline void log_pi_tile(const backward *b, worker *t, int64_t i, int64_t panel)
{
    const smooth_call *c = &b->c;
    const int64_t depth = b->cpu.thin ? b->cpu.thin : c->D;
    tile_logits(t->p, PANEL, b->block, t->start + i, t->z + i * b->cpu.Dp, b->cpu.Dp,
                b->book.hat + panel * PANEL * depth, depth);
    if (c->M < (panel + 1) * PANEL) pad_tile(t->p, PANEL, b->block, c->M - panel * PANEL);
}

/* ppl: the row sums sum_m b_m pi_im, taken off what pi is multiplied with. */
static void add_ppl_sums(const backward *b, worker *t, int64_t rows)
{
    for (int64_t i = 0; i < rows; i += b->block) {
        vf sum[BLOCK] = {{0}};
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

/* One row of a panel under softmax: p = pi and x from log2 pi (in p) and <dy, q^> (in x). */
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

/* The same under the Gumbel samplers, with the noise of the row's panel. */
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

/* <dy, q^> of one block and panel, into t->x */
static void inner_tile(const backward *b, worker *t, int64_t i, int64_t panel)
{
    const smooth_call *c = &b->c;
    const int64_t half = vx_ceil_div(c->D, 2);
    if (b->cpu.bf16) {
        memset(t->x, 0, sizeof(float) * (size_t)(b->block * PANEL));
        tile_pair_product(t->x, PANEL, b->block, t->dy_halves + i * half, half, 1,
                          b->book.hat_pairs + panel * half * PANEL, PANEL, half);
    } else
        tile_logits(t->x, PANEL, b->block, t->zero, t->dy + i * b->cpu.Dp, b->cpu.Dp,
                    b->book.hat + panel * PANEL * c->D, c->D);
}

/* What the tile's p and x add to the gradients. */
static void add_tile(const backward *b, worker *t, int64_t i, int64_t panel)
{
    float *dhat = b->dhat + panel * PANEL * b->cpu.Dp, *dmix = b->dmix ? b->dmix + panel * PANEL * b->cpu.Dp : 0;
    if (!b->cpu.bf16) {
        tile_mix(t->dhat + i * b->cpu.Dp, b->block, t->x, b->book.rows + panel * PANEL * b->cpu.Dp, b->cpu.Dp);
        tile_collect(dhat, t->x, b->block, t->z + i * b->cpu.Dp, b->cpu.Dp);
        if (dmix) tile_collect(dmix, t->p, b->block, t->dy + i * b->cpu.Dp, b->cpu.Dp);
        return;
    }
    const int64_t steps = b->block / 2;
    pair_codes(t->pairs, t->x, b->block);
    tile_pair_product(t->dhat + i * b->cpu.Dp, b->cpu.Dp, b->block, t->pairs, PANEL / 2, 1,
                      b->book.row_pairs + panel * PANEL / 2 * b->cpu.Dp, b->cpu.Dp, PANEL / 2);
    pair_rows(t->pairs, t->x, b->block, PANEL);
    tile_pair_product(dhat, b->cpu.Dp, PANEL, t->pairs, 1, PANEL, t->z_pairs + i / 2 * b->cpu.Dp, b->cpu.Dp, steps);
    if (!dmix) return;
    pair_rows(t->pairs, t->p, b->block, PANEL);
    tile_pair_product(dmix, b->cpu.Dp, PANEL, t->pairs, 1, PANEL, t->dy_pairs + i / 2 * b->cpu.Dp, b->cpu.Dp, steps);
}

/* All that one panel of codes and one chunk of rows owe each other. */
static void chunk_panel(const backward *b, worker *t, int64_t first, int64_t rows, int64_t panel)
{
    const smooth_call *c = &b->c;
    const float *norm = b->book.norm + panel * PANEL, *ppl = b->ppl ? b->ppl + panel * PANEL : 0;
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

/* dz of the chunk's rows from their dz^; returns their part of dlog_tau. */
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

/* thin_backward for every combination of its constants, each a function of its own (smooth.c says why). */
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
    static void thin_##D##kind(const thin_run *run, const thin_codes *codes)                                           \
    {                                                                                                                  \
        thin_backward(D, kind, 0, run, codes);                                                                         \
    }                                                                                                                  \
    static void tail_##D##kind(const thin_run *run, const thin_codes *codes) { thin_backward(D, kind, 1, run, codes); }
FOR_ALL(DEFINE)

static thin_function *thin_copy(int D, int kind, int tail)
{
#define CHOOSE(D_, kind_)                                                                                              \
    if (D == D_ && kind == kind_) return tail ? tail_##D_##kind_ : thin_##D_##kind_;
    FOR_ALL(CHOOSE)
    return 0;
}

static void choose_copies(backward *b)
{
    const smooth_call *c = &b->c;
    const int noisy = c->noise_kind != NOISE_NONE, square = c->regularizer == VX_REG_KNN_L2 || (noisy && !b->ppl);
    const int kind = noisy * NOISY + square * SQUARE + (b->ppl != 0) * WITH_PPL + (b->dmix != 0) * MIX;
    b->whole = thin_copy(b->cpu.thin, kind, 0);
    b->tail = thin_copy(b->cpu.thin, kind, 1);
}

/* chunk_panel for narrow rows: runs of RUN rows against one or two vectors of codes at a time. */
static void thin_panel(const backward *b, worker *t, int64_t first, int64_t rows, int64_t panel)
{
    const smooth_call *c = &b->c;
    const int D = b->cpu.thin, noisy = c->noise_kind != NOISE_NONE;
    for (int64_t i = 0; i < rows; i += RUN) {
        const thin_run run = {
            .z = t->z + i * D,
            .dy = t->dy + i * D,
            .start = t->start + i,
            .mix_offset = t->mix_offset + i,
            .pi_factor = t->pi_factor + i,
            .pi_offset = t->pi_offset + i,
            .noisy = t->noisy + i,
            .noise = t->noise,
            .dhat = t->thin_dhat + i * (D + 1),
            .rows = vx_min64(RUN, vx_ceil_div(rows - i, PAIR) * PAIR),
        };
        if (noisy) noise_rows(c, first + i, run.rows, b->g, panel, t->noise);
        const int step = thin_side(D) * VX_LANES;
        for (int v = 0; v < PANEL && panel * PANEL + v < c->M; v += step) {
            const int64_t at = panel * PANEL * D + v, filled = c->M - panel * PANEL - v;
            const thin_codes codes = {
                .v = v,
                .hat = b->book.hat + at,
                .raw = b->book.raw + at,
                .ppl = b->ppl ? b->ppl + panel * PANEL + v : 0,
                .dhat = b->dhat + at,
                .dmix = b->dmix ? b->dmix + at : 0,
                .filled = filled,
            };
            (filled < step ? b->tail : b->whole)(&run, &codes);
        }
    }
}

static void meet_panel(const backward *b, worker *t, int64_t first, int64_t rows, int64_t panel)
{
    if (b->cpu.thin) thin_panel(b, t, first, rows, panel);
    else chunk_panel(b, t, first, rows, panel);
}

/* Adds up what thin_panel left lane by lane. */
static void gather_thin(const backward *b, worker *t, int64_t rows)
{
    for (int64_t i = 0; b->cpu.thin && i < rows; i++) {
        for (int d = 0; d < b->cpu.thin; d++)
            t->dhat[i * b->cpu.Dp + d] += vf_sum(t->thin_dhat[i * (b->cpu.thin + 1) + d]);
        t->x_sum[i] += t->thin_dhat[i * (b->cpu.thin + 1) + b->cpu.thin];
    }
}

static void wait_for(turn *before, int strip)
{
    for (int tries = 0; atomic_load_explicit(&before->strips, memory_order_acquire) <= strip; tries++)
        if (tries > 1000) sched_yield();
}

static void backward_chunk(const backward *b, worker *t, int64_t chunk)
{
    const smooth_call *c = &b->c;
    int64_t first = chunk * b->chunk, rows = vx_min64(b->chunk, c->N - first);
    load_chunk(b, t, first, rows);
    load_row_numbers(b, t, first, rows);
    if (b->cpu.bf16) pair_chunk(b, t, rows);
    if (b->ppl) add_ppl_sums(b, t, rows);
    for (int64_t i = 0; b->cpu.thin && c->noise_kind == NOISE_NONE && i < rows; i++)
        t->mix_offset[i] += t->pi_offset[i];
    if (b->cpu.thin) memset(t->thin_dhat, 0, sizeof(vf) * (size_t)(b->chunk * (b->cpu.thin + 1)));
    for (int64_t panel = 0, strip = 0; panel < c->panels; strip++) {
        if (chunk) wait_for(&b->turns[chunk - 1], (int)strip);
        for (int64_t end = vx_min64(panel + b->strip, c->panels); panel < end; panel++)
            meet_panel(b, t, first, rows, panel);
        atomic_store_explicit(&b->turns[chunk].strips, (int)strip + 1, memory_order_release);
    }
    gather_thin(b, t, rows);
    b->dlog_tau[chunk] += finish_chunk(b, t, first, rows);
}

/* -- All of a group ------------------------------------------------------------------------------------------------ */

/* Code m's part of dhat or dmix. */
static inline void read_code(const backward *b, const float *from, int64_t m, float *out)
{
    for (int64_t d = 0; d < b->cpu.Dp; d++)
        out[d] = b->cpu.thin ? from[(m / PANEL * b->cpu.thin + d) * PANEL + m % PANEL] : from[m * b->cpu.Dp + d];
}

/* dcodebook of the group. To be called by all threads of a parallel region. */
static void finish_codes(const backward *b, const int32_t *slot)
{
    const smooth_call *c = &b->c;
    const int64_t D = c->D;
#pragma omp for schedule(static)
    for (int64_t m = 0; m < c->M; m++) {
        const float *hat = b->book.rows + m * b->cpu.Dp;
        float dhat[b->cpu.Dp], dmix[b->cpu.Dp], *out = b->dcodebook + (b->g * c->M + m) * D;
        read_code(b, b->dhat, m, dhat);
        if (b->dmix) read_code(b, b->dmix, m, dmix);
        for (int64_t k = 0; slot && slot[m] >= 0 && k < c->K; k++) { /* the sparse terms */
            int64_t pair = slot[m] * c->K + k, row = b->pair.near[pair] * c->G + b->g;
            float factor = b->pair.weight[pair] / b->norms[row] * b->cpu.scale;
            for (int64_t d = 0; d < D; d++) dhat[d] += factor * c->z[row * D + d];
        }
        float projection = b->book.norm[m] > (float)GUARD ? dot(dhat, hat, D) : 0;
        float factor = (float)LN2 / b->book.norm[m];
        for (int64_t d = 0; d < D; d++) out[d] = (dhat[d] - projection * hat[d]) * factor;
        if (b->dmix) {
            for (int64_t d = 0; d < D; d++) out[d] += dmix[d];
            continue;
        }
        for (int32_t j = b->code_start[m]; j < b->code_start[m + 1]; j++) {
            const float *dy = b->dy + (b->code_order[j] * c->G + b->g) * D;
            for (int64_t d = 0; d < D; d++) out[d] += dy[d];
        }
    }
}

/* Lays out the working memory in a; count only where a->base is NULL. */
static void carve_backward(smooth_arena *a, backward *b, worker **workers, int threads, int32_t **slot)
{
    const smooth_call *c = &b->c;
    const int hard = c->sampler == VX_HARD_GUMBEL, ppl = c->regularizer == VX_REG_PPL;
    const int64_t count = c->S * c->K;
    carve_book(a, c, &b->cpu, &b->book, 1);
    b->dhat = carve_f32(a, c->Mp * b->cpu.Dp);
    b->dmix = hard ? 0 : carve_f32(a, c->Mp * b->cpu.Dp);
    b->turns = carve(a, b->chunks, sizeof(turn));
    b->dlog_tau = carve(a, b->chunks, sizeof(double));
    b->ppl = ppl ? carve_f32(a, c->Mp) : 0;
    b->pair.weight = carve_f32(a, count);
    b->pair.order = carve(a, count, sizeof(int32_t));
    b->pair.start = count ? carve(a, c->N + 1, sizeof(int32_t)) : 0;
    b->pair.probability = c->regularizer == VX_REG_KNN_L2 ? carve_f32(a, c->N) : 0;
    *slot = count ? carve(a, c->M, sizeof(int32_t)) : 0;
    b->code_order = hard ? carve(a, c->N, sizeof(int32_t)) : 0;
    b->code_start = hard ? carve(a, c->M + 1, sizeof(int32_t)) : 0;
    for (int i = 0; i < threads; i++) {
        worker *t = carve(a, 1, sizeof *t), nowhere;
        workers[i] = t;
        if (!a->base) t = &nowhere;
        t->z = carve_f32(a, b->chunk * b->cpu.Dp);
        t->dy = carve_f32(a, b->chunk * b->cpu.Dp);
        t->dhat = carve_f32(a, b->chunk * b->cpu.Dp);
        t->start = carve_f32(a, b->chunk);
        t->mix_offset = carve_f32(a, b->chunk);
        t->pi_factor = carve_f32(a, b->chunk);
        t->pi_offset = carve_f32(a, b->chunk);
        t->x_sum = carve(a, b->chunk, sizeof(vf));
        t->noisy = carve_f32(a, b->chunk);
        t->p = carve_f32(a, b->block * PANEL);
        t->x = carve_f32(a, b->block * PANEL);
        t->z_pairs = b->cpu.bf16 ? carve_pairs(a, b->chunk / 2 * b->cpu.Dp) : 0;
        t->dy_pairs = b->cpu.bf16 ? carve_pairs(a, b->chunk / 2 * b->cpu.Dp) : 0;
        t->dy_halves = b->cpu.bf16 ? carve_pairs(a, b->chunk * vx_ceil_div(c->D, 2)) : 0;
        t->pairs = b->cpu.bf16 ? carve_pairs(a, b->block * PANEL / 2) : 0;
        t->noise = carve_f32(a, (b->cpu.thin ? RUN : b->block) * PANEL);
        t->thin_dhat = b->cpu.thin ? carve(a, b->chunk * (b->cpu.thin + 1), sizeof(vf)) : 0;
        if (a->base) memset(t->zero, 0, sizeof t->zero);
    }
}

/* Prepares group g's index lists, which is serial work of O(N + S K). */
static void index_group(const backward *b, int32_t *slot)
{
    const smooth_call *c = &b->c;
    if (c->K) {
        counting_sort(b->pair.near, 1, c->S * c->K, c->N, b->pair.order, b->pair.start);
        for (int64_t m = 0; m < c->M; m++) slot[m] = c->vertices ? -1 : (int32_t)m;
        for (int64_t s = 0; c->vertices && s < c->S; s++) slot[vertex_code(c, b->g, s)] = (int32_t)s;
    }
    if (b->code_order) counting_sort(b->codes + b->g, c->G, c->N, c->M, b->code_order, b->code_start);
}

int VX_CPU(smooth_backward)(vx_tensor *dz, vx_tensor *dcodebook, vx_tensor *dlog_tau, vx_tensor *dy, vx_tensor *dreg,
                            vx_tensor *y, vx_tensor *codes, vx_tensor *lse, vx_tensor *sumsq, vx_tensor *soft,
                            vx_tensor *near, vx_tensor *mean_pi, vx_tensor *z, vx_tensor *codebook, vx_tensor *log_tau,
                            vx_tensor *noise, vx_tensor *vertices, int sampler, int regularizer, float gumbel_tau,
                            int shards, int precision, uint64_t seed, uint64_t stream)
{
    backward b = {
        .dy = vx_f32(dy),
        .mixed = vx_f32(sampler == VX_HARD_GUMBEL ? soft : y),
        .lse = vx_f32(lse),
        .sumsq = vx_f32(sumsq),
        .codes = vx_i32(codes),
        .dz = vx_f32(dz),
        .dcodebook = vx_f32(dcodebook),
    };
    smooth_call *c = &b.c;
    int status = smooth_call_check(c, "smooth_backward", z, codebook, noise, vertices, near, mean_pi, sampler,
                                   regularizer, gumbel_tau, shards, seed, stream);
    if (!status) status = check_soft(c, soft);
    if (status) return status;
    float *norms = vx_scratch(c->op, sizeof(float) * (size_t)(c->N * c->G));
    if (!norms) return VX_ENOMEM;
    b.norms = norms;
    status = smooth_cpu_check(&b.cpu, c, log_tau, precision, norms);
    if (!status) status = check_indices(c->op, "code", b.codes, c->N, c->G, c->M);
    if (!status && c->K) status = check_indices(c->op, "neighbour", vx_i32(near), c->G * c->S, c->K, c->N);
    int threads = omp_get_max_threads();
    worker *workers[threads];
    smooth_arena arena = {0};
    int32_t *slot;
    b.block = BLOCK;
    if (!status) {
        int64_t most = b.cpu.thin ? THIN_CHUNK : CHUNK_BYTES / (3 * (int64_t)sizeof(float) * b.cpu.Dp) / BLOCK * BLOCK;
        b.chunk = vx_max64(BLOCK, vx_min64(most, vx_ceil_div(vx_ceil_div(c->N, 16), BLOCK) * BLOCK));
        b.chunks = vx_ceil_div(c->N, b.chunk);
        b.strip = vx_ceil_div(c->panels, STRIPS);
        carve_backward(&arena, &b, workers, threads, &slot);
        arena = (smooth_arena){.base = vx_scratch(c->op, arena.used)};
        if (!arena.base) status = VX_ENOMEM;
    }
    if (status) {
        vx_scratch_free(norms);
        return status;
    }
    carve_backward(&arena, &b, workers, threads, &slot);
    choose_copies(&b);
    memset(b.dlog_tau, 0, sizeof(double) * (size_t)b.chunks);

    for (b.g = 0; b.g < c->G; b.g++) {
        b.knn = c->K ? vx_f32(dreg)[0] / ((float)c->G * (float)c->S * (float)c->K) : 0;
        b.pair.near = c->K ? vx_i32(near) + b.g * c->S * c->K : 0;
        index_group(&b, slot);
        if (b.ppl) fill_ppl(&b, vx_f32(mean_pi) + b.g * c->M, vx_f32(dreg)[0]);
        memset(b.dhat, 0, sizeof(float) * (size_t)(c->Mp * b.cpu.Dp));
        if (b.dmix) memset(b.dmix, 0, sizeof(float) * (size_t)(c->Mp * b.cpu.Dp));
        for (int64_t i = 0; i < b.chunks; i++) atomic_init(&b.turns[i].strips, 0);
#pragma omp parallel num_threads(threads)
        {
            unsigned denormals = vx_denormals_off();
            fill_book(c, &b.cpu, &b.book, b.g, 1);
            if (c->K) weigh_pairs(&b);
#pragma omp for schedule(monotonic : dynamic, 1)
            for (int64_t i = 0; i < b.chunks; i++) backward_chunk(&b, workers[omp_get_thread_num()], i);
            finish_codes(&b, slot);
            vx_denormals_restore(denormals);
        }
    }
    double sum = 0;
    for (int64_t i = 0; i < b.chunks; i++) sum += b.dlog_tau[i];
    vx_f32(dlog_tau)[0] = (float)sum;
    vx_scratch_free(arena.base);
    vx_scratch_free(norms);
    return VX_OK;
}
