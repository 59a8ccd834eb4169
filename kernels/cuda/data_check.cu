/* data_check.cu: faults in the data, which a kernel finds after its op has returned; cuda.cuh says how it reports one.
 *
 * The fault is one 64-bit word in device memory, all ones while there is none: the check's number in the upper 16 bits,
 * the index of the offending element below. vx_report keeps the first op's, and of one op's the lowest index. Every
 * wait copies the word to the host, looks the number up in the table here, and turns index and text into vx_error().
 */
#include "device.cuh"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { MOST_CHECKS = 4096 };

/* The checks that ops have asked for; equal ones share an entry. Once the table is full the oldest go: nothing
 * queued so long ago is still unreported. */
static struct {
    const char *op;
    int status;
    int64_t columns;
    bool recorded; /* in a graph, which may report it at any launch: this entry stays */
    char format[160];
} checks[MOST_CHECKS];
static int count, next;

vx_data_check vx_data_check_of(int status, int64_t columns, const char *format, ...)
{
    char text[sizeof checks[0].format];
    columns = vx_max64(1, columns);
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    int i = 0;
    while (i < count && (checks[i].op != vx_op() || checks[i].status != status || checks[i].columns != columns ||
                         strcmp(checks[i].format, text)))
        i++;
    if (i == count) {
        for (int tries = 0; tries < MOST_CHECKS && checks[next].recorded; tries++) next = (next + 1) % MOST_CHECKS;
        i = next;
        next = (next + 1) % MOST_CHECKS;
        if (count < MOST_CHECKS) count++;
        checks[i].op = vx_op(), checks[i].status = status, checks[i].columns = columns;
        snprintf(checks[i].format, sizeof checks[i].format, "%s", text);
    }
    if (current_op.d->recording) checks[i].recorded = true;
    return {current_op.d->fault, (unsigned long long)i};
}

int report_data_fault(device *d)
{
    const unsigned long long seen = *d->fault_seen;
    if (seen == ~0ull) return VX_OK;
    int status = VX_OK;
    TRY(cudaMemsetAsync(d->fault, 0xff, sizeof *d->fault, d->stream));
    *d->fault_seen = ~0ull;
    if (status) return status;
    const unsigned long long number = seen >> 48;
    const int64_t index = (int64_t)(seen & 0xffffffffffffull), columns = checks[number].columns;
    char text[512];
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    snprintf(text, sizeof text, checks[number].format, (long long)(index / columns), (long long)(index % columns));
#pragma GCC diagnostic pop
    return vx_fail(checks[number].status, "%s: %s", checks[number].op, text);
}
