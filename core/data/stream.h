/* stream.h: batches of samples that worker threads make ahead. Part of vertex.h, which includes it (its conventions
 * hold here); no #include of its own, so that its text can be read by LuaJIT as it is. What makes the samples is a
 * source: images are one (image.h); source.h says how to write another.
 *
 * The stream. A source has `count` items. Raw position p shows, in epoch p / count, item order[p % count], where the
 * order of an epoch is a permutation drawn from (seed, epoch), or the items' own with shuffle = false. What a source
 * draws at random it draws from (seed, epoch, item). Broken items are left out: the batch is filled from later
 * positions. So the batches depend on the options and the items, not on the number of workers, the queue or a cache.
 */
#ifndef VX_STREAM_H
#define VX_STREAM_H

typedef struct vx_data_stream_options {
    int64_t seed;     /* of the order, and of what the source draws */
    int64_t epochs;   /* 0: without end; else VX_EEND after them, the last batch may be smaller */
    int64_t position; /* raw position to start from: vx_data_stream_position() of the run that is resumed */
    int64_t shard;    /* several readers of one stream: this one takes positions position + shard, + shards, ... */
    int64_t shards;   /* 1: the only reader */
    int64_t batch;    /* samples in a batch */
    int64_t workers;  /* threads, 1 to 256 */
    int64_t queue;    /* samples made ahead; 0: two batches and one per worker */
    bool shuffle;
    bool strict; /* the first broken item makes vx_data_stream_next fail */
} vx_data_stream_options;

enum { VX_MAX_OUTPUTS = 4 };

/* One of the tensors that a batch consists of. */
typedef struct vx_output {
    const char *name;
    int dtype, ndim;
    int64_t shape[VX_MAX_DIMS]; /* of one sample; the batch's tensor has the batch in front */
} vx_output;

typedef struct vx_data_stream vx_data_stream;

/* Ends the workers and waits for them: at most one sample each. NULL is fine. */
VX_API void vx_data_stream_free(vx_data_stream *stream);

/* Tells what batches consist of, *count outputs; NULL and 0 for a NULL stream. */
VX_API const vx_output *vx_data_stream_outputs(const vx_data_stream *stream, int *count);

/* Writes the next batch to one tensor per output, and the items' numbers to index, i32 (batch) or NULL; all on the CPU.
 * *count: how many samples there are, less than batch only at the end of the last epoch. VX_EEND after it; VX_EIO with
 * the item and the reason for a broken one with strict, and where no item at all can be read; VX_EINTR where it would
 * have to wait while vx_interrupted() is true: then the stream goes on as if not called. Call it from one thread at a
 * time. */
VX_API int vx_data_stream_next(vx_data_stream *stream, vx_tensor *const *outputs, int output_count, vx_tensor *index,
                               int *count);

/* Counts the items of an epoch, broken ones among them; 0 for NULL. */
VX_API int64_t vx_data_stream_items(const vx_data_stream *stream);

/* Returns the raw position after the last delivered batch: a stream started there delivers what this one will. 0 for
 * NULL. */
VX_API int64_t vx_data_stream_position(const vx_data_stream *stream);

/* Tell the broken items met so far, in the order of the stream: how many (0 for NULL), and the i-th, 0-based. They are
 * those that delivered batches met, so the same whatever the number of workers. */
VX_API int64_t vx_data_stream_broken_count(const vx_data_stream *stream);
VX_API int vx_data_stream_broken(const vx_data_stream *stream, int64_t i, char *item, size_t item_size, char *reason,
                                 size_t reason_size);

#endif
