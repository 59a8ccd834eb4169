/* vertex.h: the whole C surface of Vertex and its manual.
 *
 * The build embeds the preprocessed text of this file in the library (vx_cdef()); LuaJIT reads its declarations from
 * there, so Lua can never disagree with the C it calls.
 *
 * Conventions
 *   - Every function that can fail returns an int status, VX_OK (0) or one of the codes below. vx_error() then holds,
 *     for
 *     the calling thread, a text that names the operation, what was given and what was expected. Shapes are checked
 *     before any work: after a status other than VX_OK nothing was written, unless the function says otherwise.
 *   - Nothing here prints, exits or calls back into its caller. vx_free() cannot fail.
 *   - Tensors are row-major, images channels-last (B, H, W, C). Outputs come first, inputs next, numbers last.
 *   - Indices stored in tensors (codes, neighbours) are 0-based int32.
 *   - Letters: B batch, H W height and width, C O channels in and out, N rows, D row width, M codes, G codebooks
 *     (groups), K neighbours, S simplex vertices.
 */
#ifndef VERTEX_H
#define VERTEX_H

#ifndef VX_CDEF
#include <stddef.h>
#include <stdint.h>
#endif

#ifdef VX_CDEF
#define VX_API
#else
#define VX_API __attribute__((visibility("default")))
#ifdef __cplusplus
extern "C" {
#endif
#endif

/* -- Status, types, limits ----------------------------------------------------------------------------------------- */

enum {
    VX_ABI = 5, /* raised when a declaration changes; backends and Lua refuse another one */
    VX_MAX_DIMS = 8,
    VX_OK = 0,
    VX_EINVAL = 1,     /* the caller's mistake: shape, dtype, range, released tensor */
    VX_ENOMEM = 2,     /* out of memory; the process and all tensors are intact */
    VX_ENOSUP = 3,     /* not implemented on this device, or the device is not there */
    VX_EIO = 4,        /* file system, or a file that is not what it claims to be */
    VX_ENONFINITE = 5, /* a NaN or Inf where none may be; the text names the row */
    VX_EDEVICE = 6,    /* the device reported a failure */
    VX_EEND = 7,       /* a loader has no further batch */
    VX_EINTR = 8,      /* a wait ended because vx_interrupted() is true; the same call may be made again */
};

/* dtypes: VX_F32, VX_BF16, VX_I32, VX_U8, and how many there are */
enum {
#define VX_DTYPE(number, name, type, stored) VX_##number,
#include "dtypes.def"
#undef VX_DTYPE
    VX_DTYPES
};

/* binary() */
enum {
    VX_ADD = 0,
    VX_SUB,
    VX_MUL,
    VX_DIV,
    VX_MAX,
    VX_MIN,
    VX_EQ,
    VX_LT,
    VX_LE,
    VX_POW,
};
/* unary(): y = f(x). AFFINE alpha x + beta, CLAMP to [alpha, beta], POWER x^alpha; gamma functions: NaN below 0 */
enum {
    VX_AFFINE = 0,
    VX_EXP,
    VX_LOG,
    VX_SQRT,
    VX_ABS,
    VX_SQUARE,
    VX_RELU,
    VX_SILU,
    VX_GELU,
    VX_SIGMOID,
    VX_TANH,
    VX_CLAMP,
    VX_POWER,
    VX_LGAMMA,
    VX_DIGAMMA,
    VX_TRIGAMMA,
};
enum { VX_REDUCE_SUM = 0, VX_REDUCE_MEAN, VX_REDUCE_MAX, VX_REDUCE_MIN };
enum { VX_ACT_NONE = 0, VX_ACT_SILU, VX_ACT_GELU };
enum { VX_EUCLID = 0, VX_COSINE };                       /* assign, hard_* */
enum { VX_KNN_CE = 0, VX_KNN_L2 };                       /* vertex_knn: metric */
enum { VX_STE = 0, VX_ROTATION };                        /* hard_backward: gradient estimator */
enum { VX_SOFTMAX = 0, VX_SOFT_GUMBEL, VX_HARD_GUMBEL }; /* smooth_*: sampler; precision is VX_F32 or VX_BF16 */
enum { VX_REG_NONE = 0, VX_REG_PPL, VX_REG_KNN_CE, VX_REG_KNN_L2 }; /* smooth_*: regularizer */

typedef struct vx_tensor vx_tensor;

VX_API int vx_abi(void);
VX_API const char *vx_version(void);
VX_API const char *vx_cdef(void);  /* this header, preprocessed */
/* One line per numeric op: "name\tcontract\tdescription\ttensors\tnumbers\tnumbers of each\n", with the arguments as
 * ops.def writes them, "(y, x)" and "((int, kind), (float, alpha))"; the last field is empty but for ops on lists. */
VX_API const char *vx_ops(void);
VX_API const char *vx_error(void); /* text of this thread's last failure */
/* there: whether the backend has a kernel for the op; needs its library, but no device. */
VX_API int vx_backend_has(const char *backend, const char *op, int *there);

/* -- Devices ------------------------------------------------------------------------------------------------------- */

/* Device numbers are small ints; 0 is the CPU. vx_device_open finds "cpu", "cuda:1", ... and opens the backend library,
 * libvertex_cuda.so in the folder VERTEX_BACKENDS or beside this library, on first use; VX_ENOSUP with the reason where
 * that fails. The work of another device than the CPU is queued: what goes wrong in a kernel (VX_EDEVICE), and a value
 * that no kernel may meet (VX_ENONFINITE, VX_EINVAL for an index), is reported by a later call that waits for the
 * device, and names the op. VERTEX_SYNC=1 waits after every kernel. */
VX_API int vx_device_open(const char *name, int *device);
VX_API const char *vx_backends(void); /* names of this project's backends, one a line; the last that works is best */
VX_API int vx_device_name(int device, char *name, size_t size);
VX_API int vx_device_describe(int device, char *text, size_t size); /* the processor and its SIMD variant, or the GPU */
/* can: whether a device has a capability, by its name in backend.h: "host", "bf16", "graphs", "peers". Ask this, never
 * a device's number or name. */
VX_API int vx_device_can(int device, const char *capability, int *can);
VX_API int vx_device_count(const char *backend, int *count); /* "cpu", "cuda", ...; VX_ENOSUP says why there is none */
/* The SIMD variants of the CPU kernels, the poorest first, a line each: "name\tflags\truns\n": what VERTEX_SIMD calls it,
 * what the compiler was told, and 1 where this processor can run it, else 0. The last that runs is used, unless the
 * environment's VERTEX_SIMD names another; where it names none that runs, the CPU is VX_ENOSUP. */
VX_API const char *vx_cpu_variants(void);
VX_API int vx_sync(int device);                              /* wait for all work of the device */
VX_API int vx_threads(int n, int *now); /* n > 0 sets the CPU threads of our kernels; now: the number in force */
/* on 1: GPU products of float32 matrices may round their factors to TF32 (10 bits of fraction) and run on tensor cores.
 * on 0, the default: float32 throughout. The quantizers' logits are float32 always. on -1 asks. Returns the setting in
 * force. */
VX_API int vx_allow_tf32(int on);

/* What GPU products of float32 matrices (the op gemm, the dense convolution, and the pointwise one of sepconv2d) round
 * their factors to before they multiply: VX_BF16, on tensor cores, with sums in float32; VX_F32, the default: not at
 * all. It holds for products of gradients as well. An op whose contract says `body` may besides be given images, and
 * asked for them, in bf16; the callers choose, by this setting. Everything else stays float32: parameters, norms,
 * depthwise convolutions, the quantizers, the optimizer; and all on the CPU. -1 asks. Returns the setting in force. A
 * recorded graph keeps the setting it was recorded with. */
VX_API int vx_autocast(int dtype);

typedef struct vx_memory_info {
    int64_t live, peak, cached; /* bytes: held by tensors and graphs, their largest sum, kept for reuse */
    int64_t limit;              /* bytes live + cached may reach */
    int64_t tensors;            /* live storages */
} vx_memory_info;

VX_API int vx_memory(int device, vx_memory_info *info);
VX_API int vx_memory_limit(int device, int64_t bytes); /* 0: back to the device's own size */
VX_API int vx_memory_flush(int device);                /* give cached blocks back to the system */
VX_API int vx_memory_reset_peak(int device);
/* 0: no block is kept for reuse or rounded up, so that memory checkers see every overrun; 1: back to the pool. The
 * environment's VERTEX_POOL=0 says so for all devices. */
VX_API int vx_memory_pool(int device, int on);

/* -- Recorded graphs ----------------------------------------------------------------------------------------------- */

/* The work of a training step, recorded once and then launched as a whole: what the host does between the ops of a step
 * is done once and for all. Between vx_graph_begin and vx_graph_end the ops of `device` do all but run; an op of
 * another device, reading, writing and copying to or from the host, and waiting are errors (VX_EINVAL) that leave the
 * recording as it was. One graph is recorded at a time.
 *
 * A launch runs those ops on the same memory: the graph keeps what it uses, also tensors that are freed later. Three
 * kinds of numbers are not fixed by the recording, since they change from step to step:
 *   adamw's lr    the launch's rate times lr / rate as recorded: begin is told the rate that the rates inside are
 *   relative to
 *   adamw's step  what was recorded plus the launch's `steps`
 *   seed, stream  of random ops: draws[i] in place of the i-th distinct pair that was recorded, which vx_graph_draw
 *   tells;
 *                 VX_EEND after the last. NULL: as recorded
 *
 * VX_ENOSUP on devices that have no graphs (the CPU), and with VERTEX_SYNC=1, which wants to see every op. */
typedef struct vx_graph vx_graph;
typedef struct vx_draw {
    uint64_t seed, stream;
} vx_draw;
VX_API int vx_graph_begin(int device, float rate);
VX_API int vx_graph_end(int device,
                        vx_graph **out); /* ends the recording also where it fails; out NULL: and drops it */
VX_API int vx_graph_draw(const vx_graph *graph, int i, vx_draw *draw);
VX_API int vx_graph_launch(vx_graph *graph, float rate, int64_t steps, const vx_draw *draws);
VX_API void vx_graph_free(vx_graph *graph); /* NULL is fine */

/* -- Tensors ------------------------------------------------------------------------------------------------------- */

/* A new, uninitialized, contiguous tensor. ndim 0 is a scalar of one element; sizes may be 0. */
VX_API int vx_new(vx_tensor **out, int device, int dtype, int ndim, const int64_t *shape);
/* A view of x's storage, offset and strides counted in elements from x's first one; checked against the storage. */
VX_API int vx_view(vx_tensor **out, const vx_tensor *x, int ndim, const int64_t *shape, const int64_t *stride,
                   int64_t offset);
VX_API void vx_free(vx_tensor *x); /* NULL is fine; storage goes with its last tensor */

VX_API int vx_ndim(const vx_tensor *x);
VX_API int vx_dtype(const vx_tensor *x);
VX_API int vx_device(const vx_tensor *x);
VX_API int64_t vx_numel(const vx_tensor *x);
VX_API int64_t vx_size(const vx_tensor *x, int dim);   /* 0-based */
VX_API int64_t vx_stride(const vx_tensor *x, int dim); /* elements */
VX_API int vx_is_contiguous(const vx_tensor *x);
VX_API int vx_same_storage(const vx_tensor *a, const vx_tensor *b);

/* dst = src: same shape, any dtype, strides and device on either side. */
VX_API int vx_copy(vx_tensor *dst, const vx_tensor *src);
/* Raw little-endian elements of a contiguous tensor, first .. first + count, from or to host memory. */
VX_API int vx_read(const vx_tensor *x, int64_t first, int64_t count, void *host);
VX_API int vx_write(vx_tensor *x, int64_t first, int64_t count, const void *host);

/* -- Files --------------------------------------------------------------------------------------------------------- */

/* A file that appears whole or not at all: written to a temporary name in the same folder, then flushed to the disk and
 * renamed by vx_writer_commit. vx_writer_abort (also for a NULL writer) removes it. Both free the writer. */
typedef struct vx_writer vx_writer;
VX_API int vx_writer_open(vx_writer **out, const char *path);
VX_API int vx_writer_bytes(vx_writer *w, const void *bytes, size_t count);
/* Raw little-endian elements, row-major; narrow 1: those of an i32 tensor as uint16, an error where one does not fit */
VX_API int vx_writer_tensor(vx_writer *w, const vx_tensor *x, int narrow);
VX_API int vx_writer_commit(vx_writer *w);
VX_API void vx_writer_abort(vx_writer *w);
/* Fills the contiguous tensor x from `path` at byte `offset`, converting from the stored dtype `format`, one of
 * vx_stored_dtypes(), with '>' in front where its bytes are in big-endian order. */
VX_API int vx_file_read(vx_tensor *x, const char *path, int64_t offset, const char *format);
/* Dtypes of files, by their names in safetensors: one line each, "name\tbytes of an element\tdtype it is read as\n". */
VX_API const char *vx_stored_dtypes(void);
/* Dtypes of tensors: one line each, "name\tnumber\tC type of an element\tbytes\tstored dtype that holds it\n". */
VX_API const char *vx_dtypes(void);
VX_API int64_t vx_file_size(const char *path); /* -1 where it cannot be read */

/* Vectors in files, which may be larger than memory: matrices of one width, one after the other, mapped and never held.
 * Row r of all is row r - (rows before) of its file. */
typedef struct vx_rows vx_rows;
typedef struct vx_rows_part {
    const char *path;
    const char *format; /* one of vx_stored_dtypes(), '>' in front where big-endian */
    int64_t offset;     /* bytes before the first element */
    int64_t rows;
    int column_major; /* 1: a column's elements lie side by side */
} vx_rows_part;
VX_API int vx_rows_open(vx_rows **out, const vx_rows_part *parts, int count, int64_t width);
/* x f32 (B,width) on the CPU = rows index[0 .. B-1] (i32, on the CPU), or first, first + 1, ... where index is NULL.
 * VX_ENONFINITE names file and row of a NaN or Inf; VX_EIO where a file became shorter. x is written all the same. */
VX_API int vx_rows_read(const vx_rows *rows, vx_tensor *x, const vx_tensor *index, int64_t first);
VX_API int64_t vx_rows_count(const vx_rows *rows); /* 0 for NULL */
VX_API void vx_rows_free(vx_rows *rows);           /* NULL is fine */

/* -- Interrupts ---------------------------------------------------------------------------------------------------- */

/* From vx_interrupt_catch(1) on, Ctrl-C (SIGINT) and SIGTERM only raise a flag that vx_interrupted() reads; a second
 * signal ends the process at once. vx_interrupt_catch(2) is for sessions: SIGINT only raises the flag, however often.
 * Every call lowers the flag; vx_interrupt_catch(0) also restores the handlers found. */
VX_API int vx_interrupt_catch(int how);
VX_API int vx_interrupted(void);
/* What a session's handler does besides: f(a, b, c, d) on the thread that called this; f must be safe in a signal
 * handler, as LuaJIT's lua_sethook is. NULL: nothing. */
VX_API int vx_interrupt_calls(int (*f)(void *, void *, int, int), void *a, void *b, int c, int d);

/* -- Threads ------------------------------------------------------------------------------------------------------- */

/* Runs f(a, b, c) in a detached thread that receives no signals. f is a C function (zmq_proxy, say), never a callback
 * into Lua. */
VX_API int vx_thread(int (*f)(void *, void *, void *), void *a, void *b, void *c);

/* ln gamma, its first and its second derivative, in double for x > 0 (kernels/shared/special.h); NaN below 0. */
VX_API double vx_lgamma(double x);
VX_API double vx_digamma(double x);
VX_API double vx_trigamma(double x);

VX_API double vx_time(void); /* seconds of a monotonic clock */
VX_API int vx_is_tty(int fd);
VX_API int vx_terminal_columns(void); /* 0 where stdout and stderr are no terminal */

/* -- Images and loaders -------------------------------------------------------------------------------------------- */

#include "data/image.h"

/* -- Numeric ops: generated from ops.def, where each is documented ------------------------------------------------- */

#include "ops_macros.h"
#define VX_OP(name, contract, text, tensors, numbers)                                                                  \
    VX_API int vx_##name(VX_MAP(VX_DECLARE_TENSOR, VX_UNWRAP tensors)                                                  \
                             VX_MAP_AFTER(VX_DECLARE_NUMBER, VX_UNWRAP numbers));
#define VX_LIST_OP(name, contract, text, tensors, each, numbers)                                                       \
    VX_API int vx_##name(VX_LIST_PARAMETERS(tensors, each, numbers));
#include "ops.def"
#undef VX_OP

#if !defined(VX_CDEF) && defined(__cplusplus)
}
#endif
#endif
