/* stream.c: worker threads that make the samples of a source ahead of the training loop.
 *
 * Idea. Everything random is a function of (seed, epoch, item), and every sample has a number, its place in the stream.
 * The workers take numbers in order and put what they make into a ring, number modulo length; the consumer empties the
 * ring in order. Which worker made a sample, and when, leaves no trace in the batches.
 *
 *   ring   | 12 made | 13 made | 14 at work | 15 at work | 16 free | ...        capacity = queue
 *            ^ taken (next for the consumer)               ^ claimed (next for a worker)
 *
 * Requirements
 *   1. One mutex guards the ring, the counters, the order of the epoch and item_broken. A slot's sample belongs to the
 *      worker that claimed it until the slot is MADE, then to the consumer.
 *   2. A worker's result depends on its sample alone, never on what another worker has found: it tries an item again
 *      unless the *consumer* has met it as broken. So the list of broken items, too, is in the order of the stream.
 *   3. The consumer swaps good samples out of the ring into `pending` until a batch is whole. A wait that is
 *      interrupted loses nothing, and the queue may be shorter than a batch.
 *   4. What workers share beyond that is the source's, which reads it without a lock (image_source.c: its cache).
 *   5. Threads never see a signal and never enter Lua; vx_data_stream_free() waits for at most one sample per worker.
 */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "source.h"

#define STREAM_ORDER (UINT64_C(0x6c6f6164) << 32) /* Philox stream; the epoch in the lower half */

enum { FREE = 0, AT_WORK, MADE };
enum { REASON = 256, POLL_MS = 50 };

typedef struct slot {
    int state, status; /* status and reason: why there is no sample */
    int32_t item;
    void *sample;
    char reason[REASON];
} slot;

typedef struct broken {
    int32_t item;
    char reason[REASON];
} broken;

typedef struct worker {
    struct vx_data_stream *stream;
    pthread_t thread;
    void *state; /* the source's */
} worker;

struct vx_data_stream {
    vx_data_stream_options o;
    vx_source *source;
    char contract[1024]; /* of the tensors of a batch: 4 outputs of 8 sizes fit */
    int64_t samples;     /* of this shard, all epochs; -1 without end */

    pthread_mutex_t lock;
    pthread_cond_t room, made;
    bool sync_ready, stop;
    int64_t claimed, taken; /* samples, 0 is the one at the starting position */
    int64_t order_epoch;
    int32_t *order;
    uint8_t *item_broken;
    slot *ring;
    int64_t capacity;

    worker *workers;
    int started;

    /* the consumer's alone */
    void **pending;
    int32_t *pending_item;
    int filled;
    int64_t delivered; /* samples used up by the batches handed out */
    int64_t fruitless; /* broken samples since the last good one */
    broken *list;
    int64_t list_count, list_known, list_capacity; /* known: those of delivered batches */
    int failure;                                   /* once set, every next() says so again */
    char failure_text[1024];
};

/* -- The order ----------------------------------------------------------------------------------------------------- */

static int64_t raw_position(const vx_data_stream *s, int64_t sample)
{
    return s->o.position + s->o.shard + sample * s->o.shards;
}

/* Draws the order of an epoch: Fisher and Yates's shuffle of the items. */
static void draw_order(vx_data_stream *s, int64_t epoch)
{
    for (int64_t i = 0; i < s->source->count; i++) s->order[i] = (int32_t)i;
    for (int64_t i = s->source->count - 1; i > 0; i--) {
        vx_philox4 r = vx_philox((uint64_t)s->o.seed, STREAM_ORDER + (uint64_t)epoch, (uint64_t)i);
        int64_t j = vx_below(r, 0, i + 1);
        int32_t t = s->order[i];
        s->order[i] = s->order[j];
        s->order[j] = t;
    }
    s->order_epoch = epoch;
}

/* -- Workers ------------------------------------------------------------------------------------------------------- */

static void *work(void *argument)
{
    worker *w = argument;
    vx_data_stream *s = w->stream;
    vx_source *source = s->source;
    pthread_mutex_lock(&s->lock);
    for (;;) {
        while (!s->stop && s->claimed - s->taken >= s->capacity && s->claimed != s->samples)
            pthread_cond_wait(&s->room, &s->lock);
        if (s->stop || s->claimed == s->samples) break;
        int64_t sample = s->claimed++;
        int64_t raw = raw_position(s, sample), epoch = raw / source->count, place = raw % source->count;
        slot *to = &s->ring[sample % s->capacity];
        if (s->o.shuffle && epoch != s->order_epoch) draw_order(s, epoch);
        to->item = s->o.shuffle ? s->order[place] : (int32_t)place;
        to->state = AT_WORK;
        bool known = s->item_broken[to->item];
        pthread_mutex_unlock(&s->lock);

        to->status = known
                         ? VX_EIO
                         : source->make(source, w->state, (vx_place){(uint64_t)s->o.seed, epoch, to->item}, to->sample);
        if (to->status && !known) snprintf(to->reason, sizeof to->reason, "%s", vx_error());

        pthread_mutex_lock(&s->lock);
        to->state = MADE;
        if (sample == s->taken) pthread_cond_signal(&s->made);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

/* -- Life ---------------------------------------------------------------------------------------------------------- */

int vx_paths_copy(const char *const **out, const char *op, const char *const *paths, int64_t count)
{
    size_t bytes = 0;
    *out = NULL;
    for (int64_t i = 0; i < count; i++) {
        if (!paths[i]) return vx_fail(VX_EINVAL, "%s: no path %lld", op, (long long)i);
        bytes += strlen(paths[i]) + 1;
    }
    const char **copy = malloc(sizeof *copy * (size_t)count + bytes);
    if (!copy) return vx_fail(VX_ENOMEM, "%s: out of memory for %lld paths", op, (long long)count);
    char *text = (char *)(copy + count);
    for (int64_t i = 0; i < count; i++) {
        size_t length = strlen(paths[i]) + 1;
        copy[i] = memcpy(text, paths[i], length);
        text += length;
    }
    *out = copy;
    return VX_OK;
}

static int check_options(const vx_source *source, const vx_data_stream_options *o)
{
    return VX_CHECK_HOST(source->name,
                         ": count >= 1 && count <= 2147483647; epochs >= 0 && epochs <= 2147483648;"
                         "position >= 0 && position <= 9007199254740992; shards >= 1 && shards <= 1048576;"
                         "shard >= 0 && shard < shards; batch >= 1 && batch <= 1048576;"
                         "workers >= 1 && workers <= 256; queue >= 0 && queue <= 1048576",
                         (),
                         (("count", source->count), ("epochs", o->epochs), ("position", o->position),
                          ("shards", o->shards), ("shard", o->shard), ("batch", o->batch), ("workers", o->workers),
                          ("queue", o->queue)));
}

/* Writes the contract of a batch: "images(16,32,32,3) index?:i32(16) <-". */
static void write_contract(vx_data_stream *s)
{
    char *to = s->contract, *end = to + sizeof s->contract;
    for (int i = 0; i < s->source->output_count; i++) {
        const vx_output *output = &s->source->outputs[i];
        to += snprintf(to, (size_t)(end - to), "%s:%s(%lld", output->name, vx_dtype_name(output->dtype),
                       (long long)s->o.batch);
        for (int d = 0; d < output->ndim; d++)
            to += snprintf(to, (size_t)(end - to), ",%lld", (long long)output->shape[d]);
        to += snprintf(to, (size_t)(end - to), ") ");
    }
    snprintf(to, (size_t)(end - to), "index?:i32(%lld) <-", (long long)s->o.batch);
}

static int allocate(vx_data_stream *s)
{
    const size_t items = (size_t)s->source->count, bytes = s->source->sample_bytes;
    s->ring = calloc((size_t)s->capacity, sizeof *s->ring);
    s->pending = calloc((size_t)s->o.batch, sizeof *s->pending);
    s->pending_item = calloc((size_t)s->o.batch, sizeof *s->pending_item);
    s->item_broken = calloc(items, 1);
    s->order = s->o.shuffle ? malloc(sizeof *s->order * items) : NULL;
    s->workers = calloc((size_t)s->o.workers, sizeof *s->workers);
    bool good = s->ring && s->pending && s->pending_item && s->item_broken && s->workers && (s->order || !s->o.shuffle);
    for (int64_t i = 0; good && i < s->capacity; i++) good = (s->ring[i].sample = malloc(bytes)) != NULL;
    for (int i = 0; good && i < s->o.batch; i++) good = (s->pending[i] = malloc(bytes)) != NULL;
    for (int i = 0; good && i < s->o.workers; i++)
        good = (s->workers[i].state = calloc(1, s->source->worker_bytes)) != NULL;
    if (good) return VX_OK;
    return vx_fail(VX_ENOMEM, "%s: out of memory for a queue of %lld and a batch of %lld samples of %zu bytes",
                   s->source->name, (long long)s->capacity, (long long)s->o.batch, bytes);
}

static int start(vx_data_stream *s)
{
    pthread_condattr_t clock;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->room, NULL);
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC); /* its waits are timed */
    pthread_cond_init(&s->made, &clock);
    pthread_condattr_destroy(&clock);
    s->sync_ready = true;

    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* the threads inherit it */
    int error = 0;
    for (; !error && s->started < s->o.workers; s->started += !error) {
        worker *w = &s->workers[s->started];
        w->stream = s;
        error = pthread_create(&w->thread, NULL, work, w);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!error) return VX_OK;
    return vx_fail(VX_ENOMEM, "%s: thread %d of %d does not start: %s", s->source->name, s->started + 1,
                   (int)s->o.workers, strerror(error));
}

int vx_data_stream_new(vx_data_stream **out, vx_source *source, const vx_data_stream_options *options)
{
    *out = NULL;
    int status = check_options(source, options);
    vx_data_stream *s = status ? NULL : calloc(1, sizeof *s);
    if (!status && !s) status = vx_fail(VX_ENOMEM, "%s: out of memory", source->name);
    if (status) {
        source->free(source);
        return status;
    }
    s->source = source;
    s->o = *options;
    s->capacity = s->o.queue ? s->o.queue : 2 * s->o.batch + s->o.workers;
    s->order_epoch = -1;
    s->samples = -1;
    if (s->o.epochs) {
        int64_t rest = s->o.epochs * source->count - s->o.position - s->o.shard;
        s->samples = rest > 0 ? (rest + s->o.shards - 1) / s->o.shards : 0;
    }
    write_contract(s);
    status = allocate(s);
    if (!status) status = start(s);
    if (status) vx_data_stream_free(s);
    else *out = s;
    return status;
}

void vx_data_stream_free(vx_data_stream *s)
{
    if (!s) return;
    if (s->sync_ready) {
        pthread_mutex_lock(&s->lock);
        s->stop = true;
        pthread_cond_broadcast(&s->room);
        pthread_mutex_unlock(&s->lock);
    }
    for (int i = 0; i < s->started; i++) pthread_join(s->workers[i].thread, NULL);
    if (s->sync_ready) {
        pthread_cond_destroy(&s->made);
        pthread_cond_destroy(&s->room);
        pthread_mutex_destroy(&s->lock);
    }
    for (int i = 0; s->workers && i < s->o.workers; i++) {
        if (s->workers[i].state) s->source->release(s->workers[i].state);
        free(s->workers[i].state);
    }
    for (int64_t i = 0; s->ring && i < s->capacity; i++) free(s->ring[i].sample);
    for (int i = 0; s->pending && i < s->o.batch; i++) free(s->pending[i]);
    s->source->free(s->source);
    free(s->ring);
    free(s->pending);
    free(s->pending_item);
    free(s->item_broken);
    free(s->order);
    free(s->workers);
    free(s->list);
    free(s);
}

/* -- Consumer ------------------------------------------------------------------------------------------------------ */

static const char *item_name(const vx_data_stream *s, int32_t item)
{
    return s->source->paths ? s->source->paths[item] : s->source->name;
}

static int fail_for_good(vx_data_stream *s, int status)
{
    s->failure = status;
    snprintf(s->failure_text, sizeof s->failure_text, "%s", vx_error());
    return status;
}

static int add_to_list(vx_data_stream *s, const slot *from)
{
    if (s->list_count == s->list_capacity) {
        int64_t capacity = s->list_capacity ? s->list_capacity * 2 : 16;
        broken *list = realloc(s->list, sizeof *list * (size_t)capacity);
        if (!list)
            return fail_for_good(s,
                                 vx_fail(VX_ENOMEM, "%s: out of memory for the list of broken files", s->source->name));
        s->list = list;
        s->list_capacity = capacity;
    }
    broken *b = &s->list[s->list_count++];
    b->item = from->item;
    memcpy(b->reason, from->reason, sizeof b->reason);
    return VX_OK;
}

/* Notes the item of a slot without sample, and says whether that ends the stream. */
static int meet_broken(vx_data_stream *s, const slot *from)
{
    s->fruitless++;
    if (from->status != VX_EIO) /* not the item's fault */
        return fail_for_good(
            s, vx_fail(from->status, "%s: %s: %s", s->source->name, item_name(s, from->item), from->reason));
    if (!s->item_broken[from->item]) {
        s->item_broken[from->item] = 1;
        int status = add_to_list(s, from);
        if (status) return status;
        if (s->o.strict) {
            s->list_known = s->list_count;
            return fail_for_good(s, vx_fail(VX_EIO, "%s: %s", item_name(s, from->item), from->reason));
        }
    }
    /* A shard of an unshuffled set may never see the other items; two rounds without one good one are enough. */
    if (s->list_count < s->source->count && s->fruitless <= 2 * s->source->count) return VX_OK;
    s->list_known = s->list_count;
    return fail_for_good(s,
                         vx_fail(VX_EIO, "none of %lld %s can be read; the first: %s: %s", (long long)s->source->count,
                                 s->source->name, item_name(s, s->list[0].item), s->list[0].reason));
}

/* Waits until a worker has made something, or a while. */
static void wait_a_while(vx_data_stream *s)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += POLL_MS * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    pthread_cond_broadcast(&s->room);
    pthread_cond_timedwait(&s->made, &s->lock, &until);
}

/* Moves samples from the ring to `pending` until the batch is whole or the stream ends. */
static int collect(vx_data_stream *s)
{
    int status = VX_OK;
    pthread_mutex_lock(&s->lock);
    while (!status && s->filled < s->o.batch && s->taken != s->samples) {
        slot *from = &s->ring[s->taken % s->capacity];
        if (from->state != MADE) {
            if (vx_interrupted()) status = vx_fail(VX_EINTR, "%s: interrupted", s->source->name);
            else wait_a_while(s);
            continue;
        }
        if (from->status) {
            status = meet_broken(s, from);
        } else {
            void *sample = from->sample;
            from->sample = s->pending[s->filled];
            s->pending[s->filled] = sample;
            s->pending_item[s->filled++] = from->item;
            s->fruitless = 0;
        }
        from->state = FREE;
        s->taken++;
    }
    pthread_cond_broadcast(&s->room);
    pthread_mutex_unlock(&s->lock);
    return status;
}

const vx_output *vx_data_stream_outputs(const vx_data_stream *s, int *count)
{
    *count = s ? s->source->output_count : 0;
    return s ? s->source->outputs : NULL;
}

int vx_data_stream_next(vx_data_stream *s, vx_tensor *const *outputs, int output_count, vx_tensor *index, int *count)
{
    if (!s) return vx_fail(VX_EINVAL, "stream: a closed one");
    const vx_source *source = s->source;
    if (output_count != source->output_count)
        return vx_fail(VX_EINVAL, "%s: %d tensors for %d outputs", source->name, output_count, source->output_count);
    vx_tensor *all[VX_MAX_OUTPUTS + 1];
    memcpy(all, outputs, sizeof *all * (size_t)output_count);
    all[output_count] = index;
    int status = vx_check_host(source->name, s->contract, all, output_count + 1, NULL, NULL, 0);
    if (status) return status;
    if (s->failure) return vx_fail(s->failure, "%s", s->failure_text);
    status = collect(s);
    if (status) return status;
    s->delivered = s->taken;
    s->list_known = s->list_count;
    if (!s->filled) return vx_fail(VX_EEND, "%s: the epochs are over", source->name);
    for (int i = 0; i < s->filled; i++) {
        source->deliver(source, s->pending[i], outputs, i);
        if (index) vx_i32(index)[i] = s->pending_item[i];
    }
    *count = s->filled;
    s->filled = 0;
    return VX_OK;
}

int64_t vx_data_stream_items(const vx_data_stream *s) { return s ? s->source->count : 0; }

int64_t vx_data_stream_position(const vx_data_stream *s) { return s ? s->o.position + s->delivered * s->o.shards : 0; }

int64_t vx_data_stream_broken_count(const vx_data_stream *s) { return s ? s->list_known : 0; }

int vx_data_stream_broken(const vx_data_stream *s, int64_t i, char *item, size_t item_size, char *reason,
                          size_t reason_size)
{
    if (!s) return vx_fail(VX_EINVAL, "stream: a closed one");
    if (i < 0 || i >= s->list_known)
        return vx_fail(VX_EINVAL, "%s: broken item %lld of %lld", s->source->name, (long long)i,
                       (long long)s->list_known);
    snprintf(item, item_size, "%s", item_name(s, s->list[i].item));
    snprintf(reason, reason_size, "%s", s->list[i].reason);
    return VX_OK;
}
