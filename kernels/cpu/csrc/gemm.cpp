#include "gemm.h"

#include <cstdlib>
#include <utility>

#include "gemm_tile.h"

namespace {

constexpr int64_t kBlockBytes = 384 << 10;     // of packed x, to stay in the second-level cache
constexpr int64_t kMaxBlockTiles = 12;         // row tiles in a block
constexpr int64_t kMinRowsPerGroup = 48;       // rows of a thread before it is worth to read all weights for them

// Tiles of a panel that are asked for ahead where one pass reads each weight once. Measured: four panels are
// four streams, which the processor's own prefetching follows, the better the faster they are consumed.
inline int64_t ahead_tiles(int panels, int64_t rows) { return rows <= 4 ? 1 : panels >= 4 ? 2 : 8; }

// One thread's memory between calls, grown as needed.
class Scratch {
public:
    ~Scratch() { std::free(data_); }

    void* get(size_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + 4095) / 4096 * 4096;
            data_ = std::aligned_alloc(4096, size_);
            if (!data_) std::abort();
        }
        return data_;
    }

private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

template <int ROWS>
TileKernel kernel_of(int panels) {
    switch (panels) {
        case 1: return tile_kernel<ROWS, 1>;
        case 2: return kMaxPanels >= 2 ? tile_kernel<ROWS, 2> : nullptr;
        default: return kMaxPanels >= 4 ? tile_kernel<ROWS, 4> : nullptr;
    }
}

template <int... ROW>
TileKernel find_kernel(int64_t rows, int panels, std::integer_sequence<int, ROW...>) {
    using Find = TileKernel (*)(int);
    static constexpr Find kFind[] = {kernel_of<ROW + 1>...};
    return kFind[rows - 1](panels);
}

TileKernel find_kernel(int64_t rows, int panels) {
    return find_kernel(rows, panels, std::make_integer_sequence<int, kMaxRows>{});
}

// A block of rows, cut into `count` tiles of nearly the same number of rows.
struct RowTiles {
    int64_t rows, count;

    explicit RowTiles(int64_t all) : rows(all), count((all + kMaxRows - 1) / kMaxRows) {}
    int64_t begin(int64_t tile) const { return rows * tile / count; }
    int64_t size(int64_t tile) const { return begin(tile + 1) - begin(tile); }
    int64_t max_size() const { return (rows + count - 1) / count; }
};

// Rows of x as [row tile][tile of k][row][32], zeros beyond k.
void pack_x(const bf16* x, int64_t stride, const RowTiles& row_tiles, int64_t k, bf16* to) {
    const int64_t whole = k / kTileK, rest = k % kTileK, tiles = num_tiles(k);
    for (int64_t i = 0; i < row_tiles.count; ++i) {
        const int64_t rows = row_tiles.size(i);
        for (int64_t r = 0; r < rows; ++r) {
            const bf16* from = x + (row_tiles.begin(i) + r) * stride;
            bf16* line = to + (row_tiles.begin(i) * tiles + r) * kTileK;
            for (int64_t t = 0; t < whole; ++t) std::memcpy(line + t * rows * kTileK, from + t * kTileK, 64);
            if (rest) {
                std::memset(line + whole * rows * kTileK, 0, 64);
                std::memcpy(line + whole * rows * kTileK, from + whole * kTileK, rest * 2);
            }
        }
    }
}

// y[:, column : column + panels * 16] of one row tile from its sums: bias, one rounding.
void store_sums(const GemmArgs& a, const float* c, int64_t row, int64_t rows, int64_t column, int panels) {
    for (int64_t r = 0; r < rows; ++r) {
        bf16* y = a.y + (row + r) * a.y_stride;
        for (int j = 0; j < panels; ++j) {
            const int64_t first = column + j * kPanel, count = std::min(kPanel, a.n - first);
            const float* sums = c + (r * panels + j) * kPanel;
#if defined(__AVX512BF16__)
            const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
            __m512 values = _mm512_loadu_ps(sums);
            if (a.bias) values = _mm512_add_ps(values, load_bf16(a.bias + first, mask));
            store_bf16(y + first, values, mask);
#else
            for (int64_t n = 0; n < count; ++n) {
                y[first + n] = from_float(sums[n] + (a.bias ? to_float(a.bias[first + n]) : 0.0f));
            }
#endif
        }
    }
}

// The panels [first, last) of y for a block of rows that begins at `row`, one group of panels at a time.
// A single row tile goes through all of k with its sums in registers; several take turns on chunks of k, so
// that a chunk of weights comes from memory once, while the one before it is computed with.
class Block {
public:
    Block(const GemmArgs& args, int64_t row, int64_t rows, bf16* x, float* c)
        : a_(args), row_(row), row_tiles_(rows), tiles_(num_tiles(args.k)), c_(c) {
        const bool in_place = rows == 1 && args.k % kTileK == 0;  // one row has the packed layout already
        x_ = in_place ? args.x + row * args.x_stride : x;
        if (!in_place) pack_x(args.x + row * args.x_stride, args.x_stride, row_tiles_, args.k, x);
        chunk_ = row_tiles_.count == 1 ? tiles_ : std::min<int64_t>(tiles_, kChunkTiles);
    }

    void run(Range panels) {
        const int most = max_panels(row_tiles_.max_size());
        for (int64_t panel = panels.begin; panel < panels.end;) {
            int count = most;
            while (panel + count > panels.end) count /= 2;
            group(panel, count, panel + count < panels.end);
            panel += count;
        }
        end_tiles();
    }

private:
    void group(int64_t panel, int panels, bool has_next) {
        const bf16* w = a_.w + panel * tiles_ * kTileSize;
        const bf16* next = has_next ? w + panels * tiles_ * kTileSize : nullptr;
        for (int64_t t = 0; t < tiles_; t += chunk_) {
            const int64_t tiles = std::min(chunk_, tiles_ - t);
            for (int64_t i = 0; i < row_tiles_.count; ++i) {
                const int64_t rows = row_tiles_.size(i), begin = row_tiles_.begin(i);
                const bf16* x = x_ + (begin * tiles_ + t * rows) * kTileK;
                float* c = c_ + begin * panels * kPanel;
                const Ahead ahead = ahead_of(w, next, t, tiles, i, panels);
                if (rows != configured_) begin_tiles(configured_ = rows);
                find_kernel(rows, panels)({x, w + t * kTileSize, tiles_ * kTileSize, tiles, c, t > 0, ahead});
                if (t + tiles == tiles_) store_sums(a_, c, row_ + begin, rows, panel * kPanel, panels);
            }
        }
    }

    Ahead ahead_of(const bf16* w, const bf16* next, int64_t t, int64_t tiles, int64_t row_tile, int panels) const {
        const int64_t count = row_tiles_.count;
        if (count == 1) {
            const int64_t first = std::min(ahead_tiles(panels, row_tiles_.rows), tiles);
            return {w + first * kTileSize, next, tiles - first, 0xffff};
        }
        uint32_t lines = 0;  // every row tile asks for its part of the next chunk
        for (int64_t line = row_tile; line < 16; line += count) lines |= 1u << line;
        const bool is_last = t + tiles == tiles_;
        return {nullptr, is_last ? next : w + (t + tiles) * kTileSize, 0, lines};
    }

    const GemmArgs& a_;
    int64_t row_;
    RowTiles row_tiles_;
    int64_t tiles_, chunk_;
    const bf16* x_;
    float* c_;
    int64_t configured_ = 0;  // rows that begin_tiles was told
};

// How many groups the team's threads form that share the rows out; the threads of a group share the columns.
int row_groups(int size, int64_t rows) {
    int groups = static_cast<int>(std::min<int64_t>(size, rows / kMinRowsPerGroup));
    while (groups > 1 && size % groups) --groups;
    return std::max(groups, 1);
}

int64_t max_block_rows(int64_t k) {
    const int64_t fitting = kBlockBytes / (num_tiles(k) * kTileK * 2) / kMaxRows;
    return std::clamp<int64_t>(fitting, 2, kMaxBlockTiles) * kMaxRows;
}

}  // namespace

void gemm(const Team& team, const GemmArgs& a) {
    static thread_local Scratch scratch;
    const int groups = row_groups(team.size, a.rows), members = team.size / groups;
    const Range rows = share({team.tid / members, groups, nullptr}, a.rows);
    const Range panels = share({team.tid % members, members, nullptr}, num_panels(a.n));
    const int64_t count = rows.end - rows.begin, max_rows = max_block_rows(a.k);
    if (!count || panels.begin == panels.end) return;
    const int64_t blocks = (count + max_rows - 1) / max_rows, per_block = (count + blocks - 1) / blocks;
    const size_t c_bytes = per_block * kMaxPanels * kPanel * sizeof(float);
    char* memory = static_cast<char*>(scratch.get(c_bytes + per_block * num_tiles(a.k) * kTileK * sizeof(bf16)));
    for (int64_t row = rows.begin; row < rows.end; row += per_block) {
        const int64_t block = std::min(per_block, rows.end - row);
        Block(a, row, block, reinterpret_cast<bf16*>(memory + c_bytes), reinterpret_cast<float*>(memory)).run(panels);
    }
}

void pack(const Team& team, const bf16* w, int64_t stride, int64_t n, int64_t k, bf16* packed) {
    const int64_t tiles = num_tiles(k);
    const Range panels = share(team, num_panels(n));
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        for (int64_t t = 0; t < tiles; ++t) {
            bf16* tile = packed + (panel * tiles + t) * kTileSize;
            std::memset(tile, 0, kTileSize * 2);
            for (int64_t i = 0; i < std::min(kPanel, n - panel * kPanel); ++i) {
                const bf16* row = w + (panel * kPanel + i) * stride + t * kTileK;
                const int64_t count = std::min(kTileK, k - t * kTileK);
                for (int64_t j = 0; j < count; ++j) tile[(j / 2 * kPanel + i) * 2 + j % 2] = row[j];
            }
        }
    }
}

void unpack_rows(const Team& team, const bf16* packed, int64_t k, const int64_t* ids, int64_t count, bf16* out,
                 int64_t stride) {
    const int64_t tiles = num_tiles(k);
    const Range range = share(team, count);
    for (int64_t i = range.begin; i < range.end; ++i) {
        const bf16* panel = packed + ids[i] / kPanel * tiles * kTileSize + ids[i] % kPanel * 2;
        bf16* row = out + i * stride;
        for (int64_t pair = 0; pair < k / 2; ++pair) std::memcpy(row + pair * 2, panel + pair * 2 * kPanel, 4);
        if (k % 2) row[k - 1] = panel[k / 2 * 2 * kPanel];
    }
}

extern "C" {

int64_t ml_packed_bytes(int64_t n, int64_t k) { return packed_size(n, k) * static_cast<int64_t>(sizeof(bf16)); }

int ml_gemm(const GemmArgs* args) {
    parallel([&](const Team& team) { gemm(team, *args); });
    return 0;
}

// `count` products one after another in one parallel region; each may read what those before it wrote.
int ml_gemms(const GemmArgs* args, int64_t count) {
    parallel([&](const Team& team) {
        for (int64_t i = 0; i < count; ++i) {
            if (i) team.wait();
            gemm(team, args[i]);
        }
    });
    return 0;
}

int ml_pack(const bf16* w, int64_t stride, int64_t n, int64_t k, bf16* packed) {
    parallel([&](const Team& team) { pack(team, w, stride, n, k, packed); });
    return 0;
}

int ml_unpack_rows(const bf16* packed, int64_t k, const int64_t* ids, int64_t count, bf16* out, int64_t stride) {
    parallel([&](const Team& team) { unpack_rows(team, packed, k, ids, count, out, stride); });
    return 0;
}

}
