/* common.h: the words that every kernel uses, in C, in C++ and on a CUDA device. */
#ifndef VX_COMMON_H
#define VX_COMMON_H

#include <stdint.h>

/* Before a function that is always inlined. */
#ifdef __CUDACC__
#define VX_INLINE static __host__ __device__ __forceinline__
#else
#define VX_INLINE static inline __attribute__((always_inline))
#endif

VX_INLINE int64_t vx_min64(int64_t a, int64_t b) { return a < b ? a : b; }
VX_INLINE int64_t vx_max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* Returns a / b, rounded up; a >= 0, b > 0. */
VX_INLINE int64_t vx_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#endif
