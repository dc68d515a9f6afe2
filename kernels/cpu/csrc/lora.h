// The segmented low-rank delta: y[rows of a segment, slice] += sum_m w_m (B_m (A_m x) + bias_m).
//
// Two phases with one barrier between them:
//     shrink  v = A x       fp32 over K, rounded once to bf16, into `scratch`
//     expand  y += B v      fp32 over the rank and the members, rounded once
// Both are split over the team by the bytes that they read and the products that they take, over all segments,
// members and slices at once. The weights of a segment are read once for its rows (many rows go by chunks, which
// find them in a cache), and only true ranks of A.
//
// x is read before the barrier and y touched only after it: whoever wrote x must be waited for before the
// call, whoever writes y (the projection itself) need not be. Two calls with one `scratch` need a barrier
// between them. bf16 denormals in A, B, x and v count as zero.
#pragma once

#include "bf16.h"
#include "team.h"

// Columns of a slot-table entry, in elements of the arena (kernels/types.py); rank 0 = no A and B.
enum { kAOffset, kBOffset, kBiasOffset, kRank, kStride, kTableColumns };

// The segments of one step. Segment s has rows [starts[s], ends[s]) and members [members[s], members[s + 1])
// of `slots` and `weights`. Ascending and disjoint; zero rows and no members are legal.
struct LoraSegments {
    const int32_t* starts;   // [count]
    const int32_t* ends;     // [count]
    const int32_t* members;  // [count + 1]
    const int32_t* slots;    // [all members]
    const float* weights;    // [all members]
    int64_t count;
};

// One packed projection: slice i is row rows[i] of a slot's table entries and columns
// [offsets[i], offsets[i] + widths[i]) of y.
struct LoraGroup {
    const int32_t* rows;
    const int32_t* offsets;
    const int32_t* widths;
    int64_t slices;
    int64_t in_features;  // K; 0 for an embedding, whose A is [V, padded rank] and whose v is a row of A
};

struct LoraArgs {
    const bf16* arena;     // A [padded rank, K], B [N, padded rank], bias [N], each at a multiple of 16 bytes
    const int64_t* table;  // [slots, table_rows, 5]
    int64_t table_rows;
    const LoraGroup* group;
    const LoraSegments* segments;
    const bf16* x;       // [rows, K]; null for an embedding
    const int64_t* ids;  // [rows], for an embedding only
    bf16* y;             // [rows, columns]
    int64_t x_stride;    // elements between rows
    int64_t y_stride;
    bf16* scratch;             // at a multiple of 64 bytes
    int64_t scratch_elements;  // at least the sum over segments of lora_scratch
};

enum LoraStatus { kLoraDone = 0, kLoraScratchTooSmall = 1, kLoraStrideNotPadded = 2 };

// Elements of scratch that a segment of `rows` rows takes at most when no padded rank is above `max_stride`.
inline int64_t lora_scratch(int64_t rows, int64_t members, int64_t slices, int64_t max_stride) {
    return members * slices * (rows * ((max_stride + 31) / 32 * 32) + 32);
}

// Called by every thread of the team with the same arguments; all of them get the same status, and where
// that is not kLoraDone nothing was written.
LoraStatus segmented_lora(const Team& team, const LoraArgs& args);
