#include "block/protocols/http_library.h"

#include <dlfcn.h>
#include <fmt/format.h>

namespace kvartz::block {
namespace {

Result<CurlLibrary> Load() {
  void* library = nullptr;
  for (const char* name : {"libcurl-gnutls.so.4", "libcurl.so.4"}) {
    if (!library) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  }
  if (!library) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("HTTP needs libcurl (package libcurl3-gnutls): {}", dlerror()));
  }
  CurlLibrary curl;
#define KVARTZ_FIND_FUNCTION(name)                                                  \
  curl.name = reinterpret_cast<decltype(curl.name)>(dlsym(library, "curl_" #name)); \
  if (!curl.name)                                                                   \
    return Fail(ErrorCode::kUnsupported, "HTTP needs a newer libcurl: it lacks curl_" #name);
  KVARTZ_CURL_FUNCTIONS(KVARTZ_FIND_FUNCTION)
#undef KVARTZ_FIND_FUNCTION
  if (curl.global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK)
    return Fail(ErrorCode::kUnsupported, "libcurl can't be used: curl_global_init fails");
  return curl;
}

}  // namespace

Result<const CurlLibrary*> LoadCurl() {
  static const Result<CurlLibrary> library = Load();
  if (!library) return std::unexpected(library.error());
  return &*library;
}

}  // namespace kvartz::block
