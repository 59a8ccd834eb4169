/* optim.cu: adamw on CUDA, one launch for every 80 tensors; see optim.c for the formulas and their order.
 *
 * Memory traffic: reads p, m, v, g, writes p, m, v: 28 bytes a parameter and nothing else. Where the tensors lie is
 * told by a table that travels as the kernel's argument, so it is neither uploaded nor, in a recorded graph, kept
 * anywhere else. A block looks up its tensor there.
 */
#include "cuda/cuda.cuh"

enum { BLOCK = 256, ELEMENTS = 4 * BLOCK, ENTRIES = 80 }; /* ELEMENTS: of a block */

typedef struct entry {
    float *p, *m, *v;
    const float *g;
    int64_t n;
    unsigned first_block;
    float decay;
} entry;

/* Tensors without elements are not among them. */
typedef struct table {
    entry of[ENTRIES];
    int count;
} table;

typedef struct factors {
    float lr, m_new, v_old, v_new, rescale, eps, rate;
} factors;

static_assert(sizeof(table) + sizeof(factors) + 2 * sizeof(void *) <= 4096,
              "what all devices take as a kernel's arguments");

/* Updates one parameter. fmaf: of two products the compiler may round either, and would not choose the same one
 * wherever this is inlined. */
VX_DEVICE void update(const factors &f, float keep, float &p, float &m, float &v, float g)
{
    m = m + f.m_new * (g - m);
    v = fmaf(f.v_old, v, (f.v_new * g) * g);
    p = keep * p - (f.rate * m) / (sqrtf(v) * f.rescale + f.eps);
}

/* Updates four parameters a thread, at once where the block has all of its own and the tensors lie on 16 bytes, as
 * views need not. */
VX_KERNEL VX_HOT adamw_kernel(const table t, factors given, const factors *recorded)
{
    const factors f = recorded ? *recorded : given;
    int at = 0;
    for (int end = t.count; end - at > 1;) {
        const int middle = (at + end) / 2;
        if (t.of[middle].first_block <= blockIdx.x) at = middle;
        else end = middle;
    }
    const entry e = t.of[at];
    const float keep = (float)(1.0 - (double)f.lr * e.decay);
    const int64_t first = (int64_t)(blockIdx.x - e.first_block) * ELEMENTS,
                  end = first + ELEMENTS < e.n ? first + ELEMENTS : e.n;
    const uintptr_t places = (uintptr_t)e.p | (uintptr_t)e.m | (uintptr_t)e.v | (uintptr_t)e.g;
    if (end - first == ELEMENTS && places % 16 == 0) {
        const int64_t i = first / 4 + threadIdx.x;
        float4 a = ((float4 *)e.p)[i], b = ((float4 *)e.m)[i], c = ((float4 *)e.v)[i], d = ((const float4 *)e.g)[i];
        update(f, keep, a.x, b.x, c.x, d.x);
        update(f, keep, a.y, b.y, c.y, d.y);
        update(f, keep, a.z, b.z, c.z, d.z);
        update(f, keep, a.w, b.w, c.w, d.w);
        ((float4 *)e.p)[i] = a, ((float4 *)e.m)[i] = b, ((float4 *)e.v)[i] = c;
    } else {
        for (int64_t i = first + threadIdx.x; i < end; i += BLOCK) {
            float a = e.p[i], b = e.m[i], c = e.v[i];
            update(f, keep, a, b, c, e.g[i]);
            e.p[i] = a, e.m[i] = b, e.v[i] = c;
        }
    }
}

typedef struct numbers { /* compared as bytes, so without a gap */
    float lr, beta1, beta2, eps;
    int64_t step;
} numbers;

static factors factors_of(const numbers &a)
{
    const double b1 = a.beta1, b2 = a.beta2;
    factors f;
    f.lr = a.lr;
    f.m_new = (float)(1.0 - b1);
    f.v_old = a.beta2;
    f.v_new = (float)(1.0 - b2);
    f.rescale = (float)(1.0 / sqrt(1.0 - pow(b2, (double)a.step)));
    f.eps = a.eps;
    f.rate = (float)(a.lr / (1.0 - pow(b1, (double)a.step)));
    return f;
}

/* Makes the factors of a launch. lr / recorded_rate comes first: where they are equal, lr is the launch's rate to the
 * bit. */
static void refresh(void *to, const void *given, const vx_launch *launch)
{
    numbers a = *(const numbers *)given;
    a.lr = (float)((double)a.lr / launch->recorded_rate * launch->rate);
    a.step += launch->steps;
    *(factors *)to = factors_of(a);
}

int vx_cuda_adamw(vx_tensor *const *p, vx_tensor *const *m, vx_tensor *const *v, vx_tensor *const *g, int count,
                  const float *decay, float lr, float beta1, float beta2, float eps, int64_t step)
{
    const numbers given = {lr, beta1, beta2, eps, step};
    const factors f = factors_of(given);
    const factors *recorded = (const factors *)vx_graph_param(refresh, &given, sizeof given, sizeof f);
    table t = {};
    unsigned blocks = 0;
    for (int i = 0; i < count; i++) {
        const int64_t n = p[i]->numel;
        if (n) {
            t.of[t.count++] = {vx_f32(p[i]), vx_f32(m[i]), vx_f32(v[i]), vx_f32(g[i]), n, blocks, decay[i]};
            blocks += (unsigned)vx_ceil_div(n, ELEMENTS);
        }
        if (t.count == ENTRIES || (t.count && i == count - 1)) {
            VX_LAUNCH(adamw_kernel, blocks, BLOCK, 0, t, f, recorded);
            t.count = 0, blocks = 0;
        }
    }
    return vx_status();
}
