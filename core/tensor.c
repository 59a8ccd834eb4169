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
int vx_same_storage(const vx_tensor *a, const vx_tensor *b) { return a && b && a->storage == b->storage; }

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
    return backend->transfer(ordinal, x->data + (size_t)first * item, host, (size_t)count * item, VX_TO_DEVICE);
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
    if (here->can & VX_CAN_HOST) return there->transfer(to, dst->data, src->data, bytes, VX_TO_DEVICE);
    if (there->can & VX_CAN_HOST) return here->transfer(from, dst->data, src->data, bytes, VX_TO_HOST);
    if (there == here && there->can & VX_CAN_PEERS) return there->peer(to, dst->data, from, src->data, bytes);
    void *host;
    size_t held = bytes;
    int status = vx_pool_alloc(0, &held, &host);
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
    return dst->device == src->device ? vx_convert(dst, (vx_tensor *)src) : copy_across(dst, src);
}
