/* Preloaded into a process whose libraries had each CPUID replaced by "int3; nop": answers it without AVX-512.

   int3 raises SIGTRAP; the handler runs the real CPUID, clears what AVX2 processors do not have, and goes on
   behind it. Reading /proc/cpuinfo gives the file that MASKED_CPUINFO names, where flags are cleared alike. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define BIT(n) (1u << (n))

/* Intel's SDM, volume 2, CPUID. */
#define LEAF7_EBX (BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31)) /* AVX-512 */
#define LEAF7_ECX (BIT(1) | BIT(6) | BIT(8) | BIT(11) | BIT(12) | BIT(14)) /* VBMI, VBMI2, GFNI, VNNI, BITALG, VPOPCNTDQ */
#define LEAF7_EDX (BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25)) /* 4VNNIW, 4FMAPS, VP2INTERSECT, AMX, FP16 */
#define LEAF7_1_EAX (BIT(4) | BIT(5) | BIT(21) | BIT(23)) /* AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA */
#define LEAF7_1_EDX (BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19)) /* AVX-VNNI-INT8, -NE-CONVERT, AMX-COMPLEX, -INT16, AVX10 */
#define XCR0_EAX (BIT(5) | BIT(6) | BIT(7) | BIT(17) | BIT(18)) /* states of AVX-512 and AMX */

static void on_trap(int signal_number, siginfo_t *info, void *context) {
    (void)info;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *next = (const unsigned char *)registers[REG_RIP];
    if (next[-1] != 0xCC || next[0] != 0x90) { /* not one of ours */
        signal(signal_number, SIG_DFL);
        raise(signal_number);
        return;
    }
    unsigned leaf = (unsigned)registers[REG_RAX], part = (unsigned)registers[REG_RCX], a, b, c, d;
    __cpuid_count(leaf, part, a, b, c, d);
    if (leaf == 7 && part == 0) {
        b &= ~LEAF7_EBX;
        c &= ~LEAF7_ECX;
        d &= ~LEAF7_EDX;
    } else if (leaf == 7 && part == 1) {
        a &= ~LEAF7_1_EAX;
        d &= ~LEAF7_1_EDX;
    } else if (leaf == 0xD && part == 0) {
        a &= ~XCR0_EAX;
    }
    registers[REG_RAX] = a;
    registers[REG_RBX] = b;
    registers[REG_RCX] = c;
    registers[REG_RDX] = d;
}

__attribute__((constructor)) static void start(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_trap;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGTRAP, &action, NULL);
}

static const char *masked(const char *path) {
    const char *other = getenv("MASKED_CPUINFO");
    return path && other && strcmp(path, "/proc/cpuinfo") == 0 ? other : path;
}

#define OPEN(name)                                                        \
    int name(const char *path, int flags, ...) {                          \
        static int (*real)(const char *, int, ...);                       \
        va_list rest;                                                     \
        va_start(rest, flags);                                            \
        mode_t mode = va_arg(rest, mode_t);                               \
        va_end(rest);                                                     \
        if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name); \
        return real(masked(path), flags, mode);                           \
    }
#define FOPEN(name)                                                       \
    FILE *name(const char *path, const char *mode) {                      \
        static FILE *(*real)(const char *, const char *);                 \
        if (!real) real = (FILE *(*)(const char *, const char *))dlsym(RTLD_NEXT, #name); \
        return real(masked(path), mode);                                  \
    }
OPEN(open)
OPEN(open64)
FOPEN(fopen)
FOPEN(fopen64)
