/* sepconv2d.cu: the depthwise-separable convolution of sepconv2d.c on CUDA; the formulas are there.
 *
 * Forward. A block makes 8 x 8 pixels of y for 64 or 128 outputs. It goes through the channels 32 at a time: the pixels
 * of x under the tile, normalized and activated, into shared memory (zeros off the image; enlargement is a matter of
 * indexing), from there the 64 pixels of d, and their product with 32 rows of vT into registers. Neither n, u nor d
 * ever reaches memory: it reads x 1.6 times (the tile's rim), eight ninths of the rim from the L2 cache, and residual
 * once, and writes y once.
 *
 * Under vx_autocast, or where x or y is bf16, the product runs on tensor cores, its factors rounded to bf16; so do
 * those of the backward pass, in vx_gemm, and d and dd are stored as bf16. What is between memory and a product, norm,
 * activation, taps and all sums, is float32, and so are the gradients of the parameters.
 *
 * Backward. dd = dy v and dv = dyT d are large plain products, done by cuBLAS, so d and dd are stored. Between them a
 * kernel makes n again, from it d, and with dd the gradient of w. Another gathers du = w * dd and makes dz = dn slope,
 * which it writes into dx and sums per channel; the sums of the whole image known, a last pass turns dz into dx. Each
 * large array is read once or twice by each.
 *
 * Sums over pixels are cut into parts by the sizes alone, and the parts are added in order, in float64.
 */
#include "shared/checks.h"
#include "cuda/reduce_parts.cuh"
#include "cuda/gemm_tile.cuh"
#include "cuda/norm.cuh"

constexpr int SIDE = 8, PIXELS = SIDE * SIDE, BLOCK = TILE_THREADS, WARPS = BLOCK / 32, RT = PIXELS / 16;
static_assert(WARPS == SIDE, "a warp takes a row of the tile");

typedef struct sepconv2d {
    int64_t B, H, W, C, P, Q, O, G;
    int act, stride, up, norm;
    const void *x, *addend, *residual; /* f32 or bf16: of the type the kernel has for x, the last of y's */
    const float *gamma, *beta, *w, *v, *bias;
    float *mean, *rstd; /* (B,G) */
} sepconv2d;

/* -- A tile of d --------------------------------------------------------------------------------------------------- */

/* Rows and columns of n under a tile: (SIDE - 1) STRIDE + 3 of u. */
template <int STRIDE, int UP> struct halo {
    static constexpr int u = (SIDE - 1) * STRIDE + 3, side = UP == 1 ? u : u / 2 + 1, pixels = side * side,
                         floats = pixels * 32;
    /* Returns the row of n, counted from the tile's first, in row r = STRIDE p + tap - 1 of u. p is counted from the
     * tile's first, a multiple of 8. */
    static constexpr __device__ int row(int p, int tap)
    {
        return UP == 1 ? STRIDE * p + tap : (STRIDE * p + tap + 1) / 2;
    }
};

typedef struct tile {
    int64_t b, p, q; /* image, first row and column of d */
} tile;

static int64_t tiles_of(const sepconv2d *s) { return s->B * vx_ceil_div(s->P, SIDE) * vx_ceil_div(s->Q, SIDE); }

VX_DEVICE tile tile_at(const sepconv2d &s, int64_t index)
{
    const int64_t down = (s.P + SIDE - 1) / SIDE, across = (s.Q + SIDE - 1) / SIDE;
    return {index / across / down, index / across % down * SIDE, index % across * SIDE};
}

/* What norm and activation need of a channel of image b. */
typedef struct channel {
    float mean, scale, beta, rstd;
} channel;
VX_DEVICE channel channel_of(const sepconv2d &s, int64_t b, int64_t c)
{
    channel r = {0, 1, 0, 1};
    if (s.norm && c < s.C) {
        const int64_t g = b * s.G + c / (s.C / s.G);
        r.mean = s.mean[g], r.rstd = s.rstd[g], r.scale = r.rstd * s.gamma[c], r.beta = s.beta[c];
    }
    return r;
}

/* Loads n (halo pixels,32): channel c, one for each lane, of the pixels under the tile, normalized and activated; zeros
 * off the image. */
template <int STRIDE, int UP, class X> VX_DEVICE void load_halo(const sepconv2d &s, const tile &t, int64_t c, float *n)
{
    using under = halo<STRIDE, UP>;
    const int lane = threadIdx.x % 32;
    const int64_t h = UP == 1 ? t.p * STRIDE - 1 : t.p * STRIDE / 2 - 1,
                  w = UP == 1 ? t.q * STRIDE - 1 : t.q * STRIDE / 2 - 1;
    const channel of = channel_of(s, t.b, c);
    for (int i = threadIdx.x / 32; i < under::pixels; i += WARPS) {
        const int64_t y = h + i / under::side, x = w + i % under::side;
        float z = 0, slope;
        if (c < s.C && y >= 0 && y < s.H && x >= 0 && x < s.W) {
            z = vx_get((const X *)s.x + ((t.b * s.H + y) * s.W + x) * s.C + c);
            if (s.norm) z = activate(s.act, (z - of.mean) * of.scale + of.beta, &slope);
        }
        n[i * 32 + lane] = z;
    }
}

/* Returns the value under tap (u, v) of column q in the warp's row. */
template <int STRIDE, int UP> VX_DEVICE float under(const float *n, int q, int u, int v)
{
    using h = halo<STRIDE, UP>;
    return n[(h::row(threadIdx.x / 32, u) * h::side + h::row(q, v)) * 32 + threadIdx.x % 32];
}

/* Makes d of the warp's row and the lane's channel c. */
template <int STRIDE, int UP> VX_DEVICE void make_row(const sepconv2d &s, int64_t c, const float *n, float (&d)[SIDE])
{
    float w[9];
#pragma unroll
    for (int tap = 0; tap < 9; tap++) w[tap] = c < s.C ? s.w[tap * s.C + c] : 0;
#pragma unroll
    for (int q = 0; q < SIDE; q++) {
        d[q] = 0;
#pragma unroll
        for (int tap = 0; tap < 9; tap++) d[q] += w[tap] * under<STRIDE, UP>(n, q, tap / 3, tap % 3);
    }
}

/* -- Forward ------------------------------------------------------------------------------------------------------- */

/* Makes OUT times 64 outputs, from 64 OUT blockIdx.y on. Shared: n, d (PIXELS,ROW_PITCH), 32 rows of vT (32,64 OUT). */
template <int STRIDE, int UP, int OUT>
VX_KERNEL VX_HOT __launch_bounds__(BLOCK, 2) sepconv2d_kernel(sepconv2d s, float *y, bool whole)
{
    constexpr int COLUMNS = OUT * TILE_COLUMNS;
    float *n = (float *)vx_shared, *a = n + halo<STRIDE, UP>::floats, *b = a + PIXELS * ROW_PITCH;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tx = tile_x(), ty = tile_y();
    const tile t = tile_at(s, blockIdx.x);
    const int64_t outputs = (int64_t)blockIdx.y * COLUMNS;
    float sum[RT][4 * OUT] = {};
    for (int64_t from = 0; from < s.C; from += CHUNK) {
        load_halo<STRIDE, UP, float>(s, t, from + lane, n);
        for (int i = threadIdx.x; i < COLUMNS * (CHUNK / 4);
             i += BLOCK) { /* neighbouring lanes write neighbouring columns */
            const int column = i % COLUMNS, k = i / COLUMNS * 4;
            const int64_t o = outputs + column, c = from + k;
            float4 q = make_float4(0, 0, 0, 0);
            if (o < s.O && whole && c < s.C) q = *(const float4 *)(s.v + o * s.C + c);
            else if (o < s.O) {
                if (c < s.C) q.x = s.v[o * s.C + c];
                if (c + 1 < s.C) q.y = s.v[o * s.C + c + 1];
                if (c + 2 < s.C) q.z = s.v[o * s.C + c + 2];
                if (c + 3 < s.C) q.w = s.v[o * s.C + c + 3];
            }
            float *to = b + k * COLUMNS + column;
            to[0] = q.x, to[COLUMNS] = q.y, to[2 * COLUMNS] = q.z, to[3 * COLUMNS] = q.w;
        }
        __syncthreads();
        float d[SIDE];
        make_row<STRIDE, UP>(s, from + lane, n, d);
#pragma unroll
        for (int q = 0; q < SIDE; q++) a[(warp * SIDE + q) * ROW_PITCH + lane] = d[q];
        __syncthreads();
        multiply_tile<RT, OUT>(sum, a, b, CHUNK);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < RT; i++) {
        const int64_t p = t.p + (ty + 16 * i) / SIDE, q = t.q + (ty + 16 * i) % SIDE,
                      at = ((t.b * s.P + p) * s.Q + q) * s.O;
        if (p >= s.P || q >= s.Q) continue;
#pragma unroll
        for (int j = 0; j < 4 * OUT; j++) {
            const int64_t o = outputs + j / 4 * TILE_COLUMNS + 4 * tx + j % 4;
            if (o < s.O)
                y[at + o] =
                    sum[i][j] + (s.bias ? s.bias[o] : 0) + (s.residual ? ((const float *)s.residual)[at + o] : 0);
        }
    }
}

/* Stores y's elements at and at + 1, the second where there is one: sums, bias, residual. Both at once where y's rows
 * are even. */
template <class Y> VX_DEVICE void finish_two(const sepconv2d &s, Y *y, int64_t at, int64_t o, float first, float second)
{
    const bool two = o + 1 < s.O;
    const Y *residual = (const Y *)s.residual;
    if (s.bias) first += s.bias[o], second += two ? s.bias[o + 1] : 0;
    if (residual) first += vx_get(residual + at + o), second += two ? vx_get(residual + at + o + 1) : 0;
    put_two(y + at + o, two, s.O % 2 == 0 && (uintptr_t)y % (2 * sizeof(Y)) == 0, first, second);
}

/* Makes the same outputs with d and vT rounded to bf16, their product on tensor cores. Shared: n, then as bf16 d
 * (PIXELS,BF16_PITCH) and rows of v (64 OUT,BF16_PITCH). */
template <int STRIDE, int UP, int OUT, class X>
VX_KERNEL VX_HOT __launch_bounds__(BLOCK, 2) sepconv2d_bf16_kernel(sepconv2d s, void *y, bool y_bf16)
{
    constexpr int COLUMNS = OUT * TILE_COLUMNS;
    float *n = (float *)vx_shared;
    vx_bf16 *a = (vx_bf16 *)(n + halo<STRIDE, UP>::floats), *b = a + PIXELS * BF16_PITCH;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = bf16_tile_row(), column = bf16_tile_column<OUT>();
    const tile t = tile_at(s, blockIdx.x);
    const int64_t outputs = (int64_t)blockIdx.y * COLUMNS;
    float sum[4 * OUT][4] = {};
    for (int64_t from = 0; from < s.C; from += CHUNK) {
        load_halo<STRIDE, UP, X>(s, t, from + lane, n);
        for (int i = warp; i < COLUMNS; i += WARPS)
            b[i * BF16_PITCH + lane] =
                vx_to_bf16(outputs + i < s.O && from + lane < s.C ? s.v[(outputs + i) * s.C + from + lane] : 0);
        __syncthreads();
        float d[SIDE];
        make_row<STRIDE, UP>(s, from + lane, n, d);
#pragma unroll
        for (int q = 0; q < SIDE; q++) a[(warp * SIDE + q) * BF16_PITCH + lane] = vx_to_bf16(d[q]);
        __syncthreads();
        multiply_bf16_tile<OUT>(sum, a, b);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int pixel = row + 8 * i + lane / 4;
        const int64_t p = t.p + pixel / SIDE, q = t.q + pixel % SIDE, at = ((t.b * s.P + p) * s.Q + q) * s.O;
        if (p >= s.P || q >= s.Q) continue;
#pragma unroll
        for (int j = 0; j < 4 * OUT; j++) {
            const int64_t o = outputs + column + j * 8 + lane % 4 * 2;
            if (o >= s.O) continue;
            if (y_bf16) finish_two(s, (vx_bf16 *)y, at, o, sum[j][2 * i], sum[j][2 * i + 1]);
            else finish_two(s, (float *)y, at, o, sum[j][2 * i], sum[j][2 * i + 1]);
        }
    }
}

static int describe(sepconv2d *s, const char *op, const vx_tensor *x, const vx_tensor *y, const vx_tensor *gamma,
                    const vx_tensor *beta, const vx_tensor *mean, const vx_tensor *rstd, const vx_tensor *w,
                    const vx_tensor *v)
{
    if (check_sepconv2d(op, gamma, beta, mean, rstd)) return VX_EINVAL;
    s->B = x->shape[0], s->H = x->shape[1], s->W = x->shape[2], s->C = x->shape[3];
    s->P = y->shape[1], s->Q = y->shape[2], s->O = y->shape[3], s->G = mean ? mean->shape[1] : 1;
    s->x = x->data, s->gamma = vx_f32(gamma), s->beta = vx_f32(beta), s->mean = vx_f32(mean), s->rstd = vx_f32(rstd);
    s->w = vx_f32(w), s->v = vx_f32(v), s->norm = gamma != 0;
    return VX_OK;
}

template <int STRIDE, int UP, int OUT>
static void forward(const sepconv2d *s, const vx_tensor *y, const vx_tensor *x, bool whole)
{
    const size_t n = halo<STRIDE, UP>::floats * sizeof(float);
    const dim3 grid((unsigned)tiles_of(s), (unsigned)vx_ceil_div(s->O, TILE_COLUMNS * OUT));
    if (vx_in_bf16(x, y)) {
        const size_t shared = n + (PIXELS + TILE_COLUMNS * OUT) * BF16_PITCH * sizeof(vx_bf16);
        VX_TYPED(
            vx_is_bf16(x), X,
            VX_LAUNCH((sepconv2d_bf16_kernel<STRIDE, UP, OUT, X>), grid, BLOCK, shared, *s, y->data, vx_is_bf16(y)));
    } else {
        const size_t floats = PIXELS * ROW_PITCH + CHUNK * TILE_COLUMNS * OUT;
        VX_LAUNCH((sepconv2d_kernel<STRIDE, UP, OUT>), grid, BLOCK, n + floats * sizeof(float), *s, vx_f32(y), whole);
    }
}

int vx_cuda_sepconv2d(vx_tensor *y, vx_tensor *mean, vx_tensor *rstd, vx_tensor *x, vx_tensor *gamma, vx_tensor *beta,
                      vx_tensor *w, vx_tensor *v, vx_tensor *bias, vx_tensor *residual, int act, float eps, int stride,
                      int up)
{
    sepconv2d s = {};
    s.act = act, s.stride = stride, s.up = up, s.bias = vx_f32(bias), s.residual = residual ? residual->data : NULL;
    if (describe(&s, "sepconv2d", x, y, gamma, beta, mean, rstd, w, v)) return VX_EINVAL;
    if (residual && check_one_dtype("sepconv2d", "residual", residual, "y", y)) return VX_EINVAL;
    if (s.norm && !x->numel && mean->numel) {
        VX_CUDA(cudaMemsetAsync(s.mean, 0, sizeof(float) * (size_t)mean->numel, vx_stream()));
        VX_CUDA(cudaMemsetAsync(s.rstd, 0, sizeof(float) * (size_t)rstd->numel, vx_stream()));
    }
    if (s.norm && x->numel)
        VX_TYPED(vx_is_bf16(x), X, vx_group_statistics(s.mean, s.rstd, (const X *)s.x, s.B, s.H * s.W, s.C, s.G, eps));
    if (!y->numel) return vx_status(); /* the statistics are there for the gradient all the same */
    const bool whole = s.C % 4 == 0 && vx_aligned(v, 16);
    const int how = (s.O > TILE_COLUMNS) + 2 * (up == 2) + 4 * (stride == 2);
    static void (*const kinds[])(const sepconv2d *, const vx_tensor *, const vx_tensor *,
                                 bool) = {forward<1, 1, 1>, forward<1, 1, 2>, forward<1, 2, 1>, forward<1, 2, 2>,
                                          forward<2, 1, 1>, forward<2, 1, 2>, forward<2, 2, 1>, forward<2, 2, 2>};
    kinds[how](&s, y, x, whole);
    return vx_status();
}

/* -- Backward ------------------------------------------------------------------------------------------------------ */

/* Makes d (B,P,Q,C) again, and sums the gradient of w: partial (parts,9,C). A block has 32 channels of a part of the
 * tiles. Shared: n, or (9,8,32) sums. */
template <int STRIDE, int UP, class X, class D>
VX_KERNEL VX_HOT __launch_bounds__(BLOCK)
    middle_kernel(sepconv2d s, D *d, float *partial, const D *dd, int64_t tiles, int64_t parts)
{
    float *n = (float *)vx_shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t c = (int64_t)blockIdx.y * 32 + lane, part = blockIdx.x;
    float dw[9] = {};
    for (int64_t index = part * tiles / parts; index < (part + 1) * tiles / parts; index++) {
        const tile t = tile_at(s, index);
        const int64_t p = t.p + warp, row = ((t.b * s.P + p) * s.Q + t.q) * s.C + c;
        load_halo<STRIDE, UP, X>(s, t, c, n);
        __syncthreads();
        float made[SIDE], g[SIDE];
        make_row<STRIDE, UP>(s, c, n, made);
#pragma unroll
        for (int q = 0; q < SIDE; q++) {
            const bool there = c < s.C && p < s.P && t.q + q < s.Q;
            if (there) vx_put(d + row + q * s.C, made[q]);
            g[q] = there ? vx_get(dd + row + q * s.C) : 0;
        }
#pragma unroll
        for (int tap = 0; tap < 9; tap++)
#pragma unroll
            for (int q = 0; q < SIDE; q++) dw[tap] += g[q] * under<STRIDE, UP>(n, q, tap / 3, tap % 3);
        __syncthreads();
    }
#pragma unroll
    for (int tap = 0; tap < 9; tap++) n[(tap * WARPS + warp) * 32 + lane] = dw[tap];
    __syncthreads();
    for (int tap = warp; tap < 9; tap += WARPS) {
        float sum = 0;
        for (int k = 0; k < WARPS; k++) sum += n[(tap * WARPS + k) * 32 + lane];
        if (c < s.C) partial[(part * 9 + tap) * s.C + c] = sum;
    }
}

template <int STRIDE, int UP, class X, class D>
static void middle(const sepconv2d *s, D *d, float *partial, const D *dd, int64_t tiles, int64_t parts)
{
    const size_t floats = halo<STRIDE, UP>::floats > 9 * WARPS * 32 ? halo<STRIDE, UP>::floats : 9 * WARPS * 32;
    VX_LAUNCH((middle_kernel<STRIDE, UP, X, D>), dim3((unsigned)parts, (unsigned)vx_ceil_div(s->C, 32)), BLOCK,
              floats * sizeof(float), *s, d, partial, dd, tiles, parts);
}

/* Returns du at (r, t) of the enlarged image, channel c. */
template <class D>
VX_DEVICE float du_at(const sepconv2d &s, const D *dd, const float (&w)[9], int64_t b, int64_t r, int64_t t, int64_t c)
{
    float sum = 0;
#pragma unroll
    for (int tap = 0; tap < 9; tap++) {
        int64_t p = r + 1 - tap / 3, q = t + 1 - tap % 3;
        if (p < 0 || q < 0 || (s.stride == 2 && ((p | q) & 1))) continue;
        if (s.stride == 2) p >>= 1, q >>= 1;
        if (p < s.P && q < s.Q) sum += w[tap] * vx_get(dd + ((b * s.P + p) * s.Q + q) * s.C + c);
    }
    return sum;
}

/* Makes dx = dz, and where there is a norm partial (B,parts,2,C), the sums of dz and of dz (x - mean); else dx = dz +
 * addend. A block has 32 channels and a part of an image's pixels; a warp takes every eighth pixel. */
template <class X, class D>
VX_KERNEL VX_HOT __launch_bounds__(BLOCK) gather_kernel(sepconv2d s, X *dx, double *partial, const D *dd, int64_t parts)
{
    __shared__ double shared[2][WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t c = (int64_t)blockIdx.y * 32 + lane, part = blockIdx.x % parts, b = blockIdx.x / parts,
                  pixels = s.H * s.W;
    const channel of = channel_of(s, b, c);
    float w[9];
#pragma unroll
    for (int tap = 0; tap < 9; tap++) w[tap] = c < s.C ? s.w[tap * s.C + c] : 0;
    double plain = 0, along = 0;
    for (int64_t i = part * pixels / parts + warp; c < s.C && i < (part + 1) * pixels / parts; i += WARPS) {
        const int64_t r = i / s.W * s.up, t = i % s.W * s.up, at = (b * pixels + i) * s.C + c;
        float g = du_at(s, dd, w, b, r, t, c);
        if (s.up == 2)
            g = (g + du_at(s, dd, w, b, r, t + 1, c)) +
                (du_at(s, dd, w, b, r + 1, t, c) + du_at(s, dd, w, b, r + 1, t + 1, c));
        if (s.norm) {
            const float from_mean = vx_get((const X *)s.x + at) - of.mean;
            float slope;
            activate(s.act, from_mean * of.scale + of.beta, &slope);
            g *= slope;
            plain += g;
            along += (double)(g * from_mean);
        } else if (s.addend) g += vx_get((const X *)s.addend + at);
        vx_put(dx + at, g);
    }
    if (!s.norm) return;
    shared[0][warp][lane] = plain;
    shared[1][warp][lane] = along;
    __syncthreads();
    if (warp >= 2 || c >= s.C) return;
    double sum = 0;
    for (int k = 0; k < WARPS; k++) sum += shared[warp][k][lane];
    partial[((b * parts + part) * 2 + warp) * s.C + c] = sum;
}

/* Adds up the parts of image b = blockIdx.x: total (B,2,C). From them makes factor (B,2,C), what the last pass
 * multiplies x - mean and 1 with. */
VX_KERNEL settle_kernel(sepconv2d s, double *total, float *factor, const double *partial, int64_t parts)
{
    const int64_t b = blockIdx.x, D = s.C / s.G;
    double *plain = total + b * 2 * s.C, *along = plain + s.C;
    for (int64_t i = threadIdx.x; i < 2 * s.C; i += BLOCK) {
        double sum = 0;
        for (int64_t k = 0; k < parts; k++) sum += partial[(b * parts + k) * 2 * s.C + i];
        plain[i] = sum;
    }
    __syncthreads();
    for (int64_t g = threadIdx.x; g < s.G; g += BLOCK) {
        const double rstd = s.rstd[b * s.G + g], share = rstd / ((double)(s.H * s.W) * (double)D);
        double p = 0, a = 0;
        for (int64_t c = g * D; c < (g + 1) * D; c++) p += s.gamma[c] * plain[c], a += s.gamma[c] * along[c];
        for (int64_t c = g * D; c < (g + 1) * D; c++) {
            factor[b * 2 * s.C + c] = (float)(a * share * rstd * rstd);
            factor[(b * 2 + 1) * s.C + c] = (float)(p * share);
        }
    }
}

/* Makes the gradients of gamma and beta: sums over the images. */
VX_KERNEL affine_kernel(sepconv2d s, float *dgamma, float *dbeta, const double *total)
{
    for (int64_t c = vx_first(); c < s.C; c += vx_step()) {
        double plain = 0, along = 0;
        for (int64_t b = 0; b < s.B; b++) {
            plain += total[b * 2 * s.C + c];
            along += total[(b * 2 + 1) * s.C + c] * s.rstd[b * s.G + c / (s.C / s.G)];
        }
        dbeta[c] = (float)plain, dgamma[c] = (float)along;
    }
}

/* Makes dx = scale dz - (x - mean) factor - factor' + addend, in place. */
template <class X> VX_KERNEL finish_kernel(sepconv2d s, X *dx, const float *factor)
{
    const int64_t image = s.H * s.W * s.C;
    for (int64_t i = vx_first(); i < s.B * image; i += vx_step()) {
        const int64_t c = i % s.C, b = i / image;
        const channel of = channel_of(s, b, c);
        const float from_mean = vx_get((const X *)s.x + i) - of.mean;
        const float g =
            of.scale * vx_get(dx + i) - (from_mean * factor[b * 2 * s.C + c] + factor[(b * 2 + 1) * s.C + c]);
        vx_put(dx + i, s.addend ? g + vx_get((const X *)s.addend + i) : g);
    }
}

/* Runs the backward pass for X, the type of x and dx, and D, that of d and dd. */
template <class X, class D>
static void backward(const sepconv2d &s, vx_tensor *dx, vx_tensor *dgamma, vx_tensor *dbeta, vx_tensor *dw,
                     vx_tensor *dv, vx_tensor *dbias, vx_tensor *dy)
{
    constexpr bool bf16 = sizeof(D) == 2;
    const int64_t pixels = s.B * s.P * s.Q, tiles = tiles_of(&s), inputs = s.H * s.W;
    const int64_t parts = vx_max64(vx_min64(tiles, 512), 1),
                  sum_parts = vx_max64(vx_min64(inputs / 64, vx_ceil_div(1024, vx_max64(s.B, 1))), 1);
    D *d = VX_SCRATCH(D, pixels * s.C), *dd = VX_SCRATCH(D, pixels * s.C);
    float *dw_parts = VX_SCRATCH(float, parts * 9 * s.C), *factor = VX_SCRATCH(float, s.norm ? s.B * 2 * s.C : 1);
    double *sums = VX_SCRATCH(double, s.norm ? s.B *sum_parts * 2 * s.C : 1),
           *total = VX_SCRATCH(double, s.norm ? s.B * 2 * s.C : 1);
    const matrix up_v = {(void *)s.v, 0, s.C, 1, false}, d_rows = {d, 0, s.C, 1, bf16}, dd_rows = {dd, 0, s.C, 1, bf16};
    const matrix dy_rows = {dy->data, 0, s.O, 1, vx_is_bf16(dy)}, dy_columns = {dy->data, 0, 1, s.O, vx_is_bf16(dy)};
    const matrix to_v = {dv->data, 0, s.C, 1, false};
    vx_gemm(1, pixels, s.C, s.O, 1, dy_rows, up_v, 0, dd_rows, NULL);
    static void (*const kinds[])(const sepconv2d *, D *, float *, const D *, int64_t, int64_t) = {
        middle<1, 1, X, D>, middle<1, 2, X, D>, middle<2, 1, X, D>, middle<2, 2, X, D>};
    if (s.C) {
        kinds[(s.up == 2) + 2 * (s.stride == 2)](&s, d, dw_parts, dd, tiles, parts);
        vx_add_parts(vx_f32(dw), dw_parts, 9 * s.C, parts, 9 * s.C);
    }
    vx_gemm(1, s.O, s.C, pixels, 1, dy_columns, d_rows, 0, to_v, NULL);
    if (dbias) vx_add_rows(vx_f32(dbias), dy, pixels, s.O);
    if (dx->numel)
        VX_LAUNCH((gather_kernel<X, D>), dim3((unsigned)(s.B * sum_parts), (unsigned)vx_ceil_div(s.C, 32)), BLOCK, 0, s,
                  (X *)dx->data, sums, dd, sum_parts);
    if (s.norm && s.C) {
        if (s.B) VX_LAUNCH(settle_kernel, (unsigned)s.B, BLOCK, 0, s, total, factor, sums, sum_parts);
        VX_LAUNCH(affine_kernel, vx_grid(s.C, BLOCK), BLOCK, 0, s, vx_f32(dgamma), vx_f32(dbeta), total);
        if (dx->numel) VX_LAUNCH((finish_kernel<X>), vx_grid(dx->numel, BLOCK), BLOCK, 0, s, (X *)dx->data, factor);
    }
}

int vx_cuda_sepconv2d_backward(vx_tensor *dx, vx_tensor *dgamma, vx_tensor *dbeta, vx_tensor *dw, vx_tensor *dv,
                               vx_tensor *dbias, vx_tensor *dy, vx_tensor *x, vx_tensor *gamma, vx_tensor *beta,
                               vx_tensor *mean, vx_tensor *rstd, vx_tensor *w, vx_tensor *v, vx_tensor *addend, int act,
                               float eps, int stride, int up)
{
    (void)eps;
    sepconv2d s = {};
    s.act = act, s.stride = stride, s.up = up, s.addend = addend ? addend->data : NULL;
    if (describe(&s, "sepconv2d_backward", x, dy, gamma, beta, mean, rstd, w, v)) return VX_EINVAL;
    if (s.norm && (!dgamma || !dbeta))
        return vx_fail(VX_EINVAL, "sepconv2d_backward: dgamma and dbeta must be there with gamma");
    if (check_one_dtype("sepconv2d_backward", "dx", dx, "x", x)) return VX_EINVAL;
    if (addend && check_one_dtype("sepconv2d_backward", "addend", addend, "x", x)) return VX_EINVAL;
    if (!vx_in_bf16(x, dy)) backward<float, float>(s, dx, dgamma, dbeta, dw, dv, dbias, dy);
    else VX_TYPED(vx_is_bf16(x), X, backward<X, vx_bf16>(s, dx, dgamma, dbeta, dw, dv, dbias, dy));
    return vx_status();
}
