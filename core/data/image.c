/* image.c: JPEG and PNG to RGB bytes, and PNG out.
 *
 * The reference for every pixel is Pillow, because published numbers come through it:
 *   - JPEG: libjpeg-turbo's accurate DCT and fancy upsampling, which is what Pillow asks for. CMYK and YCCK are read as
 *     the inverted CMYK that Adobe writes, then R = c k / 255 rounded.
 *   - PNG: libpng's classic interface without any gamma handling (its simplified one applies gamma to 16-bit files).
 *     Deviation: Pillow clips 16-bit grayscale to 255, which leaves a white picture; here it keeps the upper eight
 *     bits, as Pillow itself does for 16-bit RGB.
 *
 * A damaged file must never end the process, nor make it allocate what a header merely claims: sizes are checked
 * against VX_IMAGE_MAX_PIXELS first, libpng's longjmp stays inside decode_png() and encode_png(), TurboJPEG has its
 * own.
 */
#include <errno.h>
#include <png.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <turbojpeg.h>
#include <unistd.h>

#include "pixels.h"
#include "core/internal.h"

enum { MAX_FILE = 1 << 30 }; /* bytes; no photograph is larger */

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

enum { HEAD = 16 };                  /* bytes that tell the formats apart */
enum { NONE = 0, JPEG, PNG, OTHER }; /* OTHER: an image format that is not read */

static bool starts(const uint8_t *head, size_t count, size_t offset, const char *magic, size_t length)
{
    return count >= offset + length && !memcmp(head + offset, magic, length);
}

/* Tells the kind by the first bytes; *name: what people call it. */
static int sniff(const uint8_t *head, size_t count, const char **name)
{
    static const struct {
        int kind, offset, length;
        const char *magic, *name;
    } formats[] = {
        {JPEG, 0, 3, "\xff\xd8\xff", "JPEG"},
        {PNG, 0, 8, "\x89PNG\r\n\x1a\n", "PNG"},
        {OTHER, 0, 6, "GIF87a", "GIF"},
        {OTHER, 0, 6, "GIF89a", "GIF"},
        {OTHER, 8, 4, "WEBP", "WebP"},
        {OTHER, 0, 4, "II*\0", "TIFF"},
        {OTHER, 0, 4, "MM\0*", "TIFF"},
        {OTHER, 4, 8, "ftypavif", "AVIF"},
        {OTHER, 4, 8, "ftypheic", "HEIC"},
        {OTHER, 4, 8, "ftypmif1", "HEIF"},
        {OTHER, 0, 12, "\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"},
        {OTHER, 0, 12, "\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"},
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
        return OTHER;
    }
    *name = "unknown";
    return NONE;
}

int vx_image_kind(const char *path, const char **kind)
{
    static const char *const kinds[] = {[NONE] = "none", [JPEG] = "jpeg", [PNG] = "png", [OTHER] = "other"};
    uint8_t head[HEAD];
    const char *name;
    struct stat about;
    int fd;
    int status = vx_open_regular(path, &fd, &about);
    if (status) return vx_fail_because(status, "%s", path);
    int64_t got = vx_read_all(fd, head, HEAD);
    if (got < 0) status = vx_fail(VX_EIO, "%s: %s", path, strerror(errno));
    else *kind = kinds[sniff(head, (size_t)got, &name)];
    close(fd);
    return status;
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

/* Encodes x into *out, *count bytes, the caller's to release. */
static int write_png(vx_bytes *out, size_t *count, const vx_tensor *x)
{
    const char *contract = x && x->ndim == 2 ? "x:u8(H,W) : H * W > 0 && H * W <= most"
                                             : "x:u8(H,W,C) : H * W > 0 && H * W <= most; C == 1 || C == 3 || C == 4";
    int status = VX_CHECK_HOST("image_png", contract, (x), (("most", VX_IMAGE_MAX_PIXELS)));
    if (status) return status;
    png_job job = {0};
    png_infop info = NULL;
    png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, &job, png_failed, png_warned);
    if (png) info = png_create_info_struct(png);
    status = info ? encode_png(png, info, &job, x) : vx_fail(VX_ENOMEM, "image_png: out of memory");
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
    case JPEG: return read_jpeg(d, bytes, count, out);
    case PNG: return read_png(bytes, count, out);
    case OTHER: return vx_fail(VX_EIO, "%s; only JPEG and PNG are read", name);
    }
    return vx_fail(VX_EIO, "neither JPEG nor PNG by its content");
}

int vx_decoder_file(vx_decoder *d, const char *path, vx_pixels *out)
{
    struct stat about;
    int fd;
    int status = vx_open_regular(path, &fd, &about);
    if (status) return status;
    int64_t size = about.st_size;
    if (size > MAX_FILE) status = vx_fail(VX_EIO, "%lld bytes, more than the limit of %d", (long long)size, MAX_FILE);
    if (!status) status = vx_bytes_reserve(&d->file, (size_t)size);
    if (!status) {
        size = vx_read_all(fd, d->file.data, size);
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

/* Makes a u8 tensor of count bytes. */
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
    int status = decoded(out, vx_decoder_file(&d, path, &p), &p);
    if (status) vx_fail_because(status, "%s", path);
    vx_decoder_release(&d);
    vx_bytes_release(&p.bytes);
    return status;
}

int vx_image_decode(vx_tensor **out, const void *bytes, size_t count)
{
    vx_decoder d = {0};
    vx_pixels p = {0};
    int status = decoded(out, vx_decoder_bytes(&d, bytes, count, &p), &p);
    if (status) vx_fail_because(status, "image_decode");
    vx_decoder_release(&d);
    vx_bytes_release(&p.bytes);
    return status;
}

int vx_image_png(vx_tensor **out, const vx_tensor *x)
{
    vx_bytes file = {0};
    size_t count = 0;
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
