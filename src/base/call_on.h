// Calling a function of another loop's objects from a fiber.
#pragma once

#include <optional>
#include <type_traits>
#include <utility>

#include "base/event_loop.h"
#include "base/fiber.h"

namespace kvartz {

// Fiber, on `here`'s thread: runs `body` in a fiber of `there`'s thread and goes on with what it
// returns. At once if that is this thread (or if `there` hasn't run yet).
template <typename Body>
auto CallOn(EventLoop& here, EventLoop& there, Body body) -> std::invoke_result_t<Body> {
  using Value = std::invoke_result_t<Body>;
  if (&here == &there || there.InLoopThread()) return body();
  Fiber* self = Fiber::Current();
  bool done = false;
  auto after = [&] {
    here.Post([&] {
      done = true;
      self->Wake();
    });
  };
  if constexpr (std::is_void_v<Value>) {
    there.Post([&] { Fiber::Start([&] { body(); }, after); });
    while (!done) Fiber::Suspend();  // NOLINT(bugprone-infinite-loop): `after` ends it
  } else {
    std::optional<Value> value;
    there.Post([&] { Fiber::Start([&] { value.emplace(body()); }, after); });
    while (!done) Fiber::Suspend();  // NOLINT(bugprone-infinite-loop): `after` ends it
    return std::move(*value);
  }
}

// Fiber: lets the loop turn; goes on with nothing else on the thread's own stack.
inline void FiberYield(EventLoop& loop) {
  Fiber* self = Fiber::Current();
  bool done = false;
  loop.Post([&] {
    done = true;
    self->Wake();
  });
  while (!done) Fiber::Suspend();
}

}  // namespace kvartz
