#include "fuzz/block/image_fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return kvartz::block::FuzzImage("vhdx", data, size);
}
