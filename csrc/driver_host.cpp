// The driver contract (driver.hpp) on the CPU, with real virtual memory. One sparse memfd is the device, a reservation
// is PROT_NONE address space, and a mapping is an mmap(MAP_FIXED) of a part of the file over it. In an exportable
// driver each handle has a memfd of its own, which lives as long as any process has it mapped.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>

#include "driver.hpp"
#include "host_memory.hpp"

namespace vattn {
namespace {

[[noreturn]] void throw_errno(const char* call) {
  const int code = errno;
  if (code == ENOMEM || code == ENOSPC) throw OutOfDeviceMemory(call, code, std::strerror(code));
  throw DriverError(call, code, std::strerror(code));
}

class HostDriver final : public Driver {
 public:
  HostDriver(std::size_t granularity, std::size_t capacity, bool exportable)
      : Driver(Kind::host, 0, exportable), capacity_(capacity) {
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    if (granularity == 0 || granularity % page != 0)
      throw std::invalid_argument("granularity must be a multiple of the page size, " + std::to_string(page));
    granularity_ = granularity;
    file_ = ::memfd_create("vattn", MFD_CLOEXEC);
    if (file_ < 0) throw_errno("memfd_create");
  }

  ~HostDriver() override {
    for (const auto& [handle, memory] : memory_)
      if (memory.file != file_) ::close(memory.file);
    ::close(file_);
  }

  std::string description() const override { return "host memory (memfd)"; }

  Stream own_stream(OwnStream) const noexcept override { return Stream{0}; }

  // Each mapping splits the memory area (VMA) of its reservation, and max_map_count limits the VMAs of a process.
  std::size_t mapping_limit() const override {
    std::size_t areas = 65530;
    std::ifstream("/proc/sys/vm/max_map_count") >> areas;
    return areas / 2;
  }

 private:
  struct Memory {
    int file;
    off_t offset;
    std::size_t bytes;
    std::size_t mappings;
    bool released;
  };
  struct Mapped {
    std::size_t bytes;
    Handle handle;
  };

  MemoryInfo do_memory_info() override {
    const std::lock_guard lock(mutex_);
    if (capacity_ != 0) return {capacity_ - std::min(capacity_, live_bytes_), capacity_};
    return host_memory();
  }

  Address do_reserve(std::size_t bytes) override {
    if (bytes == 0 || bytes % granularity_ != 0) refuse("reserve", "the size is not a multiple of the granularity");
    // The range is reserved with one granule more and then cut to size, so that the address is a multiple of the
    // granularity, as it is on a GPU.
    const std::size_t span = bytes + granularity_;
    void* const got = ::mmap(nullptr, span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) throw_errno("reserve");
    const auto first = reinterpret_cast<Address>(got);
    const Address at = (first + granularity_ - 1) / granularity_ * granularity_;
    if (at != first) ::munmap(got, at - first);
    if (const std::size_t rest = first + span - (at + bytes); rest != 0) ::munmap(pointer(at + bytes), rest);
    try {
      const std::lock_guard lock(mutex_);
      reservations_.emplace(at, bytes);
    } catch (...) {
      ::munmap(pointer(at), bytes);
      throw;
    }
    return at;
  }

  void do_free_address(Address at, std::size_t bytes) override {
    const std::lock_guard lock(mutex_);
    const auto found = reservations_.find(at);
    if (found == reservations_.end() || found->second != bytes) refuse("free_address", "no such reservation");
    if (const auto next = mapped_.lower_bound(at); next != mapped_.end() && next->first < at + bytes)
      refuse("free_address", "something is still mapped there");
    if (::munmap(pointer(at), bytes) != 0) throw_errno("free_address");
    reservations_.erase(found);
  }

  Handle do_create(std::size_t bytes) override {
    if (bytes == 0 || bytes % granularity_ != 0) refuse("create", "the size is not a multiple of the granularity");
    const std::lock_guard lock(mutex_);
    if (capacity_ != 0 && live_bytes_ + bytes > capacity_)
      throw OutOfDeviceMemory("create", ENOMEM, "the simulated device is full");
    require_available("create", bytes);
    const int file = exportable() ? create_sealed(bytes) : file_;
    const off_t offset = exportable() ? 0 : take_offset(bytes);
    try {
      if (!exportable()) allocate(file, offset, bytes);
      return add({file, offset, bytes, 0, false});
    } catch (...) {
      if (exportable()) {
        ::close(file);
      } else {  // a part of the range may be allocated already
        ::fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, static_cast<off_t>(bytes));
        give_offset(offset, bytes);
      }
      throw;
    }
  }

  // Throws OutOfDeviceMemory when the machine has less than so many bytes left. This check is needed because the kernel
  // overcommits memory, and kills processes when it runs out. The available memory is read again only when an eighth of
  // what the last reading returned has been taken.
  void require_available(const char* call, std::size_t bytes) {
    if (bytes > unread_) {
      const std::size_t available = host_memory().free;
      if (bytes > available)
        throw OutOfDeviceMemory(call, ENOMEM,
                                std::to_string(bytes) + " bytes are more than the " + std::to_string(available) +
                                    " that this machine has left");
      unread_ = std::max(available / 8, bytes);
    }
    unread_ -= bytes;
  }

  // Allocates the pages now, so that a lack of memory is an error here and not a SIGBUS at the first access.
  static void allocate(int file, off_t offset, std::size_t bytes) {
    int failed = 0;
    do {  // older kernels fail with EINTR at any signal
      failed = ::fallocate(file, 0, offset, static_cast<off_t>(bytes));
    } while (failed != 0 && errno == EINTR);
    if (failed != 0) throw_errno("create");
  }

  // Returns a memfd of its own for a handle, sealed against shrinking, so that an access by a process that imports it
  // cannot fault.
  static int create_sealed(std::size_t bytes) {
    const int file = ::memfd_create("vattn", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (file < 0) throw_errno("create");
    try {
      allocate(file, 0, bytes);
      if (::fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) throw_errno("create");
    } catch (...) {
      ::close(file);
      throw;
    }
    return file;
  }

  // Takes the first hole of the file that is large enough, or else the end of the file, and returns its offset. Without
  // reuse of the holes the file would grow until it reaches the file size limit of the process.
  off_t take_offset(std::size_t bytes) {
    for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
      const auto [offset, size] = *hole;
      if (size < bytes) continue;
      if (size == bytes) {
        holes_.erase(hole);
      } else {
        auto rest = holes_.extract(hole);
        rest.key() = offset + static_cast<off_t>(bytes);
        rest.mapped() = size - bytes;
        holes_.insert(std::move(rest));
      }
      return offset;
    }
    const off_t offset = next_offset_;
    next_offset_ += static_cast<off_t>(bytes);
    return offset;
  }

  void give_offset(off_t offset, std::size_t bytes) noexcept {
    auto next = holes_.lower_bound(offset);
    if (next != holes_.begin()) {
      const auto before = std::prev(next);
      if (before->first + static_cast<off_t>(before->second) == offset) {
        offset = before->first;
        bytes += before->second;
        holes_.erase(before);
      }
    }
    if (next != holes_.end() && offset + static_cast<off_t>(bytes) == next->first) {
      bytes += next->second;
      holes_.erase(next);
    }
    if (offset + static_cast<off_t>(bytes) == next_offset_) {
      next_offset_ = offset;
      return;
    }
    try {
      holes_.emplace(offset, bytes);
    } catch (const std::bad_alloc&) {
      // This part of the file is never used again. Its memory has been returned already, so nothing else is lost.
    }
  }

  Handle add(Memory memory) {
    const auto handle = Handle{++last_handle_};
    memory_.emplace(handle, memory);
    live_bytes_ += memory.bytes;
    return handle;
  }

  int do_export_handle(Handle handle) override {
    const std::lock_guard lock(mutex_);
    const auto found = memory_.find(handle);
    if (found == memory_.end() || found->second.released) refuse("export_handle", "no such handle");
    const int descriptor = ::fcntl(found->second.file, F_DUPFD_CLOEXEC, 0);
    if (descriptor < 0) throw_errno("export_handle");
    return descriptor;
  }

  Handle do_import_handle(int descriptor, std::size_t bytes) override {
    struct stat info{};
    if (::fstat(descriptor, &info) != 0) throw_errno("import_handle");
    const int seals = ::fcntl(descriptor, F_GET_SEALS);
    if (seals < 0) refuse("import_handle", "the descriptor is not of memory");
    if ((seals & F_SEAL_SHRINK) == 0) refuse("import_handle", "the memory could be taken away by who sent it");
    if (static_cast<std::size_t>(info.st_size) != bytes) refuse("import_handle", "the memory has another size");
    const int file = ::fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
    if (file < 0) throw_errno("import_handle");
    const std::lock_guard lock(mutex_);
    try {
      return add({file, 0, bytes, 0, false});
    } catch (...) {
      ::close(file);
      throw;
    }
  }

  void do_release(Handle handle) override {
    const std::lock_guard lock(mutex_);
    const auto found = memory_.find(handle);
    if (found == memory_.end() || found->second.released) refuse("release", "no such handle");
    found->second.released = true;
    if (found->second.mappings == 0) punch(found);
  }

  void do_map(Address at, std::size_t bytes, Handle handle) override {
    const std::lock_guard lock(mutex_);
    const auto memory = memory_.find(handle);
    if (memory == memory_.end() || memory->second.released) refuse("map", "no such handle");
    if (memory->second.bytes != bytes) refuse("map", "a handle is mapped whole or not at all");
    if (at % granularity_ != 0) refuse("map", "the address is not a multiple of the granularity");
    const auto after = reservations_.upper_bound(at);
    if (after == reservations_.begin()) refuse("map", "the address is not reserved");
    const auto& [start, size] = *std::prev(after);
    if (at + bytes > start + size) refuse("map", "the range is not within one reservation");
    const auto next = mapped_.lower_bound(at);
    if (next != mapped_.end() && next->first < at + bytes) refuse("map", "something is mapped there");
    if (next != mapped_.begin()) {
      const auto& [before, mapping] = *std::prev(next);
      if (before + mapping.bytes > at) refuse("map", "something is mapped there");
    }
    const auto noted = mapped_.emplace(at, Mapped{bytes, handle}).first;
    if (::mmap(pointer(at), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, memory->second.file, memory->second.offset) ==
        MAP_FAILED) {
      const int code = errno;
      mapped_.erase(noted);
      errno = code;
      throw_errno("map");
    }
    ++memory->second.mappings;
  }

  void do_set_access(Address at, std::size_t bytes, Access access) override {
    const std::lock_guard lock(mutex_);
    // As CUDA does, this requires that every byte of the range is mapped. The range may span several mappings.
    auto next = mapped_.find(at);
    Address end = at;
    while (next != mapped_.end() && next->first == end && end < at + bytes) {
      end += next->second.bytes;
      ++next;
    }
    if (end != at + bytes) refuse("set_access", "the range is not made of whole mappings");
    if (::mprotect(pointer(at), bytes, access == Access::write ? PROT_READ | PROT_WRITE : PROT_READ) != 0)
      throw_errno("set_access");
  }

  void do_unmap(Address at, std::size_t bytes) override {
    const std::lock_guard lock(mutex_);
    const auto found = mapped_.find(at);
    if (found == mapped_.end() || found->second.bytes != bytes) refuse("unmap", "no such mapping");
    // PROT_NONE memory is mapped over it, so that the range stays reserved and an access to it faults.
    if (::mmap(pointer(at), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) ==
        MAP_FAILED)
      throw_errno("unmap");
    const auto memory = memory_.find(found->second.handle);
    mapped_.erase(found);
    if (--memory->second.mappings == 0 && memory->second.released) punch(memory);
  }

  void do_zero(Range range) override { std::memset(pointer(range.at), 0, range.bytes); }
  void do_zeroed() override {}

  void do_copy(Address to, Address from, std::size_t bytes, Stream) override {
    std::memcpy(pointer(to), pointer(from), bytes);
  }

  Address do_create_host(std::size_t bytes) override {
    {
      const std::lock_guard lock(mutex_);
      require_available("create_host", bytes);
    }
    void* const at = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw_errno("create_host");
    return reinterpret_cast<Address>(at);
  }

  void do_free_host(Address at, std::size_t bytes) override {
    if (::munmap(pointer(at), bytes) != 0) throw_errno("free_host");
  }

  FenceId do_record(Stream) override { return FenceId{1}; }
  void do_wait(FenceId) override {}
  bool do_passed(FenceId) override { return true; }
  void do_order(Stream, FenceId) override {}
  void do_drop(FenceId) noexcept override {}
  void do_synchronize() override {}

  void punch(std::unordered_map<Handle, Memory>::iterator memory) {
    const auto [file, offset, bytes, mappings, released] = memory->second;
    if (file != file_) {
      ::close(file);
    } else if (::fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, static_cast<off_t>(bytes)) != 0) {
      memory->second.released = false;
      throw_errno("release");
    } else {
      give_offset(offset, bytes);
    }
    live_bytes_ -= bytes;
    memory_.erase(memory);
  }

  [[noreturn]] static void refuse(const char* call, const char* why) { throw DriverError(call, EINVAL, why); }
  static void* pointer(Address at) { return reinterpret_cast<void*>(at); }

  const std::size_t capacity_;
  int file_ = -1;
  std::mutex mutex_;
  std::map<Address, std::size_t> reservations_;
  std::map<Address, Mapped> mapped_;
  std::unordered_map<Handle, Memory> memory_;
  std::uint64_t last_handle_ = 0;
  std::map<off_t, std::size_t> holes_;  // unused parts of the file: offset to bytes
  off_t next_offset_ = 0;
  std::size_t unread_ = 0;  // bytes that may be taken before require_available() reads again
  std::size_t live_bytes_ = 0;
};

}  // namespace

std::shared_ptr<Driver> make_host_driver(std::size_t granularity, std::size_t capacity, bool exportable) {
  return std::make_shared<HostDriver>(granularity, capacity, exportable);
}

}  // namespace vattn
