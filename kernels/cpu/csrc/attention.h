// The paged KV cache: storing rows, and causal attention over it. Contracts in kernels/ops.py.
//
// All tensors bf16, contiguous in their last dimension (head_dim); strides are in elements, no alignment is
// needed. Caches are [blocks, block_size, kv_heads, head_dim], contiguous.
#pragma once

#include "bf16.h"
#include "team.h"

// cache[slot_mapping[r]] = row r of k and v. Rows are shared out as in elementwise.h.
struct WriteKvArgs {
    const bf16* k;
    const bf16* v;
    bf16* k_cache;
    bf16* v_cache;
    const int64_t* slot_mapping;  // [rows]: block * block_size + offset
    int64_t rows, kv_heads, head_dim;
    int64_t k_row_stride, k_head_stride, v_row_stride, v_head_stride;
};
void write_kv(const Team& team, const WriteKvArgs& args);

// Request i owns rows query_starts[i] to query_starts[i + 1] at the last positions of its context_lens[i] keys.
// Rows of no request are set to zero. out must not overlap q.
struct AttentionArgs {
    const bf16* q;  // [rows, heads, head_dim]
    const bf16* k_cache;
    const bf16* v_cache;
    bf16* out;                    // [rows, heads, head_dim]
    const int32_t* query_starts;  // [requests + 1]
    const int32_t* context_lens;  // [requests]
    const int32_t* block_tables;  // [requests, max_blocks]
    const float* sinks;           // [heads], or null
    float* scratch;               // attention_scratch_bytes(args) bytes, 64-byte aligned; null where that is 0
    int64_t rows, requests, max_blocks;
    int64_t heads, kv_heads, head_dim, block_size;  // heads a multiple of kv_heads, head_dim of 16
    int64_t q_row_stride, q_head_stride, out_row_stride, out_head_stride;
    int64_t sliding_window;  // keys that a row sees, its own included; 0: all
    float scale;
    float softcap;  // 0: none
};
void paged_attention(const Team& team, const AttentionArgs& args);

// Scratch for one call: only single-row requests that see more than one chunk of keys need any. Depends on
// requests, query_starts, context_lens, heads, head_dim and sliding_window alone.
int64_t attention_scratch_bytes(const AttentionArgs& args);

extern "C" {
int ml_write_kv(const WriteKvArgs* args);
int ml_paged_attention(const AttentionArgs* args);
int64_t ml_attention_scratch_bytes(const AttentionArgs* args);
}
