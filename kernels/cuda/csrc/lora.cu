// The low-rank delta of a decode step in one launch: shrink, sum over the cluster, expand. See lora.h.
//
//    a cluster has a tile of 16 rows, a slice and a part of its columns:
//
//    block 0   x[:, part 0 of K] A^T ─ warps' sums ─┐            ┌─▶ v ─▶ y[:, its columns] += w (v B^T + bias)
//    block 1   x[:, part 1 of K] A^T ─ warps' sums ─┼─ cluster ──┼─▶ v ─▶ y[:, its columns] += ...
//    ...                                            ┘  barrier   └─▶ ...
//
// Every block adds all blocks' sums in the order of their ranks, so all have the same v, and the sums of a row have one
// order whatever else is in the step. v stays fp32 up to the second product, which takes it as the sum of two numbers
// of 16 bit (its first digits and the rest); y is rounded once. Nothing is zeroed, nothing is in device memory between.
//
// With few tiles several clusters share a tile's slice by columns, each with a shrink of its own: that reads A from the
// second cache again and fills the device. How many do follows from the header on the device, so that one captured
// launch suits any step; clusters without work only read the header.
//
// Tensor cores sum over an index whose order is ours to choose: a lane takes 8 neighbouring numbers of a row at once
// (16 bytes) where the instruction's own layout would have it gather pairs; both operands are dealt out alike. For y
// the columns are: a lane has 8 neighbouring ones.
//
// Early launch (programmatic dependent launch): with is_early the kernel may start while the one directly before it in
// the stream, which makes x or y, is ending. Up to grid_wait it reads the records, the table and the weights only, and
// that is safe: whatever lies before that one kernel has ended when it began (it is an ordinary launch, or one of these,
// which end after their own wait), a copy in its place is waited for in full, and a product of the base writes none of
// the three. Every thread waits before it ends, with work or without: whoever comes after may rely on all before.

#include "lora.h"

#include "device.h"

#ifndef ML_CLUSTER
#define ML_CLUSTER 1
#endif
#ifndef ML_WARPS
#define ML_WARPS 8
#endif

namespace ml {
namespace {

constexpr int CLUSTER = ML_CLUSTER;
constexpr int WARPS = ML_WARPS;
constexpr int RESIDENT_WARPS = 12;                       // of a processor: bounds a thread's registers by 168
constexpr int ROWS = 16;                                 // of a tile
constexpr int STEP = 32;                                 // of K: what the four lanes of a row take at once
constexpr int BLOCK = 32;                                // columns of y that a warp takes at once
constexpr int COLUMNS = CLUSTER * WARPS * BLOCK;         // of a cluster at once
constexpr int LINE = 64;                                 // numbers that a prefetch brings
constexpr int RECORD = 8, START = 0, COUNT = 1, SLOT = 2, WEIGHT = 4;  // kernels/triton/plan.py
constexpr int GEOMETRY = 3, TABLE_COLUMNS = 5;

ML_DEVICE int least(int a, int b) { return a < b ? a : b; }

template <int BUCKET>
struct Sizes {
    static constexpr int TILES = BUCKET / 8;                // of 8 ranks, in the shrink's product
    static constexpr int PAIRS = ROWS * BUCKET / 2;         // of v
    static constexpr int CHUNK = BUCKET < 32 ? BUCKET : 32;  // ranks that the four lanes of a column take at once
    static constexpr int CHUNKS = BUCKET / CHUNK;
    static constexpr int WORDS = CHUNK / 8;                 // of a lane
};

// How much is on its way into registers at once: as much as there is room for.
template <int BUCKET, bool ALIGNED>
struct Ahead {
    static constexpr int STEPS = !ALIGNED ? 1 : BUCKET < 32 ? 4 : 1;  // of K
    static constexpr bool IS_DOUBLE = ALIGNED && BUCKET < 32;         // a block of columns while another is computed
};

template <int BUCKET>
struct Shared {
    Pair of_warps[WARPS][Sizes<BUCKET>::PAIRS];
    Pair of_block[Sizes<BUCKET>::PAIRS];
    alignas(16) uint32_t high[ROWS][BUCKET / 2];  // v as two numbers of 16 bit
    alignas(16) uint32_t low[ROWS][BUCKET / 2];
};

struct Lane {
    int warp, row, quarter;  // of the block; 8 rows (or columns of a product) of 4 lanes

    ML_DEVICE Lane() {
        const int thread = thread_of_block();
        warp = thread / WARP, row = thread % WARP / 4, quarter = thread % 4;
    }
};

struct Tile {
    int64_t start;
    int rows, slot;
    float weight;
};

struct Site {
    const uint16_t *a, *b, *bias;  // bias: null where there is none
    int rank, stride;

    ML_DEVICE bool is_absent() const { return rank == 0 && bias == nullptr; }
};

struct Slice {
    int row, offset, width;
};

// What one cluster does: a tile, a slice, and one of `parts` parts of its columns.
struct Work {
    int tile, part, parts;
    Slice slice;
};

ML_DEVICE Tile read_tile(const LoraArgs& args, int index) {
    const int32_t* record = args.records + static_cast<int64_t>(1 + index) * RECORD;
    return {load(record + START), load(record + COUNT), load(record + SLOT), float_of_bits(load(record + WEIGHT))};
}

ML_DEVICE Slice read_slice(const LoraArgs& args, int index) {
    const int32_t* slice = args.geometry + index * GEOMETRY;
    return {load(slice), load(slice + 1), load(slice + 2)};
}

template <int BUCKET>
ML_DEVICE Site read_site(const LoraArgs& args, int slot, int row) {
    const int64_t* entry = args.table + (static_cast<int64_t>(slot) * args.site_rows + row) * TABLE_COLUMNS;
    const int64_t bias = load(entry + 2), rank = load(entry + 3);
    return {args.arena + load(entry), args.arena + load(entry + 1), bias < 0 ? nullptr : args.arena + bias,
            rank < BUCKET ? static_cast<int>(rank) : BUCKET, static_cast<int>(load(entry + 4))};
}

ML_DEVICE int parts_of(int width, int wanted) {
    const int most = (width + COLUMNS - 1) / COLUMNS;
    return wanted < most ? wanted : most;
}

// How the header's tiles, the slices and their parts make one sequence of work.
struct Schedule {
    int wanted;  // parts of a slice at most
    int of_tile, count;

    ML_DEVICE Schedule(const LoraArgs& args, int clusters) {
        const int tiles = load(args.records);
        const int shares = tiles * args.slices;
        wanted = shares > 0 && clusters > shares ? clusters / shares : 1;
        of_tile = 0;
        ML_ROLL
        for (int i = 0; i < args.slices; ++i) of_tile += parts_of(read_slice(args, i).width, wanted);
        count = tiles * of_tile;
    }

    ML_DEVICE Work work(const LoraArgs& args, int index) const {
        int rest = index % of_tile, i = 0;
        Slice slice = read_slice(args, 0);
        int parts = parts_of(slice.width, wanted);
        ML_ROLL
        while (rest >= parts) {
            rest -= parts;
            slice = read_slice(args, ++i);
            parts = parts_of(slice.width, wanted);
        }
        return {index / of_tile, rest, parts, slice};
    }
};

// A warp's steps of K, one run of neighbouring ones.
struct Steps {
    int first, end;

    ML_DEVICE Steps(int in_features, int warp_of_cluster) {
        const int steps = (in_features + STEP - 1) / STEP;
        const int each = (steps + CLUSTER * WARPS - 1) / (CLUSTER * WARPS);
        first = warp_of_cluster * each;
        end = first + each < steps ? first + each : steps;
    }
};

// Eight numbers from column `at` of a row that has `length`; zeros beyond it.
template <bool ALIGNED>
ML_DEVICE Words<4> load_row(const uint16_t* row, int at, int length) {
    Words<4> got = {};
    if constexpr (ALIGNED) {
        if (at < length) got = load(reinterpret_cast<const Words<4>*>(row + at));
    } else {
        ML_UNROLL
        for (int i = 0; i < 8; ++i)
            if (at + i < length) got.at[i / 2] |= static_cast<uint32_t>(load(row + at + i)) << (16 * (i % 2));
    }
    return got;
}

template <bool ALIGNED>
ML_DEVICE Words<4> load_weights(const uint16_t* row, int at, int length) {
    if constexpr (ALIGNED) return at < length ? load_constant<4>(row + at) : Words<4>{};
    return load_row<false>(row, at, length);
}

// Operands of a few steps of the shrink, on their way into registers.
template <class T, int BUCKET, bool ALIGNED>
struct ShrinkLoads {
    using Own = Sizes<BUCKET>;
    static constexpr int DEPTH = Ahead<BUCKET, ALIGNED>::STEPS;
    Words<4> x[DEPTH][2];
    Words<4> a[DEPTH][Own::TILES];

    ML_DEVICE void begin(const LoraArgs& args, const Tile& tile, const Site& site, const Lane& lane, int first, int end) {
        const int at = first * STEP + lane.quarter * 8, length = least(end * STEP, args.in_features) - at;
        const uint16_t* from = made_here(args.x + (tile.start + lane.row) * args.stride_x + at);
        ML_UNROLL
        for (int half = 0; half < 2; ++half, from += 8 * args.stride_x) {
            ML_UNROLL
            for (int d = 0; d < DEPTH; ++d)
                x[d][half] = load_row<ALIGNED>(from, d * STEP, lane.row + 8 * half < tile.rows ? length : 0);
        }
        from = made_here(site.a + static_cast<int64_t>(lane.row) * args.in_features + at);
        ML_UNROLL
        for (int t = 0; t < Own::TILES; ++t, from += 8 * static_cast<int64_t>(args.in_features)) {
            ML_UNROLL
            for (int d = 0; d < DEPTH; ++d)
                a[d][t] = load_weights<ALIGNED>(from, d * STEP, lane.row + 8 * t < site.rank ? length : 0);
        }
    }

    ML_DEVICE void finish(float (&sums)[Own::TILES][4], int rank) const {
        ML_UNROLL
        for (int d = 0; d < DEPTH; ++d) {
            ML_UNROLL
            for (int s = 0; s < 2; ++s) {
                const uint32_t left[4] = {x[d][0].at[2 * s], x[d][1].at[2 * s], x[d][0].at[2 * s + 1],
                                          x[d][1].at[2 * s + 1]};
                ML_UNROLL
                for (int t = 0; t < Own::TILES; ++t) {
                    const uint32_t right[2] = {a[d][t].at[2 * s], a[d][t].at[2 * s + 1]};
                    if (t * 8 < rank) multiply<T>(sums[t], left, right);
                }
            }
        }
    }
};

// sums [rows, ranks] of this warp's part of K.
template <class T, int BUCKET, bool ALIGNED>
ML_DEVICE void shrink(float (&sums)[Sizes<BUCKET>::TILES][4], const LoraArgs& args, const Tile& tile, const Site& site,
                      const Lane& lane, const Steps& steps) {
    ML_ROLL
    for (int step = steps.first; step < steps.end; step += Ahead<BUCKET, ALIGNED>::STEPS) {
        ShrinkLoads<T, BUCKET, ALIGNED> loads;
        loads.begin(args, tile, site, lane, step, steps.end);
        loads.finish(sums, site.rank);
    }
}

// Pair p of v is that of lane p % 32: row p % 32 / 4 + 8 (p / 32 % 2), ranks 8 (p / 64) + 2 (p % 4) and the next.

template <int BUCKET>
ML_DEVICE void keep(Pair (&pairs)[Sizes<BUCKET>::PAIRS], const float (&sums)[Sizes<BUCKET>::TILES][4], int rank) {
    const int lane = thread_of_block() % WARP;
    ML_UNROLL
    for (int t = 0; t < Sizes<BUCKET>::TILES; ++t) {
        if (t * 8 < rank) {
            pairs[t * 64 + lane] = {sums[t][0], sums[t][1]};
            pairs[t * 64 + 32 + lane] = {sums[t][2], sums[t][3]};
        }
    }
}

ML_DEVICE Pair operator+(const Pair& a, const Pair& b) { return {a.first + b.first, a.second + b.second}; }

template <int BUCKET>
ML_DEVICE void sum_over_warps(Shared<BUCKET>& shared, int rank) {
    const int used = (rank + 7) / 8 * 64;
    ML_ROLL
    for (int p = thread_of_block(); p < used; p += WARPS * WARP) {
        Pair total = shared.of_warps[0][p];
        ML_UNROLL
        for (int warp = 1; warp < WARPS; ++warp) total = total + shared.of_warps[warp][p];
        shared.of_block[p] = total;
    }
}

// The word of two numbers' first digits, and of what is left of them: an infinity stays one, in the second word, and
// what is beyond the largest number of 16 bit goes there too.
template <class T>
ML_DEVICE uint32_t split(Pair value, uint32_t& rest) {
    const float a = value.first > T::LARGEST ? T::LARGEST : value.first < -T::LARGEST ? -T::LARGEST : value.first;
    const float b = value.second > T::LARGEST ? T::LARGEST : value.second < -T::LARGEST ? -T::LARGEST : value.second;
    const uint32_t first = pack<T>(a, b);
    const Pair kept = unpack<T>(first);
    rest = pack<T>(value.first - kept.first, value.second - kept.second);
    return first;
}

// v of the tile, times its weight; zeros beyond the rank.
template <class T, int BUCKET>
ML_DEVICE void sum_over_cluster(Shared<BUCKET>& shared, int rank, float weight) {
    const int used = (rank + 7) / 8 * 64;
    ML_ROLL
    for (int p = thread_of_block(); p < Sizes<BUCKET>::PAIRS; p += WARPS * WARP) {
        const int row = p % 32 / 4 + p / 32 % 2 * 8, r = p / 64 * 8 + p % 4 * 2;
        Pair total = {0.0f, 0.0f};
        if (p < used) {
            total = load_from(&shared.of_block[p], 0);
            ML_UNROLL
            for (int block = 1; block < CLUSTER; ++block) total = total + load_from(&shared.of_block[p], block);
        }
        const Pair v = {r < rank ? total.first * weight : 0.0f, r + 1 < rank ? total.second * weight : 0.0f};
        shared.high[row][r / 2] = split<T>(v, shared.low[row][r / 2]);
    }
}

// What a lane has of v for one product: 16 ranks from `at` on (in words), of its own row and of the one 8 on.
ML_DEVICE void read_factor(uint32_t (&factor)[4], const uint32_t* row, const uint32_t* row_8_on, int at) {
    const Words<2> upper = *reinterpret_cast<const Words<2>*>(row + at);
    const Words<2> lower = *reinterpret_cast<const Words<2>*>(row_8_on + at);
    factor[0] = upper.at[0], factor[1] = lower.at[0], factor[2] = upper.at[1], factor[3] = lower.at[1];
}

// One warp's 32 columns of a tile: their B, bias and y on the way into registers; then the sums, then y again.
template <class T, int BUCKET, bool ALIGNED>
struct ExpandBlock {
    using Own = Sizes<BUCKET>;
    Words<Own::WORDS> b[4][Own::CHUNKS];
    Words<4> bias, y[2];
    int column;  // of the slice: this lane's first of 8

    ML_DEVICE uint16_t* row_of_y(const LoraArgs& args, const Tile& tile, const Slice& slice, int row) const {
        return args.y + (tile.start + row) * args.stride_y + slice.offset;
    }

    ML_DEVICE void begin(const LoraArgs& args, const Tile& tile, const Slice& slice, const Site& site, int block) {
        const Lane lane;
        column = block * BLOCK + lane.quarter * 8;
        const int stride = site.rank > 0 ? site.stride : 0;  // B is read up to its padding, which is zeros
        const int first = block * BLOCK + lane.row / 2 * 8 + lane.row % 2, r = lane.quarter * 2 * Own::WORDS;
        const uint16_t* from = made_here(site.b + static_cast<int64_t>(first) * stride + r);
        ML_UNROLL
        for (int j = 0; j < 4; ++j, from += 2 * stride) {
            ML_UNROLL
            for (int c = 0; c < Own::CHUNKS; ++c) {
                b[j][c] = {};
                if (first + 2 * j < slice.width && r + c * Own::CHUNK < stride)
                    b[j][c] = load_constant<Own::WORDS>(from + c * Own::CHUNK);
            }
        }
        bias = {};
        if (site.bias != nullptr) bias = load_weights<ALIGNED>(site.bias, column, slice.width);
        ML_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = lane.row + 8 * half;
            y[half] = load_row<ALIGNED>(row_of_y(args, tile, slice, row), column, row < tile.rows ? slice.width : 0);
        }
    }

    ML_DEVICE void finish(const LoraArgs& args, const Tile& tile, const Slice& slice, const Site& site,
                          const Shared<BUCKET>& shared) {
        const Lane lane;
        float sums[4][4] = {};
        ML_UNROLL
        for (int c = 0; c < Own::CHUNKS; ++c)
            if (c * Own::CHUNK < site.rank) add(sums, shared, lane, c);
        ML_UNROLL
        for (int half = 0; half < 2; ++half) {
            ML_UNROLL
            for (int j = 0; j < 4; ++j) {
                const Pair before = unpack<T>(y[half].at[j]), beta = unpack<T>(bias.at[j]);
                float first = sums[j][2 * half], second = sums[j][2 * half + 1];
                if (site.bias != nullptr) first += tile.weight * beta.first, second += tile.weight * beta.second;
                y[half].at[j] = pack<T>(before.first + first, before.second + second);
            }
            const int row = lane.row + 8 * half;
            if (row < tile.rows) write(row_of_y(args, tile, slice, row) + column, y[half], slice.width - column);
        }
    }

    ML_DEVICE void add(float (&sums)[4][4], const Shared<BUCKET>& shared, const Lane& lane, int c) const {
        ML_UNROLL
        for (int s = 0; s < Own::WORDS / 2; ++s) {
            const int at = c * Own::CHUNK / 2 + lane.quarter * Own::WORDS + 2 * s;
            uint32_t high[4], low[4];
            read_factor(high, shared.high[lane.row], shared.high[lane.row + 8], at);
            read_factor(low, shared.low[lane.row], shared.low[lane.row + 8], at);
            ML_UNROLL
            for (int j = 0; j < 4; ++j) {
                const uint32_t right[2] = {b[j][c].at[2 * s], b[j][c].at[2 * s + 1]};
                multiply<T>(sums[j], high, right);
                multiply<T>(sums[j], low, right);
            }
        }
    }

    ML_DEVICE static void write(uint16_t* to, const Words<4>& values, int left) {
        if constexpr (ALIGNED) {
            if (left > 0) store(to, values);
        } else {
            ML_UNROLL
            for (int i = 0; i < 8; ++i)
                if (i < left) store(to + i, static_cast<uint16_t>(values.at[i / 2] >> (16 * (i % 2))));
        }
    }
};

// A warp's columns of a slice: every `stride`th block of 32.
struct Blocks {
    int first, end, stride;

    ML_DEVICE Blocks(const Work& work, int warp_of_cluster) {
        first = work.part * CLUSTER * WARPS + warp_of_cluster;
        end = (work.slice.width + BLOCK - 1) / BLOCK;
        stride = work.parts * CLUSTER * WARPS;
    }
};

// Ask for the weights that this warp will read first of all.
ML_DEVICE void prefetch_weights(const LoraArgs& args, const Work& work, const Site& site, const Steps& steps,
                                const Blocks& blocks) {
    const int lane = thread_of_block() % WARP;
    ML_ROLL
    for (int r = lane; r < site.rank; r += WARP)
        ML_ROLL
        for (int k = steps.first * STEP; k < least(steps.end * STEP, args.in_features); k += LINE)
            prefetch(site.a + static_cast<int64_t>(r) * args.in_features + k);
    if (site.rank == 0) return;
    ML_ROLL
    for (int block = blocks.first; block < blocks.end; block += blocks.stride) {
        const int count = least(BLOCK, work.slice.width - block * BLOCK) * site.stride;
        ML_ROLL
        for (int at = lane * LINE; at < count; at += WARP * LINE)
            prefetch(site.b + static_cast<int64_t>(block) * BLOCK * site.stride + at);
    }
}

template <class T, int BUCKET, bool ALIGNED>
ML_KERNEL(WARPS * WARP, RESIDENT_WARPS / WARPS) lora(const LoraArgs args) {
    ML_SHARED(Shared<BUCKET>, shared);
    const Lane lane;
    const int warp_of_cluster = rank_in_cluster<CLUSTER>() * WARPS + lane.warp;
    const int clusters = clusters_of_grid<CLUSTER>();
    const Schedule schedule(args, clusters);
    const Steps steps(args.in_features, warp_of_cluster);
    int index = cluster_of_grid<CLUSTER>();
    if (index < schedule.count) {
        const Work work = schedule.work(args, index);
        const Site site = read_site<BUCKET>(args, read_tile(args, work.tile).slot, work.slice.row);
        prefetch_weights(args, work, site, steps, Blocks(work, warp_of_cluster));
    }
    grid_wait();

    bool is_read = false;  // whether other blocks may still be reading this one's sums
    ML_ROLL
    for (; index < schedule.count; index += clusters) {
        const Work work = schedule.work(args, index);
        const Tile tile = read_tile(args, work.tile);
        const Site site = read_site<BUCKET>(args, tile.slot, work.slice.row);
        if (site.is_absent()) continue;  // for all of the cluster alike, as is all that decides about barriers
        const Blocks blocks(work, warp_of_cluster);
        ExpandBlock<T, BUCKET, ALIGNED> now;
        if (site.rank > 0) {
            float sums[Sizes<BUCKET>::TILES][4] = {};
            shrink<T, BUCKET, ALIGNED>(sums, args, tile, site, lane, steps);
            keep<BUCKET>(shared.of_warps[lane.warp], sums, site.rank);
            if (blocks.first < blocks.end) now.begin(args, tile, work.slice, site, blocks.first);
            block_wait();
            if (is_read) cluster_wait();
            sum_over_warps(shared, site.rank);
            cluster_arrive();
            cluster_wait();
            sum_over_cluster<T>(shared, site.rank, tile.weight);
            cluster_arrive();
            is_read = true;
            block_wait();
        } else if (blocks.first < blocks.end) {
            now.begin(args, tile, work.slice, site, blocks.first);
        }
        ML_ROLL
        for (int block = blocks.first; block < blocks.end; block += blocks.stride) {
            const bool has_more = block + blocks.stride < blocks.end;
            if constexpr (Ahead<BUCKET, ALIGNED>::IS_DOUBLE) {
                ExpandBlock<T, BUCKET, ALIGNED> after;
                if (has_more) after.begin(args, tile, work.slice, site, block + blocks.stride);
                now.finish(args, tile, work.slice, site, shared);
                if (has_more) now = after;
            } else {
                now.finish(args, tile, work.slice, site, shared);
                if (has_more) now.begin(args, tile, work.slice, site, block + blocks.stride);
            }
        }
    }
    if (is_read) cluster_wait();  // a block's shared memory stays until the others have read it
}

using Kernel = void (*)(LoraArgs);

template <class T>
Kernel kernel_of(int bucket, bool is_aligned) {
    if (bucket <= 16) return is_aligned ? lora<T, 16, true> : lora<T, 16, false>;
    return is_aligned ? lora<T, 64, true> : lora<T, 64, false>;
}

Kernel kernel_of(int dtype, int bucket, int is_aligned) {
    return dtype == 0 ? kernel_of<Bf16>(bucket, is_aligned != 0) : kernel_of<Fp16>(bucket, is_aligned != 0);
}

}  // namespace
}  // namespace ml

extern "C" {

int ml_cuda_lora(const ml::LoraArgs* args, int dtype, int bucket, int is_aligned, int clusters, int is_early,
                 void* stream) {
    const ml::Kernel kernel = ml::kernel_of(dtype, bucket, is_aligned);
    return ml::launch(kernel, *args, clusters, ml::CLUSTER, ml::WARPS * ml::WARP, is_early != 0, stream);
}

int ml_cuda_lora_resident(int dtype, int bucket, int is_aligned) {
    return ml::resident_clusters(ml::kernel_of(dtype, bucket, is_aligned), ml::CLUSTER, ml::WARPS * ml::WARP);
}

int ml_cuda_lora_columns() { return ml::COLUMNS; }
const char* ml_cuda_error(int error) { return ml::error_text(error); }
}
