// See lora_tiles.h. Included by it only.
#pragma once

namespace lora {

inline __m512bh as_bf16(__m512i value) { return reinterpret_cast<__m512bh>(value); }

inline __mmask32 first32(int64_t count) {
    return count >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((uint64_t{1} << std::max<int64_t>(count, 0)) - 1);
}

// Sums of the 16 lanes of eight vectors, in the lower eight lanes; each sum in the same order.
inline __m512 sum_lanes(const __m512 acc[8]) {
    __m512 quads[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const __m512* a = acc + 4 * half;
        const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
        const __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
        const __m512d l = _mm512_castps_pd(low), h = _mm512_castps_pd(high);
        quads[half] = _mm512_add_ps(
            _mm512_castpd_ps(_mm512_unpacklo_pd(l, h)), _mm512_castpd_ps(_mm512_unpackhi_pd(l, h)));
    }
    const __m512 pairs = _mm512_add_ps(
        _mm512_shuffle_f32x4(quads[0], quads[1], 0x88), _mm512_shuffle_f32x4(quads[0], quads[1], 0xDD));
    return _mm512_add_ps(_mm512_shuffle_f32x4(pairs, pairs, 0x08), _mm512_shuffle_f32x4(pairs, pairs, 0x0D));
}

// Every loop over registers is unrolled by name: gcc then knows each array's elements for registers from the start, and
// doesn't write them to memory at every step.

// One step of shrink_registers: the 32 (or `mask`) elements at k, and LINES lines of what comes next.
template <int ROWS, int RANKS, int LINES>
inline __attribute__((always_inline)) void shrink_step(
    const bf16* const (&rank)[RANKS], const bf16* x, int64_t x_stride, int64_t k, __mmask32 mask, Ahead ahead,
    __m512 (&acc)[ROWS][RANKS]) {
    __m512bh columns[ROWS];
#pragma GCC unroll 3
    for (int i = 0; i < ROWS; ++i) columns[i] = as_bf16(_mm512_maskz_loadu_epi16(mask, x + i * x_stride + k));
#pragma GCC unroll 8
    for (int j = 0; j < RANKS; ++j) {
        if (j < LINES) __builtin_prefetch(ahead.next + 2 * LINES * k + 64 * j, 0, 2);
        const __m512bh weights = as_bf16(_mm512_maskz_loadu_epi16(mask, rank[j] + k));
#pragma GCC unroll 3
        for (int i = 0; i < ROWS; ++i) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], weights, columns[i]);
    }
}

// ROWS rows against RANKS ranks: one accumulator each, whose lanes run over K. Asks for LINES times 2 K bytes.
template <int ROWS, int RANKS, int LINES>
inline void shrink_registers(
    const bf16* a, int64_t count, int64_t K, const bf16* x, int64_t x_stride, bf16* v, int64_t v_step, Ahead ahead) {
    const bf16* rank[RANKS];  // ranks that there are not repeat the last one, and are not stored
#pragma GCC unroll 8
    for (int j = 0; j < RANKS; ++j) rank[j] = a + std::min<int64_t>(j, count - 1) * K;
    __m512 acc[ROWS][RANKS];
#pragma GCC unroll 3
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < RANKS; ++j) acc[i][j] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 32 <= K; k += 32) shrink_step<ROWS, RANKS, LINES>(rank, x, x_stride, k, ~__mmask32{0}, ahead, acc);
    if (k < K) shrink_step<ROWS, RANKS, LINES>(rank, x, x_stride, k, first32(K - k), ahead, acc);
    const __mmask16 stored = static_cast<__mmask16>(first32(count));
#pragma GCC unroll 3
    for (int i = 0; i < ROWS; ++i) {
        __m512 eight[8];
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) eight[j] = j < RANKS ? acc[i][std::min(j, RANKS - 1)] : _mm512_setzero_ps();
        store_bf16(v + i * v_step, sum_lanes(eight), stored);
    }
}

// What comes next is asked for by the first rows, or, where there are turns enough, by every turn its part.
template <int RANKS>
inline void shrink_rows(
    const bf16* a, int64_t count, int64_t K, const bf16* x, int64_t x_stride, int64_t rows, bf16* v, int64_t v_step,
    Ahead ahead) {
    if (rows == 1) return shrink_registers<1, RANKS, RANKS>(a, count, K, x, x_stride, v, v_step, ahead);
    if (rows == 2) return shrink_registers<2, RANKS, RANKS>(a, count, K, x, x_stride, v, v_step, ahead);
    int64_t i = 0;
    if (rows < 3 * RANKS) {
        shrink_registers<3, RANKS, RANKS>(a, count, K, x, x_stride, v, v_step, ahead);
        i = 3;
    } else {
        for (int turn = 0; turn < RANKS; ++turn, i += 3, ahead.next += 2 * K)
            shrink_registers<3, RANKS, 1>(a, count, K, x + i * x_stride, x_stride, v + i * v_step, v_step, ahead);
    }
    for (; i + 3 <= rows; i += 3)
        shrink_registers<3, RANKS, 0>(a, count, K, x + i * x_stride, x_stride, v + i * v_step, v_step, ahead);
    if (rows - i == 2)
        shrink_registers<2, RANKS, 0>(a, count, K, x + i * x_stride, x_stride, v + i * v_step, v_step, ahead);
    if (rows - i == 1)
        shrink_registers<1, RANKS, 0>(a, count, K, x + i * x_stride, x_stride, v + i * v_step, v_step, ahead);
}

// v[0 : rows, 0 : count] = x A^T; a [count, K], 1 <= count <= 8.
inline void shrink_tile(
    const bf16* a, int64_t count, int64_t K, const bf16* x, int64_t x_stride, int64_t rows, bf16* v, int64_t v_step,
    Ahead ahead) {
    if (count > 4) shrink_rows<8>(a, count, K, x, x_stride, rows, v, v_step, ahead);
    else if (count > 2) shrink_rows<4>(a, count, K, x, x_stride, rows, v, v_step, ahead);
    else shrink_rows<2>(a, count, K, x, x_stride, rows, v, v_step, ahead);
}

// 16 rows of B, 32 ranks at a time, as vectors of pairs of ranks. With QUARTERS (of 8 ranks) in a row of B,
// a 64-byte load holds 4 / QUARTERS rows of B; a group of four loads is transposed within the 128-bit lanes:
//
//     load i of a group, lane L:  pairs 0 1 2 3 of one quarter   ──▶   vector p, lane L:  pair p of loads 0 1 2 3
//
// so vector p of a group is multiplied by v with pair p of each quarter in its lane's four places.
template <int QUARTERS>
inline void arrange_chunk(const bf16* b, int64_t row_step, int64_t width, int64_t count, const char* ahead, bf16* out) {
    constexpr int kRows = 4 / QUARTERS;  // of B in a load
    for (int group = 0; group < QUARTERS; ++group) {
        __m512i load[4];
        for (int i = 0; i < 4; ++i) {
            const int64_t first = (4 * group + i) * kRows;
            __builtin_prefetch(ahead + first * row_step * 2, 0, 2);
            const int64_t elements = QUARTERS == 4 ? (first < count ? width : 0) : (count - first) * width;
            load[i] = _mm512_maskz_loadu_epi16(first32(elements), b + first * row_step);
        }
        const __m512i low01 = _mm512_unpacklo_epi32(load[0], load[1]), high01 = _mm512_unpackhi_epi32(load[0], load[1]);
        const __m512i low23 = _mm512_unpacklo_epi32(load[2], load[3]), high23 = _mm512_unpackhi_epi32(load[2], load[3]);
        _mm512_store_si512(out + 128 * group, _mm512_unpacklo_epi64(low01, low23));
        _mm512_store_si512(out + 128 * group + 32, _mm512_unpackhi_epi64(low01, low23));
        _mm512_store_si512(out + 128 * group + 64, _mm512_unpacklo_epi64(high01, high23));
        _mm512_store_si512(out + 128 * group + 96, _mm512_unpackhi_epi64(high01, high23));
    }
}

// The 16 columns' sums in order, from one accumulator per group.
template <int QUARTERS>
inline __m512 in_order(const __m512 acc[QUARTERS]) {
    if constexpr (QUARTERS == 1) {
        const __m512i from = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        return _mm512_permutexvar_ps(from, acc[0]);
    } else {
        const auto add_lanes = [](__m512 a, __m512 b) {
            return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
        };
        if constexpr (QUARTERS == 4) return add_lanes(add_lanes(acc[0], acc[1]), add_lanes(acc[2], acc[3]));
        const __m512i from = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
        return _mm512_permutexvar_ps(from, add_lanes(acc[0], acc[1]));
    }
}

// 32 ranks of v (fewer repeated over the lanes), then pair p of each quarter in all places of its lane.
template <int QUARTERS>
inline void spread(const bf16* v, __m512bh pairs[4]) {
    __m512i all;
    if constexpr (QUARTERS == 1) all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(v)));
    else if constexpr (QUARTERS == 2)
        all = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v)));
    else all = _mm512_loadu_si512(v);
    pairs[0] = as_bf16(_mm512_shuffle_epi32(all, _MM_PERM_AAAA));
    pairs[1] = as_bf16(_mm512_shuffle_epi32(all, _MM_PERM_BBBB));
    pairs[2] = as_bf16(_mm512_shuffle_epi32(all, _MM_PERM_CCCC));
    pairs[3] = as_bf16(_mm512_shuffle_epi32(all, _MM_PERM_DDDD));
}

template <int QUARTERS>
inline void multiply(const bf16* arranged, const __m512bh pairs[4], __m512 acc[QUARTERS]) {
    for (int group = 0; group < QUARTERS; ++group)
        for (int p = 0; p < 4; ++p) {
            const __m512bh columns = as_bf16(_mm512_load_si512(arranged + 32 * (4 * group + p)));
            acc[group] = _mm512_dpbf16_ps(acc[group], columns, pairs[p]);
        }
}

// b: the first of `count` (at most 16) rows. As many bytes from `ahead` on are brought into the cache.
inline void arrange(const bf16* b, int64_t stride, int64_t count, const char* ahead, bf16* out) {
    if (stride == 8) return arrange_chunk<1>(b, 8, 8, count, ahead, out);
    if (stride == 16) return arrange_chunk<2>(b, 16, 16, count, ahead, out);
    for (int64_t r = 0; r < stride; r += 32)
        arrange_chunk<4>(b + r, stride, std::min<int64_t>(32, stride - r), count, ahead + 2 * r, out + kWidth * r);
}

// For each of `blocks` arranged blocks, sink(block, sums of v over it). v has v_stride(stride) elements.
template <int QUARTERS, class Sink>
inline void expand_short(const bf16* arranged, int64_t blocks, const bf16* v, Sink&& sink) {
    __m512bh pairs[4];
    spread<QUARTERS>(v, pairs);
    for (int64_t block = 0; block < blocks; ++block) {
        __m512 acc[QUARTERS];
        for (auto& a : acc) a = _mm512_setzero_ps();
        multiply<QUARTERS>(arranged + block * 128 * QUARTERS, pairs, acc);
        sink(block, Floats{in_order<QUARTERS>(acc)});
    }
}

template <class Sink>
inline void expand_row(const bf16* arranged, int64_t stride, int64_t blocks, const bf16* v, Sink&& sink) {
    if (stride == 8) return expand_short<1>(arranged, blocks, v, sink);
    if (stride == 16) return expand_short<2>(arranged, blocks, v, sink);
    if (stride > 16 && stride <= 32) return expand_short<4>(arranged, blocks, v, sink);
    const int64_t ranks = v_stride(stride);
    for (int64_t block = 0; block < blocks; ++block) {
        __m512 acc[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t r = 0; r < ranks; r += 32) {
            __m512bh pairs[4];
            spread<4>(v + r, pairs);
            multiply<4>(arranged + block * kWidth * ranks + kWidth * r, pairs, acc);
        }
        sink(block, Floats{in_order<4>(acc)});
    }
}

// --- many rows ------------------------------------------------------------------------------------------
//
// The same sums with a column of y in each lane: rows of v and 32 columns share a register tile, and nothing is
// summed over lanes. `expand_row` adds the quarters of 32 ranks at the end; so does this, quarter by quarter.

// What arrange_chunk left, as a vector of 16 columns per pair of ranks, pair i at out + 4 kWidth i.
template <int QUARTERS>
inline void arrange_columns(const bf16* arranged, bf16* out) {
    const auto group = [&](int g, int p) { return _mm512_load_si512(arranged + 128 * g + 32 * p); };
    const auto store = [&](int quarter, int p, __m512i columns) {
        _mm512_store_si512(out + 4 * kWidth * (4 * quarter + p), columns);
    };
    for (int p = 0; p < 4; ++p) {
        if constexpr (QUARTERS == 1) {
            const __m512i from = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            store(0, p, _mm512_permutexvar_epi32(from, group(0, p)));
        } else if constexpr (QUARTERS == 2) {
            const __m512i from = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 16, 24, 17, 25, 18, 26, 19, 27);
            const __m512i other = _mm512_add_epi32(from, _mm512_set1_epi32(4));
            store(0, p, _mm512_permutex2var_epi32(group(0, p), from, group(1, p)));
            store(1, p, _mm512_permutex2var_epi32(group(0, p), other, group(1, p)));
        } else {
            const __m512i a = group(0, p), b = group(1, p), c = group(2, p), d = group(3, p);
            const __m512i ab = _mm512_shuffle_i32x4(a, b, 0x88), cd = _mm512_shuffle_i32x4(c, d, 0x88);
            const __m512i ab_odd = _mm512_shuffle_i32x4(a, b, 0xDD), cd_odd = _mm512_shuffle_i32x4(c, d, 0xDD);
            store(0, p, _mm512_shuffle_i32x4(ab, cd, 0x88));
            store(1, p, _mm512_shuffle_i32x4(ab_odd, cd_odd, 0x88));
            store(2, p, _mm512_shuffle_i32x4(ab, cd, 0xDD));
            store(3, p, _mm512_shuffle_i32x4(ab_odd, cd_odd, 0xDD));
        }
    }
}

template <int QUARTERS>
inline void arrange_wide_chunk(
    const bf16* b, int64_t row_step, int64_t width, int64_t count, const char* ahead, bf16* out) {
    alignas(64) bf16 arranged[128 * QUARTERS];
    for (int half = 0; half < 2; ++half, b += kWidth * row_step, ahead += 2 * kWidth * row_step, count -= kWidth) {
        arrange_chunk<QUARTERS>(b, row_step, width, count, ahead, arranged);
        arrange_columns<QUARTERS>(arranged, out + 2 * kWidth * half);
    }
}

// b: the first of `count` (at most 32) rows, arranged for expand_tall; otherwise like `arrange`.
inline void arrange_wide(const bf16* b, int64_t stride, int64_t count, const char* ahead, bf16* out) {
    if (stride == 8) return arrange_wide_chunk<1>(b, 8, 8, count, ahead, out);
    if (stride == 16) return arrange_wide_chunk<2>(b, 16, 16, count, ahead, out);
    for (int64_t r = 0; r < stride; r += 32) {
        const int64_t width = std::min<int64_t>(32, stride - r);
        arrange_wide_chunk<4>(b + r, stride, width, count, ahead + 2 * r, out + 2 * kWidth * r);
    }
}

// Quarter q of every 32 ranks: ROWS rows of v against 32 columns.
template <int ROWS>
inline __attribute__((always_inline)) void sum_quarter(
    const bf16* columns, int64_t ranks, const bf16* v, int q, __m512 (&sums)[ROWS][2]) {
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int64_t r = 8 * q; r < ranks; r += 32) {
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
            const bf16* pair = columns + 2 * kWidth * (r + 2 * p);
            const __m512bh left = as_bf16(_mm512_load_si512(pair)), right = as_bf16(_mm512_load_si512(pair + 32));
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i) {
                int32_t two;
                std::memcpy(&two, v + i * ranks + r + 2 * p, 4);
                const __m512bh both = as_bf16(_mm512_set1_epi32(two));
                sums[i][0] = _mm512_dpbf16_ps(sums[i][0], left, both);
                sums[i][1] = _mm512_dpbf16_ps(sums[i][1], right, both);
            }
        }
    }
}

template <int ROWS>
inline __attribute__((always_inline)) void add_sums(__m512 (&sums)[ROWS][2], const __m512 (&others)[ROWS][2]) {
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) sums[i][half] = _mm512_add_ps(sums[i][half], others[i][half]);
}

// The rounding of from_float16; the instruction flushes denormals, so where there is one it is not used.
inline __m512i from_float32(__m512 low, __m512 high) {
    constexpr int kDenormal = 0x20;
    if (_mm512_fpclass_ps_mask(low, kDenormal) | _mm512_fpclass_ps_mask(high, kDenormal))
        return _mm512_inserti64x4(_mm512_castsi256_si512(from_float16(low)), from_float16(high), 1);
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// y[0 : 32] += sums, of which the first `count` exist.
inline __attribute__((always_inline)) void add_wide(bf16* y, const __m512 (&sums)[2], int64_t count) {
    alignas(64) static constexpr bf16 kUpper[64] = {
        0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,  0, 8,  0, 9,  0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15,
        0, 16, 0, 17, 0, 18, 0, 19, 0, 20, 0, 21, 0, 22, 0, 23, 0, 24, 0, 25, 0, 26, 0, 27, 0, 28, 0, 29, 0, 30, 0, 31};
    const __m512i old = count >= 32 ? _mm512_loadu_si512(y) : _mm512_maskz_loadu_epi16(first32(count), y);
    __m512 values[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const __m512i from = _mm512_load_si512(kUpper + 32 * half);  // a bf16 is the upper half of a float
        const __m512i bits = _mm512_maskz_permutexvar_epi16(0xAAAAAAAA, from, old);
        values[half] = _mm512_add_ps(_mm512_castsi512_ps(bits), sums[half]);
    }
    const __m512i rounded = from_float32(values[0], values[1]);
    if (count >= 32) _mm512_storeu_si512(y, rounded);
    else _mm512_mask_storeu_epi16(y, first32(count), rounded);
}

template <int QUARTERS, int ROWS>
inline void expand_tile(
    const bf16* columns, int64_t ranks, const bf16* v, bf16* y, int64_t y_stride, int64_t count) {
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) __builtin_prefetch(y + (ROWS + i) * y_stride, 1, 3);  // of the next rows
    __m512 sums[ROWS][2], next[ROWS][2];
    sum_quarter<ROWS>(columns, ranks, v, 0, sums);
    if constexpr (QUARTERS > 1) {
        sum_quarter<ROWS>(columns, ranks, v, 1, next);
        add_sums<ROWS>(sums, next);
    }
    if constexpr (QUARTERS == 4) {
        __m512 upper[ROWS][2];
        sum_quarter<ROWS>(columns, ranks, v, 2, upper);
        sum_quarter<ROWS>(columns, ranks, v, 3, next);
        add_sums<ROWS>(upper, next);
        add_sums<ROWS>(sums, upper);
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) add_wide(y + i * y_stride, sums[i], count);
}

template <int QUARTERS>
inline void expand_tiles(
    const bf16* columns, int64_t ranks, int64_t width, const bf16* v, int64_t rows, bf16* y, int64_t y_stride) {
    using Tile = void (*)(const bf16*, int64_t, const bf16*, bf16*, int64_t, int64_t);
    static constexpr Tile kTiles[] = {
        expand_tile<QUARTERS, 1>, expand_tile<QUARTERS, 2>, expand_tile<QUARTERS, 3>, expand_tile<QUARTERS, 4>};
    for (int64_t row = 0; row < rows; row += 4) {
        const Tile tile = kTiles[std::min<int64_t>(rows - row, 4) - 1];
        for (int64_t n = 0; n < width; n += 2 * kWidth)
            tile(columns + n * ranks, ranks, v + row * ranks, y + row * y_stride + n, y_stride, width - n);
    }
}

// y[0 : rows, 0 : width] += B v, from what arrange_wide left of each 32 rows of B; v [rows, v_stride(stride)].
inline void expand_tall(
    const bf16* columns, int64_t stride, int64_t width, const bf16* v, int64_t rows, bf16* y, int64_t y_stride) {
    if (stride == 8) return expand_tiles<1>(columns, 8, width, v, rows, y, y_stride);
    if (stride == 16) return expand_tiles<2>(columns, 16, width, v, rows, y, y_stride);
    expand_tiles<4>(columns, v_stride(stride), width, v, rows, y, y_stride);
}

}  // namespace lora
