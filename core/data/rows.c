/* rows.c: vectors in files that may be larger than memory. Each file is mapped; what is read is copied into a tensor,
 * converted to f32 on the way, and the system keeps or drops the pages as memory allows.
 *
 * A mapped file that somebody cuts short would end the process at the next touch; its size is asked for before each
 * read, so that this is an error with the file's name.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core/files.h"
#include "core/internal.h"
#include "core/stored.h"

typedef struct part {
    const vx_reader *file;
    const vx_stored *stored;
    bool swapped, column_major;
    int64_t offset, first, rows; /* first: number of its first row among all */
    size_t bytes;                /* of the mapping, which begins with the file */
    char *map;
} part;

struct vx_rows {
    int count;
    int64_t width, rows;
    part *parts;
};

static int open_part(part *p, const vx_rows_part *given, int64_t width)
{
    if (!given->file) return vx_fail(VX_EINVAL, "rows: a closed reader");
    const char *path = given->file->path;
    p->file = given->file;
    p->stored = vx_stored_named("rows", path, given->format, &p->swapped);
    if (!p->stored) return VX_EINVAL;
    p->column_major = given->column_major != 0, p->offset = given->offset, p->rows = given->rows;
    if (p->offset < 0 || p->rows < 0 || (p->rows > 0 && p->rows > (INT64_MAX >> 8) / width))
        return vx_fail(VX_EINVAL, "rows %s: %lld rows at byte %lld", path, (long long)p->rows, (long long)p->offset);
    p->bytes = (size_t)p->offset + (size_t)p->rows * (size_t)width * (size_t)p->stored->bytes;
    if (!vx_reader_still_has(p->file, (int64_t)p->bytes))
        return vx_fail(VX_EIO, "rows %s: %lld rows of %lld elements need %zu bytes, the file has %lld", path,
                       (long long)p->rows, (long long)width, p->bytes, (long long)p->file->size);
    if (!p->bytes) return VX_OK;
    p->map = mmap(NULL, p->bytes, PROT_READ, MAP_SHARED, p->file->file, 0);
    if (p->map != MAP_FAILED) return VX_OK;
    p->map = NULL;
    return vx_fail(VX_EIO, "rows %s: cannot be mapped: %s", path, strerror(errno));
}

int vx_rows_open(vx_rows **out, const vx_rows_part *parts, int count, int64_t width)
{
    *out = NULL;
    if (count < 1 || width < 1) return vx_fail(VX_EINVAL, "rows: %d files of width %lld", count, (long long)width);
    vx_rows *r = calloc(1, sizeof *r);
    if (r) r->parts = calloc((size_t)count, sizeof *r->parts);
    if (!r || !r->parts) {
        free(r);
        return vx_fail(VX_ENOMEM, "rows: out of memory");
    }
    r->width = width;
    int status = VX_OK;
    for (int i = 0; i < count && !status; i++) {
        r->count++;
        r->parts[i].first = r->rows;
        status = open_part(&r->parts[i], &parts[i], width);
        r->rows += r->parts[i].rows;
    }
    if (!status && r->rows > INT32_MAX)
        status = vx_fail(VX_EINVAL, "rows: %lld rows, of at most 2^31 - 1", (long long)r->rows);
    if (status) vx_rows_free(r);
    else *out = r;
    return status;
}

void vx_rows_free(vx_rows *r)
{
    if (!r) return;
    for (int i = 0; i < r->count; i++) {
        part *p = &r->parts[i];
        if (p->map) munmap(p->map, p->bytes);
    }
    free(r->parts);
    free(r);
}

int64_t vx_rows_count(const vx_rows *r) { return r ? r->rows : 0; }

/* Finds the file that row n of all is in. */
static const part *part_of(const vx_rows *r, int64_t n)
{
    int low = 0, high = r->count - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (r->parts[middle].first <= n) low = middle;
        else high = middle - 1;
    }
    return &r->parts[low];
}

/* Copies row n of all to `to`. False where an element is a NaN, an Inf, or outside float32's range. */
static bool copy_row(const vx_rows *r, int64_t n, float *to)
{
    const part *p = part_of(r, n);
    const int64_t row = n - p->first, bytes = p->stored->bytes;
    const char *from = p->map + p->offset + (p->column_major ? row : row * r->width) * bytes;
    if (vx_stored_convert(p->stored, p->swapped, VX_F32, to, from, p->column_major ? p->rows * bytes : bytes, r->width,
                          0, p->file->path))
        return false;
    float sum = 0; /* of zeros, unless an element is a NaN or Inf */
    for (int64_t d = 0; d < r->width; d++) sum += 0 * to[d];
    return sum == 0;
}

int vx_rows_read(const vx_rows *r, vx_tensor *x, const vx_tensor *index, int64_t first)
{
    if (!r) return vx_fail(VX_EINVAL, "rows: closed");
    int status = VX_CHECK_HOST("rows", "x(B,D) <- index?:i32(B) : D == width", (x, index), (("width", r->width)));
    if (status) return status;
    const int64_t B = x->shape[0];
    const int32_t *at = vx_i32(index);
    for (int64_t i = 0; i < B; i++) {
        int64_t n = at ? at[i] : first + i;
        if (n < 0 || n >= r->rows)
            return vx_fail(VX_EINVAL, "rows: row %lld, of 0 .. %lld", (long long)n, (long long)r->rows - 1);
    }
    for (int i = 0; i < r->count; i++) {
        const part *p = &r->parts[i];
        if (!vx_reader_still_has(p->file, (int64_t)p->bytes))
            return vx_fail(VX_EIO, "rows %s: the file has become shorter", p->file->path);
    }
    int64_t bad = INT64_MAX;
#pragma omp parallel for schedule(static) reduction(min : bad) if (B * r->width > 16384)
    for (int64_t i = 0; i < B; i++) {
        int64_t n = at ? at[i] : first + i;
        if (!copy_row(r, n, vx_f32(x) + i * r->width) && n < bad) bad = n;
    }
    if (bad == INT64_MAX) return VX_OK;
    const part *p = part_of(r, bad);
    return vx_fail(VX_ENONFINITE, "%s: row %lld (0-based) holds a NaN or Inf", p->file->path,
                   (long long)(bad - p->first));
}
