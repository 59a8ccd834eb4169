/* frame.h: where codes and rows are compared by a product: near the origin, and of size 1.
 *
 * <z, q> - |q|^2 / 2 is the same as a distance only as long as |q| is not much larger than the distances are: codes far
 * from the origin cancel, and very large or small ones leave float32's range. So a group's codes, and the rows with
 * them, are moved and scaled first. Scale and grid are powers of two and the centre is a multiple of the grid, so that
 * nothing is rounded that was not before: codes around the origin keep every bit of their scores, small integers stay
 * integers.
 */
#ifndef VX_FRAME_H
#define VX_FRAME_H

#include <math.h>

#include "shared/common.h"

/* Rows whose largest coordinate in the frame exceeds this are compared in double: their products could overflow. */
#define FRAME_REACH 0x1p60f

/* Returns the grid for codes whose coordinates differ by 2 radius at most: the power of two above radius; 1 for
 * radius 0, and where it is not finite (a code is refused then). */
VX_INLINE double frame_grid(double radius)
{
    int exponent = 0;
    if (!(radius > 0 && radius < INFINITY)) return 1;
    frexp(radius, &exponent);
    return ldexp(1.0, exponent);
}

/* Returns the centre of a coordinate that lies in low .. high in all codes. */
VX_INLINE double frame_centre(float low, float high, double grid)
{
    const double middle = ((double)low + high) / 2;
    return middle - middle == 0 ? rint(middle / grid) * grid : 0;
}

/* Returns coordinate x in the frame; scale is 1 / grid. */
VX_INLINE float frame_of(float x, double centre, double scale) { return (float)((x - centre) * scale); }

/* Returns the power of two that rows are multiplied by before their differences are squared, where `largest` is their
 * largest coordinate: 1 unless squares could leave float32's range. */
VX_INLINE float frame_scale(float largest)
{
    if (largest <= 0x1p50f && largest >= 0x1p-30f) return 1;
    return (float)fmin(fmax(1 / frame_grid(largest), 0x1p-126), 0x1p126);
}

#endif
