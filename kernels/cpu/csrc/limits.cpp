// What the benchmarks compare with: the machine's plain reads and its register-only products.
#include "bf16.h"
#include "team.h"

// Reads `bytes` from `data`, each thread a contiguous share of it as four streams side by side (up to a few
// last bytes of each); returns a checksum, so that the reads are kept.
extern "C" uint64_t ml_read(const uint64_t* data, int64_t bytes) {
    std::atomic<uint64_t> total{0};
    parallel([&](const Team& team) {
        const Range words = share(team, bytes / 8, 1024);
        const int64_t length = (words.end - words.begin) / 128 * 32;  // of one stream
        uint64_t sums[32] = {};
        for (int64_t i = 0; i < length; i += 32) {
            for (int stream = 0; stream < 4; ++stream) {
                const uint64_t* from = data + words.begin + stream * length + i;
                for (int j = 0; j < 32; j += 8) __builtin_prefetch(from + 256 + j, 0, 2);
                for (int j = 0; j < 32; ++j) sums[j] ^= from[j];
            }
        }
        for (int j = 1; j < 32; ++j) sums[0] ^= sums[j];
        total.fetch_xor(sums[0], std::memory_order_relaxed);
    });
    return total.load();
}

// Every thread does `rounds` times 24 independent multiply-adds of the kind that gemm is made of, without a
// load; returns the multiplications of one thread (0 at the levels that have no such instruction).
extern "C" int64_t ml_multiply(int64_t rounds) {
#if defined(__AVX512BF16__)
    parallel([&](const Team&) {
        __m512 sums[24];
        for (auto& sum : sums) sum = _mm512_setzero_ps();
        __m512i x = _mm512_set1_epi32(0x3f803f80);
        for (int64_t i = 0; i < rounds; ++i) {
            asm volatile("" : "+v"(x));
#pragma GCC unroll 24
            for (int j = 0; j < 24; ++j) sums[j] = _mm512_dpbf16_ps(sums[j], (__m512bh)x, (__m512bh)x);
        }
        for (auto& sum : sums) asm volatile("" ::"v"(sum));
    });
    return rounds * 24 * 32;
#else
    return rounds * 0;
#endif
}
