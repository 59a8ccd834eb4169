/* stream.c: worker threads that decode, resize, crop and flip images ahead of the training loop.
 *
 * Idea. Everything random is a function of (seed, epoch, file), and every sample has a number, its place in the stream.
 * The workers take numbers in order and put what they make into a ring, number modulo length; the consumer empties the
 * ring in order. Which worker made a sample, and when, leaves no trace in the batches.
 *
 *   ring   | 12 made | 13 made | 14 at work | 15 at work | 16 free | ...        capacity = queue
 *            ^ taken (next for the consumer)               ^ claimed (next for a worker)
 *
 * Requirements
 *   1. One mutex guards the ring, the counters, the order of the epoch and file_broken. A slot's buffer belongs to the
 *      worker
 *      that claimed it until the slot is MADE, then to the consumer.
 *   2. A worker's result depends on its sample alone, never on what another worker has found: it tries a file again
 *      unless the
 *      *consumer* has met it as broken. So the list of broken files, too, is in the order of the stream.
 *   3. The consumer swaps good buffers out of the ring into `pending` until a batch is whole. A wait that is
 *      interrupted
 *      loses nothing, and the queue may be shorter than a batch.
 *   4. A cached image is published by one compare-and-swap and stays until the loader is freed: reading it takes no
 *      lock.
 *      The cache is filled once and never evicted: under a shuffled order the next use of any image is equally far
 *      away.
 *   5. Threads never see a signal and never enter Lua; vx_loader_free() waits for at most one image per worker.
 */
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pixels.h"
#include "core/rng.h"
#include "core/tensor.h"

/* Philox streams: the kind of draw in the upper half, the epoch in the lower. */
#define STREAM_ORDER (UINT64_C(0x6c6f6164) << 32)
#define STREAM_CROP (UINT64_C(0x63726f70) << 32)

enum { FREE = 0, AT_WORK, MADE };
enum { REASON = 256, POLL_MS = 50 };

typedef struct slot {
    int state, status; /* status and reason: why there are no pixels */
    int32_t file;
    uint8_t *pixels; /* (size, size, 3) */
    char reason[REASON];
} slot;

typedef struct cached {
    int64_t height, width;
    uint8_t pixels[];
} cached;

typedef struct broken {
    int32_t file;
    char reason[REASON];
} broken;

typedef struct worker {
    struct vx_loader *loader;
    pthread_t thread;
    vx_decoder decoder;
    vx_pixels image;
    vx_bytes resized, scratch;
} worker;

struct vx_loader {
    vx_loader_options o;
    char *text; /* the paths; NULL: procedural */
    const char **paths;
    size_t sample_bytes;
    int64_t samples;     /* of this shard, all epochs; -1 without end */
    float table[3][256]; /* standardized value of each byte */

    pthread_mutex_t lock;
    pthread_cond_t room, made;
    bool sync_ready, stop;
    int64_t claimed, taken; /* samples, 0 is the one at the starting position */
    int64_t order_epoch;
    int32_t *order;
    uint8_t *file_broken;
    slot *ring;
    int64_t capacity;

    _Atomic(cached *) *cache;
    atomic_llong cache_left;

    worker *workers;
    int started;

    /* the consumer's alone */
    uint8_t **pending;
    int32_t *pending_file;
    int filled;
    int64_t delivered; /* samples used up by the batches handed out */
    int64_t fruitless; /* broken samples since the last good one */
    broken *list;
    int64_t list_count, list_known, list_capacity; /* known: those of delivered batches */
    int failure;                                   /* once set, every next() says so again */
    char failure_text[1024];
};

/* -- The stream ---------------------------------------------------------------------------------------------------- */

static int64_t raw_position(const vx_loader *l, int64_t sample)
{
    return l->o.position + l->o.shard + sample * l->o.shards;
}

/* A uniform integer below n from 64 random bits; the bias is below n / 2^64. */
static int64_t below(const vx_philox4 *r, int pair, int64_t n)
{
    uint64_t bits = (uint64_t)r->word[pair * 2 + 1] << 32 | r->word[pair * 2];
    return (int64_t)((unsigned __int128)bits * (uint64_t)n >> 64);
}

/* Fisher and Yates's shuffle of the files. */
static void draw_order(vx_loader *l, int64_t epoch)
{
    for (int64_t i = 0; i < l->o.count; i++) l->order[i] = (int32_t)i;
    for (int64_t i = l->o.count - 1; i > 0; i--) {
        vx_philox4 r = vx_philox((uint64_t)l->o.seed, STREAM_ORDER + (uint64_t)epoch, (uint64_t)i);
        int64_t j = below(&r, 0, i + 1);
        int32_t t = l->order[i];
        l->order[i] = l->order[j];
        l->order[j] = t;
    }
    l->order_epoch = epoch;
}

/* -- Workers ------------------------------------------------------------------------------------------------------- */

/* Nearest size with short side `size`, the long one cut to whole pixels (torchvision's Resize). */
static int target_size(const vx_loader *l, int64_t height, int64_t width, int64_t *h, int64_t *w)
{
    int64_t size = l->o.size, shorter = height < width ? height : width;
    *h = height;
    *w = width;
    if (shorter == size || (l->o.resize == VX_RESIZE_NONE && shorter > size)) return VX_OK;
    *h = height <= width ? size : size * height / width;
    *w = height <= width ? size * width / height : size;
    if (*h > VX_IMAGE_MAX_PIXELS / *w)
        return vx_fail(VX_EIO, "%lld x %lld is too elongated: a short side of %lld makes it %lld x %lld",
                       (long long)width, (long long)height, (long long)size, (long long)*w, (long long)*h);
    return VX_OK;
}

/* (d / 2) rounded half to even, as torchvision's CenterCrop places it. */
static int64_t centered(int64_t d) { return d / 2 + (d & 1 & (d / 2)); }

/* A window of an image: `height` rows of `width` pixels, `row` pixels from one to the next. */
typedef struct window {
    const uint8_t *pixels;
    int64_t height, width, row;
} window;

static window part(window w, int64_t top, int64_t left, int64_t size)
{
    return (window){w.pixels + (top * w.row + left) * 3, size, size, w.row};
}

static void copy_rows(uint8_t *dst, window w)
{
    for (int64_t y = 0; y < w.height; y++) memcpy(dst + y * w.width * 3, w.pixels + y * w.row * 3, (size_t)w.width * 3);
}

/* Makes the image of a file, resized, in the worker's buffers. */
static int make_image(worker *w, int32_t file, window *out)
{
    vx_loader *l = w->loader;
    int64_t height = l->o.size, width = l->o.size;
    if (!l->paths) {
        int status = vx_bytes_reserve(&w->resized, l->sample_bytes);
        if (!status)
            vx_pixels_procedural(w->resized.data, height, width, (uint64_t)l->o.image_seed,
                                 (uint64_t)(l->o.first + file));
        *out = (window){w->resized.data, height, width, width};
        return status;
    }
    int status = vx_decoder_file(&w->decoder, l->paths[file], &w->image);
    if (!status) status = target_size(l, w->image.height, w->image.width, &height, &width);
    if (status) return status;
    *out = (window){w->image.bytes.data, height, width, width};
    if (height == w->image.height && width == w->image.width) return VX_OK;
    status = vx_bytes_reserve(&w->resized, (size_t)height * width * 3);
    if (!status)
        status = vx_pixels_resize(w->resized.data, height, width, w->image.bytes.data, w->image.height, w->image.width,
                                  l->o.filter, &w->scratch);
    out->pixels = w->resized.data;
    return status;
}

/* Keeps a copy of the image where the cache has room. */
static void keep(vx_loader *l, int32_t file, window image)
{
    int64_t bytes = (int64_t)sizeof(cached) + image.height * image.width * 3;
    cached *c = NULL, *none = NULL;
    if (atomic_fetch_sub(&l->cache_left, bytes) >= bytes) c = malloc((size_t)bytes);
    if (c) {
        c->height = image.height;
        c->width = image.width;
        copy_rows(c->pixels, image);
        if (atomic_compare_exchange_strong(&l->cache[file], &none, c)) return;
        free(c); /* another worker met the same file at the same time */
    }
    atomic_fetch_add(&l->cache_left, bytes);
}

/* The image before random crop and flip, from the cache or made now; it stays where it is until the worker's next call.
 * What a center crop drops is dropped here, before it is cached. */
static int prepared(worker *w, int32_t file, window *image)
{
    vx_loader *l = w->loader;
    const cached *c = atomic_load_explicit(&l->cache[file], memory_order_acquire);
    if (c) {
        *image = (window){c->pixels, c->height, c->width, c->width};
        return VX_OK;
    }
    int status = make_image(w, file, image);
    if (status) return status;
    if (l->o.crop == VX_CROP_CENTER)
        *image = part(*image, centered(image->height - l->o.size), centered(image->width - l->o.size), l->o.size);
    keep(l, file, *image);
    return VX_OK;
}

static int make_sample(worker *w, uint8_t *to, int32_t file, int64_t epoch)
{
    vx_loader *l = w->loader;
    window image;
    int64_t size = l->o.size;
    int status = prepared(w, file, &image);
    if (status) return status;
    vx_philox4 place = vx_philox((uint64_t)l->o.seed, STREAM_CROP + (uint64_t)epoch, (uint64_t)file * 2);
    vx_philox4 mirror = vx_philox((uint64_t)l->o.seed, STREAM_CROP + (uint64_t)epoch, (uint64_t)file * 2 + 1);
    copy_rows(to,
              part(image, below(&place, 0, image.height - size + 1), below(&place, 1, image.width - size + 1), size));
    if (l->o.flip && mirror.word[0] >> 31) {
        for (int64_t y = 0; y < size; y++) {
            uint8_t *a = to + y * size * 3, *b = a + (size - 1) * 3;
            for (; a < b; a += 3, b -= 3) {
                for (int c = 0; c < 3; c++) {
                    uint8_t t = a[c];
                    a[c] = b[c];
                    b[c] = t;
                }
            }
        }
    }
    return VX_OK;
}

static void *work(void *argument)
{
    worker *w = argument;
    vx_loader *l = w->loader;
    pthread_mutex_lock(&l->lock);
    for (;;) {
        while (!l->stop && l->claimed - l->taken >= l->capacity && l->claimed != l->samples)
            pthread_cond_wait(&l->room, &l->lock);
        if (l->stop || l->claimed == l->samples) break;
        int64_t sample = l->claimed++;
        int64_t raw = raw_position(l, sample), epoch = raw / l->o.count, place = raw % l->o.count;
        slot *s = &l->ring[sample % l->capacity];
        if (l->o.shuffle && epoch != l->order_epoch) draw_order(l, epoch);
        s->file = l->o.shuffle ? l->order[place] : (int32_t)place;
        s->state = AT_WORK;
        bool known = l->file_broken[s->file];
        pthread_mutex_unlock(&l->lock);

        s->status = known ? VX_EIO : make_sample(w, s->pixels, s->file, epoch);
        if (s->status && !known) snprintf(s->reason, sizeof s->reason, "%s", vx_error());

        pthread_mutex_lock(&l->lock);
        s->state = MADE;
        if (sample == l->taken) pthread_cond_signal(&l->made);
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}

/* -- Life ---------------------------------------------------------------------------------------------------------- */

static int check_options(const vx_loader_options *o, bool procedural)
{
    struct {
        const char *name;
        long long value, low, high;
    } bounds[] = {
        {"count", o->count, 1, INT32_MAX},
        {"first", o->first, 0, INT64_MAX - INT32_MAX},
        {"epochs", o->epochs, 0, INT64_C(1) << 31},
        {"position", o->position, 0, INT64_C(1) << 53},
        {"shards", o->shards, 1, 1 << 20},
        {"shard", o->shard, 0, o->shards - 1},
        {"cache_bytes", o->cache_bytes, 0, INT64_C(1) << 53},
        {"size", o->size, 1, 8192},
        {"batch", o->batch, 1, 1 << 20},
        {"workers", o->workers, 1, 256},
        {"queue", o->queue, 0, 1 << 20},
        {"resize", o->resize, VX_RESIZE_SHORT, VX_RESIZE_NONE},
        {"filter", o->filter, VX_BILINEAR, VX_BICUBIC},
        {"crop", o->crop, VX_CROP_CENTER, VX_CROP_RANDOM},
        {"flip", o->flip, 0, 1},
        {"shuffle", o->shuffle, 0, 1},
        {"strict", o->strict, 0, 1},
    };
    if (o->count == 0 && !procedural) return vx_fail(VX_EINVAL, "loader: no files");
    for (size_t i = 0; i < sizeof bounds / sizeof *bounds; i++)
        if (bounds[i].value < bounds[i].low || bounds[i].value > bounds[i].high)
            return vx_fail(VX_EINVAL, "loader: %s is %lld, allowed are %lld to %lld", bounds[i].name, bounds[i].value,
                           bounds[i].low, bounds[i].high);
    for (int c = 0; c < 3; c++)
        if (!isfinite(o->mean[c]) || !isfinite(o->std[c]) || o->std[c] <= 0)
            return vx_fail(VX_EINVAL, "loader: mean %g and std %g of channel %d make no standardization", o->mean[c],
                           o->std[c], c);
    return VX_OK;
}

static int copy_paths(vx_loader *l, const char *paths, size_t bytes)
{
    l->text = malloc(bytes ? bytes : 1);
    l->paths = calloc((size_t)l->o.count, sizeof *l->paths);
    if (!l->text || !l->paths) return vx_fail(VX_ENOMEM, "loader: out of memory for %lld paths", (long long)l->o.count);
    memcpy(l->text, paths, bytes);
    size_t at = 0;
    int64_t found = 0;
    while (at < bytes && found < l->o.count) {
        const char *end = memchr(l->text + at, 0, bytes - at);
        if (!end) break;
        l->paths[found++] = l->text + at;
        at = (size_t)(end - l->text) + 1;
    }
    if (found != l->o.count || at != bytes)
        return vx_fail(VX_EINVAL, "loader: %zu bytes do not hold the %lld paths announced", bytes,
                       (long long)l->o.count);
    return VX_OK;
}

static int allocate(vx_loader *l)
{
    l->ring = calloc((size_t)l->capacity, sizeof *l->ring);
    l->pending = calloc((size_t)l->o.batch, sizeof *l->pending);
    l->pending_file = calloc((size_t)l->o.batch, sizeof *l->pending_file);
    l->file_broken = calloc((size_t)l->o.count, 1);
    l->cache = calloc((size_t)l->o.count, sizeof *l->cache);
    l->order = l->o.shuffle ? malloc(sizeof *l->order * (size_t)l->o.count) : NULL;
    l->workers = calloc((size_t)l->o.workers, sizeof *l->workers);
    bool good = l->ring && l->pending && l->pending_file && l->file_broken && l->cache && l->workers &&
                (l->order || !l->o.shuffle);
    for (int64_t i = 0; good && i < l->capacity; i++) good = (l->ring[i].pixels = malloc(l->sample_bytes)) != NULL;
    for (int i = 0; good && i < l->o.batch; i++) good = (l->pending[i] = malloc(l->sample_bytes)) != NULL;
    if (!good)
        return vx_fail(VX_ENOMEM, "loader: out of memory for a queue of %lld and a batch of %d images of %zu bytes",
                       (long long)l->capacity, l->o.batch, l->sample_bytes);
    return VX_OK;
}

static int start(vx_loader *l)
{
    pthread_condattr_t clock;
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->room, NULL);
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC); /* its waits are timed */
    pthread_cond_init(&l->made, &clock);
    pthread_condattr_destroy(&clock);
    l->sync_ready = true;

    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* the threads inherit it */
    int error = 0;
    for (; !error && l->started < l->o.workers; l->started += !error) {
        worker *w = &l->workers[l->started];
        w->loader = l;
        error = pthread_create(&w->thread, NULL, work, w);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error ? vx_fail(VX_ENOMEM, "loader: thread %d of %d does not start: %s", l->started + 1, l->o.workers,
                           strerror(error))
                 : VX_OK;
}

int vx_loader_new(vx_loader **out, const char *paths, size_t bytes, const vx_loader_options *options)
{
    if (!out || !options) return vx_fail(VX_EINVAL, "loader: no options");
    int status = check_options(options, !paths);
    if (status) return status;
    vx_loader *l = calloc(1, sizeof *l);
    if (!l) return vx_fail(VX_ENOMEM, "loader: out of memory");
    l->o = *options;
    l->sample_bytes = (size_t)l->o.size * l->o.size * 3;
    l->capacity = l->o.queue ? l->o.queue : 2 * (int64_t)l->o.batch + l->o.workers;
    l->order_epoch = -1;
    atomic_init(&l->cache_left, l->o.cache_bytes);
    l->samples = -1;
    if (l->o.epochs) {
        int64_t rest = l->o.epochs * l->o.count - l->o.position - l->o.shard;
        l->samples = rest > 0 ? (rest + l->o.shards - 1) / l->o.shards : 0;
    }
    for (int c = 0; c < 3; c++)
        for (int v = 0; v < 256; v++)
            l->table[c][v] = (float)((v / 255.0 - (double)l->o.mean[c]) / (double)l->o.std[c]);
    if (paths) status = copy_paths(l, paths, bytes);
    if (!status) status = allocate(l);
    if (!status) status = start(l);
    if (status) vx_loader_free(l);
    else *out = l;
    return status;
}

void vx_loader_free(vx_loader *l)
{
    if (!l) return;
    if (l->sync_ready) {
        pthread_mutex_lock(&l->lock);
        l->stop = true;
        pthread_cond_broadcast(&l->room);
        pthread_mutex_unlock(&l->lock);
    }
    for (int i = 0; i < l->started; i++) {
        worker *w = &l->workers[i];
        pthread_join(w->thread, NULL);
        vx_decoder_release(&w->decoder);
        vx_bytes_release(&w->image.bytes);
        vx_bytes_release(&w->resized);
        vx_bytes_release(&w->scratch);
    }
    if (l->sync_ready) {
        pthread_cond_destroy(&l->made);
        pthread_cond_destroy(&l->room);
        pthread_mutex_destroy(&l->lock);
    }
    for (int64_t i = 0; l->ring && i < l->capacity; i++) free(l->ring[i].pixels);
    for (int i = 0; l->pending && i < l->o.batch; i++) free(l->pending[i]);
    for (int64_t i = 0; l->cache && i < l->o.count; i++) free(atomic_load(&l->cache[i]));
    free(l->ring);
    free(l->pending);
    free(l->pending_file);
    free(l->file_broken);
    free(l->cache);
    free(l->order);
    free(l->workers);
    free(l->list);
    free(l->paths);
    free(l->text);
    free(l);
}

/* -- Consumer ------------------------------------------------------------------------------------------------------ */

static const char *file_name(const vx_loader *l, int32_t file)
{
    return l->paths ? l->paths[file] : "procedural image";
}

static int fail_for_good(vx_loader *l, int status)
{
    l->failure = status;
    snprintf(l->failure_text, sizeof l->failure_text, "%s", vx_error());
    return status;
}

/* The slot holds no image: note the file, and say whether that ends the loader. */
static int meet_broken(vx_loader *l, const slot *s)
{
    l->fruitless++;
    if (s->status != VX_EIO) /* not the file's fault */
        return fail_for_good(l, vx_fail(s->status, "loader: %s: %s", file_name(l, s->file), s->reason));
    if (!l->file_broken[s->file]) {
        l->file_broken[s->file] = 1;
        if (l->list_count == l->list_capacity) {
            int64_t capacity = l->list_capacity ? l->list_capacity * 2 : 16;
            broken *list = realloc(l->list, sizeof *list * (size_t)capacity);
            if (!list)
                return fail_for_good(l, vx_fail(VX_ENOMEM, "loader: out of memory for the list of broken files"));
            l->list = list;
            l->list_capacity = capacity;
        }
        broken *b = &l->list[l->list_count++];
        b->file = s->file;
        memcpy(b->reason, s->reason, sizeof b->reason);
        if (l->o.strict) {
            l->list_known = l->list_count;
            return fail_for_good(l, vx_fail(VX_EIO, "%s: %s", file_name(l, s->file), s->reason));
        }
    }
    /* A shard of an unshuffled set may never see the other files; two rounds without one good image are enough. */
    if (l->list_count == l->o.count || l->fruitless > 2 * l->o.count) {
        l->list_known = l->list_count;
        return fail_for_good(l, vx_fail(VX_EIO, "loader: none of %lld images can be read; the first: %s: %s",
                                        (long long)l->o.count, file_name(l, l->list[0].file), l->list[0].reason));
    }
    return VX_OK;
}

/* Moves samples from the ring to `pending` until the batch is whole or the stream ends. */
static int collect(vx_loader *l)
{
    int status = VX_OK;
    pthread_mutex_lock(&l->lock);
    while (!status && l->filled < l->o.batch && l->taken != l->samples) {
        slot *s = &l->ring[l->taken % l->capacity];
        if (s->state != MADE) {
            if (vx_interrupted()) {
                status = vx_fail(VX_EINTR, "loader: interrupted");
                break;
            }
            struct timespec until;
            clock_gettime(CLOCK_MONOTONIC, &until);
            until.tv_nsec += POLL_MS * 1000000L;
            until.tv_sec += until.tv_nsec / 1000000000L;
            until.tv_nsec %= 1000000000L;
            pthread_cond_broadcast(&l->room);
            pthread_cond_timedwait(&l->made, &l->lock, &until);
            continue;
        }
        if (s->status) {
            status = meet_broken(l, s);
        } else {
            uint8_t *pixels = s->pixels;
            s->pixels = l->pending[l->filled];
            l->pending[l->filled] = pixels;
            l->pending_file[l->filled++] = s->file;
            l->fruitless = 0;
        }
        s->state = FREE;
        l->taken++;
    }
    pthread_cond_broadcast(&l->room);
    pthread_mutex_unlock(&l->lock);
    return status;
}

int vx_loader_next(vx_loader *l, vx_tensor *images, vx_tensor *index, int *count)
{
    char shape[96];
    if (!l || !images || !count)
        return vx_fail(VX_EINVAL, "loader_next: %s",
                       !l        ? "released loader"
                       : !images ? "released tensor"
                                 : "no place for the count");
    int64_t b = l->o.batch, size = l->o.size;
    if (images->dtype != VX_F32 || images->device != 0 || !images->contiguous || images->ndim != 4 ||
        images->shape[0] != b || images->shape[1] != size || images->shape[2] != size || images->shape[3] != 3)
        return vx_fail(VX_EINVAL,
                       "loader_next: wants contiguous f32 (%lld,%lld,%lld,3) on the CPU for the images, got %s %s",
                       (long long)b, (long long)size, (long long)size, vx_dtype_name(images->dtype),
                       vx_shape_text(images, shape, sizeof shape));
    if (index && (index->dtype != VX_I32 || index->device != 0 || !index->contiguous || index->ndim != 1 ||
                  index->shape[0] != b))
        return vx_fail(VX_EINVAL, "loader_next: wants contiguous i32 (%lld) on the CPU for the index, got %s %s",
                       (long long)b, vx_dtype_name(index->dtype), vx_shape_text(index, shape, sizeof shape));
    if (l->failure) return vx_fail(l->failure, "%s", l->failure_text);
    int status = collect(l);
    if (status) return status;
    l->delivered = l->taken;
    l->list_known = l->list_count;
    if (!l->filled) return vx_fail(VX_EEND, "loader: the epochs are over");
    float *to = vx_f32(images);
    for (int i = 0; i < l->filled; i++) {
        const uint8_t *from = l->pending[i];
        for (int64_t p = 0; p < size * size; p++, from += 3, to += 3) {
            to[0] = l->table[0][from[0]];
            to[1] = l->table[1][from[1]];
            to[2] = l->table[2][from[2]];
        }
        if (index) vx_i32(index)[i] = l->pending_file[i];
    }
    *count = l->filled;
    l->filled = 0;
    return VX_OK;
}

int64_t vx_loader_position(const vx_loader *l) { return l ? l->o.position + l->delivered * l->o.shards : 0; }

int64_t vx_loader_broken_count(const vx_loader *l) { return l ? l->list_known : 0; }

int vx_loader_broken(const vx_loader *l, int64_t i, char *path, size_t path_size, char *reason, size_t reason_size)
{
    if (!l || !path || !reason || !path_size || !reason_size)
        return vx_fail(VX_EINVAL, "loader_broken: %s", l ? "no room for the answer" : "released loader");
    if (i < 0 || i >= l->list_known)
        return vx_fail(VX_EINVAL, "loader_broken: %lld of %lld", (long long)i, (long long)l->list_known);
    snprintf(path, path_size, "%s", file_name(l, l->list[i].file));
    snprintf(reason, reason_size, "%s", l->list[i].reason);
    return VX_OK;
}
