/* optim.c: adamw [1], one pass over all parameters.
 *
 * Memory traffic: reads p, m, v, g, writes p, m, v: 28 bytes a parameter and nothing else; the square root and the
 * division hide behind it. The threads share the elements of all tensors at once, as if they lay one behind the other:
 * most tensors of a network are too small to be worth a thread of their own.
 *
 * With b1, b2 for beta1, beta2, in the order torch.optim.AdamW computes it:
 *   p -= lr decay p                                      decoupled from the moments, hence the W
 *   m += (1 - b1) (g - m)        v = b2 v + (1 - b2) g^2
 *   p -= lr / (1 - b1^step) m / (sqrt(v) / sqrt(1 - b2^step) + eps)
 * The scalars are computed in double: in float32, 1 - b2^step would lose half its digits at the first steps.
 *
 * [1] Loshchilov and Hutter 2019, "Decoupled weight decay regularization"
 */
#include <omp.h>

#include "cpu/cpu.h"
#include "cpu/simd.h"

#define CHUNK 4096   /* a tensor is divided between threads at multiples of this: whole vectors, and pages of memory */
#define SERIAL 16384 /* below this many parameters a second thread costs more than it brings */

typedef struct factors {
    vf keep, m_new, v_old, v_new, rescale, eps, rate;
} factors;

/* Updates one vector of parameters and moments. */
static inline void update(const factors *f, vf *p, vf *m, vf *v, vf g)
{
    *m = *m + f->m_new * (g - *m);
    *v = f->v_old * *v + (f->v_new * g) * g;
    *p = f->keep * *p - (f->rate * *m) / (vf_sqrt(*v) * f->rescale + f->eps);
}

/* Updates elements i .. end - 1 of one tensor. The factors come by value: stores into p, m, v cannot change them. */
static void update_range(const factors f, float *p, float *m, float *v, const float *g, int64_t i, int64_t end)
{
    for (; i + VX_LANES <= end; i += VX_LANES) {
        vf a = vf_load(p + i), b = vf_load(m + i), c = vf_load(v + i);
        update(&f, &a, &b, &c, vf_load(g + i));
        vf_store(p + i, a), vf_store(m + i, b), vf_store(v + i, c);
    }
    int rest = (int)(end - i);
    if (rest > 0) {
        vf a = vf_load_n(p + i, rest), b = vf_load_n(m + i, rest), c = vf_load_n(v + i, rest);
        update(&f, &a, &b, &c, vf_load_n(g + i, rest));
        vf_store_n(p + i, a, rest), vf_store_n(m + i, b, rest), vf_store_n(v + i, c, rest);
    }
}

/* Returns where in a tensor of n elements one thread's share ends and the next one's begins: a multiple of CHUNK near
 * x, which may lie before or behind the tensor. */
static inline int64_t division(int64_t x, int64_t n) { return vx_max64(0, vx_min64(n, vx_ceil_div(x, CHUNK) * CHUNK)); }

/* Updates p[i], m[i], v[i] in place from the gradient g[i], with decay[i], for all i < count. step counts from 1. */
int VX_CPU(adamw)(vx_tensor *const *p, vx_tensor *const *m, vx_tensor *const *v, vx_tensor *const *g, int count,
                  const float *decay, float lr, float beta1, float beta2, float eps, int64_t step)
{
    double b1 = beta1, b2 = beta2;
    const factors all = {
        .m_new = vf_set1((float)(1.0 - b1)),
        .v_old = vf_set1(beta2),
        .v_new = vf_set1((float)(1.0 - b2)),
        .rescale = vf_set1((float)(1.0 / sqrt(1.0 - pow(b2, (double)step)))),
        .eps = vf_set1(eps),
        .rate = vf_set1((float)(lr / (1.0 - pow(b1, (double)step)))),
    };
    int64_t total = 0;
    for (int i = 0; i < count; i++) total += p[i]->numel;
#pragma omp parallel if (total >= SERIAL)
    {
        /* this thread's share, counted from the first element of tensor i */
        int64_t first = total * omp_get_thread_num() / omp_get_num_threads();
        int64_t end = total * (omp_get_thread_num() + 1) / omp_get_num_threads();
        factors f = all;
        for (int i = 0; i < count; i++) {
            int64_t n = p[i]->numel;
            f.keep = vf_set1((float)(1.0 - (double)lr * decay[i]));
            update_range(f, vx_f32(p[i]), vx_f32(m[i]), vx_f32(v[i]), vx_f32(g[i]), division(first, n),
                         division(end, n));
            first -= n, end -= n;
        }
    }
    return VX_OK;
}
