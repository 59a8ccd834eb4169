/* dropout.h: from a probability to what a random word is compared with; for C and CUDA alike. */
#ifndef VX_DROPOUT_H
#define VX_DROPOUT_H

#include <stdint.h>

typedef struct dropout_rule {
    uint32_t threshold; /* an element stays where its word is at least this */
    float scale;        /* of what stays */
    int all;            /* p is 1: nothing stays */
} dropout_rule;

static inline dropout_rule dropout_rule_of(float p)
{
    const double cells = 4294967296.0 * (double)p;
    const dropout_rule d = {p < 1 ? (uint32_t)cells : 0, p < 1 ? (float)(1 / (1 - (double)p)) : 0, p >= 1};
    return d;
}

#endif
