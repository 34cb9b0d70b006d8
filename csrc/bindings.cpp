// The Python bindings: the only C++ file that uses the Python API. The interpreter lock is released around every call
// that may map or unmap memory or wait for the device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dlpack.hpp"
#include "host_memory.hpp"
#include "sequence.hpp"

namespace py = pybind11;
using namespace vattn;

namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

struct Exported {
  dlpack::ManagedTensor managed;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;
  std::shared_ptr<void> owner;  // keeps the addresses reserved until the last view is gone
};

// Returns a DLPack capsule of signed integers of `itemsize` bytes, with strides in elements; the importer views them as
// the data type that they have. Throws std::invalid_argument when shape and strides differ in length.
py::capsule export_tensor(std::shared_ptr<void> owner, const Driver& driver, Address at,
                          std::vector<std::int64_t> shape, std::vector<std::int64_t> strides, unsigned itemsize) {
  if (shape.size() != strides.size()) throw std::invalid_argument("shape and strides differ in length");
  auto exported = std::make_unique<Exported>();
  exported->shape = std::move(shape);
  exported->strides = std::move(strides);
  exported->owner = std::move(owner);
  const bool cuda = driver.kind() == Driver::Kind::cuda;
  exported->managed = {
      .tensor = {.data = reinterpret_cast<void*>(at),
                 .device = {cuda ? dlpack::DeviceType::cuda : dlpack::DeviceType::cpu, cuda ? driver.device() : 0},
                 .ndim = static_cast<std::int32_t>(exported->shape.size()),
                 .dtype = {0, static_cast<std::uint8_t>(itemsize * 8), 1},
                 .shape = exported->shape.data(),
                 .strides = exported->strides.data(),
                 .byte_offset = 0},
      .context = exported.get(),
      .deleter = [](dlpack::ManagedTensor* self) { delete static_cast<Exported*>(self->context); }};
  py::capsule capsule(&exported->managed, "dltensor", [](PyObject* object) {
    // An importer renames the capsule and calls the deleter itself.
    if (PyCapsule_IsValid(object, "dltensor") == 0) return;
    auto* const managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(object, "dltensor"));
    managed->deleter(managed);
  });
  exported.release();
  return capsule;
}

// Deletes an arena or a sequence with the interpreter lock released, since the destructor may wait for the device. The
// last owner may be Python, or the deleter of a tensor, which may run without the interpreter lock.
template <typename Owned>
void delete_unlocked(Owned* owned) {
  if (PyGILState_Check() == 0) {
    delete owned;
    return;
  }
  const py::gil_scoped_release unlocked;
  delete owned;
}

// In a forked child the arena is leaked: its destructor would destroy what threads of the parent, which do not exist in
// the child, may be waiting on.
void delete_arena(Arena* arena) {
  if (!arena->driver()->in_forked_child()) delete_unlocked(arena);
}

std::shared_ptr<Sequence> owned(Sequence* sequence) { return {sequence, delete_unlocked<Sequence>}; }

template <typename... Attributes>
void raise(const char* type, const char* what, Attributes... attributes) {
  const py::object error = py::module_::import("vattn.errors").attr(type)(what);
  (py::setattr(error, attributes.first, py::cast(attributes.second)), ...);
  PyErr_SetObject(py::type::of(error).ptr(), error.ptr());
}

void translate(std::exception_ptr pointer) {
  try {
    std::rethrow_exception(pointer);
  } catch (const OutOfDeviceMemory& error) {
    raise("OutOfDeviceMemory", error.what(), std::pair{"call", error.call()}, std::pair{"code", error.code()});
  } catch (const DriverError& error) {
    raise("DriverError", error.what(), std::pair{"call", error.call()}, std::pair{"code", error.code()});
  } catch (const BudgetExceeded& error) {
    raise("BudgetExceeded", error.what(), std::pair{"needed", error.needed()}, std::pair{"free", error.free()});
  } catch (const SequenceTooLong& error) {
    raise("SequenceTooLong", error.what());
  } catch (const BackendUnavailable& error) {
    raise("BackendUnavailable", error.what());
  } catch (const Error& error) {
    raise("Error", error.what());
  }
}

Call call_named(const std::string& name) {
  for (std::size_t index = 0; index < kCallNames.size(); ++index)
    if (name == kCallNames[index]) return static_cast<Call>(index);
  throw std::invalid_argument("no driver call is named " + name);
}

Share share_named(const std::string& name) {
  if (name == "auto") return Share::cheapest;
  if (name == "alias") return Share::alias;
  if (name == "copy") return Share::copy;
  throw std::invalid_argument("share must be 'auto', 'alias' or 'copy', not '" + name + "'");
}

py::tuple as_tuple(const Arena::CachedPrefix& known) {
  return py::make_tuple(known.generation, known.positions, known.parked);
}

const char* name_of(Arena::State state) {
  switch (state) {
    case Arena::State::running:
      return "running";
    case Arena::State::parked:
      return "parked";
    case Arena::State::bare:
      break;
  }
  return "bare";
}

void bind_driver(py::module_& module) {
  py::class_<Driver, std::shared_ptr<Driver>>(module, "Driver")
      .def_property_readonly("kind",
                             [](const Driver& self) { return self.kind() == Driver::Kind::cuda ? "cuda" : "cpu"; })
      .def_property_readonly("device", &Driver::device)
      .def_property_readonly("granularity", &Driver::granularity)
      .def_property_readonly("description", &Driver::description)
      .def_property_readonly("reports", &Driver::reports)
      .def_property_readonly("exportable", &Driver::exportable)
      .def_property_readonly("in_forked_child", &Driver::in_forked_child)
      .def_property_readonly("mappings", &Driver::mappings)
      .def_property_readonly("mapping_limit", &Driver::mapping_limit)
      .def("memory_info",
           [](Driver& self) {
             const MemoryInfo info = [&self] {
               const py::gil_scoped_release unlocked;
               return self.memory_info();
             }();
             return py::make_tuple(info.free, info.total);
           })
      .def(
          "counts",
          [](const Driver& self, bool background) {
            py::dict counts;
            for (std::size_t index = 0; index < kCallNames.size(); ++index) {
              const auto call = static_cast<Call>(index);
              counts[kCallNames[index]] = background ? self.background_count(call) : self.count(call);
            }
            return counts;
          },
          py::kw_only(), py::arg("background") = false)
      .def("fail_at", &Driver::fail_at, py::arg("k"), py::kw_only(), py::arg("times") = 1,
           py::arg("out_of_memory") = false)
      .def(
          "charge",
          [](Driver& self, const std::string& call, std::uint64_t nanoseconds) {
            self.charge(call_named(call), nanoseconds);
          },
          py::arg("call"), py::arg("nanoseconds"))
      .def("reserve", &Driver::reserve, py::arg("nbytes"), Unlocked())
      .def("free_address", &Driver::free_address, py::arg("address"), py::arg("nbytes"), Unlocked())
      .def(
          "create", [](Driver& self, std::size_t bytes) { return static_cast<std::uint64_t>(self.create(bytes)); },
          py::arg("nbytes"), Unlocked())
      .def(
          "release", [](Driver& self, std::uint64_t handle) { self.release(Handle{handle}); }, py::arg("handle"),
          Unlocked())
      .def(
          "map",
          [](Driver& self, Address at, std::size_t bytes, std::uint64_t handle) {
            self.map(at, bytes, Handle{handle});
          },
          py::arg("address"), py::arg("nbytes"), py::arg("handle"), Unlocked())
      .def(
          "set_access",
          [](Driver& self, Address at, std::size_t bytes, bool read_only) {
            self.set_access(at, bytes, read_only ? Access::read : Access::write);
          },
          py::arg("address"), py::arg("nbytes"), py::kw_only(), py::arg("read_only") = false, Unlocked())
      .def("unmap", &Driver::unmap, py::arg("address"), py::arg("nbytes"), Unlocked())
      .def(
          "zero", [](Driver& self, Address at, std::size_t bytes) { self.zero({at, bytes}); }, py::arg("address"),
          py::arg("nbytes"), Unlocked())
      .def("zeroed", &Driver::zeroed, Unlocked())
      .def(
          "copy",
          [](Driver& self, Address to, Address from, std::size_t bytes, std::uintptr_t stream) {
            self.copy(to, from, bytes, Stream{stream});
          },
          py::arg("to"), py::arg("source"), py::arg("nbytes"), py::kw_only(), py::arg("stream") = 0, Unlocked())
      .def(
          "record",
          [](Driver& self, std::uintptr_t stream) { return static_cast<std::uintptr_t>(self.record(Stream{stream})); },
          py::kw_only(), py::arg("stream") = 0, Unlocked())
      .def(
          "wait", [](Driver& self, std::uintptr_t fence) { self.wait(FenceId{fence}); }, py::arg("fence"), Unlocked())
      .def(
          "passed", [](Driver& self, std::uintptr_t fence) { return self.passed(FenceId{fence}); }, py::arg("fence"),
          Unlocked())
      .def(
          "drop", [](Driver& self, std::uintptr_t fence) { self.drop(FenceId{fence}); }, py::arg("fence"), Unlocked())
      .def("create_host", &Driver::create_host, py::arg("nbytes"), Unlocked())
      .def("free_host", &Driver::free_host, py::arg("address"), py::arg("nbytes"), Unlocked())
      .def("synchronize", &Driver::synchronize, Unlocked())
      .def(
          "dlpack",
          [](const std::shared_ptr<Driver>& self, Address at, std::vector<std::int64_t> shape,
             std::vector<std::int64_t> strides, unsigned itemsize) {
            return export_tensor(self, *self, at, std::move(shape), std::move(strides), itemsize);
          },
          py::arg("address"), py::arg("shape"), py::arg("strides"), py::arg("itemsize"));
  module.def("host_driver", &make_host_driver, py::arg("granularity"), py::kw_only(), py::arg("capacity") = 0,
             py::arg("exportable") = false);
  module.def("cuda_driver", &make_cuda_driver, py::arg("device"), py::kw_only(), py::arg("exportable") = false,
             Unlocked());
  module.def(
      "host_memory",
      [](const std::string& root) {
        const MemoryInfo memory = host_memory(root);
        return py::make_tuple(memory.free, memory.total);
      },
      py::arg("root") = "");
  module.def("probe_cuda", [] {
    const CudaProbe probe = [] {
      const py::gil_scoped_release unlocked;
      return probe_cuda();
    }();
    py::dict result;
    result["available"] = probe.available;
    result["why"] = probe.why;
    result["driver_version"] = probe.driver_version;
    result["devices"] = probe.devices;
    return result;
  });
}

void bind_mapper(py::module_& module) {
  py::class_<Mapper, std::shared_ptr<Mapper>>(module, "Mapper")
      .def(py::init<>())
      .def("stop", &Mapper::stop, Unlocked());
}

void bind_arena(py::module_& module) {
  using Slots = std::vector<std::size_t>;
  py::class_<Swapped, std::shared_ptr<Swapped>>(module, "Swapped")
      .def_readonly("length", &Swapped::length)
      .def_property_readonly("done", &Swapped::done);
  py::class_<Arena, std::shared_ptr<Arena>>(module, "Arena")
      .def(py::init([](std::shared_ptr<Driver> driver, const std::vector<std::pair<std::size_t, std::size_t>>& planes,
                       std::size_t slots, std::size_t max_len, std::size_t budget, std::size_t tail_rows,
                       std::size_t growth_divisor, std::optional<std::size_t> lookahead, std::shared_ptr<Mapper> mapper,
                       std::optional<std::size_t> alias_limit, std::optional<std::size_t> host_budget,
                       bool protect_shared) {
             std::vector<Plane> described;
             for (const auto& [row_bytes, window] : planes) described.push_back({row_bytes, window});
             const ArenaOptions options{.slots = slots,
                                        .max_len = max_len,
                                        .budget = budget,
                                        .tail_rows = tail_rows,
                                        .growth_divisor = growth_divisor,
                                        .lookahead = lookahead,
                                        .alias_limit = alias_limit,
                                        .host_budget = host_budget.value_or(ArenaOptions{}.host_budget),
                                        .protect_shared = protect_shared};
             // Released only in this scope: pybind11 registers the new object afterwards, with the interpreter lock.
             const py::gil_scoped_release unlocked;
             return std::shared_ptr<Arena>(
                 new Arena(std::move(driver), std::move(described), options, std::move(mapper)), delete_arena);
           }),
           py::arg("driver"), py::arg("planes"), py::kw_only(), py::arg("slots"), py::arg("max_len"), py::arg("budget"),
           py::arg("tail_rows") = 0, py::arg("growth_divisor") = ArenaOptions{}.growth_divisor,
           py::arg("lookahead") = std::nullopt, py::arg("mapper") = nullptr, py::arg("alias_limit") = std::nullopt,
           py::arg("host_budget") = std::nullopt, py::arg("protect_shared") = false)
      .def(
          "acquire",
          [](Arena& self, std::optional<std::size_t> slot, std::size_t expected, std::uintptr_t stream, bool empty,
             std::optional<std::size_t> like, std::size_t positions) {
            return self.acquire(slot, expected, Stream{stream}, empty, like, positions);
          },
          py::arg("slot") = std::nullopt, py::kw_only(), py::arg("expected") = 0, py::arg("stream") = 0,
          py::arg("empty") = false, py::arg("like") = std::nullopt, py::arg("positions") = 0, Unlocked())
      .def(
          "grow",
          [](Arena& self, const Slots& slots, const Slots& positions, const Slots& min_truncate_length, std::uintptr_t stream) {
            if (self.try_grow(slots, PerSlot(positions), PerSlot(min_truncate_length), Stream{stream})) return;
            const py::gil_scoped_release release;
            self.grow(slots, PerSlot(positions), PerSlot(min_truncate_length), Stream{stream});
          },
          py::arg("slots"), py::arg("positions"), py::arg("min_truncate_length"), py::arg("stream") = 0)
      .def(
          "grow",
          [](Arena& self, const Slots& slots, std::size_t positions, std::size_t min_truncate_length, std::uintptr_t stream) {
            if (self.try_grow(slots, PerSlot(positions), PerSlot(min_truncate_length), Stream{stream})) return;
            const py::gil_scoped_release release;
            self.grow(slots, PerSlot(positions), PerSlot(min_truncate_length), Stream{stream});
          },
          py::arg("slots"), py::arg("positions"), py::arg("min_truncate_length"), py::arg("stream") = 0)
      .def(
          "truncate",
          [](Arena& self, const Slots& slots, std::size_t positions, std::uintptr_t stream) {
            self.truncate(slots, positions, Stream{stream});
          },
          py::arg("slots"), py::arg("positions"), py::arg("stream") = 0, Unlocked())
      .def(
          "release",
          [](Arena& self, const Slots& slots, std::uintptr_t stream) { self.release(slots, Stream{stream}); },
          py::arg("slots"), py::arg("stream") = 0, Unlocked())
      .def(
          "open",
          [](const std::shared_ptr<Arena>& self, std::optional<std::size_t> slot, std::size_t expected,
             std::uintptr_t stream, bool empty, std::optional<std::size_t> like, std::size_t positions) {
            return owned(new Sequence(self, slot, expected, Stream{stream}, empty, like, positions));
          },
          py::arg("slot") = std::nullopt, py::kw_only(), py::arg("expected") = 0, py::arg("stream") = 0,
          py::arg("empty") = false, py::arg("like") = std::nullopt, py::arg("positions") = 0, Unlocked())
      .def("prefetch", &Arena::prefetch, py::arg("slot"), py::arg("positions"), Unlocked())
      .def(
          "use", [](Arena& self, std::size_t slot, std::uintptr_t stream) { self.use(slot, Stream{stream}); },
          py::arg("slot"), py::arg("stream"))
      .def(
          "commit",
          [](Arena& self, std::size_t slot, std::size_t positions) { return as_tuple(self.commit(slot, positions)); },
          py::arg("slot"), py::arg("positions"))
      .def(
          "cached_prefix", [](const Arena& self, std::size_t slot) { return as_tuple(self.cached_prefix(slot)); }, py::arg("slot"))
      .def("forget", &Arena::forget, py::arg("slot"), py::arg("generation"), Unlocked())
      .def(
          "resume",
          [](Arena& self, std::size_t slot, std::uint64_t generation, std::size_t positions, std::uintptr_t stream) {
            return self.resume(slot, generation, positions, Stream{stream});
          },
          py::arg("slot"), py::arg("generation"), py::arg("positions"), py::arg("stream") = 0, Unlocked())
      .def(
          "reopen",
          [](const std::shared_ptr<Arena>& self, std::size_t slot, std::uint64_t generation, std::size_t positions,
             std::uintptr_t stream) -> std::shared_ptr<Sequence> {
            if (!self->resume(slot, generation, positions, Stream{stream})) return nullptr;
            return owned(new Sequence(self, slot));
          },
          py::arg("slot"), py::arg("generation"), py::arg("positions"), py::arg("stream") = 0, Unlocked())
      .def(
          "fork",
          [](Arena& self, std::size_t source, std::size_t positions, const Slots& targets,
             std::optional<std::uint64_t> generation, const std::string& share, std::uintptr_t stream) {
            const Share chosen = share_named(share);
            const py::gil_scoped_release release;
            return self.fork(source, generation, positions, targets, chosen, Stream{stream});
          },
          py::arg("source"), py::arg("positions"), py::arg("targets"), py::kw_only(), py::arg("generation") = std::nullopt,
          py::arg("share") = "auto", py::arg("stream") = 0)
      .def(
          "copy_on_write",
          [](Arena& self, const Slots& slots, std::size_t positions, std::uintptr_t stream) {
            self.copy_on_write(slots, positions, Stream{stream});
          },
          py::arg("slots"), py::arg("positions"), py::arg("stream") = 0, Unlocked())
      .def("compact", &Arena::compact, py::arg("slot"), py::arg("positions"), Unlocked())
      .def(
          "swap_out",
          [](Arena& self, std::size_t slot, std::uintptr_t stream) { return self.swap_out(slot, Stream{stream}); },
          py::arg("slot"), py::arg("stream") = 0, Unlocked())
      .def(
          "swap_in",
          [](Arena& self, Swapped& swapped, std::optional<std::size_t> slot, std::uintptr_t stream) {
            return self.swap_in(swapped, slot, Stream{stream});
          },
          py::arg("swapped"), py::arg("slot") = std::nullopt, py::arg("stream") = 0, Unlocked())
      .def(
          "export_rows",
          [](Arena& self, std::size_t slot, std::uintptr_t stream) {
            const auto runs = [&] {
              const py::gil_scoped_release release;
              return self.export_rows(slot, Stream{stream});
            }();
            py::list result;
            for (const Arena::ExportedRun& run : runs) {
              py::list extents;
              for (const auto& [bytes, descriptor] : run.extents) extents.append(py::make_tuple(bytes, descriptor));
              result.append(py::make_tuple(run.head, extents));
            }
            return result;
          },
          py::arg("slot"), py::arg("stream") = 0)
      .def(
          "import_rows",
          [](Arena& self, std::size_t slot, std::size_t positions,
             const std::vector<std::pair<std::size_t, std::vector<std::pair<std::size_t, int>>>>& described) {
            std::vector<Arena::ExportedRun> runs;
            for (const auto& [head, extents] : described) {
              runs.push_back({head, {}});
              for (const auto& [bytes, descriptor] : extents) runs.back().extents.push_back({bytes, descriptor});
            }
            const py::gil_scoped_release release;
            self.import_rows(slot, positions, runs);
          },
          py::arg("slot"), py::arg("positions"), py::arg("runs"))
      .def("expect", &Arena::expect, py::arg("slot"), py::arg("positions"), py::arg("prompt") = 0)
      .def_property_readonly("running_slots", [](const Arena& self) { return self.running_slots(); })
      .def("free_slots", &Arena::free_slots, py::arg("count"))
      .def("free_slots_from", &Arena::free_slots_from, py::arg("slot"))
      .def(
          "shares",
          [](const Arena& self, const Slots& slots, std::size_t positions) { return self.shares(slots, positions); },
          py::arg("slots"), py::arg("positions"))
      .def("rows_in_shared", &Arena::rows_in_shared, py::arg("slot"))
      .def(
          "side_by_side", [](const Arena& self, const Slots& slots) { return self.side_by_side(slots); }, py::arg("slots"))
      .def("compact_later", &Arena::compact_later, py::arg("slot"), py::arg("generation"), py::arg("positions"))
      .def("trim", &Arena::trim, Unlocked())
      .def("set_budget", &Arena::set_budget, py::arg("budget"), Unlocked())
      .def("wait_idle", &Arena::wait_idle, Unlocked())
      .def("close", &Arena::close, Unlocked())
      .def("check", &Arena::check, Unlocked())
      .def("length", &Arena::length, py::arg("slot"))
      .def("capacity", &Arena::capacity, py::arg("slot"))
      .def("head", &Arena::head, py::arg("slot"), py::arg("plane"))
      .def("readable", &Arena::readable, py::arg("offset"), py::arg("nbytes"))
      .def_property_readonly("driver", &Arena::driver)
      .def_property_readonly("base", &Arena::base)
      .def_property_readonly("closed", &Arena::closed)
      .def("plane_offset", &Arena::plane_offset, py::arg("plane"))
      .def("slot_stride", &Arena::slot_stride, py::arg("plane"))
      .def(
          "dlpack",
          [](const std::shared_ptr<Arena>& self, std::size_t offset, std::vector<std::int64_t> shape,
             std::vector<std::int64_t> strides, unsigned itemsize) {
            return export_tensor(self, *self->driver(), self->base() + offset, std::move(shape), std::move(strides),
                                 itemsize);
          },
          py::arg("offset"), py::arg("shape"), py::arg("strides"), py::arg("itemsize"))
      .def("map",
           [](const Arena& self) {
             py::list slots;
             for (const Arena::SlotInfo& info : self.map()) {
               py::list runs;
               for (const Arena::RunInfo& run : info.runs) {
                 py::dict row;
                 row["offset"] = run.offset;
                 row["head"] = run.head;
                 row["tail"] = run.tail;
                 row["extents"] = run.extents;
                 row["shared"] = run.shared;
                 runs.append(row);
               }
               py::dict slot;
               slot["state"] = name_of(info.state);
               slot["length"] = info.length;
               slot["deferred"] = info.deferred;
               slot["runs"] = runs;
               slots.append(slot);
             }
             return slots;
           })
      .def("stats", [](const Arena& self) {
        const Stats stats = self.stats();
        py::dict result;
#define VATTN_ITEM(type, name) result[#name] = stats.name;
        VATTN_STATISTICS(VATTN_ITEM)
#undef VATTN_ITEM
        return result;
      });
}

// A property of a sequence. While another thread swaps the sequence, the caller waits without the GIL.
template <typename Result>
auto reading(Result (Sequence::*read)() const) {
  return [read](const Sequence& self) {
    if (!self.busy()) return (self.*read)();
    const py::gil_scoped_release release;
    return (self.*read)();
  };
}

void bind_sequence(py::module_& module) {
  py::class_<Sequence, std::shared_ptr<Sequence>>(module, "Sequence")
      .def_property_readonly("name", reading(&Sequence::name))
      .def_property_readonly("slot", reading(&Sequence::slot))
      .def_property_readonly("length", reading(&Sequence::length))
      .def_property_readonly("closed", reading(&Sequence::closed))
      .def_property_readonly("swapped", reading(&Sequence::swapped))
      .def(
          "grow",
          [](Sequence& self, std::size_t count, std::uintptr_t stream) {
            if (const auto reached = self.try_extend(count, Stream{stream})) return *reached;
            const py::gil_scoped_release release;
            return self.extend(count, Stream{stream});
          },
          py::arg("count"), py::arg("stream") = 0)
      .def(
          "swap_out", [](Sequence& self, std::uintptr_t stream) { self.swap_out(Stream{stream}); },
          py::arg("stream") = 0, Unlocked())
      .def(
          "swap_in",
          [](Sequence& self, std::optional<std::size_t> slot, std::uintptr_t stream) {
            self.swap_in(slot, Stream{stream});
          },
          py::arg("slot") = std::nullopt, py::arg("stream") = 0, Unlocked());
  module.def(
      "close",
      [](const std::vector<Sequence*>& sequences, std::uintptr_t stream) {
        Sequence::close(sequences, Stream{stream});
      },
      py::arg("sequences"), py::arg("stream") = 0, Unlocked());
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The C++ core of vattn: the driver seam and the arena. Use vattn.KVCache instead.";
  py::register_exception_translator([](std::exception_ptr pointer) {
    if (pointer) translate(pointer);
  });
  bind_driver(module);
  bind_mapper(module);
  bind_sequence(module);
  bind_arena(module);
}
