/* special.h: special functions, for the C and the CUDA kernels alike.
 *
 * The gamma function's logarithm and the derivatives of that, in double, for x > 0. f(x) is carried by its recurrence
 * to an argument of at least 10, where the asymptotic series (Bernoulli numbers; Abramowitz and Stegun 1964, 6.1.41,
 * 6.3.18, 6.4.12) has terms left out of 1e-16: relative error some 1e-15, and as much absolutely near the zeros (1 and
 * 2 of the logarithm, 1.4616 of digamma). At 0 the limit from above; below 0 NaN.
 */
#ifndef VX_SPECIAL_H
#define VX_SPECIAL_H

#include <math.h>

#include "common.h"

#define VX_SPECIAL_SHIFT 10.0

/* Returns ln gamma(x). */
VX_INLINE double special_lgamma(double x)
{
    if (!(x >= 0)) return NAN;
    double product = 1;
    for (; x < VX_SPECIAL_SHIFT; x += 1) product *= x;
    double r = 1 / x, s = r * r;
    double series =
        r * (1. / 12 - s * (1. / 360 - s * (1. / 1260 - s * (1. / 1680 - s * (1. / 1188 - s * (691. / 360360))))));
    return (x - 0.5) * (log(x) - 1) - 0.5 + 0.91893853320467274178 + series - log(product);
}

/* Returns d ln gamma / dx. */
VX_INLINE double special_digamma(double x)
{
    if (!(x >= 0)) return NAN;
    double below = 0;
    for (; x < VX_SPECIAL_SHIFT; x += 1) below += 1 / x;
    double r = 1 / x, s = r * r;
    double series =
        s * (1. / 12 - s * (1. / 120 - s * (1. / 252 - s * (1. / 240 - s * (1. / 132 - s * (691. / 32760 - s / 12))))));
    return log(x) - 0.5 * r - series - below;
}

/* Returns d digamma / dx. */
VX_INLINE double special_trigamma(double x)
{
    if (!(x >= 0)) return NAN;
    double below = 0;
    for (; x < VX_SPECIAL_SHIFT; x += 1) below += 1 / x / x;
    double r = 1 / x, s = r * r;
    double series =
        r * s *
        (1. / 6 - s * (1. / 30 - s * (1. / 42 - s * (1. / 30 - s * (5. / 66 - s * (691. / 2730 - s * 7 / 6))))));
    return r + 0.5 * s + series + below;
}

/* Returns d trigamma / dx. */
VX_INLINE double special_tetragamma(double x)
{
    if (!(x >= 0)) return NAN;
    double below = 0;
    for (; x < VX_SPECIAL_SHIFT; x += 1) below -= 2 / x / x / x;
    double r = 1 / x, s = r * r;
    double series =
        s * s * (1. / 2 - s * (1. / 6 - s * (1. / 6 - s * (3. / 10 - s * (5. / 6 - s * (691. / 210 - s * 35 / 2))))));
    return below - s - r * s - series;
}

/* Phi(-a) / e^(-a^2/2), the tail of a standard normal over its bell, for 0 <= a <= 14: a polynomial in t = 1 / (1 +
 * 0.26 a), a float or a vector of floats, fitted to 2.5e-8 of the value. */
#define SPECIAL_NORMAL_TAIL(t)                                                                                         \
    ((((((((((t)*0.03050520457f - 0.1528303027f) * (t) + 0.2514941990f) * (t)-0.1509521156f) * (t) + 0.1609499007f) *  \
             (t) +                                                                                                     \
         0.05102686211f) *                                                                                             \
            (t) +                                                                                                      \
        0.1030304507f) *                                                                                               \
           (t) +                                                                                                       \
       0.1030167267f) *                                                                                                \
          (t) +                                                                                                        \
      0.1037590578f) *                                                                                                 \
     (t))

#endif
