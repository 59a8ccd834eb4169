/* lengths.h: how much of each sequence of a batch counts. */
#ifndef VX_LENGTHS_H
#define VX_LENGTHS_H

#include "cpu.h"

/* Checks that lengths (B) lie in 0 .. most; NULL passes. */
static inline int check_lengths(const char *op, const vx_tensor *lengths, int64_t most)
{
    for (int64_t b = 0; lengths && b < lengths->shape[0]; b++)
        if (vx_i32(lengths)[b] < 0 || vx_i32(lengths)[b] > most)
            return vx_fail(VX_EINVAL, "%s: length %d of row %lld is outside 0 .. %lld", op, vx_i32(lengths)[b],
                           (long long)b, (long long)most);
    return VX_OK;
}

#endif
