// How much memory this machine has left for the process: the memory that the kernel reports as available, or what the
// limits of the process's control groups leave of it when that is less.
#pragma once

#include <string>

#include "driver.hpp"

namespace vattn {

// Returns the free and the total memory in bytes. `root` is prepended to the paths that are read; tests set it.
MemoryInfo host_memory(const std::string& root = "");

}  // namespace vattn
