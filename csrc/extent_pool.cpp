#include "extent_pool.hpp"

#include <bit>
#include <new>
#include <optional>
#include <thread>

namespace vattn {

ExtentPool::ExtentPool(std::shared_ptr<Driver> driver, std::size_t budget) : driver_(std::move(driver)) {
  usage_.budget = budget;
}

std::size_t ExtentPool::class_of(std::size_t bytes) const noexcept {
  const std::size_t granules = std::max<std::size_t>(1, bytes / granularity());
  return std::min<std::size_t>(kClasses - 1, static_cast<std::size_t>(std::bit_width(granules)) - 1);
}

std::size_t ExtentPool::shelf_of(std::size_t bytes) const noexcept {
  const std::size_t size_class = class_of(bytes);
  return bytes == bytes_of(size_class) ? size_class : kClasses;
}

std::shared_ptr<Extent> ExtentPool::take(std::size_t bytes) { return obtain(bytes, std::nullopt); }

std::shared_ptr<Extent> ExtentPool::import(std::size_t bytes, int descriptor) { return obtain(bytes, descriptor); }

std::shared_ptr<Extent> ExtentPool::obtain(std::size_t bytes, std::optional<int> descriptor) {
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      auto& pooled = free_[shelf_of(bytes)];
      if (!descriptor && shelf_of(bytes) != kClasses && !pooled.empty()) {
        Extent extent = std::move(pooled.back());
        pooled.pop_back();
        usage_.pooled -= bytes;
        lock.unlock();
        return lend(std::move(extent));
      }
      if (bytes > usage_.available()) throw BudgetExceeded(bytes, usage_.available());
      if (usage_.charged + bytes <= usage_.budget) {
        charge(bytes);
        break;
      }
    }
    // When there is nothing to release, although bytes count as pooled, another thread is releasing an extent, or
    // creating one in stock().
    if (!release_largest()) std::this_thread::yield();
  }
  std::optional<Extent> made;
  try {
    while (!made) {
      try {
        descriptor ? made.emplace(driver_, bytes, *descriptor) : made.emplace(driver_, bytes);
      } catch (const OutOfDeviceMemory&) {
        if (!release_largest()) throw;
      }
    }
  } catch (...) {
    const std::lock_guard lock(mutex_);
    usage_.charged -= bytes;
    throw;
  }
  return lend(std::move(*made));
}

std::shared_ptr<Extent> ExtentPool::lend(Extent&& extent) {
  const auto take_back = [this](Extent* lent) {
    const std::unique_ptr<Extent> owner(lent);
    // In a forked child the pool owns nothing, and its mutex may be locked by a thread that does not exist there.
    if (driver_->in_forked_child()) return;
    if (lent->exported.load()) {
      drop(*lent);
    } else {
      give(std::move(*lent));
    }
  };
  std::unique_ptr<Extent> owned;
  try {
    owned = std::make_unique<Extent>(std::move(extent));
  } catch (const std::bad_alloc&) {  // `extent` has not been moved from
    if (extent.exported.load()) {
      drop(extent);
    } else {
      give(std::move(extent));
    }
    throw;
  }
  // When the shared_ptr cannot allocate its reference count, it calls the deleter, which takes the extent back.
  return {owned.release(), take_back};
}

// Releases an extent that other processes may have mapped.
void ExtentPool::drop(Extent& extent) noexcept {
  const std::size_t bytes = extent.bytes();
  try {
    extent.release();
  } catch (const std::exception& error) {
    driver_->report(error);
  }
  const std::lock_guard lock(mutex_);
  usage_.charged -= bytes;
}

void ExtentPool::give(Extent&& extent) noexcept {
  const std::lock_guard lock(mutex_);
  usage_.pooled += extent.bytes();
  keep(std::move(extent));
}

void ExtentPool::keep(Extent&& extent) noexcept {
  const std::size_t bytes = extent.bytes();
  try {
    free_[shelf_of(bytes)].push_back(std::move(extent));
  } catch (const std::bad_alloc& error) {
    // The pool cannot store the extent. The caller still owns it, and its destructor releases it to the driver.
    driver_->report(error);
    usage_.charged -= bytes;
    usage_.pooled -= bytes;
  }
}

void ExtentPool::stock(std::size_t size_class, std::size_t count) {
  const std::size_t bytes = bytes_of(size_class);
  for (;;) {
    {
      const std::lock_guard lock(mutex_);
      if (free_[size_class].size() >= count || usage_.charged + bytes > usage_.budget - usage_.budget / 8) return;
      charge(bytes);
      usage_.pooled += bytes;
    }
    try {
      Extent extent(driver_, bytes);
      const std::lock_guard lock(mutex_);
      keep(std::move(extent));
    } catch (...) {
      const std::lock_guard lock(mutex_);
      usage_.charged -= bytes;
      usage_.pooled -= bytes;
      throw;
    }
  }
}

void ExtentPool::shrink(std::size_t bytes) {
  while (usage().charged > bytes && release_largest()) {
  }
}

void ExtentPool::set_budget(std::size_t budget) {
  const std::lock_guard lock(mutex_);
  usage_.budget = budget;
}

void ExtentPool::charge(std::size_t bytes) noexcept {
  usage_.charged += bytes;
  usage_.peak = std::max(usage_.peak, usage_.charged);
  usage_.overdrawn = usage_.overdrawn || usage_.charged > usage_.budget;
}

ExtentPool::Usage ExtentPool::usage() const {
  const std::lock_guard lock(mutex_);
  return usage_;
}

std::size_t ExtentPool::pooled(std::size_t size_class) const {
  const std::lock_guard lock(mutex_);
  return free_[size_class].size();
}

bool ExtentPool::release_largest() {
  std::unique_lock lock(mutex_);
  const auto largest = std::find_if(free_.rbegin(), free_.rend(), [](const auto& pooled) { return !pooled.empty(); });
  if (largest == free_.rend()) return false;
  Extent extent = std::move(largest->back());
  largest->pop_back();
  const std::size_t bytes = extent.bytes();
  lock.unlock();
  try {
    extent.release();
  } catch (...) {
    lock.lock();
    try {
      largest->push_back(std::move(extent));
    } catch (const std::bad_alloc&) {  // the destructor of `extent` tries once more to release it
      usage_.pooled -= bytes;
      usage_.charged -= bytes;
    }
    throw;
  }
  lock.lock();
  usage_.pooled -= bytes;
  usage_.charged -= bytes;
  return true;
}

}  // namespace vattn
