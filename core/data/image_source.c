/* image_source.c: images as the source of a stream: files or the procedural set, resized, cropped, mirrored and
 * standardized.
 *
 * A sample is u8 (size, size, 3); it becomes f32 by a table when it is delivered, so that the queue holds a quarter of
 * the bytes.
 *
 * The cache (cache.h) keeps images before random crop and flip.
 */
#include <stdlib.h>
#include <string.h>

#include "cache.h"
#include "pixels.h"
#include "source.h"

#define STREAM_CROP (UINT64_C(0x63726f70) << 32) /* Philox stream; the epoch in the lower half */

/* A window of an image: `height` rows of `width` pixels, `row` pixels from one to the next. */
typedef struct window {
    const uint8_t *pixels;
    int64_t height, width, row;
} window;

typedef struct cached {
    int64_t height, width;
    uint8_t pixels[];
} cached;

typedef struct worker {
    vx_decoder decoder;
    vx_pixels image;
    vx_bytes resized, scratch;
} worker;

typedef struct image_source {
    vx_source base;
    int64_t size;
    bool flip, only_enlarge, random_crop; /* options flip, resize "none", crop "random" */
    int filter;
    int64_t image_seed, first; /* of the procedural set */
    float table[3][256];       /* standardized value of each byte */
    vx_cache cache;
    /* Makes the image of an item, resized; it stays where it is until the worker's next call. */
    int (*picture)(struct image_source *s, worker *w, int64_t item, window *out);
} image_source;

/* -- Pictures ------------------------------------------------------------------------------------------------------ */

/* Gives the size nearest to height x width with short side `size`, the long one cut to whole pixels (torchvision's
 * Resize). */
static int target_size(const image_source *s, int64_t height, int64_t width, int64_t *h, int64_t *w)
{
    int64_t size = s->size, shorter = height < width ? height : width;
    *h = height;
    *w = width;
    if (shorter == size || (s->only_enlarge && shorter > size)) return VX_OK;
    *h = height <= width ? size : size * height / width;
    *w = height <= width ? size * width / height : size;
    if (*h <= VX_IMAGE_MAX_PIXELS / *w) return VX_OK;
    return vx_fail(VX_EIO, "%lld x %lld is too elongated: a short side of %lld makes it %lld x %lld", (long long)width,
                   (long long)height, (long long)size, (long long)*w, (long long)*h);
}

static int open_picture(image_source *s, worker *w, int64_t item, window *out)
{
    int64_t height, width;
    const vx_pixels *image = &w->image;
    int status = vx_decoder_file(&w->decoder, s->base.paths[item], &w->image);
    if (!status) status = target_size(s, image->height, image->width, &height, &width);
    if (status) return status;
    *out = (window){image->bytes.data, height, width, width};
    if (height == image->height && width == image->width) return VX_OK;
    status = vx_bytes_reserve(&w->resized, (size_t)height * width * 3);
    if (!status)
        status = vx_pixels_resize(w->resized.data, height, width, image->bytes.data, image->height, image->width,
                                  s->filter, &w->scratch);
    out->pixels = w->resized.data;
    return status;
}

static int draw_picture(image_source *s, worker *w, int64_t item, window *out)
{
    int status = vx_bytes_reserve(&w->resized, s->base.sample_bytes);
    if (!status)
        vx_pixels_procedural(w->resized.data, s->size, s->size, (uint64_t)s->image_seed, (uint64_t)(s->first + item));
    *out = (window){w->resized.data, s->size, s->size, s->size};
    return status;
}

/* -- Crop and cache ------------------------------------------------------------------------------------------------ */

/* Rounds d / 2 half to even, as torchvision's CenterCrop places it. */
static int64_t centered(int64_t d) { return d / 2 + (d & 1 & (d / 2)); }

static window part(window w, int64_t top, int64_t left, int64_t size)
{
    return (window){w.pixels + (top * w.row + left) * 3, size, size, w.row};
}

static void copy_rows(uint8_t *dst, window w)
{
    for (int64_t y = 0; y < w.height; y++) memcpy(dst + y * w.width * 3, w.pixels + y * w.row * 3, (size_t)w.width * 3);
}

/* Keeps a copy of the image where the cache has room. */
static void keep(image_source *s, int64_t item, window image)
{
    int64_t bytes = (int64_t)sizeof(cached) + image.height * image.width * 3;
    cached *c = vx_cache_reserve(&s->cache, bytes);
    if (!c) return;
    c->height = image.height;
    c->width = image.width;
    copy_rows(c->pixels, image);
    vx_cache_publish(&s->cache, item, c, bytes);
}

/* Gives the image before random crop and flip, from the cache or made now. What a center crop drops is dropped here,
 * before it is cached. */
static int prepared(image_source *s, worker *w, int64_t item, window *image)
{
    const cached *c = vx_cache_get(&s->cache, item);
    if (c) {
        *image = (window){c->pixels, c->height, c->width, c->width};
        return VX_OK;
    }
    int status = s->picture(s, w, item, image);
    if (status) return status;
    if (!s->random_crop)
        *image = part(*image, centered(image->height - s->size), centered(image->width - s->size), s->size);
    keep(s, item, *image);
    return VX_OK;
}

static void mirror(uint8_t *image, int64_t size)
{
    for (int64_t y = 0; y < size; y++) {
        uint8_t *a = image + y * size * 3, *b = a + (size - 1) * 3;
        for (; a < b; a += 3, b -= 3) {
            for (int c = 0; c < 3; c++) {
                uint8_t t = a[c];
                a[c] = b[c];
                b[c] = t;
            }
        }
    }
}

/* -- The source's functions ---------------------------------------------------------------------------------------- */

static int make(vx_source *source, void *state, vx_place at, void *sample)
{
    image_source *s = (image_source *)source;
    window image;
    int status = prepared(s, state, at.item, &image);
    if (status) return status;
    vx_philox4 place = vx_philox(at.seed, STREAM_CROP + (uint64_t)at.epoch, (uint64_t)at.item * 2);
    vx_philox4 side = vx_philox(at.seed, STREAM_CROP + (uint64_t)at.epoch, (uint64_t)at.item * 2 + 1);
    int64_t top = vx_below(place, 0, image.height - s->size + 1), left = vx_below(place, 1, image.width - s->size + 1);
    copy_rows(sample, part(image, top, left, s->size));
    if (s->flip && side.word[0] >> 31) mirror(sample, s->size);
    return VX_OK;
}

static void deliver(const vx_source *source, const void *sample, vx_tensor *const *outputs, int64_t row)
{
    const image_source *s = (const image_source *)source;
    const uint8_t *from = sample;
    float *to = vx_f32(outputs[0]) + row * (int64_t)source->sample_bytes;
    for (int64_t p = 0; p < s->size * s->size; p++, from += 3, to += 3) {
        to[0] = s->table[0][from[0]];
        to[1] = s->table[1][from[1]];
        to[2] = s->table[2][from[2]];
    }
}

static void release(void *state)
{
    worker *w = state;
    vx_decoder_release(&w->decoder);
    vx_bytes_release(&w->image.bytes);
    vx_bytes_release(&w->resized);
    vx_bytes_release(&w->scratch);
}

static void free_source(vx_source *source)
{
    image_source *s = (image_source *)source;
    vx_cache_free(&s->cache);
    free((void *)source->paths);
    free(s);
}

/* -- Starting a stream --------------------------------------------------------------------------------------------- */

/* Checks the options and sets what they mean. */
static int set_options(image_source *s, const vx_image_options *o)
{
    static const char *const resizes[] = {"short", "none", NULL}, *const crops[] = {"center", "random", NULL};
    const char *name = s->base.name;
    int resize, crop;
    int status = VX_CHECK_HOST(name,
                               ": count >= 1 && count <= 2147483647; size >= 1 && size <= 8192;"
                               "cache_bytes >= 0 && cache_bytes <= 9007199254740992",
                               (), (("count", s->base.count), ("size", o->size), ("cache_bytes", o->cache_bytes)));
    for (int c = 0; !status && c < 3; c++)
        status = VX_CHECK_HOST(name, ": mean > 0 - inf && mean < inf; std > 0 && std < inf", (),
                               (("mean", o->mean[c]), ("std", o->std[c])));
    if (!status) status = vx_check_choice(name, "resize", o->resize, resizes, &resize);
    if (!status) status = vx_check_choice(name, "filter", o->filter, vx_filters, &s->filter);
    if (!status) status = vx_check_choice(name, "crop", o->crop, crops, &crop);
    if (status) return status;
    s->only_enlarge = resize == 1;
    s->random_crop = crop == 1;
    s->flip = o->flip;
    s->size = o->size;
    for (int c = 0; c < 3; c++)
        for (int v = 0; v < 256; v++) s->table[c][v] = (float)((v / 255.0 - (double)o->mean[c]) / (double)o->std[c]);
    return VX_OK;
}

/* Makes a source of files, or of the procedural set where paths is NULL. */
static int new_source(image_source **out, const char *const *paths, int64_t count, const vx_image_options *options)
{
    image_source *s = calloc(1, sizeof *s);
    if (!s) return vx_fail(VX_ENOMEM, "images: out of memory");
    s->base = (vx_source){.name = paths ? "images" : "procedural images",
                          .count = count,
                          .output_count = 1,
                          .outputs = {{"images", VX_F32, 3, {options->size, options->size, 3}}},
                          .sample_bytes = (size_t)options->size * (size_t)options->size * 3,
                          .worker_bytes = sizeof(worker),
                          .make = make,
                          .deliver = deliver,
                          .release = release,
                          .free = free_source};
    s->picture = paths ? open_picture : draw_picture;
    int status = set_options(s, options);
    if (!status) status = vx_cache_init(&s->cache, "images", count, options->cache_bytes);
    if (!status && paths) status = vx_paths_copy(&s->base.paths, "images", paths, count);
    if (status) free_source(&s->base);
    else *out = s;
    return status;
}

int vx_image_stream(vx_data_stream **out, const char *const *paths, int64_t count, const vx_data_stream_options *stream,
                    const vx_image_options *options)
{
    image_source *s;
    *out = NULL;
    if (!paths) return vx_fail(VX_EINVAL, "images: no paths");
    int status = new_source(&s, paths, count, options);
    return status ? status : vx_data_stream_new(out, &s->base, stream);
}

int vx_procedural_stream(vx_data_stream **out, int64_t image_seed, int64_t first, int64_t count,
                         const vx_data_stream_options *stream, const vx_image_options *options)
{
    image_source *s;
    *out = NULL;
    int status = new_source(&s, NULL, count, options);
    if (status) return status;
    s->image_seed = image_seed;
    s->first = first;
    return vx_data_stream_new(out, &s->base, stream);
}
