/* optim.cu: adamw on CUDA; see optim.c for the formulas and their order.
 *
 * Memory traffic: reads p, m, v, g, writes p, m, v: 28 bytes a parameter and nothing else.
 */
#include "cuda.cuh"

enum { BLOCK = 256 };

typedef struct factors {
    float keep, m_new, v_old, v_new, rescale, eps, rate;
} factors;

VX_DEVICE void update(const factors &f, float &p, float &m, float &v, float g)
{
    m = m + f.m_new * (g - m);
    v = f.v_old * v + (f.v_new * g) * g;
    p = f.keep * p - (f.rate * m) / (sqrtf(v) * f.rescale + f.eps);
}

/* Four parameters a thread; the last ones singly. */
VX_KERNEL VX_HOT adamw_kernel(float4 *p, float4 *m, float4 *v, const float4 *g, int64_t n, factors given, const factors *anew)
{
    const factors f = anew ? *anew : given;
    for (int64_t i = vx_first(); i < n / 4; i += vx_step()) {
        float4 a = p[i], b = m[i], c = v[i], d = g[i];
        update(f, a.x, b.x, c.x, d.x);
        update(f, a.y, b.y, c.y, d.y);
        update(f, a.z, b.z, c.z, d.z);
        update(f, a.w, b.w, c.w, d.w);
        p[i] = a, m[i] = b, v[i] = c;
    }
    const int64_t i = n / 4 * 4 + vx_first();
    if (i < n) update(f, ((float *)p)[i], ((float *)m)[i], ((float *)v)[i], ((const float *)g)[i]);
}

/* The same for tensors that do not lie on 16 bytes: views into a larger one. */
VX_KERNEL adamw_unaligned_kernel(float *p, float *m, float *v, const float *g, int64_t n, factors given, const factors *anew)
{
    const factors f = anew ? *anew : given;
    for (int64_t i = vx_first(); i < n; i += vx_step()) update(f, p[i], m[i], v[i], g[i]);
}

typedef struct numbers {
    float lr, beta1, beta2, eps, decay, unused; /* unused: compared as bytes, so without a gap */
    int64_t step;
} numbers;

static factors factors_of(const numbers &a)
{
    const double b1 = a.beta1, b2 = a.beta2;
    factors f;
    f.keep = (float)(1.0 - (double)a.lr * a.decay);
    f.m_new = (float)(1.0 - b1);
    f.v_old = a.beta2;
    f.v_new = (float)(1.0 - b2);
    f.rescale = (float)(1.0 / sqrt(1.0 - pow(b2, (double)a.step)));
    f.eps = a.eps;
    f.rate = (float)(a.lr / (1.0 - pow(b1, (double)a.step)));
    return f;
}

/* lr / recorded_rate comes first: where they are equal, lr is the launch's rate to the bit. */
static void refresh(void *to, const void *given, const vx_launch *launch)
{
    numbers a = *(const numbers *)given;
    a.lr = (float)((double)a.lr / launch->recorded_rate * launch->rate);
    a.step += launch->steps;
    *(factors *)to = factors_of(a);
}

int vx_cuda_adamw(vx_tensor *p, vx_tensor *m, vx_tensor *v, vx_tensor *g, float lr, float beta1, float beta2, float eps, float decay,
                  int64_t step)
{
    const numbers given = {lr, beta1, beta2, eps, decay, 0, step};
    const factors f = factors_of(given);
    const int64_t n = p->numel;
    if (!n) return VX_OK;
    const factors *anew = (const factors *)vx_anew(refresh, &given, sizeof given, sizeof f);
    if (vx_aligned(p, 16) && vx_aligned(m, 16) && vx_aligned(v, 16) && vx_aligned(g, 16))
        VX_LAUNCH(adamw_kernel, vx_grid(n, 4 * BLOCK), BLOCK, 0, (float4 *)p->data, (float4 *)m->data, (float4 *)v->data,
                  (const float4 *)g->data, n, f, anew);
    else VX_LAUNCH(adamw_unaligned_kernel, vx_grid(n, BLOCK), BLOCK, 0, vx_f32(p), vx_f32(m), vx_f32(v), vx_f32(g), n, f, anew);
    return vx_status();
}
