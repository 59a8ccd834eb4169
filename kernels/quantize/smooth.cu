/* smooth.cu: the smoothed quantizer and its regularizers on CUDA, forward; the mathematics, what is left for the
 * backward pass, and the requirements are in smooth.c.
 *
 * Two passes over the logits, and no N x M array:
 *   1. a block owns 64 rows and meets all panels: logits, powers, sums, the mixture with the codes, the code;
 *   2. a block owns a panel and meets a range of rows: the K nearest rows of each of its codes, and the sums of pi
 *      (smooth_select.cu). A row's key needs the row's sum, hence the second pass.
 * Before them, where tau is small or noise comes as logarithms, a scan finds each row's largest logit.
 *
 * Cost: 6 N M D flops in float32 (4 without pass 2), 1 to 2 N M powers. D <= 8 keeps its mixture in registers; D <= 64
 * goes through the tensor cores (mma_tiles.cuh); what is wider, through shared memory as a second product of float32.
 * Memory: N (depth + 5) floats, M (3 depth + 2), and ranges of M K entries of 8 bytes.
 */
#include "smooth.cuh"
#include "smooth_select.cuh"

VX_KERNEL noise_check_kernel(const float *noise, int64_t rows, int64_t M, vx_data_check nonfinite)
{
    for (int64_t i = vx_first(); i < rows * M; i += vx_step())
        if (!(fabsf(noise[i]) < INFINITY)) vx_report(nonfinite, i / M);
}

/* -- Pass 1: rows -------------------------------------------------------------------------------------------------- */

typedef struct forward_out {
    float *y, *soft, *lse, *sumsq; /* as the op's; soft NULL unless hard Gumbel */
    int32_t *codes;
    const float *start;           /* (N) minus the row's reference */
    const float *noisy_reference; /* (N); NULL: 0 */
    float *inverse;               /* (N) 1 / sum of powers */
    float *factor, *offset;       /* (N) key = factor x + offset, x the logit (knn-ce) or the power (knn-l2) */
    double *max_p;                /* (blocks) sums of the rows' largest p */
} forward_out;

/* Shared memory of pass 1: a product, and what a mixture needs. NS: slices of 64 numbers of a wide row that a block
 * mixes; 0 for a narrow row, of at most DT numbers. */
template <int NS, int DT> static size_t forward_shared(void)
{
    const int floats = TILE_FLOATS(RT) + (NS ? MIX_FLOATS : PANEL * DT), reduction = 2 * 16 * ROWS;
    return sizeof(float) * (size_t)(floats > reduction ? floats : reduction);
}

/* Finds each row's best code among those of its 16 threads: the one of the largest value, and of equals the lowest.
 * Thread r < ROWS gets row r's code and *value. shared: 32 ROWS. */
VX_DEVICE int32_t best_of_rows(const float (&best)[RT], const int32_t (&code)[RT], float *value, float *shared)
{
    const int tx = tile_x(), ty = tile_y(), r = threadIdx.x;
    int32_t *candidate = (int32_t *)(shared + 16 * ROWS);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < RT; i++)
        shared[tx * ROWS + ty + 16 * i] = best[i], candidate[tx * ROWS + ty + 16 * i] = code[i];
    __syncthreads();
    float most = r < ROWS ? shared[r] : 0;
    int32_t lowest = r < ROWS ? candidate[r] : 0;
    for (int t = 1; t < 16 && r < ROWS; t++) {
        const float x = shared[t * ROWS + r];
        const int32_t at = candidate[t * ROWS + r];
        if (x > most || (x == most && at < lowest)) most = x, lowest = at;
    }
    *value = most;
    return lowest;
}

/* Writes a row's results from the sums of its powers, of their squares and of its noisy weights, and from its best
 * logit or weight and that one's code. Returns the row's largest p. */
VX_DEVICE double write_row(const group_call &c, const forward_out &out, int64_t row, float total, float square,
                           float noisy_total, float best, int32_t code)
{
    const float weights = c.noise_kind == NOISE_NONE ? total : noisy_total;
    const double reference = -(double)out.start[row], cooled = out.noisy_reference ? out.noisy_reference[row] : 0;
    const double lse = LN2 * (reference + log2((double)total));
    double noisy_lse = lse;
    if (c.noise_kind == NOISE_RATES) noisy_lse = LN2 * (reference + log2((double)weights));
    if (c.noise_kind == NOISE_LOGS) noisy_lse = LN2 * (reference * c.cooling + cooled + log2((double)weights));
    const int64_t at = row * c.G + c.g;
    const float norm2 = square / total / total;
    out.lse[at * 2] = (float)lse;
    out.lse[at * 2 + 1] = (float)noisy_lse;
    out.sumsq[at] = c.regularizer == VX_REG_KNN_L2 ? norm2 : 0;
    out.codes[at] = code;
    out.inverse[row] = 1 / total;
    out.factor[row] = c.regularizer == VX_REG_KNN_L2 ? 2 / total : 1;
    out.offset[row] = c.regularizer == VX_REG_KNN_L2 ? -norm2 : -log2f(total);
    return (c.noise_kind == NOISE_RATES ? best : exp2f(best - (float)cooled)) / weights;
}

template <int NS, int DT>
VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS, NS > 1 || DT > 4 ? 1 : 2) forward_kernel(group_call c, forward_out out)
{
    float *shared = (float *)vx_shared, *mix = shared + TILE_FLOATS(RT);
    const int64_t first = (int64_t)blockIdx.x * ROWS, first_slice = (int64_t)blockIdx.y * NS;
    const int tx = tile_x(), ty = tile_y();
    const bool noisy = c.noise_kind != NOISE_NONE;
    float start[RT], noisy_reference[RT], sum[RT], squares[RT], noisy_sum[RT], best[RT];
    int32_t code[RT];
    float wide[NS ? NS : 1][RT][4], narrow[RT][DT ? DT : 1];
#pragma unroll
    for (int i = 0; i < RT; i++) {
        const int64_t row = first + ty + 16 * i;
        start[i] = row < c.N ? out.start[row] : 0;
        noisy_reference[i] = out.noisy_reference && row < c.N ? out.noisy_reference[row] : 0;
        sum[i] = squares[i] = noisy_sum[i] = 0;
        best[i] = -INFINITY;
        code[i] = 0;
#pragma unroll
        for (int s = 0; s < NS; s++) wide[s][i][0] = wide[s][i][1] = wide[s][i][2] = wide[s][i][3] = 0;
#pragma unroll
        for (int d = 0; d < DT; d++) narrow[i][d] = 0;
    }
    for (int64_t panel = 0; panel < c.panels; panel++) {
        float s[RT][4];
        tile_logits(c, s, start, first, panel, panel == 0, true, shared);
        if (!NS) /* the panel's codes, for the mixture; the last panel's use ended before the product's barriers */
            for (int i = threadIdx.x; i < PANEL * DT; i += TILE_THREADS) mix[i] = c.raw_row[panel * PANEL * DT + i];
#pragma unroll
        for (int i = 0; i < RT; i++) {
            float noise[4] = {1, 1, 1, 1};
            if (noisy) noise_of(c, first + ty + 16 * i, panel, tx, noise);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float power = vx_fast_exp2(s[i][j]);
                sum[i] += power;
                squares[i] += power * power;
                float x = power, ranked = s[i][j];
                if (c.noise_kind == NOISE_RATES) ranked = x = power * noise[j];
                if (c.noise_kind == NOISE_LOGS) {
                    ranked = s[i][j] > PADDING / 2 ? (s[i][j] + noise[j]) * c.cooling : PADDING;
                    x = vx_fast_exp2(ranked - noisy_reference[i]);
                }
                noisy_sum[i] += x;
                if (ranked > best[i]) best[i] = ranked, code[i] = (int32_t)(panel * PANEL) + tx + 16 * j;
                s[i][j] = x;
            }
        }
        if constexpr (NS > 0) { /* readers of the last panel's weights are past the product's barriers */
            mix_wide<NS>(wide, s, c.raw_row + panel * PANEL * c.depth, c.depth, first_slice, mix);
        } else {
            __syncthreads();
            mix_narrow<DT>(narrow, s, mix);
        }
    }

    /* thread r has row r's numbers from here on */
    const int r = threadIdx.x;
    const int64_t row = first + r;
    const bool mine = r < ROWS && row < c.N, writes = mine && blockIdx.y == 0;
    float value;
    const float total = reduce_rows(sum, REDUCE_SUM, shared), square = reduce_rows(squares, REDUCE_SUM, shared);
    const float noisy_total = reduce_rows(noisy_sum, REDUCE_SUM, shared);
    const int32_t found = best_of_rows(best, code, &value, shared);
    const float weights = noisy ? noisy_total : total;
    double largest = 0;
    if (writes) largest = write_row(c, out, row, total, square, noisy_total, value, found);
    __syncthreads();
    float *inverse = shared;
    int32_t *chosen = (int32_t *)(shared + ROWS);
    double *block = (double *)(shared + 2 * ROWS);
    if (r < ROWS) inverse[r] = mine ? 1 / weights : 0, chosen[r] = found;
    const double all = vx_block_sum(largest, block);
    if (threadIdx.x == 0 && blockIdx.y == 0) out.max_p[blockIdx.x] = all;
    __syncthreads();

    const bool hard = c.sampler == VX_HARD_GUMBEL;
    const float *codebook = c.codebook + c.g * c.M * c.D;
#pragma unroll
    for (int s = 0; s < NS; s++)
#pragma unroll
        for (int i = 0; i < RT; i++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int at = 4 * ty + i;
                const int64_t d = (first_slice + s) * 64 + 4 * tx + k, to = ((first + at) * c.G + c.g) * c.D + d;
                if (first + at >= c.N || d >= c.D) continue;
                const float mixed = wide[s][i][k] * inverse[at];
                out.y[to] = hard ? codebook[chosen[at] * c.D + d] : mixed;
                if (out.soft) out.soft[to] = mixed;
            }
    float *sums = shared + 4 * ROWS; /* the two arrays above stay */
    for (int d = 0; d < DT; d++) {
        const float mixed = reduce_column(narrow, d, sums) * (r < ROWS ? inverse[r] : 0);
        if (!mine || d >= c.D) continue;
        const int64_t to = (row * c.G + c.g) * c.D + d;
        out.y[to] = hard ? codebook[chosen[r] * c.D + d] : mixed;
        if (out.soft) out.soft[to] = mixed;
    }
}

/* -- Pass 1 on tensor cores: a warp owns 16 rows ------------------------------------------------------------------- */

/* Shared: a block's rows, and two panels of codes, each normalized and as stored, of which one is on its way while the
 * other is used. */
template <int KT> static size_t forward_mma_shared(void)
{
    return sizeof(float) * (size_t)((MMA_ROWS + 4 * PANEL) * ITEM_PITCH(KT));
}

/* Keeps the better of two candidates; of equals the lower code. */
VX_DEVICE void keep_best(float *best, int32_t *code, float x, int32_t at)
{
    if (x > *best || (x == *best && at < *code)) *best = x, *code = at;
}

template <int KT, bool NOISY>
VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS, KT > (NOISY ? 2 : 4) ? 1 : 2)
    forward_mma_kernel(group_call c, forward_out out)
{
    constexpr int CODES = PANEL * ITEM_PITCH(KT); /* floats of a panel */
    float *rows = (float *)vx_shared, *panels = rows + MMA_ROWS * ITEM_PITCH(KT);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = lane % 4;
    const int64_t first = (int64_t)blockIdx.x * MMA_ROWS, mine = first + warp * 16 + lane / 4; /* and mine + 8 */
    float start[2], noisy_reference[2], sum[2] = {0, 0}, squares[2] = {0, 0}, noisy_sum[2] = {0, 0},
                                        best[2] = {-INFINITY, -INFINITY};
    int32_t code[2] = {INT32_MAX, INT32_MAX};
    float o[KT][4];
#pragma unroll
    for (int k = 0; k < KT; k++) o[k][0] = o[k][1] = o[k][2] = o[k][3] = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        start[i] = mine + 8 * i < c.N ? out.start[mine + 8 * i] : 0;
        noisy_reference[i] = NOISY && out.noisy_reference && mine + 8 * i < c.N ? out.noisy_reference[mine + 8 * i] : 0;
    }
    load_items<KT>(rows, c.rows, first, c.N, MMA_ROWS, threadIdx.x, TILE_THREADS);
    load_codes<KT>(panels, c, 0, TILE_THREADS);
    vx_copy_commit();
    for (int64_t panel = 0; panel < c.panels; panel++) {
        float *hat = panels + panel % 2 * 2 * CODES, *next = panels + (panel + 1) % 2 * 2 * CODES, s[8][4];
        if (panel + 1 < c.panels) load_codes<KT>(next, c, panel + 1, TILE_THREADS);
        vx_copy_commit();
        vx_copy_wait(1);
        __syncthreads();
        mma_logits<KT>(c, s, start, panel, rows + warp * 16 * ITEM_PITCH(KT), hat);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float noise[4] = {1, 1, 1, 1};
                    const int u = 4 * q + 2 * h + e;
                    if (NOISY) noise_of(c, mine + 8 * i, panel, u, noise);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        float &logit = s[4 * h + j][2 * i + e];
                        const float power = vx_fast_exp2(logit);
                        sum[i] += power;
                        squares[i] += power * power;
                        float x = power, ranked = logit;
                        if (NOISY && c.noise_kind == NOISE_RATES) ranked = x = power * noise[j];
                        if (NOISY && c.noise_kind == NOISE_LOGS) {
                            ranked = logit > PADDING / 2 ? (logit + noise[j]) * c.cooling : PADDING;
                            x = vx_fast_exp2(ranked - noisy_reference[i]);
                        }
                        if (NOISY) noisy_sum[i] += x;
                        keep_best(&best[i], &code[i], ranked, (int32_t)(panel * PANEL) + u + 16 * j);
                        logit = x;
                    }
                }
        mma_mix<KT>(o, s, hat + CODES);
        __syncthreads();
    }
    double largest = 0;
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float total = quad_sum(sum[i]), square = quad_sum(squares[i]), noisy_total = quad_sum(noisy_sum[i]);
        for (int step = 1; step < 4; step *= 2) {
            const float other = __shfl_xor_sync(VX_ALL_LANES, best[i], step);
            const int32_t at = __shfl_xor_sync(VX_ALL_LANES, code[i], step);
            keep_best(&best[i], &code[i], other, at);
        }
        inverse[i] = 1 / (NOISY ? noisy_total : total);
        if (q == 0 && mine + 8 * i < c.N)
            largest += write_row(c, out, mine + 8 * i, total, square, noisy_total, best[i], code[i]);
    }
    __syncthreads();
    const double all = vx_block_sum(largest, (double *)rows);
    if (threadIdx.x == 0) out.max_p[blockIdx.x] = all;
    const bool hard = c.sampler == VX_HARD_GUMBEL;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int k = 0; k < KT; k++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int64_t d = 8 * k + 2 * q + e, to = ((mine + 8 * i) * c.G + c.g) * c.D + d;
                if (mine + 8 * i >= c.N || d >= c.D) continue;
                const float mixed = o[k][2 * i + e] * inverse[i];
                out.y[to] = hard ? c.codebook[(c.g * c.M + code[i]) * c.D + d] : mixed;
                if (out.soft) out.soft[to] = mixed;
            }
}

/* -- Results ------------------------------------------------------------------------------------------------------- */

/* Makes mean_pi (M), the means of pi over the group's N rows, from the sums mean (parts,padded), and entropy (M), each
 * code's part of the entropy. */
VX_KERNEL mean_pi_kernel(float *mean_pi, double *entropy, const float *mean, int64_t M, int64_t padded, int64_t parts,
                         double N)
{
    for (int64_t m = vx_first(); m < M; m += vx_step()) {
        double sum = 0;
        for (int64_t p = 0; p < parts; p++) sum += mean[p * padded + m];
        sum /= N;
        mean_pi[m] = (float)sum;
        entropy[m] = sum > 0 ? -sum * log(sum) : 0;
    }
}

enum { TOTAL_BLOCK = 1024 };

/* Adds factor times the sum of x (n) to total, or under `ppl` 1 - exp(the sum) / n. `fresh`: total is 0 so far. One
 * block. */
VX_KERNEL total_kernel(double *total, const double *x, int64_t n, double factor, int ppl, int fresh)
{
    __shared__ double shared[32];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += TOTAL_BLOCK) sum += x[i];
    sum = vx_block_sum(sum, shared);
    if (threadIdx.x == 0) *total = (fresh ? 0 : *total) + (ppl ? 1 - exp(sum) / (double)n : sum * factor);
}

VX_KERNEL forward_scalars_kernel(float *reg, float *max_p, const double *total, double groups, double rows,
                                 int regularized)
{
    *reg = regularized ? (float)(total[0] / groups) : 0;
    *max_p = (float)(total[1] / rows);
}

/* -- The op -------------------------------------------------------------------------------------------------------- */

template <int NS, int DT> static void launch_forward(const group_call &c, const forward_out &out)
{
    const int64_t slices = NS ? vx_ceil_div(c.depth, 64 * (NS ? NS : 1)) : 1;
    VX_LAUNCH((forward_kernel<NS, DT>), dim3((unsigned)vx_ceil_div(c.N, ROWS), (unsigned)slices), TILE_THREADS,
              (forward_shared<NS, DT>()), c, out);
}

template <int KT> static void launch_forward_mma(const group_call &c, const forward_out &out)
{
    const unsigned blocks = (unsigned)vx_ceil_div(c.N, MMA_ROWS);
    const size_t shared = forward_mma_shared<KT>();
    if (c.noise_kind == NOISE_NONE) VX_LAUNCH((forward_mma_kernel<KT, false>), blocks, TILE_THREADS, shared, c, out);
    else VX_LAUNCH((forward_mma_kernel<KT, true>), blocks, TILE_THREADS, shared, c, out);
}

/* Runs pass 1 of a group. */
static void forward_rows(const group_call &c, const forward_out &out)
{
    if (c.depth == 4) launch_forward<0, 4>(c, out);
    else if (c.depth == 8) launch_forward<0, 8>(c, out);
    else if (c.depth == 16) launch_forward_mma<2>(c, out);
    else if (c.depth == 32) launch_forward_mma<4>(c, out);
    else if (c.depth == 64) launch_forward_mma<8>(c, out);
    else launch_forward<4, 0>(c, out);
}

int vx_cuda_smooth_forward(vx_tensor *y, vx_tensor *codes, vx_tensor *lse, vx_tensor *sumsq, vx_tensor *soft,
                           vx_tensor *near, vx_tensor *mean_pi, vx_tensor *reg, vx_tensor *max_p, vx_tensor *z,
                           vx_tensor *codebook, vx_tensor *log_tau, vx_tensor *noise, vx_tensor *vertices, int sampler,
                           int regularizer, float gumbel_tau, int shards, int precision, uint64_t seed, uint64_t stream)
{
    (void)precision; /* bf16 asks for less than the float32 that there is */
    group_call c;
    if (group_call_check(&c, z, codebook, noise, vertices, near, mean_pi, sampler, regularizer, gumbel_tau, shards,
                         seed, stream))
        return VX_EINVAL;
    const vx_random random = vx_draws(seed, stream);
    const bool knn = smooth_is_knn(regularizer);
    const int64_t each = c.K / c.shards, vertex_panels = vx_ceil_div(c.S, PANEL), vertex_padded = vertex_panels * PANEL;
    const int64_t row_blocks = vx_ceil_div(c.N, c.mma ? MMA_ROWS : ROWS);
    if (each > MOST_NEIGHBOURS)
        return vx_fail(VX_EINVAL, "%s: K = %lld neighbours of a shard, of at most %d on this device", vx_op(),
                       (long long)each, MOST_NEIGHBOURS);
    /* one walk over the columns serves neighbours and means where they are the same columns */
    const bool together = knn && mean_pi && !c.vertices;
    const int64_t select_ranges =
        knn ? cut_ranges(c.N / c.shards, vertex_panels, c.shards * vertex_padded * each * 8) : 1;
    const int64_t mean_ranges = cut_ranges(c.N, c.panels, c.Mp * 4),
                  mean_parts = together ? c.shards * select_ranges : mean_ranges;

    vx_draw *draw = VX_SCRATCH(vx_draw, 1);
    float *scale = VX_SCRATCH(float, 2), *start = VX_SCRATCH(float, c.N), *norms = VX_SCRATCH(float, c.N);
    float *rows = VX_SCRATCH(float, c.N *c.depth), *panel = VX_SCRATCH(float, c.Mp *c.depth);
    float *row = c.mma ? VX_SCRATCH(float, c.Mp *c.depth) : NULL, *raw_row = VX_SCRATCH(float, c.Mp *c.depth);
    float *noisy_reference = c.noise_kind == NOISE_LOGS ? VX_SCRATCH(float, c.N) : NULL;
    float *vertex_codes = c.vertices ? VX_SCRATCH(float, vertex_padded *c.depth) : NULL;
    forward_out out = {};
    out.start = start, out.noisy_reference = noisy_reference;
    out.inverse = VX_SCRATCH(float, c.N), out.factor = VX_SCRATCH(float, c.N), out.offset = VX_SCRATCH(float, c.N);
    out.max_p = VX_SCRATCH(double, row_blocks);
    out.y = vx_f32(y), out.lse = vx_f32(lse), out.sumsq = vx_f32(sumsq), out.soft = vx_f32(soft);
    out.codes = vx_i32(codes);
    columns_out columns = {};
    columns.start = start, columns.inverse = out.inverse, columns.factor = out.factor, columns.offset = out.offset;
    unsigned long long *lists =
        knn ? VX_SCRATCH(unsigned long long, c.shards *select_ranges *vertex_padded *each) : NULL;
    double *loss = knn ? VX_SCRATCH(double, c.S *c.shards) : NULL;
    double *entropy = mean_pi ? VX_SCRATCH(double, c.M) : NULL, *total = VX_SCRATCH(double, 2);
    float *mean = mean_pi ? VX_SCRATCH(float, mean_parts *c.Mp) : NULL;
    const smooth_checks check = smooth_checks_of(c);

    prepare_tau(scale, draw, vx_f32(log_tau), random, check.tau);
    if (c.noise)
        VX_LAUNCH(noise_check_kernel, vx_grid(c.N * c.G * c.M, 256), 256, 0, c.noise, c.N * c.G, c.M, check.noise);
    c.draw = draw, c.scale = scale, c.rows = rows, c.norms = norms, c.panel = panel, c.row = row, c.raw_row = raw_row;
    for (c.g = 0; c.g < c.G; c.g++) {
        code_layout to = {};
        to.panel = panel, to.row = row, to.raw_row = raw_row, to.mma = c.mma, to.count = c.M;
        lay_out_rows({c.z, c.N, c.G, c.g, c.D, c.depth, true, scale, rows, norms, NULL}, check.row);
        lay_out_codes(to, c.codebook, c.M, c.g, c.D, c.depth, check.code, check.vertex);
        scan_logits(c, SCAN_START, start, NULL, NULL);
        if (noisy_reference) scan_logits(c, SCAN_NOISY, noisy_reference, start, NULL);
        forward_rows(c, out);
        VX_LAUNCH(total_kernel, 1, TOTAL_BLOCK, 0, total + 1, out.max_p, row_blocks, 1.0, 0, c.g == 0);
        if (knn) {
            group_call v = c; /* with the vertices for its codes */
            if (c.vertices) {
                code_layout chosen = {};
                *(c.mma ? &chosen.row : &chosen.panel) = vertex_codes;
                chosen.mma = c.mma, chosen.which = c.vertices + c.g * c.S, chosen.count = c.S;
                lay_out_codes(chosen, c.codebook, c.M, c.g, c.D, c.depth, check.code, check.vertex);
                v.panel = v.row = vertex_codes, v.M = c.S, v.panels = vertex_panels, v.Mp = vertex_padded;
            }
            columns.each = each, columns.ranges = select_ranges, columns.shards = c.shards, columns.lists = lists;
            columns.mean = together ? mean : NULL;
            select_columns(v, columns);
            merge_lists(c, columns, vx_i32(near) + c.g * c.S * c.K, loss);
            VX_LAUNCH(total_kernel, 1, TOTAL_BLOCK, 0, total, loss, c.S * c.shards, 1 / (double)(c.S * c.K), 0,
                      c.g == 0);
        }
        if (mean_pi && !together) {
            columns.each = 0, columns.ranges = mean_ranges, columns.shards = 1, columns.lists = NULL;
            columns.mean = mean;
            select_columns(c, columns);
        }
        if (mean_pi)
            VX_LAUNCH(mean_pi_kernel, vx_grid(c.M, 256), 256, 0, vx_f32(mean_pi) + c.g * c.M, entropy, mean, c.M, c.Mp,
                      mean_parts, (double)c.N);
        if (regularizer == VX_REG_PPL)
            VX_LAUNCH(total_kernel, 1, TOTAL_BLOCK, 0, total, entropy, c.M, 1.0, 1, c.g == 0);
    }
    VX_LAUNCH(forward_scalars_kernel, 1, 1, 0, vx_f32(reg), vx_f32(max_p), total, (double)c.G, (double)(c.N * c.G),
              regularizer != VX_REG_NONE);
    return vx_status();
}
