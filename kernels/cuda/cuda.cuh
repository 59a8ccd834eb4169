/* cuda.cuh: frame of the CUDA kernels. An op foo of ops.def is a function
 *
 *     int vx_cuda_foo(tensors, numbers)
 *
 * in the .cu file with the stem of the .c file that holds it for the CPU; that fills its slot of the table
 * (backend.cu). It checks what the contract does not, takes its scratch, launches kernels, and ends with `return
 * vx_status();`:
 *
 *     double *partial = VX_SCRATCH(double, parts);                   device memory until the op ends; frees itself
 *     VX_LAUNCH(part_kernel, parts, 256, 0, partial, x, n);          grid, block, dynamic shared bytes, arguments
 *     VX_LAUNCH(sum_kernel, 1, 32, 0, y, partial, parts);
 *     return vx_status();
 *
 * The first failure, be it of scratch or of a launch, is kept: what follows in the op does nothing, and vx_status()
 * returns it. Take all scratch before the first launch, so that an op that fails for want of memory has written nothing
 * and may be tried again.
 *
 * Everything is queued on the device's one compute stream; nothing here waits. Data that no kernel may meet (a NaN
 * where a code is sought, an index outside a table) is reported late, with vx_data_check_of and vx_report.
 *
 * The same files are compiled by g++ against tests/cuda_emulator, which runs them on the host. What that needs: kernels
 * are launched by VX_LAUNCH alone, dynamic shared memory is vx_shared, PTX is written in ptx.cuh only, and every thread
 * of a block reaches every barrier.
 *
 * Determinism: no float atomics; a reduction's order depends on the sizes alone, not on the device's number of
 * multiprocessors.
 */
#ifndef VX_CUDA_CUH
#define VX_CUDA_CUH

#include <cuda_runtime.h>
#include <ptx.cuh>

#include "core/backend.h"
#include "shared/bf16.h"
#include "shared/common.h"
#define VX_RNG_INLINE static __host__ __device__ __forceinline__
#include "core/rng.h"

/* Weak: an op without a kernel leaves NULL in the table. */
#define VX_OP(op, contract, text, tensors, numbers)                                                                    \
    extern "C" int vx_cuda_##op(VX_MAP(VX_DECLARE_TENSOR, VX_UNWRAP tensors)                                           \
                                    VX_MAP_AFTER(VX_DECLARE_NUMBER, VX_UNWRAP numbers)) __attribute__((weak));
#define VX_LIST_OP(op, contract, text, tensors, each, numbers)                                                         \
    extern "C" int vx_cuda_##op(VX_LIST_PARAMETERS(tensors, each, numbers)) __attribute__((weak));
#include "core/ops.def"
#undef VX_OP

/* -- Host side: the op under way (op.cu) --------------------------------------------------------------------------- */

typedef struct vx_cuda_limits {
    int ordinal;
    int capability; /* 80, 90, ... */
    int multiprocessors;
    int shared_bytes; /* largest dynamic shared memory of a block */
} vx_cuda_limits;

cudaStream_t vx_stream(void);          /* all work goes here */
const vx_cuda_limits *vx_limits(void); /* of the device the op runs on */
const char *vx_op(void);               /* its name */
bool vx_tf32(void);                    /* products of float32 may use TF32: vx_allow_tf32 */
bool vx_bf16_products(void);           /* they round their factors to bf16: vx_autocast */
bool vx_ok(void);                      /* nothing has failed in this op */
int vx_status(void);                   /* what the op returns */
void vx_fail_op(int status);           /* makes a failure, that of vx_fail(), the op's, unless it has one already */

/* Takes device memory until the op ends. Returns NULL where there is none, which vx_status() then says. */
void *vx_device_scratch(size_t bytes);
#define VX_SCRATCH(type, count) ((type *)vx_device_scratch(sizeof(type) * (size_t)(count)))

/* Takes device memory for the life of the process; NULL likewise. */
void *vx_device_memory(size_t bytes);

/* Makes a runtime call that queues work, unless the op has failed: VX_CUDA(cudaMemsetAsync(p, 0, n, vx_stream())). */
void vx_called(cudaError_t error, const char *call);
#define VX_CUDA(call)                                                                                                  \
    do {                                                                                                               \
        if (vx_ok()) vx_called(call, #call);                                                                           \
    } while (0)

/* Launches a kernel, unless the op has failed. grid and block: a number or a dim3. More than 48 KiB of dynamic shared
 * memory needs no further call. */
cudaLaunchConfig_t vx_launch_config(const void *kernel, dim3 grid, dim3 block, size_t shared);
void vx_launched(cudaError_t error, const char *kernel, const cudaLaunchConfig_t *config);
#define VX_LAUNCH(kernel, grid, block, shared, ...)                                                                    \
    do {                                                                                                               \
        if (vx_ok()) {                                                                                                 \
            cudaLaunchConfig_t config_ = vx_launch_config((const void *)(kernel), (grid), (block), (shared));          \
            if (vx_ok()) vx_launched(cudaLaunchKernelEx(&config_, kernel, __VA_ARGS__), #kernel, &config_);            \
        }                                                                                                              \
    } while (0)

/* A check that only a kernel can make, of its data (data_check.cu):
 *
 *     const vx_data_check outside =
 *         vx_data_check_of(VX_EINVAL, G, "index at row %%lld, column %%lld is outside 0 .. %lld", (long long)M - 1);
 *     if (bad) vx_report(outside, i);                      in the kernel, which must go on without that element
 *
 * format is printf's, for what the host knows. What then remains, "%lld" and a second one, stands for i / columns and
 * i % columns. The next call that waits for the device fails with the status and the text, "op: index at row 3, ...".
 * Of several faults the first op's is kept, and of one op's that with the lowest index. */
typedef struct vx_data_check {
    unsigned long long *fault, number; /* the device's fault word; which check this is */
} vx_data_check;
vx_data_check vx_data_check_of(int status, int64_t columns, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Numbers that change between the launches of a recorded graph (vertex.h says which). A kernel's arguments are what
 * they were when it was recorded, so these travel through device memory (graph.cu):
 *
 *     const vx_random random = vx_draws(seed, stream);    in every op that has a stream, else it cannot be recorded
 *     const vx_draw d = vx_draw_now(random);              in its kernels
 *
 * vx_graph_param is for other numbers. It returns NULL where no graph is recorded; else the address where a kernel
 * finds, at every launch, the `bytes` that refresh makes on the host from a copy of `given`, which has at most 64
 * bytes. */
typedef struct vx_random {
    vx_draw given;
    const vx_draw *recorded;
} vx_random;
vx_random vx_draws(uint64_t seed, uint64_t stream);

typedef struct vx_launch {
    float recorded_rate, rate; /* a learning rate lr of the recording is now lr / recorded_rate * rate */
    int64_t steps;             /* since the recording */
} vx_launch;
typedef void vx_refresh(void *to, const void *given, const vx_launch *launch);
const void *vx_graph_param(vx_refresh *refresh, const void *given, size_t given_bytes, size_t bytes);

/* Says whether x starts on a multiple of `bytes`: then float4 and its like may be loaded. Allocations do, views need
 * not. */
static inline bool vx_aligned(const vx_tensor *x, int bytes) { return (uintptr_t)x->data % (unsigned)bytes == 0; }

/* Returns the blocks for `items` that a loop over vx_first() and vx_step() works on `per_block` at a time: enough to
 * fill any device, and no more than a grid may have. */
static inline unsigned vx_grid(int64_t items, int64_t per_block)
{
    return (unsigned)vx_max64(1, vx_min64(vx_ceil_div(items, per_block), 1 << 20));
}

/* Returns the lanes that share a row of n elements: a power of two up to 32, so that short rows leave few of them
 * idle. */
static inline int vx_lanes_for(int64_t n)
{
    int lanes = 1;
    while (lanes < 32 && 4 * lanes < n) lanes *= 2;
    return lanes;
}

/* Returns the threads of a block that share a row of n elements: all of them where the row is long, else
 * vx_lanes_for(n). */
static inline int vx_threads_for(int64_t n, int block) { return n > 1024 ? block : vx_lanes_for(n); }

/* Returns the threads that stand side by side over n neighbouring columns: a power of two, at most a warp. */
static inline int vx_columns_for(int64_t n)
{
    int columns = 1;
    while (columns < 32 && columns < n) columns *= 2;
    return columns;
}

/* -- Device side --------------------------------------------------------------------------------------------------- */

#define VX_DEVICE static __device__ __forceinline__
#define VX_INSIDE __device__ __forceinline__ /* the same for a member */
#define VX_KERNEL static __global__ void
#define VX_HOT /* before a kernel's name: kernels/lab/check_cuda_build.lua refuses register spills in it */
#define VX_ALL_LANES 0xffffffffu

extern __shared__ float4 vx_shared[]; /* the dynamic shared memory; cast it */

VX_DEVICE int64_t vx_first(void) { return (int64_t)blockIdx.x * blockDim.x + threadIdx.x; }
VX_DEVICE int64_t vx_step(void) { return (int64_t)gridDim.x * blockDim.x; }

VX_DEVICE vx_draw vx_draw_now(const vx_random &r) { return r.recorded ? *r.recorded : r.given; }

/* Reports that the element `index` fails a check. */
VX_DEVICE void vx_report(vx_data_check check, int64_t index)
{
    const unsigned long long mine = check.number << 48 | (unsigned long long)index;
    unsigned long long before = *(volatile unsigned long long *)check.fault;
    while (before == ~0ull || (before >> 48 == check.number && mine < before)) {
        unsigned long long found = atomicCAS(check.fault, before, mine);
        if (found == before) break;
        before = found;
    }
}

/* Reduce over the 32 lanes of a warp, by the same tree every time; every lane gets the result. All lanes must take
 * part. */
VX_DEVICE float vx_warp_sum(float x)
{
    for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(VX_ALL_LANES, x, i);
    return x;
}
VX_DEVICE double vx_warp_sum(double x)
{
    for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(VX_ALL_LANES, x, i);
    return x;
}
VX_DEVICE float vx_warp_max(float x)
{
    for (int i = 16; i > 0; i >>= 1) x = fmaxf(x, __shfl_xor_sync(VX_ALL_LANES, x, i));
    return x;
}
/* Reduce over groups of `lanes` neighbours of a warp, a power of two up to 32; each group gets its own result. All 32
 * must take part. */
VX_DEVICE double vx_lanes_sum(double x, int lanes)
{
    for (int i = lanes / 2; i > 0; i >>= 1) x += __shfl_xor_sync(VX_ALL_LANES, x, i);
    return x;
}
VX_DEVICE float vx_lanes_max(float x, int lanes)
{
    for (int i = lanes / 2; i > 0; i >>= 1) x = fmaxf(x, __shfl_xor_sync(VX_ALL_LANES, x, i));
    return x;
}
/* Returns the least of packed keys, say (ordered value << 32 | index): ties go to the lowest index. */
VX_DEVICE unsigned long long vx_warp_min(unsigned long long x)
{
    for (int i = 16; i > 0; i >>= 1) {
        unsigned long long y = __shfl_xor_sync(VX_ALL_LANES, x, i);
        x = y < x ? y : x;
    }
    return x;
}

/* Reduce over a block of up to 1024 threads, a multiple of 32; every thread gets the result. shared: 32 elements, which
 * must not be in use before and may be used again after a __syncthreads() of the caller's. */
#define VX_BLOCK_REDUCTION(name, warp, type, neutral)                                                                  \
    VX_DEVICE type name(type x, type *shared)                                                                          \
    {                                                                                                                  \
        const int lane = threadIdx.x % 32, at = threadIdx.x / 32;                                                      \
        x = warp(x);                                                                                                   \
        if (lane == 0) shared[at] = x;                                                                                 \
        __syncthreads();                                                                                               \
        return warp(lane < (int)blockDim.x / 32 ? shared[lane] : (neutral));                                           \
    }
VX_BLOCK_REDUCTION(vx_block_sum, vx_warp_sum, float, 0.0f)
VX_BLOCK_REDUCTION(vx_block_sum, vx_warp_sum, double, 0.0)
VX_BLOCK_REDUCTION(vx_block_max, vx_warp_max, float, -INFINITY)
VX_BLOCK_REDUCTION(vx_block_min, vx_warp_min, unsigned long long, ~0ull)

/* Read and write an element of an operand that a contract lets be f32 or bf16, for kernels whose type T that is. */
VX_DEVICE float vx_get(const float *p) { return *p; }
VX_DEVICE float vx_get(const vx_bf16 *p) { return vx_from_bf16(*p); }
VX_DEVICE void vx_put(float *p, float x) { *p = x; }
VX_DEVICE void vx_put(vx_bf16 *p, float x) { *p = vx_to_bf16(x); }

/* Runs a statement with T for the type of the elements, by a condition of the host's. */
#define VX_TYPED(is_bf16, T, ...)                                                                                      \
    do {                                                                                                               \
        if (is_bf16) {                                                                                                 \
            using T = vx_bf16;                                                                                         \
            __VA_ARGS__;                                                                                               \
        } else {                                                                                                       \
            using T = float;                                                                                           \
            __VA_ARGS__;                                                                                               \
        }                                                                                                              \
    } while (0)
static inline bool vx_is_bf16(const vx_tensor *x) { return x && x->dtype == VX_BF16; }

#endif
