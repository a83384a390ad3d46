// The part of the softmax over a pool that is no matrix product: scores become exponentials, in one visit of each row.
#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"

// Mirrors hstu/ops/cpu/softmax_loss.py. A block of scores: some queries, some entries of the pool.
extern "C" struct HstuPoolSoftmax {
    float* scores;             // [rows, columns]: in: scores; out: e^(score + log weight - peak), 0 where hidden
    const float* log_weights;  // [columns]; null: zeros
    // Hidden are entries with keys[key_rows[row], column] == marks[row], with `ordered` those with keys <= marks.
    const int32_t *keys, *key_rows, *marks;  // [., key_pitch], [rows], [rows]; key_rows null: the first row for all
    float *peaks, *totals;  // [rows]: largest score so far, and sum of the exponentials relative to it; both are updated
    int64_t rows, columns, key_pitch;
    int32_t ordered, threads;
};

namespace hstu {
namespace {

constexpr float HIDDEN = -std::numeric_limits<float>::infinity();

template <bool ORDERED>
void one_row(const HstuPoolSoftmax& a, int64_t row) {
    float* scores = a.scores + row * a.columns;
    const int32_t* keys = a.keys + (a.key_rows ? a.key_rows[row] * a.key_pitch : 0);
    const vi mark = splat_int(a.marks[row]);
    const int64_t whole = a.columns / LANES * LANES;
    vf peaks = splat(a.peaks[row]);
    for (int64_t c = 0; c < whole; c += LANES) {
        vf x = load(scores + c);
        if (a.log_weights) x += load(a.log_weights + c);
        const vi key = load_int(keys + c);
        x = select(ORDERED ? key <= mark : key == mark, splat(HIDDEN), x);
        store(scores + c, x);
        peaks = select(x > peaks, x, peaks);
    }
    float peak = largest(peaks);
    for (int64_t c = whole; c < a.columns; ++c) {
        if (a.log_weights) scores[c] += a.log_weights[c];
        if (ORDERED ? keys[c] <= a.marks[row] : keys[c] == a.marks[row]) scores[c] = HIDDEN;
        peak = std::max(peak, scores[c]);
    }
    vf sums = {};
    for (int64_t c = 0; c < whole; c += LANES) {
        const vf e = exp_or_zero(load(scores + c) - peak);
        store(scores + c, e);
        sums += e;
    }
    if (const int64_t rest = a.columns - whole) {
        vf e = exp_or_zero(load_some(scores + whole, rest) - peak);
        e = select(lane_numbers() < splat_int(int32_t(rest)), e, vf{});
        store_some(scores + whole, e, rest);
        sums += e;
    }
    double total = double(a.totals[row]) * std::exp(double(a.peaks[row]) - peak);
    for (int lane = 0; lane < LANES; ++lane) total += sums[lane];
    a.totals[row] = float(total);
    a.peaks[row] = peak;
}

}  // namespace
}  // namespace hstu

extern "C" void hstu_pool_softmax(const HstuPoolSoftmax* a) {
#pragma omp parallel for schedule(static) num_threads(a->threads)
    for (int64_t row = 0; row < a->rows; ++row)
        a->ordered ? hstu::one_row<true>(*a, row) : hstu::one_row<false>(*a, row);
}
