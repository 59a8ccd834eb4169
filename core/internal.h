/* internal.h: what the files of core share with each other, and nobody else. Lower files know none of those above them:
 *
 *     error.c < device.c < memory.c, schema.c < graph.c < dispatch.c < tensor.c < system.c, host.c < data/
 */
#ifndef VX_INTERNAL_H
#define VX_INTERNAL_H

#include "backend.h"

/* -- Devices (device.c) -------------------------------------------------------------------------------------------- */

/* The backend behind a device number, never NULL for a device of an existing tensor; *ordinal: its index there. */
const vx_backend *vx_backend_of(int device, int *ordinal);

/* Whether a device's backend has all of the VX_CAN_ bits. */
bool vx_device_has(int device, unsigned capabilities);

/* VX_OK where the number stands for an open device; op names the caller. */
int vx_device_check(const char *op, int device);

/* The number of an open device; -1 where no device of that name is open. */
int vx_device_find(const char *name);

/* Opens a device under the next free number. One caller at a time. */
int vx_device_add(const char *name, const vx_backend *backend, int ordinal, int *device);

/* -- Pool and accounting (memory.c) -------------------------------------------------------------------------------- */

/* Takes a block of at least *bytes, which becomes what the block holds; free is told that number. */
int vx_pool_alloc(int device, size_t *bytes, void **out);
void vx_pool_free(int device, void *data, size_t bytes);

/* A storage of `bytes` with one reference. The last reference's end gives its block back. */
int vx_storage_new(vx_storage **out, int device, size_t bytes);
void vx_storage_drop(vx_storage *storage); /* one reference less */

/* An arena is the memory of a graph: what is freed between begin and end. One recording at a time. */
typedef struct vx_arena vx_arena;
vx_arena *vx_arena_begin(int device); /* NULL without memory */
void vx_arena_end(vx_arena *arena);
void vx_arena_free(vx_arena *arena); /* its blocks go to the pool, and those of tensors that still live when they end */

/* -- Contracts (schema.c) ------------------------------------------------------------------------------------------ */

/* Checks a call against its contract. */
int vx_check(const char *op, const char *contract, vx_tensor *const *tensors, int tensor_count,
             const char *const *number_names, const double *numbers, int number_count);

/* Checks what the tensors of a call on lists must be to each other, where each place has passed vx_check. */
int vx_check_lists(const char *op, const char *contract, vx_tensor *const *const *lists, int list_count, int count);

/* -- Recording (graph.c): what ops ask before they run ------------------------------------------------------------- */

extern int vx_recording; /* the device on which a graph is recorded, or -1 */

/* Keeps the tensors of an op for the graph that is recorded; NULL among them is fine. */
int vx_record_op(const char *op, vx_tensor *const *tensors, int count);

#endif
