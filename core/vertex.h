/* vertex.h: the whole C surface of Vertex and its manual.
 *
 * The build embeds the preprocessed text of this file in the library (vx_cdef()); LuaJIT reads its declarations from
 * there, so Lua can never disagree with the C it calls.
 *
 * Conventions
 *   - Every function that can fail returns an int status, VX_OK (0) or one of the codes below. vx_error() then holds,
 *     for the calling thread, a text that names the operation, what was given and what was expected. Shapes are checked
 *     before any work: after a status other than VX_OK nothing was written, unless the function says otherwise.
 *   - A pointer may be NULL only where it is said. A NULL tensor stands for a released one and is refused, with its
 *     name.
 *   - Nothing here prints, exits or calls back into its caller. vx_free() cannot fail.
 *   - Tensors are row-major, images channels-last (B, H, W, C). Outputs come first, inputs next, numbers last.
 *   - Indices stored in tensors (codes, neighbours) are 0-based int32.
 *   - Letters: B batch, H W height and width, C O channels in and out, N rows, D row width, M codes, G codebooks
 *     (groups), K neighbours, S simplex vertices.
 */
#ifndef VERTEX_H
#define VERTEX_H

#ifndef VX_CDEF
#include <stdbool.h>
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
    VX_MAX_DIMS = 8,
    VX_OK = 0,
    VX_EINVAL = 1,     /* the caller's mistake: shape, dtype, range, released tensor */
    VX_ENOMEM = 2,     /* out of memory; the process and all tensors are intact */
    VX_ENOSUP = 3,     /* not implemented on this device, or the device is not there */
    VX_EIO = 4,        /* file system, or a file that is not what it claims to be */
    VX_ENONFINITE = 5, /* a NaN or Inf where none may be; the text names the row */
    VX_EDEVICE = 6,    /* the device reported a failure */
    VX_EEND = 7,       /* a stream has no further batch, a graph no further draw */
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
/* unary(): y = f(x), by kind. AFFINE alpha x + beta, CLAMP to [alpha, beta], POWER x^alpha, ROUND halves to even, SIGN
 * -1, 0 or 1, and NaN of NaN; the gradient of ROUND, FLOOR and SIGN is 0. The gamma functions, the last three, are NaN
 * below 0. */
#define VX_UNARY_LIST(KIND)                                                                                            \
    KIND(AFFINE)                                                                                                       \
    KIND(EXP)                                                                                                          \
    KIND(LOG)                                                                                                          \
    KIND(SQRT)                                                                                                         \
    KIND(ABS)                                                                                                          \
    KIND(SQUARE)                                                                                                       \
    KIND(RELU)                                                                                                         \
    KIND(SILU)                                                                                                         \
    KIND(GELU)                                                                                                         \
    KIND(SIGMOID)                                                                                                      \
    KIND(TANH)                                                                                                         \
    KIND(CLAMP)                                                                                                        \
    KIND(POWER)                                                                                                        \
    KIND(ROUND)                                                                                                        \
    KIND(FLOOR)                                                                                                        \
    KIND(SIGN)                                                                                                         \
    KIND(LGAMMA)                                                                                                       \
    KIND(DIGAMMA)                                                                                                      \
    KIND(TRIGAMMA)
#define VX_UNARY_COUNT 19 /* dispatch.c sees to it that the list is as long */
#define VX_UNARY_MEMBER(kind) VX_##kind,
enum { VX_UNARY_LIST(VX_UNARY_MEMBER) VX_UNARY_KINDS };
#undef VX_UNARY_MEMBER
enum { VX_REDUCE_SUM = 0, VX_REDUCE_MEAN, VX_REDUCE_MAX, VX_REDUCE_MIN };
enum { VX_ACT_NONE = 0, VX_ACT_SILU, VX_ACT_GELU };
enum { VX_EUCLID = 0, VX_COSINE };                       /* assign, hard_* */
enum { VX_KNN_CE = 0, VX_KNN_L2 };                       /* vertex_knn: metric */
enum { VX_STE = 0, VX_ROTATION };                        /* hard_backward: gradient estimator */
enum { VX_SOFTMAX = 0, VX_SOFT_GUMBEL, VX_HARD_GUMBEL }; /* smooth_*: sampler; precision is VX_F32 or VX_BF16 */
enum { VX_REG_NONE = 0, VX_REG_PPL, VX_REG_KNN_CE, VX_REG_KNN_L2 }; /* smooth_*: regularizer */

typedef struct vx_tensor vx_tensor;

VX_API const char *vx_version(void);
VX_API const char *vx_cdef(void); /* this header, preprocessed */
/* One line per numeric op: "name\tcontract\tdescription\ttensors\tnumbers\tnumbers of each\n", with the arguments as
 * ops.def writes them, "(y, x)" and "((int, kind), (float, alpha))"; the last field is empty but for ops on lists. */
VX_API const char *vx_ops(void);
VX_API const char *vx_error(void); /* text of this thread's last failure */
/* Says whether a backend has a kernel for an op; needs its library, but no device. */
VX_API int vx_backend_has(const char *backend, const char *op, int *there);

/* -- Devices ------------------------------------------------------------------------------------------------------- */

/* Device numbers are small ints; 0 is the CPU. A number that no open device has is refused (VX_EINVAL).
 *
 * vx_device_open finds "cpu", "cuda:1", ... and opens the backend library, libvertex_cuda.so in the folder
 * VERTEX_BACKENDS or beside this library, on first use; VX_ENOSUP with the reason where that fails. The work of another
 * device than the CPU is queued: what goes wrong in a kernel (VX_EDEVICE), and a value that no kernel may meet
 * (VX_ENONFINITE, VX_EINVAL for an index), is reported by a later call that waits for the device, and names the op.
 * VERTEX_SYNC=1 waits after every kernel. */
VX_API int vx_device_open(const char *name, int *device);
VX_API const char *vx_backends(void); /* names of this project's backends, one a line; the last that works is best */
VX_API int vx_device_name(int device, char *name, size_t size);
VX_API int vx_device_describe(int device, char *text, size_t size); /* the processor and its SIMD variant, or the GPU */
/* Says whether a device has a capability, by its name in backend.h: "host", "bf16", "graphs", "peers". Ask this, never
 * a device's number or name. */
VX_API int vx_device_can(int device, const char *capability, int *can);
VX_API int vx_device_count(const char *backend, int *count); /* "cpu", "cuda", ...; VX_ENOSUP says why there is none */
/* The SIMD variants of the CPU kernels, the poorest first, a line each, "name\tflags\truns\tchosen\n": its name,
 * the compiler's flags, 1 where this processor runs it and 1 where it is chosen unasked, else 0. The last with both is
 * used, unless the environment's VERTEX_SIMD names another; where it names none that runs, the CPU is VX_ENOSUP. */
VX_API const char *vx_cpu_variants(void);
VX_API int vx_sync(int device);         /* wait for all work of the device */
VX_API int vx_threads(int n, int *now); /* n > 0 sets the CPU threads of our kernels; now: the number in force */
/* Says whether GPU products of float32 matrices may round their factors to TF32 (10 bits of fraction) and run on tensor
 * cores. on 1: they may; 0, the setting at the start: float32 throughout; -1 only asks. The quantizers' logits are
 * float32 always. Returns the setting in force. */
VX_API int vx_allow_tf32(int on);

/* Says what products round their factors to before they multiply: VX_BF16, a GPU's on tensor cores, with sums in
 * float32; VX_F32, the setting at the start: nothing. dtype -1 only asks. Returns the setting in force.
 *
 * Products are those of the op gemm, of the dense convolution, of the pointwise one of sepconv2d, and of their
 * gradients. Operands marked `body` may be bf16 on a device that can (vx_device_can), inputs and outputs alike; Lua's
 * ops ask for bf16 outputs while this setting is VX_BF16. Everything else stays float32: parameters, norms, depthwise
 * convolutions, the quantizers, the optimizer. A recorded graph keeps the setting it was recorded with. */
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

/* A graph is the work of a training step, recorded once and then launched as a whole: what the host does between the
 * ops of a step is done once and for all. Between vx_graph_begin and vx_graph_end the ops of `device` are recorded, not
 * run. An op of another device, reading, writing and copying to or from the host, and waiting are errors (VX_EINVAL)
 * that leave the recording as it was. One graph is recorded at a time.
 *
 * A launch runs those ops on the same memory: the graph keeps what it uses, also tensors that are freed later. Three
 * kinds of numbers are not fixed by the recording, since they change from step to step:
 *   adamw's lr    the launch's rate times lr / rate as recorded, where begin is told the recording's rate
 *   adamw's step  what was recorded plus the launch's `steps`
 *   seed, stream  of random ops: draws[i] in place of the i-th distinct pair that was recorded
 *
 * begin fails with VX_ENOSUP on a device that cannot record graphs (vx_device_can), and with VERTEX_SYNC=1, which wants
 * to see every op. */
typedef struct vx_graph vx_graph;
typedef struct vx_draw {
    uint64_t seed, stream;
} vx_draw;
VX_API int vx_graph_begin(int device, float rate);
VX_API int vx_graph_end(int device, vx_graph **out); /* ends the recording, also where it fails; out NULL drops it */
VX_API int vx_graph_draw(const vx_graph *graph, int i,
                         vx_draw *draw); /* the i-th recorded pair; VX_EEND after the last */
VX_API int vx_graph_launch(vx_graph *graph, float rate, int64_t steps, const vx_draw *draws); /* NULL: as recorded */
VX_API void vx_graph_free(vx_graph *graph);                                                   /* NULL is fine */

/* -- Tensors ------------------------------------------------------------------------------------------------------- */

/* Makes an uninitialized, contiguous tensor. ndim 0 is a scalar of one element; sizes may be 0. */
VX_API int vx_new(vx_tensor **out, int device, int dtype, int ndim, const int64_t *shape);
/* Makes a view of x's storage; stride and offset in elements, the offset from x's first one. Refused where it reaches
 * outside the storage. */
VX_API int vx_view(vx_tensor **out, const vx_tensor *x, int ndim, const int64_t *shape, const int64_t *stride,
                   int64_t offset);
VX_API void vx_free(vx_tensor *x); /* NULL is fine; storage goes with its last tensor */

/* Questions that cannot fail; what a NULL x or a dim outside 0 .. ndim - 1 gives stands behind. */
VX_API int vx_ndim(const vx_tensor *x);                /* -1 */
VX_API int vx_dtype(const vx_tensor *x);               /* -1 */
VX_API int vx_device(const vx_tensor *x);              /* -1 */
VX_API int64_t vx_numel(const vx_tensor *x);           /* -1 */
VX_API int64_t vx_size(const vx_tensor *x, int dim);   /* -1 */
VX_API int64_t vx_stride(const vx_tensor *x, int dim); /* elements; 0 */
VX_API int vx_is_contiguous(const vx_tensor *x);       /* 0 */
/* Counts the writes to x's storage so far, through whatever tensor shares it, and names the last one's op. */
VX_API int64_t vx_writes(const vx_tensor *x);                       /* 0 */
VX_API const char *vx_last_writer(const vx_tensor *x);              /* "" */
VX_API int vx_same_storage(const vx_tensor *a, const vx_tensor *b); /* 0; 1 apart, 2 overlapping, end to end */

/* Copies src to dst: same shape, any dtype, strides and device on either side. Where both share memory, dst becomes
 * what src was before. A dst whose elements share memory is refused. */
VX_API int vx_copy(vx_tensor *dst, const vx_tensor *src);
/* Read elements first .. first + count - 1 of a contiguous tensor to host memory, or write them; raw, little-endian. */
VX_API int vx_read(const vx_tensor *x, int64_t first, int64_t count, void *host);
VX_API int vx_write(vx_tensor *x, int64_t first, int64_t count, const void *host);

/* -- Files --------------------------------------------------------------------------------------------------------- */

/* A writer makes a file that appears whole or not at all: written to a temporary name in the same folder, then flushed
 * to the disk and renamed by vx_writer_commit. vx_writer_abort (NULL is fine) removes it. Both free the writer. Where
 * `path` is a symbolic link, the file it leads to is replaced; a file that is replaced keeps its mode. */
typedef struct vx_writer vx_writer;
VX_API int vx_writer_open(vx_writer **out, const char *path);
VX_API int vx_writer_bytes(vx_writer *w, const void *bytes, size_t count);
/* Writes raw little-endian elements, row-major. narrow 1: those of an i32 tensor as uint16; one that does not fit is an
 * error. */
VX_API int vx_writer_tensor(vx_writer *w, const vx_tensor *x, int narrow);
VX_API int vx_writer_commit(vx_writer *w);
VX_API void vx_writer_abort(vx_writer *w);

/* A reader reads one file to its end, also where another one gets its name meanwhile. Only regular files are opened. */
typedef struct vx_reader vx_reader;
VX_API int vx_reader_open(vx_reader **out, const char *path);
VX_API int64_t vx_reader_size(const vx_reader *r); /* bytes, when it was opened; -1 for NULL */
VX_API int vx_reader_bytes(const vx_reader *r, void *to, int64_t offset, int64_t count);
/* Fills the contiguous tensor x from byte `offset` on, converting from the stored dtype `format`, one of
 * vx_stored_dtypes(), with '>' in front where its bytes are in big-endian order. */
VX_API int vx_reader_tensor(const vx_reader *r, vx_tensor *x, int64_t offset, const char *format);
VX_API void vx_reader_close(vx_reader *r); /* NULL is fine */
/* Creates the file `path` where it is missing and locks it until the process ends, however it ends. *file is -1 where
 * another process holds it. */
VX_API int vx_lock(const char *path, int *file);

/* Lists the dtypes of files by their names in safetensors, one a line: "name\tbytes of an element\tread as dtype\n". */
VX_API const char *vx_stored_dtypes(void);
/* Lists the dtypes of tensors, one a line: "name\tnumber\tC type of an element\tbytes\tits name in safetensors\n". */
VX_API const char *vx_dtypes(void);
VX_API int64_t vx_file_size(const char *path); /* -1 where it cannot be read */

/* Vectors in files, which may be larger than memory: matrices of one width, one after the other, mapped and never held.
 * Row r of all is row r - (rows before) of its file. */
typedef struct vx_rows vx_rows;
typedef struct vx_rows_part {
    const vx_reader *file; /* stays open for as long as the rows */
    const char *format;    /* one of vx_stored_dtypes(), '>' in front where big-endian */
    int64_t offset;        /* bytes before the first element */
    int64_t rows;
    int column_major; /* 1: a column's elements lie side by side */
} vx_rows_part;
VX_API int vx_rows_open(vx_rows **out, const vx_rows_part *parts, int count, int64_t width);
/* Reads rows index[0 .. B-1] (i32), or first, first + 1, ... where index is NULL, to x f32 (B,width), both on the CPU.
 * VX_ENONFINITE names file and row of a NaN or Inf; then x is written all the same. VX_EIO where a file has become
 * shorter. */
VX_API int vx_rows_read(const vx_rows *rows, vx_tensor *x, const vx_tensor *index, int64_t first);
VX_API int64_t vx_rows_count(const vx_rows *rows); /* 0 for NULL */
VX_API void vx_rows_free(vx_rows *rows);           /* NULL is fine */

/* -- Interrupts ---------------------------------------------------------------------------------------------------- */

/* From vx_interrupt_catch(1) on SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGHUP, unless ignored, only raise a flag that
 * vx_interrupted() reads; a second one but SIGHUP ends the process at once. vx_interrupt_catch(2) is for sessions:
 * SIGINT only raises it, however often. Every call lowers it; vx_interrupt_catch(0) also restores what it found. */
VX_API int vx_interrupt_catch(int how);
VX_API int vx_interrupted(void); /* how many signals came; several ranks: whether they agreed that one did */
/* Has a session's handler also call f(a, b, c, d), on the thread that called this; f must be safe in a signal handler,
 * as LuaJIT's lua_sethook is. NULL: nothing more. */
VX_API int vx_interrupt_calls(int (*f)(void *, void *, int, int), void *a, void *b, int c, int d);

/* -- Threads ------------------------------------------------------------------------------------------------------- */

/* Runs f(a, b, c) in a detached thread that receives no signals. f is a C function (zmq_proxy, say), never a callback
 * into Lua. */
VX_API int vx_thread(int (*f)(void *, void *, void *), void *a, void *b, void *c);

/* Compute ln gamma, its first and its second derivative, in double (kernels/shared/special.h); NaN below 0. */
VX_API double vx_lgamma(double x);
VX_API double vx_digamma(double x);
VX_API double vx_trigamma(double x);

VX_API double vx_time(void); /* seconds of a monotonic clock */
VX_API int vx_is_tty(int fd);
VX_API int vx_terminal_columns(void); /* 0 where stdout and stderr are no terminal */

/* -- Streams of samples, images, audio ----------------------------------------------------------------------------- */

#include "data/stream.h"
#include "data/image.h"
#include "data/audio.h"

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
