/* system.c: what LuaJIT lacks of the operating system: interrupts as a flag, a thread, a clock, and what the terminal
 * is. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "tensor.h"

#include "comm/comm.h"

/* Holds the numbers of standard input, output and errors where they are closed: else the next files opened, a lock or a
 * log, get them and what is printed is written there. Reading and writing them fail as before. */
__attribute__((constructor)) static void hold_standard_files(void)
{
    for (int file = 0; file < 3; file++) {
        const bool closed = fcntl(file, F_GETFD) < 0 && errno == EBADF;
        if (closed && open("/dev/null", file == 0 ? O_WRONLY : O_RDONLY) < 0) return;
    }
}

/* -- Interrupts ---------------------------------------------------------------------------------------------------- */

/* What is caught: in a session the first alone. Launchers and Slurm send SIGUSR1 to stop; SIGHUP, when a terminal
 * closes, may come several times. */
static const int SIGNALS[] = {SIGINT, SIGTERM, SIGUSR1, SIGHUP};
enum { SIGNAL_COUNT = sizeof SIGNALS / sizeof *SIGNALS };
static volatile sig_atomic_t interrupted;
static bool held, agreed; /* several ranks: what vx_interrupted() tells */
static struct sigaction before[SIGNAL_COUNT];
static int catching;
static struct {
    int (*volatile f)(void *, void *, int, int);
    void *a, *b;
    int c, d;
    pthread_t thread;
} besides;

static void on_signal(int number)
{
    if (interrupted && catching == 1 && number != SIGHUP) {
        signal(number, SIG_DFL);
        raise(number);
    }
    const bool calls = catching == 2 && besides.f;
    if (calls && !pthread_equal(pthread_self(), besides.thread)) {
        pthread_kill(besides.thread, number); /* it may wait in a system call, which this ends */
        return;
    }
    if (interrupted < INT_MAX) interrupted++;
    if (!calls) return;
    int problem = errno;
    besides.f(besides.a, besides.b, besides.c, besides.d);
    errno = problem;
}

int vx_interrupt_catch(int how)
{
    if (how < 0 || how > 2) return vx_fail(VX_EINVAL, "interrupt_catch: %d, expected 0, 1 or 2", how);
    if (catching && how != catching)
        for (int i = 0; i < (catching == 1 ? SIGNAL_COUNT : 1); i++) sigaction(SIGNALS[i], &before[i], NULL);
    interrupted = 0;
    agreed = false;
    if (how && how != catching) {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_handler = on_signal;
        for (int i = 0; i < (how == 1 ? SIGNAL_COUNT : 1); i++) {
            sigaction(SIGNALS[i], &action, &before[i]);
            const bool nohup = SIGNALS[i] == SIGHUP && before[i].sa_handler == SIG_IGN;
            if (nohup) sigaction(SIGHUP, &before[i], NULL);
        }
    }
    catching = how;
    return VX_OK;
}

int vx_interrupted(void) { return held ? agreed : interrupted; }

int vx_interrupt_hold(int on)
{
    if (on != 0 && on != 1) return vx_fail(VX_EINVAL, "interrupt_hold: %d, expected 0 or 1", on);
    held = on;
    agreed = false;
    return VX_OK;
}

int vx_interrupt_raised(void) { return interrupted; }

void vx_interrupt_agree(void) { agreed = true; }

int vx_interrupt_calls(int (*f)(void *, void *, int, int), void *a, void *b, int c, int d)
{
    besides.f = NULL; /* the handler may run between any two of these lines */
    besides.a = a, besides.b = b, besides.c = c, besides.d = d;
    besides.thread = pthread_self();
    besides.f = f;
    return VX_OK;
}

/* -- Threads ------------------------------------------------------------------------------------------------------- */

struct job {
    int (*f)(void *, void *, void *);
    void *a, *b, *c;
};

static void *run_job(void *argument)
{
    struct job job = *(struct job *)argument;
    free(argument);
    job.f(job.a, job.b, job.c);
    return NULL;
}

int vx_thread(int (*f)(void *, void *, void *), void *a, void *b, void *c)
{
    if (!f) return vx_fail(VX_EINVAL, "thread: no function");
    struct job *job = malloc(sizeof *job);
    if (!job) return vx_fail(VX_ENOMEM, "thread: out of memory");
    *job = (struct job){f, a, b, c};
    sigset_t all, mask;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &mask); /* inherited by the new thread */
    pthread_t thread;
    int problem = pthread_create(&thread, NULL, run_job, job);
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    if (problem) {
        free(job);
        return vx_fail(VX_ENOMEM, "thread: %s", strerror(problem));
    }
    pthread_detach(thread);
    return VX_OK;
}

/* -- Clock, terminal ----------------------------------------------------------------------------------------------- */

double vx_time(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int vx_is_tty(int fd) { return isatty(fd); }

int vx_terminal_columns(void)
{
    struct winsize w;
    for (int fd = 2; fd >= 1; fd--)
        if (ioctl(fd, TIOCGWINSZ, &w) == 0 && w.ws_col > 0) return w.ws_col;
    return 0;
}
