// Threads that run kernels together: every kernel is called by each thread of a team with the same
// arguments and takes its share by (tid, size). Between two kernels of which the second reads what the
// first wrote, callers put team.wait(); a kernel leaves no barrier behind.
#pragma once

#include <omp.h>
#include <sched.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

inline void cpu_relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Sleep until woken if *word is still `value`; wake whoever sleeps on it. Elsewhere than on Linux: yield.
inline void sleep_while(const std::atomic<uint32_t>* word, uint32_t value) {
#if defined(__linux__)
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
    (void)word, (void)value;
    sched_yield();
#endif
}

inline void wake_all(const std::atomic<uint32_t>* word) {
#if defined(__linux__)
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#else
    (void)word;
#endif
}

// All threads arrive before any goes on. Spins for some tens of microseconds, then sleeps: on a machine with
// fewer free cores than threads the one that is late gets the processor, and the sleeper is woken at once.
class Barrier {
public:
    void wait(int size) {
        const uint32_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_seq_cst);
            if (sleepers_.load(std::memory_order_seq_cst) > 0) wake_all(&phase_);
            return;
        }
        for (int spins = 0; spins < kSpins; ++spins) {
            if (phase_.load(std::memory_order_acquire) != phase) return;
            cpu_relax();
        }
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        while (phase_.load(std::memory_order_seq_cst) == phase) sleep_while(&phase_, phase);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }

private:
    static constexpr int kSpins = 2000;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    std::atomic<int> sleepers_{0};
};

struct Team {
    int tid;
    int size;
    Barrier* barrier;

    void wait() const {
        if (size > 1) barrier->wait(size);
    }
};

// This thread's share [begin, end) of `count` equal items, in blocks of `grain` (0 or more blocks each).
struct Range {
    int64_t begin, end;
};

inline Range share(const Team& team, int64_t count, int64_t grain = 1) {
    const int64_t blocks = (count + grain - 1) / grain;
    const int64_t first = blocks * team.tid / team.size, last = blocks * (team.tid + 1) / team.size;
    return {std::min(first * grain, count), std::min(last * grain, count)};
}

// Calls f(team) on every thread of OpenMP's pool (torch's: torch.set_num_threads governs its size);
// on the calling thread alone where that is one thread or a team is running already.
template <class F>
void parallel(F&& f) {
    if (omp_get_max_threads() == 1 || omp_in_parallel()) {
        f(Team{0, 1, nullptr});
        return;
    }
    Barrier barrier;
#pragma omp parallel
    f(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
}
