// For tools and tests, which have nothing else to do meanwhile: runs the loop until a fiber is
// done.
#pragma once

#include <optional>
#include <type_traits>
#include <utility>

#include "base/event_loop.h"
#include "base/fiber.h"

namespace kvartz::block {

// What `body` returns. Not within a turn of the loop.
template <typename Body>
auto RunInFiber(EventLoop& loop, Body body) -> std::invoke_result_t<Body> {
  using Value = std::invoke_result_t<Body>;
  bool done = false;
  if constexpr (std::is_void_v<Value>) {
    Fiber::Start([&] { body(); }, [&] { done = true; });
    while (!done) loop.RunOnce(-1);  // NOLINT(bugprone-infinite-loop): the fiber's end
  } else {
    std::optional<Value> value;
    Fiber::Start([&] { value.emplace(body()); }, [&] { done = true; });
    while (!done) loop.RunOnce(-1);  // NOLINT(bugprone-infinite-loop): the fiber's end
    return std::move(*value);
  }
}

}  // namespace kvartz::block
