// The constants of the arena's policies, with their units and where they come from.
#pragma once

#include <chrono>
#include <cstddef>

namespace vattn {

// The most positions that a lookahead has at first, when no rate of growth is known: where rows are small, a granule
// holds thousands. Also the most that a lookahead grows to, as a multiple of the first one.
inline constexpr std::size_t kLookahead = 64;

// For sequences with an expected length. Their extents have at most 1/kServed of the bytes that the run needs, but at
// least one granule. The first mapping is rounded up to a multiple of an extent size that is at most 1/kRounded of
// these bytes, but at least one granule. Later growth takes up to 1/kTold of the unshared bytes that the run has. The
// values were chosen by replays of served traces, for few driver calls with little unused memory: see
// docs/design/memory.md.
inline constexpr std::size_t kServed = 15;
inline constexpr std::size_t kRounded = 28;
inline constexpr std::size_t kTold = 14;

// How many extents of the class that growth took last are kept in the pool for the next growth.
inline constexpr std::size_t kStock = 2;

// The shortest and the longest time between two checks whether fences have passed. It doubles from check to check.
inline constexpr std::chrono::milliseconds kPatience{1};
inline constexpr std::chrono::milliseconds kLongPatience{64};

// How many times an operation that must not fail is tried when the driver refuses it: mapping again what was mapped
// before, or releasing a sequence from a destructor.
inline constexpr int kAttempts = 8;

// What a fork costs, in microseconds on an H100; see docs/design/driver.md.
inline constexpr double kAliasCost = 31;                // map and set access, for an extent that exists
inline constexpr double kUnmapCost = 20;                // unmap, for each extent that is in the way
inline constexpr double kExtentCost = 44;               // create, map and set access, for a new extent
inline constexpr double kCopyCost = 1.0 / (1.5 * 1e6);  // to copy a byte: read and written at 3 TB/s in all
inline constexpr double kMemoryCost = 20;               // a granule of the fork's own: about what reclaiming it costs

// When the forks of one call would together copy at least this many granules from within one extent, the extent is
// split so that they can share the first part.
inline constexpr std::size_t kSplitGranules = 16;

// Up to this many extents, a fork is cheap enough. Background compaction then keeps the boundaries between them, at
// which other sequences may have been forked, and only splits the last one.
inline constexpr std::size_t kFewExtents = 4;

}  // namespace vattn
