// The slot of each id, as hstu/parallel/dynamic/slots.py specifies it.
//
// Ids and scores are in the caller's memory, side by side, so that recognising an id and scoring it touches one cache
// line. Two structures are derived from them:
//   Index    open addressing with linear probing, at most two thirds full: part of an id's hash -> slot.
//   Victims  slots by the score they had when they were last examined. Scores only grow, so a slot with an outdated
//            score comes up too early, never too late. Its entry is then corrected; a lookup never touches the order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <queue>
#include <unordered_map>
#include <vector>

namespace slots {

constexpr int64_t kMaxCount = 0x7FFFFFFF;
constexpr int32_t kEmpty = -1;
constexpr int64_t kAhead = 16;  // memory is prefetched this many steps before it is read

inline uint64_t mix(int64_t id) {
    uint64_t bits = static_cast<uint64_t>(id) + 0x9E3779B97F4A7C15ull;
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ull;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBull;
    return bits ^ (bits >> 31);
}

struct Record {
    int64_t id;
    int64_t score;
};

struct Policy {
    bool lfu;
    bool evicts = true;

    int64_t score(int64_t count, int64_t step) const {
        count = std::min(count, kMaxCount);
        return lfu ? (count << 32) + step : (step << 31) + count;
    }
    int64_t count(int64_t score) const { return lfu ? score >> 32 : score & kMaxCount; }
    int64_t step(int64_t score) const { return lfu ? score & 0xFFFFFFFF : score >> 31; }
};

// The id of an entry is that of its slot. Two ids with one tag are rare but possible.
class Index {
public:
    struct Entry {
        uint32_t tag;
        int32_t slot;
    };

    static uint32_t tag_of(int64_t id) { return uint32_t(mix(id) >> 32); }

    void clear(int64_t expected) {
        int bits = 4;
        while ((int64_t(2) << bits) < 3 * expected) ++bits;
        shift_ = 32 - bits;
        entries_.assign(size_t(1) << bits, Entry{0, kEmpty});
        used_ = 0;
    }

    // Make room for `more` entries. Existing entries may move.
    void reserve(int64_t more) {
        if (3 * (used_ + more) <= 2 * int64_t(entries_.size())) return;
        std::vector<Entry> old;
        old.swap(entries_);
        clear(used_ + more);
        for (const Entry& entry : old)
            if (entry.slot != kEmpty) set(find(entry.tag, [](int32_t) { return false; }), entry);
    }

    void prefetch(uint32_t tag) const { __builtin_prefetch(&entries_[home(tag)]); }

    // The slot of `tag` if it is near its home position, as most are, else any slot. Without an unpredictable branch.
    int32_t guess(uint32_t tag) const {
        size_t first = home(tag), second = next(first), third = next(second);
        size_t position = entries_[second].tag == tag ? second : third;
        return entries_[entries_[first].tag == tag ? first : position].slot;
    }

    // Position of the entry of `tag` whose slot satisfies `is_it`, or of the empty entry where it would be inserted.
    template <class IsIt>
    size_t find(uint32_t tag, IsIt is_it) const {
        size_t position = home(tag);
        while (entries_[position].slot != kEmpty && !(entries_[position].tag == tag && is_it(entries_[position].slot)))
            position = next(position);
        return position;
    }

    int32_t slot(size_t position) const { return entries_[position].slot; }

    void set(size_t position, Entry entry) {
        used_ += entries_[position].slot == kEmpty;
        entries_[position] = entry;
    }

    void erase(size_t hole) {
        --used_;
        for (size_t position = next(hole); entries_[position].slot != kEmpty; position = next(position)) {
            size_t from_home = (position - home(entries_[position].tag)) & (entries_.size() - 1);
            if (from_home >= ((position - hole) & (entries_.size() - 1))) {
                entries_[hole] = entries_[position];
                hole = position;
            }
        }
        entries_[hole].slot = kEmpty;
    }

private:
    size_t home(uint32_t tag) const { return tag >> shift_; }
    size_t next(size_t position) const { return (position + 1) & (entries_.size() - 1); }

    std::vector<Entry> entries_;
    int64_t used_ = 0;
    int shift_ = 28;
};

struct Key {
    uint64_t mixed;
    int32_t slot;

    bool operator<(const Key& other) const { return mixed < other.mixed; }
};

// Sorts in ascending order, in linear time because hashes are uniformly distributed.
class KeySort {
public:
    void operator()(std::vector<Key>& keys) {
        int bits = 1;
        while ((size_t(1) << bits) < keys.size()) ++bits;
        ends_.assign((size_t(1) << bits) + 1, 0);
        for (const Key& key : keys) ++ends_[(key.mixed >> (64 - bits)) + 1];
        for (size_t part = 1; part < ends_.size(); ++part) ends_[part] += ends_[part - 1];
        sorted_.resize(keys.size());
        for (const Key& key : keys) sorted_[ends_[key.mixed >> (64 - bits)]++] = key;
        for (size_t part = 0, begin = 0; part + 1 < ends_.size(); begin = ends_[part++])
            if (ends_[part] - begin > 1) std::sort(sorted_.begin() + begin, sorted_.begin() + ends_[part]);
        keys.swap(sorted_);
    }

private:
    std::vector<uint32_t> ends_;
    std::vector<Key> sorted_;
};

// Every slot in use is in one group: that of the score which it had when it was added.
class Victims {
public:
    Victims(const Record* records, Policy policy) : records_(records), policy_(policy) {}

    void clear() {
        groups_.clear();
        scores_ = {};
        last_ = nullptr;
    }

    void add(int32_t slot) {
        Group& group = group_of(records_[slot].score);
        group.slots.push_back(slot);
        group.sorted = false;
    }

    // Remove slots whose last step is not `step` and append them to `taken`, lowest score first, as long as the i-th of
    // them scores less than the i-th of `contenders`, which are in descending order.
    void pop(const std::vector<int64_t>& contenders, int64_t step, std::vector<int32_t>& taken) {
        std::vector<int64_t> spared;
        while (taken.size() < contenders.size() && !scores_.empty()) {
            int64_t score = scores_.top();
            Group& group = groups_[score];
            if (group.slots.empty()) {
                erase_lowest_group();
            } else if (policy_.step(score) == step) {
                spared.push_back(score);
                scores_.pop();
            } else if (score >= contenders[taken.size()]) {
                break;
            } else {
                if (!group.sorted) sort(group, score);
                take_from(group, score, contenders, taken);
            }
        }
        for (int64_t score : spared) scores_.push(score);
    }

private:
    struct Group {
        std::vector<int32_t> slots;
        bool sorted = false;  // descending: the slot to evict first is at the back
    };

    Group& group_of(int64_t score) {
        if (last_ && score == last_score_) return *last_;
        auto [found, is_new] = groups_.try_emplace(score);
        if (is_new) scores_.push(score);
        last_score_ = score;
        return *(last_ = &found->second);
    }

    void erase_lowest_group() {
        groups_.erase(scores_.top());
        scores_.pop();
        last_ = nullptr;
    }

    void sort(Group& group, int64_t score) {
        keys_.clear();
        for (int64_t i = 0; i < int64_t(group.slots.size()); ++i) {
            if (i + kAhead < int64_t(group.slots.size())) __builtin_prefetch(&records_[group.slots[i + kAhead]]);
            int32_t slot = group.slots[i];
            if (records_[slot].score == score)
                keys_.push_back({mix(records_[slot].id), slot});
            else
                add(slot);
        }
        sort_(keys_);
        group.slots.resize(keys_.size());
        for (size_t i = 0; i < keys_.size(); ++i) group.slots[i] = keys_[keys_.size() - 1 - i].slot;
        group.sorted = true;
    }

    void take_from(
        Group& group, int64_t score, const std::vector<int64_t>& contenders, std::vector<int32_t>& taken) {
        while (!group.slots.empty() && taken.size() < contenders.size() && score < contenders[taken.size()]) {
            if (int64_t(group.slots.size()) > kAhead) __builtin_prefetch(&records_[*(group.slots.end() - kAhead)], 1);
            int32_t slot = group.slots.back();
            group.slots.pop_back();
            if (records_[slot].score == score)
                taken.push_back(slot);
            else
                add(slot);
        }
    }

    const Record* records_;
    Policy policy_;
    std::unordered_map<int64_t, Group> groups_;
    std::priority_queue<int64_t, std::vector<int64_t>, std::greater<int64_t>> scores_;  // of groups_
    Group* last_ = nullptr;  // the group of last_score_: consecutive slots often have equal scores
    int64_t last_score_ = 0;
    std::vector<Key> keys_;
    KeySort sort_;
};

}  // namespace slots
