// Ids to slots, for hstu/parallel/dynamic/slots.py, whose docstring is the specification.
//
// Ids and scores lie in the caller's arrays. Beside them, made from them alone:
//   Index    open addressing with linear probing, at most half full: id -> slot.
//   Victims  slots by ascending score. Scores only ever grow, so an entry that is out of date is too early, never too
//            late: it is put right when it comes up, and a lookup touches no order at all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

namespace slots {

constexpr int64_t kMaxCount = 0x7FFFFFFF;
constexpr int32_t kEmpty = -1;

inline uint64_t mix(int64_t id) {
    uint64_t bits = static_cast<uint64_t>(id) + 0x9E3779B97F4A7C15ull;
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ull;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBull;
    return bits ^ (bits >> 31);
}

struct Policy {
    bool lfu;

    int64_t score(int64_t count, int64_t step) const {
        count = std::min(count, kMaxCount);
        return lfu ? (count << 32) + step : (step << 31) + count;
    }
    int64_t count(int64_t score) const { return lfu ? score >> 32 : score & kMaxCount; }
    int64_t step(int64_t score) const { return lfu ? score & 0xFFFFFFFF : score >> 31; }
};

class Index {
public:
    struct Entry {
        int64_t id;
        int32_t slot;
    };

    void clear(int64_t expected) {
        int bits = 4;
        while ((int64_t(1) << bits) < 2 * expected) ++bits;
        shift_ = 64 - bits;
        entries_.assign(size_t(1) << bits, Entry{0, kEmpty});
        used_ = 0;
    }

    // Afterwards `more` ids fit in; entries may have moved.
    void reserve(int64_t more) {
        if (2 * (used_ + more) <= int64_t(entries_.size())) return;
        std::vector<Entry> old;
        old.swap(entries_);
        clear(2 * (used_ + more));
        for (const Entry& entry : old)
            if (entry.slot != kEmpty) *insert(entry.id, home(entry.id)) = entry;
    }

    size_t home(int64_t id) const { return mix(id) >> shift_; }
    void prefetch(size_t place) const { __builtin_prefetch(&entries_[place]); }

    // The entry of `id`, or the empty one where it would lie.
    Entry* find(int64_t id, size_t place) {
        while (entries_[place].slot != kEmpty && entries_[place].id != id) place = next(place);
        return &entries_[place];
    }
    Entry* insert(int64_t id, size_t place) {
        Entry* entry = find(id, place);
        used_ += entry->slot == kEmpty;
        entry->id = id;
        return entry;
    }
    void erase(int64_t id) {
        size_t hole = find(id, home(id)) - entries_.data();
        --used_;
        for (size_t place = next(hole); entries_[place].slot != kEmpty; place = next(place)) {
            size_t from_home = (place - home(entries_[place].id)) & (entries_.size() - 1);
            if (from_home >= ((place - hole) & (entries_.size() - 1))) {
                entries_[hole] = entries_[place];
                hole = place;
            }
        }
        entries_[hole].slot = kEmpty;
    }

private:
    size_t next(size_t place) const { return (place + 1) & (entries_.size() - 1); }

    std::vector<Entry> entries_;
    int64_t used_ = 0;
    int shift_ = 60;
};

struct Key {
    int64_t score;
    uint64_t mixed;
    int32_t slot;

    bool operator<(const Key& other) const {
        return score != other.score ? score < other.score : mixed < other.mixed;
    }
    bool operator>(const Key& other) const { return other < *this; }
};

// Every slot whose score is at most `bound_` is in `sorted_` (from `next_` on) or in the heap `later_`, once.
class Victims {
public:
    Victims(const int64_t* ids, const int64_t* scores, Policy policy) : ids_(ids), scores_(scores), policy_(policy) {}

    void clear() {
        sorted_.clear();
        later_.clear();
        next_ = 0;
        bound_ = -1;
    }

    void inserted(int32_t slot) {
        if (scores_[slot] <= bound_) push(slot);
    }

    // Slots of those in use (`size`) whose last step is not `step`, lowest first, as long as the i-th of them scores
    // less than the i-th of `contenders`. They are forgotten.
    void pop(const std::vector<int64_t>& contenders, int64_t size, int64_t step, std::vector<int32_t>& taken) {
        std::vector<int32_t> spared;
        if (int64_t(later_.size()) > size / 4) clear();
        while (taken.size() < contenders.size()) {
            if (next_ == sorted_.size() && later_.empty()) {
                if (!refill(size, step)) break;
                continue;
            }
            Key key = take_first();
            if (scores_[key.slot] != key.score) {
                inserted(key.slot);
            } else if (policy_.step(key.score) == step) {
                spared.push_back(key.slot);
            } else if (key.score < contenders[taken.size()]) {
                taken.push_back(key.slot);
            } else {
                spared.push_back(key.slot);
                break;
            }
        }
        for (int32_t slot : spared) push(slot);
    }

private:
    Key key_of(int32_t slot) const { return {scores_[slot], mix(ids_[slot]), slot}; }

    void push(int32_t slot) {
        later_.push_back(key_of(slot));
        std::push_heap(later_.begin(), later_.end(), std::greater<Key>());
    }

    Key take_first() {
        if (later_.empty() || (next_ < sorted_.size() && sorted_[next_] < later_.front())) {
            if (next_ + 16 < sorted_.size()) __builtin_prefetch(&scores_[sorted_[next_ + 16].slot]);
            return sorted_[next_++];
        }
        std::pop_heap(later_.begin(), later_.end(), std::greater<Key>());
        Key key = later_.back();
        later_.pop_back();
        return key;
    }

    // The lowest eighth or so of the scores above the bound; false where there is none to take.
    bool refill(int64_t size, int64_t step) {
        constexpr int64_t kSample = 4096;
        std::vector<int64_t> sample;
        int64_t stride = std::max<int64_t>(1, size / kSample);
        for (int64_t slot = 0; slot < size; slot += stride)
            if (scores_[slot] > bound_ && policy_.step(scores_[slot]) != step) sample.push_back(scores_[slot]);
        int64_t bound = std::numeric_limits<int64_t>::max();
        if (bound_ == bound) return false;
        if (!sample.empty()) {
            auto eighth = sample.begin() + sample.size() / 8;
            std::nth_element(sample.begin(), eighth, sample.end());
            bound = *eighth;
        }
        sorted_.clear();
        next_ = 0;
        for (int64_t slot = 0; slot < size; ++slot)
            if (scores_[slot] > bound_ && scores_[slot] <= bound) sorted_.push_back(key_of(int32_t(slot)));
        std::sort(sorted_.begin(), sorted_.end());
        bound_ = bound;
        return true;
    }

    const int64_t* ids_;
    const int64_t* scores_;
    Policy policy_;
    std::vector<Key> sorted_;
    std::vector<Key> later_;
    size_t next_ = 0;
    int64_t bound_ = -1;
};

}  // namespace slots
