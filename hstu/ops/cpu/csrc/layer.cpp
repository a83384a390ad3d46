// Row-wise operators: norm, gate and dropout after the attention, and L2 normalization.
#include <cmath>
#include <vector>

#include "pack.h"

// The work of one call of hstu_gate. If the heads of a row lie on several ranks, forward and backward take two passes.
enum HstuGatePass : int32_t { FORWARD, MEASURE, APPLY, BACKWARD, SUMS, ROWS };

// Mirrors hstu/ops/cpu/norm_mul_dropout.py. All but u and grad_u are contiguous,
// x, out, grad_out and grad_x [T, heads, width].
extern "C" struct HstuGate {
    const void *x, *u, *grad_out;
    int64_t u_strides[2], grad_u_strides[2];
    const float *weight, *bias;  // [heads · width]
    const uint8_t* kept;         // [T, heads · width]: elements that dropout keeps; null: all
    float *mean, *rstd;   // [T]; MEASURE writes the mean square about the mean in place of rstd
    float *along_one, *along_row;  // [T]: means over a row that grad_x needs; SUMS writes them, ROWS reads them
    void *out, *grad_x, *grad_u;   // BACKWARD and SUMS also write out, the result of forward
    float *grad_weight, *grad_bias;  // [bins, heads · width], zeros
    int64_t tokens, heads, width, bins;
    float eps, scale;
    int32_t is_bfloat, threads;
};

// Mirrors hstu/ops/cpu/softmax_loss.py. All float32: [rows, width], contiguous; norms [rows].
extern "C" struct HstuUnit {
    const float *x, *unit, *grad_out;
    float *out, *norms, *grad_x;
    int64_t rows, width;
    float eps;
    int32_t threads;
};

namespace hstu {
namespace {

// Where a vector of a row lies, which belongs to one head; see each_vector.
struct Place {
    vi fresh;
    vf weight, bias;
    int64_t column, u, grad_u;
};
struct GradAffine {
    vf weight, bias;
};

// Their rows stay in the first-level cache from one loop to the next. Rows of u and grad_u have gaps, which keep the
// processor from fetching them in advance: the kernels prefetch those of the next tokens.
constexpr int64_t TOKENS_AT_ONCE = 8;

template <class T, bool NARROW>  // NARROW: a head is narrower than a vector
class Gate {
  public:
    explicit Gate(const HstuGate& a) : a_(a), size_(a.heads * a.width) {
        for (int64_t head = 0; head < a.heads; ++head)
            each_vector(a.width, [&](int64_t at, vi fresh) {
                const int64_t column = head * a.width + at;
                places_.push_back({fresh, get(a.weight + column), get(a.bias + column), column,
                                   head * a.u_strides[1] + at, head * a.grad_u_strides[1] + at});
            });
    }

    void run(int32_t pass) const {
        const size_t count = places_.size();
#pragma omp parallel for schedule(static) num_threads(a_.threads)
        for (int64_t bin = 0; bin < a_.bins; ++bin) {
            const int64_t begin = a_.tokens * bin / a_.bins, end = a_.tokens * (bin + 1) / a_.bins;
            std::vector<GradAffine> grad_affine(count);
            std::vector<vf> grad_rows(count * TOKENS_AT_ONCE);
            for (int64_t first = begin; first < end; first += TOKENS_AT_ONCE)
                run_tokens(pass, first, std::min(first + TOKENS_AT_ONCE, end), grad_affine.data(), grad_rows.data());
            if (pass != BACKWARD && pass != SUMS) continue;
            for (size_t v = 0; v < count; ++v) {
                put(grad_affine[v].weight, a_.grad_weight + bin * size_ + places_[v].column);
                put(grad_affine[v].bias, a_.grad_bias + bin * size_ + places_[v].column);
            }
        }
    }

  private:
    void run_tokens(int32_t pass, int64_t begin, int64_t end, GradAffine* grad_affine, vf* grad_rows) const {
        switch (pass) {
            case FORWARD:
                measure(begin, end);
                for (int64_t token = begin; token < end; ++token)
                    a_.rstd[token] = 1 / std::sqrt(a_.rstd[token] + a_.eps);
                return apply(begin, end);
            case MEASURE: return measure(begin, end);
            case APPLY: return apply(begin, end);
            case BACKWARD:
                sum_rows(begin, end, grad_affine, grad_rows);
                return put_grad_x(begin, end, grad_rows);
            case SUMS: return sum_rows(begin, end, grad_affine, grad_rows);
            case ROWS:
                differentiate_rows(begin, end, grad_rows);
                return put_grad_x(begin, end, grad_rows);
        }
    }

    // The rows of one token. Copied to registers: pointers in memory would be read again after each store.
    struct Token {
        const T *x, *u, *grad_out;
        const uint8_t* kept;
        T *out, *grad_x, *grad_u;
        float scale, mean, rstd;
    };

    Token rows_of(int64_t token) const {
        const int64_t at = token * size_;
        return {row<const T>(a_.x, at),
                row<const T>(a_.u, token * a_.u_strides[0]),
                row<const T>(a_.grad_out, at),
                a_.kept ? a_.kept + at : nullptr,
                row<T>(a_.out, at),
                row<T>(a_.grad_x, at),
                row<T>(a_.grad_u, token * a_.grad_u_strides[0]),
                a_.scale,
                a_.mean[token],
                a_.rstd[token]};
    }

    // Writes the mean and the variance of each row.
    void measure(int64_t begin, int64_t end) const {
        for (int64_t token = begin; token < end; ++token) {
            const T* x = row<const T>(a_.x, token * size_);
            vf total = {}, squares = {};
            for (const Place& at : places_) total += only(at.fresh, get(x + at.column));
            const vf mean = sum_of_lanes(total) / float(size_);
            for (const Place& at : places_) {
                const vf centred = only(at.fresh, get(x + at.column) - mean);
                squares += centred * centred;
            }
            a_.mean[token] = mean[0];
            a_.rstd[token] = sum_of_lanes(squares)[0] / float(size_);
        }
    }

    void apply(int64_t begin, int64_t end) const {
        const int64_t u_ahead = TOKENS_AT_ONCE * a_.u_strides[0];
        const Place *first = places_.data(), *last = first + places_.size();
        for (int64_t token = begin; token < end; ++token) {
            const Token rows = rows_of(token);
            for (const Place* at = first; at < last; ++at) {
                __builtin_prefetch(rows.u + u_ahead + at->u);
                const vf affine = normalised(rows, *at) * at->weight + at->bias;
                put(affine * get(rows.u + at->u) * kept(rows, *at), rows.out + at->column);
            }
        }
    }

    // Writes the gradients of the normalised rows and their means; adds to those of weight and bias, which have one
    // element per place.
    void sum_rows(int64_t begin, int64_t end, GradAffine* grad_affine, vf* grad_rows) const {
        const int64_t count = int64_t(places_.size());
        const Place* places = places_.data();
        const int64_t u_ahead = TOKENS_AT_ONCE * a_.u_strides[0], grad_u_ahead = TOKENS_AT_ONCE * a_.grad_u_strides[0];
        for (int64_t token = begin; token < end; ++token) {
            const Token rows = rows_of(token);
            vf plain = {}, along = {};
            for (int64_t v = 0; v < count; ++v) {
                const Place& at = places[v];
                __builtin_prefetch(rows.u + u_ahead + at.u);
                __builtin_prefetch(rows.grad_u + grad_u_ahead + at.grad_u, 1);
                const vf normal = normalised(rows, at), u = get(rows.u + at.u), keep = kept(rows, at);
                const vf affine = normal * at.weight + at.bias;
                const vf grad_out = get(rows.grad_out + at.column) * keep, grad_norm = grad_out * u;
                const vf grad_row = grad_norm * at.weight, summand = only(at.fresh, grad_row);
                *grad_rows++ = grad_row;
                put(affine * u * keep, rows.out + at.column);
                put(grad_out * affine, rows.grad_u + at.grad_u);
                grad_affine[v].weight += grad_norm * normal;
                grad_affine[v].bias += grad_norm;
                plain += summand;
                along += summand * normal;
            }
            a_.along_one[token] = sum_of_lanes(plain)[0] / float(size_);
            a_.along_row[token] = sum_of_lanes(along)[0] / float(size_);
        }
    }

    // The gradients of the normalised rows alone.
    void differentiate_rows(int64_t begin, int64_t end, vf* grad_rows) const {
        for (int64_t token = begin; token < end; ++token) {
            const Token rows = rows_of(token);
            for (const Place& at : places_)
                *grad_rows++ = get(rows.grad_out + at.column) * kept(rows, at) * get(rows.u + at.u) * at.weight;
        }
    }

    void put_grad_x(int64_t begin, int64_t end, const vf* grad_rows) const {
        const Place *first = places_.data(), *last = first + places_.size();
        for (int64_t token = begin; token < end; ++token) {
            const Token rows = rows_of(token);
            const float along_one = a_.along_one[token], along_row = a_.along_row[token];
            for (const Place* at = first; at < last; ++at) {
                const vf projected = *grad_rows++ - along_one - normalised(rows, *at) * along_row;
                put(projected * rows.rstd, rows.grad_x + at->column);
            }
        }
    }

    vf normalised(const Token& rows, const Place& at) const { return (get(rows.x + at.column) - rows.mean) * rows.rstd; }

    // The factors by which dropout multiplies.
    vf kept(const Token& rows, const Place& at) const {
        return rows.kept ? get(rows.kept + at.column) * rows.scale : splat(1.0f);
    }

    template <class U>
    static U* row(const void* tensor, int64_t at) {
        return const_cast<U*>(static_cast<const U*>(tensor)) + at;
    }

    template <class U>
    vf get(const U* from) const {
        return hstu::get<NARROW>(from, a_.width);
    }

    template <class U>
    void put(vf x, U* to) const {
        hstu::put<NARROW>(x, to, a_.width);
    }

    const HstuGate& a_;
    const int64_t size_;
    std::vector<Place> places_;
};

// Rows divided by their L2 norm, or by eps if that is larger.
template <bool NARROW>
void unit(const HstuUnit& a) {
    const int64_t width = a.width;
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t row = 0; row < a.rows; ++row) {
        const float* x = a.x + row * width;
        float* out = a.out + row * width;
        vf squares = {};
        each_vector(width, [&](int64_t at, vi fresh) {
            const vf numbers = only(fresh, get<NARROW>(x + at, width));
            squares += numbers * numbers;
        });
        const float norm = std::sqrt(sum_of_lanes(squares)[0]), factor = 1 / std::max(norm, a.eps);
        a.norms[row] = norm;
        each_vector(width, [=](int64_t at, vi) { put<NARROW>(get<NARROW>(x + at, width) * factor, out + at, width); });
    }
}

// (g − y (y · g)) / |x| with y = x / |x|; g / eps for rows that were divided by eps.
template <bool NARROW>
void unit_backward(const HstuUnit& a) {
    const int64_t width = a.width;
#pragma omp parallel for schedule(static) num_threads(a.threads)
    for (int64_t row = 0; row < a.rows; ++row) {
        const float *y = a.unit + row * width, *g = a.grad_out + row * width;
        float* grad_x = a.grad_x + row * width;
        vf along = {};
        each_vector(width, [&](int64_t at, vi fresh) {
            along += only(fresh, get<NARROW>(y + at, width)) * get<NARROW>(g + at, width);
        });
        const float slope = a.norms[row] >= a.eps ? sum_of_lanes(along)[0] : 0.0f;
        const float factor = 1 / std::max(a.norms[row], a.eps);
        each_vector(width, [=](int64_t at, vi) {
            put<NARROW>((get<NARROW>(g + at, width) - get<NARROW>(y + at, width) * slope) * factor, grad_x + at, width);
        });
    }
}

template <bool NARROW>
void unit(const HstuUnit& a, bool is_backward) {
    is_backward ? unit_backward<NARROW>(a) : unit<NARROW>(a);
}

template <class T>
void gate(const HstuGate& a, int32_t pass) {
    a.width < LANES ? Gate<T, true>(a).run(pass) : Gate<T, false>(a).run(pass);
}

}  // namespace
}  // namespace hstu

extern "C" void hstu_unit(const HstuUnit* a, int32_t is_backward) {
    a->width < hstu::LANES ? hstu::unit<true>(*a, is_backward) : hstu::unit<false>(*a, is_backward);
}

extern "C" void hstu_gate(const HstuGate* a, int32_t pass) {
    a->is_bfloat ? hstu::gate<hstu::bfloat>(*a, pass) : hstu::gate<float>(*a, pass);
}
