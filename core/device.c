/* device.c: device numbers, and the backend behind each.
 *
 * A number is an index into `devices`, given out when a device is first opened (host.c) and never taken back; 0 is the
 * CPU.
 */
#include <stdio.h>
#include <string.h>

#include "internal.h"

typedef struct device {
    char name[40];
    const vx_backend *backend;
    int ordinal;
} device;

/* The CPU's backend stays NULL here: vx_backend_of(0) calls vx_cpu_backend(), which picks the SIMD variant on first
 * use, and vx_device_check() asks it whether it could. */
static device devices[VX_MAX_DEVICES] = {{.name = "cpu"}};
static int device_count = 1;

const vx_backend *vx_backend_of(int number, int *ordinal)
{
    *ordinal = devices[number].ordinal;
    return number ? devices[number].backend : vx_cpu_backend();
}

int vx_device_check(const char *op, int number)
{
    int open = __atomic_load_n(&device_count, __ATOMIC_ACQUIRE);
    if (number == 0) return vx_cpu_backend() ? VX_OK : VX_ENOSUP;
    if (number > 0 && number < open) return VX_OK;
    return vx_fail(VX_EINVAL, "%s: device number %d, expected one of the %d open devices", op, number, open);
}

bool vx_device_has(int number, unsigned capabilities)
{
    int ordinal;
    return (vx_backend_of(number, &ordinal)->can & capabilities) == capabilities;
}

int vx_device_find(const char *name)
{
    int open = __atomic_load_n(&device_count, __ATOMIC_ACQUIRE);
    for (int i = 0; i < open; i++)
        if (!strcmp(name, devices[i].name)) return i;
    return -1;
}

int vx_device_add(const char *name, const vx_backend *backend, int ordinal, int *number)
{
    int next = device_count;
    if (next == VX_MAX_DEVICES)
        return vx_fail(VX_ENOSUP, "device '%s': %d devices are open, no more fit", name, VX_MAX_DEVICES);
    device *d = &devices[next];
    *d = (device){.backend = backend, .ordinal = ordinal};
    snprintf(d->name, sizeof d->name, "%s", name);
    int status = backend->open ? backend->open(ordinal, next, name) : VX_OK;
    if (status) return status;
    *number = next;
    __atomic_store_n(&device_count, next + 1, __ATOMIC_RELEASE);
    return VX_OK;
}

/* -- Public -------------------------------------------------------------------------------------------------------- */

int vx_device_name(int number, char *name, size_t size)
{
    int status = vx_device_check("device name", number);
    if (!status) snprintf(name, size, "%s", devices[number].name);
    return status;
}

int vx_device_describe(int number, char *text, size_t size)
{
    int status = vx_device_check("device", number), ordinal;
    if (status) return status;
    const vx_backend *backend = vx_backend_of(number, &ordinal);
    return backend->describe(ordinal, text, size);
}

int vx_device_can(int number, const char *capability, int *can)
{
    static const struct {
        const char *name;
        unsigned bit;
    } capabilities[] = {
#define VX_CAPABILITY_ROW(bit, value, name) {name, VX_CAN_##bit},
        VX_CAPABILITIES(VX_CAPABILITY_ROW)
#undef VX_CAPABILITY_ROW
    };
    int status = vx_device_check("device can", number);
    if (status) return status;
    char known[128] = "";
    for (size_t i = 0, used = 0; i < sizeof capabilities / sizeof *capabilities; i++) {
        if (capability && !strcmp(capability, capabilities[i].name)) {
            *can = vx_device_has(number, capabilities[i].bit);
            return VX_OK;
        }
        used += (size_t)snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "", capabilities[i].name);
    }
    return vx_fail(VX_EINVAL, "device can: '%.40s', expected one of %s", capability ? capability : "", known);
}

int vx_sync(int number)
{
    int status = vx_device_check("sync", number), ordinal;
    if (status) return status;
    const vx_backend *backend = vx_backend_of(number, &ordinal);
    return backend->sync(ordinal);
}

int vx_threads(int n, int *now)
{
    if (n < 0 || n > 4096) return vx_fail(VX_EINVAL, "threads: %d, expected 1 .. 4096 (0 asks)", n);
    const vx_backend *cpu = vx_cpu_backend();
    if (!cpu) return VX_ENOSUP;
    int in_force = cpu->threads(n);
    if (now) *now = in_force;
    return VX_OK;
}
