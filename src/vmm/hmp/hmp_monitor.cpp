#include "vmm/hmp/hmp_monitor.h"

#include "base/fiber.h"
#include "vmm/command_line.h"
#include "vmm/vm.h"

namespace kvartz::vmm {
namespace {

constexpr uint8_t kCtrlC = 3, kCtrlU = 21, kBackspace = 8, kEsc = 27, kDelete = 127;

// The prompt that scripts wait for.
constexpr std::string_view kPrompt = "(qemu) ";

}  // namespace

void HmpMonitor::CharEventArrived(host::CharEvent event) {
  bool shared = port().chardev().config().mux;
  if (event != (shared ? host::CharEvent::kFocusIn : host::CharEvent::kOpened)) return;
  if (shared) Send("\r\n");
  Send("Kvartz monitor: 'help' lists the commands\r\n");
  Prompt();
}

void HmpMonitor::Prompt() {
  line_.clear();
  history_at_ = history_.size();
  Send(kPrompt);
}

void HmpMonitor::Receive(std::span<const uint8_t> data) {
  keys_.append(reinterpret_cast<const char*>(data.data()), data.size());
  // Input may also come while a job's fiber writes something out.
  if (!Fiber::Inside()) return HandleKeys();
  Fiber::Start([] {}, [this] { HandleKeys(); });
}

void HmpMonitor::HandleKeys() {
  if (std::exchange(handling_, true)) return;
  while (!busy_ && !keys_.empty()) {
    uint8_t key = static_cast<uint8_t>(keys_.front());
    keys_.erase(0, 1);
    Key(key);
  }
  handling_ = false;
}

void HmpMonitor::Key(uint8_t key) {
  if (escape_ != Escape::kNone) return EscapeKey(key);
  bool newline_of_return = last_was_return_ && key == '\n';
  last_was_return_ = key == '\r';
  if (newline_of_return) return;
  if (key == '\r' || key == '\n') {
    Enter();
  } else if (key == kEsc) {
    escape_ = Escape::kEsc;
  } else if (key == kBackspace || key == kDelete) {
    if (line_.empty()) return;
    line_.pop_back();
    Send("\b \b");
  } else if (key == kCtrlU || key == kCtrlC) {
    Replace("");
  } else if (key >= 0x20 && line_.size() < kLineMax) {
    line_.push_back(static_cast<char>(key));
    Send(std::string_view(&line_.back(), 1));
  }
}

void HmpMonitor::EscapeKey(uint8_t key) {
  bool csi = escape_ == Escape::kCsi;
  escape_ = !csi && key == '[' ? Escape::kCsi : Escape::kNone;
  if (!csi || history_.empty()) return;
  if (key == 'A' && history_at_ > 0) {
    Replace(history_[--history_at_]);
  } else if (key == 'B' && history_at_ < history_.size()) {
    ++history_at_;
    Replace(history_at_ < history_.size() ? history_[history_at_] : "");
  }
}

void HmpMonitor::Replace(const std::string& line) {
  std::string erase;
  for (size_t i = 0; i < line_.size(); ++i) erase += "\b \b";
  line_ = line;
  Send(erase + line_);
}

void HmpMonitor::Enter() {
  Send("\r\n");
  std::string line = line_;
  if (!line.empty() && (history_.empty() || history_.back() != line)) {
    history_.push_back(line);
    if (history_.size() > kHistoryMax) history_.erase(history_.begin());
  }
  busy_ = true;
  auto text = std::make_shared<std::string>();
  Fiber::Start([this, line, text] { *text = RunHmpCommand(context_, line); },
               [this, text] {
                 busy_ = false;
                 Print(*text);
                 HandleKeys();
                 if (!busy_) port().AcceptInput();
               });
}

void HmpMonitor::Print(const std::string& text) {
  std::string lines;
  for (char c : text) {
    if (c == '\n') lines += '\r';
    lines += c;
  }
  Send(lines);
  Prompt();
}

}  // namespace kvartz::vmm
