#include "device/virtio/virtio_console.h"

#include <gtest/gtest.h>

#include <cstring>
#include <map>

#include "device/virtio/test_machine.h"

namespace kvartz::test {
namespace {

constexpr uint64_t kMultiport = 2, kEmergencyWrite = 4;
constexpr uint16_t kReady = 0, kAdd = 1, kRemove = 2, kPortReady = 3, kConsolePort = 4, kOpen = 6,
                   kName = 7;

struct Message {
  uint32_t id = 0;
  uint16_t event = 0, value = 0;
  std::string text;
  bool operator==(const Message&) const = default;
};

class VirtioConsoleTest : public testing::Test {
 protected:
  void SetUp() override {
    host::ChardevConfig config;
    config.id = "c0";
    config.kind = host::ChardevConfig::Kind::kRingbuf;
    chardev_ = host::Chardev::Create(config, machine_.loop()).value();
    machine_.chardev = chardev_.get();
    ASSERT_NE(machine_.Plug("virtio-serial-pci", {}), nullptr) << machine_.error;
    driver_ = std::make_unique<ModernDriver>(machine_);
  }
  void TearDown() override { machine_.Unplug(); }
  void Start(uint64_t features = kMultiport) {
    ASSERT_TRUE(driver_->Negotiate(features));
    for (uint16_t i = 0; i < (features & kMultiport ? 6 : 2); ++i) driver_->SetUpQueue(i);
    driver_->Start();
    machine_.Settle();
    if (!(features & kMultiport)) return;
    for (int i = 0; i < 8; ++i) AddBuffer(2, 64);
    driver_->Kick(2);
  }
  void AddBuffer(uint16_t queue, uint32_t size) {
    uint64_t gpa;
    machine_.Allocate(size, &gpa);
    addresses_[queue][driver_->ring(queue).Add({{gpa, size, true}})] = gpa;
  }
  std::optional<std::string> Take(uint16_t queue) {
    std::optional<Used> used;
    if (!machine_.TurnUntil([&] { return (used = driver_->ring(queue).Take()).has_value(); }))
      return std::nullopt;
    const uint8_t* at = machine_.ram(addresses_[queue][used->id]);
    return std::string(at, at + used->length);
  }
  Message TakeMessage() {
    Message message;
    std::optional<std::string> bytes = Take(2);
    if (!bytes || bytes->size() < 8) return message;
    std::memcpy(&message.id, bytes->data(), 4);
    std::memcpy(&message.event, bytes->data() + 4, 2);
    std::memcpy(&message.value, bytes->data() + 6, 2);
    message.text = bytes->substr(8);
    AddBuffer(2, 64);
    driver_->Kick(2);
    return message;
  }
  void Say(uint32_t id, uint16_t event, uint16_t value) {
    uint64_t gpa;
    uint8_t* at = machine_.Allocate(8, &gpa);
    std::memcpy(at, &id, 4);
    std::memcpy(at + 4, &event, 2);
    std::memcpy(at + 6, &value, 2);
    EXPECT_EQ(driver_->Transact(3, {{gpa, 8, false}}), 0u);
  }
  void Send(uint16_t queue, const std::string& text) {
    uint64_t gpa;
    std::memcpy(machine_.Allocate(text.size(), &gpa), text.data(), text.size());
    EXPECT_EQ(driver_->Transact(queue, {{gpa, static_cast<uint32_t>(text.size()), false}}), 0u);
  }

  TestMachine machine_;
  std::unique_ptr<host::Chardev> chardev_;
  std::unique_ptr<ModernDriver> driver_;
  std::map<uint16_t, std::map<uint16_t, uint64_t>> addresses_;
};

TEST_F(VirtioConsoleTest, PortsAreFoundNamedAndOpened) {
  ASSERT_NE(machine_.MakeAnother("virtserialport", {{"chardev", "c0"}, {"name", "org.example.0"}}),
            nullptr)
      << machine_.error;
  Start();
  EXPECT_EQ(driver_->ReadConfig(4, 4), 31u);  // max_nr_ports
  Say(0, kReady, 1);
  EXPECT_EQ(TakeMessage(), (Message{1, kAdd, 1, ""}));
  Say(1, kPortReady, 1);
  EXPECT_EQ(TakeMessage(), (Message{1, kName, 1, "org.example.0"}));
  EXPECT_EQ(TakeMessage(), (Message{1, kOpen, 1, ""}));
  // Nothing for the guest before it has opened its end.
  AddBuffer(4, 100);
  driver_->Kick(4);
  chardev_->RingbufWrite("hello guest");
  machine_.Settle();
  EXPECT_FALSE(driver_->ring(4).Take());
  Say(1, kOpen, 1);
  EXPECT_EQ(Take(4), "hello guest");
  Send(5, "hello host");
  EXPECT_EQ(chardev_->RingbufRead(100), "hello host");
}

TEST_F(VirtioConsoleTest, ConsoleIsPortZero) {
  ASSERT_NE(machine_.MakeAnother("virtconsole", {{"chardev", "c0"}}), nullptr) << machine_.error;
  Start();
  Say(0, kReady, 1);
  EXPECT_EQ(TakeMessage(), (Message{0, kAdd, 1, ""}));
  Say(0, kPortReady, 1);
  EXPECT_EQ(TakeMessage(), (Message{0, kConsolePort, 1, ""}));
  EXPECT_EQ(TakeMessage(), (Message{0, kOpen, 1, ""}));
  Say(99, kPortReady, 1);
  Say(0, 77, 1);
  EXPECT_FALSE(driver_->needs_reset());
}

TEST_F(VirtioConsoleTest, DriversWithoutMultiport) {
  ASSERT_NE(machine_.MakeAnother("virtconsole", {{"chardev", "c0"}}), nullptr) << machine_.error;
  Start(kEmergencyWrite);
  Send(1, "boot");
  AddBuffer(0, 3);
  AddBuffer(0, 100);
  driver_->Kick(0);
  chardev_->RingbufWrite("login");
  EXPECT_EQ(Take(0), "log");
  EXPECT_EQ(Take(0), "in");
  driver_->WriteConfig(8, 4, '!');
  machine_.Settle();
  EXPECT_EQ(chardev_->RingbufRead(100), "boot!");
}

TEST_F(VirtioConsoleTest, InputWaitsForBuffers) {
  ASSERT_NE(machine_.MakeAnother("virtconsole", {{"chardev", "c0"}}), nullptr);
  Start();
  Say(0, kReady, 1);
  Say(0, kOpen, 1);
  chardev_->RingbufWrite("later");
  machine_.Settle();
  AddBuffer(0, 64);
  driver_->Kick(0);
  EXPECT_EQ(Take(0), "later");
}

TEST_F(VirtioConsoleTest, PortsGoAway) {
  Start();
  Say(0, kReady, 1);
  ASSERT_NE(machine_.MakeAnother("virtserialport", {{"nr", "5"}}), nullptr) << machine_.error;
  EXPECT_EQ(TakeMessage(), (Message{5, kAdd, 1, ""}));
  machine_.RemoveLast();
  EXPECT_EQ(TakeMessage(), (Message{5, kRemove, 1, ""}));
}

TEST_F(VirtioConsoleTest, AMessageFloodEndsInAReset) {
  ASSERT_NE(machine_.MakeAnother("virtserialport", {{"name", "x"}}), nullptr);
  Start();
  for (int i = 0; i < 300 && !driver_->needs_reset(); ++i) {
    uint64_t gpa;
    const uint8_t kReadyMessage[] = {0, 0, 0, 0, 0, 0, 1, 0};
    std::memcpy(machine_.Allocate(8, &gpa), kReadyMessage, 8);
    driver_->ring(3).Add({{gpa, 8, false}});
    driver_->Kick(3);
    machine_.Settle();
    driver_->ring(3).Take();
  }
  EXPECT_TRUE(driver_->needs_reset());
}

TEST_F(VirtioConsoleTest, SavedAndLoaded) {
  ASSERT_NE(machine_.MakeAnother("virtserialport", {{"chardev", "c0"}, {"name", "n"}}), nullptr);
  Start();
  Say(0, kReady, 1);
  Say(1, kOpen, 1);
  EXPECT_EQ(TakeMessage(), (Message{1, kAdd, 1, ""}));
  Device* device = machine_.device();
  device->Quiesce();
  std::vector<uint8_t> saved = SaveState([&](StateVisitor& v) { device->VisitState(v); });
  device = machine_.Plug("virtio-serial-pci", {});
  ASSERT_NE(machine_.MakeAnother("virtserialport", {{"chardev", "c0"}, {"name", "n"}}), nullptr)
      << machine_.error;
  Result<> loaded = LoadState(saved, [&](StateVisitor& v) {
    LockGuard guard(device->lock());
    device->VisitState(v);
  });
  ASSERT_TRUE(loaded) << loaded.error().what;
  AddBuffer(4, 100);
  driver_->Kick(4);
  chardev_->RingbufWrite("still open");
  EXPECT_EQ(Take(4), "still open");
}

TEST_F(VirtioConsoleTest, WrongPortsAreRefused) {
  EXPECT_EQ(machine_.MakeAnother("virtserialport", {{"nr", "0"}}), nullptr);
  EXPECT_EQ(machine_.error, "nr=0: port 0 is reserved for a virtconsole");
  EXPECT_EQ(machine_.MakeAnother("virtserialport", {{"nr", "31"}}), nullptr);
  EXPECT_EQ(machine_.error, "nr=31: the bus has numbers up to 30");
  EXPECT_EQ(machine_.MakeAnother("virtserialport", {{"bus", "nix.0"}}), nullptr);
  EXPECT_EQ(machine_.error, "bus=nix.0: there is no such virtio-serial bus");
  EXPECT_NE(machine_.MakeAnother("virtserialport", {{"bus", "test0.0"}, {"nr", "3"}}), nullptr)
      << machine_.error;
  EXPECT_EQ(machine_.MakeAnother("virtserialport", {{"nr", "3"}}), nullptr);
  EXPECT_EQ(machine_.error, "nr=3: another port has this number");
  machine_.Unplug();
  EXPECT_EQ(machine_.Make("virtconsole", {}), nullptr);
  EXPECT_EQ(machine_.error, "virtconsole needs a bus: put -device virtio-serial-pci before it");
}

}  // namespace
}  // namespace kvartz::test
