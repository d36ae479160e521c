// Making new qcow2 images.
#pragma once

#include <string>

#include "block/driver.h"
#include "block/formats/luks/luks_node.h"
#include "block/formats/qcow2/layout.h"

namespace kvartz::block::qcow2 {

using Type = OptionRow::Type;
constexpr OptionRow kCreateOptions[] = {
    {"cluster_size", Type::kSize, "qcow2 cluster size", "65536"},
    {"compat", Type::kString, "Compatibility level (v2 [0.10] or v3 [1.1])", "1.1", true},
    {"compression_type", Type::kString, "Compression method used for image cluster compression",
     "zlib"},
    {"data_file", Type::kString, "File name of an external data file", {}, true},
    {"data_file_raw",
     Type::kBool,
     "The external data file must stay valid as a raw image",
     {},
     true},
    {"encrypt.format", Type::kString, "Encrypt the image, format choices: 'luks'"},
    {"encrypt.key-secret", Type::kString, "ID of the secret that provides the LUKS passphrase"},
    KVARTZ_LUKS_CREATE_OPTIONS("encrypt."),
    {"encryption", Type::kBool, "Encrypt by the old AES method (refused: encrypt.format=luks)"},
    {"extended_l2", Type::kBool, "Extended L2 tables", "off"},
    {"lazy_refcounts", Type::kBool, "Postpone refcount updates", "off", true},
    {"preallocation", Type::kString,
     "Preallocation mode (allowed values: off, metadata, falloc, full)", "off"},
    {"refcount_bits", Type::kNumber, "Width of a reference count entry in bits", "16", true},
};

constexpr OptionRow kAmendOptions[] = {KVARTZ_LUKS_AMEND_OPTIONS("encrypt.")};

// Options of create and amend as header fields. Errors name the option.
Result<Header> HeaderOf(Options& options);

// Fiber.
Result<> Create(const OpenEnv& env, const std::string& filename, Options& options);
Result<MeasureResult> Measure(Options& options, Node* source);

}  // namespace kvartz::block::qcow2
