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
 * against VX_IMAGE_MAX_PIXELS and what the file can hold first, and the libraries' longjmp stays inside decode_jpeg(),
 * decode_png() and encode_png(). What costs no pixel, such as stray bytes between segments or a cut last chunk, passes.
 */
#include <errno.h>
#include <stdio.h> /* before jpeglib.h, which needs it */

#include <jerror.h>
#include <jpeglib.h>
#include <png.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pixels.h"
#include "core/internal.h"

enum { MAX_FILE = 1 << 30 }; /* bytes; no photograph is larger */

static int check_limit(int64_t height, int64_t width)
{
    if (height < 1 || width < 1 || height > VX_IMAGE_MAX_PIXELS / width)
        return vx_fail(VX_EIO, "%lld x %lld pixels, more than the limit of %d in all", (long long)width,
                       (long long)height, VX_IMAGE_MAX_PIXELS);
    return VX_OK;
}

static int reserve_pixels(vx_pixels *p, int64_t height, int64_t width)
{
    int status = vx_bytes_reserve(&p->bytes, (size_t)height * width * 3);
    if (status) return status;
    p->height = height;
    p->width = width;
    return VX_OK;
}

/* Refuses a picture of more elements than a file of `count` bytes can hold, at `most` of them a byte: its header alone
 * must not make us allocate. */
static int check_claim(int64_t elements, int64_t most, size_t count)
{
    if (elements / most <= (int64_t)count) return VX_OK;
    return vx_fail(VX_EIO, "its header claims a picture that %zu bytes cannot hold", count);
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
    if (!path) return vx_fail(VX_EINVAL, "image_kind: no path");
    int status = vx_open_regular(path, &fd, &about);
    if (status) return vx_fail_because(status, "%s", path);
    int64_t got = vx_read_all(fd, head, HEAD);
    if (got < 0) status = vx_fail(VX_EIO, "%s: %s", path, strerror(errno));
    else *kind = kinds[sniff(head, (size_t)got, &name)];
    close(fd);
    return status;
}

/* -- JPEG ---------------------------------------------------------------------------------------------------------- */

/* What the callbacks see; libjpeg knows the parts by their addresses. */
typedef struct jpeg_job {
    struct jpeg_error_mgr errors;
    struct jpeg_source_mgr source;
    struct jpeg_progress_mgr progress;
    jmp_buf leave;
    int status;
    char error[JMSG_LENGTH_MAX];
} jpeg_job;

enum { MAX_SCANS = 500 }; /* a progressive file has some ten; each scan passes over the whole picture */

static void jpeg_failed(j_common_ptr jpeg)
{
    jpeg_job *job = jpeg->client_data;
    job->errors.format_message(jpeg, job->error);
    longjmp(job->leave, 1);
}

/* Ends at the first warning that costs pixels, so that a cut file with a giant header is not filled with gray. */
static void jpeg_warned(j_common_ptr jpeg, int level)
{
    int code = jpeg->err->msg_code;
    bool harmless = code == JWRN_EXTRANEOUS_DATA || code == JWRN_JFIF_MAJOR || code == JWRN_ADOBE_XFORM ||
                    code == JWRN_NOT_SEQUENTIAL;
    if (level < 0 && !harmless) jpeg_failed(jpeg);
}

static void jpeg_scanned(j_common_ptr jpeg)
{
    if (((j_decompress_ptr)jpeg)->input_scan_number <= MAX_SCANS) return;
    jpeg_job *job = jpeg->client_data;
    snprintf(job->error, sizeof job->error, "more than %d scans", MAX_SCANS);
    longjmp(job->leave, 1);
}

static void jpeg_nothing(j_decompress_ptr jpeg) { (void)jpeg; }

static boolean jpeg_more(j_decompress_ptr jpeg)
{
    jpeg_job *job = jpeg->client_data;
    snprintf(job->error, sizeof job->error, "the file ends too early");
    longjmp(job->leave, 1);
}

static void jpeg_skip(j_decompress_ptr jpeg, long count)
{
    if (count <= 0) return;
    if ((size_t)count > jpeg->src->bytes_in_buffer) jpeg_more(jpeg);
    jpeg->src->next_input_byte += count;
    jpeg->src->bytes_in_buffer -= (size_t)count;
}

static uint8_t times(uint8_t a, uint8_t b) /* a b / 255, rounded */
{
    unsigned t = (unsigned)a * b + 128;
    return (uint8_t)(((t >> 8) + t) >> 8);
}

/* Everything that may jump; after a jump only *job is read. */
static int decode_jpeg(j_decompress_ptr jpeg, jpeg_job *job, size_t count, vx_decoder *d, vx_pixels *out)
{
    if (setjmp(job->leave))
        return job->status ? job->status : vx_fail(VX_EIO, "truncated or damaged JPEG (%s)", job->error);
    jpeg_read_header(jpeg, TRUE);
    const int64_t height = jpeg->image_height, width = jpeg->image_width;
    /* Huffman codes: a block of 64 pixels takes a bit or more */
    job->status = check_limit(height, width);
    if (!job->status && !jpeg->arith_code) job->status = check_claim(height * width, 512, count);
    if (!job->status) job->status = reserve_pixels(out, height, width);
    const bool cmyk = jpeg->jpeg_color_space == JCS_CMYK || jpeg->jpeg_color_space == JCS_YCCK;
    if (cmyk && !job->status) job->status = vx_bytes_reserve(&d->cmyk, (size_t)(width * height * 4));
    if (job->status) return job->status;
    jpeg->out_color_space = cmyk ? JCS_CMYK : JCS_RGB;
    jpeg_start_decompress(jpeg);
    while (jpeg->output_scanline < jpeg->output_height) {
        const int64_t y = jpeg->output_scanline;
        uint8_t *row = cmyk ? d->cmyk.data + y * width * 4 : out->bytes.data + y * width * 3;
        jpeg_read_scanlines(jpeg, &row, 1);
    }
    jpeg_finish_decompress(jpeg);
    if (cmyk) {
        const uint8_t *from = d->cmyk.data;
        uint8_t *rgb = out->bytes.data;
        for (int64_t i = 0; i < width * height; i++)
            for (int c = 0; c < 3; c++) rgb[i * 3 + c] = times(from[i * 4 + c], from[i * 4 + 3]);
    }
    return VX_OK;
}

static int read_jpeg(vx_decoder *d, const uint8_t *bytes, size_t count, vx_pixels *out)
{
    jpeg_job job = {0};
    struct jpeg_decompress_struct jpeg = {.err = jpeg_std_error(&job.errors), .client_data = &job};
    job.errors.error_exit = jpeg_failed;
    job.errors.emit_message = jpeg_warned;
    if (setjmp(job.leave)) return vx_fail(VX_ENOMEM, "out of memory for a JPEG decoder");
    jpeg_create_decompress(&jpeg);
    job.source = (struct jpeg_source_mgr){.next_input_byte = bytes,
                                          .bytes_in_buffer = count,
                                          .init_source = jpeg_nothing,
                                          .fill_input_buffer = jpeg_more,
                                          .skip_input_data = jpeg_skip,
                                          .resync_to_restart = jpeg_resync_to_restart,
                                          .term_source = jpeg_nothing};
    job.progress.progress_monitor = jpeg_scanned;
    jpeg.src = &job.source;
    jpeg.progress = &job.progress;
    int status = decode_jpeg(&jpeg, &job, count, d, out);
    jpeg_destroy_decompress(&jpeg);
    return status;
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
    int64_t rows_left; /* reading: rows of all passes that are still to come */
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

static uint32_t big_endian(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

/* Gives libpng the next bytes. Of a chunk of pixels that the file cuts short it gives the length that is there, for all
 * of them may have come by then. */
static void png_take(png_structp png, png_bytep to, size_t count)
{
    png_job *job = png_get_io_ptr(png);
    if (count > job->left) png_error(png, "the file ends too early");
    memcpy(to, job->from, count);
    job->from += count;
    job->left -= count;
    if (count == 8 && !memcmp(to + 4, "IDAT", 4) && big_endian(to) > job->left)
        png_save_uint_32(to, (uint32_t)job->left);
}

/* Is a chunk other than those of pixels and the last one cut short? Pillow refuses that, also behind the pixels. */
static bool cut_chunk(const uint8_t *bytes, size_t count)
{
    for (size_t at = 8; at + 8 <= count;) {
        size_t length = big_endian(bytes + at);
        const uint8_t *type = bytes + at + 4;
        if (!memcmp(type, "IEND", 4)) return false;
        if (length > count - at - 8) return memcmp(type, "IDAT", 4) != 0;
        at += 12 + length;
    }
    return false;
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

/* Called with each row that was inflated. */
static void png_row_came(png_structp png, png_row_infop row, png_bytep bytes)
{
    (void)row, (void)bytes;
    ((png_job *)png_get_user_transform_ptr(png))->rows_left--;
}

/* Counts the rows of all passes that hold pixels. */
static int64_t count_rows(png_structp png, png_infop info)
{
    const png_uint_32 height = png_get_image_height(png, info), width = png_get_image_width(png, info);
    if (png_get_interlace_type(png, info) == PNG_INTERLACE_NONE) return height;
    int64_t rows = 0;
    for (int pass = 0; pass < 7; pass++)
        if (PNG_PASS_COLS(width, pass) > 0) rows += PNG_PASS_ROWS(height, pass);
    return rows;
}

/* Everything that may jump. The locals that matter after a jump are in *job or unchanged since setjmp. Damage behind
 * the last pixel costs none. */
static int decode_png(png_structp png, png_infop info, png_job *job, vx_pixels *out)
{
    const size_t count = job->left;
    job->rows_left = 1;
    if (setjmp(job->leave)) {
        if (job->rows_left == 0) return VX_OK;
        return job->status ? vx_fail(job->status, "%s", job->error)
                           : vx_fail(VX_EIO, "truncated or damaged PNG (%s)", job->error);
    }
    png_set_read_fn(png, job, png_take);
    png_set_user_limits(png, VX_IMAGE_MAX_PIXELS, VX_IMAGE_MAX_PIXELS);
    png_set_crc_action(png, PNG_CRC_ERROR_QUIT, PNG_CRC_ERROR_QUIT);
    /* Texts, profiles and the like are passed over: libpng would allocate what they claim to hold, up to 2 GB. */
    png_set_keep_unknown_chunks(png, PNG_HANDLE_CHUNK_NEVER, NULL, -1);
    png_read_info(png, info);
    png_set_crc_action(png, PNG_CRC_QUIET_USE, PNG_CRC_QUIET_USE); /* Pillow checks no sum of pixels */
    /* deflate makes at most 1032 bytes of one */
    const int64_t height = png_get_image_height(png, info), width = png_get_image_width(png, info);
    job->status = check_limit(height, width);
    if (!job->status) job->status = check_claim((int64_t)png_get_rowbytes(png, info) * height, 1032, count);
    if (job->status) return job->status;
    job->status = reserve_pixels(out, height, width);
    if (job->status) return job->status;
    png_set_strip_16(png);
    png_set_expand(png);
    png_set_gray_to_rgb(png);
    png_set_strip_alpha(png);
    png_set_interlace_handling(png);
    png_set_read_user_transform_fn(png, png_row_came);
    png_set_user_transform_info(png, job, 0, 0);
    png_read_update_info(png, info);
    if (png_get_rowbytes(png, info) != (size_t)out->width * 3) png_error(png, "an unknown pixel layout");
    job->rows = malloc(sizeof *job->rows * (size_t)out->height);
    if (!job->rows) {
        job->status = VX_ENOMEM;
        png_error(png, "out of memory");
    }
    for (int64_t y = 0; y < out->height; y++) job->rows[y] = out->bytes.data + y * out->width * 3;
    job->rows_left = count_rows(png, info);
    png_read_image(png, job->rows);
    return VX_OK;
}

static int read_png(const uint8_t *bytes, size_t count, vx_pixels *out)
{
    png_job job = {.from = bytes, .left = count};
    png_infop info = NULL;
    png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &job, png_failed, png_warned);
    if (png) info = png_create_info_struct(png);
    int status = info ? decode_png(png, info, &job, out) : vx_fail(VX_ENOMEM, "out of memory for a PNG decoder");
    if (!status && cut_chunk(bytes, count)) status = vx_fail(VX_EIO, "truncated or damaged PNG (a chunk is cut)");
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
    vx_bytes_release(&d->file);
    vx_bytes_release(&d->cmyk);
}

/* Makes a u8 tensor of count bytes. */
static int to_tensor(vx_tensor **out, int ndim, const int64_t *shape, const void *bytes, size_t count)
{
    int status = vx_new(out, 0, VX_U8, ndim, shape);
    if (!status && (status = vx_write(*out, 0, (int64_t)count, bytes))) {
        vx_free(*out);
        *out = NULL;
    }
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
    *out = NULL;
    if (!path) return vx_fail(VX_EINVAL, "image_open: no path");
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
    *out = NULL;
    if (!bytes && count) return vx_fail(VX_EINVAL, "image_decode: no bytes");
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
