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
    float *peaks, *totals;  // [rows]: about the largest score so far, sum of exponentials relative to it; both updated
    int64_t rows, columns, key_pitch;
    int32_t ordered, threads;
};

namespace hstu {
namespace {

constexpr float HIDDEN = -std::numeric_limits<float>::infinity();
constexpr float RISE = 16.0f;  // the peak follows scores from this far above it: exponentials stay finite
constexpr int GROUP = 8;       // vectors between two looks at the peak

// One visit of a row: scores are read and written once.
template <bool ORDERED>
void one_row(const HstuPoolSoftmax& a, int64_t row) {
    float *scores = a.scores + row * a.columns, peak = a.peaks[row];
    const int32_t* keys = a.keys + (a.key_rows ? a.key_rows[row] * a.key_pitch : 0);
    const vi mark = splat_int(a.marks[row]);
    double total = a.totals[row];
    vf sums = {};
    const auto visible = [&](vf x, vi key) { return select(ORDERED ? key <= mark : key == mark, splat(HIDDEN), x); };
    const auto follow = [&](float most, int64_t stored) {
        if (most <= peak + RISE) return;
        const float factor = std::exp(peak - most);
        for (int64_t c = 0; c < stored; ++c) scores[c] *= factor;
        sums *= factor;
        total *= factor;
        peak = most;
    };
    int64_t c = 0;
    for (; c + GROUP * LANES <= a.columns; c += GROUP * LANES) {
        vf x[GROUP], most = splat(HIDDEN);
#pragma GCC unroll 8
        for (int v = 0; v < GROUP; ++v) {
            x[v] = load(scores + c + v * LANES);
            if (a.log_weights) x[v] += load(a.log_weights + c + v * LANES);
            x[v] = visible(x[v], load_int(keys + c + v * LANES));
            most = select(x[v] > most, x[v], most);
        }
        follow(largest(most), c);
#pragma GCC unroll 8
        for (int v = 0; v < GROUP; ++v) {
            const vf e = exp_or_zero(x[v] - peak);
            store(scores + c + v * LANES, e);
            sums += e;
        }
    }
    for (; c < a.columns; c += LANES) {
        const int64_t count = std::min<int64_t>(LANES, a.columns - c);
        vf x = load_some(scores + c, count);
        if (a.log_weights) x += load_some(a.log_weights + c, count);
        x = visible(x, vi(load_some(reinterpret_cast<const float*>(keys + c), count)));
        x = select(lane_numbers() < splat_int(int32_t(count)), x, splat(HIDDEN));
        follow(largest(x), c);
        const vf e = exp_or_zero(x - peak);
        store_some(scores + c, e, count);
        sums += e;
    }
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
