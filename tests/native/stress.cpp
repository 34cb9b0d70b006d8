// A stress test of one arena. Several threads grow, fork and close sequences, while another thread trims, changes the
// budget and checks the invariants. The budget is tight, and the driver sometimes fails. It runs without a mapper, and
// with one, where the process also forks. Every row contains the mark of its owner, which reveals memory that has two
// owners. The test is meant to run under sanitizers.
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "sequence.hpp"

using namespace vattn;

namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kRow = 512;
constexpr std::size_t kWindow = 20;
constexpr std::size_t kSlots = 10;
constexpr std::size_t kMaxLen = 200;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "stress: %s\n", what);
  std::abort();
}

struct Totals {
  std::atomic<long> grown{0};
  std::atomic<long> forked{0};
  std::atomic<long> out_of_pages{0};
  std::atomic<long> refused{0};
};

std::uint64_t* row_of(const Arena& arena, std::size_t plane, std::size_t slot, std::size_t position) {
  const Address at = arena.base() + arena.plane_offset(plane) + slot * arena.slot_stride(plane) + position * kRow;
  return reinterpret_cast<std::uint64_t*>(at);
}

void release(Arena& arena, Totals& totals, std::size_t slot) {
  for (;;) {
    try {
      arena.release(std::span(&slot, 1), Stream{0});
      return;
    } catch (const DriverError&) {
      ++totals.refused;
    }
  }
}

// Forks a sequence, writes to the fork behind the rows that it keeps, and checks that the shared rows of both are
// unchanged.
void fork_from(Arena& arena, Totals& totals, std::mt19937& random, std::size_t slot, std::size_t length,
               std::uint64_t mark) {
  const auto below = [&](std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random); };
  const auto require_rows = [&](std::size_t of, std::size_t count) {
    for (std::size_t position = 0; position < count; ++position)
      require(*row_of(arena, 0, of, position) == mark + position, "a shared row was overwritten");
  };
  // Some of the targets keep what their slots have mapped.
  const bool keeps = length % 2 == 0;
  const std::optional<std::size_t> like = keeps ? std::optional(Arena::slot_of(slot)) : std::nullopt;
  const std::size_t target = arena.acquire(std::nullopt, keeps ? length + 8 : 0, Stream{0}, !keeps, like, length);
  try {
    const std::array shares{Share::cheapest, Share::alias, Share::copy};
    require(arena.fork(slot, std::nullopt, length, std::span(&target, 1), shares[below(3)], Stream{0}), "no fork");
    ++totals.forked;
    require_rows(target, length);
    if (below(2) == 0) arena.compact(below(2) == 0 ? slot : target, below(length + 1));
    const std::size_t kept = below(2) == 0 && length < kWindow ? below(length + 1) : length;
    arena.truncate(std::span(&target, 1), kept, Stream{0});
    const std::size_t goal = std::min(kMaxLen, kept + 1 + below(20));
    arena.grow(std::span(&target, 1), goal, kept, Stream{0});
    for (std::size_t position = kept; position < goal; ++position)
      for (std::size_t plane = 0; plane < 2; ++plane) *row_of(arena, plane, target, position) = ~mark;
    require_rows(target, kept);
    if (below(2) == 0) arena.commit(target, goal);
  } catch (const BudgetExceeded&) {
    ++totals.out_of_pages;
  } catch (const DriverError&) {
    ++totals.refused;
  }
  require_rows(slot, length);
  release(arena, totals, target);
}

// Opens, grows, forks, truncates and closes `lives` sequences, one after the other, and checks their rows.
void live(Arena& arena, Totals& totals, unsigned seed, std::size_t lives) {
  std::mt19937 random(seed);
  const auto below = [&](std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random); };
  for (std::size_t turn = 0; turn < lives; ++turn) {
    if (below(3) == 0) arena.driver()->fail_at(1 + below(20), 1 + below(2), below(3) == 0);
    // There are more slots than sequences at any time, so acquire() finds one, though it may wait for a locked slot.
    const std::size_t slot = arena.acquire(std::nullopt, below(kMaxLen), Stream{0});
    const std::uint64_t mark = (std::uint64_t{seed} << 32) + turn;
    std::size_t length = 0;
    std::size_t kept = 0;
    for (int step = 0; step < 12; ++step) {
      const std::size_t goal = std::min(kMaxLen, length + 1 + below(step == 0 ? 100 : 12));
      kept = length < kWindow ? 0 : length - kWindow + 1;
      try {
        arena.grow(std::span(&slot, 1), goal, length, Stream{0});
      } catch (const BudgetExceeded&) {
        ++totals.out_of_pages;
        break;
      } catch (const DriverError&) {
        ++totals.refused;
        continue;
      }
      ++totals.grown;
      for (std::size_t position = length; position < goal; ++position)
        for (std::size_t plane = 0; plane < 2; ++plane) *row_of(arena, plane, slot, position) = mark + position;
      length = goal;
      for (std::size_t position = 0; position < length; ++position) {
        require(*row_of(arena, 0, slot, position) == mark + position, "a row was overwritten");
        if (position >= kept) require(*row_of(arena, 1, slot, position) == mark + position, "a windowed row was lost");
      }
      if (below(6) == 0) fork_from(arena, totals, random, slot, length, mark);
    }
    try {
      if (below(2) == 0 && length > kept + kWindow) arena.truncate(std::span(&slot, 1), length - 1, Stream{0});
    } catch (const DriverError&) {
      ++totals.refused;
    }
    release(arena, totals, slot);
  }
}

// Several threads grow one sequence while another reads its length. Then the sequence is swapped out and in again.
void share(const std::shared_ptr<Arena>& arena, Totals& totals, std::size_t lives) {
  for (std::size_t turn = 0; turn < lives; ++turn) {
    Sequence sequence(arena, std::nullopt, 0, Stream{0}, false, std::nullopt);
    std::atomic<std::size_t> grown{0};
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 3; ++thread)
      threads.emplace_back([&] {
        for (int step = 0; step < 20; ++step) {
          try {
            sequence.extend(2, Stream{0});
            grown += 2;
          } catch (const BudgetExceeded&) {
            ++totals.out_of_pages;
          } catch (const DriverError&) {
            ++totals.refused;
          }
        }
      });
    threads.emplace_back([&] {
      for (int look = 0; look < 50; ++look) (void)sequence.length();
    });
    for (std::thread& thread : threads) thread.join();
    require(sequence.length() == grown, "growth was lost");
    try {
      sequence.swap_out(Stream{0});
      std::thread looks([swapped = sequence.swapped(), &totals] {
        try {
          (void)swapped->done();
        } catch (const DriverError&) {
          ++totals.refused;
        }
      });
      try {
        sequence.swap_in(std::nullopt, Stream{0});
      } catch (...) {
        looks.join();
        throw;
      }
      looks.join();
    } catch (const BudgetExceeded&) {
      ++totals.out_of_pages;
    } catch (const DriverError&) {
      ++totals.refused;
    }
    require(sequence.length() == grown, "a sequence was lost on its way");
  }
}

void fork_once() {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(0);
  if (child > 0) require(::waitpid(child, nullptr, 0) == child, "the child was lost");
}

void stress(std::size_t lives, const std::shared_ptr<Mapper>& mapper) {
  const auto driver = make_host_driver(kPage, 130 * kPage);
  Totals totals;
  {
    const auto shared = std::make_shared<Arena>(
        driver, std::vector<Plane>{{kRow}, {kRow, kWindow}},
        ArenaOptions{.slots = kSlots, .max_len = kMaxLen, .budget = 90 * kPage, .tail_rows = 2, .growth_divisor = 8},
        mapper);
    Arena& arena = *shared;
    std::atomic<bool> done{false};
    std::thread disturber([&] {
      std::mt19937 random(7);
      while (!done) {
        try {
          if (random() % 8 == 0) arena.trim();
          if (random() % 4 == 0) arena.set_budget((70 + random() % 30) * kPage);
          if (mapper && random() % 64 == 0) fork_once();
        } catch (const DriverError&) {
          ++totals.refused;
        } catch (const BudgetExceeded&) {
          ++totals.out_of_pages;
        }
        arena.check();
        const Stats stats = arena.stats();
        require(stats.mapped + stats.deferred + stats.pooled == stats.physical, "a snapshot does not add up");
        (void)arena.map();
        std::this_thread::yield();
      }
    });
    std::vector<std::thread> growers;
    for (unsigned seed = 1; seed <= 4; ++seed) growers.emplace_back([&, seed] { live(arena, totals, seed, lives); });
    growers.emplace_back([&] { share(shared, totals, lives / 20); });
    for (std::thread& grower : growers) grower.join();
    done = true;
    disturber.join();
    driver->fail_at(0, 0, false);
    arena.wait_idle();
    arena.check();
    arena.trim();
    require(arena.stats().physical == 0, "trim left memory behind");
  }
  require(driver->memory_info().free == 130 * kPage, "memory was lost");
  std::printf("stress %s a mapper: %ld growths, %ld forks, %ld out of pages, %ld refused\n",
              mapper ? "with" : "without", totals.grown.load(), totals.forked.load(), totals.out_of_pages.load(),
              totals.refused.load());
  require(totals.grown > 0 && totals.forked > 0 && totals.refused > 0, "the stress met no fault");
}

}  // namespace

int main(int argc, char** argv) {
  const std::size_t lives = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 2000;
  stress(lives, nullptr);
  stress(lives, std::make_shared<Mapper>());
}
