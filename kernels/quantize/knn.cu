/* knn.cu: nearest neighbours on CUDA; what is computed, ties included, is said in knn.c. Exact, and simple rather than
 * fast:
 *
 *   vertex_knn   K rounds over the columns of p, each finding a column's largest key below the one before. Reads p K
 *                times.
 *   knn          Squared distances of some rows of x to all of y, 64 x 64 tiles, as many as fit 64 MB; then K rounds
 *                over each row of them, likewise. 2 N L D subtractions and multiply-adds, and N L K comparisons.
 *   backward     Sums over the neighbours of a row are taken in the order of a stable sort by row (sort.cuh).
 *
 * A key packs value and row as in neighbours.h, so that all keys differ and ties go to the lowest row. A NaN or Inf is
 * reported late.
 */
#include <float.h>

#include "frame.h"
#include "largest.cuh"
#include "shared/checks.h"
#include "shared/neighbours.h"
#include "cuda/sort.cuh"

enum { BLOCK = 256, TILE = 64, DEPTH = 16 };
static const int64_t DISTANCES = INT64_C(16) << 20; /* squared distances held at a time, 4 bytes each */

VX_KERNEL finite_kernel(const float *x, int64_t count, vx_data_check nonfinite)
{
    for (int64_t i = vx_first(); i < count; i += vx_step())
        if ((__float_as_uint(x[i]) & 0x7f800000u) == 0x7f800000u) vx_report(nonfinite, i);
}

/* -- Vertices ------------------------------------------------------------------------------------------------------ */

typedef struct vertex_call {
    int64_t N, M, K;
    int metric, log;
    const float *p;
    double *sumsq; /* (N) |p_n|^2, under VX_KNN_L2 */
} vertex_call;

VX_DEVICE double point(const vertex_call &c, int64_t n, int64_t m)
{
    const float x = c.p[n * c.M + m];
    return c.log ? exp((double)x) : x;
}

/* Makes sumsq (N) = |p_n|^2. A warp for each row. */
VX_KERNEL vertex_sumsq_kernel(vertex_call c, vx_data_check overflow)
{
    for (int64_t n = vx_first() / 32; n < c.N; n += vx_step() / 32) {
        double sum = 0;
        for (int64_t m = threadIdx.x % 32; m < c.M; m += 32) sum += point(c, n, m) * point(c, n, m);
        sum = vx_warp_sum(sum);
        if (threadIdx.x % 32 == 0) {
            c.sumsq[n] = sum;
            if (!(sum < LARGEST_SUMSQ)) vx_report(overflow, n);
        }
    }
}

/* Returns a key that is largest for the row nearest to the vertex. */
VX_DEVICE float vertex_key(const vertex_call &c, int64_t n, int64_t m)
{
    return c.metric == VX_KNN_CE ? c.p[n * c.M + m] : (float)(2 * point(c, n, m) - 1 - c.sumsq[n]);
}

VX_DEVICE float deviation_of(const vertex_call &c, int64_t n, int64_t m)
{
    if (c.metric == VX_KNN_L2) return (float)(1 - 2 * point(c, n, m) + c.sumsq[n]);
    const float x = c.p[n * c.M + m];
    return c.log ? -x : -logf(fmaxf(x, FLT_MIN));
}

/* Finds the K nearest rows of each vertex. A block takes `width` neighbouring columns, a power of two; the BLOCK /
 * width threads of a column share its rows. */
VX_KERNEL vertex_knn_kernel(int32_t *near, float *deviation, vertex_call c, int width)
{
    __shared__ unsigned long long best[BLOCK];
    const int at = threadIdx.x % width, lane = threadIdx.x / width, lanes = BLOCK / width;
    for (int64_t first = (int64_t)blockIdx.x * width; first < c.M; first += (int64_t)gridDim.x * width) {
        const int64_t m = first + at;
        unsigned long long last = ~0ull;
        for (int64_t k = 0; k < c.K; k++) {
            unsigned long long mine = 0;
            for (int64_t n = lane; n < c.N && m < c.M; n += lanes) {
                const unsigned long long key = neighbour_pack(vertex_key(c, n, m), n);
                if (key < last && key > mine) mine = key;
            }
            best[threadIdx.x] = mine;
            __syncthreads();
            for (int i = lanes / 2; i > 0; i >>= 1) {
                if (lane < i) best[threadIdx.x] = max(best[threadIdx.x], best[threadIdx.x + i * width]);
                __syncthreads();
            }
            last = best[at];
            __syncthreads();
            if (lane == 0 && m < c.M) {
                const int32_t n = neighbour_row(last);
                near[m * c.K + k] = n;
                deviation[m * c.K + k] = deviation_of(c, n, m);
            }
        }
    }
}

static vertex_call vertex_call_of(const vx_tensor *p, const vx_tensor *near, int metric, int log)
{
    vertex_call c = {p->shape[0], p->shape[1], near->shape[1], metric, log, vx_f32(p), NULL};
    return c;
}

int vx_cuda_vertex_knn(vx_tensor *near, vx_tensor *deviation, vx_tensor *p, int metric, int log)
{
    vertex_call c = vertex_call_of(p, near, metric, log);
    if (check_rows("vertex_knn", c.N)) return VX_EINVAL;
    if (!c.M) return VX_OK;
    const vx_data_check nonfinite = vx_data_check_of(VX_ENONFINITE, c.M, "row %%lld of p holds a NaN or Inf");
    const vx_data_check overflow =
        vx_data_check_of(VX_ENONFINITE, 1, "row %%lld of p is no distribution: its squares overflow float32");
    if (metric == VX_KNN_L2) c.sumsq = VX_SCRATCH(double, c.N);
    const int width = vx_columns_for(c.M);
    VX_LAUNCH(finite_kernel, vx_grid(p->numel, BLOCK), BLOCK, 0, c.p, p->numel, nonfinite);
    if (metric == VX_KNN_L2) VX_LAUNCH(vertex_sumsq_kernel, vx_grid(c.N * 32, BLOCK), BLOCK, 0, c, overflow);
    VX_LAUNCH(vertex_knn_kernel, vx_grid(c.M, width), BLOCK, 0, vx_i32(near), vx_f32(deviation), c, width);
    return vx_status();
}

/* Makes dp for -log p. A thread has one vertex, and with it a column of dp of its own. */
VX_KERNEL vertex_ce_backward_kernel(float *dp, const float *g, const int32_t *near, vertex_call c,
                                    vx_data_check outside)
{
    for (int64_t m = vx_first(); m < c.M; m += vx_step())
        for (int64_t i = m * c.K; i < (m + 1) * c.K; i++) {
            const int32_t n = near[i];
            if (n < 0 || n >= c.N) vx_report(outside, i);
            else dp[n * c.M + m] -= c.log ? g[i] : g[i] / fmaxf(c.p[n * c.M + m], FLT_MIN);
        }
}

/* Makes dp for |e_m - p|^2. A warp has one row; the entries of its run, found by bisection, say by how much the whole
 * row counts. */
VX_KERNEL vertex_l2_backward_kernel(float *dp, const float *g, const unsigned long long *entries, int64_t count,
                                    vertex_call c)
{
    const int lane = threadIdx.x % 32;
    for (int64_t n = vx_first() / 32; n < c.N; n += vx_step() / 32) {
        int64_t begin = 0, end = count;
        while (begin < end) {
            const int64_t middle = (begin + end) / 2;
            if (vx_sort_key(entries[middle]) < n) begin = middle + 1;
            else end = middle;
        }
        double weight = 0;
        for (int64_t i = begin + lane; i < count && vx_sort_key(entries[i]) == n; i += 32)
            weight += 2 * (double)g[vx_sort_index(entries[i])];
        weight = vx_warp_sum(weight);
        for (int64_t m = lane; m < c.M; m += 32) {
            const double x = point(c, n, m);
            dp[n * c.M + m] = (float)(weight * x * (c.log ? x : 1));
        }
    }
}

/* Then takes off what the vertex's own coordinate counts less. A thread has one vertex. */
VX_KERNEL vertex_l2_own_kernel(float *dp, const float *g, const int32_t *near, vertex_call c)
{
    for (int64_t m = vx_first(); m < c.M; m += vx_step())
        for (int64_t i = m * c.K; i < (m + 1) * c.K; i++) {
            const int32_t n = near[i];
            if (n >= 0 && n < c.N) dp[n * c.M + m] -= (float)(2 * g[i] * (c.log ? point(c, n, m) : 1));
        }
}

static vx_data_check outside_of(int64_t K, const char *of, int64_t rows)
{
    return vx_data_check_of(VX_EINVAL, K, "near (%%lld,%%lld) is no row of %s, which has rows 0 .. %lld", of,
                            (long long)rows - 1);
}

/* Working space: 16 M K bytes under VX_KNN_L2. */
int vx_cuda_vertex_knn_backward(vx_tensor *dp, vx_tensor *ddeviation, vx_tensor *near, vx_tensor *p, int metric,
                                int log)
{
    const vertex_call c = vertex_call_of(p, near, metric, log);
    const int64_t count = near->numel;
    const float *g = vx_f32(ddeviation);
    if (!p->numel) return VX_OK;
    const vx_data_check outside = outside_of(c.K, "p", c.N);
    if (metric == VX_KNN_CE) {
        VX_CUDA(cudaMemsetAsync(dp->data, 0, sizeof(float) * (size_t)dp->numel, vx_stream()));
        VX_LAUNCH(vertex_ce_backward_kernel, vx_grid(c.M, BLOCK), BLOCK, 0, vx_f32(dp), g, vx_i32(near), c, outside);
        return vx_status();
    }
    vx_sort s = vx_sort_of(count, vx_sort_bits(c.N + 1));
    vx_sort_keys(&s, vx_i32(near), c.N, outside);
    vx_sort_run(&s);
    VX_LAUNCH(vertex_l2_backward_kernel, vx_grid(c.N * 32, BLOCK), BLOCK, 0, vx_f32(dp), g, s.entries, count, c);
    VX_LAUNCH(vertex_l2_own_kernel, vx_grid(c.M, BLOCK), BLOCK, 0, vx_f32(dp), g, vx_i32(near), c);
    return vx_status();
}

/* -- Rows ---------------------------------------------------------------------------------------------------------- */

typedef struct rows_call {
    int64_t N, L, D, K;
    int exclude_self;
    const float *x, *y;
    const uint32_t *largest; /* bits of the largest |x| or |y|, which decides how both are scaled */
} rows_call;

/* Makes distance (rows,L) of rows first .. of x. A block has 64 x 64 of them, a thread 4 x 4. Depth is added in
 * ascending order, as on the CPU. */
VX_KERNEL __launch_bounds__(BLOCK) distance_kernel(float *distance, rows_call c, int64_t first, int64_t rows)
{
    __shared__ float a[TILE][DEPTH + 1], b[TILE][DEPTH + 1];
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const int64_t row = (int64_t)blockIdx.y * TILE, column = (int64_t)blockIdx.x * TILE;
    const float scale = frame_scale(__uint_as_float(*c.largest));
    float sum[4][4] = {};
    for (int64_t from = 0; from < c.D; from += DEPTH) {
        for (int i = threadIdx.x; i < TILE * DEPTH; i += BLOCK) {
            const int r = i / DEPTH, d = i % DEPTH;
            a[r][d] = row + r < rows && from + d < c.D ? c.x[(first + row + r) * c.D + from + d] * scale : 0;
            b[r][d] = column + r < c.L && from + d < c.D ? c.y[(column + r) * c.D + from + d] * scale : 0;
        }
        __syncthreads();
        for (int d = 0; d < DEPTH; d++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float difference = a[ty + 16 * i][d] - b[tx + 16 * j][d];
                    sum[i][j] += difference * difference;
                }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (row + ty + 16 * i < rows && column + tx + 16 * j < c.L)
                distance[(row + ty + 16 * i) * c.L + column + tx + 16 * j] = sum[i][j];
}

/* Returns what distances are multiplied by, not squared, where rows are scaled; 0 where they are not. */
VX_DEVICE float far_factor(const rows_call &c)
{
    const float scale = frame_scale(__uint_as_float(*c.largest));
    return scale == 1 ? 0 : scale < 1 ? 0x1p-8f : 0x1p24f;
}

/* Where rows are scaled, makes distance (rows,L) again, in double and as its root: squares of small differences
 * vanish. */
VX_KERNEL far_distance_kernel(float *distance, rows_call c, int64_t first, int64_t rows)
{
    const float factor = far_factor(c);
    for (int64_t i = vx_first(); factor && i < rows * c.L; i += vx_step()) {
        const float *a = c.x + (first + i / c.L) * c.D, *b = c.y + i % c.L * c.D;
        double sum = 0;
        for (int64_t d = 0; d < c.D; d++) sum += ((double)a[d] - b[d]) * ((double)a[d] - b[d]);
        distance[i] = (float)(sqrt(sum) * factor);
    }
}

/* Finds the K nearest rows of y in each row of distances. A block for each. */
VX_KERNEL nearest_kernel(int32_t *near, float *nearest, const float *distance, rows_call c, int64_t first, int64_t rows)
{
    __shared__ unsigned long long shared[32];
    const float factor = far_factor(c);
    for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
        unsigned long long last = 0; /* complemented keys, so that vx_block_min finds the largest */
        for (int64_t k = 0; k < c.K; k++) {
            unsigned long long mine = ~0ull;
            for (int64_t l = threadIdx.x; l < c.L; l += BLOCK) {
                const unsigned long long key = ~neighbour_pack(-distance[r * c.L + l], l);
                if ((k == 0 || key > last) && key < mine && !(c.exclude_self && l == first + r)) mine = key;
            }
            last = vx_block_min(mine, shared);
            __syncthreads();
            if (threadIdx.x == 0) {
                const int32_t l = neighbour_row(~last);
                near[(first + r) * c.K + k] = l;
                const float d = factor ? distance[r * c.L + l] / factor : distance[r * c.L + l];
                nearest[(first + r) * c.K + k] = factor ? d * d : d;
            }
        }
    }
}

/* Working space: at most 64 MB, or 4 L bytes where that is more. */
int vx_cuda_knn(vx_tensor *near, vx_tensor *distance, vx_tensor *x, vx_tensor *y, int exclude_self)
{
    rows_call c = {x->shape[0], y->shape[0], x->shape[1], near->shape[1], exclude_self, vx_f32(x), vx_f32(y), NULL};
    if (check_rows("knn", c.L)) return VX_EINVAL;
    if (!c.N) return VX_OK;
    const vx_data_check bad_x = vx_data_check_of(VX_ENONFINITE, c.D, "row %%lld of x holds a NaN or Inf");
    const vx_data_check bad_y = vx_data_check_of(VX_ENONFINITE, c.D, "row %%lld of y holds a NaN or Inf");
    const int64_t chunk =
        vx_min64(vx_min64(c.N, vx_max64(1, DISTANCES / c.L)), 65535 * TILE); /* a grid's second size is limited */
    float *held = VX_SCRATCH(float, chunk *c.L);
    uint32_t *largest = VX_SCRATCH(uint32_t, 1);
    c.largest = largest;
    find_largest(largest, x, y);
    VX_LAUNCH(finite_kernel, vx_grid(x->numel, BLOCK), BLOCK, 0, c.x, x->numel, bad_x);
    VX_LAUNCH(finite_kernel, vx_grid(y->numel, BLOCK), BLOCK, 0, c.y, y->numel, bad_y);
    for (int64_t first = 0; first < c.N; first += chunk) {
        const int64_t rows = vx_min64(chunk, c.N - first);
        VX_LAUNCH(distance_kernel, dim3((unsigned)vx_ceil_div(c.L, TILE), (unsigned)vx_ceil_div(rows, TILE)), BLOCK, 0,
                  held, c, first, rows);
        VX_LAUNCH(far_distance_kernel, vx_grid(rows * c.L, BLOCK), BLOCK, 0, held, c, first, rows);
        VX_LAUNCH(nearest_kernel, vx_grid(rows, 1), BLOCK, 0, vx_i32(near), vx_f32(distance), held, c, first, rows);
    }
    return vx_status();
}

VX_KERNEL knn_backward_kernel(float *dx, const float *g, const int32_t *near, rows_call c)
{
    for (int64_t i = vx_first(); i < c.N * c.D; i += vx_step()) {
        const int64_t n = i / c.D, d = i - n * c.D;
        float sum = 0;
        for (int64_t k = n * c.K; k < (n + 1) * c.K; k++) {
            const int64_t l = near[k];
            if (l >= 0 && l < c.L) sum += 2 * g[k] * (c.x[i] - c.y[l * c.D + d]);
        }
        dx[i] = sum;
    }
}

/* What neighbour i of all N K adds to the gradient of row l of y. */
struct neighbour_term {
    rows_call c;
    const float *g;
    VX_INSIDE float operator()(uint32_t l, uint32_t i, int64_t d) const
    {
        return 2 * g[i] * (c.y[l * c.D + d] - c.x[i / c.K * c.D + d]);
    }
};

/* Computes d |x - y|^2 = 2 (x - y) (dx - dy). Working space: 16 N K bytes, and a 32nd of N K D floats. */
int vx_cuda_knn_backward(vx_tensor *dx, vx_tensor *dy, vx_tensor *ddistance, vx_tensor *near, vx_tensor *x,
                         vx_tensor *y)
{
    const rows_call c = {x->shape[0], y->shape[0], x->shape[1], near->shape[1], 0, vx_f32(x), vx_f32(y), NULL};
    const int64_t count = near->numel;
    const vx_data_check outside = outside_of(c.K, "y", c.L);
    vx_sort s = vx_sort_of(count, vx_sort_bits(c.L + 1));
    float *partial = VX_SCRATCH(float, vx_pieces_partial(count, c.D));
    if (dy->numel) VX_CUDA(cudaMemsetAsync(dy->data, 0, sizeof(float) * (size_t)dy->numel, vx_stream()));
    if (dx->numel)
        VX_LAUNCH(knn_backward_kernel, vx_grid(dx->numel, BLOCK), BLOCK, 0, vx_f32(dx), vx_f32(ddistance), vx_i32(near),
                  c);
    if (!count) return vx_status();
    vx_sort_keys(&s, vx_i32(near), c.L, outside);
    vx_sort_run(&s);
    vx_sum_pieces(vx_pieces{s.entries, count, c.L, c.D, vx_f32(dy), partial}, neighbour_term{c, vx_f32(ddistance)});
    return vx_status();
}
