// Attention's products for a few rows, keys and values straight from the cache: each element is summed as tiles.h's
// dot_product sums it over packed panels, so a row's bits are the same either way. With AVX-512's bf16 products;
// elsewhere there are none of these (kMaxRows is 0), and the panels serve all rows.
#pragma once

#include "tiles.h"

namespace direct {

// Keys and values that are wanted next, fetched into the second-level cache in the order of their addresses in the
// course of the work on others: memory works while the processor does.
class Ahead {
public:
    // Nothing to fetch until the next start.
    void stop() { row_ = end_ = 0; }

    // Rows of `width` at `offsets` [count] of both caches, in the course of `items` pieces of work.
    void start(const bf16* k, const bf16* v, const int64_t* offsets, int64_t count, int64_t width, int64_t items) {
        k_ = k, v_ = v, offsets_ = offsets, width_ = width;
        row_ = column_ = 0, end_ = count;
        per_item_ = (count * ((width + kLine - 1) / kLine) + items - 1) / items;
    }

    // An item begins, with so many calls of score() and weigh() to come.
    void begin(int64_t scores, int64_t weighs) {
        per_score_ = (per_item_ / 2 + scores - 1) / scores;
        per_weigh_ = (per_item_ / 2 + weighs - 1) / weighs;
    }

    void score() { fetch(per_score_); }
    void weigh() { fetch(per_weigh_); }

private:
    static constexpr int64_t kLine = 32;  // elements

    void fetch(int64_t lines) {
        for (; lines > 0 && row_ < end_; --lines) {
            tiles::prefetch(k_ + offsets_[row_] + column_, 1);
            tiles::prefetch(v_ + offsets_[row_] + column_, 1);
            column_ += kLine;
            if (column_ < width_) continue;
            column_ = 0;
            ++row_;
        }
    }

    const bf16* k_ = nullptr;
    const bf16* v_ = nullptr;
    const int64_t* offsets_ = nullptr;
    int64_t width_ = 0, row_ = 0, column_ = 0, end_ = 0, per_item_ = 0, per_score_ = 0, per_weigh_ = 0;
};

#if defined(__AVX512BF16__) && !defined(ML_AMX)

constexpr int64_t kMaxRows = 12;

inline __m512bh pair_of(const bf16* at) {
    int32_t two;
    std::memcpy(&two, at, 4);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
}

// c[R, 16 N] = a[R, width] times 16 N keys, which are transposed in registers, 16 columns at a time.
template <int R, int N>
void score_block(const bf16* const* keys, int64_t width, const bf16* a, int64_t a_stride, float* c, int64_t c_stride,
                 Ahead& ahead) {
    __m512 sums[N][R];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) sums[n][r] = _mm512_setzero_ps();
    for (int64_t column = 0; column < width; column += 16) {
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
            __m512i pairs[8];
            tiles::transpose_half(keys + n * kPanel, column, pairs);
            ahead.score();
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i)
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r)
                    sums[n][r] = _mm512_dpbf16_ps(sums[n][r], pair_of(a + r * a_stride + column + 2 * i),
                                                  reinterpret_cast<__m512bh>(pairs[i]));
        }
    }
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) _mm512_storeu_ps(c + r * c_stride + n * kPanel, sums[n][r]);
}

// c[R, 16 P] = p[R, 2 pairs] times 16 P columns of 2 pairs values, from `column` on.
template <int R, int P>
void weigh_block(const bf16* const* values, int64_t pairs, int64_t column, const bf16* p, int64_t p_stride, float* c,
                 int64_t c_stride, Ahead& ahead) {
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
                                           39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i next = _mm512_add_epi16(order, _mm512_set1_epi16(16));
    const __mmask32 mask = P == 1 ? 0xffff : 0xffffffff;
    __m512 sums[R][P];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i) sums[r][i] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const bf16* first = values[2 * pair] + column;
        const bf16* second = values[2 * pair + 1] + column;
        __m512bh columns[P];
#pragma GCC unroll 8
        for (int i = 0; i < P; i += 2) {
            const __m512i a = _mm512_maskz_loadu_epi16(mask, first + i * kPanel);
            const __m512i b = _mm512_maskz_loadu_epi16(mask, second + i * kPanel);
            columns[i] = reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(a, order, b));
            if (i + 1 < P) columns[i + 1] = reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(a, next, b));
            ahead.weigh();
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const __m512bh weight = pair_of(p + r * p_stride + 2 * pair);
#pragma GCC unroll 8
            for (int i = 0; i < P; ++i) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], weight, columns[i]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i) _mm512_storeu_ps(c + r * c_stride + column + i * kPanel, sums[r][i]);
}

template <int R>
void score_rows(const bf16* const* keys, int64_t panels, int64_t width, const bf16* a, int64_t a_stride, float* c,
                int64_t c_stride, Ahead& ahead) {
    constexpr int kMost = R <= 4 ? 2 : 1;  // enough chains of additions to fill the multipliers
    int64_t key = 0;
    for (; key + kMost * kPanel <= panels * kPanel; key += kMost * kPanel)
        score_block<R, kMost>(keys + key, width, a, a_stride, c + key, c_stride, ahead);
    if (key < panels * kPanel) score_block<R, 1>(keys + key, width, a, a_stride, c + key, c_stride, ahead);
}

template <int R>
void weigh_rows(const bf16* const* values, int64_t pairs, int64_t width, const bf16* p, int64_t p_stride, float* c,
                int64_t c_stride, Ahead& ahead) {
    constexpr int kMost = R <= 3 ? 8 : R <= 6 ? 4 : 2;  // sums and columns fit into the registers
    int64_t column = 0;
    const auto run = [&](auto block, int panels) {
        for (; column + panels * kPanel <= width; column += panels * kPanel)
            block(values, pairs, column, p, p_stride, c, c_stride, ahead);
    };
    run(weigh_block<R, kMost>, kMost);
    if (kMost > 4) run(weigh_block<R, kMost / 2>, kMost / 2);
    run(weigh_block<R, 2>, 2);
    run(weigh_block<R, 1>, 1);
}

#define ML_FOR_ROWS(f) {f<1>, f<2>, f<3>, f<4>, f<5>, f<6>, f<7>, f<8>, f<9>, f<10>, f<11>, f<12>}

// c[rows, 16 panels] = a[rows, width] times the keys, 16 of them for each panel.
inline void score(int64_t rows, const bf16* const* keys, int64_t panels, int64_t width, const bf16* a,
                  int64_t a_stride, float* c, int64_t c_stride, Ahead& ahead) {
    static constexpr decltype(&score_rows<1>) kBlocks[] = ML_FOR_ROWS(score_rows);
    kBlocks[rows - 1](keys, panels, width, a, a_stride, c, c_stride, ahead);
}

// c[rows, width] = p[rows, 2 pairs] times the values, two of them for each pair.
inline void weigh(int64_t rows, const bf16* const* values, int64_t pairs, int64_t width, const bf16* p,
                  int64_t p_stride, float* c, int64_t c_stride, Ahead& ahead) {
    static constexpr decltype(&weigh_rows<1>) kBlocks[] = ML_FOR_ROWS(weigh_rows);
    kBlocks[rows - 1](values, pairs, width, p, p_stride, c, c_stride, ahead);
}

#undef ML_FOR_ROWS

#else

constexpr int64_t kMaxRows = 0;
inline void score(int64_t, const bf16* const*, int64_t, int64_t, const bf16*, int64_t, float*, int64_t, Ahead&) {}
inline void weigh(int64_t, const bf16* const*, int64_t, int64_t, const bf16*, int64_t, float*, int64_t, Ahead&) {}

#endif

}  // namespace direct
