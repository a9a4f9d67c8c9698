// What differs between operating systems, and nothing else does.
#pragma once
#include <cstddef>

namespace bn::os {

// Zeroed pages, in large ones where there are such and `alignment` is theirs; nullptr: there is no memory.
void *map(size_t bytes, size_t alignment) noexcept;
void unmap(void *p, size_t bytes) noexcept;
size_t memory();               // bytes that this process may have: the machine's, or the container's
size_t cache_size(int level);  // of the first processor; 0 where it is not known

void *symbol(const char *name);  // a function of a library that is already loaded, or nullptr

// Called around a fork of this process; where there is no fork, never.
void at_fork(void (*before)(), void (*parent)(), void (*child)()) noexcept;

// While it lives, threads that this one makes get no signals.
class WithoutSignals {
  public:
    WithoutSignals() noexcept;
    ~WithoutSignals();
    WithoutSignals(const WithoutSignals &) = delete;
    void operator=(const WithoutSignals &) = delete;

  private:
    alignas(8) unsigned char before[128];  // sigset_t
};

// How many processes of this user hold a seat now, this one among them: who holds one shares what there is for all.
// A seat is given up when a process ends, however it ends. Where seats cannot be kept, 1.
int take_seat() noexcept;
void leave_seat() noexcept;

}  // namespace bn::os
