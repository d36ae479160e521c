// Character devices: the host side of serial ports, monitors, virtio consoles. A chardev moves
// bytes between its users (ports) and one place on the host: the terminal, a file, a pty, a
// socket...
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/event_loop.h"
#include "base/fd.h"
#include "base/result.h"

namespace kvartz::host {

struct ChardevConfig {
  enum class Kind { kNull, kStdio, kFile, kPipe, kPty, kSocket, kRingbuf };

  std::string id;
  Kind kind = Kind::kNull;
  // Several users share the terminal; Ctrl-a commands switch between them (see Chardev).
  bool mux = false;
  std::string logfile;  // a copy of what is written goes there; empty: none
  bool logappend = false;

  std::string path;        // kFile, kPipe (also tries path.in and path.out), kSocket on AF_UNIX
  bool append = false;     // kFile: keep what is there
  std::string input_path;  // kFile: what the guest reads; empty: nothing
  bool signal = true;      // kStdio: Ctrl-C and friends stay with the terminal
  size_t size = 65536;     // kRingbuf: bytes kept, a power of two

  // kSocket: TCP if `host` or `port` is set, else the unix socket at `path`.
  std::string host;
  std::string port;
  bool server = false;
  bool wait = false;    // server: creation returns when the first client has come
  bool telnet = false;  // answer telnet's option negotiation
  unsigned reconnect_s =
      0;  // client: tries again this long after the connection was lost or refused
};

enum class CharEvent {
  kOpened,    // somebody is at the other end
  kClosed,    // gone; what is written is dropped
  kBreak,     // a line break
  kFocusIn,   // mux: this port has the terminal now
  kFocusOut,  // mux: another port has it
};

// Who uses a chardev. Called on the loop's thread, never from within Connect or Write.
class CharUser {
 public:
  virtual ~CharUser() = default;
  // How many bytes Receive may bring now. After 0, the user calls AcceptInput when it has room
  // again.
  virtual size_t CanReceive() = 0;
  virtual void Receive(std::span<const uint8_t> data) = 0;
  virtual void CharEventArrived(CharEvent /*event*/) {}
  // There is room again after Write took less than it was given.
  virtual void CharWritable() {}
};

class CharBackend;

// Loop-owned. One port, or up to 8 with mux. Within a mux the input goes to the port with the
// focus; Ctrl-a and then x: quit, c: next port, b: break, h or ?: help, Ctrl-a: a literal Ctrl-a.
class Chardev final {
 public:
  // A user's end. Destroy it to disconnect; not later than the chardev. Loop-owned.
  class Port {
   public:
    ~Port();
    Port(const Port&) = delete;
    Port& operator=(const Port&) = delete;

    // Takes as much of `data` as there is room for and returns how much; writes it in order as the
    // host permits. Takes (and drops) everything while nobody is at the other end.
    size_t Write(std::span<const uint8_t> data);
    size_t Write(std::string_view text);
    // CanReceive may say more than before.
    void AcceptInput();
    bool open() const;
    // Ends the present connection (socket servers go on listening).
    void Disconnect();
    Chardev& chardev() const { return chardev_; }

   private:
    friend class Chardev;
    Port(Chardev& chardev, CharUser& user) : chardev_(chardev), user_(user) {}
    Chardev& chardev_;
    CharUser& user_;
    bool wants_writable_ = false;
    bool told_open_ = false;
  };

  // `quit`: Ctrl-a x. Errors: the host refuses (path, address and reason), the port or path is
  // taken, stdio is in use by another chardev.
  static Result<std::unique_ptr<Chardev>> Create(const ChardevConfig& config, EventLoop& loop,
                                                 std::function<void()> quit = {});
  ~Chardev();

  // Errors: kBusy, all ports are taken.
  Result<std::unique_ptr<Port>> Connect(CharUser& user);

  const ChardevConfig& config() const { return config_; }
  const std::string& id() const { return config_.id; }
  // As query-chardev shows it: "pty:/dev/pts/3", "disconnected:unix:/run/m.sock,server=on".
  std::string description() const;
  bool open() const { return open_; }
  // Writes out what is queued, for at most `timeout_ms`; for the end of the process.
  void Drain(int timeout_ms);
  // kRingbuf: the oldest `max_bytes` that were written and not yet read; what a reader writes
  // reaches the ports.
  std::string RingbufRead(size_t max_bytes);
  void RingbufWrite(std::string_view data);

  // For backends: input, room, connection changes. Return how much input the users take now.
  size_t InputRoom() const;
  void Input(std::span<const uint8_t> data);
  void Writable();
  void SetOpen(bool open);
  void Break();

 private:
  Chardev(const ChardevConfig& config, EventLoop& loop, std::function<void()> quit);
  size_t Write(Port& port, std::span<const uint8_t> data);
  void WriteOut(std::span<const uint8_t> data);
  void Flush();
  void Pump();
  void MuxCommand(uint8_t key);
  void FocusNext();
  void Say(std::string_view text);
  void Announce(Port& port);

  const ChardevConfig config_;
  EventLoop& loop_;
  std::function<void()> quit_;
  std::unique_ptr<CharBackend> backend_;
  std::vector<Port*> ports_;
  size_t focus_ = 0;
  bool escape_seen_ = false;
  bool open_ = false;
  bool pumping_ = false;
  std::string in_;        // arrived, not yet taken by the user with the focus
  std::string out_;       // accepted, not yet taken by the backend
  size_t out_begin_ = 0;  // where it starts
  UniqueFd log_fd_;
  // Outlives the chardev in tasks that were posted to the loop.
  std::shared_ptr<Chardev*> self_;
};

}  // namespace kvartz::host
