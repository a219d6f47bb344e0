// What every test program here does with its checks: counts them, and says which have failed.
#pragma once

#include <cstdio>
#include <string>

namespace heedful {

inline int checks = 0, failures = 0;

inline void report(bool passed, const std::string& what) {
  ++checks;
  if (passed) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

// The last line, and the exit status.
inline int summary() {
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}

}  // namespace heedful
