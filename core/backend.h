/* backend.h: one device family: what it can do, how it holds memory, and one function per op of ops.def.
 *
 * The CPU's table is complete and is the specification; a NULL entry of another backend is reported as "not
 * implemented". How a backend comes as a library of its own is told in host.h.
 */
#ifndef VX_BACKEND_H
#define VX_BACKEND_H

#include "ops_macros.h"
#include "tensor.h"

enum { VX_MAX_DEVICES = 64 };

/* What a backend can do beyond its ops: a bit, its value, and the name that vx_device_can() knows. */
#define VX_CAPABILITIES(CAN)                                                                                           \
    CAN(HOST, 1, "host")     /* its memory is host memory: the CPU reads and writes it in place */                     \
    CAN(BF16, 2, "bf16")     /* its kernels take and give bf16 in operands marked `body` */                            \
    CAN(GRAPHS, 4, "graphs") /* it records graphs: the members graph_* are there */                                    \
    CAN(PEERS, 8, "peers")   /* it copies from one of its devices to another: the member peer is there */

#define VX_CAPABILITY_BIT(bit, value, name) VX_CAN_##bit = value,
enum { VX_CAPABILITIES(VX_CAPABILITY_BIT) };
#undef VX_CAPABILITY_BIT

enum { VX_TO_DEVICE = 0, VX_TO_HOST }; /* transfer's direction */

/* Every int result is a status, with vx_error() set, unless its line says otherwise. ordinal: which of the backend's
 * devices, from 0. */
typedef struct vx_backend {
    const char *name;
    unsigned can;             /* VX_CAN_ bits */
    int (*count)(int *count); /* *count = number of devices; a failure says why there are none */
    /* Makes a device ready; called once, before any other use. device: its number. NULL: nothing to do. */
    int (*open)(int ordinal, int device, const char *name);
    int (*describe)(int ordinal, char *text, size_t size);
    int (*alloc)(int ordinal, size_t bytes, void **out);    /* from the system, not the pool; VX_ENOMEM */
    void (*release)(int ordinal, void *data, size_t bytes); /* waits for queued work, which may use it */
    /* Bytes of the device, and those that nobody holds now. */
    int (*memory)(int ordinal, int64_t *total, int64_t *available);
    int (*transfer)(int ordinal, void *dst, const void *src, size_t bytes, int direction);
    int (*peer)(int dst_ordinal, void *dst, int src_ordinal, const void *src, size_t bytes);
    int (*sync)(int ordinal);
    /* Recorded graphs (graph.c).
     * begin   from here the device's ops are captured, not run
     * end     *out receives the graph; with out NULL (after an error) the capture is discarded
     * draw    *draw = the i-th pair that the graph's ops draw from; VX_EEND after the last
     * launch  runs the ops, as vx_graph_launch() says */
    int (*graph_begin)(int ordinal, float rate);
    int (*graph_end)(int ordinal, void **out);
    int (*graph_draw)(void *graph, int i, vx_draw *draw);
    int (*graph_launch)(void *graph, float rate, int64_t steps, const vx_draw *draws);
    void (*graph_free)(void *graph);
    int (*threads)(int n); /* sets the number of threads where n > 0; returns the number in force. The CPU's only */
#define VX_OP(op, contract, text, tensors, numbers)                                                                    \
    int (*op)(VX_MAP(VX_DECLARE_TENSOR, VX_UNWRAP tensors) VX_MAP_AFTER(VX_DECLARE_NUMBER, VX_UNWRAP numbers));
#define VX_LIST_OP(op, contract, text, tensors, each, numbers) int (*op)(VX_LIST_PARAMETERS(tensors, each, numbers));
#include "ops.def"
#undef VX_OP
} vx_backend;

/* The one backend inside this library: the CPU kernels' best SIMD variant for this processor, or the one that
 * VERTEX_SIMD names (kernels/cpu/variants.c). NULL, with vx_error() set, where that cannot be. */
const vx_backend *vx_cpu_backend(void);

#endif
