// Drives a fuzz target without libFuzzer: the seeds first, then mutations of them for a while.
// Deterministic but for how far the time reaches; an input that breaks the target is named so that
// it can be made again.
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <set>
#include <string>
#include <string_view>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Input = std::vector<uint8_t>;

constexpr size_t kMaxInputBytes = 4096;

// What is being run, for the handler of the signal that a broken target raises.
char current[64];
size_t current_size = 0;

template <typename... Values>
void SetCurrent(const char* format, Values... values) {
  current_size = static_cast<size_t>(std::snprintf(current, sizeof current, format, values...));
}

void OnFatalSignal(int signal_number) {
  (void)!write(STDERR_FILENO, current, current_size);
  signal(signal_number, SIG_DFL);
  raise(signal_number);
}

std::vector<Input> ReadSeeds(const std::filesystem::path& directory) {
  std::set<std::filesystem::path> paths;
  std::error_code ignored;  // A target without seeds has no directory.
  for (const auto& entry : std::filesystem::directory_iterator(directory, ignored)) {
    paths.insert(entry.path());
  }
  std::vector<Input> seeds;
  for (const std::filesystem::path& path : paths) {
    std::ifstream file(path, std::ios::binary);
    seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return seeds;
}

size_t Below(std::mt19937_64& random, size_t limit) { return limit == 0 ? 0 : random() % limit; }

// A fresh random input, or a seed with a few bytes changed, cut or repeated.
Input Mutate(const std::vector<Input>& seeds, std::mt19937_64& random) {
  Input input;
  if (seeds.empty() || Below(random, 4) == 0) {
    input.resize(Below(random, Below(random, 8) == 0 ? kMaxInputBytes : 128));
    for (uint8_t& byte : input) byte = static_cast<uint8_t>(random());
    return input;
  }
  input = seeds[Below(random, seeds.size())];
  for (size_t count = 1 + Below(random, 8); count > 0; --count) {
    const size_t at = Below(random, input.size());
    switch (Below(random, 4)) {
      case 0:
        input.resize(at);
        break;
      case 1:
        input.insert(input.end(), input.begin() + static_cast<ptrdiff_t>(at), input.end());
        break;
      case 2:
        if (!input.empty()) input[at] ^= static_cast<uint8_t>(1u << Below(random, 8));
        break;
      default:
        if (!input.empty()) input[at] = static_cast<uint8_t>(random());
        break;
    }
    if (input.size() > kMaxInputBytes) input.resize(kMaxInputBytes);
  }
  return input;
}

}  // namespace

int main(int argc, char** argv) {
  int seconds = 3;
  unsigned long long only = 0;
  std::vector<Input> seeds;
  for (int i = 1; i < argc; ++i) {
    if (std::string_view(argv[i]) == "--seconds" && i + 1 < argc) {
      seconds = std::atoi(argv[++i]);
    } else if (std::string_view(argv[i]) == "--only" && i + 1 < argc) {
      only = std::strtoull(argv[++i], nullptr, 10);
    } else {
      seeds = ReadSeeds(argv[i]);
    }
  }
  for (const int fatal : {SIGABRT, SIGSEGV, SIGBUS, SIGILL, SIGFPE}) signal(fatal, OnFatalSignal);

  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  unsigned long long run = only != 0 ? only : 1;
  for (; std::chrono::steady_clock::now() < end; ++run) {
    std::mt19937_64 random(run);
    const Input input = run <= seeds.size() ? seeds[run - 1] : Mutate(seeds, random);
    SetCurrent("broken by input %llu: run it alone with --only %llu\n", run, run);
    LLVMFuzzerTestOneInput(input.data(), input.size());
    if (only != 0) return 0;
  }
  std::printf("%llu inputs ran, %zu of them seeds\n", run - 1, seeds.size());
  return 0;
}
