/* topk.c: the K largest or smallest elements of each row, in order.
 *
 * Element and column are packed into one integer whose order is "larger first, then lower column" (neighbours.h), so
 * that the result is exact and ties are settled. Up to LISTED of them are kept in a list while the row is read once;
 * for more the row's integers are sorted, O(C log C). The row is read once before, in search of a NaN.
 */
#include <omp.h>
#include <stdlib.h>

#include "shared/neighbours.h"
#include "cpu/cpu.h"

#define SERIAL 16384 /* below this many elements a second thread costs more than it brings */

enum { LISTED = 64 };

/* Returns x's place in the order; -0 and 0 are equal. */
static inline uint64_t entry_of(float x, int64_t column, int largest)
{
    return neighbour_pack((largest ? x : -x) + 0.0f, column);
}

static int descending(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* Finds the first K of list, which has room for K entries, for C where K > LISTED. */
static void row_topk(uint64_t *list, const float *x, int64_t C, int64_t K, int largest)
{
    if (K > LISTED) {
        for (int64_t c = 0; c < C; c++) list[c] = entry_of(x[c], c, largest);
        qsort(list, (size_t)C, sizeof *list, descending);
        return;
    }
    for (int64_t k = 0; k < K; k++) list[k] = 0; /* less than the entry of any number */
    for (int64_t c = 0; c < C; c++) {
        const uint64_t entry = entry_of(x[c], c, largest);
        if (entry > list[K - 1]) neighbour_insert(list, K, entry);
    }
}

/* Finds values and index (N,K) of x (N,C). A row with NaN is VX_ENONFINITE, and nothing is written. Working space: a
 * list for each thread. */
int VX_CPU(topk)(vx_tensor *values, vx_tensor *index, vx_tensor *x, int largest)
{
    const int64_t N = x->shape[0], C = x->shape[1], K = values->shape[1], room = K > LISTED ? C : K;
    const float *in = vx_f32(x);
    int64_t bad = INT64_MAX;
#pragma omp parallel for schedule(static) reduction(min : bad) if (N * C >= SERIAL)
    for (int64_t n = 0; n < N; n++) {
        bool nan = false;
        for (int64_t c = 0; c < C; c++) nan |= in[n * C + c] != in[n * C + c];
        if (nan) bad = vx_min64(bad, n);
    }
    if (bad != INT64_MAX) return vx_fail(VX_ENONFINITE, "topk: row %lld holds a NaN", (long long)bad);
    uint64_t *lists = vx_scratch("topk", sizeof *lists * (size_t)(room * omp_get_max_threads()));
    if (!lists) return VX_ENOMEM;
#pragma omp parallel for schedule(static) if (N * C >= SERIAL)
    for (int64_t n = 0; n < N; n++) {
        uint64_t *list = lists + room * omp_get_thread_num();
        row_topk(list, in + n * C, C, K, largest);
        for (int64_t k = 0; k < K; k++) {
            const int32_t c = neighbour_row(list[k]);
            vx_i32(index)[n * K + k] = c;
            vx_f32(values)[n * K + k] = in[n * C + c];
        }
    }
    vx_scratch_free(lists);
    return VX_OK;
}
