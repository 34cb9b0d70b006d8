// The deep module: slots over one reservation, with memory that follows their length.
//
// A slot is the address range of one sequence. Its rows lie in one or more planes: a plane holds `row_bytes` for
// every position, so that a plane's part of a slot is contiguous. The reservation is
//     plane 0: slot 0, slot 1, ...   plane 1: slot 0, slot 1, ...   ...
// and each slot of a plane is padded to the granularity. In each plane a slot has one run of mappings, [head, tail)
// in bytes from the slot's start. The head is 0 unless the plane has a window: then what lies before the window of
// every position that may still be asked for is given back.
//
// A slot is bare (nothing mapped), running (a sequence has it) or parked (no sequence, memory still mapped, to be
// adopted without a driver call). A mapping that no sequence needs any more but that a kernel may still read is
// retired: it waits for its fences and then goes back to the pool.
//
// Locking: the mutex guards all state and is never held during a driver call. Who needs the driver holds the slots
// concerned (Slot::held) while the mutex is free; others wait for them, and reclaiming passes them by.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "extent_pool.hpp"

namespace vattn {

struct Plane {
  std::size_t row_bytes;
  // Positions that a query sees, itself included; 0 when it sees all.
  std::size_t window = 0;
};

struct ArenaOptions {
  std::size_t slots;
  std::size_t max_len;  // positions of a slot
  std::size_t budget;   // bytes of physical memory
  // Rows past the length that kernels may load: kept mapped and finite (invariant 2).
  std::size_t tail_rows = 0;
  // A growing run takes extents of up to 1/growth_divisor of what it has, so that at most that part is unused.
  std::size_t growth_divisor = 32;
};

class Arena {
 public:
  Arena(std::shared_ptr<Driver> driver, std::vector<Plane> planes, ArenaOptions options);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Gives a slot to a sequence: `slot` if one is named, else the parked slot that best fits `expected` positions,
  // else a bare one. What was queued on other streams than `stream` with the slot's memory is waited for.
  std::size_t acquire(std::optional<std::size_t> slot, std::size_t expected, Stream stream);

  // Makes `positions` rows (and the tail rows) of every named slot usable: all of them or, when it throws, none.
  // `keep` (at most a slot's length) is the earliest length that truncate will still be asked for, a promise even when
  // the call throws: rows before the windows at that length are given back once the work queued in `stream` is done.
  // Lengths never shrink here.
  void grow(std::span<const std::size_t> slots, std::size_t positions, std::size_t keep, Stream stream);
  // The same when it takes no driver call and no waiting; otherwise false, and nothing has changed.
  bool try_grow(std::span<const std::size_t> slots, std::size_t positions, std::size_t keep);

  // Shortens every named slot that is longer: all of them or, when it throws, none. Their memory stays mapped until
  // somebody needs it. Throws std::invalid_argument when a slot is shorter or a window has already passed.
  void truncate(std::span<const std::size_t> slots, std::size_t positions, Stream stream);

  // Parks every named slot: all of them or, when it throws, none. `stream` is where their memory was used last.
  void release(std::span<const std::size_t> slots, Stream stream);

  // Returns every byte to the driver that no running sequence needs.
  void trim();

  // Unmaps everything; the addresses stay reserved, and every later call but stats() and check() is refused.
  void close();

  Address base() const noexcept { return reservation_.base(); }
  std::size_t plane_offset(std::size_t plane) const { return geometry_.at(plane).offset; }
  std::size_t slot_stride(std::size_t plane) const { return geometry_.at(plane).stride; }
  std::size_t length(std::size_t slot) const;
  // Bytes at the start of a slot that a window has given back.
  std::size_t head(std::size_t slot, std::size_t plane) const;
  const std::shared_ptr<Driver>& driver() const noexcept { return driver_; }

  enum class State { bare, running, parked };
  struct RunInfo {
    std::size_t offset;  // of the run's first byte from base()
    std::size_t head;    // in bytes from the slot's start
    std::size_t tail;
    std::vector<std::size_t> extents;  // bytes of each, in address order
  };
  struct SlotInfo {
    State state;
    std::size_t length;
    std::size_t retired;  // bytes
    std::vector<RunInfo> runs;
  };
  std::vector<SlotInfo> map() const;

  struct Stats {
    ExtentPool::Usage pool;
    std::size_t reserved;
    std::size_t mapped;  // in runs of running and parked slots
    std::size_t parked;  // of those, in parked slots
    std::size_t retired;
    std::size_t running_slots;
    std::size_t parked_slots;
    std::uint64_t adopted;  // times a parked slot was taken over
  };
  Stats stats() const;

  // Recounts everything and throws InvariantBroken where a count, an address or a state is wrong.
  void check() const;

 private:
  struct Geometry {
    std::size_t row_bytes;
    std::size_t window;
    std::size_t offset;
    std::size_t stride;
  };
  struct Run {
    std::vector<Mapping> mappings;
    std::size_t head = 0;
    std::size_t tail = 0;
  };
  // A mapping outside of its run: being made, or on its way back to the pool.
  struct Loose {
    std::size_t slot;
    std::size_t plane;
    Mapping mapping;
    Fences fences;
  };
  struct Slot {
    State state = State::bare;
    bool held = false;
    std::size_t length = 0;
    std::size_t capacity = 0;      // positions usable as mapped
    std::size_t next_discard = 0;  // the `keep` at which a window gives something back
    std::uint64_t parked_at = 0;
    Fences fences;
    std::vector<Run> runs;
    std::vector<Loose> retired;
  };
  struct Step {
    std::size_t slot;
    std::size_t plane;
    Address at;
    std::size_t size_class;
  };
  using Lock = std::unique_lock<std::mutex>;
  class Hold;

  Slot& running(std::size_t slot, const char* what);
  static bool has_nothing(const Slot& slot) noexcept;
  Lock locked() const;
  void require_open() const;
  Address address_of(std::size_t slot, std::size_t plane) const noexcept;
  std::size_t end_of(const Geometry& plane, std::size_t positions) const noexcept;
  void refresh(Slot& slot) noexcept;
  bool grow_in_place(std::span<const std::size_t> slots, std::size_t positions, std::size_t keep);
  std::vector<Step> plan(std::span<const std::size_t> slots, std::size_t positions, bool exact) const;
  std::size_t bytes_of(const std::vector<Step>& steps) const noexcept;
  std::vector<Loose> build(const std::vector<Step>& steps);
  void discard_before_windows(std::span<const std::size_t> slots, std::size_t keep, Stream stream, Lock& lock);
  void clear_the_way(std::span<const std::size_t> slots, Lock& lock);
  void retire_run(Slot& slot, std::size_t index, std::size_t plane);
  bool reclaim(std::size_t bytes, std::span<const std::size_t> mine, Lock& lock);
  void strip(Slot& slot, std::size_t index, std::size_t bytes, std::size_t& found, std::vector<Loose>& out);
  void unmap(std::vector<Loose>& loose);
  void unmap_outside(std::vector<Loose> loose, Lock& lock);
  void wait_until_idle(Lock& lock) const;

  const std::shared_ptr<Driver> driver_;
  const ArenaOptions options_;
  std::vector<Geometry> geometry_;
  // Destroyed from the last to the first: mappings, pooled extents, the addresses.
  Reservation reservation_;
  ExtentPool pool_;
  mutable std::mutex mutex_;
  mutable std::condition_variable released_;
  std::vector<Slot> slots_;
  bool closed_ = false;
  int reclaiming_ = 0;  // calls of reclaim() that are with the driver
  std::uint64_t clock_ = 0;
  std::uint64_t adopted_ = 0;
};

}  // namespace vattn
