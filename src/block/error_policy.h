// What happens when a request fails: rerror=, werror=, on-error of jobs.
#pragma once

#include <cstdint>
#include <string>

#include "base/result.h"

namespace kvartz::block {

// kStop pauses: the machine, or the job. kEnospc: so, when there is no space; else reports.
enum class ErrorPolicy : uint8_t { kReport, kIgnore, kEnospc, kStop };
Result<ErrorPolicy> ParseErrorPolicy(const std::string& name);
const char* NameOf(ErrorPolicy policy);

enum class ErrorAction : uint8_t { kReport, kIgnore, kStop };
ErrorAction ActionOf(ErrorPolicy policy, int errno_value);
const char* NameOf(ErrorAction action);

}  // namespace kvartz::block
