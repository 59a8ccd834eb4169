/* float64_check.c: how far results are from float64. Reads the inputs of a smoothed quantizer and results of it, and
 * prints a line for each: relative errors |x - exact| / |exact| and how many codes and neighbours differ.
 *
 *     cc -O3 -march=native -fopenmp float64_check.c -o exact -lm && ./exact N D M K SAMPLER REGULARIZER SEED STREAM
 * INPUTS RESULT
 * ...
 *
 * INPUTS holds z (N,D), codebook (M,D), dy (N,D), log_tau (1); RESULT y (N,D), dz (N,D), dcodebook (M,D), dlog_tau (1),
 * reg (1), near (M,K) int32, codes (N) int32: raw little-endian, float32 where nothing else is said. SAMPLER and
 * REGULARIZER are the numbers of core/vertex.h; K is 0 without neighbours.
 */
#include "kernels/lab/reference.h"

static char *read_file(const char *path, size_t bytes)
{
    char *data = take((int64_t)bytes, 1);
    FILE *f = fopen(path, "rb");
    size_t got = f ? fread(data, 1, bytes, f) : 0;
    if (f) fclose(f);
    if (got != bytes) {
        fprintf(stderr, "exact: %s has %zu of %zu bytes\n", path, got, bytes);
        exit(1);
    }
    return data;
}

int main(int argc, char **argv)
{
    if (argc < 11) {
        fprintf(stderr, "exact: see the head of float64_check.c for its arguments\n");
        return 2;
    }
    problem q = {.N = atoll(argv[1]),
                 .D = atoll(argv[2]),
                 .M = atoll(argv[3]),
                 .K = atoll(argv[4]),
                 .sampler = atoi(argv[5]),
                 .regularizer = atoi(argv[6]),
                 .seed = strtoull(argv[7], 0, 10),
                 .stream = strtoull(argv[8], 0, 10)};
    const int64_t rows = q.N * q.D, codes = q.M * q.D, pairs = q.M * q.K;
    const float *inputs = (const float *)read_file(argv[9], sizeof(float) * (size_t)(2 * rows + codes + 1));
    q.z = inputs, q.codebook = inputs + rows, q.dy = q.codebook + codes, q.log_tau = q.dy + rows;
    if (q.regularizer < 0) {
        for (int i = 10; i < argc; i++) {
            double gap;
            int64_t differ = assignments_differ(&q, (int32_t *)read_file(argv[i], 4 * (size_t)q.N), q.sampler, &gap);
            printf("codes %lld gap %.3g\n", (long long)differ, gap);
        }
        return 0;
    }
    solution s = new_solution(&q);
    reference_forward(&q, &s);
    int32_t *last = 0;
    for (int i = 10; i < argc; i++) {
        const float *y = (const float *)read_file(argv[i], 4 * (size_t)(2 * rows + codes + 2 + pairs + q.N)),
                    *dz = y + rows;
        const float *dcodebook = dz + rows, *dlog_tau = dcodebook + codes, *reg = dlog_tau + 1;
        int32_t *near = (int32_t *)(reg + 1), *code = near + pairs;
        if (!last || memcmp(last, near, sizeof(int32_t) * (size_t)pairs)) reference_backward(&q, &s, near);
        last = near;
        double gap;
        int64_t neighbours = neighbours_differ(&q, &s, near, &gap), differ = 0;
        for (int64_t n = 0; n < q.N; n++) differ += code[n] != s.codes[n];
        printf("quantized %.3g reg %.3g dz %.3g dcodebook %.3g dlog_tau %.3g codes %lld near %lld gap %.3g\n",
               relative_error(y, s.y, rows), relative_error(reg, &s.reg, 1), relative_error(dz, s.dz, rows),
               relative_error(dcodebook, s.dcodebook, codes), relative_error(dlog_tau, &s.dlog_tau, 1),
               (long long)differ, (long long)neighbours, gap);
    }
    return 0;
}
