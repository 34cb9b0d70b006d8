// Handles that own one thing of the driver each and know the call that undoes it.
//
//   type         acquired by     undone by      must go before
//   Reservation  reserve         free_address   -
//   Extent       create          release        -
//   Mapping      map             unmap          its Reservation
//   Fence        record          drop           -
//
// Destructors do not throw: what the driver refuses is reported, see Driver::report.
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

// One physical handle. Move-only.
class Extent {
 public:
  Extent(std::shared_ptr<Driver> driver, std::size_t bytes);
  // The memory of another process, by the descriptor it was exported with.
  Extent(std::shared_ptr<Driver> driver, std::size_t bytes, int descriptor);
  ~Extent();
  Extent(Extent&& other) noexcept;
  Extent& operator=(Extent&& other) noexcept;

  Handle handle() const noexcept { return handle_; }
  std::size_t bytes() const noexcept { return bytes_; }
  // Whether the memory has been zeroed since the driver gave it, which happens once, at the first mapping.
  bool zeroed = false;
  // Mappings of it that exist.
  std::atomic<std::size_t> mappings{0};
  // Whether other processes may have it mapped, for good: then it is never written, and never pooled.
  std::atomic<bool> exported{false};
  // The copy of these bytes in host memory, where sequences that are swapped out need it. It is reset before the bytes
  // may be written to. A moved extent does not take it along.
  std::weak_ptr<HostCopy> host_copy;

  // Gives the memory up now. When the driver refuses, throws and still owns it.
  void release();

 private:
  std::shared_ptr<Driver> driver_;  // empty when moved from or released
  std::size_t bytes_;
  Handle handle_;
};

// One extent at one address. Move-only; several mappings may share an extent.
class Mapping {
 public:
  // The memory is not accessible before allow().
  Mapping(std::shared_ptr<Driver> driver, std::shared_ptr<Extent> extent, Address at);
  ~Mapping();
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;

  void allow(Access access = Access::write);
  // Lets the extent go. When the driver refuses, throws and still is mapped.
  void unmap();

  Range range() const noexcept { return {at_, extent_->bytes()}; }
  std::size_t bytes() const noexcept { return extent_->bytes(); }
  bool zeroed() const noexcept { return extent_->zeroed; }
  void set_zeroed() noexcept { extent_->zeroed = true; }
  const std::shared_ptr<Extent>& extent() const noexcept { return extent_; }
  Access access() const noexcept { return access_.load(); }
  // Others can come only through this mapping, or through its extent's copy in host memory: who holds it, and finds it
  // alone and without a copy, stays alone.
  bool shared() const noexcept { return extent_->mappings.load() > 1 || extent_->exported.load(); }
  // Whether rows may be written here: nobody else has the extent mapped (invariant 4).
  bool writable() const noexcept { return access_.load() == Access::write && !shared(); }
  // Whether a write here would be seen by others: also by those in host memory who would map the extent again.
  bool seen_by_others() const noexcept { return !writable() || !extent_->host_copy.expired(); }
  // Called with the arena's mutex held, before rows of this mapping are written. If no other mapping has the extent,
  // its copy in host memory no longer stands for it, so that no sequence that is swapped out maps the extent again.
  void will_be_written() const noexcept {
    if (!shared()) extent_->host_copy.reset();
  }

 private:
  std::shared_ptr<Driver> driver_;  // empty when moved from or unmapped
  std::shared_ptr<Extent> extent_;
  Address at_;
  std::atomic<Access> access_{Access::write};  // which others may look at while its holder changes it
};

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
  // What is queued in the stream from now on waits for it.
  void order(Stream stream) const {
    if (stream != stream_) driver_->order(stream, id_);
  }

 private:
  std::shared_ptr<Driver> driver_;
  Stream stream_;
  FenceId id_;
};

// The last use of some memory on every stream that used it.
using Fences = std::vector<std::shared_ptr<const Fence>>;

}  // namespace vattn
