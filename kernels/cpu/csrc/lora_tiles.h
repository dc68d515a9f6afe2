// The inner loops of the segmented low-rank delta, with AVX-512 bf16 dot products or in plain C++.
//
//     shrink_tile   v[row, ranks] = A[ranks, :] x[row, :]        up to 8 ranks, any number of rows
//     arrange       16 rows of B as columns, for expand_row
//     expand_row    16 sums of B v for one row, from what `arrange` left
//     arrange_wide  32 rows of B as columns, for expand_tall
//     expand_tall   y += B v for many rows, from what `arrange_wide` left of each 32 rows of B
//
// A result has one order of accumulation that depends on K and the rank alone: never on the number of rows,
// of threads, or on how the ranks were cut into tiles.
#pragma once

#include "simd.h"

#include <algorithm>
#include <cstring>

namespace lora {

constexpr int kRankBlock = 8;  // ranks of one shrink tile at most
constexpr int kWidth = 16;     // rows of B that are arranged together, columns of y that are written together

// v is kept at this many elements a row: what one arranged load takes, the rest zeros.
inline int64_t v_stride(int64_t stride) { return stride <= 16 ? stride : (stride + 31) / 32 * 32; }

// What to bring near while a tile is read: as many bytes from `next` on.
struct Ahead {
    const char* next;
};

// Elements of one arranged block of 16 rows of B.
inline int64_t arranged_elements(int64_t stride) { return kWidth * v_stride(stride); }

inline void add_to(bf16* y, Floats sums, int64_t count) { store(y, load(y, count) + sums, count); }

}  // namespace lora

#if defined(__AVX512BF16__)
#include "lora_avx512.h"
#else
#include "lora_portable.h"
#endif
