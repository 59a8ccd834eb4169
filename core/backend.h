/* backend.h: one device family: how it holds memory, and one function per op of ops.def. The CPU's table is complete
 * and is the specification; a NULL entry of another backend is reported as "not implemented".
 *
 * Another backend NAME is a library libvertex_NAME.so of its own, opened when a device "NAME:0" is first asked for
 * (device.c). It links nothing of this library: what it needs from here it is handed as a vx_host. It exports one
 * function,
 *
 *     const vx_backend *vx_backend_entry(int abi, const vx_host *host)
 *
 * which returns its table; a library of another ABI returns a table whose first member says so, or NULL.
 */
#ifndef VX_BACKEND_H
#define VX_BACKEND_H

#include "ops_macros.h"
#include "tensor.h"

enum { VX_TO_DEVICE = 0, VX_TO_HOST }; /* backend transfer */
enum { VX_MAX_DEVICES = 64 };

typedef struct vx_backend {
    int abi; /* VX_ABI */
    const char *name;
    const char *ops;          /* VX_SIGNATURE: the ops this table was compiled with */
    int (*count)(int *count); /* devices; a status and vx_error() say why there are none */
    int (*open)(int ordinal, int device,
                const char *name); /* before any other use; device: its number. NULL: nothing to do */
    int (*describe)(int ordinal, char *text, size_t size);
    int (*alloc)(int ordinal, size_t bytes, void **out);    /* from the system, not the pool; VX_ENOMEM */
    void (*release)(int ordinal, void *data, size_t bytes); /* waits for queued work, which may use it */
    int (*memory)(int ordinal, int64_t *total,
                  int64_t *available); /* bytes of the device, and those nobody holds now */
    int (*transfer)(int ordinal, void *dst, const void *src, size_t bytes, int direction);
    /* from one device of this backend to another; NULL: by way of the host */
    int (*peer)(int dst_ordinal, void *dst, int src_ordinal, const void *src, size_t bytes);
    int (*sync)(int ordinal);
    /* Graphs (graph.c), NULL where there are none. From record on ops are noted instead of run, until recorded: the
     * graph, or nothing where out is NULL, as after a failure. draw: the i-th pair that its ops draw from, VX_EEND
     * after the last. */
    int (*record)(int ordinal, float rate);
    int (*recorded)(int ordinal, void **out);
    int (*draw)(void *graph, int i, vx_draw *draw);
    int (*launch)(void *graph, float rate, int64_t steps, const vx_draw *draws);
    void (*forget)(void *graph);
    int (*threads)(int n); /* n > 0 sets; returns the number in force. The CPU's only */
#define VX_OP(op, contract, text, tensors, numbers)                                                                    \
    int (*op)(VX_MAP(VX_DECLARE_TENSOR, VX_UNWRAP tensors) VX_MAP_AFTER(VX_DECLARE_NUMBER, VX_UNWRAP numbers));
#define VX_LIST_OP(op, contract, text, tensors, each, numbers) int (*op)(VX_LIST_PARAMETERS(tensors, each, numbers));
#include "ops.def"
#undef VX_OP
} vx_backend;

/* What a backend library needs of this one. */
typedef struct vx_host {
    int (*fail)(int status, const char *format, ...) __attribute__((format(printf, 2, 3))); /* vx_fail */
    const char *(*error)(void);                                                             /* vx_error */
    char *(*shape_text)(const vx_tensor *x, char *text, size_t size);                       /* vx_shape_text */
    int (*take)(int device, size_t *bytes, void **out);                                     /* vx_memory_take */
    void (*give)(int device, void *data, size_t bytes);                                     /* vx_memory_give */
    const int *tf32, *autocast; /* the settings of vx_allow_tf32 and vx_autocast, to be read at each op */
} vx_host;

typedef const vx_backend *vx_backend_entry_function(int abi, const vx_host *host);

/* All ops with their arguments: two libraries whose texts differ disagree on the layout of the table or of a call. */
#define VX_OP(op, contract, text, tensors, numbers) #op #tensors #numbers " "
static const char VX_SIGNATURE[] =
#include "ops.def"
    ;
#undef VX_OP

/* The backend behind a device number, never NULL for a device of an existing tensor; ordinal is its index there. */
const vx_backend *vx_backend_of(int device, int *ordinal);

/* VX_OK where the number stands for an open device; op names the caller. */
int vx_device_check(const char *op, int device);

/* The SIMD variant of the CPU kernels that fits this processor (kernels/cpu/table.c, compiled once per variant). */
const vx_backend *vx_cpu_backend(void);

/* Checks a call against its contract (schema.c). */
int vx_check(const char *op, const char *contract, vx_tensor *const *tensors, int tensor_count,
             const char *const *number_names, const double *numbers, int number_count);

/* Checks what the tensors of a call on lists must be to each other, where each place has passed vx_check. */
int vx_check_lists(const char *op, const char *contract, vx_tensor *const *const *lists, int list_count, int count);

/* Pool and accounting (memory.c). take rounds *bytes up to what the block holds; give is told that number. */
int vx_memory_take(int device, size_t *bytes, void **out);
void vx_memory_give(int device, void *data, size_t bytes);

/* The memory of a graph: what is given back between begin and end. One recording at a time. begin: NULL without
 * memory. */
typedef struct vx_arena vx_arena;
vx_arena *vx_arena_begin(int device);
void vx_arena_end(vx_arena *arena);
void vx_arena_free(vx_arena *arena);   /* to the pool with it, and later with the tensors that still live */
vx_arena *vx_memory_arena(int device); /* of the recording under way, for a tensor that is made now; or NULL */
void vx_arena_give(vx_arena *arena, void *data, size_t bytes); /* that tensor's end */

/* What ops ask before they run (graph.c). */
extern int vx_recording; /* the device on which a graph is recorded, or -1 */
int vx_record_op(const char *op, vx_tensor *const *tensors, int count);

#endif
