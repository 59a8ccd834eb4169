/* walk.h: the elements of several strided operands of one shape, in the fewest dimensions: what elementwise ops go
 * through, in C and in CUDA alike.
 */
#ifndef VX_WALK_H
#define VX_WALK_H

#include <string.h>

#include "core/tensor.h"

enum { WALK_OPERANDS = 4 /* at most */ };

typedef struct walk {
    int operands, ndim; /* ndim >= 1 */
    int64_t numel;
    int64_t size[VX_MAX_DIMS];
    int64_t stride[WALK_OPERANDS][VX_MAX_DIMS]; /* elements, per operand; 0 along a broadcast dimension */
    char *data[WALK_OPERANDS];
    int item[WALK_OPERANDS]; /* bytes of an element */
} walk;

/* Collapses the common shape of operands x[0] (the output) .. x[operands - 1]: sizes of 1 go, dimensions are ordered by
 * the output's strides, neighbours that every operand steps through evenly become one. */
static inline walk walk_of(int operands, const vx_tensor *const *x)
{
    walk w;
    memset(&w, 0, sizeof w);
    w.operands = operands;
    w.numel = x[0]->numel;
    int order[VX_MAX_DIMS], n = 0;
    for (int d = 0; d < x[0]->ndim; d++) {
        if (x[0]->shape[d] == 1) continue;
        int at = n++;
        for (; at > 0 && x[0]->stride[order[at - 1]] < x[0]->stride[d]; at--) order[at] = order[at - 1];
        order[at] = d;
    }
    for (int k = 0; k < operands; k++) w.data[k] = x[k]->data, w.item[k] = (int)vx_dtype_bytes(x[k]->dtype);
    for (int i = 0; i < n; i++) {
        const int64_t size = x[0]->shape[order[i]];
        bool joins = w.ndim > 0;
        for (int k = 0; k < operands; k++) joins = joins && w.stride[k][w.ndim - 1] == x[k]->stride[order[i]] * size;
        const int d = joins ? w.ndim - 1 : w.ndim++;
        w.size[d] = joins ? w.size[d] * size : size;
        for (int k = 0; k < operands; k++) w.stride[k][d] = x[k]->stride[order[i]];
    }
    if (!w.ndim) {
        w.ndim = 1;
        w.size[0] = 1;
        for (int k = 0; k < operands; k++) w.stride[k][0] = 1;
    }
    return w;
}

/* Prepares a transposition from operand 1 to operand 0: moves the dimension in which operand 1 is contiguous to the
 * last place but one. The order of the others does not matter. Returns false, with w as it was, where nothing is to be
 * transposed: operand 1 is contiguous or constant along the last dimension, or contiguous along none. */
static inline bool walk_transpose(walk *w)
{
    const int last = w->ndim - 1;
    int inner = last;
    for (int d = 0; d < last; d++)
        if (w->stride[1][d] == 1 && w->size[d] > 1) inner = d;
    if (inner == last || w->stride[1][last] == 1 || w->stride[1][last] == 0) return false;
    const int64_t size = w->size[inner], to = w->stride[0][inner], from = w->stride[1][inner];
    for (int d = inner; d < last - 1; d++) {
        w->size[d] = w->size[d + 1];
        w->stride[0][d] = w->stride[0][d + 1];
        w->stride[1][d] = w->stride[1][d + 1];
    }
    w->size[last - 1] = size, w->stride[0][last - 1] = to, w->stride[1][last - 1] = from;
    return true;
}

#endif
