// Hostile saved states: whatever the bytes, loading ends, and what it accepted can be saved and
// loaded again.
#include <cstdlib>
#include <cstring>

#include "base/crc32c.h"
#include "base/endian.h"
#include "base/state_visitor.h"

namespace {

struct Machine {
  uint8_t byte = 0;
  int32_t number = 0;
  uint32_t words[4] = {};
  std::vector<uint8_t> fifo;
  std::string text;
  uint32_t inner = 0, optional = 0;

  void VisitState(kvartz::StateVisitor& v) {
    v.Version(2);
    v.Field("byte", byte);
    v.Field("number", number);
    v.Field("words", words);
    v.Field("fifo", fifo, 64);
    v.Field("text", text, 64);
    v.Bounded("byte", byte, 0, 200);
    v.Section("a", [&] {
      v.Version(1);
      v.Section("b", [&] { v.Field("inner", inner); });
    });
    v.Section(
        "o", [&] { v.Field("optional", optional); }, kvartz::StateVisitor::Presence::kOptional);
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // The checksum is put right, or nothing would ever get past it.
  static constexpr char kHeader[] = "KVZSTATE\1\0\0";
  std::vector<uint8_t> bytes(kHeader, kHeader + sizeof(kHeader));
  bytes.insert(bytes.end(), data, data + size);
  kvartz::Le32 crc = kvartz::Crc32c(bytes);
  bytes.resize(bytes.size() + sizeof(crc));
  std::memcpy(&bytes[bytes.size() - sizeof(crc)], &crc, sizeof(crc));

  Machine first, second;
  if (!kvartz::LoadState(bytes, [&](kvartz::StateVisitor& v) { first.VisitState(v); })) return 0;
  auto saved = kvartz::SaveState([&](kvartz::StateVisitor& v) { first.VisitState(v); });
  if (!kvartz::LoadState(saved, [&](kvartz::StateVisitor& v) { second.VisitState(v); })) abort();
  auto dump = [](Machine& machine) {
    return kvartz::DumpState([&](kvartz::StateVisitor& v) { machine.VisitState(v); });
  };
  if (dump(first) != dump(second)) abort();
  return 0;
}
