// The few lines of a test framework. One program per file test_*.cpp; a file that includes
// torch_stable.h is linked with libdetkit_ops, any other one with the raw kernels only.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

namespace detkit::test {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

inline void fail(const char* file, int line, const std::string& what) {
  ++failures();
  std::printf("%s:%d: %s\n", file, line, what.c_str());
}

inline bool near(double a, double b, double tolerance) {
  return std::abs(a - b) <= tolerance || (std::isnan(a) && std::isnan(b));
}

}  // namespace detkit::test

#define TEST(name)                                                    \
  static void name();                                                 \
  static const detkit::test::Register name##_registered(#name, name); \
  static void name()

#define CHECK(condition) \
  if (!(condition)) detkit::test::fail(__FILE__, __LINE__, "must hold: " #condition)

#define CHECK_NEAR(a, b, tolerance)                                                     \
  if (!detkit::test::near(double(a), double(b), tolerance))                             \
  detkit::test::fail(__FILE__, __LINE__,                                                \
                     #a " = " + std::to_string(double(a)) + " must be near " #b " = " + \
                         std::to_string(double(b)))
