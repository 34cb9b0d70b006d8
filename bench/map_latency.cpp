// Prints median times in microseconds as JSON. With the argument `cuda`, for each size class: to create, map and set
// access to one handle by bare driver calls, and by vattn's classes. On either backend: of a growth into memory that
// was mapped ahead.
#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "arena.hpp"

using namespace vattn;

namespace {

using Clock = std::chrono::steady_clock;

double median(std::vector<double> times) {
  std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2), times.end());
  return times[times.size() / 2];
}

double since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

// The bare driver calls. The constructor makes the primary context current in the calling thread.
struct Bare {
  decltype(&::cuMemCreate) create;
  decltype(&::cuMemMap) map;
  decltype(&::cuMemSetAccess) set_access;
  decltype(&::cuMemUnmap) unmap;
  decltype(&::cuMemRelease) release;
  CUmemAllocationProp prop{};
  CUmemAccessDesc access{};

  explicit Bare(int device) {
    void* const library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    const auto load = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, name));
      if (function == nullptr) std::abort();
    };
    load(create, "cuMemCreate");
    load(map, "cuMemMap");
    load(set_access, "cuMemSetAccess");
    load(unmap, "cuMemUnmap");
    load(release, "cuMemRelease");
    decltype(&::cuDevicePrimaryCtxRetain) retain;
    decltype(&::cuCtxSetCurrent) set_current;
    load(retain, "cuDevicePrimaryCtxRetain");
    load(set_current, "cuCtxSetCurrent");
    CUcontext context = nullptr;
    check(retain(&context, device));
    check(set_current(context));
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
    access.location = prop.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  }

  static void check(CUresult result) {
    if (result != CUDA_SUCCESS) std::abort();
  }
};

void sizes(const std::shared_ptr<Driver>& driver, int rounds) {
  const Bare bare(driver->device());
  for (std::size_t size_class = 0; size_class < ExtentPool::kClasses; ++size_class) {
    const std::size_t bytes = driver->granularity() << size_class;
    const Reservation at(driver, bytes);
    std::vector<double> theirs;
    std::vector<double> ours;
    for (int round = 0; round < rounds; ++round) {
      {
        CUmemGenericAllocationHandle handle = 0;
        const auto start = Clock::now();
        Bare::check(bare.create(&handle, bytes, &bare.prop, 0));
        Bare::check(bare.map(at.base(), bytes, 0, handle, 0));
        Bare::check(bare.set_access(at.base(), bytes, &bare.access, 1));
        theirs.push_back(since(start));
        Bare::check(bare.unmap(at.base(), bytes));
        Bare::check(bare.release(handle));
      }
      const auto start = Clock::now();
      Mapping mapping(driver, std::make_shared<Extent>(driver, bytes), at.base());
      mapping.allow();
      ours.push_back(since(start));
    }
    std::printf("{\"handle_bytes\": %zu, \"bare_us\": %.3f, \"vattn_us\": %.3f}\n", bytes, median(theirs),
                median(ours));
  }
}

void hits(const std::shared_ptr<Driver>& driver) {
  constexpr std::size_t kTokens = 8192;
  Arena arena(driver, {{128 * 1024}}, {.slots = 1, .max_len = kTokens, .budget = std::size_t{1} << 40},
              std::make_shared<Mapper>());
  const std::size_t slot = arena.acquire(std::nullopt, 0, Stream{0});
  std::vector<double> times;
  std::uint64_t before = 0;
  for (std::size_t length = 1; length <= kTokens; ++length) {
    const auto start = Clock::now();
    arena.grow(std::span(&slot, 1), length, length - 1, Stream{0});
    const double took = since(start);
    const Stats stats = arena.stats();
    if (stats.hits != before) times.push_back(took);
    before = stats.hits;
    std::this_thread::sleep_for(std::chrono::microseconds(200));  // a decode rate of 5000 tokens/s
  }
  std::printf("{\"hits\": %zu, \"hit_us\": %.3f, \"misses\": %zu}\n", times.size(), median(times),
              static_cast<std::size_t>(arena.stats().misses));
}

}  // namespace

int main(int argc, char** argv) {
  const bool cuda = argc > 1 && std::strcmp(argv[1], "cuda") == 0;
  const auto driver = cuda ? make_cuda_driver(0) : make_host_driver(2 << 20, 0);
  if (cuda) sizes(driver, 200);
  hits(driver);
}
