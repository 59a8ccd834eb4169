/* cache.c: blobs by item that many threads read without a lock (cache.h). */
#include <stdlib.h>

#include "cache.h"
#include "core/internal.h"

int vx_cache_init(vx_cache *cache, const char *op, int64_t count, int64_t bytes)
{
    cache->blobs = calloc((size_t)count, sizeof *cache->blobs);
    if (!cache->blobs) return vx_fail(VX_ENOMEM, "%s: out of memory for %lld items", op, (long long)count);
    cache->count = count;
    atomic_init(&cache->left, bytes);
    return VX_OK;
}

void vx_cache_free(vx_cache *cache)
{
    for (int64_t i = 0; i < cache->count; i++) free(atomic_load(&cache->blobs[i]));
    free(cache->blobs);
}

const void *vx_cache_get(vx_cache *cache, int64_t item)
{
    return atomic_load_explicit(&cache->blobs[item], memory_order_acquire);
}

void *vx_cache_reserve(vx_cache *cache, int64_t bytes)
{
    void *blob = atomic_fetch_sub(&cache->left, bytes) >= bytes ? malloc((size_t)bytes) : NULL;
    if (!blob) atomic_fetch_add(&cache->left, bytes);
    return blob;
}

void vx_cache_publish(vx_cache *cache, int64_t item, void *blob, int64_t bytes)
{
    void *none = NULL;
    if (atomic_compare_exchange_strong(&cache->blobs[item], &none, blob)) return;
    free(blob);
    atomic_fetch_add(&cache->left, bytes);
}
