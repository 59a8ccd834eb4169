/* error.c: the text of a thread's last failure, and the words that such texts are made of. It needs nothing else of
 * core, so that everything may need it. */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "tensor.h"

static _Thread_local char error_text[1024];

const char *vx_error(void) { return error_text; }

int vx_fail(int status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(error_text, sizeof error_text, format, args);
    va_end(args);
    return status;
}

int vx_fail_because(int status, const char *format, ...)
{
    char reason[sizeof error_text];
    memcpy(reason, error_text, sizeof reason);
    va_list args;
    va_start(args, format);
    int used = vsnprintf(error_text, sizeof error_text, format, args);
    va_end(args);
    if (used >= 0 && (size_t)used < sizeof error_text)
        snprintf(error_text + used, sizeof error_text - (size_t)used, ": %s", reason);
    return status;
}

char *vx_shape_text(const vx_tensor *x, char *text, size_t size)
{
    if (!x) {
        snprintf(text, size, "(released)");
        return text;
    }
    size_t used = (size_t)snprintf(text, size, "(");
    for (int i = 0; i < x->ndim && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s%lld", i ? "," : "", (long long)x->shape[i]);
    if (used < size) snprintf(text + used, size - used, ")");
    return text;
}

const char *vx_dtype_name(int dtype)
{
    static const char *const names[] = {
#define VX_DTYPE(number, name, type, stored) name,
#include "dtypes.def"
#undef VX_DTYPE
    };
    return names[dtype];
}

const char *vx_dtypes(void)
{
    static char text[VX_DTYPES * 48];
#define VX_DTYPE(number, name, type, stored)                                                                           \
    snprintf(text + strlen(text), sizeof text - strlen(text), "%s\t%d\t%s\t%zu\t%s\n", name, VX_##number, #type,       \
             sizeof(type), stored);
    if (!*text) {
#include "dtypes.def"
    }
#undef VX_DTYPE
    return text;
}
