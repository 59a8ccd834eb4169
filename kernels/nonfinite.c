/* nonfinite.c: how many rows hold a NaN or Inf, and which is the first.
 *
 * Memory traffic: x is read once. Long rows are shared between threads.
 */
#include "cpu/cpu.h"
#include "cpu/simd.h"

#define SERIAL 32768 /* below this many elements a second thread costs more than it brings */
#define PART 16384   /* elements of a part of a long row */

/* Returns 1 where any of n elements is NaN or Inf: its exponent bits are all set. */
static int any_nonfinite(const float *x, int64_t n)
{
    vi bad = {0};
    int64_t i = 0;
    for (; i + VX_LANES <= n; i += VX_LANES) bad |= ((vi)vf_load(x + i) & 0x7f800000) == 0x7f800000;
    if (i < n) bad |= ((vi)vf_load_n(x + i, (int)(n - i)) & 0x7f800000) == 0x7f800000;
    return vi_any(bad);
}

/* Fills found (2) with the number of rows that hold a NaN or Inf, and the first such row, or -1. */
int VX_CPU(nonfinite)(vx_tensor *found, vx_tensor *x)
{
    int64_t rows = x->shape[0], n = x->shape[1], count = 0, first = INT64_MAX;
    const float *in = vx_f32(x);
    if (n >= SERIAL) {
        for (int64_t r = 0; r < rows; r++) {
            int bad = 0;
#pragma omp parallel for schedule(static) reduction(| : bad)
            for (int64_t i = 0; i < n; i += PART) bad |= any_nonfinite(in + r * n + i, vx_min64(PART, n - i));
            count += bad;
            if (bad) first = vx_min64(first, r);
        }
    } else {
#pragma omp parallel for schedule(static) reduction(+ : count) reduction(min : first) if (rows * n >= SERIAL)
        for (int64_t r = 0; r < rows; r++) {
            if (!any_nonfinite(in + r * n, n)) continue;
            count++;
            first = vx_min64(first, r);
        }
    }
    vx_i32(found)[0] = (int32_t)count;
    vx_i32(found)[1] = count ? (int32_t)first : -1;
    return VX_OK;
}
