/* reduce.c: reduce (sum, mean, max, min).
 *
 * Memory traffic: x is read once.
 *
 * Order of a sum, a function of the sizes alone. A float32 chain is never longer than 8 additions and the few that join
 * the lanes' registers; from there on everything is added in double:
 *   inner dimension reduced    four vector accumulators over runs of 32 vectors, whose sum goes into a vector of
 *                              doubles; a row of one run or less stays in float32
 *   inner dimension kept       eight rows at a time as a tree, into one double per column
 * Both cut the elements of one result into parts of a fixed length. Threads take parts; the parts' doubles are added in
 * ascending order. The relative error of a sum of positive numbers is then about 1e-7 at any length.
 *
 * The dimensions are visited in the order of x's strides, not in their own, so that a transposed view is read along
 * memory. max and min return NaN where any element is one.
 */
#include "shared/checks.h"
#include "cpu/cpu.h"
#include "shared/reduce_dims.h"
#include "cpu/simd.h"

#define SERIAL 32768              /* below this many elements a second thread costs more than it brings */
#define FLOAT_RUN (32 * VX_LANES) /* elements summed in float32 before they go into doubles */
#define PART 16384                /* elements of a part of a long row */
#define WIDTH 1024                /* columns worked on at once: their doubles fit the first-level cache */
#define COLUMN_PART 65536         /* elements of a part where columns are kept */
#define GROUP 8                   /* rows of the tree */

typedef int64_t vl __attribute__((vector_size(VX_LANES * 8)));
typedef double vd_unaligned __attribute__((vector_size(VX_LANES * 8), aligned(8), may_alias));

/* -- Elements and accumulators ------------------------------------------------------------------------------------- */

/* kind is VX_REDUCE_SUM, _MAX or _MIN, a constant wherever these are inlined. */

VX_INLINE double neutral(int kind)
{
    return kind == VX_REDUCE_SUM ? 0.0 : kind == VX_REDUCE_MAX ? -INFINITY : INFINITY;
}

VX_INLINE double join(int kind, double a, double b)
{
    if (kind == VX_REDUCE_SUM) return a + b;
    if (a != a || b != b) return NAN;
    return kind == VX_REDUCE_MAX ? (a > b ? a : b) : (a < b ? a : b);
}

VX_INLINE vf join_vf(int kind, vf a, vf b)
{
    if (kind == VX_REDUCE_SUM) return a + b;
    return vf_select(a != a, a,
                     kind == VX_REDUCE_MAX ? vf_max(a, b) : vf_min(a, b)); /* both return b where either is NaN */
}

VX_INLINE vd join_vd(int kind, vd a, vd b)
{
    if (kind == VX_REDUCE_SUM) return a + b;
    vl take = (kind == VX_REDUCE_MAX ? b > a : b < a) | (b != b);
    return (vd)(((vl)b & take) | ((vl)a & ~take));
}

/* Joins all lanes, as a tree: halves, quarters, ... two. */
VX_INLINE double vd_fold(int kind, vd x)
{
    double t[VX_LANES];
    memcpy(t, &x, sizeof t);
#define FOLD(n)                                                                                                        \
    for (int i = 0; i < n; i++) t[i] = join(kind, t[i], t[i + n]);
#if VX_LANES > 8
    FOLD(8)
#endif
#if VX_LANES > 4
    FOLD(4)
#endif
    FOLD(2)
    FOLD(1)
#undef FOLD
    return t[0];
}

VX_INLINE float vf_fold(int kind, vf x)
{
#if VX_LANES > 8
    x = join_vf(kind, x, vf_swap(x, 8));
#endif
#if VX_LANES > 4
    x = join_vf(kind, x, vf_swap(x, 4));
#endif
    x = join_vf(kind, x, vf_swap(x, 2));
    x = join_vf(kind, x, vf_swap(x, 1));
    return x[0];
}

/* Loads lanes 0 .. n - 1 from p, `step` elements apart. step is the constant 1 in the fast copies of the loops. */
VX_INLINE vf load(const float *p, int64_t step, int n)
{
    if (step == 1) return n == VX_LANES ? vf_load(p) : vf_load_n(p, n);
    vf x = vf_zero();
    for (int i = 0; i < n; i++) x[i] = p[i * step];
    return x;
}

/* Loads lanes 0 .. n - 1 likewise, and the neutral element into the others. */
VX_INLINE vf load_or_neutral(int kind, const float *p, int64_t step, int n)
{
    vf x = load(p, step, n);
    if (kind == VX_REDUCE_SUM || n == VX_LANES) return x;
    vi lane;
    for (int i = 0; i < VX_LANES; i++) lane[i] = i;
    return vf_select(lane < n, x, vf_set1((float)neutral(kind)));
}

/* -- Long rows ----------------------------------------------------------------------------------------------------- */

/* Joins x[0], x[step], ... x[(n - 1) step] lane by lane; n <= FLOAT_RUN. */
VX_INLINE vf float_run(int kind, int64_t step, const float *x, int64_t n)
{
    const vf none = vf_set1((float)neutral(kind));
    vf s0 = none, s1 = none, s2 = none, s3 = none;
    int64_t i = 0;
    for (; i + 4 * VX_LANES <= n; i += 4 * VX_LANES) {
        const float *p = x + i * step;
        s0 = join_vf(kind, s0, load(p, step, VX_LANES));
        s1 = join_vf(kind, s1, load(p + VX_LANES * step, step, VX_LANES));
        s2 = join_vf(kind, s2, load(p + 2 * VX_LANES * step, step, VX_LANES));
        s3 = join_vf(kind, s3, load(p + 3 * VX_LANES * step, step, VX_LANES));
    }
    for (; i + VX_LANES <= n; i += VX_LANES) s0 = join_vf(kind, s0, load(x + i * step, step, VX_LANES));
    if (i < n) s1 = join_vf(kind, s1, load_or_neutral(kind, x + i * step, step, (int)(n - i)));
    return join_vf(kind, join_vf(kind, s0, s1), join_vf(kind, s2, s3));
}

/* Joins acc with n elements, run by run. */
VX_INLINE vd row_into(int kind, int64_t step, vd acc, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i += FLOAT_RUN)
        acc = join_vd(kind, acc, vd_of(float_run(kind, step, x + i * step, vx_min64(FLOAT_RUN, n - i))));
    return acc;
}

/* Joins one short row, n <= FLOAT_RUN, all in float32. */
VX_INLINE double short_row(int kind, int64_t step, const float *x, int64_t n)
{
    if (n > 4) return vf_fold(kind, float_run(kind, step, x, n));
    double v = neutral(kind);
    for (int64_t i = 0; i < n; i++) v = join(kind, v, x[i * step]);
    return v;
}

/* -- Kept columns -------------------------------------------------------------------------------------------------- */

/* Joins sum (width), doubles with room for whole vectors, with `count` rows of `width` columns. */
VX_INLINE void columns_into(int kind, int64_t step, double *sum, const float *const *row, int count, int64_t width)
{
    for (int64_t c = 0; c < width; c += VX_LANES) {
        int n = (int)vx_min64(VX_LANES, width - c);
        vf s;
        if (count == GROUP) {
            vf t[GROUP];
            for (int k = 0; k < GROUP; k++) t[k] = load(row[k] + c * step, step, n);
            s = join_vf(kind, join_vf(kind, join_vf(kind, t[0], t[1]), join_vf(kind, t[2], t[3])),
                        join_vf(kind, join_vf(kind, t[4], t[5]), join_vf(kind, t[6], t[7])));
        } else {
            s = load(row[0] + c * step, step, n);
            for (int k = 1; k < count; k++) s = join_vf(kind, s, load(row[k] + c * step, step, n));
        }
        vd_unaligned *to = (vd_unaligned *)(sum + c);
        *to = join_vd(kind, *to, vd_of(s));
    }
}

/* -- reduce -------------------------------------------------------------------------------------------------------- */

/* Returns the offset of the i-th of d's elements; stride is d->x or d->y. */
static int64_t dims_offset(const dims *d, const int64_t *stride, int64_t i)
{
    int64_t offset = 0;
    for (int k = d->n - 1; k > 0; k--) {
        offset += i % d->size[k] * stride[k];
        i /= d->size[k];
    }
    return d->n ? offset + i * stride[0] : 0;
}

/* One call: the innermost dimension, and the kept and the reduced ones around it. */
typedef struct plan {
    dims kept, reduced;
    bool inner_kept;
    int64_t n, x_step, y_step; /* the innermost dimension */
    const float *x;
    float *y;
    double scale;    /* of the result: 1 / count for a mean */
    int64_t parts;   /* of one result */
    double *partial; /* (kept, parts) or (kept, parts, n), where parts > 1 */
} plan;

/* Joins part `part` of kept row k, where the inner dimension is reduced. A part is made of pieces: whole rows, or
 * stretches of PART elements of longer rows. */
VX_INLINE double reduce_row_part(int kind, int64_t step, const plan *p, int64_t k, int64_t part)
{
    const float *x = p->x + dims_offset(&p->kept, p->kept.x, k);
    int64_t cuts = vx_ceil_div(p->n, PART), per_part = vx_max64(1, PART / p->n), pieces = p->reduced.count * cuts;
    vd acc = (vd){0} + neutral(kind);
    for (int64_t i = part * per_part; i < vx_min64((part + 1) * per_part, pieces); i++) {
        int64_t first = i % cuts * PART;
        const float *row = x + dims_offset(&p->reduced, p->reduced.x, i / cuts) + first * step;
        acc = row_into(kind, step, acc, row, vx_min64(PART, p->n - first));
    }
    return vd_fold(kind, acc);
}

/* Reduces where the inner dimension is reduced. */
VX_INLINE void reduce_rows(int kind, int64_t step, const plan *p)
{
    int64_t units = p->kept.count * p->parts, work = p->kept.count * p->reduced.count * p->n;
    if (p->reduced.count == 1 && p->n <= FLOAT_RUN) {
#pragma omp parallel for schedule(static) if (work >= SERIAL)
        for (int64_t k = 0; k < units; k++) {
            double v = short_row(kind, step, p->x + dims_offset(&p->kept, p->kept.x, k), p->n);
            p->y[dims_offset(&p->kept, p->kept.y, k)] = (float)(v * p->scale);
        }
        return;
    }
#pragma omp parallel for schedule(static) if (work >= SERIAL)
    for (int64_t u = 0; u < units; u++) {
        double v = reduce_row_part(kind, step, p, u / p->parts, u % p->parts);
        if (p->parts > 1) p->partial[u] = v;
        else p->y[dims_offset(&p->kept, p->kept.y, u)] = (float)(v * p->scale);
    }
    if (p->parts == 1) return;
    for (int64_t k = 0; k < p->kept.count; k++) {
        double v = neutral(kind);
        for (int64_t i = 0; i < p->parts; i++) v = join(kind, v, p->partial[k * p->parts + i]);
        p->y[dims_offset(&p->kept, p->kept.y, k)] = (float)(v * p->scale);
    }
}

/* Returns the rows of a part where columns are kept, a multiple of GROUP. */
static int64_t rows_of_part(int64_t n) { return vx_max64(1, COLUMN_PART / vx_min64(n, WIDTH) / GROUP) * GROUP; }

/* Reduces where the inner dimension is kept. */
VX_INLINE void reduce_columns(int kind, int64_t step, const plan *p)
{
    int64_t cuts = vx_ceil_div(p->n, WIDTH), rows = rows_of_part(p->n), units = p->kept.count * p->parts * cuts;
    int64_t work = p->kept.count * p->reduced.count * p->n;
    /* dense rows that would leave lanes of their only vectors empty */
    bool narrow = step == 1 && p->n % VX_LANES && p->n * VX_LANES <= WIDTH && p->reduced.n == 1 &&
                  p->reduced.x[0] == p->n && p->reduced.count >= 16 * VX_LANES;
#pragma omp parallel for schedule(static) if (work >= SERIAL)
    for (int64_t u = 0; u < units; u++) {
        int64_t k = u / cuts / p->parts, part = u / cuts % p->parts, first = u % cuts * WIDTH;
        int64_t width = vx_min64(WIDTH, p->n - first), end = vx_min64((part + 1) * rows, p->reduced.count);
        const float *x = p->x + dims_offset(&p->kept, p->kept.x, k) + first * step;
        double sum[WIDTH + VX_LANES];
        const float *row[GROUP];
        int64_t q = part * rows;
        if (narrow) {
            /* the part, seen as fewer rows of n VX_LANES columns, in whole vectors; then VX_LANES of them become one */
            int64_t wide = p->n * VX_LANES;
            for (int64_t c = 0; c < wide; c++) sum[c] = neutral(kind);
            while (q + VX_LANES <= end) {
                int count = (int)vx_min64(GROUP, (end - q) / VX_LANES);
                for (int i = 0; i < count; i++) row[i] = x + (q + i * VX_LANES) * p->n;
                columns_into(kind, 1, sum, row, count, wide);
                q += count * VX_LANES;
            }
            for (int64_t c = p->n; c < wide; c++) sum[c % p->n] = join(kind, sum[c % p->n], sum[c]);
        } else {
            for (int64_t c = 0; c < width + VX_LANES; c++) sum[c] = neutral(kind);
        }
        for (; q < end; q += GROUP) {
            int count = (int)vx_min64(GROUP, end - q);
            for (int i = 0; i < count; i++) row[i] = x + dims_offset(&p->reduced, p->reduced.x, q + i);
            columns_into(kind, step, sum, row, count, width);
        }
        if (p->parts > 1) {
            memcpy(p->partial + (k * p->parts + part) * p->n + first, sum, sizeof(double) * (size_t)width);
            continue;
        }
        float *y = p->y + dims_offset(&p->kept, p->kept.y, k) + first * p->y_step;
        for (int64_t c = 0; c < width; c++) y[c * p->y_step] = (float)(sum[c] * p->scale);
    }
    if (p->parts == 1) return;
    int64_t results = p->kept.count * p->n;
#pragma omp parallel for schedule(static) if (results * p->parts >= SERIAL)
    for (int64_t i = 0; i < results; i++) {
        int64_t k = i / p->n, c = i % p->n;
        double v = neutral(kind);
        for (int64_t part = 0; part < p->parts; part++) v = join(kind, v, p->partial[(k * p->parts + part) * p->n + c]);
        p->y[dims_offset(&p->kept, p->kept.y, k) + c * p->y_step] = (float)(v * p->scale);
    }
}

VX_INLINE void reduce_kind(int kind, const plan *p)
{
    if (p->inner_kept) {
        if (p->x_step == 1) reduce_columns(kind, 1, p);
        else reduce_columns(kind, p->x_step, p);
    } else {
        if (p->x_step == 1) reduce_rows(kind, 1, p);
        else reduce_rows(kind, p->x_step, p);
    }
}

/* Fills in the dimensions. */
static void plan_make(plan *p, const vx_tensor *y, const vx_tensor *x)
{
    dims inner;
    p->inner_kept = dims_collapse(&p->kept, &p->reduced, &inner, y, x);
    p->n = inner.size[0], p->x_step = inner.x[0], p->y_step = inner.y[0];
}

/* Computes y = sum, mean, max or min of x over the dimensions where y has size 1. Working space: 8 bytes per 16384
 * elements, or per 64 elements and more where columns are kept. */
int VX_CPU(reduce)(vx_tensor *y, vx_tensor *x, int kind)
{
    if (check_reduce(y, x, kind)) return VX_EINVAL;
    if (!y->numel) return VX_OK;
    if (!x->numel) {
        memset(y->data, 0, sizeof(float) * (size_t)y->numel);
        return VX_OK;
    }
    plan p = {.x = vx_f32(x), .y = vx_f32(y), .scale = 1};
    plan_make(&p, y, x);
    if (kind == VX_REDUCE_MEAN) p.scale = 1.0 / (double)(x->numel / y->numel);
    size_t results = (size_t)p.kept.count;
    if (p.inner_kept) {
        p.parts = vx_ceil_div(p.reduced.count, rows_of_part(p.n));
        results *= (size_t)p.n;
    } else {
        p.parts = vx_ceil_div(p.reduced.count * vx_ceil_div(p.n, PART), vx_max64(1, PART / p.n));
    }
    if (p.parts > 1) {
        p.partial = vx_scratch("reduce", sizeof(double) * results * (size_t)p.parts);
        if (!p.partial) return VX_ENOMEM;
    }
    if (kind == VX_REDUCE_MAX) reduce_kind(VX_REDUCE_MAX, &p);
    else if (kind == VX_REDUCE_MIN) reduce_kind(VX_REDUCE_MIN, &p);
    else reduce_kind(VX_REDUCE_SUM, &p);
    if (p.partial) vx_scratch_free(p.partial);
    return VX_OK;
}
