/* internal.h: what the files of core share with each other, and nobody else. A file calls only what stands before it:
 *
 *     error   device   memory   schema   graph   dispatch   tensor   stored   system   host   comm/   data/
 */
#ifndef VX_INTERNAL_H
#define VX_INTERNAL_H

#include "backend.h"

/* -- Devices (device.c) -------------------------------------------------------------------------------------------- */

/* Returns the backend behind a device number, never NULL for the device of a tensor; *ordinal: its index there. */
const vx_backend *vx_backend_of(int device, int *ordinal);

/* Says whether a device's backend has all of the VX_CAN_ bits. */
bool vx_device_has(int device, unsigned capabilities);

/* Checks that the number stands for an open device; op names the caller. */
int vx_device_check(const char *op, int device);

/* Returns the number of an open device; -1 where no device of that name is open. */
int vx_device_find(const char *name);

/* Opens a device under the next free number. One caller at a time. */
int vx_device_add(const char *name, const vx_backend *backend, int ordinal, int *device);

/* -- Pool and accounting (memory.c) -------------------------------------------------------------------------------- */

/* Takes a block of at least *bytes, which becomes what the block holds; free is told that number. */
int vx_pool_alloc(int device, size_t *bytes, void **out);
void vx_pool_free(int device, void *data, size_t bytes);

/* Makes a storage of `bytes` with one reference. The end of the last reference gives its block back. */
int vx_storage_new(vx_storage **out, int device, size_t bytes);
void vx_storage_drop(vx_storage *storage); /* one reference less */

/* Counts a write to x's storage by what is called `op`, a text that stays; NULL is fine. vx_check() counts those of an
 * op's outputs; whatever else writes calls this itself. */
static inline void vx_wrote(const char *op, vx_tensor *x)
{
    if (x) x->storage->writes++, x->storage->writer = op;
}

/* Says whether elements of x share memory, as a repeated view's do (tensor.c). */
bool vx_shares_elements(const vx_tensor *x);

/* An arena is the memory of a graph: what is freed between begin and end. One recording at a time. */
typedef struct vx_arena vx_arena;
vx_arena *vx_arena_begin(int device); /* NULL without memory */
void vx_arena_end(vx_arena *arena);
void vx_arena_launched(vx_arena *arena);          /* all of its memory may have been written to */
int64_t vx_arena_launches(const vx_arena *arena); /* how often; 0 for NULL */
void vx_arena_free(vx_arena *arena); /* its blocks go to the pool, and those of tensors that still live when they end */

/* -- Contracts (schema.c) ------------------------------------------------------------------------------------------ */

/* Checks a call against its contract. Where it holds, a write to each output is counted. */
int vx_check(const char *op, const char *contract, vx_tensor *const *tensors, int tensor_count,
             const char *const *number_names, const double *numbers, int number_count);

/* Checks a call whose tensors must lie in host memory, too. */
int vx_check_host(const char *op, const char *contract, vx_tensor *const *tensors, int tensor_count,
                  const char *const *number_names, const double *numbers, int number_count);

/* Calls vx_check_host with lists in parentheses, of tensors and of numbers under their names:
 *     VX_CHECK_HOST("resize", "y:u8(A,B) <- x:u8(H,W) : scale > 0", (y, x), (("scale", scale))) */
#define VX_CHECK_HOST(op, contract, tensors, numbers)                                                                  \
    vx_check_host(op, contract, VX_TENSORS(tensors) + 1, (int)(sizeof VX_TENSORS(tensors) / sizeof(vx_tensor *)) - 1,  \
                  VX_NUMBER_NAMES(numbers) + 1, VX_NUMBERS(numbers) + 1,                                               \
                  (int)(sizeof VX_NUMBERS(numbers) / sizeof(double)) - 1)
#define VX_TENSORS(tensors) ((vx_tensor *const[]){NULL VX_MAP_AFTER(VX_PLAIN_TENSOR, VX_UNWRAP tensors)})
#define VX_PLAIN_TENSOR(x) (vx_tensor *)(x)
#define VX_NUMBER_NAMES(numbers) ((const char *const[]){NULL VX_MAP_AFTER(VX_NUMBER_NAME, VX_UNWRAP numbers)})
#define VX_NUMBER_NAME(pair) VX_NUMBER_NAME_ pair
#define VX_NUMBER_NAME_(name, value) name
#define VX_NUMBERS(numbers) ((const double[]){0 VX_MAP_AFTER(VX_NUMBER_VALUE, VX_UNWRAP numbers)})
#define VX_NUMBER_VALUE(pair) VX_NUMBER_VALUE_ pair
#define VX_NUMBER_VALUE_(name, value) (double)(value)

/* Finds a word among the choices, which end with NULL; *choice: its place. */
int vx_check_choice(const char *op, const char *name, const char *value, const char *const *choices, int *choice);

/* Checks what the tensors of a call on lists must be to each other, where each place has passed vx_check. */
int vx_check_lists(const char *op, const char *contract, vx_tensor *const *const *lists, int list_count, int count);

/* -- Recording (graph.c): what ops ask before they run ------------------------------------------------------------- */

extern int vx_recording; /* the device on which a graph is recorded, or -1 */

/* Keeps the tensors of an op for the graph that is recorded; NULL among them is fine. written: they are outputs. */
int vx_record_op(const char *op, vx_tensor *const *tensors, int count, bool written);

/* Returns how many outputs a contract has; they come first. */
int vx_output_count(const char *contract);

/* -- Libraries beside this one (host.c) ---------------------------------------------------------------------------- */

/* Opens libvertex_NAME.so, from the folder VERTEX_BACKENDS or beside this library, and gives its vx_KIND_entry(), where
 * its vx_KIND_signature() is `signature`. VX_ENOSUP with the reason where it cannot be had. */
int vx_library_entry(const char *name, const char *kind, const char *signature, void **entry);

#endif
