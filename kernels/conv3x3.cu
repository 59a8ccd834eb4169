/* conv3x3.cu: dense 3x3 convolution, stride 1, zero padding 1, with its gradients on CUDA; the formulas are in
 * conv3x3.c.
 *
 * In float32. Forward is a product (pixels, 9 C) times (9 C, O) whose first factor is never stored: a block gathers 64
 * pixels by 32 of the 9 C numbers into shared memory at a time and multiplies them with 64 outputs in registers. The
 * gradient of x is the same with w turned by 180 degrees and C and O exchanged. For at most 4 outputs (the last layer
 * of an image decoder) a warp takes a pixel, its lanes the channels. The gradient of w is a product (9 C, pixels) times
 * (pixels, O). Its pixels are cut into parts, which are added in order; for at most 4 outputs a thread takes one of the
 * 9 C rows. Cost: 18 B H W C O flops each. x is read nine times, eight of them from the caches.
 *
 * In bf16, that is under vx_autocast or where an image read or written is bf16. Products run on tensor cores, their
 * factors rounded to bf16, their sums float32. Forward and the gradient of x go as above, for up to 128 outputs a
 * block, so that 3 channels are gathered once for all of them.
 *
 * In bf16 with at most 3 outputs the taps become columns: z = x w is (pixels, C) times (C, 9 O), for which x is read
 * once, and y is made of z at the nine neighbours. Rejected: (a) a warp per pixel: 144 clocks of shared-memory reads of
 * w at C = 128, against 12 for x; (b) taps along the depth: every fragment of x is loaded 9 times, and 3 of 8 columns
 * of a product are used.
 *
 * In bf16 one kernel makes all gradients of w. dw(tap, c, o) is the sum over pixels of x(pixel + tap, c) dy(pixel, o),
 * which equals that of x(pixel, c) dy(pixel - tap, o). So the image of fewer channels is gathered, and the other is
 * read as it stands: once, if the fewer are 3.
 */
#include "cuda/reduce_parts.cuh"
#include "cuda/gemm_tile.cuh"

constexpr int CONV_RT = 4, CONV_PIXELS = 16 * CONV_RT, FEW = 4, BLOCK = 256, WARPS = BLOCK / 32;
static_assert(CHUNK == 32, "a lane for each number of a chunk");

/* One convolution, of y (B,H,W,O) from x (B,H,W,C): y += w(tap, c, o) x(pixel + tap). The weight of tap t (0 .. 8) is
 * w[t tap + c input + o output]. */
typedef struct conv {
    int64_t B, H, W, C, O;
    int64_t tap, input, output;
    const float *w, *bias;
    const void *x; /* f32 or bf16 each, as the kernel has it */
    void *y;
} conv;

/* A pixel of x, counted over the batch, with its row and column in its image. */
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

/* Returns x at the pixel moved by tap (0 .. 8), channel c; 0 off the image. */
VX_DEVICE float pixel_value(const float *x, int64_t H, int64_t W, int64_t C, const place &at, int tap, int64_t c)
{
    const int u = tap / 3 - 1, v = tap - tap / 3 * 3 - 1, h = at.h + u, w = at.w + v;
    return h >= 0 && h < H && w >= 0 && w < W ? x[(at.pixel + u * W + v) * C + c] : 0;
}

VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS) conv_kernel(conv s)
{
    alignas(16) __shared__ float a[CONV_PIXELS * ROW_PITCH], b[CHUNK * TILE_COLUMNS];
    const int64_t first = (int64_t)blockIdx.x * CONV_PIXELS, outputs = (int64_t)blockIdx.y * TILE_COLUMNS,
                  pixels = s.B * s.H * s.W, depth = 9 * s.C;
    const float *x = (const float *)s.x;
    const int tx = tile_x(), ty = tile_y();
    const int lane = threadIdx.x % 32,
              warp = threadIdx.x / 32; /* lane: of the chunk; a warp gathers every eighth pixel */
    place places[CONV_PIXELS / WARPS];
    for (int i = 0; i < CONV_PIXELS / WARPS; i++) places[i] = place_of(first + warp + WARPS * i, pixels, s.H, s.W);
    float sum[CONV_RT][4] = {};
    for (int64_t from = 0; from < depth; from += CHUNK) {
        const int64_t at = from + lane;
        const int tap = (int)(at / s.C);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < CONV_PIXELS / WARPS; i++)
            a[(warp + WARPS * i) * ROW_PITCH + lane] =
                at < depth ? pixel_value(x, s.H, s.W, s.C, places[i], tap, at - tap * s.C) : 0;
        for (int i = threadIdx.x; i < CHUNK * TILE_COLUMNS; i += TILE_THREADS) {
            const int64_t at = from + i / TILE_COLUMNS, o = outputs + i % TILE_COLUMNS;
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
            if (pixel < pixels && o < s.O) ((float *)s.y)[pixel * s.O + o] = sum[i][j] + (s.bias ? s.bias[o] : 0);
        }
}

/* Makes at most FEW outputs, a warp for each pixel. Shared: the weights (9 C,FEW). */
VX_KERNEL VX_HOT conv_few_kernel(conv s)
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
                const float x = pixel_value((const float *)s.x, s.H, s.W, s.C, at, tap, c);
                const float4 q = w[tap * s.C + c];
                sum[0] += x * q.x, sum[1] += x * q.y, sum[2] += x * q.z, sum[3] += x * q.w;
            }
#pragma unroll
        for (int o = 0; o < FEW; o++) sum[o] = vx_warp_sum(sum[o]);
        const float mine = lane == 0 ? sum[0] : lane == 1 ? sum[1] : lane == 2 ? sum[2] : sum[3];
        if (lane < s.O) ((float *)s.y)[pixel * s.O + lane] = mine + (s.bias ? s.bias[lane] : 0);
    }
}

/* -- In bf16 ------------------------------------------------------------------------------------------------------- */

/* Writes the weights of each output in turn as bf16, cut into rows of `depth` (9 C, or C: a row for each tap), `pitch`
 * apart, with zeros around. */
VX_KERNEL weights_kernel(vx_bf16 *to, conv s, int64_t rows, int64_t depth, int64_t pitch)
{
    for (int64_t i = vx_first(); i < rows * pitch; i += vx_step()) {
        const int64_t k = i % pitch, at = i / pitch * depth + k, tap = at / s.C % 9, o = at / s.C / 9;
        to[i] = vx_to_bf16(k < depth && o < s.O ? s.w[tap * s.tap + at % s.C * s.input + o * s.output] : 0);
    }
}

/* Gathers a (CONV_PIXELS,BF16_PITCH): of each pixel from `first` on, those of its 9 C numbers that the warp's lanes
 * stand for; a lane's is number `at`. Pixels from `end` on are zeros. A warp takes neighbouring pixels, whose places
 * its lanes find for each other. */
template <class X>
VX_DEVICE void gather(vx_bf16 *a, const X *x, int64_t H, int64_t W, int64_t C, int64_t first, int64_t end, int64_t at)
{
    constexpr int EACH = CONV_PIXELS / WARPS;
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * EACH, tap = (int)(at / C), u = tap / 3 - 1,
              v = tap % 3 - 1;
    const place mine = place_of(first + row + lane % EACH, end, H, W);
    const int64_t from = (first + row + u * W + v) * C + at - tap * C;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int h = __shfl_sync(VX_ALL_LANES, mine.h, i) + u, w = __shfl_sync(VX_ALL_LANES, mine.w, i) + v;
        const bool there = tap < 9 && h >= 0 && h < H && w >= 0 && w < W;
        a[(row + i) * BF16_PITCH + lane] = vx_to_bf16(there ? vx_get(x + from + i * C) : 0);
    }
}

/* Loads numbers 0 .. 7 of x as bf16; those from `count` on are zeros. Where `whole` is set there are 8 or none, on a
 * multiple of 16 bytes, and one load does. */
template <class X> VX_DEVICE uint4 eight(const X *x, int64_t count, bool whole)
{
    if constexpr (sizeof(X) == 2)
        if (whole) return count > 0 ? *(const uint4 *)x : make_uint4(0, 0, 0, 0);
    float q[8];
#pragma unroll
    for (int i = 0; i < 8; i++) q[i] = i < count ? vx_get(x + i) : 0;
    return make_uint4(vx_pack_bf16(q[0], q[1]), vx_pack_bf16(q[2], q[3]), vx_pack_bf16(q[4], q[5]),
                      vx_pack_bf16(q[6], q[7]));
}
static bool whole_eights(const vx_tensor *x) { return x->shape[3] % 8 == 0 && vx_aligned(x, 16); }

/* Makes OUT times 64 outputs of CONV_PIXELS pixels. weights: a row of 9 C for each output. */
template <int OUT, class X, class Y>
VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS, 3) conv_bf16_kernel(conv s, const vx_bf16 *weights, int64_t pitch)
{
    alignas(16) __shared__ vx_bf16 a[CONV_PIXELS * BF16_PITCH], b[OUT * TILE_COLUMNS * BF16_PITCH];
    const int lane = threadIdx.x % 32, row = bf16_tile_row(), column = bf16_tile_column<OUT>();
    const int64_t first = (int64_t)blockIdx.x * CONV_PIXELS, outputs = (int64_t)blockIdx.y * OUT * TILE_COLUMNS,
                  pixels = s.B * s.H * s.W;
    float sum[4 * OUT][4] = {};
    for (int64_t from = 0; from < pitch; from += CHUNK) {
        __syncthreads();
        gather(a, (const X *)s.x, s.H, s.W, s.C, first, pixels, from + lane);
        for (int i = threadIdx.x; i < OUT * TILE_COLUMNS * CHUNK / 8; i += TILE_THREADS)
            *(uint4 *)(b + i / 4 * BF16_PITCH + i % 4 * 8) =
                *(const uint4 *)(weights + (outputs + i / 4) * pitch + from + i % 4 * 8);
        __syncthreads();
        multiply_bf16_tile<OUT>(sum, a, b);
    }
    const bool paired = s.O % 2 == 0 && (uintptr_t)s.y % (2 * sizeof(Y)) == 0;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4 * OUT; j++) {
            const int64_t pixel = first + row + 8 * i + lane / 4, o = outputs + column + 8 * j + lane % 4 * 2;
            if (pixel >= pixels || o >= s.O) continue;
            const bool two = o + 1 < s.O;
            put_two((Y *)s.y + pixel * s.O + o, two, paired, sum[j][2 * i] + (s.bias ? s.bias[o] : 0),
                    sum[j][2 * i + 1] + (s.bias && two ? s.bias[o + 1] : 0));
        }
}

/* Makes at most FEW_BF16 outputs. A block makes SPAN x SPAN pixels of y. Its warps take 16 of the RIM x RIM pixels
 * under them at a time, by all columns of z: column 9 o + tap. weights: a row of C for each column. A lane loads 8
 * channels side by side, of x as of w, and makes fragments of them: which channel is which of a product's 16 does not
 * matter as long as the factors agree. */
constexpr int SPAN = 16, RIM = SPAN + 2, FEW_BF16 = 3, TURNS = (RIM * RIM + 16 * WARPS - 1) / (16 * WARPS);
static_assert(SPAN * SPAN == BLOCK && 9 * FEW_BF16 <= CHUNK, "a thread for each pixel of y, four times 8 columns of z");
template <class X, class Y>
VX_KERNEL VX_HOT __launch_bounds__(BLOCK, sizeof(X) == 2 ? 2 : 1)
    conv_few_bf16_kernel(conv s, const vx_bf16 *weights, int64_t pitch, bool whole)
{
    __shared__ float z[9 * FEW_BF16][RIM * RIM];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, columns = 9 * (int)s.O;
    const int64_t down = (s.H + SPAN - 1) / SPAN, across = (s.W + SPAN - 1) / SPAN;
    const int64_t image = blockIdx.x / across / down * s.H, top = blockIdx.x / across % down * SPAN - 1,
                  left = blockIdx.x % across * SPAN - 1;
    int64_t at[TURNS][2]; /* where the lane's pixels begin in x; less than 0: off the image */
#pragma unroll
    for (int i = 0; i < 2 * TURNS; i++) {
        const int pixel = 16 * (warp + i / 2 * WARPS) + i % 2 * 8 + lane / 4;
        const int64_t h = top + pixel / RIM, w = left + pixel % RIM;
        at[i / 2][i % 2] =
            pixel < RIM * RIM && h >= 0 && h < s.H && w >= 0 && w < s.W ? ((image + h) * s.W + w) * s.C : -1;
    }
    float sum[TURNS][4][4] = {};
    for (int64_t c = lane % 4 * 8; c < pitch; c += CHUNK) {
        uint4 right[4];
#pragma unroll
        for (int j = 0; j < 4; j++) right[j] = *(const uint4 *)(weights + (8 * j + lane / 4) * pitch + c);
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            const uint4 upper = eight((const X *)s.x + at[i][0] + c, at[i][0] < 0 ? 0 : s.C - c, whole);
            const uint4 lower = eight((const X *)s.x + at[i][1] + c, at[i][1] < 0 ? 0 : s.C - c, whole);
            const uint32_t x[2][4] = {{upper.x, lower.x, upper.y, lower.y}, {upper.z, lower.z, upper.w, lower.w}};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint32_t w[2][2] = {{right[j].x, right[j].y}, {right[j].z, right[j].w}};
                vx_mma_bf16(sum[i][j], x[0], w[0]);
                vx_mma_bf16(sum[i][j], x[1], w[1]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < TURNS; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int pixel = 16 * (warp + i * WARPS) + k / 2 * 8 + lane / 4, column = 8 * j + lane % 4 * 2 + k % 2;
                if (pixel < RIM * RIM && column < columns) z[column][pixel] = sum[i][j][k];
            }
    __syncthreads();
    const int p = threadIdx.x / SPAN, q = threadIdx.x % SPAN;
    const int64_t h = top + 1 + p, w = left + 1 + q;
    if (h >= s.H || w >= s.W) return;
    for (int o = 0; o < s.O; o++) {
        float total = 0;
#pragma unroll
        for (int tap = 0; tap < 9; tap++) total += z[9 * o + tap][(p + tap / 3) * RIM + q + tap % 3];
        vx_put((Y *)s.y + ((image + h) * s.W + w) * s.O + o, total + (s.bias ? s.bias[o] : 0));
    }
}

/* -- Forward, and the gradient of x -------------------------------------------------------------------------------- */

static conv conv_of(const vx_tensor *y, const vx_tensor *x, int64_t tap, int64_t input, int64_t output)
{
    return {x->shape[0], x->shape[1], x->shape[2], x->shape[3], y->shape[3], tap,
            input,       output,      NULL,        NULL,        x->data,     y->data};
}

template <class X, class Y> static void convolve_bf16(const conv &s, bool whole)
{
    const bool few = s.O <= FEW_BF16;
    const int out = s.O > TILE_COLUMNS ? 2 : 1;
    const int64_t depth = few ? s.C : 9 * s.C, pitch = vx_ceil_div(depth, CHUNK) * CHUNK,
                  across = vx_ceil_div(s.O, out * TILE_COLUMNS);
    const int64_t rows = few ? CHUNK : across * out * TILE_COLUMNS;
    vx_bf16 *weights = VX_SCRATCH(vx_bf16, rows * pitch);
    VX_LAUNCH(weights_kernel, vx_grid(rows * pitch, BLOCK), BLOCK, 0, weights, s, rows, depth, pitch);
    const dim3 grid((unsigned)vx_ceil_div(s.B * s.H * s.W, CONV_PIXELS), (unsigned)across);
    if (few)
        VX_LAUNCH((conv_few_bf16_kernel<X, Y>), (unsigned)(s.B * vx_ceil_div(s.H, SPAN) * vx_ceil_div(s.W, SPAN)),
                  BLOCK, 0, s, weights, pitch, whole);
    else if (out == 2) VX_LAUNCH((conv_bf16_kernel<2, X, Y>), grid, TILE_THREADS, 0, s, weights, pitch);
    else VX_LAUNCH((conv_bf16_kernel<1, X, Y>), grid, TILE_THREADS, 0, s, weights, pitch);
}

static void convolve(const conv &s, const vx_tensor *y, const vx_tensor *x)
{
    const int64_t pixels = s.B * s.H * s.W, few_bytes = 9 * s.C * (int64_t)sizeof(float4);
    if (!pixels || !s.O) return;
    if (vx_in_bf16(x, y))
        VX_TYPED(vx_is_bf16(x), X, VX_TYPED(vx_is_bf16(y), Y, convolve_bf16<X, Y>(s, whole_eights(x))));
    else if (s.O <= FEW && few_bytes <= 48 << 10)
        VX_LAUNCH(conv_few_kernel, vx_grid(pixels, 64), BLOCK, (size_t)few_bytes, s);
    else
        VX_LAUNCH(conv_kernel,
                  dim3((unsigned)vx_ceil_div(pixels, CONV_PIXELS), (unsigned)vx_ceil_div(s.O, TILE_COLUMNS)),
                  TILE_THREADS, 0, s);
}

int vx_cuda_conv3x3(vx_tensor *y, vx_tensor *x, vx_tensor *w, vx_tensor *bias)
{
    const int64_t C = x->shape[3], O = y->shape[3];
    conv s = conv_of(y, x, C * O, O, 1);
    s.w = vx_f32(w), s.bias = vx_f32(bias);
    convolve(s, y, x);
    return vx_status();
}

int vx_cuda_conv3x3_backward_input(vx_tensor *dx, vx_tensor *dy, vx_tensor *w)
{
    const int64_t C = dx->shape[3], O = dy->shape[3];
    conv s = conv_of(dx, dy, -C * O, 1, O); /* turned by 180 degrees: tap t is the forward pass's 8 - t */
    s.w = vx_f32(w) + 8 * C * O;
    convolve(s, dx, dy);
    return vx_status();
}

/* -- The gradient of w --------------------------------------------------------------------------------------------- */

/* Sums a part of the pixels into partial (parts,9 C,O). A block has 64 of the 9 C rows by 64 outputs. */
VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS)
    conv_weight_kernel(float *partial, const float *x, const float *dy, int64_t B, int64_t H, int64_t W, int64_t C,
                       int64_t O, int64_t parts)
{
    alignas(16) __shared__ float a[CHUNK * TILE_COLUMNS], b[CHUNK * TILE_COLUMNS];
    const int64_t m = (int64_t)blockIdx.x * TILE_COLUMNS, n = (int64_t)blockIdx.y * TILE_COLUMNS, part = blockIdx.z,
                  pixels = B * H * W;
    const int64_t end = (part + 1) * pixels / parts;
    const int tx = tile_x(), ty = tile_y(), column = threadIdx.x % TILE_COLUMNS, tap = (int)((m + column) / C);
    const int64_t channel = m + column - tap * C, o = n + column;
    float sum[4][4] = {};
    for (int64_t from = part * pixels / parts; from < end; from += CHUNK) {
        __syncthreads();
        for (int i = threadIdx.x; i < CHUNK * TILE_COLUMNS; i += TILE_THREADS) {
            const int64_t pixel = from + i / TILE_COLUMNS;
            a[i] = tap < 9 ? pixel_value(x, H, W, C, place_of(pixel, end, H, W), tap, channel) : 0;
            b[i] = pixel < end && o < O ? dy[pixel * O + o] : 0;
        }
        __syncthreads();
        for (int k = 0; k < CHUNK; k++)
            add_outer(sum, *(const float4 *)(a + k * TILE_COLUMNS + 4 * ty),
                      *(const float4 *)(b + k * TILE_COLUMNS + 4 * tx));
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (m + 4 * ty + i < 9 * C && n + 4 * tx + j < O)
                partial[(part * 9 * C + m + 4 * ty + i) * O + n + 4 * tx + j] = sum[i][j];
}

/* Sums a part of the pixels into partial (parts,9 C,O), for at most FEW outputs. A thread has one of the 9 C rows. */
VX_KERNEL VX_HOT conv_weight_few_kernel(float *partial, const float *x, const float *dy, int64_t B, int64_t H,
                                        int64_t W, int64_t C, int64_t O, int64_t parts)
{
    const int64_t row = (int64_t)blockIdx.x * BLOCK + threadIdx.x, part = blockIdx.y, pixels = B * H * W;
    if (row >= 9 * C) return;
    float sum[FEW] = {};
    const int tap = (int)(row / C);
    for (int64_t pixel = part * pixels / parts; pixel < (part + 1) * pixels / parts; pixel++) {
        const float z = pixel_value(x, H, W, C, place_of(pixel, pixels, H, W), tap, row - tap * C);
#pragma unroll
        for (int o = 0; o < FEW; o++)
            if (o < O) sum[o] += z * dy[pixel * O + o];
    }
    for (int o = 0; o < O; o++) partial[(part * 9 * C + row) * O + o] = sum[o];
}

/* Sums a part of the pixels, in bf16, into partial (parts,9 C O): a part's weights with strides as s has them, from tap
 * 0 of s on. A block has CHUNK of the 9 C rows by MANY of the O columns; a warp takes all the rows and 16 columns. Both
 * factors lie with pixels as rows, so fragments are read transposed. */
constexpr int MANY = 16 * WARPS, MANY_PITCH = MANY + 8;
template <class X, class Y>
VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS, 3)
    conv_weight_bf16_kernel(float *partial, conv s, int64_t parts, bool whole)
{
    alignas(16) __shared__ vx_bf16 a[CONV_PIXELS * BF16_PITCH], b[CONV_PIXELS * MANY_PITCH];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t row = (int64_t)blockIdx.x * CHUNK, column = (int64_t)blockIdx.y * MANY, part = blockIdx.z,
                  pixels = s.B * s.H * s.W;
    const int64_t end = (part + 1) * pixels / parts;
    float sum[2][2][4] = {};
    for (int64_t from = part * pixels / parts; from < end; from += CONV_PIXELS) {
        __syncthreads();
        gather(a, (const X *)s.x, s.H, s.W, s.C, from, end, row + lane);
        for (int i = threadIdx.x; i < CONV_PIXELS * MANY / 8; i += TILE_THREADS) {
            const int64_t pixel = from + i / (MANY / 8), o = column + i % (MANY / 8) * 8;
            *(uint4 *)(b + i / (MANY / 8) * MANY_PITCH + i % (MANY / 8) * 8) =
                eight((const Y *)s.y + pixel * s.O + o, pixel < end ? s.O - o : 0, whole);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < CONV_PIXELS; k += 16) {
            uint32_t left[4], right[4]; /* of b: columns 0 .. 7 along k, then 8 .. 15 */
            vx_load_matrices_transposed(right, b + (k + lane % 16) * MANY_PITCH + 16 * warp + lane / 16 * 8);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                vx_load_matrices_transposed(left, a + (k + lane / 16 * 8 + lane % 8) * BF16_PITCH + 16 * i +
                                                      lane / 8 % 2 * 8);
                vx_mma_bf16(sum[i][0], left, right);
                vx_mma_bf16(sum[i][1], left, right + 2);
            }
        }
    }
    float *to = partial + part * 9 * s.C * s.O;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int64_t r = row + 16 * i + k / 2 * 8 + lane / 4,
                              o = column + 16 * warp + 8 * j + lane % 4 * 2 + k % 2;
                if (r < 9 * s.C && o < s.O) to[r / s.C * s.tap + r % s.C * s.input + o * s.output] = sum[i][j][k];
            }
}

/* Returns into how many parts to cut the pixels: enough blocks for the whole device, but at most `most` parts, and not
 * too much memory for the `count` results of each. */
static int64_t weight_parts(int64_t most, int64_t tiles, int64_t count)
{
    return vx_max64(vx_min64(vx_min64(vx_ceil_div(1024, tiles), most), (INT64_C(8) << 20) / count), 1);
}

static void weight_bf16(float *dw, const vx_tensor *x, const vx_tensor *dy)
{
    const int64_t C = x->shape[3], O = dy->shape[3], count = 9 * C * O;
    const bool turned = O < C; /* dy is gathered, x read as it is, and tap t is 8 - t: the transposed convolution */
    const vx_tensor *few = turned ? dy : x, *many = turned ? x : dy;
    const conv s = turned ? conv_of(many, few, -C * O, 1, O) : conv_of(many, few, C * O, O, 1);
    const dim3 tiles((unsigned)vx_ceil_div(9 * s.C, CHUNK), (unsigned)vx_ceil_div(s.O, MANY));
    const int64_t parts = weight_parts(s.B * s.H * s.W / 1024, (int64_t)tiles.x * tiles.y, count);
    float *partial = VX_SCRATCH(float, parts *count);
    VX_TYPED(vx_is_bf16(few), X,
             VX_TYPED(vx_is_bf16(many), Y,
                      VX_LAUNCH((conv_weight_bf16_kernel<X, Y>), dim3(tiles.x, tiles.y, (unsigned)parts), TILE_THREADS,
                                0, partial + (turned ? 8 * C * O : 0), s, parts, whole_eights(many))));
    vx_add_parts(dw, partial, count, parts, count);
}

static void weight_f32(float *dw, const vx_tensor *x, const vx_tensor *dy)
{
    const int64_t B = x->shape[0], H = x->shape[1], W = x->shape[2], C = x->shape[3], O = dy->shape[3],
                  pixels = B * H * W, count = 9 * C * O;
    const bool few = O <= FEW;
    const dim3 tiles((unsigned)vx_ceil_div(9 * C, few ? BLOCK : TILE_COLUMNS),
                     few ? 1 : (unsigned)vx_ceil_div(O, TILE_COLUMNS));
    const int64_t parts = weight_parts(pixels / (few ? 256 : 1024), (int64_t)tiles.x * tiles.y, count);
    float *partial = VX_SCRATCH(float, parts *count);
    if (few)
        VX_LAUNCH(conv_weight_few_kernel, dim3(tiles.x, (unsigned)parts), BLOCK, 0, partial, vx_f32(x), vx_f32(dy), B,
                  H, W, C, O, parts);
    else
        VX_LAUNCH(conv_weight_kernel, dim3(tiles.x, tiles.y, (unsigned)parts), TILE_THREADS, 0, partial, vx_f32(x),
                  vx_f32(dy), B, H, W, C, O, parts);
    vx_add_parts(dw, partial, count, parts, count);
}

int vx_cuda_conv3x3_backward_weight(vx_tensor *dw, vx_tensor *dbias, vx_tensor *x, vx_tensor *dy)
{
    if (dw->numel && vx_in_bf16(x, dy)) weight_bf16(vx_f32(dw), x, dy);
    else if (dw->numel) weight_f32(vx_f32(dw), x, dy);
    if (dbias) vx_add_rows(vx_f32(dbias), dy, dy->shape[0] * dy->shape[1] * dy->shape[2], dy->shape[3]);
    return vx_status();
}
