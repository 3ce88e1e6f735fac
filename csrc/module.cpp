// The Python module detkit._C: what this build is. Importing it runs the registrations of the
// operators, which are called as torch.ops.detkit.* and are not bound here. No torch header but its
// version number: they do not mix.
#include <pybind11/pybind11.h>
#if __has_include(<torch/headeronly/version.h>)
#include <torch/headeronly/version.h>
#else  // where older versions of torch have it
#include <torch/version.h>
#endif

#include <string>

#include "common/macros.h"

namespace {

// The instruction set that the cloned loops run on here.
std::string simd_level() {
#if DETKIT_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
  return "x86-64";
#else
  return "compiler default";
#endif
}

pybind11::dict build_info() {
#if defined(DETKIT_WITH_CUDA)
  constexpr bool cuda = true;
#else
  constexpr bool cuda = false;
#endif
  pybind11::dict info;
  info["compiler"] = __VERSION__;
  info["torch"] = TORCH_VERSION;
  info["cuda"] = cuda;
  info["simd"] = simd_level();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Build information of detkit's compiled operators; importing it registers torch.ops.detkit.*";
  m.def("build_info", &build_info,
        "Compiler, torch version built against, whether CUDA kernels are in, SIMD level in use.");
}
