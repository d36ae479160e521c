// kvartz img (qemu-img): verbs as rows, and what they have in common. Words, options, output and
// exit codes are those of qemu-img 7.2.
#pragma once

#include <fmt/format.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/print.h"
#include "block/crypto/secret.h"
#include "block/graph.h"
#include "block/jobs/job.h"
#include "block/tls_object.h"
#include "cli/arguments.h"
#include "cli/tool.h"

namespace kvartz::cli::img {

// Rows that several verbs share.
constexpr OptionSpec kObject = {
    0, "object", "OBJECT",
    "secret,id=ID,file=FILE|data=TEXT[,format=base64][,keyid=ID,iv=TEXT], or "
    "tls-creds-x509,id=ID,dir=DIR"};
constexpr OptionSpec kImageOpts = {
    0, "image-opts", {}, "FILENAME is a list of options: driver=qcow2,file.filename=..."};
constexpr OptionSpec kFormat = {'f', "format", "FMT", "format of the image (else it is found out)"};
constexpr OptionSpec kForceShare = {
    'U', "force-share", {}, "open the image although others write to it"};
constexpr OptionSpec kQuiet = {'q', {}, {}, "print nothing but errors"};
constexpr OptionSpec kProgress = {'p', {}, {}, "show progress"};
constexpr OptionSpec kOutput = {0, "output", "OFMT", "human (default) or json"};
constexpr OptionSpec kCache = {
    't', {}, "CACHE", "cache mode: writeback (default), none, writethrough, directsync, unsafe"};
constexpr OptionSpec kSourceCache = {'T', {}, "CACHE", "cache mode of what is read"};

// An image as the command line names it.
struct ImageName {
  std::string name = {};
  std::string format = {};
  bool is_options = false;                       // --image-opts
  std::map<std::string, std::string> keys = {};  // more options; not with is_options
};

// One call. Loop-owned; everything in a fiber.
class Session {
 public:
  Session(std::string program, EventLoop& loop);

  const std::string& program() const { return program_; }
  EventLoop& loop() const { return loop_; }
  const block::OpenEnv& env() const { return env_; }
  bool quiet = false;

  template <typename... Args>
  void Say(fmt::format_string<Args...> format, Args&&... args) const {
    if (!quiet) Print(format, std::forward<Args>(args)...);
  }
  // One line to standard error, with the program's name.
  void Complain(const std::string& text) const;

  // Images are hostile: no file is opened that only they name.
  void Distrust() { env_.follow_backing = env_.follow_data_file = false; }
  // --object arguments.
  Result<> AddObjects(const Arguments& arguments);
  Result<std::shared_ptr<const TlsCredentials>> FindTls(const std::string& id) const;
  Result<block::NodePtr> Open(const ImageName& image, const block::NodeOptions& node);
  Result<block::NodePtr> OpenOptions(block::Options options, const block::NodeOptions& node);
  // Writes what is still in memory. What isn't closed so is at the end, by CloseAll.
  Result<> Close(const block::NodePtr& node);
  Result<> CloseAll();

 private:
  Result<> AddTls(const std::string& type, block::Options options);

  const std::string program_;
  EventLoop& loop_;
  std::map<std::string, std::shared_ptr<const TlsCredentials>> tls_;
  block::SecretStore secrets_;
  block::OpenEnv env_;
  std::vector<block::NodePtr> open_;
};

struct Verb {
  std::string_view name;
  std::string_view operands;
  std::string_view help;
  std::span<const OptionSpec> options;
  Result<int> (*run)(Session& session, const Arguments& arguments);
  int error_code = 1;  // exit code when `run` fails
};
std::span<const Verb> Verbs();

// A mistake in the command line.
std::unexpected<Error> Misuse(std::string_view what);
// Exactly one operand: the image. With -f and --image-opts.
Result<ImageName> TakeImage(const Arguments& arguments);
enum class Output : uint8_t { kHuman, kJson };
Result<Output> TakeOutput(const Arguments& arguments);
// Cache mode by name, into `node`.
Result<> ApplyCache(const std::string& name, block::NodeOptions& node);
// Sizes as people write them. `what` names it in the error.
Result<uint64_t> TakeSize(const std::string& text, const std::string& what);
Result<uint64_t> TakeCount(const std::string& text, const std::string& what);
// All -o lists, joined. "-o help": true.
struct CreateOptions {
  block::Options options = {};
  bool help = false;
};
Result<CreateOptions> TakeCreateOptions(const Arguments& arguments);
// The backing file that an image to be made, `filename`, is to have: it must be there, its format
// be said; "size" becomes its size if it isn't set.
Result<block::NodePtr> OpenBacking(Session& session, const std::string& filename,
                                   block::Options& options);
// kCreateFile: of a file that is named, with what is an option of files.
enum class HelpOf : uint8_t { kCreate, kCreateFile, kAmend };
void PrintCreateHelp(const block::Driver& driver, HelpOf of);

// -p, and SIGUSR1, which asks for one line to standard error.
class Progress {
 public:
  enum class Show : uint8_t { kNo, kYes };
  explicit Progress(Show show, double step_percent = 1);
  ~Progress();
  void Update(uint64_t done, uint64_t total);
  void Watch(block::Job& job);

 private:
  const bool show_;
  const double step_percent_;
  bool finished_ = false;
  int64_t started_ns_;
  double last_ = -100;
};
void ListenForProgressSignal();  // before that, SIGUSR1 ends the process
Progress::Show ShowProgress(const Arguments& arguments);

#define KVARTZ_IMG_VERBS(X) \
  X(Amend)                  \
  X(Bench)                  \
  X(Bitmap)                 \
  X(Check)                  \
  X(Commit)                 \
  X(Compare)                \
  X(Convert) X(Create) X(Dd) X(Info) X(Map) X(Measure) X(Snapshot) X(Rebase) X(Resize) X(Verify)
#define KVARTZ_DECLARE_VERB(name) extern const Verb k##name;
KVARTZ_IMG_VERBS(KVARTZ_DECLARE_VERB)
#undef KVARTZ_DECLARE_VERB

}  // namespace kvartz::cli::img
