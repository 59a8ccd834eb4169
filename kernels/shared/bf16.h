/* bf16.h: bfloat16, the upper half of a float32, stored as its 16 bits. simd.h and ptx.cuh round whole vectors in the
 * same way. */
#ifndef VX_BF16_H
#define VX_BF16_H

#include <string.h>

#include "common.h"

typedef uint16_t vx_bf16;

/* Returns x as a float, exactly. */
VX_INLINE float vx_from_bf16(vx_bf16 x)
{
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

/* Rounds x to nearest, ties to even. A NaN stays one: rounding could carry its payload away, so it is cut off and made
 * quiet. */
VX_INLINE vx_bf16 vx_to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return (vx_bf16)((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}

/* Rounds x once, although float32 lies between: the bits that float32 would round away become one sticky bit first. */
VX_INLINE vx_bf16 vx_bf16_from_i32(int32_t x)
{
    const int32_t sticky = (x & ~0xff) | ((x & 0xff) ? 0x80 : 0);
    return vx_to_bf16((float)(x >= 1 << 24 || x <= -(1 << 24) ? sticky : x));
}

#endif
