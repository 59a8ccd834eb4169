/* image.c: JPEG and PNG to RGB bytes, Pillow's antialiased resize, and PNG out.
 *
 * The reference for every pixel is Pillow, because published numbers come through it:
 *   - JPEG: libjpeg-turbo's accurate DCT and fancy upsampling, which is what Pillow asks for. CMYK and YCCK are read as
 *     the
 *     inverted CMYK that Adobe writes, then R = c k / 255 rounded.
 *   - PNG: libpng's classic interface without any gamma handling (its simplified one applies gamma to 16-bit files).
 *     Deviation: Pillow clips 16-bit grayscale to 255, which leaves a white picture; here it keeps the upper eight
 *     bits, as
 *     Pillow itself does for 16-bit RGB.
 *   - Resize: [1], two passes with 22-bit fixed-point weights, bytes in between.
 *
 * A damaged file must never end the process, nor make it allocate what a header merely claims: sizes are checked
 * against VX_IMAGE_MAX_PIXELS first, libpng's longjmp stays inside decode_png() and encode_png(), TurboJPEG has its
 * own.
 *
 * [1] Pillow, src/libImaging/Resample.c, version 13
 */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <png.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <turbojpeg.h>
#include <unistd.h>

#include "pixels.h"
#include "core/tensor.h"

enum {
    MAX_FILE = 1 << 30,    /* bytes; no photograph is larger */
    KEEP_BYTES = 64 << 20, /* a buffer above this is given back once it is far too large */
};

/* -- Buffers ------------------------------------------------------------------------------------------------------- */

int vx_bytes_reserve(vx_bytes *b, size_t count)
{
    if (b->capacity > KEEP_BYTES && count < b->capacity / 4) vx_bytes_release(b);
    if (count <= b->capacity && b->data) return VX_OK;
    vx_bytes_release(b);
    b->data = malloc(count ? count : 1);
    if (!b->data) return vx_fail(VX_ENOMEM, "out of memory for an image of %zu bytes", count);
    b->capacity = count;
    return VX_OK;
}

void vx_bytes_release(vx_bytes *b)
{
    free(b->data);
    b->data = NULL;
    b->capacity = 0;
}

static int reserve_pixels(vx_pixels *p, int64_t height, int64_t width)
{
    if (height < 1 || width < 1 || height > VX_IMAGE_MAX_PIXELS / width)
        return vx_fail(VX_EIO, "%lld x %lld pixels, more than the limit of %d in all", (long long)width,
                       (long long)height, VX_IMAGE_MAX_PIXELS);
    int status = vx_bytes_reserve(&p->bytes, (size_t)height * width * 3);
    if (status) return status;
    p->height = height;
    p->width = width;
    return VX_OK;
}

/* -- What a file is ------------------------------------------------------------------------------------------------ */

enum { HEAD = 16 }; /* bytes that tell the formats apart */

static bool starts(const uint8_t *head, size_t count, size_t offset, const char *magic, size_t length)
{
    return count >= offset + length && !memcmp(head + offset, magic, length);
}

/* The kind by the first bytes; name: for people. */
static int sniff(const uint8_t *head, size_t count, const char **name)
{
    static const struct {
        int kind, offset, length;
        const char *magic, *name;
    } formats[] = {
        {VX_IMAGE_JPEG, 0, 3, "\xff\xd8\xff", "JPEG"},
        {VX_IMAGE_PNG, 0, 8, "\x89PNG\r\n\x1a\n", "PNG"},
        {VX_IMAGE_OTHER, 0, 6, "GIF87a", "GIF"},
        {VX_IMAGE_OTHER, 0, 6, "GIF89a", "GIF"},
        {VX_IMAGE_OTHER, 8, 4, "WEBP", "WebP"},
        {VX_IMAGE_OTHER, 0, 4, "II*\0", "TIFF"},
        {VX_IMAGE_OTHER, 0, 4, "MM\0*", "TIFF"},
        {VX_IMAGE_OTHER, 4, 8, "ftypavif", "AVIF"},
        {VX_IMAGE_OTHER, 4, 8, "ftypheic", "HEIC"},
        {VX_IMAGE_OTHER, 4, 8, "ftypmif1", "HEIF"},
        {VX_IMAGE_OTHER, 0, 12, "\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"},
        {VX_IMAGE_OTHER, 0, 12, "\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"},
    };
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
        if (starts(head, count, formats[i].offset, formats[i].magic, formats[i].length)) {
            *name = formats[i].name;
            return formats[i].kind;
        }
    }
    /* "BM" alone begins many a text; a bitmap has four reserved zeros further on */
    if (starts(head, count, 0, "BM", 2) && starts(head, count, 6, "\0\0\0\0", 4)) {
        *name = "BMP";
        return VX_IMAGE_OTHER;
    }
    *name = "unknown";
    return VX_IMAGE_NONE;
}

/* Opens a regular file; a named pipe neither blocks nor passes. */
static int open_regular(const char *path, int *fd, int64_t *size)
{
    struct stat info;
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (*fd < 0) return vx_fail(VX_EIO, "%s", strerror(errno));
    if (fstat(*fd, &info)) {
        int error = errno;
        close(*fd);
        return vx_fail(VX_EIO, "%s", strerror(error));
    }
    if (!S_ISREG(info.st_mode)) {
        close(*fd);
        return vx_fail(VX_EIO, "%s, not a file", S_ISDIR(info.st_mode) ? "a folder" : "a device or pipe");
    }
    *size = info.st_size;
    return VX_OK;
}

/* Bytes read, less than count at the end of the file; -1 and errno. */
static int64_t read_all(int fd, uint8_t *to, int64_t count)
{
    int64_t done = 0;
    while (done < count) {
        ssize_t got = read(fd, to + done, (size_t)(count - done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return -1;
        if (got == 0) break;
        done += got;
    }
    return done;
}

int vx_image_kind(const char *path, int *kind)
{
    uint8_t head[HEAD];
    const char *name;
    int64_t size;
    int fd;
    if (!path || !kind) return vx_fail(VX_EINVAL, "image_kind: no path");
    int status = open_regular(path, &fd, &size);
    if (!status) {
        int64_t got = read_all(fd, head, HEAD);
        if (got < 0) status = vx_fail(VX_EIO, "%s", strerror(errno));
        else *kind = sniff(head, (size_t)got, &name);
        close(fd);
    }
    if (status) {
        char reason[256];
        snprintf(reason, sizeof reason, "%s", vx_error());
        return vx_fail(status, "%s: %s", path, reason);
    }
    return VX_OK;
}

/* -- JPEG ---------------------------------------------------------------------------------------------------------- */

/* TurboJPEG reports any oddity as a warning, after which the picture is there, whole or partly gray. Oddities that cost
 * no pixel pass, as they do in Pillow: stray bytes before the end marker, an unknown JFIF revision or Adobe transform.
 * It tells the first warning only, so the end marker itself has to be there too. */
static bool harmless(const char *warning, const uint8_t *bytes, size_t count)
{
    if (!strstr(warning, "before marker 0xd9") && !strstr(warning, "JFIF revision") &&
        !strstr(warning, "Adobe color transform"))
        return false;
    size_t tail = count > 4096 ? count - 4096 : 0;
    for (size_t i = count - 1; i > tail; i--)
        if (bytes[i] == 0xd9 && bytes[i - 1] == 0xff) return true;
    return false;
}

static uint8_t times(uint8_t a, uint8_t b) /* a b / 255, rounded */
{
    unsigned t = (unsigned)a * b + 128;
    return (uint8_t)(((t >> 8) + t) >> 8);
}

static int read_jpeg(vx_decoder *d, const uint8_t *bytes, size_t count, vx_pixels *out)
{
    int width = 0, height = 0, sampling, colors = -1;
    if (!d->jpeg) d->jpeg = tjInitDecompress();
    if (!d->jpeg) return vx_fail(VX_ENOMEM, "out of memory for a JPEG decoder");
    /* The header call also refuses sampling factors that it has no name for; the decoder does not mind those, and by
     * then the sizes are known. */
    int failed = tjDecompressHeader3(d->jpeg, bytes, count, &width, &height, &sampling, &colors);
    if (failed && (width < 1 || height < 1 || colors < 0))
        return vx_fail(VX_EIO, "not a usable JPEG (%s)", tjGetErrorStr2(d->jpeg));
    if (width < 1 || height < 1) return vx_fail(VX_EIO, "a JPEG without a picture");
    int status = reserve_pixels(out, height, width);
    if (status) return status;

    bool cmyk = colors == TJCS_CMYK || colors == TJCS_YCCK;
    uint8_t *to = out->bytes.data;
    if (cmyk) {
        status = vx_bytes_reserve(&d->cmyk, (size_t)width * height * 4);
        if (status) return status;
        to = d->cmyk.data;
    }
    /* Stopping at the first warning keeps a cut file with a giant header from being filled with gray to its end. */
    int flags = TJFLAG_ACCURATEDCT | TJFLAG_LIMITSCANS, format = cmyk ? TJPF_CMYK : TJPF_RGB;
    failed = tjDecompress2(d->jpeg, bytes, count, to, width, 0, height, format, flags | TJFLAG_STOPONWARNING);
    if (failed && tjGetErrorCode(d->jpeg) == TJERR_WARNING && harmless(tjGetErrorStr2(d->jpeg), bytes, count))
        failed = tjDecompress2(d->jpeg, bytes, count, to, width, 0, height, format, flags) &&
                 tjGetErrorCode(d->jpeg) != TJERR_WARNING;
    if (failed) return vx_fail(VX_EIO, "truncated or damaged JPEG (%s)", tjGetErrorStr2(d->jpeg));
    if (cmyk) {
        uint8_t *rgb = out->bytes.data;
        for (size_t i = 0, n = (size_t)width * height; i < n; i++)
            for (int c = 0; c < 3; c++) rgb[i * 3 + c] = times(to[i * 4 + c], to[i * 4 + 3]);
    }
    return VX_OK;
}

/* -- PNG ----------------------------------------------------------------------------------------------------------- */

/* What the callbacks see; error text and buffers outlive the longjmp because they live here, not in registers. */
typedef struct png_job {
    jmp_buf leave;
    char error[160];
    const uint8_t *from; /* reading */
    size_t left;
    vx_bytes to; /* writing */
    size_t written;
    int status;
    png_bytep *rows;
} png_job;

static void png_failed(png_structp png, png_const_charp text)
{
    png_job *job = png_get_error_ptr(png);
    snprintf(job->error, sizeof job->error, "%s", text);
    longjmp(job->leave, 1);
}

static void png_warned(png_structp png, png_const_charp text)
{
    (void)png;
    (void)text;
}

static void png_take(png_structp png, png_bytep to, size_t count)
{
    png_job *job = png_get_io_ptr(png);
    if (count > job->left) png_error(png, "the file ends too early");
    memcpy(to, job->from, count);
    job->from += count;
    job->left -= count;
}

static void png_give(png_structp png, png_bytep from, size_t count)
{
    png_job *job = png_get_io_ptr(png);
    size_t need = job->written + count;
    if (need > job->to.capacity) {
        size_t capacity = need * 2;
        uint8_t *grown = realloc(job->to.data, capacity);
        if (!grown) {
            job->status = VX_ENOMEM;
            png_error(png, "out of memory");
        }
        job->to.data = grown;
        job->to.capacity = capacity;
    }
    memcpy(job->to.data + job->written, from, count);
    job->written = need;
}

static void png_flushed(png_structp png) { (void)png; }

/* Everything that may jump. The locals that matter after a jump are in *job or unchanged since setjmp. */
static int decode_png(png_structp png, png_infop info, png_job *job, vx_pixels *out)
{
    if (setjmp(job->leave))
        return job->status ? vx_fail(job->status, "%s", job->error)
                           : vx_fail(VX_EIO, "truncated or damaged PNG (%s)", job->error);
    png_set_read_fn(png, job, png_take);
    png_set_user_limits(png, VX_IMAGE_MAX_PIXELS, VX_IMAGE_MAX_PIXELS);
    png_read_info(png, info);
    job->status = reserve_pixels(out, png_get_image_height(png, info), png_get_image_width(png, info));
    if (job->status) return job->status;
    png_set_strip_16(png);
    png_set_expand(png);
    png_set_gray_to_rgb(png);
    png_set_strip_alpha(png);
    png_set_interlace_handling(png);
    png_read_update_info(png, info);
    if (png_get_rowbytes(png, info) != (size_t)out->width * 3) png_error(png, "an unknown pixel layout");
    job->rows = malloc(sizeof *job->rows * (size_t)out->height);
    if (!job->rows) {
        job->status = VX_ENOMEM;
        png_error(png, "out of memory");
    }
    for (int64_t y = 0; y < out->height; y++) job->rows[y] = out->bytes.data + y * out->width * 3;
    png_read_image(png, job->rows);
    png_read_end(png, NULL);
    return VX_OK;
}

static int read_png(const uint8_t *bytes, size_t count, vx_pixels *out)
{
    png_job job = {.from = bytes, .left = count};
    png_infop info = NULL;
    png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &job, png_failed, png_warned);
    if (png) info = png_create_info_struct(png);
    int status = info ? decode_png(png, info, &job, out) : vx_fail(VX_ENOMEM, "out of memory for a PNG decoder");
    png_destroy_read_struct(&png, &info, NULL);
    free(job.rows);
    return status;
}

static int encode_png(png_structp png, png_infop info, png_job *job, const vx_tensor *x)
{
    if (setjmp(job->leave)) return vx_fail(job->status ? job->status : VX_EINVAL, "image_png: %s", job->error);
    int64_t height = x->shape[0], width = x->shape[1], channels = x->ndim == 3 ? x->shape[2] : 1;
    int color = channels == 1 ? PNG_COLOR_TYPE_GRAY : channels == 3 ? PNG_COLOR_TYPE_RGB : PNG_COLOR_TYPE_RGBA;
    png_set_write_fn(png, job, png_give, png_flushed);
    png_set_IHDR(png, info, (png_uint_32)width, (png_uint_32)height, 8, color, PNG_INTERLACE_NONE,
                 PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
    png_write_info(png, info);
    for (int64_t y = 0; y < height; y++) png_write_row(png, (png_const_bytep)x->data + y * width * channels);
    png_write_end(png, info);
    return VX_OK;
}

/* The file's bytes into *out, the caller's to release. */
static int write_png(vx_bytes *out, size_t *count, const vx_tensor *x)
{
    char shape[96];
    bool fits = x && x->dtype == VX_U8 && x->device == 0 && x->contiguous && x->numel > 0 &&
                (x->ndim == 2 || (x->ndim == 3 && (x->shape[2] == 1 || x->shape[2] == 3 || x->shape[2] == 4)));
    if (!fits)
        return vx_fail(VX_EINVAL, "image_png: wants contiguous u8 (H,W) or (H,W,1|3|4) on the CPU, got %s %s",
                       x ? vx_dtype_name(x->dtype) : "a released tensor",
                       x ? vx_shape_text(x, shape, sizeof shape) : "");
    if (x->shape[0] > VX_IMAGE_MAX_PIXELS / x->shape[1])
        return vx_fail(VX_EINVAL, "image_png: %s is too large", vx_shape_text(x, shape, sizeof shape));
    png_job job = {0};
    png_infop info = NULL;
    png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, &job, png_failed, png_warned);
    if (png) info = png_create_info_struct(png);
    int status = info ? encode_png(png, info, &job, x) : vx_fail(VX_ENOMEM, "image_png: out of memory");
    png_destroy_write_struct(&png, &info);
    if (status) {
        vx_bytes_release(&job.to);
        return status;
    }
    *out = job.to;
    *count = job.written;
    return VX_OK;
}

/* -- Decoding ------------------------------------------------------------------------------------------------------ */

int vx_decoder_bytes(vx_decoder *d, const uint8_t *bytes, size_t count, vx_pixels *out)
{
    const char *name;
    if (!count) return vx_fail(VX_EIO, "an empty file");
    switch (sniff(bytes, count, &name)) {
    case VX_IMAGE_JPEG: return read_jpeg(d, bytes, count, out);
    case VX_IMAGE_PNG: return read_png(bytes, count, out);
    case VX_IMAGE_OTHER: return vx_fail(VX_EIO, "%s; only JPEG and PNG are read", name);
    }
    return vx_fail(VX_EIO, "neither JPEG nor PNG by its content");
}

int vx_decoder_file(vx_decoder *d, const char *path, vx_pixels *out)
{
    int fd;
    int64_t size;
    int status = open_regular(path, &fd, &size);
    if (status) return status;
    if (size > MAX_FILE) status = vx_fail(VX_EIO, "%lld bytes, more than the limit of %d", (long long)size, MAX_FILE);
    if (!status) status = vx_bytes_reserve(&d->file, (size_t)size);
    if (!status) {
        size = read_all(fd, d->file.data, size);
        if (size < 0) status = vx_fail(VX_EIO, "%s", strerror(errno));
    }
    close(fd);
    return status ? status : vx_decoder_bytes(d, d->file.data, (size_t)size, out);
}

void vx_decoder_release(vx_decoder *d)
{
    if (d->jpeg) tjDestroy(d->jpeg);
    d->jpeg = NULL;
    vx_bytes_release(&d->file);
    vx_bytes_release(&d->cmyk);
}

/* A u8 tensor with the count bytes. */
static int to_tensor(vx_tensor **out, int ndim, const int64_t *shape, const void *bytes, size_t count)
{
    int status = vx_new(out, 0, VX_U8, ndim, shape);
    if (!status) memcpy((*out)->data, bytes, count);
    return status;
}

static int decoded(vx_tensor **out, int status, const vx_pixels *p)
{
    int64_t shape[3] = {p->height, p->width, 3};
    return status ? status : to_tensor(out, 3, shape, p->bytes.data, (size_t)p->height * p->width * 3);
}

int vx_image_open(vx_tensor **out, const char *path)
{
    vx_decoder d = {0};
    vx_pixels p = {0};
    if (!out || !path) return vx_fail(VX_EINVAL, "image_open: no path");
    int status = decoded(out, vx_decoder_file(&d, path, &p), &p);
    if (status) {
        char reason[256];
        snprintf(reason, sizeof reason, "%s", vx_error());
        vx_fail(status, "%s: %s", path, reason);
    }
    vx_decoder_release(&d);
    vx_bytes_release(&p.bytes);
    return status;
}

int vx_image_decode(vx_tensor **out, const void *bytes, size_t count)
{
    vx_decoder d = {0};
    vx_pixels p = {0};
    if (!out || !bytes) return vx_fail(VX_EINVAL, "image_decode: no bytes");
    int status = decoded(out, vx_decoder_bytes(&d, bytes, count, &p), &p);
    if (status) {
        char reason[256];
        snprintf(reason, sizeof reason, "%s", vx_error());
        vx_fail(status, "image_decode: %s", reason);
    }
    vx_decoder_release(&d);
    vx_bytes_release(&p.bytes);
    return status;
}

int vx_image_png(vx_tensor **out, const vx_tensor *x)
{
    vx_bytes file = {0};
    size_t count = 0;
    if (!out) return vx_fail(VX_EINVAL, "image_png: nowhere to put it");
    int status = write_png(&file, &count, x);
    int64_t shape[1] = {(int64_t)count};
    if (!status) status = to_tensor(out, 1, shape, file.data, count);
    vx_bytes_release(&file);
    return status;
}

int vx_image_save_png(const char *path, const vx_tensor *x)
{
    vx_bytes file = {0};
    vx_writer *w = NULL;
    size_t count = 0;
    if (!path) return vx_fail(VX_EINVAL, "image_save_png: no path");
    int status = write_png(&file, &count, x);
    if (!status) status = vx_writer_open(&w, path);
    if (!status) {
        status = vx_writer_bytes(w, file.data, count);
        if (status) vx_writer_abort(w);
        else status = vx_writer_commit(w);
    }
    vx_bytes_release(&file);
    return status;
}

/* -- Resize -------------------------------------------------------------------------------------------------------- */

enum { WEIGHT_BITS = 32 - 8 - 2 }; /* one bit for the sign, one for bicubic's overshoot */

/* The weights of one axis: output o reads `count[o]` inputs from `first[o]` on, with weights[o taps ...]. */
typedef struct axis {
    int64_t taps;
    int32_t *first, *count, *weights;
} axis;

static double bilinear(double x)
{
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double bicubic(double x) /* a = -1/2 */
{
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * a : 0.0;
}

/* Bit-exactness hangs on each rounding below: `volatile` keeps a processor with fused multiply-add from skipping
 * one. */
static int make_axis(axis *a, int64_t in, int64_t out, int filter)
{
    double (*f)(double) = filter == VX_BICUBIC ? bicubic : bilinear;
    double scale = (double)in / (double)out, stretch = scale < 1.0 ? 1.0 : scale, inverse = 1.0 / stretch;
    double support = (filter == VX_BICUBIC ? 2.0 : 1.0) * stretch;
    a->taps = (int64_t)ceil(support) * 2 + 1;
    double *k = malloc(sizeof *k * (size_t)a->taps);
    a->first = malloc(sizeof *a->first * (size_t)(out * (a->taps + 2)));
    if (!k || !a->first) {
        free(k);
        free(a->first);
        a->first = NULL;
        return vx_fail(VX_ENOMEM, "out of memory for the weights of a resize from %lld to %lld", (long long)in,
                       (long long)out);
    }
    a->count = a->first + out;
    a->weights = a->count + out;
    for (int64_t o = 0; o < out; o++) {
        volatile double center = ((double)o + 0.5) * scale;
        double total = 0.0;
        int64_t lo = (int64_t)(center - support + 0.5), hi = (int64_t)(center + support + 0.5);
        lo = lo < 0 ? 0 : lo;
        hi = hi > in ? in : hi;
        for (int64_t i = 0; i < hi - lo; i++) {
            k[i] = f(((double)(i + lo) - center + 0.5) * inverse);
            total += k[i];
        }
        a->first[o] = (int32_t)lo;
        a->count[o] = (int32_t)(hi - lo);
        for (int64_t i = 0; i < hi - lo; i++) {
            volatile double weight = total != 0.0 ? k[i] / total : k[i];
            volatile double fixed = weight * (1 << WEIGHT_BITS);
            a->weights[o * a->taps + i] = (int32_t)(fixed < 0 ? -0.5 + fixed : 0.5 + fixed);
        }
    }
    free(k);
    return VX_OK;
}

static inline uint8_t clip8(int32_t v)
{
    v >>= WEIGHT_BITS;
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

static void resize_rows(uint8_t *dst, int64_t width, const uint8_t *src, int64_t src_width, int64_t rows, const axis *a)
{
    for (int64_t y = 0; y < rows; y++, src += src_width * 3, dst += width * 3) {
        for (int64_t x = 0; x < width; x++) {
            const uint8_t *p = src + (int64_t)a->first[x] * 3;
            const int32_t *w = a->weights + x * a->taps;
            int32_t r = 1 << (WEIGHT_BITS - 1), g = r, b = r;
            for (int32_t i = 0, n = a->count[x]; i < n; i++, p += 3) {
                r += w[i] * p[0];
                g += w[i] * p[1];
                b += w[i] * p[2];
            }
            dst[x * 3] = clip8(r);
            dst[x * 3 + 1] = clip8(g);
            dst[x * 3 + 2] = clip8(b);
        }
    }
}

static void resize_columns(uint8_t *dst, int64_t height, const uint8_t *src, int64_t row_bytes, const axis *a)
{
    enum { TILE = 1024 };
    int32_t sum[TILE];
    for (int64_t y = 0; y < height; y++, dst += row_bytes) {
        const int32_t *w = a->weights + y * a->taps;
        for (int64_t x0 = 0; x0 < row_bytes; x0 += TILE) {
            int64_t n = row_bytes - x0 < TILE ? row_bytes - x0 : TILE;
            for (int64_t x = 0; x < n; x++) sum[x] = 1 << (WEIGHT_BITS - 1);
            for (int32_t i = 0; i < a->count[y]; i++) {
                const uint8_t *p = src + ((int64_t)a->first[y] + i) * row_bytes + x0;
                int32_t k = w[i];
                for (int64_t x = 0; x < n; x++) sum[x] += k * p[x];
            }
            for (int64_t x = 0; x < n; x++) dst[x0 + x] = clip8(sum[x]);
        }
    }
}

int vx_pixels_resize(uint8_t *dst, int64_t height, int64_t width, const uint8_t *src, int64_t src_height,
                     int64_t src_width, int filter, vx_bytes *work)
{
    bool across = width != src_width, down = height != src_height;
    axis h = {0}, v = {0};
    int status = VX_OK;
    if (!across && !down) memcpy(dst, src, (size_t)height * width * 3);
    if (across) status = make_axis(&h, src_width, width, filter);
    if (!status && down) status = make_axis(&v, src_height, height, filter);
    if (status || !(across && down)) {
        if (!status && across) resize_rows(dst, width, src, src_width, height, &h);
        if (!status && down) resize_columns(dst, height, src, width * 3, &v);
    } else if (src_height > height && src_height - height > 2 * (src_width - width)) {
        /* Pillow's choice since version 13 where columns shrink the picture more; earlier ones always begin with the
         * rows. The two differ by roundings, and by what bicubic overshoots. */
        status = vx_bytes_reserve(work, (size_t)height * src_width * 3);
        if (!status) {
            resize_columns(work->data, height, src, src_width * 3, &v);
            resize_rows(dst, width, work->data, src_width, height, &h);
        }
    } else { /* only the rows that the columns' pass reads */
        int32_t top = v.first[0], bottom = v.first[height - 1] + v.count[height - 1];
        status = vx_bytes_reserve(work, (size_t)(bottom - top) * width * 3);
        if (!status) {
            resize_rows(work->data, width, src + (int64_t)top * src_width * 3, src_width, bottom - top, &h);
            for (int64_t o = 0; o < height; o++) v.first[o] -= top;
            resize_columns(dst, height, work->data, width * 3, &v);
        }
    }
    free(h.first);
    free(v.first);
    return status;
}

int vx_image_resize(vx_tensor *dst, const vx_tensor *src, int filter)
{
    char a[96], b[96];
    vx_bytes work = {0};
    if (!dst || !src) return vx_fail(VX_EINVAL, "image_resize: released tensor");
    for (int i = 0; i < 2; i++) {
        const vx_tensor *x = i ? src : dst;
        if (x->dtype != VX_U8 || x->ndim != 3 || x->shape[2] != 3 || x->device != 0 || !x->contiguous || x->numel < 1)
            return vx_fail(VX_EINVAL, "image_resize: wants contiguous u8 (H,W,3) on the CPU, got %s %s to %s %s",
                           vx_dtype_name(src->dtype), vx_shape_text(src, a, sizeof a), vx_dtype_name(dst->dtype),
                           vx_shape_text(dst, b, sizeof b));
        if (x->shape[0] > VX_IMAGE_MAX_PIXELS / x->shape[1])
            return vx_fail(VX_EINVAL, "image_resize: %s is too large", vx_shape_text(x, a, sizeof a));
    }
    if (vx_same_storage(dst, src)) return vx_fail(VX_EINVAL, "image_resize: source and destination share memory");
    if (filter != VX_BILINEAR && filter != VX_BICUBIC)
        return vx_fail(VX_EINVAL, "image_resize: unknown filter %d", filter);
    int status = vx_pixels_resize((uint8_t *)dst->data, dst->shape[0], dst->shape[1], (const uint8_t *)src->data,
                                  src->shape[0], src->shape[1], filter, &work);
    vx_bytes_release(&work);
    return status;
}

int vx_procedural_image(vx_tensor *x, int64_t seed, int64_t index)
{
    char shape[96];
    if (!x || x->dtype != VX_U8 || x->ndim != 3 || x->shape[2] != 3 || x->device != 0 || !x->contiguous || x->numel < 1)
        return vx_fail(VX_EINVAL, "procedural_image: wants contiguous u8 (H,W,3) on the CPU, got %s %s",
                       x ? vx_dtype_name(x->dtype) : "a released tensor",
                       x ? vx_shape_text(x, shape, sizeof shape) : "");
    vx_pixels_procedural((uint8_t *)x->data, x->shape[0], x->shape[1], (uint64_t)seed, (uint64_t)index);
    return VX_OK;
}
