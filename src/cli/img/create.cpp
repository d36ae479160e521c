// img create.
#include <fmt/core.h>

#include <algorithm>

#include "cli/img/img.h"

namespace kvartz::cli::img {
namespace {

using block::Driver;
using block::OptionRow;
using block::Options;

constexpr std::string_view kGeneral[] = {"size", "backing_file", "backing_fmt"};

bool Contains(std::span<const std::string_view> names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

bool AllKnown(const Driver& driver, const Options& options) {
  return std::all_of(options.all().begin(), options.all().end(), [&](const auto& option) {
    auto named = [&](const OptionRow& row) { return row.name == option.first; };
    return Contains(kGeneral, option.first) ||
           std::any_of(driver.create_options.begin(), driver.create_options.end(), named) ||
           std::ranges::any_of(block::FileCreateOptions(), named);
  });
}

// A value as it is understood: sizes in bytes, flags as on and off.
std::string Canonical(const OptionRow& row, const std::string& text) {
  if (row.type == OptionRow::Type::kSize) {
    Result<uint64_t> size = block::ParseSize(text);
    if (size) return std::to_string(*size);
  } else if (row.type == OptionRow::Type::kBool) {
    Result<bool> flag = block::ParseBool(text);
    if (flag) return *flag ? "on" : "off";
  }
  return text;
}

// "Formatting 'a.qcow2', fmt=qcow2 cluster_size=65536 ... size=1073741824": options as given or by
// default. Some of qcow2's come before the size, those of files at the end.
std::string Announcement(const Driver& driver, const std::string& filename,
                         const Options& options) {
  std::vector<std::string_view> first;
  if (driver.name == std::string_view("qcow2")) {
    for (const OptionRow& row : driver.create_options) {
      if (row.name.starts_with("encrypt")) first.push_back(row.name);
    }
    first.insert(first.end(), {"cluster_size", "extended_l2", "preallocation", "compression_type"});
  }
  // Their defaults go without saying.
  constexpr std::string_view kSilent[] = {"compat", "preallocation"};
  std::string before, after, size;
  auto text_of = [&](std::string_view name) -> const std::string* {
    auto it = options.all().find(std::string(name));
    return it == options.all().end() ? nullptr : &it->second.text;
  };
  auto add = [&](std::string& to, std::string_view name, std::string_view text) {
    to += fmt::format(" {}={}", name, text);
  };
  auto add_row = [&](std::string& to, const OptionRow& row) {
    if (const std::string* given = text_of(row.name)) {
      add(to, row.name, Canonical(row, *given));
    } else if (!row.fallback.empty() && !Contains(kSilent, row.name)) {
      add(to, row.name, Canonical(row, std::string(row.fallback)));
    }
  };
  for (std::string_view name : first) {
    for (const OptionRow& row : driver.create_options) {
      if (row.name == name) add_row(before, row);
    }
  }
  for (const OptionRow& row : driver.create_options) {
    if (!Contains(first, row.name) && !Contains(kGeneral, row.name)) add_row(after, row);
  }
  for (const OptionRow& row : block::FileCreateOptions()) add_row(after, row);
  for (std::string_view name : kGeneral) {
    if (const std::string* given = text_of(name)) add(size, name, *given);
  }
  return fmt::format("Formatting '{}', fmt={}{}{}{}", filename, driver.name, before, size, after);
}

Result<> Create(Session& session, const Driver& driver, const std::string& filename,
                const Arguments& arguments, Options options) {
  if (std::optional<std::string> backing = arguments.Find("b"))
    options.Set("backing_file", *backing);
  if (std::optional<std::string> format = arguments.Find("F")) options.Set("backing_fmt", *format);
  if (arguments.operands.size() == 2)
    options.Set("size", std::to_string(TRY(TakeSize(arguments.operands[1], "image size"))));
  if (options.Has("size")) {
    const std::string text = options.all().at("size").text;
    options.Set("size", std::to_string(TRY(TakeSize(text, "image size"))));
  }
  if (options.Has("backing_file")) {
    if (!driver.has_backing) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("Backing file not supported for file format '{}'", driver.name));
    }
    if (options.all().at("backing_file").text == filename)
      return Fail(ErrorCode::kInvalid,
                  "Trying to create an image with the same filename as the backing file");
    if (!arguments.Has("u")) {
      block::NodePtr backing = TRY(OpenBacking(session, filename, options));
      TRY(session.Close(backing));
    } else if (!options.Has("backing_fmt")) {
      return Fail(ErrorCode::kInvalid, "Backing file specified without backing format");
    } else {
      TRY(block::RequireDriver(options.all().at("backing_fmt").text, filename));
    }
  }
  if (!options.Has("size"))
    return Fail(ErrorCode::kInvalid, "Image creation needs a size parameter");
  // What is unknown is refused below.
  if (AllKnown(driver, options)) session.Say("{}\n", Announcement(driver, filename, options));
  return block::CreateImage(session.env(), std::string(driver.name), filename, std::move(options));
}

Result<int> Run(Session& session, const Arguments& arguments) {
  std::string format = arguments.Get("f", "raw");
  CreateOptions given = TRY(TakeCreateOptions(arguments));
  const Driver* driver =
      TRY(block::RequireDriver(format, arguments.operands.empty() ? "" : arguments.operands[0]));
  if (given.help) {
    PrintCreateHelp(*driver, arguments.operands.empty() ? HelpOf::kCreate : HelpOf::kCreateFile);
    return 0;
  }
  if (!driver->create)
    return Fail(ErrorCode::kUnsupported,
                fmt::format("Format driver '{}' does not support image creation", format));
  if (arguments.operands.empty() || arguments.operands.size() > 2)
    return Misuse("Expecting image file name");
  const std::string& filename = arguments.operands[0];
  Result<> created = Create(session, *driver, filename, arguments, std::move(given.options));
  if (!created) return Fail(std::move(created).error().In(filename));
  return 0;
}

constexpr OptionSpec kOptions[] = {
    kObject,
    kQuiet,
    {'f', {}, "FMT", "format of the new image (default raw)"},
    {'b', {}, "BACKING_FILE", "it shows this image where it has nothing itself"},
    {'F', {}, "BACKING_FMT", "format of BACKING_FILE"},
    {'u', {}, {}, "don't look at BACKING_FILE"},
    {'o', {}, "OPTIONS", "options of the format; 'help' lists them"},
};

}  // namespace

Result<block::NodePtr> OpenBacking(Session& session, const std::string& filename,
                                   Options& options) {
  const std::string backing = options.all().at("backing_file").text;
  std::string format;
  if (options.Has("backing_fmt")) format = options.all().at("backing_fmt").text;
  std::string path = block::ResolveRelative(filename, backing);
  Result<block::NodePtr> node = session.Open({.name = path, .format = format}, {.read_only = true});
  if (!node) return Fail(std::move(node).error().In("Could not open backing image"));
  if (format.empty()) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("Backing file specified without backing format; say -F {}", (*node)->driver()));
  }
  if (!options.Has("size")) options.Set("size", std::to_string((*node)->size_bytes()));
  return node;
}

const Verb kCreate = {"create", "FILENAME [SIZE]", "makes an image", kOptions, Run};

}  // namespace kvartz::cli::img
