// The best of each row of bf16 logits: argmax and top-k. Equal logits (0 and -0 are equal) rank by ascending
// column. A row with a NaN has no best: -1.
#pragma once

#include "bf16.h"
#include "team.h"

struct TopkArgs {
    const bf16* logits;  // [rows, n], elements of a row adjacent
    int64_t stride;      // elements between rows
    int64_t rows, n;     // n >= 1
    int64_t k;           // 1 to n; argmax ignores it
    int64_t* ids;        // [rows, k] best first; argmax: [rows]
};

void argmax(const Team& team, const TopkArgs& args);
void topk(const Team& team, const TopkArgs& args);
