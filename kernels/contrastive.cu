/* contrastive.cu: the contrastive loss of Wav2Vec 2.0 on CUDA; contrastive.c has the formulas.
 *
 * Forward and the gradient of y: a warp for each frame, whose lanes have neighbouring dimensions. The gradient of q:
 * the N (1 + K) entries are sorted by the row they name (sort.cuh), so that its sums have a fixed order. A NaN or a
 * distractor out of range is reported late; such a distractor counts as row 0.
 */
#include "cuda/sort.cuh"
#include "shared/constants.h"

enum { BLOCK = 256 };

/* Fills norm with max(|x_n|, GUARD) of the rows of x (N,D). A warp for each row. */
VX_KERNEL norms_kernel(float *norm, const float *x, int64_t N, int64_t D, vx_data_check bad)
{
    const int lane = threadIdx.x % 32;
    for (int64_t n = vx_first() / 32; n < N; n += vx_step() / 32) {
        double sum = 0;
        for (int64_t d = lane; d < D; d += 32) sum += (double)x[n * D + d] * x[n * D + d];
        sum = vx_warp_sum(sum);
        if (lane == 0) {
            norm[n] = fmaxf((float)sqrt(sum), (float)GUARD);
            if (!(sum <= 1e300)) vx_report(bad, n);
        }
    }
}

VX_KERNEL contrastive_kernel(float *loss, float *logits, int32_t *equal, int32_t *hit, const float *y, const float *q,
                             const int32_t *distractors, const float *norm_y, const float *norm_q, int64_t N, int64_t D,
                             int64_t K, float temperature, int keep, vx_data_check outside)
{
    const int lane = threadIdx.x % 32;
    for (int64_t n = vx_first() / 32; n < N; n += vx_step() / 32) {
        float *logit = logits + n * (K + 1), first = 0, most = 0;
        int32_t equals = 0, below = 0;
        for (int64_t e = 0; e <= K; e++) {
            int64_t j = e ? distractors[n * K + e - 1] : n;
            if (j < 0 || j >= N) {
                if (lane == 0) vx_report(outside, n * K + e - 1);
                j = 0;
            }
            float sum = 0;
            unsigned differs = 0;
            for (int64_t d = lane; d < D; d += 32) {
                sum += y[n * D + d] * q[j * D + d];
                differs |= q[j * D + d] != q[n * D + d];
            }
            const bool same = e > 0 && !__ballot_sync(VX_ALL_LANES, differs);
            float value = vx_warp_sum(sum) / (norm_y[n] * norm_q[j]) / temperature;
            equals += same;
            if (same && !keep) value = -INFINITY;
            else if (e > 0) below += value < first;
            if (e == 0) first = most = value;
            most = fmaxf(most, value);
            if (lane == 0) logit[e] = value;
        }
        __syncwarp();
        double sum = 0;
        for (int64_t e = lane; e <= K; e += 32) sum += exp((double)logit[e] - most);
        sum = vx_warp_sum(sum);
        if (lane == 0) {
            const int64_t rivals = keep ? K : K - equals;
            loss[n] = (float)(log(sum) + most - first);
            equal[n] = equals;
            hit[n] = rivals > 0 && below == rivals;
        }
    }
}

/* Computes loss (N), logits (N,1+K), equal (N), hit (N). Working space: 8 N bytes. */
int vx_cuda_contrastive(vx_tensor *loss, vx_tensor *logits, vx_tensor *equal, vx_tensor *hit, vx_tensor *y,
                        vx_tensor *q, vx_tensor *distractors, float temperature, int keep)
{
    const int64_t N = y->shape[0], D = y->shape[1], K = distractors->shape[1];
    if (!N) return VX_OK;
    const vx_data_check bad_y = vx_data_check_of(VX_ENONFINITE, 1, "row %%lld of y holds a NaN or Inf"),
                        bad_q = vx_data_check_of(VX_ENONFINITE, 1, "row %%lld of q holds a NaN or Inf"),
                        outside =
                            vx_data_check_of(VX_EINVAL, K, "distractor at row %%lld, column %%lld is outside 0 .. %lld",
                                             (long long)N - 1);
    float *norm_y = VX_SCRATCH(float, 2 * N), *norm_q = norm_y + N;
    const unsigned grid = vx_grid(N * 32, BLOCK);
    VX_LAUNCH(norms_kernel, grid, BLOCK, 0, norm_y, vx_f32(y), N, D, bad_y);
    VX_LAUNCH(norms_kernel, grid, BLOCK, 0, norm_q, vx_f32(q), N, D, bad_q);
    VX_LAUNCH(contrastive_kernel, grid, BLOCK, 0, vx_f32(loss), vx_f32(logits), vx_i32(equal), vx_i32(hit), vx_f32(y),
              vx_f32(q), vx_i32(distractors), norm_y, norm_q, N, D, K, temperature, keep, outside);
    return vx_status();
}

/* Fills w (N,1+K) with the weights of the entries, and entries with the rows that they name. A warp for each row. */
VX_KERNEL weights_kernel(float *w, unsigned long long *entries, const float *logits, const int32_t *distractors,
                         const float *dloss, int64_t N, int64_t K, float temperature)
{
    const int lane = threadIdx.x % 32;
    const double scale = *dloss / (double)N / temperature;
    for (int64_t n = vx_first() / 32; n < N; n += vx_step() / 32) {
        const float *logit = logits + n * (K + 1);
        float most = logit[0];
        double sum = 0;
        for (int64_t e = lane; e <= K; e += 32) most = fmaxf(most, logit[e]);
        most = vx_warp_max(most);
        for (int64_t e = lane; e <= K; e += 32) sum += exp((double)logit[e] - most);
        sum = vx_warp_sum(sum);
        for (int64_t e = lane; e <= K; e += 32) {
            const int64_t at = n * (K + 1) + e;
            const int32_t j = e ? distractors[n * K + e - 1] : (int32_t)n;
            w[at] = (float)(scale * (exp((double)logit[e] - most) / sum - (e == 0)));
            entries[at] = vx_sort_entry(j < 0 || j >= N ? 0 : (uint32_t)j, (uint32_t)at);
        }
    }
}

/* Computes dy; runs before the entries are sorted, when entry n (1+K) + e is still that of frame n. */
VX_KERNEL dy_kernel(float *dy, const float *w, const unsigned long long *entries, const float *logits, const float *y,
                    const float *q, const float *norm_y, const float *norm_q, int64_t N, int64_t D, int64_t J,
                    float temperature)
{
    const int lane = threadIdx.x % 32;
    for (int64_t n = vx_first() / 32; n < N; n += vx_step() / 32) {
        float along = 0;
        for (int64_t e = 0; e < J; e++)
            if (w[n * J + e] != 0) along += w[n * J + e] * logits[n * J + e];
        along *= temperature / (norm_y[n] * norm_y[n]);
        const bool guarded = norm_y[n] <= (float)GUARD;
        for (int64_t d = lane; d < D; d += 32) {
            float sum = 0;
            for (int64_t e = 0; e < J; e++) {
                const int64_t j = vx_sort_key(entries[n * J + e]);
                sum += w[n * J + e] / (norm_y[n] * norm_q[j]) * q[j * D + d];
            }
            dy[n * D + d] = guarded ? 0 : sum - along * y[n * D + d];
        }
    }
}

/* A term of dq: the gradient to row j from an entry. */
struct term_of_q {
    const float *w, *logits, *y, *q, *norm_y, *norm_q;
    int64_t D, J;
    float temperature;
    VX_INSIDE float operator()(uint32_t j, uint32_t entry, int64_t d) const
    {
        const int64_t n = entry / J;
        const float a = w[entry];
        if (a == 0 || norm_q[j] <= (float)GUARD) return 0;
        return a / (norm_y[n] * norm_q[j]) * y[n * D + d] -
               a * logits[entry] * temperature / (norm_q[j] * norm_q[j]) * q[j * D + d];
    }
};

/* Computes dy, dq (N,D). Working space: 20 N (1+K) bytes, and what sort.cuh takes. */
int vx_cuda_contrastive_backward(vx_tensor *dy, vx_tensor *dq, vx_tensor *dloss, vx_tensor *y, vx_tensor *q,
                                 vx_tensor *distractors, vx_tensor *logits, float temperature)
{
    const int64_t N = y->shape[0], D = y->shape[1], K = distractors->shape[1], J = K + 1;
    if (!N || !D) return VX_OK;
    if (N * J > INT32_MAX)
        return vx_fail(VX_EINVAL, "contrastive_backward: %lld frames of %lld logits, expected less than 2^31 in all",
                       (long long)N, (long long)J);
    const vx_data_check bad_y = vx_data_check_of(VX_ENONFINITE, 1, "row %%lld of y holds a NaN or Inf"),
                        bad_q = vx_data_check_of(VX_ENONFINITE, 1, "row %%lld of q holds a NaN or Inf");
    float *norm_y = VX_SCRATCH(float, 2 * N), *norm_q = norm_y + N, *w = VX_SCRATCH(float, N *J);
    vx_sort s = vx_sort_of(N * J, vx_sort_bits(N));
    float *partial = VX_SCRATCH(float, vx_pieces_partial(N * J, D));
    const unsigned grid = vx_grid(N * 32, BLOCK);
    VX_LAUNCH(norms_kernel, grid, BLOCK, 0, norm_y, vx_f32(y), N, D, bad_y);
    VX_LAUNCH(norms_kernel, grid, BLOCK, 0, norm_q, vx_f32(q), N, D, bad_q);
    VX_LAUNCH(weights_kernel, grid, BLOCK, 0, w, s.entries, vx_f32(logits), vx_i32(distractors), vx_f32(dloss), N, K,
              temperature);
    VX_LAUNCH(dy_kernel, grid, BLOCK, 0, vx_f32(dy), w, s.entries, vx_f32(logits), vx_f32(y), vx_f32(q), norm_y, norm_q,
              N, D, J, temperature);
    VX_CUDA(cudaMemsetAsync(vx_f32(dq), 0, sizeof(float) * (size_t)(N * D), vx_stream()));
    vx_sort_run(&s);
    vx_sum_pieces(vx_pieces{s.entries, N * J, N, D, vx_f32(dq), partial},
                  term_of_q{w, vx_f32(logits), vx_f32(y), vx_f32(q), norm_y, norm_q, D, J, temperature});
    return vx_status();
}
