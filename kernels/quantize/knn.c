/* knn.c: nearest neighbours: of the simplex's vertices among the rows of p (Eq. 13), and of rows among rows.
 *
 * Both keep, per anchor, the K best candidates in a list ordered as neighbours.h says, so that the result is exact:
 * ties go to the lowest row, and neither the number of threads nor the order of the work shows.
 *
 *   vertex_knn   a key per row and vertex: p itself, or its logarithm (cross-entropy); or minus |e_m - p|^2 =
 *                1 - 2 p_m + |p|^2, summed in double because near a vertex everything cancels. Reads p once, sixteen
 *                columns (a cache line) at a time.
 *   knn          squared distances as sums of (x - y)^2 and not as |x|^2 - 2 x y + |y|^2, which would lose a distance
 *                below 3e-4 |x|; very large and very small rows are scaled before (frame.h), and those whose nearest
 *                squares are SMALL then are compared in double; 6 rows against a tile of
 *                columns in registers, 24 rows per visit of a tile, as in assign.c. 2 N L D subtractions and
 *                multiply-adds; working space L D floats, shared, and 24 K entries a thread.
 *
 * A key enters a list where it passes the list's threshold, its K-th key so far: every key must exceed -inf, and a row
 * of p whose squares overflow float32 is an error. Training does not come here: the smoothed quantizer selects while
 * its logits are in the cache (smooth_select.h).
 */
#include <float.h>
#include <omp.h>

#include "frame.h"
#include "shared/checks.h"
#include "shared/neighbours.h"
#include "cpu/indices.h"
#include "cpu/row_norms.h"
#include "cpu/scratch.h"

/* -- Vertices ------------------------------------------------------------------------------------------------------ */

enum { LINE = 16 /* columns a thread takes at once */ };

typedef struct vertex_call {
    int64_t N, M, K;
    int metric, log;
    const float *p;
    const double *sumsq; /* (N) |p_n|^2, under VX_KNN_L2 */
} vertex_call;

/* Returns p[n][m] itself. */
static inline double point(const vertex_call *c, int64_t n, int64_t m)
{
    float x = c->p[n * c->M + m];
    return c->log ? exp((double)x) : x;
}

/* Returns keys of row n for vertices m .. m + count - 1: the largest is the nearest row's. */
static inline vf vertex_keys(const vertex_call *c, int64_t n, int64_t m, int count)
{
    vf x = vf_load_n(c->p + n * c->M + m, count);
    if (c->metric == VX_KNN_CE) return x;
    for (int l = 0; l < count; l++) x[l] = (float)(2 * point(c, n, m + l) - 1 - c->sumsq[n]);
    return x;
}

/* Fills the lists of LINE vertices from `first` on. */
static void nearest_to_vertices(const vertex_call *c, int64_t first, uint64_t *lists)
{
    int64_t columns = vx_min64(LINE, c->M - first);
    float threshold[LINE + VX_LANES];
    for (int i = 0; i < LINE + VX_LANES; i++) threshold[i] = i < columns ? -INFINITY : INFINITY;
    for (int64_t i = 0; i < columns * c->K; i++) lists[i] = neighbour_none();
    for (int64_t n = 0; n < c->N; n++)
        for (int64_t i = 0; i < columns; i += VX_LANES) {
            vf key = vertex_keys(c, n, first + i, (int)vx_min64(VX_LANES, columns - i));
            for (uint32_t bits = vf_greater_bits(key, vf_load(threshold + i)); bits; bits &= bits - 1) {
                int l = __builtin_ctz(bits);
                threshold[i + l] = neighbour_insert(lists + (i + l) * c->K, c->K, neighbour_pack(key[l], n));
            }
        }
}

/* Returns how far row n deviates from vertex m. */
static float deviation_of(const vertex_call *c, int64_t n, int64_t m)
{
    if (c->metric == VX_KNN_L2) return (float)(1 - 2 * point(c, n, m) + c->sumsq[n]);
    float x = c->p[n * c->M + m];
    return c->log ? -x : -logf(x > FLT_MIN ? x : FLT_MIN);
}

/* Finds near (M,K) and deviation (M,K) in p (N,M). A p below 2^-126 counts as 2^-126 under VX_KNN_CE: -log p is 87.3
 * there. */
int VX_CPU(vertex_knn)(vx_tensor *near, vx_tensor *deviation, vx_tensor *p, int metric, int log)
{
    vertex_call c = {p->shape[0], p->shape[1], near->shape[1], metric, log, vx_f32(p), 0};
    if (check_rows("vertex_knn", c.N)) return VX_EINVAL;
    if (!c.M) return VX_OK;
    int64_t bad = first_nonfinite(c.p, c.N, c.M, 0);
    if (bad >= 0) return vx_fail(VX_ENONFINITE, "vertex_knn: row %lld of p holds a NaN or Inf", (long long)bad);
    double *sumsq = 0;
    uint64_t *lists = 0;
    scratch memory = {.op = "vertex_knn"};
    while (scratch_pass(&memory)) {
        sumsq = carve_f64(&memory, c.N);
        lists = carve_u64(&memory, LINE * c.K * omp_get_max_threads());
    }
    if (!memory.base) return VX_ENOMEM;
    c.sumsq = sumsq;
    if (metric == VX_KNN_L2) {
        bad = INT64_MAX;
#pragma omp parallel for schedule(static) reduction(min : bad)
        for (int64_t n = 0; n < c.N; n++) {
            double sum = 0;
            for (int64_t m = 0; m < c.M; m++) sum += point(&c, n, m) * point(&c, n, m);
            sumsq[n] = sum;
            if (!(sum < LARGEST_SUMSQ)) bad = vx_min64(bad, n);
        }
        if (bad != INT64_MAX) {
            scratch_free(&memory);
            return vx_fail(VX_ENONFINITE, "vertex_knn: row %lld of p is no distribution: its squares overflow float32",
                           (long long)bad);
        }
    }
    int32_t *rows = vx_i32(near);
    float *deviations = vx_f32(deviation);
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < c.M; first += LINE) {
        uint64_t *list = lists + LINE * c.K * omp_get_thread_num();
        nearest_to_vertices(&c, first, list);
        for (int64_t i = 0; i < vx_min64(LINE, c.M - first) * c.K; i++) {
            int64_t at = first * c.K + i, n = neighbour_row(list[i]);
            rows[at] = (int32_t)n;
            deviations[at] = deviation_of(&c, n, at / c.K);
        }
    }
    scratch_free(&memory);
    return VX_OK;
}

/* Computes dp (N,M). The selection has no gradient; a deviation's reaches p_m alone (cross-entropy) or the whole
 * row. */
int VX_CPU(vertex_knn_backward)(vx_tensor *dp, vx_tensor *ddeviation, vx_tensor *near, vx_tensor *p, int metric,
                                int log)
{
    vertex_call c = {p->shape[0], p->shape[1], near->shape[1], metric, log, vx_f32(p), 0};
    const float *g = vx_f32(ddeviation);
    const int32_t *rows = vx_i32(near);
    float *out = vx_f32(dp);
    int status = check_indices("vertex_knn_backward", "neighbour", rows, c.M, c.K, c.N);
    if (status) return status;
    if (metric == VX_KNN_CE) {
        memset(out, 0, sizeof(float) * (size_t)(c.N * c.M));
        for (int64_t i = 0; i < c.M * c.K; i++) {
            int64_t at = rows[i] * c.M + i / c.K;
            out[at] -= log ? g[i] : c.p[at] > FLT_MIN ? g[i] / c.p[at] : g[i] / FLT_MIN;
        }
        return VX_OK;
    }
    double *weight = vx_scratch("vertex_knn_backward", sizeof(double) * (size_t)c.N);
    if (!weight) return VX_ENOMEM;
    memset(weight, 0, sizeof(double) * (size_t)c.N);
    for (int64_t i = 0; i < c.M * c.K; i++) weight[rows[i]] += 2 * (double)g[i];
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < c.N; n++)
        for (int64_t m = 0; m < c.M; m++) {
            double x = point(&c, n, m);
            out[n * c.M + m] = (float)(weight[n] * x * (log ? x : 1));
        }
    for (int64_t i = 0; i < c.M * c.K; i++) {
        int64_t m = i / c.K;
        out[rows[i] * c.M + m] -= (float)(2 * g[i] * (log ? point(&c, rows[i], m) : 1));
    }
    vx_scratch_free(weight);
    return VX_OK;
}

/* -- Rows ---------------------------------------------------------------------------------------------------------- */

#if VX_LANES == 16
enum { TILE_ROWS = 6, VECTORS = 4 };
#else
enum { TILE_ROWS = 6, VECTORS = 2 };
#endif
enum { TILE_COLUMNS = VECTORS * VX_LANES, BLOCK_ROWS = 4 * TILE_ROWS };

#define SMALL 0x1p-100f /* squared distance, of rows scaled to 1, below which differences may have vanished */

typedef struct rows_call {
    int64_t N, L, D, K, tiles;
    int exclude_self;
    float scale;
    const float *x, *y;
    const float *columns; /* (tiles, D, TILE_COLUMNS) of y, scaled, +inf beyond its rows */
} rows_call;

/* Finds the neighbours of row n in double: of data that are scaled, squares of small differences vanish. */
static void nearest_in_double(const rows_call *c, int64_t n, int32_t *near, float *distance)
{
    double least[c->K];
    int64_t found = 0;
    for (int64_t l = 0; l < c->L; l++) {
        if (c->exclude_self && l == n) continue;
        double square = 0;
        for (int64_t d = 0; d < c->D; d++) {
            const double difference = (double)c->x[n * c->D + d] - c->y[l * c->D + d];
            square += difference * difference;
        }
        if (found == c->K && !(square < least[c->K - 1])) continue;
        int64_t k = found < c->K ? found++ : c->K - 1;
        for (; k > 0 && square < least[k - 1]; k--) least[k] = least[k - 1], near[k] = near[k - 1];
        least[k] = square, near[k] = (int32_t)l;
    }
    for (int64_t k = 0; k < c->K; k++) distance[k] = (float)least[k];
}

/* Lets rows i .. i + TILE_ROWS - 1 of a (BLOCK_ROWS, D), which are rows first + i .. of x, meet a tile. */
static void meet_tile(const rows_call *c, const float *a, int64_t first, int i, int rows, int64_t tile, float *limit,
                      uint64_t *lists)
{
    vf sum[TILE_ROWS][VECTORS];
    for (int r = 0; r < TILE_ROWS; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = vf_zero();
    const float *column = c->columns + tile * TILE_COLUMNS * c->D;
    for (int64_t d = 0; d < c->D; d++, column += TILE_COLUMNS)
#pragma GCC unroll 6
        for (int r = 0; r < TILE_ROWS; r++) {
            vf x = vf_set1(a[(i + r) * c->D + d]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                vf difference = x - vf_load(column + v * VX_LANES);
                sum[r][v] += difference * difference;
            }
        }
    for (int r = 0; r < TILE_ROWS && i + r < rows; r++)
        for (int v = 0; v < VECTORS; v++)
            for (uint32_t bits = vf_greater_bits(-sum[r][v], vf_set1(limit[i + r])); bits; bits &= bits - 1) {
                int l = __builtin_ctz(bits);
                int64_t row = tile * TILE_COLUMNS + v * VX_LANES + l;
                if (c->exclude_self && row == first + i + r) continue;
                limit[i + r] = neighbour_insert(lists + (i + r) * c->K, c->K, neighbour_pack(-sum[r][v][l], row));
            }
}

/* Finds the neighbours of BLOCK_ROWS rows from row `first` on; a (BLOCK_ROWS, D) and lists (BLOCK_ROWS, K): working
 * space. */
static void nearest_to_rows(const rows_call *c, int64_t first, float *a, uint64_t *lists, int32_t *near,
                            float *distance)
{
    const int rows = (int)vx_min64(BLOCK_ROWS, c->N - first);
    float limit[BLOCK_ROWS];
    for (int i = 0; i < BLOCK_ROWS; i++) {
        const float *x = c->x + (first + (i < rows ? i : 0)) * c->D;
        for (int64_t d = 0; d < c->D; d++) a[i * c->D + d] = x[d] * c->scale;
        limit[i] = -INFINITY;
    }
    for (int64_t i = 0; i < rows * c->K; i++) lists[i] = neighbour_none();
    for (int64_t tile = 0; tile < c->tiles; tile++)
        for (int i = 0; i < rows; i += TILE_ROWS) meet_tile(c, a, first, i, rows, tile, limit, lists);
    for (int64_t i = 0; i < rows * c->K; i++) {
        near[first * c->K + i] = (int32_t)neighbour_row(lists[i]);
        distance[first * c->K + i] = -neighbour_key(lists[i]) / c->scale / c->scale;
    }
    for (int64_t i = 0; c->scale != 1 && i < rows; i++)
        if (-neighbour_key(lists[i * c->K]) < SMALL)
            nearest_in_double(c, first + i, near + (first + i) * c->K, distance + (first + i) * c->K);
}

/* Finds near (N,K) and distance (N,K), squared, of x (N,D) among y (L,D). */
int VX_CPU(knn)(vx_tensor *near, vx_tensor *distance, vx_tensor *x, vx_tensor *y, int exclude_self)
{
    rows_call c = {.N = x->shape[0],
                   .L = y->shape[0],
                   .D = x->shape[1],
                   .K = near->shape[1],
                   .exclude_self = exclude_self,
                   .x = vx_f32(x),
                   .y = vx_f32(y)};
    if (check_rows("knn", c.L)) return VX_EINVAL;
    c.tiles = vx_ceil_div(c.L, TILE_COLUMNS);
    int64_t bad = first_nonfinite(c.x, c.N, c.D, 0), bad_y = first_nonfinite(vx_f32(y), c.L, c.D, 0);
    if (bad >= 0 || bad_y >= 0)
        return vx_fail(VX_ENONFINITE, "knn: row %lld of %s holds a NaN or Inf", (long long)(bad >= 0 ? bad : bad_y),
                       bad >= 0 ? "x" : "y");
    c.scale = frame_scale(fmaxf(largest_of(c.x, c.N * c.D), largest_of(vx_f32(y), c.L * c.D)));
    const int64_t block = BLOCK_ROWS * c.D, list = BLOCK_ROWS * c.K, threads = omp_get_max_threads();
    uint64_t *lists = 0;
    float *packed = 0, *blocks = 0;
    scratch memory = {.op = "knn"};
    while (scratch_pass(&memory)) {
        lists = carve_u64(&memory, list * threads);
        packed = carve_f32(&memory, c.tiles * TILE_COLUMNS * c.D);
        blocks = carve_f32(&memory, block * threads);
    }
    if (!memory.base) return VX_ENOMEM;
    c.columns = packed;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t l = 0; l < c.tiles * TILE_COLUMNS; l++)
            for (int64_t d = 0; d < c.D; d++)
                packed[(l / TILE_COLUMNS * c.D + d) * TILE_COLUMNS + l % TILE_COLUMNS] =
                    l < c.L ? vx_f32(y)[l * c.D + d] * c.scale : INFINITY;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < c.N; first += BLOCK_ROWS)
            nearest_to_rows(&c, first, blocks + block * omp_get_thread_num(), lists + list * omp_get_thread_num(),
                            vx_i32(near), vx_f32(distance));
    }
    scratch_free(&memory);
    return VX_OK;
}

/* Computes dx (N,D) and dy (L,D): d |x - y|^2 = 2 (x - y) (dx - dy). A thread has some columns of all rows, so that
 * each element of dy is summed in the order of the rows of x. */
int VX_CPU(knn_backward)(vx_tensor *dx, vx_tensor *dy, vx_tensor *ddistance, vx_tensor *near, vx_tensor *x,
                         vx_tensor *y)
{
    const int64_t N = x->shape[0], L = y->shape[0], D = x->shape[1], K = near->shape[1];
    const float *g = vx_f32(ddistance), *a = vx_f32(x), *b = vx_f32(y);
    const int32_t *rows = vx_i32(near);
    float *da = vx_f32(dx), *db = vx_f32(dy);
    int status = check_indices("knn_backward", "neighbour", rows, N, K, L);
    if (status) return status;
    memset(da, 0, sizeof(float) * (size_t)(N * D));
    memset(db, 0, sizeof(float) * (size_t)(L * D));
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < D; first += LINE)
        for (int64_t i = 0; i < N * K; i++) {
            const int64_t n = i / K * D, l = rows[i] * D;
            for (int64_t d = first; d < vx_min64(first + LINE, D); d++) {
                float slope = 2 * g[i] * (a[n + d] - b[l + d]);
                da[n + d] += slope;
                db[l + d] -= slope;
            }
        }
    return VX_OK;
}
