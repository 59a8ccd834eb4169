/* codebook_tiles.cu: lays out rows and codes, see codebook_tiles.cuh. A warp takes a row or a code. Norms are added
 * up in float64. */
#include "codebook_tiles.cuh"

enum { BLOCK = 256 };

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
        const float divided = (float)length;
        if (length != length && threadIdx.x % 32 == 0) vx_report(nonfinite, i * r.G + r.g);
        if (r.norm && threadIdx.x % 32 == 0) r.norm[i] = divided;
        for (int64_t d = threadIdx.x % 32; d < r.depth; d += 32)
            r.out[i * r.depth + d] = d >= r.D || length != length ? 0 : r.normalize ? x[d] / divided * factor : x[d];
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
        const int64_t at = tile_position(c), panel = c / PANEL * PANEL * depth + at % PANEL;
        const int64_t row = to.mma ? mma_position(c) : at;
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

void lay_out_codes(const code_layout &to, const float *codebook, int64_t M, int64_t g, int64_t D, int64_t depth,
                   vx_data_check nonfinite, vx_data_check outside)
{
    VX_LAUNCH(codes_kernel, vx_grid(vx_ceil_div(to.count, PANEL) * PANEL * 32, BLOCK), BLOCK, 0, to, codebook, M, g, D,
              depth, nonfinite, outside);
}
