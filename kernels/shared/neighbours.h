/* neighbours.h: the K rows with the largest key per simplex vertex, exact, whatever order the rows come in.
 *
 * An entry packs key and row into one integer whose order is "larger key first, then lower row":
 *     (key's bits, made monotone) << 32 | ~row
 * so that a list is an ordinary descending list of K distinct integers, the K largest of a set do not depend on the
 * order of arrival, and two threads' lists merge by inserting one into the other. The threshold of a vertex is its K-th
 * key, -inf until K rows have come and +inf for a code that is no vertex: a row is looked at only where its key passes
 * the threshold. That takes keys above -inf: a list is not full before K rows have passed.
 */
#ifndef VX_NEIGHBOURS_H
#define VX_NEIGHBOURS_H

#include <math.h>

#include "float_order.h"

/* Packs an entry; its key and row come back from neighbour_key() and neighbour_row(). */
VX_INLINE uint64_t neighbour_pack(float key, int64_t row)
{
    return (uint64_t)float_order(key) << 32 | (uint32_t) ~(uint32_t)row;
}
VX_INLINE float neighbour_key(uint64_t entry) { return float_of_order((uint32_t)(entry >> 32)); }
VX_INLINE int32_t neighbour_row(uint64_t entry) { return (int32_t) ~(uint32_t)entry; }

/* The least |p|^2 that vertex_knn refuses: from here on 2 p - 1 - |p|^2 might be -inf in float32. */
#define LARGEST_SUMSQ 1e38

/* Returns an entry that any row replaces. */
VX_INLINE uint64_t neighbour_none(void) { return neighbour_pack(-INFINITY, INT32_MAX); }

/* Inserts x into a descending list of K entries if it is larger than the last. Returns the new K-th key. Short lists
 * are passed through from the front without a branch, since where x belongs cannot be predicted. */
static inline float neighbour_insert(uint64_t *list, int64_t K, uint64_t x)
{
    if (K <= 16)
        for (int64_t j = 0; j < K; j++) {
            uint64_t here = list[j];
            list[j] = here > x ? here : x;
            x = here > x ? x : here;
        }
    else if (x > list[K - 1]) {
        int64_t j = K - 1;
        for (; j > 0 && list[j - 1] < x; j--) list[j] = list[j - 1];
        list[j] = x;
    }
    return neighbour_key(list[K - 1]);
}

#endif
