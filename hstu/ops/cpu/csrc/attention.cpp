// HSTU attention of jagged sequences in float32 arithmetic, forward and backward; see attention.h.
#include "attention_work.h"

namespace hstu {
namespace {

template <class T, int64_t W>
class Worker : public Work<T, W> {
    using Base = Work<T, W>;
    using Base::a_, Base::s_, Base::bias_, Base::length_, Base::rows_, Base::vectors_, Base::tile_, Base::grad_tile_;
    using Base::begin, Base::at, Base::put, Base::put_queries, Base::clear, Base::weigh, Base::differentiate;
    using Base::has_queries, Base::first_query_, Base::stop_query_;

  public:
    // The packed rows of q and of the gradient already contain α and 1/N.
    Worker(const HstuAttention& a, int64_t sequence, int64_t head, Scratch& scratch)
        : Base(a, sequence, head, scratch, 1.0f, 1.0f) {
        k_ = s_.k.get(rows_ * W);
        v_ = s_.v.get(rows_ * W);
        q_ = s_.q.get(rows_ * W);
        pack(a_.k, a_.k_strides, 0, length_, 1.0f, k_);
        pack(a_.v, a_.v_strides, 0, length_, 1.0f, v_);
        q_columns_ = columns(a_.q, a_.q_strides, a_.alpha, q_, s_.q_columns);
    }

    void forward() {
        float* out = s_.out.get(STRIP * W);
        for (int64_t first = 0; first < length_; first += STRIP) {
            const Strip strip = begin(first);
            if (!has_queries(strip)) continue;
            clear(out, STRIP);
            for_each_block(strip, [&](int64_t j, int64_t keys, int vector) {
                const int64_t lane = vector * LANES, queries = (strip.vectors - vector) * LANES;
                scores(strip, j, keys, vector, q_columns_, k_, tile_);
                weigh(strip, j, keys, vector);
                product<1>(queries, vectors_, keys, tile_ + lane, STRIP, v_ + j * W, W, out + lane * W, W, true);
            });
            put_queries(a_.out, a_.out_strides, strip, out, a_.inverse_n);
        }
    }

    void backward(double* grad_position, double* grad_time) {
        grad_ = s_.grad.get(rows_ * W);
        grad_columns_ = columns(a_.grad_out, a_.grad_out_strides, a_.inverse_n, grad_, s_.grad_columns);
        float *grad_q = s_.grad_q.get(STRIP * W), *grad_k = s_.grad_k.get(rows_ * W), *grad_v = s_.grad_v.get(rows_ * W);
        clear(grad_k, rows_);
        clear(grad_v, rows_);
        for (int64_t first = 0; first < length_; first += STRIP) {
            const Strip strip = begin(first);
            if (!has_queries(strip)) continue;
            clear(grad_q, STRIP);
            for_each_block(strip, [&](int64_t j, int64_t keys, int vector) {
                const int64_t lane = vector * LANES, queries = (strip.vectors - vector) * LANES;
                scores(strip, j, keys, vector, q_columns_, k_, tile_);
                scores(strip, j, keys, vector, grad_columns_, v_, grad_tile_);
                differentiate(strip, j, keys, vector);
                const float *q = q_ + (first + lane) * W, *grad = grad_ + (first + lane) * W;
                product<STRIP>(keys, vectors_, queries, tile_ + lane, 1, grad, W, grad_v + j * W, W, true);
                product<STRIP>(keys, vectors_, queries, grad_tile_ + lane, 1, q, W, grad_k + j * W, W, true);
                product<1>(queries, vectors_, keys, grad_tile_ + lane, STRIP, k_ + j * W, W, grad_q + lane * W, W, true);
                if (bias_.exists()) bias_.add_gradients(grad_tile_, keys, vector);
            });
            put_queries(a_.grad_q, a_.grad_q_strides, strip, grad_q, a_.alpha);
        }
        put(a_.grad_k, a_.grad_k_strides, 0, length_, grad_k, 1.0f);
        put(a_.grad_v, a_.grad_v_strides, 0, length_, grad_v, 1.0f);
        if (bias_.exists()) bias_.flush(grad_position, grad_time);
    }

  private:
    // Rows [first, stop) of a tensor; the others are zero.
    void pack(const void* tensor, const int64_t* strides, int64_t first, int64_t stop, float scale, float* to) const {
        clear(to, first);
        pack_rows(at(tensor, strides, first), strides[0], stop - first, a_.width, scale, to + first * W, rows_ - first, W);
    }

    // Packs the rows of the queries and returns their transpose, [width][rows_].
    float* columns(const void* tensor, const int64_t* strides, float scale, float* rows, Buffer& buffer) const {
        pack(tensor, strides, first_query_, stop_query_, scale, rows);
        float* to = buffer.get(vectors_ * LANES * rows_);
        transpose(rows, W, rows_, vectors_ * LANES, to);
        return to;
    }

    // tile[key][lane] = keys[j + key] · columns[:, lane]
    void scores(const Strip& strip, int64_t j, int64_t keys, int vector, const float* columns, const float* rows,
                float* tile) const {
        const int64_t lane = vector * LANES;
        product<W>(keys, strip.vectors - vector, a_.width, rows + j * W, 1, columns + strip.first + lane, rows_,
                   tile + lane, STRIP, false);
    }

    float *q_ = nullptr, *k_ = nullptr, *v_ = nullptr, *grad_ = nullptr, *q_columns_ = nullptr, *grad_columns_ = nullptr;
};

template <class T>
void run(const HstuAttention& a, bool is_backward) {
    if (a.width <= 64) run_work<Worker<T, 64>>(a, is_backward);
    else if (a.width <= 128) run_work<Worker<T, 128>>(a, is_backward);
    else run_work<Worker<T, 256>>(a, is_backward);
}

template <bool PAIRS>  // a template, so that the unused variant is not compiled
void run_bfloat(const HstuAttention& a, bool is_backward) {
    if constexpr (PAIRS) attention_of_pairs(a, is_backward);
    else run<bfloat>(a, is_backward);
}

}  // namespace
}  // namespace hstu

// Widths up to 256. Overwrites the outputs and adds to the bias gradients.
extern "C" void hstu_attention(const HstuAttention* a, int32_t is_backward) {
    if (!a->is_bfloat) hstu::run<float>(*a, is_backward != 0);
    else hstu::run_bfloat<hstu::HAS_PAIRS>(*a, is_backward != 0);
}
