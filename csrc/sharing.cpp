// How the slots of an arena share extents: cached prefixes, forks, copy on write and compacting.
#include <iterator>
#include <numeric>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "slot_lock.hpp"

namespace vattn {
namespace {

// Moves the mappings from number `first` on out of a run. Requires: `taken` is empty and has room for them.
template <typename Run>
void take_from(Run& run, std::size_t first, std::vector<Mapping>& taken) noexcept {
  const auto from = run.mappings.begin() + static_cast<std::ptrdiff_t>(first);
  std::move(from, run.mappings.end(), std::back_inserter(taken));
  run.mappings.erase(from, run.mappings.end());
  for (const Mapping& mapping : taken) run.tail -= mapping.bytes();
}

}  // namespace

Arena::CachedPrefix Arena::commit(std::size_t name, std::size_t positions) {
  const Lock lock = locked();
  require_open();
  Slot& slot = running(name, "commit");
  if (positions > slot.length)
    throw std::invalid_argument("cannot commit " + std::to_string(positions) + " positions: the sequence has " +
                                std::to_string(slot.length));
  slot.cached = positions;
  return {slot.generation, slot.cached, false};
}

std::vector<std::size_t> Arena::side_by_side(Slots names) const {
  const Lock lock = locked();
  std::vector<std::size_t> order(names.size());
  std::iota(order.begin(), order.end(), 0);
  const auto begins_shared = [&](std::size_t name) {
    const std::vector<Mapping>& mappings = running(name, "look at").runs.front().mappings;
    return !mappings.empty() && mappings.front().shared();
  };
  if (std::none_of(names.begin(), names.end(), begins_shared)) return order;
  std::unordered_map<const Extent*, std::size_t> numbers;  // of extents, in the order in which they are met
  std::vector<std::vector<std::size_t>> keys;
  for (const std::size_t name : names) {
    std::vector<std::size_t>& key = keys.emplace_back();
    for (const Mapping& mapping : running(name, "look at").runs.front().mappings) {
      key.push_back(numbers.try_emplace(mapping.extent().get(), numbers.size()).first->second);
      if (!mapping.shared()) break;
    }
  }
  std::sort(order.begin(), order.end(), [&](std::size_t one, std::size_t other) {
    return std::tie(keys[one], one) < std::tie(keys[other], other);
  });
  return order;
}

Arena::CachedPrefix Arena::cached_prefix(std::size_t index) const {
  const Lock lock = locked();
  const Slot& slot = slots_.at(index);
  return {slot.generation, slot.cached, slot.state == State::parked};
}

void Arena::forget(std::size_t index, std::uint64_t generation) {
  Lock lock = locked();
  require_open();
  if (index >= options_.slots) return;
  const SlotLock slot_lock(*this, Slots(&index, 1), lock);
  Slot& slot = slots_[index];
  if (slot.generation != generation) return;
  slot.cached = 0;
  if (slot.state == State::parked) drop_unwritable(slot, index);
  refresh(slot);
}

bool Arena::resume(std::size_t index, std::uint64_t generation, std::size_t positions, Stream stream) {
  Lock lock = locked();
  require_open();
  if (index >= options_.slots) return false;
  const SlotLock slot_lock(*this, Slots(&index, 1), lock);
  require_open();
  Slot& slot = slots_[index];
  if (slot.state != State::parked || !has_rows(slot, generation, positions)) return false;
  wait_for_others(slot.fences, stream, lock);
  ++adopted_;
  begin(slot, positions, stream);
  slot.cached = std::min(slot.cached, positions);
  refresh(slot);
  return true;
}

void Arena::expect(std::size_t name, std::size_t positions, std::size_t prompt) {
  const Lock lock = locked();
  require_open();
  Slot& slot = running(name, "expect of");
  slot.expected = positions;
  slot.prompt = prompt;
}

bool Arena::fork(std::size_t source, std::optional<std::uint64_t> generation, std::size_t positions, Slots targets,
                 Share share, Stream stream) {
  bool done = false;
  on_mapper([&] { done = fork_with_driver(source, generation, positions, targets, share, stream); });
  return done;
}

bool Arena::fork_with_driver(std::size_t name, std::optional<std::uint64_t> generation, std::size_t positions,
                             Slots names, Share share, Stream stream) {
  Lock lock = locked();
  require_open();
  if (!generation) running(name, "fork");
  const std::size_t source = slot_of(name);
  if (source >= options_.slots) return false;
  const std::vector<std::size_t> targets = running_slots(names, "fork into");
  std::vector<std::size_t> all(targets);
  all.push_back(source);
  const SlotLock slot_lock(*this, all, lock);
  require_open();
  Slot& from = slots_[source];
  if (!generation) {
    running(name, "fork");
    if (positions > from.length)
      throw std::invalid_argument("cannot fork at " + std::to_string(positions) + " positions: the sequence has " +
                                  std::to_string(from.length));
    if (!has_rows(from, generation, positions))
      throw std::invalid_argument("cannot fork at " + std::to_string(positions) +
                                  " positions: a window has moved on and the rows before it are given back");
  } else if (!has_rows(from, generation, positions)) {
    return false;
  }
  for (const std::size_t target : names)
    if (running(target, "fork into").length != 0)
      throw std::invalid_argument("cannot fork into slot " + std::to_string(slot_of(target)) + ": it is not empty");

  // Work that writes the rows of a running sequence may still be queued in its streams, so new fences stand for it.
  const bool parked = from.state == State::parked;
  if (!parked) cover(from, stream, fences_of(Slots(&source, 1), stream, lock));
  // `stream` itself keeps its order and is not waited for, except where the rows become read-only: then the writes that
  // are queued in it must be done, too.
  wait_for_others(from.fences, options_.protect_shared ? Stream{kNever} : stream, lock);
  if (!parked && !contains(from.streams, stream)) from.streams.push_back(stream);
  std::vector<std::size_t> aliased;
  std::size_t mappings = driver_->mappings();
  const std::size_t limit = options_.alias_limit.value_or(driver_->mapping_limit() / 4 * 3);
  for (const std::size_t target : targets) {
    std::size_t count = 0;
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane)
      count += sharable(from, plane, positions) - kept(from, slots_[target], plane, positions).shared;
    const bool cheaper = share == Share::alias || better_aliased(from, slots_[target], positions);
    if (share == Share::copy || !cheaper || (count != 0 && mappings + count > limit)) continue;
    mappings += count;
    aliased.push_back(target);
  }
  // Returns fences that pass once the queued copies have read the source and written the targets. Where none can be
  // recorded, waits for the whole device instead.
  const auto fences_after = [&]() -> Fences {
    try {
      return fences_of(targets, stream, lock);
    } catch (const std::exception&) {
      driver_->synchronize();
      if (!lock.owns_lock()) lock.lock();
      return {};
    }
  };
  try {
    split_for_forks(source, positions, aliased.size(), all, lock);
    share_runs(source, positions, targets, aliased, lock);
    try {
      map_up_to(targets, PerSlot(positions), Urgency::demand, lock);
    } catch (const BudgetExceeded&) {
      // What the targets have kept for later growth may be what others of them, or of their planes, lack.
      if (!lock.owns_lock()) lock.lock();
      give_up_past(targets, positions);
      map_up_to(targets, PerSlot(positions), Urgency::demand, lock);
    }
    copy_rows(source, positions, targets, stream, lock);
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    const Fences after = fences_after();
    if (parked) cover(from, stream, after);
    for (const std::size_t target : targets) {
      Slot& slot = slots_[target];
      cover(slot, stream, after);
      slot.length = 0;
      for (std::size_t plane = 0; plane < geometry_.size(); ++plane)
        if (slot.runs[plane].head != 0 || contains(aliased, target)) defer_unmap_of_run(slot, target, plane);
      drop_unwritable(slot, target);
      refresh(slot);
    }
    post_maintenance({});
    throw;
  }
  if (parked) cover(from, stream, fences_after());
  if (parked) from.parked_at = ++clock_;  // a slot that was of use is stripped later
  for (const std::size_t target : targets) {
    advance(target, positions, stream);
    refresh(slots_[target]);
  }
  return true;
}

// Whether a slot has its first `positions` rows. They must be within the length of a running sequence and, with a
// generation, within the slot's cached prefix of that generation. They and the tail rows behind them must be mapped; in
// a plane with a window, only those that the window still sees.
bool Arena::has_rows(const Slot& slot, std::optional<std::uint64_t> generation, std::size_t positions) const noexcept {
  if (generation && (slot.generation != *generation || slot.cached < positions)) return false;
  if (slot.state == State::bare || (slot.state == State::running && slot.length < positions)) return false;
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    const auto& [row_bytes, window, offset, stride] = geometry_[plane];
    const std::size_t first = window == 0 || positions < window ? 0 : positions - window + 1;
    if (slot.runs[plane].head > first * row_bytes || slot.runs[plane].tail < end_of(geometry_[plane], positions))
      return false;
  }
  return true;
}

// Returns how many mappings of a run lie wholly within its first `positions` rows: those that a fork can share.
std::size_t Arena::sharable(const Slot& slot, std::size_t plane, std::size_t positions) const noexcept {
  const Run& run = slot.runs[plane];
  std::size_t end = run.head;
  std::size_t count = 0;
  while (count < run.mappings.size() && end + run.mappings[count].bytes() <= positions * geometry_[plane].row_bytes)
    end += run.mappings[count++].bytes();
  return count;
}

// Returns how many mappings, from the first on, two runs have of the same extents.
std::size_t Arena::common(const Run& one, const Run& other) noexcept {
  std::size_t count = 0;
  while (one.head == other.head && count < std::min(one.mappings.size(), other.mappings.size()) &&
         one.mappings[count].extent() == other.mappings[count].extent())
    ++count;
  return count;
}

// Whether the whole cached prefix of a slot lies in extents that it shares with `source`, so that no cached rows are
// lost when a fork of `source` takes the slot. Planes with a window are ignored; where there are no others, this is
// false.
bool Arena::is_ready(const Slot& slot, const Slot& source) const noexcept {
  if (&slot == &source || slot.cached == 0) return false;
  bool any = false;
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    if (geometry_[plane].window != 0) continue;
    const std::size_t count = common(slot.runs[plane], source.runs[plane]);
    if (slot.cached * geometry_[plane].row_bytes > bytes_of(slot.runs[plane], 0, count)) return false;
    any = true;
  }
  return any;
}

// Returns the number of the first mapping of a run, from number `first` on, that must not be written, or how many there
// are.
std::size_t Arena::writable_until(const Run& run, std::size_t first) noexcept {
  while (first < run.mappings.size() && run.mappings[first].writable()) ++first;
  return first;
}

// Returns the bytes of the mappings of a run from number `first` up to number `end`.
std::size_t Arena::bytes_of(const Run& run, std::size_t first, std::size_t end) noexcept {
  std::size_t bytes = 0;
  for (; first < end; ++first) bytes += run.mappings[first].bytes();
  return bytes;
}

// Returns which mappings of the target would stay if the source were forked at `positions`.
Arena::Kept Arena::kept(const Slot& source, const Slot& target, std::size_t plane,
                        std::size_t positions) const noexcept {
  const Run& run = target.runs[plane];
  if (run.head != source.runs[plane].head) return {0, run.mappings.size(), run.mappings.size()};
  const std::size_t count = sharable(source, plane, positions);
  const std::size_t end = source.runs[plane].head + bytes_of(source.runs[plane], 0, count);
  const std::size_t shared = std::min(common(source.runs[plane], run), count);
  std::size_t behind = shared;
  std::size_t at = run.head + bytes_of(run, 0, shared);
  while (behind < run.mappings.size() && at < end) at += run.mappings[behind++].bytes();
  if (at != end) behind = run.mappings.size();
  return {shared, behind, writable_until(run, behind)};
}

// Whether sharing extents with a target costs no more than copying their rows to it, or the copies would need more
// memory than is available.
bool Arena::better_aliased(const Slot& source, const Slot& target, std::size_t positions) const {
  double aliasing = 0;
  double copying = 0;
  std::size_t more = 0;
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    const Run& run = target.runs[plane];
    const std::size_t count = sharable(source, plane, positions);
    const std::size_t bytes = bytes_of(source.runs[plane], 0, count);
    const std::size_t writable = run.head == source.runs[plane].head ? writable_until(run, 0) : 0;
    const std::size_t lacks = bytes - std::min(bytes, bytes_of(run, 0, writable));
    const auto [shared, begin, end] = kept(source, target, plane, positions);
    aliasing += kAliasCost * static_cast<double>(count - shared) +
                kUnmapCost * static_cast<double>(run.mappings.size() - shared - (end - begin));
    copying += kCopyCost * static_cast<double>(bytes) +
               kUnmapCost * static_cast<double>(run.mappings.size() - writable) +
               kMemoryCost * static_cast<double>(lacks / driver_->granularity()) + (lacks != 0 ? kExtentCost : 0);
    more += lacks;
  }
  return aliasing <= copying || more > pool_.usage().available();
}

// Splits the extent in which the first `positions` rows end, at the last granule boundary before their end, where the
// forks would otherwise copy kSplitGranules or more of it all together: they share the first of its parts instead.
// Planes with a window stay as they are. Where there is no memory for the new extents, nothing is split.
void Arena::split_for_forks(std::size_t source, std::size_t positions, std::size_t forks, Slots mine, Lock& lock) {
  const std::size_t granule = driver_->granularity();
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    const Run& run = slots_[source].runs[plane];
    const std::size_t count = sharable(slots_[source], plane, positions);
    const std::size_t cut = positions * geometry_[plane].row_bytes / granule * granule;
    const std::size_t start = run.head + bytes_of(run, 0, count);
    if (geometry_[plane].window != 0 || cut <= start || (cut - start) * forks < kSplitGranules * granule) continue;
    const std::size_t bytes = run.mappings[count].bytes();
    std::vector<std::size_t> sizes{cut - start};
    for (std::size_t left = start + bytes - cut; left != 0; left -= sizes.back())
      sizes.push_back(pool_.bytes_of(pool_.class_of(left)));
    try {
      replace(source, plane, count, 1, sizes, bytes, mine, lock);
    } catch (const BudgetExceeded&) {  // the forks copy instead
    } catch (const OutOfDeviceMemory&) {
    }
  }
}

// Makes the runs of the targets begin where those of the source do, and maps the source's sharable extents at the
// targets in `aliased`, before what may stay of the memory behind them. Mappings of a target that are in the way are
// unmapped. Requires: the caller has locked all these slots.
void Arena::share_runs(std::size_t source, std::size_t positions, Slots targets, Slots aliased, Lock& lock) {
  std::vector<DeferredUnmap> behind;  // what stays behind extents that are not mapped yet
  try {
    make_way(source, positions, targets, aliased, behind);
    clear_the_way(targets, Urgency::demand, lock);
    for (const std::size_t target : targets)
      for (std::size_t plane = 0; plane < geometry_.size(); ++plane)
        if (Run& run = slots_[target].runs[plane]; run.mappings.empty())
          run.head = run.tail = slots_[source].runs[plane].head;
    for (std::size_t plane = 0; plane < geometry_.size() && !aliased.empty(); ++plane)
      alias(source, plane, positions, aliased, behind, lock);
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    defer_again(behind);
    throw;
  }
  for (DeferredUnmap& loose : behind) {
    Run& run = slots_[loose.slot].runs[loose.plane];
    run.tail += loose.mapping.bytes();
    run.mappings.push_back(std::move(loose.mapping));
  }
}

// Takes out of the runs of the targets what is not of use to forks of the source, as deferred unmaps. What stays behind
// extents that are to be mapped is moved to `behind`, since a run has no gaps.
void Arena::make_way(std::size_t source, std::size_t positions, Slots targets, Slots aliased,
                     std::vector<DeferredUnmap>& behind) {
  const Slot& from = slots_[source];
  for (const std::size_t target : targets) {
    Slot& slot = slots_[target];
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      Run& run = slot.runs[plane];
      if (run.head != from.runs[plane].head) {
        defer_unmap_of_run(slot, target, plane);
        continue;
      }
      if (!contains(aliased, target)) {
        defer_unmap_from(slot, target, plane, writable_until(run, 0));
        continue;
      }
      const auto [shared, begin, end] = kept(from, slot, plane, positions);
      // Room for everything that is moved is made before anything is taken out of the run.
      std::vector<Mapping> stays;
      stays.reserve(end - begin);
      std::vector<Fences> fences(end - begin, slot.fences);
      make_room(behind, end - begin);
      defer_unmap_from(slot, target, plane, end);
      if (begin == shared) continue;
      take_from(run, begin, stays);
      defer_unmap_from(slot, target, plane, shared);
      for (std::size_t i = 0; i < stays.size(); ++i)
        behind.push_back({target, plane, std::move(stays[i]), std::move(fences[i])});
    }
  }
}

// Maps the source's sharable extents in one plane at the targets that lack them, and leaves room in their runs for what
// comes behind these.
void Arena::alias(std::size_t source, std::size_t plane, std::size_t positions, Slots targets,
                  const std::vector<DeferredUnmap>& behind, Lock& lock) {
  const Slot& from = slots_[source];
  const std::size_t count = sharable(from, plane, positions);
  std::vector<std::shared_ptr<Extent>> extents;
  for (std::size_t index = 0; index < count; ++index) extents.push_back(from.runs[plane].mappings[index].extent());
  for (const std::size_t target : targets) {
    Run& run = slots_[target].runs[plane];
    const std::size_t had = std::min(run.mappings.size(), count);
    std::vector<Mapping> mappings;
    mappings.reserve(count - had);
    const auto of_run = [&](const DeferredUnmap& one) { return one.slot == target && one.plane == plane; };
    const auto more = static_cast<std::size_t>(std::count_if(behind.begin(), behind.end(), of_run));
    make_room(run.mappings, count - had + more);
    make_room(slots_[target].deferred, count - had);
    std::size_t tail = run.tail;
    lock.unlock();
    try {
      for (std::size_t index = had; index < count; ++index) {
        const auto& extent = extents[index];
        mappings.emplace_back(driver_, extent, address_of(target, plane) + tail);
        mappings.back().allow(options_.protect_shared || extent->exported.load() ? Access::read : Access::write);
        tail += extent->bytes();
      }
    } catch (...) {
      lock.lock();
      for (Mapping& mapping : mappings) slots_[target].deferred.push_back({target, plane, std::move(mapping), {}});
      throw;
    }
    lock.lock();
    std::move(mappings.begin(), mappings.end(), std::back_inserter(run.mappings));
    run.tail = tail;
    slots_[target].length = positions;  // so that copy_shared() keeps the shared extents
    aliases_ += count - had;
  }
  if (options_.protect_shared) {
    lock.unlock();
    // Only the thread that has locked the slot changes its run; the access, which others may read, is atomic.
    for (std::size_t index = 0; index < count; ++index) slots_[source].runs[plane].mappings[index].allow(Access::read);
    lock.lock();
  }
}

// Defers the unmapping of what slots have behind their first `positions` rows and the tail rows behind these.
void Arena::give_up_past(Slots slots, std::size_t positions) noexcept {
  for (const std::size_t index : slots)
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      const Run& run = slots_[index].runs[plane];
      const std::size_t end = end_of(geometry_[plane], positions);
      std::size_t kept = 0;
      for (std::size_t at = run.head; kept < run.mappings.size() && at < end;) at += run.mappings[kept++].bytes();
      defer_unmap_from(slots_[index], index, plane, kept);
    }
}

// Copies to each target those of the source's first rows that the target does not share with it, in `stream`. Requires:
// the caller has locked all these slots.
void Arena::copy_rows(std::size_t source, std::size_t positions, Slots targets, Stream stream, Lock& lock) {
  struct Part {
    Address to;
    Address from;
    std::size_t bytes;
  };
  std::vector<Part> parts;
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    const Run& run = slots_[source].runs[plane];
    const std::size_t end = positions * geometry_[plane].row_bytes;
    for (const std::size_t target : targets) {
      const std::size_t at = run.head + bytes_of(run, 0, common(run, slots_[target].runs[plane]));
      if (at < end) parts.push_back({address_of(target, plane) + at, address_of(source, plane) + at, end - at});
    }
  }
  lock.unlock();
  for (const Part& part : parts) driver_->copy(part.to, part.from, part.bytes, stream);
  lock.lock();
  for (const Part& part : parts) copied_ += part.bytes;
}

// Makes the memory behind the rows of locked slots writable (copy on write). Where an extent that reaches behind the
// rows and holds the last rows or tail rows is shared, all such extents are replaced by copies. Behind these, the run
// is cut off before the first shared extent. Returns false when any of this is necessary but only a demand would do it.
bool Arena::copy_shared(Slots slots, Urgency urgency, Lock& lock) {
  for (const std::size_t index : slots) {
    Slot& slot = slots_[index];
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      Run& run = slot.runs[plane];
      const std::size_t rows_end = slot.length * geometry_[plane].row_bytes;
      const std::size_t needed_end = end_of(geometry_[plane], slot.length);  // where the tail rows end
      std::size_t start = run.head;
      std::size_t first = 0;  // the first mapping that reaches behind the rows
      while (first < run.mappings.size() && start + run.mappings[first].bytes() <= rows_end)
        start += run.mappings[first++].bytes();
      std::size_t end = start;
      std::size_t past = first;  // the first mapping behind the tail rows
      while (past < run.mappings.size() && end < needed_end) end += run.mappings[past++].bytes();
      const auto at = [&](std::size_t mapping) { return run.mappings.begin() + static_cast<std::ptrdiff_t>(mapping); };
      const auto writable = [](const Mapping& mapping) { return mapping.writable(); };
      const auto is_shared = [](const Mapping& mapping) { return mapping.shared(); };
      // This comes before the mutex is released for the first time, so that an unshared extent stays unshared.
      std::for_each(at(first), run.mappings.end(), [](const Mapping& mapping) { mapping.will_be_written(); });
      if (std::all_of(at(first), run.mappings.end(), writable)) continue;
      if (urgency != Urgency::demand) return false;
      const bool lacks = std::any_of(at(first), at(past), is_shared);
      const auto beyond = std::find_if(at(past), run.mappings.end(), is_shared);
      if (lacks || beyond != run.mappings.end())
        cover(slot, slot.streams.front(), fences_of(Slots(&index, 1), slot.streams.front(), lock));
      defer_unmap_from(slot, index, plane, static_cast<std::size_t>(beyond - run.mappings.begin()));
      if (lacks) {
        std::size_t left = (past == run.mappings.size() ? std::min(end, needed_end) : end) - start;
        std::vector<std::size_t> sizes;
        for (; left != 0; left -= sizes.back()) sizes.push_back(pool_.bytes_of(pool_.class_of(left)));
        replace(index, plane, first, past - first, sizes, std::max(rows_end, start) - start, slots, lock);
      }
      // With protect_shared, an extent that no other slot maps any more is still mapped read-only here.
      lock.unlock();
      try {
        for (std::size_t behind = first; behind < run.mappings.size(); ++behind)
          if (!run.mappings[behind].writable()) run.mappings[behind].allow();
      } catch (...) {
        lock.lock();
        refresh(slot);
        throw;
      }
      lock.lock();
    }
    refresh(slot);
  }
  return true;
}

void Arena::copy_on_write(Slots slots, std::size_t positions, Stream stream) {
  on_mapper([&] { own_with_driver(slots, positions, stream); });
}

void Arena::own_with_driver(Slots names, std::size_t positions, Stream stream) {
  Lock lock = locked();
  require_open();
  const std::vector<std::size_t> slots = running_slots(names, "copy_on_write");
  const SlotLock slot_lock(*this, slots, lock);
  require_open();
  running_slots(names, "copy_on_write");
  const Fences fresh = fences_of(slots, stream, lock);
  for (const std::size_t index : slots) {
    Slot& slot = slots_[index];
    cover(slot, stream, fresh);
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      const Run& run = slot.runs[plane];
      std::size_t end = run.head;
      for (std::size_t i = 0; i < run.mappings.size();) {
        const std::size_t bytes = run.mappings[i].bytes();
        end += bytes;
        const bool kept = end <= positions * geometry_[plane].row_bytes;
        if (!kept) run.mappings[i].will_be_written();
        if (kept || run.mappings[i].writable()) {
          ++i;
          continue;
        }
        if (!run.mappings[i].shared()) {  // read-only since it was shared, by protect_shared
          lock.unlock();
          slot.runs[plane].mappings[i].allow();
          lock.lock();
          ++i;
          continue;
        }
        std::vector<std::size_t> sizes;
        for (std::size_t left = bytes; left != 0; left -= sizes.back())
          sizes.push_back(pool_.bytes_of(pool_.class_of(left)));
        replace(index, plane, i, 1, sizes, bytes, slots, lock);
        i += sizes.size();
      }
    }
    refresh(slot);
  }
}

void Arena::compact(std::size_t slot, std::size_t positions) {
  on_mapper([&] { compact_with_driver(slot, std::nullopt, positions, 1); });
}

void Arena::compact_later(std::size_t slot, std::uint64_t generation, std::size_t positions) {
  const Lock lock = locked();
  post_compacting(slot, generation, positions, {});
}

// Compacts a slot on the mapper thread after `delay`. While kernels use the slot it is tried again, with delays that
// double from kPatience and end with kLongPatience. Requires: the caller has the mutex.
void Arena::post_compacting(std::size_t slot, std::uint64_t generation, std::size_t positions, Clock::duration delay) {
  if (!mapper_ || closed_ || delay > kLongPatience) return;
  const auto work = [this, slot, generation, positions, delay] {
    bool done = true;
    try {
      done = compact_with_driver(slot, generation, positions, kFewExtents);
    } catch (const std::exception&) {
      const Lock again(mutex_);
      ++background_failures_;
    }
    const Lock again(mutex_);
    if (!done) post_compacting(slot, generation, positions, std::max<Clock::duration>(2 * delay, kPatience));
  };
  mapper_->post(Urgency::housekeeping, this, work, delay);
}

// Compacts the first `positions` rows of a running slot or, with a generation, of a parked slot that has them in its
// cached prefix; in a parked slot, planes for which too little memory is available stay as they are. Where at most
// `most` extents hold the whole granules of the rows, only the last of them is split, at the last granule boundary;
// otherwise one extent of just their size replaces them. Planes with a window stay as they are.
//
// Returns false while the fences of a parked slot have not passed; nothing has changed then.
bool Arena::compact_with_driver(std::size_t name, std::optional<std::uint64_t> generation, std::size_t positions,
                                std::size_t most) {
  Lock lock = locked();
  require_open();
  if (!generation) running(name, "compact");
  const std::size_t index = slot_of(name);
  if (index >= options_.slots) return true;
  const SlotLock slot_lock(*this, Slots(&index, 1), lock);
  require_open();
  Slot& slot = slots_[index];
  if (!generation && positions > running(name, "compact").length)
    throw std::invalid_argument("cannot compact " + std::to_string(positions) + " positions: the sequence has " +
                                std::to_string(slot.length));
  if (generation && (slot.state != State::parked || !has_rows(slot, generation, positions))) return true;
  if (!generation) cover(slot, slot.streams.front(), fences_of(Slots(&index, 1), slot.streams.front(), lock));
  if (generation) {
    lock.unlock();
    const bool done = passed(slot.fences);
    lock.lock();
    if (!done) return false;
  }
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    const auto& [row_bytes, window, offset, stride] = geometry_[plane];
    const std::size_t cut = positions * row_bytes / driver_->granularity() * driver_->granularity();
    if (window != 0 || cut == 0) continue;
    const std::vector<Mapping>& mappings = slot.runs[plane].mappings;
    std::size_t count = 0;
    std::size_t end = 0;
    while (end < cut) end += mappings[count++].bytes();
    if (end == cut && count <= most) continue;
    const std::size_t first = count <= most ? count - 1 : 0;
    const std::size_t start = end - bytes_of(slot.runs[plane], first, count);
    if (generation && end - start > pool_.usage().available()) continue;
    std::vector<std::size_t> sizes{cut - start};
    for (std::size_t left = end - cut; left != 0; left -= sizes.back())
      sizes.push_back(pool_.bytes_of(pool_.class_of(left)));
    replace(index, plane, first, count - first, sizes, end - start, Slots(&index, 1), lock);
  }
  refresh(slot);
  return true;
}

// Replaces `count` mappings of a locked slot's run, from number `first` on, by new extents of the given sizes, once the
// slot's fences have passed. The first `bytes` bytes are copied to the new extents, which are filled at the addresses
// of the scratch slot. When this throws, everything is as it was, unless the driver has refused kAttempts times to map
// the old extents again: then the sequence and its cached prefix end before the rows in them.
void Arena::replace(std::size_t index, std::size_t plane, std::size_t first, std::size_t count,
                    const std::vector<std::size_t>& sizes, std::size_t bytes, Slots mine, Lock& lock) {
  Run& run = slots_[index].runs[plane];
  const std::size_t start = run.head + bytes_of(run, 0, first);
  const std::size_t scratch = options_.slots;
  const Fences fences = slots_[index].fences;
  std::vector<Step> steps;
  for (std::size_t at = start; const std::size_t size : sizes) {
    steps.push_back({scratch, plane, address_of(scratch, plane) + at, size});
    at += size;
  }
  const SlotLock slot_lock(*this, Slots(&scratch, 1), lock);
  clear_the_way(Slots(&scratch, 1), Urgency::demand, lock);
  std::vector<DeferredUnmap> filled = build_on_demand(steps, mine, lock);
  const auto clear_scratch = [&] {
    try {
      while (!filled.empty()) unmap_last(filled);
    } catch (const std::exception&) {  // the next call of replace() tries again
    }
    lock.lock();
    defer_again(filled);
  };
  try {
    for (const auto& fence : fences) fence->wait();
    if (bytes != 0)
      driver_->copy(address_of(scratch, plane) + start, address_of(index, plane) + start, bytes,
                    driver_->own_stream(OwnStream::zeroing));
    driver_->zeroed();
  } catch (...) {
    clear_scratch();
    throw;
  }

  // Room for everything that is moved is made before anything is taken out of the run, since an allocation may fail.
  std::vector<Mapping> behind;
  std::vector<Mapping> old;
  std::vector<Mapping> fresh;
  std::vector<std::pair<std::shared_ptr<Extent>, Access>> before;
  std::vector<Fences> of_deferred;
  lock.lock();
  try {
    behind.reserve(run.mappings.size());
    old.reserve(count);
    fresh.reserve(sizes.size());
    for (std::size_t i = first; i < first + count; ++i)
      before.emplace_back(run.mappings[i].extent(), run.mappings[i].access());
    make_room(run.mappings, sizes.size());
    const std::size_t most = run.mappings.size() + sizes.size();
    of_deferred.assign(most, fences);
    make_room(slots_[index].deferred, most);
  } catch (...) {
    lock.unlock();
    clear_scratch();
    throw;
  }
  take_from(run, first + count, behind);
  take_from(run, first, old);
  lock.unlock();
  // The old extents may have to be mapped here again. Until that is decided they count as mapped here, so that no other
  // slot that maps one of them takes it for unshared.
  for (const auto& [extent, access] : before) ++extent->mappings;
  std::exception_ptr failure;
  const auto end_of_run = [&](const std::vector<Mapping>& mappings) {
    Address at = address_of(index, plane) + start;
    for (const Mapping& mapping : mappings) at += mapping.bytes();
    return at;
  };
  std::size_t whole = old.size();  // how many of the old mappings, from the first on, are usable
  try {
    for (; !old.empty(); --whole) {
      old.back().unmap();
      old.pop_back();
    }
    for (const DeferredUnmap& loose : filled) {
      fresh.emplace_back(driver_, loose.mapping.extent(), end_of_run(fresh));
      fresh.back().allow();
    }
  } catch (...) {
    failure = std::current_exception();
    // The old extents are mapped again. Where the driver refuses that for good, the rows in them are lost.
    for (int attempt = 1; attempt <= kAttempts && whole < before.size(); ++attempt) {
      try {
        for (; !fresh.empty(); fresh.pop_back()) fresh.back().unmap();
        for (; whole < before.size(); ++whole) {
          const auto& [extent, access] = before[whole];
          if (old.size() == whole) old.emplace_back(driver_, extent, end_of_run(old));
          old.back().allow(access);
        }
      } catch (const std::exception& error) {
        if (attempt == kAttempts) driver_->report(error);
      }
    }
  }
  for (const auto& [extent, access] : before) --extent->mappings;
  before.clear();
  clear_scratch();
  Slot& slot = slots_[index];
  const auto put_back = [&](std::vector<Mapping>& mappings, std::size_t first_lost) {
    for (std::size_t i = 0; i < mappings.size(); ++i) {
      if (i >= first_lost) {
        slot.deferred.push_back({index, plane, std::move(mappings[i]), std::move(of_deferred.back())});
        of_deferred.pop_back();
        continue;
      }
      run.tail += mappings[i].bytes();
      run.mappings.push_back(std::move(mappings[i]));
    }
  };
  put_back(old, whole);
  put_back(fresh, failure ? 0 : kNever);
  put_back(behind, failure && whole < count ? 0 : kNever);
  if (failure) {
    const std::size_t left = usable_rows(plane, run.tail);
    slot.length = std::min(slot.length, left);
    slot.cached = std::min(slot.cached, left);
  }
  refresh(slot);
  if (failure) std::rethrow_exception(failure);
  copied_ += bytes;
}

}  // namespace vattn
