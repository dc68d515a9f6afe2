// See lora_tiles.h. Included by it only.
#pragma once

namespace lora {

// sum of a[i] * b[i], i < count, in a fixed order.
inline float dot(const bf16* a, const bf16* b, int64_t count) {
    Floats lanes = splat(0.0f);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) lanes = lanes + load(a + i) * load(b + i);
    if (i < count) lanes = lanes + load(a + i, count - i) * load(b + i, count - i);
    return sum(lanes);
}

// v[0 : rows, 0 : count] = x A^T; a [count, K].
inline void shrink_tile(
    const bf16* a, int64_t count, int64_t K, const bf16* x, int64_t x_stride, int64_t rows, bf16* v, int64_t v_step,
    Ahead) {
    for (int64_t j = 0; j < count; ++j)
        for (int64_t i = 0; i < rows; ++i) v[i * v_step + j] = from_float(dot(a + j * K, x + i * x_stride, K));
}

// out[r][n] = b[n][r], zeros where B ends.
inline void arrange(const bf16* b, int64_t stride, int64_t count, const char*, bf16* out) {
    for (int64_t r = 0; r < stride; ++r)
        for (int64_t n = 0; n < kWidth; ++n) out[r * kWidth + n] = n < count ? b[n * stride + r] : bf16{0};
}

template <class Sink>
inline void expand_row(const bf16* arranged, int64_t stride, int64_t blocks, const bf16* v, Sink&& sink) {
    for (int64_t block = 0; block < blocks; ++block, arranged += arranged_elements(stride)) {
        Floats sums = splat(0.0f);
        for (int64_t r = 0; r < stride; ++r) sums = sums + load(arranged + r * kWidth) * splat(to_float(v[r]));
        sink(block, sums);
    }
}

inline void arrange_wide(const bf16* b, int64_t stride, int64_t count, const char* ahead, bf16* out) {
    arrange(b, stride, std::min<int64_t>(count, kWidth), ahead, out);
    if (count > kWidth) arrange(b + kWidth * stride, stride, count - kWidth, ahead, out + arranged_elements(stride));
}

// y[0 : rows, 0 : width] += B v, from what arrange_wide left of each 32 rows of B; v [rows, v_stride(stride)].
inline void expand_tall(
    const bf16* columns, int64_t stride, int64_t width, const bf16* v, int64_t rows, bf16* y, int64_t y_stride) {
    const int64_t blocks = (width + kWidth - 1) / kWidth;
    for (int64_t row = 0; row < rows; ++row, v += v_stride(stride), y += y_stride)
        expand_row(columns, stride, blocks, v, [&](int64_t block, Floats sums) {
            add_to(y + block * kWidth, sums, std::min<int64_t>(kWidth, width - block * kWidth));
        });
}

}  // namespace lora
