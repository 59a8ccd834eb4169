/* gather_along.c: gather_along, scatter_add_along: elements along one dimension, each by an index of its own.
 *
 * Memory traffic: gather_along reads an index and an element for each element that it writes; scatter_add_along reads
 * an index and an element of x and adds to one of y. Indices are checked before anything is written.
 *
 * scatter_add_along needs no atomics: threads share the images and the columns, and a column's terms are added by one
 * thread in ascending order.
 */
#include "cpu/indices.h"

#define SERIAL 16384 /* below this many elements a second thread costs more than it brings */

enum { COLUMNS = 64 /* that a thread takes at once */ };

/* Copies y[b][t][c] = x[b][index[b][t][c]][c]. */
int VX_CPU(gather_along)(vx_tensor *y, vx_tensor *x, vx_tensor *index)
{
    const int64_t S = x->shape[1], T = y->shape[1], C = x->shape[2], rows = y->shape[0] * T;
    const int32_t *at = vx_i32(index);
    int status = check_indices("gather_along", "index", at, rows, C, S);
    if (status) return status;
    const float *from = vx_f32(x);
    float *to = vx_f32(y);
#pragma omp parallel for schedule(static) if (y->numel >= SERIAL)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < C; c++) to[i * C + c] = from[(i / T * S + at[i * C + c]) * C + c];
    return VX_OK;
}

/* Adds x[b][t][c] to y[b][index[b][t][c]][c]. */
int VX_CPU(scatter_add_along)(vx_tensor *y, vx_tensor *x, vx_tensor *index)
{
    const int64_t B = x->shape[0], S = y->shape[1], T = x->shape[1], C = x->shape[2], cuts = vx_ceil_div(C, COLUMNS);
    const int32_t *at = vx_i32(index);
    int status = check_indices("scatter_add_along", "index", at, B * T, C, S);
    if (status) return status;
    const float *from = vx_f32(x);
    float *to = vx_f32(y);
#pragma omp parallel for schedule(static) if (x->numel >= SERIAL)
    for (int64_t i = 0; i < B * cuts; i++) {
        const int64_t b = i / cuts, first = i % cuts * COLUMNS, last = vx_min64(first + COLUMNS, C);
        for (int64_t t = 0; t < T; t++)
            for (int64_t c = first; c < last; c++) {
                const int64_t here = (b * T + t) * C + c;
                to[(b * S + at[here]) * C + c] += from[here];
            }
    }
    return VX_OK;
}
