#include "vmm/qmp/qmp_schema.h"

#include <gtest/gtest.h>

#include <boost/json/object.hpp>
#include <boost/json/parse.hpp>

namespace kvartz::vmm {
namespace {

using Kind = QmpType::Kind;

constexpr const char* const kWords[] = {"inet", "unix"};
constexpr QmpType kWord{.kind = Kind::kEnum, .words = kWords};
constexpr QmpMember kTag[] = {{"type", kWord}};
constexpr QmpMember kInet[] = {{"port", kQmpInt}};
constexpr QmpMember kUnix[] = {{"path", kQmpString}, {"strict", kQmpBool, kOptional}};
constexpr QmpBranch kBranches[] = {{"inet", kInet}, {"unix", kUnix}};
constexpr QmpType kAddress{
    .kind = Kind::kUnion, .members = kTag, .tag = "type", .branches = kBranches};
constexpr QmpMember kPair[] = {{"node", kQmpString}, {"name", kQmpString}};
constexpr QmpType kNameOrPair{.kind = Kind::kEither, .element = &kQmpString, .members = kPair};
constexpr QmpType kList{.kind = Kind::kArray, .element = &kNameOrPair};
constexpr QmpMember kArguments[] = {{"address", kAddress, kOptional},
                                    {"list", kList, kOptional},
                                    {"open", kQmpOptions, kOptional},
                                    {"count", kQmpInt, kOptional}};

// The error of checking `text` against kArguments; empty: it is right.
std::string Check(std::string_view text) {
  Result<> checked = CheckQmpMembers(kArguments, boost::json::parse(text).as_object());
  return checked ? "" : checked.error().what;
}

TEST(QmpSchemaTest, TakesWhatItDeclares) {
  for (const char* text :
       {"{}", R"({"address": {"type": "unix", "path": "/x", "strict": true}})",
        R"({"address": {"type": "inet", "port": 1}})", R"({"list": []})",
        R"({"list": ["a", {"node": "n", "name": "b"}]})", R"({"open": {"x": {"y": [1, null]}}})",
        R"({"count": -9223372036854775808})"}) {
    EXPECT_EQ(Check(text), "") << text;
  }
}

TEST(QmpSchemaTest, NamesWhatIsWrong) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"count": "1"})", "argument 'count' must be an integer"},
      {R"({"count": 1.5})", "argument 'count' must be an integer"},
      {R"({"count": null})", "argument 'count' must be an integer"},
      {R"({"cuont": 1})", "argument 'cuont' is unexpected"},
      {R"({"address": []})", "argument 'address' must be an object"},
      {R"({"address": {}})", "argument 'address.type' is missing"},
      {R"({"address": {"type": "fd"}})", "argument 'address.type' doesn't take the value 'fd'"},
      {R"({"address": {"type": 1}})", "argument 'address.type' must be a string"},
      {R"({"address": {"type": "inet", "path": "/x"}})", "argument 'address.port' is missing"},
      {R"({"address": {"type": "unix", "path": "/x", "port": 1}})",
       "argument 'address.port' is unexpected"},
      {R"({"list": ["a", 7]})", "argument 'list.1' must be a string"},
      {R"({"list": [{"node": "n"}]})", "argument 'list.0.name' is missing"},
      {R"({"open": "x"})", "argument 'open' must be an object"},
  };
  for (const auto& [text, error] : cases) EXPECT_EQ(Check(text), error) << text;
}

TEST(QmpSchemaTest, CountsAreNotNegative) {
  boost::json::object object{{"a", 5}, {"b", -1}};
  EXPECT_EQ(Count(object, "a").value(), 5u);
  EXPECT_EQ(Count(object, "c", 7).value(), 7u);
  EXPECT_FALSE(Count(object, "b"));
}

}  // namespace
}  // namespace kvartz::vmm
