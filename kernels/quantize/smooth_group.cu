/* smooth_group.cu: what both directions of the smoothed quantizer are given on CUDA: the checked call, tau, and a scan
 * that makes one number of all logits of a row.
 */
#include "smooth.cuh"

/* -- The call ------------------------------------------------------------------------------------------------------ */

int group_call_check(group_call *c, const vx_tensor *z, const vx_tensor *codebook, const vx_tensor *noise,
                     const vx_tensor *vertices, const vx_tensor *near, const vx_tensor *mean_pi, int sampler,
                     int regularizer, float gumbel_tau, int shards, uint64_t seed, uint64_t stream)
{
    *c = {};
    const int status = smooth_call_check(c, vx_op(), z, codebook, noise, vertices, near, mean_pi, sampler, regularizer,
                                         gumbel_tau, shards, seed, stream);
    c->mma = c->D > 8 && c->D <= 64;
    c->depth = !c->mma ? depth_of(c->D) : c->D <= 16 ? 16 : c->D <= 32 ? 32 : 64;
    c->cooling = 1 / c->gumbel_tau;
    return status;
}

smooth_checks smooth_checks_of(const group_call &c)
{
    smooth_checks check;
    check.tau = vx_data_check_of(VX_ENONFINITE, 1, "tau = exp(log_tau) is not in 1e-7 .. 1e7");
    check.code = vx_data_check_of(VX_ENONFINITE, c.M, "group %%lld of the codebook holds a NaN or Inf, in code %%lld");
    check.row = vx_data_check_of(VX_ENONFINITE, c.G, "row %%lld of z holds a NaN or Inf (group %%lld)");
    check.noise = vx_data_check_of(VX_ENONFINITE, c.G, "row %%lld of the noise holds a NaN or Inf (group %%lld)");
    check.vertex = vx_data_check_of(VX_EINVAL, 1, "vertex %%lld is no code, of 0 .. %lld", (long long)c.M - 1);
    return check;
}

int64_t cut_ranges(int64_t rows, int64_t panels, int64_t bytes)
{
    const int64_t by_blocks = vx_ceil_div(1024, panels), by_rows = vx_max64(rows / 512, 1),
                  by_memory = vx_max64((INT64_C(16) << 20) / bytes, 1);
    return vx_min64(vx_min64(by_blocks, by_rows), by_memory);
}

/* -- tau ----------------------------------------------------------------------------------------------------------- */

VX_KERNEL tau_kernel(float *scale, vx_draw *draw, const float *log_tau, vx_random random, vx_data_check outside)
{
    *draw = vx_draw_now(random);
    double tau = exp((double)log_tau[0]);
    if (!smooth_tau_fits(tau)) {
        vx_report(outside, 0);
        tau = 1;
    }
    scale[0] = (float)(LOG2E / tau);
    scale[1] = (float)tau;
}

void prepare_tau(float *scale, vx_draw *draw, const float *log_tau, const vx_random &random, vx_data_check outside)
{
    VX_LAUNCH(tau_kernel, 1, 1, 0, scale, draw, log_tau, random, outside);
}

/* -- One number for each row from all of its logits ---------------------------------------------------------------- */

/* Makes out (N) as scan_logits says. A block has 64 rows and meets all panels. */
VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS, 2)
    scan_kernel(group_call c, int mode, float *out, const float *start, const float *weight)
{
    float *shared = (float *)vx_shared;
    const int64_t first = (int64_t)blockIdx.x * ROWS;
    const int tx = tile_x(), ty = tile_y();
    if (mode == SCAN_START && c.scale[0] <= LIMIT) {
        for (int r = threadIdx.x; r < ROWS && first + r < c.N; r += TILE_THREADS) out[first + r] = 0;
        return;
    }
    float from[RT], best[RT];
#pragma unroll
    for (int i = 0; i < RT; i++) {
        const int64_t row = first + ty + 16 * i;
        from[i] = start && row < c.N ? start[row] : 0;
        best[i] = mode == SCAN_PPL ? 0 : -INFINITY;
    }
    for (int64_t panel = 0; panel < c.panels; panel++) {
        float s[RT][4];
        tile_logits(c, s, from, first, panel, panel == 0, true, shared);
#pragma unroll
        for (int i = 0; i < RT; i++) {
            float noise[4] = {0, 0, 0, 0};
            if (mode == SCAN_NOISY) noise_of(c, first + ty + 16 * i, panel, tx, noise);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (mode == SCAN_PPL) best[i] += vx_fast_exp2(s[i][j]) * weight[panel * PANEL + tx + 16 * j];
                else best[i] = fmaxf(best[i], mode == SCAN_NOISY ? (s[i][j] + noise[j]) * c.cooling : s[i][j]);
            }
        }
    }
    const float found = reduce_rows(best, mode == SCAN_PPL ? REDUCE_SUM : REDUCE_MAX, shared);
    if (threadIdx.x < ROWS && first + threadIdx.x < c.N)
        out[first + threadIdx.x] = mode == SCAN_PPL ? found : mode == SCAN_START ? -ceilf(found) : ceilf(found);
}

void scan_logits(const group_call &c, int mode, float *out, const float *start, const float *weight)
{
    VX_LAUNCH(scan_kernel, (unsigned)vx_ceil_div(c.N, ROWS), TILE_THREADS, sizeof(float) * (size_t)TILE_FLOATS(RT), c,
              mode, out, start, weight);
}
