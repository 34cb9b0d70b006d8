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
// concerned (Slot::held) while the mutex is free; others wait for them, and reclaiming passes them by. Growing within
// what is mapped holds nothing and waits for nobody.
//
// With a mapper, memory is mapped, unmapped, created and released on its thread: ahead of who grows, or while who
// grows waits. Without one, in the thread of who needs it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "extent_pool.hpp"
#include "mapper.hpp"

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
  // Positions past its length that a running sequence is kept mapped, where there is a mapper. None: what the time to
  // map and the rate of growth ask for, at least a granule of the widest plane (or 64 positions of it) and at most
  // 64 of those, nor more than 1/growth_divisor of its length and 4 of those.
  std::optional<std::size_t> lookahead = std::nullopt;
};

class Arena {
 public:
  using Slots = std::span<const std::size_t>;

  Arena(std::shared_ptr<Driver> driver, std::vector<Plane> planes, ArenaOptions options,
        std::shared_ptr<Mapper> mapper = nullptr);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Gives a slot to a sequence: `slot` if one is named, else the one whose memory is nearest to `expected` positions;
  // when nothing is expected, a parked one before a bare one. What was queued on other streams than `stream` with the
  // slot's memory is waited for.
  std::size_t acquire(std::optional<std::size_t> slot, std::size_t expected, Stream stream);

  // Makes `positions` rows (and the tail rows) of every named slot usable: all of them or, when it throws, none.
  // `keep` (at most a slot's length) is the earliest length that truncate will still be asked for, a promise even when
  // the call throws: rows before the windows at that length are given back once the work queued in the slot's streams
  // is done. Lengths never shrink here. `stream` is where the rows will be used, see use().
  void grow(Slots slots, std::size_t positions, std::size_t keep, Stream stream);
  // The same when it takes no driver call and no waiting; otherwise false, and nothing has changed.
  bool try_grow(Slots slots, std::size_t positions, std::size_t keep, Stream stream);
  // Asks for memory for `positions` rows without waiting for it; whether it is there. Without a mapper it is mapped
  // now.
  bool prefetch(std::size_t slot, std::size_t positions);
  // Notes that work on a slot is queued in `stream`, beside those that acquire() and grow() were told of.
  void use(std::size_t slot, Stream stream);

  // Shortens every named slot that is longer: all of them or, when it throws, none. Their memory stays mapped until
  // somebody needs it. Throws std::invalid_argument when a slot is shorter or a window has already passed.
  void truncate(Slots slots, std::size_t positions, Stream stream);

  // Parks every named slot: all of them or, when it throws, none. Before another stream uses their memory, and before
  // it is unmapped, the work queued so far in `stream` and in all streams that used the slot is waited for.
  void release(Slots slots, Stream stream);

  // Returns every byte to the driver that no running sequence needs.
  void trim();

  // Sets the budget; when it is lower, brings the memory beyond it back to the driver. Throws OutOfPages, and leaves
  // the budget as it was, when the running sequences need more.
  void set_budget(std::size_t bytes);

  // Waits until the mapper has nothing more to do for this arena than to wait for kernels.
  void settle() const;

  // Unmaps everything; the addresses stay reserved, and every later call but stats() and check() is refused.
  void close();

  Address base() const noexcept { return reservation_.base(); }
  std::size_t plane_offset(std::size_t plane) const { return geometry_.at(plane).offset; }
  std::size_t slot_stride(std::size_t plane) const { return geometry_.at(plane).stride; }
  std::size_t length(std::size_t slot) const;
  // Positions that grow can give a slot without waiting.
  std::size_t capacity(std::size_t slot) const;
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
    std::size_t rows;         // bytes of the rows of running sequences
    std::size_t spare;        // bytes of whole extents past what running sequences need, lookahead included
    std::uint64_t adopted;    // times a parked slot was taken over
    std::uint64_t hits;       // growths into memory that was mapped ahead
    std::uint64_t misses;     // growths that had to wait for memory
    std::uint64_t waited_ns;  // time that callers waited: for memory, for fences, for the mapper to let go of a slot
    std::uint64_t background_failures;  // work of the mapper that the driver refused; who needs it tries again
    std::size_t lookahead;              // positions, the longest of the running sequences
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
    std::size_t quiet = 0;         // the length up to which growth has nothing to note, see advance()
    std::size_t ahead_at = 0;      // the length past which more is asked of the mapper
    std::size_t hit_at = 0;        // the length past which memory was mapped ahead
    std::size_t lookahead = 0;     // positions
    std::size_t expected = 0;      // positions that acquire() was told of
    std::size_t wanted = 0;        // positions that prefetch() asked for
    bool asked = false;            // of the mapper, which has not come to it yet
    bool starved = false;          // there was no memory; asked again when there may be
    std::size_t asked_length = 0;
    Mapper::Clock::time_point asked_since{};
    std::uint64_t parked_at = 0;
    std::vector<Stream> streams;  // that used it since it was acquired
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
  // How much a running slot keeps when others look for memory.
  enum class Keep { rows, ahead, expected };
  using Lock = std::unique_lock<std::mutex>;
  using Clock = Mapper::Clock;
  class Hold;
  class Waiting;

  Slot& running(std::size_t slot, const char* what);
  static bool has_nothing(const Slot& slot) noexcept;
  Lock locked() const;
  void require_open() const;
  void require_possible(std::size_t positions) const;
  Address address_of(std::size_t slot, std::size_t plane) const noexcept;
  std::size_t end_of(const Geometry& plane, std::size_t positions) const noexcept;
  std::size_t needed_end(const Slot& slot, std::size_t plane, Keep keep) const noexcept;
  std::size_t goal_of(const Slot& slot) const noexcept;
  std::size_t first_lookahead() const noexcept;
  void refresh(Slot& slot) noexcept;
  bool discard_due(const Slot& slot, std::size_t keep) const noexcept;
  bool grow_in_place(Slots slots, std::size_t positions, std::size_t keep, Stream stream);
  void advance(std::size_t index, std::size_t positions, Stream stream);
  void grow_with_driver(Slots slots, std::size_t positions, Stream stream);
  bool map_up_to(Slots slots, std::size_t positions, Urgency urgency, Lock& lock);
  std::vector<Step> plan(Slots slots, std::size_t positions, bool exact) const;
  std::size_t bytes_of(const std::vector<Step>& steps) const noexcept;
  std::vector<Loose> build(const std::vector<Step>& steps);
  Fences fences_of(Slots slots, Stream stream, Lock& lock);
  static void cover(Slot& slot, Stream stream, const Fences& fresh);
  void discard_before_windows(Slots slots, std::size_t keep, const Fences& fresh);
  bool clear_the_way(Slots slots, Urgency urgency, Lock& lock);
  void retire_run(Slot& slot, std::size_t index, std::size_t plane);
  bool reclaim(std::size_t bytes, const std::vector<Step>& wanted, Slots mine, Keep keep, Urgency urgency, Lock& lock);
  void strip(std::size_t slot, Keep keep, const std::function<bool(const Mapping&)>& wanted, std::size_t bytes,
             std::size_t& found, std::vector<Loose>& out);
  void unmap_last(std::vector<Loose>& loose);
  void unmap(std::vector<Loose>& loose);
  bool unmap_outside(std::vector<Loose> loose, Urgency urgency, Lock& lock);
  void wait_until_idle(Lock& lock) const;

  void on_mapper(const std::function<void()>& work);
  void ask(std::size_t index);
  void ask_again();
  void map_ahead();
  void keep_house();
  void post_housekeeping(Clock::duration delay);

  const std::shared_ptr<Driver> driver_;
  const std::shared_ptr<Mapper> mapper_;  // none: everything happens in the callers' threads
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
  std::deque<std::size_t> asked_;  // slots, first come first served
  bool ahead_posted_ = false;
  bool housekeeping_posted_ = false;
  Clock::duration housekeeping_delay_{};
  std::optional<std::size_t> stocked_class_;  // of the extents that growth has just taken
  double map_seconds_ = 0;                    // from asking the mapper to having the memory, lately
  std::uint64_t adopted_ = 0;
  std::uint64_t hits_ = 0;
  std::uint64_t background_failures_ = 0;
  std::atomic<std::uint64_t> misses_{0};
  std::atomic<std::uint64_t> waited_ns_{0};
};

}  // namespace vattn
