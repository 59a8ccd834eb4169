/* assign.cu: index of the nearest code on CUDA; what is computed, ties included, is said in assign.c.
 *
 * A block takes 128 rows past all panels of codes, keeping for each row and thread the best score and its code; the 16
 * threads of a row agree at the end, on the largest score and then the lowest code. Where the next largest is within
 * rounding of it, a warp compares the row with all codes in double. No N x M array.
 *
 * Cost: 2 N M D flops, in float32; the rows are read once, the codes once per 128 rows, from the L2 cache. A NaN or Inf
 * is reported late; its row gets code 0.
 */
#include "codebook_tiles.cuh"
#include "frame.h"

enum { RT = 8, ROWS = 16 * RT };

/* Makes *length = C of assign.c's banner, from what scores start from. One block. */
VX_KERNEL length_kernel(float *length, const float *start, int64_t padded)
{
    __shared__ float most[TILE_THREADS];
    most[threadIdx.x] = 0;
    for (int64_t i = threadIdx.x; i < padded; i += TILE_THREADS)
        if (start[i] > -INFINITY) most[threadIdx.x] = fmaxf(most[threadIdx.x], -2 * start[i]);
    __syncthreads();
    for (int i = TILE_THREADS / 2; i > 0; i >>= 1) {
        if ((int)threadIdx.x < i) most[threadIdx.x] = fmaxf(most[threadIdx.x], most[threadIdx.x + i]);
        __syncthreads();
    }
    if (threadIdx.x == 0) *length = sqrtf(most[0]) * (1 + 0x1p-20f);
}

/* What tells which rows are compared in double: `gap` (N), by how much the largest score exceeds the next. */
typedef struct exact_call {
    const float *z, *codebook, *rows, *gap;
    const float *reach, *length; /* under VX_EUCLID: (N) of lay_out_rows(), and C */
    int64_t N, G, g, D, M, depth;
} exact_call;

/* Returns 2 E of assign.c's banner for a row of length a. */
VX_DEVICE double margin_of(const exact_call &c, double a)
{
    const double rounding = 3 * (double)(c.D + 4) * 0x1p-24;
    if (!c.length) return 2 * (rounding + 4 * 0x1p-23) * a;
    const double C = *c.length;
    return 2 * (rounding * (a * C + C * C / 2) + 0x1p-23 * (a + C) * (a + C)) + 0x1p-100;
}

/* Compares all codes in double for the rows whose two largest scores are within rounding of each other, or which are
 * far outside of the frame: compare() and margin_of() of assign.c. A warp takes a row; most are passed over by a bound
 * of their length. */
VX_KERNEL exact_kernel(int32_t *codes, exact_call c)
{
    const int lane = threadIdx.x % 32;
    for (int64_t n = vx_first() / 32; n < c.N; n += vx_step() / 32) {
        if (!(c.reach && c.reach[n] > FRAME_REACH)) {
            if (!(c.gap[n] < margin_of(c, c.reach ? sqrt((double)c.D) * c.reach[n] : 1.001))) continue;
            double square = 0;
            for (int64_t d = lane; d < c.D; d += 32)
                square += (double)c.rows[n * c.depth + d] * (double)c.rows[n * c.depth + d];
            if (!(c.gap[n] < margin_of(c, sqrt(vx_warp_sum(square))))) continue;
        }
        const float *x = c.z + (n * c.G + c.g) * c.D, *best = NULL;
        int32_t code = 0;
        double most = 0;
        for (int64_t m = 0; m < c.M; m++) {
            const float *q = c.codebook + (c.g * c.M + m) * c.D;
            double sum = 0, squares = 0;
            for (int64_t d = lane; d < c.D; d += 32) {
                const double y = q[d], z = x[d], b = best && c.length ? best[d] : 0;
                sum += c.length ? (y - b) * ((z - b) + (z - y)) : z * y;
                squares += y * y;
            }
            sum = vx_warp_sum(sum);
            if (!c.length) sum /= fmax(sqrt(vx_warp_sum(squares)), GUARD);
            if (!best || sum > most) best = q, code = (int32_t)m, most = c.length ? 0 : sum;
        }
        if (lane == 0) codes[n * c.G + c.g] = code;
    }
}

VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS)
    assign_kernel(int32_t *codes, float *gap, const float *rows, const float *panels, const float *start, int64_t N,
                  int64_t G, int64_t g, int64_t M, int64_t depth)
{
    float *shared = (float *)vx_shared;
    const int64_t first = (int64_t)blockIdx.x * ROWS, panel_count = (M + PANEL - 1) / PANEL;
    const int tx = tile_x(), ty = tile_y();
    float best[RT], second[RT];
    int32_t code[RT];
#pragma unroll
    for (int i = 0; i < RT; i++) best[i] = second[i] = -INFINITY, code[i] = 0;
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
            for (int i = 0; i < RT; i++) {
                const float score = at < M ? acc[i][j] : -INFINITY;
                second[i] = fmaxf(second[i], fminf(score, best[i]));
                if (score > best[i]) best[i] = score, code[i] = at;
            }
        }
    }
    __syncthreads();
    float *score = shared;
    int32_t *candidate = (int32_t *)(shared + 16 * ROWS);
    float *next = shared + 2 * 16 * ROWS;
#pragma unroll
    for (int i = 0; i < RT; i++) {
        const int at = tx * ROWS + ty + 16 * i;
        score[at] = best[i], candidate[at] = code[i], next[at] = second[i];
    }
    __syncthreads();
    for (int r = threadIdx.x; r < ROWS && first + r < N; r += TILE_THREADS) {
        float most = score[r], after = next[r];
        int32_t lowest = candidate[r];
        for (int t = 1; t < 16; t++) {
            const float other = score[t * ROWS + r];
            after = fmaxf(after, fmaxf(next[t * ROWS + r], fminf(other, most)));
            if (other > most || (other == most && candidate[t * ROWS + r] < lowest))
                most = other, lowest = candidate[t * ROWS + r];
        }
        codes[(first + r) * G + g] = lowest;
        gap[first + r] = most - after;
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
    float *length = metric == VX_EUCLID ? VX_SCRATCH(float, 1) : NULL;
    float *gap = VX_SCRATCH(float, N);
    double *frame = metric == VX_EUCLID ? VX_SCRATCH(double, 2 * D + 1) : NULL;
    const vx_data_check bad_row = vx_data_check_of(VX_ENONFINITE, G, "row %%lld of z holds a NaN or Inf (group %%lld)");
    const vx_data_check bad_code =
        vx_data_check_of(VX_ENONFINITE, M, "group %%lld of the codebook holds a NaN or Inf, in code %%lld");
    const size_t shared = sizeof(float) * (size_t)vx_max64(TILE_FLOATS(RT), 3 * 16 * ROWS);
    for (int64_t g = 0; g < G; g++) {
        code_layout to = {};
        to.count = M;
        if (metric == VX_EUCLID) {
            lay_out_frame(frame, vx_f32(codebook), M, g, D);
            to.raw_panel = panels, to.start = start, to.frame = frame;
        } else to.panel = panels;
        lay_out_rows({vx_f32(z), N, G, g, D, depth, metric == VX_COSINE, NULL, rows, reach, frame}, bad_row);
        lay_out_codes(to, vx_f32(codebook), M, g, D, depth, bad_code, bad_code);
        VX_LAUNCH(assign_kernel, (unsigned)vx_ceil_div(N, ROWS), TILE_THREADS, shared, vx_i32(codes), gap, rows, panels,
                  start, N, G, g, M, depth);
        if (length) VX_LAUNCH(length_kernel, 1, TILE_THREADS, 0, length, start, padded);
        const exact_call c = {vx_f32(z), vx_f32(codebook), rows, gap, reach, length, N, G, g, D, M, depth};
        VX_LAUNCH(exact_kernel, vx_grid(N * 32, 256), 256, 0, vx_i32(codes), c);
    }
    return vx_status();
}
