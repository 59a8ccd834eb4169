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

#include "quantize/smooth_narrow.h"
#include "lab.h"

/* What every step is given and what it makes. Padded rows are Dp floats. */
typedef struct work {
    int64_t Dp;
    const float *hat, *raw, *hat_panels,
        *raw_panels;             /* codes (M,Dp) on the sphere and as stored, and in panels of 64 (or M) */
    const float *a, *dy;         /* (N,Dp) rows on the sphere times unit / tau; dL/dy */
    const float *start, *offset; /* (N) minus the log-sum-exp; c count_n - <dy_n, y_n> */
    float *dz_hat;               /* (N,Dp) */
    float *dq_hat, *dmix;        /* (M,Dp): the sums with a and dy */
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
    const float c = 1 / (float)(M * K), scale = (float)(unit / 0.1);
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
    work w = {Dp, hat, raw, hat_panels, raw_panels, a, dy, start, offset, zeros(N * Dp), zeros(M * Dp), zeros(M * Dp)};
    dense(q, &w);
    for (int64_t j = 0; j < M * K; j++) {
        const int64_t m = j / K, n = r->near[j];
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
            r->dz[n * D + d] = (float)((w.dz_hat[n * Dp + d] - along * a[n * Dp + d] / scale) / (0.1 * norm));
        dlog_tau -= along / 0.1;
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
    free(dy), free(w.dz_hat), free(w.dq_hat), free(w.dmix);
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
                float *sum = w->dz_hat + (i * 3 + d) * VX_LANES;
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
        vf sums[RUN * 4];
        for (int j = 0; j < RUN; j++)
            for (int d = 0; d < 4; d++)
                sums[j * 4 + d] = d < 3 ? vf_load(w->dz_hat + ((i + j) * 3 + d) * VX_LANES) : vf_zero();
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
        for (int j = 0; j < RUN; j++)
            for (int d = 0; d < 3; d++) vf_store(w->dz_hat + ((i + j) * 3 + d) * VX_LANES, sums[j * 4 + d]);
    }
}

/* Frame of steps 5 and 6: the rows' sums lane by lane (N, 3, lanes), the codes' gradients in panels (M / 64, 3, 64). */
static void lanes_dense(const problem *q, work *w, panel_function *meet)
{
    work lanes = *w;
    lanes.dz_hat = zeros(q->N * 3 * VX_LANES), lanes.dq_hat = zeros(q->M * 3), lanes.dmix = zeros(q->M * 3);
    in_line(q, &lanes, meet);
    for (int64_t i = 0; i < q->N * 3; i++) w->dz_hat[i] = vf_sum(vf_load(lanes.dz_hat + i * VX_LANES));
    for (int64_t m = 0; m < q->M; m++)
        for (int64_t d = 0; d < 3; d++) {
            w->dq_hat[m * 3 + d] = lanes.dq_hat[(m / PANEL * 3 + d) * PANEL + m % PANEL];
            w->dmix[m * 3 + d] = lanes.dmix[(m / PANEL * 3 + d) * PANEL + m % PANEL];
        }
    free(lanes.dz_hat), free(lanes.dq_hat), free(lanes.dmix);
}

static void vectors_dense(const problem *q, work *w) { lanes_dense(q, w, vectors_over_codes_panel); }
static void vectors_over_codes(const problem *q, results *r) { gradients(q, r, 1, PANEL, LOG2E, vectors_dense); }
static void short_loops_dense(const problem *q, work *w) { lanes_dense(q, w, short_loops_panel); }
static void short_loops(const problem *q, results *r) { gradients(q, r, 1, PANEL, LOG2E, short_loops_dense); }

/* Step 7. kernels/quantize/smooth_backward.c: chunks sized to the cache, and a chunk's sums kept in its own thread's
 * memory. */
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

static void prepare(const problem *q, solution *exact, results *r)
{
    reference_forward(q, exact);
    for (int64_t i = 0; i < q->N * q->D; i++) r->y[i] = (float)exact->y[i];
    for (int64_t n = 0; n < q->N; n++) r->lse[n] = (float)exact->lse[n], r->codes[n] = exact->codes[n];
    memcpy(r->near, exact->near, sizeof(int32_t) * (size_t)(q->M * q->K));
    reference_backward(q, exact, r->near);
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
    {"the library", library, .g = 5, .e = 1, .o = 1, .least = 1, .most = 1024},
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
