// See lora.h. The two phases.
#include "lora.h"

#include "lora_plan.h"

namespace {

using namespace lora;

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

void expand_plain_run(const LoraArgs& args, const Item& item, Range columns, Plan& plan) {
    const Piece& piece = plan.pieces[item.first_piece];
    const int64_t arranged = arranged_elements(piece.stride), each = std::max<int64_t>(1, kThinPanel / arranged);
    bf16* panel = plan.panel(each * arranged);
    for (int64_t n = columns.begin; n < columns.end; n += each * kWidth) {
        int64_t blocks = 0;
        for (int64_t at = n; blocks < each && at < columns.end; at += kWidth, ++blocks) {
            const int64_t count = std::min<int64_t>(kWidth, columns.end - at);
            const bf16* b = piece.b + at * piece.stride;
            arrange(b, piece.stride, count, plan.stream.take(2 * count * piece.stride, b), panel + blocks * arranged);
        }
        expand_plain(args, item, piece, n, blocks, panel);
    }
}

// The same for many rows, in turns of as many columns as have their B in the first-level cache.
void expand_tall_run(const LoraArgs& args, const Item& item, const BlockRun& run, Plan& plan) {
    const Piece& piece = plan.pieces[item.first_piece];
    const int64_t step = v_stride(piece.stride), block = item.block();
    const int64_t each = std::max<int64_t>(1, kPanelElements / (block * step)) * block;
    bf16* panel = plan.panel(each * step);
    const bf16* v = piece.v + run.row * step;
    bf16* y = args.y + (item.first_row + run.row) * args.y_stride + item.column;
    for (int64_t n = run.columns.begin; n < run.columns.end; n += each) {
        const int64_t width = std::min(each, run.columns.end - n);
        for (int64_t at = 0; at < width; at += block) {
            const int64_t count = std::min(block, width - at);
            const bf16* b = piece.b + (n + at) * piece.stride;
            arrange_wide(b, piece.stride, count, plan.stream.take(2 * count * piece.stride, b), panel + at * step);
        }
        expand_tall(panel, piece.stride, width, v, run.rows, y + n, args.y_stride);
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
    if (item.is_tall) return expand_tall_run(args, item, run, plan);
    if (item.is_plain) return expand_plain_run(args, item, run.columns, plan);
    for (int64_t n = run.columns.begin; n < run.columns.end; n += kWidth) expand_sum(args, item, n, plan);
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
