// libcurl, loaded when the first image behind HTTP is opened: it brings thirty libraries along,
// which would make every start of ours slower.
#pragma once

#include <curl/curl.h>

#include "base/result.h"

namespace kvartz::block {

#define KVARTZ_CURL_FUNCTIONS(X) \
  X(global_init)                 \
  X(easy_init)                   \
  X(easy_cleanup)                \
  X(easy_reset)                  \
  X(easy_setopt)                 \
  X(easy_getinfo)                \
  X(easy_strerror)               \
  X(multi_init)                  \
  X(multi_cleanup)               \
  X(multi_setopt)                \
  X(multi_add_handle)            \
  X(multi_remove_handle)         \
  X(multi_socket_action) X(multi_info_read) X(multi_strerror) X(slist_append) X(slist_free_all)

// Functions of the library by their names, without "curl_". Immutable.
struct CurlLibrary {
#define KVARTZ_DECLARE_FUNCTION(name) decltype(&curl_##name) name = nullptr;
  KVARTZ_CURL_FUNCTIONS(KVARTZ_DECLARE_FUNCTION)
#undef KVARTZ_DECLARE_FUNCTION
};

// Any thread. Errors: the host doesn't have it.
Result<const CurlLibrary*> LoadCurl();

}  // namespace kvartz::block
