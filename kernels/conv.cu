/* conv.cu: dense 3x3 convolution, stride 1, zero padding 1, with its gradients, and nearest-neighbour enlargement on CUDA; the formulas are
 * in conv.c.
 *
 * Forward is a product (pixels, 9 C) times (9 C, O) whose first factor is never stored: a block gathers 64 pixels by 32 of the 9 C numbers
 * into shared memory at a time and multiplies them with 64 outputs in registers. The gradient of x is the same with w turned and C and O
 * exchanged. For at most 4 outputs (the last layer of an image decoder) a warp takes a pixel, its lanes the channels.
 * The gradient of w is a product (9 C, pixels) times (pixels, O) with the pixels cut into parts, which are added in order; for at most 4
 * outputs a thread takes one of the 9 C rows.
 *
 * Cost: 18 B H W C O flops each, in float32 whatever the images' types. x is read nine times, eight of them from the caches.
 */
#include "depthwise.cuh"
#include "gemm.cuh"

constexpr int CONV_RT = 4, CONV_PIXELS = 16 * CONV_RT, FEW = 4, BLOCK = 256, WARPS = BLOCK / 32;
static_assert(CHUNK == 32, "a lane for each number of a chunk");

/* y (B,H,W,O) from x (B,H,W,C): y += w(tap, c, o) x(pixel + tap), the weight of tap t (0 .. 8) at w[t tap + c input + o output]. */
template <class X, class Y> struct conv {
    int64_t B, H, W, C, O;
    int64_t tap, input, output;
    const float *w, *bias;
    const X *x;
    Y *y;
};

/* A pixel of x, counted over the batch, with its row and column, as far as they are looked up: at moved(tap) is its neighbour. */
typedef struct place {
    int64_t pixel;
    int h, w; /* h is off every image where there is no such pixel */
} place;
VX_DEVICE place place_of(int64_t pixel, int64_t pixels, int64_t H, int64_t W)
{
    if (pixel >= pixels) return {0, -2, 0};
    const int64_t row = pixel / W;
    return {pixel, (int)(row % H), (int)(pixel - row * W)};
}

/* x at the place moved by tap, channel c; 0 off the image. */
template <class X> VX_DEVICE float pixel_value(const X *x, int64_t H, int64_t W, int64_t C, const place &at, int tap, int64_t c)
{
    const int u = tap / 3 - 1, v = tap - tap / 3 * 3 - 1, h = at.h + u, w = at.w + v;
    return h >= 0 && h < H && w >= 0 && w < W ? vx_get(x + (at.pixel + u * W + v) * C + c) : 0;
}

template <class X, class Y> VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS) conv_kernel(conv<X, Y> s)
{
    alignas(16) __shared__ float a[CONV_PIXELS * ROW_PITCH], b[CHUNK * PANEL];
    const int64_t first = (int64_t)blockIdx.x * CONV_PIXELS, outputs = (int64_t)blockIdx.y * PANEL, pixels = s.B * s.H * s.W, depth = 9 * s.C;
    const int tx = tile_x(), ty = tile_y();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32; /* lane: of the chunk; a warp gathers every eighth pixel */
    place places[CONV_PIXELS / WARPS];
    for (int i = 0; i < CONV_PIXELS / WARPS; i++) places[i] = place_of(first + warp + WARPS * i, pixels, s.H, s.W);
    float sum[CONV_RT][4] = {};
    for (int64_t from = 0; from < depth; from += CHUNK) {
        const int64_t at = from + lane;
        const int tap = (int)(at / s.C);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < CONV_PIXELS / WARPS; i++)
            a[(warp + WARPS * i) * ROW_PITCH + lane] = at < depth ? pixel_value(s.x, s.H, s.W, s.C, places[i], tap, at - tap * s.C) : 0;
        for (int i = threadIdx.x; i < CHUNK * PANEL; i += TILE_THREADS) {
            const int64_t at = from + i / PANEL, o = outputs + i % PANEL;
            b[i] = at < depth && o < s.O ? s.w[at / s.C * s.tap + at % s.C * s.input + o * s.output] : 0;
        }
        __syncthreads();
        multiply_tile<CONV_RT, 1>(sum, a, b, CHUNK);
    }
#pragma unroll
    for (int i = 0; i < CONV_RT; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t pixel = first + ty + 16 * i, o = outputs + 4 * tx + j;
            if (pixel < pixels && o < s.O) vx_put(s.y + pixel * s.O + o, sum[i][j] + (s.bias ? s.bias[o] : 0));
        }
}

/* At most FEW outputs. Shared: the weights (9 C, FEW). */
template <class X, class Y> VX_KERNEL VX_HOT conv_few_kernel(conv<X, Y> s)
{
    float4 *w = vx_shared;
    const int lane = threadIdx.x % 32;
    for (int64_t i = threadIdx.x; i < 9 * s.C; i += BLOCK) {
        float q[FEW];
        for (int o = 0; o < FEW; o++) q[o] = o < s.O ? s.w[i / s.C * s.tap + i % s.C * s.input + o * s.output] : 0;
        w[i] = make_float4(q[0], q[1], q[2], q[3]);
    }
    __syncthreads();
    for (int64_t pixel = vx_first() / 32; pixel < s.B * s.H * s.W; pixel += vx_step() / 32) {
        const place at = place_of(pixel, s.B * s.H * s.W, s.H, s.W);
        float sum[FEW] = {};
        for (int tap = 0; tap < 9; tap++)
            for (int64_t c = lane; c < s.C; c += 32) {
                const float x = pixel_value(s.x, s.H, s.W, s.C, at, tap, c);
                const float4 q = w[tap * s.C + c];
                sum[0] += x * q.x, sum[1] += x * q.y, sum[2] += x * q.z, sum[3] += x * q.w;
            }
#pragma unroll
        for (int o = 0; o < FEW; o++) sum[o] = vx_warp_sum(sum[o]);
        const float mine = lane == 0 ? sum[0] : lane == 1 ? sum[1] : lane == 2 ? sum[2] : sum[3];
        if (lane < s.O) vx_put(s.y + pixel * s.O + lane, mine + (s.bias ? s.bias[lane] : 0));
    }
}

template <class X, class Y> static void convolve(const conv<X, Y> &s)
{
    const int64_t pixels = s.B * s.H * s.W, few_bytes = 9 * s.C * (int64_t)sizeof(float4);
    if (!pixels || !s.O) return;
    if (s.O <= FEW && few_bytes <= 48 << 10) VX_LAUNCH((conv_few_kernel<X, Y>), vx_grid(pixels, 64), BLOCK, (size_t)few_bytes, s);
    else
        VX_LAUNCH((conv_kernel<X, Y>), dim3((unsigned)vx_ceil_div(pixels, CONV_PIXELS), (unsigned)vx_ceil_div(s.O, PANEL)), TILE_THREADS, 0, s);
}

int vx_cuda_conv3x3(vx_tensor *y, vx_tensor *x, vx_tensor *w, vx_tensor *bias)
{
    const int64_t B = x->shape[0], H = x->shape[1], W = x->shape[2], C = x->shape[3], O = y->shape[3];
    VX_TYPED(vx_is_bf16(x), X,
             VX_TYPED(vx_is_bf16(y), Y,
                      convolve<X, Y>({B, H, W, C, O, C * O, O, 1, vx_f32(w), vx_f32(bias), (const X *)x->data, (Y *)y->data})));
    return vx_status();
}

int vx_cuda_conv3x3_backward_input(vx_tensor *dx, vx_tensor *dy, vx_tensor *w)
{
    const int64_t B = dx->shape[0], H = dx->shape[1], W = dx->shape[2], C = dx->shape[3], O = dy->shape[3];
    const float *turned = vx_f32(w) + 8 * C * O; /* by 180 degrees: tap t is the forward pass's 8 - t */
    VX_TYPED(vx_is_bf16(dy), X,
             VX_TYPED(vx_is_bf16(dx), Y, convolve<X, Y>({B, H, W, O, C, -C * O, 1, O, turned, NULL, (const X *)dy->data, (Y *)dx->data})));
    return vx_status();
}

/* partial (parts, 9 C, O). */
template <class X, class Y>
VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS)
    conv_weight_kernel(float *partial, const X *x, const Y *dy, int64_t B, int64_t H, int64_t W, int64_t C, int64_t O, int64_t parts)
{
    alignas(16) __shared__ float a[CHUNK * PANEL], b[CHUNK * PANEL];
    const int64_t m = (int64_t)blockIdx.x * PANEL, n = (int64_t)blockIdx.y * PANEL, part = blockIdx.z, pixels = B * H * W;
    const int64_t end = (part + 1) * pixels / parts;
    const int tx = tile_x(), ty = tile_y(), column = threadIdx.x % PANEL, tap = (int)((m + column) / C);
    const int64_t channel = m + column - tap * C, o = n + column;
    float sum[4][4] = {};
    for (int64_t from = part * pixels / parts; from < end; from += CHUNK) {
        __syncthreads();
        for (int i = threadIdx.x; i < CHUNK * PANEL; i += TILE_THREADS) {
            const int64_t pixel = from + i / PANEL;
            a[i] = tap < 9 ? pixel_value(x, H, W, C, place_of(pixel, end, H, W), tap, channel) : 0;
            b[i] = pixel < end && o < O ? vx_get(dy + pixel * O + o) : 0;
        }
        __syncthreads();
        for (int k = 0; k < CHUNK; k++) {
            const float4 p = *(const float4 *)(a + k * PANEL + 4 * ty), q = *(const float4 *)(b + k * PANEL + 4 * tx);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float z = i == 0 ? p.x : i == 1 ? p.y : i == 2 ? p.z : p.w;
                sum[i][0] += z * q.x, sum[i][1] += z * q.y, sum[i][2] += z * q.z, sum[i][3] += z * q.w;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (m + 4 * ty + i < 9 * C && n + 4 * tx + j < O) partial[(part * 9 * C + m + 4 * ty + i) * O + n + 4 * tx + j] = sum[i][j];
}

/* The same for at most FEW outputs: a thread for each of the 9 C rows. */
template <class X, class Y>
VX_KERNEL VX_HOT conv_weight_few_kernel(float *partial, const X *x, const Y *dy, int64_t B, int64_t H, int64_t W, int64_t C, int64_t O, int64_t parts)
{
    const int64_t row = (int64_t)blockIdx.x * BLOCK + threadIdx.x, part = blockIdx.y, pixels = B * H * W;
    if (row >= 9 * C) return;
    float sum[FEW] = {};
    const int tap = (int)(row / C);
    for (int64_t pixel = part * pixels / parts; pixel < (part + 1) * pixels / parts; pixel++) {
        const float z = pixel_value(x, H, W, C, place_of(pixel, pixels, H, W), tap, row - tap * C);
#pragma unroll
        for (int o = 0; o < FEW; o++)
            if (o < O) sum[o] += z * vx_get(dy + pixel * O + o);
    }
    for (int o = 0; o < O; o++) partial[(part * 9 * C + row) * O + o] = sum[o];
}

/* partial (parts, C): sums of rows. Block: 32 columns, 8 warps taking every eighth row. */
template <class X> VX_KERNEL rows_sum_kernel(float *partial, const X *x, int64_t rows, int64_t C, int64_t parts)
{
    __shared__ float shared[8][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t c = (int64_t)blockIdx.y * 32 + lane, part = blockIdx.x;
    float sum = 0;
    for (int64_t r = part * rows / parts + warp; r < (part + 1) * rows / parts && c < C; r += 8) sum += vx_get(x + r * C + c);
    shared[warp][lane] = sum;
    __syncthreads();
    if (warp || c >= C) return;
    for (int t = 1; t < 8; t++) sum += shared[t][lane];
    partial[part * C + c] = sum;
}

void vx_add_rows(float *sum, const vx_tensor *x, int64_t rows, int64_t C)
{
    const int64_t parts = vx_max64(vx_min64(rows / 64, 512), 1);
    if (!C) return;
    float *partial = VX_SCRATCH(float, parts * C);
    VX_TYPED(vx_is_bf16(x), X,
             VX_LAUNCH((rows_sum_kernel<X>), dim3((unsigned)parts, (unsigned)vx_ceil_div(C, 32)), BLOCK, 0, partial, (const X *)x->data, rows, C,
                       parts));
    vx_add_parts(sum, partial, C, parts, C);
}

template <class X, class Y>
static void weight_parts(float *partial, const X *x, const Y *dy, int64_t B, int64_t H, int64_t W, int64_t C, int64_t O, int64_t parts)
{
    if (O <= FEW)
        VX_LAUNCH((conv_weight_few_kernel<X, Y>), dim3((unsigned)vx_ceil_div(9 * C, BLOCK), (unsigned)parts), BLOCK, 0, partial, x, dy, B, H, W, C, O,
                  parts);
    else
        VX_LAUNCH((conv_weight_kernel<X, Y>), dim3((unsigned)vx_ceil_div(9 * C, PANEL), (unsigned)vx_ceil_div(O, PANEL), (unsigned)parts),
                  TILE_THREADS, 0, partial, x, dy, B, H, W, C, O, parts);
}

int vx_cuda_conv3x3_backward_weight(vx_tensor *dw, vx_tensor *dbias, vx_tensor *x, vx_tensor *dy)
{
    const int64_t B = x->shape[0], H = x->shape[1], W = x->shape[2], C = x->shape[3], O = dy->shape[3], pixels = B * H * W;
    if (!dw->numel && !(dbias && dbias->numel)) return VX_OK;
    const bool few = O <= FEW;
    const int64_t tiles = few ? vx_ceil_div(9 * C, BLOCK) : vx_ceil_div(9 * C, PANEL) * vx_ceil_div(O, PANEL);
    const int64_t most = few ? pixels / 256 : pixels / 1024, memory = (INT64_C(8) << 20) / vx_max64(9 * C * O, 1);
    const int64_t parts = vx_max64(vx_min64(vx_min64(vx_ceil_div(1024, vx_max64(tiles, 1)), most), memory), 1);
    float *partial = VX_SCRATCH(float, parts * 9 * C * O);
    if (dw->numel)
        VX_TYPED(vx_is_bf16(x), X,
                 VX_TYPED(vx_is_bf16(dy), Y, weight_parts(partial, (const X *)x->data, (const Y *)dy->data, B, H, W, C, O, parts)));
    if (dw->numel) vx_add_parts(vx_f32(dw), partial, 9 * C * O, parts, 9 * C * O);
    if (dbias) vx_add_rows(vx_f32(dbias), dy, pixels, O);
    return vx_status();
}

/* -- Enlargement --------------------------------------------------------------------------------------------------------- */

VX_KERNEL upsample_kernel(float *y, const float *x, int64_t rows, int64_t W, int64_t C)
{
    for (int64_t i = vx_first(); i < rows * W * C * 4; i += vx_step()) {
        const int64_t c = i % C, q = i / C % (2 * W), r = i / C / (2 * W); /* r: row of the enlarged image, counted over the batch */
        y[i] = x[(r / 2 * W + q / 2) * C + c];
    }
}

VX_KERNEL upsample_backward_kernel(float *dx, const float *dy, int64_t rows, int64_t W, int64_t C)
{
    for (int64_t i = vx_first(); i < rows * W * C; i += vx_step()) {
        const int64_t c = i % C, w = i / C % W, r = i / C / W;
        const float *a = dy + (4 * r * W + 2 * w) * C + c, *b = a + 2 * W * C;
        dx[i] = (a[0] + a[C]) + (b[0] + b[C]);
    }
}

int vx_cuda_upsample2x(vx_tensor *y, vx_tensor *x)
{
    if (!y->numel) return VX_OK;
    VX_LAUNCH(upsample_kernel, vx_grid(y->numel, BLOCK), BLOCK, 0, vx_f32(y), vx_f32(x), x->shape[0] * x->shape[1], x->shape[2], x->shape[3]);
    return vx_status();
}

int vx_cuda_upsample2x_backward(vx_tensor *dx, vx_tensor *dy)
{
    if (!dx->numel) return VX_OK;
    VX_LAUNCH(upsample_backward_kernel, vx_grid(dx->numel, BLOCK), BLOCK, 0, vx_f32(dx), vx_f32(dy), dx->shape[0] * dx->shape[1], dx->shape[2],
              dx->shape[3]);
    return vx_status();
}
