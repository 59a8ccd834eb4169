/* cuda_runtime.h: what our kernels use of CUDA, for g++. It stands before the real one on the include path, so that the
 * very .cu files of kernels/ become a host library in which the emulator (emulator.h) runs them: a test tool, for
 * finding errors, not for speed.
 *
 * What it does, and what a device would do differently:
 *   - Blocks run one after the other, in random order. The threads of a block are fibers: one warp at a time, in random
 *     order, runs up to the block's next barrier, the lanes of a warp one after the other, in either direction, up to
 *     the warp's next collective (shuffle, vote, __syncwarp, mma). So what is not synchronized meets the wrong order
 *     soon. VERTEX_EMU_SEED chooses another one.
 *   - A barrier that some threads do not reach, or reach elsewhere, a collective whose lanes disagree on its mask or
 *     place, or one that waits for a lane which has returned, is an error. (A device lets returned threads be at
 *     __syncthreads.)
 *   - Shared memory is full of NaN when a block starts, device memory when it is allocated. Blocks of device memory end
 *     at guard pages; writes into the bytes between are found when the kernel ends. Misaligned accesses, indices
 *     outside arrays of fixed size, writes past the dynamic shared memory and the host's touching device memory are
 *     errors.
 *   - Streams are queues. What is queued runs when the host waits for it, streams interleaved at random as far as
 *     events allow; what the host writes into pinned memory before that is what an asynchronous copy will read. Graphs
 *     are recorded and launched.
 *   - Errors of kernels are reported once, by the next call that waits, and then forgotten: a device would be lost.
 *   - Spinning on another block's memory would hang: no cooperative launches.
 *
 * Environment, read at every call: VERTEX_EMU_DEVICES (2), VERTEX_EMU_MEMORY (bytes of each, 4 GiB), VERTEX_EMU_SEED
 * (1), VERTEX_EMU_ERROR ("cudaMalloc:2": that function fails with that code).
 */
#ifndef EMU_CUDA_RUNTIME_H
#define EMU_CUDA_RUNTIME_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

/* -- Qualifiers ---------------------------------------------------------------------------------------------------- */

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
/* Of the library's thread-local storage, all and only shared memory: the emulator fills it anew for every block. Unlike
 * `static`, this may also follow `extern`. */
#define __shared__ thread_local
#define CUDART_VERSION 13000

/* -- Vector types -------------------------------------------------------------------------------------------------- */

#define EMU_VECTORS(type, name, a1, a2, a4)                                                                            \
    struct name##1 { type x; };                                                                                        \
    struct alignas(a2) name##2 { type x, y; };                                                                         \
    struct name##3 { type x, y, z; };                                                                                  \
    struct alignas(a4) name##4 { type x, y, z, w; };                                                                   \
    static inline name##1 make_##name##1(type x) { return {x}; }                                                       \
    static inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                            \
    static inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                                 \
    static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMU_VECTORS(char, char, 1, 2, 4)
EMU_VECTORS(unsigned char, uchar, 1, 2, 4)
EMU_VECTORS(short, short, 2, 4, 8)
EMU_VECTORS(unsigned short, ushort, 2, 4, 8)
EMU_VECTORS(int, int, 4, 8, 16)
EMU_VECTORS(unsigned, uint, 4, 8, 16)
EMU_VECTORS(float, float, 4, 8, 16)
EMU_VECTORS(long long, longlong, 8, 16, 16)
EMU_VECTORS(unsigned long long, ulonglong, 8, 16, 16)
EMU_VECTORS(double, double, 8, 16, 16)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

/* -- Threads ------------------------------------------------------------------------------------------------------- */

struct emu_lane;
struct emu_place { /* what a kernel may ask about where it is */
    uint3 thread;
};
extern emu_place *emu_now; /* of the running thread */
extern dim3 emu_block, emu_block_size, emu_grid_size;
#define threadIdx (emu_now->thread)
#define blockIdx emu_block
#define blockDim emu_block_size
#define gridDim emu_grid_size
#define warpSize 32

/* Ends the kernel under way with this text; does not return. */
[[noreturn]] void emu_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Where in the source a collective stands: all that take part must be at the same place. */
struct emu_site {
    const char *what, *file;
    int line;
};
#define EMU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMU_SITE(what) (emu_site{what, file, line})

/* The lanes of `mask` meet; the last one calls `together` with all their arguments (NULL for lanes outside the mask).
 */
typedef void emu_together(void *const *arguments);
void emu_warp(emu_site site, unsigned mask, emu_together *together, void *argument);
/* The threads of the block meet: how many of them gave a value that is not 0, and how many they are. */
struct emu_count {
    int set, all;
};
emu_count emu_barrier(emu_site site, int value);
int emu_lane_number(void);

static inline void __syncthreads(EMU_HERE) { emu_barrier(EMU_SITE("__syncthreads"), 0); }
static inline int __syncthreads_count(int p, EMU_HERE) { return emu_barrier(EMU_SITE("__syncthreads_count"), p).set; }
static inline int __syncthreads_or(int p, EMU_HERE) { return emu_barrier(EMU_SITE("__syncthreads_or"), p).set > 0; }
static inline int __syncthreads_and(int p, EMU_HERE)
{
    emu_count c = emu_barrier(EMU_SITE("__syncthreads_and"), p);
    return c.set == c.all;
}
static inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_HERE)
{
    emu_warp(
        EMU_SITE("__syncwarp"), mask, [](void *const *) {}, 0);
}

struct emu_exchange { /* a shuffle's argument */
    uint64_t in, out;
    int from;
};
static inline void emu_shuffle(void *const *a)
{
    for (int i = 0; i < 32; i++) {
        emu_exchange *mine = (emu_exchange *)a[i];
        if (!mine) continue;
        const emu_exchange *theirs = (const emu_exchange *)a[mine->from];
        if (!theirs) emu_fail("lane %d reads lane %d in a shuffle, which is outside its mask", i, mine->from);
        mine->out = theirs->in;
    }
}
template <class T> static inline T emu_shuffled(emu_site site, unsigned mask, T v, int from)
{
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
    emu_exchange e = {0, 0, from};
    memcpy(&e.in, &v, sizeof v);
    emu_warp(site, mask, emu_shuffle, &e);
    memcpy(&v, &e.out, sizeof v);
    return v;
}
template <class T> static inline T __shfl_sync(unsigned mask, T v, int from, int width = 32, EMU_HERE)
{
    int lane = emu_lane_number();
    return emu_shuffled(EMU_SITE("__shfl_sync"), mask, v, (lane & ~(width - 1)) | (from & (width - 1)));
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, EMU_HERE)
{
    int lane = emu_lane_number(), from = lane ^ bits;
    return emu_shuffled(EMU_SITE("__shfl_xor_sync"), mask, v, from < ((lane & ~(width - 1)) + width) ? from : lane);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, EMU_HERE)
{
    int lane = emu_lane_number(), from = lane - (int)delta;
    return emu_shuffled(EMU_SITE("__shfl_up_sync"), mask, v, from >= (lane & ~(width - 1)) ? from : lane);
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, EMU_HERE)
{
    int lane = emu_lane_number(), from = lane + (int)delta;
    return emu_shuffled(EMU_SITE("__shfl_down_sync"), mask, v, from < (lane & ~(width - 1)) + width ? from : lane);
}

struct emu_vote {
    uint64_t value, out;
};
static inline void emu_ballot(void *const *a)
{
    unsigned bits = 0;
    for (int i = 0; i < 32; i++)
        if (a[i] && ((emu_vote *)a[i])->value) bits |= 1u << i;
    for (int i = 0; i < 32; i++)
        if (a[i]) ((emu_vote *)a[i])->out = bits;
}
static inline void emu_match(void *const *a)
{
    for (int i = 0; i < 32; i++) {
        unsigned bits = 0;
        for (int j = 0; a[i] && j < 32; j++)
            if (a[j] && ((emu_vote *)a[j])->value == ((emu_vote *)a[i])->value) bits |= 1u << j;
        if (a[i]) ((emu_vote *)a[i])->out = bits;
    }
}
static inline unsigned __ballot_sync(unsigned mask, int p, EMU_HERE)
{
    emu_vote v = {p != 0, 0};
    emu_warp(EMU_SITE("__ballot_sync"), mask, emu_ballot, &v);
    return (unsigned)v.out;
}
static inline int __any_sync(unsigned mask, int p, EMU_HERE) { return __ballot_sync(mask, p, file, line) != 0; }
static inline int __all_sync(unsigned mask, int p, EMU_HERE) { return __ballot_sync(mask, p, file, line) == mask; }
template <class T> static inline unsigned __match_any_sync(unsigned mask, T x, EMU_HERE)
{
    emu_vote v = {0, 0};
    memcpy(&v.value, &x, sizeof x);
    emu_warp(EMU_SITE("__match_any_sync"), mask, emu_match, &v);
    return (unsigned)v.out;
}

static inline void __threadfence(void) {}
static inline void __threadfence_block(void) {}
static inline void __threadfence_system(void) {}

/* -- Atomics: threads switch at collectives only, so plain code is atomic ------------------------------------------ */

#define EMU_ATOMIC(name, expression)                                                                                   \
    template <class T> static inline T name(T *p, std::type_identity_t<T> v)                                           \
    {                                                                                                                  \
        T old = *p;                                                                                                    \
        *p = (T)(expression);                                                                                          \
        return old;                                                                                                    \
    }
EMU_ATOMIC(atomicAdd, old + v)
EMU_ATOMIC(atomicSub, old - v)
EMU_ATOMIC(atomicExch, v)
EMU_ATOMIC(atomicMin, v < old ? v : old)
EMU_ATOMIC(atomicMax, v > old ? v : old)
EMU_ATOMIC(atomicAnd, old &v)
EMU_ATOMIC(atomicOr, old | v)
EMU_ATOMIC(atomicXor, old ^ v)
EMU_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
#undef EMU_ATOMIC
template <class T> static inline T atomicCAS(T *p, std::type_identity_t<T> expected, std::type_identity_t<T> v)
{
    T old = *p;
    if (old == expected) *p = v;
    return old;
}

/* -- Loads, bits, arithmetic --------------------------------------------------------------------------------------- */

template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T __ldcg(const T *p) { return *p; }
template <class T> static inline T __ldcs(const T *p) { return *p; }
template <class T> static inline void __stcg(T *p, std::type_identity_t<T> v) { *p = v; }
template <class T> static inline void __stcs(T *p, std::type_identity_t<T> v) { *p = v; }

template <class T, class F> static inline T emu_bits(F v)
{
    static_assert(sizeof(T) == sizeof(F), "sizes of a bit cast");
    T r;
    memcpy(&r, &v, sizeof r);
    return r;
}
static inline int __float_as_int(float x) { return emu_bits<int>(x); }
static inline unsigned __float_as_uint(float x) { return emu_bits<unsigned>(x); }
static inline float __int_as_float(int x) { return emu_bits<float>(x); }
static inline float __uint_as_float(unsigned x) { return emu_bits<float>(x); }
static inline long long __double_as_longlong(double x) { return emu_bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return emu_bits<double>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __brev(unsigned x)
{
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1u) << (31 - i);
    return y;
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s)
{
    uint64_t both = (uint64_t)b << 32 | a;
    unsigned y = 0;
    for (int i = 0; i < 4; i++) y |= (unsigned)(both >> (s >> (4 * i) & 7) * 8 & 255) << (8 * i);
    return y;
}
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
static inline int __mulhi(int a, int b) { return (int)((int64_t)a * b >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b)
{
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

static inline float __fadd_rn(float a, float b)
{
    volatile float y = a + b;
    return y;
} /* never contracted */
static inline float __fsub_rn(float a, float b)
{
    volatile float y = a - b;
    return y;
}
static inline float __fmul_rn(float a, float b)
{
    volatile float y = a * b;
    return y;
}
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
/* names that the C library declares for itself */
#define __expf(x) expf(x)
#define __exp2f(x) exp2f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __powf(x, y) powf(x, y)
#define __tanhf(x) tanhf(x)
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
static inline float normcdff(float x) { return 0.5f * erfcf(-x * 0.70710678118654752f); }
static inline void sincospif(float x, float *s, float *c)
{
    *s = (float)sin(M_PI * (double)x);
    *c = (float)cos(M_PI * (double)x);
}
static inline float cospif(float x) { return (float)cos(M_PI * (double)x); }
static inline float sinpif(float x) { return (float)sin(M_PI * (double)x); }
static inline int __float2int_rn(float x)
{
    return x != x ? 0 : x >= 2147483648.0f ? INT32_MAX : x < -2147483648.0f ? INT32_MIN : (int)rintf(x);
}
static inline int __float2int_rd(float x) { return __float2int_rn(floorf(x)); }
static inline int __float2int_rz(float x) { return __float2int_rn(truncf(x)); }
static inline unsigned __float2uint_rn(float x)
{
    return !(x > 0.0f) ? 0u : x >= 4294967296.0f ? UINT32_MAX : (unsigned)rintf(x);
}
static inline float __int2float_rn(int x) { return (float)x; }
static inline float __uint2float_rn(unsigned x) { return (float)x; }
static inline float __double2float_rn(double x) { return (float)x; }

#define EMU_MIN_MAX(type)                                                                                              \
    static inline type min(type a, type b) { return b < a ? b : a; }                                                   \
    static inline type max(type a, type b) { return a < b ? b : a; }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long)
EMU_MIN_MAX(unsigned long)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }

/* -- The runtime --------------------------------------------------------------------------------------------------- */

typedef enum cudaError {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInitializationError = 3,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorNotReady = 600,
    cudaErrorIllegalAddress = 700,
    cudaErrorLaunchOutOfResources = 701,
    cudaErrorMisalignedAddress = 716,
    cudaErrorLaunchFailure = 719,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorStreamCaptureUnjoined = 904,
    cudaErrorUnknown = 999,
} cudaError_t;

typedef struct emu_stream *cudaStream_t;
typedef struct emu_event *cudaEvent_t;
typedef struct emu_graph *cudaGraph_t;
typedef struct emu_graph *cudaGraphExec_t;

enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
};
enum cudaStreamCaptureStatus {
    cudaStreamCaptureStatusNone,
    cudaStreamCaptureStatusActive,
    cudaStreamCaptureStatusInvalidated
};
enum {
    cudaStreamDefault = 0,
    cudaStreamNonBlocking = 1,
    cudaEventDefault = 0,
    cudaEventDisableTiming = 2,
    cudaHostAllocDefault = 0
};

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem;
    int major, minor, multiProcessorCount;
};
struct cudaFuncAttributes {
    int maxThreadsPerBlock, binaryVersion;
};
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};

const char *cudaGetErrorString(cudaError_t error); /* for a kernel's error, the emulator's own text */
const char *cudaGetErrorName(cudaError_t error);
cudaError_t cudaGetLastError(void);
cudaError_t cudaPeekAtLastError(void);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaRuntimeGetVersion(int *version);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize(void);
cudaError_t cudaMemGetInfo(size_t *available, size_t *total);
cudaError_t cudaMalloc(void **p, size_t bytes);
template <class T> static inline cudaError_t cudaMalloc(T **p, size_t bytes) { return cudaMalloc((void **)p, bytes); }
cudaError_t cudaFree(void *p);
cudaError_t cudaMallocHost(void **p, size_t bytes);
template <class T> static inline cudaError_t cudaMallocHost(T **p, size_t bytes)
{
    return cudaMallocHost((void **)p, bytes);
}
cudaError_t cudaFreeHost(void *p);
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream = 0);
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes,
                                cudaStream_t stream = 0);
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream = 0);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaEventCreate(cudaEvent_t *event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = 0);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end);
cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *kernel);

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);

/* Queues host work on a stream, in the order of everything else on it (cuBLAS calls become this). */
cudaError_t emu_queue(cudaStream_t stream, std::function<void()> work);
cudaError_t emu_launch(const char *name, const void *kernel, const cudaLaunchConfig_t *config,
                       std::function<void()> thread);

/* A call of a kernel: arguments are converted to its parameters' types, and copied, now. */
template <class... P, class... A>
static inline cudaError_t emu_launch_kernel(const char *name, const cudaLaunchConfig_t *config, void (*kernel)(P...),
                                            A &&...arguments)
{
    std::tuple<std::decay_t<P>...> copies(static_cast<std::decay_t<P>>(arguments)...);
    return emu_launch(name, (const void *)kernel, config, [kernel, copies] { std::apply(kernel, copies); });
}
#define cudaLaunchKernelEx(config, kernel, ...) emu_launch_kernel(#kernel, config, kernel, ##__VA_ARGS__)

#endif
