/* norm.cu: group normalization with a fused activation, and layer normalization, on CUDA; the formulas are in norm.c.
 *
 * Group norm. An image's positions are cut into chunks of about 32 KiB by the sizes alone. A block takes a chunk: a
 * thread a few positions of four neighbouring channels (one where channels do not lie on 16 bytes), which fit its
 * registers. So the moments of a chunk are taken in two passes, the second about the channel's mean, with one reading;
 * chunks are merged in float64 by Chan's formula, and the variance is exact to float32 rounding whatever the mean, as
 * on the CPU. A second kernel normalizes. Memory traffic: x twice and y once; backward x and dy twice and dx once. The
 * second reading begins where the first ended, for what the L2 cache still holds.
 *
 * Layer norm. A warp takes a row, which it reads again from the L1 cache; dgamma and dbeta are sums over parts of the
 * rows.
 *
 * All sums run in an order that the sizes fix.
 */
#include "cuda/norm.cuh"
#include "cuda/reduce_parts.cuh"
#include "cuda/vec4.cuh"

enum {
    BLOCK = 256,
    HELD = 32,        /* floats of a chunk that a thread holds */
    ROWS_BLOCK = 128, /* layer norm: a warp per row */
    PARTS = 64,       /* of the rows in layer_norm_backward */
};

/* -- Group norm: chunks of positions ------------------------------------------------------------------------------- */

/* A block works on `columns` groups of V channels, one of `tiles`, its threads standing side by side in `rows` rows of
 * positions. */
typedef struct layout {
    int64_t B, S, C, G, chunk, chunks, tiles;
    int columns, rows;
    const int32_t *lengths; /* (B), the positions of an image that count, checked; NULL: all S */
} layout;

static layout layout_of(int64_t B, int64_t S, int64_t C, int64_t G, int V, const int32_t *lengths)
{
    layout q = {B, S, C, G, 0, 0, 0, 0, 0, lengths};
    q.columns = (int)vx_min64(C / V, BLOCK);
    q.rows = BLOCK / q.columns;
    q.chunk = vx_min64((int64_t)q.rows * (HELD / V), vx_max64(S, 1));
    q.chunks = vx_ceil_div(S, q.chunk);
    q.tiles = vx_ceil_div(C / V, q.columns);
    return q;
}

VX_DEVICE int64_t length_of(const layout &q, int64_t b) { return q.lengths ? q.lengths[b] : q.S; }

/* Returns how many numbers the statistics of a group of image b are of; 1 where there are none. */
VX_DEVICE double group_size(const layout &q, int64_t b)
{
    return (double)max(1ll, (long long)length_of(q, b)) * (double)(q.C / q.G);
}

/* A thread's share of a chunk: channels c .. c + V - 1 at positions row, row + rows, ... of the `count` from first on
 * that count. */
typedef struct patch {
    int64_t b, k, c, first;
    int row, column, count;
    bool there;
} patch;

template <int V> VX_DEVICE patch patch_of(const layout &q, int64_t item)
{
    patch at;
    const int64_t chunk = item / q.tiles;
    at.b = chunk / q.chunks, at.k = chunk - at.b * q.chunks;
    at.row = threadIdx.x / q.columns, at.column = threadIdx.x - at.row * q.columns;
    at.c = ((item - chunk * q.tiles) * q.columns + at.column) * V;
    at.there = at.row < q.rows && at.c < q.C;
    const int64_t before = at.k * q.chunk, left = length_of(q, at.b) - before;
    at.first = at.b * q.S + before;
    at.count = left <= 0 ? 0 : (int)min((long long)q.chunk, (long long)left);
    return at;
}

/* Adds up x over the block's rows; every thread gets its column's sum. shared: BLOCK elements. */
template <int V> VX_DEVICE vec<V> sum_rows(const layout &q, const patch &at, const vec<V> &x, vec<V> *shared)
{
    const int i = at.row * q.columns + at.column;
    if (at.row < q.rows) shared[i] = x;
    for (int n = q.rows; n > 1; n = (n + 1) / 2) {
        __syncthreads();
        if (at.row < n / 2)
#pragma unroll
            for (int v = 0; v < V; v++) shared[i].x[v] += shared[i + (n + 1) / 2 * q.columns].x[v];
    }
    __syncthreads();
    const vec<V> sum = shared[at.column];
    __syncthreads();
    return sum;
}

/* Loads what belongs to the groups of the thread's V channels, from (B,G). */
template <int V> VX_DEVICE vec<V> of_groups(const layout &q, const patch &at, const float *from)
{
    const int64_t D = q.C / q.G;
    vec<V> r;
#pragma unroll
    for (int v = 0; v < V; v++) r.x[v] = from[at.b * q.G + (at.c + v) / D];
    return r;
}

/* Takes the moments of each chunk: partial (B,chunks,2,C), the mean and the sum of squares about it of each channel.
 * The mean is taken again from the residuals, which removes the rounding of the first sum. */
template <int V, class T>
VX_KERNEL VX_HOT __launch_bounds__(BLOCK, 2) moments_kernel(layout q, float *partial, const T *x, int64_t items)
{
    __shared__ vec<V> shared[BLOCK];
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const patch at = patch_of<V>(q, item);
        const float share = 1.0f / (float)max(at.count, 1);
        vec<V> held[HELD / V], mean = {}, residual = {}, squares = {};
#pragma unroll
        for (int j = 0; j < HELD / V; j++) {
            const int i = at.row + j * q.rows;
            held[j] = {};
            if (at.there && i < at.count) held[j] = load<V>(x + (at.first + i) * q.C + at.c);
#pragma unroll
            for (int v = 0; v < V; v++) mean.x[v] += held[j].x[v];
        }
        mean = sum_rows<V>(q, at, mean, shared);
#pragma unroll
        for (int v = 0; v < V; v++) mean.x[v] *= share;
#pragma unroll
        for (int j = 0; j < HELD / V; j++)
            if (at.row + j * q.rows < at.count)
#pragma unroll
                for (int v = 0; v < V; v++) {
                    const float d = held[j].x[v] - mean.x[v];
                    residual.x[v] += d;
                    squares.x[v] += d * d;
                }
        residual = sum_rows<V>(q, at, residual, shared);
        squares = sum_rows<V>(q, at, squares, shared);
#pragma unroll
        for (int v = 0; v < V; v++) {
            mean.x[v] += residual.x[v] * share;
            squares.x[v] -= residual.x[v] * (residual.x[v] * share);
        }
        if (at.there && at.row == 0) {
            float *to = partial + (at.b * q.chunks + at.k) * 2 * q.C + at.c;
            store<V>(to, mean);
            store<V>(to + q.C, squares);
        }
    }
}

/* Merges the chunks' moments into mean and rstd (B,G). A block for each group, `width` of its threads side by side over
 * channels. */
VX_KERNEL __launch_bounds__(BLOCK)
    statistics_kernel(layout q, float *mean, float *rstd, const float *partial, int width, float eps)
{
    __shared__ double shared[32];
    const int64_t D = q.C / q.G;
    for (int64_t item = blockIdx.x; item < q.B * q.G; item += gridDim.x) {
        const int64_t length = length_of(q, item / q.G);
        const double size = (double)max(1ll, (long long)length) * (double)D;
        const float *from = partial + item / q.G * q.chunks * 2 * q.C + item % q.G * D;
        double sum = 0, squares = 0;
        for (int64_t k = threadIdx.x / width; k * q.chunk < length; k += BLOCK / width) {
            const double count = (double)min((long long)q.chunk, (long long)(length - k * q.chunk));
            for (int64_t c = threadIdx.x % width; c < D; c += width) sum += count * from[2 * k * q.C + c];
        }
        const double centre = vx_block_sum(sum, shared) / size;
        __syncthreads();
        for (int64_t k = threadIdx.x / width; k * q.chunk < length; k += BLOCK / width) {
            const double count = (double)min((long long)q.chunk, (long long)(length - k * q.chunk));
            for (int64_t c = threadIdx.x % width; c < D; c += width) {
                const double away = from[2 * k * q.C + c] - centre;
                squares += from[(2 * k + 1) * q.C + c] + count * away * away;
            }
        }
        squares = vx_block_sum(squares, shared);
        if (threadIdx.x == 0) {
            mean[item] = (float)centre;
            rstd[item] = size > 1 ? (float)(1 / sqrt(squares / size + eps)) : 0;
        }
        __syncthreads();
    }
}

template <int V, int ACT>
VX_KERNEL VX_HOT __launch_bounds__(BLOCK)
    normalize_kernel(layout q, float *y, const float *x, const float *gamma, const float *beta, const float *mean,
                     const float *rstd, int64_t items)
{
    for (int64_t i = blockIdx.x; i < items; i += gridDim.x) {
        const patch at = patch_of<V>(q, items - 1 - i);
        if (!at.there) continue;
        const vec<V> centre = of_groups<V>(q, at, mean);
        vec<V> scale = of_groups<V>(q, at, rstd), held[HELD / V];
        const vec<V> factor = load<V>(gamma + at.c), shift = load<V>(beta + at.c);
#pragma unroll
        for (int v = 0; v < V; v++) scale.x[v] *= factor.x[v];
        const int64_t from = (at.first + at.row) * q.C + at.c, step = (int64_t)q.rows * q.C;
        const int below = at.count - at.row;
#pragma unroll
        for (int j = 0; j < HELD / V; j++)
            if (j * q.rows < below) held[j] = load<V>(x + from + j * step);
#pragma unroll
        for (int j = 0; j < HELD / V; j++)
            if (j * q.rows < below) {
                vec<V> z;
                float slope;
#pragma unroll
                for (int v = 0; v < V; v++)
                    z.x[v] = activate(ACT, (held[j].x[v] - centre.x[v]) * scale.x[v] + shift.x[v], &slope);
                store<V>(y + from + j * step, z);
            }
    }
}

static unsigned grid_of(const layout *q) { return vx_grid(q->B * q->chunks * q->tiles, 1); }

template <int V, class T>
static void statistics(float *mean, float *rstd, const T *x, float *partial, const layout *q, float eps)
{
    VX_LAUNCH((moments_kernel<V, T>), grid_of(q), BLOCK, 0, *q, partial, x, q->B * q->chunks * q->tiles);
    VX_LAUNCH(statistics_kernel, vx_grid(q->B * q->G, 1), BLOCK, 0, *q, mean, rstd, partial,
              vx_columns_for(q->C / q->G), eps);
}

template <class T>
static void image_statistics(float *mean, float *rstd, const T *x, int64_t B, int64_t S, int64_t C, int64_t G,
                             float eps, const int32_t *lengths)
{
    if (!B || !C) return;
    const bool fours = C % 4 == 0 && (uintptr_t)x % (4 * sizeof(T)) == 0;
    const layout q = layout_of(B, S, C, G, fours ? 4 : 1, lengths);
    float *partial = VX_SCRATCH(float, B *q.chunks * 2 * C);
    if (fours) statistics<4>(mean, rstd, x, partial, &q, eps);
    else statistics<1>(mean, rstd, x, partial, &q, eps);
}

void vx_group_statistics(float *mean, float *rstd, const float *x, int64_t B, int64_t S, int64_t C, int64_t G,
                         float eps)
{
    image_statistics(mean, rstd, x, B, S, C, G, eps, nullptr);
}
void vx_group_statistics(float *mean, float *rstd, const vx_bf16 *x, int64_t B, int64_t S, int64_t C, int64_t G,
                         float eps)
{
    image_statistics(mean, rstd, x, B, S, C, G, eps, nullptr);
}

/* Copies lengths, drawn into 0 .. S, and reports those that were outside. */
VX_KERNEL lengths_kernel(int32_t *to, const int32_t *from, int64_t B, int64_t S, vx_data_check outside)
{
    for (int64_t b = vx_first(); b < B; b += vx_step()) {
        if (from[b] < 0 || from[b] > S) vx_report(outside, b);
        to[b] = (int32_t)max(0ll, min((long long)S, (long long)from[b]));
    }
}

/* Returns lengths that kernels may trust; NULL where there are none. Takes its scratch. */
static const int32_t *checked_lengths(const vx_tensor *lengths, int64_t S)
{
    if (!lengths) return nullptr;
    const int64_t B = lengths->shape[0];
    int32_t *checked = VX_SCRATCH(int32_t, B);
    const vx_data_check outside =
        vx_data_check_of(VX_EINVAL, 1, "length of row %%lld is outside 0 .. %lld", (long long)S);
    VX_LAUNCH(lengths_kernel, vx_grid(B, BLOCK), BLOCK, 0, checked, vx_i32(lengths), B, S, outside);
    return checked;
}

/* Writes 0 to the positions of x (B,S,C) that do not count. */
VX_KERNEL clear_rest_kernel(layout q, float *x)
{
    for (int64_t i = vx_first(); i < q.B * q.S * q.C; i += vx_step()) {
        const int64_t s = i / q.C % q.S, b = i / (q.C * q.S);
        if (s >= q.lengths[b]) x[i] = 0;
    }
}

static void clear_rest(const layout *q, vx_tensor *x)
{
    if (q->lengths) VX_LAUNCH(clear_rest_kernel, vx_grid(x->numel, BLOCK), BLOCK, 0, *q, vx_f32(x));
}

#define LAUNCH_ACT(kernel, V, act, ...)                                                                                \
    do {                                                                                                               \
        if ((act) == VX_ACT_SILU) VX_LAUNCH((kernel<V, VX_ACT_SILU>), grid_of(&q), BLOCK, 0, q, __VA_ARGS__);          \
        else if ((act) == VX_ACT_GELU) VX_LAUNCH((kernel<V, VX_ACT_GELU>), grid_of(&q), BLOCK, 0, q, __VA_ARGS__);     \
        else VX_LAUNCH((kernel<V, VX_ACT_NONE>), grid_of(&q), BLOCK, 0, q, __VA_ARGS__);                               \
    } while (0)

int vx_cuda_group_norm(vx_tensor *y, vx_tensor *mean, vx_tensor *rstd, vx_tensor *x, vx_tensor *gamma, vx_tensor *beta,
                       vx_tensor *lengths, int act, float eps)
{
    const int64_t B = x->shape[0], S = x->shape[1], C = x->shape[2], G = mean->shape[1];
    if (!B || !C) { /* no channels: no deviation */
        if (mean->numel) VX_CUDA(cudaMemsetAsync(mean->data, 0, sizeof(float) * (size_t)mean->numel, vx_stream()));
        if (rstd->numel) VX_CUDA(cudaMemsetAsync(rstd->data, 0, sizeof(float) * (size_t)rstd->numel, vx_stream()));
        return vx_status();
    }
    const bool fours =
        C % 4 == 0 && vx_aligned(x, 16) && vx_aligned(y, 16) && vx_aligned(gamma, 16) && vx_aligned(beta, 16);
    const layout q = layout_of(B, S, C, G, fours ? 4 : 1, checked_lengths(lengths, S));
    image_statistics(vx_f32(mean), vx_f32(rstd), vx_f32(x), B, S, C, G, eps, q.lengths);
    const int64_t items = B * q.chunks * q.tiles;
    if (fours)
        LAUNCH_ACT(normalize_kernel, 4, act, vx_f32(y), vx_f32(x), vx_f32(gamma), vx_f32(beta), vx_f32(mean),
                   vx_f32(rstd), items);
    else
        LAUNCH_ACT(normalize_kernel, 1, act, vx_f32(y), vx_f32(x), vx_f32(gamma), vx_f32(beta), vx_f32(mean),
                   vx_f32(rstd), items);
    clear_rest(&q, y);
    return vx_status();
}

/* -- Group norm: gradient ------------------------------------------------------------------------------------------ */

/* Sums dz and dz xhat over each chunk: partial (B,chunks,2,C). */
template <int V, int ACT>
VX_KERNEL VX_HOT __launch_bounds__(BLOCK)
    gradient_sums_kernel(layout q, float *partial, const float *dy, const float *x, const float *gamma,
                         const float *beta, const float *mean, const float *rstd, int64_t items)
{
    __shared__ vec<V> shared[BLOCK];
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const patch at = patch_of<V>(q, item);
        vec<V> plain = {}, along = {};
        if (at.there) {
            const vec<V> centre = of_groups<V>(q, at, mean), inverse = of_groups<V>(q, at, rstd);
            const vec<V> scale = load<V>(gamma + at.c), shift = load<V>(beta + at.c);
            const int64_t from = (at.first + at.row) * q.C + at.c, step = (int64_t)q.rows * q.C;
#pragma unroll 4
            for (int j = 0; j < HELD / V; j++)
                if (at.row + j * q.rows < at.count) {
                    const vec<V> g = load<V>(dy + from + j * step), z = load<V>(x + from + j * step);
#pragma unroll
                    for (int v = 0; v < V; v++) {
                        const float xhat = (z.x[v] - centre.x[v]) * inverse.x[v];
                        float slope;
                        activate(ACT, scale.x[v] * xhat + shift.x[v], &slope);
                        const float dz = ACT == VX_ACT_NONE ? g.x[v] : g.x[v] * slope;
                        plain.x[v] += dz;
                        along.x[v] += dz * xhat;
                    }
                }
        }
        plain = sum_rows<V>(q, at, plain, shared);
        along = sum_rows<V>(q, at, along, shared);
        if (at.there && at.row == 0) {
            float *to = partial + (at.b * q.chunks + at.k) * 2 * q.C + at.c;
            store<V>(to, plain);
            store<V>(to + q.C, along);
        }
    }
}

enum { TALL = 1024 }; /* threads of a block that sums 32 columns, its warps taking every 32nd row */

/* Adds up a column in float64; the first warp's lanes get the sums of their 32. shared: (32,33). */
template <class T>
VX_DEVICE double column_sum(const T *from, int64_t rows, int64_t pitch, int64_t c, int64_t columns,
                            double (*shared)[33])
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double sum = 0;
    for (int64_t r = warp; r < rows && c < columns; r += 32) sum += from[r * pitch + c];
    shared[lane][warp] = sum;
    __syncthreads();
    sum = vx_warp_sum(shared[warp][lane]);
    __syncthreads();
    if (lane == 0) shared[0][warp] = sum;
    __syncthreads();
    sum = shared[0][lane];
    __syncthreads();
    return sum;
}

/* Adds up the chunks: total (B,2 C) of partial (B,chunks,2 C). */
VX_KERNEL __launch_bounds__(TALL)
    total_kernel(double *total, const float *partial, int64_t B, int64_t chunks, int64_t columns)
{
    __shared__ double shared[32][33];
    const int64_t tiles = (columns + 31) / 32;
    for (int64_t item = blockIdx.x; item < B * tiles; item += gridDim.x) {
        const int64_t b = item / tiles, c = item % tiles * 32 + threadIdx.x % 32;
        const double sum = column_sum(partial + b * chunks * columns, chunks, columns, c, columns, shared);
        if (threadIdx.x < 32 && c < columns) total[b * columns + c] = sum;
    }
}

/* Adds up the images: dbeta and dgamma (C) of total (B,2 C). */
VX_KERNEL __launch_bounds__(TALL)
    parameters_kernel(float *dgamma, float *dbeta, const double *total, int64_t B, int64_t C)
{
    __shared__ double shared[32][33];
    for (int64_t tile = blockIdx.x; 32 * tile < 2 * C; tile += gridDim.x) {
        const int64_t c = tile * 32 + threadIdx.x % 32;
        const double sum = column_sum(total, B, 2 * C, c, 2 * C, shared);
        if (threadIdx.x < 32 && c < C) dbeta[c] = (float)sum;
        else if (threadIdx.x < 32 && c < 2 * C) dgamma[c - C] = (float)sum;
    }
}

/* Makes the factors of dx = gamma rstd dz - (x - mean) along - plain, (B,G) each. A warp for each group. */
VX_KERNEL factors_kernel(layout q, float *along, float *plain, const double *total, const float *gamma,
                         const float *rstd)
{
    const int64_t D = q.C / q.G;
    const int lane = threadIdx.x % 32;
    for (int64_t item = vx_first() / 32; item < q.B * q.G; item += vx_step() / 32) {
        const double *from = total + item / q.G * 2 * q.C;
        const int64_t first = item % q.G * D;
        double a = 0, p = 0;
        for (int64_t c = first + lane; c < first + D; c += 32) p += gamma[c] * from[c], a += gamma[c] * from[q.C + c];
        a = vx_warp_sum(a), p = vx_warp_sum(p);
        const double inverse = rstd[item], share = inverse / group_size(q, item / q.G);
        if (lane == 0) along[item] = (float)(a * share * inverse), plain[item] = (float)(p * share);
    }
}

template <int V, int ACT>
VX_KERNEL VX_HOT __launch_bounds__(BLOCK)
    gradient_kernel(layout q, float *dx, const float *dy, const float *x, const float *gamma, const float *beta,
                    const float *mean, const float *rstd, const float *along, const float *plain, int64_t items)
{
    for (int64_t i = blockIdx.x; i < items; i += gridDim.x) {
        const patch at = patch_of<V>(q, items - 1 - i);
        if (!at.there) continue;
        const vec<V> centre = of_groups<V>(q, at, mean), inverse = of_groups<V>(q, at, rstd),
                     a = of_groups<V>(q, at, along), p = of_groups<V>(q, at, plain), scale = load<V>(gamma + at.c),
                     shift = load<V>(beta + at.c);
        const int64_t from = (at.first + at.row) * q.C + at.c, step = (int64_t)q.rows * q.C;
#pragma unroll 4
        for (int j = 0; j < HELD / V; j++)
            if (at.row + j * q.rows < at.count) {
                const vec<V> g = load<V>(dy + from + j * step), z = load<V>(x + from + j * step);
                vec<V> out;
#pragma unroll
                for (int v = 0; v < V; v++) {
                    const float away = z.x[v] - centre.x[v];
                    float slope;
                    activate(ACT, scale.x[v] * (away * inverse.x[v]) + shift.x[v], &slope);
                    const float dz = ACT == VX_ACT_NONE ? g.x[v] : g.x[v] * slope;
                    out.x[v] = scale.x[v] * inverse.x[v] * dz - (away * a.x[v] + p.x[v]);
                }
                store<V>(dx + from + j * step, out);
            }
    }
}

int vx_cuda_group_norm_backward(vx_tensor *dx, vx_tensor *dgamma, vx_tensor *dbeta, vx_tensor *dy, vx_tensor *x,
                                vx_tensor *gamma, vx_tensor *beta, vx_tensor *mean, vx_tensor *rstd, vx_tensor *lengths,
                                int act)
{
    const int64_t B = x->shape[0], S = x->shape[1], C = x->shape[2], G = mean->shape[1];
    if (!C) return VX_OK;
    const bool fours = C % 4 == 0 && vx_aligned(dx, 16) && vx_aligned(dy, 16) && vx_aligned(x, 16) &&
                       vx_aligned(gamma, 16) && vx_aligned(beta, 16);
    const layout q = layout_of(B, S, C, G, fours ? 4 : 1, checked_lengths(lengths, S));
    const int64_t items = B * q.chunks * q.tiles;
    const float *scale = vx_f32(gamma), *shift = vx_f32(beta), *centre = vx_f32(mean), *inverse = vx_f32(rstd);
    float *partial = VX_SCRATCH(float, B *q.chunks * 2 * C), *along = VX_SCRATCH(float, B *G),
          *plain = VX_SCRATCH(float, B *G);
    double *total = VX_SCRATCH(double, B * 2 * C);
    if (items && fours)
        LAUNCH_ACT(gradient_sums_kernel, 4, act, partial, vx_f32(dy), vx_f32(x), scale, shift, centre, inverse, items);
    else if (items)
        LAUNCH_ACT(gradient_sums_kernel, 1, act, partial, vx_f32(dy), vx_f32(x), scale, shift, centre, inverse, items);
    VX_LAUNCH(total_kernel, vx_grid(B * vx_ceil_div(2 * C, 32), 1), TALL, 0, total, partial, B, q.chunks, 2 * C);
    VX_LAUNCH(parameters_kernel, vx_grid(2 * C, 32), TALL, 0, vx_f32(dgamma), vx_f32(dbeta), total, B, C);
    if (!items) return vx_status();
    VX_LAUNCH(factors_kernel, vx_grid(B * G, BLOCK / 32), BLOCK, 0, q, along, plain, total, scale, inverse);
    if (fours)
        LAUNCH_ACT(gradient_kernel, 4, act, vx_f32(dx), vx_f32(dy), vx_f32(x), scale, shift, centre, inverse, along,
                   plain, items);
    else
        LAUNCH_ACT(gradient_kernel, 1, act, vx_f32(dx), vx_f32(dy), vx_f32(x), scale, shift, centre, inverse, along,
                   plain, items);
    clear_rest(&q, dx);
    return vx_status();
}

/* -- Layer norm ---------------------------------------------------------------------------------------------------- */

/* Adds up over a warp what f(channel) gives for each V channels of a row. */
template <int V, class F> VX_DEVICE float row_sum(int64_t C, F f)
{
    float sum = 0;
    for (int64_t c = threadIdx.x % 32 * V; c < C; c += 32 * V) sum += f(c);
    return vx_warp_sum(sum);
}

template <int V>
VX_KERNEL VX_HOT __launch_bounds__(ROWS_BLOCK)
    layer_norm_kernel(float *y, float *mean, float *rstd, const float *x, const float *gamma, const float *beta,
                      int64_t N, int64_t C, float eps)
{
    const float share = 1.0f / (float)C;
    for (int64_t i = vx_first() / 32; i < N; i += vx_step() / 32) {
        const float *row = x + i * C;
        const float rough = share * row_sum<V>(C, [&](int64_t c) {
                                const vec<V> z = load<V>(row + c);
                                float sum = 0;
#pragma unroll
                                for (int v = 0; v < V; v++) sum += z.x[v];
                                return sum;
                            });
        float residual = 0, squares = 0;
        for (int64_t c = threadIdx.x % 32 * V; c < C; c += 32 * V) {
            const vec<V> z = load<V>(row + c);
#pragma unroll
            for (int v = 0; v < V; v++) {
                const float d = z.x[v] - rough;
                residual += d;
                squares += d * d;
            }
        }
        residual = vx_warp_sum(residual), squares = vx_warp_sum(squares);
        const float centre = rough + residual * share, variance = (squares - residual * (residual * share)) * share;
        const float inverse = C > 1 ? 1.0f / sqrtf((variance < 0 ? 0 : variance) + eps) : 0;
        if (threadIdx.x % 32 == 0) mean[i] = centre, rstd[i] = inverse;
        for (int64_t c = threadIdx.x % 32 * V; c < C; c += 32 * V) {
            const vec<V> z = load<V>(row + c), scale = load<V>(gamma + c), shift = load<V>(beta + c);
            vec<V> out;
#pragma unroll
            for (int v = 0; v < V; v++) out.x[v] = (z.x[v] - centre) * inverse * scale.x[v] + shift.x[v];
            store<V>(y + i * C + c, out);
        }
    }
}

int vx_cuda_layer_norm(vx_tensor *y, vx_tensor *mean, vx_tensor *rstd, vx_tensor *x, vx_tensor *gamma, vx_tensor *beta,
                       float eps)
{
    const int64_t N = x->shape[0], C = x->shape[1];
    if (!N) return VX_OK;
    const bool fours =
        C % 4 == 0 && vx_aligned(x, 16) && vx_aligned(y, 16) && vx_aligned(gamma, 16) && vx_aligned(beta, 16);
    const unsigned grid = vx_grid(N, ROWS_BLOCK / 32);
    if (fours)
        VX_LAUNCH(layer_norm_kernel<4>, grid, ROWS_BLOCK, 0, vx_f32(y), vx_f32(mean), vx_f32(rstd), vx_f32(x),
                  vx_f32(gamma), vx_f32(beta), N, C, eps);
    else
        VX_LAUNCH(layer_norm_kernel<1>, grid, ROWS_BLOCK, 0, vx_f32(y), vx_f32(mean), vx_f32(rstd), vx_f32(x),
                  vx_f32(gamma), vx_f32(beta), N, C, eps);
    return vx_status();
}

template <int V>
VX_KERNEL VX_HOT __launch_bounds__(ROWS_BLOCK)
    layer_input_kernel(float *dx, const float *dy, const float *x, const float *gamma, const float *mean,
                       const float *rstd, int64_t N, int64_t C)
{
    const float share = 1.0f / (float)C;
    for (int64_t i = vx_first() / 32; i < N; i += vx_step() / 32) {
        const float centre = mean[i], inverse = rstd[i];
        float plain = 0, along = 0;
        for (int64_t c = threadIdx.x % 32 * V; c < C; c += 32 * V) {
            const vec<V> z = load<V>(x + i * C + c), g = load<V>(dy + i * C + c), scale = load<V>(gamma + c);
#pragma unroll
            for (int v = 0; v < V; v++) {
                const float scaled = g.x[v] * scale.x[v];
                plain += scaled;
                along += scaled * ((z.x[v] - centre) * inverse);
            }
        }
        const float a = vx_warp_sum(plain) * share, d = vx_warp_sum(along) * share;
        for (int64_t c = threadIdx.x % 32 * V; c < C; c += 32 * V) {
            const vec<V> z = load<V>(x + i * C + c), g = load<V>(dy + i * C + c), scale = load<V>(gamma + c);
            vec<V> out;
#pragma unroll
            for (int v = 0; v < V; v++)
                out.x[v] = inverse * (g.x[v] * scale.x[v] - ((z.x[v] - centre) * inverse * d + a));
            store<V>(dx + i * C + c, out);
        }
    }
}

/* Sums dy xhat and dy over a part of the rows: partial (parts,2,C). A block has 32 channels; each of its eight warps
 * takes every eighth row. */
VX_KERNEL __launch_bounds__(BLOCK)
    layer_parameters_kernel(float *partial, const float *dy, const float *x, const float *mean, const float *rstd,
                            int64_t N, int64_t C, int64_t parts)
{
    __shared__ float shared[2][BLOCK / 32][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t tiles = (C + 31) / 32;
    for (int64_t item = blockIdx.x; item < parts * tiles; item += gridDim.x) {
        const int64_t part = item / tiles, c = item % tiles * 32 + lane;
        float plain = 0, along = 0;
        for (int64_t i = part * N / parts + warp; i < (part + 1) * N / parts && c < C; i += BLOCK / 32) {
            const float g = dy[i * C + c];
            plain += g;
            along += g * ((x[i * C + c] - mean[i]) * rstd[i]);
        }
        shared[0][warp][lane] = along, shared[1][warp][lane] = plain;
        __syncthreads();
        if (warp < 2 && c < C) {
            float sum = 0;
            for (int w = 0; w < BLOCK / 32; w++) sum += shared[warp][w][lane];
            partial[(2 * part + warp) * C + c] = sum;
        }
        __syncthreads();
    }
}

int vx_cuda_layer_norm_backward(vx_tensor *dx, vx_tensor *dgamma, vx_tensor *dbeta, vx_tensor *dy, vx_tensor *x,
                                vx_tensor *gamma, vx_tensor *mean, vx_tensor *rstd)
{
    const int64_t N = x->shape[0], C = x->shape[1], parts = vx_max64(vx_min64(N, PARTS), 1);
    if (!C) return VX_OK;
    const bool fours =
        C % 4 == 0 && vx_aligned(dx, 16) && vx_aligned(dy, 16) && vx_aligned(x, 16) && vx_aligned(gamma, 16);
    const unsigned grid = vx_grid(N, ROWS_BLOCK / 32);
    float *partial = VX_SCRATCH(float, parts * 2 * C);
    if (fours)
        VX_LAUNCH(layer_input_kernel<4>, grid, ROWS_BLOCK, 0, vx_f32(dx), vx_f32(dy), vx_f32(x), vx_f32(gamma),
                  vx_f32(mean), vx_f32(rstd), N, C);
    else
        VX_LAUNCH(layer_input_kernel<1>, grid, ROWS_BLOCK, 0, vx_f32(dx), vx_f32(dy), vx_f32(x), vx_f32(gamma),
                  vx_f32(mean), vx_f32(rstd), N, C);
    VX_LAUNCH(layer_parameters_kernel, vx_grid(parts * vx_ceil_div(C, 32), 1), BLOCK, 0, partial, vx_f32(dy), vx_f32(x),
              vx_f32(mean), vx_f32(rstd), N, C, parts);
    vx_add_parts(vx_f32(dgamma), partial, C, parts, 2 * C);
    vx_add_parts(vx_f32(dbeta), partial + C, C, parts, 2 * C);
    return vx_status();
}
