/* tensor.c: tensors as views of refcounted storages, and moving their data. */
#include "tensor.h"

#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* -- Making and freeing -------------------------------------------------------------------------------------------- */

static bool is_contiguous(const vx_tensor *x)
{
    int64_t expected = 1;
    if (x->numel == 0) return true;
    for (int i = x->ndim - 1; i >= 0; i--) {
        if (x->shape[i] != 1 && x->stride[i] != expected) return false;
        expected *= x->shape[i];
    }
    return true;
}

static int shape_fault(const char *op, int ndim, const int64_t *shape)
{
    vx_tensor x = {.ndim = ndim < 0 ? 0 : ndim > VX_MAX_DIMS ? VX_MAX_DIMS : ndim};
    char a[160];
    memcpy(x.shape, shape, sizeof(int64_t) * (size_t)x.ndim);
    return vx_fail(VX_EINVAL, "%s: shape %s: expected at most %d sizes, each 0 or more, with fewer than 2^60 elements",
                   op, vx_shape_text(&x, a, sizeof a), VX_MAX_DIMS);
}

/* Returns the number of a shape's elements, -1 where it is no shape. */
static int64_t count_elements(int ndim, const int64_t *shape)
{
    int64_t n = 1;
    bool empty = false;
    if (ndim < 0 || ndim > VX_MAX_DIMS) return -1;
    for (int i = 0; i < ndim; i++) {
        if (shape[i] < 0) return -1;
        if (shape[i] == 0) empty = true;
        else if (n > ((int64_t)1 << 60) / shape[i]) return -1;
        else n *= shape[i];
    }
    return empty ? 0 : n;
}

int vx_new(vx_tensor **out, int device, int dtype, int ndim, const int64_t *shape)
{
    *out = NULL;
    if (dtype < 0 || dtype >= VX_DTYPES) return vx_fail(VX_EINVAL, "new: dtype %d, of 0 .. %d", dtype, VX_DTYPES - 1);
    int64_t numel = count_elements(ndim, shape);
    if (numel < 0) return shape_fault("new", ndim, shape);
    int status = vx_device_check("new", device);
    if (status) return status;
    vx_tensor *x = calloc(1, sizeof *x);
    if (!x) return vx_fail(VX_ENOMEM, "out of memory for a tensor's header");
    vx_storage *storage;
    status = vx_storage_new(&storage, device, (size_t)numel * vx_dtype_bytes(dtype));
    if (status) {
        free(x);
        return status;
    }
    *x = (vx_tensor){.storage = storage,
                     .data = storage->data,
                     .dtype = dtype,
                     .ndim = ndim,
                     .device = device,
                     .contiguous = true,
                     .numel = numel};
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        x->shape[i] = shape[i];
        x->stride[i] = stride;
        stride *= shape[i] > 0 ? shape[i] : 1;
    }
    *out = x;
    return VX_OK;
}

int vx_view(vx_tensor **out, const vx_tensor *x, int ndim, const int64_t *shape, const int64_t *stride, int64_t offset)
{
    *out = NULL;
    if (!x) return vx_fail(VX_EINVAL, "view: of a released tensor");
    int64_t numel = count_elements(ndim, shape);
    if (numel < 0) return shape_fault("view", ndim, shape);
    size_t item = vx_dtype_bytes(x->dtype);
    int64_t begin = (x->data - (char *)x->storage->data) / (int64_t)item + offset, first = begin, last = begin;
    for (int i = 0; i < ndim; i++) {
        int64_t reach = stride[i] * (shape[i] > 0 ? shape[i] - 1 : 0);
        if (reach < 0) first += reach;
        else last += reach;
    }
    if (numel > 0 && (first < 0 || last >= (int64_t)(x->storage->bytes / item))) {
        vx_tensor asked = {.ndim = ndim};
        char a[160], b[160];
        memcpy(asked.shape, shape, sizeof(int64_t) * (size_t)ndim);
        return vx_fail(VX_EINVAL, "view: %s at offset %lld reaches outside the storage of x %s",
                       vx_shape_text(&asked, a, sizeof a), (long long)offset, vx_shape_text(x, b, sizeof b));
    }
    vx_tensor *v = calloc(1, sizeof *v);
    if (!v) return vx_fail(VX_ENOMEM, "out of memory for a tensor's header");
    *v = *x;
    v->data = (char *)x->storage->data + (numel > 0 ? begin * (int64_t)item : 0);
    v->ndim = ndim;
    v->numel = numel;
    for (int i = 0; i < ndim; i++) v->shape[i] = shape[i], v->stride[i] = stride[i];
    v->contiguous = is_contiguous(v);
    atomic_fetch_add_explicit(&x->storage->refs, 1, memory_order_relaxed);
    *out = v;
    return VX_OK;
}

void vx_free(vx_tensor *x)
{
    if (!x) return;
    vx_storage *storage = x->storage;
    free(x);
    vx_storage_drop(storage);
}

/* -- Questions ----------------------------------------------------------------------------------------------------- */

int vx_ndim(const vx_tensor *x) { return x ? x->ndim : -1; }
int vx_dtype(const vx_tensor *x) { return x ? x->dtype : -1; }
int vx_device(const vx_tensor *x) { return x ? x->device : -1; }
int64_t vx_numel(const vx_tensor *x) { return x ? x->numel : -1; }
int64_t vx_size(const vx_tensor *x, int dim) { return x && dim >= 0 && dim < x->ndim ? x->shape[dim] : -1; }
int64_t vx_stride(const vx_tensor *x, int dim) { return x && dim >= 0 && dim < x->ndim ? x->stride[dim] : 0; }
int vx_is_contiguous(const vx_tensor *x) { return x && x->contiguous; }
int64_t vx_writes(const vx_tensor *x) { return x ? x->storage->writes + vx_arena_launches(x->storage->arena) : 0; }
const char *vx_last_writer(const vx_tensor *x) { return x && x->storage->writer ? x->storage->writer : ""; }

/* Finds the bytes from x's first element in memory to its last. */
static void reach(const vx_tensor *x, const char **begin, const char **end)
{
    const int64_t item = (int64_t)vx_dtype_bytes(x->dtype);
    *begin = *end = x->data;
    for (int i = 0; i < x->ndim; i++) {
        const int64_t bytes = x->stride[i] * (x->shape[i] - 1) * item;
        if (bytes < 0) *begin += bytes;
        else *end += bytes;
    }
    *end += item;
}

int vx_same_storage(const vx_tensor *a, const vx_tensor *b)
{
    const char *begin[2], *end[2];
    if (!a || !b || a->storage != b->storage) return 0;
    if (a->numel == 0 || b->numel == 0) return 1;
    reach(a, begin, end);
    reach(b, begin + 1, end + 1);
    return begin[0] < end[1] && begin[1] < end[0] ? 2 : 1;
}

/* -- Moving data --------------------------------------------------------------------------------------------------- */

static int check_range(const char *op, const vx_tensor *x, int64_t first, int64_t count)
{
    char a[160];
    if (!x) return vx_fail(VX_EINVAL, "%s: a released tensor", op);
    if (!x->contiguous)
        return vx_fail(VX_EINVAL, "%s: x %s is a strided view, expected a contiguous tensor", op,
                       vx_shape_text(x, a, sizeof a));
    if (first < 0 || count < 0 || first + count > x->numel)
        return vx_fail(VX_EINVAL, "%s: elements %lld .. %lld of x %s", op, (long long)first,
                       (long long)(first + count - 1), vx_shape_text(x, a, sizeof a));
    return VX_OK;
}

int vx_read(const vx_tensor *x, int64_t first, int64_t count, void *host)
{
    int status = check_range("read", x, first, count), ordinal;
    if (status || count == 0) return status;
    size_t item = vx_dtype_bytes(x->dtype);
    const vx_backend *backend = vx_backend_of(x->device, &ordinal);
    return backend->transfer(ordinal, host, x->data + (size_t)first * item, (size_t)count * item, VX_TO_HOST);
}

int vx_write(vx_tensor *x, int64_t first, int64_t count, const void *host)
{
    int status = check_range("write", x, first, count), ordinal;
    if (status || count == 0) return status;
    size_t item = vx_dtype_bytes(x->dtype);
    const vx_backend *backend = vx_backend_of(x->device, &ordinal);
    vx_wrote("write", x);
    return backend->transfer(ordinal, x->data + (size_t)first * item, host, (size_t)count * item, VX_TO_DEVICE);
}

/* Visits every element of x, of which dimensions 0 .. dim - 1 are at `at`; says whether one was seen before. */
static bool seen_before(const vx_tensor *x, int dim, int64_t at, unsigned char *seen)
{
    if (dim == x->ndim) {
        const bool before = seen[at / 8] >> at % 8 & 1;
        seen[at / 8] |= (unsigned char)(1 << at % 8);
        return before;
    }
    for (int64_t i = 0; i < x->shape[dim]; i++)
        if (seen_before(x, dim + 1, at + i * x->stride[dim], seen)) return true;
    return false;
}

bool vx_shares_elements(const vx_tensor *x)
{
    int64_t extent = 0, least = -1; /* of the dimensions with strides up to `least` */
    if (x->contiguous || x->numel < 2) return false;
    for (;;) {
        int next = -1;
        for (int i = 0; i < x->ndim; i++) {
            const int64_t stride = llabs(x->stride[i]);
            if (x->shape[i] > 1 && stride > least && (next < 0 || stride < llabs(x->stride[next]))) next = i;
        }
        if (next < 0) return false;
        least = llabs(x->stride[next]);
        if (least <= extent) break;
        int here = 0;
        for (int i = 0; i < x->ndim; i++)
            if (x->shape[i] > 1 && llabs(x->stride[i]) == least) extent += (x->shape[i] - 1) * least, here++;
        if (here > 1) return true;
    }
    if (least == 0) return true;
    const char *begin, *end; /* strides that interlock: only a look at all elements tells */
    reach(x, &begin, &end);
    const int64_t item = (int64_t)vx_dtype_bytes(x->dtype);
    unsigned char *seen = calloc((size_t)((end - begin) / item) / 8 + 1, 1);
    const bool shares = !seen || seen_before(x, 0, (x->data - begin) / item, seen);
    free(seen);
    return shares;
}

/* Says whether dst and src share memory other than element by element at the same place. */
static bool interferes(const vx_tensor *dst, const vx_tensor *src)
{
    const char *to, *to_end, *from, *from_end;
    if (dst->storage != src->storage || !dst->numel) return false;
    reach(dst, &to, &to_end);
    reach(src, &from, &from_end);
    if (to_end <= from || from_end <= to) return false;
    bool same = dst->data == src->data && dst->dtype == src->dtype;
    for (int i = 0; same && i < dst->ndim; i++) same = dst->shape[i] == 1 || dst->stride[i] == src->stride[i];
    return !same;
}

/* Makes a contiguous tensor of x's shape, dtype, device and elements; gives x itself where it is one, not *owned. */
static int made_contiguous(const vx_tensor *x, vx_tensor **out, bool *owned)
{
    *owned = false;
    *out = (vx_tensor *)x;
    if (x->contiguous) return VX_OK;
    int status = vx_new(out, x->device, x->dtype, x->ndim, x->shape);
    if (status) return status;
    status = vx_convert(*out, (vx_tensor *)x);
    if (status) vx_free(*out);
    else *owned = true;
    return status;
}

/* Moves contiguous bytes from one device to another, by way of the host where they know no shorter one. */
static int move(vx_tensor *dst, const vx_tensor *src, size_t bytes)
{
    int to, from;
    const vx_backend *there = vx_backend_of(dst->device, &to), *here = vx_backend_of(src->device, &from);
    int status = VX_OK; /* the host takes no part in the transfer, but it may be recording */
    if (here->can & VX_CAN_HOST) status = here->sync(from);
    if (!status && there->can & VX_CAN_HOST) status = there->sync(to);
    if (status) return status;
    if (here->can & VX_CAN_HOST) return there->transfer(to, dst->data, src->data, bytes, VX_TO_DEVICE);
    if (there->can & VX_CAN_HOST) return here->transfer(from, dst->data, src->data, bytes, VX_TO_HOST);
    if (there == here && there->can & VX_CAN_PEERS) return there->peer(to, dst->data, from, src->data, bytes);
    void *host;
    size_t held = bytes;
    status = vx_pool_alloc(0, &held, &host);
    if (status) return status;
    status = here->transfer(from, host, src->data, bytes, VX_TO_HOST);
    if (!status) status = there->transfer(to, dst->data, host, bytes, VX_TO_DEVICE);
    vx_pool_free(0, host, held);
    return status;
}

/* Copies from one device to another. The bytes travel contiguous and in src's dtype; strides and dtype change on either
 * end. */
static int copy_across(vx_tensor *dst, const vx_tensor *src)
{
    vx_tensor *from, *landed = dst;
    bool owned;
    int status = made_contiguous(src, &from, &owned);
    if (status) return status;
    if (!dst->contiguous || dst->dtype != src->dtype)
        status = vx_new(&landed, dst->device, src->dtype, src->ndim, src->shape);
    size_t bytes = (size_t)src->numel * vx_dtype_bytes(src->dtype);
    if (!status && bytes) status = move(landed, from, bytes);
    if (!status && landed != dst) status = vx_convert(dst, landed);
    if (landed != dst) vx_free(landed);
    if (owned) vx_free(from);
    return status;
}

int vx_copy(vx_tensor *dst, const vx_tensor *src)
{
    char a[160], b[160];
    if (!dst || !src) return vx_fail(VX_EINVAL, "copy: %s is a released tensor", dst ? "src" : "dst");
    bool same = dst->ndim == src->ndim;
    for (int i = 0; same && i < src->ndim; i++) same = dst->shape[i] == src->shape[i];
    if (!same)
        return vx_fail(VX_EINVAL, "copy: dst %s and src %s disagree on their shape", vx_shape_text(dst, a, sizeof a),
                       vx_shape_text(src, b, sizeof b));
    if (vx_shares_elements(dst))
        return vx_fail(VX_EINVAL, "copy: elements of dst %s share memory, expected a tensor or view whose do not",
                       vx_shape_text(dst, a, sizeof a));
    vx_tensor *before = NULL; /* src as it is now */
    int status = VX_OK;
    if (interferes(dst, src)) {
        status = vx_new(&before, src->device, src->dtype, src->ndim, src->shape);
        if (!status) status = vx_convert(before, (vx_tensor *)src);
        src = before;
    }
    if (!status) status = dst->device == src->device ? vx_convert(dst, (vx_tensor *)src) : copy_across(dst, src);
    if (!status) vx_wrote("copy", dst);
    vx_free(before);
    return status;
}
