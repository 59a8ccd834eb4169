/* argmax.c: the column of each row's largest element.
 *
 * Memory traffic: x is read once. Each lane keeps its own best and where that was, so that one pass is enough.
 */
#include "cpu/cpu.h"
#include "cpu/simd.h"

#define SERIAL 32768 /* below this many elements a second thread costs more than it brings */

/* Returns the column of the largest of n > 0 elements, the lowest of equals; -1 where one is NaN. */
static int32_t row_argmax(const float *x, int64_t n)
{
    vi lane;
    for (int i = 0; i < VX_LANES; i++) lane[i] = i;
    vf best = vf_set1(-INFINITY);
    vi where = lane, at = lane, nan = {0};
    int64_t i = 0;
    for (; i + VX_LANES <= n; i += VX_LANES, at += VX_LANES) {
        vf v = vf_load(x + i);
        vi better = v > best;
        best = vf_max(v, best);
        where = (at & better) | (where & ~better);
        nan |= v != v;
    }
    if (vi_any(nan)) return -1;
    float top = vf_maximum(best);
    int32_t column = INT32_MAX;
    for (int k = 0; k < VX_LANES; k++)
        if (best[k] == top && where[k] < column) column = where[k];
    for (; i < n; i++) {
        if (x[i] != x[i]) return -1;
        if (x[i] > top) top = x[i], column = (int32_t)i;
    }
    return column;
}

/* Finds the column of each row's largest element, 0-based. A row with NaN is VX_ENONFINITE; index stays as it was. */
int VX_CPU(argmax)(vx_tensor *index, vx_tensor *x)
{
    int64_t rows = x->shape[0], n = x->shape[1], bad = INT64_MAX;
    const float *in = vx_f32(x);
    if (!rows) return VX_OK;
    int32_t *found = vx_scratch("argmax", sizeof(int32_t) * (size_t)rows);
    if (!found) return VX_ENOMEM;
#pragma omp parallel for schedule(static) reduction(min : bad) if (rows * n >= SERIAL)
    for (int64_t r = 0; r < rows; r++) {
        found[r] = row_argmax(in + r * n, n);
        if (found[r] < 0) bad = vx_min64(bad, r);
    }
    if (bad == INT64_MAX) memcpy(index->data, found, sizeof(int32_t) * (size_t)rows);
    vx_scratch_free(found);
    return bad == INT64_MAX ? VX_OK : vx_fail(VX_ENONFINITE, "argmax: row %lld holds a NaN", (long long)bad);
}
