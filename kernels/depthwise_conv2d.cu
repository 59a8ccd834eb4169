/* depthwise_conv2d.cu: depthwise 3x3 convolution, stride 1 or 2, and its two gradients on CUDA; the formulas are in
 * depthwise_conv2d.c.
 *
 * Forward and the gradient of x: a thread takes four channels of an output pixel (one where channels are not a multiple
 * of 4) and reads up to nine neighbours, of which eight come from the caches: a block's pixels lie side by side. Memory
 * traffic: each operand once.
 *
 * The gradient of w is a sum over all pixels: rows of the image are cut into parts by size alone; a block takes 32
 * channels of a part, its eight warps every eighth row; parts are added in order, in float64.
 */
#include "cuda/reduce_parts.cuh"
#include "cuda/vec4.cuh"

enum { BLOCK = 256 };

/* Makes y (B,P,Q,C) of x (B,H,W,C), V channels a thread. */
template <int V>
VX_KERNEL depthwise_kernel(float *y, const float *x, const float *w, const float *bias, int64_t B, int64_t H, int64_t W,
                           int64_t P, int64_t Q, int64_t C, int stride)
{
    const int64_t groups = C / V;
    for (int64_t i = vx_first(); i < B * P * Q * groups; i += vx_step()) {
        const int64_t c = i % groups * V, pixel = i / groups, q = pixel % Q, p = pixel / Q % P, b = pixel / Q / P;
        vec<V> sum = {};
        if (bias) sum = load<V>(bias + c);
#pragma unroll
        for (int u = 0; u < 3; u++)
#pragma unroll
            for (int v = 0; v < 3; v++) {
                const int64_t h = p * stride + u - 1, t = q * stride + v - 1;
                if (h >= 0 && h < H && t >= 0 && t < W)
                    multiply_add<V>(sum, load<V>(x + ((b * H + h) * W + t) * C + c), load<V>(w + (3 * u + v) * C + c));
            }
        store<V>(y + pixel * C + c, sum);
    }
}

template <int V>
VX_KERNEL depthwise_input_kernel(float *dx, const float *dy, const float *w, int64_t B, int64_t H, int64_t W, int64_t P,
                                 int64_t Q, int64_t C, int stride)
{
    const int64_t groups = C / V;
    for (int64_t i = vx_first(); i < B * H * W * groups; i += vx_step()) {
        const int64_t c = i % groups * V, pixel = i / groups, t = pixel % W, h = pixel / W % H, b = pixel / W / H;
        vec<V> sum = {};
#pragma unroll
        for (int u = 0; u < 3; u++)
#pragma unroll
            for (int v = 0; v < 3; v++) {
                const int64_t p = h + 1 - u, q = t + 1 - v; /* times stride */
                if (p >= 0 && q >= 0 && p % stride == 0 && q % stride == 0 && p / stride < P && q / stride < Q)
                    multiply_add<V>(sum, load<V>(dy + ((b * P + p / stride) * Q + q / stride) * C + c),
                                    load<V>(w + (3 * u + v) * C + c));
            }
        store<V>(dx + pixel * C + c, sum);
    }
}

/* Sums a part of the rows into partial (parts,10,C): the nine taps and the bias. A block has 32 channels; each of its 8
 * warps takes every eighth row. */
VX_KERNEL depthwise_weight_kernel(float *partial, const float *x, const float *dy, int64_t B, int64_t H, int64_t W,
                                  int64_t P, int64_t Q, int64_t C, int stride, int64_t parts)
{
    __shared__ float shared[8][10][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t c = (int64_t)blockIdx.y * 32 + lane, part = blockIdx.x, rows = B * P;
    float sum[10] = {};
    for (int64_t r = part * rows / parts + warp; r < (part + 1) * rows / parts && c < C; r += 8) {
        const int64_t b = r / P, p = r % P;
        for (int64_t q = 0; q < Q; q++) {
            const float g = dy[(r * Q + q) * C + c];
#pragma unroll
            for (int u = 0; u < 3; u++)
#pragma unroll
                for (int v = 0; v < 3; v++) {
                    const int64_t h = p * stride + u - 1, t = q * stride + v - 1;
                    if (h >= 0 && h < H && t >= 0 && t < W) sum[3 * u + v] += g * x[((b * H + h) * W + t) * C + c];
                }
            sum[9] += g;
        }
    }
#pragma unroll
    for (int i = 0; i < 10; i++) shared[warp][i][lane] = sum[i];
    __syncthreads();
    for (int i = warp; i < 10 && c < C; i += 8) {
        float total = 0;
        for (int t = 0; t < 8; t++) total += shared[t][i][lane];
        partial[(part * 10 + i) * C + c] = total;
    }
}

static bool fours(int64_t C, const vx_tensor *a, const vx_tensor *b, const vx_tensor *w, const vx_tensor *bias)
{
    return C % 4 == 0 && vx_aligned(a, 16) && vx_aligned(b, 16) && vx_aligned(w, 16) && (!bias || vx_aligned(bias, 16));
}

int vx_cuda_depthwise_conv2d(vx_tensor *y, vx_tensor *x, vx_tensor *w, vx_tensor *bias, int stride)
{
    const int64_t B = x->shape[0], H = x->shape[1], W = x->shape[2], C = x->shape[3], P = y->shape[1], Q = y->shape[2];
    if (!y->numel) return VX_OK;
    if (fours(C, x, y, w, bias))
        VX_LAUNCH(depthwise_kernel<4>, vx_grid(y->numel / 4, BLOCK), BLOCK, 0, vx_f32(y), vx_f32(x), vx_f32(w),
                  vx_f32(bias), B, H, W, P, Q, C, stride);
    else
        VX_LAUNCH(depthwise_kernel<1>, vx_grid(y->numel, BLOCK), BLOCK, 0, vx_f32(y), vx_f32(x), vx_f32(w),
                  vx_f32(bias), B, H, W, P, Q, C, stride);
    return vx_status();
}

int vx_cuda_depthwise_conv2d_backward_input(vx_tensor *dx, vx_tensor *dy, vx_tensor *w, int stride)
{
    const int64_t B = dx->shape[0], H = dx->shape[1], W = dx->shape[2], C = dx->shape[3], P = dy->shape[1],
                  Q = dy->shape[2];
    if (!dx->numel) return VX_OK;
    if (fours(C, dx, dy, w, NULL))
        VX_LAUNCH(depthwise_input_kernel<4>, vx_grid(dx->numel / 4, BLOCK), BLOCK, 0, vx_f32(dx), vx_f32(dy), vx_f32(w),
                  B, H, W, P, Q, C, stride);
    else
        VX_LAUNCH(depthwise_input_kernel<1>, vx_grid(dx->numel, BLOCK), BLOCK, 0, vx_f32(dx), vx_f32(dy), vx_f32(w), B,
                  H, W, P, Q, C, stride);
    return vx_status();
}

int vx_cuda_depthwise_conv2d_backward_weight(vx_tensor *dw, vx_tensor *dbias, vx_tensor *x, vx_tensor *dy, int stride)
{
    const int64_t B = x->shape[0], H = x->shape[1], W = x->shape[2], C = x->shape[3], P = dy->shape[1],
                  Q = dy->shape[2];
    const int64_t parts = vx_max64(vx_min64(vx_ceil_div(B * P, 8), 256), 1);
    if (!C) return VX_OK;
    float *partial = VX_SCRATCH(float, parts * 10 * C);
    VX_LAUNCH(depthwise_weight_kernel, dim3((unsigned)parts, (unsigned)vx_ceil_div(C, 32)), BLOCK, 0, partial,
              vx_f32(x), vx_f32(dy), B, H, W, P, Q, C, stride, parts);
    vx_add_parts(vx_f32(dw), partial, 9 * C, parts, 10 * C);
    if (dbias) vx_add_parts(vx_f32(dbias), partial + 9 * C, C, parts, 10 * C);
    return vx_status();
}
