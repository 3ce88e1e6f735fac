#include <exception>

#include "tests/check.h"

int main() {
  using namespace detkit::test;
  int failed = 0;
  for (const Case& test : cases()) {
    const int before = failures();
    try {
      test.run();
    } catch (const std::exception& error) {
      fail(test.name, 0, std::string("threw ") + error.what());
    }
    if (failures() != before) {
      ++failed;
      std::printf("FAILED %s\n", test.name);
    }
  }
  std::printf("%d passed, %d failed\n", int(cases().size()) - failed, failed);
  return failed != 0 || cases().empty();
}
