/* codebook_tiles.cuh: what the quantizers' kernels share on CUDA: rows and codes laid out for products of tiles, the
 * product itself, and the Gumbel noise of gumbel.h.
 *
 * Layout. Codes are cut into panels of 64 as on the CPU, and within a panel stand in another order: code c is at
 * position 4 (c % 16) + c / 16, so that the four neighbouring positions that a thread takes are the codes tx, tx + 16,
 * tx + 32, tx + 48, whose Gumbel noise is one Philox block (rng.h). A panel (depth,64) has a position's numbers 64
 * apart: what a product reads along the codes. The rows layout (positions, depth) has them side by side: what a product
 * over the codes reads. depth is D filled up with zeros to a multiple of 4.
 */
#ifndef VX_TILES_CUH
#define VX_TILES_CUH

#include "cuda/gemm_tile.cuh"

#define PADDING (-1e30f) /* logit of a code that is not there */

static inline int64_t depth_of(int64_t D) { return vx_ceil_div(D, 4) * 4; }

/* -- Rows and codes ------------------------------------------------------------------------------------------------ */

/* max(|x|, GUARD) of D elements, by a warp; NaN where an element is NaN or Inf. */
VX_DEVICE double warp_norm(const float *x, int64_t D)
{
    double squares = 0;
    for (int64_t d = threadIdx.x % 32; d < D; d += 32) squares += (double)x[d] * x[d];
    squares = vx_warp_sum(squares);
    return squares <= 1e300 ? fmax(sqrt(squares), GUARD) : NAN;
}

/* Row i of group g of z (N,G,D): out (N,depth) = z / norm * scale (or z itself where normalize is 0), norm (N). A warp
 * for each row. */
VX_KERNEL rows_kernel(float *out, float *norm, const float *z, const float *scale, int normalize, int64_t N, int64_t G,
                      int64_t g, int64_t D, int64_t depth, vx_data_check nonfinite)
{
    const float factor = scale ? *scale : 1;
    for (int64_t i = vx_first() / 32; i < N; i += vx_step() / 32) {
        const float *x = z + (i * G + g) * D;
        const double length = warp_norm(x, D);
        const float divided = (float)length;
        if (length != length && threadIdx.x % 32 == 0) vx_report(nonfinite, i * G + g);
        if (norm && threadIdx.x % 32 == 0) norm[i] = divided;
        for (int64_t d = threadIdx.x % 32; d < depth; d += 32)
            out[i * depth + d] = d >= D || length != length ? 0 : normalize ? x[d] / divided * factor : x[d];
    }
}

/* Where a group's codes are wanted; any of the pointers may be NULL. */
typedef struct code_layout {
    float *panel, *raw_panel; /* (panels, depth, 64): normalized, and as stored */
    float *row, *raw_row;     /* (64 panels, depth): likewise */
    int tensor;               /* row and raw_row in the order of mma_tiles.cuh */
    float *norm;              /* (64 panels) by code: max(|q|, GUARD) */
    float *start;             /* (64 panels) by position: -|q|^2 / 2, -inf off the end */
    const int32_t *which;     /* (count) the codes to lay out; NULL: 0 .. count - 1 */
    int64_t count;
} code_layout;

VX_DEVICE int64_t position_of(int64_t code) { return code / PANEL * PANEL + code % 16 * 4 + code % PANEL / 16; }
/* The same in the order of mma_tiles.cuh, which says why. */
VX_DEVICE int64_t tensor_position(int64_t code)
{
    const int64_t u = code % 16, j = code % PANEL / 16;
    return code / PANEL * PANEL + 8 * (u / 2 % 2 * 4 + j) + u / 4 * 2 + u % 2;
}

/* A warp for each code of group g of the codebook (G,M,D). */
VX_KERNEL codes_kernel(code_layout to, const float *codebook, int64_t M, int64_t g, int64_t D, int64_t depth,
                       vx_data_check nonfinite, vx_data_check outside)
{
    const int64_t padded = (to.count + PANEL - 1) / PANEL * PANEL;
    for (int64_t c = vx_first() / 32; c < padded; c += vx_step() / 32) {
        int64_t code = c < to.count && to.which ? to.which[c] : c;
        const bool real = c < to.count && code >= 0 && code < M;
        if (c < to.count && !real && threadIdx.x % 32 == 0) vx_report(outside, c);
        const float *q = codebook + (g * M + (real ? code : 0)) * D;
        const double length = real ? warp_norm(q, D) : 1;
        if (length != length && threadIdx.x % 32 == 0) vx_report(nonfinite, g * M + code);
        const int64_t at = position_of(c), panel = c / PANEL * PANEL * depth + at % PANEL;
        const int64_t row = to.tensor ? tensor_position(c) : at;
        if (threadIdx.x % 32 == 0) {
            if (to.norm) to.norm[c] = (float)length;
            if (to.start) to.start[at] = real ? (float)(-0.5 * length * length) : -INFINITY;
        }
        for (int64_t d = threadIdx.x % 32; d < depth; d += 32) {
            const float x = real && d < D && length == length ? q[d] : 0, hat = (float)(x / length);
            if (to.panel) to.panel[panel + d * PANEL] = length == length ? hat : 0;
            if (to.raw_panel) to.raw_panel[panel + d * PANEL] = x;
            if (to.row) to.row[row * depth + d] = length == length ? hat : 0;
            if (to.raw_row) to.raw_row[row * depth + d] = x;
        }
    }
}

/* -- The product of a tile ----------------------------------------------------------------------------------------- */

/* Shared memory of one product: 16 RT rows and 64 positions, CHUNK of depth each. */
#define TILE_FLOATS(RT) (16 * (RT)*ROW_PITCH + CHUNK * PANEL)

/* acc[i][j] += <row ty + 16 i, position 4 tx + j>: rows first .. of (N,depth), of which those past N are zeros, times a
 * panel. Depth in ascending order, as on the CPU. Where all of depth is one chunk, rows or panel may be left from the
 * last call (fresh_ 0). All threads of the block; shared holds TILE_FLOATS(RT). */
template <int RT>
VX_DEVICE void tile_product(float (&acc)[RT][4], const float *rows, int64_t first, int64_t N, bool fresh_rows,
                            const float *panel, bool fresh_panel, int64_t depth, float *shared)
{
    float *a = shared, *b = shared + 16 * RT * ROW_PITCH;
    for (int64_t from = 0; from < depth; from += CHUNK) {
        const int count = depth - from < CHUNK ? (int)(depth - from) : CHUNK, fours = count / 4;
        __syncthreads();
        if (fresh_rows || depth > CHUNK)
            for (int i = threadIdx.x; i < 16 * RT * fours; i += TILE_THREADS) {
                const int r = i / fours, q = i - r * fours;
                float4 x = make_float4(0, 0, 0, 0);
                if (first + r < N) x = *(const float4 *)(rows + (first + r) * depth + from + 4 * q);
                *(float4 *)(a + r * ROW_PITCH + 4 * q) = x;
            }
        if (fresh_panel || depth > CHUNK)
            for (int i = threadIdx.x; i < count * (PANEL / 4); i += TILE_THREADS)
                *(float4 *)(b + 4 * i) = *(const float4 *)(panel + from * PANEL + 4 * i);
        __syncthreads();
        multiply_tile<RT, 1>(acc, a, b, count);
    }
}

/* -- Gumbel noise: see gumbel.h ------------------------------------------------------------------------------------ */

/* 1/E of the codes tx, tx + 16, tx + 32, tx + 48 of a panel for row r = n G + g. */
VX_DEVICE void gumbel_rates(vx_draw draw, int64_t r, int64_t panels, int64_t panel, int tx, float rate[4])
{
    const vx_philox4 random = vx_philox(draw.seed, draw.stream, (uint64_t)(r * panels + panel) * 16 + (uint64_t)tx);
    const int32_t base = 0x3f3504f3; /* sqrt(1/2) */
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float u = (float)(random.word[j] >> 9) + 0.5f; /* 2^23 u, exactly */
        const int32_t bits = (int32_t)__float_as_uint(u) - (base + (23 << 23));
        const float e = (float)(bits >> 23) * -0.69314718f,
                    x = __uint_as_float((uint32_t)((bits & 0x7fffff) + base)) - 1.0f;
        const float n = ((x * 0.18256297f + 1.0f) * x + 1.0f) * x;
        const float d = ((x * 0.049616249f + 0.5992325f) * x + 1.5f) * x + 1.0f;
        rate[j] = d / (e * d - n);
    }
}

#endif
