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
// Slots can share: a fork maps the extents that lie wholly within its first rows a second time, and copies the rows
// behind them. An extent that is mapped more than once is never written (invariant 4): a slot that was truncated into
// one gets its own before it grows. A parked slot may still be known to hold the first rows of its last sequence; then
// a new sequence can go on behind them, in this slot or in a fork of it.
//
// A sequence is named by its slot and, in the bits above that, by when it began: so one that has ended is not taken for
// the next one in its slot. The plain number of a slot names whatever sequence it has.
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
#include <limits>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "extent_pool.hpp"
#include "host_pool.hpp"
#include "mapper.hpp"
#include "slot_set.hpp"
#include "stats.hpp"

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
  // 64 of those, nor more than 1/growth_divisor of its length that it does not share and 4 of those.
  std::optional<std::size_t> lookahead = std::nullopt;
  // Mappings on the device beyond which forks copy. None: three quarters of what it takes.
  std::optional<std::size_t> alias_limit = std::nullopt;
  std::size_t host_budget = std::numeric_limits<std::size_t>::max();  // bytes of host memory to swap to
  // Maps what is shared read-only, so that a write to it faults: for debugging.
  bool protect_shared = false;
};

// How a fork comes to its rows: by mapping their extents again, or by copying them into memory of its own.
enum class Share { cheapest, alias, copy };

// The bytes of extents that several sequences share, copied to host memory once for all of those sequences that are
// swapped out. The arena's mutex guards it. Its destructor returns the blocks to their pool.
struct HostCopy {
  struct Piece {
    std::size_t offset;
    std::size_t bytes;
    std::weak_ptr<Extent> extent;  // that has the same bytes on the device, as long as it names this copy too
  };
  ~HostCopy();
  // Makes an extent the one that has the bytes of a piece.
  static void link(const std::shared_ptr<HostCopy>& copy, std::size_t piece,
                   const std::shared_ptr<Extent>& extent) noexcept;
  // The extent that has them, or none.
  static std::shared_ptr<Extent> linked(const std::shared_ptr<HostCopy>& copy, std::size_t piece) noexcept;

  std::shared_ptr<HostPool> pool;
  std::vector<Piece> pieces;
  std::vector<HostBlock> blocks;
  Fences last;  // of the copies that use the blocks
};

// A sequence in host memory. Its blocks go back to their pool with it.
struct Swapped {
  struct Shared {  // an extent of it that others have too, or had
    std::shared_ptr<HostCopy> copy;
    std::size_t piece;
    const HostCopy::Piece& in_copy() const { return copy->pieces[piece]; }
  };
  struct Part {  // of a plane
    std::size_t head;
    std::vector<Shared> shared;  // from the head on
    std::size_t begin;           // of its own rows, behind what is shared
    std::size_t bytes;           // of these
    std::size_t offset;          // of these in the blocks
  };
  ~Swapped();
  // Whether the copies have passed.
  bool done() const;

  std::shared_ptr<HostPool> pool;
  std::size_t length = 0;
  std::vector<Part> parts;
  std::vector<HostBlock> blocks;
  mutable std::mutex mutex;          // of what others may look at while it is swapped in
  Fences last;                       // of the copies that use the blocks
  std::atomic<bool> claimed{false};  // by who swaps it in
};

// A number for each of several slots, or one for all of them.
class PerSlot {
 public:
  PerSlot(const std::size_t& all) noexcept : values_(&all, 1) {}
  PerSlot(std::span<const std::size_t> values) noexcept : values_(values) {}
  std::size_t operator[](std::size_t index) const noexcept { return values_[values_.size() == 1 ? 0 : index]; }
  // Whether there is one for each of so many.
  bool serves(std::size_t count) const noexcept { return values_.size() == 1 || values_.size() == count; }

 private:
  std::span<const std::size_t> values_;
};

class Arena {
 public:
  using Slots = std::span<const std::size_t>;
  static constexpr unsigned kSlotBits = 24;
  static constexpr std::size_t slot_of(std::size_t name) noexcept { return name & ((std::size_t{1} << kSlotBits) - 1); }

  Arena(std::shared_ptr<Driver> driver, std::vector<Plane> planes, ArenaOptions options,
        std::shared_ptr<Mapper> mapper = nullptr);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Gives a slot to a sequence: `slot` if one is named, else the one whose memory is nearest to `expected` positions;
  // when nothing is expected, a parked one before a bare one; with `empty`, the one with the least memory. Slots that
  // are known to hold rows come last, the longest parked first; but before all others, with what it shares, one that is
  // known to hold nothing but what it shares with the slot `like`, which is to be forked. What was queued on other
  // streams than `stream` with the slot's memory is waited for.
  std::size_t acquire(std::optional<std::size_t> slot, std::size_t expected, Stream stream, bool empty = false,
                      std::optional<std::size_t> like = std::nullopt);

  // Makes `positions` rows (and the tail rows) of every named slot usable: all of them or, when it throws, none. What
  // is too long is told of the first.
  // `keep` (at most a slot's length) is the earliest length that truncate will still be asked for, a promise even when
  // the call throws: rows before the windows at that length are given back once the work queued in the slot's streams
  // is done. Lengths never shrink here. `stream` is where the rows will be used, see use().
  void grow(Slots names, PerSlot positions, PerSlot min_truncate_length, Stream stream);
  // The same when it takes no driver call and no waiting; otherwise false, and nothing has changed.
  bool try_grow(Slots names, PerSlot positions, PerSlot min_truncate_length, Stream stream);
  // Makes so many more rows of a slot usable, `keep` being its length before, and returns the new length. Several
  // callers at once each get their own rows.
  std::size_t extend(std::size_t name, std::size_t count, Stream stream);
  // The same when it takes no driver call and no waiting.
  std::optional<std::size_t> try_extend(std::size_t name, std::size_t count, Stream stream);
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

  // The same for who cannot be told of an error: nothing where the sequence has ended, or in a forked child.
  void abandon(std::size_t name) noexcept;

  // What a slot holds that others may go on from.
  struct CachedPrefix {
    std::uint64_t generation;  // names the sequence that wrote the rows: another one that starts there has another
    std::size_t positions;
    bool parked;
  };
  // Declares that a running slot's first rows are written, as far as its streams have come, and stay what they are
  // until it is truncated: they may be forked, also when it is parked, until somebody needs the memory.
  CachedPrefix commit(std::size_t slot, std::size_t positions);
  CachedPrefix cached_prefix(std::size_t slot) const;
  // Forgets what is known of a slot of that generation.
  void forget(std::size_t slot, std::uint64_t generation);
  // Lets a new sequence go on behind the first rows of a parked slot, with the rest of its memory to grow into, without
  // a driver call. False when they are not there any more.
  bool resume(std::size_t slot, std::uint64_t generation, std::size_t positions, Stream stream);
  // Notes that a running slot's sequence will most likely need so many positions, as acquire() is told.
  void expect(std::size_t name, std::size_t positions);
  // Gives every target, running and of length 0, the first rows of a slot: of a running one, or of one of the
  // generation that is known to hold them. Whole extents are shared (those that the target begins with already, as they
  // are), what lies behind the last of them is copied in `stream`: all or, when it throws, none. False when the rows
  // are not there any more.
  bool fork(std::size_t source, std::optional<std::uint64_t> generation, std::size_t positions, Slots targets,
            Share share, Stream stream);
  // Gives running slots memory of their own, with what is in it, behind their first rows. When it throws, no row has
  // changed.
  void copy_on_write(Slots slots, std::size_t positions, Stream stream);
  // Puts the whole granules of the first rows of a running slot into one extent of just their size in each plane, so
  // that a fork there shares them in one call. Planes with a window are left as they are.
  void compact(std::size_t slot, std::size_t positions);
  // Puts them into few extents, of which one ends there, for a parked slot of the generation, in the mapper's time and
  // where there is memory to spare. Without a mapper nothing.
  void compact_later(std::size_t slot, std::uint64_t generation, std::size_t positions);

  // Moves a running sequence's rows to host memory, while the caller goes on, and lets its slot go: its memory is free
  // once the copy is done. What was queued in its streams comes first. When it throws, nothing has changed.
  std::shared_ptr<Swapped> swap_out(std::size_t slot, Stream stream);
  // Moves them back, to a slot as acquire() gives it; what is queued in `stream` from now on comes after. When it
  // throws, they are still swapped out.
  std::size_t swap_in(Swapped& swapped, std::optional<std::size_t> slot, Stream stream);

  // The extents under a running slot's rows, with descriptors that are the caller's to close, once what is queued in
  // its streams is done. They are never written or pooled again.
  struct ExportedExtent {
    std::size_t bytes;
    int descriptor;
  };
  struct ExportedRun {
    std::size_t head;
    std::vector<ExportedExtent> extents;
  };
  std::vector<ExportedRun> export_rows(std::size_t slot, Stream stream);
  // Maps such extents of another process, read-only, as the first rows of a running slot that has none. The descriptors
  // may be closed afterwards. When it throws, nothing has changed.
  void import_rows(std::size_t slot, std::size_t positions, const std::vector<ExportedRun>& runs);

  // Returns every byte to the driver that no running sequence needs, and what host memory nobody uses.
  void trim();

  // Sets the budget; when it is lower, brings the memory beyond it back to the driver. Throws BudgetExceeded, and
  // leaves the budget as it was, when the running sequences need more.
  void set_budget(std::size_t bytes);

  // Waits until the mapper has nothing more to do for this arena than to wait for kernels.
  void wait_idle() const;

  // Unmaps everything; the addresses stay reserved, and every later call but stats() and check() is refused.
  void close();
  bool closed() const;
  // Whether all of some bytes, counted from base(), are mapped under sequences: those may be read.
  bool readable(std::size_t offset, std::size_t bytes) const;

  Address base() const noexcept { return reservation_.base(); }
  std::size_t plane_offset(std::size_t plane) const { return geometry_.at(plane).offset; }
  std::size_t slot_stride(std::size_t plane) const { return geometry_.at(plane).stride; }
  std::size_t length(std::size_t name) const;
  // Of the sequence that a slot has.
  std::size_t name(std::size_t slot) const;
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
    std::vector<bool> shared;          // whether others map it too, or it is still read-only
  };
  struct SlotInfo {
    State state;
    std::size_t length;
    std::size_t deferred;  // bytes
    std::vector<RunInfo> runs;
  };
  std::vector<SlotInfo> map() const;
  // How many slots have a sequence.
  std::size_t running_slots() const;
  // The first of so many slots side by side without a sequence, as far up as possible.
  std::optional<std::size_t> free_slots(std::size_t count) const;
  // How many slots side by side, from one on, have no sequence.
  std::size_t free_slots_from(std::size_t slot) const;
  // Whether something that running slots have mapped behind their first rows is shared.
  bool shares(Slots names, std::size_t positions) const;
  // Of a running slot's first rows those that lie in extents that it shares, in the plane where they are fewest; planes
  // with a window aside.
  std::size_t rows_in_shared(std::size_t name) const;

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
  struct DeferredUnmap {
    std::size_t slot;
    std::size_t plane;
    Mapping mapping;
    Fences fences;
  };
  struct Slot {
    State state = State::bare;
    bool locked = false;
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
    std::uint64_t parked_at = 0;   // or last forked from
    std::uint64_t generation = 0;  // of the last sequence that began here
    std::uint64_t started_at = 0;  // when the last sequence began here, or went on
    std::size_t cached = 0;        // positions of it that others may go on from
    std::vector<Stream> streams;   // that used it since it was acquired
    Fences fences;
    std::vector<Run> runs;
    std::vector<DeferredUnmap> deferred;
  };
  struct Step {
    std::size_t slot;
    std::size_t plane;
    Address at;
    std::size_t bytes;
  };
  // How much a running slot keeps when others look for memory.
  enum class Keep { rows, ahead, expected };
  using Lock = std::unique_lock<std::mutex>;
  using Clock = Mapper::Clock;
  class SlotLock;
  class Waiting;
  class Harvest;

  Slot& running(std::size_t name, const char* what);
  const Slot& running(std::size_t name, const char* what) const;
  void set_state(Slot& slot, State state) noexcept;
  bool is_running(std::size_t name) const noexcept;
  std::vector<std::size_t> running_slots(Slots names, const char* what);
  void begin(Slot& slot, std::size_t positions, Stream stream);
  void wait_for_others(Fences fences, Stream stream, Lock& lock);
  void drop_unwritable(Slot& slot, std::size_t index) noexcept;
  static bool has_nothing(const Slot& slot) noexcept;
  Lock locked() const;
  void require_open() const;
  std::string too_long(std::size_t positions) const;
  void require_possible(std::size_t positions, std::size_t before = 0) const;
  Address address_of(std::size_t slot, std::size_t plane) const noexcept;
  std::size_t end_of(const Geometry& plane, std::size_t positions) const noexcept;
  std::size_t usable_rows(std::size_t plane, std::size_t bytes) const noexcept;
  std::size_t needed_end(const Slot& slot, std::size_t plane, Keep keep) const noexcept;
  std::size_t goal_of(const Slot& slot) const noexcept;
  std::size_t first_lookahead() const noexcept;
  std::size_t widest_row() const noexcept;
  std::size_t shared_rows(const Slot& slot) const noexcept;
  void refresh(Slot& slot) noexcept;
  bool discard_due(const Slot& slot, std::size_t min_truncate_length) const noexcept;
  bool grow_in_place(Slots names, PerSlot positions, PerSlot min_truncate_length, Stream stream);
  void advance(std::size_t index, std::size_t positions, Stream stream);
  void grow_with_driver(Slots names, PerSlot positions, Stream stream);
  std::size_t extend_with_driver(std::size_t name, std::size_t count, Stream stream);
  std::optional<std::size_t> extend_in_place(std::size_t name, std::size_t count, Stream stream);
  bool discard_due_now(Slots names, PerSlot min_truncate_length, Stream stream, Lock& lock);
  bool map_up_to(Slots slots, PerSlot positions, Urgency urgency, Lock& lock);
  std::vector<Step> plan(Slots slots, PerSlot positions, bool exact) const;
  static std::size_t bytes_of(const std::vector<Step>& steps) noexcept;
  std::vector<DeferredUnmap> build(const std::vector<Step>& steps);
  std::vector<DeferredUnmap> build_on_demand(const std::vector<Step>& steps, Slots mine, Lock& lock);
  Fences fences_of(Slots slots, Stream stream, Lock& lock);
  static void cover(Slot& slot, Stream stream, const Fences& fresh);
  void discard_before_windows(Slots slots, PerSlot min_truncate_length, const Fences& fresh);
  bool clear_the_way(Slots slots, Urgency urgency, Lock& lock);
  bool fork_with_driver(std::size_t source, std::optional<std::uint64_t> generation, std::size_t positions,
                        Slots targets, Share share, Stream stream);
  bool has_rows(const Slot& slot, std::optional<std::uint64_t> generation, std::size_t positions) const noexcept;
  std::size_t sharable(const Slot& slot, std::size_t plane, std::size_t positions) const noexcept;
  static std::size_t common(const Run& one, const Run& other) noexcept;
  bool is_ready(const Slot& slot, const Slot& source) const noexcept;
  std::size_t kept(const Slot& source, const Slot& target, std::size_t plane, std::size_t positions) const noexcept;
  bool better_aliased(const Slot& source, const Slot& target, std::size_t positions) const;
  void split_for_forks(std::size_t source, std::size_t positions, std::size_t forks, Slots mine, Lock& lock);
  void share_runs(std::size_t source, std::size_t positions, Slots targets, Slots aliased, Lock& lock);
  void copy_rows(std::size_t source, std::size_t positions, Slots targets, Stream stream, Lock& lock);
  void post_compacting(std::size_t slot, std::uint64_t generation, std::size_t positions, Clock::duration delay);
  bool compact_with_driver(std::size_t slot, std::optional<std::uint64_t> generation, std::size_t positions,
                           std::size_t most);
  std::shared_ptr<Swapped> swap_out_as_it_is(std::size_t name, Stream stream);
  void swap_in_with_driver(Swapped& swapped, std::size_t slot, Stream stream);
  void bring_back(Swapped& swapped, std::size_t slot, Stream stream, Lock& lock);
  using Linked = std::vector<std::pair<Swapped::Shared, std::shared_ptr<Extent>>>;
  static Swapped::Part part_of(const Run& run, std::size_t end, const std::shared_ptr<HostCopy>& fresh, Linked& found);
  void bring_back_shared(const Swapped::Part& part, std::size_t slot, std::size_t plane, Stream in, Linked& found,
                         Lock& lock);
  void release_quietly(std::size_t name, Stream stream) noexcept;
  void own_with_driver(Slots slots, std::size_t positions, Stream stream);
  bool copy_shared(Slots slots, Urgency urgency, Lock& lock);
  void replace(std::size_t index, std::size_t plane, std::size_t first, std::size_t count,
               const std::vector<std::size_t>& sizes, std::size_t bytes, Slots mine, Lock& lock);
  void wait_quietly(const Fences& fences) const noexcept;
  void defer_unmap_of_run(Slot& slot, std::size_t index, std::size_t plane) noexcept;
  void defer_again(std::vector<DeferredUnmap>& loose) noexcept;
  void defer_unmap_from(Slot& slot, std::size_t index, std::size_t plane, std::size_t first) noexcept;
  bool reclaim(std::size_t bytes, const std::vector<Step>& wanted, Slots mine, Keep keep, Urgency urgency, Lock& lock);
  void collect(Harvest& harvest, const std::vector<Step>& wanted, Slots mine, Keep keep);
  void strip(std::size_t slot, Keep keep, const std::function<bool(const Mapping&)>& wanted, Harvest& harvest);
  void unmap_last(std::vector<DeferredUnmap>& loose);
  void unmap(std::vector<DeferredUnmap>& loose);
  bool unmap_outside(std::vector<DeferredUnmap> loose, Urgency urgency, Lock& lock);
  void wait_until_idle(Lock& lock) const;

  void on_mapper(const std::function<void()>& work);
  void ask(std::size_t index);
  void ask_again();
  void map_ahead();
  void run_maintenance();
  void post_maintenance(Clock::duration delay) noexcept;

  const std::shared_ptr<Driver> driver_;
  const std::shared_ptr<Mapper> mapper_;  // none: everything happens in the callers' threads
  const ArenaOptions options_;
  std::vector<Geometry> geometry_;
  // Destroyed from the last to the first: mappings, pooled extents, the addresses.
  Reservation reservation_;
  ExtentPool pool_;
  const std::shared_ptr<HostPool> host_;
  mutable std::mutex mutex_;
  mutable std::condition_variable released_;
  std::vector<Slot>
      slots_;     // and one more, the scratch: addresses at which extents are filled before they replace others
  SlotSet bare_;  // of the slots but the scratch
  SlotSet parked_;
  SlotSet starved_;  // those that have found no memory ahead, and perhaps others
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
  std::uint64_t aliases_ = 0;
  std::uint64_t copied_ = 0;
  std::uint64_t hits_ = 0;
  std::uint64_t background_failures_ = 0;
  std::atomic<std::uint64_t> misses_{0};
  std::atomic<std::uint64_t> waited_ns_{0};
};

}  // namespace vattn
