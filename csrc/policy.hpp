// The numbers by which an arena decides, with their units and where they come from.
#pragma once

#include <chrono>
#include <cstddef>

namespace vattn {

// Past this many positions a lookahead is a matter of the rate alone: where rows are small a granule holds thousands.
inline constexpr std::size_t kLookahead = 64;

// For sequences that were told how far they will come. No extent is more than 1/kServed of what is needed at first, and
// the first rows' end is rounded up to 1/kRounded of it; growth takes up to 1/kTold of what there is. Chosen by replays
// of served traces: fewer driver calls with less memory unused, see docs/design/memory.md.
inline constexpr std::size_t kServed = 15;
inline constexpr std::size_t kRounded = 28;
inline constexpr std::size_t kTold = 14;

// Extents of the class that growth takes that are kept created for the next ones.
inline constexpr std::size_t kStock = 2;

// How long fences are left alone between two looks.
inline constexpr std::chrono::milliseconds kPatience{1};
inline constexpr std::chrono::milliseconds kLongPatience{64};

// How often the driver is asked for what it had already given.
inline constexpr int kAttempts = 8;

// What a fork costs, in microseconds on an H100; see docs/design/driver.md.
inline constexpr double kAliasCost = 31;                // map and set access of an extent that exists
inline constexpr double kUnmapCost = 20;                // of each extent that is in the way
inline constexpr double kExtentCost = 44;               // create, map and set access
inline constexpr double kCopyCost = 1.0 / (1.5 * 1e6);  // a byte, read and written at 3 TB/s
inline constexpr double kMemoryCost = 20;               // a granule taken twice: about what taking it from others costs

// From so many granules on, copied by all forks together, an extent is split for them.
inline constexpr std::size_t kSplitGranules = 16;

// With so many extents a fork is cheap enough: what is compacted in the background keeps its boundaries then, at which
// others may have been forked.
inline constexpr std::size_t kFewExtents = 4;

}  // namespace vattn
