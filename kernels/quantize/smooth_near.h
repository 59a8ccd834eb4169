/* smooth_near.h: smooth.c's forward pass for narrow rows that meet only the cells of codes near them (cells.h), where
 * tau is so small that the other codes have no part in any float32; smooth_cells.h says which they are.
 *
 * The K nearest rows of the vertices are the same as if every row had met every vertex:
 *   knn-ce  A pair (row, vertex) that has not met has a key below -BITS + 1, for a row's sum is not less than its
 *           largest power. Where the K-th key of a vertex is not above that, all rows meet it after all: such vertices
 *           are put into panels of their own (sweep_lonely()). They are those that no rows, or hardly any, are near.
 *   knn-l2  A pair that has not met has the key 2 pi - |pi|^2 = -|pi|^2 in float32: |pi|^2 >= 1 / M, and 2 pi is less
 *           than a half of its last bit. So the rows with the least |pi|^2, the leaders, are offered to every vertex:
 *           2 K of them suffice, since no more than K can be in its list already. One that is not in the list although
 *           it met the vertex would have had a larger key then, and was too small.
 */
#ifndef VX_SMOOTH_NEAR_H
#define VX_SMOOTH_NEAR_H

#include "smooth_select.h"

/* Computes the logits x of a row a (D) with a cell, from `start`; padding's are PADDING. */
VX_INLINE void cell_logits(const int D, const near_codes *n, float start, const float *a, int64_t cell, vf x[VECTORS])
{
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; v++) x[v] = narrow_logits(D, start, a, n->hat + cell * PANEL * D + v * VX_LANES);
    for (int v = 0; (cell + 1) * PANEL > n->M && v < VECTORS; v++)
        x[v] = narrow_pad(x[v], cell * PANEL + v * VX_LANES, n->M);
}

/* Returns a lower bound of the largest logit of the row u, a = u scale (D): that of its nearest cell. Fills far (padded
 * groups) with its distances from the groups. */
VX_INLINE float near_largest(const int D, const near_codes *n, const float *u, const float *a, float *far)
{
    float squares[GROUP];
    const int64_t home = nearest_box(D, &n->cells.group, 0, n->cells.group.padded, u, far);
    vf x[VECTORS];
    cell_logits(D, n, 0, a, nearest_box(D, &n->cells.cell, home * GROUP, GROUP, u, squares), x);
    for (int v = 1; v < VECTORS; v++) x[0] = vf_max(x[0], x[v]);
    return vf_maximum(x[0]);
}

/* -- A row --------------------------------------------------------------------------------------------------------- */

/* Lets row a (D) meet the listed cells, and adds up what row accumulates. Fills top (count) with the largest logits
 * lane by lane, and where keep has KEEP_E e (count, 64) with the powers. As in narrow_forward() short loops with a
 * buffer in between. tail: the cell has padding. */
VX_INLINE void near_forward(const int D, const int keep, const int tail, const forward *f, float start, const float *a,
                            const int32_t *list, int64_t count, float *e, vf *top, narrow_row *row)
{
    _Alignas(64) float buffer[PANEL];
    vf sum = row->sum, squares = row->squares, o[NARROW_MAX];
#pragma GCC unroll 8
    for (int d = 0; d < D; d++) o[d] = row->o[d];
    for (int64_t j = 0; j < count; j++) {
        const int64_t cell = list[j];
        const float *q = f->codebook.hat + cell * PANEL * D, *values = f->codebook.raw + cell * PANEL * D;
        float *power = keep & KEEP_E ? e + j * PANEL : buffer;
        vf most = vf_set1(-INFINITY);
#pragma GCC unroll 16
        for (int v = 0; v < PANEL; v += VX_LANES) {
            vf x = narrow_logits(D, start, a, q + v);
            if (tail) x = narrow_pad(x, cell * PANEL + v, f->c.M);
            most = vf_max(most, x);
            vf_store(power + v, x);
        }
        top[j] = most;
        narrow_powers(power, power);
#pragma GCC unroll 4
        for (int v = 0; v < PANEL; v += VX_LANES) {
            const vf x = vf_load(power + v);
            sum += x;
            if (keep & ADD_SQUARES) squares += x * x;
#pragma GCC unroll 8
            for (int d = 0; d < D; d++) o[d] += x * vf_load(values + d * PANEL + v);
        }
    }
    row->sum = sum, row->squares = squares;
#pragma GCC unroll 8
    for (int d = 0; d < D; d++) row->o[d] = o[d];
}

/* near_forward() for every combination of its constants, each a function of its own (smooth_sweep.h says why). */
#define FOR_ALL_NEAR(f)                                                                                                \
    f(3, 0) f(3, KEEP_E) f(3, ADD_SQUARES) f(3, KEEP_E_SQUARES) f(4, 0) f(4, KEEP_E) f(4, ADD_SQUARES)                 \
        f(4, KEEP_E_SQUARES) f(8, 0) f(8, KEEP_E) f(8, ADD_SQUARES) f(8, KEEP_E_SQUARES)
#define DEFINE_NEAR(D, keep)                                                                                           \
    static void near_##D##keep(const forward *f, float start, const float *a, const int32_t *list, int64_t count,      \
                               float *e, vf *top, narrow_row *row)                                                     \
    {                                                                                                                  \
        near_forward(D, keep, 0, f, start, a, list, count, e, top, row);                                               \
    }                                                                                                                  \
    static void near_tail_##D##keep(const forward *f, float start, const float *a, const int32_t *list, int64_t count, \
                                    float *e, vf *top, narrow_row *row)                                                \
    {                                                                                                                  \
        near_forward(D, keep, 1, f, start, a, list, count, e, top, row);                                               \
    }
FOR_ALL_NEAR(DEFINE_NEAR)

static near_function *near_copy(int D, int keep, int tail)
{
#define CHOOSE_NEAR(D_, keep_)                                                                                         \
    if (D == D_ && keep == keep_) return tail ? near_tail_##D_##keep_ : near_##D_##keep_;
    FOR_ALL_NEAR(CHOOSE_NEAR)
    return 0;
}

/* Loads row n of the group on the sphere into u (D), and times scale into a (D). Returns |u|^2. */
VX_INLINE float load_near(const int D, const forward *f, int64_t n, float *u, float *a)
{
    const smooth_call *c = &f->c;
    const int64_t row = n * c->G + f->g;
    float square = 0;
#pragma GCC unroll 8
    for (int d = 0; d < D; d++) {
        u[d] = d < c->D ? c->z[row * c->D + d] / f->norms[row] : 0;
        a[d] = u[d] * f->cpu.scale;
        square += u[d] * u[d];
    }
    return square;
}

/* Lists the cells that row n meets. Returns their number. */
VX_INLINE int64_t trial_row(const int D, const forward *f, worker *t, int64_t n)
{
    float u[NARROW_MAX], a[NARROW_MAX];
    const float square = load_near(D, f, n, u, a), largest = near_largest(D, &f->cells, u, a, t->far);
    return list_cells(D, &f->cells, u, t->far, near_limit(&f->cells, square, largest), t->list);
}

/* Offers row n to the lists of the vertices in its cells; logits are made again, of the few cells in which a key may
 * pass. */
VX_INLINE void select_near(const int D, const forward *f, worker *t, int64_t n, int64_t shard, const float *a,
                           int64_t count, int i)
{
    const smooth_call *c = &f->c;
    const int64_t each = c->K / c->shards;
    const int ce = c->regularizer == VX_REG_KNN_CE;
    const float sum = vf_sum(t->sum[i]), factor = ce ? 1 : 2 / sum,
                offset = ce ? -log2f(sum) : -(vf_sum(t->squares[i]) / sum / sum);
    float *least = t->least + shard * c->panels;
    for (int64_t j = 0; j < count; j++) {
        const int64_t cell = t->list[j];
        const vf most = ce ? t->top[j] : vf_exp2(t->top[j]) * 1.00001f; /* a power is not monotone to the last bit */
        if (!vf_greater_bits(most * factor + offset, vf_set1(least[cell]))) continue;
        float *threshold = t->threshold + shard * c->Mp + cell * PANEL;
        vf key[VECTORS], least_keys[VECTORS];
        cell_logits(D, &f->cells, t->negative_ref[i], a, cell, key);
        for (int v = 0; !ce && v < VECTORS; v += 4) vf_exp2_many(4, key + v);
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) {
            key[v] = key[v] * factor + offset;
            least_keys[v] = vf_load(threshold + v * VX_LANES);
        }
        if (!offer_keys(f->slot + cell * PANEL, t->lists + shard * c->S * each, each, key, least_keys, threshold, n))
            continue;
        vf low = vf_load(threshold);
        for (int v = 1; v < VECTORS; v++) low = vf_min(low, vf_load(threshold + v * VX_LANES));
        least[cell] = -vf_maximum(-low);
    }
    if (ce) return;
    uint64_t *leaders = t->leaders + shard * 2 * each, entry = neighbour_pack(offset, n);
    if (entry > leaders[2 * each - 1]) neighbour_insert(leaders, 2 * each, entry);
}

/* Takes row n, the block's row i, through both sweeps; mean (Mp) or NULL. */
VX_INLINE void near_row(const int D, const forward *f, worker *t, int64_t n, int i, int64_t shard, float *mean)
{
    const smooth_call *c = &f->c;
    float u[NARROW_MAX], a[NARROW_MAX], best;
    const float square = load_near(D, f, n, u, a);
    float largest = near_largest(D, &f->cells, u, a, t->far);
    narrow_row sums;
    int64_t count;
    for (;;) {
        t->ref[i] = ceilf(largest), t->negative_ref[i] = -t->ref[i];
        count = list_cells(D, &f->cells, u, t->far, near_limit(&f->cells, square, largest), t->list);
        const int64_t whole = count - (t->list[count - 1] == c->M / PANEL); /* that one has padding */
        sums = (narrow_row){.sum = vf_zero()};
        f->near_whole(f, t->negative_ref[i], a, t->list, whole, t->e, t->top, &sums);
        if (whole < count)
            f->near_tail(f, t->negative_ref[i], a, t->list + whole, 1, t->e + whole * PANEL, t->top + whole, &sums);
        vf top = t->top[0];
        for (int64_t j = 1; j < count; j++) top = vf_max(top, t->top[j]);
        best = vf_maximum(top);
        if (best <= LIMIT) break;
        largest = t->ref[i] + best;
    }
    t->sum[i] = sums.sum, t->squares[i] = sums.squares, t->noisy_ref[i] = 0;
    for (int d = 0; d < D; d++) t->o[i * D + d] = vf_sum(sums.o[d]);
    int64_t code = INT64_MAX;
    for (int64_t j = 0; j < count; j++) {
        vf x[VECTORS];
        if (!equal_bits(t->top[j], best)) continue;
        cell_logits(D, &f->cells, t->negative_ref[i], a, t->list[j], x);
        for (int v = 0; v < VECTORS; v++)
            for (uint32_t lanes = equal_bits(x[v], best); lanes; lanes &= lanes - 1)
                code = vx_min64(code, f->cells.cells.code[t->list[j] * PANEL + v * VX_LANES + __builtin_ctz(lanes)]);
    }
    t->near_best[i] = best, t->near_code[i] = code;
    if (f->sums) f->refs[n] = t->ref[i], f->sums[n] = vf_sum(sums.sum);
    if (c->K) select_near(D, f, t, n, shard, a, count, i);
    const float inverse = 1 / vf_sum(sums.sum);
    for (int64_t j = 0; mean && j < count; j++)
        for (int v = 0; v < PANEL; v += VX_LANES) {
            float *at = mean + t->list[j] * PANEL + v;
            vf_store(at, vf_load(at) + vf_load(t->e + j * PANEL + v) * inverse);
        }
}

/* Takes rows first .. first + rows - 1 through both sweeps. */
static void sweep_near(const forward *f, worker *t, int64_t first, int rows, int64_t shard, float *mean)
{
    for (int i = 0; i < rows; i++) switch (f->cpu.narrow) {
        case 3: near_row(3, f, t, first + i, i, shard, mean); break;
        case 4: near_row(4, f, t, first + i, i, shard, mean); break;
        case 8: near_row(8, f, t, first + i, i, shard, mean); break;
        }
}

/* -- The group ----------------------------------------------------------------------------------------------------- */

/* Lays group g's codes out by cells and says whether its rows should meet near cells only. */
static int choose_near(forward *f, worker *t)
{
    const smooth_call *c = &f->c;
    const int D = f->cpu.narrow, keep = (f->mean != 0) * KEEP_E + (c->regularizer == VX_REG_KNN_L2) * ADD_SQUARES;
    near_codes_of(&f->cells, c, &f->cpu, f->g, f->points);
    f->codebook.order = f->cells.cells.code, f->cells.hat = f->codebook.hat;
    f->near_whole = near_copy(D, keep, 0), f->near_tail = near_copy(D, keep, 1);
#pragma omp parallel
    fill_codebook(c, &f->cpu, &f->codebook, f->g, 0);
    int64_t met = 0;
    for (int64_t i = 0; i < NEAR_TRIAL; i++) {
        const int64_t n = i * (c->N / NEAR_TRIAL);
        switch (D) {
        case 3: met += trial_row(3, f, t, n); break;
        case 4: met += trial_row(4, f, t, n); break;
        case 8: met += trial_row(8, f, t, n); break;
        }
    }
    /* in vectors of operations a row */
    const double fixed = (double)f->cells.cells.group.padded / VX_LANES * (5 * D + 8) + 150,
                 cell = VECTORS * (2 * D + 13) + 40,
                 all = (double)c->panels * VECTORS * (2 * D + 12 + (f->cpu.scale > LIMIT ? D + 1 : 0) + (c->K ? 4 : 0));
    if (fixed + (double)met / NEAR_TRIAL * cell < 0.9 * all) return 1;
    f->codebook.order = 0;
    return 0;
}

/* Lets row n, from its scaled a and what it kept, meet all panels of lonely codes; knn-ce. */
VX_INLINE void lonely_row(const int D, const forward *f, worker *t, int64_t n, int64_t shard)
{
    const smooth_call *c = &f->c;
    const int64_t each = c->K / c->shards;
    float u[NARROW_MAX], a[NARROW_MAX];
    load_near(D, f, n, u, a);
    const float offset = -log2f(f->sums[n]);
    for (int64_t panel = 0; panel * PANEL < f->lonely_count; panel++) {
        float *threshold = t->threshold + shard * c->Mp + panel * PANEL;
        vf key[VECTORS], least[VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) {
            key[v] = narrow_logits(D, -f->refs[n], a, f->lonely_hat + panel * PANEL * D + v * VX_LANES) + offset;
            least[v] = vf_load(threshold + v * VX_LANES);
        }
        offer_keys(f->lonely + panel * PANEL, t->lists + shard * c->S * each, each, key, least, threshold, n);
    }
}

/* Lets the rows of part p meet the lonely codes. */
static void lonely_part(const forward *f, worker *t, int64_t p)
{
    for (int64_t n = f->parts[p].first; n < f->parts[p].end; n++) switch (f->cpu.narrow) {
        case 3: lonely_row(3, f, t, n, f->parts[p].shard); break;
        case 4: lonely_row(4, f, t, n, f->parts[p].shard); break;
        case 8: lonely_row(8, f, t, n, f->parts[p].shard); break;
        }
}

/* Finds the vertices of which an unmet row might be a neighbour, puts their codes into panels, and empties their
 * merged lists. */
static void find_lonely(forward *f, worker *const *workers, int threads)
{
    const smooth_call *c = &f->c;
    const int64_t each = c->K / c->shards, D = f->cpu.narrow;
    const float least = 1 - (float)near_bits(c->M);
    f->lonely_count = 0;
    for (int64_t place = 0; place < c->M; place++) {
        const int64_t s = f->slot[place], at = f->lonely_count;
        int enough = 1;
        for (int64_t h = 0; s >= 0 && h < c->shards; h++)
            enough = enough && neighbour_key(workers[0]->lists[(h * c->S + s) * each + each - 1]) > least;
        if (enough) continue;
        f->lonely[f->lonely_count++] = (int32_t)s;
        for (int64_t d = 0; d < D; d++)
            f->lonely_hat[at / PANEL * PANEL * D + d * PANEL + at % PANEL] =
                f->codebook.hat[place / PANEL * PANEL * D + d * PANEL + place % PANEL];
        for (int64_t h = 0; h < c->shards; h++)
            for (int64_t k = 0; k < each; k++) workers[0]->lists[(h * c->S + s) * each + k] = neighbour_none();
    }
    for (int w = 0; w < threads; w++)
        for (int64_t h = 0; h < c->shards; h++)
            for (int64_t m = 0; m < vx_ceil_div(f->lonely_count, PANEL) * PANEL; m++)
                workers[w]->threshold[h * c->Mp + m] = m < f->lonely_count ? -INFINITY : INFINITY;
}

/* Offers the leaders to every vertex; knn-l2. */
static void offer_leaders(const forward *f, worker *const *workers, int threads)
{
    const smooth_call *c = &f->c;
    const int64_t each = c->K / c->shards, most = 2 * each;
    uint64_t *leaders = workers[0]->leaders;
    for (int w = 1; w < threads; w++)
        for (int64_t i = 0; i < c->shards * most; i++)
            if (workers[w]->leaders[i] > leaders[i / most * most + most - 1])
                neighbour_insert(leaders + i / most * most, most, workers[w]->leaders[i]);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < c->shards * c->S; i++) {
        uint64_t *list = workers[0]->lists + i * each;
        for (const uint64_t *x = leaders + i / c->S * most, *end = x + most; x<end && * x> list[each - 1]; x++) {
            int there = 0;
            for (int64_t k = 0; k < each; k++) there |= neighbour_row(list[k]) == neighbour_row(*x);
            if (!there) neighbour_insert(list, each, *x);
        }
    }
}

#endif
