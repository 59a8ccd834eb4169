/* constants.h: numbers that the kernels in C and in CUDA must agree on. */
#ifndef VX_CONSTANTS_H
#define VX_CONSTANTS_H

#define LOG2E 1.44269504088896341 /* log2(e) */
#define LN2 0.69314718055994531   /* ln(2) */
#define GUARD 1e-12               /* least norm that a row or a code is divided by */

#endif
