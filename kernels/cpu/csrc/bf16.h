// bfloat16 as 16 bits, to and from fp32: scalars and, with AVX-512, vectors of 16 and 32.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#if defined(__GNUC__) && !defined(__clang__)  // gcc 12 takes its own undefined vectors for a mistake of ours
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

using bf16 = uint16_t;

inline float to_float(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

// Round to nearest even; a NaN stays a NaN (quiet), denormals are kept.
inline bf16 from_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40u);
    return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float round_bf16(float value) { return to_float(from_float(value)); }

#if defined(__AVX512BF16__)

inline __m512 to_float16(__m256i values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

inline __m512 load_bf16(const bf16* from) {
    return to_float16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline __m512 load_bf16(const bf16* from, __mmask16 mask) { return to_float16(_mm256_maskz_loadu_epi16(mask, from)); }

// The same rounding as from_float, for denormals too (vcvtneps2bf16 flushes them, so it is not used).
inline __m256i from_float16(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
}

inline void store_bf16(bf16* to, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), from_float16(values));
}

inline void store_bf16(bf16* to, __m512 values, __mmask16 mask) {
    _mm256_mask_storeu_epi16(to, mask, from_float16(values));
}

#endif
