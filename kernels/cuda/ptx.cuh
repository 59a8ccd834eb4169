/* ptx.cuh: the instructions that CUDA C++ has no name for, as small functions: asynchronous copies, tensor-core
 * products, fast exponentials. Included as <ptx.cuh>, so that another implementation of the same names may stand before
 * it on the include path.
 *
 * Fragments, in the words of the PTX ISA (sections on mma.m16n8k16 and mma.m16n8k8). For lane l let r = l / 4 and c = 2
 * (l % 4). A register of bf16 holds two, along k, the lower index in the lower half:
 *   d (16 x 8, f32)     d[0] (r, c)      d[1] (r, c + 1)      d[2] (r + 8, c)      d[3] (r + 8, c + 1)
 *   bf16 a (16 x 16)    a[0] (r, c..)    a[1] (r + 8, c..)    a[2] (r, c + 8..)    a[3] (r + 8, c + 8..)
 *   bf16 b (16 x 8)     b[0] (c.., r)    b[1] (c + 8.., r)
 *   tf32 a (16 x 8)     a[0] (r, l % 4)  a[1] (r + 8, l % 4)  a[2] (r, l % 4 + 4)  a[3] (r + 8, l % 4 + 4)
 *   tf32 b (8 x 8)      b[0] (l % 4, r)  b[1] (l % 4 + 4, r)
 */
#ifndef VX_PTX_CUH
#define VX_PTX_CUH

#include <cuda_runtime.h>
#include <stdint.h>

#define VX_PTX static __device__ __forceinline__

/* -- Tensor cores: d += a b, all lanes of the warp together -------------------------------------------------------- */

VX_PTX void vx_mma_bf16(float *d, const uint32_t *a, const uint32_t *b)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* The same for a and b as vx_to_tf32 gives them. */
VX_PTX void vx_mma_tf32(float *d, const uint32_t *a, const uint32_t *b)
{
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Loads four 8 x 8 matrices of 16-bit elements from shared memory. Lane l gives the address of row l % 8 of matrix l
 * / 8 (16 bytes, aligned to 16); r[m] receives elements (l / 4, 2 (l % 4)) and the next of matrix m, or of its
 * transpose. */
VX_PTX void vx_load_matrices(uint32_t *r, const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}
VX_PTX void vx_load_matrices_transposed(uint32_t *r, const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}

/* -- Asynchronous copies from global to shared memory -------------------------------------------------------------- */

/* Begins to copy 16 bytes, both addresses aligned to 16; where `valid` is false zeros, and `from` is not read. They are
 * there for this thread after vx_copy_wait, for others after a barrier behind that. */
VX_PTX void vx_copy_async(void *to_shared, const void *from, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to_shared)),
                 "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
/* Ends a group of copies. */
VX_PTX void vx_copy_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Waits until at most `pending` (a constant, 0 to 7) of this thread's groups are under way. */
VX_PTX void vx_copy_wait(const int pending)
{
    switch (pending) {
    case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    case 4: asm volatile("cp.async.wait_group 4;" ::: "memory"); break;
    case 5: asm volatile("cp.async.wait_group 5;" ::: "memory"); break;
    case 6: asm volatile("cp.async.wait_group 6;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 7;" ::: "memory"); break;
    }
}

/* -- Conversions and fast functions -------------------------------------------------------------------------------- */

/* Return 2^x to 2 ulp, subnormal inputs and results being 0; and log2 x to 2^-22, relative, or absolute near 1. */
VX_PTX float vx_fast_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
VX_PTX float vx_fast_log2(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Rounds two numbers to bf16 in one register, `low` in the lower half; to nearest, ties to even. */
VX_PTX uint32_t vx_pack_bf16(float low, float high)
{
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

/* Returns the bits of x rounded to tf32 (10 bits of fraction), ties away from 0. */
VX_PTX uint32_t vx_to_tf32(float x)
{
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

#endif
