// Attention's products: small matrices with the right-hand side packed in panels of 16 columns as pairs,
//
//     panel [depth / 2][16 columns][2 of the depth]
//
// which is what vdpbf16ps and AMX's tiles take. For Q K^T the columns are keys and the depth head_dim; for
// P V the columns are head_dim's and the depth is keys.
#pragma once

#include "simd.h"

#if defined(ML_AMX)
#include "amx.h"
#endif

constexpr int64_t kPanel = 16;
#if defined(ML_AMX)
constexpr int64_t kTileKeys = 32, kTileDepth = 32, kTileRowPadding = 16;
#else
constexpr int64_t kTileKeys = 16, kTileDepth = 16, kTileRowPadding = 0;
#endif
// kTileKeys: keys of a chunk come in multiples of this; kTileDepth: head_dim is padded to a multiple of this;
// kTileRowPadding: rows after the last that tile_product may read and write, their values meaning nothing.

namespace tiles {

#if defined(__AVX512BF16__)

// Lanes [first, end) of a, the others from `other`.
inline Floats inside(Floats a, int64_t first, int64_t end, Floats other) {
    const int64_t lo = first < 0 ? 0 : first > kLanes ? kLanes : first;
    const int64_t hi = end < lo ? lo : end > kLanes ? kLanes : end;
    const uint32_t mask = ((1u << hi) - 1u) & ~((1u << lo) - 1u);
    return {_mm512_mask_mov_ps(other.value, static_cast<__mmask16>(mask), a.value)};
}

inline float first_of(Floats a) { return _mm512_cvtss_f32(a.value); }

// Denormals become 0: a probability.
inline void store_probs(bf16* to, Floats a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.value)));
}

// Columns [0, 16) of 16 rows -> 8 registers, register i with the pair 2 i, 2 i + 1 of every row: the 4 x 4 transposes
// of dwords within lanes, after loads that put rows r and r + 4 side by side.
inline void transpose_half(const bf16* const* rows, int64_t column, __m512i (&pairs)[8]) {
    const auto half = [&](int row) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[row] + column)); };
    __m512i columns[2][4];  // of rows 0 to 7, of rows 8 to 15
    for (int group = 0; group < 2; ++group) {
        __m512i both[4], mixed[4];
        for (int i = 0; i < 4; ++i) {
            const int row = 8 * group + i;
            both[i] = _mm512_inserti64x4(_mm512_castsi256_si512(half(row)), half(row + 4), 1);
        }
        for (int i = 0; i < 4; i += 2) {
            mixed[i] = _mm512_unpacklo_epi32(both[i], both[i + 1]);
            mixed[i + 1] = _mm512_unpackhi_epi32(both[i], both[i + 1]);
        }
        for (int i = 0; i < 2; ++i) {
            columns[group][2 * i] = _mm512_unpacklo_epi64(mixed[i], mixed[i + 2]);
            columns[group][2 * i + 1] = _mm512_unpackhi_epi64(mixed[i], mixed[i + 2]);
        }
    }
    for (int i = 0; i < 4; ++i) {
        pairs[i] = _mm512_shuffle_i32x4(columns[0][i], columns[1][i], 0x88);
        pairs[i + 4] = _mm512_shuffle_i32x4(columns[0][i], columns[1][i], 0xdd);
    }
}

// 16 rows of `width` (a multiple of 16) -> one panel of `depth` >= width, the rest of it zeros.
inline void pack_panel(const bf16* const (&rows)[kPanel], int64_t width, int64_t depth, bf16* to) {
    for (int64_t column = 0; column < width; column += 16, to += 256) {
        __m512i pairs[8];
        transpose_half(rows, column, pairs);
        for (int i = 0; i < 8; ++i) _mm512_store_si512(to + 32 * i, pairs[i]);
    }
    std::memset(to, 0, (depth - width) * 32);
}

// Two rows of `width` (a multiple of 16) -> one pair of the depth in width / 16 panels.
inline void pack_pair(const bf16* first, const bf16* second, int64_t width, bf16* to, int64_t panel_stride) {
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
                                           39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i next = _mm512_add_epi16(order, _mm512_set1_epi16(16));
    int64_t column = 0;
    for (; column + 32 <= width; column += 32, to += 2 * panel_stride) {
        const __m512i a = _mm512_loadu_si512(first + column), b = _mm512_loadu_si512(second + column);
        _mm512_store_si512(to, _mm512_permutex2var_epi16(a, order, b));
        _mm512_store_si512(to + panel_stride, _mm512_permutex2var_epi16(a, next, b));
    }
    if (column == width) return;
    const __m512i a = _mm512_maskz_loadu_epi16(0xffff, first + column);
    const __m512i b = _mm512_maskz_loadu_epi16(0xffff, second + column);
    _mm512_store_si512(to, _mm512_permutex2var_epi16(a, order, b));
}

// Whether no element of a row of `width` is infinite or NaN.
inline bool is_finite_row(const bf16* row, int64_t width) {
    const __m256i exponent = _mm256_set1_epi16(0x7f80);
    __mmask16 bad = 0;
    for (int64_t column = 0; column < width; column += 16) {
        const __m256i part = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + column));
        bad |= _mm256_cmpeq_epi16_mask(_mm256_and_si256(part, exponent), exponent);
    }
    return bad == 0;
}

// c[R, P panels] = a[R, depth] b: one register per row and panel, summed pair by pair in order.
template <int R, int P>
inline void product_block(const bf16* a, int64_t a_stride, const bf16* b, int64_t panel_stride, int64_t pairs, float* c,
                          int64_t c_stride) {
    __m512 sums[R][P];
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) sums[r][p] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; ++pair) {
        __m512bh columns[P];
        for (int p = 0; p < P; ++p)
            columns[p] = reinterpret_cast<__m512bh>(_mm512_load_si512(b + p * panel_stride + pair * 32));
        for (int r = 0; r < R; ++r) {
            int32_t two;
            std::memcpy(&two, a + r * a_stride + 2 * pair, 4);
            const __m512bh row = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
            for (int p = 0; p < P; ++p) sums[r][p] = _mm512_dpbf16_ps(sums[r][p], row, columns[p]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) _mm512_storeu_ps(c + r * c_stride + p * kPanel, sums[r][p]);
}

template <int R>
void product_rows(const bf16* a, int64_t a_stride, const bf16* b, int64_t panel_stride, int64_t panels, int64_t pairs,
                  float* c, int64_t c_stride) {
    constexpr int kMost = R <= 3 ? 8 : R <= 6 ? 4 : 2;
    int64_t panel = 0;
    const auto run = [&](auto block, int width) {
        for (; panel + width <= panels; panel += width)
            block(a, a_stride, b + panel * panel_stride, panel_stride, pairs, c + panel * kPanel, c_stride);
    };
    run(product_block<R, kMost>, kMost);
    if (kMost > 4) run(product_block<R, kMost / 2>, kMost / 2);
    run(product_block<R, 2>, 2);
    run(product_block<R, 1>, 1);
}

// c[rows, panels * 16] = a[rows, 2 pairs] b, each element's sum in the order of the depth whatever the rows.
inline void dot_product(int64_t rows, const bf16* a, int64_t a_stride, const bf16* b, int64_t panel_stride,
                        int64_t panels, int64_t pairs, float* c, int64_t c_stride) {
    using Block = void (*)(const bf16*, int64_t, const bf16*, int64_t, int64_t, int64_t, float*, int64_t);
    static constexpr Block kBlocks[] = {product_rows<1>,  product_rows<2>,  product_rows<3>, product_rows<4>,
                                        product_rows<5>,  product_rows<6>,  product_rows<7>, product_rows<8>,
                                        product_rows<9>,  product_rows<10>, product_rows<11>, product_rows<12>};
    for (int64_t row = 0; row < rows; row += 12) {
        const int64_t count = rows - row < 12 ? rows - row : 12;
        kBlocks[count - 1](a + row * a_stride, a_stride, b, panel_stride, panels, pairs, c + row * c_stride, c_stride);
    }
}

inline void prefetch(const bf16* row, int64_t width) {
    for (int64_t column = 0; column < width; column += 32)
        _mm_prefetch(reinterpret_cast<const char*>(row + column), _MM_HINT_T1);
}

#else

inline void prefetch(const bf16*, int64_t) {}

inline Floats inside(Floats a, int64_t first, int64_t end, Floats other) {
    return each([&](int i) { return i >= first && i < end ? a.lane[i] : other.lane[i]; });
}

inline float first_of(Floats a) { return a.lane[0]; }

inline void store_probs(bf16* to, Floats a) { store(to, a); }

inline void pack_panel(const bf16* const (&rows)[kPanel], int64_t width, int64_t depth, bf16* to) {
    for (int64_t column = 0; column < depth; ++column)
        for (int64_t i = 0; i < kPanel; ++i)
            to[column / 2 * 32 + 2 * i + column % 2] = column < width ? rows[i][column] : 0;
}

inline void pack_pair(const bf16* first, const bf16* second, int64_t width, bf16* to, int64_t panel_stride) {
    for (int64_t column = 0; column < width; ++column) {
        bf16* pair = to + column / kPanel * panel_stride + 2 * (column % kPanel);
        pair[0] = first[column];
        pair[1] = second[column];
    }
}

inline bool is_finite_row(const bf16* row, int64_t width) {
    bool is_finite = true;
    for (int64_t column = 0; column < width; ++column) is_finite &= (row[column] & 0x7f80) != 0x7f80;
    return is_finite;
}

inline void dot_product(int64_t rows, const bf16* a, int64_t a_stride, const bf16* b, int64_t panel_stride,
                        int64_t panels, int64_t pairs, float* c, int64_t c_stride) {
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t panel = 0; panel < panels; ++panel) {
            Floats sums = splat(0.0f);
            const bf16* columns = b + panel * panel_stride;
            for (int64_t pair = 0; pair < pairs; ++pair, columns += 32) {
                const float even = to_float(a[row * a_stride + 2 * pair]);
                const float odd = to_float(a[row * a_stride + 2 * pair + 1]);
                for (int i = 0; i < kLanes; ++i)
                    sums.lane[i] += even * to_float(columns[2 * i]) + odd * to_float(columns[2 * i + 1]);
            }
            store(c + row * c_stride + panel * kPanel, sums);
        }
    }
}

#endif

#if defined(ML_AMX)

// Two by two tiles of 16 x 16 at a time; rows up to the next multiple of 16 come along.
inline void amx_product(int64_t rows, const bf16* a, int64_t a_stride, const bf16* b, int64_t panel_stride,
                        int64_t panels, int64_t pairs, float* c, int64_t c_stride) {
    for (int64_t row = 0; row < rows; row += 32) {
        const bool two_rows = rows - row > 16;
        for (int64_t panel = 0; panel < panels; panel += 2) {
            const bool two_panels = panels - panel > 1;
            const bf16* top = a + row * a_stride;
            const bf16* bottom = top + 16 * a_stride;
            const bf16* left = b + panel * panel_stride;
            const bf16* right = left + panel_stride;
            amx::zero<0>(), amx::zero<1>(), amx::zero<2>(), amx::zero<3>();
            for (int64_t pair = 0; pair < pairs; pair += 16) {
                amx::load<4>(top + 2 * pair, a_stride * 2);
                amx::load<6>(left + 32 * pair, 64);
                amx::dot<0, 4, 6>();
                if (two_rows) amx::load<5>(bottom + 2 * pair, a_stride * 2), amx::dot<2, 5, 6>();
                if (!two_panels) continue;
                amx::load<7>(right + 32 * pair, 64);
                amx::dot<1, 4, 7>();
                if (two_rows) amx::dot<3, 5, 7>();
            }
            float* to = c + row * c_stride + panel * kPanel;
            amx::store<0>(to, c_stride * 4);
            if (two_panels) amx::store<1>(to + kPanel, c_stride * 4);
            if (two_rows) amx::store<2>(to + 16 * c_stride, c_stride * 4);
            if (two_rows && two_panels) amx::store<3>(to + 16 * c_stride + kPanel, c_stride * 4);
        }
    }
}

#endif

// c[rows, panels * 16] = a[rows, 2 pairs] b. Panels are 64-byte aligned. With AMX every row count takes the tiles, so
// that a row's bits are the same in each; TileScope must be alive.
inline void product(int64_t rows, const bf16* a, int64_t a_stride, const bf16* b, int64_t panel_stride, int64_t panels,
                    int64_t pairs, float* c, int64_t c_stride) {
#if defined(ML_AMX)
    amx_product(rows, a, a_stride, b, panel_stride, panels, pairs, c, c_stride);
#else
    dot_product(rows, a, a_stride, b, panel_stride, panels, pairs, c, c_stride);
#endif
}

// This thread's tile registers, all of 16 rows of 64 bytes, while it lives. Nothing without AMX.
struct TileScope {
#if defined(ML_AMX)
    TileScope() {
        amx::Config config;
        for (int tile = 0; tile < 8; ++tile) config.set(tile, 16);
        amx::configure(config);
    }
    ~TileScope() { amx::release(); }
#else
    TileScope() {}
#endif
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;
};

}  // namespace tiles
