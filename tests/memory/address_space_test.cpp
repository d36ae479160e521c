#include "memory/address_space.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace kvartz {
namespace {

class NullHandler : public IoHandler {
 public:
  uint64_t IoRead(uint64_t, unsigned) override { return 0; }
  void IoWrite(uint64_t, unsigned, uint64_t) override {}
};
NullHandler g_null;

Region Io(const std::string& name, uint64_t base, uint64_t size, int priority = 0) {
  return {.name = name,
          .kind = RegionKind::kIo,
          .base = base,
          .size = size,
          .priority = priority,
          .handler = &g_null};
}

std::string Text(const FlatView& view) {
  std::string text;
  for (const FlatRange& range : view.ranges()) {
    text += range.region->name + ":" + std::to_string(range.base) + "-" +
            std::to_string(range.end()) + "@" + std::to_string(range.region_offset) + " ";
  }
  return text;
}

TEST(AddressSpace, HigherPriorityHidesPartsOfTheLower) {
  AddressSpace space("memory", 1000);
  space.Add(Io("low", 0, 100));
  space.Add(Io("high", 20, 30, 1));
  EXPECT_EQ(Text(*space.view()), "low:0-20@0 high:20-50@0 low:50-100@50 ");
}

TEST(AddressSpace, TheLaterAddedWinsWithinAPriority) {
  AddressSpace space("memory", 1000);
  space.Add(Io("first", 0, 60));
  auto second = space.Add(Io("second", 40, 60));
  EXPECT_EQ(Text(*space.view()), "first:0-40@0 second:40-100@0 ");
  space.Remove(second);
  EXPECT_EQ(Text(*space.view()), "first:0-60@0 ");
}

TEST(AddressSpace, WhatLiesBeyondTheLimitIsCut) {
  AddressSpace space("ports", 65536);
  space.Add(Io("edge", 65530, 100));
  space.Add(Io("outside", 70000, 10));
  space.Add(Io("wraps", UINT64_MAX - 4, 16));
  EXPECT_EQ(Text(*space.view()), "edge:65530-65536@0 ");
}

TEST(AddressSpace, FindAtTheEdges) {
  AddressSpace space("memory", UINT64_MAX);
  space.Add(Io("a", 10, 10));
  space.Add(Io("b", 30, 10));
  auto view = space.view();
  EXPECT_EQ(view->Find(9), nullptr);
  EXPECT_EQ(view->Find(10)->region->name, "a");
  EXPECT_EQ(view->Find(19)->region->name, "a");
  EXPECT_EQ(view->Find(20), nullptr);
  EXPECT_EQ(view->Find(39)->region->name, "b");
  EXPECT_EQ(view->Find(40), nullptr);
  EXPECT_EQ(view->Find(UINT64_MAX), nullptr);
}

// The definition, byte by byte: the highest priority, then the latest, answers.
TEST(AddressSpace, RandomMapsAgreeWithTheDefinition) {
  std::mt19937 random(7);
  for (int round = 0; round < 200; round++) {
    AddressSpace space("memory", 128);
    struct Added {
      AddressSpace::RegionId id;
      uint64_t base, size;
      int priority;
      std::string name;
    };
    std::vector<Added> added;
    for (int i = 0; i < 12; i++) {
      if (!added.empty() && random() % 4 == 0) {
        size_t victim = random() % added.size();
        space.Remove(added[victim].id);
        added.erase(added.begin() + static_cast<ptrdiff_t>(victim));
      } else {
        Added one{0, random() % 140, random() % 50, static_cast<int>(random() % 3) - 1,
                  std::to_string(i)};
        one.id = space.Add(Io(one.name, one.base, one.size, one.priority));
        added.push_back(one);
      }
      auto view = space.view();
      for (uint64_t at = 0; at < 128; at++) {
        const Added* winner = nullptr;
        for (const Added& one : added) {
          if (at >= one.base && at - one.base < one.size &&
              (!winner || one.priority >= winner->priority))
            winner = &one;
        }
        const FlatRange* found = view->Find(at);
        ASSERT_EQ(found != nullptr, winner != nullptr) << at;
        if (!found) continue;
        ASSERT_EQ(found->region->name, winner->name) << at;
        ASSERT_EQ(found->region_offset + (at - found->base), at - winner->base);
      }
    }
  }
}

class Recorder : public AddressSpace::Listener {
 public:
  void ViewChanged(const FlatView& before, const FlatView& after) override {
    changes.push_back(Text(before) + "-> " + Text(after));
  }
  std::vector<std::string> changes;
};

TEST(AddressSpace, ListenersSeeEachPublicationAndABatchIsOne) {
  AddressSpace space("memory", 1000);
  space.Add(Io("a", 0, 10));
  Recorder recorder;
  space.AddListener(&recorder);
  {
    AddressSpace::Batch batch(space);
    auto id = space.Add(Io("b", 10, 10));
    {
      AddressSpace::Batch inner(space);
      space.Add(Io("c", 20, 10));
    }
    space.Remove(id);
    EXPECT_EQ(Text(*space.view()), "a:0-10@0 ");
  }
  {
    AddressSpace::Batch nothing(space);
  }
  space.RemoveListener(&recorder);
  space.Add(Io("d", 50, 10));
  EXPECT_EQ(recorder.changes,
            (std::vector<std::string>{"-> a:0-10@0 ", "a:0-10@0 -> a:0-10@0 c:20-30@0 "}));
}

TEST(AddressSpace, DoorbellsChangeWithoutTouchingOldViews) {
  AddressSpace space("memory", 1000);
  auto id = space.Add(Io("a", 0, 10));
  auto before = space.view();
  space.SetDoorbells(id, {Doorbell{.offset = 4, .event_fd = 3}});
  EXPECT_TRUE(before->Find(0)->region->doorbells.empty());
  EXPECT_EQ(space.view()->Find(0)->region->doorbells.size(), 1u);
  space.Remove(id);
  EXPECT_TRUE(space.view()->ranges().empty());
}

TEST(ViewCache, FollowsTheSpace) {
  AddressSpace space("memory", 1000);
  ViewCache cache(space);
  EXPECT_EQ(Text(cache.Get()), "");
  space.Add(Io("a", 0, 10));
  EXPECT_EQ(Text(cache.Get()), "a:0-10@0 ");
  auto held = cache.Hold();
  space.Add(Io("b", 10, 10));
  EXPECT_EQ(Text(*held), "a:0-10@0 ");
  EXPECT_EQ(Text(cache.Get()), "a:0-10@0 b:10-20@0 ");
}

TEST(ViewCache, ReadersSeeWholeViewsWhileTheMapMoves) {
  AddressSpace space("memory", 1 << 20);
  std::atomic<bool> stop{false};
  space.Add(Io("fixed", 0, 16));
  {
    std::vector<Thread> readers;
    for (int i = 0; i < 2; i++) {
      readers.emplace_back("reader", [&] {
        ViewCache cache(space);
        while (!stop) {
          const FlatView& view = cache.Get();
          EXPECT_EQ(view.Find(3)->region->name, "fixed");
          const FlatRange* moving = view.Find(4096);
          EXPECT_TRUE(!moving || moving->region->name == "moving");
        }
      });
    }
    for (int i = 0; i < 500; i++) space.Remove(space.Add(Io("moving", 4096, 16)));
    stop = true;
  }
}

}  // namespace
}  // namespace kvartz
