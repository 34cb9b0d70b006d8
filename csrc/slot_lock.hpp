// What the arena's source files share: the lock of slots, the measurement of waiting time, and helpers for fences.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "arena.hpp"
#include "policy.hpp"

namespace vattn {

inline constexpr std::size_t kNever = std::numeric_limits<std::size_t>::max();

inline std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

// Adds a fence to a list with one fence for each stream. It replaces the earlier fence of its stream, which has passed
// when the later one has.
inline void note(Fences& fences, std::shared_ptr<const Fence> fence) {
  const auto old =
      std::find_if(fences.begin(), fences.end(), [&](const auto& one) { return one->stream() == fence->stream(); });
  if (old != fences.end()) {
    *old = std::move(fence);
  } else {
    fences.push_back(std::move(fence));
  }
}

// Reserves memory so that `more` elements can be added later without an allocation, which may fail.
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

// Adds the time from its construction to its destruction to the arena's `waited_seconds`.
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

// A lock of several slots, under which a thread may call the driver for them while the mutex is free.
//
// The constructor requires that `lock` has the mutex. It waits until none of the slots is locked and then locks all of
// them at once, so that two threads that lock several slots cannot wait for each other. It throws std::invalid_argument
// when a slot is named twice. The destructor unlocks the slots, and leaves the mutex locked even if it was free.
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
