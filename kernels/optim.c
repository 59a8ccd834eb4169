/* optim.c: adamw [1], one pass over the parameters.
 *
 * Memory traffic: reads p, m, v, g, writes p, m, v: 28 bytes a parameter and nothing else; the square root and the division
 * hide behind it.
 *
 * With b1, b2 for beta1, beta2, in the order torch.optim.AdamW computes it:
 *   p -= lr decay p                                      decoupled from the moments, hence the W
 *   m += (1 - b1) (g - m)        v = b2 v + (1 - b2) g^2
 *   p -= lr / (1 - b1^step) m / (sqrt(v) / sqrt(1 - b2^step) + eps)
 * The scalars are computed in double: in float32, 1 - b2^step would lose half its digits at the first steps.
 *
 * [1] Loshchilov and Hutter 2019, "Decoupled weight decay regularization"
 */
#include "cpu.h"
#include "vec.h"

#define CHUNK 4096   /* parameters a thread takes at once */
#define SERIAL 16384 /* below this many parameters a second thread costs more than it brings */

typedef struct factors {
    vf keep, m_new, v_old, v_new, rescale, eps, rate;
} factors;

static inline void update(const factors *f, vf *p, vf *m, vf *v, vf g)
{
    *m = *m + f->m_new * (g - *m);
    *v = f->v_old * *v + (f->v_new * g) * g;
    *p = f->keep * *p - (f->rate * *m) / (vf_sqrt(*v) * f->rescale + f->eps);
}

/* p, m, v updated in place from the gradient g; step counts from 1. */
int VX_CPU(adamw)(vx_tensor *p, vx_tensor *m, vx_tensor *v, vx_tensor *g, float lr, float beta1, float beta2, float eps,
                  float decay, int64_t step)
{
    double b1 = beta1, b2 = beta2;
    const factors f = {
        .keep = vf_set1((float)(1.0 - (double)lr * decay)),
        .m_new = vf_set1((float)(1.0 - b1)),
        .v_old = vf_set1(beta2),
        .v_new = vf_set1((float)(1.0 - b2)),
        .rescale = vf_set1((float)(1.0 / sqrt(1.0 - pow(b2, (double)step)))),
        .eps = vf_set1(eps),
        .rate = vf_set1((float)(lr / (1.0 - pow(b1, (double)step)))),
    };
    float *pp = vx_f32(p), *pm = vx_f32(m), *pv = vx_f32(v);
    const float *pg = vx_f32(g);
    int64_t n = p->numel;
#pragma omp parallel for schedule(static) if (n >= SERIAL)
    for (int64_t first = 0; first < n; first += CHUNK) {
        int64_t end = vx_min64(first + CHUNK, n), i = first;
        for (; i + VX_LANES <= end; i += VX_LANES) {
            vf a = vf_load(pp + i), b = vf_load(pm + i), c = vf_load(pv + i);
            update(&f, &a, &b, &c, vf_load(pg + i));
            vf_store(pp + i, a), vf_store(pm + i, b), vf_store(pv + i, c);
        }
        int rest = (int)(end - i);
        if (rest) {
            vf a = vf_load_n(pp + i, rest), b = vf_load_n(pm + i, rest), c = vf_load_n(pv + i, rest);
            update(&f, &a, &b, &c, vf_load_n(pg + i, rest));
            vf_store_n(pp + i, a, rest), vf_store_n(pm + i, b, rest), vf_store_n(pv + i, c, rest);
        }
    }
    return VX_OK;
}
