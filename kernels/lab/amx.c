/* amx.c: what products in AMX tiles are worth (kernels/cpu/amx.h): their error against float64 for each choice of
 * bfloat16 products, the bits of tiles and twin, and on a processor that has tiles the cycles of a product. run.sh runs
 * it with VERTEX_SIMD=amx or amxtwin.
 *
 * The prediction, from the cycles of TDPBF16PS (16.4 with its share of zeroing and storing, measured on a Xeon of the
 * Emerald Rapids kind) and two FMAs of 16 lanes a cycle: 16 x 16 products of D elements take
 *     FMA     256 D / 32               D = 32: 256 cycles     D = 256: 2048
 *     tiles   6 ceil(D / 32) 16.4      D = 32:  98            D = 256:  787
 * At D = 3 a step is filled to a tenth: tiles would take longer than FMA, so they begin at D = 32 (amx_steps). A fresh
 * factor (the weights; the backward pass's p, once, and x, as rows and as columns) is split by about 14 vector
 * operations a pair of vectors, 224 cycles for 16 x 64 values; powers and sums take about 450 forward, 900 backward. So
 * 16 rows and 64 codes take, the smaller figure where tiles and vectors overlap entirely, the larger where not at all,
 *                            FMA           tiles                      ratio
 *     forward   D = 32       2,500       790 ..  1,460         1.7 .. 3.2      2 products, 1 split
 *     backward  D = 32       6,000     1,970 ..  3,540         1.7 .. 3.0      5 products, 3 splits
 *     forward   D = 256     16,800     6,300 ..  7,000         2.4 .. 2.7
 *     backward  D = 256     41,900    15,700 .. 17,300         2.4 .. 2.7
 *
 * Outcome: the errors are in amx.h. The cycles have not been measured: no processor with AMX was at hand when this was
 * written.
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "cpu/amx.h"

enum { ROWS = 48, COLUMNS = 64 };

static int trials = 40;

static float a[ROWS * 1024], b[1024 * COLUMNS], s[ROWS * COLUMNS];
static uint32_t a_terms[ROWS * 1024 * 2], b_terms[COLUMNS * 1024 * 2];

static uint64_t state = 1;

/* Returns a number of a normal distribution's shape, from -6 to 6. */
static float draw(void)
{
    float sum = -6;
    for (int i = 0; i < 12; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        sum += (float)(state >> 40) * 0x1p-24f;
    }
    return sum;
}

/* Fills `count` vectors of D numbers, `step` apart, with directions. */
static void draw_directions(float *x, int64_t count, int64_t stride, int64_t D, int64_t step)
{
    for (int64_t i = 0; i < count; i++) {
        double square = 0;
        for (int64_t d = 0; d < D; d++) {
            const float y = x[i * stride + d * step] = draw();
            square += (double)y * y;
        }
        for (int64_t d = 0; d < D; d++) x[i * stride + d * step] /= (float)sqrt(square);
    }
}

/* Computes s = a b by the products listed, each a pair of terms, with the twin's arithmetic. */
static void some_products(int64_t steps, const int (*product)[2], int count)
{
    const unsigned denormals = vx_denormals_off();
    for (int64_t i = 0; i < ROWS / AMX_SIDE; i++)
        for (int64_t j = 0; j < COLUMNS / AMX_SIDE; j++) {
            float c[AMX_TILE] = {0};
            for (int64_t k = 0; k < steps; k++)
                for (int p = 0; p < count; p++)
                    amx_dot(c, a_terms + (i * steps + k) * AMX_STEP + product[p][0] * AMX_TILE,
                            b_terms + (j * steps + k) * AMX_STEP + product[p][1] * AMX_TILE);
            for (int r = 0; r < AMX_SIDE; r++)
                memcpy(s + (i * AMX_SIDE + r) * COLUMNS + j * AMX_SIDE, c + r * AMX_SIDE, sizeof(float) * AMX_SIDE);
        }
    vx_denormals_restore(denormals);
}

static void by_fma(int64_t D)
{
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < COLUMNS; v += VX_LANES) {
            vf sum = vf_zero();
            for (int64_t d = 0; d < D; d++) sum = vf_fma(vf_set1(a[i * D + d]), vf_load(b + d * COLUMNS + v), sum);
            vf_store(s + i * COLUMNS + v, sum);
        }
}

typedef struct error {
    double most, squares;
} error;

/* Adds the error of s against float64, in units of 2^-24. */
static void measure(error *e, int64_t D)
{
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLUMNS; j++) {
            double sum = 0;
            for (int64_t d = 0; d < D; d++) sum += (double)a[i * D + d] * b[d * COLUMNS + j];
            const double off = fabs(s[i * COLUMNS + j] - sum) * 0x1p24;
            e->most = fmax(e->most, off);
            e->squares += off * off;
        }
}

/* Returns how many of the tiles' outputs have other bits than the twin's, for numbers of all sizes. */
static int different_bits(int64_t D)
{
    static const int six[6][2] = {{0, 2}, {1, 1}, {2, 0}, {1, 0}, {0, 1}, {0, 0}};
    int different = 0;
    for (int trial = 0; trial < trials; trial++) {
        for (int64_t i = 0; i < ROWS * D; i++) a[i] = draw() * exp2f(trial % 4 ? 0 : 20 * draw());
        for (int64_t i = 0; i < COLUMNS * D; i++) b[i] = draw() * exp2f(trial % 4 ? 0 : 20 * draw());
        amx_split_rows(a_terms, a, D, ROWS, D);
        amx_split_columns(b_terms, b, COLUMNS, COLUMNS, D);
        float tiles[ROWS * COLUMNS];
        amx_product(0, tiles, COLUMNS, ROWS, COLUMNS, a_terms, b_terms, amx_steps(D));
        some_products(amx_steps(D), six, 6);
        for (int i = 0; i < ROWS * COLUMNS; i++) different += memcmp(&tiles[i], &s[i], sizeof(float)) != 0;
    }
    return different;
}

/* Returns the nanoseconds of 16 x 16 products. */
static double time_products(int64_t D)
{
    const int times = trials * 10;
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    for (int i = 0; i < times; i++) amx_product(0, s, COLUMNS, ROWS, COLUMNS, a_terms, b_terms, amx_steps(D));
    clock_gettime(CLOCK_MONOTONIC, &to);
    return ((double)(to.tv_sec - from.tv_sec) * 1e9 + (double)(to.tv_nsec - from.tv_nsec)) /
           (times * (ROWS / AMX_SIDE) * (COLUMNS / AMX_SIDE));
}

int main(int argc, char **argv)
{
    static const int three[3][2] = {{1, 0}, {0, 1}, {0, 0}},
                     six[6][2] = {{0, 2}, {1, 1}, {2, 0}, {1, 0}, {0, 1}, {0, 0}},
                     nine[9][2] = {{2, 2}, {1, 2}, {2, 1}, {0, 2}, {1, 1}, {2, 0}, {1, 0}, {0, 1}, {0, 0}};
    const int64_t widths[] = {32, 40, 64, 256, 1024};
    int wrong = 0;
    if (!VX_AMX) {
        puts("this variant has no AMX tiles: VERTEX_SIMD=amx or amxtwin");
        return 2;
    }
    puts("error of products of directions, in 2^-24: most, root of mean square");
    puts("    D            FMA       3 products       6 products       9 products   other bits   ns of 16 x 16");
    if (argc > 1 && !strcmp(argv[1], "quick")) trials = 2;
    amx_begin();
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
        const int64_t D = widths[w];
        error fma = {0}, few = {0}, chosen = {0}, all = {0};
        for (int trial = 0; trial < trials; trial++) {
            draw_directions(a, ROWS, D, D, 1);
            draw_directions(b, COLUMNS, 1, D, COLUMNS);
            amx_split_rows(a_terms, a, D, ROWS, D);
            amx_split_columns(b_terms, b, COLUMNS, COLUMNS, D);
            by_fma(D);
            measure(&fma, D);
            some_products(amx_steps(D), three, 3);
            measure(&few, D);
            some_products(amx_steps(D), six, 6);
            measure(&chosen, D);
            some_products(amx_steps(D), nine, 9);
            measure(&all, D);
        }
        const double count = (double)trials * ROWS * COLUMNS;
        const int different = different_bits(D);
        wrong += different || chosen.most > fma.most || chosen.squares > fma.squares;
        printf("%5d %8.2f %6.3f %8.2f %7.3f %8.2f %7.3f %8.2f %7.3f %12d %15.1f\n", (int)D, fma.most,
               sqrt(fma.squares / count), few.most, sqrt(few.squares / count), chosen.most,
               sqrt(chosen.squares / count), all.most, sqrt(all.squares / count), different, time_products(D));
    }
    amx_end();
    if (wrong) puts("FAILED: bits of the tiles that are not the twin's, or a larger error than that of FMA");
    return wrong != 0;
}
