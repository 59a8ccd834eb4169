/* vec4.cuh: V neighbouring channels as one value: 4 where channels lie on multiples of 16 bytes, else 1. */
#ifndef VX_VEC4_CUH
#define VX_VEC4_CUH

#include "cuda.cuh"

template <int V> struct vec {
    float x[V];
};
template <int V> VX_DEVICE vec<V> load(const float *p)
{
    vec<V> r;
    if constexpr (V == 4) {
        const float4 q = *(const float4 *)p;
        r.x[0] = q.x, r.x[1] = q.y, r.x[2] = q.z, r.x[3] = q.w;
    } else r.x[0] = *p;
    return r;
}
template <int V> VX_DEVICE vec<V> load(const vx_bf16 *p)
{
    vec<V> r;
    if constexpr (V == 4) {
        const uint2 q = *(const uint2 *)p;
        r.x[0] = __uint_as_float(q.x << 16), r.x[1] = __uint_as_float(q.x & 0xffff0000u);
        r.x[2] = __uint_as_float(q.y << 16), r.x[3] = __uint_as_float(q.y & 0xffff0000u);
    } else r.x[0] = vx_from_bf16(*p);
    return r;
}
template <int V> VX_DEVICE void store(float *p, const vec<V> &r)
{
    if constexpr (V == 4) *(float4 *)p = make_float4(r.x[0], r.x[1], r.x[2], r.x[3]);
    else *p = r.x[0];
}
template <int V> VX_DEVICE void store(vx_bf16 *p, const vec<V> &r)
{
    if constexpr (V == 4)
        *(uint2 *)p = make_uint2(vx_to_bf16(r.x[0]) | (uint32_t)vx_to_bf16(r.x[1]) << 16,
                                 vx_to_bf16(r.x[2]) | (uint32_t)vx_to_bf16(r.x[3]) << 16);
    else *p = vx_to_bf16(r.x[0]);
}
template <int V> VX_DEVICE void multiply_add(vec<V> &sum, const vec<V> &a, const vec<V> &b)
{
#pragma unroll
    for (int v = 0; v < V; v++) sum.x[v] += a.x[v] * b.x[v];
}

#endif
