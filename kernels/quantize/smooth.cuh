/* smooth.cuh: what the two halves of the smoothed quantizer share on CUDA: the call, its preparation, noise, and a pass
 * over all logits of a row. The mathematics is in smooth.c and smooth_backward.c, the layout of tiles in
 * codebook_tiles.cuh.
 *
 * Logarithms are to base 2 inside: log2(e) / tau is folded into the rows of z. tau is known to the device alone:
 * nothing here waits for it, so what depends on it is decided by the kernels.
 */
#ifndef VX_SMOOTH_CUH
#define VX_SMOOTH_CUH

#include "shared/checks.h"
#include "cuda/mma_tiles.cuh"

#define LOG2E 1.44269504088896341
#define LN2 0.69314718055994531
#define LIMIT 50.0f /* as in smooth.c: logits further above their reference are not summed */

enum { NOISE_NONE = 0, NOISE_RATES, NOISE_LOGS }; /* as in smooth.h */

/* One call for one group, as kernels see it. */
typedef struct smooth_call {
    int64_t N, G, g, M, D, depth, panels;
    int sampler, regularizer, noise_kind;
    float cooling;              /* 1 / gumbel_tau; 1 under softmax */
    const vx_draw *draw;        /* seed and stream */
    const float *noise;         /* (N,G,M) or NULL */
    const float *scale;         /* scale[0] = log2(e) / tau, scale[1] = tau */
    const float *rows;          /* (N,depth) z / |z| scale */
    const float *norms;         /* (N) |z| */
    const float *panel;         /* (panels,depth,64) normalized codes */
    const float *row, *raw_row; /* (64 panels,depth) codes, normalized and as stored */
    int tensor;                 /* D is 9 .. 64: tensor cores, and rows of codes in the order of mma_tiles.cuh */
} smooth_call;

/* scale and tau from log_tau; a tau out of range is reported late, 1 in its place. And the draw, where kernels find it
 * without spending registers on where it may be. */
VX_KERNEL tau_kernel(float *scale, vx_draw *draw, const float *log_tau, vx_random random, vx_data_check outside)
{
    *draw = vx_draw_now(random);
    double tau = exp((double)log_tau[0]);
    if (!(tau >= 1e-7 && tau <= 1e7)) {
        vx_report(outside, 0);
        tau = 1;
    }
    scale[0] = (float)(LOG2E / tau);
    scale[1] = (float)tau;
}

/* Where row and raw_row have a code. */
VX_DEVICE int64_t row_position(const smooth_call &c, int64_t code)
{
    return c.tensor ? tensor_position(code) : position_of(code);
}

/* Rates (1/E) or logarithms (g log2 e) of row i's codes tx, tx + 16, tx + 32, tx + 48 of a panel, as noise_kind
 * says. */
VX_DEVICE void noise_of(const smooth_call &c, int64_t i, int64_t panel, int tx, float out[4])
{
    const int64_t row = (i < c.N ? i : c.N - 1) * c.G + c.g;
    if (c.noise) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t code = panel * PANEL + tx + 16 * j;
            out[j] = code < c.M ? c.noise[row * c.M + code] * (float)LOG2E : 0;
        }
        return;
    }
    gumbel_rates(*c.draw, row, c.panels, panel, tx, out);
    if (c.noise_kind == NOISE_LOGS)
#pragma unroll
        for (int j = 0; j < 4; j++) out[j] = log2f(out[j]);
}

/* Logits of a tile, of codes that are not there PADDING. start: what each row's begin from. */
template <int RT>
VX_DEVICE void tile_logits(const smooth_call &c, float (&s)[RT][4], const float (&start)[RT], int64_t first,
                           int64_t panel, bool fresh_rows, bool fresh_panel, float *shared)
{
#pragma unroll
    for (int i = 0; i < RT; i++) s[i][0] = s[i][1] = s[i][2] = s[i][3] = start[i];
    tile_product<RT>(s, c.rows, first, c.N, fresh_rows, c.panel + panel * PANEL * c.depth, fresh_panel, c.depth,
                     shared);
    if ((panel + 1) * PANEL > c.M)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (panel * PANEL + tile_x() + 16 * j >= c.M)
#pragma unroll
                for (int i = 0; i < RT; i++) s[i][j] = PADDING;
}

/* The same for a warp's 16 rows (from shared memory `a`, row `row` belonging to this thread with row + 8) and a panel
 * (from `b`), on tensor cores. start: what the two rows' logits begin from. */
template <int KT>
VX_DEVICE void tensor_logits(const smooth_call &c, float (&s)[8][4], const float (&start)[2], int64_t panel,
                             const float *a, const float *b)
{
#pragma unroll
    for (int t = 0; t < 8; t++) s[t][0] = s[t][1] = start[0], s[t][2] = s[t][3] = start[1];
    tensor_product<KT>(s, a, b);
    if ((panel + 1) * PANEL > c.M)
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (panel * PANEL + tensor_code(8 * t + threadIdx.x % 4 * 2 + e) >= c.M)
                    s[t][e] = s[t][2 + e] = PADDING;
}

/* x (RT values of this thread's rows) reduced over the 16 threads of each row, in order; thread r < 16 RT gets row
 * r's. */
enum { REDUCE_SUM = 0, REDUCE_MAX };
template <int RT> VX_DEVICE float reduce_rows(const float (&x)[RT], int how, float *shared)
{
    const int tx = tile_x(), ty = tile_y(), r = threadIdx.x;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < RT; i++) shared[tx * 16 * RT + ty + 16 * i] = x[i];
    __syncthreads();
    float y = r < 16 * RT ? shared[r] : 0;
    for (int t = 1; t < 16 && r < 16 * RT; t++) {
        const float other = shared[t * 16 * RT + r];
        y = how == REDUCE_SUM ? y + other : fmaxf(y, other);
    }
    return y;
}

/* -- One number for each row from all of its logits ---------------------------------------------------------------- */

enum {
    SCAN_START = 0, /* minus the largest logit, rounded up: what the row's relative logits begin from (requirement R2 of
                     * smooth.c); 0 where |logit| <= scale is small enough anyway */
    SCAN_NOISY,     /* the largest (relative logit + noise) / gumbel_tau, rounded up */
    SCAN_PPL,       /* the sum of weight times 2^logit */
};
enum { SCAN_RT = 4 };

/* out (N). start (N): what logits begin from, or NULL: 0. weight (64 panels) by code. */
VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS, 2)
    scan_kernel(smooth_call c, int mode, float *out, const float *start, const float *weight)
{
    float *shared = (float *)vx_shared;
    const int64_t first = (int64_t)blockIdx.x * 16 * SCAN_RT;
    const int tx = tile_x(), ty = tile_y();
    if (mode == SCAN_START && c.scale[0] <= LIMIT) {
        for (int r = threadIdx.x; r < 16 * SCAN_RT && first + r < c.N; r += TILE_THREADS) out[first + r] = 0;
        return;
    }
    float from[SCAN_RT], best[SCAN_RT];
#pragma unroll
    for (int i = 0; i < SCAN_RT; i++) {
        const int64_t row = first + ty + 16 * i;
        from[i] = start && row < c.N ? start[row] : 0;
        best[i] = mode == SCAN_PPL ? 0 : -INFINITY;
    }
    for (int64_t panel = 0; panel < c.panels; panel++) {
        float s[SCAN_RT][4];
        tile_logits<SCAN_RT>(c, s, from, first, panel, panel == 0, true, shared);
#pragma unroll
        for (int i = 0; i < SCAN_RT; i++) {
            float noise[4] = {0, 0, 0, 0};
            if (mode == SCAN_NOISY) noise_of(c, first + ty + 16 * i, panel, tx, noise);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (mode == SCAN_PPL) best[i] += vx_fast_exp2(s[i][j]) * weight[panel * PANEL + tx + 16 * j];
                else best[i] = fmaxf(best[i], mode == SCAN_NOISY ? (s[i][j] + noise[j]) * c.cooling : s[i][j]);
            }
        }
    }
    const float found = reduce_rows<SCAN_RT>(best, mode == SCAN_PPL ? REDUCE_SUM : REDUCE_MAX, shared);
    if (threadIdx.x < 16 * SCAN_RT && first + threadIdx.x < c.N)
        out[first + threadIdx.x] = mode == SCAN_PPL ? found : mode == SCAN_START ? -ceilf(found) : ceilf(found);
}

#define SCAN_SHARED (sizeof(float) * (size_t)TILE_FLOATS(SCAN_RT))

static inline void scan(const smooth_call *c, int mode, float *out, const float *start, const float *weight)
{
    VX_LAUNCH(scan_kernel, (unsigned)vx_ceil_div(c->N, 16 * SCAN_RT), TILE_THREADS, SCAN_SHARED, *c, mode, out, start,
              weight);
}

/* -- Host: a call -------------------------------------------------------------------------------------------------- */

/* Row ranges of a pass in which a block owns a panel of codes: few enough blocks for their partial results to stay
 * small, enough to fill a large device. They depend on the sizes alone. bytes: of one range's results for all
 * panels. */
static inline int64_t cut_ranges(int64_t rows, int64_t panels, int64_t bytes)
{
    const int64_t by_blocks = vx_ceil_div(1024, panels), by_rows = vx_max64(rows / 512, 1),
                  by_memory = vx_max64((INT64_C(16) << 20) / bytes, 1);
    return vx_min64(vx_min64(by_blocks, by_rows), by_memory);
}

static inline smooth_call call_of(const vx_tensor *z, const vx_tensor *codebook, const vx_tensor *noise, int sampler,
                                  int regularizer, float gumbel_tau)
{
    smooth_call c = {};
    c.N = z->shape[0], c.G = z->shape[1], c.D = z->shape[2], c.M = codebook->shape[1];
    c.tensor = c.D > 8 && c.D <= 64;
    c.depth = !c.tensor ? depth_of(c.D) : c.D <= 16 ? 16 : c.D <= 32 ? 32 : 64;
    c.panels = vx_ceil_div(c.M, PANEL);
    c.sampler = sampler, c.regularizer = regularizer;
    c.noise = sampler == VX_SOFTMAX ? NULL : vx_f32(noise);
    c.noise_kind = sampler == VX_SOFTMAX ? NOISE_NONE : c.noise || gumbel_tau != 1 ? NOISE_LOGS : NOISE_RATES;
    c.cooling = sampler == VX_SOFTMAX ? 1 : 1 / gumbel_tau;
    return c;
}

typedef struct smooth_checks {
    vx_data_check tau, row, code, noise, vertex;
} smooth_checks;

static inline smooth_checks checks_of(const smooth_call *c)
{
    smooth_checks a;
    a.tau = vx_data_check_of(VX_ENONFINITE, 1, "tau = exp(log_tau) is not in 1e-7 .. 1e7");
    a.code = vx_data_check_of(VX_ENONFINITE, c->M, "group %%lld of the codebook holds a NaN or Inf, in code %%lld");
    a.row = vx_data_check_of(VX_ENONFINITE, c->G, "row %%lld of z holds a NaN or Inf (group %%lld)");
    a.noise = vx_data_check_of(VX_ENONFINITE, c->G, "row %%lld of the noise holds a NaN or Inf (group %%lld)");
    a.vertex = vx_data_check_of(VX_EINVAL, 1, "vertex %%lld is no code, of 0 .. %lld", (long long)c->M - 1);
    return a;
}

#endif
