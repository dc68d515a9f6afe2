#include "forward.h"

#include <time.h>

#include <cmath>
#include <cstring>

namespace {

int64_t clock_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// What the parts of one step share; made by each thread.
struct Pass {
    const Team& team;
    const Model& model;
    const Buffers& buffers;
    const Step& step;
    int* status;
    mutable int64_t last;  // when the part before this one ended

    // The time since the last mark was `part`'s; for the first thread, whose waits are the others' work.
    void mark(Part part) const {
        if (step.nanoseconds == nullptr || team.tid != 0) return;
        const int64_t now = clock_ns();
        step.nanoseconds[part] += now - last;
        last = now;
    }

    int64_t q_width() const { return model.heads * model.head_dim; }
    int64_t kv_width() const { return model.kv_heads * model.head_dim; }
    int64_t qkv_width() const { return q_width() + 2 * kv_width(); }
};

// Adds the deltas of `segments` to y; x or ids is what the projection or the embedding read.
void adapt(const Pass& pass, const LoraGroup& group, const LoraSegments& segments, const bf16* x, const int64_t* ids,
           bf16* y, int64_t columns) {
    LoraArgs args{};
    args.arena = pass.step.arena;
    args.table = pass.step.table;
    args.table_rows = pass.step.table_rows;
    args.group = &group;
    args.segments = &segments;
    args.x = x;
    args.ids = ids;
    args.y = y;
    args.x_stride = group.in_features;
    args.y_stride = columns;
    args.scratch = pass.step.lora_scratch;
    args.scratch_elements = pass.step.lora_scratch_size;
    const LoraStatus status = segmented_lora(pass.team, args);
    if (status != kLoraDone && pass.team.tid == 0) *pass.status = status;
    pass.team.wait();
    pass.mark(kAdapters);
}

// y = x W^T + bias, then the segments' deltas, whose first phase needs no y; y is complete on return.
void project(const Pass& pass, const Projection& p, const bf16* x, int64_t rows, bf16* y,
             const LoraSegments* segments, Part part = kGemm) {
    GemmArgs args{};
    args.x = x;
    args.x_stride = p.k;
    args.w = p.weight;
    args.bias = p.bias;
    args.y = y;
    args.y_stride = p.n;
    args.rows = rows;
    args.n = p.n;
    args.k = p.k;
    gemm(pass.team, args);
    if (segments == nullptr) pass.team.wait();
    pass.mark(part);
    if (segments != nullptr) adapt(pass, p.group, *segments, x, nullptr, y, p.n);
}

void norm(const Pass& pass, const bf16* x, const bf16* weight, bf16* y, int64_t rows) {
    const int64_t n = pass.model.hidden;
    rms_norm(pass.team, RmsNormArgs{x, weight, y, rows, 1, n, n, n, n, n, pass.model.eps, pass.model.norm_kind});
}

// residual += x (normed first by post_norm, if there is one); y = norm(residual), if `weight` is given.
void add_norm(const Pass& pass, bf16* x, const bf16* post_norm, const bf16* weight, bf16* y) {
    const int64_t rows = pass.step.rows, n = pass.model.hidden;
    if (post_norm != nullptr) norm(pass, x, post_norm, x, rows);
    add_rms_norm(pass.team, AddRmsNormArgs{x, pass.buffers.residual, weight, y, rows, n, n, n, n, pass.model.eps,
                                           pass.model.norm_kind});
    pass.team.wait();
    pass.mark(kSmall);
}

// cos and sin of every row and frequency set, as transformers has them: fp32, scaled, cast.
void rotary_tables(const Pass& pass) {
    const int64_t rows = pass.step.rows, dims = pass.model.rotary_dims, half = dims / 2;
    const Range own = share(pass.team, rows);
    for (int64_t set = 0; set < pass.model.num_rotaries; ++set) {
        const RotaryFrequencies& rotary = pass.model.rotaries[set];
        for (int64_t row = own.begin; row < own.end; ++row) {
            const bool is_long = rotary.long_frequencies != nullptr && pass.step.lengths[row] > rotary.limit;
            const float* frequencies = is_long ? rotary.long_frequencies : rotary.frequencies;
            const float position = static_cast<float>(pass.step.positions[row]);
            bf16* cos = pass.buffers.cos + (set * rows + row) * dims;
            bf16* sin = pass.buffers.sin + (set * rows + row) * dims;
            for (int64_t i = 0; i < half; ++i) {
                const float angle = position * frequencies[i];
                cos[i] = cos[i + half] = from_float(std::cos(angle) * rotary.scaling);
                sin[i] = sin[i + half] = from_float(std::sin(angle) * rotary.scaling);
            }
        }
    }
}

void embed(const Pass& pass) {
    const Model& model = pass.model;
    const Step& step = pass.step;
    bf16* out = pass.buffers.residual;
    const int64_t n = model.hidden;
    if (model.embedding_is_packed) {
        unpack_rows(pass.team, model.embedding, n, step.ids, step.rows, out, n);
    } else {
        const Range own = share(pass.team, step.rows);
        for (int64_t row = own.begin; row < own.end; ++row)
            std::memcpy(out + row * n, model.embedding + step.ids[row] * n, n * sizeof(bf16));
    }
    if (model.embedding_scale != 1.0f) {
        pass.team.wait();
        scale(pass.team, ScaleArgs{out, step.rows, n, n, model.embedding_scale});
    }
    pass.team.wait();
    pass.mark(kEmbed);
    if (step.body != nullptr) adapt(pass, model.embedding_group, *step.body, nullptr, step.ids, out, n);
}

// Per-head norms, rotation and the KV write of a row are done by one thread: no barrier between them.
void prepare_qkv(const Pass& pass, const Layer& layer) {
    const Model& model = pass.model;
    const int64_t rows = pass.step.rows, d = model.head_dim, width = pass.qkv_width();
    bf16* q = pass.buffers.qkv;
    bf16* k = q + pass.q_width();
    bf16* v = k + pass.kv_width();
    if (layer.q_norm != nullptr) {
        rms_norm(pass.team, RmsNormArgs{q, layer.q_norm, q, rows, model.heads, d, width, d, width, d, model.eps,
                                        model.norm_kind});
        rms_norm(pass.team, RmsNormArgs{k, layer.k_norm, k, rows, model.kv_heads, d, width, d, width, d, model.eps,
                                        model.norm_kind});
    }
    const int64_t table = layer.rotary * rows * model.rotary_dims;
    rope(pass.team, RopeArgs{q, pass.buffers.cos + table, pass.buffers.sin + table, nullptr, rows,
                             model.heads + model.kv_heads, model.rotary_dims, width, d, model.rotary_dims});
    write_kv(pass.team, WriteKvArgs{k, v, layer.keys, layer.values, pass.step.slot_mapping, rows, model.kv_heads, d,
                                    width, d, width, d});
    pass.team.wait();
    pass.mark(kSmall);
}

AttentionArgs attention_args(const Model& model, const Step& step) {
    AttentionArgs args{};
    args.query_starts = step.query_starts;
    args.context_lens = step.context_lens;
    args.block_tables = step.block_tables;
    args.scratch = step.attention_scratch;
    args.rows = step.rows;
    args.requests = step.requests;
    args.max_blocks = step.max_blocks;
    args.heads = model.heads;
    args.kv_heads = model.kv_heads;
    args.head_dim = model.head_dim;
    args.block_size = model.block_size;
    args.scale = model.attention_scale;
    args.softcap = model.attention_softcap;
    return args;
}

void attend(const Pass& pass, const Layer& layer) {
    AttentionArgs args = attention_args(pass.model, pass.step);
    args.q = pass.buffers.qkv;
    args.k_cache = layer.keys;
    args.v_cache = layer.values;
    args.out = pass.buffers.attended;
    args.q_row_stride = pass.qkv_width();
    args.out_row_stride = pass.q_width();
    args.q_head_stride = args.out_head_stride = pass.model.head_dim;
    args.sliding_window = layer.window;
    paged_attention(pass.team, args);
    pass.team.wait();
    pass.mark(kAttention);
}

void mlp(const Pass& pass, const Layer& layer) {
    const int64_t rows = pass.step.rows, n = pass.model.intermediate;
    bf16* gate_up = pass.buffers.gate_up;
    project(pass, layer.gate_up, pass.buffers.normed, rows, gate_up, pass.step.body);
    bf16* hidden = pass.buffers.hidden;
    act_mul(pass.team, ActMulArgs{gate_up, gate_up + n, hidden, rows, n, 2 * n, 2 * n, n, pass.model.activation});
    pass.team.wait();
    pass.mark(kSmall);
    project(pass, layer.down, hidden, rows, pass.buffers.normed, pass.step.body);
}

void decoder_layer(const Pass& pass, const Layer& layer, const bf16* next_norm) {
    const Buffers& buffers = pass.buffers;
    const int64_t rows = pass.step.rows;
    project(pass, layer.qkv, buffers.normed, rows, buffers.qkv, pass.step.body);
    prepare_qkv(pass, layer);
    attend(pass, layer);
    project(pass, layer.out, buffers.attended, rows, buffers.normed, pass.step.body);
    add_norm(pass, buffers.normed, layer.post_attention_norm, layer.mlp_norm, buffers.normed);
    mlp(pass, layer);
    add_norm(pass, buffers.normed, layer.post_mlp_norm, next_norm, buffers.normed);
}

// Logits of the head rows; their final norms were taken with all rows'.
void head(const Pass& pass) {
    const Step& step = pass.step;
    const Model& model = pass.model;
    const int64_t n = model.hidden, count = step.num_head_rows;
    bf16* picked = pass.buffers.residual;  // no longer needed
    const Range own = share(pass.team, count);
    for (int64_t row = own.begin; row < own.end; ++row)
        std::memcpy(picked + row * n, pass.buffers.normed + step.head_rows[row] * n, n * sizeof(bf16));
    pass.team.wait();
    project(pass, model.head, picked, count, step.logits, step.head, kHead);
    if (model.logits_softcap != 0.0f)
        softcap(pass.team, SoftcapArgs{step.logits, count, model.vocab, model.vocab, model.logits_softcap});
}

}  // namespace

int ml_forward(const Model* model, const Buffers* buffers, const Step* step) {
    int status = kLoraDone;
    parallel([&](const Team& team) {
        const Pass pass{team, *model, *buffers, *step, &status, clock_ns()};
        rotary_tables(pass);
        embed(pass);
        norm(pass, buffers->residual, model->layers[0].input_norm, buffers->normed, step->rows);
        team.wait();
        for (int64_t i = 0; i < model->num_layers; ++i) {
            const bool is_last = i + 1 == model->num_layers;
            decoder_layer(pass, model->layers[i], is_last ? model->final_norm : model->layers[i + 1].input_norm);
        }
        head(pass);
    });
    return status;
}

int64_t ml_forward_scratch(const Model* model, const Step* step) {
    AttentionArgs args = attention_args(*model, *step);
    int64_t most = 0;
    for (int64_t i = 0; i < model->num_layers; ++i) {
        if (i > 0 && model->layers[i].window == model->layers[i - 1].window) continue;
        args.sliding_window = model->layers[i].window;
        most = std::max(most, attention_scratch_bytes(args));
    }
    return most;
}

void ml_forward_sizes(int64_t sizes[6]) {
    sizes[0] = sizeof(Projection);
    sizes[1] = sizeof(RotaryFrequencies);
    sizes[2] = sizeof(Layer);
    sizes[3] = sizeof(Model);
    sizes[4] = sizeof(Buffers);
    sizes[5] = sizeof(Step);
}
