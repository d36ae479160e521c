// The table of verbs, and the program around it.
#include <fmt/core.h>

#include <boost/json.hpp>

#include "base/print.h"
#include "base/text.h"
#include "block/driver.h"
#include "block/sync_io.h"
#include "cli/img/img.h"

namespace kvartz::cli::img {
namespace {

#define KVARTZ_LIST_VERB(name) k##name,
const Verb kVerbs[] = {KVARTZ_IMG_VERBS(KVARTZ_LIST_VERB)};
#undef KVARTZ_LIST_VERB

constexpr OptionSpec kStandard[] = {
    {'h', "help", {}, "display this help and exit"},
    {'V', "version", {}, "output version information and exit"},
    {0, "json", {}, "errors as JSON objects, one a line"},
    {0, "untrusted", {}, "open no backing or data file that an image names"},
    {'T', "trace", "PATTERN", "not supported yet"},
};
constexpr OptionSpec kHelp = {'h', "help", {}, "display this help and exit"};

std::string Synopsis(const Verb& verb) {
  std::string text(verb.name);
  for (const OptionSpec& spec : verb.options) text += fmt::format(" [{}]", OptionText(spec));
  return fmt::format("{} {}", text, verb.operands);
}

std::string Help(const std::string& program) {
  std::string text = fmt::format(
      "usage: {} [standard options] command [command options]\nKvartz disk image utility\n\n{}\n"
      "Command syntax:\n",
      program, OptionsHelp(kStandard));
  for (const Verb& verb : kVerbs) text += fmt::format("  {}\n", Synopsis(verb));
  text += "\nSupported formats:";
  for (const block::Driver* driver : block::AllDrivers()) text += fmt::format(" {}", driver->name);
  return text + fmt::format("\n\n'{} COMMAND --help' says more of one command.\n", program);
}

std::string VerbHelp(const std::string& program, const Verb& verb) {
  return fmt::format("usage: {} {} [options] {}\n{}\n\n{}", program, verb.name, verb.operands,
                     verb.help, OptionsHelp(verb.options));
}

class Program {
 public:
  explicit Program(const ToolCall& call) : call_(call) {}

  int Run() {
    Result<Arguments> standard = ParseArguments(kStandard, call_.words, Operands::kEndOptions);
    if (!standard) return Refuse(standard.error(), 1);
    json_ = standard->Has("json");
    untrusted_ = standard->Has("untrusted");
    if (standard->Has("version")) {
      Print("{} version 7.2.0 (Kvartz {})\n", call_.name, kVersion);
      return 0;
    }
    if (standard->Has("help") || (!standard->operands.empty() && standard->operands[0] == "help")) {
      Print("{}", Help(call_.name));
      return 0;
    }
    if (standard->Has("trace"))
      return Refuse({ErrorCode::kUnsupported, "not supported yet: --trace"}, 1);
    if (standard->operands.empty()) return Refuse(Misuse("Not enough arguments").error(), 1);
    return RunVerb(standard->operands[0], std::span(standard->operands).subspan(1));
  }

 private:
  int RunVerb(const std::string& name, std::span<const std::string> words) {
    std::vector<std::string_view> names;
    for (const Verb& verb : kVerbs) {
      if (verb.name == name) return RunVerb(verb, words);
      names.push_back(verb.name);
    }
    std::string_view nearest = NearestName(name, names);
    return Refuse(
        Misuse(fmt::format("Command not found: {}{}", name,
                           nearest.empty() ? "" : fmt::format("; did you mean '{}'?", nearest)))
            .error(),
        1);
  }

  int RunVerb(const Verb& verb, std::span<const std::string> words) {
    std::vector<OptionSpec> specs(verb.options.begin(), verb.options.end());
    specs.push_back(kHelp);
    Result<Arguments> arguments = ParseArguments(specs, words);
    if (!arguments) return Refuse(Misuse(arguments.error().what).error(), 1);
    if (arguments->Has("help")) {
      Print("{}", VerbHelp(call_.name, verb));
      return 0;
    }
    ListenForProgressSignal();
    Result<std::unique_ptr<EventLoop>> loop = EventLoop::Create();
    if (!loop) return Refuse(loop.error(), verb.error_code);
    Session session(call_.name, **loop);
    session.quiet = arguments->Has("q");
    if (untrusted_) session.Distrust();
    Result<int> code = block::RunInFiber(**loop, [&]() -> Result<int> {
      TRY(session.AddObjects(*arguments));
      Result<int> done = verb.run(session, *arguments);
      Result<> closed = session.CloseAll();
      if (done && !closed) return std::unexpected(closed.error());
      return done;
    });
    fflush(stdout);
    return code ? *code : Refuse(code.error(), verb.error_code);
  }

  int Refuse(const Error& error, int code) const {
    fflush(stdout);
    if (json_) {
      constexpr const char* kNames[] = {"invalid",     "not-found", "exists", "permission", "busy",
                                        "unsupported", "no-space",  "io",     "state"};
      boost::json::object object = {{"error", error.what},
                                    {"class", kNames[static_cast<int>(error.code)]},
                                    {"exit-code", code}};
      Print(stderr, "{}\n", boost::json::serialize(object));
    } else {
      Print(stderr, "{}: {}\n", call_.name, error.what);
    }
    return code;
  }

  const ToolCall& call_;
  bool json_ = false, untrusted_ = false;
};

}  // namespace

std::span<const Verb> Verbs() { return kVerbs; }

}  // namespace kvartz::cli::img

namespace kvartz::cli {
int RunImg(const ToolCall& call) { return img::Program(call).Run(); }
}  // namespace kvartz::cli
