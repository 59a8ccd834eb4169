/* indices.h: what kernels do with a tensor of indices before they follow them: check their range, and sort by them. */
#ifndef VX_INDICES_H
#define VX_INDICES_H

#include <string.h>

#include "cpu.h"

/* Checks that all indices of x (rows,columns) lie in least .. limit - 1, least 0 or -1; the error names the op, what an
 * index is called, and the first that does not. */
static inline int check_range(const char *op, const char *name, const int32_t *x, int64_t rows, int64_t columns,
                              int32_t least, int64_t limit)
{
    const uint32_t offset = (uint32_t)-least, end = (uint32_t)vx_min64(limit, (int64_t)INT32_MAX + 1) + offset;
    uint32_t bad = 0;
    for (int64_t i = 0; i < rows * columns; i++) bad |= (uint32_t)x[i] + offset >= end; /* below least it is large */
    if (!bad) return VX_OK;
    int64_t i = 0;
    while ((uint32_t)x[i] + offset < end) i++;
    const long long row = i / columns, column = i % columns, most = limit - 1;
    if (columns == 1)
        return vx_fail(VX_EINVAL, "%s: %s %d at row %lld is outside 0 .. %lld", op, name, (int)x[i], row, most);
    return vx_fail(VX_EINVAL, "%s: %s %d at row %lld, column %lld is outside 0 .. %lld", op, name, (int)x[i], row,
                   column, most);
}

/* Checks that all indices of x (rows,columns) lie in 0 .. limit - 1. */
static inline int check_indices(const char *op, const char *name, const int32_t *x, int64_t rows, int64_t columns,
                                int64_t limit)
{
    return check_range(op, name, x, rows, columns, 0, limit);
}

/* Sorts by key, stably: order (count) = 0 .. count - 1 by ascending key[i stride] < keys; those of a key below 0 are
 * left out. Those of key k are order[start[k]] .. order[start[k + 1] - 1], start (keys + 1). count < 2^31. */
static inline void counting_sort(const int32_t *key, int64_t stride, int64_t count, int64_t keys, int32_t *order,
                                 int32_t *start)
{
    memset(start, 0, sizeof(int32_t) * (size_t)(keys + 1));
    for (int64_t i = 0; i < count; i++)
        if (key[i * stride] >= 0) start[key[i * stride] + 1]++;
    for (int64_t k = 0; k < keys; k++) start[k + 1] += start[k];
    for (int64_t i = 0; i < count; i++)
        if (key[i * stride] >= 0) order[start[key[i * stride]]++] = (int32_t)i;
    for (int64_t k = keys; k > 0; k--) start[k] = start[k - 1];
    start[0] = 0;
}

#endif
