// HSTU attention of jagged sequences: definitions shared by forward and backward.
//
// A sequence is processed in strips of 2 · LANES queries, one query per lane, against blocks of keys that some query of
// the strip may see. Scores are stored as [key][query], so that neither scores nor keys are padded to vectors.
#pragma once
#include <algorithm>
#include <vector>

#include "gemm.h"

namespace hstu {

constexpr int STRIP = 2 * LANES;  // queries of a strip
constexpr int BLOCK = 64;         // keys of a block: its two tiles of scores stay in the first cache
constexpr int ROUND = 8;          // keys are rounded up to full register tiles
constexpr int TIME_BUCKETS = 128;

}  // namespace hstu

// Mirrors hstu/ops/cpu/attention.py: same names, same order. Strides count elements.
extern "C" struct HstuAttention {
    const void *q, *k, *v;  // [T, heads, width], channels contiguous
    int64_t q_strides[2], k_strides[2], v_strides[2];
    const void* grad_out;  // backward only
    int64_t grad_out_strides[2];
    void *out, *grad_q, *grad_k, *grad_v;  // [T, heads, width]
    int64_t out_strides[2], grad_q_strides[2], grad_k_strides[2], grad_v_strides[2];
    const float *position_weight, *time_weight;       // null without a bias
    double *grad_position_weight, *grad_time_weight;  // [bins, positions], [bins, TIME_BUCKETS]
    const int64_t *query_times, *token_times;
    uint8_t* buckets;               // kept time buckets, or null: computed again
    const int64_t* bucket_offsets;  // [B]: offset of a sequence's buckets
    const int64_t *offsets;         // [B + 1]
    const int64_t *candidates;      // [B]
    const int64_t *order;           // [B]: the most expensive sequences first
    int64_t sequences, heads, width, positions, bins;
    int64_t contextuals, group_tokens;
    float alpha, inverse_n;
    int32_t is_causal, contextual_mask, is_bfloat, threads;
};

namespace hstu {

// Query i of a sequence sees the keys [0, history) and [own_group, i].
struct Visible {
    int32_t history[STRIP], own_group[STRIP];
};

struct Strip {
    int64_t first = 0, lanes = 0;  // queries [first, first + lanes)
    int vectors = 0;               // of queries: 1 or 2
    int64_t both_end = 0, end = 0;  // keys [0, both_end) are for all vectors, [both_end, end) for the second only
    int64_t all_see = 0;            // keys [0, all_see) are seen by every query
    int64_t hidden_from = 0, hidden_to = 0;  // keys between history and candidates that no query sees
    bool has_candidates = false;
    Visible visible;
};

inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

inline Strip make_strip(const HstuAttention& a, int64_t first, int64_t length, int64_t history_end) {
    Strip s;
    s.first = first;
    s.lanes = std::min<int64_t>(STRIP, length - first);
    s.vectors = s.lanes > LANES ? 2 : 1;
    s.all_see = length;
    s.hidden_from = 0;
    s.hidden_to = length;
    int64_t ends[2] = {0, 0};
    for (int64_t lane = 0; lane < STRIP; ++lane) {
        s.visible.history[lane] = 0;
        s.visible.own_group[lane] = INT32_MAX;
        const int64_t i = first + lane;
        if (lane >= s.lanes) continue;
        const bool sees_all = !a.is_causal || (a.contextual_mask && i < a.contextuals) || i >= history_end;
        const int64_t history = sees_all ? history_end : std::min(i + 1, history_end);
        int64_t end = history;
        s.visible.history[lane] = int32_t(history);
        if (i >= history_end) {
            const int64_t group = history_end + (i - history_end) / a.group_tokens * a.group_tokens;
            s.visible.own_group[lane] = int32_t(group);
            s.hidden_to = std::min(s.hidden_to, group);
            s.has_candidates = true;
            end = i + 1;
        }
        s.all_see = std::min(s.all_see, history);
        s.hidden_from = std::max(s.hidden_from, history);
        ends[lane / LANES] = std::max(ends[lane / LANES], end);
    }
    s.both_end = round_up(ends[0], ROUND);
    s.end = round_up(std::max(ends[0], ends[1]), ROUND);
    return s;
}

// Calls visit(first key, keys, first vector) for each block of keys that some query of the strip sees.
template <class Visit>
void for_each_block(const Strip& s, Visit visit) {
    const int64_t cuts[3] = {0, s.vectors == 2 ? s.both_end : s.end, s.end};
    for (int part = 0; part < 2; ++part)
        for (int64_t j = cuts[part]; j < cuts[part + 1]; j += BLOCK) {
            const int64_t keys = std::min<int64_t>(BLOCK, cuts[part + 1] - j);
            if (j >= s.hidden_from && j + keys <= s.hidden_to) continue;
            visit(j, keys, part);
        }
}

// A vector's lanes that see key j.
inline vi sees(const Visible& visible, int vector, int64_t j, int64_t first) {
    vi history, group;
    std::memcpy(&history, visible.history + vector * LANES, sizeof history);
    std::memcpy(&group, visible.own_group + vector * LANES, sizeof group);
    const vi key = splat_int(int32_t(j));
    const vi query = lane_numbers() + int32_t(first + vector * LANES);
    return (key < history) | ((group <= key) & (key <= query));
}

// Bytes of the buckets of one sequence: STRIP per key, strip after strip.
int64_t bucket_bytes(const HstuAttention& a, int64_t sequence);
// The buckets of keys [j, j + keys) for the queries of a strip, STRIP per key.
void fill_buckets(const HstuAttention& a, int64_t sequence, const Strip& s, int64_t j, int64_t keys, uint8_t* out);

}  // namespace hstu
