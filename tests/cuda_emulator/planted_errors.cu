/* planted_errors.cu: kernels with planted errors, each of which the emulator must find, and what else only the emulator
 * can show: memory that nobody set, streams in the wrong order, its own cuBLAS.
 */
#include "selftest.cuh"

#include <sys/wait.h>
#include <unistd.h>

#include <cublas_v2.h>

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
                                  {barrier, "threads 0-63 wait at __syncthreads (planted_errors.cu:"},
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

void run_planted_errors(void)
{
    static const test tests[] = {
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
    };
    run_tests(tests);
}
