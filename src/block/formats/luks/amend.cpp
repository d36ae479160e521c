// Key slots by options of amend.
#include <fmt/format.h>

#include <algorithm>

#include "block/formats/luks/luks_node.h"

namespace kvartz::block::luks {
namespace {

struct Wish {
  std::string state;
  std::optional<std::string> new_secret, old_secret;
  std::optional<uint32_t> slot;
  std::optional<uint64_t> iter_time_ms;
};

Result<Wish> TakeWish(const KeyRing& ring, Options& options) {
  Wish wish;
  wish.state = options.Take("state", "");
  if (wish.state != "active" && wish.state != "inactive") {
    return Fail(ErrorCode::kInvalid,
                wish.state.empty() ? "Parameter 'state' is missing: it is active or inactive"
                                   : fmt::format("state={}: it is active or inactive", wish.state));
  }
  wish.new_secret = options.Take("new-secret");
  wish.old_secret = options.Take("old-secret");
  size_t count = ring.header->slots.size();
  if (options.Has("keyslot")) {
    uint64_t slot = TRY(options.TakeNumber("keyslot", 0));
    if (slot >= count)
      return Fail(ErrorCode::kInvalid,
                  fmt::format("keyslot={}: there are 0 to {}", slot, count - 1));
    wish.slot = static_cast<uint32_t>(slot);
  }
  if (options.Has("iter-time")) {
    wish.iter_time_ms = TRY(options.TakeNumber("iter-time", 0));
    if (*wish.iter_time_ms == 0)
      return Fail(ErrorCode::kInvalid, "iter-time=0: it must be 1 or more");
  }
  TRY(options.RefuseRest("amend of luks",
                         {"state", "new-secret", "old-secret", "keyslot", "iter-time"}));
  return wish;
}

Result<> Activate(const KeyRing& ring, const Wish& wish, bool force) {
  if (!wish.new_secret)
    return Fail(ErrorCode::kInvalid, "'new-secret' is required to activate a keyslot");
  if (wish.old_secret)
    return Fail(ErrorCode::kInvalid, "'old-secret' must not be given when activating keyslots");
  if (ring.key.empty())
    return Fail(ErrorCode::kPermission, "the volume's key isn't known: open it with a passphrase");
  std::vector<Slot>& slots = ring.header->slots;
  auto chosen = wish.slot ? slots.begin() + *wish.slot
                          : std::find_if(slots.begin(), slots.end(),
                                         [](const Slot& slot) { return !slot.active; });
  if (chosen == slots.end())
    return Fail(ErrorCode::kNoSpace, "Can't add a keyslot - all keyslots are in use");
  if (chosen->active && !force) {
    return Fail(
        ErrorCode::kState,
        fmt::format("Refusing to overwrite active keyslot {} - please erase it first", chosen->id));
  }
  std::string passphrase = TRY(ring.secret(*wish.new_secret));
  uint32_t id = chosen->id;
  if (chosen->active) TRY(EraseKey(ring.area, *ring.header, id));
  Result<> added = AddKey(ring.area, *ring.header, id, ring.key, passphrase,
                          wish.iter_time_ms.value_or(CreateOptions{}.iter_time_ms));
  explicit_bzero(passphrase.data(), passphrase.size());
  return added;
}

// Those that the passphrase opens.
Result<std::vector<uint32_t>> Matching(const KeyRing& ring, const Wish& wish) {
  std::string passphrase = TRY(ring.secret(*wish.old_secret));
  std::vector<uint32_t> found;
  for (const Slot& slot : ring.header->slots) {
    if (!slot.active || (wish.slot && *wish.slot != slot.id)) continue;
    Result<Unlocked> unlocked = Unlock(ring.area, *ring.header, passphrase, slot.id);
    if (unlocked) {
      found.push_back(slot.id);
    } else if (unlocked.error().code != ErrorCode::kPermission) {
      return std::unexpected(unlocked.error());
    }
  }
  explicit_bzero(passphrase.data(), passphrase.size());
  if (!found.empty()) return found;
  return Fail(ErrorCode::kNotFound,
              wish.slot
                  ? fmt::format("This keyslot {} can't be erased with the provided old password",
                                *wish.slot)
                  : "No keyslots match given (old) password for erase operation");
}

Result<> Deactivate(const KeyRing& ring, const Wish& wish, bool force) {
  if (wish.new_secret)
    return Fail(ErrorCode::kInvalid, "'new-secret' must not be given when erasing keyslots");
  if (wish.iter_time_ms)
    return Fail(ErrorCode::kInvalid, "'iter-time' must not be given when erasing keyslots");
  std::vector<uint32_t> erased;
  if (wish.old_secret) {
    erased = TRY(Matching(ring, wish));
  } else if (wish.slot) {
    if (!ring.header->slots[*wish.slot].active && !force)
      return Fail(ErrorCode::kState,
                  fmt::format("Given keyslot {} is already erased (inactive)", *wish.slot));
    erased.push_back(*wish.slot);
  } else {
    return Fail(
        ErrorCode::kInvalid,
        "To erase keyslot(s), either explicit keyslot index or the password currently contained "
        "in them must be given");
  }
  auto is_active = [](const Slot& slot) { return slot.active; };
  auto& slots = ring.header->slots;
  auto stays = [&](const Slot& slot) {
    return slot.active && std::find(erased.begin(), erased.end(), slot.id) == erased.end();
  };
  if (!force && std::any_of(slots.begin(), slots.end(), is_active) &&
      std::none_of(slots.begin(), slots.end(), stays)) {
    return Fail(ErrorCode::kState,
                "Refusing to erase the last active keyslot: all of the image's data would be lost; "
                "--force does it");
  }
  for (uint32_t slot : erased) TRY(EraseKey(ring.area, *ring.header, slot));
  return {};
}

}  // namespace

Result<> AmendKeys(const KeyRing& ring, Options& options, bool force) {
  if (ring.header->version != 1) {
    return Fail(
        ErrorCode::kUnsupported,
        "not supported yet: changing key slots of LUKS2 (cryptsetup luksAddKey, luksKillSlot)");
  }
  if (!ring.secret) return Fail(ErrorCode::kNotFound, "there are no secrets here");
  Wish wish = TRY(TakeWish(ring, options));
  return wish.state == "active" ? Activate(ring, wish, force) : Deactivate(ring, wish, force);
}

}  // namespace kvartz::block::luks
