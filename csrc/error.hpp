// The exceptions of the C++ core. bindings.cpp turns each into the Python exception of the same name, and
// InvariantBroken into Error.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

namespace vattn {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A driver call failed. `code` is the CUresult on CUDA, the errno on the host, and -1 for a fault injected by a test.
class DriverError : public Error {
 public:
  DriverError(std::string call, int code, const std::string& why)
      : Error(call + " failed with code " + std::to_string(code) + ": " + why), call_(std::move(call)), code_(code) {}
  const std::string& call() const noexcept { return call_; }
  int code() const noexcept { return code_; }

 private:
  std::string call_;
  int code_;
};

class OutOfDeviceMemory : public DriverError {
 public:
  using DriverError::DriverError;
};

// The byte budget does not suffice: `needed` bytes were asked for and `free` bytes are left. This is a normal event for
// a scheduler.
class BudgetExceeded : public Error {
 public:
  BudgetExceeded(std::size_t needed, std::size_t free, const std::string& budget = "budget")
      : Error("the " + budget + " is spent: " + std::to_string(needed) + " bytes needed, " + std::to_string(free) +
              " free. Close or truncate a sequence, raise `" + budget + "`, or catch BudgetExceeded and retry later"),
        needed_(needed),
        free_(free) {}
  std::size_t needed() const noexcept { return needed_; }
  std::size_t free() const noexcept { return free_; }

 private:
  std::size_t needed_;
  std::size_t free_;
};

class SequenceTooLong : public Error {
 public:
  using Error::Error;
};

class BackendUnavailable : public Error {
 public:
  using Error::Error;
};

// A broken invariant, found by Arena::check().
class InvariantBroken : public Error {
 public:
  using Error::Error;
};

}  // namespace vattn
