// Linux and macOS.
#if !defined(_WIN32)
#include "os.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace bn::os {
namespace {

#if defined(__APPLE__)
size_t told(const char *name) {
    uint64_t value = 0;
    size_t length = sizeof value;
    return sysctlbyname(name, &value, &length, nullptr, 0) == 0 ? static_cast<size_t>(value) : 0;
}
#else
size_t asked(int name) {
    const long value = sysconf(name);
    return value > 0 ? static_cast<size_t>(value) : 0;
}

// What Linux lists for the first processor. The C library's figure for the last level is not always that of one
// cache: 320 MiB where there are 32.
size_t listed(int wanted) {
    for (int index = 0; index < 8; ++index) {
        const auto read = [index](const char *what, const char *format, auto *value) {
            char path[96];
            std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/%s", index, what);
            FILE *f = std::fopen(path, "r");
            if (!f) return false;
            const bool good = std::fscanf(f, format, value) == 1;
            std::fclose(f);
            return good;
        };
        int level = 0;
        unsigned long kib = 0;
        char type = 0;
        if (!read("level", "%d", &level)) return 0;
        if (level == wanted && read("type", "%c", &type) && type != 'I' && read("size", "%luK", &kib)) return kib << 10;
    }
    return 0;
}
#endif

}  // namespace

void *map(size_t bytes, size_t alignment) noexcept {
    const size_t room = bytes + alignment;
    void *raw = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) return nullptr;
    char *start = static_cast<char *>(raw);
    char *aligned = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(start) + alignment - 1) & ~(alignment - 1));
    if (aligned > start) munmap(start, static_cast<size_t>(aligned - start));
    if (char *end = aligned + bytes; end < start + room) munmap(end, static_cast<size_t>(start + room - end));
#if defined(MADV_HUGEPAGE)
    madvise(aligned, bytes, MADV_HUGEPAGE);
#endif
    return aligned;
}

void unmap(void *p, size_t bytes) noexcept { munmap(p, bytes); }

size_t memory() {
#if defined(__APPLE__)
    size_t bytes = told("hw.memsize");
#else
    size_t bytes = asked(_SC_PHYS_PAGES) * asked(_SC_PAGESIZE);
    // a container's own limit, version 2 and version 1 of control groups
    for (const char *path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
        if (FILE *f = std::fopen(path, "r")) {
            unsigned long long limit = 0;
            if (std::fscanf(f, "%llu", &limit) == 1 && limit && (!bytes || limit < bytes)) bytes = static_cast<size_t>(limit);
            std::fclose(f);
        }
    }
#endif
    return bytes ? bytes : size_t{4} << 30;
}

size_t cache_size(int level) {
#if defined(__APPLE__)
    return told(level == 2 ? "hw.l2cachesize" : "hw.l3cachesize");
#else
    size_t bytes = listed(level);
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (!bytes) bytes = level == 2 ? asked(_SC_LEVEL2_CACHE_SIZE) : std::min(asked(_SC_LEVEL3_CACHE_SIZE), size_t{32} << 20);
#endif
    return bytes;
#endif
}

void *symbol(const char *name) { return dlsym(RTLD_DEFAULT, name); }

void at_fork(void (*before)(), void (*parent)(), void (*child)()) noexcept { pthread_atfork(before, parent, child); }

WithoutSignals::WithoutSignals() noexcept {
    static_assert(sizeof(sigset_t) <= sizeof before);
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    std::memcpy(before, &old, sizeof old);
}
WithoutSignals::~WithoutSignals() {
    sigset_t old;
    std::memcpy(&old, before, sizeof old);
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
}

// A seat is a lock on one byte of a file: the system lets go of it with the process, and a forked child has none.
namespace {

constexpr off_t seats = 1024;
int table = -1;    // never closed: to close any descriptor of the file gives up this process's locks
bool tried = false;
off_t mine = -1;
pid_t owner = 0;

struct flock lock_of(short type, off_t begin, off_t count) {
    struct flock l {};
    l.l_type = type;
    l.l_whence = SEEK_SET;
    l.l_start = begin;
    l.l_len = count;
    return l;
}

int open_table() {
    for (const char *where : {"/dev/shm", "/tmp"}) {
        char path[64];
        std::snprintf(path, sizeof path, "%s/batchnorm-pool-%lu", where, static_cast<unsigned long>(geteuid()));
        const int f = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (f < 0) continue;
        struct stat s;
        if (fstat(f, &s) == 0 && S_ISREG(s.st_mode) && s.st_uid == geteuid()) return f;
        close(f);
    }
    return -1;
}

// one's own locks are not told; of the others' any one, not the first
int held_by_others(off_t begin, off_t end) {
    if (begin >= end) return 0;
    struct flock l = lock_of(F_WRLCK, begin, end - begin);
    if (fcntl(table, F_GETLK, &l) != 0 || l.l_type == F_UNLCK || l.l_len <= 0) return 0;
    const off_t first = std::max(begin, l.l_start), last = std::min(end, l.l_start + l.l_len);
    return static_cast<int>(last - first) + held_by_others(begin, first) + held_by_others(last, end);
}

}  // namespace

int take_seat() noexcept {
    if (!tried) tried = true, table = open_table();
    if (table < 0) return 1;
    if (owner != getpid()) mine = -1, owner = getpid();
    for (off_t seat = getpid() % seats, tries = 0; mine < 0 && tries < seats; seat = (seat + 1) % seats, ++tries) {
        struct flock l = lock_of(F_WRLCK, seat, 1);
        if (fcntl(table, F_SETLK, &l) == 0) mine = seat;
    }
    return 1 + held_by_others(0, seats);
}

void leave_seat() noexcept {
    if (mine < 0 || owner != getpid()) return;
    struct flock l = lock_of(F_UNLCK, mine, 1);
    fcntl(table, F_SETLK, &l);
    mine = -1;
}

}  // namespace bn::os
#endif
