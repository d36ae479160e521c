// Random programs, with translation and without: both have to do the same.
//
// KVARTZ_JIT_CASES and KVARTZ_JIT_SEED choose how many programs and which (default: a slice for
// every build).
#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <cstdlib>

#include "base/sync.h"
#include "cpu/cpuid.h"
#include "cpu/x86/jit/comparison.h"
#include "cpu/x86/jit/engine.h"
#include "cpu/x86/jit/program_generator.h"

namespace kvartz::cpu::x86::programs {
namespace {

// How often the translated side runs each program: what is hot may be translated otherwise.
constexpr unsigned kRuns = 3;

// A program that takes longer (a wild jump may lead into an endless loop) tells nothing.
constexpr int64_t kLimitNs = 200'000'000;

uint64_t Setting(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 0) : otherwise;
}

// Ends a program that doesn't come to an end by itself.
class Watchdog {
 public:
  Watchdog() : thread_("watchdog", [this] { Watch(); }) {}
  ~Watchdog() {
    LockGuard guard(mutex_);
    quit_ = true;
    cond_.NotifyAll();
  }
  void Begin(BareBoard* board, int64_t limit_ns) {
    LockGuard guard(mutex_);
    board_ = board;
    deadline_ns_ = MonotonicClock::Instance().NowNs() + limit_ns;
  }
  void End() { Begin(nullptr, 0); }

 private:
  void Watch() {
    LockGuard guard(mutex_);
    while (!quit_) {
      cond_.WaitFor(guard, kLookNs, [this] { return quit_; });
      if (board_ != nullptr && MonotonicClock::Instance().NowNs() > deadline_ns_) board_->Stop();
    }
  }

  static constexpr int64_t kLookNs = 50'000'000;
  Mutex mutex_;
  CondVar cond_;
  bool quit_ = false;
  int64_t deadline_ns_ = 0;
  BareBoard* board_ = nullptr;
  Thread thread_;
};

class JitTest : public testing::Test {
 protected:
  JitTest() : generator_(FeatureSet::FromCpuid(SoftCpuid(*ParseCpuModel("max")))) {}

  ProgramBoard& Board(Shape shape, bool jit) {
    auto& board = boards_[static_cast<unsigned>(shape)][jit];
    if (!board) board = std::make_unique<ProgramBoard>(shape, SoftOptions{.jit = jit});
    return *board;
  }

  End Run(ProgramBoard& board, const Program& program, const Image& image, int64_t limit_ns,
          ProgramBoard::Interruptions interruptions) {
    watchdog_.Begin(&board.board(), limit_ns);
    const End end = board.Run(program, image, data_, interruptions);
    watchdog_.End();
    return end;
  }

  // Runs a program, or what is left of it, on both; the differences.
  std::string Try(const Program& program, const std::vector<bool>& keep, Image* image) {
    if (!Assemble(program, keep, image)) return "";
    FillData(program.data_seed);
    if (fresh_) boards_[static_cast<unsigned>(program.shape)][true].reset();
    ProgramBoard& interpreter = Board(program.shape, false);
    ProgramBoard& jit = Board(program.shape, true);
    const End expected =
        Run(interpreter, program, *image, kLimitNs, ProgramBoard::Interruptions::kNone);
    ++ends_[expected.triple_fault ? 257 : expected.stopped ? 258 : expected.vector + 1];
    if (expected.stopped) return "";
    std::string text;
    for (unsigned run = 0; run < kRuns && text.empty(); ++run) {
      const End end = Run(jit, program, *image, 20 * kLimitNs, ProgramBoard::Interruptions::kSome);
      text = Compare(*image, interpreter, expected, jit, end);
      if (!text.empty()) text = "in run " + std::to_string(run) + "\n" + text;
    }
    return text;
  }

  void FillData(uint64_t seed) {
    if (seed == data_seed_) return;
    data_seed_ = seed;
    oracle::InsnEncoder random(seed);
    data_.resize(kDataBytes);
    for (uint64_t at = 0; at < kDataBytes; at += 64) random.FillInteresting(&data_[at], 64);
  }

  // Leaves out as many items as possible while there is a difference.
  std::vector<bool> Shrink(const Program& program) {
    std::vector<bool> keep(static_cast<size_t>(program.sections.back().items.back().id) + 1, true);
    Image image;
    for (size_t chunk = keep.size() / 2; chunk > 0; chunk = chunk == 1 ? 0 : (chunk + 1) / 2) {
      for (size_t at = 0; at < keep.size(); at += chunk) {
        std::vector<bool> fewer = keep;
        for (size_t i = at; i < std::min(at + chunk, keep.size()); ++i) fewer[i] = false;
        if (fewer != keep && !Try(program, fewer, &image).empty()) keep = fewer;
      }
    }
    return keep;
  }

  void Report(const Program& program, const std::string& text) {
    Image image;
    // With nothing translated yet if it doesn't come again otherwise.
    fresh_ = Try(program, {}, &image).empty();
    const std::vector<bool> keep = Shrink(program);
    const std::string less = Try(program, keep, &image);
    fresh_ = false;
    ADD_FAILURE() << Describe(program) << "\n"
                  << (less.empty() ? text + "(not when run again)\n" : less)
                  << Disassemble(program, image);
  }

  // Boards whose programs were translated did translate them, in their mode.
  void ExpectTranslated() {
    for (unsigned shape = 0; shape < boards_.size(); ++shape) {
      if (!boards_[shape][1]) continue;
      const jit::Counters& counters = boards_[shape][1]->board().vcpu().jit()->counters();
      const Layout layout = LayoutOf(static_cast<Shape>(shape));
      const uint64_t units = layout.is16()   ? counters.units16
                             : layout.is64() ? counters.units - counters.units16 - counters.units32
                                             : counters.units32;
      EXPECT_GT(units, 0u) << "shape " << shape;
      // The rest is the exception: what faults, watched code, instructions across pages.
      EXPECT_LT(counters.steps, 10 * counters.unit_insns) << "shape " << shape;
    }
  }

  ProgramGenerator generator_;
  Watchdog watchdog_;
  std::array<std::array<std::unique_ptr<ProgramBoard>, 2>, static_cast<size_t>(Shape::kCount)>
      boards_;
  std::vector<uint8_t> data_;
  uint64_t data_seed_ = ~uint64_t{0};
  bool fresh_ = false;  // each program on a board of its own
  std::array<uint64_t, 259> ends_{};
};

Shape ShapeOf(uint64_t seed) {
  static constexpr Shape kOthers[] = {
      Shape::kCompat32, Shape::kPae32,  Shape::kPaged32,     Shape::kFlat32,   Shape::kSegmented32,
      Shape::kPaged16,  Shape::kReal16, Shape::kUnaligned16, Shape::kUnreal16, Shape::kVm86};
  return seed % 10 < 6 ? Shape::k64 : kOthers[seed / 10 % std::size(kOthers)];
}

TEST_F(JitTest, RandomProgramsDoTheSameWithAndWithout) {
  const uint64_t wanted = Setting("KVARTZ_JIT_CASES", 12000);
  const uint64_t first = Setting("KVARTZ_JIT_SEED", 1);
  const uint64_t only = Setting("KVARTZ_JIT_SHAPE", ~uint64_t{0});
  unsigned differences = 0;
  uint64_t items = 0;
  for (uint64_t seed = first; seed < first + wanted && differences < 10; ++seed) {
    const Shape shape =
        only < static_cast<uint64_t>(Shape::kCount) ? static_cast<Shape>(only) : ShapeOf(seed);
    const bool real = LayoutOf(shape).mode == Mode::kReal16;
    const unsigned cpl = shape != Shape::kVm86 && (real || seed % 3 == 0) ? 0 : 3;
    const Program program = generator_.Generate(seed, shape, cpl);
    Image image;
    const std::string text = Try(program, {}, &image);
    items += image.lines.size();
    if (text.empty()) continue;
    ++differences;
    Report(program, text);
  }
  printf("%lu items in programs, each of one instruction or a few; ", items);
  printf("%lu programs ended by themselves, %lu triple faults, %lu stopped; exceptions:",
         ends_[0] + ends_[kEndVector + 1], ends_[257], ends_[258]);
  for (unsigned v = 0; v < 256; ++v)
    if (v != kEndVector && ends_[v + 1]) printf(" %u: %lu", v, ends_[v + 1]);
  printf("\n");
  EXPECT_EQ(differences, 0u);
  ExpectTranslated();
}

}  // namespace
}  // namespace kvartz::cpu::x86::programs
