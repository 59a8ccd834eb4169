/* memory.c: the pool under all tensors, with byte accounting.
 *
 * Why a pool on the CPU too: a training step frees and asks again for the same sizes, and a fresh mapping costs a page fault
 * per 4 KiB (about 1 GB/s), many times the work on it. Blocks are rounded up to a size class (eight per power of two, so at
 * most 1/8 is wasted) and kept in a list per class.
 *
 * Invariants: (1) live counts what callers asked for, rounded; (2) live + cached <= limit after every vx_memory_take; (3) where
 * the limit or the system says no, all cached blocks are given back and the request is tried once more; (4) a failure leaves
 * everything as it was.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"

enum { MAX_DEVICES = 64, CLASSES = 64 * 8, SMALLEST = 64 };

/* A cached block's record; kept outside the block, which may be device memory. */
typedef struct block {
    struct block *next;
    void *data;
} block;

/* Under AddressSanitizer every block has exactly its size and goes back at once, so that each overrun and each use of freed
 * memory shows. */
#ifdef __SANITIZE_ADDRESS__
enum { KEEP_BLOCKS = 0 };
#else
enum { KEEP_BLOCKS = 1 };
#endif

typedef struct pool {
    block *free_list[CLASSES];
    int64_t live, peak, cached, limit, storages;
} pool;

static pool pools[MAX_DEVICES];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

/* The class of a size and the bytes its blocks have: 64, 72, 80 .. 128, 144, 160 ... */
static int size_class(size_t bytes, size_t *rounded)
{
    if (bytes < SMALLEST) bytes = SMALLEST;
    int log2 = 63 - __builtin_clzll((unsigned long long)bytes);
    size_t step = (size_t)1 << (log2 - 3);
    size_t eighths = (bytes + step - 1) / step; /* 8 .. 16 */
    *rounded = KEEP_BLOCKS ? eighths * step : bytes;
    return log2 * 8 + (int)(eighths - 8);
}

static void flush(int device, const vx_backend *backend, int ordinal)
{
    pool *p = &pools[device];
    for (int c = 0; c < CLASSES; c++)
        while (p->free_list[c]) {
            block *b = p->free_list[c];
            p->free_list[c] = b->next;
            backend->release(ordinal, b->data, 0);
            free(b);
        }
    p->cached = 0;
}

static int64_t limit_of(int device, const vx_backend *backend, int ordinal)
{
    pool *p = &pools[device];
    if (p->limit == 0 && backend->capacity(ordinal, &p->limit) != VX_OK) p->limit = INT64_MAX;
    return p->limit;
}

int vx_memory_take(int device, size_t bytes, void **out)
{
    int ordinal;
    const vx_backend *backend = vx_backend_of(device, &ordinal);
    size_t rounded;
    int class = size_class(bytes, &rounded), status = VX_OK;
    pthread_mutex_lock(&mutex);
    pool *p = &pools[device];
    int64_t limit = limit_of(device, backend, ordinal);
    block *b = p->free_list[class];
    if (b) {
        p->free_list[class] = b->next;
        p->cached -= (int64_t)rounded;
        *out = b->data;
        free(b);
    } else {
        bool fits = (int64_t)rounded <= limit - p->live;
        if (p->cached && (!fits || p->live + p->cached + (int64_t)rounded > limit)) flush(device, backend, ordinal);
        status = fits ? backend->alloc(ordinal, rounded, out) : VX_ENOMEM;
        if (status == VX_ENOMEM && fits && p->cached) {
            flush(device, backend, ordinal);
            status = backend->alloc(ordinal, rounded, out);
        }
    }
    if (status == VX_OK) {
        p->live += (int64_t)rounded;
        p->storages++;
        if (p->live > p->peak) p->peak = p->live;
    } else if (status == VX_ENOMEM) {
        char name[64];
        vx_device_name(device, name, sizeof name);
        vx_fail(VX_ENOMEM, "out of memory on %s: asked %.1f MB, live %.1f MB, cached %.1f MB, limit %.1f MB", name, (double)bytes / 1e6,
                (double)p->live / 1e6, (double)p->cached / 1e6, (double)limit / 1e6);
    }
    pthread_mutex_unlock(&mutex);
    return status;
}

void vx_memory_give(int device, void *data, size_t bytes)
{
    int ordinal;
    const vx_backend *backend = vx_backend_of(device, &ordinal);
    size_t rounded;
    int class = size_class(bytes, &rounded);
    block *b = KEEP_BLOCKS ? malloc(sizeof *b) : 0;
    pthread_mutex_lock(&mutex);
    pool *p = &pools[device];
    p->live -= (int64_t)rounded;
    p->storages--;
    if (b) {
        *b = (block){.next = p->free_list[class], .data = data};
        p->free_list[class] = b;
        p->cached += (int64_t)rounded;
    } else {
        backend->release(ordinal, data, rounded);
    }
    pthread_mutex_unlock(&mutex);
}

/* -- Working space of kernels: a header in front remembers the size ----------------------------------------------------- */

void *vx_scratch(const char *op, size_t bytes)
{
    void *p;
    int status = vx_memory_take(0, bytes + 64, &p);
    if (status) {
        char text[512];
        snprintf(text, sizeof text, "%s", vx_error());
        vx_fail(status, "%s: %s", op, text);
        return 0;
    }
    *(size_t *)p = bytes + 64;
    return (char *)p + 64;
}

void vx_scratch_free(void *p)
{
    if (!p) return;
    char *start = (char *)p - 64;
    vx_memory_give(0, start, *(size_t *)start);
}

/* -- Public ---------------------------------------------------------------------------------------------------------------- */

int vx_memory(int device, vx_memory_info *info)
{
    int ordinal;
    const vx_backend *backend = vx_backend_of(device, &ordinal);
    pthread_mutex_lock(&mutex);
    const pool *p = &pools[device];
    *info = (vx_memory_info){.limit = limit_of(device, backend, ordinal), .live = p->live, .peak = p->peak, .cached = p->cached,
                             .tensors = p->storages};
    pthread_mutex_unlock(&mutex);
    return VX_OK;
}

int vx_memory_limit(int device, int64_t bytes)
{
    if (bytes < 0) return vx_fail(VX_EINVAL, "memory limit: %lld bytes, expected 0 or more", (long long)bytes);
    pthread_mutex_lock(&mutex);
    pools[device].limit = bytes;
    pthread_mutex_unlock(&mutex);
    return VX_OK;
}

int vx_memory_flush(int device)
{
    int ordinal;
    const vx_backend *backend = vx_backend_of(device, &ordinal);
    int status = backend->sync(ordinal);
    pthread_mutex_lock(&mutex);
    flush(device, backend, ordinal);
    pthread_mutex_unlock(&mutex);
    return status;
}

int vx_memory_reset_peak(int device)
{
    pthread_mutex_lock(&mutex);
    pools[device].peak = pools[device].live;
    pthread_mutex_unlock(&mutex);
    return VX_OK;
}
