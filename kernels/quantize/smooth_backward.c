/* smooth_backward.c: gradients of smooth.c's forward pass, from dy = dL/dy and dreg = dL/dreg. smooth_chunk.h has the
 * meeting of rows and codes.
 *
 * With x_im = dL/dl_im, z^ and q^ the normalized rows and codes, and w the weights of the mixture (p, or the one-hot
 * code under hard Gumbel, whose p only carries the gradient; Eq. 8):
 *     dL/dz^_i = 1/tau sum_m x_im q^_m            dL/dz_i = (dL/dz^_i - <dL/dz^_i, z^_i> z^_i) / |z_i|
 *     dL/dq^_m = 1/tau sum_i x_im z^_i            dL/dq_m = likewise, + sum_i w_im dy_i
 *     dL/dlog tau = - sum_im x_im l_im = - sum_i (<dL/dz^_i, z^_i> - lse_i sum_m x_im)
 * sum_m x_im is 0 in exact arithmetic. It is subtracted times lse_i, so that its rounding error is not scaled by l,
 * which reaches 1/tau. x is a sum of
 *     the mixture   p_im (<dy_i, q_m> - <dy_i, sum_m p_im q_m>) / t                 t = gumbel_tau; 1 under softmax
 *     knn-ce        c (n_i pi_im - [m's pairs with i])                              c = dreg / (G S K)
 *     knn-l2        2c pi_im (n_i pi_im - n_i |pi_i|^2 + P_i) - 2c pi_im [pairs]
 *     ppl           pi_im (b_m - sum_m b_m pi_im)             b_m = dreg/G e^H/(N M) (1 + log mean_pi_m)
 * where a pair is a vertex with one of its K rows, n_i counts the pairs of row i, and P_i is the sum of pi over them. A
 * row of -1 in near is no pair: that neighbour is another rank's.
 * The dense terms of both KNN losses are one multiply-add per element; the terms in [brackets] are S K sparse pairs.
 *
 * Panel by panel. Rows are cut into chunks. A chunk meets the panels of codes in order. For each panel its tiles of 24
 * rows recompute the logits (p needs no second sweep: lse is known), and from p and <dy, q> make x, which feeds two
 * small products: into the chunk's dL/dz^ and into the panel's dL/dq^ and mixture gradient, which thus stay in cache
 * for the whole chunk.
 *
 * Narrow rows whose tau is so small that most codes have no part in them meet only cells of codes near them, another
 * way round: smooth_near_backward.h.
 *
 * Cost: 10 N M D flops (8 under hard Gumbel; 2 more and one power more under ppl, whose row sum needs a pass of its
 * own), N M powers. Working space: 2 M Dp floats of gradient and M (D + Dp + 1) of codebook, shared; 3 Dp floats per
 * row of a chunk, per thread; N + S K indices of the pairs, sorted by row.
 *
 * Requirements:
 *   R1  Same bits for any number of threads. The gradient of a panel of codes is summed over the chunks in their order:
 *       chunk j may touch strip s of the panels only after chunk j - 1 has left it. So threads follow one another
 *       through the panels like workers along a line, with one copy of the gradient, not one per thread. A thread takes
 *       the chunks in ascending order, hence the lowest unfinished chunk never waits, hence all finish.
 *   R2  What is read from codes and near is checked to be in range, before anything is written.
 */
#include <omp.h>
#include <sched.h>

#include "cpu/indices.h"
#include "smooth_near_backward.h"

enum {
    STRIPS = 32,             /* hand-overs of a panel's gradient per chunk */
    NARROW_CHUNK = 96,       /* rows whose lane-by-lane sums stay in the L1 cache */
    CHUNK_BYTES = 384 << 10, /* of a chunk's rows of z, dy and dz^, which pass through the L2 cache once a panel */
};

/* -- Sparse terms -------------------------------------------------------------------------------------------------- */

/* Computes the weights of the pairs, and P_i. All threads of a parallel region call it, after fill_codebook(). */
static void weigh_pairs(const backward *b)
{
    const smooth_call *c = &b->c;
    const pairs *q = &b->pair;
#pragma omp for schedule(static)
    for (int64_t j = 0; j < c->S * c->K; j++) {
        if (q->near[j] < 0) continue;
        if (c->regularizer == VX_REG_KNN_CE) {
            q->weight[j] = -b->knn;
            continue;
        }
        int64_t row = q->near[j] * c->G + b->g;
        const float *hat = b->codebook.rows + vertex_code(c, b->g, j / c->K) * b->cpu.Dp;
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

/* Fills in b_m of the ppl regularizer; 0 for a code of no probability. */
static void fill_ppl(const backward *b, const float *mean_pi, float dreg)
{
    const smooth_call *c = &b->c;
    double entropy = 0;
    for (int64_t m = 0; m < c->M; m++) entropy -= mean_pi[m] > 0 ? mean_pi[m] * log((double)mean_pi[m]) : 0;
    double factor = dreg / (double)c->G * exp(entropy) / ((double)c->N * (double)c->M);
    for (int64_t m = 0; m < c->Mp; m++)
        b->ppl[m] = m < c->M && mean_pi[m] > 0 ? (float)(factor * (log((double)mean_pi[m]) + 1)) : 0;
}

/* -- The line of chunks -------------------------------------------------------------------------------------------- */

/* Waits until the chunk before has left a strip. */
static void wait_for(turn *before, int strip)
{
    for (int tries = 0; atomic_load_explicit(&before->strips, memory_order_acquire) <= strip; tries++)
        if (tries > 1000) sched_yield();
}

/* Takes a chunk through all panels. */
static void backward_chunk(const backward *b, worker *t, int64_t chunk)
{
    const smooth_call *c = &b->c;
    int64_t first = chunk * b->chunk, rows = vx_min64(b->chunk, c->N - first);
    load_chunk(b, t, first, rows);
    load_row_numbers(b, t, first, rows);
    if (b->cpu.bf16) round_chunk(b, t, rows);
    if (b->ppl) add_ppl_sums(b, t, rows);
    for (int64_t i = 0; b->cpu.narrow && c->noise_kind == NOISE_NONE && i < rows; i++)
        t->mix_offset[i] += t->pi_offset[i];
    if (b->cpu.narrow) memset(t->narrow_dhat, 0, sizeof(vf) * (size_t)(b->chunk * (b->cpu.narrow + 1)));
    for (int64_t panel = 0, strip = 0; panel < c->panels; strip++) {
        if (chunk) wait_for(&b->turns[chunk - 1], (int)strip);
        for (int64_t end = vx_min64(panel + b->strip, c->panels); panel < end; panel++)
            meet_panel(b, t, first, rows, panel);
        atomic_store_explicit(&b->turns[chunk].strips, (int)strip + 1, memory_order_release);
    }
    gather_narrow(b, t, rows);
    b->dlog_tau[chunk] += finish_chunk(b, t, first, rows);
}

/* -- All of a group ------------------------------------------------------------------------------------------------ */

/* Reads code m's row of dhat or dmix into out (Dp). */
static inline void read_code(const backward *b, const float *from, int64_t m, float *out)
{
    m = b->near ? b->place[m] : m;
    for (int64_t d = 0; d < b->cpu.Dp; d++)
        out[d] = b->cpu.narrow || b->by_panels ? from[(m / PANEL * b->cpu.Dp + d) * PANEL + m % PANEL]
                                               : from[m * b->cpu.Dp + d];
}

/* Computes dcodebook of the group. All threads of a parallel region call it together. */
static void finish_codes(const backward *b, const int32_t *slot)
{
    const smooth_call *c = &b->c;
    const int64_t D = c->D;
#pragma omp for schedule(static)
    for (int64_t m = 0; m < c->M; m++) {
        const float *hat = b->codebook.rows + m * b->cpu.Dp;
        float dhat[b->cpu.Dp], dmix[b->cpu.Dp], *out = b->dcodebook + (b->g * c->M + m) * D;
        read_code(b, b->dhat, m, dhat);
        if (b->dmix) read_code(b, b->dmix, m, dmix);
        for (int64_t k = 0; slot && slot[m] >= 0 && k < c->K; k++) { /* the sparse terms */
            int64_t pair = slot[m] * c->K + k, row = b->pair.near[pair] * c->G + b->g;
            if (b->pair.near[pair] < 0) continue;
            float factor = b->pair.weight[pair] / b->norms[row] * b->cpu.scale;
            for (int64_t d = 0; d < D; d++) dhat[d] += factor * c->z[row * D + d];
        }
        float projection = b->codebook.norm[m] > (float)GUARD ? dot(dhat, hat, D) : 0;
        float factor = (float)LN2 / b->codebook.norm[m];
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

/* Hands out the working memory. */
static void carve_backward(scratch *a, backward *b, worker **workers, int threads, int32_t **slot, segment *near)
{
    const smooth_call *c = &b->c;
    const int hard = c->sampler == VX_HARD_GUMBEL, ppl = c->regularizer == VX_REG_PPL;
    const int64_t count = c->S * c->K;
    carve_codebook(a, c, &b->cpu, &b->codebook, 1);
    b->dhat = carve_f32(a, c->Mp * b->cpu.Dp);
    b->dmix = hard ? 0 : carve_f32(a, c->Mp * b->cpu.Dp);
    b->turns = carve(a, b->chunks, sizeof(turn));
    b->dlog_tau = carve_f64(a, b->chunks);
    b->ppl = ppl ? carve_f32(a, c->Mp) : 0;
    b->pair.weight = carve_f32(a, count);
    b->pair.order = carve_i32(a, count);
    b->pair.start = count ? carve_i32(a, c->N + 1) : 0;
    b->pair.probability = c->regularizer == VX_REG_KNN_L2 ? carve_f32(a, c->N) : 0;
    *slot = count ? carve_i32(a, c->M) : 0;
    b->code_order = hard ? carve_i32(a, c->N) : 0;
    b->code_start = hard ? carve_i32(a, c->M + 1) : 0;
    if (near_may_pay(c, &b->cpu)) {
        carve_cells(a, &b->cells.cells, c->M, b->cpu.narrow);
        b->points = carve_f32(a, c->M * b->cpu.narrow);
        b->place = carve_i32(a, c->M);
        carve_segment(a, b, near);
    }
    for (int i = 0; i < threads; i++) {
        worker *t = carve(a, 1, sizeof *t), nowhere;
        workers[i] = t;
        if (!a->base) t = &nowhere;
        t->z = carve_f32(a, b->chunk * b->cpu.Dp);
        t->dy = carve_f32(a, b->chunk * b->cpu.Dp);
        t->dhat = carve_f32(a, b->chunk * b->cpu.Dp);
        t->z_terms = b->cpu.amx_steps ? carve_u32(a, amx_words(b->chunk, b->cpu.amx_steps)) : 0;
        t->dy_terms = b->cpu.amx_steps ? carve_u32(a, amx_words(b->chunk, b->cpu.amx_steps)) : 0;
        t->z_across = b->by_panels ? carve_u32(a, b->chunk / AMX_DEPTH * amx_words(b->cpu.Dp, 1)) : 0;
        t->dy_across = b->by_panels ? carve_u32(a, b->chunk / AMX_DEPTH * amx_words(b->cpu.Dp, 1)) : 0;
        t->start = carve_f32(a, b->chunk);
        t->mix_offset = carve_f32(a, b->chunk);
        t->pi_factor = carve_f32(a, b->chunk);
        t->pi_offset = carve_f32(a, b->chunk);
        t->x_sum = carve(a, b->chunk, sizeof(vf));
        t->noisy = carve_f32(a, b->chunk);
        t->p = carve_f32(a, b->block * PANEL);
        t->x = carve_f32(a, b->block * PANEL);
        t->z_bf16 = b->cpu.bf16 ? carve_u32(a, b->chunk / 2 * b->cpu.Dp) : 0;
        t->dy_bf16 = b->cpu.bf16 ? carve_u32(a, b->chunk / 2 * b->cpu.Dp) : 0;
        t->dy_bf16_along = b->cpu.bf16 ? carve_u32(a, b->chunk * vx_ceil_div(c->D, 2)) : 0;
        t->tile_bf16 = b->cpu.bf16 ? carve_u32(a, b->block * PANEL / 2) : 0;
        t->noise = carve_f32(a, (b->cpu.narrow ? RUN : b->block) * PANEL);
        t->narrow_dhat = b->cpu.narrow ? carve(a, b->chunk * (b->cpu.narrow + 1), sizeof(vf)) : 0;
    }
}

/* Prepares group g's index lists; O(N + S K), by one thread. */
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
    if (!status) status = smooth_cpu_of(&b.cpu, c, log_tau, precision);
    if (!status) status = check_indices(c->op, "code", b.codes, c->N, c->G, c->M);
    if (!status && c->K) status = check_range(c->op, "neighbour", vx_i32(near), c->G * c->S, c->K, -1, c->N);
    if (status) return status;
    const int64_t most =
        b.cpu.narrow ? NARROW_CHUNK : CHUNK_BYTES / (3 * (int64_t)sizeof(float) * b.cpu.Dp) / PANEL_ROWS * PANEL_ROWS;
    b.chunk = vx_max64(PANEL_ROWS, vx_min64(most, vx_ceil_div(vx_ceil_div(c->N, 16), PANEL_ROWS) * PANEL_ROWS));
    b.chunks = vx_ceil_div(c->N, b.chunk);
    b.strip = vx_ceil_div(c->panels, STRIPS);
    b.block = PANEL_ROWS;
    b.by_panels = b.cpu.amx_steps && !b.cpu.bf16;
    const int threads = omp_get_max_threads();
    worker *workers[threads];
    int32_t *slot = 0;
    float *norms = 0;
    segment rows;
    int64_t found = 0;
    scratch memory = {.op = c->op};
    while (scratch_pass(&memory)) {
        norms = carve_f32(&memory, c->N * c->G);
        carve_backward(&memory, &b, workers, threads, &slot, &rows);
    }
    if (!memory.base) return VX_ENOMEM;
    b.norms = norms;
    status = check_numbers(c, norms);
    if (status) {
        scratch_free(&memory);
        return status;
    }
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
        b.near = near_may_pay(c, &b.cpu) && choose_near(&b, &rows);
        b.codebook.order = b.near ? b.cells.cells.code : 0;
        for (int64_t i = 0; b.near && i < c->M; i++) b.place[b.codebook.order[i]] = (int32_t)i;
#pragma omp parallel num_threads(threads)
        {
            unsigned denormals = vx_denormals_off();
            if (b.cpu.amx_steps) amx_begin();
            fill_codebook(c, &b.cpu, &b.codebook, b.g, 1);
            if (c->K) weigh_pairs(&b);
            if (b.near) backward_near(&b, &rows, &found);
            else
#pragma omp for schedule(monotonic : dynamic, 1)
                for (int64_t i = 0; i < b.chunks; i++) backward_chunk(&b, workers[omp_get_thread_num()], i);
            finish_codes(&b, slot);
            if (b.cpu.amx_steps) amx_end();
            vx_denormals_restore(denormals);
        }
    }
    double sum = 0;
    for (int64_t i = 0; i < b.chunks; i++) sum += b.dlog_tau[i];
    vx_f32(dlog_tau)[0] = (float)sum;
    scratch_free(&memory);
    return VX_OK;
}
