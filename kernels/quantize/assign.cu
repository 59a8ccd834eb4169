/* assign.cu: index of the nearest code on CUDA; what is computed, ties included, is said in assign.c.
 *
 * A block takes 128 rows past all panels of codes, keeping for each row and thread the best score and its code; the 16
 * threads of a row agree at the end, on the largest score and then the lowest code. No N x M array.
 *
 * Cost: 2 N M D flops, in float32; the rows are read once, the codes once per 128 rows, from the L2 cache. A NaN or Inf
 * is reported late; its row gets code 0.
 */
#include "codebook_tiles.cuh"
#include "frame.h"

enum { RT = 8, ROWS = 16 * RT };

/* Gives rows that are far outside of the frame their code, as far_code() does in assign.c. A warp takes a row. */
VX_KERNEL far_kernel(int32_t *codes, const float *z, const float *codebook, const double *frame, const float *reach,
                     int64_t N, int64_t G, int64_t g, int64_t D, int64_t M)
{
    for (int64_t n = vx_first() / 32; n < N; n += vx_step() / 32) {
        if (!(reach[n] > FRAME_REACH)) continue;
        const float *x = z + (n * G + g) * D;
        int32_t code = 0;
        double most = -INFINITY;
        for (int64_t m = 0; m < M; m++) {
            const float *q = codebook + (g * M + m) * D;
            double product = 0, squares = 0;
            for (int64_t d = threadIdx.x % 32; d < D; d += 32) {
                const double a = (x[d] - frame[d]) * frame[D], b = (q[d] - frame[d]) * frame[D];
                product += a * b;
                squares += b * b;
            }
            const double score = vx_warp_sum(product) - vx_warp_sum(squares) / 2;
            if (score > most) most = score, code = (int32_t)m;
        }
        if (threadIdx.x % 32 == 0) codes[n * G + g] = code;
    }
}

VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS)
    assign_kernel(int32_t *codes, const float *rows, const float *panels, const float *start, int64_t N, int64_t G,
                  int64_t g, int64_t M, int64_t depth)
{
    float *shared = (float *)vx_shared;
    const int64_t first = (int64_t)blockIdx.x * ROWS, panel_count = (M + PANEL - 1) / PANEL;
    const int tx = tile_x(), ty = tile_y();
    float best[RT];
    int32_t code[RT];
#pragma unroll
    for (int i = 0; i < RT; i++) best[i] = -INFINITY, code[i] = 0;
    for (int64_t panel = 0; panel < panel_count; panel++) {
        float acc[RT][4];
        float4 from = make_float4(0, 0, 0, 0);
        if (start) from = *(const float4 *)(start + panel * PANEL + 4 * tx);
#pragma unroll
        for (int i = 0; i < RT; i++) acc[i][0] = from.x, acc[i][1] = from.y, acc[i][2] = from.z, acc[i][3] = from.w;
        tile_product<RT>(acc, rows, first, N, panel == 0, panels + panel * PANEL * depth, true, depth, shared);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int32_t at = (int32_t)(panel * PANEL) + tx + 16 * j;
#pragma unroll
            for (int i = 0; i < RT; i++)
                if (acc[i][j] > best[i] && at < M) best[i] = acc[i][j], code[i] = at;
        }
    }
    __syncthreads();
    float *score = shared;
    int32_t *candidate = (int32_t *)(shared + 16 * ROWS);
#pragma unroll
    for (int i = 0; i < RT; i++) score[tx * ROWS + ty + 16 * i] = best[i], candidate[tx * ROWS + ty + 16 * i] = code[i];
    __syncthreads();
    for (int r = threadIdx.x; r < ROWS && first + r < N; r += TILE_THREADS) {
        float most = score[r];
        int32_t lowest = candidate[r];
        for (int t = 1; t < 16; t++)
            if (score[t * ROWS + r] > most || (score[t * ROWS + r] == most && candidate[t * ROWS + r] < lowest))
                most = score[t * ROWS + r], lowest = candidate[t * ROWS + r];
        codes[(first + r) * G + g] = lowest;
    }
}

int vx_cuda_assign(vx_tensor *codes, vx_tensor *z, vx_tensor *codebook, int metric)
{
    const int64_t N = z->shape[0], G = z->shape[1], D = z->shape[2], M = codebook->shape[1], depth = depth_of(D);
    const int64_t padded = vx_ceil_div(M, PANEL) * PANEL;
    if (!codes->numel) return VX_OK;
    float *rows = VX_SCRATCH(float, N *depth), *panels = VX_SCRATCH(float, padded *depth);
    float *start = metric == VX_EUCLID ? VX_SCRATCH(float, padded) : NULL;
    float *reach = metric == VX_EUCLID ? VX_SCRATCH(float, N) : NULL;
    double *frame = metric == VX_EUCLID ? VX_SCRATCH(double, 2 * D + 1) : NULL;
    const vx_data_check bad_row = vx_data_check_of(VX_ENONFINITE, G, "row %%lld of z holds a NaN or Inf (group %%lld)");
    const vx_data_check bad_code =
        vx_data_check_of(VX_ENONFINITE, M, "group %%lld of the codebook holds a NaN or Inf, in code %%lld");
    const size_t shared = sizeof(float) * (size_t)vx_max64(TILE_FLOATS(RT), 2 * 16 * ROWS);
    for (int64_t g = 0; g < G; g++) {
        code_layout to = {};
        to.count = M;
        if (metric == VX_EUCLID) {
            lay_out_frame(frame, vx_f32(codebook), M, g, D);
            to.raw_panel = panels, to.start = start, to.frame = frame;
        } else to.panel = panels;
        lay_out_rows({vx_f32(z), N, G, g, D, depth, metric == VX_COSINE, NULL, rows, reach, frame}, bad_row);
        lay_out_codes(to, vx_f32(codebook), M, g, D, depth, bad_code, bad_code);
        VX_LAUNCH(assign_kernel, (unsigned)vx_ceil_div(N, ROWS), TILE_THREADS, shared, vx_i32(codes), rows, panels,
                  start, N, G, g, M, depth);
        if (metric == VX_EUCLID)
            VX_LAUNCH(far_kernel, vx_grid(N * 32, 256), 256, 0, vx_i32(codes), vx_f32(z), vx_f32(codebook), frame,
                      reach, N, G, g, D, M);
    }
    return vx_status();
}
