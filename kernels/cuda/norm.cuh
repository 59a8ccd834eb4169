/* norm.cuh: what sepconv2d.cu shares with group norm: the activations, and the statistics of images. */
#ifndef VX_NORM_CUH
#define VX_NORM_CUH

#include "cuda.cuh"
#include "shared/constants.h"
#include "shared/special.h"

/* Queues the mean and rstd (B,G) of x (B,S,C), S > 0: the same bits as the op group_norm. Takes its scratch. */
void vx_group_statistics(float *mean, float *rstd, const float *x, int64_t B, int64_t S, int64_t C, int64_t G,
                         float eps);
void vx_group_statistics(float *mean, float *rstd, const vx_bf16 *x, int64_t B, int64_t S, int64_t C, int64_t G,
                         float eps);

/* -- Activations --------------------------------------------------------------------------------------------------- */

/* Returns 1 / (1 + e^-z). */
VX_DEVICE float sigmoid(float z) { return 1.0f / (1.0f + exp2f(fminf(126.0f, z * -(float)LOG2E))); }

/* Returns the distribution function of a standard normal at z, and *bell = e^(-z^2/2), as norm.h does. */
VX_DEVICE float normal_cdf(float z, float *bell)
{
    const float a = fminf(14.0f, fabsf(z)), t = 1.0f / (1.0f + 0.26f * a);
    *bell = exp2f(a * a * -(float)(LOG2E / 2));
    const float tail = *bell * SPECIAL_NORMAL_TAIL(t);
    return z < 0.0f ? tail : 1.0f - tail;
}

/* Returns the activation of z, and its *slope there. act is a VX_ACT, best a constant. */
VX_DEVICE float activate(int act, float z, float *slope)
{
    if (act == VX_ACT_SILU) {
        const float s = sigmoid(z), y = z * s;
        *slope = s + y * (1.0f - s);
        return y;
    }
    if (act == VX_ACT_GELU) {
        float bell;
        const float cdf = normal_cdf(z, &bell);
        *slope = cdf + z * 0.39894228040143268f * bell;
        return z * cdf;
    }
    *slope = 1.0f;
    return z;
}

#endif
