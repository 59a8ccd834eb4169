/* backend.h: one device family: how it holds memory, and one function per op of ops.def. The CPU's table is complete and
 * is the specification; a NULL entry of another backend is reported as "not implemented". */
#ifndef VX_BACKEND_H
#define VX_BACKEND_H

#include "ops_macros.h"
#include "tensor.h"

enum { VX_TO_DEVICE = 0, VX_TO_HOST, VX_ON_DEVICE }; /* backend copy */

typedef struct vx_backend {
    int abi; /* VX_ABI */
    const char *name;
    int (*count)(int *count);                                       /* devices; a status and vx_error() say why there are none */
    int (*describe)(int ordinal, char *text, size_t size);
    int (*alloc)(int ordinal, size_t bytes, void **out);            /* from the system, not the pool; VX_ENOMEM */
    void (*release)(int ordinal, void *data, size_t bytes);
    int (*capacity)(int ordinal, int64_t *bytes);                   /* default of vx_memory_limit */
    int (*transfer)(int ordinal, void *dst, const void *src, size_t bytes, int direction);
    int (*sync)(int ordinal);
    int (*threads)(int n);                                          /* n > 0 sets; returns the number in force */
#define VX_OP(op, contract, text, tensors, numbers) \
    int (*op)(VX_MAP(VX_DECLARE_TENSOR, VX_UNWRAP tensors) VX_MAP_AFTER(VX_DECLARE_NUMBER, VX_UNWRAP numbers));
#include "ops.def"
#undef VX_OP
} vx_backend;

/* The backend behind a device number, never NULL for a device of an existing tensor; ordinal is its index there. */
const vx_backend *vx_backend_of(int device, int *ordinal);

/* The SIMD variant of the CPU kernels that fits this processor (kernels/cpu.c, compiled once per variant). */
const vx_backend *vx_cpu_backend(void);

/* Checks a call against its contract (contract.c). */
int vx_check(const char *op, const char *contract, vx_tensor *const *tensors, int tensor_count, const char *const *number_names,
             const double *numbers, int number_count);

/* Pool and accounting (memory.c). */
int vx_memory_take(int device, size_t bytes, void **out);
void vx_memory_give(int device, void *data, size_t bytes);

#endif
