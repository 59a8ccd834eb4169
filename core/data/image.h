/* image.h: images in and out, the procedural image set, and the prefetching loader. Part of vertex.h, which includes it
 * (its conventions hold here); no #include of its own, so that its text can be read by LuaJIT as it is.
 *
 * An image is a u8 tensor (H, W, 3), RGB, on the CPU. What a file is is judged by its first bytes, never by its name.
 */
#ifndef VX_IMAGE_H
#define VX_IMAGE_H

enum { VX_IMAGE_NONE = 0, VX_IMAGE_JPEG, VX_IMAGE_PNG, VX_IMAGE_OTHER }; /* OTHER: an image format that is not read */
enum { VX_BILINEAR = 0, VX_BICUBIC };
enum { VX_RESIZE_SHORT = 0, VX_RESIZE_NONE };
enum { VX_CROP_CENTER = 0, VX_CROP_RANDOM };
enum { VX_IMAGE_MAX_PIXELS = 178956970 }; /* larger images are refused before anything is allocated (Pillow's limit) */

/* What the first bytes of the file say it is. An empty file is VX_IMAGE_NONE. */
VX_API int vx_image_kind(const char *path, int *kind);

/* Decodes JPEG (baseline, progressive, grayscale, CMYK, YCCK) and PNG (1 to 16 bits, palette, gray, alpha, interlaced)
 * to RGB, as Pillow's convert("RGB") does: alpha is dropped, EXIF orientation, ICC profiles and gamma are ignored; of
 * 16 bits the upper eight count. VX_EIO with the reason for a file that is truncated, damaged or no such image. */
VX_API int vx_image_open(vx_tensor **out, const char *path);
VX_API int vx_image_decode(vx_tensor **out, const void *bytes, size_t count);

/* dst (h, w, 3) = src (H, W, 3) through Pillow's antialiased filter, bit for bit what Image.resize gives. */
VX_API int vx_image_resize(vx_tensor *dst, const vx_tensor *src, int filter);

/* PNG of a u8 tensor (H, W) or (H, W, C), C = 1, 3 or 4: as a u8 tensor of the file's bytes, or as a file (whole or not
 * at all, see vx_writer). */
VX_API int vx_image_png(vx_tensor **bytes, const vx_tensor *x);
VX_API int vx_image_save_png(const char *path, const vx_tensor *x);

/* Fills x, u8 (H, W, 3), with image `index` of the procedural set `seed`. The picture is a function of (seed, index);
 * another size shows the same scene with finer or coarser detail. */
VX_API int vx_procedural_image(vx_tensor *x, int64_t seed, int64_t index);

/* -- Loader: files → decoded, resized, cropped, standardized batches, ahead of time ------------------------------ */

/* The sample stream. Raw position p shows, in epoch p / count, file number order[p % count], where the order of an
 * epoch is a permutation drawn from (seed, epoch), or the files' own with shuffle = 0. Random crops and flips are drawn
 * from
 * (seed, epoch, file). Broken files are left out: the batch is filled from later positions. So the batches depend on
 * the options and the files, not on the number of workers, the queue or the cache. */
typedef struct vx_loader_options {
    int64_t count;      /* files; images of the procedural set where there are no paths */
    int64_t first;      /* procedural set: index of its first image */
    int64_t image_seed; /* procedural set: its seed */
    int64_t seed;       /* order, crops, flips */
    int64_t epochs;     /* 0: without end; else VX_EEND after them, the last batch may be smaller */
    int64_t position;   /* raw position to start from: vx_loader_position() of the run that is resumed */
    int64_t shard,
        shards; /* several readers of one stream: this one takes positions position + shard, + shards, ...; 0, 1 */
    int64_t cache_bytes;   /* keep resized images in memory up to here */
    int size;              /* images are (size, size, 3) */
    int batch;             /* images in a batch */
    int workers;           /* decoding threads, 1 to 256 */
    int queue;             /* images decoded ahead; 0: two batches and one per worker */
    int resize;            /* VX_RESIZE_SHORT: short side to size; _NONE: only where the image is smaller */
    int filter;            /* VX_BILINEAR, VX_BICUBIC */
    int crop;              /* VX_CROP_CENTER, VX_CROP_RANDOM */
    int flip;              /* 1: half of the images mirrored */
    int shuffle;           /* 0: files in their own order */
    int strict;            /* 1: the first broken file makes vx_loader_next fail */
    float mean[3], std[3]; /* (x / 255 - mean) / std for each channel */
} vx_loader_options;

typedef struct vx_loader vx_loader;

/* paths: count strings, each ended by a NUL, in `bytes` bytes; copied. NULL: the procedural set. Starts the workers. */
VX_API int vx_loader_new(vx_loader **out, const char *paths, size_t bytes, const vx_loader_options *options);
/* Ends the workers and waits for them: at most one image's decoding each. NULL is fine. */
VX_API void vx_loader_free(vx_loader *loader);

/* The next batch: images f32 (batch, size, size, 3), index i32 (batch) or NULL: the files' numbers; count: how many
 * there are, less than batch only at the end of the last epoch. VX_EEND after it. VX_EIO with the file and the reason
 * for a broken file with strict = 1, where no file at all can be read, and where it would have to wait while
 * vx_interrupted() is true; after that last one the loader goes on as if not called. Call it from one thread at a
 * time. */
VX_API int vx_loader_next(vx_loader *loader, vx_tensor *images, vx_tensor *index, int *count);

/* Raw position after the last delivered batch: a loader started there delivers what this one will. */
VX_API int64_t vx_loader_position(const vx_loader *loader);
/* Broken files met so far (by batches delivered, so the same whatever the number of workers), in the order of the
 * stream. */
VX_API int64_t vx_loader_broken_count(const vx_loader *loader);
VX_API int vx_loader_broken(const vx_loader *loader, int64_t i, char *path, size_t path_size, char *reason,
                            size_t reason_size);

#endif
