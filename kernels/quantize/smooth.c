/* smooth.c: the smoothed quantizer of [1] and its regularizers, forward. smooth_backward.c has the gradients, smooth.h
 * the tiles.
 *
 * For every row i of z and code m of one codebook (groups are independent):
 *     l_im  = <z_i, q_m> / (|z_i| |q_m| tau)                                  logits, always float32
 *     pi_i  = softmax(l_i)
 *     p_i   = pi_i                          softmax sampler
 *           = softmax((l_i + g_i) / t)      the two Gumbel samplers, t = gumbel_tau, g = -log(-log u)       (Eq. 7)
 *     y_i   = sum_m p_im q_m                or, under hard Gumbel, q_code                                   (Eq. 5, 8)
 *     code_i = the m with the largest p_im, the lowest of equals
 * and one of (everything in the regularizers is pi, never the noisy p; mean over the G groups)
 *     knn-ce  1/(S K) sum_m sum_k -log pi_{n(m,k),m}                                                        (Eq. 13)
 *     knn-l2  1/(S K) sum_m sum_k 1 - 2 pi_{n(m,k),m} + |pi_n(m,k)|^2
 *     ppl     1 - exp(H(mean_i pi_i)) / M                                                                   (Eq. 11,
 *     12)
 * where n(m, 1..K) are the K rows nearest to vertex m. A subset of `vertices` and `shards` concern the KNN regularizers
 * only.
 *
 * Precision. Under VX_BF16 and for D > 8 five products round their factors to bfloat16 (to nearest, ties to even) and
 * add in float32: sum_m p_im q_m here; <dy_i, q_m>, sum_m x_im q^_m, sum_i x_im z^_i and sum_i p_im dy_i in
 * smooth_backward.c, which rounds q^ and multiplies by |q_m| after. Each sum is off by up to 2^-7 of the sum of its
 * terms' magnitudes. Everything else is float32 with the bits it has under VX_F32: logits (in both passes), lse, sumsq,
 * mean_pi, codes, near, reg, max_p, and y under hard Gumbel, which is a code. The variant avx512bf16 adds pairs of
 * products by vdpbf16ps; the others split the pairs into float32 factors again, with the same products in the same
 * order, and take longer than under VX_F32.
 *
 * Left for the backward pass: lse (log-sum-exp of l, and of (l + g)/t), sumsq = |pi_i|^2 (under knn-l2, else 0),
 * soft = sum_m p_im q_m, near, mean_pi.
 *
 * One sweep per block of rows. A block (8 rows where D <= 8, else 24 to 96) meets all M codes before the next block
 * starts: logits of a panel of 64 codes, powers, sums, mixing with the codes; the block's logits (or powers) stay in
 * the L2 cache, where a second sweep compares them with the thresholds of the vertices once the row sums are known. No
 * N x M array exists; a logit is computed twice only where tau is so small that the largest must be known first.
 *
 * Cost: 4 N M D flops, N M powers, N M comparisons. Memory traffic: z, y and the outputs once; the codebook passes
 * through the L2 cache once a block. Working space: per thread a block of logits (8 M to 96 M floats) and M K entries
 * of 8 bytes; shared, M (2 D + 1) floats of codebook. Bound by the FMA units for D >= 16; at D = 3 by powers and
 * comparisons, see smooth_narrow.h.
 *
 * Requirements, which the tests hold this file to:
 *   R1  The bits of all outputs depend on the arguments only, not on threads: sums over rows are cut into PARTS parts
 *   that
 *       depend on the sizes alone; the K nearest are chosen by the total order of neighbours.h.
 *   R2  No power overflows, for tau from 1e-5 to 1: logits are kept relative to a reference r_i, an integer, such that
 *   the
 *       largest is at most LIMIT above it, and from the start of the sum, in which -r_i is the first term. r_i depends
 *       on
 *       row i alone, so that equal rows have equal keys, and is the same for all of its codes, so that equal codes have
 *       equal logits.
 *   R3  Equal logits of a row tie to the lower code, equal keys of a vertex to the lower row.
 *   R4  After an error nothing has been written; a NaN or Inf in z or in the codebook is such an error.
 *
 * [1] Morita 2025, Pushing Toward the Simplex Vertices: A Simple Remedy for Code Collapse in Smoothed Vector
 *     Quantization.
 */
#include <omp.h>

#include "shared/neighbours.h"
#include "smooth_narrow.h"

enum {
    PARTS = 32, /* row ranges whose partial sums are added in order */
    MOST_ROWS = 4 * BLOCK,
    THIN_STRIP = 16,   /* panels that two rows meet before the next two do, from the L1 cache */
    SELECT_STRIP = 16, /* panels whose thresholds a row is compared with before the next row is */
};

typedef struct part {
    int64_t first, end, shard;
} part;

typedef void thin_function(thin_row *row, const thin_strip *strip);

/* What the threads share. */
typedef struct forward {
    smooth_call c;
    smooth_cpu cpu;
    smooth_book book;
    thin_function *whole, *tail; /* the call's copies of thin_forward: for panels without padding, and with */
    int64_t g;
    int block;          /* rows of a block */
    int keep_logits;    /* the second sweep needs the logits */
    int keep_powers;    /* the second sweep needs 2^logit */
    const float *norms; /* (N,G) |z| */
    int32_t *slot;      /* (M) the vertex that looks at a code, or -1 */
    part *parts;
    int64_t part_count;
    float *mean;   /* (part_count, Mp) sums of pi over the rows of a part, or NULL */
    double *max_p; /* (part_count) */
    /* outputs */
    float *y, *lse, *sumsq, *soft;
    int32_t *codes;
} forward;

/* What each thread has, for one block of rows at a time. */
typedef struct worker {
    float *a;         /* (block, D or thin) rows of z, normalized, times scale */
    float *s;         /* (block, Mp) logits relative to ref */
    float *e;         /* (block, Mp) 2^s, where keep_powers; in the place of s where only they are needed */
    float *w;         /* (block, 64) weights of one panel */
    uint32_t *pairs;  /* (BLOCK, 32) the same in bfloat16 */
    float *noise;     /* (block, 64), thin (THIN_STRIP, 2, 64) */
    float *o;         /* (block, Dp) sum of weight times code */
    uint64_t *lists;  /* (shards, S, K/shards) */
    float *threshold; /* (shards, Mp) */
    float ref[MOST_ROWS], negative_ref[MOST_ROWS];
    float noisy_ref[MOST_ROWS]; /* the noisy logits' own reference, where noise_kind is NOISE_LOGS */
    vf sum[MOST_ROWS], squares[MOST_ROWS], noisy_sum[MOST_ROWS]; /* of the powers, lane by lane */
    vf best[MOST_ROWS]; /* largest logit (or noisy weight) so far, lane by lane, and its code */
    vi best_code[MOST_ROWS];
} worker;

/* -- One block of rows: first sweep -------------------------------------------------------------------------------- */

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

static void load_rows(const forward *f, worker *t, int64_t first, int rows)
{
    const smooth_call *c = &f->c;
    for (int i = 0; i < f->block; i++) {
        int64_t row = (first + i) * c->G + f->g;
        float norm = i < rows ? f->norms[row] : 1;
        float *a = t->a + i * (f->cpu.thin ? f->cpu.thin : c->D);
        for (int64_t d = 0; d < c->D; d++) a[d] = i < rows ? c->z[row * c->D + d] / norm * f->cpu.scale : 0;
        for (int64_t d = c->D; d < f->cpu.thin; d++) a[d] = 0;
        t->ref[i] = t->negative_ref[i] = 0;
    }
    clear_sums(f, t);
}

static inline float row_maximum(const float *s)
{
    vf top = vf_load(s);
    for (int v = 1; v < VECTORS; v++) top = vf_max(top, vf_load(s + v * VX_LANES));
    return vf_maximum(top);
}

/* largest[i] = the largest of row i's relative logits in the panels before `end`. */
static void find_maxima(const forward *f, worker *t, int64_t end, float *largest)
{
    const smooth_call *c = &f->c;
    for (int i = 0; i < f->block; i++) largest[i] = -INFINITY;
    for (int64_t panel = 0; panel < end; panel++)
        for (int from = 0; from < f->block; from += BLOCK) {
            tile_logits(t->w, PANEL, BLOCK, t->negative_ref + from, t->a + from * c->D, c->D,
                        f->book.hat + panel * PANEL * c->D, c->D);
            if (c->M < (panel + 1) * PANEL) pad_tile(t->w, PANEL, BLOCK, c->M - panel * PANEL);
            for (int i = 0; i < BLOCK; i++) largest[from + i] = fmaxf(largest[from + i], row_maximum(t->w + i * PANEL));
        }
}

/* Requirement R2. |logit| <= scale, so that 0 serves every row unless tau is small; then it is the largest logit of the
 * first panel, or, where that turns out to be more than LIMIT too low (exactly), the largest of all. */
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

/* Whether a logit of the tile, rows `from` and on, is too far above its row's reference. */
static int exceeds_limit(const forward *f, const worker *t, int from, int64_t panel)
{
    const smooth_call *c = &f->c;
    if (f->cpu.scale <= LIMIT) return 0;
    vf top = vf_set1(-INFINITY);
    for (int i = from; i < from + BLOCK; i++)
        for (int v = 0; v < PANEL; v += VX_LANES) top = vf_max(top, vf_load(t->s + i * c->Mp + panel * PANEL + v));
    return vf_greater_bits(top, vf_set1(LIMIT)) != 0;
}

/* The larger of two candidates per lane, the earlier of equals. */
VX_INLINE void keep_best(vf *best, vi *best_code, vf x, vi code)
{
    *best_code = vi_where_greater(x, *best, code, *best_code);
    *best = vf_max(x, *best);
}

/* Codes of a panel's first vector. */
VX_INLINE vi first_codes(int64_t panel)
{
    vi lane;
    for (int l = 0; l < VX_LANES; l++) lane[l] = l;
    return lane + (int32_t)(panel * PANEL);
}

/* Weights of one row's panel with their sums: w = 2^s, or 2^s / E under noise (the panel's rates), and the largest
 * logit, or weight; 2^s is kept in e too unless NULL. */
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

/* Noisy weights of one row's panel, w = 2^(u - noisy_ref) with u = (s + g)/t: noise may be far larger than a logit, so
 * u has a reference of its own, which moves up by integers. */
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

/* Logits, powers, weights and the mixture of one panel, for BLOCK of the block's rows: `from` and on. 0 where a
 * reference is too low, and nothing has been added up. */
static int sweep_tile(const forward *f, worker *t, int64_t first, int from, int64_t panel)
{
    const smooth_call *c = &f->c;
    float *s = t->s + panel * PANEL;
    tile_logits(s + from * c->Mp, c->Mp, BLOCK, t->negative_ref + from, t->a + from * c->D, c->D,
                f->book.hat + panel * PANEL * c->D, c->D);
    if (c->M < (panel + 1) * PANEL) pad_tile(s + from * c->Mp, c->Mp, BLOCK, c->M - panel * PANEL);
    if (exceeds_limit(f, t, from, panel)) return 0;
    if (c->noise_kind != NOISE_NONE) noise_rows(c, first + from, BLOCK, f->g, panel, t->noise);
    for (int r = 0, i = from; r < BLOCK; r++, i++) {
        float *w = t->w + r * PANEL, *e = f->keep_powers ? t->e + i * c->Mp + panel * PANEL : 0;
        const float *noise = t->noise + r * PANEL;
        if (c->noise_kind == NOISE_NONE) weigh_row(0, t, i, s + i * c->Mp, 0, w, e, panel);
        else if (c->noise_kind == NOISE_RATES) weigh_row(1, t, i, s + i * c->Mp, noise, w, e, panel);
        else weigh_by_logs(f, t, i, s + i * c->Mp, noise, w, e, panel);
    }
    if (f->cpu.bf16) {
        pair_codes(t->pairs, t->w, BLOCK);
        tile_pair_product(t->o + from * f->cpu.Dp, f->cpu.Dp, BLOCK, t->pairs, PANEL / 2, 1,
                          f->book.row_pairs + panel * PANEL / 2 * f->cpu.Dp, f->cpu.Dp, PANEL / 2);
    } else tile_mix(t->o + from * f->cpu.Dp, BLOCK, t->w, f->book.rows + panel * PANEL * f->cpu.Dp, f->cpu.Dp);
    return 1;
}

/* The first sweep of a block; once more from its start where a reference proves too low. */
static void sweep_block(const forward *f, worker *t, int rows, int64_t first)
{
    choose_references(f, t, 0);
    for (int64_t panel = 0; panel < f->c.panels; panel++)
        for (int from = 0; from < rows; from += BLOCK)
            if (!sweep_tile(f, t, first, from, panel)) {
                choose_references(f, t, 1);
                clear_sums(f, t);
                panel = -1;
                break;
            }
}

/* The lowest code among the lanes that hold the largest value. */
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

/* Bit l says whether lane l of x is `largest`, than which none is larger. */
static inline uint32_t equal_bits(vf x, float largest)
{
    return ((1u << VX_LANES) - 1) & ~vf_greater_bits(vf_set1(largest), x);
}

/* thin_forward for every combination of its constants, each a function of its own: in one function that holds them all
 * GCC allots registers so badly that a third of the time is lost. */
enum { KEEP_SE = KEEP_S + KEEP_E, KEEP_E_SQUARES = KEEP_E + ADD_SQUARES };
#define FOR_KEEPS(f, D, noisy)                                                                                         \
    f(D, noisy, 0) f(D, noisy, KEEP_S) f(D, noisy, KEEP_E) f(D, noisy, KEEP_SE) f(D, noisy, KEEP_E_SQUARES)
#define FOR_ALL(f)                                                                                                     \
    FOR_KEEPS(f, 3, 0) FOR_KEEPS(f, 3, 1) FOR_KEEPS(f, 4, 0) FOR_KEEPS(f, 4, 1) FOR_KEEPS(f, 8, 0) FOR_KEEPS(f, 8, 1)
#define DEFINE(D, noisy, keep)                                                                                         \
    static void thin_##D##noisy##keep(thin_row *row, const thin_strip *strip)                                          \
    {                                                                                                                  \
        thin_forward(D, noisy, keep, 0, row, strip);                                                                   \
    }                                                                                                                  \
    static void tail_##D##noisy##keep(thin_row *row, const thin_strip *strip)                                          \
    {                                                                                                                  \
        thin_forward(D, noisy, keep, 1, row, strip);                                                                   \
    }
FOR_ALL(DEFINE)

/* The copy, or that for panels with padding. */
static thin_function *thin_copy(int D, int noisy, int keep, int tail)
{
#define CHOOSE(D_, noisy_, keep_)                                                                                      \
    if (D == D_ && noisy == noisy_ && keep == keep_) return tail ? tail_##D_##noisy_##keep_ : thin_##D_##noisy_##keep_;
    FOR_ALL(CHOOSE)
    return 0;
}

static void choose_copies(forward *f)
{
    const smooth_call *c = &f->c;
    const int noisy = c->noise_kind != NOISE_NONE;
    const int keep =
        c->regularizer == VX_REG_KNN_L2 ? KEEP_E_SQUARES : f->keep_logits * KEEP_S + f->keep_powers * KEEP_E;
    f->whole = thin_copy(f->cpu.thin, noisy, keep, 0);
    f->tail = thin_copy(f->cpu.thin, noisy, keep, 1);
}

static void thin_block_maxima(const forward *f, worker *t)
{
    switch (f->cpu.thin) {
    case 3: thin_maxima(3, t->a, f->book.hat, f->c.M, t->ref); break;
    case 4: thin_maxima(4, t->a, f->book.hat, f->c.M, t->ref); break;
    case 8: thin_maxima(8, t->a, f->book.hat, f->c.M, t->ref); break;
    }
}

/* The first sweep of a narrow block: pairs of rows take turns at strips of panels. */
static void sweep_thin(const forward *f, worker *t, int64_t first, int rows)
{
    const smooth_call *c = &f->c;
    const int D = f->cpu.thin, noisy = c->noise_kind != NOISE_NONE;
    const int64_t full = c->M / PANEL; /* panels without padding */
    thin_row state[THIN_BLOCK];
    if (f->cpu.scale > LIMIT) thin_block_maxima(f, t);
    for (int i = 0; i < THIN_BLOCK; i++) {
        state[i] = (thin_row){.best = vf_set1(-INFINITY)};
        t->ref[i] = ceilf(t->ref[i]);
        t->negative_ref[i] = -t->ref[i];
    }
    for (int64_t from = 0; from < c->panels; from += THIN_STRIP)
        for (int i = 0; i < rows; i += PAIR) {
            const int64_t end = vx_min64(from + THIN_STRIP, c->panels);
            thin_strip strip = {
                .a = t->a + i * D,
                .start = t->negative_ref + i,
                .hat = f->book.hat,
                .raw = f->book.raw,
                .first = from,
                .end = vx_min64(end, full),
                .M = c->M,
                .s = f->keep_logits ? t->s + i * c->Mp : 0,
                .e = f->keep_powers ? t->e + i * c->Mp : 0,
                .ld = c->Mp,
                .noise = t->noise,
            };
            for (int64_t panel = from; noisy && panel < end; panel++)
                noise_rows(c, first + i, PAIR, f->g, panel, t->noise + (panel - from) * PAIR * PANEL);
            f->whole(state + i, &strip);
            if (strip.end == end) continue;
            strip.noise += (strip.end - from) * PAIR * PANEL;
            strip.first = strip.end, strip.end = end;
            f->tail(state + i, &strip);
        }
    for (int i = 0; i < THIN_BLOCK; i++) {
        t->sum[i] = state[i].sum, t->squares[i] = state[i].squares, t->noisy_sum[i] = state[i].noisy_sum;
        t->best[i] = state[i].best, t->best_code[i] = state[i].best_panel;
        for (int d = 0; d < D; d++) t->o[i * D + d] = vf_sum(state[i].o[d]);
    }
}

/* The lowest code of row i whose logit (or weight) is the largest: thin_forward only noted in which panel each lane met
 * it, so that panel is computed once more. */
VX_INLINE int64_t find_thin(const int D, const forward *f, worker *t, int64_t first, int i, float *value)
{
    const smooth_call *c = &f->c;
    vf x[VECTORS], top = vf_set1(-INFINITY);
    int64_t panel = INT32_MAX;
    int32_t panels[VX_LANES];
    memcpy(panels, &t->best_code[i], sizeof panels);
    uint32_t lanes = equal_bits(t->best[i], vf_maximum(t->best[i]));
    for (; lanes; lanes &= lanes - 1) panel = vx_min64(panel, panels[__builtin_ctz(lanes)]);
    if (c->noise_kind != NOISE_NONE) noise_rows(c, first + i, PAIR, f->g, panel, t->noise);
    for (int v = 0; v < VECTORS; v++) {
        const int64_t code = panel * PANEL + v * VX_LANES;
        x[v] = thin_logits(D, t->negative_ref[i], t->a + i * D, f->book.hat + panel * PANEL * D + v * VX_LANES);
        if (code + VX_LANES > c->M) x[v] = thin_pad(x[v], code, c->M);
        if (c->noise_kind != NOISE_NONE) x[v] = vf_exp2(x[v]) * vf_load(t->noise + v * VX_LANES);
        top = vf_max(top, x[v]);
    }
    *value = vf_maximum(top);
    int v = 0;
    while (!(lanes = equal_bits(x[v], *value))) v++;
    return panel * PANEL + v * VX_LANES + __builtin_ctz(lanes);
}

static int64_t find_code(const forward *f, worker *t, int64_t first, int i, float *value)
{
    switch (f->cpu.thin) {
    case 3: return find_thin(3, f, t, first, i, value);
    case 4: return find_thin(4, f, t, first, i, value);
    case 8: return find_thin(8, f, t, first, i, value);
    default: return best_code(t, i, value);
    }
}

/* Writes a block's outputs; returns the sum of its rows' largest p. */
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

/* -- One block of rows: second sweep ------------------------------------------------------------------------------- */

/* Bit m says whether the panel's key m passes its threshold. */
VX_INLINE uint64_t panel_hits(const vf key[VECTORS], const vf limit[VECTORS])
{
    uint64_t hits = 0;
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; v++) hits |= (uint64_t)vf_greater_bits(key[v], limit[v]) << (v * VX_LANES);
    return hits;
}

/* Offers the rows whose keys pass a threshold to the vertices' lists. knn-ce: key = log2 pi = s - log2(sum). knn-l2:
 * key = 2 pi - |pi|^2, which is 1 - distance. */
static void select_rows(const forward *f, worker *t, int64_t first, int rows, int64_t shard)
{
    const smooth_call *c = &f->c;
    const int64_t each = c->K / c->shards;
    float *threshold = t->threshold + shard * c->Mp;
    uint64_t *lists = t->lists + shard * c->S * each;
    const int ce = c->regularizer == VX_REG_KNN_CE;
    float factor[MOST_ROWS], offset[MOST_ROWS];
    for (int i = 0; i < rows; i++) {
        float sum = vf_sum(t->sum[i]);
        factor[i] = ce ? 1 : 2 / sum;
        offset[i] = ce ? -log2f(sum) : -(vf_sum(t->squares[i]) / sum / sum);
    }
    const float *source = ce ? t->s : t->e;
    /* backwards: the panels met last are still in the cache */
    for (int64_t strip = (c->panels - 1) / SELECT_STRIP * SELECT_STRIP; strip >= 0; strip -= SELECT_STRIP)
        for (int i = 0; i < rows; i++)
            for (int64_t panel = strip; panel < vx_min64(strip + SELECT_STRIP, c->panels); panel++) {
                const float *x = source + i * c->Mp + panel * PANEL;
                float *limit = threshold + panel * PANEL, keys[PANEL];
                vf key[VECTORS], least[VECTORS];
#pragma GCC unroll 16
                for (int v = 0; v < VECTORS; v++) {
                    key[v] = vf_load(x + v * VX_LANES) * factor[i] + offset[i];
                    least[v] = vf_load(limit + v * VX_LANES);
                }
                if (!vf_any_greater(VECTORS, key, least)) continue;
                memcpy(keys, key, sizeof keys);
                for (uint64_t hits = panel_hits(key, least); hits; hits &= hits - 1) {
                    int m = __builtin_ctzll(hits);
                    uint64_t *list = lists + f->slot[panel * PANEL + m] * each;
                    limit[m] = neighbour_insert(list, each, neighbour_pack(keys[m], first + i));
                }
            }
}

/* mean += pi of the block's rows */
static void add_mean(const forward *f, const worker *t, int rows, float *mean)
{
    const smooth_call *c = &f->c;
    float inverse[MOST_ROWS];
    for (int i = 0; i < rows; i++) inverse[i] = 1 / vf_sum(t->sum[i]);
    for (int64_t m = 0; m < c->Mp; m += VX_LANES) {
        vf sum = vf_zero();
        for (int i = 0; i < rows; i++) sum += vf_load(t->e + i * c->Mp + m) * inverse[i];
        vf_store(mean + m, vf_load(mean + m) + sum);
    }
}

/* -- All rows of a group ------------------------------------------------------------------------------------------- */

static void forward_part(const forward *f, worker *t, int64_t p)
{
    const part *range = f->parts + p;
    double max_p = 0;
    if (f->mean) memset(f->mean + p * f->c.Mp, 0, sizeof(float) * (size_t)f->c.Mp);
    for (int64_t first = range->first; first < range->end; first += f->block) {
        int rows = (int)vx_min64(f->block, range->end - first);
        load_rows(f, t, first, rows);
        if (f->cpu.thin) sweep_thin(f, t, first, rows);
        else sweep_block(f, t, rows, first);
        max_p += finish_rows(f, t, first, rows);
        if (f->c.K) select_rows(f, t, first, rows, range->shard);
        if (f->mean) add_mean(f, t, rows, f->mean + p * f->c.Mp);
    }
    f->max_p[p] += max_p;
}

static void clear_lists(const forward *f, worker *t)
{
    const smooth_call *c = &f->c;
    for (int64_t i = 0; i < c->S * c->K; i++) t->lists[i] = neighbour_none();
    for (int64_t h = 0; h < (c->K ? c->shards : 0); h++)
        for (int64_t m = 0; m < c->Mp; m++)
            t->threshold[h * c->Mp + m] = m < c->M && f->slot[m] >= 0 ? -INFINITY : INFINITY;
}

/* Merges the threads' lists into near (S,K) of the group; loss[s] is the sum of vertex s's K divergences. */
static void merge_lists(const forward *f, worker *const *workers, int threads, int32_t *near, double *loss)
{
    const smooth_call *c = &f->c;
    const int64_t each = c->K / c->shards;
#pragma omp parallel for schedule(static)
    for (int64_t s = 0; s < c->S; s++) {
        loss[s] = 0;
        for (int64_t h = 0; h < c->shards; h++) {
            uint64_t *list = workers[0]->lists + (h * c->S + s) * each;
            for (int w = 1; w < threads; w++) {
                const uint64_t *other = workers[w]->lists + (h * c->S + s) * each;
                for (int64_t k = 0; k < each && other[k] > list[each - 1]; k++) neighbour_insert(list, each, other[k]);
            }
            for (int64_t k = 0; k < each; k++) {
                double key = neighbour_key(list[k]);
                loss[s] += c->regularizer == VX_REG_KNN_CE ? -LN2 * key : 1 - key;
                near[s * c->K + h * each + k] = (int32_t)neighbour_row(list[k]);
            }
        }
    }
}

/* mean_pi (M) of the group from the parts; returns its entropy. */
static double finish_mean(const forward *f, float *mean_pi)
{
    const smooth_call *c = &f->c;
    double entropy = 0;
    for (int64_t m = 0; m < c->M; m++) {
        double sum = 0;
        for (int64_t p = 0; p < f->part_count; p++) sum += f->mean[p * c->Mp + m];
        sum /= (double)c->N;
        mean_pi[m] = (float)sum;
        if (sum > 0) entropy -= sum * log(sum);
    }
    return entropy;
}

/* Cuts every shard into pieces of whole blocks. Returns their number; parts may be NULL. */
static int64_t cut_parts(const smooth_call *c, int block, part *parts)
{
    int64_t count = 0;
    for (int64_t h = 0; h < c->shards; h++) {
        int64_t first = shard_start(c->N, c->shards, h), end = shard_start(c->N, c->shards, h + 1),
                blocks = vx_ceil_div(end - first, block);
        int64_t pieces = vx_max64(1, vx_min64(blocks, vx_ceil_div(PARTS, c->shards)));
        for (int64_t i = 0; i < pieces; i++, count++)
            if (parts)
                parts[count] = (part){first + i * blocks / pieces * block,
                                      vx_min64(end, first + (i + 1) * blocks / pieces * block), h};
    }
    return count;
}

/* Lays out the working memory in a; count only where a->base is NULL. */
static void carve_forward(smooth_arena *a, forward *f, worker **workers, int threads, int with_mean, double **loss)
{
    const smooth_call *c = &f->c;
    carve_book(a, c, &f->cpu, &f->book, 0);
    f->parts = carve(a, f->part_count, sizeof(part));
    f->max_p = carve(a, f->part_count, sizeof(double));
    f->mean = with_mean ? carve_f32(a, f->part_count * c->Mp) : 0;
    f->slot = carve(a, c->Mp, sizeof(int32_t));
    *loss = carve(a, c->S, sizeof(double));
    for (int i = 0; i < threads; i++) {
        worker *t = carve(a, 1, sizeof *t), nowhere;
        workers[i] = t;
        if (!a->base) t = &nowhere;
        t->a = carve_f32(a, f->block * (f->cpu.thin ? f->cpu.thin : c->D));
        t->s = f->keep_logits ? carve_f32(a, f->block * c->Mp) : 0;
        t->e = !f->keep_powers                                  ? 0
               : c->regularizer == VX_REG_KNN_CE || f->cpu.thin ? carve_f32(a, f->block * c->Mp)
                                                                : t->s;
        t->w = carve_f32(a, BLOCK * PANEL);
        t->pairs = f->cpu.bf16 ? carve_pairs(a, BLOCK * PANEL / 2) : 0;
        t->noise = carve_f32(a, PANEL * (f->cpu.thin ? PAIR * THIN_STRIP : BLOCK));
        t->o = carve_f32(a, f->block * f->cpu.Dp);
        t->lists = carve(a, c->S * c->K, sizeof(uint64_t));
        t->threshold = carve_f32(a, c->K ? c->shards * c->Mp : 0);
    }
}

static void fill_slots(const forward *f)
{
    const smooth_call *c = &f->c;
    for (int64_t m = 0; m < c->Mp; m++) f->slot[m] = c->vertices ? -1 : (int32_t)m;
    for (int64_t s = 0; c->vertices && s < c->S; s++) f->slot[vertex_code(c, f->g, s)] = (int32_t)s;
}

int VX_CPU(smooth_forward)(vx_tensor *y, vx_tensor *codes, vx_tensor *lse, vx_tensor *sumsq, vx_tensor *soft,
                           vx_tensor *near, vx_tensor *mean_pi, vx_tensor *reg, vx_tensor *max_p, vx_tensor *z,
                           vx_tensor *codebook, vx_tensor *log_tau, vx_tensor *noise, vx_tensor *vertices, int sampler,
                           int regularizer, float gumbel_tau, int shards, int precision, uint64_t seed, uint64_t stream)
{
    forward f = {
        .y = vx_f32(y), .lse = vx_f32(lse), .sumsq = vx_f32(sumsq), .soft = vx_f32(soft), .codes = vx_i32(codes)};
    smooth_call *c = &f.c;
    int status = smooth_call_check(c, "smooth_forward", z, codebook, noise, vertices, near, mean_pi, sampler,
                                   regularizer, gumbel_tau, shards, seed, stream);
    if (status) return status;
    float *norms = vx_scratch(c->op, sizeof(float) * (size_t)(c->N * c->G));
    if (!norms) return VX_ENOMEM;
    f.norms = norms;
    status = smooth_cpu_check(&f.cpu, c, log_tau, precision, norms);
    int threads = omp_get_max_threads();
    worker *workers[threads];
    smooth_arena arena = {0};
    double *loss;
    f.block = f.cpu.thin   ? THIN_BLOCK
              : c->D <= 48 ? BLOCK
              : c->D < 128 ? 2 * BLOCK
                           : MOST_ROWS; /* the codes pass through the cache once a block */
    f.keep_logits = regularizer == VX_REG_KNN_CE || !f.cpu.thin;
    f.keep_powers = mean_pi || regularizer == VX_REG_KNN_L2;
    choose_copies(&f);
    if (!status) {
        f.part_count = cut_parts(c, f.block, 0);
        carve_forward(&arena, &f, workers, threads, mean_pi != 0, &loss);
        arena = (smooth_arena){.base = vx_scratch(c->op, arena.used)};
        if (!arena.base) status = VX_ENOMEM;
    }
    if (status) {
        vx_scratch_free(norms);
        return status;
    }
    carve_forward(&arena, &f, workers, threads, mean_pi != 0, &loss);
    cut_parts(c, f.block, f.parts);
    memset(f.max_p, 0, sizeof(double) * (size_t)f.part_count);

    double reg_sum = 0, max_sum = 0;
    for (f.g = 0; f.g < c->G; f.g++) {
        fill_slots(&f);
#pragma omp parallel num_threads(threads)
        {
            unsigned denormals = vx_denormals_off();
            fill_book(c, &f.cpu, &f.book, f.g, 0);
#pragma omp for schedule(static)
            for (int i = 0; i < threads; i++) clear_lists(&f, workers[i]);
#pragma omp for schedule(dynamic, 1)
            for (int64_t p = 0; p < f.part_count; p++) forward_part(&f, workers[omp_get_thread_num()], p);
            vx_denormals_restore(denormals);
        }
        if (c->K) {
            merge_lists(&f, workers, threads, vx_i32(near) + f.g * c->S * c->K, loss);
            double sum = 0;
            for (int64_t s = 0; s < c->S; s++) sum += loss[s];
            reg_sum += sum / (double)(c->S * c->K);
        }
        if (mean_pi) {
            double entropy = finish_mean(&f, vx_f32(mean_pi) + f.g * c->M);
            if (regularizer == VX_REG_PPL) reg_sum += 1 - exp(entropy) / (double)c->M;
        }
    }
    for (int64_t p = 0; p < f.part_count; p++) max_sum += f.max_p[p];
    vx_f32(reg)[0] = (float)(reg_sum / (double)c->G);
    vx_f32(max_p)[0] = (float)(max_sum / (double)(c->N * c->G));
    vx_scratch_free(arena.base);
    vx_scratch_free(norms);
    return VX_OK;
}
