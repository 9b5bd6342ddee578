// Reads cubins, the ELF files that ptxas writes.
#pragma once

#include <string>

namespace stub {

// What a kernel needs, as ptxas has recorded it.
struct Resources {
  int registers = 0;     // per thread
  int local_bytes = 0;   // per thread: spilled registers and the stack
  int shared_bytes = 0;  // statically allocated, per block
};

// A copy of the cubin that starts at `image`; its headers give its size.
std::string copy_cubin(const void* image);

// Returns whether the cubin contains the kernel `name`, and sets `resources`.
bool find_kernel(const std::string& cubin, const std::string& name, Resources& resources);

}  // namespace stub
