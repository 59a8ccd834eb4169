/* image.h: images in and out, the procedural image set, and streams of images. Part of vertex.h, which includes it (its
 * conventions hold here); no #include of its own, so that its text can be read by LuaJIT as it is.
 *
 * An image is a u8 tensor (H, W, 3), RGB, on the CPU. What a file is is judged by its first bytes, never by its name.
 */
#ifndef VX_IMAGE_H
#define VX_IMAGE_H

enum { VX_IMAGE_MAX_PIXELS = 178956970 }; /* larger images are refused before anything is allocated (Pillow's limit) */

/* Tells what the first bytes of a file say it is: "jpeg", "png", "other" (an image format that is not read) or "none",
 * as an empty file is. */
VX_API int vx_image_kind(const char *path, const char **kind);

/* Decodes JPEG (baseline, progressive, grayscale, CMYK, YCCK) and PNG (1 to 16 bits, palette, gray, alpha, interlaced)
 * to RGB, as Pillow's convert("RGB") does: alpha is dropped, EXIF orientation, ICC profiles and gamma are ignored; of
 * 16 bits the upper eight count. VX_EIO with the reason for a file that is truncated, damaged or no such image. */
VX_API int vx_image_open(vx_tensor **out, const char *path);
VX_API int vx_image_decode(vx_tensor **out, const void *bytes, size_t count);

/* Resizes src (H, W, 3) to dst (h, w, 3) through Pillow's antialiased filter, "bilinear" or "bicubic": bit for bit what
 * Image.resize gives. */
VX_API int vx_image_resize(vx_tensor *dst, const vx_tensor *src, const char *filter);

/* Encode a u8 tensor (H, W) or (H, W, C), C = 1, 3 or 4, as PNG: to a u8 tensor of the file's bytes, or to a file
 * (whole or not at all, see vx_writer). */
VX_API int vx_image_png(vx_tensor **bytes, const vx_tensor *x);
VX_API int vx_image_save_png(const char *path, const vx_tensor *x);

/* Fills x, u8 (H, W, 3), with image `index` of the procedural set `seed`. The picture is a function of (seed, index);
 * another size shows the same scene with finer or coarser detail. */
VX_API int vx_procedural_image(vx_tensor *x, int64_t seed, int64_t index);

/* -- Streams of images: decoded, resized, cropped, standardized ---------------------------------------------------- */

typedef struct vx_image_options {
    int64_t size;          /* images are (size, size, 3) */
    const char *resize;    /* "short": short side to size; "none": only where the image is smaller */
    const char *filter;    /* "bilinear" or "bicubic" */
    const char *crop;      /* "center" or "random" */
    bool flip;             /* half of the images are mirrored */
    int64_t cache_bytes;   /* keep resized images in memory up to here */
    float mean[3], std[3]; /* (x / 255 - mean) / std for each channel */
} vx_image_options;

/* Starts a stream of image files. Its output is images, f32 (batch, size, size, 3). paths: count texts, copied. */
VX_API int vx_image_stream(vx_data_stream **out, const char *const *paths, int64_t count,
                           const vx_data_stream_options *stream, const vx_image_options *options);

/* Starts a stream of images first .. first + count - 1 of the procedural set image_seed; options as for files. */
VX_API int vx_procedural_stream(vx_data_stream **out, int64_t image_seed, int64_t first, int64_t count,
                                const vx_data_stream_options *stream, const vx_image_options *options);

#endif
