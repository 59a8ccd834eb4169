/* memory.c: the pool under all tensors, with byte accounting.
 *
 * Why a pool on the CPU too: a training step frees and asks again for the same sizes, and a fresh mapping costs a page
 * fault per 4 KiB (about 1 GB/s), many times the work on it. Blocks are rounded up to a size class (eight per power of
 * two, so at most 1/8 is wasted) and kept in a list per class.
 *
 * On a device whose work is queued a freed block may still be in use by queued kernels. It may be handed out again at
 * once all the same, since whoever gets it queues its own work behind theirs: a device computes on one stream. Only
 * where blocks go back to the system must the queue be empty, which the backend's release sees to.
 *
 * A recorded graph (graph.c) touches the same addresses at every launch. So what is given back while it is recorded
 * goes into its arena, from which that recording alone takes again. Tensors made then go there whenever they are freed.
 * All of it counts as live until the graph is freed.
 *
 * Invariants: (1) live counts what callers asked for, rounded; (2) live + cached <= limit after every vx_pool_alloc;
 * (3) where the limit or the system says no, all cached blocks are given back and the request is tried once more; (4) a
 * failure leaves everything as it was.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

enum { CLASSES = 64 * 8, SMALLEST = 64 };

/* A cached block's record; kept outside the block, which may be device memory. */
typedef struct block {
    struct block *next;
    void *data;
    size_t bytes; /* in an arena */
} block;

struct vx_arena {
    block *free_list[CLASSES];
    block *exact;     /* blocks of no class, each used once */
    pthread_t thread; /* that records: another one's blocks have nothing to do with the graph */
    int device, refs; /* the graph's, and one per living tensor that was made during the recording */
    int64_t launches; /* of the graph */
    bool closed;      /* the graph is gone: what still comes goes to the pool */
};

typedef struct pool {
    block *free_list[CLASSES];
    vx_arena *arena; /* of the graph being recorded on the device */
    int64_t live, peak, cached, limit, storages;
    int keep; /* enum below */
} pool;

/* Without keeping, every block has exactly its size and goes back at once, so that each overrun and each use of freed
 * memory shows: under AddressSanitizer, by VERTEX_POOL=0 (for compute-sanitizer), or by vx_memory_pool(). */
enum { KEEP_UNSET = 0, KEEP_NOTHING, KEEP_BLOCKS };

static pool pools[VX_MAX_DEVICES];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static bool keeps(pool *p)
{
    if (p->keep == KEEP_UNSET) {
        const char *wish = getenv("VERTEX_POOL");
        p->keep = wish && !strcmp(wish, "0") ? KEEP_NOTHING : KEEP_BLOCKS;
#ifdef __SANITIZE_ADDRESS__
        p->keep = KEEP_NOTHING;
#endif
    }
    return p->keep == KEEP_BLOCKS;
}

/* Returns the class of a size; *rounded: the bytes its blocks have, 64, 72, 80 .. 128, 144, 160 ... */
static int size_class(size_t bytes, size_t *rounded)
{
    if (bytes < SMALLEST) bytes = SMALLEST;
    int log2 = 63 - __builtin_clzll((unsigned long long)bytes);
    size_t step = (size_t)1 << (log2 - 3);
    size_t eighths = (bytes + step - 1) / step; /* 8 .. 16 */
    *rounded = eighths * step;
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
    int64_t available;
    if (p->limit == 0 && backend->memory(ordinal, &p->limit, &available) != VX_OK) p->limit = INT64_MAX;
    return p->limit;
}

/* Takes a block from the system, if need be instead of all the cached ones. */
static int new_block(int device, const vx_backend *backend, int ordinal, int64_t bytes, void **out)
{
    pool *p = &pools[device];
    int64_t limit = limit_of(device, backend, ordinal);
    if (bytes > limit - p->live) return VX_ENOMEM;
    if (p->live + p->cached + bytes > limit) flush(device, backend, ordinal);
    int status = backend->alloc(ordinal, (size_t)bytes, out);
    if (status != VX_ENOMEM || !p->cached) return status;
    flush(device, backend, ordinal);
    return backend->alloc(ordinal, (size_t)bytes, out);
}

static int no_memory(int device, const vx_backend *backend, int ordinal, size_t bytes)
{
    const pool *p = &pools[device];
    char name[64];
    int64_t total, available = 0;
    vx_device_name(device, name, sizeof name);
    backend->memory(ordinal, &total, &available);
    return vx_fail(
        VX_ENOMEM,
        "out of memory on %s: asked %.1f MB, free on the device %.1f MB, live %.1f MB, cached %.1f MB, limit %.1f MB",
        name, (double)bytes / 1e6, (double)available / 1e6, (double)p->live / 1e6, (double)p->cached / 1e6,
        (double)p->limit / 1e6);
}

/* Returns the arena of the recording that this thread makes on the pool's device; NULL where it makes none. */
static vx_arena *arena_here(const pool *p)
{
    return p->arena && pthread_equal(p->arena->thread, pthread_self()) ? p->arena : NULL;
}

int vx_pool_alloc(int device, size_t *bytes, void **out)
{
    int ordinal, status = VX_OK;
    const vx_backend *backend = vx_backend_of(device, &ordinal);
    pthread_mutex_lock(&mutex);
    pool *p = &pools[device];
    size_t asked = *bytes;
    block *b = NULL;
    vx_arena *arena = arena_here(p);
    bool ours = false; /* the arena's block, which counts as live already */
    if (keeps(p)) {
        int class = size_class(asked, bytes);
        ours = arena && arena->free_list[class];
        block **list = ours ? &arena->free_list[class] : &p->free_list[class];
        b = *list;
        if (b) *list = b->next;
    }
    if (b) {
        if (!ours) p->cached -= (int64_t)*bytes;
        *out = b->data;
        free(b);
    } else {
        status = new_block(device, backend, ordinal, (int64_t)*bytes, out);
    }
    if (status == VX_OK) {
        if (!ours) p->live += (int64_t)*bytes;
        p->storages++;
        if (p->live > p->peak) p->peak = p->live;
    } else if (status == VX_ENOMEM) {
        no_memory(device, backend, ordinal, asked);
    }
    pthread_mutex_unlock(&mutex);
    return status;
}

/* Gives a block to the pool; b, its record, may be NULL. The mutex is held. */
static void to_pool(int device, block *b, void *data, size_t bytes)
{
    int ordinal;
    const vx_backend *backend = vx_backend_of(device, &ordinal);
    size_t rounded;
    int class = size_class(bytes, &rounded);
    pool *p = &pools[device];
    p->live -= (int64_t)bytes;
    if (b && keeps(p) && bytes == rounded) {
        *b = (block){.next = p->free_list[class], .data = data};
        p->free_list[class] = b;
        p->cached += (int64_t)bytes;
    } else {
        backend->release(ordinal, data, bytes);
        free(b);
    }
}

/* Gives a block to an arena. Without a record for it the block is lost, since what has been recorded may use it. The
 * mutex is held. */
static void to_arena(vx_arena *arena, block *b, void *data, size_t bytes)
{
    size_t rounded;
    int class = size_class(bytes, &rounded);
    if (!b) return;
    block **list = keeps(&pools[arena->device]) && bytes == rounded ? &arena->free_list[class] : &arena->exact;
    *b = (block){.next = *list, .data = data, .bytes = bytes};
    *list = b;
}

void vx_pool_free(int device, void *data, size_t bytes)
{
    block *b = malloc(sizeof *b);
    pthread_mutex_lock(&mutex);
    pool *p = &pools[device];
    p->storages--;
    vx_arena *arena = arena_here(p);
    if (arena) to_arena(arena, b, data, bytes);
    else to_pool(device, b, data, bytes);
    pthread_mutex_unlock(&mutex);
}

/* -- What belongs to a recorded graph ------------------------------------------------------------------------------ */

static void let_go(vx_arena *arena)
{
    if (--arena->refs == 0) free(arena);
}

vx_arena *vx_arena_begin(int device)
{
    vx_arena *arena = calloc(1, sizeof *arena);
    if (!arena) return NULL;
    arena->device = device;
    arena->thread = pthread_self();
    arena->refs = 1;
    pthread_mutex_lock(&mutex);
    pools[device].arena = arena;
    pthread_mutex_unlock(&mutex);
    return arena;
}

void vx_arena_end(vx_arena *arena)
{
    pthread_mutex_lock(&mutex);
    pools[arena->device].arena = NULL;
    pthread_mutex_unlock(&mutex);
}

void vx_arena_launched(vx_arena *arena) { arena->launches++; }
int64_t vx_arena_launches(const vx_arena *arena) { return arena ? arena->launches : 0; }

void vx_arena_free(vx_arena *arena)
{
    pthread_mutex_lock(&mutex);
    arena->closed = true;
    for (int c = 0; c <= CLASSES; c++) {
        block **list = c < CLASSES ? &arena->free_list[c] : &arena->exact;
        while (*list) {
            block *b = *list;
            *list = b->next;
            to_pool(arena->device, b, b->data, b->bytes);
        }
    }
    let_go(arena);
    pthread_mutex_unlock(&mutex);
}

/* -- Storages ------------------------------------------------------------------------------------------------------ */

/* Returns the arena of the recording under way, with one reference more, for a storage that is made now; NULL where
 * nothing is recorded. */
static vx_arena *arena_of(int device)
{
    pthread_mutex_lock(&mutex);
    vx_arena *arena = arena_here(&pools[device]);
    if (arena) arena->refs++;
    pthread_mutex_unlock(&mutex);
    return arena;
}

/* Takes back the block of a storage that was made during a recording, and its reference. */
static void arena_release(vx_arena *arena, void *data, size_t bytes)
{
    block *b = malloc(sizeof *b);
    pthread_mutex_lock(&mutex);
    pools[arena->device].storages--;
    if (arena->closed) to_pool(arena->device, b, data, bytes);
    else to_arena(arena, b, data, bytes);
    let_go(arena);
    pthread_mutex_unlock(&mutex);
}

int vx_storage_new(vx_storage **out, int device, size_t bytes)
{
    vx_storage *s = calloc(1, sizeof *s);
    if (!s) return vx_fail(VX_ENOMEM, "out of memory for a tensor's header");
    *s = (vx_storage){.device = device, .bytes = bytes, .held = bytes};
    int status = vx_pool_alloc(device, &s->held, &s->data);
    if (status) {
        free(s);
        return status;
    }
    atomic_init(&s->refs, 1);
    s->arena = arena_of(device);
    *out = s;
    return VX_OK;
}

void vx_storage_drop(vx_storage *s)
{
    if (atomic_fetch_sub_explicit(&s->refs, 1, memory_order_acq_rel) != 1) return;
    if (s->arena) arena_release(s->arena, s->data, s->held);
    else vx_pool_free(s->device, s->data, s->held);
    free(s);
}

/* -- Working space of kernels: 64 bytes in front of it remember the size ------------------------------------------- */

void *vx_scratch(const char *op, size_t bytes)
{
    void *p;
    size_t held = bytes + 64;
    int status = vx_pool_alloc(0, &held, &p);
    if (status) {
        vx_fail_because(status, "%s", op);
        return NULL;
    }
    *(size_t *)p = held;
    return (char *)p + 64;
}

void vx_scratch_free(void *p)
{
    if (!p) return;
    char *start = (char *)p - 64;
    vx_pool_free(0, start, *(size_t *)start);
}

/* -- Public -------------------------------------------------------------------------------------------------------- */

int vx_memory(int device, vx_memory_info *info)
{
    int status = vx_device_check("memory", device), ordinal;
    if (status) return status;
    const vx_backend *backend = vx_backend_of(device, &ordinal);
    pthread_mutex_lock(&mutex);
    const pool *p = &pools[device];
    *info = (vx_memory_info){.limit = limit_of(device, backend, ordinal),
                             .live = p->live,
                             .peak = p->peak,
                             .cached = p->cached,
                             .tensors = p->storages};
    pthread_mutex_unlock(&mutex);
    return VX_OK;
}

int vx_memory_limit(int device, int64_t bytes)
{
    int status = vx_device_check("memory limit", device);
    if (status) return status;
    if (bytes < 0) return vx_fail(VX_EINVAL, "memory limit: %lld bytes, expected 0 or more", (long long)bytes);
    pthread_mutex_lock(&mutex);
    pools[device].limit = bytes;
    pthread_mutex_unlock(&mutex);
    return VX_OK;
}

int vx_memory_flush(int device)
{
    int status = vx_device_check("memory flush", device), ordinal;
    if (status) return status;
    const vx_backend *backend = vx_backend_of(device, &ordinal);
    status = backend->sync(ordinal);
    pthread_mutex_lock(&mutex);
    flush(device, backend, ordinal);
    pthread_mutex_unlock(&mutex);
    return status;
}

int vx_memory_pool(int device, int on)
{
    int status = vx_memory_flush(device);
    if (status) return status;
    pthread_mutex_lock(&mutex);
    pools[device].keep = on ? KEEP_BLOCKS : KEEP_NOTHING;
    pthread_mutex_unlock(&mutex);
    return VX_OK;
}

int vx_memory_reset_peak(int device)
{
    int status = vx_device_check("memory peak", device);
    if (status) return status;
    pthread_mutex_lock(&mutex);
    pools[device].peak = pools[device].live;
    pthread_mutex_unlock(&mutex);
    return VX_OK;
}
