/* smooth.c: the smoothed quantizer of [1] and its regularizers, forward. smooth_sweep.h has the sweep over the codes,
 * smooth_select.h the K nearest rows of each vertex, smooth.h the tiles, smooth_backward.c the gradients.
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
 *     ppl     1 - exp(H(mean_i pi_i)) / M                                                               (Eq. 11, 12)
 * where n(m, 1..K) are the K rows nearest to vertex m. A subset of `vertices` and `shards` concern the KNN regularizers
 * only.
 *
 * Precision. Under VX_BF16 and for D > 8 five products round their factors to bfloat16 (to nearest, ties to even) and
 * add in float32: sum_m p_im q_m here; <dy_i, q_m>, sum_m x_im q^_m, sum_i x_im z^_i and sum_i p_im dy_i in
 * smooth_backward.c, which rounds q^ and multiplies by |q_m| after. Each sum is off by up to 2^-7 of the sum of its
 * terms' magnitudes. Everything else is float32 with the bits it has under VX_F32: logits (in both passes), lse, sumsq,
 * mean_pi, codes, near, reg, max_p, and y under hard Gumbel, which is a code. The variant avx512bf16 adds two
 * products at a time by vdpbf16ps; the others make float32 factors of the bfloat16 again, with the same products in the
 * same order, and take longer than under VX_F32.
 *
 * Left for the backward pass: lse (log-sum-exp of l, and of (l + g)/t), sumsq = |pi_i|^2 (under knn-l2, else 0),
 * soft = sum_m p_im q_m, near, mean_pi.
 *
 * Two sweeps per block of rows. A block (8 rows where D <= 8, else 24 to 96) meets all M codes before the next block
 * starts: logits of a panel of 64 codes, powers, sums, mixing with the codes. The block's logits (or powers) stay in
 * the L2 cache, where a second sweep compares them with the thresholds of the vertices once the row sums are known. No
 * N x M array exists. A logit is computed twice only where tau is so small that the largest must be known first.
 *
 * Cost: 4 N M D flops, N M powers, N M comparisons. Memory traffic: z, y and the outputs once; the codebook passes
 * through the L2 cache once a block. Working space: per thread a block of logits (8 M to 96 M floats) and M K entries
 * of 8 bytes; shared, M (2 D + 1) floats of codebook. Bound by the FMA units for D >= 16; at D = 3 by powers and
 * comparisons, see smooth_narrow.h.
 *
 * Requirements, which the tests hold this file to:
 *   R1  The bits of all outputs depend on the arguments only, not on threads. Sums over rows are cut into PARTS parts
 *       that depend on the sizes alone; the K nearest are chosen by the total order of neighbours.h.
 *   R2  No power overflows, for tau from 1e-5 to 1. Logits are kept relative to a reference r_i, an integer, such that
 *       the largest is at most LIMIT above it, and from the start of the sum, in which -r_i is the first term. r_i
 *       depends on row i alone, so that equal rows have equal keys, and is the same for all of its codes, so that equal
 *       codes have equal logits.
 *   R3  Equal logits of a row tie to the lower code, equal keys of a vertex to the lower row.
 *   R4  After an error nothing has been written; a NaN or Inf in z or in the codebook is such an error.
 *
 * [1] Morita 2025, Pushing Toward the Simplex Vertices: A Simple Remedy for Code Collapse in Smoothed Vector
 *     Quantization.
 */
#include <omp.h>

#include "smooth_near.h"

enum { PARTS = 32 /* row ranges whose partial sums are added in order */ };

/* -- The second sweep of a block ----------------------------------------------------------------------------------- */

/* Adds pi of the block's rows to mean (Mp). */
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

/* Takes part p through both sweeps. */
static void forward_part(const forward *f, worker *t, int64_t p)
{
    const part *range = f->parts + p;
    double max_p = 0;
    if (f->mean) memset(f->mean + p * f->c.Mp, 0, sizeof(float) * (size_t)f->c.Mp);
    for (int64_t first = range->first; first < range->end; first += f->block) {
        int rows = (int)vx_min64(f->block, range->end - first);
        if (f->near) {
            sweep_near(f, t, first, rows, range->shard, f->mean ? f->mean + p * f->c.Mp : 0);
            max_p += finish_rows(f, t, first, rows);
            continue;
        }
        load_rows(f, t, first, rows);
        if (f->cpu.narrow) sweep_narrow(f, t, first, rows);
        else sweep_block(f, t, rows, first);
        max_p += finish_rows(f, t, first, rows);
        if (f->c.K) select_rows(f, t, first, rows, range->shard);
        if (f->mean) add_mean(f, t, rows, f->mean + p * f->c.Mp);
    }
    f->max_p[p] += max_p;
}

/* Empties a thread's lists; the threshold of a code that is no vertex lets nothing pass. */
static void clear_lists(const forward *f, worker *t)
{
    const smooth_call *c = &f->c;
    for (int64_t i = 0; i < c->S * c->K; i++) t->lists[i] = neighbour_none();
    for (int64_t h = 0; h < (c->K ? c->shards : 0); h++)
        for (int64_t m = 0; m < c->Mp; m++)
            t->threshold[h * c->Mp + m] = m < c->M && f->slot[m] >= 0 ? -INFINITY : INFINITY;
    for (int64_t i = 0; f->near && c->K && i < c->shards * c->panels; i++) {
        t->least[i] = INFINITY;
        for (int64_t m = 0; m < PANEL; m++) t->least[i] = fminf(t->least[i], t->threshold[i * PANEL + m]);
    }
    for (int64_t i = 0; t->leaders && i < 2 * c->K; i++) t->leaders[i] = neighbour_none();
}

/* Merges the threads' lists into those of the first; the others are empty then. */
static void merge_lists(const forward *f, worker *const *workers, int threads)
{
    const smooth_call *c = &f->c;
    const int64_t each = c->K / c->shards;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < c->shards * c->S; i++) {
        uint64_t *list = workers[0]->lists + i * each;
        for (int w = 1; w < threads; w++) {
            uint64_t *other = workers[w]->lists + i * each;
            for (int64_t k = 0; k < each && other[k] > list[each - 1]; k++) neighbour_insert(list, each, other[k]);
            for (int64_t k = 0; k < each; k++) other[k] = neighbour_none();
        }
    }
}

/* Writes the merged lists to near (S,K) of the group. Returns the mean of the vertices' divergences. */
static double take_lists(const forward *f, const worker *t, int32_t *near, double *loss)
{
    const smooth_call *c = &f->c;
    const int64_t each = c->K / c->shards;
    double sum = 0;
#pragma omp parallel for schedule(static)
    for (int64_t s = 0; s < c->S; s++) {
        loss[s] = 0;
        for (int64_t j = 0; j < c->K; j++) {
            const uint64_t entry = t->lists[(j / each * c->S + s) * each + j % each];
            const double key = neighbour_key(entry);
            loss[s] += c->regularizer == VX_REG_KNN_CE ? -LN2 * key : 1 - key;
            near[s * c->K + j] = (int32_t)neighbour_row(entry);
        }
    }
    for (int64_t s = 0; s < c->S; s++) sum += loss[s];
    return sum / (double)(c->S * c->K);
}

/* Completes the merged lists where rows met near cells only. */
static void complete_lists(forward *f, worker *const *workers, int threads)
{
    if (f->c.regularizer == VX_REG_KNN_L2) {
        offer_leaders(f, workers, threads);
        return;
    }
    find_lonely(f, workers, threads);
    if (!f->lonely_count) return;
#pragma omp parallel num_threads(threads)
    {
        unsigned denormals = vx_denormals_off();
#pragma omp for schedule(dynamic, 1)
        for (int64_t p = 0; p < f->part_count; p++) lonely_part(f, workers[omp_get_thread_num()], p);
        vx_denormals_restore(denormals);
    }
    merge_lists(f, workers, threads);
}

/* Adds the parts up to mean_pi (M) of the group. Returns its entropy. */
static double finish_mean(const forward *f, float *mean_pi)
{
    const smooth_call *c = &f->c;
    double entropy = 0;
    for (int64_t m = 0; m < c->M; m++) {
        double sum = 0;
        for (int64_t p = 0; p < f->part_count; p++) sum += f->mean[p * c->Mp + m];
        sum /= (double)c->N;
        mean_pi[f->near ? f->cells.cells.code[m] : m] = (float)sum;
        if (sum > 0) entropy -= sum * log(sum);
    }
    return entropy;
}

/* Cuts every shard into pieces of whole blocks. Returns their number; parts NULL: only that. */
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

/* Hands out the working memory. */
static void carve_forward(scratch *a, forward *f, worker **workers, int threads, int with_mean, double **loss)
{
    const smooth_call *c = &f->c;
    carve_codebook(a, c, &f->cpu, &f->codebook, 0);
    f->parts = carve(a, f->part_count, sizeof(part));
    f->max_p = carve_f64(a, f->part_count);
    f->mean = with_mean ? carve_f32(a, f->part_count * c->Mp) : 0;
    f->slot = carve_i32(a, c->Mp);
    const int near = near_may_pay(c, &f->cpu), ce = c->regularizer == VX_REG_KNN_CE;
    if (near) {
        carve_cells(a, &f->cells.cells, c->M, f->cpu.narrow);
        f->points = carve_f32(a, c->M * f->cpu.narrow);
        f->place = carve_i32(a, c->M);
        f->refs = ce ? carve_f32(a, c->N) : 0;
        f->sums = ce ? carve_f32(a, c->N) : 0;
        f->lonely = ce ? carve_i32(a, c->Mp) : 0;
        f->lonely_hat = ce ? carve_f32(a, c->Mp * f->cpu.narrow) : 0;
    }
    *loss = carve_f64(a, c->S);
    for (int i = 0; i < threads; i++) {
        worker *t = carve(a, 1, sizeof *t), nowhere;
        workers[i] = t;
        if (!a->base) t = &nowhere;
        t->a = carve_f32(a, f->block * (f->cpu.narrow ? f->cpu.narrow : c->D));
        t->a_terms = f->cpu.amx_steps ? carve_u32(a, amx_words(f->block, f->cpu.amx_steps)) : 0;
        t->s = f->keep_logits ? carve_f32(a, f->block * c->Mp) : 0;
        t->e = !f->keep_powers                                    ? 0
               : c->regularizer == VX_REG_KNN_CE || f->cpu.narrow ? carve_f32(a, f->block * c->Mp)
                                                                  : t->s;
        t->w = carve_f32(a, PANEL_ROWS * PANEL);
        t->w_bf16 = f->cpu.bf16 ? carve_u32(a, PANEL_ROWS * PANEL / 2) : 0;
        t->noise = carve_f32(a, PANEL * (f->cpu.narrow ? NARROW_ROWS * NARROW_STRIP : PANEL_ROWS));
        t->o = carve_f32(a, f->block * f->cpu.Dp);
        t->lists = carve_u64(a, c->S * c->K);
        t->threshold = carve_f32(a, c->K ? c->shards * c->Mp : 0);
        t->far = near ? carve_f32(a, f->cells.cells.group.padded) : 0;
        t->list = near ? carve_i32(a, c->panels) : 0;
        t->top = near ? carve(a, c->panels, sizeof(vf)) : 0;
        t->least = near ? carve_f32(a, c->shards * c->panels) : 0;
        t->leaders = near && c->regularizer == VX_REG_KNN_L2 ? carve_u64(a, 2 * c->K) : 0;
    }
}

/* Fills slot for group g. */
static void fill_slots(const forward *f)
{
    const smooth_call *c = &f->c;
    const int32_t *code = f->near ? f->cells.cells.code : 0;
    for (int64_t i = 0; code && i < c->M; i++) f->place[code[i]] = (int32_t)i;
    for (int64_t i = 0; i < c->Mp; i++) f->slot[i] = c->vertices ? -1 : code ? code[i] : (int32_t)i;
    for (int64_t s = 0; c->vertices && s < c->S; s++) {
        const int64_t m = vertex_code(c, f->g, s);
        f->slot[code ? f->place[m] : m] = (int32_t)s;
    }
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
    status = smooth_cpu_of(&f.cpu, c, log_tau, precision);
    if (status) return status;
    f.block = f.cpu.narrow ? NARROW_BLOCK
              : c->D <= 48 ? PANEL_ROWS
              : c->D < 128 ? 2 * PANEL_ROWS
                           : MOST_ROWS; /* the codes pass through the cache once a block */
    f.keep_logits = regularizer == VX_REG_KNN_CE || !f.cpu.narrow;
    f.keep_powers = mean_pi || regularizer == VX_REG_KNN_L2;
    f.part_count = cut_parts(c, f.block, 0);
    choose_copies(&f);
    const int threads = omp_get_max_threads();
    worker *workers[threads];
    float *norms = 0;
    double *loss = 0;
    scratch memory = {.op = c->op};
    while (scratch_pass(&memory)) {
        norms = carve_f32(&memory, c->N * c->G);
        carve_forward(&memory, &f, workers, threads, mean_pi != 0, &loss);
    }
    if (!memory.base) return VX_ENOMEM;
    f.norms = norms;
    status = check_numbers(c, norms);
    if (status) {
        scratch_free(&memory);
        return status;
    }
    cut_parts(c, f.block, f.parts);
    memset(f.max_p, 0, sizeof(double) * (size_t)f.part_count);

    double reg_sum = 0, max_sum = 0;
    for (f.g = 0; f.g < c->G; f.g++) {
        f.near = near_may_pay(c, &f.cpu) && choose_near(&f, workers[0]);
        fill_slots(&f);
#pragma omp parallel num_threads(threads)
        {
            unsigned denormals = vx_denormals_off();
            if (f.cpu.amx_steps) amx_begin();
            if (!f.near) fill_codebook(c, &f.cpu, &f.codebook, f.g, 0);
#pragma omp for schedule(static)
            for (int i = 0; i < threads; i++) clear_lists(&f, workers[i]);
#pragma omp for schedule(dynamic, 1)
            for (int64_t p = 0; p < f.part_count; p++) forward_part(&f, workers[omp_get_thread_num()], p);
            if (f.cpu.amx_steps) amx_end();
            vx_denormals_restore(denormals);
        }
        if (c->K) {
            merge_lists(&f, workers, threads);
            if (f.near) complete_lists(&f, workers, threads);
            reg_sum += take_lists(&f, workers[0], vx_i32(near) + f.g * c->S * c->K, loss);
        }
        if (mean_pi) {
            double entropy = finish_mean(&f, vx_f32(mean_pi) + f.g * c->M);
            if (regularizer == VX_REG_PPL) reg_sum += 1 - exp(entropy) / (double)c->M;
        }
    }
    for (int64_t p = 0; p < f.part_count; p++) max_sum += f.max_p[p];
    vx_f32(reg)[0] = (float)(reg_sum / (double)c->G);
    vx_f32(max_p)[0] = (float)(max_sum / (double)(c->N * c->G));
    scratch_free(&memory);
    return VX_OK;
}
