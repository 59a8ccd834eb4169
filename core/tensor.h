/* tensor.h: what core and kernels see of a tensor. Nothing above the C boundary includes it. */
#ifndef VX_TENSOR_H
#define VX_TENSOR_H

#include <stdbool.h>

#include "vertex.h"

/* Refcounted bytes on one device; every tensor is a view of one. C++ has no atomic_int, and kernels no need of it. */
#ifdef __cplusplus
typedef struct vx_storage vx_storage;
#else
#include <stdatomic.h>
typedef struct vx_storage {
    atomic_int refs;
    int device;
    size_t bytes, held;     /* asked for, and taken from the pool */
    void *data;             /* a device pointer where device is not the CPU */
    struct vx_arena *arena; /* of the graph during whose recording it was made, or NULL (memory.c) */
    struct vx_graph *kept;  /* the last graph that keeps it (graph.c) */
} vx_storage;

void vx_storage_drop(vx_storage *storage); /* one reference less */
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

static inline float *vx_f32(const vx_tensor *x) { return x ? (float *)x->data : 0; }
static inline int32_t *vx_i32(const vx_tensor *x) { return x ? (int32_t *)x->data : 0; }

static inline size_t vx_dtype_bytes(int dtype) { return dtype == VX_U8 ? 1 : dtype == VX_BF16 ? 2 : 4; }

#ifdef __cplusplus
extern "C" {
#endif

const char *vx_dtype_name(int dtype);

/* Sets vx_error() and returns status. */
int vx_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* "(2,3,4)" into text; returns text. */
char *vx_shape_text(const vx_tensor *x, char *text, size_t size);

/* Host memory for a kernel's working space: 64-byte aligned, from the pool, counted as live; NULL and vx_error() where
 * there is none. op names the caller in that text. */
void *vx_scratch(const char *op, size_t bytes);
void vx_scratch_free(void *p);

#ifdef __cplusplus
}
#endif
#endif
