// The driver contract (driver.hpp) on CUDA's virtual-memory API. libcuda is opened at first use, so that the extension
// also loads on machines without it.
#include <cuda.h>
#include <dlfcn.h>

#include <array>
#include <mutex>
#include <new>
#include <vector>

#include "driver.hpp"

namespace vattn {
namespace {

// The oldest driver API version in which every function of the table below has the prototype that our headers declare.
constexpr int kApiVersion = 12000;

// clang-format off
#define VATTN_CUDA_FUNCTIONS(X)                                                                        \
  X(cuInit) X(cuDriverGetVersion) X(cuDeviceGetCount) X(cuDeviceGet) X(cuDeviceGetName)                \
  X(cuDeviceGetAttribute) X(cuDevicePrimaryCtxRetain) X(cuDevicePrimaryCtxRelease)                     \
  X(cuCtxPushCurrent) X(cuCtxPopCurrent) X(cuCtxSynchronize) X(cuCtxGetStreamPriorityRange)            \
  X(cuMemGetInfo) X(cuMemGetAllocationGranularity) X(cuMemAddressReserve) X(cuMemAddressFree)          \
  X(cuMemCreate) X(cuMemExportToShareableHandle) X(cuMemImportFromShareableHandle) X(cuMemRelease) X(cuMemMap) X(cuMemSetAccess) X(cuMemUnmap)                           \
  X(cuMemsetD8Async) X(cuMemcpyAsync) X(cuMemHostAlloc) X(cuMemFreeHost) X(cuStreamCreateWithPriority) X(cuStreamSynchronize) \
  X(cuStreamWaitEvent) \
  X(cuStreamDestroy) X(cuStreamIsCapturing) X(cuEventCreate) X(cuEventRecord) X(cuEventQuery) X(cuEventSynchronize)           \
  X(cuEventDestroy) X(cuGetErrorName) X(cuGetErrorString)
// clang-format on

// The functions of libcuda. Several names are macros for a versioned function (cuMemGetInfo is cuMemGetInfo_v2).
// `#name` and `##name` keep the plain name, which cuGetProcAddress expects; `decltype(&::name)` is the type of the
// versioned function.
struct Api {
#define VATTN_MEMBER(name) decltype(&::name) p_##name = nullptr;
  VATTN_CUDA_FUNCTIONS(VATTN_MEMBER)
#undef VATTN_MEMBER
};

// Opens libcuda and initializes CUDA. Throws BackendUnavailable, with the reason, when that is not possible.
Api load_api() {
  // The library is never closed, because the NVIDIA driver runs threads of its own.
  void* const library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr)
    throw BackendUnavailable(
        "CUDA cannot be used: libcuda.so.1 was not found. Install the NVIDIA driver, or use device=\"cpu\"");
  using GetProcAddress = CUresult (*)(const char*, void**, int, cuuint64_t, CUdriverProcAddressQueryResult*);
  const auto get = reinterpret_cast<GetProcAddress>(::dlsym(library, "cuGetProcAddress_v2"));
  if (get == nullptr) throw BackendUnavailable("CUDA cannot be used: the NVIDIA driver is older than CUDA 12");
  Api api;
  const auto resolve = [&](const char* name, void** slot) {
    if (get(name, slot, kApiVersion, CU_GET_PROC_ADDRESS_DEFAULT, nullptr) != CUDA_SUCCESS || *slot == nullptr)
      throw BackendUnavailable(std::string("CUDA cannot be used: the NVIDIA driver lacks ") + name);
  };
#define VATTN_RESOLVE(name) resolve(#name, reinterpret_cast<void**>(&api.p_##name));
  VATTN_CUDA_FUNCTIONS(VATTN_RESOLVE)
#undef VATTN_RESOLVE
  if (const CUresult rc = api.p_cuInit(0); rc != CUDA_SUCCESS) {
    const char* why = nullptr;
    api.p_cuGetErrorString(rc, &why);
    throw BackendUnavailable("CUDA cannot be used: cuInit failed with code " + std::to_string(rc) + ": " +
                             (why != nullptr ? why : "unknown"));
  }
  return api;
}

// Returns the function table. There is one for each process, as there is one instance of libcuda.
const Api& api() {
  static const Api loaded = load_api();
  return loaded;
}

void check(CUresult rc, const char* call) {
  // CUDA reports DEINITIALIZED at process exit. By then it has freed everything, so this counts as success.
  if (rc == CUDA_SUCCESS || rc == CUDA_ERROR_DEINITIALIZED) return;
  const char* name = nullptr;
  const char* why = nullptr;
  api().p_cuGetErrorName(rc, &name);
  api().p_cuGetErrorString(rc, &why);
  const std::string text =
      std::string(name != nullptr ? name : "unknown error") + " (" + (why != nullptr ? why : "") + ")";
  if (rc == CUDA_ERROR_OUT_OF_MEMORY) throw OutOfDeviceMemory(call, rc, text);
  throw DriverError(call, rc, text);
}

class CudaDriver final : public Driver {
 public:
  CudaDriver(int device, bool exportable) : Driver(Kind::cuda, device, exportable) {
    const Api& cu = api();
    int devices = 0;
    const CUresult counted = cu.p_cuDeviceGetCount(&devices);
    if (counted == CUDA_ERROR_NOT_INITIALIZED)
      throw BackendUnavailable("CUDA cannot be used in a process forked after CUDA was: start it with 'spawn'");
    check(counted, "cuDeviceGetCount");
    if (device < 0 || device >= devices)
      throw BackendUnavailable("CUDA device " + std::to_string(device) + " does not exist: this process sees " +
                               std::to_string(devices));
    check(cu.p_cuDeviceGet(&cu_device_, device), "cuDeviceGet");
    int supported = 0;
    check(cu.p_cuDeviceGetAttribute(&supported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, cu_device_),
          "cuDeviceGetAttribute");
    if (supported == 0)
      throw BackendUnavailable("CUDA device " + std::to_string(device) + " has no virtual memory management");
    properties_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties_.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
    if (exportable) properties_.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    check(cu.p_cuMemGetAllocationGranularity(&granularity_, &properties_, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
          "cuMemGetAllocationGranularity");
    // torch uses the primary context as well, so that streams and addresses are valid for both.
    check(cu.p_cuDevicePrimaryCtxRetain(&context_, cu_device_), "cuDevicePrimaryCtxRetain");
    try {
      const Current current(context_);
      int lowest = 0;
      int highest = 0;
      check(cu.p_cuCtxGetStreamPriorityRange(&lowest, &highest), "cuCtxGetStreamPriorityRange");
      for (CUstream& stream : streams_)
        check(cu.p_cuStreamCreateWithPriority(&stream, CU_STREAM_NON_BLOCKING, highest), "cuStreamCreateWithPriority");
    } catch (...) {
      for (const CUstream stream : streams_)
        if (stream != nullptr) cu.p_cuStreamDestroy(stream);
      cu.p_cuDevicePrimaryCtxRelease(cu_device_);
      throw;
    }
  }

  ~CudaDriver() override {
    if (in_forked_child()) return;
    const auto quietly = [this](auto undo) {
      try {
        undo();
      } catch (const std::exception& error) {
        report(error);
      }
    };
    for (const FenceId event : events_) destroy(event);
    quietly([this] {
      const Current current(context_);
      for (const CUstream stream : streams_) check(api().p_cuStreamDestroy(stream), "cuStreamDestroy");
    });
    quietly([this] { check(api().p_cuDevicePrimaryCtxRelease(cu_device_), "cuDevicePrimaryCtxRelease"); });
  }

  std::string description() const override {
    std::array<char, 128> name{};
    check(api().p_cuDeviceGetName(name.data(), static_cast<int>(name.size()), cu_device_), "cuDeviceGetName");
    return name.data();
  }

  Stream own_stream(OwnStream which) const noexcept override {
    return Stream{reinterpret_cast<std::uintptr_t>(streams_[static_cast<std::size_t>(which)])};
  }

  // Measured on an H100: cuMemSetAccess refuses the 524,091st mapping.
  std::size_t mapping_limit() const override { return 524'090; }

 private:
  // Makes the context current in the calling thread for one scope. A new thread has no current context, and a thread of
  // torch gets its own back at the end of the scope.
  class Current {
   public:
    explicit Current(CUcontext context) { check(api().p_cuCtxPushCurrent(context), "cuCtxPushCurrent"); }
    ~Current() {
      CUcontext popped = nullptr;
      api().p_cuCtxPopCurrent(&popped);
    }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
  };

  MemoryInfo do_memory_info() override {
    const Current current(context_);
    MemoryInfo info{};
    check(api().p_cuMemGetInfo(&info.free, &info.total), "cuMemGetInfo");
    return info;
  }

  Address do_reserve(std::size_t bytes) override {
    const Current current(context_);
    CUdeviceptr at = 0;
    check(api().p_cuMemAddressReserve(&at, bytes, granularity_, 0, 0), "cuMemAddressReserve");
    return static_cast<Address>(at);
  }

  void do_free_address(Address at, std::size_t bytes) override {
    const Current current(context_);
    check(api().p_cuMemAddressFree(at, bytes), "cuMemAddressFree");
  }

  Handle do_create(std::size_t bytes) override {
    const Current current(context_);
    CUmemGenericAllocationHandle handle = 0;
    check(api().p_cuMemCreate(&handle, bytes, &properties_, 0), "cuMemCreate");
    return Handle{handle};
  }

  void do_release(Handle handle) override {
    const Current current(context_);
    check(api().p_cuMemRelease(static_cast<CUmemGenericAllocationHandle>(handle)), "cuMemRelease");
  }

  int do_export_handle(Handle handle) override {
    const Current current(context_);
    int descriptor = -1;
    check(api().p_cuMemExportToShareableHandle(&descriptor, static_cast<CUmemGenericAllocationHandle>(handle),
                                               CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
          "cuMemExportToShareableHandle");
    return descriptor;
  }

  Handle do_import_handle(int descriptor, std::size_t) override {
    const Current current(context_);
    CUmemGenericAllocationHandle handle = 0;
    // CUDA expects the descriptor itself as the value of the pointer.
    void* const value = reinterpret_cast<void*>(static_cast<std::uintptr_t>(descriptor));
    check(api().p_cuMemImportFromShareableHandle(&handle, value, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
          "cuMemImportFromShareableHandle");
    return Handle{handle};
  }

  void do_map(Address at, std::size_t bytes, Handle handle) override {
    const Current current(context_);
    check(api().p_cuMemMap(at, bytes, 0, static_cast<CUmemGenericAllocationHandle>(handle), 0), "cuMemMap");
  }

  void do_set_access(Address at, std::size_t bytes, Access access) override {
    const Current current(context_);
    const CUmemAccessDesc described{
        .location = properties_.location,
        .flags = access == Access::write ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_READ};
    check(api().p_cuMemSetAccess(at, bytes, &described, 1), "cuMemSetAccess");
  }

  void do_unmap(Address at, std::size_t bytes) override {
    const Current current(context_);
    check(api().p_cuMemUnmap(at, bytes), "cuMemUnmap");
  }

  void do_zero(Range range) override {
    const Current current(context_);
    check(api().p_cuMemsetD8Async(range.at, 0, range.bytes, zeroing()), "cuMemsetD8Async");
  }

  void do_zeroed() override {
    const Current current(context_);
    check(api().p_cuStreamSynchronize(zeroing()), "cuStreamSynchronize");
  }

  void do_copy(Address to, Address from, std::size_t bytes, Stream stream) override {
    const Current current(context_);
    // With unified addressing, CUDA tells from the addresses which of them are in host memory.
    check(api().p_cuMemcpyAsync(to, from, bytes, reinterpret_cast<CUstream>(stream)), "cuMemcpyAsync");
  }

  FenceId do_record(Stream stream) override {
    const Current current(context_);
    CUstreamCaptureStatus capturing = CU_STREAM_CAPTURE_STATUS_NONE;
    check(api().p_cuStreamIsCapturing(reinterpret_cast<CUstream>(stream), &capturing), "cuStreamIsCapturing");
    if (capturing != CU_STREAM_CAPTURE_STATUS_NONE)
      throw DriverError("cuEventRecord", CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                        "the stream is being captured: shorten and close sequences outside of the capture");
    const FenceId fence = take_event();
    const CUresult rc = api().p_cuEventRecord(reinterpret_cast<CUevent>(fence), reinterpret_cast<CUstream>(stream));
    if (rc != CUDA_SUCCESS) {
      do_drop(fence);
      check(rc, "cuEventRecord");
    }
    return fence;
  }

  // Returns an event that a dropped fence has left for reuse, or a new one.
  FenceId take_event() {
    {
      const std::lock_guard lock(events_mutex_);
      if (!events_.empty()) {
        const FenceId event = events_.back();
        events_.pop_back();
        return event;
      }
    }
    CUevent event = nullptr;
    check(api().p_cuEventCreate(&event, CU_EVENT_DISABLE_TIMING), "cuEventCreate");
    return FenceId{reinterpret_cast<std::uintptr_t>(event)};
  }

  void do_wait(FenceId fence) override {
    const Current current(context_);
    check(api().p_cuEventSynchronize(reinterpret_cast<CUevent>(fence)), "cuEventSynchronize");
  }

  bool do_passed(FenceId fence) override {
    const Current current(context_);
    const CUresult rc = api().p_cuEventQuery(reinterpret_cast<CUevent>(fence));
    if (rc == CUDA_ERROR_NOT_READY) return false;
    check(rc, "cuEventQuery");
    return true;
  }

  void do_drop(FenceId fence) noexcept override {
    try {
      const std::lock_guard lock(events_mutex_);
      if (events_.size() < kIdleEvents) return events_.push_back(fence);
    } catch (const std::bad_alloc&) {  // the event is destroyed instead of kept
    }
    destroy(fence);
  }

  void destroy(FenceId event) noexcept {
    try {
      const Current current(context_);
      check(api().p_cuEventDestroy(reinterpret_cast<CUevent>(event)), "cuEventDestroy");
    } catch (const std::exception& error) {
      report(error);
    }
  }

  void do_order(Stream stream, FenceId fence) override {
    const Current current(context_);
    check(api().p_cuStreamWaitEvent(reinterpret_cast<CUstream>(stream), reinterpret_cast<CUevent>(fence), 0),
          "cuStreamWaitEvent");
  }

  Address do_create_host(std::size_t bytes) override {
    const Current current(context_);
    void* at = nullptr;
    check(api().p_cuMemHostAlloc(&at, bytes, CU_MEMHOSTALLOC_PORTABLE), "cuMemHostAlloc");
    return reinterpret_cast<Address>(at);
  }

  void do_free_host(Address at, std::size_t) override {
    const Current current(context_);
    check(api().p_cuMemFreeHost(reinterpret_cast<void*>(at)), "cuMemFreeHost");
  }

  CUstream zeroing() const noexcept { return streams_[static_cast<std::size_t>(OwnStream::zeroing)]; }

  void do_synchronize() override {
    const Current current(context_);
    check(api().p_cuCtxSynchronize(), "cuCtxSynchronize");
  }

  // The most events that are kept for reuse. About as many are needed as there are streams in use.
  static constexpr std::size_t kIdleEvents = 64;
  std::mutex events_mutex_;
  std::vector<FenceId> events_;
  CUdevice cu_device_ = 0;
  CUcontext context_ = nullptr;
  std::array<CUstream, 3> streams_{};  // indexed by OwnStream
  CUmemAllocationProp properties_{};
};

}  // namespace

std::shared_ptr<Driver> make_cuda_driver(int device, bool exportable) {
  return std::make_shared<CudaDriver>(device, exportable);
}

CudaProbe probe_cuda() {
  CudaProbe probe;
  try {
    check(api().p_cuDriverGetVersion(&probe.driver_version), "cuDriverGetVersion");
    check(api().p_cuDeviceGetCount(&probe.devices), "cuDeviceGetCount");
    probe.available = probe.devices > 0;
    if (!probe.available) probe.why = "the driver sees no device";
  } catch (const Error& error) {
    probe.why = error.what();
  }
  return probe;
}

}  // namespace vattn
