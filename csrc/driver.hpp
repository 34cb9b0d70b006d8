// The interface between vattn and the system that provides its memory: CUDA's virtual-memory API, or the host's.
//
// Both backends fulfil this contract, which tests/test_driver_contract.py tests:
//   reserve        Reserves an address range without memory. An access to it faults.
//   create         Creates one handle to `bytes` of physical memory. `bytes` is a multiple of granularity().
//   map            Maps the whole of one handle at an address inside one reservation, where nothing is mapped yet. A
//                  handle may be mapped at any number of addresses. An access faults until set_access is called.
//   export_handle  Returns a file descriptor through which another process can map the memory of a handle. The caller
//                  closes it. Requires a driver that was made exportable.
//   import_handle  Returns a handle to the memory of such a descriptor. It is released like any other handle, and the
//                  descriptor may be closed at once.
//   set_access     Makes a mapped range readable by the device, and also writable unless read access is asked for.
//   unmap          Removes exactly one mapping, given by its address and size. Does not wait for kernels.
//   release        Gives up a handle. Its memory lives until its last mapping is removed, then returns to the system.
//   free_address   Frees a reservation. Requires that no mapping is left in it.
//   zero           Queues the zeroing of a mapped range on a stream that belongs to the driver.
//   zeroed         Waits until the queued zeroing is done. From then on the memory reads as zero in every stream. This
//                  call waits even when it fails, because memory with queued work must not be unmapped.
//   copy           Copies between addresses of the device and of create_host, ordered in `stream`, which may be one of
//                  the driver's own streams. zeroed also waits for copies that are queued in the stream of zero.
//   create_host    Allocates host memory that copies can read and write asynchronously.
//   free_host      Frees that memory. Requires that no copy uses it any more.
//   order          Makes the work that is queued in `stream` from now on wait for a fence.
//   record         Returns a fence that passes when the work queued in `stream` so far is done. On the host a fence
//                  has always passed.
// A call that fails throws DriverError (OutOfDeviceMemory when memory is short) and changes nothing.
// Every call may be made from any thread, also from a thread that has no current CUDA context.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>

#include "error.hpp"

namespace vattn {

using Address = std::uintptr_t;
enum class Handle : std::uint64_t {};
enum class Stream : std::uintptr_t {};
enum class FenceId : std::uintptr_t {};
enum class Access { read, write };  // write access includes read access
enum class OwnStream : std::size_t {
  zeroing,  // for zero()
  out,      // for copies from the device to the host
  in        // for copies from the host to the device
};

struct Range {
  Address at;
  std::size_t bytes;
};

struct MemoryInfo {
  std::size_t free;
  std::size_t total;
};

enum class Call : std::size_t {
  reserve,
  free_address,
  create,
  release,
  map,
  set_access,
  unmap,
  zero,
  zeroed,
  copy,
  record,
  query,
  wait,
  order,
  create_host,
  free_host,
  export_handle,
  import_handle,
};
inline constexpr std::array<const char*, 18> kCallNames = {
    "reserve", "free_address", "create",      "release",   "map",           "set_access",
    "unmap",   "zero",         "zeroed",      "copy",      "record",        "query",
    "wait",    "order",        "create_host", "free_host", "export_handle", "import_handle"};

// Returns the number of fork() calls between the process that loaded this library and this process. An object that was
// made at a different count belongs to a parent process.
unsigned forks() noexcept;

// A memory backend. The public functions refuse to run in a forked child, and count and fault-inject the calls that
// `Call` lists; the private virtual functions do the work.
class Driver {
 public:
  enum class Kind { host, cuda };

  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;
  virtual ~Driver() = default;

  Address reserve(std::size_t bytes);
  void free_address(Address at, std::size_t bytes);
  Handle create(std::size_t bytes);
  void release(Handle handle);
  int export_handle(Handle handle);
  Handle import_handle(int descriptor, std::size_t bytes);
  void map(Address at, std::size_t bytes, Handle handle);
  void set_access(Address at, std::size_t bytes, Access access = Access::write);
  void unmap(Address at, std::size_t bytes);
  void zero(Range range);
  void zeroed();
  void copy(Address to, Address from, std::size_t bytes, Stream stream);
  Address create_host(std::size_t bytes);
  void free_host(Address at, std::size_t bytes);
  FenceId record(Stream stream);
  void wait(FenceId fence);
  bool passed(FenceId fence);
  void order(Stream stream, FenceId fence);
  void drop(FenceId fence) noexcept;
  // Waits for all work on the device, in every stream.
  void synchronize();

  Kind kind() const noexcept { return kind_; }
  bool exportable() const noexcept { return exportable_; }
  int device() const noexcept { return device_; }
  std::size_t granularity() const noexcept { return granularity_; }
  MemoryInfo memory_info();
  virtual std::string description() const = 0;
  virtual Stream own_stream(OwnStream which) const noexcept = 0;
  // The number of mappings that exist now, and the largest number that the device supports.
  std::size_t mappings() const noexcept { return mappings_.load(); }
  virtual std::size_t mapping_limit() const = 0;

  std::uint64_t count(Call call) const noexcept { return counts_[static_cast<std::size_t>(call)].load(); }
  // The number of those calls that were made by threads that have called enter_background().
  std::uint64_t background_count(Call call) const noexcept {
    return background_counts_[static_cast<std::size_t>(call)].load();
  }
  static void enter_background() noexcept;

  // Test aids. After fail_at, the k-th counted call from now (1 is the next one) and the `times - 1` calls after it
  // throw OutOfDeviceMemory or DriverError with code -1, and do not reach the backend (except zeroed, which waits
  // first). k = 0 switches the faults off. `charge` makes every later `call` take at least that long.
  void fail_at(std::uint64_t k, std::uint64_t times, bool out_of_memory) noexcept;
  void charge(Call call, std::uint64_t nanoseconds) noexcept;

  // For code that must not throw, such as destructors: prints the error to stderr and adds one to reports().
  void report(const std::exception& error) noexcept;
  std::uint64_t reports() const noexcept { return reports_.load(); }

  // Returns whether this object was inherited through fork(). The copies of objects in a forked child own nothing: the
  // handles and mappings belong to the parent.
  bool in_forked_child() const noexcept;
  // Throws BackendUnavailable in a forked child. Every driver call checks this by itself; this function is for callers
  // that might return without a driver call.
  void require_owner() const;

 protected:
  Driver(Kind kind, int device, bool exportable);
  std::size_t granularity_ = 0;

 private:
  virtual MemoryInfo do_memory_info() = 0;
  virtual Address do_reserve(std::size_t bytes) = 0;
  virtual void do_free_address(Address at, std::size_t bytes) = 0;
  virtual Handle do_create(std::size_t bytes) = 0;
  virtual void do_release(Handle handle) = 0;
  virtual int do_export_handle(Handle handle) = 0;
  virtual Handle do_import_handle(int descriptor, std::size_t bytes) = 0;
  virtual void do_map(Address at, std::size_t bytes, Handle handle) = 0;
  virtual void do_set_access(Address at, std::size_t bytes, Access access) = 0;
  virtual void do_unmap(Address at, std::size_t bytes) = 0;
  virtual void do_zero(Range range) = 0;
  virtual void do_zeroed() = 0;
  virtual void do_copy(Address to, Address from, std::size_t bytes, Stream stream) = 0;
  virtual FenceId do_record(Stream stream) = 0;
  virtual void do_wait(FenceId fence) = 0;
  virtual bool do_passed(FenceId fence) = 0;
  virtual void do_order(Stream stream, FenceId fence) = 0;
  virtual Address do_create_host(std::size_t bytes) = 0;
  virtual void do_free_host(Address at, std::size_t bytes) = 0;
  virtual void do_drop(FenceId fence) noexcept = 0;
  virtual void do_synchronize() = 0;

  void enter(Call call);

  const Kind kind_;
  const int device_;
  const bool exportable_;
  const unsigned forks_;
  std::array<std::atomic<std::uint64_t>, kCallNames.size()> counts_{};
  std::array<std::atomic<std::uint64_t>, kCallNames.size()> background_counts_{};
  std::array<std::atomic<std::uint64_t>, kCallNames.size()> charges_{};
  std::atomic<std::size_t> mappings_{0};
  std::atomic<std::int64_t> until_fault_{0};
  std::atomic<std::int64_t> faults_left_{0};
  std::atomic<bool> fault_is_memory_{false};
  std::atomic<std::uint64_t> reports_{0};
};

// Makes a driver for host memory. `granularity` is in bytes and must be a multiple of the OS page size. `capacity` is
// the size of the simulated device in bytes, or 0 for the memory of the machine. Throws std::invalid_argument when the
// granularity is no such multiple, or DriverError.
std::shared_ptr<Driver> make_host_driver(std::size_t granularity, std::size_t capacity, bool exportable = false);

// Makes a driver for a CUDA device. Throws BackendUnavailable, with the reason, when there is no usable NVIDIA driver
// or device.
std::shared_ptr<Driver> make_cuda_driver(int device, bool exportable = false);

// What can be found out about CUDA on this machine without a CUDA context.
struct CudaProbe {
  bool available = false;
  std::string why;         // the reason, when not available
  int driver_version = 0;  // as cuDriverGetVersion returns it: 13000 for 13.0
  int devices = 0;
};
CudaProbe probe_cuda();

}  // namespace vattn
