/* emulator.cpp: runs kernels on the host; cuda_runtime.h says what is imitated and how closely.
 *
 * Layout of this file: fibers, the threads of a block, memory, kernels, streams and graphs, the rest of the runtime,
 * cuBLAS.
 *
 * Requirements
 *   1. One host thread. Everything runs in calls that wait (drain), on the caller's stack or on fibers that return to
 * it.
 *   2. A kernel that fails is left where it stands: its fibers are dropped, never resumed. Kernels therefore own
 * nothing.
 *   3. The library has no thread-local variable but shared memory (__shared__).
 */
#include <dlfcn.h>
#include <link.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <ucontext.h>

#if defined(__x86_64__)
#define EMU_OWN_SWITCH
#ifndef __SANITIZE_ADDRESS__
#define EMU_CATCHES_FAULTS /* the fiber that faults is left by a jump of our own; AddressSanitizer has its own handler \
                            */
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

enum {
    STACK = 64 << 10,
    PAGE = 4096,
    GUARD = 64 << 10,
    CANARY = 256,
    QUARANTINE = 256,
    MAX_SHARED = 163 << 10,
    FREE_SHARED = 48 << 10
};

static uint64_t random_state;

static uint64_t random_number(void)
{
    if (!random_state) {
        const char *seed = getenv("VERTEX_EMU_SEED");
        random_state = (seed ? strtoull(seed, 0, 10) : 1) * 0x9E3779B97F4A7C15u | 1;
    }
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return random_state * 0x2545F4914F6CDD1Du >> 16;
}

/* -- Fibers -------------------------------------------------------------------------------------------------------- */

struct fiber_stack {
    char *bottom; /* lowest address */
};

#ifdef EMU_OWN_SWITCH
struct context {
    void *sp;
    void *fake;         /* AddressSanitizer's */
    const char *bottom; /* of its stack */
    size_t size;
};

/* Saves the callee's registers and the stack pointer, and goes on where `load` was saved. */
extern "C" void emu_switch(void **save, void *load) __attribute__((visibility("hidden")));
extern "C" char emu_resume[] __attribute__((visibility("hidden")));
asm(R"(
    .text
    .globl emu_switch
    .hidden emu_switch
    .type emu_switch, @function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    .globl emu_resume
    .hidden emu_resume
emu_resume:
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emu_switch, .-emu_switch
)");
#else
struct context {
    ucontext_t u;
};
#endif

static context main_context;
static std::vector<fiber_stack> free_stacks, all_stacks;

static fiber_stack take_stack(void)
{
    if (free_stacks.empty()) {
        char *p =
            (char *)mmap(0, PAGE + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) {
            fprintf(stderr, "emulator: no memory for a stack\n");
            abort();
        }
        mprotect(p, PAGE, PROT_NONE);
        all_stacks.push_back({p});
        free_stacks.push_back({p});
    }
    fiber_stack s = free_stacks.back();
    free_stacks.pop_back();
    return s;
}

/* last: this context will not be returned to. */
static void switch_context(context *from, context *to, bool last)
{
#ifdef EMU_OWN_SWITCH
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(last ? 0 : &from->fake, to->bottom, to->size);
#endif
    (void)last;
    emu_switch(&from->sp, to->sp);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from->fake, 0, 0);
#endif
#else
    (void)last;
    swapcontext(&from->u, &to->u);
#endif
}

static void make_context(context *c, fiber_stack stack, void (*entry)(void))
{
#ifdef EMU_OWN_SWITCH
    char *top = stack.bottom + PAGE + STACK;
    void **sp = (void **)(top - 16);
    sp[0] = (void *)entry;
    sp[1] = 0;
    *c = {sp - 6, 0, stack.bottom + PAGE, STACK};
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack.bottom + PAGE, STACK); /* a kernel that failed has left its frames */
#endif
#else
    getcontext(&c->u);
    c->u.uc_stack.ss_sp = stack.bottom + PAGE;
    c->u.uc_stack.ss_size = STACK;
    c->u.uc_link = 0;
    makecontext(&c->u, entry, 0);
#endif
}

/* -- The threads of a block ---------------------------------------------------------------------------------------- */

struct pending_copy {
    char *to;
    char bytes[16];
    int group;
};

struct emu_lane : emu_place {
    int number;
    context saved;
    fiber_stack stack;
    emu_site site; /* of the collective it waits at */
    unsigned mask;
    emu_together *together;
    void *argument;
    int value;
    int group; /* of copies */
    std::vector<pending_copy> copies;
};

struct warp { /* lanes as bits */
    unsigned fresh, ready, waiting, barrier, returned;
    bool downwards;
};

static std::vector<emu_lane> lanes;
static std::vector<warp> warps;
static int lane_count;
static emu_count barrier_result;
static const std::function<void()> *thread_body;
static const char *kernel_name;
static volatile bool in_kernel;

emu_place *emu_now;
dim3 emu_block, emu_block_size, emu_grid_size;

static cudaError_t failure; /* of a kernel, not yet reported */
static char failure_text[1024], reported_text[1024];

static emu_lane *current(void) { return static_cast<emu_lane *>(emu_now); }
int emu_lane_number(void) { return current()->number % 32; }

static void note_failure(cudaError_t error, const char *text)
{
    if (failure) return;
    failure = error;
    size_t used = (size_t)snprintf(failure_text, sizeof failure_text, "kernel %s, block (%u,%u,%u)", kernel_name,
                                   emu_block.x, emu_block.y, emu_block.z);
    if (emu_now)
        used += (size_t)snprintf(failure_text + used, sizeof failure_text - used, ", thread (%u,%u,%u)", threadIdx.x,
                                 threadIdx.y, threadIdx.z);
    snprintf(failure_text + used, sizeof failure_text - used, ": %s", text);
}

void emu_fail(const char *format, ...)
{
    char text[800];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    note_failure(cudaErrorLaunchFailure, text);
    switch_context(&current()->saved, &main_context, false);
    abort(); /* nobody resumes this fiber */
}

static int pick(const warp *w)
{
    unsigned runnable = w->fresh | w->ready;
    if (!runnable) return -1;
    return w->downwards ? 31 - __builtin_clz(runnable) : __builtin_ctz(runnable);
}

static void fiber_main(void);

/* The context of lane `at` of a warp, as the one that runs now. */
static context *enter_lane(warp *w, int at)
{
    emu_lane *next = &lanes[(size_t)(w - warps.data()) * 32 + (size_t)at];
    if (w->fresh >> at & 1) {
        next->stack = take_stack();
        make_context(&next->saved, next->stack, fiber_main);
    }
    w->fresh &= ~(1u << at);
    w->ready &= ~(1u << at);
    emu_now = next;
    return &next->saved;
}

/* The running lane cannot go on: another one of its warp does, or the block's loop. */
static void yield(bool last)
{
    emu_lane *me = current();
    warp *w = &warps[(size_t)me->number / 32];
    int at = pick(w);
    if (last) free_stacks.push_back(me->stack);
    switch_context(&me->saved, at >= 0 ? enter_lane(w, at) : &main_context, last);
}

/* Runs threads one after the other for as long as they return; a stack is left only by a thread that has to wait on it.
 */
static void fiber_main(void)
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(0, 0, 0);
#endif
    for (;;) {
        (*thread_body)();
        emu_lane *me = current();
        warp *w = &warps[(size_t)me->number / 32];
        w->returned |= 1u << me->number % 32;
        int at = pick(w);
        if (at < 0 || !(w->fresh >> at & 1)) yield(true);
        w->fresh &= ~(1u << at);
        emu_lane *next = &lanes[(size_t)(me->number & ~31) + (size_t)at];
        next->stack = me->stack;
        emu_now = next;
    }
}

static bool same_place(const emu_site &a, const emu_site &b)
{
    return a.line == b.line && !strcmp(a.what, b.what) && !strcmp(a.file, b.file);
}

void emu_warp(emu_site site, unsigned mask, emu_together *together, void *argument)
{
    emu_lane *me = current();
    size_t number = (size_t)me->number / 32;
    warp *w = &warps[number];
    const int mine = me->number % 32;
    if (!(mask >> mine & 1))
        emu_fail("%s at %s:%d: lane %d is not in its own mask %08x", site.what, site.file, site.line, mine, mask);
    me->site = site, me->mask = mask, me->together = together, me->argument = argument;
    w->waiting |= 1u << mine;
    bool met = (w->waiting & mask) == mask;
    for (int i = 0; met && i < 32; i++) {
        const emu_lane *other = &lanes[number * 32 + (size_t)i];
        if (mask >> i & 1) met = other->mask == mask && same_place(other->site, site);
    }
    if (!met) {
        yield(false);
        return;
    }
    void *arguments[32];
    for (int i = 0; i < 32; i++) arguments[i] = mask >> i & 1 ? lanes[number * 32 + (size_t)i].argument : 0;
    together(arguments);
    w->waiting &= ~mask;
    w->ready |= mask & ~(1u << mine);
}

emu_count emu_barrier(emu_site site, int value)
{
    emu_lane *me = current();
    me->site = site, me->value = value;
    warps[(size_t)me->number / 32].barrier |= 1u << me->number % 32;
    yield(false);
    return barrier_result;
}

void emu_copy_async(void *to_shared, const void *from, bool valid)
{
    if ((uintptr_t)to_shared % 16 || (valid && (uintptr_t)from % 16))
        emu_fail("vx_copy_async: an address is not aligned to 16 bytes");
    emu_lane *me = current();
    pending_copy c = {(char *)to_shared, {0}, me->group};
    if (valid) memcpy(c.bytes, from, sizeof c.bytes);
    memset(to_shared, 0xff, sizeof c.bytes);
    me->copies.push_back(c);
}
void emu_copy_commit(void) { current()->group++; }
void emu_copy_wait(int pending)
{
    emu_lane *me = current();
    size_t kept = 0;
    for (const pending_copy &c : me->copies) {
        if (c.group < me->group - pending) memcpy(c.to, c.bytes, sizeof c.bytes);
        else me->copies[kept++] = c;
    }
    me->copies.resize(kept);
}

/* "threads 0-31 wait at __syncthreads (x.cu:7); threads 32-63 have returned" */
static void describe_threads(int first, int end, char *text, size_t size)
{
    size_t used = 0;
    text[0] = 0;
    auto state = [](int i) {
        const warp *w = &warps[(size_t)i / 32];
        unsigned bit = 1u << i % 32;
        return w->returned & bit ? 0 : w->barrier & bit ? 1 : w->waiting & bit ? 2 : 3;
    };
    for (int i = first; i < end && used < size;) {
        int j = i, s = state(i);
        const emu_lane *l = &lanes[(size_t)i];
        while (j < end && state(j) == s && (s == 0 || s == 3 || same_place(lanes[(size_t)j].site, l->site)) &&
               (s != 2 || lanes[(size_t)j].mask == l->mask))
            j++;
        used += (size_t)snprintf(text + used, size - used, "%sthreads %d-%d ", used ? "; " : "", i, j - 1);
        if (used >= size) return;
        const char *slash = l->site.file ? strrchr(l->site.file, '/') : 0, *file = slash ? slash + 1 : l->site.file;
        if (s == 0) used += (size_t)snprintf(text + used, size - used, "have returned");
        else if (s == 3) used += (size_t)snprintf(text + used, size - used, "run");
        else if (s == 1)
            used += (size_t)snprintf(text + used, size - used, "wait at %s (%s:%d)", l->site.what, file, l->site.line);
        else
            used += (size_t)snprintf(text + used, size - used, "wait at %s (%s:%d) with mask %08x", l->site.what, file,
                                     l->site.line, l->mask);
        i = j;
    }
}

static void deadlock(const char *what, int first, int end)
{
    char threads[600], text[800];
    describe_threads(first, end, threads, sizeof threads);
    snprintf(text, sizeof text, "%s: %s", what, threads);
    emu_now = 0;
    note_failure(cudaErrorLaunchFailure, text);
}

/* Runs the threads of one block; false: the kernel failed. */
static bool run_block(void)
{
    for (int i = 0; i < lane_count; i++) {
        emu_lane *l = &lanes[(size_t)i];
        l->group = 0;
        if (!l->copies.empty()) l->copies.clear();
    }
    const int warp_count = (lane_count + 31) / 32;
    std::vector<int> order((size_t)warp_count);
    for (int i = 0; i < warp_count; i++) {
        int present = std::min(32, lane_count - i * 32);
        warps[(size_t)i] = {present == 32 ? ~0u : (1u << present) - 1, 0, 0, 0, 0, (random_number() & 1) != 0};
        order[(size_t)i] = i;
    }
    for (;;) {
        for (int i = warp_count - 1; i > 0; i--)
            std::swap(order[(size_t)i], order[random_number() % (uint64_t)(i + 1)]);
        for (int i : order) {
            warp *w = &warps[(size_t)i];
            int at = pick(w);
            if (at < 0) continue;
            switch_context(&main_context, enter_lane(w, at), false);
            if (failure) return false;
            if (w->waiting) {
                deadlock("lanes of a warp wait for others that do not come", i * 32, std::min(lane_count, i * 32 + 32));
                return false;
            }
        }
        int waiting = 0, set = 0;
        for (int i = 0; i < lane_count; i++)
            if (warps[(size_t)i / 32].barrier >> i % 32 & 1) waiting++, set += lanes[(size_t)i].value != 0;
        if (!waiting) return true;
        bool together = waiting == lane_count;
        for (int i = 1; together && i < lane_count; i++) together = same_place(lanes[(size_t)i].site, lanes[0].site);
        if (!together) {
            deadlock("not all threads of the block reach the same barrier", 0, lane_count);
            return false;
        }
        barrier_result = {set, lane_count};
        for (warp &w : warps) w.ready = w.barrier, w.barrier = 0;
    }
}

/* -- Memory -------------------------------------------------------------------------------------------------------- */

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
static int current_device;

static int64_t setting(const char *name, int64_t otherwise)
{
    const char *text = getenv(name);
    return text && *text ? strtoll(text, 0, 10) : otherwise;
}

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
static bool canary_intact(const char *from, const char *to)
{
    for (const char *p = from; p < to; p++)
        if (*p != ((const char *)&canary_word)[(uintptr_t)p % 4]) return false;
    return true;
}

/* Device memory can be touched only while queued work runs. A block is opened by the first touch, which faults, and
 * closed again when the host goes on: so many and large blocks cost nothing while they lie idle. */
static bool draining;
static std::vector<char *> open_blocks;

#ifdef EMU_CATCHES_FAULTS
static bool open_block(const char *p)
{
    auto i =
        device_blocks.upper_bound((char *)p + PAGE); /* p may lie before the start, among the bytes that are checked */
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

/* NaN all over; of a very large block, whose pages would have to be found for that, at both ends. */
static void fill_unset(char *start, size_t bytes)
{
    const size_t most = 64 << 20, ends = 64 << 10;
    memset(start, 0xff, bytes <= most ? bytes : ends);
    if (bytes > most) memset(start + bytes - ends, 0xff, ends);
}

/* Of the blocks that were touched. */
static void check_canaries(void)
{
    for (char *start : open_blocks) {
        const allocation &a = device_blocks.find(start)->second;
        char *end = start + a.bytes, *low = std::max(a.usable, start - CANARY),
             *high = std::min(a.usable + a.usable_bytes, end + CANARY);
        bool before = canary_intact(low, start), behind = canary_intact(end, high);
        if (before && behind) continue;
        char text[200];
        snprintf(text, sizeof text, "wrote %s a block of %zu bytes of device memory",
                 before ? "past the end of" : "before the start of", a.bytes);
        emu_now = 0;
        note_failure(cudaErrorIllegalAddress, text);
        fill_canary(low, start);
        fill_canary(end, high);
    }
}

/* -- Faults -------------------------------------------------------------------------------------------------------- */

#ifdef EMU_CATCHES_FAULTS
static struct sigaction before_segv, before_bus, before_ill;

static void describe_address(const char *p, char *text, size_t size)
{
    for (const auto &s : all_stacks)
        if (p >= s.bottom && p < s.bottom + PAGE) {
            snprintf(text, size, "a thread's stack of %d bytes overflowed", STACK);
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
    if (draining && number == SIGSEGV && open_block((const char *)info->si_addr)) return;
    if (in_kernel && emu_now) {
        describe_place(ip, place, sizeof place);
        if (number == SIGILL)
            snprintf(what, sizeof what, "a misaligned access, or an index outside an array of fixed size");
        else describe_address((const char *)info->si_addr, what, sizeof what);
        snprintf(text, sizeof text, "%s (at %s)", what, place);
        note_failure(number == SIGILL ? cudaErrorMisalignedAddress : cudaErrorIllegalAddress, text);
        u->uc_mcontext.gregs[REG_RIP] = (greg_t)emu_resume;
        u->uc_mcontext.gregs[REG_RSI] = (greg_t)main_context.sp;
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

/* -- Kernels ------------------------------------------------------------------------------------------------------- */

/* Dynamic shared memory, under the name by which kernels declare it extern. */
alignas(1024) thread_local unsigned char vx_shared[MAX_SHARED + CANARY];

static char *shared_start;
static size_t shared_bytes;

static int find_shared(dl_phdr_info *info, size_t, void *)
{
    const char *here = (const char *)&emu_block;
    bool mine = false;
    size_t bytes = 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto &p = info->dlpi_phdr[i];
        const char *start = (const char *)info->dlpi_addr + p.p_vaddr;
        if (p.p_type == PT_LOAD && here >= start && here < start + p.p_memsz) mine = true;
        if (p.p_type == PT_TLS) bytes = p.p_memsz;
    }
    if (!mine) return 0;
    shared_start = (char *)info->dlpi_tls_data;
    shared_bytes = bytes;
    return 1;
}

static void fill_shared(size_t dynamic)
{
    char *start = (char *)vx_shared, *end = start + sizeof vx_shared;
    memset(shared_start, 0xff, (size_t)(start - shared_start));
    memset(start, 0xff, dynamic + CANARY);
    memset(end, 0xff, (size_t)(shared_start + shared_bytes - end));
}

static void run_kernel(const char *name, dim3 grid, dim3 block, size_t dynamic, const std::function<void()> &body)
{
#ifdef __SANITIZE_ADDRESS__
    if (!main_context.bottom) {
        pthread_attr_t attributes;
        void *bottom;
        pthread_getattr_np(pthread_self(), &attributes);
        pthread_attr_getstack(&attributes, &bottom, &main_context.size);
        pthread_attr_destroy(&attributes);
        main_context.bottom = (const char *)bottom;
    }
#endif
    if (!shared_start) {
        vx_shared[0] = 0; /* so that this thread has the block */
        dl_iterate_phdr(find_shared, 0);
    }
    kernel_name = name;
    thread_body = &body;
    emu_block_size = block;
    emu_grid_size = grid;
    lane_count = (int)(block.x * block.y * block.z);
    if (lanes.size() < (size_t)(lane_count + 31) / 32 * 32) lanes.resize((size_t)(lane_count + 31) / 32 * 32);
    warps.resize((size_t)(lane_count + 31) / 32);
    for (int i = 0; i < lane_count; i++) {
        lanes[(size_t)i].number = i;
        lanes[(size_t)i].thread = {(unsigned)i % block.x, (unsigned)i / block.x % block.y,
                                   (unsigned)i / block.x / block.y};
    }
    uint64_t count = (uint64_t)grid.x * grid.y * grid.z, step = count > 2 ? random_number() % count | 1 : 1,
             at = random_number() % count;
    auto common = [](uint64_t a, uint64_t b) {
        while (b) {
            uint64_t r = a % b;
            a = b, b = r;
        }
        return a;
    };
    while (common(step, count) != 1) step++;
    for (uint64_t i = 0; i < count && !failure; i++, at = (at + step) % count) {
        emu_block = dim3((unsigned)(at % grid.x), (unsigned)(at / grid.x % grid.y), (unsigned)(at / grid.x / grid.y));
        fill_shared(dynamic);
        in_kernel = true;
        bool good = run_block();
        in_kernel = false;
        emu_now = 0;
        if (!good) free_stacks = all_stacks;
        for (size_t b = dynamic; good && b < dynamic + CANARY; b++)
            if (vx_shared[b] != 0xff) {
                char text[160];
                snprintf(text, sizeof text, "wrote at byte %zu of its %zu bytes of dynamic shared memory", b, dynamic);
                note_failure(cudaErrorIllegalAddress, text);
                break;
            }
    }
    check_canaries();
}

/* -- Streams, events, graphs --------------------------------------------------------------------------------------- */

struct work {
    std::function<void()> run; /* or: */
    emu_event *record = 0, *wait = 0;
    long version = 0;
};

struct emu_graph {
    std::vector<std::function<void()>> steps;
    cudaStreamCaptureMode mode;
    bool invalid = false;
    std::set<cudaStream_t> forked; /* streams whose work the origin has not waited for */
};

struct emu_stream {
    int device;
    std::deque<work> queue;
    emu_graph *capture = 0;
    bool origin = false;
};

struct emu_event {
    long recorded = 0, done = 0;
    emu_graph *captured = 0;
    cudaStream_t from = 0;
    timespec time = {};
};

static std::set<cudaStream_t> streams;
static cudaError_t last_error;

static cudaError_t result(cudaError_t e)
{
    if (e) last_error = e;
    return e;
}

/* The error that VERTEX_EMU_ERROR wants of this function. */
static cudaError_t injected(const char *name)
{
    const char *wish = getenv("VERTEX_EMU_ERROR");
    size_t n = strlen(name);
    if (!wish || strncmp(wish, name, n) || wish[n] != ':') return cudaSuccess;
    return result((cudaError_t)atoi(wish + n + 1));
}
#define EMU_INJECT(name)                                                                                               \
    do {                                                                                                               \
        cudaError_t injected_ = injected(name);                                                                        \
        if (injected_) return injected_;                                                                               \
    } while (0)

/* Runs queued work until `finished`, streams in random order; then the failure of a kernel, if there was one, is
 * reported. */
template <class F> static cudaError_t drain(F finished)
{
    draining = true;
    while (!failure && !finished()) {
        std::vector<cudaStream_t> able;
        for (cudaStream_t s : streams)
            if (!s->queue.empty() &&
                (!s->queue.front().wait || s->queue.front().wait->done >= s->queue.front().version))
                able.push_back(s);
        if (able.empty()) {
            kernel_name = "(none)";
            note_failure(cudaErrorUnknown, "streams wait for each other's events");
            break;
        }
        cudaStream_t s = able[random_number() % able.size()];
        work w = std::move(s->queue.front());
        s->queue.pop_front();
        if (w.record) {
            w.record->done = std::max(w.record->done, w.version);
            clock_gettime(CLOCK_MONOTONIC, &w.record->time);
        } else if (w.run) {
            w.run();
        }
    }
    draining = false;
    close_blocks();
    if (!failure) return cudaSuccess;
    for (cudaStream_t s : streams) {
        for (const work &w : s->queue)
            if (w.record) w.record->done = std::max(w.record->done, w.version);
        s->queue.clear();
    }
    cudaError_t e = failure;
    failure = cudaSuccess;
    memcpy(reported_text, failure_text, sizeof reported_text);
    return result(e);
}

static cudaError_t drain_all(void)
{
    return drain([] {
        for (cudaStream_t s : streams)
            if (!s->queue.empty()) return false;
        return true;
    });
}

/* Not while a stream records: */
static cudaError_t forbidden_in_capture(bool relaxed_allows)
{
    for (cudaStream_t s : streams)
        if (s->capture && !(relaxed_allows && s->capture->mode == cudaStreamCaptureModeRelaxed)) {
            s->capture->invalid = true;
            return result(cudaErrorStreamCaptureUnsupported);
        }
    return cudaSuccess;
}

static cudaStream_t default_stream(void)
{
    static emu_stream s = {0, {}, 0, false};
    streams.insert(&s);
    return &s;
}

cudaError_t emu_queue(cudaStream_t stream, std::function<void()> run)
{
    if (!stream) { /* the legacy default stream waits for all others and is waited for */
        cudaError_t e = drain_all();
        if (e) return e;
        work w;
        w.run = std::move(run);
        default_stream()->queue.push_back(std::move(w));
        return drain_all();
    }
    if (stream->capture) {
        if (stream->origin == false) stream->capture->forked.insert(stream);
        stream->capture->steps.push_back(std::move(run));
    } else {
        work w;
        w.run = std::move(run);
        stream->queue.push_back(std::move(w));
    }
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned)
{
    EMU_INJECT("cudaStreamCreateWithFlags");
    *stream = new emu_stream{current_device, {}, 0, false};
    streams.insert(*stream);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    cudaError_t e = drain_all();
    streams.erase(stream);
    delete stream;
    return e;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    EMU_INJECT("cudaStreamSynchronize");
    cudaError_t e = forbidden_in_capture(false);
    if (e) return e;
    if (!stream) return drain_all();
    return drain([stream] { return stream->queue.empty(); });
}

cudaError_t cudaDeviceSynchronize(void)
{
    EMU_INJECT("cudaDeviceSynchronize");
    cudaError_t e = forbidden_in_capture(false);
    return e ? e : drain_all();
}

cudaError_t cudaStreamQuery(cudaStream_t stream) { return stream->queue.empty() ? cudaSuccess : cudaErrorNotReady; }

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned)
{
    EMU_INJECT("cudaStreamWaitEvent");
    if (event->captured) {
        if (stream->capture && stream->capture != event->captured) return result(cudaErrorStreamCaptureUnsupported);
        stream->capture = event->captured;
        if (stream->origin) stream->capture->forked.erase(event->from);
        else stream->capture->forked.insert(stream);
        return cudaSuccess;
    }
    if (stream->capture) return result(cudaErrorStreamCaptureUnsupported); /* an event from outside the graph */
    work w;
    w.wait = event;
    w.version = event->recorded;
    stream->queue.push_back(std::move(w));
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned)
{
    EMU_INJECT("cudaEventCreateWithFlags");
    *event = new emu_event;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    cudaError_t e = drain_all();
    delete event;
    return e;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    EMU_INJECT("cudaEventRecord");
    if (!stream) stream = default_stream();
    event->captured = stream->capture;
    event->from = stream;
    if (stream->capture) return cudaSuccess;
    work w;
    w.record = event;
    w.version = ++event->recorded;
    stream->queue.push_back(std::move(w));
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    EMU_INJECT("cudaEventSynchronize");
    cudaError_t e = forbidden_in_capture(false);
    if (e) return e;
    long version = event->recorded;
    return drain([event, version] { return event->done >= version; });
}
cudaError_t cudaEventQuery(cudaEvent_t event)
{
    return event->done >= event->recorded ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t a, cudaEvent_t b)
{
    *milliseconds =
        (float)((double)(b->time.tv_sec - a->time.tv_sec) * 1e3 + (double)(b->time.tv_nsec - a->time.tv_nsec) * 1e-6);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode)
{
    EMU_INJECT("cudaStreamBeginCapture");
    if (!stream || stream->capture) return result(cudaErrorStreamCaptureUnsupported);
    stream->capture = new emu_graph;
    stream->capture->mode = mode;
    stream->origin = true;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    *graph = 0;
    if (!stream || !stream->capture || !stream->origin) return result(cudaErrorInvalidValue);
    emu_graph *g = stream->capture;
    for (cudaStream_t s : streams)
        if (s->capture == g) s->capture = 0;
    stream->origin = false;
    if (g->invalid || !g->forked.empty()) {
        cudaError_t e = g->invalid ? cudaErrorStreamCaptureInvalidated : cudaErrorStreamCaptureUnjoined;
        delete g;
        return result(e);
    }
    *graph = g;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status)
{
    *status = !stream || !stream->capture ? cudaStreamCaptureStatusNone
              : stream->capture->invalid  ? cudaStreamCaptureStatusInvalidated
                                          : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long)
{
    EMU_INJECT("cudaGraphInstantiate");
    *executable = new emu_graph(*graph);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream)
{
    EMU_INJECT("cudaGraphLaunch");
    for (const auto &step : executable->steps) {
        cudaError_t e = emu_queue(stream, step);
        if (e) return e;
    }
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable)
{
    cudaError_t e = drain_all();
    delete executable;
    return e;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}

/* -- Launches ------------------------------------------------------------------------------------------------------ */

static std::map<const void *, int> allowed_shared;

cudaError_t emu_launch(const char *name, const void *kernel, const cudaLaunchConfig_t *config,
                       std::function<void()> thread)
{
    EMU_INJECT("cudaLaunchKernelEx");
    const dim3 g = config->gridDim, b = config->blockDim;
    const uint64_t threads = (uint64_t)b.x * b.y * b.z;
    const size_t shared = config->dynamicSmemBytes;
    auto allowed = allowed_shared.find(kernel);
    if (threads < 1 || threads > 1024 || b.z > 64 || g.x < 1 || g.x > 0x7fffffffu || g.y < 1 || g.y > 65535 ||
        g.z < 1 || g.z > 65535)
        return result(cudaErrorInvalidConfiguration);
    if (shared > (allowed == allowed_shared.end() ? (size_t)FREE_SHARED : (size_t)allowed->second))
        return result(cudaErrorInvalidValue);
    return result(emu_queue(config->stream, [=] { run_kernel(name, g, b, shared, thread); }));
}

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value)
{
    EMU_INJECT("cudaFuncSetAttribute");
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value > MAX_SHARED) return result(cudaErrorInvalidValue);
    allowed_shared[kernel] = value;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *)
{
    EMU_INJECT("cudaFuncGetAttributes");
    *attributes = {1024, 80};
    return cudaSuccess;
}

/* -- Memory calls -------------------------------------------------------------------------------------------------- */

cudaError_t cudaMemGetInfo(size_t *available, size_t *total)
{
    EMU_INJECT("cudaMemGetInfo");
    int64_t all = setting("VERTEX_EMU_MEMORY", (int64_t)4 << 30);
    *total = (size_t)all;
    *available = (size_t)std::max<int64_t>(0, all - device_bytes[current_device]);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t bytes)
{
    EMU_INJECT("cudaMalloc");
    *p = 0;
    cudaError_t e = forbidden_in_capture(true);
    if (e) return e;
    size_t available, total, rounded = (bytes + 255) / 256 * 256;
    cudaMemGetInfo(&available, &total);
    if (rounded > available) return result(cudaErrorMemoryAllocation);
    allocation a = {bytes, current_device, 0, 0, 0, 0, false};
    catch_faults();
#ifdef __SANITIZE_ADDRESS__
    char *start = (char *)aligned_alloc(256, std::max<size_t>(rounded, 256));
    if (!start) return result(cudaErrorMemoryAllocation);
    free(start);
    if (posix_memalign((void **)&start, 256, std::max<size_t>(bytes, 1))) return result(cudaErrorMemoryAllocation);
    a.mapped = start;
    fill_unset(start, bytes);
#else
    a.usable_bytes = (rounded + PAGE - 1) / PAGE * PAGE;
    a.mapped_bytes = a.usable_bytes + 2 * GUARD;
    a.mapped = (char *)mmap(0, a.mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (a.mapped == MAP_FAILED) return result(cudaErrorMemoryAllocation);
    a.usable = a.mapped + GUARD;
    char *start = a.usable + a.usable_bytes - rounded;
    mprotect(a.usable, a.usable_bytes, PROT_READ | PROT_WRITE);
    fill_unset(start, bytes);
    fill_canary(std::max(a.usable, start - CANARY), start);
    fill_canary(start + bytes, start + rounded);
#ifdef EMU_CATCHES_FAULTS
    mprotect(a.usable, a.usable_bytes, PROT_NONE);
#endif
#endif
    device_blocks[start] = a;
    device_bytes[current_device] += (int64_t)rounded;
    *p = start;
    return cudaSuccess;
}

cudaError_t cudaFree(void *p)
{
    if (!p) return cudaSuccess;
    cudaError_t e = forbidden_in_capture(true);
    if (!e) e = drain_all();
    auto b = device_blocks.find((char *)p);
    if (b == device_blocks.end()) return result(cudaErrorInvalidValue);
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
    if (posix_memalign(p, PAGE, std::max<size_t>(bytes, 1))) return result(cudaErrorMemoryAllocation);
    pinned_blocks[(char *)*p] = bytes;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *p)
{
    cudaError_t e = drain_all();
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
    if (!lies(to, bytes, to_host) || !lies(from, bytes, from_host)) return result(cudaErrorInvalidValue);
    const bool capturing = stream && stream->capture;
    if (from_host && !is_pinned(from) && !capturing) { /* pageable memory is read before the call returns */
        auto copy = std::make_shared<std::vector<char>>((const char *)from, (const char *)from + bytes);
        return result(emu_queue(stream, [=] { memcpy(to, copy->data(), bytes); }));
    }
    cudaError_t e = emu_queue(stream, [=] { memmove(to, from, bytes); });
    if (!e && to_host && !is_pinned(to) && !capturing) e = cudaStreamSynchronize(stream);
    return result(e);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind)
{
    EMU_INJECT("cudaMemcpy");
    cudaError_t e = forbidden_in_capture(false);
    if (!e) e = cudaMemcpyAsync(to, from, bytes, kind, 0);
    return e ? e : drain_all();
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
    if (!lies(to, bytes, false)) return result(cudaErrorInvalidValue);
    return result(emu_queue(stream, [=] { memset(to, value, bytes); }));
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
    *version = (int)setting("VERTEX_EMU_DRIVER", CUDART_VERSION);
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
    *count = (int)setting("VERTEX_EMU_DEVICES", 2);
    return *count ? cudaSuccess : result(cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int device)
{
    EMU_INJECT("cudaSetDevice");
    int count;
    cudaGetDeviceCount(&count);
    if (device < 0 || device >= count) return result(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device)
{
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int)
{
    EMU_INJECT("cudaGetDeviceProperties");
    *p = {};
    snprintf(p->name, sizeof p->name, "emulated device");
    p->totalGlobalMem = (size_t)setting("VERTEX_EMU_MEMORY", (int64_t)4 << 30);
    p->major = 8, p->minor = 0, p->multiProcessorCount = 4;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int)
{
    EMU_INJECT("cudaDeviceGetAttribute");
    *value = attribute == cudaDevAttrMultiProcessorCount      ? 4
             : attribute == cudaDevAttrComputeCapabilityMajor ? 8
             : attribute == cudaDevAttrComputeCapabilityMinor ? 0
                                                              : (int)MAX_SHARED;
    return cudaSuccess;
}

/* -- cuBLAS -------------------------------------------------------------------------------------------------------- */

struct cublasContext {
    cudaStream_t stream;
};

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle)
{
    *handle = new cublasContext{0};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle)
{
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream)
{
    handle->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void *, size_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
const char *cublasGetStatusString(cublasStatus_t status)
{
    return status ? "CUBLAS_STATUS of the emulator" : "CUBLAS_STATUS_SUCCESS";
}

static float element(const void *p, cudaDataType type, int64_t i)
{
    return type == CUDA_R_32F ? ((const float *)p)[i] : __uint_as_float((uint32_t)((const uint16_t *)p)[i] << 16);
}

/* One product, summed in double. */
static void multiply(bool ta, bool tb, int m, int n, int k, float alpha, const void *a, cudaDataType a_type,
                     int64_t lda, const void *b, cudaDataType b_type, int64_t ldb, float beta, void *c,
                     cudaDataType c_type, int64_t ldc)
{
    std::vector<double> column((size_t)m);
    for (int j = 0; j < n; j++) {
        std::fill(column.begin(), column.end(), 0.0);
        for (int l = 0; l < k; l++) {
            const double y = element(b, b_type, tb ? j + l * ldb : l + j * ldb);
            for (int i = 0; i < m; i++) column[(size_t)i] += element(a, a_type, ta ? l + i * lda : i + l * lda) * y;
        }
        for (int i = 0; i < m; i++) {
            float v = (float)(alpha * column[(size_t)i]);
            if (beta != 0.0f) v += beta * element(c, c_type, i + j * ldc);
            if (c_type == CUDA_R_32F) {
                ((float *)c)[i + j * ldc] = v;
            } else {
                uint32_t bits = __float_as_uint(v);
                ((uint16_t *)c)[i + j * ldc] =
                    (uint16_t)(v != v ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
            }
        }
    }
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m,
                                          int n, int k, const void *alpha, const void *a, cudaDataType a_type, int lda,
                                          long long stride_a, const void *b, cudaDataType b_type, int ldb,
                                          long long stride_b, const void *beta, void *c, cudaDataType c_type, int ldc,
                                          long long stride_c, int batch, cublasComputeType_t, cublasGemmAlgo_t)
{
    if (m < 0 || n < 0 || k < 0 || batch < 0 || lda < std::max(1, ta ? k : m) || ldb < std::max(1, tb ? n : k) ||
        ldc < std::max(1, m))
        return CUBLAS_STATUS_INVALID_VALUE;
    const float x = *(const float *)alpha, y = *(const float *)beta;
    const int64_t sa = stride_a * (a_type == CUDA_R_32F ? 4 : 2), sb = stride_b * (b_type == CUDA_R_32F ? 4 : 2),
                  sc = stride_c * (c_type == CUDA_R_32F ? 4 : 2);
    cudaError_t e = emu_queue(handle->stream, [=] {
        for (int i = 0; i < batch; i++)
            multiply(ta, tb, m, n, k, x, (const char *)a + i * sa, a_type, lda, (const char *)b + i * sb, b_type, ldb,
                     y, (char *)c + i * sc, c_type, ldc);
    });
    return e ? CUBLAS_STATUS_NOT_INITIALIZED : CUBLAS_STATUS_SUCCESS;
}
