/* forward.c: the smoothed quantizer with softmax and knn-ce forward, from whole arrays to kernels/quantize/smooth.c.
 * run.sh runs it, once for rows of 32 and once for rows of 3.
 *
 *     l_nm = <z_n, q_m> / (|z_n| |q_m| tau), pi = softmax over m, y_n = sum_m pi_nm q_m, code = argmax_m,
 *     and for each code m the K rows with the largest log pi_nm
 *
 * The lesson: the N x M logits need not exist. A block of rows meets all codes while the logits stay in the cache; then
 * the products are the floor at D = 32, and powers and single vector operations at D = 3.
 */
#include "quantize/smooth_narrow.h"
#include "late.h"

/* What a thread works with. The rows a are multiplied by `unit` / tau: 1, or log2(e) where powers of two are taken. */
typedef struct work {
    const float *a, *hat,
        *raw; /* (N,D) rows on the sphere; codes on the sphere in panels; codes as stored, laid out as a step needs */
    float *s, *w, *o; /* logits of a block, weights, mixture */
    lists near;
} work;

/* Looks for the K rows of each code, one logit after the other. */
static void select_by_one(const problem *q, work *w, const float *s, float lse, int64_t n)
{
    for (int64_t m = 0; m < q->M; m++)
        if (s[m] - lse > w->near.least[m]) offer(q, &w->near, m, s[m] - lse, n);
}

/* Adds p (count) codes (count,D) to o (D). */
static void mix_rows(float *o, const float *p, const float *codes, int64_t count, int64_t D)
{
    for (int64_t m = 0; m < count; m++)
        for (int64_t d = 0; d < D; d++) o[d] += p[m] * codes[m * D + d];
}

/* Computes s (M) = a (D) columns (D,M). */
static void row_logits(float *s, const float *a, const float *columns, int64_t M, int64_t D)
{
    memset(s, 0, sizeof(float) * (size_t)M);
    for (int64_t d = 0; d < D; d++)
        for (int64_t m = 0; m < M; m++) s[m] += a[d] * columns[d * M + m];
}

/* Step 1. Whole arrays, one operation after the other, as an array library works: logits, maximum, log-softmax,
 * exponential, product, column-wise top-K. The logits run in long loops, half from the L1 and half from the L2 cache (4
 * G, see assign.c). The mixture runs in short loops over D, whose sums are stored and loaded again for the next code:
 * 12 cycles, in which the peak makes 24 lanes multiply-adds (6 G at D = 32 and 8 lanes). expf of the C library takes
 * about 20 cycles, a power in a vector 4 / lanes (5 lanes E), and there are two; the maximum and the thresholds cost a
 * cycle each. And the arrays pass through memory again and again, 36 bytes an element. */
static void whole_arrays(const problem *q, results *r)
{
    const int64_t N = q->N, D = q->D, M = q->M;
    float *a = on_sphere(q->z, N, D, 10), *hat = on_sphere(q->codebook, M, D, 1), *columns = in_panels(hat, M, D, M);
    float *log_pi = floats(N * M), *pi = floats(N * M);
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) row_logits(log_pi + n * M, a + n * D, columns, M, D);
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        float *l = log_pi + n * M, top = l[0], sum = 0;
        r->codes[n] = 0;
        for (int64_t m = 1; m < M; m++)
            if (l[m] > top) top = l[m], r->codes[n] = (int32_t)m;
        for (int64_t m = 0; m < M; m++) sum += expf(l[m] - top);
        r->lse[n] = top + logf(sum);
        for (int64_t m = 0; m < M; m++) l[m] -= r->lse[n];
    }
#pragma omp parallel for
    for (int64_t i = 0; i < N * M; i++) pi[i] = expf(log_pi[i]);
    memset(r->y, 0, sizeof(float) * (size_t)(N * D));
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) mix_rows(r->y + n * D, pi + n * M, q->codebook, M, D);
    lists near = new_lists(q);
#pragma omp parallel for
    for (int64_t strip = 0; strip < M; strip += PANEL)
        for (int64_t n = 0; n < N; n++)
            for (int64_t m = strip; m < strip + PANEL; m++)
                if (log_pi[n * M + m] > near.least[m]) offer(q, &near, m, log_pi[n * M + m], n);
    finish_lists(q, r, near, 0, 1);
    free(a), free(hat), free(columns), free(log_pi), free(pi);
}

/* Runs `block` for every `rows` rows, with the threads' working memory and lists around it. panel: of hat; raw_panel:
 * of raw, 0 for codes as stored. */
static void by_blocks(const problem *q, results *r, int rows, int64_t panel, int64_t raw_panel, double unit,
                      void (*block)(const problem *, results *, work *, int64_t))
{
    const int threads = omp_get_max_threads();
    lists near[threads];
    float *sphere = on_sphere(q->codebook, q->M, q->D, 1), *a = on_sphere(q->z, q->N, q->D, unit / 0.1);
    float *hat = in_panels(sphere, q->M, q->D, panel),
          *raw = in_panels(q->codebook, q->M, q->D, raw_panel ? raw_panel : 1);
#pragma omp parallel num_threads(threads)
    {
        work w = {a,           hat, raw, floats(rows * q->M), floats(rows * q->M), floats(rows * (q->D + VX_LANES)),
                  new_lists(q)};
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < q->N; n += rows) block(q, r, &w, n);
        near[omp_get_thread_num()] = w.near;
        free(w.s), free(w.w), free(w.o);
    }
    finish_lists(q, r, merge_lists(q, near, threads), 0, unit);
    free(sphere), free(a), free(hat), free(raw);
}

/* Step 2. One row at a time: its M logits (16 KB at M = 4,096) stay in the cache through all that is done with them.
 * The passes over memory are gone, and one of the two expf: pi is the power over the sum. */
static void one_row(const problem *q, results *r, work *w, int64_t n)
{
    float *s = w->s, *e = w->w, *y = r->y + n * q->D, sum = 0;
    row_logits(s, w->a + n * q->D, w->hat, q->M, q->D);
    int64_t top = 0;
    for (int64_t m = 1; m < q->M; m++)
        if (s[m] > s[top]) top = m;
    for (int64_t m = 0; m < q->M; m++) e[m] = expf(s[m] - s[top]), sum += e[m];
    memset(y, 0, sizeof(float) * (size_t)q->D);
    mix_rows(y, e, w->raw, q->M, q->D);
    for (int64_t d = 0; d < q->D; d++) y[d] /= sum;
    r->codes[n] = (int32_t)top;
    r->lse[n] = s[top] + logf(sum);
    select_by_one(q, w, s, r->lse[n], n);
}

static void row_by_row(const problem *q, results *r) { by_blocks(q, r, 1, q->M, 0, 1, one_row); }

/* What a row's panels add up, lane by lane. */
typedef struct row_sums {
    vf sum, best;
    vi code;
} row_sums;

/* Computes e = 2^s for a panel of a row, their sum, and the largest logit with its code. */
VX_INLINE void weigh_panel(row_sums *row, const float *s, float *e, int64_t first_code)
{
    vi code;
    for (int l = 0; l < VX_LANES; l++) code[l] = (int32_t)first_code + l;
    for (int v = 0; v < PANEL; v += 4 * VX_LANES) {
        vf x[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            x[j] = vf_load(s + v + j * VX_LANES);
            row->code = vi_where_greater(x[j], row->best, code + v + j * VX_LANES, row->code);
            row->best = vf_max(x[j], row->best);
        }
        vf_exp2_many(4, x);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            row->sum += x[j];
            vf_store(e + v + j * VX_LANES, x[j]);
        }
    }
}

/* Writes y, code and lse of a row from what it added up; o is its mixture before the division. Returns log2 of its
 * sum. */
static float finish_row(const problem *q, results *r, const row_sums *row, const float *o, int64_t n)
{
    const float sum = vf_sum(row->sum);
    int at = 0;
    for (int l = 1; l < VX_LANES; l++)
        if (row->best[l] > row->best[at] || (row->best[l] == row->best[at] && row->code[l] < row->code[at])) at = l;
    r->codes[n] = row->code[at];
    r->lse[n] = logf(sum);
    for (int64_t d = 0; d < q->D; d++) r->y[n * q->D + d] = o[d] / sum;
    return log2f(sum);
}

/* Step 3. Powers as vectors: 2^x by a polynomial of degree 5, four vectors side by side, with log2(e) / tau folded into
 * the rows. A logit is at most 1 / tau = 10, so no maximum is needed before (the library sees to smaller temperatures).
 * E, and as much again for the maximum, its code and the sum (4 O); the products stay as they were. */
static void row_with_vector_powers(const problem *q, results *r, work *w, int64_t n)
{
    row_sums row = {.best = vf_set1(-INFINITY)};
    row_logits(w->s, w->a + n * q->D, w->hat, q->M, q->D);
    for (int64_t m = 0; m < q->M; m += PANEL) weigh_panel(&row, w->s + m, w->w + m, m);
    memset(w->o, 0, sizeof(float) * (size_t)q->D);
    mix_rows(w->o, w->w, w->raw, q->M, q->D);
    select_by_one(q, w, w->s, finish_row(q, r, &row, w->o, n), n);
}

static void vector_powers(const problem *q, results *r) { by_blocks(q, r, 1, q->M, 0, LOG2E, row_with_vector_powers); }

/* Lets 24 rows meet the codes panel by panel: the first sweep leaves the logits in s (24,M), 384 KB in the L2 cache.
 * Both products are assign.c's register tile (row_tile.h has it as `tile_multiply`, smooth.h around it). */
static void sweep_tiles(const problem *q, results *r, work *w, int64_t n, float log_sum[PANEL_ROWS])
{
    const int64_t Dp = vx_ceil_div(q->D, VX_LANES) * VX_LANES;
    static const float zero[PANEL_ROWS];
    row_sums row[PANEL_ROWS];
    float raw[PANEL * Dp], e[PANEL_ROWS * PANEL];
    for (int i = 0; i < PANEL_ROWS; i++) row[i] = (row_sums){.best = vf_set1(-INFINITY)};
    memset(raw, 0, sizeof raw);
    memset(w->o, 0, sizeof(float) * (size_t)(PANEL_ROWS * Dp));
    for (int64_t m = 0; m < q->M; m += PANEL) {
        tile_logits(w->s + m, q->M, PANEL_ROWS, zero, w->a + n * q->D, q->D, w->hat + m * q->D, q->D);
        for (int i = 0; i < PANEL_ROWS; i++) weigh_panel(row + i, w->s + i * q->M + m, e + i * PANEL, m);
        if (Dp != q->D)
            for (int64_t j = 0; j < PANEL; j++)
                memcpy(raw + j * Dp, w->raw + (m + j) * q->D, sizeof(float) * (size_t)q->D);
        tile_mix(w->o, PANEL_ROWS, e, Dp == q->D ? w->raw + m * q->D : raw, Dp);
    }
    for (int i = 0; i < PANEL_ROWS; i++) log_sum[i] = finish_row(q, r, row + i, w->o + i * Dp, n + i);
}

/* Step 4. Tiles, 2 G at last. The selection of neighbours, one cycle a logit, is now what stands out: 2 lanes O. */
static void block_by_tiles(const problem *q, results *r, work *w, int64_t n)
{
    float log_sum[PANEL_ROWS];
    sweep_tiles(q, r, w, n, log_sum);
    for (int i = 0; i < PANEL_ROWS; i++) select_by_one(q, w, w->s + i * q->M, log_sum[i], n + i);
}

static void tiles(const problem *q, results *r) { by_blocks(q, r, PANEL_ROWS, PANEL, 0, LOG2E, block_by_tiles); }

/* Compares a block's logits with the codes' thresholds, a panel at a time: one subtraction and one comparison a vector,
 * and one branch for 64 keys. Of N rows about K (1 + ln(N / K)) pass: 1 in 100. */
VX_INLINE void select_by_panels(const problem *q, work *w, int rows, const float *log_sum, int64_t n)
{
    for (int64_t strip = 0; strip < q->M; strip += 16 * PANEL) /* whose thresholds stay in the L1 cache */
        for (int i = 0; i < rows; i++)
            for (int64_t m = strip; m < vx_min64(strip + 16 * PANEL, q->M); m += PANEL) {
                vf key[VECTORS], least[VECTORS];
#pragma GCC unroll 16
                for (int v = 0; v < VECTORS; v++) {
                    key[v] = vf_load(w->s + i * q->M + m + v * VX_LANES) - log_sum[i];
                    least[v] = vf_load(w->near.least + m + v * VX_LANES);
                }
                if (!vf_any_greater(VECTORS, key, least)) continue;
                for (int v = 0; v < VECTORS; v++)
                    for (uint32_t hits = vf_greater_bits(key[v], least[v]); hits; hits &= hits - 1) {
                        int l = __builtin_ctz(hits);
                        offer(q, &w->near, m + v * VX_LANES + l, key[v][l], n + i);
                    }
            }
}

/* Step 5. The same with the thresholds compared as vectors: F, and O for the subtraction. */
static void block_with_filter(const problem *q, results *r, work *w, int64_t n)
{
    float log_sum[PANEL_ROWS];
    sweep_tiles(q, r, w, n, log_sum);
    select_by_panels(q, w, PANEL_ROWS, log_sum, n);
}

static void filter(const problem *q, results *r) { by_blocks(q, r, PANEL_ROWS, PANEL, 0, LOG2E, block_with_filter); }

/* Step 6, rows of 3 only. A tile's product of depth 3 loads and stores more than it multiplies, and a mixture of 3
 * numbers fills 3 of 8 lanes. So vectors run over codes throughout: a row's numbers are broadcast, its mixture is
 * summed lane by lane in 3 registers. A logit costs 3 multiply-adds, a power 13 operations (E), the rest 3 (maximum,
 * sum, and the choice of the code) and the mixture 3: 2 G + E + 3 O. */
static void row_of_vectors(const problem *q, results *r, work *w, int64_t n, float *s, float *log_sum)
{
    const float *a = w->a + n * 3;
    row_sums row = {.best = vf_set1(-INFINITY)};
    vf o[3] = {{0}};
    for (int64_t m = 0; m < q->M; m += VX_LANES) {
        const float *hat = w->hat + m / PANEL * PANEL * 3 + m % PANEL,
                    *raw = w->raw + m / PANEL * PANEL * 3 + m % PANEL;
        vi code;
        for (int l = 0; l < VX_LANES; l++) code[l] = (int32_t)m + l;
        vf x = vf_load(hat) * a[0] + vf_load(hat + PANEL) * a[1] + vf_load(hat + 2 * PANEL) * a[2];
        vf_store(s + m, x);
        row.code = vi_where_greater(x, row.best, code, row.code);
        row.best = vf_max(x, row.best);
        x = vf_exp2(x);
        row.sum += x;
        for (int d = 0; d < 3; d++) o[d] += x * vf_load(raw + d * PANEL);
    }
    const float mixed[3] = {vf_sum(o[0]), vf_sum(o[1]), vf_sum(o[2])};
    *log_sum = finish_row(q, r, &row, mixed, n);
}

static void block_of_vectors(const problem *q, results *r, work *w, int64_t n)
{
    float log_sum[NARROW_BLOCK];
    for (int i = 0; i < NARROW_BLOCK; i++) row_of_vectors(q, r, w, n + i, w->s + i * q->M, log_sum + i);
    select_by_panels(q, w, NARROW_BLOCK, log_sum, n);
}

static void vectors_over_codes(const problem *q, results *r)
{
    by_blocks(q, r, NARROW_BLOCK, PANEL, PANEL, LOG2E, block_of_vectors);
}

/* Step 7, rows of 3 only. Step 6 is one chain of 20 dependent operations a vector, and the processor looks about 10
 * vectors ahead. Here a panel passes through three short loops (logits, powers, use) with 64 numbers in between, two
 * rows at a time, and only the panel of the best logit is remembered, not its code. The arithmetic is the same but for
 * the choice of the code. smooth_narrow.h has the loops. */
static void block_of_pairs(const problem *q, results *r, work *w, int64_t n)
{
    float log_sum[NARROW_BLOCK];
    static const float zero[NARROW_ROWS];
    for (int i = 0; i < NARROW_BLOCK; i += NARROW_ROWS) {
        const float *a = w->a + (n + i) * 3;
        narrow_row state[NARROW_ROWS] = {{.best = vf_set1(-INFINITY)}, {.best = vf_set1(-INFINITY)}};
        const narrow_strip all = {.a = a,
                                  .start = zero,
                                  .hat = w->hat,
                                  .raw = w->raw,
                                  .end = q->M / PANEL,
                                  .M = q->M,
                                  .s = w->s + i * q->M,
                                  .ld = q->M};
        narrow_forward(3, 0, KEEP_S, 0, state, &all);
        for (int j = 0; j < NARROW_ROWS; j++) {
            const float *s = w->s + (i + j) * q->M, top = vf_maximum(state[j].best);
            const float mixed[3] = {vf_sum(state[j].o[0]), vf_sum(state[j].o[1]), vf_sum(state[j].o[2])};
            row_sums row = {.sum = state[j].sum};
            int64_t panel = INT32_MAX;
            for (int l = 0; l < VX_LANES; l++)
                if (state[j].best[l] == top) panel = vx_min64(panel, state[j].best_panel[l]);
            log_sum[i + j] = finish_row(q, r, &row, mixed, n + i + j);
            int64_t code = panel * PANEL;
            while (s[code] != top) code++;
            r->codes[n + i + j] = (int32_t)code;
        }
    }
    select_by_panels(q, w, NARROW_BLOCK, log_sum, n);
}

static void short_loops(const problem *q, results *r)
{
    by_blocks(q, r, NARROW_BLOCK, PANEL, PANEL, LOG2E, block_of_pairs);
}

/* -- Late in training: rows near codes, tau small, D = 3 -------------------------------------------------------------
 *
 * A logit may be 1 / tau = 333, so that a row's reference is subtracted before powers are taken; and all codes whose
 * logit is 28 + log2 M = 41 bits below the largest together leave the row's sums as they are. Keys count too: a pair of
 * row and code that never met has a key below -40, which a code that few rows are near may need (meet_lonely()). */

/* What a step does with a row. */
typedef struct way {
    int everything; /* it meets all cells; else those in reach of it and its block, */
    int block;      /* of so many rows, */
    int in_order;   /* which come in the order of their nearest cells */
    int keys;       /* a cell's keys are looked at only if its largest may pass its least threshold */
    int groups;     /* boxes are looked at only where the box of 16 of them is in reach; a block is one row */
} way;

/* What threads share, and what each of them works with. */
typedef struct late_forward {
    const problem *q;
    results *r;
    late l;
    float *ref, *log_sum; /* (N) what is subtracted from a row's logits; log2 of the sum of the powers that are left */
} late_forward;

typedef struct late_work {
    lists near;       /* codes by place */
    float *least;     /* (cells) the least threshold */
    float *s;         /* (cells, 64) the row's logits with what it meets, */
    vf *top;          /* (cells) and the largest of them, lane by lane */
    int32_t *list;    /* (cells) what it meets */
    uint8_t *within;  /* (cells) what its block meets */
    float *far, *box; /* distances from groups and cells */
} late_work;

/* Lists the cells for `count` rows; fills in their references. Returns how many cells. A row's reach follows from a
 * lower bound of its largest logit: the largest in its nearest cell. */
static int64_t list_for(late_forward *f, late_work *w, const way *how, const int32_t *row, int64_t first)
{
    const late *l = &f->l;
    const int64_t cells = l->near.cells.cell.count;
    int64_t count = 0;
    float limits[NARROW_BLOCK];
    memset(w->within, 0, (size_t)cells);
    for (int i = 0; i < how->block; i++) {
        const int64_t n = row ? row[first + i] : first + i;
        int64_t nearest;
        if (how->groups) {
            const int64_t home =
                nearest_box(3, &l->near.cells.group, 0, l->near.cells.group.padded, l->u + n * 3, w->far);
            nearest = nearest_box(3, &l->near.cells.cell, home * GROUP, GROUP, l->u + n * 3, w->box);
        } else nearest = look_at_boxes(l, n, w->box);
        const float largest = largest_of_cell(l, n, nearest);
        f->ref[n] = ceilf(largest);
        limits[i] = reach(l, n, largest);
        if (how->groups) return list_cells(3, &l->near, l->u + n * 3, w->far, limits[i], w->list);
        for (int64_t j = 0; j < cells; j++) w->within[j] |= w->box[j] <= limits[i];
    }
    for (int64_t j = 0; j < cells; j++)
        if (w->within[j]) w->list[count++] = (int32_t)j;
    return count;
}

/* Lets row n meet the listed cells, in the short loops of step 7: y, lse and code. */
static void meet_cells(const late_forward *f, late_work *w, int64_t n, int64_t count)
{
    const float *a = f->l.a + n * 3;
    float power[PANEL], mixed[3];
    vf sum = vf_zero(), o[3] = {{0}}, best = vf_set1(-INFINITY);
    for (int64_t j = 0; j < count; j++) {
        const float *hat = f->l.hat + w->list[j] * PANEL * 3, *raw = f->l.raw + w->list[j] * PANEL * 3;
        vf top = vf_set1(-INFINITY);
#pragma GCC unroll 16
        for (int v = 0; v < PANEL; v += VX_LANES) {
            const vf x = narrow_logits(3, -f->ref[n], a, hat + v);
            top = vf_max(top, x);
            vf_store(w->s + j * PANEL + v, x);
        }
        best = vf_max(best, top), w->top[j] = top;
        narrow_powers(power, w->s + j * PANEL);
#pragma GCC unroll 16
        for (int v = 0; v < PANEL; v += VX_LANES) {
            const vf x = vf_load(power + v);
            sum += x;
            for (int d = 0; d < 3; d++) o[d] += x * vf_load(raw + d * PANEL + v);
        }
    }
    const float most = vf_maximum(best);
    row_sums row = {.sum = sum, .code = (vi){0} + INT32_MAX};
    for (int64_t j = 0; j < count; j++) {
        if (vf_maximum(w->top[j]) < most) continue;
        for (int i = 0; i < PANEL; i++) { /* the lowest code of equals */
            const int32_t m = f->l.near.cells.code[w->list[j] * PANEL + i];
            if (w->s[j * PANEL + i] == most && m < row.code[0]) row.code[0] = m;
        }
    }
    row.best = vf_set1(most);
    for (int d = 0; d < 3; d++) mixed[d] = vf_sum(o[d]);
    f->log_sum[n] = finish_row(f->q, f->r, &row, mixed, n);
    f->r->lse[n] += f->ref[n] * (float)LN2;
}

/* Offers row n to the listed cells' codes. */
static void select_in_cells(const late_forward *f, late_work *w, const way *how, int64_t n, int64_t count)
{
    const float log_sum = f->log_sum[n];
    for (int64_t j = 0; j < count; j++) {
        const int64_t cell = w->list[j];
        if (how->keys && !vf_greater_bits(w->top[j] - log_sum, vf_set1(w->least[cell]))) continue;
        vf key[VECTORS], least[VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) {
            key[v] = vf_load(w->s + j * PANEL + v * VX_LANES) - log_sum;
            least[v] = vf_load(w->near.least + cell * PANEL + v * VX_LANES);
        }
        if (!vf_any_greater(VECTORS, key, least)) continue;
        vf low = vf_set1(INFINITY);
        for (int v = 0; v < VECTORS; v++) {
            for (uint32_t hits = vf_greater_bits(key[v], least[v]); hits; hits &= hits - 1) {
                const int i = __builtin_ctz(hits);
                offer(f->q, &w->near, cell * PANEL + v * VX_LANES + i, key[v][i], n);
            }
            low = vf_min(low, vf_load(w->near.least + cell * PANEL + v * VX_LANES));
        }
        w->least[cell] = -vf_maximum(-low);
    }
}

/* Lets all rows meet the codes of which an unmet row might be a neighbour. */
static void meet_lonely(const late_forward *f, lists *near)
{
    const problem *q = f->q;
#pragma omp parallel for schedule(dynamic, 64)
    for (int64_t place = 0; place < q->M; place++) {
        const float *hat = f->l.points + f->l.near.cells.code[place] * 3;
        if (near->least[place] > 1 - (float)near_bits(q->M)) continue;
        for (int64_t k = 0; k < q->K; k++) near->entries[place * q->K + k] = neighbour_none();
        near->least[place] = -INFINITY;
        for (int64_t n = 0; n < q->N; n++) {
            const float *a = f->l.a + n * 3,
                        key = a[0] * hat[0] + a[1] * hat[1] + a[2] * hat[2] - f->ref[n] - f->log_sum[n];
            if (key > near->least[place]) offer(q, near, place, key, n);
        }
    }
}

static void meet_late(const problem *q, results *r, way how)
{
    const int threads = omp_get_max_threads();
    late_forward f = {.q = q, .r = r, .l = new_late(q), .ref = floats(q->N), .log_sum = floats(q->N)};
    const int64_t cells = f.l.near.cells.cell.count;
    int32_t *row = how.in_order ? rows_by_cell(q, &f.l) : 0;
    lists near[threads];
#pragma omp parallel num_threads(threads)
    {
        late_work w = {.near = new_lists(q),
                       .least = floats(cells),
                       .s = floats(q->M),
                       .top = (vf *)floats(cells * VX_LANES),
                       .list = take(cells + GROUP, sizeof(int32_t)),
                       .within = take(cells, 1),
                       .far = floats(f.l.near.cells.group.padded),
                       .box = floats(f.l.near.cells.cell.padded)};
        for (int64_t j = 0; j < cells; j++) w.least[j] = -INFINITY, w.list[j] = (int32_t)j;
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < q->N; n += NARROW_BLOCK) {
            if (how.everything) narrow_maxima(3, f.l.a + n * 3, f.l.hat, q->M, f.ref + n);
            for (int64_t b = n; b < n + NARROW_BLOCK; b += how.block) {
                const int64_t count = how.everything ? cells : list_for(&f, &w, &how, row, b);
                for (int64_t i = b; i < b + how.block; i++) {
                    meet_cells(&f, &w, row ? row[i] : i, count);
                    select_in_cells(&f, &w, &how, row ? row[i] : i, count);
                }
            }
        }
        near[omp_get_thread_num()] = w.near;
        free(w.least), free(w.s), free(w.top), free(w.list), free(w.within), free(w.far), free(w.box);
    }
    lists all = merge_lists(q, near, threads);
    for (int64_t m = 0; m < q->M; m++) all.least[m] = neighbour_key(all.entries[(m + 1) * q->K - 1]);
    meet_lonely(&f, &all);
    finish_lists(q, r, all, f.l.near.cells.code, LOG2E);
    free(row), free(f.ref), free(f.log_sum), free_late(&f.l);
}

/* Step 8. Nothing is left out. The largest logit of a row is sought first: G and O beside what step 7 takes. Below, of
 * 128 cells a row has 12 in reach at tau 0.003, and all of them at 0.1: s is 0.09 and 1. */
static void largest_first(const problem *q, results *r) { meet_late(q, r, (way){.everything = 1, .block = 1}); }

/* Step 9. Boxes: 18 operations for a box of 64 codes, 0.28 O, and a block of 8 rows meets what one of them needs. Rows
 * come as they are, 8 from anywhere, and together need p of all: six times the s that each of them needs. */
static void blocks_of_rows(const problem *q, results *r) { meet_late(q, r, (way){.block = NARROW_BLOCK}); }

/* Step 10. Rows in the order of their nearest cells, so that the rows of a block need the same: q, little more than s.
 * The order costs a look at all boxes more, and at tau 0.1, where it saves nothing, half of step 9's time: rows and
 * their results are then all over memory. */
static void rows_in_order(const problem *q, results *r)
{
    meet_late(q, r, (way){.block = NARROW_BLOCK, .in_order = 1});
}

/* Step 11. What do blocks save? Nothing: a cell serves one row as well as eight, since both are in the L1 cache. So
 * each row has a list of its own, and no order is needed. It takes more than three times what is predicted, as does all
 * that follows: what a row does for itself is no multiple of N M. Two nearest boxes, one found after the other, a list
 * whose length no processor foresees, sums across lanes: some 2,000 cycles a row, 15 of the 36 ms, as much as with a
 * tau of 0.0001 and two cells a row. And a dozen cells do not fill the pipeline as 128 do: each takes twice as long. */
static void own_lists(const problem *q, results *r) { meet_late(q, r, (way){.block = 1}); }

/* Step 12. The keys of a cell need a look only where the largest may pass the least of its codes' thresholds: an
 * operation a cell in the place of F and O. Little comes of it before lists are full, and with 4 rows a code and 8
 * neighbours that takes until the end; at tau 0.1 it is a tenth. */
static void keys_by_cell(const problem *q, results *r) { meet_late(q, r, (way){.block = 1, .keys = 1}); }

/* Step 13. Boxes of 16 boxes, as in assign.c: of 128 boxes 8 are looked at, and then those of the groups in reach. */
static void boxes_of_boxes(const problem *q, results *r) { meet_late(q, r, (way){.block = 1, .keys = 1, .groups = 1}); }

/* Step 14. kernels/quantize/smooth.c. At rows of 3 it also sees to it that a strip of panels serves eight rows, two at
 * a time, from the L1 cache. Late in training it is step 13, and step 7 or 8 where boxes do not pay. */
static void library(const problem *q, results *r)
{
    const int64_t N = q->N, D = q->D, M = q->M, K = q->K;
    vx_tensor *y = tensor(VX_F32, N, 1, D, 0), *codes = tensor(VX_I32, N, 1, 0, 0), *lse = tensor(VX_F32, N, 1, 2, 0);
    vx_tensor *sumsq = tensor(VX_F32, N, 1, 0, 0), *near = tensor(VX_I32, 1, M, K, 0),
              *reg = tensor(VX_F32, 1, 0, 0, 0);
    vx_tensor *max_p = tensor(VX_F32, 1, 0, 0, 0), *z = tensor(VX_F32, N, 1, D, q->z);
    vx_tensor *codebook = tensor(VX_F32, 1, M, D, q->codebook), *log_tau = tensor(VX_F32, 1, 0, 0, q->log_tau);
    must(vx_smooth_forward(y, codes, lse, sumsq, 0, near, 0, reg, max_p, z, codebook, log_tau, 0, 0, VX_SOFTMAX,
                           VX_REG_KNN_CE, 1, 1, VX_F32, 0, 0));
    read_out(y, r->y), read_out(codes, r->codes), read_out(near, r->near), read_out(reg, &r->reg);
    float *both = floats(2 * N);
    read_out(lse, both);
    for (int64_t n = 0; n < N; n++) r->lse[n] = both[2 * n];
    free(both);
    read_out(sumsq, 0), read_out(max_p, 0), read_out(z, 0), read_out(codebook, 0), read_out(log_tau, 0);
}

static void prepare(const problem *q, solution *exact, results *r, double share[3])
{
    (void)r;
    reference_forward(q, exact);
    if (q->D != 3) return;
    late l = new_late(q);
    float *squares = floats(l.near.cells.cell.padded), *largest = floats(q->N);
    for (int64_t n = 0; n < q->N; n++) largest[n] = largest_of_cell(&l, n, look_at_boxes(&l, n, squares));
    count_shares(q, &l, NARROW_BLOCK, largest, share);
    free(squares), free(largest), free_late(&l);
}

static double check(const problem *q, solution *exact, const results *r, char *text)
{
    double gap, worst = 0;
    worst = worse(relative_error(r->y, exact->y, q->N * q->D), 1e-5, "y", worst, text);
    worst = worse(relative_error(r->lse, exact->lse, q->N), 1e-5, "lse", worst, text);
    worst = worse(relative_error(&r->reg, &exact->reg, 1), 5e-5, "reg", worst, text);
    if (assignments_differ(q, r->codes, 1, &gap)) worst = worse(gap, 1e-6, "near tie", worst, text);
    if (neighbours_differ(q, exact, r->near, &gap)) /* a key is a difference of logits as large as 1 / tau */
        worst = worse(gap, fmax(1e-5, 0x1p-23 / exp((double)*q->log_tau)), "near tie", worst, text);
    return worst;
}

static const step steps[] = {
    {"whole arrays", whole_arrays, .g = 10, .e = 10 * VX_LANES, .o = 4 * VX_LANES, .b = 36, .least = 1, .most = 1024},
    {"row by row", row_by_row, .g = 10, .e = 5 * VX_LANES, .o = 4 * VX_LANES, .least = 1, .most = 1024},
    {"powers as vectors", vector_powers, .g = 10, .e = 1, .o = 4 + 2 * VX_LANES, .least = 1, .most = 1024},
    {"tiles", tiles, .g = 2, .e = 1, .o = 4 + 2 * VX_LANES, .least = 1, .most = 1024},
    {"thresholds as vectors", filter, .g = 2, .e = 1, .f = 1, .o = 5, .least = 1, .most = 1024},
    {"vectors over codes", vectors_over_codes, .g = 2, .e = 1, .f = 1, .o = 5, .least = 3, .most = 3},
    {"three short loops", short_loops, .g = 2, .e = 1, .f = 1, .o = 3, .least = 3, .most = 3},
    {"largest first", largest_first, .g = 3, .e = 1, .f = 1, .o = 4, .least = 3, .most = 3, .when = LATE},
    {"boxes, blocks of rows", blocks_of_rows, .g = 2, .e = 1, .f = 1, .o = 3, .share = 'p', .fixed = 0.3, .least = 3,
     .most = 3, .when = LATE},
    {"rows in order", rows_in_order, .g = 2, .e = 1, .f = 1, .o = 3, .share = 'q', .fixed = 0.6, .least = 3, .most = 3,
     .when = LATE},
    {"a list for each row", own_lists, .g = 2, .e = 1, .f = 1, .o = 3, .share = 's', .fixed = 0.4, .least = 3,
     .most = 3, .when = LATE},
    {"keys by cell", keys_by_cell, .g = 2, .e = 1, .o = 2, .share = 's', .fixed = 0.4, .least = 3, .most = 3,
     .when = LATE},
    {"boxes of boxes", boxes_of_boxes, .g = 2, .e = 1, .o = 2, .share = 's', .fixed = 0.2, .least = 3, .most = 3,
     .when = LATE},
    {"the library", library, .g = 2, .e = 1, .f = 1, .o = 3, .least = 1, .most = 1024},
    {"the library", library, .g = 2, .e = 1, .o = 2, .share = 's', .fixed = 0.2, .least = 3, .most = 3, .when = LATE},
};

int main(int argc, char **argv)
{
    static const lab l = {"Smoothed quantizer, softmax and knn-ce, forward",
                          steps,
                          sizeof steps / sizeof *steps,
                          .g = 2,
                          .e = 1,
                          .f = 1,
                          .prepare = prepare,
                          .check = check};
    return run_lab(&l, argc, argv);
}
