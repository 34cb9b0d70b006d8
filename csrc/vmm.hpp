// RAII types. Each object owns one resource of the driver and frees it in its destructor.
//
//   type         acquired by     freed by       must be freed before
//   Reservation  reserve         free_address   -
//   Extent       create          release        -
//   Mapping      map             unmap          its Reservation
//   Fence        record          drop           -
//
// Destructors do not throw. When the driver refuses a call in a destructor, Driver::report reports it.
#pragma once

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "driver.hpp"

namespace vattn {

class Reservation {
 public:
  Reservation(std::shared_ptr<Driver> driver, std::size_t bytes);
  ~Reservation();
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  Address base() const noexcept { return base_; }
  std::size_t bytes() const noexcept { return bytes_; }

 private:
  std::shared_ptr<Driver> driver_;
  std::size_t bytes_;
  Address base_;
};

struct HostCopy;

// One handle to physical memory. Move-only.
class Extent {
 public:
  Extent(std::shared_ptr<Driver> driver, std::size_t bytes);
  // Imports memory of another process from the descriptor that it was exported as.
  Extent(std::shared_ptr<Driver> driver, std::size_t bytes, int descriptor);
  ~Extent();
  Extent(Extent&& other) noexcept;
  Extent& operator=(Extent&& other) noexcept;

  Handle handle() const noexcept { return handle_; }
  std::size_t bytes() const noexcept { return bytes_; }
  // Whether the memory has been zeroed since the driver created it, which happens once, at the first mapping. It is
  // true for an imported extent.
  bool zeroed = false;
  // The number of mappings of this extent that exist.
  std::atomic<std::size_t> mappings{0};
  // Whether other processes may have the extent mapped. Once true it stays true: the extent is never written again, and
  // never returns to the pool.
  std::atomic<bool> exported{false};
  // The copy of these bytes in host memory, if swapped-out sequences need it. It is reset before the bytes may be
  // written to. Moving an extent does not move it.
  std::weak_ptr<HostCopy> host_copy;

  // Releases the memory now. When the driver refuses, this throws and the extent still owns the memory.
  void release();

 private:
  std::shared_ptr<Driver> driver_;  // null when moved from or released
  std::size_t bytes_;
  Handle handle_;
};

// One extent mapped at one address. Move-only. Several mappings may share an extent.
class Mapping {
 public:
  // Maps the extent. The memory is not accessible before allow().
  Mapping(std::shared_ptr<Driver> driver, std::shared_ptr<Extent> extent, Address at);
  ~Mapping();
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;

  void allow(Access access = Access::write);
  // Removes the mapping and drops its reference to the extent. When the driver refuses, this throws and the extent is
  // still mapped.
  void unmap();

  Range range() const noexcept { return {at_, extent_->bytes()}; }
  std::size_t bytes() const noexcept { return extent_->bytes(); }
  bool zeroed() const noexcept { return extent_->zeroed; }
  void set_zeroed() noexcept { extent_->zeroed = true; }
  const std::shared_ptr<Extent>& extent() const noexcept { return extent_; }
  Access access() const noexcept { return access_.load(); }
  // Whether the extent has other mappings, or may be mapped by other processes. A new mapping of an extent is only made
  // from an existing mapping, whose slot is locked for that, or from the extent's copy in host memory. So when a caller
  // has locked the slot and finds the extent not shared and without such a copy, the extent stays not shared.
  bool shared() const noexcept { return extent_->mappings.load() > 1 || extent_->exported.load(); }
  // Whether rows may be written here: write access is granted, and the extent is not shared (invariant 4).
  bool writable() const noexcept { return access_.load() == Access::write && !shared(); }
  // Whether other sequences would see a write here. That includes swapped-out sequences, which would map the extent
  // again when they are swapped in. Also true where the access is read-only.
  bool seen_by_others() const noexcept { return !writable() || !extent_->host_copy.expired(); }
  // Requires the arena's mutex, and is called before rows of this mapping are written. When the extent is not shared,
  // this detaches it from its copy in host memory, so that no swapped-out sequence maps the extent again.
  void will_be_written() const noexcept {
    if (!shared()) extent_->host_copy.reset();
  }

 private:
  std::shared_ptr<Driver> driver_;  // null when moved from or unmapped
  std::shared_ptr<Extent> extent_;
  Address at_;
  std::atomic<Access> access_{Access::write};  // atomic: read by other threads while allow() sets it
};

// A recorded point of a stream, which passes when the work queued there before it is done.
class Fence {
 public:
  Fence(std::shared_ptr<Driver> driver, Stream stream)
      : driver_(std::move(driver)), stream_(stream), id_(driver_->record(stream)) {}
  ~Fence() { driver_->drop(id_); }
  Fence(const Fence&) = delete;
  Fence& operator=(const Fence&) = delete;

  Stream stream() const noexcept { return stream_; }
  bool passed() const { return driver_->passed(id_); }
  void wait() const {
    if (!passed()) driver_->wait(id_);
  }
  // Makes the work that is queued in `stream` from now on wait for this fence.
  void order(Stream stream) const {
    if (stream != stream_) driver_->order(stream, id_);
  }

 private:
  std::shared_ptr<Driver> driver_;
  Stream stream_;
  FenceId id_;
};

// The last use of some memory: one fence for every stream that used it.
using Fences = std::vector<std::shared_ptr<const Fence>>;

}  // namespace vattn
