// One head of one sequence: code shared by the kernels of all dtypes.
#pragma once
#include "bias.h"
#include "pack.h"

namespace hstu {

struct Scratch {
    Buffer q, k, v, grad, q_columns, grad_columns, tile, grad_tile, out, grad_q, grad_k, grad_v;
    Buffer q_pairs, k_pairs, v_pairs, grad_pairs, tile_pairs, tile_rows;  // bfloat16 alone
    BiasScratch bias;
};

// T: type of the tensors. W: row length of the scratch memory, a constant so that rows become address offsets;
// width <= W. A product of q and k, of an output's gradient and v, becomes a score, a weight's gradient, by its scale.
//
// Worker derives from this. It packs rows, and lays them out for products over channels (columns) and over rows (pairs):
//   scores            tile[key][query] = rows[key] · columns[:, query]
//   add_over_keys     out[query] += sum over the block's keys of tile[key][query] · rows[key]
//   add_over_queries  out[key] += sum over the strip's queries of tile[key][query] · rows[query]
template <class Worker, class T, int64_t W>
class Work {
  public:
    Work(const HstuAttention& a, int64_t sequence, int64_t head, Scratch& scratch, float score_scale, float grad_scale)
        : a_(a),
          s_(scratch),
          begin_(a.offsets[sequence]),
          length_(a.offsets[sequence + 1] - begin_),
          rows_(round_up(length_, STRIP)),
          vectors_((a.width + LANES - 1) / LANES),
          bias_(a, sequence, scratch.bias),
          history_end_(length_ - a.candidates[sequence]),
          head_(head),
          first_query_(std::clamp<int64_t>(a.first_query - begin_, 0, length_)),
          stop_query_(std::clamp<int64_t>(a.stop_query - begin_, 0, length_)),
          score_scale_(score_scale),
          grad_scale_(grad_scale) {
        tile_ = s_.tile.get(BLOCK * STRIP);
        grad_tile_ = s_.grad_tile.get(BLOCK * STRIP);
    }

    void forward() {
        pack();
        const float* v_pairs = worker().pairs(v_, s_.v_pairs);
        float* out = s_.out.get(STRIP * W);
        for (int64_t first = 0; first < length_; first += STRIP) {
            const Strip strip = begin(first);
            if (!has_queries(strip)) continue;
            clear(out, STRIP);
            for_each_block(strip, [&](int64_t j, int64_t keys, int vector) {
                worker().scores(strip, j, keys, vector, q_columns_, k_, tile_);
                weigh(strip, j, keys, vector);
                worker().add_over_keys(strip, j, keys, vector, tile_, v_pairs, out);
            });
            put_queries(a_.out, a_.out_strides, strip, out, a_.inverse_n);
        }
    }

    void backward(double* grad_position, double* grad_time) {
        pack();
        const float* grad =
            worker().packed(a_.grad_out, a_.grad_out_strides, first_query_, stop_query_, a_.inverse_n, s_.grad);
        const float* grad_columns = worker().columns(grad, s_.grad_columns);
        const float *q_pairs = worker().pairs(q_, s_.q_pairs), *k_pairs = worker().pairs(k_, s_.k_pairs);
        const float *grad_pairs = worker().pairs(grad, s_.grad_pairs);
        float *grad_q = s_.grad_q.get(STRIP * W), *grad_k = s_.grad_k.get(rows_ * W), *grad_v = s_.grad_v.get(rows_ * W);
        clear(grad_k, rows_);
        clear(grad_v, rows_);
        for (int64_t first = 0; first < length_; first += STRIP) {
            const Strip strip = begin(first);
            if (!has_queries(strip)) continue;
            clear(grad_q, STRIP);
            for_each_block(strip, [&](int64_t j, int64_t keys, int vector) {
                worker().scores(strip, j, keys, vector, q_columns_, k_, tile_);
                worker().scores(strip, j, keys, vector, grad_columns, v_, grad_tile_);
                differentiate(strip, j, keys, vector);
                worker().add_over_queries(strip, keys, vector, tile_, grad_pairs, grad_v + j * W);
                worker().add_over_queries(strip, keys, vector, grad_tile_, q_pairs, grad_k + j * W);
                worker().add_over_keys(strip, j, keys, vector, grad_tile_, k_pairs, grad_q);
                if (bias_.exists()) bias_.add_gradients(grad_tile_, keys, vector);
            });
            put_queries(a_.grad_q, a_.grad_q_strides, strip, grad_q, a_.alpha);
        }
        put(a_.grad_k, a_.grad_k_strides, 0, length_, grad_k, score_scale_);
        put(a_.grad_v, a_.grad_v_strides, 0, length_, grad_v, grad_scale_);
        if (bias_.exists()) bias_.flush(grad_position, grad_time);
    }

  protected:
    const T* at(const void* tensor, const int64_t* strides, int64_t row) const {
        return static_cast<const T*>(tensor) + (begin_ + row) * strides[0] + head_ * strides[1];
    }

    static void clear(float* rows, int64_t count) { std::memset(rows, 0, sizeof(float) * size_t(count * W)); }

    const HstuAttention& a_;
    Scratch& s_;
    int64_t begin_, length_, rows_, vectors_;

  private:
    const Worker& worker() const { return static_cast<const Worker&>(*this); }

    void pack() {
        q_ = worker().packed(a_.q, a_.q_strides, first_query_, stop_query_, a_.alpha, s_.q);
        k_ = worker().packed(a_.k, a_.k_strides, 0, length_, 1.0f, s_.k);
        v_ = worker().packed(a_.v, a_.v_strides, 0, length_, 1.0f, s_.v);
        q_columns_ = worker().columns(q_, s_.q_columns);
    }

    Strip begin(int64_t first) {
        strip_ = make_strip(a_, first, length_, history_end_);
        if (bias_.exists()) bias_.begin_strip(strip_);
        return strip_;
    }

    bool has_queries(const Strip& strip) const {
        return strip.first < stop_query_ && strip.first + strip.lanes > first_query_;
    }

    // The rows of a strip's queries.
    void put_queries(void* tensor, const int64_t* strides, const Strip& strip, const float* from, float scale) const {
        const int64_t first = std::max(strip.first, first_query_);
        const int64_t stop = std::min(strip.first + strip.lanes, stop_query_);
        put(tensor, strides, first, stop - first, from + (first - strip.first) * W, scale);
    }

    void put(void* tensor, const int64_t* strides, int64_t first, int64_t rows, const float* from, float scale) const {
        unpack_rows(from, W, rows, a_.width, scale, const_cast<T*>(at(tensor, strides, first)), strides[0]);
    }

    // Calls visit(place in the tile, score with its bias, who sees it) for each vector of a block.
    template <class Visit>
    void for_each_vector(const Strip& strip, int64_t j, int64_t keys, int first_vector, Visit visit) {
        const bool masked = j < strip.all_from || j + keys > strip.all_see;
        const float scale = score_scale_;
        const auto walk = [&](auto bias) {
            for (int64_t key = 0; key < keys; ++key)
                for (int vector = first_vector; vector < strip.vectors; ++vector) {
                    const int64_t place = key * STRIP + vector * LANES;
                    const vi seen = masked ? sees(strip.visible, vector, j + key, strip.first) : ~vi{};
                    visit(place, load(tile_ + place) * scale + bias(key, vector), seen);
                }
        };
        if (bias_.exists()) {
            bias_.begin_block(j, keys);
            const TimeTable times(a_.time_weight);
            walk([&](int64_t key, int vector) { return bias_.at(times, key, vector); });
        } else {
            walk([](int64_t, int) { return vf{}; });
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
        const float scale = grad_scale_;
        for_each_vector(strip, j, keys, first_vector, [&](int64_t place, vf score, vi seen) {
            const vf gate = sigmoid(score), weight = score * gate;
            const vf slope = (gate + weight * (1.0f - gate)) * scale;
            store(tile_ + place, select(seen, weight, vf{}));
            store(grad_tile_ + place, select(seen, slope * load(grad_tile_ + place), vf{}));
        });
    }

    Bias bias_;
    Strip strip_;
    int64_t history_end_, head_, first_query_, stop_query_;
    float score_scale_, grad_scale_;
    const float *q_, *k_, *v_, *q_columns_;
    float *tile_, *grad_tile_;
};

// Work is distributed over a fixed number of bins, the most expensive sequences first. Each bin sums its own bias
// gradients in order, so the result does not depend on the number of threads or on which thread takes which bin.
template <class Worker>
void run_work(const HstuAttention& a, bool is_backward) {
    const int64_t items = a.sequences * a.heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
    for (int64_t bin = 0; bin < a.bins; ++bin) {
        static thread_local Scratch scratch;
        for (int64_t item = bin; item < items; item += a.bins) {
            const int64_t sequence = a.order[item / a.heads];
            if (a.offsets[sequence + 1] == a.offsets[sequence]) continue;
            Worker worker(a, sequence, item % a.heads, scratch);
            if (!is_backward) worker.forward();
            else worker.backward(a.grad_position_weight + bin * a.positions, a.grad_time_weight + bin * TIME_BUCKETS);
        }
    }
}

// Pairs of bfloat16; only with AVX512-BF16.
void attention_of_pairs(const HstuAttention& a, bool is_backward);

}  // namespace hstu
