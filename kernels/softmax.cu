/* softmax.cu: softmax or log softmax along rows on CUDA, and their gradients from the output; the formulas and what NaN
 * and Inf give are in softmax.c.
 *
 * Memory traffic: each operand once, where a row fits into shared memory between its passes; longer rows are read
 * again.
 *
 * A row has 1 .. 32 lanes, or a block where it is longer than 512. Each thread sums every width-th element in double;
 * the threads' sums are joined as a tree.
 */
#include "cuda/cuda.cuh"

enum { BLOCK = 256, LONG = 512, CACHED = 64 << 10 /* bytes of shared memory for rows */ };

/* How the rows of a call are worked on. */
typedef struct layout {
    int width;     /* threads of a row */
    int cached;    /* rows are kept in shared memory */
    int64_t pitch; /* elements from one row to the next there: an odd multiple of width, so that a warp's rows lie in
                    * different banks */
    size_t shared; /* bytes */
} layout;

/* Reduce over the threads of a row: `width` lanes of a warp, or the block. Every thread of the block takes part. */
VX_DEVICE double row_sum(double x, int width, double *shared)
{
    if (width <= 32) return vx_lanes_sum(x, width);
    x = vx_block_sum(x, shared);
    __syncthreads();
    return x;
}
VX_DEVICE float row_max(float x, int width, double *shared)
{
    if (width <= 32) return vx_lanes_max(x, width);
    x = vx_block_max(x, (float *)shared);
    __syncthreads();
    return x;
}

/* A thread reads again only what it has kept itself, so the cache needs no barrier. */
VX_KERNEL VX_HOT __launch_bounds__(BLOCK)
    softmax_kernel(float *y, const float *x, int64_t rows, int64_t n, layout l, int log)
{
    const int width = l.width, cached = l.cached;
    __shared__ double shared[32];
    const int at = threadIdx.x % width, groups = BLOCK / width;
    float *cache = (float *)vx_shared + threadIdx.x / width * l.pitch;
    for (int64_t first = (int64_t)blockIdx.x * groups; first < rows; first += (int64_t)gridDim.x * groups) {
        const int64_t r = first + threadIdx.x / width, count = r < rows ? n : 0;
        const float *in = x + r * n;
        float *out = y + r * n, top = -INFINITY;
#pragma unroll 4
        for (int64_t i = at; i < count; i += width) {
            const float v = in[i];
            if (cached) cache[i] = v;
            top = fmaxf(top, v);
        }
        top = row_max(top, width, shared);
        const float *kept = cached ? cache : in;
        double sum = 0;
#pragma unroll 4
        for (int64_t i = at; i < count; i += width) {
            const float e = expf(kept[i] - top);
            if (!log && cached) cache[i] = e;
            sum += e;
        }
        sum = row_sum(sum, width, shared);
        if (log) {
            const float offset =
                logf((float)sum); /* apart from the maximum: their sum would lose digits where |max| is large */
            for (int64_t i = at; i < count; i += width) out[i] = (kept[i] - top) - offset;
        } else {
            const float scale = (float)(1.0 / sum);
            for (int64_t i = at; i < count; i += width) out[i] = (cached ? kept[i] : expf(kept[i] - top)) * scale;
        }
    }
}

VX_KERNEL VX_HOT __launch_bounds__(BLOCK)
    softmax_backward_kernel(float *dx, const float *dy, const float *y, int64_t rows, int64_t n, layout l, int log)
{
    const int width = l.width, cached = l.cached;
    __shared__ double shared[32];
    const int at = threadIdx.x % width, groups = BLOCK / width;
    float *cache = (float *)vx_shared + threadIdx.x / width * l.pitch, *cache_y = cache + groups * l.pitch;
    for (int64_t first = (int64_t)blockIdx.x * groups; first < rows; first += (int64_t)gridDim.x * groups) {
        const int64_t r = first + threadIdx.x / width, count = r < rows ? n : 0;
        const float *g = dy + r * n, *p = y + r * n;
        float *out = dx + r * n;
        double sum = 0;
#pragma unroll 4
        for (int64_t i = at; i < count; i += width) {
            const float a = g[i], b = p[i];
            if (cached) cache[i] = a, cache_y[i] = b;
            sum += log ? a : a * b;
        }
        const float total = (float)row_sum(sum, width, shared);
        const float *kept_g = cached ? cache : g, *kept_p = cached ? cache_y : p;
#pragma unroll 4
        for (int64_t i = at; i < count; i += width)
            out[i] = log ? kept_g[i] - expf(kept_p[i]) * total : kept_p[i] * (kept_g[i] - total);
    }
}

static layout layout_of(int64_t n, int kept)
{
    layout l;
    l.width = n > LONG ? BLOCK : vx_lanes_for(n);
    l.pitch = l.width < 32 ? (vx_ceil_div(n, l.width) | 1) * l.width : n;
    const int64_t bytes = BLOCK / l.width * l.pitch * kept * (int64_t)sizeof(float);
    l.cached = bytes <= CACHED;
    l.shared = l.cached ? (size_t)bytes : 0;
    return l;
}

/* Computes y = softmax(x) per row, or its logarithm where log is 1. y may not be x. */
int vx_cuda_softmax(vx_tensor *y, vx_tensor *x, int log)
{
    const int64_t rows = x->shape[0], n = x->shape[1];
    if (!x->numel) return VX_OK;
    const layout l = layout_of(n, 1);
    VX_LAUNCH(softmax_kernel, vx_grid(rows, BLOCK / l.width), BLOCK, l.shared, vx_f32(y), vx_f32(x), rows, n, l, log);
    return vx_status();
}

/* Computes dx from dy and the output y of softmax, or of its logarithm where log is 1. */
int vx_cuda_softmax_backward(vx_tensor *dx, vx_tensor *dy, vx_tensor *y, int log)
{
    const int64_t rows = y->shape[0], n = y->shape[1];
    if (!y->numel) return VX_OK;
    const layout l = layout_of(n, 2);
    VX_LAUNCH(softmax_backward_kernel, vx_grid(rows, BLOCK / l.width), BLOCK, l.shared, vx_f32(dx), vx_f32(dy),
              vx_f32(y), rows, n, l, log);
    return vx_status();
}
