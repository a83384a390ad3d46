// Row-wise operators: norm, gate and dropout after the attention, and L2 normalization.
#include <cmath>

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

struct Rows {
    Buffer x, u, keep, gradient, grad_u, out, weight, bias, grad_weight, grad_bias;
};

// One token is a row of `size` numbers, padded to whole vectors with values that do not change its sums.
template <class T>
class Gate {
  public:
    explicit Gate(const HstuGate& a) : a_(a), size_(a.heads * a.width), padded_(whole_vectors(size_)) {}

    void run(int32_t pass) const {
        switch (pass) {
            case MEASURE: return measure_all();
            case FORWARD: return forward<true>();
            case APPLY: return forward<false>();
            case BACKWARD: return backward<true>();
            case SUMS: return backward<false>();
            case ROWS: return grad_rows();
        }
    }

  private:
    void measure_all() const {
        each_bin([&](int64_t, int64_t begin, int64_t end, Rows& rows) {
            for (int64_t token = begin; token < end; ++token)
                a_.rstd[token] = measure(token, rows.x.get(padded_));
        });
    }

    template <bool MEASURES>
    void forward() const {
        each_bin([&](int64_t, int64_t begin, int64_t end, Rows& rows) {
            const float *weight = packed(a_.weight, rows.weight), *bias = packed(a_.bias, rows.bias);
            float* out = rows.out.get(padded_);
            for (int64_t token = begin; token < end; ++token) {
                float* x = rows.x.get(padded_);
                if (MEASURES) a_.rstd[token] = 1 / std::sqrt(measure(token, x) + a_.eps);
                else pack_row(row<const T>(a_.x, token), size_, 1.0f, x, padded_);
                centre(token, x);
                const float *u = gate(token, rows), *keep = kept(token, rows);
                for (int64_t c = 0; c < padded_; c += LANES)
                    store(out + c, (load(x + c) * load(weight + c) + load(bias + c)) * load(u + c) * load(keep + c));
                unpack_rows(out, padded_, 1, size_, 1.0f, row<T>(a_.out, token), size_);
            }
        });
    }

    template <bool ALONE>
    void backward() const {
        each_bin([&](int64_t bin, int64_t begin, int64_t end, Rows& rows) {
            const float *weight = packed(a_.weight, rows.weight), *bias = packed(a_.bias, rows.bias);
            float *g = rows.gradient.get(padded_), *out = rows.out.get(padded_), *grad_u = rows.grad_u.get(padded_);
            float *grad_weight = rows.grad_weight.get(padded_), *grad_bias = rows.grad_bias.get(padded_);
            std::memset(grad_weight, 0, size_t(padded_) * sizeof(float));
            std::memset(grad_bias, 0, size_t(padded_) * sizeof(float));
            for (int64_t token = begin; token < end; ++token) {
                const float *x = normalised(token, rows), *u = gate(token, rows), *keep = kept(token, rows);
                pack_row(row<const T>(a_.grad_out, token), size_, 1.0f, g, padded_);
                vf plain = {}, along = {};
                for (int64_t c = 0; c < padded_; c += LANES) {
                    const vf normal = load(x + c), w = load(weight + c), opened = load(u + c), stays = load(keep + c);
                    const vf affine = normal * w + load(bias + c), grad_out = load(g + c) * stays;
                    const vf grad_norm = grad_out * opened, grad_x = grad_norm * w;
                    store(out + c, affine * opened * stays);
                    store(grad_u + c, grad_out * affine);
                    store(grad_weight + c, load(grad_weight + c) + grad_norm * normal);
                    store(grad_bias + c, load(grad_bias + c) + grad_norm);
                    store(g + c, grad_x);
                    plain += grad_x;
                    along += grad_x * normal;
                }
                unpack_rows(out, padded_, 1, size_, 1.0f, row<T>(a_.out, token), size_);
                T* to = static_cast<T*>(a_.grad_u) + token * a_.grad_u_strides[0];
                unpack_rows(grad_u, a_.width, a_.heads, a_.width, 1.0f, to, a_.grad_u_strides[1]);
                const float along_one = sum(plain) / float(size_), along_row = sum(along) / float(size_);
                if (ALONE) {
                    store_grad_x(token, x, g, along_one, along_row);
                } else {
                    a_.along_one[token] = along_one;
                    a_.along_row[token] = along_row;
                }
            }
            std::memcpy(a_.grad_weight + bin * size_, grad_weight, size_t(size_) * sizeof(float));
            std::memcpy(a_.grad_bias + bin * size_, grad_bias, size_t(size_) * sizeof(float));
        });
    }

    void grad_rows() const {
        each_bin([&](int64_t, int64_t begin, int64_t end, Rows& rows) {
            const float* weight = packed(a_.weight, rows.weight);
            float* g = rows.gradient.get(padded_);
            for (int64_t token = begin; token < end; ++token) {
                const float *x = normalised(token, rows), *u = gate(token, rows), *keep = kept(token, rows);
                pack_row(row<const T>(a_.grad_out, token), size_, 1.0f, g, padded_);
                for (int64_t c = 0; c < padded_; c += LANES)
                    store(g + c, load(g + c) * load(keep + c) * load(u + c) * load(weight + c));
                store_grad_x(token, x, g, a_.along_one[token], a_.along_row[token]);
            }
        });
    }

    void store_grad_x(int64_t token, const float* x, float* g, float along_one, float along_row) const {
        for (int64_t c = 0; c < padded_; c += LANES)
            store(g + c, (load(g + c) - along_one - load(x + c) * along_row) * a_.rstd[token]);
        unpack_rows(g, padded_, 1, size_, 1.0f, row<T>(a_.grad_x, token), size_);
    }

    // Bins are runs of tokens. Their number, and so their sums, do not depend on the number of threads.
    template <class Visit>
    void each_bin(Visit visit) const {
#pragma omp parallel for schedule(static) num_threads(a_.threads)
        for (int64_t bin = 0; bin < a_.bins; ++bin) {
            static thread_local Rows rows;
            visit(bin, a_.tokens * bin / a_.bins, a_.tokens * (bin + 1) / a_.bins, rows);
        }
    }

    template <class U, class V>
    U* row(V* tensor, int64_t token) const {
        return static_cast<U*>(tensor) + token * size_;
    }

    const float* packed(const float* numbers, Buffer& buffer) const {
        pack_row(numbers, size_, 1.0f, buffer.get(padded_), padded_);
        return buffer.get(padded_);
    }

    // Writes the mean of a row and returns its variance.
    float measure(int64_t token, float* x) const {
        pack_row(row<const T>(a_.x, token), size_, 1.0f, x, padded_);
        vf total = {}, squares = {};
        for (int64_t c = 0; c < padded_; c += LANES) total += load(x + c);
        const float mean = sum(total) / float(size_);
        for (int64_t c = size_; c < padded_; ++c) x[c] = mean;
        for (int64_t c = 0; c < padded_; c += LANES) squares += (load(x + c) - mean) * (load(x + c) - mean);
        a_.mean[token] = mean;
        return sum(squares) / float(size_);
    }

    const float* normalised(int64_t token, Rows& rows) const {
        float* x = rows.x.get(padded_);
        pack_row(row<const T>(a_.x, token), size_, 1.0f, x, padded_);
        centre(token, x);
        return x;
    }

    void centre(int64_t token, float* x) const {
        const float mean = a_.mean[token], rstd = a_.rstd[token];
        for (int64_t c = 0; c < padded_; c += LANES) store(x + c, (load(x + c) - mean) * rstd);
    }

    const float* gate(int64_t token, Rows& rows) const {
        float* u = rows.u.get(padded_);
        const T* from = static_cast<const T*>(a_.u) + token * a_.u_strides[0];
        std::memset(u + padded_ - LANES, 0, LANES * sizeof(float));
        for (int64_t head = 0; head < a_.heads; ++head)
            pack_row(from + head * a_.u_strides[1], a_.width, 1.0f, u + head * a_.width, a_.width);
        return u;
    }

    // The factors by which dropout multiplies a row.
    const float* kept(int64_t token, Rows& rows) const {
        float* __restrict keep = rows.keep.get(padded_);
        const uint8_t* __restrict stays = a_.kept + token * size_;
        if (!a_.kept)
            for (int64_t c = 0; c < padded_; ++c) keep[c] = 1.0f;
        else
            for (int64_t c = 0; c < size_; ++c) keep[c] = float(stays[c]) * a_.scale;
        for (int64_t c = size_; c < padded_; ++c) keep[c] = 0.0f;
        return keep;
    }

    const HstuGate& a_;
    int64_t size_, padded_;
};

// Rows divided by their L2 norm, or by eps if that is larger.
void unit(const HstuUnit& a) {
    const int64_t padded = whole_vectors(a.width);
#pragma omp parallel num_threads(a.threads)
    {
        static thread_local Buffer buffer;
        float* x = buffer.get(padded);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.rows; ++row) {
            pack_row(a.x + row * a.width, a.width, 1.0f, x, padded);
            vf squares = {};
            for (int64_t c = 0; c < padded; c += LANES) squares += load(x + c) * load(x + c);
            const float norm = std::sqrt(sum(squares));
            a.norms[row] = norm;
            unpack_rows(x, padded, 1, a.width, 1 / std::max(norm, a.eps), a.out + row * a.width, a.width);
        }
    }
}

// (g − y (y · g)) / |x| with y = x / |x|; g / eps for rows that were divided by eps.
void unit_backward(const HstuUnit& a) {
    const int64_t padded = whole_vectors(a.width);
#pragma omp parallel num_threads(a.threads)
    {
        static thread_local Buffer unit_buffer, gradient_buffer;
        float *y = unit_buffer.get(padded), *g = gradient_buffer.get(padded);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.rows; ++row) {
            pack_row(a.unit + row * a.width, a.width, 1.0f, y, padded);
            pack_row(a.grad_out + row * a.width, a.width, 1.0f, g, padded);
            if (a.norms[row] >= a.eps) {
                vf along = {};
                for (int64_t c = 0; c < padded; c += LANES) along += load(y + c) * load(g + c);
                const float slope = sum(along);
                for (int64_t c = 0; c < padded; c += LANES) store(g + c, load(g + c) - load(y + c) * slope);
            }
            unpack_rows(g, padded, 1, a.width, 1 / std::max(a.norms[row], a.eps), a.grad_x + row * a.width, a.width);
        }
    }
}

}  // namespace
}  // namespace hstu

extern "C" void hstu_unit(const HstuUnit* a, int32_t is_backward) {
    if (is_backward) hstu::unit_backward(*a);
    else hstu::unit(*a);
}

extern "C" void hstu_gate(const HstuGate* a, int32_t pass) {
    if (a->is_bfloat) hstu::Gate<hstu::bfloat>(*a).run(pass);
    else hstu::Gate<float>(*a).run(pass);
}
