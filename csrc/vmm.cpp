#include "vmm.hpp"

namespace vattn {
namespace {

// Runs `undo` for a destructor, and reports what it throws. Does nothing in a forked child, where objects own nothing.
template <typename Undo>
void undo_quietly(Driver& driver, Undo undo) noexcept {
  if (driver.in_forked_child()) return;
  try {
    undo();
  } catch (const std::exception& error) {
    driver.report(error);
  }
}

}  // namespace

Reservation::Reservation(std::shared_ptr<Driver> driver, std::size_t bytes)
    : driver_(std::move(driver)), bytes_(bytes), base_(driver_->reserve(bytes)) {}

Reservation::~Reservation() {
  undo_quietly(*driver_, [this] { driver_->free_address(base_, bytes_); });
}

Extent::Extent(std::shared_ptr<Driver> driver, std::size_t bytes)
    : driver_(std::move(driver)), bytes_(bytes), handle_(driver_->create(bytes)) {}

Extent::Extent(std::shared_ptr<Driver> driver, std::size_t bytes, int descriptor)
    : zeroed(true),
      exported(true),
      driver_(std::move(driver)),
      bytes_(bytes),
      handle_(driver_->import_handle(descriptor, bytes)) {}

Extent::~Extent() {
  if (driver_) undo_quietly(*driver_, [this] { driver_->release(handle_); });
}

Extent::Extent(Extent&& other) noexcept
    : zeroed(other.zeroed),
      exported(other.exported.load()),
      driver_(std::move(other.driver_)),
      bytes_(other.bytes_),
      handle_(other.handle_) {}

Extent& Extent::operator=(Extent&& other) noexcept {
  std::swap(zeroed, other.zeroed);
  std::swap(driver_, other.driver_);
  std::swap(bytes_, other.bytes_);
  std::swap(handle_, other.handle_);
  return *this;
}

void Extent::release() {
  driver_->release(handle_);
  driver_.reset();
}

Mapping::Mapping(std::shared_ptr<Driver> driver, std::shared_ptr<Extent> extent, Address at)
    : driver_((driver->map(at, extent->bytes(), extent->handle()), std::move(driver))),
      extent_(std::move(extent)),
      at_(at) {
  ++extent_->mappings;
}

Mapping::~Mapping() {
  if (!driver_) return;
  undo_quietly(*driver_, [this] { unmap(); });
  if (driver_) --extent_->mappings;  // the driver refused, but nothing uses the address any more
}

Mapping::Mapping(Mapping&& other) noexcept
    : driver_(std::move(other.driver_)),
      extent_(std::move(other.extent_)),
      at_(other.at_),
      access_(other.access_.load()) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(driver_, other.driver_);
  std::swap(extent_, other.extent_);
  std::swap(at_, other.at_);
  other.access_ = access_.exchange(other.access_.load());
  return *this;
}

void Mapping::allow(Access access) {
  driver_->set_access(at_, extent_->bytes(), access);
  access_ = access;
}

void Mapping::unmap() {
  driver_->unmap(at_, extent_->bytes());
  --extent_->mappings;
  driver_.reset();
  extent_.reset();
}

}  // namespace vattn
