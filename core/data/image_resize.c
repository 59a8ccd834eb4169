/* image_resize.c: Pillow's antialiased resize [1], bit for bit: two passes with 22-bit fixed-point weights, bytes in
 * between.
 *
 * [1] Pillow, src/libImaging/Resample.c, version 13
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "pixels.h"
#include "core/internal.h"

enum { BILINEAR = 0, BICUBIC };
const char *const vx_filters[] = {"bilinear", "bicubic", NULL};

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
    double (*f)(double) = filter == BICUBIC ? bicubic : bilinear;
    double scale = (double)in / (double)out, stretch = scale < 1.0 ? 1.0 : scale, inverse = 1.0 / stretch;
    double support = (filter == BICUBIC ? 2.0 : 1.0) * stretch;
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

int vx_image_resize(vx_tensor *dst, const vx_tensor *src, const char *filter)
{
    vx_bytes work = {0};
    int number;
    int status = VX_CHECK_HOST(
        "image_resize", "dst:u8(A,B,3) <- src:u8(H,W,3) : A * B > 0 && A * B <= most; H * W > 0 && H * W <= most",
        (dst, src), (("most", VX_IMAGE_MAX_PIXELS)));
    if (!status) status = vx_check_choice("image_resize", "filter", filter, vx_filters, &number);
    if (!status && vx_same_storage(dst, src)) status = vx_fail(VX_EINVAL, "image_resize: dst and src share memory");
    if (status) return status;
    status = vx_pixels_resize((uint8_t *)dst->data, dst->shape[0], dst->shape[1], (const uint8_t *)src->data,
                              src->shape[0], src->shape[1], number, &work);
    vx_bytes_release(&work);
    return status;
}
