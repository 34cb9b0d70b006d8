// How much memory this machine has left for the process: what the kernel says is available, or what the limits of the
// process's control groups leave of it, where that is less.
#pragma once

#include <string>

#include "driver.hpp"

namespace vattn {

// Bytes. `root` is put before the paths that are read, for tests.
MemoryInfo host_memory(const std::string& root = "");

}  // namespace vattn
