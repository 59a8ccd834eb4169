/* threads.cpp: runs a kernel: its blocks one after the other, the threads of a block as fibers. */
#include <link.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>

#include <algorithm>
#include <vector>

#include <ucontext.h>

#include "emulator.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

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

static context main_context; /* of the caller, in which a block's loop runs */
static std::vector<fiber_stack> free_stacks, all_stacks;

static fiber_stack take_stack(void)
{
    if (free_stacks.empty()) {
        char *p = (char *)mmap(0, EMU_PAGE + EMU_STACK, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) {
            fprintf(stderr, "emulator: no memory for a stack\n");
            abort();
        }
        mprotect(p, EMU_PAGE, PROT_NONE);
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
    char *top = stack.bottom + EMU_PAGE + EMU_STACK;
    void **sp = (void **)(top - 16);
    sp[0] = (void *)entry;
    sp[1] = 0;
    *c = {sp - 6, 0, stack.bottom + EMU_PAGE, EMU_STACK};
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack.bottom + EMU_PAGE, EMU_STACK); /* a kernel that failed has left its frames */
#endif
#else
    getcontext(&c->u);
    c->u.uc_stack.ss_sp = stack.bottom + EMU_PAGE;
    c->u.uc_stack.ss_size = EMU_STACK;
    c->u.uc_link = 0;
    makecontext(&c->u, entry, 0);
#endif
}

bool emu_stack_overflowed(const char *p)
{
    for (const auto &s : all_stacks)
        if (p >= s.bottom && p < s.bottom + EMU_PAGE) return true;
    return false;
}

#ifdef EMU_CATCHES_FAULTS
void emu_abandon_fiber(void *context)
{
    ucontext_t *u = (ucontext_t *)context;
    u->uc_mcontext.gregs[REG_RIP] = (greg_t)emu_resume;
    u->uc_mcontext.gregs[REG_RSI] = (greg_t)main_context.sp;
}
#endif

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
const char *emu_kernel_name;
volatile bool emu_in_kernel;

emu_place *emu_now;
dim3 emu_block, emu_block_size, emu_grid_size;

static emu_lane *current(void) { return static_cast<emu_lane *>(emu_now); }
int emu_lane_number(void) { return current()->number % 32; }

void emu_fail(const char *format, ...)
{
    char text[800];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    emu_note_failure(cudaErrorLaunchFailure, text);
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
    emu_note_failure(cudaErrorLaunchFailure, text);
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
        warps[(size_t)i] = {present == 32 ? ~0u : (1u << present) - 1, 0, 0, 0, 0, (emu_random() & 1) != 0};
        order[(size_t)i] = i;
    }
    for (;;) {
        for (int i = warp_count - 1; i > 0; i--) std::swap(order[(size_t)i], order[emu_random() % (uint64_t)(i + 1)]);
        for (int i : order) {
            warp *w = &warps[(size_t)i];
            int at = pick(w);
            if (at < 0) continue;
            switch_context(&main_context, enter_lane(w, at), false);
            if (emu_failure) return false;
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

/* -- Kernels ------------------------------------------------------------------------------------------------------- */

/* Dynamic shared memory, under the name by which kernels declare it extern. */
alignas(1024) thread_local unsigned char vx_shared[EMU_MAX_SHARED + EMU_CANARY];

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
    memset(start, 0xff, dynamic + EMU_CANARY);
    memset(end, 0xff, (size_t)(shared_start + shared_bytes - end));
}

void emu_run_kernel(const char *name, dim3 grid, dim3 block, size_t dynamic, const std::function<void()> &body)
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
    emu_kernel_name = name;
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
    uint64_t count = (uint64_t)grid.x * grid.y * grid.z, step = count > 2 ? emu_random() % count | 1 : 1,
             at = emu_random() % count;
    auto common = [](uint64_t a, uint64_t b) {
        while (b) {
            uint64_t r = a % b;
            a = b, b = r;
        }
        return a;
    };
    while (common(step, count) != 1) step++;
    for (uint64_t i = 0; i < count && !emu_failure; i++, at = (at + step) % count) {
        emu_block = dim3((unsigned)(at % grid.x), (unsigned)(at / grid.x % grid.y), (unsigned)(at / grid.x / grid.y));
        fill_shared(dynamic);
        emu_in_kernel = true;
        bool good = run_block();
        emu_in_kernel = false;
        emu_now = 0;
        if (!good) free_stacks = all_stacks;
        for (size_t b = dynamic; good && b < dynamic + EMU_CANARY; b++)
            if (vx_shared[b] != 0xff) {
                char text[160];
                snprintf(text, sizeof text, "wrote at byte %zu of its %zu bytes of dynamic shared memory", b, dynamic);
                emu_note_failure(cudaErrorIllegalAddress, text);
                break;
            }
    }
    emu_check_canaries();
}
