/* gumbel.cuh: the Gumbel noise on CUDA, drawn again wherever it is needed; the formula is in gumbel.h, the layout of
 * the random numbers in core/rng.h. */
#ifndef VX_GUMBEL_CUH
#define VX_GUMBEL_CUH

#include "cuda/cuda.cuh"

/* Draws rate[j] = 1/E of code u + 16 j of a panel, u < 16, for row r = n G + g. */
VX_DEVICE void gumbel_rates(vx_draw draw, int64_t r, int64_t panels, int64_t panel, int u, float rate[4])
{
    const vx_philox4 random = vx_philox(draw.seed, draw.stream, (uint64_t)(r * panels + panel) * 16 + (uint64_t)u);
    const int32_t base = 0x3f3504f3; /* sqrt(1/2) */
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float uniform = (float)(random.word[j] >> 9) + 0.5f; /* times 2^23, exactly */
        const int32_t bits = (int32_t)__float_as_uint(uniform) - (base + (23 << 23));
        const float e = (float)(bits >> 23) * -0.69314718f,
                    x = __uint_as_float((uint32_t)((bits & 0x7fffff) + base)) - 1.0f;
        const float n = ((x * 0.18256297f + 1.0f) * x + 1.0f) * x;
        const float d = ((x * 0.049616249f + 0.5992325f) * x + 1.5f) * x + 1.0f;
        rate[j] = d / (e * d - n);
    }
}

#endif
