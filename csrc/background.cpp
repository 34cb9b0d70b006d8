// What the mapper thread does for an arena: it maps memory ahead of growing sequences, and does maintenance.
#include <algorithm>
#include <chrono>
#include <utility>

#include "slot_lock.hpp"

namespace vattn {

// Runs work on the mapper thread and waits for it, or runs it in the calling thread when there is no mapper or it has
// stopped. Throws what the work throws.
void Arena::on_mapper(const std::function<void()>& work) {
  driver_->require_owner();
  if (mapper_) {
    mapper_->run(this, work);
  } else {
    work();
  }
}

// Returns the number of positions up to which the mapper keeps a running slot mapped.
std::size_t Arena::goal_of(const Slot& slot) const noexcept {
  return std::min(options_.max_len, std::max(slot.wanted, slot.length + slot.lookahead));
}

// Returns the lookahead of a new sequence in positions, 0 without a mapper. See ArenaOptions::lookahead.
std::size_t Arena::first_lookahead() const noexcept {
  if (!mapper_) return 0;
  if (options_.lookahead) return *options_.lookahead;
  return std::clamp<std::size_t>(driver_->granularity() / widest_row(), 1, kLookahead);
}

// Returns how many positions' rows fit in a slot's shared extents, in the plane where that is most.
std::size_t Arena::shared_rows(const Slot& slot) const noexcept {
  std::size_t rows = 0;
  for (std::size_t plane = 0; plane < geometry_.size(); ++plane) {
    std::size_t bytes = 0;
    for (const Mapping& mapping : slot.runs[plane].mappings) bytes += mapping.shared() ? mapping.bytes() : 0;
    rows = std::max(rows, bytes / geometry_[plane].row_bytes);
  }
  return rows;
}

// Asks the mapper to map a running slot up to its goal, see goal_of(). Sets the lookahead from the rate of growth since
// the mapper was last asked, unless the options fix it.
void Arena::ask(std::size_t index) {
  Slot& slot = slots_[index];
  slot.starved = false;
  slot.ahead_at = kNever;
  if (slot.asked || closed_) return;
  const auto now = Clock::now();
  if (!options_.lookahead && slot.asked_since != Clock::time_point{} && slot.length > slot.asked_length) {
    const std::chrono::duration<double> since = now - slot.asked_since;
    const double rate = static_cast<double>(slot.length - slot.asked_length) / std::max(since.count(), 1e-9);
    const std::size_t first = first_lookahead();
    const std::size_t own = slot.length - std::min(slot.length, shared_rows(slot));
    const std::size_t most = std::clamp(own / options_.growth_divisor, 4 * first, kLookahead * first);
    slot.lookahead = std::clamp(static_cast<std::size_t>(2 * map_seconds_ * rate), first, most);
  }
  slot.asked_since = now;
  slot.asked_length = slot.length;
  if (!ahead_posted_) ahead_posted_ = mapper_->post(Urgency::ahead, this, [this] { map_ahead(); });
  if (!ahead_posted_) return;
  slot.asked = true;
  asked_.push_back(index);
}

// Asks the mapper again for the running slots for which it found no memory, now that there may be some.
void Arena::ask_again() {
  for (std::size_t index = starved_.next(0); index < options_.slots; index = starved_.next(index + 1)) {
    starved_.set(index, false);
    if (slots_[index].starved && slots_[index].state == State::running) ask(index);
  }
}

// Runs on the mapper thread. Maps one slot up to its goal and posts itself again for the others, so that a demand never
// waits for more than one slot.
void Arena::map_ahead() {
  Lock lock(mutex_);
  while (!asked_.empty()) {
    const std::size_t index = asked_.front();
    asked_.pop_front();
    Slot& slot = slots_[index];
    slot.asked = false;
    const std::size_t goal = goal_of(slot);
    if (closed_ || slot.state != State::running || slot.locked || slot.capacity >= goal) {
      refresh(slot);
      continue;
    }
    const auto since = slot.asked_since;
    try {
      const SlotLock slot_lock(*this, Slots(&index, 1), lock);
      slot.starved = !map_up_to(Slots(&index, 1), PerSlot(goal), Urgency::ahead, lock);
    } catch (const std::exception&) {
      slot.starved = true;
      ++background_failures_;
    }
    if (slot.starved) starved_.set(index, true);
    const std::chrono::duration<double> took = Clock::now() - since;
    if (!slot.starved) map_seconds_ = std::max(took.count(), 0.9 * map_seconds_);
    refresh(slot);
    break;
  }
  ahead_posted_ = !closed_ && !asked_.empty() && mapper_->post(Urgency::ahead, this, [this] { map_ahead(); });
}

// Runs on the mapper thread. Does the deferred unmaps whose fences have passed, and creates extents of the class that
// growth took last, so that the next growth finds them in the pool.
void Arena::run_maintenance() {
  Lock lock(mutex_);
  housekeeping_posted_ = false;
  bool freed = false;
  bool left = false;
  try {
    for (std::size_t index = 0; index < slots_.size() && !closed_; ++index) {
      Slot& slot = slots_[index];
      if (slot.deferred.empty()) continue;
      if (!slot.locked) {
        const std::size_t before = slot.deferred.size();
        const SlotLock slot_lock(*this, Slots(&index, 1), lock);
        clear_the_way(Slots(&index, 1), Urgency::housekeeping, lock);
        freed = freed || slot.deferred.size() < before;
        if (slot.state == State::parked && has_nothing(slot)) set_state(slot, State::bare);
      }
      left = left || !slot.deferred.empty();
    }
    if (const auto size_class = std::exchange(stocked_class_, std::nullopt); size_class && !closed_) {
      lock.unlock();
      pool_.stock(*size_class, kStock);
      lock.lock();
    }
  } catch (const std::exception&) {
    if (!lock.owns_lock()) lock.lock();
    ++background_failures_;
    left = true;
  }
  if (freed) ask_again();
  housekeeping_delay_ = freed ? kPatience : std::min<Clock::duration>(2 * housekeeping_delay_, kLongPatience);
  if (left) post_maintenance(housekeeping_delay_);
}

// Queues maintenance on the mapper, unless it is queued already. Where there is no memory to queue it, the next call of
// this function does.
void Arena::post_maintenance(Clock::duration delay) noexcept {
  if (!mapper_ || closed_ || housekeeping_posted_) return;
  housekeeping_delay_ = std::max<Clock::duration>(delay, kPatience);
  try {
    housekeeping_posted_ = mapper_->post(Urgency::housekeeping, this, [this] { run_maintenance(); }, delay);
  } catch (const std::bad_alloc&) {
  }
}

void Arena::wait_idle() const {
  driver_->require_owner();
  if (mapper_) mapper_->wait_idle(this);
}

}  // namespace vattn
