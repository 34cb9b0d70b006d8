#include "driver.hpp"

#include <pthread.h>

#include <chrono>
#include <cstdio>

namespace vattn {
namespace {

std::atomic<unsigned> fork_count{0};
// The handler is registered when the library is loaded. Comparing getpid() instead would cost a system call for every
// driver call.
[[maybe_unused]] const int counting_forks = ::pthread_atfork(nullptr, nullptr, [] { ++fork_count; });

thread_local bool in_background = false;

}  // namespace

unsigned forks() noexcept { return fork_count.load(std::memory_order_relaxed); }

Driver::Driver(Kind kind, int device, bool exportable)
    : kind_(kind), device_(device), exportable_(exportable), forks_(forks()) {}

bool Driver::in_forked_child() const noexcept { return forks() != forks_; }

void Driver::require_owner() const {
  if (in_forked_child())
    throw BackendUnavailable(
        "this cache was made by the process that this one was forked off, and cannot be used here: make one in the "
        "child, which for CUDA must be started with the 'spawn' method");
}

void Driver::enter_background() noexcept { in_background = true; }

void Driver::enter(Call call) {
  require_owner();
  const auto index = static_cast<std::size_t>(call);
  counts_[index].fetch_add(1);
  if (in_background) background_counts_[index].fetch_add(1);
  if (const auto cost = charges_[index].load(); cost != 0) {
    // A busy loop, because the granularity of a sleep is as long as a driver call.
    const auto until = std::chrono::steady_clock::now() + std::chrono::nanoseconds(cost);
    while (std::chrono::steady_clock::now() < until) {
    }
  }
  auto left = until_fault_.load();
  do {
    if (left == 0) return;
  } while (!until_fault_.compare_exchange_weak(left, left - 1));
  if (left > 1) return;
  if (faults_left_.fetch_sub(1) > 1) until_fault_.store(1);
  const std::string name = kCallNames[index];
  if (fault_is_memory_.load()) throw OutOfDeviceMemory(name, -1, "injected fault");
  throw DriverError(name, -1, "injected fault");
}

void Driver::fail_at(std::uint64_t k, std::uint64_t times, bool out_of_memory) noexcept {
  fault_is_memory_.store(out_of_memory);
  faults_left_.store(static_cast<std::int64_t>(times));
  until_fault_.store(static_cast<std::int64_t>(k));
}

void Driver::charge(Call call, std::uint64_t nanoseconds) noexcept {
  charges_[static_cast<std::size_t>(call)].store(nanoseconds);
}

void Driver::report(const std::exception& error) noexcept {
  reports_.fetch_add(1);
  std::fprintf(stderr, "vattn: while giving memory back: %s\n", error.what());
}

Address Driver::reserve(std::size_t bytes) {
  enter(Call::reserve);
  return do_reserve(bytes);
}

void Driver::free_address(Address at, std::size_t bytes) {
  enter(Call::free_address);
  do_free_address(at, bytes);
}

Handle Driver::create(std::size_t bytes) {
  enter(Call::create);
  return do_create(bytes);
}

void Driver::release(Handle handle) {
  enter(Call::release);
  do_release(handle);
}

int Driver::export_handle(Handle handle) {
  if (!exportable_) throw std::invalid_argument("the cache was not made exportable: make it with exportable=True");
  enter(Call::export_handle);
  return do_export_handle(handle);
}

Handle Driver::import_handle(int descriptor, std::size_t bytes) {
  enter(Call::import_handle);
  return do_import_handle(descriptor, bytes);
}

void Driver::map(Address at, std::size_t bytes, Handle handle) {
  enter(Call::map);
  do_map(at, bytes, handle);
  ++mappings_;
}

void Driver::set_access(Address at, std::size_t bytes, Access access) {
  enter(Call::set_access);
  do_set_access(at, bytes, access);
}

void Driver::unmap(Address at, std::size_t bytes) {
  enter(Call::unmap);
  do_unmap(at, bytes);
  --mappings_;
}

void Driver::zero(Range range) {
  enter(Call::zero);
  do_zero(range);
}

void Driver::zeroed() {
  require_owner();
  do_zeroed();
  enter(Call::zeroed);
}

void Driver::copy(Address to, Address from, std::size_t bytes, Stream stream) {
  enter(Call::copy);
  do_copy(to, from, bytes, stream);
}

FenceId Driver::record(Stream stream) {
  enter(Call::record);
  return do_record(stream);
}

void Driver::wait(FenceId fence) {
  enter(Call::wait);
  do_wait(fence);
}

bool Driver::passed(FenceId fence) {
  enter(Call::query);
  return do_passed(fence);
}

void Driver::order(Stream stream, FenceId fence) {
  enter(Call::order);
  do_order(stream, fence);
}

Address Driver::create_host(std::size_t bytes) {
  enter(Call::create_host);
  return do_create_host(bytes);
}

void Driver::free_host(Address at, std::size_t bytes) {
  enter(Call::free_host);
  do_free_host(at, bytes);
}

void Driver::drop(FenceId fence) noexcept {
  if (!in_forked_child()) do_drop(fence);
}

MemoryInfo Driver::memory_info() {
  require_owner();
  return do_memory_info();
}

void Driver::synchronize() {
  require_owner();
  do_synchronize();
}

}  // namespace vattn
