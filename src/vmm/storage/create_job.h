// blockdev-create: makes an image, or lays a format out on a node that is there.
#pragma once

#include <memory>
#include <string>

#include "block/jobs/job.h"
#include "block/registry.h"

namespace kvartz::vmm {

struct CreateSettings {
  std::string driver = {};      // "file": makes a file
  std::string filename = {};    // of "file"
  block::NodePtr on = nullptr;  // of formats
  block::Options options = {};  // as for CreateImage: "size", "backing_file"...
};

// Owned by the main loop.
class CreateJob final : public block::Job {
 public:
  CreateJob(block::Registry& registry, std::string id, CreateSettings settings);
  const char* type() const override { return "create"; }

 protected:
  Result<> DoRun() override;

 private:
  Result<> MakeFile();
  Result<> LayOut();
  Result<> LayOutOn(const block::NodePtr& on);
  block::Registry& registry_;
  CreateSettings settings_;
};

}  // namespace kvartz::vmm
