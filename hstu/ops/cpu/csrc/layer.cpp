// What is done row by row: SiLU of the projection, norm · gate · dropout behind the attention, and unit vectors.
#include <cmath>

#include "pack.h"

// Mirrors hstu/ops/cpu/norm_mul_dropout.py. x, out and all gradients are contiguous, [T, heads, width].
extern "C" struct HstuGate {
    const void *x, *u, *grad_out;
    int64_t u_strides[2];
    const float *weight, *bias;  // [heads · width]
    const int16_t* draws;        // [T, heads · width]: kept where not below `least`; null: all are kept
    float *mean, *inverse_std;   // [T]
    void *out, *grad_x, *grad_u;
    float *grad_weight, *grad_bias;  // [bins, heads · width], zeros
    int64_t tokens, heads, width, bins;
    float eps, scale;
    int32_t least, is_bfloat, threads;
};

// Mirrors hstu/ops/cpu/uvqk.py. grads[i]: contiguous [T, heads, width], or null for zeros.
extern "C" struct HstuUvqk {
    const void *projected, *grads[4];  // projected: contiguous [T, heads, 4, width]
    void* grad_projected;
    int64_t tokens, heads, width;
    int32_t is_bfloat, threads;
};

// Mirrors hstu/ops/cpu/normalise.py. All float32: [rows, width], contiguous; norms [rows].
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
    Buffer x, u, keep, gradient, out, weight, bias, grad_weight, grad_bias;
};

// One token is a row of `size` numbers, padded to whole vectors: with zeros, or with what keeps sums right.
template <class T>
class Gate {
  public:
    explicit Gate(const HstuGate& a) : a_(a), size_(a.heads * a.width), padded_(whole_vectors(size_)) {}

    void forward() const {
        each_bin([&](int64_t, int64_t begin, int64_t end, Rows& rows) {
            const float *weight = packed(a_.weight, rows.weight), *bias = packed(a_.bias, rows.bias);
            float* out = rows.out.get(padded_);
            for (int64_t token = begin; token < end; ++token) {
                measure(token, rows.x.get(padded_));
                const float *x = normalised(token, rows), *u = gate(token, rows), *keep = kept(token, rows);
                for (int64_t c = 0; c < padded_; c += LANES)
                    store(out + c, (load(x + c) * load(weight + c) + load(bias + c)) * load(u + c) * load(keep + c));
                unpack_rows(out, padded_, 1, size_, 1.0f, row<T>(a_.out, token), size_);
            }
        });
    }

    void backward() const {
        each_bin([&](int64_t bin, int64_t begin, int64_t end, Rows& rows) {
            const float *weight = packed(a_.weight, rows.weight), *bias = packed(a_.bias, rows.bias);
            float *g = rows.gradient.get(padded_), *out = rows.out.get(padded_);
            float *grad_weight = rows.grad_weight.get(padded_), *grad_bias = rows.grad_bias.get(padded_);
            std::memset(grad_weight, 0, size_t(padded_) * sizeof(float));
            std::memset(grad_bias, 0, size_t(padded_) * sizeof(float));
            for (int64_t token = begin; token < end; ++token) {
                const float *x = normalised(token, rows), *u = gate(token, rows), *keep = kept(token, rows);
                pack_row(row<const T>(a_.grad_out, token), size_, 1.0f, g, padded_);
                vf plain = {}, along = {};
                for (int64_t c = 0; c < padded_; c += LANES) {
                    const vf grad_out = load(g + c) * load(keep + c), normal = load(x + c), w = load(weight + c);
                    const vf grad_norm = grad_out * load(u + c), grad_x = grad_norm * w;
                    store(out + c, grad_out * (normal * w + load(bias + c)));
                    store(grad_weight + c, load(grad_weight + c) + grad_norm * normal);
                    store(grad_bias + c, load(grad_bias + c) + grad_norm);
                    store(g + c, grad_x);
                    plain += grad_x;
                    along += grad_x * normal;
                }
                unpack_rows(out, padded_, 1, size_, 1.0f, row<T>(a_.grad_u, token), size_);
                const float mean = sum(plain) / float(size_), slope = sum(along) / float(size_);
                for (int64_t c = 0; c < padded_; c += LANES)
                    store(g + c, (load(g + c) - mean - load(x + c) * slope) * a_.inverse_std[token]);
                unpack_rows(g, padded_, 1, size_, 1.0f, row<T>(a_.grad_x, token), size_);
            }
            std::memcpy(a_.grad_weight + bin * size_, grad_weight, size_t(size_) * sizeof(float));
            std::memcpy(a_.grad_bias + bin * size_, grad_bias, size_t(size_) * sizeof(float));
        });
    }

  private:
    // Bins are runs of tokens, as many whatever the number of threads: their sums are, too.
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

    void measure(int64_t token, float* x) const {
        pack_row(row<const T>(a_.x, token), size_, 1.0f, x, padded_);
        vf total = {}, squares = {};
        for (int64_t c = 0; c < padded_; c += LANES) total += load(x + c);
        const float mean = sum(total) / float(size_);
        for (int64_t c = size_; c < padded_; ++c) x[c] = mean;
        for (int64_t c = 0; c < padded_; c += LANES) squares += (load(x + c) - mean) * (load(x + c) - mean);
        a_.mean[token] = mean;
        a_.inverse_std[token] = 1 / std::sqrt(sum(squares) / float(size_) + a_.eps);
    }

    const float* normalised(int64_t token, Rows& rows) const {
        float* x = rows.x.get(padded_);
        pack_row(row<const T>(a_.x, token), size_, 1.0f, x, padded_);
        const float mean = a_.mean[token], inverse_std = a_.inverse_std[token];
        for (int64_t c = 0; c < padded_; c += LANES) store(x + c, (load(x + c) - mean) * inverse_std);
        return x;
    }

    const float* gate(int64_t token, Rows& rows) const {
        float* u = rows.u.get(padded_);
        const T* from = static_cast<const T*>(a_.u) + token * a_.u_strides[0];
        std::memset(u + padded_ - LANES, 0, LANES * sizeof(float));
        for (int64_t head = 0; head < a_.heads; ++head)
            pack_row(from + head * a_.u_strides[1], a_.width, 1.0f, u + head * a_.width, a_.width);
        return u;
    }

    // What dropout multiplies a row by.
    const float* kept(int64_t token, Rows& rows) const {
        float* __restrict keep = rows.keep.get(padded_);
        const int16_t* __restrict draws = a_.draws + token * size_;
        const float scale = a_.scale;
        const int32_t least = a_.least;
        if (!a_.draws)
            for (int64_t c = 0; c < padded_; ++c) keep[c] = 1.0f;
        else
            for (int64_t c = 0; c < size_; ++c) keep[c] = int32_t(draws[c]) >= least ? scale : 0.0f;
        for (int64_t c = size_; c < padded_; ++c) keep[c] = 0.0f;
        return keep;
    }

    const HstuGate& a_;
    int64_t size_, padded_;
};

// Gradient of the SiLU, read from four tensors and written where they came from: no tensor of all four is made.
template <class T>
void uvqk_backward(const HstuUvqk& a) {
    const int64_t rows = a.tokens * a.heads, padded = whole_vectors(a.width);
#pragma omp parallel num_threads(a.threads)
    {
        static thread_local Buffer x_buffer, gradient_buffer;
        float *x = x_buffer.get(padded), *gradient = gradient_buffer.get(padded);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row)
            for (int part = 0; part < 4; ++part) {
                const int64_t place = (row * 4 + part) * a.width;
                T* out = static_cast<T*>(a.grad_projected) + place;
                if (!a.grads[part]) {
                    std::memset(out, 0, size_t(a.width) * sizeof(T));
                    continue;
                }
                pack_row(static_cast<const T*>(a.projected) + place, a.width, 1.0f, x, padded);
                pack_row(static_cast<const T*>(a.grads[part]) + row * a.width, a.width, 1.0f, gradient, padded);
                for (int64_t c = 0; c < padded; c += LANES) {
                    const vf value = load(x + c), gate = sigmoid(value);
                    store(gradient + c, load(gradient + c) * (gate + value * gate * (1.0f - gate)));
                }
                unpack_rows(gradient, padded, 1, a.width, 1.0f, out, a.width);
            }
    }
}

// Rows divided by their length, or by eps where that is larger.
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

// (g − y (y · g)) / |x|, y being x / |x|; where eps divided, g / eps.
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

extern "C" void hstu_gate(const HstuGate* a, int32_t is_backward) {
    const auto run = [&](auto gate) { is_backward ? gate.backward() : gate.forward(); };
    if (a->is_bfloat) run(hstu::Gate<hstu::bfloat>(*a));
    else run(hstu::Gate<float>(*a));
}

extern "C" void hstu_uvqk_backward(const HstuUvqk* a) {
    if (a->is_bfloat) hstu::uvqk_backward<hstu::bfloat>(*a);
    else hstu::uvqk_backward<float>(*a);
}
