#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>

#include "base/base64.h"
#include "block/crypto/cipher.h"
#include "block/crypto/crypt_node.h"
#include "block/crypto/secret.h"
#include "block/fiber_io.h"
#include "block/formats/luks/af.h"
#include "block/formats/luks/volume.h"
#include "block/image_helpers.h"
#include "block/io_batch.h"
#include "block/memory_node.h"
#include "block/sync_io.h"

namespace kvartz::block {
namespace {

std::vector<uint8_t> FromHex(const std::string& text) {
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i + 1 < text.size(); i += 2)
    bytes.push_back(static_cast<uint8_t>(std::stoi(text.substr(i, 2), nullptr, 16)));
  return bytes;
}

std::span<const uint8_t> BytesOf(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

// IEEE 1619-2007, annex B, vector 4: XTS-AES-128 of a data unit of 512 bytes, number 0.
TEST(SectorCipherTest, XtsAsPublished) {
  CipherSpec spec = *CipherOfOptions("aes-128", "xts", "plain64", "");
  auto key = FromHex("2718281828459045235360287471352631415926535897932384626433832795");
  auto cipher = *SectorCipher::Create(spec, key);
  std::vector<uint8_t> data(512);
  for (size_t i = 0; i < data.size(); i++) data[i] = static_cast<uint8_t>(i);
  std::vector<uint8_t> clear = data;
  cipher->Encrypt(0, 512, data);
  auto expected = FromHex("27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c");
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(), data.begin()));
  cipher->Decrypt(0, 512, data);
  EXPECT_EQ(data, clear);
}

TEST(SectorCipherTest, SectorsAreNumberedInUnitsOf512) {
  CipherSpec spec = *CipherOfOptions("aes-256", "cbc", "plain64", "");
  auto cipher = *SectorCipher::Create(spec, std::vector<uint8_t>(32, 7));
  std::vector<uint8_t> both(8192, 1), second(4096, 1);
  cipher->Encrypt(16, 4096, both);
  cipher->Encrypt(24, 4096, second);
  EXPECT_TRUE(std::equal(second.begin(), second.end(), both.begin() + 4096));
  // 32-bit numbers wrap, 64-bit ones don't.
  auto plain = *SectorCipher::Create(*CipherOfOptions("aes-256", "cbc", "plain", ""),
                                     std::vector<uint8_t>(32, 7));
  std::vector<uint8_t> low(512, 1), high(512, 1), high64(512, 1);
  plain->Encrypt(5, 512, low);
  plain->Encrypt((uint64_t{1} << 32) + 5, 512, high);
  cipher->Encrypt((uint64_t{1} << 32) + 5, 512, high64);
  EXPECT_EQ(low, high);
  EXPECT_NE(low, high64);
}

TEST(SectorCipherTest, RefusesWhatIsNotThere) {
  EXPECT_FALSE(ParseCipher("rot13", "xts-plain64", 64));
  EXPECT_FALSE(ParseCipher("aes", "xts", 64));
  EXPECT_FALSE(ParseCipher("aes", "xts-plain64", 63));
  EXPECT_FALSE(ParseCipher("aes", "cbc-essiv", 32));
  EXPECT_FALSE(ParseCipher("aes", "cbc-essiv:sha1", 32));  // 160 bits are no key
  EXPECT_FALSE(ParseCipher("cast5", "xts-plain64", 32));
  EXPECT_FALSE(CipherOfOptions("aes-257", "", "", ""));
  EXPECT_EQ(ParseCipher("aes", "cbc-essiv:sha256", 32)->mode_name(), "cbc-essiv:sha256");
  EXPECT_EQ(ParseCipher("serpent", "xts-plain64", 64)->alg_name(), "serpent-256");
}

// RFC 6070.
TEST(DigestTest, Pbkdf2AsPublished) {
  std::vector<uint8_t> out(20);
  ASSERT_TRUE(DerivePbkdf2(*FindHash("sha1"), BytesOf("password"), BytesOf("salt"), 4096, out));
  EXPECT_EQ(out, FromHex("4b007901b765489abead49d926f721d065a429c1"));
  // FIPS 180-4's example.
  out.resize(32);
  HashBytes(*FindHash("sha256"), BytesOf("a"), BytesOf("bc"), out);
  EXPECT_EQ(out, FromHex("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"));
}

TEST(AfTest, SplitsAndMerges) {
  for (const char* hash : {"sha1", "sha256", "sha512"}) {
    for (size_t size : {16, 32, 33, 64}) {
      std::vector<uint8_t> key(size), split(size * 50), back(size);
      RandomBytes(key);
      luks::AfSplit(*FindHash(hash), 50, key, split);
      luks::AfMerge(*FindHash(hash), 50, split, back);
      EXPECT_EQ(back, key);
      split[size * 20] ^= 1;
      luks::AfMerge(*FindHash(hash), 50, split, back);
      EXPECT_NE(back, key);
    }
  }
}

TEST(Base64Test, DecodesOrRefuses) {
  auto text = [](std::string_view from) -> std::string {
    auto bytes = DecodeBase64(from);
    return bytes ? std::string(bytes->begin(), bytes->end()) : "!";
  };
  EXPECT_EQ(text(""), "");
  EXPECT_EQ(text("Zm9vYmFy"), "foobar");  // RFC 4648, section 10
  EXPECT_EQ(text("Zm9vYg=="), "foob");
  EXPECT_EQ(text("Zm9v\nYmE=\n"), "fooba");
  for (const char* bad : {"Z", "Zm9vYg=", "Zm9v=YmE", "Zm9*", "===="}) EXPECT_EQ(text(bad), "!");
}

TEST(SecretTest, SaysWhatIsWrong) {
  SecretStore store;
  auto add = [&](const char* text) {
    Result<> added = store.Add(*Options::Parse(text));
    return added ? "" : added.error().what;
  };
  EXPECT_EQ(add("id=a,data=x"), "");
  EXPECT_EQ(*store.Find("a"), "x");
  EXPECT_EQ(add("id=b,data=Zm9v,format=base64"), "");
  EXPECT_EQ(*store.Find("b"), "foo");
  EXPECT_NE(add("data=x").find("id="), std::string::npos);
  EXPECT_NE(add("id=a,data=x").find("two"), std::string::npos);
  EXPECT_NE(add("id=c").find("data= or file="), std::string::npos);
  EXPECT_NE(add("id=c,data=x,file=y").find("data= or file="), std::string::npos);
  EXPECT_NE(add("id=c,file=/nowhere/x").find("/nowhere"), std::string::npos);
  EXPECT_NE(add("id=c,data=*,format=base64").find("base64"), std::string::npos);
  EXPECT_NE(add("id=c,data=x,format=hex").find("format=hex"), std::string::npos);
  EXPECT_NE(add("id=c,data=x,keyid=a").find("iv="), std::string::npos);
  EXPECT_NE(add("id=c,data=x,keyid=b,iv=AAAA").find("32"), std::string::npos);
  EXPECT_NE(add("id=c,data=x,colour=red").find("colour"), std::string::npos);
  EXPECT_FALSE(store.Find("c"));
}

// Many requests at once, of any bounds, against a disk in memory.
TEST(CryptNodeTest, RequestsOfAnyBoundsAtOnce) {
  auto loop = MakeLoop(EventLoop::Backend::kEpoll);
  std::mt19937_64 random(1);
  constexpr uint64_t kSize = 256 << 10, kOffset = 4096;
  for (uint32_t sector : {512u, 4096u}) {
    auto file = std::make_shared<MemoryNode>(*loop, std::string(kOffset + kSize, '\0'), sector);
    auto cipher = *SectorCipher::Create(*CipherOfOptions("aes-256", "xts", "", ""),
                                        std::vector<uint8_t>(64, 3));
    CryptNode node(file, cipher, {.offset = kOffset, .size = kSize, .sector_bytes = sector}, false);
    std::vector<uint8_t> model(kSize);
    RunInFiber(*loop, [&] { ASSERT_EQ(WriteZeroesAt(node, 0, kSize), 0); });
    for (int round = 0; round < 30; round++) {
      // Neighbours that share sectors, in any order.
      std::vector<uint64_t> cuts = {0, kSize};
      for (int i = 0; i < 40; i++) cuts.push_back(random() % kSize);
      std::sort(cuts.begin(), cuts.end());
      std::vector<size_t> order(cuts.size() - 1);
      for (size_t i = 0; i < order.size(); i++) order[i] = i;
      std::shuffle(order.begin(), order.end(), random);
      for (uint8_t& byte : model) byte = static_cast<uint8_t>(random());
      RunInFiber(*loop, [&] {
        IoBatch batch;
        for (size_t i : order) {
          if (cuts[i] == cuts[i + 1]) continue;
          batch.Write(node, cuts[i], std::span(model).subspan(cuts[i], cuts[i + 1] - cuts[i]));
        }
        ASSERT_EQ(batch.Wait(), 0);
        for (int i = 0; i < 20; i++) {
          uint64_t from = random() % kSize, length = random() % (kSize - from) + 1;
          std::vector<uint8_t> got(length);
          ASSERT_EQ(ReadAt(node, from, got), 0);
          ASSERT_TRUE(
              std::equal(got.begin(), got.end(), model.begin() + static_cast<ptrdiff_t>(from)));
        }
      });
    }
    node.Drain();
  }
}

TEST(CryptNodeTest, WithoutKeyNothingIsReadOrWritten) {
  auto loop = MakeLoop(EventLoop::Backend::kEpoll);
  auto file = std::make_shared<MemoryNode>(*loop, std::string(8192, 'x'));
  CryptNode node(file, nullptr, {.size = 8192}, false);
  std::vector<uint8_t> bytes(512);
  RunInFiber(*loop, [&] {
    EXPECT_EQ(ReadAt(node, 0, bytes), -EACCES);
    EXPECT_EQ(WriteAt(node, 0, bytes), -EACCES);
    EXPECT_EQ(FlushNode(node), 0);
  });
  EXPECT_EQ(file->bytes(), std::string(8192, 'x'));
}

// Each step of a change of key slots may be the last: the volume can still be opened.
TEST(LuksTest, KeySlotsSurviveALossOfPower) {
  auto loop = MakeLoop(EventLoop::Backend::kEpoll);
  luks::CreateOptions options = {.cipher = *CipherOfOptions("aes-128", "cbc", "plain64", ""),
                                 .hash = FindHash("sha1"),
                                 .iter_time_ms = 1};
  uint64_t bytes = luks::HeaderBytes(options.cipher);
  auto file = std::make_shared<MemoryNode>(*loop, std::string(bytes + 4096, '\0'), 7);
  luks::Area area = {file.get()};
  luks::Header header;
  SecretBytes key;
  RunInFiber(*loop, [&] { key = *luks::Format(area, options, "one", header); });
  const std::string start(bytes + 4096, '\0');
  size_t from = file->now(), added = 0;
  RunInFiber(*loop, [&] {
    ASSERT_TRUE(luks::AddKey(area, header, 3, key, "two", 1));
    added = file->now();
    ASSERT_TRUE(luks::EraseKey(area, header, 0));
  });
  std::vector<MemoryNode::Event> log(file->log().begin(), file->log().end());
  std::mt19937_64 random(2);
  for (size_t end = from; end <= log.size(); end++) {
    auto cut = std::make_shared<MemoryNode>(*loop, MemoryNode::Cut(start, log, end, random));
    RunInFiber(*loop, [&] {
      luks::Area cut_area = {cut.get()};
      Result<luks::Header> read = luks::ReadHeader(cut_area);
      ASSERT_TRUE(read);
      bool one = luks::Unlock(cut_area, *read, "one").has_value();
      bool two = luks::Unlock(cut_area, *read, "two").has_value();
      EXPECT_TRUE(one || two) << end;
      EXPECT_TRUE(one || end > added) << end;
      EXPECT_TRUE(two || end < added) << end;
    });
  }
}

}  // namespace
}  // namespace kvartz::block
