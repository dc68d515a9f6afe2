// device.h for the CPU: every thread of a cluster is a fiber, run until it waits. For tests, not for speed.
//
// Warps run in an order that is chosen (first to last, last to first, drawn), each as far as it gets before another is
// let on: a barrier that is missing lets a thread read what nobody has written yet. Shared memory begins as NaN, and is
// NaN again when its block has ended. What a GPU would not forgive is an error here: threads that wait at different barriers or for one that has ended, memory
// at addresses that are not aligned, and, once ranges are allowed, memory outside of them.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <utility>
#include <vector>

#define ML_DEVICE inline
#define ML_KERNEL(threads, blocks) void
#define ML_SHARED(Type, name) Type& name = *static_cast<Type*>(ml::emulated::Machine::now().shared(sizeof(Type)))
#define ML_UNROLL
#define ML_ROLL

namespace ml {
namespace emulated {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t SHARED_BYTES = 227 << 10;

enum Order { FORWARD, BACKWARD };  // of warps and of their lanes; any larger number is the seed of a drawn one

// A count of threads that must all come, as often as they like. One that waits for a turn waits for `passed`.
struct Barrier {
    int size = 0, came = 0, line = 0;
    uint64_t passed = 0;
};

struct Fiber {
    int block, thread;  // in its cluster, in its block
    ucontext_t context;
    jmp_buf place;
    bool has_place = false, is_done = true;
    const Barrier* barrier = nullptr;  // null: not waiting
    uint64_t until = 0;
    uint64_t arrived = 0;  // the turn of the cluster's barrier at which it has arrived and not yet waited; 0: none
    uint64_t products = 0;
};

struct Operands {
    uint32_t a[4], b[2];
};

struct Warp {
    Barrier barrier;
    Operands given[2][WARP];  // of the product under way and of the next
};

// One cluster's threads, blocks and memory; clusters run one after the other.
class Machine {
public:
    static Machine& now() {
        static Machine machine;
        return machine;
    }

    int order = FORWARD;
    std::vector<std::pair<const char*, size_t>> allowed;  // none: any memory
    std::function<void()> on_grid_wait;                   // called at the first
    std::string error;
    int cluster_index = 0, cluster_count = 0;

    Fiber& self() { return *self_; }
    Warp& warp_of(const Fiber& fiber) { return warps_[(fiber.block * threads_ + fiber.thread) / WARP]; }
    int size() const { return size_; }

    // Run `kernel` in every thread of all clusters. Not 0: `error` says why it was given up.
    int run(const std::function<void()>& kernel, int clusters, int size, int threads) {
        const std::lock_guard<std::mutex> one_at_a_time(mutex_);
        error.clear();
        prepare(size, threads);
        cluster_count = clusters;
        for (int i = 0; i < clusters && error.empty(); ++i) {
            cluster_index = order == BACKWARD ? clusters - 1 - i : i;
            run_cluster(kernel);
        }
        on_grid_wait = nullptr;
        return error.empty() ? 0 : 1;
    }

    void* shared(size_t bytes) {
        if (bytes > SHARED_BYTES) fail("a block needs " + std::to_string(bytes) + " bytes of shared memory");
        return memory_of(self_->block);
    }

    const void* shared_of(int block, const void* mine) {
        const ptrdiff_t offset = static_cast<const char*>(mine) - memory_of(self_->block);
        if (offset < 0 || offset >= static_cast<ptrdiff_t>(SHARED_BYTES) || block < 0 || block >= size_)
            fail("an address that is not in shared memory, or block " + std::to_string(block) + " of a cluster");
        return memory_of(block) + offset;
    }

    void arrive(Barrier& barrier, int line) {
        if (barrier.came == 0) barrier.line = line;
        if (barrier.line != line)
            fail("threads wait at different barriers: lines " + std::to_string(barrier.line) + " and " +
                 std::to_string(line));
        if (++barrier.came == barrier.size) barrier.came = 0, ++barrier.passed;
    }

    void wait(const Barrier& barrier, uint64_t until) {
        if (barrier.passed >= until) return;
        self_->barrier = &barrier, self_->until = until;
        to_scheduler();
        self_->barrier = nullptr;
    }

    void arrive_and_wait(Barrier& barrier, int line) {
        const uint64_t until = barrier.passed + 1;
        arrive(barrier, line);
        wait(barrier, until);
    }

    Barrier& block_barrier() { return blocks_[self_->block]; }
    Barrier& cluster_barrier() { return cluster_; }

    void check(const void* at, size_t bytes) {
        const char* first = static_cast<const char*>(at);
        if (reinterpret_cast<uintptr_t>(at) % bytes) fail("an address that is no multiple of " + std::to_string(bytes));
        if (allowed.empty()) return;
        for (const auto& range : allowed)
            if (first >= range.first && first + bytes <= range.first + range.second) return;
        fail("memory outside of what is allowed: " + std::to_string(bytes) + " bytes");
    }

    [[noreturn]] void fail(const std::string& what) {
        if (error.empty())
            error = what + " (block " + std::to_string(self_->block) + ", thread " + std::to_string(self_->thread) + ")";
        is_broken_ = true;
        to_scheduler();
        std::abort();  // nobody comes back to a fiber that has failed
    }

private:
    std::mutex mutex_;
    int size_ = 0, threads_ = 0;
    bool is_broken_ = false;
    std::deque<Fiber> fibers_;
    std::vector<Warp> warps_;
    std::vector<Barrier> blocks_;
    Barrier cluster_;
    std::vector<char> memory_;
    std::vector<int> left_;  // by block: threads that have not ended
    char* stacks_ = nullptr;
    size_t stack_bytes_ = 0;
    Fiber* self_ = nullptr;
    jmp_buf scheduler_;
    const std::function<void()>* kernel_ = nullptr;

    void forget(int block) { std::memset(memory_of(block), 0xff, SHARED_BYTES); }

    char* memory_of(int block) { return memory_.data() + static_cast<size_t>(block) * SHARED_BYTES; }

    void prepare(int size, int threads) {
        if (size == size_ && threads == threads_ && !is_broken_) return;
        size_ = size, threads_ = threads, is_broken_ = false;
        const size_t count = static_cast<size_t>(size) * threads;
        if (stacks_ != nullptr) munmap(stacks_, stack_bytes_);
        stack_bytes_ = count * STACK_BYTES;
        stacks_ = static_cast<char*>(mmap(nullptr, stack_bytes_, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        memory_.assign(static_cast<size_t>(size) * SHARED_BYTES, 0);
        warps_.assign(count / WARP, {});
        blocks_.assign(size, {});
        fibers_.clear();
        for (size_t i = 0; i < count; ++i) {
            fibers_.emplace_back();
            Fiber& fiber = fibers_.back();
            fiber.block = static_cast<int>(i) / threads, fiber.thread = static_cast<int>(i) % threads;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = stacks_ + i * STACK_BYTES;
            fiber.context.uc_stack.ss_size = STACK_BYTES;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, body, 0);
        }
    }

    // A fiber's whole life: the kernel, again for each cluster.
    static void body() {
        Machine& machine = now();
        for (;;) {
            (*machine.kernel_)();
            machine.self_->is_done = true;
            if (--machine.left_[machine.self_->block] == 0) machine.forget(machine.self_->block);
            machine.to_scheduler();
        }
    }

    void to_scheduler() {
        Fiber* mine = self_;
        mine->has_place = true;
        if (_setjmp(mine->place) == 0) _longjmp(scheduler_, 1);
    }

    void resume(Fiber& fiber) {
        self_ = &fiber;
        if (_setjmp(scheduler_) != 0) return;
        if (fiber.has_place) _longjmp(fiber.place, 1);
        setcontext(&fiber.context);
    }

    void run_cluster(const std::function<void()>& kernel) {
        kernel_ = &kernel;
        left_.assign(size_, threads_);
        for (int block = 0; block < size_; ++block) forget(block);
        cluster_ = {}, cluster_.size = size_ * threads_;
        for (Barrier& barrier : blocks_) barrier = {}, barrier.size = threads_;
        for (Warp& warp : warps_) warp.barrier = {}, warp.barrier.size = WARP;
        for (Fiber& fiber : fibers_)
            fiber.is_done = false, fiber.barrier = nullptr, fiber.arrived = 0, fiber.products = 0;
        std::mt19937 drawn(static_cast<unsigned>(order) * 7919u + static_cast<unsigned>(cluster_index));
        while (error.empty() && run_some_warp(drawn)) {
        }
        for (Fiber& fiber : fibers_) {
            if (!error.empty()) return;
            if (fiber.is_done) continue;
            self_ = &fiber;
            error = "threads have ended that others wait for: block " + std::to_string(fiber.block) + ", thread " +
                    std::to_string(fiber.thread) + " waits at line " + std::to_string(fiber.barrier->line) + " with " +
                    std::to_string(fiber.barrier->came) + " of " + std::to_string(fiber.barrier->size);
            is_broken_ = true;
        }
    }

    static bool is_ready(const Fiber& fiber) {
        return !fiber.is_done && (fiber.barrier == nullptr || fiber.barrier->passed >= fiber.until);
    }

    // Let the first warp that can go on do so, its lanes one after the other. False: there is none.
    bool run_some_warp(std::mt19937& drawn) {
        const size_t count = warps_.size(), shift = order > BACKWARD ? drawn() % count : 0;
        for (size_t i = 0; i < count; ++i) {
            const size_t warp = order == BACKWARD ? count - 1 - i : (i + shift) % count;
            bool has_run = false;
            const size_t turn = order > BACKWARD ? drawn() % WARP : 0;
            for (size_t j = 0; j < WARP; ++j) {
                const size_t lane = order == BACKWARD ? WARP - 1 - j : (j + turn) % WARP;
                Fiber& fiber = fibers_[warp * WARP + lane];
                if (!is_ready(fiber)) continue;
                resume(fiber);
                has_run = true;
                if (!error.empty()) return false;
            }
            if (has_run) return true;
        }
        return false;
    }
};

}  // namespace emulated

inline int thread_of_block() { return emulated::Machine::now().self().thread; }

template <class Value>
inline Value* made_here(Value* address) {
    return address;
}

template <class Value>
inline Value load(const Value* from) {
    emulated::Machine::now().check(from, sizeof(Value));
    Value value;
    std::memcpy(&value, from, sizeof(Value));
    return value;
}

template <int N>
inline Words<N> load_constant(const uint16_t* from) {
    return load(reinterpret_cast<const Words<N>*>(from));
}

template <class Value>
inline void store(uint16_t* to, const Value& value) {
    emulated::Machine::now().check(to, sizeof(Value));
    std::memcpy(to, &value, sizeof(Value));
}

inline void prefetch(const uint16_t* at) { emulated::Machine::now().check(at, sizeof(uint16_t)); }

template <class To, class From>
inline To same_bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

inline float float_of_bits(int32_t bits) { return same_bits<float>(bits); }

template <class T>
inline float number_of(uint16_t bits);

template <>
inline float number_of<Bf16>(uint16_t bits) {
    return same_bits<float>(static_cast<uint32_t>(bits) << 16);
}

template <>
inline float number_of<Fp16>(uint16_t bits) {
    return static_cast<float>(same_bits<_Float16>(bits));
}

template <class T>
inline uint16_t bits_of(float value);

template <>
inline uint16_t bits_of<Bf16>(float value) {
    const uint32_t bits = same_bits<uint32_t>(value);
    if (value != value) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <>
inline uint16_t bits_of<Fp16>(float value) {
    return same_bits<uint16_t>(static_cast<_Float16>(value));
}

template <class T>
inline Pair unpack(uint32_t word) {
    return {number_of<T>(static_cast<uint16_t>(word)), number_of<T>(static_cast<uint16_t>(word >> 16))};
}

template <class T>
inline uint32_t pack(float first, float second) {
    return bits_of<T>(first) | static_cast<uint32_t>(bits_of<T>(second)) << 16;
}

// Each lane gives its operands, waits for the others', and sums what is its own. The operands of the product before
// may still be read meanwhile, those of the one before that may not.
template <class T>
inline void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
    emulated::Machine& machine = emulated::Machine::now();
    emulated::Fiber& self = machine.self();
    emulated::Warp& warp = machine.warp_of(self);
    emulated::Operands* given = warp.given[self.products++ % 2];
    const int lane = self.thread % WARP;
    std::memcpy(given[lane].a, a, sizeof(a));
    std::memcpy(given[lane].b, b, sizeof(b));
    machine.arrive_and_wait(warp.barrier, line);
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k += 2) {
            const Pair left = unpack<T>(given[row * 4 + k % 8 / 2].a[i / 2 + k / 8 * 2]);
            const Pair right = unpack<T>(given[column * 4 + k % 8 / 2].b[k / 8]);
            sum[i] += left.first * right.first;
            sum[i] += left.second * right.second;
        }
    }
}

inline void block_wait(int line = __builtin_LINE()) {
    emulated::Machine& machine = emulated::Machine::now();
    machine.arrive_and_wait(machine.block_barrier(), line);
}

template <int CLUSTER>
inline int rank_in_cluster() {
    return emulated::Machine::now().self().block;
}

template <int CLUSTER>
inline int cluster_of_grid() {
    return emulated::Machine::now().cluster_index;
}

template <int CLUSTER>
inline int clusters_of_grid() {
    return emulated::Machine::now().cluster_count;
}

inline void cluster_arrive(int line = __builtin_LINE()) {
    emulated::Machine& machine = emulated::Machine::now();
    if (machine.size() == 1) return;  // as on a GPU without clusters
    if (machine.self().arrived) machine.fail("a thread arrives twice and has not waited between");
    machine.self().arrived = machine.cluster_barrier().passed + 1;
    machine.arrive(machine.cluster_barrier(), line);
}

inline void cluster_wait() {
    emulated::Machine& machine = emulated::Machine::now();
    if (machine.size() == 1) return;
    if (!machine.self().arrived) machine.fail("a thread waits for a cluster at which it has not arrived");
    machine.wait(machine.cluster_barrier(), std::exchange(machine.self().arrived, 0));
}

inline Pair load_from(const Pair* mine, int rank) {
    return *static_cast<const Pair*>(emulated::Machine::now().shared_of(rank, mine));
}

inline void grid_wait() {
    const auto once = std::exchange(emulated::Machine::now().on_grid_wait, nullptr);
    if (once) once();
}

template <class Args>
int launch(void (*kernel)(Args), const Args& args, int clusters, int cluster, int threads, bool, void*) {
    return emulated::Machine::now().run([&] { kernel(args); }, clusters, cluster, threads);
}

template <class Args>
int resident_clusters(void (*)(Args), int, int) {
    return 3;
}

inline const char* error_text(int) { return emulated::Machine::now().error.c_str(); }

}  // namespace ml

extern "C" {

// 0 forward, 1 backward, else the seed of a drawn order.
inline __attribute__((used)) void ml_emulated_order(int order) { ml::emulated::Machine::now().order = order; }

// From now on only memory in allowed ranges may be touched; no range at all: any may.
inline __attribute__((used)) void ml_emulated_allow(const void* first, int64_t bytes) {
    ml::emulated::Machine::now().allowed.emplace_back(static_cast<const char*>(first), static_cast<size_t>(bytes));
}
inline __attribute__((used)) void ml_emulated_allow_all() { ml::emulated::Machine::now().allowed.clear(); }

// In the next launch `to` gets its contents when the first thread waits for the kernels before it.
inline __attribute__((used)) void ml_emulated_late(void* to, const void* from, int64_t bytes) {
    ml::emulated::Machine& machine = ml::emulated::Machine::now();
    machine.on_grid_wait = [to, from, bytes, before = std::move(machine.on_grid_wait)] {
        if (before) before();
        std::memcpy(to, from, static_cast<size_t>(bytes));
    };
}
}
