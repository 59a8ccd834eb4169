/* codebook_tiles.cu: lays out rows and codes, see codebook_tiles.cuh. A warp takes a row or a code. Norms are added
 * up in float64. */
#include <float.h>

#include "codebook_tiles.cuh"
#include "frame.h"

enum { BLOCK = 256 };

/* range (2,D) = the least and the largest of each coordinate of the codes q (M,D). A block takes a coordinate. */
VX_KERNEL range_kernel(float *range, const float *q, int64_t M, int64_t D)
{
    __shared__ float shared[2][32];
    for (int64_t d = blockIdx.x; d < D; d += gridDim.x) {
        float low = q[d], high = q[d];
        for (int64_t m = threadIdx.x; m < M; m += BLOCK)
            low = fminf(low, q[m * D + d]), high = fmaxf(high, q[m * D + d]);
        low = -vx_block_max(-low, shared[0]);
        high = vx_block_max(high, shared[1]);
        if (threadIdx.x == 0) range[d] = low, range[D + d] = high;
        __syncthreads();
    }
}

/* One block. */
VX_KERNEL frame_kernel(double *frame, const float *range, int64_t D)
{
    __shared__ double shared[BLOCK];
    double radius = 0;
    for (int64_t d = threadIdx.x; d < D; d += BLOCK) radius = fmax(radius, ((double)range[D + d] - range[d]) / 2);
    shared[threadIdx.x] = radius;
    for (int i = BLOCK / 2; i > 0; i >>= 1) {
        __syncthreads();
        if ((int)threadIdx.x < i) shared[threadIdx.x] = fmax(shared[threadIdx.x], shared[threadIdx.x + i]);
    }
    __syncthreads();
    const double grid = frame_grid(shared[0]);
    for (int64_t d = threadIdx.x; d < D; d += BLOCK) frame[d] = frame_centre(range[d], range[D + d], grid);
    if (threadIdx.x == 0) frame[D] = 1 / grid;
}

void lay_out_frame(double *frame, const float *codebook, int64_t M, int64_t g, int64_t D)
{
    float *range = (float *)(frame + D + 1);
    VX_LAUNCH(range_kernel, vx_grid(D, 1), BLOCK, 0, range, codebook + g * M * D, M, D);
    VX_LAUNCH(frame_kernel, 1, BLOCK, 0, frame, range, D);
}

/* Returns x[d] in a frame of lay_out_frame(), or x[d] where that is NULL. */
VX_DEVICE float placed(const float *x, int64_t d, const double *frame, int64_t D)
{
    return frame ? frame_of(x[d], frame[d], frame[D]) : x[d];
}

/* Returns max(|x|, GUARD) of D elements, by a warp; NaN where an element is NaN or Inf. */
VX_DEVICE double warp_norm(const float *x, int64_t D)
{
    double squares = 0;
    for (int64_t d = threadIdx.x % 32; d < D; d += 32) squares += (double)x[d] * x[d];
    squares = vx_warp_sum(squares);
    return squares <= 1e300 ? fmax(sqrt(squares), GUARD) : NAN;
}

VX_KERNEL rows_kernel(row_layout r, vx_data_check nonfinite)
{
    const float factor = r.scale ? *r.scale : 1;
    for (int64_t i = vx_first() / 32; i < r.N; i += vx_step() / 32) {
        const float *x = r.z + (i * r.G + r.g) * r.D;
        const double length = warp_norm(x, r.D);
        const float divided = fminf((float)length, FLT_MAX);
        float reach = 0;
        if (length != length && threadIdx.x % 32 == 0) vx_report(nonfinite, i * r.G + r.g);
        for (int64_t d = threadIdx.x % 32; d < r.depth; d += 32) {
            const float y = d >= r.D || length != length ? 0 : placed(x, d, r.frame, r.D);
            reach = fmaxf(reach, fabsf(y));
            r.out[i * r.depth + d] = r.normalize ? y / divided * factor : y;
        }
        if (r.frame) reach = vx_warp_max(reach);
        if (r.norm && threadIdx.x % 32 == 0) r.norm[i] = r.frame ? reach : divided;
    }
}

void lay_out_rows(const row_layout &rows, vx_data_check nonfinite)
{
    VX_LAUNCH(rows_kernel, vx_grid(rows.N * 32, BLOCK), BLOCK, 0, rows, nonfinite);
}

VX_KERNEL codes_kernel(code_layout to, const float *codebook, int64_t M, int64_t g, int64_t D, int64_t depth,
                       vx_data_check nonfinite, vx_data_check outside)
{
    const int64_t padded = vx_ceil_div(to.count, PANEL) * PANEL;
    for (int64_t c = vx_first() / 32; c < padded; c += vx_step() / 32) {
        int64_t code = c < to.count && to.which ? to.which[c] : c;
        const bool real = c < to.count && code >= 0 && code < M;
        if (c < to.count && !real && threadIdx.x % 32 == 0) vx_report(outside, c);
        const float *q = codebook + (g * M + (real ? code : 0)) * D;
        const double length = real ? warp_norm(q, D) : 1;
        if (length != length && threadIdx.x % 32 == 0) vx_report(nonfinite, g * M + code);
        double squares = length * length;
        if (to.start) {
            squares = 0;
            for (int64_t d = threadIdx.x % 32; d < D; d += 32) {
                const double x = placed(q, d, to.frame, D);
                squares += x * x;
            }
            squares = vx_warp_sum(squares);
        }
        const int64_t at = tile_position(c), panel = c / PANEL * PANEL * depth + at % PANEL;
        const int64_t row = to.mma ? mma_position(c) : at;
        if (threadIdx.x % 32 == 0) {
            if (to.norm) to.norm[c] = (float)length;
            if (to.start) to.start[at] = real ? (float)(-0.5 * squares) : -INFINITY;
        }
        for (int64_t d = threadIdx.x % 32; d < depth; d += 32) {
            const float x = real && d < D && length == length ? q[d] : 0, hat = (float)(x / length);
            if (to.panel) to.panel[panel + d * PANEL] = length == length ? hat : 0;
            if (to.raw_panel)
                to.raw_panel[panel + d * PANEL] = real && d < D && length == length ? placed(q, d, to.frame, D) : 0;
            if (to.row) to.row[row * depth + d] = length == length ? hat : 0;
            if (to.raw_row) to.raw_row[row * depth + d] = x;
        }
    }
}

void lay_out_codes(const code_layout &to, const float *codebook, int64_t M, int64_t g, int64_t D, int64_t depth,
                   vx_data_check nonfinite, vx_data_check outside)
{
    VX_LAUNCH(codes_kernel, vx_grid(vx_ceil_div(to.count, PANEL) * PANEL * 32, BLOCK), BLOCK, 0, to, codebook, M, g, D,
              depth, nonfinite, outside);
}
