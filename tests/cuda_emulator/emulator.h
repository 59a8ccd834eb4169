/* emulator.h: what the files of the emulator share; cuda_runtime.h says what is imitated and how closely.
 *
 *   threads.cpp   the threads of a block as fibers; a kernel's run, block by block
 *   memory.cpp    device and pinned memory, its guards, and what is done about a fault
 *   streams.cpp   streams, events, graphs; launches
 *   runtime.cpp   devices, errors, settings
 *   cublas.cpp    the one product of cuBLAS that is used
 *
 * Requirements
 *   1. One host thread. Everything runs in calls that wait (emu_drain), on the caller's stack or on fibers that return
 *      to it.
 *   2. A kernel that fails is left where it stands: its fibers are dropped, never resumed. Kernels therefore own
 *      nothing.
 *   3. The library has no thread-local variable but shared memory (__shared__).
 */
#ifndef EMU_EMULATOR_H
#define EMU_EMULATOR_H

#include <cuda_runtime.h>

#if defined(__x86_64__)
#define EMU_OWN_SWITCH
#ifndef __SANITIZE_ADDRESS__
/* the fiber that faults is left by a jump of our own; AddressSanitizer has its own handler */
#define EMU_CATCHES_FAULTS
#endif
#endif

constexpr int EMU_PAGE = 4096, EMU_STACK = 64 << 10; /* of a thread */
constexpr int EMU_CANARY = 256; /* bytes around a block, and behind dynamic shared memory, whose change is noticed */
constexpr int EMU_MAX_SHARED = 163 << 10;

/* -- runtime.cpp --------------------------------------------------------------------------------------------------- */

extern int emu_current_device;
int64_t emu_setting(const char *name, int64_t otherwise); /* of the environment */
uint64_t emu_random(void);                                /* VERTEX_EMU_SEED chooses the sequence */

cudaError_t emu_result(cudaError_t e);      /* e, kept for cudaGetLastError */
cudaError_t emu_injected(const char *name); /* the error that VERTEX_EMU_ERROR wants of this function */
#define EMU_INJECT(name)                                                                                               \
    do {                                                                                                               \
        cudaError_t injected_ = emu_injected(name);                                                                    \
        if (injected_) return injected_;                                                                               \
    } while (0)

/* The first failure of a kernel, until emu_take_failure reports it: then cudaGetErrorString says its text. */
extern cudaError_t emu_failure;
void emu_note_failure(cudaError_t error, const char *text); /* names kernel, block and running thread */
cudaError_t emu_take_failure(void);

/* -- threads.cpp --------------------------------------------------------------------------------------------------- */

extern const char *emu_kernel_name; /* under way */
extern volatile bool emu_in_kernel;
void emu_run_kernel(const char *name, dim3 grid, dim3 block, size_t dynamic, const std::function<void()> &body);
bool emu_stack_overflowed(const char *p); /* p is in the guard of a fiber's stack */
#ifdef EMU_CATCHES_FAULTS
void emu_abandon_fiber(void *context); /* makes a signal handler return to the block's loop instead */
#endif

/* -- memory.cpp ---------------------------------------------------------------------------------------------------- */

/* Device memory can be touched only between these two, while queued work runs. */
void emu_open_memory(void);
void emu_close_memory(void);
void emu_check_canaries(void); /* notes writes past the ends of the blocks that were touched */

/* -- streams.cpp --------------------------------------------------------------------------------------------------- */

cudaError_t emu_drain_all(void); /* runs all queued work */
bool emu_is_capturing(cudaStream_t stream);
cudaError_t emu_forbidden_in_capture(bool relaxed_allows); /* an error while a stream records */

#endif
