#include "host_memory.hpp"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <fstream>
#include <limits>
#include <optional>
#include <string_view>
#include <system_error>

namespace vattn {
namespace {

// Returns the number at the beginning of a text, after blanks. Returns nullopt when there is a word such as "max".
std::optional<std::uint64_t> number_of(std::string_view text) {
  text.remove_prefix(std::min(text.find_first_not_of(" \t"), text.size()));
  std::uint64_t number = 0;
  if (std::from_chars(text.data(), text.data() + text.size(), number).ec != std::errc()) return std::nullopt;
  return number;
}

// Returns the number that follows `word` in the first line that begins with it.
std::optional<std::uint64_t> number_after(const std::string& path, std::string_view word) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line))
    if (line.starts_with(word)) return number_of(std::string_view(line).substr(word.size()));
  return std::nullopt;
}

// Returns the number at the beginning of the first line of a file.
std::optional<std::uint64_t> number_in(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line)) return std::nullopt;
  return number_of(line);
}

// The names of the files of one version of control groups.
struct Names {
  const char* limit;
  const char* usage;
  const char* inactive;  // key in memory.stat: file pages that the kernel reclaims before it refuses memory
};

constexpr Names kVersion1{"/memory.limit_in_bytes", "/memory.usage_in_bytes", "total_inactive_file "};
constexpr Names kVersion2{"/memory.max", "/memory.current", "inactive_file "};

// Lowers `memory` to what the limits of a group, and of all groups that contain it, leave.
void apply(MemoryInfo& memory, const std::string& mounted, std::string group, const Names& names) {
  for (;;) {
    const std::string folder = mounted + group;
    const auto limit = number_in(folder + names.limit);
    const auto usage = number_in(folder + names.usage);
    if (limit && usage) {
      const std::uint64_t kept =
          *usage - std::min(*usage, number_after(folder + "/memory.stat", names.inactive).value_or(0));
      memory.total = std::min<std::uint64_t>(memory.total, *limit);
      memory.free = std::min<std::uint64_t>(memory.free, *limit - std::min(*limit, kept));
    }
    if (group.empty()) return;
    const std::size_t last = group.rfind('/');
    group.erase(last == std::string::npos ? 0 : last);
  }
}

}  // namespace

MemoryInfo host_memory(const std::string& root) {
  constexpr std::uint64_t kUnknown = std::numeric_limits<std::uint64_t>::max() / 1024;
  const std::string meminfo = root + "/proc/meminfo";
  MemoryInfo memory{number_after(meminfo, "MemAvailable:").value_or(kUnknown) * 1024,
                    number_after(meminfo, "MemTotal:").value_or(kUnknown) * 1024};
  std::ifstream groups(root + "/proc/self/cgroup");
  std::string line;
  while (std::getline(groups, line)) {  // a line is like 4:memory:/a/b, or 0::/a/b in version 2
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    std::string controllers(",");
    controllers.append(line, first + 1, second - first - 1).append(",");
    std::string group = line.substr(second + 1);
    if (!group.empty() && group.back() == '/') group.pop_back();
    const std::string mounted = root + "/sys/fs/cgroup";
    if (controllers == ",,") {
      apply(memory, mounted, group, kVersion2);
    } else if (controllers.find(",memory,") != std::string::npos) {
      apply(memory, mounted + "/memory", group, kVersion1);
    }
  }
  return memory;
}

}  // namespace vattn
