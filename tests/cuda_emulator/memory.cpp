/* memory.cpp: device memory between guard pages, pinned memory, copies; and what a fault means. */
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include <ucontext.h>

#include "emulator.h"

constexpr int GUARD = 64 << 10;  /* bytes on both sides of a block that may not be touched */
constexpr int QUARANTINE = 256;  /* freed blocks whose addresses stay forbidden */
constexpr size_t MOST_OPEN = 64; /* blocks that the next kernel finds open */

/* -- Blocks -------------------------------------------------------------------------------------------------------- */

struct allocation {
    size_t bytes;
    int device;
    char *mapped, *usable; /* with the guards; without them */
    size_t mapped_bytes, usable_bytes;
    bool open;
};

static std::map<char *, allocation> device_blocks;
static std::deque<std::pair<char *, allocation>> freed; /* their addresses stay forbidden for a while */
static std::map<char *, size_t> pinned_blocks;
static std::map<int, int64_t> device_bytes;

/* The device block that holds p, or NULL. */
static const std::pair<char *const, allocation> *block_of(const void *p)
{
    auto i = device_blocks.upper_bound((char *)p);
    if (i == device_blocks.begin()) return 0;
    --i;
    return (char *)p < i->first + std::max<size_t>(i->second.bytes, 1) ? &*i : 0;
}

static const uint32_t canary_word = 0x7fa5a5a5u; /* a NaN */

static void fill_canary(char *from, char *to)
{
    for (char *p = from; p < to; p++) *p = ((const char *)&canary_word)[(uintptr_t)p % 4];
}
/* Compares at most EMU_CANARY bytes with what fill_canary() writes there. */
static bool canary_intact(const char *from, const char *to)
{
    alignas(4) static char filled[EMU_CANARY + 4];
    if (!filled[0]) fill_canary(filled, filled + sizeof filled);
    return memcmp(from, filled + (uintptr_t)from % 4, (size_t)(to - from)) == 0;
}

/* While queued work runs a block is opened by its first touch, which faults, and closed again when the host goes on: so
 * many and large blocks cost nothing while they lie idle. */
static bool open_to_work;
static std::vector<char *> open_blocks;

#ifdef EMU_CATCHES_FAULTS
static bool open_block(const char *p)
{
    auto i = device_blocks.upper_bound((char *)p +
                                       EMU_PAGE); /* p may lie before the start, among the bytes that are checked */
    for (int n = 0; n < 2 && i != device_blocks.begin(); n++) {
        allocation &a = (--i)->second;
        if (p < a.usable || p >= a.usable + a.usable_bytes || a.open) continue;
        mprotect(a.usable, a.usable_bytes, PROT_READ | PROT_WRITE);
        a.open = true;
        open_blocks.push_back(i->first);
        return true;
    }
    return false;
}
#endif

void emu_open_memory(void) { open_to_work = true; }

static void close_blocks(void)
{
    for (char *p : open_blocks) {
        auto i = device_blocks.find(p);
        if (i == device_blocks.end()) continue;
        mprotect(i->second.usable, i->second.usable_bytes, PROT_NONE);
        i->second.open = false;
    }
    open_blocks.clear();
}

void emu_close_memory(void)
{
    open_to_work = false;
    close_blocks();
}

/* NaN all over; of a very large block, whose pages would have to be found for that, at both ends. */
static void fill_unset(char *start, size_t bytes)
{
    const size_t most = 64 << 20, ends = 64 << 10;
    memset(start, 0xff, bytes <= most ? bytes : ends);
    if (bytes > most) memset(start + bytes - ends, 0xff, ends);
}

void emu_check_canaries(void)
{
    for (char *start : open_blocks) {
        const allocation &a = device_blocks.find(start)->second;
        char *end = start + a.bytes, *low = std::max(a.usable, start - EMU_CANARY),
             *high = std::min(a.usable + a.usable_bytes, end + EMU_CANARY);
        bool before = canary_intact(low, start), behind = canary_intact(end, high);
        if (before && behind) continue;
        char text[200];
        snprintf(text, sizeof text, "wrote %s a block of %zu bytes of device memory",
                 before ? "past the end of" : "before the start of", a.bytes);
        emu_now = 0;
        emu_note_failure(cudaErrorIllegalAddress, text);
        fill_canary(low, start);
        fill_canary(end, high);
    }
    if (open_blocks.size() > MOST_OPEN) close_blocks(); /* thousands would be looked at again after every kernel */
}

/* -- Faults -------------------------------------------------------------------------------------------------------- */

#ifdef EMU_CATCHES_FAULTS
static struct sigaction before_segv, before_bus, before_ill;

static void describe_address(const char *p, char *text, size_t size)
{
    if (emu_stack_overflowed(p)) {
        snprintf(text, size, "a thread's stack of %d bytes overflowed", EMU_STACK);
        return;
    }
    for (const auto &f : freed)
        if (p >= f.first && p < f.first + f.second.bytes) {
            snprintf(text, size, "uses a block of %zu bytes that was freed, at byte %td", f.second.bytes, p - f.first);
            return;
        }
    for (const auto &b : device_blocks) {
        const allocation &a = b.second;
        if (p < a.mapped || p >= a.mapped + a.mapped_bytes) continue;
        if (p < b.first)
            snprintf(text, size, "out of bounds: %td bytes before the start of a block of %zu bytes", b.first - p,
                     a.bytes);
        else snprintf(text, size, "out of bounds: at byte %td of a block of %zu bytes", p - b.first, a.bytes);
        return;
    }
    snprintf(text, size, "out of bounds: address %p belongs to no block", (const void *)p);
}

/* "libvertex_emu.so+0x1234", for addr2line. */
static void describe_place(const void *ip, char *text, size_t size)
{
    Dl_info info = {};
    dladdr(ip, &info);
    const char *slash = info.dli_fname ? strrchr(info.dli_fname, '/') : 0;
    snprintf(text, size, "%s+%#tx", slash ? slash + 1 : "?", (const char *)ip - (const char *)info.dli_fbase);
}

static void on_fault(int number, siginfo_t *info, void *raw)
{
    ucontext_t *u = (ucontext_t *)raw;
    char text[512], place[200], what[200];
    const void *ip = (const void *)u->uc_mcontext.gregs[REG_RIP];
    if (open_to_work && number == SIGSEGV && open_block((const char *)info->si_addr)) return;
    if (emu_in_kernel && emu_now) {
        describe_place(ip, place, sizeof place);
        if (number == SIGILL)
            snprintf(what, sizeof what, "a misaligned access, or an index outside an array of fixed size");
        else describe_address((const char *)info->si_addr, what, sizeof what);
        snprintf(text, sizeof text, "%s (at %s)", what, place);
        emu_note_failure(number == SIGILL ? cudaErrorMisalignedAddress : cudaErrorIllegalAddress, text);
        emu_abandon_fiber(raw);
        return;
    }
    if (number == SIGSEGV && block_of(info->si_addr)) {
        describe_place(ip, place, sizeof place);
        int n = snprintf(text, sizeof text, "emulator: host code at %s touches device memory\n", place);
        if (write(2, text, (size_t)n) < 0) _exit(139);
    }
    struct sigaction *before = number == SIGSEGV ? &before_segv : number == SIGBUS ? &before_bus : &before_ill;
    sigaction(number, before, 0); /* and the instruction is tried again */
}
#endif

static void catch_faults(void)
{
#ifdef EMU_CATCHES_FAULTS
    static bool done;
    if (done) return;
    done = true;
    stack_t s = {};
    if (sigaltstack(0, &s) == 0 && (s.ss_flags & SS_DISABLE)) {
        s.ss_size = 64 << 10;
        s.ss_sp = malloc(s.ss_size);
        s.ss_flags = 0;
        sigaltstack(&s, 0);
    }
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &before_segv);
    sigaction(SIGBUS, &action, &before_bus);
    sigaction(SIGILL, &action, &before_ill);
#endif
}

/* -- The runtime's calls ------------------------------------------------------------------------------------------- */

cudaError_t cudaMemGetInfo(size_t *available, size_t *total)
{
    EMU_INJECT("cudaMemGetInfo");
    int64_t all = emu_setting("VERTEX_EMU_MEMORY", (int64_t)4 << 30);
    *total = (size_t)all;
    *available = (size_t)std::max<int64_t>(0, all - device_bytes[emu_current_device]);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t bytes)
{
    EMU_INJECT("cudaMalloc");
    *p = 0;
    cudaError_t e = emu_forbidden_in_capture(true);
    if (e) return e;
    size_t available, total, rounded = (bytes + 255) / 256 * 256;
    cudaMemGetInfo(&available, &total);
    if (rounded > available) return emu_result(cudaErrorMemoryAllocation);
    allocation a = {bytes, emu_current_device, 0, 0, 0, 0, false};
    catch_faults();
#ifdef __SANITIZE_ADDRESS__
    char *start = (char *)aligned_alloc(256, std::max<size_t>(rounded, 256));
    if (!start) return emu_result(cudaErrorMemoryAllocation);
    free(start);
    if (posix_memalign((void **)&start, 256, std::max<size_t>(bytes, 1))) return emu_result(cudaErrorMemoryAllocation);
    a.mapped = start;
    fill_unset(start, bytes);
#else
    a.usable_bytes = (rounded + EMU_PAGE - 1) / EMU_PAGE * EMU_PAGE;
    a.mapped_bytes = a.usable_bytes + 2 * GUARD;
    a.mapped = (char *)mmap(0, a.mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (a.mapped == MAP_FAILED) return emu_result(cudaErrorMemoryAllocation);
    a.usable = a.mapped + GUARD;
    char *start = a.usable + a.usable_bytes - rounded;
    mprotect(a.usable, a.usable_bytes, PROT_READ | PROT_WRITE);
    fill_unset(start, bytes);
    fill_canary(std::max(a.usable, start - EMU_CANARY), start);
    fill_canary(start + bytes, start + rounded);
#ifdef EMU_CATCHES_FAULTS
    mprotect(a.usable, a.usable_bytes, PROT_NONE);
#endif
#endif
    device_blocks[start] = a;
    device_bytes[emu_current_device] += (int64_t)rounded;
    *p = start;
    return cudaSuccess;
}

cudaError_t cudaFree(void *p)
{
    if (!p) return cudaSuccess;
    cudaError_t e = emu_forbidden_in_capture(true);
    if (!e) e = emu_drain_all();
    auto b = device_blocks.find((char *)p);
    if (b == device_blocks.end()) return emu_result(cudaErrorInvalidValue);
    allocation a = b->second;
    device_bytes[a.device] -= (int64_t)((a.bytes + 255) / 256 * 256);
#ifdef __SANITIZE_ADDRESS__
    free(p);
#else
    freed.push_back({b->first, a});
    madvise(a.usable, a.usable_bytes, MADV_DONTNEED);
    if (freed.size() > QUARANTINE) {
        munmap(freed.front().second.mapped, freed.front().second.mapped_bytes);
        freed.pop_front();
    }
#endif
    device_blocks.erase(b);
    return e;
}

cudaError_t cudaMallocHost(void **p, size_t bytes)
{
    EMU_INJECT("cudaMallocHost");
    *p = 0;
    if (posix_memalign(p, EMU_PAGE, std::max<size_t>(bytes, 1))) return emu_result(cudaErrorMemoryAllocation);
    pinned_blocks[(char *)*p] = bytes;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *p)
{
    cudaError_t e = emu_drain_all();
    pinned_blocks.erase((char *)p);
    free(p);
    return e;
}

static bool is_pinned(const void *p)
{
    auto i = pinned_blocks.upper_bound((char *)p);
    if (i == pinned_blocks.begin()) return false;
    --i;
    return (char *)p < i->first + i->second;
}

/* Whether bytes from p on lie in one device block, or, with `host`, in none. */
static bool lies(const void *p, size_t bytes, bool host)
{
    auto b = block_of(p);
    return host ? !b : b && (const char *)p + bytes <= b->first + b->second.bytes;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream)
{
    EMU_INJECT("cudaMemcpyAsync");
    if (!bytes) return cudaSuccess;
    if (kind == cudaMemcpyDefault) kind = (cudaMemcpyKind)((block_of(from) ? 2 : 0) + (block_of(to) ? 1 : 0));
    const bool from_host = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyHostToHost;
    const bool to_host = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyHostToHost;
    if (!lies(to, bytes, to_host) || !lies(from, bytes, from_host)) return emu_result(cudaErrorInvalidValue);
    const bool capturing = emu_is_capturing(stream);
    if (from_host && !is_pinned(from) && !capturing) { /* pageable memory is read before the call returns */
        auto copy = std::make_shared<std::vector<char>>((const char *)from, (const char *)from + bytes);
        return emu_result(emu_queue(stream, [=] { memcpy(to, copy->data(), bytes); }));
    }
    cudaError_t e = emu_queue(stream, [=] { memmove(to, from, bytes); });
    if (!e && to_host && !is_pinned(to) && !capturing) e = cudaStreamSynchronize(stream);
    return emu_result(e);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind)
{
    EMU_INJECT("cudaMemcpy");
    cudaError_t e = emu_forbidden_in_capture(false);
    if (!e) e = cudaMemcpyAsync(to, from, bytes, kind, 0);
    return e ? e : emu_drain_all();
}

cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes, cudaStream_t stream)
{
    EMU_INJECT("cudaMemcpyPeerAsync");
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream)
{
    EMU_INJECT("cudaMemsetAsync");
    if (!bytes) return cudaSuccess;
    if (!lies(to, bytes, false)) return emu_result(cudaErrorInvalidValue);
    return emu_result(emu_queue(stream, [=] { memset(to, value, bytes); }));
}
