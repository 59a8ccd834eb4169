/* reduce.cu: reduce (sum, mean, max, min), argmax, nonfinite, mse, mse_backward on CUDA.
 *
 * Memory traffic: x is read once.
 *
 * Order of a sum, a function of the sizes alone; everything is added in double:
 *   inner dimension reduced    a result's elements are cut into parts of 16384; the threads of a part take every
 *   width-th element
 *                              and join theirs as a tree. width: a block's 256, or 1 .. 32 lanes where rows are short
 *   inner dimension kept       neighbouring threads have neighbouring columns, and those of one column every k-th row;
 *   the rows
 *                              are cut into parts, too, enough of them to fill a device
 * Parts are joined in the same way by a second kernel.
 *
 * The dimensions are visited in the order of x's strides, as in reduce.c. max and min return NaN where any element is
 * one.
 */
#include "shared/checks.h"
#include "cuda/cuda.cuh"
#include "shared/reduce_dims.h"

enum { BLOCK = 256, PART = 16384 };

/* -- reduce -------------------------------------------------------------------------------------------------------- */

/* Offset of the i-th of count elements under the strides `stride` (d.x or d.y). I: a type that holds count. */
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

/* What reduce works on: the innermost dimension, and the kept and the reduced ones around it. */
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

/* Over groups of `width` threads: 1 .. 32 lanes, or the block, all of which takes part. The first of a group has the
 * result. */
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

/* Joins the parts of each result: p.width threads each. */
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

/* Threads for n elements: lanes, or a block where they are many. */
static int width_for(int64_t n) { return n > 1024 ? BLOCK : vx_lanes_for(n); }

template <int kind, class I> static void launch_reduce(plan p)
{
    const int64_t cuts = vx_ceil_div(p.n, p.width), units = p.kept.count * p.parts * (p.inner_kept ? cuts : 1);
    if (p.inner_kept) VX_LAUNCH((reduce_columns_kernel<kind, I>), vx_grid(units, 1), BLOCK, 0, p);
    else VX_LAUNCH((reduce_rows_kernel<kind, I>), vx_grid(units, BLOCK / p.width), BLOCK, 0, p);
    if (p.parts == 1) return;
    p.width = width_for(p.parts);
    VX_LAUNCH((reduce_parts_kernel<kind, I>), vx_grid(p.kept.count * (p.inner_kept ? p.n : 1), BLOCK / p.width), BLOCK,
              0, p);
}

template <int kind> static void launch_reduce(const plan &p, int64_t numel)
{
    if (numel < INT64_C(1) << 32) launch_reduce<kind, uint32_t>(p);
    else launch_reduce<kind, int64_t>(p);
}

/* y = sum, mean, max or min of x over the dimensions where y has size 1. Working space: 8 bytes per 16384 elements, or
 * per 64 elements and more where columns are kept. */
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
        for (p.width = 1; p.width < 32 && p.width < p.n;) p.width *= 2;
        const int64_t wanted = vx_ceil_div(2048, results * vx_ceil_div(p.n, p.width)), least = 8 * BLOCK / p.width;
        p.rows = vx_max64(least, vx_ceil_div(p.reduced.count, wanted));
        p.parts = vx_ceil_div(p.reduced.count, p.rows);
        results *= p.n;
    } else {
        const int64_t count = p.reduced.count * p.n;
        p.fours = p.reduced.count == 1 && p.x_step == 1 && p.n % 4 == 0 && vx_aligned(x, 16);
        for (int d = 0; d < p.kept.n; d++) p.fours = p.fours && p.kept.x[d] % 4 == 0;
        p.parts = vx_ceil_div(count, PART);
        p.width = width_for(count);
    }
    if (p.parts > 1) p.partial = VX_SCRATCH(double, results *p.parts);
    if (kind == VX_REDUCE_MAX) launch_reduce<VX_REDUCE_MAX>(p, x->numel);
    else if (kind == VX_REDUCE_MIN) launch_reduce<VX_REDUCE_MIN>(p, x->numel);
    else launch_reduce<VX_REDUCE_SUM>(p, x->numel);
    return vx_status();
}

/* -- argmax -------------------------------------------------------------------------------------------------------- */

/* `width` threads for each row of n elements. The largest key is that of the largest element, and among equals of the
 * lowest column. */
VX_KERNEL argmax_kernel(int32_t *index, const float *x, int64_t rows, int64_t n, int width, vx_alarm nan)
{
    __shared__ unsigned long long shared[32];
    const int at = threadIdx.x % width, groups = BLOCK / width;
    for (int64_t first = (int64_t)blockIdx.x * groups; first < rows; first += (int64_t)gridDim.x * groups) {
        const int64_t r = first + threadIdx.x / width;
        unsigned long long least = ~0ull; /* keys are complemented: vx_block_min finds the least */
        for (int64_t i = at; r < rows && i < n; i += width) {
            const float v = x[r * n + i];
            if (v != v) vx_raise(nan, r);
            const unsigned long long key =
                (unsigned long long)~vx_ordered(v + 0.0f) << 32 | (uint32_t)i; /* -0 becomes 0: they are equal */
            if (v == v && key < least) least = key;
        }
        if (width <= 32) {
            for (int i = width / 2; i > 0; i >>= 1) least = min(least, __shfl_xor_sync(VX_ALL_LANES, least, i));
        } else {
            least = vx_block_min(least, shared);
            __syncthreads();
        }
        if (r < rows && at == 0)
            index[r] = least == ~0ull ? 0 : (int32_t)(uint32_t)least; /* nothing but NaN: 0, and the alarm */
    }
}

/* index = column of each row's largest element; a row with a NaN is reported late. */
int vx_cuda_argmax(vx_tensor *index, vx_tensor *x)
{
    const int64_t rows = x->shape[0], n = x->shape[1];
    if (!rows) return VX_OK;
    const vx_alarm nan = vx_alarm_of(VX_ENONFINITE, 1, "row %%lld holds a NaN");
    const int width = width_for(n);
    VX_LAUNCH(argmax_kernel, vx_grid(rows, BLOCK / width), BLOCK, 0, vx_i32(index), vx_f32(x), rows, n, width, nan);
    return vx_status();
}

/* -- nonfinite ----------------------------------------------------------------------------------------------------- */

/* flag (rows): 1 where the row has been counted. found[1] as an unsigned number: -1 is the largest. */
VX_KERNEL nonfinite_kernel(uint32_t *found, int32_t *flag, const float *x, int64_t count, int64_t n)
{
    for (int64_t i = vx_first(); i < count; i += vx_step()) {
        if ((__float_as_uint(x[i]) & 0x7f800000u) != 0x7f800000u) continue;
        const int64_t row = i / n;
        if (flag[row] || atomicExch(&flag[row], 1)) continue;
        atomicAdd(&found[0], 1u);
        atomicMin(&found[1], (uint32_t)row);
    }
}

VX_KERNEL none_found_kernel(int32_t *found)
{
    found[0] = 0;
    found[1] = -1;
}

/* found = (rows that hold a NaN or Inf, the first such row or -1). Working space: 4 bytes a row. */
int vx_cuda_nonfinite(vx_tensor *found, vx_tensor *x)
{
    const int64_t rows = x->shape[0];
    int32_t *flag = VX_SCRATCH(int32_t, vx_max64(rows, 1));
    VX_LAUNCH(none_found_kernel, 1, 1, 0, vx_i32(found));
    if (!x->numel) return vx_status();
    VX_CUDA(cudaMemsetAsync(flag, 0, sizeof(int32_t) * (size_t)rows, vx_stream()));
    VX_LAUNCH(nonfinite_kernel, vx_grid(x->numel, 4 * BLOCK), BLOCK, 0, (uint32_t *)found->data, flag, vx_f32(x),
              x->numel, x->shape[1]);
    return vx_status();
}

/* -- mse ----------------------------------------------------------------------------------------------------------- */

VX_KERNEL squared_distance_kernel(double *partial, const float *a, const float *b, int64_t n, int64_t parts)
{
    __shared__ double shared[32];
    for (int64_t part = blockIdx.x; part < parts; part += gridDim.x) {
        const int64_t end = min((long long)n, (long long)(part + 1) * PART);
        double sum = 0;
        for (int64_t i = part * PART + threadIdx.x; i < end; i += BLOCK) {
            const double d = a[i] - b[i];
            sum += d * d;
        }
        sum = vx_block_sum(sum, shared);
        if (threadIdx.x == 0) partial[part] = sum;
        __syncthreads();
    }
}

VX_KERNEL mean_kernel(float *y, const double *partial, int64_t parts, double count)
{
    __shared__ double shared[32];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < parts; i += BLOCK) sum += partial[i];
    sum = vx_block_sum(sum, shared);
    if (threadIdx.x == 0) *y = (float)(sum / count);
}

/* loss = mean (a - b)^2. Working space: 8 bytes per 16384 elements. */
int vx_cuda_mse(vx_tensor *loss, vx_tensor *a, vx_tensor *b)
{
    const int64_t n = a->numel, parts = vx_ceil_div(n, PART);
    if (!n) return vx_fail(VX_EINVAL, "mse: mean of no elements");
    double *partial = VX_SCRATCH(double, parts);
    VX_LAUNCH(squared_distance_kernel, vx_grid(parts, 1), BLOCK, 0, partial, vx_f32(a), vx_f32(b), n, parts);
    VX_LAUNCH(mean_kernel, 1, BLOCK, 0, vx_f32(loss), partial, parts, (double)n);
    return vx_status();
}

VX_KERNEL mse_backward_kernel(float *da, const float *a, const float *b, const float *dloss, int64_t n, int64_t fours)
{
    const float scale = (float)(2.0 * *dloss / (double)n);
    for (int64_t i = vx_first(); i < fours; i += vx_step()) {
        const float4 x = ((const float4 *)a)[i], y = ((const float4 *)b)[i];
        ((float4 *)da)[i] =
            make_float4(scale * (x.x - y.x), scale * (x.y - y.y), scale * (x.z - y.z), scale * (x.w - y.w));
    }
    for (int64_t i = 4 * fours + vx_first(); i < n; i += vx_step()) da[i] = scale * (a[i] - b[i]);
}

/* da = 2 dloss (a - b) / count */
int vx_cuda_mse_backward(vx_tensor *da, vx_tensor *a, vx_tensor *b, vx_tensor *dloss)
{
    if (!a->numel) return VX_OK;
    const int64_t n = a->numel, fours = vx_aligned(da, 16) && vx_aligned(a, 16) && vx_aligned(b, 16) ? n / 4 : 0;
    VX_LAUNCH(mse_backward_kernel, vx_grid(fours ? fours : n, BLOCK), BLOCK, 0, vx_f32(da), vx_f32(a), vx_f32(b),
              vx_f32(dloss), n, fours);
    return vx_status();
}
