/* runtime.cpp: the emulator's settings, failures, devices and error texts. */
#include <stdio.h>

#include "emulator.h"

int emu_current_device;

/* -- Settings ------------------------------------------------------------------------------------------------------ */

int64_t emu_setting(const char *name, int64_t otherwise)
{
    const char *text = getenv(name);
    return text && *text ? strtoll(text, 0, 10) : otherwise;
}

static uint64_t random_state;

uint64_t emu_random(void)
{
    if (!random_state) {
        const char *seed = getenv("VERTEX_EMU_SEED");
        random_state = (seed ? strtoull(seed, 0, 10) : 1) * 0x9E3779B97F4A7C15u | 1;
    }
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return random_state * 0x2545F4914F6CDD1Du >> 16;
}

/* -- Failures ------------------------------------------------------------------------------------------------------ */

cudaError_t emu_failure;
static char failure_text[1024], reported_text[1024];

void emu_note_failure(cudaError_t error, const char *text)
{
    if (emu_failure) return;
    emu_failure = error;
    size_t used = (size_t)snprintf(failure_text, sizeof failure_text, "kernel %s, block (%u,%u,%u)", emu_kernel_name,
                                   emu_block.x, emu_block.y, emu_block.z);
    if (emu_now)
        used += (size_t)snprintf(failure_text + used, sizeof failure_text - used, ", thread (%u,%u,%u)", threadIdx.x,
                                 threadIdx.y, threadIdx.z);
    snprintf(failure_text + used, sizeof failure_text - used, ": %s", text);
}

cudaError_t emu_take_failure(void)
{
    cudaError_t e = emu_failure;
    emu_failure = cudaSuccess;
    memcpy(reported_text, failure_text, sizeof reported_text);
    return e;
}

static cudaError_t last_error;

cudaError_t emu_result(cudaError_t e)
{
    if (e) last_error = e;
    return e;
}

cudaError_t emu_injected(const char *name)
{
    const char *wish = getenv("VERTEX_EMU_ERROR");
    size_t n = strlen(name);
    if (!wish || strncmp(wish, name, n) || wish[n] != ':') return cudaSuccess;
    return emu_result((cudaError_t)atoi(wish + n + 1));
}

/* -- Devices and errors -------------------------------------------------------------------------------------------- */

const char *cudaGetErrorString(cudaError_t e)
{
    switch (e) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInitializationError: return "initialization error";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorUnknown: return reported_text[0] ? reported_text : "unspecified launch failure";
    default: return "unrecognized error code";
    }
}
const char *cudaGetErrorName(cudaError_t) { return "cudaError"; }

cudaError_t cudaGetLastError(void)
{
    cudaError_t e = last_error;
    last_error = cudaSuccess;
    return e;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = (int)emu_setting("VERTEX_EMU_DRIVER", CUDART_VERSION);
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = 0;
    EMU_INJECT("cudaGetDeviceCount");
    *count = (int)emu_setting("VERTEX_EMU_DEVICES", 2);
    return *count ? cudaSuccess : emu_result(cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int device)
{
    EMU_INJECT("cudaSetDevice");
    int count;
    cudaGetDeviceCount(&count);
    if (device < 0 || device >= count) return emu_result(cudaErrorInvalidDevice);
    emu_current_device = device;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device)
{
    *device = emu_current_device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int)
{
    EMU_INJECT("cudaGetDeviceProperties");
    *p = {};
    snprintf(p->name, sizeof p->name, "emulated device");
    p->totalGlobalMem = (size_t)emu_setting("VERTEX_EMU_MEMORY", (int64_t)4 << 30);
    p->major = 8, p->minor = 0, p->multiProcessorCount = 4;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int)
{
    EMU_INJECT("cudaDeviceGetAttribute");
    *value = attribute == cudaDevAttrMultiProcessorCount      ? 4
             : attribute == cudaDevAttrComputeCapabilityMajor ? 8
             : attribute == cudaDevAttrComputeCapabilityMinor ? 0
                                                              : (int)EMU_MAX_SHARED;
    return cudaSuccess;
}
