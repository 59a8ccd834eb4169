/* audio_source.c: crops of audio files, or of synthetic utterances, as the source of a stream.
 *
 * An item is a file (or utterance), or with place "all" one crop of it. The index (vx_audio_scan) has counted every
 * file's samples, so that where a crop begins is known before anything is read: a codec that seeks exactly then
 * decodes the crop alone. Other files, those of another rate, and synthetic utterances are made whole; the cache
 * (cache.h) keeps those.
 *
 * A sample is an int32 length, then `crop` floats.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cache.h"
#include "sound.h"
#include "source.h"

#define STREAM_CROP (UINT64_C(0x6d617263) << 32) /* Philox stream; the epoch in the lower half */

enum { RANDOM = 0, START, ALL };

typedef struct cached {
    int64_t count;
    float x[];
} cached;

typedef struct worker {
    vx_wave file, resampled;
    vx_bytes block;
} worker;

typedef struct audio_source {
    vx_source base;
    int64_t crop, rate, shortest;
    int quality, place;
    bool normalize;
    double eps;
    int64_t files;
    const char *const *paths; /* of the files; NULL for synthetic ones */
    vx_audio_info *infos;     /* of the files */
    int64_t speech_seed, first;
    int64_t *crops; /* place "all": file f has items crops[f] .. crops[f + 1] - 1; else NULL */
    vx_cache cache; /* by file */
} audio_source;

/* Gives how many samples file f has at the stream's rate. */
static int64_t count_of(const audio_source *s, int64_t f)
{
    return vx_resampled_count(s->infos[f].frames, s->infos[f].rate, s->rate);
}

/* Gives how many crops place "all" makes of file f. */
static int64_t crops_of(const audio_source *s, int64_t f)
{
    int64_t count = count_of(s, f), whole = count / s->crop;
    return whole + (count % s->crop >= s->shortest) + (whole == 0 && count < s->shortest);
}

/* -- Waves --------------------------------------------------------------------------------------------------------- */

/* Makes the wave of file f whole, at the stream's rate; it stays where it is until the worker's next call. */
static int make_wave(audio_source *s, worker *w, int64_t f, const float **x, int64_t *count)
{
    const vx_audio_info *info = &s->infos[f];
    const vx_wave *made = &w->file;
    vx_audio_info now;
    int status;
    if (!s->paths) status = vx_sound_speech(&w->file, (uint64_t)s->speech_seed, (uint64_t)(s->first + f));
    else status = vx_sound_whole(s->paths[f], &w->file, &w->block, &now);
    if (!status && s->paths && (now.frames != info->frames || now.rate != info->rate))
        status = vx_fail(VX_EIO, "%lld samples at %lld a second now, %lld at %lld when its length was taken",
                         (long long)now.frames, (long long)now.rate, (long long)info->frames, (long long)info->rate);
    if (!status && info->rate != s->rate) {
        made = &w->resampled;
        status =
            vx_sound_resample(&w->resampled, vx_wave_data(&w->file), w->file.count, info->rate, s->rate, s->quality);
    }
    *x = vx_wave_data(made);
    *count = made->count;
    return status;
}

/* Gives that wave from the cache, or makes it and keeps a copy where there is room. */
static int whole_wave(audio_source *s, worker *w, int64_t f, const float **x, int64_t *count)
{
    const cached *c = vx_cache_get(&s->cache, f);
    if (c) {
        *x = c->x;
        *count = c->count;
        return VX_OK;
    }
    int status = make_wave(s, w, f, x, count);
    if (status) return status;
    int64_t bytes = (int64_t)sizeof(cached) + *count * (int64_t)sizeof(float);
    cached *kept = vx_cache_reserve(&s->cache, bytes);
    if (!kept) return VX_OK;
    kept->count = *count;
    memcpy(kept->x, *x, (size_t)*count * sizeof(float));
    vx_cache_publish(&s->cache, f, kept, bytes);
    return VX_OK;
}

/* -- Crops --------------------------------------------------------------------------------------------------------- */

/* Finds the file that an item is of. */
static int64_t file_of(const audio_source *s, int64_t item)
{
    if (!s->crops) return item;
    int64_t low = 0, high = s->files - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (s->crops[middle] <= item) low = middle;
        else high = middle - 1;
    }
    return low;
}

static int64_t start_of(const audio_source *s, vx_place at, int64_t f, int64_t count)
{
    if (s->place == ALL) return (at.item - s->crops[f]) * s->crop;
    if (s->place == START || count <= s->crop) return 0;
    vx_philox4 r = vx_philox(at.seed, STREAM_CROP + (uint64_t)at.epoch, (uint64_t)at.item);
    return vx_below(r, 0, count - s->crop + 1);
}

/* Gives x mean 0 and variance 1. */
static void normalize(float *x, int64_t count, double eps)
{
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < count; i++) sum += (double)x[i];
    const double mean = sum / (double)count;
    for (int64_t i = 0; i < count; i++) squares += ((double)x[i] - mean) * ((double)x[i] - mean);
    const double scale = 1 / sqrt(squares / (double)count + eps);
    for (int64_t i = 0; i < count; i++) x[i] = (float)(((double)x[i] - mean) * scale);
}

/* Writes the crop of an item to `to`. */
static int read_crop(audio_source *s, worker *w, int64_t f, int64_t start, int64_t length, float *to)
{
    if (s->paths && s->infos[f].exact_seek && s->infos[f].rate == s->rate)
        return vx_sound_window(s->paths[f], &s->infos[f], start, length, to, &w->block);
    const float *x;
    int64_t count;
    int status = whole_wave(s, w, f, &x, &count);
    if (!status) memcpy(to, x + start, sizeof(float) * (size_t)length);
    return status;
}

static int make(vx_source *source, void *state, vx_place at, void *sample)
{
    audio_source *s = (audio_source *)source;
    float *x = (float *)((int32_t *)sample + 1);
    int64_t f = file_of(s, at.item), count = count_of(s, f), start = start_of(s, at, f, count);
    int64_t length = count - start < s->crop ? count - start : s->crop;
    int status = read_crop(s, state, f, start, length, x);
    if (status) return status;
    if (s->normalize) normalize(x, length, s->eps);
    memset(x + length, 0, sizeof(float) * (size_t)(s->crop - length));
    *(int32_t *)sample = (int32_t)length;
    return VX_OK;
}

static void deliver(const vx_source *source, const void *sample, vx_tensor *const *outputs, int64_t row)
{
    const audio_source *s = (const audio_source *)source;
    memcpy(vx_f32(outputs[0]) + row * s->crop, (const int32_t *)sample + 1, sizeof(float) * (size_t)s->crop);
    vx_i32(outputs[1])[row] = *(const int32_t *)sample;
}

static void release(void *state)
{
    worker *w = state;
    vx_bytes_release(&w->file.bytes);
    vx_bytes_release(&w->resampled.bytes);
    vx_bytes_release(&w->block);
}

static void free_source(vx_source *source)
{
    audio_source *s = (audio_source *)source;
    vx_cache_free(&s->cache);
    if (s->base.paths != s->paths) free((void *)s->base.paths);
    free((void *)s->paths);
    free(s->infos);
    free(s->crops);
    free(s);
}

/* -- Starting a stream --------------------------------------------------------------------------------------------- */

/* Checks the options and sets what they mean. */
static int set_options(audio_source *s, const vx_audio_options *o)
{
    static const char *const places[] = {"random", "start", "all", NULL};
    const char *name = s->base.name;
    int status =
        VX_CHECK_HOST(name,
                      ": count >= 1 && count <= 2147483647; crop >= 1 && crop <= 268435456;"
                      "rate >= 1 && rate <= most; shortest >= 1 && shortest <= 268435456; eps >= 0 && eps < inf;"
                      "cache_bytes >= 0 && cache_bytes <= 9007199254740992",
                      (),
                      (("count", s->files), ("crop", o->crop), ("rate", o->rate), ("most", VX_SOUND_MAX_RATE),
                       ("shortest", o->shortest), ("eps", o->eps), ("cache_bytes", o->cache_bytes)));
    if (!status) status = vx_check_choice(name, "quality", o->quality, vx_qualities, &s->quality);
    if (!status) status = vx_check_choice(name, "place", o->place, places, &s->place);
    s->crop = o->crop;
    s->rate = o->rate;
    s->shortest = o->shortest;
    s->normalize = o->normalize;
    s->eps = o->eps;
    return status;
}

/* Copies what is known of the files, and refuses those that cannot be used. */
static int set_infos(audio_source *s, const vx_audio_info *infos)
{
    s->infos = malloc(sizeof *s->infos * (size_t)s->files);
    if (!s->infos) return vx_fail(VX_ENOMEM, "%s: out of memory for %lld files", s->base.name, (long long)s->files);
    for (int64_t f = 0; f < s->files; f++) {
        const vx_audio_info *i = &infos[f];
        if (i->reason[0]) return vx_fail(VX_EINVAL, "%s: %s: %s", s->base.name, s->paths[f], i->reason);
        if (i->frames < 1 || i->frames > VX_SOUND_MOST || i->rate < 1 || i->rate > VX_SOUND_MAX_RATE)
            return vx_fail(VX_EINVAL, "%s: %s: %lld samples at %lld a second", s->base.name, s->paths[f],
                           (long long)i->frames, (long long)i->rate);
        s->infos[f] = *i;
    }
    return VX_OK;
}

/* Tells what the synthetic utterances are. */
static int set_speech(audio_source *s)
{
    s->infos = calloc((size_t)s->files, sizeof *s->infos);
    if (!s->infos) return vx_fail(VX_ENOMEM, "%s: out of memory for %lld items", s->base.name, (long long)s->files);
    for (int64_t f = 0; f < s->files; f++) {
        s->infos[f].frames = vx_speech_count((uint64_t)s->speech_seed, (uint64_t)(s->first + f));
        s->infos[f].rate = VX_SPEECH_RATE;
        s->infos[f].channels = 1;
    }
    return VX_OK;
}

/* Makes the crops of all files the items, in the order of the files. */
static int set_crops(audio_source *s)
{
    s->crops = malloc(sizeof *s->crops * ((size_t)s->files + 1));
    if (!s->crops) return vx_fail(VX_ENOMEM, "%s: out of memory for %lld files", s->base.name, (long long)s->files);
    s->crops[0] = 0;
    for (int64_t f = 0; f < s->files; f++) s->crops[f + 1] = s->crops[f] + crops_of(s, f);
    s->base.count = s->crops[s->files];
    if (!s->paths || s->base.count > INT32_MAX) return VX_OK; /* the stream refuses so many */
    const char **paths = malloc(sizeof *paths * (size_t)s->base.count);
    if (!paths) return vx_fail(VX_ENOMEM, "%s: out of memory for %lld crops", s->base.name, (long long)s->base.count);
    for (int64_t f = 0; f < s->files; f++)
        for (int64_t i = s->crops[f]; i < s->crops[f + 1]; i++) paths[i] = s->paths[f];
    s->base.paths = paths;
    return VX_OK;
}

/* Starts a stream of a source whose files, paths and synthetic set are filled in, and frees it where that fails. */
static int start(vx_data_stream **out, audio_source *s, const vx_audio_info *infos,
                 const vx_data_stream_options *stream, const vx_audio_options *options)
{
    int status = set_options(s, options);
    if (!status) status = s->paths ? set_infos(s, infos) : set_speech(s);
    if (!status) status = vx_cache_init(&s->cache, s->base.name, s->files, options->cache_bytes);
    s->base.count = s->files;
    s->base.paths = s->paths;
    if (!status && s->place == ALL) status = set_crops(s);
    s->base.output_count = 2;
    s->base.outputs[0] = (vx_output){"waves", VX_F32, 1, {options->crop}};
    s->base.outputs[1] = (vx_output){"lengths", VX_I32, 0, {0}};
    s->base.sample_bytes = sizeof(int32_t) + sizeof(float) * (size_t)options->crop;
    s->base.worker_bytes = sizeof(worker);
    s->base.make = make;
    s->base.deliver = deliver;
    s->base.release = release;
    s->base.free = free_source;
    if (!status) return vx_data_stream_new(out, &s->base, stream);
    free_source(&s->base);
    return status;
}

static audio_source *new_source(const char *name, int64_t files)
{
    audio_source *s = calloc(1, sizeof *s);
    if (!s) {
        vx_fail(VX_ENOMEM, "%s: out of memory", name);
        return NULL;
    }
    s->base.name = name;
    s->files = files;
    return s;
}

int vx_audio_stream(vx_data_stream **out, const char *const *paths, const vx_audio_info *infos, int64_t count,
                    const vx_data_stream_options *stream, const vx_audio_options *options)
{
    *out = NULL;
    if (!paths || !infos || count < 1) return vx_fail(VX_EINVAL, "audio: no files");
    audio_source *s = new_source("audio files", count);
    if (!s) return VX_ENOMEM;
    int status = vx_paths_copy(&s->paths, s->base.name, paths, count);
    if (status) {
        free_source(&s->base);
        return status;
    }
    return start(out, s, infos, stream, options);
}

int vx_speech_stream(vx_data_stream **out, int64_t speech_seed, int64_t first, int64_t count,
                     const vx_data_stream_options *stream, const vx_audio_options *options)
{
    *out = NULL;
    audio_source *s = new_source("synthetic utterances", count);
    if (!s) return VX_ENOMEM;
    s->speech_seed = speech_seed;
    s->first = first;
    return start(out, s, NULL, stream, options);
}
