/* dropout.c: y = x / (1 - p), or 0 with probability p [Srivastava et al. 2014], so that the mean is kept.
 *
 * Whether an element stays is a function of (seed, stream, index) (core/rng.h): its word is at least p 2^32. The
 * gradient draws the same words again, and no mask is stored: 8 bytes of traffic an element, beside Philox's ten rounds
 * for four of them. Elements come in panels of 64, whose words a vector of consecutive blocks gives without a shuffle.
 */
#include "cpu/cpu.h"
#include "cpu/simd.h"
#include "shared/dropout.h"

enum {
    SERIAL = 4096, /* below this many elements a second thread costs more than it brings */
    PANEL = 64,    /* elements of sixteen blocks */
    PANELS = 64,   /* a thread takes at once */
};

/* Drops elements of one panel of n. */
VX_INLINE void panel(float *y, const float *x, int64_t first, int64_t n, uint64_t seed, uint64_t stream,
                     const dropout_rule *d)
{
    for (int i = 0; i < 16; i += VX_LANES) {
        vu word[4];
        vu_philox(seed, stream, vx_gumbel_block(0, (uint64_t)(first + i), 0), word);
        for (int w = 0; w < 4; w++) {
            const int64_t at = 16 * w + i;
            const int lanes = (int)vx_max64(vx_min64(n - at, VX_LANES), 0);
            if (!lanes) break;
            const vf kept = vf_load_upto(x + at, lanes) * d->scale;
            vf_store_upto(y + at, vf_select((vi)(word[w] >= d->threshold), kept, vf_zero()), lanes);
        }
    }
}

/* Computes y (...) from x (...). */
int VX_CPU(dropout)(vx_tensor *y, vx_tensor *x, uint64_t seed, uint64_t stream, float p)
{
    const int64_t n = x->numel;
    const dropout_rule d = dropout_rule_of(p);
    if (d.all) {
        memset(y->data, 0, sizeof(float) * (size_t)n);
        return VX_OK;
    }
#pragma omp parallel for schedule(static) if (n >= SERIAL)
    for (int64_t chunk = 0; chunk < n; chunk += PANELS * PANEL)
        for (int64_t i = chunk; i < vx_min64(chunk + PANELS * PANEL, n); i += PANEL)
            panel(vx_f32(y) + i, vx_f32(x) + i, i, vx_min64(PANEL, n - i), seed, stream, &d);
    return VX_OK;
}
