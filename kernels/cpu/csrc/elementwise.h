// The small ops between the GEMMs: norms, rotary embedding, gated activations, scaling, softcap, residual.
//
// Tensors are bf16 [rows, n], contiguous in their last dimension; strides are in elements. Arithmetic is
// fp32, rounded to bf16 where transformers' modules round (each op says where). No alignment is needed.
//
// Every op gives a thread the same contiguous share of the rows, share(team, rows), so ops on the same rows
// need no team.wait() between them. act_mul alone also splits columns: wait before and after it.
#pragma once

#include "bf16.h"
#include "team.h"

// The weight's part in a norm. kLlama: y = w * bf16(x / rms), rounded again; kGemma: y = (x / rms) * (1 + w) in fp32,
// rounded once.
enum class NormKind : int32_t { kLlama = 0, kGemma = 1 };

// y[r, h] = norm(x[r, h]) * weight over n columns, for rows r and heads h (1 where the norm is of the whole row). y may
// be x.
struct RmsNormArgs {
    const bf16* x;
    const bf16* weight;  // [n]
    bf16* y;
    int64_t rows, heads, n;
    int64_t x_row_stride, x_head_stride, y_row_stride, y_head_stride;
    float eps;
    NormKind kind;
};
void rms_norm(const Team& team, const RmsNormArgs& args);

// residual = bf16(residual + x); y = norm(residual) * weight, as in rms_norm. y may be x; residual is neither.
struct AddRmsNormArgs {
    const bf16* x;
    bf16* residual;
    const bf16* weight;  // [n]; null: only the sum, y is not written
    bf16* y;
    int64_t rows, n;
    int64_t x_stride, residual_stride, y_stride;
    float eps;
    NormKind kind;
};
void add_rms_norm(const Team& team, const AddRmsNormArgs& args);

// x[r, h, :dims] rotated in place, halves against each other: x1 cos1 - x2 sin1, x2 cos2 + x1 sin2, both products and
// the sum rounded. Columns from dims on stay. q and k of one packed projection that adjoin are one call of
// heads = q heads + k heads.
struct RopeArgs {
    bf16* x;
    const bf16* cos;           // [positions or rows, dims], as transformers' rotary module computes and casts it
    const bf16* sin;
    const int64_t* positions;  // [rows]: the row of cos and sin for each row of x; null: its own number
    int64_t rows, heads, dims;
    int64_t row_stride, head_stride, table_stride;
};
void rope(const Team& team, const RopeArgs& args);

enum class Activation : int32_t { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

// y = bf16(bf16(activation(gate)) * up) over n columns. y may be gate or up.
struct ActMulArgs {
    const bf16* gate;
    const bf16* up;
    bf16* y;
    int64_t rows, n;
    int64_t gate_stride, up_stride, y_stride;
    Activation activation;
};
void act_mul(const Team& team, const ActMulArgs& args);

// x = bf16(x * factor) in place; factor is what bf16 holds (Gemma's embedding normalizer is cast first).
struct ScaleArgs {
    bf16* x;
    int64_t rows, n, stride;
    float factor;
};
void scale(const Team& team, const ScaleArgs& args);

// x = cap * tanh(x / cap) in place, the quotient, the tanh and the product each rounded (Gemma's final logits).
struct SoftcapArgs {
    bf16* x;
    int64_t rows, n, stride;
    float cap;
};
void softcap(const Team& team, const SoftcapArgs& args);

// y = bf16(a + b). y may be a or b.
struct AddArgs {
    const bf16* a;
    const bf16* b;
    bf16* y;
    int64_t rows, n;
    int64_t a_stride, b_stride, y_stride;
};
void add(const Team& team, const AddArgs& args);

// Each opens a team of its own and returns 0.
extern "C" {
int ml_rms_norm(const RmsNormArgs* args);
int ml_add_rms_norm(const AddRmsNormArgs* args);
int ml_rope(const RopeArgs* args);
int ml_act_mul(const ActMulArgs* args);
int ml_scale(const ScaleArgs* args);
int ml_softcap(const SoftcapArgs* args);
int ml_add(const AddArgs* args);
}
