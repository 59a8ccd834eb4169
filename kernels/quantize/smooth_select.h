/* smooth_select.h: the K rows nearest to each vertex, found while a block's logits are in the cache.
 *
 * Every thread has a list of each vertex's K best rows so far (shared/neighbours.h says in which order), and beside it
 * the vertex's threshold, the K-th key of that list. A row whose key does not pass the threshold cannot be among the K
 * nearest. Keys are compared a panel of 64 vertices at a time, and hardly any passes once a few thousand rows are seen.
 * smooth.c merges the lists of the threads, which gives the same K rows whatever each thread saw.
 */
#ifndef VX_SMOOTH_SELECT_H
#define VX_SMOOTH_SELECT_H

#include "shared/neighbours.h"
#include "smooth_sweep.h"

enum { SELECT_STRIP = 16 /* panels whose thresholds a row is compared with before the next row is */ };

/* Returns a bit for each of the panel's keys that passes its threshold. */
VX_INLINE uint64_t panel_hits(const vf key[VECTORS], const vf threshold[VECTORS])
{
    uint64_t hits = 0;
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; v++) hits |= (uint64_t)vf_greater_bits(key[v], threshold[v]) << (v * VX_LANES);
    return hits;
}

/* Offers a row to the lists (S, each) of a panel's vertices whose thresholds (least, as loaded) its keys pass; slots
 * (64): the panel's vertices. Returns whether any did. */
VX_INLINE int offer_keys(const int32_t *slots, uint64_t *lists, int64_t each, const vf key[VECTORS],
                         const vf least[VECTORS], float *threshold, int64_t row)
{
    float keys[PANEL];
    if (!vf_any_greater(VECTORS, key, least)) return 0;
    memcpy(keys, key, sizeof keys);
    for (uint64_t hits = panel_hits(key, least); hits; hits &= hits - 1) {
        int m = __builtin_ctzll(hits);
        threshold[m] = neighbour_insert(lists + slots[m] * each, each, neighbour_pack(keys[m], row));
    }
    return 1;
}

/* Offers the block's rows to the lists of the vertices whose thresholds their keys pass. knn-ce: key = log2 pi = s -
 * log2(sum). knn-l2: key = 2 pi - |pi|^2, which is 1 - distance. */
static inline void select_rows(const forward *f, worker *t, int64_t first, int rows, int64_t shard)
{
    const smooth_call *c = &f->c;
    const int64_t each = c->K / c->shards;
    float *thresholds = t->threshold + shard * c->Mp;
    uint64_t *lists = t->lists + shard * c->S * each;
    const int ce = c->regularizer == VX_REG_KNN_CE;
    float factor[MOST_ROWS], offset[MOST_ROWS];
    for (int i = 0; i < rows; i++) {
        float sum = vf_sum(t->sum[i]);
        factor[i] = ce ? 1 : 2 / sum;
        offset[i] = ce ? -log2f(sum) : -(vf_sum(t->squares[i]) / sum / sum);
    }
    const float *source = ce ? t->s : t->e;
    /* backwards: the panels met last are still in the cache */
    for (int64_t strip = (c->panels - 1) / SELECT_STRIP * SELECT_STRIP; strip >= 0; strip -= SELECT_STRIP)
        for (int i = 0; i < rows; i++)
            for (int64_t panel = strip; panel < vx_min64(strip + SELECT_STRIP, c->panels); panel++) {
                const float *x = source + i * c->Mp + panel * PANEL;
                float *threshold = thresholds + panel * PANEL;
                vf key[VECTORS], least[VECTORS];
#pragma GCC unroll 16
                for (int v = 0; v < VECTORS; v++) {
                    key[v] = vf_load(x + v * VX_LANES) * factor[i] + offset[i];
                    least[v] = vf_load(threshold + v * VX_LANES);
                }
                offer_keys(f->slot + panel * PANEL, lists, each, key, least, threshold, first + i);
            }
}

#endif
