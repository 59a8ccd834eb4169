/* codebook_tiles.cuh: rows and codes of one group, laid out for products of tiles, and that product in float32.
 *
 * Codes are cut into panels of 64 as on the CPU, and within a panel stand in another order, so that a thread's codes u,
 * u + 16, u + 32 and u + 48 take their Gumbel noise from one Philox block (core/rng.h). There are two orders:
 *   float32 (gemm_tile.cuh)        code c of a panel is at position 4 (c % 16) + c / 16: a thread's codes are
 *   neighbours tensor cores (mma_tiles.cuh)   code u + 16 j, with u = 4 q + 2 h + e, is at position 8 (4 h + j) + 2 q +
 *   e
 *
 * A panel (depth,64) has a position's numbers 64 apart: what a product reads along the codes. The rows layout
 * (positions,depth) has them side by side: what a product over the codes reads, and tensor cores. depth is D filled up
 * with zeros to a multiple of 4, or to 16, 32 or 64.
 */
#ifndef VX_CODEBOOK_TILES_CUH
#define VX_CODEBOOK_TILES_CUH

#include "smooth_call.h"
#include "cuda/gemm_tile.cuh"

static_assert(PANEL == TILE_COLUMNS, "a panel is the columns of a tile");

static inline int64_t depth_of(int64_t D) { return vx_ceil_div(D, 4) * 4; }

/* Return the position of a code, both counted over all panels, in the float32 order and in that of the tensor cores. */
VX_DEVICE int64_t tile_position(int64_t code) { return code / PANEL * PANEL + code % 16 * 4 + code % PANEL / 16; }
VX_DEVICE int64_t mma_position(int64_t code)
{
    const int64_t u = code % 16, j = code % PANEL / 16;
    return code / PANEL * PANEL + 8 * (u / 2 % 2 * 4 + j) + u / 4 * 2 + u % 2;
}

/* Return the code (0 .. 63) at a position of a panel. */
VX_DEVICE int tile_code(int position) { return position % 4 * 16 + position / 4; }
VX_DEVICE int mma_code(int position)
{
    const int t = position / 8;
    return 16 * (t % 4) + position % 8 / 2 * 4 + t / 4 * 2 + position % 2;
}

/* -- Laying out (codebook_tiles.cu) -------------------------------------------------------------------------------- */

/* Which rows of z (N,G,D), and where they go: out (N,depth) = the rows of group g, divided by their norm and times
 * *scale, or in a frame, or as they stand; norm (N) = max(|z|, GUARD), or in a frame the largest |out|; or NULL.
 * scale: NULL is 1; without `normalize` it is not read. */
typedef struct row_layout {
    const float *z;
    int64_t N, G, g, D, depth;
    bool normalize;
    const float *scale;
    float *out, *norm;
    const double *frame; /* of lay_out_frame(), or NULL */
} row_layout;

/* Finds the frame (frame.h) of group g's codes: frame = the centre (D), the scale, and working space of D. */
void lay_out_frame(double *frame, const float *codebook, int64_t M, int64_t g, int64_t D);

/* Lays out rows. One with a NaN or Inf becomes zeros and is reported as element i G + g of nonfinite. */
void lay_out_rows(const row_layout &rows, vx_data_check nonfinite);

/* Where a group's codes are wanted. Any of the pointers may be NULL. padded: count rounded up to whole panels. */
typedef struct code_layout {
    float *panel, *raw_panel; /* (panels,depth,64): normalized, and as stored; float32 order */
    float *row, *raw_row;     /* (padded,depth): likewise */
    bool mma;                 /* row and raw_row in the order of the tensor cores */
    float *norm;              /* (padded) by code: max(|q|, GUARD) */
    float *start;             /* (padded) by position: -|q|^2 / 2 in the frame, -inf off the end */
    const int32_t *which;     /* (count) the codes to lay out; NULL: 0 .. count - 1 */
    int64_t count;
    const double *frame; /* of lay_out_frame(), in which raw_panel and start are; NULL: raw_panel as stored */
} code_layout;

/* Lays out codes of group g of the codebook (G,M,D). A code with a NaN or Inf becomes zeros and is reported as
 * element g M + code of nonfinite; an entry of `which` that is no code likewise as element i of outside. */
void lay_out_codes(const code_layout &to, const float *codebook, int64_t M, int64_t g, int64_t D, int64_t depth,
                   vx_data_check nonfinite, vx_data_check outside);

/* -- The product of a tile in float32 ------------------------------------------------------------------------------ */

/* Shared memory of one product: 16 RT rows and 64 positions, CHUNK of depth each. */
#define TILE_FLOATS(RT) (16 * (RT)*ROW_PITCH + CHUNK * PANEL)

/* Adds a tile's product: acc[i][j] += <row ty + 16 i, position 4 tx + j>, of rows first .. of (N,depth), of which
 * those from N on are zeros, and a panel. Depth is added in ascending order, as on the CPU. Where all of depth is
 * one chunk, rows or panel may be left from the last call (fresh_ false). All threads of the block; shared holds
 * TILE_FLOATS(RT). */
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

#endif
