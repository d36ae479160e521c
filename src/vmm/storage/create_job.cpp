#include "vmm/storage/create_job.h"

#include <algorithm>

#include "block/fiber_io.h"
#include "block/graph.h"

namespace kvartz::vmm {
namespace {

using block::NodePtr;
using block::Options;

// Loop-owned. A node as the file of an image that is being made: stays open when that is done.
class KeptOpen final : public block::Node {
 public:
  explicit KeptOpen(NodePtr node) : Node(node->loop(), node->name()), node_(std::move(node)) {
    TakeSize();
    limits_ = node_->limits();
    read_only_ = node_->read_only();
    grows_ = node_->grows();
  }
  const char* driver() const override { return node_->driver(); }
  void Drain() override {
    do {
      node_->Drain();
    } while (FinishLateOnes());
  }
  Result<block::Extent> Status(uint64_t offset, uint64_t length) override {
    return node_->Status(offset, length);
  }
  Result<> Resize(const block::ResizeOptions& options) override {
    TRY(node_->Resize(options));
    TakeSize();
    return {};
  }
  Result<> Close() override { return block::Flush(*node_); }

 private:
  void TakeSize() { size_bytes_ = node_->size_bytes(); }
  void Submit(block::Request* request) override {
    bool writes = request->kind == block::Request::Kind::kWrite ||
                  request->kind == block::Request::Kind::kWriteZeroes;
    if (writes) size_bytes_ = std::max(size_bytes_, request->offset + request->length);
    node_->Start(request);
  }
  const NodePtr node_;
};

}  // namespace

CreateJob::CreateJob(block::Registry& registry, std::string id, CreateSettings settings)
    : Job(registry.loop(), std::move(id)), registry_(registry), settings_(std::move(settings)) {
  SetTotal(1);
}

Result<> CreateJob::DoRun() {
  TRY(Step(0));
  TRY(settings_.on ? LayOut() : MakeFile());
  Skip(1);
  return {};
}

// A raw image is a file and nothing else.
Result<> CreateJob::MakeFile() {
  return block::CreateImage(registry_.env(), "raw", settings_.filename,
                            std::move(settings_.options));
}

Result<> CreateJob::LayOut() {
  const NodePtr& on = settings_.on;
  std::string me = "job '" + id() + "'";
  TRY(registry_.CheckUnused(*on));
  TRY(registry_.Claim(*on, me));
  Result<> laid_out = LayOutOn(on);
  registry_.Unclaim(*on, me);
  return laid_out;
}

Result<> CreateJob::LayOutOn(const NodePtr& on) {
  if (on->read_only())
    return Fail(ErrorCode::kPermission, "node '" + on->node_name() + "' is read-only");
  if (&on->loop() != &registry_.loop())
    return Fail(ErrorCode::kUnsupported, "not supported yet: nodes that an I/O thread serves");
  on->LetGrow();
  if (!on->grows())
    return Fail(ErrorCode::kUnsupported, "not supported yet: formats on what can't grow");
  TRY(on->Resize({.size = 0}));
  block::OpenEnv env = registry_.env();
  env.create_on = std::make_shared<KeptOpen>(on);
  return block::CreateImage(env, settings_.driver, on->name(), std::move(settings_.options));
}

}  // namespace kvartz::vmm
