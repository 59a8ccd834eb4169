/* cumsum.c: sums so far along one dimension.
 *
 * Memory traffic: x is read once, y written once. Sums are kept in double, so that a long row loses nothing, and every
 * element is rounded once. Threads share the images and the columns; a column is added up by one thread, in order.
 */
#include "cpu/cpu.h"

#define SERIAL 16384 /* below this many elements a second thread costs more than it brings */

enum { COLUMNS = 64 /* that a thread takes at once: their sums stay in L1 */ };

/* Sums columns first .. first + count - 1 of x (S,C) into those of y. */
static void columns_cumsum(float *y, const float *x, int64_t S, int64_t C, int64_t first, int64_t count, int reverse)
{
    double sum[COLUMNS] = {0};
    for (int64_t i = 0; i < S; i++) {
        const int64_t at = (reverse ? S - 1 - i : i) * C + first;
        for (int64_t c = 0; c < count; c++) {
            sum[c] += x[at + c];
            y[at + c] = (float)sum[c];
        }
    }
}

/* Computes y (B,S,C), sums of x over s' <= s, or over s' >= s where reverse is 1. */
int VX_CPU(cumsum)(vx_tensor *y, vx_tensor *x, int reverse)
{
    const int64_t B = x->shape[0], S = x->shape[1], C = x->shape[2], cuts = vx_ceil_div(C, COLUMNS);
    float *out = vx_f32(y);
    const float *in = vx_f32(x);
#pragma omp parallel for schedule(static) if (y->numel >= SERIAL)
    for (int64_t i = 0; i < B * cuts; i++) {
        const int64_t at = i / cuts * S * C, first = i % cuts * COLUMNS;
        columns_cumsum(out + at, in + at, S, C, first, vx_min64(COLUMNS, C - first), reverse);
    }
    return VX_OK;
}
