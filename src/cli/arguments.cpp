#include "cli/arguments.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/text.h"

namespace kvartz::cli {
namespace {

std::string_view KeyOf(const OptionSpec& spec) {
  return spec.name.empty() ? std::string_view(&spec.letter, 1) : spec.name;
}

// One command line on its way.
class Parser {
 public:
  Parser(std::span<const OptionSpec> specs, std::span<const std::string> words)
      : specs_(specs), words_(words) {}

  Result<Arguments> Run(Operands operands) {
    while (at_ < words_.size()) {
      const std::string& word = words_[at_++];
      if (word == "--") break;
      if (word.starts_with("--")) {
        TRY(TakeLong(std::string_view(word).substr(2)));
      } else if (word.size() > 1 && word[0] == '-' && !IsNumber(word)) {
        TRY(TakeLetters(word));
      } else {
        result_.operands.push_back(word);
        if (operands == Operands::kEndOptions) break;
      }
    }
    while (at_ < words_.size()) result_.operands.push_back(words_[at_++]);
    return std::move(result_);
  }

 private:
  // "-1G": a digit is no option's letter.
  bool IsNumber(const std::string& word) const {
    auto is_letter = [&](const OptionSpec& spec) { return spec.letter == word[1]; };
    return word[1] >= '0' && word[1] <= '9' && std::ranges::none_of(specs_, is_letter);
  }

  Result<const OptionSpec*> FindLong(std::string_view name) {
    const OptionSpec* found = nullptr;
    std::vector<std::string_view> names;
    for (const OptionSpec& spec : specs_) {
      if (spec.name.empty()) continue;
      if (spec.name == name) return &spec;
      names.push_back(spec.name);
      if (name.empty() || !spec.name.starts_with(name)) continue;
      if (found) {
        return Fail(ErrorCode::kInvalid, fmt::format("option '--{}' is ambiguous (--{}, --{})",
                                                     name, found->name, spec.name));
      }
      found = &spec;
    }
    if (found) return found;
    std::string_view nearest = NearestName(name, names);
    return Fail(ErrorCode::kInvalid,
                fmt::format("unrecognized option '--{}'{}", name,
                            nearest.empty() ? "" : fmt::format(" (did you mean --{}?)", nearest)));
  }

  Result<> TakeLong(std::string_view text) {
    size_t equals = text.find('=');
    const OptionSpec* spec = TRY(FindLong(text.substr(0, equals)));
    if (equals != std::string_view::npos) {
      if (spec->argument.empty())
        return Fail(ErrorCode::kInvalid, fmt::format("option '--{}' takes no value", spec->name));
      return Add(*spec, std::string(text.substr(equals + 1)));
    }
    return TakeNext(*spec);
  }

  Result<> TakeLetters(const std::string& word) {
    for (size_t i = 1; i < word.size(); i++) {
      const OptionSpec* found = nullptr;
      for (const OptionSpec& spec : specs_) {
        if (spec.letter == word[i]) found = &spec;
      }
      if (!found)
        return Fail(ErrorCode::kInvalid, fmt::format("unrecognized option '-{}'", word[i]));
      if (!found->argument.empty() && i + 1 < word.size()) return Add(*found, word.substr(i + 1));
      TRY(TakeNext(*found));
    }
    return {};
  }

  // An option whose value, if it has one, is the next word.
  Result<> TakeNext(const OptionSpec& spec) {
    if (spec.argument.empty() || spec.argument.starts_with('[')) return Add(spec, "");
    if (at_ >= words_.size())
      return Fail(ErrorCode::kInvalid, fmt::format("option '{}' needs a value", OptionText(spec)));
    return Add(spec, words_[at_++]);
  }

  Result<> Add(const OptionSpec& spec, std::string value) {
    result_.given.push_back({&spec, std::move(value)});
    return {};
  }

  std::span<const OptionSpec> specs_;
  std::span<const std::string> words_;
  size_t at_ = 0;
  Arguments result_;
};

}  // namespace

const std::string* Arguments::Last(std::string_view key) const {
  const std::string* value = nullptr;
  for (const Given& one : given) {
    if (KeyOf(*one.spec) == key) value = &one.value;
  }
  return value;
}

std::string Arguments::Get(std::string_view key, std::string fallback) const {
  const std::string* value = Last(key);
  return value ? *value : std::move(fallback);
}

std::optional<std::string> Arguments::Find(std::string_view key) const {
  const std::string* value = Last(key);
  return value ? std::optional(*value) : std::nullopt;
}

std::vector<std::string> Arguments::All(std::string_view key) const {
  std::vector<std::string> values;
  for (const Given& one : given) {
    if (KeyOf(*one.spec) == key) values.push_back(one.value);
  }
  return values;
}

Result<Arguments> ParseArguments(std::span<const OptionSpec> specs,
                                 std::span<const std::string> words, Operands operands) {
  return Parser(specs, words).Run(operands);
}

std::string OptionText(const OptionSpec& spec) {
  if (spec.letter == 0) {
    if (spec.argument.empty()) return fmt::format("--{}", spec.name);
    if (spec.argument.starts_with('['))
      return fmt::format("--{}[={}", spec.name, spec.argument.substr(1));
    return fmt::format("--{}={}", spec.name, spec.argument);
  }
  return spec.argument.empty() ? fmt::format("-{}", spec.letter)
                               : fmt::format("-{} {}", spec.letter, spec.argument);
}

std::string OptionsHelp(std::span<const OptionSpec> specs) {
  std::string text;
  for (const OptionSpec& spec : specs) {
    std::string left = OptionText(spec);
    if (spec.letter != 0 && !spec.name.empty()) left += fmt::format(", --{}", spec.name);
    text += fmt::format("  {:<30} {}\n", left, spec.help);
  }
  return text;
}

}  // namespace kvartz::cli
