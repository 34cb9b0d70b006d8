// The life of a slot (acquired, truncated, released), the budget, and helpers that all parts of the arena use.
#include "slot_lock.hpp"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <utility>

namespace vattn {
namespace {

// For products that may not fit in 64 bits.
__extension__ using Wide = unsigned __int128;

// Returns the bytes from one slot of a plane to the next. It is a multiple of the granularity. It is also a whole
// number of rows, unless the least common multiple of the two is above 4 GiB, so that kernels can address a plane's
// slots as one sequence of rows.
std::size_t stride_of(const Plane& plane, const ArenaOptions& options, std::size_t granularity) {
  constexpr std::size_t kMost = std::size_t{1} << 32;
  const std::size_t rows = granularity / std::gcd(granularity, plane.row_bytes);
  const std::size_t unit = rows <= kMost / plane.row_bytes ? rows * plane.row_bytes : granularity;
  return round_up((options.max_len + options.tail_rows) * plane.row_bytes, unit);
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
    const Wide slots = Wide{options.slots} + 1;  // the scratch slot too
    const bool fits = rows <= kAddresses / plane.row_bytes;
    const Wide slot = fits ? stride_of(plane, options, granularity) : Wide{kAddresses};
    if (!fits || slot * slots + total > kAddresses)
      throw std::invalid_argument("slots x max_len needs more than 128 TiB of addresses: lower slots or max_len");
    total += static_cast<std::size_t>(slot * slots);
  }
  if (options.slots >= std::size_t{1} << Arena::kSlotBits)
    throw std::invalid_argument("slots must be less than " + std::to_string(std::size_t{1} << Arena::kSlotBits));
  return total;
}

}  // namespace

Arena::Arena(std::shared_ptr<Driver> driver, std::vector<Plane> planes, ArenaOptions options,
             std::shared_ptr<Mapper> mapper)
    : driver_(std::move(driver)),
      mapper_(std::move(mapper)),
      options_(options),
      reservation_(driver_, checked_reservation(options, planes, driver_->granularity())),
      pool_(driver_, options.budget),
      host_(std::make_shared<HostPool>(driver_, options.host_budget)),
      slots_(options.slots + 1),
      bare_(options.slots),
      parked_(options.slots),
      starved_(options.slots) {
  for (std::size_t slot = 0; slot < options.slots; ++slot) bare_.set(slot, true);
  std::size_t offset = 0;
  for (const Plane& plane : planes) {
    const std::size_t stride = stride_of(plane, options_, driver_->granularity());
    geometry_.push_back({plane.row_bytes, plane.window, offset, stride});
    offset += stride * slots_.size();
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

std::size_t Arena::acquire(std::optional<std::size_t> wanted, std::size_t expected, Stream stream, bool empty,
                           std::optional<std::size_t> like, std::size_t positions) {
  if (wanted && *wanted >= options_.slots)
    throw std::invalid_argument("slot " + std::to_string(*wanted) + " does not exist: there are " +
                                std::to_string(options_.slots));
  Lock lock = locked();
  require_open();
  std::size_t chosen = kNever;
  const Slot* const source = like && *like < options_.slots ? &slots_[*like] : nullptr;
  const auto is_like = [&](const Slot& slot) { return source && is_ready(slot, *source); };
  // A slot that another thread has locked may become free in a moment. So when all candidates are locked, the
  // choice is repeated once slots are unlocked.
  const auto choose = [&] {
    bool others = false;
    auto best = std::make_tuple(true, kNever, false, kNever, 0);
    // Compares a slot with the best one so far. Returns false when another thread has locked it.
    const auto consider = [&](std::size_t index) {
      const Slot& slot = slots_[index];
      others = others || slot.locked;
      if (slot.locked) return false;
      // Slots with a cached prefix were parked at different times, which decides between them before their memory does.
      auto [lacking, beyond] = slot.cached == 0 ? misfit(slot, expected, expected != 0 ? source : nullptr, positions)
                                                : std::pair<std::size_t, std::size_t>{};
      if (empty)
        for (const Run& run : slot.runs) beyond += run.mappings.size();
      // Memory beyond what is expected is withheld from later sequences, and may be taken back. Memory that is lacking
      // is asked of the driver now, and counts twice, a weight chosen by replays of served traces. So a bare slot
      // may be the better one; but when nothing is expected, a parked slot is preferred unless `empty` is set.
      const bool bare = slot.state == State::bare;
      const int worse = bare ? 1 : slot.deferred.empty() ? 0 : 2;  // its deferred unmaps may have to be waited for
      const auto rank = std::make_tuple(!is_like(slot), slot.cached != 0 ? slot.parked_at : 0,
                                        bare && expected == 0 && !empty, 2 * lacking + beyond, worse);
      if (chosen == kNever || rank < best) {
        best = rank;
        chosen = index;
      }
      return true;
    };
    if (wanted) {
      if (slots_[*wanted].state != State::running) consider(*wanted);
    } else {
      for (std::size_t index = parked_.next(0); index < options_.slots; index = parked_.next(index + 1))
        if (&slots_[index] != source) consider(index);
      // All bare slots are alike, so the first one that is not locked will do.
      for (std::size_t index = bare_.next(0); index < options_.slots && !consider(index);)
        index = bare_.next(index + 1);
      if (chosen != kNever && expected != 0 && !is_like(slots_[chosen]))
        chosen = rather_remembered(chosen, expected, source, positions);
      // The slot that is to be forked is taken only where it is the last one.
      if (chosen == kNever && !others && source && source->state == State::parked) consider(*like);
    }
    return chosen != kNever || !others;
  };
  if (!choose()) {
    const Waiting waiting(*this);
    released_.wait(lock, choose);
  }
  require_open();
  if (chosen == kNever && wanted)
    throw std::invalid_argument("slot " + std::to_string(*wanted) + " is in use by another sequence");
  if (chosen == kNever)
    throw std::invalid_argument("all " + std::to_string(options_.slots) +
                                " slots are in use: close a sequence, or make the cache with more slots");
  Slot& slot = slots_[chosen];
  const SlotLock slot_lock(*this, Slots(&chosen, 1), lock);
  wait_for_others(slot.fences, stream, lock);
  adopted_ += slot.state == State::parked ? 1 : 0;
  begin(slot, 0, stream);
  slot.expected = expected;
  slot.generation = ++clock_;
  slot.cached = 0;
  if (!source) drop_unwritable(slot, chosen);
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane)
    if (slot.runs[plane].head != 0) defer_unmap_of_run(slot, chosen, plane);
  refresh(slot);
  return chosen;
}

// Returns the bytes that a slot lacks for `expected` positions, and those that it has beyond them or cannot use. Where
// the slot will be a fork of `like` at `positions`, it lacks no memory for what it will share, but what has to be
// mapped of that counts twice as beyond.
std::pair<std::size_t, std::size_t> Arena::misfit(const Slot& slot, std::size_t expected, const Slot* like,
                                                  std::size_t positions) const noexcept {
  std::size_t lacking = 0;
  std::size_t beyond = 0;
  const bool aliased = like && better_aliased(*like, slot, positions);  // else the rows are copied
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    const Run& run = slot.runs[plane];
    std::size_t start = run.head;
    Kept stays{0, 0, writable_until(run, 0)};
    if (aliased) {
      stays = kept(*like, slot, plane, positions);
      const Run& shared = like->runs[plane];
      const std::size_t count = sharable(*like, plane, positions);
      start = shared.head + bytes_of(shared, 0, count);
      beyond += 2 * bytes_of(shared, stays.shared, count);
    }
    const std::size_t tail = start + bytes_of(run, stays.begin, stays.end);
    beyond += run.tail - run.head - bytes_of(run, 0, stays.shared) - (tail - start);
    const std::size_t end = std::max(start, end_of(geometry_[plane], std::min(expected, options_.max_len)));
    (tail < end ? lacking : beyond) += tail < end ? end - tail : tail - end;
  }
  return {lacking, beyond};
}

// Returns the slot that a sequence takes instead of `chosen`; mostly `chosen` itself. Where that has a cached prefix,
// or what it lacks would be taken from slots with one, extent by extent, one of these is taken as a whole: of the half
// of them that was used longest ago the one whose memory is nearest to what is expected.
std::size_t Arena::rather_remembered(std::size_t chosen, std::size_t expected, const Slot* like,
                                     std::size_t positions) const {
  const auto [lacking, beyond] = misfit(slots_[chosen], expected, like, positions);
  std::size_t spare = pool_.usage().available();
  std::vector<std::pair<std::uint64_t, std::size_t>> remembered;
  for (std::size_t index = parked_.next(0); index < options_.slots; index = parked_.next(index + 1)) {
    const Slot& slot = slots_[index];
    if (slot.locked || index == chosen || &slot == like) continue;
    if (slot.cached != 0 && slot.deferred.empty()) remembered.emplace_back(slot.parked_at, index);
    if (slot.cached == 0)
      for (const Run& run : slot.runs) spare += run.tail - run.head;
  }
  if (slots_[chosen].cached == 0 && lacking <= spare) return chosen;
  std::sort(remembered.begin(), remembered.end());
  remembered.resize((remembered.size() + 1) / 2);
  std::size_t least = 2 * lacking + beyond;
  for (const auto& [parked_at, index] : remembered) {
    const auto [missing, more] = misfit(slots_[index], expected, like, positions);
    if (2 * missing + more >= least) continue;
    least = 2 * missing + more;
    chosen = index;
  }
  return chosen;
}

void Arena::set_state(Slot& slot, State state) noexcept {
  slot.state = state;
  const auto index = static_cast<std::size_t>(&slot - slots_.data());
  if (index == options_.slots) return;
  bare_.set(index, state == State::bare);
  parked_.set(index, state == State::parked);
}

// Starts a sequence in a slot, with the slot's first `positions` rows. Requires that the slot's memory may be used in
// the stream.
void Arena::begin(Slot& slot, std::size_t positions, Stream stream) {
  slot.streams.assign(1, stream);  // first, since the allocation may fail
  set_state(slot, State::running);
  slot.started_at = ++clock_;
  slot.length = positions;
  slot.expected = slot.prompt = 0;
  slot.wanted = 0;
  slot.lookahead = first_lookahead();
  slot.asked_since = {};
  slot.starved = false;
  slot.hit_at = kNever;
}

// Waits for those of the fences that belong to other streams than this one. The mutex is free meanwhile.
void Arena::wait_for_others(Fences fences, Stream stream, Lock& lock) {
  std::erase_if(fences, [&](const auto& fence) { return fence->stream() == stream; });
  if (fences.empty()) return;
  lock.unlock();
  {
    const Waiting waiting(*this);
    for (const auto& fence : fences) fence->wait();
  }
  lock.lock();
}

// Defers the unmapping of what a new sequence cannot use: in each plane the mappings from the first unwritable one on,
// or the whole run where it lacks the slot's first rows.
void Arena::drop_unwritable(Slot& slot, std::size_t index) noexcept {
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    const std::size_t usable = slot.runs[plane].head == 0 ? writable_until(slot.runs[plane], 0) : 0;
    if (usable == 0) {
      defer_unmap_of_run(slot, index, plane);
    } else {
      defer_unmap_from(slot, index, plane, usable);
    }
  }
  if (!slot.deferred.empty()) post_maintenance({});
}

void Arena::use(std::size_t name, Stream stream) {
  const Lock lock = locked();
  require_open();
  Slot& slot = running(name, "use");
  if (!contains(slot.streams, stream)) slot.streams.push_back(stream);
}

void Arena::truncate(Slots names, std::size_t positions, Stream stream) {
  Lock lock = locked();
  require_open();
  const std::vector<std::size_t> slots = running_slots(names, "truncate");
  const SlotLock slot_lock(*this, slots, lock);
  bool shorter = false;
  for (const std::size_t name : names) {
    const Slot& slot = running(name, "truncate");
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
  Fences fresh;
  if (shorter) fresh = fences_of(slots, stream, lock);
  for (const std::size_t index : slots) {
    Slot& slot = slots_[index];
    cover(slot, stream, fresh);
    slot.wanted = 0;
    slot.cached = std::min(slot.cached, positions);
    if (!shorter) continue;
    slot.length = positions;
    slot.asked_since = {};
    // An empty sequence writes its first row next, and a run that starts behind that row is of no use to it.
    for (std::size_t plane = 0; plane < geometry_.size() && positions == 0; ++plane)
      if (slot.runs[plane].head != 0) defer_unmap_of_run(slot, index, plane);
    refresh(slot);
  }
  ask_again();
}

void Arena::release(Slots names, Stream stream) {
  Lock lock = locked();
  require_open();
  const std::vector<std::size_t> slots = running_slots(names, "close");
  const SlotLock slot_lock(*this, slots, lock);
  running_slots(names, "close");
  Fences fresh;
  if (!std::all_of(slots.begin(), slots.end(), [&](std::size_t index) { return has_nothing(slots_[index]); }))
    fresh = fences_of(slots, stream, lock);
  for (const std::size_t index : slots) {
    Slot& slot = slots_[index];
    const bool empty = has_nothing(slot);
    if (!empty) cover(slot, stream, fresh);
    if (slot.cached == 0) drop_unwritable(slot, index);
    slot.length = 0;
    set_state(slot, empty ? State::bare : State::parked);
    slot.parked_at = ++clock_;
    slot.streams.clear();
    refresh(slot);
  }
  ask_again();
}

void Arena::trim() {
  on_mapper([this] {
    Lock lock = locked();
    require_open();
    while (reclaim(kNever, {}, {}, Keep::rows, Urgency::demand, lock)) {
    }
    stocked_class_.reset();
    lock.unlock();
    pool_.shrink(0);
    host_->shrink();
  });
}

void Arena::set_budget(std::size_t bytes) {
  if (bytes < driver_->granularity())
    throw std::invalid_argument("budget of " + std::to_string(bytes) + " bytes is below one granule of " +
                                std::to_string(driver_->granularity()) + " bytes");
  on_mapper([this, bytes] {
    Lock lock = locked();
    require_open();
    const std::size_t before = pool_.usage().budget;
    // Set first, so that from here on no other thread takes memory beyond it.
    pool_.set_budget(bytes);
    try {
      for (;;) {
        const std::size_t in_use = pool_.usage().in_use();
        if (in_use <= bytes) break;
        if (!reclaim(in_use - bytes, {}, {}, Keep::rows, Urgency::demand, lock))
          throw BudgetExceeded(pool_.usage().in_use(), bytes);
      }
      lock.unlock();
      pool_.shrink(bytes);
    } catch (...) {
      pool_.set_budget(before);
      throw;
    }
    lock.lock();
    ask_again();
  });
}

void Arena::close() {
  Lock lock = locked();
  closed_ = true;
  lock.unlock();
  if (mapper_) mapper_->cancel(this);
  lock.lock();
  wait_until_idle(lock);
  for (std::size_t index = 0; index < slots_.size(); ++index) {
    for (std::size_t plane = 0; plane < geometry_.size(); ++plane) defer_unmap_of_run(slots_[index], index, plane);
    // The fences are not needed: synchronize() below waits for all work of the device at once.
    for (DeferredUnmap& loose : slots_[index].deferred) loose.fences.clear();
    slots_[index].fences.clear();
    set_state(slots_[index], State::bare);
    slots_[index].length = slots_[index].cached = 0;
    refresh(slots_[index]);
  }
  lock.unlock();
  driver_->synchronize();
  lock.lock();
  while (reclaim(kNever, {}, {}, Keep::rows, Urgency::demand, lock)) {
  }
  lock.unlock();
  pool_.shrink(0);
  host_->close();
}

bool Arena::closed() const {
  const Lock lock = locked();
  return closed_;
}

std::size_t Arena::length(std::size_t name) const {
  const Lock lock = locked();
  const Slot& slot = slots_.at(slot_of(name));
  return name >> kSlotBits == 0 || name >> kSlotBits == slot.started_at ? slot.length : 0;
}

std::size_t Arena::capacity(std::size_t name) const {
  const Lock lock = locked();
  return slots_.at(slot_of(name)).capacity;
}

std::size_t Arena::head(std::size_t slot, std::size_t plane) const {
  const Lock lock = locked();
  return slots_.at(slot).runs.at(plane).head;
}

std::size_t Arena::name(std::size_t slot) const {
  const Lock lock = locked();
  return slots_.at(slot).started_at << kSlotBits | slot;
}

bool Arena::readable(std::size_t offset, std::size_t bytes) const {
  const Lock lock = locked();
  if (closed_) return false;
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    const Geometry& geometry = geometry_[plane];
    if (offset < geometry.offset || offset >= geometry.offset + geometry.stride * options_.slots) continue;
    const Run& run = slots_[(offset - geometry.offset) / geometry.stride].runs[plane];
    const std::size_t at = (offset - geometry.offset) % geometry.stride;
    return bytes == 0 || (at >= run.head && at < run.tail && bytes <= run.tail - at);
  }
  return false;
}

bool Arena::is_running(std::size_t name) const noexcept {
  const std::size_t index = slot_of(name);
  return index < options_.slots && slots_[index].state == State::running &&
         (name >> kSlotBits == 0 || name >> kSlotBits == slots_[index].started_at);
}

Arena::Slot& Arena::running(std::size_t name, const char* what) {
  if (!is_running(name))
    throw std::invalid_argument(std::string("cannot ") + what + ": slot " + std::to_string(slot_of(name)) +
                                (name >> kSlotBits == 0 ? " has no sequence" : " is not this sequence's any more"));
  return slots_[slot_of(name)];
}

const Arena::Slot& Arena::running(std::size_t name, const char* what) const {
  return const_cast<Arena*>(this)->running(name, what);
}

std::vector<std::size_t> Arena::running_slots(Slots names, const char* what) {
  std::vector<std::size_t> slots;
  slots.reserve(names.size());
  for (const std::size_t name : names) {
    running(name, what);
    slots.push_back(slot_of(name));
  }
  return slots;
}

bool Arena::has_nothing(const Slot& slot) noexcept {
  return slot.deferred.empty() &&
         std::all_of(slot.runs.begin(), slot.runs.end(), [](const Run& run) { return run.mappings.empty(); });
}

// Takes the mutex. In a forked child, where the mutex may be held by a thread that does not exist, this throws
// BackendUnavailable instead.
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

// Returns the tail that a run must have for `positions` rows and the tail rows behind them: bytes, rounded up to whole
// granules, or 0 for no positions.
std::size_t Arena::end_of(const Geometry& plane, std::size_t positions) const noexcept {
  return positions == 0 ? 0 : round_up((positions + options_.tail_rows) * plane.row_bytes, driver_->granularity());
}

// Returns how many positions, with the tail rows behind them, fit in a plane's first `bytes` bytes.
std::size_t Arena::usable_rows(std::size_t plane, std::size_t bytes) const noexcept {
  const std::size_t rows = bytes / geometry_[plane].row_bytes;
  return rows > options_.tail_rows ? rows - options_.tail_rows : 0;
}

// Returns the tail that a slot's run must have, in bytes, for what its sequence keeps, see Keep. 0 without a sequence.
std::size_t Arena::needed_end(const Slot& slot, std::size_t plane, Keep keep) const noexcept {
  if (slot.state != State::running) return 0;
  if (keep == Keep::rows) return end_of(geometry_[plane], std::max(slot.length, slot.wanted));
  // A sequence of length 0 may have adopted memory for first rows that it has not written yet, so what it is expected
  // to need counts in any case.
  const bool expected = keep == Keep::expected || slot.length == 0;
  return end_of(geometry_[plane],
                std::max(goal_of(slot), expected ? std::min(slot.expected, options_.max_len) : std::size_t{0}));
}

std::size_t Arena::widest_row() const noexcept {
  std::size_t widest = 0;
  for (const Geometry& plane : geometry_) widest = std::max(widest, plane.row_bytes);
  return widest;
}

void Arena::require_possible(std::size_t positions, std::size_t before) const {
  if (positions > options_.max_len - std::min(options_.max_len, before))
    throw SequenceTooLong(too_long(before + positions));
}

std::string Arena::too_long(std::size_t positions) const {
  return std::to_string(positions) + " positions are more than max_len, " + std::to_string(options_.max_len) +
         ": make the cache with a larger max_len, or truncate";
}

// Computes anew what follows from a slot's runs, length and lookahead: its capacity, and the lengths at which growth
// has something to do. Called after each change of these. An extent that rows may be written to from now on loses its
// copy in host memory.
void Arena::refresh(Slot& slot) noexcept {
  slot.capacity = options_.max_len;
  slot.next_discard = kNever;
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    const auto& [row_bytes, window, offset, stride] = geometry_[plane];
    const Run& run = slot.runs[plane];
    slot.capacity = std::min(slot.capacity, usable_rows(plane, run.tail));
    // The memory behind the rows is for rows to come. Where it is not writable, for instance because it is shared, the
    // slot cannot grow as mapped, and its capacity ends at its length.
    std::size_t end = run.tail;
    for (auto last = run.mappings.rbegin(); last != run.mappings.rend() && end > slot.length * row_bytes; ++last) {
      if (!last->writable()) slot.capacity = std::min(slot.capacity, slot.length);
      last->will_be_written();
      end -= last->bytes();
    }
    if (window != 0 && !run.mappings.empty()) {
      // The first mapping can go when it ends at or before the first row of the window, which is row
      // min_truncate_length - window + 1.
      const std::size_t behind = run.head + run.mappings.front().bytes();
      slot.next_discard = std::min(slot.next_discard, (behind + row_bytes - 1) / row_bytes + window - 1);
    }
  }
  const bool content = !mapper_ || slot.state != State::running || slot.asked || slot.starved || slot.lookahead == 0 ||
                       slot.capacity >= options_.max_len;
  slot.ahead_at = content ? kNever : slot.capacity - std::min(slot.capacity, slot.lookahead);
  if (slot.hit_at >= slot.capacity) slot.hit_at = kNever;
  slot.quiet = std::min(slot.hit_at, slot.ahead_at);
}

// Records and returns a new fence in `stream` and in every stream that used one of the slots. The mutex is free
// meanwhile.
Fences Arena::fences_of(Slots slots, Stream stream, Lock& lock) {
  std::vector<Stream> streams{stream};
  for (const std::size_t index : slots)
    for (const Stream used : slots_[index].streams)
      if (!contains(streams, used)) streams.push_back(used);
  lock.unlock();
  Fences fences;
  for (const Stream used : streams) fences.push_back(std::make_shared<const Fence>(driver_, used));
  lock.lock();
  return fences;
}

// Adds to a slot's fences those of the new ones that concern it: of `stream` and of the streams that used the slot.
void Arena::cover(Slot& slot, Stream stream, const Fences& fresh) {
  for (const auto& fence : fresh)
    if (fence->stream() == stream || contains(slot.streams, fence->stream())) note(slot.fences, fence);
}

// Waits until no slot is locked.
void Arena::wait_until_idle(Lock& lock) const {
  released_.wait(
      lock, [&] { return std::none_of(slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.locked; }); });
}

}  // namespace vattn
