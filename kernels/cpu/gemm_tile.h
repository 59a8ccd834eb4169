/* gemm_tile.h: products in register tiles, which gemm.c provides and the convolutions share: at most GEMM_COLUMNS
 * columns of a matrix product, over any number of rows.
 *
 *   c[r][j] = alpha sum_s sum_p a[s][r row_stride + p k_stride] b[s][p b_stride + j]  + beta c[r][j] + bias[j]
 *
 * One of row_stride and k_stride is 1 (a as stored, or transposed); rows of a may overlap, which makes a convolution's
 * window over a row of pixels a plain operand. b is read in whole vectors: where columns is not a multiple of VX_LANES
 * it must be packed (gemm_pack) or otherwise readable to the next multiple. Sums run over s, then p, in order.
 *
 * Under vx_autocast, or where an operand is bf16, a and b are bf16 numbers: as they come, or rounded here.
 */
#ifndef VX_TILE_H
#define VX_TILE_H

#include "cpu.h"
#include "simd.h"

#if VX_LANES == 16
#define GEMM_VECTORS 4 /* 32 registers: 6 x 4 accumulators */
#else
#define GEMM_VECTORS 2 /* 16 registers: 6 x 2 */
#endif
#define GEMM_COLUMNS (GEMM_VECTORS * VX_LANES)

/* What a product's factors are: float32; float32 to be rounded to bf16; numbers that bf16 has. Sums are float32. */
enum { GEMM_F32 = 0, GEMM_TO_BF16, GEMM_BF16 };

/* Returns the factors of a product of float32 operands. */
static inline int gemm_factors(void) { return vx_bf16_products() ? GEMM_TO_BF16 : GEMM_F32; }

/* One product, in the letters of the banner. */
typedef struct gemm_product {
    int segments; /* 1 .. 3 */
    int64_t k;    /* of each segment */
    const float *a[3];
    int64_t row_stride, k_stride;
    const float *b[3];
    int64_t b_stride;
    float *c; /* not read where beta is 0 */
    int64_t c_stride;
    float alpha, beta;
    const float *addend; /* what beta multiplies, laid out as c; NULL: c itself */
    const float *bias;   /* may be NULL */
    int stream;          /* store past the caches (vf_streams); beta is 0 then */
    int factors;         /* GEMM_ */
    int in_l2;           /* 1: both operands are in L2 (a is read transposed): skip the prefetch */
    /* Where a is read as stored: memory to bring into the caches meanwhile, k floats for each of the rows; NULL: a's
     * own next rows. */
    const float *fetch;
} gemm_product;

/* Computes `rows` rows, any number, of columns <= GEMM_COLUMNS columns. */
void VX_CPU(gemm_multiply)(const gemm_product *q, int64_t rows, int columns);

/* Returns the vectors that so many columns need, GEMM_VECTORS at most. */
static inline int gemm_vectors(int64_t columns) { return (int)vx_ceil_div(vx_min64(columns, GEMM_COLUMNS), VX_LANES); }

/* Packs packed[p][j] = b[p k_stride + j column_stride] for p < k, columns filled up with zeros to whole vectors.
 * Returns packed's row length. */
int64_t VX_CPU(gemm_pack)(float *packed, const float *b, int64_t k, int columns, int64_t k_stride,
                          int64_t column_stride);

#endif
