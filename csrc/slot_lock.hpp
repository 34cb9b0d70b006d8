// What the parts of the arena share: the right to call the driver for some slots, the time callers wait, fences.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "arena.hpp"
#include "policy.hpp"

namespace vattn {

inline constexpr std::size_t kNever = std::numeric_limits<std::size_t>::max();

inline std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

// Remembers one fence for each stream: a later fence of a stream implies the earlier ones.
inline void note(Fences& fences, std::shared_ptr<const Fence> fence) {
  const auto old =
      std::find_if(fences.begin(), fences.end(), [&](const auto& one) { return one->stream() == fence->stream(); });
  if (old != fences.end()) {
    *old = std::move(fence);
  } else {
    fences.push_back(std::move(fence));
  }
}

// Sees to it that so many more elements can be added without an allocation, which may fail.
template <typename Value>
void make_room(std::vector<Value>& values, std::size_t more) {
  if (values.capacity() - values.size() < more) values.reserve(std::max(values.size() + more, 2 * values.capacity()));
}

inline bool passed(const Fences& fences) {
  return std::all_of(fences.begin(), fences.end(), [](const auto& fence) { return fence->passed(); });
}

template <typename Values, typename Value>
bool contains(const Values& values, Value value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

// Adds the time until it goes to what callers have waited.
class Arena::Waiting {
 public:
  explicit Waiting(Arena& arena) : arena_(arena) {}
  ~Waiting() {
    const std::chrono::nanoseconds waited = Clock::now() - since_;
    arena_.waited_ns_ += static_cast<std::uint64_t>(waited.count());
  }
  Waiting(const Waiting&) = delete;
  Waiting& operator=(const Waiting&) = delete;

 private:
  Arena& arena_;
  const Clock::time_point since_ = Clock::now();
};

// The right to call the driver for some slots with the mutex free. Taken when none of them is held by others.
class Arena::SlotLock {
 public:
  SlotLock(Arena& arena, Slots slots, Lock& lock) : arena_(arena), slots_(slots.begin(), slots.end()), lock_(lock) {
    std::sort(slots_.begin(), slots_.end());
    if (std::adjacent_find(slots_.begin(), slots_.end()) != slots_.end())
      throw std::invalid_argument("a slot is named twice");
    const auto free = [&] {
      return std::none_of(slots_.begin(), slots_.end(),
                          [&](std::size_t slot) { return arena_.slots_.at(slot).locked; });
    };
    if (!free()) {
      const Waiting waiting(arena_);
      arena_.released_.wait(lock_, free);
    }
    for (const std::size_t slot : slots_) arena_.slots_[slot].locked = true;
  }
  ~SlotLock() {
    if (!lock_.owns_lock()) lock_.lock();
    for (const std::size_t slot : slots_) arena_.slots_[slot].locked = false;
    arena_.released_.notify_all();
  }
  SlotLock(const SlotLock&) = delete;
  SlotLock& operator=(const SlotLock&) = delete;

 private:
  Arena& arena_;
  std::vector<std::size_t> slots_;
  Lock& lock_;
};

}  // namespace vattn
