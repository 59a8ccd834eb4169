/* cache.h: what a source's workers keep of items, so that the next epoch need not make it again.
 *
 * A blob is published by one compare-and-swap and stays until the cache is freed: reading takes no lock. The cache is
 * filled once and never evicts: under a shuffled order the next use of any item is equally far away.
 */
#ifndef VX_CACHE_H
#define VX_CACHE_H

#include <stdatomic.h>
#include <stdint.h>

/* Zero-initialized is empty, without room. */
typedef struct vx_cache {
    int64_t count;
    _Atomic(void *) *blobs;
    atomic_llong left; /* bytes */
} vx_cache;

/* Makes a cache of `bytes` bytes for items 0 .. count - 1; op names the caller. VX_ENOMEM. */
int vx_cache_init(vx_cache *cache, const char *op, int64_t count, int64_t bytes);
void vx_cache_free(vx_cache *cache);

/* Gives an item's blob; NULL where it has none. */
const void *vx_cache_get(vx_cache *cache, int64_t item);

/* Gives room for a blob of `bytes` bytes, to be filled and published; NULL where the cache is full. */
void *vx_cache_reserve(vx_cache *cache, int64_t bytes);

/* Publishes a blob from vx_cache_reserve(), or frees it where another worker has made the same one meanwhile. */
void vx_cache_publish(vx_cache *cache, int64_t item, void *blob, int64_t bytes);

#endif
