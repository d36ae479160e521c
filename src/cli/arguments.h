// Command lines as getopt_long reads them: rows of options and what was given of them. Help and man
// page follow from the rows.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"

namespace kvartz::cli {

struct OptionSpec {
  char letter = 0;                 // 0: none
  std::string_view name = {};      // long, without dashes; empty: none
  std::string_view argument = {};  // what it takes, as in the help; empty: nothing; "[X]": optional
  std::string_view help = {};
};

// What was given. Keys are long names, or the letter of options that have none.
class Arguments {
 public:
  bool Has(std::string_view key) const { return Last(key) != nullptr; }
  std::string Get(std::string_view key, std::string fallback = {}) const;
  std::optional<std::string> Find(std::string_view key) const;
  std::vector<std::string> All(std::string_view key) const;

  struct Given {
    const OptionSpec* spec;
    std::string value;
  };
  std::vector<Given> given = {};  // in order
  std::vector<std::string> operands = {};

 private:
  const std::string* Last(std::string_view key) const;
};

enum class Operands : uint8_t {
  kAnywhere,   // options may follow operands
  kEndOptions  // the first operand ends the options
};

// Letters may be joined ("-np"), values follow at once ("-fraw", "--output=json") or as the next
// word; long names may be cut short; "--" ends the options; "-1G" is an operand where no option has
// '1' for its letter. Errors: unknown (with the nearest), ambiguous, a value that is missing or not
// wanted.
Result<Arguments> ParseArguments(std::span<const OptionSpec> specs,
                                 std::span<const std::string> words,
                                 Operands operands = Operands::kAnywhere);

// "-f FMT", "--output=OFMT": as in a synopsis.
std::string OptionText(const OptionSpec& spec);
// One line a row: "  -f FMT                 help".
std::string OptionsHelp(std::span<const OptionSpec> specs);

}  // namespace kvartz::cli
