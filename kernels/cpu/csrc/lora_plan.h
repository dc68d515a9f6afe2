// What there is to do in a call of segmented_lora, and a thread's share of it. Used by lora.cpp only.
#pragma once

#include <vector>

#include "lora.h"
#include "lora_tiles.h"

namespace lora {

constexpr int64_t kChunkRows = 32;         // rows that share one reading of a tile of A, at most
constexpr int64_t kFewRows = 8;            // rows of such a chunk at least, where a thread would have none
constexpr int64_t kPanelElements = 8192;   // of arranged B for many rows: half of a first-level cache
constexpr int64_t kThinPanel = 1024;       // for few rows: arithmetic and reading in short turns overlap
constexpr int64_t kTotalRows = 32;         // rows of a weighted sum that are summed together
constexpr int64_t kAheadBytes = 12288;     // how far before its use a weight is asked for, at least
constexpr int64_t kTallRows = 4;           // rows of an item from which register tiles of them pay
constexpr int64_t kSplitRows = 48;         // rows of an item that a thread takes for itself, arranging B for them
constexpr int64_t kMostRows = 128;         // rows of an item that one arrangement of B serves
constexpr int64_t kStoreRanks = 8;         // ranks whose products take as long as adding the sum to y
constexpr int64_t kComputeRows = 8;        // rows whose arithmetic takes as long as reading their weights

// One member of a segment at one slice.
struct Piece {
    const bf16* a;
    const bf16* b;
    const bf16* bias;
    bf16* v;  // [rows, v_stride(stride)]
    int64_t rank;
    int64_t stride;
    int64_t first_row;
    int64_t rows;
    float weight;
};

// One slice of a segment: the pieces whose sum is added there.
struct Item {
    int64_t first_piece, end_piece;
    int64_t column, width;
    int64_t first_row, rows;
    bool is_plain;  // one piece of weight 1 without a bias
    bool is_tall;   // plain, and rows enough for register tiles of them

    int64_t block() const { return is_tall ? 2 * kWidth : kWidth; }  // columns that are arranged together
};

// A thread's share of a piece's A: rank blocks [first, end) of `ranks` ranks for rows [row, row + rows) of it.
struct TileRun {
    int64_t piece, first, end, row, rows;
};

// A thread's share of an item: columns for rows [row, row + rows) of it.
struct BlockRun {
    int64_t item;
    Range columns;
    int64_t row, rows;
};

// Consecutive work of known costs, of which a thread takes what starts in its part of the total.
struct Part {
    int64_t begin, end;  // of the costs
    int64_t at = 0;      // cost of all that came before

    // Takes from `count` units of `cost` each: the range that is this thread's.
    Range take(int64_t count, int64_t cost) {
        const auto before = [&](int64_t limit) {  // units that start before `limit`
            return cost == 0 ? int64_t{0} : std::clamp<int64_t>((limit - at + cost - 1) / cost, 0, count);
        };
        const Range range{before(begin), before(end)};
        at += count * cost;
        return range;
    }
};

inline Part part_of(const Team& team, int64_t total) {
    return {total * team.tid / team.size, total * (team.tid + 1) / team.size};
}

// The weights that a thread will read, in order, and how far they have been asked for.
class Stream {
public:
    void clear() {
        spans_.clear();
        at_ = 0;
        next_ = nullptr;
    }
    void add(const bf16* begin, int64_t elements) {
        spans_.push_back({reinterpret_cast<const char*>(begin), reinterpret_cast<const char*>(begin + elements)});
    }
    // Where to ask for `bytes` while as many are read at `own`; `own` itself when nothing is left.
    const char* take(int64_t bytes, const bf16* own) {
        if (next_ == nullptr && !spans_.empty()) next_ = spans_[0].begin;
        while (at_ < spans_.size() && next_ >= spans_[at_].end)
            if (++at_ < spans_.size()) next_ = spans_[at_].begin;
        if (at_ >= spans_.size()) return reinterpret_cast<const char*>(own);
        const char* from = next_;
        next_ += bytes;
        return from;
    }
    void lead(int64_t bytes) {
        while (bytes > 0 && at_ < spans_.size()) {
            take(0, nullptr);
            if (at_ == spans_.size()) return;
            const int64_t step = std::min<int64_t>(bytes, spans_[at_].end - next_);
            next_ += step;
            bytes -= step;
        }
    }

private:
    struct Span {
        const char* begin;
        const char* end;
    };
    std::vector<Span> spans_;
    size_t at_ = 0;
    const char* next_ = nullptr;
};

// What there is to do in a call (the same on every thread), and this thread's share. Memory is kept.
struct Plan {
    std::vector<Piece> pieces;
    std::vector<Item> items;
    std::vector<TileRun> tiles;
    std::vector<BlockRun> blocks;
    Stream stream;
    std::vector<bf16> panel_memory;
    std::vector<float> totals;
    int64_t tile_ranks;  // of a rank block

    LoraStatus make(const LoraArgs& args);
    void share_out(const Team& team, const LoraArgs& args);
    bf16* panel(int64_t elements);

private:
    void share_tiles(const Team& team);
    void share_blocks(const Team& team);
    LoraStatus add(const LoraArgs& args, int64_t segment, int64_t slice, int64_t& used);
};

inline LoraStatus Plan::make(const LoraArgs& args) {
    pieces.clear();
    items.clear();
    int64_t used = 0;
    for (int64_t s = 0; s < args.segments->count; ++s) {
        if (args.segments->starts[s] == args.segments->ends[s]) continue;
        for (int64_t slice = 0; slice < args.group->slices; ++slice) {
            const LoraStatus status = add(args, s, slice, used);
            if (status != kLoraDone) return status;
        }
    }
    return kLoraDone;
}

// The members of segment s that have this slice.
inline LoraStatus Plan::add(const LoraArgs& args, int64_t s, int64_t slice, int64_t& used) {
    const LoraSegments& segments = *args.segments;
    const int64_t start = segments.starts[s], rows = segments.ends[s] - start;
    const int64_t first = static_cast<int64_t>(pieces.size());
    for (int32_t m = segments.members[s]; m < segments.members[s + 1]; ++m) {
        const int64_t* entry =
            args.table + (segments.slots[m] * args.table_rows + args.group->rows[slice]) * kTableColumns;
        const int64_t rank = entry[kRank], stride = rank ? entry[kStride] : 0;
        if (rank == 0 && entry[kBiasOffset] < 0) continue;
        if (stride % kRankBlock || rank > stride) return kLoraStrideNotPadded;
        const bf16* bias = entry[kBiasOffset] < 0 ? nullptr : args.arena + entry[kBiasOffset];
        pieces.push_back({args.arena + entry[kAOffset], args.arena + entry[kBOffset], bias, args.scratch + used, rank,
                          stride, start, rows, segments.weights[m]});
        used += (rows * v_stride(stride) + 31) / 32 * 32;
    }
    if (used > args.scratch_elements) return kLoraScratchTooSmall;
    const int64_t end = static_cast<int64_t>(pieces.size());
    if (end == first) return kLoraDone;
    const bool is_plain = end == first + 1 && pieces[first].weight == 1.0f && !pieces[first].bias;
    items.push_back({first, end, args.group->offsets[slice], args.group->widths[slice], start, rows, is_plain,
                     is_plain && rows >= kTallRows});
    return kLoraDone;
}

inline bf16* Plan::panel(int64_t elements) {
    if (static_cast<int64_t>(panel_memory.size()) < elements + 32) panel_memory.resize(elements + 32);
    const uintptr_t at = reinterpret_cast<uintptr_t>(panel_memory.data());
    return reinterpret_cast<bf16*>((at + 63) / 64 * 64);
}

inline int64_t blocks_of(const Item& item) { return (item.width + item.block() - 1) / item.block(); }

// Of a piece's rows. As many for every thread, as long as each has a few.
inline int64_t chunks_of(const Piece& piece, int threads) {
    const int64_t chunks = (piece.rows + kChunkRows - 1) / kChunkRows;
    const int64_t even = (chunks + threads - 1) / threads * threads;
    return chunks > 1 && piece.rows >= even * kFewRows ? even : chunks;
}

// Fewer ranks to a tile where there would not be two tiles for every thread.
inline void Plan::share_tiles(const Team& team) {
    const auto chunks = [&](const Piece& piece) { return chunks_of(piece, team.size); };
    const auto rows_of = [&](const Piece& piece) { return (piece.rows + chunks(piece) - 1) / chunks(piece); };
    const auto tiles_of = [&](const Piece& piece) { return (piece.rank + tile_ranks - 1) / tile_ranks; };
    int64_t rank_chunks = 0, total = 0;
    for (const Piece& piece : pieces) rank_chunks += piece.rank * chunks(piece);
    tile_ranks = kRankBlock;
    while (tile_ranks > 2 && rank_chunks < 2 * team.size * tile_ranks) tile_ranks /= 2;
    for (const Piece& piece : pieces) total += tiles_of(piece) * chunks(piece) * (kComputeRows + rows_of(piece));
    Part part = part_of(team, total);
    tiles.clear();
    for (size_t p = 0; p < pieces.size() && part.at < part.end; ++p) {
        const Piece& piece = pieces[p];
        const int64_t count = tiles_of(piece), rows = rows_of(piece);
        const Range mine = part.take(count * chunks(piece), kComputeRows + rows);
        for (int64_t t = mine.begin; t < mine.end;) {
            const int64_t first = t % count, row = t / count * rows, end = std::min(count, first + mine.end - t);
            t += end - first;
            if (row >= piece.rows) continue;
            tiles.push_back({static_cast<int64_t>(p), first, end, row, std::min(rows, piece.rows - row)});
        }
    }
}

// A tall item goes by chunks of rows, so that a thread adds to rows of y that it has near.
inline int64_t chunks_of(const Item& item, int threads) {
    if (!item.is_tall) return 1;
    const int64_t most = (item.rows + kMostRows - 1) / kMostRows;
    return std::max(most, std::min<int64_t>(threads, item.rows / kSplitRows));
}

inline int64_t block_cost(const Plan& plan, const Item& item, int64_t rows) {
    int64_t cost = 0;
    for (int64_t p = item.first_piece; p < item.end_piece; ++p)
        cost += plan.pieces[p].stride * (kComputeRows + rows) + kStoreRanks * rows;
    return cost;
}

inline void Plan::share_blocks(const Team& team) {
    const auto rows_of = [&](const Item& item) {
        const int64_t chunks = chunks_of(item, team.size);
        return (item.rows + chunks - 1) / chunks;
    };
    int64_t total = 0;
    for (const Item& item : items)
        total += chunks_of(item, team.size) * blocks_of(item) * block_cost(*this, item, rows_of(item));
    Part part = part_of(team, total);
    blocks.clear();
    for (size_t i = 0; i < items.size() && part.at < part.end; ++i) {
        const Item& item = items[i];
        const int64_t count = blocks_of(item), rows = rows_of(item);
        const Range mine = part.take(chunks_of(item, team.size) * count, block_cost(*this, item, rows));
        for (int64_t b = mine.begin; b < mine.end;) {
            const int64_t first = b % count, row = b / count * rows, end = std::min(count, first + mine.end - b);
            const Range columns{first * item.block(), std::min(end * item.block(), item.width)};
            b += end - first;
            if (row >= item.rows) continue;
            blocks.push_back({static_cast<int64_t>(i), columns, row, std::min(rows, item.rows - row)});
        }
    }
}

inline void Plan::share_out(const Team& team, const LoraArgs& args) {
    const int64_t K = args.group->in_features;
    stream.clear();
    tiles.clear();
    if (K) share_tiles(team);
    share_blocks(team);
    for (const TileRun& run : tiles) {
        const Piece& piece = pieces[run.piece];
        const int64_t first = run.first * tile_ranks, end = std::min(run.end * tile_ranks, piece.rank);
        stream.add(piece.a + first * K, (end - first) * K);
    }
    for (const BlockRun& run : blocks) {
        const Item& item = items[run.item];
        const Piece& piece = pieces[item.first_piece];
        const Range columns = run.columns;
        if (item.is_plain)
            stream.add(piece.b + columns.begin * piece.stride, (columns.end - columns.begin) * piece.stride);
    }
    stream.lead(std::max(kAheadBytes, K ? 2 * tile_ranks * K : 0));  // a tile is not read in its bytes' order
}

}  // namespace lora
