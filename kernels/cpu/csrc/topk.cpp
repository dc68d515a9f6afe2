#include "topk.h"

#include <vector>

namespace {

constexpr int64_t kBlock = 128;

// Keys as integers that order as the floats do; both zeros are 0.
inline int16_t key_of(bf16 value) {
    const int16_t bits = static_cast<int16_t>(value);
    return static_cast<int16_t>(bits < 0 ? -(bits & 0x7fff) : bits);
}

int16_t max_key(const bf16* values, int64_t count) {
    int16_t best = INT16_MIN;
    for (int64_t i = 0; i < count; ++i) best = std::max(best, key_of(values[i]));
    return best;
}

bool has_nan(const bf16* values, int64_t count) {
    uint16_t largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max<uint16_t>(largest, values[i] & 0x7fff);
    return largest > 0x7f80;
}

int64_t first_best(const bf16* row, int64_t n) {
    int16_t best = INT16_MIN;
    int64_t block = 0;
    for (int64_t i = 0; i < n; i += kBlock) {
        const int64_t count = std::min(kBlock, n - i);
        if (has_nan(row + i, count)) return -1;
        const int16_t key = max_key(row + i, count);
        if (key > best) {
            best = key;
            block = i;
        }
    }
    while (key_of(row[block]) != best) ++block;
    return block;
}

struct Entry {
    int16_t key;
    int64_t id;
};

inline bool is_better(const Entry& a, const Entry& b) { return a.key != b.key ? a.key > b.key : a.id < b.id; }

// A heap of the k best so far, the worst of them on top; blocks with nothing above that one are passed over.
void best_of_row(const bf16* row, int64_t n, int64_t k, int64_t* ids) {
    static thread_local std::vector<Entry> heap;
    heap.clear();
    for (int64_t i = 0; i < n; i += kBlock) {
        const int64_t count = std::min(kBlock, n - i);
        if (has_nan(row + i, count)) {
            std::fill(ids, ids + k, -1);
            return;
        }
        const bool is_full = static_cast<int64_t>(heap.size()) == k;
        if (is_full && max_key(row + i, count) <= heap.front().key) continue;
        for (int64_t j = i; j < i + count; ++j) {
            const Entry entry{key_of(row[j]), j};
            if (static_cast<int64_t>(heap.size()) == k) {
                if (entry.key <= heap.front().key) continue;
                std::pop_heap(heap.begin(), heap.end(), is_better);
                heap.pop_back();
            }
            heap.push_back(entry);
            std::push_heap(heap.begin(), heap.end(), is_better);
        }
    }
    std::sort_heap(heap.begin(), heap.end(), is_better);
    for (int64_t i = 0; i < k; ++i) ids[i] = heap[i].id;
}

}  // namespace

void argmax(const Team& team, const TopkArgs& a) {
    const Range rows = share(team, a.rows);
    for (int64_t r = rows.begin; r < rows.end; ++r) a.ids[r] = first_best(a.logits + r * a.stride, a.n);
}

void topk(const Team& team, const TopkArgs& a) {
    const Range rows = share(team, a.rows);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
        best_of_row(a.logits + r * a.stride, a.n, a.k, a.ids + r * a.k);
    }
}

extern "C" int ml_argmax(const TopkArgs* args) {
    parallel([&](const Team& team) { argmax(team, *args); });
    return 0;
}

extern "C" int ml_topk(const TopkArgs* args) {
    parallel([&](const Team& team) { topk(team, *args); });
    return 0;
}
