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
