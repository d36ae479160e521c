// Jobs stream (what is below an image becomes its own) and commit (layers that nobody writes to go
// down into the one below them).
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "base/call_on.h"
#include "base/check.h"
#include "base/log.h"
#include "block/fiber_io.h"
#include "block/filters/copy_on_read.h"
#include "block/graph.h"
#include "block/jobs/copy_job.h"
#include "block/jobs/range_copier.h"

namespace kvartz::block {

// mirror.cpp
Result<> StartActiveCommit(const LiveJobs& live, const CommitSettings& settings);

namespace {

constexpr uint32_t kGranularity = 64 << 10;

// The layers from `top` down to `base` (exclusive; null: all).
Result<std::vector<NodePtr>> LayersAbove(Registry& registry, const NodePtr& top, Node* base) {
  std::vector<NodePtr> layers;
  Node* node = SkipFilters(top.get());
  for (; node && node != base; node = BackingOf(node)) layers.push_back(registry.PtrOf(*node));
  if (base && !node) {
    return Fail(ErrorCode::kInvalid, fmt::format("Node '{}' is not a backing image of '{}'",
                                                 base->node_name(), top->node_name()));
  }
  return layers;
}

// Writable while a job works on it, on its loop. Fiber, main loop.
class Writable {
 public:
  explicit Writable(Registry& registry) : registry_(registry) {}
  Result<> Make(const NodePtr& node) {
    if (!node->read_only()) return {};
    TRY(registry_.On(*node, [&] { return node->SetReadOnly(false); }));
    node_ = node;
    return {};
  }
  void Undo() {
    NodePtr node = std::exchange(node_, nullptr);
    if (!node) return;
    Result<> back = registry_.On(*node, [&] { return node->SetReadOnly(true); });
    if (!back) KLOG(kWarn, "'{}' stays writable: {}", node->name(), back.error().what);
  }

 private:
  Registry& registry_;
  NodePtr node_;
};

// What both jobs have: layers that nobody else touches, one of which is written to, and an overlay
// that stands on another one in the end.
class LayersJob : public CopyJob {
 protected:
  template <typename Settings>
  LayersJob(Registry& registry, const Settings& settings)
      : CopyJob(registry, settings.top->loop(), settings, Clear::kAfter,
                {settings.on_error, settings.on_error}),
        writable_(registry) {
    todo_ = std::make_shared<DirtyBitmap>("", settings.top->size_bytes(), kGranularity);
  }
  // Claims `nodes`, makes `target` writable and does the rest; all of it or nothing.
  template <typename Rest>
  Result<> SetUp(std::vector<NodePtr> nodes, const NodePtr& target, Rest rest) {
    TRY(claims_.Take(std::move(nodes)));
    Result<> ready = writable_.Make(target);
    if (ready) ready = rest();
    if (ready) return {};
    writable_.Undo();
    claims_.Release();
    return ready;
  }
  // `name`: of `base` in the image; empty: its own.
  Result<> PutOn(const NodePtr& overlay, const NodePtr& base, const std::string& name) {
    if (name.empty()) return registry_.SetBacking(overlay, base, Registry::Record::kImage);
    return registry_.SetBackingAs(overlay, base, name,
                                  base ? SkipFilters(base.get())->driver() : "");
  }

  Writable writable_;
};

// ---- stream ----

class StreamJob final : public LayersJob {
 public:
  StreamJob(Registry& registry, const StreamSettings& settings)
      : LayersJob(registry, settings), settings_(settings) {
    skip_ignored_ = true;
  }
  const char* type() const override { return "stream"; }

  Result<> Prepare() {
    const NodePtr& top = settings_.top;
    std::vector<NodePtr> layers = TRY(LayersAbove(registry_, top, settings_.base.get()));
    if (BackingOf(top.get()) == settings_.base.get())
      return Fail(ErrorCode::kInvalid, fmt::format("'{}' stands on that already", top->name()));
    if (settings_.base && settings_.base->size_bytes() > top->size_bytes()) {
      // It would show what wasn't there.
      return Fail(ErrorCode::kUnsupported,
                  fmt::format("not supported yet: base '{}' is larger than '{}'",
                              settings_.base->name(), top->name()));
    }
    if (settings_.base) layers.push_back(settings_.base);
    return SetUp(std::move(layers), top, [&] {
      filter_ = std::make_shared<CopyOnReadNode>(top, CopyOnReadNode::Copies::kNothing);
      filter_->set_node_name(settings_.filter_node_name);
      filter_->set_base(settings_.base);
      return registry_.InsertFilter(top, filter_);
    });
  }

 private:
  Result<> DoRun() override {
    TRY(MarkAllocated(*settings_.top, settings_.base.get(), Layers::kBelow));
    SetTotal(todo_->dirty_bytes());
    TRY(CopyDirty());
    if (!skipped_) return Flush(*settings_.top);
    return Fail(ErrorCode::kIo, fmt::format("parts of '{}' couldn't be copied: its backing file "
                                            "remains",
                                            settings_.top->name()));
  }
  Result<> DoFinalize() override {
    return OnMain([&]() -> Result<> {
      const NodePtr& top = settings_.top;
      Registry::Quiesced quiet(registry_, top.get());
      TRY(registry_.On(*top, [&] { return Flush(*top); }));
      return PutOn(top, settings_.base, settings_.backing_file);
    });
  }
  void DoClean(const Result<>& /*result*/) override {
    OnMain([&] {
      {
        Registry::Quiesced quiet(registry_, filter_.get());
        Result<> removed = registry_.RemoveFilter(filter_);
        if (!removed) KLOG(kError, "{}: {}", who(), removed.error().what);
        writable_.Undo();
      }
      claims_.Release();
      filter_.reset();
      settings_.top.reset();
      settings_.base.reset();
      registry_.CollectUnused();
    });
  }
  int CopyRange(uint64_t offset, uint64_t length, bool* reading) override {
    return filter_->Populate(offset, length, reading);
  }
  std::string SourceName() const override { return settings_.top->name(); }
  std::string TargetName() const override { return settings_.top->name(); }

  StreamSettings settings_;
  std::shared_ptr<CopyOnReadNode> filter_;
};

// ---- commit of layers that nobody writes to ----

class CommitLayersJob final : public LayersJob {
 public:
  CommitLayersJob(Registry& registry, const CommitSettings& settings)
      : LayersJob(registry, settings), settings_(settings) {
    copier_ = {.source = settings_.top.get(),
               .base = settings_.base.get(),
               .target = settings_.base.get()};
  }
  const char* type() const override { return "commit"; }

  Result<> Prepare() {
    const NodePtr& base = settings_.base;
    std::vector<NodePtr> nodes = TRY(LayersAbove(registry_, settings_.top, base.get()));
    nodes.push_back(base);
    return SetUp(std::move(nodes), base, [&]() -> Result<> {
      const uint64_t size = settings_.top->size_bytes();
      if (base->size_bytes() >= size) return {};
      return registry_.On(*base, [&] { return base->Resize({.size = size, .zero_added = true}); });
    });
  }

 private:
  Result<> DoRun() override {
    TRY(MarkAllocated(*settings_.top, settings_.base.get(), Layers::kAll));
    SetTotal(todo_->dirty_bytes());
    TRY(CopyDirty());
    return Flush(*settings_.base);
  }
  Result<> DoFinalize() override {
    return OnMain([&]() -> Result<> {
      const NodePtr& top = settings_.top;
      Registry::Quiesced quiet(registry_, top.get());
      for (const NodePtr& parent : registry_.ParentsOf(*top)) {
        if (parent->backing() == top.get())
          TRY(PutOn(parent, settings_.base, settings_.backing_file));
      }
      return {};
    });
  }
  void DoClean(const Result<>& /*result*/) override {
    OnMain([&] {
      {
        Registry::Quiesced quiet(registry_, settings_.base.get());
        writable_.Undo();
      }
      claims_.Release();
      settings_.top.reset();
      settings_.base.reset();
      registry_.CollectUnused();
    });
  }
  int CopyRange(uint64_t offset, uint64_t length, bool* reading) override {
    return copier_.Copy(offset, length, reading);
  }
  std::string SourceName() const override { return settings_.top->name(); }
  std::string TargetName() const override { return settings_.base->name(); }

  CommitSettings settings_;
  RangeCopier copier_;
};

template <typename Job, typename Settings>
Result<> StartPrepared(const LiveJobs& live, const Settings& settings) {
  auto job = std::make_shared<Job>(live.registry, settings);
  TRY(job->Prepare());
  return live.jobs.Start(job, settings.job);
}

// What is written to must not be below anything else.
Result<> CheckChain(Registry& registry, const std::vector<NodePtr>& layers, const NodePtr& base) {
  for (size_t i = 1; i <= layers.size(); i++) {
    const NodePtr& node = i < layers.size() ? layers[i] : base;
    TRY(registry.CheckFree(*node));
    std::vector<NodePtr> parents = registry.ParentsOf(*node);
    for (const NodePtr& parent : parents) {
      bool ours =
          std::find(layers.begin(), layers.end(), parent) != layers.end() || parent->is_filter();
      if (ours) continue;
      return Fail(ErrorCode::kBusy, fmt::format("Node '{}' is busy: it is in use by node '{}'",
                                                node->node_name(), parent->node_name()));
    }
    for (const NodeUser* user : registry.users()) {
      if (user->node() != node) continue;
      return Fail(ErrorCode::kBusy, fmt::format("Node '{}' is busy: it is in use by {}",
                                                node->node_name(), user->UserName()));
    }
  }
  return {};
}

}  // namespace

Result<Sync> ParseSync(const std::string& name) {
  constexpr std::pair<const char*, Sync> kNames[] = {{"full", Sync::kFull},
                                                     {"top", Sync::kTop},
                                                     {"none", Sync::kNone},
                                                     {"incremental", Sync::kIncremental},
                                                     {"bitmap", Sync::kBitmap}};
  for (const auto& [known, sync] : kNames) {
    if (name == known) return sync;
  }
  return Fail(
      ErrorCode::kInvalid,
      fmt::format("unknown sync '{}': it is one of full, top, none, incremental, bitmap", name));
}

Result<BitmapMode> ParseBitmapMode(const std::string& name) {
  if (name == "on-success") return BitmapMode::kOnSuccess;
  if (name == "never") return BitmapMode::kNever;
  if (name == "always") return BitmapMode::kAlways;
  return Fail(
      ErrorCode::kInvalid,
      fmt::format("unknown bitmap-mode '{}': it is one of on-success, never, always", name));
}

Result<> StartStream(const LiveJobs& live, StreamSettings settings) {
  TRY(live.jobs.CheckId(settings.job_id));
  Registry& registry = live.registry;
  Registry::Quiesced quiet(registry, settings.top.get());
  settings.top = registry.PtrOf(*SkipFilters(settings.top.get()));
  if (settings.base) settings.base = registry.PtrOf(*SkipFilters(settings.base.get()));
  return StartPrepared<StreamJob>(live, settings);
}

Result<> StartCommit(const LiveJobs& live, CommitSettings settings) {
  TRY(live.jobs.CheckId(settings.job_id));
  Registry& registry = live.registry;
  Registry::Quiesced quiet(registry, settings.top.get());
  NodePtr given = settings.top;
  settings.top = registry.PtrOf(*SkipFilters(given.get()));
  Node* base = settings.base ? SkipFilters(settings.base.get()) : settings.top.get();
  while (!settings.base && BackingOf(base)) base = BackingOf(base);
  settings.base = registry.PtrOf(*base);
  if (settings.base == settings.top)
    return Fail(ErrorCode::kInvalid,
                fmt::format("'{}' has nothing below that it could be committed "
                            "to",
                            settings.top->name()));
  std::vector<NodePtr> layers = TRY(LayersAbove(registry, settings.top, base));
  for (const NodePtr& layer : layers) TRY(CheckCommits(*layer));
  TRY(CheckChain(registry, layers, settings.base));
  bool active = false;
  for (const NodeUser* user : registry.users())
    active |= user->node() && SkipFilters(user->node().get()) == settings.top.get();
  if (!active && registry.ParentsOf(*settings.top).empty()) active = true;
  if (active) {
    if (!settings.backing_file.empty())
      return Fail(ErrorCode::kInvalid, "'backing-file' specified, but 'top' is the active layer");
    return StartActiveCommit(live, settings);
  }
  return StartPrepared<CommitLayersJob>(live, settings);
}

}  // namespace kvartz::block
