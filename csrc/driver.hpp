// The seam between vattn and whatever gives it memory: CUDA's virtual-memory API, or the host's.
//
// The contract, which tests/test_driver_contract.py holds both backends to:
//   reserve      an address range without memory; touching it faults.
//   create       one handle to `bytes` of physical memory, a multiple of granularity().
//   map          the whole of one handle at an address inside one reservation where nothing is mapped. A
//                handle may be mapped at any number of addresses. The memory faults until set_access.
//   export_handle  a file descriptor, the caller's to close, by which another process maps the memory of a handle. Only
//                where the driver was made exportable.
//   import_handle  a handle to the memory of such a descriptor, to be released like any; the descriptor may be closed.
//   set_access   makes a mapped range readable by the device, and writable unless told otherwise.
//   unmap        exactly one mapping, by its address and size. Does not wait for kernels.
//   release      gives the handle up; its memory lives until its last mapping goes, then returns to the system.
//   free_address gives a reservation back, which must have no mapping left.
//   zero         queues the zeroing of a mapped range on a stream of the driver's own.
//   zeroed       waits until what zero has queued is done: it reads as zero to every stream from then on. It waits
//                also when it fails, since what is queued must not be unmapped.
//   copy         between addresses of the device and of create_host, ordered in `stream`, which may be one of the
//                driver's own; zeroed waits for what is queued where zero is.
//   create_host  host memory that copies can read and write while the caller goes on.
//   free_host    gives it back; no copy may be under way.
//   order        what is queued in `stream` from now on waits for a fence.
//   record       a fence that passes when the work queued in `stream` so far is done. On the host, passed at once.
// A call that fails throws DriverError (OutOfDeviceMemory when memory is short) and changes nothing.
// Every call may be made from any thread, and from a thread that holds no CUDA context.
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
enum class Access { read, write };  // who may write may read
enum class OwnStream : std::size_t {
  zeroing,
  out,
  in
};  // a driver's own: for zero, and for copies to the host and back

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

// How often this process has been forked off another since its start: what was made at another count is the parent's.
unsigned forks() noexcept;

// The public calls count, guard and inject; the private virtual ones do the work.
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
  // Waits for everything the device has been given, from every stream.
  void synchronize();

  Kind kind() const noexcept { return kind_; }
  bool exportable() const noexcept { return exportable_; }
  int device() const noexcept { return device_; }
  std::size_t granularity() const noexcept { return granularity_; }
  MemoryInfo memory_info();
  virtual std::string description() const = 0;
  virtual Stream own_stream(OwnStream which) const noexcept = 0;
  // Mappings that exist now, and how many the device takes.
  std::size_t mappings() const noexcept { return mappings_.load(); }
  virtual std::size_t mapping_limit() const = 0;

  std::uint64_t count(Call call) const noexcept { return counts_[static_cast<std::size_t>(call)].load(); }
  // Of those, the ones made by threads that have called enter_background().
  std::uint64_t background_count(Call call) const noexcept {
    return background_counts_[static_cast<std::size_t>(call)].load();
  }
  static void enter_background() noexcept;

  // Test aids. The k-th counted call from now (1 is the next) and the `times - 1` after it fail with `code`
  // without reaching the backend; k = 0 heals. `charge` makes every later `call` take at least that long.
  void fail_at(std::uint64_t k, std::uint64_t times, bool out_of_memory) noexcept;
  void charge(Call call, std::uint64_t nanoseconds) noexcept;

  // For destructors: what went wrong, on stderr, and a count that tests read.
  void report(const std::exception& error) noexcept;
  std::uint64_t reports() const noexcept { return reports_.load(); }

  // After fork(), the child's copies of our objects own nothing, and what they map is the parent's.
  bool in_forked_child() const noexcept;
  // Throws BackendUnavailable in a forked child. Every call above does; for callers that may need none of them.
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

// `granularity` must be a multiple of the OS page; `capacity` is the size of the simulated device in bytes,
// 0 for the machine's memory.
std::shared_ptr<Driver> make_host_driver(std::size_t granularity, std::size_t capacity, bool exportable = false);

// Throws BackendUnavailable, saying why, where there is no usable driver or device.
std::shared_ptr<Driver> make_cuda_driver(int device, bool exportable = false);

// What can be known about CUDA here without holding a context.
struct CudaProbe {
  bool available = false;
  std::string why;         // when not available
  int driver_version = 0;  // as cuDriverGetVersion gives it, 13000 for 13.0
  int devices = 0;
};
CudaProbe probe_cuda();

}  // namespace vattn
