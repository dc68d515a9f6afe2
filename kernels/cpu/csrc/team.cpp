#include "team.h"

// The threads that a parallel region gets, each counted after a barrier that all of them passed.
extern "C" int ml_team_size() {
    std::atomic<int> counted{0};
    parallel([&](const Team& team) {
        team.wait();
        counted.fetch_add(1, std::memory_order_relaxed);
        team.wait();
    });
    return counted.load();
}

// Thread i of the team runs on processor cpus[i] alone from now on. 0, or 1 when the team has not `count` threads
// or the system refuses; then some may be bound.
extern "C" int ml_bind_team(const int32_t* cpus, int64_t count) {
#if defined(__linux__)
    std::atomic<int> refused{0};
    parallel([&](const Team& team) {
        cpu_set_t one;
        CPU_ZERO(&one);
        if (team.size == count) CPU_SET(cpus[team.tid], &one);
        if (team.size != count || sched_setaffinity(0, sizeof one, &one) != 0) refused.store(1);
    });
    return refused.load();
#else
    (void)cpus, (void)count;
    return 1;
#endif
}
