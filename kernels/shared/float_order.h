/* float_order.h: floats as unsigned numbers of the same order, so that a float and an index pack into one integer key
 * whose least or largest value is the answer, ties included.
 */
#ifndef VX_FLOAT_ORDER_H
#define VX_FLOAT_ORDER_H

#include <string.h>

#include "common.h"

/* Returns x's bits as an unsigned number of the same order: -NaN < -inf < ... < inf < NaN. */
VX_INLINE uint32_t float_order(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

/* Returns the float that float_order made `order` of. */
VX_INLINE float float_of_order(uint32_t order)
{
    const uint32_t bits = order ^ (order >> 31 ? 0x80000000u : 0xffffffffu);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

#endif
