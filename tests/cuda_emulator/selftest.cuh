/* selftest.cuh: the frame of the self-tests: a test is a function that says with EXPECT what must hold. */
#ifndef VX_SELFTEST_CUH
#define VX_SELFTEST_CUH

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "kernels/cuda/cuda.cuh"

inline int failures;
inline const char *test_name;
inline bool test_failed;

inline void complain(const char *format, ...)
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

inline cudaStream_t stream;

/* Launches and does not wait; launch_error says what was reported at once. */
#define LAUNCH(kernel, grid, block, shared, ...)                                                                       \
    do {                                                                                                               \
        cudaLaunchConfig_t config_ = {};                                                                               \
        config_.gridDim = dim3(grid);                                                                                  \
        config_.blockDim = dim3(block);                                                                                \
        config_.dynamicSmemBytes = (shared);                                                                           \
        config_.stream = stream;                                                                                       \
        launch_error = cudaLaunchKernelEx(&config_, kernel, __VA_ARGS__);                                              \
    } while (0)
inline cudaError_t launch_error;

/* Waits, and expects no error. */
inline void finish(void)
{
    cudaError_t e = launch_error ? launch_error : cudaStreamSynchronize(stream);
    EXPECT(e == cudaSuccess, "%s", cudaGetErrorString(e));
}

template <class T> inline T *device(size_t count)
{
    T *p = 0;
    cudaError_t e = cudaMalloc((void **)&p, count * sizeof(T));
    EXPECT(e == cudaSuccess, "%s", cudaGetErrorString(e));
    return p;
}
template <class T> inline T *device(const T *from, size_t count)
{
    T *p = device<T>(count);
    cudaMemcpyAsync(p, from, count * sizeof(T), cudaMemcpyHostToDevice, stream);
    return p;
}
template <class T> inline void fetch(T *to, const T *from, size_t count)
{
    cudaMemcpyAsync(to, from, count * sizeof(T), cudaMemcpyDeviceToHost, stream);
    finish();
}

/* A number of 7 significant bits: exact in bf16 and tf32, and so are products of two and their sums in float32. */
inline float random_float(void)
{
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (float)((int)(state >> 24) - 128) / 16.0f;
}

/* The bits of such a number in bf16. */
inline uint16_t bf16_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)(bits >> 16);
}

typedef struct test {
    const char *name;
    void (*run)(void);
} test;

/* Runs tests, and prints "ok NAME" or "FAILED NAME: why" for each. */
template <size_t N> void run_tests(const test (&tests)[N])
{
    for (const test &t : tests) {
        test_name = t.name;
        test_failed = false;
        t.run();
        failures += test_failed;
        if (!test_failed) printf("ok %s\n", t.name);
        fflush(stdout);
    }
}

/* The tests that only the emulator can pass (planted_errors.cu). */
void run_planted_errors(void);

#endif
