/* smooth_backward.cu: gradients of the smoothed quantizer on CUDA; the mathematics is in smooth_backward.c, whose x,
 * weights and sparse pairs these are.
 *
 * The dense terms are two passes over the logits (smooth_backward_dense.cu): one sums over codes, the other over rows.
 * Before them the numbers of each row are made from what the forward pass left, behind them dz, dcodebook and dlog_tau
 * from their sums. Under ppl a scan before them finds each row's sum of b pi.
 *
 * The S K sparse pairs of a KNN regularizer are added up per row in 64-bit integers, units of 2^-40: integer addition
 * is associative, so the atomics' order does not matter, and the rounding is below float32's. (At most 2^22 pairs of a
 * row keep the sum in range.)
 *
 * Cost: 14 N M D flops in float32, 2 N M powers. Memory: N (4 depth + 9) floats (under KNN N depth more of 8 bytes), M
 * (4 depth + 1), and a few ranges of 2 M depth.
 */
#include "smooth_backward.cuh"

#define UNIT (1099511627776.0) /* 2^40 */

/* -- Sparse pairs -------------------------------------------------------------------------------------------------- */

/* A pair is a vertex and one of its K nearest rows. */
typedef struct pairs {
    const int32_t *near;     /* (S,K) of the group */
    const int32_t *vertices; /* (S) of the group, or NULL */
    const int32_t *slot;     /* (M) the vertex that looks at a code, or -1 */
    float *weight;           /* (S,K) 1 (knn-ce) or pi (knn-l2): the pair's term in x is this times pair_factor */
    int32_t *count;          /* (N) pairs of a row */
    unsigned long long *probability; /* (N) sum of weight over a row's pairs, in UNITs */
    unsigned long long *sum;         /* (N,depth) sum of weight times the normalized code, in UNITs */
} pairs;

VX_DEVICE unsigned long long to_units(float x) { return (unsigned long long)(long long)rint((double)x * UNIT); }
VX_DEVICE float from_units(unsigned long long x) { return (float)((double)(long long)x / UNIT); }

/* Makes slot[code] the vertex that looks at it; the others keep their -1. */
VX_KERNEL slot_kernel(int32_t *slot, const int32_t *vertices, int64_t M, int64_t S)
{
    for (int64_t i = vx_first(); i < S; i += vx_step()) {
        const int64_t code = vertices ? vertices[i] : i;
        if (code >= 0 && code < M) slot[code] = (int32_t)i;
    }
}

/* Makes each pair's weight, and adds to its row's sums. A warp for each pair. lse (N,G,2). */
VX_KERNEL pairs_kernel(group_call c, pairs q, const float *lse, vx_data_check outside)
{
    const int lane = threadIdx.x % 32;
    for (int64_t j = vx_first() / 32; j < c.S * c.K; j += vx_step() / 32) {
        const int64_t i = q.near[j];
        int64_t code = q.vertices ? q.vertices[j / c.K] : j / c.K;
        if (i < 0 || i >= c.N) {
            if (lane == 0 && i != -1) vx_report(outside, j); /* -1: another rank's */
            if (lane == 0) q.weight[j] = 0;
            continue;
        }
        if (code < 0 || code >= c.M) code = 0;
        const float *hat = c.row + row_position(c, code) * c.depth, *z = c.rows + i * c.depth;
        float weight = 1;
        if (c.regularizer == VX_REG_KNN_L2) {
            float dot = 0;
            for (int64_t d = lane; d < c.depth; d += 32) dot += z[d] * hat[d];
            weight = exp2f(vx_warp_sum(dot) - lse[(i * c.G + c.g) * 2] * (float)LOG2E);
        }
        if (lane == 0) {
            q.weight[j] = weight;
            atomicAdd(&q.count[i], 1);
            atomicAdd(&q.probability[i], to_units(weight));
        }
        for (int64_t d = lane; d < c.depth; d += 32) atomicAdd(&q.sum[i * c.depth + d], to_units(weight * hat[d]));
    }
}

/* -- Row and code numbers ------------------------------------------------------------------------------------------ */

/* Returns c of smooth_backward.c's banner: the gradient of one pair's divergence. */
VX_DEVICE float knn_factor(const group_call &c, const float *dreg)
{
    return c.K ? dreg[0] / ((float)c.G * (float)c.S * (float)c.K) : 0;
}

/* Returns what a pair's weight is multiplied with in its term of x. */
VX_DEVICE float pair_factor(const group_call &c, const float *dreg)
{
    return (c.regularizer == VX_REG_KNN_L2 ? -2 : -1) * knn_factor(c, dreg);
}

/* Makes each row's numbers for the dense passes, as backward_in has them, from what the forward pass left. A warp for
 * each row. mixed (N,G,D): the sum of p times code. */
VX_KERNEL numbers_kernel(group_call c, pairs q, float *start, float *mix_offset, float *noisy, float *pi_factor,
                         float *pi_offset, const float *dy, const float *mixed, const float *lse, const float *sumsq,
                         const float *dreg, const int32_t *codes, vx_data_check outside)
{
    const float knn = knn_factor(c, dreg);
    for (int64_t i = vx_first() / 32; i < c.N; i += vx_step() / 32) {
        const int64_t at = i * c.G + c.g;
        float dot = 0;
        for (int64_t d = threadIdx.x % 32; d < c.D; d += 32) dot += dy[at * c.D + d] * mixed[at * c.D + d];
        dot = vx_warp_sum(dot);
        if (threadIdx.x % 32) continue;
        if (codes[at] < 0 || codes[at] >= c.M) vx_report(outside, at);
        const double l = lse[at * 2] * LOG2E, m = lse[at * 2 + 1] * LOG2E;
        start[i] = (float)-l;
        mix_offset[i] = -dot;
        if (noisy) noisy[i] = (float)(c.noise_kind == NOISE_RATES ? exp2(l - m) : l * c.cooling - m);
        const float count = c.K ? (float)q.count[i] : 0;
        pi_factor[i] = c.regularizer == VX_REG_KNN_L2 ? 2 * knn * count : 0;
        pi_offset[i] = c.regularizer == VX_REG_KNN_CE   ? knn * count
                       : c.regularizer == VX_REG_KNN_L2 ? 2 * knn * (from_units(q.probability[i]) - count * sumsq[at])
                                                        : 0;
    }
}

/* Makes b (Mp) of the ppl regularizer by code, from mean_pi (M) of the group. One block. */
VX_KERNEL ppl_kernel(float *b, const float *mean_pi, const float *dreg, int64_t M, int64_t padded, double groups,
                     double rows)
{
    __shared__ double shared[32];
    double entropy = 0;
    for (int64_t m = threadIdx.x; m < M; m += blockDim.x)
        entropy -= mean_pi[m] > 0 ? mean_pi[m] * log((double)mean_pi[m]) : 0;
    entropy = vx_block_sum(entropy, shared);
    const double factor = dreg[0] / groups * exp(entropy) / (rows * (double)M);
    for (int64_t m = threadIdx.x; m < padded; m += blockDim.x)
        b[m] = m < M && mean_pi[m] > 0 ? (float)(factor * (log((double)mean_pi[m]) + 1)) : 0;
}

VX_KERNEL subtract_kernel(float *y, const float *x, int64_t n)
{
    for (int64_t i = vx_first(); i < n; i += vx_step()) y[i] -= x[i];
}

/* Makes dz of the rows, and dlog_tau (N), their parts of that gradient. A warp for each row. */
VX_KERNEL finish_rows_kernel(group_call c, pairs q, float *dz, double *dlog_tau, const float *dhat, const float *x_sum,
                             const float *lse, const float *dreg)
{
    const int lane = threadIdx.x % 32;
    const float scale = c.scale[0], tau = c.scale[1];
    const float per_pair = pair_factor(c, dreg);
    for (int64_t i = vx_first() / 32; i < c.N; i += vx_step() / 32) {
        const float *z = c.rows + i * c.depth;
        float along = 0;
        for (int64_t d = lane; d < c.D; d += 32) {
            const float x = dhat[i * c.depth + d] + (c.K ? per_pair * from_units(q.sum[i * c.depth + d]) : 0);
            along += x * z[d];
        }
        along = vx_warp_sum(along) / scale;
        const float norm = c.norms[i], projection = norm > (float)GUARD ? along / scale : 0, factor = 1 / (norm * tau);
        for (int64_t d = lane; d < c.D; d += 32) {
            const float x = dhat[i * c.depth + d] + (c.K ? per_pair * from_units(q.sum[i * c.depth + d]) : 0);
            dz[(i * c.G + c.g) * c.D + d] = (x - projection * z[d]) * factor;
        }
        if (lane == 0) {
            const float pairs_sum =
                c.K ? per_pair * (c.regularizer == VX_REG_KNN_L2 ? from_units(q.probability[i]) : (float)q.count[i])
                    : 0;
            dlog_tau[i] = -((double)along / tau - (double)lse[(i * c.G + c.g) * 2] * (x_sum[i] + pairs_sum));
        }
    }
}

/* Makes dcodebook of the group's codes from the ranges' sums. A warp for each code. */
VX_KERNEL finish_codes_kernel(group_call c, pairs q, float *dcodebook, const float *partial, int64_t ranges,
                              const float *code_norms, const float *dreg)
{
    const int lane = threadIdx.x % 32;
    const float per_pair = pair_factor(c, dreg);
    for (int64_t m = vx_first() / 32; m < c.M; m += vx_step() / 32) {
        const int64_t at = row_position(c, m), slot = c.K ? q.slot[m] : -1;
        const float *hat = c.row + at * c.depth;
        float *out = dcodebook + (c.g * c.M + m) * c.D;
        float projection = 0;
        for (int64_t d = lane; d < c.D; d += 32) {
            float x = 0;
            for (int64_t r = 0; r < ranges; r++) x += partial[(2 * r * c.Mp + at) * c.depth + d];
            for (int64_t k = 0; slot >= 0 && k < c.K; k++) {
                const int64_t i = q.near[slot * c.K + k];
                if (i >= 0 && i < c.N) x += per_pair * q.weight[slot * c.K + k] * c.rows[i * c.depth + d];
            }
            projection += x * hat[d];
            out[d] = x; /* read again below, by the same thread */
        }
        projection = vx_warp_sum(projection);
        if (!(code_norms[m] > (float)GUARD)) projection = 0; /* under the guard, |q| is a constant */
        const float factor = (float)LN2 / code_norms[m];
        for (int64_t d = lane; d < c.D; d += 32) {
            float mix = 0;
            for (int64_t r = 0; r < ranges; r++) mix += partial[((2 * r + 1) * c.Mp + at) * c.depth + d];
            out[d] = (out[d] - projection * hat[d]) * factor + mix;
        }
    }
}

/* Adds the sum of x (n) to total, which is 0 so far where `fresh`; *dlog_tau is its float. One block. */
VX_KERNEL log_tau_kernel(float *dlog_tau, double *total, const double *x, int64_t n, int fresh)
{
    __shared__ double shared[32];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
    sum = vx_block_sum(sum, shared);
    if (threadIdx.x == 0) {
        *total = sum + (fresh ? 0 : *total);
        *dlog_tau = (float)*total;
    }
}

/* -- The op -------------------------------------------------------------------------------------------------------- */

int vx_cuda_smooth_backward(vx_tensor *dz, vx_tensor *dcodebook, vx_tensor *dlog_tau, vx_tensor *dy, vx_tensor *dreg,
                            vx_tensor *y, vx_tensor *codes, vx_tensor *lse, vx_tensor *sumsq, vx_tensor *soft,
                            vx_tensor *near, vx_tensor *mean_pi, vx_tensor *z, vx_tensor *codebook, vx_tensor *log_tau,
                            vx_tensor *noise, vx_tensor *vertices, int sampler, int regularizer, float gumbel_tau,
                            int shards, int precision, uint64_t seed, uint64_t stream)
{
    (void)precision; /* bf16 asks for less than the float32 that there is */
    group_call c;
    if (group_call_check(&c, z, codebook, noise, vertices, near, mean_pi, sampler, regularizer, gumbel_tau, shards,
                         seed, stream) ||
        check_soft(&c, soft))
        return VX_EINVAL;
    const vx_random random = vx_draws(seed, stream);
    if (!c.G) { /* no codebook, no logit */
        VX_CUDA(cudaMemsetAsync(dlog_tau->data, 0, sizeof(float), vx_stream()));
        return vx_status();
    }
    const bool knn = smooth_is_knn(regularizer), ppl = regularizer == VX_REG_PPL;
    const int64_t ranges = cut_ranges(c.N, c.panels, 2 * c.Mp * c.depth * 4), pair_count = c.S * c.K;

    vx_draw *draw = VX_SCRATCH(vx_draw, 1);
    float *scale = VX_SCRATCH(float, 2), *rows = VX_SCRATCH(float, c.N *c.depth), *norms = VX_SCRATCH(float, c.N);
    float *grad = VX_SCRATCH(float, c.N *c.depth), *dhat = VX_SCRATCH(float, c.N *c.depth);
    float *x_sum = VX_SCRATCH(float, c.N);
    /* what the kernels of this width read, see code_layout */
    float *panel = c.mma && !ppl ? NULL : VX_SCRATCH(float, c.Mp *c.depth);
    float *raw_panel = c.mma ? NULL : VX_SCRATCH(float, c.Mp *c.depth);
    float *raw_row = c.mma ? VX_SCRATCH(float, c.Mp *c.depth) : NULL;
    float *row = VX_SCRATCH(float, c.Mp *c.depth), *code_norms = VX_SCRATCH(float, c.Mp);
    float *start = VX_SCRATCH(float, c.N), *mix_offset = VX_SCRATCH(float, c.N), *noisy = VX_SCRATCH(float, c.N);
    float *pi_factor = VX_SCRATCH(float, c.N), *pi_offset = VX_SCRATCH(float, c.N);
    float *weights = ppl ? VX_SCRATCH(float, c.Mp) : NULL;
    float *partial = VX_SCRATCH(float, ranges * 2 * c.Mp * c.depth);
    double *log_tau_rows = VX_SCRATCH(double, c.N), *total = VX_SCRATCH(double, 1);
    int32_t *slot = NULL;
    pairs q = {};
    if (knn) {
        slot = VX_SCRATCH(int32_t, c.M);
        q.weight = VX_SCRATCH(float, pair_count), q.count = VX_SCRATCH(int32_t, c.N);
        q.probability = VX_SCRATCH(unsigned long long, c.N), q.sum = VX_SCRATCH(unsigned long long, c.N *c.depth);
        q.slot = slot;
    }
    const smooth_checks check = smooth_checks_of(c);
    const vx_data_check bad_code =
        vx_data_check_of(VX_EINVAL, c.G, "row %%lld has a code outside 0 .. %lld (group %%lld)", (long long)c.M - 1);
    const vx_data_check bad_row = vx_data_check_of(
        VX_EINVAL, c.K, "near names a row outside 0 .. %lld, at vertex %%lld, neighbour %%lld", (long long)c.N - 1);

    prepare_tau(scale, draw, vx_f32(log_tau), random, check.tau);
    c.draw = draw, c.scale = scale, c.rows = rows, c.norms = norms, c.panel = panel, c.row = row, c.raw_row = raw_row;
    backward_in in = {};
    in.dy = grad, in.raw_panel = raw_panel, in.start = start, in.mix_offset = mix_offset, in.noisy = noisy;
    in.pi_factor = pi_factor, in.pi_offset = pi_offset, in.ppl = weights, in.codes = vx_i32(codes);
    const float *mixed = vx_f32(sampler == VX_HARD_GUMBEL ? soft : y);
    for (c.g = 0; c.g < c.G; c.g++) {
        code_layout to = {};
        to.panel = panel, to.raw_panel = raw_panel, to.row = row, to.raw_row = raw_row, to.mma = c.mma;
        to.norm = code_norms, to.count = c.M;
        const unsigned by_row = vx_grid(c.N * 32, 256);
        lay_out_rows({c.z, c.N, c.G, c.g, c.D, c.depth, true, scale, rows, norms, NULL}, check.row);
        lay_out_rows({vx_f32(dy), c.N, c.G, c.g, c.D, c.depth, false, NULL, grad, NULL, NULL}, check.row);
        lay_out_codes(to, c.codebook, c.M, c.g, c.D, c.depth, check.code, check.vertex);
        if (knn) {
            q.near = vx_i32(near) + c.g * pair_count, q.vertices = c.vertices ? c.vertices + c.g * c.S : NULL;
            VX_CUDA(cudaMemsetAsync(q.count, 0, sizeof(int32_t) * (size_t)c.N, vx_stream()));
            VX_CUDA(cudaMemsetAsync(q.probability, 0, 8 * (size_t)c.N, vx_stream()));
            VX_CUDA(cudaMemsetAsync(q.sum, 0, 8 * (size_t)(c.N * c.depth), vx_stream()));
            VX_CUDA(cudaMemsetAsync(slot, 0xff, sizeof(int32_t) * (size_t)c.M, vx_stream()));
            VX_LAUNCH(slot_kernel, vx_grid(c.S, 256), 256, 0, slot, q.vertices, c.M, c.S);
            VX_LAUNCH(pairs_kernel, vx_grid(pair_count * 32, 256), 256, 0, c, q, vx_f32(lse), bad_row);
        }
        VX_LAUNCH(numbers_kernel, by_row, 256, 0, c, q, start, mix_offset, noisy, pi_factor, pi_offset, vx_f32(dy),
                  mixed, vx_f32(lse), vx_f32(sumsq), vx_f32(dreg), vx_i32(codes), bad_code);
        if (ppl) {
            VX_LAUNCH(ppl_kernel, 1, 1024, 0, weights, vx_f32(mean_pi) + c.g * c.M, vx_f32(dreg), c.M, c.Mp,
                      (double)c.G, (double)c.N);
            scan_logits(c, SCAN_PPL, x_sum, start, weights); /* x_sum is written later */
            VX_LAUNCH(subtract_kernel, vx_grid(c.N, 256), 256, 0, pi_offset, x_sum, c.N);
        }
        backward_rows(c, in, dhat, x_sum);
        VX_LAUNCH(finish_rows_kernel, by_row, 256, 0, c, q, vx_f32(dz), log_tau_rows, dhat, x_sum, vx_f32(lse),
                  vx_f32(dreg));
        VX_LAUNCH(log_tau_kernel, 1, 1024, 0, vx_f32(dlog_tau), total, log_tau_rows, c.N, c.g == 0);
        backward_columns(c, in, partial, ranges);
        VX_LAUNCH(finish_codes_kernel, vx_grid(c.M * 32, 256), 256, 0, c, q, vx_f32(dcodebook), partial, ranges,
                  code_norms, vx_f32(dreg));
    }
    return vx_status();
}
