// What the CUDA operators call in torch's CUDA library.
#include <cstdint>

extern "C" {

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

int32_t torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool,
                                 char** message) {
  *message = nullptr;
  return 0;
}

void torch_c10_cuda_free_error_msg(char*) {}

}  // extern "C"
