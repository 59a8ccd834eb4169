/* lab.h: the frame of the lab's programs: the problem, the check against float64, the timing, the prediction.
 *
 * A program is a list of steps that all compute the same thing. Each step predicts its time before it is measured, as
 * an amount of work over ceilings that roofline.c measured on the same machine in the same run:
 *     G  one product of N x M x D multiply-adds at the peak      2 N M D / fma
 *     E  one power per element of the N x M that never exists    N M / exp2
 *     F  one comparison per element                              N M / compare
 *     O  one other vector operation per element                  N M / (fma / 2): as many of them pass as multiply-adds
 *     B  one byte per element to or from memory                  N M / copy
 * A prediction that fails teaches more than one that holds; the comment above a step says what was learned there, and
 * amd-epyc-avx2.txt is what run.sh printed. `bits` says whether one thread gives the same bits as all of them.
 *
 * Rows and codes are normal numbers and tau is 0.1, as training begins; or, late in training, rows lie near codes and
 * tau is given: then steps meet shares p, q and s of all pairs (late.h), which are counted before.
 *
 * Sizes are chosen so that nothing has a tail: N a multiple of 96, M of 64, and D of 8 or 3. The library's kernels
 * handle all others, and small temperatures, noise, groups and NaN besides.
 */
#ifndef VX_LAB_H
#define VX_LAB_H

#include <omp.h>

#include "shared/neighbours.h"
#include "quantize/smooth.h"
#include "reference.h"

typedef struct results {
    float *y, *lse, *dz, *dcodebook; /* (N,D), (N), (N,D), (M,D) */
    float reg, dlog_tau;
    int32_t *codes, *near; /* (N), (M,K) */
} results;

typedef struct step {
    const char *name;
    void (*run)(const problem *, results *);
    double g, e, f, o, b; /* the prediction, in units of G E F O B; */
    char share;           /* p, q or s: for that share of the pairs, */
    double fixed;         /* and so many O beside */
    int least, most;      /* row widths D that it is for */
    int when;             /* in training: EARLY or LATE */
} step;

enum { EARLY, LATE };

typedef struct lab {
    const char *title;
    const step *steps;
    int count;
    double g, e, f; /* the floor, in G E F; late, of the share s */
    /* float64, and what a backward pass is given; late in training (D = 3), p, q and s */
    void (*prepare)(const problem *, solution *, results *, double share[3]);
    double (*check)(const problem *, solution *, const results *,
                    char *); /* worst error over its tolerance; says what it was */
} lab;

/* -- Working memory ------------------------------------------------------------------------------------------------ */

/* Allocates floats that start at a cache line, not initialized. */
static inline float *floats(int64_t count)
{
    float *p = aligned_alloc(64, (size_t)((count * 4 + 63) / 64 * 64));
    if (!p) {
        fprintf(stderr, "no memory for %lld floats\n", (long long)count);
        exit(1);
    }
    return p;
}

static inline float *zeros(int64_t count) { return memset(floats(count), 0, sizeof(float) * (size_t)count); }

/* -- Layouts ------------------------------------------------------------------------------------------------------- */

/* Copies x (rows,D), each row divided by its length and multiplied by scale. */
static inline float *on_sphere(const float *x, int64_t rows, int64_t D, double scale)
{
    float *out = floats(rows * D);
#pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        const double factor = scale / fmax(row_norm(x + i * D, D), GUARD);
        for (int64_t d = 0; d < D; d++) out[i * D + d] = (float)(x[i * D + d] * factor);
    }
    return out;
}

/* Lays codes (M,D) out as (M / width, D, width): the same number of `width` codes side by side, for vectors that run
 * over codes. */
static inline float *in_panels(const float *codes, int64_t M, int64_t D, int64_t width)
{
    float *out = floats(M * D);
#pragma omp parallel for
    for (int64_t m = 0; m < M; m++)
        for (int64_t d = 0; d < D; d++) out[(m / width * D + d) * width + m % width] = codes[m * D + d];
    return out;
}

/* -- Neighbours ---------------------------------------------------------------------------------------------------- */

/* The K best rows of each code that one thread has met, and the key that the next must exceed. */
typedef struct lists {
    uint64_t *entries; /* (M,K) */
    float *least;      /* (M) */
} lists;

static inline lists new_lists(const problem *q)
{
    lists l = {take(q->M * q->K, sizeof(uint64_t)), floats(q->M)};
    for (int64_t j = 0; j < q->M * q->K; j++) l.entries[j] = neighbour_none();
    for (int64_t m = 0; m < q->M; m++) l.least[m] = -INFINITY;
    return l;
}

static inline void offer(const problem *q, lists *l, int64_t m, float key, int64_t row)
{
    l->least[m] = neighbour_insert(l->entries + m * q->K, q->K, neighbour_pack(key, row));
}

/* Merges the threads' lists into the first and frees the others. Entries are totally ordered, so that it does not
 * matter which thread met a row. */
static inline lists merge_lists(const problem *q, lists *all, int threads)
{
    for (int t = 1; t < threads; t++) {
        for (int64_t j = 0; j < q->M * q->K; j++)
            neighbour_insert(all[0].entries + j / q->K * q->K, q->K, all[t].entries[j]);
        free(all[t].entries), free(all[t].least);
    }
    return all[0];
}

/* Makes near and reg (knn-ce) of a list, whose keys are `unit` times natural logarithms; frees it. code (M): whose list
 * each is; NULL: as they come. */
static inline void finish_lists(const problem *q, results *r, lists l, const int32_t *code, double unit)
{
    double sum = 0;
    for (int64_t j = 0; j < q->M * q->K; j++) {
        const int64_t m = code ? code[j / q->K] : j / q->K;
        r->near[m * q->K + j % q->K] = (int32_t)neighbour_row(l.entries[j]);
        sum -= neighbour_key(l.entries[j]) / unit;
    }
    r->reg = (float)(sum / (double)(q->M * q->K));
    free(l.entries), free(l.least);
}

/* -- The library's own kernel as the last step --------------------------------------------------------------------- */

static inline void must(int status)
{
    if (status == VX_OK) return;
    fprintf(stderr, "%s\n", vx_error());
    exit(1);
}

/* Makes a tensor of these sizes (up to the first 0), filled from data unless that is NULL. */
static inline vx_tensor *tensor(int dtype, int64_t a, int64_t b, int64_t c, const void *data)
{
    vx_tensor *x;
    const int64_t shape[3] = {a, b, c};
    must(vx_new(&x, 0, dtype, c ? 3 : b ? 2 : 1, shape));
    if (data) must(vx_write(x, 0, vx_numel(x), data));
    return x;
}

/* Copies a tensor's elements out and lets go of it. */
static inline void read_out(vx_tensor *x, void *data)
{
    if (data) must(vx_read(x, 0, vx_numel(x), data));
    vx_free(x);
}

/* What scratch.h takes memory from; the library keeps its own to itself. */
void *vx_scratch(const char *op, size_t bytes)
{
    (void)op;
    return floats((int64_t)(bytes + 3) / 4);
}

void vx_scratch_free(void *p) { free(p); }

/* -- Problems ------------------------------------------------------------------------------------------------------ */

/* Draws normal numbers (Box and Muller), times scale. */
static inline float *normal(int64_t count, uint64_t stream, double scale)
{
    float *x = floats(count);
    for (int64_t i = 0; i < count; i++) {
        vx_philox4 draw = vx_philox(1, stream, (uint64_t)i);
        x[i] = (float)(scale * sqrt(-2 * log((double)vx_unit(draw.word[0]))) *
                       cos(2 * M_PI * (double)vx_unit(draw.word[1])));
    }
    return x;
}

/* Draws rows (N,D) near codes: one of the codes, off by normal numbers times 0.02. */
static inline float *rows_near_codes(const problem *q)
{
    float *z = normal(q->N * q->D, 1, 0.02);
    for (int64_t n = 0; n < q->N; n++) {
        const int64_t m = vx_philox(1, 4, (uint64_t)n).word[0] % (uint64_t)q->M;
        for (int64_t d = 0; d < q->D; d++) z[n * q->D + d] += q->codebook[m * q->D + d];
    }
    return z;
}

static inline double worse(double error, double tolerance, const char *what, double worst, char *text)
{
    if (!(error / tolerance > worst)) return worst; /* a NaN is worse */
    sprintf(text, "%s %.0e", what, error);
    return error / tolerance;
}

/* -- The program --------------------------------------------------------------------------------------------------- */

static inline double seconds(void) { return omp_get_wtime(); }

static inline int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* What a step's runs gave. */
enum { ROUNDS = 3, MOST_STEPS = 16, MOST_RUNS = 64 };

typedef struct outcome {
    double ms[MOST_RUNS]; /* of every run, ascending in the end */
    int runs, same;
    double worst;
    char text[64];
} outcome;

/* Times one round of a step: runs for 0.3 seconds; a slow step runs once, and in the first round only. */
static inline void time_step(const step *s, const problem *q, results *r, outcome *o, int round)
{
    if (round > 0 && o->ms[0] > 500) return;
    double start = seconds();
    do {
        double before = seconds();
        s->run(q, r);
        o->ms[o->runs++] = (seconds() - before) * 1e3;
    } while (o->runs < MOST_RUNS * (round + 1) / ROUNDS && seconds() - start < 0.3);
}

/* Takes the best of what `roof` measures and what was measured before: fma, exp2, compare, read, copy. */
static inline void measure_ceilings(const char *roof, double ceiling[5])
{
    char command[4096], name[32];
    snprintf(command, sizeof command, "'%s' %d", roof, omp_get_max_threads());
    FILE *f = popen(command, "r");
    double value;
    for (int i = 0; f && i < 5 && fscanf(f, "%31s %lf %*s", name, &value) == 2; i++)
        ceiling[i] = fmax(ceiling[i], value);
    if (!f || pclose(f) || !(ceiling[4] > 0)) {
        fprintf(stderr, "%s did not print its five ceilings\n", roof);
        exit(1);
    }
}

/* Adds up the bits of all results, in a way that their order matters. */
static inline uint64_t bits_of(const problem *q, const results *r)
{
    const struct {
        const void *data;
        int64_t count;
    } part[] = {{r->y, q->N * q->D}, {r->lse, q->N},    {r->dz, q->N * q->D}, {r->dcodebook, q->M * q->D},
                {&r->reg, 1},        {&r->dlog_tau, 1}, {r->codes, q->N},     {r->near, q->M * q->K}};
    uint64_t sum = 0;
    for (int p = 0; p < 8; p++)
        for (int64_t i = 0; i < part[p].count; i++)
            sum = (sum ^ ((const uint32_t *)part[p].data)[i]) * 0x100000001b3u + 1;
    return sum;
}

/* Says whether one thread gives the same bits as all of them. */
static inline int same_bits(const step *s, const problem *q, results *r)
{
    const int threads = omp_get_max_threads();
    const uint64_t bits = bits_of(q, r);
    omp_set_num_threads(1);
    s->run(q, r);
    omp_set_num_threads(threads);
    return bits == bits_of(q, r);
}

static inline void print_terms(const step *s)
{
    const struct {
        double amount;
        const char *unit;
    } term[] = {{s->g, "G"}, {s->e, "E"}, {s->f, "F"}, {s->o, "O"}, {s->b, "B"}};
    const char *between = "";
    printf("= ");
    if (s->share) printf("%c (", s->share);
    for (int i = 0; i < 5; i++)
        if (term[i].amount > 0) {
            if (term[i].amount == 1) printf("%s%s", between, term[i].unit);
            else printf("%s%g %s", between, term[i].amount, term[i].unit);
            between = " + ";
        }
    if (s->share) printf(")");
    if (s->fixed > 0) printf(" + %g O", s->fixed);
}

/* Runs ./program N D M K [late TAU] [ROOF]; 0 where every step agrees with float64. ROOF is roofline.c's program;
 * without it nothing is timed. Times are taken in rounds, ceilings and steps in turn, so that other work on the machine
 * slows all of them alike. */
static inline int run_lab(const lab *l, int argc, char **argv)
{
    if (argc < 5) {
        fprintf(stderr, "%s: run.sh says how these programs are compiled and started\n", argv[0]);
        return 2;
    }
    problem q = {
        .N = atoll(argv[1]), .D = atoll(argv[2]), .M = atoll(argv[3]), .K = atoll(argv[4]), .regularizer = REG_KNN_CE};
    const int when = argc > 6 && !strcmp(argv[5], "late") ? LATE : EARLY, next = when == LATE ? 7 : 5;
    const char *roof = argc > next ? argv[next] : 0;
    const float tau = when == LATE ? strtof(argv[6], 0) : 0.1f, log_tau = logf(tau);
    static outcome outcomes[MOST_STEPS];
    double ceiling[5] = {0}, share[3] = {1, 1, 1};
    int failed = 0;
    q.codebook = normal(q.M * q.D, 2, 1), q.dy = normal(q.N * q.D, 3, 1.0 / (double)q.N);
    q.z = when == LATE ? rows_near_codes(&q) : normal(q.N * q.D, 1, 1);
    q.log_tau = &log_tau;
    solution exact = new_solution(&q);
    results r = {.y = zeros(q.N * q.D), .lse = zeros(q.N), .dz = zeros(q.N * q.D), .dcodebook = zeros(q.M * q.D)};
    r.codes = take(q.N, sizeof(int32_t)), r.near = take(q.M * q.K, sizeof(int32_t));
    l->prepare(&q, &exact, &r, share);
    for (int round = 0; round < (roof ? ROUNDS : 1); round++) {
        if (roof) measure_ceilings(roof, ceiling);
        for (int i = 0; i < l->count; i++) {
            outcome *o = outcomes + i;
            if (q.D < l->steps[i].least || q.D > l->steps[i].most || l->steps[i].when != when) continue;
            time_step(l->steps + i, &q, &r, o, round);
            if (round > 0) continue;
            strcpy(o->text, "none");
            o->worst = l->check(&q, &exact, &r, o->text);
            o->same = same_bits(l->steps + i, &q, &r);
        }
    }
    const double NM = (double)(q.N * q.M) * 1e-6, G = 2 * (double)q.D * NM / ceiling[0], E = NM / ceiling[1],
                 F = NM / ceiling[2], O = 2 * NM / ceiling[0], B = NM / ceiling[4],
                 floor = share[2] * (l->g * G + l->e * E + l->f * F);
    printf("\n%s: N %lld, D %lld, M %lld, K %lld, %d threads\n", l->title, (long long)q.N, (long long)q.D,
           (long long)q.M, (long long)q.K, omp_get_max_threads());
    if (when == LATE)
        printf("rows near codes, tau %g: p %.3f, q %.3f, s %.3f\n", (double)tau, share[0], share[1], share[2]);
    if (roof) {
        printf("fma %.1f GFLOP/s, exp2 %.2f G/s, compare %.2f G/s, copy %.1f GB/s\n", ceiling[0], ceiling[1],
               ceiling[2], ceiling[4]);
        printf("G %.2f ms, E %.2f, F %.2f, O %.2f, B %.2f; floor %.1f ms\n", G, E, F, O, B, floor);
        printf("   step                          least   median  predicted  of floor  worst error     bits    "
               "prediction\n");
    }
    for (int i = 0, number = 0; i < l->count; i++) {
        const step *s = l->steps + i;
        outcome *o = outcomes + i;
        number += i == 0 || s->run != s[-1].run; /* one step, predicted for several problems */
        if (o->runs == 0) continue;
        qsort(o->ms, (size_t)o->runs, sizeof *o->ms, ascending);
        failed |= !(o->worst <= 1);
        printf("%2d %-24s", number, s->name);
        const double of = s->share ? share[s->share == 's' ? 2 : s->share - 'p'] : 1,
                     predicted = of * (s->g * G + s->e * E + s->f * F + s->o * O + s->b * B) + s->fixed * O;
        if (roof)
            printf(" %9.1f %8.1f %10.1f %7.0f %%", o->ms[0], o->ms[o->runs / 2], predicted, 100 * floor / o->ms[0]);
        printf("  %s%-15s %-7s", o->worst <= 1 ? "" : "FAILED: ", o->text, o->same ? "same" : "differ");
        if (roof) print_terms(s);
        printf("\n");
    }
    return failed;
}

#endif
