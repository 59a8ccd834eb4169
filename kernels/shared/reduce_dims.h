/* reduce_dims.h: the dimensions that reduce works over, in C and CUDA alike: which are kept, which are summed, and in
 * which order they lie. */
#ifndef VX_REDUCE_DIMS_H
#define VX_REDUCE_DIMS_H

#include <stdbool.h>

/* Sizes and strides of some dimensions of x and y, outermost first. */
typedef struct dims {
    int n;
    int64_t count; /* product of the sizes */
    int64_t size[VX_MAX_DIMS], x[VX_MAX_DIMS], y[VX_MAX_DIMS];
} dims;

/* Appends a dimension, inside the others. */
static inline void dims_add(dims *d, int64_t size, int64_t x, int64_t y)
{
    d->size[d->n] = size, d->x[d->n] = x, d->y[d->n] = y;
    d->n++;
    d->count *= size;
}

/* Collapses x and y: sizes of 1 go; dimensions are ordered by x's strides, the largest and those of 0 outermost;
 * adjacent ones of one kind that x and y step through evenly become one. The innermost goes to `inner`, the others to
 * kept or reduced. Returns whether the innermost is kept. */
static inline bool dims_collapse(dims *kept, dims *reduced, dims *inner, const vx_tensor *y, const vx_tensor *x)
{
    const dims none = {0, 1, {0}, {0}, {0}};
    int order[VX_MAX_DIMS], n = 0;
    for (int d = 0; d < x->ndim; d++) {
        if (x->shape[d] == 1) continue;
        uint64_t stride = (uint64_t)x->stride[d] - 1; /* 0 becomes the largest */
        int at = n++;
        for (; at > 0 && (uint64_t)x->stride[order[at - 1]] - 1 < stride; at--) order[at] = order[at - 1];
        order[at] = d;
    }
    dims all = none;
    bool is_kept[VX_MAX_DIMS];
    for (int i = 0; i < n; i++) {
        int d = order[i], last = all.n - 1;
        bool keep = y->shape[d] != 1;
        int64_t size = x->shape[d], step = x->stride[d], out = keep ? y->stride[d] : 0;
        if (last >= 0 && is_kept[last] == keep && all.x[last] == step * size && all.y[last] == out * size) {
            all.size[last] *= size, all.x[last] = step, all.y[last] = out;
        } else {
            is_kept[all.n] = keep;
            dims_add(&all, size, step, out);
        }
    }
    if (!all.n) {
        is_kept[0] = false;
        dims_add(&all, 1, 1, 0);
    }
    const int last = all.n - 1;
    *kept = *reduced = *inner = none;
    for (int i = 0; i < last; i++) dims_add(is_kept[i] ? kept : reduced, all.size[i], all.x[i], all.y[i]);
    dims_add(inner, all.size[last], all.x[last], all.y[last]);
    return is_kept[last];
}

#endif
