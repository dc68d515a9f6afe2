// AMX tiles: 8 registers of up to 16 rows of 64 bytes. With ML_AMX_EMULATED the same functions as plain
// loops over thread-local memory, so that the code above them runs on any CPU.
#pragma once

#if defined(ML_AMX)

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bf16.h"

namespace amx {

// What ldtilecfg reads: 64 bytes, palette 1.
struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int count, int bytes = 64) {
        rows[tile] = static_cast<uint8_t>(count);
        row_bytes[tile] = static_cast<uint16_t>(bytes);
    }
};

#if defined(ML_AMX_EMULATED)

struct State {
    Config config;
    uint8_t tiles[8][16][64];
};

inline State& state() {
    static thread_local State tiles;
    return tiles;
}

inline void configure(const Config& config) {
    state().config = config;
    std::memset(state().tiles, 0, sizeof state().tiles);
}

inline void release() { configure(Config{}); }

template <int TILE>
inline void zero() {
    std::memset(state().tiles[TILE], 0, sizeof state().tiles[TILE]);
}

template <int TILE>
inline void load(const void* from, int64_t stride) {
    zero<TILE>();
    const Config& config = state().config;
    for (int r = 0; r < config.rows[TILE]; ++r) {
        std::memcpy(state().tiles[TILE][r], static_cast<const uint8_t*>(from) + r * stride, config.row_bytes[TILE]);
    }
}

template <int TILE>
inline void store(void* to, int64_t stride) {
    const Config& config = state().config;
    for (int r = 0; r < config.rows[TILE]; ++r) {
        std::memcpy(static_cast<uint8_t*>(to) + r * stride, state().tiles[TILE][r], config.row_bytes[TILE]);
    }
}

// sums[m][n] += x[m][k] * w[k / 2][n][k % 2] over the configured rows, columns and k.
template <int SUMS, int X, int W>
inline void dot() {
    const Config& config = state().config;
    for (int m = 0; m < config.rows[SUMS]; ++m) {
        for (int pair = 0; pair < config.row_bytes[X] / 4; ++pair) {
            bf16 x[2];
            std::memcpy(x, state().tiles[X][m] + pair * 4, 4);
            for (int n = 0; n < config.row_bytes[SUMS] / 4; ++n) {
                float sum;
                bf16 w[2];
                std::memcpy(&sum, state().tiles[SUMS][m] + n * 4, 4);
                std::memcpy(w, state().tiles[W][pair] + n * 4, 4);
                sum += to_float(x[0]) * to_float(w[0]);
                sum += to_float(x[1]) * to_float(w[1]);
                std::memcpy(state().tiles[SUMS][m] + n * 4, &sum, 4);
            }
        }
    }
}

#else

// As assembly with the registers' numbers as constants: the compilers' intrinsics are macros in some, which
// take no template argument.
inline void configure(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }

inline void release() { asm volatile("tilerelease" ::: "memory"); }

template <int TILE>
inline void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}

template <int TILE>
inline void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
inline void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}

template <int SUMS, int X, int W>
inline void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(X), "i"(W));
}

#endif

}  // namespace amx

#endif
