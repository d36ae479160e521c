// A file in memory below an image: what is done to it is recorded, completes in any order, and can
// be cut off as by a loss of power.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "block/node.h"

namespace kvartz::block {

// Loop-owned.
class MemoryNode final : public Node {
 public:
  MemoryNode(EventLoop& loop, std::string bytes, uint64_t seed = 0)
      : Node(loop, "memory"), bytes_(std::move(bytes)), random_(seed), shuffle_(seed != 0) {
    grows_ = true;
    limits_.discard_granularity = 512;
    size_bytes_ = bytes_.size();
  }
  const char* driver() const override { return "memory"; }
  void Drain() override {
    do {
      while (!pending_.empty()) FinishOne();
    } while (FinishLateOnes());
  }
  Result<> Resize(const ResizeOptions& options) override {
    if (options.size > room_) return Fail(ErrnoError(ENOSPC, "no room"));
    bytes_.resize(options.size);
    size_bytes_ = options.size;
    log_.push_back({Event::Kind::kResize, log_.size(), options.size, {}});
    return {};
  }
  Result<> SetReadOnly(bool read_only) override {
    read_only_ = read_only;
    return {};
  }
  const std::string& bytes() const { return bytes_; }
  void set_room(uint64_t bytes) { room_ = bytes; }               // beyond that there is no space
  void set_failures(uint64_t one_in) { fail_one_in_ = one_in; }  // of writes and flushes; 0: none

  struct Event {
    enum class Kind { kSubmit, kDone, kFlushSubmit, kFlushDone, kResize };
    Kind kind;
    size_t of;        // kDone, kFlushDone: the index of what was submitted
    uint64_t offset;  // kSubmit; kResize: the size
    std::string data;
  };
  const std::vector<Event>& log() const { return log_; }
  size_t now() const { return log_.size(); }

  // The file as a loss of power after `end` events may leave it, of one that began as `start`: what
  // a flush covered is there, of the rest any sectors.
  static std::string Cut(std::string start, const std::vector<Event>& log, size_t end,
                         std::mt19937_64& random) {
    size_t covered_until = 0;  // done before this event: there
    for (size_t i = 0; i < end; i++) {
      if (log[i].kind == Event::Kind::kFlushDone)
        covered_until = std::max(covered_until, log[i].of);
    }
    std::vector<bool> there(end, false);
    for (size_t i = 0; i < covered_until; i++) {
      if (log[i].kind == Event::Kind::kDone) there[log[i].of] = true;
    }
    uint64_t mood = random() % 4;  // all, none, some writes, some sectors
    for (size_t i = 0; i < end; i++) {
      const Event& event = log[i];
      if (event.kind == Event::Kind::kResize) start.resize(event.offset);
      if (event.kind != Event::Kind::kSubmit) continue;
      if (!there[i] && (mood == 1 || (mood == 2 && random() % 2 == 0))) continue;
      for (uint64_t at = 0; at < event.data.size(); at += 512) {
        if (!there[i] && mood == 3 && random() % 2 == 0) continue;
        uint64_t length = std::min<uint64_t>(512, event.data.size() - at);
        if (start.size() < event.offset + at + length) start.resize(event.offset + at + length);
        start.replace(event.offset + at, length, event.data, at, length);
      }
    }
    return start;
  }

 private:
  struct Pending {
    Request* request;
    size_t event;
  };

  void Submit(Request* request) override {
    size_t event = log_.size();
    bool writes = request->kind != Request::Kind::kRead && request->kind != Request::Kind::kFlush;
    if (writes && request->offset + request->length > room_) return FinishLater(request, -ENOSPC);
    bool fails =
        fail_one_in_ != 0 && request->kind != Request::Kind::kRead && random_() % fail_one_in_ == 0;
    if (fails) return FinishLater(request, -EIO);
    switch (request->kind) {
      case Request::Kind::kRead:
        break;
      case Request::Kind::kFlush:
        log_.push_back({Event::Kind::kFlushSubmit, event, 0, {}});
        break;
      case Request::Kind::kWrite: {
        std::string data;
        for (unsigned i = 0; i < request->iov_count; i++)
          data.append(static_cast<const char*>(request->iov[i].iov_base), request->iov[i].iov_len);
        log_.push_back({Event::Kind::kSubmit, event, request->offset, std::move(data)});
        break;
      }
      case Request::Kind::kDiscard:
      case Request::Kind::kWriteZeroes:
        log_.push_back(
            {Event::Kind::kSubmit, event, request->offset, std::string(request->length, '\0')});
    }
    pending_.push_back({request, event});
    loop().Post([this] {
      if (!pending_.empty()) FinishOne();
    });
  }

  void FinishOne() {
    size_t index = shuffle_ ? random_() % pending_.size() : 0;
    Pending done = pending_[index];
    pending_.erase(pending_.begin() + static_cast<ptrdiff_t>(index));
    Request* request = done.request;
    if (request->kind == Request::Kind::kRead) {
      uint64_t at = request->offset;
      for (unsigned i = 0; i < request->iov_count; i++) {
        auto* to = static_cast<char*>(request->iov[i].iov_base);
        for (size_t n = 0; n < request->iov[i].iov_len; n++, at++)
          to[n] = at < bytes_.size() ? bytes_[at] : '\0';
      }
    } else if (request->kind == Request::Kind::kFlush) {
      log_.push_back({Event::Kind::kFlushDone, done.event, 0, {}});
    } else {
      const std::string& data = log_[done.event].data;
      if (bytes_.size() < request->offset + data.size())
        bytes_.resize(request->offset + data.size());
      bytes_.replace(request->offset, data.size(), data);
      size_bytes_ = bytes_.size();
      log_.push_back({Event::Kind::kDone, done.event, 0, {}});
    }
    request->done(request, 0);
  }

  std::string bytes_;
  uint64_t room_ = UINT64_MAX, fail_one_in_ = 0;
  std::mt19937_64 random_;
  const bool shuffle_;
  std::vector<Pending> pending_;
  std::vector<Event> log_;
};

}  // namespace kvartz::block
