#include "workers.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "os.h"

namespace bn::workers {
namespace {

thread_local bool in_call = false;

class Team {
  public:
    bool try_run(int wanted, Work work, void *context) noexcept {
        std::unique_lock<std::mutex> call(calls, std::try_to_lock);
        if (!call) return false;
        grow(wanted - 1);
        const int count = std::min(wanted, static_cast<int>(threads.size()) + 1);
        {
            std::lock_guard<std::mutex> lock(mutex);
            current = {work, context, count};
            left = count - 1;
            ++round;
        }
        begin.notify_all();
        in_call = true;
        work(context, 0, count);
        in_call = false;
        std::unique_lock<std::mutex> lock(mutex);
        end.wait(lock, [this] { return left == 0; });
        return true;
    }

  private:
    struct Job {
        Work work = nullptr;
        void *context = nullptr;
        int count = 0;
    };

    void grow(int wanted) noexcept {
        try {
            const os::WithoutSignals quiet;
            while (static_cast<int>(threads.size()) < wanted) {
                threads.reserve(threads.size() + 1);
                const int number = static_cast<int>(threads.size()) + 1;
                threads.emplace_back([this, number, seen = round] { serve(number, seen); });
            }
        } catch (...) {  // as many as there are
        }
    }

    void serve(int number, unsigned long seen) {
        in_call = true;
        for (;;) {
            Job job;
            {
                std::unique_lock<std::mutex> lock(mutex);
                begin.wait(lock, [&] { return round != seen; });
                seen = round;
                job = current;
            }
            if (number >= job.count) continue;
            job.work(job.context, number, job.count);
            std::lock_guard<std::mutex> lock(mutex);
            if (--left == 0) end.notify_one();
        }
    }

    std::mutex calls, mutex;
    std::condition_variable begin, end;
    std::vector<std::thread> threads;  // written by the one call at a time, as `round` is
    Job current;
    int left = 0;
    unsigned long round = 0;
};

Team *team = nullptr;  // never destroyed: its threads wait in it until the process ends
std::once_flag *made = new std::once_flag;

}  // namespace

void run(int threads, Work work, void *context) noexcept {
    if (!in_call) {
        try {
            std::call_once(*made, [] { team = new Team; });
            if (team->try_run(threads, work, context)) return;
        } catch (...) {
        }
    }
    work(context, 0, 1);
}

bool inside() noexcept { return in_call; }

void forget_after_fork() noexcept {
    // what the parent's threads held stays as it was at the fork: it is left alone
    team = nullptr;
    if (std::once_flag *fresh = new (std::nothrow) std::once_flag) made = fresh;
    in_call = false;
}

}  // namespace bn::workers
