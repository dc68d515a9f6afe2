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

// ROWS rows against RANKS ranks: one accumulator each, whose lanes run over K.
template <int ROWS, int RANKS, bool PREFETCH>
inline void shrink_registers(
    const bf16* a, int64_t count, int64_t K, const bf16* x, int64_t x_stride, bf16* v, int64_t v_step, Ahead ahead) {
    const bf16* rank[RANKS];  // ranks that there are not repeat the last one, and are not stored
    for (int j = 0; j < RANKS; ++j) rank[j] = a + std::min<int64_t>(j, count - 1) * K;
    __m512 acc[ROWS][RANKS];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < RANKS; ++j) acc[i][j] = _mm512_setzero_ps();
    const auto step = [&](int64_t k, __mmask32 mask) {
        __m512bh columns[ROWS];
        for (int i = 0; i < ROWS; ++i) columns[i] = as_bf16(_mm512_maskz_loadu_epi16(mask, x + i * x_stride + k));
        for (int j = 0; j < RANKS; ++j) {
            if (PREFETCH) __builtin_prefetch(ahead.next + 2 * RANKS * k + 64 * j, 0, 2);
            const __m512bh weights = as_bf16(_mm512_maskz_loadu_epi16(mask, rank[j] + k));
            for (int i = 0; i < ROWS; ++i) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], weights, columns[i]);
        }
    };
    int64_t k = 0;
    for (; k + 32 <= K; k += 32) step(k, ~__mmask32{0});
    if (k < K) step(k, first32(K - k));
    const __mmask16 stored = static_cast<__mmask16>(first32(count));
    for (int i = 0; i < ROWS; ++i) {
        __m512 eight[8];
        for (int j = 0; j < 8; ++j) eight[j] = j < RANKS ? acc[i][std::min(j, RANKS - 1)] : _mm512_setzero_ps();
        store_bf16(v + i * v_step, sum_lanes(eight), stored);
    }
}

template <int RANKS>
inline void shrink_rows(
    const bf16* a, int64_t count, int64_t K, const bf16* x, int64_t x_stride, int64_t rows, bf16* v, int64_t v_step,
    Ahead ahead) {
    if (rows == 1) return shrink_registers<1, RANKS, true>(a, count, K, x, x_stride, v, v_step, ahead);
    if (rows == 2) return shrink_registers<2, RANKS, true>(a, count, K, x, x_stride, v, v_step, ahead);
    shrink_registers<3, RANKS, true>(a, count, K, x, x_stride, v, v_step, ahead);
    int64_t i = 3;
    for (; i + 3 <= rows; i += 3)
        shrink_registers<3, RANKS, false>(a, count, K, x + i * x_stride, x_stride, v + i * v_step, v_step, ahead);
    for (; i < rows; ++i)
        shrink_registers<1, RANKS, false>(a, count, K, x + i * x_stride, x_stride, v + i * v_step, v_step, ahead);
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

}  // namespace lora
