/* smooth_call.h: one call of smooth_forward or smooth_backward, checked, for the C and the CUDA kernels alike: what the
 * caller asked for, the sizes that follow from it, and the constants that both must agree on. The mathematics is in
 * smooth.c and smooth_backward.c.
 *
 * Nothing here reads a tensor's numbers, which may lie on a device: NaN, Inf, tau's range and indices are each
 * backend's to check.
 */
#ifndef VX_SMOOTH_CALL_H
#define VX_SMOOTH_CALL_H

#include <string.h>

#include "shared/checks.h"
#include "shared/constants.h"
#include "shared/common.h"

/* The M codes of a group are cut into panels of 64, the last one filled up with codes that are not there. The Gumbel
 * noise is laid out by panels too (core/rng.h). */
enum { PANEL = 64 };

#define PADDING (-1e30f) /* logit of a code that is not there: its power is 0 */

/* Logits are kept relative to a reference of their row, and not summed where they exceed it by more: 2^50 squared,
 * summed over 2^20 codes, is still a float32. */
#define LIMIT 50.0f

/* Where the Gumbel noise of a call comes from. RATES: 1/E with E = -log u, so that p is proportional to pi / E: one
 * logarithm and no second power. LOGS: -log2 E = g log2(e), for another temperature than 1 or noise that was handed
 * in. */
enum { NOISE_NONE = 0, NOISE_RATES, NOISE_LOGS };

/* One call. Letters as in core/ops.def. */
typedef struct smooth_call {
    const char *op; /* smooth_forward or smooth_backward: what errors name */
    int64_t N, G, D, M;
    int64_t S, K, shards; /* vertices and neighbours; 0, 0 and 1 unless the regularizer is one of the two KNN */
    int64_t panels, Mp;   /* ceil(M / 64), and their codes: 64 panels */
    int sampler, regularizer, noise_kind;
    float gumbel_tau; /* 1 under softmax */
    uint64_t seed, stream;
    const float *z, *codebook, *noise; /* (N,G,D), (G,M,D), (N,G,M) or NULL: drawn */
    const int32_t *vertices;           /* (G,S); NULL: all codes */
} smooth_call;

/* Says whether the regularizer is one of the two KNN. */
VX_INLINE bool smooth_is_knn(int regularizer) { return regularizer == VX_REG_KNN_CE || regularizer == VX_REG_KNN_L2; }

/* Says whether the logits may be divided by tau. */
VX_INLINE bool smooth_tau_fits(double tau) { return tau >= 1e-7 && tau <= 1e7; }

/* Returns where shard h begins, in rows of N; it ends where shard h + 1 begins. */
VX_INLINE int64_t shard_start(int64_t N, int64_t shards, int64_t h) { return h * N / shards; }

/* Checks what a KNN regularizer asks for: S vertices, K neighbours, and enough rows in the smallest shard. */
static inline int check_neighbours(const smooth_call *c, const vx_tensor *near)
{
    if (!near) return vx_fail(VX_EINVAL, "%s: a KNN regularizer needs near (G,S,K)", c->op);
    const long long S = c->S, K = c->K, shards = c->shards, each = K / shards, least = c->N / shards;
    if (!c->vertices && S != c->M)
        return vx_fail(VX_EINVAL, "%s: near has %lld vertices, the codebook %lld codes, and no vertices are given",
                       c->op, S, (long long)c->M);
    if (S < 1 || K < 1)
        return vx_fail(VX_EINVAL, "%s: near must have vertices and neighbours, not (%lld,%lld)", c->op, S, K);
    if (K % shards)
        return vx_fail(VX_EINVAL, "%s: K = %lld neighbours cannot be shared by %lld shards", c->op, K, shards);
    if (each > least && shards == 1)
        return vx_fail(VX_EINVAL, "%s: K = %lld neighbours asked of %lld rows", c->op, each, least);
    if (each > least)
        return vx_fail(VX_EINVAL, "%s: K = %lld neighbours asked of %lld rows, in the smallest of %lld shards", c->op,
                       each, least, shards);
    return VX_OK;
}

/* Fills c from the arguments that both directions have, and checks what the contracts in core/ops.def do not say. */
static inline int smooth_call_check(smooth_call *c, const char *op, const vx_tensor *z, const vx_tensor *codebook,
                                    const vx_tensor *noise, const vx_tensor *vertices, const vx_tensor *near,
                                    const vx_tensor *mean_pi, int sampler, int regularizer, float gumbel_tau,
                                    int shards, uint64_t seed, uint64_t stream)
{
    const bool knn = smooth_is_knn(regularizer), noisy = sampler != VX_SOFTMAX;
    memset(c, 0, sizeof *c);
    c->op = op;
    c->N = z->shape[0], c->G = z->shape[1], c->D = z->shape[2], c->M = codebook->shape[1];
    c->S = knn && near ? near->shape[1] : 0;
    c->K = knn && near ? near->shape[2] : 0;
    c->shards = knn ? shards : 1;
    c->panels = vx_ceil_div(c->M, PANEL);
    c->Mp = c->panels * PANEL;
    c->sampler = sampler, c->regularizer = regularizer;
    c->noise = noisy ? vx_f32(noise) : 0;
    c->noise_kind = !noisy ? NOISE_NONE : c->noise || gumbel_tau != 1 ? NOISE_LOGS : NOISE_RATES;
    c->gumbel_tau = noisy ? gumbel_tau : 1;
    c->seed = seed, c->stream = stream;
    c->z = vx_f32(z), c->codebook = vx_f32(codebook);
    c->vertices = knn ? vx_i32(vertices) : 0;
    if (check_rows(op, c->N)) return VX_EINVAL;
    if (regularizer == VX_REG_PPL && !mean_pi)
        return vx_fail(VX_EINVAL, "%s: the ppl regularizer needs mean_pi (G,M)", op);
    return knn ? check_neighbours(c, near) : VX_OK;
}

/* Checks that the gradient of the hard Gumbel sampler is given the mixture that the forward pass did not return. */
static inline int check_soft(const smooth_call *c, const vx_tensor *soft)
{
    if (c->sampler == VX_HARD_GUMBEL && !soft)
        return vx_fail(VX_EINVAL, "%s: the hard Gumbel sampler's gradient needs soft (N,G,D)", c->op);
    return VX_OK;
}

#endif
