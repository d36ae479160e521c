#include <fmt/core.h>

#include <algorithm>

#include "base/print.h"
#include "cli/img/img.h"

namespace kvartz::cli::img {
Session::Session(std::string program, EventLoop& loop)
    : program_(std::move(program)), loop_(loop), env_{.loop = loop} {
  env_.tls = [this](const std::string& id) { return FindTls(id); };
  env_.secret = [this](const std::string& id) { return secrets_.Find(id); };
}

void Session::Complain(const std::string& text) const {
  fflush(stdout);
  Print(stderr, "{}: {}\n", program_, text);
}

Result<> Session::AddObjects(const Arguments& arguments) {
  for (const std::string& text : arguments.All("object")) {
    block::Options options;
    std::string type;
    if (text.starts_with('{')) {
      options = TRY(block::Options::ParseJson(text));
      type = options.Take("qom-type", "");
    } else {
      type = text.substr(0, text.find(','));
      if (type.starts_with("qom-type=")) type.erase(0, 9);
      size_t comma = text.find(',');
      options =
          TRY(block::Options::Parse(comma == std::string::npos ? "" : text.substr(comma + 1)));
    }
    if (block::IsTlsObject(type)) {
      TRY(AddTls(type, std::move(options)));
      continue;
    }
    if (type != "secret") {
      return Fail(ErrorCode::kUnsupported,
                  fmt::format("--object {}: not supported yet; there are: secret, tls-creds-x509, "
                              "tls-creds-psk",
                              type));
    }
    Result<> added = secrets_.Add(std::move(options));
    if (!added) return Fail(std::move(added).error().In("--object"));
  }
  return {};
}

Result<> Session::AddTls(const std::string& type, block::Options options) {
  std::string id = options.Take("id", "");
  if (id.empty())
    return Fail(ErrorCode::kInvalid, fmt::format("--object {}: id= is missing", type));
  auto made = block::MakeTlsObject(type, std::move(options), env_.secret);
  if (!made) return Fail(std::move(made).error().In(fmt::format("--object {},id={}", type, id)));
  if (!tls_.emplace(id, std::move(*made)).second)
    return Fail(ErrorCode::kExists, fmt::format("--object {}: there are two with id={}", type, id));
  return {};
}

Result<std::shared_ptr<const TlsCredentials>> Session::FindTls(const std::string& id) const {
  auto it = tls_.find(id);
  if (it != tls_.end()) return it->second;
  return Fail(ErrorCode::kNotFound,
              fmt::format("there are no TLS credentials '{0}': give them with --object "
                          "tls-creds-x509,id={0},dir=...",
                          id));
}

Result<block::NodePtr> Session::Open(const ImageName& image, const block::NodeOptions& node) {
  block::NodePtr opened;
  if (image.is_options) {
    block::Options options = TRY(block::Options::Parse(image.name));
    opened = TRY(block::OpenNode(env_, std::move(options), node));
  } else {
    block::Options options;
    for (const auto& [key, value] : image.keys) options.Set(key, value);
    options.Set("filename", image.name);
    if (!image.format.empty()) options.Set("driver", image.format);
    opened = TRY(block::OpenNode(env_, std::move(options), node));
  }
  open_.push_back(opened);
  return opened;
}

Result<block::NodePtr> Session::OpenOptions(block::Options options,
                                            const block::NodeOptions& node) {
  open_.push_back(TRY(block::OpenNode(env_, std::move(options), node)));
  return open_.back();
}

Result<> Session::Close(const block::NodePtr& node) {
  std::erase(open_, node);
  return node->Close();
}

Result<> Session::CloseAll() {
  Result<> result;
  while (!open_.empty()) {
    block::NodePtr node = std::move(open_.back());
    open_.pop_back();
    Result<> closed = node->Close();
    if (result) result = std::move(closed);
  }
  return result;
}

std::unexpected<Error> Misuse(std::string_view what) {
  return Fail(ErrorCode::kInvalid, fmt::format("{} (--help says more)", what));
}

Result<ImageName> TakeImage(const Arguments& arguments) {
  if (arguments.operands.size() != 1) return Misuse("Expecting one image file name");
  ImageName image = {arguments.operands[0], arguments.Get("format"), arguments.Has("image-opts")};
  if (image.is_options && !image.format.empty())
    return Fail(ErrorCode::kInvalid, "--image-opts and --format are mutually exclusive");
  return image;
}

Result<Output> TakeOutput(const Arguments& arguments) {
  std::string name = arguments.Get("output", "human");
  if (name == "human") return Output::kHuman;
  if (name == "json") return Output::kJson;
  return Fail(ErrorCode::kInvalid, "--output must be used with human or json as argument");
}

Result<> ApplyCache(const std::string& name, block::NodeOptions& node) {
  using block::CacheMode;
  CacheMode mode = TRY(block::ParseCacheMode(name));
  node.cache_direct = mode == CacheMode::kNone || mode == CacheMode::kDirectSync;
  node.cache_no_flush = mode == CacheMode::kUnsafe;
  node.writethrough = mode == CacheMode::kWritethrough || mode == CacheMode::kDirectSync;
  return {};
}

Result<uint64_t> TakeSize(const std::string& text, const std::string& what) {
  Result<uint64_t> size = block::ParseSize(text);
  if (!size) return Fail(std::move(size).error().In("Invalid " + what + " specified"));
  if (*size > uint64_t{INT64_MAX})
    return Fail(ErrorCode::kInvalid,
                fmt::format("Invalid {} specified: it must be less than 8 EiB", what));
  return *size;
}

Result<uint64_t> TakeCount(const std::string& text, const std::string& what) {
  Result<uint64_t> count = block::ParseNumber(text);
  if (!count || *count > uint64_t{INT64_MAX})
    return Fail(ErrorCode::kInvalid, fmt::format("Invalid {} specified: '{}'", what, text));
  return *count;
}

Result<CreateOptions> TakeCreateOptions(const Arguments& arguments) {
  CreateOptions result;
  for (const std::string& text : arguments.All("o")) {
    if (text == "help" || text == "?") {
      result.help = true;
      continue;
    }
    block::Options one = TRY(block::Options::Parse(text));
    for (const auto& [key, value] : one.all()) {
      if (key == "help") {
        result.help = true;
      } else {
        result.options.Set(key, value.text);
      }
    }
  }
  return result;
}

void PrintCreateHelp(const block::Driver& driver, HelpOf of) {
  using Type = block::OptionRow::Type;
  std::vector<block::OptionRow> rows(driver.create_options.begin(), driver.create_options.end());
  if (of == HelpOf::kAmend) std::erase_if(rows, [](const auto& row) { return !row.amendable; });
  auto add = [&](std::string_view name, Type type, std::string_view help) {
    bool there =
        std::any_of(rows.begin(), rows.end(), [&](const auto& row) { return row.name == name; });
    if (!there) rows.push_back({.name = name, .type = type, .help = help, .amendable = true});
  };
  if (of == HelpOf::kAmend)
    rows.insert(rows.end(), driver.amend_options.begin(), driver.amend_options.end());
  if (of == HelpOf::kCreateFile)
    rows.insert(rows.end(), block::FileCreateOptions().begin(), block::FileCreateOptions().end());
  if (of != HelpOf::kAmend || driver.has_backing) add("size", Type::kSize, "Virtual disk size");
  if (driver.has_backing && of != HelpOf::kAmend) {
    add("backing_file", Type::kString, "File name of a base image");
    add("backing_fmt", Type::kString, "Image format of the base image");
  }
  std::sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  if (of == HelpOf::kAmend) {
    Print("Amend options for '{}':\n", driver.name);
  } else {
    Print("Supported {} options:\n", driver.name);
  }
  for (const block::OptionRow& row : rows) {
    const char* type = row.type == Type::kString ? "str"
                       : row.type == Type::kBool ? "bool (on/off)"
                       : row.type == Type::kSize ? "size"
                                                 : "num";
    Print("  {:<22} - {}\n", fmt::format("{}=<{}>", row.name, type), row.help);
  }
  if (of != HelpOf::kCreate) return;
  Print(
      "\nThe protocol level may support further options.\nSpecify the target filename to include "
      "those options.\n");
}

}  // namespace kvartz::cli::img
