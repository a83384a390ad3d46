// HSTU attention of jagged sequences, forward and backward; see attention.h.
#include "bias.h"
#include "pack.h"

namespace hstu {
namespace {

struct Scratch {
    Buffer q, k, v, grad, q_columns, grad_columns, tile, grad_tile, out, grad_q, grad_k, grad_v;
    BiasScratch bias;
};

// W: row length of the scratch memory, a constant so that rows become address offsets; width <= W.
template <class T, int64_t W>
class Worker {
  public:
    Worker(const HstuAttention& a, int64_t sequence, int64_t head, Scratch& scratch)
        : a_(a),
          s_(scratch),
          bias_(a, sequence, scratch.bias),
          begin_(a.offsets[sequence]),
          length_(a.offsets[sequence + 1] - begin_),
          history_end_(length_ - a.candidates[sequence]),
          head_(head),
          rows_(round_up(length_, STRIP)),
          vectors_((a.width + LANES - 1) / LANES) {
        tile_ = s_.tile.get(BLOCK * STRIP);
    }

    void forward() {
        pack_keys();
        float* rows = s_.q.get(rows_ * W);
        q_columns_ = columns(a_.q, a_.q_strides, a_.alpha, rows, s_.q_columns);
        float* out = s_.out.get(STRIP * W);
        for (int64_t first = 0; first < length_; first += STRIP) {
            const Strip strip = begin(first);
            clear(out);
            for_each_block(strip, [&](int64_t j, int64_t keys, int vector) {
                scores(strip, j, keys, vector, q_columns_, k_, tile_);
                weigh(strip, j, keys, vector);
                const int64_t lane = vector * LANES, queries = (strip.vectors - vector) * LANES;
                product<1>(queries, vectors_, keys, tile_ + lane, STRIP, v_ + j * W, W, out + lane * W, W, true);
            });
            put(a_.out, a_.out_strides, first, strip.lanes, out, a_.inverse_n);
        }
    }

    void backward(double* grad_position, double* grad_time) {
        pack_keys();
        q_ = s_.q.get(rows_ * W);
        q_columns_ = columns(a_.q, a_.q_strides, a_.alpha, q_, s_.q_columns);
        grad_ = s_.grad.get(rows_ * W);
        grad_columns_ = columns(a_.grad_out, a_.grad_out_strides, a_.inverse_n, grad_, s_.grad_columns);
        grad_tile_ = s_.grad_tile.get(BLOCK * STRIP);
        float *grad_q = s_.grad_q.get(STRIP * W), *grad_k = s_.grad_k.get(rows_ * W), *grad_v = s_.grad_v.get(rows_ * W);
        std::memset(grad_k, 0, size_t(rows_) * W * sizeof(float));
        std::memset(grad_v, 0, size_t(rows_) * W * sizeof(float));
        for (int64_t first = 0; first < length_; first += STRIP) {
            const Strip strip = begin(first);
            clear(grad_q);
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
            put(a_.grad_q, a_.grad_q_strides, first, strip.lanes, grad_q, a_.alpha);
        }
        put(a_.grad_k, a_.grad_k_strides, 0, length_, grad_k, 1.0f);
        put(a_.grad_v, a_.grad_v_strides, 0, length_, grad_v, 1.0f);
        if (bias_.exists()) bias_.flush(grad_position, grad_time);
    }

  private:
    Strip begin(int64_t first) {
        strip_ = make_strip(a_, first, length_, history_end_);
        if (bias_.exists()) bias_.begin_strip(strip_);
        return strip_;
    }

    void pack_keys() {
        k_ = s_.k.get(rows_ * W);
        v_ = s_.v.get(rows_ * W);
        pack(a_.k, a_.k_strides, 1.0f, k_);
        pack(a_.v, a_.v_strides, 1.0f, v_);
    }

    const T* at(const void* tensor, const int64_t* strides, int64_t row) const {
        return static_cast<const T*>(tensor) + (begin_ + row) * strides[0] + head_ * strides[1];
    }

    void pack(const void* tensor, const int64_t* strides, float scale, float* to) const {
        pack_rows(at(tensor, strides, 0), strides[0], length_, a_.width, scale, to, rows_, W);
    }

    // Packs rows and returns their transpose, [width][rows_].
    float* columns(const void* tensor, const int64_t* strides, float scale, float* rows, Buffer& buffer) const {
        pack(tensor, strides, scale, rows);
        float* to = buffer.get(vectors_ * LANES * rows_);
        transpose(rows, W, rows_, vectors_ * LANES, to);
        return to;
    }

    void put(void* tensor, const int64_t* strides, int64_t first, int64_t rows, const float* from, float scale) const {
        unpack_rows(from, W, rows, a_.width, scale, const_cast<T*>(at(tensor, strides, first)), strides[0]);
    }

    static void clear(float* rows) { std::memset(rows, 0, sizeof(float) * STRIP * W); }

    // tile[key][lane] = keys[j + key] · columns[:, lane]
    void scores(const Strip& strip, int64_t j, int64_t keys, int vector, const float* columns, const float* rows,
                float* tile) const {
        const int64_t lane = vector * LANES;
        product<W>(keys, strip.vectors - vector, a_.width, rows + j * W, 1, columns + strip.first + lane, rows_,
                   tile + lane, STRIP, false);
    }

    // Calls visit(tile offset, score with its bias, mask or all ones) for each vector of a block.
    template <class Visit>
    void for_each_vector(const Strip& strip, int64_t j, int64_t keys, int first_vector, Visit visit) {
        const bool masked = j + keys > strip.all_see;
        const auto walk = [&](auto score) {
            for (int64_t key = 0; key < keys; ++key)
                for (int vector = first_vector; vector < strip.vectors; ++vector) {
                    const int64_t place = key * STRIP + vector * LANES;
                    const vi seen = masked ? sees(strip.visible, vector, j + key, strip.first) : ~vi{};
                    visit(place, score(place, key, vector), seen);
                }
        };
        if (bias_.exists()) {
            bias_.begin_block(j, keys);
            const TimeTable times(a_.time_weight);
            walk([&](int64_t place, int64_t key, int vector) {
                return load(tile_ + place) + bias_.at(times, key, vector);
            });
        } else {
            walk([&](int64_t place, int64_t, int) { return load(tile_ + place); });
        }
    }

    // Scores become weights.
    void weigh(const Strip& strip, int64_t j, int64_t keys, int first_vector) {
        for_each_vector(strip, j, keys, first_vector, [&](int64_t place, vf score, vi seen) {
            store(tile_ + place, select(seen, score * sigmoid(score), vf{}));
        });
    }

    // Scores become weights, and the gradients of weights those of scores.
    void differentiate(const Strip& strip, int64_t j, int64_t keys, int first_vector) {
        for_each_vector(strip, j, keys, first_vector, [&](int64_t place, vf score, vi seen) {
            const vf gate = sigmoid(score), weight = score * gate;
            const vf slope = gate + weight * (1.0f - gate);
            store(tile_ + place, select(seen, weight, vf{}));
            store(grad_tile_ + place, select(seen, slope * load(grad_tile_ + place), vf{}));
        });
    }

    const HstuAttention& a_;
    Scratch& s_;
    Bias bias_;
    Strip strip_;
    int64_t begin_, length_, history_end_, head_, rows_, vectors_;
    float *q_ = nullptr, *k_ = nullptr, *v_ = nullptr, *grad_ = nullptr;
    float *q_columns_ = nullptr, *grad_columns_ = nullptr, *tile_ = nullptr, *grad_tile_ = nullptr;
};

// Work is dealt to a fixed number of bins, the dearest sequences first, and each bin sums the bias gradients of its own
// in order: the result does not depend on which thread takes which bin, nor on how many there are.
template <class T, int64_t W>
void run(const HstuAttention& a, bool is_backward) {
    const int64_t items = a.sequences * a.heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
    for (int64_t bin = 0; bin < a.bins; ++bin) {
        static thread_local Scratch scratch;
        for (int64_t item = bin; item < items; item += a.bins) {
            const int64_t sequence = a.order[item / a.heads];
            if (a.offsets[sequence + 1] == a.offsets[sequence]) continue;
            Worker<T, W> worker(a, sequence, item % a.heads, scratch);
            if (!is_backward) worker.forward();
            else worker.backward(a.grad_position_weight + bin * a.positions, a.grad_time_weight + bin * TIME_BUCKETS);
        }
    }
}

template <class T>
void run_width(const HstuAttention& a, bool is_backward) {
    if (a.width <= 64) run<T, 64>(a, is_backward);
    else if (a.width <= 128) run<T, 128>(a, is_backward);
    else run<T, 256>(a, is_backward);
}

}  // namespace
}  // namespace hstu

// Widths up to 256. The outputs are written, the bias gradients are added to.
extern "C" void hstu_attention(const HstuAttention* a, int32_t is_backward) {
    if (a->is_bfloat) hstu::run_width<hstu::bfloat>(*a, is_backward != 0);
    else hstu::run_width<float>(*a, is_backward != 0);
}
