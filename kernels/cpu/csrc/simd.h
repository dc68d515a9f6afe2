// Sixteen fp32 lanes under one name: a zmm register with AVX-512, a plain array elsewhere (which compilers
// vectorise for the CPU at hand). And the functions that the small ops and attention need, on lanes.
#pragma once

#include <cmath>

#include "bf16.h"

constexpr int kLanes = 16;

#if defined(__AVX512BF16__)

struct Floats {
    __m512 value;
};

inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }

inline Floats splat(float value) { return {_mm512_set1_ps(value)}; }
inline Floats load(const bf16* from) { return {load_bf16(from)}; }
inline Floats load(const bf16* from, int64_t count) { return {load_bf16(from, first_lanes(count))}; }  // others 0
inline Floats load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline void store(bf16* to, Floats a) { store_bf16(to, a.value); }
inline void store(bf16* to, Floats a, int64_t count) { store_bf16(to, a.value, first_lanes(count)); }
inline void store(float* to, Floats a) { _mm512_storeu_ps(to, a.value); }

inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.value, b.value)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.value, b.value)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.value, b.value)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.value, b.value)}; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.value, b.value, c.value)}; }
// Of a NaN in b, the NaN (a is the constant of a clamp).
inline Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.value, b.value)}; }
inline Floats smaller(Floats a, Floats b) { return {_mm512_min_ps(a.value, b.value)}; }
inline Floats magnitude(Floats a) { return {_mm512_abs_ps(a.value)}; }
inline Floats with_sign_of(Floats a, Floats sign) {  // a >= 0
    const __m512 bit = _mm512_and_ps(sign.value, _mm512_set1_ps(-0.0f));
    return {_mm512_or_ps(a.value, bit)};
}
// Lane by lane: a < b ? yes : no.
inline Floats where_less(Floats a, Floats b, Floats yes, Floats no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.value, b.value, _CMP_LT_OQ), no.value, yes.value)};
}
inline Floats rounded(Floats a) {
    return {_mm512_roundscale_ps(a.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Floats times_power_of_two(Floats a, Floats n) { return {_mm512_scalef_ps(a.value, n.value)}; }  // n whole
inline Floats through_bf16(Floats a) { return {to_float16(from_float16(a.value))}; }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a.value); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a.value); }

#else

struct Floats {
    float lane[kLanes];
};

template <class F>
inline Floats each(F&& f) {
    Floats result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = f(i);
    return result;
}

inline Floats splat(float value) {
    return each([&](int) { return value; });
}
inline Floats load(const bf16* from) {
    return each([&](int i) { return to_float(from[i]); });
}
inline Floats load(const bf16* from, int64_t count) {
    return each([&](int i) { return i < count ? to_float(from[i]) : 0.0f; });
}
inline Floats load(const float* from) {
    return each([&](int i) { return from[i]; });
}
inline void store(bf16* to, Floats a, int64_t count = kLanes) {
    for (int64_t i = 0; i < count; ++i) to[i] = from_float(a.lane[i]);
}
inline void store(float* to, Floats a) {
    for (int i = 0; i < kLanes; ++i) to[i] = a.lane[i];
}

inline Floats operator+(Floats a, Floats b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Floats operator-(Floats a, Floats b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Floats operator*(Floats a, Floats b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Floats operator/(Floats a, Floats b) {
    return each([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats larger(Floats a, Floats b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Floats smaller(Floats a, Floats b) {
    return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Floats magnitude(Floats a) {
    return each([&](int i) { return std::fabs(a.lane[i]); });
}
inline Floats with_sign_of(Floats a, Floats sign) {
    return each([&](int i) { return std::copysign(a.lane[i], sign.lane[i]); });
}
inline Floats where_less(Floats a, Floats b, Floats yes, Floats no) {
    return each([&](int i) { return a.lane[i] < b.lane[i] ? yes.lane[i] : no.lane[i]; });
}
// Whole numbers by the addition that pushes the fraction out; |a| < 2^22.
inline Floats rounded(Floats a) {
    const float magic = 12582912.0f;
    return each([&](int i) { return (a.lane[i] + magic) - magic; });
}
// Exact above the denormals, n in [-252, 252]: two factors, since one would leave the exponent's range.
inline Floats times_power_of_two(Floats a, Floats n) {
    return each([&](int i) {
        const int32_t whole = static_cast<int32_t>(n.lane[i] == n.lane[i] ? n.lane[i] : 0.0f), half = whole / 2;
        const uint32_t bits[2] = {static_cast<uint32_t>(half + 127) << 23,
                                  static_cast<uint32_t>(whole - half + 127) << 23};
        float factor[2];
        std::memcpy(factor, bits, 8);
        return a.lane[i] * factor[0] * factor[1];
    });
}
inline Floats through_bf16(Floats a) {
    return each([&](int i) { return round_bf16(a.lane[i]); });
}
inline float sum(Floats a) {  // pairwise
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) a.lane[i] += a.lane[i + half];
    return a.lane[0];
}
inline float largest(Floats a) {
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) a.lane[i] = a.lane[i] > a.lane[i + half] ? a.lane[i] : a.lane[i + half];
    return a.lane[0];
}

#endif

// e^a to about 1 ulp: a = n ln 2 + r, |r| <= ln 2 / 2, Taylor of degree 7 in r. 0 from -104 down, infinite from 89 up.
inline Floats exponential(Floats a) {
    a = smaller(splat(128.0f), larger(splat(-150.0f), a));
    const Floats n = rounded(a * splat(1.44269504088896341f));
    Floats r = multiply_add(n, splat(-0.693359375f), a);
    r = multiply_add(n, splat(2.12194440e-4f), r);
    Floats p = splat(1.0f / 5040);
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        p = multiply_add(p, r, splat(c));
    return times_power_of_two(p, n);
}

// tanh to a few ulp: near 0 by its own series, which 1 - 2 / (e^2a + 1) would lose.
inline Floats hyperbolic_tangent(Floats a) {
    const Floats size = magnitude(a), square = a * a;
    Floats p = splat(-5.70498872745e-3f);
    for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
        p = multiply_add(p, square, splat(c));
    const Floats near = multiply_add(p * square, a, a);
    const Floats far = splat(1.0f) - splat(2.0f) / (exponential(size + size) + splat(1.0f));
    return where_less(size, splat(0.625f), near, with_sign_of(far, a));
}

// erfc(a) for a >= 0, to a relative 1e-6 far out too: t e^(-a^2 + P(t)), t = 2 / (2 + a), with
// the Chebyshev fit of Numerical Recipes (erfcc).
inline Floats complementary_error(Floats a) {
    const Floats t = splat(1.0f) / multiply_add(splat(0.5f), a, splat(1.0f));
    Floats p = splat(0.17087277f);
    for (const float c : {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f, 0.37409196f,
                          1.00002368f, -1.26551223f})
        p = multiply_add(p, t, splat(c));
    return t * exponential(p - a * a);
}
