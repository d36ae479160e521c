// The anti-forensic splitter: a key as stripes that are worth nothing unless all of them are there.
// Spec: LUKS1 On-Disk Format 1.2.3, section 2.4 "Anti-forensic splitting".
#pragma once

#include <cstdint>
#include <span>

#include "block/crypto/digest.h"

namespace kvartz::block::luks {

// `split`: stripes * key.size() bytes.
void AfSplit(const HashAlg& hash, uint32_t stripes, std::span<const uint8_t> key,
             std::span<uint8_t> split);
void AfMerge(const HashAlg& hash, uint32_t stripes, std::span<const uint8_t> split,
             std::span<uint8_t> key);

}  // namespace kvartz::block::luks
