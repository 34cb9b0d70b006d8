// The arena: slots over one address reservation, with physical memory that follows the length of each sequence.
//
// A slot is the address range of one sequence. Its rows lie in one or more planes. A plane holds `row_bytes` for every
// position, so that a plane's part of a slot is contiguous. The reservation is laid out as
//     plane 0: slot 0, slot 1, ...   plane 1: slot 0, slot 1, ...   ...
// and each slot of a plane is padded to the granularity. In each plane a slot has one run of mappings, which covers the
// bytes [head, tail) counted from the slot's start. The head is 0 unless the plane has a window: then the arena gives
// back the memory that lies before the window at the earliest length that the sequence may still be truncated to.
//
// A slot is bare (nothing is mapped), running (a sequence uses it) or parked (it has no sequence, but its memory is
// still mapped, so that a new sequence can adopt it without a driver call). A mapping that no sequence needs any more,
// but that a kernel may still read, becomes a deferred unmap: once its fences have passed it is unmapped, and its
// extent returns to the pool.
//
// Slots can share memory. A fork maps the extents that lie wholly within its first rows a second time, and copies the
// rows behind them. An extent that is mapped more than once is never written (invariant 4): a slot that was truncated
// into a shared extent gets a private copy of it (copy on write) before it grows. A parked slot may still hold a cached
// prefix, the first rows of its last sequence. A new sequence can then continue behind these rows, in the same slot
// or in a fork of it.
//
// A sequence is identified by its name: the number of its slot in the low kSlotBits bits and, in the bits above, the
// time on the arena's clock at which the sequence began. So a sequence that has ended is not mistaken for the next one
// in its slot. A plain slot number, with zeros above, names whatever sequence the slot has.
//
// Locking: the mutex guards all state and is not held during driver calls. The exception is a failed allocation: where
// there is no memory to note a deferred unmap, the arena waits for its fences and unmaps it at once, under the mutex. A
// function that needs the driver locks the slots concerned (SlotLock, which sets Slot::locked) and frees the mutex for
// the call. Other threads that need these slots wait, and reclaiming skips locked slots. Growth within mapped memory
// locks no slot and waits for nothing but the mutex.
//
// With a mapper, memory is mapped, unmapped, created and released on the mapper thread, either ahead of the sequences
// that grow or while a caller waits; only import_rows() and close() work in the caller's thread. Without a mapper,
// everything happens in the caller's thread.
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
#include <utility>
#include <vector>

#include "extent_pool.hpp"
#include "host_pool.hpp"
#include "mapper.hpp"
#include "slot_set.hpp"
#include "stats.hpp"

namespace vattn {

struct Plane {
  std::size_t row_bytes;  // bytes of one position
  // The number of positions that a query sees, its own included; 0 when it sees all.
  std::size_t window = 0;
};

struct ArenaOptions {
  std::size_t slots;
  std::size_t max_len;  // positions of a slot
  std::size_t budget;   // bytes of physical memory
  // The number of rows past the length that kernels may load. They are kept mapped and finite (invariant 2).
  std::size_t tail_rows = 0;
  // A growing run takes extents of up to 1/growth_divisor of the bytes that it has, so that at most this part of it is
  // unused.
  std::size_t growth_divisor = 32;
  // The number of positions past its length up to which the mapper keeps a running sequence mapped. By default it is
  // twice what the sequence grows in the time that mapping takes. The default's lower limit, and its value for a new
  // sequence, is one granule's positions in the plane with the largest rows, but at least 1 and at most 64 positions.
  // Its upper limit is 1/growth_divisor of the sequence's unshared rows, where that lies between 4 and 64 times the
  // lower limit, and else the nearer of these two.
  std::optional<std::size_t> lookahead = std::nullopt;
  // The number of mappings on the device beyond which forks copy rows instead of mapping extents again. By default
  // three quarters of the number that the driver supports.
  std::optional<std::size_t> alias_limit = std::nullopt;
  std::size_t host_budget = std::numeric_limits<std::size_t>::max();  // bytes of host memory for swapping
  // Whether shared extents are mapped read-only, so that a write to them faults. For debugging.
  bool protect_shared = false;
};

// How a fork gets its rows: by mapping the extents that hold them again (alias), by copying them into memory of its
// own (copy), or in the way that costs less (cheapest).
enum class Share { cheapest, alias, copy };

// A copy in host memory of extents that several sequences share. All of these sequences that are swapped out use the
// same copy. The arena's mutex guards it. Its destructor returns the blocks to their pool.
struct HostCopy {
  struct Piece {
    std::size_t offset;
    std::size_t bytes;
    // The extent that has the same bytes on the device. It counts only as long as its `host_copy` refers to this copy.
    std::weak_ptr<Extent> extent;
  };
  ~HostCopy();
  // Records that an extent has the bytes of a piece on the device. Does nothing when the piece has a linked extent.
  static void link(const std::shared_ptr<HostCopy>& copy, std::size_t piece,
                   const std::shared_ptr<Extent>& extent) noexcept;
  // Returns the extent that has the bytes of a piece on the device, or null when there is none any more.
  static std::shared_ptr<Extent> linked(const std::shared_ptr<HostCopy>& copy, std::size_t piece) noexcept;

  std::shared_ptr<HostPool> pool;
  std::vector<Piece> pieces;
  std::vector<HostBlock> blocks;
  Fences last;  // the fences of the transfers that use the blocks
};

// A sequence that is swapped out to host memory. Its destructor returns the blocks to their pool.
struct Swapped {
  // An extent of the sequence that other sequences have or had too: a piece of a HostCopy.
  struct Shared {
    std::shared_ptr<HostCopy> copy;
    std::size_t piece;
    const HostCopy::Piece& in_copy() const { return copy->pieces[piece]; }
  };
  // The rows of one plane: first the shared extents, from the head on, and behind them the unshared rows, which lie in
  // the sequence's own blocks.
  struct Part {
    std::size_t head;
    std::vector<Shared> shared;
    std::size_t begin;   // where the unshared rows begin, in bytes from the slot's start
    std::size_t bytes;   // the size of the unshared rows
    std::size_t offset;  // where the unshared rows begin in the blocks
  };
  ~Swapped();
  // Returns whether the transfers that use the blocks are done.
  bool done() const;

  std::shared_ptr<HostPool> pool;
  std::size_t length = 0;
  std::vector<Part> parts;
  std::vector<HostBlock> blocks;
  mutable std::mutex mutex;          // guards `last`, which done() may read while swap_in() replaces it
  Fences last;                       // the fences of the transfers that use the blocks
  std::atomic<bool> claimed{false};  // set by the thread that swaps the sequence in, so that only one does
};

// One number for each of several slots, or a single number for all of them.
class PerSlot {
 public:
  PerSlot(const std::size_t& all) noexcept : values_(&all, 1) {}
  PerSlot(std::span<const std::size_t> values) noexcept : values_(values) {}
  std::size_t operator[](std::size_t index) const noexcept { return values_[values_.size() == 1 ? 0 : index]; }
  // Returns whether there is a single number, or exactly one for each of `count` slots.
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

  // Starts an empty sequence and returns the number of its slot. With `slot` it is that one; otherwise the arena
  // chooses among the parked and bare slots, by the first of these criteria in which they differ:
  //   1. Where `like`, a slot that is to be forked at `positions`, is given: a slot whose cached prefix lies wholly in
  //      extents that it shares with `like`.
  //   2. A slot without a cached prefix; among slots with one, the slot that was parked or forked from longest ago.
  //   3. When nothing is expected and `empty` is false: a parked slot before a bare one.
  //   4. The slot whose memory is nearest to what `expected` positions need, where missing bytes count twice. So with
  //      `empty` and nothing expected it is the slot with the least memory.
  // Where memory for `expected` positions would be taken from slots with a cached prefix, it may be one of these, see
  // rather_remembered(). With `like` the slot keeps all of its mappings until fork() decides which are of use.
  // Waits for what was queued on streams other than `stream` with the slot's memory. Throws std::invalid_argument when
  // `slot` does not exist or is in use, or when all slots are in use.
  std::size_t acquire(std::optional<std::size_t> slot, std::size_t expected, Stream stream, bool empty = false,
                      std::optional<std::size_t> like = std::nullopt, std::size_t positions = 0);

  // Makes `positions` rows, and the tail rows behind them, usable in every named slot: in all of them or, when this
  // throws, in none. Lengths never shrink here. `stream` is where the rows will be used, see use().
  //
  // `min_truncate_length` is the earliest length that truncate will still be asked for; a value above a slot's present
  // length counts as that length. It is a promise even when this throws: the rows before the windows at that length are
  // given back once the work queued in the slot's streams is done.
  //
  // Throws SequenceTooLong for more than max_len positions, naming the first sequence concerned, BudgetExceeded or
  // DriverError when there is no memory, and std::invalid_argument when a slot has no such sequence.
  void grow(Slots names, PerSlot positions, PerSlot min_truncate_length, Stream stream);
  // Grows as grow() does if that takes no driver call and no waiting. Otherwise returns false and changes nothing.
  bool try_grow(Slots names, PerSlot positions, PerSlot min_truncate_length, Stream stream);
  // Makes `count` more rows of a slot usable and returns the new length. The length before is the
  // `min_truncate_length`. When several threads call this at once, each gets rows of its own. Throws as grow() does.
  std::size_t extend(std::size_t name, std::size_t count, Stream stream);
  // Extends as extend() does if that takes no driver call and no waiting. Otherwise returns std::nullopt and changes
  // nothing. Throws SequenceTooLong.
  std::optional<std::size_t> try_extend(std::size_t name, std::size_t count, Stream stream);
  // Asks the mapper for memory for `positions` rows, without waiting for it. Returns whether the memory is mapped
  // already. Without a mapper this maps the memory before it returns. Until the sequence is truncated or ends, the
  // memory counts as needed.
  bool prefetch(std::size_t slot, std::size_t positions);
  // Notes that work on a slot is queued in `stream`, in addition to the streams that acquire() and grow() were given.
  void use(std::size_t slot, Stream stream);

  // Shortens every named slot to `positions`: all of them or, when this throws, none. The memory stays mapped until it
  // is needed elsewhere. Throws std::invalid_argument when a slot is shorter, or when a window has passed and the rows
  // that it needs at `positions` are given back.
  void truncate(Slots slots, std::size_t positions, Stream stream);

  // Ends the sequences of the named slots and parks the slots: all of them or, when this throws, none. Before another
  // stream uses their memory, and before the memory is unmapped, the arena waits for the work queued so far in `stream`
  // and in all streams that used the slot.
  void release(Slots slots, Stream stream);

  // Releases a sequence for callers that cannot handle an error, such as destructors: tries several times and reports
  // what the driver refuses. Does nothing when the sequence has ended, the arena is closed, or in a forked child.
  void abandon(std::size_t name) noexcept;

  // The first rows of a slot that other sequences may continue from.
  struct CachedPrefix {
    std::uint64_t generation;  // identifies the contents: acquire() gives each new sequence another generation
    std::size_t positions;
    bool parked;
  };
  // Declares that the writes of a running slot's first rows are done or queued in its streams, and that these rows do
  // not change until the sequence is truncated. They may be forked from now on, also once the slot is parked, until
  // their memory is needed elsewhere. Throws std::invalid_argument when the sequence is shorter.
  CachedPrefix commit(std::size_t slot, std::size_t positions);
  CachedPrefix cached_prefix(std::size_t slot) const;
  // Forgets the cached prefix of a slot, if it is of that generation. Nothing else is changed of a running slot; a
  // parked one gives up the mappings that it cannot write to.
  void forget(std::size_t slot, std::uint64_t generation);
  // Starts a sequence in a parked slot, behind the first `positions` rows of its cached prefix, with the rest of the
  // slot's memory to grow into; nothing is mapped or copied. Waits for what was queued on other streams with the slot's
  // memory. Returns false when the slot is not parked or the rows are not there any more.
  bool resume(std::size_t slot, std::uint64_t generation, std::size_t positions, Stream stream);
  // Notes how many positions a running sequence will probably need, as the argument `expected` of acquire() does. Up to
  // `prompt` positions are mapped in few large extents all the same, which are cheap to share.
  void expect(std::size_t name, std::size_t positions, std::size_t prompt);
  // Gives the targets, which must be running and of length 0, the first `positions` rows of a slot: all of them or,
  // when this throws, none. Without a generation the source must be a running sequence. With one, the source is a
  // running or parked slot whose cached prefix of that generation contains the rows. The source's extents that lie
  // wholly within the rows are shared (a target keeps those that it has mapped already), and the rows behind them are
  // copied in `stream`. Returns false when the source does not have the rows of that generation any more. Throws
  // std::invalid_argument when a running source does not have the rows or a target is not empty, BudgetExceeded, and
  // DriverError.
  bool fork(std::size_t source, std::optional<std::uint64_t> generation, std::size_t positions, Slots targets,
            Share share, Stream stream);
  // Replaces the shared extents of running slots that reach past their first `positions` rows by private copies with
  // the same contents. When this throws, no row has changed.
  void copy_on_write(Slots slots, std::size_t positions, Stream stream);
  // Moves the whole granules of a running slot's first rows, in each plane, into one extent of exactly their size, so
  // that a fork at `positions` shares them with one mapping. Planes with a window are left as they are.
  void compact(std::size_t slot, std::size_t positions);
  // Asks the mapper to do the same later for a parked slot with a cached prefix of that generation, where there is
  // memory to spare. Where the rows lie in few extents already, only the last of these is split, so that one ends with
  // the last whole granule. Does nothing without a mapper.
  void compact_later(std::size_t slot, std::uint64_t generation, std::size_t positions);

  // Moves a running sequence's rows to host memory and ends its use of the slot. The transfer runs asynchronously,
  // after what was queued in the slot's streams; the slot's memory is free once it is done. When this throws, nothing
  // has changed.
  std::shared_ptr<Swapped> swap_out(std::size_t slot, Stream stream);
  // Moves the rows back, into a slot that acquire() gives, and returns the slot's number. What is queued in `stream`
  // from now on runs after the transfer. When this throws, the sequence is still swapped out.
  std::size_t swap_in(Swapped& swapped, std::optional<std::size_t> slot, Stream stream);

  struct ExportedExtent {
    std::size_t bytes;
    int descriptor;
  };
  struct ExportedRun {
    std::size_t head;
    std::vector<ExportedExtent> extents;
  };
  // Waits for what is queued in a running slot's streams, and returns the extents under its rows, with file descriptors
  // that the caller must close. These extents are never written or pooled again.
  std::vector<ExportedRun> export_rows(std::size_t slot, Stream stream);
  // Maps the exported extents of another process, read-only, as the first rows of a running slot of length 0. The
  // caller may close the descriptors afterwards. Throws Error when the extents do not fit the layout or lack rows. When
  // this throws, the slot's length has not changed.
  void import_rows(std::size_t slot, std::size_t positions, const std::vector<ExportedRun>& runs);

  // Returns to the driver the extents that no running sequence needs, those of parked slots too, and the host memory
  // that is not in use.
  void trim();

  // Sets the budget. When the extents that exist have more bytes, returns the excess to the driver. Throws
  // BudgetExceeded, and leaves the budget as it was, when the running sequences need more.
  void set_budget(std::size_t bytes);

  // Waits until the mapper has no work for this arena except what it repeats later because kernels must finish first.
  void wait_idle() const;

  // Waits for the device and unmaps everything. The addresses stay reserved. Later calls that would change the arena
  // throw std::invalid_argument; try_grow(), try_extend(), abandon() and compact_later() do nothing instead. Calls that
  // only read the arena's state still work.
  void close();
  bool closed() const;
  // Returns whether a range of bytes lies within one run of one slot, so that it may be read. `offset` is counted from
  // base().
  bool readable(std::size_t offset, std::size_t bytes) const;

  Address base() const noexcept { return reservation_.base(); }
  std::size_t plane_offset(std::size_t plane) const { return geometry_.at(plane).offset; }
  std::size_t slot_stride(std::size_t plane) const { return geometry_.at(plane).stride; }
  // Returns the length of a sequence, or 0 when it has ended.
  std::size_t length(std::size_t name) const;
  // Returns the name of the sequence that a slot has, or had last.
  std::size_t name(std::size_t slot) const;
  // Returns up to how many positions a slot can grow within its mapped memory.
  std::size_t capacity(std::size_t slot) const;
  // Returns how many bytes at the start of a slot are given back because a window has passed them.
  std::size_t head(std::size_t slot, std::size_t plane) const;
  const std::shared_ptr<Driver>& driver() const noexcept { return driver_; }

  enum class State { bare, running, parked };
  struct RunInfo {
    std::size_t offset;                // the distance of the run's first byte from base()
    std::size_t head;                  // in bytes from the slot's start
    std::size_t tail;                  // likewise
    std::vector<std::size_t> extents;  // the bytes of each, in address order
    std::vector<bool> shared;  // for each extent, whether it must not be written: mapped twice, exported or read-only
  };
  struct SlotInfo {
    State state;
    std::size_t length;
    std::size_t deferred;  // bytes of its deferred unmaps
    std::vector<RunInfo> runs;
  };
  // Returns the state and the mappings of every slot.
  std::vector<SlotInfo> map() const;
  // Returns the number of slots that have a sequence.
  std::size_t running_slots() const;
  // Returns the first of `count` adjacent slots without a sequence, the highest there are, or std::nullopt.
  std::optional<std::size_t> free_slots(std::size_t count) const;
  // Returns how many adjacent slots, from `slot` on, have no sequence.
  std::size_t free_slots_from(std::size_t slot) const;
  // Returns whether a write to what these running slots have mapped past their first `positions` rows could be seen by
  // another sequence, running, parked or swapped out, or by another process. An extent that is mapped read-only counts.
  bool shares(Slots names, std::size_t positions) const;
  // Returns the numbers 0 to n - 1 of n slots, so that those that map the same extents first stand side by side. Slots
  // that share nothing keep their order. The first plane counts.
  std::vector<std::size_t> side_by_side(Slots names) const;
  // Returns how many rows fit in the extents of a running slot that it must not write: in the plane without a window
  // where that is fewest, or the largest std::size_t when all planes have a window.
  std::size_t rows_in_shared(std::size_t name) const;

  Stats stats() const;

  // Recounts everything, and throws InvariantBroken when a count, an address or a state is wrong.
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
  // A mapping outside of its run. It either waits to be unmapped once its fences have passed, or is new and not yet
  // added to its run.
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
    std::size_t capacity = 0;      // positions that are usable as mapped
    std::size_t next_discard = 0;  // the smallest min_truncate_length at which a window gives a mapping back
    // Lengths at which growth has something to do, see advance().
    std::size_t quiet = 0;      // up to this length growth has nothing to do: the smaller of the next two
    std::size_t ahead_at = 0;   // past this length the mapper is asked for more memory
    std::size_t hit_at = 0;     // past this length the memory was mapped ahead
    std::size_t lookahead = 0;  // positions past its length that it is kept mapped
    std::size_t expected = 0;   // positions that the sequence will probably need, by acquire() or expect()
    std::size_t prompt = 0;     // positions that are mapped in few large extents, by expect()
    std::size_t wanted = 0;     // positions that prefetch() asked for
    bool asked = false;         // whether it waits in asked_ for the mapper
    bool starved = false;       // whether the mapper found no memory for it; it is asked again when there may be some
    std::size_t asked_length = 0;             // its length when the mapper was last asked
    Mapper::Clock::time_point asked_since{};  // when that was
    std::uint64_t parked_at = 0;              // when the slot was parked, or forked from while parked, by clock_
    std::uint64_t generation = 0;             // of the rows: of the last sequence that acquire() started here
    std::uint64_t started_at = 0;             // when the last sequence was started or resumed here, by clock_
    std::size_t cached = 0;                   // positions of the cached prefix
    std::vector<Stream> streams;              // the streams that used the slot since its sequence was started
    Fences fences;                            // the latest fence recorded in each stream that used the slot
    std::vector<Run> runs;
    std::vector<DeferredUnmap> deferred;
  };
  // An extent that is to be mapped.
  struct Step {
    std::size_t slot;
    std::size_t plane;
    Address at;
    std::size_t bytes;
  };
  // Which mappings of a run stay when a fork takes its slot: the first `shared`, which are also the source's, and those
  // from `begin` up to `end`, which begin where what the fork shares ends, and may be written.
  struct Kept {
    std::size_t shared;
    std::size_t begin;
    std::size_t end;
  };
  // What a running slot keeps when memory is taken from it: its rows and what prefetch() asked for; that and its
  // lookahead; or also what it is expected to need.
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
  std::pair<std::size_t, std::size_t> misfit(const Slot& slot, std::size_t expected, const Slot* like,
                                             std::size_t positions) const noexcept;
  std::size_t rather_remembered(std::size_t chosen, std::size_t expected, const Slot* like,
                                std::size_t positions) const;
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
  static std::size_t writable_until(const Run& run, std::size_t first) noexcept;
  static std::size_t bytes_of(const Run& run, std::size_t first, std::size_t end) noexcept;
  Kept kept(const Slot& source, const Slot& target, std::size_t plane, std::size_t positions) const noexcept;
  bool better_aliased(const Slot& source, const Slot& target, std::size_t positions) const;
  void split_for_forks(std::size_t source, std::size_t positions, std::size_t forks, Slots mine, Lock& lock);
  void share_runs(std::size_t source, std::size_t positions, Slots targets, Slots aliased, Lock& lock);
  void make_way(std::size_t source, std::size_t positions, Slots targets, Slots aliased,
                std::vector<DeferredUnmap>& behind);
  void alias(std::size_t source, std::size_t plane, std::size_t positions, Slots targets,
             const std::vector<DeferredUnmap>& behind, Lock& lock);
  void give_up_past(Slots slots, std::size_t positions) noexcept;
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
  const std::shared_ptr<Mapper> mapper_;  // null when everything happens in the callers' threads
  const ArenaOptions options_;
  std::vector<Geometry> geometry_;
  // Members are destroyed from the last to the first: first the mappings, then the pooled extents, then the addresses.
  Reservation reservation_;
  ExtentPool pool_;
  const std::shared_ptr<HostPool> host_;
  mutable std::mutex mutex_;
  mutable std::condition_variable released_;  // notified when slots are unlocked and when a reclaim() is done
  // The last one is the scratch slot, at whose addresses extents are filled before they replace others. No sequence
  // uses it, and it is in none of the sets below.
  std::vector<Slot> slots_;
  SlotSet bare_;
  SlotSet parked_;
  SlotSet starved_;  // contains all running slots with Slot::starved, and perhaps others
  bool closed_ = false;
  int reclaiming_ = 0;             // the number of reclaim() calls that are unmapping
  std::uint64_t clock_ = 0;        // counts events, to order them in time
  std::deque<std::size_t> asked_;  // slots for which the mapper is to map ahead, first come, first served
  bool ahead_posted_ = false;
  bool housekeeping_posted_ = false;
  Clock::duration housekeeping_delay_{};
  std::optional<std::size_t> stocked_class_;  // the size class that growth took last, for maintenance to keep in stock
  // Seconds from asking the mapper until the memory was mapped: the last such time, or nine tenths of the value before
  // if that is more.
  double map_seconds_ = 0;
  std::uint64_t adopted_ = 0;
  std::uint64_t aliases_ = 0;
  std::uint64_t copied_ = 0;
  std::uint64_t hits_ = 0;
  std::uint64_t background_failures_ = 0;
  std::atomic<std::uint64_t> misses_{0};
  std::atomic<std::uint64_t> waited_ns_{0};
};

}  // namespace vattn
