#include "base/check.h"

#include <sys/uio.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <string>

namespace kvartz {

void VerifyFailed(const char* condition, const char* file, int line) {
  // A bug may have left the heap and the log in any state: no allocation, no lock.
  char number[16];
  char* digits = number + sizeof(number);
  *--digits = '\0';
  do {
    *--digits = static_cast<char>('0' + line % 10);
  } while (line /= 10);
  const char* parts[] = {"internal error: ", condition, " is false at ", file, ":", digits, "\n"};
  iovec iov[std::size(parts)];
  for (size_t i = 0; i < std::size(parts); i++) {
    iov[i] = {const_cast<char*>(parts[i]), strlen(parts[i])};
  }
  [[maybe_unused]] ssize_t n = writev(STDERR_FILENO, iov, std::size(iov));
  abort();
}

}  // namespace kvartz
