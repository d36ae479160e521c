// What stands below an image that has its own idea of that: the user's options go first.
#pragma once

#include <string>

#include "block/driver.h"

namespace kvartz::block {

struct Backing {
  NodePtr node = nullptr;                          // there already
  std::optional<BackingWish> wish = std::nullopt;  // to be opened; neither: nothing is below
};

// Takes the options "backing" (a node, its name, "" for none) and "backing.*" of the image `image`.
// `filename` and `format`: as the image records them; may be empty. Errors: an image that names a
// file though it isn't to be followed.
Result<Backing> TakeBacking(const OpenEnv& env, const NodeOptions& node, Options& options,
                            const std::string& image, const std::string& filename,
                            const std::string& format);

}  // namespace kvartz::block
