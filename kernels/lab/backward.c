/* backward.c: the gradients of forward.c, from whole arrays to kernels/quantize/smooth_backward.c. run.sh runs it, once
 * for rows of 32 and once for rows of 3.
 *
 *     x_nm = pi_nm (<dy_n, q_m> - <dy_n, y_n> + c count_n) - c [n is among the K rows of m],   c = 1 / (M K)
 *     dz^_n = sum_m x_nm q^_m     dq^_m = sum_n x_nm z^_n / tau     dmix_m = sum_n pi_nm dy_n
 *
 * and dz, dq and dlog tau follow from those three row by row. y, the log-sum-exp and the neighbours are given. The
 * pairs in [ ] are M K sparse terms, which all steps add in the same way at the end.
 *
 * The lesson: five products of small tiles share two tiles of 24 x 64 (pi and x) that never leave the L1 cache; and
 * threads can share one gradient of the codebook without locks, atomics or an order that depends on how many they are.
 */
#include <sched.h>
#include <stdatomic.h>

#include "late.h"

/* What every step is given and what it makes. Padded rows are Dp floats. */
typedef struct work {
    int64_t Dp;
    const float *hat, *raw, *hat_panels,
        *raw_panels;             /* codes (M,Dp) on the sphere and as stored, and in panels of 64 (or M) */
    const float *a, *dy;         /* (N,Dp) rows on the sphere times unit / tau; dL/dy */
    const float *start, *offset; /* (N) minus the log-sum-exp; c count_n - <dy_n, y_n> */
    float *dz_hat;               /* (N,Dp) */
    float *dq_hat, *dmix;        /* (M,Dp): the sums with a and dy */
    float *x_sum; /* (N) sum over m of x, which is 0 but for rounding; NULL where a step has not made it */
} work;

/* Copies x (rows,D), filled up with zeros to Dp. */
static float *padded(const float *x, int64_t rows, int64_t D, int64_t Dp)
{
    float *out = zeros(rows * Dp);
    for (int64_t i = 0; i < rows; i++) memcpy(out + i * Dp, x + i * D, sizeof(float) * (size_t)D);
    return out;
}

/* Lays everything out, runs `dense`, adds the pairs and finishes. Logarithms are to the base 2 where unit is
 * log2(e). */
static void gradients(const problem *q, results *r, int64_t width, int64_t panel, double unit,
                      void (*dense)(const problem *, work *))
{
    const int64_t N = q->N, D = q->D, M = q->M, K = q->K, Dp = vx_ceil_div(D, width) * width;
    const double tau = exp((double)*q->log_tau);
    const float c = 1 / (float)(M * K), scale = (float)(unit / tau);
    float *sphere = on_sphere(q->codebook, M, D, 1), *rows = on_sphere(q->z, N, D, scale), *start = floats(N),
          *offset = floats(N);
    float *hat = padded(sphere, M, D, Dp), *raw = padded(q->codebook, M, D, Dp),
          *hat_panels = in_panels(sphere, M, D, panel);
    float *raw_panels = in_panels(q->codebook, M, D, panel), *a = padded(rows, N, D, Dp), *dy = padded(q->dy, N, D, Dp);
    for (int64_t n = 0; n < N; n++) {
        start[n] = (float)(-r->lse[n] * unit);
        offset[n] = -dot(q->dy + n * D, r->y + n * D, D);
    }
    for (int64_t j = 0; j < M * K; j++) offset[r->near[j]] += c;
    work w = {Dp,    hat,    raw,           hat_panels,    raw_panels,    a, dy,
              start, offset, zeros(N * Dp), zeros(M * Dp), zeros(M * Dp), 0};
    dense(q, &w);
    for (int64_t j = 0; j < M * K; j++) {
        const int64_t m = j / K, n = r->near[j];
        if (w.x_sum) w.x_sum[n] -= c;
        for (int64_t d = 0; d < D; d++) {
            w.dz_hat[n * Dp + d] -= c * hat[m * Dp + d];
            w.dq_hat[m * Dp + d] -= c * a[n * Dp + d];
        }
    }
    double dlog_tau = 0;
    for (int64_t n = 0; n < N; n++) { /* the part along the row does not change a direction */
        const double along = dot(w.dz_hat + n * Dp, a + n * Dp, D) / scale,
                     norm = fmax(row_norm(q->z + n * D, D), GUARD);
        for (int64_t d = 0; d < D; d++)
            r->dz[n * D + d] = (float)((w.dz_hat[n * Dp + d] - along * a[n * Dp + d] / scale) / (tau * norm));
        dlog_tau -= along / tau - (w.x_sum ? (double)r->lse[n] * w.x_sum[n] : 0); /* x times log pi, not the logit */
    }
    for (int64_t m = 0; m < M; m++) {
        const double along = dot(w.dq_hat + m * Dp, hat + m * Dp, D),
                     norm = fmax(row_norm(q->codebook + m * D, D), GUARD);
        for (int64_t d = 0; d < D; d++)
            r->dcodebook[m * D + d] =
                (float)((w.dq_hat[m * Dp + d] - along * hat[m * Dp + d]) / (unit * norm) + w.dmix[m * Dp + d]);
    }
    r->dlog_tau = (float)dlog_tau;
    free(sphere), free(rows), free(start), free(offset), free(hat), free(raw), free(hat_panels), free(raw_panels),
        free(a);
    free(dy), free(w.dz_hat), free(w.dq_hat), free(w.dmix), free(w.x_sum);
}

/* Computes out (M) = first + a (D) columns (D,M). */
static void row_product(float *out, float first, const float *a, const float *columns, int64_t M, int64_t D)
{
    for (int64_t m = 0; m < M; m++) out[m] = first;
    for (int64_t d = 0; d < D; d++)
        for (int64_t m = 0; m < M; m++) out[m] += a[d] * columns[d * M + m];
}

/* Step 1. Whole arrays pi and x, as autograd keeps them, and five products in plain loops: two long ones as in
 * forward.c (2 G each) and three short ones over D (6 G each); one expf (5 lanes E), and 32 bytes an element to and
 * from memory. It takes twice as long: the last two products walk through both arrays in columns of 64, 256 bytes a
 * row, which is not what memory is fast at. */
static void whole_arrays_dense(const problem *q, work *w)
{
    const int64_t N = q->N, M = q->M, D = q->D;
    float *pi = floats(N * M), *x = floats(N * M);
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) row_product(pi + n * M, w->start[n], w->a + n * D, w->hat_panels, M, D);
#pragma omp parallel for
    for (int64_t i = 0; i < N * M; i++) pi[i] = expf(pi[i]);
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) row_product(x + n * M, w->offset[n], w->dy + n * D, w->raw_panels, M, D);
#pragma omp parallel for
    for (int64_t i = 0; i < N * M; i++) x[i] *= pi[i];
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++)
        for (int64_t m = 0; m < M; m++)
            for (int64_t d = 0; d < D; d++) w->dz_hat[n * D + d] += x[n * M + m] * w->hat[m * D + d];
#pragma omp parallel for
    for (int64_t strip = 0; strip < M; strip += PANEL)
        for (int64_t n = 0; n < N; n++)
            for (int64_t m = strip; m < strip + PANEL; m++)
                for (int64_t d = 0; d < D; d++) {
                    w->dq_hat[m * D + d] += x[n * M + m] * w->a[n * D + d];
                    w->dmix[m * D + d] += pi[n * M + m] * w->dy[n * D + d];
                }
    free(pi), free(x);
}

static void whole_arrays(const problem *q, results *r) { gradients(q, r, 1, q->M, 1, whole_arrays_dense); }

/* Adds up the threads' own gradients of the codebook; the sum depends on which thread met which row. */
static void add_copies(const problem *q, work *w, const float *dq_hat, const float *dmix)
{
#pragma omp critical
    for (int64_t i = 0; i < q->M * w->Dp; i++) w->dq_hat[i] += dq_hat[i], w->dmix[i] += dmix[i];
}

VX_INLINE void exp2_row(float *x, int64_t count)
{
    for (int64_t i = 0; i < count; i += 4 * VX_LANES) {
        vf p[4];
        for (int j = 0; j < 4; j++) p[j] = vf_load(x + i + j * VX_LANES);
        vf_exp2_many(4, p);
        for (int j = 0; j < 4; j++) vf_store(x + i + j * VX_LANES, p[j]);
    }
}

/* Step 2. One row at a time, its pi and x in the cache, powers as vectors. The products stay what they were, 22 G in
 * all, and the gradients of all codes, 1 MB at D = 32, pass through the L2 cache for every row. */
static void row_by_row_dense(const problem *q, work *w)
{
    const int64_t N = q->N, M = q->M, D = q->D;
#pragma omp parallel
    {
        float *pi = floats(M), *x = floats(M), *dq_hat = zeros(M * D), *dmix = zeros(M * D);
#pragma omp for schedule(dynamic, 16)
        for (int64_t n = 0; n < N; n++) {
            const float *a = w->a + n * D, *dy = w->dy + n * D;
            float *dz = w->dz_hat + n * D;
            row_product(pi, w->start[n], a, w->hat_panels, M, D);
            exp2_row(pi, M);
            row_product(x, w->offset[n], dy, w->raw_panels, M, D);
            for (int64_t m = 0; m < M; m++) x[m] *= pi[m];
            for (int64_t m = 0; m < M; m++)
                for (int64_t d = 0; d < D; d++) {
                    dz[d] += x[m] * w->hat[m * D + d];
                    dq_hat[m * D + d] += x[m] * a[d];
                    dmix[m * D + d] += pi[m] * dy[d];
                }
        }
        add_copies(q, w, dq_hat, dmix);
        free(pi), free(x), free(dq_hat), free(dmix);
    }
}

static void row_by_row(const problem *q, results *r) { gradients(q, r, 1, q->M, LOG2E, row_by_row_dense); }

/* Lets 24 rows meet a panel of codes: pi and x as tiles (24,64), 12 KB, and five products from registers. */
static void meet_tile(const problem *q, work *w, int64_t n, int64_t m, float *dq_hat, float *dmix)
{
    const int64_t D = q->D, Dp = w->Dp;
    _Alignas(64) float pi[PANEL_ROWS * PANEL], x[PANEL_ROWS * PANEL];
    tile_logits(pi, PANEL, PANEL_ROWS, w->start + n, w->a + n * Dp, Dp, w->hat_panels + m * D, D);
    exp2_row(pi, PANEL_ROWS * PANEL);
    tile_logits(x, PANEL, PANEL_ROWS, w->offset + n, w->dy + n * Dp, Dp, w->raw_panels + m * D, D);
    for (int i = 0; i < PANEL_ROWS * PANEL; i += VX_LANES) vf_store(x + i, vf_load(x + i) * vf_load(pi + i));
    tile_mix(w->dz_hat + n * Dp, PANEL_ROWS, x, w->hat + m * Dp, Dp);
    tile_collect(dq_hat + m * Dp, x, PANEL_ROWS, w->a + n * Dp, Dp);
    tile_collect(dmix + m * Dp, pi, PANEL_ROWS, w->dy + n * Dp, Dp);
}

/* Step 3. Tiles: a block of 24 rows meets all panels, and the codes' gradients pass by once per block, a 24th of the
 * traffic. 5 G and E, and one multiplication. Two thirds of the peak is what comes of it: a sum of the codes' gradients
 * gets only 24 multiply-adds for its load and its store, and at D = 3 a tile is filled up to a whole vector with
 * zeros. */
static void tiles_dense(const problem *q, work *w)
{
#pragma omp parallel
    {
        float *dq_hat = zeros(q->M * w->Dp), *dmix = zeros(q->M * w->Dp);
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < q->N; n += PANEL_ROWS)
            for (int64_t m = 0; m < q->M; m += PANEL) meet_tile(q, w, n, m, dq_hat, dmix);
        add_copies(q, w, dq_hat, dmix);
        free(dq_hat), free(dmix);
    }
}

static void tiles(const problem *q, results *r) { gradients(q, r, VX_LANES, PANEL, LOG2E, tiles_dense); }

/* Step 4. One gradient for all threads. Rows are cut into chunks, and a chunk meets a strip of panels only after the
 * chunk before it has left that strip: threads follow one another along the codes like workers along a line. Every sum
 * is then in the order of the rows, so the bits are the same for any number of threads, and 2 M D floats a thread are
 * saved. A chunk's panels wait in the L1 cache for all of its rows. The arithmetic is that of step 3; the wait at the
 * start is one strip a thread. */
enum { CHUNK = 96, STRIPS = 16 };

typedef struct turn {
    _Alignas(64) atomic_int strips; /* that a chunk has left */
} turn;

typedef void panel_function(const problem *, work *, int64_t n, int64_t m);

static void in_line(const problem *q, work *w, panel_function *meet)
{
    const int64_t chunks = q->N / CHUNK, panels = q->M / PANEL, strips = vx_min64(STRIPS, panels);
    turn *turns = aligned_alloc(64, sizeof(turn) * (size_t)chunks);
    for (int64_t i = 0; i < chunks; i++) atomic_init(&turns[i].strips, 0);
#pragma omp parallel for schedule(monotonic : dynamic, 1) /* the lowest unfinished chunk never waits */
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int strip = 0; strip < strips; strip++) {
            while (chunk && atomic_load_explicit(&turns[chunk - 1].strips, memory_order_acquire) <= strip)
                sched_yield();
            for (int64_t p = panels * strip / strips; p < panels * (strip + 1) / strips; p++)
                meet(q, w, chunk * CHUNK, p * PANEL);
            atomic_store_explicit(&turns[chunk].strips, strip + 1, memory_order_release);
        }
    free(turns);
}

static void chunk_of_tiles(const problem *q, work *w, int64_t n, int64_t m)
{
    for (int64_t i = n; i < n + CHUNK; i += PANEL_ROWS) meet_tile(q, w, i, m, w->dq_hat, w->dmix);
}

static void in_line_dense(const problem *q, work *w) { in_line(q, w, chunk_of_tiles); }
static void threads_in_line(const problem *q, results *r) { gradients(q, r, VX_LANES, PANEL, LOG2E, in_line_dense); }

/* Step 5, rows of 3 only. A vector of codes keeps its 3 numbers, twice, and their gradients in registers while the
 * chunk's rows pass, each of which broadcasts 6 numbers. 15 multiply-adds, E and a product; the row's own sum is kept
 * lane by lane and costs a load and a store for each of its 3 multiply-adds. One row after the other: a chain of 25
 * operations, of which the processor overlaps what it sees. */
static void vectors_over_codes_panel(const problem *q, work *w, int64_t n, int64_t m)
{
    (void)q;
    for (int v = 0; v < PANEL; v += VX_LANES) {
        const float *hat = w->hat_panels + m * 3 + v, *raw = w->raw_panels + m * 3 + v;
        float *into_hat = w->dq_hat + m * 3 + v, *into_mix = w->dmix + m * 3 + v;
        vf q_hat[3], values[3], dq[3], dv[3];
        for (int d = 0; d < 3; d++) {
            q_hat[d] = vf_load(hat + d * PANEL), values[d] = vf_load(raw + d * PANEL);
            dq[d] = vf_load(into_hat + d * PANEL), dv[d] = vf_load(into_mix + d * PANEL);
        }
        for (int64_t i = n; i < n + CHUNK; i++) {
            const float *a = w->a + i * 3, *dy = w->dy + i * 3;
            vf pi = vf_exp2(w->start[i] + q_hat[0] * a[0] + q_hat[1] * a[1] + q_hat[2] * a[2]);
            vf x = pi * (w->offset[i] + values[0] * dy[0] + values[1] * dy[1] + values[2] * dy[2]);
            for (int d = 0; d < 3; d++) {
                dq[d] += x * a[d];
                dv[d] += pi * dy[d];
                float *sum = w->dz_hat + (i * 4 + d) * VX_LANES;
                vf_store(sum, vf_load(sum) + x * q_hat[d]);
            }
        }
        for (int d = 0; d < 3; d++) vf_store(into_hat + d * PANEL, dq[d]), vf_store(into_mix + d * PANEL, dv[d]);
    }
}

/* Step 6, rows of 3 only. In step 5 the chains of one long loop stand one behind the other, and every vector of codes
 * loads a row's numbers anew: 26 loads for 22 operations, where a cycle has two of each. Here two vectors of codes
 * share what they load, and a run of rows passes through four short loops with buffers in between. smooth_narrow.h has
 * them. */
static void short_loops_panel(const problem *q, work *w, int64_t n, int64_t m)
{
    (void)q;
    for (int64_t i = n; i < n + CHUNK; i += RUN) {
        float *const into = w->dz_hat + i * 4 * VX_LANES;
        vf sums[RUN * 4];
        for (int j = 0; j < RUN * 4; j++) sums[j] = vf_load(into + j * VX_LANES);
        const narrow_run run = {.z = w->a + i * 3,
                                .dy = w->dy + i * 3,
                                .start = w->start + i,
                                .mix_offset = w->offset + i,
                                .dhat = sums,
                                .rows = RUN};
        for (int v = 0; v < PANEL; v += narrow_side(3) * VX_LANES) {
            const int64_t at = m * 3 + v;
            const narrow_codes codes = {
                .hat = w->hat_panels + at, .raw = w->raw_panels + at, .dhat = w->dq_hat + at, .dmix = w->dmix + at};
            narrow_backward(3, MIX, 0, &run, &codes);
        }
        for (int j = 0; j < RUN * 4; j++) vf_store(into + j * VX_LANES, sums[j]);
    }
}

/* Frame of steps 5 and 6: the rows' sums of x q^ and of x lane by lane (N, 4, lanes), the codes' gradients in panels (M
 * / 64, 3, 64). */
static void lanes_dense(const problem *q, work *w, panel_function *meet)
{
    work lanes = *w;
    lanes.dz_hat = zeros(q->N * 4 * VX_LANES), lanes.dq_hat = zeros(q->M * 3), lanes.dmix = zeros(q->M * 3);
    in_line(q, &lanes, meet);
    for (int64_t i = 0; i < q->N * 3; i++)
        w->dz_hat[i] = vf_sum(vf_load(lanes.dz_hat + (i / 3 * 4 + i % 3) * VX_LANES));
    for (int64_t n = 0; w->x_sum && n < q->N; n++) w->x_sum[n] = vf_sum(vf_load(lanes.dz_hat + (n * 4 + 3) * VX_LANES));
    for (int64_t m = 0; m < q->M; m++)
        for (int64_t d = 0; d < 3; d++) {
            w->dq_hat[m * 3 + d] = lanes.dq_hat[(m / PANEL * 3 + d) * PANEL + m % PANEL];
            w->dmix[m * 3 + d] = lanes.dmix[(m / PANEL * 3 + d) * PANEL + m % PANEL];
        }
    free(lanes.dz_hat), free(lanes.dq_hat), free(lanes.dmix);
}

static void vectors_dense(const problem *q, work *w) { lanes_dense(q, w, vectors_over_codes_panel); }
static void vectors_over_codes(const problem *q, results *r) { gradients(q, r, 1, PANEL, LOG2E, vectors_dense); }
static void short_loops_dense(const problem *q, work *w)
{
    w->x_sum = zeros(q->N);
    lanes_dense(q, w, short_loops_panel);
}
static void short_loops(const problem *q, results *r) { gradients(q, r, 1, PANEL, LOG2E, short_loops_dense); }

/* -- Late in training: rows near codes, tau small, D = 3 --------------------------------------------------------------
 *
 * A pi below 2^-41 changes no sum. Where codes have one is known before: a row's log-sum-exp gives its reach. */

/* A run of rows, gathered from anywhere, and what it gets of codes: sums of x q^ and of x, lane by lane. */
typedef struct late_run {
    float a[RUN * 3], dy[RUN * 3], start[RUN], offset[RUN];
    vf sums[RUN * 4];
    int64_t rows; /* even: filled up with a row of no probability */
} late_run;

static void gather_run(late_run *run, const work *w, const int32_t *row, int64_t count)
{
    memset(run, 0, sizeof *run);
    for (int64_t i = 0; i < count; i++) {
        memcpy(run->a + i * 3, w->a + row[i] * 3, sizeof(float) * 3);
        memcpy(run->dy + i * 3, w->dy + row[i] * 3, sizeof(float) * 3);
        run->start[i] = w->start[row[i]], run->offset[i] = w->offset[row[i]];
    }
    run->rows = count + count % 2;
    if (count % 2) run->start[count] = PADDING;
}

/* Lets a run meet a cell, whose gradients are at place `at` of dq_hat and dmix (cells,3,64). */
static void run_meets_cell(const late *l, late_run *run, int64_t cell, float *dq_hat, float *dmix)
{
    const narrow_run rows = {.z = run->a,
                             .dy = run->dy,
                             .start = run->start,
                             .mix_offset = run->offset,
                             .dhat = run->sums,
                             .rows = run->rows};
    for (int v = 0; v < PANEL; v += narrow_side(3) * VX_LANES) {
        const int64_t at = cell * PANEL * 3 + v;
        const narrow_codes codes = {.hat = l->hat + at, .raw = l->raw + at, .dhat = dq_hat + at, .dmix = dmix + at};
        narrow_backward(3, MIX, 0, &rows, &codes);
    }
}

/* Adds gradients by cell to w's, code by code. */
static void add_by_cell(const problem *q, work *w, const late *l, const float *dq_hat, const float *dmix)
{
    for (int64_t i = 0; i < q->M * 3; i++) {
        const int64_t to = l->near.cells.code[i / (3 * PANEL) * PANEL + i % PANEL] * 3 + i / PANEL % 3;
        w->dq_hat[to] += dq_hat[i], w->dmix[to] += dmix[i];
    }
}

/* Fills limits (N) with the rows' reaches. */
static float *reaches(const problem *q, const work *w, const late *l)
{
    float *limits = floats(q->N);
    for (int64_t n = 0; n < q->N; n++) limits[n] = reach(l, n, -w->start[n]);
    return limits;
}

/* Lets runs of rows meet the cells that one of their rows needs. */
static void runs_dense(const problem *q, work *w, int in_order)
{
    late l = new_late(q);
    const int64_t cells = l.near.cells.cell.count;
    float *limits = reaches(q, w, &l);
    int32_t *row = in_order ? rows_by_cell(q, &l) : take(q->N, sizeof *row);
    w->x_sum = zeros(q->N);
    for (int64_t n = 0; !in_order && n < q->N; n++) row[n] = (int32_t)n;
#pragma omp parallel
    {
        float *dq_hat = zeros(q->M * 3), *dmix = zeros(q->M * 3), *squares = floats(l.near.cells.cell.padded);
        uint8_t *within = take(cells, 1);
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < q->N; n += RUN) {
            late_run run;
            gather_run(&run, w, row + n, RUN);
            mark_cells(&l, row, n, RUN, limits, squares, within);
            for (int64_t j = 0; j < cells; j++)
                if (within[j]) run_meets_cell(&l, &run, j, dq_hat, dmix);
            for (int i = 0; i < RUN; i++) {
                for (int d = 0; d < 3; d++) w->dz_hat[row[n + i] * 3 + d] = vf_sum(run.sums[i * 4 + d]);
                w->x_sum[row[n + i]] = vf_sum(run.sums[i * 4 + 3]);
            }
        }
#pragma omp critical
        add_by_cell(q, w, &l, dq_hat, dmix);
        free(dq_hat), free(dmix), free(squares), free(within);
    }
    free(limits), free(row), free_late(&l);
}

/* Lists the cells in row n's reach. Returns their number. */
static int64_t list_row(const late *l, int64_t n, float limit, int groups, float *squares, int32_t *list)
{
    int64_t count = 0;
    if (groups) {
        for (int64_t i = 0; i < l->near.cells.group.padded; i += VX_LANES)
            vf_store(squares + i, box_distances(3, &l->near.cells.group, i, l->u + n * 3));
        return list_cells(3, &l->near, l->u + n * 3, squares, limit, list);
    }
    look_at_boxes(l, n, squares);
    for (int64_t j = 0; j < l->near.cells.cell.count; j++)
        if (squares[j] <= limit) list[count++] = (int32_t)j;
    return count;
}

/* Lets every cell meet the rows that need it. A pair of a row and a cell has a number; the numbers of a cell follow one
 * another. */
static void lists_dense(const problem *q, work *w, int groups)
{
    late l = new_late(q);
    const int64_t cells = l.near.cells.cell.count, most = cells + GROUP;
    float *limits = reaches(q, w, &l), *dq_hat = zeros(q->M * 3), *dmix = zeros(q->M * 3);
    int32_t *list = malloc(sizeof *list * (size_t)(q->N * most)), *count = take(q->N, sizeof *count),
            *first = take(cells + 2, sizeof *first);
#pragma omp parallel
    {
        float *squares = floats(l.near.cells.cell.padded + VX_LANES);
#pragma omp for schedule(dynamic, 64)
        for (int64_t n = 0; n < q->N; n++)
            count[n] = (int32_t)list_row(&l, n, limits[n], groups, squares, list + n * most);
        free(squares);
    }
    for (int64_t n = 0; n < q->N; n++)
        for (int32_t j = 0; j < count[n]; j++) first[list[n * most + j] + 2]++;
    for (int64_t j = 0; j < cells; j++) first[j + 2] += first[j + 1];
    int32_t *row = take(first[cells + 1], sizeof *row);
    float *part = floats((int64_t)first[cells + 1] * 4);
    w->x_sum = zeros(q->N);
    for (int64_t n = 0; n < q->N; n++)
        for (int32_t j = 0; j < count[n]; j++) {
            const int32_t number = first[list[n * most + j] + 1]++;
            row[number] = (int32_t)n, list[n * most + j] = number;
        }
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t j = 0; j < cells; j++)
        for (int64_t p = first[j]; p < first[j + 1]; p += RUN) {
            late_run run;
            gather_run(&run, w, row + p, vx_min64(RUN, first[j + 1] - p));
            run_meets_cell(&l, &run, j, dq_hat, dmix);
            for (int64_t i = 0; i < vx_min64(RUN, first[j + 1] - p) * 4; i++) part[p * 4 + i] = vf_sum(run.sums[i]);
        }
#pragma omp parallel for
    for (int64_t n = 0; n < q->N; n++)
        for (int32_t j = 0; j < count[n]; j++) {
            const float *sums = part + list[n * most + j] * 4;
            for (int d = 0; d < 3; d++) w->dz_hat[n * 3 + d] += sums[d];
            w->x_sum[n] += sums[3];
        }
    add_by_cell(q, w, &l, dq_hat, dmix);
    free(limits), free(dq_hat), free(dmix), free(list), free(count), free(first), free(row), free(part), free_late(&l);
}

/* Step 7. Runs of 48 rows as they come meet the cells that one of them needs. What 48 rows from anywhere need is
 * nearly everything, and 18 operations a box (0.28 O) have not saved it. (It is no slower than step 6: each thread has
 * its own gradient of the codebook again, and none waits for another.) */
static void runs_as_they_come_dense(const problem *q, work *w) { runs_dense(q, w, 0); }
static void runs_as_they_come(const problem *q, results *r)
{
    gradients(q, r, 1, PANEL, LOG2E, runs_as_they_come_dense);
}

/* Step 8. Rows in the order of their nearest cells, at a look at all boxes more: the run's rows need nearly the same.
 * It takes a fifth of step 6, and twice the prediction: rows come from all over memory. The bits depend on which
 * thread met which run, and a gradient of the codebook for each thread is memory that grows with them. */
static void runs_in_order_dense(const problem *q, work *w) { runs_dense(q, w, 1); }
static void runs_in_order(const problem *q, results *r) { gradients(q, r, 1, PANEL, LOG2E, runs_in_order_dense); }

/* Step 9. The other way round: every cell meets the rows that need it, in runs. No row meets more than it needs, no
 * order of rows is needed, and a cell's gradient is one thread's affair, summed in the order of the rows: the bits are
 * the same again. A pair of row and cell costs 150 operations to gather a row and to add up its sums: 19 O of the
 * share. It takes three times that: 400,000 pairs are numbered by one thread, and their sums, 6 MB, wait in memory to
 * be added up by row. At tau 0.1, where every pair is one, it is twice as slow as what it replaces, so the library
 * counts on a few rows first. */
static void rows_of_cells_dense(const problem *q, work *w) { lists_dense(q, w, 0); }
static void rows_of_cells(const problem *q, results *r) { gradients(q, r, 1, PANEL, LOG2E, rows_of_cells_dense); }

/* Step 10. Boxes of 16 boxes, as in assign.c. */
static void boxes_of_boxes_dense(const problem *q, work *w) { lists_dense(q, w, 1); }
static void boxes_of_boxes(const problem *q, results *r) { gradients(q, r, 1, PANEL, LOG2E, boxes_of_boxes_dense); }

/* Step 11. kernels/quantize/smooth_backward.c: chunks sized to the cache, and a chunk's sums kept in its own thread's
 * memory. Late in training it is step 10 with rows in segments, whose pairs all threads number and whose sums stay in
 * the cache: as fast as step 8, with the same bits for any number of threads; where boxes do not pay it is step 6. */
static void library(const problem *q, results *r)
{
    const int64_t N = q->N, D = q->D, M = q->M, K = q->K;
    const float one = 1;
    float *both = floats(2 * N);
    for (int64_t n = 0; n < N; n++) both[2 * n] = both[2 * n + 1] = r->lse[n];
    vx_tensor *dz = tensor(VX_F32, N, 1, D, 0), *dcodebook = tensor(VX_F32, 1, M, D, 0),
              *dlog_tau = tensor(VX_F32, 1, 0, 0, 0);
    vx_tensor *dy = tensor(VX_F32, N, 1, D, q->dy), *dreg = tensor(VX_F32, 1, 0, 0, &one),
              *y = tensor(VX_F32, N, 1, D, r->y);
    vx_tensor *codes = tensor(VX_I32, N, 1, 0, r->codes), *lse = tensor(VX_F32, N, 1, 2, both);
    vx_tensor *sumsq = tensor(VX_F32, N, 1, 0, 0), *near = tensor(VX_I32, 1, M, K, r->near),
              *z = tensor(VX_F32, N, 1, D, q->z);
    vx_tensor *codebook = tensor(VX_F32, 1, M, D, q->codebook), *log_tau = tensor(VX_F32, 1, 0, 0, q->log_tau);
    must(vx_smooth_backward(dz, dcodebook, dlog_tau, dy, dreg, y, codes, lse, sumsq, 0, near, 0, z, codebook, log_tau,
                            0, 0, VX_SOFTMAX, VX_REG_KNN_CE, 1, 1, VX_F32, 0, 0));
    read_out(dz, r->dz), read_out(dcodebook, r->dcodebook), read_out(dlog_tau, &r->dlog_tau);
    read_out(dy, 0), read_out(dreg, 0), read_out(y, 0), read_out(codes, 0), read_out(lse, 0), read_out(sumsq, 0);
    read_out(near, 0), read_out(z, 0), read_out(codebook, 0), read_out(log_tau, 0);
    free(both);
}

static void prepare(const problem *q, solution *exact, results *r, double share[3])
{
    reference_forward(q, exact);
    for (int64_t i = 0; i < q->N * q->D; i++) r->y[i] = (float)exact->y[i];
    for (int64_t n = 0; n < q->N; n++) r->lse[n] = (float)exact->lse[n], r->codes[n] = exact->codes[n];
    memcpy(r->near, exact->near, sizeof(int32_t) * (size_t)(q->M * q->K));
    reference_backward(q, exact, r->near);
    if (q->D != 3) return;
    late l = new_late(q);
    float *largest = floats(q->N);
    for (int64_t n = 0; n < q->N; n++) largest[n] = r->lse[n] * (float)LOG2E;
    count_shares(q, &l, RUN, largest, share);
    free(largest), free_late(&l);
}

static double check(const problem *q, solution *exact, const results *r, char *text)
{
    double worst = 0;
    worst = worse(relative_error(r->dz, exact->dz, q->N * q->D), 1e-4, "dz", worst, text);
    worst = worse(relative_error(r->dcodebook, exact->dcodebook, q->M * q->D), 1e-4, "dcodebook", worst, text);
    return worse(relative_error(&r->dlog_tau, &exact->dlog_tau, 1), 1e-3, "dlog_tau", worst, text);
}

static const step steps[] = {
    {"whole arrays", whole_arrays, .g = 22, .e = 5 * VX_LANES, .b = 32, .least = 1, .most = 1024},
    {"row by row", row_by_row, .g = 22, .e = 1, .o = 1, .least = 1, .most = 1024},
    {"tiles", tiles, .g = 5, .e = 1, .o = 1, .least = 1, .most = 1024},
    {"threads in line", threads_in_line, .g = 5, .e = 1, .o = 1, .least = 1, .most = 1024},
    {"vectors over codes", vectors_over_codes, .g = 5, .e = 1, .o = 1, .least = 3, .most = 3},
    {"short loops", short_loops, .g = 5, .e = 1, .o = 1, .least = 3, .most = 3},
    {"short loops", short_loops, .g = 5, .e = 1, .o = 1, .least = 3, .most = 3, .when = LATE},
    {"boxes, runs of rows", runs_as_they_come, .g = 5, .e = 1, .o = 1, .share = 'p', .fixed = 0.3, .least = 3,
     .most = 3, .when = LATE},
    {"rows in order", runs_in_order, .g = 5, .e = 1, .o = 1, .share = 'q', .fixed = 0.6, .least = 3, .most = 3,
     .when = LATE},
    {"the rows of each cell", rows_of_cells, .g = 5, .e = 1, .o = 20, .share = 's', .fixed = 0.3, .least = 3, .most = 3,
     .when = LATE},
    {"boxes of boxes", boxes_of_boxes, .g = 5, .e = 1, .o = 20, .share = 's', .fixed = 0.1, .least = 3, .most = 3,
     .when = LATE},
    {"the library", library, .g = 5, .e = 1, .o = 1, .least = 1, .most = 1024},
    {"the library", library, .g = 5, .e = 1, .o = 20, .share = 's', .fixed = 0.3, .least = 3, .most = 3, .when = LATE},
};

int main(int argc, char **argv)
{
    static const lab l = {"Smoothed quantizer, softmax and knn-ce, backward",
                          steps,
                          sizeof steps / sizeof *steps,
                          .g = 5,
                          .e = 1,
                          .prepare = prepare,
                          .check = check};
    return run_lab(&l, argc, argv);
}
