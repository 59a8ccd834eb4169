/* tensor.h: what core and kernels see of a tensor. Nothing above the C boundary includes it. */
#ifndef VX_TENSOR_H
#define VX_TENSOR_H

#include "vertex.h"
#include "error.h"

/* Refcounted bytes on one device; every tensor is a view of one. C++ has no atomic_int, and kernels no need of it. */
#ifdef __cplusplus
typedef struct vx_storage vx_storage;
#else
#ifndef VX_CDEF
#include <stdatomic.h>
#endif
typedef struct vx_storage {
    atomic_int refs;
    int device;
    size_t bytes, held;     /* asked for, and taken from the pool */
    void *data;             /* a device pointer where the device's memory is not the host's */
    struct vx_arena *arena; /* of the graph during whose recording it was made, or NULL (memory.c) */
    struct vx_graph *kept;  /* the last graph that keeps it (graph.c), */
    int kept_at;            /* and where */
    int64_t writes;         /* how often it was written to: vx_wrote() */
    const char *writer;     /* by what last */
} vx_storage;
#endif

struct vx_tensor {
    vx_storage *storage;
    char *data; /* first element */
    int dtype, ndim, device;
    bool contiguous; /* row-major without gaps */
    int64_t numel;
    int64_t shape[VX_MAX_DIMS];
    int64_t stride[VX_MAX_DIMS]; /* elements */
};

static inline float *vx_f32(const vx_tensor *x) { return x ? (float *)x->data : NULL; }
static inline int32_t *vx_i32(const vx_tensor *x) { return x ? (int32_t *)x->data : NULL; }

/* Returns the bytes of an element of a dtype. */
static inline size_t vx_dtype_bytes(int dtype)
{
    switch (dtype) {
#define VX_DTYPE(number, name, type, stored)                                                                           \
    case VX_##number:                                                                                                  \
        return sizeof(type);
#include "dtypes.def"
#undef VX_DTYPE
    default: return 0;
    }
}

#ifdef __cplusplus
extern "C" {
#endif

/* Takes host memory for a kernel's working space: 64-byte aligned, from the pool, counted as live. Returns NULL and
 * sets vx_error(), in the name of `op`, where there is none. */
void *vx_scratch(const char *op, size_t bytes);
void vx_scratch_free(void *p); /* NULL is fine */

#ifdef __cplusplus
}
#endif
#endif
