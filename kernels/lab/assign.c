/* assign.c: the nearest code of every row, from the plain loop to kernels/quantize/assign.c: argmin_m |z_n - q_m|^2,
 * ties to the lowest code. run.sh runs it.
 *
 * The lesson: a sum that waits for itself uses one part in 64 of the processor, and a sum that waits for the cache a
 * half. What is loaded must be used several times before it leaves the registers. And what need not be looked at costs
 * least of all.
 */
#include "lab.h"
#include "quantize/cells.h"

/* Step 1. The definition. A float32 sum may not be reordered, so the compiler has one chain of additions, each of which
 * takes 4 cycles and one lane; the peak is two vectors each cycle: 8 times the lanes. It takes half of that, since the
 * processor looks some 250 instructions ahead, into the next code's chain. */
static void plain_loop(const problem *q, results *r)
{
#pragma omp parallel for
    for (int64_t n = 0; n < q->N; n++) {
        float best = INFINITY;
        for (int64_t m = 0; m < q->M; m++) {
            float distance = 0;
            for (int64_t d = 0; d < q->D; d++) {
                float x = q->z[n * q->D + d] - q->codebook[m * q->D + d];
                distance += x * x;
            }
            if (distance < best) best = distance, r->codes[n] = (int32_t)m;
        }
    }
}

/* argmin |z - q|^2 = argmax <z, q> - |q|^2 / 2: one multiply-add per number in the place of a subtraction and a
 * multiply-add. Returns -|q|^2 / 2 of each code, where its score starts. */
static float *score_starts(const problem *q)
{
    float *start = floats(q->M);
    for (int64_t m = 0; m < q->M; m++) {
        const double norm = row_norm(q->codebook + m * q->D, q->D);
        start[m] = (float)(-0.5 * norm * norm);
    }
    return start;
}

static int32_t largest(const float *score, int64_t count)
{
    int32_t best = 0;
    float top = score[0];
    for (int64_t m = 1; m < count; m++)
        if (score[m] > top) top = score[m], best = (int32_t)m;
    return best;
}

/* Step 2. Codes transposed: M chains side by side, as whole vectors, and the compiler does the rest. One would think
 * that each multiply-add loads two vectors and stores one, at one store a cycle: 2 G. But scores and a column are 64
 * KB, twice the L1 cache, and three vectors travel between it and the L2 for each multiply-add, at one a cycle: 6 G.
 * Then one comparison per code, one after the other, each a cycle, in which 2 vectors of operations would pass: 2 lanes
 * O. */
static void transposed(const problem *q, results *r)
{
    float *columns = in_panels(q->codebook, q->M, q->D, q->M), *start = score_starts(q);
#pragma omp parallel
    {
        float *score = floats(q->M);
#pragma omp for
        for (int64_t n = 0; n < q->N; n++) {
            memcpy(score, start, sizeof(float) * (size_t)q->M);
            for (int64_t d = 0; d < q->D; d++) {
                const float x = q->z[n * q->D + d], *column = columns + d * q->M;
                for (int64_t m = 0; m < q->M; m++) score[m] += x * column[m];
            }
            r->codes[n] = largest(score, q->M);
        }
        free(score);
    }
    free(columns), free(start);
}

/* Step 3. Panels of 64 codes whose sums stay in registers, so that nothing is stored before it is done. Each
 * multiply-add still loads a vector of codes, and all codes (1 MB) come from the L3 cache for every row, 16 bytes a
 * cycle: lanes / 4 cycles for a vector, which is multiplied in half a cycle. */
static void panel_in_registers(const problem *q, results *r)
{
    float *columns = in_panels(q->codebook, q->M, q->D, PANEL), *start = score_starts(q);
#pragma omp parallel
    {
        float *score = floats(q->M);
#pragma omp for
        for (int64_t n = 0; n < q->N; n++) {
            for (int64_t m = 0; m < q->M; m += PANEL) {
                vf sum[VECTORS];
                for (int v = 0; v < VECTORS; v++) sum[v] = vf_load(start + m + v * VX_LANES);
                for (int64_t d = 0; d < q->D; d++)
                    for (int v = 0; v < VECTORS; v++)
                        sum[v] += q->z[n * q->D + d] * vf_load(columns + m * q->D + d * PANEL + v * VX_LANES);
                for (int v = 0; v < VECTORS; v++) vf_store(score + m + v * VX_LANES, sum[v]);
            }
            r->codes[n] = largest(score, q->M);
        }
        free(score);
    }
    free(columns), free(start);
}

enum { TILE_ROWS = 6, TILE_VECTORS = VX_LANES == 16 ? 4 : 2, WIDTH = TILE_VECTORS * VX_LANES };

/* Scores of 6 rows a (6,D) with the codes of 2 vectors (4 of 32 registers with AVX-512): 12 sums in registers, and 2
 * vectors and 6 numbers loaded for 12 multiply-adds. The processor loads two for every two that it multiplies, so loads
 * no longer bound it; and 12 independent sums are more than the 8 that cover a latency of 4 at 2 a cycle. */
VX_INLINE void register_tile(vf sum[TILE_ROWS][TILE_VECTORS], const float *start, const float *a, int64_t D,
                             const float *columns)
{
#pragma GCC unroll 6
    for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] = vf_load(start + v * VX_LANES);
    for (int64_t d = 0; d < D; d++) {
        vf column[TILE_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECTORS; v++) column[v] = vf_load(columns + d * WIDTH + v * VX_LANES);
#pragma GCC unroll 6
        for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 4
            for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] += a[i * D + d] * column[v];
    }
}

/* Step 4. The register tile. Its scores are stored and compared one by one, which takes a cycle a score, in which the
 * peak makes 2 lanes of multiply-adds: half of G at 8 lanes and D = 32. */
static void tiles(const problem *q, results *r)
{
    float *columns = in_panels(q->codebook, q->M, q->D, WIDTH), *start = score_starts(q);
#pragma omp parallel
    {
        float *score = floats(TILE_ROWS * q->M);
#pragma omp for
        for (int64_t n = 0; n < q->N; n += TILE_ROWS) {
            for (int64_t m = 0; m < q->M; m += WIDTH) {
                vf sum[TILE_ROWS][TILE_VECTORS];
                register_tile(sum, start + m, q->z + n * q->D, q->D, columns + m * q->D);
                for (int i = 0; i < TILE_ROWS; i++)
                    for (int v = 0; v < TILE_VECTORS; v++) vf_store(score + i * q->M + m + v * VX_LANES, sum[i][v]);
            }
            for (int i = 0; i < TILE_ROWS; i++) r->codes[n + i] = largest(score + i * q->M, q->M);
        }
        free(score);
    }
    free(columns), free(start);
}

/* The best score of a row in each lane, and its code. */
typedef struct champion {
    vf score;
    vi code;
} champion;

VX_INLINE void challenge(champion *best, vf sum[TILE_VECTORS], int64_t first_code)
{
    vi code;
    for (int l = 0; l < VX_LANES; l++) code[l] = (int32_t)first_code + l;
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECTORS; v++) {
        best->code = vi_where_greater(sum[v], best->score, code + v * VX_LANES, best->code);
        best->score = vf_max(sum[v], best->score);
    }
}

static int32_t winner(const champion *best)
{
    int at = 0;
    for (int l = 1; l < VX_LANES; l++)
        if (best->score[l] > best->score[at] || (best->score[l] == best->score[at] && best->code[l] < best->code[at]))
            at = l;
    return best->code[at];
}

/* A block of rows meets all codes: 6 rows at a time meet 2 vectors of codes. */
VX_INLINE void meet_codes(const int rows, const problem *q, results *r, const float *columns, const float *start,
                          int64_t n)
{
    champion best[rows];
    for (int i = 0; i < rows; i++) best[i] = (champion){vf_set1(-INFINITY), (vi){0}};
    for (int64_t m = 0; m < q->M; m += WIDTH)
        for (int i = 0; i < rows; i += TILE_ROWS) {
            vf sum[TILE_ROWS][TILE_VECTORS];
            register_tile(sum, start + m, q->z + (n + i) * q->D, q->D, columns + m * q->D);
#pragma GCC unroll 6
            for (int j = 0; j < TILE_ROWS; j++) challenge(best + i + j, sum[j], m);
        }
    for (int i = 0; i < rows; i++) r->codes[n + i] = winner(best + i);
}

/* Step 5. Every lane keeps the best of its own codes: a comparison, a choice and a maximum per vector of scores. They
 * pass where multiply-adds do: 3 O. Equal scores keep the first, and of equal lanes the lowest code wins, so ties still
 * go to the lowest. */
static void champions_in_lanes(const problem *q, results *r)
{
    float *columns = in_panels(q->codebook, q->M, q->D, WIDTH), *start = score_starts(q);
#pragma omp parallel for
    for (int64_t n = 0; n < q->N; n += TILE_ROWS) meet_codes(TILE_ROWS, q, r, columns, start, n);
    free(columns), free(start);
}

/* Step 6. 24 rows meet a pair of vectors while it is in the L1 cache: step 5 reads the codes (1 MB) from the L3 cache
 * once for every 6 rows, 2 KB every 200 cycles, and this step a fourth as often. No arithmetic is saved, so the
 * prediction is the same. */
static void blocks_of_rows(const problem *q, results *r)
{
    float *columns = in_panels(q->codebook, q->M, q->D, WIDTH), *start = score_starts(q);
#pragma omp parallel for
    for (int64_t n = 0; n < q->N; n += 4 * TILE_ROWS) meet_codes(4 * TILE_ROWS, q, r, columns, start, n);
    free(columns), free(start);
}

/* Scores of a row a (D) with a cell's 64 codes (D,64); keeps the best, the lowest code of equals. */
VX_INLINE void meet_cell(const code_cells *cells, const float *columns, const float *start, const float *a, int64_t D,
                         int64_t cell, float *best, int32_t *code)
{
    vf sum[CELL_VECTORS], top = vf_set1(-INFINITY);
    for (int v = 0; v < CELL_VECTORS; v++) {
        sum[v] = vf_load(start + cell * CELL + v * VX_LANES);
        for (int64_t d = 0; d < D; d++) sum[v] += a[d] * vf_load(columns + (cell * D + d) * CELL + v * VX_LANES);
        top = vf_max(top, sum[v]);
    }
    if (vf_maximum(top) < *best) return;
    for (int i = 0; i < CELL; i++) {
        const float x = sum[i / VX_LANES][i % VX_LANES];
        const int32_t m = cells->code[cell * CELL + i];
        if (x > *best || (x == *best && m < *code)) *best = x, *code = m;
    }
}

/* Puts the codes into cells and lays them out by cell. Returns them as columns (cells, D, 64), and where scores
 * start. */
static float *by_cells(const problem *q, code_cells *cells, scratch *memory, float **start)
{
    while (scratch_pass(memory)) carve_cells(memory, cells, q->M, q->D);
    fill_cells(cells, q->codebook);
    float *columns = floats(q->M * q->D), *natural = score_starts(q);
    *start = floats(q->M);
    for (int64_t i = 0; i < q->M; i++) {
        const int64_t m = cells->code[i];
        (*start)[i] = natural[m];
        for (int64_t d = 0; d < q->D; d++) columns[(i / CELL * q->D + d) * CELL + i % CELL] = q->codebook[m * q->D + d];
    }
    free(natural);
    return columns;
}

/* The square of the distance within which a code's score may be as large as `best`, with room for rounding: |z - q|^2
 * = |z|^2 - 2 score. The library's bound is derived; this one is wide enough for the lab's rows, of length 1 or so. */
static float reach_of(const problem *q, const float *a, float best) { return dot(a, a, q->D) - 2 * best + 1e-4f; }

/* Step 7. Codes near each other in cells of 64, each with its box (kernels/quantize/cells.h): a row looks at 128 boxes
 * instead of 8,192 codes, meets the cell of the nearest box, and then those whose boxes are not farther than what it
 * has found. A box costs 5 operations a dimension and 3 more where a code cost 3 G and 3 O: 18 operations for 64 codes,
 * 0.28 O, and 1 to 2 cells of 128 are met at the cost of step 4, 0.02 (G + O). */
static void boxes_of_cells(const problem *q, results *r)
{
    code_cells cells;
    scratch memory = {.op = "lab"};
    float *start, *columns = by_cells(q, &cells, &memory, &start);
#pragma omp parallel
    {
        float *squares = floats(cells.cell.padded);
#pragma omp for
        for (int64_t n = 0; n < q->N; n++) {
            const float *a = q->z + n * q->D;
            float best = -INFINITY;
            int32_t code = 0;
            const int64_t nearest = nearest_box(q->D, &cells.cell, 0, cells.cell.padded, a, squares);
            meet_cell(&cells, columns, start, a, q->D, nearest, &best, &code);
            for (int64_t i = 0; i < cells.cell.count; i++)
                if (i != nearest && squares[i] <= reach_of(q, a, best))
                    meet_cell(&cells, columns, start, a, q->D, i, &best, &code);
            r->codes[n] = code;
        }
        free(squares);
    }
    free(columns), free(start), scratch_free(&memory);
}

/* Step 8. kernels/quantize/assign.c, with its checks and its tails; where cells are no gain (at D = 32 these codes fill
 * the space, and every box is near every row) it is step 6 with an inner loop that is unrolled by four. Where they are,
 * boxes of 16 boxes each come first, so that of 128 boxes 8 and then 16 are looked at: 18 operations for 64 codes are
 * 18 for 340, 0.05 O, and what is left is the cells themselves, their making, and a row's own hundred operations, 0.02
 * O. */
static void library(const problem *q, results *r)
{
    vx_tensor *codes = tensor(VX_I32, q->N, 1, 0, 0), *z = tensor(VX_F32, q->N, 1, q->D, q->z);
    vx_tensor *codebook = tensor(VX_F32, 1, q->M, q->D, q->codebook);
    must(vx_assign(codes, z, codebook, VX_EUCLID));
    read_out(codes, r->codes), read_out(z, 0), read_out(codebook, 0);
}

static void prepare(const problem *q, solution *exact, results *r, double share[3])
{
    (void)q, (void)exact, (void)r, (void)share;
}

static double check(const problem *q, solution *exact, const results *r, char *text)
{
    double gap;
    (void)exact;
    int64_t differ = assignments_differ(q, r->codes, 0, &gap);
    return differ ? worse(gap, 1e-6, "near tie", 0, text) : 0;
}

static const step steps[] = {
    {"plain loop", plain_loop, .g = 8 * VX_LANES, .least = 1, .most = 1024},
    {"codes transposed", transposed, .g = 6, .o = 2 * VX_LANES, .least = 1, .most = 1024},
    {"sums in registers", panel_in_registers, .g = VX_LANES / 2, .o = 2 * VX_LANES, .least = 1, .most = 1024},
    {"register tile of 6 rows", tiles, .g = 1, .o = 2 * VX_LANES, .least = 1, .most = 1024},
    {"argmax in the lanes", champions_in_lanes, .g = 1, .o = 3, .least = 1, .most = 1024},
    {"24 rows a visit", blocks_of_rows, .g = 1, .o = 3, .least = 1, .most = 1024},
    {"boxes of cells", boxes_of_cells, .g = 0.02, .o = 0.3, .least = 1, .most = 8},
    {"the library", library, .g = 0.02, .o = 0.09, .least = 1, .most = 8},
    {"the library", library, .g = 1, .o = 3, .least = 9, .most = 1024},
};

int main(int argc, char **argv)
{
    static const lab l = {"Nearest code",     steps,         sizeof steps / sizeof *steps, .g = 1,
                          .prepare = prepare, .check = check};
    return run_lab(&l, argc, argv);
}
