// One step of a decoder-only transformer as one call: embedding, layers, head, with every row's own delta.
//
// It computes what the modules of transformers compute in bf16 for the architectures that share this shape
// (llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3), with the same roundings; what differs between them is
// data here. One parallel region for the whole step, a barrier between kernels that depend on each other.
#pragma once

#include "attention.h"
#include "elementwise.h"
#include "gemm.h"
#include "lora.h"

// A linear: its packed weight (gemm.h) and where the adapters' sites lie in its output.
struct Projection {
    const bf16* weight;  // packed [n, k]
    const bf16* bias;    // [n], or null
    int64_t n, k;
    LoraGroup group;
};

// Rotary frequencies; a row whose request is longer than `limit` takes the long ones.
struct RotaryFrequencies {
    const float* frequencies;       // [dims / 2]
    const float* long_frequencies;  // [dims / 2], or null: one set for all lengths
    int64_t limit;
    float scaling;  // of cos and sin
};

struct Layer {
    Projection qkv, out, gate_up, down;
    const bf16* input_norm;           // [hidden]
    const bf16* q_norm;               // [head_dim], or null; k_norm alike
    const bf16* k_norm;
    const bf16* post_attention_norm;  // [hidden], or null: the attention's output is added as it is
    const bf16* mlp_norm;             // [hidden]: before the MLP
    const bf16* post_mlp_norm;        // [hidden], or null
    bf16* keys;                       // this layer's caches
    bf16* values;
    int64_t window;  // 0: none
    int64_t rotary;  // index into Model::rotaries
};

struct Model {
    const Layer* layers;
    const RotaryFrequencies* rotaries;
    int64_t num_layers, num_rotaries;
    int64_t hidden, heads, kv_heads, head_dim, intermediate, rotary_dims, vocab;
    const bf16* embedding;   // packed like the head if embedding_is_packed, else [vocab, hidden]
    int64_t embedding_is_packed;
    LoraGroup embedding_group;
    const bf16* final_norm;  // [hidden]
    Projection head;
    int64_t block_size;
    NormKind norm_kind;
    Activation activation;
    float eps;
    float embedding_scale;    // 1: none
    float attention_scale;
    float attention_softcap;  // 0: none
    float logits_softcap;     // 0: none
};

// Memory of a step, for up to the rows it was made for; kept by the caller from step to step.
struct Buffers {
    bf16* residual;  // [rows, hidden]
    bf16* normed;    // [rows, hidden]
    bf16* qkv;       // [rows, (heads + 2 kv_heads) head_dim]
    bf16* attended;  // [rows, heads head_dim]
    bf16* gate_up;   // [rows, 2 intermediate]
    bf16* hidden;    // [rows, intermediate]
    bf16* cos;       // [num_rotaries, rows, rotary_dims]
    bf16* sin;
};

struct Step {
    int64_t rows, requests, max_blocks, num_head_rows;
    const int64_t* ids;           // [rows]
    const int64_t* positions;     // [rows]
    const int64_t* lengths;       // [rows]: the length of each row's request, for RotaryFrequencies::limit
    const int64_t* slot_mapping;  // [rows]
    const int64_t* head_rows;     // [num_head_rows]: rows whose logits are wanted
    const int32_t* query_starts;  // as in AttentionArgs, the next three too
    const int32_t* context_lens;
    const int32_t* block_tables;
    float* attention_scratch;
    const bf16* arena;            // as in LoraArgs, to lora_scratch_size
    const int64_t* table;
    int64_t table_rows;
    bf16* lora_scratch;
    int64_t lora_scratch_size;
    const LoraSegments* body;     // null: no row has an adapter; head alike, over the head rows
    const LoraSegments* head;
    bf16* logits;                 // [num_head_rows, vocab]
    int64_t* nanoseconds;         // [kNumParts]: what each part took is added; null: nobody asks
};

// Where a step's time goes. The head's GEMM counts as kHead, its deltas as kAdapters.
enum Part { kEmbed, kGemm, kAdapters, kAttention, kSmall, kHead, kNumParts };

extern "C" {
// Writes the rows' KV and the logits. Returns the first LoraStatus that is not kLoraDone, else 0.
int ml_forward(const Model* model, const Buffers* buffers, const Step* step);
// Bytes of attention_scratch that this step needs.
int64_t ml_forward_scratch(const Model* model, const Step* step);
// Sizes of Projection, RotaryFrequencies, Layer, Model, Buffers and Step here, to compare with the caller's.
void ml_forward_sizes(int64_t sizes[6]);
}
