/* special.c: special.h for callers of the library, one number at a time. Compiled once, without vectors. */
#include "special.h"

#include "core/vertex.h"

double vx_lgamma(double x) { return special_lgamma(x); }
double vx_digamma(double x) { return special_digamma(x); }
double vx_trigamma(double x) { return special_trigamma(x); }
