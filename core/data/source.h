/* source.h: what a stream (stream.h) draws its samples from. A source is a table of what it has and four functions.
 *
 * To write one (images: image_source.c): embed vx_source as the first member of a struct with whatever all workers
 * share, fill it in, and hand it to vx_data_stream_new(). The stream owns it from then on, and does the rest: order,
 * queue, threads, shards, resuming, the list of broken items.
 */
#ifndef VX_SOURCE_H
#define VX_SOURCE_H

#include "core/internal.h"
#include "core/rng.h"

/* Which sample: all that it may depend on, besides the source. */
typedef struct vx_place {
    uint64_t seed;
    int64_t epoch, item; /* item: 0 .. count - 1 */
} vx_place;

typedef struct vx_source vx_source;
struct vx_source {
    const char *name;         /* plural, for texts: "images" */
    int64_t count;            /* items, at most 2^31 - 1 */
    const char *const *paths; /* the items' files, from vx_paths_copy(); NULL where they have none */
    int output_count;
    vx_output outputs[VX_MAX_OUTPUTS];
    size_t sample_bytes; /* of what make() fills */
    size_t worker_bytes; /* of a worker's own state, zeroed when it starts */

    /* Makes a sample. Called by many workers at once, each with its own state; the same place gives the same bytes. A
     * status of VX_EIO says that the item is broken, with the reason in vx_error(); any other one ends the stream. */
    int (*make)(vx_source *source, void *worker, vx_place place, void *sample);

    /* Writes a sample to place `row` of the batch's tensors. */
    void (*deliver)(const vx_source *source, const void *sample, vx_tensor *const *outputs, int64_t row);

    /* Frees what a worker's state holds. */
    void (*release)(void *worker);

    /* Frees the source, its paths too. */
    void (*free)(vx_source *source);
};

/* Gives a uniform integer below n from two of the four words, pair 0 or 1; the bias is below n / 2^64. */
static inline int64_t vx_below(vx_philox4 r, int pair, int64_t n)
{
    uint64_t bits = (uint64_t)r.word[pair * 2 + 1] << 32 | r.word[pair * 2];
    return (int64_t)((unsigned __int128)bits * (uint64_t)n >> 64);
}

/* Copies paths into one block, for free(). */
int vx_paths_copy(const char *const **out, const char *op, const char *const *paths, int64_t count);

/* Starts a stream. source is owned by it, also where it fails. */
int vx_data_stream_new(vx_data_stream **out, vx_source *source, const vx_data_stream_options *options);

#endif
