/* reduce.cu: reduce (sum, mean, max, min) on CUDA. x is read once.
 *
 * The dimensions are visited in the order of x's strides, as in reduce.c (shared/reduce_dims.h). Everything is added in
 * float64, in an order that the sizes alone determine:
 *   innermost dimension reduced   A result's elements are cut into parts of 16384. `width` threads share a part, each
 *                                 takes every width-th element, and they join theirs as a tree. width is 1 .. 32 lanes
 *                                 where rows are short, else a block's 256 threads.
 *   innermost dimension kept      Neighbouring threads have neighbouring columns; those of one column take every k-th
 *                                 row. The rows are cut into parts, too, enough of them to fill a device.
 * A second kernel joins the parts of a result in the same way. max and min return NaN where any element is one.
 */
#include "shared/checks.h"
#include "cuda/cuda.cuh"
#include "shared/reduce_dims.h"

enum { BLOCK = 256, PART = 16384 };

/* Returns the offset of the i-th of count elements under the strides `stride` (d.x or d.y). I: a type that holds
 * count. */
template <class I> VX_DEVICE int64_t dims_offset(const dims &d, const int64_t *stride, int64_t i)
{
    I rest = (I)i;
    int64_t offset = 0;
    for (int k = d.n - 1; k > 0; k--) {
        const I size = (I)d.size[k];
        offset += (int64_t)(rest % size) * stride[k];
        rest /= size;
    }
    return d.n ? offset + (int64_t)rest * stride[0] : 0;
}

/* One call: the innermost dimension, and the kept and the reduced ones around it. */
typedef struct plan {
    dims kept, reduced;
    bool inner_kept, fours;    /* fours: rows may be read as float4 */
    int64_t n, x_step, y_step; /* the innermost dimension */
    const float *x;
    float *y;
    double scale;    /* of the result: 1 / count for a mean */
    int64_t parts;   /* of one result */
    int64_t rows;    /* of a part, where columns are kept */
    int width;       /* threads of a row's part; neighbouring columns */
    double *partial; /* (kept, parts) or (kept, parts, n), where parts > 1 */
} plan;

/* kind is VX_REDUCE_SUM, _MAX or _MIN, a constant wherever these are inlined */

template <int kind> VX_DEVICE double neutral(void)
{
    return kind == VX_REDUCE_SUM ? 0.0 : kind == VX_REDUCE_MAX ? -INFINITY : INFINITY;
}

template <int kind> VX_DEVICE double join(double a, double b)
{
    if (kind == VX_REDUCE_SUM) return a + b;
    if (a != a || b != b) return NAN;
    return kind == VX_REDUCE_MAX ? (a > b ? a : b) : (a < b ? a : b);
}

/* Joins over groups of `width` threads: 1 .. 32 lanes, or the block, all of which takes part. The first of a group has
 * the result. */
template <int kind> VX_DEVICE double join_threads(double v, int width, double *shared)
{
    for (int i = min(width, 32) / 2; i > 0; i >>= 1) v = join<kind>(v, __shfl_xor_sync(VX_ALL_LANES, v, i));
    if (width <= 32) return v;
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    v = threadIdx.x % 32 < BLOCK / 32 ? shared[threadIdx.x % 32] : neutral<kind>();
    for (int i = BLOCK / 64; i > 0; i >>= 1) v = join<kind>(v, __shfl_xor_sync(VX_ALL_LANES, v, i));
    __syncthreads();
    return v;
}

template <int kind, class I> VX_KERNEL VX_HOT reduce_rows_kernel(plan p)
{
    __shared__ double shared[32];
    const int at = threadIdx.x % p.width, groups = BLOCK / p.width;
    const int64_t units = p.kept.count * p.parts, count = p.reduced.count * p.n;
    for (int64_t first = (int64_t)blockIdx.x * groups; first < units; first += (int64_t)gridDim.x * groups) {
        const int64_t u = first + threadIdx.x / p.width, k = u / p.parts, begin = u % p.parts * PART;
        double v = neutral<kind>();
        if (u < units) {
            const int64_t end = p.parts > 1 ? min((long long)count, (long long)begin + PART) : count;
            const float *x = p.x + dims_offset<I>(p.kept, p.kept.x, k);
            if (p.fours) {
#pragma unroll 4
                for (int64_t i = begin / 4 + at; i < end / 4; i += p.width) {
                    const float4 q = ((const float4 *)x)[i];
                    v = join<kind>(v, join<kind>(join<kind>(q.x, q.y), join<kind>(q.z, q.w)));
                }
            } else if (p.reduced.count == 1) {
#pragma unroll 4
                for (int64_t i = begin + at; i < end; i += p.width) v = join<kind>(v, x[i * p.x_step]);
            } else {
                for (int64_t i = begin + at; i < end; i += p.width) {
                    const int64_t row = (I)i / (I)p.n;
                    v = join<kind>(v, x[dims_offset<I>(p.reduced, p.reduced.x, row) + (i - row * p.n) * p.x_step]);
                }
            }
        }
        v = join_threads<kind>(v, p.width, shared);
        if (u < units && at == 0) {
            if (p.parts > 1) p.partial[u] = v;
            else p.y[dims_offset<I>(p.kept, p.kept.y, k)] = (float)(v * p.scale);
        }
    }
}

template <int kind, class I> VX_KERNEL VX_HOT reduce_columns_kernel(plan p)
{
    __shared__ double shared[BLOCK];
    const int at = threadIdx.x % p.width, lane = threadIdx.x / p.width, lanes = BLOCK / p.width;
    const int64_t cuts = (p.n + p.width - 1) / p.width, units = p.kept.count * p.parts * cuts;
    for (int64_t u = blockIdx.x; u < units; u += gridDim.x) {
        const int64_t column = u % cuts * p.width + at, part = u / cuts % p.parts, k = u / cuts / p.parts;
        const int64_t end = min((long long)p.reduced.count, (long long)(part + 1) * p.rows);
        double v = neutral<kind>();
        if (column < p.n) {
            const float *x = p.x + dims_offset<I>(p.kept, p.kept.x, k) + column * p.x_step;
#pragma unroll 4
            for (int64_t q = part * p.rows + lane; q < end; q += lanes)
                v = join<kind>(v, x[dims_offset<I>(p.reduced, p.reduced.x, q)]);
        }
        shared[threadIdx.x] = v;
        __syncthreads();
        for (int i = lanes / 2; i > 0; i >>= 1) {
            if (lane < i) shared[threadIdx.x] = v = join<kind>(v, shared[threadIdx.x + i * p.width]);
            __syncthreads();
        }
        if (lane == 0 && column < p.n) {
            if (p.parts > 1) p.partial[(k * p.parts + part) * p.n + column] = v;
            else p.y[dims_offset<I>(p.kept, p.kept.y, k) + column * p.y_step] = (float)(v * p.scale);
        }
    }
}

/* Joins the parts of each result. p.width threads each. */
template <int kind, class I> VX_KERNEL reduce_parts_kernel(plan p)
{
    __shared__ double shared[32];
    const int at = threadIdx.x % p.width, groups = BLOCK / p.width;
    const int64_t n = p.inner_kept ? p.n : 1, results = p.kept.count * n;
    for (int64_t first = (int64_t)blockIdx.x * groups; first < results; first += (int64_t)gridDim.x * groups) {
        const int64_t r = first + threadIdx.x / p.width, k = r / n, column = r - k * n;
        double v = neutral<kind>();
        for (int64_t i = at; r < results && i < p.parts; i += p.width)
            v = join<kind>(v, p.partial[(k * p.parts + i) * n + column]);
        v = join_threads<kind>(v, p.width, shared);
        if (r < results && at == 0) p.y[dims_offset<I>(p.kept, p.kept.y, k) + column * p.y_step] = (float)(v * p.scale);
    }
}

static void plan_make(plan *p, const vx_tensor *y, const vx_tensor *x)
{
    dims inner;
    p->inner_kept = dims_collapse(&p->kept, &p->reduced, &inner, y, x);
    p->n = inner.size[0], p->x_step = inner.x[0], p->y_step = inner.y[0];
}

template <int kind, class I> static void launch_reduce(plan p)
{
    const int64_t cuts = vx_ceil_div(p.n, p.width), units = p.kept.count * p.parts * (p.inner_kept ? cuts : 1);
    if (p.inner_kept) VX_LAUNCH((reduce_columns_kernel<kind, I>), vx_grid(units, 1), BLOCK, 0, p);
    else VX_LAUNCH((reduce_rows_kernel<kind, I>), vx_grid(units, BLOCK / p.width), BLOCK, 0, p);
    if (p.parts == 1) return;
    p.width = vx_threads_for(p.parts, BLOCK);
    VX_LAUNCH((reduce_parts_kernel<kind, I>), vx_grid(p.kept.count * (p.inner_kept ? p.n : 1), BLOCK / p.width), BLOCK,
              0, p);
}

template <int kind> static void launch_reduce(const plan &p, int64_t numel)
{
    if (numel < INT64_C(1) << 32) launch_reduce<kind, uint32_t>(p);
    else launch_reduce<kind, int64_t>(p);
}

/* Computes y = sum, mean, max or min of x over the dimensions where y has size 1. Working space: 8 bytes per 16384
 * elements, or per 64 elements and more where columns are kept. */
int vx_cuda_reduce(vx_tensor *y, vx_tensor *x, int kind)
{
    if (check_reduce(y, x, kind)) return VX_EINVAL;
    if (!y->numel) return VX_OK;
    if (!x->numel) {
        VX_CUDA(cudaMemsetAsync(y->data, 0, sizeof(float) * (size_t)y->numel, vx_stream()));
        return vx_status();
    }
    plan p = {};
    p.x = vx_f32(x), p.y = vx_f32(y), p.scale = 1;
    plan_make(&p, y, x);
    if (kind == VX_REDUCE_MEAN) p.scale = 1.0 / (double)(x->numel / y->numel);
    int64_t results = p.kept.count;
    if (p.inner_kept) {
        p.width = vx_columns_for(p.n);
        const int64_t wanted = vx_ceil_div(2048, results * vx_ceil_div(p.n, p.width)), least = 8 * BLOCK / p.width;
        p.rows = vx_max64(least, vx_ceil_div(p.reduced.count, wanted));
        p.parts = vx_ceil_div(p.reduced.count, p.rows);
        results *= p.n;
    } else {
        const int64_t count = p.reduced.count * p.n;
        p.fours = p.reduced.count == 1 && p.x_step == 1 && p.n % 4 == 0 && vx_aligned(x, 16);
        for (int d = 0; d < p.kept.n; d++) p.fours = p.fours && p.kept.x[d] % 4 == 0;
        p.parts = vx_ceil_div(count, PART);
        p.width = vx_threads_for(count, BLOCK);
    }
    if (p.parts > 1) p.partial = VX_SCRATCH(double, results *p.parts);
    if (kind == VX_REDUCE_MAX) launch_reduce<VX_REDUCE_MAX>(p, x->numel);
    else if (kind == VX_REDUCE_MIN) launch_reduce<VX_REDUCE_MIN>(p, x->numel);
    else launch_reduce<VX_REDUCE_SUM>(p, x->numel);
    return vx_status();
}
