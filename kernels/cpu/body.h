/* body.h: operands that a contract lets be f32 or bf16, read and written as float32, which is what kernels compute in:
 * a few rows at a time, where they lie if they are float32, else in a buffer that stays in the cache.
 */
#ifndef VX_BODY_H
#define VX_BODY_H

#include "cpu.h"
#include "shared/bf16.h"

typedef struct body {
    char *data; /* NULL where the operand is not there */
    int bf16;
} body;

static inline body body_of(const vx_tensor *x) { return (body){x ? x->data : 0, x && x->dtype == VX_BF16}; }

/* Returns the address of element i. */
static inline char *body_at(body x, int64_t i) { return x.data + i * (x.bf16 ? 2 : 4); }

/* Returns the floats that a buffer for `count` elements needs. */
static inline int64_t body_floats(body x, int64_t count) { return x.bf16 ? count : 0; }

/* Returns x rounded to bf16, in 32 bits throughout, which the compiler turns into fewer vector instructions. */
VX_INLINE float rounded_to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    bits = ((int32_t)(bits & 0x7fffffffu) > 0x7f800000 ? bits | 0x400000u : rounded) & 0xffff0000u;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Rounds numbers to bf16, in place. */
static inline void round_to_bf16(float *x, int64_t count)
{
    for (int64_t i = 0; i < count; i++) x[i] = rounded_to_bf16(x[i]);
}

/* Copies numbers rounded to bf16. */
static inline void copy_rounded(float *restrict to, const float *restrict from, int64_t count)
{
    for (int64_t i = 0; i < count; i++) to[i] = rounded_to_bf16(from[i]);
}

/* Copies elements first .. first + count - 1 to `to`, rounded to bf16 where that is wanted. */
static inline void body_copy(float *restrict to, body x, int64_t first, int64_t count, int rounded)
{
    const char *at = body_at(x, first);
    if (x.bf16) {
        const vx_bf16 *restrict from = (const vx_bf16 *)at;
        for (int64_t i = 0; i < count; i++) to[i] = vx_from_bf16(from[i]);
    } else if (rounded) copy_rounded(to, (const float *)at, count);
    else memcpy(to, at, sizeof(float) * (size_t)count);
}

/* Returns elements first .. first + count - 1: where they lie, or copied to buffer. */
static inline const float *body_read(body x, int64_t first, int64_t count, float *buffer)
{
    if (!x.bf16) return (const float *)body_at(x, first);
    body_copy(buffer, x, first, count, 0);
    return buffer;
}

/* Returns where to put elements from `first` on: where they belong, or buffer, from which body_write() takes them. */
static inline float *body_place(body x, int64_t first, float *buffer)
{
    return x.bf16 ? buffer : (float *)body_at(x, first);
}

/* Rounds what was put into buffer for elements first .. first + count - 1 to where they belong. */
static inline void body_write(body x, int64_t first, int64_t count, const float *restrict buffer)
{
    vx_bf16 *restrict to = (vx_bf16 *)body_at(x, first);
    if (x.bf16)
        for (int64_t i = 0; i < count; i++) to[i] = vx_to_bf16(buffer[i]);
}

#endif
