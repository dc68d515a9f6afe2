#include "elementwise.h"

#include "simd.h"

namespace {

// f(column, lanes) over n columns, 16 at a time; the last call may have fewer.
template <class F>
inline void over_columns(int64_t n, F&& f) {
    int64_t column = 0;
    for (; column + kLanes <= n; column += kLanes) f(column, kLanes);
    if (column < n) f(column, static_cast<int>(n - column));
}

inline Floats load_some(const bf16* from, int lanes) { return lanes == kLanes ? load(from) : load(from, lanes); }

inline void store_some(bf16* to, Floats a, int lanes) {
    if (lanes == kLanes) store(to, a);
    else store(to, a, lanes);
}

// 1 / sqrt(mean(x^2) + eps); four sums side by side, in a fixed order.
float inverse_rms(const bf16* x, int64_t n, float eps) {
    Floats sums[4] = {splat(0), splat(0), splat(0), splat(0)};
    int64_t column = 0;
    for (; column + 4 * kLanes <= n; column += 4 * kLanes) {
        for (int i = 0; i < 4; ++i) {
            const Floats part = load(x + column + i * kLanes);
            sums[i] = multiply_add(part, part, sums[i]);
        }
    }
    over_columns(n - column, [&](int64_t at, int lanes) {
        const Floats part = load_some(x + column + at, lanes);
        sums[0] = multiply_add(part, part, sums[0]);
    });
    const float squares = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    return 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
}

void normalize(const bf16* x, const bf16* weight, bf16* y, int64_t n, float eps, NormKind kind) {
    const Floats factor = splat(inverse_rms(x, n, eps)), one = splat(1.0f);
    over_columns(n, [&](int64_t at, int lanes) {
        const Floats unit = load_some(x + at, lanes) * factor, w = load_some(weight + at, lanes);
        store_some(y + at, kind == NormKind::kLlama ? w * through_bf16(unit) : unit * (one + w), lanes);
    });
}

void add_row(const bf16* a, const bf16* b, bf16* y, int64_t n) {
    over_columns(n, [&](int64_t at, int lanes) {
        store_some(y + at, load_some(a + at, lanes) + load_some(b + at, lanes), lanes);
    });
}

void rotate(bf16* x, const bf16* cos, const bf16* sin, int64_t half) {
    over_columns(half, [&](int64_t at, int lanes) {
        const int64_t other = at + half;
        const Floats x1 = load_some(x + at, lanes), x2 = load_some(x + other, lanes);
        const Floats down = through_bf16(x2 * load_some(sin + at, lanes));
        const Floats up = through_bf16(x1 * load_some(sin + other, lanes));
        store_some(x + at, through_bf16(x1 * load_some(cos + at, lanes)) - down, lanes);
        store_some(x + other, through_bf16(x2 * load_some(cos + other, lanes)) + up, lanes);
    });
}

inline Floats silu(Floats x) { return x / (splat(1.0f) + exponential(splat(0.0f) - x)); }

// x (1 + tanh u) / 2 = x / (1 + e^-2u), which keeps the digits that 1 + tanh u loses for negative u.
inline Floats gelu_tanh(Floats x) {
    const Floats cubic = multiply_add(x * x * x, splat(0.044715f), x);
    return x / (splat(1.0f) + exponential(cubic * splat(-1.5957691216057308f)));
}

inline Floats gelu(Floats x) {
    const Floats tail = complementary_error(magnitude(x) * splat(0.7071067811865476f));
    return x * splat(0.5f) * where_less(x, splat(0.0f), tail, splat(2.0f) - tail);
}

template <class F>
void gated(const bf16* gate, const bf16* up, bf16* y, int64_t n, F&& activation) {
    over_columns(n, [&](int64_t at, int lanes) {
        const Floats active = through_bf16(activation(load_some(gate + at, lanes)));
        store_some(y + at, active * load_some(up + at, lanes), lanes);
    });
}

template <class F>
void on_each_row(const Team& team, int64_t rows, F&& f) {
    const Range mine = share(team, rows);
    for (int64_t row = mine.begin; row < mine.end; ++row) f(row);
}

template <class Args>
int run(void (*kernel)(const Team&, const Args&), const Args* args) {
    parallel([&](const Team& team) { kernel(team, *args); });
    return 0;
}

constexpr int64_t kActColumns = 256;  // columns of one item of act_mul

}  // namespace

void rms_norm(const Team& team, const RmsNormArgs& args) {
    on_each_row(team, args.rows, [&](int64_t row) {
        for (int64_t head = 0; head < args.heads; ++head) {
            const bf16* x = args.x + row * args.x_row_stride + head * args.x_head_stride;
            bf16* y = args.y + row * args.y_row_stride + head * args.y_head_stride;
            normalize(x, args.weight, y, args.n, args.eps, args.kind);
        }
    });
}

void add_rms_norm(const Team& team, const AddRmsNormArgs& args) {
    on_each_row(team, args.rows, [&](int64_t row) {
        bf16* residual = args.residual + row * args.residual_stride;
        add_row(residual, args.x + row * args.x_stride, residual, args.n);
        if (args.weight) normalize(residual, args.weight, args.y + row * args.y_stride, args.n, args.eps, args.kind);
    });
}

void rope(const Team& team, const RopeArgs& args) {
    on_each_row(team, args.rows, [&](int64_t row) {
        const int64_t at = (args.positions ? args.positions[row] : row) * args.table_stride;
        bf16* x = args.x + row * args.row_stride;
        for (int64_t head = 0; head < args.heads; ++head)
            rotate(x + head * args.head_stride, args.cos + at, args.sin + at, args.dims / 2);
    });
}

void act_mul(const Team& team, const ActMulArgs& args) {
    const int64_t blocks = (args.n + kActColumns - 1) / kActColumns;
    const Range mine = share(team, args.rows * blocks);
    for (int64_t item = mine.begin; item < mine.end; ++item) {
        const int64_t row = item / blocks, column = item % blocks * kActColumns;
        const int64_t n = std::min(kActColumns, args.n - column);
        const bf16* gate = args.gate + row * args.gate_stride + column;
        const bf16* up = args.up + row * args.up_stride + column;
        bf16* y = args.y + row * args.y_stride + column;
        switch (args.activation) {
            case Activation::kSilu: gated(gate, up, y, n, silu); break;
            case Activation::kGeluTanh: gated(gate, up, y, n, gelu_tanh); break;
            case Activation::kGelu: gated(gate, up, y, n, gelu); break;
        }
    }
}

void scale(const Team& team, const ScaleArgs& args) {
    on_each_row(team, args.rows, [&](int64_t row) {
        bf16* x = args.x + row * args.stride;
        over_columns(args.n, [&](int64_t at, int lanes) {
            store_some(x + at, load_some(x + at, lanes) * splat(args.factor), lanes);
        });
    });
}

void softcap(const Team& team, const SoftcapArgs& args) {
    on_each_row(team, args.rows, [&](int64_t row) {
        bf16* x = args.x + row * args.stride;
        const Floats cap = splat(args.cap);
        over_columns(args.n, [&](int64_t at, int lanes) {
            const Floats quotient = through_bf16(load_some(x + at, lanes) / cap);
            store_some(x + at, through_bf16(hyperbolic_tangent(quotient)) * cap, lanes);
        });
    });
}

void add(const Team& team, const AddArgs& args) {
    on_each_row(team, args.rows, [&](int64_t row) {
        add_row(args.a + row * args.a_stride, args.b + row * args.b_stride, args.y + row * args.y_stride, args.n);
    });
}

int ml_rms_norm(const RmsNormArgs* args) { return run(rms_norm, args); }
int ml_add_rms_norm(const AddRmsNormArgs* args) { return run(add_rms_norm, args); }
int ml_rope(const RopeArgs* args) { return run(rope, args); }
int ml_act_mul(const ActMulArgs* args) { return run(act_mul, args); }
int ml_scale(const ScaleArgs* args) { return run(scale, args); }
int ml_softcap(const SoftcapArgs* args) { return run(softcap, args); }
int ml_add(const AddArgs* args) { return run(add, args); }
