/* reference.h: the smoothed quantizer in float64, straight from the formulas at the head of kernels/quantize/smooth.c
 * and smooth_backward.c, with no thought of speed beyond loops that a compiler vectorizes. What the steps of this
 * folder and experiments/bench/quantizer.lua are held against. One group of codes, gumbel_tau 1, all codes are
 * vertices.
 *
 * Rows come in blocks of ROWS, which meet the codes STRIP at a time, so that large shapes take seconds: N = 65,536, D =
 * 32, M = 8,196 about 20 on two cores. Working space: per thread 3 ROWS M doubles and, backward, 2 M D.
 */
#ifndef VX_LAB_REFERENCE_H
#define VX_LAB_REFERENCE_H

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/rng.h"

enum { SOFTMAX, SOFT_GUMBEL, HARD_GUMBEL };
enum { REG_NONE, REG_PPL, REG_KNN_CE, REG_KNN_L2 };

typedef struct problem {
    int64_t N, D, M, K; /* K is 0 unless regularizer is one of the two KNN */
    int sampler, regularizer;
    uint64_t seed, stream;                    /* of the Gumbel noise, as in core/rng.h */
    const float *z, *codebook, *dy, *log_tau; /* (N,D), (M,D), (N,D) dL/dy, (1); dL/dreg is 1 */
} problem;

typedef struct solution {
    double *y, *lse, *sumsq; /* (N,D), (N) log-sum-exp of the logits, (N) |pi|^2 */
    int32_t *codes, *near;   /* (N), (M,K) */
    double *key;             /* (M,K) log pi (knn-ce) or 2 pi - |pi|^2 (knn-l2) of the neighbours, descending */
    double *mean_pi;         /* (M) */
    double reg;
    double *dz, *dcodebook, dlog_tau; /* (N,D), (M,D) */
} solution;

enum { ROWS = 16, STRIP = 512 };

static inline void *take(int64_t count, size_t size)
{
    void *p = calloc((size_t)(count > 0 ? count : 1), size);
    if (!p) {
        fprintf(stderr, "no memory for %lld elements of %zu bytes\n", (long long)count, size);
        exit(1);
    }
    return p;
}

static inline solution new_solution(const problem *q)
{
    return (solution){
        .y = take(q->N * q->D, sizeof(double)),
        .lse = take(q->N, sizeof(double)),
        .sumsq = take(q->N, sizeof(double)),
        .codes = take(q->N, sizeof(int32_t)),
        .near = take(q->M * q->K, sizeof(int32_t)),
        .key = take(q->M * q->K, sizeof(double)),
        .mean_pi = take(q->M, sizeof(double)),
        .dz = take(q->N * q->D, sizeof(double)),
        .dcodebook = take(q->M * q->D, sizeof(double)),
    };
}

/* Transposes the codes, normalized or as stored, to (D,M). */
static inline double *transposed_codes(const problem *q, int normalized)
{
    double *t = take(q->D * q->M, sizeof(double));
    for (int64_t m = 0; m < q->M; m++) {
        double norm = 0;
        for (int64_t d = 0; d < q->D; d++) norm += (double)q->codebook[m * q->D + d] * q->codebook[m * q->D + d];
        norm = normalized ? fmax(sqrt(norm), 1e-12) : 1;
        for (int64_t d = 0; d < q->D; d++) t[d * q->M + m] = q->codebook[m * q->D + d] / norm;
    }
    return t;
}

static inline double norm_of(const float *x, int64_t D)
{
    double squares = 0;
    for (int64_t d = 0; d < D; d++) squares += (double)x[d] * x[d];
    return fmax(sqrt(squares), 1e-12);
}

/* Computes out (rows,M) = a (rows,D) codes (D,M). */
static inline void rows_times_codes(double *out, const double *a, int rows, const double *codes, int64_t D, int64_t M)
{
    memset(out, 0, sizeof(double) * (size_t)(rows * M));
    for (int64_t first = 0; first < M; first += STRIP) {
        const int64_t end = first + STRIP < M ? first + STRIP : M;
        for (int r = 0; r < rows; r++)
            for (int64_t d = 0; d < D; d++) {
                const double x = a[r * D + d];
                for (int64_t m = first; m < end; m++) out[r * M + m] += x * codes[d * M + m];
            }
    }
}

/* Computes out (rows,D) = p (rows,M) codes (D,M)'. */
static inline void mix_codes(double *out, const double *p, int rows, const double *codes, int64_t D, int64_t M)
{
    memset(out, 0, sizeof(double) * (size_t)(rows * D));
    for (int64_t first = 0; first < M; first += STRIP) {
        const int64_t end = first + STRIP < M ? first + STRIP : M;
        for (int r = 0; r < rows; r++)
            for (int64_t d = 0; d < D; d++) {
                double sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t m = first; m < end; m++) sum += p[r * M + m] * codes[d * M + m];
                out[r * D + d] += sum;
            }
    }
}

/* Computes rows of z, normalized, over tau, and their logits. */
static inline void block_logits(const problem *q, int64_t first, int rows, const double *hat, double tau, double *a,
                                double *l)
{
    for (int r = 0; r < rows; r++) {
        const float *z = q->z + (first + r) * q->D;
        const double norm = norm_of(z, q->D);
        for (int64_t d = 0; d < q->D; d++) a[r * q->D + d] = z[d] / norm / tau;
    }
    rows_times_codes(l, a, rows, hat, q->D, q->M);
}

static inline double log_sum_exp(const double *l, int64_t M)
{
    double top = -INFINITY, sum = 0;
    for (int64_t m = 0; m < M; m++) top = fmax(top, l[m]);
    for (int64_t m = 0; m < M; m++) sum += exp(l[m] - top);
    return top + log(sum);
}

/* Computes u = log pi + g of row n, and code, where the largest is. Without noise u = log pi. Returns its
 * log-sum-exp. */
static inline double noisy_row(const problem *q, int64_t n, const double *l, double lse, double *u, int32_t *code)
{
    *code = 0;
    for (int64_t m = 0; m < q->M; m++) {
        u[m] = l[m] - lse;
        if (q->sampler != SOFTMAX) {
            vx_philox4 draw = vx_philox(q->seed, q->stream, vx_gumbel_block((uint64_t)n, (uint64_t)m, (uint64_t)q->M));
            u[m] -= log(-log((double)vx_unit(draw.word[vx_gumbel_word((uint64_t)m)])));
        }
        if (u[m] > u[*code]) *code = (int32_t)m;
    }
    return q->sampler == SOFTMAX ? 0 : log_sum_exp(u, q->M);
}

/* Puts (key, row) into a descending list of K, equal keys by row. */
static inline void insert_neighbour(double *keys, int32_t *rows, int64_t K, double key, int64_t row)
{
    int64_t j = K;
    while (j > 0 && (key > keys[j - 1] || (key == keys[j - 1] && row < rows[j - 1]))) j--;
    if (j == K) return;
    memmove(keys + j + 1, keys + j, sizeof(double) * (size_t)(K - 1 - j));
    memmove(rows + j + 1, rows + j, sizeof(int32_t) * (size_t)(K - 1 - j));
    keys[j] = key, rows[j] = (int32_t)row;
}

static inline double neighbour_key_of(const problem *q, double l, double lse, double sumsq)
{
    return q->regularizer == REG_KNN_CE ? l - lse : 2 * exp(l - lse) - sumsq;
}

/* Fills in everything of s up to reg. */
static inline void reference_forward(const problem *q, solution *s)
{
    const int64_t N = q->N, D = q->D, M = q->M, K = q->K;
    const double tau = exp((double)*q->log_tau);
    double *hat = transposed_codes(q, 1), *raw = transposed_codes(q, 0);
    for (int64_t j = 0; j < M * K; j++) s->key[j] = -INFINITY, s->near[j] = INT32_MAX;
#pragma omp parallel
    {
        double *a = take(ROWS * D, sizeof(double)), *l = take(ROWS * M, sizeof(double)),
               *p = take(ROWS * M, sizeof(double));
        double *mean = take(M, sizeof(double)), *keys = take(M * K, sizeof(double));
        int32_t *rows_of = take(M * K, sizeof(int32_t));
        for (int64_t j = 0; j < M * K; j++) keys[j] = -INFINITY, rows_of[j] = INT32_MAX;
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < N; first += ROWS) {
            const int rows = (int)(N - first < ROWS ? N - first : ROWS);
            block_logits(q, first, rows, hat, tau, a, l);
            for (int r = 0; r < rows; r++) {
                const int64_t n = first + r;
                double *pi = p + r * M, *u = pi, sumsq = 0;
                s->lse[n] = log_sum_exp(l + r * M, M);
                for (int64_t m = 0; m < M; m++) {
                    pi[m] = exp(l[r * M + m] - s->lse[n]);
                    mean[m] += pi[m];
                    sumsq += pi[m] * pi[m];
                }
                s->sumsq[n] = sumsq;
                for (int64_t m = 0; K && m < M; m++) {
                    double key = neighbour_key_of(q, l[r * M + m], s->lse[n], sumsq);
                    if (key >= keys[m * K + K - 1]) insert_neighbour(keys + m * K, rows_of + m * K, K, key, n);
                }
                double lse = noisy_row(q, n, l + r * M, s->lse[n], u, s->codes + n);
                for (int64_t m = 0; m < M; m++) u[m] = q->sampler == HARD_GUMBEL ? m == s->codes[n] : exp(u[m] - lse);
            }
            mix_codes(s->y + first * D, p, rows, raw, D, M);
        }
#pragma omp critical
        {
            for (int64_t m = 0; m < M; m++) s->mean_pi[m] += mean[m] / (double)N;
            for (int64_t j = 0; j < M * K; j++)
                insert_neighbour(s->key + j / K * K, s->near + j / K * K, K, keys[j], rows_of[j]);
        }
        free(a), free(l), free(p), free(mean), free(keys), free(rows_of);
    }
    double sum = 0;
    for (int64_t j = 0; j < M * K; j++) sum += q->regularizer == REG_KNN_CE ? -s->key[j] : 1 - s->key[j];
    s->reg = K ? sum / (double)(M * K) : 0;
    if (q->regularizer == REG_PPL) {
        double entropy = 0;
        for (int64_t m = 0; m < M; m++) entropy -= s->mean_pi[m] > 0 ? s->mean_pi[m] * log(s->mean_pi[m]) : 0;
        s->reg = 1 - exp(entropy) / (double)M;
    }
    free(hat), free(raw);
}

/* Computes dz, dcodebook and dlog_tau, after reference_forward(); `near` (M,K) in the place of the solution's own
 * neighbours, so that a near tie that was decided otherwise counts once, as a neighbour, and not as an error of
 * gradients as well. */
static inline void reference_backward(const problem *q, solution *s, const int32_t *near)
{
    const int64_t N = q->N, D = q->D, M = q->M, K = q->K;
    const double tau = exp((double)*q->log_tau), c = K ? 1 / (double)(M * K) : 0;
    const int l2 = q->regularizer == REG_KNN_L2;
    double *hat = transposed_codes(q, 1), *raw = transposed_codes(q, 0);
    double *dhat = take(D * M, sizeof(double)), *draw = take(D * M, sizeof(double)), *b = take(M, sizeof(double));
    if (q->regularizer == REG_PPL) {
        double entropy = 0;
        for (int64_t m = 0; m < M; m++) entropy -= s->mean_pi[m] > 0 ? s->mean_pi[m] * log(s->mean_pi[m]) : 0;
        for (int64_t m = 0; m < M; m++)
            b[m] = s->mean_pi[m] > 0 ? exp(entropy) / (double)(N * M) * (1 + log(s->mean_pi[m])) : 0;
    }
    /* the pairs of every row: start[n] .. start[n + 1] - 1 of `vertex` */
    int64_t *start = take(N + 2, sizeof(int64_t));
    int32_t *vertex = take(M * K, sizeof(int32_t));
    for (int64_t j = 0; j < M * K; j++) start[near[j] + 2]++;
    for (int64_t n = 0; n < N; n++) start[n + 2] += start[n + 1];
    for (int64_t j = 0; j < M * K; j++) vertex[start[near[j] + 1]++] = (int32_t)(j / K);

    double dlog_tau = 0;
#pragma omp parallel reduction(+ : dlog_tau)
    {
        double *a = take(ROWS * D, sizeof(double)), *dy = take(ROWS * D, sizeof(double)),
               *dz = take(ROWS * D, sizeof(double));
        double *l = take(ROWS * M, sizeof(double)), *p = take(ROWS * M, sizeof(double)),
               *x = take(ROWS * M, sizeof(double));
        double *my_dhat = take(D * M, sizeof(double)), *my_draw = take(D * M, sizeof(double));
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < N; first += ROWS) {
            const int rows = (int)(N - first < ROWS ? N - first : ROWS);
            block_logits(q, first, rows, hat, tau, a, l);
            for (int64_t i = 0; i < rows * D; i++) dy[i] = q->dy[first * D + i];
            rows_times_codes(x, dy, rows, raw, D, M); /* dL/dp */
            for (int r = 0; r < rows; r++) {
                const int64_t n = first + r, count = start[n + 1] - start[n];
                const double lse = s->lse[n];
                double *lr = l + r * M, *pr = p + r * M, *xr = x + r * M, inner = 0, pairs = 0, ppl = 0, of_logits = 0;
                int32_t code;
                double noisy = noisy_row(q, n, lr, lse, pr, &code);
                for (int64_t m = 0; m < M; m++) {
                    pr[m] = exp(pr[m] - noisy);
                    inner += pr[m] * xr[m];
                }
                for (int64_t j = start[n]; j < start[n + 1]; j++) pairs += exp(lr[vertex[j]] - lse);
                for (int64_t m = 0; q->regularizer == REG_PPL && m < M; m++) ppl += b[m] * exp(lr[m] - lse);
                for (int64_t m = 0; m < M; m++) {
                    const double pi = exp(lr[m] - lse);
                    xr[m] = pr[m] * (xr[m] - inner) + pi * (b[m] - ppl);
                    if (l2) xr[m] += 2 * c * pi * ((double)count * (pi - s->sumsq[n]) + pairs);
                    else xr[m] += c * (double)count * pi;
                }
                for (int64_t j = start[n]; j < start[n + 1]; j++)
                    xr[vertex[j]] -= l2 ? 2 * c * exp(lr[vertex[j]] - lse) : c;
                for (int64_t m = 0; m < M; m++) of_logits += xr[m] * (lr[m] - lse); /* sum over m of x is 0 */
                dlog_tau -= of_logits;
                if (q->sampler == HARD_GUMBEL)
                    for (int64_t m = 0; m < M; m++) pr[m] = m == code;
            }
            mix_codes(dz, x, rows, hat, D, M);
            for (int r = 0; r < rows; r++) {
                const float *z = q->z + (first + r) * D;
                const double norm = norm_of(z, D);
                double along = 0;
                for (int64_t d = 0; d < D; d++) along += dz[r * D + d] * z[d] / norm;
                for (int64_t d = 0; d < D; d++)
                    s->dz[(first + r) * D + d] = (dz[r * D + d] - along * z[d] / norm) / (norm * tau);
            }
            for (int64_t from = 0; from < M; from += STRIP) {
                const int64_t end = from + STRIP < M ? from + STRIP : M;
                for (int r = 0; r < rows; r++)
                    for (int64_t d = 0; d < D; d++) {
                        const double za = a[r * D + d], dya = dy[r * D + d];
                        for (int64_t m = from; m < end; m++) my_dhat[d * M + m] += za * x[r * M + m];
                        for (int64_t m = from; m < end; m++) my_draw[d * M + m] += dya * p[r * M + m];
                    }
            }
        }
#pragma omp critical
        for (int64_t i = 0; i < D * M; i++) dhat[i] += my_dhat[i], draw[i] += my_draw[i];
        free(a), free(dy), free(dz), free(l), free(p), free(x), free(my_dhat), free(my_draw);
    }
    s->dlog_tau = dlog_tau;
    for (int64_t m = 0; m < M; m++) {
        const double norm = norm_of(q->codebook + m * D, D);
        double along = 0;
        for (int64_t d = 0; d < D; d++) along += dhat[d * M + m] * hat[d * M + m];
        for (int64_t d = 0; d < D; d++)
            s->dcodebook[m * D + d] = (dhat[d * M + m] - along * hat[d * M + m]) / norm + draw[d * M + m];
    }
    free(hat), free(raw), free(dhat), free(draw), free(b), free(start), free(vertex);
}

/* Counts how many of the codes (N) are not the nearest, by Euclidean distance or (cosine) by angle, and by how much the
 * worst of them is farther than the nearest, as a part of |z| |q| + |q|^2 / 2: near 0 where they are near ties. */
static inline int64_t assignments_differ(const problem *q, const int32_t *codes, int cosine, double *gap)
{
    const int64_t N = q->N, D = q->D, M = q->M;
    double *book = transposed_codes(q, cosine), *offset = take(M, sizeof(double)), worst = 0;
    int64_t count = 0;
    for (int64_t d = 0; !cosine && d < D; d++)
        for (int64_t m = 0; m < M; m++) offset[m] -= book[d * M + m] * book[d * M + m] / 2;
#pragma omp parallel reduction(+ : count) reduction(max : worst)
    {
        double *a = take(ROWS * D, sizeof(double)), *score = take(ROWS * M, sizeof(double));
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < N; first += ROWS) {
            const int rows = (int)(N - first < ROWS ? N - first : ROWS);
            for (int64_t i = 0; i < rows * D; i++) a[i] = q->z[first * D + i];
            rows_times_codes(score, a, rows, book, D, M);
            for (int r = 0; r < rows; r++) {
                int64_t best = 0, given = codes[first + r];
                for (int64_t m = 0; m < M; m++) score[r * M + m] += offset[m];
                for (int64_t m = 1; m < M; m++)
                    if (score[r * M + m] > score[r * M + best]) best = m;
                if (best == given) continue;
                const double length = norm_of(q->z + (first + r) * D, D),
                             code = cosine ? 1 : norm_of(q->codebook + best * D, D);
                count++;
                worst = fmax(worst, (score[r * M + best] - score[r * M + given]) /
                                        (length * code + (cosine ? 0 : code * code / 2)));
            }
        }
        free(a), free(score);
    }
    free(book), free(offset);
    *gap = worst;
    return count;
}

/* Returns |x - y| / |y|. */
static inline double relative_error(const float *x, const double *y, int64_t count)
{
    double difference = 0, size = 0;
    for (int64_t i = 0; i < count; i++) {
        difference += ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
        size += y[i] * y[i];
    }
    return size > 0 ? sqrt(difference / size) : sqrt(difference);
}

/* Counts how many of the (M,K) neighbours differ from the solution's, and the largest difference of their keys, rank by
 * rank: near 0 where they are near ties. */
static inline int64_t neighbours_differ(const problem *q, const solution *s, const int32_t *near, double *gap)
{
    const double tau = exp((double)*q->log_tau);
    int64_t count = 0;
    *gap = 0;
    for (int64_t j = 0; j < q->M * q->K; j++) {
        const int64_t m = j / q->K, n = near[j];
        if (n == s->near[j]) continue;
        int found = 0; /* elsewhere in the list: two near ties in the other order */
        for (int64_t k = 0; k < q->K; k++) found |= s->near[m * q->K + k] == n;
        count += !found;
        const float *z = q->z + n * q->D, *code = q->codebook + m * q->D;
        double l = 0;
        for (int64_t d = 0; d < q->D; d++) l += (double)z[d] * code[d];
        l /= norm_of(z, q->D) * norm_of(code, q->D) * tau;
        *gap = fmax(*gap, fabs(neighbour_key_of(q, l, s->lse[n], s->sumsq[n]) - s->key[j]));
    }
    return count;
}

#endif
