#include "host/chardev/chardev.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

namespace kvartz::host {
namespace {

// Takes everything, up to `room`.
struct Recorder : CharUser {
  size_t room = 4096;
  std::string received;
  std::string events;
  int writable = 0;

  size_t CanReceive() override { return room; }
  void Receive(std::span<const uint8_t> data) override {
    EXPECT_LE(data.size(), room);
    received.append(reinterpret_cast<const char*>(data.data()), data.size());
    if (room != 4096) room -= data.size();
  }
  void CharEventArrived(CharEvent event) override {
    events += "ocbif"[static_cast<int>(event)];  // opened, closed, break, focus in, focus out
  }
  void CharWritable() override { ++writable; }
};

class ChardevTest : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/kvartz-chardev-XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    dir_ = name;
    loop_ = std::move(EventLoop::Create()).value();
  }
  void TearDown() override { std::system(("rm -rf " + dir_).c_str()); }

  template <typename Condition>
  bool RunUntil(Condition condition) {
    for (int i = 0; i < 500 && !condition(); ++i) loop_->RunOnce(10'000'000);
    return condition();
  }
  std::unique_ptr<Chardev> Make(const ChardevConfig& config, std::function<void()> quit = {}) {
    auto made = Chardev::Create(config, *loop_, std::move(quit));
    EXPECT_TRUE(made) << made.error().what;
    return made ? std::move(*made) : nullptr;
  }
  ChardevConfig Server() {
    ChardevConfig config;
    config.id = "s";
    config.kind = ChardevConfig::Kind::kSocket;
    config.path = dir_ + "/s.sock";
    config.server = true;
    return config;
  }
  UniqueFd Client(const std::string& path) {
    UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::copy(path.begin(), path.end(), address.sun_path);
    EXPECT_EQ(connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    return fd;
  }
  std::string ReadAll(int fd) {
    std::string text;
    char buffer[65536];
    for (ssize_t count; (count = read(fd, buffer, sizeof(buffer))) > 0;)
      text.append(buffer, static_cast<size_t>(count));
    return text;
  }
  std::string FileText(const std::string& path) {
    std::ifstream file(path);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
  }

  std::string dir_;
  std::unique_ptr<EventLoop> loop_;
};

TEST_F(ChardevTest, RingbufKeepsTheNewestBytes) {
  ChardevConfig config;
  config.kind = ChardevConfig::Kind::kRingbuf;
  config.size = 8;
  auto chardev = Make(config);
  Recorder user;
  auto port = chardev->Connect(user).value();
  EXPECT_EQ(port->Write("0123456789"), 10u);
  EXPECT_EQ(chardev->RingbufRead(3), "234");
  EXPECT_EQ(chardev->RingbufRead(100), "56789");
  config.size = 1000;
  EXPECT_FALSE(Chardev::Create(config, *loop_));
}

TEST_F(ChardevTest, OnePortUnlessMultiplexed) {
  ChardevConfig config;
  config.id = "a";
  auto chardev = Make(config);
  Recorder user;
  auto port = chardev->Connect(user).value();
  auto second = chardev->Connect(user);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, ErrorCode::kBusy);
  port.reset();
  EXPECT_TRUE(chardev->Connect(user));
}

TEST_F(ChardevTest, FileTruncatesOrAppendsAndLogsACopy) {
  ChardevConfig config;
  config.kind = ChardevConfig::Kind::kFile;
  config.path = dir_ + "/out";
  config.logfile = dir_ + "/log";
  config.logappend = true;
  Recorder user;
  for (bool append : {false, false, true}) {
    config.append = append;
    auto chardev = Make(config);
    auto port = chardev->Connect(user).value();
    port->Write("line\n");
  }
  EXPECT_EQ(FileText(config.path), "line\nline\n");
  EXPECT_EQ(FileText(config.logfile), "line\nline\nline\n");
}

TEST_F(ChardevTest, FileInputIsReadToItsEnd) {
  ChardevConfig config;
  config.kind = ChardevConfig::Kind::kFile;
  config.path = "/dev/null";
  config.input_path = dir_ + "/in";
  std::ofstream(config.input_path) << std::string(10000, 'x') << "end";
  auto chardev = Make(config);
  Recorder user;
  auto port = chardev->Connect(user).value();
  EXPECT_TRUE(RunUntil([&] { return user.received.ends_with("end"); }));
  EXPECT_EQ(user.received.size(), 10003u);
}

TEST_F(ChardevTest, ServerServesOneClientAfterTheOther) {
  auto chardev = Make(Server());
  Recorder user;
  auto port = chardev->Connect(user).value();
  EXPECT_TRUE(chardev->description().starts_with("disconnected:unix:"));
  EXPECT_EQ(port->Write("dropped"), 7u);
  for (int round = 0; round < 2; ++round) {
    UniqueFd client = Client(chardev->config().path);
    ASSERT_TRUE(RunUntil([&] { return port->open(); }));
    EXPECT_EQ(port->Write("hello"), 5u);
    EXPECT_EQ(ReadAll(client.get()), "hello");
    ASSERT_EQ(write(client.get(), "ping", 4), 4);
    EXPECT_TRUE(RunUntil([&] { return user.received.ends_with("ping"); }));
    client.Reset();
    EXPECT_TRUE(RunUntil([&] { return !port->open(); }));
  }
  EXPECT_EQ(user.events, "ococ");
  EXPECT_EQ(user.received, "pingping");
}

TEST_F(ChardevTest, SlowReaderHoldsTheWriterBackWithoutLoss) {
  auto chardev = Make(Server());
  Recorder user;
  auto port = chardev->Connect(user).value();
  UniqueFd client = Client(chardev->config().path);
  ASSERT_TRUE(RunUntil([&] { return port->open(); }));
  std::string sent;
  for (int i = 0; sent.size() < 4'000'000; ++i) {
    std::string piece = std::to_string(i) + ",";
    size_t taken = port->Write(piece);
    sent += piece.substr(0, taken);
    if (taken < piece.size()) break;
  }
  ASSERT_LT(sent.size(), 4'000'000u);
  EXPECT_EQ(user.writable, 0);
  std::string received;
  EXPECT_TRUE(RunUntil([&] {
    received += ReadAll(client.get());
    return received.size() == sent.size();
  }));
  EXPECT_EQ(received, sent);
  EXPECT_EQ(user.writable, 1);
}

TEST_F(ChardevTest, UserWithoutRoomStopsTheInput) {
  auto chardev = Make(Server());
  Recorder user;
  user.room = 3;
  auto port = chardev->Connect(user).value();
  UniqueFd client = Client(chardev->config().path);
  ASSERT_EQ(write(client.get(), "abcdefgh", 8), 8);
  ASSERT_TRUE(RunUntil([&] { return user.received == "abc"; }));
  loop_->RunOnce(20'000'000);
  EXPECT_EQ(user.received, "abc");
  user.room = 4096;
  port->AcceptInput();
  EXPECT_TRUE(RunUntil([&] { return user.received == "abcdefgh"; }));
}

TEST_F(ChardevTest, SocketPathInUseIsRefusedAndAStaleOneReplaced) {
  auto first = Make(Server());
  auto second = Chardev::Create(Server(), *loop_);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, ErrorCode::kBusy);
  EXPECT_NE(second.error().what.find("in use"), std::string::npos);
  first.reset();
  struct stat info;
  EXPECT_NE(stat(Server().path.c_str(), &info), 0);
  {
    // A socket file without a listener, as a killed process leaves it.
    UniqueFd dead(socket(AF_UNIX, SOCK_STREAM, 0));
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::string path = Server().path;
    std::copy(path.begin(), path.end(), address.sun_path);
    ASSERT_EQ(bind(dead.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  EXPECT_TRUE(Chardev::Create(Server(), *loop_));
}

TEST_F(ChardevTest, ClientReconnects) {
  ChardevConfig config = Server();
  config.server = false;
  EXPECT_FALSE(Chardev::Create(config, *loop_));
  config.reconnect_s = 1;
  auto client = Make(config);
  Recorder user, peer;
  auto port = client->Connect(user).value();
  auto server = Make(Server());
  auto peer_port = server->Connect(peer).value();
  ASSERT_TRUE(RunUntil([&] { return port->open() && peer_port->open(); }));
  port->Write("over");
  EXPECT_TRUE(RunUntil([&] { return peer.received == "over"; }));
}

TEST_F(ChardevTest, TcpServerTakesAFreePortAndRefusesATakenOne) {
  ChardevConfig config;
  config.kind = ChardevConfig::Kind::kSocket;
  config.server = true;
  config.host = "127.0.0.1";
  UniqueFd taken(socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(bind(taken.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  ASSERT_EQ(listen(taken.get(), 1), 0);
  socklen_t size = sizeof(address);
  getsockname(taken.get(), reinterpret_cast<sockaddr*>(&address), &size);
  config.port = std::to_string(ntohs(address.sin_port));
  auto refused = Chardev::Create(config, *loop_);
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().what.find("tcp:127.0.0.1:" + config.port), std::string::npos);
  taken.Reset();
  EXPECT_TRUE(Chardev::Create(config, *loop_));
}

TEST_F(ChardevTest, MuxKeys) {
  ChardevConfig config = Server();
  config.mux = true;
  int quits = 0;
  auto chardev = Make(config, [&] { ++quits; });
  Recorder console, monitor;
  auto console_port = chardev->Connect(console).value();
  auto monitor_port = chardev->Connect(monitor).value();
  loop_->RunOnce(0);
  UniqueFd client = Client(config.path);
  auto type = [&](std::string_view keys) {
    ASSERT_EQ(write(client.get(), keys.data(), keys.size()), ssize_t(keys.size()));
  };
  type("a\x01\x01z");
  ASSERT_TRUE(RunUntil([&] { return console.received == "a\x01z"; }));
  type(
      "\x01"
      "cinfo");
  ASSERT_TRUE(RunUntil([&] { return monitor.received == "info"; }));
  type(
      "\x01"
      "c\x01"
      "b");
  ASSERT_TRUE(RunUntil([&] { return console.events.ends_with("b"); }));
  EXPECT_EQ(console.events, "iofib");
  EXPECT_EQ(monitor.events, "oif");
  type("\x01h");
  std::string shown;
  EXPECT_TRUE(RunUntil(
      [&] { return (shown += ReadAll(client.get())).find("C-a x") != std::string::npos; }));
  type("\x01x");
  EXPECT_TRUE(RunUntil([&] { return quits == 1; }));
}

TEST_F(ChardevTest, QuitKeyWorksWhileTheGuestReadsNothing) {
  ChardevConfig config = Server();
  config.mux = true;
  int quits = 0;
  auto chardev = Make(config, [&] { ++quits; });
  Recorder console;
  console.room = 0;
  auto port = chardev->Connect(console).value();
  UniqueFd client = Client(config.path);
  ASSERT_EQ(write(client.get(), "help!\x01x", 7), 7);
  EXPECT_TRUE(RunUntil([&] { return quits == 1; }));
}

TEST_F(ChardevTest, PtyOpensAndClosesWithTheOtherSide) {
  ChardevConfig config;
  config.id = "p";
  config.kind = ChardevConfig::Kind::kPty;
  testing::internal::CaptureStdout();
  auto chardev = Make(config);
  EXPECT_NE(testing::internal::GetCapturedStdout().find("(label p)"), std::string::npos);
  Recorder user;
  auto port = chardev->Connect(user).value();
  std::string path = chardev->description().substr(4);
  for (int round = 0; round < 2; ++round) {
    UniqueFd slave(open(path.c_str(), O_RDWR | O_NOCTTY | O_NONBLOCK));
    ASSERT_TRUE(slave);
    ASSERT_TRUE(RunUntil([&] { return port->open(); }));
    port->Write("out\n");
    pollfd wait{slave.get(), POLLIN, 0};
    ASSERT_EQ(poll(&wait, 1, 5000), 1);
    EXPECT_EQ(ReadAll(slave.get()), "out\n");
    ASSERT_EQ(write(slave.get(), "in", 2), 2);
    EXPECT_TRUE(RunUntil([&] { return user.received.ends_with("in"); }));
    slave.Reset();
    EXPECT_TRUE(RunUntil([&] { return !port->open(); }));
  }
  EXPECT_EQ(user.events, "ococ");
}

TEST_F(ChardevTest, TerminalIsRawWhileInUseAndRestoredByAFatalSignal) {
  int master = -1, slave = -1;
  ASSERT_EQ(openpty(&master, &slave, nullptr, nullptr, nullptr), 0);
  UniqueFd master_owner(master), slave_owner(slave);
  termios before;
  ASSERT_EQ(tcgetattr(slave, &before), 0);
  pid_t child = fork();
  if (child == 0) {
    dup2(slave, 0);
    dup2(slave, 1);
    signal(SIGABRT, SIG_DFL);
    auto loop = EventLoop::Create();
    ChardevConfig config;
    config.kind = ChardevConfig::Kind::kStdio;
    config.signal = false;
    auto chardev = Chardev::Create(config, **loop);
    termios raw;
    tcgetattr(0, &raw);
    if (!chardev || (raw.c_lflag & (ICANON | ECHO | ISIG))) _exit(3);
    if (Chardev::Create(config, **loop)) _exit(4);  // one terminal, one chardev
    abort();
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT) << status;
  termios after;
  ASSERT_EQ(tcgetattr(slave, &after), 0);
  EXPECT_EQ(after.c_lflag, before.c_lflag);
  EXPECT_EQ(after.c_iflag, before.c_iflag);
}

}  // namespace
}  // namespace kvartz::host
