// y = x W^T + bias over packed bf16 weights, for one row up to thousands.
//
// Packed layout of W [n, k]: [ceil(n/16)] panels of [ceil(k/32)] tiles of 1 KB, a tile being
// [16 k-pairs][16 columns][2], zero padded: one 64-byte line has a pair of k for 16 outputs (an operand of
// vdpbf16ps), one tile is a B operand of tdpbf16ps. 64-byte aligned.
#pragma once

#include "bf16.h"
#include "team.h"

constexpr int64_t kPanel = 16;       // columns of W^T in a panel
constexpr int64_t kTileK = 32;       // k in a tile
constexpr int64_t kTileSize = 512;   // elements of a tile

struct GemmArgs {
    const bf16* x;     // [rows, k], elements of a row adjacent
    int64_t x_stride;  // elements between rows
    const bf16* w;     // packed [n, k]
    const bf16* bias;  // [n] or null
    bf16* y;           // [rows, n], elements of a row adjacent; may not overlap x
    int64_t y_stride;  // elements between rows
    int64_t rows, n, k;
};

inline int64_t num_panels(int64_t n) { return (n + kPanel - 1) / kPanel; }
inline int64_t num_tiles(int64_t k) { return (k + kTileK - 1) / kTileK; }
inline int64_t packed_size(int64_t n, int64_t k) { return num_panels(n) * num_tiles(k) * kTileSize; }  // elements

// Every output is one chain of fp32 additions over ascending k, then bias, then one rounding: its bits
// depend on its own row of x alone, not on the other rows, their number or the team's size.
void gemm(const Team& team, const GemmArgs& args);

// W [n, k] with `stride` elements between rows -> packed (packed_size elements).
void pack(const Team& team, const bf16* w, int64_t stride, int64_t n, int64_t k, bf16* packed);

// out[i] = row ids[i] of the W that was packed; out has `stride` elements between rows. 0 <= ids[i] < n.
void unpack_rows(const Team& team, const bf16* packed, int64_t k, const int64_t* ids, int64_t count, bf16* out,
                 int64_t stride);
