#include "block/formats/luks/luks_node.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>

#include "block/fiber_io.h"
#include "block/graph.h"

namespace kvartz::block::luks {
namespace {

class LuksNode;

class LuksEditor final : public ImageEditor {
 public:
  explicit LuksEditor(LuksNode& node) : node_(node) {}
  Result<CheckResult> Check(Repair repair, const ReportFn& report) override;
  Result<> Amend(Options& options, const ProgressFn& progress) override;
  Result<> RecordBacking(const std::string& filename, const std::string& format) override;
  Result<> MakeEmpty() override;

 private:
  LuksNode& node_;
};

// Loop-owned.
class LuksNode final : public CryptNode {
 public:
  LuksNode(NodePtr file, std::shared_ptr<const SectorCipher> cipher, const Layout& layout,
           bool read_only, Header header, SecretBytes key, const OpenEnv& env)
      : CryptNode(std::move(file), std::move(cipher), layout, read_only),
        header_(std::move(header)),
        key_(std::move(key)),
        secret_(env.secret),
        editor_(*this) {}

  const char* driver() const override { return "luks"; }
  Result<> Close() override { return Node::Close(); }
  ImageEditor* editor() override { return &editor_; }

  Result<ImageInfo> Info() override {
    ImageInfo info = {.format = driver(), .virtual_size = size_bytes_, .encrypted = true};
    info.specific = Describe(header_, false);
    return info;
  }

  // What is added is whatever the key makes of the file's zeros.
  Result<> Resize(const ResizeOptions& options) override {
    if (header_.payload_bytes) return Unsupported("another size: the header says how large it is");
    if (options.size % layout_.sector_bytes != 0) {
      return Fail(ErrorCode::kInvalid, fmt::format("a size of {}: it must be a multiple of {}",
                                                   options.size, layout_.sector_bytes));
    }
    if (read_only_) return Fail(ErrnoError(EROFS, fmt::format("cannot resize '{}'", name())));
    if (options.size > uint64_t{INT64_MAX} - layout_.offset)
      return Fail(ErrorCode::kInvalid, fmt::format("a size of {} is too large", options.size));
    ResizeOptions below = options;
    below.size += layout_.offset;
    TRY(below_->Resize(below));
    size_bytes_ = options.size;
    return {};
  }

  Result<> SetReadOnly(bool read_only) override {
    TRY(below_->SetReadOnly(read_only));
    read_only_ = read_only;
    return {};
  }

  Result<> Amend(Options& options, bool force) {
    if (read_only_) return Fail(ErrnoError(EROFS, fmt::format("cannot write '{}'", name())));
    KeyRing ring = {{below_.get()}, &header_, key_, secret_};
    return AmendKeys(ring, options, force);
  }

 private:
  Header header_;
  SecretBytes key_;
  const std::function<Result<std::string>(const std::string& id)> secret_;
  LuksEditor editor_;
};

Result<CheckResult> LuksEditor::Check(Repair, const ReportFn&) {
  return Fail(ErrorCode::kUnsupported, "format luks has no checks");
}

Result<> LuksEditor::Amend(Options& options, const ProgressFn& progress) {
  bool force = TRY(options.TakeBool("force", false));
  TRY(node_.Amend(options, force));
  if (progress) progress(1, 1);
  return {};
}

Result<> LuksEditor::RecordBacking(const std::string&, const std::string&) {
  return Fail(ErrorCode::kUnsupported, "format luks has no backing files");
}

Result<> LuksEditor::MakeEmpty() {
  return Fail(ErrorCode::kUnsupported, "format luks has no backing files");
}

int Probe(std::span<const uint8_t> head) {
  // What holds LUKS2 is a raw disk to QEMU; it is opened as what it is when asked for by name.
  return VersionOf(head) == 1 ? 100 : 0;
}

Result<NodePtr> Open(const OpenEnv& env, const NodeOptions& node, Options& options) {
  NodeOptions below = node;
  below.grows = true;
  NodePtr file = TRY(OpenChild(env, options, "file", below));
  if (!file) return Fail(ErrorCode::kInvalid, "luks needs 'file'");
  auto in_image = [&](Error error) {
    return Fail(std::move(error).In(fmt::format("'{}'", file->name())));
  };
  Result<Header> read = ReadHeader({file.get()});
  if (!read) return in_image(std::move(read).error());
  Header header = std::move(*read);
  if (header.payload_offset % file->limits().request_alignment != 0) {
    return Fail(
        ErrorCode::kUnsupported,
        fmt::format("'{}': its payload at {} can't be used with direct I/O in units of {}: use "
                    "cache=writeback",
                    file->name(), header.payload_offset, file->limits().request_alignment));
  }
  uint64_t held = file->size_bytes() - std::min(file->size_bytes(), header.payload_offset);
  if (header.payload_bytes.value_or(0) > held)
    return in_image(
        {ErrorCode::kInvalid, "it is cut short: the payload ends beyond the end of the file"});
  CryptNode::Layout layout = {
      .offset = header.payload_offset,
      .size = header.payload_bytes.value_or(held / header.sector_bytes * header.sector_bytes),
      .sector_bytes = header.sector_bytes,
      .first_sector = header.iv_tweak};
  SecretBytes key;
  std::shared_ptr<const SectorCipher> cipher;
  if (node.no_io && !options.Has("key-secret")) {
    TRY(options.RefuseRest("luks", {"file", "key-secret"}));
  } else {
    std::string passphrase = TRY(TakePassphrase(env.secret, options, ""));
    TRY(options.RefuseRest("luks", {"file", "key-secret"}));
    Result<Unlocked> unlocked = Unlock({file.get()}, header, passphrase);
    explicit_bzero(passphrase.data(), passphrase.size());
    if (!unlocked) return in_image(std::move(unlocked).error());
    key = std::move(unlocked->key);
    Result<std::shared_ptr<const SectorCipher>> made = SectorCipher::Create(header.cipher, key);
    if (!made) return in_image(std::move(made).error());
    cipher = std::move(*made);
  }
  return std::make_shared<LuksNode>(std::move(file), std::move(cipher), layout, node.read_only,
                                    std::move(header), std::move(key), env);
}

Result<> Create(const OpenEnv& env, const std::string& filename, Options& options) {
  ResizeOptions resize = {.size = TRY(options.TakeSize("size", 0))};
  resize.size = (resize.size + 511) / 512 * 512;
  resize.preallocation = TRY(ParsePreallocation(options.Take("preallocation", "off")));
  if (resize.preallocation == Preallocation::kMetadata)
    return Fail(ErrorCode::kInvalid, "preallocation=metadata: a luks volume has none");
  CreateOptions create = TRY(TakeCreateOptions(options));
  std::string passphrase = TRY(TakePassphrase(env.secret, options, ""));
  resize.size += HeaderBytes(create.cipher);
  NodePtr file = TRY(CreateFile(env, filename));
  if (file->grows()) TRY(file->Resize(resize));
  if (file->size_bytes() < resize.size) {
    return Fail(ErrorCode::kNoSpace, fmt::format("'{}' has {} bytes, the volume needs {}", filename,
                                                 file->size_bytes(), resize.size));
  }
  Header header;
  Result<SecretBytes> made = Format({file.get()}, create, passphrase, header);
  explicit_bzero(passphrase.data(), passphrase.size());
  Result<> closed = file->Close();
  if (!made) return std::unexpected(made.error());
  return closed;
}

Result<MeasureResult> Measure(Options& options, Node* source) {
  uint64_t size = TRY(options.TakeSize("size", source ? source->size_bytes() : 0));
  options.Take("preallocation");
  options.Take("key-secret");
  CreateOptions create = TRY(TakeCreateOptions(options));
  size += HeaderBytes(create.cipher);
  return MeasureResult{.required = size, .fully_allocated = size};
}

constexpr OptionRow kCreateOptions[] = {
    KVARTZ_LUKS_CREATE_OPTIONS(""),
    {"key-secret", OptionRow::Type::kString,
     "ID of the secret that provides the keyslot passphrase"},
    {"preallocation", OptionRow::Type::kString,
     "Preallocation mode (allowed values: off, falloc, full)"},
};
constexpr OptionRow kAmendOptions[] = {KVARTZ_LUKS_AMEND_OPTIONS("")};

}  // namespace

Result<CreateOptions> TakeCreateOptions(Options& options) {
  CreateOptions create;
  std::string alg = options.Take("cipher-alg", ""), mode = options.Take("cipher-mode", "");
  std::string ivgen = options.Take("ivgen-alg", ""),
              ivgen_hash = options.Take("ivgen-hash-alg", "");
  create.cipher = TRY(CipherOfOptions(alg, mode, ivgen, ivgen_hash));
  create.hash = TRY(RequireHash(options.Take("hash-alg", "sha256")));
  // The key's digest has 20 bytes whatever the hash; shorter ones can't fill it by themselves, but
  // what makes it (PBKDF2) can.
  create.iter_time_ms = TRY(options.TakeNumber("iter-time", create.iter_time_ms));
  if (create.iter_time_ms == 0)
    return Fail(ErrorCode::kInvalid, "iter-time=0: it must be 1 or more");
  return create;
}

Result<std::string> TakePassphrase(
    const std::function<Result<std::string>(const std::string& id)>& secret, Options& options,
    const char* prefix) {
  std::optional<std::string> id = options.Take("key-secret");
  if (!id) {
    return Fail(ErrorCode::kNotFound,
                fmt::format("Parameter '{}key-secret' is required for cipher", prefix));
  }
  if (!secret) return Fail(ErrorCode::kNotFound, fmt::format("there is no secret '{}'", *id));
  return secret(*id);
}

InfoValue::Object Describe(const Header& header, bool in_qcow2) {
  InfoValue::Object object;
  auto add = [](InfoValue::Object& to, const char* name, InfoValue value) {
    to.push_back({name, std::move(value)});
  };
  if (in_qcow2) add(object, "format", {std::string("luks")});
  add(object, "ivgen-alg", {std::string(NameOf(header.cipher.iv))});
  if (header.cipher.iv_hash)
    add(object, "ivgen-hash-alg", {std::string(header.cipher.iv_hash->name)});
  if (header.hash) add(object, "hash-alg", {std::string(header.hash->name)});
  add(object, "cipher-alg", {header.cipher.alg_name()});
  add(object, "cipher-mode", {std::string(NameOf(header.cipher.mode))});
  add(object, "uuid", {header.uuid});
  if (header.version == 2) {
    add(object, "version", {uint64_t{2}});
    if (!header.label.empty()) add(object, "label", {header.label});
    add(object, "sector-size", {uint64_t{header.sector_bytes}});
  }
  InfoValue::Array slots;
  for (const Slot& slot : header.slots) {
    InfoValue::Object row;
    add(row, "active", {slot.active});
    if (slot.active) {
      add(row, "iters", {slot.kdf.iterations});
      add(row, "stripes", {uint64_t{slot.stripes}});
      if (slot.kdf.kind != Kdf::Kind::kPbkdf2) {
        bool id = slot.kdf.kind == Kdf::Kind::kArgon2id;
        add(row, "kdf", {std::string(id ? "argon2id" : "argon2i")});
        add(row, "memory-kib", {uint64_t{slot.kdf.memory_kib}});
        add(row, "lanes", {uint64_t{slot.kdf.lanes}});
      }
    }
    add(row, "key-offset", {slot.area_offset});
    slots.push_back({std::move(row)});
  }
  add(object, "slots", {std::move(slots)});
  add(object, "payload-offset", {header.payload_offset});
  add(object, "master-key-iters", {header.digest.iterations});
  return object;
}

}  // namespace kvartz::block::luks

namespace kvartz::block {

extern const Driver kLuksDriver;
const Driver kLuksDriver = {
    .name = "luks",
    .kind = Driver::Kind::kFormat,
    .probe = luks::Probe,
    .open = luks::Open,
    .create_options = luks::kCreateOptions,
    .create = luks::Create,
    .measure = luks::Measure,
    .amend_options = luks::kAmendOptions,
    .new_is_zero = false,
};

}  // namespace kvartz::block
