/* selftest.cu: whether ptx.cuh and the helpers of cuda.cuh do what they say, against plain loops. Compiled for the
 * emulator and, where there is nvcc, for the device; so the layouts of fragments that the emulator imitates are those
 * of the hardware. For the emulator it also holds kernels with planted errors, each of which must be found.
 *
 * Prints "ok NAME" or "FAILED NAME: why" per test; the exit status is the number of failures.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/cuda/cuda.cuh"
#include "kernels/shared/float_order.h"
#ifdef EMU_CUDA_RUNTIME_H
#include <cublas_v2.h>
#endif

static int failures;
static const char *test_name;
static bool test_failed;

static void complain(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printf("FAILED %s: ", test_name);
    vprintf(format, args);
    printf("\n");
    va_end(args);
    test_failed = true;
}
#define EXPECT(condition, ...)                                                                                         \
    do {                                                                                                               \
        if (!(condition) && !test_failed) complain(__VA_ARGS__);                                                       \
    } while (0)

static cudaStream_t stream;

/* Launches and does not wait. */
#define LAUNCH(kernel, grid, block, shared, ...)                                                                       \
    do {                                                                                                               \
        cudaLaunchConfig_t config_ = {};                                                                               \
        config_.gridDim = dim3(grid);                                                                                  \
        config_.blockDim = dim3(block);                                                                                \
        config_.dynamicSmemBytes = (shared);                                                                           \
        config_.stream = stream;                                                                                       \
        launch_error = cudaLaunchKernelEx(&config_, kernel, __VA_ARGS__);                                              \
    } while (0)
static cudaError_t launch_error;

static void finish(void)
{
    cudaError_t e = launch_error ? launch_error : cudaStreamSynchronize(stream);
    EXPECT(e == cudaSuccess, "%s", cudaGetErrorString(e));
}

template <class T> static T *device(size_t count)
{
    T *p = 0;
    cudaError_t e = cudaMalloc((void **)&p, count * sizeof(T));
    EXPECT(e == cudaSuccess, "%s", cudaGetErrorString(e));
    return p;
}
template <class T> static T *device(const T *from, size_t count)
{
    T *p = device<T>(count);
    cudaMemcpyAsync(p, from, count * sizeof(T), cudaMemcpyHostToDevice, stream);
    return p;
}
template <class T> static void fetch(T *to, const T *from, size_t count)
{
    cudaMemcpyAsync(to, from, count * sizeof(T), cudaMemcpyDeviceToHost, stream);
    finish();
}

static uint32_t random_state = 1;
static float
random_float(void) /* 7 significant bits: exact in bf16 and tf32, and so are their products and sums in float32 */
{
    random_state = random_state * 1664525u + 1013904223u;
    return (float)((int)(random_state >> 24) - 128) / 16.0f;
}

/* -- Tensor cores -------------------------------------------------------------------------------------------------- */

static uint16_t bf16_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)(bits >> 16);
}

/* Fragments by the index formulas of the PTX ISA, element by element. */
VX_KERNEL mma_bf16_kernel(float *d, const vx_bf16 *a, const vx_bf16 *b)
{
    const int lane = threadIdx.x, group = lane >> 2, in_group = lane % 4;
    uint32_t fa[4] = {0, 0, 0, 0}, fb[2] = {0, 0};
    float fd[4];
    for (int i = 0; i < 8; i++) {
        const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8,
                  column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
        fa[i / 2] |= (uint32_t)a[row * 16 + column] << (i % 2 * 16);
    }
    for (int i = 0; i < 4; i++) {
        const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8), column = group;
        fb[i / 2] |= (uint32_t)b[row * 8 + column] << (i % 2 * 16);
    }
    for (int i = 0; i < 4; i++) fd[i] = d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
    vx_mma_bf16(fd, fa, fb);
    for (int i = 0; i < 4; i++) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = fd[i];
}

VX_KERNEL mma_tf32_kernel(float *d, const float *a, const float *b)
{
    const int lane = threadIdx.x, group = lane >> 2, in_group = lane % 4;
    uint32_t fa[4], fb[2];
    float fd[4];
    for (int i = 0; i < 4; i++)
        fa[i] = vx_to_tf32(a[(i % 2 ? group + 8 : group) * 8 + (i < 2 ? in_group : in_group + 4)]);
    for (int i = 0; i < 2; i++) fb[i] = vx_to_tf32(b[(i ? in_group + 4 : in_group) * 8 + group]);
    for (int i = 0; i < 4; i++) fd[i] = d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
    vx_mma_tf32(fd, fa, fb);
    for (int i = 0; i < 4; i++) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = fd[i];
}

/* The same product with fragments from shared memory: a as it lies, b transposed on the way. */
VX_KERNEL mma_loaded_kernel(float *d, const vx_bf16 *a, const vx_bf16 *b)
{
    __shared__ __align__(16) vx_bf16 sa[16 * 16], sb[16 * 8];
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) sa[i] = a[i];
    for (int i = lane; i < 128; i += 32) sb[i] = b[i];
    __syncwarp();
    uint32_t fa[4], fb[4];
    float fd[4];
    /* matrices 0 1 of a: rows 0-7 and 8-15 of columns 0-7; 2 3: of columns 8-15 */
    vx_load_matrices(fa, sa + (lane % 16) * 16 + lane / 16 * 8);
    /* matrices 0 1 of b: rows 0-7 and 8-15; 2 and 3 the same again */
    vx_load_matrices_transposed(fb, sb + (lane % 16) * 8);
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 4; i++) fd[i] = d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
    vx_mma_bf16(fd, fa, fb);
    for (int i = 0; i < 4; i++) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = fd[i];
}

static void check_product(int K, void (*run)(float *d, const float *a, const float *b))
{
    float a[16 * 16], b[16 * 8], d[16 * 8], expected[16 * 8];
    for (int i = 0; i < 16 * K; i++) a[i] = random_float();
    for (int i = 0; i < K * 8; i++) b[i] = random_float();
    for (int i = 0; i < 16 * 8; i++) expected[i] = d[i] = random_float();
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++)
            for (int k = 0; k < K; k++) expected[i * 8 + j] += a[i * K + k] * b[k * 8 + j];
    run(d, a, b);
    for (int i = 0; i < 16 * 8; i++)
        EXPECT(d[i] == expected[i], "element (%d,%d) is %g, expected %g", i / 8, i % 8, d[i], expected[i]);
}

template <class T, class F> static void run_product(float *d, const T *a, const T *b, size_t k, F launch)
{
    float *dd = device(d, 16 * 8);
    T *da = device(a, 16 * k), *db = device(b, k * 8);
    launch(dd, da, db);
    fetch(d, dd, 16 * 8);
    cudaFree(dd), cudaFree(da), cudaFree(db);
}

static void as_bf16(float *d, const float *a, const float *b, void (*kernel)(float *, const vx_bf16 *, const vx_bf16 *))
{
    vx_bf16 ha[16 * 16], hb[16 * 8];
    for (int i = 0; i < 256; i++) ha[i] = bf16_bits(a[i]);
    for (int i = 0; i < 128; i++) hb[i] = bf16_bits(b[i]);
    run_product(d, ha, hb, 16,
                [kernel](float *x, const vx_bf16 *y, const vx_bf16 *z) { LAUNCH(kernel, 1, 32, 0, x, y, z); });
}

static void test_mma_bf16(void)
{
    check_product(16, [](float *d, const float *a, const float *b) { as_bf16(d, a, b, mma_bf16_kernel); });
}
static void test_load_matrices(void)
{
    check_product(16, [](float *d, const float *a, const float *b) { as_bf16(d, a, b, mma_loaded_kernel); });
}
static void test_mma_tf32(void)
{
    check_product(8, [](float *d, const float *a, const float *b) {
        run_product(d, a, b, 8,
                    [](float *x, const float *y, const float *z) { LAUNCH(mma_tf32_kernel, 1, 32, 0, x, y, z); });
    });
}

/* -- Asynchronous copies ------------------------------------------------------------------------------------------- */

/* Sums n pieces of 128 float4, fetched two pieces ahead; pieces at and beyond `valid` are zeros. */
VX_KERNEL pipeline_kernel(float *y, const float4 *x, int n, int valid)
{
    __shared__ float4 stage[3][128];
    const int t = threadIdx.x;
    float sum = 0;
    for (int i = 0; i < 2; i++) {
        vx_copy_async(&stage[i][t], x + (i < valid ? i * 128 + t : 0), i < valid);
        vx_copy_commit();
    }
    for (int i = 0; i < n; i++) {
        vx_copy_wait(1);
        __syncthreads();
        const float4 v = stage[i % 3][(t + 1) % 128]; /* a neighbour's */
        sum += v.x + v.y + v.z + v.w;
        const int next = i + 2;
        if (next < n) vx_copy_async(&stage[next % 3][t], x + (next < valid ? next * 128 + t : 0), next < valid);
        vx_copy_commit();
    }
    vx_copy_wait(0);
    y[t] = sum;
}

static void test_copy_async(void)
{
    enum { N = 9, VALID = 7 };
    static float x[N * 512], y[128];
    for (int i = 0; i < N * 512; i++) x[i] = random_float();
    float *dx = device(x, N * 512), *dy = device<float>(128);
    LAUNCH(pipeline_kernel, 1, 128, 0, dy, (const float4 *)dx, (int)N, (int)VALID);
    fetch(y, dy, 128);
    for (int t = 0; t < 128; t++) {
        float sum = 0;
        for (int i = 0; i < VALID; i++)
            for (int j = 0; j < 4; j++) sum += x[(i * 128 + (t + 1) % 128) * 4 + j];
        EXPECT(y[t] == sum, "thread %d has %g, expected %g", t, y[t], sum);
    }
    cudaFree(dx), cudaFree(dy);
}

/* -- Functions of one number --------------------------------------------------------------------------------------- */

VX_KERNEL functions_kernel(float *y, uint32_t *bits, const float *x, int n)
{
    const int i = (int)vx_first();
    if (i >= n) return;
    y[i] = vx_fast_exp2(x[i]);
    y[n + i] = vx_fast_log2(fabsf(x[i]));
    bits[i] = vx_pack_bf16(x[i], -x[i]);
    bits[n + i] = vx_to_tf32(x[i]);
    bits[2 * n + i] = vx_to_bf16(x[i]);
    bits[3 * n + i] = float_order(x[i]);
    y[2 * n + i] = float_of_order(float_order(x[i]));
}

static void test_functions(void)
{
    enum { N = 200 };
    static float x[N], y[3 * N];
    static uint32_t bits[4 * N];
    for (int i = 0; i < N; i++) x[i] = (random_float() + 0.37f) * 1.2345f;
    x[0] = 0.0f, x[1] = -200.0f, x[2] = 300.0f, x[3] = 1.0f, x[4] = -126.5f, x[5] = 1.0f + 0x1p-8f,
    x[6] = 1.0f + 3 * 0x1p-8f, x[7] = -0.0f, x[8] = INFINITY;
    float *dx = device(x, N), *dy = device<float>(3 * N);
    uint32_t *db = device<uint32_t>(4 * N);
    LAUNCH(functions_kernel, 2, 128, 0, dy, db, (const float *)dx, (int)N);
    fetch(y, dy, 3 * N);
    fetch(bits, db, 4 * N);
    for (int i = 0; i < N; i++) {
        const double e = exp2((double)x[i]), l = log2(fabs((double)x[i]));
        const bool tiny = e < 1.1754943508222875e-38;
        EXPECT(tiny ? y[i] == 0 : e > 3.5e38 ? isinf(y[i]) : fabs(y[i] - e) <= 4e-7 * e, "2^%g is %g", x[i], y[i]);
        EXPECT(isinf(l) ? y[N + i] == (float)l : fabs(y[N + i] - l) <= 4e-7 * fmax(1.0, fabs(l)), "log2 %g is %g",
               fabs(x[i]), y[N + i]);
        uint32_t u;
        memcpy(&u, &x[i], 4);
        const uint32_t half = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
        EXPECT((bits[i] & 0xffffu) == half && bits[i] >> 16 == (half ^ 0x8000u), "bf16 of %g is %08x", x[i], bits[i]);
        EXPECT(bits[2 * N + i] == half, "bf16 of %g is %04x", x[i], bits[2 * N + i]);
        EXPECT((bits[N + i] & 0xffffe000u) == (isinf(x[i]) ? u : (u + 0x1000u) & 0xffffe000u), "tf32 of %g is %08x",
               x[i], bits[N + i]);
        EXPECT(!memcmp(&y[2 * N + i], &x[i], 4), "ordered and back: %g is %g", x[i], y[2 * N + i]);
        for (int j = 0; j < i; j++)
            EXPECT((x[i] < x[j]) == (bits[3 * N + i] < bits[3 * N + j]) || x[i] == x[j], "order of %g and %g", x[i],
                   x[j]);
    }
    cudaFree(dx), cudaFree(dy), cudaFree(db);
}

/* -- Reductions, votes, data checks -------------------------------------------------------------------------------- */

VX_KERNEL reductions_kernel(double *y, const float *x, int n)
{
    __shared__ float fs[32];
    __shared__ double ds[32];
    __shared__ unsigned long long us[32];
    const int t = threadIdx.x;
    const float v = t < n ? x[t] : 0.0f;
    const float sum = vx_block_sum(v, fs);
    __syncthreads();
    const float largest = vx_block_max(t < n ? v : -INFINITY, fs);
    const double exact = vx_block_sum((double)v, ds);
    const unsigned long long least =
        vx_block_min(t < n ? (unsigned long long)float_order(v) << 32 | (unsigned)t : ~0ull, us);
    const int positive = __syncthreads_count(t < n && v > 0), any = __syncthreads_or(t < n && v > 1e6f),
              all = __syncthreads_and(v < 1e6f);
    const unsigned ballot = __ballot_sync(VX_ALL_LANES, t % 3 == 0), same = __match_any_sync(VX_ALL_LANES, t % 4);
    const int up = __shfl_up_sync(VX_ALL_LANES, t, 1), down = __shfl_down_sync(VX_ALL_LANES, t, 2, 8),
              from = __shfl_sync(VX_ALL_LANES, t, 5, 16);
    if (t == 45) {
        const double r[] = {sum,
                            largest,
                            exact,
                            (double)(unsigned)least,
                            (double)positive,
                            (double)any,
                            (double)all,
                            (double)ballot,
                            (double)same,
                            (double)up,
                            (double)down,
                            (double)from};
        for (int i = 0; i < 12; i++) y[i] = r[i];
    }
}

static void test_reductions(void)
{
    for (int threads = 64; threads <= 1024; threads += 480) {
        static float x[1024];
        const int n = threads - 7;
        double y[12], sum = 0, largest = -1e30, least = 1e30;
        int at = 0, positive = 0;
        for (int i = 0; i < n; i++) {
            x[i] = random_float();
            sum += x[i], largest = fmax(largest, x[i]), positive += x[i] > 0;
            if (x[i] < least) least = x[i], at = i;
        }
        float *dx = device(x, 1024);
        double *dy = device<double>(12);
        LAUNCH(reductions_kernel, 1, threads, 0, dy, (const float *)dx, n);
        fetch(y, dy, 12);
        /* thread 45 is lane 13: 45 % 4 = 1; lanes with t % 3 = 0 in the second warp: t = 33, 36, ... */
        unsigned ballot = 0, same = 0;
        for (int lane = 0; lane < 32; lane++)
            ballot |= (unsigned)((lane + 32) % 3 == 0) << lane, same |= (unsigned)(lane % 4 == 1) << lane;
        const double expected[12] = {sum,          largest, sum, (double)at, (double)positive, 0, 1, (double)ballot,
                                     (double)same, 44,      47,  37};
        for (int i = 0; i < 12; i++)
            EXPECT(y[i] == expected[i], "%d threads, result %d is %g, expected %g", threads, i, y[i], expected[i]);
        cudaFree(dx), cudaFree(dy);
    }
}

VX_KERNEL report_kernel(vx_data_check first, vx_data_check second, int from)
{
    const int i = (int)vx_first();
    if (i >= from && i % 7 == 3) vx_report(first, i);
    if (i % 5 == 0) vx_report(second, i);
}
VX_KERNEL count_kernel(int *count, unsigned long long *largest)
{
    atomicAdd(count, 1);
    atomicMax(largest, (unsigned long long)vx_first());
}

static void test_data_checks(void)
{
    unsigned long long word = ~0ull, *d = device(&word, 1), largest = 0, *dl = device(&largest, 1);
    int count = 0, *dc = device(&count, 1);
    vx_data_check a = {d, 3}, b = {d, 9};
    LAUNCH(report_kernel, 4, 64, 0, a, a, 20);
    LAUNCH(report_kernel, 4, 64, 0, b, b, 0); /* later: does not displace it */
    LAUNCH(count_kernel, 5, 96, 0, dc, dl);
    fetch(&word, d, 1);
    fetch(&count, dc, 1);
    fetch(&largest, dl, 1);
    EXPECT(word == (3ull << 48 | 0), "the fault word is %llx", word);
    EXPECT(count == 480 && largest == 479, "%d threads, the last %llu", count, largest);
    cudaFree(d), cudaFree(dc), cudaFree(dl);
}

/* -- Streams and graphs -------------------------------------------------------------------------------------------- */

VX_KERNEL multiply_add_kernel(float *x, float a, float b) { x[threadIdx.x] = a * x[threadIdx.x] + b; }

static void test_graph(void)
{
    float x[64] = {0}, *d = device(x, 64);
    cudaStream_t other;
    cudaEvent_t fork, join;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&fork, cudaEventDisableTiming);
    cudaEventCreateWithFlags(&join, cudaEventDisableTiming);
    finish();
    cudaStream_t origin = stream;
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed);
    LAUNCH(multiply_add_kernel, 1, 64, 0, d, 1.0f, 1.0f);
    cudaEventRecord(fork, stream);
    cudaStreamWaitEvent(other, fork, 0);
    stream = other;
    LAUNCH(multiply_add_kernel, 1, 64, 0, d, 2.0f, 0.0f);
    stream = origin;
    cudaEventRecord(join, other);
    cudaStreamWaitEvent(stream, join, 0);
    LAUNCH(multiply_add_kernel, 1, 64, 0, d, 1.0f, 3.0f);
    cudaError_t e = cudaStreamEndCapture(stream, &graph);
    EXPECT(e == cudaSuccess, "end of the capture: %s", cudaGetErrorString(e));
    fetch(x, d, 64);
    EXPECT(x[5] == 0, "recorded work was run: %g", x[5]);
    if (!test_failed) {
        cudaGraphInstantiate(&executable, graph, 0);
        for (int i = 0; i < 3; i++) cudaGraphLaunch(executable, stream);
        fetch(x, d, 64); /* 0 → 5 → 15 → 35 */
        EXPECT(x[5] == 35 && x[63] == 35, "three launches give %g", x[5]);
        cudaGraphExecDestroy(executable);
        cudaGraphDestroy(graph);
    }
    cudaEventDestroy(fork), cudaEventDestroy(join);
    cudaStreamDestroy(other);
    cudaFree(d);
}

/* -- Planted errors, for the emulator alone ------------------------------------------------------------------------ */

#ifdef EMU_CUDA_RUNTIME_H

/* Waits, and expects an error whose text holds both parts. */
static void expect_error(const char *part, const char *more)
{
    cudaError_t e = launch_error ? launch_error : cudaStreamSynchronize(stream);
    const char *text = cudaGetErrorString(e);
    EXPECT(e != cudaSuccess && strstr(text, part) && strstr(text, more),
           "expected an error with '%s' and '%s', got: %s", part, more, text);
    cudaGetLastError();
    launch_error = cudaSuccess;
}

template <bool barrier> VX_KERNEL reverse_kernel(int *y)
{
    __shared__ int s[128];
    s[threadIdx.x] = (int)threadIdx.x;
    if (barrier) __syncthreads();
    y[threadIdx.x] = s[127 - threadIdx.x];
}
template <bool barrier> VX_KERNEL neighbour_kernel(int *y)
{
    __shared__ int s[32];
    s[threadIdx.x] = (int)threadIdx.x;
    if (barrier) __syncwarp();
    y[threadIdx.x] = s[31 - threadIdx.x];
}
static void test_missing_barriers(void)
{
    int y[128], *d = device<int>(128);
    LAUNCH(reverse_kernel<true>, 1, 128, 0, d);
    fetch(y, d, 128);
    for (int i = 0; i < 128; i++) EXPECT(y[i] == 127 - i, "with the barrier, element %d is %d", i, y[i]);
    LAUNCH(reverse_kernel<false>, 1, 128, 0, d);
    fetch(y, d, 128);
    int wrong = 0;
    for (int i = 0; i < 128; i++) wrong += y[i] == -1; /* shared memory's first content */
    EXPECT(wrong > 0, "without the barrier all is right");
    LAUNCH(neighbour_kernel<true>, 1, 32, 0, d);
    fetch(y, d, 32);
    for (int i = 0; i < 32; i++) EXPECT(y[i] == 31 - i, "with __syncwarp, element %d is %d", i, y[i]);
    LAUNCH(neighbour_kernel<false>, 1, 32, 0, d);
    fetch(y, d, 32);
    wrong = 0;
    for (int i = 0; i < 32; i++) wrong += y[i] == -1;
    EXPECT(wrong > 0, "without __syncwarp all is right");
    cudaFree(d);
}

VX_KERNEL divergent_kernel(int *y, int how)
{
    const int t = threadIdx.x;
    if (how == 0 && t >= 40) return;
    if (how == 1) {
        if (t < 64) __syncthreads();
        else __syncthreads();
    }
    if (how == 2 && t / 32 == 1 && t % 32 < 16) __syncthreads();
    if (how == 2) y[t] = __shfl_xor_sync(VX_ALL_LANES, t, 1);
    if (how == 3 && t % 32 == 9) return;
    if (how == 3) y[t] = __shfl_xor_sync(VX_ALL_LANES, t, 1);
    if (how == 4) y[t] = __shfl_xor_sync(0xffffu, t, 1);
    if (how == 5) y[t] = __shfl_xor_sync(t % 32 < 16 ? 0xffffu : VX_ALL_LANES, t, 1);
    if (how == 6) y[t] = __shfl_xor_sync(t % 32 < 16 ? 0xffffu : 0xffff0000u, t, 16);
    if (how == 7) y[t] = t % 32 < 16 ? __shfl_xor_sync(0xffffu, t, 1) : __shfl_xor_sync(0xffff0000u, t, 2);
    if (how == 8) y[t] = __shfl_xor_sync(VX_ALL_LANES, t, 1);
    __syncthreads();
}
static void test_divergence(void)
{
    int *d = device<int>(128), y[128];
    const char *barrier = "not all threads of the block reach the same barrier", *lanes = "lanes of a warp wait";
    const char *expected[7][2] = {{barrier, "threads 40-127 have returned"},
                                  {barrier, "threads 0-63 wait at __syncthreads (selftest.cu:"},
                                  {lanes, "threads 32-47 wait at __syncthreads"},
                                  {lanes, "have returned"},
                                  {"is not in its own mask", "lane"},
                                  {lanes, "with mask ffffffff"},
                                  {"outside its mask", "kernel divergent_kernel, block (0,0,0)"}};
    for (int how = 0; how < 7; how++) {
        LAUNCH(divergent_kernel, 1, 128, 0, d, how);
        expect_error(expected[how][0], expected[how][1]);
    }
    LAUNCH(divergent_kernel, 1, 128, 0, d, 7); /* two halves of a warp, each with its mask: fine */
    fetch(y, d, 128);
    for (int i = 0; i < 128; i++) EXPECT(y[i] == (i % 32 < 16 ? i ^ 1 : i ^ 2), "halves: thread %d has %d", i, y[i]);
    LAUNCH(divergent_kernel, 1, 40, 0, d, 8); /* a warp of 8 lanes, and a mask of 32 */
    expect_error(lanes, "threads 32-39 wait at __shfl_xor_sync");
    cudaFree(d);
}

VX_KERNEL access_kernel(float *p, int64_t at, int write)
{
    if (write) p[at] = 1.0f;
    else if (p[at] == 1.0f) p[0] = 2.0f;
}
VX_KERNEL wide_kernel(char *p, int offset) { *(float4 *)(p + offset) = make_float4(1, 2, 3, 4); }
VX_KERNEL fixed_kernel(float *p, int at)
{
    __shared__ float s[8];
    s[at] = 3.0f;
    __syncthreads();
    p[0] = s[0];
}
VX_KERNEL dynamic_kernel(float *p, int at)
{
    ((float *)vx_shared)[at] = 3.0f;
    __syncthreads();
    p[0] = ((float *)vx_shared)[0];
}
static __device__ int deep(int n, volatile char *last)
{
    volatile char space[1024];
    space[0] = (char)n;
    space[1023] = *last;
    return n ? deep(n - 1, space) + space[1023] : space[0];
}
VX_KERNEL deep_kernel(int *y, int n) { y[0] = deep(n, (volatile char *)y); }

[[maybe_unused]] static void test_addresses(void) /* under AddressSanitizer these end the process */
{
    float *d = device<float>(1000), *other = device<float>(1000), *small = device<float>(10), x;
    LAUNCH(access_kernel, 1, 1, 0, d, 999, 1);
    finish();
    LAUNCH(access_kernel, 1, 1, 0, d, 1000, 1); /* within the 256 bytes that blocks are aligned to */
    expect_error("kernel access_kernel", "wrote past the end of a block of 4000 bytes");
    LAUNCH(access_kernel, 1, 1, 0, small, -1, 1);
    expect_error("kernel access_kernel", "wrote before the start of a block of 40 bytes");
    LAUNCH(access_kernel, 1, 1, 0, d, -1, 1);
    expect_error("out of bounds", "4 bytes before the start of a block of 4000 bytes");
    LAUNCH(access_kernel, 1, 1, 0, d, 1024, 0);
    expect_error("kernel access_kernel, block (0,0,0), thread (0,0,0): out of bounds",
                 "at byte 4096 of a block of 4000 bytes");
    LAUNCH(access_kernel, 1, 1, 0, d, -2000, 0);
    expect_error("out of bounds", "before the start of a block of 4000 bytes");
    LAUNCH(access_kernel, 1, 1, 0, (float *)0, 3, 0);
    expect_error("out of bounds", "belongs to no block");
    cudaFree(other);
    LAUNCH(access_kernel, 1, 1, 0, other, 10, 1);
    expect_error("was freed", "at byte 40");
    LAUNCH(wide_kernel, 1, 1, 0, (char *)d, 16);
    finish();
    LAUNCH(wide_kernel, 1, 1, 0, (char *)d, 8);
    expect_error("misaligned", "wide_kernel");
    LAUNCH(fixed_kernel, 1, 32, 0, d, 8);
    expect_error("an index outside an array of fixed size", "fixed_kernel");
    LAUNCH(dynamic_kernel, 1, 32, 64, d, 0);
    finish();
    LAUNCH(dynamic_kernel, 1, 32, 64, d, 16);
    expect_error("wrote at byte 64 of its 64 bytes of dynamic shared memory", "dynamic_kernel");
    LAUNCH(deep_kernel, 1, 1, 0, (int *)d, 100);
    expect_error("stack of 65536 bytes overflowed", "deep_kernel");
    LAUNCH(access_kernel, 1, 1, 0, d, 0, 1); /* and all goes on */
    fetch(&x, d, 1);
    EXPECT(x == 1.0f, "after errors: %g", x);
    cudaFree(d), cudaFree(small);
}

VX_KERNEL unset_kernel(float *y, const float *x, int set)
{
    __shared__ float s[32];
    if (set) s[threadIdx.x] = x[threadIdx.x]; /* or the compiler would know what an array holds that nobody writes */
    y[threadIdx.x] = threadIdx.x % 2 ? s[threadIdx.x] : x[threadIdx.x];
}
VX_KERNEL hasty_kernel(float4 *y, const float4 *x)
{
    __shared__ float4 s[32];
    vx_copy_async(&s[threadIdx.x], x + threadIdx.x, true);
    vx_copy_commit();
    y[threadIdx.x] = s[threadIdx.x];
    vx_copy_wait(0);
    y[32 + threadIdx.x] = s[threadIdx.x];
}
static void test_unset_memory(void)
{
    float *x = device<float>(128), *y = device<float>(256), r[256];
    LAUNCH(fixed_kernel, 1, 32, 0, y, 0); /* leaves numbers in shared memory */
    LAUNCH(unset_kernel, 1, 32, 0, y, (const float *)x, 0);
    fetch(r, y, 32);
    for (int i = 0; i < 32; i++) EXPECT(isnan(r[i]), "unset %s memory holds %g", i % 2 ? "shared" : "device", r[i]);
    cudaMemsetAsync(x, 0, 512, stream);
    LAUNCH(hasty_kernel, 1, 32, 0, (float4 *)y, (const float4 *)x);
    fetch(r, y, 256);
    for (int i = 0; i < 128; i++)
        EXPECT(isnan(r[i]) && r[128 + i] == 0, "before and after waiting for a copy: %g %g", r[i], r[128 + i]);
    cudaFree(x), cudaFree(y);
}

static void test_launches(void)
{
    float *d = device<float>(64), x[8];
    LAUNCH(access_kernel, 1, 1025, 0, d, 0, 1);
    expect_error("invalid configuration", "");
    LAUNCH(access_kernel, 0, 32, 0, d, 0, 1);
    expect_error("invalid configuration", "");
    LAUNCH(dynamic_kernel, 1, 32, 64 << 10, d, 0);
    expect_error("invalid argument", "");
    cudaFuncSetAttribute((const void *)dynamic_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10);
    LAUNCH(dynamic_kernel, 1, 32, 64 << 10, d, 0);
    finish();
    EXPECT(cudaMemcpyAsync(x, d + 60, 32, cudaMemcpyDeviceToHost, stream) == cudaErrorInvalidValue,
           "a copy from beyond the end");
    EXPECT(cudaMemcpyAsync(x, x + 4, 16, cudaMemcpyDeviceToHost, stream) == cudaErrorInvalidValue,
           "a copy from the host called one from the device");
    EXPECT(cudaMemsetAsync(d, 0, 257, stream) == cudaErrorInvalidValue, "memset beyond the end");
    cudaGetLastError();
    cudaFree(d);
}

/* What pinned memory holds when the copy runs, not when it was asked for, and what another stream reads without an
 * event. */
static void test_asynchrony(void)
{
    float *pinned, *d = device<float>(1), *e = device<float>(1), y;
    int early = 0;
    cudaStream_t other;
    cudaEvent_t event;
    cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&event, 0);
    cudaMallocHost((void **)&pinned, 4);
    *pinned = 1;
    cudaMemcpyAsync(d, pinned, 4, cudaMemcpyHostToDevice, stream);
    *pinned = 2;
    fetch(&y, d, 1);
    EXPECT(y == 2, "the copy read %g", y);
    for (int i = 0; i < 20; i++) {
        *pinned = (float)i;
        cudaMemcpyAsync(d, pinned, 4, cudaMemcpyHostToDevice, other);
        cudaMemcpyAsync(e, d, 4, cudaMemcpyDeviceToDevice, stream);
        fetch(&y, e, 1);
        early += y != (float)i;
        cudaStreamSynchronize(other);
        *pinned = (float)(100 + i);
        cudaMemcpyAsync(d, pinned, 4, cudaMemcpyHostToDevice, other);
        cudaEventRecord(event, other);
        cudaStreamWaitEvent(stream, event, 0);
        cudaMemcpyAsync(e, d, 4, cudaMemcpyDeviceToDevice, stream);
        fetch(&y, e, 1);
        EXPECT(y == (float)(100 + i), "after the event: %g", y);
    }
    EXPECT(early > 0, "streams without an event never ran out of order");
    cudaFreeHost(pinned), cudaFree(d), cudaFree(e);
    cudaEventDestroy(event), cudaStreamDestroy(other);
}

static void test_bad_captures(void)
{
    cudaStream_t other;
    cudaEvent_t event;
    cudaGraph_t graph;
    float *d = device<float>(64);
    cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&event, 0);
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
    EXPECT(cudaStreamSynchronize(stream) == cudaErrorStreamCaptureUnsupported, "waiting while recording");
    EXPECT(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated, "and the recording is lost");
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed);
    cudaEventRecord(event, stream);
    cudaStreamWaitEvent(other, event, 0);
    cudaMemsetAsync(d, 0, 4, other);
    EXPECT(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureUnjoined, "a stream that was not waited for");
    cudaGetLastError();
    cudaEventDestroy(event), cudaStreamDestroy(other);
    cudaFree(d);
}

[[maybe_unused]] static void test_host_access(void)
{
    float *d = device<float>(64);
    int pipes[2], status;
    char text[200] = "";
    LAUNCH(access_kernel, 1, 1, 0, d, 0, 1);
    finish();
    if (pipe(pipes)) complain("no pipe");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(pipes[1], 2);
        d[0] = 2;
        _exit(0);
    }
    waitpid(child, &status, 0);
    if (read(pipes[0], text, sizeof text - 1) < 0) complain("nothing to read");
    EXPECT(WIFSIGNALED(status) && strstr(text, "touches device memory"), "the host wrote to device memory unseen: %s",
           text);
    close(pipes[0]), close(pipes[1]);
    cudaFree(d);
}

/* The products that stand for cuBLAS: column-major, every combination of transpositions and types. */
static void test_blas(void)
{
    enum { M = 5, N = 4, K = 7, BATCH = 2 };
    cublasHandle_t handle;
    cublasCreate_v2(&handle);
    cublasSetStream_v2(handle, stream);
    for (int ta = 0; ta < 2; ta++)
        for (int tb = 0; tb < 2; tb++)
            for (int half = 0; half < 2; half++) {
                float a[BATCH * M * K], b[K * N], c[BATCH * M * N], got[BATCH * M * N];
                vx_bf16 ah[BATCH * M * K], bh[K * N];
                for (int i = 0; i < BATCH * M * K; i++) ah[i] = bf16_bits(a[i] = random_float());
                for (int i = 0; i < K * N; i++) bh[i] = bf16_bits(b[i] = random_float());
                for (int i = 0; i < BATCH * M * N; i++) c[i] = random_float();
                float *da = device(a, BATCH * M * K), *db = device(b, K * N), *dc = device(c, BATCH * M * N);
                vx_bf16 *dah = device(ah, BATCH * M * K), *dbh = device(bh, K * N);
                const float alpha = 2, beta = -1;
                const cudaDataType type = half ? CUDA_R_16BF : CUDA_R_32F;
                const cublasStatus_t s = cublasGemmStridedBatchedEx(
                    handle, ta ? CUBLAS_OP_T : CUBLAS_OP_N, tb ? CUBLAS_OP_T : CUBLAS_OP_N, M, N, K, &alpha,
                    half ? (void *)dah : (void *)da, type, ta ? K : M, M * K, half ? (void *)dbh : (void *)db, type,
                    tb ? N : K, 0, &beta, dc, CUDA_R_32F, M, M * N, BATCH, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
                EXPECT(s == CUBLAS_STATUS_SUCCESS, "status %d", (int)s);
                fetch(got, dc, BATCH * M * N);
                for (int l = 0; l < BATCH; l++)
                    for (int i = 0; i < M; i++)
                        for (int j = 0; j < N; j++) {
                            float sum = -c[l * M * N + i + j * M];
                            for (int k = 0; k < K; k++)
                                sum += 2 * a[l * M * K + (ta ? k + i * K : i + k * M)] * b[tb ? j + k * N : k + j * K];
                            EXPECT(got[l * M * N + i + j * M] == sum, "%d%d%d: element (%d,%d,%d) is %g, expected %g",
                                   ta, tb, half, l, i, j, got[l * M * N + i + j * M], sum);
                        }
                cudaFree(da), cudaFree(db), cudaFree(dc), cudaFree(dah), cudaFree(dbh);
            }
    cublasDestroy_v2(handle);
}

#endif

int main(void)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
        {"bf16 products", test_mma_bf16},
        {"tf32 products", test_mma_tf32},
        {"matrices from shared memory", test_load_matrices},
        {"asynchronous copies", test_copy_async},
        {"functions", test_functions},
        {"reductions and votes", test_reductions},
        {"data checks and atomics", test_data_checks},
        {"graphs", test_graph},
#ifdef EMU_CUDA_RUNTIME_H
        {"missing barriers", test_missing_barriers},
        {"divergence", test_divergence},
        {"unset memory", test_unset_memory},
#ifndef __SANITIZE_ADDRESS__
        {"addresses", test_addresses},
        {"host access", test_host_access},
#endif
        {"launches", test_launches},
        {"asynchrony", test_asynchrony},
        {"bad captures", test_bad_captures},
        {"products in cuBLAS's place", test_blas},
#endif
    };
    cudaError_t e = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (e) {
        printf("no CUDA device: %s\n", cudaGetErrorString(e));
        return 77;
    }
    for (const auto &t : tests) {
        test_name = t.name;
        test_failed = false;
        t.run();
        failures += test_failed;
        if (!test_failed) printf("ok %s\n", t.name);
        fflush(stdout);
    }
    return failures;
}
