// The relative bias of HSTU attention: lookups in both tables, and their gradients.
#pragma once
#include "attention.h"

namespace hstu {

constexpr int SETS = 4;       // copies of the position gradients, so that neighbouring keys do not wait for each other
constexpr int TIME_SETS = 8;  // copies of the time gradients, so that neighbouring lanes never update the same number

// The time weights, held in registers where there are enough.
class TimeTable {
  public:
#if defined(__AVX512F__)
    explicit TimeTable(const float* weights) {
        for (int part = 0; part < 8; ++part) parts_[part] = _mm512_loadu_ps(weights + 16 * part);
    }
    // 128 numbers are 8 registers: a permutation reaches two of them, blends choose among the results.
    vf at(const uint8_t* buckets) const {
        const __m512i bucket = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(buckets)));
        const __mmask16 bit_5 = _mm512_test_epi32_mask(bucket, _mm512_set1_epi32(32));
        const __mmask16 bit_6 = _mm512_test_epi32_mask(bucket, _mm512_set1_epi32(64));
        const __m512 low = _mm512_mask_blend_ps(bit_5, _mm512_permutex2var_ps(parts_[0], bucket, parts_[1]),
                                                _mm512_permutex2var_ps(parts_[2], bucket, parts_[3]));
        const __m512 high = _mm512_mask_blend_ps(bit_5, _mm512_permutex2var_ps(parts_[4], bucket, parts_[5]),
                                                 _mm512_permutex2var_ps(parts_[6], bucket, parts_[7]));
        return vf(_mm512_mask_blend_ps(bit_6, low, high));
    }

  private:
    __m512 parts_[8];
#else
    explicit TimeTable(const float* weights) : weights_(weights) {}
    vf at(const uint8_t* buckets) const {
        vf values;
        for (int lane = 0; lane < LANES; ++lane) values[lane] = weights_[buckets[lane]];
        return values;
    }

  private:
    const float* weights_;
#endif
};

struct BiasScratch {
    std::vector<float> positions, grad_positions, grad_times;
    std::vector<uint8_t> buckets;
};

// The bias of one sequence: begin_strip, begin_block, then look-ups and gradients of that block.
class Bias {
  public:
    Bias(const HstuAttention& a, int64_t sequence, BiasScratch& scratch) : a_(a), sequence_(sequence), s_(scratch) {
        if (!exists()) return;
        const int64_t length = a.offsets[sequence + 1] - a.offsets[sequence];
        history_end_ = length - a.candidates[sequence];
        centre_ = length + STRIP;
        size_ = 2 * centre_ + STRIP;
        const int64_t farthest = a.positions / 2;
        s_.positions.resize(size_);
        for (int64_t place = 0; place < size_; ++place)
            s_.positions[place] = a.position_weight[std::clamp(place - centre_, -farthest, farthest) + farthest];
        if (a.grad_position_weight) {
            s_.grad_positions.assign(SETS * size_, 0.0f);
            s_.grad_times.assign(TIME_SETS * TIME_BUCKETS, 0.0f);
        }
        s_.buckets.resize(BLOCK * STRIP);
        if (a.buckets) kept_ = a.buckets + a.bucket_offsets[sequence];
    }

    bool exists() const { return a_.position_weight != nullptr; }

    void begin_strip(const Strip& strip) {
        if (kept_) kept_ += kept_keys_ * STRIP;
        kept_keys_ = strip.keys();
        strip_ = &strip;
    }

    void begin_block(int64_t first_key, int64_t keys) {
        first_key_ = first_key;
        block_ = kept_ ? kept_ + strip_->number_of(first_key) * STRIP : s_.buckets.data();
        if (!kept_) fill_buckets(a_, sequence_, *strip_, first_key, keys, s_.buckets.data());
    }

    // Bias of a key of the block for a vector of queries.
    vf at(const TimeTable& times, int64_t key, int vector) const {
        const vf time = times.at(block_ + key * STRIP + vector * LANES);
        if (!strip_->has_candidates)
            return time + load(s_.positions.data() + centre_ + strip_->first + vector * LANES - first_key_ - key);
        vf position;
        for (int lane = 0; lane < LANES; ++lane)
            position[lane] = s_.positions[centre_ + distance(vector * LANES + lane, key)];
        return time + position;
    }

    // `gradients` of a block's scores: [key][STRIP].
    void add_gradients(const float* gradients, int64_t keys, int first_vector) {
        const int lanes_begin = first_vector * LANES, lanes_end = strip_->vectors * LANES;
        float* times = s_.grad_times.data();
        for (int64_t key = 0; key < keys; ++key, gradients += STRIP) {
            const uint8_t* buckets = block_ + key * STRIP;
            for (int lane = lanes_begin; lane < lanes_end; ++lane)
                times[(lane % TIME_SETS) * TIME_BUCKETS + buckets[lane]] += gradients[lane];
            float* positions = s_.grad_positions.data() + (key % SETS) * size_ + centre_;
            if (strip_->has_candidates) {
                for (int lane = lanes_begin; lane < lanes_end; ++lane) positions[distance(lane, key)] += gradients[lane];
                continue;
            }
            positions += strip_->first - first_key_ - key;
            for (int lane = lanes_begin; lane < lanes_end; lane += LANES)
                store(positions + lane, load(positions + lane) + load(gradients + lane));
        }
    }

    // Adds the collected gradients to sums [positions] and [TIME_BUCKETS].
    void flush(double* position, double* time) {
        const int64_t farthest = a_.positions / 2;
        for (int64_t place = 0; place < size_; ++place) {
            float total = 0;
            for (int set = 0; set < SETS; ++set) total += s_.grad_positions[set * size_ + place];
            position[std::clamp(place - centre_, -farthest, farthest) + farthest] += total;
        }
        for (int place = 0; place < TIME_SETS * TIME_BUCKETS; ++place)
            time[place % TIME_BUCKETS] += s_.grad_times[place];
    }

  private:
    // All candidates share the position of the first.
    int64_t distance(int64_t lane, int64_t key) const {
        return std::min(strip_->first + lane, history_end_) - std::min(first_key_ + key, history_end_);
    }

    const HstuAttention& a_;
    int64_t sequence_;
    BiasScratch& s_;
    int64_t history_end_ = 0, centre_ = 0, size_ = 0;  // centre: the place of distance 0
    const Strip* strip_ = nullptr;
    const uint8_t *kept_ = nullptr, *block_ = nullptr;
    int64_t kept_keys_ = 0, first_key_ = 0;
};

}  // namespace hstu
