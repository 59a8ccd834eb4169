/* norm.h: what separable.c shares with group norm: the statistics of an image, and the activations. */
#ifndef VX_NORM_H
#define VX_NORM_H

#include "cpu.h"
#include "special.h"
#include "vec.h"

/* mean and rstd (G) of x (S,C); VX_ENOMEM. The same bits as the op group_norm. */
int VX_CPU(group_statistics)(float *mean, float *rstd, const float *x, int64_t S, int64_t C, int64_t G, float eps);

/* -- Activations ------------------------------------------------------------------------------------------------------------- */

/* 1 / (1 + e^-z) to 1e-7 of 1. (Below z = -20 it loses relative accuracy, where z times it is 4e-8 and less.) */
static inline __attribute__((always_inline)) vf sigmoid(vf z)
{
    vf power = vf_min(vf_set1(126.0f), z * -1.44269504088896341f);
    vf_exp2_many(1, &power);
    return vf_reciprocal(1.0f + power);
}

/* Distribution function of a standard normal, and bell = e^(-z^2/2). A tail without
 * cancellation, and the slope gets its density for nothing. */
static inline vf normal_cdf(vf z, vf *bell)
{
    const vf a = vf_min(vf_set1(14.0f), vf_abs(z)), t = vf_reciprocal(1.0f + 0.26f * a);
    *bell = vf_exp2(a * a * -0.72134752044448170f);
    const vf tail = *bell * SPECIAL_NORMAL_TAIL(t);
    return vf_select(z < 0.0f, tail, 1.0f - tail);
}

/* The activation of z, and its slope there. */
static inline __attribute__((always_inline)) vf activate(int act, vf z, vf *slope)
{
    if (act == VX_ACT_SILU) {
        const vf s = sigmoid(z), y = z * s;
        *slope = s + y * (1.0f - s);
        return y;
    }
    if (act == VX_ACT_GELU) {
        vf bell;
        const vf cdf = normal_cdf(z, &bell);
        *slope = cdf + z * 0.39894228040143268f * bell;
        return z * cdf;
    }
    *slope = vf_set1(1);
    return z;
}

#endif
