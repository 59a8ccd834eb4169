/* selftest.cu: whether ptx.cuh and the helpers of cuda.cuh do what they say, against plain loops. Compiled for the
 * emulator and, where there is nvcc, for the device; so the layouts of fragments that the emulator imitates are those
 * of the hardware. For the emulator planted_errors.cu goes with it.
 *
 * Prints "ok NAME" or "FAILED NAME: why" per test; the exit status is the number of failures, or 77 without a device.
 */
#include "selftest.cuh"

#include "kernels/shared/float_order.h"

/* -- Tensor cores -------------------------------------------------------------------------------------------------- */

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

int main(void)
{
    static const test tests[] = {
        {"bf16 products", test_mma_bf16},
        {"tf32 products", test_mma_tf32},
        {"matrices from shared memory", test_load_matrices},
        {"asynchronous copies", test_copy_async},
        {"functions", test_functions},
        {"reductions and votes", test_reductions},
        {"data checks and atomics", test_data_checks},
        {"graphs", test_graph},
    };
    cudaError_t e = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (e) {
        printf("no CUDA device: %s\n", cudaGetErrorString(e));
        return 77;
    }
    run_tests(tests);
#ifdef EMU_CUDA_RUNTIME_H
    run_planted_errors();
#endif
    return failures;
}
