/* dropout.cu: dropout on CUDA: the bits of dropout.c, which says how they are made. A thread makes the four words of a
 * Philox block, for elements 16 apart. */
#include "cuda/cuda.cuh"
#include "shared/dropout.h"

enum { BLOCK = 256 };

VX_KERNEL dropout_kernel(float *y, const float *x, int64_t n, vx_random random, dropout_rule d)
{
    const vx_draw draw = vx_draw_now(random);
    for (int64_t i = vx_first(); i < vx_ceil_div(n, 64) * 16; i += vx_step()) {
        const vx_philox4 r = vx_philox(draw.seed, draw.stream, (uint64_t)i);
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const int64_t at = i / 16 * 64 + w * 16 + i % 16;
            if (at < n) y[at] = !d.all && r.word[w] >= d.threshold ? x[at] * d.scale : 0;
        }
    }
}

/* Computes y (...) from x (...). */
int vx_cuda_dropout(vx_tensor *y, vx_tensor *x, uint64_t seed, uint64_t stream, float p)
{
    const vx_random random = vx_draws(seed, stream);
    if (!x->numel) return VX_OK;
    VX_LAUNCH(dropout_kernel, vx_grid(x->numel, 4 * BLOCK), BLOCK, 0, vx_f32(y), vx_f32(x), x->numel, random,
              dropout_rule_of(p));
    return vx_status();
}
