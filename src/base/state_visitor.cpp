// The stream, all integers little-endian:
//   "KVZSTATE"  u32 format (1)  items of the unnamed root section  u32 CRC-32C of everything before
//   it item:     u8 kind, u8 length of the name (at least 1), the name, then by kind section:  u8
//   flags (bit 0: a reader must know it), u32 length, its items version:  u32 (the name is
//   "version") integer:  u8 flags (bit 0: signed), u64 (sign-extended) bytes:    u32 length, the
//   bytes
#include "base/state_visitor.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <iterator>
#include <set>

#include "base/check.h"
#include "base/crc32c.h"
#include "base/endian.h"

namespace kvartz {
namespace {

static_assert(std::endian::native == std::endian::little, "arrays are saved as they lie in memory");

constexpr std::string_view kMagic = "KVZSTATE";
constexpr uint32_t kFormat = 1;
constexpr size_t kHeaderSize = kMagic.size() + sizeof(Le32);
constexpr std::string_view kVersionName = "version";

enum class ItemKind : uint8_t { kSection = 1, kVersion = 2, kInteger = 3, kBytes = 4 };
constexpr uint8_t kMustKnow = 1;
constexpr uint8_t kSigned = 1;

std::span<const uint8_t> AsBytes(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

// Where a traversal is: "pci.0.net0.queue".
class Path {
 public:
  void Enter(std::string_view name) { names_.emplace_back(name); }
  void Leave() { names_.pop_back(); }
  std::string Of(std::string_view leaf) const {
    std::string path;
    for (const auto& name : names_) path += (path.empty() ? "" : ".") + name;
    if (!leaf.empty()) path += (path.empty() ? "" : ".") + std::string(leaf);
    return path;
  }

 private:
  std::vector<std::string> names_;
};

class Saver final : public StateVisitor {
 public:
  Saver() {
    Append(AsBytes(kMagic));
    Put<Le32>(kFormat);
  }
  std::vector<uint8_t> Finish() && {
    Put<Le32>(Crc32c(out_));
    return std::move(out_);
  }

  bool loading() const override { return false; }
  bool failed() const override { return false; }
  void Reject(std::string_view) override {}

  void Section(std::string_view name, const std::function<void()>& body,
               Presence presence) override {
    Head(ItemKind::kSection, name);
    out_.push_back(presence == Presence::kRequired ? kMustKnow : 0);
    size_t length_at = out_.size();
    Put<Le32>(0);
    auto outer = std::exchange(names_, {});
    body();
    names_ = std::move(outer);
    size_t length = out_.size() - length_at - sizeof(Le32);
    VERIFY(length <= UINT32_MAX);
    Le32 stored = static_cast<uint32_t>(length);
    std::memcpy(&out_[length_at], &stored, sizeof(stored));
  }
  uint32_t Version(uint32_t current) override {
    Head(ItemKind::kVersion, kVersionName);
    Put<Le32>(current);
    return current;
  }
  void FixedBytes(std::string_view name, std::span<uint8_t> bytes) override { Bytes(name, bytes); }
  void Field(std::string_view name, std::vector<uint8_t>& bytes, size_t max_size) override {
    VERIFY(bytes.size() <= max_size);
    Bytes(name, bytes);
  }
  void Field(std::string_view name, std::string& text, size_t max_size) override {
    VERIFY(text.size() <= max_size);
    Bytes(name, AsBytes(text));
  }

 protected:
  bool Integer(std::string_view name, uint64_t& value, unsigned, bool is_signed) override {
    Head(ItemKind::kInteger, name);
    out_.push_back(is_signed ? kSigned : 0);
    Put<Le64>(value);
    return false;
  }

 private:
  void Head(ItemKind kind, std::string_view name) {
    VERIFY(!name.empty() && name.size() <= UINT8_MAX);
    VERIFY(names_.emplace(name).second);  // each name once in its section
    out_.push_back(static_cast<uint8_t>(kind));
    out_.push_back(static_cast<uint8_t>(name.size()));
    Append(AsBytes(name));
  }
  void Bytes(std::string_view name, std::span<const uint8_t> bytes) {
    VERIFY(bytes.size() <= UINT32_MAX);
    Head(ItemKind::kBytes, name);
    Put<Le32>(static_cast<uint32_t>(bytes.size()));
    Append(bytes);
  }
  void Append(std::span<const uint8_t> bytes) {
    out_.insert(out_.end(), bytes.begin(), bytes.end());
  }
  template <typename T>
  void Put(T value) {
    Append({reinterpret_cast<const uint8_t*>(&value), sizeof(T)});
  }

  std::vector<uint8_t> out_;
  std::set<std::string, std::less<>> names_;  // of the section at hand
};

// One item as it lies in the stream.
struct Item {
  std::string_view name;
  ItemKind kind{};
  uint8_t flags = 0;
  uint64_t value = 0;              // kVersion, kInteger
  std::span<const uint8_t> bytes;  // kSection, kBytes
  bool used = false;
};

// Reads items from the front of a span. Every length is checked against what is left.
class ItemReader {
 public:
  explicit ItemReader(std::span<const uint8_t> bytes) : rest_(bytes) {}
  bool empty() const { return rest_.empty(); }
  // False: damaged.
  bool Next(Item* item) {
    uint8_t kind = 0, name_length = 0;
    std::span<const uint8_t> name;
    if (!Get(&kind) || !Get(&name_length) || name_length == 0 || !Take(name_length, &name)) {
      return false;
    }
    *item = {};
    item->name = {reinterpret_cast<const char*>(name.data()), name.size()};
    item->kind = static_cast<ItemKind>(kind);
    Le32 narrow = 0;
    Le64 wide = 0;
    switch (item->kind) {
      case ItemKind::kSection:
        return Get(&item->flags) && Get(&narrow) && Take(narrow, &item->bytes);
      case ItemKind::kVersion:
        if (!Get(&narrow)) return false;
        item->value = narrow;
        return true;
      case ItemKind::kInteger:
        if (!Get(&item->flags) || !Get(&wide)) return false;
        item->value = wide;
        return true;
      case ItemKind::kBytes:
        return Get(&narrow) && Take(narrow, &item->bytes);
    }
    return false;
  }

 private:
  bool Take(size_t size, std::span<const uint8_t>* out) {
    if (size > rest_.size()) return false;
    *out = rest_.first(size);
    rest_ = rest_.subspan(size);
    return true;
  }
  template <typename T>
  bool Get(T* value) {
    std::span<const uint8_t> bytes;
    if (!Take(sizeof(T), &bytes)) return false;
    std::memcpy(value, bytes.data(), sizeof(T));
    return true;
  }
  std::span<const uint8_t> rest_;
};

// Walks as deep as the program's own sections go, never as deep as the stream claims to be.
class Loader final : public StateVisitor {
 public:
  explicit Loader(std::span<const uint8_t> root) { Index(root); }
  Result<> Finish() {
    CheckLeftOver();
    if (error_.empty()) return {};
    return Fail(ErrorCode::kInvalid, "saved state: " + error_);
  }

  bool loading() const override { return true; }
  bool failed() const override { return !error_.empty(); }
  void Reject(std::string_view text) override { SetError("", text); }

  void Section(std::string_view name, const std::function<void()>& body,
               Presence presence) override {
    Item* item = Find(name, ItemKind::kSection);
    if (!item) {
      if (presence == Presence::kRequired) SetError(name, "is missing");
      return;
    }
    path_.Enter(name);
    auto outer = std::exchange(items_, {});
    Index(item->bytes);
    if (!failed()) body();
    CheckLeftOver();
    items_ = std::move(outer);
    path_.Leave();
  }
  uint32_t Version(uint32_t current) override {
    Item* item = Find(kVersionName, ItemKind::kVersion);
    if (!item) return 0;
    if (item->value > current) {
      SetError("", fmt::format("is version {}, and this program knows it up to {}: use a newer one",
                               item->value, current));
    }
    return static_cast<uint32_t>(item->value);
  }
  void FixedBytes(std::string_view name, std::span<uint8_t> bytes) override {
    Item* item = Find(name, ItemKind::kBytes);
    if (!item) return;
    if (item->bytes.size() != bytes.size()) {
      SetError(name, fmt::format("has {} bytes, not {}", item->bytes.size(), bytes.size()));
      return;
    }
    std::copy(item->bytes.begin(), item->bytes.end(), bytes.begin());
  }
  void Field(std::string_view name, std::vector<uint8_t>& bytes, size_t max_size) override {
    Item* item = FindBytes(name, max_size);
    if (item) bytes.assign(item->bytes.begin(), item->bytes.end());
  }
  void Field(std::string_view name, std::string& text, size_t max_size) override {
    Item* item = FindBytes(name, max_size);
    if (item) text.assign(item->bytes.begin(), item->bytes.end());
  }

 protected:
  bool Integer(std::string_view name, uint64_t& value, unsigned size_bytes,
               bool is_signed) override {
    Item* item = Find(name, ItemKind::kInteger);
    if (!item) return false;
    // The width may have changed between releases; the value must fit.
    bool negative = (item->flags & kSigned) && static_cast<int64_t>(item->value) < 0;
    unsigned bits = size_bytes * 8 - (is_signed ? 1 : 0);
    uint64_t magnitude = negative ? ~item->value : item->value;
    bool fits = (!negative || is_signed) && (bits >= 64 || magnitude >> bits == 0);
    if (!fits) {
      SetError(name, "is out of range");
      return false;
    }
    value = item->value;
    return true;
  }

 private:
  void SetError(std::string_view leaf, std::string_view text) {
    if (failed()) return;
    std::string where = path_.Of(leaf);
    error_ = where.empty() ? std::string(text) : fmt::format("{} {}", where, text);
  }
  void Index(std::span<const uint8_t> bytes) {
    items_.clear();
    for (ItemReader reader(bytes); !reader.empty();) {
      Item item;
      if (!reader.Next(&item)) return SetError("", "is damaged");
      items_.push_back(item);
    }
    std::sort(items_.begin(), items_.end(),
              [](const Item& a, const Item& b) { return a.name < b.name; });
    auto twin = std::adjacent_find(items_.begin(), items_.end(),
                                   [](const Item& a, const Item& b) { return a.name == b.name; });
    if (twin != items_.end()) SetError("", "is damaged (a name comes twice)");
  }
  // What this program doesn't know may be skipped, but not a component that the saved machine can't
  // do without.
  void CheckLeftOver() {
    for (const Item& item : items_) {
      if (item.kind == ItemKind::kSection && (item.flags & kMustKnow) && !item.used) {
        SetError(item.name, "isn't part of this machine");
      }
    }
  }
  // Null if it isn't there or after an error.
  Item* Find(std::string_view name, ItemKind kind) {
    if (failed()) return nullptr;
    auto item = std::lower_bound(items_.begin(), items_.end(), name,
                                 [](const Item& a, std::string_view b) { return a.name < b; });
    if (item == items_.end() || item->name != name) return nullptr;
    if (item->kind != kind) {
      SetError(name, "is of another kind");
      return nullptr;
    }
    item->used = true;
    return &*item;
  }
  Item* FindBytes(std::string_view name, size_t max_size) {
    Item* item = Find(name, ItemKind::kBytes);
    if (item && item->bytes.size() > max_size) {
      SetError(name,
               fmt::format("has {} bytes, at most {} are allowed", item->bytes.size(), max_size));
      return nullptr;
    }
    return item;
  }

  std::vector<Item> items_;  // of the section at hand, by name
  Path path_;
  std::string error_;
};

class Dumper final : public StateVisitor {
 public:
  std::string Finish() && { return std::move(out_); }
  bool loading() const override { return false; }
  bool failed() const override { return false; }
  void Reject(std::string_view) override {}
  void Section(std::string_view name, const std::function<void()>& body, Presence) override {
    path_.Enter(name);
    body();
    path_.Leave();
  }
  uint32_t Version(uint32_t current) override {
    Line(kVersionName, fmt::format("{}", current));
    return current;
  }
  void FixedBytes(std::string_view name, std::span<uint8_t> bytes) override { Bytes(name, bytes); }
  void Field(std::string_view name, std::vector<uint8_t>& bytes, size_t) override {
    Bytes(name, bytes);
  }
  void Field(std::string_view name, std::string& text, size_t) override {
    Line(name, fmt::format("\"{}\"", text));
  }

 protected:
  bool Integer(std::string_view name, uint64_t& value, unsigned, bool is_signed) override {
    bool negative = is_signed && static_cast<int64_t>(value) < 0;
    Line(name, negative ? fmt::format("-{:#x}", ~value + 1) : fmt::format("{:#x}", value));
    return false;
  }

 private:
  static constexpr size_t kShownBytes = 256;
  void Bytes(std::string_view name, std::span<const uint8_t> bytes) {
    std::string text = fmt::format("[{}]", bytes.size());
    if (bytes.size() > kShownBytes) {
      text += fmt::format(" crc32c {:#010x}", Crc32c(bytes));
    } else {
      for (uint8_t byte : bytes) fmt::format_to(std::back_inserter(text), " {:02x}", byte);
    }
    Line(name, text);
  }
  void Line(std::string_view name, std::string_view text) {
    fmt::format_to(std::back_inserter(out_), "{} = {}\n", path_.Of(name), text);
  }
  Path path_;
  std::string out_;
};

}  // namespace

void StateVisitor::Bounded(std::string_view name, uint64_t value, uint64_t low, uint64_t high) {
  if (!loading() || failed() || (value >= low && value <= high)) return;
  Reject(fmt::format("has {} {:#x}, which is not in {:#x}..{:#x}", name, value, low, high));
}

std::vector<uint8_t> SaveState(const std::function<void(StateVisitor&)>& visit) {
  Saver saver;
  visit(saver);
  return std::move(saver).Finish();
}

Result<> LoadState(std::span<const uint8_t> bytes,
                   const std::function<void(StateVisitor&)>& visit) {
  if (bytes.size() < kHeaderSize + sizeof(Le32) ||
      std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    return Fail(ErrorCode::kInvalid, "this is not a saved machine state, or it is cut off");
  }
  Le32 format, crc;
  std::memcpy(&format, &bytes[kMagic.size()], sizeof(format));
  auto covered = bytes.first(bytes.size() - sizeof(crc));
  std::memcpy(&crc, bytes.data() + covered.size(), sizeof(crc));
  if (format != kFormat) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("saved state has format {}, and this program knows format {}",
                            uint32_t{format}, kFormat));
  }
  if (crc != Crc32c(covered)) {
    return Fail(ErrorCode::kInvalid, "saved state is damaged or cut off (wrong checksum)");
  }
  Loader loader(covered.subspan(kHeaderSize));
  if (!loader.failed()) visit(loader);
  return loader.Finish();
}

std::string DumpState(const std::function<void(StateVisitor&)>& visit) {
  Dumper dumper;
  visit(dumper);
  return std::move(dumper).Finish();
}

}  // namespace kvartz
