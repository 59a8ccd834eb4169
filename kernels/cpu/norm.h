/* norm.h: what sepconv2d.c shares with group norm: the statistics of an image, and the activations. */
#ifndef VX_NORM_H
#define VX_NORM_H

#include "body.h"
#include "cpu.h"
#include "shared/special.h"
#include "simd.h"

/* Computes mean and rstd (G) of x (S,C), f32 or bf16 from element `first` on, with the bits of the op group_norm;
 * VX_ENOMEM. */
int VX_CPU(group_statistics)(float *mean, float *rstd, body x, int64_t first, int64_t S, int64_t C, int64_t G,
                             float eps);

/* -- Activations --------------------------------------------------------------------------------------------------- */

/* Computes s[i] = 1 / (1 + e^-z[i]) to 1e-7 of 1. (Below z = -20 it loses relative accuracy, where z times it is 4e-8
 * and less.) */
VX_INLINE void sigmoids(const int count, vf *s, const vf *z)
{
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) s[i] = vf_min(vf_set1(126.0f), z[i] * -1.44269504088896341f);
    vf_exp2_many(count, s);
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) s[i] = vf_reciprocal(1.0f + s[i]);
}

/* Returns the distribution function of a standard normal, and bell = e^(-z^2/2). The tail does not cancel, and the
 * slope gets its density for nothing. */
static inline vf normal_cdf(vf z, vf *bell)
{
    const vf a = vf_min(vf_set1(14.0f), vf_abs(z)), t = vf_reciprocal(1.0f + 0.26f * a);
    *bell = vf_exp2(a * a * -0.72134752044448170f);
    const vf tail = *bell * SPECIAL_NORMAL_TAIL(t);
    return vf_select(z < 0.0f, tail, 1.0f - tail);
}

/* Replaces z[i] by its activation, and gives the slope there, for count (a constant, 4 at most) vectors. */
VX_INLINE void activate_many(const int count, int act, vf *z, vf *slope)
{
    if (act == VX_ACT_SILU) {
        sigmoids(count, slope, z);
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) {
            const vf s = slope[i];
            z[i] *= s;
            slope[i] = s + z[i] * (1.0f - s);
        }
    } else
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) {
            if (act == VX_ACT_GELU) {
                vf bell;
                const vf cdf = normal_cdf(z[i], &bell);
                slope[i] = cdf + z[i] * 0.39894228040143268f * bell;
                z[i] *= cdf;
            } else slope[i] = vf_set1(1);
        }
}

/* Returns the activation of z, and its slope there. */
VX_INLINE vf activate(int act, vf z, vf *slope)
{
    activate_many(1, act, &z, slope);
    return z;
}

#endif
