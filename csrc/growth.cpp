// How running slots grow, within mapped memory or by mapping more, and how the rows before windows are given back.
#include <algorithm>
#include <utility>

#include "slot_lock.hpp"

namespace vattn {

void Arena::grow(Slots names, PerSlot positions, PerSlot min_truncate_length, Stream stream) {
  if (!positions.serves(names.size()) || !min_truncate_length.serves(names.size()))
    throw std::invalid_argument("there must be one number for all slots, or one for each");
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (positions[i] <= options_.max_len) continue;
    const std::string which = names.size() == 1 ? "" : "sequence " + std::to_string(i) + " of the batch: ";
    throw SequenceTooLong(which + too_long(positions[i]));
  }
  Lock lock = locked();
  require_open();
  const std::vector<std::size_t> slots = running_slots(names, "grow");
  if (grow_in_place(slots, positions, min_truncate_length, stream)) return;
  if (discard_due_now(names, min_truncate_length, stream, lock) && mapper_ &&
      grow_in_place(slots, positions, min_truncate_length, stream))
    return;
  lock.unlock();
  ++misses_;
  const Waiting waiting(*this);
  on_mapper([&] { grow_with_driver(names, positions, stream); });
}

void Arena::grow_with_driver(Slots names, PerSlot positions, Stream stream) {
  Lock lock = locked();
  require_open();
  const std::vector<std::size_t> slots = running_slots(names, "grow");
  const SlotLock slot_lock(*this, slots, lock);
  require_open();
  running_slots(names, "grow");
  map_up_to(slots, positions, Urgency::demand, lock);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    slots_[slots[i]].hit_at = kNever;  // a caller waited for this memory, so that reaching it is no hit
    advance(slots[i], positions[i], stream);
  }
}

std::size_t Arena::extend(std::size_t name, std::size_t count, Stream stream) {
  Lock lock = locked();
  require_open();
  running(name, "grow");
  if (const auto reached = extend_in_place(name, count, stream)) return *reached;
  const std::size_t length = slots_[slot_of(name)].length;
  if (discard_due_now(Slots(&name, 1), PerSlot(length), stream, lock) && mapper_)
    if (const auto reached = extend_in_place(name, count, stream)) return *reached;
  lock.unlock();
  ++misses_;
  const Waiting waiting(*this);
  std::size_t reached = 0;
  on_mapper([&] { reached = extend_with_driver(name, count, stream); });
  return reached;
}

std::size_t Arena::extend_with_driver(std::size_t name, std::size_t count, Stream stream) {
  Lock lock = locked();
  require_open();
  running(name, "grow");
  const std::size_t index = slot_of(name);
  const SlotLock slot_lock(*this, Slots(&index, 1), lock);
  require_open();
  Slot& slot = running(name, "grow");
  for (;;) {
    const std::size_t before = slot.length;
    require_possible(count, before);
    const std::size_t positions = before + count;
    map_up_to(Slots(&index, 1), PerSlot(positions), Urgency::demand, lock);
    // While the mutex was free, another thread may have extended the slot into memory that was mapped before.
    if (slot.length != before) continue;
    slot.hit_at = kNever;  // a caller waited for this memory, so that reaching it is no hit
    advance(index, before + count, stream);
    return before + count;
  }
}

std::optional<std::size_t> Arena::try_extend(std::size_t name, std::size_t count, Stream stream) {
  const Lock lock = locked();
  if (closed_ || !is_running(name)) return std::nullopt;
  return extend_in_place(name, count, stream);
}

std::optional<std::size_t> Arena::extend_in_place(std::size_t name, std::size_t count, Stream stream) {
  const std::size_t index = slot_of(name);
  const std::size_t before = slots_[index].length;
  require_possible(count, before);
  const std::size_t positions = before + count;
  if (!grow_in_place(Slots(&index, 1), PerSlot(positions), PerSlot(before), stream)) return std::nullopt;
  return positions;
}

// Defers the unmapping of what the windows of the slots have passed. Returns false when there is nothing of the kind.
bool Arena::discard_due_now(Slots names, PerSlot min_truncate_length, Stream stream, Lock& lock) {
  const std::vector<std::size_t> slots = running_slots(names, "grow");
  bool due = false;
  for (std::size_t i = 0; i < slots.size() && !due; ++i) due = discard_due(slots_[slots[i]], min_truncate_length[i]);
  if (!due) return false;
  const SlotLock slot_lock(*this, slots, lock);  // a thread that forks one of them relies on its runs
  const Fences fresh = fences_of(slots, stream, lock);
  require_open();
  running_slots(names, "grow");  // another thread may have ended a sequence while the mutex was free
  discard_before_windows(slots, min_truncate_length, fresh);
  return true;
}

// Maps what locked slots lack for `positions` rows. A demand waits for fences, takes memory from wherever it holds no
// rows of a running sequence and prefetch() did not ask for it, and throws BudgetExceeded when that is not enough.
// Mapping ahead does not wait for fences and takes no memory that other sequences will need soon; when that is not
// enough, it returns false and leaves the runs as they were. Both throw what the driver refuses.
bool Arena::map_up_to(Slots slots, PerSlot positions, Urgency urgency, Lock& lock) {
  const bool demand = urgency == Urgency::demand;
  // The first plan also serves later growth, and is met only from memory that no sequence is expected to need. If that
  // fails, an exact plan has only what is asked for, and is met from all that may be taken.
  bool exact = false;
  const Keep least = demand ? Keep::rows : Keep::ahead;
  for (;;) {
    if (!copy_shared(slots, urgency, lock) || !clear_the_way(slots, urgency, lock)) return false;
    const auto steps = plan(slots, positions, exact);
    const std::size_t needed = bytes_of(steps);
    if (const std::size_t available = pool_.usage().available(); needed > available) {
      if (reclaim(needed - available, steps, slots, exact ? least : Keep::expected, urgency, lock)) continue;
      if (exact && !demand) return false;
      if (exact) throw BudgetExceeded(needed, pool_.usage().available());
      exact = true;
      continue;
    }
    for (const Step& step : steps) make_room(slots_[step.slot].runs[step.plane].mappings, steps.size());
    lock.unlock();
    std::vector<DeferredUnmap> built;
    try {
      built = build(steps);
    } catch (const BudgetExceeded&) {
      lock.lock();  // another thread took the memory after the check above
      continue;
    } catch (const OutOfDeviceMemory&) {
      // The exact plan may need less, and other slots may have memory that they do not need.
      lock.lock();
      const bool reclaimed = reclaim(needed, steps, slots, least, urgency, lock);
      if (!reclaimed && exact) throw;
      exact = true;
      continue;
    }
    lock.lock();
    if (first_lookahead() != 0 && !steps.empty() && steps.size() <= geometry_.size()) {  // growth, not a prompt
      stocked_class_ = pool_.class_of(steps.back().bytes);
      post_maintenance({});
    }
    for (DeferredUnmap& loose : built) {
      Run& run = slots_[loose.slot].runs[loose.plane];
      run.tail += loose.mapping.bytes();
      run.mappings.push_back(std::move(loose.mapping));
    }
    break;
  }
  for (const std::size_t index : slots) {
    Slot& slot = slots_[index];
    if (!demand) slot.hit_at = std::min(slot.hit_at, slot.capacity);
    slot.starved = false;
    refresh(slot);
  }
  return true;
}

bool Arena::try_grow(Slots names, PerSlot positions, PerSlot min_truncate_length, Stream stream) {
  const Lock lock = locked();
  if (!positions.serves(names.size()) || !min_truncate_length.serves(names.size())) return false;
  for (const std::size_t name : names)
    if (!is_running(name)) return false;
  return !closed_ && grow_in_place(names, positions, min_truncate_length, stream);
}

bool Arena::discard_due(const Slot& slot, std::size_t min_truncate_length) const noexcept {
  return slot.next_discard <= std::min(min_truncate_length, slot.length);
}

bool Arena::grow_in_place(Slots names, PerSlot positions, PerSlot min_truncate_length, Stream stream) {
  for (std::size_t i = 0; i < names.size(); ++i) {
    const Slot& slot = slots_[slot_of(names[i])];
    if (slot.capacity < positions[i] || discard_due(slot, min_truncate_length[i])) return false;
  }
  for (std::size_t i = 0; i < names.size(); ++i) advance(slot_of(names[i]), positions[i], stream);
  return true;
}

// Raises a slot's length within its mapped memory, and asks the mapper for more when less than the lookahead is left.
void Arena::advance(std::size_t index, std::size_t positions, Stream stream) {
  Slot& slot = slots_[index];
  slot.length = std::max(slot.length, positions);
  if (!contains(slot.streams, stream)) slot.streams.push_back(stream);
  if (slot.length <= slot.quiet) return;
  if (slot.length > slot.hit_at) {
    ++hits_;
    slot.hit_at = kNever;
  }
  if (slot.length > slot.ahead_at) ask(index);
  slot.quiet = std::min(slot.hit_at, slot.ahead_at);
}

bool Arena::prefetch(std::size_t name, std::size_t positions) {
  require_possible(positions);
  Lock lock = locked();
  require_open();
  Slot& slot = running(name, "prefetch");
  const std::size_t index = slot_of(name);
  const std::size_t before = std::exchange(slot.wanted, positions);
  if (slot.capacity >= positions) return true;
  if (mapper_) {
    ask(index);
    slot.quiet = std::min(slot.hit_at, slot.ahead_at);
    return false;
  }
  ++misses_;
  try {
    const SlotLock slot_lock(*this, Slots(&index, 1), lock);
    require_open();
    running(name, "prefetch");
    const Waiting waiting(*this);
    map_up_to(Slots(&index, 1), PerSlot(positions), Urgency::demand, lock);
  } catch (...) {
    slot.wanted = before;
    throw;
  }
  return true;
}

// Returns the extents to map so that the slots' runs reach `positions` rows. Unless `exact`, they may reach further, so
// that later growth needs no driver call.
std::vector<Arena::Step> Arena::plan(Slots slots, PerSlot positions, bool exact) const {
  std::vector<Step> steps;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const std::size_t index = slots[i];
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      const Run& run = slots_[index].runs[plane];
      const std::size_t end = end_of(geometry_[plane], positions[i]);
      if (end <= run.tail) continue;
      std::size_t missing = end - run.tail;
      // An extent is given back only as a whole. In a plane with a window, extents are therefore at most an eighth of
      // the window, so that little memory is kept before it.
      const auto& [row_bytes, window, offset, stride] = geometry_[plane];
      std::size_t largest = window == 0 ? ExtentPool::kClasses - 1 : pool_.class_of(window * row_bytes / 8);
      if (!exact) {
        std::size_t have = 0;  // without shared extents: a fork grows in proportion to what it added itself
        for (const Mapping& mapping : run.mappings) have += mapping.shared() ? 0 : mapping.bytes();
        std::size_t ahead = pool_.bytes_of(pool_.class_of(have / options_.growth_divisor));
        const std::size_t expected = end_of(geometry_[plane], std::min(slots_[index].expected, options_.max_len));
        if (expected > end && positions[i] > slots_[index].prompt) {
          // The sequence is expected to grow further. Its extents are sized so that sequences that adopt the slot later
          // can use them too, and it takes more at a time, so that it asks for memory less often.
          largest = std::min(largest, pool_.class_of(end / kServed));
          const std::size_t unit = pool_.bytes_of(std::min(largest, pool_.class_of(end / kRounded)));
          const std::size_t step = slots_[index].length == 0
                                       ? round_up(missing, unit)
                                       : pool_.bytes_of(pool_.class_of(std::min(expected - run.tail, have / kTold)));
          ahead = std::max(ahead, std::min(step, expected - run.tail));
        }
        missing = std::min(std::max(missing, ahead), stride - run.tail);
      }
      Address at = address_of(index, plane) + run.tail;
      while (missing != 0) {
        const std::size_t size_class = std::min(largest, pool_.class_of(missing));
        const std::size_t bytes = pool_.bytes_of(size_class);
        steps.push_back({index, plane, at, bytes});
        at += bytes;
        missing -= bytes;
      }
    }
  }
  return steps;
}

std::size_t Arena::bytes_of(const std::vector<Step>& steps) noexcept {
  std::size_t bytes = 0;
  for (const Step& step : steps) bytes += step.bytes;
  return bytes;
}

// Takes the planned extents from the pool, maps them, and zeroes those that are new. Requires that the mutex is free.
// When this throws, the extents are back in the pool, or their unmapping is deferred where the driver refuses that too.
std::vector<Arena::DeferredUnmap> Arena::build(const std::vector<Step>& steps) {
  std::vector<DeferredUnmap> built;
  built.reserve(steps.size());
  bool zeroing = false;
  try {
    for (const Step& step : steps) {
      built.push_back({step.slot, step.plane, Mapping(driver_, pool_.take(step.bytes), step.at), {}});
      Mapping& mapping = built.back().mapping;
      mapping.allow();
      if (mapping.zeroed()) continue;
      zeroing = true;
      driver_->zero(mapping.range());  // asynchronous: runs while the next extent is mapped
    }
    if (zeroing) driver_->zeroed();
    for (DeferredUnmap& loose : built) loose.mapping.set_zeroed();
  } catch (...) {
    try {
      if (zeroing) driver_->zeroed();
    } catch (const std::exception& error) {
      driver_->report(error);
    }
    try {
      unmap(built);
    } catch (const std::exception& error) {
      // The driver has refused the unmapping too. It is deferred, and tried again when the addresses are needed.
      driver_->report(error);
      const std::lock_guard lock(mutex_);
      defer_again(built);
    }
    throw;
  }
  return built;
}

// Does what build() does, and reclaims the memory for it where needed, as a demand does; of the slots `mine`, which the
// caller has locked, only deferred unmaps are taken. The mutex, which must be locked at the call, is free when this
// returns, and may be either when it throws.
std::vector<Arena::DeferredUnmap> Arena::build_on_demand(const std::vector<Step>& steps, Slots mine, Lock& lock) {
  const std::size_t needed = bytes_of(steps);
  for (;;) {
    if (const std::size_t available = pool_.usage().available(); needed > available) {
      if (reclaim(needed - available, steps, mine, Keep::rows, Urgency::demand, lock)) continue;
      throw BudgetExceeded(needed, pool_.usage().available());
    }
    lock.unlock();
    try {
      return build(steps);
    } catch (const BudgetExceeded&) {
      lock.lock();  // another thread took the memory after the check above
    } catch (const OutOfDeviceMemory&) {
      lock.lock();
      if (!reclaim(needed, steps, mine, Keep::rows, Urgency::demand, lock)) throw;
    }
  }
}

// Defers the unmapping of the extents that lie wholly before the windows at `min_truncate_length`, until the slots'
// fences and the `fresh` ones have passed.
void Arena::discard_before_windows(Slots slots, PerSlot min_truncate_length, const Fences& fresh) {
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const std::size_t index = slots[i];
    Slot& slot = slots_[index];
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      const auto& [row_bytes, window, offset, stride] = geometry_[plane];
      const std::size_t kept = std::min(min_truncate_length[i], slot.length);
      if (window == 0 || kept < window) continue;
      Run& run = slot.runs[plane];
      const std::size_t first = (kept - window + 1) * row_bytes;
      std::size_t gone = 0;
      std::size_t head = run.head;
      while (gone < run.mappings.size() && head + run.mappings[gone].bytes() <= first)
        head += run.mappings[gone++].bytes();
      // The allocations come first: when one fails, the run is as it was.
      Fences after = slot.fences;
      for (const auto& fence : fresh) note(after, fence);
      std::vector<Fences> fences(gone, after);
      make_room(slot.deferred, gone);
      run.head = head;
      for (std::size_t one = 0; one < gone; ++one)
        slot.deferred.push_back({index, plane, std::move(run.mappings[one]), std::move(fences[one])});
      run.mappings.erase(run.mappings.begin(), run.mappings.begin() + static_cast<std::ptrdiff_t>(gone));
    }
    refresh(slot);
  }
  post_maintenance({});
}

}  // namespace vattn
