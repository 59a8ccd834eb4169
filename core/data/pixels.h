/* pixels.h: decoding and resizing below the tensors: plain buffers that grow and are used again, for a stream's
 * workers. Failures set the calling thread's vx_error() to the reason alone; who knows the file's name adds it. */
#ifndef VX_PIXELS_H
#define VX_PIXELS_H

#include "bytes.h"

/* RGB, row-major, no padding. */
typedef struct vx_pixels {
    int64_t height, width;
    vx_bytes bytes;
} vx_pixels;

/* One thread's working space for decoding. Zero-initialized is ready. */
typedef struct vx_decoder {
    vx_bytes file, cmyk;
} vx_decoder;

/* Decode a file, or the bytes of one, to RGB. VX_EIO with the reason. */
int vx_decoder_file(vx_decoder *d, const char *path, vx_pixels *out);
int vx_decoder_bytes(vx_decoder *d, const uint8_t *bytes, size_t count, vx_pixels *out);
void vx_decoder_release(vx_decoder *d);

/* The names of the filters, ended by NULL; a filter's number is its place. */
extern const char *const vx_filters[];

/* Resizes RGB src to dst through a filter; work is scratch of the caller. VX_ENOMEM. */
int vx_pixels_resize(uint8_t *dst, int64_t height, int64_t width, const uint8_t *src, int64_t src_height,
                     int64_t src_width, int filter, vx_bytes *work);

/* Renders image `index` of the procedural set `seed`. */
void vx_pixels_procedural(uint8_t *dst, int64_t height, int64_t width, uint64_t seed, uint64_t index);

#endif
