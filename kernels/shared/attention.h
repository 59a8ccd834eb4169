/* attention.h: what attention in C and in CUDA must agree on: the problem's sizes, and which probabilities dropout
 * keeps. */
#ifndef VX_ATTENTION_H
#define VX_ATTENTION_H

#include <math.h>

#include "core/tensor.h"
#include "common.h"
#include "constants.h"

enum { ATTENTION_DRAWS = 8 /* queries that share a block of random numbers (core/rng.h) */ };

typedef struct attention_sizes {
    int64_t B, T, H, D;
    int64_t pitch;     /* floats from one time step of a head to the next */
    float scale;       /* of the scores: 1 / sqrt(D) */
    float scale2;      /* the same for scores to the base 2 */
    uint32_t kept;     /* of 65,536 numbers of 16 bits: those below it keep a probability */
    float kept_factor; /* by which the kept ones grow */
} attention_sizes;

static inline attention_sizes attention_sizes_of(const vx_tensor *q, float dropout)
{
    attention_sizes a;
    a.B = q->shape[0], a.T = q->shape[1], a.H = q->shape[2], a.D = q->shape[3];
    a.pitch = a.H * a.D;
    a.scale = (float)(1 / sqrt((double)a.D));
    a.scale2 = (float)(LOG2E / sqrt((double)a.D));
    a.kept = (uint32_t)lround((1 - (double)dropout) * 65536);
    a.kept_factor = a.kept ? (float)(65536.0 / a.kept) : 0;
    return a;
}

/* Returns the offset of head h of batch row b at time 0 in a (B,T,H,D) tensor. */
VX_INLINE int64_t attention_head(const attention_sizes *a, int64_t b, int64_t h)
{
    return b * a->T * a->pitch + h * a->D;
}

#endif
