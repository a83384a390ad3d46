// HSTU attention of jagged sequences in float32 arithmetic, forward and backward; see attention.h.
#include "attention_work.h"

namespace hstu {
namespace {

template <class T, int64_t W>
class Worker : public Work<Worker<T, W>, T, W> {
    using Base = Work<Worker, T, W>;
    using Base::a_, Base::rows_, Base::vectors_, Base::at, Base::clear;

  public:
    // The packed rows of q and of the gradient already contain α and 1/N.
    Worker(const HstuAttention& a, int64_t sequence, int64_t head, Scratch& scratch)
        : Base(a, sequence, head, scratch, 1.0f, 1.0f) {}

    // Rows [first, stop) of a tensor; the others are zero.
    const float* packed(const void* tensor, const int64_t* strides, int64_t first, int64_t stop, float scale,
                        Buffer& buffer) const {
        float* to = buffer.get(rows_ * W);
        clear(to, first);
        pack_rows(at(tensor, strides, first), strides[0], stop - first, a_.width, scale, to + first * W, rows_ - first, W);
        return to;
    }

    // [width][rows_]
    const float* columns(const float* rows, Buffer& buffer) const {
        float* to = buffer.get(vectors_ * LANES * rows_);
        transpose(rows, W, rows_, vectors_ * LANES, to);
        return to;
    }

    const float* pairs(const float* rows, Buffer&) const { return rows; }

    void scores(const Strip& strip, int64_t j, int64_t keys, int vector, const float* columns, const float* rows,
                float* tile) const {
        const int64_t lane = vector * LANES;
        product<W>(keys, strip.vectors - vector, a_.width, rows + j * W, 1, columns + strip.first + lane, rows_,
                   tile + lane, STRIP, false);
    }

    void add_over_keys(const Strip& strip, int64_t j, int64_t keys, int vector, const float* tile, const float* rows,
                       float* out) const {
        const int64_t lane = vector * LANES, queries = (strip.vectors - vector) * LANES;
        product<1>(queries, vectors_, keys, tile + lane, STRIP, rows + j * W, W, out + lane * W, W, true);
    }

    void add_over_queries(const Strip& strip, int64_t keys, int vector, const float* tile, const float* rows,
                          float* out) const {
        const int64_t lane = vector * LANES, queries = (strip.vectors - vector) * LANES;
        product<STRIP>(keys, vectors_, queries, tile + lane, 1, rows + (strip.first + lane) * W, W, out, W, true);
    }
};

template <class T>
void run(const HstuAttention& a, bool is_backward) {
    if (a.width <= 64) run_work<Worker<T, 64>>(a, is_backward);
    else if (a.width <= 128) run_work<Worker<T, 128>>(a, is_backward);
    else run_work<Worker<T, 256>>(a, is_backward);
}

}  // namespace
}  // namespace hstu

// Widths up to 256. Overwrites the outputs and adds to the bias gradients.
extern "C" void hstu_attention(const HstuAttention* a, int32_t is_backward) {
    if (!a->is_bfloat) hstu::run<float>(*a, is_backward != 0);
#if defined(__AVX512BF16__)
    else hstu::attention_of_pairs(*a, is_backward != 0);
#else
    else hstu::run<hstu::bfloat>(*a, is_backward != 0);
#endif
}
