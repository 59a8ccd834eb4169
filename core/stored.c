/* stored.c: numbers as files store them; see stored.h. */
#include "stored.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* -- One element --------------------------------------------------------------------------------------------------- */

#define STORED_VALUE(name, type)                                                                                       \
    static double name(const char *p)                                                                                  \
    {                                                                                                                  \
        type v;                                                                                                        \
        memcpy(&v, p, sizeof v);                                                                                       \
        return (double)v;                                                                                              \
    }

STORED_VALUE(f32_value, float)
STORED_VALUE(f64_value, double)
STORED_VALUE(i64_value, int64_t)
STORED_VALUE(i32_value, int32_t)
STORED_VALUE(i16_value, int16_t)
STORED_VALUE(i8_value, int8_t)
STORED_VALUE(u32_value, uint32_t)
STORED_VALUE(u16_value, uint16_t)
STORED_VALUE(u8_value, uint8_t)

static double bool_value(const char *p) { return *p != 0; }

static double f16_value(const char *p)
{
    uint16_t h;
    memcpy(&h, p, sizeof h);
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
    if (exponent == 31) bits = sign | 0x7F800000u | mantissa << 13;
    else if (exponent) bits = sign | (exponent + 112) << 23 | mantissa << 13;
    else {
        float f = (float)mantissa * 0x1p-24f;
        memcpy(&bits, &f, sizeof bits);
        bits |= sign;
    }
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static double bf16_value(const char *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static const vx_stored list[] = {
    {"F64", 8, VX_F32, false, f64_value},   {"F32", 4, VX_F32, true, f32_value},  {"F16", 2, VX_F32, false, f16_value},
    {"BF16", 2, VX_BF16, true, bf16_value}, {"I64", 8, VX_I32, false, i64_value}, {"I32", 4, VX_I32, true, i32_value},
    {"I16", 2, VX_I32, false, i16_value},   {"I8", 1, VX_I32, false, i8_value},   {"U32", 4, VX_I32, false, u32_value},
    {"U16", 2, VX_I32, false, u16_value},   {"U8", 1, VX_U8, true, u8_value},     {"BOOL", 1, VX_U8, false, bool_value},
};
enum { COUNT = sizeof list / sizeof *list };

const vx_stored *vx_stored_named(const char *op, const char *path, const char *format, bool *swapped)
{
    char known[160] = "";
    *swapped = format && *format == '>';
    for (int i = 0; i < COUNT; i++) {
        if (format && !strcmp(format + *swapped, list[i].name)) return &list[i];
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, " %s", list[i].name);
    }
    vx_fail(VX_EINVAL, "%s %s: dtype %s, expected one of%s", op, path, format ? format : "(none)", known);
    return NULL;
}

const char *vx_stored_dtypes(void)
{
    static char text[COUNT * 24];
    if (!*text) {
        size_t used = 0;
        for (int i = 0; i < COUNT; i++)
            used += (size_t)snprintf(text + used, sizeof text - used, "%s\t%d\t%s\n", list[i].name, list[i].bytes,
                                     vx_dtype_name(list[i].dtype));
    }
    return text;
}

/* -- Conversion ---------------------------------------------------------------------------------------------------- */

/* Writes value as an element of dtype; false where it lies outside the dtype's range (an infinity is in f32's). */
static bool store(int dtype, char *p, double value)
{
    if (dtype == VX_F32) {
        float v = (float)value;
        memcpy(p, &v, sizeof v);
        return !isinf(v) || isinf(value);
    }
    if (dtype == VX_I32) {
        if (!(value >= INT32_MIN && value <= INT32_MAX)) return false;
        int32_t v = (int32_t)value;
        memcpy(p, &v, sizeof v);
        return true;
    }
    if (dtype == VX_U8) {
        if (!(value >= 0 && value <= UINT8_MAX)) return false;
        *(uint8_t *)p = (uint8_t)value;
        return true;
    }
    float f = (float)value;
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    uint16_t v = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    memcpy(p, &v, sizeof v);
    return true;
}

int vx_stored_convert(const vx_stored *s, bool swapped, int dtype, void *to, const char *from, int64_t step,
                      int64_t count, int64_t first, const char *path)
{
    const size_t item = vx_dtype_bytes(dtype), bytes = (size_t)s->bytes;
    char *p = to;
    if (s->exact && s->dtype == dtype && !swapped) {
        if (step == s->bytes) memcpy(p, from, bytes * (size_t)count);
        else
            for (int64_t i = 0; i < count; i++) memcpy(p + (size_t)i * item, from + i * step, bytes);
        return VX_OK;
    }
    for (int64_t i = 0; i < count; i++) {
        const char *element = from + i * step;
        char turned[8];
        if (swapped) {
            for (size_t b = 0; b < bytes; b++) turned[b] = element[bytes - 1 - b];
            element = turned;
        }
        double value = s->value(element);
        if (!store(dtype, p + (size_t)i * item, value))
            return vx_fail(VX_EINVAL, "read %s: element %lld is %.17g (%s), which %s does not hold", path,
                           (long long)(first + i), value, s->name, vx_dtype_name(dtype));
    }
    return VX_OK;
}
