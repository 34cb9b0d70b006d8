#include "arena.hpp"

#include <algorithm>
#include <limits>

namespace vattn {
namespace {

constexpr std::size_t kNever = std::numeric_limits<std::size_t>::max();

// For products that may not fit 64 bits.
__extension__ using Wide = unsigned __int128;

std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

// Remembers one fence for each stream: a later fence of a stream implies the earlier ones.
void note(Fences& fences, std::shared_ptr<const Fence> fence) {
  std::erase_if(fences, [&](const auto& old) { return old->stream() == fence->stream(); });
  fences.push_back(std::move(fence));
}

std::size_t checked_reservation(const ArenaOptions& options, const std::vector<Plane>& planes,
                                std::size_t granularity) {
  if (planes.empty()) throw std::invalid_argument("planes must not be empty");
  if (options.slots == 0) throw std::invalid_argument("slots must be at least 1");
  if (options.max_len == 0) throw std::invalid_argument("max_len must be at least 1");
  if (options.growth_divisor == 0) throw std::invalid_argument("growth_divisor must be at least 1");
  if (options.budget < granularity)
    throw std::invalid_argument("budget of " + std::to_string(options.budget) + " bytes is below one granule of " +
                                std::to_string(granularity) + " bytes: nothing could ever be mapped");
  constexpr std::size_t kAddresses = std::size_t{1} << 47;
  std::size_t total = 0;
  for (const Plane& plane : planes) {
    if (plane.row_bytes == 0) throw std::invalid_argument("a plane's row_bytes must be at least 1");
    const Wide rows = Wide{options.max_len} + options.tail_rows;
    const Wide slot = rows * plane.row_bytes + granularity;
    if (slot > kAddresses || slot * options.slots + total > kAddresses)
      throw std::invalid_argument("slots x max_len needs more than 128 TiB of addresses: lower slots or max_len");
    total += round_up(static_cast<std::size_t>(rows) * plane.row_bytes, granularity) * options.slots;
  }
  return total;
}

}  // namespace

// The right to call the driver for some slots with the mutex free. Taken when none of them is held by others.
class Arena::Hold {
 public:
  Hold(Arena& arena, std::span<const std::size_t> slots, Lock& lock)
      : arena_(arena), slots_(slots.begin(), slots.end()), lock_(lock) {
    std::sort(slots_.begin(), slots_.end());
    if (std::adjacent_find(slots_.begin(), slots_.end()) != slots_.end())
      throw std::invalid_argument("a slot is named twice");
    arena_.released_.wait(lock_, [&] {
      return std::none_of(slots_.begin(), slots_.end(), [&](std::size_t slot) { return arena_.slots_.at(slot).held; });
    });
    for (const std::size_t slot : slots_) arena_.slots_[slot].held = true;
  }
  ~Hold() {
    if (!lock_.owns_lock()) lock_.lock();
    for (const std::size_t slot : slots_) arena_.slots_[slot].held = false;
    arena_.released_.notify_all();
  }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;

 private:
  Arena& arena_;
  std::vector<std::size_t> slots_;
  Lock& lock_;
};

Arena::Arena(std::shared_ptr<Driver> driver, std::vector<Plane> planes, ArenaOptions options)
    : driver_(std::move(driver)),
      options_(options),
      reservation_(driver_, checked_reservation(options, planes, driver_->granularity())),
      pool_(driver_, options.budget),
      slots_(options.slots) {
  std::size_t offset = 0;
  for (const Plane& plane : planes) {
    const std::size_t stride =
        round_up((options_.max_len + options_.tail_rows) * plane.row_bytes, driver_->granularity());
    geometry_.push_back({plane.row_bytes, plane.window, offset, stride});
    offset += stride * options_.slots;
  }
  for (Slot& slot : slots_) slot.runs.resize(geometry_.size());
}

Arena::~Arena() {
  if (driver_->in_forked_child()) return;
  try {
    close();
  } catch (const std::exception& error) {
    driver_->report(error);
  }
}

std::size_t Arena::acquire(std::optional<std::size_t> wanted, std::size_t expected, Stream stream) {
  if (wanted && *wanted >= slots_.size())
    throw std::invalid_argument("slot " + std::to_string(*wanted) + " does not exist: there are " +
                                std::to_string(slots_.size()));
  Lock lock = locked();
  require_open();
  std::size_t chosen = kNever;
  // What is held by others may be free in a moment: looked at again when they are done.
  const auto choose = [&] {
    bool others = false;
    std::size_t best = 0;
    for (std::size_t index = 0; index < slots_.size(); ++index) {
      const Slot& slot = slots_[index];
      if (slot.state == State::running || (wanted && index != *wanted)) continue;
      others = others || slot.held;
      if (slot.held) continue;
      // The smallest parked slot that holds `expected`, else the largest parked one, else a bare one.
      const bool fits = slot.capacity >= expected;
      const std::size_t rank = slot.state == State::bare ? 1 : fits ? kNever - slot.capacity : 2 + slot.capacity;
      if (rank > best) {
        best = rank;
        chosen = index;
      }
    }
    return chosen != kNever || !others;
  };
  released_.wait(lock, choose);
  require_open();
  if (chosen == kNever && wanted)
    throw std::invalid_argument("slot " + std::to_string(*wanted) + " is in use by another sequence");
  if (chosen == kNever)
    throw std::invalid_argument("all " + std::to_string(slots_.size()) +
                                " slots are in use: close a sequence, or make the cache with more slots");
  Slot& slot = slots_[chosen];
  const Hold hold(*this, std::span(&chosen, 1), lock);
  const Fences fences = slot.fences;
  lock.unlock();
  for (const auto& fence : fences)
    if (fence->stream() != stream) fence->wait();
  lock.lock();
  adopted_ += slot.state == State::parked ? 1 : 0;
  slot.state = State::running;
  slot.length = 0;
  return chosen;
}

void Arena::grow(std::span<const std::size_t> slots, std::size_t positions, std::size_t keep, Stream stream) {
  if (positions > options_.max_len)
    throw SequenceTooLong(std::to_string(positions) + " positions are more than max_len, " +
                          std::to_string(options_.max_len) + ": make the cache with a larger max_len, or truncate");
  Lock lock = locked();
  require_open();
  for (const std::size_t slot : slots) running(slot, "grow");
  const Hold hold(*this, slots, lock);
  for (const std::size_t slot : slots) running(slot, "grow");  // another thread may have closed it meanwhile
  if (grow_in_place(slots, positions, keep)) return;

  discard_before_windows(slots, keep, stream, lock);
  bool exact = false;
  for (;;) {
    clear_the_way(slots, lock);
    auto steps = plan(slots, positions, exact);
    if (bytes_of(steps) > pool_.usage().available()) {
      steps = plan(slots, positions, true);
      const std::size_t needed = bytes_of(steps);
      const std::size_t available = pool_.usage().available();
      if (needed > available) {
        if (reclaim(needed - available, slots, lock)) continue;
        throw OutOfPages(needed, pool_.usage().available());
      }
    }
    lock.unlock();
    std::vector<Loose> built;
    try {
      built = build(steps);
    } catch (const OutOfPages&) {
      lock.lock();  // another caller was quicker
      continue;
    } catch (const OutOfDeviceMemory&) {
      // Less than was planned may do, and others may have what they do not need.
      lock.lock();
      const bool reclaimed = reclaim(bytes_of(steps), slots, lock);
      if (!reclaimed && exact) throw;
      exact = true;
      continue;
    }
    lock.lock();
    for (Loose& loose : built) {
      Run& run = slots_[loose.slot].runs[loose.plane];
      run.tail += loose.mapping.bytes();
      run.mappings.push_back(std::move(loose.mapping));
    }
    break;
  }
  for (const std::size_t index : slots) {
    Slot& slot = slots_[index];
    slot.length = std::max(slot.length, positions);
    refresh(slot);
  }
}

bool Arena::try_grow(std::span<const std::size_t> slots, std::size_t positions, std::size_t keep) {
  const Lock lock = locked();
  for (const std::size_t slot : slots)
    if (slot >= slots_.size() || slots_[slot].state != State::running || slots_[slot].held) return false;
  return !closed_ && grow_in_place(slots, positions, keep);
}

bool Arena::grow_in_place(std::span<const std::size_t> slots, std::size_t positions, std::size_t keep) {
  for (const std::size_t slot : slots)
    if (slots_[slot].capacity < positions || slots_[slot].next_discard <= std::min(keep, slots_[slot].length))
      return false;
  for (const std::size_t slot : slots) slots_[slot].length = std::max(slots_[slot].length, positions);
  return true;
}

void Arena::truncate(std::span<const std::size_t> slots, std::size_t positions, Stream stream) {
  Lock lock = locked();
  require_open();
  for (const std::size_t index : slots) running(index, "truncate");
  const Hold hold(*this, slots, lock);
  bool shorter = false;
  for (const std::size_t index : slots) {
    const Slot& slot = running(index, "truncate");
    if (positions > slot.length)
      throw std::invalid_argument("cannot truncate to " + std::to_string(positions) + " positions: the sequence has " +
                                  std::to_string(slot.length));
    shorter = shorter || positions < slot.length;
    for (std::size_t plane = 0; plane < geometry_.size() && positions > 0; ++plane) {
      const auto& [row_bytes, window, offset, stride] = geometry_[plane];
      const std::size_t first = window == 0 || positions < window ? 0 : positions - window + 1;
      if (slot.runs[plane].head > first * row_bytes)
        throw std::invalid_argument("cannot truncate to " + std::to_string(positions) + " positions: the window of " +
                                    std::to_string(window) + " has moved on and the rows before it are given back");
    }
  }
  if (!shorter) return;
  lock.unlock();
  const auto fence = std::make_shared<const Fence>(driver_, stream);
  lock.lock();
  for (const std::size_t index : slots) {
    Slot& slot = slots_[index];
    note(slot.fences, fence);
    slot.length = positions;
    // A run that starts behind the first row is of no use to what is to come.
    for (std::size_t plane = 0; plane < geometry_.size() && positions == 0; ++plane)
      if (slot.runs[plane].head != 0) retire_run(slot, index, plane);
    refresh(slot);
  }
}

void Arena::release(std::span<const std::size_t> slots, Stream stream) {
  Lock lock = locked();
  require_open();
  for (const std::size_t index : slots) running(index, "close");
  const Hold hold(*this, slots, lock);
  for (const std::size_t index : slots) running(index, "close");
  std::shared_ptr<const Fence> fence;
  if (!std::all_of(slots.begin(), slots.end(), [&](std::size_t index) { return has_nothing(slots_[index]); })) {
    lock.unlock();
    fence = std::make_shared<const Fence>(driver_, stream);
    lock.lock();
  }
  for (const std::size_t index : slots) {
    Slot& slot = slots_[index];
    const bool empty = has_nothing(slot);
    if (!empty) note(slot.fences, fence);
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane)
      if (slot.runs[plane].head != 0) retire_run(slot, index, plane);
    slot.length = 0;
    slot.state = empty ? State::bare : State::parked;
    slot.parked_at = ++clock_;
    refresh(slot);
  }
}

void Arena::trim() {
  Lock lock = locked();
  require_open();
  while (reclaim(kNever, {}, lock)) {
  }
  lock.unlock();
  pool_.trim();
}

void Arena::close() {
  Lock lock = locked();
  closed_ = true;
  wait_until_idle(lock);
  for (std::size_t index = 0; index < slots_.size(); ++index) {
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) retire_run(slots_[index], index, plane);
    // Everything the device was given is waited for at once instead.
    for (Loose& loose : slots_[index].retired) loose.fences.clear();
    slots_[index].fences.clear();
    slots_[index].state = State::bare;
    slots_[index].length = 0;
    refresh(slots_[index]);
  }
  lock.unlock();
  driver_->synchronize();
  lock.lock();
  while (reclaim(kNever, {}, lock)) {
  }
  lock.unlock();
  pool_.trim();
}

std::size_t Arena::length(std::size_t slot) const {
  const Lock lock = locked();
  return slots_.at(slot).length;
}

std::size_t Arena::head(std::size_t slot, std::size_t plane) const {
  const Lock lock = locked();
  return slots_.at(slot).runs.at(plane).head;
}

std::vector<Arena::SlotInfo> Arena::map() const {
  const Lock lock = locked();
  std::vector<SlotInfo> infos;
  infos.reserve(slots_.size());
  for (std::size_t index = 0; index < slots_.size(); ++index) {
    const Slot& slot = slots_[index];
    SlotInfo info{slot.state, slot.length, 0, {}};
    for (const Loose& loose : slot.retired) info.retired += loose.mapping.bytes();
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      const Run& run = slot.runs[plane];
      RunInfo row{address_of(index, plane) + run.head - base(), run.head, run.tail, {}};
      for (const Mapping& mapping : run.mappings) row.extents.push_back(mapping.bytes());
      info.runs.push_back(std::move(row));
    }
    infos.push_back(std::move(info));
  }
  return infos;
}

Arena::Stats Arena::stats() const {
  const Lock lock = locked();
  Stats stats{pool_.usage(), reservation_.bytes(), 0, 0, 0, 0, 0, adopted_};
  for (const Slot& slot : slots_) {
    std::size_t mapped = 0;
    for (const Run& run : slot.runs) mapped += run.tail - run.head;
    for (const Loose& loose : slot.retired) stats.retired += loose.mapping.bytes();
    stats.mapped += mapped;
    stats.parked += slot.state == State::parked ? mapped : 0;
    stats.running_slots += slot.state == State::running ? 1 : 0;
    stats.parked_slots += slot.state == State::parked ? 1 : 0;
  }
  return stats;
}

void Arena::check() const {
  Lock lock = locked();
  wait_until_idle(lock);
  std::size_t total = 0;
  const auto broken = [](std::size_t slot, std::size_t plane, const std::string& what) {
    throw InvariantBroken("slot " + std::to_string(slot) + ", plane " + std::to_string(plane) + ": " + what);
  };
  for (std::size_t index = 0; index < slots_.size(); ++index) {
    const Slot& slot = slots_[index];
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      const Geometry& geometry = geometry_[plane];
      const Run& run = slot.runs[plane];
      const Address start = address_of(index, plane);
      Address next = start + run.head;
      for (const Mapping& mapping : run.mappings) {
        if (mapping.range().at != next) broken(index, plane, "a run has a gap");
        if (!mapping.zeroed()) broken(index, plane, "memory in use was never zeroed");
        next += mapping.bytes();
        total += mapping.bytes();
      }
      if (next != start + run.tail) broken(index, plane, "the run does not end where it says");
      if (run.tail > geometry.stride) broken(index, plane, "the run leaves its slot");
      if (run.mappings.empty() && run.head != run.tail) broken(index, plane, "an empty run has a length");
      if (slot.state == State::running && run.tail < end_of(geometry, slot.length))
        broken(index, plane, "rows of a running sequence are not mapped (invariant 1)");
      if (slot.state == State::bare && run.tail != 0) broken(index, plane, "a bare slot has memory");
      if (slot.state == State::parked && run.head != 0) broken(index, plane, "a parked slot lacks its first rows");
    }
    for (const Loose& loose : slot.retired) {
      const Run& run = slot.runs[loose.plane];
      const Address start = address_of(index, loose.plane);
      const auto [at, bytes] = loose.mapping.range();
      if (loose.slot != index || at < start || at + bytes > start + geometry_[loose.plane].stride)
        broken(index, loose.plane, "a retired mapping is not in its slot");
      if (at < start + run.tail && at + bytes > start + run.head)
        broken(index, loose.plane, "a retired mapping is also in use (invariant 3)");
      total += bytes;
    }
  }
  const ExtentPool::Usage usage = pool_.usage();
  if (total + usage.pooled != usage.charged)
    throw InvariantBroken("mapped and retired " + std::to_string(total) + " + pooled " + std::to_string(usage.pooled) +
                          " bytes are not the charged " + std::to_string(usage.charged) + " (invariant 3)");
  if (usage.peak > usage.budget)
    throw InvariantBroken("the budget of " + std::to_string(usage.budget) +
                          " bytes was exceeded: " + std::to_string(usage.peak) + " (invariant 6)");
}

Arena::Slot& Arena::running(std::size_t index, const char* what) {
  if (index >= slots_.size() || slots_[index].state != State::running)
    throw std::invalid_argument(std::string("cannot ") + what + ": slot " + std::to_string(index) + " has no sequence");
  return slots_[index];
}

bool Arena::has_nothing(const Slot& slot) noexcept {
  return slot.retired.empty() &&
         std::all_of(slot.runs.begin(), slot.runs.end(), [](const Run& run) { return run.mappings.empty(); });
}

// In a forked child the mutex may be held by a thread that does not exist there: asked before it is taken.
Arena::Lock Arena::locked() const {
  driver_->require_owner();
  return Lock(mutex_);
}

void Arena::require_open() const {
  if (closed_) throw std::invalid_argument("the cache is closed: make a new one");
}

Address Arena::address_of(std::size_t slot, std::size_t plane) const noexcept {
  return base() + geometry_[plane].offset + slot * geometry_[plane].stride;
}

// Bytes that a run of so many positions must reach to, in whole granules.
std::size_t Arena::end_of(const Geometry& plane, std::size_t positions) const noexcept {
  return positions == 0 ? 0 : round_up((positions + options_.tail_rows) * plane.row_bytes, driver_->granularity());
}

void Arena::refresh(Slot& slot) noexcept {
  slot.capacity = options_.max_len;
  slot.next_discard = kNever;
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    const auto& [row_bytes, window, offset, stride] = geometry_[plane];
    const Run& run = slot.runs[plane];
    const std::size_t rows = run.tail / row_bytes;
    slot.capacity = std::min(slot.capacity, rows > options_.tail_rows ? rows - options_.tail_rows : 0);
    if (window != 0 && !run.mappings.empty()) {
      // The first mapping goes when the first row of the window, keep - window + 1, lies behind it.
      const std::size_t end = run.head + run.mappings.front().bytes();
      slot.next_discard = std::min(slot.next_discard, (end + row_bytes - 1) / row_bytes + window - 1);
    }
  }
}

std::vector<Arena::Step> Arena::plan(std::span<const std::size_t> slots, std::size_t positions, bool exact) const {
  std::vector<Step> steps;
  for (const std::size_t index : slots) {
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      const Run& run = slots_[index].runs[plane];
      const std::size_t end = end_of(geometry_[plane], positions);
      if (end <= run.tail) continue;
      std::size_t missing = end - run.tail;
      if (!exact) {
        const std::size_t ahead = pool_.bytes_of(pool_.class_of((run.tail - run.head) / options_.growth_divisor));
        missing = std::min(std::max(missing, ahead), geometry_[plane].stride - run.tail);
      }
      // Extents go back whole: those of a windowed plane are small beside the window.
      const auto& [row_bytes, window, offset, stride] = geometry_[plane];
      const std::size_t largest = window == 0 ? ExtentPool::kClasses - 1 : pool_.class_of(window * row_bytes / 8);
      Address at = address_of(index, plane) + run.tail;
      while (missing != 0) {
        const std::size_t size_class = std::min(largest, pool_.class_of(missing));
        steps.push_back({index, plane, at, size_class});
        at += pool_.bytes_of(size_class);
        missing -= pool_.bytes_of(size_class);
      }
    }
  }
  return steps;
}

std::size_t Arena::bytes_of(const std::vector<Step>& steps) const noexcept {
  std::size_t bytes = 0;
  for (const Step& step : steps) bytes += pool_.bytes_of(step.size_class);
  return bytes;
}

// Takes, maps and zeroes what was planned. The mutex is free. When it throws, everything is back where it was.
std::vector<Arena::Loose> Arena::build(const std::vector<Step>& steps) {
  std::vector<Loose> built;
  built.reserve(steps.size());
  try {
    std::vector<Range> fresh;
    for (const Step& step : steps) {
      Extent extent = pool_.take(step.size_class);
      try {
        built.push_back({step.slot, step.plane, Mapping(driver_, extent, step.at), {}});
      } catch (...) {
        pool_.give(std::move(extent));
        throw;
      }
      built.back().mapping.allow();
      if (!built.back().mapping.zeroed()) fresh.push_back(built.back().mapping.range());
    }
    if (!fresh.empty()) driver_->zero(fresh);
    for (Loose& loose : built) loose.mapping.set_zeroed();
  } catch (...) {
    try {
      unmap(built);
    } catch (const std::exception& error) {
      // Twice refused: what is still mapped is retired, to be tried again when it is in somebody's way.
      driver_->report(error);
      const std::lock_guard lock(mutex_);
      for (Loose& loose : built) slots_[loose.slot].retired.push_back(std::move(loose));
    }
    throw;
  }
  return built;
}

void Arena::discard_before_windows(std::span<const std::size_t> slots, std::size_t keep, Stream stream, Lock& lock) {
  const auto due = [&](std::size_t slot) { return slots_[slot].next_discard <= std::min(keep, slots_[slot].length); };
  if (std::none_of(slots.begin(), slots.end(), due)) return;
  lock.unlock();
  const auto fence = std::make_shared<const Fence>(driver_, stream);
  lock.lock();
  for (const std::size_t index : slots) {
    Slot& slot = slots_[index];
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
      const auto& [row_bytes, window, offset, stride] = geometry_[plane];
      const std::size_t kept = std::min(keep, slot.length);
      if (window == 0 || kept < window) continue;
      Run& run = slot.runs[plane];
      const std::size_t first = (kept - window + 1) * row_bytes;
      std::size_t gone = 0;
      while (gone < run.mappings.size() && run.head + run.mappings[gone].bytes() <= first) {
        run.head += run.mappings[gone].bytes();
        Fences fences = slot.fences;
        note(fences, fence);
        slot.retired.push_back({index, plane, std::move(run.mappings[gone]), std::move(fences)});
        ++gone;
      }
      run.mappings.erase(run.mappings.begin(), run.mappings.begin() + static_cast<std::ptrdiff_t>(gone));
    }
    refresh(slot);
  }
}

// Unmaps, of what the held slots have retired, whatever has passed its fences or lies where they will grow.
void Arena::clear_the_way(std::span<const std::size_t> slots, Lock& lock) {
  std::vector<Loose> ahead;
  std::vector<Loose> others;
  for (const std::size_t index : slots) {
    for (Loose& loose : slots_[index].retired) {
      const Address tail = address_of(index, loose.plane) + slots_[index].runs[loose.plane].tail;
      (loose.mapping.range().at >= tail ? ahead : others).push_back(std::move(loose));
    }
    slots_[index].retired.clear();
  }
  if (ahead.empty() && others.empty()) return;
  std::size_t done = 0;  // of the others, from the oldest on: those are through first
  const auto put_back = [&] {
    others.erase(others.begin(), others.begin() + static_cast<std::ptrdiff_t>(done));
    for (auto* rest : {&ahead, &others})
      for (Loose& loose : *rest) slots_[loose.slot].retired.push_back(std::move(loose));
  };
  lock.unlock();
  try {
    unmap(ahead);
    const auto passed = [](const auto& fence) { return fence->passed(); };
    for (; done < others.size() && std::all_of(others[done].fences.begin(), others[done].fences.end(), passed); ++done)
      pool_.give(others[done].mapping.unmap());
  } catch (...) {
    lock.lock();
    put_back();
    throw;
  }
  lock.lock();
  put_back();
}

void Arena::retire_run(Slot& slot, std::size_t index, std::size_t plane) {
  Run& run = slot.runs[plane];
  for (Mapping& mapping : run.mappings) slot.retired.push_back({index, plane, std::move(mapping), slot.fences});
  run = Run{};
}

// Brings about `bytes` back to the pool from whoever needs them least: what is retired, then parked slots from the
// longest parked on, then what running slots have mapped past their length. Of the slots the caller holds, `mine`,
// only what is retired. False when there was nothing.
bool Arena::reclaim(std::size_t bytes, std::span<const std::size_t> mine, Lock& lock) {
  std::vector<Loose> loose;
  std::size_t found = 0;
  std::vector<std::size_t> others;
  const auto take_retired = [&](Slot& slot) {
    while (found < bytes && !slot.retired.empty()) {
      found += slot.retired.back().mapping.bytes();
      loose.push_back(std::move(slot.retired.back()));
      slot.retired.pop_back();
    }
  };
  for (const std::size_t index : mine) take_retired(slots_[index]);
  for (std::size_t index = 0; index < slots_.size(); ++index)
    if (!slots_[index].held && (slots_[index].state != State::bare || !slots_[index].retired.empty()))
      others.push_back(index);
  for (const std::size_t index : others) take_retired(slots_[index]);
  std::sort(others.begin(), others.end(), [&](std::size_t a, std::size_t b) {
    const auto rank = [&](const Slot& slot) { return slot.state == State::parked ? slot.parked_at : kNever; };
    return rank(slots_[a]) < rank(slots_[b]);
  });
  for (const std::size_t index : others) strip(slots_[index], index, bytes, found, loose);
  if (loose.empty()) {
    if (reclaiming_ == 0) return false;
    // Somebody else has it in hand, and will not wait for us.
    released_.wait(lock, [this] { return reclaiming_ == 0; });
    return true;
  }

  std::erase_if(others, [&](std::size_t index) {
    return std::none_of(loose.begin(), loose.end(), [&](const Loose& one) { return one.slot == index; });
  });
  const Hold hold(*this, others, lock);
  ++reclaiming_;
  try {
    unmap_outside(std::move(loose), lock);
  } catch (...) {
    --reclaiming_;
    released_.notify_all();
    throw;
  }
  --reclaiming_;
  released_.notify_all();
  for (const std::size_t index : others)
    if (slots_[index].state == State::parked && has_nothing(slots_[index])) slots_[index].state = State::bare;
  return true;
}

// Takes mappings past the slot's length off the ends of its runs until `found` reaches `bytes`.
void Arena::strip(Slot& slot, std::size_t index, std::size_t bytes, std::size_t& found, std::vector<Loose>& out) {
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    Run& run = slot.runs[plane];
    const std::size_t needed = slot.state == State::running ? end_of(geometry_[plane], slot.length) : 0;
    while (found < bytes && !run.mappings.empty() &&
           run.tail - run.mappings.back().bytes() >= std::max(needed, run.head)) {
      found += run.mappings.back().bytes();
      run.tail -= run.mappings.back().bytes();
      out.push_back({index, plane, std::move(run.mappings.back()), slot.fences});
      run.mappings.pop_back();
    }
    if (run.mappings.empty() && slot.state != State::running) run.head = run.tail = 0;
  }
  refresh(slot);
}

// Waits for the fences, unmaps and pools, from the back. When it throws, what is left in `loose` is still mapped.
void Arena::unmap(std::vector<Loose>& loose) {
  while (!loose.empty()) {
    for (const auto& fence : loose.back().fences) fence->wait();
    pool_.give(loose.back().mapping.unmap());
    loose.pop_back();
  }
}

// The same with the mutex released meanwhile, for mappings of held slots; what the driver refuses stays retired.
void Arena::unmap_outside(std::vector<Loose> loose, Lock& lock) {
  lock.unlock();
  try {
    unmap(loose);
  } catch (...) {
    lock.lock();
    for (Loose& one : loose) slots_[one.slot].retired.push_back(std::move(one));
    throw;
  }
  lock.lock();
}

void Arena::wait_until_idle(Lock& lock) const {
  released_.wait(
      lock, [&] { return std::none_of(slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.held; }); });
}

}  // namespace vattn
