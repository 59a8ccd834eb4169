/* contrastive.c: contrastive, contrastive_backward: how well a context vector tells its own target from distractors
 * (Eq. 15; [Baevski et al. 2020]).
 *
 *   logit[n][0] = cos(y_n, q_n) / temperature      logit[n][1 + k] = cos(y_n, q_j) / temperature, j = distractors[n][k]
 *   loss[n] = ln sum_e exp(logit[n][e]) - logit[n][0]
 *
 * A distractor whose vector equals the positive's, number by number, is no distractor: its logit is -inf, unless keep
 * is 1. So a collapsed codebook has loss 0, and a model that tells nothing apart has ln(1 + K).
 *
 * Gradients, with p = softmax(logit[n]) - onehot(0), w = dloss p / temperature and c the cosine:
 *   dy_n = sum_e w_e (q_j / (|y| |q_j|) - c_e y / |y|^2)      dq_j = the same sum over all (n, e) that name j, y for q
 * Norms have a guard of 1e-12; a row shorter than that has no direction, and its gradient is 0.
 *
 * Cost: forward and backward read N (1 + K) rows of q, from cache where a crop's frames fit there: D multiplications
 * each, 3 D in the backward pass. The backward pass sorts the N (1 + K) entries by the row they name, so that each
 * row's gradient is one sum in ascending order of (n, e), whatever the number of threads.
 */
#include <math.h>

#include "cpu/indices.h"
#include "cpu/row_norms.h"
#include "cpu/scratch.h"

static bool same_row(const float *a, const float *b, int64_t D)
{
    for (int64_t d = 0; d < D; d++)
        if (a[d] != b[d]) return false;
    return true;
}

/* Fails where a row of x (N,D) holds a NaN or Inf; fills its norms. */
static int norms_of(const char *op, const char *name, const vx_tensor *x, float *norms)
{
    const int64_t bad = first_nonfinite(vx_f32(x), x->shape[0], x->shape[1], norms);
    return bad < 0 ? VX_OK : vx_fail(VX_ENONFINITE, "%s: row %lld of %s holds a NaN or Inf", op, (long long)bad, name);
}

/* Computes loss (N), logits (N,1+K), equal (N), how many distractors equal the positive, and hit (N), 1 where the
 * positive's logit is above those of all other distractors, of which there is one at least. Working space: 8 N bytes.
 */
int VX_CPU(contrastive)(vx_tensor *loss, vx_tensor *logits, vx_tensor *equal, vx_tensor *hit, vx_tensor *y,
                        vx_tensor *q, vx_tensor *distractors, float temperature, int keep)
{
    const int64_t N = y->shape[0], D = y->shape[1], K = distractors->shape[1];
    const float *py = vx_f32(y), *pq = vx_f32(q);
    const int32_t *other = vx_i32(distractors);
    int status = check_indices("contrastive", "distractor", other, N, K, N);
    if (status) return status;
    float *norm_y = vx_scratch("contrastive", sizeof(float) * (size_t)(2 * N + 1)), *norm_q = norm_y + N;
    if (!norm_y) return VX_ENOMEM;
    status = norms_of("contrastive", "y", y, norm_y);
    if (!status) status = norms_of("contrastive", "q", q, norm_q);
    if (status) {
        vx_scratch_free(norm_y);
        return status;
    }
#pragma omp parallel for schedule(static) if (N * K * D >= 65536)
    for (int64_t n = 0; n < N; n++) {
        float *logit = vx_f32(logits) + n * (K + 1);
        const float *row = py + n * D, *positive = pq + n * D;
        int32_t equals = 0, below = 0;
        float most = logit[0] = dot(row, positive, D) / (norm_y[n] * norm_q[n]) / temperature;
        for (int64_t k = 0; k < K; k++) {
            const int64_t j = other[n * K + k];
            const bool same = same_row(pq + j * D, positive, D);
            equals += same;
            if (same && !keep) {
                logit[1 + k] = -INFINITY;
                continue;
            }
            logit[1 + k] = dot(row, pq + j * D, D) / (norm_y[n] * norm_q[j]) / temperature;
            below += logit[1 + k] < logit[0];
            most = fmaxf(most, logit[1 + k]);
        }
        double sum = 0;
        for (int64_t e = 0; e <= K; e++) sum += exp((double)logit[e] - most);
        vx_f32(loss)[n] = (float)(log(sum) + most - logit[0]);
        const int64_t rivals = keep ? K : K - equals;
        vx_i32(equal)[n] = equals;
        vx_i32(hit)[n] = rivals > 0 && below == rivals;
    }
    vx_scratch_free(norm_y);
    return VX_OK;
}

/* Fills w (1+K) with the weights of a row's entries, and entry with the rows that they name. */
static void weigh(float *w, int32_t *entry, const float *logit, const int32_t *other, int64_t n, int64_t K,
                  double scale)
{
    double most = logit[0], sum = 0;
    for (int64_t e = 1; e <= K; e++) most = fmax(most, logit[e]);
    for (int64_t e = 0; e <= K; e++) sum += exp(logit[e] - most);
    for (int64_t e = 0; e <= K; e++) {
        w[e] = (float)(scale * (exp(logit[e] - most) / sum - (e == 0)));
        entry[e] = e ? other[e - 1] : (int32_t)n;
    }
}

/* Adds a x (D) to sum. */
static inline void add_scaled(float *sum, float a, const float *x, int64_t D)
{
    int64_t d = 0;
    for (; d + VX_LANES <= D; d += VX_LANES) vf_store(sum + d, vf_load(sum + d) + a * vf_load(x + d));
    for (; d < D; d++) sum[d] += a * x[d];
}

/* Computes dy, dq (N,D) of the mean of the losses times dloss (1). Working space: 12 N (1+K) + 12 N bytes. */
int VX_CPU(contrastive_backward)(vx_tensor *dy, vx_tensor *dq, vx_tensor *dloss, vx_tensor *y, vx_tensor *q,
                                 vx_tensor *distractors, vx_tensor *logits, float temperature)
{
    const int64_t N = y->shape[0], D = y->shape[1], K = distractors->shape[1], J = K + 1;
    if (N * J > INT32_MAX)
        return vx_fail(VX_EINVAL, "contrastive_backward: %lld frames of %lld logits, expected less than 2^31 in all",
                       (long long)N, (long long)J);
    const float *py = vx_f32(y), *pq = vx_f32(q), *logit = vx_f32(logits);
    const int32_t *other = vx_i32(distractors);
    int status = check_indices("contrastive_backward", "distractor", other, N, K, N);
    if (status) return status;
    float *w = 0, *norm_y = 0, *norm_q = 0;
    int32_t *entry = 0, *order = 0, *start = 0;
    scratch memory = {.op = "contrastive_backward"};
    while (scratch_pass(&memory)) {
        w = carve_f32(&memory, N * J);
        norm_y = carve_f32(&memory, N);
        norm_q = carve_f32(&memory, N);
        entry = carve_i32(&memory, N * J);
        order = carve_i32(&memory, N * J);
        start = carve_i32(&memory, N + 1);
    }
    if (!memory.base) return VX_ENOMEM;
    status = norms_of("contrastive_backward", "y", y, norm_y);
    if (!status) status = norms_of("contrastive_backward", "q", q, norm_q);
    if (status) {
        scratch_free(&memory);
        return status;
    }
    const double scale = N ? vx_f32(dloss)[0] / (double)N / temperature : 0;
#pragma omp parallel for schedule(static) if (N * J * D >= 65536)
    for (int64_t n = 0; n < N; n++) {
        float *to = vx_f32(dy) + n * D, along = 0;
        weigh(w + n * J, entry + n * J, logit + n * J, other + n * K, n, K, scale);
        memset(to, 0, sizeof(float) * (size_t)D);
        for (int64_t e = 0; e < J; e++) {
            const float a = w[n * J + e];
            if (a == 0 || norm_y[n] <= (float)GUARD) continue;
            add_scaled(to, a / (norm_y[n] * norm_q[entry[n * J + e]]), pq + (int64_t)entry[n * J + e] * D, D);
            along += a * logit[n * J + e];
        }
        if (norm_y[n] > (float)GUARD) add_scaled(to, -along * temperature / (norm_y[n] * norm_y[n]), py + n * D, D);
    }
    counting_sort(entry, 1, N * J, N, order, start);
    /* lists differ in length; who sums a row does not change its sum */
#pragma omp parallel for schedule(dynamic, 4) if (N * J * D >= 65536)
    for (int64_t j = 0; j < N; j++) {
        float *to = vx_f32(dq) + j * D, along = 0;
        memset(to, 0, sizeof(float) * (size_t)D);
        if (norm_q[j] <= (float)GUARD) continue;
        for (int32_t i = start[j]; i < start[j + 1]; i++) {
            const int64_t n = order[i] / J;
            const float a = w[order[i]];
            if (a == 0) continue;
            add_scaled(to, a / (norm_y[n] * norm_q[j]), py + n * D, D);
            along += a * logit[order[i]];
        }
        add_scaled(to, -along * temperature / (norm_q[j] * norm_q[j]), pq + j * D, D);
    }
    scratch_free(&memory);
    return VX_OK;
}
