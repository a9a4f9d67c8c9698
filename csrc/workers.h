// A team of our own, for where the framework's is not to be had.
#pragma once

namespace bn::workers {

using Work = void (*)(void *context, int thread, int threads);  // must not throw

// Runs `work` on up to `threads` threads, this one among them. Inside such a call, while another thread is in one, and
// where the system gives no thread, on fewer.
void run(int threads, Work work, void *context) noexcept;
bool inside() noexcept;          // on one of these threads, or in a call
void forget_after_fork() noexcept;  // a forked child has none of its parent's threads: new ones are made when wanted

}  // namespace bn::workers
