// Lets every allocation of a scenario fail once. The call then throws std::bad_alloc or handles the failure. Afterwards
// the arena's invariants hold, and the same scenario succeeds. Rows contain marks, which reveal memory that has two
// owners or was lost.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "sequence.hpp"

namespace {

// When this is k > 0, the k-th allocation from now on fails, in whichever thread it happens. Otherwise none fails.
std::atomic<long> fail_in{0};

void* allocate(std::size_t bytes) {
  if (fail_in.load() > 0 && fail_in.fetch_sub(1) == 1) throw std::bad_alloc();
  if (void* const at = std::malloc(bytes)) return at;
  throw std::bad_alloc();
}

}  // namespace

void* operator new(std::size_t bytes) { return allocate(bytes); }
void* operator new[](std::size_t bytes) { return allocate(bytes); }
void operator delete(void* at) noexcept { std::free(at); }
void operator delete[](void* at) noexcept { std::free(at); }
void operator delete(void* at, std::size_t) noexcept { std::free(at); }
void operator delete[](void* at, std::size_t) noexcept { std::free(at); }

using namespace vattn;

namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kRow = 512;
constexpr std::size_t kWindow = 20;
constexpr std::size_t kBudget = 100 * kPage;
constexpr Stream kStream{0};

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "allocations: %s\n", what);
  std::abort();
}

std::uint64_t* row_of(const Arena& arena, std::size_t slot, std::size_t position) {
  return reinterpret_cast<std::uint64_t*>(arena.base() + arena.plane_offset(0) + slot * arena.slot_stride(0) +
                                          position * kRow);
}

void write(const Arena& arena, std::size_t slot, std::size_t first, std::size_t end, std::uint64_t mark) {
  for (std::size_t position = first; position < end; ++position) *row_of(arena, slot, position) = mark + position;
}

void require_rows(const Arena& arena, std::size_t slot, std::size_t end, std::uint64_t mark) {
  for (std::size_t position = 0; position < end; ++position)
    require(*row_of(arena, slot, position) == mark + position, "a row is not what was written");
}

void grow(Arena& arena, std::size_t slot, std::size_t positions) {
  const std::size_t min_truncate_length = arena.length(slot);
  arena.grow(Arena::Slots(&slot, 1), PerSlot(positions), PerSlot(min_truncate_length), kStream);
}

// A sequence that stays open during the whole scenario. Its rows are checked at the end, whatever has failed.
struct Kept {
  std::size_t slot;
  std::size_t length;
  std::uint64_t mark;
};

// Forks of one sequence take the slots of forks of another, and keep what these have behind the shared rows.
void take_over(const std::shared_ptr<Arena>& shared) {
  Arena& arena = *shared;
  std::vector<std::shared_ptr<Sequence>> sources;
  for (const std::uint64_t mark : {1000, 5000}) {
    sources.push_back(std::make_shared<Sequence>(shared, std::nullopt, 0, kStream, false, std::nullopt));
    sources.back()->extend(64, kStream);
    write(arena, *sources.back()->slot(), 0, 64, mark);
  }
  const std::size_t source = *sources.back()->slot();
  std::vector<std::size_t> slots;
  {
    std::vector<std::shared_ptr<Sequence>> old;
    for (int i = 0; i < 2; ++i) {
      old.push_back(std::make_shared<Sequence>(shared, std::nullopt, 0, kStream, true, source, 64));
      const std::size_t name = old.back()->name();
      require(arena.fork(source, std::nullopt, 64, Arena::Slots(&name, 1), Share::alias, kStream), "no fork");
      for (std::size_t length = 66; length <= 80; length += 2) grow(arena, name, length);
      arena.commit(name, 80);
      slots.push_back(*old.back()->slot());
    }
  }
  std::vector<std::shared_ptr<Sequence>> forks;
  std::vector<std::size_t> names;
  const std::size_t first = *sources.front()->slot();
  for (const std::size_t slot : slots) {
    forks.push_back(std::make_shared<Sequence>(shared, slot, 80, kStream, false, first, 64));
    names.push_back(forks.back()->name());
  }
  require(arena.fork(first, std::nullopt, 64, names, Share::alias, kStream), "no fork");
  arena.side_by_side(names);
  for (const auto& fork : forks) {
    grow(arena, fork->name(), 80);
    write(arena, *fork->slot(), 64, 80, 1000);
    require_rows(arena, *fork->slot(), 80, 1000);
  }
  require_rows(arena, source, 64, 5000);
}

// Makes the calls whose allocations are to fail, one after the other.
void scenario(const std::shared_ptr<Arena>& shared, const Kept& kept) {
  Arena& arena = *shared;
  take_over(shared);
  Sequence a(shared, std::nullopt, 0, kStream, false, std::nullopt);
  const std::size_t first = *a.slot();
  a.extend(70, kStream);
  write(arena, first, 0, 70, 1000);
  std::vector<std::shared_ptr<Sequence>> forks;
  for (const Share share : {Share::alias, Share::copy}) {
    forks.push_back(std::make_shared<Sequence>(shared, std::nullopt, 0, kStream, true, std::nullopt));
    const std::size_t name = forks.back()->name();
    require(arena.fork(first, std::nullopt, 60, Arena::Slots(&name, 1), share, kStream), "no fork");
    require_rows(arena, *forks.back()->slot(), 60, 1000);
  }
  const std::size_t fork = forks.front()->name();
  arena.truncate(Arena::Slots(&fork, 1), 50, kStream);
  grow(arena, fork, 90);
  write(arena, *forks.front()->slot(), 50, 90, 1000);
  require_rows(arena, first, 70, 1000);
  arena.copy_on_write(Arena::Slots(&fork, 1), 0, kStream);
  require_rows(arena, *forks.front()->slot(), 90, 1000);
  arena.compact(first, 64);
  require_rows(arena, first, 70, 1000);
  forks.back()->swap_out(kStream);
  forks.back()->swap_in(std::nullopt, kStream);
  require_rows(arena, *forks.back()->slot(), 60, 1000);
  // Two forks of one sequence: what they share is copied to host memory once, and is shared again after swapping in.
  std::vector<std::shared_ptr<Sequence>> family;
  for (int i = 0; i < 2; ++i) {
    family.push_back(std::make_shared<Sequence>(shared, std::nullopt, 0, kStream, true, std::nullopt));
    const std::size_t name = family.back()->name();
    require(arena.fork(first, std::nullopt, 68, Arena::Slots(&name, 1), Share::alias, kStream), "no fork");
  }
  for (const auto& one : family) one->swap_out(kStream);
  for (const auto& one : family) {
    one->swap_in(std::nullopt, kStream);
    require_rows(arena, *one->slot(), 68, 1000);
  }
  family.clear();
  for (std::size_t length = 71; length < 120; ++length) grow(arena, first, length);
  const Arena::CachedPrefix known = arena.commit(a.name(), 60);
  Sequence::close({&a}, kStream);
  if (arena.resume(first, known.generation, 40, kStream)) {
    Sequence resumed(shared, first);
    require_rows(arena, first, 40, 1000);
  }
  arena.prefetch(kept.slot, kept.length + 10);
  arena.set_budget(60 * kPage);
  arena.set_budget(kBudget);
  std::vector<std::shared_ptr<Sequence>> many;
  std::vector<std::size_t> names;
  for (int i = 0; i < 3; ++i) {
    many.push_back(std::make_shared<Sequence>(shared, std::nullopt, 30, kStream, false, std::nullopt));
    names.push_back(many.back()->name());
  }
  const std::vector<std::size_t> lengths{10, 20, 30};
  const std::size_t none = 0;
  arena.grow(names, PerSlot(std::span<const std::size_t>(lengths)), PerSlot(none), kStream);
  Sequence::close({many[0].get(), many[1].get(), many[2].get()}, kStream);
  require(arena.map().size() == 8, "not all slots");
  arena.stats();
  arena.trim();
}

// Runs the scenario with the k-th allocation failing, for every k. Returns the number of allocations that failed.
long sweep(bool with_mapper) {
  for (long k = 1;; ++k) {
    const auto driver = make_host_driver(kPage, 0, false);
    const auto mapper = with_mapper ? std::make_shared<Mapper>() : nullptr;
    const ArenaOptions options{.slots = 8, .max_len = 200, .budget = kBudget};
    const auto arena = std::make_shared<Arena>(driver, std::vector<Plane>{{kRow, 0}, {kRow, kWindow}}, options, mapper);
    const Kept kept{arena->acquire(std::nullopt, 0, kStream), 40, 7'000'000};
    grow(*arena, kept.slot, kept.length);
    write(*arena, kept.slot, 0, kept.length, kept.mark);
    arena->wait_idle();
    fail_in = k;
    try {
      scenario(arena, kept);
    } catch (const std::bad_alloc&) {
    }
    const bool through = fail_in.exchange(0) > 0;
    arena->check();
    require_rows(*arena, kept.slot, kept.length, kept.mark);
    // Every sequence of the scenario has ended with its owner, whatever has failed.
    require(arena->running_slots() == 1, "a slot was lost");
    arena->set_budget(kBudget);
    scenario(arena, kept);
    arena->check();
    require_rows(*arena, kept.slot, kept.length, kept.mark);
    arena->close();
    require(arena->stats().physical == 0, "memory was lost");
    require(arena->stats().host + arena->stats().host_pooled == 0, "host memory was lost");
    if (through) return k - 1;
  }
}

}  // namespace

int main() {
  std::printf("allocations: each of %ld failed once without a mapper\n", sweep(false));
  std::printf("allocations: each of %ld failed once with one\n", sweep(true));
  return 0;
}
