// Something of everything that the C++ library has, to be compiled and run: each part prints what
// it computed.
#include <algorithm>
#include <array>
#include <cmath>
#include <complex>
#include <deque>
#include <functional>
#include <iomanip>
#include <iostream>
#include <list>
#include <map>
#include <memory>
#include <numeric>
#include <queue>
#include <random>
#include <ranges>
#include <regex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <variant>
#include <vector>

namespace {

using Value = std::variant<long, double, std::string>;

struct Shown {
  std::string operator()(long value) const { return std::to_string(value); }
  std::string operator()(double value) const {
    std::ostringstream out;
    out << std::hexfloat << value;
    return out.str();
  }
  std::string operator()(const std::string& value) const { return '"' + value + '"'; }
};

template <unsigned N>
struct Fibonacci {
  static constexpr unsigned long value = Fibonacci<N - 1>::value + Fibonacci<N - 2>::value;
};
template <>
struct Fibonacci<1> {
  static constexpr unsigned long value = 1;
};
template <>
struct Fibonacci<0> {
  static constexpr unsigned long value = 0;
};

template <typename T, size_t N>
class Matrix {
 public:
  explicit Matrix(T seed) {
    for (size_t i = 0; i < N * N; ++i) cells_[i] = std::sin(seed + T(i)) / T(i + 1);
  }
  Matrix operator*(const Matrix& other) const {
    Matrix product(0);
    for (size_t i = 0; i < N; ++i)
      for (size_t j = 0; j < N; ++j) {
        T sum = 0;
        for (size_t k = 0; k < N; ++k) sum += cells_[i * N + k] * other.cells_[k * N + j];
        product.cells_[i * N + j] = sum;
      }
    return product;
  }
  T Trace() const {
    T sum = 0;
    for (size_t i = 0; i < N; ++i) sum += cells_[i * N + i];
    return sum;
  }

 private:
  std::array<T, N * N> cells_;
};

void Containers() {
  std::mt19937_64 random(42);
  std::map<std::string, std::vector<long>> words;
  std::unordered_map<long, std::string> names;
  std::set<long> sorted;
  for (int i = 0; i < 200000; ++i) {
    const long number = static_cast<long>(random() % 100003);
    sorted.insert(number);
    names.try_emplace(number, "n" + std::to_string(number * 7));
    words[names[number].substr(0, 3)].push_back(number);
  }
  size_t total = 0;
  for (const auto& [word, numbers] : words) total += numbers.size() * word.size();
  std::vector<long> flat(sorted.begin(), sorted.end());
  std::shuffle(flat.begin(), flat.end(), random);
  std::stable_sort(flat.begin(), flat.end(), [](long a, long b) { return a % 1000 < b % 1000; });
  std::priority_queue<long> heap(flat.begin(), flat.begin() + 1000);
  long folded = 0;
  for (; !heap.empty(); heap.pop()) folded = folded * 31 + heap.top();
  std::cout << "containers: " << total << ' ' << sorted.size() << ' ' << names.size() << ' '
            << folded << '\n';
}

void Texts() {
  std::string text;
  for (int i = 0; i < 4000; ++i)
    text += "key" + std::to_string(i % 97) + "=" + std::to_string(i * i) + "; ";
  const std::regex pattern(R"((\w+?)(\d+)=(\d+);)");
  std::map<std::string, unsigned long> sums;
  for (std::sregex_iterator at(text.begin(), text.end(), pattern), end; at != end; ++at)
    sums[(*at)[2]] += std::stoul((*at)[3]);
  unsigned long checksum = 0;
  for (const auto& [key, sum] : sums) checksum = checksum * 1000003 + sum + key.size();
  std::cout << "regex: " << sums.size() << ' ' << checksum << '\n';
  std::istringstream in("12 -7 0x1f 3.25e-3 nan inf word");
  in >> std::setbase(0);
  long a = 0, b = 0, c = 0;
  double d = 0;
  in >> a >> b >> c >> d;
  std::cout << "streams: " << a << ' ' << b << ' ' << c << ' ' << std::setprecision(17) << d
            << '\n';
}

void Numbers() {
  Matrix<double, 24> m(0.5), p = m * m * m;
  Matrix<float, 24> f(0.25f), q = f * f;
  Matrix<long double, 12> l(0.125L), r = l * l;
  std::cout << std::hexfloat << "matrices: " << p.Trace() << ' ' << q.Trace() << ' ' << r.Trace()
            << '\n';
  std::complex<double> z(0.1, 0.7), sum;
  for (int i = 0; i < 5000; ++i) sum += std::pow(z, 1.0 / (i + 1)) * std::exp(-z);
  std::cout << "complex: " << sum << '\n';
  double special = 0;
  for (int i = 1; i < 20000; ++i) {
    const double x = i / 97.0;
    special += std::sin(x) * std::log(x) + std::tgamma(x / 40) - std::cbrt(x) + std::erf(x / 9) +
               std::atan2(x, 3) + std::fmod(x * 1e5, 7.5) + std::exp2(-x) + std::hypot(x, 2);
  }
  std::cout << "functions: " << special << std::defaultfloat << '\n';
}

void Errors() {
  unsigned caught = 0;
  const std::function<int(int)> fail = [&](int depth) -> int {
    const std::unique_ptr<std::string> guard = std::make_unique<std::string>("x");
    if (depth == 0) throw std::out_of_range("deep");
    return fail(depth - 1) + static_cast<int>(guard->size());
  };
  for (int i = 0; i < 3000; ++i) {
    try {
      fail(i % 20);
    } catch (const std::logic_error& error) {
      caught += static_cast<unsigned>(std::string(error.what()).size());
    }
  }
  std::cout << "exceptions: " << caught << '\n';
}

void Threads() {
  std::vector<std::thread> threads;
  std::array<unsigned long, 4> sums{};
  for (unsigned t = 0; t < sums.size(); ++t)
    threads.emplace_back([&sums, t] {
      std::minstd_rand random(t + 1);
      for (int i = 0; i < 300000; ++i) sums[t] += random() % 1000;
    });
  for (std::thread& thread : threads) thread.join();
  std::cout << "threads: " << std::accumulate(sums.begin(), sums.end(), 0ul) << '\n';
}

}  // namespace

int main() {
  std::cout << "fibonacci: " << Fibonacci<80>::value << '\n';
  Containers();
  Texts();
  Numbers();
  Errors();
  Threads();
  for (const Value& value : {Value(7l), Value(0.1), Value(std::string("text"))})
    std::cout << std::visit(Shown(), value) << ' ';
  auto squares = std::views::iota(1, 2000) | std::views::transform([](long i) { return i * i; }) |
                 std::views::filter([](long i) { return i % 3 == 1; });
  std::cout << std::accumulate(squares.begin(), squares.end(), 0l) << '\n';
}
