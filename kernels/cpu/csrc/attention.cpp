// Attention in tiles of (query rows x the heads of one KV head) over chunks of keys:
//
//     pack K of the chunk -> S = Q K^T -> P = e^(S - max), sums -> pack V -> P V -> merge with the chunks before
//
// Chunks start at multiples of kChunk positions whatever the tile, so a row's bits depend on its own query and
// keys alone: not on its neighbours, on how a prompt is cut into steps, or on the number of threads. A request with
// one row is split over its chunks too; their parts meet in scratch and are merged in the same order. Its few rows
// are not worth packing: attention_rows.h has its products, with the same sums.
#include "attention.h"

#include <cstdlib>
#include <limits>
#include <vector>

#include "attention_rows.h"
#include "simd.h"
#include "tiles.h"

namespace {

constexpr int64_t kChunk = 256;     // keys that go through one softmax
constexpr int64_t kTileRows = 64;   // query rows x heads of a prefill tile, about
constexpr int64_t kKeyCost = 12;    // reading and packing a key, in rows that use it
constexpr float kNone = -std::numeric_limits<float>::infinity();

inline int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// One thread's memory between calls; grows, never shrinks.
class Buffer {
public:
    ~Buffer() { std::free(memory_); }
    // At least `bytes`, 64-byte aligned, contents undefined.
    char* reserve(size_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = rounded_up(bytes, 4096);
            memory_ = static_cast<char*>(std::aligned_alloc(64, size_));
            if (!memory_) std::abort();
        }
        return memory_;
    }

private:
    char* memory_ = nullptr;
    size_t size_ = 0;
};

thread_local Buffer thread_buffer;

// Positions [lo, hi) of a request's keys.
struct Span {
    int64_t lo, hi;
};

// What a tile works in. R = rows of the largest tile, rounded up for the tile product.
struct Workspace {
    bf16* zeros;       // [head_dim], the row of a key that is not there
    bf16* keys;        // packed K [kChunk / 16][depth / 2][16][2], depth = head_dim rounded up
    bf16* values;      // packed V [head_dim / 16][kChunk / 2][16][2]
    bf16* queries;     // [R, depth]
    bf16* probs;       // [R, kChunk]
    float* scores;     // [R, kChunk]
    float* part;       // [R, head_dim] of this chunk
    float* sum;        // [R, head_dim] of all chunks so far
    float* part_max;   // [R], with part_total
    float* part_total;
    float* max;        // [R], with total
    float* total;

    Workspace(int64_t rows, int64_t head_dim) {
        const int64_t depth = rounded_up(head_dim, kTileDepth);
        const int64_t r = rounded_up(rows, 16) + kTileRowPadding;
        const int64_t floats = r * (kChunk + 2 * head_dim + 4);
        const int64_t halves = kChunk * (depth + head_dim) + r * (depth + kChunk);
        char* at = thread_buffer.reserve((halves + head_dim) * 2 + floats * 4 + 16 * 64);
        zeros = take<bf16>(at, head_dim);
        std::memset(zeros, 0, head_dim * 2);
        keys = take<bf16>(at, kChunk * depth);
        values = take<bf16>(at, kChunk * head_dim);
        queries = take<bf16>(at, r * depth);
        probs = take<bf16>(at, r * kChunk);
        scores = take<float>(at, r * kChunk);
        part = take<float>(at, r * head_dim);
        sum = take<float>(at, r * head_dim);
        for (float** vector : {&part_max, &part_total, &max, &total}) *vector = take<float>(at, r);
    }

    template <class T>
    static T* take(char*& at, int64_t count) {
        T* taken = reinterpret_cast<T*>(at);
        at += rounded_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return taken;
    }
};

// Query rows [first, first + count) of a request, with all heads of one KV head.
struct Tile {
    int64_t request, first, count, kv_head;
};

// A tile, with all its chunks (chunk -1) or with one, whose parts then go to `scratch`.
struct Item {
    Tile tile;
    int64_t chunk;
    float* scratch;
};

// Where the keys of one chunk lie: elements from a cache's start, for KV head 0.
struct Places {
    int64_t request = -1, chunk = -1;
    int64_t offsets[kChunk];
};

// Fetches the keys and values of the next chunk into the second-level cache, a few rows after each piece of work on
// this one: memory works while the processor does. Work is counted in about processor cycles.
class ReadAhead {
public:
    // Nothing to fetch until the next start.
    void stop() { key_ = end_ = 0; }

    // Keys `keys` of a chunk, with heads' rows of `width`, in the course of `work` units.
    void start(const bf16* k, const bf16* v, const int64_t* offsets, Span keys, int64_t width, int64_t work) {
        k_ = k, v_ = v, offsets_ = offsets, width_ = width;
        key_ = keys.lo, end_ = keys.hi;
        rows_per_unit_ = static_cast<float>(keys.hi - keys.lo) / static_cast<float>(work);
        due_ = static_cast<float>(keys.lo);
    }

    void did(int64_t work) {
        due_ += rows_per_unit_ * static_cast<float>(work);
        for (; key_ < end_ && static_cast<float>(key_) < due_; ++key_) {
            tiles::prefetch(k_ + offsets_[key_], width_);
            tiles::prefetch(v_ + offsets_[key_], width_);
        }
    }

private:
    const bf16* k_ = nullptr;
    const bf16* v_ = nullptr;
    const int64_t* offsets_ = nullptr;
    int64_t width_ = 0, key_ = 0, end_ = 0;
    float rows_per_unit_ = 0, due_ = 0;
};

class Attention {
public:
    explicit Attention(const AttentionArgs& args)
        : a(args),
          group(args.heads / args.kv_heads),
          tile_queries(std::max<int64_t>(1, kTileRows / group)),
          depth(rounded_up(args.head_dim, kTileDepth)),
          work(tile_queries * group, args.head_dim) {}

    int64_t queries_of(int64_t request) const { return a.query_starts[request + 1] - a.query_starts[request]; }
    // The position of the first row of a request in this step.
    int64_t start_of(int64_t request) const { return a.context_lens[request] - queries_of(request); }

    Span seen_by(int64_t position) const {
        return {a.sliding_window ? std::max<int64_t>(0, position + 1 - a.sliding_window) : 0, position + 1};
    }
    Span seen_by(const Tile& tile) const {
        const int64_t position = start_of(tile.request) + tile.first;
        return {seen_by(position).lo, position + tile.count};
    }

    // Everything but the result's rounding, for one tile and one chunk of keys, into part, part_max and part_total;
    // fetches what `next` (a tile and chunk, or null) will read.
    void attend_chunk(const Tile& tile, int64_t chunk, const Tile* next, int64_t next_chunk) {
        const Span keys = keys_of(tile, chunk);
        const int64_t begin = keys.lo / kTileKeys * kTileKeys, end = rounded_up(keys.hi, kTileKeys);
        const int64_t rows = tile.count * group, panels = (end - begin) / kPanel;
        const int64_t* offsets = locate(tile.request, chunk);
        if (is_direct(tile)) return attend_row(tile, offsets, keys);
        read_ahead(next, next_chunk, rows, panels);
        for (int64_t key = begin; key < end; key += kPanel) {
            pack_keys(offsets, tile.kv_head, key, keys);
            ahead.did(key_work());
        }
        multiply(rows, work.queries, depth, work.keys + begin * depth, depth * kPanel, panels, depth / 2,
                 work.scores + begin, kChunk);
        bool is_partial = false;
        for (int64_t query = 0; query < tile.count; ++query) {
            const Span visible = keys_of(one_query(tile, query), chunk);
            is_partial |= visible.lo > keys.lo || visible.hi < keys.hi;
            for (int64_t row = query * group; row < (query + 1) * group; ++row) {
                softmax(row, visible, begin, end);
                ahead.did(kSoftmaxWork * panels);
            }
        }
        if (!is_partial || are_finite(offsets, tile.kv_head, keys)) {
            pack_values(offsets, tile.kv_head, begin, end, keys);
            return weigh_values(0, rows, begin, end);
        }
        // A value that a query does not see may be infinite, and 0 times that is a NaN: each query has its own packing.
        for (int64_t query = 0; query < tile.count; ++query) {
            pack_values(offsets, tile.kv_head, begin, end, keys_of(one_query(tile, query), chunk));
            weigh_values(query * group, group, begin, end);
        }
    }

    bool is_direct(const Tile& tile) const { return tile.count == 1 && group <= direct::kMaxRows; }

    // The same for a tile of one query: its keys and values are read once, where they lie.
    void attend_row(const Tile& tile, const int64_t* offsets, Span seen) {
        const int64_t begin = seen.lo / kPanel * kPanel, end = rounded_up(seen.hi, kPanel);
        const int64_t panels = (end - begin) / kPanel, width = a.head_dim;
        const bf16* keys[kChunk];
        const bf16* values[kChunk];
        for (int64_t key = begin; key < end; ++key) {
            keys[key] = row_of(a.k_cache, offsets, tile.kv_head, key, seen);
            values[key] = row_of(a.v_cache, offsets, tile.kv_head, key, seen);
        }
        coming.begin(panels * (width / 16), panels * 8 * (width + 16) / 32);
        direct::score(group, keys + begin, panels, width, work.queries, depth, work.scores + begin, kChunk, coming);
        for (int64_t row = 0; row < group; ++row) softmax(row, seen, begin, end);
        direct::weigh(group, values + begin, panels * 8, width, work.probs + begin, kChunk, work.part, width, coming);
    }

    // Work on `items` items of `tile` and chunk, which differ in their KV heads, begins; `next`, or null, is the first
    // of others. Rows of all KV heads of a key lie side by side and are fetched together.
    void look_ahead(const Tile& tile, int64_t chunk, int64_t items, const Item* next) {
        if (!next || !is_direct(tile)) return coming.stop();
        locate(tile.request, chunk);  // and keep it: the next place taken is the other
        const int64_t next_chunk = first_chunk(*next);
        const Span keys = keys_of(next->tile, next_chunk);
        coming.start(a.k_cache, a.v_cache, locate(next->tile.request, next_chunk) + keys.lo, keys.hi - keys.lo,
                     a.kv_heads * a.head_dim, items);
    }

    void load_queries(const Tile& tile) {
        const int64_t first_row = a.query_starts[tile.request] + tile.first;
        bf16* to = work.queries;
        for (int64_t query = 0; query < tile.count; ++query) {
            const bf16* from = a.q + (first_row + query) * a.q_row_stride + tile.kv_head * group * a.q_head_stride;
            for (int64_t head = 0; head < group; ++head, to += depth, from += a.q_head_stride) {
                std::memcpy(to, from, a.head_dim * 2);
                std::memset(to + a.head_dim, 0, (depth - a.head_dim) * 2);
            }
        }
    }

    int64_t first_chunk(const Item& item) const { return item.chunk < 0 ? seen_by(item.tile).lo / kChunk : item.chunk; }

    // The item, into out or its scratch; `next` is what this thread does after it, or null.
    void run(const Item& item, const Item* next) {
        const Tile* next_tile = next ? &next->tile : nullptr;
        const int64_t next_chunk = next ? first_chunk(*next) : 0;
        load_queries(item.tile);
        if (item.chunk < 0) return attend(item.tile, next_tile, next_chunk);
        attend_chunk(item.tile, item.chunk, next_tile, next_chunk);
        store_parts(item.tile, item.scratch);
    }

    // A whole tile, over all its chunks, into out.
    void attend(const Tile& tile, const Tile* next, int64_t next_chunk) {
        const Span seen = seen_by(tile);
        const int64_t first = seen.lo / kChunk, last = (seen.hi - 1) / kChunk;
        const int64_t position = start_of(tile.request) + tile.first;
        for (int64_t chunk = first; chunk <= last; ++chunk) {
            const bool is_last = chunk == last;
            attend_chunk(tile, chunk, is_last ? next : &tile, is_last ? next_chunk : chunk + 1);
            for (int64_t query = 0; query < tile.count; ++query) {
                const Span visible = seen_by(position + query);
                if (visible.hi <= chunk * kChunk || visible.lo >= (chunk + 1) * kChunk) continue;
                const bool is_first = visible.lo / kChunk == chunk;
                for (int64_t row = query * group; row < (query + 1) * group; ++row) merge_row(row, is_first);
            }
        }
        for (int64_t row = 0; row < tile.count * group; ++row) {
            const int64_t head = tile.kv_head * group + row % group;
            const int64_t at = a.query_starts[tile.request] + tile.first + row / group;
            finish(work.sum + row * a.head_dim, work.max[row], work.total[row], at, head);
        }
    }

    // What attend_chunk made of a request's only row: per head head_dim sums, then the maximum and the total.
    void store_parts(const Tile& tile, float* scratch) {
        for (int64_t head = 0; head < group; ++head) {
            float* to = scratch + (tile.kv_head * group + head) * part_floats();
            std::memcpy(to, work.part + head * a.head_dim, a.head_dim * 4);
            to[a.head_dim] = work.part_max[head];
            to[a.head_dim + 1] = work.part_total[head];
        }
    }

    // The parts of `chunks` chunks of one head, in order, into out.
    void merge_split(const float* scratch, int64_t chunks, int64_t row, int64_t head) {
        float max = 0, total = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const float* part = scratch + (chunk * a.heads + head) * part_floats();
            merge(work.sum, max, total, part, part[a.head_dim], part[a.head_dim + 1], chunk == 0);
        }
        finish(work.sum, max, total, row, head);
    }

    int64_t part_floats() const { return rounded_up(a.head_dim + 2, kLanes); }

    const AttentionArgs& a;
    const int64_t group;
    const int64_t tile_queries;

private:
    // The keys of a chunk that some query of the tile sees, counted from the chunk's first; hi <= lo if there are none.
    Span keys_of(const Tile& tile, int64_t chunk) const {
        const Span seen = seen_by(tile);
        return {std::max<int64_t>(seen.lo - chunk * kChunk, 0), std::min(seen.hi - chunk * kChunk, kChunk)};
    }

    static Tile one_query(const Tile& tile, int64_t query) {
        return Tile{tile.request, tile.first + query, 1, tile.kv_head};
    }

    // The places of a chunk's keys; valid until the second call after this one.
    const int64_t* locate(int64_t request, int64_t chunk) {
        for (int i = 0; i < 2; ++i) {
            if (kept[i].request != request || kept[i].chunk != chunk) continue;
            latest = i;
            return kept[i].offsets;
        }
        latest = 1 - latest;
        Places& places = kept[latest];
        places.request = request;
        places.chunk = chunk;
        const int32_t* table = a.block_tables + request * a.max_blocks;
        const int64_t stride = a.kv_heads * a.head_dim, first = chunk * kChunk;
        const int64_t count = std::min(kChunk, a.context_lens[request] - first);
        int64_t block = first / a.block_size, at = first % a.block_size;
        for (int64_t key = 0; key < count; ++block, at = 0) {
            int64_t offset = (table[block] * a.block_size + at) * stride;
            for (; at < a.block_size && key < count; ++at, ++key, offset += stride) places.offsets[key] = offset;
        }
        return places.offsets;
    }

    const bf16* row_of(const bf16* cache, const int64_t* offsets, int64_t kv_head, int64_t key, Span keys) const {
        return key >= keys.lo && key < keys.hi ? cache + offsets[key] + kv_head * a.head_dim : work.zeros;
    }

    // Keys [first, first + kPanel) of the chunk; those outside `keys` are zeros and not read.
    void pack_keys(const int64_t* offsets, int64_t kv_head, int64_t first, Span keys) {
        const bf16* rows[kPanel];
        for (int64_t i = 0; i < kPanel; ++i) rows[i] = row_of(a.k_cache, offsets, kv_head, first + i, keys);
        tiles::pack_panel(rows, a.head_dim, depth, work.keys + first * depth);
    }

    // Values [begin, end) of the chunk, likewise.
    void pack_values(const int64_t* offsets, int64_t kv_head, int64_t begin, int64_t end, Span keys) {
        for (int64_t key = begin; key < end; key += 2) {
            const bf16* first = row_of(a.v_cache, offsets, kv_head, key, keys);
            const bf16* second = row_of(a.v_cache, offsets, kv_head, key + 1, keys);
            tiles::pack_pair(first, second, a.head_dim, work.values + key * kPanel, kChunk * kPanel);
            if (key % kPanel == 0) ahead.did(key_work() / 2);
        }
    }

    bool are_finite(const int64_t* offsets, int64_t kv_head, Span keys) const {
        bool finite = true;
        for (int64_t key = keys.lo; key < keys.hi; ++key)
            finite &= tiles::is_finite_row(row_of(a.v_cache, offsets, kv_head, key, keys), a.head_dim);
        return finite;
    }

    static constexpr int64_t kSoftmaxWork = 25;                    // of 16 scores
    int64_t key_work() const { return a.head_dim * 3 / 2; }        // of packing 16 keys; of values, half
    int64_t product_work(int64_t rows, int64_t panels, int64_t pairs) const { return rows * panels * pairs; }

    void read_ahead(const Tile* next, int64_t chunk, int64_t rows, int64_t panels) {
        if (!next) return ahead.stop();
        const int64_t work_here = panels * (key_work() + key_work() / 2 + rows * kSoftmaxWork) +
                                  2 * product_work(rows, panels, depth / 2);
        const int64_t head = next->kv_head * a.head_dim;
        ahead.start(a.k_cache + head, a.v_cache + head, locate(next->request, chunk), keys_of(*next, chunk), a.head_dim,
                    work_here);
    }

    // tiles::product, a few panels at a time.
    void multiply(int64_t rows, const bf16* left, int64_t left_stride, const bf16* right, int64_t panel_stride,
                  int64_t panels, int64_t pairs, float* to, int64_t to_stride) {
        constexpr int64_t kPanels = 4;
        for (int64_t panel = 0; panel < panels; panel += kPanels) {
            const int64_t count = std::min(kPanels, panels - panel);
            tiles::product(rows, left, left_stride, right + panel * panel_stride, panel_stride, count, pairs,
                           to + panel * kPanel, to_stride);
            ahead.did(product_work(rows, count, pairs));
        }
    }

    void weigh_values(int64_t row, int64_t rows, int64_t begin, int64_t end) {
        multiply(rows, work.probs + row * kChunk + begin, kChunk, work.values + begin * kPanel, kChunk * kPanel,
                 a.head_dim / kPanel, (end - begin) / 2, work.part + row * a.head_dim, a.head_dim);
    }

    // scores[row] -> probs[row] over [begin, end), 0 where hidden; part_max, part_total.
    void softmax(int64_t row, Span visible, int64_t begin, int64_t end) {
        float* scores = work.scores + row * kChunk;
        bf16* probs = work.probs + row * kChunk;
        const Floats factor = splat(a.softcap > 0 ? a.scale / a.softcap : a.scale), none = splat(kNone);
        Floats maxima = none;
        for (int64_t key = begin; key < end; key += kLanes) {
            Floats s = load(scores + key) * factor;
            if (a.softcap > 0) s = hyperbolic_tangent(s) * splat(a.softcap);
            if (key < visible.lo || key + kLanes > visible.hi)
                s = tiles::inside(s, visible.lo - key, visible.hi - key, none);
            maxima = larger(maxima, s);
            store(scores + key, s);
        }
        const float max = largest(maxima);
        const Floats base = splat(max == kNone ? 0.0f : max);
        Floats totals = splat(0.0f);
        for (int64_t key = begin; key < end; key += kLanes) {
            const Floats p = exponential(load(scores + key) - base);
            totals = totals + p;
            tiles::store_probs(probs + key, p);
        }
        work.part_max[row] = max;
        work.part_total[row] = ::sum(totals);
    }

    void merge_row(int64_t row, bool is_first) {
        merge(work.sum + row * a.head_dim, work.max[row], work.total[row], work.part + row * a.head_dim,
              work.part_max[row], work.part_total[row], is_first);
    }

    void merge(float* sum, float& max, float& total, const float* part, float part_max, float part_total,
               bool is_first) const {
        if (is_first) {
            max = part_max;
            total = part_total;
            std::memcpy(sum, part, a.head_dim * 4);
            return;
        }
        const float both = std::max(max, part_max), base = both == kNone ? 0.0f : both;
        const Floats old_weight = exponential(splat(max - base)), new_weight = exponential(splat(part_max - base));
        for (int64_t column = 0; column < a.head_dim; column += kLanes)
            store(sum + column, load(sum + column) * old_weight + load(part + column) * new_weight);
        total = total * tiles::first_of(old_weight) + part_total * tiles::first_of(new_weight);
        max = both;
    }

    void finish(const float* sum, float max, float total, int64_t row, int64_t head) const {
        float factor = 1.0f;
        if (a.sinks) {
            const float sink = a.sinks[head], both = std::max(max, sink);
            factor = tiles::first_of(exponential(splat(max - both)));
            total = total * factor + tiles::first_of(exponential(splat(sink - both)));
        }
        const Floats weight = splat(factor / total);
        bf16* out = a.out + row * a.out_row_stride + head * a.out_head_stride;
        for (int64_t column = 0; column < a.head_dim; column += kLanes)
            store(out + column, load(sum + column) * weight);
    }

    const int64_t depth;
    Workspace work;
    ReadAhead ahead;       // of tiles
    direct::Ahead coming;  // of single rows
    Places kept[2];
    int latest = 0;
};

// The chunks that the only row of a request sees; 1 or more.
int64_t chunks_of(const AttentionArgs& args, int64_t request) {
    const int64_t context = args.context_lens[request];
    const int64_t lo = args.sliding_window ? std::max<int64_t>(0, context - args.sliding_window) : 0;
    return (context - 1) / kChunk - lo / kChunk + 1;
}

// f(tile, chunk, chunks, cost) for every piece of work, in a fixed order; chunk -1: all of them.
template <class F>
void for_each_item(const Attention& attention, F&& f) {
    const AttentionArgs& args = attention.a;
    for (int64_t request = 0; request < args.requests; ++request) {
        const int64_t queries = attention.queries_of(request);
        const int64_t chunks = queries == 1 ? chunks_of(args, request) : 1;
        for (int64_t first = 0; first < queries; first += attention.tile_queries) {
            const int64_t count = std::min(attention.tile_queries, queries - first);
            const Span seen = attention.seen_by(Tile{request, first, count, 0});
            const int64_t weight = kKeyCost + count * attention.group;
            for (int64_t i = 0; i < chunks; ++i) {
                const int64_t chunk = seen.lo / kChunk + i;
                const Span keys{std::max(seen.lo, chunk * kChunk), std::min(seen.hi, (chunk + 1) * kChunk)};
                const int64_t cost = weight * (chunks > 1 ? keys.hi - keys.lo : seen.hi - seen.lo);
                for (int64_t kv_head = 0; kv_head < args.kv_heads; ++kv_head)
                    f(Tile{request, first, count, kv_head}, chunks > 1 ? chunk : -1, i, chunks, cost);
            }
        }
    }
}

void clear_rows(const Team& team, const AttentionArgs& args) {
    const int64_t first = args.query_starts[args.requests];
    const Range mine = share(team, args.rows - first);
    for (int64_t row = first + mine.begin; row < first + mine.end; ++row)
        for (int64_t head = 0; head < args.heads; ++head)
            std::memset(args.out + row * args.out_row_stride + head * args.out_head_stride, 0, args.head_dim * 2);
}

thread_local std::vector<Item> thread_items;  // kept between calls for its memory

void run_all(Attention& attention, const std::vector<Item>& items) {
    const size_t count = items.size();
    for (size_t first = 0, end = 0; first < count; first = end) {  // [first, end): the same keys, other KV heads
        const Item& item = items[first];
        const auto is_beside = [&](const Item& other) {
            return other.tile.request == item.tile.request && other.tile.first == item.tile.first &&
                   other.chunk == item.chunk;
        };
        for (end = first + 1; end < count && is_beside(items[end]); ++end) {}
        attention.look_ahead(item.tile, attention.first_chunk(item), static_cast<int64_t>(end - first),
                             end < count ? &items[end] : nullptr);
        for (size_t i = first; i < end; ++i) attention.run(items[i], i + 1 < count ? &items[i + 1] : nullptr);
    }
}

}  // namespace

int64_t attention_scratch_bytes(const AttentionArgs& args) {
    int64_t parts = 0;
    for (int64_t request = 0; request < args.requests; ++request) {
        const int64_t queries = args.query_starts[request + 1] - args.query_starts[request];
        const int64_t chunks = queries == 1 ? chunks_of(args, request) : 1;
        if (chunks > 1) parts += chunks * args.heads;
    }
    return parts * rounded_up(args.head_dim + 2, kLanes) * 4;
}

void paged_attention(const Team& team, const AttentionArgs& args) {
    clear_rows(team, args);
    const tiles::TileScope scope;
    Attention attention(args);
    int64_t total = 0, done = 0, split = 0;
    for_each_item(attention, [&](const Tile&, int64_t, int64_t, int64_t, int64_t cost) { total += cost; });
    const int64_t begin = total * team.tid / team.size, end = total * (team.tid + 1) / team.size;
    const int64_t part = args.heads * attention.part_floats();
    std::vector<Item>& items = thread_items;
    items.clear();
    for_each_item(attention, [&](const Tile& tile, int64_t chunk, int64_t i, int64_t chunks, int64_t cost) {
        if (done >= begin && done < end) items.push_back({tile, chunk, args.scratch + (split + i) * part});
        done += cost;
        if (chunks > 1 && i == chunks - 1 && tile.kv_head == args.kv_heads - 1) split += chunks;
    });
    run_all(attention, items);
    if (split == 0) return;
    team.wait();
    split = 0;
    int64_t merged = 0;
    for (int64_t request = 0; request < args.requests; ++request) {
        const int64_t chunks = attention.queries_of(request) == 1 ? chunks_of(args, request) : 1;
        if (chunks == 1) continue;
        for (int64_t head = 0; head < args.heads; ++head, ++merged)
            if (merged % team.size == team.tid)
                attention.merge_split(args.scratch + split * part, chunks, args.query_starts[request], head);
        split += chunks;
    }
}

void write_kv(const Team& team, const WriteKvArgs& args) {
    const Range mine = share(team, args.rows);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
        const int64_t at = args.slot_mapping[row] * args.kv_heads * args.head_dim;
        for (int64_t head = 0; head < args.kv_heads; ++head) {
            const int64_t to = at + head * args.head_dim;
            std::memcpy(args.k_cache + to, args.k + row * args.k_row_stride + head * args.k_head_stride,
                        args.head_dim * 2);
            std::memcpy(args.v_cache + to, args.v + row * args.v_row_stride + head * args.v_head_stride,
                        args.head_dim * 2);
        }
    }
}

int ml_write_kv(const WriteKvArgs* args) {
    parallel([&](const Team& team) { write_kv(team, *args); });
    return 0;
}

int ml_paged_attention(const AttentionArgs* args) {
    parallel([&](const Team& team) { paged_attention(team, *args); });
    return 0;
}

int64_t ml_attention_scratch_bytes(const AttentionArgs* args) { return attention_scratch_bytes(*args); }
