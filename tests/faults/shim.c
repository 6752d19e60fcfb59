/* Makes a system call of the daemon fail, or kills the daemon at it: the N-th call since the library was
   armed, of the calls on the folder under test or on the network. Shifts the clock as well. The tests preload
   it into the daemon; it is part of nothing else.

   The control page is shared with the test through shim.py: both layouts must agree. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_CALLS 4096
#define GOING_DOWN _IOR('X', 125, uint32_t) /* ext4 and xfs: shut down, and lose all data that was not written */
#define WITHOUT_LOG 2

enum mode { FAIL, FAIL_FROM_NOW_ON, KILL_BEFORE, KILL_HALFWAY, CUT_POWER };

struct call {
    char name[16];
    int32_t step;
    int32_t local; /* on a file of the folder under test; else on a socket, or on inotify */
    char path[104];
};

struct control {
    int64_t clock_ahead; /* seconds, armed or not */
    int32_t armed;
    int32_t only; /* count the calls of this step; -1: of all steps */
    int32_t at;
    int32_t mode;
    int32_t error;
    int32_t network; /* make calls on sockets fail, and none on the folder */
    int32_t hit; /* the number of the first call with an injected fault */
    int32_t count;
    struct call calls[MAX_CALLS];
};

static struct control *control;
static const char *root;
static __thread int32_t step;
static __thread int inside;

void fault_step(int32_t number) { step = number; }

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULTS_CONTROL");
    root = getenv("FAULTS_ROOT");
    if (!path || !root) return;
    int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) return;
    void *page = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (page != MAP_FAILED) control = page;
}

static void path_of(int fd, char *to, size_t size) {
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, to, size - 1);
    to[length > 0 ? length : 0] = 0;
}

static void die(void) {
    if (control->mode == CUT_POWER) {
        const char *disks[] = {"files", "state"};
        for (int number = 0; number < 2; number++) {
            char path[512];
            uint32_t flags = WITHOUT_LOG;
            snprintf(path, sizeof path, "%s/%s", root, disks[number]);
            int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY, 0);
            if (fd < 0 || syscall(SYS_ioctl, fd, GOING_DOWN, &flags)) abort();
        }
    }
    syscall(SYS_kill, getpid(), SIGKILL);
}

/* Returns whether the call must fail; errno is set then. Sets `half` if the caller must write half, and die. */
static int injects(const char *name, int directory, const char *path, int *half) {
    char full[512];
    if (!control || !control->armed || inside) return 0;
    inside = 1;
    int saved = errno, fails = 0;
    full[0] = 0;
    if (directory >= 0) path_of(directory, full, sizeof full);
    if (path && (path[0] == '/' || directory == AT_FDCWD)) snprintf(full, sizeof full, "%s", path);
    else if (path) {
        size_t length = strlen(full);
        snprintf(full + length, sizeof full - length, "/%s", path);
    }
    int local = strncmp(full, root, strlen(root)) == 0;
    if (!local && strncmp(full, "socket:", 7) && strcmp(full, "anon_inode:inotify")) goto out;
    if (control->only >= 0 && control->only != step) goto out;
    int number = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST);
    if (number < MAX_CALLS) {
        struct call *call = &control->calls[number];
        snprintf(call->name, sizeof call->name, "%s", name);
        call->step = step;
        call->local = local;
        snprintf(call->path, sizeof call->path, "%.*s", (int)sizeof call->path - 1, local ? full + strlen(root) : full);
    }
    if (!control->at) goto out;
    if (number != control->at && !(control->mode == FAIL_FROM_NOW_ON && number > control->at)) goto out;
    if (control->mode <= FAIL_FROM_NOW_ON) {
        if (control->network ? strncmp(full, "socket:", 7) : !local) goto out;
        fails = 1;
    }
    if (!control->hit) control->hit = number;
    if (fails) saved = control->error;
    else if (control->mode == KILL_HALFWAY && half) *half = 1;
    else die();
out:
    errno = saved;
    inside = 0;
    return fails;
}

#define REAL(type, name, ...)                                                                                 \
    static type (*real)(__VA_ARGS__);                                                                         \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPENS(function)                                                                                       \
    int function(const char *path, int flags, ...) {                                                          \
        va_list more;                                                                                         \
        va_start(more, flags);                                                                                \
        mode_t mode = va_arg(more, mode_t);                                                                   \
        va_end(more);                                                                                         \
        REAL(int, #function, const char *, int, ...);                                                         \
        return injects("open", AT_FDCWD, path, NULL) ? -1 : real(path, flags, mode);                          \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(function)                                                                                    \
    int function(int directory, const char *path, int flags, ...) {                                           \
        va_list more;                                                                                         \
        va_start(more, flags);                                                                                \
        mode_t mode = va_arg(more, mode_t);                                                                   \
        va_end(more);                                                                                         \
        REAL(int, #function, int, const char *, int, ...);                                                    \
        return injects("open", directory, path, NULL) ? -1 : real(directory, path, flags, mode);              \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

#define READS(function, name, rest, pass)                                                                     \
    ssize_t function(int fd, void *to, size_t size rest) {                                                    \
        REAL(ssize_t, #function, int, void *, size_t rest);                                                   \
        return injects(name, fd, NULL, NULL) ? -1 : real(fd, to, size pass);                                  \
    }
#define NONE
#define COMMA ,
READS(read, "read", NONE, NONE)
READS(pread, "read", COMMA off_t at, COMMA at)
READS(pread64, "read", COMMA off_t at, COMMA at)
READS(recv, "recv", COMMA int flags, COMMA flags)

#define WRITES(function, name, rest, pass)                                                                    \
    ssize_t function(int fd, const void *from, size_t size rest) {                                            \
        REAL(ssize_t, #function, int, const void *, size_t rest);                                             \
        int half = 0;                                                                                         \
        if (injects(name, fd, NULL, &half)) return -1;                                                        \
        if (!half) return real(fd, from, size pass);                                                          \
        real(fd, from, size / 2 pass);                                                                        \
        die();                                                                                                \
        return -1;                                                                                            \
    }
WRITES(write, "write", NONE, NONE)
WRITES(pwrite, "write", COMMA off_t at, COMMA at)
WRITES(pwrite64, "write", COMMA off_t at, COMMA at)
WRITES(send, "send", COMMA int flags, COMMA flags)

#define ON_DESCRIPTOR(function, rest, pass)                                                                   \
    int function(int fd rest) {                                                                               \
        REAL(int, #function, int rest);                                                                       \
        return injects(#function, fd, NULL, NULL) ? -1 : real(fd pass);                                       \
    }
ON_DESCRIPTOR(fsync, NONE, NONE)
ON_DESCRIPTOR(fdatasync, NONE, NONE)
ON_DESCRIPTOR(ftruncate, COMMA off_t size, COMMA size)
ON_DESCRIPTOR(ftruncate64, COMMA off_t size, COMMA size)
ON_DESCRIPTOR(fstat, COMMA struct stat * to, COMMA to)
ON_DESCRIPTOR(fstat64, COMMA struct stat64 * to, COMMA to)
ON_DESCRIPTOR(fstatvfs, COMMA struct statvfs * to, COMMA to)
ON_DESCRIPTOR(fstatvfs64, COMMA struct statvfs64 * to, COMMA to)
ON_DESCRIPTOR(connect, COMMA const struct sockaddr *to COMMA socklen_t size, COMMA to COMMA size)

/* A close that fails has closed the descriptor nevertheless. */
int close(int fd) {
    REAL(int, "close", int);
    int fails = injects("close", fd, NULL, NULL), error = errno, result = real(fd);
    if (!fails) return result;
    errno = error;
    return -1;
}

#define ON_NAME_AT(function, name, rest, pass)                                                                \
    int function(int directory, const char *path rest) {                                                      \
        REAL(int, #function, int, const char * rest);                                                         \
        return injects(name, directory, path, NULL) ? -1 : real(directory, path pass);                        \
    }
ON_NAME_AT(mkdirat, "mkdir", COMMA mode_t mode, COMMA mode)
ON_NAME_AT(unlinkat, "unlink", COMMA int flags, COMMA flags)
ON_NAME_AT(fstatat, "stat", COMMA struct stat * to COMMA int flags, COMMA to COMMA flags)
ON_NAME_AT(fstatat64, "stat", COMMA struct stat64 * to COMMA int flags, COMMA to COMMA flags)

#define ON_NAME(function, name, rest, pass)                                                                   \
    int function(const char *path rest) {                                                                     \
        REAL(int, #function, const char * rest);                                                              \
        return injects(name, AT_FDCWD, path, NULL) ? -1 : real(path pass);                                    \
    }
ON_NAME(unlink, "unlink", NONE, NONE)
ON_NAME(stat, "stat", COMMA struct stat * to, COMMA to)
ON_NAME(stat64, "stat", COMMA struct stat64 * to, COMMA to)
ON_NAME(lstat, "stat", COMMA struct stat * to, COMMA to)
ON_NAME(lstat64, "stat", COMMA struct stat64 * to, COMMA to)
ON_NAME(access, "access", COMMA int mode, COMMA mode)

int renameat(int from, const char *old, int to, const char *new) {
    REAL(int, "renameat", int, const char *, int, const char *);
    return injects("rename", from, old, NULL) ? -1 : real(from, old, to, new);
}

int renameat2(int from, const char *old, int to, const char *new, unsigned int flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned int);
    return injects("rename", from, old, NULL) ? -1 : real(from, old, to, new, flags);
}

DIR *fdopendir(int fd) {
    REAL(DIR *, "fdopendir", int);
    return injects("opendir", fd, NULL, NULL) ? NULL : real(fd);
}

#define READS_ENTRIES(function, type)                                                                         \
    type *function(DIR *directory) {                                                                          \
        REAL(type *, #function, DIR *);                                                                       \
        return injects("readdir", dirfd(directory), NULL, NULL) ? NULL : real(directory);                     \
    }
READS_ENTRIES(readdir, struct dirent)
READS_ENTRIES(readdir64, struct dirent64)

int fcntl64(int fd, int command, ...) {
    va_list more;
    va_start(more, command);
    void *argument = va_arg(more, void *);
    va_end(more);
    REAL(int, "fcntl64", int, int, ...);
    int watched = command == F_DUPFD_CLOEXEC || command == F_SETLK;
    return watched && injects(command == F_SETLK ? "lock" : "dup", fd, NULL, NULL) ? -1 : real(fd, command, argument);
}

int clock_gettime(clockid_t clock, struct timespec *to) {
    REAL(int, "clock_gettime", clockid_t, struct timespec *);
    int result = real(clock, to);
    if (!result && control && clock == CLOCK_REALTIME) to->tv_sec += control->clock_ahead;
    return result;
}
