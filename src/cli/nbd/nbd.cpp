// kvartz nbd (qemu-nbd): offers an image to NBD clients. Words and options are those of
// qemu-nbd 7.2, without those of the kernel's NBD devices.
#include <fcntl.h>
#include <fmt/core.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>

#include "base/print.h"
#include "block/nbd/address.h"
#include "block/nbd/client.h"
#include "block/nbd/server.h"
#include "block/sync_io.h"
#include "cli/img/img.h"
#include "cli/img/overlay.h"
#include "cli/nbd/background.h"
#include "cli/tool.h"

namespace kvartz::cli {
namespace {

using block::NodePtr;

// A client sends its next request soon after a reply, if it waits for each.
constexpr int64_t kPollingNs = 100'000;

constexpr OptionSpec kOptions[] = {
    {'h', "help", {}, "display this help and exit"},
    {'V', "version", {}, "output version information and exit"},
    {'v', "verbose", {}, "say what is going on"},
    {'p', "port", "PORT", "port to listen on (default 10809)"},
    {'b', "bind", "IFACE", "address to listen on (default 0.0.0.0)"},
    {'k', "socket", "PATH", "unix socket to listen on"},
    {'e', "shared", "NUM", "clients at once (default 1; 0: any number)"},
    {'t', "persistent", {}, "go on when the last client has gone"},
    {'x', "export-name", "NAME", "the export's name (default: empty)"},
    {'D', "description", "TEXT", "the export's description"},
    {'B', "bitmap", "NAME", "offer this dirty bitmap as metadata context"},
    {'A', "allocation-depth", {}, "offer the allocation depth as metadata context"},
    {0, "fork", {}, "go to the background when ready"},
    {0, "pid-file", "PATH", "write the process's number there"},
    {'o', "offset", "OFFSET", "the export begins there (format raw)"},
    {'f', "format", "FORMAT", "format of the image (else it is found out)"},
    {'r', "read-only", {}, "don't let clients write"},
    {'s', "snapshot", {}, "what clients write is kept until the end only"},
    {'l', "load-snapshot", "SNAPSHOT", "offer an internal snapshot, read-only"},
    {'n', "nocache", {}, "past the host's page cache"},
    {0, "cache", "MODE", "cache mode: writeback (default), none, writethrough, directsync, unsafe"},
    {0, "discard", "MODE", "ignore (default) or unmap"},
    {0, "image-opts", {}, "the image is a list of options"},
    {0, "untrusted", {}, "open no backing or data file that an image names"},
    {0, "object", "OBJECT",
     "secret,id=ID,file=FILE|data=TEXT[,format=base64][,keyid=ID,iv=TEXT], or "
     "tls-creds-x509,id=ID,dir=DIR"},
    {'c', "connect", "DEV", "not supported: kernel devices"},
    {'d', "disconnect", {}, "not supported: kernel devices"},
    {'L', "list", {}, "list what another server offers"},
    {0, "tls-creds", "ID", "TLS with the credentials of an --object tls-creds-x509 or -psk"},
    {0, "tls-hostname", "NAME", "with -L: the name in the server's certificate"},
    {0, "tls-authz", "ID", "not supported yet: whom to let in, by name"},
    {0, "aio", "MODE", "threads, native or io_uring: the best there is is taken"},
    {'T', "trace", "PATTERN", "not supported yet"},
    {0, "detect-zeroes", "MODE",
     "off (default), on or unmap: zeros that are written take no space"},
};

std::atomic<EventLoop*> g_loop = nullptr;

class NbdProgram {
 public:
  NbdProgram(const ToolCall& call, Arguments arguments)
      : call_(call), arguments_(std::move(arguments)) {}

  Result<int> Run() {
    TRY(CheckOptions());
    if (arguments_.Has("list")) return List();
    Background background;
    if (arguments_.Has("fork")) {
      if (!TRY(background.Fork())) return background.AwaitReady();
    }
    std::unique_ptr<EventLoop> loop = TRY(EventLoop::Create());
    loop->SetPolling(kPollingNs);
    img::Session session(call_.name, *loop);
    CatchSignals(*loop);
    if (arguments_.Has("untrusted")) session.Distrust();
    TRY(session.AddObjects(arguments_));
    tls_ = TRY(TakeTls(session, TlsSpec::Endpoint::kServer));
    auto exports = TRY(block::RunInFiber(*loop, [&] { return OpenExports(session); }));
    Result<> served = Serve(*loop, std::move(exports), background);
    Result<> closed = block::RunInFiber(*loop, [&] { return session.CloseAll(); });
    g_loop = nullptr;
    if (!socket_path_.empty()) unlink(socket_path_.c_str());
    TRY(std::move(served));
    TRY(std::move(closed));
    return 0;
  }

 private:
  Result<> CheckOptions() {
    for (const char* name : {"connect", "disconnect"}) {
      if (arguments_.Has(name))
        return Fail(
            ErrorCode::kUnsupported,
            fmt::format("--{}: kernel NBD devices are not supported; nbd-client connects them",
                        name));
    }
    for (const char* name : {"tls-authz", "trace"}) {
      if (arguments_.Has(name))
        return Fail(ErrorCode::kUnsupported, fmt::format("not supported yet: --{}", name));
    }
    TRY(block::CheckAio(arguments_.Get("aio", "io_uring")));
    if (arguments_.Has("tls-hostname") && !arguments_.Has("list"))
      return Fail(ErrorCode::kInvalid, "--tls-hostname goes with --list alone");
    TRY(CheckNames());
    if (arguments_.Has("socket") && (arguments_.Has("port") || arguments_.Has("bind")))
      return Fail(ErrorCode::kInvalid, "--socket can't go with --port or --bind");
    if (arguments_.Has("cache") && arguments_.Has("nocache"))
      return Fail(ErrorCode::kInvalid, "-n and --cache can only be specified once");
    return {};
  }

  // One image, or several of which each has its name (our addition).
  Result<> CheckNames() const {
    size_t images = arguments_.operands.size();
    if (arguments_.Has("list"))
      return images == 0 ? Result<>() : img::Misuse("List mode doesn't take a file name");
    if (images == 0) return img::Misuse("Expecting one image file name");
    if (images == 1) return {};
    if (arguments_.All("export-name").size() != images)
      return img::Misuse("Expecting one image file name, or as many -x NAME as there are images");
    for (const char* name : {"bitmap", "load-snapshot", "offset"}) {
      if (arguments_.Has(name))
        return Fail(ErrorCode::kInvalid, fmt::format("--{} goes with one image alone", name));
    }
    return {};
  }

  Result<NodePtr> OpenImage(img::Session& session, const std::string& file) {
    img::ImageName image = {file, arguments_.Get("format"), arguments_.Has("image-opts")};
    if (image.is_options && !image.format.empty())
      return Fail(ErrorCode::kInvalid, "--image-opts and -f are mutually exclusive");
    read_only_ = arguments_.Has("read-only") || arguments_.Has("load-snapshot");
    block::NodeOptions options = {.read_only = read_only_ || arguments_.Has("snapshot")};
    TRY(img::ApplyCache(arguments_.Get("cache", arguments_.Has("nocache") ? "none" : "writeback"),
                        options));
    std::string discard = arguments_.Get("discard", "ignore");
    if (discard != "ignore" && discard != "unmap" && discard != "off" && discard != "on")
      return Fail(ErrorCode::kInvalid, fmt::format("--discard={}: it is ignore or unmap", discard));
    options.discard_unmap = discard == "unmap" || discard == "on";
    auto detect = TRY(block::ParseDetectZeroes(arguments_.Get("detect-zeroes", "off")));
    if (detect == block::DetectZeroes::kUnmap && !options.discard_unmap)
      return Fail(ErrorCode::kInvalid, "--detect-zeroes=unmap needs --discard=unmap");
    if (auto offset = arguments_.Find("offset")) {
      if (image.format != "raw")
        return Fail(ErrorCode::kInvalid, "--offset goes with -f raw alone");
      uint64_t at = TRY(img::TakeSize(*offset, "offset"));
      image = {fmt::format("driver=raw,offset={},file.filename={}", at, EscapeCommas(image.name)),
               "", true};
    }
    NodePtr node = TRY(session.Open(image, options));
    if (auto snapshot = arguments_.Find("load-snapshot")) {
      if (!node->snapshots())
        return Fail(ErrorCode::kUnsupported,
                    fmt::format("format {} has no snapshots", node->driver()));
      TRY(node->snapshots()->ShowReadOnly(*snapshot));
    }
    if (arguments_.Has("snapshot")) node = TRY(img::TemporaryOverlay(session, std::move(node)));
    block::NodeOptions used = node->opened_with();
    used.detect_zeroes = detect;
    node->set_opened_with(used);
    return node;
  }

  static std::string EscapeCommas(const std::string& text) {
    std::string out;
    for (char c : text) out += c == ',' ? ",," : std::string(1, c);
    return out;
  }

  using Exports = std::vector<std::shared_ptr<block::nbd::Export>>;

  Result<Exports> OpenExports(img::Session& session) {
    Exports exports;
    std::vector<std::string> names = arguments_.All("export-name");
    std::vector<std::string> descriptions = arguments_.All("description");
    for (size_t i = 0; i < arguments_.operands.size(); i++) {
      auto offered = std::make_shared<block::nbd::Export>();
      offered->node = TRY(OpenImage(session, arguments_.operands[i]));
      if (i < names.size())
        offered->name = arguments_.operands.size() == 1 ? names.back() : names[i];
      if (i < descriptions.size()) offered->description = descriptions[i];
      for (const auto& other : exports) {
        if (other->name == offered->name)
          return Fail(ErrorCode::kExists,
                      fmt::format("two exports have the name '{}'", other->name));
      }
      offered->writable = !read_only_ && !offered->node->read_only();
      offered->allocation_depth = arguments_.Has("allocation-depth");
      TRY(OfferBitmaps(*offered));
      exports.push_back(std::move(offered));
    }
    return exports;
  }

  Result<> OfferBitmaps(block::nbd::Export& offered) const {
    for (const std::string& name : arguments_.All("bitmap")) {
      block::BitmapStore* store = offered.node->bitmaps();
      auto bitmap = store ? store->Find(name) : nullptr;
      if (!bitmap)
        return Fail(ErrorCode::kNotFound,
                    fmt::format("Bitmap '{}' is not found, or inconsistent", name));
      offered.bitmaps.push_back(std::move(bitmap));
    }
    return {};
  }

  // Null: no TLS.
  Result<std::shared_ptr<const TlsCredentials>> TakeTls(const img::Session& session,
                                                        TlsSpec::Endpoint endpoint) const {
    auto id = arguments_.Find("tls-creds");
    if (!id) return nullptr;
    auto found = TRY(session.FindTls(*id));
    if (found->endpoint() != endpoint)
      return Fail(ErrorCode::kInvalid,
                  fmt::format("--tls-creds={}: it must have endpoint={}", *id,
                              endpoint == TlsSpec::Endpoint::kServer ? "server" : "client"));
    return found;
  }

  block::nbd::Address WhereTo(const char* fallback_host) const {
    return {.path = arguments_.Get("socket"),
            .host = arguments_.Get("bind", fallback_host),
            .port = arguments_.Get("port", block::nbd::kDefaultPort)};
  }

  Result<UniqueFd> Listener() {
    block::nbd::Address address = WhereTo("0.0.0.0");
    socket_path_ = address.path;
    Result<UniqueFd> listener = block::nbd::Listen(address);
    if (!listener) socket_path_.clear();
    return listener;
  }

  Result<> WritePidFile() const {
    auto path = arguments_.Find("pid-file");
    if (!path) return {};
    UniqueFd fd(open(path->c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    std::string text = fmt::format("{}\n", getpid());
    if (!fd || write(fd.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size()))
      return Fail(ErrnoError(errno, fmt::format("cannot write pid file '{}'", *path)));
    return {};
  }

  Result<> Serve(EventLoop& loop, Exports exports, Background& background) {
    uint64_t shared = 1;
    if (auto text = arguments_.Find("shared"))
      shared = TRY(img::TakeCount(*text, "shared device number"));
    block::nbd::Server server(loop, TRY(Listener()), static_cast<unsigned>(shared));
    for (auto& one : exports) server.Add(std::move(one));
    if (tls_) server.RequireTls(tls_);
    bool persistent = arguments_.Has("persistent");
    server.on_client_gone = [&] {
      if (!persistent && server.clients() == 0) loop.Stop();
    };
    Result<> ready = WritePidFile();
    if (ready) {
      if (arguments_.Has("verbose"))
        Print(stderr, "{}: ready ({} bytes)\n", call_.name,
              server.exports()[0]->node->size_bytes());
      background.Ready();
      if (!stopped_early()) loop.Run();
    }
    block::RunInFiber(loop, [&] { server.Stop(); });
    return ready;
  }

  Result<int> List() {
    constexpr int64_t kPatienceNs = 30'000'000'000;
    std::unique_ptr<EventLoop> loop = TRY(EventLoop::Create());
    img::Session session(call_.name, *loop);
    TRY(session.AddObjects(arguments_));
    block::nbd::Address address = WhereTo("localhost");
    block::nbd::ClientTls tls = {TRY(TakeTls(session, TlsSpec::Endpoint::kClient)),
                                 arguments_.Get("tls-hostname", address.host)};
    using Offered = std::vector<block::nbd::OfferedExport>;
    auto ask = [&]() -> Result<Offered> {
      int64_t deadline_ns = loop->clock().NowNs() + kPatienceNs;
      block::nbd::Connector connector(*loop);
      UniqueFd socket = TRY(connector.Connect(address, deadline_ns));
      block::nbd::Client client(*loop, std::move(socket), std::move(tls));
      Timer deadline(*loop, [&] { client.Break(); });
      deadline.Arm(deadline_ns);
      return client.List();
    };
    Offered offered = TRY(block::RunInFiber(*loop, ask));
    Print("exports available: {}\n", offered.size());
    for (const auto& one : offered) Show(one);
    return 0;
  }

  static void Show(const block::nbd::OfferedExport& one) {
    constexpr const char* kFlagNames[] = {nullptr,      "readonly", "flush",  "fua",
                                          "rotational", "trim",     "zeroes", "df",
                                          "multi",      "resize",   "cache",  "fast-zero"};
    Print(" export: '{}'\n", one.name);
    if (!one.description.empty()) Print("  description: {}\n", one.description);
    if (one.flags & block::nbd::kHasFlags) {
      Print("  size:  {}\n  flags: {:#x} (", one.size, one.flags);
      for (size_t bit = 1; bit < std::size(kFlagNames); bit++) {
        if (one.flags >> bit & 1) Print(" {}", kFlagNames[bit]);
      }
      Print(" )\n");
    }
    if (one.min_block)
      Print("  min block: {}\n  opt block: {}\n  max block: {}\n", one.min_block,
            one.preferred_block, one.max_block);
    if (one.contexts.empty()) return;
    Print("  available meta contexts: {}\n", one.contexts.size());
    for (const std::string& context : one.contexts) Print("   {}\n", context);
  }

  static std::atomic<bool>& Stopped() {
    static std::atomic<bool> stopped = false;
    return stopped;
  }
  static bool stopped_early() { return Stopped(); }

  static void CatchSignals(EventLoop& loop) {
    g_loop = &loop;
    struct sigaction action = {};
    action.sa_handler = [](int) {
      Stopped() = true;
      if (EventLoop* running = g_loop) running->Stop();
    };
    for (int number : {SIGTERM, SIGINT, SIGHUP}) sigaction(number, &action, nullptr);
  }

  const ToolCall& call_;
  const Arguments arguments_;
  bool read_only_ = false;
  std::shared_ptr<const TlsCredentials> tls_;
  std::string socket_path_;
};

}  // namespace

int RunNbd(const ToolCall& call) {
  auto refuse = [&](const Error& error) {
    Print(stderr, "{}: {}\n", call.name, error.what);
    return 1;
  };
  Result<Arguments> arguments = ParseArguments(kOptions, call.words);
  if (!arguments) return refuse(img::Misuse(arguments.error().what).error());
  if (arguments->Has("help")) {
    Print("usage: {} [options] FILENAME...\nOffers a disk image to NBD clients.\n\n{}", call.name,
          OptionsHelp(kOptions));
    return 0;
  }
  if (arguments->Has("version")) {
    Print("{} 7.2.0 (Kvartz {})\n", call.name, kVersion);
    return 0;
  }
  Result<int> code = NbdProgram(call, std::move(*arguments)).Run();
  return code ? *code : refuse(code.error());
}

}  // namespace kvartz::cli
