// See lora.h. What there is to do in a call, each thread's share of it, and the two phases.
#include "lora.h"

#include <vector>

#include "lora_tiles.h"

namespace {

using namespace lora;

constexpr int64_t kChunkRows = 24;         // rows that share one reading of a tile of A
constexpr int64_t kPanelElements = 8192;   // of arranged B for many rows: half of a first-level cache
constexpr int64_t kThinPanel = 1024;       // for few rows: arithmetic and reading in short turns overlap
constexpr int64_t kTotalRows = 32;         // rows of a weighted sum that are summed together
constexpr int64_t kAheadBytes = 12288;     // how far before its use a weight is asked for, at least
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
};

// A thread's share of a piece's A: rank blocks [first, end) of `ranks` ranks for rows [row, row + rows) of it.
struct TileRun {
    int64_t piece, first, end, row, rows;
};

// A thread's share of an item: blocks of 16 columns.
struct BlockRun {
    int64_t item;
    Range blocks;
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

Part part_of(const Team& team, int64_t total) {
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
    int64_t rank_rows;   // ranks times chunks of rows, of all pieces
    int64_t tile_ranks;  // of a rank block

    LoraStatus make(const LoraArgs& args);
    void share_out(const Team& team, const LoraArgs& args);
    bf16* panel(int64_t elements);

private:
    void share_tiles(const Team& team);
    void share_blocks(const Team& team);
    LoraStatus add(const LoraArgs& args, int64_t segment, int64_t slice, int64_t& used);
};

LoraStatus Plan::make(const LoraArgs& args) {
    pieces.clear();
    items.clear();
    rank_rows = 0;
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

int64_t chunks_of(int64_t rows) { return (rows + kChunkRows - 1) / kChunkRows; }

// The members of segment s that have this slice.
LoraStatus Plan::add(const LoraArgs& args, int64_t s, int64_t slice, int64_t& used) {
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
        rank_rows += rank * chunks_of(rows);
    }
    if (used > args.scratch_elements) return kLoraScratchTooSmall;
    const int64_t end = static_cast<int64_t>(pieces.size());
    if (end == first) return kLoraDone;
    const bool is_plain = end == first + 1 && pieces[first].weight == 1.0f && !pieces[first].bias;
    items.push_back({first, end, args.group->offsets[slice], args.group->widths[slice], start, rows, is_plain});
    return kLoraDone;
}

bf16* Plan::panel(int64_t elements) {
    if (static_cast<int64_t>(panel_memory.size()) < elements + 32) panel_memory.resize(elements + 32);
    const uintptr_t at = reinterpret_cast<uintptr_t>(panel_memory.data());
    return reinterpret_cast<bf16*>((at + 63) / 64 * 64);
}

int64_t rows_of_chunk(int64_t rows) { return (rows + chunks_of(rows) - 1) / chunks_of(rows); }

int64_t blocks_of(const Item& item) { return (item.width + kWidth - 1) / kWidth; }

// Fewer ranks to a tile where there would not be two tiles for every thread.
void Plan::share_tiles(const Team& team) {
    tile_ranks = kRankBlock;
    while (tile_ranks > 2 && rank_rows < 2 * team.size * tile_ranks) tile_ranks /= 2;
    const auto tiles_of = [&](const Piece& piece) { return (piece.rank + tile_ranks - 1) / tile_ranks; };
    const auto cost_of = [](const Piece& piece) { return kComputeRows + rows_of_chunk(piece.rows); };
    int64_t total = 0;
    for (const Piece& piece : pieces) total += tiles_of(piece) * chunks_of(piece.rows) * cost_of(piece);
    Part part = part_of(team, total);
    tiles.clear();
    for (size_t p = 0; p < pieces.size() && part.at < part.end; ++p) {
        const Piece& piece = pieces[p];
        const int64_t count = tiles_of(piece), rows = rows_of_chunk(piece.rows);
        const Range mine = part.take(count * chunks_of(piece.rows), cost_of(piece));
        for (int64_t t = mine.begin; t < mine.end;) {
            const int64_t first = t % count, row = t / count * rows, end = std::min(count, first + mine.end - t);
            tiles.push_back({static_cast<int64_t>(p), first, end, row, std::min(rows, piece.rows - row)});
            t += end - first;
        }
    }
}

int64_t block_cost(const Plan& plan, const Item& item) {
    int64_t cost = 0;
    for (int64_t p = item.first_piece; p < item.end_piece; ++p)
        cost += plan.pieces[p].stride * (kComputeRows + item.rows) + 2 * item.rows;
    return cost;
}

void Plan::share_blocks(const Team& team) {
    int64_t total = 0;
    for (const Item& item : items) total += blocks_of(item) * block_cost(*this, item);
    Part part = part_of(team, total);
    blocks.clear();
    for (size_t i = 0; i < items.size() && part.at < part.end; ++i) {
        const Range mine = part.take(blocks_of(items[i]), block_cost(*this, items[i]));
        if (mine.begin < mine.end) blocks.push_back({static_cast<int64_t>(i), mine});
    }
}

void Plan::share_out(const Team& team, const LoraArgs& args) {
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
        const int64_t first = run.blocks.begin * kWidth, end = std::min(run.blocks.end * kWidth, item.width);
        if (item.is_plain) stream.add(piece.b + first * piece.stride, (end - first) * piece.stride);
    }
    stream.lead(std::max(kAheadBytes, K ? 2 * tile_ranks * K : 0));  // a tile is not read in its bytes' order
}

// --- shrink ---------------------------------------------------------------------------------------------

void shrink_run(const LoraArgs& args, const TileRun& run, Plan& plan) {
    const Piece& piece = plan.pieces[run.piece];
    const int64_t K = args.group->in_features, step = v_stride(piece.stride);
    bf16* v = piece.v + run.row * step;
    const bf16* x = args.x + (piece.first_row + run.row) * args.x_stride;
    for (int64_t tile = run.first; tile < run.end; ++tile) {
        const int64_t rank = tile * plan.tile_ranks, count = std::min(plan.tile_ranks, piece.rank - rank);
        const bf16* a = piece.a + rank * K;
        const Ahead ahead{plan.stream.take(2 * count * K, a)};
        shrink_tile(a, count, K, x, args.x_stride, run.rows, v + rank, step, ahead);
        if (rank + count < piece.rank) continue;
        for (int64_t row = 0; row < run.rows; ++row)
            std::fill(v + row * step + piece.rank, v + (row + 1) * step, bf16{0});
    }
}

// v of an embedding is a row of A for each token.
void look_up(const Team& team, const LoraArgs& args, const Plan& plan) {
    for (const Piece& piece : plan.pieces) {
        const int64_t step = v_stride(piece.stride);
        const Range rows = share(team, piece.rows);
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            const bf16* a = piece.a + args.ids[piece.first_row + row] * piece.stride;
            bf16* v = piece.v + row * step;
            std::copy(a, a + piece.rank, v);
            std::fill(v + piece.rank, v + step, bf16{0});
        }
    }
}

// --- expand ---------------------------------------------------------------------------------------------

void add_to(bf16* y, Floats sums, int64_t count) { store(y, load(y, count) + sums, count); }

// y[rows, columns] += B v of a plain item, for `blocks` blocks from column `first` of the slice.
void expand_plain(
    const LoraArgs& args, const Item& item, const Piece& piece, int64_t first, int64_t blocks, const bf16* panel) {
    bf16* y = args.y + item.first_row * args.y_stride + item.column + first;
    for (int64_t row = 0; row < item.rows; ++row, y += args.y_stride)
        expand_row(panel, piece.stride, blocks, piece.v + row * v_stride(piece.stride),
                   [&](int64_t block, Floats sums) {
                       const int64_t left = item.width - first - block * kWidth;
                       add_to(y + block * kWidth, sums, std::min<int64_t>(kWidth, left));
                   });
}

void expand_plain_run(const LoraArgs& args, const Item& item, Range run, Plan& plan) {
    const Piece& piece = plan.pieces[item.first_piece];
    const int64_t arranged = arranged_elements(piece.stride);
    const int64_t each = std::max<int64_t>(1, (item.rows > kComputeRows ? kPanelElements : kThinPanel) / arranged);
    bf16* panel = plan.panel(each * arranged);
    for (int64_t block = run.begin; block < run.end; block += each) {
        const int64_t blocks = std::min(each, run.end - block);
        for (int64_t i = 0; i < blocks; ++i) {
            const int64_t n = (block + i) * kWidth, count = std::min<int64_t>(kWidth, item.width - n);
            const bf16* b = piece.b + n * piece.stride;
            arrange(b, piece.stride, count, plan.stream.take(2 * count * piece.stride, b), panel + i * arranged);
        }
        expand_plain(args, item, piece, block * kWidth, blocks, panel);
    }
}

// A weighted sum at 16 columns from n: the members' sums of some rows in `totals`, then one rounding.
void expand_sum(const LoraArgs& args, const Item& item, int64_t n, Plan& plan) {
    const int64_t count = std::min<int64_t>(kWidth, item.width - n);
    plan.totals.resize(kTotalRows * kWidth);
    float* totals = plan.totals.data();
    for (int64_t first = 0; first < item.rows; first += kTotalRows) {
        const int64_t rows = std::min(kTotalRows, item.rows - first);
        std::fill(totals, totals + rows * kWidth, 0.0f);
        for (int64_t p = item.first_piece; p < item.end_piece; ++p) {
            const Piece& piece = plan.pieces[p];
            bf16* panel = plan.panel(arranged_elements(piece.stride));
            const bf16* b = piece.b + n * piece.stride;
            arrange(b, piece.stride, count, reinterpret_cast<const char*>(b) + kAheadBytes, panel);
            const Floats weight = splat(piece.weight), bias = piece.bias ? load(piece.bias + n, count) : splat(0.0f);
            for (int64_t row = 0; row < rows; ++row)
                expand_row(panel, piece.stride, 1, piece.v + (first + row) * v_stride(piece.stride),
                           [&](int64_t, Floats sums) {
                               float* total = totals + row * kWidth;
                               store(total, load(total) + weight * (sums + bias));
                           });
        }
        bf16* y = args.y + (item.first_row + first) * args.y_stride + item.column + n;
        for (int64_t row = 0; row < rows; ++row)
            add_to(y + row * args.y_stride, load(totals + row * kWidth), count);
    }
}

void expand_run(const LoraArgs& args, const BlockRun& run, Plan& plan) {
    const Item& item = plan.items[run.item];
    if (item.is_plain) return expand_plain_run(args, item, run.blocks, plan);
    for (int64_t block = run.blocks.begin; block < run.blocks.end; ++block)
        expand_sum(args, item, block * kWidth, plan);
}

}  // namespace

LoraStatus segmented_lora(const Team& team, const LoraArgs& args) {
    thread_local Plan plan;
    const LoraStatus status = plan.make(args);
    if (status != kLoraDone || plan.items.empty()) return status;
    plan.share_out(team, args);
    for (const TileRun& run : plan.tiles) shrink_run(args, run, plan);
    if (args.group->in_features == 0) look_up(team, args, plan);
    team.wait();
    for (const BlockRun& run : plan.blocks) expand_run(args, run, plan);
    return kLoraDone;
}

extern "C" int ml_segmented_lora(const LoraArgs* args) {
    LoraStatus status = kLoraDone;
    parallel([&](const Team& team) {
        const LoraStatus own = segmented_lora(team, *args);
        if (team.tid == 0) status = own;
    });
    return status;
}
