// Errors of the host, a user, a file or a peer travel as values (docs: CONTRIBUTING.md, "Errors").
#pragma once

#include <expected>
#include <string>
#include <type_traits>
#include <utility>

namespace kvartz {

enum class ErrorCode {
  kInvalid,      // malformed input: an option, a file, a message
  kNotFound,     // the named thing doesn't exist
  kExists,       // the name is taken
  kPermission,   // the host refuses
  kBusy,         // locked or in use by somebody else
  kUnsupported,  // known, but not supported yet or not here
  kNoSpace,      // memory, disk, slots
  kIo,           // the host's I/O failed
  kState,        // not possible in the present state
};

// What went wrong and what to do about it, in one line, without a full stop.
struct Error {
  ErrorCode code = ErrorCode::kInvalid;
  std::string what;

  // The same error with "context: " before it; each layer adds at most one.
  Error In(const std::string& context) && { return {code, context + ": " + what}; }
};

// An Error of `errno_value`; `what` names the thing ("cannot open a.img"), strerror is appended.
Error ErrnoError(int errno_value, const std::string& what);

template <typename T = void>
using Result = std::expected<T, Error>;

// fmt-style constructor of an error result: return Fail(ErrorCode::kInvalid, "bad size " + s).
inline std::unexpected<Error> Fail(ErrorCode code, std::string what) {
  return std::unexpected<Error>(Error{code, std::move(what)});
}
inline std::unexpected<Error> Fail(Error error) { return std::unexpected<Error>(std::move(error)); }

}  // namespace kvartz

// TRY(expr): the value of a Result, or return its error from the enclosing function. GNU statement
// expression.
#define TRY(expr)                                                             \
  __extension__({                                                             \
    auto&& try_result_ = (expr);                                              \
    if (!try_result_) return std::unexpected(std::move(try_result_).error()); \
    ::kvartz::detail::Unwrap(std::move(try_result_));                         \
  })

namespace kvartz::detail {
template <typename T>
T Unwrap(std::expected<T, Error>&& result) {
  if constexpr (!std::is_void_v<T>) return std::move(*result);
}
}  // namespace kvartz::detail
