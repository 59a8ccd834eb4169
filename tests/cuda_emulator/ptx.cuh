/* ptx.cuh: the functions of kernels/cuda/ptx.cuh, in software; see there what each does and how fragments lie. */
#ifndef VX_PTX_CUH
#define VX_PTX_CUH

#include <cuda_runtime.h>

static inline float emu_from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }

/* -- Tensor cores: exact products, summed in double and rounded once ----------------------------------------------- */

struct emu_product {
    float *d;
    const uint32_t *a, *b;
};

static inline void emu_mma(void *const *lanes, int k, float (*a_at)(void *const *, int, int),
                           float (*b_at)(void *const *, int, int))
{
    float result[16][8];
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) {
            const emu_product *owner = (const emu_product *)lanes[i % 8 * 4 + j / 2];
            double sum = owner->d[i / 8 * 2 + j % 2];
            for (int n = 0; n < k; n++) sum += (double)a_at(lanes, i, n) * b_at(lanes, n, j);
            result[i][j] = (float)sum;
        }
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) ((emu_product *)lanes[i % 8 * 4 + j / 2])->d[i / 8 * 2 + j % 2] = result[i][j];
}

static inline void vx_mma_bf16(float *d, const uint32_t *a, const uint32_t *b, EMU_HERE)
{
    emu_product p = {d, a, b};
    emu_warp(
        EMU_SITE("vx_mma_bf16"), ~0u,
        [](void *const *lanes) {
            emu_mma(
                lanes, 16,
                [](void *const *l, int i, int n) {
                    uint32_t two = ((const emu_product *)l[i % 8 * 4 + n % 8 / 2])->a[i / 8 + n / 8 * 2];
                    return emu_from_bf16(n % 2 ? two >> 16 : two & 0xffffu);
                },
                [](void *const *l, int n, int j) {
                    uint32_t two = ((const emu_product *)l[j * 4 + n % 8 / 2])->b[n / 8];
                    return emu_from_bf16(n % 2 ? two >> 16 : two & 0xffffu);
                });
        },
        &p);
}

/* The hardware reads the upper 19 bits. */
static inline float emu_tf32(uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }

static inline void vx_mma_tf32(float *d, const uint32_t *a, const uint32_t *b, EMU_HERE)
{
    emu_product p = {d, a, b};
    emu_warp(
        EMU_SITE("vx_mma_tf32"), ~0u,
        [](void *const *lanes) {
            emu_mma(
                lanes, 8,
                [](void *const *l, int i, int n) {
                    return emu_tf32(((const emu_product *)l[i % 8 * 4 + n % 4])->a[i / 8 + n / 4 * 2]);
                },
                [](void *const *l, int n, int j) {
                    return emu_tf32(((const emu_product *)l[j * 4 + n % 4])->b[n / 4]);
                });
        },
        &p);
}

struct emu_matrices {
    uint32_t *r;
    const void *row;
};

static inline void emu_load_matrices(emu_site site, uint32_t *r, const void *row, bool transposed)
{
    if ((uintptr_t)row % 16)
        emu_fail("%s: the address of a row is not aligned to 16 bytes (%s:%d)", site.what, site.file, site.line);
    emu_matrices m = {r, row};
    emu_together *plain = [](void *const *lanes) {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++)
                ((emu_matrices *)lanes[lane])->r[i] =
                    ((const uint32_t *)((emu_matrices *)lanes[i * 8 + lane / 4])->row)[lane % 4];
    };
    emu_together *other = [](void *const *lanes) {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                uint32_t low = ((const uint16_t *)((emu_matrices *)lanes[i * 8 + lane % 4 * 2])->row)[lane / 4];
                uint32_t high = ((const uint16_t *)((emu_matrices *)lanes[i * 8 + lane % 4 * 2 + 1])->row)[lane / 4];
                ((emu_matrices *)lanes[lane])->r[i] = low | high << 16;
            }
    };
    emu_warp(site, ~0u, transposed ? other : plain, &m);
}
static inline void vx_load_matrices(uint32_t *r, const void *row, EMU_HERE)
{
    emu_load_matrices(EMU_SITE("vx_load_matrices"), r, row, false);
}
static inline void vx_load_matrices_transposed(uint32_t *r, const void *row, EMU_HERE)
{
    emu_load_matrices(EMU_SITE("vx_load_matrices_transposed"), r, row, true);
}

/* -- Asynchronous copies: the target holds NaN until they are waited for ------------------------------------------- */

void emu_copy_async(void *to_shared, const void *from, bool valid);
void emu_copy_commit(void);
void emu_copy_wait(int pending);
static inline void vx_copy_async(void *to_shared, const void *from, bool valid)
{
    emu_copy_async(to_shared, from, valid);
}
static inline void vx_copy_commit(void) { emu_copy_commit(); }
static inline void vx_copy_wait(const int pending) { emu_copy_wait(pending); }

/* -- Conversions and fast functions -------------------------------------------------------------------------------- */

static inline float emu_flush(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }
static inline float vx_fast_exp2(float x) { return emu_flush(exp2f(emu_flush(x))); }
static inline float vx_fast_log2(float x) { return log2f(emu_flush(x)); }

/* As the hardware rounds, whose NaN has one form. */
static inline uint32_t emu_round_bf16(float x)
{
    uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
static inline uint32_t vx_pack_bf16(float low, float high) { return emu_round_bf16(high) << 16 | emu_round_bf16(low); }
static inline uint32_t vx_to_tf32(float x)
{
    uint32_t bits = __float_as_uint(x);
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

#endif
