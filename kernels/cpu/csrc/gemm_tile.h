// The innermost loop of gemm: a few rows of x by one or more panels of W, over some tiles of k, with the
// sums in registers. Three versions: AMX tiles, AVX-512 bf16 dot products, plain C++.
#pragma once

#include "amx.h"
#include "gemm.h"

// Weights that a step asks memory for while it computes: at tile t, tile t of `first` (and of its panels'
// neighbours), from `wrap` on tile t - wrap of `second`. Of the 16 lines of a tile those whose bit is set.
struct Ahead {
    const bf16* first;
    const bf16* second;  // null: nothing more
    int64_t wrap;
    uint32_t lines;
};

struct Step {
    const bf16* x;         // [tiles][rows][32], zero padded
    const bf16* w;         // `panels` times [tiles][512]
    int64_t panel_stride;  // elements between panels
    int64_t tiles;
    float* c;     // [rows][panels * 16] sums
    bool from_c;  // go on from c's sums, else from 0
    Ahead ahead;
};

using TileKernel = void (*)(const Step&);

template <int PANELS>
inline void prefetch_line(const bf16* ahead, int64_t panel_stride, int line) {
    for (int j = 0; j < PANELS; ++j) __builtin_prefetch(ahead + j * panel_stride + line * 32, 0, 2);
}

inline const bf16* ahead_of_tile(const Ahead& ahead, int64_t tile) {
    if (tile < ahead.wrap) return ahead.first + tile * kTileSize;
    return ahead.second ? ahead.second + (tile - ahead.wrap) * kTileSize : nullptr;
}

#if defined(ML_AMX)

constexpr int kMaxRows = 32, kMaxPanels = 4, kChunkTiles = 64;

inline int max_panels(int64_t rows) { return rows <= 16 ? 4 : 2; }

// Tiles 0-3 are sums, 4-5 rows of x, 6-7 panels. Up to 16 rows: 1 x 4 sums, more: 2 x 2.
inline void begin_tiles(int64_t rows) {
    amx::Config config;
    const int upper = static_cast<int>(std::min<int64_t>(rows, 16)), lower = static_cast<int>(rows) - upper;
    for (int i = 0; i < 4; ++i) config.set(i, lower && i >= 2 ? lower : upper);
    config.set(4, upper);
    config.set(5, lower ? lower : upper);
    config.set(6, 16);
    config.set(7, 16);
    amx::configure(config);
}

inline void end_tiles() { amx::release(); }

template <int ROW_TILES, int PANELS, class F>
inline void each_sum(F&& f) {  // f(tile as a constant, row tile, panel)
    f(std::integral_constant<int, 0>{}, 0, 0);
    if constexpr (PANELS > 1) f(std::integral_constant<int, 1>{}, 0, 1);
    if constexpr (ROW_TILES > 1) f(std::integral_constant<int, 2>{}, 1, 0);
    if constexpr (ROW_TILES > 1 && PANELS > 1) f(std::integral_constant<int, 3>{}, 1, 1);
    if constexpr (PANELS > 2) f(std::integral_constant<int, 2>{}, 0, 2);
    if constexpr (PANELS > 2) f(std::integral_constant<int, 3>{}, 0, 3);
}

template <int ROW_TILES, int PANELS>
void amx_tile(const Step& s, int64_t rows) {
    constexpr int64_t kRowBytes = PANELS * kPanel * 4;
    const auto sums = [&](int row_tile, int panel) { return s.c + row_tile * 16 * PANELS * kPanel + panel * kPanel; };
    each_sum<ROW_TILES, PANELS>([&](auto tile, int row_tile, int panel) {
        if (s.from_c) amx::load<tile>(sums(row_tile, panel), kRowBytes);
        else amx::zero<tile>();
    });
    for (int64_t t = 0; t < s.tiles; ++t) {
        const bf16* x = s.x + t * rows * kTileK;
        const bf16* w = s.w + t * kTileSize;
        if (const bf16* ahead = ahead_of_tile(s.ahead, t)) {
            for (uint32_t lines = s.ahead.lines; lines; lines &= lines - 1) {
                prefetch_line<PANELS>(ahead, s.panel_stride, __builtin_ctz(lines));
            }
        }
        amx::load<4>(x, 64);
        if constexpr (ROW_TILES > 1) amx::load<5>(x + 16 * kTileK, 64);
        amx::load<6>(w, 64);
        amx::dot<0, 4, 6>();
        if constexpr (ROW_TILES > 1) amx::dot<2, 5, 6>();
        if constexpr (PANELS > 1) amx::load<7>(w + s.panel_stride, 64);
        if constexpr (PANELS > 1) amx::dot<1, 4, 7>();
        if constexpr (PANELS > 1 && ROW_TILES > 1) amx::dot<3, 5, 7>();
        if constexpr (PANELS > 2) amx::load<6>(w + 2 * s.panel_stride, 64);
        if constexpr (PANELS > 2) amx::dot<2, 4, 6>();
        if constexpr (PANELS > 2) amx::load<7>(w + 3 * s.panel_stride, 64);
        if constexpr (PANELS > 2) amx::dot<3, 4, 7>();
    }
    each_sum<ROW_TILES, PANELS>([&](auto tile, int row_tile, int panel) {
        amx::store<tile>(sums(row_tile, panel), kRowBytes);
    });
}

template <int ROWS, int PANELS>
void tile_kernel(const Step& s) {
    if constexpr (ROWS <= 16) amx_tile<1, PANELS>(s, ROWS);
    else if constexpr (PANELS <= 2) amx_tile<2, PANELS>(s, ROWS);
}

#elif defined(__AVX512BF16__)

constexpr int kMaxRows = 12, kMaxPanels = 4, kChunkTiles = 32;

inline int max_panels(int64_t rows) { return rows <= 6 ? 4 : 2; }  // at most 24 sums of the 32 registers
inline void begin_tiles(int64_t) {}
inline void end_tiles() {}

template <int ROWS, int PANELS>
void tile_kernel(const Step& s) {
    if constexpr (ROWS * PANELS <= 24) {
        __m512 sums[ROWS][PANELS];
        for (int r = 0; r < ROWS; ++r) {
            for (int j = 0; j < PANELS; ++j) {
                sums[r][j] = s.from_c ? _mm512_loadu_ps(s.c + (r * PANELS + j) * kPanel) : _mm512_setzero_ps();
            }
        }
        for (int64_t t = 0; t < s.tiles; ++t) {
            const bf16* x = s.x + t * ROWS * kTileK;
            const bf16* w = s.w + t * kTileSize;
            const bf16* ahead = ahead_of_tile(s.ahead, t);
            const uint32_t lines = ahead ? s.ahead.lines : 0;
#pragma GCC unroll 4
            for (int p = 0; p < 16; ++p) {
                __m512bh panels[PANELS];
#pragma GCC unroll 4
                for (int j = 0; j < PANELS; ++j) {
                    panels[j] = (__m512bh)_mm512_loadu_si512(w + j * s.panel_stride + p * 32);
                }
                if (lines >> p & 1) prefetch_line<PANELS>(ahead, s.panel_stride, p);
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; ++r) {
                    int pair;
                    std::memcpy(&pair, x + r * kTileK + p * 2, 4);
                    const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                    for (int j = 0; j < PANELS; ++j) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], panels[j], both);
                }
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            for (int j = 0; j < PANELS; ++j) _mm512_storeu_ps(s.c + (r * PANELS + j) * kPanel, sums[r][j]);
        }
    }
}

#else

constexpr int kMaxRows = 4, kMaxPanels = 1, kChunkTiles = 16;

inline int max_panels(int64_t) { return 1; }
inline void begin_tiles(int64_t) {}
inline void end_tiles() {}

inline float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <int ROWS, int PANELS>
void tile_kernel(const Step& s) {
    float sums[ROWS][kPanel];
    for (int r = 0; r < ROWS; ++r) {
        for (int n = 0; n < kPanel; ++n) sums[r][n] = s.from_c ? s.c[r * kPanel + n] : 0.0f;
    }
    for (int64_t t = 0; t < s.tiles; ++t) {
        for (int p = 0; p < 16; ++p) {
            uint32_t pairs[kPanel];  // of one k-pair: the even k in the lower half (on a little-endian machine)
            std::memcpy(pairs, s.w + t * kTileSize + p * 32, 64);
            for (int r = 0; r < ROWS; ++r) {
                const bf16* x = s.x + (t * ROWS + r) * kTileK + p * 2;
                const float even = to_float(x[0]), odd = to_float(x[1]);
                for (int n = 0; n < kPanel; ++n) {
                    const float product = even * float_of_bits(pairs[n] << 16);
                    sums[r][n] = sums[r][n] + product + odd * float_of_bits(pairs[n] & 0xffff0000u);
                }
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int n = 0; n < kPanel; ++n) s.c[r * kPanel + n] = sums[r][n];
    }
}

#endif
